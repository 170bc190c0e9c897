/* SPDX-License-Identifier: MIT */
/*
 * The loop on both back ends: every test runs once with io_uring and once with threads.  A machine
 * that refuses io_uring fails the first half, by name.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>
#include "base/err.h"
#include "runtime/loop.h"
#include "runtime/task.h"

#define MS INT64_C(1000000)

static struct loop *loop;
static enum loop_backend backend;

static int setup(void **state) {
    struct err e AUTO_ERR = ERR_INIT;
    backend = *(enum loop_backend *)*state;
    if (loop_new(backend, &loop, &e) < 0) {
        print_error("%s\n", err_text(&e));
        return -1;
    }
    return 0;
}
static int teardown(void **state) {
    loop_free(loop);
    loop = NULL;
    return 0;
}
static void run(task_fn *fn, void *arg) {
    loop_run(loop, fn, arg);
}
static int64_t clock_ns(clockid_t id) {
    struct timespec ts;
    clock_gettime(id, &ts);
    return ts.tv_sec * INT64_C(1000000000) + ts.tv_nsec;
}
static int temp_file(int flags) {
    const char *dir = getenv("TMPDIR");
    char name[512];
    snprintf(name, sizeof(name), "%s/strata-test-loop-XXXXXX", dir ? dir : "/var/tmp");
    int fd = mkostemp(name, flags | O_CLOEXEC);
    assert_true(fd >= 0);
    unlink(name);
    return fd;
}
static unsigned threads_now(void) {
    char line[128];
    unsigned n = 0;
    FILE *f = fopen("/proc/self/status", "r");
    while (fgets(line, sizeof(line), f))
        if (sscanf(line, "Threads: %u", &n) == 1)
            break;
    fclose(f);
    return n;
}

/* ---- life ---- */

static void name_says_the_backend(void **state) {
    assert_string_equal(loop_backend_name(loop), backend == LOOP_URING ? "uring" : "threads");
}

/* ---- files ---- */

static void file_main(void *arg) {
    int fd = temp_file(0);
    char a[1000], b[3000], back[6000];
    memset(a, 'a', sizeof(a));
    memset(b, 'b', sizeof(b));
    unsigned flags = *(unsigned *)arg;
    struct iovec w[2] = {{a, sizeof(a)}, {b, sizeof(b)}};
    assert_int_equal(loop_pwritev_co(fd, w, 2, 500, flags), 4000);
    assert_int_equal(loop_fdatasync_co(fd), 0);
    struct iovec r[2] = {{back, 2500}, {back + 2500, 3500}};
    flags &= LOOP_BULK;
    assert_int_equal(loop_preadv_co(fd, r, 2, 0, flags), 4500); /* short: the end of the file */
    for (int i = 0; i < 4500; i++)
        assert_int_equal(back[i], i < 500 ? 0 : i < 1500 ? 'a' : 'b');
    assert_int_equal(loop_preadv_co(fd, r, 1, 4500, flags), 0);
    assert_int_equal(loop_preadv_co(fd, r, 1, 1 << 30, flags), 0);
    close(fd);
    assert_int_equal(loop_preadv_co(fd, r, 1, 0, flags), -EBADF);
    assert_int_equal(loop_pwritev_co(fd, r, 1, 0, flags), -EBADF);
    assert_int_equal(loop_fdatasync_co(fd), -EBADF);
}
static void file_write_then_read(void **state) {
    unsigned flags = 0;
    run(file_main, &flags);
}
static void file_bulk_write_then_read(void **state) {
    unsigned flags = LOOP_BULK;
    run(file_main, &flags);
}
static void file_dsync_write_then_read(void **state) {
    unsigned flags = LOOP_DSYNC;
    run(file_main, &flags);
}

static void direct_main(void *arg) {
    int fd = temp_file(O_DIRECT);
    char *buf = NULL;
    assert_int_equal(posix_memalign((void **)&buf, 4096, 65536), 0);
    memset(buf, 'd', 65536);
    struct iovec v = {buf, 65536};
    assert_int_equal(loop_pwritev_co(fd, &v, 1, 0, 0), 65536);
    memset(buf, 0, 65536);
    assert_int_equal(loop_preadv_co(fd, &v, 1, 0, 0), 65536);
    for (int i = 0; i < 65536; i++)
        assert_int_equal(buf[i], 'd');
    free(buf);
    close(fd);
}
static void file_direct_write_then_read(void **state) {
    run(direct_main, NULL);
}

