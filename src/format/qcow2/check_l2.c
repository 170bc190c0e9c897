/* SPDX-License-Identifier: MIT */
/*
 * `check`: the L1 table and the L2 tables.
 *
 * Data clusters mostly follow one another, so entries are gathered into runs (each entry one
 * cluster above the one before, same flags) and a run is checked and counted at once.
 */
#include "format/qcow2/check.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"

/* ---- L1 ---- */

static void skip_entry(struct check *c, uint64_t i) {
    c->l1_skip[i / 64] |= UINT64_C(1) << i % 64;
}

static void check_l1_copied(struct check *c, uint64_t i, uint64_t entry, uint64_t cluster) {
    uint64_t stored = counts_get(&c->stored, cluster);
    if (c->without_refs || c->unread || !check_in_window(c, cluster))
        return;
    if ((stored == 1) != !!(entry & QCOW2_COPIED))
        check_miscounted(c,
                         "L1 entry %" PRIu64 ": 0x%" PRIx64 " has the COPIED flag %s, but the "
                         "reference count of its L2 table is %" PRIu64,
                         i, entry, entry & QCOW2_COPIED ? "set" : "clear", stored);
}

static int check_l1_entry(struct check *c, uint64_t i) {
    struct qcow2 *s = c->s;
    uint64_t entry = s->l1[i], offset = entry & QCOW2_OFFSET_MASK;
    uint64_t cluster = offset >> s->cluster_bits;
    int r = 0;
    if (!entry) {
        skip_entry(c, i);
        return 0;
    }
    if (entry & ~(QCOW2_OFFSET_MASK | QCOW2_COPIED))
        check_corruption(c, "L1 entry %" PRIu64 ": 0x%" PRIx64 " has reserved bits set", i, entry);
    if (!offset || !is_aligned(offset, s->cluster_size) ||
        !check_inside(c, offset, s->cluster_size)) {
        check_corruption(c, "L1 entry %" PRIu64 ": L2 table at offset %" PRIu64 " is %s", i, offset,
                         !offset                                ? "the header"
                         : !is_aligned(offset, s->cluster_size) ? "not at the start of a cluster"
                                                                : "outside the file");
        /* Behind the end a table reads as zeros, so nothing is lost there. */
        c->incomplete |= !offset || !is_aligned(offset, s->cluster_size);
        skip_entry(c, i);
        return 0;
    }
    if (counts_get(&c->fixed, cluster)) {
        check_lost(c,
                   "L1 entry %" PRIu64 ": L2 table at offset %" PRIu64 " overlaps other metadata",
                   i, offset);
        check_overlapped(c, cluster, 1);
        skip_entry(c, i);
    } else {
        check_l1_copied(c, i, entry, cluster);
        if (counts_get(&c->l2, cluster) & 1) { /* odd: named by the active L1 table before */
            skip_entry(c, i);
            r = check_tables_add(&c->twice, offset);
        } else {
            r = counts_add(&c->l2, cluster, 1, 1);
        }
    }
    return r ? r : check_count(c, offset, s->cluster_size, 1);
}

int check_l1_entries_co(struct check *c) {
    int r = 0;
    if (c->s->l1_problem)
        check_lost(c, "%s", c->s->l1_problem);
    for (uint64_t i = 0; !r && i < c->l1_end; i++)
        r = check_l1_entry(c, i);
    check_tables_sort(&c->twice);
    return r;
}

/* ---- entries of one L2 table ---- */

struct l2_walk {
    struct check *c;
    bool active;    /* flags count for fragmentation, COPIED is checked */
    uint64_t names; /* L1 tables that name this table, and how often */
    uint64_t times; /* of these, entries of the active one */
    uint64_t guest; /* of the next entry */
    uint64_t next;  /* where data would continue without a gap; 0: none yet */
    uint64_t run_entry, run, run_guest;
};

#define L2_RESERVED (~(QCOW2_OFFSET_MASK | QCOW2_COPIED | QCOW2_COMPRESSED | QCOW2_ZERO))

