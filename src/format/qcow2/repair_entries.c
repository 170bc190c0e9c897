/* SPDX-License-Identifier: MIT */
/*
 * Repair of L1 and L2 entries, table by table, in one walk for each kind of repair:
 *
 *   simple   what can be made right in the entry itself, without any change of what a guest reads:
 *              reserved bits, COPIED on compressed data or without a cluster           cleared
 *              bits of subclusters in a compressed cluster                             cleared
 *              a preallocated zero cluster that is unaligned or outside the file       zero flag
 *              a data cluster outside the file, which reads as zeros                   zero flag
 *              (version 2 has no zero flag: a hole where no layer is below, else it stays)
 *              an L2 table outside the file, which reads as empty                      no table
 *   COPIED   of the active tables: set exactly where the stored count is 1
 *   tables   a table that several L1 entries name: the others get copies, whose data then move
 *   moves    guest data in a cluster of metadata, or in one that the active image names twice,
 *            is copied into a cluster of its own
 *
 * What stays as it is, since nobody knows what it meant: data at unaligned offsets, compressed data
 * outside the file, tables that lie in other metadata.
 *
 * Order of moves on storage: the new clusters are counted, flushed; the data is copied, flushed;
 * then the entries of one buffer of tables are written.  A crash leaves counted clusters that
 * nothing names: leaks.  The old clusters keep their counts until repair_counts.c lowers them.
 *
 * A table in whose cluster something else lies is not touched: guest data there move first, and the
 * next round may look at the table.  Only when no such move is left are the others made in the
 * tables themselves: then a table names itself, or two name one another.
 *
 * Clusters that snapshots share with the active image are no duplicates: only the active tables are
 * compared with one another.
 */
#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/plant.h"
#include "disk/io.h"
#include "format/qcow2/repair.h"

#define L2_RESERVED (~(QCOW2_OFFSET_MASK | QCOW2_COPIED | QCOW2_COMPRESSED | QCOW2_ZERO))

/* One entry, and the table that it is in. */
struct entry_at {
    struct repair *p;
    struct check *c;
    bool active;
    uint64_t names; /* L1 tables and entries that name this table */
    struct qcow2_l2e v;
};
/* Changes e->v.  -errno. */
typedef int change_co(struct entry_at *e);

/* ---------------------------------------------------------------- the walk */

/* The entries in p->buf.  *changed is set; *fixed counts. */
static int change_buffer_co(struct entry_at *e, change_co *change, uint32_t bytes, bool *changed,
                            uint64_t *fixed) {
    const struct qcow2 *s = e->p->s;
    uint32_t n = bytes >> s->l2e_shift;
    int r = 0;
    for (uint32_t i = 0; !r && i < n; i++) {
        struct qcow2_l2e old = qcow2_l2_get(s, e->p->buf, i);
        if (!old.value)
            continue;
        e->v = old;
        r = change(e);
        if (r || (e->v.value == old.value && e->v.bitmap == old.bitmap))
            continue;
        qcow2_l2_set(s, e->p->buf, i, e->v);
        *changed = true;
        ++*fixed;
    }
    return r;
}

static int change_table_co(struct entry_at *e, change_co *change, uint64_t offset,
                           uint64_t *fixed) {
    struct qcow2 *s = e->p->s;
    uint32_t piece = min_u64(s->cluster_size, CHECK_BUF_BYTES);
    for (uint64_t at = offset; at < offset + s->cluster_size; at += piece) {
        bool changed = false;
        int r = disk_pread_co(s->file, at, e->p->buf, piece);
        if (r) /* the check has said so */
            return 0;
        uint64_t left = e->p->left;
        r = change_buffer_co(e, change, piece, &changed, fixed);
        if (!r && left != e->p->left && !PLANTED(MOVED_DATA_LATE))
            r = repair_barrier_co(s); /* data was copied: before the entries that name it */
        if (!r && changed)
            r = disk_pwrite_co(s->file, at, e->p->buf, piece);
        if (r)
            return r;
    }
    return 0;
}

/* The table, unless something else may lie in its cluster, too: that must leave first. */
static int change_sure_table_co(struct entry_at *e, change_co *change, uint64_t offset,
                                uint64_t *fixed) {
    if (!e->p->unsure && counts_get(&e->c->found, offset >> e->c->s->cluster_bits) > e->names)
        return 0;
    return change_table_co(e, change, offset, fixed);
}

