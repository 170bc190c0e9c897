/* SPDX-License-Identifier: MIT */
/*
 * Which units of a file have been met: a sparse set for checks of formats without reference counts.
 *
 * Memory follows what is met, up to a limit, whatever the size of the file.
 */
#ifndef STRATA_FORMAT_SEEN_H
#define STRATA_FORMAT_SEEN_H

#include <stdbool.h>
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
bool seen_has(const struct seen *s, uint64_t unit);
/* The first run of `want` units from `from` on, below `end`, that have not been met; `end`: none.
 */
uint64_t seen_find_free(const struct seen *s, uint64_t from, uint64_t end, uint64_t want);

#endif
