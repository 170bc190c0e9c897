/* SPDX-License-Identifier: MIT */
/*
 * bench: a simple sequential load of one kind, as qemu-img bench runs it.
 *
 * `depth` workers take the next request from one cursor.  A flush is due whenever the number of
 * requests left is a multiple of the interval: with draining the worker that meets it holds the
 * cursor, waits until nothing is in flight, and flushes; without, it flushes beside the others.
 *
 * The cursor steps over the disk and begins again at its start when a request would reach over the
 * end.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "cli/cli.h"
#include "cli/dialect.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "runtime/loop.h"
#include "runtime/task.h"

enum { DEPTH_MAX = 1024 };
static const uint64_t MEMORY_MAX = 1 << 30; /* all buffers together */

static const char *const aio_names[] = {"default", "threads", "native", "io_uring", NULL};
enum { AIO_DEFAULT, AIO_THREADS, AIO_NATIVE, AIO_URING };

struct args {
    struct cli_image image;
    uint64_t count, depth, buffer, step, offset, flush_interval, pattern;
    int aio;
    bool write, no_drain, native, quiet;
};
static const struct cli_opt opts[] = {
    CLI_IMAGE_ROWS(struct args, image),
    CLI_U64(struct args, count, 'c', "count", "N", 75000, 0, INT32_MAX, "number of requests"),
    CLI_U64(struct args, depth, 'd', "depth", "N", 64, 1, DEPTH_MAX, "requests in flight"),
    CLI_SIZE(struct args, buffer, 's', "buffer-size", "SIZE", 4096, 0, INT32_MAX,
             "bytes of a request"),
    CLI_SIZE(struct args, step, 'S', "step-size", "SIZE", 0, 0, INT32_MAX,
             "from one request to the next (default: their size)"),
    CLI_SIZE(struct args, offset, 'o', "offset", "OFFSET", 0, 0, INT64_MAX,
             "where the first request begins"),
    CLI_FLAG(struct args, write, 'w', "write", "write instead of read: the disk is overwritten"),
    CLI_U64(struct args, pattern, 0, "pattern", "BYTE", 0, 0, 255, "what is written"),
    CLI_U64(struct args, flush_interval, 0, "flush-interval", "N", 0, 0, INT32_MAX,
            "with -w: flush after each N requests (default: never)"),
    CLI_FLAG(struct args, no_drain, 0, "no-drain",
             "with --flush-interval: do not wait for the requests in flight"),
    CLI_ENUM(struct args, aio, 'i', "aio", "HOW", aio_names, AIO_DEFAULT,
             "how requests reach the kernel: threads, or io_uring for all others"),
    CLI_FLAG(struct args, native, 'n', "native", "as -i native"),
    CLI_QUIET_ROW(struct args, quiet),
    CLI_END};

struct bench {
    struct verb_ctx *ctx;
    const struct args *a;
    struct node *node;
    uint64_t left, offset, step;
    uint64_t in_flight;
    struct task_mutex cursor;
    struct waitq idle;
    int error;
    const char *failed; /* which kind of request */
    uint8_t *memory;
};

struct worker {
    struct bench *b;
    uint8_t *buf;
};

static void failed(struct bench *b, int error, const char *what) {
    if (b->error)
        return;
    b->error = error;
    b->failed = what;
}

static void flush_co(struct bench *b) {
    int rc = disk_flush_co(b->node);
    if (rc < 0)
        failed(b, rc, "flush");
}

/* The next request's place; false at the end or after an error. */
static bool claim_co(struct bench *b, uint64_t *offset) {
    const struct args *a = b->a;
    task_mutex_lock_co(&b->cursor);
    bool flush =
        a->flush_interval && b->left && b->left < a->count && b->left % a->flush_interval == 0;
    if (flush && !a->no_drain) {
        while (b->in_flight)
            waitq_wait_co(&b->idle);
        flush_co(b);
        flush = false;
    }
    bool got = b->left && !b->error;
    if (got) {
        b->left--;
        b->in_flight++;
        *offset = b->offset;
        b->offset += b->step;
        if (b->offset > b->node->size - a->buffer)
            b->offset = b->offset % b->node->size;
        if (b->offset > b->node->size - a->buffer)
            b->offset = 0;
    }
    task_mutex_unlock(&b->cursor);
    if (got && flush)
        flush_co(b);
    return got;
}

