/* SPDX-License-Identifier: MIT */
/*
 * The copy and compare engines over memory disks, and over a storage driver of this test's own
 * that notes each write and fails where it is told to.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "disk/engine.h"
#include "job/compare.h"
#include "job/copy.h"
#include "job/copy_int.h"
#include "runtime/loop.h"

/* ---------------------------------------------------------------- a storage that tells */

enum { NOTES_MAX = 4096 };
struct probe_state {
    uint8_t *bytes;
    uint64_t fail_from, fail_to; /* reads that touch this fail with EIO */
    uint64_t wfail_from;         /* writes at or behind this fail with ENOSPC; 0: none */
    bool uneven;                 /* some reads take longer than others */
    unsigned notes;
    struct {
        uint64_t offset, length;
    } note[NOTES_MAX];
};

static int probe_preadv_co(struct node *n, uint64_t off, uint64_t len, const struct iovec *iov,
                           int niov, unsigned flags) {
    struct probe_state *s = n->state;
    if (off < s->fail_to && off + len > s->fail_from)
        return -EIO;
    if (s->uneven && off / MIB % 3 == 0)
        loop_sleep_co(3 * 1000 * 1000);
    for (int i = 0; i < niov; off += iov[i++].iov_len)
        memcpy(iov[i].iov_base, s->bytes + off, iov[i].iov_len);
    return 0;
}

static int probe_pwritev_co(struct node *n, uint64_t off, uint64_t len, const struct iovec *iov,
                            int niov, unsigned flags) {
    struct probe_state *s = n->state;
    if (s->notes < NOTES_MAX) {
        s->note[s->notes].offset = off;
        s->note[s->notes++].length = len;
    }
    if (s->wfail_from && off + len > s->wfail_from)
        return -ENOSPC;
    for (int i = 0; i < niov; off += iov[i++].iov_len)
        memcpy(s->bytes + off, iov[i].iov_base, iov[i].iov_len);
    return 0;
}

static void probe_close_co(struct node *n) {
    struct probe_state *s = n->state;
    free(s->bytes);
}

static const struct storage_ops probe_storage = {.preadv_co = probe_preadv_co,
                                                 .pwritev_co = probe_pwritev_co};
static const struct driver probe_driver = {.name = "probe",
                                           .kind = DRIVER_STORAGE,
                                           .state_size = sizeof(struct probe_state),
                                           .close_co = probe_close_co,
                                           .storage = &probe_storage};

static struct node *probe_new(uint64_t size, struct probe_state **state) {
    struct node *n = node_new(&probe_driver);
    n->filename = strdup("probe");
    n->flags = NODE_RW;
    n->perm = PERM_ALL;
    n->size = size;
    n->granularity = n->request_align = 1;
    *state = n->state;
    (*state)->bytes = calloc(1, size);
    return n;
}

/* ---------------------------------------------------------------- helpers */

static struct node *memory_new(uint64_t size) {
    struct create_ctx ctx = {.name = "memory:", .size = size};
    struct node *n;
    struct err e AUTO_ERR = ERR_INIT;
    if (storage_create_co(&ctx, &n, &e) < 0)
        fail_msg("memory: %s", err_text(&e));
    assert_int_equal(n->size, size);
    return n;
}

static void fill(struct node *n, uint64_t offset, size_t len, unsigned seed) {
    uint8_t *b = malloc(len);
    for (size_t i = 0; i < len; i++)
        b[i] = 1 + (seed = seed * 1103515245 + 12345) / 65536 % 255;
    assert_int_equal(disk_pwrite_co(n, offset, b, len), 0);
    free(b);
}

static uint8_t *slurp(struct node *n, uint64_t offset, size_t len) {
    uint8_t *b = malloc(len);
    assert_int_equal(disk_pread_co(n, offset, b, len), 0);
    return b;
}

static void assert_same(struct node *a, uint64_t a_off, struct node *b, uint64_t b_off,
                        size_t len) {
    uint8_t *x = slurp(a, a_off, len), *y = slurp(b, b_off, len);
    assert_memory_equal(x, y, len);
    free(x);
    free(y);
}

