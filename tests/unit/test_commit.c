/* SPDX-License-Identifier: MIT */
/* commit: what a qcow2 overlay holds goes into its base, whole or not noticeably. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <jansson.h>
#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "disk/overlay.h"
#include "job/copy.h"
#include "runtime/loop.h"

static char folder[64];

static char *path(const char *name) {
    return xasprintf("%s/%s", folder, name);
}

static void must(int r, struct err *e) {
    if (r < 0)
        fail_msg("%s", err_text(e));
}

static void create(const char *name, const char *format, uint64_t size, const char *backing,
                   const char *backing_format) {
    char *p AUTO_FREE = path(name);
    struct err e AUTO_ERR = ERR_INIT;
    json_t *o = json_pack("{s:I}", "size", (json_int_t)size);
    if (backing) {
        json_object_set_new(o, "backing_file", json_string(backing));
        json_object_set_new(o, "backing_fmt", json_string(backing_format));
    }
    must(disk_create_co(p, format, o, CREATE_REPLACE, &e), &e);
    json_decref(o);
}

static struct node *open_image(const char *name, const char *format, unsigned flags) {
    char *p AUTO_FREE = path(name);
    struct err e AUTO_ERR = ERR_INIT;
    struct open_req req = {.name = p, .format = format, .flags = flags, .gate = GATE_ANY};
    struct node *n;
    must(node_open_co(&req, &n, &e), &e);
    return n;
}

static void fill(struct node *n, uint64_t offset, size_t len, int byte) {
    uint8_t *b = malloc(len);
    memset(b, byte, len);
    assert_int_equal(disk_pwrite_co(n, offset, b, len), 0);
    free(b);
}

static void expect(struct node *n, uint64_t offset, size_t len, int byte) {
    uint8_t *b = malloc(len);
    assert_int_equal(disk_pread_co(n, offset, b, len), 0);
    for (size_t i = 0; i < len; i++)
        if (b[i] != byte)
            fail_msg("byte %zu is %d, not %d", (size_t)offset + i, b[i], byte);
    free(b);
}

static void expect_all(struct node *n) {
    expect(n, 0, MIB, 1);
    expect(n, MIB, 100 * KIB, 2);
    expect(n, MIB + 100 * KIB, 3 * MIB - 100 * KIB, 1);
    expect(n, 4 * MIB, MIB, 0);
    expect(n, 5 * MIB, 3 * MIB - 700, 1);
    expect(n, 8 * MIB - 700, 700, 3);
}

/* A base of 8 MiB of ones, and over it a snapshot with data, zeros and an odd end. */
static struct node *snapshot_of(const char *name, const char *format) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = open_image(name, format, OPEN_RW), *top;
    fill(n, 0, 8 * MIB, 1);
    assert_int_equal(disk_flush_co(n), 0);
    node_unref_co(n);
    n = open_image(name, format, 0);
    must(overlay_create_co(n, NULL, &top, &e), &e);
    fill(top, MIB, 100 * KIB, 2);
    assert_int_equal(disk_zero_co(top, 4 * MIB, MIB, ZERO_MAY_UNMAP), 0);
    fill(top, 8 * MIB - 700, 700, 3);
    return top;
}

