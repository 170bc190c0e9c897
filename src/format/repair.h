/* SPDX-License-Identifier: MIT */
/*
 * check -r for formats without reference counts: the order of looking and mending.
 *
 *      look, telling what is met -> mend errors -> look -> give leaks back -> look
 *
 * The last look is what the result says; leaks are only touched in an image without errors.  What
 * mends works on the bytes of the image, piece by piece, and keeps to one rule: a copy is stable
 * before an entry names it, and an entry no longer names a place, stably, before that place goes.
 */
#ifndef STRATA_FORMAT_REPAIR_H
#define STRATA_FORMAT_REPAIR_H

#include <stdint.h>

struct check_result;
struct err;
struct node;

struct repair_ops {
    /* Fills counters and reports problems; `r` begins zeroed but for its callbacks. */
    int (*look_co)(struct node *n, struct check_result *r, struct err *e);
    /* Mends what it can; what it cannot stays for the next look.  The image is stable after. */
    int (*errors_co)(struct node *n, struct err *e);
    int (*leaks_co)(struct node *n, struct err *e);
};

/* check_co of the format: with r->fix, repairs.  Nothing of the image may be cached and dirty. */
int repair_run_co(struct node *n, const struct repair_ops *ops, struct check_result *r,
                  struct err *e);

/* Copies `bytes` inside a file; not stable yet.  Places may not overlap. */
int repair_copy_co(struct node *file, uint64_t from, uint64_t to, uint64_t bytes);

#endif
