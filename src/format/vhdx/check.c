/* SPDX-License-Identifier: MIT */
/*
 * VHDX: check.  Both headers and both region tables are whole; the states of BAT entries are known
 * and have their reserved bits clear; each block lies in the file and shares no MiB with anything.
 *
 * A MiB that nothing names is a leak, reported together; behind everything a repair cuts it off.  A
 * header or region table of which the other copy is whole, and a log that waits, cost nothing but a
 * repair: they are told as leaks. Repair: the log was replayed when the image was opened; damaged
 * copies are written again.
 */
#include <errno.h>
#include <inttypes.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"
#include "format/problem.h"
#include "format/seen.h"
#include "format/vhdx/vhdx.h"

#define PIECE ((uint32_t)MIB)

struct walk {
    struct vhdx *s;
    struct check_result *r;
    struct seen seen; /* MiB of the file */
    uint64_t end;
};

/* Marks [host, +length), as far as the file has it; 1: some of it is in use already. */
static int use(struct walk *w, uint64_t host, uint64_t length) {
    uint64_t from = host / VHDX_MIB, to = min_u64(div_up(host + length, VHDX_MIB), w->seen.units);
    int met = 0;
    for (uint64_t i = from; i < to && met >= 0; i++) {
        int r = seen_add(&w->seen, i);
        met = r ? r : met;
    }
    w->end = max_u64(w->end, host + length);
    return met;
}

static int use_regions(struct walk *w) {
    const struct vhdx *s = w->s;
    int r = use(w, 0, VHDX_MIB);
    if (r >= 0 && s->h.log_length)
        r = use(w, s->h.log_offset, s->h.log_length);
    if (r >= 0)
        r = use(w, s->r.bat.offset, s->r.bat.length);
    if (r >= 0)
        r = use(w, s->r.metadata.offset, s->r.metadata.length);
    for (uint32_t i = 0; r >= 0 && i < s->r.other_count; i++)
        if (s->r.others[i].offset < vhdx_file_size(s))
            r = use(w, s->r.others[i].offset, s->r.others[i].length);
    return r < 0 ? r : 0;
}

/* A block that is here in part has a bitmap that says which. */
static int check_bitmap_co(struct walk *w, uint64_t index) {
    struct vhdx *s = w->s;
    uint64_t per = s->ratio + UINT64_C(1), at = (index / per + 1) * per - 1;
    uint8_t buf[8];
    int r = vhdx_read_co(s, s->r.bat.offset + at * 8, buf, sizeof(buf));
    if (!r && (le64_load(buf) & VHDX_STATE_MASK) != VHDX_PRESENT)
        problem_corruption(w->r,
                           "BAT entry %" PRIu64 " names a block that is here in part, and entry "
                           "%" PRIu64 " names no bitmap that says which",
                           index, at);
    return r;
}

static int check_entry_co(struct walk *w, uint64_t index, uint64_t entry) {
    struct vhdx *s = w->s;
    bool bitmap = index % (s->ratio + UINT64_C(1)) == s->ratio;
    unsigned state = entry & VHDX_STATE_MASK;
    uint64_t host = entry & VHDX_OFFSET_MASK;
    uint64_t length = bitmap ? VHDX_MIB : s->m.block_size;
    bool data = state >= VHDX_PRESENT;
    if (state == 4 || (bitmap && state != VHDX_NOT_PRESENT && state != VHDX_PRESENT) ||
        (state == VHDX_PARTIAL && !s->m.has_parent)) {
        problem_corruption(w->r, "BAT entry %" PRIu64 " has state %u, which %s does not have",
                           index, state, bitmap ? "a bitmap" : "such a block");
        return 0;
    }
    if (entry & ~VHDX_OFFSET_MASK & ~VHDX_STATE_MASK)
        problem_corruption(w->r, "BAT entry %" PRIu64 " is 0x%" PRIx64 ": reserved bits are set",
                           index, entry);
    if (!data && (!host || !vhdx_host_is_sane(s, host, length)))
        return 0; /* the place means nothing there */
    if (!vhdx_host_is_sane(s, host, length)) {
        problem_corruption(w->r,
                           "BAT entry %" PRIu64 " names a block at %" PRIu64
                           ", which is in a header, the log, a region or behind the end of the "
                           "file (%" PRIu64 " bytes)",
                           index, host, vhdx_file_size(s));
        return 0;
    }
    if (!data && !s->m.fixed)
        return 0;
    int met = use(w, host, length);
    if (met > 0)
        problem_corruption(w->r,
                           "BAT entry %" PRIu64 " names a block at %" PRIu64
                           ", which something else uses too",
                           index, host);
    if (!bitmap && data)
        w->r->allocated_clusters++;
    if (met >= 0 && !bitmap && state == VHDX_PARTIAL)
        return check_bitmap_co(w, index);
    return met < 0 ? met : 0;
}

