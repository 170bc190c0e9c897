/* SPDX-License-Identifier: MIT */
/* Loads, stores and the zero scan, at every small length and alignment. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/bytes.h"

static void loads_and_stores_have_their_byte_order(void **state) {
    uint8_t b[9] = {0};
    be32_store(b + 1, 0x01020304);
    assert_int_equal(b[1], 1);
    assert_int_equal(b[4], 4);
    assert_int_equal(be32_load(b + 1), 0x01020304);
    assert_int_equal(le32_load(b + 1), 0x04030201);
    le64_store(b + 1, 0x0102030405060708);
    assert_int_equal(b[1], 8);
    assert_int_equal(be64_load(b + 1), 0x0807060504030201);
    be16_store(b, 0xff01);
    assert_int_equal(b[0], 0xff);
    assert_int_equal(le16_load(b), 0x01ff);
}

static void zeros_of_any_length_and_alignment_are_zero(void **state) {
    static uint8_t buf[700];
    memset(buf, 0xff, sizeof(buf));
    for (size_t at = 1; at < 34; at++)
        for (size_t len = 0; len < 600; len++) {
            memset(buf + at, 0, len);
            assert_true(bytes_are_zero(buf + at, len));
            memset(buf + at, 0xff, len);
        }
}

static void one_bit_anywhere_is_seen(void **state) {
    static uint8_t buf[600];
    static const size_t lens[] = {1, 7, 8, 9, 15, 16, 17, 63, 127, 128, 129, 255, 256, 300, 515};
    for (size_t i = 0; i < sizeof(lens) / sizeof(lens[0]); i++)
        for (size_t at = 0; at < lens[i]; at++) {
            buf[3 + at] = 0x10;
            assert_false(bytes_are_zero(buf + 3, lens[i]));
            buf[3 + at] = 0;
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(loads_and_stores_have_their_byte_order),
        cmocka_unit_test(zeros_of_any_length_and_alignment_are_zero),
        cmocka_unit_test(one_bit_anywhere_is_seen),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
