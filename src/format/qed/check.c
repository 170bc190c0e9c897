/* SPDX-License-Identifier: MIT */
/*
 * QED: check.  Every table and cluster lies inside the file, aligned, and has one name; what has
 * none is a leak.
 *
 * Two walks: the L1 table tells where tables lie, then the tables tell where data lies.  A table
 * that shares clusters with another is met once, however many entries name it.  The repair
 * (repair.c) walks in the same way with functions of its own.
 */
#include <errno.h>
#include <inttypes.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/plant.h"
#include "disk/io.h"
#include "format/problem.h"
#include "format/qed/check.h"
#include "format/repair.h"

#define PIECE ((uint32_t)MIB)

/* ---------------------------------------------------------------- walking */

/* Does that to each entry of a table; copies are stable before a piece that names them is written.
 */
static int each_entry_co(struct qed_walk *w, uint64_t table, qed_entry_fn *fn_co, uint8_t *buf) {
    struct qed *s = w->s;
    int r = 0;
    for (uint64_t at = 0; !r && at < s->table_bytes; at += PIECE) {
        uint32_t bytes = (uint32_t)min_u64(PIECE, s->table_bytes - at);
        bool changed = false;
        r = disk_pread_co(s->file, table + at, buf, bytes);
        for (uint32_t i = 0; r >= 0 && i < bytes; i += 8) {
            r = fn_co(w, (at + i) / 8, buf + i);
            changed |= r > 0;
        }
        r = r > 0 ? 0 : r;
        if (!r && changed && !PLANTED(MOVED_DATA_LATE))
            r = disk_flush_co(s->file);
        if (!r && changed)
            r = disk_pwrite_co(s->file, table + at, buf, bytes);
    }
    return r;
}

int qed_each_l1_co(struct qed_walk *w, qed_entry_fn *fn_co) {
    uint8_t *buf = buf_get(PIECE);
    int r = buf ? each_entry_co(w, w->s->h.l1_offset, fn_co, buf) : -ENOMEM;
    buf_put(buf, PIECE);
    return r;
}

struct data_walk {
    struct qed_walk *w;
    qed_entry_fn *fn_co;
    struct seen walked;
    uint8_t *buf;
};

static int walk_table_co(struct data_walk *d, uint64_t index, uint64_t table) {
    struct qed *s = d->w->s;
    if (!table || !qed_inside(s, table, s->table_bytes))
        return 0;
    for (uint32_t i = 0; i < s->h.table_size; i++) {
        int r = seen_add(&d->walked, (table >> s->cluster_bits) + i);
        if (r)
            return r < 0 ? r : 0;
    }
    d->w->guest = index << (s->cluster_bits + s->entry_bits);
    return each_entry_co(d->w, table, d->fn_co, d->buf);
}

int qed_each_l2_co(struct qed_walk *w, qed_entry_fn *fn_co) {
    struct qed *s = w->s;
    struct data_walk d = {.w = w, .fn_co = fn_co, .buf = buf_get(PIECE)};
    uint8_t *l1 = buf_get(PIECE);
    int r = l1 && d.buf ? seen_init(&d.walked, qed_clusters(s)) : -ENOMEM;
    for (uint64_t at = 0; !r && at < s->table_bytes; at += PIECE) {
        uint32_t bytes = (uint32_t)min_u64(PIECE, s->table_bytes - at);
        r = disk_pread_co(s->file, s->h.l1_offset + at, l1, bytes);
        for (uint32_t i = 0; !r && i < bytes; i += 8)
            r = walk_table_co(&d, (at + i) / 8, le64_load(l1 + i));
        if (w->r && w->r->progress)
            w->r->progress(w->r->arg, at + bytes, s->table_bytes);
    }
    seen_free(&d.walked);
    buf_put(l1, PIECE);
    buf_put(d.buf, PIECE);
    return r;
}

/* ---------------------------------------------------------------- what is there */

/* Marks [offset, +bytes).  1: it is shared with something else. -ENOMEM. */
static int mark_table(struct qed_walk *w, uint64_t offset, uint64_t bytes) {
    uint64_t first = offset >> w->s->cluster_bits, count = div_up(bytes, w->s->h.cluster_size);
    int shared = 0;
    for (uint64_t i = 0; i < count; i++) {
        int r = seen_add(&w->tables, first + i);
        if (r < 0)
            return r;
        shared |= r;
        w->named += !r;
    }
    w->shared_tables |= shared;
    return shared;
}

