/* SPDX-License-Identifier: MIT */
/* What the parts of the FUSE export share: the session and its files. */
#ifndef STRATA_EXPORT_FUSE_INTERNAL_H
#define STRATA_EXPORT_FUSE_INTERNAL_H

#include "export/export.h"
#include "export/fuse/export.h"
#include "export/fuse/lib.h"
#include "runtime/task.h"

enum {
    IN_FLIGHT_MAX = 64,
    SPARES_MAX = 8,            /* receive buffers kept; a MiB each */
    TRANSFER_MAX = 1024 * 1024 /* bytes of one read or write request */
};

#define INO_ROOT 1
#define INO_DISK 2
#define INO_PART 3 /* the first partition's */

struct fuse_export {
    struct export base; /* first: export.h's view of it */
    const struct fuse_lib *lib;
    struct loop *loop;
    struct fuse_session *session;
    char *mountpoint;
    struct fuse_part *parts;
    size_t nparts;
    bool writable;
    bool as_file; /* the root is the disk itself */
    uid_t uid;
    gid_t gid;
    int64_t started; /* seconds: what every file shows as its times */
    void (*on_end)(void *arg);
    void (*on_unused)(void *arg);
    void (*sync)(void *arg);
    void *arg;
    unsigned long open_files;
    uint64_t served, errors, bytes_read, bytes_written; /* requests that reached the disk */

    struct task *reader, *stopper;
    bool ending, ended; /* the reader shall end; has ended */
    struct task_sem room;
    struct task_group requests;
    unsigned paused;
    struct waitq resumed;
    struct fuse_buf incoming; /* mem NULL: the next receive allocates one */
    bool taken;               /* the request being looked at keeps the buffer it came in */
    void *spare[SPARES_MAX];
    unsigned spares;
};

extern const struct fuse_lowlevel_ops fuse_export_ops;

/* The receive buffer is the caller's until it gives it back. */
void *fuse_take_buffer(struct fuse_export *x);
void fuse_give_buffer(struct fuse_export *x, void *mem);

#endif
