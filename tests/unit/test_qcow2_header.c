/* SPDX-License-Identifier: MIT */
/*
 * The qcow2 header codec and entry arithmetic against bytes written out by hand.
 *
 * Each refusal starts from one good header and changes one field; code and text are compared.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "base/bytes.h"
#include "base/err.h"
#include "format/qcow2/entry.h"
#include "format/qcow2/header.h"

#define CLUSTER 65536

/* A 100 MiB image as the reference program makes it, but for the names at the end. */
static const uint8_t good[] = {
    'Q',  'F',  'I',  0xfb, 0,   0,    0,   3,    /*   0 magic, version 3 */
    0,    0,    0,    0,    0,   0,    0,   0xb8, /*   8 backing file name at 184 */
    0,    0,    0,    8,    0,   0,    0,   16,   /*  16 its length 8; cluster_bits 16 */
    0,    0,    0,    0,    6,   0x40, 0,   0,    /*  24 size 100 MiB */
    0,    0,    0,    0,    0,   0,    0,   1,    /*  32 no encryption; 1 L1 entry */
    0,    0,    0,    0,    0,   3,    0,   0,    /*  40 L1 table in cluster 3 */
    0,    0,    0,    0,    0,   1,    0,   0,    /*  48 refcount table in cluster 1 */
    0,    0,    0,    1,    0,   0,    0,   0,    /*  56 of 1 cluster; no snapshots */
    0,    0,    0,    0,    0,   0,    0,   0,    /*  64 */
    0,    0,    0,    0,    0,   0,    0,   0,    /*  72 incompatible */
    0,    0,    0,    0,    0,   0,    0,   1,    /*  80 compatible: lazy refcounts */
    0,    0,    0,    0,    0,   0,    0,   1,    /*  88 autoclear: bitmaps */
    0,    0,    0,    4,    0,   0,    0,   0x78, /*  96 16-bit counts; header of 120 bytes */
    0,    0,    0,    0,    0,   0,    0,   0,    /* 104 zlib, padding */
    0xde, 0xad, 0xbe, 0xef, 1,   2,    3,   4,    /* 112 a field of the future */
    0xe2, 0x79, 0x2a, 0xca, 0,   0,    0,   5,    /* 120 backing format, 5 bytes */
    'q',  'c',  'o',  'w',  '2', 0,    0,   0,    /* 128 */
    0x12, 0x34, 0x56, 0x78, 0,   0,    0,   2,    /* 136 an extension nobody knows, 2 bytes */
    0xaa, 0xbb, 0,    0,    0,   0,    0,   0,    /* 144 */
    0x23, 0x85, 0x28, 0x75, 0,   0,    0,   24,   /* 152 bitmaps, 24 bytes */
    0,    0,    0,    2,    0,   0,    0,   0,    /* 160 two of them */
    0,    0,    0,    0,    0,   0,    0,   0x40, /* 168 directory of 64 bytes */
    0,    0,    0,    0,    0,   9,    0,   0,    /* 176 in cluster 9; no end marker: the name */
    'b',  'a',  's',  'e',  '.', 'i',  'm', 'g',  /* 184 */
};

struct fixture {
    uint8_t *buf;
    struct qcow2_header h;
    struct err e;
};

static int setup(void **state) {
    struct fixture *f = calloc(1, sizeof(*f));
    f->buf = calloc(1, CLUSTER);
    memcpy(f->buf, good, sizeof(good));
    *state = f;
    return 0;
}

static int teardown(void **state) {
    struct fixture *f = *state;
    qcow2_header_free(&f->h);
    err_clear(&f->e);
    free(f->buf);
    free(f);
    return 0;
}

static void decodes(struct fixture *f) {
    int r = qcow2_header_decode(f->buf, CLUSTER, &f->h, &f->e);
    if (r)
        print_error("%s\n", err_text(&f->e));
    assert_int_equal(r, 0);
}

static void refuses(struct fixture *f, int code, const char *text) {
    assert_int_equal(qcow2_header_decode(f->buf, CLUSTER, &f->h, &f->e), -code);
    if (!strstr(err_text(&f->e), text))
        print_error("'%s' lacks '%s'\n", err_text(&f->e), text);
    assert_non_null(strstr(err_text(&f->e), text));
    assert_null(f->h.backing_file); /* nothing half-decoded is left */
    assert_null(f->h.unknown);
}

