/* SPDX-License-Identifier: MIT */
/*
 * Files, sockets and pipes: what is tried in place, and what goes to the back end.
 *
 * In place, without suspending: reads that the page cache answers (RWF_NOWAIT), socket calls that
 * do not block, and buffered writes (below).  A task that only ever completes in place would starve
 * its loop, so every INLINE_MAX-th operation of a turn yields (done_inline_co).
 *
 * Never in place: LOOP_BULK (offload pool), O_DIRECT descriptors (NOWAIT still waits for the disk),
 * LOOP_DSYNC.  What a descriptor can do is asked once and kept for HINT_NS: a closed and reused
 * number costs at most some slow requests, never a wrong one.
 *
 * Buffered writes: ext4 refuses RWF_NOWAIT, and through the ring each such write wakes a kernel
 * thread.  Measured on ext4, Linux 6.18, 4 KiB each: plain pwritev 5.7 us, ring 17 to 60 us (8 to
 * 10 in batches of 32), pool 25 us (20).  But a plain pwritev can be held up by writeback or a
 * journal commit; so writes up to INLINE_WRITE_MAX happen in place while they are quick, and once
 * one takes longer than SLOW_WRITE_NS all go through the back end for CALM_NS.
 */
#include "runtime/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* ---- what a descriptor can do ---- */

enum { HINT_DIRECT = 1, HINT_NO_NOWAIT_READ = 2, HINT_NO_NOWAIT_WRITE = 4 };
#define HINTED_FDS 1024
#define HINT_NS INT64_C(100000000)

#define INLINE_WRITE_MAX ((size_t)256 * 1024)
#define SLOW_WRITE_NS INT64_C(2000000)
#define CALM_NS INT64_C(200000000)

struct fd_hint {
    int64_t until_ns;
    unsigned bits;
};

static unsigned fd_bits(struct loop *l, int fd) {
    if (!l->hints && !(l->hints = calloc(HINTED_FDS, sizeof(struct fd_hint))))
        return HINT_DIRECT;
    struct fd_hint once, *h = fd >= 0 && fd < HINTED_FDS ? &l->hints[fd] : &once;
    if (h == &once || h->until_ns <= l->now_ns) {
        int fl = fcntl(fd, F_GETFL);
        h->bits = fl >= 0 && (fl & O_DIRECT) ? HINT_DIRECT : 0;
        h->until_ns = l->now_ns + HINT_NS;
    }
    return h->bits;
}

static void fd_learn(struct loop *l, int fd, unsigned bit) {
    if (fd >= 0 && fd < HINTED_FDS)
        l->hints[fd].bits |= bit;
}

/* ---- files ---- */

static ssize_t file_call(const struct rt_file *f) {
    switch (f->kind) {
    case RT_READ:
        return preadv2(f->fd, f->iov, f->n, (off_t)f->off, f->rw_flags);
    case RT_WRITE:
        return pwritev2(f->fd, f->iov, f->n, (off_t)f->off, f->rw_flags);
    case RT_FDATASYNC:
        return fdatasync(f->fd);
    case RT_FALLOCATE:
        return fallocate(f->fd, f->n, (off_t)f->off, (off_t)f->len);
    }
    return -1;
}

int rt_file_blocking(void *file) {
    struct rt_file *f = file;
    do
        f->res = file_call(f);
    while (f->res < 0 && errno == EINTR);
    if (f->res < 0)
        f->res = -errno;
    return 0;
}

static ssize_t file_co(struct loop *l, struct rt_file *f, bool bulk) {
    if (f->off > INT64_MAX || f->len > INT64_MAX)
        return -EINVAL; /* -1 would mean "at the file position" */
    if (bulk) {
        offload_blocking_co(rt_file_blocking, f);
        return f->res;
    }
    rt_backend_need(l);
    ssize_t r;
    do
        r = l->be->file_co(l, f);
    while (r == -EINTR);
    if (r == -EAGAIN) { /* not from a regular file; whatever this is, a thread can wait for it */
        offload_blocking_co(rt_file_blocking, f);
        r = f->res;
    }
    return r;
}

/* An operation has completed without suspending: is it the others' turn? */
static ssize_t done_inline_co(struct loop *l, ssize_t r) {
    if (l->inline_left == 0)
        task_yield_co();
    else
        l->inline_left--;
    return r;
}

