/* SPDX-License-Identifier: MIT */
/*
 * VMDK: room for writes, zeros, and the ordered write-back of the tables.
 *
 * A redundant table that is missing or out of the file is passed over, as readers do; `check` says
 * so.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/plant.h"
#include "disk/io.h"
#include "format/in_place.h"
#include "format/vmdk/vmdk.h"

/* ---------------------------------------------------------------- room in a sparse file */

static bool is_fresh(const struct vmdk_map *m, uint64_t host, uint64_t file_end) {
    return m->file->storage_flags & STORAGE_ZERO_INIT && host >= file_end;
}

static void scan_end(struct vmdk_map *m) {
    if (m->scanned)
        return;
    m->scanned = true;
    m->next = align_up(max_u64(m->file->size, m->data_low), m->grain_bytes);
}

/* Up to `want` bytes of grains in one piece that nothing names. */
static int take_room(struct vmdk_map *m, uint64_t want, bool whole, uint64_t *host, uint64_t *got) {
    scan_end(m);
    if (!whole && m->spare_count) {
        struct vmdk_spare *spare = &m->spares[m->spare_count - 1];
        *got = min_u64(want, spare->bytes);
        spare->bytes -= *got;
        *host = spare->at + spare->bytes;
        m->spare_count -= !spare->bytes;
        return 0;
    }
    if ((m->next + want) / VMDK_SECTOR > UINT32_MAX)
        return -EFBIG;
    *got = want;
    *host = m->next;
    m->next += align_up(want, m->grain_bytes);
    return 0;
}

static void give_room(struct vmdk_map *m, uint64_t host, uint64_t bytes) {
    if (host + bytes == m->next) {
        m->next = host;
        return;
    }
    if (m->spare_count == m->spare_cap) {
        size_t cap = m->spare_cap ? m->spare_cap * 2 : 8;
        struct vmdk_spare *more = realloc(m->spares, cap * sizeof(*more));
        if (!more)
            return; /* it stays unused */
        m->spares = more;
        m->spare_cap = cap;
    }
    m->spares[m->spare_count++] = (struct vmdk_spare){host, bytes};
}

static int name_table_co(struct vmdk_map *m, uint64_t directory, uint64_t at, uint64_t table) {
    struct page *page;
    uint8_t *entry;
    uint32_t left;
    int r = vmdk_entry_co(m, directory, at / m->covers, VMDK_LEVEL_GD, &page, &entry, &left);
    if (r < 0)
        return r;
    pages_modify(&m->pages, page);
    le32_store(entry, (uint32_t)(table / VMDK_SECTOR));
    return 0;
}

/* As vmdk_table_co, making empty tables where there is none. */
static int table_writable_co(struct vmdk_map *m, uint64_t at, uint64_t *table) {
    uint64_t bytes = align_up((uint64_t)m->gt_entries * 4, VMDK_SECTOR), got, host;
    int r = vmdk_table_co(m, at, false, table);
    if (r < 0 || *table)
        return r;
    task_mutex_lock_co(&m->table_lock);
    r = vmdk_table_co(m, at, false, table);
    if (!r && !*table) {
        uint64_t both = bytes * (m->rgd ? 2 : 1), file_end = m->file->size;
        r = take_room(m, both, true, &host, &got);
        if (!r && !is_fresh(m, host, file_end))
            r = disk_zero_co(m->file, host, min_u64(both, max_u64(file_end, host) - host), 0);
        if (!r && m->file->size < m->next)
            r = disk_resize_co(m->file, m->next, PREALLOC_OFF, NULL);
        if (!r && m->rgd)
            r = name_table_co(m, m->rgd, at, host + bytes);
        if (!r)
            r = name_table_co(m, m->gd, at, host);
        if (!r)
            *table = host;
    }
    task_mutex_unlock(&m->table_lock);
    return r;
}

/* Entries of grains [at, +count) become `entry`, each `step` above the last. */
static int set_in_table_co(struct vmdk_map *m, bool redundant, uint64_t at, uint64_t count,
                           uint32_t entry, uint32_t step) {
    while (count) {
        struct page *page;
        uint8_t *p = NULL;
        uint32_t left = 0;
        uint64_t table = 0, in_table = (m->covers - at % m->covers) / m->grain_bytes;
        int r = redundant ? vmdk_table_co(m, at, true, &table) : table_writable_co(m, at, &table);
        if (redundant && (r == -EIO || (!r && !table))) {
            r = 0;
            left = (uint32_t)min_u64(in_table, count);
            count -= left;
            at += (uint64_t)left * m->grain_bytes;
            entry += step * left;
            continue;
        }
        if (!r)
            r = vmdk_entry_co(m, table, at % m->covers / m->grain_bytes, VMDK_LEVEL_GT, &page, &p,
                              &left);
        if (r < 0)
            return r;
        pages_modify(&m->pages, page);
        for (; left && count; left--, count--, p += 4, entry += step, at += m->grain_bytes)
            le32_store(p, entry);
    }
    return 0;
}

