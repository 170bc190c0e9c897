/* SPDX-License-Identifier: MIT */
/* A limit on how much goes through in a second.  See throttle.h. */
#include "runtime/throttle.h"

#include "runtime/loop.h"
#include "runtime/task.h"

#define NS_PER_S 1e9
/* A sleep is cut into such pieces: sums stay in range whatever the rate is. */
#define SLEEP_MAX_S 3600.0

struct sleeper {
    struct list link;
    struct task *task;
    const void *owner;
    bool woken;
};

void throttle_init(struct throttle *t, uint64_t rate, uint64_t burst) {
    *t = (struct throttle){.rate = (double)rate, .burst = (double)burst};
    if (!burst)
        t->burst = t->rate / 10 > 1 ? t->rate / 10 : 1;
    t->level = t->burst;
    list_init(&t->sleepers);
}

static void refill(struct throttle *t, int64_t now) {
    if (t->last_ns)
        t->level += (double)(now - t->last_ns) / NS_PER_S * t->rate;
    if (t->level > t->burst)
        t->level = t->burst;
    t->last_ns = now;
}

void throttle_take_co(struct throttle *t, struct loop *loop, uint64_t units, const void *owner) {
    if (t->rate <= 0 || t->open || !units)
        return;
    refill(t, loop_now_ns(loop));
    t->level -= (double)units;
    if (t->level >= 0)
        return;
    struct sleeper s = {.task = task_self(), .owner = owner};
    list_push_back(&t->sleepers, &s.link);
    double left = -t->level / t->rate;
    while (left > 0 && !s.woken) {
        double piece = left < SLEEP_MAX_S ? left : SLEEP_MAX_S;
        loop_sleep_co((int64_t)(piece * NS_PER_S));
        left -= piece;
    }
    list_remove(&s.link);
}

void throttle_wake(struct throttle *t, const void *owner) {
    list_for_each(it, &t->sleepers) {
        struct sleeper *s = list_entry(it, struct sleeper, link);
        if (owner && s->owner != owner)
            continue;
        s->woken = true;
        loop_cancel_sleep(s->task);
    }
}

void throttle_open(struct throttle *t) {
    t->open = true;
    throttle_wake(t, NULL);
}
