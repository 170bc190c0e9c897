/* SPDX-License-Identifier: MIT */
/* Tasks and task locks: order of running, no lost wake, fairness, and the guard page. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>
#include "runtime/internal.h"
#include "runtime/loop.h"
#include "runtime/task.h"

static struct loop *loop;

static int setup(void **state) {
    return loop_new(LOOP_AUTO, &loop, NULL);
}
static int teardown(void **state) {
    loop_free(loop);
    return 0;
}

/* A short record of what happened in which order. */
static char trace[256];
static void mark(char c) {
    size_t n = strlen(trace);
    assert_true(n + 1 < sizeof(trace));
    trace[n] = c;
    trace[n + 1] = 0;
}
static void run_traced(task_fn *fn, void *arg) {
    trace[0] = 0;
    loop_run(loop, fn, arg);
}

/* ---- start ---- */

static void mark_task(void *arg) {
    mark(*(char *)arg);
}
static void spawn_waits_main(void *arg) {
    task_spawn(loop, mark_task, "a");
    task_spawn(loop, mark_task, "b");
    mark('1');
    task_yield_co();
    mark('2');
}
static void spawn_does_not_run_before_the_caller_suspends(void **state) {
    run_traced(spawn_waits_main, NULL);
    assert_string_equal(trace, "1ab2");
}

static void half_task(void *arg) {
    mark('(');
    task_yield_co();
    mark(')');
}
static void run_main(void *arg) {
    mark('1');
    task_run(loop, half_task, NULL);
    mark('2');
    task_yield_co();
    mark('3');
}
static void run_returns_at_the_first_suspension(void **state) {
    run_traced(run_main, NULL);
    assert_string_equal(trace, "1(2)3");
}

static int deepest;
static void nest_task(void *arg) {
    int depth = *(int *)arg + 1;
    if (depth > deepest)
        deepest = depth;
    if (depth < 40)
        task_run(loop, nest_task, &depth);
    /* Beyond the limit the child is only queued, so that what it points at must stay. */
    while (deepest < 40)
        task_yield_co();
}
static void run_nests_and_then_queues(void **state) {
    int zero = 0;
    deepest = 0;
    loop_run(loop, nest_task, &zero);
    assert_int_equal(deepest, 40);
}

static void self_main(void *arg) {
    struct task **out = arg;
    *out = task_self();
    assert_ptr_equal(loop_self(), loop);
}
static void self_is_null_outside_tasks(void **state) {
    struct task *t = NULL;
    assert_null(task_self());
    loop_run(loop, self_main, &t);
    assert_non_null(t);
    assert_null(task_self());
}

static unsigned counted;
static void count_task(void *arg) {
    volatile char page[8192]; /* more than a page of each stack is real */
    page[0] = 1;
    page[8191] = 1;
    task_yield_co();
    counted += (unsigned)page[0];
}
static void many_main(void *arg) {
    struct task_group g;
    task_group_init(&g);
    for (int i = 0; i < 5000; i++)
        task_group_spawn(&g, loop, count_task, NULL);
    task_group_wait_co(&g);
}
static void thousands_of_tasks_at_once(void **state) {
    counted = 0;
    loop_run(loop, many_main, NULL);
    assert_int_equal(counted, 5000);
}

/* The registers that a switch must keep: many live values across suspensions, floats among them. */
static void registers_task(void *arg) {
    long s = *(long *)arg, a = s * 3, b = s * 5, c = s * 7, d = s * 11, e = s * 13, f = s * 17;
    double x = (double)s * 0.5;
    for (int i = 0; i < 100; i++) {
        task_yield_co();
        a += s, b += a, c ^= b, d += c, e ^= d, f += e, x += 0.25;
    }
    long a2 = s * 3, b2 = s * 5, c2 = s * 7, d2 = s * 11, e2 = s * 13, f2 = s * 17;
    for (int i = 0; i < 100; i++)
        a2 += s, b2 += a2, c2 ^= b2, d2 += c2, e2 ^= d2, f2 += e2;
    assert_int_equal(f, f2);
    assert_true(x == (double)s * 0.5 + 25);
}
static void registers_main(void *arg) {
    long seeds[10];
    struct task_group g;
    task_group_init(&g);
    for (int i = 0; i < 10; i++) {
        seeds[i] = 1000 + i;
        task_group_spawn(&g, loop, registers_task, &seeds[i]);
    }
    task_group_wait_co(&g);
}
static void switching_keeps_registers(void **state) {
    loop_run(loop, registers_main, NULL);
}

