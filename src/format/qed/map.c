/* SPDX-License-Identifier: MIT */
/* QED: the map, new clusters and tables, and the ordered write-back. */
#include <errno.h>
#include <stdlib.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/plant.h"
#include "disk/io.h"
#include "format/in_place.h"
#include "format/qed/qed.h"

static int table_page_co(struct qed *s, uint64_t table, uint64_t index, unsigned level,
                         struct page **page, uint8_t **at, uint32_t *left) {
    uint64_t start = index / (PAGE_BYTES / 8) * (PAGE_BYTES / 8);
    int r = pages_get_co(&s->pages, table + start * 8, PAGE_BYTES, level, page);
    if (r < 0)
        return r;
    *at = (*page)->data + (index - start) * 8;
    *left = (uint32_t)(PAGE_BYTES / 8 - (index - start));
    return 0;
}

static uint64_t l1_index(const struct qed *s, uint64_t offset) {
    return offset >> (s->cluster_bits + s->entry_bits);
}
static uint64_t l2_index(const struct qed *s, uint64_t offset) {
    return (offset >> s->cluster_bits) & ((UINT64_C(1) << s->entry_bits) - 1);
}

/* The L2 table that covers `offset`; 0: none. */
static int l2_table_co(struct qed *s, uint64_t offset, uint64_t *table) {
    struct page *page;
    uint8_t *at;
    uint32_t left;
    int r = table_page_co(s, s->h.l1_offset, l1_index(s, offset), QED_LEVEL_L1, &page, &at, &left);
    if (r < 0)
        return r;
    *table = le64_load(at);
    return *table && !qed_inside(s, *table, s->table_bytes) ? -EIO : 0;
}

int qed_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    struct qed *s = qed_of(n);
    uint64_t cs = s->h.cluster_size, in = offset & (cs - 1), table;
    struct page *page;
    uint8_t *at;
    uint32_t left, run = 1;
    int r = l2_table_co(s, offset, &table);
    if (r < 0)
        return r;
    if (!table) {
        uint64_t covers = UINT64_C(1) << (s->cluster_bits + s->entry_bits);
        *out = (struct extent){.length = min_u64(length, covers - (offset & (covers - 1))),
                               .kind = EXTENT_HOLE};
        return 0;
    }
    r = table_page_co(s, table, l2_index(s, offset), QED_LEVEL_L2, &page, &at, &left);
    if (r < 0)
        return r;
    uint64_t first = le64_load(at);
    bool data = first > QED_ENTRY_ZERO;
    if (data && !qed_data_inside(s, first))
        return -EIO;
    while (run < left && run * cs < in + length) {
        uint64_t next = le64_load(at + (size_t)run * 8);
        if (data ? next != first + run * cs || !qed_data_inside(s, next) : next != first)
            break;
        run++;
    }
    *out = (struct extent){
        .length = min_u64(length, run * cs - in),
        .kind = data                      ? EXTENT_DATA
                : first == QED_ENTRY_ZERO ? EXTENT_ZERO
                                          : EXTENT_HOLE,
    };
    if (data) {
        out->flags = EXTENT_IN_PLACE;
        out->storage = s->file;
        out->host_offset = first + in;
    }
    return 0;
}

/* ---------------------------------------------------------------- room */

/* Up to `want` clusters in one piece that nothing names (all of them, when `whole`). */
static int take_clusters(struct qed *s, uint64_t want, bool whole, uint64_t *host, uint64_t *got) {
    if (spares_take(&s->spares, want, whole, host, got)) {
        *host <<= s->cluster_bits;
        return 0;
    }
    if (s->next + want > (uint64_t)INT64_MAX >> s->cluster_bits)
        return -EFBIG;
    *got = want;
    *host = s->next << s->cluster_bits;
    s->next += want;
    return 0;
}

static void give_clusters(struct qed *s, uint64_t host, uint64_t count) {
    uint64_t cluster = host >> s->cluster_bits;
    if (cluster + count == s->next)
        s->next = cluster;
    else
        spares_give(&s->spares, cluster, count);
}

static bool is_fresh(const struct qed *s, uint64_t host, uint64_t file_end) {
    return s->file->storage_flags & STORAGE_ZERO_INIT && host >= file_end;
}

/* As l2_table_co, making an empty table where there is none. */
static int l2_table_writable_co(struct qed *s, uint64_t offset, uint64_t *table) {
    uint64_t got, file_end = s->file->size;
    struct page *page;
    uint8_t *at;
    uint32_t left;
    int r = l2_table_co(s, offset, table);
    if (r < 0 || *table)
        return r;
    task_mutex_lock_co(&s->table_lock);
    r = l2_table_co(s, offset, table);
    if (!r && !*table) {
        r = take_clusters(s, s->h.table_size, true, table, &got);
        if (!r && !(is_fresh(s, *table, file_end)))
            r = disk_zero_co(s->file, *table, s->table_bytes, 0);
        if (!r && s->file->size < *table + s->table_bytes)
            r = disk_resize_co(s->file, *table + s->table_bytes, PREALLOC_OFF, NULL);
        if (!r)
            r = table_page_co(s, s->h.l1_offset, l1_index(s, offset), QED_LEVEL_L1, &page, &at,
                              &left);
        if (!r) {
            pages_modify(&s->pages, page);
            le64_store(at, *table);
        }
    }
    task_mutex_unlock(&s->table_lock);
    return r;
}

