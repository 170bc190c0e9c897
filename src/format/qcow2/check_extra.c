/* SPDX-License-Identifier: MIT */
/*
 * `check`: what snapshots and bitmaps name.  Only counted, read-only; their own content is the
 * business of the files that will handle them.
 *
 * Snapshots share L2 tables with the active image and with one another.  All their L1 entries are
 * gathered and sorted, so that each distinct L2 table is read once and counted as many times as it
 * is named; those that are active, too, with the active ones.
 *
 * Source: the public qcow2 specification ("Snapshots", "Bitmaps").
 */
#include "format/qcow2/check.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"

enum {
    SNAPSHOT_FIXED = 40, /* bytes before the extra data */
    SNAPSHOT_EXTRA_MAX = 1024,
    SNAPSHOT_EXTRA_V3 = 16,
    BITMAP_FIXED = 24,   /* bytes before the extra data */
    BITMAPS_MAX = 65535, /* the reference reader's caps */
    BITMAP_NAME_MAX = 1023,
    BITMAP_IN_USE = 1, /* flag */
    BITMAP_TABLE_BYTES_MAX = 64 << 20,
};

/* ---- snapshots ---- */

static int inactive_entry(struct check *c, uint64_t entry, const char *what, uint64_t i) {
    uint64_t offset = entry & QCOW2_OFFSET_MASK, cluster = offset >> c->s->cluster_bits;
    if (!entry)
        return 0;
    if (entry & ~(QCOW2_OFFSET_MASK | QCOW2_COPIED))
        check_corruption(c, "%s: entry %" PRIu64 ": 0x%" PRIx64 " has reserved bits set", what, i,
                         entry);
    if (!offset || !is_aligned(offset, c->s->cluster_size)) {
        check_lost(c, "%s: entry %" PRIu64 ": L2 table at offset %" PRIu64 " is %s", what, i,
                   offset, offset ? "not at the start of a cluster" : "the header");
        return 0;
    }
    if (!check_inside(c, offset, c->s->cluster_size)) {
        check_corruption(
            c, "%s: entry %" PRIu64 ": L2 table at offset %" PRIu64 " is outside the file", what, i,
            offset);
        return 0;
    }
    if (counts_get(&c->fixed, cluster)) {
        check_lost(c,
                   "%s: entry %" PRIu64 ": L2 table at offset %" PRIu64 " overlaps other metadata",
                   what, i, offset);
        check_overlapped(c, cluster, 1);
        return check_count(c, offset, c->s->cluster_size, 1);
    }
    /* By twos: check_l1_entry tells its own marks by the lowest bit. */
    int r = counts_get(&c->l2, cluster) ? 0 : counts_add(&c->l2, cluster, 1, 2);
    if (!r)
        r = check_count(c, offset, c->s->cluster_size, 1);
    return r ? r : check_tables_add(&c->inactive, offset);
}

static int snapshot_l1_co(struct check *c, uint32_t number, uint64_t offset, uint64_t entries) {
    char what[64];
    bool ok;
    snprintf(what, sizeof(what), "L1 table of snapshot %" PRIu32, number);
    if (entries > QCOW2_L1_BYTES_MAX / 8) {
        check_lost(c, "%s: %" PRIu64 " entries are above the limit of %d", what, entries,
                   QCOW2_L1_BYTES_MAX / 8);
        return 0;
    }
    int r = check_metadata(c, what, offset, entries * 8, &ok);
    if (r || !ok)
        return r;
    for (uint64_t i = 0; !r && i < entries; i += CHECK_BUF_BYTES / 8) {
        uint64_t some = min_u64(entries - i, CHECK_BUF_BYTES / 8);
        r = disk_pread_co(c->s->file, offset + i * 8, c->buf, some * 8);
        if (r) {
            check_failure(c, "%s: cannot read: %s", what, strerror(-r));
            return 0;
        }
        for (uint64_t k = 0; !r && k < some; k++)
            r = inactive_entry(c, be64_load(c->buf + k * 8), what, i + k);
    }
    return r;
}

