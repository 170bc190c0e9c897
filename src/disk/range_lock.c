/* SPDX-License-Identifier: MIT */
/*
 * Range locks over three plain lists; see range_lock.h for the rule.
 *
 * Invariants
 *  1. No granted exclusive request overlaps any other granted one.
 *  2. `waiting` is in order of arrival, and a waiter is granted as soon as nothing granted
 * conflicts with it, nor anything that waits before it, but for what it may overtake.
 */
#include "disk/range_lock.h"

#include <assert.h>

#include "base/ck.h"

void range_lock_init(struct range_lock *l) {
    list_init(&l->shared);
    list_init(&l->exclusive);
    list_init(&l->waiting);
}

static bool conflict(const struct range_req *a, const struct range_req *b) {
    return (a->exclusive || b->exclusive) &&
           ranges_overlap(a->offset, a->length, b->offset, b->length);
}

static bool conflicts_with_granted(const struct list *head, const struct range_req *r) {
    list_for_each(it, head) if (conflict(list_entry(it, struct range_req, link), r)) return true;
    return false;
}

static bool may_overtake(const struct range_req *w, const struct range_req *r) {
    return w->exclusive && r->exclusive && w->overtaken < RANGE_OVERTAKEN_MAX;
}

/* Only those before r in `waiting` count. */
static bool conflicts_with_waiting(const struct list *head, const struct range_req *r) {
    list_for_each(it, head) {
        const struct range_req *w = list_entry(it, struct range_req, link);
        if (w == r)
            return false;
        if (conflict(w, r) && !may_overtake(w, r))
            return true;
    }
    return false;
}

static bool may_grant(const struct range_lock *l, const struct range_req *r) {
    return !conflicts_with_granted(&l->exclusive, r) && !conflicts_with_waiting(&l->waiting, r) &&
           (!r->exclusive || !conflicts_with_granted(&l->shared, r));
}

/* `r` is still in `waiting`, or was never there. */
static void grant(struct range_lock *l, struct range_req *r) {
    list_for_each(it, &l->waiting) {
        struct range_req *w = list_entry(it, struct range_req, link);
        if (w == r)
            break;
        w->overtaken += conflict(w, r);
    }
    r->granted = true;
    if (r->task)
        list_remove(&r->link);
    list_push_front(r->exclusive ? &l->exclusive : &l->shared, &r->link);
}

void range_lock_co(struct range_lock *l, struct range_req *r, uint64_t offset, uint64_t length,
                   bool exclusive) {
    *r = (struct range_req){.offset = offset, .length = length, .exclusive = exclusive};
    if (may_grant(l, r)) {
        grant(l, r);
        return;
    }
    r->task = task_self();
    list_push_back(&l->waiting, &r->link);
    while (!r->granted)
        task_park_co();
}

void range_unlock(struct range_lock *l, struct range_req *r) {
    assert(r->granted);
    list_remove(&r->link);
    list_for_each_safe(it, next, &l->waiting) {
        struct range_req *w = list_entry(it, struct range_req, link);
        if (!may_grant(l, w))
            continue;
        grant(l, w);
        task_wake(w->task);
    }
}

bool range_lock_idle(const struct range_lock *l) {
    return list_empty(&l->shared) && list_empty(&l->exclusive) && list_empty(&l->waiting);
}
