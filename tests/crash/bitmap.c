/* SPDX-License-Identifier: MIT */
/*
 * Workloads with dirty bitmaps: made, cleared, stored, removed, while guests write.
 *
 * What a bitmap promises is about one moment: every block that may read otherwise than it did when
 * the bitmap was made or last cleared is dirty.  A state shows the form that was stored last, or
 * one whose storing was under way; a clean one must keep the promise of such a form, and one that
 * says "in use" promises nothing.  A bitmap that was stored, and whose removal has not begun, is
 * there.
 */
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

#include "base/ck.h"
#include "disk/bitmap.h"
#include "workloads.h"

enum { MARKS_MAX = 60, FORMS_MAX = 60 };

/* One life of a bitmap: from being made or cleared on. */
struct life {
    struct model_mark at;
};
struct form {
    int life;
    uint64_t begin, end; /* of its storing; end UINT64_MAX: under way */
};
struct kept {
    char name[16];
    bool alive;
    int life; /* the present one */
    uint64_t gone, gone_end;
    struct form form[FORMS_MAX];
    int forms;
};
struct bitmaps {
    struct life life[MARKS_MAX];
    int lives;
    struct kept kept[MARKS_MAX];
    int count;
};

static struct bitmaps *own(struct lab *l) {
    return l->own = l->own ? l->own : calloc(1, sizeof(struct bitmaps));
}

void bitmap_free_own(struct lab *l) {
    struct bitmaps *x = own(l);
    for (int i = 0; i < x->lives; i++)
        model_mark_free(&x->life[i].at);
}

static struct kept *any(struct lab *l) {
    struct bitmaps *x = own(l);
    struct kept *alive[MARKS_MAX];
    unsigned n = 0;
    for (int i = 0; i < x->count; i++)
        if (x->kept[i].alive)
            alive[n++] = &x->kept[i];
    return n ? alive[lab_rnd(l, n)] : NULL;
}

static bool new_life(struct lab *l, struct kept *k) {
    struct bitmaps *x = own(l);
    if (x->lives == MARKS_MAX)
        return false;
    model_mark(l, &x->life[x->lives].at);
    k->life = x->lives++;
    return true;
}

static void add(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    struct bitmaps *x = own(l);
    if (x->count == MARKS_MAX || x->lives == MARKS_MAX)
        return;
    struct kept *k = &x->kept[x->count++];
    snprintf(k->name, sizeof(k->name), "b%d", x->count);
    struct bitmap_new what = {
        .name = k->name, .granularity = 512u << lab_rnd(l, 7), .persistent = true};
    new_life(l, k);
    k->gone = k->gone_end = UINT64_MAX;
    lab_must(bitmap_add_co(l->disk, &what, NULL, &e), &e, "bitmap add");
    k->alive = true;
}

static void clear(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    struct kept *k = any(l);
    if (k && new_life(l, k))
        lab_must(bitmap_clear_co(bitmap_find(l->disk, k->name), &e), &e, "bitmap clear");
}

static void drop(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    struct kept *k = any(l);
    if (!k)
        return;
    k->gone = machine_tick();
    lab_must(bitmap_remove_co(bitmap_find(l->disk, k->name), &e), &e, "bitmap remove");
    k->gone_end = machine_tick();
    k->alive = false;
}

void bitmap_store_all(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    struct bitmaps *x = own(l);
    uint64_t begin = machine_tick();
    for (int i = 0; i < x->count; i++) {
        struct kept *k = &x->kept[i];
        if (k->alive && k->forms < FORMS_MAX)
            k->form[k->forms++] = (struct form){k->life, begin, UINT64_MAX};
    }
    lab_must(bitmap_store_co(l->disk, &e), &e, "bitmap store");
    uint64_t end = machine_tick();
    for (int i = 0; i < x->count; i++)
        if (x->kept[i].alive && x->kept[i].forms)
            x->kept[i].form[x->kept[i].forms - 1].end = end;
}

static void resize(struct lab *l) {
    uint64_t size = l->disk->size, step = (1 + lab_rnd(l, 200)) * BLOCK;
    if (lab_rnd(l, 2))
        lab_resize(l, min_u64(DISK_MAX, size + step), PREALLOC_OFF);
    else if (size > step + 256 * KIB)
        lab_resize(l, size - step, PREALLOC_OFF);
}

/* ---------------------------------------------------------------- the judge */

