/* SPDX-License-Identifier: MIT */
/*
 * What a driver is: the contract between the engine and storage, format and filter drivers.
 *
 * A *storage* driver moves bytes.  A *format* driver is a map: it answers where guest bytes are and
 * makes room for new ones, and never moves guest data itself.  A driver is one `static const struct
 * driver` with designated initialisers at the end of its file, listed in disk/registry.c.
 *
 * Only the engine calls a slot, through wrappers (disk/io.c) that check range, alignment, flags and
 * permission before, and the answer after; so a driver may trust its arguments and the engine does
 * not trust the driver's answers.  A missing slot means the documented default.
 *
 * Context: all slots run in tasks of the node's loop unless said otherwise.  Slots whose name ends
 * in _co may suspend.  Ranges are half-open [offset, offset + length), bytes; length is never 0;
 * the range lies inside the node (engine-checked) and sums do not overflow (sizes are below 2^63).
 */
#ifndef STRATA_DISK_DRIVER_H
#define STRATA_DISK_DRIVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/uio.h>
#include <jansson.h>
#include "base/opt.h"

struct err;
struct node;
struct open_ctx;
struct create_ctx;
struct create_file_opts;
struct driver;
struct bitmap;
struct debug_ops;

/* ---------------------------------------------------------------- the map */

enum extent_kind {
    EXTENT_HOLE, /* this layer has nothing: the layer below decides; without one it reads as zeros
                  */
    EXTENT_ZERO, /* reads as zeros whatever lies below */
    EXTENT_DATA, /* bytes lie at host_offset of `storage`, in the same order */
    EXTENT_CODED /* one unit that `codec` must decode; see coded_* */
};

enum extent_flags {
    /* DATA: the bytes belong to this guest range alone and may be overwritten where they are. */
    EXTENT_IN_PLACE = 1,
    /* ZERO: host space is allocated at host_offset (a preallocated zero cluster). */
    EXTENT_ALLOCATED = 2,
};

struct extent {
    uint64_t length; /* >= 1 and at most what was asked for */
    enum extent_kind kind;
    unsigned flags;
    struct node *storage; /* DATA, CODED, and ZERO with EXTENT_ALLOCATED; a HOLE's room, or NULL */
    uint64_t host_offset;
    /*
     * CODED only.  The whole coded unit covers guest bytes [unit_offset, unit_offset + unit_length)
     * and its code lies in [host_offset, host_offset + coded_length) of storage; coded_length is an
     * upper bound (bytes behind the code may be anything; past the end of storage they read as
     * zeros). `length` runs to the end of the unit at most.
     */
    const struct codec *codec;
    uint64_t unit_offset;
    uint32_t unit_length;
    uint32_t coded_length;
};

/*
 * Pure functions, run on worker threads without any node: decode fills all `out_len` bytes or fails
 * with -EIO; encode returns the coded length (> 0), or -ENOSPC when the result would not be smaller
 * than `out_cap`, or -errno.
 */
struct codec {
    const char *name;
    uint32_t expands; /* encode never fails with -ENOSPC when out_cap is this much above in_len */
    int (*decode)(const void *in, size_t in_len, void *out, size_t out_len);
    ssize_t (*encode)(const void *in, size_t in_len, void *out, size_t out_cap);
};

enum place_flags {
    PLACE_CODED = 1, /* coded_length bytes of code for the whole unit [offset, offset + length) */
};

/*
 * Room for a write.  Filled by place_co; given back unchanged to exactly one of publish_co and
 * abandon.  The engine writes [host_offset, host_offset + length) with the new data and, when
 * is_new, the head [host_offset - head, host_offset) and tail behind with what the guest range
 * around it reads today (copy on write), so that whole units are valid before publish.
 */
struct placement {
    uint64_t offset; /* guest */
    uint64_t length; /* guest bytes handled: >= 1, at most what was asked for */
    struct node *storage;
    uint64_t host_offset;
    uint32_t head, tail; /* bytes around the range that belong to the same units; 0 unless is_new */
    bool is_new; /* fresh room, not yet reachable; false: overwrite in place, publish may be a no-op
                  */
    bool reads_zero; /* fresh room known to read as zeros: zero parts need not be written */
    uint32_t coded_length;
    uint64_t cookie[2]; /* the driver's own */
};

