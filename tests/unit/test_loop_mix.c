/* SPDX-License-Identifier: MIT */
/*
 * The loop under mixed load, under limits, and where io_uring is refused.
 *
 * The mix: tasks that do random things (sleep, yield, spawn, offload, file reads and writes that
 * are checked, socket round trips that are sometimes cancelled) at the same time.  The seed is
 * printed; STRATA_TEST_SEED repeats a run.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>
#include "base/err.h"
#include "runtime/loop.h"
#include "runtime/task.h"
#include "uring_filter.h"

#define US INT64_C(1000)
#define BLOCK 4096
#define TASKS 40
#define STEPS 60

static struct loop *loop;

struct mix {
    uint64_t seed;
    int fd;
    struct task_mutex mutex;
    struct task_sem sem;
    struct task_rwlock rwlock;
    unsigned inside, finished, cancelled;
};

struct actor {
    struct mix *mix;
    unsigned index;
    uint8_t fill; /* what this actor's block of the file holds */
};

static unsigned pick(struct mix *m, unsigned n) {
    m->seed ^= m->seed << 13;
    m->seed ^= m->seed >> 7;
    m->seed ^= m->seed << 17;
    return (unsigned)(m->seed % n);
}

static int add_one(void *arg) {
    return *(int *)arg + 1;
}

static void file_step(struct actor *a) {
    struct mix *m = a->mix;
    uint64_t at = (uint64_t)a->index * BLOCK;
    uint8_t *buf = malloc(BLOCK);
    struct iovec v = {buf, BLOCK};
    static const unsigned flags[] = {0, LOOP_BULK, LOOP_DSYNC, 0};
    if (pick(m, 2)) {
        memset(buf, ++a->fill, BLOCK);
        assert_int_equal(loop_pwritev_co(m->fd, &v, 1, at, flags[pick(m, 4)]), BLOCK);
        if (pick(m, 8) == 0)
            posix_fadvise(m->fd, (off_t)at, BLOCK, POSIX_FADV_DONTNEED);
    } else {
        ssize_t n = loop_preadv_co(m->fd, &v, 1, at, flags[pick(m, 2)]);
        assert_int_equal(n, BLOCK);
        for (int i = 0; i < BLOCK; i++)
            assert_int_equal(buf[i], a->fill);
    }
    free(buf);
}

struct reply {
    int fd;
    int64_t after;
};
static void reply_task(void *arg) {
    struct reply *r = arg;
    char c = 'r';
    struct iovec v = {&c, 1};
    struct msghdr msg = {.msg_iov = &v, .msg_iovlen = 1};
    loop_sleep_co(r->after);
    assert_int_equal(loop_sendmsg_co(r->fd, &msg, 0), 1);
}
struct cancel {
    int fd;
    int64_t after;
};
static void cancel_task(void *arg) {
    struct cancel *c = arg;
    loop_sleep_co(c->after);
    loop_cancel_fd(loop, c->fd);
}
static void socket_step(struct actor *a) {
    struct mix *m = a->mix;
    int p[2];
    char c = 0;
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, p), 0);
    struct reply r = {p[1], pick(m, 300) * US};
    struct cancel k = {p[0], pick(m, 300) * US};
    struct task_group g;
    task_group_init(&g);
    task_group_spawn(&g, loop, reply_task, &r);
    bool cancels = pick(m, 2);
    if (cancels)
        task_group_spawn(&g, loop, cancel_task, &k);
    int n = pick(m, 2) ? (int)loop_recv_co(p[0], &c, 1)
                       : loop_poll_co(p[0], POLLIN, pick(m, 2) ? -1 : pick(m, 300) * US);
    if (n == -ECANCELED)
        m->cancelled++;
    else
        assert_true(n >= 0); /* data, readiness or a timeout */
    assert_true(cancels || n != -ECANCELED);
    task_group_wait_co(&g);
    close(p[0]);
    close(p[1]);
}

