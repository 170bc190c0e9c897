/* SPDX-License-Identifier: MIT */
/*
 * One queue: a task that takes requests, each of which runs as a task of its own.
 *
 * Signals: while the queue's task takes, requests that end at once do not signal; one signal for
 * all follows.  Kicks: not wanted while the task takes anyway; after saying that they are wanted
 * again it looks once more.
 */
#include "export/vhost/internal.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/ck.h"
#include "base/iov.h"
#include "base/log.h"
#include "disk/io.h"
#include "disk/node.h"
#include "runtime/loop.h"

#define SECTOR 512

struct vhost_request_slot {
    struct vhost_request_slot *next;
    struct vhost_queue *q;
    struct chain c;
};

/* ---------------------------------------------------------------- what a request asks */

static int transfer_co(struct vhost_request_slot *r, bool write, uint64_t sector,
                       const struct iovec *v, int n, uint64_t bytes) {
    struct vhost_server *s = r->q->s;
    if (bytes % SECTOR || bytes > REQUEST_BYTES_MAX || sector > s->capacity ||
        bytes / SECTOR > s->capacity - sector)
        return BLK_IOERR;
    bool fua = write && (!vhost_has(s, VIRTIO_BLK_F_FLUSH) || !s->writeback);
    uint64_t at = sector * SECTOR;
    while (bytes) {
        int count = n < IOV_MAX_REQUEST ? n : IOV_MAX_REQUEST;
        uint64_t len = iov_length(v, count);
        int rc = write ? disk_pwritev_co(s->base.node, at, len, v, count, fua ? IO_FUA : 0)
                       : disk_preadv_co(s->base.node, at, len, v, count, 0);
        if (rc < 0)
            return BLK_IOERR;
        *(write ? &s->bytes_written : &s->bytes_read) += len;
        at += len;
        bytes -= len;
        v += count;
        n -= count;
    }
    return BLK_OK;
}

static int ranges_co(struct vhost_request_slot *r, bool zero, const struct iovec *v, int n,
                     uint64_t bytes) {
    struct vhost_server *s = r->q->s;
    struct virtio_blk_range range[RANGES_MAX];
    if (!bytes || bytes % sizeof(*range) || bytes > sizeof(range))
        return BLK_IOERR;
    iov_to_buf(v, n, 0, range, (size_t)bytes);
    for (size_t i = 0; i < bytes / sizeof(*range); i++) {
        const struct virtio_blk_range *g = &range[i];
        if (g->sector > s->capacity || g->sectors > s->capacity - g->sector ||
            g->sectors > RANGE_SECTORS)
            return BLK_IOERR;
        if (g->flags & ~(uint32_t)(zero ? BLK_ZEROES_UNMAP : 0))
            return BLK_UNSUPP;
        uint64_t at = g->sector * SECTOR, len = (uint64_t)g->sectors * SECTOR;
        if (!len)
            continue;
        int rc = zero ? disk_zero_co(s->base.node, at, len,
                                     g->flags & BLK_ZEROES_UNMAP ? ZERO_MAY_UNMAP : 0)
                      : disk_discard_co(s->base.node, at, len);
        if (rc < 0)
            return BLK_IOERR;
    }
    return BLK_OK;
}

static int get_id(const struct vhost_server *s, const struct iovec *v, int n, uint64_t bytes) {
    char id[BLK_ID_BYTES] = {0};
    if (bytes < sizeof(id))
        return BLK_IOERR;
    if (s->serial)
        memcpy(id, s->serial, strnlen(s->serial, sizeof(id)));
    iov_from_buf(v, n, 0, id, sizeof(id));
    return BLK_OK;
}

/* A part of the pieces as pieces of their own, in place: whole ones are kept, the rest is cut. */
static int cut_front(struct iovec **v, int n, size_t bytes) {
    while (n && bytes >= (*v)->iov_len) {
        bytes -= (*v)->iov_len;
        (*v)++;
        n--;
    }
    if (n && bytes) {
        (*v)->iov_base = (uint8_t *)(*v)->iov_base + bytes;
        (*v)->iov_len -= bytes;
    }
    return n;
}

/* The status byte is the last one that the device writes. */
static uint8_t *cut_status(struct iovec *in, int *n) {
    struct iovec *last = &in[*n - 1];
    uint8_t *status = (uint8_t *)last->iov_base + last->iov_len - 1;
    if (--last->iov_len == 0)
        (*n)--;
    return status;
}

