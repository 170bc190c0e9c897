/* SPDX-License-Identifier: MIT */
/*
 * The comparison: one walker over both maps, workers that read and compare.
 *
 * The two maps are walked side by side; a window is a run in which both keep their kind (zeros or
 * data), at most CHUNK bytes.  Behind the end of the shorter disk its side counts as zeros.
 *
 * The answer is the *first* difference although windows finish in any order: a difference found
 * only lowers `best`, no window at or behind `best` is handed out any more, and those before it
 * run to their end.  An error counts only when no difference lies before it.
 */
#include "job/compare.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/node.h"
#include "runtime/loop.h"
#include "runtime/task.h"

enum { CHUNK = 512 << 10, WORKERS_MAX = 16 };
static const uint64_t STATUS_MAX = (uint64_t)1 << 32;
static const int64_t PROGRESS_INTERVAL_NS = 100 * 1000 * 1000;

struct side {
    struct node *node;
    struct status st; /* valid while pos < end */
    uint64_t end;
};

struct compare {
    struct side side[2];
    const struct compare_opts *opts;
    uint64_t total; /* the larger size */

    struct task_mutex walk;
    uint64_t pos;

    struct compare_result *result;
    uint64_t best; /* first difference known; UINT64_MAX: none */

    struct err *e;
    int error;
    uint64_t error_at;

    uint64_t done;
    int64_t progress_ns;
};

struct worker {
    struct compare *c;
    uint64_t offset;
    uint32_t length;
    bool zero[2];
    uint8_t *buf[2];
};

static void differ(struct compare *c, enum compare_verdict verdict, uint64_t offset) {
    if (offset >= c->best)
        return;
    c->best = offset;
    c->result->verdict = verdict;
    c->result->offset = offset;
}

static void fail(struct compare *c, int error, enum compare_stage stage, const char *doing,
                 const struct node *n, uint64_t offset) {
    if (c->error && c->error_at <= offset)
        return;
    c->error = error;
    c->error_at = offset;
    c->result->stage = stage;
    err_errno(c->e, -error, "%s %s at offset %" PRIu64, doing, n->filename, offset);
}

static bool cancelled(const struct compare *c) {
    return c->opts->cancel && *c->opts->cancel;
}

/* ---------------------------------------------------------------- the walker */

static bool need_status_co(struct compare *c, struct side *s, uint64_t pos) {
    if (pos < s->end)
        return true;
    uint64_t size = s->node->size;
    if (pos >= size) {
        s->st = (struct status){.zero = true};
        s->end = UINT64_MAX;
        return true;
    }
    int r = disk_status_co(s->node, pos, min_u64(size - pos, STATUS_MAX), STATUS_PRECISE, &s->st);
    if (r < 0) {
        fail(c, r, COMPARE_MAP, "reading the map of", s->node, pos);
        return false;
    }
    s->end = pos + s->st.length;
    return true;
}

static bool same_allocation(const struct status *a, const struct status *b) {
    return a->present == b->present && a->data == b->data && a->zero == b->zero;
}

/* The next run of one kind on both sides from c->pos; false at an error or difference. */
static bool next_run_co(struct compare *c, uint64_t pos, uint64_t *end) {
    if (!need_status_co(c, &c->side[0], pos) || !need_status_co(c, &c->side[1], pos))
        return false;
    const struct status *a = &c->side[0].st, *b = &c->side[1].st;
    if (c->opts->strict && !same_allocation(a, b)) {
        differ(c, COMPARE_ALLOCATION, pos);
        return false;
    }
    *end = min_u64(min_u64(c->side[0].end, c->side[1].end), c->total);
    return true;
}

static void account(struct compare *c, uint64_t bytes) {
    c->done += bytes;
    int64_t now = loop_now_ns(loop_self());
    if (c->opts->progress && now - c->progress_ns >= PROGRESS_INTERVAL_NS) {
        c->progress_ns = now;
        c->opts->progress(c->opts->arg, c->done, c->total);
    }
}

static bool claim_locked_co(struct compare *c, struct worker *w) {
    w->length = 0;
    while (c->pos < c->total && c->pos < c->best && !c->error && !cancelled(c)) {
        uint64_t end;
        if (!next_run_co(c, c->pos, &end))
            break;
        bool za = c->side[0].st.zero, zb = c->side[1].st.zero;
        if (w->length && (za != w->zero[0] || zb != w->zero[1]))
            break;
        if (za && zb) {
            account(c, end - c->pos);
            c->pos = end;
            continue;
        }
        if (!w->length) {
            w->offset = c->pos;
            w->zero[0] = za;
            w->zero[1] = zb;
        }
        uint64_t n = min_u64(end - c->pos, CHUNK - w->length);
        w->length += n;
        c->pos += n;
        if (w->length == CHUNK)
            break;
    }
    return w->length > 0;
}

