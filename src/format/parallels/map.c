/* SPDX-License-Identifier: MIT */
/* Parallels: the map, room for new clusters, and the ordered write-back. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/plant.h"
#include "disk/io.h"
#include "format/parallels/parallels.h"

#define PIECE ((uint32_t)MIB)

static int table_page_co(struct parallels *s, uint32_t index, struct page **page, uint8_t **at,
                         uint32_t *left) {
    uint32_t start = index / (PAGE_BYTES / 4) * (PAGE_BYTES / 4);
    uint32_t count = (uint32_t)min_u64(PAGE_BYTES / 4, s->entries - start);
    int r =
        pages_get_co(&s->pages, PARALLELS_HEADER_BYTES + (uint64_t)start * 4, count * 4, 0, page);
    if (r < 0)
        return r;
    *at = (*page)->data + (index - start) * 4;
    *left = count - (index - start);
    return 0;
}

bool parallels_entry_is_sane(const struct parallels *s, uint32_t entry) {
    uint64_t host = (uint64_t)entry * s->unit;
    return host >= s->data_offset && host < s->file->size;
}

int parallels_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    struct parallels *s = parallels_of(n);
    uint32_t cs = s->cluster_size, in = (uint32_t)(offset % cs), left, run = 1;
    struct page *page;
    uint8_t *at = NULL;
    int r = table_page_co(s, (uint32_t)(offset / cs), &page, &at, &left);
    if (r < 0)
        return r;
    uint32_t first = le32_load(at);
    if (first && !parallels_entry_is_sane(s, first))
        return -EIO;
    while (run < left && (uint64_t)run * cs < in + length) {
        uint32_t next = le32_load(at + (size_t)run * 4);
        if (first
                ? next != first + (uint64_t)run * cs / s->unit || !parallels_entry_is_sane(s, next)
                : next)
            break;
        run++;
    }
    *out = (struct extent){.length = min_u64(length, (uint64_t)run * cs - in),
                           .kind = first ? EXTENT_DATA : EXTENT_HOLE};
    if (first) {
        out->flags = EXTENT_IN_PLACE;
        out->storage = s->file;
        out->host_offset = (uint64_t)first * s->unit + in;
    }
    return 0;
}

/* ---------------------------------------------------------------- room */

int parallels_scan_co(struct parallels *s) {
    uint64_t end = s->data_offset;
    uint8_t *buf = buf_get(PIECE);
    int r = buf ? 0 : -ENOMEM;
    for (uint32_t done = 0; !r && done < s->entries;) {
        uint32_t count = (uint32_t)min_u64(PIECE / 4, s->entries - done);
        r = disk_pread_co(s->file, PARALLELS_HEADER_BYTES + (uint64_t)done * 4, buf, count * 4);
        for (uint32_t i = 0; !r && i < count; i++) {
            uint32_t entry = le32_load(buf + i * 4);
            if (entry && parallels_entry_is_sane(s, entry))
                end = max_u64(end, (uint64_t)entry * s->unit + s->cluster_size);
        }
        done += count;
    }
    buf_put(buf, PIECE);
    if (!r) {
        s->end = s->data_offset + div_up(end - s->data_offset, s->cluster_size) * s->cluster_size;
        s->scanned = true;
    }
    return r;
}

/* The header says that the image is in use, and no longer has what a write makes untrue. */
static int mark_co(struct parallels *s) {
    uint8_t before[PARALLELS_HEADER_BYTES];
    if (s->marked && !le64_load(s->header + PARALLELS_AT_EXTENSION))
        return 0;
    memcpy(before, s->header, sizeof(before));
    le32_store(s->header + PARALLELS_AT_IN_USE, PARALLELS_IN_USE);
    le64_store(s->header + PARALLELS_AT_EXTENSION, 0);
    int r = parallels_header_write_co(s);
    if (r < 0)
        memcpy(s->header, before, sizeof(before));
    s->marked = r == 0;
    return r;
}

int parallels_place_co(struct node *n, uint64_t offset, uint64_t length, unsigned flags,
                       uint32_t coded_length, struct placement *out) {
    struct parallels *s = parallels_of(n);
    uint32_t cs = s->cluster_size, in = (uint32_t)(offset & (cs - 1));
    struct extent x;
    if (flags & PLACE_CODED)
        return -ENOTSUP;
    int r = pages_crowded(&s->pages) ? parallels_flush_co(n) : 0;
    if (!r)
        r = parallels_map_co(n, offset, length, &x);
    if (r < 0)
        return r;
    *out = (struct placement){.offset = offset, .length = x.length, .storage = s->file};
    if (x.kind == EXTENT_DATA) {
        out->host_offset = x.host_offset;
        return 0;
    }
    uint64_t count = div_up(in + x.length, cs), file_end = s->file->size, host = 0;
    task_mutex_lock_co(&s->alloc_lock);
    if (!s->scanned)
        r = parallels_scan_co(s);
    if (!r)
        r = mark_co(s);
    if (!r && (s->end + count * cs) / s->unit > UINT32_MAX)
        r = -EFBIG;
    if (!r) {
        host = s->end;
        s->end += count * cs;
    }
    task_mutex_unlock(&s->alloc_lock);
    if (r < 0)
        return r;
    out->host_offset = host + in;
    out->head = in;
    out->tail = (uint32_t)((cs - ((in + x.length) & (cs - 1))) & (cs - 1));
    out->is_new = true;
    out->reads_zero = s->file->storage_flags & STORAGE_ZERO_INIT && host >= file_end;
    out->cookie[0] = host;
    out->cookie[1] = count;
    return 0;
}

int parallels_publish_co(struct node *n, const struct placement *p) {
    struct parallels *s = parallels_of(n);
    uint32_t index = (uint32_t)(p->offset / s->cluster_size);
    uint64_t host = p->cookie[0];
    for (uint64_t count = p->is_new ? p->cookie[1] : 0; count;) {
        struct page *page;
        uint8_t *at = NULL;
        uint32_t left = 0;
        int r = table_page_co(s, index, &page, &at, &left);
        if (r < 0)
            return r;
        pages_modify(&s->pages, page);
        for (; left && count; left--, count--, index++, at += 4, host += s->cluster_size)
            le32_store(at, (uint32_t)(host / s->unit));
    }
    return 0;
}

void parallels_abandon(struct node *n, const struct placement *p) {
    struct parallels *s = parallels_of(n);
    if (p->is_new && p->cookie[0] + p->cookie[1] * s->cluster_size == s->end)
        s->end = p->cookie[0];
}

int parallels_flush_co(struct node *n) {
    struct parallels *s = parallels_of(n);
    struct pages_batch b = {0};
    task_mutex_lock_co(&s->flush_lock);
    int r = pages_take(&s->pages, 0, &b);
    if (!r && b.count && s->file->size < s->end)
        r = disk_resize_co(s->file, s->end, PREALLOC_OFF, NULL);
    if (!r && !PLANTED(NO_BARRIER_BEFORE_TABLES))
        r = disk_flush_co(s->file);
    if (!r && b.count) {
        r = pages_write_co(&s->pages, &b);
        if (!r && !PLANTED(NO_LAST_BARRIER))
            r = disk_flush_co(s->file);
    }
    pages_give_back(&s->pages, &b);
    task_mutex_unlock(&s->flush_lock);
    return r;
}
