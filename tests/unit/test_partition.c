/* SPDX-License-Identifier: MIT */
/* Partition tables in a disk in memory: what is in them comes out, and nothing that is not there.
 */
#include <errno.h>
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>
#include "base/bytes.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "job/partition.h"
#include "runtime/loop.h"

#define DISK_BYTES ((uint64_t)(4 * MIB))

static struct loop *loop;

/* ---------------------------------------------------------------- what the tests start from */

static uint8_t disk[4 * MIB];
static struct partition_table table;
static struct err error = ERR_INIT;

static int setup(void **state) {
    memset(disk, 0, sizeof(disk));
    err_clear(&error);
    return 0;
}

struct reading {
    uint64_t size;
    int rc;
};

static void read_co(void *arg) {
    struct reading *r = arg;
    struct create_ctx ctx = {.name = "memory:", .size_limit = DISK_BYTES};
    struct node *n = NULL;
    assert_int_equal(storage_create_co(&ctx, &n, NULL), 0);
    if (r->size)
        assert_int_equal(disk_pwrite_co(n, 0, disk, (size_t)r->size), 0);
    r->rc = partitions_read_co(n, &table, &error);
    node_unref_co(n);
}

/* Reads the table of the first `size` bytes of `disk`. */
static int read_table_of(uint64_t size) {
    struct reading r = {size, 0};
    loop_run(loop, read_co, &r);
    return r.rc;
}

static int read_table(void) {
    return read_table_of(DISK_BYTES);
}

static void mbr_put(uint32_t sector, int i, uint8_t type, uint32_t first, uint32_t count) {
    uint8_t *p = disk + (size_t)sector * 512 + 0x1be + 16 * i;
    p[4] = type;
    le32_store(p + 8, first);
    le32_store(p + 12, count);
    disk[(size_t)sector * 512 + 510] = 0x55;
    disk[(size_t)sector * 512 + 511] = 0xaa;
}

static void expect(size_t i, unsigned number, uint64_t first, uint64_t count) {
    assert_true(i < table.n);
    assert_int_equal(table.v[i].number, number);
    assert_int_equal(table.v[i].offset, first * 512);
    assert_int_equal(table.v[i].length, count * 512);
}

/* What partition.h promises of whatever comes out. */
static void expect_sane(void) {
    bool seen[65536] = {false};
    assert_true(table.n <= PARTITIONS_MAX);
    for (size_t i = 0; i < table.n; i++) {
        const struct partition *p = &table.v[i];
        assert_true(p->length > 0 && p->offset < DISK_BYTES && p->length <= DISK_BYTES - p->offset);
        assert_true(p->number > 0 && p->number < 65536 && !seen[p->number]);
        seen[p->number] = true;
    }
}

struct gpt {
    uint32_t sector, entries, entry_bytes;
    uint64_t header, table; /* sectors */
};
static const struct gpt first512 = {512, 128, 128, 1, 2}, last512 = {512, 128, 128, 8191, 8159};

static void gpt_entry(const struct gpt *g, uint32_t i, uint64_t first, uint64_t last) {
    uint8_t *p = disk + g->table * g->sector + (size_t)i * g->entry_bytes;
    memset(p, 0x11, 32);
    le64_store(p + 32, first);
    le64_store(p + 40, last);
}

static void gpt_seal_header(const struct gpt *g) {
    uint8_t *h = disk + g->header * g->sector;
    le32_store(h + 16, 0);
    le32_store(h + 16, (uint32_t)crc32(0, h, 92));
}

/* Header and both checksums, after the entries. */
static void gpt_finish(const struct gpt *g) {
    uint8_t *h = disk + g->header * g->sector;
    memcpy(h, "EFI PART\0\0\1", 12);
    le32_store(h + 12, 92);
    le64_store(h + 24, g->header);
    le64_store(h + 72, g->table);
    le32_store(h + 80, g->entries);
    le32_store(h + 84, g->entry_bytes);
    const uint8_t *all = disk + g->table * g->sector;
    le32_store(h + 88, (uint32_t)crc32(0, all, g->entries * g->entry_bytes));
    gpt_seal_header(g);
    mbr_put(0, 0, 0xee, 1, 0xffffffff);
}

/* ---------------------------------------------------------------- MBR */