static bool claim_co(struct worker *w) {
    struct compare *c = w->c;
    task_mutex_lock_co(&c->walk);
    bool got = claim_locked_co(c, w);
    task_mutex_unlock(&c->walk);
    return got;
}

/* ---------------------------------------------------------------- the workers */

static size_t first_nonzero(const uint8_t *p, size_t len) {
    size_t i = 0, step = 4096;
    while (i < len && bytes_are_zero(p + i, min_u64(step, len - i)))
        i += step;
    while (i < len && !p[i])
        i++;
    return i;
}

static size_t first_difference(const uint8_t *a, const uint8_t *b, size_t len) {
    size_t i = 0, step = 4096;
    while (i < len && !memcmp(a + i, b + i, min_u64(step, len - i)))
        i += step;
    while (i < len && a[i] == b[i])
        i++;
    return i;
}

/* On a worker thread; touches only the worker. Where they differ, or the length. */
static int compare_work(void *arg) {
    struct worker *w = arg;
    if (w->zero[0])
        return first_nonzero(w->buf[1], w->length);
    if (w->zero[1])
        return first_nonzero(w->buf[0], w->length);
    /* memcmp of the whole is fastest and nearly always the answer. */
    if (!memcmp(w->buf[0], w->buf[1], w->length))
        return w->length;
    return first_difference(w->buf[0], w->buf[1], w->length);
}

static bool read_side_co(struct worker *w, int i) {
    if (w->zero[i])
        return true;
    struct node *n = w->c->side[i].node;
    struct iovec v = {w->buf[i], w->length};
    unsigned flags = node_storage(n)->flags & NODE_DIRECT ? 0 : IO_BULK;
    int r = disk_preadv_co(n, w->offset, w->length, &v, 1, flags);
    if (r < 0)
        fail(w->c, r, COMPARE_READ, "reading", n, w->offset);
    return r == 0;
}

static void worker_task(void *arg) {
    struct worker *w = arg;
    struct compare *c = w->c;
    while (claim_co(w)) {
        if (!read_side_co(w, 0) || !read_side_co(w, 1))
            continue;
        uint32_t same = offload_co(compare_work, w);
        if (same < w->length)
            differ(c, COMPARE_CONTENT, w->offset + same);
        account(c, w->length);
    }
}

static void worker_free(struct worker *w) {
    buf_put(w->buf[0], CHUNK);
    buf_put(w->buf[1], CHUNK);
    free(w);
}

static struct worker *worker_new(struct compare *c) {
    struct worker *w = calloc(1, sizeof(*w));
    if (!w)
        return NULL;
    w->c = c;
    w->buf[0] = buf_get(CHUNK);
    w->buf[1] = buf_get(CHUNK);
    if (w->buf[0] && w->buf[1])
        return w;
    worker_free(w);
    return NULL;
}

static int run_workers_co(struct compare *c) {
    struct worker *ws[WORKERS_MAX];
    unsigned want = c->opts->workers ? c->opts->workers : 2 * offload_width() + 2, n = 0;
    if (want > WORKERS_MAX)
        want = WORKERS_MAX;
    while (n < want && (ws[n] = worker_new(c)))
        n++;
    if (!n)
        return err_set(c->e, ENOMEM, "no memory for buffers of %d bytes", CHUNK);
    struct task_group group;
    task_group_init(&group);
    for (unsigned i = 0; i < n; i++)
        task_group_spawn(&group, loop_self(), worker_task, ws[i]);
    task_group_wait_co(&group);
    for (unsigned i = 0; i < n; i++)
        worker_free(ws[i]);
    return 0;
}

int compare_run_co(struct node *a, struct node *b, const struct compare_opts *opts,
                   struct compare_result *result, struct err *e) {
    *result = (struct compare_result){.verdict = COMPARE_SAME, .stage = COMPARE_OTHER};
    struct compare c = {
        .side = {{.node = a}, {.node = b}},
        .opts = opts,
        .total = max_u64(a->size, b->size),
        .result = result,
        .best = UINT64_MAX,
        .e = e,
    };
    if (opts->strict && a->size != b->size) {
        result->verdict = COMPARE_SIZE;
        result->offset = min_u64(a->size, b->size);
        return 0;
    }
    task_mutex_init(&c.walk);
    c.progress_ns = loop_now_ns(loop_self());
    int r = run_workers_co(&c);
    if (r < 0)
        return r;
    if (c.error && c.error_at < c.best)
        return c.error;
    err_clear(e);
    if (cancelled(&c))
        return err_set(e, ECANCELED, "cancelled");
    if (opts->progress)
        opts->progress(opts->arg, c.total, c.total);
    return 0;
}
