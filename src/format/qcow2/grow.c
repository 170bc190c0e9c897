/* SPDX-License-Identifier: MIT */
/*
 * Growth of what counts: new refcount blocks, and a larger refcount table.
 *
 * A new block stands in the first cluster of the region that it counts, and counts itself.  Nothing
 * there can be in use, since without a block all counts are 0.  Where several blocks come together
 * with something that must be contiguous (a new refcount table, a long L1 table), all of it is laid
 * out at the start of the first region behind everything that is covered:
 *
 *      | block bi | block bi+1 | ... | clusters of the table ... | free ...
 *      ^ first cluster of region bi
 *
 * Order on storage.  A block's bytes are written before the table entry that names it (flush.c). A
 * new table is made in private, with its own blocks: all dirty blocks, the new blocks and the new
 * table are written and flushed, then the header field that names the table is written and flushed,
 * under grow_lock and wb_lock; only then is it put in force.  A crash before that leaves the old
 * table, which is still right about everything that any table on storage names.  Then the old
 * table's clusters are given back.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/plant.h"
#include "disk/event.h"
#include "disk/io.h"
#include "format/qcow2/layout.h"
#include "format/qcow2/qcow2.h"

/* Makes [host, +length) read as zeros on storage, unless it was never used. */
static int zero_fresh_co(struct qcow2 *s, uint64_t host, uint64_t length) {
    uint64_t end = qcow2_cluster_index(s, host + length);
    bool virgin = s->reads_zero && qcow2_cluster_index(s, host) >= s->virgin_from;
    s->virgin_from = max_u64(s->virgin_from, end);
    return virgin ? 0 : disk_zero_co(s->file, host, length, 0);
}

/* The slice that holds a cluster's count, of a block that is zeros on storage. Not suspending. */
static struct qcow2_slice *fresh_slice(struct qcow2 *s, uint64_t cluster, uint32_t *index) {
    uint64_t bi = cluster >> s->block_bits;
    uint32_t per_slice = s->cache.slice_bytes * 8 >> s->refcount_order;
    uint32_t in_block = (uint32_t)(cluster & (((uint64_t)1 << s->block_bits) - 1));
    uint64_t at = s->reftable[bi] + (uint64_t)(in_block / per_slice) * s->cache.slice_bytes;
    struct qcow2_slice *slice = qcow2_cache_peek(&s->cache, at);
    *index = in_block & (per_slice - 1);
    if (!slice &&
        qcow2_cache_get_zero(&s->cache, QCOW2_SLICE_REFBLOCK, at, (uint32_t)bi, &slice) < 0)
        return NULL;
    return slice;
}

/*
 * Puts `blocks` blocks from index `bi` in force, standing at the start of region `bi` (zeros on
 * storage), and counts them and the `clusters` behind them.  Does not suspend: nobody can meet a
 * block that does not count itself yet.  All or nothing.
 */
static int install_blocks(struct qcow2 *s, uint64_t bi, uint64_t blocks, uint64_t clusters) {
    uint64_t first = bi << s->block_bits, host = first << s->cluster_bits;
    int r = qcow2_meta_add_kind(s, host, blocks << s->cluster_bits, QCOW2_META_REFBLOCK);
    qcow2_cache_forget(&s->cache, host, blocks << s->cluster_bits);
    for (uint64_t i = 0; i < blocks; i++)
        s->reftable[bi + i] = (first + i) << s->cluster_bits;
    for (uint64_t i = 0; !r && i < blocks + clusters; i++) {
        uint32_t index;
        struct qcow2_slice *slice = fresh_slice(s, first + i, &index);
        if (slice)
            qcow2_refcount_set(qcow2_slice_modify(&s->cache, slice), index, s->refcount_order, 1);
        else
            r = -ENOMEM;
    }
    for (uint64_t i = 0; i < blocks; i++) {
        if (r < 0) {
            s->reftable[bi + i] = 0;
        } else {
            s->reftable_dirty[(bi + i) / 64] |= (uint64_t)1 << (bi + i) % 64;
            s->reftable_dirty_count++;
        }
    }
    if (r < 0) {
        qcow2_cache_forget(&s->cache, host, blocks << s->cluster_bits);
        qcow2_meta_remove(s, host, blocks << s->cluster_bits);
    }
    return r;
}

