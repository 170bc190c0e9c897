/* SPDX-License-Identifier: MIT */
/*
 * The bitmap directory: reading it at open, and knowing the clusters of all bitmaps.
 *
 * The extension counts only while autoclear bit 0 is set: a program that does not know bitmaps has
 * cleared it, and has not recorded what it wrote.  Then it is dropped as soon as the image is open
 * for writing; the clusters leak.
 *
 * A directory that cannot be read refuses writing, since the bitmaps in it would miss what is
 * written; reading the disk goes on without bitmaps (bitmaps_problem says why).  One bitmap whose
 * table is damaged is of no use, and is kept: it can be removed, and leaks its clusters then.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/log.h"
#include "disk/io.h"
#include "format/qcow2/bitmap.h"

void qcow2_bitmap_free(struct qcow2_bitmap *q) {
    if (!q)
        return;
    free(q->extra);
    free(q->table);
    free(q);
}

/* ---------------------------------------------------------------- entries */

/* An entry of at least QCOW2_BITMAP_FIXED bytes: what is wrong with it, or NULL. */
static const char *entry_flaw(const struct qcow2 *s, const uint8_t *p) {
    uint64_t table = be64_load(p), entries = be32_load(p + 8), clusters;
    uint32_t flags = be32_load(p + QCOW2_BITMAP_FLAGS_AT), bits = p[17], name = be16_load(p + 18);
    if (p[16] != 1)
        return "its type is not 1";
    if (flags & ~(uint32_t)QCOW2_BITMAP_FLAGS)
        return "reserved flags are set";
    if (bits < 9 || bits > 31)
        return "its granularity is not between 2^9 and 2^31 bytes";
    if (!name || name > BITMAP_NAME_MAX)
        return "its name does not have 1 to 1023 bytes";
    if (!table || !entries)
        return "it has no table";
    if (!is_aligned(table, s->cluster_size) || table >= QCOW2_HOST_LIMIT)
        return "the offset of its table is not that of a cluster";
    if (!ck_mul(entries, (uint64_t)s->cluster_size, &clusters) || clusters > BITMAP_BYTES_MAX)
        return "it is larger than 512 MiB";
    if (!(flags & QCOW2_BITMAP_IN_USE) && clusters * 8 < div_up(s->h.size, (uint64_t)1 << bits))
        return "it is too short for the disk";
    return NULL;
}

static int attach(struct qcow2 *s, const uint8_t *p, uint64_t at, struct err *e) {
    uint32_t flags = be32_load(p + QCOW2_BITMAP_FLAGS_AT), extra = be32_load(p + 20);
    uint16_t name_length = be16_load(p + 18);
    const uint8_t *name_at = p + QCOW2_BITMAP_FIXED + extra;
    struct bitmap *b = NULL;
    if (memchr(name_at, 0, name_length))
        return err_set(e, EINVAL, "its name holds a zero byte");
    char *name AUTO_FREE = xstrndup((const char *)name_at, name_length);
    const char *foreign = extra && !(flags & QCOW2_BITMAP_EXTRA_COMPATIBLE)
                              ? "has extra data that this program does not know"
                              : NULL;
    int r = bitmap_attach(s->node, name, p[17], flags & QCOW2_BITMAP_AUTO,
                          flags & QCOW2_BITMAP_IN_USE, foreign, &b, e);
    if (r < 0)
        return r;
    struct qcow2_bitmap *q = xcalloc(1, sizeof(*q));
    b->cookie = q;
    q->entry_at = at;
    q->table_offset = be64_load(p);
    q->table_entries = be32_load(p + 8);
    q->flags = flags;
    q->extra_length = extra;
    q->extra = extra ? malloc(extra) : NULL;
    if (extra && !q->extra)
        return err_set(e, ENOMEM, "no memory for its extra data");
    if (extra)
        memcpy(q->extra, p + QCOW2_BITMAP_FIXED, extra);
    return 0;
}

static int parse(struct qcow2 *s, const uint8_t *buf, uint64_t size, struct err *e) {
    uint64_t pos = 0;
    for (uint32_t i = 0; i < s->h.bitmaps_count; i++) {
        const uint8_t *p = buf + pos;
        if (size - pos < QCOW2_BITMAP_FIXED)
            return err_set(e, EINVAL,
                           "%" PRIu32 " of %" PRIu32 " bitmaps do not fit its %" PRIu64 " bytes",
                           s->h.bitmaps_count - i, s->h.bitmaps_count, size);
        uint64_t length = qcow2_bitmap_entry_bytes(be16_load(p + 18), be32_load(p + 20));
        if (length > size - pos)
            return err_set(e, EINVAL,
                           "bitmap %" PRIu32 " of %" PRIu64 " bytes reaches beyond its end", i + 1,
                           length);
        const char *flaw = entry_flaw(s, p);
        int r =
            flaw ? err_set(e, EINVAL, "%s", flaw) : attach(s, p, s->h.bitmaps_dir_offset + pos, e);
        if (r < 0)
            return err_prefix(e, "bitmap %" PRIu32, i + 1);
        pos += length;
    }
    if (pos != size)
        return err_set(e, EINVAL, "%" PRIu32 " bitmaps take %" PRIu64 " of its %" PRIu64 " bytes",
                       s->h.bitmaps_count, pos, size);
    return bitmap_attach_end(s->node, e);
}

