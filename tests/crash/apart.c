/* SPDX-License-Identifier: MIT */
/*
 * Workloads of subclusters, and of data in a file of their own, which lies on lab:3.
 *
 * What an image names is a plain path and could not lead to a recorded disk.  So the image is made
 * empty and without a data file, its header's bit is set by hand, and every open names the file. It
 * is filled once, so that a raw one is mapped whole; in each state a raw one alone must read as the
 * guest does.
 */
#include <stdlib.h>
#include <string.h>

#include "format/qcow2/qcow2.h"
#include "workloads.h"

#define DATA 3

static bool is_raw(const struct lab *l) {
    return strstr(l->w->name, "-raw");
}

static void open_apart(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    struct create_ctx ctx = {.name = "lab:0"};
    struct node *file;
    json_t *options = json_object();
    lab_must(opt_parse_keyval(l->w->options, NULL, &options, &e), &e, "options");
    json_object_set_new(options, "size", json_integer((json_int_t)l->w->size));
    lab_must(storage_create_co(&ctx, &file, &e), &e, "lab:0");
    lab_must(format_create_co(file, &driver_qcow2, options, &e), &e, "lab:0");
    lab_must(disk_flush_co(file), NULL, "flushing a new image");
    node_unref_co(file);
    json_decref(options);
    machine_disk(0)->bytes[79] |= QCOW2_INCOMPAT_DATA_FILE;
    machine_disk(0)->bytes[95] |= is_raw(l) ? QCOW2_AUTOCLEAR_DATA_FILE_RAW : 0;
    machine_disk(DATA)->size = is_raw(l) ? l->w->size : 0;
    lab_must(
        lab_open_co(0, "qcow2", json_pack("{s:s}", "data-file", "lab:3"), OPEN_RW, &l->disk, &e),
        &e, "opening");
    if (is_raw(l))
        lab_fill_co(l, l->disk);
}

static int judge_raw_co(struct lab_state *st) {
    const struct lab_disk *d = machine_disk(DATA);
    for (uint64_t b = 0; b < st->blocks; b++) {
        uint8_t want[BLOCK];
        block_fill(want, st->ids[b]);
        if (memcmp(want, d->bytes + b * BLOCK, BLOCK))
            return state_fail(st, "block %llu of the raw data file is not what the guest reads",
                              (unsigned long long)b);
    }
    return 0;
}

const struct workload apart_workloads[] = {
    {"subclusters-512", "cluster_size=16k,extended_l2=on", 2 * MIB, 80, 12, 3, 12, 12, 8, 0, 12,
     128 * KIB},
    {"subclusters-over-a-layer",
     "cluster_size=64k,extended_l2=on,backing_file=lab:1,backing_fmt=raw", 2 * MIB, 80, 12, 3, 12,
     12, 0, 3, 20, 256 * KIB, .below = {{"raw", "", 2 * MIB, .filled = true, .no_check = true}},
     .plants = "SUBCLUSTERS_ALL_NAMED"},
    {.name = "data-file",
     .options = "cluster_size=4k",
     .size = 1700 * KIB,
     .requests = 80,
     .flush = 12,
     .fua = 3,
     .zero = 12,
     .discard = 12,
     .grow = 3,
     .max_blocks = 24,
     .open_options = "data-file=lab:3",
     .open_co = open_apart,
     .plants = "DATA_FILE_AFTER_TABLES DATA_FILE_NOT_FLUSHED"},
    {.name = "data-file-subclusters",
     .options = "cluster_size=16k,extended_l2=on",
     .size = 2 * MIB,
     .requests = 70,
     .flush = 12,
     .fua = 3,
     .zero = 12,
     .discard = 12,
     .max_blocks = 24,
     .span = 256 * KIB,
     .open_options = "data-file=lab:3",
     .open_co = open_apart},
    {.name = "data-file-raw",
     .options = "cluster_size=4k",
     .size = 1700 * KIB,
     .requests = 70,
     .flush = 12,
     .fua = 3,
     .zero = 15,
     .discard = 10,
     .grow = 3,
     .max_blocks = 24,
     .open_options = "data-file=lab:3",
     .open_co = open_apart,
     .judge_co = judge_raw_co},
    {0},
};