static void a_disk_without_a_signature_has_no_table(void **s) {
    assert_int_equal(read_table(), 0);
    assert_null(table.kind);
    assert_int_equal(table.n, 0);
    partitions_free(&table);
}

static void a_disk_smaller_than_a_sector_has_no_table(void **s) {
    mbr_put(0, 0, 0x83, 1, 1);
    assert_int_equal(read_table_of(0), 0);
    assert_null(table.kind);
    assert_int_equal(read_table_of(511), 0);
    assert_null(table.kind);
}

static void a_boot_sector_with_code_is_no_table(void **s) {
    mbr_put(0, 0, 0x83, 8, 8);
    disk[0x1be] = 0x33;
    assert_int_equal(read_table(), 0);
    assert_null(table.kind);
}

static void primary_partitions_have_their_places(void **s) {
    mbr_put(0, 0, 0x83, 8, 100);
    mbr_put(0, 2, 0x07, 200, 1);
    assert_int_equal(read_table(), 0);
    assert_string_equal(table.kind, "mbr");
    assert_int_equal(table.n, 2);
    expect(0, 1, 8, 100);
    expect(1, 3, 200, 1);
    assert_string_equal(table.v[1].type, "0x07");
    partitions_free(&table);
}

static void the_last_sector_belongs_to_the_disk_and_the_next_does_not(void **s) {
    mbr_put(0, 0, 0x83, 8191, 1);
    mbr_put(0, 1, 0x83, 8191, 2);
    mbr_put(0, 2, 0x83, 8192, 1);
    mbr_put(0, 3, 0x83, 0xffffffff, 0xffffffff);
    assert_int_equal(read_table(), 0);
    assert_int_equal(table.n, 1);
    expect(0, 1, 8191, 1);
    assert_int_equal(table.ignored, 3);
    partitions_free(&table);
}

static void logical_partitions_begin_at_their_own_records(void **s) {
    mbr_put(0, 1, 0x05, 100, 1000);
    mbr_put(100, 0, 0x83, 2, 50);
    mbr_put(100, 1, 0x05, 60, 100); /* from the extended partition's beginning */
    mbr_put(160, 0, 0x83, 3, 40);
    assert_int_equal(read_table(), 0);
    assert_int_equal(table.n, 2);
    expect(0, 5, 102, 50);
    expect(1, 6, 163, 40);
    partitions_free(&table);
}

static void an_empty_record_takes_no_number(void **s) {
    mbr_put(0, 0, 0x0f, 100, 1000);
    mbr_put(100, 0, 0x83, 2, 50);
    mbr_put(100, 1, 0x05, 60, 100);
    mbr_put(160, 1, 0x05, 70, 100);
    mbr_put(170, 0, 0x83, 3, 40);
    assert_int_equal(read_table(), 0);
    assert_int_equal(table.n, 2);
    expect(1, 6, 173, 40);
    partitions_free(&table);
}

static void two_extended_partitions_share_no_numbers(void **s) {
    mbr_put(0, 0, 0x05, 100, 50);
    mbr_put(0, 1, 0x05, 200, 50);
    mbr_put(100, 0, 0x83, 1, 10);
    mbr_put(200, 0, 0x83, 1, 10);
    assert_int_equal(read_table(), 0);
    assert_int_equal(table.n, 2);
    expect(0, 5, 101, 10);
    expect(1, 6, 201, 10);
    partitions_free(&table);
}

static void a_chain_that_loops_ends(void **s) {
    mbr_put(0, 0, 0x05, 100, 1000);
    mbr_put(100, 0, 0x83, 2, 50);
    mbr_put(100, 1, 0x05, 60, 100);
    mbr_put(160, 0, 0x83, 3, 40);
    mbr_put(160, 1, 0x05, 60, 100); /* itself */
    assert_int_equal(read_table(), 0);
    assert_true(table.ignored > 0);
    expect(0, 5, 102, 50);
    expect(1, 6, 163, 40);
    expect_sane();
    partitions_free(&table);
}

static void a_chain_that_leaves_the_disk_ends(void **s) {
    mbr_put(0, 0, 0x05, 100, 1000);
    mbr_put(100, 0, 0x83, 2, 50);
    mbr_put(100, 1, 0x05, 0xffffffff, 100);
    assert_int_equal(read_table(), 0);
    assert_int_equal(table.n, 1);
    assert_int_equal(table.ignored, 1);
    partitions_free(&table);
}

