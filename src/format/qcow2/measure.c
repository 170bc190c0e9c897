/* SPDX-License-Identifier: MIT */
/*
 * How long the file of a new image gets.
 *
 * Preallocated images are laid out by create.c, all of it (layout.h).  Others begin with what
 * create.c lays out for an empty disk and grow as data is written; the allocator takes the lowest
 * free cluster, so their length depends on how many clusters are written, not on the order, and is
 * found by counting along:
 *
 *      free clusters below the end (an old refcount table's)   are taken first
 *      the end reaches what no refcount block counts           a block is put there (grow.c)
 *      ... and the table has no entry for it                   a larger table with its blocks, and
 *                                                              the old table's clusters are free
 *
 * Steps are refcount blocks, not clusters: a few thousand for a terabyte.  When an image is closed
 * its file ends behind the last cluster in use (open.c).
 *
 * The bounds are those of qemu-img's measure: metadata of the fully allocated image, without gaps.
 */
#include "format/qcow2/qcow2.h"

#include <errno.h>

#include "base/ck.h"
#include "format/qcow2/layout.h"

/* Clusters in the file after `count` have been allocated in the empty image `l`.  -EFBIG. */
static int grown_clusters(const struct qcow2_layout *l, uint64_t count, uint64_t *out) {
    uint32_t block_bits = l->cluster_bits + 3 - l->refcount_order;
    uint64_t end = l->total_clusters, covered = l->refblocks << block_bits, holes = 0;
    uint64_t table_clusters = l->reftable_clusters;
    uint64_t entries = table_clusters << (l->cluster_bits - 3);
    while (count) {
        uint64_t n;
        if (holes) {
            n = min_u64(holes, count);
            holes -= n;
            count -= n;
        } else if (end < covered) {
            n = min_u64(covered - end, count);
            end += n;
            count -= n;
        } else if (covered >> block_bits < entries) {
            end++;
            covered += (uint64_t)1 << block_bits;
        } else {
            struct qcow2_table_plan t;
            uint64_t bi = covered >> block_bits;
            if (!qcow2_table_plan(l->cluster_bits, l->refcount_order, bi, entries, bi + 1, &t))
                return -EFBIG;
            end += t.blocks + t.clusters;
            covered += t.blocks << block_bits;
            holes = table_clusters;
            table_clusters = t.clusters;
            entries = t.entries;
        }
    }
    *out = end;
    return 0;
}

static int grown_length(const struct qcow2_layout *empty, uint64_t count, uint64_t *out,
                        struct err *e) {
    uint64_t clusters;
    *out = empty->file_length;
    if (!count)
        return 0;
    if (grown_clusters(empty, count, &clusters) < 0)
        return err_set(e, EFBIG,
                       "the disk's data need a refcount table above the limit of %d bytes",
                       QCOW2_REFTABLE_BYTES_MAX);
    *out = clusters << empty->cluster_bits;
    return 0;
}

/* Both files together: the data file is as long as the disk, as a raw image is. */
static int measure_apart(const struct qcow2_create_opts *o, const struct measure_in *in,
                         const struct qcow2_layout *empty, struct measure_result *out,
                         struct err *e) {
    uint32_t table_bits = 2 * empty->cluster_bits - qcow2_l2e_shift(o->extended_l2);
    uint64_t size = align_up(in->size, 512);
    struct qcow2_layout full;
    int r = qcow2_layout_compute(empty->cluster_bits, empty->refcount_order, o->extended_l2,
                                 in->size, QCOW2_LAYOUT_TABLES, &full, e);
    out->required = out->fully_allocated = full.file_length;
    if (!r && !o->data_file_raw && o->preallocation == PREALLOC_OFF) {
        r = grown_length(empty, full.l2_tables, &out->fully_allocated, e);
        if (!r)
            r = grown_length(empty, min_u64(in->touched[table_bits], full.l2_tables),
                             &out->required, e);
    }
    out->required += size;
    out->fully_allocated += size;
    return r;
}

int qcow2_measure(const void *create_opts, const struct measure_in *in, struct measure_result *out,
                  struct err *e) {
    const struct qcow2_create_opts *o = create_opts;
    uint32_t bits = (uint32_t)__builtin_ctzll(o->cluster_size);
    uint32_t order = (uint32_t)__builtin_ctzll(o->refcount_bits);
    struct qcow2_layout full, empty;
    int r = qcow2_create_check(o, e);
    if (!r)
        r = qcow2_layout_compute(bits, order, o->extended_l2, in->size, QCOW2_LAYOUT_ALL, &full, e);
    if (!r)
        r = qcow2_layout_compute(bits, order, o->extended_l2, in->size, QCOW2_LAYOUT_EMPTY, &empty,
                                 e);
    if (r)
        return r;
    /* Room given ahead is there from the start. */
    bool room = o->preallocation == PREALLOC_FALLOC || o->preallocation == PREALLOC_FULL;
    uint64_t data = room ? in->size : in->data;
    uint64_t data_clusters = min_u64(div_up(data, o->cluster_size), full.data_clusters);
    out->bound_fully = full.file_length;
    out->bound_required = full.file_length - ((full.data_clusters - data_clusters) << bits);
    out->required = out->fully_allocated = full.file_length;
    if (o->data_file)
        return measure_apart(o, in, &empty, out, e);
    if (o->preallocation != PREALLOC_OFF)
        return 0;
    uint32_t table_bits = 2 * bits - qcow2_l2e_shift(o->extended_l2);
    r = grown_length(&empty, full.data_clusters + full.l2_tables, &out->fully_allocated, e);
    if (!r)
        r = grown_length(&empty,
                         min_u64(in->touched[bits], full.data_clusters) +
                             min_u64(in->touched[table_bits], full.l2_tables),
                         &out->required, e);
    return r;
}
