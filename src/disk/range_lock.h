/* SPDX-License-Identifier: MIT */
/*
 * Range locks: the order of requests on one node.
 *
 * Reads and in-place writes hold their range *shared*; whatever changes the mapping (placing
 * writes, zero, discard, resize) holds whole units *exclusive*.  So a driver never sees two
 * placements of overlapping units at once, and bytes handed out by map (a lease) cannot be freed,
 * moved or reused until the request that holds them has ended.
 *
 * A shared request that comes after a waiting exclusive one that it overlaps waits behind it, so
 * writers do not starve.  An exclusive one may overtake it where nothing granted is in its way:
 * else a chain of requests that each overlap the next would wait for the first of them, though
 * most have nothing to do with it.  A waiter is overtaken RANGE_OVERTAKEN_MAX times; then what
 * overlaps it waits behind it.  In flight are at most a few hundred, so plain lists serve;
 * the common case (no exclusive holder, none waiting) is two pointer writes.
 */
#ifndef STRATA_DISK_RANGE_LOCK_H
#define STRATA_DISK_RANGE_LOCK_H

#include <stdbool.h>
#include <stdint.h>
#include "base/list.h"
#include "runtime/task.h"

struct range_lock {
    struct list shared;    /* granted */
    struct list exclusive; /* granted */
    struct list waiting;   /* in order of arrival */
};

enum { RANGE_OVERTAKEN_MAX = 16 }; /* about what is in flight at once: one more round at most */

struct range_req {
    struct list link;
    uint64_t offset, length;
    bool exclusive, granted;
    unsigned overtaken; /* by requests that it overlaps */
    struct task *task;
};

void range_lock_init(struct range_lock *l);
/* `r` lives in the caller's frame until range_unlock. */
void range_lock_co(struct range_lock *l, struct range_req *r, uint64_t offset, uint64_t length,
                   bool exclusive);
void range_unlock(struct range_lock *l, struct range_req *r);
/* Nothing held or waiting. */
bool range_lock_idle(const struct range_lock *l);

#endif
