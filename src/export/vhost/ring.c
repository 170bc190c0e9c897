/* SPDX-License-Identifier: MIT */
#include "export/vhost/ring.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include "base/ck.h"

#define LOAD(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define STORE(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)
/* Between our writing one side's field and reading the other's. */
#define FENCE() __atomic_thread_fence(__ATOMIC_SEQ_CST)
/* What was copied before it is not read from shared memory again. */
#define COPIED() __atomic_signal_fence(__ATOMIC_SEQ_CST)

bool ring_locate(struct ring *r, uint64_t desc, uint64_t avail, uint64_t used) {
    const struct memory *m = r->memory;
    uint64_t n = r->num;
    r->desc = memory_user(m, desc, n * sizeof(struct virtq_desc), 16);
    uint64_t avail_bytes = r->packed ? sizeof(struct virtq_event) : 6 + 2 * n;
    uint64_t used_bytes = r->packed ? sizeof(struct virtq_event) : 6 + 8 * n;
    r->avail = memory_user(m, avail, avail_bytes, r->packed ? 4 : 2);
    r->used = memory_user(m, used, used_bytes, 4);
    return n && r->desc && r->avail && r->used;
}

/* ---------------------------------------------------------------- done again after a restart */

struct unfinished {
    uint64_t counter;
    uint16_t head;
};

static int by_counter(const void *a, const void *b) {
    const struct unfinished *x = a, *y = b;
    return x->counter < y->counter ? -1 : x->counter > y->counter;
}

static int find_unfinished(struct ring *r) {
    struct ring_inflight *in = r->inflight;
    /* Shared as well, so each field is read once. */
    uint16_t last = LOAD(&in->last_batch_head);
    if (!LOAD(&in->version)) { /* new: the front end gave us zeros */
        in->version = 1;
        in->desc_num = r->num;
        in->used_idx = r->used_idx;
        return 0;
    }
    if (LOAD(&in->desc_num) != r->num)
        return -EPROTO;
    /* The process died between telling the driver and striking it off. */
    if (LOAD(&in->used_idx) != r->used_idx) {
        if (last >= r->num)
            return -EPROTO;
        in->desc[last].inflight = 0;
        in->used_idx = r->used_idx;
    }
    struct unfinished *all = calloc(r->num, sizeof(*all));
    r->again = calloc(r->num, sizeof(*r->again));
    if (!all || !r->again) {
        free(all);
        return -ENOMEM;
    }
    r->nagain = 0;
    for (uint16_t i = 0; i < r->num; i++) {
        if (!LOAD(&in->desc[i].inflight))
            continue;
        uint64_t counter = LOAD(&in->desc[i].counter);
        all[r->nagain++] = (struct unfinished){counter, i};
        r->counter = max_u64(r->counter, counter);
    }
    qsort(all, r->nagain, sizeof(*all), by_counter);
    for (unsigned i = 0; i < r->nagain; i++) /* taken from the end */
        r->again[i] = all[r->nagain - 1 - i].head;
    free(all);
    r->last_avail = (uint16_t)(r->used_idx + r->nagain);
    return 0;
}

int ring_begin(struct ring *r, uint32_t base) {
    free(r->again);
    r->again = NULL;
    r->nagain = 0;
    r->taken = r->given = 0;
    r->broken = r->signalled_valid = false;
    r->last_avail = (uint16_t)base;
    if (!r->packed) {
        r->used_idx = LOAD(&r->used->idx);
        return r->inflight ? find_unfinished(r) : 0;
    }
    r->last_avail = base & 0x7fff;
    r->avail_wrap = base >> 15 & 1;
    r->used_idx = base >> 16 & 0x7fff;
    r->used_wrap = base >> 31;
    return r->last_avail < r->num && r->used_idx < r->num ? 0 : -EPROTO;
}

uint32_t ring_base(const struct ring *r) {
    if (!r->packed)
        return r->last_avail;
    return r->last_avail | (uint32_t)r->avail_wrap << 15 | (uint32_t)r->used_idx << 16 |
           (uint32_t)r->used_wrap << 31;
}

/* ---------------------------------------------------------------- taking */

