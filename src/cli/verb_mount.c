/* SPDX-License-Identifier: MIT */
/*
 * strata mount, strata attach: a disk in the local file system tree.
 *
 *      mount IMAGE DIR         DIR/disk and DIR/p1 ... are the disk and its partitions
 *      mount --fs IMAGE DIR    the file system in the image, at DIR
 *      attach IMAGE            a block device, whose name is printed
 *
 * All three are one FUSE session; the latter two have it in a hidden folder, with a loop device
 * (or, without root, a helper that reads the file) on top, and end when the last user of the hidden
 * file has closed it.
 *
 * Order of things: (fork, guard) - open the image - overlay - FUSE - loop device, file system -
 * control socket - ready - serve - end of the control socket - what the kernel holds comes back -
 * flush, commit or keep.  What was put into the
 * system is taken away in reverse order; after kill -9 the guard does it (mount_table.h).
 */
#include "cli/cli.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "base/cleanup.h"
#include "base/strbuf.h"
#include "cli/daemon.h"
#include "cli/mount_table.h"
#include "control/control.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "disk/overlay.h"
#include "export/fuse/export.h"
#include "export/loopdev.h"
#include "job/fat_commit.h"
#include "job/partition.h"
#include "runtime/loop.h"
#include "runtime/task.h"

extern char **environ;

struct args {
    struct cli_image image;
    const char *scratch, *keep, *partition, *control;
    uint64_t scratch_size;
    bool fs, snapshot, commit, write, foreground, allow_other;
    /* From prepare to run. */
    bool block; /* attach */
    int status_fd;
    struct guard guard;
};

#define COMMON_ROWS                                                                                \
    CLI_IMAGE_ROWS(struct args, image),                                                            \
        CLI_FLAG(struct args, write, 'w', "write", "writes change the image"),                     \
        CLI_FLAG(struct args, snapshot, 's', "snapshot",                                           \
                 "writes go to a temporary overlay that vanishes at the end"),                     \
        CLI_STR(struct args, scratch, 0, "scratch", "DIR",                                         \
                "folder of the temporary overlay ($TMPDIR, else /var/tmp), or memory:SIZE"),       \
        CLI_SIZE(struct args, scratch_size, 0, "scratch-size", "SIZE", 0, 0, INT64_MAX,            \
                 "most that the temporary overlay may take; 0 is no limit"),                       \
        CLI_FLAG(struct args, commit, 0, "commit-on-exit",                                         \
                 "write the temporary overlay back into the image at the end"),                    \
        CLI_STR(struct args, keep, 0, "keep", "FILE",                                              \
                "save the temporary overlay as a qcow2 file at the end"),                          \
        CLI_STR(struct args, partition, 'P', "partition", "N",                                     \
                "the partition that is meant, as Linux counts them"),                              \
        CLI_STR(struct args, control, 0, "control", "SOCKET",                                      \
                "take commands on this unix socket; see strata ctl"),                              \
        CLI_FLAG(struct args, foreground, 0, "foreground",                                         \
                 "stay until it is unmounted, or a signal comes")

static const struct cli_opt mount_opts[] = {
    COMMON_ROWS,
    CLI_FLAG(struct args, fs, 0, "fs", "mount the file system in the image, not the disk as files"),
    CLI_FLAG(struct args, allow_other, 0, "allow-other", "let other users look, too"), CLI_END};
static const struct cli_opt attach_opts[] = {COMMON_ROWS, CLI_END};

struct session {
    struct verb_ctx *ctx;
    struct args *a;
    const char *image; /* without ":PARTITION" */
    char *image_copy;
    struct control_disk disk;
    struct control_disk *disks[1];
    struct control *control;
    struct partition_table table;
    struct fuse_export *fuse;
    char hidden[64]; /* folder of ours that the FUSE mount is on; empty: the user's own */
    char device[32]; /* loop device; empty: none */
    char *target;    /* absolute, where the file system is mounted; NULL: none */
    struct task *task;
    unsigned signals;
    bool unused, ended;
};

static bool writable(const struct args *a) {
    return a->write || a->snapshot;
}

/* ---------------------------------------------------------------- arguments */

