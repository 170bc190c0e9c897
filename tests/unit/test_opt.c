/* SPDX-License-Identifier: MIT */
/* Option texts to trees to structs, and every way to be refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/bytes.h"
#include "base/err.h"
#include "base/opt.h"

struct sample {
    bool lazy, given;
    uint64_t count, cluster_size;
    int mode;
    char *label, *secret;
};

static const char *const mode_names[] = {"off", "metadata", "full", NULL};
static const struct opt table[] = {
    OPT_BOOL(struct sample, lazy, "lazy_refcounts", OPT_OPEN | OPT_CREATE, true, "be lazy"),
    OPT_U64(struct sample, count, "count", OPT_CREATE, 3, OPT_RANGE(1, 10), "how many"),
    OPT_SIZE(struct sample, cluster_size, "cluster_size", OPT_CREATE, 64 * KIB,
             OPT_POW2(512, 2 * MIB), "allocation unit"),
    OPT_ENUM(struct sample, mode, "preallocation", OPT_CREATE, 0, mode_names, "how much ahead"),
    OPT_STR(struct sample, label, "label", OPT_CREATE, "a name"),
    OPT_STR(struct sample, secret, "encrypt.key-secret", OPT_CREATE | OPT_OPEN, "key"),
    OPT_CHILD("file", OPT_OPEN | OPT_CREATE, "where the bytes lie"),
    {.name = "flagged",
     .type = OPT_T_BOOL,
     .when = OPT_CREATE,
     .offset = offsetof(struct sample, lazy),
     .given = offsetof(struct sample, given)},
    OPT_END};
static const char *const core[] = {"driver", "cache.direct", NULL};

static json_t *keyval(const char *s) {
    json_t *t = NULL;
    struct err e AUTO_ERR = ERR_INIT;
    if (opt_parse_keyval(s, NULL, &t, &e) != 0)
        fail_msg("%s: %s", s, err_text(&e));
    return t;
}

static int fill_json(const char *json, struct sample *out, struct err *e) {
    json_t *t = json_loads(json, 0, NULL);
    assert_non_null(t);
    int rc = opt_fill(table, t, OPT_CREATE, core, out, e);
    json_decref(t);
    return rc;
}

/* ---- filling ---- */

static void no_tree_means_defaults(void **state) {
    struct sample s;
    memset(&s, 0, sizeof(s));
    assert_int_equal(opt_fill(table, NULL, OPT_CREATE, NULL, &s, NULL), 0);
    assert_int_equal(s.count, 3);
    assert_int_equal(s.cluster_size, 64 * KIB);
    assert_int_equal(s.mode, 0);
    assert_null(s.label);
    assert_false(s.given);
}

static void texts_and_json_types_mean_the_same(void **state) {
    static const char *const forms[] = {
        "{\"cluster_size\":\"128k\",\"count\":\"0x5\",\"lazy_refcounts\":\"off\",\"label\":\"x\"}",
        "{\"cluster_size\":131072,\"count\":5,\"lazy_refcounts\":false,\"label\":\"x\"}"};
    for (int i = 0; i < 2; i++) {
        struct sample s = {0};
        assert_int_equal(fill_json(forms[i], &s, NULL), 0);
        assert_int_equal(s.cluster_size, 128 * KIB);
        assert_int_equal(s.count, 5);
        assert_false(s.lazy);
        assert_string_equal(s.label, "x");
        opt_free(table, &s);
        assert_null(s.label);
    }
}

static void dotted_rows_lie_in_groups(void **state) {
    struct sample s = {0};
    json_t *t = keyval("encrypt.key-secret=sec0,preallocation=full");
    assert_int_equal(opt_fill(table, t, OPT_CREATE, NULL, &s, NULL), 0);
    assert_string_equal(s.secret, "sec0");
    assert_int_equal(s.mode, 2);
    opt_free(table, &s);
    json_decref(t);
}

static void core_keys_and_children_are_passed_over(void **state) {
    struct sample s = {0};
    assert_int_equal(
        fill_json("{\"driver\":\"x\",\"cache\":{\"direct\":true},\"file\":{\"a\":1}}", &s, NULL),
        0);
}