static void lock_step(struct actor *a) {
    struct mix *m = a->mix;
    switch (pick(m, 3)) {
    case 0:
        task_mutex_lock_co(&m->mutex);
        assert_int_equal(m->inside++, 0);
        loop_sleep_co(pick(m, 3) * 10 * US);
        m->inside--;
        task_mutex_unlock(&m->mutex);
        break;
    case 1: {
        long units = 1 + pick(m, 4);
        task_sem_down_co(&m->sem, units);
        task_yield_co();
        task_sem_up(&m->sem, units);
        break;
    }
    case 2:
        if (pick(m, 2))
            task_rwlock_rdlock_co(&m->rwlock);
        else
            task_rwlock_wrlock_co(&m->rwlock);
        task_yield_co();
        task_rwlock_unlock(&m->rwlock);
        break;
    }
}

static void brief_task(void *arg) {
    if (arg)
        task_yield_co();
}

static void actor_task(void *arg) {
    struct actor *a = arg;
    struct mix *m = a->mix;
    for (int step = 0; step < STEPS; step++) {
        int v = step;
        switch (pick(m, 7)) {
        case 0:
            assert_int_equal(loop_sleep_co(pick(m, 500) * US), 0);
            break;
        case 1:
            task_run(loop, brief_task, pick(m, 2) ? a : NULL);
            break;
        case 2:
            v = pick(m, 2) ? offload_co(add_one, &v) : offload_blocking_co(add_one, &v);
            assert_int_equal(v, step + 1);
            break;
        case 3:
        case 4:
            file_step(a);
            break;
        case 5:
            socket_step(a);
            break;
        case 6:
            lock_step(a);
            break;
        }
    }
    m->finished++;
}

static void mix_main(void *arg) {
    struct mix *m = arg;
    struct actor a[TASKS];
    struct task_group g;
    task_group_init(&g);
    task_mutex_init(&m->mutex);
    task_sem_init(&m->sem, 5);
    task_rwlock_init(&m->rwlock);
    char name[] = "/var/tmp/strata-test-mix-XXXXXX";
    m->fd = mkostemp(name, O_CLOEXEC);
    assert_true(m->fd >= 0);
    unlink(name);
    assert_int_equal(loop_fallocate_co(m->fd, 0, 0, TASKS * BLOCK), 0);
    for (unsigned i = 0; i < TASKS; i++) {
        a[i] = (struct actor){m, i, 0};
        task_group_spawn(&g, loop, actor_task, &a[i]);
    }
    task_group_wait_co(&g);
    assert_int_equal(loop_fdatasync_co(m->fd), 0);
    close(m->fd);
    assert_int_equal(m->finished, TASKS);
    assert_int_equal(m->sem.free, 5);
}

static void mixed_load(enum loop_backend backend) {
    const char *env = getenv("STRATA_TEST_SEED");
    struct mix m = {.seed = env ? strtoull(env, NULL, 0) : (uint64_t)time(NULL) * 2654435761u + 1};
    print_message("# STRATA_TEST_SEED=%llu\n", (unsigned long long)m.seed);
    assert_int_equal(loop_new(backend, &loop, NULL), 0);
    loop_run(loop, mix_main, &m);
    loop_free(loop);
}
static void mixed_load_on_uring(void **state) {
    mixed_load(LOOP_URING);
}
static void mixed_load_on_threads(void **state) {
    mixed_load(LOOP_THREADS);
}

/* ---- tasks from the loop's own context ---- */

struct handed {
    struct task *waiter;
    bool ran, ended;
};
static void handed_task(void *arg) {
    struct handed *h = arg;
    h->ran = true;
    task_yield_co();
    h->ended = true;
    task_wake(h->waiter);
}
static void handed_post(void *arg) {
    struct handed *h = arg;
    task_run(loop, handed_task, h);
    assert_true(h->ran && !h->ended);
}
static void handed_main(void *arg) {
    struct handed h = {.waiter = task_self()};
    loop_post(loop, handed_post, &h);
    while (!h.ended)
        task_park_co();
}
static void a_post_can_run_a_task(void **state) {
    assert_int_equal(loop_new(LOOP_AUTO, &loop, NULL), 0);
    loop_run(loop, handed_main, NULL);
    loop_free(loop);
}

