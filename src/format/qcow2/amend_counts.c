/* SPDX-License-Identifier: MIT */
/*
 * Reference counts of another width: a whole new refcount structure.
 *
 *      file  | header ... old table, old blocks, data ... |  new blocks  |  new table  |
 *                                                         ^ first cluster behind all in use
 *
 *  1. The old counts are looked at: which new blocks are needed, whether each count fits.  Nothing
 *     is written when it cannot be done.
 *  2. The new blocks, which count what the old ones count and themselves and the new table, and the
 *     new table are written where the old counts say "free".  Barrier.
 *     A crash before the next step leaves the old structure in force, and right.
 *  3. One write of the header's first sector names the new table and width.  Barrier.
 *  4. The clusters of the old table and blocks, which nothing names any more, are given back.
 *     A crash before that is on storage leaks them.
 *
 * Called with nothing dirty and nobody else inside, so storage has all counts; blocks are read from
 * there one by one, past the cache, and memory does not depend on the size of the image (one bit a
 * new block: 128 KiB).
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/plant.h"
#include "disk/io.h"
#include "format/qcow2/amend.h"

#define TABLE_ENTRIES_MAX ((uint64_t)QCOW2_REFTABLE_BYTES_MAX / 8)

struct plan {
    struct qcow2 *s;
    uint32_t order, block_bits; /* of the new counts */
    uint64_t *needed;           /* bitmap: new blocks by index */
    uint64_t used_end;          /* first cluster behind all that are counted */
    uint64_t blocks, table_clusters;
    uint64_t last_block; /* highest index that is needed */
};

static bool is_needed(const struct plan *p, uint64_t bi) {
    return p->needed[bi / 64] >> bi % 64 & 1;
}

static int need(struct plan *p, uint64_t bi, struct err *e) {
    if (bi >= TABLE_ENTRIES_MAX)
        return err_set(e, EFBIG,
                       "reference counts of %u bits need a refcount table of more than %d bytes "
                       "for cluster %" PRIu64,
                       1u << p->order, QCOW2_REFTABLE_BYTES_MAX, bi << p->block_bits);
    if (!is_needed(p, bi)) {
        p->needed[bi / 64] |= (uint64_t)1 << bi % 64;
        p->blocks++;
        p->last_block = max_u64(p->last_block, bi);
    }
    return 0;
}

/* An old block's bytes; zeros where there is none.  */
static int read_block_co(struct qcow2 *s, uint64_t bi, uint8_t *buf, bool *there, struct err *e) {
    uint64_t host = bi < s->reftable_entries ? s->reftable[bi] & QCOW2_REFTABLE_MASK : 0;
    *there = host != 0;
    if (!host)
        return 0;
    int r = is_aligned(host, s->cluster_size) && host < QCOW2_HOST_LIMIT
                ? disk_pread_co(s->file, host, buf, s->cluster_size)
                : -EIO;
    return r < 0 ? err_errno(e, -r, "reading the refcount block at %" PRIu64, host) : 0;
}

static int census_block(struct plan *p, uint64_t first, const uint8_t *buf, struct err *e) {
    struct qcow2 *s = p->s;
    uint64_t limit = qcow2_refcount_limit(p->order);
    for (uint64_t i = 0; i < (uint64_t)1 << s->block_bits; i++) {
        uint64_t count = qcow2_refcount_get(buf, i, s->refcount_order);
        if (!count)
            continue;
        if (count > limit)
            return err_set(e, EOVERFLOW,
                           "refcount_bits=%u is too few: the cluster at offset %" PRIu64
                           " has a reference count of %" PRIu64,
                           1u << p->order, (first + i) << s->cluster_bits, count);
        int r = need(p, (first + i) >> p->block_bits, e);
        if (r < 0)
            return r;
        p->used_end = first + i + 1;
    }
    return 0;
}

