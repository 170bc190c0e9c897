/* SPDX-License-Identifier: MIT */
/*
 * VMDK's header of sparse files and its descriptor against bytes and texts written out by hand.
 *
 * Each refusal starts from one good header or text and changes one thing; code and text are
 * compared.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "base/bytes.h"
#include "base/err.h"
#include "base/strbuf.h"
#include "format/vmdk/vmdk.h"

/* ---------------------------------------------------------------- the header */

/* 10 MiB in grains of 64 KiB, as other writers make it. */
static void good_header(uint8_t *buf) {
    static const uint8_t bytes[] = {
        'K',  'D', 'M', 'V',  1,   0,  0, 0, /*  0 magic, version 1 */
        3,    0,   0,   0,    0,   80, 0, 0, /*  8 line ends, redundant; capacity 20480 */
        0,    0,   0,   0,    128, 0,  0, 0, /* 16 grain of 128 sectors */
        0,    0,   0,   0,    1,   0,  0, 0, /* 24 descriptor in sector 1 */
        0,    0,   0,   0,    20,  0,  0, 0, /* 32 of 20 sectors */
        0,    0,   0,   0,    0,   2,  0, 0, /* 40 tables of 512 entries */
        21,   0,   0,   0,    0,   0,  0, 0, /* 48 redundant directory */
        26,   0,   0,   0,    0,   0,  0, 0, /* 56 directory */
        0x80, 0,   0,   0,    0,   0,  0, 0, /* 64 grains from sector 128 on */
        0,    10,  ' ', '\r', 10,  0,  0,    /* 72 clean; line ends; not compressed */
    };
    memset(buf, 0, VMDK_HEADER_BYTES);
    memcpy(buf, bytes, sizeof(bytes));
}

static void a_header_is_read_and_written(void **state) {
    uint8_t buf[VMDK_HEADER_BYTES], again[VMDK_HEADER_BYTES];
    struct vmdk_header h;
    good_header(buf);
    assert_int_equal(vmdk_header_parse(buf, &h, NULL), 0);
    assert_int_equal(h.version, 1);
    assert_int_equal(h.flags, VMDK_NEWLINES | VMDK_REDUNDANT);
    assert_int_equal(h.capacity, 20480);
    assert_int_equal(h.grain, 128);
    assert_int_equal(h.desc_offset, 1);
    assert_int_equal(h.desc_size, 20);
    assert_int_equal(h.gtes, 512);
    assert_int_equal(h.rgd, 21);
    assert_int_equal(h.gd, 26);
    assert_int_equal(h.overhead, 128);
    assert_false(h.unclean);
    vmdk_header_store(&h, again);
    assert_memory_equal(buf, again, sizeof(buf));
}

static void a_header_out_of_its_range_is_named(void **state) {
    static const struct {
        unsigned at, bytes;
        uint64_t value;
        int code;
        const char *words;
    } rows[] = {
        {0, 4, 0x12345678, EINVAL, "magic 0x12345678"},
        {4, 4, 4, ENOTSUP, "version 4"},
        {4, 4, 0, ENOTSUP, "version 0"},
        {8, 4, 0x103, ENOTSUP, "unknown flags 0x100"},
        {8, 4, 0x10003, ENOTSUP, "compression 0"},
        {12, 8, UINT64_C(1) << 55, EFBIG, "above the limit"},
        {20, 8, 0, EINVAL, "grains of 0 sectors"},
        {20, 8, 7, EINVAL, "grains of 7 sectors"},
        {20, 8, 96, EINVAL, "grains of 96 sectors"},
        {20, 8, 4096, EINVAL, "grains of 4096 sectors"},
        {20, 8, (UINT64_C(1) << 55) + 128, EINVAL, "grains of"},
        {44, 4, 0, EINVAL, "tables of 0 entries"},
        {44, 4, 500, EINVAL, "tables of 500 entries"},
        {44, 4, 16384, EINVAL, "tables of 16384 entries"},
        {75, 1, '\n', EINVAL, "line ends"},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        uint8_t buf[VMDK_HEADER_BYTES], value[8];
        struct vmdk_header h;
        struct err e AUTO_ERR = ERR_INIT;
        good_header(buf);
        le64_store(value, rows[i].value);
        memcpy(buf + rows[i].at, value, rows[i].bytes);
        assert_int_equal(vmdk_header_parse(buf, &h, &e), -rows[i].code);
        assert_non_null(strstr(err_text(&e), rows[i].words));
    }
}

/* ---------------------------------------------------------------- the descriptor */

static const char good_text[] = "# Disk DescriptorFile\n"
                                "version=1\n"
                                "CID=12ab34cd\n"
                                "parentCID=fffffffe\r\n"
                                "createType=\"custom\"\n"
                                "# Extent description\n"
                                "RW 2048 FLAT \"a b.vmdk\" 63\n"
                                "rdonly 100 SPARSE \"c.vmdk\"\n"
                                "NOACCESS 1 ZERO\n"
                                "ddb.adapterType = \"ide\"\n"
                                "whatever else there is\n";

static int parse(const char *text, struct vmdk_desc *d, struct err *e) {
    *d = (struct vmdk_desc){0};
    return vmdk_desc_parse(text, strlen(text), d, e);
}

