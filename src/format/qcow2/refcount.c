/* SPDX-License-Identifier: MIT */
/*
 * Reference counts: reading and changing them, allocation, giving back, limbo.
 *
 * The counts in memory (cached slices of refcount blocks) are the allocator's whole truth: a
 * cluster is free when its count is 0 or no block covers it.  A cluster is claimed by raising its
 * count in the same breath in which it was found free, so tasks need no lock among them: whoever
 * suspends to load a slice looks again afterwards.
 *
 *  1. No free cluster lies below free_cursor, except while a task is inside qcow2_alloc_co.
 *     Giving back lowers the cursor and counts in `releases`; an allocation raises it only when
 *     nothing was given back meanwhile.
 *  2. Clusters from virgin_from on have never been handed out and lie behind what was the file's
 *     end at open: on zero-initialised storage they read as zeros.
 *  3. coded_pos is 0 or lies in a cluster whose count is at least 1.
 *  4. A cluster that is about to be punched in the storage keeps its count until the punch has
 *     returned, so nobody can place data under the hole; and coded data no longer joins it.
 *
 * Clusters named by nothing on storage (failed writes) are given back at once.  All others pass
 * through limbo: the write-back that makes their dropping durable releases them (flush.c).
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/plant.h"
#include "disk/event.h"
#include "disk/io.h"
#include "format/qcow2/qcow2.h"

/* ---------------------------------------------------------------- single counts */

int qcow2_refcount_slice_co(struct qcow2 *s, uint64_t cluster, struct qcow2_slice **out,
                            uint32_t *index) {
    uint64_t bi = cluster >> s->block_bits;
    uint64_t block = bi < s->reftable_entries ? s->reftable[bi] & QCOW2_REFTABLE_MASK : 0;
    *out = NULL;
    if (!block)
        return 0;
    if (!is_aligned(block, s->cluster_size) || block >= QCOW2_HOST_LIMIT)
        return -EIO;
    uint32_t per_slice = s->cache.slice_bytes * 8 >> s->refcount_order;
    uint32_t in_block = (uint32_t)(cluster & (((uint64_t)1 << s->block_bits) - 1));
    uint32_t at = in_block / per_slice * s->cache.slice_bytes;
    *index = in_block & (per_slice - 1);
    *out = qcow2_cache_peek(&s->cache, block + at);
    if (*out)
        return 0;
    return qcow2_cache_get_co(&s->cache, QCOW2_SLICE_REFBLOCK, block + at, (uint32_t)bi,
                              s->cluster_size - at - s->cache.slice_bytes, out);
}

int qcow2_refcount_read_co(struct qcow2 *s, uint64_t cluster, uint64_t *out) {
    struct qcow2_slice *slice;
    uint32_t index;
    int r = qcow2_refcount_slice_co(s, cluster, &slice, &index);
    if (!r)
        *out = slice ? qcow2_refcount_get(slice->data, index, s->refcount_order) : 0;
    return r;
}

static void count_set(struct qcow2 *s, struct qcow2_slice *slice, uint32_t index, uint64_t value) {
    qcow2_refcount_set(qcow2_slice_modify(&s->cache, slice), index, s->refcount_order, value);
}

/* Claims a cluster whose count was found to be 0.  Returns whether it was never used (rule 2). */
static bool claim(struct qcow2 *s, uint64_t cluster, struct qcow2_slice *slice, uint32_t index) {
    count_set(s, slice, index, 1);
    if (cluster < s->virgin_from)
        return false;
    s->virgin_from = cluster + 1;
    s->end_grown = true;
    return true;
}

/* By its count, that is. */
static int metadata_is_free(struct qcow2 *s, uint64_t cluster) {
    qcow2_corrupt(s,
                  "the cluster at %" PRIu64 " holds metadata, and is free by its reference count",
                  cluster << s->cluster_bits);
    return -EIO;
}

