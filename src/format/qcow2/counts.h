/* SPDX-License-Identifier: MIT */
/*
 * A number for every host cluster, mostly 0 or 1: what `check` counts references with.
 *
 * Pages of 4096 clusters, made when first touched, whose numbers have 1, 2, 4 ... 64 bits each, as
 * the largest of them wants.  A 4 TiB image of 64 KiB clusters, all in use, takes 8 MiB; 16 MiB
 * with a snapshot or two of all of it, 32 MiB with up to fourteen, 64 MiB with up to 254.
 *
 * Bounded memory: several can share a room of so many bytes.  When it is full, its window, the
 * clusters that are counted at all, loses its upper part: what is there is forgotten, and adding to
 * it does nothing.  So whoever uses them does all of the counting again for the next window, until
 * one reaches the last cluster.  Numbers outside the window read as 0.
 *
 * Pure memory, no I/O.  The clusters of a call must be below `clusters` (asserted); those of one
 * room have as many.
 */
#ifndef STRATA_FORMAT_QCOW2_COUNTS_H
#define STRATA_FORMAT_QCOW2_COUNTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define COUNTS_CLUSTERS_MAX ((uint64_t)1 << 31) /* directory of 4 MiB */

enum { COUNTS_ROOM_MEMBERS = 2 };

struct counts;
struct counts_room {
    size_t max, bytes;
    uint64_t from, end; /* the window, in whole pages; end UINT64_MAX: no end */
    struct counts *member[COUNTS_ROOM_MEMBERS];
};
struct counts {
    uint64_t clusters;
    uintptr_t *pages;         /* address of the page; low bits: see counts.c; 0: all zero */
    struct counts_room *room; /* NULL: as much memory as it takes */
};

int counts_init(struct counts *c, uint64_t clusters); /* -ENOMEM; -EFBIG beyond the limit */
void counts_free(struct counts *c);                   /* accepts a zeroed one */

/* `c` is empty, and shares `room` from now on, which outlives it. */
void counts_share(struct counts *c, struct counts_room *room);
/* All numbers become 0. */
void counts_empty(struct counts *c);
/* The next window begins where this one ends; all numbers of its members become 0. */
void counts_room_next(struct counts_room *room);
/* Adds `by` to each of [first, first + n); stays at UINT64_MAX.  -ENOMEM: some were added. */
int counts_add(struct counts *c, uint64_t first, uint64_t n, uint64_t by);
uint64_t counts_get(const struct counts *c, uint64_t cluster);
/* Every one of [first, first + n) is 1; none of them is 1; none of them is above 0. */
bool counts_all_one(const struct counts *c, uint64_t first, uint64_t n);
bool counts_none_one(const struct counts *c, uint64_t first, uint64_t n);
bool counts_all_zero(const struct counts *c, uint64_t first, uint64_t n);
/*
 * The numbers of the 64 clusters from `cluster` (a multiple of 64) on as bits; false when one of
 * them may be above 1 (then ask for each).
 */
bool counts_word(const struct counts *c, uint64_t cluster, uint64_t *bits);
/* First cluster in [from, end) where the two differ, or `end`. */
uint64_t counts_difference(const struct counts *a, const struct counts *b, uint64_t from,
                           uint64_t end);
/* Highest cluster below `end` with a number above 0; UINT64_MAX: none. */
uint64_t counts_last(const struct counts *c, uint64_t end);

#endif
