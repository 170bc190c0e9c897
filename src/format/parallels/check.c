/* SPDX-License-Identifier: MIT */
/*
 * Parallels: check, and its repair.  The data offset lies behind the table; each cluster lies in
 * the file, at a cluster's distance from that offset, and has one name; what lies behind the last
 * one is a leak.
 *
 * Errors.  A wrong data offset becomes the end of the table.  Entries that name nothing in the file
 * become free, stably, before the file grows.  Of several entries that name one cluster all but the
 * first get a copy behind the last cluster, and so do those that name an unaligned place.
 * Leaks.  The file ends behind the last cluster.
 */
#include <errno.h>
#include <inttypes.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/plant.h"
#include "disk/io.h"
#include "format/parallels/parallels.h"
#include "format/problem.h"
#include "format/repair.h"
#include "format/seen.h"

#define PIECE ((uint32_t)MIB)

struct walk {
    struct parallels *s;
    struct check_result *r; /* NULL: repairs */
    struct seen seen;       /* clusters of the file, from the data offset on */
    uint64_t end;           /* of the last cluster named */
};

static bool is_aligned_host(const struct parallels *s, uint32_t entry) {
    return ((uint64_t)entry * s->unit - s->data_offset) % s->cluster_size == 0;
}

static int seen_entry(struct walk *w, uint32_t entry) {
    const struct parallels *s = w->s;
    return seen_add(&w->seen, ((uint64_t)entry * s->unit - s->data_offset) / s->cluster_size);
}

/* 1: the entry has changed. */
typedef int entry_fn(struct walk *w, uint64_t index, uint8_t *at);

static int look_at_entry_co(struct walk *w, uint64_t index, uint8_t *at) {
    struct parallels *s = w->s;
    uint32_t entry = le32_load(at);
    uint64_t host = (uint64_t)entry * s->unit;
    if (!entry)
        return 0;
    bool inside = parallels_entry_is_sane(s, entry);
    if (inside)
        w->end = max_u64(w->end, host + s->cluster_size);
    if (!inside || !is_aligned_host(s, entry)) {
        problem_corruption(w->r,
                           "entry %" PRIu64 " names a cluster at %" PRIu64
                           ", which is not in the file or not aligned",
                           index, host);
        return 0;
    }
    int met = seen_entry(w, entry);
    if (met < 0)
        return met;
    w->r->allocated_clusters++;
    if (met) {
        problem_corruption(w->r,
                           "entry %" PRIu64 " names the cluster at %" PRIu64
                           ", which another entry names too",
                           index, host);
    }
    return 0;
}

static int clear_outside_co(struct walk *w, uint64_t index, uint8_t *at) {
    uint32_t entry = le32_load(at);
    if (!entry || parallels_entry_is_sane(w->s, entry))
        return 0;
    le32_store(at, 0);
    return 1;
}

static int part_co(struct walk *w, uint64_t index, uint8_t *at) {
    struct parallels *s = w->s;
    uint32_t entry = le32_load(at);
    int met = !entry ? 0 : is_aligned_host(s, entry) ? seen_entry(w, entry) : 1;
    if (met <= 0)
        return met;
    if ((s->end + s->cluster_size) / s->unit > UINT32_MAX)
        return -EFBIG;
    int r = repair_copy_co(s->file, (uint64_t)entry * s->unit, s->end, s->cluster_size);
    le32_store(at, (uint32_t)(s->end / s->unit));
    s->end += s->cluster_size;
    return r < 0 ? r : 1;
}

/* Copies are stable before the piece of the table that names them is written. */
static int each_entry_co(struct walk *w, entry_fn *fn_co) {
    struct parallels *s = w->s;
    uint8_t *buf = buf_get(PIECE);
    int r = buf ? 0 : -ENOMEM;
    for (uint32_t done = 0; !r && done < s->entries;) {
        uint32_t count = (uint32_t)min_u64(PIECE / 4, s->entries - done);
        uint64_t host = PARALLELS_HEADER_BYTES + (uint64_t)done * 4;
        bool changed = false;
        r = disk_pread_co(s->file, host, buf, count * 4);
        for (uint32_t i = 0; r >= 0 && i < count; i++) {
            r = fn_co(w, done + i, buf + (size_t)i * 4);
            changed |= r > 0;
        }
        r = r > 0 ? 0 : r;
        if (!r && changed && !PLANTED(MOVED_DATA_LATE))
            r = disk_flush_co(s->file);
        if (!r && changed)
            r = disk_pwrite_co(s->file, host, buf, count * 4);
        done += count;
        if (w->r && w->r->progress)
            w->r->progress(w->r->arg, done, s->entries);
    }
    buf_put(buf, PIECE);
    return r;
}