static void drop_one(struct qcow2 *s, uint64_t cluster, struct qcow2_slice *slice, uint32_t index) {
    uint64_t count = qcow2_refcount_get(slice->data, index, s->refcount_order);
    if (!count)
        return;
    if (qcow2_is_meta(s, cluster << s->cluster_bits)) {
        /* A count that lies: nothing good comes of making it smaller. */
        if (count == 1)
            metadata_is_free(s, cluster);
        return;
    }
    if (PLANTED(CODED_FREED_WITH_NEIGHBOUR))
        count = 1;
    count_set(s, slice, index, count - 1);
    if (count > 1)
        return;
    s->releases++;
    s->free_cursor = min_u64(s->free_cursor, cluster);
    if (s->coded_pos && cluster == qcow2_cluster_index(s, s->coded_end - 1))
        s->coded_pos = 0;
}

int qcow2_release_co(struct qcow2 *s, uint64_t cluster, uint64_t count) {
    int ret = 0;
    disk_event_co(s->file, EVENT_cluster_free);
    for (uint64_t i = 0; i < count; i++) {
        struct qcow2_slice *slice;
        uint32_t index;
        int r = qcow2_refcount_slice_co(s, cluster + i, &slice, &index);
        if (!r && slice)
            drop_one(s, cluster + i, slice, index);
        ret = ret ? ret : r;
    }
    return ret;
}

void qcow2_release_or_limbo(struct qcow2 *s, uint64_t cluster, uint64_t count) {
    for (uint64_t i = 0; i < count; i++, cluster++) {
        uint64_t block = s->reftable[cluster >> s->block_bits] & QCOW2_REFTABLE_MASK;
        uint32_t per_slice = s->cache.slice_bytes * 8 >> s->refcount_order;
        uint32_t in_block = (uint32_t)(cluster & (((uint64_t)1 << s->block_bits) - 1));
        struct qcow2_slice *slice = qcow2_cache_peek(
            &s->cache, block + (uint64_t)(in_block / per_slice) * s->cache.slice_bytes);
        if (slice)
            drop_one(s, cluster, slice, in_block & (per_slice - 1));
        else
            qcow2_limbo_add(s, cluster, 1);
    }
}

/* ---------------------------------------------------------------- allocation */

/* First index in [index, end) whose count is 0, else end. */
static uint32_t find_free(const uint8_t *data, uint32_t index, uint32_t end, uint32_t order) {
    if (order == 4) {
        /* Four counts at a time while none of them is 0 (the usual "has a zero halfword"). */
        for (; index < end && index % 4; index++)
            if (!qcow2_refcount_get(data, index, order))
                return index;
        for (; index + 4 <= end; index += 4) {
            uint64_t v;
            memcpy(&v, data + (size_t)index * 2, sizeof(v));
            if ((v - UINT64_C(0x0001000100010001)) & ~v & UINT64_C(0x8000800080008000))
                break;
        }
    }
    while (index < end && qcow2_refcount_get(data, index, order))
        index++;
    return index;
}

struct search {
    uint64_t pos;   /* next cluster to look at */
    uint64_t start; /* first of the run claimed so far */
    uint64_t count;
    uint64_t want;
    bool virgin; /* all of the run was never used */
};

/* Claims what it can of one slice.  1: the search is over, 0: go on behind it. */
static int search_slice(struct qcow2 *s, struct search *q, struct qcow2_slice *slice,
                        uint32_t index) {
    uint32_t end = s->cache.slice_bytes * 8 >> s->refcount_order;
    if (!q->count) {
        uint32_t found = find_free(slice->data, index, end, s->refcount_order);
        q->pos += found - index;
        q->start = q->pos;
        index = found;
    }
    for (; index < end && q->count < q->want; index++, q->pos++, q->count++) {
        if (qcow2_refcount_get(slice->data, index, s->refcount_order))
            return 1;
        if (q->pos >= QCOW2_HOST_LIMIT >> s->cluster_bits)
            return q->count ? 1 : -EFBIG;
        if (qcow2_is_meta(s, q->pos << s->cluster_bits))
            return q->count ? 1 : metadata_is_free(s, q->pos);
        q->virgin &= claim(s, q->pos, slice, index);
    }
    return q->count == q->want;
}

