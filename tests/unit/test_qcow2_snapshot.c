/* SPDX-License-Identifier: MIT */
/* Entries of the snapshot table as bytes, and 64 counts at a time.  No image: interop tests do. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>
#include "base/bytes.h"
#include "base/err.h"
#include "base/strbuf.h"
#include "format/qcow2/counts.h"
#include "format/qcow2/snapshot.h"

static const struct snapshot_info whole = {.id = "7",
                                           .name = "before the upgrade",
                                           .vm_state_size = (UINT64_C(5) << 32) + 1,
                                           .date_sec = 1,
                                           .date_nsec = 2,
                                           .vm_clock_nsec = UINT64_C(3) << 40,
                                           .icount = 4,
                                           .disk_size = UINT64_C(6) << 40};

static void encode(struct strbuf *b, const struct snapshot_info *info) {
    qcow2_snapshot_encode(b, info, 0x50000, 9);
}

static void what_is_encoded_decodes_the_same(void **st) {
    AUTO_STRBUF struct strbuf b = STRBUF_INIT;
    struct qcow2_snapshot x;
    encode(&b, &whole);
    assert_int_equal(b.len, 40 + 24 + 1 + 18 + 5); /* padded to 8 */
    assert_int_equal(qcow2_snapshot_decode((uint8_t *)b.s, b.len, 1, &x, NULL), 40 + 24 + 1 + 18);
    assert_int_equal(x.l1_offset, 0x50000);
    assert_int_equal(x.l1_entries, 9);
    assert_int_equal(x.vm_state_size, whole.vm_state_size);
    assert_int_equal(be32_load(b.s + 32), 0); /* it does not fit the old field */
    assert_int_equal(x.disk_size, whole.disk_size);
    assert_int_equal(x.vm_clock_nsec, whole.vm_clock_nsec);
    assert_int_equal(x.icount, 4);
    assert_int_equal(x.date_sec, 1);
    assert_int_equal(x.date_nsec, 2);
    assert_memory_equal(x.id, "7before the upgrade", 19);
}

static void an_entry_that_is_cut_off_asks_for_more(void **st) {
    AUTO_STRBUF struct strbuf b = STRBUF_INIT;
    struct qcow2_snapshot x;
    encode(&b, &whole);
    for (size_t have = 0; have < 83; have++) {
        uint8_t *exact = malloc(have + 1); /* a byte too far is found by the sanitizer */
        memcpy(exact, b.s, have);
        assert_int_equal(qcow2_snapshot_decode(exact, have, 1, &x, NULL), 0);
        if (have >= 40)
            assert_int_equal(x.raw_length, 83);
        free(exact);
    }
}

static void lengths_at_their_limits(void **st) {
    size_t most = 40 + 1024 + 65535 * 2;
    uint8_t *p = calloc(1, most);
    struct qcow2_snapshot x;
    struct err e AUTO_ERR = ERR_INIT;
    be16_store(p + 12, 65535);
    be16_store(p + 14, 65535);
    be32_store(p + 36, 1024);
    assert_int_equal(qcow2_snapshot_decode(p, most, 1, &x, &e), most);
    assert_int_equal(qcow2_snapshot_decode(p, most - 1, 1, &x, &e), 0);
    be32_store(p + 36, 1025);
    assert_int_equal(qcow2_snapshot_decode(p, most, 1, &x, &e), -EINVAL);
    assert_string_equal(err_text(&e), "1025 bytes of extra data are above the limit of 1024");
    be32_store(p + 36, UINT32_MAX);
    assert_int_equal(qcow2_snapshot_decode(p, most, 1, &x, &e), -EINVAL);
    free(p);
}

static void extra_data_says_as_much_as_it_is_long(void **st) {
    AUTO_STRBUF struct strbuf b = STRBUF_INIT;
    struct qcow2_snapshot x;
    encode(&b, &whole);
    for (uint32_t extra = 0; extra <= 24; extra += 8) {
        be32_store(b.s + 36, extra);
        assert_true(qcow2_snapshot_decode((uint8_t *)b.s, b.len, 77, &x, NULL) > 0);
        assert_int_equal(x.vm_state_size, extra >= 8 ? whole.vm_state_size : 0);
        assert_int_equal(x.disk_size, extra >= 16 ? whole.disk_size : 77);
        assert_int_equal(x.icount, extra >= 24 ? 4 : SNAPSHOT_ICOUNT_UNKNOWN);
    }
}