/* Returns what the device wrote besides the status, or -EPROTO for a request that is none. */
static int64_t do_request_co(struct vhost_request_slot *r, uint8_t **status, int *result) {
    struct vhost_server *s = r->q->s;
    struct virtio_blk_head head;
    struct iovec *out = r->c.v, *in = r->c.v + r->c.nout;
    int nout = r->c.nout, nin = r->c.nin;
    if (iov_length(out, nout) < sizeof(head) || !nin)
        return -EPROTO;
    iov_to_buf(out, nout, 0, &head, sizeof(head));
    nout = cut_front(&out, nout, sizeof(head));
    *status = cut_status(in, &nin);
    uint64_t sent = iov_length(out, nout), room = iov_length(in, nin);
    bool change = head.type == BLK_OUT || head.type == BLK_DISCARD || head.type == BLK_ZEROES;
    if (change && s->base.read_only) {
        *result = BLK_IOERR;
        return 0;
    }
    switch (head.type) {
    case BLK_IN:
        *result = transfer_co(r, false, head.sector, in, nin, room);
        return *result == BLK_OK ? (int64_t)room : 0;
    case BLK_OUT:
        *result = transfer_co(r, true, head.sector, out, nout, sent);
        return 0;
    case BLK_FLUSH:
        *result = disk_flush_co(s->base.node) < 0 ? BLK_IOERR : BLK_OK;
        return 0;
    case BLK_GET_ID:
        *result = get_id(s, in, nin, room);
        return *result == BLK_OK ? BLK_ID_BYTES : 0;
    case BLK_DISCARD:
    case BLK_ZEROES:
        *result = ranges_co(r, head.type == BLK_ZEROES, out, nout, sent);
        return 0;
    default:
        *result = BLK_UNSUPP;
        return 0;
    }
}

/* ---------------------------------------------------------------- requests */

static void signal_fd(int fd) {
    uint64_t one = 1;
    if (fd >= 0 && write(fd, &one, sizeof(one)) < 0)
        return; /* full already: the other side has not looked yet */
}

static void signal_driver(struct vhost_queue *q) {
    if (!q->batch && ring_wants_signal(&q->ring))
        signal_fd(q->call);
}

static void ring_is_broken(struct vhost_queue *q, const char *why) {
    log_msg(LOG_LV_WARN, "vhost-user: queue %u stopped: %s", q->index, why);
    q->ring.broken = q->broken = true;
    signal_fd(q->error);
}

static void slot_put(struct vhost_server *s, struct vhost_request_slot *r) {
    r->next = s->spare;
    s->spare = r;
}

static void request_co(void *arg) {
    struct vhost_request_slot *r = arg;
    struct vhost_queue *q = r->q;
    uint8_t *status;
    int result = BLK_IOERR;
    int64_t written = do_request_co(r, &status, &result);
    q->s->requests++;
    q->s->errors += result != BLK_OK;
    if (written < 0) {
        ring_is_broken(q, "a request without header or status");
        q->ring.taken--;
    } else {
        *status = (uint8_t)result;
        ring_give(&q->ring, r->c.head, r->c.descs, (uint32_t)written + 1);
        signal_driver(q);
    }
    slot_put(q->s, r);
    task_sem_up(&q->s->room, 1);
    if (--q->in_flight == 0)
        waitq_wake_all(&q->quiet);
}

static struct vhost_request_slot *slot_get(struct vhost_queue *q) {
    struct vhost_request_slot *r = q->s->spare;
    if (r)
        q->s->spare = r->next;
    else
        r = malloc(sizeof(*r));
    if (r)
        r->q = q;
    return r;
}

void vhost_queue_forget(struct vhost_server *s) {
    struct vhost_request_slot *r;
    while ((r = s->spare)) {
        s->spare = r->next;
        free(r);
    }
}

/* Everything that waits, but no more than the ring holds, for a driver that never stops must not
 * have the loop for itself; false: none did. */
