/* SPDX-License-Identifier: MIT */
/*
 * Workloads of more than one image, of other sizes, and of formats without metadata.
 *
 * The top image is lab:0; what it names lies on lab:1 (its backing file) and lab:2.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/ck.h"
#include "disk/overlay.h"
#include "job/copy.h"
#include "job/rebase.h"
#include "workloads.h"

/* ---------------------------------------------------------------- sizes */

static void grow(struct lab *l) {
    lab_resize(l, min_u64(DISK_MAX, l->disk->size + (1 + lab_rnd(l, 256)) * BLOCK), PREALLOC_OFF);
}

static void grow_prepared(struct lab *l) {
    static const int how[] = {PREALLOC_METADATA, PREALLOC_FULL};
    lab_resize(l, min_u64(DISK_MAX, l->disk->size + (1 + lab_rnd(l, 128)) * BLOCK),
               how[lab_rnd(l, 2)]);
}

static void shrink(struct lab *l) {
    uint64_t less = (1 + lab_rnd(l, 400)) * BLOCK;
    if (l->disk->size > less + 256 * KIB)
        lab_resize(l, l->disk->size - less, PREALLOC_OFF);
}

static const struct lab_op both_ways[] = {
    {"grow", 3, true, grow}, {"shrink", 3, true, shrink}, {NULL}};
static const struct lab_op growing_prepared[] = {{"grow", 3, true, grow_prepared}, {NULL}};
static const struct lab_op over_longer[] = {
    {"grow", 4, true, grow}, {"shrink", 4, true, shrink}, {NULL}};

/* ---------------------------------------------------------------- commit, empty */

struct commits {
    struct model_mark at; /* when the last one began */
    uint64_t end;         /* and when it had ended; 0: none has */
};

static void commit(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    struct copy_opts opts = {0};
    struct commits *c = l->own = l->own ? l->own : calloc(1, sizeof(*c));
    c->end = 0;
    model_mark(l, &c->at);
    lab_must(commit_run_co(l->disk, &opts, &e), &e, "commit");
    c->end = machine_tick();
}

static void commit_and_empty(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    commit(l);
    lab_must(commit_empty_co(l->disk, &e), &e, "empty");
}

static void finish_commit(struct lab *l) {
    lab_flush(l);
    commit(l);
}

/* Once the last commit has ended, the base alone holds what the disk was at its beginning. */
static int judge_base_co(struct lab_state *st) {
    struct err e AUTO_ERR = ERR_INIT;
    struct commits *c = st->l->own;
    struct node *n;
    if (!c || !c->end || c->end > st->moment)
        return 0;
    if (lab_open_co(1, st->l->w->below[0].format, NULL, 0, &n, &e) < 0)
        return state_fail(st, "opening the base: %s", err_text(&e));
    int r = state_reads_as_co(st, n, &c->at, "the base");
    node_unref_co(n);
    return r;
}

static void free_commits(struct lab *l) {
    struct commits *c = l->own;
    if (c)
        model_mark_free(&c->at);
}

static const struct lab_op committing[] = {{"commit", 1, true, commit}, {NULL}};
static const struct lab_op emptying[] = {{"empty", 2, true, commit_and_empty}, {NULL}};

/* ---------------------------------------------------------------- rebase */

/* Between lab:1 and lab:2, there and back. */
static void rebase(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    struct rebase_opts opts = {0};
    struct node *base;
    const char *to =
        l->disk->backing_name && !strcmp(l->disk->backing_name, "lab:1") ? "lab:2" : "lab:1";
    lab_must(lab_open_co((unsigned)to[4] - '0', "qcow2", NULL, 0, &base, &e), &e, "the new base");
    lab_must(rebase_copy_co(l->disk, base, &opts, &e), &e, "rebase");
    lab_must(rebase_switch_co(l->disk, to, "qcow2", &e), &e, "rebase");
    node_unref_co(l->disk->backing);
    l->disk->backing = base;
    l->disk->map_generation++;
}

/* The same backing file under names of all lengths: the header takes one sector or several. */
static void rename_base(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    char name[1000] = "lab:1/";
    size_t len = 6 + lab_rnd(l, 900);
    memset(name + 6, 'a' + (int)lab_rnd(l, 26), len - 6);
    lab_must(rebase_switch_co(l->disk, name, "qcow2", &e), &e, "another name");
}

static const struct lab_op renaming[] = {{"rename", 5, true, rename_base}, {NULL}};
static const struct lab_op rebasing[] = {{"rebase", 1, true, rebase}, {NULL}};

/* ---------------------------------------------------------------- a throw-away disk that is kept
 */

static void open_throw_away(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    struct overlay_opts opts = {.scratch_dir = "lab:0"};
    struct node *base;
    lab_must(lab_open_co(1, "qcow2", NULL, 0, &base, &e), &e, "the base");
    lab_must(overlay_create_co(base, &opts, &l->disk, &e), &e, "temporary snapshot");
}

static void keep(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    if (!(l->disk->flags & NODE_NO_FLUSH))
        return;
    lab_must(overlay_keep_co(l->disk, "lab:0", false, &e), &e, "keep");
    model_all_settled(l);
}

static int judge_kept(struct lab_state *st) {
    return st->disk->backing ? 0 : state_fail(st, "it was linked without its backing file's name");
}

static const struct lab_op keeping[] = {{"keep", 1, true, keep}, {NULL}};

/* ---------------------------------------------------------------- the table */

