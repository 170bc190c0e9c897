/* SPDX-License-Identifier: MIT */
/* The public library, used as a program outside would: only strata.h. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

#include "strata.h"

#define MIB (1024 * 1024)

static char dir[64], base[128], kept[128];
static struct strata *s;

static int setup(void **state) {
    snprintf(dir, sizeof(dir), "/var/tmp/strata-api-XXXXXX");
    assert_non_null(mkdtemp(dir));
    snprintf(base, sizeof(base), "%s/base.qcow2", dir);
    snprintf(kept, sizeof(kept), "%s/kept.qcow2", dir);
    assert_int_equal(strata_new(&s, NULL), 0);
    assert_int_equal(strata_create(s, base, "qcow2", 8 * MIB, "cluster_size=4k", NULL), 0);
    return 0;
}

static int teardown(void **state) {
    strata_free(s);
    unlink(base);
    unlink(kept);
    return rmdir(dir); /* fails when anything was left behind */
}

static struct strata_disk *open_disk(const char *name, unsigned flags) {
    struct strata_open_options o = {.flags = flags};
    struct strata_error e;
    struct strata_disk *d;
    if (strata_open(s, name, &o, &d, &e) < 0)
        fail_msg("%s (%s)", e.message, e.hint);
    return d;
}

static void expect(struct strata_disk *d, uint64_t offset, const char *want) {
    char got[64] = {0};
    assert_int_equal(strata_pread(d, got, strlen(want), offset), 0);
    assert_string_equal(got, want);
}

static void what_was_written_is_there_after_reopening(void **state) {
    struct strata_disk *d = open_disk(base, STRATA_READ_WRITE);
    assert_int_equal(strata_size(d), 8 * MIB);
    assert_string_equal(strata_format(d), "qcow2");
    assert_int_equal(strata_pwrite(d, "hello", 5, 4094), 0);
    assert_int_equal(strata_close(d), 0);
    d = open_disk(base, 0);
    expect(d, 4094, "hello");
    assert_int_equal(strata_pwrite(d, "x", 1, 0), -EROFS);
    strata_close(d);
}

static void a_snapshot_leaves_the_base_as_it_was(void **state) {
    struct strata_disk *d = open_disk(base, STRATA_READ_WRITE);
    assert_int_equal(strata_pwrite(d, "old", 3, 100), 0);
    strata_close(d);
    d = open_disk(base, STRATA_SNAPSHOT);
    assert_int_equal(strata_pwrite(d, "new", 3, 100), 0);
    expect(d, 100, "new");
    strata_close(d);
    d = open_disk(base, 0);
    expect(d, 100, "old");
    strata_close(d);
}

static void a_snapshot_can_be_committed(void **state) {
    struct strata_disk *d = open_disk(base, STRATA_SNAPSHOT);
    struct strata_error e;
    assert_int_equal(strata_pwrite(d, "kept", 4, 3 * MIB), 0);
    if (strata_commit(d, &e) < 0)
        fail_msg("%s", e.message);
    strata_close(d);
    d = open_disk(base, 0);
    expect(d, 3 * MIB, "kept");
    strata_close(d);
}

static void a_snapshot_can_be_kept_as_an_overlay(void **state) {
    struct strata_disk *d = open_disk(base, STRATA_READ_WRITE);
    struct strata_error e;
    assert_int_equal(strata_pwrite(d, "under", 5, 0), 0);
    strata_close(d);
    d = open_disk(base, STRATA_SNAPSHOT);
    assert_int_equal(strata_pwrite(d, "over", 4, 5), 0);
    if (strata_keep(d, kept, &e) < 0)
        fail_msg("%s", e.message);
    assert_int_equal(strata_keep(d, kept, &e), -EEXIST);
    strata_close(d);
    d = open_disk(kept, 0);
    expect(d, 0, "underover");
    strata_close(d);
}

