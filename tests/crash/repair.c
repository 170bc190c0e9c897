/* SPDX-License-Identifier: MIT */
/*
 * Workloads of repair: an image loses reference counts, as a program with lazy refcounts leaves it
 * behind or as a bad disk does, and is repaired while the power may fail.
 *
 *   dirty    the dirty bit is set first; opening for writing repairs, here and in every state
 *   repair   no mark; `check -r all` repairs.  A state may still have the damage, but never more
 *            than it had before the repair, and the next repair finds everything to be whole
 *   repair-vdi, -qed, -parallels   the same of a map without counts: two entries name one cluster,
 *            and the other one's room is lost; copies, moves and the new end are cut at any point
 *
 * The damage is done below the format, recorded like everything else, and changes nothing that a
 * guest reads: two clusters with the same content may become one.
 */
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "workloads.h"

#define COPIED_AND_OFFSET UINT64_C(0x80fffffffffffe00)
#define OFFSET UINT64_C(0x00fffffffffffe00)

/* The file below, as bytes. */
struct file {
    struct node *n;
    uint64_t cluster, l1, reftable;
};

static uint64_t get64(const struct file *f, uint64_t at) {
    uint8_t b[8];
    lab_must(disk_pread_co(f->n, at, b, 8), NULL, "reading below the format");
    return be64_load(b);
}

static void put64(const struct file *f, uint64_t at, uint64_t value) {
    uint8_t b[8];
    be64_store(b, value);
    lab_must(disk_pwrite_co(f->n, at, b, 8), NULL, "writing below the format");
}

static void file_open(struct file *f) {
    struct err e AUTO_ERR = ERR_INIT;
    lab_must(lab_open_co(0, "raw", NULL, OPEN_RW, &f->n, &e), &e, "opening below the format");
    f->cluster = UINT64_C(1) << (get64(f, 16) & 63); /* low half of the word: cluster bits */
    f->l1 = get64(f, 40);
    f->reftable = get64(f, 48);
}

static uint64_t l2_entry_at(const struct file *f, uint64_t guest) {
    uint64_t per_table = f->cluster / 8, i = guest / f->cluster;
    return (get64(f, f->l1 + i / per_table * 8) & OFFSET) + i % per_table * 8;
}

/* The second of two clusters with the same content takes the first one's place. */
static void share_cluster(const struct file *f, uint64_t guest) {
    put64(f, l2_entry_at(f, guest + f->cluster),
          get64(f, l2_entry_at(f, guest)) & COPIED_AND_OFFSET);
}

static void lose_counts(struct lab *l, const struct file *f) {
    uint64_t block = get64(f, f->reftable) & OFFSET;
    uint8_t zeros[16] = {0};
    uint64_t at = block + lab_rnd(l, (unsigned)(f->cluster / 16)) * 16;
    lab_must(disk_pwrite_co(f->n, at, zeros, 16), NULL, "writing below the format");
}

/* Whole clusters with one content at *guest; flushed; the image is closed. */
static void close_over_twins(struct lab *l, uint64_t cluster, uint64_t *guest) {
    uint64_t pairs = l->disk->size / cluster / 2;
    *guest = lab_rnd(l, (unsigned)pairs) * cluster * 2;
    lab_write(l, *guest / BLOCK, 2 * cluster / BLOCK, false);
    lab_flush(l);
    node_unref_co(l->disk);
    l->disk = NULL;
}

static const char *format_of(const struct lab *l) {
    return l->w->format ? l->w->format : "qcow2";
}

static void open_again(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    lab_must(lab_open_co(0, format_of(l), NULL, OPEN_RW, &l->disk, &e), &e,
             "opening the repaired image");
}

/* ---------------------------------------------------------------- the dirty bit */

static void die_dirty(struct lab *l) {
    struct file f;
    uint64_t guest, kind = lab_rnd(l, 4);
    close_over_twins(l, 4096, &guest);
    file_open(&f);
    put64(&f, 72, get64(&f, 72) | 1);
    lab_must(disk_flush_co(f.n), NULL, "flush");
    if (kind != 1)
        share_cluster(&f, guest);
    if (kind != 2)
        lose_counts(l, &f);
    if (kind == 3)
        put64(&f, f.reftable, 0);
    lab_must(disk_flush_co(f.n), NULL, "flush");
    node_unref_co(f.n);
    open_again(l);
}

static const struct lab_op dirty_ops[] = {{"dirty", 2, true, die_dirty}, {NULL}};

/* ---------------------------------------------------------------- check -r all */

static void check(struct lab *l, unsigned fix, struct check_result *r) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n;
    *r = (struct check_result){.fix = fix};
    lab_must(lab_open_co(0, format_of(l), NULL, OPEN_CHECK | (fix ? OPEN_RW : 0), &n, &e), &e,
             "opening to check");
    lab_must(n->drv->format->check_co(n, r, &e), &e, "check");
    node_unref_co(n);
}

/* l->own: the most corruptions that any damage has made. */
static uint64_t *most_of(struct lab *l) {
    if (!l->own)
        l->own = calloc(1, sizeof(uint64_t));
    return l->own;
}

