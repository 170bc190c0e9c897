/* SPDX-License-Identifier: MIT */
/* Scatter lists against one flat buffer. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>
#include "base/iov.h"

/* A list of pieces 3, 0, 5, 1, 8 of one flat 17-byte buffer, which is the model. */
static char flat[17];
static const struct iovec list[] = {
    {flat, 3}, {flat + 3, 0}, {flat + 3, 5}, {flat + 8, 1}, {flat + 9, 8}};
enum { N = 5, LEN = 17 };

static void refill(void) {
    for (int i = 0; i < LEN; i++)
        flat[i] = 'a' + i;
}

static void length_is_the_sum(void **state) {
    assert_int_equal(iov_length(list, N), LEN);
    assert_int_equal(iov_length(list, 0), 0);
}

static void every_slice_matches_the_model(void **state) {
    refill();
    for (size_t off = 0; off <= LEN; off++)
        for (size_t len = 0; off + len <= LEN; len++) {
            struct iovec out[N];
            int n = iov_slice(list, N, off, len, out);
            assert_in_range(n, 0, N);
            assert_int_equal(iov_length(out, n), len);
            char got[LEN];
            iov_to_buf(out, n, 0, got, len);
            assert_memory_equal(got, flat + off, len);
        }
}

static void from_buf_and_zero_touch_only_the_range(void **state) {
    for (size_t off = 0; off <= LEN; off++)
        for (size_t len = 0; off + len <= LEN; len++) {
            refill();
            char want[LEN], src[LEN];
            memcpy(want, flat, LEN);
            memset(src, '#', LEN);
            memset(want + off, '#', len);
            iov_from_buf(list, N, off, src, len);
            assert_memory_equal(flat, want, LEN);
            memset(want + off, 0, len);
            iov_zero(list, N, off, len);
            assert_memory_equal(flat, want, LEN);
        }
}

static void is_zero_sees_only_the_range(void **state) {
    memset(flat, 0, LEN);
    flat[8] = 1;
    assert_true(iov_is_zero(list, N, 0, 8));
    assert_true(iov_is_zero(list, N, 9, 8));
    assert_false(iov_is_zero(list, N, 7, 3));
    assert_true(iov_is_zero(list, N, 8, 0));
}

static void alignment_covers_base_and_length(void **state) {
    static _Alignas(64) char buf[256];
    assert_true(iov_aligned((struct iovec[]){{buf, 64}, {buf + 128, 128}}, 2, 64));
    assert_false(iov_aligned((struct iovec[]){{buf + 8, 64}}, 1, 64));
    assert_false(iov_aligned((struct iovec[]){{buf, 72}}, 1, 64));
    assert_true(iov_aligned((struct iovec[]){{buf + 1, 3}}, 1, 1));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(length_is_the_sum),
        cmocka_unit_test(every_slice_matches_the_model),
        cmocka_unit_test(from_buf_and_zero_touch_only_the_range),
        cmocka_unit_test(is_zero_sees_only_the_range),
        cmocka_unit_test(alignment_covers_base_and_length),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
