/* SPDX-License-Identifier: MIT */
/*
 * Dirty bitmaps under the engine: a format that maps straight through to a storage which looks, at
 * every byte that reaches it, whether the image was told and the bitmap knows.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "base/bytes.h"
#include "base/err.h"
#include "disk/bitmap.h"
#include "disk/engine.h"
#include "runtime/loop.h"

#define DISK (64 * KIB)
#define GRAIN 512

static struct bitmap *watched; /* every change must be in it, and it must be armed */
static unsigned changes, arms, stores;
static int arm_result;

static void saw_change(uint64_t off, uint64_t len) {
    changes++;
    for (uint64_t at = off; watched && at < off + len; at += GRAIN) {
        assert_true(bitmap_get(watched, at));
        assert_true(!watched->stored || watched->armed);
    }
}

/* ---- storage ---- */
static int s_pread_co(struct node *n, uint64_t off, uint64_t len, const struct iovec *iov, int niov,
                      unsigned flags) {
    return 0;
}
static int s_pwrite_co(struct node *n, uint64_t off, uint64_t len, const struct iovec *iov,
                       int niov, unsigned flags) {
    saw_change(off, len);
    task_yield_co();
    return 0;
}
static int s_zero_co(struct node *n, uint64_t off, uint64_t len, unsigned flags) {
    saw_change(off, len);
    return 0;
}
static int s_truncate_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    n->size = size;
    return 0;
}
static int s_copy_co(struct node *src, uint64_t so, struct node *dst, uint64_t to, uint64_t len,
                     unsigned flags) {
    saw_change(to, len);
    return 0;
}
static const struct storage_ops s_ops = {.preadv_co = s_pread_co,
                                         .pwritev_co = s_pwrite_co,
                                         .zero_co = s_zero_co,
                                         .truncate_co = s_truncate_co,
                                         .copy_range_co = s_copy_co};
static const struct driver driver_watch = {
    .name = "watch", .kind = DRIVER_STORAGE, .storage = &s_ops};

/* ---- format ---- */
static int f_map_co(struct node *n, uint64_t off, uint64_t len, struct extent *x) {
    *x = (struct extent){.kind = EXTENT_DATA,
                         .flags = EXTENT_IN_PLACE,
                         .storage = n->file,
                         .host_offset = off,
                         .length = len};
    return 0;
}
static int f_place_co(struct node *n, uint64_t off, uint64_t len, unsigned flags, uint32_t coded,
                      struct placement *p) {
    *p = (struct placement){.offset = off,
                            .length = len,
                            .storage = n->file,
                            .host_offset = off,
                            .coded_length = coded};
    return 0;
}
static int f_change_co(struct node *n, uint64_t off, uint64_t len, unsigned flags) {
    saw_change(off, len);
    return 0;
}
static int f_discard_co(struct node *n, uint64_t off, uint64_t len) {
    saw_change(off, len);
    return 0;
}
static int f_resize_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    assert_true(!watched || !watched->stored || watched->armed);
    n->size = size;
    return 0;
}
static int f_check(struct node *n, const char *name, uint64_t granularity, struct err *e) {
    return 0;
}
static int f_load_co(struct bitmap *b, struct err *e) {
    bitmap_import_ones(b, 3, 1); /* what storage has: the fourth granule */
    return 0;
}
static int f_arm_co(struct node *n, struct err *e) {
    arms++;
    for (int i = 0; i < 5; i++)
        task_yield_co();
    return arm_result;
}
static int f_store_co(struct node *n, struct err *e) {
    stores++;
    for (struct bitmap *b = NULL; (b = bitmap_next(n, b));) {
        b->stored = true;
        b->armed = false;
    }
    return 0;
}
static int f_remove_co(struct bitmap *b, struct err *e) {
    return 0;
}
static const struct codec no_codec = {.name = "none"};
static const struct format_ops f_ops = {.map_co = f_map_co,
                                        .place_co = f_place_co,
                                        .set_zero_co = f_change_co,
                                        .discard_co = f_discard_co,
                                        .resize_co = f_resize_co,
                                        .bitmap_check = f_check,
                                        .bitmap_load_co = f_load_co,
                                        .bitmap_arm_co = f_arm_co,
                                        .bitmap_store_co = f_store_co,
                                        .bitmap_remove_co = f_remove_co};
static const struct driver driver_through = {
    .name = "through", .kind = DRIVER_FORMAT, .format = &f_ops};

static struct node *disk_new(void) {
    struct node *n = node_new(&driver_through);
    n->file = node_new(&driver_watch);
    n->flags = n->file->flags = NODE_RW;
    n->size = n->file->size = DISK;
    n->granularity = GRAIN;
    n->codec = &no_codec;
    changes = arms = stores = 0;
    arm_result = 0;
    watched = NULL;
    return n;
}

static struct bitmap *add(struct node *n, const char *name) {
    struct bitmap_new what = {.name = name, .granularity = GRAIN, .persistent = true};
    struct bitmap *b;
    assert_int_equal(bitmap_add_co(n, &what, &b, NULL), 0);
    return b;
}

