/* SPDX-License-Identifier: MIT */
/* Workloads of guests' requests alone, over every geometry; the last one is chosen by the seed. */
#include <stdio.h>

#include "workloads.h"

static void vary_all(struct lab *l, struct workload *w) {
    static const char *const more[] = {"", ",compat=0.10", ",compression_type=zstd"};
    unsigned bits = 9 + lab_rnd(l, 8), order = lab_rnd(l, 7), kind = lab_rnd(l, 3);
    unsigned unit = (1u << bits) / BLOCK;
    if (kind == 1)
        order = 4; /* version 2 has no other width */
    snprintf(l->text, sizeof(l->text), "cluster_size=%u,refcount_bits=%u%s", 1u << bits,
             1u << order, more[kind]);
    w->options = l->text;
    w->size = bits < 11 ? (1 + lab_rnd(l, 2)) * MIB : (2 + lab_rnd(l, 3)) * MIB;
    w->size -= lab_rnd(l, 200) * BLOCK;
    w->requests = 40 + lab_rnd(l, 50);
    w->flush = 3 + lab_rnd(l, 15);
    w->fua = lab_rnd(l, 8);
    w->zero = lab_rnd(l, 20);
    w->discard = lab_rnd(l, 25);
    w->coded = lab_rnd(l, 30);
    w->max_blocks = 1 + lab_rnd(l, unit * 3 + 8);
    w->span = lab_rnd(l, 2) ? (64 + lab_rnd(l, 512)) * KIB : 0;
    w->drift = w->span && lab_rnd(l, 2);
}

const struct workload write_workloads[] = {
    {"alloc-64k", "cluster_size=64k", 4 * MIB, 60, 12, 3, 0, 0, 0, 0, 200, 0,
     .plants = "TABLE_NOT_ZEROED"},
    {"alloc-4k", "cluster_size=4k", 2 * MIB, 80, 12, 3, 0, 0, 0, 0, 40, 0,
     .plants =
         "PUBLISH_BEFORE_DATA FUA_WITHOUT_MAPPING NO_BARRIER_BEFORE_TABLES NO_LAST_BARRIER REFCOUNTS_LAST FLUSH_FORGETS_L1 FROZEN_SLICE_CHANGES"},
    {"alloc-512", "cluster_size=512", MIB, 80, 12, 3, 0, 0, 0, 0, 12, 0,
     .plants = "NO_BARRIER_AFTER_REFTABLE"},
    {"overwrite", "cluster_size=4k", 2 * MIB, 90, 15, 5, 0, 0, 0, 0, 16, 64 * KIB},
    {"zero-discard", "cluster_size=4k", 2 * MIB, 90, 12, 3, 20, 20, 0, 0, 40, 256 * KIB,
     .plants = "EDGES_NOT_COPIED FREE_BEFORE_UNLINK"},
    {"zero-discard-v2", "cluster_size=4k,compat=0.10", 2 * MIB, 90, 12, 3, 20, 20, 0, 0, 40,
     256 * KIB},
    {"coded", "cluster_size=4k", 2 * MIB, 90, 12, 3, 5, 5, 40, 0, 24, 256 * KIB,
     .plants = "CODED_FREED_WITH_NEIGHBOUR PUNCH_AFTER_FREE"},
    {"coded-zstd-64k", "cluster_size=64k,compression_type=zstd", 4 * MIB, 50, 12, 3, 5, 5, 40, 0,
     150, MIB},
    {"refcount-1", "cluster_size=4k,refcount_bits=1", 2 * MIB, 80, 12, 3, 10, 15, 20, 0, 40,
     256 * KIB},
    {"refcount-64", "cluster_size=512,refcount_bits=64", MIB, 80, 12, 3, 10, 15, 10, 0, 12,
     128 * KIB},
    {"churn-512", "cluster_size=512", 2 * MIB, 120, 12, 3, 8, 30, 0, 0, 60, 128 * KIB, true},
    {"table-growth", "cluster_size=512,refcount_bits=64", 4 * MIB, 60, 12, 3, 3, 3, 0, 0, 300, 0,
     .plants = "REFTABLE_NAMED_EARLY"},
    {"random", "", MIB, .max_blocks = 1, .vary = vary_all},
    {0},
};
