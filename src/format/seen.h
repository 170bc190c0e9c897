/* SPDX-License-Identifier: MIT */
/*
 * Which units of a file have been met: a sparse set for checks of formats without reference counts.
 *
 * Memory follows what is met, up to a limit, whatever the size of the file.
 */
#ifndef STRATA_FORMAT_SEEN_H
#define STRATA_FORMAT_SEEN_H

#include <stddef.h>
#include <stdint.h>

struct seen {
    uint64_t units;
    uint64_t **chunk; /* NULL: nothing of it met */
    size_t bytes;     /* of the chunks that exist */
};

/* Units [0, units).  -ENOMEM, also for more units than the set can be for. */
int seen_init(struct seen *s, uint64_t units);
void seen_free(struct seen *s);
/* 0: met for the first time; 1: it had been met.  -ENOMEM.  `unit` is below `units`. */
int seen_add(struct seen *s, uint64_t unit);

#endif