static int add_buffer(const struct ring *r, struct chain *c, uint64_t addr, uint32_t len,
                      uint16_t flags) {
    int n = c->nout + c->nin, room = CHAIN_PIECES_MAX - n;
    if (!(flags & DESC_WRITE) && c->nin)
        return -EPROTO; /* what the device reads comes first */
    int got = memory_guest(r->memory, addr, len, c->v + n, room);
    if (!got)
        return -EPROTO;
    if (flags & DESC_WRITE)
        c->nin += got;
    else
        c->nout += got;
    return 0;
}

/* An entry of guest memory, read once. */
static bool read_entry(const struct ring *r, uint64_t table, uint64_t i, struct virtq_desc *out) {
    struct iovec v[2];
    int n = memory_guest(r->memory, table + i * sizeof(*out), sizeof(*out), v, 2);
    uint8_t *to = (uint8_t *)out;
    for (int k = 0; k < n; k++) {
        memcpy(to, v[k].iov_base, v[k].iov_len);
        to += v[k].iov_len;
    }
    COPIED();
    return n > 0;
}

static int take_indirect(const struct ring *r, struct chain *c, uint64_t table, uint32_t bytes) {
    uint32_t count = bytes / sizeof(struct virtq_desc);
    if (!count || bytes % sizeof(struct virtq_desc) || count > RING_SIZE_MAX)
        return -EPROTO;
    uint32_t i = 0;
    for (uint32_t steps = 0; steps < count; steps++) {
        struct virtq_desc d;
        if (i >= count || !read_entry(r, table, i, &d))
            return -EPROTO;
        uint16_t flags =
            r->packed ? d.next : d.flags; /* packed ones have the id before the flags */
        if (flags & DESC_INDIRECT)
            return -EPROTO;
        int rc = add_buffer(r, c, d.addr, d.len, flags);
        if (rc < 0)
            return rc;
        if (r->packed)
            i++;
        else if (flags & DESC_NEXT)
            i = d.next;
        else
            return 0;
    }
    return r->packed ? 0 : -EPROTO; /* split: a loop */
}

static int take_split(struct ring *r, struct chain *c, uint16_t head) {
    uint16_t i = head;
    for (uint16_t steps = 0; steps < r->num; steps++) {
        if (i >= r->num)
            return -EPROTO;
        struct virtq_desc d;
        memcpy(&d, (const void *)&r->desc[i], sizeof(d));
        COPIED();
        if (d.flags & DESC_INDIRECT)
            return d.flags & DESC_NEXT ? -EPROTO : take_indirect(r, c, d.addr, d.len);
        int rc = add_buffer(r, c, d.addr, d.len, d.flags);
        if (rc < 0)
            return rc;
        if (!(d.flags & DESC_NEXT))
            return 0;
        i = d.next;
    }
    return -EPROTO;
}

static int next_split(struct ring *r, struct chain *c) {
    if (r->nagain) {
        c->head = r->again[--r->nagain];
    } else {
        uint16_t waiting = (uint16_t)(LOAD(&r->avail->idx) - r->last_avail);
        if (!waiting)
            return 0;
        if (waiting > r->num)
            return -EPROTO;
        c->head = LOAD(&r->avail->ring[r->last_avail % r->num]);
        if (c->head >= r->num)
            return -EPROTO;
        r->last_avail++;
        if (r->inflight) {
            r->inflight->desc[c->head].counter = ++r->counter;
            STORE(&r->inflight->desc[c->head].inflight, 1);
        }
    }
    int rc = take_split(r, c, c->head);
    return rc < 0 ? rc : 1;
}

static int next_packed(struct ring *r, struct chain *c) {
    for (c->descs = 0; c->descs < r->num;) {
        struct virtq_packed_desc d;
        const struct virtq_packed_desc *at = &r->pdesc[r->last_avail];
        if (!c->descs) {
            uint16_t flags = LOAD(&at->flags);
            if (!(flags & DESC_AVAIL) == r->avail_wrap || !(flags & DESC_USED) != r->avail_wrap)
                return 0;
        }
        memcpy(&d, (const void *)at, sizeof(d));
        COPIED();
        c->descs++;
        if (++r->last_avail == r->num) {
            r->last_avail = 0;
            r->avail_wrap = !r->avail_wrap;
        }
        int rc = d.flags & DESC_INDIRECT ? take_indirect(r, c, d.addr, d.len)
                                         : add_buffer(r, c, d.addr, d.len, d.flags);
        if (rc < 0)
            return rc;
        c->head = d.id;
        if (!(d.flags & DESC_NEXT))
            return 1;
        if (d.flags & DESC_INDIRECT)
            return -EPROTO;
    }
    return -EPROTO;
}

