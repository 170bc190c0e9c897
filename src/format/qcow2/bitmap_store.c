/* SPDX-License-Identifier: MIT */
/*
 * The content of stored bitmaps: loading, the in-use mark, storing, removing.
 *
 * Arming sets flag bit 0 in directory entries where they lie (four bytes, which no sector boundary
 * cuts) and makes that stable, before anything makes the stored bits untrue.
 *
 * Storing and removing write nothing that the header in force names:
 *
 *  1. fresh clusters for the data and the table of each bitmap that has changed;
 *  2. a fresh directory: changed bitmaps by their new tables and not in use, the others as they
 * are;
 *  3. write-back: the counts of the fresh clusters and all that was written are stable;
 *  4. the header names the new directory (header_write.c: the old header or the new one);
 *  5. what only the old directory named goes into limbo.
 *
 * A crash before 4 leaves the old directory, with its in-use marks, and leaks; after 4 the new one,
 * and leaks.  An error before 4 gives the fresh clusters back.  After an error at 4 nobody knows
 * which directory is in force: both stay counted, and arming marks both.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/log.h"
#include "base/plant.h"
#include "disk/io.h"
#include "format/qcow2/bitmap.h"

/* ---------------------------------------------------------------- loading */

static int add_content_co(struct qcow2 *s, struct bitmap *b, const uint64_t *table, struct err *e) {
    uint64_t span = qcow2_bitmap_span(s), used = div_up(b->bits, span);
    uint8_t *buf = buf_get(s->cluster_size);
    int r = buf ? 0 : err_set(e, ENOMEM, "no memory for its data");
    for (uint64_t i = 0; !r && i < used; i++) {
        uint64_t host = table[i] & QCOW2_OFFSET_MASK;
        if (!host) {
            if (table[i] & QCOW2_BITMAP_ALL_ONES)
                bitmap_import_ones(b, i * span, span);
            continue;
        }
        r = disk_pread_co(s->file, host, buf, s->cluster_size);
        if (r < 0)
            err_errno(e, -r, "reading its data at %" PRIu64, host);
        else
            bitmap_import(b, i * span, buf, s->cluster_size);
    }
    buf_put(buf, s->cluster_size);
    return r;
}

int qcow2_bitmap_load_co(struct bitmap *b, struct err *e) {
    struct qcow2 *s = qcow2_of(b->node);
    struct qcow2_bitmap *q = b->cookie;
    AUTO_FREE uint64_t *read = NULL;
    int r = q->table ? 0 : qcow2_bitmap_table_co(s, q, &read, e);
    if (r < 0)
        return r;
    if (q->table_entries < div_up(b->bits, qcow2_bitmap_span(s)))
        return err_set(e, EINVAL, "its table of %" PRIu32 " entries is too short for the disk",
                       q->table_entries);
    return add_content_co(s, b, q->table ? q->table : read, e);
}

/* ---------------------------------------------------------------- in use */

int qcow2_bitmap_arm_co(struct node *n, struct err *e) {
    struct qcow2 *s = qcow2_of(n);
    int r = 0;
    for (struct bitmap *b = NULL; !r && (b = bitmap_next(n, b));) {
        struct qcow2_bitmap *q = b->cookie;
        uint8_t field[4];
        if (!b->arm)
            continue;
        be32_store(field, q->flags | QCOW2_BITMAP_IN_USE);
        r = disk_pwrite_co(s->file, q->entry_at + QCOW2_BITMAP_FLAGS_AT, field, sizeof(field));
        if (!r && q->doubt_at)
            r = disk_pwrite_co(s->file, q->doubt_at + QCOW2_BITMAP_FLAGS_AT, field, sizeof(field));
    }
    if (!r && qcow2_ordered(s) && !PLANTED(BITMAP_ARM_UNSTABLE))
        r = disk_flush_co(s->file);
    if (r < 0)
        return err_errno(e, -r, "marking bitmaps as in use");
    for (struct bitmap *b = NULL; (b = bitmap_next(n, b));)
        if (b->arm)
            ((struct qcow2_bitmap *)b->cookie)->flags |= QCOW2_BITMAP_IN_USE;
    return 0;
}

