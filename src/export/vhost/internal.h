/* SPDX-License-Identifier: MIT */
/* What session and queues share. */
#ifndef STRATA_EXPORT_VHOST_INTERNAL_H
#define STRATA_EXPORT_VHOST_INTERNAL_H

#include "export/export.h"
#include "export/vhost/memory.h"
#include "export/vhost/ring.h"
#include "export/vhost/server.h"
#include "runtime/task.h"

enum {
    SEGMENTS = 126,               /* of one request, as announced */
    RANGES_MAX = 16,              /* of one discard or write-zeroes request */
    RANGE_SECTORS = 1 << 21,      /* of one such range: a GiB */
    REQUEST_BYTES_MAX = 64 << 20, /* data of one read or write */
    REQUESTS_MAX = 256,           /* in flight, all queues together */
};

struct vhost_server;

struct vhost_queue {
    struct vhost_server *s;
    unsigned index;
    struct ring ring;
    uint64_t desc, avail, used; /* as the front end gave them */
    bool have_addr, enabled;
    uint32_t base;
    int kick, call, error; /* eventfds; -1: none */
    bool running;          /* its task is there */
    bool stop;
    bool began;    /* the ring's own indexes are newer than `base` */
    bool broken;   /* it broke a rule: stays stopped until it is set up anew */
    unsigned held; /* > 0: somebody changes it */
    struct task *task;
    struct waitq quiet; /* woken when the last request in flight has ended, and when the task has */
    unsigned in_flight;
    unsigned batch; /* > 0: the signal to the driver is held back */
};

struct vhost_server {
    struct export base; /* first: export.h's view of it */
    struct loop *loop;
    struct vhost_server_opts o;
    uint64_t requests, errors, bytes_read, bytes_written;
    int listen_fd, fd;
    char *serial;
    uint64_t capacity; /* sectors */
    bool stopping;
    struct task *task, *stopper;
    bool ended;

    uint64_t features, protocol;
    bool writeback;
    struct memory memory;
    struct vhost_queue *queue;
    struct task_sem room;
    struct memory_map inflight;
    size_t inflight_bytes;  /* of it that are ours */
    uint16_t inflight_size; /* entries that each queue has room for there */
    struct vhost_request_slot *spare;
};

static inline bool vhost_has(const struct vhost_server *s, int feature) {
    return s->features >> feature & 1;
}

/*
 * Who changes what a queue works with holds it first, and lets go of it after: hold ends the
 * queue's task, after what is in flight, and keeps what the front end said, `base` included.  Both
 * nest, for the session and the control socket come at the same time; the last one to let go
 * starts it again when all that it needs is there.
 */
void vhost_queue_hold_co(struct vhost_queue *q);
void vhost_queue_release(struct vhost_queue *q);
void vhost_hold_all_co(struct vhost_server *s);
void vhost_release_all(struct vhost_server *s);
/* Frees the requests kept for later. */
void vhost_queue_forget(struct vhost_server *s);
/* Room of one queue in the memory that outlives us. */
size_t vhost_inflight_bytes(uint16_t queue_size);

/* Serves the connection until it ends. */
void vhost_session_co(struct vhost_server *s);

#endif
