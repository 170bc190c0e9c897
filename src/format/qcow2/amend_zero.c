/* SPDX-License-Identifier: MIT */
/*
 * What version 2 cannot say: clusters with the zero flag, made holes or data; and the search for
 * compressed clusters.
 *
 *      entry was                      no layer below     a layer below
 *      zero, no room                  hole               fresh cluster of zeros
 *      zero with room of its own      its room, zeroed   its room, zeroed
 *      zero with room shared          hole               fresh cluster of zeros
 *
 * The active tables go through the cache like every other change, so flush.c brings zeros and
 * counts to storage before the entries that name them, and what was dropped waits in limbo.  A
 * table shared with a snapshot is copied first.
 *
 * Tables that only snapshots name are not in the cache.  They are changed where they lie, table by
 * table: fresh clusters are counted as often as the table is, and made stable with their zeros;
 * then the table is written, and made stable; then what it named before is given back as often.
 * Each entry lies within one sector, so a power cut leaves it old or new, and both read as zeros.
 *
 * Images with subclusters or a data file of their own never come here: version 2 has neither.
 *
 * All that happens while the header still says version 3, so that a crash leaves a disk that reads
 * the same, with leaks at most.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"
#include "format/qcow2/amend.h"

/* ---------------------------------------------------------------- walking */

int qcow2_amend_snapshot_co(struct qcow2 *s, uint64_t *at, struct qcow2_amend_snapshot *out,
                            struct err *e) {
    uint8_t b[56]; /* fixed part, and the extra data that version 3 wants */
    int r = disk_pread_co(s->file, *at, b, sizeof(b));
    if (r < 0)
        return err_errno(e, -r, "reading the snapshot table at %" PRIu64, *at);
    uint32_t extra = be32_load(b + 36);
    uint64_t length = align_up(40 + (uint64_t)be16_load(b + 12) + be16_load(b + 14) + extra, 8);
    *out = (struct qcow2_amend_snapshot){
        .l1_host = be64_load(b),
        .l1_entries = be32_load(b + 8),
        .extra = extra,
        .vm_state = extra >= 8 ? be64_load(b + 40) : be32_load(b + 32),
        .disk_size = extra >= 16 ? be64_load(b + 48) : s->h.size,
    };
    if (length > MIB || (uint64_t)out->l1_entries * 8 > QCOW2_L1_BYTES_MAX ||
        out->l1_host >= QCOW2_HOST_LIMIT || !is_aligned(out->l1_host, s->cluster_size))
        return err_set(e, EIO, "snapshot table: the entry at %" PRIu64 " is damaged", *at);
    *at += length;
    return 0;
}

struct walk {
    /* A table's bytes in buf; > 0 ends the walk. */
    int (*table_co)(struct walk *w, uint64_t host);
    struct qcow2 *s;
    struct qcow2_amend_progress *progress; /* may be NULL */
    uint8_t *buf;                          /* one cluster */
    uint64_t *fresh;                       /* expand: places made ready, one an entry */
    bool found;
    struct err *e;
};

static int walk_l1_co(struct walk *w, uint64_t l1_host, uint32_t entries) {
    uint64_t part[64];
    int r = 0;
    for (uint32_t i = 0; !r && i < entries; i++) {
        if (i % 64 == 0)
            r = disk_pread_co(w->s->file, l1_host + (uint64_t)i * 8, part,
                              min_u64(64, entries - i) * 8);
        uint64_t host = r ? 0 : be64_load(&part[i % 64]) & QCOW2_OFFSET_MASK;
        if (w->progress)
            qcow2_amend_step(w->progress, 1);
        if (!host)
            continue;
        r = is_aligned(host, w->s->cluster_size)
                ? disk_pread_co(w->s->file, host, w->buf, w->s->cluster_size)
                : -EIO;
        if (!r)
            r = w->table_co(w, host);
    }
    return r;
}

static int walk_snapshots_co(struct walk *w) {
    uint64_t at = w->s->h.snapshots_offset;
    int r = 0;
    for (uint32_t i = 0; !r && i < w->s->h.nb_snapshots; i++) {
        struct qcow2_amend_snapshot x;
        r = qcow2_amend_snapshot_co(w->s, &at, &x, w->e);
        if (!r)
            r = walk_l1_co(w, x.l1_host, x.l1_entries);
    }
    return r;
}

static int look_for_coded_co(struct walk *w, uint64_t host) {
    for (uint32_t at = 0; at < w->s->cluster_size; at += 8)
        if (be64_load(w->buf + at) & QCOW2_COMPRESSED) {
            w->found = true;
            return 1;
        }
    return 0;
}