static int read_dir_co(struct qcow2 *s, struct err *e) {
    const struct qcow2_header *h = &s->h;
    uint64_t size = h->bitmaps_dir_size, at = h->bitmaps_dir_offset;
    if (!h->bitmaps_count || h->bitmaps_count > BITMAPS_MAX)
        return err_set(e, EINVAL, "%" PRIu32 " bitmaps, where 1 to %d are possible",
                       h->bitmaps_count, BITMAPS_MAX);
    if (size > QCOW2_BITMAP_DIR_BYTES_MAX)
        return err_set(e, EINVAL, "its %" PRIu64 " bytes are above the limit of %d", size,
                       QCOW2_BITMAP_DIR_BYTES_MAX);
    if (!at || !is_aligned(at, s->cluster_size) || at >= QCOW2_HOST_LIMIT)
        return err_set(e, EINVAL, "offset %" PRIu64 " is not that of a cluster", at);
    if (at > s->file->size || size > s->file->size - at)
        return err_set(e, EINVAL, "it ends behind the end of the file (%" PRIu64 " bytes)",
                       s->file->size);
    AUTO_FREE uint8_t *buf = malloc(max_u64(size, 1));
    int r = buf ? disk_pread_co(s->file, at, buf, size) : -ENOMEM;
    return r < 0 ? err_errno(e, -r, "reading it") : parse(s, buf, size, e);
}

static void detach_all(struct qcow2 *s) {
    struct bitmap *b;
    while ((b = bitmap_next(s->node, NULL)) && b->stored) {
        qcow2_bitmap_free(b->cookie);
        bitmap_detach(b);
    }
    if (s->node->bitmaps)
        bitmap_set_update(s->node->bitmaps);
}

/* ---------------------------------------------------------------- tables */

int qcow2_bitmap_table_co(struct qcow2 *s, const struct qcow2_bitmap *q, uint64_t **out,
                          struct err *e) {
    uint64_t bytes = (uint64_t)q->table_entries * 8;
    if (q->table_offset > s->file->size || bytes > s->file->size - q->table_offset)
        return err_set(e, EINVAL, "its table ends behind the end of the file");
    uint64_t *table = malloc(bytes);
    int r = table ? disk_pread_co(s->file, q->table_offset, table, bytes) : -ENOMEM;
    if (r < 0) {
        free(table);
        return err_errno(e, -r, "reading its table");
    }
    for (uint32_t i = 0; i < q->table_entries; i++) {
        uint64_t entry = table[i] = be64_load(&table[i]), host = entry & QCOW2_OFFSET_MASK;
        if (entry & ~(QCOW2_OFFSET_MASK | QCOW2_BITMAP_ALL_ONES) ||
            (host && entry & QCOW2_BITMAP_ALL_ONES) || !is_aligned(host, s->cluster_size) ||
            host >= s->file->size) { /* it would read as "nothing has changed" */
            free(table);
            return err_set(e, EINVAL, "its table entry %" PRIu32 " is damaged: 0x%" PRIx64, i,
                           entry);
        }
    }
    *out = table;
    return 0;
}

/* The clusters of one bitmap join the metadata; false: some are other metadata already. */
static bool protect(struct qcow2 *s, const struct qcow2_bitmap *q) {
    uint64_t bytes = (uint64_t)q->table_entries * 8, count = qcow2_clusters_for(s, bytes), i;
    uint32_t k = 0;
    for (i = 0; i < count; i++) {
        uint64_t at = q->table_offset + (i << s->cluster_bits);
        if (qcow2_is_meta(s, at) || qcow2_meta_add(s, at, 1) < 0)
            break;
    }
    for (; i == count && k < q->table_entries; k++) {
        uint64_t at = q->table[k] & QCOW2_OFFSET_MASK;
        if (at && (qcow2_is_meta(s, at) || qcow2_meta_add(s, at, 1) < 0))
            break;
    }
    if (i == count && k == q->table_entries)
        return true;
    /* What was added stays protected: whoever else names it is not to be written over either. */
    return false;
}

