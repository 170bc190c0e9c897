/* SPDX-License-Identifier: MIT */
/* What the loop's tests share: a fixture that runs each test on both back ends, and small helpers.
 */
#ifndef STRATA_TESTS_LOOP_FIXTURE_H
#define STRATA_TESTS_LOOP_FIXTURE_H

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
#define UNUSED __attribute__((unused))

static struct loop *loop;
static enum loop_backend backend;

UNUSED static int setup(void **state) {
    struct err e AUTO_ERR = ERR_INIT;
    backend = *(enum loop_backend *)*state;
    if (loop_new(backend, &loop, &e) < 0) {
        print_error("%s\n", err_text(&e));
        return -1;
    }
    return 0;
}
UNUSED static int teardown(void **state) {
    loop_free(loop);
    loop = NULL;
    return 0;
}
UNUSED static void run(task_fn *fn, void *arg) {
    loop_run(loop, fn, arg);
}
UNUSED static int64_t clock_ns(clockid_t id) {
    struct timespec ts;
    clock_gettime(id, &ts);
    return ts.tv_sec * INT64_C(1000000000) + ts.tv_nsec;
}
UNUSED static int temp_file(int flags) {
    const char *dir = getenv("TMPDIR");
    char name[512];
    snprintf(name, sizeof(name), "%s/strata-test-loop-XXXXXX", dir ? dir : "/var/tmp");
    int fd = mkostemp(name, flags | O_CLOEXEC);
    assert_true(fd >= 0);
    unlink(name);
    return fd;
}
UNUSED static unsigned threads_now(void) {
    char line[128];
    unsigned n = 0;
    FILE *f = fopen("/proc/self/status", "r");
    while (fgets(line, sizeof(line), f))
        if (sscanf(line, "Threads: %u", &n) == 1)
            break;
    fclose(f);
    return n;
}

/* ---- a pair of connected descriptors ---- */

UNUSED static int pair[2];
UNUSED static void make_pair(void) {
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair), 0);
}
UNUSED static ssize_t send_all(int fd, const char *p, size_t len) {
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
struct waiting {
    short events;
    int got;
};
UNUSED static void poll_task(void *arg) {
    struct waiting *w = arg;
    w->got = loop_poll_co(pair[0], w->events, -1);
}

/* One group, because TAP has room for one plan. */
static enum loop_backend both[] = {LOOP_URING, LOOP_THREADS};
#define T(f)                                                                                       \
    {"uring: " #f, f, setup, teardown, &both[0]}, {                                                \
        "threads: " #f, f, setup, teardown, &both[1]                                               \
    }

#endif
