/* SPDX-License-Identifier: MIT */
/*
 * Refcount structures from nothing: when the table or blocks of an image cannot be trusted, every
 * count is made again from the names that a walk over all other metadata finds.
 *
 * Layout, behind the end of the file and behind all that damaged entries name there:
 *
 *      ... file | [extra: claimed by the caller] | blocks, by index | table |
 *
 * Blocks exist only for regions in which something is in use, this room included; their number is
 * the fixed point of "blocks and table need counting, too".
 *
 * Order on storage: blocks and table are written, flushed; then the header names the table, in one
 * write of 12 bytes within a sector, flushed.  Killed before that, the image is what it was, with a
 * longer file; after it, all is in force.  The old structures are named by nothing then and have a
 * count of 0, unless something else names their clusters.
 *
 * Where some table could not be followed, nobody knows what it names: then every cluster of the
 * file keeps a count of at least 1.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/plant.h"
#include "disk/io.h"
#include "format/qcow2/repair.h"

struct rebuild {
    struct qcow2 *s;
    struct check c; /* a pass without the refcount structures */
    uint64_t extra, extra_n;
    uint64_t first, blocks, clusters; /* of the room: blocks, then the clusters of the table */
    uint64_t entries;                 /* of the table */
    uint64_t *table;
};

/* What a cluster's count must be. */
static uint64_t count_of(const struct rebuild *b, uint64_t cluster) {
    uint64_t n = cluster < b->c.found.clusters ? counts_get(&b->c.found, cluster) : 0;
    if (cluster - b->extra < b->extra_n || cluster - b->first < b->blocks + b->clusters)
        n++;
    if (!n && b->c.incomplete && cluster < b->c.file_clusters)
        n = 1;
    return min_u64(n, b->s->refcount_max); /* where the width is too small, check will tell */
}

static bool touches(uint64_t a, uint64_t a_n, uint64_t b, uint64_t b_n) {
    return a_n && b_n && a < b + b_n && b < a + a_n;
}

/* Anything in use among [from, from + n)? */
static bool region_used(const struct rebuild *b, uint64_t from, uint64_t n) {
    uint64_t known = b->c.found.clusters;
    if (touches(from, n, b->extra, b->extra_n) ||
        touches(from, n, b->first, b->blocks + b->clusters))
        return true;
    if (b->c.incomplete && from < b->c.file_clusters)
        return true;
    return from < known && !counts_all_zero(&b->c.found, from, min_u64(n, known - from));
}

/* Sizes the room: repeated until counting it needs no more of it. */
static int plan(struct rebuild *b) {
    const struct qcow2 *s = b->s;
    uint64_t per_block = (uint64_t)1 << s->block_bits;
    uint64_t entries_max = QCOW2_REFTABLE_BYTES_MAX / 8;
    uint64_t *used = calloc(entries_max / 64, 8);
    if (!used)
        return -ENOMEM;
    b->first = max_u64(repair_room_from(&b->c), b->extra + b->extra_n);
    /* What is in use without the room; only its own regions can be added to these. */
    uint64_t known = min_u64(((b->first - 1) >> s->block_bits) + 1, entries_max), fixed = 0;
    for (uint64_t bi = 0; bi < known; bi++)
        if (region_used(b, bi << s->block_bits, per_block)) {
            used[bi / 64] |= (uint64_t)1 << bi % 64;
            fixed++;
        }
    int r = 0;
    for (uint64_t size = 0;;) {
        uint64_t from = b->first >> s->block_bits;
        uint64_t to = (b->first + max_u64(size, 1) - 1) >> s->block_bits;
        if (to >= entries_max) {
            r = -EFBIG;
            break;
        }
        b->blocks = fixed;
        for (uint64_t bi = from; bi <= to; bi++)
            b->blocks += !(used[bi / 64] >> bi % 64 & 1);
        b->clusters = div_up((to + 1) * 8, s->cluster_size);
        if (b->blocks + b->clusters <= size) {
            /* Spare clusters of the last round count as the table's. */
            b->clusters = size - b->blocks;
            break;
        }
        size = b->blocks + b->clusters;
    }
    free(used);
    b->entries = b->clusters << s->cluster_bits >> 3;
    if (r || b->entries > entries_max)
        return -EFBIG;
    uint64_t end = b->first + b->blocks + b->clusters;
    return end > QCOW2_HOST_LIMIT >> s->cluster_bits || end > b->c.outside_far ? -EFBIG : 0;
}

