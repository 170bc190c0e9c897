/* SPDX-License-Identifier: MIT */
/*
 * A shift's frame: beginning, room, the switch, the end.  See shift.h.
 */
#include "format/qcow2/shift.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/plant.h"
#include "disk/io.h"

/* The storage is told to begin its writing each time this much has gathered. */
#define WRITEBACK_BYTES (32 * MIB)

/* ---------------------------------------------------------------- begin */

static struct shift_header header_now(const struct qcow2 *s) {
    return (struct shift_header){.size = s->h.size,
                                 .l1_entries = s->l1_entries,
                                 .l1_offset = s->h.l1_table_offset,
                                 .reftable_offset = s->h.refcount_table_offset,
                                 .reftable_clusters = s->h.refcount_table_clusters,
                                 .nb_snapshots = s->h.nb_snapshots,
                                 .snapshots_offset = s->h.snapshots_offset};
}

int shift_begin_co(struct shift *t, struct qcow2 *s, struct err *e) {
    *t = (struct shift){.s = s, .e = e, .file_size = UINT64_MAX};
    int r = qcow2_writeback_all_co(s);
    if (s->corrupt)
        return err_set(e, EIO, "damage was met in this image: it accepts no more changes");
    if (!r && (s->cache.dirty_count || s->l1_dirty_count || s->reftable_dirty_count))
        r = -EIO;
    if (r < 0)
        return err_errno(e, -r, "writing the metadata back");
    t->next = header_now(s);
    t->file_size = s->file->size;
    t->file_clusters = qcow2_clusters_for(s, s->file->size) + 1;
    if (t->file_clusters >= COUNTS_CLUSTERS_MAX)
        return err_set(e, EFBIG, "the file has %" PRIu64 " clusters, above the limit of %" PRIu64,
                       t->file_clusters, COUNTS_CLUSTERS_MAX - 1);
    r = counts_init(&t->come, COUNTS_CLUSTERS_MAX);
    if (!r)
        r = counts_init(&t->go, COUNTS_CLUSTERS_MAX);
    t->once = calloc(t->file_clusters / 64 + 1, 8);
    t->in = buf_get(SHIFT_BUF_BYTES);
    t->out = buf_get(SHIFT_BUF_BYTES);
    if (r < 0 || !t->once || !t->in || !t->out)
        return err_set(e, ENOMEM, "no memory to change the image's tables");
    return 0;
}

/* ---------------------------------------------------------------- room */

int shift_runs_add(struct shift_runs *r, uint64_t cluster, uint64_t count) {
    if (r->count && r->v[r->count - 1].cluster + r->v[r->count - 1].count == cluster) {
        r->v[r->count - 1].count += count;
        return 0;
    }
    if (r->count == r->cap) {
        size_t cap = r->cap ? r->cap * 2 : 64;
        struct shift_run *v = realloc(r->v, cap * sizeof(*v));
        if (!v)
            return -ENOMEM;
        r->v = v;
        r->cap = cap;
    }
    r->v[r->count++] = (struct shift_run){cluster, count};
    return 0;
}

/* Takes exactly these clusters. */
static int take(struct shift *t, uint64_t cluster, uint64_t count, uint64_t names) {
    struct qcow2 *s = t->s;
    for (uint64_t i = 0; i < count; i++) {
        if (!qcow2_is_meta(s, (cluster + i) << s->cluster_bits))
            continue;
        err_set(t->e, EIO,
                "the cluster at offset %" PRIu64 " holds metadata and is counted as free",
                (cluster + i) << s->cluster_bits);
        err_hint(t->e, "the image is damaged: 'strata check' tells how");
        return -EIO;
    }
    if (shift_runs_add(&t->fresh, cluster, count) < 0 ||
        qcow2_meta_add(s, cluster << s->cluster_bits, count << s->cluster_bits) < 0 ||
        counts_add(&t->come, cluster, count, names) < 0)
        return err_set(t->e, ENOMEM, "no memory for new tables");
    return 0;
}

static int take_at_end(struct shift *t, uint64_t count, uint64_t names, uint64_t *cluster) {
    *cluster = t->end;
    if (count >= COUNTS_CLUSTERS_MAX - t->end ||
        t->end + count > QCOW2_HOST_LIMIT >> t->s->cluster_bits)
        return err_set(t->e, EFBIG, "no room for %" PRIu64 " clusters of tables below the limit",
                       count);
    int r = take(t, t->end, count, names);
    t->end += r ? 0 : count;
    return r;
}

