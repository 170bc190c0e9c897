/* SPDX-License-Identifier: MIT */
/*
 * strata: virtual disk images as a C library.
 *
 * One header, opaque types, plain blocking calls.  A `strata` context owns a thread with an event
 * loop; every call hands its work to that thread and waits, so all functions may be called from any
 * thread, several at once: concurrent requests on a disk run in parallel.
 *
 * Errors: functions return 0 or a negative errno, and fill the caller's `struct strata_error` when
 * one is given: a sentence that names the file, what was found and the limit, and a hint where
 * there is something to do.  The library never prints and never exits.
 *
 * Units: all offsets and lengths are bytes; any alignment; ranges are half-open.
 *
 * Trust: names found inside images (backing files) are followed only as far as `trust` allows; the
 * default is regular files below the image's own folder.
 */
#ifndef STRATA_H
#define STRATA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define STRATA_API __attribute__((visibility("default")))
#else
#define STRATA_API
#endif

struct strata;
struct strata_disk;

struct strata_error {
    int code; /* positive errno; 0 = no error */
    char message[1024];
    char hint[512]; /* empty when there is none */
};

/* "0.1.0" */
STRATA_API const char *strata_version(void);

/* A context and its thread.  -ENOMEM, -EAGAIN, or what the event loop's back end refuses. */
STRATA_API int strata_new(struct strata **out, struct strata_error *error);
/* Closes what is still open (flushed) and ends the thread.  No other call may be running.  Accepts
 * NULL. */
STRATA_API void strata_free(struct strata *s);

enum strata_open_flags {
    STRATA_READ_WRITE = 1,
    STRATA_SNAPSHOT = 2, /* writes go to a throw-away overlay; see strata_commit, strata_keep */
    STRATA_NO_BACKING = 4,
    STRATA_FORCE_SHARE = 8
};
enum strata_trust {
    STRATA_TRUST_BESIDE = 0,
    STRATA_TRUST_NONE,
    STRATA_TRUST_LOCAL,
    STRATA_TRUST_ANY
};

struct strata_open_options {
    unsigned flags;          /* enum strata_open_flags */
    const char *format;      /* "raw", "qcow2" ...; NULL: probed */
    int trust;               /* enum strata_trust */
    const char *scratch_dir; /* STRATA_SNAPSHOT: NULL = $TMPDIR, else /var/tmp */
    uint64_t scratch_size;   /* STRATA_SNAPSHOT: cap in bytes; 0 = none */
};

/* `name` is a file name or "json:{...}".  `options` may be NULL: read-only, probed. */
STRATA_API int strata_open(struct strata *s, const char *name,
                           const struct strata_open_options *options, struct strata_disk **out,
                           struct strata_error *error);
/* Flushes and closes; 0 or the flush's -errno (the disk is closed either way).  Accepts NULL. */
STRATA_API int strata_close(struct strata_disk *d);

STRATA_API uint64_t strata_size(const struct strata_disk *d);
STRATA_API const char *strata_format(const struct strata_disk *d);

/* All or nothing: 0 or -errno.  Buffers stay the caller's. */
STRATA_API int strata_pread(struct strata_disk *d, void *buf, size_t length, uint64_t offset);
STRATA_API int strata_pwrite(struct strata_disk *d, const void *buf, size_t length,
                             uint64_t offset);
STRATA_API int strata_zero(struct strata_disk *d, uint64_t length, uint64_t offset);
STRATA_API int strata_discard(struct strata_disk *d, uint64_t length, uint64_t offset);
/* What was written before is on stable storage when it returns 0. */
STRATA_API int strata_flush(struct strata_disk *d);

/* The run of equal state that starts at `offset`. */
struct strata_extent {
    uint64_t length;
    int zero;  /* reads as zeros */
    int data;  /* has room on the host */
    int depth; /* layer that answers: 0 = the image itself */
};
STRATA_API int strata_extent(struct strata_disk *d, uint64_t offset, struct strata_extent *out);

/*
 * Dirty bitmaps that the image keeps (qcow2 of version 3): which parts of the disk may have changed
 * since a bitmap was made or cleared, in units of its granularity (a power of two from 512 to
 * 2 GiB).  They are stored when the disk is closed; one whose program crashed is inconsistent, and
 * can only be removed.  Bitmaps of the disk itself, not of the layers below it.
 */
