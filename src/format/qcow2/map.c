/* SPDX-License-Identifier: MIT */
/*
 * Where guest bytes are.
 *
 * The answer starts with the entry of the first cluster and grows over the entries behind it while
 * each one continues the run: the same kind and, where bytes lie somewhere, the next host cluster.
 * That comparison is one masked load an entry: the entry of cluster k of a run is `first + k *
 * step`, with a step of one cluster for data and 0 for holes and zeros.
 *
 * With subclusters the run grows by the bits of each entry instead, and its unit is the subcluster.
 *
 * A cached slice is answered without suspending and without allocation.  Runs go on over slices
 * and L2 tables; a walk makes the cache read whole tables ahead.
 *
 * Damage met in the first entry is -EIO; damage further on ends the run before it.
 */
#include <errno.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "format/qcow2/qcow2.h"

/* One map call waits for at most so many slices: 2 MiB of tables, 16 GiB of guest at 64 KiB. */
#define MAP_LOADS_MAX 512

/* The bits of an entry that decide whether a run goes on. */
#define RUN_MASK (QCOW2_OFFSET_MASK | QCOW2_COPIED | QCOW2_COMPRESSED | QCOW2_ZERO)

enum qcow2_cluster_kind qcow2_l2_kind_unusual(const struct qcow2 *s, struct qcow2_l2e e,
                                              uint32_t sub) {
    uint64_t host = e.value & QCOW2_OFFSET_MASK;
    bool room = qcow2_l2_room(s, e);
    if (e.value & QCOW2_COMPRESSED)
        return qcow2_data_apart(s) ? QCOW2_CLUSTER_BAD : QCOW2_CLUSTER_CODED;
    if (!qcow2_extended(s))
        return room && !host ? QCOW2_CLUSTER_DATA
                             : qcow2_classify(s->h.version, s->cluster_bits, e.value);
    uint32_t data = (uint32_t)e.bitmap, zero = (uint32_t)(e.bitmap >> 32);
    bool lone = e.value & QCOW2_COPIED && !room;
    if (!is_aligned(host, s->cluster_size) || data & zero || (data && !room) || lone)
        return QCOW2_CLUSTER_BAD;
    if (data >> sub & 1)
        return QCOW2_CLUSTER_DATA;
    if (zero >> sub & 1)
        return room ? QCOW2_CLUSTER_ZERO_ALLOC : QCOW2_CLUSTER_ZERO;
    return room ? QCOW2_CLUSTER_ROOM : QCOW2_CLUSTER_NONE;
}

int qcow2_l2_slice_co(struct qcow2 *s, uint64_t offset, struct qcow2_slice **out, uint32_t *index) {
    uint64_t i1 = qcow2_l1_index(s, offset);
    uint64_t table = i1 < s->l1_entries ? s->l1[i1] & QCOW2_OFFSET_MASK : 0;
    uint32_t i2 = qcow2_l2_index(s, offset);
    *index = i2 & (((uint32_t)1 << s->slice_bits) - 1);
    *out = NULL;
    if (!table)
        return 0;
    if (!is_aligned(table, s->cluster_size))
        return -EIO;
    uint32_t at = (i2 >> s->slice_bits) * s->cache.slice_bytes;
    *out = qcow2_cache_peek(&s->cache, table + at);
    if (*out)
        return 0;
    return qcow2_cache_get_co(&s->cache, QCOW2_SLICE_L2, table + at, (uint32_t)i1,
                              s->cluster_size - at - s->cache.slice_bytes, out);
}

/* A run under construction. */
struct run {
    uint64_t pos;  /* guest end so far: a boundary of units once it has grown */
    uint64_t end;  /* guest end of the request */
    uint64_t want; /* masked entry that continues it; with subclusters: and its offset inside */
    uint64_t mask; /* the bits that matter */
    uint64_t step;
    enum qcow2_cluster_kind kind;
    bool watch; /* stop before host clusters that hold metadata */
};

