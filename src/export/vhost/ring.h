/* SPDX-License-Identifier: MIT */
/*
 * One virtqueue, split or packed: taking requests, giving them back, and when to tell the other
 * side.
 *
 * The driver is not trusted: every descriptor is read once into our own memory and checked, every
 * address looked up, chains bounded by the ring's size.  A ring that breaks a rule stays broken
 * (-EPROTO) until it is set up anew.
 *
 * In flight (split rings): `inflight`, memory of the front end that outlives this process, says
 * which requests were taken and not given back, so that after a restart they are done again.  Its
 * layout is the one that vhost-user.rst describes for split rings.
 */
#ifndef STRATA_EXPORT_VHOST_RING_H
#define STRATA_EXPORT_VHOST_RING_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>
#include "export/vhost/memory.h"
#include "export/vhost/proto.h"

#define RING_SIZE_MAX 1024
/* Pieces of memory in one request: what we announce as seg_max, header, status, and some that lie
 * across two regions. */
#define CHAIN_PIECES_MAX 192

/* A request: first what the device reads, then what it writes. */
struct chain {
    uint16_t head;  /* split: index of the first descriptor; packed: buffer id */
    uint16_t descs; /* packed: ring places that it took */
    int nout, nin;
    struct iovec v[CHAIN_PIECES_MAX]; /* nout, then nin */
};

struct ring_inflight_desc {
    uint8_t inflight, padding[5];
    uint16_t next;
    uint64_t counter;
};
struct ring_inflight {
    uint64_t features;
    uint16_t version, desc_num, last_batch_head, used_idx;
    struct ring_inflight_desc desc[];
};

struct ring {
    uint16_t num; /* 0: not set up */
    bool packed, event_idx, broken;
    const struct memory *memory;
    union {
        struct virtq_desc *desc;
        struct virtq_packed_desc *pdesc;
    };
    union {
        struct virtq_avail *avail;
        struct virtq_event *driver_event;
    };
    union {
        struct virtq_used *used;
        struct virtq_event *device_event;
    };
    uint16_t last_avail, used_idx;
    bool avail_wrap, used_wrap;
    uint16_t signalled; /* used_idx at the last look whether to signal */
    bool signalled_valid;
    unsigned given; /* ring places since then */
    unsigned taken; /* requests not given back */

    struct ring_inflight *inflight; /* NULL: not kept */
    uint64_t counter;
    uint16_t *again; /* heads to be done again after a restart, in order; owned */
    unsigned nagain;
};

/* Looks the three parts up; false: not in memory, or unaligned. */
bool ring_locate(struct ring *r, uint64_t desc, uint64_t avail, uint64_t used);
/* With the base that the front end gave, and `inflight` set: finds what is to be done again. */
int ring_begin(struct ring *r, uint32_t base);
/* What GET_VRING_BASE answers, once nothing is taken. */
uint32_t ring_base(const struct ring *r);

/* The next request: 1, 0 (none) or -EPROTO. */
int ring_take(struct ring *r, struct chain *c);
/* `written`: bytes that the device wrote. */
void ring_give(struct ring *r, uint16_t head, uint16_t descs, uint32_t written);
/* Does the driver want to hear of what was given back since the last call? */
bool ring_wants_signal(struct ring *r);
/* The driver shall (not) kick for new requests; after true, look once more before sleeping. */
void ring_want_kicks(struct ring *r, bool want);

#endif
