/* SPDX-License-Identifier: MIT */
/*
 * Workloads of internal snapshots: made, applied and deleted between the guests' requests.
 *
 * Each operation ends on stable storage by itself and shows wholly or not at all; every snapshot
 * that a state lists reads as the disk did when it was made.  Some workloads begin with VM state
 * behind the disk or with another disk size; the check that every state passes sees COPIED flags
 * and counts.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/ck.h"
#include "base/cleanup.h"
#include "disk/snapshot.h"
#include "format/qcow2/snapshot.h"
#include "workloads.h"

#define SNAPSHOTS_MAX 4u

static unsigned there(const struct lab *l) {
    unsigned n = 0;
    for (size_t i = 0; i < l->names; i++)
        n += l->name[i].made_end != UINT64_MAX && l->name[i].gone == UINT64_MAX;
    return n;
}

/* The name's id, as a user would look it up. */
static char *id_of(struct lab *l, const char *name) {
    struct err e AUTO_ERR = ERR_INIT;
    AUTO_SNAPSHOTS struct snapshot_list list = {0};
    lab_must(disk_snapshot_list_co(l->disk, &list, &e), &e, "list");
    const struct snapshot_info *x = snapshot_find(&list, NULL, name);
    if (!x)
        lab_must(-1, NULL, "a snapshot is missing");
    return xstrdup(x->id);
}

static void delete_one(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    struct lab_name *s = model_name_any(l);
    if (!s)
        return;
    char *id AUTO_FREE = id_of(l, s->name);
    model_gone_begin(l, s);
    lab_must(disk_snapshot_delete_co(l->disk, id, &e), &e, "delete");
    model_gone_end(l, s);
}

static void create(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    if (there(l) == SNAPSHOTS_MAX || l->names == LAB_NAMES_MAX) {
        delete_one(l);
        return;
    }
    struct lab_name *s = model_name_begin(l);
    struct snapshot_info info = {.name = xstrdup(s->name), .icount = SNAPSHOT_ICOUNT_UNKNOWN};
    lab_must(disk_snapshot_create_co(l->disk, &info, &e), &e, "create");
    snapshot_info_free(&info);
    model_name_end(l, s);
    model_all_settled(l); /* the snapshot holds what the disk does */
}

static void apply(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    struct lab_name *s = model_name_any(l);
    if (!s)
        return;
    char *id AUTO_FREE = id_of(l, s->name);
    model_switch_begin(l, &s->at);
    lab_must(disk_snapshot_apply_co(l->disk, id, &e), &e, "apply");
    model_switch_end(l, true);
}

static void resize(struct lab *l) {
    uint64_t size = l->disk->size, step = (1 + lab_rnd(l, 256)) * BLOCK;
    lab_resize(l, lab_rnd(l, 2) || size < MIB ? min_u64(DISK_MAX, size + step) : size - step,
               PREALLOC_OFF);
}

/* Up to version 3 and down again, among snapshots. */
static void change_version(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    struct amend_ctx ctx = {0};
    json_t *o = json_pack("{s:s}", "compat", qcow2_of(l->disk)->h.version < 3 ? "1.1" : "0.10");
    lab_must(disk_amend_co(l->disk, o, &ctx, &e), &e, "amend");
    json_decref(o);
    lab_must(disk_flush_co(l->disk), NULL, "flush");
}

/*
 * The snapshot table as old programs write it into version 2 images, without extra data: in one
 * sector, where the complete one is.
 */
static void shorten_table(struct qcow2 *s) {
    struct err e AUTO_ERR = ERR_INIT;
    AUTO_QCOW2_SNAPSHOTS struct qcow2_snapshots t = {0};
    uint8_t sector[512] = {0};
    size_t at = 0;
    lab_must(qcow2_snapshots_load_co(s, &t, &e), &e, "snapshots");
    if (!t.count)
        return;
    for (uint32_t i = 0; i < t.count; i++) {
        const struct qcow2_snapshot *x = &t.v[i];
        memcpy(sector + at, x->raw, QCOW2_SNAPSHOT_FIXED);
        be32_store(sector + at + 36, 0);
        memcpy(sector + at + QCOW2_SNAPSHOT_FIXED, x->id, x->id_length + x->name_length);
        at = align_up(at + QCOW2_SNAPSHOT_FIXED + x->id_length + x->name_length, 8);
    }
    lab_must(disk_pwrite_co(s->file, s->h.snapshots_offset, sector, sizeof(sector)), NULL, "write");
    lab_must(disk_flush_co(s->file), NULL, "flush");
}

static void shorten(struct lab *l) {
    if (qcow2_of(l->disk)->h.version < 3)
        shorten_table(qcow2_of(l->disk));
}

/* What it leaves. */
static uint64_t repair(void) {
    struct check_result r = {.fix = CHECK_FIX_LEAKS | CHECK_FIX_ERRORS};
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n;
    lab_must(lab_open_co(0, "qcow2", NULL, OPEN_CHECK | OPEN_RW, &n, &e), &e, "opening to repair");
    lab_must(n->drv->format->check_co(n, &r, &e), &e, "check");
    node_unref_co(n);
    return r.corruptions + r.check_errors;
}

/* In version 3 short entries are damage, which check -r all repairs. */
static void shorten_and_repair(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    lab_must(disk_flush_co(l->disk), NULL, "flush");
    shorten_table(qcow2_of(l->disk));
    node_unref_co(l->disk);
    lab_must(repair() ? -1 : 0, NULL, "what a repair leaves");
    lab_must(lab_open_co(0, "qcow2", NULL, OPEN_RW, &l->disk, &e), &e, "opening the image again");
}