static void given_tells_what_the_user_said(void **state) {
    struct sample s = {0};
    assert_int_equal(fill_json("{\"flagged\":true}", &s, NULL), 0);
    assert_true(s.given);
}

static void refused(const char *json, const char *text) {
    struct sample s = {0};
    struct err e AUTO_ERR = ERR_INIT;
    assert_int_equal(fill_json(json, &s, &e), -EINVAL);
    assert_string_equal(err_text(&e), text);
    assert_null(s.label);
}

static void wrong_values_name_option_value_and_limit(void **state) {
    refused("{\"count\":11}", "option 'count': 11 is not between 1 and 10");
    refused("{\"count\":-1}", "option 'count': expected a number, found -1");
    refused("{\"count\":\" 1\"}", "option 'count': expected a number, found ' 1'");
    refused("{\"count\":1.5}", "option 'count': expected a number, found 1.5");
    refused("{\"label\":\"a\",\"count\":null}", "option 'count': expected a number, found null");
    refused("{\"cluster_size\":513}", "option 'cluster_size': 513 is not a power of two");
    refused("{\"cluster_size\":\"4M\"}",
            "option 'cluster_size': 4194304 is not between 512 B and 2 MiB");
    refused("{\"cluster_size\":\"x\"}", "option 'cluster_size': size 'x' is not a size");
    refused("{\"lazy_refcounts\":\"maybe\"}",
            "option 'lazy_refcounts': expected on or off, found 'maybe'");
    refused("{\"preallocation\":\"some\"}",
            "option 'preallocation': expected one of off, metadata, full, found 'some'");
    refused("{\"label\":[1]}", "option 'label': expected a text, found a list");
    refused("{\"file\":7}", "option 'file': expected a group of options or a node name, found 7");
    refused("{\"count\":{\"a\":1}}", "option 'count': expected a number, found a group of options");
    refused("[1]", "the options are not a group of keys and values");
}

static void unknown_keys_suggest_the_nearest(void **state) {
    struct sample s = {0};
    struct err e AUTO_ERR = ERR_INIT;
    fill_json("{\"clustersize\":1}", &s, &e);
    assert_string_equal(err_text(&e), "unknown option 'clustersize'");
    assert_string_equal(e.hint, "did you mean 'cluster_size'?");
    fill_json("{\"zzz\":1}", &s, &e);
    assert_null(e.hint);
    fill_json("{\"encrypt\":{\"key\":1}}", &s, &e);
    assert_string_equal(err_text(&e), "unknown option 'encrypt.key'");
    assert_string_equal(e.hint, "did you mean 'encrypt.key-secret'?");
    fill_json("{\"a\\u001bb\":1}", &s, &e);
    assert_string_equal(err_text(&e), "unknown option 'a\\x1bb'");
}

static void rows_of_another_occasion_are_refused_with_the_reason(void **state) {
    struct sample s = {0};
    struct err e AUTO_ERR = ERR_INIT;
    json_t *t = keyval("count=1");
    assert_int_equal(opt_fill(table, t, OPT_OPEN, NULL, &s, &e), -EINVAL);
    assert_string_equal(err_text(&e), "option 'count' applies only when creating an image");
    json_decref(t);
}

static void copies_own_their_strings(void **state) {
    struct sample a = {0}, b;
    fill_json("{\"label\":\"x\"}", &a, NULL);
    opt_copy(table, sizeof(a), &a, &b);
    assert_ptr_not_equal(a.label, b.label);
    opt_free(table, &a);
    assert_string_equal(b.label, "x");
    opt_free(table, &b);
}

/* ---- texts ---- */

static void becomes(const char *text, const char *implied, const char *json) {
    json_t *t = NULL, *want = json_loads(json, 0, NULL);
    struct err e AUTO_ERR = ERR_INIT;
    assert_non_null(want);
    if (opt_parse_keyval(text, implied, &t, &e) != 0)
        fail_msg("%s: %s", text, err_text(&e));
    if (!json_equal(t, want)) {
        char *got = json_dumps(t, 0);
        fail_msg("%s became %s", text, got);
    }
    json_decref(t);
    json_decref(want);
}

