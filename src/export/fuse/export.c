/* SPDX-License-Identifier: MIT */
/*
 * The session: mount, read requests, unmount.
 *
 * The reader is the only one that receives.  It ends when the kernel has let go (receive says so
 * with 0) or when fuse_export_stop_co() asks; only then may the session be destroyed, after the
 * last request has replied.
 */
#include "export/fuse/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>
#include "base/err.h"
#include "base/cleanup.h"
#include "base/log.h"
#include "disk/io.h"
#include "disk/node.h"
#include "runtime/loop.h"

/* ---------------------------------------------------------------- buffers */

void *fuse_take_buffer(struct fuse_export *x) {
    x->taken = true;
    return x->incoming.mem;
}

void fuse_give_buffer(struct fuse_export *x, void *mem) {
    if (x->spares < SPARES_MAX)
        x->spare[x->spares++] = mem;
    else
        free(mem);
}

/* ---------------------------------------------------------------- the reader */

/* One request, or -errno; 0: the mount is gone. */
static int receive_co(struct fuse_export *x) {
    const struct fuse_lib *f = x->lib;
    if (!x->incoming.mem && x->spares)
        x->incoming.mem = x->spare[--x->spares];
    for (;;) {
        if (x->ending)
            return 0;
        int n = f->session_receive_buf(x->session, &x->incoming);
        if (n != -EAGAIN && n != -EINTR)
            return n;
        n = loop_poll_co(f->session_fd(x->session), POLLIN, -1);
        if (n < 0 && n != -ECANCELED)
            return n;
    }
}

static void reader(void *arg) {
    struct fuse_export *x = arg;
    x->reader = task_self();
    int n;
    while ((n = receive_co(x)) > 0) {
        x->taken = false;
        x->lib->session_process_buf(x->session, &x->incoming);
        if (x->taken)
            x->incoming.mem = NULL;
    }
    if (n < 0)
        log_msg(LOG_LV_WARN, "%s: the mount failed: %s", x->mountpoint, strerror(-n));
    x->ended = true;
    x->reader = NULL;
    if (x->stopper)
        task_wake(x->stopper);
    else if (x->on_end)
        x->on_end(x->arg);
}

/* ---------------------------------------------------------------- operations of export.h */

static struct fuse_export *of(const struct export *x) {
    return (struct fuse_export *)x;
}

static unsigned export_users(const struct export *x) {
    return (unsigned)of(x)->open_files;
}

