/* SPDX-License-Identifier: MIT */
/*
 * Inside the runtime: what task.c, sync.c, loop.c, timer.c, signal.c, io.c, offload.c and the two
 * back ends share.  Nothing outside src/runtime includes this.
 *
 * Who may touch what: everything in struct loop belongs to the loop's thread, except `posts`,
 * `sleeping`, `posters` and `wake_fd`, which any thread may use in the order that loop.c describes.
 */
#ifndef STRATA_RUNTIME_INTERNAL_H
#define STRATA_RUNTIME_INTERNAL_H

#include <assert.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include "base/list.h"
#include "runtime/loop.h"
#include "runtime/switch.h"
#include "runtime/task.h"

#if defined(__has_include)
#if __has_include(<valgrind/valgrind.h>)
#include <valgrind/valgrind.h>
#endif
#endif
#ifndef VALGRIND_STACK_REGISTER
#define VALGRIND_STACK_REGISTER(lo, hi) 0
#define VALGRIND_STACK_DEREGISTER(id) (void)(id)
#define RUNNING_ON_VALGRIND 0
#endif

/* ---- tasks (task.c) ---- */

/* Without the guard; the struct task itself lies at the top. */
#define TASK_STACK_BYTES ((size_t)(RT_ASAN ? 256 : 64) * 1024)
/* Wider than a page, so that a function with a large frame cannot step over it. */
#define TASK_GUARD_BYTES ((size_t)16 * 1024)
/* 4 MiB a loop at most: more tasks than that at once is rare, and then mmap is not what counts. */
#define TASK_STACKS_KEPT 64
#define TASK_NEST_MAX 16

struct rt_sleep;

struct task {
    struct rt_ctx ctx;
    struct rt_ctx *resumer; /* where to go at the next suspension or at the end */
    struct loop *loop;
    struct list link; /* loop.ready, or loop.stacks when free */
    task_fn *fn;
    void *arg;
    struct task_group *group;
    struct rt_sleep *sleep; /* while in loop_sleep_co */
    bool parked;            /* suspended, not in loop.ready */
    bool wake;              /* woken since its last park returned */
    bool ended;
    unsigned valgrind_id;
    void *map; /* guard and stack: TASK_GUARD_BYTES + TASK_STACK_BYTES */
};

/* Resumes ready tasks until none is left, somebody yielded, or a few rounds are done. */
void rt_run_ready(struct loop *l);
void rt_free_stacks(struct loop *l);
struct task *rt_task_new(struct loop *l, task_fn *fn, void *arg);
void rt_task_queue(struct task *t);
/* The loop of the running task (asserts that there is one). */
struct loop *rt_loop_co(void);
/* Going on is impossible (memory for something small is gone): prints one line and aborts. */
_Noreturn void rt_die(const char *why);

/* ---- posts: work from other threads (loop.c) ---- */

struct rt_post {
    struct rt_post *next;
    void (*run)(struct rt_post *p); /* in the loop's context; may free p */
};
void rt_post(struct loop *l, struct rt_post *p);

/* ---- timers (timer.c) ---- */

struct rt_timer {
    int64_t deadline_ns;
    uint64_t seq; /* equal deadlines fire in the order in which they were set */
    unsigned pos; /* index in the heap + 1; 0: not set */
    void (*fire)(struct rt_timer *t);
};
int64_t rt_clock_ns(void);
void rt_timer_set(struct loop *l, struct rt_timer *t, int64_t deadline_ns);
void rt_timer_clear(struct loop *l, struct rt_timer *t);
void rt_timers_fire(struct loop *l);
/* Nanoseconds until the first timer, 0 when it is due, -1 without timers. */
int64_t rt_timers_next(const struct loop *l);

/* ---- operations in flight ---- */

