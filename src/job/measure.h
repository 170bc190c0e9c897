/* SPDX-License-Identifier: MIT */
/* What a copy of a disk would write: for `measure`, before there is a target. */
#ifndef STRATA_JOB_MEASURE_H
#define STRATA_JOB_MEASURE_H

#include <stdbool.h>
#include <stdint.h>
#include "disk/driver.h"

struct node;
struct err;

/*
 * Fills `out` for a copy of `src`, over its whole chain, into a format with units of `unit` bytes
 * (1: a raw one).  What the map calls data counts; with `scan` the data is read as well, and what
 * turns out to be zeros does not, as copy_run_co leaves it out.  Errors name the source and the
 * place.
 */
int measure_source_co(struct node *src, uint64_t unit, bool scan, struct measure_in *out,
                      struct err *e);
/* For a disk of which nothing, or (`full`) nothing but data, is known. */
void measure_plain(uint64_t size, bool full, struct measure_in *out);

#endif
