/* SPDX-License-Identifier: MIT */
/*
 * Mounts of this machine that are ours, and what is left of those whose server has died.
 *
 * The guard is a small process beside a server that mounts: it is told each thing that was put into
 * the system, and takes them away, last first, when the server has ended without saying so (kill
 * -9, a crash).  It looks whether a thing is still what the server made before it touches it.
 */
#ifndef STRATA_CLI_MOUNT_TABLE_H
#define STRATA_CLI_MOUNT_TABLE_H

#include <stdbool.h>
#include <sys/types.h>

struct err;

struct mount_entry {
    char path[4096], type[64], source[4096];
};
/* The topmost mount at exactly `path` (absolute).  False: nothing is mounted there. */
bool mount_find(const char *path, struct mount_entry *out);
/* Absolute, symlinks resolved but for a last part that does not answer; owned.  NULL: errno. */
char *mount_path(const char *path);
/* The name of the file that a loop device shows, "/dev/loop0"; owned, NULL: none. */
char *loop_backing_file(const char *device);
/* Takes the file away from a loop device; in use: at the last close.  0 or -errno. */
int loop_clear(const char *device);

enum guarded {
    GUARD_FUSE = 'U',   /* a FUSE mount of ours at `what` */
    GUARD_MOUNT = 'M',  /* a mount at `what` of `source` */
    GUARD_LOOP = 'L',   /* a loop device `what` over the file `source` */
    GUARD_FOLDER = 'R', /* an empty folder */
    GUARD_SOCKET = 'S', /* a socket file that nobody listens on */
};
struct guard {
    int fd; /* -1: none */
};
/* Forks: before a loop or a thread exists. */
int guard_start(struct guard *g, struct err *e);
int guard_add(struct guard *g, enum guarded kind, const char *what, const char *source,
              struct err *e);
/* All was taken away in order: the guard ends without touching anything. */
void guard_end(struct guard *g);

#endif
