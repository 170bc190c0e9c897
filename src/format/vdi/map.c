/* SPDX-License-Identifier: MIT */
/* VDI: the map, room for new blocks, and the ordered write-back. */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/plant.h"
#include "disk/io.h"
#include "format/in_place.h"
#include "format/seen.h"
#include "format/vdi/vdi.h"

#define SCAN_BYTES ((uint32_t)MIB)

/* The page with the entry of `block`; *at: the entry's place in it, *left: entries from there. */
static int map_page_co(struct vdi *s, uint32_t block, struct page **page, uint8_t **at,
                       uint32_t *left) {
    uint32_t start = block / (PAGE_BYTES / 4) * (PAGE_BYTES / 4);
    uint32_t entries = (uint32_t)min_u64(PAGE_BYTES / 4, s->h.blocks - start);
    int r = pages_get_co(&s->pages, s->h.map_offset + (uint64_t)start * 4, entries * 4, 0, page);
    if (r < 0)
        return r;
    *at = (*page)->data + (block - start) * 4;
    *left = entries - (block - start);
    return 0;
}

int vdi_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    struct vdi *s = vdi_of(n);
    uint32_t bs = s->h.block_size, in = offset % bs, left;
    struct page *page;
    uint8_t *at;
    int r = map_page_co(s, (uint32_t)(offset / bs), &page, &at, &left);
    if (r < 0)
        return r;
    uint32_t first = le32_load(at), run = 1;
    bool data = first < VDI_ZERO;
    if (data && !vdi_block_is_sane(s, first))
        return -EIO;
    while (run < left && (uint64_t)run * bs < in + length) {
        uint32_t next = le32_load(at + run * 4);
        if (data ? s->h.extra || next != first + run || !vdi_block_is_sane(s, next) : next != first)
            break;
        run++;
    }
    *out = (struct extent){
        .length = min_u64(length, (uint64_t)run * bs - in),
        .kind = data                ? EXTENT_DATA
                : first == VDI_ZERO ? EXTENT_ZERO
                                    : EXTENT_HOLE,
    };
    if (data) {
        out->flags = EXTENT_IN_PLACE;
        out->storage = s->file;
        out->host_offset = vdi_host(&s->h, first) + in;
    }
    return 0;
}

/* ---------------------------------------------------------------- room */

#define SPARES_MAX 4096 /* runs of unused blocks that are remembered */

/* Unused blocks below `next`: what a crash, or another writer, has left behind. */
static void note_spares(struct vdi *s, const struct seen *named) {
    for (uint64_t at = 0; s->spares.count < SPARES_MAX;) {
        uint64_t first = seen_find_free(named, at, s->next, 1), end = first;
        if (first >= s->next)
            return;
        while (end < s->next && !seen_has(named, end))
            end++;
        spares_give(&s->spares, first, end - first);
        at = end;
    }
}

/* The header's count may be of a writer who was stopped: the map says what is in use. */
int vdi_scan_co(struct vdi *s) {
    uint32_t per = SCAN_BYTES / 4, next = 0;
    uint8_t *buf = buf_get(SCAN_BYTES);
    struct seen named = {0};
    int r = buf ? seen_init(&named, VDI_BLOCKS_MAX) : -ENOMEM;
    for (uint32_t block = 0; !r && block < s->h.blocks; block += per) {
        uint32_t count = (uint32_t)min_u64(per, s->h.blocks - block);
        r = disk_pread_co(s->file, s->h.map_offset + (uint64_t)block * 4, buf, count * 4);
        for (uint32_t i = 0; !r && i < count; i++) {
            uint32_t index = le32_load(buf + i * 4);
            if (!vdi_block_is_sane(s, index))
                continue;
            next = (uint32_t)max_u64(next, index + 1);
            r = seen_add(&named, index) < 0 ? -ENOMEM : 0;
        }
    }
    buf_put(buf, SCAN_BYTES);
    s->spares.count = 0;
    if (!r) {
        s->next = next;
        note_spares(s, &named);
        s->scanned = true;
    }
    seen_free(&named);
    return r;
}

/* Up to `want` consecutive blocks that nothing names.  No more places than blocks: other readers
 * refuse a header that counts more. */
static int take_blocks_co(struct vdi *s, uint32_t want, uint32_t *index, uint32_t *got) {
    int r = 0;
    task_mutex_lock_co(&s->alloc_lock);
    if (!s->scanned)
        r = vdi_scan_co(s);
    uint64_t first, found;
    if (!r && spares_take(&s->spares, want, false, &first, &found)) {
        *index = (uint32_t)first;
        *got = (uint32_t)found;
    } else if (!r && s->next >= s->h.blocks) {
        r = -EIO; /* damage: two entries name one block, or one behind the others */
    } else if (!r && vdi_host(&s->h, s->next + want) > (uint64_t)INT64_MAX) {
        r = -EFBIG;
    } else if (!r) {
        *got = (uint32_t)min_u64(want, s->h.blocks - s->next);
        *index = s->next;
        s->next += *got;
    }
    task_mutex_unlock(&s->alloc_lock);
    return r;
}

static void give_blocks(struct vdi *s, uint32_t index, uint32_t count) {
    if (index + count == s->next)
        s->next = index;
    else
        spares_give(&s->spares, index, count);
}

