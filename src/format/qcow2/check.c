/* SPDX-License-Identifier: MIT */
/*
 * `check`: does every cluster have as many names as its reference count says, and does everything
 * lie where it may?  Never writes
 * (repair.c does).
 *
 * Steps
 *   1. the stored counts are loaded out of the refcount blocks;
 *   2. all metadata is counted and marked: header, tables, refcount blocks, L2 tables of the active
 *      image and of snapshots, bitmaps;
 *   3. the L2 tables are walked: entries checked, their clusters counted;
 *   4. stored and found counts are compared.
 *
 * Nothing is trusted.  Memory: two counts (one bit a cluster at first, see counts.h) of at most as
 * many clusters as the file has, and of metadata's clusters alone three more; a name outside the
 * file is a corruption and not counted.  Tables are read in pieces of 1 MiB, neighbours together,
 * each table once however many entries name it.
 *
 * Verdict: as qemu-img check's.  Leak: stored > found.  Corruption: stored < found, COPIED flag of
 * the active tables unlike (stored == 1), unaligned, reserved bits, outside the file, a refcount
 * block that shares its cluster.  Stricter than that, because a writer would destroy something:
 * data or L2 tables that share a cluster with metadata although the counts agree, the zero flag or
 * a lone COPIED flag where the version forbids it.  An L2 table that several L1 entries name is
 * walked once and counted for each.
 * Coded data is not decoded.
 */
#include "format/qcow2/check.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"

/* More than the L1 table of any real disk. */
#define TABLE_OUTSIDE_MAX (2 * MIB)

size_t check_room_bytes = CHECK_ROOM_BYTES;

/* ---- reporting ---- */

static void report(const struct check_result *to, bool leak, const char *fmt, va_list ap) {
    char text[320];
    if (!to->report)
        return;
    vsnprintf(text, sizeof(text), fmt, ap);
    to->report(to->arg, leak, text);
}

void check_miscounted(struct check *c, const char *fmt, ...) {
    va_list ap;
    c->whole->corruptions++;
    va_start(ap, fmt);
    report(c->whole, false, fmt, ap);
    va_end(ap);
}

void check_corruption(struct check *c, const char *fmt, ...) {
    va_list ap;
    c->r->corruptions++;
    va_start(ap, fmt);
    report(c->r, false, fmt, ap);
    va_end(ap);
}

void check_lost(struct check *c, const char *fmt, ...) {
    va_list ap;
    c->r->corruptions++;
    c->incomplete = true;
    va_start(ap, fmt);
    report(c->r, false, fmt, ap);
    va_end(ap);
}

void check_failure(struct check *c, const char *fmt, ...) {
    va_list ap;
    c->r->check_errors++;
    c->incomplete = true;
    va_start(ap, fmt);
    report(c->r, false, fmt, ap);
    va_end(ap);
}

/* As many windows more as this one's size lets expect. */
static uint64_t total_now(const struct check *c) {
    if (c->room.end >= c->clusters)
        return c->total;
    return c->total +
           c->window_total * div_up(c->clusters - c->room.end, c->room.end - c->room.from);
}

void check_progress(struct check *c, uint64_t bytes) {
    c->done += bytes;
    if (!c->whole->progress || c->done - c->shown < c->total / 1024)
        return;
    c->shown = c->done;
    c->whole->progress(c->whole->arg, min_u64(c->done, total_now(c)), total_now(c));
}

/* ---- places and counts ---- */

bool check_inside(const struct check *c, uint64_t offset, uint64_t length) {
    uint64_t end;
    return ck_add(offset, length, &end) &&
           (end <= c->file_length || end - c->file_length < c->s->cluster_size);
}

int check_count(struct check *c, uint64_t offset, uint64_t length, uint64_t names) {
    if (!length)
        return 0;
    uint64_t first = offset >> c->s->cluster_bits;
    uint64_t last = (offset + length - 1) >> c->s->cluster_bits;
    c->clusters = max_u64(c->clusters, last + 1);
    return counts_add(&c->found, first, last - first + 1, names);
}

