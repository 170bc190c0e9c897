/* SPDX-License-Identifier: MIT */
/*
 * The pool: worker threads for what would block or burn the loop's thread.
 *
 * One pool a process with two classes, each a FIFO queue of its own: `cpu` as wide as the
 * processors that we may use, `io` for calls that block in the kernel.  A job lies on the stack of
 * the task that waits for it; the worker writes `result` and then posts the job to the task's loop,
 * after which it does not touch it again.
 *
 * Threads start when a job finds none idle, end after IDLE_SECONDS without work, and all end when
 * the last loop of the process is freed (joined, so that nothing of them is left).  A thread that
 * ends by itself puts itself on `ended`; the next start or the last loop_free joins it.
 *
 * Locks: life (loops coming and going) before lock (everything else in struct pool).  If no thread
 * at all can be started, the job runs in the loop's own context: slow, but it ends.
 */
#include "runtime/internal.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <time.h>

#define IDLE_SECONDS 5
#define CPU_THREADS_MIN 2
#define THREADS_MAX 64
#define STACK_BYTES ((size_t)(RT_ASAN ? 2048 : 512) * 1024)

struct job {
    struct rt_post post;
    struct list link; /* class.jobs */
    struct rt_op op;
    struct loop *loop;
    int (*fn)(void *);
    void *arg;
    int result;
};

struct worker {
    struct list link; /* pool.ended, at its end */
    pthread_t thread;
    struct class *class;
};

struct class {
    struct list jobs;
    unsigned queued;
    unsigned threads, idle; /* idle: waiting, and not yet signalled */
    unsigned max;
    pthread_cond_t work;
    const char *name;
};

static struct pool {
    pthread_mutex_t life;
    unsigned loops;

    pthread_mutex_t lock;
    struct class cpu, io;
    bool stop;
    pthread_cond_t gone; /* a thread has put itself on `ended` */
    struct list ended;
} pool = {
    .life = PTHREAD_MUTEX_INITIALIZER,
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .gone = PTHREAD_COND_INITIALIZER,
    .ended = LIST_HEAD_INIT(pool.ended),
    .cpu = {.name = "strata-cpu", .jobs = LIST_HEAD_INIT(pool.cpu.jobs)},
    .io = {.name = "strata-io", .jobs = LIST_HEAD_INIT(pool.io.jobs), .max = THREADS_MAX},
};
static pthread_once_t pool_once = PTHREAD_ONCE_INIT;

static unsigned count_processors(void) {
    /* Large enough for any machine of today: the call fails when the set is too small. */
    enum { PROCESSORS_MAX = 8192 };
    cpu_set_t *set = CPU_ALLOC(PROCESSORS_MAX);
    size_t bytes = CPU_ALLOC_SIZE(PROCESSORS_MAX);
    unsigned n = CPU_THREADS_MIN;
    if (set && sched_getaffinity(0, bytes, set) == 0)
        n = (unsigned)CPU_COUNT_S(bytes, set);
    CPU_FREE(set);
    return n < CPU_THREADS_MIN ? CPU_THREADS_MIN : n > THREADS_MAX ? THREADS_MAX : n;
}

static void pool_init(void) {
    pthread_condattr_t a;
    pthread_condattr_init(&a);
    pthread_condattr_setclock(&a, CLOCK_MONOTONIC);
    pthread_cond_init(&pool.cpu.work, &a);
    pthread_cond_init(&pool.io.work, &a);
    pthread_condattr_destroy(&a);
    pool.cpu.max = count_processors();
}

unsigned offload_width(void) {
    pthread_once(&pool_once, pool_init);
    return pool.cpu.max;
}

/* ---- workers ---- */

static void job_done(struct rt_post *p) {
    struct job *j = list_entry(p, struct job, post);
    rt_op_done(&j->op, j->result);
}

/* In the loop's context: there is no thread to be had. */
static void job_run_here(struct rt_post *p) {
    struct job *j = list_entry(p, struct job, post);
    rt_op_done(&j->op, j->fn(j->arg));
}

