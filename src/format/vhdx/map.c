/* SPDX-License-Identifier: MIT */
/* VHDX: the map, and room for new blocks. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/plant.h"
#include "disk/io.h"
#include "format/in_place.h"
#include "format/vhdx/vhdx.h"

#define PAGE_ENTRIES (PAGE_BYTES / 8)
/* Bytes by which a file grows ahead of its blocks; the rest is cut off when it is closed. */
#define AHEAD_MAX (256 * MIB)
#define SPARES_MAX 4096u
#define SCAN_BYTES ((uint32_t)MIB)

int vhdx_bat_page_co(struct vhdx *s, uint64_t index, struct page **page, uint8_t **at,
                     uint32_t *left) {
    uint64_t start = index / PAGE_ENTRIES * PAGE_ENTRIES;
    int r = pages_get_co(&s->pages, s->r.bat.offset + start * 8, PAGE_BYTES, 0, page);
    if (r < 0)
        return r;
    *at = (*page)->data + (index - start) * 8;
    *left = (uint32_t)(PAGE_ENTRIES - (index - start));
    return 0;
}

uint64_t vhdx_file_size(const struct vhdx *s) {
    return max_u64(s->file->size, s->replay.last);
}

/* Behind the headers, beside log and tables, and it begins inside the file. */
bool vhdx_host_is_sane(const struct vhdx *s, uint64_t host, uint64_t length) {
    return host >= VHDX_MIB && host < vhdx_file_size(s) && host <= INT64_MAX - length &&
           !ranges_overlap(host, length, s->h.log_offset, s->h.log_length) &&
           !ranges_overlap(host, length, s->r.bat.offset, s->r.bat.length) &&
           !ranges_overlap(host, length, s->r.metadata.offset, s->r.metadata.length);
}

static enum extent_kind kind_of(const struct vhdx *s, uint64_t entry) {
    switch (entry & VHDX_STATE_MASK) {
    case VHDX_NOT_PRESENT:
        return EXTENT_HOLE;
    case VHDX_UNDEFINED: /* whatever it held before is nobody's business */
    case VHDX_ZERO:
    case VHDX_UNMAPPED:
    case VHDX_UNMAPPED_OLD:
        return EXTENT_ZERO;
    default:
        return EXTENT_DATA;
    }
}

/* A block that is here in part: sectors from `offset` whose bits are equal. */
static int partial_co(struct vhdx *s, uint64_t offset, uint64_t length, uint64_t host,
                      struct extent *out) {
    uint64_t block = offset / s->m.block_size, in = offset % s->m.block_size;
    uint64_t index = vhdx_bitmap_index(s->ratio, block);
    uint32_t left, sector_size = s->m.logical_sector, n = 0;
    struct page *page;
    uint8_t *at;
    int r = vhdx_bat_page_co(s, index, &page, &at, &left);
    if (r < 0)
        return r;
    uint64_t entry = le64_load(at), map = entry & VHDX_OFFSET_MASK;
    if ((entry & VHDX_STATE_MASK) != VHDX_PRESENT || !vhdx_host_is_sane(s, map, VHDX_MIB))
        return -EIO;
    uint64_t sector = (block % s->ratio * s->m.block_size + in) / sector_size;
    uint64_t start = sector / 8 / PAGE_BYTES * PAGE_BYTES; /* of the page, in bytes of bitmap */
    uint32_t bit = (uint32_t)(sector - start * 8);
    r = pages_get_co(&s->pages, map + start, PAGE_BYTES, 0, &page);
    if (r < 0)
        return r;
    bool set = page->data[bit / 8] >> bit % 8 & 1;
    uint64_t most = div_up(in % sector_size + length, sector_size);
    while (n < most && bit + n < PAGE_BYTES * 8 &&
           (page->data[(bit + n) / 8] >> (bit + n) % 8 & 1) == set)
        n++;
    *out = (struct extent){
        .length = min_u64(length, (uint64_t)n * sector_size - in % sector_size),
        .kind = set ? EXTENT_DATA : EXTENT_HOLE,
    };
    if (set) {
        out->storage = s->file;
        out->host_offset = host + in;
    }
    return 0;
}

/* Entries behind `at` that continue its run, itself included. */
static uint32_t run_of(const struct vhdx *s, const uint8_t *at, uint32_t left, uint64_t want) {
    uint64_t first = le64_load(at);
    bool data = kind_of(s, first) == EXTENT_DATA;
    uint32_t run = 1;
    while (run < left && run < want) {
        uint64_t next = le64_load(at + run * 8);
        if (data ? next != first + (uint64_t)run * s->m.block_size ||
                       !vhdx_host_is_sane(s, next & VHDX_OFFSET_MASK, s->m.block_size)
                 : kind_of(s, next) != kind_of(s, first))
            break;
        run++;
    }
    return run;
}