int ring_take(struct ring *r, struct chain *c) {
    if (r->broken)
        return -EPROTO;
    c->nout = c->nin = 0;
    c->descs = 1;
    int rc = r->packed ? next_packed(r, c) : next_split(r, c);
    r->taken += rc > 0;
    r->broken = rc < 0;
    return rc;
}

/* ---------------------------------------------------------------- giving back */

void ring_give(struct ring *r, uint16_t head, uint16_t descs, uint32_t written) {
    r->taken--;
    r->given += r->packed ? descs : 1;
    if (r->broken)
        return;
    if (r->packed) {
        struct virtq_packed_desc *d = &r->pdesc[r->used_idx];
        d->id = head;
        d->len = written;
        STORE(&d->flags,
              (uint16_t)((written ? DESC_WRITE : 0) | (r->used_wrap ? DESC_AVAIL | DESC_USED : 0)));
        r->used_idx = (uint16_t)(r->used_idx + descs);
        if (r->used_idx >= r->num) {
            r->used_idx = (uint16_t)(r->used_idx - r->num);
            r->used_wrap = !r->used_wrap;
        }
        return;
    }
    r->used->ring[r->used_idx % r->num] = (struct virtq_used_elem){head, written};
    if (r->inflight)
        STORE(&r->inflight->last_batch_head, head);
    r->used_idx++;
    STORE(&r->used->idx, r->used_idx);
    if (r->inflight) {
        STORE(&r->inflight->desc[head].inflight, 0);
        STORE(&r->inflight->used_idx, r->used_idx);
    }
}

/* Was `event` passed on the way from `old` to `now`? */
static bool passed(uint16_t event, uint16_t now, uint16_t old) {
    return (uint16_t)(now - event - 1) < (uint16_t)(now - old);
}

bool ring_wants_signal(struct ring *r) {
    uint16_t old = r->signalled, now = r->used_idx;
    bool valid = r->signalled_valid && r->given < r->num;
    if (r->broken || !r->given)
        return false;
    r->given = 0;
    r->signalled = now;
    r->signalled_valid = true;
    FENCE();
    if (!r->packed) {
        if (!r->event_idx)
            return !(LOAD(&r->avail->flags) & AVAIL_NO_INTERRUPT);
        uint16_t event = LOAD(&r->avail->ring[r->num]);
        return !valid || passed(event, now, old);
    }
    uint16_t flags = LOAD(&r->driver_event->flags), off = LOAD(&r->driver_event->off_wrap);
    if (flags != EVENT_DESC || !r->event_idx)
        return flags != EVENT_DISABLE;
    uint16_t event = off & 0x7fff;
    if (off >> 15 != r->used_wrap)
        event = (uint16_t)(event - r->num);
    /* Both in one count, as if the ring had not wrapped in between. */
    if (old > now)
        old = (uint16_t)(old - r->num);
    return !valid || passed(event, now, old);
}

void ring_want_kicks(struct ring *r, bool want) {
    if (r->broken)
        return;
    if (r->packed) {
        if (want && r->event_idx) {
            STORE(&r->device_event->off_wrap,
                  (uint16_t)(r->last_avail | (uint16_t)r->avail_wrap << 15));
            STORE(&r->device_event->flags, EVENT_DESC);
        } else {
            STORE(&r->device_event->flags, want ? EVENT_ENABLE : EVENT_DISABLE);
        }
    } else if (r->event_idx) {
        /* avail_event lies behind the used ring; while it is not moved on, no kick comes */
        if (want)
            STORE((uint16_t *)&r->used->ring[r->num], r->last_avail);
    } else {
        STORE(&r->used->flags, want ? 0 : USED_NO_NOTIFY);
    }
    FENCE();
}
