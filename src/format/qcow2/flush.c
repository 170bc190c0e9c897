/* SPDX-License-Identifier: MIT */
/*
 * The ordered write-back of everything dirty.
 *
 * A write-back is a picture of memory at one instant: dirty slices are frozen (later changes go to
 * a copy, cache.h rule 3), and the dirty parts of the L1 and refcount tables are copied.  Every
 * mapping in that picture was published before, so its data was written before and its clusters
 * were counted before.  Then, with a barrier behind each step that wrote something that the next
 * one relies on:
 *
 *  1. refcount blocks, and slices of L2 tables that nothing on storage names yet.
 *     Barrier: with it the data of all published mappings is durable too.
 *     A crash before the barrier leaves counts too high at most: leaks.
 *  2. entries of the refcount table that name new blocks.  Barrier.
 *     Before it the new blocks are unknown, and so is everything that they count.
 *  3. slices of L2 tables that storage names, and L1 entries.  Barrier.
 *     Before it guest ranges read as they did at the last write-back, or as they do now.
 *  4. What had been dropped before the picture was taken is named by nothing on storage any more:
 *     it leaves limbo.  The lower counts are written next time; until then they leak at most.
 *
 * Counts that were raised after the picture may be missing on storage: the mappings that need them
 * are not in the picture.  Lower ones than in the picture do not exist: see limbo.
 *
 * An external data file is flushed first of all, when the picture has been taken: what its mappings
 * name was written before.  Step 3 relies on it as on the first barrier.
 *
 * When nothing is dirty, one barrier is all (with a data file: one each).  Where barriers mean
 * nothing (cache unsafe, throw-away overlays) the steps are writes alone.
 *
 * One write-back runs at a time (wb_lock).  Those who ask while one runs share the next.  A failed
 * one makes everything dirty again, and whoever asks next tries again.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/iov.h"
#include "base/plant.h"
#include "disk/event.h"
#include "disk/io.h"
#include "format/qcow2/qcow2.h"

/* Limbo this long asks for a write-back by itself (runs of 16 bytes). */
#define LIMBO_RUNS_MAX 65536

/* 64 entries of a top-level table as they were, with their dirty bits: one sector. */
struct sector {
    uint32_t index;
    uint64_t dirty;
    uint8_t bytes[512];
};
struct sectors {
    struct sector *v;
    size_t count;
};

struct picture {
    struct list refblocks, fresh, reachable; /* frozen slices */
    struct sectors l1, reftable;
    struct qcow2_limbo limbo;
};

/* ---------------------------------------------------------------- the picture */

static int sectors_take(const uint64_t *table, uint32_t entries, uint64_t *dirty, uint32_t *count,
                        struct sectors *out) {
    size_t words = div_up(entries, 64), n = 0;
    *out = (struct sectors){0};
    if (!*count)
        return 0;
    for (size_t w = 0; w < words; w++)
        n += dirty[w] != 0;
    out->v = malloc(n * sizeof(*out->v));
    if (!out->v)
        return -ENOMEM;
    for (size_t w = 0; w < words; w++) {
        if (!dirty[w])
            continue;
        struct sector *x = &out->v[out->count++];
        x->index = (uint32_t)w;
        x->dirty = dirty[w];
        memset(x->bytes, 0, sizeof(x->bytes));
        for (uint32_t i = 0; i < 64 && w * 64 + i < entries; i++)
            be64_store(x->bytes + (size_t)i * 8, table[w * 64 + i]);
        dirty[w] = 0;
    }
    *count = 0;
    return 0;
}

static void sectors_put(struct sectors *x, uint64_t *dirty, uint32_t *count, bool ok) {
    for (size_t i = 0; !ok && i < x->count; i++) {
        uint64_t fresh = x->v[i].dirty & ~dirty[x->v[i].index];
        dirty[x->v[i].index] |= fresh;
        *count += (uint32_t)__builtin_popcountll(fresh);
    }
    free(x->v);
}

static int picture_take(struct qcow2 *s, struct picture *p) {
    struct list frozen;
    list_init(&frozen);
    list_init(&p->refblocks);
    list_init(&p->fresh);
    list_init(&p->reachable);
    p->limbo = (struct qcow2_limbo){0};
    /* Which tables storage does not name yet, before the bits that say so are taken. */
    qcow2_cache_freeze(&s->cache, false, &frozen);
    for (struct list *it; (it = list_pop_front(&frozen));) {
        struct qcow2_slice *x = list_entry(it, struct qcow2_slice, frozen_link);
        struct list *to = &p->refblocks;
        if (x->kind == QCOW2_SLICE_L2)
            to = s->l1_dirty[x->table / 64] >> x->table % 64 & 1 ? &p->fresh : &p->reachable;
        list_push_back(to, &x->frozen_link);
    }
    int r = sectors_take(s->reftable, s->reftable_entries, s->reftable_dirty,
                         &s->reftable_dirty_count, &p->reftable);
    int r2 = sectors_take(s->l1, s->l1_entries, s->l1_dirty, &s->l1_dirty_count, &p->l1);
    p->limbo = s->limbo;
    s->limbo = (struct qcow2_limbo){0};
    return r ? r : r2;
}

