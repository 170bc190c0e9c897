/* SPDX-License-Identifier: MIT */
/*
 * VMDK: the map.  Which extent, and in a sparse one which grain.
 *
 * Tables are read through pages (format/pages.h) of each sparse file.  However many files there
 * are, at most VMDK_ACTIVE_MAX of them hold pages at a time.
 */
#include <errno.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"
#include "format/codec.h"
#include "format/vmdk/vmdk.h"

/* The code of a grain may exceed it; others read two grains at most. */
static uint32_t code_max(const struct vmdk_map *m) {
    return 2 * m->grain_bytes;
}

struct vmdk_extent *vmdk_extent_at(struct vmdk *s, uint64_t offset) {
    size_t low = 0, high = s->d.count;
    while (high - low > 1) {
        size_t mid = low + (high - low) / 2;
        if (s->d.extents[mid].start <= offset)
            low = mid;
        else
            high = mid;
    }
    return &s->d.extents[low];
}

bool vmdk_inside(const struct vmdk_map *m, uint64_t at, uint64_t bytes) {
    return at >= m->low && at <= m->file->size && bytes <= m->file->size - at;
}

/* ---------------------------------------------------------------- pages */

int vmdk_activate_co(struct vmdk *s, struct vmdk_map *m) {
    while (!m->active) {
        if (s->active_count < VMDK_ACTIVE_MAX) {
            if (pages_init(&m->pages, m->file, s->pages_bytes) < 0)
                return -ENOMEM;
            s->active[s->active_count++] = m;
            m->active = true;
            return 0;
        }
        s->active_hand = (s->active_hand + 1) % VMDK_ACTIVE_MAX;
        unsigned i = s->active_hand;
        struct vmdk_map *old = s->active[i];
        if (pages_dirty(&old->pages)) {
            int r = vmdk_map_flush_co(old);
            if (r < 0)
                return r;
        } else if (!pages_forget_all(&old->pages)) {
            pages_free(&old->pages);
            old->active = false;
            s->active[i] = s->active[--s->active_count];
        } else {
            task_yield_co(); /* all of them are being read: one ends */
        }
    }
    return 0;
}

int vmdk_entry_co(struct vmdk_map *m, uint64_t table, uint64_t index, unsigned level,
                  struct page **page, uint8_t **at, uint32_t *left) {
    uint64_t entries = level == VMDK_LEVEL_GD ? m->gd_entries : m->gt_entries;
    uint64_t each = PAGE_BYTES / m->entry_bytes, start = index / each * each;
    uint32_t count = (uint32_t)min_u64(each, entries - start);
    int r = pages_get_co(&m->pages, table + start * m->entry_bytes, count * m->entry_bytes, level,
                         page);
    if (!r && (*page)->length < count * m->entry_bytes)
        r = -EIO; /* two tables that begin at one place */
    if (r < 0)
        return r;
    *at = (*page)->data + (index - start) * m->entry_bytes;
    *left = (uint32_t)(count - (index - start));
    return 0;
}

int vmdk_table_co(struct vmdk_map *m, uint64_t at, bool redundant, uint64_t *table) {
    uint64_t bytes = (uint64_t)m->gt_entries * m->entry_bytes;
    struct page *page;
    uint8_t *entry;
    uint32_t left;
    int r = vmdk_entry_co(m, redundant ? m->rgd : m->gd, at / m->covers, VMDK_LEVEL_GD, &page,
                          &entry, &left);
    if (r < 0)
        return r;
    if (m->type == VMDK_SE) {
        uint64_t e = le64_load(entry);
        if (e && e >> 32 != 0x10000000)
            return -EIO;
        *table = e ? m->gts + (e & UINT32_MAX) * bytes : 0;
    } else {
        *table = (uint64_t)le32_load(entry) * VMDK_SECTOR;
    }
    return *table && !vmdk_inside(m, *table, bytes) ? -EIO : 0;
}

/* ---------------------------------------------------------------- sparse files */

/* What a table entry says, whatever the kind of file. */
struct grain {
    enum extent_kind kind;
    uint64_t host;
};

static int grain_of(const struct vmdk_map *m, const uint8_t *at, struct grain *g) {
    *g = (struct grain){EXTENT_HOLE, 0};
    if (m->type == VMDK_SE) {
        uint64_t e = le64_load(at);
        unsigned kind = (unsigned)(e >> 60);
        if (kind > 3 || (!kind && e))
            return -EIO;
        if (kind == 1 || kind == 2)
            g->kind = EXTENT_ZERO;
        if (kind < 3)
            return 0;
        uint64_t index = ((e >> 48) & 0xfff) | (e & UINT64_C(0xffffffffffff)) << 12;
        if (index > INT64_MAX / m->grain_bytes || index * m->grain_bytes > INT64_MAX - m->grains)
            return -EIO;
        g->host = m->grains + index * m->grain_bytes;
    } else {
        uint32_t e = le32_load(at);
        if (e == 1 && m->zeroed)
            g->kind = EXTENT_ZERO;
        if (!e || g->kind == EXTENT_ZERO)
            return 0;
        g->host = (uint64_t)e * VMDK_SECTOR;
    }
    g->kind = EXTENT_DATA;
    return g->host < m->data_low || g->host >= m->file->size ? -EIO : 0;
}

