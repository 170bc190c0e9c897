/* SPDX-License-Identifier: MIT */
/* VHD: the map, new blocks, and the ordered write-back. */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/plant.h"
#include "disk/io.h"
#include "format/in_place.h"
#include "format/vpc/vpc.h"

#define SCAN_BYTES ((uint32_t)MIB)

static int bat_page_co(struct vpc *s, uint32_t block, struct page **page, uint8_t **at,
                       uint32_t *left) {
    uint32_t start = block / (PAGE_BYTES / 4) * (PAGE_BYTES / 4);
    uint32_t entries = (uint32_t)min_u64(PAGE_BYTES / 4, s->h.entries - start);
    int r = pages_get_co(&s->pages, s->h.bat_offset + (uint64_t)start * 4, entries * 4,
                         VPC_LEVEL_BAT, page);
    if (r < 0)
        return r;
    *at = (*page)->data + (block - start) * 4;
    *left = entries - (block - start);
    return 0;
}

/* The page of a block's bitmap with the bit of `sector`; *first: the first sector of the page. */
static int bitmap_page_co(struct vpc *s, uint64_t host, uint32_t sector, bool fresh,
                          struct page **page, uint32_t *first) {
    uint32_t start = sector / 8 / PAGE_BYTES * PAGE_BYTES;
    uint32_t bytes = (uint32_t)min_u64(PAGE_BYTES, s->bitmap_bytes - start);
    *first = start * 8;
    return fresh ? pages_get_new(&s->pages, host + start, bytes, VPC_LEVEL_BITMAP, page)
                 : pages_get_co(&s->pages, host + start, bytes, VPC_LEVEL_BITMAP, page);
}

static bool bit_of(const uint8_t *bitmap, uint32_t sector) {
    return bitmap[sector / 8] & 0x80 >> sector % 8;
}

static bool is_full(const struct vpc *s, uint32_t block) {
    return s->full[block >> 6] >> (block & 63) & 1;
}

static bool entry_is_sane(const struct vpc *s, uint32_t entry) {
    return entry && (uint64_t)entry * VPC_SECTOR + s->bitmap_bytes < s->file->size;
}

static int entry_co(struct vpc *s, uint32_t block, uint32_t *entry) {
    struct page *page;
    uint8_t *at = NULL;
    uint32_t left;
    int r = bat_page_co(s, block, &page, &at, &left);
    if (r < 0)
        return r;
    *entry = be32_load(at);
    return *entry != VPC_UNUSED && !entry_is_sane(s, *entry) ? -EIO : 0;
}

/*
 * Sectors from `sector` of a block whose bits are equal, at most `most`; *set: their bit.  Learns
 * which bitmaps are all ones.
 */
static int bits_co(struct vpc *s, uint32_t block, uint32_t entry, uint32_t sector, uint32_t most,
                   bool *set, uint32_t *run) {
    uint32_t sectors = s->h.block_size / VPC_SECTOR, first = 0, n = 0;
    struct page *page;
    *set = true;
    *run = most;
    if (is_full(s, block))
        return 0;
    while (n < most) {
        int r = bitmap_page_co(s, (uint64_t)entry * VPC_SECTOR, sector + n, false, &page, &first);
        if (r < 0)
            return r;
        uint32_t end = (uint32_t)min_u64(sectors, first + page->length * UINT64_C(8));
        if (!n)
            *set = bit_of(page->data, sector - first);
        while (n < most && sector + n < end && bit_of(page->data, sector + n - first) == *set)
            n++;
        if (sector + n < end)
            break;
    }
    *run = n;
    if (*set && !sector && n == sectors)
        s->full[block >> 6] |= UINT64_C(1) << (block & 63);
    return 0;
}

