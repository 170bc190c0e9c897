/* SPDX-License-Identifier: MIT */
/*
 * Room for writes: place, publish, abandon; and L2 tables made or copied on the way.
 *
 * place looks at the first cluster and goes on while the clusters behind it want the same:
 *
 *      data, COPIED              overwritten where it is                    (kind IN_PLACE)
 *      room else, COPIED         its room is used; old bytes there are void (kind REUSED)
 *      all else                  fresh clusters, as contiguous as free space has them (kind FRESH)
 *      PLACE_CODED               bytes behind the last coded ones           (kind CODED)
 *
 * With subclusters, "data" and "room else" are judged by the subclusters that the request touches,
 * and what is copied around it is whole subclusters: those that it touches in part, and into a
 * fresh cluster all that the old cluster held between or beside them.  The others keep their bits.
 *
 * An external data file has one place for each guest byte: "fresh" is the cluster's own place.
 *
 * "All else" includes what is shared with a snapshot: not COPIED means that the count may be more
 * than one, so the data is copied and one reference of the old cluster dropped.  L2 tables follow
 * the same rule.
 *
 * A placement stays inside one L2 slice, and that slice is pinned until publish or abandon.  So
 * publish is one step that neither suspends nor fails: it stores the entries and puts what they
 * named before into limbo.  The pinned slice cannot lose its table: its table is COPIED, and tables
 * are replaced only when they are not.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/plant.h"
#include "disk/event.h"
#include "disk/io.h"
#include "format/qcow2/qcow2.h"

enum kind { IN_PLACE, FRESH, REUSED, CODED };

/* cookie[0]: kind and index of the first entry in the slice; cookie[1]: the pinned slice. */
static void cookie_set(struct placement *p, enum kind kind, uint32_t index,
                       struct qcow2_slice *slice) {
    p->cookie[0] = (uint64_t)index << 8 | kind;
    p->cookie[1] = (uintptr_t)slice;
}

static enum kind cookie_kind(const struct placement *p) {
    return (enum kind)(p->cookie[0] & 0xff);
}

static uint32_t placement_clusters(const struct qcow2 *s, const struct placement *p) {
    return (uint32_t)(qcow2_cluster_index(s, p->offset + p->length - 1) -
                      qcow2_cluster_index(s, p->offset) + 1);
}

/* ---------------------------------------------------------------- L2 tables */

static void l1_set(struct qcow2 *s, uint64_t i1, uint64_t host) {
    s->l1[i1] = host | QCOW2_COPIED;
    if (!(s->l1_dirty[i1 / 64] >> i1 % 64 & 1)) {
        s->l1_dirty[i1 / 64] |= (uint64_t)1 << i1 % 64;
        s->l1_dirty_count++;
    }
}

/* The bytes of a table that is not changed in place, so storage has them. */
static int copy_table_co(struct qcow2 *s, uint64_t from, uint64_t to) {
    uint8_t *buf = buf_get(s->cluster_size);
    if (!buf)
        return -ENOMEM;
    disk_event_co(s->file, EVENT_l2_alloc_cow_read);
    int r = disk_pread_co(s->file, from, buf, s->cluster_size);
    if (!r)
        r = disk_pwrite_co(s->file, to, buf, s->cluster_size);
    buf_put(buf, s->cluster_size);
    return r;
}

/* A new table for L1 entry i1, empty or a copy of the shared one.  l2_lock is held. */
static int new_table_co(struct qcow2 *s, uint64_t i1) {
    uint64_t old = s->l1[i1] & QCOW2_OFFSET_MASK, host, got;
    bool virgin;
    if (!is_aligned(old, s->cluster_size))
        return -EIO;
    int r = qcow2_alloc_co(s, 1, true, &host, &got, &virgin);
    if (r < 0)
        return r;
    if (old)
        r = copy_table_co(s, old, host);
    else if (!virgin && !PLANTED(TABLE_NOT_ZEROED))
        r = disk_zero_co(s->file, host, s->cluster_size, 0);
    if (!r)
        r = qcow2_meta_add_kind(s, host, s->cluster_size, QCOW2_META_L2);
    qcow2_cache_forget(&s->cache, host, s->cluster_size);
    if (!r && !old) {
        /* Something of it is written in any case: no table lies wholly behind the file's end. */
        struct qcow2_slice *first;
        r = qcow2_cache_get_zero(&s->cache, QCOW2_SLICE_L2, host, (uint32_t)i1, &first);
        if (!r)
            qcow2_slice_modify(&s->cache, first);
    }
    if (r < 0) {
        qcow2_meta_remove(s, host, s->cluster_size);
        qcow2_release_or_limbo(s, qcow2_cluster_index(s, host), 1);
        return r;
    }
    l1_set(s, i1, host);
    if (old) {
        qcow2_cache_forget(&s->cache, old, s->cluster_size);
        qcow2_meta_remove(s, old, s->cluster_size);
        qcow2_limbo_add(s, qcow2_cluster_index(s, old), 1);
    }
    return 0;
}

