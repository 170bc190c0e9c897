/* SPDX-License-Identifier: MIT */
/*
 * The machine that loses power: a few disks "lab:0", "lab:1" ... and one log of all of them.
 *
 * `driver_recorder` is a storage driver that the library finds by the prefix "lab:", so
 * that a backing file, an external data file or whatever else an image names lies on a recorded
 * disk without a word about it in any format ("lab:1/anything" is lab:1, too).  Bytes live in
 * memory.  While `recording`, every write, zero, discard, truncate, flush and link becomes a record
 * with the moments (a counter) at which it began and ended; between the two the driver lets other
 * tasks run for a random number of turns, so requests overlap and end out of order as they do on
 * real disks.
 *
 * There is one order over all disks, and a flush covers its own disk only.  From the records the
 * replayer (replay.c) builds what a power cut could have left; then the same disks hold that state,
 * and nothing is recorded.
 */
#ifndef STRATA_TESTS_CRASH_RECORDER_H
#define STRATA_TESTS_CRASH_RECORDER_H

#include <stdbool.h>
#include <stdint.h>

#include "disk/driver.h"

#define RECORDER_BYTES_MAX (16u << 20)
#define LAB_DISKS 4

enum record_kind { RECORD_WRITE, RECORD_ZERO, RECORD_TRUNCATE, RECORD_FLUSH, RECORD_LINK };

struct record {
    enum record_kind kind;
    unsigned disk;
    bool fua;                /* WRITE: durable at its own end */
    uint64_t offset, length; /* TRUNCATE: length is the new size */
    uint8_t *bytes;          /* WRITE: owned */
    uint64_t start, end;     /* moments; end is UINT64_MAX while it is under way */
    uint64_t durable; /* the first moment at which a flush had covered it; UINT64_MAX never */
};

struct lab_disk {
    uint8_t *bytes; /* RECORDER_BYTES_MAX, zeros behind `high`; NULL: never used */
    uint64_t size;
    uint64_t high; /* nothing was ever written behind it */
    bool linked;   /* it has its name: a scratch file gets it with RECORD_LINK */
};

struct machine {
    struct lab_disk disk[LAB_DISKS];
    struct record *log;
    size_t count, cap;
    uint64_t now; /* the counter: every begin and end of anything, the model's too */
    unsigned seed;
    bool recording;
};

/* The machine that names mean; one at a time. */
extern struct machine *machine;
extern const struct driver driver_recorder;

/* The moment counter moves on and is returned. */
uint64_t machine_tick(void);
/* Fills in `durable` of every record. */
void machine_settle(void);
/* Forgets the log: what is there now counts as durable. */
void machine_clear(void);
/* Gives back the memory of log and disks. */
void machine_free(struct machine *m);
struct lab_disk *machine_disk(unsigned i);
/* Applies a record to a disk; `sectors`: only those 512-byte pieces whose bit is set (UINT64_MAX:
 * all). */
void record_apply(const struct record *x, struct lab_disk *d, uint64_t sectors);

#endif