/* Step 1: fills the plan, to be freed with plan_free. */
static int plan_make_co(struct plan *p, struct qcow2 *s, uint32_t order, struct err *e) {
    *p = (struct plan){.s = s, .order = order, .block_bits = s->cluster_bits + 3 - order};
    p->needed = calloc(TABLE_ENTRIES_MAX / 64, 8);
    uint8_t *buf = buf_get(s->cluster_size);
    int r = p->needed && buf ? 0 : err_set(e, ENOMEM, "no memory for the refcount blocks");
    for (uint64_t bi = 0; !r && bi < s->reftable_entries; bi++) {
        bool there;
        r = read_block_co(s, bi, buf, &there, e);
        if (!r && there)
            r = census_block(p, bi << s->block_bits, buf, e);
    }
    buf_put(buf, s->cluster_size);
    /* The new structure counts itself: its size grows until it covers itself, a few rounds. */
    for (uint64_t before = UINT64_MAX, total = 0; !r && total != before;) {
        before = total;
        uint64_t end = p->used_end + total;
        for (uint64_t bi = p->used_end >> p->block_bits; !r && bi << p->block_bits < end; bi++)
            r = need(p, bi, e);
        p->table_clusters = div_up((p->last_block + 1) * 8, s->cluster_size);
        total = p->blocks + p->table_clusters;
    }
    if (!r && p->used_end + p->blocks + p->table_clusters > QCOW2_HOST_LIMIT >> s->cluster_bits)
        r = err_set(e, EFBIG, "no room behind the image for new reference counts");
    for (uint64_t i = 0; !r && i < p->blocks + p->table_clusters; i++)
        if (qcow2_is_meta(s, (p->used_end + i) << s->cluster_bits))
            r = err_set(e, EIO, "the table at %" PRIu64 " is not counted: the image is damaged",
                        (p->used_end + i) << s->cluster_bits);
    return r;
}

static void plan_free(struct plan *p) {
    free(p->needed);
}

int qcow2_counts_fit_co(struct qcow2 *s, uint32_t order, struct err *e) {
    struct plan p;
    int r = plan_make_co(&p, s, order, e);
    plan_free(&p);
    return r;
}

/* ---------------------------------------------------------------- the new structure */

/* Counts [first, first + n) of new block bytes `out` (index 0 = `base`) from the old blocks. */
static int convert_co(struct plan *p, uint64_t base, uint8_t *out, uint8_t *in, uint64_t *in_bi,
                      bool *in_there, struct err *e) {
    struct qcow2 *s = p->s;
    uint64_t n = (uint64_t)1 << p->block_bits;
    uint64_t mine = p->used_end, mine_end = mine + p->blocks + p->table_clusters;
    memset(out, 0, s->cluster_size);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t cluster = base + i, bi = cluster >> s->block_bits, count = 0;
        if (cluster >= mine_end)
            break;
        if (cluster < mine) {
            if (bi != *in_bi) {
                int r = read_block_co(s, bi, in, in_there, e);
                if (r < 0)
                    return r;
                *in_bi = bi;
            }
            if (!*in_there) { /* nothing is counted up to the next old block */
                i += (((bi + 1) << s->block_bits) - cluster) - 1;
                continue;
            }
            count = qcow2_refcount_get(in, cluster & (((uint64_t)1 << s->block_bits) - 1),
                                       s->refcount_order);
        } else {
            count = 1;
        }
        if (count)
            qcow2_refcount_set(out, i, p->order, count);
    }
    return 0;
}

/* Step 2 without its barrier.  table: 0 or the place of each block. */
static int write_new_co(struct plan *p, uint64_t *table, struct qcow2_amend_progress *progress,
                        struct err *e) {
    struct qcow2 *s = p->s;
    uint64_t host = p->used_end << s->cluster_bits, in_bi = UINT64_MAX;
    uint8_t *in = buf_get(s->cluster_size), *out = buf_get(s->cluster_size);
    bool in_there = false;
    int r = in && out ? 0 : err_set(e, ENOMEM, "no memory for the refcount blocks");
    for (uint64_t bi = 0; !r && bi <= p->last_block; bi++) {
        if (!is_needed(p, bi))
            continue;
        r = convert_co(p, bi << p->block_bits, out, in, &in_bi, &in_there, e);
        if (!r && (r = disk_pwrite_co(s->file, host, out, s->cluster_size)) < 0)
            err_errno(e, -r, "writing the refcount block at %" PRIu64, host);
        table[bi] = host;
        host += s->cluster_size;
        qcow2_amend_step(progress, 1);
    }
    buf_put(in, s->cluster_size);
    buf_put(out, s->cluster_size);
    if (!r && (r = qcow2_table_write_co(s, host, table, p->last_block + 1,
                                        p->table_clusters << s->cluster_bits)) < 0)
        err_errno(e, -r, "writing the refcount table at %" PRIu64, host);
    return r;
}