/* Every L2 table that the pass has walked, once: the active ones first. */
static int change_all_co(struct repair *p, struct check *c, change_co *change, bool snapshots,
                         uint64_t *fixed) {
    const struct qcow2 *s = c->s;
    int r = 0;
    for (uint64_t i = 0; !r && i < c->l1_end; i++) {
        if (c->l1_skip[i / 64] >> i % 64 & 1)
            continue;
        uint64_t offset = s->l1[i] & QCOW2_OFFSET_MASK;
        struct entry_at e = {.p = p, .c = c, .active = true};
        e.names =
            1 + check_tables_names(&c->twice, offset) + check_tables_names(&c->inactive, offset);
        r = change_sure_table_co(&e, change, offset, fixed);
    }
    for (size_t i = 0; snapshots && !r && i < c->inactive.count; i++) {
        uint64_t offset = c->inactive.v[i].offset;
        if (counts_get(&c->l2, offset >> s->cluster_bits) & 1)
            continue; /* active too, and done */
        struct entry_at e = {.p = p, .c = c, .names = c->inactive.v[i].names};
        r = change_sure_table_co(&e, change, offset, fixed);
    }
    return r;
}

/* Writes L1 entries [first, last] as they are in memory. */
static int write_l1_co(struct qcow2 *s, uint64_t first, uint64_t last) {
    uint64_t n = last - first + 1;
    return qcow2_table_write_co(s, s->h.l1_table_offset + first * 8, s->l1 + first, n, n * 8);
}

/* Guest data lie in a file of their own. */
static bool apart(const struct qcow2 *s) {
    return s->h.incompatible & QCOW2_INCOMPAT_DATA_FILE;
}

/* ---------------------------------------------------------------- simple ones */

/* Does the host cluster of a standard entry hold anything that a guest reads? */
static bool holds_data(const struct qcow2 *s, struct qcow2_l2e v) {
    return qcow2_extended(s) ? (uint32_t)v.bitmap != 0 : !(v.value & QCOW2_ZERO);
}

/* The same entry without its host cluster, where that held zeros only. */
static struct qcow2_l2e without_room(const struct qcow2 *s, struct qcow2_l2e v) {
    if (qcow2_extended(s))
        return (struct qcow2_l2e){0, (v.bitmap | v.bitmap << 32) & QCOW2_ALL_ZERO};
    return (struct qcow2_l2e){QCOW2_ZERO, 0};
}

static int change_simple(struct entry_at *e) {
    const struct check *c = e->c;
    const struct qcow2 *s = c->s;
    struct qcow2_l2e v = e->v;
    if (v.value & QCOW2_COMPRESSED) {
        e->v.value &= ~QCOW2_COPIED;
        e->v.bitmap = 0; /* coded clusters have no subclusters */
        return 0;
    }
    v.value &= ~(L2_RESERVED | (qcow2_extended(s) ? QCOW2_ZERO : 0));
    uint64_t offset = v.value & QCOW2_OFFSET_MASK;
    bool aligned = is_aligned(offset, s->cluster_size);
    bool outside = offset >> s->cluster_bits >= c->file_clusters;
    if (apart(s)) { /* offsets are of another file */
    } else if (!offset) {
        if (v.value == QCOW2_COPIED)
            v.value = 0;
    } else if (s->h.version >= 3) {
        if ((aligned && outside) || (!aligned && !holds_data(s, v)))
            v = without_room(s, v);
    } else if (aligned && outside && !(v.value & QCOW2_ZERO) && !qcow2_has_backing(s)) {
        v.value = 0;
    }
    e->v = v;
    return 0;
}

/* The active L1 table: reserved bits, and tables outside the file. */
static int simple_l1_co(struct check *c, uint64_t *fixed) {
    struct qcow2 *s = c->s;
    uint64_t first = UINT64_MAX, last = 0;
    for (uint64_t i = 0; i < c->l1_end; i++) {
        uint64_t v = s->l1[i] & (QCOW2_OFFSET_MASK | QCOW2_COPIED);
        uint64_t offset = v & QCOW2_OFFSET_MASK;
        if (offset && is_aligned(offset, s->cluster_size) &&
            !check_inside(c, offset, s->cluster_size))
            v = 0;
        if (v == s->l1[i])
            continue;
        s->l1[i] = v;
        first = min_u64(first, i);
        last = i;
        ++*fixed;
    }
    return first == UINT64_MAX ? 0 : write_l1_co(s, first, last);
}