int qed_place_co(struct node *n, uint64_t offset, uint64_t length, unsigned flags,
                 uint32_t coded_length, struct placement *out) {
    struct qed *s = qed_of(n);
    uint64_t cs = s->h.cluster_size, in = offset & (cs - 1), table, host, got;
    struct extent x;
    if (flags & PLACE_CODED)
        return -ENOTSUP;
    int r = pages_crowded(&s->pages) ? qed_flush_co(n) : 0;
    if (!r)
        r = l2_table_writable_co(s, offset, &table);
    if (!r)
        r = qed_map_co(n, offset, length, &x);
    if (r < 0)
        return r;
    *out = (struct placement){.offset = offset, .length = x.length, .storage = s->file};
    if (x.kind == EXTENT_DATA) {
        out->host_offset = x.host_offset;
        return 0;
    }
    uint64_t file_end = s->file->size;
    r = take_clusters(s, div_up(in + x.length, cs), false, &host, &got);
    if (r < 0)
        return r;
    out->length = min_u64(x.length, got * cs - in);
    out->host_offset = host + in;
    out->head = (uint32_t)in;
    out->tail = (uint32_t)((cs - ((in + out->length) & (cs - 1))) & (cs - 1));
    out->is_new = true;
    out->reads_zero = is_fresh(s, host, file_end);
    out->cookie[0] = host;
    out->cookie[1] = got;
    return 0;
}

/* Entries of clusters [offset, +count clusters) become `entry`, each `step` above the last. */
static int set_entries_co(struct qed *s, uint64_t offset, uint64_t count, uint64_t entry,
                          uint64_t step) {
    while (count) {
        struct page *page;
        uint8_t *at = NULL;
        uint32_t left = 0;
        uint64_t table;
        int r = l2_table_writable_co(s, offset, &table);
        if (!r)
            r = table_page_co(s, table, l2_index(s, offset), QED_LEVEL_L2, &page, &at, &left);
        if (r < 0)
            return r;
        pages_modify(&s->pages, page);
        for (; left && count; left--, count--, at += 8, entry += step, offset += s->h.cluster_size)
            le64_store(at, entry);
    }
    return 0;
}

int qed_publish_co(struct node *n, const struct placement *p) {
    struct qed *s = qed_of(n);
    if (!p->is_new)
        return 0;
    return set_entries_co(s, align_down(p->offset, s->h.cluster_size), p->cookie[1], p->cookie[0],
                          s->h.cluster_size);
}

void qed_abandon(struct node *n, const struct placement *p) {
    if (p->is_new)
        give_clusters(qed_of(n), p->cookie[0], p->cookie[1]);
}

/* A cluster that is there stays, as nothing would know that it is free: its bytes are zeroed. */
int qed_set_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    struct qed *s = qed_of(n);
    zero_flags = in_place_zero_flags(n, zero_flags);
    for (uint64_t done = 0; done < length;) {
        struct extent x;
        int r = pages_crowded(&s->pages) ? qed_flush_co(n) : 0;
        if (!r)
            r = qed_map_co(n, offset + done, length - done, &x);
        if (!r && x.kind == EXTENT_DATA)
            r = disk_zero_co(s->file, x.host_offset, x.length, zero_flags);
        else if (!r && x.kind == EXTENT_HOLE && (n->backing || n->backing_name))
            r = set_entries_co(s, offset + done, div_up(x.length, s->h.cluster_size),
                               QED_ENTRY_ZERO, 0);
        if (r < 0)
            return r;
        done += x.length;
    }
    return 0;
}

/* ---------------------------------------------------------------- write-back */

int qed_flush_co(struct node *n) {
    struct qed *s = qed_of(n);
    struct pages_batch l1 = {0}, l2 = {0};
    task_mutex_lock_co(&s->flush_lock);
    /* Both at once: what the L1 entries name now, the L2 entries of now are in. */
    int r = pages_take(&s->pages, QED_LEVEL_L2, &l2);
    if (!r)
        r = pages_take(&s->pages, QED_LEVEL_L1, &l1);
    uint64_t end = s->next << s->cluster_bits;
    if (!r && l2.count && s->file->size < end)
        r = disk_resize_co(s->file, end, PREALLOC_OFF, NULL);
    if (!r && PLANTED(TABLE_NAMED_EARLY))
        r = pages_write_co(&s->pages, &l1);
    if (!r && !PLANTED(NO_BARRIER_BEFORE_TABLES))
        r = disk_flush_co(s->file);
    if (!r && l2.count) {
        r = pages_write_co(&s->pages, &l2);
        if (!r && !PLANTED(NO_LAST_BARRIER))
            r = disk_flush_co(s->file);
    }
    if (!r && l1.count) {
        r = pages_write_co(&s->pages, &l1);
        if (!r && !PLANTED(NO_LAST_BARRIER))
            r = disk_flush_co(s->file);
    }
    pages_give_back(&s->pages, &l2);
    pages_give_back(&s->pages, &l1);
    task_mutex_unlock(&s->flush_lock);
    return r;
}
