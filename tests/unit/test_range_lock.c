/* SPDX-License-Identifier: MIT */
/* Range locks: who may hold what at once, and in which order waiters come in. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "base/err.h"
#include "disk/range_lock.h"
#include "runtime/loop.h"

static struct range_lock lock;
static char events[64];
static struct task_group group;

static void note(char c) {
    size_t n = strlen(events);
    events[n] = c;
    events[n + 1] = 0;
}

struct holder {
    char name; /* noted in lower case when granted, in upper case when released */
    uint64_t offset, length;
    bool exclusive;
    unsigned turns; /* of the loop that it keeps the lock */
};

static void hold(void *arg) {
    struct holder *h = arg;
    struct range_req r;
    range_lock_co(&lock, &r, h->offset, h->length, h->exclusive);
    note(h->name);
    for (unsigned i = 0; i < h->turns; i++)
        task_yield_co();
    note(h->name - 'a' + 'A');
    range_unlock(&lock, &r);
}

struct scene {
    struct holder *h;
    int n;
};

static void play(void *arg) {
    struct scene *s = arg;
    task_group_init(&group);
    range_lock_init(&lock);
    events[0] = 0;
    for (int i = 0; i < s->n; i++) {
        task_group_spawn(&group, loop_self(), hold, &s->h[i]);
        task_yield_co();
    }
    task_group_wait_co(&group);
    assert_true(range_lock_idle(&lock));
}

static const char *scene(struct holder *h, int n) {
    struct scene s = {h, n};
    struct loop *l;
    assert_int_equal(loop_new(LOOP_AUTO, &l, NULL), 0);
    loop_run(l, play, &s);
    loop_free(l);
    return events;
}

static void shared_ranges_overlap_freely(void **state) {
    struct holder h[] = {{'a', 0, 10, false, 3}, {'b', 5, 10, false, 3}};
    assert_string_equal(scene(h, 2), "abAB");
}

static void exclusive_keeps_overlapping_shared_out(void **state) {
    struct holder h[] = {{'a', 0, 10, true, 3}, {'b', 9, 1, false, 1}};
    assert_string_equal(scene(h, 2), "aAbB");
}

static void ranges_that_only_touch_do_not_conflict(void **state) {
    struct holder h[] = {{'a', 0, 10, true, 3}, {'b', 10, 1, true, 1}};
    assert_string_equal(scene(h, 2), "abBA");
}

static void shared_waits_behind_a_waiting_exclusive(void **state) {
    struct holder h[] = {{'a', 0, 10, false, 6}, {'b', 0, 10, true, 1}, {'c', 0, 10, false, 1}};
    assert_string_equal(scene(h, 3), "aAbBcC");
}

static void unrelated_requests_pass_a_waiting_one(void **state) {
    struct holder h[] = {{'a', 0, 10, false, 8}, {'b', 0, 10, true, 1}, {'c', 20, 10, true, 1}};
    assert_string_equal(scene(h, 3), "acCAbB");
}

/* b waits for a; c overlaps b but nothing that is granted. */
static void an_exclusive_overtakes_a_waiting_one(void **state) {
    struct holder h[] = {{'a', 0, 10, true, 8}, {'b', 5, 10, true, 1}, {'c', 12, 5, true, 1}};
    assert_string_equal(scene(h, 3), "acCAbB");
}

static void a_shared_does_not_overtake_a_waiting_exclusive(void **state) {
    struct holder h[] = {{'a', 0, 10, true, 6}, {'b', 5, 10, true, 1}, {'c', 12, 5, false, 1}};
    assert_string_equal(scene(h, 3), "aAbBcC");
}

static void overtaking_has_an_end(void **state) {
    struct holder h[RANGE_OVERTAKEN_MAX + 3] = {{'a', 0, 10, true, 60}, {'b', 5, 10, true, 1}};
    for (int i = 0; i <= RANGE_OVERTAKEN_MAX; i++)
        h[2 + i] = (struct holder){'c', 12, 5, true, 0};
    const char *seen = scene(h, RANGE_OVERTAKEN_MAX + 3);
    /* All but the last pass b, which then comes first. */
    assert_int_equal(strspn(seen + 1, "cC"), 2 * RANGE_OVERTAKEN_MAX);
    assert_string_equal(seen + 1 + 2 * RANGE_OVERTAKEN_MAX, "AbBcC");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(shared_ranges_overlap_freely),
        cmocka_unit_test(exclusive_keeps_overlapping_shared_out),
        cmocka_unit_test(ranges_that_only_touch_do_not_conflict),
        cmocka_unit_test(shared_waits_behind_a_waiting_exclusive),
        cmocka_unit_test(unrelated_requests_pass_a_waiting_one),
        cmocka_unit_test(an_exclusive_overtakes_a_waiting_one),
        cmocka_unit_test(a_shared_does_not_overtake_a_waiting_exclusive),
        cmocka_unit_test(overtaking_has_an_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