/* From q->pos on: claims a run of up to q->want clusters. */
static int search_co(struct qcow2 *s, struct search *q) {
    q->count = 0;
    q->virgin = true;
    for (;;) {
        struct qcow2_slice *slice;
        uint32_t index;
        if (q->pos >= QCOW2_HOST_LIMIT >> s->cluster_bits)
            return q->count ? 0 : -EFBIG;
        int r = qcow2_refcount_slice_co(s, q->pos, &slice, &index);
        if (!r && !slice) {
            uint64_t releases = s->releases;
            if (q->count)
                return 0;
            r = qcow2_grow_block_co(s, q->pos >> s->block_bits);
            if (r < 0)
                return r;
            /* A new refcount table has freed the old one's clusters: those come first. */
            if (s->releases != releases)
                q->pos = min_u64(q->pos, s->free_cursor);
            continue;
        }
        if (!r)
            r = search_slice(s, q, slice, index);
        if (r)
            return r > 0 || q->count ? 0 : r;
    }
}

int qcow2_alloc_co(struct qcow2 *s, uint64_t want, bool exact, uint64_t *host, uint64_t *got,
                   bool *virgin) {
    struct search q = {.pos = s->free_cursor, .want = want};
    uint64_t releases = s->releases;
    bool first = true;
    disk_event_co(s->file, EVENT_cluster_alloc);
    /* Blocks of tiny clusters stand too close for a long table: it brings its own blocks along. */
    if (exact && want > ((uint64_t)1 << s->block_bits) / 2) {
        *got = want;
        *virgin = false;
        return qcow2_grow_area_co(s, want, host);
    }
    for (;;) {
        int r = search_co(s, &q);
        if (r < 0)
            return r;
        if (!exact || q.count == want)
            break;
        /* Too short for a table: given back, and the search goes on behind it. */
        r = qcow2_release_co(s, q.start, q.count);
        if (r < 0)
            return r;
        first = false;
    }
    if (first && releases == s->releases)
        s->free_cursor = max_u64(s->free_cursor, q.pos);
    *host = q.start << s->cluster_bits;
    *got = q.count;
    *virgin = s->reads_zero && q.virgin;
    return 0;
}

/* ---------------------------------------------------------------- coded data */

/* One more reference for the cluster that the cursor is in; false when the cursor cannot be used.*/
static int coded_join_co(struct qcow2 *s, bool *ok) {
    struct qcow2_slice *slice;
    uint32_t index;
    uint64_t pos = s->coded_pos;
    *ok = false;
    int r = qcow2_refcount_slice_co(s, qcow2_cluster_index(s, pos), &slice, &index);
    if (r < 0 || !slice || s->coded_pos != pos)
        return r;
    uint64_t count = qcow2_refcount_get(slice->data, index, s->refcount_order);
    if (!count || count >= s->refcount_max)
        return 0;
    count_set(s, slice, index, count + 1);
    *ok = true;
    return 0;
}

/* Claims exactly `cluster` when it is free. */
static int claim_at_co(struct qcow2 *s, uint64_t cluster, bool *ok) {
    struct qcow2_slice *slice;
    uint32_t index;
    *ok = false;
    int r = qcow2_refcount_slice_co(s, cluster, &slice, &index);
    if (r < 0 || !slice || qcow2_refcount_get(slice->data, index, s->refcount_order) ||
        cluster >= QCOW2_HOST_LIMIT >> s->cluster_bits)
        return r;
    if (qcow2_is_meta(s, cluster << s->cluster_bits))
        return metadata_is_free(s, cluster);
    claim(s, cluster, slice, index);
    *ok = true;
    return 0;
}

/* Behind the last coded data, when that is possible: *host 0 when not. */
static int coded_append_co(struct qcow2 *s, uint32_t length, uint64_t *host) {
    bool next = false, joined = false;
    uint64_t pos = s->coded_pos, end = s->coded_end;
    int r = 0;
    *host = 0;
    if (!pos || pos == end)
        return 0;
    if (length > end - pos) {
        r = claim_at_co(s, end >> s->cluster_bits, &next);
        if (r < 0 || !next)
            return r;
    }
    if (s->coded_pos == pos)
        r = coded_join_co(s, &joined);
    if (!joined) {
        if (next)
            qcow2_release_co(s, end >> s->cluster_bits, 1);
        return r;
    }
    *host = pos;
    s->coded_pos = pos + length;
    s->coded_end = next ? end + s->cluster_size : end;
    return 0;
}

