/* SPDX-License-Identifier: MIT */
/*
 * A limit on how much goes through in a second, with bursts.
 *
 * A bucket holds up to `burst` units and gains `rate` a second.  Whoever takes units pays at once,
 * into debt if need be, and sleeps until the debt that he found and made is paid; so requests leave
 * in the order in which they came, a large one waits no longer than its size asks for, and nobody
 * queues.  The longest sleep is bounded by what callers have in flight.
 *
 * Context: the loop's thread.  throttle_take_co may suspend; never allocates.
 */
#ifndef STRATA_RUNTIME_THROTTLE_H
#define STRATA_RUNTIME_THROTTLE_H

#include <stdbool.h>
#include <stdint.h>
#include "base/list.h"

struct loop;

struct throttle {
    double rate;  /* units a second; 0: no limit */
    double burst; /* what may be taken at once after a rest */
    double level; /* units there; negative: debt */
    int64_t last_ns;
    bool open; /* the limit is lifted for good: the end is near */
    struct list sleepers;
};

/* `burst` 0: what a tenth of a second gains, at least one unit. */
void throttle_init(struct throttle *t, uint64_t rate, uint64_t burst);
/* `owner` names the caller for throttle_wake. */
void throttle_take_co(struct throttle *t, struct loop *loop, uint64_t units, const void *owner);
/* Ends the sleep of those with this owner (NULL: of all); their debt stays. */
void throttle_wake(struct throttle *t, const void *owner);
/* No limit from now on; all wake. */
void throttle_open(struct throttle *t);

#endif