static void every_field_is_read(void **state) {
    struct fixture *f = *state;
    decodes(f);
    const struct qcow2_header *h = &f->h;
    assert_int_equal(h->version, 3);
    assert_int_equal(h->cluster_bits, 16);
    assert_int_equal(h->size, 100 * MIB);
    assert_int_equal(h->l1_size, 1);
    assert_int_equal(h->l1_table_offset, 3 * CLUSTER);
    assert_int_equal(h->refcount_table_offset, CLUSTER);
    assert_int_equal(h->refcount_table_clusters, 1);
    assert_int_equal(h->compatible, QCOW2_COMPAT_LAZY_REFCOUNTS);
    assert_int_equal(h->autoclear, QCOW2_AUTOCLEAR_BITMAPS);
    assert_int_equal(h->refcount_order, 4);
    assert_int_equal(h->header_length, 120);
    assert_string_equal(h->backing_file, "base.img");
    assert_string_equal(h->backing_format, "qcow2");
    assert_true(h->has_bitmaps);
    assert_int_equal(h->bitmaps_count, 2);
    assert_int_equal(h->bitmaps_dir_size, 64);
    assert_int_equal(h->bitmaps_dir_offset, 9 * CLUSTER);
}

static void what_is_unknown_survives_a_rewrite(void **state) {
    struct fixture *f = *state;
    struct qcow2_header again;
    decodes(f);
    uint8_t *out = calloc(1, CLUSTER);
    int64_t used = qcow2_header_encode(&f->h, out, CLUSTER, &f->e);
    assert_true(used > 0);
    assert_int_equal(qcow2_header_decode(out, CLUSTER, &again, &f->e), 0);
    assert_int_equal(again.trailing_len, 8);
    assert_memory_equal(again.trailing, good + 112, 8);
    assert_int_equal(again.unknown_count, 1);
    assert_int_equal(again.unknown[0].type, 0x12345678);
    assert_int_equal(again.unknown[0].length, 2);
    assert_memory_equal(again.unknown[0].data, good + 144, 2);
    assert_string_equal(again.backing_file, "base.img");
    assert_int_equal(again.bitmaps_dir_offset, 9 * CLUSTER);
    qcow2_header_free(&again);
    free(out);
}

static void encoding_is_stable(void **state) {
    struct fixture *f = *state;
    struct qcow2_header again;
    decodes(f);
    uint8_t *one = calloc(1, CLUSTER), *two = calloc(1, CLUSTER);
    assert_true(qcow2_header_encode(&f->h, one, CLUSTER, &f->e) > 0);
    assert_int_equal(qcow2_header_decode(one, CLUSTER, &again, &f->e), 0);
    assert_true(qcow2_header_encode(&again, two, CLUSTER, &f->e) > 0);
    assert_memory_equal(one, two, CLUSTER);
    qcow2_header_free(&again);
    free(one);
    free(two);
}

static void version_2_has_fixed_values_for_what_came_later(void **state) {
    struct fixture *f = *state;
    f->buf[7] = 2;
    memset(f->buf + 72, 0xff, 48); /* not version 3 fields: extensions begin here */
    be32_store(f->buf + 72, QCOW2_EXT_END);
    decodes(f);
    assert_int_equal(f->h.refcount_order, 4);
    assert_int_equal(f->h.header_length, 72);
    assert_int_equal(f->h.incompatible, 0);
    assert_int_equal(f->h.compression_type, 0);
}

static void a_header_of_104_bytes_means_zlib(void **state) {
    struct fixture *f = *state;
    f->buf[103] = 104;
    memmove(f->buf + 104, f->buf + 120, sizeof(good) - 120);
    memset(f->buf + sizeof(good) - 16, 0, 16);
    f->buf[15] = 184 - 16;
    decodes(f);
    assert_int_equal(f->h.compression_type, 0);
    assert_string_equal(f->h.backing_format, "qcow2");
    assert_string_equal(f->h.backing_file, "base.img");
}

static void other_magic_is_refused(void **state) {
    struct fixture *f = *state;
    f->buf[0] = 'q';
    refuses(f, EINVAL, "not a qcow2 image");
}

static void version_1_and_4_are_refused(void **state) {
    struct fixture *f = *state;
    f->buf[7] = 4;
    refuses(f, ENOTSUP, "version 4 is not supported");
    f->buf[7] = 1;
    refuses(f, ENOTSUP, "version 1 is not supported");
}