/* ---------------------------------------------------------------- the switch */

static void adopt(struct plan *p, uint64_t **table, uint64_t **dirty) {
    struct qcow2 *s = p->s;
    uint64_t *old_table = s->reftable, *old_dirty = s->reftable_dirty;
    s->reftable = *table;
    s->reftable_dirty = *dirty;
    s->reftable_entries = (uint32_t)(p->table_clusters * (s->cluster_size / 8));
    s->reftable_dirty_count = 0;
    s->refcount_order = p->order;
    s->block_bits = p->block_bits;
    s->refcount_max = qcow2_refcount_limit(p->order);
    s->free_cursor = 0;
    s->releases++;
    s->coded_pos = 0;
    s->virgin_from = max_u64(s->virgin_from, p->used_end + p->blocks + p->table_clusters);
    *table = old_table;
    *dirty = old_dirty;
}

/* Step 3: the header, and with it what is in force. */
static int name_co(struct plan *p, struct err *e) {
    struct qcow2 *s = p->s;
    struct qcow2_header old = s->h;
    s->h.refcount_order = p->order;
    s->h.refcount_table_offset = (p->used_end + p->blocks) << s->cluster_bits;
    s->h.refcount_table_clusters = (uint32_t)p->table_clusters;
    int r = qcow2_header_write_co(s, e);
    if (r < 0) { /* who knows which one storage holds: the old one must stay right */
        s->h = old;
        qcow2_header_write_co(s, NULL);
    }
    return r;
}

/* Step 4. */
static void give_back_co(struct qcow2 *s, const uint64_t *table, uint64_t entries, uint64_t host,
                         uint64_t bytes) {
    for (uint64_t i = 0; i < entries; i++) {
        uint64_t block = table[i] & QCOW2_REFTABLE_MASK;
        if (!block)
            continue;
        qcow2_cache_forget(&s->cache, block, s->cluster_size);
        qcow2_meta_remove(s, block, s->cluster_size);
        qcow2_release_co(s, qcow2_cluster_index(s, block), 1); /* an error leaks */
    }
    qcow2_meta_remove(s, host, bytes);
    qcow2_release_co(s, qcow2_cluster_index(s, host), bytes >> s->cluster_bits);
}

static int change_co(struct plan *p, struct qcow2_amend_progress *progress, struct err *e) {
    struct qcow2 *s = p->s;
    uint64_t entries = p->table_clusters * (s->cluster_size / 8);
    AUTO_FREE uint64_t *table = calloc(entries, 8), *dirty = calloc(div_up(entries, 64), 8);
    uint64_t old_entries = s->reftable_entries, old_host = s->h.refcount_table_offset;
    uint64_t old_bytes = (uint64_t)s->h.refcount_table_clusters << s->cluster_bits;
    uint64_t host = p->used_end << s->cluster_bits, old_end = s->file->size;
    uint64_t bytes = (p->blocks + p->table_clusters) << s->cluster_bits;
    if (!table || !dirty || qcow2_meta_add(s, host, bytes) < 0)
        return err_set(e, ENOMEM, "no memory for the refcount table");
    qcow2_cache_forget(&s->cache, host, bytes);
    int r = PLANTED(COUNTS_NAMED_EARLY) ? name_co(p, e) : 0;
    if (!r)
        r = write_new_co(p, table, progress, e);
    if (!r && qcow2_ordered(s) && (r = disk_flush_co(s->file)) < 0)
        err_errno(e, -r, "writing the refcount table");
    if (r < 0 && s->file->size > old_end) /* room that nothing names; a try */
        disk_resize_co(s->file, old_end, PREALLOC_OFF, NULL);
    if (!r && !PLANTED(COUNTS_NAMED_EARLY))
        r = name_co(p, e);
    if (r < 0) {
        qcow2_meta_remove(s, host, bytes);
        return r;
    }
    adopt(p, &table, &dirty);
    give_back_co(s, table, old_entries, old_host, old_bytes);
    return 0;
}

int qcow2_counts_change_co(struct qcow2 *s, uint32_t order, struct qcow2_amend_progress *p,
                           struct err *e) {
    struct plan plan;
    int r = plan_make_co(&plan, s, order, e);
    if (!r) {
        p->total += plan.blocks;
        r = change_co(&plan, p, e);
    }
    plan_free(&plan);
    return r;
}
