/* SPDX-License-Identifier: MIT */
/* Workloads of options that are changed while the disk is in use: nothing that the guest sees. */
#include <stdlib.h>

#include "workloads.h"

static void amend(struct lab *l, json_t *options, unsigned flags) {
    struct err e AUTO_ERR = ERR_INIT;
    struct amend_ctx ctx = {.flags = flags};
    lab_must(disk_amend_co(l->disk, options, &ctx, &e), &e, "amend");
    json_decref(options);
    lab_must(disk_flush_co(l->disk), NULL, "flush");
}

static void change_width(struct lab *l) {
    amend(l, json_pack("{s:i}", "refcount_bits", 1 << lab_rnd(l, 7)), 0);
}

static void change_version(struct lab *l) {
    amend(l, json_pack("{s:s}", "compat", lab_rnd(l, 2) ? "0.10" : "1.1"), 0);
}

static const struct lab_op widths[] = {{"width", 2, true, change_width}, {NULL}};
static const struct lab_op versions[] = {{"version", 3, true, change_version}, {NULL}};

const struct workload amend_workloads[] = {
    {.name = "amend-width",
     .options = "cluster_size=512",
     .size = MIB,
     .requests = 50,
     .flush = 12,
     .fua = 3,
     .zero = 8,
     .discard = 8,
     .max_blocks = 12,
     .span = 256 * KIB,
     .ops = widths,
     .plants = "COUNTS_NAMED_EARLY"},
    {.name = "amend-version",
     .options = "cluster_size=4k",
     .size = 2 * MIB,
     .requests = 50,
     .flush = 12,
     .fua = 3,
     .zero = 20,
     .discard = 15,
     .coded = 5,
     .max_blocks = 40,
     .span = 512 * KIB,
     .ops = versions,
     .plants = "DOWNGRADE_BEFORE_ZEROS"},
    {0},
};
