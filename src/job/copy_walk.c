/* SPDX-License-Identifier: MIT */
/*
 * The walker: from the source's map to windows of work.
 *
 * The map is asked run by run, always just ahead of the workers, and each run has one of three
 * kinds: DATA must be read, ZERO reads as zeros, SKIP (top_only) is none of our business.  Windows
 * are cut at units of the *target*, so a unit that holds a little data and many zeros is one window
 * with holes in it, written once.
 *
 *      source     |DDDD0000|000000000000000000000000|0DDDDDDD|DDDDDDDD|
 *      windows    [  DATA ][         ZERO          ][      DATA       ]
 *
 * A zero run inside a data window ends the window only when it is long (HOLE_SPLIT), because small
 * windows cost more than clearing memory.
 */
#include "job/copy_int.h"
#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"

enum {
    HOLE_SPLIT = 256 << 10,
    ESTIMATE_RUNS_MAX = 1 << 17, /* map answers looked at for the progress total */
};
static const uint64_t ZERO_WINDOW_MAX = (uint64_t)1 << 30;
static const uint64_t STATUS_MAX = (uint64_t)1 << 32;

/* Below the end of a shorter backing file a hole means zeros, not "ask below". */
static enum copy_kind top_hole_kind(const struct copy_job *j, uint64_t pos, uint64_t *len) {
    struct node *b = j->src->backing;
    uint64_t below = b ? b->size : 0;
    if (pos >= below)
        return COPY_ZERO;
    *len = min_u64(*len, below - pos);
    return COPY_SKIP;
}

/*
 * `layers` top layers are ours.  A run that nobody holds has the depth of the layer that ended
 * before it: when that is one of ours, or the first below them, the run reads as zeros whatever
 * the layers below hold.
 */
static bool is_below(const struct copy_job *j, const struct status *st) {
    return st->present ? st->depth >= j->opts->layers : st->depth > j->opts->layers;
}

/* One answer of the map at `pos`, as the copy sees it. */
static int classify_co(struct copy_job *j, uint64_t pos, uint64_t ask, enum copy_kind *kind,
                       uint64_t *end, bool *plain) {
    bool top_only = j->opts->top_only && !j->opts->layers;
    unsigned flags = STATUS_PRECISE | (top_only ? STATUS_TOP_ONLY : 0);
    struct status st;
    int r = disk_status_co(j->src, pos, ask, flags, &st);
    if (r < 0)
        return r;

    uint64_t len = min_u64(st.length, ask);
    if (top_only && !st.present)
        *kind = top_hole_kind(j, pos, &len);
    else if (j->opts->layers && is_below(j, &st))
        *kind = COPY_SKIP;
    else
        *kind = st.zero || !st.present ? COPY_ZERO : COPY_DATA;
    *plain = st.storage && !st.coded;
    *end = pos + len;
    return 0;
}

/*
 * The same; under salvage smaller ranges are asked about where the map fails, down to a sector,
 * which is then taken for data: the read finds out where it hurts.
 */
static int answer_co(struct copy_job *j, uint64_t pos, enum copy_kind *kind, uint64_t *end,
                     bool *plain) {
    /* Near what failed, small ranges from the start: damage may be large. */
    uint64_t ask = j->salvage_ask ? min_u64(j->salvage_ask * 4, STATUS_MAX) : STATUS_MAX;
    int r = classify_co(j, pos, min_u64(ask, j->length - pos), kind, end, plain);
    if (j->opts->salvage && !j->opts->top_only && !j->opts->layers) {
        while (r < 0 && ask > SALVAGE_SECTOR) {
            ask = max_u64(ask / 4, SALVAGE_SECTOR);
            r = classify_co(j, pos, min_u64(ask, j->length - pos), kind, end, plain);
        }
        j->salvage_ask = ask;
    }
    if (r == 0 || !j->salvage_ask)
        return r;
    if (j->opts->unmapped)
        j->opts->unmapped(j->opts->arg, pos, -r);
    *kind = COPY_DATA;
    *plain = false;
    *end = min_u64(j->length, pos + SALVAGE_SECTOR);
    return 0;
}

static int need_run_co(struct copy_job *j, uint64_t pos) {
    if (pos < j->run_end)
        return 0;
    int r = answer_co(j, pos, &j->run_kind, &j->run_end, &j->run_plain);
    if (r < 0)
        return copy_fail(j, r, "reading the map of", j->src, pos);
    return 0;
}

