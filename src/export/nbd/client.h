/* SPDX-License-Identifier: MIT */
/*
 * One NBD connection, inside the server (server.c, handshake.c, session.c, command.c, reply.c).
 *
 *   socket --recv--> rx buffer --parse--> request (pooled) --task_run--> command_run_co
 *                                                                             |
 *   socket <--sendmsg-- many replies at once <-- replies (queue) <------------+
 *
 * Tasks of a connection: its own (handshake, then receiver), one for each request in flight, and
 * one sender while the socket is full.  A request that never suspends (page cache) runs inside the
 * receiver's turn and only queues its reply; the receiver sends all of them with one system call
 * once it has parsed what one recv brought.  That is what makes a 4 KiB read cheap.
 *
 * Invariants
 *  1. `corked` is set exactly while the receiver parses: nobody sends then unless the queue is
 * long, and the receiver flushes before anything in which it may suspend.
 *  2. `sending` is set exactly while the sender task lives; only it sends then.
 *  3. A request is in one place: free list, receiver's hands, running task, reply queue.  A task
 * that has queued its reply does not touch the request again.
 *  4. The client outlives its tasks: it is freed by its own task after tasks == 0, !sending and an
 *     empty queue.
 *  5. What a client can make us hold is bounded: REQS_MAX requests and PAYLOAD_BUDGET bytes, and
 * all of them together SERVER_PAYLOAD; the receiver waits for room, so a client that does not read
 *     its replies stops only itself, and, while others wait for room, not longer than STALL_NS.
 *  6. `x` is set exactly during transmission, and counted in x->clients; a request is counted in
 *     x->active while it is inside the engine, and none is begun while x->paused.
 *
 * Context: everything belongs to the loop's thread.
 */
#ifndef STRATA_EXPORT_NBD_CLIENT_H
#define STRATA_EXPORT_NBD_CLIENT_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>
#include "base/list.h"
#include "export/export.h"
#include "export/nbd/proto.h"
#include "export/nbd/server.h"
#include "runtime/loop.h"
#include "runtime/task.h"
#include "runtime/throttle.h"

/* Requests of one connection at once: above any usual queue depth (kernel 128, qemu 16..64). */
#define REQS_MAX 128
/* Request tasks of all connections: bounds stacks (64 KiB each) to 64 MiB of address space. */
#define SERVER_TASKS_MAX 1024
/* Payload of one connection in buffers: one request of the largest size, or many usual ones. */
#define PAYLOAD_BUDGET ((long)NBD_PAYLOAD_MAX)
/* And of all connections. */
#define SERVER_PAYLOAD (8 * PAYLOAD_BUDGET)
/* Up to here a payload lies in the request's own slot, its reply header right in front of it. */
#define SLOT_BYTES (16u * 1024)
#define SLOT_HEAD 4096u /* a page, so that data stays page-aligned for O_DIRECT */
#define SLOT_STRIDE (SLOT_HEAD + SLOT_BYTES)
/* Larger ones: buffers of at most what buf_get gives. */
#define BUF_BYTES (2u << 20)
#define BUFS_MAX (NBD_PAYLOAD_MAX / BUF_BYTES)
#define RX_BYTES (64u * 1024)
#define TX_IOV 256

/* Metadata contexts as bits; their ids are one more. */
enum nbd_context {
    NBD_CONTEXT_ALLOCATION, /* base:allocation */
    NBD_CONTEXT_DEPTH,      /* qemu:allocation-depth */
    NBD_CONTEXT_BITMAPS,    /* qemu:dirty-bitmap:NAME, from here on */
    NBD_CONTEXTS_MAX = 64
};

struct nbd_req {
    struct list link; /* free list or reply queue */
    struct nbd_client *c;
    struct nbd_request cmd;
    uint64_t contexts;    /* block status: those that are asked for */
    uint8_t *data;        /* SLOT_BYTES, SLOT_HEAD bytes of room before it */
    void *bufs[BUFS_MAX]; /* payload larger than a slot */
    unsigned nbufs;
    uint32_t buf_total;  /* bytes in bufs, charged to the client's budget */
    void *extra;         /* malloc'ed part of a reply (chunk headers, extents) */
    const char *message; /* static text that goes with an error */
    /* The reply, once queued. */
    struct iovec *iov; /* inline_iov, or inside `extra` */
    int niov, iov_done;
    struct iovec inline_iov[BUFS_MAX + 1];
};

/* An export as this server keeps it. */
struct nbd_export {
    struct export base; /* first */
    struct list link;   /* server->exports */
    struct nbd_server *s;
    char *description;
    bool allocation_depth, gone; /* gone: no new clients */
    struct bitmap **bitmaps;
    unsigned nbitmaps, share;
    unsigned clients, active, paused;
    struct waitq changed; /* of those counts */
    struct throttle bytes, requests;
    uint64_t total_requests, total_read, total_written, total_errors;
};

struct tls_session;

struct nbd_client {
    struct list link; /* server->clients */
    struct nbd_server *s;
    struct nbd_export *x; /* NULL before the transmission phase */
    int fd;
    unsigned id;
    struct tls_session *tls; /* NULL: plain */

    /* handshake results */
    bool no_zeroes, structured, extended; /* extended implies structured */
    uint64_t contexts; /* bits of the selected metadata contexts, enum nbd_context */
    struct nbd_export *contexts_of;

