/* SPDX-License-Identifier: MIT */
/* The bits of a dirty bitmap against an array of bools. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <cmocka.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "disk/bitmap.h"
#include "disk/node.h"

static uint64_t rng_state;

static uint64_t rng(uint64_t below) {
    rng_state ^= rng_state << 13;
    rng_state ^= rng_state >> 7;
    rng_state ^= rng_state << 17;
    return (rng_state * UINT64_C(0x2545f4914f6cdd1d) >> 11) % below;
}

static int seed(void **state) {
    const char *s = getenv("STRATA_SEED");
    uint64_t v = s ? strtoull(s, NULL, 0) : (uint64_t)time(NULL);
    printf("# STRATA_SEED=%llu\n", (unsigned long long)v);
    rng_state = v * 2 + 1;
    return 0;
}

static struct bitmap *make(uint64_t size, uint64_t granularity) {
    struct bitmap *b;
    assert_int_equal(bitmap_new(size, granularity, &b, NULL), 0);
    return b;
}

/* One bool a granule. */
struct model {
    uint64_t size, granularity, n;
    bool *set;
};

static void model_init(struct model *m, uint64_t size, uint64_t granularity) {
    m->size = size;
    m->granularity = granularity;
    m->n = div_up(size, granularity);
    m->set = calloc(m->n + 1, sizeof(bool));
}

static void model_set(struct model *m, uint64_t offset, uint64_t length) {
    for (uint64_t i = offset / m->granularity;
         length && i <= (offset + length - 1) / m->granularity; i++)
        m->set[i] = true;
}

/* Whole granules inside, and the last one where the range goes to the end. */
static void model_clear(struct model *m, uint64_t offset, uint64_t length) {
    for (uint64_t i = 0; i < m->n; i++)
        if (i * m->granularity >= offset &&
            min_u64((i + 1) * m->granularity, m->size) <= offset + length)
            m->set[i] = false;
}

static void expect_equal(const struct bitmap *b, const struct model *m) {
    uint64_t bytes = 0, at = 0, start, length;
    for (uint64_t i = 0; i < m->n; i++)
        bytes += m->set[i] ? min_u64(m->granularity, m->size - i * m->granularity) : 0;
    assert_int_equal(bitmap_dirty_bytes(b), bytes);
    for (uint64_t i = 0; i < m->n;) {
        if (!m->set[i]) {
            i++;
            continue;
        }
        uint64_t end = i;
        while (end < m->n && m->set[end])
            end++;
        assert_true(bitmap_next_dirty(b, at, b->size, &start, &length));
        assert_int_equal(start, i * m->granularity);
        assert_int_equal(start + length, min_u64(end * m->granularity, m->size));
        at = start + length;
        i = end;
    }
    assert_false(bitmap_next_dirty(b, at, b->size, &start, &length));
}

static void random_range(uint64_t size, uint64_t *offset, uint64_t *length) {
    static const uint64_t spans[] = {1, 512, 70000, 17 << 20, 33 << 20, UINT64_MAX};
    *offset = rng(size);
    *length = rng(min_u64(spans[rng(6)], size - *offset)) + 1;
    if (!rng(3)) { /* from or to the borders of chunks */
        uint64_t span = (uint64_t)BITMAP_CHUNK_BITS * 512;
        *offset = min_u64(align_down(*offset, span), size - 1);
        *length = rng(2) ? min_u64(span, size - *offset) : size - *offset;
    }
}

static void random_changes_match_the_model(void **state) {
    static const uint64_t granularities[] = {512, 4096, 65536, 1 << 20};
    for (int round = 0; round < 40; round++) {
        uint64_t size = (rng(120) << 20) + rng(3) * 512 + rng(2) * 77 + 1;
        uint64_t granularity = granularities[rng(4)];
        struct bitmap *b = make(size, granularity);
        struct model m;
        model_init(&m, size, granularity);
        for (int i = 0; i < 60; i++) {
            uint64_t offset, length;
            random_range(size, &offset, &length);
            if (rng(2)) {
                bitmap_set_range(b, offset, length);
                model_set(&m, offset, length);
            } else {
                bitmap_clear_range(b, offset, length);
                model_clear(&m, offset, length);
            }
            uint64_t at = rng(size);
            assert_int_equal(bitmap_get(b, at), m.set[at / granularity]);
        }
        expect_equal(b, &m);
        bitmap_free(b);
        free(m.set);
    }
}