static int walk_co(struct walk *w) {
    struct vhdx *s = w->s;
    uint64_t entries = vhdx_bat_entries(&s->m, s->m.size);
    uint8_t *buf = buf_get(PIECE);
    int r = buf ? 0 : -ENOMEM;
    for (uint64_t index = 0; !r && index < entries;) {
        uint32_t count = (uint32_t)min_u64(PIECE / 8, entries - index);
        r = vhdx_read_co(s, s->r.bat.offset + index * 8, buf, count * 8);
        for (uint32_t i = 0; !r && i < count; i++)
            r = check_entry_co(w, index + i, le64_load(buf + i * 8));
        index += count;
        if (w->r->progress)
            w->r->progress(w->r->arg, index, entries);
    }
    buf_put(buf, PIECE);
    return r;
}

static int mend_regions_co(struct vhdx *s, int bad) {
    uint8_t *buf = buf_get(VHDX_REGION_TABLE_BYTES);
    int r = buf ? disk_pread_co(s->file, VHDX_REGIONS_AT(1 - bad), buf, VHDX_REGION_TABLE_BYTES)
                : -ENOMEM;
    if (!r)
        r = disk_pwrite_co(s->file, VHDX_REGIONS_AT(bad), buf, VHDX_REGION_TABLE_BYTES);
    buf_put(buf, VHDX_REGION_TABLE_BYTES);
    s->regions_ok[bad] |= !r;
    return r;
}

/* What is there twice, and the log. */
static int check_copies_co(struct vhdx *s, struct check_result *r) {
    int rc = 0;
    if (s->replayed && r->fix) {
        problem_leaks(r, 0, "the log was not empty: %" PRIu32 " entries were replayed",
                      s->replayed_entries);
        r->leaks_fixed++;
    } else if (!vhdx_guid_is_null(&s->h.log_guid) && !s->begun) {
        problem_leaks(r, 1,
                      "the log is not empty: %" PRIu32
                      " entries are read as if they had been replayed; a repair or the next "
                      "opening for writing does that",
                      s->replay.entries);
    }
    for (int i = 0; !rc && i < 2; i++) {
        if (!s->header_ok[i]) {
            problem_leaks(r, r->fix ? 0 : 1, "header %d is damaged; the other one counts", i + 1);
            if (r->fix && !(rc = vhdx_header_update_co(s)))
                r->leaks_fixed++;
        }
        if (!rc && !s->regions_ok[i]) {
            problem_leaks(r, r->fix ? 0 : 1, "region table %d is damaged; the other one counts",
                          i + 1);
            if (r->fix && !(rc = mend_regions_co(s, i)))
                r->leaks_fixed++;
        }
    }
    if (!rc && r->fix)
        rc = disk_flush_co(s->file);
    return rc;
}

static bool ends_region(const struct vhdx *s, uint64_t at) {
    return at == VHDX_MIB || at == s->h.log_offset + s->h.log_length ||
           at == s->r.bat.offset + s->r.bat.length ||
           at == s->r.metadata.offset + s->r.metadata.length;
}

/* What is behind everything goes, in a repair. */
static int cut_co(struct walk *w) {
    struct vhdx *s = w->s;
    uint64_t end = align_up(w->end, VHDX_MIB);
    if (!w->r->fix || s->file->size <= end)
        return 0;
    uint64_t unused = div_up(s->file->size - end, VHDX_MIB);
    problem_leaks(w->r, 0, "%" PRIu64 " MiB at the end of the file are not in use", unused);
    int r = disk_resize_co(s->file, end, PREALLOC_OFF, NULL);
    if (!r) {
        w->r->leaks_fixed += unused;
        w->seen.units = end / VHDX_MIB;
        s->next = end;
    }
    return r;
}

/* Room that writers leave behind a region is no leak. */
static int count_unused_co(struct walk *w) {
    uint64_t unused = 0;
    bool spare = false;
    int r = cut_co(w);
    for (uint64_t i = 0; r >= 0 && i < w->seen.units; i++) {
        spare |= ends_region(w->s, i * VHDX_MIB);
        r = seen_add(&w->seen, i);
        if (r > 0)
            spare = ends_region(w->s, i * VHDX_MIB);
        else if (!spare)
            unused++;
    }
    if (r >= 0 && unused)
        problem_leaks(w->r, unused, "%" PRIu64 " of %" PRIu64 " MiB of the file are not in use",
                      unused, w->seen.units);
    return r < 0 ? r : 0;
}

int vhdx_check_co(struct node *n, struct check_result *r, struct err *e) {
    struct vhdx *s = vhdx_of(n);
    struct walk w = {.s = s, .r = r};
    int rc = check_copies_co(s, r);
    if (!rc)
        rc = seen_init(&w.seen, div_up(vhdx_file_size(s), VHDX_MIB));
    if (!rc)
        rc = use_regions(&w);
    if (!rc)
        rc = walk_co(&w);
    r->total_clusters = div_up(s->m.size, s->m.block_size);
    r->image_end_offset = min_u64(w.end, vhdx_file_size(s));
    if (!rc)
        rc = count_unused_co(&w);
    seen_free(&w.seen);
    return rc < 0 ? err_errno(e, -rc, "reading the BAT") : 0;
}
