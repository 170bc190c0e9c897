/* SPDX-License-Identifier: MIT */
/*
 * Changes of the map alone: ranges that read as zeros, and ranges that nobody needs.
 *
 * They walk the entries slice by slice and ask one function, changed_entry(), what each becomes:
 *
 *      entry was              set_zero            set_zero MAY_UNMAP   discard
 *      hole, layer below      zero flag           zero flag            stays (old content)
 *      hole, none below       stays (2)           stays (2)            stays
 *      zero flag              stays               stays                stays
 *      zero flag and room     stays               zero flag            zero flag, or hole (1)
 *      data                   zero flag and room  zero flag            zero flag, or hole (1)
 *      coded                  zero flag           zero flag            zero flag, or hole (1)
 *
 *  (1) a hole where no layer is below, so that nothing old can shine through.
 *  (2) the zero flag when it is asked for (ZERO_PRESENT).
 *
 * With subclusters the same holds for each subcluster of the range, in bits: "zero flag" is its
 * zero bit, a hole has neither bit, and the room is the cluster's, which is given back (MAY_UNMAP,
 * discard) when no subcluster has bytes in it any more.  A part of a coded cluster is -ENOTSUP, or
 * stays when discarded.
 *
 * Version 2 has no zero flag: holes where nothing is below, else -ENOTSUP (the engine writes
 * zeros), and discard leaves things alone.  A layer is "below" when the header names one, even if
 * this open left it closed.
 *
 * External data files.  A raw one (data_file_raw) must read as the guest does by itself: zeros and
 * discards go to it, and the entries stay (where a backing file makes the bit a lie, zeros go both
 * ways).  Another one is told of what its entries no longer name, at once: its places are never
 * given to anybody else, and what was there reads as zeros or may be anything.
 *
 * Slices without a change are not touched, so trimming what is trimmed costs no write.  What an
 * entry named before goes to limbo.
 */
#include <errno.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"
#include "format/qcow2/qcow2.h"

struct change {
    bool discard, unmap;
    bool mark; /* holes become zeros even where nothing is below */
    bool hole; /* every entry becomes a hole, for cut.c; goes with `discard` */
};

/* What standard entry `entry` becomes; the same value: no change.  -ENOTSUP, -EIO. */
static int changed_value(const struct qcow2 *s, const struct change *c, uint64_t entry,
                         uint64_t *out) {
    bool flags = s->h.version >= 3;
    uint64_t dropped = flags && (qcow2_has_backing(s) || !c->discard) ? QCOW2_ZERO : 0;
    *out = entry;
    switch (qcow2_l2_kind(s, (struct qcow2_l2e){entry, 0}, 0)) {
    case QCOW2_CLUSTER_BAD:
        return -EIO;
    case QCOW2_CLUSTER_NONE:
    case QCOW2_CLUSTER_ROOM:
        if ((qcow2_has_backing(s) || (c->mark && flags)) && !c->discard)
            *out = QCOW2_ZERO;
        break;
    case QCOW2_CLUSTER_ZERO:
        break;
    case QCOW2_CLUSTER_ZERO_ALLOC:
        if (c->unmap)
            *out = dropped;
        break;
    case QCOW2_CLUSTER_DATA:
        if (!c->unmap && !flags)
            return -ENOTSUP;
        *out = c->unmap ? dropped : entry | QCOW2_ZERO;
        break;
    case QCOW2_CLUSTER_CODED:
        *out = dropped;
        break;
    }
    return 0;
}

/* The same for the subclusters `subs` of an extended entry. */
static int changed_subs(const struct qcow2 *s, const struct change *c, struct qcow2_l2e e,
                        uint32_t subs, struct qcow2_l2e *out) {
    uint32_t data = (uint32_t)e.bitmap, zero = (uint32_t)(e.bitmap >> 32);
    *out = e;
    switch (qcow2_l2_kind(s, e, 0)) {
    case QCOW2_CLUSTER_BAD:
        return -EIO;
    case QCOW2_CLUSTER_CODED:
        if (subs != UINT32_MAX)
            return c->discard ? 0 : -ENOTSUP;
        *out = (struct qcow2_l2e){0, qcow2_has_backing(s) || !c->discard ? QCOW2_ALL_ZERO : 0};
        return 0;
    default:
        break;
    }
    if (!c->discard && (qcow2_has_backing(s) || c->mark))
        zero |= subs;
    else if (!c->discard || qcow2_has_backing(s))
        zero |= subs & data;
    else
        zero &= ~subs; /* no layer below: holes */
    data &= ~subs;
    out->bitmap = (uint64_t)zero << 32 | data;
    if (c->unmap && !data && qcow2_l2_room(s, e))
        out->value = 0;
    return 0;
}

/* What entry `e` becomes where the subclusters `subs` of it change. */
static int changed_entry(const struct qcow2 *s, const struct change *c, struct qcow2_l2e e,
                         uint32_t subs, struct qcow2_l2e *out) {
    *out = e;
    if (c->hole && qcow2_l2_kind(s, e, 0) != QCOW2_CLUSTER_BAD) {
        *out = (struct qcow2_l2e){0};
        return 0;
    }
    return qcow2_extended(s) ? changed_subs(s, c, e, subs, out)
                             : changed_value(s, c, e.value, &out->value);
}

/* The part of a range that one slice holds. */
struct piece {
    uint64_t offset, end;  /* guest */
    uint32_t index, count; /* entries */
};