static int look_at_l1_co(struct qed_walk *w, uint64_t index, uint8_t *at) {
    struct qed *s = w->s;
    uint64_t table = le64_load(at);
    if (!table)
        return 0;
    if (!qed_inside(s, table, s->table_bytes)) {
        if (w->r)
            problem_corruption(w->r,
                               "L1 entry %" PRIu64 " names a table at %" PRIu64
                               ", which is unaligned or not in the file",
                               index, table);
        return 0;
    }
    int r = mark_table(w, table, s->table_bytes);
    if (r > 0 && w->r)
        problem_corruption(w->r, "the L2 table at %" PRIu64 " overlaps something else", table);
    return r < 0 ? r : 0;
}

static int look_at_l2_co(struct qed_walk *w, uint64_t index, uint8_t *at) {
    struct qed *s = w->s;
    uint64_t entry = le64_load(at), guest = w->guest + (index << s->cluster_bits);
    if (entry <= QED_ENTRY_ZERO)
        return 0;
    if (!qed_data_inside(s, entry)) {
        if (w->r)
            problem_corruption(w->r,
                               "the L2 entry of guest offset %" PRIu64 " names %" PRIu64
                               ", which is unaligned or not in the file",
                               guest, entry);
        return 0;
    }
    bool in_table = seen_has(&w->tables, entry >> s->cluster_bits);
    int r = seen_add(&w->data, entry >> s->cluster_bits);
    if (r < 0)
        return r;
    w->shared_tables |= in_table;
    w->named += !in_table && !r;
    if (!w->r)
        return 0;
    w->r->allocated_clusters++;
    if (w->last_data && entry != w->last_data + s->h.cluster_size)
        w->r->fragmented_clusters++;
    w->last_data = entry;
    if (r || in_table) {
        problem_corruption(
            w->r, "the cluster at %" PRIu64 ", of guest offset %" PRIu64 ", has another name, too",
            entry, guest);
    }
    return 0;
}

uint64_t qed_clusters(const struct qed *s) {
    return max_u64(div_up(s->file->size, s->h.cluster_size), s->h.header_size);
}

int qed_walk_begin_co(struct qed_walk *w) {
    struct qed *s = w->s;
    int r = seen_init(&w->tables, qed_clusters(s));
    if (!r)
        r = seen_init(&w->data, qed_clusters(s));
    if (!r)
        r = mark_table(w, 0, (uint64_t)s->h.header_size * s->h.cluster_size);
    if (r >= 0)
        r = mark_table(w, s->h.l1_offset, s->table_bytes);
    if (r >= 0)
        r = qed_each_l1_co(w, look_at_l1_co);
    return r < 0 ? r : qed_each_l2_co(w, look_at_l2_co);
}

void qed_walk_end(struct qed_walk *w) {
    seen_free(&w->tables);
    seen_free(&w->data);
}

static int look_co(struct node *n, struct check_result *r, struct err *e) {
    struct qed *s = qed_of(n);
    struct qed_walk w = {.s = s, .r = r};
    int rc = qed_walk_begin_co(&w);
    qed_walk_end(&w);
    if (rc < 0)
        return err_errno(e, -rc, "reading the tables");
    r->total_clusters = div_up(n->size, s->h.cluster_size);
    r->image_end_offset = s->file->size;
    uint64_t clusters = div_up(s->file->size, s->h.cluster_size);
    if (clusters > w.named) {
        problem_leaks(r, clusters - w.named, "%" PRIu64 " clusters of the file are not in use",
                      clusters - w.named);
    }
    return 0;
}

int qed_check_co(struct node *n, struct check_result *r, struct err *e) {
    static const struct repair_ops ops = {look_co, qed_repair_errors_co, qed_repair_leaks_co};
    struct qed *s = qed_of(n);
    int rc = repair_run_co(n, &ops, r, e);
    /* Whoever asked for a check has had it. */
    if (!rc && r->fix & CHECK_FIX_ERRORS && !r->corruptions && s->h.features & QED_NEED_CHECK) {
        s->h.features &= ~(uint64_t)QED_NEED_CHECK;
        rc = qed_header_write_co(s);
        if (!rc)
            rc = disk_flush_co(s->file);
        if (rc < 0)
            err_errno(e, -rc, "writing the header");
    }
    return rc;
}