int vpc_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    struct vpc *s = vpc_of(n);
    if (s->fixed) {
        *out = (struct extent){.length = length,
                               .kind = EXTENT_DATA,
                               .flags = EXTENT_IN_PLACE,
                               .storage = s->file,
                               .host_offset = offset};
        return 0;
    }
    uint32_t bs = s->h.block_size, block = (uint32_t)(offset / bs), in = offset % bs, left, run = 1;
    struct page *page;
    uint8_t *at = NULL;
    bool set;
    int r = bat_page_co(s, block, &page, &at, &left);
    if (r < 0)
        return r;
    uint32_t entry = be32_load(at);
    if (entry == VPC_UNUSED) {
        while (run < left && (uint64_t)run * bs < in + length &&
               be32_load(at + run * 4) == VPC_UNUSED)
            run++;
        *out = (struct extent){.length = min_u64(length, (uint64_t)run * bs - in),
                               .kind = EXTENT_HOLE};
        return 0;
    }
    if (!entry_is_sane(s, entry))
        return -EIO;
    length = min_u64(length, bs - in);
    uint32_t sector = in / VPC_SECTOR, most = (uint32_t)div_up(in + length, VPC_SECTOR) - sector;
    /* A whole bitmap is looked at while it is here, so that later calls need none. */
    if (!is_full(s, block)) {
        r = bits_co(s, block, entry, 0, bs / VPC_SECTOR, &set, &run);
        if (!r && !is_full(s, block))
            r = bits_co(s, block, entry, sector, most, &set, &run);
        if (r < 0)
            return r;
    }
    if (is_full(s, block)) {
        set = true;
        run = most;
    }
    *out = (struct extent){
        .length = min_u64(length, (uint64_t)(sector + run) * VPC_SECTOR - in),
        .kind = set                     ? EXTENT_DATA
                : s->f.type == VPC_DIFF ? EXTENT_HOLE
                                        : EXTENT_ZERO,
    };
    if (set) {
        out->flags = EXTENT_IN_PLACE;
        out->storage = s->file;
        out->host_offset = (uint64_t)entry * VPC_SECTOR + s->bitmap_bytes + in;
    }
    return 0;
}

/* ---------------------------------------------------------------- room */

/* Where the header, the table and the parent's names end. */
static uint64_t metadata_end(const struct vpc *s) {
    uint64_t end = max_u64(s->f.data_offset + VPC_HEADER_BYTES,
                           s->h.bat_offset + align_up((uint64_t)s->h.entries * 4, VPC_SECTOR));
    for (int i = 0; i < VPC_LOCATORS; i++) {
        const uint8_t *l = s->header + VPC_AT_LOCATORS + i * 24;
        uint64_t at = be64_load(l + 16), bytes = be32_load(l + 8);
        if (be32_load(l) && at <= s->file->size && bytes <= s->file->size - at)
            end = max_u64(end, align_up(at + bytes, VPC_SECTOR));
    }
    return end;
}

int vpc_scan_co(struct vpc *s) {
    uint64_t end = metadata_end(s), blocks = div_up(s->node->size, s->h.block_size);
    uint8_t *buf = buf_get(SCAN_BYTES);
    int r = buf ? 0 : -ENOMEM;
    for (uint64_t block = 0; !r && block < blocks;) {
        uint32_t count = (uint32_t)min_u64(SCAN_BYTES / 4, blocks - block);
        r = disk_pread_co(s->file, s->h.bat_offset + block * 4, buf, count * 4);
        for (uint32_t i = 0; !r && i < count; i++) {
            uint32_t entry = be32_load(buf + i * 4);
            if (entry != VPC_UNUSED && entry_is_sane(s, entry))
                end =
                    max_u64(end, (uint64_t)entry * VPC_SECTOR + s->bitmap_bytes + s->h.block_size);
        }
        block += count;
    }
    buf_put(buf, SCAN_BYTES);
    if (!r) {
        s->end = end;
        s->scanned = true;
        s->footer_moved = s->file->size != end + VPC_FOOTER_BYTES;
    }
    return r;
}