/* ---------------------------------------------------------------- runs of clusters */

struct runs {
    struct qcow2_range *v;
    size_t count;
};

static int runs_add(struct runs *x, uint64_t offset, uint64_t length) {
    if (x->count) {
        struct qcow2_range *last = &x->v[x->count - 1];
        if (last->offset + last->length == offset) {
            last->length += length;
            return 0;
        }
    }
    if (!(x->count & (x->count - 1))) { /* full at powers of two, and at 0 */
        struct qcow2_range *v = realloc(x->v, (x->count ? x->count * 2 : 1) * sizeof(*v));
        if (!v)
            return -ENOMEM;
        x->v = v;
    }
    x->v[x->count++] = (struct qcow2_range){offset, length};
    return 0;
}

/* `bytes` in whole clusters of one piece, counted and known as metadata. */
static int fresh_co(struct qcow2 *s, uint64_t bytes, struct runs *fresh, uint64_t *host) {
    uint64_t got, clusters = qcow2_clusters_for(s, bytes);
    bool virgin;
    int r = qcow2_alloc_co(s, clusters, true, host, &got, &virgin);
    if (r < 0)
        return r;
    uint64_t length = clusters << s->cluster_bits;
    r = runs_add(fresh, *host, length);
    if (r < 0)
        qcow2_release_co(s, qcow2_cluster_index(s, *host), clusters);
    return r ? r : qcow2_meta_add(s, *host, length);
}

/* What nothing on storage names. */
static void give_back_co(struct qcow2 *s, struct runs *x) {
    for (size_t i = 0; i < x->count; i++) {
        qcow2_meta_remove(s, x->v[i].offset, x->v[i].length);
        qcow2_release_co(s, qcow2_cluster_index(s, x->v[i].offset),
                         qcow2_clusters_for(s, x->v[i].length));
    }
    free(steal(&x->v));
    x->count = 0;
}

static void into_limbo(struct qcow2 *s, struct runs *x) {
    for (size_t i = 0; i < x->count; i++) {
        qcow2_meta_remove(s, x->v[i].offset, x->v[i].length);
        qcow2_limbo_add(s, qcow2_cluster_index(s, x->v[i].offset),
                        qcow2_clusters_for(s, x->v[i].length));
    }
    free(steal(&x->v));
    x->count = 0;
}

/* The clusters of a stored bitmap; a damaged table's are not known and leak. */
static int old_clusters(const struct qcow2 *s, const struct qcow2_bitmap *q, struct runs *old) {
    if (!q->table)
        return 0;
    uint64_t bytes = align_up((uint64_t)q->table_entries * 8, s->cluster_size);
    int r = runs_add(old, q->table_offset, bytes);
    for (uint32_t i = 0; !r && i < q->table_entries; i++)
        if (q->table[i] & QCOW2_OFFSET_MASK)
            r = runs_add(old, q->table[i] & QCOW2_OFFSET_MASK, s->cluster_size);
    return r;
}

/* ---------------------------------------------------------------- writing one bitmap */