static void cluster_bits_outside_9_to_21_are_refused(void **state) {
    static const uint8_t bad[] = {0, 8, 22, 63, 64, 255};
    struct fixture *f = *state;
    for (size_t i = 0; i < sizeof(bad); i++) {
        char text[64];
        f->buf[23] = bad[i];
        snprintf(text, sizeof(text), "cluster_bits %u is outside 9..21", bad[i]);
        refuses(f, EINVAL, text);
    }
}

static void a_size_with_the_sign_bit_is_refused(void **state) {
    struct fixture *f = *state;
    f->buf[24] = 0x80;
    refuses(f, EFBIG, "size 9223372036959633408 is above");
}

static void unknown_encryption_is_refused(void **state) {
    struct fixture *f = *state;
    f->buf[35] = 3;
    refuses(f, EINVAL, "encryption method 3 is above 2");
}

static void refcount_order_above_6_is_refused(void **state) {
    struct fixture *f = *state;
    f->buf[99] = 7;
    refuses(f, EINVAL, "refcount_order 7 is above 6");
}

static void header_length_out_of_range_is_refused(void **state) {
    static const uint32_t bad[] = {0, 72, 96, 103, 105, 65544, 0xfffffff8};
    struct fixture *f = *state;
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        be32_store(f->buf + 100, bad[i]);
        refuses(f, EINVAL, "header_length");
    }
}

static void compression_type_without_its_feature_bit_is_refused(void **state) {
    struct fixture *f = *state;
    f->buf[104] = 1;
    refuses(f, EINVAL, "contradicts the incompatible feature bit 3");
    f->buf[104] = 0;
    f->buf[79] = 8;
    refuses(f, EINVAL, "contradicts the incompatible feature bit 3");
}

static void compression_type_beyond_zstd_is_refused(void **state) {
    struct fixture *f = *state;
    f->buf[79] = 8;
    f->buf[104] = 2;
    refuses(f, ENOTSUP, "compression type 2 is unknown");
}

static void an_extension_longer_than_its_area_is_refused(void **state) {
    struct fixture *f = *state;
    be32_store(f->buf + 140, 41); /* 40 bytes are left before the backing file name */
    refuses(f, EINVAL, "0x12345678 at 136: length 41 reaches beyond");
    be32_store(f->buf + 140, UINT32_MAX);
    refuses(f, EINVAL, "length 4294967295 reaches beyond");
}

static void bitmaps_and_crypto_extensions_have_one_length(void **state) {
    struct fixture *f = *state;
    be32_store(f->buf + 156, 23);
    refuses(f, EINVAL, "bitmaps extension has 23 bytes instead of 24");
    be32_store(f->buf + 152, QCOW2_EXT_CRYPTO);
    refuses(f, EINVAL, "crypto extension has 23 bytes instead of 16");
}

static void a_backing_name_outside_the_first_cluster_is_refused(void **state) {
    struct fixture *f = *state;
    be64_store(f->buf + 8, CLUSTER - 7);
    refuses(f, EINVAL, "not inside the first cluster");
    be64_store(f->buf + 8, UINT64_MAX);
    refuses(f, EINVAL, "not inside the first cluster");
    be64_store(f->buf + 8, 64);
    refuses(f, EINVAL, "lies inside the header");
}

static void a_backing_name_above_1023_bytes_is_refused(void **state) {
    struct fixture *f = *state;
    be32_store(f->buf + 16, 1024);
    refuses(f, EINVAL, "1024 bytes, more than 1023");
}

static void a_backing_name_with_a_zero_byte_is_refused(void **state) {
    struct fixture *f = *state;
    f->buf[186] = 0;
    refuses(f, EINVAL, "holds a zero byte");
}

static void a_cut_off_header_is_refused(void **state) {
    struct fixture *f = *state;
    for (size_t len = 0; len < sizeof(good); len++)
        assert_true(qcow2_header_decode(f->buf, len, &f->h, NULL) < 0);
}

static void what_does_not_fit_the_first_cluster_is_not_encoded(void **state) {
    struct fixture *f = *state;
    uint8_t out[512];
    decodes(f);
    free(f->h.backing_file);
    f->h.backing_file = malloc(512);
    memset(f->h.backing_file, 'x', 511);
    f->h.backing_file[511] = 0;
    assert_int_equal(qcow2_header_encode(&f->h, out, sizeof(out), &f->e), -ENOSPC);
    assert_non_null(strstr(err_text(&f->e), "do not fit the first cluster of 512 bytes"));
}

