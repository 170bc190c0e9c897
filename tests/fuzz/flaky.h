/* SPDX-License-Identifier: MIT */
/*
 * A storage for fuzzing: memory that lets other tasks in between, fails, and loses power.
 *
 * Two memory disks: `now` has every write as soon as it was made; `stable` has what a flush made
 * stable.  Between them lies a journal of all that was written since.  A power cut applies any part
 * of the journal to `stable`, sector by sector (512 bytes are written whole or not at all).
 *
 * Fault model: a write, zero, discard, truncate or flush fails with EIO when its turn comes, having
 * done nothing (a failed flush has made nothing stable); reads never fail.
 */
#ifndef STRATA_TESTS_FLAKY_H
#define STRATA_TESTS_FLAKY_H

#include "fuzz.h"

/* yields: how often an operation lets others run before its effect, in 256ths. */
struct node *flaky_new_co(uint64_t limit, unsigned yields, uint64_t seed);
/* The `nth` operation from now on that could fail does, and the `more` after it; 0: never. */
void flaky_fail(struct node *n, unsigned nth, unsigned more);
/* Whether one has failed since the last call. */
bool flaky_failed(struct node *n);
/* The disk as a power cut now would leave it: a new memory disk. */
struct node *flaky_cut_co(struct node *n, uint64_t seed);

#endif
