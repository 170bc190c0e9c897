/* SPDX-License-Identifier: MIT */
/*
 * Signals as events: blocked, and read from a signalfd that the loop waits on.
 *
 * A signal has one handler in the process (`owner` says whose loop), because a signalfd only ever
 * delivers to one reader.  Blocking reaches the calling thread and those that it starts later, so a
 * program registers its signals before it has other threads; the pool's threads block all signals.
 * loop_off_signal() gives the signal its earlier mask back.
 */
#include "runtime/internal.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/signalfd.h>
#include <unistd.h>

struct rt_signal {
    void (*fn)(void *arg, int signo);
    void *arg;
    bool was_blocked;
};

static _Atomic(struct loop *) owner[_NSIG];

int loop_on_signal(struct loop *l, int signo, void (*fn)(void *, int), void *arg) {
    assert(loop_self() == l && fn);
    if (signo <= 0 || signo >= _NSIG || signo == SIGKILL || signo == SIGSTOP)
        return -EINVAL;
    if (!l->handlers && !(l->handlers = calloc(_NSIG, sizeof(struct rt_signal))))
        return -ENOMEM;
    struct loop *none = NULL;
    if (!atomic_compare_exchange_strong(&owner[signo], &none, l))
        return -EBUSY;

    sigset_t one, old;
    sigemptyset(&one);
    sigaddset(&one, signo);
    pthread_sigmask(SIG_BLOCK, &one, &old);
    sigaddset(&l->signals, signo);
    int fd = signalfd(l->signal_fd, &l->signals, SFD_CLOEXEC | SFD_NONBLOCK);
    if (fd < 0) {
        int err = errno;
        sigdelset(&l->signals, signo);
        pthread_sigmask(SIG_SETMASK, &old, NULL);
        atomic_store(&owner[signo], NULL);
        return -err;
    }
    l->handlers[signo] = (struct rt_signal){fn, arg, sigismember(&old, signo) == 1};
    if (l->signal_fd < 0) {
        l->signal_fd = fd;
        if (l->be_state)
            l->be->signals_on(l);
    }
    return 0;
}

void loop_off_signal(struct loop *l, int signo) {
    assert(loop_self() == l);
    if (signo <= 0 || signo >= _NSIG || atomic_load(&owner[signo]) != l)
        return;
    bool unblock = !l->handlers[signo].was_blocked;
    sigdelset(&l->signals, signo);
    signalfd(l->signal_fd, &l->signals, 0);
    l->handlers[signo] = (struct rt_signal){0};
    atomic_store(&owner[signo], NULL);
    if (unblock) {
        sigset_t one;
        sigemptyset(&one);
        sigaddset(&one, signo);
        pthread_sigmask(SIG_UNBLOCK, &one, NULL);
    }
}

void rt_signals_read(struct loop *l) {
    struct signalfd_siginfo si;
    while (l->signal_fd >= 0 && read(l->signal_fd, &si, sizeof(si)) == sizeof(si)) {
        struct rt_signal h = {0};
        if (si.ssi_signo < _NSIG)
            h = l->handlers[si.ssi_signo];
        if (h.fn)
            h.fn(h.arg, (int)si.ssi_signo);
    }
}

void rt_signals_free(struct loop *l) {
    for (int s = 1; s < _NSIG; s++)
        loop_off_signal(l, s);
    if (l->signal_fd >= 0)
        close(l->signal_fd);
    l->signal_fd = -1;
    free(l->handlers);
    l->handlers = NULL;
}