enum zero_flags {
    ZERO_MAY_UNMAP =
        1, /* host space may be given back; without it, allocated space stays allocated */
    ZERO_NO_FALLBACK = 2, /* storage: -ENOTSUP rather than writing zeros slowly */
    ZERO_FUA = 4,
    /* The layer itself says zeros afterwards, also where it had nothing and read so already. */
    ZERO_PRESENT = 8,
};

enum copy_range_flags {
    COPY_RANGE_SHARE = 1, /* only by sharing the blocks (reflink), which costs nothing */
};

/* What `check` may repair. */
enum check_fix {
    CHECK_FIX_LEAKS = 1,  /* give back space that nothing uses */
    CHECK_FIX_ERRORS = 2, /* everything else that can be repaired without losing guest data */
};

/*
 * What `check` found.  Counters are exact; the list of problems is bounded by the reporter.
 *
 * With `fix` (a mask of enum check_fix; the node is read-write and nobody else uses it) the
 * problems are reported as they were met, then repaired as far as possible.  corruptions, leaks and
 * check_errors then count what a last look still finds, corruptions_fixed and leaks_fixed what was
 * repaired.  A program killed in the middle leaves an image that is no worse than before.  Guest
 * data that could be read before reads the same afterwards.
 */
struct check_result {
    unsigned fix; /* in: mask of enum check_fix; 0: only look */
    uint64_t corruptions_fixed, leaks_fixed;
    uint64_t corruptions, leaks, check_errors;
    uint64_t total_clusters, allocated_clusters, fragmented_clusters, compressed_clusters;
    uint64_t image_end_offset;
    /* Called for each problem, in the words of the user's side; may be NULL. */
    void (*report)(void *arg, bool is_leak, const char *text);
    void (*progress)(void *arg, uint64_t done, uint64_t total);
    void *arg;
};

/* What a new image is to hold; see job/measure.h, which fills it. */
struct measure_in {
    uint64_t size;        /* of the disk, whole sectors */
    uint64_t data;        /* bytes of data, in whole units of the target */
    uint64_t touched[64]; /* [k]: how many aligned pieces of 1 << k bytes a copy writes into */
};
/*
 * Lengths of the file: as our copy leaves it, and when all of the disk has been written.  bound_*:
 * the same as others count it, who take the tables of the whole disk for there from the start.
 */
struct measure_result {
    uint64_t required, fully_allocated;
    uint64_t bound_required, bound_fully;
};

enum amend_flags {
    AMEND_SHRINK = 1, /* size= may cut off data */
    AMEND_FORCE = 2,  /* what can make an image unusable (keys); no driver has such a change yet */
};

struct amend_ctx {
    unsigned flags;
    void (*progress)(void *arg, uint64_t done, uint64_t total); /* may be NULL */
    void *arg;
};

/* What a storage looks like from outside. */
struct probe_data {
    const uint8_t *head; /* its first bytes, up to 64 KiB, zeros behind them up to there */
    size_t head_length;
    const uint8_t *tail; /* its last bytes, up to 1 KiB */
    size_t tail_length;
    uint64_t size;
    const char *name; /* of the file, or NULL */
};

/* ---------------------------------------------------------------- internal snapshots */

#define SNAPSHOT_ICOUNT_UNKNOWN UINT64_MAX

/* A point in time that an image keeps inside itself.  The texts are owned, never NULL. */
struct snapshot_info {
    char *id, *name;
    uint64_t vm_state_size; /* bytes of a machine's state that were saved with the disk; 0: none */
    uint32_t date_sec, date_nsec;
    uint64_t vm_clock_nsec;
    uint64_t icount; /* instructions executed; SNAPSHOT_ICOUNT_UNKNOWN */
    uint64_t disk_size;
};
struct snapshot_list {
    struct snapshot_info *v; /* in the image's order */
    size_t count;
};

struct format_ops {
    /* How likely it is an image of this format: 0 no .. 100 certain.  Pure. */
    int (*probe)(const struct probe_data *p);

    /* Creation lays an empty image of opts->size bytes onto `file` (an open, empty, writable node).
     */
    int (*create_co)(struct node *file, const void *create_opts, struct create_ctx *ctx,
                     struct err *e);

    /*
     * A new image takes codes only, and its first flush makes it whole; until then it can be opened
     * to write, afterwards not.
     */
    bool written_once;