ssize_t loop_preadv_co(int fd, const struct iovec *iov, int n, uint64_t off, unsigned flags) {
    struct loop *l = rt_loop_co();
    bool bulk = flags & LOOP_BULK;
    if (!bulk && off <= INT64_MAX && !(fd_bits(l, fd) & (HINT_DIRECT | HINT_NO_NOWAIT_READ))) {
        ssize_t r = preadv2(fd, iov, n, (off_t)off, RWF_NOWAIT);
        /* Around Linux 5.9 a 0 did not always mean the end; the end itself never blocks. */
        if (r == 0)
            r = preadv(fd, iov, n, (off_t)off);
        if (r >= 0)
            return done_inline_co(l, r);
        if (errno == EOPNOTSUPP)
            fd_learn(l, fd, HINT_NO_NOWAIT_READ);
        else if (errno != EAGAIN && errno != EINTR)
            return -errno;
    }
    struct rt_file f = {.kind = RT_READ, .fd = fd, .iov = iov, .n = n, .off = off};
    return file_co(l, &f, bulk);
}

/* -EAGAIN: this write belongs to the back end. */
static ssize_t write_inline(struct loop *l, int fd, const struct iovec *iov, int n, off_t off) {
    unsigned bits = fd_bits(l, fd);
    if (bits & HINT_DIRECT)
        return -EAGAIN;
    if (!(bits & HINT_NO_NOWAIT_WRITE)) {
        ssize_t r = pwritev2(fd, iov, n, off, RWF_NOWAIT);
        if (r >= 0)
            return r;
        if (errno != EOPNOTSUPP)
            return errno == EINTR ? -EAGAIN : -errno;
        fd_learn(l, fd, HINT_NO_NOWAIT_WRITE);
    }
    size_t len = 0;
    for (int i = 0; i < n; i++)
        len += iov[i].iov_len;
    int64_t start = rt_clock_ns();
    if (len > INLINE_WRITE_MAX || start < l->writes_calm_ns)
        return -EAGAIN;
    ssize_t r = pwritev(fd, iov, n, off);
    if (r < 0)
        r = errno == EINTR ? -EAGAIN : -errno;
    int64_t end = rt_clock_ns();
    if (end - start > SLOW_WRITE_NS)
        l->writes_calm_ns = end + CALM_NS;
    return r;
}

ssize_t loop_pwritev_co(int fd, const struct iovec *iov, int n, uint64_t off, unsigned flags) {
    struct loop *l = rt_loop_co();
    if (!(flags & (LOOP_BULK | LOOP_DSYNC)) && off <= INT64_MAX) {
        ssize_t r = write_inline(l, fd, iov, n, (off_t)off);
        if (r != -EAGAIN)
            return done_inline_co(l, r);
    }
    struct rt_file f = {.kind = RT_WRITE,
                        .fd = fd,
                        .iov = iov,
                        .n = n,
                        .off = off,
                        .rw_flags = flags & LOOP_DSYNC ? RWF_DSYNC : 0};
    return file_co(l, &f, flags & LOOP_BULK);
}

int loop_fdatasync_co(int fd) {
    struct rt_file f = {.kind = RT_FDATASYNC, .fd = fd};
    return (int)file_co(rt_loop_co(), &f, false);
}

int loop_fallocate_co(int fd, int mode, uint64_t off, uint64_t len) {
    struct rt_file f = {.kind = RT_FALLOCATE, .fd = fd, .n = mode, .off = off, .len = len};
    return (int)file_co(rt_loop_co(), &f, false);
}

/* ---- waiting for descriptors ---- */

static void wait_timeout(struct rt_timer *t) {
    struct rt_wait *w = list_entry(t, struct rt_wait, timer);
    w->timed_out = true;
    if (!w->op.done)
        w->loop->be->wait_cancel(w->loop, w);
}

/* Returns op.res; 0 on timeout; -ECANCELED whenever loop_cancel_fd() came before the return. */
static int wait_co(struct loop *l, struct rt_wait *w, int64_t timeout_ns) {
    rt_backend_need(l);
    w->op.task = l->current;
    w->loop = l;
    w->timer.fire = wait_timeout;
    if (timeout_ns >= 0) {
        int64_t deadline;
        if (__builtin_add_overflow(rt_clock_ns(), timeout_ns, &deadline))
            deadline = INT64_MAX;
        rt_timer_set(l, &w->timer, deadline);
    }
    list_push_back(&l->waits, &w->link);
    l->be->wait_start(l, w);
    int r = rt_op_wait_co(&w->op);
    list_remove(&w->link);
    rt_timer_clear(l, &w->timer);
    if (w->cancelled)
        return -ECANCELED;
    return r == -ECANCELED && w->timed_out ? 0 : r;
}

