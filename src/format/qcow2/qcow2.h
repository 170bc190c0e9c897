/* SPDX-License-Identifier: MIT */
/*
 * qcow2: the state of one open image, and what the files of this folder offer each other.
 *
 *      header.c     header bytes <-> struct qcow2_header          (pure)
 *      entry.h      L1, L2 and refcount entries                   (pure)
 *      header_write.c  a changed header onto storage, whole or not at all
 *      open.c       the driver table; open, close, reopen
 *      cache.c      slices of L2 tables and refcount blocks
 *      map.c        guest range -> extent
 *      meta.c       the set of clusters that hold metadata
 *      refcount.c   reference counts, allocation, limbo
 *      grow.c       new refcount blocks, growth of the refcount table
 *      place.c      room for writes: place, publish, abandon; L2 tables made and copied
 *      zero.c       set_zero and discard
 *      cut.c        dropping all mappings behind an offset
 *      flush.c      the ordered write-back of everything dirty
 *      resize.c     growth, shrinking
 *      amend.c      other options for an image: version, widths; amend_counts.c, amend_snapshots.c,
 *                   amend_zero.c
 *      marks.c      the dirty and corrupt bits
 *      check*.c counts.c repair*.c
 *      snapshot.c   internal snapshots (snapshot.h), by way of shift.c: new tables in one step
 *      create.c measure.c describe.c
 *      bitmap_dir.c bitmap_store.c  persistent dirty bitmaps (bitmap.h)
 *
 * Invariants
 *  1. In memory `l1` and `reftable` are whole and in host byte order; on disk they follow only
 *     through flush.c (or resize / table growth, which write a whole new copy first).
 *  2. A host cluster named by any table, in memory or on stable storage, has a reference count of
 *     at least one in memory; the count on storage is raised before the name is written.
 *  3. A cluster whose last name was dropped stays counted (in limbo) until the tables without that
 *     name are on stable storage.
 *  4. Every offset that map and place answer is inside the 2^56 limit and, where it is to be
 *     written, not inside the header, a table or a refcount block.
 *  5. All state belongs to the node's loop.  Between two suspensions it is consistent.
 *
 * Locks, in this order: l2_lock (making or copying an L2 table), coded_lock (the cursor of coded
 * data), grow_lock (new refcount blocks,
 * new refcount table), wb_lock (one write-back at a time).
 */
#ifndef STRATA_FORMAT_QCOW2_QCOW2_H
#define STRATA_FORMAT_QCOW2_QCOW2_H

#include <stdbool.h>
#include <stdint.h>
#include <jansson.h>
#include "base/err.h"
#include "base/opt.h"
#include "disk/driver.h"
#include "disk/node.h"
#include "format/qcow2/cache.h"
#include "format/qcow2/entry.h"
#include "format/qcow2/header.h"
#include "runtime/task.h"

struct open_ctx;
struct create_ctx;

/* A run of host clusters whose names have been dropped. */
struct qcow2_limbo_run {
    uint64_t cluster, count;
};
struct qcow2_limbo {
    struct qcow2_limbo_run *runs;
    size_t count, cap;
};

struct qcow2_range {
    uint64_t offset, length;
};

struct qcow2 {
    struct node *node;
    struct node *file; /* = node->file: all metadata */
    struct node *data; /* where guest data lie: `file`, or the external data file */
    struct qcow2_header h;

    /* geometry, constant after open */
    uint32_t cluster_bits, cluster_size;
    bool usual;          /* neither extended entries nor an external data file */
    uint32_t l2e_shift;  /* log2 of the bytes of an L2 entry: 3, or 4 when they are extended */
    uint32_t sub_bits;   /* log2 of the bytes of a subcluster; cluster_bits without subclusters */
    uint32_t l2_bits;    /* log2 of entries in an L2 table: cluster_bits - l2e_shift */
    uint32_t slice_bits; /* log2 of entries in an L2 slice */
    uint32_t refcount_order;
    uint32_t block_bits; /* log2 of counts in a refcount block: cluster_bits + 3 - refcount_order */
    uint64_t refcount_max;
    bool reads_zero; /* storage: what was never written reads as zeros */

