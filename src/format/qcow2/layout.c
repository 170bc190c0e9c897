/* SPDX-License-Identifier: MIT */
/*
 * See layout.h.  Reference counts count their own blocks and table as well, so their number is the
 * fixed point of a growing sequence; it is reached within a few steps, because each block counts
 * at least 64 clusters.
 *
 * The limits are the reference reader's: 32 MiB of L1 table, 8 MiB of refcount table, host offsets
 * below 2^56.
 */
#include "format/qcow2/layout.h"

#include <errno.h>
#include <inttypes.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "base/size.h"
#include "format/qcow2/entry.h"
#include "format/qcow2/header.h"

static void add_refcounts(struct qcow2_layout *l) {
    uint64_t counted = 1 + l->l1_clusters + l->l2_tables + l->data_clusters;
    uint64_t per_block = (uint64_t)1 << (l->cluster_bits + 3 - l->refcount_order);
    uint64_t per_table_cluster = (uint64_t)1 << (l->cluster_bits - 3);
    uint64_t before;
    l->refblocks = l->reftable_clusters = 1;
    l->total_clusters = counted + 2;
    do {
        before = l->total_clusters;
        l->refblocks = div_up(before, per_block);
        l->reftable_clusters = div_up(l->refblocks, per_table_cluster);
        l->total_clusters = counted + l->refblocks + l->reftable_clusters;
    } while (l->total_clusters != before);
}

static bool fits(const struct qcow2_layout *l) {
    return l->reftable_clusters << l->cluster_bits <= QCOW2_REFTABLE_BYTES_MAX &&
           l->total_clusters <= QCOW2_HOST_LIMIT >> l->cluster_bits;
}

static void lay_out(struct qcow2_layout *l, uint64_t size, enum qcow2_layout_room room) {
    uint64_t cluster = (uint64_t)1 << l->cluster_bits;
    l->l1_entries = qcow2_l1_entries_for(l->cluster_bits, l->extended_l2, size);
    l->l1_clusters = div_up(l->l1_entries * 8, cluster);
    l->l2_tables = room ? l->l1_entries : 0;
    l->l2_entries = room ? div_up(size, cluster) : 0;
    l->data_clusters = room == QCOW2_LAYOUT_ALL ? l->l2_entries : 0;
    add_refcounts(l);
    l->file_length =
        room ? l->total_clusters << l->cluster_bits : qcow2_layout_l1(l) + l->l1_entries * 8;
}

/* The largest size, in whole L2 tables, that can be preallocated.  Sizes that fit are an initial
 * segment, so halving finds the end. */
static uint64_t largest_preallocated(const struct qcow2_layout *like, uint64_t l1_max,
                                     enum qcow2_layout_room room) {
    uint32_t shift = 2 * like->cluster_bits - qcow2_l2e_shift(like->extended_l2);
    uint64_t low = 0, high = l1_max;
    while (low < high) {
        struct qcow2_layout l = *like;
        uint64_t mid = high - (high - low) / 2;
        lay_out(&l, mid << shift, room);
        if (fits(&l))
            low = mid;
        else
            high = mid - 1;
    }
    return low << shift;
}

int qcow2_layout_compute(uint32_t cluster_bits, uint32_t refcount_order, bool extended_l2,
                         uint64_t size, enum qcow2_layout_room room, struct qcow2_layout *l,
                         struct err *e) {
    char found[32], limit[32];
    *l = (struct qcow2_layout){
        .cluster_bits = cluster_bits, .refcount_order = refcount_order, .extended_l2 = extended_l2};
    uint64_t l1_max = QCOW2_L1_BYTES_MAX / 8;
    uint64_t l1_entries = qcow2_l1_entries_for(cluster_bits, extended_l2, size);
    if (l1_entries > l1_max)
        return err_set(
            e, EFBIG,
            "size %s needs an L1 table of %" PRIu64 " entries, above the limit of %" PRIu64
            ": with clusters of %" PRIu64 " bytes the largest size is %s",
            size_human(size, found), l1_entries, l1_max, (uint64_t)1 << cluster_bits,
            size_human(l1_max << (2 * cluster_bits - qcow2_l2e_shift(extended_l2)), limit));
    lay_out(l, size, room);
    if (!fits(l)) {
        uint64_t most = room ? largest_preallocated(l, l1_max, room) : 0;
        return err_set(e, EFBIG,
                       "size %s needs a refcount table of %" PRIu64
                       " bytes, above the limit of %d: with clusters of %" PRIu64
                       " bytes and %u-bit reference counts the largest preallocated size is %s",
                       size_human(size, found), l->reftable_clusters << cluster_bits,
                       QCOW2_REFTABLE_BYTES_MAX, (uint64_t)1 << cluster_bits, 1u << refcount_order,
                       size_human(most, limit));
    }
    return 0;
}

uint64_t qcow2_blocks_for(uint32_t block_bits, uint64_t clusters) {
    uint64_t blocks = 1;
    while (blocks << block_bits < blocks + clusters)
        blocks++;
    return blocks;
}

bool qcow2_table_plan(uint32_t cluster_bits, uint32_t refcount_order, uint64_t first_block,
                      uint64_t entries, uint64_t wanted, struct qcow2_table_plan *t) {
    uint64_t per_cluster = (uint64_t)1 << (cluster_bits - 3);
    t->entries = max_u64(wanted, entries + entries / 2);
    /* The table must also have entries for the blocks that count it: at most two rounds. */
    for (;;) {
        t->clusters = div_up(t->entries, per_cluster);
        t->entries = t->clusters * per_cluster;
        t->blocks = qcow2_blocks_for(cluster_bits + 3 - refcount_order, t->clusters);
        if (first_block + t->blocks <= t->entries)
            return t->entries * 8 <= QCOW2_REFTABLE_BYTES_MAX;
        t->entries = first_block + t->blocks;
    }
}