/* Pages that the kernel has not written yet come as requests, so not while these are held back. */
static int sync_mount(void *arg) {
    struct fuse_export *x = arg;
    AUTO_FD int fd = -1;
    if (x->sync)
        x->sync(x->arg);
    if (!x->as_file) /* whose pages are written through */
        fd = open(x->mountpoint, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    char pid[24] = "";
    if (fd >= 0 && fgetxattr(fd, "user.strata.pid", pid, sizeof(pid) - 1) > 0 &&
        strtol(pid, NULL, 10) == getpid()) /* not what somebody has put on top */
        syncfs(fd);
    return 0;
}

static void export_pause_co(struct export *b) {
    struct fuse_export *x = of(b);
    if (x->writable && !x->paused && !x->ended && !x->ending)
        offload_blocking_co(sync_mount, x);
    x->paused++;
    task_group_wait_co(&x->requests);
}

static void export_resume(struct export *b) {
    if (--of(b)->paused == 0)
        waitq_wake_all(&of(b)->resumed);
}

static json_t *export_describe(const struct export *b) {
    const struct fuse_export *x = of(b);
    return json_pack("{s:s, s:s, s:b, s:i, s:I, s:I, s:I, s:I}", "type", b->ops->type, "name",
                     b->name, "read-only", b->read_only, "clients", (int)export_users(b),
                     "requests", (json_int_t)x->served, "bytes-read", (json_int_t)x->bytes_read,
                     "bytes-written", (json_int_t)x->bytes_written, "errors",
                     (json_int_t)x->errors);
}

static int export_remove_co(struct export *b, bool hard, struct err *e) {
    if (export_users(b) && !hard)
        return err_set(e, EBUSY, "export '%s' has open files", b->name);
    int rc = fuse_export_unmount_co(of(b), hard, e);
    if (rc == 0)
        fuse_export_stop_co(of(b));
    return rc;
}

static const struct export_ops fuse_ops = {
    .type = "fuse",
    .users = export_users,
    .pause_co = export_pause_co,
    .resume = export_resume,
    .describe = export_describe,
    .remove_co = export_remove_co,
};

struct export *fuse_export_base(struct fuse_export *x) {
    return &x->base;
}

/* ---------------------------------------------------------------- begin and end */

/* Option lists end at commas, and mount tables at blanks. */
static void plain_label(char *out, size_t room, const char *label) {
    size_t n = 0;
    for (; *label && n + 1 < room; label++)
        out[n++] = (unsigned char)*label <= ' ' || strchr(",\\\"", *label) ? '_' : *label;
    out[n] = 0;
}

static int make_session(struct fuse_export *x, const struct fuse_export_opts *o, struct err *e) {
    char label[200], options[320];
    plain_label(label, sizeof(label), o->label ? o->label : o->node->filename);
    snprintf(options, sizeof(options),
             "-ofsname=%s,subtype=strata,default_permissions,max_read=%d%s%s", label, TRANSFER_MAX,
             o->allow_other ? ",allow_other" : "", o->writable ? "" : ",ro");
    struct fuse_args args = FUSE_ARGS_INIT(0, NULL);
    if (x->lib->opt_add_arg(&args, "strata") == 0 && x->lib->opt_add_arg(&args, options) == 0)
        x->session = x->lib->session_new(&args, &fuse_export_ops, sizeof(fuse_export_ops), x);
    x->lib->opt_free_args(&args);
    return x->session ? 0 : err_set(e, ENOMEM, "%s: no FUSE session", o->mountpoint);
}

static int mount_session(struct fuse_export *x, struct err *e) {
    if (access("/dev/fuse", R_OK | W_OK) < 0) {
        err_errno(e, errno, "/dev/fuse");
        err_hint(e, "FUSE must be allowed here: load the module fuse, or pass the device into the "
                    "container");
        return err_status(e);
    }
    if (x->lib->session_mount(x->session, x->mountpoint) != 0) {
        err_set(e, EIO, "%s: cannot be mounted on", x->mountpoint);
        err_hint(e, "without root it takes fusermount3 (package fuse3) and a folder of your own");
        return -EIO;
    }
    int fd = x->lib->session_fd(x->session);
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
        return err_errno(e, errno, "%s: /dev/fuse", x->mountpoint);
    return 0;
}

static void export_free(struct fuse_export *x) {
    if (x->session) {
        x->lib->session_unmount(x->session); /* nothing to do when the kernel let go before */
        x->lib->session_destroy(x->session);
    }
    while (x->spares)
        free(x->spare[--x->spares]);
    free(x->incoming.mem);
    free(x->parts);
    free(x->mountpoint);
    free(x->base.name);
    free(x);
}

/* Absolute, for the working folder may change before the end. */
static char *whole_path(const char *mountpoint, bool *as_file, struct err *e) {
    struct stat st;
    char *path = realpath(mountpoint, NULL);
    if (!path || stat(path, &st) < 0) {
        err_errno(e, errno, "%s", mountpoint);
        free(path);
        return NULL;
    }
    *as_file = S_ISREG(st.st_mode);
    if (*as_file || S_ISDIR(st.st_mode))
        return path;
    err_set(e, ENOTDIR, "%s: neither a folder nor a regular file", mountpoint);
    free(path);
    return NULL;
}

int fuse_export_new_co(struct loop *loop, const struct fuse_export_opts *o,
                       struct fuse_export **out, struct err *e) {
    const struct fuse_lib *lib = fuse_lib_get(e);
    bool as_file;
    char *path = lib ? whole_path(o->mountpoint, &as_file, e) : NULL;
    if (!path)
        return err_status(e);
    struct fuse_export *x = calloc(1, sizeof(*x));
    char *name = x ? strdup(o->name ? o->name : "") : NULL;
    if (!name) {
        free(x);
        free(path);
        return err_set(e, ENOMEM, "%s: no memory to mount it", o->mountpoint);
    }
    *x = (struct fuse_export){.base = {&fuse_ops, name, o->node, !o->writable},
                              .lib = lib,
                              .loop = loop,
                              .mountpoint = path,
                              .as_file = as_file,
                              .writable = o->writable,
                              .uid = getuid(),
                              .gid = getgid(),
                              .started = time(NULL),
                              .on_end = o->on_end,
                              .on_unused = o->on_unused,
                              .sync = o->sync,
                              .arg = o->arg};
    x->parts = calloc(o->nparts + 1, sizeof(*x->parts));
    if (x->parts && o->nparts)
        memcpy(x->parts, o->parts, o->nparts * sizeof(*x->parts));
    x->nparts = x->parts ? o->nparts : 0;
    task_sem_init(&x->room, IN_FLIGHT_MAX);
    task_group_init(&x->requests);
    waitq_init(&x->resumed);
    int rc = make_session(x, o, e);
    if (rc == 0)
        rc = mount_session(x, e);
    if (rc < 0) {
        export_free(x);
        return rc;
    }
    task_spawn(loop, reader, x);
    *out = x;
    return 0;
}

struct unmount {
    const char *path;
    bool lazy;
};

static int unmount_blocking(void *arg) {
    const struct unmount *u = arg;
    return fuse_unmount_path(u->path, u->lazy);
}

int fuse_export_unmount_co(struct fuse_export *x, bool lazy, struct err *e) {
    if (x->ended)
        return 0;
    struct unmount u = {x->mountpoint, lazy};
    int rc = offload_blocking_co(unmount_blocking, &u);
    if (rc == -EINVAL || rc == -ENOENT)
        return 0; /* somebody was faster */
    return rc < 0 ? err_errno(e, -rc, "%s: unmounting", x->mountpoint) : 0;
}

int fuse_export_stop_co(struct fuse_export *x) {
    if (!x)
        return 0;
    x->ending = true;
    x->stopper = task_self();
    while (!x->ended) {
        waitq_wake_all(&x->resumed);
        loop_cancel_fd(x->loop, x->lib->session_fd(x->session));
        task_park_co();
    }
    task_group_wait_co(&x->requests);
    int rc = x->writable ? disk_flush_co(x->base.node) : 0;
    export_free(x);
    return rc;
}