static void check_copied(struct l2_walk *w, uint64_t first) {
    struct check *c = w->c;
    bool copied = w->run_entry & QCOW2_COPIED;
    if (c->without_refs || c->unread)
        return;
    uint64_t from = max_u64(first, c->room.from), end = min_u64(first + w->run, c->room.end);
    if (from >= end || (copied ? counts_all_one(&c->stored, from, end - from)
                               : counts_none_one(&c->stored, from, end - from)))
        return;
    for (uint64_t k = from - first; k < end - first; k++) {
        uint64_t stored = counts_get(&c->stored, first + k);
        if ((stored == 1) != copied)
            check_miscounted(c,
                             "L2 entry for guest offset %" PRIu64 ": 0x%" PRIx64
                             " has the COPIED flag %s, but the reference count of its cluster is "
                             "%" PRIu64,
                             w->run_guest + (k << c->s->cluster_bits),
                             w->run_entry + (k << c->s->cluster_bits), copied ? "set" : "clear",
                             stored);
    }
}

/* Data and metadata in the same clusters, reported each. */
static void check_overlap(struct l2_walk *w, uint64_t guest, uint64_t first, uint64_t n) {
    struct check *c = w->c;
    if (counts_all_zero(&c->fixed, first, n) && counts_all_zero(&c->l2, first, n))
        return;
    check_overlapped(c, first, n);
    for (uint64_t k = 0; k < n; k++)
        if (counts_get(&c->fixed, first + k) || counts_get(&c->l2, first + k))
            check_corruption(c,
                             "L2 entry for guest offset %" PRIu64 ": its cluster at offset %" PRIu64
                             " overlaps %s",
                             guest + (k << c->s->cluster_bits), (first + k) << c->s->cluster_bits,
                             !(first + k)                    ? "the header"
                             : counts_get(&c->l2, first + k) ? "an L2 table"
                                                             : "other metadata");
}

/* A data file's clusters are not counted: they lie where the guest sees them. */
static int run_end_apart(struct l2_walk *w) {
    uint64_t offset = w->run_entry & QCOW2_OFFSET_MASK, n = w->run;
    for (uint64_t k = 0; offset != w->run_guest && k < n; k++)
        check_corruption(w->c,
                         "L2 entry for guest offset %" PRIu64 ": offset %" PRIu64
                         " in the data file is not the guest's own",
                         w->run_guest + (k << w->c->s->cluster_bits),
                         offset + (k << w->c->s->cluster_bits));
    w->run = 0;
    return 0;
}

/* Ends the run: its clusters are checked and counted. */
static int run_end(struct l2_walk *w) {
    struct check *c = w->c;
    uint64_t n = w->run, offset = w->run_entry & QCOW2_OFFSET_MASK;
    uint64_t first = offset >> c->s->cluster_bits;
    if (!n)
        return 0;
    if (w->active) {
        c->r->allocated_clusters += n * w->times;
        c->r->fragmented_clusters += w->next && w->next != offset ? w->times : 0;
        w->next = offset + (n << c->s->cluster_bits);
    }
    if (qcow2_data_apart(c->s))
        return run_end_apart(w);
    uint64_t inside = first < c->file_clusters ? min_u64(n, c->file_clusters - first) : 0;
    if (inside < n)
        check_outside(c, first + inside, n - inside);
    for (uint64_t k = inside; k < n; k++)
        check_corruption(c,
                         "L2 entry for guest offset %" PRIu64 ": its cluster at offset %" PRIu64
                         " is outside the file, which ends at %" PRIu64,
                         w->run_guest + (k << c->s->cluster_bits),
                         (first + k) << c->s->cluster_bits, c->file_length);
    w->run = inside;
    if (inside) {
        if (w->active)
            check_copied(w, first);
        check_overlap(w, w->run_guest, first, inside);
    }
    w->run = 0;
    return counts_add(&c->found, first, inside, w->names);
}

