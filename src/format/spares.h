/* SPDX-License-Identifier: MIT */
/*
 * Spares: runs of units that were made room for and then not used, or that a crash has left behind,
 * to be taken again before the file grows.  For formats that place by a counter.
 */
#ifndef STRATA_FORMAT_SPARES_H
#define STRATA_FORMAT_SPARES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct spare {
    uint64_t first, count;
};
struct spares {
    struct spare *v;
    size_t count, cap;
};

/*
 * Up to `want` units in one piece (`whole`: all of them) out of the run that was given last: false
 * when there is none, or it is too short.
 */
bool spares_take(struct spares *s, uint64_t want, bool whole, uint64_t *first, uint64_t *got);
/* Without memory for it the run stays unused. */
void spares_give(struct spares *s, uint64_t first, uint64_t count);
void spares_free(struct spares *s); /* accepts zeroed ones, and leaves such */

#endif
