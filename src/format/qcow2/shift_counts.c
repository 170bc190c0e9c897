/* SPDX-License-Identifier: MIT */
/*
 * A shift's reference counts: stored + come - go, for every cluster.  See shift.h.
 *
 * Two passes over the refcount blocks.  The first (shift_count_co) only looks: is every sum
 * possible, which counts become one, where is room.  The second (shift_write_counts_co) runs when
 * all room has been taken and writes the new blocks.
 *
 * 64 counts are done at a time.  Mostly they are all equal and all change alike: then one number
 * stands for them.
 *
 * A block that would count nothing is left out of the new table.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/plant.h"
#include "disk/io.h"
#include "format/qcow2/shift.h"

#define GROUP 64

/* Free runs shorter than this much are left to single clusters of data. */
#define RUN_BYTES_MIN MIB
#define RUN_CLUSTERS_MIN ((uint64_t)16)
#define RUNS_MAX ((size_t)1 << 16)

/* A pass. */
struct pass {
    struct shift *t;
    bool look;          /* the first pass */
    uint64_t free_from; /* start of the free run that is growing; UINT64_MAX: none */
    uint64_t run_min;
};

/* ---------------------------------------------------------------- what is noticed on the way */

static int sum_error(struct shift *t, uint64_t cluster, uint64_t old, uint64_t come, uint64_t go) {
    uint64_t offset = cluster << t->s->cluster_bits;
    if (old && come > go && t->s->refcount_max - old < come - go) {
        err_set(t->e, EOVERFLOW,
                "the cluster at offset %" PRIu64 " would have %" PRIu64
                " users, and the image's reference counts have %u bit%s",
                offset, old + come - go, 1u << t->s->refcount_order,
                t->s->refcount_order ? "s" : "");
        err_hint(t->e, "a copy made with a larger refcount_bits can have snapshots");
        return -EOVERFLOW;
    }
    err_set(t->e, EIO,
            "the cluster at offset %" PRIu64 " has a reference count of %" PRIu64
            ", which is not that of its users",
            offset, old);
    err_hint(t->e, "the image is damaged: 'strata check' tells how");
    return -EIO;
}

/* A count and what it becomes; `fresh`: names of rooms taken may come to free clusters. */
static int sum(struct pass *p, uint64_t cluster, uint64_t old, uint64_t come, uint64_t go,
               uint64_t *out) {
    uint64_t v;
    bool ok = ck_add(old, come, &v) && ck_sub(v, go, &v) && v <= p->t->s->refcount_max;
    if (!ok || (p->look && !old && (come || go)))
        return sum_error(p->t, cluster, old, come, go);
    *out = v;
    return 0;
}

/* Only a cluster in use ends a run: what is free up to the end begins at t->end. */
static int free_run_ends(struct pass *p, uint64_t cluster) {
    uint64_t from = p->free_from;
    p->free_from = UINT64_MAX;
    if (from == UINT64_MAX || cluster - from < p->run_min || p->t->free.count >= RUNS_MAX)
        return 0;
    return shift_runs_add(&p->t->free, from, cluster - from);
}

static void mark_once(struct shift *t, uint64_t cluster, uint64_t bits) {
    if (cluster < t->file_clusters)
        t->once[cluster / 64] = bits;
}

static void mark_needed(struct shift *t, uint64_t cluster) {
    uint64_t bi = cluster >> t->s->block_bits;
    t->needed[bi / 64] |= (uint64_t)1 << bi % 64;
}

/* One count, looked at. */
static int notice(struct pass *p, uint64_t cluster, uint64_t n, uint64_t old, uint64_t now) {
    struct shift *t = p->t;
    int r = 0;
    if (!p->look) {
        if (old && !now && t->freed.count < RUNS_MAX)
            r = shift_runs_add(&t->freed, cluster, n);
        return r;
    }
    if (old || now) {
        r = free_run_ends(p, cluster);
        t->end = max_u64(t->end, cluster + n);
    } else if (p->free_from == UINT64_MAX) {
        p->free_from = cluster;
    }
    if (now)
        mark_needed(t, cluster);
    return r;
}

/* ---------------------------------------------------------------- groups of 64 counts */

/* All of the group's counts are equal. */
static bool group_uniform(const uint8_t *p, uint32_t order) {
    uint32_t bytes = (GROUP << order) / 8, width = order < 3 ? 1 : (1u << order) / 8;
    if (memcmp(p, p + width, bytes - width))
        return false;
    if (order >= 3)
        return true;
    uint64_t first = qcow2_refcount_get(p, 0, order);
    for (uint32_t i = 1; i < 8u >> order; i++)
        if (qcow2_refcount_get(p, i, order) != first)
            return false;
    return true;
}