static int check_coded(struct l2_walk *w, uint64_t entry) {
    struct check *c = w->c;
    uint64_t host;
    uint32_t length;
    qcow2_coded_decode(c->s->cluster_bits, entry, &host, &length);
    if (qcow2_data_apart(c->s)) {
        check_corruption(c,
                         "L2 entry for guest offset %" PRIu64 ": 0x%" PRIx64
                         " is compressed, in an image whose data lie in a file of their own",
                         w->guest, entry);
        return 0;
    }
    if (w->active) {
        c->r->allocated_clusters += w->times;
        c->r->compressed_clusters += w->times;
        c->r->fragmented_clusters += w->times;
    }
    if (entry & QCOW2_COPIED)
        check_corruption(c,
                         "L2 entry for guest offset %" PRIu64 ": 0x%" PRIx64
                         " is compressed and must not have the COPIED flag",
                         w->guest, entry);
    if (!check_inside(c, host, length)) {
        check_outside(c, host >> c->s->cluster_bits, 3);
        check_corruption(c,
                         "L2 entry for guest offset %" PRIu64 ": compressed data, up to %" PRIu32
                         " bytes at offset %" PRIu64
                         ", are outside the file, which ends at %" PRIu64,
                         w->guest, length, host, c->file_length);
        return 0;
    }
    uint64_t first = host >> c->s->cluster_bits;
    uint64_t last = (host + length - 1) >> c->s->cluster_bits;
    check_overlap(w, w->guest, first, last - first + 1);
    return check_count(c, host, length, w->names);
}

/* An entry that does not continue the run. */
static int check_entry(struct l2_walk *w, uint64_t entry) {
    struct check *c = w->c;
    uint64_t offset = entry & QCOW2_OFFSET_MASK;
    if (entry & QCOW2_COMPRESSED)
        return check_coded(w, entry);
    uint64_t reserved = L2_RESERVED | (qcow2_extended(c->s) ? QCOW2_ZERO : 0);
    if (entry & reserved)
        check_corruption(
            c, "L2 entry for guest offset %" PRIu64 ": 0x%" PRIx64 " has reserved bits set",
            w->guest, entry);
    if (entry & QCOW2_ZERO && c->s->h.version < 3)
        check_corruption(c,
                         "L2 entry for guest offset %" PRIu64 ": 0x%" PRIx64
                         " has the zero flag, which version 2 does not have",
                         w->guest, entry);
    if (!offset && qcow2_l2_room(c->s, (struct qcow2_l2e){entry, 0})) {
        w->run_entry = entry; /* the first cluster of a data file */
        w->run_guest = w->guest;
        w->run = 1;
        return 0;
    }
    if (!offset) {
        if (entry & QCOW2_COPIED && !(entry & QCOW2_ZERO))
            check_corruption(c,
                             "L2 entry for guest offset %" PRIu64 ": 0x%" PRIx64
                             " has the COPIED flag but no cluster",
                             w->guest, entry);
        return 0;
    }
    if (!is_aligned(offset, c->s->cluster_size)) {
        check_corruption(c,
                         "L2 entry for guest offset %" PRIu64 ": offset %" PRIu64
                         " is not a multiple of the cluster size %" PRIu32,
                         w->guest, offset, c->s->cluster_size);
        c->r->allocated_clusters += w->times;
        if (qcow2_data_apart(c->s))
            return 0;
        if (check_inside(c, offset, c->s->cluster_size))
            return check_count(c, offset, c->s->cluster_size, w->names);
        check_outside(c, offset >> c->s->cluster_bits, 2);
        return 0;
    }
    w->run_entry = entry;
    w->run_guest = w->guest;
    w->run = 1;
    return 0;
}

/* What the bits of an extended entry may not say. */
static void check_bitmap(struct l2_walk *w, struct qcow2_l2e e) {
    uint32_t data = (uint32_t)e.bitmap, zero = (uint32_t)(e.bitmap >> 32);
    const char *what = NULL;
    if (e.value & QCOW2_COMPRESSED && e.bitmap)
        what = "is compressed, and its subclusters must have no bits";
    else if (data & zero)
        what = "has subclusters that are allocated and read as zeros at once";
    else if (data && !qcow2_l2_room(w->c->s, e))
        what = "has allocated subclusters but no cluster";
    if (what)
        check_corruption(w->c,
                         "L2 entry for guest offset %" PRIu64 ": 0x%" PRIx64
                         ", subclusters 0x%" PRIx64 ": %s",
                         w->guest, e.value, e.bitmap, what);
}