int qcow2_find_coded_co(struct qcow2 *s, bool *coded, struct err *e) {
    struct walk w = {
        .table_co = look_for_coded_co, .s = s, .buf = buf_get(s->cluster_size), .e = e};
    int r = w.buf ? walk_l1_co(&w, s->h.l1_table_offset, s->l1_entries) : -ENOMEM;
    if (!r)
        r = walk_snapshots_co(&w);
    buf_put(w.buf, s->cluster_size);
    *coded = w.found;
    return r < 0 ? err_errno(e, -r, "looking for compressed clusters") : 0;
}

/* ---------------------------------------------------------------- room that reads as zeros */

/* Up to `want` fresh clusters of zeros, their counts 1; the file reaches behind them. */
static int fresh_zeros_co(struct qcow2 *s, uint64_t want, uint64_t *host, uint64_t *got) {
    bool virgin;
    int r = qcow2_alloc_co(s, want, false, host, got, &virgin);
    if (r < 0)
        return r;
    uint64_t bytes = *got << s->cluster_bits;
    if (*host + bytes > s->file->size)
        r = disk_resize_co(s->file, *host + bytes, PREALLOC_OFF, NULL);
    if (!r && !virgin)
        r = disk_zero_co(s->file, *host, bytes, 0);
    if (r < 0)
        qcow2_release_or_limbo(s, qcow2_cluster_index(s, *host), *got);
    return r;
}

/* ---------------------------------------------------------------- active tables */

enum work { KEEP, TO_HOLE, TO_FRESH, TO_OWN };

static enum work work_of(const struct qcow2 *s, uint64_t entry, bool active) {
    enum qcow2_cluster_kind kind = qcow2_classify(3, s->cluster_bits, entry);
    if (kind != QCOW2_CLUSTER_ZERO && kind != QCOW2_CLUSTER_ZERO_ALLOC)
        return KEEP;
    if (active && kind == QCOW2_CLUSTER_ZERO_ALLOC && entry & QCOW2_COPIED)
        return TO_OWN;
    return qcow2_has_backing(s) ? TO_FRESH : TO_HOLE;
}

/* Entries from `index` that want the same work; with room, as far as it is contiguous. */
static uint32_t run_of(const struct qcow2 *s, const uint8_t *data, uint32_t index, uint32_t end,
                       enum work *work) {
    uint64_t host = be64_load(data + (size_t)index * 8) & QCOW2_OFFSET_MASK;
    uint32_t n = 0;
    *work = work_of(s, be64_load(data + (size_t)index * 8), true);
    for (; index + n < end; n++, host += s->cluster_size) {
        uint64_t entry = be64_load(data + (size_t)(index + n) * 8);
        if (work_of(s, entry, true) != *work ||
            (*work == TO_OWN && (entry & QCOW2_OFFSET_MASK) != host))
            break;
    }
    return n;
}

/* The run of `n` entries from `index` of the slice for `guest`; *n may come back smaller. */
static int expand_run_co(struct qcow2 *s, uint64_t guest, uint32_t index, enum work work,
                         uint64_t host, uint32_t *n) {
    struct qcow2_slice *slice;
    uint32_t unused;
    uint64_t got = *n;
    int r = qcow2_make_room_co(s);
    if (!r && work == TO_FRESH)
        r = fresh_zeros_co(s, *n, &host, &got);
    if (!r && work == TO_OWN)
        r = qcow2_is_meta(s, host)
                ? -EIO
                : disk_zero_co(s->file, host, (uint64_t)*n << s->cluster_bits, 0);
    if (r < 0)
        return r;
    *n = (uint32_t)got;
    r = qcow2_l2_slice_writable_co(s, guest, &slice, &unused);
    if (r < 0) {
        if (work == TO_FRESH)
            qcow2_release_or_limbo(s, qcow2_cluster_index(s, host), got);
        return r;
    }
    uint8_t *p = qcow2_slice_modify(&s->cache, slice) + (size_t)index * 8;
    for (uint32_t i = 0; i < *n; i++, p += 8, host += s->cluster_size) {
        if (work != TO_OWN)
            qcow2_limbo_add_entry(s, (struct qcow2_l2e){be64_load(p), 0});
        be64_store(p, work == TO_HOLE ? 0 : host | QCOW2_COPIED);
    }
    return 0;
}

static int expand_slice_co(struct qcow2 *s, uint64_t guest) {
    uint32_t per_slice = (uint32_t)1 << s->slice_bits;
    for (uint32_t i = 0; i < per_slice;) {
        struct qcow2_slice *slice;
        uint32_t first;
        enum work work;
        int r = qcow2_l2_slice_co(s, guest, &slice, &first);
        if (r < 0 || !slice)
            return r;
        uint32_t n = run_of(s, slice->data, i, per_slice, &work);
        uint64_t host = be64_load(slice->data + (size_t)i * 8) & QCOW2_OFFSET_MASK;
        if (work != KEEP && (r = expand_run_co(s, guest, i, work, host, &n)) < 0)
            return r;
        i += n;
    }
    return 0;
}