static void offset_main(void *arg) {
    int fd = temp_file(0);
    char c = 0;
    struct iovec v = {&c, 1};
    assert_int_equal(loop_preadv_co(fd, &v, 1, UINT64_MAX, 0), -EINVAL);
    assert_int_equal(loop_pwritev_co(fd, &v, 1, UINT64_MAX, 0), -EINVAL);
    assert_int_equal(loop_pwritev_co(fd, &v, 1, UINT64_MAX, LOOP_BULK), -EINVAL);
    assert_int_equal(loop_fallocate_co(fd, 0, UINT64_MAX, 1), -EINVAL);
    close(fd);
}
static void file_offset_beyond_63_bits_is_refused(void **state) {
    run(offset_main, NULL);
}

static void fallocate_main(void *arg) {
    int fd = temp_file(0);
    struct stat st;
    assert_int_equal(loop_fallocate_co(fd, 0, 0, 1 << 20), 0);
    fstat(fd, &st);
    assert_int_equal(st.st_size, 1 << 20);
    assert_int_equal(loop_fallocate_co(fd, FALLOC_FL_KEEP_SIZE, 1 << 20, 4096), 0);
    fstat(fd, &st);
    assert_int_equal(st.st_size, 1 << 20);
    assert_int_equal(loop_fallocate_co(fd, 0, 0, 0), -EINVAL);
    close(fd);
}
static void file_fallocate(void **state) {
    run(fallocate_main, NULL);
}

/* More at once than the ring has entries, all of them cold. */
struct cold {
    int fd;
    unsigned block, good;
};
static void cold_task(void *arg) {
    struct cold *c = arg;
    uint64_t block = c->block++, got[512];
    struct iovec v = {got, 4096};
    assert_int_equal(loop_preadv_co(c->fd, &v, 1, block * 4096, 0), 4096);
    c->good += got[0] == block && got[511] == block;
}
static void cold_main(void *arg) {
    enum { BLOCKS = 1000 };
    struct cold c = {.fd = temp_file(0)};
    uint64_t buf[512];
    for (uint64_t b = 0; b < BLOCKS; b++) {
        for (int i = 0; i < 512; i++)
            buf[i] = b;
        assert_int_equal(pwrite(c.fd, buf, 4096, (off_t)(b * 4096)), 4096);
    }
    fdatasync(c.fd);
    posix_fadvise(c.fd, 0, 0, POSIX_FADV_DONTNEED);
    struct task_group g;
    task_group_init(&g);
    for (int i = 0; i < BLOCKS; i++)
        task_group_spawn(&g, loop, cold_task, &c);
    task_group_wait_co(&g);
    assert_int_equal(c.good, BLOCKS);
    close(c.fd);
}
static void file_many_cold_reads_at_once(void **state) {
    run(cold_main, NULL);
}

/* ---- sockets ---- */

#define ECHO_BYTES (1 << 20)
static int pair[2];
static void make_pair(void) {
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair), 0);
}
static ssize_t send_all(int fd, const char *p, size_t len) {
    size_t done = 0;
    while (done < len) {
        struct iovec v = {(char *)p + done, len - done};
        struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
        ssize_t r = loop_sendmsg_co(fd, &m, 0);
        if (r < 0)
            return r;
        done += (size_t)r;
    }
    return (ssize_t)done;
}
static void echo_task(void *arg) {
    int fd = *(int *)arg;
    char buf[4096];
    ssize_t n;
    while ((n = loop_recv_co(fd, buf, sizeof(buf))) > 0)
        assert_int_equal(send_all(fd, buf, (size_t)n), n);
    assert_int_equal(n, 0);
    close(fd);
}
static void send_task(void *arg) {
    char *data = arg;
    assert_int_equal(send_all(pair[0], data, ECHO_BYTES), ECHO_BYTES);
    shutdown(pair[0], SHUT_WR);
}
static void echo_main(void *arg) {
    char *data = malloc(ECHO_BYTES), buf[5000];
    for (int i = 0; i < ECHO_BYTES; i++)
        data[i] = (char)(i * 7 + (i >> 8));
    make_pair();
    task_spawn(loop, echo_task, &pair[1]);
    task_spawn(loop, send_task, data);
    size_t done = 0;
    ssize_t n;
    while ((n = loop_recv_co(pair[0], buf, sizeof(buf))) > 0) {
        assert_memory_equal(buf, data + done, (size_t)n);
        done += (size_t)n;
    }
    assert_int_equal(n, 0);
    assert_int_equal(done, ECHO_BYTES);
    close(pair[0]);
    free(data);
}
static void socket_echo_of_a_mebibyte(void **state) {
    run(echo_main, NULL);
}

static void late_send_task(void *arg) {
    loop_sleep_co(5 * MS);
    assert_int_equal(send_all(pair[1], "late", 4), 4);
}
static void late_main(void *arg) {
    char buf[8];
    make_pair();
    task_spawn(loop, late_send_task, NULL);
    assert_int_equal(loop_recv_co(pair[0], buf, sizeof(buf)), 4);
    close(pair[1]);
    struct iovec v = {buf, 4};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    assert_int_equal(loop_sendmsg_co(pair[0], &m, 0), -EPIPE);
    close(pair[0]);
    assert_int_equal(loop_recv_co(pair[0], buf, 4), -EBADF);
}
static void socket_recv_waits_for_data(void **state) {
    run(late_main, NULL);
}

