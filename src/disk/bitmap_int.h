/* SPDX-License-Identifier: MIT */
/* What the two halves of the bitmaps (bits, and bitmaps of nodes) share. */
#ifndef STRATA_DISK_BITMAP_INT_H
#define STRATA_DISK_BITMAP_INT_H

#include "disk/bitmap.h"

/* -EFBIG when a bitmap of a disk of `size` bytes would have too many bits. */
int bitmap_check_size(uint64_t size, uint32_t granularity_bits, struct err *e);
/* A bare bitmap without room for bits.  -EFBIG, -ENOMEM. */
int bitmap_make(uint64_t size, uint32_t granularity_bits, struct bitmap **out, struct err *e);
/* The array of chunks, within the budget of b->set.  -EFBIG, -ENOMEM. */
int bitmap_give_room(struct bitmap *b, struct err *e);

#endif