static void thaw(struct qcow2 *s, struct list *frozen, bool ok) {
    list_for_each_safe(it, next, frozen)
        qcow2_cache_thaw(&s->cache, list_entry(it, struct qcow2_slice, frozen_link), ok);
}

static void limbo_merge(struct qcow2 *s, struct qcow2_limbo *back) {
    for (size_t i = 0; i < back->count; i++)
        qcow2_limbo_add(s, back->runs[i].cluster, back->runs[i].count);
    qcow2_limbo_free(back);
}

/* Ends the picture.  Limbo stays with the caller when all went well. */
static void picture_put(struct qcow2 *s, struct picture *p, bool ok) {
    thaw(s, &p->refblocks, ok);
    thaw(s, &p->fresh, ok);
    thaw(s, &p->reachable, ok);
    sectors_put(&p->reftable, s->reftable_dirty, &s->reftable_dirty_count, ok);
    sectors_put(&p->l1, s->l1_dirty, &s->l1_dirty_count, ok);
    if (!ok)
        limbo_merge(s, &p->limbo);
}

/* ---------------------------------------------------------------- writing */

static int by_host(const void *a, const void *b) {
    const struct qcow2_slice *x = *(struct qcow2_slice *const *)a;
    const struct qcow2_slice *y = *(struct qcow2_slice *const *)b;
    return x->host < y->host ? -1 : x->host > y->host;
}

/* Each slice lies in a cluster that holds a table of its kind. */
static int check_places(struct qcow2 *s, struct qcow2_slice *const *v, size_t n) {
    for (size_t i = 0; i < n; i++) {
        bool l2 = v[i]->kind == QCOW2_SLICE_L2;
        if (qcow2_meta_is(s, v[i]->host, l2 ? QCOW2_META_L2 : QCOW2_META_REFBLOCK))
            continue;
        qcow2_corrupt(s, "%s is to be written at %" PRIu64 ", where it does not belong",
                      l2 ? "an L2 table" : "a refcount block", v[i]->host);
        return -EIO;
    }
    return 0;
}

/* Writes frozen slices, neighbours by one request. */
static int write_slices_co(struct qcow2 *s, struct list *frozen, enum disk_event event) {
    size_t n = 0, i = 0;
    list_for_each(it, frozen) n++;
    if (!n)
        return 0;
    AUTO_FREE struct qcow2_slice **v = malloc(n * sizeof(*v));
    if (!v)
        return -ENOMEM;
    list_for_each(it, frozen) v[i++] = list_entry(it, struct qcow2_slice, frozen_link);
    qsort(v, n, sizeof(*v), by_host);
    int r = check_places(s, v, n);
    for (i = 0; !r && i < n;) {
        struct iovec iov[IOV_MAX_STRATA];
        int k = 0;
        uint64_t host = v[i]->host, end = host;
        for (; i < n && k < IOV_MAX_STRATA && v[i]->host == end; i++, k++) {
            iov[k] = (struct iovec){v[i]->frozen_data, s->cache.slice_bytes};
            end += s->cache.slice_bytes;
        }
        disk_event_co(s->file, event);
        r = disk_pwritev_co(s->file, host, end - host, iov, k, 0);
    }
    return r;
}

static int write_sectors_co(struct qcow2 *s, uint64_t table, const struct sectors *x,
                            enum disk_event event) {
    int r = 0;
    for (size_t i = 0; !r && i < x->count;) {
        struct iovec iov[IOV_MAX_STRATA];
        int k = 0;
        size_t first = i;
        while (i < x->count && k < IOV_MAX_STRATA && x->v[i].index == x->v[first].index + k) {
            iov[k++] = (struct iovec){x->v[i].bytes, 512};
            i++;
        }
        disk_event_co(s->file, event);
        r = disk_pwritev_co(s->file, table + (uint64_t)x->v[first].index * 512, (uint64_t)k * 512,
                            iov, k, 0);
    }
    return r;
}

static int barrier_co(struct qcow2 *s) {
    return qcow2_ordered(s) ? disk_flush_co(s->file) : 0;
}

static int data_barrier_co(struct qcow2 *s) {
    if (PLANTED(DATA_FILE_NOT_FLUSHED))
        return 0;
    return qcow2_data_apart(s) && s->data && qcow2_ordered(s) ? disk_flush_co(s->data) : 0;
}

