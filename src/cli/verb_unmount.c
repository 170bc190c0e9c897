/* SPDX-License-Identifier: MIT */
/*
 * strata unmount, strata detach: end what mount and attach began, and wait until it is in the
 * image.
 *
 * The server's process id is an extended attribute of its FUSE mount.  What lies on top of a hidden
 * one leads there: the mounted device's backing file, or the file that fuse2fs was given.
 */
#include "cli/cli.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>
#include "base/cleanup.h"
#include "cli/mount_table.h"
#include "export/fuse/export.h"

struct args {
    bool lazy;
};
static const struct cli_opt opts[] = {
    CLI_FLAG(struct args, lazy, 'l', "lazy",
             "take the name away now, even while files are open; do not wait"),
    CLI_END};

/* A descriptor of the process that serves the FUSE mount at `path`; -ENOTCONN: it has died. */
static int server_of(const char *path) {
    char text[24];
    ssize_t n = getxattr(path, "user.strata.pid", text, sizeof(text) - 1);
    if (n < 0)
        return -errno;
    text[n] = 0;
    long pid = strtol(text, NULL, 10);
    int fd = pid > 0 ? (int)syscall(SYS_pidfd_open, (pid_t)pid, 0) : -1;
    return fd < 0 ? -ENOTCONN : fd;
}

/* The folder that a file of ours lies in, "/run/strata/strata-x/p1"; NULL: it is none of ours. */
static char *hidden_folder(const char *file) {
    const char *slash = file ? strrchr(file, '/') : NULL;
    char *folder = slash ? strndup(file, (size_t)(slash - file)) : NULL;
    struct mount_entry m;
    if (folder && mount_find(folder, &m) && !strcmp(m.type, "fuse.strata"))
        return folder;
    free(folder);
    return NULL;
}

/* What serves the mount in `m`: a pidfd, -ENOTCONN when it is ours and dead, -EINVAL if not ours.
 */
static int server_below(const struct mount_entry *m) {
    if (!strcmp(m->type, "fuse.strata"))
        return server_of(m->path);
    AUTO_FREE char *file =
        strncmp(m->source, "/dev/", 5) ? strdup(m->source) : loop_backing_file(m->source);
    AUTO_FREE char *folder = hidden_folder(file);
    return folder ? server_of(folder) : -EINVAL;
}

static void wait_for(int pidfd) {
    struct pollfd p = {.fd = pidfd, .events = POLLIN};
    while (poll(&p, 1, -1) < 0 && errno == EINTR)
        ;
    close(pidfd);
}

static int unmount_run(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    struct err *e = &ctx->err;
    const char *name = ctx->pos[0];
    AUTO_FREE char *path = mount_path(name);
    struct mount_entry m;
    if (!path)
        return err_errno(e, errno, "%s", name);
    if (!mount_find(path, &m))
        return err_set(e, EINVAL, "%s: nothing is mounted there", name);
    int server = server_below(&m);
    if (server == -EINVAL)
        return err_set(e, EINVAL, "%s: mounted by somebody else (%s)", name, m.type);
    bool dead = server == -ENOTCONN;
    int rc = fuse_unmount_path(path, a->lazy || dead);
    if (rc < 0) {
        if (server >= 0)
            close(server);
        err_errno(e, -rc, "%s", name);
        if (rc == -EBUSY)
            err_hint(e, "somebody has files open there, or stands in it: fuser -m %s tells who",
                     name);
        return rc;
    }
    if (server >= 0 && a->lazy)
        close(server);
    else if (server >= 0)
        wait_for(server);
    return 0;
}

static int detach_run(struct verb_ctx *ctx) {
    struct err *e = &ctx->err;
    const char *device = ctx->pos[0];
    AUTO_FREE char *file = loop_backing_file(device);
    AUTO_FREE char *folder = hidden_folder(file);
    if (!folder)
        return err_set(e, EINVAL, "%s: not a device of `strata attach`", device);
    int server = server_of(folder);
    int rc = loop_clear(device);
    if (rc < 0) {
        if (server >= 0)
            close(server);
        return err_errno(e, -rc, "%s", device);
    }
    if (server >= 0)
        wait_for(server);
    return 0;
}

static const char *const unmount_details[] = {
    "Ends what `strata mount` began at DIR, and waits until everything written there is in the "
    "image. A mount whose server has died is just taken away.",
    NULL};
static const char *const detach_details[] = {
    "Ends what `strata attach` began, and waits until everything written is in the image. A device "
    "in use is let go at its last close.",
    NULL};

const struct verb verb_unmount = {
    .name = "unmount",
    .summary = "end a mount, and wait until all is in the image",
    .synopsis = "DIR",
    .pos_min = 1,
    .pos_max = 1,
    .opts = opts,
    .args_size = sizeof(struct args),
    .details = unmount_details,
    .run = unmount_run,
};

const struct verb verb_detach = {
    .name = "detach",
    .summary = "end a block device of attach",
    .synopsis = "DEVICE",
    .pos_min = 1,
    .pos_max = 1,
    .details = detach_details,
    .run = detach_run,
};