static int seen_file(struct walk *w) {
    const struct parallels *s = w->s;
    uint64_t size = s->file->size, room = size > s->data_offset ? size - s->data_offset : 0;
    return seen_init(&w->seen, div_up(room, s->cluster_size));
}

static int look_co(struct node *n, struct check_result *r, struct err *e) {
    struct parallels *s = parallels_of(n);
    struct walk w = {.s = s, .r = r, .end = s->data_offset};
    if (s->data_wrong)
        problem_corruption(r, "the data offset is said to be %" PRIu32 " sectors, not %" PRIu64,
                           le32_load(s->header + PARALLELS_AT_DATA),
                           s->data_offset / PARALLELS_SECTOR);
    int rc = seen_file(&w);
    if (!rc)
        rc = each_entry_co(&w, look_at_entry_co);
    seen_free(&w.seen);
    if (rc < 0)
        return err_errno(e, -rc, "reading the table");
    r->image_end_offset = w.end;
    r->total_clusters = s->entries;
    if (s->file->size > w.end && !le64_load(s->header + PARALLELS_AT_EXTENSION)) {
        uint64_t unused = div_up(s->file->size - w.end, s->cluster_size);
        problem_leaks(r, unused, "%" PRIu64 " clusters at the end of the file are not in use",
                      unused);
    }
    return 0;
}

static int mended(struct walk *w, int r, struct err *e) {
    struct parallels *s = w->s;
    seen_free(&w->seen);
    if (!r)
        r = disk_flush_co(s->file);
    if (!r)
        r = pages_forget_all(&s->pages);
    s->scanned = false;
    return r < 0 ? err_errno(e, -r, "repairing the table") : 0;
}

static int repair_errors_co(struct node *n, struct err *e) {
    struct parallels *s = parallels_of(n);
    struct walk w = {.s = s};
    int r = parallels_check_extension_co(s, e);
    if (r < 0)
        return r;
    /* Copies could land on clusters of bitmaps, which nothing would notice. */
    if (s->data_wrong || le64_load(s->header + PARALLELS_AT_EXTENSION)) {
        le32_store(s->header + PARALLELS_AT_DATA, (uint32_t)(s->data_offset / PARALLELS_SECTOR));
        le64_store(s->header + PARALLELS_AT_EXTENSION, 0);
        r = parallels_header_write_co(s);
        s->data_wrong = r < 0;
    }
    if (!r)
        r = each_entry_co(&w, clear_outside_co);
    if (!r)
        r = disk_flush_co(s->file);
    if (!r)
        r = parallels_scan_co(s);
    if (!r)
        r = seen_file(&w);
    if (!r)
        r = each_entry_co(&w, part_co);
    return mended(&w, r, e);
}

static int repair_leaks_co(struct node *n, struct err *e) {
    struct parallels *s = parallels_of(n);
    struct walk w = {.s = s};
    int r = parallels_scan_co(s);
    if (!r && s->file->size > s->end)
        r = disk_resize_co(s->file, s->end, PREALLOC_OFF, NULL);
    return mended(&w, r, e);
}

int parallels_check_co(struct node *n, struct check_result *r, struct err *e) {
    static const struct repair_ops ops = {look_co, repair_errors_co, repair_leaks_co};
    struct parallels *s = parallels_of(n);
    int rc = repair_run_co(n, &ops, r, e);
    /* Whoever left it in use has no claim any more. */
    if (!rc && r->fix & CHECK_FIX_ERRORS && !r->corruptions && n->flags & NODE_CHECK &&
        le32_load(s->header + PARALLELS_AT_IN_USE) == PARALLELS_IN_USE) {
        le32_store(s->header + PARALLELS_AT_IN_USE, 0);
        rc = parallels_header_write_co(s);
        if (rc < 0)
            err_errno(e, -rc, "writing the header");
    }
    return rc;
}
