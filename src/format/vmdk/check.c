/* SPDX-License-Identifier: MIT */
/*
 * VMDK: check and repair.
 *
 * Every table and grain lies in its file and has one name; the redundant tables say the same; a
 * coded grain's marker names it; flat extents have the length that the descriptor says.  Grains
 * without a name are leaks, and so are redundant tables that lag behind, as a crash leaves them.
 *
 * Repair: the redundant tables are made equal; an entry that names what cannot be is taken from the
 * redundant table when that one is in order.  Entries that both are damaged stay: what they named
 * is lost, and zeros would hide that.
 */
#include <errno.h>
#include <inttypes.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"
#include "format/problem.h"
#include "format/seen.h"
#include "format/vmdk/vmdk.h"

struct walk {
    struct vmdk *s;
    struct vmdk_map *m;
    struct check_result *r;
    size_t extent;
    struct seen grains, tables;
    uint64_t unit; /* of `grains` */
    uint64_t named;
    uint64_t lag; /* entries of redundant tables that are behind */
    unsigned fix;
    uint64_t fixed;
};

static uint64_t host_of(const struct vmdk_map *m, const uint8_t *p) {
    if (m->type != VMDK_SE) {
        uint32_t e = le32_load(p);
        return e == 1 && m->zeroed ? 0 : (uint64_t)e * VMDK_SECTOR;
    }
    uint64_t e = le64_load(p), index = ((e >> 48) & 0xfff) | (e & UINT64_C(0xffffffffffff)) << 12;
    if (e >> 60 < 3)
        return 0;
    return index > (INT64_MAX - m->grains) / m->grain_bytes ? UINT64_MAX
                                                            : m->grains + index * m->grain_bytes;
}

static bool grain_is_sane(const struct vmdk_map *m, uint64_t host) {
    return host >= m->data_low && host < m->file->size;
}

/* Marks [at, +bytes).  1: shared with another. */
static int mark(struct walk *w, uint64_t at, uint64_t bytes) {
    int shared = 0;
    if (at % w->unit) /* somebody places grains anywhere: what they share is not told */
        return 0;
    for (uint64_t u = at / w->unit; u <= (at + bytes - 1) / w->unit; u++) {
        int r = seen_add(&w->grains, u);
        if (r < 0)
            return r;
        shared |= r;
        w->named += !r;
    }
    return shared;
}

static int check_marker_co(struct walk *w, uint64_t guest, uint64_t host, uint64_t *bytes) {
    uint8_t marker[12];
    int r = disk_pread_co(w->m->file, host, marker, sizeof(marker));
    *bytes = w->unit;
    if (r < 0)
        return r;
    uint32_t length = le32_load(marker + 8);
    if (le64_load(marker) != guest / VMDK_SECTOR)
        problem_corruption(w->r,
                           "extent %zu: the grain of offset %" PRIu64 " at %" PRIu64
                           " has a marker for sector %" PRIu64,
                           w->extent, guest, host, le64_load(marker));
    else if (!length || length > w->m->file->size - host - sizeof(marker))
        problem_corruption(w->r,
                           "extent %zu: the grain of offset %" PRIu64 " at %" PRIu64
                           " has a code of %" PRIu32 " bytes, which is not in the file",
                           w->extent, guest, host, length);
    else
        *bytes = sizeof(marker) + (uint64_t)length;
    return 0;
}

static int check_grain_co(struct walk *w, uint64_t guest, uint64_t host) {
    struct vmdk_map *m = w->m;
    uint64_t bytes = m->grain_bytes;
    int r = 0;
    w->r->allocated_clusters++;
    if (m->coded) {
        w->r->compressed_clusters++;
        if (m->h.flags & VMDK_MARKERS)
            r = check_marker_co(w, guest, host, &bytes);
        else
            bytes = VMDK_SECTOR;
    }
    if (!r)
        r = mark(w, host, min_u64(bytes, m->file->size - host));
    if (r > 0)
        problem_corruption(w->r,
                           "extent %zu: the grain at %" PRIu64 ", of offset %" PRIu64
                           ", has another name, too",
                           w->extent, host, guest);
    return r < 0 ? r : 0;
}

