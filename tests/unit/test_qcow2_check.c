/* SPDX-License-Identifier: MIT */
/*
 * qcow2's check in bounded memory: windows of the clusters, one after the other, find what one
 * window finds.  An image of small clusters with many snapshots, damaged at random.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>
#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/open.h"
#include "disk/snapshot.h"
#include "format/qcow2/check.h"
#include "runtime/loop.h"

#define DISK (8 * MIB)
#define CLUSTER 512u
#define SNAPSHOTS 20

static uint64_t rng;
static uint64_t next(void) {
    rng ^= rng << 13;
    rng ^= rng >> 7;
    return rng ^= rng << 17;
}

static struct node *open_co(struct node *file, unsigned flags) {
    struct open_req req = {.flags = flags, .cache = CACHE_WRITEBACK};
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = NULL;
    if (node_open_on_co(node_ref(file), driver_find("qcow2"), NULL, &req, &n, &e) < 0)
        fail_msg("%s", err_text(&e));
    return n;
}

/* All clusters in use, and shared with up to SNAPSHOTS snapshots. */
static struct node *image_co(void) {
    struct create_ctx ctx = {.name = "memory:", .size_limit = 64 * MIB};
    struct err e AUTO_ERR = ERR_INIT;
    struct node *file = NULL;
    assert_int_equal(storage_create_co(&ctx, &file, &e), 0);
    json_t *o = json_pack("{s:I, s:I, s:s}", "size", (json_int_t)DISK, "cluster_size",
                          (json_int_t)CLUSTER, "preallocation", "metadata");
    assert_int_equal(format_create_co(file, driver_find("qcow2"), o, &e), 0);
    json_decref(o);
    struct node *n = open_co(file, OPEN_RW);
    uint8_t bytes[4 * CLUSTER];
    memset(bytes, 7, sizeof(bytes));
    for (int i = 0; i < SNAPSHOTS; i++) {
        struct snapshot_info info = {.name = xasprintf("s%d", i)};
        assert_int_equal(disk_snapshot_create_co(n, &info, &e), 0);
        snapshot_info_free(&info);
        for (int k = 0; k < 20; k++)
            assert_int_equal(
                disk_pwrite_co(n, next() % (DISK - sizeof(bytes)), bytes, sizeof(bytes)), 0);
    }
    assert_int_equal(disk_flush_co(n), 0);
    node_unref_co(n);
    return file;
}

/* What a check tells, whatever the order. */
struct told {
    struct check_result r;
    uint64_t texts, sum;
    bool windows;
    double last;
};

static void report(void *arg, bool is_leak, const char *text) {
    struct told *t = arg;
    uint64_t hash = is_leak;
    for (; *text; text++)
        hash = (hash ^ (uint8_t)*text) * UINT64_C(0x100000001b3);
    t->texts++;
    t->sum += hash;
}

static void progress(void *arg, uint64_t done, uint64_t total) {
    struct told *t = arg;
    t->last = (double)done / (double)total;
    assert_true(done <= total);
}

static struct told check_co(struct node *file, size_t room) {
    struct told t = {.r = {.report = report, .progress = progress}};
    struct node *n = open_co(file, OPEN_CHECK);
    struct check *c = calloc(1, sizeof(*c));
    t.r.arg = &t;
    c->s = qcow2_of(n);
    c->r = &t.r;
    check_room_bytes = room;
    assert_int_equal(check_pass_co(c, NULL), 0);
    check_room_bytes = CHECK_ROOM_BYTES;
    t.windows = c->room.from;
    assert_true(t.last == 1.0);
    check_end(c);
    free(c);
    node_unref_co(n);
    return t;
}

static void expect_same(const struct told *a, const struct told *b) {
    assert_int_equal(a->r.corruptions, b->r.corruptions);
    assert_int_equal(a->r.leaks, b->r.leaks);
    assert_int_equal(a->r.check_errors, b->r.check_errors);
    assert_int_equal(a->r.allocated_clusters, b->r.allocated_clusters);
    assert_int_equal(a->r.fragmented_clusters, b->r.fragmented_clusters);
    assert_int_equal(a->r.image_end_offset, b->r.image_end_offset);
    assert_int_equal(a->texts, b->texts);
    assert_int_equal(a->sum, b->sum);
}

/* Some bytes anywhere; the header and what it names stay. */
static void damage_co(struct node *file) {
    for (int i = 0; i < 40; i++) {
        uint64_t at = 4096 + next() % (file->size - 8192);
        uint8_t byte = (uint8_t)next();
        assert_int_equal(disk_pwrite_co(file, at, &byte, 1), 0);
    }
}

static void body_co(void *arg) {
    rng = UINT64_C(0x9e3779b97f4a7c15);
    struct node *file = image_co();
    struct told whole = check_co(file, CHECK_ROOM_BYTES), parts;
    assert_false(whole.windows);
    assert_int_equal(whole.r.corruptions + whole.r.leaks, 0);
    for (int i = 0; i < 12; i++) {
        parts = check_co(file, 1024 + (size_t)i * 3000);
        assert_true(parts.windows || i > 8);
        expect_same(&whole, &parts);
        damage_co(file);
        whole = check_co(file, CHECK_ROOM_BYTES);
        assert_true(whole.r.corruptions + whole.r.leaks);
        assert_false(whole.windows);
    }
    node_unref_co(file);
}

static void windows_find_what_one_window_finds(void **st) {
    struct loop *l;
    struct err e AUTO_ERR = ERR_INIT;
    assert_int_equal(loop_new(LOOP_AUTO, &l, &e), 0);
    loop_run(l, body_co, NULL);
    loop_free(l);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(windows_find_what_one_window_finds),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