int shift_room_some(struct shift *t, uint64_t want, uint64_t names, uint64_t *cluster,
                    uint64_t *got) {
    while (t->free_at < t->free.count && !t->free.v[t->free_at].count)
        t->free_at++;
    if (t->free_at == t->free.count) {
        *got = want;
        return take_at_end(t, want, names, cluster);
    }
    struct shift_run *run = &t->free.v[t->free_at];
    *got = min_u64(want, run->count);
    *cluster = run->cluster;
    run->cluster += *got;
    run->count -= *got;
    return take(t, *cluster, *got, names);
}

int shift_room(struct shift *t, uint64_t bytes, uint64_t *host) {
    uint64_t n = qcow2_clusters_for(t->s, bytes), cluster = 0;
    int r;
    for (size_t i = t->free_at; i < t->free.count; i++) {
        struct shift_run *run = &t->free.v[i];
        if (run->count < n)
            continue;
        run->count -= n; /* from its end: its start goes on with what was taken there before */
        r = take(t, run->cluster + run->count, n, 1);
        *host = (run->cluster + run->count) << t->s->cluster_bits;
        return r;
    }
    r = take_at_end(t, n, 1, &cluster);
    *host = cluster << t->s->cluster_bits;
    return r;
}

int shift_write_co(struct shift *t, uint64_t host, const void *buf, uint64_t bytes) {
    int r = disk_pwrite_co(t->s->file, host, buf, bytes);
    if (r < 0)
        return err_errno(t->e, -r, "writing %" PRIu64 " bytes of new tables at %" PRIu64, bytes,
                         host);
    t->written += bytes;
    if (t->written >= WRITEBACK_BYTES) {
        t->written = 0;
        disk_writeback_co(t->s->node);
    }
    return 0;
}

/* ---------------------------------------------------------------- the switch */

static int barrier_co(struct shift *t) {
    return qcow2_ordered(t->s) ? disk_flush_co(t->s->file) : 0;
}

static void header_encode(const struct shift *t, const struct shift_header *h, uint8_t f[48]) {
    be64_store(f, h->size);
    be32_store(f + 8, t->s->h.crypt_method);
    be32_store(f + 12, h->l1_entries);
    be64_store(f + 16, h->l1_offset);
    be64_store(f + 24, h->reftable_offset);
    be32_store(f + 32, h->reftable_clusters);
    be32_store(f + 36, h->nb_snapshots);
    be64_store(f + 40, h->snapshots_offset);
}

static int header_write_co(struct shift *t, const struct shift_header *h) {
    uint8_t f[48];
    header_encode(t, h, f);
    if (PLANTED(SHIFT_HEADER_IN_PARTS)) {
        int r = disk_pwrite_co(t->s->file, QCOW2_HEADER_SIZE_AT, f, 24);
        return r ? r : disk_pwrite_co(t->s->file, QCOW2_HEADER_SIZE_AT + 24, f + 24, 24);
    }
    return disk_pwrite_co(t->s->file, QCOW2_HEADER_SIZE_AT, f, sizeof(f));
}

static void punch_co(struct shift *t) {
    struct qcow2 *s = t->s;
    for (size_t i = 0; s->node->flags & NODE_UNMAP && i < t->freed.count; i++)
        disk_discard_co(s->file, t->freed.v[i].cluster << s->cluster_bits,
                        t->freed.v[i].count << s->cluster_bits); /* a hint */
}

/* New header, stable.  After an error the old one is put back as well as can be. */
static int name_all_co(struct shift *t) {
    struct shift_header old = header_now(t->s);
    int r = header_write_co(t, &t->next);
    if (!r && !PLANTED(SHIFT_NO_LAST_BARRIER))
        r = barrier_co(t);
    if (!r)
        return 0;
    err_errno(t->e, -r, "writing the header");
    int back = header_write_co(t, &old);
    if (!back)
        back = barrier_co(t);
    t->unknown = back < 0;
    return r;
}

