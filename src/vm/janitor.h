/* SPDX-License-Identifier: MIT */
/*
 * A small process that removes our files should we be killed.
 *
 * Most of what a run makes has no name and goes by itself.  A monitor's socket and a stateless
 * overlay have one, and nobody survives SIGKILL to remove them: so a child is forked before there
 * is a thread, holds nothing but its end of a socket pair, and waits for the end of it.  A file is
 * removed only when it still is the one that was told (device and inode).
 *
 * When the janitor is killed itself, files are removed by us at the orderly end as always; only
 * both deaths, or one within the instant between a file's creation and the telling, leave a file.
 */
#ifndef STRATA_VM_JANITOR_H
#define STRATA_VM_JANITOR_H

#include <sys/types.h>

struct err;

#define JANITOR_FILES_MAX 32

struct janitor {
    int fd; /* -1: none */
    pid_t pid;
};

/* A file of ours, as it was when it was made.  All zero: none. */
struct janitor_file {
    const char *path; /* borrowed; NULL none */
    dev_t dev;
    ino_t ino;
};

/* Before a loop or a thread exists. */
int janitor_start(struct janitor *j, struct err *e);
/* The file at `path` is ours now: removed if we die.  -errno: it is not known to the janitor. */
int janitor_add(struct janitor *j, struct janitor_file *f, const char *path);
/* It is the user's now. */
void janitor_release(struct janitor *j, struct janitor_file *f);
/* Removes it ourselves, when it still is that file.  None is fine. */
void janitor_remove(struct janitor_file *f);
/* Ends it, and has it remove what it still knows.  Not started is fine. */
void janitor_stop(struct janitor *j);

#endif