static int prepare(struct verb_ctx *ctx) {
    struct args *a = ctx->args;
    struct err *e = &ctx->err;
    a->status_fd = -1;
    a->guard.fd = -1;
    const char *needs = a->snapshot       ? NULL
                        : a->commit       ? "--commit-on-exit"
                        : a->keep         ? "--keep"
                        : a->scratch      ? "--scratch"
                        : a->scratch_size ? "--scratch-size"
                                          : NULL;
    if (needs)
        return err_set(e, EINVAL, "%s needs --snapshot", needs);
    if (a->snapshot && a->write)
        return err_set(e, EINVAL, "--snapshot and --write exclude each other");
    if (a->commit && a->keep)
        return err_set(e, EINVAL, "--commit-on-exit and --keep exclude each other");
    if ((a->commit || a->keep) && !a->foreground) {
        err_set(e, EINVAL, "%s needs --foreground", a->keep ? "--keep" : "--commit-on-exit");
        err_hint(e, "in the background nobody would hear that it failed");
        return -EINVAL;
    }
    if (a->keep && access(a->keep, F_OK) == 0)
        return err_set(e, EEXIST, "--keep: %s already exists", a->keep);
    a->block = ctx->pos_n == 1;
    int rc = a->foreground ? 0 : daemon_fork(&a->status_fd, e);
    return rc ? rc : guard_start(&a->guard, e);
}

/* "disk.qcow2:2" is partition 2, unless a file of that name is there. */
static void split_partition(struct session *s) {
    const char *name = s->ctx->pos[0], *colon = strrchr(name, ':');
    s->image = name;
    if (!s->a->fs || s->a->partition || s->a->image.image_opts || !colon || !colon[1] ||
        colon[1 + strspn(colon + 1, "0123456789")] || access(name, F_OK) == 0)
        return;
    s->image_copy = strndup(name, (size_t)(colon - name));
    if (s->image_copy) {
        s->image = s->image_copy;
        s->a->partition = colon + 1;
    }
}

/* ---------------------------------------------------------------- the image */

static int open_image_co(struct session *s) {
    const struct args *a = s->a;
    struct err *e = &s->ctx->err;
    unsigned flags = OPEN_UNMAP | (a->write ? OPEN_RW : 0);
    s->disk.name = xstrdup("disk");
    int rc = cli_open_co(s->ctx, s->image, &a->image, flags, &s->disk.node);
    if (rc < 0)
        return rc;
    bool directory = fat_commit_is_for(s->disk.node);
    bool guessed = s->disk.node->flags & NODE_GUESSED;
    if (directory && a->commit && (rc = fat_commit_check(s->disk.node, e)) < 0)
        return rc;
    if (guessed && (a->write || (a->commit && !directory))) {
        err_set(e, EINVAL, "%s: no format was given and none was recognised", s->image);
        err_hint(e, "give -f raw if it is a raw image");
        return -EINVAL;
    }
    if (a->snapshot) {
        if (guessed && !directory)
            s->disk.no_commit =
                "the format of the base was guessed; mount it with -f raw if it is raw";
        s->disk.scratch = (struct overlay_opts){a->scratch, a->scratch_size};
        rc = control_disk_snapshot_co(&s->disk, e);
        if (rc < 0)
            return rc;
    }
    struct err damage AUTO_ERR = ERR_INIT;
    rc = partitions_read_co(s->disk.node, &s->table, &damage);
    if (rc == -EINVAL && !a->fs && !a->partition) {
        cli_print_warning(s->ctx, "%s", err_text(&damage));
        return 0;
    }
    if (rc < 0)
        err_move(e, &damage);
    return rc;
}

/* Which file of the FUSE mount is meant: "disk", or "p2". */
static int choose_file(const struct session *s, char *out, size_t room) {
    const struct partition_table *t = &s->table;
    struct err *e = &s->ctx->err;
    unsigned only = t->n == 1 && s->a->fs ? t->v[0].number : 0;
    if (!s->a->partition && !only && (!s->a->fs || !t->n)) {
        snprintf(out, room, "disk");
        return 0;
    }
    struct strbuf all = STRBUF_INIT;
    for (size_t i = 0; i < t->n; i++) {
        char number[16];
        snprintf(number, sizeof(number), "%u", t->v[i].number);
        if (only || (s->a->partition && !strcmp(number, s->a->partition))) {
            snprintf(out, room, "p%s", number);
            strbuf_free(&all);
            return 0;
        }
        strbuf_printf(&all, "%s%s", i ? ", " : "", number);
    }
    if (!t->n)
        err_set(e, ENOENT, "%s has no partitions", s->image);
    else if (s->a->partition)
        err_set(e, ENOENT, "%s has no partition %s; it has %s", s->image, s->a->partition, all.s);
    else
        err_set(e, EINVAL, "%s has several partitions: %s", s->image, all.s);
    if (t->n)
        err_hint(e, "choose one with --partition");
    strbuf_free(&all);
    return -e->code;
}