/* How many subclusters from `sub` of an entry are of the kind of that one. */
static uint32_t sub_run(struct qcow2_l2e e, uint32_t sub, enum qcow2_cluster_kind kind) {
    uint32_t data = (uint32_t)e.bitmap, zero = (uint32_t)(e.bitmap >> 32);
    uint32_t same = kind == QCOW2_CLUSTER_DATA                                 ? data
                    : kind == QCOW2_CLUSTER_NONE || kind == QCOW2_CLUSTER_ROOM ? ~(data | zero)
                                                                               : zero;
    uint32_t other = ~same >> sub;
    return other ? (uint32_t)__builtin_ctz(other) : QCOW2_SUBCLUSTERS - sub;
}

/* Kinds with a host cluster. */
static bool is_located(enum qcow2_cluster_kind kind) {
    return kind == QCOW2_CLUSTER_DATA || kind == QCOW2_CLUSTER_ZERO_ALLOC ||
           kind == QCOW2_CLUSTER_ROOM;
}

/* Grows the run over one extended entry from subcluster `sub`; false: it ended inside. */
static bool run_over_subs(const struct qcow2 *s, struct qcow2_l2e e, uint32_t sub,
                          struct run *run) {
    bool located = is_located(run->kind);
    if (e.value & QCOW2_COMPRESSED || qcow2_l2_kind(s, e, sub) != run->kind)
        return false;
    if (located && (e.value & run->mask) + ((uint64_t)sub << s->sub_bits) != run->want)
        return false;
    if (run->watch && qcow2_is_meta(s, e.value & QCOW2_OFFSET_MASK))
        return false;
    uint32_t n = sub_run(e, sub, run->kind);
    run->pos += (uint64_t)n << s->sub_bits;
    run->want += located ? (uint64_t)n << s->sub_bits : 0;
    return sub + n == QCOW2_SUBCLUSTERS;
}

/* Grows the run over entries from `index` of the slice; false: it ended inside. */
static bool run_over_slice(const struct qcow2 *s, const struct qcow2_slice *slice, uint32_t index,
                           struct run *run) {
    uint32_t entries = (uint32_t)1 << s->slice_bits;
    if (!s->usual && qcow2_extended(s)) {
        for (; index < entries && run->pos < run->end; index++)
            if (!run_over_subs(s, qcow2_l2_get(s, slice->data, index), 0, run))
                return false;
        return true;
    }
    const uint8_t *p = slice->data + (size_t)index * 8;
    for (; index < entries && run->pos < run->end; index++, p += 8) {
        if ((be64_load(p) & run->mask) != run->want)
            return false;
        if (run->watch && qcow2_is_meta(s, run->want & QCOW2_OFFSET_MASK))
            return false;
        run->want += run->step;
        run->pos += s->cluster_size;
    }
    return true;
}

/* Grows the run over the slices behind its first one. */
static void run_extend_co(struct qcow2 *s, struct run *run) {
    int loads = MAP_LOADS_MAX;
    uint64_t span = (uint64_t)1 << (s->cluster_bits + s->l2_bits);
    while (run->pos < run->end && loads--) {
        struct qcow2_slice *slice;
        uint32_t index;
        uint64_t i1 = qcow2_l1_index(s, run->pos);
        if (i1 >= s->l1_entries || !(s->l1[i1] & QCOW2_OFFSET_MASK)) {
            if (run->kind != QCOW2_CLUSTER_NONE)
                return;
            run->pos = align_down(run->pos, span) + span;
            loads++;
            continue;
        }
        if (qcow2_l2_slice_co(s, run->pos, &slice, &index) < 0)
            return;
        if (!slice || !run_over_slice(s, slice, index, run))
            return;
    }
}