/* The entry `p`, and its twin in the redundant table (NULL: none). */
static int check_entry_co(struct walk *w, uint64_t guest, uint8_t *p, struct page *page,
                          uint8_t *twin, struct page *twin_page) {
    struct vmdk_map *m = w->m;
    uint64_t host = host_of(m, p);
    bool bad = host && !grain_is_sane(m, host);
    bool differs = twin && le32_load(p) != le32_load(twin);
    if (bad) {
        uint64_t other = twin ? host_of(m, twin) : 0;
        problem_corruption(w->r,
                           "extent %zu: the entry of offset %" PRIu64 " names %" PRIu64
                           ", which is not in the file",
                           w->extent, guest, host);
        if (w->fix & CHECK_FIX_ERRORS && differs && other && grain_is_sane(m, other)) {
            pages_modify(&m->pages, page);
            le32_store(p, le32_load(twin));
            w->fixed++;
        }
        return 0;
    }
    if (differs) {
        if (host_of(m, twin) && host)
            problem_corruption(w->r,
                               "extent %zu: the redundant entry of offset %" PRIu64
                               " names %" PRIu64 ", not %" PRIu64,
                               w->extent, guest, host_of(m, twin), host);
        else
            w->lag++;
        if (w->fix) {
            pages_modify(&m->pages, twin_page);
            le32_store(twin, le32_load(p));
            w->fixed++;
        }
    }
    return host ? check_grain_co(w, guest, host) : 0;
}

static int check_table_co(struct walk *w, uint64_t guest, uint64_t table, uint64_t twin) {
    struct vmdk_map *m = w->m;
    int r = 0;
    for (uint32_t i = 0;
         !r && i < m->gt_entries && guest + (uint64_t)i * m->grain_bytes < m->capacity; i++) {
        struct page *page, *twin_page = NULL;
        uint8_t *p, *tp = NULL;
        uint32_t left;
        r = twin ? vmdk_entry_co(m, twin, i, VMDK_LEVEL_GT, &twin_page, &tp, &left) : 0;
        if (r == -EIO)
            tp = NULL;
        r = vmdk_entry_co(m, table, i, VMDK_LEVEL_GT, &page, &p, &left);
        if (!r && tp) { /* looking up one may have pushed out the other */
            r = vmdk_entry_co(m, twin, i, VMDK_LEVEL_GT, &twin_page, &tp, &left);
            if (!r)
                r = vmdk_entry_co(m, table, i, VMDK_LEVEL_GT, &page, &p, &left);
        }
        if (!r)
            r = check_entry_co(w, guest + (uint64_t)i * m->grain_bytes, p, page, tp, twin_page);
    }
    return r;
}

/* 0: not there, or reported. */
static int find_table_co(struct walk *w, uint64_t guest, bool redundant, uint64_t *table) {
    uint64_t bytes = (uint64_t)w->m->gt_entries * w->m->entry_bytes;
    int r = vmdk_table_co(w->m, guest, redundant, table);
    if (r == -EIO) {
        problem_corruption(w->r,
                           "extent %zu: the %sgrain table of offset %" PRIu64 " is not in the file",
                           w->extent, redundant ? "redundant " : "", guest);
        *table = 0;
        return 0;
    }
    if (r < 0 || !*table)
        return r;
    for (uint64_t u = *table / VMDK_SECTOR; r >= 0 && u <= (*table + bytes - 1) / VMDK_SECTOR;
         u++) {
        int shared = seen_add(&w->tables, u);
        r = shared < 0 ? shared : r | shared;
    }
    if (r > 0) {
        problem_corruption(w->r, "extent %zu: the grain table at %" PRIu64 " overlaps another one",
                           w->extent, *table);
        *table = 0; /* walking tables that many entries name could take for ever */
    }
    if (*table && r >= 0 && *table >= w->m->data_low && !w->m->coded)
        r = mark(w, align_down(*table, w->unit), bytes); /* rooms of grains hold tables, too */
    return r < 0 ? r : 0;
}