int repair_entries_co(struct repair *p, struct check *c, uint64_t *fixed) {
    uint64_t n = 0;
    int r = change_all_co(p, c, change_simple, true, &n);
    if (!r)
        r = simple_l1_co(c, &n);
    if (!r && n)
        r = repair_barrier_co(p->s);
    *fixed += n;
    return r;
}

/* ---------------------------------------------------------------- room, and shared tables */

int repair_room_co(struct repair *p, struct check *c) {
    uint64_t room = repair_room_from(c);
    /* A hostile image must not make the file grow without end. */
    uint64_t n = min_u64(p->wanted, c->file_clusters + 1024);
    bool fits;
    if (room + n > min_u64(c->outside_far, QCOW2_HOST_LIMIT >> p->s->cluster_bits))
        return 0;
    int r = repair_claim_co(p, room, n, &fits);
    if (!r && !fits)
        r = repair_rebuild_co(p, room, n);
    if (r == -EFBIG)
        return 0; /* then nothing moves */
    if (!r) {
        p->room = room;
        p->left = n;
    }
    return r;
}

/* Copies a table to p->room, without COPIED flags: what it names is named twice from now on. */
static int copy_table_co(struct repair *p, uint64_t from) {
    const struct qcow2 *s = p->s;
    uint64_t to = p->room << s->cluster_bits;
    int r = disk_pread_co(s->file, from, p->cluster, s->cluster_size);
    if (r)
        return r;
    for (uint32_t i = 0; i < s->cluster_size >> s->l2e_shift; i++) {
        struct qcow2_l2e e = qcow2_l2_get(s, p->cluster, i);
        e.value &= ~QCOW2_COPIED;
        qcow2_l2_set(s, p->cluster, i, e);
    }
    r = disk_pwrite_co(s->file, to, p->cluster, s->cluster_size);
    p->room += !r;
    p->left -= !r;
    return r;
}

/* All but the first of the L1 entries that name one table get tables of their own. */
int repair_tables_co(struct repair *p, struct check *c, uint64_t *fixed) {
    struct qcow2 *s = p->s;
    uint64_t first = UINT64_MAX, last = 0, n = 0;
    p->wanted = p->left = 0;
    for (size_t i = 0; i < c->twice.count; i++)
        p->wanted += c->twice.v[i].names;
    int r = p->wanted ? repair_room_co(p, c) : 0;
    for (uint64_t i = 0; !r && p->left && i < c->l1_end; i++) {
        uint64_t offset = s->l1[i] & QCOW2_OFFSET_MASK, to = p->room << s->cluster_bits;
        if (!(c->l1_skip[i / 64] >> i % 64 & 1) || !check_tables_names(&c->twice, offset))
            continue;
        r = copy_table_co(p, offset);
        if (r)
            break;
        s->l1[i] = to | QCOW2_COPIED;
        first = min_u64(first, i);
        last = i;
        n++;
    }
    if (!r && n)
        r = repair_barrier_co(s);
    if (!r && n)
        r = write_l1_co(s, first, last);
    if (!r && n)
        r = repair_barrier_co(s);
    *fixed += n;
    return r;
}

/* ---------------------------------------------------------------- COPIED */

static int change_copied(struct entry_at *e) {
    const struct check *c = e->c;
    uint64_t offset = e->v.value & QCOW2_OFFSET_MASK, cluster = offset >> c->s->cluster_bits;
    if (e->v.value & QCOW2_COMPRESSED || !offset || !is_aligned(offset, c->s->cluster_size) ||
        cluster >= c->file_clusters || apart(c->s))
        return 0;
    e->v.value &= ~QCOW2_COPIED;
    if (counts_get(&c->stored, cluster) == 1)
        e->v.value |= QCOW2_COPIED;
    return 0;
}