    /* active L1 table, host byte order; l1_entries of them are in use (= h.l1_size) */
    uint64_t *l1;
    uint32_t l1_entries;
    uint64_t *l1_dirty; /* bitmap, one bit an entry: table not yet reachable on storage */
    uint32_t l1_dirty_count;

    uint64_t *reftable; /* host byte order */
    uint32_t reftable_entries;
    uint64_t *reftable_dirty; /* bitmap, one bit an entry */
    uint32_t reftable_dirty_count;

    bool corrupt;        /* damage was met while writing, see marks.c */
    bool corrupt_stored; /* and storage knows */

    /* NODE_CHECK opens only: why a table was not loaded (entries = 0 then); NULL: it was */
    char *l1_problem, *reftable_problem;
    char *bitmaps_problem; /* why a read-only image shows no bitmaps; NULL: it shows them */
    uint8_t *luks;         /* NODE_LOOK: the LUKS header, QCOW2_LUKS_HEADER bytes; NULL: none */
    uint64_t counted_end;  /* NODE_LOOK: behind the last cluster that is counted; 0: not known */

    struct qcow2_cache cache;

    /*
     * Read-write only: the clusters that hold the header, tables, refcount blocks (snapshots' L1
     * tables included; not their L2 tables), as an open-addressed set of cluster index + 1.
     */
    uint64_t *meta;
    size_t meta_count, meta_mask;
    bool unchecked; /* overlap-check=none: nobody asks the set */

    /* allocator */
    uint64_t free_cursor; /* no free cluster is known below */
    uint64_t virgin_from; /* clusters from here on were never used: beyond the file's end */
    uint64_t coded_pos;   /* next byte for coded data; 0: none */
    uint64_t coded_end;   /* end of its host cluster */
    bool coded_used;      /* the file's end needs padding to 512 */
    bool end_grown;       /* a cluster from virgin_from on was handed out: padding to a cluster */
    uint64_t releases;    /* counts events that may have lowered free_cursor */
    struct qcow2_limbo limbo;
    bool settling;
    struct task_mutex l2_lock, coded_lock, grow_lock, wb_lock;

    /* write-back, see flush.c */
    uint64_t wb_started, wb_done;
};

static inline struct qcow2 *qcow2_of(struct node *n) {
    return n->state;
}
static inline uint64_t qcow2_cluster_index(const struct qcow2 *s, uint64_t offset) {
    return offset >> s->cluster_bits;
}
static inline uint64_t qcow2_clusters_for(const struct qcow2 *s, uint64_t bytes) {
    return (bytes >> s->cluster_bits) + ((bytes & (s->cluster_size - 1)) != 0);
}
static inline uint64_t qcow2_l1_index(const struct qcow2 *s, uint64_t offset) {
    return offset >> (s->cluster_bits + s->l2_bits);
}
static inline uint32_t qcow2_l2_index(const struct qcow2 *s, uint64_t offset) {
    return (offset >> s->cluster_bits) & (((uint32_t)1 << s->l2_bits) - 1);
}
/* L2 entries have 16 bytes, and clusters 32 subclusters. */
static inline bool qcow2_extended(const struct qcow2 *s) {
    return s->l2e_shift == 4;
}
/* Guest data lie in a file of their own, each at its guest offset, and are not counted. */
static inline bool qcow2_data_apart(const struct qcow2 *s) {
    return s->data != s->file;
}
/* That file alone must read as the guest does. */
static inline bool qcow2_data_raw(const struct qcow2 *s) {
    return !s->usual && qcow2_data_apart(s) && s->h.autoclear & QCOW2_AUTOCLEAR_DATA_FILE_RAW;
}
/* Entry `index` of a slice or table, of either size. */
static inline struct qcow2_l2e qcow2_l2_get(const struct qcow2 *s, const uint8_t *data,
                                            uint32_t index) {
    const uint8_t *p = data + ((size_t)index << s->l2e_shift);
    struct qcow2_l2e e = {be64_load(p), 0};
    if (!s->usual && qcow2_extended(s))
        e.bitmap = be64_load(p + 8);
    return e;
}
static inline void qcow2_l2_set(const struct qcow2 *s, uint8_t *data, uint32_t index,
                                struct qcow2_l2e e) {
    uint8_t *p = data + ((size_t)index << s->l2e_shift);
    be64_store(p, e.value);
    if (qcow2_extended(s))
        be64_store(p + 8, e.bitmap);
}
/* Whether an entry that is neither coded nor damaged has a host cluster. */
static inline bool qcow2_l2_room(const struct qcow2 *s, struct qcow2_l2e e) {
    return e.value & QCOW2_OFFSET_MASK ||
           (qcow2_data_apart(s) && e.value & QCOW2_COPIED && !(e.value & QCOW2_ZERO));
}
enum qcow2_cluster_kind qcow2_l2_kind_unusual(const struct qcow2 *s, struct qcow2_l2e e,
                                              uint32_t sub);
