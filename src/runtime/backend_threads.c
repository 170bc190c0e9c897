/* SPDX-License-Identifier: MIT */
/*
 * The back end for kernels and containers without io_uring: epoll for descriptors, the offload
 * pool for files.
 *
 * One `watch` a descriptor number that was ever waited for, found by index.  Its registration is
 * one-shot: each wait arms it with the union of what its waiters want, a report disarms it, and
 * whoever remains arms it again.  The number may have been closed and reused behind our back (the
 * kernel then has dropped the registration), so `known` is only a guess between ADD and MOD and the
 * kernel's answer corrects it.
 *
 * The eventfd and the signalfd are level-triggered and always registered.
 */
#include "runtime/internal.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#define REAP_BATCH 64

struct watch {
    struct list waiters; /* rt_wait.watch_link */
    bool known;
};

struct threads {
    int epoll_fd;
    struct watch **watches; /* by descriptor; NULL: never waited for */
    int watches_room;
    bool no_pwait2;
};

static struct threads *state(struct loop *l) {
    return l->be_state;
}

/* ---- life ---- */

static int watch_always(int epoll_fd, int fd) {
    struct epoll_event ev = {.events = EPOLLIN, .data.fd = fd};
    return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &ev) ? -errno : 0;
}

static void threads_signals_on(struct loop *l) {
    if (l->signal_fd >= 0)
        watch_always(state(l)->epoll_fd, l->signal_fd);
}

static int threads_start(struct loop *l) {
    struct threads *t = calloc(1, sizeof(*t));
    if (!t)
        return -ENOMEM;
    t->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    int r = t->epoll_fd < 0 ? -errno : watch_always(t->epoll_fd, l->wake_fd);
    if (r < 0) {
        if (t->epoll_fd >= 0)
            close(t->epoll_fd);
        free(t);
        return r;
    }
    t->no_pwait2 = RUNNING_ON_VALGRIND; /* which does not know it, and says so */
    l->be_state = t;
    threads_signals_on(l);
    return 0;
}

static void threads_stop(struct loop *l) {
    struct threads *t = state(l);
    for (int i = 0; i < t->watches_room; i++)
        free(t->watches[i]);
    free(t->watches);
    close(t->epoll_fd);
    free(t);
    l->be_state = NULL;
}

/* ---- descriptors ---- */

static struct watch *watch_get(struct threads *t, int fd) {
    if (fd >= t->watches_room) {
        int room = t->watches_room ? t->watches_room : 64;
        while (room <= fd)
            room *= 2;
        struct watch **p = realloc(t->watches, (size_t)room * sizeof(struct watch *));
        if (!p)
            return NULL;
        memset(p + t->watches_room, 0, (size_t)(room - t->watches_room) * sizeof(struct watch *));
        t->watches = p;
        t->watches_room = room;
    }
    struct watch *w = t->watches[fd];
    if (!w && (w = calloc(1, sizeof(*w)))) {
        list_init(&w->waiters);
        t->watches[fd] = w;
    }
    return w;
}

/* Registers what the waiters of `fd` want. */
static int watch_arm(struct threads *t, struct watch *w, int fd) {
    struct epoll_event ev = {.events = EPOLLONESHOT, .data.fd = fd};
    list_for_each(it, &w->waiters) ev.events |=
        (unsigned short)list_entry(it, struct rt_wait, watch_link)->events;
    int op = w->known ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
    int r = epoll_ctl(t->epoll_fd, op, fd, &ev);
    if (r && (errno == ENOENT || errno == EEXIST)) {
        op = op == EPOLL_CTL_MOD ? EPOLL_CTL_ADD : EPOLL_CTL_MOD;
        r = epoll_ctl(t->epoll_fd, op, fd, &ev);
    }
    w->known = r == 0;
    return r ? -errno : 0;
}

static void threads_wait_start(struct loop *l, struct rt_wait *w) {
    if (w->fd < 0) {
        rt_op_done(&w->op, -EBADF);
        return;
    }
    struct watch *watch = watch_get(state(l), w->fd);
    if (!watch) {
        rt_op_done(&w->op, -ENOMEM);
        return;
    }
    list_push_back(&watch->waiters, &w->watch_link);
    int r = watch_arm(state(l), watch, w->fd);
    if (r == 0)
        return;
    list_remove(&w->watch_link);
    /* EPERM: a regular file, which is always ready. */
    rt_op_done(&w->op, r == -EPERM ? w->events & (POLLIN | POLLOUT) : r);
}

static void threads_wait_cancel(struct loop *l, struct rt_wait *w) {
    (void)l; /* a registration that is too wide reports once, to nobody */
    list_remove(&w->watch_link);
    rt_op_done(&w->op, -ECANCELED);
}

static void watch_report(struct loop *l, int fd, uint32_t events) {
    struct threads *t = state(l);
    struct watch *w = fd < t->watches_room ? t->watches[fd] : NULL;
    if (!w)
        return;
    list_for_each_safe(it, next, &w->waiters) {
        struct rt_wait *wait = list_entry(it, struct rt_wait, watch_link);
        int got = (int)(events & ((unsigned short)wait->events | POLLERR | POLLHUP));
        if (got) {
            list_remove(&wait->watch_link);
            rt_op_done(&wait->op, got);
        }
    }
    if (list_empty(&w->waiters))
        return;
    int r = watch_arm(t, w, fd);
    while (r < 0 && !list_empty(&w->waiters)) {
        struct rt_wait *wait = list_entry(w->waiters.next, struct rt_wait, watch_link);
        list_remove(&wait->watch_link);
        rt_op_done(&wait->op, r);
    }
}

static int wait_events(struct threads *t, struct epoll_event *ev, int64_t timeout_ns) {
    if (timeout_ns <= 0)
        return epoll_wait(t->epoll_fd, ev, REAP_BATCH, timeout_ns < 0 ? -1 : 0);
    if (!t->no_pwait2) {
        struct timespec ts = {timeout_ns / 1000000000, timeout_ns % 1000000000};
        int n = epoll_pwait2(t->epoll_fd, ev, REAP_BATCH, &ts, NULL);
        if (n >= 0 || errno != ENOSYS)
            return n;
        t->no_pwait2 = true; /* before Linux 5.11: whole milliseconds, rounded up */
    }
    int64_t ms = (timeout_ns + 999999) / 1000000;
    return epoll_wait(t->epoll_fd, ev, REAP_BATCH, ms > 60000 ? 60000 : (int)ms);
}

static void threads_turn(struct loop *l, int64_t timeout_ns) {
    struct epoll_event ev[REAP_BATCH];
    int n = wait_events(state(l), ev, timeout_ns);
    for (int i = 0; i < n; i++) {
        int fd = ev[i].data.fd;
        uint64_t count;
        if (fd == l->wake_fd) {
            if (read(fd, &count, sizeof(count)) < 0)
                continue;
        } else if (fd == l->signal_fd) {
            rt_signals_read(l);
        } else {
            watch_report(l, fd, ev[i].events);
        }
    }
}

/* ---- files ---- */

static ssize_t threads_file_co(struct loop *l, struct rt_file *f) {
    (void)l;
    offload_blocking_co(rt_file_blocking, f);
    return f->res;
}

const struct backend backend_threads = {
    .name = "threads",
    .start = threads_start,
    .stop = threads_stop,
    .file_co = threads_file_co,
    .wait_start = threads_wait_start,
    .wait_cancel = threads_wait_cancel,
    .turn = threads_turn,
    .signals_on = threads_signals_on,
};