int check_snapshots_co(struct check *c) {
    const struct qcow2_header *h = &c->s->h;
    uint64_t pos = h->snapshots_offset;
    uint8_t fixed[SNAPSHOT_FIXED];
    struct err e AUTO_ERR = ERR_INIT;
    bool ok;
    if (!h->nb_snapshots)
        return 0;
    if (qcow2_header_check_snapshots(h, &e)) {
        check_lost(c, "%s", err_text(&e));
        return 0;
    }
    for (uint32_t i = 0; i < h->nb_snapshots; i++) {
        pos = align_up(pos, 8);
        if (pos >= c->file_length || c->file_length - pos < SNAPSHOT_FIXED) {
            check_lost(c,
                       "snapshot table: snapshot %" PRIu32 " of %" PRIu32 " at offset %" PRIu64
                       " is outside the file, which ends at %" PRIu64,
                       i + 1, h->nb_snapshots, pos, c->file_length);
            return 0;
        }
        int r = disk_pread_co(c->s->file, pos, fixed, sizeof(fixed));
        if (r) {
            check_failure(c, "snapshot table at offset %" PRIu64 ": cannot read: %s", pos,
                          strerror(-r));
            return 0;
        }
        uint32_t extra = be32_load(fixed + 36);
        bool wrong = extra > SNAPSHOT_EXTRA_MAX || (h->version >= 3 && extra < SNAPSHOT_EXTRA_V3);
        c->snapshots += wrong && c->r != &c->quiet;
        if (extra > SNAPSHOT_EXTRA_MAX) {
            check_lost(c,
                       "snapshot table: snapshot %" PRIu32 " has %" PRIu32
                       " bytes of extra data, above the limit of %d",
                       i + 1, extra, SNAPSHOT_EXTRA_MAX);
            return 0;
        }
        if (h->version >= 3 && extra < SNAPSHOT_EXTRA_V3)
            check_corruption(c,
                             "snapshot table: snapshot %" PRIu32 " has %" PRIu32
                             " bytes of extra data, and version 3 wants %d",
                             i + 1, extra, SNAPSHOT_EXTRA_V3);
        r = snapshot_l1_co(c, i + 1, be64_load(fixed), be32_load(fixed + 8));
        if (r)
            return r;
        pos += SNAPSHOT_FIXED + extra + be16_load(fixed + 12) + be16_load(fixed + 14);
    }
    return check_metadata(c, "snapshot table", h->snapshots_offset, pos - h->snapshots_offset, &ok);
}

int check_inactive_co(struct check *c) {
    const struct check_tables *in = &c->inactive; /* sorted since the active ones were walked */
    for (size_t i = 0; i < in->count; i++) {
        bool active = counts_get(&c->l2, in->v[i].offset >> c->s->cluster_bits) & 1;
        int r = active ? 0 : check_inactive_l2_co(c, in->v[i].offset, in->v[i].names);
        if (r)
            return r;
    }
    return 0;
}

/* ---- bitmaps ---- */

static int bitmap_table_co(struct check *c, uint32_t number, uint64_t offset, uint64_t entries) {
    char what[64];
    bool ok;
    snprintf(what, sizeof(what), "table of bitmap %" PRIu32, number);
    if (entries > BITMAP_TABLE_BYTES_MAX / 8) {
        check_lost(c, "%s: %" PRIu64 " entries are above the limit of %d", what, entries,
                   BITMAP_TABLE_BYTES_MAX / 8);
        return 0;
    }
    int r = check_metadata(c, what, offset, entries * 8, &ok);
    snprintf(what, sizeof(what), "data of bitmap %" PRIu32, number);
    for (uint64_t i = 0; !r && ok && i < entries; i++) {
        uint64_t in_buf = i % (CHECK_BUF_BYTES / 8);
        if (!in_buf) {
            uint64_t some = min_u64(entries - i, CHECK_BUF_BYTES / 8);
            int e = disk_pread_co(c->s->file, offset + i * 8, c->buf, some * 8);
            if (e) {
                check_failure(c, "%s: cannot read its table: %s", what, strerror(-e));
                return 0;
            }
        }
        uint64_t entry = be64_load(c->buf + in_buf * 8), at = entry & QCOW2_OFFSET_MASK;
        bool inside = true;
        if (entry & ~(QCOW2_OFFSET_MASK | 1) || (at && entry & 1))
            check_corruption(c, "%s: table entry %" PRIu64 ": 0x%" PRIx64 " has reserved bits set",
                             what, i, entry);
        else if (at)
            r = check_metadata(c, what, at, c->s->cluster_size, &inside);
    }
    return r;
}

