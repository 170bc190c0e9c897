/* SPDX-License-Identifier: MIT */
/*
 * From the log to the states that a power cut could have left.
 *
 * Fault model: a write counts as durable once a flush of its disk that began after the write's end
 * has itself ended (FUA: at its own end); of all others that had begun before the cut, any subset
 * may have reached the disks, each of them whole or in part (512-byte sectors).
 *
 * 1. Every prefix: at the beginning of each record, everything begun so far is there, whole.
 * 2. Windows: just before and just after the end of every flush, below and above the format.  Just
 *    before, the most writes are open; their subsets contain every state of the whole window
 *    between two flushes.  A window with up to 12 open writes is tried exhaustively as far as the
 *    budget allows, a larger one by chosen subsets (none, all, each prefix end, each single one
 *    missing or alone) and seeded random ones, one in three torn.
 */
#include <stdlib.h>
#include <string.h>

#include "base/ck.h"
#include "lab.h"

struct window {
    const struct record **open; /* begun, not durable */
    bool *forced; /* durable, but laid over open ones: it stays until those are durable too */
    size_t count;
    struct lab_disk base[LAB_DISKS]; /* what is durable */
};

static void lay_base(const struct window *w) {
    for (unsigned i = 0; i < LAB_DISKS; i++) {
        struct lab_disk *d = &machine->disk[i];
        const struct lab_disk *b = &w->base[i];
        if (!d->bytes)
            continue;
        uint64_t have = b->bytes ? b->size : 0;
        if (have)
            memcpy(d->bytes, b->bytes, have);
        if (d->high > have)
            memset(d->bytes + have, 0, d->high - have);
        d->size = d->high = have;
        d->linked = b->linked;
    }
}

static void state_co(struct lab *l, const struct window *w, const uint8_t *chosen, bool torn,
                     uint64_t moment) {
    lay_base(w);
    for (size_t i = 0; i < w->count; i++) {
        if (!chosen[i] && !w->forced[i])
            continue;
        uint64_t sectors = UINT64_MAX;
        if (torn && !w->forced[i] && lab_rnd(l, 3) == 0)
            sectors = (uint64_t)lab_rnd(l, UINT32_MAX) << 32 | lab_rnd(l, UINT32_MAX);
        record_apply(w->open[i], &machine->disk[w->open[i]->disk], sectors);
    }
    judge_co(l, moment);
}

/* The i-th chosen subset of a window; false when there are no more of them. */
static bool pattern(size_t count, size_t i, uint8_t *chosen) {
    if (i < 2) {
        memset(chosen, (int)i, count);
        return true;
    }
    i -= 2;
    size_t kind = i / count, k = i % count;
    for (size_t j = 0; j < count; j++)
        chosen[j] = kind == 0 ? j < k : kind == 1 ? j != k : j == k;
    return kind < 3;
}

static void by_chance(struct lab *l, size_t count, uint8_t *chosen) {
    unsigned share = 1 + lab_rnd(l, 15);
    for (size_t i = 0; i < count; i++)
        chosen[i] = lab_rnd(l, 16) < share;
}

static void window_co(struct lab *l, const struct window *w, uint64_t moment,
                      unsigned long budget) {
    static uint8_t chosen[8192];
    unsigned long n = 0;
    if (w->count > sizeof(chosen))
        abort();
    if (w->count <= 12 && (1ul << w->count) <= budget) {
        for (; n < 1ul << w->count; n++) {
            for (size_t i = 0; i < w->count; i++)
                chosen[i] = n >> i & 1;
            state_co(l, w, chosen, false, moment);
        }
        for (; w->count && n < budget; n++) { /* and torn ones */
            by_chance(l, w->count, chosen);
            state_co(l, w, chosen, true, moment);
        }
        return;
    }
    for (; n < budget; n++) {
        /* Half of the budget for the chosen patterns, spread over them, the rest by chance. */
        size_t patterns = 2 + 3 * w->count;
        size_t pick = budget / 2 >= patterns ? n : n < 2 ? n : lab_rnd(l, (unsigned)patterns);
        if (n >= budget / 2 || !pattern(w->count, pick, chosen))
            by_chance(l, w->count, chosen);
        state_co(l, w, chosen, n % 3 == 2, moment);
    }
}