/* Metadata clusters: those of the old tables go, those of L2 tables follow the L1 table. */
static void follow_meta(struct shift *t) {
    struct qcow2 *s = t->s;
    for (size_t i = 0; i < t->dropped.count; i++)
        qcow2_meta_remove(s, t->dropped.v[i].cluster << s->cluster_bits,
                          t->dropped.v[i].count << s->cluster_bits);
    for (uint32_t i = 0; i < s->l1_entries; i++)
        if (s->l1[i] & QCOW2_OFFSET_MASK)
            qcow2_meta_remove(s, s->l1[i] & QCOW2_OFFSET_MASK, s->cluster_size);
    for (uint32_t i = 0; i < t->next.l1_entries; i++)
        if (t->l1[i] & QCOW2_OFFSET_MASK) /* memory gone: less is protected */
            qcow2_meta_add(s, t->l1[i] & QCOW2_OFFSET_MASK, s->cluster_size);
}

/* Storage has the new header: memory gets it too.  Cannot fail. */
static void follow(struct shift *t, uint64_t **l1_dirty, uint64_t **reftable_dirty) {
    struct qcow2 *s = t->s;
    const struct shift_header *h = &t->next;
    follow_meta(t);
    qcow2_cache_forget_all(&s->cache);
    free(s->l1);
    free(s->l1_dirty);
    free(s->reftable);
    free(s->reftable_dirty);
    s->l1 = steal(&t->l1);
    s->l1_dirty = steal(l1_dirty);
    s->reftable = steal(&t->reftable);
    s->reftable_dirty = steal(reftable_dirty);
    s->l1_dirty_count = s->reftable_dirty_count = 0;
    s->l1_entries = s->h.l1_size = h->l1_entries;
    s->reftable_entries = t->reftable_entries;
    s->h.l1_table_offset = h->l1_offset;
    s->h.refcount_table_offset = h->reftable_offset;
    s->h.refcount_table_clusters = h->reftable_clusters;
    s->h.nb_snapshots = h->nb_snapshots;
    s->h.snapshots_offset = h->snapshots_offset;
    s->h.size = s->node->size = h->size;
    s->coded_pos = 0;
    s->free_cursor = 0;
    s->releases++;
    s->virgin_from = max_u64(s->virgin_from, t->end);
}

int shift_switch_co(struct shift *t) {
    AUTO_FREE uint64_t *l1_dirty = calloc(div_up(t->next.l1_entries, 64) + 1, 8);
    AUTO_FREE uint64_t *reftable_dirty = NULL;
    if (!l1_dirty)
        return err_set(t->e, ENOMEM, "no memory for the new L1 table");
    int r = shift_write_counts_co(t);
    if (r < 0)
        return r;
    reftable_dirty = calloc(div_up(t->reftable_entries, 64) + 1, 8);
    if (!reftable_dirty)
        return err_set(t->e, ENOMEM, "no memory for the new refcount table");
    r = qcow2_table_write_co(t->s, t->next.reftable_offset, t->reftable, t->reftable_entries,
                             (uint64_t)t->reftable_entries * 8);
    if (!r && !PLANTED(SHIFT_NAMED_EARLY))
        r = barrier_co(t);
    if (r < 0)
        return err_errno(t->e, -r, "writing the new tables");
    if (PLANTED(SHIFT_PUNCHED_EARLY))
        punch_co(t);
    r = name_all_co(t);
    if (r < 0)
        return r;
    follow(t, &l1_dirty, &reftable_dirty);
    punch_co(t);
    return 0;
}

/* ---------------------------------------------------------------- end */

/* The rooms taken are free again; their clusters hold rubbish. */
static void give_back_co(struct shift *t) {
    struct qcow2 *s = t->s;
    if (t->unknown) /* storage may name them: nobody must use them */
        return;
    if (!t->fresh.count)
        return;
    for (size_t i = 0; i < t->fresh.count; i++)
        qcow2_meta_remove(s, t->fresh.v[i].cluster << s->cluster_bits,
                          t->fresh.v[i].count << s->cluster_bits);
    if (s->file->size > t->file_size)
        disk_resize_co(s->file, t->file_size, PREALLOC_OFF, NULL); /* a hint */
    s->virgin_from = max_u64(s->virgin_from, qcow2_clusters_for(s, s->file->size));
}

void shift_end_co(struct shift *t, bool done) {
    if (!done && t->s)
        give_back_co(t);
    counts_free(&t->come);
    counts_free(&t->go);
    free(t->once);
    free(t->l1);
    free(t->reftable);
    free(t->needed);
    free(t->free.v);
    free(t->fresh.v);
    free(t->freed.v);
    free(t->dropped.v);
    buf_put(t->in, SHIFT_BUF_BYTES);
    buf_put(t->out, SHIFT_BUF_BYTES);
}