/* ---------------------------------------------------------------- GPT */

static void a_gpt_is_read_with_names(void **s) {
    gpt_entry(&first512, 0, 34, 133);
    gpt_entry(&first512, 5, 200, 200);
    uint8_t *name = disk + 1024 + 56;
    le16_store(name, 'a');
    le16_store(name + 2, 0xe9);
    le16_store(name + 4, 0xd83d); /* a pair */
    le16_store(name + 6, 0xde00);
    le16_store(name + 8, 0xdc00); /* half of one */
    gpt_finish(&first512);
    assert_int_equal(read_table(), 0);
    assert_string_equal(table.kind, "gpt");
    assert_int_equal(table.n, 2);
    expect(0, 1, 34, 100);
    expect(1, 6, 200, 1);
    assert_string_equal(table.v[0].name, "a\xc3\xa9\xf0\x9f\x98\x80\xef\xbf\xbd");
    assert_string_equal(table.v[0].type, "11111111-1111-1111-1111-111111111111");
    partitions_free(&table);
}

static void a_name_without_an_end_fits(void **s) {
    gpt_entry(&first512, 0, 34, 133);
    for (int i = 0; i < 36; i++)
        le16_store(disk + 1024 + 56 + 2 * i, 0x20ac);
    gpt_finish(&first512);
    assert_int_equal(read_table(), 0);
    assert_int_equal(strlen(table.v[0].name), 36 * 3);
    partitions_free(&table);
}

static void sectors_of_4096_bytes_are_known(void **s) {
    const struct gpt g = {4096, 32, 128, 1, 2};
    gpt_entry(&g, 0, 6, 10);
    gpt_finish(&g);
    assert_int_equal(read_table(), 0);
    assert_string_equal(table.kind, "gpt");
    expect(0, 1, 48, 40);
    partitions_free(&table);
}

static void the_copy_at_the_end_serves(void **s) {
    gpt_entry(&first512, 0, 34, 133);
    gpt_finish(&first512);
    gpt_entry(&last512, 0, 34, 133);
    gpt_finish(&last512);
    disk[512 + 60] ^= 1; /* a field that only the checksum covers */
    assert_int_equal(read_table(), 0);
    assert_int_equal(table.n, 1);
    expect(0, 1, 34, 100);
    partitions_free(&table);
}

static void entries_with_a_wrong_checksum_are_damage(void **s) {
    gpt_entry(&first512, 0, 34, 133);
    gpt_finish(&first512);
    disk[1024 + 40] ^= 1;
    assert_int_equal(read_table(), -EINVAL);
    assert_non_null(strstr(err_text(&error), "damaged"));
    assert_int_equal(table.n, 0);
    err_clear(&error);
}

static void a_header_that_lies_about_its_place_is_damage(void **s) {
    gpt_finish(&first512);
    le64_store(disk + 512 + 24, 7);
    gpt_seal_header(&first512);
    assert_int_equal(read_table(), -EINVAL);
    err_clear(&error);
}

static void hostile_headers_are_damage(void **s) {
    static const struct {
        size_t at;
        uint64_t value;
        int bytes;
    } bad[] = {
        {80, 0xffffffff, 4}, {80, 8193, 4},       {84, 0, 4},  {84, 64, 4},   {84, 132, 4},
        {84, 8192, 4},       {72, 0, 8},          {72, 1, 8},  {72, 8192, 8}, {72, 8193, 8},
        {72, ~0ull, 8},      {72, 1ull << 55, 8}, {12, 91, 4}, {12, 513, 4},  {12, 0xffffffff, 4},
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        setup(s);
        gpt_entry(&first512, 0, 34, 133);
        gpt_finish(&first512);
        uint8_t *p = disk + 512 + bad[i].at;
        if (bad[i].bytes == 4)
            le32_store(p, (uint32_t)bad[i].value);
        else
            le64_store(p, bad[i].value);
        gpt_seal_header(&first512);
        int rc = read_table();
        if (rc != -EINVAL)
            print_error("case %zu: %d\n", i, rc);
        assert_int_equal(rc, -EINVAL);
        err_clear(&error);
    }
}