/* Waits for work; false: none came, or the pool stops. */
static bool worker_wait(struct class *c) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += IDLE_SECONDS;
    c->idle++;
    int r = 0;
    while (!c->queued && !pool.stop && r != ETIMEDOUT)
        r = pthread_cond_timedwait(&c->work, &pool.lock, &until);
    c->idle--;
    return c->queued;
}

static void *worker_main(void *arg) {
    struct worker *w = arg;
    struct class *c = w->class;
    pthread_setname_np(pthread_self(), c->name);
    pthread_mutex_lock(&pool.lock);
    while (c->queued || worker_wait(c)) {
        struct job *j = list_entry(list_pop_front(&c->jobs), struct job, link);
        c->queued--;
        pthread_mutex_unlock(&pool.lock);
        j->result = j->fn(j->arg);
        rt_post(j->loop, &j->post);
        pthread_mutex_lock(&pool.lock);
    }
    c->threads--;
    list_push_back(&pool.ended, &w->link);
    pthread_cond_signal(&pool.gone);
    pthread_mutex_unlock(&pool.lock);
    return NULL;
}

/* Joins the threads on `ended`; the lock is held, and let go for each join. */
static void join_ended(void) {
    struct list *n;
    while ((n = list_pop_front(&pool.ended))) {
        struct worker *w = list_entry(n, struct worker, link);
        pthread_mutex_unlock(&pool.lock);
        pthread_join(w->thread, NULL);
        free(w);
        pthread_mutex_lock(&pool.lock);
    }
}

/* With the lock held.  The new thread starts with all signals blocked. */
static bool worker_start(struct class *c) {
    struct worker *w = calloc(1, sizeof(*w));
    if (!w)
        return false;
    w->class = c;
    list_init(&w->link);
    pthread_attr_t a;
    pthread_attr_init(&a);
    pthread_attr_setstacksize(&a, STACK_BYTES);
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int r = pthread_create(&w->thread, &a, worker_main, w);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&a);
    if (r)
        free(w);
    else
        c->threads++;
    return r == 0;
}

static int submit_co(struct class *c, int (*fn)(void *), void *arg) {
    struct loop *l = rt_loop_co();
    struct job j = {.post.run = job_done, .op.task = l->current, .loop = l, .fn = fn, .arg = arg};
    bool stranded = false;
    pthread_mutex_lock(&pool.lock);
    list_push_back(&c->jobs, &j.link);
    c->queued++;
    if (c->queued <= c->idle) {
        pthread_cond_signal(&c->work);
    } else if (c->threads < c->max) {
        join_ended();
        if (!worker_start(c) && !c->threads && !list_empty(&j.link)) {
            list_remove(&j.link);
            c->queued--;
            stranded = true;
        }
    }
    pthread_mutex_unlock(&pool.lock);
    if (stranded) {
        j.post.run = job_run_here;
        rt_post(l, &j.post);
    }
    return rt_op_wait_co(&j.op);
}

int offload_co(int (*fn)(void *arg), void *arg) {
    return submit_co(&pool.cpu, fn, arg);
}

int offload_blocking_co(int (*fn)(void *arg), void *arg) {
    return submit_co(&pool.io, fn, arg);
}

/* ---- life ---- */

void rt_pool_enter(void) {
    pthread_once(&pool_once, pool_init);
    pthread_mutex_lock(&pool.life);
    pool.loops++;
    pthread_mutex_unlock(&pool.life);
}

void rt_pool_leave(void) {
    pthread_mutex_lock(&pool.life);
    if (--pool.loops == 0) {
        pthread_mutex_lock(&pool.lock);
        pool.stop = true;
        pthread_cond_broadcast(&pool.cpu.work);
        pthread_cond_broadcast(&pool.io.work);
        while (pool.cpu.threads || pool.io.threads)
            pthread_cond_wait(&pool.gone, &pool.lock);
        join_ended();
        pool.stop = false;
        pthread_mutex_unlock(&pool.lock);
    }
    pthread_mutex_unlock(&pool.life);
}