static void damage_and_repair(struct lab *l) {
    struct check_result r;
    struct file f;
    uint64_t guest;
    close_over_twins(l, 512, &guest);
    file_open(&f);
    share_cluster(&f, guest);
    lab_must(disk_flush_co(f.n), NULL, "flush");
    uint64_t blocks = l->w->size / 512 / 64, block = f.reftable + 8 * lab_rnd(l, (unsigned)blocks);
    put64(&f, block, 0);
    lab_must(disk_flush_co(f.n), NULL, "flush");
    node_unref_co(f.n);
    check(l, 0, &r);
    *most_of(l) = r.corruptions > *most_of(l) ? r.corruptions : *most_of(l);
    check(l, CHECK_FIX_LEAKS | CHECK_FIX_ERRORS, &r);
    lab_must(r.corruptions + r.check_errors ? -1 : 0, NULL, "what a repair leaves");
    open_again(l);
}

static int repair_state_co(struct lab_state *st) {
    struct check_result r;
    check(st->l, 0, &r);
    if (r.corruptions > *most_of(st->l) || r.check_errors)
        return state_fail(st, "%llu corruptions, more than before the repair",
                          (unsigned long long)r.corruptions);
    if (!r.corruptions)
        return 0;
    check(st->l, CHECK_FIX_LEAKS | CHECK_FIX_ERRORS, &r);
    return 0;
}

/* ---------------------------------------------------------------- maps without counts */

static uint64_t get_le(struct node *n, uint64_t at, unsigned bytes) {
    uint8_t b[8] = {0};
    lab_must(disk_pread_co(n, at, b, bytes), NULL, "reading below the format");
    return le64_load(b);
}

/* Where the entry of the cluster `i` lies, and how long it is. */
static uint64_t map_entry(struct lab *l, struct node *n, uint64_t i, unsigned *bytes) {
    *bytes = strcmp(format_of(l), "qed") ? 4 : 8;
    if (*bytes == 8) {
        uint64_t table = 4096 / 8;
        return get_le(n, get_le(n, 40, 8) + i / table * 8, 8) + i % table * 8;
    }
    return (strcmp(format_of(l), "vdi") ? 64 : get_le(n, 340, 4)) + i * 4;
}

static void share_and_repair(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    struct check_result r;
    struct node *n;
    uint64_t guest, twin;
    unsigned bytes;
    uint8_t b[8];
    close_over_twins(l, 4096, &guest);
    lab_must(lab_open_co(0, "raw", NULL, OPEN_RW, &n, &e), &e, "opening below the format");
    uint64_t one = map_entry(l, n, guest / 4096, &bytes);
    le64_store(b, get_le(n, one, bytes));
    twin = map_entry(l, n, guest / 4096 + 1, &bytes);
    lab_must(disk_pwrite_co(n, twin, b, bytes), NULL, "writing below the format");
    lab_must(disk_flush_co(n), NULL, "flush");
    node_unref_co(n);
    check(l, 0, &r);
    *most_of(l) = r.corruptions > *most_of(l) ? r.corruptions : *most_of(l);
    check(l, CHECK_FIX_LEAKS | CHECK_FIX_ERRORS, &r);
    lab_must(r.corruptions + r.check_errors ? -1 : 0, NULL, "what a repair leaves");
    open_again(l);
}

static const struct lab_op share_ops[] = {{"repair", 3, true, share_and_repair}, {NULL}};

static const struct lab_op repair_ops[] = {{"repair", 2, true, damage_and_repair}, {NULL}};

const struct workload repair_workloads[] = {
    {.name = "dirty",
     .options = "cluster_size=4k,lazy_refcounts=on",
     .size = 2 * MIB,
     .requests = 40,
     .flush = 12,
     .fua = 3,
     .zero = 8,
     .discard = 8,
     .max_blocks = 30,
     .ops = dirty_ops,
     .plants = "DIRTY_CLEARED_EARLY MOVED_DATA_LATE"},
    {.name = "repair",
     .options = "cluster_size=512,refcount_bits=64",
     .size = MIB,
     .requests = 30,
     .flush = 12,
     .fua = 3,
     .discard = 8,
     .max_blocks = 60,
     .ops = repair_ops,
     .mend_co = repair_state_co,
     .plants = "REBUILD_NAMED_EARLY"},
    {.name = "repair-vdi",
     .options = "block_size=4k",
     .format = "vdi",
     .size = 2 * MIB,
     .requests = 40,
     .flush = 12,
     .fua = 3,
     .max_blocks = 40,
     .ops = share_ops,
     .mend_co = repair_state_co},
    {.name = "repair-qed",
     .options = "cluster_size=4k,table_size=1",
     .format = "qed",
     .size = 2 * MIB,
     .requests = 40,
     .flush = 12,
     .fua = 3,
     .max_blocks = 40,
     .ops = share_ops,
     .mend_co = repair_state_co,
     .plants = "MOVED_DATA_LATE"},
    {.name = "repair-parallels",
     .options = "cluster_size=4k",
     .format = "parallels",
     .size = 2 * MIB,
     .requests = 40,
     .flush = 12,
     .fua = 3,
     .max_blocks = 40,
     .ops = share_ops,
     .mend_co = repair_state_co,
     .plants = "MOVED_DATA_LATE"},
    {0},
};