/* What subcluster `sub` of an entry is (0 where there are no subclusters). */
static inline enum qcow2_cluster_kind qcow2_l2_kind(const struct qcow2 *s, struct qcow2_l2e e,
                                                    uint32_t sub) {
    if (!s->usual)
        return qcow2_l2_kind_unusual(s, e, sub);
    return qcow2_classify(s->h.version, s->cluster_bits, e.value);
}
/* Subclusters whose bytes are in the host cluster, a bit each; bit 0 where there are none. */
static inline uint32_t qcow2_l2_allocated(const struct qcow2 *s, struct qcow2_l2e e) {
    return qcow2_extended(s) ? (uint32_t)e.bitmap : qcow2_l2_kind(s, e, 0) == QCOW2_CLUSTER_DATA;
}
static inline uint32_t qcow2_sub_count(const struct qcow2 *s) {
    return (uint32_t)1 << (s->cluster_bits - s->sub_bits);
}
/* Index of the subcluster that holds guest `offset`. */
static inline uint32_t qcow2_sub_index(const struct qcow2 *s, uint64_t offset) {
    return (uint32_t)((offset & (s->cluster_size - 1)) >> s->sub_bits);
}
/* A layer below: the header names one (opened or not), or the node was given one. */
static inline bool qcow2_has_backing(const struct qcow2 *s) {
    return s->h.backing_file || s->node->backing;
}
/* False: barriers mean nothing (cache unsafe, throw-away overlay). */
static inline bool qcow2_ordered(const struct qcow2 *s) {
    return !((s->node->flags | s->file->flags) & NODE_NO_FLUSH);
}

/* ---- header_write.c ---- */
/*
 * Writes s->h over the header's cluster and makes it stable.  A crash at any point leaves the old
 * header or the new one.  What it names must be stable before; what only the old one named may be
 * given back after.  -ENOSPC: it does not fit the cluster (nothing was written).
 */
int qcow2_header_write_co(struct qcow2 *s, struct err *e);

/* ---- tuning.c: options of the open image that say how, not what ---- */
struct qcow2_open_opts {
    char *snapshot_id, *snapshot_name;
    int overlap_check;
    bool has_cache, has_l2_cache, has_count_cache, has_l2_entry, has_pass_request;
    uint64_t cache, l2_cache, count_cache, l2_entry, clean_interval;
    bool lazy_refcounts, pass_request, pass_snapshot, pass_other;
};
/* Whether they go together, and with this cluster size; -EINVAL. */
int qcow2_tuning_check(const struct qcow2 *s, const struct qcow2_open_opts *o, struct err *e);
/* Bytes of a slice, and how many of them the cache is to hold at most. */
uint32_t qcow2_tuning_slice(const struct qcow2 *s, const struct qcow2_open_opts *o);
uint64_t qcow2_tuning_slices(const struct qcow2_open_opts *o, uint32_t slice_bytes,
                             uint64_t wanted);