/* A block behind all others; *host: of its bitmap. */
static int take_block_co(struct vpc *s, uint64_t *host) {
    int r = 0;
    task_mutex_lock_co(&s->alloc_lock);
    if (!s->scanned)
        r = vpc_scan_co(s);
    if (!r && s->end / VPC_SECTOR >= VPC_UNUSED)
        r = -EFBIG;
    if (!r) {
        *host = s->end;
        s->end += (uint64_t)s->bitmap_bytes + s->h.block_size;
        s->footer_moved = true;
    }
    task_mutex_unlock(&s->alloc_lock);
    return r;
}

/* The bits of sectors [sector, +count) of the block at `host` are set. */
static int set_bits_co(struct vpc *s, uint64_t host, uint32_t sector, uint32_t count) {
    while (count) {
        struct page *page;
        uint32_t first;
        int r = bitmap_page_co(s, host, sector, false, &page, &first);
        if (r < 0)
            return r;
        pages_modify(&s->pages, page);
        for (; count && sector < first + page->length * 8; sector++, count--)
            page->data[(sector - first) / 8] |= (uint8_t)(0x80 >> sector % 8);
    }
    return 0;
}

/* A new bitmap, every byte `fill`. */
static int make_bitmap_co(struct vpc *s, uint64_t host, uint8_t fill) {
    struct page *page;
    uint32_t first;
    for (uint32_t sector = 0; sector < s->bitmap_bytes * 8; sector += PAGE_BYTES * 8) {
        int r = bitmap_page_co(s, host, sector, true, &page, &first);
        if (r < 0)
            return r;
        pages_modify(&s->pages, page);
        memset(page->data, fill, page->length);
    }
    return 0;
}

static int set_entry_co(struct vpc *s, uint32_t block, uint64_t host) {
    struct page *page;
    uint8_t *at = NULL;
    uint32_t left;
    int r = bat_page_co(s, block, &page, &at, &left);
    if (r < 0)
        return r;
    pages_modify(&s->pages, page);
    be32_store(at, (uint32_t)(host / VPC_SECTOR));
    return 0;
}

int vpc_forget_blocks_co(struct vpc *s, uint32_t from, uint32_t to) {
    while (from < to) {
        struct page *page;
        uint8_t *at = NULL;
        uint32_t left = 0;
        int r = bat_page_co(s, from, &page, &at, &left);
        if (r < 0)
            return r;
        for (; left && from < to; left--, from++, at += 4)
            if (be32_load(at) != VPC_UNUSED) {
                pages_modify(&s->pages, page);
                be32_store(at, VPC_UNUSED);
            }
    }
    return 0;
}

/* Sectors of an allocated block that were never written become zeros, so that all bits are set. */
static int fill_block_co(struct vpc *s, uint32_t block, uint32_t entry) {
    uint32_t sectors = s->h.block_size / VPC_SECTOR, run;
    uint64_t host = (uint64_t)entry * VPC_SECTOR;
    bool set;
    for (uint32_t sector = 0; sector < sectors; sector += run) {
        int r = bits_co(s, block, entry, sector, sectors - sector, &set, &run);
        if (!r && !set)
            r = disk_zero_co(s->file, host + s->bitmap_bytes + (uint64_t)sector * VPC_SECTOR,
                             (uint64_t)run * VPC_SECTOR, 0);
        if (r < 0)
            return r;
    }
    return set_bits_co(s, host, 0, sectors);
}