static void worker_task(void *arg) {
    struct worker *w = arg;
    struct bench *b = w->b;
    uint64_t offset;
    while (claim_co(b, &offset)) {
        struct iovec v = {w->buf, b->a->buffer};
        int rc = b->a->write ? disk_pwritev_co(b->node, offset, v.iov_len, &v, 1, 0)
                             : disk_preadv_co(b->node, offset, v.iov_len, &v, 1, 0);
        if (rc < 0)
            failed(b, rc, "request");
        if (--b->in_flight == 0)
            waitq_wake_all(&b->idle);
    }
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void print_plan(const struct bench *b) {
    const struct args *a = b->a;
    if (a->quiet)
        return;
    printf("Sending %" PRIu64 " %s requests, %" PRIu64 " bytes each, %" PRIu64
           " in parallel (starting at offset %" PRIu64 ", step size %" PRIu64 ")\n",
           a->count, a->write ? "write" : "read", a->buffer, a->depth, a->offset, b->step);
    if (a->flush_interval)
        printf("Sending flush every %" PRIu64 " requests\n", a->flush_interval);
}

static int run_co(struct bench *b) {
    struct worker *workers AUTO_FREE = calloc(b->a->depth, sizeof(*workers));
    struct task_group group;
    if (!workers)
        return err_set(&b->ctx->err, ENOMEM, "no memory for %" PRIu64 " requests", b->a->depth);
    print_plan(b);
    task_group_init(&group);
    double start = seconds();
    for (uint64_t i = 0; i < b->a->depth; i++) {
        workers[i] = (struct worker){b, b->memory + i * b->a->buffer};
        task_group_spawn(&group, loop_self(), worker_task, &workers[i]);
    }
    task_group_wait_co(&group);
    double end = seconds();
    if (b->error)
        return err_errno(&b->ctx->err, -b->error, "Failed %s", b->failed);
    if (!b->a->quiet)
        printf("Run completed in %3.3f seconds.\n", end - start);
    return 0;
}

static int bench_node_co(struct bench *b) {
    const struct args *a = b->a;
    struct verb_ctx *ctx = b->ctx;
    if (a->buffer > b->node->size || a->offset > b->node->size - a->buffer)
        return err_set(&ctx->err, EINVAL,
                       "%s: the disk of %" PRIu64 " bytes is too small for requests of %" PRIu64
                       " bytes at offset %" PRIu64,
                       b->node->filename, b->node->size, a->buffer, a->offset);
    if (a->buffer * a->depth > MEMORY_MAX)
        return err_set(&ctx->err, EINVAL,
                       "%" PRIu64 " requests of %" PRIu64 " bytes need more than %" PRIu64
                       " bytes of memory",
                       a->depth, a->buffer, MEMORY_MAX);
    void *memory;
    if (posix_memalign(&memory, 4096, align_up(a->buffer * a->depth, 4096)))
        return err_set(&ctx->err, ENOMEM, "no memory for %" PRIu64 " requests", a->depth);
    memset(memory, (int)a->pattern, a->buffer * a->depth);
    b->memory = memory;
    int rc = run_co(b);
    free(memory);
    return rc;
}

static int check_args(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    if (!a->write && a->flush_interval)
        return err_set(&ctx->err, EINVAL, "--flush-interval is only available in write tests");
    if (a->flush_interval && a->flush_interval < a->depth)
        return err_set(&ctx->err, EINVAL,
                       cli_words("--flush-interval is smaller than the depth (-d)",
                                 "Flush interval can't be smaller than depth"));
    bool direct = a->image.cache == CACHE_NONE || a->image.cache == CACHE_DIRECTSYNC;
    if ((a->native || a->aio == AIO_NATIVE) && !direct)
        return err_set(&ctx->err, EINVAL,
                       cli_words("%snative needs -t none or -t directsync",
                                 "Could not open '%s': aio=native was specified, but it requires "
                                 "cache.direct=on, which was not specified."),
                       dialect_is_qemu() ? ctx->pos[0] : "-i ");
    return 0;
}

/* Before the loop is made, which picks its way into the kernel. */
static int bench_prepare(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    int rc = check_args(ctx);
    if (rc == 0 && a->aio == AIO_THREADS)
        setenv("STRATA_AIO", "threads", 1);
    return rc;
}

static int bench_run_co(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    struct bench b = {
        .ctx = ctx, .a = a, .left = a->count, .offset = a->offset, .step = a->step ?: a->buffer};
    task_mutex_init(&b.cursor);
    waitq_init(&b.idle);
    int rc = cli_open_co(ctx, ctx->pos[0], &a->image, a->write ? OPEN_RW : 0, &b.node);
    if (rc < 0)
        return rc;
    if (a->write)
        dialect_warn_guessed(ctx, b.node);
    rc = bench_node_co(&b);
    node_unref_co(b.node);
    return rc;
}

static const char *const details[] = {
    "Sends requests of one size one behind the other over the disk, a number of them at a time, "
    "and says how long that took. With -w the content of the disk is lost.",
    NULL};

static const struct cli_example examples[] = {
    {"strata bench -t none -c 100000 disk.qcow2", "Read 4 KiB blocks, 64 at a time."},
    {"strata bench -w -s 64k -d 16 --flush-interval=16 scratch.qcow2",
     "Write, with a flush every 16 requests."},
    {NULL, NULL}};

const struct verb verb_bench = {
    .name = "bench",
    .summary = "time simple reads or writes of an image",
    .synopsis = "FILE",
    .pos_min = 1,
    .pos_max = 1,
    .opts = opts,
    .args_size = sizeof(struct args),
    .details = details,
    .examples = examples,
    .prepare = bench_prepare,
    .run_co = bench_run_co,
};