static uint64_t data_bytes(struct node *n) {
    uint64_t total = 0;
    for (uint64_t pos = 0; pos < n->size;) {
        struct status st;
        assert_int_equal(disk_status_co(n, pos, n->size - pos, STATUS_PRECISE, &st), 0);
        total += st.zero ? 0 : st.length;
        pos += st.length;
    }
    return total;
}

static const struct copy_opts fresh = {
    .in_order = true, .sparse_bytes = 4096, .target_is_zero = true};

static void copy_ok(struct node *a, struct node *b, uint64_t len, uint64_t at,
                    const struct copy_opts *o) {
    struct err e AUTO_ERR = ERR_INIT;
    if (copy_run_co(a, b, len, at, o, &e) < 0)
        fail_msg("copy: %s", err_text(&e));
    assert_int_equal(e.code, 0);
}

/* Every test body runs as a task of a fresh loop. */
static void in_loop(void (*body)(void *)) {
    struct loop *l;
    struct err e AUTO_ERR = ERR_INIT;
    assert_int_equal(loop_new(LOOP_AUTO, &l, &e), 0);
    loop_run(l, body, NULL);
    loop_free(l);
}
#define TASK_TEST(name)                                                                            \
    static void name##_body(void *arg);                                                            \
    static void name(void **state) {                                                               \
        in_loop(name##_body);                                                                      \
    }                                                                                              \
    static void name##_body(void *arg)

/* ---------------------------------------------------------------- copy */

TASK_TEST(copy_keeps_content_and_holes) {
    struct node *a = memory_new(64 * MIB), *b = memory_new(64 * MIB);
    fill(a, 0, 3 * MIB, 1);
    fill(a, 20 * MIB + 64 * KIB, 64 * KIB, 2);
    fill(a, 63 * MIB, MIB, 3);
    copy_ok(a, b, a->size, 0, &fresh);
    assert_same(a, 0, b, 0, a->size);
    assert_int_equal(data_bytes(b), data_bytes(a));
    node_unref_co(a);
    node_unref_co(b);
}

TASK_TEST(copy_turns_written_zeros_into_holes) {
    struct node *a = memory_new(8 * MIB), *b = memory_new(8 * MIB);
    uint8_t *z = calloc(1, 4 * MIB);
    fill(a, 0, 8 * MIB, 1);
    assert_int_equal(disk_pwrite_co(a, 2 * MIB, z, 4 * MIB), 0);
    free(z);
    assert_int_equal(data_bytes(a), 8 * MIB);
    copy_ok(a, b, a->size, 0, &fresh);
    assert_same(a, 0, b, 0, a->size);
    assert_int_equal(data_bytes(b), 4 * MIB);
    node_unref_co(a);
    node_unref_co(b);
}

TASK_TEST(copy_without_zero_detection_writes_everything) {
    struct probe_state *s;
    struct node *a = memory_new(4 * MIB + 513), *b = probe_new(4 * MIB + 513, &s);
    struct copy_opts o = fresh;
    o.sparse_bytes = 0;
    fill(a, MIB, MIB, 1);
    memset(s->bytes, 7, b->size);
    copy_ok(a, b, a->size, 0, &o);
    uint64_t written = 0;
    for (unsigned i = 0; i < s->notes; i++)
        written += s->note[i].length;
    assert_int_equal(written, b->size);
    assert_same(a, 0, b, 0, a->size);
    node_unref_co(a);
    node_unref_co(b);
}

TASK_TEST(copy_at_odd_offsets_and_lengths) {
    struct node *a = memory_new(3 * MIB + 513), *b = memory_new(8 * MIB);
    struct copy_opts o = fresh;
    o.target_is_zero = false;
    fill(a, 1000, 2 * MIB, 1);
    fill(b, 0, 8 * MIB, 2);
    struct node *old = memory_new(8 * MIB);
    copy_ok(b, old, 8 * MIB, 0, &fresh);
    copy_ok(a, b, a->size, 777, &o);
    assert_same(a, 0, b, 777, a->size);
    assert_same(old, 0, b, 0, 777);
    assert_same(old, 777 + a->size, b, 777 + a->size, b->size - a->size - 777);
    node_unref_co(a);
    node_unref_co(b);
    node_unref_co(old);
}

TASK_TEST(copy_zeroes_what_the_target_held) {
    struct node *a = memory_new(16 * MIB), *b = memory_new(16 * MIB);
    struct copy_opts o = fresh;
    o.target_is_zero = false;
    fill(a, 5 * MIB, 4096, 1);
    fill(b, 0, 16 * MIB, 2);
    copy_ok(a, b, a->size, 0, &o);
    assert_same(a, 0, b, 0, a->size);
    assert_true(data_bytes(b) <= 128 * KIB);
    node_unref_co(a);
    node_unref_co(b);
}

TASK_TEST(copy_begins_writes_in_ascending_order) {
    struct probe_state *s, *slow;
    struct node *a = probe_new(32 * MIB, &slow), *b = probe_new(32 * MIB, &s);
    fill(a, 0, 32 * MIB, 1);
    slow->uneven = true;
    copy_ok(a, b, a->size, 0, &fresh);
    assert_same(a, 0, b, 0, a->size);
    assert_true(s->notes >= 32);
    for (unsigned i = 1; i < s->notes; i++)
        assert_true(s->note[i].offset > s->note[i - 1].offset);
    node_unref_co(a);
    node_unref_co(b);
}

TASK_TEST(copy_out_of_order_does_not_wait_for_the_slow) {
    struct probe_state *s, *slow;
    struct node *a = probe_new(32 * MIB, &slow), *b = probe_new(32 * MIB, &s);
    struct copy_opts o = fresh;
    bool ascending = true;
    o.in_order = false;
    fill(a, 0, 32 * MIB, 1);
    slow->uneven = true;
    copy_ok(a, b, a->size, 0, &o);
    slow->uneven = false;
    assert_same(a, 0, b, 0, a->size);
    for (unsigned i = 1; i < s->notes; i++)
        ascending &= s->note[i].offset > s->note[i - 1].offset;
    assert_false(ascending);
    node_unref_co(a);
    node_unref_co(b);
}

/* Scattered small data: still no unit of the target is written twice or in parts. */
static void writes_are_whole_units(uint64_t at) {
    const uint64_t unit = 64 * KIB;
    struct probe_state *s;
    struct node *a = memory_new(24 * MIB), *b = probe_new(32 * MIB, &s);
    b->granularity = unit;
    for (unsigned i = 0; i < 100; i++)
        fill(a, (uint64_t)i * 230 * KIB + i * 31, 1 + i * 977 % 9000, i);
    fill(a, 0, 3 * MIB + 4096, 7);
    copy_ok(a, b, a->size, at, &fresh);
    assert_same(a, 0, b, at, a->size);
    assert_true(s->notes > 10);
    for (unsigned i = 0; i < s->notes; i++) {
        uint64_t from = s->note[i].offset, to = from + s->note[i].length;
        assert_true(from % unit == 0 || from == at);
        assert_true(to % unit == 0 || to == at + a->size);
        for (unsigned k = 0; k < i; k++)
            assert_false(ranges_overlap(from, to - from, s->note[k].offset, s->note[k].length));
    }
    node_unref_co(a);
    node_unref_co(b);
}
TASK_TEST(copy_writes_whole_units) {
    writes_are_whole_units(0);
}
TASK_TEST(copy_writes_whole_units_at_an_odd_offset) {
    writes_are_whole_units(777);
}

TASK_TEST(copy_read_error_names_side_and_place) {
    struct probe_state *s;
    struct node *a = probe_new(8 * MIB, &s), *b = memory_new(8 * MIB);
    struct err e AUTO_ERR = ERR_INIT;
    memset(s->bytes, 1, a->size);
    s->fail_from = 5 * MIB + 4096;
    s->fail_to = s->fail_from + 1;
    assert_int_equal(copy_run_co(a, b, a->size, 0, &fresh, &e), -EIO);
    assert_string_equal(err_text(&e), "reading probe at offset 5242880: Input/output error");
    node_unref_co(a);
    node_unref_co(b);
}

TASK_TEST(copy_write_error_ends_the_copy) {
    struct probe_state *s;
    struct node *a = memory_new(32 * MIB), *b = probe_new(32 * MIB, &s);
    struct err e AUTO_ERR = ERR_INIT;
    fill(a, 0, 32 * MIB, 1);
    s->wfail_from = 4 * MIB + 1;
    assert_int_equal(copy_run_co(a, b, a->size, 0, &fresh, &e), -ENOSPC);
    assert_string_equal(err_text(&e),
                        "writing to probe at offset 4194304: No space left on device");
    assert_true(s->notes < 31);
    node_unref_co(a);
    node_unref_co(b);
}

struct damage {
    unsigned n;
    uint64_t offset, length;
};
static void on_damage(void *arg, uint64_t offset, uint64_t length, int error) {
    struct damage *d = arg;
    d->n++;
    d->offset = offset;
    d->length = length;
    assert_int_equal(error, EIO);
}

TASK_TEST(salvage_zeroes_only_unreadable_sectors) {
    struct probe_state *s;
    struct node *a = probe_new(4 * MIB, &s), *b = memory_new(4 * MIB);
    struct damage d = {0};
    struct copy_opts o = fresh;
    o.salvage = true;
    o.damaged = on_damage;
    o.arg = &d;
    memset(s->bytes, 9, a->size);
    s->fail_from = MIB + 5000;
    s->fail_to = MIB + 9000;
    copy_ok(a, b, a->size, 0, &o);
    assert_int_equal(d.n, 1);
    assert_int_equal(d.offset, MIB + 4608);
    assert_int_equal(d.length, 4608);
    s->fail_to = s->fail_from = 0;
    memset(s->bytes + MIB + 4608, 0, 4608);
    assert_same(a, 0, b, 0, a->size);
    node_unref_co(a);
    node_unref_co(b);
}

TASK_TEST(cancelled_copy_says_so) {
    struct node *a = memory_new(4 * MIB), *b = memory_new(4 * MIB);
    bool cancel = true;
    struct copy_opts o = fresh;
    struct err e AUTO_ERR = ERR_INIT;
    o.cancel = &cancel;
    fill(a, 0, 4 * MIB, 1);
    assert_int_equal(copy_run_co(a, b, a->size, 0, &o, &e), -ECANCELED);
    assert_int_equal(data_bytes(b), 0);
    node_unref_co(a);
    node_unref_co(b);
}

struct seen {
    unsigned n;
    struct copy_progress last;
};
static void on_progress(void *arg, const struct copy_progress *p) {
    struct seen *s = arg;
    assert_true(p->done >= s->last.done && p->done <= p->total);
    s->last = *p;
    s->n++;
}

TASK_TEST(progress_counts_data_only_and_ends_full) {
    struct node *a = memory_new(1 * GIB), *b = memory_new(1 * GIB);
    struct seen s = {0};
    struct copy_opts o = fresh;
    o.progress = on_progress;
    o.arg = &s;
    fill(a, 512 * MIB, 4 * MIB, 1);
    copy_ok(a, b, a->size, 0, &o);
    assert_true(s.n >= 2);
    assert_int_equal(s.last.total, 4 * MIB);
    assert_int_equal(s.last.done, 4 * MIB);
    node_unref_co(a);
    node_unref_co(b);
}

TASK_TEST(rate_limit_takes_its_time) {
    struct node *a = memory_new(4 * MIB), *b = memory_new(4 * MIB);
    struct copy_opts o = fresh;
    o.rate_bytes = 16 * MIB;
    fill(a, 0, 4 * MIB, 1);
    int64_t t = loop_now_ns(loop_self());
    copy_ok(a, b, a->size, 0, &o);
    t = loop_now_ns(loop_self()) - t;
    /* The first window is free; the other three take a sixteenth of a second each. */
    assert_true(t >= 180 * 1000 * 1000);
    node_unref_co(a);
    node_unref_co(b);
}

TASK_TEST(bad_requests_are_refused_with_both_numbers) {
    struct node *a = memory_new(MIB), *b = memory_new(MIB);
    struct copy_opts o = fresh;
    struct err e AUTO_ERR = ERR_INIT;
    assert_int_equal(copy_run_co(a, b, MIB + 1, 0, &o, &e), -EINVAL);
    assert_int_equal(copy_run_co(a, b, MIB, 1, &o, &e), -ENOSPC);
    assert_int_equal(copy_run_co(a, b, MIB, UINT64_MAX, &o, &e), -ENOSPC);
    o.compress = true;
    assert_int_equal(copy_run_co(a, b, MIB, 0, &o, &e), -ENOTSUP);
    node_unref_co(a);
    node_unref_co(b);
}

TASK_TEST(empty_copy_does_nothing) {
    struct node *a = memory_new(0), *b = memory_new(0);
    copy_ok(a, b, 0, 0, &fresh);
    node_unref_co(a);
    node_unref_co(b);
}

TASK_TEST(scattered_data_survives) {
    struct node *a = memory_new(64 * MIB), *b = memory_new(64 * MIB);
    for (unsigned i = 0; i < 400; i++)
        fill(a, (uint64_t)i * 160 * KIB, 1 + i * 37 % 5000, i);
    copy_ok(a, b, a->size, 0, &fresh);
    assert_same(a, 0, b, 0, a->size);
    node_unref_co(a);
    node_unref_co(b);
}

static void scan_marks_whole_zero_blocks_only(void **state) {
    static uint8_t buf[16384 + 100];
    struct copy_zero_map map;
    memset(&map, 0xff, sizeof(map));
    memset(buf, 0, sizeof(buf));
    buf[4096] = 1;  /* first byte of block 1 */
    buf[12287] = 1; /* last byte of block 2 */
    copy_scan(buf, 0, sizeof(buf), 4096, &map);
    assert_int_equal(map.bits[0] & 0x1f, 0x19);
    /* The same bytes 100 further into the target: blocks are the target's. */
    copy_scan(buf, 100, sizeof(buf), 4096, &map);
    assert_int_equal(map.bits[0] & 0x1f, 0x15);
    buf[3995] = 1; /* last byte of the first, short block */
    copy_scan(buf, 100, sizeof(buf), 4096, &map);
    assert_int_equal(map.bits[0] & 0x1f, 0x14);
}

/* ---------------------------------------------------------------- compare */

static struct compare_result compare_ok(struct node *a, struct node *b, bool strict) {
    struct compare_opts o = {.strict = strict};
    struct compare_result r;
    struct err e AUTO_ERR = ERR_INIT;
    if (compare_run_co(a, b, &o, &r, &e) < 0)
        fail_msg("compare: %s", err_text(&e));
    return r;
}

TASK_TEST(compare_finds_the_first_of_many_differences) {
    struct node *a = memory_new(32 * MIB), *b = memory_new(32 * MIB);
    fill(a, 0, 32 * MIB, 1);
    copy_ok(a, b, a->size, 0, &fresh);
    assert_int_equal(compare_ok(a, b, true).verdict, COMPARE_SAME);
    for (uint64_t at = 31 * MIB + 7; at > 9 * MIB; at -= MIB)
        assert_int_equal(disk_pwrite_co(b, at, "\0", 1), 0);
    struct compare_result r = compare_ok(a, b, false);
    assert_int_equal(r.verdict, COMPARE_CONTENT);
    assert_int_equal(r.offset, 9 * MIB + 7);
    node_unref_co(a);
    node_unref_co(b);
}

TASK_TEST(compare_takes_holes_and_written_zeros_for_equal) {
    struct node *a = memory_new(8 * MIB), *b = memory_new(8 * MIB);
    uint8_t *z = calloc(1, MIB);
    assert_int_equal(disk_pwrite_co(b, 2 * MIB, z, MIB), 0);
    free(z);
    assert_int_equal(compare_ok(a, b, false).verdict, COMPARE_SAME);
    struct compare_result r = compare_ok(a, b, true);
    assert_int_equal(r.verdict, COMPARE_ALLOCATION);
    assert_int_equal(r.offset, 2 * MIB);
    fill(b, 2 * MIB + 4097, 1, 5);
    r = compare_ok(a, b, false);
    assert_int_equal(r.verdict, COMPARE_CONTENT);
    assert_int_equal(r.offset, 2 * MIB + 4097);
    node_unref_co(a);
    node_unref_co(b);
}

TASK_TEST(compare_of_different_sizes_looks_at_the_tail) {
    struct node *a = memory_new(4 * MIB), *b = memory_new(4 * MIB + 512);
    fill(a, 0, MIB, 1);
    fill(b, 0, MIB, 1);
    assert_int_equal(compare_ok(a, b, false).verdict, COMPARE_SAME);
    assert_int_equal(compare_ok(a, b, true).verdict, COMPARE_SIZE);
    fill(b, 4 * MIB + 511, 1, 1);
    struct compare_result r = compare_ok(b, a, false);
    assert_int_equal(r.verdict, COMPARE_CONTENT);
    assert_int_equal(r.offset, 4 * MIB + 511);
    node_unref_co(a);
    node_unref_co(b);
}

TASK_TEST(compare_prefers_a_difference_before_an_error) {
    struct probe_state *s;
    struct node *a = probe_new(8 * MIB, &s), *b = memory_new(8 * MIB);
    struct compare_opts o = {0};
    struct compare_result r;
    struct err e AUTO_ERR = ERR_INIT;
    s->fail_from = 5 * MIB;
    s->fail_to = 5 * MIB + 1;
    assert_int_equal(compare_run_co(a, b, &o, &r, &e), -EIO);
    assert_int_equal(r.stage, COMPARE_READ);
    s->bytes[100] = 1;
    assert_int_equal(compare_run_co(a, b, &o, &r, &e), 0);
    assert_int_equal(r.verdict, COMPARE_CONTENT);
    assert_int_equal(r.offset, 100);
    node_unref_co(a);
    node_unref_co(b);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(copy_keeps_content_and_holes),
        cmocka_unit_test(copy_turns_written_zeros_into_holes),
        cmocka_unit_test(copy_without_zero_detection_writes_everything),
        cmocka_unit_test(copy_at_odd_offsets_and_lengths),
        cmocka_unit_test(copy_zeroes_what_the_target_held),
        cmocka_unit_test(copy_begins_writes_in_ascending_order),
        cmocka_unit_test(copy_out_of_order_does_not_wait_for_the_slow),
        cmocka_unit_test(copy_writes_whole_units),
        cmocka_unit_test(copy_writes_whole_units_at_an_odd_offset),
        cmocka_unit_test(copy_read_error_names_side_and_place),
        cmocka_unit_test(copy_write_error_ends_the_copy),
        cmocka_unit_test(salvage_zeroes_only_unreadable_sectors),
        cmocka_unit_test(cancelled_copy_says_so),
        cmocka_unit_test(progress_counts_data_only_and_ends_full),
        cmocka_unit_test(rate_limit_takes_its_time),
        cmocka_unit_test(bad_requests_are_refused_with_both_numbers),
        cmocka_unit_test(empty_copy_does_nothing),
        cmocka_unit_test(scattered_data_survives),
        cmocka_unit_test(scan_marks_whole_zero_blocks_only),
        cmocka_unit_test(compare_finds_the_first_of_many_differences),
        cmocka_unit_test(compare_takes_holes_and_written_zeros_for_equal),
        cmocka_unit_test(compare_of_different_sizes_looks_at_the_tail),
        cmocka_unit_test(compare_prefers_a_difference_before_an_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