/* One block, in pieces of the buffer. */
static int write_block_co(struct rebuild *b, uint64_t bi, uint64_t host, uint8_t *buf) {
    const struct qcow2 *s = b->s;
    uint32_t piece = min_u64(s->cluster_size, CHECK_BUF_BYTES);
    uint64_t cluster = bi << s->block_bits, per_piece = (uint64_t)piece * 8 >> s->refcount_order;
    int r = 0;
    for (uint32_t at = 0; !r && at < s->cluster_size; at += piece, cluster += per_piece) {
        memset(buf, 0, piece);
        for (uint64_t i = 0; i < per_piece; i++) {
            uint64_t n = count_of(b, cluster + i);
            if (n)
                qcow2_refcount_set(buf, i, s->refcount_order, n);
        }
        r = disk_pwrite_co(s->file, host + at, buf, piece);
    }
    return r;
}

static int write_all_co(struct rebuild *b, uint8_t *buf) {
    struct qcow2 *s = b->s;
    uint64_t next = b->first, per_block = (uint64_t)1 << s->block_bits;
    uint64_t host = (b->first + b->blocks) << s->cluster_bits;
    int r = 0;
    for (uint64_t bi = 0; !r && next < b->first + b->blocks && bi < b->entries; bi++) {
        if (!region_used(b, bi << s->block_bits, per_block))
            continue;
        b->table[bi] = next << s->cluster_bits;
        r = write_block_co(b, bi, b->table[bi], buf);
        next++;
    }
    if (!r)
        r = qcow2_table_write_co(s, host, b->table, b->entries, b->clusters << s->cluster_bits);
    if (!r && !PLANTED(REBUILD_NAMED_EARLY))
        r = repair_barrier_co(s);
    return r;
}

/* The header has named it; memory follows. */
static void put_in_force(struct rebuild *b, uint64_t *dirty) {
    struct qcow2 *s = b->s;
    free(s->reftable);
    free(s->reftable_dirty);
    free(s->reftable_problem);
    s->reftable = b->table;
    s->reftable_dirty = dirty;
    s->reftable_problem = NULL;
    s->reftable_entries = (uint32_t)b->entries;
    s->reftable_dirty_count = 0;
    s->h.refcount_table_offset = (b->first + b->blocks) << s->cluster_bits;
    s->h.refcount_table_clusters = (uint32_t)b->clusters;
    b->table = NULL;
}

static int rebuild_co(struct rebuild *b, uint8_t *buf) {
    struct qcow2 *s = b->s;
    int r = plan(b);
    if (r)
        return r;
    b->table = calloc(b->entries, 8);
    AUTO_FREE uint64_t *dirty = calloc(div_up(b->entries, 64), 8);
    if (!b->table || !dirty)
        return -ENOMEM;
    uint64_t host = (b->first + b->blocks) << s->cluster_bits;
    if (PLANTED(REBUILD_NAMED_EARLY))
        r = qcow2_reftable_name_co(s, host, b->clusters);
    if (!r)
        r = write_all_co(b, buf);
    if (!r)
        r = qcow2_reftable_name_co(s, host, b->clusters);
    if (!r)
        put_in_force(b, steal(&dirty));
    return r;
}

int repair_rebuild_co(struct repair *p, uint64_t extra, uint64_t extra_n) {
    struct check_result quiet = {0};
    struct rebuild *b = calloc(1, sizeof(*b));
    if (!b)
        return -ENOMEM;
    *b = (struct rebuild){.s = p->s, .extra = extra, .extra_n = extra_n};
    b->c = (struct check){.s = p->s, .r = &quiet, .without_refs = true, .unbounded = true};
    int r = check_pass_co(&b->c, NULL);
    if (!r)
        r = rebuild_co(b, p->buf);
    check_end(&b->c);
    free(b->table);
    free(b);
    return r;
}
