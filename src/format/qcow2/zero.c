/* SPDX-License-Identifier: MIT */
/*
 * Changes of the map alone: ranges that read as zeros, and ranges that nobody needs.
 *
 * They walk the entries slice by slice and ask one function, changed_entry(), what each becomes:
 *
 *      entry was              set_zero            set_zero MAY_UNMAP   discard
 *      hole, layer below      zero flag           zero flag            stays (old content)
 *      hole, none below       stays               stays                stays
 *      zero flag              stays               stays                stays
 *      zero flag and room     stays               zero flag            zero flag, or hole (1)
 *      data                   zero flag and room  zero flag            zero flag, or hole (1)
 *      coded                  zero flag           zero flag            zero flag, or hole (1)
 *
 *  (1) a hole where no layer is below, so that nothing old can shine through.
 *
 * Version 2 has no zero flag: holes where nothing is below, else -ENOTSUP (the engine writes
 * zeros), and discard leaves things alone.  A layer is "below" when the header names one, even if
 * this open left it closed.
 *
 * Slices without a change are not touched, so trimming what is trimmed costs no write.  What an
 * entry named before goes to limbo.
 */
#include <errno.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "format/qcow2/qcow2.h"

struct change {
    bool discard, unmap;
    bool hole; /* every entry becomes a hole, for cut.c; goes with `discard` */
};

/* What `entry` becomes; the same value: no change.  -ENOTSUP, -EIO. */
static int changed_entry(const struct qcow2 *s, const struct change *c, uint64_t entry,
                         uint64_t *out) {
    bool flags = s->h.version >= 3;
    uint64_t dropped = flags && (qcow2_has_backing(s) || !c->discard) ? QCOW2_ZERO : 0;
    enum qcow2_cluster_kind kind = qcow2_classify(s->h.version, s->cluster_bits, entry);
    *out = entry;
    if (c->hole && kind != QCOW2_CLUSTER_BAD) {
        *out = 0;
        return 0;
    }
    switch (kind) {
    case QCOW2_CLUSTER_BAD:
        return -EIO;
    case QCOW2_CLUSTER_NONE:
        if (qcow2_has_backing(s) && !c->discard)
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

/* First entry in [index, end) that changes; end: none. */
static int first_change(const struct qcow2 *s, const struct change *c,
                        const struct qcow2_slice *slice, uint32_t *index, uint32_t end) {
    for (; *index < end; ++*index) {
        uint64_t entry = slice ? be64_load(slice->data + (size_t)*index * 8) : 0, to;
        int r = changed_entry(s, c, entry, &to);
        if (r < 0)
            return r;
        if (to != entry)
            return 0;
    }
    return 0;
}

static int change_slice(struct qcow2 *s, const struct change *c, struct qcow2_slice *slice,
                        uint32_t index, uint32_t end) {
    uint8_t *p = qcow2_slice_modify(&s->cache, slice) + (size_t)index * 8;
    for (; index < end; index++, p += 8) {
        uint64_t entry = be64_load(p), to;
        int r = changed_entry(s, c, entry, &to);
        if (r < 0)
            return r;
        if (to == entry)
            continue;
        if ((to & QCOW2_OFFSET_MASK) != (entry & QCOW2_OFFSET_MASK) || entry & QCOW2_COMPRESSED)
            qcow2_limbo_add_entry(s, entry);
        be64_store(p, to);
    }
    return 0;
}

/* The part of [offset, end) that one slice holds; *next is where it ends. */
static int change_part_co(struct qcow2 *s, const struct change *c, uint64_t offset, uint64_t end,
                          uint64_t *next) {
    struct qcow2_slice *slice;
    uint32_t index;
    int r = qcow2_make_room_co(s);
    if (!r)
        r = qcow2_l2_slice_co(s, offset, &slice, &index);
    if (r < 0)
        return r;
    uint64_t per_slice = (uint64_t)1 << s->slice_bits;
    uint64_t clusters = min_u64(qcow2_clusters_for(s, end - offset), per_slice - index);
    *next = offset + (clusters << s->cluster_bits);
    if (!slice && (c->discard || !qcow2_has_backing(s))) {
        uint64_t span = (uint64_t)1 << (s->cluster_bits + s->l2_bits);
        *next = align_down(offset, span) + span; /* a table's worth of holes, which stay */
        return 0;
    }
    uint32_t last = index + (uint32_t)clusters;
    r = first_change(s, c, slice, &index, last);
    if (r < 0 || index == last)
        return r;
    uint32_t writable_index;
    r = qcow2_l2_slice_writable_co(s, offset, &slice, &writable_index);
    return r ? r : change_slice(s, c, slice, index, last);
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

int qcow2_set_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    struct qcow2 *s = qcow2_of(n);
    const struct change c = {.unmap = zero_flags & ZERO_MAY_UNMAP};
    if (s->h.version < 3 && qcow2_has_backing(s))
        return -ENOTSUP;
    return change_range_co(s, &c, offset, length);
}

int qcow2_discard_co(struct node *n, uint64_t offset, uint64_t length) {
    struct qcow2 *s = qcow2_of(n);
    const struct change c = {.discard = true, .unmap = true};
    if (s->h.version < 3 && qcow2_has_backing(s))
        return 0;
    return change_range_co(s, &c, offset, length);
}

int qcow2_make_holes_co(struct qcow2 *s, uint64_t offset, uint64_t length) {
    const struct change c = {.discard = true, .unmap = true, .hole = true};
    return change_range_co(s, &c, offset, length);
}