/* ---- judging ---- */

static void judged(int r, int code, struct err *e, const char *text) {
    assert_int_equal(r, -code);
    if (!strstr(err_text(e), text))
        print_error("'%s' lacks '%s'\n", err_text(e), text);
    assert_non_null(strstr(err_text(e), text));
}

static void tables_must_be_aligned_and_behind_the_header(void **state) {
    struct fixture *f = *state;
    decodes(f);
    f->h.l1_table_offset = 513;
    judged(qcow2_header_check_l1(&f->h, &f->e), EINVAL, &f->e,
           "L1 table: offset 513 is not a multiple of 65536");
    f->h.l1_table_offset = 0;
    judged(qcow2_header_check_l1(&f->h, &f->e), EINVAL, &f->e, "overlaps the header");
    f->h.refcount_table_offset = CLUSTER + 8;
    judged(qcow2_header_check_reftable(&f->h, &f->e), EINVAL, &f->e,
           "refcount table: offset 65544 is not a multiple of 65536");
    f->h.refcount_table_offset = (uint64_t)1 << 56;
    judged(qcow2_header_check_reftable(&f->h, &f->e), EINVAL, &f->e, "is not below");
    f->h.refcount_table_offset = UINT64_MAX - CLUSTER + 1;
    judged(qcow2_header_check_reftable(&f->h, &f->e), EINVAL, &f->e, "is not below");
}

static void tables_must_not_overlap(void **state) {
    struct fixture *f = *state;
    decodes(f);
    f->h.refcount_table_offset = 2 * CLUSTER;
    f->h.refcount_table_clusters = 2;
    judged(qcow2_header_check_reftable(&f->h, &f->e), EINVAL, &f->e, "overlaps the L1 table");
}

static void tables_are_capped(void **state) {
    struct fixture *f = *state;
    decodes(f);
    f->h.l1_size = UINT32_MAX;
    judged(qcow2_header_check_l1(&f->h, &f->e), EFBIG, &f->e, "above the limit of 4194304");
    f->h.refcount_table_clusters = 129;
    judged(qcow2_header_check_reftable(&f->h, &f->e), EFBIG, &f->e, "above the limit of 128");
    f->h.refcount_table_clusters = 0;
    judged(qcow2_header_check_reftable(&f->h, &f->e), EINVAL, &f->e, "has no clusters");
    f->h.nb_snapshots = 65537;
    judged(qcow2_header_check_snapshots(&f->h, &f->e), EFBIG, &f->e, "above the limit of 65536");
}

static void the_l1_table_must_cover_the_disk(void **state) {
    struct fixture *f = *state;
    decodes(f);
    f->h.size = 512 * MIB + 1;
    judged(qcow2_header_check_l1(&f->h, &f->e), EINVAL, &f->e,
           "L1 table is too small: 1 entries where size 536870913 needs 2");
    f->h.size = 512 * MIB;
    assert_int_equal(qcow2_header_check_l1(&f->h, &f->e), 0);
}

static void l1_entries_for_the_extremes(void **state) {
    assert_int_equal(qcow2_l1_entries_for(9, false, 0), 0);
    assert_int_equal(qcow2_l1_entries_for(9, false, 1), 1);
    assert_int_equal(qcow2_l1_entries_for(9, false, 32 * KIB), 1);
    assert_int_equal(qcow2_l1_entries_for(9, false, 32 * KIB + 1), 2);
    assert_int_equal(qcow2_l1_entries_for(9, false, INT64_MAX), (uint64_t)1 << 48);
    assert_int_equal(qcow2_l1_entries_for(21, false, INT64_MAX), (uint64_t)1 << 24);
}

static void features_are_refused_by_name(void **state) {
    struct fixture *f = *state;
    decodes(f);
    f->h.incompatible = QCOW2_INCOMPAT_DATA_FILE;
    assert_int_equal(qcow2_header_check_features(&f->h, true, false, &f->e), 0);
    f->h.incompatible = QCOW2_INCOMPAT_EXTENDED_L2;
    f->h.cluster_bits = 13;
    judged(qcow2_header_check_features(&f->h, false, false, &f->e), EINVAL, &f->e,
           "cluster_bits 13 is below 14, the least with extended L2 entries");
    f->h.cluster_bits = 16;
    f->h.incompatible = (uint64_t)1 << 63;
    judged(qcow2_header_check_features(&f->h, false, true, &f->e), ENOTSUP, &f->e,
           "incompatible features are not supported: bit 63");
    f->h.incompatible = 0;
    f->h.crypt_method = QCOW2_CRYPT_LUKS;
    judged(qcow2_header_check_features(&f->h, false, false, &f->e), ENOTSUP, &f->e, "LUKS");
}