static int check_free(struct qcow2 *s, uint64_t cluster, uint64_t count) {
    uint64_t limit = QCOW2_HOST_LIMIT >> s->cluster_bits;
    if (cluster >= limit || count > limit - cluster)
        return -EFBIG;
    for (uint64_t i = 0; i < count; i++)
        if (qcow2_is_meta(s, (cluster + i) << s->cluster_bits)) {
            qcow2_corrupt(s, "the cluster at %" PRIu64 " holds metadata, and nothing counts it",
                          (cluster + i) << s->cluster_bits);
            return -EIO;
        }
    return 0;
}

/* Index of the first block behind all that exist. */
static uint64_t first_uncovered(const struct qcow2 *s) {
    uint64_t bi = s->reftable_entries;
    while (bi && !s->reftable[bi - 1])
        bi--;
    return bi;
}

/* ---------------------------------------------------------------- a larger table */

struct new_table {
    uint64_t entries, clusters;
    uint64_t first_block, blocks; /* indices */
    uint64_t host;                /* of the table; its blocks stand before it */
    uint64_t *table, *dirty;
};

static int plan_table(struct qcow2 *s, uint64_t entries_wanted, struct new_table *t) {
    struct qcow2_table_plan p;
    t->first_block = first_uncovered(s);
    if (!qcow2_table_plan(s->cluster_bits, s->refcount_order, t->first_block, s->reftable_entries,
                          entries_wanted, &p))
        return -EFBIG;
    t->entries = p.entries;
    t->clusters = p.clusters;
    t->blocks = p.blocks;
    uint64_t first = t->first_block << s->block_bits;
    t->host = (first + t->blocks) << s->cluster_bits;
    int r = check_free(s, first, t->blocks + t->clusters);
    if (r < 0)
        return r;
    t->table = calloc(t->entries, 8);
    t->dirty = calloc(div_up(t->entries, 64), 8);
    if (!t->table || !t->dirty)
        return -ENOMEM;
    memcpy(t->table, s->reftable, (size_t)s->reftable_entries * 8);
    for (uint64_t i = 0; i < t->blocks; i++)
        t->table[t->first_block + i] = (first + i) << s->cluster_bits;
    return 0;
}

/* Writes the blocks that the new table brings along: they count themselves and the table. */
static int write_blocks_co(struct qcow2 *s, const struct new_table *t) {
    uint64_t left = t->blocks + t->clusters, per_block = (uint64_t)1 << s->block_bits;
    AUTO_FREE uint8_t *buf = malloc(s->cluster_size);
    int r = buf ? 0 : -ENOMEM;
    for (uint64_t i = 0; !r && i < t->blocks; i++) {
        uint64_t n = min_u64(left, per_block);
        memset(buf, 0, s->cluster_size);
        for (uint64_t k = 0; k < n; k++)
            qcow2_refcount_set(buf, k, s->refcount_order, 1);
        r = disk_pwrite_co(s->file, t->table[t->first_block + i], buf, s->cluster_size);
        left -= n;
    }
    return r;
}

int qcow2_reftable_name_co(struct qcow2 *s, uint64_t host, uint64_t clusters) {
    uint8_t field[12]; /* offset and clusters stand side by side: one write */
    be64_store(field, host);
    be32_store(field + 8, (uint32_t)clusters);
    int r = disk_pwrite_co(s->file, QCOW2_HEADER_REFTABLE_AT, field, sizeof(field));
    if (!r && qcow2_ordered(s))
        r = disk_flush_co(s->file);
    return r;
}

/* Writes everything that the new table depends on, the table, then the header that names it. */
static int switch_table_co(struct qcow2 *s, const struct new_table *t) {
    disk_event_co(s->file, EVENT_refblock_alloc_write_blocks);
    int r = PLANTED(REFTABLE_NAMED_EARLY) ? qcow2_reftable_name_co(s, t->host, t->clusters)
                                          : qcow2_write_refblocks_co(s);
    if (!r)
        r = write_blocks_co(s, t);
    disk_event_co(s->file, EVENT_refblock_alloc_write_table);
    if (!r)
        r = qcow2_table_write_co(s, t->host, t->table, t->entries, t->clusters << s->cluster_bits);
    if (!r && qcow2_ordered(s))
        r = disk_flush_co(s->file);
    if (r < 0)
        return r;
    disk_event_co(s->file, EVENT_refblock_alloc_switch_table);
    /* A crash before this leaves the old table in force and the new clusters unused. */
    r = qcow2_reftable_name_co(s, t->host, t->clusters);
    if (r < 0) /* who knows which one storage holds: the old one must stay right */
        qcow2_reftable_name_co(s, s->h.refcount_table_offset, s->h.refcount_table_clusters);
    return r;
}