/* Data and table of `b` in fresh clusters; q tells of them. */
static int write_one_co(struct qcow2 *s, struct bitmap *b, struct qcow2_bitmap *q,
                        struct runs *fresh) {
    uint64_t span = qcow2_bitmap_span(s), entries = max_u64(div_up(b->bits, span), 1);
    uint8_t *buf = buf_get(s->cluster_size);
    int r = 0;
    q->table = calloc(entries, sizeof(*q->table));
    q->table_entries = (uint32_t)entries;
    if (!buf || !q->table)
        r = -ENOMEM;
    for (uint64_t i = 0; !r && i * span < b->bits; i++) {
        enum bitmap_region kind = bitmap_region(b, i * span, span);
        bool whole = b->bits - i * span >= span; /* bits behind the last one are to be zeros */
        if (kind == BITMAP_ALL_CLEAR)
            continue;
        if (kind == BITMAP_ALL_SET && whole) {
            q->table[i] = QCOW2_BITMAP_ALL_ONES;
            continue;
        }
        bitmap_export(b, i * span, buf, s->cluster_size);
        r = fresh_co(s, s->cluster_size, fresh, &q->table[i]);
        if (!r)
            r = disk_pwrite_co(s->file, q->table[i], buf, s->cluster_size);
    }
    if (!r)
        r = fresh_co(s, entries * 8, fresh, &q->table_offset);
    if (!r)
        r = qcow2_table_write_co(s, q->table_offset, q->table, entries,
                                 align_up(entries * 8, s->cluster_size));
    buf_put(buf, s->cluster_size);
    return r;
}

/* ---------------------------------------------------------------- a new directory */

struct rewrite {
    struct runs fresh, old;
    const struct bitmap *drop;
    uint8_t *dir;
    uint64_t dir_bytes, dir_at;
    uint32_t count;
};

/* The stored form that `b` is going to have: what was just written, or what it has. */
static const struct qcow2_bitmap *form_of(const struct bitmap *b) {
    return b->pending ? b->pending : b->cookie;
}

static bool listed(const struct rewrite *w, const struct bitmap *b) {
    return b->persistent && b != w->drop && form_of(b);
}

static void encode_entry(const struct bitmap *b, const struct qcow2_bitmap *q, uint8_t *p) {
    size_t name = strlen(b->name);
    be64_store(p, q->table_offset);
    be32_store(p + 8, q->table_entries);
    be32_store(p + QCOW2_BITMAP_FLAGS_AT, q->flags);
    p[16] = 1;
    p[17] = (uint8_t)b->granularity_bits;
    be16_store(p + 18, (uint16_t)name);
    be32_store(p + 20, q->extra_length);
    if (q->extra_length)
        memcpy(p + QCOW2_BITMAP_FIXED, q->extra, q->extra_length);
    memcpy(p + QCOW2_BITMAP_FIXED + q->extra_length, b->name, name);
}

static int write_dir_co(struct qcow2 *s, struct rewrite *w) {
    w->dir_bytes = 0;
    w->count = 0;
    for (struct bitmap *b = NULL; (b = bitmap_next(s->node, b));) {
        if (!listed(w, b))
            continue;
        w->count++;
        w->dir_bytes += qcow2_bitmap_entry_bytes(strlen(b->name), form_of(b)->extra_length);
    }
    if (!w->count)
        return 0;
    if (w->dir_bytes > QCOW2_BITMAP_DIR_BYTES_MAX)
        return -EFBIG;
    uint64_t room = align_up(w->dir_bytes, s->cluster_size), pos = 0;
    w->dir = calloc(1, room);
    if (!w->dir)
        return -ENOMEM;
    for (struct bitmap *b = NULL; (b = bitmap_next(s->node, b));) {
        if (!listed(w, b))
            continue;
        encode_entry(b, form_of(b), w->dir + pos);
        pos += qcow2_bitmap_entry_bytes(strlen(b->name), form_of(b)->extra_length);
    }
    int r = fresh_co(s, room, &w->fresh, &w->dir_at);
    return r ? r : disk_pwrite_co(s->file, w->dir_at, w->dir, room);
}