static void states_of_the_disk_are_kept_and_come_back(void **state) {
    struct strata_disk *d = open_disk(base, STRATA_READ_WRITE);
    struct strata_snapshot *list;
    struct strata_error e;
    size_t count;
    assert_int_equal(strata_pwrite(d, "then", 4, MIB), 0);
    assert_int_equal(strata_snapshot_create(d, "one", &e), 0);
    assert_int_equal(strata_pwrite(d, "now!", 4, MIB), 0);
    assert_int_equal(strata_snapshot_create(d, "two", &e), 0);
    assert_int_equal(strata_snapshot_list(d, &list, &count, &e), 0);
    assert_int_equal(count, 2);
    assert_string_equal(list[0].id, "1");
    assert_string_equal(list[1].name, "two");
    assert_int_equal(list[1].disk_size, 8 * MIB);
    assert_true(list[0].date_sec && list[0].icount == UINT64_MAX);
    strata_snapshots_free(list, count);
    assert_int_equal(strata_snapshot_apply(d, "one", &e), 0);
    expect(d, MIB, "then");
    assert_int_equal(strata_pwrite(d, "more", 4, MIB), 0);
    assert_int_equal(strata_snapshot_delete(d, "1", &e), 0);
    assert_int_equal(strata_snapshot_delete(d, "1", &e), -ENOENT);
    assert_non_null(strstr(e.message, "has no snapshot '1'"));
    expect(d, MIB, "more");
    assert_int_equal(strata_close(d), 0);
    d = open_disk(base, 0);
    assert_int_equal(strata_snapshot_apply(d, "two", &e), -EROFS);
    expect(d, MIB, "more");
    strata_close(d);
}

static void extents_tell_holes_from_data(void **state) {
    struct strata_disk *d = open_disk(base, STRATA_READ_WRITE);
    struct strata_extent x;
    assert_int_equal(strata_pwrite(d, "x", 1, MIB), 0);
    assert_int_equal(strata_extent(d, 0, &x), 0);
    assert_true(x.zero && !x.data);
    assert_int_equal(x.length, MIB);
    assert_int_equal(strata_extent(d, MIB, &x), 0);
    assert_true(x.data && !x.zero);
    assert_int_equal(x.length, 4096);
    assert_int_equal(strata_extent(d, 8 * MIB, &x), -EINVAL);
    strata_close(d);
}

static void errors_name_the_file_and_what_to_do(void **state) {
    struct strata_disk *d = open_disk(base, STRATA_READ_WRITE), *other;
    struct strata_open_options o = {.flags = STRATA_READ_WRITE};
    struct strata_error e;
    assert_int_equal(strata_open(s, base, &o, &other, &e), -EAGAIN);
    assert_non_null(strstr(e.message, "base.qcow2"));
    assert_true(e.hint[0]);
    strata_close(d);
    assert_int_equal(strata_open(s, "/nonexistent/x", NULL, &other, &e), -ENOENT);
    assert_non_null(strstr(e.message, "/nonexistent/x"));
}

struct worker {
    struct strata_disk *d;
    unsigned id;
    int result;
};

static void *write_stripe(void *arg) {
    struct worker *w = arg;
    char block[512], got[512];
    memset(block, 'A' + w->id, sizeof(block));
    for (unsigned i = 0; i < 200 && !w->result; i++) {
        uint64_t at = (i * 8 + w->id) * sizeof(block);
        w->result = strata_pwrite(w->d, block, sizeof(block), at);
        if (!w->result)
            w->result = strata_pread(w->d, got, sizeof(got), at);
        if (!w->result && memcmp(block, got, sizeof(block)))
            w->result = -EIO;
    }
    return NULL;
}

static void many_threads_write_one_disk(void **state) {
    struct strata_disk *d = open_disk(base, STRATA_READ_WRITE);
    pthread_t t[8];
    struct worker w[8];
    for (unsigned i = 0; i < 8; i++) {
        w[i] = (struct worker){.d = d, .id = i};
        assert_int_equal(pthread_create(&t[i], NULL, write_stripe, &w[i]), 0);
    }
    for (unsigned i = 0; i < 8; i++) {
        pthread_join(t[i], NULL);
        assert_int_equal(w[i].result, 0);
    }
    expect(d, 510, "AABB");
    expect(d, 7 * 512 + 510, "HHAA");
    strata_close(d);
}

