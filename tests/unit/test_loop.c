/* SPDX-License-Identifier: MIT */
/*
 * The loop on both back ends: timers, posts, signals, offload, fairness, choosing.  A machine that
 * refuses io_uring fails the "uring:" half, by name.
 */
#include "loop_fixture.h"
#include "uring_filter.h"

/* ---- life ---- */

static void name_says_the_backend(void **state) {
    assert_string_equal(loop_backend_name(loop), backend == LOOP_URING ? "uring" : "threads");
}

/* ---- timers ---- */

static char order[32];
struct sleeper {
    int64_t ns;
    char name;
    struct task *task;
    int result;
};
static void sleep_task(void *arg) {
    struct sleeper *s = arg;
    s->task = task_self();
    s->result = loop_sleep_co(s->ns);
    s->task = NULL;
    order[strlen(order)] = s->name;
}
static void timers_main(void *arg) {
    struct sleeper s[] = {{30 * MS, 'd'}, {10 * MS, 'b'}, {0, 'a'}, {20 * MS, 'c'}};
    struct task_group g;
    task_group_init(&g);
    memset(order, 0, sizeof(order));
    int64_t start = clock_ns(CLOCK_MONOTONIC);
    for (int i = 0; i < 4; i++)
        task_group_spawn(&g, loop, sleep_task, &s[i]);
    task_group_wait_co(&g);
    int64_t took = clock_ns(CLOCK_MONOTONIC) - start;
    assert_string_equal(order, "abcd");
    assert_true(took >= 30 * MS && took < 500 * MS);
}
static void timers_fire_in_order(void **state) {
    run(timers_main, NULL);
}

static void cancel_sleep_main(void *arg) {
    struct sleeper s = {INT64_MAX, 'x'};
    task_run(loop, sleep_task, &s);
    loop_cancel_sleep(s.task);
    loop_cancel_sleep(s.task);
    loop_cancel_sleep(task_self()); /* not asleep: nothing happens */
    task_yield_co();
    assert_int_equal(s.result, -ECANCELED);
    assert_null(s.task);
}
static void a_sleep_can_be_cancelled(void **state) {
    run(cancel_sleep_main, NULL);
}

struct crowd {
    unsigned awake;
    int64_t seed;
};
static void crowd_task(void *arg) {
    struct crowd *c = arg;
    c->seed = (c->seed * 1103515245 + 12345) & 0x7fffffff;
    int64_t ns = c->seed % (20 * MS);
    int64_t until = clock_ns(CLOCK_MONOTONIC) + ns;
    assert_int_equal(loop_sleep_co(ns), 0);
    assert_true(clock_ns(CLOCK_MONOTONIC) >= until);
    c->awake++;
}
static void crowd_main(void *arg) {
    struct crowd c = {.seed = 1};
    struct task_group g;
    task_group_init(&g);
    for (int i = 0; i < 10000; i++)
        task_group_spawn(&g, loop, crowd_task, &c);
    task_group_wait_co(&g);
    assert_int_equal(c.awake, 10000);
}
static void ten_thousand_sleeps_at_once(void **state) {
    run(crowd_main, NULL);
}

static void idle_main(void *arg) {
    char c;
    make_pair();
    assert_int_equal(loop_poll_co(pair[0], POLLIN, 1 * MS), 0); /* the back end is up */
    int64_t cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    loop_sleep_co(300 * MS);
    cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    assert_true(cpu < 20 * MS);
    assert_int_equal(recv(pair[0], &c, 1, 0), -1);
    close(pair[0]);
    close(pair[1]);
}
static void an_idle_loop_uses_no_processor(void **state) {
    run(idle_main, NULL);
}

/* ---- posts and signals ---- */

enum { POSTERS = 4, POSTS = 2000 };
struct poster {
    pthread_t thread;
    unsigned sent, seen;
    struct task *waiter;
};
struct posted {
    struct poster *from;
    unsigned number;
};
static void post_arrives(void *arg) {
    struct posted *p = arg;
    assert_null(task_self());
    assert_int_equal(p->number, p->from->seen); /* first in, first out for each thread */
    if (++p->from->seen == POSTS)
        task_wake(p->from->waiter);
    free(p);
}
static void *poster_main(void *arg) {
    struct poster *p = arg;
    for (unsigned i = 0; i < POSTS; i++) {
        struct posted *m = malloc(sizeof(*m));
        *m = (struct posted){p, i};
        loop_post(loop, post_arrives, m);
        if (i % 64 == 0)
            usleep(200); /* so that the loop falls asleep in between */
    }
    return NULL;
}
static void posts_main(void *arg) {
    struct poster p[POSTERS];
    for (int i = 0; i < POSTERS; i++) {
        p[i] = (struct poster){.waiter = task_self()};
        assert_int_equal(pthread_create(&p[i].thread, NULL, poster_main, &p[i]), 0);
    }
    for (int i = 0; i < POSTERS; i++) {
        while (p[i].seen < POSTS)
            task_park_co();
        pthread_join(p[i].thread, NULL);
    }
}
static void posts_from_threads_keep_their_order(void **state) {
    run(posts_main, NULL);
}
static void posts_wake_a_started_backend(void **state) {
    loop_backend_name(loop);
    struct waiting w = {POLLIN, 99};
    make_pair();
    task_run(loop, poll_task, &w); /* starts it */
    run(posts_main, NULL);
    assert_int_equal(w.got, 99);
    close(pair[1]); /* hangs up: the task ends */
    run(idle_main, NULL);
    assert_true(w.got & POLLHUP);
}

