/* SPDX-License-Identifier: MIT */
/*
 * Storage in memory that keeps what a real disk may forget, and yields to other tasks at random.
 *
 * Fault model: a flush makes durable all writes that had completed when it was asked for; at a
 * power cut each sector of each later write is kept or lost by itself; sectors do not tear.
 */
#ifndef STRATA_TESTS_UNIT_FORGETFUL_H
#define STRATA_TESTS_UNIT_FORGETFUL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "disk/node.h"

/* A random number below `below`, after the seed (not 0). */
extern uint64_t rng_state;
uint64_t rng(uint64_t below);

struct record {
    uint64_t offset, length;
    bool complete;
    uint8_t *bytes;
};

struct disk {
    uint8_t *now, *stable; /* as read; as a power cut surely leaves it */
    uint64_t capacity, stable_size;
    struct record **pending;
    size_t pending_n, pending_cap;
    unsigned flushes;
    unsigned fail_one_in; /* 0: never */
    void (*before_sync_co)(void *arg);
    void *arg;
};

/* Its state is a struct disk. */
struct node *disk_new(uint64_t capacity, unsigned flags);
/* Its flush, without what the engine does around it. */
int disk_sync_co(struct node *n);
/* The storage after a power cut now. */
struct node *disk_after_cut(struct node *n);

#endif