static void runs_are_cut_to_the_range_asked_for(void **state) {
    struct bitmap *b = make(10 * MIB + 100, 65536);
    uint64_t start, length;
    bitmap_set_range(b, MIB, MIB);
    bitmap_set_range(b, 10 * MIB + 99, 1);
    assert_true(bitmap_next_dirty(b, 0, MIB + 1, &start, &length));
    assert_int_equal(start, MIB);
    assert_int_equal(length, 1);
    assert_true(bitmap_next_dirty(b, MIB + 5, 2 * MIB, &start, &length));
    assert_int_equal(start, MIB + 5);
    assert_int_equal(length, MIB - 5);
    assert_true(bitmap_next_dirty(b, 2 * MIB, UINT64_MAX, &start, &length));
    assert_int_equal(start, 10 * MIB);
    assert_int_equal(length, 100);
    assert_false(bitmap_next_dirty(b, 2 * MIB, 10 * MIB, &start, &length));
    bitmap_free(b);
}

static void merging_bitmaps_of_any_granularity_loses_nothing(void **state) {
    for (int round = 0; round < 60; round++) {
        uint64_t size = (rng(100) << 20) + rng(2) * 513 + 1;
        uint64_t g1 = 512u << rng(12), g2 = rng(2) ? g1 : 512u << rng(12);
        struct bitmap *a = make(size, g1), *b = make(size, g2);
        struct model m;
        model_init(&m, size, g1);
        for (int i = 0; i < 12; i++) {
            uint64_t offset, length, start;
            random_range(size, &offset, &length);
            bitmap_set_range(a, offset, length);
            model_set(&m, offset, length);
            random_range(size, &offset, &length);
            bitmap_set_range(b, offset, length);
            for (uint64_t at = 0; bitmap_next_dirty(b, at, size, &start, &length);
                 at = start + length)
                model_set(&m, start, length);
        }
        bitmap_merge_bits(a, b);
        expect_equal(a, &m);
        bitmap_free(a);
        bitmap_free(b);
        free(m.set);
    }
}

static void bits_survive_export_and_import(void **state) {
    for (int round = 0; round < 60; round++) {
        uint64_t size = (rng(100) << 20) + rng(2) * 513 + 1;
        uint64_t g = 512u << rng(8), bits = div_up(size, g), piece = 512u << rng(4);
        struct bitmap *a = make(size, g), *b = make(size, g);
        uint8_t buf[8192];
        for (int i = 0; i < 10; i++) {
            uint64_t offset, length;
            random_range(size, &offset, &length);
            bitmap_set_range(a, offset, length);
        }
        for (uint64_t at = 0; at < bits; at += piece * 8) {
            bitmap_export(a, at, buf, piece);
            enum bitmap_region kind = bitmap_region(a, at, piece * 8);
            assert_int_equal(kind == BITMAP_ALL_CLEAR, bytes_are_zero(buf, piece));
            if (kind == BITMAP_ALL_SET) {
                bitmap_import_ones(b, at, piece * 8);
                continue;
            }
            for (uint64_t i = bits - at; i < piece * 8; i++) /* behind the last bit: zeros */
                assert_false(buf[i / 8] >> i % 8 & 1);
            bitmap_import(b, at, buf, piece);
        }
        for (uint64_t i = 0; i < bits; i++)
            assert_int_equal(bitmap_get(a, i * g), bitmap_get(b, i * g));
        assert_int_equal(bitmap_dirty_bytes(a), bitmap_dirty_bytes(b));
        bitmap_free(a);
        bitmap_free(b);
    }
}

static void another_size_keeps_what_stays(void **state) {
    for (int round = 0; round < 200; round++) {
        uint64_t size = (rng(100) << 20) + rng(2) * 513 + 1, g = 512u << rng(8);
        struct bitmap *b = make(size, g);
        struct model m;
        model_init(&m, size, g);
        for (int i = 0; i < 6; i++) {
            uint64_t offset, length;
            random_range(size, &offset, &length);
            bitmap_set_range(b, offset, length);
            model_set(&m, offset, length);
        }
        for (int i = 0; i < 3; i++) {
            uint64_t now = (rng(100) << 20) + rng(2) * 513 + 1;
            struct model next;
            model_init(&next, now, g);
            memcpy(next.set, m.set, min_u64(next.n, m.n) * sizeof(bool));
            assert_int_equal(bitmap_truncate(b, now), 0);
            free(m.set);
            m = next;
            expect_equal(b, &m);
        }
        bitmap_free(b);
        free(m.set);
    }
}