static int map_entry_co(struct vhdx *s, uint64_t offset, uint64_t length, struct extent *out,
                        uint64_t *entry) {
    uint64_t bs = s->m.block_size, block = offset / bs, in = offset % bs;
    struct page *page;
    uint8_t *at;
    uint32_t left;
    int r = vhdx_bat_page_co(s, vhdx_entry_index(s->ratio, block), &page, &at, &left);
    if (r < 0)
        return r;
    *entry = le64_load(at);
    uint64_t host = *entry & VHDX_OFFSET_MASK;
    enum extent_kind kind = kind_of(s, *entry);
    if ((*entry & VHDX_STATE_MASK) == 4 || (kind == EXTENT_DATA && !vhdx_host_is_sane(s, host, bs)))
        return -EIO;
    if ((*entry & VHDX_STATE_MASK) == VHDX_PARTIAL) {
        if (!s->m.has_parent)
            return -EIO;
        return partial_co(s, offset, min_u64(length, bs - in), host, out);
    }
    /* The entry behind a chunk's last is that of its bitmap. */
    left = (uint32_t)min_u64(left, s->ratio - block % s->ratio);
    uint32_t run = run_of(s, at, left, div_up(in + length, bs));
    *out = (struct extent){.length = min_u64(length, run * bs - in), .kind = kind};
    if (kind == EXTENT_DATA) {
        out->storage = s->file;
        out->host_offset = host + in;
    }
    return 0;
}

int vhdx_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    struct vhdx *s = vhdx_of(n);
    uint64_t entry;
    int r = map_entry_co(s, offset, length, out, &entry);
    if (r < 0)
        return r;
    if (out->kind == EXTENT_DATA) {
        /* Guest data changed by a log that is not applied: no log should, and it cannot be shown.
         */
        if (vhdx_replay_touches(&s->replay, out->host_offset, out->length))
            return -EIO;
        if (s->begun)
            out->flags = EXTENT_IN_PLACE;
    }
    return 0;
}

/* ---------------------------------------------------------------- room */

/* The file reaches over `end`, some more as it grows. */
static int reach_file_co(struct vhdx *s, uint64_t end) {
    if (s->file->size >= end)
        return 0;
    uint64_t ahead = align_down(min_u64(end / 8, AHEAD_MAX), VHDX_MIB);
    return disk_resize_co(s->file, end + ahead, PREALLOC_OFF, NULL);
}

/*
 * The end of all blocks may lie behind the end of the file: some writers leave a part of the last
 * one away.
 */
int vhdx_scan_co(struct vhdx *s) {
    if (s->scanned)
        return 0;
    uint64_t bytes = vhdx_bat_entries(&s->m, s->m.size) * 8, next = s->next;
    uint8_t *buf = buf_get(SCAN_BYTES);
    int r = buf ? 0 : -ENOMEM;
    for (uint64_t done = 0; !r && done < bytes; done += SCAN_BYTES) {
        uint32_t n = (uint32_t)min_u64(SCAN_BYTES, bytes - done);
        r = disk_pread_co(s->file, s->r.bat.offset + done, buf, n);
        for (uint32_t i = 0; !r && i < n; i += 8) {
            uint64_t host = le64_load(buf + i) & VHDX_OFFSET_MASK;
            if (host && host < s->file->size)
                next = max_u64(next, host + s->m.block_size);
        }
    }
    buf_put(buf, SCAN_BYTES);
    if (!r) {
        s->next = next;
        s->scanned = true;
    }
    return r;
}

/* One block that nothing names; *zeros: it reads as such. */
static int take_block_co(struct vhdx *s, uint64_t *host, bool *zeros) {
    task_mutex_lock_co(&s->alloc_lock);
    int r = vhdx_scan_co(s);
    if (r < 0) {
        /* nothing taken */
    } else if (s->spare_count) {
        *host = s->spares[--s->spare_count];
        *zeros = false;
    } else if (s->next > VHDX_FILE_MAX) {
        r = -EFBIG;
    } else {
        /* Nobody has written behind `next` since the file was opened or grew. */
        *zeros = s->file->storage_flags & STORAGE_ZERO_INIT;
        *host = s->next;
        r = reach_file_co(s, s->next + s->m.block_size);
        if (!r)
            s->next += s->m.block_size;
    }
    task_mutex_unlock(&s->alloc_lock);
    return r;
}