struct signalled {
    struct task *waiter;
    int seen[2];
};
static void on_signal(void *arg, int signo) {
    struct signalled *s = arg;
    assert_null(task_self());
    s->seen[signo == SIGUSR2]++;
    task_wake(s->waiter);
}
static void signals_main(void *arg) {
    struct signalled s = {.waiter = task_self()};
    assert_int_equal(loop_on_signal(loop, SIGUSR1, on_signal, &s), 0);
    assert_int_equal(loop_on_signal(loop, SIGUSR2, on_signal, &s), 0);
    assert_int_equal(loop_on_signal(loop, SIGUSR1, on_signal, &s), -EBUSY);
    assert_int_equal(loop_on_signal(loop, SIGKILL, on_signal, &s), -EINVAL);
    for (int i = 1; i <= 3; i++) {
        kill(getpid(), SIGUSR1);
        while (s.seen[0] < i)
            task_park_co();
        kill(getpid(), SIGUSR2);
        while (s.seen[1] < i)
            task_park_co();
        loop_sleep_co(1 * MS);
        if (i == 1) { /* from here on with the back end running */
            make_pair();
            assert_int_equal(loop_poll_co(pair[0], POLLIN, 1 * MS), 0);
            close(pair[0]);
            close(pair[1]);
        }
    }
    loop_off_signal(loop, SIGUSR1);
    sigset_t now;
    pthread_sigmask(SIG_BLOCK, NULL, &now);
    assert_false(sigismember(&now, SIGUSR1));
    assert_true(sigismember(&now, SIGUSR2));
    assert_int_equal(s.seen[0], 3);
    assert_int_equal(s.seen[1], 3);
}
static void signals_reach_their_handlers(void **state) {
    run(signals_main, NULL);
}

/* ---- offload ---- */

static int square(void *arg) {
    int v = *(int *)arg;
    return v * v;
}
static void square_task(void *arg) {
    int *v = arg;
    *v = *v % 2 ? offload_co(square, v) : offload_blocking_co(square, v);
}
static void offload_main(void *arg) {
    int v[500];
    struct task_group g;
    task_group_init(&g);
    for (int i = 0; i < 500; i++) {
        v[i] = i;
        task_group_spawn(&g, loop, square_task, &v[i]);
    }
    task_group_wait_co(&g);
    for (int i = 0; i < 500; i++)
        assert_int_equal(v[i], i * i);
}
static void offload_returns_results(void **state) {
    run(offload_main, NULL);
    assert_in_range(offload_width(), 2, 64);
}

static int nap(void *arg) {
    sigset_t now;
    pthread_sigmask(SIG_BLOCK, NULL, &now);
    usleep(20000);
    return sigismember(&now, SIGTERM) && sigismember(&now, SIGINT) ? 0 : -1;
}
static void nap_task(void *arg) {
    *(int *)arg += offload_blocking_co(nap, NULL) == 0;
}
static void naps_main(void *arg) {
    int good = 0;
    struct task_group g;
    task_group_init(&g);
    int64_t start = clock_ns(CLOCK_MONOTONIC);
    for (int i = 0; i < 40; i++)
        task_group_spawn(&g, loop, nap_task, &good);
    task_group_wait_co(&g);
    assert_int_equal(good, 40);
    assert_true(clock_ns(CLOCK_MONOTONIC) - start < 400 * MS); /* one by one: 800 */
}
static void blocking_work_runs_side_by_side(void **state) {
    run(naps_main, NULL);
}

static void threads_end_with_the_last_loop(void **state) {
    loop_free(loop);
    unsigned before = threads_now();
    assert_int_equal(loop_new(backend, &loop, NULL), 0);
    run(naps_main, NULL);
    run(offload_main, NULL);
    assert_true(threads_now() > before);
    loop_free(loop);
    assert_int_equal(threads_now(), before);
    assert_int_equal(loop_new(backend, &loop, NULL), 0);
}