static bool take_all_co(struct vhost_queue *q) {
    struct vhost_server *s = q->s;
    bool any = false;
    q->batch++;
    for (unsigned turn = 0; turn < q->ring.num && !q->stop && !q->ring.broken; turn++) {
        task_sem_down_co(&s->room, 1);
        struct vhost_request_slot *r = q->stop ? NULL : slot_get(q);
        int rc = r ? ring_take(&q->ring, &r->c) : 0;
        if (rc <= 0) {
            task_sem_up(&s->room, 1);
            if (r)
                slot_put(s, r);
            if (rc < 0)
                ring_is_broken(q, memory_is_broken(&s->memory)
                                      ? "the memory behind it is gone"
                                      : "a descriptor chain that breaks the rules");
            break;
        }
        any = true;
        q->in_flight++;
        task_run(s->loop, request_co, r);
    }
    q->batch--;
    signal_driver(q);
    return any;
}

static void queue_task(void *arg) {
    struct vhost_queue *q = arg;
    q->task = task_self();
    while (!q->stop && !q->ring.broken) {
        ring_want_kicks(&q->ring, false);
        while (take_all_co(q) && !q->stop)
            task_yield_co(); /* others have their turn; what ends meanwhile brings more */
        ring_want_kicks(&q->ring, true);
        if (take_all_co(q) || q->stop || q->ring.broken)
            continue;
        int ev = loop_poll_co(q->kick, POLLIN, -1);
        uint64_t count;
        if (ev < 0 && ev != -ECANCELED)
            ring_is_broken(q, "its kicks cannot be waited for");
        ssize_t n = ev > 0 ? read(q->kick, &count, sizeof(count)) : 1;
        if (n == 0 || (n < 0 && errno != EAGAIN))
            ring_is_broken(q, "nobody can kick it any more");
    }
    q->task = NULL;
    q->running = false;
    waitq_wake_all(&q->quiet);
}

/* ---------------------------------------------------------------- start and stop */

size_t vhost_inflight_bytes(uint16_t queue_size) {
    size_t bytes = sizeof(struct ring_inflight) + queue_size * sizeof(struct ring_inflight_desc);
    return (size_t)align_up(bytes, 64);
}

static void start(struct vhost_queue *q) {
    struct vhost_server *s = q->s;
    if (q->running || q->broken || !q->have_addr || !q->enabled || q->kick < 0)
        return;
    struct ring *r = &q->ring;
    r->memory = &s->memory;
    r->packed = vhost_has(s, VIRTIO_F_RING_PACKED);
    r->event_idx = vhost_has(s, VIRTIO_F_EVENT_IDX);
    size_t each = vhost_inflight_bytes(s->inflight_size);
    bool kept = s->inflight.at && !r->packed && r->num <= s->inflight_size &&
                each * (q->index + 1) <= s->inflight_bytes;
    r->inflight = kept ? (void *)((uint8_t *)s->inflight.at + each * q->index) : NULL;
    if (!r->packed && !is_pow2(r->num)) {
        ring_is_broken(q, "its size is no power of two");
        return;
    }
    if (!ring_locate(r, q->desc, q->avail, q->used)) {
        ring_is_broken(q, "it does not lie in shared memory");
        q->broken = false; /* which may come */
        return;
    }
    if (ring_begin(r, q->base) < 0) {
        ring_is_broken(q, "its state of before makes no sense");
        return;
    }
    q->stop = false;
    q->running = q->began = true;
    task_spawn(s->loop, queue_task, q);
}

void vhost_queue_hold_co(struct vhost_queue *q) {
    q->held++;
    q->stop = true;
    while (q->running) {
        if (q->task && q->kick >= 0)
            loop_cancel_fd(q->s->loop, q->kick);
        waitq_wait_co(&q->quiet);
    }
    while (q->in_flight)
        waitq_wait_co(&q->quiet);
    /* Where it was, for a broken one too: nothing that was done is to be done again.  Of several
     * that wait here the first may have changed it before the next comes. */
    if (q->began)
        q->base = ring_base(&q->ring);
    q->began = false;
    free(q->ring.again);
    q->ring.again = NULL;
    q->ring.nagain = 0;
}

void vhost_queue_release(struct vhost_queue *q) {
    if (--q->held == 0)
        start(q);
}

void vhost_hold_all_co(struct vhost_server *s) {
    for (unsigned i = 0; i < s->o.queues; i++)
        vhost_queue_hold_co(&s->queue[i]);
}

void vhost_release_all(struct vhost_server *s) {
    for (unsigned i = 0; i < s->o.queues; i++)
        vhost_queue_release(&s->queue[i]);
}
