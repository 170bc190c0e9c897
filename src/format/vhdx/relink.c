/* SPDX-License-Identifier: MIT */
/*
 * VHDX: another parent, and an image that a commit has emptied.
 *
 * The metadata region:   | table, 64 KiB | items ... |
 *
 * A new parent locator takes the place of the old one when nothing else lies there, or goes behind
 * all items.  Locator, its entry of the table and the flag that there is a parent are few pages:
 * one flush puts all of them into one entry of the log, so that a cut finds the old parent or the
 * new one.
 *
 * After a commit all that was here is in the parent, whose data have another GUID since.  That GUID
 * is recorded first and becomes stable; then the blocks lose their names.  A cut in between leaves
 * an image that reads the same.  The file gets shorter when the log does not count any more: its
 * entries say how long the file has to be.
 *
 * Blocks that are here in part, which other writers make, have no meaning without a parent: such an
 * image keeps the one that it has, or gets another.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/plant.h"
#include "disk/io.h"
#include "disk/open.h"
#include "format/utf16.h"
#include "format/vhdx/vhdx.h"

#define TABLE_BYTES VHDX_METADATA_TABLE_BYTES
#define SCAN_BYTES ((uint32_t)MIB)

/* Into tables and items, through the log; equal bytes make no page dirty. */
static int store_co(struct vhdx *s, uint64_t at, const uint8_t *from, size_t length) {
    while (length) {
        size_t in = at % PAGE_BYTES, n = (size_t)min_u64(length, PAGE_BYTES - in);
        struct page *page;
        int r = pages_get_co(&s->pages, at - in, PAGE_BYTES, 0, &page);
        if (r < 0)
            return r;
        if (memcmp(page->data + in, from, n)) {
            pages_modify(&s->pages, page);
            memcpy(page->data + in, from, n);
        }
        at += n;
        from += n;
        length -= n;
    }
    return 0;
}

/* ---------------------------------------------------------------- what changes */

struct relink {
    struct vhdx *s;
    uint8_t *table, *old_table, *locator, *old_locator; /* TABLE_BYTES each */
    uint32_t bytes;                                     /* of the new locator; 0: no parent */
    struct vhdx_range place;                            /* of it, in the region */
    uint64_t flags_at;                                  /* of the file parameters, in the file */
    uint8_t flags[4], old_flags[4];
};

static void relink_free(struct relink *k) {
    buf_put(k->table, TABLE_BYTES);
    buf_put(k->old_table, TABLE_BYTES);
    buf_put(k->locator, TABLE_BYTES);
    buf_put(k->old_locator, TABLE_BYTES);
}

static int relink_init(struct relink *k, struct vhdx *s) {
    *k = (struct relink){.s = s,
                         .table = buf_get(TABLE_BYTES),
                         .old_table = buf_get(TABLE_BYTES),
                         .locator = buf_get(TABLE_BYTES),
                         .old_locator = buf_get(TABLE_BYTES)};
    return k->table && k->old_table && k->locator && k->old_locator ? 0 : -ENOMEM;
}

/* The table as it is and as it is to be.  Nothing is dirty. */
static int make_table_co(struct relink *k, struct err *e) {
    struct vhdx *s = k->s;
    const struct vhdx_range *region = &s->r.metadata;
    struct vhdx_range items[VHDX_ITEMS];
    int r = disk_pread_co(s->file, region->offset, k->old_table, TABLE_BYTES);
    if (r < 0)
        return err_errno(e, -r, "reading the metadata table");
    r = vhdx_items_parse(k->old_table, region->length, items, e);
    if (r)
        return r;
    memcpy(k->table, k->old_table, TABLE_BYTES);
    if (vhdx_items_place_locator(k->table, region->length, k->bytes, &k->place) < 0)
        return err_set(e, ENOSPC,
                       "no room for a parent locator of %" PRIu32
                       " bytes in the metadata region (%" PRIu64 " bytes)",
                       k->bytes, region->length);
    k->flags_at = region->offset + items[VHDX_ITEM_PARAMETERS].offset + 4;
    r = disk_pread_co(s->file, k->flags_at, k->old_flags, 4);
    if (!r && k->bytes)
        r = disk_pread_co(s->file, region->offset + k->place.offset, k->old_locator, k->bytes);
    le32_store(k->flags, (le32_load(k->old_flags) & ~UINT32_C(2)) | (k->bytes ? 2 : 0));
    return r < 0 ? err_errno(e, -r, "reading the metadata") : 0;
}