static int picture_write_co(struct qcow2 *s, struct picture *p) {
    bool third = !list_empty(&p->reachable) || p->l1.count;
    int r =
        PLANTED(REFCOUNTS_LAST) ? 0 : write_slices_co(s, &p->refblocks, EVENT_refblock_update_part);
    if (!r && !PLANTED(L1_BEFORE_L2))
        r = write_slices_co(s, &p->fresh, EVENT_l2_alloc_write);
    if (!r && (p->reftable.count || third) && !PLANTED(NO_BARRIER_BEFORE_TABLES))
        r = barrier_co(s);
    if (!r && p->reftable.count) {
        r = write_sectors_co(s, s->h.refcount_table_offset, &p->reftable, EVENT_reftable_update);
        if (!r && third && !PLANTED(NO_BARRIER_AFTER_REFTABLE))
            r = barrier_co(s);
    }
    if (!r)
        r = write_slices_co(s, &p->reachable, EVENT_l2_update);
    if (!r && PLANTED(L1_BEFORE_L2))
        r = write_slices_co(s, &p->fresh, EVENT_l2_alloc_write);
    if (!r && !PLANTED(FLUSH_FORGETS_L1))
        r = write_sectors_co(s, s->h.l1_table_offset, &p->l1, EVENT_l1_update);
    if (!r && PLANTED(REFCOUNTS_LAST)) {
        r = barrier_co(s);
        if (!r)
            r = write_slices_co(s, &p->refblocks, EVENT_refblock_update_part);
    }
    return r || PLANTED(NO_LAST_BARRIER) ? r : barrier_co(s);
}

/* wb_lock is held. */
static int writeback_locked_co(struct qcow2 *s) {
    struct picture p;
    int r = picture_take(s, &p);
    if (!r && !PLANTED(DATA_FILE_AFTER_TABLES))
        r = data_barrier_co(s);
    if (!r)
        r = picture_write_co(s, &p);
    if (!r && PLANTED(DATA_FILE_AFTER_TABLES))
        r = data_barrier_co(s);
    picture_put(s, &p, !r);
    if (!r)
        qcow2_limbo_release_co(s, &p.limbo);
    return r;
}

int qcow2_flush_co(struct node *n) {
    struct qcow2 *s = qcow2_of(n);
    uint64_t ticket = s->wb_started + 1; /* the next one to begin sees all that is dirty now */
    int r = 0;
    task_mutex_lock_co(&s->wb_lock);
    if (s->wb_done < ticket) {
        uint64_t mine = ++s->wb_started;
        r = writeback_locked_co(s);
        if (!r)
            s->wb_done = mine;
    }
    task_mutex_unlock(&s->wb_lock);
    if (s->corrupt)
        qcow2_corrupt_store_co(s);
    return r;
}

static bool anything_dirty(const struct qcow2 *s) {
    return s->cache.dirty_count || s->l1_dirty_count || s->reftable_dirty_count || s->limbo.count;
}

int qcow2_writeback_all_co(struct qcow2 *s) {
    int r = 0;
    /* What limbo releases is dirty again, and releases nothing more. */
    for (int i = 0; !r && i < 3 && anything_dirty(s); i++)
        r = qcow2_flush_co(s->node);
    return r;
}

int qcow2_make_room_co(struct qcow2 *s) {
    if (s->corrupt)
        return qcow2_corrupt_store_co(s);
    if (qcow2_cache_crowded(&s->cache) || s->limbo.count > LIMBO_RUNS_MAX)
        return qcow2_flush_co(s->node);
    return 0;
}

int qcow2_write_refblocks_co(struct qcow2 *s) {
    struct list frozen;
    list_init(&frozen);
    qcow2_cache_freeze(&s->cache, true, &frozen);
    int r = write_slices_co(s, &frozen, EVENT_refblock_update_part);
    thaw(s, &frozen, !r);
    return r;
}

int qcow2_table_write_co(struct qcow2 *s, uint64_t host, const uint64_t *entries, uint64_t count,
                         uint64_t bytes) {
    size_t piece = (size_t)min_u64(bytes, 256 * KIB);
    uint8_t *buf = buf_get(piece);
    int r = buf ? 0 : -ENOMEM;
    for (uint64_t at = 0; !r && at < bytes; at += piece) {
        size_t n = (size_t)min_u64(piece, bytes - at);
        for (size_t i = 0; i < n; i += 8)
            be64_store(buf + i, (at + i) / 8 < count ? entries[(at + i) / 8] : 0);
        r = disk_pwrite_co(s->file, host + at, buf, n);
    }
    buf_put(buf, piece);
    return r;
}
