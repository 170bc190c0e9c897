/* SPDX-License-Identifier: MIT */
/*
 * What tasks wait on: queues, mutexes, readers and writers, semaphores, groups.
 *
 * All are FIFO and hand over: whoever releases gives the thing to the first waiter before that
 * waiter runs, so that nobody who comes later can slip in between.  A waiter is a record on the
 * waiting task's stack; `granted` is set by the releaser, and only that ends the wait (a spurious
 * wake goes back to sleep).  Everything here belongs to one loop, so plain loads and stores do.
 */
#include "runtime/internal.h"

struct waiter {
    struct list link;
    struct task *task;
    bool granted;
    bool writer;
    long units;
};

static void wait_co(struct list *queue, struct waiter *w) {
    w->task = rt_loop_co()->current;
    w->granted = false;
    list_push_back(queue, &w->link);
    while (!w->granted)
        task_park_co();
}

static struct waiter *first(struct list *queue) {
    return list_empty(queue) ? NULL : list_entry(queue->next, struct waiter, link);
}

static void grant(struct waiter *w) {
    list_remove(&w->link);
    w->granted = true;
    task_wake(w->task);
}

/* ---- queue ---- */

void waitq_init(struct waitq *q) {
    list_init(&q->waiters);
}

void waitq_wait_co(struct waitq *q) {
    struct waiter w;
    wait_co(&q->waiters, &w);
}

bool waitq_wake_one(struct waitq *q) {
    struct waiter *w = first(&q->waiters);
    if (!w)
        return false;
    grant(w);
    return true;
}

void waitq_wake_all(struct waitq *q) {
    while (waitq_wake_one(q))
        ;
}

/* ---- mutex ---- */

void task_mutex_init(struct task_mutex *m) {
    m->owner = NULL;
    list_init(&m->waiters);
}

bool task_mutex_trylock(struct task_mutex *m) {
    if (m->owner)
        return false;
    m->owner = rt_loop_co()->current;
    return true;
}

void task_mutex_lock_co(struct task_mutex *m) {
    struct task *self = rt_loop_co()->current;
    assert(m->owner != self);
    if (task_mutex_trylock(m))
        return;
    struct waiter w;
    wait_co(&m->waiters, &w);
    assert(m->owner == self);
}

void task_mutex_unlock(struct task_mutex *m) {
    assert(m->owner && m->owner == task_self());
    struct waiter *w = first(&m->waiters);
    m->owner = w ? w->task : NULL;
    if (w)
        grant(w);
}

/* ---- readers and writers ---- */

void task_rwlock_init(struct task_rwlock *l) {
    l->readers = 0;
    l->writer = false;
    list_init(&l->waiters);
}

static bool rwlock_take(struct task_rwlock *l, bool writer) {
    if (l->writer || (writer && l->readers))
        return false;
    if (writer)
        l->writer = true;
    else
        l->readers++;
    return true;
}

static void rwlock_lock_co(struct task_rwlock *l, bool writer) {
    /* Anybody waiting means a writer is: readers that come now queue behind it. */
    (void)rt_loop_co();
    if (list_empty(&l->waiters) && rwlock_take(l, writer))
        return;
    struct waiter w = {.writer = writer};
    wait_co(&l->waiters, &w);
}

void task_rwlock_rdlock_co(struct task_rwlock *l) {
    rwlock_lock_co(l, false);
}

void task_rwlock_wrlock_co(struct task_rwlock *l) {
    rwlock_lock_co(l, true);
}

void task_rwlock_unlock(struct task_rwlock *l) {
    assert(l->writer || l->readers);
    if (l->writer)
        l->writer = false;
    else
        l->readers--;
    struct waiter *w;
    while ((w = first(&l->waiters)) && rwlock_take(l, w->writer))
        grant(w);
}

/* ---- semaphore ---- */

void task_sem_init(struct task_sem *s, long units) {
    s->free = units;
    list_init(&s->waiters);
}

void task_sem_down_co(struct task_sem *s, long units) {
    assert(units >= 0);
    (void)rt_loop_co();
    if (list_empty(&s->waiters) && s->free >= units) {
        s->free -= units;
        return;
    }
    struct waiter w = {.units = units};
    wait_co(&s->waiters, &w);
}

void task_sem_up(struct task_sem *s, long units) {
    assert(units >= 0);
    s->free += units;
    struct waiter *w;
    while ((w = first(&s->waiters)) && s->free >= w->units) {
        s->free -= w->units;
        grant(w);
    }
}

/* ---- group ---- */

void task_group_init(struct task_group *g) {
    g->running = 0;
    waitq_init(&g->idle);
}

void task_group_spawn(struct task_group *g, struct loop *loop, task_fn *fn, void *arg) {
    assert(loop_self() == loop);
    struct task *t = rt_task_new(loop, fn, arg);
    t->group = g;
    g->running++;
    rt_task_queue(t);
}

void task_group_wait_co(struct task_group *g) {
    while (g->running)
        waitq_wait_co(&g->idle);
}