static void the_images_own_feature_name_is_shown_made_safe(void **state) {
    struct fixture *f = *state;
    decodes(f);
    f->h.feature_table_len = 48;
    f->h.feature_table = calloc(1, 48);
    f->h.feature_table[1] = 17;
    strcpy((char *)f->h.feature_table + 2, "time\x1b[31mtravel");
    f->h.incompatible = 1 << 17;
    judged(qcow2_header_check_features(&f->h, false, false, &f->e), ENOTSUP, &f->e,
           "features are not supported: time\\x1b[31mtravel");
}

static void corrupt_images_are_for_reading_and_dirty_ones_are_mended(void **state) {
    struct fixture *f = *state;
    decodes(f);
    f->h.incompatible = QCOW2_INCOMPAT_DIRTY;
    assert_int_equal(qcow2_header_check_features(&f->h, false, false, &f->e), 0);
    assert_int_equal(qcow2_header_check_features(&f->h, true, true, &f->e), 0);
    assert_int_equal(qcow2_header_check_features(&f->h, true, false, &f->e), 0);
    f->h.incompatible = QCOW2_INCOMPAT_CORRUPT;
    assert_int_equal(qcow2_header_check_features(&f->h, false, false, &f->e), 0);
    judged(qcow2_header_check_features(&f->h, true, false, &f->e), EROFS, &f->e, "marked corrupt");
}

/* ---- entries ---- */

static void entries_are_classified(void **state) {
    const uint64_t host = 5 * CLUSTER;
    assert_int_equal(qcow2_classify(3, 16, 0), QCOW2_CLUSTER_NONE);
    assert_int_equal(qcow2_classify(3, 16, 1), QCOW2_CLUSTER_ZERO);
    assert_int_equal(qcow2_classify(3, 16, host | 1), QCOW2_CLUSTER_ZERO_ALLOC);
    assert_int_equal(qcow2_classify(3, 16, host | QCOW2_COPIED), QCOW2_CLUSTER_DATA);
    assert_int_equal(qcow2_classify(3, 16, host), QCOW2_CLUSTER_DATA);
    assert_int_equal(qcow2_classify(3, 16, QCOW2_COMPRESSED | 77), QCOW2_CLUSTER_CODED);
    assert_int_equal(qcow2_classify(2, 16, host | 1), QCOW2_CLUSTER_BAD);
    assert_int_equal(qcow2_classify(3, 16, host + 512), QCOW2_CLUSTER_BAD);
    assert_int_equal(qcow2_classify(3, 16, QCOW2_COPIED), QCOW2_CLUSTER_BAD);
}

static void compressed_entries_round_trip_at_every_cluster_size(void **state) {
    for (uint32_t bits = 9; bits <= 21; bits++) {
        const uint64_t hosts[] = {(uint64_t)1 << bits, ((uint64_t)1 << bits) + 511, 123456789,
                                  ((uint64_t)1 << 48) + 1};
        const uint32_t lengths[] = {1, 2, 511, (1u << bits) - 1, 1u << bits};
        for (size_t i = 0; i < 4; i++) {
            for (size_t k = 0; k < 5; k++) {
                uint64_t host, entry = qcow2_coded_encode(bits, hosts[i], lengths[k]);
                uint32_t length;
                assert_true(entry & QCOW2_COMPRESSED);
                assert_false(entry & QCOW2_COPIED);
                qcow2_coded_decode(bits, entry, &host, &length);
                assert_true(host == hosts[i]);
                assert_true(length >= lengths[k] && length - lengths[k] < 512);
                assert_true((host + length) % 512 == 0);
            }
        }
    }
}

static void compressed_fields_stand_where_the_specification_says(void **state) {
    /* 512-byte clusters: x = 61, one bit of sectors; 2 MiB: x = 49, thirteen. */
    assert_int_equal(qcow2_coded_shift(9), 61);
    assert_int_equal(qcow2_coded_shift(21), 49);
    assert_true(qcow2_coded_encode(9, 511, 2) == (QCOW2_COMPRESSED | (uint64_t)1 << 61 | 511));
    assert_true(qcow2_coded_encode(21, 1024, 1 << 20) ==
                (QCOW2_COMPRESSED | (uint64_t)2047 << 49 | 1024));
}