static void bitmaps_record_what_is_written(void **state) {
    struct strata_disk *d = open_disk(base, STRATA_READ_WRITE);
    struct strata_bitmap info;
    struct strata_error e;
    uint64_t start, length;
    char block[4096] = {1};
    assert_int_equal(strata_bitmap_info(d, 0, &info), -ENOENT);
    assert_int_equal(strata_bitmap_add(d, "a", 65536, NULL), 0);
    assert_int_equal(strata_bitmap_add(d, "a", 65536, NULL), -EEXIST);
    assert_int_equal(strata_bitmap_add(d, "b", 1000, &e), -EINVAL);
    assert_non_null(strstr(e.message, "power of two"));
    assert_int_equal(strata_bitmap_add(d, "b", 512, NULL), 0);
    assert_int_equal(strata_pwrite(d, block, sizeof(block), 2 * MIB), 0);
    assert_int_equal(strata_bitmap_next(d, "a", 0, &start, &length), 1);
    assert_int_equal(start, 2 * MIB);
    assert_int_equal(length, 65536);
    assert_int_equal(strata_bitmap_next(d, "a", start + length, &start, &length), 0);
    assert_int_equal(strata_bitmap_next(d, "none", 0, &start, &length), -ENOENT);
    assert_int_equal(strata_bitmap_clear(d, "a", NULL), 0);
    assert_int_equal(strata_bitmap_enable(d, "a", 0, NULL), 0);
    assert_int_equal(strata_bitmap_merge(d, "a", d, "b", NULL), 0);
    assert_int_equal(strata_pwrite(d, block, sizeof(block), 0), 0);
    assert_int_equal(strata_close(d), 0);

    d = open_disk(base, 0);
    assert_int_equal(strata_bitmap_info(d, 0, &info), 0);
    assert_string_equal(info.name, "a");
    assert_int_equal(info.granularity, 65536);
    assert_false(info.enabled || info.inconsistent);
    assert_true(info.usable);
    assert_int_equal(strata_bitmap_next(d, "a", 0, &start, &length), 1);
    assert_int_equal(start, 2 * MIB);
    assert_int_equal(strata_bitmap_clear(d, "a", NULL), -EROFS);
    strata_close(d);

    d = open_disk(base, STRATA_READ_WRITE);
    assert_int_equal(strata_bitmap_remove(d, "b", NULL), 0);
    assert_int_equal(strata_bitmap_info(d, 1, &info), -ENOENT);
    strata_close(d);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

static void options_of_an_image_are_changed_through_the_library(void **state) {
    struct strata_error e;
    struct strata_disk *d = open_disk(base, STRATA_READ_WRITE);
    assert_int_equal(strata_pwrite(d, "amended", 7, 1000), 0);
    assert_int_equal(strata_amend(d, "lazy_refcounts=on,size=12M", 0, &e), 0);
    assert_int_equal(strata_size(d), 12 * MIB);
    assert_int_equal(strata_amend(d, "size=8M", 0, &e), -EINVAL);
    assert_int_equal(strata_size(d), 12 * MIB);
    assert_int_equal(strata_amend(d, "size=8M", STRATA_AMEND_SHRINK, &e), 0);
    assert_int_equal(strata_amend(d, "refcount_bit=8", 0, &e), -EINVAL);
    assert_non_null(strstr(e.hint, "refcount_bits"));
    expect(d, 1000, "amended");
    assert_int_equal(strata_close(d), 0);
    d = open_disk(base, 0);
    assert_int_equal(strata_amend(d, "lazy_refcounts=off", 0, &e), -EROFS);
    assert_int_equal(strata_size(d), 8 * MIB);
    strata_close(d);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(what_was_written_is_there_after_reopening),
        TEST(a_snapshot_leaves_the_base_as_it_was),
        TEST(a_snapshot_can_be_committed),
        TEST(a_snapshot_can_be_kept_as_an_overlay),
        TEST(states_of_the_disk_are_kept_and_come_back),
        TEST(extents_tell_holes_from_data),
        TEST(errors_name_the_file_and_what_to_do),
        TEST(many_threads_write_one_disk),
        TEST(bitmaps_record_what_is_written),
        TEST(options_of_an_image_are_changed_through_the_library),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