static int map_coded(const struct qcow2 *s, uint64_t entry, uint64_t offset, uint64_t length,
                     struct extent *out) {
    out->kind = EXTENT_CODED;
    out->codec = s->node->codec;
    out->storage = s->file;
    qcow2_coded_decode(s->cluster_bits, entry, &out->host_offset, &out->coded_length);
    if (out->host_offset < s->cluster_size ||
        out->host_offset >= QCOW2_HOST_LIMIT - out->coded_length)
        return -EIO;
    out->unit_offset = align_down(offset, s->cluster_size);
    out->unit_length = s->cluster_size;
    out->length = min_u64(length, out->unit_offset + s->cluster_size - offset);
    return 0;
}

/* The first unit is known; the run grows from there. */
static void run_grow_co(struct qcow2 *s, const struct qcow2_slice *slice, uint32_t index,
                        struct qcow2_l2e e, uint64_t offset, struct run *run) {
    if (!s->usual && slice && qcow2_extended(s)) {
        uint32_t sub = qcow2_sub_index(s, offset);
        run->want = (e.value & run->mask) + ((uint64_t)sub << s->sub_bits);
        run->pos = align_down(offset, (uint64_t)1 << s->sub_bits);
        if (!run_over_subs(s, e, sub, run))
            return;
    }
    if (run->pos < run->end && (!slice || run_over_slice(s, slice, index + 1, run)))
        run_extend_co(s, run);
}

int qcow2_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    struct qcow2 *s = qcow2_of(n);
    struct qcow2_slice *slice;
    uint32_t index;
    int r = qcow2_l2_slice_co(s, offset, &slice, &index);
    if (r < 0)
        return r;

    struct qcow2_l2e e = {0};
    if (slice)
        e = qcow2_l2_get(s, slice->data, index);
    uint32_t in_cluster = offset & (s->cluster_size - 1);
    uint64_t host = e.value & QCOW2_OFFSET_MASK;
    struct run run = {.pos = offset - in_cluster + s->cluster_size,
                      .end = offset + length,
                      .want = e.value & RUN_MASK,
                      .mask = RUN_MASK,
                      .kind = qcow2_l2_kind(s, e, qcow2_sub_index(s, offset))};
    bool in_place;
    *out = (struct extent){0};
    switch (run.kind) {
    case QCOW2_CLUSTER_BAD:
        return -EIO;
    case QCOW2_CLUSTER_CODED:
        return map_coded(s, e.value, offset, length, out);
    case QCOW2_CLUSTER_NONE:
    case QCOW2_CLUSTER_ROOM:
        out->kind = EXTENT_HOLE;
        if (!slice)
            run.pos = offset;
        break;
    case QCOW2_CLUSTER_ZERO:
        out->kind = EXTENT_ZERO;
        break;
    case QCOW2_CLUSTER_ZERO_ALLOC:
        out->kind = EXTENT_ZERO;
        out->flags = EXTENT_ALLOCATED;
        break;
    case QCOW2_CLUSTER_DATA:
        out->kind = EXTENT_DATA;
        in_place = node_is_rw(n) && e.value & QCOW2_COPIED;
        /* Whatever an entry says, guest data is not written over metadata. */
        run.watch = in_place && (s->usual || !qcow2_data_apart(s));
        if (run.watch && qcow2_is_meta(s, host))
            in_place = run.watch = false;
        if (s->corrupt)
            in_place = false;
        out->flags = in_place ? EXTENT_IN_PLACE : 0;
        break;
    }
    if (is_located(run.kind)) {
        /* A data file has one place for each guest byte.  It may have been left closed. */
        if (!s->usual && qcow2_data_apart(s) && (host != offset - in_cluster || !s->data))
            return -EIO;
        out->storage = s->data;
        out->host_offset = host + in_cluster;
        run.step = s->cluster_size;
        if (!node_is_rw(n)) /* then COPIED says nothing that the answer shows */
            run.mask &= ~QCOW2_COPIED;
        run.want = (run.want + run.step) & ~(QCOW2_COPIED & ~run.mask);
    }
    run_grow_co(s, slice, index, e, offset, &run);
    out->length = min_u64(run.pos, run.end) - offset;
    return 0;
}