static int repair_state_co(struct lab_state *st) {
    return repair() ? state_fail(st, "a repair leaves damage") : 0;
}

int judge_snapshots_co(struct lab_state *st) {
    struct err e AUTO_ERR = ERR_INIT;
    AUTO_SNAPSHOTS struct snapshot_list list = {0};
    if (disk_snapshot_list_co(st->disk, &list, &e) < 0)
        return state_fail(st, "list: %s", err_text(&e));
    for (size_t i = 0; i < list.count; i++) {
        struct lab_name *s = model_name_listed(st, list.v[i].name);
        json_t *extra = json_pack("{s:{s:s}}", "snapshot", "id", list.v[i].id);
        struct node *n;
        if (!s || state_open_co(st, extra, 0, &n) < 0)
            return -1;
        int r = state_reads_as_co(st, n, &s->at, list.v[i].name);
        node_unref_co(n);
        if (r < 0)
            return r;
    }
    return model_names_complete(st);
}

const struct lab_op snapshot_ops[] = {{"create", 3, true, create},
                                      {"apply", 2, true, apply},
                                      {"delete", 2, true, delete_one},
                                      {NULL}};
static const struct lab_op with_sizes[] = {{"create", 3, true, create},
                                           {"apply", 2, true, apply},
                                           {"delete", 1, true, delete_one},
                                           {"resize", 3, true, resize},
                                           {NULL}};

static const struct lab_op versions[] = {
    {"create", 2, true, create},     {"apply", 1, true, apply},
    {"delete", 1, true, delete_one}, {"version", 4, true, change_version},
    {"shorten", 6, true, shorten},   {NULL}};

static const struct lab_op repairs[] = {{"create", 2, true, create},
                                        {"delete", 1, true, delete_one},
                                        {"repair", 6, true, shorten_and_repair},
                                        {NULL}};

#define SNAPSHOTS                                                                                  \
    .flush = 8, .fua = 3, .zero = 6, .discard = 8, .ops = snapshot_ops,                            \
    .judge_co = judge_snapshots_co

const struct workload snapshot_workloads[] = {
    {.name = "snapshot-4k",
     .plants = "SHIFT_NAMED_EARLY SHIFT_COUNTS_IN_PLACE SHIFT_COPIED_LEFT SHIFT_HEADER_IN_PARTS "
               "SHIFT_PUNCHED_EARLY SHIFT_NO_LAST_BARRIER",
     .options = "cluster_size=4k",
     .size = 2 * MIB,
     .requests = 40,
     .coded = 10,
     .max_blocks = 40,
     .span = MIB,
     SNAPSHOTS},
    {.name = "snapshot-512",
     .plants = "SHIFT_NAMED_EARLY SHIFT_NO_LAST_BARRIER L1_BEFORE_L2",
     .options = "cluster_size=512",
     .size = MIB,
     .requests = 40,
     .coded = 10,
     .max_blocks = 12,
     .span = 256 * KIB,
     SNAPSHOTS},
    {.name = "snapshot-64k",
     .options = "cluster_size=64k",
     .size = 4 * MIB,
     .requests = 40,
     .max_blocks = 150,
     .span = 2 * MIB,
     SNAPSHOTS},
    {.name = "snapshot-v2",
     .options = "cluster_size=4k,compat=0.10",
     .size = 2 * MIB,
     .requests = 40,
     .coded = 10,
     .max_blocks = 40,
     .span = MIB,
     SNAPSHOTS},
    {.name = "snapshot-versions",
     .options = "cluster_size=4k,compat=0.10",
     .size = 2 * MIB,
     .requests = 60,
     .coded = 5,
     .max_blocks = 40,
     .flush = 8,
     .fua = 3,
     .zero = 6,
     .discard = 8,
     .span = MIB,
     .ops = versions,
     .judge_co = judge_snapshots_co,
     .plants = "SNAPSHOTS_NAMED_EARLY"},
    {.name = "snapshot-repaired",
     .options = "cluster_size=4k",
     .size = 2 * MIB,
     .requests = 40,
     .max_blocks = 40,
     .flush = 8,
     .fua = 3,
     .zero = 6,
     .span = MIB,
     .ops = repairs,
     .judge_co = judge_snapshots_co,
     .mend_co = repair_state_co,
     .plants = "REPAIRED_SNAPSHOTS_EARLY"},
    {.name = "snapshot-sizes",
     .options = "cluster_size=4k,refcount_bits=64",
     .size = 2 * MIB,
     .requests = 40,
     .max_blocks = 40,
     .flush = 8,
     .fua = 3,
     .zero = 6,
     .discard = 8,
     .ops = with_sizes,
     .judge_co = judge_snapshots_co},
    {.name = "snapshot-extended",
     .options = "cluster_size=16k,extended_l2=on",
     .size = 2 * MIB,
     .requests = 40,
     .max_blocks = 60,
     SNAPSHOTS},
    {.name = "snapshot-overlay",
     .options = "cluster_size=4k,backing_file=lab:1,backing_fmt=qcow2",
     .size = 2 * MIB,
     .requests = 40,
     .coded = 10,
     .max_blocks = 24,
     .below = {{.format = "qcow2",
                .options = "cluster_size=64k",
                .size = 2 * MIB - 3 * BLOCK,
                .filled = true}},
     SNAPSHOTS},
    {0},
};