/* `extended` is known to the compiler, so that the walk over standard entries stays tight. */
static inline __attribute__((always_inline)) int
walk_entries_of(struct l2_walk *w, const uint8_t *p, uint32_t count, bool extended) {
    uint64_t cluster = w->c->s->cluster_size;
    uint64_t expect = w->run ? w->run_entry + w->run * cluster : 0;
    for (uint32_t i = 0; i < count; i++, w->guest += cluster) {
        struct qcow2_l2e e = {be64_load(p + i * (extended ? 16 : 8)),
                              extended ? be64_load(p + i * 16 + 8) : 0};
        if (extended && e.bitmap)
            check_bitmap(w, e);
        if (e.value == expect) { /* also: nothing after nothing */
            if (e.value) {
                w->run++;
                expect += cluster;
            }
            continue;
        }
        int r = run_end(w);
        if (!r && e.value)
            r = check_entry(w, e.value);
        if (r)
            return r;
        expect = w->run ? e.value + cluster : 0;
    }
    return 0;
}

static int walk_entries(struct l2_walk *w, const uint8_t *p, uint32_t bytes) {
    return qcow2_extended(w->c->s) ? walk_entries_of(w, p, bytes / 16, true)
                                   : walk_entries_of(w, p, bytes / 8, false);
}

/* ---- tables ---- */

/* `count` tables that follow one another in the file, the first for L1 index `l1_index`. */
static int walk_tables_co(struct check *c, uint64_t l1_index, uint64_t count, uint64_t offset,
                          struct l2_walk *w) {
    uint32_t bits = c->s->cluster_bits;
    uint64_t end = offset + (count << bits);
    w->c = c;
    w->guest = l1_index << (bits + c->s->l2_bits);
    while (offset < end) {
        uint32_t some = (uint32_t)min_u64(end - offset, CHECK_BUF_BYTES);
        int r = disk_pread_co(c->s->file, offset, c->buf, some);
        if (r) {
            check_failure(c, "L2 tables, %" PRIu32 " bytes at offset %" PRIu64 ": cannot read: %s",
                          some, offset, strerror(-r));
            memset(c->buf, 0, some);
        }
        for (uint32_t at = 0; at < some;) {
            uint32_t piece = min_u64(c->s->cluster_size, some - at);
            r = walk_entries(w, c->buf + at, piece);
            at += piece;
            if (!r && is_aligned(offset + at, c->s->cluster_size)) { /* end of a table */
                r = run_end(w);
                w->next = 0;
            }
            if (r)
                return r;
        }
        offset += some;
        check_progress(c, some);
    }
    return 0;
}

/* Walked with the active tables: `offset` from entry i on, and those that follow it everywhere. */
static uint64_t tables_alike(const struct check *c, uint64_t i, uint64_t names) {
    const struct qcow2 *s = c->s;
    uint64_t offset = s->l1[i] & QCOW2_OFFSET_MASK, n = 1;
    for (; i + n < c->l1_end && !c->twice.count; n++) {
        uint64_t next = offset + (n << s->cluster_bits);
        if (c->l1_skip[(i + n) / 64] >> (i + n) % 64 & 1 ||
            (s->l1[i + n] & QCOW2_OFFSET_MASK) != next ||
            check_tables_names(&c->inactive, next) != names - 1)
            break;
    }
    return n;
}

int check_active_l2_co(struct check *c) {
    struct qcow2 *s = c->s;
    int r = 0;
    check_tables_sort(&c->inactive);
    for (uint64_t i = 0; !r && i < c->l1_end;) {
        uint64_t skip = c->l1_skip[i / 64] >> i % 64 & 1;
        if (skip) {
            check_progress(c, s->cluster_size);
            i++;
            continue;
        }
        uint64_t offset = s->l1[i] & QCOW2_OFFSET_MASK;
        struct l2_walk w = {.active = true, .times = 1 + check_tables_names(&c->twice, offset)};
        w.names = w.times + check_tables_names(&c->inactive, offset);
        uint64_t n = tables_alike(c, i, w.names);
        r = walk_tables_co(c, i, n, offset, &w);
        i += n;
    }
    return r;
}

int check_inactive_l2_co(struct check *c, uint64_t offset, uint64_t names) {
    struct l2_walk w = {.names = names};
    return walk_tables_co(c, 0, 1, offset, &w);
}