#define QCOW2_BASE(opts, bytes)                                                                    \
    { .format = "qcow2", .options = opts, .size = (bytes), .filled = true }

const struct workload chain_workloads[] = {
    {.name = "resize",
     .plants = "RESIZE_NAMES_L1_EARLY",
     .options = "cluster_size=512",
     .size = 1600 * KIB,
     .requests = 70,
     .flush = 12,
     .fua = 3,
     .zero = 5,
     .discard = 10,
     .coded = 5,
     .grow = 6,
     .max_blocks = 12},
    {.name = "resize-both",
     .options = "cluster_size=4k",
     .size = 2 * MIB,
     .requests = 70,
     .flush = 12,
     .fua = 3,
     .zero = 5,
     .discard = 10,
     .coded = 5,
     .max_blocks = 40,
     .ops = both_ways},
    {.name = "resize-512",
     .options = "cluster_size=512",
     .size = 1200 * KIB,
     .requests = 60,
     .flush = 12,
     .fua = 3,
     .zero = 5,
     .discard = 10,
     .max_blocks = 12,
     .ops = both_ways},
    {.name = "grow-prepared",
     .options = "cluster_size=4k",
     .size = MIB,
     .requests = 60,
     .flush = 12,
     .fua = 3,
     .zero = 5,
     .discard = 10,
     .max_blocks = 24,
     .ops = growing_prepared},
    {.name = "over-longer",
     .plants = "SIZE_BEFORE_ZEROS SHRINK_SHOWS_BACKING",
     .options = "cluster_size=4k,backing_file=lab:1,backing_fmt=qcow2",
     .size = MIB,
     .requests = 60,
     .flush = 12,
     .fua = 3,
     .zero = 5,
     .discard = 10,
     .max_blocks = 24,
     .span = 512 * KIB,
     .ops = over_longer,
     .below = {QCOW2_BASE("cluster_size=4k", 3 * MIB)}},
    {.name = "overlay",
     .options = "cluster_size=4k,backing_file=lab:1,backing_fmt=qcow2",
     .size = 2 * MIB,
     .requests = 80,
     .flush = 12,
     .fua = 3,
     .zero = 8,
     .discard = 15,
     .coded = 10,
     .max_blocks = 24,
     .below = {QCOW2_BASE("cluster_size=64k", 2 * MIB - 3 * BLOCK)}},
    {.name = "commit",
     .options = "cluster_size=4k,backing_file=lab:1,backing_fmt=qcow2",
     .size = 2 * MIB,
     .requests = 50,
     .flush = 12,
     .fua = 3,
     .zero = 8,
     .discard = 8,
     .coded = 10,
     .max_blocks = 24,
     .ops = committing,
     .finish_co = finish_commit,
     .judge_co = judge_base_co,
     .free = free_commits,
     .below = {QCOW2_BASE("cluster_size=4k", 1500 * KIB)}},
    {.name = "commit-raw",
     .options = "cluster_size=4k,backing_file=lab:1,backing_fmt=raw",
     .size = 2 * MIB,
     .requests = 50,
     .flush = 12,
     .fua = 3,
     .zero = 8,
     .discard = 8,
     .max_blocks = 24,
     .ops = committing,
     .finish_co = finish_commit,
     .judge_co = judge_base_co,
     .free = free_commits,
     .below = {{.format = "raw", .size = 2 * MIB, .filled = true}}},
    {.name = "empty",
     .plants = "COMMIT_NOT_FLUSHED",
     .options = "cluster_size=512,backing_file=lab:1,backing_fmt=qcow2",
     .size = MIB,
     .requests = 50,
     .flush = 12,
     .fua = 3,
     .zero = 8,
     .discard = 8,
     .max_blocks = 12,
     .ops = emptying,
     .judge_co = judge_base_co,
     .free = free_commits,
     .below = {QCOW2_BASE("cluster_size=4k", MIB)}},
    {.name = "rebase",
     .plants = "REBASE_NAMED_EARLY",
     .options = "cluster_size=4k,backing_file=lab:1,backing_fmt=qcow2",
     .size = 2 * MIB,
     .requests = 50,
     .flush = 12,
     .fua = 3,
     .zero = 8,
     .discard = 8,
     .max_blocks = 24,
     .span = MIB,
     .ops = rebasing,
     .below = {QCOW2_BASE("cluster_size=4k", MIB), QCOW2_BASE("cluster_size=64k", 3 * MIB)}},
    {.name = "rename",
     .plants = "HEADER_TORN",
     .options = "cluster_size=4k,backing_file=lab:1,backing_fmt=qcow2",
     .size = MIB,
     .requests = 30,
     .flush = 12,
     .fua = 3,
     .max_blocks = 24,
     .ops = renaming,
     .below = {QCOW2_BASE("cluster_size=4k", MIB)}},
    {.name = "keep",
     .plants = "KEEP_WITHOUT_METADATA",
     .options = "",
     .size = 2 * MIB,
     .requests = 50,
     .flush = 12,
     .fua = 3,
     .zero = 8,
     .discard = 8,
     .max_blocks = 24,
     .open_co = open_throw_away,
     .ops = keeping,
     .judge_co = judge_kept,
     .below = {QCOW2_BASE("cluster_size=64k", 2 * MIB)}},
    {.name = "raw",
     .format = "raw",
     .size = MIB,
     .requests = 80,
     .flush = 12,
     .fua = 8,
     .zero = 8,
     .discard = 8,
     .max_blocks = 24,
     .span = 64 * KIB,
     .ops = both_ways},
    {0},
};
