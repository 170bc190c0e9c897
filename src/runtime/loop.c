/* SPDX-License-Identifier: MIT */
/*
 * The loop: its life, its turn, and the way in from other threads.
 *
 * One turn: posts, timers, ready tasks, then one visit to the kernel that hands over everything
 * queued and, when nothing is ready, sleeps until an operation completes, a post or signal arrives,
 * or the first timer is due.  Nothing in the kernel exists before it is needed but one eventfd: the
 * back end is chosen and started by the first operation that has to wait (rt_backend_need), and
 * until then a sleeping loop is a ppoll on the eventfd and the signalfd.
 *
 * Posts are a lock-free stack that the loop takes whole and turns round, which keeps each poster's
 * order.  The eventfd is written only when the loop sleeps.  Against a lost wake, both sides store
 * before they load (sequentially consistent):
 *     poster: push;             if sleeping was set, clear it and write the eventfd
 *     loop:   sleeping = true;  if the stack is not empty, do not sleep
 * A post may be what lets the loop end, so `posters` counts those still inside rt_post() and
 * loop_free() waits for them (a few instructions each).
 *
 * fork(): neither ring nor pool survives it.  Fork before loop_new().
 */
#include "runtime/internal.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>
#include "base/err.h"

/* In-place completions before other tasks get their turn: some 100 us of 4 KiB reads. */
#define INLINE_MAX 128

static _Thread_local struct loop *self;

struct loop *loop_self(void) {
    return self;
}

/* ---- life ---- */

static int choose(enum loop_backend *backend, struct err *e) {
    const char *env = getenv("STRATA_AIO");
    if (!env || !*env || !strcmp(env, "auto"))
        return 0;
    if (!strcmp(env, "uring"))
        *backend = LOOP_URING;
    else if (!strcmp(env, "threads"))
        *backend = LOOP_THREADS;
    else
        return err_set(e, EINVAL, "STRATA_AIO is \"%s\"; it can be uring, threads or auto", env);
    return 0;
}

int loop_new(enum loop_backend backend, struct loop **out, struct err *e) {
    assert(!self);
    int r = backend == LOOP_AUTO ? choose(&backend, e) : 0;
    if (r < 0)
        return r;
    struct loop *l = calloc(1, sizeof(*l));
    if (!l)
        return err_errno(e, ENOMEM, "making an event loop");
    list_init(&l->ready);
    list_init(&l->stacks);
    list_init(&l->waits);
    sigemptyset(&l->signals);
    l->signal_fd = -1;
    l->now_ns = rt_clock_ns();
    l->wake_fd = eventfd(0, EFD_CLOEXEC);
    if (l->wake_fd < 0) {
        r = err_errno(e, errno, "making an event loop");
        free(l);
        return r;
    }
    if (backend == LOOP_THREADS) {
        l->be = &backend_threads;
    } else if (backend == LOOP_URING && (r = backend_uring.start(l)) < 0) {
        close(l->wake_fd);
        free(l);
        r = err_errno(e, -r, "io_uring is not available");
        err_hint(e, "use STRATA_AIO=threads or leave it unset");
        return r;
    } else if (backend == LOOP_URING) {
        l->be = &backend_uring;
    }
    rt_pool_enter();
    self = l;
    *out = l;
    return 0;
}

void rt_backend_need(struct loop *l) {
    if (l->be_state)
        return;
    /* valgrind 3.19 stops all other threads while one sleeps in io_uring_enter. */
    if (!l->be)
        l->be =
            !RUNNING_ON_VALGRIND && backend_uring.start(l) == 0 ? &backend_uring : &backend_threads;
    if (!l->be_state && l->be->start(l) < 0)
        rt_die("cannot start the event loop");
}

const char *loop_backend_name(const struct loop *l) {
    if (!l->be)
        rt_backend_need((struct loop *)l); /* deciding changes nothing that a caller can see */
    return l->be->name;
}

static bool run_posts(struct loop *l);