static int store_all_co(struct relink *k, bool new) {
    uint64_t at = k->s->r.metadata.offset;
    int r = store_co(k->s, at, new ? k->table : k->old_table, TABLE_BYTES);
    if (!r && PLANTED(VHDX_RELINK_IN_PARTS))
        r = vhdx_flush_co(k->s->node);
    if (!r && k->bytes)
        r = store_co(k->s, at + k->place.offset, new ? k->locator : k->old_locator, k->bytes);
    return r ? r : store_co(k->s, k->flags_at, new ? k->flags : k->old_flags, 4);
}

/* ---------------------------------------------------------------- another parent */

/* No block and no bitmap is there that only a parent gives a meaning. */
static int check_no_parts_co(struct vhdx *s, struct err *e) {
    uint64_t entries = vhdx_bat_entries(&s->m, s->m.size), per = s->ratio + UINT64_C(1);
    uint8_t *buf = buf_get(SCAN_BYTES);
    int r = buf ? 0 : -ENOMEM;
    bool parts = false;
    for (uint64_t index = 0; !r && !parts && index < entries; index += SCAN_BYTES / 8) {
        uint32_t count = (uint32_t)min_u64(SCAN_BYTES / 8, entries - index);
        r = disk_pread_co(s->file, s->r.bat.offset + index * 8, buf, (size_t)count * 8);
        for (uint32_t i = 0; !r && i < count; i++) {
            unsigned state = le64_load(buf + (size_t)i * 8) & VHDX_STATE_MASK;
            parts |= state == VHDX_PARTIAL || ((index + i) % per == s->ratio && state);
        }
    }
    buf_put(buf, SCAN_BYTES);
    if (r < 0)
        return err_errno(e, -r, "reading the BAT");
    if (!parts)
        return 0;
    err_set(e, ENOTSUP, "blocks of this image are there in part, which needs a parent");
    err_hint(e, "convert it to a new image");
    return -ENOTSUP;
}

/* A differencing image has the entries of all bitmaps, the last chunk's too. */
static int lengthen_bat_co(struct vhdx *s, struct err *e) {
    static const uint8_t zeros[8];
    struct vhdx_metadata m = s->m;
    uint64_t have = vhdx_bat_entries(&m, m.size);
    m.has_parent = true;
    uint64_t want = vhdx_bat_entries(&m, m.size);
    if (s->m.fixed)
        return err_set(e, ENOTSUP, "a fixed image cannot have a parent");
    if (want * 8 > s->r.bat.length)
        return err_set(e, ENOTSUP,
                       "the BAT has room for %" PRIu64 " entries, and needs %" PRIu64
                       " with a parent",
                       s->r.bat.length / 8, want);
    int r = 0;
    for (uint64_t i = have; !r && i < want; i++) {
        r = pages_crowded(&s->pages) ? vhdx_flush_co(s->node) : 0;
        if (!r)
            r = store_co(s, s->r.bat.offset + i * 8, zeros, 8);
    }
    if (!r)
        r = vhdx_flush_co(s->node);
    return r < 0 ? err_errno(e, -r, "making the BAT longer") : 0;
}

static int prepare_co(struct relink *k, const char *name, struct err *e) {
    struct vhdx *s = k->s;
    int r = name ? vhdx_locator_make_co(s->node->filename, name, k->locator, &k->bytes, e) : 0;
    if (!r && (r = vhdx_flush_co(s->node)) < 0)
        err_errno(e, -r, "flushing");
    if (!r && !name)
        r = check_no_parts_co(s, e);
    if (!r)
        r = make_table_co(k, e);
    return !r && name && !s->m.has_parent ? lengthen_bat_co(s, e) : r;
}

static int change_parent_co(struct vhdx *s, const char *name, struct err *e) {
    struct relink k;
    int r = relink_init(&k, s);
    r = r < 0 ? err_set(e, ENOMEM, "no memory for the metadata") : prepare_co(&k, name, e);
    if (!r) {
        r = store_all_co(&k, true);
        if (!r)
            r = vhdx_flush_co(s->node);
        if (r < 0) {
            store_all_co(&k, false);
            err_errno(e, -r, "writing the metadata");
        }
    }
    if (!r) {
        s->m.has_parent = name != NULL;
        s->m.locator = (struct vhdx_range){name ? s->r.metadata.offset + k.place.offset : 0,
                                           name ? k.bytes : 0};
        memset(&s->linkage, 0, sizeof(s->linkage));
        memset(&s->linkage2, 0, sizeof(s->linkage2));
        if (name)
            vhdx_locator_linkage(k.locator, k.bytes, &s->linkage);
    }
    relink_free(&k);
    return r;
}

