/* SPDX-License-Identifier: MIT */
/*
 * Where the parts of a new image lie; pure arithmetic, shared by creation and `measure`.
 *
 *      | header | refcount table | refcount blocks | L1 table | L2 tables | data |
 *        1        reftable_        refblocks         l1_        l2_tables   data_clusters
 *                 clusters                           clusters
 *
 * in clusters, without gaps.  An image that is not preallocated ends with the bytes of its L1
 * table (no L2 tables, no data).  With default options that puts the header in cluster 0, the
 * refcount table in 1, a refcount block in 2 and the L1 table in 3, where qemu-img has them too.
 */
#ifndef STRATA_FORMAT_QCOW2_LAYOUT_H
#define STRATA_FORMAT_QCOW2_LAYOUT_H

#include <stdbool.h>
#include <stdint.h>

struct err;
struct qcow2_create_opts;

struct qcow2_layout {
    uint32_t cluster_bits, refcount_order;
    bool extended_l2;
    uint64_t l1_entries, l1_clusters;
    uint64_t l2_tables, l2_entries; /* 0 unless preallocated */
    uint64_t data_clusters;         /* in this file: l2_entries, or 0 where the data lie apart */
    uint64_t refblocks, reftable_clusters;
    uint64_t total_clusters;
    uint64_t file_length; /* bytes */
};

/* What is there from the start. */
enum qcow2_layout_room {
    QCOW2_LAYOUT_EMPTY,  /* no L2 table */
    QCOW2_LAYOUT_ALL,    /* all L2 tables and data clusters */
    QCOW2_LAYOUT_TABLES, /* all L2 tables; the data lie in another file */
};

/*
 * Lays out an image of `size` bytes.
 * -EFBIG when a table exceeds its limit; the text gives the largest size that fits.
 */
int qcow2_layout_compute(uint32_t cluster_bits, uint32_t refcount_order, bool extended_l2,
                         uint64_t size, enum qcow2_layout_room room, struct qcow2_layout *l,
                         struct err *e);

/*
 * A larger refcount table for an image whose blocks [0, first_block) exist, with at least `wanted`
 * entries where there are `entries`: how large, and how many blocks it brings along, which count
 * themselves and it.  False: above the limit.
 */
struct qcow2_table_plan {
    uint64_t entries, clusters, blocks;
};
bool qcow2_table_plan(uint32_t cluster_bits, uint32_t refcount_order, uint64_t first_block,
                      uint64_t entries, uint64_t wanted, struct qcow2_table_plan *t);
/* Blocks needed to count themselves and `clusters` more. */
uint64_t qcow2_blocks_for(uint32_t block_bits, uint64_t clusters);

/* create.c: options that contradict one another (-EINVAL) or ask for what is not there yet
 * (-ENOTSUP). */
int qcow2_create_check(const struct qcow2_create_opts *o, struct err *e);

static inline uint64_t qcow2_layout_reftable(const struct qcow2_layout *l) {
    return (uint64_t)1 << l->cluster_bits;
}
static inline uint64_t qcow2_layout_refblocks(const struct qcow2_layout *l) {
    return (1 + l->reftable_clusters) << l->cluster_bits;
}
static inline uint64_t qcow2_layout_l1(const struct qcow2_layout *l) {
    return (1 + l->reftable_clusters + l->refblocks) << l->cluster_bits;
}
static inline uint64_t qcow2_layout_l2(const struct qcow2_layout *l) {
    return qcow2_layout_l1(l) + (l->l1_clusters << l->cluster_bits);
}
static inline uint64_t qcow2_layout_data(const struct qcow2_layout *l) {
    return qcow2_layout_l2(l) + (l->l2_tables << l->cluster_bits);
}

#endif
