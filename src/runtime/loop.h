/* SPDX-License-Identifier: MIT */
/*
 * The event loop: one per thread, tasks on top, the kernel's I/O below.
 *
 * Two back ends behind this one interface: io_uring (batched submission: everything that one turn
 * of the loop queued goes to the kernel in one system call) and a pool of threads with epoll, for
 * kernels and containers that refuse io_uring.  LOOP_AUTO probes at run time; the environment
 * variable STRATA_AIO=uring|threads decides by hand ("uring" on a machine that refuses it is an
 * error, not a fallback).
 *
 * Every *_co call suspends the running task until the operation is done, and returns what the
 * system call would: a count or 0, or -errno.  -EINTR and -EAGAIN on files never come out; short
 * counts do (the callers in storage/ finish them).  Completions are queued and run by the loop,
 * never from inside a submit.  Buffers and iovec arrays must stay valid until the call returns; an
 * operation is never abandoned: on cancellation it is cancelled, then reaped.
 */
#ifndef STRATA_RUNTIME_LOOP_H
#define STRATA_RUNTIME_LOOP_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>
#include "runtime/task.h"

struct err;

enum loop_backend { LOOP_AUTO, LOOP_URING, LOOP_THREADS };

/*
 * Makes a loop for the calling thread (at most one a thread).  Errors: -ENOSYS/-EPERM when the
 * backend asked for is refused, -ENOMEM, -EINVAL for a bad STRATA_AIO.  Cheap: LOOP_AUTO makes
 * ring, epoll and threads only when the first operation has to wait.  None of them survives a
 * fork(): fork before loop_new().
 */
int loop_new(enum loop_backend backend, struct loop **out, struct err *e);
/* All tasks must have ended (asserted); posts still queued run.  The process's last loop ends the
 * offload threads. */
void loop_free(struct loop *l);
const char *loop_backend_name(const struct loop *l); /* "uring" or "threads" */

/* Runs fn(arg) as a task and turns the loop until that task has ended (other tasks may remain). */
void loop_run(struct loop *l, task_fn *fn, void *arg);

/* Any thread: queues fn(arg) to run in the loop's own context (must not block or suspend; it may
 * spawn or wake).  Async-signal-safe: no.  Ordering: FIFO per posting thread. */
void loop_post(struct loop *l, void (*fn)(void *), void *arg);

/* Monotonic nanoseconds, cached once per turn of the loop. */
int64_t loop_now_ns(struct loop *l);

/* ---- timers and signals ---- */
/* Sleeps at least `ns`.  Returns 0, or -ECANCELED when loop_cancel_sleep(task) woke it. */
int loop_sleep_co(int64_t ns);
void loop_cancel_sleep(struct task *t);
/*
 * Delivers `signo` to fn(arg, signo) in the loop's own context, by signalfd.  At most one handler a
 * signal in the process (-EBUSY).  The signal is blocked in the calling thread and in those that it
 * starts later, so call this before other threads exist; children inherit the mask and must reset
 * it before exec.  loop_off_signal() restores the mask of before.
 */
int loop_on_signal(struct loop *l, int signo, void (*fn)(void *arg, int signo), void *arg);
void loop_off_signal(struct loop *l, int signo);

/* ---- files ---- */
/*
 * Data first in the page cache is moved at once, without suspending: loop_preadv_co tries
 * preadv2(RWF_NOWAIT) and only the rest goes through the back end.  With LOOP_BULK the work always
 * goes to another thread (offload pool), so that large copies use all cores.
 */
enum { LOOP_BULK = 1, LOOP_DSYNC = 2 /* RWF_DSYNC on the write */ };
ssize_t loop_preadv_co(int fd, const struct iovec *iov, int n, uint64_t off, unsigned flags);
ssize_t loop_pwritev_co(int fd, const struct iovec *iov, int n, uint64_t off, unsigned flags);
int loop_fdatasync_co(int fd);
int loop_fallocate_co(int fd, int mode, uint64_t off, uint64_t len);

/* ---- sockets and pipes (non-blocking descriptors) ---- */
/* recv/sendmsg try the system call first and suspend only on EAGAIN. */
ssize_t loop_recv_co(int fd, void *buf, size_t len);
ssize_t loop_sendmsg_co(int fd, const struct msghdr *msg, int flags);
int loop_accept_co(int fd, struct sockaddr_storage *peer,
                   socklen_t *peer_len); /* fd, CLOEXEC|NONBLOCK */
int loop_connect_co(int fd, const struct sockaddr *sa, socklen_t len);
/*
 * Waits for `events` (POLLIN, POLLOUT) on fd, at most `timeout_ns` (-1: for ever).  Returns
 * revents, 0 on timeout, -errno.
 */
int loop_poll_co(int fd, short events, int64_t timeout_ns);
/*
 * Ends every wait of this loop on `fd` (recv, sendmsg, accept, connect, poll) with -ECANCELED, even
 * when data or readiness arrives at the same moment (received bytes are then lost); the descriptor
 * can be closed once those tasks have returned.  Not sticky: later waits wait.
 */
void loop_cancel_fd(struct loop *l, int fd);

/* ---- offload: blocking or heavy work on worker threads ---- */
/*
 * Runs fn(arg) on a worker thread while the task sleeps; returns fn's result.  fn owns its inputs,
 * sees no node and no task, and may use errno as it likes.  The pool is shared by all loops of the
 * process, starts threads on demand up to the number of processors this process may use (at least
 * 2, at most 64; 512 KiB stacks), and ends idle ones after a few seconds.  The queue is FIFO and
 * unbounded: callers bound what they have in flight.
 */
int offload_co(int (*fn)(void *arg), void *arg);
/* As offload_co for work that blocks in the kernel (fsync, fallocate, cold reads) rather than uses
 * a processor: taken by extra threads (up to 64), so that it never starves the computing pool. */
int offload_blocking_co(int (*fn)(void *arg), void *arg);
/* Threads that compute at once: what callers use to size their parallelism. */
unsigned offload_width(void);

#endif
