/* SPDX-License-Identifier: MIT */
/*
 * The io_uring back end.
 *
 * One ring a loop, made by the loop's own thread (SINGLE_ISSUER) at the first operation that needs
 * it.  Operations only fill submission entries; one io_uring_enter a turn hands them over and
 * waits. A completion marks its rt_op done and queues the task: no task ever runs inside here, so
 * reaping in the middle of a submission (full queue, overflown completions) is safe.
 *
 * The loop's own two operations stay armed all the time: a read of the eventfd (posts) and a poll
 * of the signalfd.  At the end they are cancelled and reaped, like everything that the kernel could
 * still write to.
 *
 * user_data is the rt_op, or 0 for completions that nobody waits for (cancellations).  A cancel
 * entry names an rt_op by address.  It can not hit a later operation at the same address, because
 * the later one's entry stands behind it in the same queue.
 *
 * Needs NODROP and FAST_POLL (Linux 5.7); everything newer is used when the kernel takes it.
 */
#include "runtime/internal.h"

#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <stdlib.h>

#define SQ_ENTRIES 256
#define SQ_ENTRIES_SMALL 32 /* under a tight RLIMIT_MEMLOCK (before Linux 5.12) */
#define REAP_BATCH 64

struct uring {
    struct io_uring ring;
    struct rt_op wake; /* read of loop.wake_fd */
    uint64_t wake_count;
    struct rt_op sig; /* poll of loop.signal_fd */
    bool sig_armed;
    bool stopping;
};

static void reap(struct loop *l);

static struct uring *state(struct loop *l) {
    return l->be_state;
}

/* The errors that mean "look at what has completed and try again"; no other leaves a way on. */
static int entered(int r) {
    if (r < 0 && r != -EBUSY && r != -EAGAIN && r != -EINTR && r != -ETIME)
        rt_die("io_uring takes no more work");
    return r;
}

static struct io_uring_sqe *sqe_get(struct loop *l) {
    struct uring *u = state(l);
    struct io_uring_sqe *sqe;
    while (!(sqe = io_uring_get_sqe(&u->ring)))
        if (entered(io_uring_submit(&u->ring)) < 0)
            reap(l); /* the kernel wants room for completions first */
    return sqe;
}

/* After the io_uring_prep call, which in some versions of liburing clears user_data. */
static void tag(struct io_uring_sqe *sqe, struct rt_op *op) {
    io_uring_sqe_set_data(sqe, op);
}

static void arm_wake(struct loop *l) {
    struct uring *u = state(l);
    struct io_uring_sqe *sqe = sqe_get(l);
    io_uring_prep_read(sqe, l->wake_fd, &u->wake_count, sizeof(u->wake_count), 0);
    tag(sqe, &u->wake);
    u->wake.done = false;
}

static void arm_signals(struct loop *l) {
    struct uring *u = state(l);
    if (l->signal_fd < 0 || u->sig_armed || u->stopping)
        return;
    struct io_uring_sqe *sqe = sqe_get(l);
    io_uring_prep_poll_add(sqe, l->signal_fd, POLLIN);
    tag(sqe, &u->sig);
    u->sig.done = false;
    u->sig_armed = true;
}

/* ---- life ---- */

static int ring_init(struct io_uring *ring) {
    /* Newest first; each set is what some kernel between 5.7 and today accepts. */
    static const unsigned flag_sets[] = {
        IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG |
            IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,                     /* 6.1 */
        IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG, /* 5.19 */
        0,
    };
    int r = -EINVAL;
    for (unsigned i = 0; i < sizeof(flag_sets) / sizeof(flag_sets[0]); i++) {
        unsigned entries = SQ_ENTRIES;
        do {
            struct io_uring_params p = {.flags = flag_sets[i] | IORING_SETUP_CQSIZE,
                                        .cq_entries = 4 * entries};
            r = io_uring_queue_init_params(entries, ring, &p);
            if (r == 0 &&
                !((p.features & IORING_FEAT_NODROP) && (p.features & IORING_FEAT_FAST_POLL))) {
                io_uring_queue_exit(ring);
                return -ENOSYS;
            }
            entries = entries == SQ_ENTRIES ? SQ_ENTRIES_SMALL : 0;
        } while (r == -ENOMEM && entries);
        if (r != -EINVAL)
            break;
    }
    return r;
}

static int uring_start(struct loop *l) {
    struct uring *u = calloc(1, sizeof(*u));
    if (!u)
        return -ENOMEM;
    int r = ring_init(&u->ring);
    if (r < 0) {
        free(u);
        return r;
    }
    l->be_state = u;
    arm_wake(l);
    arm_signals(l);
    return 0;
}