static int finish_image_co(struct session *s) {
    struct err *e = &s->ctx->err;
    if (s->a->commit)
        return control_disk_finish_commit_co(&s->disk, e);
    if (s->a->keep)
        return control_disk_finish_keep_co(&s->disk, s->a->keep, e);
    if (s->disk.journal) {
        err_set(e, EIO, "the commit of %s did not end", s->image);
        err_hint(e, "strata commit %s completes it", s->disk.journal);
        return -EIO;
    }
    return 0;
}

/* ---------------------------------------------------------------- into the system */

static void wake(struct session *s) {
    if (s->task)
        task_wake(s->task);
}

/* What was mounted at the target, by us. */
static bool is_ours(const struct session *s, const struct mount_entry *m) {
    return (s->device[0] && !strcmp(m->source, s->device)) ||
           (s->hidden[0] && !strncmp(m->source, s->hidden, strlen(s->hidden)));
}

static void on_end(void *arg) {
    struct session *s = arg;
    s->ended = true;
    wake(s);
}

static void on_unused(void *arg) {
    struct session *s = arg;
    s->unused = true;
    wake(s);
}

static void on_signal(void *arg, int signo) {
    struct session *s = arg;
    s->signals++;
    wake(s);
}

static void on_stop(void *arg) {
    on_signal(arg, 0);
}

