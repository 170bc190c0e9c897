/* SPDX-License-Identifier: MIT */
/* Workloads of guests' requests on the other formats that can be written. */
#include <stdlib.h>
#include <string.h>

#include "disk/node.h"
#include "job/copy.h"
#include "job/rebase.h"
#include "workloads.h"

/* A clean close and another opening, between requests: the log is given up and begun again. */
static void reopen_co(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    lab_must(node_reopen_co(l->disk, false, &e), &e, "to read-only");
    lab_must(node_reopen_co(l->disk, true, &e), &e, "to read-write");
}

static const struct lab_op reopen_ops[] = {{"reopen", 3, true, reopen_co}, {NULL}};

/* Over lab:1 or lab:2, there and back, by names of all lengths; the parents do not change. */
static void relink_co(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    struct rebase_opts opts = {0};
    struct node *base;
    const char *format = l->w->format;
    unsigned to = strstr(l->disk->backing_name, "lab:1") ? 2 : 1;
    char name[3000];
    size_t length = 6 + lab_rnd(l, sizeof(name) - 7);
    memset(name, 'a', length);
    memcpy(name, to == 1 ? "lab:1/" : "lab:2/", 6);
    name[length] = 0;
    lab_must(lab_open_co(to, format, NULL, 0, &base, &e), &e, "the new parent");
    lab_must(rebase_copy_co(l->disk, base, &opts, &e), &e, "rebase");
    lab_must(rebase_switch_co(l->disk, name, format, &e), &e, "rebase");
    node_unref_co(l->disk->backing);
    l->disk->backing = base;
    l->disk->map_generation++;
}

static const struct lab_op relink_ops[] = {{"relink", 3, true, relink_co}, {NULL}};

/* A stream: each grain once, in any order. */
static void stream_setup_co(struct lab *l) {
    l->own = calloc(1, sizeof(unsigned));
}

static void stream_grain_co(struct lab *l) {
    enum { GRAIN = 64 * KIB / BLOCK };
    unsigned *next = l->own, grains = (unsigned)(l->disk->size / BLOCK / GRAIN);
    if (*next < grains)
        lab_write(l, (uint64_t)(*next)++ * 5 % grains * GRAIN, GRAIN, false);
}

static const struct lab_op stream_ops[] = {{"grain", 65, false, stream_grain_co}, {NULL}};