/* A block that changed since `m` and is called clean; -1: none. */
static int64_t missed(const struct lab_state *st, const struct bitmap *b,
                      const struct model_mark *m) {
    for (uint64_t i = 0; i < st->blocks; i++) {
        bool same = i * BLOCK < m->size && model_same(st->l, m, i, st->ids[i]);
        if (!same && !bitmap_get(b, i * BLOCK))
            return (int64_t)i;
    }
    return -1;
}

static int judge_one_co(struct lab_state *st, const struct kept *k, struct bitmap *b) {
    struct err e AUTO_ERR = ERR_INIT;
    int64_t block = -1;
    if (k->gone_end <= st->moment)
        return state_fail(st, "bitmap %s is there and was removed", k->name);
    if (b->inconsistent)
        return 0;
    if (bitmap_load_co(b, &e) < 0)
        return state_fail(st, "bitmap %s: %s", k->name, err_text(&e));
    for (int i = k->forms - 1; i >= 0; i--) {
        if (k->form[i].begin > st->moment)
            continue;
        block = missed(st, b, &own(st->l)->life[k->form[i].life].at);
        if (block < 0)
            return 0;
        if (k->form[i].end <= st->moment)
            break; /* no earlier form can be there */
    }
    return state_fail(st, "bitmap %s calls block %lld clean", k->name, (long long)block);
}

int judge_bitmaps_co(struct lab_state *st) {
    struct bitmaps *x = own(st->l);
    int r = 0;
    for (struct bitmap *b = NULL; !r && (b = bitmap_next(st->disk, b));) {
        const struct kept *k = NULL;
        for (int i = 0; i < x->count; i++)
            if (!strcmp(x->kept[i].name, b->name) && x->kept[i].forms &&
                x->kept[i].form[0].begin <= st->moment)
                k = &x->kept[i];
        r = k ? judge_one_co(st, k, b) : state_fail(st, "bitmap %s is there too early", b->name);
    }
    for (int i = 0; !r && i < x->count; i++) {
        const struct kept *k = &x->kept[i];
        if (k->forms && k->form[0].end <= st->moment && k->gone > st->moment &&
            !bitmap_find(st->disk, k->name))
            r = state_fail(st, "bitmap %s is lost", k->name);
    }
    return r;
}

const struct lab_op bitmap_ops[] = {{"add", 3, true, add},
                                    {"clear", 2, true, clear},
                                    {"remove", 1, true, drop},
                                    {"store", 5, true, bitmap_store_all},
                                    {NULL}};
static const struct lab_op sized_ops[] = {
    {"add", 3, true, add},       {"clear", 2, true, clear},
    {"remove", 1, true, drop},   {"store", 5, true, bitmap_store_all},
    {"resize", 3, true, resize}, {NULL}};

const struct workload bitmap_workloads[] = {
    {.name = "bitmap",
     .options = "cluster_size=4k",
     .size = 2 * MIB,
     .requests = 50,
     .flush = 10,
     .fua = 3,
     .zero = 8,
     .discard = 8,
     .coded = 4,
     .max_blocks = 40,
     .span = 512 * KIB,
     .ops = bitmap_ops,
     .judge_co = judge_bitmaps_co,
     .finish_co = bitmap_store_all,
     .free = bitmap_free_own,
     .plants = "BITMAP_NOT_ARMED BITMAP_ARM_UNSTABLE BITMAP_MISSES_WRITES BITMAP_NAMED_EARLY "
               "BITMAP_FREED_EARLY"},
    {.name = "bitmap-sizes",
     .options = "cluster_size=512,backing_file=lab:1,backing_fmt=qcow2",
     .below = {{.format = "qcow2", .options = "cluster_size=4k", .size = 2 * MIB, .filled = true}},
     .size = MIB,
     .requests = 40,
     .flush = 10,
     .zero = 8,
     .discard = 8,
     .max_blocks = 24,
     .span = 256 * KIB,
     .ops = sized_ops,
     .judge_co = judge_bitmaps_co,
     .finish_co = bitmap_store_all,
     .free = bitmap_free_own,
     .plants = "BITMAP_NOT_ARMED BITMAP_MISSES_WRITES"},
    {.name = "bitmap-header", /* of several sectors, with a name behind the extension */
     .options = "backing_file=lab:1,backing_fmt=qcow2",
     .below = {{.format = "qcow2", .options = "cluster_size=4k", .size = 2 * MIB, .filled = true}},
     .size = 2 * MIB,
     .requests = 28,
     .flush = 10,
     .max_blocks = 24,
     .ops = bitmap_ops,
     .judge_co = judge_bitmaps_co,
     .finish_co = bitmap_store_all,
     .free = bitmap_free_own,
     .plants = "HEADER_TORN"},
    {0},
};