/* Step 4; the header in memory is the one that is on storage, as far as anybody knows. */
static int name_dir_co(struct qcow2 *s, const struct rewrite *w, struct err *e) {
    struct qcow2_header *h = &s->h;
    bool had = h->has_bitmaps;
    uint32_t count = h->bitmaps_count;
    uint64_t size = h->bitmaps_dir_size, at = h->bitmaps_dir_offset, autoclear = h->autoclear;
    h->has_bitmaps = w->count;
    h->bitmaps_count = w->count;
    h->bitmaps_dir_size = w->dir_bytes;
    h->bitmaps_dir_offset = w->dir_at;
    if (w->count)
        h->autoclear |= QCOW2_AUTOCLEAR_BITMAPS;
    else
        h->autoclear &= ~(uint64_t)QCOW2_AUTOCLEAR_BITMAPS;
    int r = qcow2_header_write_co(s, e);
    if (r < 0) {
        h->has_bitmaps = had;
        h->bitmaps_count = count;
        h->bitmaps_dir_size = size;
        h->bitmaps_dir_offset = at;
        h->autoclear = autoclear;
    }
    return r;
}

/* Where the entries lie now. */
static void note_entries(struct qcow2 *s, const struct rewrite *w) {
    uint64_t pos = w->dir_at;
    for (struct bitmap *b = NULL; (b = bitmap_next(s->node, b));) {
        if (!listed(w, b))
            continue;
        if (b->pending) {
            qcow2_bitmap_free(b->cookie);
            b->cookie = steal(&b->pending);
            b->stored = true;
            b->armed = false;
        }
        struct qcow2_bitmap *q = b->cookie;
        q->entry_at = pos;
        q->doubt_at = 0;
        pos += qcow2_bitmap_entry_bytes(strlen(b->name), q->extra_length);
    }
}

/* The new directory may be in force, or not. */
static void note_doubt(struct qcow2 *s, const struct rewrite *w) {
    uint64_t pos = w->dir_at;
    for (struct bitmap *b = NULL; (b = bitmap_next(s->node, b));) {
        if (!listed(w, b))
            continue;
        uint64_t bytes = qcow2_bitmap_entry_bytes(strlen(b->name), form_of(b)->extra_length);
        if (!b->cookie) { /* if anywhere, it is there */
            b->cookie = steal(&b->pending);
            ((struct qcow2_bitmap *)b->cookie)->entry_at = pos;
            b->stored = true;
        } else {
            ((struct qcow2_bitmap *)b->cookie)->doubt_at = pos;
        }
        b->armed = false;
        pos += bytes;
    }
}

/* Steps 2 to 5; the forms to come are in b->pending. */
static int switch_dir_co(struct qcow2 *s, struct rewrite *w, struct err *e) {
    uint64_t old_at = s->h.bitmaps_dir_offset, old_size = s->h.bitmaps_dir_size;
    int r = write_dir_co(s, w);
    if (!r && s->h.has_bitmaps)
        r = runs_add(&w->old, old_at, align_up(old_size, s->cluster_size));
    for (struct bitmap *b = NULL; !r && (b = bitmap_next(s->node, b));)
        if (b->stored && (b->pending || b == w->drop))
            r = old_clusters(s, b->cookie, &w->old);
    if (!r && PLANTED(BITMAP_FREED_EARLY)) {
        into_limbo(s, &w->old);
        r = qcow2_writeback_all_co(s);
    }
    if (!r && !PLANTED(BITMAP_NAMED_EARLY))
        r = qcow2_flush_co(s->node);
    if (r < 0) {
        give_back_co(s, &w->fresh);
        return err_errno(e, -r, "writing the bitmaps");
    }
    r = name_dir_co(s, w, e);
    if (r == -ENOSPC)
        give_back_co(s, &w->fresh); /* the header was not touched */
    else if (r < 0)
        note_doubt(s, w);
    if (r < 0)
        return r;
    note_entries(s, w);
    into_limbo(s, &w->old);
    /* The new directory is in force, so this has succeeded; a later flush gives the room back. */
    qcow2_writeback_all_co(s);
    return 0;
}