static void compressed_offsets_beyond_the_field_do_not_fit(void **state) {
    assert_true(qcow2_coded_encode(21, ((uint64_t)1 << 49) - 1, 1));
    assert_false(qcow2_coded_encode(21, ((uint64_t)1 << 49) - 1, 2));
    assert_false(qcow2_coded_encode(21, (uint64_t)1 << 49, 1));
    assert_false(qcow2_coded_encode(16, CLUSTER, 0));
}

static void counts_of_every_width_stand_alone(void **state) {
    uint8_t block[512];
    for (uint32_t order = 0; order <= 6; order++) {
        uint32_t entries = 4096u >> order;
        uint64_t limit = qcow2_refcount_limit(order);
        memset(block, 0, sizeof(block));
        for (uint32_t i = 0; i < entries; i++)
            qcow2_refcount_set(block, i, order, (i * UINT64_C(0x9e3779b97f4a7c15)) & limit);
        for (uint32_t i = 0; i < entries; i++)
            assert_true(qcow2_refcount_get(block, i, order) ==
                        ((i * UINT64_C(0x9e3779b97f4a7c15)) & limit));
        qcow2_refcount_set(block, 3, order, limit);
        qcow2_refcount_set(block, 4, order, 0);
        qcow2_refcount_set(block, 5, order, limit);
        assert_true(qcow2_refcount_get(block, 3, order) == limit);
        assert_true(qcow2_refcount_get(block, 4, order) == 0);
        assert_true(qcow2_refcount_get(block, 5, order) == limit);
    }
}

static void narrow_counts_begin_in_the_low_bits(void **state) {
    uint8_t block[8] = {0};
    qcow2_refcount_set(block, 9, 0, 1);
    assert_int_equal(block[1], 0x02);
    qcow2_refcount_set(block, 8, 1, 3); /* third byte */
    assert_int_equal(block[2], 0x03);
    qcow2_refcount_set(block, 7, 2, 0xa); /* high half of the fourth byte */
    assert_int_equal(block[3], 0xa0);
    qcow2_refcount_set(block, 3, 4, 0x1234);
    assert_int_equal(block[6], 0x12);
    assert_int_equal(block[7], 0x34);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void) {
    const struct CMUnitTest tests[] = {
        T(every_field_is_read),
        T(what_is_unknown_survives_a_rewrite),
        T(encoding_is_stable),
        T(version_2_has_fixed_values_for_what_came_later),
        T(a_header_of_104_bytes_means_zlib),
        T(other_magic_is_refused),
        T(version_1_and_4_are_refused),
        T(cluster_bits_outside_9_to_21_are_refused),
        T(a_size_with_the_sign_bit_is_refused),
        T(unknown_encryption_is_refused),
        T(refcount_order_above_6_is_refused),
        T(header_length_out_of_range_is_refused),
        T(compression_type_without_its_feature_bit_is_refused),
        T(compression_type_beyond_zstd_is_refused),
        T(an_extension_longer_than_its_area_is_refused),
        T(bitmaps_and_crypto_extensions_have_one_length),
        T(a_backing_name_outside_the_first_cluster_is_refused),
        T(a_backing_name_above_1023_bytes_is_refused),
        T(a_backing_name_with_a_zero_byte_is_refused),
        T(a_cut_off_header_is_refused),
        T(what_does_not_fit_the_first_cluster_is_not_encoded),
        T(tables_must_be_aligned_and_behind_the_header),
        T(tables_must_not_overlap),
        T(tables_are_capped),
        T(the_l1_table_must_cover_the_disk),
        T(l1_entries_for_the_extremes),
        T(features_are_refused_by_name),
        T(the_images_own_feature_name_is_shown_made_safe),
        T(corrupt_images_are_for_reading_and_dirty_ones_are_mended),
        T(entries_are_classified),
        T(compressed_entries_round_trip_at_every_cluster_size),
        T(compressed_fields_stand_where_the_specification_says),
        T(compressed_offsets_beyond_the_field_do_not_fit),
        T(counts_of_every_width_stand_alone),
        T(narrow_counts_begin_in_the_low_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