const struct workload format_workloads[] = {
    {"vdi-4k", "block_size=4k", 2 * MIB, 80, 12, 3, 10, 10, 0, 0, 40, 256 * KIB, .format = "vdi",
     .plants = "VDI_COUNT_LAST"},
    {"vdi-1m", "", 4 * MIB, 60, 12, 3, 10, 5, 0, 0, 200, 0, .format = "vdi"},
    {"vdi-grow", "block_size=8k", 3300 * KIB, 70, 12, 3, 5, 10, 0, 5, 24, 0, .format = "vdi"},
    {"qed-4k", "cluster_size=4k,table_size=1", 3 * MIB, 80, 12, 3, 10, 10, 0, 0, 40, 0,
     .format = "qed"},
    {"qed-64k", "", 4 * MIB, 60, 12, 3, 10, 10, 0, 0, 200, 0, .format = "qed"},
    {"qed-grow", "cluster_size=4k,table_size=1", 1600 * KIB, 70, 12, 3, 5, 10, 0, 5, 24, 0,
     .format = "qed", .plants = "TABLE_NAMED_EARLY"},
    {"qed-overlay", "cluster_size=4k,backing_file=lab:1,backing_fmt=raw", 2 * MIB, 80, 12, 3, 10,
     10, 0, 4, 40, 256 * KIB, .format = "qed",
     .below = {{"raw", "", 3 * MIB, .filled = true, .no_check = true}}},
    {"parallels", "cluster_size=4k", 2 * MIB, 80, 12, 3, 10, 10, 0, 0, 40, 256 * KIB,
     .format = "parallels"},
    {"parallels-grow", "cluster_size=8k", 3300 * KIB, 70, 12, 3, 5, 10, 0, 5, 24, 0,
     .format = "parallels"},
    {"qcow", "", 4 * MIB, 70, 12, 3, 10, 10, 15, 0, 40, MIB, .format = "qcow"},
    {"qcow-overlay", "backing_file=lab:1,backing_fmt=raw", 2 * MIB, 80, 12, 3, 10, 10, 10, 0, 24,
     256 * KIB, .format = "qcow", .below = {{"raw", "", MIB, .filled = true, .no_check = true}}},
    {"vpc", "force_size=on", 4 * MIB, 70, 12, 3, 10, 10, 0, 0, 200, 0, .format = "vpc"},
    {"vpc-grow", "force_size=on", 1600 * KIB, 70, 12, 3, 5, 10, 0, 5, 24, 0, .format = "vpc",
     .plants = "TABLE_NAMED_EARLY"},
    {"vmdk", "", 4 * MIB, 70, 12, 3, 10, 10, 0, 0, 40, 256 * KIB, .format = "vmdk"},
    {"vmdk-zeroed", "zeroed_grain=on", 4 * MIB, 70, 12, 3, 10, 10, 0, 0, 200, 0, .format = "vmdk"},
    {"vmdk-overlay", "backing_file=lab:1,backing_fmt=vmdk,zeroed_grain=on", 2 * MIB, 80, 12, 3, 10,
     10, 0, 0, 40, 256 * KIB, .format = "vmdk", .below = {{"vmdk", "", 2 * MIB, .filled = true}}},
    {.name = "vmdk-stream",
     .options = "subformat=streamOptimized",
     .size = 3 * MIB + 64 * KIB,
     .requests = 12,
     .flush = 35,
     .max_blocks = 1,
     .format = "vmdk",
     .ops = stream_ops,
     .setup_co = stream_setup_co,
     .plants = "VMDK_FOOTER_OVERWRITTEN"},
    {"vpc-fixed", "force_size=on,subformat=fixed", 2 * MIB, 80, 12, 3, 10, 10, 0, 0, 40, 0,
     .format = "vpc"},
    {"vpc-overlay", "backing_file=lab:1", 3 * MIB, 70, 12, 3, 10, 10, 0, 0, 60, 0, .format = "vpc",
     .below = {{"vpc", "force_size=on", 3 * MIB, .filled = true}}},
    {"vhdx", "block_size=1M", 4 * MIB, 60, 12, 3, 10, 10, 0, 0, 60, 0, .format = "vhdx",
     .ops = reopen_ops, .plants = "VHDX_LOG_UNNAMED VHDX_NO_LOG"},
    {"vhdx-grow", "block_size=1M,block_state_zero=off", 1600 * KIB, 60, 12, 3, 5, 10, 0, 5, 24, 0,
     .format = "vhdx"},
    {"vhdx-fixed", "block_size=1M,subformat=fixed", 2 * MIB, 60, 12, 3, 10, 10, 0, 0, 40, 0,
     .format = "vhdx", .ops = reopen_ops},
    {"vhdx-overlay", "block_size=1M,backing_file=lab:1", 3 * MIB, 60, 12, 3, 10, 10, 0, 4, 40, 0,
     .format = "vhdx", .below = {{"vhdx", "block_size=1M", 2 * MIB, .filled = true}}},
    {"vhdx-relink", "block_size=1M,backing_file=lab:1", 3 * MIB, 40, 12, 3, 10, 10, 0, 0, 40, 0,
     .format = "vhdx", .ops = relink_ops, .plants = "VHDX_RELINK_IN_PARTS",
     .below = {{"vhdx", "block_size=1M", 2 * MIB, .filled = true},
               {"vhdx", "block_size=2M", 3 * MIB, .filled = true}}},
    {0},
};