void loop_free(struct loop *l) {
    if (!l)
        return;
    assert(self == l && !l->running && !l->current);
    while (atomic_load(&l->posters) || run_posts(l))
        sched_yield();
    assert(l->tasks == 0 && list_empty(&l->waits) && l->timers == 0);
    rt_signals_free(l);
    if (l->be_state)
        l->be->stop(l);
    rt_free_stacks(l);
    close(l->wake_fd);
    free(l->heap);
    free(l->hints);
    self = NULL;
    free(l);
    rt_pool_leave();
}

/* ---- posts ---- */

void rt_post(struct loop *l, struct rt_post *p) {
    atomic_fetch_add(&l->posters, 1);
    p->next = atomic_load_explicit(&l->posts, memory_order_relaxed);
    while (!atomic_compare_exchange_weak(&l->posts, &p->next, p))
        ;
    if (atomic_load(&l->sleeping) && atomic_exchange(&l->sleeping, false)) {
        uint64_t one = 1;
        while (write(l->wake_fd, &one, sizeof(one)) < 0 && errno == EINTR)
            ;
    }
    atomic_fetch_sub(&l->posters, 1);
}

struct post_fn {
    struct rt_post post;
    void (*fn)(void *);
    void *arg;
};

static void post_fn_run(struct rt_post *p) {
    struct post_fn *pf = list_entry(p, struct post_fn, post);
    void (*fn)(void *) = pf->fn;
    void *arg = pf->arg;
    free(pf);
    fn(arg);
}

void loop_post(struct loop *l, void (*fn)(void *), void *arg) {
    struct post_fn *pf = malloc(sizeof(*pf));
    if (!pf)
        rt_die("no memory for posting to an event loop");
    *pf = (struct post_fn){.post.run = post_fn_run, .fn = fn, .arg = arg};
    rt_post(l, &pf->post);
}

static bool run_posts(struct loop *l) {
    if (!atomic_load_explicit(&l->posts, memory_order_relaxed))
        return false;
    struct rt_post *p = atomic_exchange(&l->posts, NULL), *fifo = NULL;
    while (p) {
        struct rt_post *next = p->next;
        p->next = fifo;
        fifo = p;
        p = next;
    }
    while (fifo) {
        struct rt_post *next = fifo->next;
        fifo->run(fifo);
        fifo = next;
    }
    return true;
}

/* ---- the turn ---- */

/* Sleeping without a back end. */
static void wait_bare(struct loop *l, int64_t timeout_ns) {
    struct pollfd p[2] = {{.fd = l->wake_fd, .events = POLLIN},
                          {.fd = l->signal_fd, .events = POLLIN}};
    struct timespec ts = {timeout_ns / 1000000000, timeout_ns % 1000000000};
    if (ppoll(p, 2, timeout_ns < 0 ? NULL : &ts, NULL) <= 0)
        return;
    uint64_t n;
    if ((p[0].revents & POLLIN) && read(l->wake_fd, &n, sizeof(n)) < 0)
        return;
    if (p[1].revents)
        rt_signals_read(l);
}

static void turn(struct loop *l) {
    l->inline_left = INLINE_MAX;
    run_posts(l);
    l->now_ns = rt_clock_ns();
    rt_timers_fire(l);
    rt_run_ready(l);
}

static void wait(struct loop *l) {
    int64_t timeout_ns = list_empty(&l->ready) ? rt_timers_next(l) : 0;
    if (timeout_ns) {
        atomic_store(&l->sleeping, true);
        if (atomic_load(&l->posts))
            timeout_ns = 0;
    }
    if (l->be_state)
        l->be->turn(l, timeout_ns);
    else if (timeout_ns || l->signal_fd >= 0)
        wait_bare(l, timeout_ns);
    atomic_store(&l->sleeping, false);
}

struct first_task {
    task_fn *fn;
    void *arg;
    bool ended;
};

static void first_task(void *arg) {
    struct first_task *f = arg;
    f->fn(f->arg);
    f->ended = true;
}

void loop_run(struct loop *l, task_fn *fn, void *arg) {
    assert(self == l && !l->running && !l->current);
    struct first_task f = {fn, arg, false};
    l->running = true;
    task_spawn(l, first_task, &f);
    for (;;) {
        turn(l);
        if (f.ended)
            break;
        wait(l);
    }
    l->running = false;
}

int64_t loop_now_ns(struct loop *l) {
    return l->now_ns;
}
