/* SPDX-License-Identifier: MIT */
/*
 * Layout of new qcow2 images and `measure`.  The expected byte numbers are those that
 * `qemu-img measure` (7.2) and `qemu-img create` print for the same options.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "format/qcow2/layout.h"
#include "format/qcow2/qcow2.h"

static struct qcow2_create_opts options(uint64_t cluster_size, uint64_t bits) {
    struct qcow2_create_opts o;
    struct err e = ERR_INIT;
    assert_int_equal(opt_fill(qcow2_create_opt_table, NULL, OPT_CREATE, NULL, &o, &e), 0);
    o.cluster_size = cluster_size;
    o.refcount_bits = bits;
    return o;
}

static void measure_agrees_with_the_peer(void **st) {
    static const struct {
        uint64_t size, cluster, bits, data, required, full;
    } t[] = {
        {0, 64 * KIB, 16, 0, 196608, 196608},
        {1, 64 * KIB, 16, 0, 327680, 393216},
        {10 * MIB, 64 * KIB, 16, 0, 327680, 10813440},
        {TIB, 64 * KIB, 16, 0, 168034304, 1099679662080},
        {5243392, 512, 16, 0, 105984, 5349376},
        {5 * GIB, 2 * MIB, 64, 0, 10485760, 5379194880},
        {3 * GIB, 4 * KIB, 1, 0, 6414336, 3227639808},
        {300000256, 64 * KIB, 16, 300000256, 300351488, 300351488},
    };
    for (size_t i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
        struct qcow2_create_opts o = options(t[i].cluster, t[i].bits);
        struct measure_in in = {.size = t[i].size, .data = t[i].data};
        struct measure_result m;
        assert_int_equal(qcow2_measure(&o, &in, &m, NULL), 0);
        assert_int_equal(m.bound_required, t[i].required);
        assert_int_equal(m.bound_fully, t[i].full);
    }
}

static void measure_refuses_what_create_refuses(void **st) {
    struct err e AUTO_ERR = ERR_INIT;
    struct measure_result m;
    struct qcow2_create_opts o = options(512, 16);
    struct measure_in in = {.size = 129 * GIB};
    assert_int_equal(qcow2_measure(&o, &in, &m, &e), -EFBIG);
    assert_non_null(strstr(err_text(&e), "the largest size is 128 GiB"));
    o.extended_l2 = true;
    in.size = MIB;
    assert_int_equal(qcow2_measure(&o, &in, &m, &e), -EINVAL); /* with clusters of 512 bytes */
}

static void default_layout_has_header_table_block_l1(void **st) {
    struct qcow2_layout l;
    assert_int_equal(qcow2_layout_compute(16, 4, false, 100 * MIB, false, &l, NULL), 0);
    assert_int_equal(qcow2_layout_reftable(&l), 65536);
    assert_int_equal(qcow2_layout_refblocks(&l), 2 * 65536);
    assert_int_equal(qcow2_layout_l1(&l), 3 * 65536);
    assert_int_equal(l.file_length, 196616);
}

/* The counts cover themselves, and one block or table cluster fewer would not do. */
static void refcounts_are_enough_and_no_more(void **st) {
    for (uint32_t bits = 9; bits <= 21; bits++)
        for (uint32_t order = 0; order <= 6; order++)
            for (uint64_t size = 512; size <= 8 * GIB; size = size * 3 + 512) {
                struct qcow2_layout l;
                assert_int_equal(qcow2_layout_compute(bits, order, false, size, true, &l, NULL), 0);
                uint64_t per_block = (uint64_t)1 << (bits + 3 - order);
                uint64_t total = 1 + l.reftable_clusters + l.refblocks + l.l1_clusters +
                                 l.l2_tables + l.data_clusters;
                assert_int_equal(l.total_clusters, total);
                assert_true(l.refblocks * per_block >= total);
                assert_true((l.refblocks - 1) * per_block < total);
                assert_true(l.reftable_clusters << (bits - 3) >= l.refblocks);
                assert_int_equal(l.file_length, total << bits);
                assert_int_equal(qcow2_layout_data(&l) + (l.data_clusters << bits), l.file_length);
            }
}

/* The size that a refusal names can be made, one L2 table more cannot. */
static void the_largest_preallocated_size_is_exact(void **st) {
    struct qcow2_layout l;
    struct err e AUTO_ERR = ERR_INIT;
    assert_int_equal(qcow2_layout_compute(9, 6, false, 100 * GIB, true, &l, &e), -EFBIG);
    const char *named = strstr(err_text(&e), "the largest preallocated size is 31");
    assert_non_null(named);
    uint64_t low = 0, high = 100 * GIB / 32768; /* in L2 tables */
    while (high - low > 1) {
        uint64_t mid = (low + high) / 2;
        *(qcow2_layout_compute(9, 6, false, mid * 32768, true, &l, NULL) ? &high : &low) = mid;
    }
    assert_true(low * 32768 > 31 * GIB && low * 32768 < 32 * GIB);
}

static void limits_hold_for_extreme_sizes(void **st) {
    struct qcow2_layout l;
    assert_int_equal(qcow2_layout_compute(9, 4, false, INT64_MAX - 511, false, &l, NULL), -EFBIG);
    assert_int_equal(qcow2_layout_compute(21, 4, false, INT64_MAX - 511, true, &l, NULL), -EFBIG);
    assert_int_equal(qcow2_layout_compute(21, 0, false, INT64_MAX / 4, false, &l, NULL), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(measure_agrees_with_the_peer),
        cmocka_unit_test(measure_refuses_what_create_refuses),
        cmocka_unit_test(default_layout_has_header_table_block_l1),
        cmocka_unit_test(refcounts_are_enough_and_no_more),
        cmocka_unit_test(the_largest_preallocated_size_is_exact),
        cmocka_unit_test(limits_hold_for_extreme_sizes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