static int walk_map_co(struct walk *w) {
    struct vmdk_map *m = w->m;
    int r = vmdk_activate_co(w->s, m);
    for (uint64_t at = 0; !r && m->gd && at < m->capacity; at += m->covers) {
        uint64_t table, twin = 0;
        r = find_table_co(w, at, false, &table);
        if (!r && m->rgd)
            r = find_table_co(w, at, true, &twin);
        if (!r && table)
            r = check_table_co(w, at, table, twin);
        if (!r && pages_crowded(&m->pages))
            r = vmdk_map_flush_co(m);
        if (w->r->progress)
            w->r->progress(w->r->arg, w->s->d.extents[w->extent].start + at, w->s->d.size);
    }
    if (w->lag && !r)
        problem_leaks(w->r, w->lag,
                      "extent %zu: %" PRIu64 " entries of the redundant grain tables are behind",
                      w->extent, w->lag);
    uint64_t units = m->file->size > m->data_low ? (m->file->size - m->data_low) / w->unit : 0;
    if (!r && !m->coded && m->type == VMDK_SPARSE && m->data_low % w->unit == 0 && units > w->named)
        problem_leaks(w->r, units - w->named,
                      "extent %zu: %" PRIu64 " grains of the file are not in use", w->extent,
                      units - w->named);
    return r;
}

static int check_map_co(struct vmdk *s, size_t extent, struct check_result *r, unsigned fix,
                        uint64_t *fixed) {
    struct vmdk_map *m = s->d.extents[extent].map;
    struct walk w = {.s = s, .m = m, .r = r, .extent = extent, .fix = fix};
    w.unit = m->coded || m->data_low % m->grain_bytes ? VMDK_SECTOR : m->grain_bytes;
    int rc = seen_init(&w.grains, m->file->size / w.unit + 2);
    if (!rc)
        rc = seen_init(&w.tables, m->file->size / VMDK_SECTOR + 2);
    if (!rc)
        rc = walk_map_co(&w);
    seen_free(&w.grains);
    seen_free(&w.tables);
    *fixed += w.fixed;
    r->total_clusters += div_up(m->capacity, m->grain_bytes);
    r->image_end_offset = max_u64(r->image_end_offset, m->file->size);
    return rc;
}

static int walk_all_co(struct vmdk *s, struct check_result *r, unsigned fix, uint64_t *fixed,
                       struct err *e) {
    for (size_t i = 0; i < s->d.count; i++) {
        const struct vmdk_extent *x = &s->d.extents[i];
        int rc = 0;
        if (x->problem)
            problem_corruption(r, "extent %zu, '%s': %s", i, x->name ? x->name : "", x->problem);
        else if (x->file && !x->map &&
                 (x->file->size < x->offset || x->file->size - x->offset < x->length))
            problem_corruption(
                r, "extent %zu, '%s': the file has %" PRIu64 " bytes, the extent ends at %" PRIu64,
                i, x->name, x->file->size, x->offset + x->length);
        else if (x->map)
            rc = check_map_co(s, i, r, fix, fixed);
        if (rc < 0)
            return err_errno(e, -rc, "extent %zu: reading the tables", i);
    }
    return 0;
}

int vmdk_check_co(struct node *n, struct check_result *r, struct err *e) {
    struct vmdk *s = vmdk_of(n);
    uint64_t fixed = 0, again = 0;
    int rc = walk_all_co(s, r, r->fix, &fixed, e);
    if (rc < 0 || !fixed)
        return rc;
    rc = vmdk_flush_co(n);
    if (rc < 0)
        return err_errno(e, -rc, "writing the tables");
    struct check_result last = {.progress = r->progress, .arg = r->arg};
    rc = walk_all_co(s, &last, 0, &again, e);
    if (rc < 0)
        return rc;
    r->corruptions_fixed =
        r->corruptions > last.corruptions ? r->corruptions - last.corruptions : 0;
    r->leaks_fixed = r->leaks > last.leaks ? r->leaks - last.leaks : 0;
    r->corruptions = last.corruptions;
    r->leaks = last.leaks;
    r->allocated_clusters = last.allocated_clusters;
    r->compressed_clusters = last.compressed_clusters;
    r->total_clusters = last.total_clusters;
    return 0;
}
