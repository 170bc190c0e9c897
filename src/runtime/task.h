/* SPDX-License-Identifier: MIT */
/*
 * Tasks: stackful coroutines of one loop.
 *
 * A task runs straight-line code and may suspend only inside calls whose name ends in _co.  It
 * belongs to the loop that it was spawned on and never moves to another thread.  It always runs to
 * its end, so that cleanup attributes fire; cancelling is a flag that the task looks at.
 *
 * Stacks are pooled per loop, 64 KiB usable with a guard page below (TASK_STACK_BYTES): no alloca,
 * no VLA, nothing beyond about 1 KiB on the stack of one function, bounded recursion.  Under
 * AddressSanitizer the switches are announced and stacks are four times as large; valgrind is told
 * of each stack.
 *
 * Context: everything here is for the thread of the task's loop, except where said otherwise.
 */
#ifndef STRATA_RUNTIME_TASK_H
#define STRATA_RUNTIME_TASK_H

#include <stdbool.h>
#include "base/list.h"

struct loop;
struct task;

typedef void task_fn(void *arg);

/*
 * Makes a task that will run fn(arg) on `loop` and queues it as ready; it starts when the caller
 * suspends or the loop turns, never inside this call.  The task frees itself when fn returns.
 * Aborts the process only when memory for a stack is gone (stacks are bounded by their callers:
 * every spawner limits how many it has at once).
 */
void task_spawn(struct loop *loop, task_fn *fn, void *arg);

/*
 * As task_spawn, but runs it at once, until it first suspends or ends; then returns to the caller.
 * Callable from a task (which waits in between, nested at most 16 deep: beyond that
 * it queues as task_spawn does) or from the loop's own context.  The cheap way for servers: a
 * request that never suspends costs no queueing.
 */
void task_run(struct loop *loop, task_fn *fn, void *arg);

/* The running task, or NULL in the loop's own context.  Not to be kept in a register across _co. */
struct task *task_self(void);
/* The loop of the running thread, or NULL. */
struct loop *loop_self(void);

/*
 * Suspends the running task until task_wake().  A wake that came before the park (same task, since
 * its last park returned) makes the park return at once: no wake is lost.  Callers re-check their
 * condition in a loop: spurious wakes are allowed.
 */
void task_park_co(void);
/* Queues a parked task as ready; harmless on a task already queued.  Same thread only; from another
 * thread use loop_post(). */
void task_wake(struct task *t);
/* Lets every other ready task and the I/O completions run once. */
void task_yield_co(void);

/* ---- task locks: FIFO, held across suspension, owner asserted; all zero-initialisable with the
 * _init call; destroying a held lock is a bug (asserted). ---- */

struct waitq {
    struct list waiters;
};
void waitq_init(struct waitq *q);
/* Parks at the end of the queue until woken by waitq_wake_*; no spurious return. */
void waitq_wait_co(struct waitq *q);
bool waitq_wake_one(struct waitq *q); /* false: nobody waited */
void waitq_wake_all(struct waitq *q);

struct task_mutex {
    struct task *owner;
    struct list waiters;
};
void task_mutex_init(struct task_mutex *m);
void task_mutex_lock_co(struct task_mutex *m); /* not recursive (asserted) */
bool task_mutex_trylock(struct task_mutex *m);
void task_mutex_unlock(struct task_mutex *m); /* hands the lock to the first waiter */

/* Readers share; a waiting writer stops new readers.  Not recursive. */
struct task_rwlock {
    unsigned readers;
    bool writer;
    struct list waiters;
};
void task_rwlock_init(struct task_rwlock *l);
void task_rwlock_rdlock_co(struct task_rwlock *l);
void task_rwlock_wrlock_co(struct task_rwlock *l);
void task_rwlock_unlock(struct task_rwlock *l);

/* Counting semaphore, to bound what is in flight (units are the caller's: bytes, requests). */
struct task_sem {
    long free;
    struct list waiters;
};
void task_sem_init(struct task_sem *s, long units);
void task_sem_down_co(struct task_sem *s, long units); /* FIFO: a large request is not starved */
void task_sem_up(struct task_sem *s, long units);

/* A group of tasks to wait for. */
struct task_group {
    unsigned running;
    struct waitq idle;
};
void task_group_init(struct task_group *g);
void task_group_spawn(struct task_group *g, struct loop *loop, task_fn *fn, void *arg);
void task_group_wait_co(struct task_group *g); /* until all that were spawned have ended */

#endif