static void entries_outside_the_disk_are_left_out(void **s) {
    gpt_entry(&first512, 0, 34, 8192);
    gpt_entry(&first512, 1, 200, 199);
    gpt_entry(&first512, 2, ~0ull, ~0ull);
    gpt_entry(&first512, 3, 0, ~0ull);
    gpt_entry(&first512, 4, 8191, 8191);
    gpt_finish(&first512);
    assert_int_equal(read_table(), 0);
    assert_int_equal(table.n, 1);
    expect(0, 5, 8191, 1);
    assert_int_equal(table.ignored, 4);
    partitions_free(&table);
}

static void entries_may_overlap(void **s) {
    gpt_entry(&first512, 0, 34, 133);
    gpt_entry(&first512, 1, 100, 150);
    gpt_finish(&first512);
    assert_int_equal(read_table(), 0);
    assert_int_equal(table.n, 2);
    partitions_free(&table);
}

static void more_entries_than_we_keep_are_counted(void **s) {
    const struct gpt g = {512, 1000, 128, 1, 2};
    for (uint32_t i = 0; i < g.entries; i++)
        gpt_entry(&g, i, 4000 + i, 4000 + i);
    gpt_finish(&g);
    assert_int_equal(read_table(), 0);
    assert_int_equal(table.n, PARTITIONS_MAX);
    assert_int_equal(table.ignored, 1000 - PARTITIONS_MAX);
    expect_sane();
    partitions_free(&table);
}

static void a_protective_entry_without_a_gpt_is_an_mbr(void **s) {
    mbr_put(0, 0, 0xee, 1, 100);
    assert_int_equal(read_table(), 0);
    assert_string_equal(table.kind, "mbr");
    assert_int_equal(table.n, 1);
    partitions_free(&table);
}

/* ---------------------------------------------------------------- noise */

static void random_tables_stay_inside_the_disk(void **s) {
    static const uint32_t places[] = {0, 1, 8, 9, 2047, 8191, 0x7fffffff, 0xffffffff};
    static const uint8_t types[] = {0x05, 0x0f, 0x83, 0xee, 0x85};
    srand(7);
    for (int turn = 0; turn < 300; turn++) {
        setup(s);
        for (uint32_t sector = 0; sector < 10; sector++)
            for (int i = 0; i < 4; i++)
                mbr_put(sector, i, types[rand() % 5], places[rand() % 8], places[rand() % 8]);
        if (turn % 3 == 0)
            gpt_finish(&first512);
        if (turn % 3 == 1)
            for (int i = 0; i < 4; i++)
                disk[rand() % 5120] = (uint8_t)rand();
        if (read_table() == 0)
            expect_sane();
        partitions_free(&table);
        err_clear(&error);
    }
}

int main(void) {
#define T(f) cmocka_unit_test_setup(f, setup)
    const struct CMUnitTest tests[] = {
        T(a_disk_without_a_signature_has_no_table),
        T(a_disk_smaller_than_a_sector_has_no_table),
        T(a_boot_sector_with_code_is_no_table),
        T(primary_partitions_have_their_places),
        T(the_last_sector_belongs_to_the_disk_and_the_next_does_not),
        T(logical_partitions_begin_at_their_own_records),
        T(an_empty_record_takes_no_number),
        T(two_extended_partitions_share_no_numbers),
        T(a_chain_that_loops_ends),
        T(a_chain_that_leaves_the_disk_ends),
        T(a_gpt_is_read_with_names),
        T(a_name_without_an_end_fits),
        T(sectors_of_4096_bytes_are_known),
        T(the_copy_at_the_end_serves),
        T(entries_with_a_wrong_checksum_are_damage),
        T(a_header_that_lies_about_its_place_is_damage),
        T(hostile_headers_are_damage),
        T(entries_outside_the_disk_are_left_out),
        T(entries_may_overlap),
        T(more_entries_than_we_keep_are_counted),
        T(a_protective_entry_without_a_gpt_is_an_mbr),
        T(random_tables_stay_inside_the_disk),
    };
    if (loop_new(LOOP_THREADS, &loop, NULL))
        return 1;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    loop_free(loop);
    return failed;
}
