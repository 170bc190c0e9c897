/* SPDX-License-Identifier: MIT */
/*
 * The metadata cache: slices of L2 tables and refcount blocks, by host offset.
 *
 * A slice is 4 KiB, or a whole table where clusters are smaller.  One budget serves both kinds; it
 * covers the whole disk up to QCOW2_CACHE_BYTES_MAX.  States of a slice:
 *
 *      loading -> clean <-> dirty -> frozen (being written; may be dirty again)
 *
 *  1. Only a clean, unpinned slice is evicted.  Nothing here writes: flush.c takes the dirty ones
 *     in the order that the law demands.  Where nothing can be evicted the cache grows beyond its
 *     budget, and the next placement asks for a write-back before it goes on.
 *  2. `data` of a slice that nobody pinned is good until the caller suspends; that of a pinned one
 *     until the caller suspends too (rule 3 may replace it), but the slice itself stays.
 *  3. A frozen slice's bytes do not change: qcow2_slice_modify gives the slice a fresh copy first
 *     and leaves the old bytes to the writer.
 *  4. Tasks that miss the same slice wait for one read.
 *  5. Walks are noticed: a miss right behind the last load reads the rest of the table along.
 */
#ifndef STRATA_FORMAT_QCOW2_CACHE_H
#define STRATA_FORMAT_QCOW2_CACHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "base/list.h"
#include "runtime/task.h"

struct node;

#define QCOW2_SLICE_BYTES_MAX 4096u
#define QCOW2_CACHE_BYTES_MAX (32u << 20)

enum qcow2_slice_kind { QCOW2_SLICE_L2, QCOW2_SLICE_REFBLOCK };
#define QCOW2_SLICE_KINDS 2

struct qcow2_slice {
    uint64_t host;            /* key: byte offset in the file */
    struct qcow2_slice *next; /* hash chain */
    uint8_t *data;            /* slice_bytes */
    uint8_t *frozen_data;     /* what the writer writes; == data until modified; NULL: not frozen */
    struct list link;         /* in cache->dirty while dirty */
    struct list frozen_link;  /* in the writer's list while frozen */
    struct waitq ready;       /* who waits for the load */
    uint32_t table;           /* index of its table: in L1, or in the refcount table */
    uint32_t pins;
    uint32_t index; /* in cache->all */
    int error;      /* of the load, for those who waited; -EAGAIN: look again */
    uint8_t kind;
    bool loading, dirty, recent;
    bool dead; /* no longer found; freed with its last pin */
};

/* Where the last load of a kind ended, for rule 5. */
struct qcow2_walk {
    uint64_t next_host;
    uint32_t table;
    bool at_end; /* of its table */
};

struct qcow2_cache {
    struct node *file;
    uint32_t slice_bytes;
    uint32_t slices_max; /* budget */
    uint32_t count;      /* slices that exist */
    uint32_t dirty_count, frozen_count;
    uint32_t hand;            /* of the clock */
    struct qcow2_slice **all; /* count entries, room for all_cap */
    uint32_t all_cap;
    struct qcow2_slice **hash; /* hash_mask + 1 heads */
    uint32_t hash_mask;
    struct list dirty;
    struct qcow2_slab *slabs; /* memory of the slices' data, freed as a whole */
    uint8_t *free_data;       /* chained through their first bytes */
    struct qcow2_walk walk[QCOW2_SLICE_KINDS];
};

/* `slices_wanted` would hold all metadata of the disk. -ENOMEM. */
int qcow2_cache_init(struct qcow2_cache *c, struct node *file, uint32_t slice_bytes,
                     uint64_t slices_wanted);
/* Nothing may be pinned or frozen.  Accepts a zeroed cache. */
void qcow2_cache_free(struct qcow2_cache *c);

/* The slice at `host`, or NULL when it would have to be read.  Never suspends. */
struct qcow2_slice *qcow2_cache_peek(struct qcow2_cache *c, uint64_t host);
/*
 * The slice at `host`, read when needed; unpinned on return (rule 2).  `table`: see struct
 * qcow2_slice.  `ahead`: bytes behind this slice that belong to the same table.  -EIO, -ENOMEM ...
 */
int qcow2_cache_get_co(struct qcow2_cache *c, enum qcow2_slice_kind kind, uint64_t host,
                       uint32_t table, uint32_t ahead, struct qcow2_slice **out);
/* A slice that is known to be zeros on storage, without reading; for fresh tables.  -ENOMEM. */
int qcow2_cache_get_zero(struct qcow2_cache *c, enum qcow2_slice_kind kind, uint64_t host,
                         uint32_t table, struct qcow2_slice **out);

static inline void qcow2_slice_pin(struct qcow2_slice *s) {
    s->pins++;
}
void qcow2_slice_unpin(struct qcow2_cache *c, struct qcow2_slice *s);
/* Before every change of s->data: marks it dirty and gives back the bytes to change. */
uint8_t *qcow2_slice_modify(struct qcow2_cache *c, struct qcow2_slice *s);

/*
 * Freezes dirty slices (of refcount blocks only, or all) into the list `frozen`, by frozen_link.
 * They are clean afterwards.  A slice is frozen by one writer at a time (wb_lock).
 */
void qcow2_cache_freeze(struct qcow2_cache *c, bool refblocks_only, struct list *frozen);
/* A frozen slice has been written (ok), or not: dirty again. */
void qcow2_cache_thaw(struct qcow2_cache *c, struct qcow2_slice *s, bool ok);
/* Forgets the slices in [host, host + length), dirty or not: the table has been given up. */
void qcow2_cache_forget(struct qcow2_cache *c, uint64_t host, uint64_t length);
/* Forgets every slice; none is pinned or dirty. */
void qcow2_cache_forget_all(struct qcow2_cache *c);

/* True when so much is dirty that a write-back should come before more is added. */
static inline bool qcow2_cache_crowded(const struct qcow2_cache *c) {
    return c->dirty_count > c->slices_max - c->slices_max / 4;
}

#endif