struct second {
    pthread_t thread;
    enum loop_backend backend;
};
static void *second_main(void *arg) {
    struct second *s = arg;
    struct loop *l;
    assert_int_equal(loop_new(s->backend, &l, NULL), 0);
    for (int i = 0; i < 20; i++) {
        int v = i;
        loop_run(l, square_task, &v);
        assert_int_equal(v, i * i);
    }
    loop_free(l);
    return NULL;
}
static void several_loops_share_the_pool(void **state) {
    struct second s[4];
    for (int i = 0; i < 4; i++) {
        s[i].backend = backend;
        assert_int_equal(pthread_create(&s[i].thread, NULL, second_main, &s[i]), 0);
    }
    run(offload_main, NULL);
    for (int i = 0; i < 4; i++)
        pthread_join(s[i].thread, NULL);
}

/* ---- fairness ---- */

static void greedy_task(void *arg) {
    int fd = temp_file(0);
    char c = 'x';
    struct iovec v = {&c, 1};
    bool *stop = arg;
    assert_int_equal(loop_pwritev_co(fd, &v, 1, 0, 0), 1);
    while (!*stop)
        assert_int_equal(loop_preadv_co(fd, &v, 1, 0, 0), 1);
    close(fd);
}
static void greedy_main(void *arg) {
    bool stop = false;
    struct task_group g;
    task_group_init(&g);
    task_group_spawn(&g, loop, greedy_task, &stop);
    loop_sleep_co(5 * MS);
    stop = true;
    task_group_wait_co(&g);
}
static void work_done_in_place_does_not_starve_timers(void **state) {
    run(greedy_main, NULL);
}

static void yield_main(void *arg) {
    struct waiting w = {POLLIN, 99};
    make_pair();
    task_run(loop, poll_task, &w);
    task_yield_co(); /* submits */
    assert_int_equal(send_all(pair[1], "x", 1), 1);
    task_yield_co(); /* sees the completion, queues the task behind us */
    task_yield_co();
    assert_int_equal(w.got, POLLIN);
    close(pair[0]);
    close(pair[1]);
}
static void a_yield_lets_completions_in(void **state) {
    run(yield_main, NULL);
}

/* ---- choosing ---- */

static void the_environment_chooses(void **state) {
    struct loop *l;
    struct err e AUTO_ERR = ERR_INIT;
    setenv("STRATA_AIO", "threads", 1);
    assert_int_equal(loop_new(LOOP_AUTO, &l, NULL), 0);
    assert_string_equal(loop_backend_name(l), "threads");
    loop_free(l);
    setenv("STRATA_AIO", "fibers", 1);
    assert_int_equal(loop_new(LOOP_AUTO, &l, &e), -EINVAL);
    assert_non_null(strstr(err_text(&e), "fibers"));
    unsetenv("STRATA_AIO");
}

static void the_environment_can_insist(void **state) {
    struct loop *l;
    setenv("STRATA_AIO", "uring", 1);
    assert_int_equal(loop_new(LOOP_AUTO, &l, NULL), 0);
    assert_string_equal(loop_backend_name(l), "uring");
    loop_free(l);
    unsetenv("STRATA_AIO");
}

static void warm_main(void *arg) {
    int fd = temp_file(0);
    char buf[4096] = "warm";
    struct iovec v = {buf, sizeof(buf)};
    assert_int_equal(loop_pwritev_co(fd, &v, 1, 0, 0), 4096);
    assert_int_equal(loop_preadv_co(fd, &v, 1, 0, 0), 4096);
    assert_int_equal(loop_preadv_co(fd, &v, 1, 4096, 0), 0);
    int next = dup(fd); /* the lowest free number: no ring or epoll has been opened since */
    *(int *)arg = next - fd;
    close(next);
    close(fd);
}
static void nothing_starts_before_it_is_needed(void **state) {
    struct loop *l;
    unsetenv("STRATA_AIO");
    assert_int_equal(loop_new(LOOP_AUTO, &l, NULL), 0);
    unsigned threads = threads_now();
    int distance = 0;
    loop_run(l, warm_main, &distance);
    assert_int_equal(distance, 1);
    assert_int_equal(threads_now(), threads);
    loop_free(l);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        T(name_says_the_backend),
        T(timers_fire_in_order),
        T(a_sleep_can_be_cancelled),
        T(ten_thousand_sleeps_at_once),
        T(an_idle_loop_uses_no_processor),
        T(posts_from_threads_keep_their_order),
        T(posts_wake_a_started_backend),
        T(signals_reach_their_handlers),
        T(offload_returns_results),
        T(blocking_work_runs_side_by_side),
        T(threads_end_with_the_last_loop),
        T(several_loops_share_the_pool),
        T(work_done_in_place_does_not_starve_timers),
        T(a_yield_lets_completions_in),
        cmocka_unit_test(the_environment_chooses),
        URING_TEST(the_environment_can_insist),
        cmocka_unit_test(nothing_starts_before_it_is_needed),
    };
    leave_out_refused_uring();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