    /* for the access log and the watchdog */
    int64_t since_ns, alive_ns; /* alive: the last time that bytes moved */
    uint64_t requests, bytes_read, bytes_written, errors;

    /* receiver */
    uint8_t *rx; /* RX_BYTES */
    size_t rx_pos, rx_end;
    size_t rx_want; /* how much to ask for: little while large writes come, see session.c */
    bool corked;
    bool closing; /* no further request is read */
    struct list free_reqs;
    struct waitq req_freed;
    long budget;        /* payload bytes still free */
    unsigned turn_work; /* since the receiver last gave way, see session.c */

    unsigned tasks; /* running request tasks */

    /* replies */
    struct list replies;
    size_t reply_bytes; /* queued */
    bool sending, flush_due, dead;
    struct waitq idle;

    struct nbd_req *reqs; /* REQS_MAX, with the slots' mapping */
    uint8_t *slots;
    struct iovec tx[TX_IOV];
};

struct nbd_server {
    struct loop *loop;
    struct list exports;
    struct nbd_export *first; /* of clients that ask for no name; NULL none */
    unsigned max_clients;
    int64_t handshake_timeout_ns, idle_timeout_ns;
    struct nbd_tls *tls;
    bool tls_required;
    void (*on_idle)(void *arg);
    void *arg;
    void (*access)(void *arg, const char *line);
    bool verbose;

    struct list clients;
    struct list listeners;
    unsigned nclients, nlisteners, next_id;
    bool stopping, grace_over, served; /* served: a client has got through the handshake */
    struct task *grace_task, *watch_task;
    bool grace_running, watch_running;
    struct waitq changed; /* a client or an acceptor has ended */
    long tasks_free;      /* of SERVER_TASKS_MAX */
    struct waitq task_freed;
    long payload; /* bytes of SERVER_PAYLOAD that are free */
    unsigned payload_waiters;
    struct waitq payload_freed;
};

/* export.c */
struct nbd_export *nbd_export_find(struct nbd_server *s, struct nbd_name name);
void nbd_export_free(struct nbd_export *x);
/* False with the reason when no further client may use it. */
bool nbd_export_enter(struct nbd_export *x, struct nbd_client *c, const char **why);
void nbd_export_leave(struct nbd_export *x);
/* Around what a request does in the engine. */
static inline void nbd_export_begin_co(struct nbd_export *x) {
    while (x->paused)
        waitq_wait_co(&x->changed);
    x->active++;
}
static inline void nbd_export_end(struct nbd_export *x) {
    if (--x->active == 0 && x->paused)
        waitq_wake_all(&x->changed);
}

/* access.c: the lines of the access log. */
void nbd_access_open(struct nbd_client *c);
void nbd_access_close(struct nbd_client *c, int rc);

/* session.c: waits on behalf of `c`, whose socket gives bytes: plain ones, whatever is below.  As
 * recv() without waiting, then with. */
ssize_t nbd_recv_now(struct nbd_client *c, void *buf, size_t len);
ssize_t nbd_recv_co(struct nbd_client *c, void *buf, size_t len);

/* handshake.c: 0 when the transmission phase begins, else the connection ends.  Suspends. */
int nbd_handshake_co(struct nbd_client *c);
/* meta.c: one LIST_META or SET_META option; appends replies.  < 0: the connection ends. */
struct nbd_out;
int nbd_meta_option(struct nbd_client *c, struct nbd_out *out, uint32_t option, const uint8_t *data,
                    uint32_t length);

/* session.c: receives requests until the client leaves, then waits for what is in flight. */
int nbd_session_co(struct nbd_client *c);
/* Back to the pool, buffers freed. */
void nbd_req_put(struct nbd_req *r);

/* command.c: does what r->cmd says and queues the reply. */
void nbd_command_run_co(struct nbd_req *r);
/* The answer to a request that failed: `error` is -errno; `message` static text or NULL. */
void nbd_command_fail(struct nbd_req *r, int error, const char *message);
/* status.c: the answer to BLOCK_STATUS; some context has been selected. */
void nbd_block_status_co(struct nbd_req *r);
/* Page-aligned buffers for `length` bytes of payload.  -ENOMEM. */
int nbd_req_buffers(struct nbd_req *r, uint32_t length);
/* The payload as a scatter list of at most BUFS_MAX elements. */
int nbd_req_payload(struct nbd_req *r, struct iovec *iov);

/* reply.c */
/* Queues r's reply (iov, niov set) and sends unless somebody else will. */
void nbd_reply_queue(struct nbd_req *r);
/* Sends what is queued as far as the socket takes it; the rest goes to a sender task. */
void nbd_reply_flush(struct nbd_client *c);
/* Drops everything, wakes the receiver: the connection is lost. */
void nbd_client_kill(struct nbd_client *c);

void nbd_log(struct nbd_client *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* What the export offers to this client (transmission flags). */
uint16_t nbd_export_flags(const struct nbd_client *c, const struct nbd_export *x);

/* ---- handshake.c, for meta.c: option replies collected and sent together ---- */
struct nbd_out {
    uint8_t *buf;
    size_t len, cap;
};
void nbd_out_reply(struct nbd_out *o, uint32_t option, uint32_t type, const void *a, size_t alen,
                   const void *b, size_t blen);
void nbd_out_error(struct nbd_out *o, uint32_t option, uint32_t type, const char *message);
#endif