int vdi_place_co(struct node *n, uint64_t offset, uint64_t length, unsigned flags,
                 uint32_t coded_length, struct placement *out) {
    struct vdi *s = vdi_of(n);
    uint32_t bs = s->h.block_size, in = offset % bs, left, index = 0, got = 0;
    struct extent x;
    struct page *page;
    uint8_t *at;
    if (flags & PLACE_CODED)
        return -ENOTSUP;
    int r = pages_crowded(&s->pages) ? vdi_flush_co(n) : 0;
    if (!r)
        r = vdi_map_co(n, offset, length, &x);
    if (r < 0)
        return r;
    *out = (struct placement){.offset = offset, .length = x.length, .storage = s->file};
    if (x.kind == EXTENT_DATA) {
        out->host_offset = x.host_offset;
        return 0;
    }
    r = map_page_co(s, (uint32_t)(offset / bs), &page, &at, &left);
    if (r < 0)
        return r;
    uint32_t want = s->h.extra ? 1 : (uint32_t)div_up(in + x.length, bs);
    uint64_t file_end = s->file->size;
    r = take_blocks_co(s, (uint32_t)min_u64(want, left), &index, &got);
    if (r < 0)
        return r;
    out->length = min_u64(x.length, (uint64_t)got * bs - in);
    out->host_offset = vdi_host(&s->h, index) + in;
    out->head = in;
    out->tail = (uint32_t)((bs - (in + out->length) % bs) % bs);
    out->is_new = true;
    out->reads_zero =
        s->file->storage_flags & STORAGE_ZERO_INIT && vdi_host(&s->h, index) >= file_end;
    out->cookie[0] = index;
    out->cookie[1] = got;
    return 0;
}

int vdi_publish_co(struct node *n, const struct placement *p) {
    struct vdi *s = vdi_of(n);
    if (!p->is_new)
        return 0;
    uint32_t block = (uint32_t)(p->offset / s->h.block_size);
    for (uint32_t i = 0; i < p->cookie[1];) {
        struct page *page;
        uint8_t *at;
        uint32_t left;
        int r = map_page_co(s, block + i, &page, &at, &left);
        if (r < 0)
            return r; /* what is not named yet stays unused */
        pages_modify(&s->pages, page);
        for (uint32_t k = 0; k < left && i < p->cookie[1]; k++, i++)
            le32_store(at + k * 4, (uint32_t)p->cookie[0] + i);
    }
    return 0;
}

void vdi_abandon(struct node *n, const struct placement *p) {
    if (p->is_new)
        give_blocks(vdi_of(n), (uint32_t)p->cookie[0], (uint32_t)p->cookie[1]);
}

/* Blocks have no gaps, so one that is there stays: its bytes are zeroed where they lie. */
int vdi_set_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    struct vdi *s = vdi_of(n);
    bool below = n->backing || vdi_has_parent(&s->h); /* open or not */
    zero_flags = in_place_zero_flags(n, zero_flags);
    for (uint64_t done = 0; done < length;) {
        struct extent x;
        int r = pages_crowded(&s->pages) ? vdi_flush_co(n) : 0;
        if (!r)
            r = vdi_map_co(n, offset + done, length - done, &x);
        if (!r && x.kind == EXTENT_DATA)
            r = disk_zero_co(s->file, x.host_offset, x.length, zero_flags);
        for (uint64_t at = 0; !r && x.kind == EXTENT_HOLE && below && at < x.length;
             at += s->h.block_size) {
            struct page *page;
            uint8_t *entry;
            uint32_t left;
            r = map_page_co(s, (uint32_t)((offset + done + at) / s->h.block_size), &page, &entry,
                            &left);
            if (!r) {
                pages_modify(&s->pages, page);
                le32_store(entry, VDI_ZERO);
            }
        }
        if (r < 0)
            return r;
        done += x.length;
    }
    return 0;
}

/* ---------------------------------------------------------------- write-back */

int vdi_write_count_co(struct vdi *s, uint32_t count) {
    if (!s->modified && s->h.version == VDI_VERSION_1) {
        uint8_t *id = s->header + VDI_AT_UUID_MODIFIED;
        if (getrandom(id, 16, 0) != 16)
            return -EIO;
        id[7] = (uint8_t)((id[7] & 0x0f) | 0x40); /* a random UUID, fields little-endian */
        id[8] = (uint8_t)((id[8] & 0x3f) | 0x80);
        memcpy(s->h.uuid_modified, id, 16);
        s->modified = true;
    }
    if (count > s->stored_count) {
        uint64_t end = vdi_host(&s->h, count - 1) + s->h.block_size;
        int r = s->file->size < end ? disk_resize_co(s->file, end, PREALLOC_OFF, NULL) : 0;
        if (r < 0)
            return r;
        le32_store(s->header + VDI_AT_ALLOCATED, count);
    }
    int r = disk_pwrite_co(s->file, 0, s->header, VDI_HEADER_BYTES);
    if (!r)
        s->h.allocated = s->stored_count = (uint32_t)max_u64(count, s->stored_count);
    return r;
}

int vdi_flush_co(struct node *n) {
    struct vdi *s = vdi_of(n);
    struct pages_batch b;
    task_mutex_lock_co(&s->flush_lock);
    uint32_t count = s->next;
    int r = pages_take(&s->pages, 0, &b);
    bool counted = s->modified && count <= s->stored_count;
    if (!r && b.count && !counted && !PLANTED(VDI_COUNT_LAST))
        r = vdi_write_count_co(s, count);
    if (!r && !PLANTED(NO_BARRIER_BEFORE_TABLES))
        r = disk_flush_co(s->file);
    if (r < 0 || !b.count) {
        pages_give_back(&s->pages, &b);
    } else {
        r = pages_write_co(&s->pages, &b);
        if (!r && PLANTED(VDI_COUNT_LAST))
            r = vdi_write_count_co(s, count);
        if (!r && !PLANTED(NO_LAST_BARRIER))
            r = disk_flush_co(s->file);
    }
    task_mutex_unlock(&s->flush_lock);
    return r;
}