/* ---- park and wake ---- */

static void early_wake_main(void *arg) {
    task_wake(task_self());
    task_park_co();
    mark('1');
}
static void a_wake_before_the_park_is_not_lost(void **state) {
    run_traced(early_wake_main, NULL);
    assert_string_equal(trace, "1");
}

struct ping {
    struct task *side[2];
    int turn, rounds;
};
static void ping_task(void *arg) {
    struct ping *p = arg;
    int me = p->side[0] ? 1 : 0;
    p->side[me] = task_self();
    while (p->rounds) {
        while (p->turn != me && p->rounds)
            task_park_co();
        if (p->rounds)
            p->rounds--;
        p->turn = !me;
        if (p->side[!me])
            task_wake(p->side[!me]);
    }
    p->side[me] = NULL; /* ended tasks cannot be woken */
}
static void ping_main(void *arg) {
    struct ping p = {.rounds = 10000};
    struct task_group g;
    task_group_init(&g);
    task_group_spawn(&g, loop, ping_task, &p);
    task_group_spawn(&g, loop, ping_task, &p);
    task_group_wait_co(&g);
    assert_int_equal(p.rounds, 0);
}
static void park_and_wake_alternate(void **state) {
    loop_run(loop, ping_main, NULL);
}

static void twice_task(void *arg) {
    *(struct task **)arg = task_self();
    task_park_co();
    mark('a');
    task_park_co();
    mark('b');
}
static void twice_main(void *arg) {
    struct task *t;
    task_run(loop, twice_task, &t);
    task_wake(t);
    task_wake(t);
    task_yield_co();
    mark('1');
    task_wake(t);
    task_yield_co();
}
static void two_wakes_of_one_park_count_once(void **state) {
    run_traced(twice_main, NULL);
    assert_string_equal(trace, "a1b");
}

/* ---- locks ---- */

static struct task_mutex mutex;
static void mutex_task(void *arg) {
    task_mutex_lock_co(&mutex);
    mark(*(char *)arg);
    task_yield_co();
    task_mutex_unlock(&mutex);
}
static void mutex_main(void *arg) {
    task_mutex_init(&mutex);
    task_mutex_lock_co(&mutex);
    assert_false(task_mutex_trylock(&mutex));
    struct task_group g;
    task_group_init(&g);
    for (const char *s = "abc"; *s; s++)
        task_group_spawn(&g, loop, mutex_task, (void *)s);
    task_yield_co();
    mark('1');
    task_mutex_unlock(&mutex);
    assert_false(task_mutex_trylock(&mutex)); /* handed over already */
    task_group_wait_co(&g);
    assert_null(mutex.owner);
}
static void mutex_is_first_come_first_served(void **state) {
    run_traced(mutex_main, NULL);
    assert_string_equal(trace, "1abc");
}

static struct task_rwlock rwlock;
static void reader_task(void *arg) {
    task_rwlock_rdlock_co(&rwlock);
    mark('r');
    task_yield_co();
    task_rwlock_unlock(&rwlock);
}
static void writer_task(void *arg) {
    task_rwlock_wrlock_co(&rwlock);
    assert_int_equal(rwlock.readers, 0);
    mark('w');
    task_yield_co();
    mark('.');
    task_rwlock_unlock(&rwlock);
}
static void rwlock_main(void *arg) {
    struct task_group g;
    task_group_init(&g);
    task_rwlock_init(&rwlock);
    task_rwlock_rdlock_co(&rwlock);
    task_group_spawn(&g, loop, reader_task, NULL); /* shares */
    task_group_spawn(&g, loop, writer_task, NULL); /* waits */
    task_group_spawn(&g, loop, reader_task, NULL); /* behind the writer */
    task_group_spawn(&g, loop, reader_task, NULL);
    task_yield_co();
    task_yield_co();
    mark('1');
    task_rwlock_unlock(&rwlock);
    task_group_wait_co(&g);
    assert_int_equal(rwlock.readers, 0);
    assert_false(rwlock.writer);
}
static void rwlock_does_not_starve_writers(void **state) {
    run_traced(rwlock_main, NULL);
    assert_string_equal(trace, "r1w.rr");
}

