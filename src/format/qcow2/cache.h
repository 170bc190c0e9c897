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
 *  2. `data` of a slice that nobody pinned is good until the caller suspends.
 *  3. A frozen slice's bytes do not change: qcow2_slice_modify gives the slice a fresh copy first
 *     and leaves the old bytes to the writer.
 *  4. Tasks that miss the same slice wait for one read.
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

struct qcow2_slice {
    uint64_t host;            /* key: byte offset in the file */
    struct qcow2_slice *next; /* hash chain */
    uint8_t *data;            /* slice_bytes */
    uint8_t *frozen_data;     /* what the writer writes; == data until modified; NULL: not frozen */
    struct list link;         /* in cache->dirty while dirty */
    struct list frozen_link;  /* in the writer's list while frozen */
    uint32_t l1_index;        /* L2 only: the table this slice belongs to */
    uint32_t pins;
    uint8_t kind;
    bool loading, dirty, recent;
    int error; /* of the load that the waiters wait for */
    struct waitq ready;
};

struct qcow2_cache {
    struct node *file;
    uint32_t slice_bytes;
    uint32_t slices_max; /* budget */
    uint32_t count;      /* slices that exist */
    uint32_t dirty_count;
    uint32_t hand;
    struct qcow2_slice **all; /* count entries, room for all_cap */
    uint32_t all_cap;
    struct qcow2_slice **hash; /* hash_mask + 1 heads */
    uint32_t hash_mask;
    struct list dirty;
    void **slabs; /* memory of the slices' data, freed as a whole */
    unsigned slab_count;
    uint8_t *free_data; /* chained through the first bytes */
    uint64_t next_load; /* read-ahead: host offset behind the last load */
};

int qcow2_cache_init(struct qcow2_cache *c, struct node *file, uint32_t slice_bytes,
                     uint64_t slices_wanted);
void qcow2_cache_free(struct qcow2_cache *c); /* accepts a zeroed one */

/* The slice at `host`, or NULL when it would have to be read.  Never suspends. */
struct qcow2_slice *qcow2_cache_peek(struct qcow2_cache *c, uint64_t host);
/*
 * The slice at `host`, read when needed; unpinned on return (rule 2).  `ahead`: bytes behind `host`
 * that belong to the same table and may be read along when the caller walks.  -EIO ...
 */
int qcow2_cache_get_co(struct qcow2_cache *c, enum qcow2_slice_kind kind, uint64_t host,
                       uint32_t l1_index, uint32_t ahead, struct qcow2_slice **out);
/* A slice of zeros that is known to be so on storage, without reading; for fresh tables. -ENOMEM.
 */
int qcow2_cache_get_zero(struct qcow2_cache *c, enum qcow2_slice_kind kind, uint64_t host,
                         uint32_t l1_index, struct qcow2_slice **out);

static inline void qcow2_slice_pin(struct qcow2_slice *s) {
    s->pins++;
}
static inline void qcow2_slice_unpin(struct qcow2_slice *s) {
    s->pins--;
}
/* Before every change of s->data: marks it dirty and gives back the bytes to change. */
uint8_t *qcow2_slice_modify(struct qcow2_cache *c, struct qcow2_slice *s);

/* Moves all dirty slices to `frozen` (an initialised list head); they are clean afterwards. */
void qcow2_cache_freeze(struct qcow2_cache *c, struct list *frozen);
/* One frozen slice has been written (ok) or not (dirty again). */
void qcow2_cache_thaw(struct qcow2_cache *c, struct qcow2_slice *s, bool ok);
/* Forgets slices in [host, host + length): the table has been given up. */
void qcow2_cache_forget(struct qcow2_cache *c, uint64_t host, uint64_t length);

/* True when so much is dirty that a write-back should come before more is added. */
static inline bool qcow2_cache_crowded(const struct qcow2_cache *c) {
    return c->dirty_count > c->slices_max - c->slices_max / 4;
}

#endif