int vhdx_set_backing_co(struct node *n, const char *name, const char *format, struct err *e) {
    struct vhdx *s = vhdx_of(n);
    if (name && format && strcmp(format, "vhdx"))
        return err_set(e, ENOTSUP, "the parent of a VHDX image is a VHDX image, not '%s'", format);
    if (!name && !s->m.has_parent)
        return 0;
    char *own = name ? strdup(name) : NULL, *own_format = name ? strdup("vhdx") : NULL;
    int r = name && (!own || !own_format) ? err_set(e, ENOMEM, "no memory for the name")
                                          : change_parent_co(s, name, e);
    if (r) {
        free(own);
        free(own_format);
        return r;
    }
    free(n->backing_name);
    free(n->backing_format);
    n->backing_name = own;
    n->backing_format = own_format;
    return 0;
}

/* ---------------------------------------------------------------- after a commit */

/* The value alone changes, so that all names of the parent stay. */
static int patch_linkage_co(struct vhdx *s, uint8_t *buf, const struct vhdx_guid *g,
                            struct err *e) {
    const struct vhdx_range *at = &s->m.locator;
    char id[37], text[40];
    uint8_t value[80];
    uint32_t place, bytes;
    int r = disk_pread_co(s->file, at->offset, buf, at->length);
    if (r < 0)
        return err_errno(e, -r, "reading the parent locator");
    vhdx_guid_text(g, id);
    if (!vhdx_locator_value(buf, (uint32_t)at->length, "parent_linkage", &place, &bytes) ||
        (bytes != 76 && bytes != 72))
        return err_set(e, ENOTSUP, "the parent locator has a parent_linkage of an unusual form");
    snprintf(text, sizeof(text), bytes == 76 ? "{%s}" : "%s", id);
    utf16_from_path(text, false, value, sizeof(value));
    r = store_co(s, at->offset + place, value, bytes);
    if (!r)
        r = vhdx_flush_co(s->node);
    if (r < 0) {
        store_co(s, at->offset + place, buf + place, bytes);
        return err_errno(e, -r, "writing the parent locator");
    }
    s->linkage = *g;
    return 0;
}

/* The parent as it is now. */
static int follow_parent_co(struct vhdx *s, struct err *e) {
    struct node *below = s->node->backing;
    if (!s->m.has_parent || !below || below->drv != s->node->drv ||
        vhdx_guid_same(&s->linkage, &vhdx_of(below)->h.data_write))
        return 0;
    uint8_t *buf = buf_get(s->m.locator.length);
    int r = buf ? patch_linkage_co(s, buf, &vhdx_of(below)->h.data_write, e)
                : err_set(e, ENOMEM, "no memory for the parent locator");
    buf_put(buf, s->m.locator.length);
    return r;
}

static int clear_bat_co(struct vhdx *s) {
    uint64_t entries = vhdx_bat_entries(&s->m, s->m.size);
    uint32_t left = 0;
    int r = 0;
    for (uint64_t index = 0; !r && index < entries; index += left) {
        struct page *page;
        uint8_t *at = NULL;
        r = pages_crowded(&s->pages) ? vhdx_flush_co(s->node) : 0;
        if (!r)
            r = vhdx_bat_page_co(s, index, &page, &at, &left);
        left = (uint32_t)min_u64(left, entries - index);
        if (!r && !bytes_are_zero(at, (size_t)left * 8)) {
            pages_modify(&s->pages, page);
            memset(at, 0, (size_t)left * 8);
        }
    }
    return r ? r : vhdx_flush_co(s->node);
}

/* No block is named: the log ends, and the file is cut behind all regions. */
static int cut_co(struct vhdx *s) {
    uint64_t end = max_u64(VHDX_MIB, s->h.log_offset + s->h.log_length);
    end = max_u64(end, s->r.bat.offset + s->r.bat.length);
    end = max_u64(end, s->r.metadata.offset + s->r.metadata.length);
    for (uint32_t i = 0; i < s->r.other_count; i++)
        if (s->r.others[i].offset < s->file->size)
            end = max_u64(end, s->r.others[i].offset + s->r.others[i].length);
    s->next = align_up(end, VHDX_MIB);
    s->scanned = true;
    s->spare_count = 0;
    int r = vhdx_end_co(s);
    if (s->file->size > s->next) /* a device keeps its size, and what lies there */
        s->next = align_up(s->file->size, VHDX_MIB);
    return s->begun ? r : 0;
}

int vhdx_empty_co(struct node *n, struct err *e) {
    struct vhdx *s = vhdx_of(n);
    if (s->m.fixed)
        return err_set(e, ENOTSUP, "a fixed image cannot be emptied");
    int r = vhdx_flush_co(n);
    if (r < 0)
        return err_errno(e, -r, "flushing");
    r = follow_parent_co(s, e);
    if (r)
        return r;
    r = clear_bat_co(s);
    if (!r)
        r = cut_co(s);
    return r < 0 ? err_errno(e, -r, "clearing the BAT") : 0;
}