static void cancel(struct loop *l, struct rt_op *op) {
    struct io_uring_sqe *sqe = sqe_get(l);
    io_uring_prep_cancel64(sqe, (uintptr_t)op, 0);
    tag(sqe, NULL);
}

static void uring_stop(struct loop *l) {
    struct uring *u = state(l);
    u->stopping = true;
    cancel(l, &u->wake);
    if (u->sig_armed)
        cancel(l, &u->sig);
    while (!u->wake.done || u->sig_armed) {
        entered(io_uring_submit_and_wait(&u->ring, 1));
        reap(l);
    }
    io_uring_queue_exit(&u->ring);
    l->be_state = NULL;
    free(u);
}

/* ---- completions ---- */

static void complete(struct loop *l, struct rt_op *op, int res) {
    struct uring *u = state(l);
    rt_op_done(op, res);
    if (op == &u->wake && !u->stopping) {
        arm_wake(l);
    } else if (op == &u->sig) {
        u->sig_armed = false;
        if (!u->stopping)
            rt_signals_read(l);
        arm_signals(l);
    }
}

static void reap(struct loop *l) {
    struct uring *u = state(l);
    struct io_uring_cqe *cqes[REAP_BATCH];
    unsigned n;
    /* Also flushes completions that overflowed and runs the kernel's deferred work. */
    while ((n = io_uring_peek_batch_cqe(&u->ring, cqes, REAP_BATCH))) {
        /* Completing can come back here (a full queue), so the entries are copied out first. */
        struct {
            uint64_t op;
            int res;
        } got[REAP_BATCH];
        for (unsigned i = 0; i < n; i++) {
            got[i].op = cqes[i]->user_data;
            got[i].res = cqes[i]->res;
        }
        io_uring_cq_advance(&u->ring, n);
        for (unsigned i = 0; i < n; i++)
            if (got[i].op && got[i].op != LIBURING_UDATA_TIMEOUT)
                complete(l, (struct rt_op *)(uintptr_t)got[i].op, got[i].res);
    }
}

static void uring_turn(struct loop *l, int64_t timeout_ns) {
    struct uring *u = state(l);
    if (timeout_ns == 0) {
        if (io_uring_sq_ready(&u->ring))
            entered(io_uring_submit_and_get_events(&u->ring));
    } else if (timeout_ns < 0) {
        entered(io_uring_submit_and_wait(&u->ring, 1));
    } else {
        struct __kernel_timespec ts = {timeout_ns / 1000000000, timeout_ns % 1000000000};
        struct io_uring_cqe *cqe;
        entered(io_uring_submit_and_wait_timeout(&u->ring, &cqe, 1, &ts, NULL));
    }
    reap(l);
}

/* ---- operations ---- */

static ssize_t uring_file_co(struct loop *l, struct rt_file *f) {
    struct rt_op op = {.task = l->current};
    struct io_uring_sqe *sqe = sqe_get(l);
    switch (f->kind) {
    case RT_READ:
        io_uring_prep_readv2(sqe, f->fd, f->iov, (unsigned)f->n, f->off, f->rw_flags);
        break;
    case RT_WRITE:
        io_uring_prep_writev2(sqe, f->fd, f->iov, (unsigned)f->n, f->off, f->rw_flags);
        /* A synchronous write would be finished inside our own submission. */
        if (f->rw_flags)
            sqe->flags |= IOSQE_ASYNC;
        break;
    case RT_FDATASYNC:
        io_uring_prep_fsync(sqe, f->fd, IORING_FSYNC_DATASYNC);
        break;
    case RT_FALLOCATE:
        io_uring_prep_fallocate(sqe, f->fd, f->n, (off_t)f->off, (off_t)f->len);
        break;
    }
    tag(sqe, &op);
    return rt_op_wait_co(&op);
}

static void uring_wait_start(struct loop *l, struct rt_wait *w) {
    struct io_uring_sqe *sqe = sqe_get(l);
    if (w->buf)
        io_uring_prep_recv(sqe, w->fd, w->buf, w->len, 0);
    else
        io_uring_prep_poll_add(sqe, w->fd, (unsigned)w->events);
    tag(sqe, &w->op);
}

static void uring_wait_cancel(struct loop *l, struct rt_wait *w) {
    cancel(l, &w->op);
}

const struct backend backend_uring = {
    .name = "uring",
    .receives = true,
    .start = uring_start,
    .stop = uring_stop,
    .file_co = uring_file_co,
    .wait_start = uring_wait_start,
    .wait_cancel = uring_wait_cancel,
    .turn = uring_turn,
    .signals_on = arm_signals,
};