int qcow2_l2_slice_writable_co(struct qcow2 *s, uint64_t offset, struct qcow2_slice **out,
                               uint32_t *index) {
    uint64_t i1 = qcow2_l1_index(s, offset);
    int r = 0;
    if (i1 >= s->l1_entries)
        return -EIO;
    if (!(s->l1[i1] & QCOW2_COPIED) || !(s->l1[i1] & QCOW2_OFFSET_MASK)) {
        task_mutex_lock_co(&s->l2_lock);
        if (!(s->l1[i1] & QCOW2_COPIED) || !(s->l1[i1] & QCOW2_OFFSET_MASK))
            r = new_table_co(s, i1);
        task_mutex_unlock(&s->l2_lock);
    }
    return r ? r : qcow2_l2_slice_co(s, offset, out, index);
}

/* ---------------------------------------------------------------- place */

/* Subclusters of the cluster at guest `at` that [offset, end) touches, a bit each. */
static uint32_t touched(const struct qcow2 *s, uint64_t at, uint64_t offset, uint64_t end) {
    uint32_t first = offset > at ? qcow2_sub_index(s, offset) : 0;
    uint32_t last =
        end < at + s->cluster_size ? qcow2_sub_index(s, end - 1) : qcow2_sub_count(s) - 1;
    return qcow2_sub_mask(first, last + 1);
}

static enum kind kind_of(const struct qcow2 *s, struct qcow2_l2e e, uint32_t subs) {
    if (!(e.value & QCOW2_COPIED) || e.value & QCOW2_COMPRESSED || !qcow2_l2_room(s, e))
        return FRESH;
    return subs & ~qcow2_l2_allocated(s, e) ? REUSED : IN_PLACE;
}

static bool is_bad(const struct qcow2 *s, struct qcow2_l2e e, uint64_t guest) {
    if (qcow2_l2_kind(s, e, 0) == QCOW2_CLUSTER_BAD)
        return true;
    return qcow2_data_apart(s) && qcow2_l2_room(s, e) && (e.value & QCOW2_OFFSET_MASK) != guest;
}

/*
 * How many entries from `index` on, for the clusters that [offset, end) touches, are of the kind of
 * the first one and, where they have room, contiguous.  0: the first one is damaged or names
 * metadata.
 */
static uint32_t run_length(const struct qcow2 *s, const struct qcow2_slice *slice, uint32_t index,
                           uint64_t offset, uint64_t end, enum kind *kind) {
    uint64_t at = align_down(offset, s->cluster_size);
    uint32_t entries = (uint32_t)1 << s->slice_bits, n = 0;
    struct qcow2_l2e e = qcow2_l2_get(s, slice->data, index);
    uint64_t host = e.value & QCOW2_OFFSET_MASK;
    *kind = kind_of(s, e, touched(s, at, offset, end));
    for (; index + n < entries && at < end; n++, at += s->cluster_size, host += s->cluster_size) {
        e = qcow2_l2_get(s, slice->data, index + n);
        if (is_bad(s, e, at) || kind_of(s, e, touched(s, at, offset, end)) != *kind)
            break;
        if (*kind != FRESH && (e.value & QCOW2_OFFSET_MASK) != host)
            break;
        if (*kind != FRESH && !qcow2_data_apart(s) && qcow2_is_meta(s, host))
            break;
    }
    return n;
}

/* Fills `out` for `clusters` host clusters from `host`, of which the request starts in the first.*/
static void placement_fill(const struct qcow2 *s, struct placement *out, uint64_t offset,
                           uint64_t length, uint64_t host, uint64_t clusters) {
    uint32_t in_cluster = offset & (s->cluster_size - 1);
    uint64_t room = (clusters << s->cluster_bits) - in_cluster;
    *out = (struct placement){.offset = offset,
                              .length = min_u64(length, room),
                              .storage = s->data,
                              .host_offset = host + in_cluster};
}