/* A differencing image: room for sectors; a new block begins without any. */
static int place_sectors_co(struct vpc *s, uint64_t offset, uint64_t length, uint32_t entry,
                            struct placement *out) {
    uint32_t in = offset % s->h.block_size, block = (uint32_t)(offset / s->h.block_size);
    uint64_t host = (uint64_t)entry * VPC_SECTOR;
    int r = 0;
    if (entry == VPC_UNUSED) {
        task_mutex_lock_co(&s->flush_lock); /* requests on other sectors may want the same block */
        r = entry_co(s, block, &entry);
        if (!r && entry == VPC_UNUSED) {
            r = take_block_co(s, &host);
            if (!r)
                r = make_bitmap_co(s, host, 0);
            if (!r)
                r = disk_resize_co(s->file, max_u64(s->file->size, host + s->bitmap_bytes + 1),
                                   PREALLOC_OFF, NULL);
            if (!r)
                r = set_entry_co(s, block, host);
        } else {
            host = (uint64_t)entry * VPC_SECTOR;
        }
        task_mutex_unlock(&s->flush_lock);
    }
    if (r < 0)
        return r;
    out->length = min_u64(length, s->h.block_size - in);
    out->host_offset = host + s->bitmap_bytes + in;
    out->head = in % VPC_SECTOR;
    out->tail = (uint32_t)((VPC_SECTOR - (in + out->length) % VPC_SECTOR) % VPC_SECTOR);
    out->is_new = true;
    out->cookie[0] = host;
    return 0;
}

int vpc_place_co(struct node *n, uint64_t offset, uint64_t length, unsigned flags,
                 uint32_t coded_length, struct placement *out) {
    struct vpc *s = vpc_of(n);
    uint32_t bs = s->h.block_size, entry = VPC_UNUSED;
    struct extent x;
    if (flags & PLACE_CODED)
        return -ENOTSUP;
    int r = !s->fixed && pages_crowded(&s->pages) ? vpc_flush_co(n) : 0;
    if (!r)
        r = vpc_map_co(n, offset, length, &x);
    if (!r && x.kind != EXTENT_DATA)
        r = entry_co(s, (uint32_t)(offset / bs), &entry);
    if (!r && x.kind == EXTENT_ZERO) {
        r = fill_block_co(s, (uint32_t)(offset / bs), entry);
        if (!r)
            r = vpc_map_co(n, offset, length, &x);
    }
    if (r < 0)
        return r;
    *out = (struct placement){.offset = offset, .length = x.length, .storage = s->file};
    if (x.kind == EXTENT_DATA) {
        out->host_offset = x.host_offset;
        return 0;
    }
    if (s->f.type == VPC_DIFF)
        return place_sectors_co(s, offset, x.length, entry, out);
    uint64_t file_end = s->file->size, host;
    uint32_t in = offset % bs;
    r = take_block_co(s, &host);
    if (r < 0)
        return r;
    out->length = min_u64(x.length, bs - in);
    out->host_offset = host + s->bitmap_bytes + in;
    out->head = in;
    out->tail = (uint32_t)(bs - in - out->length);
    out->is_new = true;
    out->reads_zero =
        s->file->storage_flags & STORAGE_ZERO_INIT && host + s->bitmap_bytes >= file_end;
    out->cookie[0] = host;
    return 0;
}

int vpc_publish_co(struct node *n, const struct placement *p) {
    struct vpc *s = vpc_of(n);
    if (!p->is_new)
        return 0;
    uint32_t block = (uint32_t)(p->offset / s->h.block_size);
    if (s->f.type == VPC_DIFF) {
        uint32_t in = p->offset % s->h.block_size;
        return set_bits_co(s, p->cookie[0], in / VPC_SECTOR,
                           (uint32_t)div_up(p->length + in % VPC_SECTOR, VPC_SECTOR));
    }
    int r = make_bitmap_co(s, p->cookie[0], 0xff);
    if (!r)
        r = set_entry_co(s, block, p->cookie[0]);
    if (!r)
        s->full[block >> 6] |= UINT64_C(1) << (block & 63);
    return r;
}

/* The block stays without a name, unless it is the last. */
void vpc_abandon(struct node *n, const struct placement *p) {
    struct vpc *s = vpc_of(n);
    if (p->is_new && s->f.type != VPC_DIFF &&
        p->cookie[0] + s->bitmap_bytes + s->h.block_size == s->end)
        s->end = p->cookie[0];
}