    /*
     * Longest run from `offset` with one answer.  Never writes.  -EIO on damage met on the way (the
     * image is not changed by reading).  Called under a shared range lock on the range.
     */
    int (*map_co)(struct node *n, uint64_t offset, uint64_t length, struct extent *out);

    /*
     * Makes room; see struct placement.  Called under an exclusive range lock that covers the whole
     * units (granularity) around the range, held until publish or abandon has returned.  -ENOSPC,
     * -EIO, -EFBIG. NULL: read-only format.
     */
    int (*place_co)(struct node *n, uint64_t offset, uint64_t length, unsigned flags,
                    uint32_t coded_length, struct placement *out);
    /*
     * The data is on its way (written, not flushed): link it in.  After 0 a map must answer with
     * the new place.  On error the old content stays linked and the room has been given back.
     */
    int (*publish_co)(struct node *n, const struct placement *p);
    /* For a placement that is not new: nothing to give back. */
    void (*abandon)(struct node *n, const struct placement *p);

    /*
     * Make [offset, +length), whole subunits (or up to the end of disk), read as zeros.  A range
     * that begins or ends inside a unit stays inside that one.  NULL or -ENOTSUP: the engine writes
     * zeros.  Under an exclusive range lock on whole units.
     */
    int (*set_zero_co)(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags);
    /*
     * Drop whole subunits.  They may read as anything old or zeros afterwards, never as other data;
     * a format with a layer below must not let old backing content shine through (it sets zero
     * instead).  NULL: nothing happens.
     */
    int (*discard_co)(struct node *n, uint64_t offset, uint64_t length);
    /*
     * The first step of growth: map, place, publish and set_zero work up to `size` (at least) from
     * now on, and what they change there survives a flush, while the disk keeps the size that it
     * has.  Called quiesced.  The engine then makes zeros of whatever the map shows behind the old
     * end (the rest of its last unit, and what lies below), flushes, and only then asks for the new
     * size: a power cut finds the old disk, with zeros behind its end, or the new one.  An error
     * that resize_co would give for `size` is given here.  NULL: only the unit that the old end
     * cuts can be reached, and nothing that could come to light lies behind that.
     */
    int (*reach_co)(struct node *n, uint64_t size, struct err *e);
    /*
     * The guest offset, behind the end of the disk, where the state of a machine begins that is
     * saved beside it.  map works there, and behind reach_co place and publish too; snapshots keep
     * it.  Pure.  NULL: not in this format.
     */
    uint64_t (*vm_state_at)(const struct node *n);
    /*
     * New guest size.  Called quiesced, and when growing after reach_co and a flush.  The room
     * given ahead for the new part follows `prealloc` (enum prealloc).  NULL: -ENOTSUP.
     */
    int (*resize_co)(struct node *n, uint64_t size, int prealloc, struct err *e);
    /*
     * All metadata of writes acknowledged before the call reaches stable storage, in the order the
     * law demands, data first (DESIGN, "Write order").  Calls disk_flush_co on its storage as often
     * as the order needs, the last time after its last write.  NULL: the engine flushes the
     * children.
     */
    int (*flush_co)(struct node *n);
    /*
     * Records another backing file in the image (NULL name: none) and in n->backing_name and
     * n->backing_format; what is open as n->backing stays.  `format` may be NULL (not recorded).
     * Called quiesced, on a read-write node; the caller flushes.  -ENOSPC: no room for the name,
     * the old one stays.  NULL: the format has no backing files.
     */
    int (*set_backing_co)(struct node *n, const char *name, const char *format, struct err *e);

    /*
     * Drops all guest data: every range becomes a hole, and the room is given back.  Called
     * quiesced, on a read-write node.  -ENOTSUP: not in this image, nothing has changed.  NULL: not
     * in this format.
     */
    int (*empty_co)(struct node *n, struct err *e);

    /*
     * Changes options of the image that is open.  `amend_opts` is filled from the driver's
     * amend_opts table, whose rows say what was given: the rest stays as it is.  Called quiesced,
     * on a read-write node; the caller flushes.  Another size goes through
     * disk_resize_quiesced_co() at the moment that suits the driver.
     *
     * What can be found out without writing is refused before anything has changed (-ENOTSUP,
     * -EINVAL, -EFBIG).  An error later (-EIO, -ENOSPC) or a crash leaves an image that is in order
     * and reads the same, leaks at most, in which some of the options have been changed and others
     * not; the command can be given again.  n->size, n->backing_name ... follow.  NULL: the format
     * has nothing to amend.
     */
    int (*amend_co)(struct node *n, const void *amend_opts, const struct amend_ctx *ctx,
                    struct err *e);