void check_outside(struct check *c, uint64_t first, uint64_t count) {
    uint64_t far = 2 * c->file_clusters + 65536;
    if (first < far)
        c->outside_near = max_u64(c->outside_near, min_u64(first + count, far) - 1);
    if (first + count > far)
        c->outside_far = min_u64(c->outside_far, max_u64(first, far));
}

void check_overlapped(struct check *c, uint64_t cluster, uint64_t count) {
    if (counts_all_zero(&c->refs, cluster, count))
        c->overlaps = true;
    else
        c->rebuild = true; /* which moves the counts away, and may leave nothing of the overlap */
}

/*
 * A table that the file ends inside of reads as zeros from there on, as long as nothing else is put
 * into its place.  Where it would go on for long, nothing is put behind the file at all.
 */
static void table_outside(struct check *c, uint64_t offset, uint64_t length) {
    uint32_t bits = c->s->cluster_bits;
    uint64_t from = max_u64(offset >> bits, c->file_clusters);
    if (offset >= QCOW2_HOST_LIMIT || length >= QCOW2_HOST_LIMIT)
        return;
    uint64_t count = ((offset + length - 1) >> bits) + 1 - from;
    if (count << bits <= TABLE_OUTSIDE_MAX)
        check_outside(c, from, count);
    else
        c->outside_far = min_u64(c->outside_far, from);
}

int check_metadata(struct check *c, const char *what, uint64_t offset, uint64_t length, bool *ok) {
    *ok = true;
    if (!length)
        return 0;
    if (!is_aligned(offset, c->s->cluster_size)) {
        check_corruption(c, "%s: offset %" PRIu64 " is not a multiple of the cluster size %" PRIu32,
                         what, offset, c->s->cluster_size);
        c->incomplete = true;
        *ok = false;
        return 0;
    }
    if (!check_inside(c, offset, length)) {
        check_corruption(c,
                         "%s: %" PRIu64 " bytes at offset %" PRIu64
                         " reach beyond the end of the file at %" PRIu64,
                         what, length, offset, c->file_length);
        c->incomplete = true;
        *ok = false;
        table_outside(c, offset, length);
        return 0;
    }
    uint64_t first = offset >> c->s->cluster_bits, n = qcow2_clusters_for(c->s, length);
    if (!counts_all_zero(&c->fixed, first, n) || !counts_all_zero(&c->l2, first, n)) {
        check_corruption(c, "%s: %" PRIu64 " bytes at offset %" PRIu64 " overlap other metadata",
                         what, length, offset);
        check_overlapped(c, first, n);
        *ok = offset != 0; /* the header is no table; anything else may still be worth a look */
    }
    int r = counts_add(&c->fixed, first, n, 1);
    return r ? r : check_count(c, offset, length, 1);
}

/* ---- the stored counts ---- */

/* `words` 64-bit words of counts that begin with that of `cluster`. */
static int load_words(struct check *c, const uint8_t *p, uint64_t words, uint64_t cluster) {
    uint32_t order = c->s->refcount_order, per_word = 64u >> order;
    uint64_t end = c->stored.clusters, run = 0, run_word = 0, run_value = 0, word;
    int r = 0;
    for (uint64_t w = 0; !r && w < words && cluster < end; w++, cluster += per_word) {
        memcpy(&word, p + w * 8, 8);
        if (run && word == run_word && end - cluster >= per_word) {
            run += per_word;
            continue;
        }
        r = counts_add(&c->stored, cluster - run, run, run_value);
        run = 0;
        bool alike = end - cluster >= per_word;
        uint64_t first = qcow2_refcount_get(p + w * 8, 0, order);
        for (uint64_t i = 1; alike && i < per_word; i++)
            alike = qcow2_refcount_get(p + w * 8, i, order) == first;
        if (alike) {
            run = per_word;
            run_word = word;
            run_value = first;
            continue;
        }
        for (uint64_t i = 0; !r && word && i < min_u64(per_word, end - cluster); i++)
            r = counts_add(&c->stored, cluster + i, 1, qcow2_refcount_get(p + w * 8, i, order));
    }
    return r ? r : counts_add(&c->stored, cluster - run, run, run_value);
}