static void rewrite_end(struct qcow2 *s, struct rewrite *w) {
    for (struct bitmap *b = NULL; (b = bitmap_next(s->node, b));)
        qcow2_bitmap_free(steal(&b->pending));
    free(w->fresh.v);
    free(w->old.v);
    free(w->dir);
}

/* The new form of `b` into b->pending.  When its stored bits cannot be read it is lost. */
static int prepare_co(struct qcow2 *s, struct bitmap *b, struct rewrite *w, struct err *e) {
    const struct qcow2_bitmap *had = b->cookie;
    struct err why AUTO_ERR = ERR_INIT;
    int r = bitmap_load_co(b, &why);
    if (r < 0) {
        b->inconsistent = true; /* the image says "in use", and it stays so */
        log_msg(LOG_LV_WARN, "a bitmap is lost: %s", err_text(&why));
        return 0;
    }
    struct qcow2_bitmap *q = xcalloc(1, sizeof(*q));
    b->pending = q;
    q->flags = (b->enabled ? QCOW2_BITMAP_AUTO : 0) |
               (had ? had->flags & QCOW2_BITMAP_EXTRA_COMPATIBLE : 0);
    if (had && had->extra_length) {
        q->extra = malloc(had->extra_length);
        if (!q->extra)
            return err_set(e, ENOMEM, "no memory for extra data");
        memcpy(q->extra, had->extra, had->extra_length);
        q->extra_length = had->extra_length;
    }
    r = write_one_co(s, b, q, &w->fresh);
    return r < 0 ? err_errno(e, -r, "writing bitmap '%s'", b->name) : 0;
}

/* Not stored as it is; or it may be, but is marked in the directory that counts here. */
static bool out_of_date(const struct bitmap *b) {
    const struct qcow2_bitmap *q = b->cookie;
    return !b->stored || b->armed || q->flags & QCOW2_BITMAP_IN_USE;
}

int qcow2_bitmap_store_co(struct node *n, struct err *e) {
    struct qcow2 *s = qcow2_of(n);
    struct rewrite w = {.drop = NULL};
    int r = 0;
    if (s->h.version < 3) /* it has become so since: they are given up */
        return 0;
    for (struct bitmap *b = NULL; !r && (b = bitmap_next(n, b));)
        if (b->persistent && !b->inconsistent && !b->foreign && out_of_date(b))
            r = prepare_co(s, b, &w, e);
    if (r < 0)
        give_back_co(s, &w.fresh);
    else
        r = switch_dir_co(s, &w, e);
    rewrite_end(s, &w);
    return r;
}

int qcow2_bitmap_remove_co(struct bitmap *b, struct err *e) {
    struct qcow2 *s = qcow2_of(b->node);
    struct rewrite w = {.drop = b};
    int r = switch_dir_co(s, &w, e);
    rewrite_end(s, &w);
    if (r < 0)
        return r;
    qcow2_bitmap_free(b->cookie);
    b->cookie = NULL;
    return 0;
}

int qcow2_bitmap_check(struct node *n, const char *name, uint64_t granularity, struct err *e) {
    struct qcow2 *s = qcow2_of(n);
    uint64_t bytes = qcow2_bitmap_entry_bytes(strlen(name), 0);
    if (s->h.version < 3) {
        err_set(e, ENOTSUP, "a version 2 image cannot keep bitmaps");
        err_hint(e, "convert or amend it to compat=1.1 first");
        return -ENOTSUP;
    }
    for (struct bitmap *b = NULL; (b = bitmap_next(n, b));) {
        const struct qcow2_bitmap *q = b->cookie;
        if (b->persistent)
            bytes += qcow2_bitmap_entry_bytes(strlen(b->name), q ? q->extra_length : 0);
    }
    if (bytes > QCOW2_BITMAP_DIR_BYTES_MAX)
        return err_set(e, EFBIG, "the bitmap directory would have %" PRIu64 " bytes, more than %d",
                       bytes, QCOW2_BITMAP_DIR_BYTES_MAX);
    return 0;
}