static void large_uniform_bitmaps_take_no_memory_to_speak_of(void **state) {
    struct node n = {.size = 64 * TIB};
    struct bitmap_set set = {.node = &n};
    struct bitmap *b = make(64 * TIB, 65536);
    uint64_t start, length;
    b->set = &set; /* counts from here */
    assert_true(b->bits / BITMAP_CHUNK_BITS == 32768);
    bitmap_set_range(b, 0, 64 * TIB);
    assert_int_equal(set.memory, 0);
    bitmap_clear_range(b, TIB, 62 * TIB);
    assert_int_equal(set.memory, 0);
    assert_int_equal(bitmap_dirty_bytes(b), 2 * TIB);
    assert_true(bitmap_next_dirty(b, TIB, 64 * TIB, &start, &length));
    assert_int_equal(start, 63 * TIB);
    assert_int_equal(length, TIB);
    b->set = NULL;
    bitmap_free(b);
}

static void without_memory_too_much_is_set_and_never_too_little(void **state) {
    struct node n = {.size = 16 * GIB};
    struct bitmap_set set = {.node = &n, .memory = BITMAP_MEMORY_MAX};
    struct bitmap *b = make(16 * GIB, 65536);
    b->set = &set;
    bitmap_set_range(b, 3 * GIB + 5, 1);
    assert_true(bitmap_get(b, 3 * GIB));
    assert_int_equal(bitmap_dirty_bytes(b), (uint64_t)BITMAP_CHUNK_BITS * 65536);
    bitmap_clear_range(b, 3 * GIB, GIB / 2); /* cannot be told apart: stays set */
    assert_true(bitmap_get(b, 3 * GIB));
    bitmap_set_range(b, 0, 16 * GIB);
    assert_int_equal(bitmap_truncate(b, 3 * GIB + 100), 0);
    assert_int_equal(bitmap_dirty_bytes(b), 3 * GIB + 100);
    bitmap_clear_range(b, 0, 16 * GIB);
    assert_int_equal(bitmap_dirty_bytes(b), 0);
    assert_int_equal(set.memory, BITMAP_MEMORY_MAX);
    b->set = NULL;
    bitmap_free(b);
}

static void too_many_bits_are_refused_with_what_fits(void **state) {
    struct err e AUTO_ERR = ERR_INIT;
    struct bitmap *b;
    assert_int_equal(bitmap_new(4 * TIB, 512, &b, &e), -EFBIG);
    assert_non_null(strstr(e.hint, "1024 or more"));
    assert_int_equal(bitmap_new(4 * TIB, 1024, &b, &e), 0);
    bitmap_free(b);
    assert_int_equal(bitmap_new(MIB, 256, &b, &e), -EINVAL);
    assert_int_equal(bitmap_new(MIB, 1536, &b, &e), -EINVAL);
    assert_int_equal(bitmap_new(MIB, (uint64_t)1 << 32, &b, &e), -EINVAL);
    assert_int_equal(bitmap_new(0, 512, &b, &e), 0);
    assert_int_equal(bitmap_dirty_bytes(b), 0);
    bitmap_free(b);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_changes_match_the_model),
        cmocka_unit_test(runs_are_cut_to_the_range_asked_for),
        cmocka_unit_test(merging_bitmaps_of_any_granularity_loses_nothing),
        cmocka_unit_test(bits_survive_export_and_import),
        cmocka_unit_test(another_size_keeps_what_stays),
        cmocka_unit_test(large_uniform_bitmaps_take_no_memory_to_speak_of),
        cmocka_unit_test(without_memory_too_much_is_set_and_never_too_little),
        cmocka_unit_test(too_many_bits_are_refused_with_what_fits),
    };
    return cmocka_run_group_tests(tests, seed, NULL);
}