int qcow2_alloc_coded_co(struct qcow2 *s, uint32_t length, uint64_t *host) {
    bool virgin;
    uint64_t got;
    task_mutex_lock_co(&s->coded_lock);
    int r = coded_append_co(s, length, host);
    if (!r && !*host) {
        r = qcow2_alloc_co(s, 1, true, host, &got, &virgin);
        if (!r) {
            s->coded_pos = *host + length;
            s->coded_end = *host + s->cluster_size;
        }
    }
    if (!r)
        s->coded_used = true;
    task_mutex_unlock(&s->coded_lock);
    return r;
}

/* ---------------------------------------------------------------- limbo */

void qcow2_limbo_add(struct qcow2 *s, uint64_t cluster, uint64_t count) {
    struct qcow2_limbo *l = &s->limbo;
    if (l->count) {
        struct qcow2_limbo_run *last = &l->runs[l->count - 1];
        if (last->cluster + last->count == cluster) {
            last->count += count;
            return;
        }
    }
    if (l->count == l->cap) {
        size_t cap = l->cap ? l->cap * 2 : 64;
        struct qcow2_limbo_run *runs = realloc(l->runs, cap * sizeof(*runs));
        if (!runs)
            return; /* a leak, not damage */
        l->runs = runs;
        l->cap = cap;
    }
    l->runs[l->count++] = (struct qcow2_limbo_run){cluster, count};
}

void qcow2_limbo_add_entry(struct qcow2 *s, struct qcow2_l2e e) {
    uint64_t entry = e.value;
    if (qcow2_data_apart(s))
        return; /* the clusters of a data file are not counted */
    if (entry & QCOW2_COMPRESSED) {
        uint64_t host;
        uint32_t length;
        qcow2_coded_decode(s->cluster_bits, entry, &host, &length);
        uint64_t first = qcow2_cluster_index(s, host);
        qcow2_limbo_add(s, first, qcow2_cluster_index(s, host + length - 1) - first + 1);
    } else if (entry & QCOW2_OFFSET_MASK) {
        qcow2_limbo_add(s, qcow2_cluster_index(s, entry & QCOW2_OFFSET_MASK), 1);
    }
}

/* Length of the run from `cluster` whose counts are all exactly 1: they are about to be free. */
static uint64_t last_references_co(struct qcow2 *s, uint64_t cluster, uint64_t count) {
    uint64_t n = 0, refs;
    while (n < count && !qcow2_refcount_read_co(s, cluster + n, &refs) && refs == 1 &&
           !qcow2_is_meta(s, (cluster + n) << s->cluster_bits))
        n++;
    return n;
}

static void release_run_co(struct qcow2 *s, uint64_t cluster, uint64_t count) {
    bool unmap = s->node->flags & NODE_UNMAP;
    uint64_t coded = s->coded_pos ? qcow2_cluster_index(s, s->coded_end - 1) : 0;
    if (unmap && coded >= cluster && coded - cluster < count)
        s->coded_pos = 0; /* rule 4, before the counts are looked at */
    while (count) {
        uint64_t n = unmap ? last_references_co(s, cluster, count) : count;
        if (PLANTED(PUNCH_AFTER_FREE) && n)
            qcow2_release_co(s, cluster, n);
        if (n && unmap) /* only a hint: errors do not matter */
            disk_discard_co(s->file, cluster << s->cluster_bits, n << s->cluster_bits);
        n = max_u64(n, 1);
        if (!PLANTED(PUNCH_AFTER_FREE) || !unmap)
            qcow2_release_co(s, cluster, n); /* -EIO: a leak */
        cluster += n;
        count -= n;
    }
}

void qcow2_limbo_release_co(struct qcow2 *s, struct qcow2_limbo *l) {
    for (size_t i = 0; i < l->count; i++)
        release_run_co(s, l->runs[i].cluster, l->runs[i].count);
    qcow2_limbo_free(l);
}

void qcow2_limbo_settle_co(struct qcow2 *s) {
    if ((qcow2_ordered(s) && !PLANTED(FREE_BEFORE_UNLINK)) || s->settling)
        return;
    s->settling = true;
    while (s->limbo.count) {
        struct qcow2_limbo l = s->limbo;
        s->limbo = (struct qcow2_limbo){0};
        qcow2_limbo_release_co(s, &l);
    }
    s->settling = false;
}

void qcow2_limbo_free(struct qcow2_limbo *l) {
    free(l->runs);
    *l = (struct qcow2_limbo){0};
}