static void group_fill(uint8_t *p, uint32_t order, uint64_t value) {
    uint32_t bytes = (GROUP << order) / 8, first = order < 3 ? 1 : (1u << order) / 8;
    for (uint32_t i = 0; i < (order < 3 ? 8u >> order : 1); i++)
        qcow2_refcount_set(p, i, order, value);
    for (uint32_t n = first; n < bytes; n *= 2)
        memcpy(p + n, p, n);
}

static int group_slow(struct pass *p, uint8_t *data, uint64_t cluster) {
    struct shift *t = p->t;
    uint32_t order = t->s->refcount_order;
    uint64_t once = 0, come_bits, go_bits;
    bool come_small = counts_word(&t->come, cluster, &come_bits);
    bool go_small = counts_word(&t->go, cluster, &go_bits);
    int r = 0;
    for (uint32_t i = 0; !r && i < GROUP; i++) {
        uint64_t old = qcow2_refcount_get(data, i, order), now;
        uint64_t come = come_small ? come_bits >> i & 1 : counts_get(&t->come, cluster + i);
        uint64_t go = go_small ? go_bits >> i & 1 : counts_get(&t->go, cluster + i);
        r = sum(p, cluster + i, old, come, go, &now);
        if (!r)
            r = notice(p, cluster + i, 1, old, now);
        if (r < 0)
            return r;
        once |= (uint64_t)(now == 1) << i;
        if (now != old && !p->look)
            qcow2_refcount_set(data, i, order, now);
    }
    if (p->look)
        mark_once(t, cluster, once);
    return r;
}

static int group(struct pass *p, uint8_t *data, uint64_t cluster) {
    struct shift *t = p->t;
    uint32_t order = t->s->refcount_order;
    uint64_t come, go, now;
    if (!counts_word(&t->come, cluster, &come) || !counts_word(&t->go, cluster, &go) ||
        (come && ~come) || (go && ~go) || !group_uniform(data, order))
        return group_slow(p, data, cluster);
    uint64_t old = qcow2_refcount_get(data, 0, order);
    int r = sum(p, cluster, old, come & 1, go & 1, &now);
    if (!r)
        r = notice(p, cluster, GROUP, old, now);
    if (r < 0)
        return r;
    if (p->look)
        mark_once(t, cluster, now == 1 ? UINT64_MAX : 0);
    else if (now != old)
        group_fill(data, order, now);
    return 0;
}

/* `bytes` of counts that begin with that of `cluster`. */
static int groups(struct pass *p, uint8_t *data, uint64_t bytes, uint64_t cluster) {
    uint32_t group_bytes = (GROUP << p->t->s->refcount_order) / 8;
    int r = 0;
    for (uint64_t at = 0; !r && at < bytes; at += group_bytes, cluster += GROUP)
        r = group(p, data + at, cluster);
    return r;
}

/* ---------------------------------------------------------------- reading blocks in rows */

static uint64_t old_block(const struct shift *t, uint64_t bi) {
    return bi < t->s->reftable_entries ? t->s->reftable[bi] & QCOW2_REFTABLE_MASK : 0;
}

static int check_block(struct shift *t, uint64_t bi) {
    const struct qcow2 *s = t->s;
    uint64_t host = old_block(t, bi);
    if (is_aligned(host, s->cluster_size) && host >> s->cluster_bits < t->file_clusters &&
        (bi + 1) << s->block_bits <= COUNTS_CLUSTERS_MAX)
        return 0;
    err_set(t->e, EIO,
            "refcount table entry %" PRIu64 ": 0x%" PRIx64
            " is not the offset of a block that counts clusters of this file",
            bi, s->reftable[bi]);
    err_hint(t->e, "the image is damaged: 'strata check' tells how");
    return -EIO;
}

/* Old blocks [bi, bi + n) into t->in; zeros where there is none. */
static int read_blocks_co(struct shift *t, uint64_t bi, uint32_t n) {
    struct qcow2 *s = t->s;
    int r = 0;
    for (uint32_t i = 0; !r && i < n;) {
        uint64_t first = old_block(t, bi + i);
        uint8_t *to = t->in + ((size_t)i << s->cluster_bits);
        uint32_t k = 1;
        while (first && i + k < n &&
               old_block(t, bi + i + k) == first + ((uint64_t)k << s->cluster_bits))
            k++;
        if (!first)
            memset(to, 0, s->cluster_size);
        else if ((r = disk_pread_co(s->file, first, to, (size_t)k << s->cluster_bits)) < 0)
            return err_errno(t->e, -r, "reading the refcount block at %" PRIu64, first);
        i += k;
    }
    return r;
}