/* One coded grain; `next`: the sector of the following one, or 0. */
static int coded_extent(const struct vmdk_map *m, uint64_t at, uint64_t length, uint64_t host,
                        uint64_t next, struct extent *out) {
    uint64_t in = at & (m->grain_bytes - 1);
    uint64_t most = min_u64(code_max(m), m->file->size - host);
    if (next > host)
        most = min_u64(most, next - host);
    *out = (struct extent){.length = min_u64(length, m->grain_bytes - in),
                           .kind = EXTENT_CODED,
                           .storage = m->file,
                           .host_offset = host,
                           .codec = m->codec,
                           .unit_offset = at - in,
                           .unit_length = m->grain_bytes,
                           .coded_length = (uint32_t)most};
    return 0;
}

static int hole(const struct vmdk_map *m, uint64_t at, uint64_t length, struct extent *out) {
    *out =
        (struct extent){.length = min_u64(length, m->covers - at % m->covers), .kind = EXTENT_HOLE};
    return 0;
}

static int stream_map_co(struct vmdk_map *m, uint64_t at, uint64_t length, struct extent *out) {
    uint32_t entry, next;
    bool known;
    int r = vmdk_stream_entry_co(m, at, &entry, &next, &known);
    if (r < 0)
        return r;
    if (!known)
        return hole(m, at, length, out);
    uint8_t raw[4];
    struct grain g;
    le32_store(raw, entry);
    if ((r = grain_of(m, raw, &g)) < 0)
        return r;
    if (g.kind == EXTENT_DATA)
        return coded_extent(m, at, length, g.host, (uint64_t)next * VMDK_SECTOR, out);
    uint64_t in = at & (m->grain_bytes - 1);
    *out = (struct extent){.length = min_u64(length, m->grain_bytes - in), .kind = g.kind};
    return 0;
}

int vmdk_sparse_map_co(struct vmdk_map *m, uint64_t at, uint64_t length, struct extent *out) {
    uint64_t in = at & (m->grain_bytes - 1), table;
    struct page *page;
    uint8_t *entry;
    uint32_t left, run = 1;
    struct grain first, next;
    if (m->stream)
        return stream_map_co(m, at, length, out);
    if (!m->gd)
        return hole(m, at, length, out);
    int r = vmdk_table_co(m, at, false, &table);
    if (r < 0)
        return r;
    if (!table)
        return hole(m, at, length, out);
    uint64_t index = at % m->covers / m->grain_bytes;
    r = vmdk_entry_co(m, table, index, VMDK_LEVEL_GT, &page, &entry, &left);
    if (!r)
        r = grain_of(m, entry, &first);
    if (r < 0)
        return r;
    if (first.kind == EXTENT_DATA && m->coded) {
        uint64_t after = left > 1 ? (uint64_t)le32_load(entry + 4) * VMDK_SECTOR : 0;
        return coded_extent(m, at, length, first.host, after, out);
    }
    while (run < left && (uint64_t)run * m->grain_bytes < in + length) {
        if (grain_of(m, entry + (size_t)run * m->entry_bytes, &next) < 0 ||
            next.kind != first.kind ||
            (first.kind == EXTENT_DATA && next.host != first.host + (uint64_t)run * m->grain_bytes))
            break;
        run++;
    }
    *out = (struct extent){.length = min_u64(length, (uint64_t)run * m->grain_bytes - in),
                           .kind = first.kind};
    if (first.kind == EXTENT_DATA) {
        out->storage = m->file;
        out->host_offset = first.host + in;
    }
    return 0;
}

/* ---------------------------------------------------------------- extents */

int vmdk_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    struct vmdk *s = vmdk_of(n);
    struct vmdk_extent *x = vmdk_extent_at(s, offset);
    uint64_t at = offset - x->start;
    if (at >=
        x->length) { /* a disk of odd size ends inside of its last sector, none begins there */
        *out = (struct extent){.length = length, .kind = EXTENT_ZERO};
        return 0;
    }
    length = min_u64(length, x->length - at);
    if (x->access == VMDK_NOACCESS)
        return -EACCES;
    if (x->type == VMDK_ZERO) {
        *out = (struct extent){.length = length, .kind = EXTENT_ZERO};
        return 0;
    }
    if (!x->file)
        return -EIO;
    bool in_place = s->wrote && x->access == VMDK_RW && !s->frozen;
    if (!x->map) {
        *out = (struct extent){.length = length,
                               .kind = EXTENT_DATA,
                               .flags = in_place ? EXTENT_IN_PLACE : 0,
                               .storage = x->file,
                               .host_offset = x->offset + at};
        return 0;
    }
    int r = vmdk_activate_co(s, x->map);
    if (!r)
        r = vmdk_sparse_map_co(x->map, at, length, out);
    if (r < 0)
        return r;
    if (out->kind == EXTENT_DATA && in_place && !x->map->frozen)
        out->flags = EXTENT_IN_PLACE;
    if (out->kind == EXTENT_CODED)
        out->unit_offset += x->start;
    return 0;
}