int vpc_set_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    struct vpc *s = vpc_of(n);
    zero_flags = in_place_zero_flags(n, zero_flags);
    for (uint64_t done = 0; done < length;) {
        struct extent x;
        struct placement p;
        int r = vpc_map_co(n, offset + done, length - done, &x);
        if (!r && x.kind == EXTENT_DATA) {
            r = disk_zero_co(s->file, x.host_offset, x.length, zero_flags);
        } else if (!r && x.kind == EXTENT_HOLE && s->f.type == VPC_DIFF) {
            r = vpc_place_co(n, offset + done, x.length, 0, 0, &p);
            if (!r)
                r = disk_zero_co(s->file, p.host_offset, p.length, zero_flags);
            if (!r)
                r = vpc_publish_co(n, &p);
            x.length = r ? x.length : p.length;
        }
        if (r < 0)
            return r;
        done += x.length;
    }
    return 0;
}

/* ---------------------------------------------------------------- write-back */

/* The footer stands behind the last block, at the end of the file. */
static int write_footer_co(struct vpc *s, uint64_t end) {
    int r = 0;
    if (s->file->size != end + VPC_FOOTER_BYTES)
        r = disk_resize_co(s->file, end + VPC_FOOTER_BYTES, PREALLOC_OFF, NULL);
    return r < 0 ? r : disk_pwrite_co(s->file, end, s->footer, VPC_FOOTER_BYTES);
}

static int write_level_co(struct vpc *s, struct pages_batch *b) {
    if (!b->count)
        return 0;
    int r = pages_write_co(&s->pages, b);
    return r < 0 || PLANTED(NO_LAST_BARRIER) ? r : disk_flush_co(s->file);
}

int vpc_flush_co(struct node *n) {
    struct vpc *s = vpc_of(n);
    struct pages_batch bits = {0}, bat = {0};
    if (s->fixed)
        return disk_flush_co(s->file);
    task_mutex_lock_co(&s->flush_lock);
    int r = pages_take(&s->pages, VPC_LEVEL_BITMAP, &bits);
    if (!r)
        r = pages_take(&s->pages, VPC_LEVEL_BAT, &bat);
    if (!r && s->footer_moved) {
        s->footer_moved = false;
        r = write_footer_co(s, s->end);
        s->footer_moved |= r < 0;
    }
    if (!r && PLANTED(TABLE_NAMED_EARLY))
        r = pages_write_co(&s->pages, &bat);
    if (!r && !PLANTED(NO_BARRIER_BEFORE_TABLES))
        r = disk_flush_co(s->file);
    if (!r)
        r = write_level_co(s, &bits);
    if (!r)
        r = write_level_co(s, &bat);
    pages_give_back(&s->pages, &bits);
    pages_give_back(&s->pages, &bat);
    task_mutex_unlock(&s->flush_lock);
    return r;
}

/* ---------------------------------------------------------------- after a commit */

/*
 * All that was here is in the parent by now: the table names nothing any more, stably, and then the
 * footer comes nearer.  A cut in between leaves an image that reads the same.  The parent keeps its
 * UUID when it is written to.
 */
int vpc_empty_co(struct node *n, struct err *e) {
    struct vpc *s = vpc_of(n);
    if (s->fixed)
        return err_set(e, ENOTSUP, "a fixed image cannot be emptied");
    uint32_t blocks = (uint32_t)div_up(n->size, s->h.block_size), to;
    int r = vpc_flush_co(n);
    for (uint32_t from = 0; !r && from < blocks; from = to) {
        to = (uint32_t)min_u64(blocks, from + UINT64_C(65536));
        if (pages_crowded(&s->pages))
            r = vpc_flush_co(n);
        if (!r)
            r = vpc_forget_blocks_co(s, from, to);
    }
    if (!r)
        r = vpc_flush_co(n);
    if (!r)
        r = pages_forget_all(&s->pages);
    if (!r) {
        memset(s->full, 0, (s->h.entries / 64 + 1) * sizeof(uint64_t));
        r = vpc_scan_co(s);
    }
    if (!r)
        r = vpc_flush_co(n); /* writes the footer */
    return r < 0 ? err_errno(e, -r, "clearing the block allocation table") : 0;
}