static int set_entries_co(struct vmdk_map *m, uint64_t at, uint64_t count, uint32_t entry,
                          uint32_t step) {
    int r = set_in_table_co(m, false, at, count, entry, step);
    return !r && m->rgd ? set_in_table_co(m, true, at, count, entry, step) : r;
}

/* ---------------------------------------------------------------- writes */

/* The extent at `offset` can be changed; *at in it, and the content ID has changed. */
static int begin_change_co(struct vmdk *s, uint64_t offset, struct vmdk_extent **x, uint64_t *at) {
    *x = vmdk_extent_at(s, offset);
    *at = offset - (*x)->start;
    if ((*x)->access != VMDK_RW)
        return -EACCES;
    if ((*x)->type == VMDK_ZERO)
        return -EROFS;
    if (!(*x)->file)
        return -EIO;
    if (s->frozen || ((*x)->map && (*x)->map->frozen))
        return -EROFS;
    int r = vmdk_modified_co(s);
    if (!r && (*x)->map)
        r = vmdk_activate_co(s, (*x)->map);
    if (!r && (*x)->map && pages_crowded(&(*x)->map->pages))
        r = vmdk_map_flush_co((*x)->map);
    return r;
}

/* Room in a sparse file for what has none. */
static int place_grains_co(struct vmdk_map *m, uint64_t at, struct placement *out) {
    uint64_t grain = m->grain_bytes, in = at & (grain - 1), table, got;
    int r = table_writable_co(m, at, &table);
    if (r < 0)
        return r;
    uint64_t host, file_end = m->file->size;
    r = take_room(m, align_up(in + out->length, grain), false, &host, &got);
    if (r < 0)
        return r;
    out->length = min_u64(out->length, got - in);
    out->host_offset = host + in;
    out->head = (uint32_t)in;
    out->tail = (uint32_t)((grain - ((in + out->length) & (grain - 1))) & (grain - 1));
    out->is_new = true;
    out->reads_zero = is_fresh(m, host, file_end);
    out->cookie[0] = host;
    out->cookie[1] = got;
    return 0;
}

int vmdk_place_co(struct node *n, uint64_t offset, uint64_t length, unsigned flags,
                  uint32_t coded_length, struct placement *out) {
    struct vmdk *s = vmdk_of(n);
    struct vmdk_extent *x;
    struct extent e;
    uint64_t at;
    int r = begin_change_co(s, offset, &x, &at);
    if (r < 0)
        return r;
    length = min_u64(length, x->length - at);
    *out = (struct placement){.offset = offset, .length = length, .storage = x->file};
    if (flags & PLACE_CODED) {
        if (!x->map || !x->map->coded)
            return -ENOTSUP;
        out->coded_length = coded_length;
        out->is_new = true;
        r = vmdk_stream_place_co(x->map, at, coded_length, &out->host_offset);
        out->cookie[0] = out->host_offset;
        return r;
    }
    if (!x->map) {
        out->host_offset = x->offset + at;
        return 0;
    }
    if (x->map->coded)
        return -ENOTSUP;
    r = vmdk_sparse_map_co(x->map, at, length, &e);
    if (r < 0)
        return r;
    out->length = e.length;
    if (e.kind == EXTENT_DATA) {
        out->host_offset = e.host_offset;
        return 0;
    }
    return place_grains_co(x->map, at, out);
}

int vmdk_publish_co(struct node *n, const struct placement *p) {
    struct vmdk *s = vmdk_of(n);
    struct vmdk_extent *x = vmdk_extent_at(s, p->offset);
    uint64_t at = p->offset - x->start;
    if (!p->is_new)
        return 0;
    int r = vmdk_activate_co(s, x->map);
    if (r < 0)
        return r;
    if (x->map->coded)
        return vmdk_stream_publish_co(x->map, at, p->host_offset, p->coded_length);
    uint32_t grains = (uint32_t)(p->cookie[1] / x->map->grain_bytes);
    return set_entries_co(x->map, align_down(at, x->map->grain_bytes), grains,
                          (uint32_t)(p->cookie[0] / VMDK_SECTOR),
                          x->map->grain_bytes / VMDK_SECTOR);
}