int repair_copied_co(struct repair *p, struct check *c, uint64_t *fixed) {
    struct qcow2 *s = p->s;
    uint64_t first = UINT64_MAX, last = 0, n = 0;
    int r = change_all_co(p, c, change_copied, false, &n);
    for (uint64_t i = 0; !r && i < c->l1_end; i++) {
        uint64_t offset = s->l1[i] & QCOW2_OFFSET_MASK, cluster = offset >> s->cluster_bits;
        if (!offset || !is_aligned(offset, s->cluster_size) ||
            !check_inside(c, offset, s->cluster_size) || counts_get(&c->fixed, cluster))
            continue;
        bool copied = counts_get(&c->stored, cluster) == 1;
        if (copied == !!(s->l1[i] & QCOW2_COPIED))
            continue;
        s->l1[i] ^= QCOW2_COPIED;
        first = min_u64(first, i);
        last = i;
        n++;
    }
    if (!r && first != UINT64_MAX)
        r = write_l1_co(s, first, last);
    if (!r && n)
        r = repair_barrier_co(s);
    *fixed += n;
    return r;
}

/* ---------------------------------------------------------------- moves */

/* Must this data entry leave its cluster?  Notes that the active image names it. */
static int should_move(struct entry_at *e, bool *move) {
    struct check *c = e->c;
    uint64_t offset = e->v.value & QCOW2_OFFSET_MASK, cluster = offset >> c->s->cluster_bits;
    *move = false;
    if (e->v.value & QCOW2_COMPRESSED || apart(c->s) || !is_aligned(offset, c->s->cluster_size) ||
        !offset || cluster >= c->file_clusters)
        return 0;
    if (counts_get(&c->fixed, cluster) || counts_get(&c->l2, cluster)) {
        *move = true;
        return 0;
    }
    if (!e->active || counts_get(&c->found, cluster) < 2)
        return 0;
    *move = counts_get(&e->p->seen, cluster) != 0;
    return *move ? 0 : counts_add(&e->p->seen, cluster, 1, 1);
}

static int count_move(struct entry_at *e) {
    bool move;
    int r = should_move(e, &move);
    if (!r && move && holds_data(e->c->s, e->v))
        e->p->wanted++;
    return r;
}

static int change_move_co(struct entry_at *e) {
    struct repair *p = e->p;
    struct qcow2 *s = p->s;
    bool move;
    int r = should_move(e, &move);
    if (r || !move)
        return r;
    if (!holds_data(s, e->v)) { /* its room holds nothing */
        if (s->h.version >= 3)
            e->v = without_room(s, e->v);
        return 0;
    }
    if (!p->left)
        return 0;
    uint64_t to = p->room << s->cluster_bits;
    r = disk_pread_co(s->file, e->v.value & QCOW2_OFFSET_MASK, p->cluster, s->cluster_size);
    if (r) /* it stays where it is, and cannot be read there either */
        return 0;
    r = disk_pwrite_co(s->file, to, p->cluster, s->cluster_size);
    if (r)
        return r;
    p->room++;
    p->left--;
    /* A table that several name: the counts rise later, and COPIED follows them. */
    e->v.value = to | (e->active && e->names == 1 ? QCOW2_COPIED : 0);
    return 0;
}

/* Counts (p->wanted) what should move, and what changes without. */
static int walk_moves_co(struct repair *p, struct check *c, change_co *change, uint64_t *n) {
    int r = counts_init(&p->seen, c->file_clusters + 1);
    if (!r)
        r = change_all_co(p, c, change, true, n);
    counts_free(&p->seen);
    return r;
}

int repair_moves_co(struct repair *p, struct check *c, uint64_t *fixed) {
    uint64_t n = 0;
    p->wanted = p->left = 0;
    int r = walk_moves_co(p, c, count_move, &n);
    if (!r && !p->wanted && c->overlaps) { /* a table that names itself as data, and the like */
        p->unsure = true;
        r = walk_moves_co(p, c, count_move, &n);
    }
    if (!r && p->wanted)
        r = repair_room_co(p, c);
    if (!r)
        r = walk_moves_co(p, c, change_move_co, &n);
    p->unsure = false;
    if (!r && n)
        r = repair_barrier_co(p->s);
    *fixed += n;
    return r;
}
