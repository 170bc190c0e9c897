/* SPDX-License-Identifier: MIT */
/* Checked arithmetic at its edges. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/ck.h"
#include "base/list.h"

static void sums_and_products_that_do_not_fit_leave_the_result(void **state) {
    uint64_t v = 7;
    assert_false(ck_add(UINT64_MAX, (uint64_t)1, &v));
    assert_false(ck_mul(UINT64_MAX / 2 + 1, (uint64_t)2, &v));
    assert_false(ck_sub((uint64_t)1, (uint64_t)2, &v));
    assert_int_equal(v, 7);
    assert_true(ck_add(UINT64_MAX - 1, (uint64_t)1, &v));
    assert_true(v == UINT64_MAX);
    uint32_t small = 7;
    assert_false(ck_add((uint64_t)UINT32_MAX, (uint64_t)1, &small));
    assert_int_equal(small, 7);
}

static void aligning(void **state) {
    uint64_t v = 7;
    assert_true(ck_align_up(1, 512, &v));
    assert_int_equal(v, 512);
    assert_true(ck_align_up(512, 512, &v));
    assert_int_equal(v, 512);
    assert_false(ck_align_up(UINT64_MAX - 510, 512, &v));
    assert_int_equal(v, 512);
    assert_int_equal(align_down(1023, 512), 512);
    assert_int_equal(align_up(513, 512), 1024);
    assert_true(is_aligned(1024, 512));
    assert_false(is_aligned(1025, 512));
}

static void powers_and_division(void **state) {
    assert_false(is_pow2(0));
    assert_true(is_pow2(1));
    assert_false(is_pow2(3));
    assert_true(is_pow2((uint64_t)1 << 63));
    assert_int_equal(div_up(0, 5), 0);
    assert_int_equal(div_up(5, 5), 1);
    assert_int_equal(div_up(6, 5), 2);
    assert_true(div_up(UINT64_MAX, 2) == (uint64_t)1 << 63);
}

static void ranges_that_touch_do_not_overlap(void **state) {
    assert_false(ranges_overlap(0, 10, 10, 5));
    assert_true(ranges_overlap(0, 11, 10, 5));
    assert_true(ranges_overlap(10, 5, 0, 100));
    assert_false(ranges_overlap(20, 5, 0, 20));
}

struct item {
    int v;
    struct list link;
};

static void lists_keep_their_order(void **state) {
    struct list head = LIST_HEAD_INIT(head);
    struct item a = {1}, b = {2}, c = {3};
    list_push_back(&head, &b.link);
    list_push_back(&head, &c.link);
    list_push_front(&head, &a.link);
    int want = 1;
    list_for_each(it, &head) assert_int_equal(list_entry(it, struct item, link)->v, want++);
    list_remove(&b.link);
    list_remove(&b.link);
    assert_ptr_equal(list_pop_front(&head), &a.link);
    assert_ptr_equal(list_pop_front(&head), &c.link);
    assert_null(list_pop_front(&head));
    assert_true(list_empty(&head));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sums_and_products_that_do_not_fit_leave_the_result),
        cmocka_unit_test(aligning),
        cmocka_unit_test(powers_and_division),
        cmocka_unit_test(ranges_that_touch_do_not_overlap),
        cmocka_unit_test(lists_keep_their_order),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
