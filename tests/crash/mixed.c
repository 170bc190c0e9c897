/* SPDX-License-Identifier: MIT */
/*
 * Everything at once: dirty bitmaps and internal snapshots over subclusters, with options that are
 * changed and sizes, so that their write orders meet: one's tables in clusters that the other gave
 * back, and a snapshot applied under a bitmap, which must know of all that changed by it.
 *
 * The operations and judges are those of bitmap.c and snapshot.c.
 */
#include "workloads.h"

/* One of a table, by its share. */
static void any_of(struct lab *l, const struct lab_op *ops) {
    unsigned total = 0, pick;
    for (const struct lab_op *o = ops; o->name; o++)
        total += o->share;
    pick = lab_rnd(l, total);
    for (; pick >= ops->share; ops++)
        pick -= ops->share;
    ops->run_co(l);
}

static void bitmaps(struct lab *l) {
    any_of(l, bitmap_ops);
}
static void snapshots(struct lab *l) {
    any_of(l, snapshot_ops);
}

static void change_width(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    struct amend_ctx ctx = {0};
    json_t *o = json_pack("{s:i}", "refcount_bits", 8 << lab_rnd(l, 4));
    lab_must(disk_amend_co(l->disk, o, &ctx, &e), &e, "amend");
    json_decref(o);
    lab_must(disk_flush_co(l->disk), NULL, "flush");
}

static int judge_both_co(struct lab_state *st) {
    int r = judge_bitmaps_co(st);
    return r ? r : judge_snapshots_co(st);
}

static const struct lab_op ops[] = {{"bitmaps", 8, true, bitmaps},
                                    {"snapshots", 7, true, snapshots},
                                    {"width", 1, true, change_width},
                                    {NULL}};

#define MIXED                                                                                      \
    .requests = 40, .flush = 8, .fua = 3, .zero = 8, .discard = 8, .coded = 5, .ops = ops,         \
    .judge_co = judge_both_co, .finish_co = bitmap_store_all, .free = bitmap_free_own

const struct workload mixed_workloads[] = {
    {.name = "mixed-extended",
     .options = "cluster_size=16k,extended_l2=on",
     .size = 2 * MIB,
     .max_blocks = 60,
     .span = MIB,
     .plants = "BITMAP_MISSES_WRITES",
     MIXED},
    {.name = "mixed-512",
     .options = "cluster_size=512",
     .size = MIB,
     .max_blocks = 16,
     .span = 256 * KIB,
     MIXED},
    {0},
};