/* Unit boundaries of the target, as source offsets. */
static uint64_t unit_down(const struct copy_job *j, uint64_t off) {
    uint64_t at = align_down(j->dst_offset + off, j->unit);
    return at > j->dst_offset ? at - j->dst_offset : 0;
}
static uint64_t unit_up(const struct copy_job *j, uint64_t off) {
    return min_u64(align_up(j->dst_offset + off, j->unit) - j->dst_offset, j->length);
}

/* The part of the zero run at pos that makes whole units (or ends the copy); 0 when there is none.
 */
static uint64_t whole_zero_units(const struct copy_job *j) {
    uint64_t end = j->run_end == j->length ? j->length : unit_down(j, j->run_end);
    return end > j->pos ? end - j->pos : 0;
}

static void add_hole(struct copy_window *w, uint64_t offset, uint64_t length) {
    unsigned n = w->holes;
    uint32_t rel = offset - w->offset;
    if (n && w->hole[n - 1].offset + w->hole[n - 1].length == rel) {
        w->hole[n - 1].length += length;
    } else if (n < COPY_HOLES_MAX) {
        w->hole[n].offset = rel;
        w->hole[n].length = length;
        w->holes = n + 1;
    } else {
        return; /* read it: zeros come out */
    }
    w->data_bytes -= length;
}

/* Gathers runs from pos into one window of at most a chunk. */
static int gather_co(struct copy_job *j, struct copy_window *w) {
    uint64_t limit = unit_down(j, j->pos + j->chunk);
    if (limit <= j->pos)
        limit = j->pos + j->chunk;
    limit = min_u64(limit, j->length);

    uint64_t p = j->pos;
    *w = (struct copy_window){.offset = p, .kind = COPY_DATA};
    while (p < limit) {
        int r = need_run_co(j, p);
        if (r < 0)
            return r;
        if (j->run_kind == COPY_SKIP)
            break;
        uint64_t seg = min_u64(j->run_end, limit) - p;
        w->data_bytes += seg;
        if (j->run_kind == COPY_ZERO) {
            uint64_t up = unit_up(j, p);
            if (j->block && p > w->offset && j->run_end >= up &&
                j->run_end - p >= max_u64(HOLE_SPLIT, j->unit)) {
                w->data_bytes -= seg;
                if (up > p) {
                    w->data_bytes += up - p;
                    add_hole(w, p, up - p);
                }
                p = up;
                break;
            }
            add_hole(w, p, seg);
        }
        p += seg;
    }
    w->length = p - w->offset;
    if (w->length && w->holes == 1 && w->hole[0].length == w->length && j->block)
        w->kind = COPY_ZERO;
    j->pos = p;
    return 0;
}

static bool claim_locked_co(struct copy_job *j, struct copy_window *w) {
    while (j->pos < j->length && !copy_stopped(j)) {
        if (need_run_co(j, j->pos) < 0)
            return false;
        if (j->run_kind == COPY_SKIP) {
            j->pos = j->run_end;
            continue;
        }
        uint64_t zeros = j->run_kind == COPY_ZERO && j->block ? whole_zero_units(j) : 0;
        if (zeros) {
            if (!j->opts->target_is_zero)
                zeros = min_u64(zeros, ZERO_WINDOW_MAX);
            *w = (struct copy_window){.offset = j->pos, .length = zeros, .kind = COPY_ZERO};
            j->pos += zeros;
        } else {
            if (j->run_kind == COPY_DATA)
                copy_ahead_co(j, j->dst_offset + j->pos, j->run_end - j->pos);
            if (gather_co(j, w) < 0)
                return false;
        }
        if (w->kind == COPY_ZERO && j->opts->target_is_zero)
            continue;
        w->ticket = j->next_ticket++;
        return true;
    }
    return false;
}

bool copy_claim_co(struct copy_job *j, struct copy_window *w) {
    task_mutex_lock_co(&j->walk);
    bool got = claim_locked_co(j, w);
    task_mutex_unlock(&j->walk);
    return got;
}

uint64_t copy_estimate_co(struct copy_job *j) {
    uint64_t total = 0, pos = 0;
    for (unsigned i = 0; pos < j->length && !copy_stopped(j); i++) {
        enum copy_kind kind;
        uint64_t end;
        bool plain;
        /* Too scattered to count, or unreadable: take the rest for data, the copy will tell. */
        if (i == ESTIMATE_RUNS_MAX || answer_co(j, pos, &kind, &end, &plain) < 0)
            return total + (j->length - pos);
        if (kind == COPY_DATA || (kind == COPY_ZERO && !j->block))
            total += end - pos;
        pos = end;
    }
    return total;
}