/* Subclusters of the piece's i-th entry that the range covers; those behind the disk's end go along
 * with the last one. */
static uint32_t covered(const struct qcow2 *s, const struct piece *p, uint32_t i) {
    uint32_t first = i ? 0 : qcow2_sub_index(s, p->offset), end = qcow2_sub_count(s);
    if (i + 1 == p->count && p->end < s->h.size && !is_aligned(p->end, s->cluster_size))
        end = qcow2_sub_index(s, p->end - 1) + 1;
    return qcow2_sub_mask(first, end);
}

/* First entry from *i on that changes; p->count: none. */
static int first_change(const struct qcow2 *s, const struct change *c,
                        const struct qcow2_slice *slice, const struct piece *p, uint32_t *i) {
    for (; *i < p->count; ++*i) {
        struct qcow2_l2e e = {0}, to;
        if (slice)
            e = qcow2_l2_get(s, slice->data, p->index + *i);
        int r = changed_entry(s, c, e, covered(s, p, *i), &to);
        if (r < 0)
            return r;
        if (to.value != e.value || to.bitmap != e.bitmap)
            return 0;
    }
    return 0;
}

static int change_slice(struct qcow2 *s, const struct change *c, struct qcow2_slice *slice,
                        const struct piece *p, uint32_t i) {
    uint8_t *data = qcow2_slice_modify(&s->cache, slice);
    for (; i < p->count; i++) {
        struct qcow2_l2e e = qcow2_l2_get(s, data, p->index + i), to;
        int r = changed_entry(s, c, e, covered(s, p, i), &to);
        if (r < 0)
            return r;
        if (to.value == e.value && to.bitmap == e.bitmap)
            continue;
        if ((to.value ^ e.value) & QCOW2_OFFSET_MASK || e.value & QCOW2_COMPRESSED)
            qcow2_limbo_add_entry(s, e);
        qcow2_l2_set(s, data, p->index + i, to);
    }
    return 0;
}

/* The part of [offset, end) that one slice holds; *next is where it ends. */
static int change_part_co(struct qcow2 *s, const struct change *c, uint64_t offset, uint64_t end,
                          uint64_t *next) {
    struct qcow2_slice *slice;
    struct piece p = {.offset = offset};
    uint32_t i = 0;
    int r = qcow2_make_room_co(s);
    if (!r)
        r = qcow2_l2_slice_co(s, offset, &slice, &p.index);
    if (r < 0)
        return r;
    uint64_t start = align_down(offset, s->cluster_size), per_slice = (uint64_t)1 << s->slice_bits;
    p.count = (uint32_t)min_u64(qcow2_clusters_for(s, end - start), per_slice - p.index);
    *next = p.end = min_u64(end, start + ((uint64_t)p.count << s->cluster_bits));
    if (!slice && (c->discard || (!qcow2_has_backing(s) && !c->mark))) {
        uint64_t span = (uint64_t)1 << (s->cluster_bits + s->l2_bits);
        *next = align_down(offset, span) + span; /* a table's worth of holes, which stay */
        return 0;
    }
    r = first_change(s, c, slice, &p, &i);
    if (r < 0 || i == p.count)
        return r;
    uint32_t index;
    r = qcow2_l2_slice_writable_co(s, offset, &slice, &index);
    return r ? r : change_slice(s, c, slice, &p, i);
}

static int change_range_co(struct qcow2 *s, const struct change *c, uint64_t offset,
                           uint64_t length) {
    uint64_t end = offset + length;
    int r = 0;
    while (!r && offset < end)
        r = change_part_co(s, c, offset, end, &offset);
    qcow2_limbo_settle_co(s);
    return r;
}

/* What lies in [offset, +length) of the data file is named by nothing any more. */
static void data_drop_co(struct qcow2 *s, uint64_t offset, uint64_t length) {
    if (qcow2_data_apart(s) && s->data && s->node->flags & NODE_UNMAP)
        disk_discard_co(s->data, offset, length); /* only a hint */
}

int qcow2_set_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    struct qcow2 *s = qcow2_of(n);
    const struct change c = {.unmap = zero_flags & ZERO_MAY_UNMAP,
                             .mark = zero_flags & ZERO_PRESENT && s->h.version >= 3};
    if (s->h.version < 3 && qcow2_has_backing(s))
        return -ENOTSUP;
    if (qcow2_data_raw(s)) {
        int r = !s->data ? -EIO : disk_zero_co(s->data, offset, length, zero_flags);
        if (r < 0 || !qcow2_has_backing(s))
            return r;
    }
    int r = change_range_co(s, &c, offset, length);
    if (!r && c.unmap && !qcow2_data_raw(s))
        data_drop_co(s, offset, length);
    return r;
}

int qcow2_discard_co(struct node *n, uint64_t offset, uint64_t length) {
    struct qcow2 *s = qcow2_of(n);
    const struct change c = {.discard = true, .unmap = true};
    if (s->h.version < 3 && qcow2_has_backing(s))
        return 0;
    int r = qcow2_data_raw(s) ? 0 : change_range_co(s, &c, offset, length);
    if (!r)
        data_drop_co(s, offset, length);
    return r;
}

int qcow2_make_holes_co(struct qcow2 *s, uint64_t offset, uint64_t length) {
    const struct change c = {.discard = true, .unmap = true, .hole = true};
    return change_range_co(s, &c, offset, length);
}