static void keyval_forms(void **state) {
    becomes("", NULL, "{}");
    becomes("a=1", NULL, "{\"a\":\"1\"}");
    becomes("a=1,b.c=x,b.d=y", NULL, "{\"a\":\"1\",\"b\":{\"c\":\"x\",\"d\":\"y\"}}");
    becomes("a=x,,y,b=,c", NULL, "{\"a\":\"x,y\",\"b\":\"\",\"c\":\"on\"}");
    becomes("a==", NULL, "{\"a\":\"=\"}");
    becomes("a=1,a=2", NULL, "{\"a\":\"2\"}");
    becomes("nofoo", NULL, "{\"nofoo\":\"on\"}");
    becomes("dir/x,,y,c=1", "filename", "{\"filename\":\"dir/x,y\",\"c\":\"1\"}");
    becomes("a=,,", NULL, "{\"a\":\",\"}");
}

static void a_second_text_adds(void **state) {
    json_t *t = keyval("a=1,b.c=2");
    assert_int_equal(opt_parse_keyval("b.d=3,a=4", NULL, &t, NULL), 0);
    char *s = json_dumps(t, JSON_SORT_KEYS | JSON_COMPACT);
    assert_string_equal(s, "{\"a\":\"4\",\"b\":{\"c\":\"2\",\"d\":\"3\"}}");
    free(s);
    json_decref(t);
}

static void bad_keyval_is_refused_and_leaves_the_tree(void **state) {
    static const char *const bad[] = {"a=1,",   "=1",   ",a=1", "a=1,a.b=2", "a.b=2,a=1",
                                      "a..b=1", ".a=1", "a.=1", "a b=1",     "a=1,b\033=2"};
    json_t *t = keyval("z=1");
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct err e AUTO_ERR = ERR_INIT;
        if (opt_parse_keyval(bad[i], NULL, &t, &e) != -EINVAL)
            fail_msg("accepted %s", bad[i]);
        assert_int_equal(json_object_size(t), 1);
    }
    json_decref(t);
}

static void keyval_depth_and_length_are_bounded(void **state) {
    char deep[200] = "a";
    for (int i = 1; i < 64; i++)
        strcat(deep, ".a");
    json_t *t = keyval(deep);
    json_decref(t);
    strcat(deep, ".a");
    t = NULL;
    assert_int_equal(opt_parse_keyval(deep, NULL, &t, NULL), -EINVAL);
    char *longer = malloc((1 << 20) + 2);
    memset(longer, 'a', (1 << 20) + 1);
    longer[(1 << 20) + 1] = 0;
    assert_int_equal(opt_parse_keyval(longer, NULL, &t, NULL), -EINVAL);
    assert_int_equal(opt_parse_json(longer, &t, NULL), -EINVAL);
    free(longer);
    assert_null(t);
}

static void file_names_may_be_any_bytes(void **state) {
    json_t *t = keyval("filename=\xff\xfe.img");
    assert_string_equal(json_string_value(json_object_get(t, "filename")), "\xff\xfe.img");
    json_decref(t);
}

static void json_becomes(const char *text, const char *json) {
    json_t *t = NULL, *want = json_loads(json, 0, NULL);
    struct err e AUTO_ERR = ERR_INIT;
    if (opt_parse_json(text, &t, &e) != 0)
        fail_msg("%s: %s", text, err_text(&e));
    assert_true(json_equal(t, want));
    json_decref(t);
    json_decref(want);
}

static void json_expands_dotted_keys(void **state) {
    json_becomes("{\"file.driver\":\"file\"}", "{\"file\":{\"driver\":\"file\"}}");
    json_becomes("{\"file\":{\"driver\":\"file\"},\"file.filename\":\"x\"}",
                 "{\"file\":{\"driver\":\"file\",\"filename\":\"x\"}}");
    json_becomes("{\"file.filename\":\"x\",\"file\":{\"driver.a\":1}}",
                 "{\"file\":{\"driver\":{\"a\":1},\"filename\":\"x\"}}");
    json_becomes("{\"l\":[{\"a.b\":true}],\"n\":null}",
                 "{\"l\":[{\"a\":{\"b\":true}}],\"n\":null}");
}

