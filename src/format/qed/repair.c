/* SPDX-License-Identifier: MIT */
/*
 * QED: check -r.
 *
 * Errors.  Entries that name nothing in the file become free, stably, before the file grows.  Of
 * several entries that name one data cluster all but the first get a copy behind the last cluster.
 * Where a table shares clusters with something else nothing is changed: whose bytes they are could
 * only be guessed.
 *
 * Leaks.  K clusters are named.  Tables behind the first K move to runs of unused clusters among
 * these, then data does, and the file ends behind the last cluster in use.  A cluster that has been
 * left is not used again.  Where no run is long enough for a table it stays, and some leaks with
 * it.
 */
#include <errno.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"
#include "format/qed/check.h"
#include "format/repair.h"

static int clear_l1_co(struct qed_walk *w, uint64_t index, uint8_t *at) {
    uint64_t table = le64_load(at);
    if (!table || qed_inside(w->s, table, w->s->table_bytes))
        return 0;
    le64_store(at, 0);
    return 1;
}

static int clear_l2_co(struct qed_walk *w, uint64_t index, uint8_t *at) {
    uint64_t entry = le64_load(at);
    if (entry <= QED_ENTRY_ZERO || qed_data_inside(w->s, entry))
        return 0;
    le64_store(at, QED_ENTRY_NONE);
    return 1;
}

static int move_co(struct qed_walk *w, uint8_t *at, uint64_t cluster, uint64_t count) {
    struct qed *s = w->s;
    uint64_t to = cluster << s->cluster_bits;
    int r = repair_copy_co(s->file, le64_load(at), to, count << s->cluster_bits);
    le64_store(at, to);
    return r < 0 ? r : 1;
}

static int part_co(struct qed_walk *w, uint64_t index, uint8_t *at) {
    struct qed *s = w->s;
    uint64_t entry = le64_load(at);
    if (entry <= QED_ENTRY_ZERO || entry >> s->cluster_bits >= w->met.units)
        return 0;
    int r = seen_add(&w->met, entry >> s->cluster_bits);
    if (r <= 0)
        return r;
    if (s->next >= (uint64_t)INT64_MAX >> s->cluster_bits)
        return -EFBIG;
    return move_co(w, at, s->next++, 1);
}

static int mended(struct qed_walk *w, int r, struct err *e) {
    struct qed *s = w->s;
    qed_walk_end(w);
    seen_free(&w->met);
    if (!r)
        r = disk_flush_co(s->file);
    if (!r)
        r = pages_forget_all(&s->pages);
    s->spares.count = 0;
    s->next = div_up(s->file->size, s->h.cluster_size);
    return r < 0 ? err_errno(e, -r, "repairing the tables") : 0;
}

int qed_repair_errors_co(struct node *n, struct err *e) {
    struct qed *s = qed_of(n);
    struct qed_walk w = {.s = s};
    int r = qed_walk_begin_co(&w);
    if (!r && w.shared_tables)
        return mended(&w, 0, e);
    if (!r)
        r = qed_each_l1_co(&w, clear_l1_co);
    if (!r)
        r = qed_each_l2_co(&w, clear_l2_co);
    if (!r)
        r = disk_flush_co(s->file);
    s->next = qed_clusters(s);
    if (!r)
        r = seen_init(&w.met, s->next);
    if (!r)
        r = qed_each_l2_co(&w, part_co);
    return mended(&w, r, e);
}

/* The first run of unused clusters below the end to be; `keep`: none. */
static uint64_t find_place(struct qed_walk *w, uint64_t from, uint64_t want) {
    for (uint64_t at = from, run = 0; at < w->keep; at++) {
        run = seen_has(&w->tables, at) || seen_has(&w->data, at) ? 0 : run + 1;
        if (run == want)
            return at + 1 - want;
    }
    return w->keep;
}

static int move_table_co(struct qed_walk *w, uint64_t index, uint8_t *at) {
    struct qed *s = w->s;
    uint64_t first = le64_load(at) >> s->cluster_bits, count = s->h.table_size;
    if (!first || first + count <= w->keep)
        return 0;
    uint64_t to = find_place(w, 0, count);
    for (uint64_t i = 0; to < w->keep && i < count; i++)
        if (seen_add(&w->tables, to + i) < 0)
            return -ENOMEM;
    return to < w->keep ? move_co(w, at, to, count) : 0;
}

static int move_data_co(struct qed_walk *w, uint64_t index, uint8_t *at) {
    uint64_t entry = le64_load(at), cluster = entry >> w->s->cluster_bits;
    if (entry <= QED_ENTRY_ZERO || cluster < w->keep)
        return 0;
    w->place = find_place(w, w->place, 1);
    if (w->place >= w->keep)
        return 0;
    if (seen_add(&w->data, w->place) < 0)
        return -ENOMEM;
    return move_co(w, at, w->place++, 1);
}

/* One above the last cluster in use. */
static uint64_t end_of_use(const struct qed_walk *w) {
    uint64_t end = w->tables.units;
    while (end && !seen_has(&w->tables, end - 1) && !seen_has(&w->data, end - 1))
        end--;
    return end;
}

int qed_repair_leaks_co(struct node *n, struct err *e) {
    struct qed *s = qed_of(n);
    struct qed_walk w = {.s = s}, after = {.s = s};
    int r = qed_walk_begin_co(&w);
    w.keep = w.named;
    if (!r && !w.shared_tables)
        r = qed_each_l1_co(&w, move_table_co);
    if (!r && !w.shared_tables)
        r = disk_flush_co(s->file);
    if (!r && !w.shared_tables)
        r = qed_each_l2_co(&w, move_data_co);
    if (!r)
        r = disk_flush_co(s->file);
    if (!r)
        r = qed_walk_begin_co(&after);
    uint64_t end = r ? 0 : end_of_use(&after) << s->cluster_bits;
    qed_walk_end(&after);
    if (!r && s->file->size > end)
        r = disk_resize_co(s->file, end, PREALLOC_OFF, NULL);
    return mended(&w, r, e);
}