/* grow_lock is held, so the table does not change while this one is made. */
static int grow_table_co(struct qcow2 *s, uint64_t entries_wanted) {
    struct new_table t = {0};
    uint64_t old_host = s->h.refcount_table_offset;
    uint64_t old_bytes = (uint64_t)s->h.refcount_table_clusters << s->cluster_bits;
    int r = plan_table(s, entries_wanted, &t);
    AUTO_FREE uint64_t *table = t.table, *dirty = t.dirty;
    uint64_t first_host = (t.first_block << s->block_bits) << s->cluster_bits;
    uint64_t bytes = (t.blocks + t.clusters) << s->cluster_bits;
    if (!r)
        r = qcow2_meta_add(s, first_host, bytes);
    if (r < 0)
        return r;
    s->virgin_from = max_u64(s->virgin_from, qcow2_cluster_index(s, first_host + bytes));
    qcow2_cache_forget(&s->cache, first_host, bytes);
    task_mutex_lock_co(&s->wb_lock);
    r = switch_table_co(s, &t);
    if (!r) {
        /* In force; entries that were dirty have been written with it. */
        table = s->reftable;
        dirty = s->reftable_dirty;
        s->reftable = t.table;
        s->reftable_dirty = t.dirty;
        s->reftable_entries = (uint32_t)t.entries;
        s->reftable_dirty_count = 0;
        s->h.refcount_table_offset = t.host;
        s->h.refcount_table_clusters = (uint32_t)t.clusters;
    }
    task_mutex_unlock(&s->wb_lock);
    qcow2_meta_remove(s, r ? first_host : old_host, r ? bytes : old_bytes);
    if (!r)
        qcow2_release_co(s, qcow2_cluster_index(s, old_host), old_bytes >> s->cluster_bits);
    return r;
}

/* ---------------------------------------------------------------- blocks */

int qcow2_grow_block_co(struct qcow2 *s, uint64_t bi) {
    uint64_t host = (bi << s->block_bits) << s->cluster_bits;
    int r = 0;
    task_mutex_lock_co(&s->grow_lock);
    disk_event_co(s->file, EVENT_refblock_alloc);
    if (bi >= s->reftable_entries)
        r = grow_table_co(s, bi + 1);
    if (!r && !s->reftable[bi]) { /* else somebody, or the table's growth, has made it */
        r = check_free(s, bi << s->block_bits, 1);
        if (!r)
            r = zero_fresh_co(s, host, s->cluster_size);
        if (!r)
            r = install_blocks(s, bi, 1, 0);
    }
    task_mutex_unlock(&s->grow_lock);
    return r;
}

int qcow2_grow_area_co(struct qcow2 *s, uint64_t clusters, uint64_t *host) {
    task_mutex_lock_co(&s->grow_lock);
    uint64_t blocks = qcow2_blocks_for(s->block_bits, clusters), bi = first_uncovered(s);
    int r = 0;
    if (bi + blocks > s->reftable_entries) {
        /* Room for these blocks and for those that the larger table itself needs. */
        r = grow_table_co(s,
                          bi + 2 * blocks + qcow2_blocks_for(s->block_bits, s->reftable_entries));
        bi = first_uncovered(s);
        if (!r && bi + blocks > s->reftable_entries)
            r = -EFBIG;
    }
    uint64_t first = bi << s->block_bits;
    if (!r)
        r = check_free(s, first, blocks + clusters);
    if (!r)
        r = zero_fresh_co(s, first << s->cluster_bits, blocks << s->cluster_bits);
    if (!r)
        r = install_blocks(s, bi, blocks, clusters);
    if (!r)
        s->virgin_from = max_u64(s->virgin_from, first + blocks + clusters);
    task_mutex_unlock(&s->grow_lock);
    *host = (first + blocks) << s->cluster_bits;
    return r;
}
