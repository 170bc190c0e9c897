/* SPDX-License-Identifier: MIT */
/*
 * Inside the copy engine: what copy.c, copy_walk.c, copy_coded.c and copy_punch.c share.
 *
 * One job, one walker position, N worker tasks on one loop.  A worker claims the next *window* (at
 * most `chunk` bytes, cut at the target's units), reads what must be read, finds the zeros, takes
 * its turn and writes.
 *
 * Invariants
 *  1. Windows are handed out in ascending order and never overlap.  Except at the ends of the copy
 *     and next to ranges that are passed over, they begin and end at units of the target, so no two
 *     workers ever write into one unit.
 *  2. Every window carries a ticket; each ticket passes its turn exactly once, on success and on
 *     error alike, so nobody waits for a worker that gave up.
 *  3. Only the first error is kept; after it no further window is handed out.
 *  4. Memory: one buffer of `chunk` bytes a worker, two when compressing.
 */
#ifndef STRATA_JOB_COPY_INT_H
#define STRATA_JOB_COPY_INT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "disk/io.h"
#include "job/copy.h"
#include "runtime/task.h"

enum {
    SALVAGE_SECTOR = 512,     /* least that is given up */
    COPY_BLOCK_MIN = 512,     /* finest zero detection */
    COPY_CHUNK = 1 << 20,     /* bytes of one window, more only for larger units */
    COPY_CHUNK_MAX = 2 << 20, /* what buf_get gives */
    COPY_MEMORY = 32 << 20,   /* all buffers together */
    COPY_HOLES_MAX = 32,      /* known zero runs inside one window */
    COPY_BLOCKS_MAX = COPY_CHUNK_MAX / COPY_BLOCK_MIN,
    COPY_WORKERS_MAX = 16,
    COPY_WRITEBACK = 32 << 20, /* bytes between two requests to write them back */
};

enum copy_kind {
    COPY_DATA,
    COPY_ZERO, /* reads as zeros: nothing to read */
    COPY_SKIP, /* not ours: the target's own backing answers */
};

struct copy_window {
    uint64_t offset, length; /* in the source */
    enum copy_kind kind;     /* DATA or ZERO */
    uint64_t data_bytes;     /* of it, as progress and rate count them */
    uint64_t ticket;
    unsigned holes; /* DATA: parts known to be zero, ascending, relative to offset */
    struct {
        uint32_t offset, length;
    } hole[COPY_HOLES_MAX];
};

/* Whether the storage copies by sharing blocks. */
enum copy_clone { CLONE_UNTRIED, CLONE_TRYING, CLONE_YES, CLONE_NO };

struct copy_job {
    struct node *src, *dst;
    uint64_t length, dst_offset;
    const struct copy_opts *opts;
    struct err *e;
    int error; /* first one, negative errno */

    uint64_t unit;  /* windows are cut at multiples of this in the target */
    uint64_t chunk; /* at most this much data in one window, a multiple of unit */
    uint32_t block; /* zero detection: aligned blocks of the target; 0: none */
    unsigned read_flags, write_flags;

    /* the walker (copy_walk.c): claims are made one at a time */
    struct task_mutex walk;
    uint64_t pos;
    uint64_t salvage_ask;    /* the last range that the map was asked about; 0: not salvaging */
    enum copy_kind run_kind; /* of [.., run_end), valid while pos < run_end */
    uint64_t run_end;
    bool run_plain; /* bytes lie in a storage as they are, so the kernel might clone them */

    /* order of the writes */
    bool in_order;
    uint64_t next_ticket, turn;
    struct waitq turns;

    enum copy_clone clone;

    /* room allocated ahead in a sparse target, and the zeros found in it (copy_punch.c) */
    bool ahead;
    uint64_t ahead_end; /* in the target: room is there up to here where a run began */
    struct copy_range *punch;
    unsigned punches;

    /* compressing, and where a flush follows: the disk works while the processors do */
    uint64_t unsynced; /* bytes since the last write-back began */
    bool syncing;
    struct task_group *group; /* of the workers, and of whatever they start */

    int64_t rate_next_ns;
    int64_t progress_ns;
    struct copy_progress progress;
};

struct copy_range {
    uint64_t offset, length;
};

/* Aligned blocks of one window that are all zero, as bits. Block 0 begins at the window's start
 * rounded down to the block size in the target. */
struct copy_zero_map {
    uint64_t bits[COPY_BLOCKS_MAX / 64 + 1];
};

struct copy_worker {
    struct copy_job *job;
    struct copy_window w;
    bool turn_passed;
    uint8_t *buf;
    uint8_t *code;            /* compressing: codes of the units, each at its unit's own place */
    int32_t *coded;           /* compressing: length of each code, 0 zeros, or -errno */
    struct copy_zero_map map; /* written by a worker thread while the task sleeps */
};

/* ---- copy.c ---- */
/* Records the first error; returns it. */
int copy_fail(struct copy_job *j, int error, const char *doing, const struct node *n,
              uint64_t offset);
bool copy_stopped(const struct copy_job *j);
/* Waits for the window's turn and holds it. */
void copy_turn_co(struct copy_worker *k);
/* Lets the next window go; harmless when done already. */
void copy_turn_pass(struct copy_worker *k);
/* Fills k->buf with the whole window. */
int copy_read_co(struct copy_worker *k);
/* Finds the zero blocks of buf[0..len), which lies at `at` of the target. */
void copy_scan(const uint8_t *buf, uint64_t at, size_t len, uint32_t block,
               struct copy_zero_map *map);
/* Zeros found or known in the target's range. */
int copy_zero_co(struct copy_job *j, uint64_t at, uint64_t length);

/* The target's disk gets its part now, not when the flush comes. */
void copy_writeback_later(struct copy_job *j, uint64_t length);

/* ---- copy_walk.c ---- */
/* Next window; false at the end, after an error, or when cancelled. */
bool copy_claim_co(struct copy_job *j, struct copy_window *w);
/* Bytes of data to move, for progress. */
uint64_t copy_estimate_co(struct copy_job *j);

/* ---- copy_punch.c ---- */
void copy_ahead_co(struct copy_job *j, uint64_t at, uint64_t run_length);
/* The range was found to be zero: give its room back later. */
void copy_punch_later(struct copy_job *j, uint64_t at, uint64_t length);
void copy_punch_co(struct copy_job *j);

/* ---- copy_coded.c ---- */
int copy_coded_co(struct copy_worker *k);

#endif