/* ---- open.c ---- */
extern const struct driver driver_qcow2;
/* ---- meta.c: which clusters hold metadata ---- */
int qcow2_meta_add(struct qcow2 *s, uint64_t host, uint64_t length); /* -ENOMEM */
void qcow2_meta_remove(struct qcow2 *s, uint64_t host, uint64_t length);
/* Fills the set from header, tables and snapshots: before the first write. */
int qcow2_meta_build_co(struct qcow2 *s, struct err *e);
bool qcow2_meta_find(const struct qcow2 *s, uint64_t key);
enum qcow2_meta_kind { QCOW2_META_OTHER, QCOW2_META_L2, QCOW2_META_REFBLOCK };
int qcow2_meta_add_kind(struct qcow2 *s, uint64_t host, uint64_t length, enum qcow2_meta_kind kind);
/* False: the cluster is known to hold something else, or nothing. */
bool qcow2_meta_is(const struct qcow2 *s, uint64_t host, enum qcow2_meta_kind kind);
/* Whether the cluster at `host` holds metadata. */
static inline bool qcow2_is_meta(const struct qcow2 *s, uint64_t host) {
    return s->meta && !s->unchecked && qcow2_meta_find(s, (host >> s->cluster_bits) + 1);
}

/* ---- map.c ---- */
int qcow2_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out);
/*
 * The L2 slice that covers guest `offset`, unpinned; *out NULL when the L1 entry is empty.  *index:
 * of the entry inside the slice.  -EIO for a bad L1 entry.
 */
int qcow2_l2_slice_co(struct qcow2 *s, uint64_t offset, struct qcow2_slice **out, uint32_t *index);

/* ---- refcount.c ---- */
int qcow2_refcount_read_co(struct qcow2 *s, uint64_t cluster, uint64_t *out);
/*
 * Allocates up to `want` contiguous clusters, each with a count of 1; *got >= 1.  `exact`: all or
 * -ENOSPC.  *virgin: they lie beyond all that was ever used and read as zeros.  -ENOSPC, -EFBIG,
 * -EIO (a free cluster turned out to hold metadata).
 */
int qcow2_alloc_co(struct qcow2 *s, uint64_t want, bool exact, uint64_t *host, uint64_t *got,
                   bool *virgin);
/* `length` bytes (<= cluster_size) for coded data; counts raised. */
int qcow2_alloc_coded_co(struct qcow2 *s, uint32_t length, uint64_t *host);
/* The slice and index of a cluster's count; *out NULL: no block covers it (the count is 0). */
int qcow2_refcount_slice_co(struct qcow2 *s, uint64_t cluster, struct qcow2_slice **out,
                            uint32_t *index);
/* Takes one reference from each cluster now: only for clusters that no table on storage names. */
int qcow2_release_co(struct qcow2 *s, uint64_t cluster, uint64_t count);
/* The same without suspending: what is not in the cache goes into limbo. */
void qcow2_release_or_limbo(struct qcow2 *s, uint64_t cluster, uint64_t count);
/* One reference of each cluster goes into limbo.  Memory gone: the clusters leak. */
void qcow2_limbo_add(struct qcow2 *s, uint64_t cluster, uint64_t count);
/* Puts what an L2 entry named into limbo. */
void qcow2_limbo_add_entry(struct qcow2 *s, struct qcow2_l2e entry);
/* Releases all of `l`, punching the storage first where NODE_UNMAP says so; leaves it empty. */
void qcow2_limbo_release_co(struct qcow2 *s, struct qcow2_limbo *l);
/* Unordered storage only: releases what is in limbo now. */
void qcow2_limbo_settle_co(struct qcow2 *s);
void qcow2_limbo_free(struct qcow2_limbo *l);

