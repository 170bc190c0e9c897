/* SPDX-License-Identifier: MIT */
/*
 * VHDX: growth.
 *
 * A BAT that has no room for the entries goes to a new place behind all blocks; the region tables,
 * which do not pass the log, then name it, first the one that readers do not use.  Both places hold
 * the same entries until both tables name the new one; the old one stays unused.  The disk's size,
 * an item of the metadata, passes the log and comes last.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"
#include "format/vhdx/vhdx.h"

#define PIECE ((uint32_t)(256 * KIB))

static int check_growth(const struct vhdx *s, uint64_t size, struct err *e) {
    if (size % s->m.logical_sector || size > VHDX_SIZE_MAX)
        return err_set(e, size > VHDX_SIZE_MAX ? EFBIG : EINVAL,
                       "size %" PRIu64 " is not whole sectors of %" PRIu32 " up to %" PRIu64
                       " bytes (64 TiB)",
                       size, s->m.logical_sector, VHDX_SIZE_MAX);
    return 0;
}

static int copy_co(struct node *file, uint64_t from, uint64_t to, uint64_t bytes, uint8_t *buf) {
    int r = 0;
    for (uint64_t done = 0; !r && done < bytes; done += PIECE) {
        uint32_t n = (uint32_t)min_u64(PIECE, bytes - done);
        r = disk_pread_co(file, from + done, buf, n);
        if (!r)
            r = disk_pwrite_co(file, to + done, buf, n);
    }
    return r;
}

/* Both region tables name the BAT there. */
static int name_bat_co(struct vhdx *s, const struct vhdx_range *bat, uint8_t *buf) {
    int used = s->regions_ok[0] ? 0 : 1;
    int r = disk_pread_co(s->file, VHDX_REGIONS_AT(used), buf, VHDX_REGION_TABLE_BYTES);
    if (r < 0)
        return r;
    vhdx_regions_move_bat(buf, bat);
    for (int i = 0; !r && i < 2; i++) {
        int which = i ? used : 1 - used;
        r = disk_pwrite_co(s->file, VHDX_REGIONS_AT(which), buf, VHDX_REGION_TABLE_BYTES);
        if (!r)
            r = disk_flush_co(s->file);
        if (!r)
            s->regions_ok[which] = true;
    }
    return r;
}

static int move_bat_co(struct vhdx *s, uint64_t entries) {
    uint8_t *buf = buf_get(PIECE);
    struct vhdx_range bat = {s->next, align_up(entries * 8, VHDX_MIB)};
    int r = buf ? vhdx_flush_co(s->node) : -ENOMEM;
    if (!r)
        r = pages_forget_all(&s->pages);
    if (!r && s->file->size < bat.offset + bat.length)
        r = disk_resize_co(s->file, bat.offset + bat.length, PREALLOC_OFF, NULL);
    if (!r && !(s->file->storage_flags & STORAGE_ZERO_INIT))
        r = disk_zero_co(s->file, bat.offset, bat.length, 0);
    if (!r)
        r = copy_co(s->file, s->r.bat.offset, bat.offset, s->r.bat.length, buf);
    if (!r)
        r = disk_flush_co(s->file);
    if (!r)
        r = name_bat_co(s, &bat, buf);
    if (!r) {
        s->r.bat = bat;
        s->next = bat.offset + bat.length;
    }
    buf_put(buf, PIECE);
    return r;
}

/* Entry `index` says that its block has never been written; in a fixed image it has room. */
static int clear_entry_co(struct vhdx *s, uint64_t index, uint64_t entry) {
    struct page *page;
    uint8_t *at;
    uint32_t left;
    int r = pages_crowded(&s->pages) ? vhdx_flush_co(s->node) : 0;
    if (!r)
        r = vhdx_bat_page_co(s, index, &page, &at, &left);
    if (!r && le64_load(at) != entry) {
        pages_modify(&s->pages, page);
        le64_store(at, entry);
    }
    return r;
}

/* Whatever writers have left behind the last entry in use. */
static int clear_entries_co(struct vhdx *s, uint64_t old_blocks, uint64_t blocks) {
    uint64_t bs = s->m.block_size, end = s->next + (blocks - old_blocks) * bs;
    int r = 0;
    if (s->m.fixed && s->file->size < end)
        r = disk_resize_co(s->file, end, PREALLOC_OFF, NULL);
    for (uint64_t block = old_blocks; !r && block < blocks; block++) {
        uint64_t entry = s->m.fixed ? s->next | VHDX_PRESENT : VHDX_NOT_PRESENT;
        if (block % s->ratio == 0) /* a chunk that is new has no bitmap */
            r = clear_entry_co(s, vhdx_bitmap_index(s->ratio, block), 0);
        if (!r)
            r = clear_entry_co(s, vhdx_entry_index(s->ratio, block), entry);
        if (!r && s->m.fixed)
            s->next += bs;
    }
    return r;
}

int vhdx_reach_co(struct node *n, uint64_t size, struct err *e) {
    struct vhdx *s = vhdx_of(n);
    uint64_t blocks = div_up(size, s->m.block_size), entries = vhdx_bat_entries(&s->m, size);
    uint64_t old = div_up(n->size, s->m.block_size);
    int r = check_growth(s, size, e);
    if (r)
        return r;
    r = vhdx_begin_co(s);
    if (!r)
        r = vhdx_scan_co(s);
    if (!r && entries * 8 > s->r.bat.length)
        r = move_bat_co(s, entries);
    if (!r && blocks > old)
        r = clear_entries_co(s, old, blocks);
    return r < 0 ? err_errno(e, -r, "making the BAT longer") : 0;
}

/* The eight bytes of the item may lie in two pages. */
static int store_size_co(struct vhdx *s, uint64_t size) {
    uint8_t bytes[8];
    le64_store(bytes, size);
    for (int i = 0; i < 8; i++) {
        uint64_t at = s->m.size_at + (uint64_t)i;
        struct page *page;
        int r = pages_get_co(&s->pages, align_down(at, PAGE_BYTES), PAGE_BYTES, 0, &page);
        if (r < 0)
            return r;
        pages_modify(&s->pages, page);
        page->data[at % PAGE_BYTES] = bytes[i];
    }
    return 0;
}

int vhdx_resize_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    struct vhdx *s = vhdx_of(n);
    uint64_t old = n->size;
    int r = check_growth(s, size, e);
    if (r)
        return r;
    if (size < old)
        return err_set(e, ENOTSUP, "a VHDX image cannot shrink; convert it instead");
    if (prealloc != PREALLOC_OFF)
        return err_set(e, ENOTSUP, "a VHDX image grows without preallocation only");
    if (size == old)
        return 0;
    r = vhdx_begin_co(s);
    if (!r)
        r = store_size_co(s, size);
    if (!r)
        r = vhdx_flush_co(n);
    if (r < 0) {
        store_size_co(s, old);
        return err_errno(e, -r, "writing the disk's size");
    }
    n->size = s->m.size = size;
    return 0;
}