    /*
     * Persistent dirty bitmaps (disk/bitmap.h); all of these, or NULL: the format keeps none.  At
     * open, and when it becomes writable, the driver attaches what the image has (bitmap_attach).
     * Called with nobody else in these slots; arm from inside a request, the others quiesced.
     */
    /* Whether the image could keep one more like that.  -ENOTSUP, -EFBIG.  Pure. */
    int (*bitmap_check)(struct node *n, const char *name, uint64_t granularity, struct err *e);
    /* ORs what is stored of `b` into it.  Read-only nodes too. */
    int (*bitmap_load_co)(struct bitmap *b, struct err *e);
    /* The image says that all bitmaps with b->arm are in use, and that is stable. */
    int (*bitmap_arm_co)(struct node *n, struct err *e);
    /*
     * All persistent bitmaps are stored as they are, and no longer in use; sets stored, armed and
     * loaded of each.  One that cannot be stored stays in use and gives an error; the others are
     * stored.
     */
    int (*bitmap_store_co)(struct node *n, struct err *e);
    /* The image no longer has `b`, stably.  The caller detaches it. */
    int (*bitmap_remove_co)(struct bitmap *b, struct err *e);

    /*
     * Internal snapshots (disk/snapshot.h wraps them).  All four NULL: not in this format;
     * -ENOTSUP: not in this image.
     *
     * list: fills `out` (empty; freed by the caller, after an error too).  May run beside requests.
     *
     * The others are called quiesced, on a read-write node.  All or nothing, in memory and, when
     * they return 0, on stable storage; killed at any instant, the image is as before or as after,
     * and has leaks at most.
     *
     * create: keeps what the disk holds now under info's name and times; puts the new id (owned)
     *   and disk size into *info.  -EOVERFLOW: a cluster would have more users than the image can
     *   count.
     * apply: the disk's content and size become those of snapshot `id`; what it held is lost.  The
     *   driver sets n->size.
     * del: forgets snapshot `id` and gives back what only it used.  -ENOENT for both: no such id.
     */
    int (*snapshot_list_co)(struct node *n, struct snapshot_list *out, struct err *e);
    int (*snapshot_create_co)(struct node *n, struct snapshot_info *info, struct err *e);
    int (*snapshot_apply_co)(struct node *n, const char *id, struct err *e);
    int (*snapshot_delete_co)(struct node *n, const char *id, struct err *e);

    unsigned repairs; /* what check_co can repair: mask of enum check_fix; no other is asked for */
    /* See struct check_result. */
    int (*check_co)(struct node *n, struct check_result *r, struct err *e);
    /* Format-specific information, new reference ("format-specific" of info). NULL: none. */
    json_t *(*describe)(struct node *n);
    /* How long the file of a new image with these options gets. */
    int (*measure)(const void *create_opts, const struct measure_in *in, struct measure_result *out,
                   struct err *e);
};

/* ---------------------------------------------------------------- storage */

enum storage_kind_flags {
    STORAGE_ZERO_INIT = 1, /* bytes never written, and those of a grown file, read as zeros */
    STORAGE_SHARES = 2,    /* copy_range_co may be able to share blocks (reflink) */
    STORAGE_IN_MEMORY = 4, /* no device behind it: room made ahead would be written twice */
};

