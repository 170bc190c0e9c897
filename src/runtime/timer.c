/* SPDX-License-Identifier: MIT */
/*
 * Timers: a binary heap of pointers, ordered by deadline, then by the order of setting.  A timer
 * is a record of its user (on a task's stack), so setting one allocates nothing but, now and then,
 * a larger heap.
 */
#include "runtime/internal.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

int64_t rt_clock_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * INT64_C(1000000000) + ts.tv_nsec;
}

static bool before(const struct rt_timer *a, const struct rt_timer *b) {
    return a->deadline_ns != b->deadline_ns ? a->deadline_ns < b->deadline_ns : a->seq < b->seq;
}

static void put(struct loop *l, unsigned i, struct rt_timer *t) {
    l->heap[i] = t;
    t->pos = i + 1;
}

static void sift_up(struct loop *l, unsigned i, struct rt_timer *t) {
    while (i > 0 && before(t, l->heap[(i - 1) / 2])) {
        put(l, i, l->heap[(i - 1) / 2]);
        i = (i - 1) / 2;
    }
    put(l, i, t);
}

static void sift_down(struct loop *l, unsigned i, struct rt_timer *t) {
    for (;;) {
        unsigned c = 2 * i + 1;
        if (c >= l->timers)
            break;
        if (c + 1 < l->timers && before(l->heap[c + 1], l->heap[c]))
            c++;
        if (!before(l->heap[c], t))
            break;
        put(l, i, l->heap[c]);
        i = c;
    }
    put(l, i, t);
}

void rt_timer_set(struct loop *l, struct rt_timer *t, int64_t deadline_ns) {
    assert(!t->pos);
    if (l->timers == l->heap_room) {
        unsigned room = l->heap_room ? 2 * l->heap_room : 32;
        struct rt_timer **heap = realloc(l->heap, room * sizeof(struct rt_timer *));
        if (!heap)
            rt_die("no memory for timers");
        l->heap = heap;
        l->heap_room = room;
    }
    t->deadline_ns = deadline_ns;
    t->seq = l->timer_seq++;
    sift_up(l, l->timers++, t);
}

void rt_timer_clear(struct loop *l, struct rt_timer *t) {
    if (!t->pos)
        return;
    unsigned i = t->pos - 1;
    assert(i < l->timers && l->heap[i] == t);
    t->pos = 0;
    struct rt_timer *last = l->heap[--l->timers];
    if (last == t)
        return;
    if (i > 0 && before(last, l->heap[(i - 1) / 2]))
        sift_up(l, i, last);
    else
        sift_down(l, i, last);
}

void rt_timers_fire(struct loop *l) {
    while (l->timers && l->heap[0]->deadline_ns <= l->now_ns) {
        struct rt_timer *t = l->heap[0];
        rt_timer_clear(l, t);
        t->fire(t);
    }
}

int64_t rt_timers_next(const struct loop *l) {
    if (!l->timers)
        return -1;
    int64_t d = l->heap[0]->deadline_ns, now = rt_clock_ns();
    return d > now ? d - now : 0;
}

/* ---- sleeping ---- */

struct rt_sleep {
    struct rt_timer timer;
    struct rt_op op;
};

static void sleep_over(struct rt_timer *timer) {
    rt_op_done(&list_entry(timer, struct rt_sleep, timer)->op, 0);
}

int loop_sleep_co(int64_t ns) {
    struct loop *l = rt_loop_co();
    struct task *self = l->current;
    struct rt_sleep s = {.timer.fire = sleep_over, .op.task = self};
    int64_t deadline;
    if (ns < 0)
        ns = 0;
    if (__builtin_add_overflow(rt_clock_ns(), ns, &deadline))
        deadline = INT64_MAX;
    rt_timer_set(l, &s.timer, deadline);
    self->sleep = &s;
    int r = rt_op_wait_co(&s.op);
    self->sleep = NULL;
    return r;
}

void loop_cancel_sleep(struct task *t) {
    assert(t->loop == loop_self());
    struct rt_sleep *s = t->sleep;
    if (!s || s->op.done)
        return;
    rt_timer_clear(t->loop, &s->timer);
    rt_op_done(&s->op, -ECANCELED);
}