static int wait_ready_co(struct loop *l, int fd, short events, int64_t timeout_ns) {
    struct rt_wait w = {.fd = fd, .events = events};
    int r;
    do
        r = wait_co(l, &w, timeout_ns);
    while (r == -EINTR);
    return r;
}

void loop_cancel_fd(struct loop *l, int fd) {
    assert(loop_self() == l);
    list_for_each(it, &l->waits) {
        struct rt_wait *w = list_entry(it, struct rt_wait, link);
        if (w->fd != fd || w->cancelled)
            continue;
        w->cancelled = true;
        if (!w->op.done)
            l->be->wait_cancel(l, w);
    }
}

int loop_poll_co(int fd, short events, int64_t timeout_ns) {
    struct loop *l = rt_loop_co();
    if (timeout_ns == 0) {
        struct pollfd p = {.fd = fd, .events = events};
        int r = poll(&p, 1, 0);
        return r < 0 ? -errno : r == 0 ? 0 : p.revents & POLLNVAL ? -EBADF : p.revents;
    }
    return wait_ready_co(l, fd, events, timeout_ns);
}

/* ---- sockets and pipes ---- */

static ssize_t recv_now(int fd, void *buf, size_t len) {
    ssize_t r = recv(fd, buf, len, MSG_DONTWAIT);
    if (r < 0 && errno == ENOTSOCK)
        r = read(fd, buf, len);
    return r < 0 ? -errno : r;
}

ssize_t loop_recv_co(int fd, void *buf, size_t len) {
    struct loop *l = rt_loop_co();
    for (;;) {
        ssize_t r = recv_now(fd, buf, len);
        if (r == -EINTR)
            continue;
        if (r != -EAGAIN)
            return done_inline_co(l, r);
        rt_backend_need(l);
        if (l->be->receives) {
            struct rt_wait w = {.fd = fd, .events = POLLIN, .buf = buf, .len = len};
            r = wait_co(l, &w, -1);
            if (r == -EINTR)
                continue;
            if (r != -EAGAIN && r != -ENOTSOCK)
                return r;
        }
        r = wait_ready_co(l, fd, POLLIN, -1);
        if (r < 0)
            return r;
    }
}

static ssize_t send_now(int fd, const struct msghdr *msg, int flags) {
    ssize_t r = sendmsg(fd, msg, flags | MSG_DONTWAIT | MSG_NOSIGNAL);
    if (r < 0 && errno == ENOTSOCK)
        r = writev(fd, msg->msg_iov, (int)msg->msg_iovlen);
    return r < 0 ? -errno : r;
}

ssize_t loop_sendmsg_co(int fd, const struct msghdr *msg, int flags) {
    struct loop *l = rt_loop_co();
    for (;;) {
        ssize_t r = send_now(fd, msg, flags);
        if (r == -EINTR)
            continue;
        if (r != -EAGAIN)
            return done_inline_co(l, r);
        r = wait_ready_co(l, fd, POLLOUT, -1);
        if (r < 0)
            return r;
    }
}

int loop_accept_co(int fd, struct sockaddr_storage *peer, socklen_t *peer_len) {
    struct loop *l = rt_loop_co();
    for (;;) {
        if (peer_len)
            *peer_len = sizeof(*peer);
        int r = accept4(fd, (struct sockaddr *)peer, peer ? peer_len : NULL,
                        SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (r >= 0)
            return (int)done_inline_co(l, r);
        int err = errno;
        if (err == EINTR || err == ECONNABORTED)
            continue;
        if (err != EAGAIN)
            return -err;
        r = wait_ready_co(l, fd, POLLIN, -1);
        if (r < 0)
            return r;
    }
}

int loop_connect_co(int fd, const struct sockaddr *sa, socklen_t len) {
    struct loop *l = rt_loop_co();
    if (connect(fd, sa, len) == 0)
        return 0;
    int err = errno;
    if (err == EINTR)
        err = EINPROGRESS; /* the attempt goes on */
    if (err != EINPROGRESS)
        return -err; /* EAGAIN on a unix socket: the listener's queue is full */
    int r = wait_ready_co(l, fd, POLLOUT, -1);
    if (r < 0)
        return r;
    socklen_t n = sizeof(err);
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &n))
        err = errno;
    return -err;
}
