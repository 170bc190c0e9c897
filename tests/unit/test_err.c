/* SPDX-License-Identifier: MIT */
/* struct err: codes come back negated, texts chain outside-in, hints stay. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <string.h>
#include "base/err.h"
#include "base/log.h"

static void set_returns_the_negated_code_and_formats(void **state) {
    struct err e AUTO_ERR = ERR_INIT;
    assert_int_equal(err_set(&e, EINVAL, "offset %d is odd", 513), -EINVAL);
    assert_int_equal(e.code, EINVAL);
    assert_string_equal(err_text(&e), "offset 513 is odd");
}

static void set_accepts_null(void **state) {
    assert_int_equal(err_set(NULL, EIO, "x"), -EIO);
    assert_int_equal(err_errno(NULL, ENOENT, "x"), -ENOENT);
    assert_int_equal(err_prefix(NULL, "x"), -EIO);
    err_hint(NULL, "x");
    err_clear(NULL);
}

static void set_replaces_text_and_hint(void **state) {
    struct err e AUTO_ERR = ERR_INIT;
    err_set(&e, EINVAL, "first");
    err_hint(&e, "do this");
    err_set(&e, EIO, "second");
    assert_int_equal(e.code, EIO);
    assert_string_equal(err_text(&e), "second");
    assert_null(e.hint);
}

static void set_may_quote_its_own_old_text(void **state) {
    struct err e AUTO_ERR = ERR_INIT;
    err_set(&e, EINVAL, "inner");
    err_set(&e, EIO, "was: %s", e.text);
    assert_string_equal(err_text(&e), "was: inner");
}

static void errno_text_is_appended(void **state) {
    struct err e AUTO_ERR = ERR_INIT;
    assert_int_equal(err_errno(&e, ENOENT, "opening %s", "a"), -ENOENT);
    assert_string_equal(err_text(&e), "opening a: No such file or directory");
}

static void prefixes_read_outside_in(void **state) {
    struct err e AUTO_ERR = ERR_INIT;
    err_set(&e, EINVAL, "offset 513");
    err_prefix(&e, "L1 table");
    assert_int_equal(err_prefix(&e, "opening %s", "a.qcow2"), -EINVAL);
    assert_string_equal(err_text(&e), "opening a.qcow2: L1 table: offset 513");
}

static void prefix_without_error_does_nothing(void **state) {
    struct err e AUTO_ERR = ERR_INIT;
    assert_int_equal(err_prefix(&e, "x"), 0);
    assert_null(e.text);
}

static void innermost_hint_stays(void **state) {
    struct err e AUTO_ERR = ERR_INIT;
    err_hint(&e, "too early");
    assert_null(e.hint);
    err_set(&e, EAGAIN, "locked");
    err_hint(&e, "stop pid %d", 7);
    err_hint(&e, "second");
    assert_string_equal(e.hint, "stop pid 7");
}

static void move_empties_the_source(void **state) {
    struct err a AUTO_ERR = ERR_INIT, b AUTO_ERR = ERR_INIT;
    err_set(&a, EIO, "a");
    err_set(&b, EINVAL, "b");
    err_move(&b, &a);
    assert_int_equal(a.code, 0);
    assert_null(a.text);
    assert_string_equal(err_text(&b), "a");
    err_move(NULL, &b);
    assert_int_equal(b.code, 0);
}

static void text_is_never_null(void **state) {
    struct err e = {EIO, NULL, NULL};
    assert_string_equal(err_text(&e), "Input/output error");
    assert_string_equal(err_text(NULL), "no error");
    assert_non_null(err_text(&(struct err){99999, NULL, NULL}));
}

static char logged[2048];
static void record(void *arg, enum log_level level, const char *text) {
    *(int *)arg += 1;
    strcpy(logged, text);
}

static void log_goes_to_the_sink_up_to_its_level(void **state) {
    int calls = 0;
    log_msg(LOG_LV_ERROR, "nobody listens");
    log_set_sink(record, &calls, LOG_LV_INFO);
    log_msg(LOG_LV_INFO, "client %d gone", 3);
    log_msg(LOG_LV_DEBUG, "not this");
    assert_int_equal(calls, 1);
    assert_string_equal(logged, "client 3 gone");
    log_set_sink(NULL, NULL, LOG_LV_ERROR);
    log_msg(LOG_LV_ERROR, "nobody listens");
    assert_int_equal(calls, 1);
}

static void test_control_bytes_are_shown(void **state) {
    struct err e AUTO_ERR = ERR_INIT;
    err_set(&e, EINVAL, "name '%s'", "a\x1b[31m\x80\xc3\xa9");
    err_prefix(&e, "in '%s'", "\n");
    err_hint(&e, "not '%s'", "\x7f");
    assert_string_equal(e.text, "in '\\x0a': name 'a\\x1b[31m\\x80\xc3\xa9'");
    assert_string_equal(e.hint, "not '\\x7f'");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(set_returns_the_negated_code_and_formats),
        cmocka_unit_test(set_accepts_null),
        cmocka_unit_test(set_replaces_text_and_hint),
        cmocka_unit_test(set_may_quote_its_own_old_text),
        cmocka_unit_test(errno_text_is_appended),
        cmocka_unit_test(prefixes_read_outside_in),
        cmocka_unit_test(prefix_without_error_does_nothing),
        cmocka_unit_test(innermost_hint_stays),
        cmocka_unit_test(move_empties_the_source),
        cmocka_unit_test(text_is_never_null),
        cmocka_unit_test(log_goes_to_the_sink_up_to_its_level),
        cmocka_unit_test(test_control_bytes_are_shown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
