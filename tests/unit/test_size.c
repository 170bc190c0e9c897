/* SPDX-License-Identifier: MIT */
/* Sizes: what is accepted, the exact value, what is refused and how. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <string.h>
#include "base/bytes.h"
#include "base/err.h"
#include "base/size.h"

static void accepted(const char *s, uint64_t want) {
    uint64_t v = 42;
    struct err e AUTO_ERR = ERR_INIT;
    if (size_parse(s, "size", &v, &e) != 0)
        fail_msg("%s: %s", s, err_text(&e));
    if (v != want)
        fail_msg("%s: %llu", s, (unsigned long long)v);
}

static void refused(const char *s, int code) {
    uint64_t v = 42;
    struct err e AUTO_ERR = ERR_INIT;
    if (size_parse(s, "--length", &v, &e) != -code)
        fail_msg("'%s' gave %llu, %s", s, (unsigned long long)v, err_text(&e));
    assert_int_equal(v, 42);
    assert_non_null(strstr(err_text(&e), "--length"));
}

static void plain_bytes_and_suffixes(void **state) {
    accepted("0", 0);
    accepted("4096", 4096);
    accepted("10b", 10);
    accepted("64k", 64 * KIB);
    accepted("64K", 64 * KIB);
    accepted("3m", 3 * MIB);
    accepted("1G", GIB);
    accepted("2T", 2 * TIB);
    accepted("7E", (uint64_t)7 << 60);
    accepted("0x10000", 65536);
}

static void fractions_are_exact(void **state) {
    accepted("1.5G", 3 * GIB / 2);
    accepted("0.5k", 512);
    accepted("1.1T", 1209462790553);
    accepted("0.0009765625k", 1);
    accepted("1.99999999999999999999999999k", 2047);
}

static void the_largest_is_int64_max(void **state) {
    accepted("9223372036854775807", INT64_MAX);
    refused("9223372036854775808", ERANGE);
    refused("8E", ERANGE);
    refused("99999999999999999999999999", ERANGE);
    refused("18446744073709551616k", ERANGE);
    refused("0xffffffffffffffff", ERANGE);
}

static void other_text_is_refused(void **state) {
    static const char *const bad[] = {"",    "-1",   "+1",   " 1",  "1 ",   "k",   ".5k",
                                      "1.k", "1.5",  "1.5b", "1kk", "1KiB", "1e6", "0x",
                                      "0xg", "0x1k", "1,5k", "nan", "inf"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        refused(bad[i], EINVAL);
}

static void a_hostile_text_is_shown_safely(void **state) {
    struct err e AUTO_ERR = ERR_INIT;
    uint64_t v;
    size_parse("\033[31m", "size", &v, &e);
    assert_null(strchr(err_text(&e), '\033'));
}

static void human(uint64_t v, const char *want) {
    char buf[32];
    assert_string_equal(size_human(v, buf), want);
}

static void human_form_has_three_digits(void **state) {
    human(0, "0 B");
    human(512, "512 B");
    human(1000, "0.977 KiB");
    human(1024, "1 KiB");
    human(1536, "1.5 KiB");
    human(64 * KIB, "64 KiB");
    human(1000 * KIB - 1, "0.977 MiB");
    human(3 * GIB / 2, "1.5 GiB");
    human(1000000000000, "931 GiB");
    human(UINT64_MAX, "16 EiB");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plain_bytes_and_suffixes),
        cmocka_unit_test(fractions_are_exact),
        cmocka_unit_test(the_largest_is_int64_max),
        cmocka_unit_test(other_text_is_refused),
        cmocka_unit_test(a_hostile_text_is_shown_safely),
        cmocka_unit_test(human_form_has_three_digits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