/* What makes a directory entry unusable for readers, or NULL. */
static const char *bitmap_flaw(const struct check *c, const uint8_t *entry) {
    uint64_t entries = be32_load(entry + 8), bits;
    uint32_t flags = be32_load(entry + 12), granularity = entry[17], name = be16_load(entry + 18);
    if (entry[16] != 1)
        return "its type is not 1";
    if (flags & ~(uint32_t)7)
        return "reserved flags are set";
    if (granularity < 9 || granularity > 31)
        return "its granularity is not between 2^9 and 2^31 bytes";
    if (!name || name > BITMAP_NAME_MAX)
        return "its name does not have 1 to 1023 bytes";
    if (!be64_load(entry) || !entries)
        return "it has no table";
    bits = entries << (c->s->cluster_bits + 3);
    if (!(flags & BITMAP_IN_USE) && bits < div_up(c->s->h.size, (uint64_t)1 << granularity))
        return "it is too short for the image";
    return NULL;
}

/* One directory entry at *pos, which moves behind it; *ok: the next one can be found. */
static int bitmap_entry_co(struct check *c, uint32_t number, uint64_t *pos, uint64_t end,
                           bool *ok) {
    uint8_t entry[BITMAP_FIXED];
    *ok = false;
    if (end - *pos < BITMAP_FIXED) {
        check_lost(c, "bitmap directory: its %" PRIu64 " bytes end before bitmap %" PRIu32,
                   c->s->h.bitmaps_dir_size, number);
        return 0;
    }
    int r = disk_pread_co(c->s->file, *pos, entry, sizeof(entry));
    if (r) {
        check_failure(c, "bitmap directory at offset %" PRIu64 ": cannot read: %s", *pos,
                      strerror(-r));
        return 0;
    }
    uint64_t length = BITMAP_FIXED + (uint64_t)be16_load(entry + 18) + be32_load(entry + 20);
    length = align_up(length, 8);
    if (length > end - *pos) {
        check_lost(
            c, "bitmap directory: bitmap %" PRIu32 " of %" PRIu64 " bytes reaches beyond its end",
            number, length);
        return 0;
    }
    *pos += length;
    *ok = true;
    const char *flaw = bitmap_flaw(c, entry);
    if (flaw) {
        check_lost(c, "bitmap %" PRIu32 ": %s", number, flaw);
        return 0;
    }
    return bitmap_table_co(c, number, be64_load(entry), be32_load(entry + 8));
}

int check_bitmaps_co(struct check *c) {
    const struct qcow2_header *h = &c->s->h;
    uint64_t pos = h->bitmaps_dir_offset, end;
    bool ok;
    /* Without the autoclear bit the extension is stale, and its clusters are leaks. */
    if (!h->has_bitmaps || !(h->autoclear & QCOW2_AUTOCLEAR_BITMAPS))
        return 0;
    if (!h->bitmaps_count || h->bitmaps_count > BITMAPS_MAX ||
        !ck_add(pos, h->bitmaps_dir_size, &end)) {
        check_lost(c,
                   "bitmap directory: %" PRIu32 " bitmaps in %" PRIu64
                   " bytes, where 1 to %d are possible",
                   h->bitmaps_count, h->bitmaps_dir_size, BITMAPS_MAX);
        return 0;
    }
    int r = check_metadata(c, "bitmap directory", pos, h->bitmaps_dir_size, &ok);
    for (uint32_t i = 0; !r && ok && i < h->bitmaps_count; i++)
        r = bitmap_entry_co(c, i + 1, &pos, end, &ok);
    if (!r && ok && pos != end)
        check_corruption(
            c, "bitmap directory: %" PRIu32 " bitmaps take %" PRIu64 " of its %" PRIu64 " bytes",
            h->bitmaps_count, pos - h->bitmaps_dir_offset, h->bitmaps_dir_size);
    return r;
}