/* Lives on the waiting task's stack until done. */
struct rt_op {
    struct task *task; /* NULL: one of the loop's own */
    int res;
    bool done;
};
static inline void rt_op_done(struct rt_op *op, int res) {
    op->res = res;
    op->done = true;
    if (op->task)
        task_wake(op->task);
}
static inline int rt_op_wait_co(struct rt_op *op) {
    while (!op->done)
        task_park_co();
    return op->res;
}

enum rt_file_kind { RT_READ, RT_WRITE, RT_FDATASYNC, RT_FALLOCATE };
struct rt_file {
    enum rt_file_kind kind;
    int fd;
    const struct iovec *iov;
    int n;        /* elements; RT_FALLOCATE: mode */
    int rw_flags; /* RWF_* */
    uint64_t off, len;
    ssize_t res; /* of rt_file_blocking */
};
/* The plain system call; an offload function. */
int rt_file_blocking(void *file);

/* A wait for a descriptor to become ready, or (buf set, where the back end can) for its data. */
struct rt_wait {
    struct rt_op op;        /* res: revents, or bytes received, or -errno */
    struct list link;       /* loop.waits */
    struct list watch_link; /* threads: the waiters of one descriptor */
    struct rt_timer timer;
    struct loop *loop;
    int fd;
    short events;
    bool cancelled, timed_out;
    void *buf;
    size_t len;
};

/* ---- back ends ---- */

struct backend {
    const char *name;
    bool receives; /* wait_start honours rt_wait.buf */
    /* Makes the kernel objects.  0 or -errno (nothing left behind). */
    int (*start)(struct loop *l);
    void (*stop)(struct loop *l);
    /* Runs the operation; -EINTR and -EAGAIN may come out. */
    ssize_t (*file_co)(struct loop *l, struct rt_file *f);
    /* Ends in rt_op_done(&w->op, ...), perhaps at once. */
    void (*wait_start)(struct loop *l, struct rt_wait *w);
    /* w is not done: hurries its end. */
    void (*wait_cancel)(struct loop *l, struct rt_wait *w);
    /*
     * Hands over what is queued; waits up to timeout_ns (0: not at all, -1: for ever) for a
     * completion, a post or a signal; marks what has completed.
     */
    void (*turn)(struct loop *l, int64_t timeout_ns);
    void (*signals_on)(struct loop *l); /* loop.signal_fd has just been made */
};
extern const struct backend backend_uring, backend_threads;

struct fd_hint; /* io.c */

struct loop {
    struct rt_ctx ctx; /* the thread's own stack while a task runs */
    struct task *current;
    unsigned nest;
    unsigned tasks; /* alive */
    struct list ready;
    bool yielded; /* a task asked for I/O to be looked at */
    bool running; /* in loop_run */
    struct list stacks;
    unsigned stacks_kept;
    unsigned colour;
    unsigned inline_left; /* operations that may still complete in place this turn */

    int64_t now_ns;
    struct rt_timer **heap;
    unsigned timers, heap_room;
    uint64_t timer_seq;

    _Atomic(struct rt_post *) posts; /* a stack: newest first */
    atomic_bool sleeping;
    atomic_uint posters;
    int wake_fd; /* eventfd, blocking */

    struct list waits; /* rt_wait.link */
    struct fd_hint *hints;
    int64_t writes_calm_ns; /* no write in place before this time */

    int signal_fd; /* -1 until the first loop_on_signal */
    sigset_t signals;
    struct rt_signal *handlers; /* [_NSIG], or NULL */

    const struct backend *be; /* NULL: LOOP_AUTO, not decided yet */
    void *be_state;           /* NULL: not started */
};

/* Starts the back end if need be (deciding on one). */
void rt_backend_need(struct loop *l);

/* ---- signals (signal.c) ---- */
void rt_signals_read(struct loop *l);
void rt_signals_free(struct loop *l);

/* ---- the pool (offload.c) ---- */
void rt_pool_enter(void); /* loop_new */
void rt_pool_leave(void); /* loop_free: the last one ends the threads */

#endif