/* Subclusters that a fresh cluster must take over from the one that `e` names. */
static uint32_t taken_over(const struct qcow2 *s, struct qcow2_l2e e) {
    return e.value & QCOW2_COMPRESSED ? qcow2_sub_mask(0, qcow2_sub_count(s))
                                      : qcow2_l2_allocated(s, e);
}

/*
 * What must be valid around the request: whole subclusters.  One that is there already needs
 * nothing around what is overwritten.  `e`, `last_e`: of the first and the last cluster.
 */
static void placement_edges(const struct qcow2 *s, struct placement *p, enum kind kind,
                            struct qcow2_l2e e, struct qcow2_l2e last_e) {
    uint64_t stop = p->offset + p->length;
    uint32_t first = qcow2_sub_index(s, p->offset), last = qcow2_sub_index(s, stop - 1);
    p->is_new = true;
    if (kind == FRESH && taken_over(s, e))
        first = (uint32_t)min_u64(first, (uint64_t)__builtin_ctz(taken_over(s, e)));
    if (kind == FRESH && taken_over(s, last_e))
        last = (uint32_t)max_u64(last, 31 - (uint64_t)__builtin_clz(taken_over(s, last_e)));
    if (kind == FRESH || !(qcow2_l2_allocated(s, e) >> first & 1))
        p->head = (uint32_t)((p->offset & (s->cluster_size - 1)) - (first << s->sub_bits));
    if (kind == FRESH || !(qcow2_l2_allocated(s, last_e) >> last & 1))
        p->tail = (uint32_t)(align_down(stop - 1, s->cluster_size) +
                             ((uint64_t)(last + 1) << s->sub_bits) - stop);
    /* Nothing of a data file lies behind the end of the disk: alone, it is as long as that. */
    if (qcow2_data_apart(s) && p->tail > s->node->size - stop)
        p->tail = (uint32_t)(s->node->size - stop);
}

static int place_coded_co(struct qcow2 *s, uint64_t offset, uint64_t length, uint32_t coded_length,
                          struct qcow2_slice *slice, uint32_t index, struct placement *out) {
    uint64_t host;
    if (qcow2_data_apart(s))
        return -ENOTSUP;
    if (!coded_length || coded_length >= s->cluster_size || !is_aligned(offset, s->cluster_size))
        return -EINVAL;
    int r = qcow2_alloc_coded_co(s, coded_length, &host);
    if (r < 0)
        return r;
    *out = (struct placement){.offset = offset,
                              .length = min_u64(length, s->cluster_size),
                              .storage = s->file,
                              .host_offset = host,
                              .is_new = true,
                              .coded_length = coded_length};
    cookie_set(out, CODED, index, slice);
    if (qcow2_coded_encode(s->cluster_bits, host, coded_length))
        return 0;
    uint64_t first = qcow2_cluster_index(s, host);
    qcow2_release_or_limbo(s, first, qcow2_cluster_index(s, host + coded_length - 1) - first + 1);
    return -EFBIG;
}

static int place_plain_co(struct qcow2 *s, uint64_t offset, uint64_t length,
                          struct qcow2_slice *slice, uint32_t index, struct placement *out) {
    enum kind kind;
    uint32_t n = run_length(s, slice, index, offset, offset + length, &kind);
    struct qcow2_l2e e = qcow2_l2_get(s, slice->data, index);
    uint64_t host = e.value & QCOW2_OFFSET_MASK, got = n;
    bool virgin = false;
    int r = n ? 0 : -EIO;
    if (r && !is_bad(s, e, align_down(offset, s->cluster_size)))
        qcow2_corrupt(
            s, "guest offset %" PRIu64 " lies in the cluster at %" PRIu64 ", which holds metadata",
            offset, host);
    if (!r && kind == FRESH && qcow2_data_apart(s)) {
        host = align_down(offset, s->cluster_size);
        virgin = host >= s->data->size && s->data->storage_flags & STORAGE_ZERO_INIT;
    } else if (!r && kind == FRESH) {
        r = qcow2_alloc_co(s, n, false, &host, &got, &virgin);
    }
    if (r < 0)
        return r;
    placement_fill(s, out, offset, length, host, got);
    if (kind != IN_PLACE)
        placement_edges(s, out, kind, e,
                        qcow2_l2_get(s, slice->data, index + placement_clusters(s, out) - 1));
    out->reads_zero = virgin;
    cookie_set(out, kind, index, slice);
    return 0;
}