/* ---------------------------------------------------------------- first pass */

/* Blocks are looked at in rows; a cluster without a block cannot have a name. */
static int look_co(struct pass *p, uint64_t bi, uint32_t n) {
    struct shift *t = p->t;
    int r = read_blocks_co(t, bi, n);
    return r ? r : groups(p, t->in, (uint64_t)n << t->s->cluster_bits, bi << t->s->block_bits);
}

/* Names of clusters that no block counts. */
static int check_uncounted(struct pass *p, uint64_t bi) {
    struct shift *t = p->t;
    uint64_t first = bi << t->s->block_bits, now;
    uint64_t n = min_u64((uint64_t)1 << t->s->block_bits, t->file_clusters - first);
    int r = 0;
    if (counts_all_zero(&t->come, first, n) && counts_all_zero(&t->go, first, n))
        return 0;
    for (uint64_t c = first; !r && c < first + n; c++)
        r = sum(p, c, 0, counts_get(&t->come, c), counts_get(&t->go, c), &now);
    return r;
}

int shift_count_co(struct shift *t) {
    struct qcow2 *s = t->s;
    struct pass p = {.t = t, .look = true, .free_from = UINT64_MAX};
    uint64_t blocks =
        max_u64(s->reftable_entries, div_up(t->file_clusters, (uint64_t)1 << s->block_bits));
    uint32_t max = SHIFT_BUF_BYTES >> s->cluster_bits;
    p.run_min = min_u64(RUN_CLUSTERS_MIN, max_u64(1, RUN_BYTES_MIN >> s->cluster_bits));
    t->needed = calloc(div_up(blocks, 64) + 1, 8);
    if (!t->needed)
        return err_set(t->e, ENOMEM, "no memory for the refcount table");
    int r = 0;
    for (uint64_t bi = 0; !r && bi < blocks;) {
        uint32_t n = 0;
        while (n < max && bi + n < blocks && old_block(t, bi + n) && !r) {
            r = check_block(t, bi + n);
            n++;
        }
        if (!r && n)
            r = look_co(&p, bi, n);
        else if (!r && (bi << s->block_bits) < t->file_clusters)
            r = check_uncounted(&p, bi);
        if (!n) /* what no block counts would need a block first */
            p.free_from = UINT64_MAX;
        bi += n ? n : 1;
    }
    return r == -ENOMEM && !t->e->code ? err_set(t->e, ENOMEM, "no memory for free clusters") : r;
}

/* ---------------------------------------------------------------- second pass */

static int no_memory(struct shift *t) {
    return err_set(t->e, ENOMEM, "no memory for the new refcount table");
}

/* Blocks of everything that is in use or has been taken by now. */
static uint64_t blocks_used(const struct shift *t) {
    return div_up(t->end, (uint64_t)1 << t->s->block_bits);
}

/* The new table's length: it must hold the blocks that it and they themselves make needed. */
static uint64_t plan_table(const struct shift *t) {
    const struct qcow2 *s = t->s;
    uint64_t per_cluster = s->cluster_size / 8, clusters = s->h.refcount_table_clusters;
    uint64_t worst = t->end + blocks_used(t) + 2;
    for (;;) {
        uint64_t blocks = div_up(worst + clusters, (uint64_t)1 << s->block_bits) + 2;
        uint64_t wanted = div_up(blocks, per_cluster);
        if (wanted <= clusters)
            return clusters;
        clusters = wanted;
    }
}

static bool is_needed(const struct shift *t, uint64_t bi) {
    return t->needed[bi / 64] >> bi % 64 & 1;
}

/* Marks the blocks that count the rooms taken; false: one lies behind the table. */
static bool need_for_rooms(struct shift *t) {
    for (size_t i = 0; i < t->fresh.count; i++) {
        const struct shift_run *run = &t->fresh.v[i];
        uint64_t last = (run->cluster + run->count - 1) >> t->s->block_bits;
        if (last >= t->reftable_entries)
            return false;
        for (uint64_t bi = run->cluster >> t->s->block_bits; bi <= last; bi++)
            t->needed[bi / 64] |= (uint64_t)1 << bi % 64;
    }
    return true;
}