static void pipe_task(void *arg) {
    loop_sleep_co(2 * MS);
    assert_int_equal(send_all(pair[1], "pipe", 4), 4);
    close(pair[1]);
}
static void pipe_main(void *arg) {
    char buf[8];
    assert_int_equal(pipe2(pair, O_NONBLOCK | O_CLOEXEC), 0);
    task_spawn(loop, pipe_task, NULL);
    assert_int_equal(loop_recv_co(pair[0], buf, sizeof(buf)), 4);
    assert_int_equal(loop_recv_co(pair[0], buf, sizeof(buf)), 0);
    close(pair[0]);
}
static void pipes_work_like_sockets(void **state) {
    run(pipe_main, NULL);
}

static struct sockaddr_un address(void) {
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    snprintf(a.sun_path + 1, sizeof(a.sun_path) - 1, "strata-test-loop-%d", (int)getpid());
    return a;
}
static void connect_task(void *arg) {
    struct sockaddr_un a = address();
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    loop_sleep_co(2 * MS);
    assert_int_equal(loop_connect_co(fd, (struct sockaddr *)&a, sizeof(a)), 0);
    assert_int_equal(send_all(fd, "x", 1), 1);
    close(fd);
    *(bool *)arg = true;
}
static void accept_main(void *arg) {
    struct sockaddr_un a = address();
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), c;
    bool connected = false;
    assert_int_equal(loop_connect_co(fd, (struct sockaddr *)&a, sizeof(a)), -ECONNREFUSED);
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof(a)), 0);
    assert_int_equal(listen(fd, 5), 0);
    task_spawn(loop, connect_task, &connected);
    struct sockaddr_storage peer;
    socklen_t len;
    char byte;
    c = loop_accept_co(fd, &peer, &len);
    assert_true(c >= 0);
    assert_int_equal(fcntl(c, F_GETFL) & O_NONBLOCK, O_NONBLOCK);
    assert_int_equal(fcntl(c, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    assert_int_equal(peer.ss_family, AF_UNIX);
    assert_int_equal(loop_recv_co(c, &byte, 1), 1);
    while (!connected)
        task_yield_co();
    close(c);
    close(fd);
}
static void socket_connect_and_accept(void **state) {
    run(accept_main, NULL);
}

/* ---- poll ---- */

static void poll_main(void *arg) {
    make_pair();
    assert_int_equal(loop_poll_co(pair[0], POLLIN, 0), 0);
    int64_t start = clock_ns(CLOCK_MONOTONIC);
    assert_int_equal(loop_poll_co(pair[0], POLLIN, 20 * MS), 0);
    int64_t took = clock_ns(CLOCK_MONOTONIC) - start;
    assert_true(took >= 20 * MS && took < 500 * MS);
    assert_int_equal(loop_poll_co(pair[0], POLLOUT, -1), POLLOUT);
    assert_int_equal(send_all(pair[1], "x", 1), 1);
    assert_int_equal(loop_poll_co(pair[0], POLLIN, 0), POLLIN);
    assert_int_equal(loop_poll_co(pair[0], POLLIN, 20 * MS), POLLIN);
    assert_int_equal(loop_poll_co(pair[0], POLLIN | POLLOUT, -1), POLLIN | POLLOUT);
    close(pair[1]);
    assert_true(loop_poll_co(pair[0], POLLIN, -1) & POLLHUP);
    close(pair[0]);
    assert_int_equal(loop_poll_co(pair[0], POLLIN, -1), -EBADF);
    assert_int_equal(loop_poll_co(pair[0], POLLIN, 0), -EBADF);
    int fd = temp_file(0);
    assert_int_equal(loop_poll_co(fd, POLLIN, -1), POLLIN);
    close(fd);
}
static void poll_events_and_timeouts(void **state) {
    run(poll_main, NULL);
}

struct waiting {
    short events;
    int got;
};
static void poll_task(void *arg) {
    struct waiting *w = arg;
    w->got = loop_poll_co(pair[0], w->events, -1);
}
static void two_polls_main(void *arg) {
    make_pair();
    struct waiting in = {POLLIN, -1}, in2 = {POLLIN, -1}, out = {POLLOUT, -1};
    struct task_group g;
    task_group_init(&g);
    task_group_spawn(&g, loop, poll_task, &in);
    task_group_spawn(&g, loop, poll_task, &in2);
    task_group_spawn(&g, loop, poll_task, &out);
    loop_sleep_co(5 * MS);
    assert_int_equal(out.got, POLLOUT);
    assert_int_equal(in.got, -1);
    assert_int_equal(send_all(pair[1], "x", 1), 1);
    task_group_wait_co(&g);
    assert_int_equal(in.got, POLLIN);
    assert_int_equal(in2.got, POLLIN);
    close(pair[0]);
    close(pair[1]);
}
static void several_waits_on_one_descriptor(void **state) {
    run(two_polls_main, NULL);
}

static void recv_task(void *arg) {
    char c;
    *(int *)arg = (int)loop_recv_co(pair[0], &c, 1);
}
static void reuse_main(void *arg) {
    /* The number of a closed descriptor comes back: nothing of the old registration may remain. */
    for (int i = 0; i < 3; i++) {
        make_pair();
        int got = 99;
        task_run(loop, recv_task, &got);
        assert_int_equal(send_all(pair[1], "x", 1), 1);
        while (got == 99)
            task_yield_co();
        assert_int_equal(got, 1);
        close(pair[0]);
        close(pair[1]);
    }
}
static void a_descriptor_number_can_be_reused(void **state) {
    run(reuse_main, NULL);
}

static void accept_cancel_task(void *arg) {
    *(int *)arg = loop_accept_co(pair[0], NULL, NULL);
}
static void cancel_main(void *arg) {
    make_pair();
    int recv_got = 99;
    struct waiting w1 = {POLLIN, 99}, w2 = {POLLIN, 99};
    task_run(loop, recv_task, &recv_got);
    task_run(loop, poll_task, &w1);
    task_run(loop, poll_task, &w2);
    loop_sleep_co(2 * MS);
    loop_cancel_fd(loop, pair[1]); /* nobody waits on that one */
    loop_sleep_co(2 * MS);
    assert_int_equal(recv_got, 99);
    loop_cancel_fd(loop, pair[0]);
    loop_cancel_fd(loop, pair[0]);
    loop_sleep_co(5 * MS);
    assert_int_equal(recv_got, -ECANCELED);
    assert_int_equal(w1.got, -ECANCELED);
    assert_int_equal(w2.got, -ECANCELED);
    /* Cancelling is not sticky. */
    recv_got = 99;
    task_run(loop, recv_task, &recv_got);
    assert_int_equal(send_all(pair[1], "x", 1), 1);
    loop_sleep_co(5 * MS);
    assert_int_equal(recv_got, 1);
    /* Data that arrives together with the cancel does not turn it into a success. */
    recv_got = 99;
    task_run(loop, recv_task, &recv_got);
    assert_int_equal(send_all(pair[1], "x", 1), 1);
    loop_cancel_fd(loop, pair[0]);
    loop_sleep_co(5 * MS);
    assert_int_equal(recv_got, -ECANCELED);
    close(pair[0]);
    close(pair[1]);

    int accept_got = 99;
    struct sockaddr_un a = address();
    pair[0] = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(pair[0], (struct sockaddr *)&a, sizeof(a)), 0);
    assert_int_equal(listen(pair[0], 5), 0);
    task_run(loop, accept_cancel_task, &accept_got);
    loop_cancel_fd(loop, pair[0]);
    loop_sleep_co(5 * MS);
    assert_int_equal(accept_got, -ECANCELED);
    close(pair[0]);
}
static void cancel_fd_ends_every_wait(void **state) {
    run(cancel_main, NULL);
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
    setenv("STRATA_AIO", "uring", 1);
    assert_int_equal(loop_new(LOOP_AUTO, &l, NULL), 0);
    assert_string_equal(loop_backend_name(l), "uring");
    loop_free(l);
    setenv("STRATA_AIO", "fibers", 1);
    assert_int_equal(loop_new(LOOP_AUTO, &l, &e), -EINVAL);
    assert_non_null(strstr(err_text(&e), "fibers"));
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

/* One group, because TAP has room for one plan. */
static enum loop_backend both[] = {LOOP_URING, LOOP_THREADS};
#define T(f)                                                                                       \
    {"uring: " #f, f, setup, teardown, &both[0]}, {                                                \
        "threads: " #f, f, setup, teardown, &both[1]                                               \
    }

int main(void) {
    const struct CMUnitTest tests[] = {
        T(name_says_the_backend),
        T(file_write_then_read),
        T(file_bulk_write_then_read),
        T(file_dsync_write_then_read),
        T(file_direct_write_then_read),
        T(file_offset_beyond_63_bits_is_refused),
        T(file_fallocate),
        T(file_many_cold_reads_at_once),
        T(socket_echo_of_a_mebibyte),
        T(socket_recv_waits_for_data),
        T(pipes_work_like_sockets),
        T(socket_connect_and_accept),
        T(poll_events_and_timeouts),
        T(several_waits_on_one_descriptor),
        T(a_descriptor_number_can_be_reused),
        T(cancel_fd_ends_every_wait),
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
        cmocka_unit_test(nothing_starts_before_it_is_needed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