void vmdk_abandon(struct node *n, const struct placement *p) {
    struct vmdk_extent *x = vmdk_extent_at(vmdk_of(n), p->offset);
    if (p->is_new && !x->map->coded)
        give_room(x->map, p->cookie[0], p->cookie[1]);
}

/* A grain that has a place keeps it: its bytes are zeroed. */
int vmdk_set_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    struct vmdk *s = vmdk_of(n);
    zero_flags = in_place_zero_flags(n, zero_flags);
    for (uint64_t done = 0; done < length;) {
        struct vmdk_extent *x = vmdk_extent_at(s, offset + done);
        struct extent e;
        uint64_t at;
        int r = vmdk_map_co(n, offset + done, length - done, &e);
        bool must = e.kind == EXTENT_HOLE && (n->backing || n->backing_name);
        if (!r && (e.kind == EXTENT_DATA || e.kind == EXTENT_CODED || must))
            r = begin_change_co(s, offset + done, &x, &at);
        if (r < 0)
            return r;
        if (e.kind == EXTENT_CODED)
            r = -EPERM;
        else if (e.kind == EXTENT_DATA)
            r = disk_zero_co(e.storage, e.host_offset, e.length, zero_flags);
        else if (must && x->map->zeroed && !x->map->coded)
            r = set_entries_co(x->map, at, div_up(e.length, x->map->grain_bytes), 1, 0);
        else if (must)
            r = -ENOTSUP;
        if (r < 0)
            return r;
        done += e.length;
    }
    return 0;
}

int vmdk_discard_co(struct node *n, uint64_t offset, uint64_t length) {
    struct vmdk *s = vmdk_of(n);
    for (uint64_t done = 0; n->flags & NODE_UNMAP && done < length;) {
        struct vmdk_extent *x;
        struct extent e;
        uint64_t at;
        int r = vmdk_map_co(n, offset + done, length - done, &e);
        if (!r && e.kind == EXTENT_DATA) {
            r = begin_change_co(s, offset + done, &x, &at);
            if (!r)
                r = disk_discard_co(e.storage, e.host_offset, e.length);
        }
        if (r < 0)
            return r;
        done += e.length;
    }
    return 0;
}

/* ---------------------------------------------------------------- write-back */

static int tables_flush_co(struct vmdk_map *m) {
    struct pages_batch gd = {0}, gt = {0};
    /* Both at once: what the directory names now, the tables of now are in. */
    int r = pages_take(&m->pages, VMDK_LEVEL_GT, &gt);
    if (!r)
        r = pages_take(&m->pages, VMDK_LEVEL_GD, &gd);
    /* A grain may end in a hole that was not written; readers want it whole. */
    if (!r && gt.count && m->scanned && m->file->size < m->next)
        r = disk_resize_co(m->file, m->next, PREALLOC_OFF, NULL);
    if (!r && PLANTED(TABLE_NAMED_EARLY))
        r = pages_write_co(&m->pages, &gd);
    if (!r && !PLANTED(NO_BARRIER_BEFORE_TABLES))
        r = disk_flush_co(m->file);
    if (!r && gt.count) {
        r = pages_write_co(&m->pages, &gt);
        if (!r && !PLANTED(NO_LAST_BARRIER))
            r = disk_flush_co(m->file);
    }
    if (!r && gd.count) {
        r = pages_write_co(&m->pages, &gd);
        if (!r && !PLANTED(NO_LAST_BARRIER))
            r = disk_flush_co(m->file);
    }
    pages_give_back(&m->pages, &gt);
    pages_give_back(&m->pages, &gd);
    return r;
}

int vmdk_map_flush_co(struct vmdk_map *m) {
    task_mutex_lock_co(&m->flush_lock);
    int r = m->stream                ? vmdk_stream_flush_co(m)
            : pages_dirty(&m->pages) ? tables_flush_co(m)
                                     : disk_flush_co(m->file);
    task_mutex_unlock(&m->flush_lock);
    return r;
}

int vmdk_flush_co(struct node *n) {
    struct vmdk *s = vmdk_of(n);
    int r = 0;
    for (size_t i = 0; !r && i < s->d.count; i++)
        if (s->d.extents[i].map)
            r = vmdk_map_flush_co(s->d.extents[i].map);
    for (size_t i = 0; !r && i < s->d.count; i++)
        if (s->d.extents[i].file && !s->d.extents[i].map &&
            (!i || s->d.extents[i].file != s->d.extents[i - 1].file))
            r = disk_flush_co(s->d.extents[i].file);
    return !r && !s->embedded ? disk_flush_co(s->file) : r;
}
