/* SPDX-License-Identifier: MIT */
/*
 * QED: check.  Every table and cluster lies inside the file, aligned, and has one name; what has
 * none is a leak.
 */
#include <errno.h>
#include <inttypes.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"
#include "format/qed/qed.h"
#include "format/problem.h"
#include "format/seen.h"

#define PIECE ((uint32_t)MIB)

struct walk {
    struct qed *s;
    struct check_result *r;
    struct seen seen; /* clusters of the file */
    uint64_t named, last_data;
};

/* Marks [offset, +bytes).  1: it is shared with something else. -ENOMEM. */
static int mark(struct walk *w, uint64_t offset, uint64_t bytes) {
    uint64_t first = offset >> w->s->cluster_bits, count = div_up(bytes, w->s->h.cluster_size);
    int shared = 0;
    for (uint64_t i = 0; i < count; i++) {
        int r = seen_add(&w->seen, first + i);
        if (r < 0)
            return r;
        shared |= r;
        w->named += !r;
    }
    return shared;
}

static int check_data(struct walk *w, uint64_t guest, uint64_t entry) {
    struct qed *s = w->s;
    if (entry <= QED_ENTRY_ZERO)
        return 0;
    if (!qed_inside(s, entry, 0) || entry >= s->file->size) {
        problem_corruption(w->r,
                           "the L2 entry of guest offset %" PRIu64 " names %" PRIu64
                           ", which is unaligned or not in the file",
                           guest, entry);
        return 0;
    }
    w->r->allocated_clusters++;
    if (w->last_data && entry != w->last_data + s->h.cluster_size)
        w->r->fragmented_clusters++;
    w->last_data = entry;
    int r = mark(w, entry, 1);
    if (r > 0) {
        problem_corruption(
            w->r, "the cluster at %" PRIu64 ", of guest offset %" PRIu64 ", has another name, too",
            entry, guest);
    }
    return r < 0 ? r : 0;
}

static int check_l2_co(struct walk *w, uint64_t guest, uint64_t table, uint8_t *buf) {
    struct qed *s = w->s;
    int r = 0;
    for (uint64_t at = 0; !r && at < s->table_bytes; at += PIECE) {
        uint32_t bytes = (uint32_t)min_u64(PIECE, s->table_bytes - at);
        r = disk_pread_co(s->file, table + at, buf, bytes);
        for (uint32_t i = 0; !r && i < bytes; i += 8)
            r = check_data(w, guest + ((at + i) / 8 << s->cluster_bits), le64_load(buf + i));
    }
    return r;
}

static int check_l1_entry_co(struct walk *w, uint64_t index, uint64_t table, uint8_t *buf) {
    struct qed *s = w->s;
    uint64_t guest = index << (s->cluster_bits + s->entry_bits);
    if (!table)
        return 0;
    if (!qed_inside(s, table, s->table_bytes)) {
        problem_corruption(w->r,
                           "L1 entry %" PRIu64 " names a table at %" PRIu64
                           ", which is unaligned or not in the file",
                           index, table);
        return 0;
    }
    int r = mark(w, table, s->table_bytes);
    if (r > 0) {
        problem_corruption(w->r, "the L2 table at %" PRIu64 " overlaps something else", table);
        return 0; /* walking tables that many entries name could take for ever */
    }
    return r < 0 ? r : check_l2_co(w, guest, table, buf);
}

static int walk_co(struct walk *w) {
    struct qed *s = w->s;
    uint8_t *l1 = buf_get(PIECE), *l2 = buf_get(PIECE);
    int r = l1 && l2 ? 0 : -ENOMEM;
    if (!r)
        r = mark(w, 0, (uint64_t)s->h.header_size * s->h.cluster_size);
    if (r >= 0)
        r = mark(w, s->h.l1_offset, s->table_bytes);
    if (r > 0)
        r = 0;
    for (uint64_t at = 0; !r && at < s->table_bytes; at += PIECE) {
        uint32_t bytes = (uint32_t)min_u64(PIECE, s->table_bytes - at);
        r = disk_pread_co(s->file, s->h.l1_offset + at, l1, bytes);
        for (uint32_t i = 0; !r && i < bytes; i += 8)
            r = check_l1_entry_co(w, (at + i) / 8, le64_load(l1 + i), l2);
        if (w->r->progress)
            w->r->progress(w->r->arg, at + bytes, s->table_bytes);
    }
    buf_put(l1, PIECE);
    buf_put(l2, PIECE);
    return r;
}

int qed_check_co(struct node *n, struct check_result *r, struct err *e) {
    struct qed *s = qed_of(n);
    uint64_t clusters = div_up(s->file->size, s->h.cluster_size);
    struct walk w = {.s = s, .r = r};
    int rc = seen_init(&w.seen, max_u64(clusters, s->h.header_size));
    if (!rc)
        rc = walk_co(&w);
    seen_free(&w.seen);
    if (rc < 0)
        return err_errno(e, -rc, "reading the tables");
    r->total_clusters = div_up(n->size, s->h.cluster_size);
    r->image_end_offset = s->file->size;
    if (clusters > w.named) {
        problem_leaks(r, clusters - w.named, "%" PRIu64 " clusters of the file are not in use",
                      clusters - w.named);
    }
    return 0;
}