/* An entry with 16 bytes of extra data or more is somebody's: not a byte of it changes. */
static void entries_are_kept_and_short_ones_completed(void **st) {
    AUTO_STRBUF struct strbuf b = STRBUF_INIT, next = STRBUF_INIT;
    struct qcow2_snapshot x, y;
    encode(&b, &whole);
    be32_store(b.s + 36, 16);
    assert_int_equal(qcow2_snapshot_decode((uint8_t *)b.s, b.len, 77, &x, NULL), 75);
    qcow2_snapshot_append(&next, &x);
    assert_int_equal(next.len, 80);
    assert_memory_equal(next.s, b.s, 75);
    be32_store(b.s + 36, 8);
    assert_int_equal(qcow2_snapshot_decode((uint8_t *)b.s, b.len, 77, &x, NULL), 67);
    qcow2_snapshot_append(&next, &x);
    assert_int_equal(next.len, 80 + 88);
    assert_int_equal(qcow2_snapshot_decode((uint8_t *)next.s + 80, 88, 1, &y, NULL), 83);
    assert_int_equal(y.disk_size, 77);
    assert_int_equal(y.vm_state_size, whole.vm_state_size);
    assert_int_equal(y.l1_offset, 0x50000);
    assert_memory_equal(y.id, x.id, y.id_length + y.name_length);
}

static struct qcow2_snapshot with_id(const char *id, uint16_t length) {
    return (struct qcow2_snapshot){.id = id, .id_length = length};
}

static void ids_are_numbers_above_all_others(void **st) {
    struct qcow2_snapshot v[] = {with_id("3", 1),
                                 with_id("abc", 3),
                                 with_id("12x", 3),
                                 with_id("", 0),
                                 with_id("9\0"
                                         "9",
                                         3),
                                 with_id("7", 1)};
    struct qcow2_snapshots t = {.v = v, .count = 6};
    assert_int_equal(qcow2_snapshot_next_id(&t), 13);
    t.count = 2;
    assert_int_equal(qcow2_snapshot_next_id(&t), 4);
    t.count = 0;
    assert_int_equal(qcow2_snapshot_next_id(&t), 1);
    v[0] = with_id("18446744073709551615", 20);
    v[1] = with_id("99999999999999999999999999", 26);
    v[2] = with_id("5", 1);
    t.count = 3;
    assert_int_equal(qcow2_snapshot_next_id(&t), 6);
    assert_ptr_equal(qcow2_snapshot_by_id(&t, "5"), &v[2]);
    assert_null(qcow2_snapshot_by_id(&t, "55"));
}

static void sixty_four_counts_at_once(void **st) {
    struct counts c;
    uint64_t bits;
    assert_int_equal(counts_init(&c, 1 << 20), 0);
    assert_true(counts_word(&c, 4096, &bits));
    assert_int_equal(bits, 0);
    assert_int_equal(counts_add(&c, 4096 + 62, 4, 1), 0);
    assert_true(counts_word(&c, 4096, &bits));
    assert_int_equal(bits, UINT64_C(3) << 62);
    assert_true(counts_word(&c, 4160, &bits));
    assert_int_equal(bits, 3);
    assert_int_equal(counts_add(&c, 4160, 1, 1), 0);
    assert_false(counts_word(&c, 4096, &bits)); /* one of its page is larger */
    counts_free(&c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_encoded_decodes_the_same),
        cmocka_unit_test(an_entry_that_is_cut_off_asks_for_more),
        cmocka_unit_test(lengths_at_their_limits),
        cmocka_unit_test(extra_data_says_as_much_as_it_is_long),
        cmocka_unit_test(entries_are_kept_and_short_ones_completed),
        cmocka_unit_test(ids_are_numbers_above_all_others),
        cmocka_unit_test(sixty_four_counts_at_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
