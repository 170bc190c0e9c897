/* SPDX-License-Identifier: MIT */
/* The growing string; safe printing of hostile names; edit distance. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>
#include "base/cleanup.h"
#include "base/strbuf.h"

static void appends_grow_and_stay_terminated(void **state) {
    struct strbuf b AUTO_STRBUF = STRBUF_INIT;
    for (int i = 0; i < 1000; i++)
        strbuf_add(&b, "ab", 2);
    strbuf_puts(&b, "!");
    assert_int_equal(b.len, 2001);
    assert_int_equal(strlen(b.s), 2001);
}

static void printf_longer_than_the_buffer_is_whole(void **state) {
    struct strbuf b AUTO_STRBUF = STRBUF_INIT;
    strbuf_puts(&b, "x");
    strbuf_printf(&b, "%0500d", 7);
    assert_int_equal(b.len, 501);
    assert_int_equal(b.s[500], '7');
}

static void steal_of_nothing_is_the_empty_string(void **state) {
    struct strbuf b = STRBUF_INIT;
    char *s AUTO_FREE = strbuf_steal(&b);
    assert_string_equal(s, "");
    assert_null(b.s);
}

static void check_safe(const char *in, size_t len, const char *out) {
    struct strbuf b AUTO_STRBUF = STRBUF_INIT;
    strbuf_puts(&b, "");
    strbuf_put_safe(&b, in, len);
    assert_string_equal(b.s, out);
}
#define SAFE(in, out) check_safe(in, sizeof(in) - 1, out)

static void control_bytes_are_escaped(void **state) {
    SAFE("a\033[2Jb", "a\\x1b[2Jb");
    SAFE("a\nb\x7f", "a\\x0ab\\x7f");
    SAFE("nul\0in", "nul\\x00in");
}

static void valid_utf8_passes(void **state) {
    SAFE("gr\xc3\xbc\xc3\x9f", "gr\xc3\xbc\xc3\x9f");
    SAFE("\xe2\x82\xac", "\xe2\x82\xac");
    SAFE("\xf0\x9f\x92\xbe", "\xf0\x9f\x92\xbe");
}

static void invalid_utf8_is_escaped(void **state) {
    SAFE("\xc3", "\\xc3");
    SAFE("\xc0\xaf", "\\xc0\\xaf");
    SAFE("\xe0\x80\xaf", "\\xe0\\x80\\xaf");
    SAFE("\xed\xa0\x80", "\\xed\\xa0\\x80");
    SAFE("\xf4\x90\x80\x80", "\\xf4\\x90\\x80\\x80");
    SAFE("\xff", "\\xff");
}

static void c1_and_bidi_controls_are_escaped(void **state) {
    SAFE("\xc2\x9b", "\\xc2\\x9b");
    SAFE("\xe2\x80\xae", "\\xe2\\x80\\xae");
}

static void distance_counts_edits(void **state) {
    assert_int_equal(str_distance("", ""), 0);
    assert_int_equal(str_distance("abc", ""), 3);
    assert_int_equal(str_distance("kitten", "sitting"), 3);
    assert_int_equal(str_distance("cluster_size", "clustersize"), 1);
    assert_int_equal(str_distance("sizes", "sizse"), 1);
    assert_int_equal(str_distance("ca", "abc"), 3);
}

static void distance_is_bounded(void **state) {
    char *a AUTO_FREE = xcalloc(100001, 1), *b AUTO_FREE = xcalloc(100001, 1);
    memset(a, 'a', 100000);
    memset(b, 'b', 100000);
    assert_int_equal(str_distance(a, b), 64);
}

static void x_allocators_copy(void **state) {
    char *s AUTO_FREE = xstrndup("hello", 3), *t AUTO_FREE = xasprintf("%s-%d", s, 5);
    char *u AUTO_FREE = xstrdup(t);
    assert_string_equal(u, "hel-5");
    char *z AUTO_FREE = xcalloc(0, 0);
    assert_non_null(z);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(appends_grow_and_stay_terminated),
        cmocka_unit_test(printf_longer_than_the_buffer_is_whole),
        cmocka_unit_test(steal_of_nothing_is_the_empty_string),
        cmocka_unit_test(control_bytes_are_escaped),
        cmocka_unit_test(valid_utf8_passes),
        cmocka_unit_test(invalid_utf8_is_escaped),
        cmocka_unit_test(c1_and_bidi_controls_are_escaped),
        cmocka_unit_test(distance_counts_edits),
        cmocka_unit_test(distance_is_bounded),
        cmocka_unit_test(x_allocators_copy),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