/* A file system on top holds back what was written to it.  On a worker thread. */
static void sync_top(void *arg) {
    struct session *s = arg;
    AUTO_FD int fd = -1;
    struct mount_entry m;
    if (s->target && mount_find(s->target, &m) && is_ours(s, &m))
        fd = open(s->target, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    else if (s->device[0])
        fd = open(s->device, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    if (s->target)
        syncfs(fd);
    else
        fsync(fd); /* of a block device: its own pages */
}

/* A folder that only we look into. */
static int make_hidden(struct session *s) {
    const char *dir = getuid() == 0 && (mkdir("/run/strata", 0700) == 0 || errno == EEXIST)
                          ? "/run/strata"
                          : getenv("XDG_RUNTIME_DIR");
    if (!dir || access(dir, W_OK) < 0 || strlen(dir) > sizeof(s->hidden) - 24)
        dir = "/tmp";
    snprintf(s->hidden, sizeof(s->hidden), "%s/strata-XXXXXX", dir);
    if (!mkdtemp(s->hidden)) {
        s->hidden[0] = 0;
        return err_errno(&s->ctx->err, errno, "%s: a folder for the mount", dir);
    }
    return guard_add(&s->a->guard, GUARD_FOLDER, s->hidden, NULL, &s->ctx->err);
}

static int start_fuse_co(struct session *s) {
    const struct args *a = s->a;
    bool whole = !a->fs && !a->block;
    int rc = whole ? 0 : make_hidden(s);
    const char *at = whole ? s->ctx->pos[1] : s->hidden;
    AUTO_FREE char *path = rc == 0 ? realpath(at, NULL) : NULL;
    if (rc == 0 && !path)
        rc = err_errno(&s->ctx->err, errno, "%s", at);
    if (rc < 0)
        return rc;
    struct fuse_part *parts = calloc(s->table.n + 1, sizeof(*parts));
    if (!parts)
        return err_set(&s->ctx->err, ENOMEM, "no memory to mount");
    for (size_t i = 0; i < s->table.n; i++) {
        const struct partition *p = &s->table.v[i];
        snprintf(parts[i].name, sizeof(parts[i].name), "p%u", p->number);
        parts[i].offset = p->offset;
        parts[i].length = p->length;
    }
    struct fuse_export_opts o = {.name = s->disk.name,
                                 .node = s->disk.node,
                                 .mountpoint = path,
                                 .label = s->image,
                                 .writable = writable(a),
                                 .allow_other = a->allow_other && whole,
                                 .parts = parts,
                                 .nparts = s->table.n,
                                 .on_end = on_end,
                                 .on_unused = whole ? NULL : on_unused,
                                 .sync = whole ? NULL : sync_top,
                                 .arg = s};
    rc = guard_add(&s->a->guard, GUARD_FUSE, path, NULL, &s->ctx->err);
    if (rc == 0)
        rc = fuse_export_new_co(s->ctx->loop, &o, &s->fuse, &s->ctx->err);
    free(parts);
    if (rc == 0)
        s->disk.export = fuse_export_base(s->fuse);
    return rc;
}

static int start_control(struct session *s) {
    if (!s->a->control)
        return 0;
    s->disks[0] = &s->disk;
    struct control_opts o = {
        .program = "mount", .disks = s->disks, .ndisks = 1, .stop = on_stop, .arg = s};
    int rc = control_start(s->ctx->loop, s->a->control, &o, &s->control, &s->ctx->err);
    return rc < 0 || s->a->control[0] == '@'
               ? rc
               : guard_add(&s->a->guard, GUARD_SOCKET, s->a->control, NULL, &s->ctx->err);
}

/* Runs a program of the system; its messages are the user's.  0, or -errno. */
static int run_program(char *const args[], struct err *e) {
    pid_t pid;
    posix_spawnattr_t plain; /* it shall not inherit which signals we block and ignore */
    sigset_t none, pipe;
    sigemptyset(&none);
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    posix_spawnattr_init(&plain);
    posix_spawnattr_setsigmask(&plain, &none);
    posix_spawnattr_setsigdefault(&plain, &pipe);
    posix_spawnattr_setflags(&plain, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    int status = 0, rc = posix_spawnp(&pid, args[0], NULL, &plain, args, environ);
    posix_spawnattr_destroy(&plain);
    if (rc)
        return err_errno(e, rc, "%s", args[0]);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    return status ? err_set(e, EIO, "%s failed", args[0]) : 0;
}

/* On a worker thread: the loop serves what this reads. */
static int put_on_top(void *arg) {
    struct session *s = arg;
    struct err *e = &s->ctx->err;
    bool ro = !writable(s->a);
    char file[128], name[32];
    int rc = choose_file(s, name, sizeof(name));
    if (rc < 0)
        return rc;
    snprintf(file, sizeof(file), "%s/%s", s->hidden, name);
    if (s->a->fs && getuid() != 0) {
        char *const fuse2fs[] = {"fuse2fs", file, s->target, "-o", ro ? "ro" : "fakeroot", NULL};
        rc = guard_add(&s->a->guard, GUARD_MOUNT, s->target, file, e);
        if (rc == 0 && run_program(fuse2fs, e) < 0) {
            err_hint(e, "without root only ext2, ext3 and ext4 can be mounted (package fuse2fs)");
            rc = -e->code;
        }
        return rc;
    }
    AUTO_FD int fd = loopdev_attach(file, ro, s->a->fs, s->device, sizeof(s->device), e);
    if (fd < 0) {
        s->device[0] = 0;
        return fd;
    }
    rc = guard_add(&s->a->guard, GUARD_LOOP, s->device, file, e);
    if (rc == 0 && s->a->fs) {
        char *const mount[] = {"mount", ro ? "-oro" : "-orw", s->device, s->target, NULL};
        rc = guard_add(&s->a->guard, GUARD_MOUNT, s->target, s->device, e);
        if (rc == 0)
            rc = run_program(mount, e);
    }
    return rc;
}

static int enter_co(struct session *s) {
    const struct args *a = s->a;
    if (a->fs && !(s->target = realpath(s->ctx->pos[1], NULL)))
        return err_errno(&s->ctx->err, errno, "%s", s->ctx->pos[1]);
    int rc = start_fuse_co(s);
    if (rc < 0 || (!a->fs && !a->block))
        return rc;
    rc = offload_blocking_co(put_on_top, s);
    if (rc == 0)
        s->unused = false; /* the search for a file system may have closed it in between */
    return rc;
}

/* ---------------------------------------------------------------- out of the system */

struct leaving {
    struct session *s;
    bool lazy;
};

/* On a worker thread: what comes out of the kernel's caches is written meanwhile. */
static int take_off(void *arg) {
    const struct leaving *l = arg;
    struct session *s = l->s;
    struct mount_entry m;
    int rc = 0;
    if (s->target && mount_find(s->target, &m) && is_ours(s, &m))
        rc = fuse_unmount_path(s->target, l->lazy);
    if (rc == 0 && s->device[0] && s->a->block)
        rc = loop_clear(s->device);
    return rc == -ENXIO ? 0 : rc;
}

/* One attempt to end in order; -EBUSY when somebody uses it. */
static int leave_co(struct session *s, bool lazy) {
    struct leaving l = {s, lazy};
    int rc = s->unused ? 0 : offload_blocking_co(take_off, &l);
    if (rc < 0)
        return rc;
    if (s->hidden[0] && !s->unused && !s->ended)
        return 0; /* the hidden file's last user lets go of it in a moment, or later */
    struct err e AUTO_ERR = ERR_INIT;
    return s->ended ? 0 : fuse_export_unmount_co(s->fuse, lazy, &e);
}

static void serve_co(struct session *s) {
    unsigned seen = 0;
    while (!s->ended && s->signals < 2) {
        if (s->signals > seen || s->unused) {
            bool asked = s->signals > seen;
            seen = s->signals;
            int rc = leave_co(s, false);
            if (rc == -EBUSY && asked) {
                cli_print_note(s->ctx, "still in use: it ends when it is let go, or at once, "
                                       "losing what is not synced, on another signal");
                leave_co(s, true);
            }
        }
        if (!s->ended && s->signals < 2 && s->signals <= seen)
            task_park_co();
    }
}

static const int stop_signals[] = {SIGTERM, SIGINT, SIGHUP};

static int run_co(struct verb_ctx *ctx) {
    struct session s = {.ctx = ctx, .a = ctx->args, .task = task_self()};
    for (size_t i = 0; i < sizeof(stop_signals) / sizeof(*stop_signals); i++)
        loop_on_signal(ctx->loop, stop_signals[i], on_signal, &s);
    split_partition(&s);
    int rc = open_image_co(&s);
    if (rc == 0)
        rc = enter_co(&s);
    if (rc == 0)
        rc = start_control(&s);
    if (rc == 0) {
        if (s.a->block)
            printf("%s\n", s.device);
        fflush(stdout);
        daemon_ready(&s.a->status_fd);
        service_notify_ready();
        serve_co(&s);
    } else if (s.fuse) {
        struct err ignored AUTO_ERR = ERR_INIT;
        struct leaving l = {&s, true};
        offload_blocking_co(take_off, &l);
        fuse_export_unmount_co(s.fuse, true, &ignored);
    }
    control_stop_co(s.control);
    s.disk.export = NULL;
    int flushed = fuse_export_stop_co(s.fuse);
    if (rc == 0 && flushed < 0)
        rc = err_errno(&ctx->err, -flushed, "%s: flush", s.image);
    if (s.hidden[0])
        rmdir(s.hidden);
    if (rc == 0)
        rc = finish_image_co(&s);
    control_disk_close_co(&s.disk);
    guard_end(&s.a->guard);
    for (size_t i = 0; i < sizeof(stop_signals) / sizeof(*stop_signals); i++) {
        signal(stop_signals[i], SIG_IGN);
        loop_off_signal(ctx->loop, stop_signals[i]);
    }
    partitions_free(&s.table);
    free(s.image_copy);
    free(s.target);
    return rc;
}

/* ---------------------------------------------------------------- help */

static const char *const mount_details[] = {
    "Shows the disk in IMAGE as the file DIR/disk, and each of its partitions (MBR or GPT) as DIR/p1, "
    "DIR/p2 and so on; when DIR is a regular file, the disk takes its place. Read-only unless "
    "--write or --snapshot is given. No root is needed, only FUSE.",
    "With --fs the file system is mounted at DIR: that of IMAGE:N, or of --partition N, or of the "
    "only partition, or of a disk without partitions. As root any that the kernel knows; otherwise "
    "ext2, ext3 and ext4 through fuse2fs.",
    "It goes to the background when all is in place. `strata unmount DIR` ends it and waits until "
    "everything is in the image; a plain umount or fusermount3 -u ends it too, without the wait.",
    NULL};
static const struct cli_example mount_examples[] = {
    {"strata mount disk.qcow2 /mnt/d", "look at the disk: /mnt/d/disk, /mnt/d/p1"},
    {"strata mount --fs --write disk.qcow2:1 /mnt/root",
     "change files of the first partition, then strata unmount /mnt/root"},
    {"strata mount --fs --snapshot disk.qcow2 /mnt/try", "a throw-away copy of the file system"},
    {NULL, NULL}};
static const char *const attach_details[] = {
    "Makes a block device of the disk in IMAGE (with --partition, of one partition) and prints its "
    "name. Read-only unless --write or --snapshot is given. It is a loop device over FUSE, so it "
    "takes root. `strata detach DEVICE` ends it.",
    NULL};
static const struct cli_example attach_examples[] = {
    {"strata attach --snapshot disk.qcow2", "prints /dev/loop0, say; the image stays as it is"},
    {NULL, NULL}};

const struct verb verb_mount = {
    .name = "mount",
    .summary = "show a disk as files, or mount the file system in it",
    .synopsis = "IMAGE DIR",
    .pos_min = 2,
    .pos_max = 2,
    .opts = mount_opts,
    .args_size = sizeof(struct args),
    .details = mount_details,
    .examples = mount_examples,
    .prepare = prepare,
    .run_co = run_co,
};

const struct verb verb_attach = {
    .name = "attach",
    .summary = "make a block device of a disk",
    .synopsis = "IMAGE",
    .pos_min = 1,
    .pos_max = 1,
    .opts = attach_opts,
    .args_size = sizeof(struct args),
    .details = attach_details,
    .examples = attach_examples,
    .prepare = prepare,
    .run_co = run_co,
};
