/* SPDX-License-Identifier: MIT */
/*
 * Zeroing and discarding for formats that never give a unit's room back: what is there is zeroed,
 * or becomes a hole of the storage, where it lies.  Slots of struct format_ops, on the format's own
 * map.
 */
#ifndef STRATA_FORMAT_IN_PLACE_H
#define STRATA_FORMAT_IN_PLACE_H

#include <stdint.h>

struct node;

/* For formats without a layer below, whose holes read as zeros. */
int in_place_set_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags);
/* Only with NODE_UNMAP. */
int in_place_discard_co(struct node *n, uint64_t offset, uint64_t length);

/* `zero_flags` as they go to the storage: discard=ignore keeps room allocated. */
unsigned in_place_zero_flags(const struct node *n, unsigned zero_flags);

#endif