/* ---- grow.c ---- */
/* Makes the refcount block for block index `bi` (and a larger table); 0 also when it exists. */
int qcow2_grow_block_co(struct qcow2 *s, uint64_t bi);
/* Makes the header name another refcount table, in one write, and flushes. */
int qcow2_reftable_name_co(struct qcow2 *s, uint64_t host, uint64_t clusters);
/* `clusters` contiguous ones behind everything that is covered, blocks for them included. */
int qcow2_grow_area_co(struct qcow2 *s, uint64_t clusters, uint64_t *host);

/* ---- place.c ---- */
int qcow2_place_co(struct node *n, uint64_t offset, uint64_t length, unsigned flags,
                   uint32_t coded_length, struct placement *out);
int qcow2_publish_co(struct node *n, const struct placement *p);
void qcow2_abandon(struct node *n, const struct placement *p);
/*
 * In place of publish: the placement's room is linked in without content.  What has subclusters
 * still reads as before; what has none reads as the room does.
 */
void qcow2_publish_room(struct qcow2 *s, const struct placement *p);
/* As qcow2_l2_slice_co, for writing: makes or copies the L2 table where needed. */
int qcow2_l2_slice_writable_co(struct qcow2 *s, uint64_t offset, struct qcow2_slice **out,
                               uint32_t *index);
/* Before any change of metadata: writes back first when the cache or limbo is crowded. */
int qcow2_make_room_co(struct qcow2 *s);

/* ---- zero.c ---- */
int qcow2_set_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags);
int qcow2_discard_co(struct node *n, uint64_t offset, uint64_t length);
/* Whole clusters become holes whatever lies below; the range may reach behind the disk's end. */
int qcow2_make_holes_co(struct qcow2 *s, uint64_t offset, uint64_t length);

/* ---- cut.c ---- */
/* Everything from guest offset `from` (rounded up to a cluster) becomes a hole; quiesced. */
int qcow2_cut_co(struct qcow2 *s, uint64_t from);
/* Writes back, then ends the file behind the last cluster in use where storage can. */
int qcow2_trim_file_co(struct qcow2 *s);
int qcow2_empty_co(struct node *n, struct err *e);

/* ---- resize.c ---- */
int qcow2_reach_co(struct node *n, uint64_t size, struct err *e);
uint64_t qcow2_vm_state_at(const struct node *n);
int qcow2_resize_co(struct node *n, uint64_t size, int prealloc, struct err *e);
/* Whether the disk can have this size, in an image of `version`.  -EFBIG, -ENOTSUP. */
int qcow2_resize_check(const struct qcow2 *s, uint64_t size, uint32_t version, struct err *e);
/* Gives every unallocated cluster of [offset, +length) room of its own, reading as zeros. */
int qcow2_preallocate_co(struct node *n, uint64_t offset, uint64_t length, int prealloc,
                         struct err *e);

/* ---- amend.c ---- */
extern const struct opt qcow2_amend_opt_table[];
struct qcow2_amend_opts {
    bool has_compat, has_lazy, has_bits, has_size, has_raw;
    int compat; /* as in struct qcow2_create_opts */
    bool lazy_refcounts, data_file_raw;
    uint64_t refcount_bits, size;
    char *backing_file, *backing_fmt, *data_file; /* NULL: not given */
    char *encrypt[5];                             /* recognised, and refused */
};
int qcow2_amend_co(struct node *n, const void *amend_opts, const struct amend_ctx *ctx,
                   struct err *e);

/* ---- flush.c ---- */
int qcow2_flush_co(struct node *n);
/* Writes the dirty refcount blocks; the caller holds wb_lock. */
int qcow2_write_refblocks_co(struct qcow2 *s);
/* Writes `length` bytes of a table, from host byte order, in pieces. */
int qcow2_table_write_co(struct qcow2 *s, uint64_t host, const uint64_t *entries, uint64_t count,
                         uint64_t bytes);
/* As qcow2_flush_co, until nothing is dirty (what limbo releases included): close, keep. */
int qcow2_writeback_all_co(struct qcow2 *s);

