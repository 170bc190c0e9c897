/* SPDX-License-Identifier: MIT */
/*
 * A storage driver that writes down everything that happens below a format.
 *
 * Bytes live in memory.  Every write, zero, discard, truncate and flush becomes a record with the
 * moments (a counter) at which it began and ended; between the two the driver lets other tasks run
 * for a random number of turns, so requests overlap and end out of order as they do on a real disk.
 *
 * From the records the replayer (lab.c) builds what a power cut could have left.
 */
#ifndef STRATA_TESTS_CRASH_RECORDER_H
#define STRATA_TESTS_CRASH_RECORDER_H

#include <stdbool.h>
#include <stdint.h>

#include "disk/driver.h"

#define RECORDER_BYTES_MAX (16u << 20)

enum record_kind { RECORD_WRITE, RECORD_ZERO, RECORD_TRUNCATE, RECORD_FLUSH };

struct record {
    enum record_kind kind;
    uint64_t offset, length; /* TRUNCATE: length is the new size */
    uint8_t *bytes;          /* WRITE: owned */
    uint64_t start, end;     /* moments; end is UINT64_MAX while it is under way */
    uint64_t durable; /* the first moment at which a flush had covered it; UINT64_MAX never */
};

struct recorder {
    uint8_t *bytes;
    struct record *log;
    size_t count, cap;
    uint64_t now; /* the counter: every begin and end of anything, the model's too */
    unsigned seed;
    unsigned fail_at; /* the n-th operation from now fails with fail_error; 0: none */
    int fail_error;
    unsigned ops;
    bool quiet; /* a state being judged: no records, no lingering; `bytes` is borrowed */
};

extern const struct driver driver_recorder;

/* The moment counter moves on and is returned. */
uint64_t recorder_tick(struct recorder *r);
/* Fills in `durable` of every record. */
void recorder_settle(struct recorder *r);
/* Forgets the log: what is there now counts as durable. */
void recorder_clear(struct recorder *r);
/* Applies a record to an image of RECORDER_BYTES_MAX bytes; `sectors`: only those 512-byte pieces
 * whose bit is set (UINT64_MAX: all). */
void record_apply(const struct record *x, uint8_t *image, uint64_t *size, uint64_t sectors);

#endif