/* ---------------------------------------------------------------- moments */

struct moment {
    uint64_t at;
    bool prefix; /* one state: all that had begun */
};

static int by_time(const void *a, const void *b) {
    const struct moment *x = a, *y = b;
    return x->at != y->at ? (x->at < y->at ? -1 : 1) : y->prefix - x->prefix;
}

static size_t crash_moments(const struct lab *l, struct moment **out, size_t *windows) {
    const struct machine *m = machine;
    struct moment *all = malloc((m->count * 3 + l->flushes + 1) * sizeof(*all));
    size_t n = 0, prefixes = 0;
    for (size_t i = 0; i < m->count; i++)
        if (m->log[i].kind == RECORD_FLUSH) {
            all[n++] = (struct moment){m->log[i].end - 1, false};
            all[n++] = (struct moment){m->log[i].end, false};
        } else {
            all[n++] = (struct moment){m->log[i].start, true};
            prefixes++;
        }
    for (size_t i = 0; i < l->flushes; i++)
        all[n++] = (struct moment){l->flush[i].end, false};
    all[n++] = (struct moment){m->now, false};
    qsort(all, n, sizeof(*all), by_time);
    *out = all;
    *windows = n - prefixes;
    return n;
}

static bool over_open(const struct window *w, const struct record *x) {
    for (size_t i = 0; i < w->count; i++) {
        const struct record *y = w->open[i];
        uint64_t end = y->kind == RECORD_TRUNCATE ? UINT64_MAX : y->offset + y->length;
        uint64_t at = y->kind == RECORD_TRUNCATE ? y->length : y->offset;
        if (y->disk == x->disk && at < x->offset + x->length && x->offset < end)
            return true;
    }
    return false;
}

/* What has become durable goes into the base; what is open by now is listed. */
static void open_window(struct window *w, bool *applied, uint64_t moment) {
    w->count = 0;
    for (size_t i = 0; i < machine->count; i++) {
        const struct record *x = &machine->log[i];
        if (x->start > moment)
            break;
        if (applied[i] || x->kind == RECORD_FLUSH)
            continue;
        bool durable = x->durable <= moment, over = durable && x->fua && over_open(w, x);
        if (durable && !over) {
            record_apply(x, &w->base[x->disk], UINT64_MAX);
            applied[i] = true;
        } else {
            w->forced[w->count] = over;
            w->open[w->count++] = x;
        }
    }
}

void replay_co(struct lab *l) {
    struct moment *moment;
    size_t windows, moments = crash_moments(l, &moment, &windows);
    bool *applied = calloc(machine->count + 1, sizeof(*applied));
    struct window w = {.open = calloc(machine->count + 1, sizeof(*w.open)),
                       .forced = calloc(machine->count + 1, sizeof(*w.forced))};
    uint8_t *all = malloc(machine->count + 1);
    unsigned long spent = 0;
    memset(all, 1, machine->count + 1);
    for (unsigned i = 0; i < LAB_DISKS; i++) {
        if (!machine->disk[i].bytes)
            continue;
        w.base[i] = l->begin[i];
        w.base[i].bytes = calloc(1, RECORDER_BYTES_MAX);
        if (l->begin[i].bytes)
            memcpy(w.base[i].bytes, l->begin[i].bytes, l->begin[i].size);
    }
    for (size_t m = 0; m < moments && !(l->failed && l->first_only); m++) {
        open_window(&w, applied, moment[m].at);
        if (moment[m].prefix) {
            state_co(l, &w, all, false, moment[m].at);
            continue;
        }
        unsigned long before = l->states, left = l->budget > spent ? l->budget - spent : 0;
        window_co(l, &w, moment[m].at, max_u64(1, left / windows--));
        spent += l->states - before;
    }
    for (unsigned i = 0; i < LAB_DISKS; i++)
        free(w.base[i].bytes);
    free(w.open);
    free(w.forced);
    free(applied);
    free(all);
    free(moment);
}
