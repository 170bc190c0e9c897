/* SPDX-License-Identifier: MIT */
/*
 * Room for writes: place, publish, abandon; and L2 tables made or copied on the way.
 *
 * place looks at the first cluster and goes on while the clusters behind it want the same:
 *
 *      data, COPIED              overwritten where it is                    (kind IN_PLACE)
 *      zero with room, COPIED    its room is used; old bytes there are void (kind REUSED)
 *      all else                  fresh clusters, as contiguous as free space has them (kind FRESH)
 *      PLACE_CODED               bytes behind the last coded ones           (kind CODED)
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
#include <stdlib.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/plant.h"
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
    return (uint32_t)((p->head + p->length + p->tail) >> s->cluster_bits);
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
        r = qcow2_meta_add(s, host, s->cluster_size);
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

static enum kind kind_of(const struct qcow2 *s, uint64_t entry) {
    enum qcow2_cluster_kind k = qcow2_classify(s->h.version, s->cluster_bits, entry);
    if (!(entry & QCOW2_COPIED))
        return FRESH;
    return k == QCOW2_CLUSTER_DATA ? IN_PLACE : k == QCOW2_CLUSTER_ZERO_ALLOC ? REUSED : FRESH;
}

static bool is_bad(const struct qcow2 *s, uint64_t entry) {
    return qcow2_classify(s->h.version, s->cluster_bits, entry) == QCOW2_CLUSTER_BAD;
}

/*
 * How many entries from `index`, at most `max`, are of the kind of the first one and, where they
 * have room, contiguous.  0: the first one is damaged or names metadata.
 */
static uint32_t run_length(const struct qcow2 *s, const struct qcow2_slice *slice, uint32_t index,
                           uint32_t max, enum kind *kind) {
    const uint8_t *p = slice->data + (size_t)index * 8;
    uint64_t host = be64_load(p) & QCOW2_OFFSET_MASK;
    uint32_t n = 0;
    *kind = kind_of(s, be64_load(p));
    for (; n < max; n++, p += 8, host += s->cluster_size) {
        uint64_t entry = be64_load(p);
        if (is_bad(s, entry) || kind_of(s, entry) != *kind)
            break;
        if (*kind != FRESH && ((entry & QCOW2_OFFSET_MASK) != host || qcow2_is_meta(s, host)))
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
                              .storage = s->file,
                              .host_offset = host + in_cluster};
}

static void placement_edges(const struct qcow2 *s, struct placement *p) {
    uint64_t end = p->offset + p->length;
    p->is_new = true;
    p->head = p->offset & (s->cluster_size - 1);
    p->tail = (uint32_t)(align_up(end, s->cluster_size) - end);
}

static int place_coded_co(struct qcow2 *s, uint64_t offset, uint64_t length, uint32_t coded_length,
                          struct qcow2_slice *slice, uint32_t index, struct placement *out) {
    uint64_t host;
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
    uint32_t in_cluster = offset & (s->cluster_size - 1);
    uint32_t max = (uint32_t)min_u64(qcow2_clusters_for(s, in_cluster + length),
                                     ((uint32_t)1 << s->slice_bits) - index);
    enum kind kind;
    uint32_t n = run_length(s, slice, index, max, &kind);
    uint64_t host = be64_load(slice->data + (size_t)index * 8) & QCOW2_OFFSET_MASK, got = n;
    bool virgin = false;
    int r = n ? 0 : -EIO;
    if (!r && kind == FRESH)
        r = qcow2_alloc_co(s, n, false, &host, &got, &virgin);
    if (r < 0)
        return r;
    placement_fill(s, out, offset, length, host, got);
    if (kind != IN_PLACE)
        placement_edges(s, out);
    out->reads_zero = virgin;
    cookie_set(out, kind, index, slice);
    return 0;
}

int qcow2_place_co(struct node *n, uint64_t offset, uint64_t length, unsigned flags,
                   uint32_t coded_length, struct placement *out) {
    struct qcow2 *s = qcow2_of(n);
    struct qcow2_slice *slice;
    uint32_t index;
    int r = qcow2_make_room_co(s);
    if (!r)
        r = qcow2_l2_slice_writable_co(s, offset, &slice, &index);
    if (r < 0)
        return r;
    qcow2_slice_pin(slice);
    r = flags & PLACE_CODED ? place_coded_co(s, offset, length, coded_length, slice, index, out)
                            : place_plain_co(s, offset, length, slice, index, out);
    if (r < 0)
        qcow2_slice_unpin(&s->cache, slice);
    return r;
}

/* ---------------------------------------------------------------- publish, abandon */

static void link_fresh(struct qcow2 *s, const struct placement *p, uint8_t *entry, enum kind kind) {
    uint64_t host = p->host_offset - p->head;
    for (uint32_t i = placement_clusters(s, p); i; i--, entry += 8, host += s->cluster_size) {
        if (kind == FRESH)
            qcow2_limbo_add_entry(s, be64_load(entry));
        be64_store(entry, host | QCOW2_COPIED);
    }
}

int qcow2_publish_co(struct node *n, const struct placement *p) {
    struct qcow2 *s = qcow2_of(n);
    struct qcow2_slice *slice = (struct qcow2_slice *)(uintptr_t)p->cookie[1];
    enum kind kind = cookie_kind(p);
    if (kind != IN_PLACE) {
        uint8_t *entry = qcow2_slice_modify(&s->cache, slice) + (size_t)(p->cookie[0] >> 8) * 8;
        if (kind == CODED) {
            qcow2_limbo_add_entry(s, be64_load(entry));
            be64_store(entry, qcow2_coded_encode(s->cluster_bits, p->host_offset, p->coded_length));
        } else {
            link_fresh(s, p, entry, kind);
        }
    }
    qcow2_slice_unpin(&s->cache, slice);
    qcow2_limbo_settle_co(s);
    return 0;
}

void qcow2_abandon(struct node *n, const struct placement *p) {
    struct qcow2 *s = qcow2_of(n);
    uint64_t first = qcow2_cluster_index(s, p->host_offset);
    if (cookie_kind(p) == FRESH)
        qcow2_release_or_limbo(s, first, placement_clusters(s, p));
    if (cookie_kind(p) == CODED)
        qcow2_release_or_limbo(
            s, first, qcow2_cluster_index(s, p->host_offset + p->coded_length - 1) - first + 1);
    qcow2_slice_unpin(&s->cache, (struct qcow2_slice *)(uintptr_t)p->cookie[1]);
}