static int tables_co(struct qcow2 *s, struct err *e) {
    uint64_t bytes = 0;
    for (struct bitmap *b = NULL; (b = bitmap_next(s->node, b));) {
        struct qcow2_bitmap *q = b->cookie;
        struct err why AUTO_ERR = ERR_INIT;
        if (!b->stored)
            continue;
        bytes += (uint64_t)q->table_entries * 8;
        if (bytes > QCOW2_BITMAP_TABLES_BYTES_MAX)
            return err_set(e, EFBIG, "the tables of the bitmaps have more than %d bytes",
                           QCOW2_BITMAP_TABLES_BYTES_MAX);
        free(steal(&q->table));
        int r = qcow2_bitmap_table_co(s, q, &q->table, &why);
        if (r == -ENOMEM) {
            err_move(e, &why);
            return r;
        }
        if (!r && !protect(s, q))
            free(steal(&q->table));
        if (!q->table && !b->inconsistent)
            b->foreign = b->foreign ? b->foreign : "has a damaged table";
    }
    return 0;
}

/* ---------------------------------------------------------------- opening */

static bool counts(const struct qcow2 *s) {
    return s->h.has_bitmaps && s->h.autoclear & QCOW2_AUTOCLEAR_BITMAPS &&
           !(s->node->flags & NODE_CHECK);
}

int qcow2_bitmaps_open_co(struct qcow2 *s, struct err *e) {
    struct err why AUTO_ERR = ERR_INIT;
    if (!counts(s))
        return 0;
    int r = read_dir_co(s, &why);
    if (r < 0) {
        detach_all(s);
        err_prefix(&why, "bitmap directory");
        if (r == -ENOMEM) {
            err_move(e, &why);
            return r;
        }
        free(s->bitmaps_problem);
        s->bitmaps_problem = xstrdup(err_text(&why));
        log_msg(LOG_LV_WARN, "the image's bitmaps are left out: %s", s->bitmaps_problem);
    }
    return 0;
}

int qcow2_bitmaps_writable_co(struct qcow2 *s, struct err *e) {
    if (s->h.has_bitmaps && !(s->h.autoclear & QCOW2_AUTOCLEAR_BITMAPS)) {
        s->h.has_bitmaps = false;
        s->h.bitmaps_count = 0;
        s->h.bitmaps_dir_size = s->h.bitmaps_dir_offset = 0;
        log_msg(LOG_LV_WARN, "the image's bitmaps are dropped: a program that does not know "
                             "bitmaps has written to it; their clusters are lost");
        int r = qcow2_header_write_co(s, e);
        if (r < 0)
            return r;
    }
    if (!counts(s))
        return 0;
    if (s->bitmaps_problem) {
        err_set(e, EINVAL, "%s", s->bitmaps_problem);
        err_hint(e, "writing would leave the bitmaps untrue; the image can be read and converted");
        return -EINVAL;
    }
    for (uint64_t i = 0; i < s->h.bitmaps_dir_size; i += s->cluster_size) {
        if (qcow2_is_meta(s, s->h.bitmaps_dir_offset + i))
            return err_set(e, EIO, "bitmap directory shares a cluster with another table");
        if (qcow2_meta_add(s, s->h.bitmaps_dir_offset + i, 1) < 0)
            return err_set(e, ENOMEM, "no memory for the tables");
    }
    int r = tables_co(s, e);
    if (s->node->bitmaps)
        bitmap_set_update(s->node->bitmaps);
    return r;
}

void qcow2_bitmaps_close(struct qcow2 *s) {
    for (struct bitmap *b = NULL; s->node && (b = bitmap_next(s->node, b));)
        if (b->persistent) {
            qcow2_bitmap_free(b->cookie);
            b->cookie = NULL;
        }
    free(steal(&s->bitmaps_problem));
}

/* ---------------------------------------------------------------- for info */

json_t *qcow2_bitmaps_describe(struct node *n) {
    json_t *list = json_array();
    for (struct bitmap *b = NULL; (b = bitmap_next(n, b));) {
        const struct qcow2_bitmap *q = b->cookie;
        if (!q)
            continue;
        json_t *o = json_object(), *flags = json_array();
        json_t *name = json_string(b->name);
        if (q->flags & QCOW2_BITMAP_IN_USE)
            json_array_append_new(flags, json_string("in-use"));
        if (q->flags & QCOW2_BITMAP_AUTO)
            json_array_append_new(flags, json_string("auto"));
        json_object_set_new(o, "flags", flags);
        json_object_set_new(o, "name", name ? name : json_string("(not UTF-8)"));
        json_object_set_new(o, "granularity", json_integer((json_int_t)bitmap_granularity(b)));
        json_array_append_new(list, o);
    }
    if (json_array_size(list))
        return list;
    json_decref(list);
    return NULL;
}
