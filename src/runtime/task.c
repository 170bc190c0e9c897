/* SPDX-License-Identifier: MIT */
/*
 * Tasks: stacks, starting, suspending, ending.
 *
 *     map                     lo                                                     top
 *      | guard (PROT_NONE)     |  frames grow down ...              | struct task | colour |
 *
 * The struct task lies on top of its own stack: one mapping a task, nothing else to allocate.  The
 * colour (0 to 15 cache lines) keeps the hot ends of many stacks out of the same cache sets.
 *
 * Control moves in pairs: somebody (the loop, or a task in task_run) resumes a task and gets
 * control back at that task's next suspension or end.  `resumer` says who.  A finished task cannot
 * give back the stack that it stands on: its resumer does, right after the switch.
 *
 * Invariants:
 *  1. A live task is exactly one of: running (or waiting in task_run), in loop.ready, parked.
 *  2. parked implies !wake; task_wake() on a parked task moves it to ready and sets wake.
 *  3. loop.current is the task whose stack is in use; NULL on the thread's own stack.
 */
#include "runtime/internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#if RT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/lsan_interface.h>
#endif

#define MAP_BYTES (TASK_GUARD_BYTES + TASK_STACK_BYTES)
#define COLOURS 16
#define LINE_BYTES 64

/* A wake may make the woken task's I/O late by this many passes over the ready queue. */
#define READY_ROUNDS 8

_Noreturn void rt_die(const char *why) {
    fprintf(stderr, "strata: %s\n", why);
    abort();
}

/* ---- stacks ---- */

static struct task *stack_map(struct loop *l) {
    char *map = mmap(NULL, MAP_BYTES, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (map == MAP_FAILED)
        rt_die("no memory for a task's stack");
    char *lo = map + TASK_GUARD_BYTES, *top = lo + TASK_STACK_BYTES;
    if (mprotect(lo, TASK_STACK_BYTES, PROT_READ | PROT_WRITE))
        rt_die("no memory for a task's stack");
    size_t colour = (size_t)(l->colour++ % COLOURS) * LINE_BYTES;
    uintptr_t at = (uintptr_t)top - colour - sizeof(struct task);
    struct task *t = (struct task *)(at & ~(uintptr_t)(LINE_BYTES - 1));
    t->map = map;
    t->valgrind_id = VALGRIND_STACK_REGISTER(lo, top);
#if RT_ASAN
    __lsan_register_root_region(lo, TASK_STACK_BYTES);
#endif
    return t;
}

static void stack_unmap(struct task *t) {
    char *map = t->map;
    VALGRIND_STACK_DEREGISTER(t->valgrind_id);
#if RT_ASAN
    __lsan_unregister_root_region(map + TASK_GUARD_BYTES, TASK_STACK_BYTES);
    __asan_unpoison_memory_region(map + TASK_GUARD_BYTES, TASK_STACK_BYTES);
#endif
    munmap(map, MAP_BYTES);
}

static struct task *stack_get(struct loop *l) {
    struct list *n = list_pop_front(&l->stacks);
    if (!n)
        return stack_map(l);
    l->stacks_kept--;
    struct task *t = list_entry(n, struct task, link);
#if RT_ASAN
    /* The last owner's frames below task_entry were left without unwinding it. */
    __asan_unpoison_memory_region((char *)t->map + TASK_GUARD_BYTES, TASK_STACK_BYTES);
#endif
    return t;
}

static void stack_put(struct loop *l, struct task *t) {
    if (l->stacks_kept < TASK_STACKS_KEPT) {
        l->stacks_kept++;
        list_push_front(&l->stacks, &t->link); /* the warmest first */
    } else {
        stack_unmap(t);
    }
}

void rt_free_stacks(struct loop *l) {
    struct list *n;
    while ((n = list_pop_front(&l->stacks)))
        stack_unmap(list_entry(n, struct task, link));
    l->stacks_kept = 0;
}

/* ---- life ---- */

static void task_entry(void *arg) {
    struct task *t = arg;
    rt_ctx_entered(t->resumer);
    t->fn(t->arg);
    if (t->group && --t->group->running == 0)
        waitq_wake_all(&t->group->idle);
    t->ended = true;
    rt_ctx_switch(&t->ctx, t->resumer, true);
    abort(); /* nobody resumes an ended task */
}

struct task *rt_task_new(struct loop *l, task_fn *fn, void *arg) {
    struct task *t = stack_get(l);
    t->resumer = NULL;
    t->loop = l;
    list_init(&t->link);
    t->fn = fn;
    t->arg = arg;
    t->group = NULL;
    t->sleep = NULL;
    t->parked = t->wake = t->ended = false;
    rt_ctx_make(&t->ctx, (char *)t->map + TASK_GUARD_BYTES, t, task_entry, t);
    l->tasks++;
    return t;
}

void rt_task_queue(struct task *t) {
    list_push_back(&t->loop->ready, &t->link);
}

/* Runs `t` until it suspends or ends. */
static void resume(struct loop *l, struct task *t) {
    struct task *caller = l->current;
    t->resumer = caller ? &caller->ctx : &l->ctx;
    l->current = t;
    rt_ctx_switch(t->resumer, &t->ctx, false);
    l->current = caller;
    if (t->ended) {
        l->tasks--;
        stack_put(l, t);
    }
}

/* Back to whoever resumed the running task. */
static void suspend(struct task *t) {
    rt_ctx_switch(&t->ctx, t->resumer, false);
}

void rt_run_ready(struct loop *l) {
    l->yielded = false;
    for (int round = 0; round < READY_ROUNDS && !l->yielded && !list_empty(&l->ready); round++) {
        /* What becomes ready from here on belongs to the next round. */
        struct list mark;
        list_push_back(&l->ready, &mark);
        struct list *n;
        while ((n = list_pop_front(&l->ready)) != &mark)
            resume(l, list_entry(n, struct task, link));
    }
}

void task_spawn(struct loop *loop, task_fn *fn, void *arg) {
    assert(loop_self() == loop);
    rt_task_queue(rt_task_new(loop, fn, arg));
}

void task_run(struct loop *loop, task_fn *fn, void *arg) {
    assert(loop_self() == loop);
    struct task *t = rt_task_new(loop, fn, arg);
    if (loop->nest >= TASK_NEST_MAX) {
        rt_task_queue(t);
        return;
    }
    loop->nest++;
    resume(loop, t);
    loop->nest--;
}

struct task *task_self(void) {
    struct loop *l = loop_self();
    return l ? l->current : NULL;
}

struct loop *rt_loop_co(void) {
    struct loop *l = loop_self();
    assert(l && l->current);
    return l;
}

void task_park_co(void) {
    struct task *t = rt_loop_co()->current;
    if (!t->wake) {
        t->parked = true;
        suspend(t);
        assert(t->wake && !t->parked);
    }
    t->wake = false;
}

void task_wake(struct task *t) {
    assert(t->loop == loop_self() && !t->ended);
    t->wake = true;
    if (t->parked) {
        t->parked = false;
        rt_task_queue(t);
    }
}

void task_yield_co(void) {
    struct loop *l = rt_loop_co();
    l->yielded = true;
    rt_task_queue(l->current);
    suspend(l->current);
}