/* `count` refcount blocks that follow one another in the file too, from table entry `first` on. */
static int load_blocks_co(struct check *c, uint64_t first, uint64_t count) {
    struct qcow2 *s = c->s;
    uint64_t offset = s->reftable[first] & QCOW2_REFTABLE_MASK, bytes = count << s->cluster_bits;
    uint64_t cluster = first << s->block_bits;
    while (bytes) {
        uint32_t some = (uint32_t)min_u64(bytes, CHECK_BUF_BYTES);
        /* Counts of clusters behind the end of the file say nothing. */
        if (cluster >= c->stored.clusters) {
            check_progress(c, bytes);
            return 0;
        }
        uint64_t behind = cluster + ((uint64_t)some * 8 >> s->refcount_order);
        if (c->r == &c->quiet && (behind <= c->room.from || cluster >= c->room.end)) {
            check_progress(c, some); /* read once, and not wanted now */
            offset += some;
            bytes -= some;
            cluster = behind;
            continue;
        }
        int r = disk_pread_co(s->file, offset, c->buf, some);
        if (r) {
            check_failure(c, "refcount block %" PRIu64 " at offset %" PRIu64 ": cannot read: %s",
                          cluster >> s->block_bits, offset, strerror(-r));
            c->rebuild = c->unread = true;
        } else if ((r = load_words(c, c->buf, some / 8, cluster))) {
            return r;
        }
        check_progress(c, some);
        offset += some;
        bytes -= some;
        cluster += (uint64_t)some * 8 >> s->refcount_order;
    }
    return 0;
}

/* As check_metadata, for the refcount table and its blocks: whatever is wrong asks for new ones. */
static int check_refs(struct check *c, const char *what, uint64_t offset, uint64_t length,
                      bool *ok) {
    uint64_t before = c->r->corruptions, near = c->outside_near, far = c->outside_far;
    bool incomplete = c->incomplete;
    int r = check_metadata(c, what, offset, length, ok);
    c->rebuild |= c->r->corruptions != before;
    c->incomplete = incomplete; /* counts name nothing */
    c->outside_near = near;     /* and are made anew elsewhere */
    c->outside_far = far;
    if (r || !is_aligned(offset, c->s->cluster_size) || !check_inside(c, offset, length))
        return r;
    return counts_add(&c->refs, offset >> c->s->cluster_bits, qcow2_clusters_for(c->s, length), 1);
}

/* The refcount table's entry is usable: its block is counted. */
static int check_block(struct check *c, uint64_t i, bool *ok) {
    char what[64];
    uint64_t entry = c->s->reftable[i];
    *ok = false;
    if (!entry)
        return 0;
    snprintf(what, sizeof(what), "refcount block %" PRIu64, i);
    if (entry & ~QCOW2_REFTABLE_MASK) {
        check_corruption(c, "refcount table entry %" PRIu64 ": 0x%" PRIx64 " has reserved bits set",
                         i, entry);
        c->rebuild = true;
        /* Its counts are believed all the same, and it is not counted: as others do. */
        *ok = is_aligned(entry & QCOW2_REFTABLE_MASK, c->s->cluster_size) &&
              check_inside(c, entry & QCOW2_REFTABLE_MASK, c->s->cluster_size);
        return 0;
    }
    return check_refs(c, what, entry, c->s->cluster_size, ok);
}

static int check_refcounts_co(struct check *c) {
    struct qcow2 *s = c->s;
    uint64_t run_first = 0, run = 0;
    int r = 0;
    if (s->reftable_problem) {
        check_corruption(c, "%s", s->reftable_problem);
        c->rebuild = true;
        return 0;
    }
    for (uint64_t i = 0; !r && i < s->reftable_entries; i++) {
        bool ok;
        r = check_block(c, i, &ok);
        if (r || !ok)
            continue;
        if (run && run_first + run == i &&
            s->reftable[i] == s->reftable[run_first] + (run << s->cluster_bits)) {
            run++;
            continue;
        }
        if (run)
            r = load_blocks_co(c, run_first, run);
        run_first = i;
        run = 1;
    }
    if (!r && run)
        r = load_blocks_co(c, run_first, run);
    return r;
}

/* ---- the comparison ---- */