static void bad_json_is_refused(void **state) {
    static const char *const bad[] = {"",
                                      "{",
                                      "[]",
                                      "3",
                                      "{\"a\":1,\"a\":2}",
                                      "{\"a.b\":1,\"a\":{\"b\":2}}",
                                      "{\"a\":1,\"a.b\":2}",
                                      "{\"a.b\":1,\"a\":2}",
                                      "{\"\":1}",
                                      "{\"a..b\":1}",
                                      "{\"a\":99999999999999999999}",
                                      "{\"a\":\"\\u0000\"}",
                                      "{} x"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        json_t *t = NULL;
        struct err e AUTO_ERR = ERR_INIT;
        if (opt_parse_json(bad[i], &t, &e) != -EINVAL)
            fail_msg("accepted %s", bad[i]);
        assert_null(t);
        assert_non_null(e.text);
    }
}

static void json_depth_is_bounded_before_parsing(void **state) {
    enum { DEEP = 100000 };
    char *s = malloc(DEEP + 1);
    memset(s, '[', DEEP);
    s[DEEP] = 0;
    json_t *t = NULL;
    struct err e AUTO_ERR = ERR_INIT;
    assert_int_equal(opt_parse_json(s, &t, &e), -EINVAL);
    assert_string_equal(err_text(&e), "options are nested more than 64 deep");
    free(s);
    /* Dotted keys count as well. */
    char dotted[4000] = "";
    for (int i = 0; i < 20; i++)
        strcat(dotted, "{\"a.a.a.a\":");
    strcat(dotted, "1");
    for (int i = 0; i < 20; i++)
        strcat(dotted, "}");
    assert_int_equal(opt_parse_json(dotted, &t, NULL), -EINVAL);
    assert_null(t);
}

/* ---- help and schema ---- */

static void help_shows_each_row_that_applies(void **state) {
    char *text = NULL;
    size_t len;
    FILE *f = open_memstream(&text, &len);
    opt_print_help(table, OPT_CREATE, f);
    fclose(f);
    assert_non_null(strstr(text, "cluster_size=SIZE"));
    assert_non_null(strstr(text, "(power of two, 512 B to 2 MiB; default 64 KiB)"));
    assert_non_null(strstr(text, "preallocation=off|metadata|full"));
    free(text);
    f = open_memstream(&text, &len);
    opt_print_help(table, OPT_OPEN, f);
    fclose(f);
    assert_null(strstr(text, "cluster_size"));
    free(text);
}

static void schema_nests_dotted_rows(void **state) {
    json_t *s = opt_schema(table, OPT_CREATE);
    json_t *group = json_object_get(json_object_get(s, "encrypt"), "properties");
    assert_string_equal(
        json_string_value(json_object_get(json_object_get(group, "key-secret"), "type")), "string");
    assert_int_equal(
        json_integer_value(json_object_get(json_object_get(s, "cluster_size"), "default")), 65536);
    json_decref(s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_tree_means_defaults),
        cmocka_unit_test(texts_and_json_types_mean_the_same),
        cmocka_unit_test(dotted_rows_lie_in_groups),
        cmocka_unit_test(core_keys_and_children_are_passed_over),
        cmocka_unit_test(given_tells_what_the_user_said),
        cmocka_unit_test(wrong_values_name_option_value_and_limit),
        cmocka_unit_test(unknown_keys_suggest_the_nearest),
        cmocka_unit_test(rows_of_another_occasion_are_refused_with_the_reason),
        cmocka_unit_test(copies_own_their_strings),
        cmocka_unit_test(keyval_forms),
        cmocka_unit_test(a_second_text_adds),
        cmocka_unit_test(bad_keyval_is_refused_and_leaves_the_tree),
        cmocka_unit_test(keyval_depth_and_length_are_bounded),
        cmocka_unit_test(file_names_may_be_any_bytes),
        cmocka_unit_test(json_expands_dotted_keys),
        cmocka_unit_test(bad_json_is_refused),
        cmocka_unit_test(json_depth_is_bounded_before_parsing),
        cmocka_unit_test(help_shows_each_row_that_applies),
        cmocka_unit_test(schema_nests_dotted_rows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