static void set_flag(void *arg) {
    *(bool *)arg = true;
}
static void posts_left_over_run_at_the_end(void **state) {
    bool flag = false;
    assert_int_equal(loop_new(LOOP_AUTO, &loop, NULL), 0);
    loop_post(loop, set_flag, &flag);
    loop_free(loop);
    assert_true(flag);
}

/* ---- children with less ---- */

/* Runs fn in a child; passes when it returns true. */
static void in_child(bool (*fn)(void)) {
    fflush(NULL);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0)
        _exit(fn() ? 0 : 1);
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}

static bool refuse_io_uring(void) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog prog = {sizeof(code) / sizeof(code[0]), code};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
           prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog) == 0;
}

static bool auto_under_refusal(void) {
    struct mix m = {.seed = 1};
    unsetenv("STRATA_AIO");
    if (!refuse_io_uring() || loop_new(LOOP_AUTO, &loop, NULL) < 0)
        return false;
    loop_run(loop, mix_main, &m);
    bool ok = !strcmp(loop_backend_name(loop), "threads");
    loop_free(loop);
    return ok;
}
static void auto_takes_threads_where_io_uring_is_refused(void **state) {
    in_child(auto_under_refusal);
}

static bool uring_under_refusal(void) {
    struct err e AUTO_ERR = ERR_INIT;
    setenv("STRATA_AIO", "uring", 1);
    return refuse_io_uring() && loop_new(LOOP_AUTO, &loop, &e) == -EPERM &&
           loop_new(LOOP_URING, &loop, NULL) == -EPERM && strstr(err_text(&e), "io_uring") &&
           e.hint && !loop_self();
}
static void asking_for_a_refused_io_uring_is_an_error(void **state) {
    in_child(uring_under_refusal);
}

static void wide_task(void *arg) {
    offload_blocking_co(add_one, arg);
    loop_sleep_co(1000 * US);
}
static void wide_main(void *arg) {
    int v = 0;
    struct task_group g;
    task_group_init(&g);
    for (int i = 0; i < 2000; i++)
        task_group_spawn(&g, loop, wide_task, &v);
    task_group_wait_co(&g);
}
static bool small_address_space(void) {
    static const enum loop_backend backends[] = {LOOP_URING, LOOP_THREADS};
    struct rlimit one_gib = {1 << 30, 1 << 30};
#ifndef __SANITIZE_ADDRESS__ /* whose shadow alone is terabytes */
    setrlimit(RLIMIT_AS, &one_gib);
#endif
    for (int i = 0; i < 2; i++) {
        if (backends[i] == LOOP_URING && uring_refused())
            continue;
        if (loop_new(backends[i], &loop, NULL) < 0)
            return false;
        loop_run(loop, wide_main, NULL);
        loop_free(loop);
    }
    (void)one_gib;
    return true;
}
static void a_gibibyte_of_address_space_is_enough(void **state) {
    in_child(small_address_space);
}

static int on_first_thread(void *arg) {
    return gettid() == getpid();
}
static void without_threads_main(void *arg) {
    *(bool *)arg = offload_co(on_first_thread, NULL) && offload_blocking_co(on_first_thread, NULL);
}
static bool no_threads(void) {
    bool ran_here = false;
    struct rlimit none = {0, 0};
    if (loop_new(LOOP_THREADS, &loop, NULL) < 0)
        return false;
    /* Root is exempt from the limit on processes, so become somebody. */
    if (geteuid() == 0 && setresuid(65534, 65534, 65534) < 0)
        return false;
    setrlimit(RLIMIT_NPROC, &none);
    loop_run(loop, without_threads_main, &ran_here);
    loop_free(loop);
    return ran_here;
}
static void offload_works_without_any_thread(void **state) {
    in_child(no_threads);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        URING_TEST(mixed_load_on_uring),
        cmocka_unit_test(mixed_load_on_threads),
        cmocka_unit_test(a_post_can_run_a_task),
        cmocka_unit_test(posts_left_over_run_at_the_end),
        cmocka_unit_test(auto_takes_threads_where_io_uring_is_refused),
        cmocka_unit_test(asking_for_a_refused_io_uring_is_an_error),
        cmocka_unit_test(a_gibibyte_of_address_space_is_enough),
        cmocka_unit_test(offload_works_without_any_thread),
    };
    leave_out_refused_uring();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