/* A bitmap as an image has it when it was just opened. */
static struct bitmap *attach(struct node *n, const char *name) {
    struct bitmap *b;
    assert_int_equal(bitmap_attach(n, name, 9, true, false, NULL, &b, NULL), 0);
    assert_int_equal(bitmap_attach_end(n, NULL), 0);
    return b;
}

static int write_co(struct node *n, uint64_t off, uint64_t len) {
    static uint8_t buf[DISK];
    memset(buf, 1, sizeof(buf));
    return disk_pwrite_co(n, off, buf, len);
}

/* ---- scenes ---- */

static void every_change_is_known_before_it_reaches_storage(void *arg) {
    struct node *n = disk_new(), *src = disk_new();
    watched = attach(n, "b");
    assert_int_equal(write_co(n, 1000, 2000), 0);
    assert_int_equal(disk_zero_co(n, 8 * KIB, 1000, 0), 0);
    assert_int_equal(disk_discard_co(n, 16 * KIB, 4 * KIB), 0);
    assert_int_equal(disk_write_coded_co(n, 24 * KIB, "code", 4), 0);
    assert_int_equal(disk_copy_range_co(src, 0, n, 32 * KIB, 4 * KIB, 0), 0);
    assert_true(changes >= 5);
    assert_int_equal(arms, 1);
    assert_true(bitmap_get(watched, 24 * KIB) && bitmap_get(watched, 35 * KIB));
    assert_false(bitmap_get(watched, 40 * KIB));
    watched = NULL;
    node_unref_co(src);
    node_unref_co(n);
}

static void what_cannot_be_armed_is_not_written(void *arg) {
    struct node *n = disk_new();
    watched = attach(n, "b");
    arm_result = -EIO;
    assert_int_equal(write_co(n, 0, 512), -EIO);
    assert_int_equal(disk_zero_co(n, 0, 512, 0), -EIO);
    assert_int_equal(disk_discard_co(n, 0, 512), -EIO);
    assert_int_equal(bitmap_clear_co(watched, NULL), -EIO);
    assert_int_equal(disk_resize_co(n, DISK * 2, 0, NULL), -EIO);
    assert_int_equal(n->size, DISK);
    assert_int_equal(changes, 0);
    arm_result = 0;
    assert_int_equal(write_co(n, 0, 512), 0);
    watched = NULL;
    node_unref_co(n);
}

struct writer {
    struct node *n;
    uint64_t at;
    int r;
};
static void writer_task(void *arg) {
    struct writer *w = arg;
    w->r = write_co(w->n, w->at, 512);
}

static void writers_that_come_together_wait_for_one_arming(void *arg) {
    struct node *n = disk_new();
    struct task_group g;
    struct writer w[6];
    watched = attach(n, "b");
    task_group_init(&g);
    for (int i = 0; i < 6; i++) {
        w[i] = (struct writer){n, (uint64_t)i * 4096, 1};
        task_group_spawn(&g, loop_self(), writer_task, &w[i]);
    }
    task_group_wait_co(&g);
    for (int i = 0; i < 6; i++)
        assert_int_equal(w[i].r, 0);
    assert_int_equal(arms, 1);
    assert_int_equal(bitmap_dirty_bytes(watched), 6 * 512);
    watched = NULL;
    node_unref_co(n);
}

static void clearing_waits_for_what_is_under_way(void *arg) {
    struct node *n = disk_new();
    struct bitmap *b = attach(n, "b");
    struct task_group g;
    struct writer w = {n, 0, 1};
    watched = b;
    task_group_init(&g);
    task_group_spawn(&g, loop_self(), writer_task, &w);
    task_yield_co(); /* it has marked, or is about to */
    assert_int_equal(bitmap_clear_co(b, NULL), 0);
    assert_int_equal(w.r, 0); /* done: its bit may go */
    assert_int_equal(bitmap_dirty_bytes(b), 0);
    task_group_wait_co(&g);
    watched = NULL;
    node_unref_co(n);
}

static void stored_bits_join_when_they_are_asked_for(void *arg) {
    struct node *n = disk_new();
    struct bitmap *b = attach(n, "b");
    assert_int_equal(write_co(n, 0, 1), 0);
    assert_false(bitmap_get(b, 3 * GRAIN));
    assert_int_equal(bitmap_load_co(b, NULL), 0);
    assert_true(bitmap_get(b, 3 * GRAIN) && bitmap_get(b, 0));
    assert_int_equal(bitmap_store_co(n, NULL), 0);
    assert_int_equal(stores, 1);
    assert_int_equal(bitmap_store_co(n, NULL), 0); /* nothing has changed */
    assert_int_equal(stores, 1);
    assert_int_equal(write_co(n, 0, 1), 0);
    assert_int_equal(arms, 2);
    assert_int_equal(bitmap_store_co(n, NULL), 0);
    assert_int_equal(stores, 2);
    node_unref_co(n);
}