static void give_block(struct vhdx *s, uint64_t host) {
    if (s->spare_count == s->spare_cap) {
        uint32_t cap = s->spare_cap ? s->spare_cap * 2 : 8;
        uint64_t *more = cap > SPARES_MAX ? NULL : realloc(s->spares, cap * sizeof(*more));
        if (!more)
            return; /* it stays unused */
        s->spares = more;
        s->spare_cap = cap;
    }
    s->spares[s->spare_count++] = host;
}

enum { COOKIE_OWN = 1 }; /* room that the entry names already */

int vhdx_place_co(struct node *n, uint64_t offset, uint64_t length, unsigned flags,
                  uint32_t coded_length, struct placement *out) {
    struct vhdx *s = vhdx_of(n);
    uint64_t bs = s->m.block_size, in = offset % bs, entry = 0, host;
    struct extent x;
    if (flags & PLACE_CODED)
        return -ENOTSUP;
    int r = vhdx_begin_co(s);
    if (!r && pages_crowded(&s->pages))
        r = vhdx_flush_co(n);
    if (!r)
        r = map_entry_co(s, offset, length, &x, &entry);
    if (r < 0)
        return r;
    *out = (struct placement){.offset = offset, .length = x.length, .storage = s->file};
    if (x.kind == EXTENT_DATA) {
        out->host_offset = x.host_offset;
        return 0;
    }
    host = entry & VHDX_OFFSET_MASK;
    /* In a fixed image a block that holds nothing has room all the same. */
    bool own = s->m.fixed && (entry & VHDX_STATE_MASK) < VHDX_PRESENT && host &&
               vhdx_host_is_sane(s, host, bs);
    bool zeros = false;
    if (!own)
        r = take_block_co(s, &host, &zeros);
    if (r < 0)
        return r;
    out->length = min_u64(x.length, bs - in);
    out->host_offset = host + in;
    out->head = (uint32_t)in;
    out->tail = (uint32_t)(bs - in - out->length);
    out->is_new = true;
    out->reads_zero = zeros;
    out->cookie[0] = host;
    out->cookie[1] = own ? COOKIE_OWN : 0;
    return 0;
}

static int set_entry_co(struct vhdx *s, uint64_t block, uint64_t entry) {
    struct page *page;
    uint8_t *at;
    uint32_t left;
    int r = vhdx_bat_page_co(s, vhdx_entry_index(s->ratio, block), &page, &at, &left);
    if (r < 0)
        return r;
    pages_modify(&s->pages, page);
    le64_store(at, entry);
    return 0;
}

int vhdx_publish_co(struct node *n, const struct placement *p) {
    struct vhdx *s = vhdx_of(n);
    if (!p->is_new)
        return 0;
    return set_entry_co(s, p->offset / s->m.block_size, p->cookie[0] | VHDX_PRESENT);
}

void vhdx_abandon(struct node *n, const struct placement *p) {
    if (p->is_new && !(p->cookie[1] & COOKIE_OWN))
        give_block(vhdx_of(n), p->cookie[0]);
}

int vhdx_discard_co(struct node *n, uint64_t offset, uint64_t length) {
    int r = n->flags & NODE_UNMAP ? vhdx_begin_co(vhdx_of(n)) : 0;
    return r < 0 ? r : in_place_discard_co(n, offset, length);
}

/* Whole units, or up to the end of the disk.  What is there is zeroed where it lies. */
int vhdx_set_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    struct vhdx *s = vhdx_of(n);
    bool mark = s->m.has_parent || zero_flags & ZERO_PRESENT;
    int r = vhdx_begin_co(s);
    zero_flags = in_place_zero_flags(n, zero_flags);
    for (uint64_t done = 0; !r && done < length;) {
        struct extent x;
        uint64_t at = offset + done, entry = 0, bs = s->m.block_size;
        r = pages_crowded(&s->pages) ? vhdx_flush_co(n) : 0;
        if (!r)
            r = map_entry_co(s, at, length - done, &x, &entry);
        if (r < 0)
            return r;
        if ((entry & VHDX_STATE_MASK) == VHDX_PARTIAL) { /* nothing of it is wanted any more */
            x.length = min_u64(length - done, bs - at % bs);
            r = set_entry_co(s, at / bs, VHDX_ZERO);
        } else if (x.kind == EXTENT_DATA) {
            r = disk_zero_co(s->file, x.host_offset, x.length, zero_flags);
        } else if (x.kind == EXTENT_HOLE && mark) {
            x.length = min_u64(x.length, bs - at % bs);
            r = set_entry_co(s, at / bs, (entry & VHDX_OFFSET_MASK) | VHDX_ZERO);
        }
        done += x.length;
    }
    return r;
}