static void a_descriptor_is_read(void **state) {
    struct vmdk_desc d;
    assert_int_equal(parse(good_text, &d, NULL), 0);
    assert_int_equal(d.cid, 0x12ab34cd);
    assert_int_equal(d.cid_digits, 8);
    assert_memory_equal(good_text + d.cid_at, "12ab34cd", 8);
    assert_int_equal(d.parent_cid, 0xfffffffe);
    assert_memory_equal(good_text + d.parent_at, "fffffffe", 8);
    assert_string_equal(d.create_type, "custom");
    assert_null(d.hint);
    assert_int_equal(d.count, 3);
    assert_int_equal(d.size, 2149 * 512);
    assert_int_equal(d.extents[0].access, VMDK_RW);
    assert_int_equal(d.extents[0].type, VMDK_FLAT);
    assert_string_equal(d.extents[0].name, "a b.vmdk");
    assert_int_equal(d.extents[0].offset, 63 * 512);
    assert_int_equal(d.extents[1].access, VMDK_RDONLY);
    assert_int_equal(d.extents[1].start, 2048 * 512);
    assert_int_equal(d.extents[2].access, VMDK_NOACCESS);
    assert_int_equal(d.extents[2].type, VMDK_ZERO);
    assert_null(d.extents[2].name);
    assert_string_equal(json_string_value(json_object_get(d.ddb, "adapterType")), "ide");
    vmdk_desc_free(&d);
}

static void a_descriptor_that_cannot_be_is_named(void **state) {
    static const struct {
        const char *text;
        int code;
        const char *words;
    } rows[] = {
        {"", EINVAL, "no createType"},
        {"createType=\"x\"\n", EINVAL, "no extents"},
        {"version=4\n", ENOTSUP, "version '4'"},
        {"CID=123456789\n", EINVAL, "CID '123456789'"},
        {"parentCID=xyz\n", EINVAL, "parentCID 'xyz'"},
        {"RW -1 ZERO\n", EINVAL, "'-1' is no size"},
        {"RW 18446744073709551616 ZERO\n", EINVAL, "is no size"},
        {"RW 36028797018963968 ZERO\n", EFBIG, "are too many"},
        {"RW 18014398509481983 ZERO\nRW 1 ZERO\n", EFBIG, "extent 1: 1 sectors are too many"},
        {"RW 1 DISK \"a\"\n", ENOTSUP, "type 'DISK'"},
        {"RW 1 FLAT a 0\n", EINVAL, "no file name in quotes"},
        {"RW 1 FLAT \"\" 0\n", EINVAL, "file name of 0 bytes"},
        {"RW 1 FLAT \"a\n", EINVAL, "no file name in quotes"},
        {"RW 1 FLAT \"a\"\n", EINVAL, "needs an offset"},
        {"RW 1 FLAT \"a\" x\n", EINVAL, "'x' is no offset"},
        {"RW 1 FLAT \"a\" 18014398509481983\n", EFBIG, "is too large"},
        {"RW 1 SPARSE \"a\" 1\n", ENOTSUP, "sparse extent at an offset"},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        struct vmdk_desc d;
        struct err e AUTO_ERR = ERR_INIT;
        assert_int_equal(parse(rows[i].text, &d, &e), -rows[i].code);
        assert_non_null(strstr(err_text(&e), rows[i].words));
        vmdk_desc_free(&d);
    }
}

static void another_parent_leaves_the_other_lines(void **state) {
    struct strbuf once AUTO_STRBUF = STRBUF_INIT, back AUTO_STRBUF = STRBUF_INIT;
    struct vmdk_desc d;
    vmdk_desc_rewrite(good_text, sizeof(good_text), 0xabcd, "base.vmdk", &once);
    assert_non_null(strstr(once.s, "parentCID=0000abcd\r\n"));
    assert_int_equal(parse(once.s, &d, NULL), 0);
    assert_int_equal(d.parent_cid, 0xabcd);
    assert_string_equal(d.hint, "base.vmdk");
    assert_int_equal(d.count, 3);
    vmdk_desc_free(&d);
    vmdk_desc_rewrite(once.s, once.len, 0xfffffffe, NULL, &back);
    assert_string_equal(back.s, good_text);
}

static bool probes(const char *text) {
    return vmdk_desc_probe((const uint8_t *)text, strlen(text));
}

static void texts_of_other_programs_are_no_descriptors(void **state) {
    assert_true(probes(good_text));
    assert_true(probes("# disk descriptorfile\n"));
    assert_true(probes("\n# made by hand\nversion=1\ncreateType=\"vmfs\"\n"));
    assert_false(probes(""));
    assert_false(probes("version=1\n"));
    assert_false(probes("version=9\ncreateType=\"vmfs\"\n"));
    assert_false(probes("#!/bin/sh\necho createType\n"));
    assert_false(probes("createType=\"vmfs\"\nversion=1\n"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_header_is_read_and_written),
        cmocka_unit_test(a_header_out_of_its_range_is_named),
        cmocka_unit_test(a_descriptor_is_read),
        cmocka_unit_test(a_descriptor_that_cannot_be_is_named),
        cmocka_unit_test(another_parent_leaves_the_other_lines),
        cmocka_unit_test(texts_of_other_programs_are_no_descriptors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