static void in_loop(void (*body)(void *), void *arg) {
    struct loop *l;
    struct err e AUTO_ERR = ERR_INIT;
    assert_int_equal(loop_new(LOOP_AUTO, &l, &e), 0);
    loop_run(l, body, arg);
    loop_free(l);
}
#define TASK_TEST(name)                                                                            \
    static void name##_body(void *arg);                                                            \
    static void name(void **state) {                                                               \
        in_loop(name##_body, NULL);                                                                \
    }                                                                                              \
    static void name##_body(void *arg)

static const struct copy_opts plain = {.sparse_bytes = 4096};

static void commit_into(const char *format) {
    struct err e AUTO_ERR = ERR_INIT;
    create("base", format, 8 * MIB, NULL, NULL);
    struct node *top = snapshot_of("base", format);
    must(commit_run_co(top, &plain, &e), &e);
    assert_false(node_is_rw(top->backing));
    expect_all(top);
    node_unref_co(top);
    struct node *n = open_image("base", format, 0);
    expect_all(n);
    node_unref_co(n);
}

TASK_TEST(commit_into_raw) {
    commit_into("raw");
}
TASK_TEST(commit_into_qcow2) {
    commit_into("qcow2");
}

TASK_TEST(cancelled_commit_leaves_the_overlay_whole_and_can_be_run_again) {
    struct err e AUTO_ERR = ERR_INIT;
    bool cancel = true;
    struct copy_opts o = plain;
    o.cancel = &cancel;
    create("base", "raw", 8 * MIB, NULL, NULL);
    struct node *top = snapshot_of("base", "raw");
    assert_int_equal(commit_run_co(top, &o, &e), -ECANCELED);
    assert_false(node_is_rw(top->backing));
    expect_all(top);
    cancel = false;
    err_clear(&e);
    must(commit_run_co(top, &o, &e), &e);
    must(commit_run_co(top, &o, &e), &e);
    expect_all(top);
    node_unref_co(top);
    struct node *n = open_image("base", "raw", 0);
    expect_all(n);
    node_unref_co(n);
}

static void commit_grows(const char *format) {
    struct err e AUTO_ERR = ERR_INIT;
    create("base", format, MIB, NULL, NULL);
    struct node *n = open_image("base", format, OPEN_RW);
    fill(n, 0, MIB, 1);
    node_unref_co(n);
    create("top", "qcow2", 5 * MIB, "base", format);
    n = open_image("top", "qcow2", OPEN_RW);
    fill(n, 3 * MIB, MIB, 4);
    must(commit_run_co(n, &plain, &e), &e);
    expect(n, MIB, 2 * MIB, 0);
    node_unref_co(n);
    n = open_image("base", format, 0);
    assert_int_equal(n->size, 5 * MIB);
    expect(n, 0, MIB, 1);
    expect(n, MIB, 2 * MIB, 0);
    expect(n, 3 * MIB, MIB, 4);
    expect(n, 4 * MIB, MIB, 0);
    node_unref_co(n);
}

TASK_TEST(commit_grows_a_smaller_raw_base) {
    commit_grows("raw");
}
TASK_TEST(commit_grows_a_smaller_qcow2_base) {
    commit_grows("qcow2");
}

TASK_TEST(commit_of_a_smaller_overlay_keeps_the_rest_of_the_base) {
    struct err e AUTO_ERR = ERR_INIT;
    create("base", "raw", 5 * MIB, NULL, NULL);
    struct node *n = open_image("base", "raw", OPEN_RW);
    fill(n, 0, 5 * MIB, 1);
    node_unref_co(n);
    create("top", "qcow2", 2 * MIB, "base", "raw");
    n = open_image("top", "qcow2", OPEN_RW);
    fill(n, MIB, 4096, 2);
    must(commit_run_co(n, &plain, &e), &e);
    node_unref_co(n);
    n = open_image("base", "raw", 0);
    assert_int_equal(n->size, 5 * MIB);
    expect(n, MIB, 4096, 2);
    expect(n, MIB + 4096, 4 * MIB - 4096, 1);
    node_unref_co(n);
}

TASK_TEST(commit_writes_only_what_the_top_layer_holds) {
    struct err e AUTO_ERR = ERR_INIT;
    create("base", "raw", 4 * MIB, NULL, NULL);
    create("mid", "qcow2", 4 * MIB, "base", "raw");
    create("top", "qcow2", 4 * MIB, "mid", "qcow2");
    struct node *n = open_image("mid", "qcow2", OPEN_RW);
    fill(n, 0, MIB, 1);
    node_unref_co(n);
    n = open_image("top", "qcow2", OPEN_RW);
    fill(n, 2 * MIB, MIB, 2);
    must(commit_run_co(n, &plain, &e), &e);
    node_unref_co(n);
    n = open_image("mid", "qcow2", OPEN_NO_BACKING);
    struct status st;
    assert_int_equal(disk_status_co(n, MIB, 3 * MIB, STATUS_TOP_ONLY, &st), 0);
    assert_false(st.present);
    assert_int_equal(st.length, MIB);
    expect(n, 0, MIB, 1);
    expect(n, 2 * MIB, MIB, 2);
    node_unref_co(n);
    n = open_image("base", "raw", 0);
    expect(n, 0, 4 * MIB, 0);
    node_unref_co(n);
}

/* The base grows over a longer file below it, whose content must not come up. */
TASK_TEST(commit_growing_over_a_longer_backing_file_keeps_zeros) {
    struct err e AUTO_ERR = ERR_INIT;
    const uint64_t odd = MIB + 5120;
    create("base", "raw", 4 * MIB, NULL, NULL);
    struct node *n = open_image("base", "raw", OPEN_RW);
    fill(n, 0, 4 * MIB, 9);
    node_unref_co(n);
    create("mid", "qcow2", odd, "base", "raw");
    create("top", "qcow2", 6 * MIB, "mid", "qcow2");
    n = open_image("top", "qcow2", OPEN_RW);
    fill(n, 3 * MIB, 4096, 2);
    must(commit_run_co(n, &plain, &e), &e);
    for (int i = 0; i < 2; i++) {
        expect(n, 0, odd, 9);
        expect(n, odd, 3 * MIB - odd, 0);
        expect(n, 3 * MIB, 4096, 2);
        expect(n, 3 * MIB + 4096, 3 * MIB - 4096, 0);
        node_unref_co(n);
        n = open_image("mid", "qcow2", 0);
    }
    node_unref_co(n);
}

TASK_TEST(commit_growing_over_a_longer_backing_file_needs_a_writable_overlay) {
    struct err e AUTO_ERR = ERR_INIT;
    create("base", "raw", 4 * MIB, NULL, NULL);
    create("mid", "qcow2", MIB, "base", "raw");
    create("top", "qcow2", 4 * MIB, "mid", "qcow2");
    struct node *n = open_image("top", "qcow2", 0);
    assert_int_equal(commit_run_co(n, &plain, &e), -EROFS);
    assert_int_equal(n->backing->size, MIB);
    node_unref_co(n);
}

TASK_TEST(commit_without_a_base_says_so) {
    struct err e AUTO_ERR = ERR_INIT;
    create("base", "qcow2", MIB, NULL, NULL);
    struct node *n = open_image("base", "qcow2", OPEN_RW);
    assert_int_equal(commit_run_co(n, &plain, &e), -EINVAL);
    assert_non_null(strstr(err_text(&e), "no backing file"));
    node_unref_co(n);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(commit_into_raw),
        cmocka_unit_test(commit_into_qcow2),
        cmocka_unit_test(cancelled_commit_leaves_the_overlay_whole_and_can_be_run_again),
        cmocka_unit_test(commit_grows_a_smaller_raw_base),
        cmocka_unit_test(commit_grows_a_smaller_qcow2_base),
        cmocka_unit_test(commit_of_a_smaller_overlay_keeps_the_rest_of_the_base),
        cmocka_unit_test(commit_writes_only_what_the_top_layer_holds),
        cmocka_unit_test(commit_growing_over_a_longer_backing_file_keeps_zeros),
        cmocka_unit_test(commit_growing_over_a_longer_backing_file_needs_a_writable_overlay),
        cmocka_unit_test(commit_without_a_base_says_so),
    };
    strcpy(folder, "/var/tmp/strata-commit-XXXXXX");
    if (!mkdtemp(folder))
        return 1;
    int r = cmocka_run_group_tests(tests, NULL, NULL);
    for (int i = 0; i < 3; i++) {
        char *p AUTO_FREE = path((const char *[]){"base", "mid", "top"}[i]);
        unlink(p);
    }
    rmdir(folder);
    return r;
}