/* `n` clusters from `first` on with the same two counts. */
static void report_difference(struct check *c, uint64_t first, uint64_t n, uint64_t stored,
                              uint64_t found) {
    bool leak = stored > found;
    char which[96], text[256];
    uint64_t offset = first << c->s->cluster_bits;
    *(leak ? &c->whole->leaks : &c->whole->corruptions) += n;
    if (!c->whole->report)
        return;
    if (n == 1)
        snprintf(which, sizeof(which), "cluster %" PRIu64 " at offset %" PRIu64, first, offset);
    else
        snprintf(which, sizeof(which),
                 "clusters %" PRIu64 "-%" PRIu64 " from offset %" PRIu64 " on", first,
                 first + n - 1, offset);
    snprintf(text, sizeof(text), "%s: reference count is %" PRIu64 ", %" PRIu64 " references found",
             which, stored, found);
    c->whole->report(c->whole->arg, leak, text);
}

/* Clusters in use that no block counts want new structures. */
static void note_missing_blocks(struct check *c, uint64_t first, uint64_t n) {
    const struct qcow2 *s = c->s;
    for (uint64_t bi = first >> s->block_bits; bi <= (first + n - 1) >> s->block_bits; bi++)
        c->rebuild |= bi >= s->reftable_entries || !s->reftable[bi];
}

static void compare(struct check *c) {
    uint64_t at = c->room.from, end = min_u64(c->clusters, c->room.end);
    while ((at = counts_difference(&c->stored, &c->found, at, end)) < end) {
        uint64_t stored = counts_get(&c->stored, at), found = counts_get(&c->found, at), n = 1;
        while (at + n < end && counts_get(&c->stored, at + n) == stored &&
               counts_get(&c->found, at + n) == found)
            n++;
        if (found)
            note_missing_blocks(c, at, n);
        if (stored || !c->unread) /* else the count may be right, in a block that was not read */
            report_difference(c, at, n, stored, found);
        at += n;
    }
    uint64_t a = counts_last(&c->stored, c->clusters), b = counts_last(&c->found, c->clusters);
    uint64_t last = a == UINT64_MAX ? b : b == UINT64_MAX ? a : max_u64(a, b);
    if (last != UINT64_MAX)
        c->whole->image_end_offset = (last + 1) << c->s->cluster_bits;
}

/* ---- lists of tables ---- */

int check_tables_add(struct check_tables *t, uint64_t offset) {
    if (t->count == t->cap)
        check_tables_sort(t); /* snapshots mostly name the same tables */
    if (t->count >= t->cap / 2) {
        size_t cap = t->cap ? t->cap * 2 : 1024;
        struct check_table *grown = realloc(t->v, cap * sizeof(*grown));
        if (!grown)
            return -ENOMEM;
        t->v = grown;
        t->cap = cap;
    }
    t->v[t->count++] = (struct check_table){offset, 1};
    return 0;
}

static int by_offset(const void *a, const void *b) {
    uint64_t x = ((const struct check_table *)a)->offset;
    uint64_t y = ((const struct check_table *)b)->offset;
    return x < y ? -1 : x > y;
}

void check_tables_sort(struct check_tables *t) {
    size_t n = 0;
    if (!t->count)
        return;
    qsort(t->v, t->count, sizeof(*t->v), by_offset);
    for (size_t i = 1; i < t->count; i++) {
        if (t->v[i].offset == t->v[n].offset)
            t->v[n].names += t->v[i].names;
        else
            t->v[++n] = t->v[i];
    }
    t->count = n + 1;
}

uint64_t check_tables_names(const struct check_tables *t, uint64_t offset) {
    size_t low = 0, high = t->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (t->v[middle].offset == offset)
            return t->v[middle].names;
        if (t->v[middle].offset < offset)
            low = middle + 1;
        else
            high = middle;
    }
    return 0;
}

/* ---- all of it ---- */