static int expand_active_co(struct qcow2 *s, struct qcow2_amend_progress *p) {
    uint64_t span = (uint64_t)1 << (s->slice_bits + s->cluster_bits);
    uint64_t slices = (uint64_t)1 << (s->l2_bits - s->slice_bits);
    int r = 0;
    for (uint64_t i1 = 0; !r && i1 < s->l1_entries; i1++) {
        uint64_t guest = i1 << (s->cluster_bits + s->l2_bits);
        for (uint64_t k = 0; !r && s->l1[i1] & QCOW2_OFFSET_MASK && k < slices; k++, guest += span)
            r = expand_slice_co(s, guest);
        qcow2_limbo_settle_co(s);
        qcow2_amend_step(p, 1);
    }
    return r ? r : qcow2_writeback_all_co(s);
}

/* ---------------------------------------------------------------- tables of snapshots */

/* Raises the counts of fresh clusters from 1. */
static int raise_co(struct qcow2 *s, uint64_t cluster, uint64_t count, uint64_t to) {
    for (uint64_t i = 0; to > 1 && i < count; i++) {
        struct qcow2_slice *slice;
        uint32_t index;
        int r = qcow2_refcount_slice_co(s, cluster + i, &slice, &index);
        if (r < 0 || !slice)
            return r ? r : -EIO;
        qcow2_refcount_set(qcow2_slice_modify(&s->cache, slice), index, s->refcount_order, to);
    }
    return 0;
}

/* fresh[]: a place for each entry that needs one. */
static int fresh_for_table_co(struct walk *w, uint64_t names, bool *any) {
    struct qcow2 *s = w->s;
    uint32_t entries = s->cluster_size / 8, want = 0;
    int r = 0;
    *any = false;
    for (uint32_t i = 0; i < entries; i++) {
        enum work work = work_of(s, be64_load(w->buf + (size_t)i * 8), false);
        w->fresh[i] = 0;
        *any |= work != KEEP;
        want += work == TO_FRESH;
    }
    for (uint32_t i = 0; !r && want;) {
        uint64_t host, got;
        r = fresh_zeros_co(s, want, &host, &got);
        if (!r)
            r = raise_co(s, qcow2_cluster_index(s, host), got, names);
        for (want -= r ? 0 : (uint32_t)got; !r && got; i++) {
            if (work_of(s, be64_load(w->buf + (size_t)i * 8), false) != TO_FRESH)
                continue;
            w->fresh[i] = host;
            host += s->cluster_size;
            got--;
        }
    }
    return r;
}

static int expand_table_co(struct walk *w, uint64_t host) {
    struct qcow2 *s = w->s;
    uint64_t names = 0;
    bool any = false;
    int r = qcow2_refcount_read_co(s, qcow2_cluster_index(s, host), &names);
    if (!r && qcow2_is_meta(s, host))
        return 0; /* active as well, and done */
    if (!r)
        r = fresh_for_table_co(w, names, &any);
    if (r < 0 || !any)
        return r;
    r = qcow2_writeback_all_co(s); /* zeros and counts */
    for (uint32_t i = 0; !r && i < s->cluster_size / 8; i++) {
        uint8_t *p = w->buf + (size_t)i * 8;
        uint64_t entry = be64_load(p);
        if (work_of(s, entry, false) == KEEP)
            continue;
        for (uint64_t k = 0; k < names && entry & QCOW2_OFFSET_MASK; k++)
            qcow2_limbo_add_entry(s, (struct qcow2_l2e){entry, 0});
        be64_store(p, w->fresh[i]);
    }
    if (!r)
        r = disk_pwrite_co(s->file, host, w->buf, s->cluster_size);
    if (!r && qcow2_ordered(s))
        r = disk_flush_co(s->file);
    if (r < 0)
        qcow2_limbo_free(&s->limbo); /* storage may still name them: a leak */
    return r ? r : qcow2_writeback_all_co(s);
}

static int expand_snapshots_co(struct qcow2 *s, struct qcow2_amend_progress *p, struct err *e) {
    struct walk w = {.table_co = expand_table_co,
                     .s = s,
                     .progress = p,
                     .buf = buf_get(s->cluster_size),
                     .fresh = buf_get(s->cluster_size),
                     .e = e};
    int r = w.buf && w.fresh ? walk_snapshots_co(&w) : -ENOMEM;
    buf_put(w.buf, s->cluster_size);
    buf_put(w.fresh, s->cluster_size);
    return r;
}

int qcow2_expand_zeros_co(struct qcow2 *s, struct qcow2_amend_progress *p, struct err *e) {
    int r = expand_active_co(s, p);
    if (!r)
        r = expand_snapshots_co(s, p, e);
    return r < 0 ? err_errno(e, -r, "turning zero clusters into data") : 0;
}
