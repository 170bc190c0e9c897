/* SPDX-License-Identifier: MIT */
/*
 * `check -r`: from what one pass of the check has found to an image without it.
 *
 * Steps; after one that has changed something, a new pass looks at the result before the next:
 *
 *   1. simple repairs of entries                                       repair_entries.c
 *   2. new refcount structures, where the old ones are damaged         repair_rebuild.c
 *   3. a snapshot table whose entries are too short or too long      repair_snapshots.c
 *      tables that several L1 entries name are copied, and data that
 *      shares a cluster with metadata or other data moves              repair_entries.c
 *   4. counts that are too low rise                                    repair_counts.c
 *   5. counts that are too high fall; all of `-r leaks`                repair_counts.c
 *   6. COPIED flags follow the counts                                  repair_entries.c
 *   7. without remaining corruption, the corrupt and dirty bits are cleared
 *
 * Every step leaves an image that is no worse, wherever it is killed: a step is flushed before the
 * next one begins, and inside a step each write stands alone (each file says why).  Between 5 and 6
 * a flag may be missing on a cluster with one reference: writers then copy it needlessly.
 *
 * Nothing is dropped that a guest could read.  While some table cannot be followed, nobody knows
 * what it names: then no count falls, and what looks like a leak stays.
 *
 * All writes go to the storage directly: the cache of the node is emptied at the end.
 */
#include "format/qcow2/repair.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/plant.h"
#include "disk/io.h"

/* Moves may uncover a need for new blocks and the like: a bound, never reached by real damage. */
#define ROUNDS_MAX 4

struct run {
    struct repair p;
    struct check c; /* the last pass; its result: */
    struct check_result seen;
    struct check_result *out;
    uint64_t fixed, leaks_fixed; /* so far */
    struct err *e;
};

static int pass_co(struct run *u) {
    check_end(&u->c);
    u->seen = (struct check_result){0};
    u->c = (struct check){.s = u->p.s, .r = &u->seen, .unbounded = true};
    return check_pass_co(&u->c, u->e);
}

/* Ends a step that changed `n` things. */
static int step_end_co(struct run *u, int r, uint64_t n, const char *what) {
    if (r < 0)
        return err_errno(u->e, -r, "repairing %s", what);
    return n ? pass_co(u) : 0;
}

static int rebuild_co(struct run *u) {
    uint64_t corruptions = u->seen.corruptions, leaks = u->seen.leaks;
    int r = repair_rebuild_co(&u->p, 0, 0);
    if (r == -EFBIG) /* the widest table does not reach: stays as it is, and is told */
        return 0;
    r = step_end_co(u, r, 1, "the reference counts");
    if (r)
        return r;
    u->fixed += corruptions - min_u64(corruptions, u->seen.corruptions);
    u->leaks_fixed += leaks - min_u64(leaks, u->seen.leaks);
    return 0;
}

/* Steps 1 to 4. */
static int errors_co(struct run *u) {
    uint64_t n = 0;
    int r = repair_entries_co(&u->p, &u->c, &n);
    u->fixed += n;
    r = step_end_co(u, r, n, "table entries");
    if (!r && u->c.rebuild)
        r = rebuild_co(u);
    if (r)
        return r;
    n = 0;
    r = repair_snapshots_co(&u->p, &u->c, &n);
    u->fixed += n;
    r = step_end_co(u, r, n, "the snapshot table");
    if (r)
        return r;
    n = 0;
    r = repair_tables_co(&u->p, &u->c, &n);
    u->fixed += n;
    r = step_end_co(u, r, n, "shared tables");
    if (r)
        return r;
    n = 0;
    r = repair_moves_co(&u->p, &u->c, &n);
    u->fixed += n;
    r = step_end_co(u, r, n, "shared clusters");
    if (r || u->c.rebuild)
        return r;
    n = 0;
    r = repair_counts_co(&u->p, &u->c, true, &n);
    u->fixed += n;
    return step_end_co(u, r, n, "reference counts");
}