/* Room for every block that is needed, those for the blocks themselves included. */
static int place_blocks(struct shift *t) {
    for (uint64_t bi = 0; PLANTED(SHIFT_COUNTS_IN_PLACE) && bi < t->s->reftable_entries; bi++)
        t->reftable[bi] = old_block(t, bi);
    for (bool more = true; more;) {
        uint64_t wanted = 0;
        if (!need_for_rooms(t))
            return err_set(t->e, EFBIG, "the new refcount table is too short for its own blocks");
        for (uint64_t bi = 0; bi < t->reftable_entries; bi++)
            wanted += is_needed(t, bi) && !t->reftable[bi];
        more = wanted;
        uint64_t cluster = 0, got = 0;
        for (uint64_t bi = 0; wanted && bi < t->reftable_entries; bi++) {
            if (!is_needed(t, bi) || t->reftable[bi])
                continue;
            int r = got ? 0 : shift_room_some(t, wanted, 1, &cluster, &got);
            if (r < 0)
                return r;
            t->reftable[bi] = cluster++ << t->s->cluster_bits;
            got--;
            wanted--;
        }
    }
    return 0;
}

static int make_table(struct shift *t) {
    struct qcow2 *s = t->s;
    uint64_t clusters = plan_table(t), words;
    if (clusters << s->cluster_bits > QCOW2_REFTABLE_BYTES_MAX)
        return err_set(t->e, EFBIG, "the refcount table would exceed its limit of %d bytes",
                       QCOW2_REFTABLE_BYTES_MAX);
    int r = shift_room(t, clusters << s->cluster_bits, &t->next.reftable_offset);
    if (r < 0)
        return r;
    t->next.reftable_clusters = (uint32_t)clusters;
    t->reftable_entries = (uint32_t)(clusters << s->cluster_bits >> 3);
    t->reftable = calloc(t->reftable_entries, 8);
    words = div_up(max_u64(s->reftable_entries, blocks_used(t)), 64) + 1;
    uint64_t *needed = calloc(max_u64(words, div_up(t->reftable_entries, 64) + 1), 8);
    if (!t->reftable || !needed) {
        free(needed);
        return no_memory(t);
    }
    memcpy(needed, t->needed, div_up(s->reftable_entries, 64) * 8);
    free(t->needed);
    t->needed = needed;
    return place_blocks(t);
}

/* The old blocks and table lose their names. */
static int drop_old(struct shift *t) {
    struct qcow2 *s = t->s;
    int r = shift_drop(t, s->h.refcount_table_offset,
                       (uint64_t)s->h.refcount_table_clusters << s->cluster_bits);
    for (uint64_t bi = 0; !r && bi < s->reftable_entries; bi++)
        if (old_block(t, bi) && !PLANTED(SHIFT_COUNTS_IN_PLACE))
            r = shift_drop(t, old_block(t, bi), s->cluster_size);
    return r;
}

/* New blocks [bi, bi + n), which lie in one row. */
static int write_blocks_co(struct pass *p, uint64_t bi, uint32_t n) {
    struct shift *t = p->t;
    const struct qcow2 *s = t->s;
    uint64_t bytes = (uint64_t)n << s->cluster_bits, host = t->reftable[bi];
    int r = read_blocks_co(t, bi, n);
    if (!r)
        r = groups(p, t->in, bytes, bi << s->block_bits);
    return r ? r : shift_write_co(t, host, t->in, bytes);
}

int shift_write_counts_co(struct shift *t) {
    struct qcow2 *s = t->s;
    struct pass p = {.t = t, .free_from = UINT64_MAX};
    uint32_t max = SHIFT_BUF_BYTES >> s->cluster_bits;
    int r = make_table(t);
    if (!r)
        r = drop_old(t);
    for (uint64_t bi = 0; !r && bi < t->reftable_entries;) {
        uint32_t n = 0;
        while (n < max && bi + n < t->reftable_entries && is_needed(t, bi + n) &&
               t->reftable[bi + n] == t->reftable[bi] + ((uint64_t)n << s->cluster_bits))
            n++;
        if (n)
            r = write_blocks_co(&p, bi, n);
        bi += n ? n : 1;
    }
    /* A block left out counts nothing now, and what it counted is free. */
    for (uint64_t bi = 0; !r && bi < s->reftable_entries; bi++)
        if (old_block(t, bi) && !is_needed(t, bi))
            r = look_co(&p, bi, 1);
    return r;
}