static int check_tables_co(struct check *c) {
    struct qcow2 *s = c->s;
    bool ok;
    int r = check_metadata(c, "header", 0, s->cluster_size, &ok);
    if (!r && !s->reftable_problem && !c->without_refs)
        r = check_refs(c, "refcount table", s->h.refcount_table_offset,
                       (uint64_t)s->h.refcount_table_clusters << s->cluster_bits, &ok);
    if (!r && !s->l1_problem)
        r = check_metadata(c, "L1 table", s->h.l1_table_offset, (uint64_t)s->l1_entries * 8, &ok);
    if (!r && !c->without_refs)
        r = check_refcounts_co(c);
    if (!r)
        r = check_snapshots_co(c);
    if (!r)
        r = check_bitmaps_co(c);
    if (!r)
        r = check_l1_entries_co(c);
    if (!r)
        r = check_active_l2_co(c);
    return r ? r : check_inactive_co(c);
}

/* Behind the last entry that is not 0; empty parts at memory speed. */
static uint64_t table_end(const uint64_t *table, uint64_t entries) {
    uint64_t end = entries;
    while (end >= 512 && bytes_are_zero(&table[end - 512], 512 * sizeof(*table)))
        end -= 512;
    while (end && !table[end - 1])
        end--;
    return end;
}

static int check_init(struct check *c) {
    struct qcow2 *s = c->s;
    struct counts *all[] = {&c->stored, &c->found, &c->fixed, &c->l2, &c->refs};
    int r = 0;
    c->file_length = align_up(s->file->size, 512);
    c->file_clusters = c->clusters = qcow2_clusters_for(s, c->file_length);
    c->outside_far = UINT64_MAX;
    c->l1_end = table_end(s->l1, s->l1_entries);
    c->total = c->window_total = ((uint64_t)s->reftable_entries + c->l1_end) << s->cluster_bits;
    c->whole = c->r;
    c->room.max = c->unbounded ? SIZE_MAX : check_room_bytes + c->file_clusters / 8;
    c->room.end = UINT64_MAX;
    for (size_t i = 0; !r && i < sizeof(all) / sizeof(all[0]); i++)
        r = counts_init(all[i], c->file_clusters + 1);
    counts_share(&c->stored, &c->room);
    counts_share(&c->found, &c->room);
    c->l1_skip = calloc(c->l1_end / 64 + 1, sizeof(*c->l1_skip));
    c->buf = buf_get(CHECK_BUF_BYTES);
    return r ? r : c->l1_skip && c->buf ? 0 : -ENOMEM;
}

/* What was counted in the last window is counted for the next one. */
static void next_window(struct check *c) {
    counts_room_next(&c->room);
    counts_empty(&c->fixed);
    counts_empty(&c->l2);
    counts_empty(&c->refs);
    memset(c->l1_skip, 0, (c->l1_end / 64 + 1) * sizeof(*c->l1_skip));
    c->twice.count = c->inactive.count = 0;
    c->total += c->window_total;
    c->quiet = (struct check_result){0};
    c->r = &c->quiet;
}

static int windows_co(struct check *c) {
    for (;;) {
        int r = check_tables_co(c);
        if (!r && !c->without_refs)
            compare(c);
        if (r || c->room.end >= c->clusters)
            return r;
        next_window(c);
    }
}

int check_pass_co(struct check *c, struct err *e) {
    c->r->total_clusters = qcow2_clusters_for(c->s, c->s->h.size);
    int r = check_init(c);
    if (!r)
        r = windows_co(c);
    c->r = c->whole;
    if (!r) {
        if (c->r->progress)
            c->r->progress(c->r->arg, c->total, c->total);
    } else if (r == -EFBIG) {
        err_set(e, EFBIG, "the file has %" PRIu64 " clusters, above the limit of %" PRIu64,
                c->file_clusters, COUNTS_CLUSTERS_MAX - 1);
    } else {
        err_errno(e, -r, "checking");
    }
    return r;
}

void check_end(struct check *c) {
    buf_put(c->buf, CHECK_BUF_BYTES);
    free(c->inactive.v);
    free(c->twice.v);
    free(c->l1_skip);
    counts_free(&c->stored);
    counts_free(&c->found);
    counts_free(&c->fixed);
    counts_free(&c->l2);
    counts_free(&c->refs);
}

int qcow2_check_co(struct node *n, struct check_result *result, struct err *e) {
    struct check c = {.s = qcow2_of(n), .r = result};
    if (result->fix)
        return qcow2_repair_co(n, result, e);
    int r = check_pass_co(&c, e);
    check_end(&c);
    return r;
}
