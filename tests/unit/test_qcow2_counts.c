/* SPDX-License-Identifier: MIT */
/* Reference counts of `check`: against a plain array, and at the edges of pages and widths. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include "base/ck.h"
#include "format/qcow2/counts.h"

enum { N = 20000 };

static uint64_t rng = 0x5eed;
static uint64_t rnd(void) {
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return rng;
}

static void fresh_counts_are_zero(void **st) {
    struct counts c;
    assert_int_equal(counts_init(&c, N), 0);
    assert_true(counts_all_zero(&c, 0, N));
    assert_false(counts_all_one(&c, 5, 1));
    assert_int_equal(counts_last(&c, N), UINT64_MAX);
    counts_free(&c);
}

static void too_many_clusters_are_refused(void **st) {
    struct counts c;
    assert_int_equal(counts_init(&c, COUNTS_CLUSTERS_MAX + 1), -EFBIG);
    counts_free(&c);
}

static void ranges_match_a_plain_array(void **st) {
    static uint64_t plain[N];
    struct counts c;
    assert_int_equal(counts_init(&c, N), 0);
    memset(plain, 0, sizeof(plain));
    for (unsigned turn = 0; turn < 3000; turn++) {
        uint64_t first = rnd() % N, n = rnd() % (rnd() % 8 ? 40 : 9000), by = 1;
        n = n < N - first ? n : N - first;
        if (turn > 300 && rnd() % 4 == 0)
            by = rnd() % 300;
        assert_int_equal(counts_add(&c, first, n, by), 0);
        for (uint64_t i = first; i < first + n; i++)
            plain[i] += by;
        bool zero = true, one = true;
        first = rnd() % (N - 200);
        n = rnd() % 200;
        for (uint64_t i = first; i < first + n; i++) {
            zero &= plain[i] == 0;
            one &= plain[i] == 1;
        }
        assert_int_equal(counts_all_zero(&c, first, n), zero);
        assert_int_equal(counts_all_one(&c, first, n), one);
    }
    for (unsigned i = 0; i < N; i++)
        assert_int_equal(counts_get(&c, i), plain[i]);
    counts_free(&c);
}

static void counts_beyond_a_byte_are_exact(void **st) {
    struct counts c;
    assert_int_equal(counts_init(&c, N), 0);
    for (unsigned i = 0; i < 1000; i++)
        assert_int_equal(counts_add(&c, i * 7, 1, 253), 0);
    for (unsigned k = 1; k <= 5; k++)
        for (unsigned i = 0; i < 1000; i++) {
            assert_int_equal(counts_add(&c, i * 7, 1, 1), 0);
            assert_int_equal(counts_get(&c, i * 7), 253 + k);
        }
    assert_int_equal(counts_add(&c, 7, 1, UINT64_MAX - 3), 0);
    assert_int_equal(counts_get(&c, 7), UINT64_MAX);
    counts_free(&c);
}

static void differences_are_found_in_every_representation(void **st) {
    struct counts a, b;
    assert_int_equal(counts_init(&a, N), 0);
    assert_int_equal(counts_init(&b, N), 0);
    assert_int_equal(counts_add(&a, 0, N, 1), 0);
    assert_int_equal(counts_add(&b, 0, N, 1), 0);
    assert_int_equal(counts_difference(&a, &b, 0, N), N);
    assert_int_equal(counts_add(&a, 4096, 1, 1), 0); /* bytes against bits */
    assert_int_equal(counts_difference(&a, &b, 0, N), 4096);
    assert_int_equal(counts_difference(&a, &b, 4097, N), N);
    assert_int_equal(counts_add(&b, 4096, 1, 1), 0);
    assert_int_equal(counts_difference(&a, &b, 0, N), N);
    assert_int_equal(counts_add(&a, 9000, 1, 300), 0); /* both large */
    assert_int_equal(counts_add(&b, 9000, 1, 301), 0);
    assert_int_equal(counts_difference(&a, &b, 0, N), 9000);
    counts_free(&b);
    assert_int_equal(counts_init(&b, N), 0); /* a page against none */
    assert_int_equal(counts_difference(&a, &b, 19999, N), 19999);
    counts_free(&a);
    counts_free(&b);
}

/* A full room counts less of the clusters at a time, and after some windows all of them. */
static void windows_cover_everything_in_bounded_memory(void **st) {
    struct counts_room room = {.max = 6000, .end = UINT64_MAX};
    struct counts a, b;
    unsigned windows = 0;
    assert_int_equal(counts_init(&a, N), 0);
    assert_int_equal(counts_init(&b, N), 0);
    counts_share(&a, &room);
    counts_share(&b, &room);
    for (uint64_t next = 0; next < N; windows++) {
        assert_int_equal(counts_add(&a, 0, N, 1), 0);
        for (uint64_t i = 0; i < N; i += 3) {
            assert_int_equal(counts_add(&b, i, 1, 1 + i % 1000), 0);
            assert_true(room.bytes <= room.max || min_u64(room.end, N) <= room.from + 4096);
        }
        assert_int_equal(room.from, next);
        assert_true(room.end > room.from);
        for (uint64_t i = 0; i < N; i++) {
            bool in = i >= room.from && i < room.end;
            assert_int_equal(counts_get(&a, i), in);
            assert_int_equal(counts_get(&b, i), in && i % 3 == 0 ? 1 + i % 1000 : 0);
        }
        next = room.end;
        counts_room_next(&room);
    }
    assert_in_range(windows, 3, 5);
    counts_free(&a);
    counts_free(&b);
}

static void last_is_the_highest_in_use(void **st) {
    struct counts c;
    assert_int_equal(counts_init(&c, N), 0);
    assert_int_equal(counts_add(&c, 0, 1, 1), 0);
    assert_int_equal(counts_last(&c, N), 0);
    assert_int_equal(counts_add(&c, 8191, 1, 3), 0);
    assert_int_equal(counts_last(&c, N), 8191);
    assert_int_equal(counts_last(&c, 8191), 0);
    counts_free(&c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(fresh_counts_are_zero),
        cmocka_unit_test(too_many_clusters_are_refused),
        cmocka_unit_test(ranges_match_a_plain_array),
        cmocka_unit_test(counts_beyond_a_byte_are_exact),
        cmocka_unit_test(differences_are_found_in_every_representation),
        cmocka_unit_test(windows_cover_everything_in_bounded_memory),
        cmocka_unit_test(last_is_the_highest_in_use),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