struct strata_bitmap {
    char name[1024];
    uint64_t granularity;
    int enabled;      /* records changes */
    int inconsistent; /* was in use when its program ended without storing it */
    int usable;       /* its bits can be read */
};
/* The index-th bitmap, from 0.  -ENOENT behind the last. */
STRATA_API int strata_bitmap_info(struct strata_disk *d, size_t index, struct strata_bitmap *out);
/* `granularity` 0: chosen.  -EEXIST, -EINVAL, -EFBIG, -ENOTSUP, -EROFS. */
STRATA_API int strata_bitmap_add(struct strata_disk *d, const char *name, uint64_t granularity,
                                 struct strata_error *error);
/* At once, and stably. */
STRATA_API int strata_bitmap_remove(struct strata_disk *d, const char *name,
                                    struct strata_error *error);
STRATA_API int strata_bitmap_clear(struct strata_disk *d, const char *name,
                                   struct strata_error *error);
STRATA_API int strata_bitmap_enable(struct strata_disk *d, const char *name, int on,
                                    struct strata_error *error);
/* Adds what bitmap `source` of `from` (may be `d`) has recorded; disks of one context and size. */
STRATA_API int strata_bitmap_merge(struct strata_disk *d, const char *name,
                                   struct strata_disk *from, const char *source,
                                   struct strata_error *error);
/* The first run of changed bytes at or behind `offset`: 1 and the run, 0: none, or -errno. */
STRATA_API int strata_bitmap_next(struct strata_disk *d, const char *name, uint64_t offset,
                                  uint64_t *start, uint64_t *length);

/* STRATA_SNAPSHOT disks: write the changes into the base, or save them as a qcow2 overlay. */
STRATA_API int strata_commit(struct strata_disk *d, struct strata_error *error);
STRATA_API int strata_keep(struct strata_disk *d, const char *file, struct strata_error *error);

/*
 * Creates an image of `size` bytes.  `options` is "key=value,..." as in `strata create -o`, or
 * NULL. Nothing is visible under `name` before it is complete.  An existing file is replaced.
 */
STRATA_API int strata_create(struct strata *s, const char *name, const char *format, uint64_t size,
                             const char *options, struct strata_error *error);

enum strata_amend_flags {
    STRATA_AMEND_FORCE = 1, /* changes that can lock one out (keys) */
    STRATA_AMEND_SHRINK = 2 /* "size" may be smaller: what lies behind it is lost */
};
/*
 * Changes options of the image of a disk that is open read-write: `options` is "key=value,..." as
 * in `strata amend -o` ("compat=0.10", "lazy_refcounts=on", "refcount_bits=64", "size=20G" ...).
 * Requests of other threads wait.  All is judged before anything is changed; each change is stable
 * when it returns 0, and a kill or a power cut leaves the image before or behind one of them.
 * -ENOTSUP: the format has no such options; -EINVAL: an unknown key, or a value that does not fit
 * the image; -EROFS.
 */
STRATA_API int strata_amend(struct strata_disk *d, const char *options, unsigned flags,
                            struct strata_error *error);

/*
 * Internal snapshots: states of the disk that an image (qcow2) keeps inside itself; not to be
 * confused with STRATA_SNAPSHOT.  They have an id, unique and chosen by the format, and a name.
 */
struct strata_snapshot {
    const char *id, *name;
    uint64_t disk_size;
    uint64_t vm_state_size; /* of a machine's state saved with it; 0: none */
    uint64_t date_sec;      /* of its making, since 1970 */
    uint32_t date_nsec;
    uint64_t vm_clock_nsec;
    uint64_t icount; /* instructions executed; UINT64_MAX: unknown */
};
/*
 * *out is an array of *count entries, which strata_snapshots_free() frees with its texts; NULL when
 * there are none.  -ENOTSUP: the format has none; -EINVAL, -EIO: a damaged table.
 */
STRATA_API int strata_snapshot_list(struct strata_disk *d, struct strata_snapshot **out,
                                    size_t *count, struct strata_error *error);
STRATA_API void strata_snapshots_free(struct strata_snapshot *list, size_t count);
/*
 * For disks open read-write.  `snapshot` is an id or, where none is equal, a name (the first of
 * several).  Requests of other threads wait.  Done and on stable storage when they return 0; after
 * an error, a kill or a power cut the image is as before or as after.  -ENOENT: there is none;
 * -EOVERFLOW: the image's reference counts are too narrow for one more.  Applying makes the disk,
 * its size too, what the snapshot holds.
 */
STRATA_API int strata_snapshot_create(struct strata_disk *d, const char *name,
                                      struct strata_error *error);
STRATA_API int strata_snapshot_apply(struct strata_disk *d, const char *snapshot,
                                     struct strata_error *error);
STRATA_API int strata_snapshot_delete(struct strata_disk *d, const char *snapshot,
                                      struct strata_error *error);

#ifdef __cplusplus
}
#endif

#endif
