/* SPDX-License-Identifier: MIT */
/* The NBD codecs, against bytes written out by hand from the protocol document. */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <errno.h>
#include <cmocka.h>
#include <string.h>
#include "export/nbd/proto.h"

static void greeting_is_fixed_newstyle(void **state) {
    uint8_t b[NBD_GREETING_BYTES];
    assert_int_equal(nbd_greeting_encode(b, 3), 18);
    assert_memory_equal(b, "NBDMAGICIHAVEOPT\0\3", 18);
}

static void option_header_is_decoded(void **state) {
    struct nbd_option o;
    assert_true(nbd_option_decode((const uint8_t *)"IHAVEOPT\0\0\0\7\0\0\1\2", &o));
    assert_int_equal(o.option, NBD_OPT_GO);
    assert_int_equal(o.length, 0x102);
}

static void option_without_magic_is_refused(void **state) {
    struct nbd_option o;
    assert_false(nbd_option_decode((const uint8_t *)"IHAVEOPU\0\0\0\7\0\0\0\0", &o));
}

static void option_reply_is_encoded(void **state) {
    uint8_t b[NBD_OPT_REPLY_BYTES];
    assert_int_equal(nbd_opt_reply_encode(b, 7, NBD_REP_ERR_UNKNOWN, 5), 20);
    assert_memory_equal(b, "\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\7\x80\0\0\6\0\0\0\5", 20);
}

static void request_is_decoded(void **state) {
    static const uint8_t b[] = {0x25, 0x60, 0x95, 0x13, 0, 0x11, 0, 6, 1,    2,    3, 4,    5, 6,
                                7,    8,    0,    0,    0, 1,    0, 0, 0x10, 0x00, 0, 0x20, 0, 1};
    struct nbd_request r;
    assert_true(nbd_request_decode(b, &r));
    assert_int_equal(r.flags, NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_FAST_ZERO);
    assert_int_equal(r.type, NBD_CMD_WRITE_ZEROES);
    assert_memory_equal(&r.cookie, "\1\2\3\4\5\6\7\10", 8);
    assert_true(r.offset == 0x100001000);
    assert_int_equal(r.length, 0x200001);
}

static void request_with_reply_magic_is_refused(void **state) {
    uint8_t b[28] = {0x67, 0x44, 0x66, 0x98};
    struct nbd_request r;
    assert_false(nbd_request_decode(b, &r));
}

static void replies_carry_the_cookie_as_it_came(void **state) {
    uint64_t cookie;
    memcpy(&cookie, "cookie!!", 8);
    struct nbd_request q = {.cookie = cookie, .offset = 0x123};
    uint8_t b[64];
    assert_int_equal(nbd_simple_encode(b, cookie, NBD_ENOSPC), 16);
    assert_memory_equal(b,
                        "\x67\x44\x66\x98\0\0\0\x1c"
                        "cookie!!",
                        16);
    assert_int_equal(nbd_data_chunk_encode(b, false, &q, 1, 0x1000, 512), 28);
    assert_memory_equal(b,
                        "\x66\x8e\x33\xef\0\1\0\1"
                        "cookie!!\0\0\2\x8\0\0\0\0\0\0\x10\0",
                        28);
    assert_int_equal(nbd_hole_chunk_encode(b, false, &q, 0, 0x1000, 512), 32);
    assert_memory_equal(b,
                        "\x66\x8e\x33\xef\0\0\0\2"
                        "cookie!!\0\0\0\xc\0\0\0\0\0\0\x10\0\0\0\2\0",
                        32);
    assert_int_equal(nbd_error_chunk_encode(b, false, &q, NBD_EINVAL, 3), 26);
    assert_memory_equal(b,
                        "\x66\x8e\x33\xef\0\1\x80\1"
                        "cookie!!\0\0\0\x9\0\0\0\x16\0\3",
                        26);
}