struct storage_ops {
    /* All move exactly `length` bytes (short system calls are finished inside) or fail with -errno.
     * Reads past the end of the storage fill with zeros. `flags`: IO_BULK, IO_FUA (writes). Writes
     * past the end grow the storage where the driver can.  Requests are multiples of request_align,
     * except that a write may end at an odd end of the storage. */
    int (*preadv_co)(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                     int niov, unsigned flags);
    int (*pwritev_co)(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                      int niov, unsigned flags);
    /* NULL or -ENOTSUP: the engine writes zeros. */
    int (*zero_co)(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags);
    int (*discard_co)(struct node *n, uint64_t offset, uint64_t length); /* NULL: nothing happens */
    int (*flush_co)(struct node *n);                                     /* NULL: nothing to do */
    /*
     * Begins to move what the host caches of this node to the medium, without a promise: a flush
     * that comes later has less to wait for.  NULL: nothing happens.
     */
    void (*writeback_co)(struct node *n);
    int (*truncate_co)(struct node *n, uint64_t size, int prealloc, struct err *e);
    /*
     * Longest run of DATA or ZERO from `offset` (SEEK_DATA/SEEK_HOLE).  kind is DATA (host_offset =
     * offset, storage = n) or ZERO; HOLE says neither, and is read like data.  NULL: all DATA.
     */
    int (*extents_co)(struct node *n, uint64_t offset, uint64_t length, struct extent *out);
    /* Allocated bytes on the host, or -errno. NULL: unknown. */
    int64_t (*allocated)(struct node *n);
    /*
     * Copies between two nodes of this same driver inside the kernel (reflink, copy_file_range).
     * Returns 0, or -ENOTSUP/-EXDEV: the engine copies by hand.  NULL: cannot.  `copy_flags`: enum
     * copy_range_flags.
     */
    int (*copy_range_co)(struct node *src, uint64_t src_off, struct node *dst, uint64_t dst_off,
                         uint64_t length, unsigned copy_flags);
    /*
     * Creation of the named storage object: `create_opts` holds name and size.  Leaves it open in n
     * when that is how the driver works.  See struct create_ctx.
     */
    int (*create_co)(struct node *n, struct create_ctx *ctx, struct err *e);
    /* Gives an unnamed object its final name, atomically, after syncing it. */
    int (*link_co)(struct node *n, const char *name, bool replace, struct err *e);
    /* What `info` tells of the disk beyond its size, new reference.  NULL: nothing. */
    json_t *(*describe)(struct node *n);
    /*
     * Wishes of the user about a new object that is still empty (see struct create_file_opts).
     * What the object or its file system does not have is passed over.  NULL: nothing to wish for.
     */
    void (*tune_new)(struct node *n, const struct create_file_opts *o);
};

/* ---------------------------------------------------------------- driver */

enum driver_kind { DRIVER_STORAGE, DRIVER_FORMAT, DRIVER_FILTER };

struct driver {
    const char *name; /* as in driver=NAME */
    enum driver_kind kind;
    const char *help; /* one line for the tables of formats and protocols */
    /* NULL-terminated "scheme:" prefixes of file names that belong to this storage driver. */
    const char *const *prefixes;

    size_t state_size;             /* node->state, zeroed */
    const struct opt *opts;        /* open and runtime rows (OPT_OPEN) */
    size_t opts_size;              /* of the struct they fill: node->opts */
    const struct opt *create_opts; /* rows with OPT_CREATE */
    size_t create_opts_size;
    const struct opt *amend_opts; /* rows with OPT_AMEND; NULL without amend_co */
    size_t amend_opts_size;

    /* Storage: turns a plain name (prefix included) into option keys of `tree`. NULL: {"filename":
     * name}. */
    int (*parse_name)(const char *name, json_t *tree, struct err *e);
    /*
     * Opens: node->opts is filled, node->flags and permissions are set.  Formats open their
     * children with node_open_child_co() and set size, granularity, codec ...  On error the engine
     * calls close_co on the half-built state: it must cope.
     */
    int (*open_co)(struct node *n, struct open_ctx *ctx, struct err *e);
    /* Flushes nothing by itself (the engine has flushed); releases. */
    void (*close_co)(struct node *n);
    /*
     * Changes between read-only and read-write (and permissions) on the open node: acquires the new
     * before dropping the old; on error nothing has changed. NULL: only when no change is needed.
     * n->perm and n->shared hold the wanted values already; n->flags the old ones.
     */
    int (*reopen_co)(struct node *n, unsigned new_flags, struct err *e);

    const struct storage_ops *storage;
    const struct format_ops *format;
    /* Listens to events (disk/event.h); NULL: does not. */
    const struct debug_ops *debug;
};

/* preallocation= values, in this order, for every driver's tables. */
enum prealloc { PREALLOC_OFF, PREALLOC_METADATA, PREALLOC_FALLOC, PREALLOC_FULL };
extern const char *const prealloc_names[]; /* "off", "metadata", "falloc", "full", NULL */

/* ---------------------------------------------------------------- registry (disk/registry.c) */
extern const struct driver *const driver_table[];   /* NULL-terminated, drivers of this build */
const struct driver *driver_find(const char *name); /* NULL: none */
const struct driver *driver_for_prefix(const char *file_name); /* by "scheme:"; NULL: none */

#endif
