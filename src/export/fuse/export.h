/* SPDX-License-Identifier: MIT */
/*
 * A disk in the local file system tree, through FUSE.
 *
 *      MOUNTPOINT (a folder)/disk     the whole disk, a file of its exact size
 *                           /p1 ...   its partitions, as many files
 *      MOUNTPOINT (a file)            the whole disk in its place
 *
 * One session, read by one task of the loop; every request becomes a task of its own, so that they
 * run in parallel and replies go out of order.  At most IN_FLIGHT_MAX are on their way: the reader
 * waits beyond that, and the kernel with it.  The payload of a write stays in the buffer that the
 * request came in; nothing is copied before the engine has it.
 *
 * Caching: the kernel caches pages of each file, and when the export is writable also writes back
 * late (so fsync and unmount are what makes data durable, as on any disk).  `disk` and a partition
 * are two files over the same bytes: like /dev/sda and /dev/sda1 they agree only after a flush, and
 * what one has in cache is dropped when it is opened again.
 *
 * Holes: SEEK_DATA/SEEK_HOLE come from the map; punching and zeroing with fallocate() become
 * discard and zero requests.  No file grows, shrinks, comes or goes.
 *
 * An export as others are (export/export.h): clients are the open files.  Paused, it takes no
 * requests; what the kernel has cached is asked for before, so that a commit has all that was
 * written.  remove_co with `hard` takes the name away at once.
 *
 * Facts: libfuse/libfuse include/fuse_lowlevel.h; Linux Documentation/filesystems/fuse.rst.
 */
#ifndef STRATA_EXPORT_FUSE_EXPORT_H
#define STRATA_EXPORT_FUSE_EXPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct loop;
struct node;
struct err;
struct export;
struct fuse_export;

/* A file beside `disk`: bytes [offset, +length) of it. */
struct fuse_part {
    char name[16];
    uint64_t offset, length;
};

struct fuse_export_opts {
    const char *name;       /* what export.h calls it; copied */
    struct node *node;      /* borrowed; outlives the export; granularity of all I/O is a byte */
    const char *mountpoint; /* an existing folder or regular file */
    const char *label;      /* shown as the device in mount lists */
    bool writable;          /* the node must be read-write then */
    bool allow_other;       /* users other than the caller may look (fuse.conf must permit it) */
    const struct fuse_part *parts; /* inside the disk; copied */
    size_t nparts;
    /* All in the loop's context; each may be NULL. */
    void (*on_end)(void *arg);    /* the kernel has let go of the mount */
    void (*on_unused)(void *arg); /* the last open file was closed */
    /* On a worker thread: what lies on top shall write here what it holds back. */
    void (*sync)(void *arg);
    void *arg;
};

/*
 * Mounts; requests are served from the next turn of the loop on.  The calling process must not
 * touch the mount point while its loop is not turning.
 */
int fuse_export_new_co(struct loop *loop, const struct fuse_export_opts *o,
                       struct fuse_export **out, struct err *e);
struct export *fuse_export_base(struct fuse_export *x);
/*
 * Asks the kernel to unmount while requests go on being served (what is cached comes as writes).
 * -EBUSY: files are open; then with `lazy` the name goes at once and on_end comes with the last
 * close.
 */
int fuse_export_unmount_co(struct fuse_export *x, bool lazy, struct err *e);
/*
 * Ends the session whatever state it is in, waits for the requests on their way, flushes and frees.
 * Before on_end was called: what the kernel still had cached is lost to it.  NULL is accepted.
 * Returns what the last flush returned.
 */
int fuse_export_stop_co(struct fuse_export *x);

/*
 * Unmounts a path: umount2(), or fusermount3 where that is refused.  Blocks; from a thread that the
 * loop does not need.  0 or -errno.
 */
int fuse_unmount_path(const char *mountpoint, bool lazy);

#endif