static void extended_request_is_decoded(void **state) {
    static const uint8_t b[] = {0x21, 0xe4, 0x1c, 0x71, 0, 0x20, 0,    1, 1, 2, 3, 4, 5, 6, 7, 8,
                                0,    0,    0,    1,    0, 0,    0x10, 0, 0, 0, 0, 2, 0, 0, 0, 1};
    struct nbd_request r;
    assert_true(nbd_extended_request_decode(b, &r));
    assert_int_equal(r.flags, NBD_CMD_FLAG_PAYLOAD_LEN);
    assert_int_equal(r.type, NBD_CMD_WRITE);
    assert_memory_equal(&r.cookie, "\1\2\3\4\5\6\7\10", 8);
    assert_true(r.offset == 0x100001000 && r.length == 0x200000001);
    assert_false(nbd_request_decode(b, &r));
}

static void extended_replies_have_one_head_of_32_bytes(void **state) {
    struct nbd_request q = {.offset = 0x123};
    memcpy(&q.cookie, "cookie!!", 8);
    uint8_t b[64];
    assert_int_equal(nbd_chunk_encode(b, true, &q, 1, NBD_CHUNK_NONE, 0), 32);
    assert_memory_equal(b,
                        "\x6e\x8a\x27\x8c\0\1\0\0"
                        "cookie!!\0\0\0\0\0\0\1\x23\0\0\0\0\0\0\0\0",
                        32);
    assert_int_equal(nbd_data_chunk_encode(b, true, &q, 1, 0x1000, 512), 40);
    assert_memory_equal(b + 24, "\0\0\0\0\0\0\2\x8\0\0\0\0\0\0\x10\0", 16);
    assert_int_equal(nbd_hole_chunk_encode(b, true, &q, 0, 0x1000, 512), 44);
    assert_int_equal(nbd_error_chunk_encode(b, true, &q, NBD_EINVAL, 3), 38);
}

static void info_request_is_split(void **state) {
    static const char b[] = "\0\0\0\3abc\0\2\0\1\0\3";
    struct nbd_info_request q;
    assert_int_equal(nbd_info_request_decode((const uint8_t *)b, 13, &q), 0);
    assert_true(nbd_name_is(q.name, "abc"));
    assert_int_equal(q.count, 2);
    assert_int_equal(be16_load(q.types + 2), NBD_INFO_BLOCK_SIZE);
}

static void info_request_with_lying_lengths_is_refused(void **state) {
    static const uint8_t all[] = {0, 0, 0, 3, 'a', 'b', 'c', 0, 2, 0, 1, 0, 3};
    struct nbd_info_request q;
    for (size_t len = 0; len < sizeof(all); len++)
        assert_int_equal(nbd_info_request_decode(all, len, &q), -EINVAL);
    static const uint8_t huge[] = {0xff, 0xff, 0xff, 0xff, 'a', 0, 0};
    assert_int_equal(nbd_info_request_decode(huge, sizeof(huge), &q), -EINVAL);
    static const uint8_t trailing[] = {0, 0, 0, 0, 0, 0, 9};
    assert_int_equal(nbd_info_request_decode(trailing, sizeof(trailing), &q), -EINVAL);
}

static void string_above_the_limit_is_refused(void **state) {
    static uint8_t b[4 + NBD_STRING_MAX + 1 + 2];
    struct nbd_info_request q;
    be32_store(b, NBD_STRING_MAX + 1);
    assert_int_equal(nbd_info_request_decode(b, sizeof(b), &q), -ENAMETOOLONG);
    be32_store(b, NBD_STRING_MAX);
    assert_int_equal(nbd_info_request_decode(b, sizeof(b) - 1, &q), 0);
}

static void meta_request_is_split_into_queries(void **state) {
    static const char b[] = "\0\0\0\1x\0\0\0\2\0\0\0\5base:\0\0\0\0";
    struct nbd_meta_request q;
    assert_int_equal(nbd_meta_request_decode((const uint8_t *)b, sizeof(b) - 1, &q), 0);
    assert_int_equal(q.count, 2);
    const uint8_t *pos = q.queries;
    assert_true(nbd_name_is(nbd_meta_query_next(&pos), "base:"));
    assert_true(nbd_name_is(nbd_meta_query_next(&pos), ""));
}