/* ---- create.c, measure.c ---- */
enum { QCOW2_CREATE_ENCRYPT = 8 }; /* number of encrypt.* options */
struct qcow2_create_opts {
    uint64_t size;
    uint64_t cluster_size;
    int compat; /* index into { "0.10", "1.1", "v2", "v3" } */
    uint64_t refcount_bits;
    char *backing_file, *backing_fmt;
    int compression_type; /* enum qcow2_compression */
    int preallocation;    /* enum prealloc */
    bool lazy_refcounts, extended_l2;
    /* recognised, and refused as not yet supported */
    char *data_file, *encrypt[QCOW2_CREATE_ENCRYPT];
    bool data_file_raw, encryption;
};
extern const struct opt qcow2_create_opt_table[];
int qcow2_create_co(struct node *file, const void *create_opts, struct create_ctx *ctx,
                    struct err *e);
int qcow2_measure(const void *create_opts, const struct measure_in *in, struct measure_result *out,
                  struct err *e);

/* ---- snapshot.c: see snapshot.h ---- */
int qcow2_snapshot_list_co(struct node *n, struct snapshot_list *out, struct err *e);
int qcow2_snapshot_create_co(struct node *n, struct snapshot_info *info, struct err *e);
int qcow2_snapshot_apply_co(struct node *n, const char *id, struct err *e);
int qcow2_snapshot_delete_co(struct node *n, const char *id, struct err *e);

/* ---- check.c ---- */
int qcow2_check_co(struct node *n, struct check_result *r, struct err *e);

/* ---- marks.c: the dirty and corrupt bits ---- */
/* Writes the header's incompatible feature bits, and flushes. */
int qcow2_incompatible_write_co(struct qcow2 *s, uint64_t bits);
/* An image with the dirty bit, open read-write under NODE_CHECK: repaired, or an error. */
int qcow2_mend_dirty_co(struct qcow2 *s, struct err *e);
/*
 * Damage was met that makes writing dangerous: nothing more is written but what has been
 * acknowledged; reading goes on.  Says so once.  The mark on storage follows with
 * qcow2_corrupt_store_co, which returns -EIO.
 */
void qcow2_corrupt(struct qcow2 *s, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
int qcow2_corrupt_store_co(struct qcow2 *s);

/* ---- repair.c ---- */
/* check with r->fix; the node is read-write, and its cache holds nothing dirty. */
int qcow2_repair_co(struct node *n, struct check_result *r, struct err *e);

/* ---- bitmap_dir.c, bitmap_store.c ---- */
/* Attaches the image's bitmaps to the node; a damaged directory is a note on read-only nodes. */
int qcow2_bitmaps_open_co(struct qcow2 *s, struct err *e);
/* The set of metadata is built: the bitmaps' clusters join it; a stale extension is dropped. */
int qcow2_bitmaps_writable_co(struct qcow2 *s, struct err *e);
void qcow2_bitmaps_close(struct qcow2 *s);
/* The "bitmaps" of info, new reference; NULL: none. */
json_t *qcow2_bitmaps_describe(struct node *n);
int qcow2_bitmap_check(struct node *n, const char *name, uint64_t granularity, struct err *e);
int qcow2_bitmap_load_co(struct bitmap *b, struct err *e);
int qcow2_bitmap_arm_co(struct node *n, struct err *e);
int qcow2_bitmap_store_co(struct node *n, struct err *e);
int qcow2_bitmap_remove_co(struct bitmap *b, struct err *e);

/* ---- describe.c, describe_luks.c, problems.c ---- */
json_t *qcow2_describe(struct node *n);
enum { QCOW2_LUKS_HEADER = 592 };
void qcow2_describe_luks(const uint8_t *header, json_t *o);
/* NODE_LOOK: reads what the two need; what cannot be had is left out. */
void qcow2_look_co(struct qcow2 *s);
/* What is wrong with the image, as far as that is known: an array of sentences. */
json_t *qcow2_problems(const struct qcow2 *s);

#endif