static struct task_sem sem;
static void sem_task(void *arg) {
    long units = *(const char *)arg - '0';
    task_sem_down_co(&sem, units);
    mark(*(const char *)arg);
}
static void sem_main(void *arg) {
    struct task_group g;
    task_group_init(&g);
    task_sem_init(&sem, 1);
    task_group_spawn(&g, loop, sem_task, "5");
    task_group_spawn(&g, loop, sem_task, "1"); /* would fit, but came later */
    task_yield_co();
    mark('a');
    task_sem_up(&sem, 3);
    task_yield_co();
    mark('b');
    task_sem_up(&sem, 2);
    task_group_wait_co(&g);
    assert_int_equal(sem.free, 0);
}
static void sem_does_not_starve_large_requests(void **state) {
    run_traced(sem_main, NULL);
    assert_string_equal(trace, "ab51");
}

static struct waitq queue;
static void waitq_task(void *arg) {
    if (arg)
        *(struct task **)arg = task_self();
    waitq_wait_co(&queue);
    mark('w');
}
static void waitq_main(void *arg) {
    struct task *t;
    waitq_init(&queue);
    assert_false(waitq_wake_one(&queue));
    task_run(loop, waitq_task, &t);
    task_run(loop, waitq_task, NULL);
    task_run(loop, waitq_task, NULL);
    task_wake(t); /* spurious: must not end the wait */
    task_yield_co();
    mark('1');
    assert_true(waitq_wake_one(&queue));
    task_yield_co();
    mark('2');
    waitq_wake_all(&queue);
    task_yield_co();
}
static void waitq_has_no_spurious_return(void **state) {
    run_traced(waitq_main, NULL);
    assert_string_equal(trace, "1w2ww");
}

static void empty_group_main(void *arg) {
    struct task_group g;
    task_group_init(&g);
    task_group_wait_co(&g);
}
static void an_empty_group_does_not_wait(void **state) {
    loop_run(loop, empty_group_main, NULL);
}

/* ---- stacks ---- */

static unsigned overflow(unsigned n) {
    volatile char frame[512];
    frame[0] = (char)n;
    return n == 1000000 ? 0 : overflow(n + 1) + (unsigned)frame[0];
}
static char *stack_top;
/* On its own stack: exit status 0 when the fault is in the guard below the task's stack. */
static void on_segv(int signo, siginfo_t *si, void *uc) {
    ptrdiff_t depth = stack_top - (char *)si->si_addr;
    bool guard = si->si_code == SEGV_ACCERR && depth > (ptrdiff_t)TASK_STACK_BYTES - 4096 &&
                 depth < (ptrdiff_t)(TASK_STACK_BYTES + TASK_GUARD_BYTES);
    _exit(guard ? 0 : 2);
}
static void overflow_main(void *arg) {
    stack_top = __builtin_frame_address(0); /* not a local: ASan may keep those elsewhere */
    *(volatile unsigned *)arg = overflow(0);
}
static void stack_overflow_hits_the_guard_page(void **state) {
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        static char other[64 * 1024];
        stack_t alt = {.ss_sp = other, .ss_size = sizeof(other)};
        struct sigaction act = {.sa_sigaction = on_segv, .sa_flags = SA_SIGINFO | SA_ONSTACK};
        struct loop *l;
        unsigned sum;
        sigaltstack(&alt, NULL);
        sigaction(SIGSEGV, &act, NULL);
        if (loop_new(LOOP_THREADS, &l, NULL) < 0)
            _exit(1);
        loop_run(l, overflow_main, &sum);
        _exit(3);
    }
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}

int main(void) {
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(spawn_does_not_run_before_the_caller_suspends),
        T(run_returns_at_the_first_suspension),
        T(run_nests_and_then_queues),
        T(self_is_null_outside_tasks),
        T(thousands_of_tasks_at_once),
        T(switching_keeps_registers),
        T(a_wake_before_the_park_is_not_lost),
        T(park_and_wake_alternate),
        T(two_wakes_of_one_park_count_once),
        T(mutex_is_first_come_first_served),
        T(rwlock_does_not_starve_writers),
        T(sem_does_not_starve_large_requests),
        T(waitq_has_no_spurious_return),
        T(an_empty_group_does_not_wait),
        cmocka_unit_test(stack_overflow_hits_the_guard_page),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