static void clearing_forgets_what_is_stored(void *arg) {
    struct node *n = disk_new();
    struct bitmap *b = attach(n, "b");
    assert_int_equal(bitmap_clear_co(b, NULL), 0);
    assert_int_equal(bitmap_load_co(b, NULL), 0);
    assert_int_equal(bitmap_dirty_bytes(b), 0);
    node_unref_co(n);
}

static void disabled_and_unusable_ones_do_not_record(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = disk_new();
    struct bitmap *off = add(n, "off"), *lost, *other;
    assert_int_equal(bitmap_set_enabled_co(off, false, NULL), 0);
    assert_int_equal(bitmap_attach(n, "lost", 9, true, true, NULL, &lost, NULL), 0);
    assert_int_equal(bitmap_attach(n, "other", 9, true, false, "is odd", &other, NULL), 0);
    assert_int_equal(bitmap_attach_end(n, NULL), 0);
    assert_int_equal(write_co(n, 0, 512), 0);
    assert_int_equal(arms, 1); /* the odd one misses it: the image says so */
    assert_true(other->armed);
    assert_int_equal(bitmap_dirty_bytes(off), 0);
    assert_int_equal(bitmap_usable(lost, false, &e), -EINVAL);
    assert_non_null(strstr(e.text, "inconsistent"));
    assert_int_equal(bitmap_usable(other, false, &e), -EINVAL);
    assert_non_null(strstr(e.text, "'other' is odd"));
    assert_int_equal(bitmap_merge_co(off, lost, NULL), -EINVAL);
    assert_int_equal(disk_resize_co(n, DISK / 2, 0, NULL), -EINVAL);
    assert_int_equal(bitmap_remove_co(lost, NULL), 0);
    assert_int_equal(bitmap_remove_co(other, NULL), 0);
    assert_int_equal(disk_resize_co(n, DISK / 2, 0, NULL), 0);
    node_unref_co(n);
}

static void exported_ones_stay_as_clients_see_them(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = disk_new();
    struct bitmap *shown = add(n, "shown"), *other = add(n, "other");
    assert_int_equal(write_co(n, 0, 512), 0);
    shown->exported = 2;
    assert_int_equal(bitmap_remove_co(shown, &e), -EBUSY);
    assert_non_null(strstr(e.text, "'shown' is exported"));
    assert_int_equal(bitmap_clear_co(shown, NULL), -EBUSY);
    assert_int_equal(bitmap_merge_co(shown, other, NULL), -EBUSY);
    assert_int_equal(bitmap_merge_co(other, shown, NULL), 0);
    assert_true(bitmap_dirty_bytes(shown) > 0);
    shown->exported = 0;
    assert_int_equal(bitmap_clear_co(shown, NULL), 0);
    assert_int_equal(bitmap_remove_co(shown, NULL), 0);
    node_unref_co(n);
}

static void sizes_are_followed_and_growth_counts_as_change(void *arg) {
    struct node *n = disk_new();
    struct bitmap *b = add(n, "b");
    assert_int_equal(write_co(n, DISK - 512, 512), 0);
    assert_int_equal(disk_resize_co(n, DISK / 2, 0, NULL), 0);
    assert_int_equal(b->size, DISK / 2);
    assert_int_equal(bitmap_dirty_bytes(b), 0);
    assert_int_equal(disk_resize_co(n, DISK, 0, NULL), 0);
    assert_int_equal(bitmap_dirty_bytes(b), DISK / 2);
    assert_false(bitmap_get(b, DISK / 2 - 1));
    node_unref_co(n);
}

static void two_stored_ones_of_one_name_are_found(void *arg) {
    struct node *n = disk_new();
    struct bitmap *b;
    assert_int_equal(bitmap_attach(n, "x", 9, true, false, NULL, &b, NULL), 0);
    assert_int_equal(bitmap_attach(n, "y", 9, true, false, NULL, &b, NULL), 0);
    assert_int_equal(bitmap_attach_end(n, NULL), 0);
    assert_int_equal(bitmap_attach(n, "x", 9, true, false, NULL, &b, NULL), 0);
    assert_int_equal(bitmap_attach_end(n, NULL), -EEXIST);
    node_unref_co(n);
}

static void run_scene(void **state) {
    struct loop *l;
    assert_int_equal(loop_new(LOOP_AUTO, &l, NULL), 0);
    loop_run(l, (task_fn *)*state, NULL);
    loop_free(l);
}
#define SCENE(f)                                                                                   \
    { #f, run_scene, NULL, NULL, (void *)f }

int main(void) {
    const struct CMUnitTest tests[] = {
        SCENE(every_change_is_known_before_it_reaches_storage),
        SCENE(what_cannot_be_armed_is_not_written),
        SCENE(writers_that_come_together_wait_for_one_arming),
        SCENE(clearing_waits_for_what_is_under_way),
        SCENE(stored_bits_join_when_they_are_asked_for),
        SCENE(clearing_forgets_what_is_stored),
        SCENE(disabled_and_unusable_ones_do_not_record),
        SCENE(exported_ones_stay_as_clients_see_them),
        SCENE(sizes_are_followed_and_growth_counts_as_change),
        SCENE(two_stored_ones_of_one_name_are_found),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