int qcow2_place_co(struct node *n, uint64_t offset, uint64_t length, unsigned flags,
                   uint32_t coded_length, struct placement *out) {
    struct qcow2 *s = qcow2_of(n);
    struct qcow2_slice *slice;
    uint32_t index;
    int r = s->data ? qcow2_make_room_co(s) : -EIO; /* the data file was left closed */
    if (!r)
        r = qcow2_l2_slice_writable_co(s, offset, &slice, &index);
    if (r < 0)
        return s->corrupt ? qcow2_corrupt_store_co(s) : r;
    qcow2_slice_pin(slice);
    r = flags & PLACE_CODED ? place_coded_co(s, offset, length, coded_length, slice, index, out)
                            : place_plain_co(s, offset, length, slice, index, out);
    if (r < 0)
        qcow2_slice_unpin(&s->cache, slice);
    return r < 0 && s->corrupt ? qcow2_corrupt_store_co(s) : r;
}

/* ---------------------------------------------------------------- publish, abandon */

/* Links the room in; `content`: and marks the subclusters of the placement as being there. */
static void link_room(struct qcow2 *s, const struct placement *p, uint8_t *data, bool content) {
    uint32_t index = (uint32_t)(p->cookie[0] >> 8);
    uint64_t at = align_down(p->offset, s->cluster_size);
    uint64_t start = p->offset - p->head, end = p->offset + p->length + p->tail;
    uint64_t host = p->host_offset - (p->offset - at);
    for (; at < end; at += s->cluster_size, host += s->cluster_size, index++) {
        struct qcow2_l2e e = qcow2_l2_get(s, data, index);
        if (cookie_kind(p) == FRESH)
            qcow2_limbo_add_entry(s, e);
        e.value = host | QCOW2_COPIED;
        if (qcow2_extended(s) && content) {
            uint64_t bits =
                PLANTED(SUBCLUSTERS_ALL_NAMED) ? UINT32_MAX : touched(s, at, start, end);
            e.bitmap = (e.bitmap & ~(bits << 32)) | bits;
        }
        qcow2_l2_set(s, data, index, e);
    }
}

int qcow2_publish_co(struct node *n, const struct placement *p) {
    struct qcow2 *s = qcow2_of(n);
    struct qcow2_slice *slice = (struct qcow2_slice *)(uintptr_t)p->cookie[1];
    enum kind kind = cookie_kind(p);
    if (kind != IN_PLACE) {
        uint8_t *data = qcow2_slice_modify(&s->cache, slice);
        uint32_t index = (uint32_t)(p->cookie[0] >> 8);
        if (kind == CODED) {
            qcow2_limbo_add_entry(s, qcow2_l2_get(s, data, index));
            qcow2_l2_set(
                s, data, index,
                (struct qcow2_l2e){
                    qcow2_coded_encode(s->cluster_bits, p->host_offset, p->coded_length), 0});
        } else {
            link_room(s, p, data, true);
        }
    }
    qcow2_slice_unpin(&s->cache, slice);
    qcow2_limbo_settle_co(s);
    return 0;
}

void qcow2_publish_room(struct qcow2 *s, const struct placement *p) {
    struct qcow2_slice *slice = (struct qcow2_slice *)(uintptr_t)p->cookie[1];
    if (cookie_kind(p) == FRESH)
        link_room(s, p, qcow2_slice_modify(&s->cache, slice), false);
    qcow2_slice_unpin(&s->cache, slice);
}

void qcow2_abandon(struct node *n, const struct placement *p) {
    struct qcow2 *s = qcow2_of(n);
    uint64_t first = qcow2_cluster_index(s, p->host_offset);
    if (cookie_kind(p) == FRESH && !qcow2_data_apart(s))
        qcow2_release_or_limbo(s, first, placement_clusters(s, p));
    if (cookie_kind(p) == CODED)
        qcow2_release_or_limbo(
            s, first, qcow2_cluster_index(s, p->host_offset + p->coded_length - 1) - first + 1);
    qcow2_slice_unpin(&s->cache, (struct qcow2_slice *)(uintptr_t)p->cookie[1]);
}