/* Steps 5 and 6. */
static int leaks_co(struct run *u) {
    uint64_t n = 0;
    int r = 0;
    if (!u->c.incomplete && !u->c.rebuild)
        r = repair_counts_co(&u->p, &u->c, false, &n);
    u->leaks_fixed += n;
    r = step_end_co(u, r, n, "reference counts");
    /* Flags that only the new counts have made wrong belong to the repair of leaks. */
    if (r || (!(u->out->fix & CHECK_FIX_ERRORS) && !n))
        return r;
    uint64_t flags = 0;
    r = repair_copied_co(&u->p, &u->c, &flags);
    if (u->out->fix & CHECK_FIX_ERRORS)
        u->fixed += flags;
    return step_end_co(u, r, flags, "COPIED flags");
}

static bool is_clean(const struct check_result *r) {
    return !r->corruptions && !r->check_errors;
}

/* Step 7. */
static int clear_marks_co(struct run *u) {
    struct qcow2 *s = u->p.s;
    uint64_t marks = QCOW2_INCOMPAT_DIRTY | QCOW2_INCOMPAT_CORRUPT;
    if (!is_clean(&u->seen) || s->h.version < 3 || !(s->h.incompatible & marks))
        return 0;
    int r = qcow2_incompatible_write_co(s, s->h.incompatible & ~marks);
    return r ? err_errno(u->e, -r, "clearing the dirty and corrupt bits") : 0;
}

static int run_co(struct run *u) {
    unsigned fix = u->out->fix;
    int r = 0;
    for (int round = 0; !r && round < ROUNDS_MAX && (u->seen.corruptions || u->seen.leaks);
         round++) {
        uint64_t before = u->fixed + u->leaks_fixed;
        if (fix & CHECK_FIX_ERRORS)
            r = errors_co(u);
        if (!r)
            r = leaks_co(u);
        if (before == u->fixed + u->leaks_fixed)
            break;
    }
    return r ? r : clear_marks_co(u);
}

/* The first pass, with the words and the progress of the caller. */
static int first_pass_co(struct run *u) {
    u->c = (struct check){.s = u->p.s, .r = u->out};
    int r = check_pass_co(&u->c, u->e);
    u->seen = *u->out;
    u->c.r = u->c.whole = &u->seen;
    /* What has to be repaired wants all counts at once. */
    if (!r && u->c.room.from && (u->seen.corruptions || u->seen.leaks))
        r = pass_co(u);
    return r;
}

int qcow2_repair_co(struct node *n, struct check_result *result, struct err *e) {
    struct qcow2 *s = qcow2_of(n);
    if (!node_is_rw(s->file)) /* the node itself may be about to become writable */
        return err_set(e, EROFS, "a read-only image cannot be repaired");
    struct run *u = calloc(1, sizeof(*u));
    if (!u)
        return err_set(e, ENOMEM, "no memory for the repair");
    *u = (struct run){.p = {.s = s}, .out = result, .e = e};
    u->p.buf = buf_get(CHECK_BUF_BYTES);
    u->p.cluster = buf_get(s->cluster_size);
    int r = u->p.buf && u->p.cluster ? first_pass_co(u) : err_set(e, ENOMEM, "no memory");
    if (!r && PLANTED(DIRTY_CLEARED_EARLY))
        r = qcow2_incompatible_write_co(s, s->h.incompatible & ~(uint64_t)QCOW2_INCOMPAT_DIRTY);
    if (!r)
        r = run_co(u);
    if (!r) {
        result->corruptions = u->seen.corruptions;
        result->leaks = u->seen.leaks;
        result->check_errors = u->seen.check_errors;
        result->image_end_offset = u->seen.image_end_offset;
        result->corruptions_fixed = u->fixed;
        result->leaks_fixed = u->leaks_fixed;
    }
    check_end(&u->c);
    buf_put(u->p.buf, CHECK_BUF_BYTES);
    buf_put(u->p.cluster, s->cluster_size);
    free(u);
    qcow2_cache_forget_all(&s->cache);
    n->map_generation++;
    return r;
}