static void meta_request_with_lying_count_is_refused(void **state) {
    static const char b[] = "\0\0\0\1x\xff\xff\xff\xff\0\0\0\5base:\0\0\0\0";
    struct nbd_meta_request q;
    assert_int_equal(nbd_meta_request_decode((const uint8_t *)b, sizeof(b) - 1, &q), -EINVAL);
}

static bool valid(const char *s, uint32_t len) {
    return nbd_name_valid((struct nbd_name){s, len});
}

static void names_are_utf8_without_nul(void **state) {
    assert_true(valid("", 0));
    assert_true(valid("disk \xc3\xa4 \xe2\x82\xac \xf0\x9f\x92\xbe", 16));
    assert_false(valid("a\0b", 3));
    assert_false(valid("\xff", 1));
    assert_false(valid("\xc3", 1));             /* cut */
    assert_false(valid("\xc0\x80", 2));         /* overlong NUL */
    assert_false(valid("\xed\xa0\x80", 3));     /* surrogate */
    assert_false(valid("\xf4\x90\x80\x80", 4)); /* above U+10FFFF */
    assert_false(valid("\x80", 1));
}

static void errnos_become_the_protocols_values(void **state) {
    assert_int_equal(nbd_errno_from(-EPERM), 1);
    assert_int_equal(nbd_errno_from(-EROFS), 1);
    assert_int_equal(nbd_errno_from(-EACCES), 1);
    assert_int_equal(nbd_errno_from(-EIO), 5);
    assert_int_equal(nbd_errno_from(-ENOMEM), 12);
    assert_int_equal(nbd_errno_from(-EINVAL), 22);
    assert_int_equal(nbd_errno_from(-ENOSPC), 28);
    assert_int_equal(nbd_errno_from(-EDQUOT), 28);
    assert_int_equal(nbd_errno_from(-EFBIG), 28);
    assert_int_equal(nbd_errno_from(-EOVERFLOW), 75);
    assert_int_equal(nbd_errno_from(-ENOTSUP), 95);
    assert_int_equal(nbd_errno_from(-ESHUTDOWN), 108);
    assert_int_equal(nbd_errno_from(-ESTALE), 5);
}

static void flags_belong_to_their_commands(void **state) {
    assert_int_equal(nbd_cmd_flags_allowed(NBD_CMD_READ, true, false), 5);
    assert_int_equal(nbd_cmd_flags_allowed(NBD_CMD_READ, false, false), 1);
    assert_int_equal(nbd_cmd_flags_allowed(NBD_CMD_WRITE, true, false), 1);
    assert_int_equal(nbd_cmd_flags_allowed(NBD_CMD_WRITE_ZEROES, true, false), 19);
    assert_int_equal(nbd_cmd_flags_allowed(NBD_CMD_BLOCK_STATUS, true, false), 9);
    assert_int_equal(nbd_cmd_flags_allowed(NBD_CMD_BLOCK_STATUS, true, true), 41);
    assert_int_equal(nbd_cmd_flags_allowed(NBD_CMD_WRITE, true, true), 33);
    assert_int_equal(nbd_cmd_flags_allowed(NBD_CMD_READ, true, true), 5);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(greeting_is_fixed_newstyle),
        cmocka_unit_test(option_header_is_decoded),
        cmocka_unit_test(option_without_magic_is_refused),
        cmocka_unit_test(option_reply_is_encoded),
        cmocka_unit_test(request_is_decoded),
        cmocka_unit_test(extended_request_is_decoded),
        cmocka_unit_test(extended_replies_have_one_head_of_32_bytes),
        cmocka_unit_test(request_with_reply_magic_is_refused),
        cmocka_unit_test(replies_carry_the_cookie_as_it_came),
        cmocka_unit_test(info_request_is_split),
        cmocka_unit_test(info_request_with_lying_lengths_is_refused),
        cmocka_unit_test(string_above_the_limit_is_refused),
        cmocka_unit_test(meta_request_is_split_into_queries),
        cmocka_unit_test(meta_request_with_lying_count_is_refused),
        cmocka_unit_test(names_are_utf8_without_nul),
        cmocka_unit_test(errnos_become_the_protocols_values),
        cmocka_unit_test(flags_belong_to_their_commands),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
