/* SPDX-License-Identifier: MIT */
/*
 * The copy engine: workers, order, errors.  See copy_int.h for the shape and the invariants.
 *
 *      claim (copy_walk.c) -> clone | read -> find zeros -> turn -> write, zero -> account
 *
 * Order.  Placement in the target happens at the start of a write, so it is enough to *begin* the
 * writes in order: a worker takes its turn, lets the next one go, and writes.  The tasks run one
 * after the other until each first suspends, which a placement in cached metadata does not; so
 * files come out dense and sequential while the data of many windows is on its way at once.
 * Compressed units are packed byte by byte, so there a turn lasts until the window's last unit has
 * its place.
 *
 * Zero detection looks at aligned blocks of the target, at least one unit large, because a format
 * can leave out whole units only.  A block is a candidate when its first and last words are zero;
 * when no block of a window is, nothing is scanned.  A scan runs on a worker thread.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include "job/copy_int.h"
#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "runtime/loop.h"

enum {
    SALVAGE_PIECE = 64 << 10,
};
static const int64_t PROGRESS_INTERVAL_NS = 100 * 1000 * 1000;
static const int64_t SLEEP_MAX_NS = 100 * 1000 * 1000; /* how late a cancel is noticed */

/* ---------------------------------------------------------------- errors, order */

int copy_fail(struct copy_job *j, int error, const char *doing, const struct node *n,
              uint64_t offset) {
    if (!j->error) {
        j->error = error;
        err_errno(j->e, -error, "%s %s at offset %" PRIu64, doing, n->filename, offset);
    }
    return error;
}

bool copy_stopped(const struct copy_job *j) {
    return j->error || (j->opts->cancel && *j->opts->cancel);
}

void copy_turn_co(struct copy_worker *k) {
    struct copy_job *j = k->job;
    if (!j->in_order || k->turn_passed)
        return;
    while (j->turn != k->w.ticket)
        waitq_wait_co(&j->turns);
}

void copy_turn_pass(struct copy_worker *k) {
    struct copy_job *j = k->job;
    if (!j->in_order || k->turn_passed)
        return;
    k->turn_passed = true;
    j->turn++;
    waitq_wake_all(&j->turns);
}

static bool is_direct(struct node *n) {
    return node_storage(n)->flags & NODE_DIRECT;
}

/* ---------------------------------------------------------------- zeros */

static bool block_is_candidate(const uint8_t *p, size_t len) {
    if (len < 16)
        return true;
    uint64_t a, b;
    memcpy(&a, p, sizeof(a));
    memcpy(&b, p + len - sizeof(b), sizeof(b));
    return !(a | b);
}

/* Length of the block that begins at buf[pos], when buf[0] lies at `at` of the target. */
static size_t block_length(uint64_t at, size_t pos, size_t len, uint32_t block) {
    size_t n = block - (at + pos) % block;
    return n < len - pos ? n : len - pos;
}

void copy_scan(const uint8_t *buf, uint64_t at, size_t len, uint32_t block,
               struct copy_zero_map *map) {
    unsigned i = 0;
    for (size_t pos = 0, n; pos < len; pos += n, i++) {
        n = block_length(at, pos, len, block);
        uint64_t bit = (uint64_t)1 << (i % 64);
        if (bytes_are_zero(buf + pos, n))
            map->bits[i / 64] |= bit;
        else
            map->bits[i / 64] &= ~bit;
    }
}

static int scan_worker(void *arg) {
    struct copy_worker *k = arg;
    struct copy_job *j = k->job;
    copy_scan(k->buf, j->dst_offset + k->w.offset, k->w.length, j->block, &k->map);
    return 0;
}

static void find_zeros_co(struct copy_worker *k) {
    struct copy_job *j = k->job;
    uint64_t at = j->dst_offset + k->w.offset;
    bool any = false;
    for (size_t pos = 0, n; pos < k->w.length && !any; pos += n) {
        n = block_length(at, pos, k->w.length, j->block);
        any = block_is_candidate(k->buf + pos, n);
    }
    if (any)
        offload_co(scan_worker, k);
    else
        memset(&k->map, 0, sizeof(k->map));
}

int copy_zero_co(struct copy_job *j, uint64_t at, uint64_t length) {
    if (j->opts->target_is_zero) {
        copy_punch_later(j, at, length);
        return 0;
    }
    int r = disk_zero_co(j->dst, at, length, ZERO_MAY_UNMAP);
    return r < 0 ? copy_fail(j, r, "writing zeros to", j->dst, at) : 0;
}

/* ---------------------------------------------------------------- reading */

/* A range that cannot be read in one piece: in pieces, then in sectors; the rest is zeros. */
static void salvage_co(struct copy_job *j, uint64_t offset, uint8_t *buf, size_t length) {
    uint64_t bad = 0, bad_length = 0;
    int bad_error = 0;
    for (size_t pos = 0, n; pos < length && !copy_stopped(j); pos += n) {
        uint64_t off = offset + pos;
        n = SALVAGE_PIECE - off % SALVAGE_PIECE;
        if (n > length - pos)
            n = length - pos;
        struct iovec whole = {buf + pos, n};
        if (disk_preadv_co(j->src, off, n, &whole, 1, j->read_flags) == 0)
            continue;
        for (size_t s = 0, m; s < n; s += m) {
            m = SALVAGE_SECTOR - (off + s) % SALVAGE_SECTOR;
            if (m > n - s)
                m = n - s;
            int r = disk_pread_co(j->src, off + s, buf + pos + s, m);
            if (r == 0)
                continue;
            memset(buf + pos + s, 0, m);
            if (bad_length && bad + bad_length == off + s && bad_error == r) {
                bad_length += m;
                continue;
            }
            if (bad_length && j->opts->damaged)
                j->opts->damaged(j->opts->arg, bad, bad_length, -bad_error);
            bad = off + s;
            bad_length = m;
            bad_error = r;
        }
    }
    if (bad_length && j->opts->damaged)
        j->opts->damaged(j->opts->arg, bad, bad_length, -bad_error);
}

static int read_part_co(struct copy_worker *k, size_t from, size_t to) {
    struct copy_job *j = k->job;
    if (from == to)
        return 0;
    uint64_t offset = k->w.offset + from;
    struct iovec v = {k->buf + from, to - from};
    int r = disk_preadv_co(j->src, offset, to - from, &v, 1, j->read_flags);
    if (r < 0 && j->opts->salvage) {
        salvage_co(j, offset, k->buf + from, to - from);
        return copy_stopped(j) ? -ECANCELED : 0;
    }
    return r < 0 ? copy_fail(j, r, "reading", j->src, offset) : 0;
}

int copy_read_co(struct copy_worker *k) {
    struct copy_window *w = &k->w;
    size_t pos = 0;
    for (unsigned i = 0; i < w->holes; i++) {
        int r = read_part_co(k, pos, w->hole[i].offset);
        if (r < 0)
            return r;
        memset(k->buf + w->hole[i].offset, 0, w->hole[i].length);
        pos = w->hole[i].offset + w->hole[i].length;
    }
    return read_part_co(k, pos, w->length);
}

/* ---------------------------------------------------------------- writing */

static int write_part_co(struct copy_worker *k, size_t from, size_t to) {
    struct copy_job *j = k->job;
    uint64_t at = j->dst_offset + k->w.offset + from;
    struct iovec v = {k->buf + from, to - from};
    int r = disk_pwritev_co(j->dst, at, to - from, &v, 1, j->write_flags);
    if (!r && j->opts->stable && !is_direct(j->dst))
        copy_writeback_later(j, to - from);
    return r < 0 ? copy_fail(j, r, "writing to", j->dst, at) : 0;
}

static void writeback_task(void *arg) {
    struct copy_job *j = arg;
    disk_writeback_co(j->dst);
    j->syncing = false;
}

void copy_writeback_later(struct copy_job *j, uint64_t length) {
    j->unsynced += length;
    if (j->unsynced < COPY_WRITEBACK || j->syncing)
        return;
    j->unsynced = 0;
    j->syncing = true;
    task_group_spawn(j->group, loop_self(), writeback_task, j);
}

/* Runs of blocks that are alike become one request each. */
static int write_runs_co(struct copy_worker *k) {
    struct copy_job *j = k->job;
    uint64_t at = j->dst_offset + k->w.offset;
    size_t len = k->w.length, start = 0;
    unsigned i = 0;
    bool zero = k->map.bits[0] & 1;
    for (size_t pos = 0; pos < len;) {
        pos += block_length(at, pos, len, j->block);
        i++;
        bool next = pos < len && (k->map.bits[i / 64] >> (i % 64) & 1);
        if (pos < len && next == zero)
            continue;
        int r = zero ? copy_zero_co(j, at + start, pos - start) : write_part_co(k, start, pos);
        if (r < 0)
            return r;
        start = pos;
        zero = next;
    }
    return 0;
}

static int plain_co(struct copy_worker *k) {
    struct copy_job *j = k->job;
    int r = copy_read_co(k);
    if (r < 0)
        return r;
    if (j->block)
        find_zeros_co(k);
    copy_turn_co(k);
    copy_turn_pass(k);
    if (copy_stopped(j))
        return -ECANCELED;
    return j->block ? write_runs_co(k) : write_part_co(k, 0, k->w.length);
}

/* A part of the window, run by run as the source's bytes lie. */
static int clone_part_co(struct copy_worker *k, uint64_t from, uint64_t to) {
    struct copy_job *j = k->job;
    int r = 0;
    for (uint64_t done = from, n; !r && done < to; done += n) {
        uint64_t at = k->w.offset + done;
        struct status st;
        r = disk_status_co(j->src, at, to - done, 0, &st);
        n = r ? 0 : st.length;
        if (!r)
            r = disk_copy_range_co(j->src, at, j->dst, j->dst_offset + at, n, COPY_RANGE_SHARE);
        if (!r)
            j->clone = CLONE_YES;
    }
    return r;
}

/* The parts between the zeros first: if one cannot be shared nothing else has been done. */
static int clone_runs_co(struct copy_worker *k) {
    const struct copy_window *w = &k->w;
    uint64_t from = 0;
    int r = 0;
    for (unsigned i = 0; !r && i < w->holes; i++) {
        r = clone_part_co(k, from, w->hole[i].offset);
        from = w->hole[i].offset + w->hole[i].length;
    }
    if (!r)
        r = clone_part_co(k, from, w->length);
    uint64_t at = k->job->dst_offset + w->offset;
    for (unsigned i = 0; !r && i < w->holes; i++)
        r = copy_zero_co(k->job, at + w->hole[i].offset, w->hole[i].length);
    return r;
}

/*
 * Lets the storage share the range's blocks; false: copy it by hand, all of it.  Only one worker
 * finds out whether the storage can, while the others work by hand.  Where it can, a window may
 * still be refused because its bytes do not lie in whole blocks.
 */
static bool clone_co(struct copy_worker *k) {
    struct copy_job *j = k->job;
    if (j->clone == CLONE_NO || j->clone == CLONE_TRYING)
        return false;
    if (j->clone == CLONE_UNTRIED)
        j->clone = CLONE_TRYING;
    int r = clone_runs_co(k);
    if (j->clone == CLONE_TRYING)
        j->clone = r == -ERANGE ? CLONE_UNTRIED : CLONE_NO;
    return r == 0;
}

static int window_co(struct copy_worker *k) {
    struct copy_job *j = k->job;
    if (k->w.kind == COPY_ZERO)
        return copy_zero_co(j, j->dst_offset + k->w.offset, k->w.length);
    if (j->opts->compress)
        return copy_coded_co(k);
    return clone_co(k) ? 0 : plain_co(k);
}

/* ---------------------------------------------------------------- pace, progress */

/* Each window takes its time slot before it starts. */
static void throttle_co(struct copy_job *j, uint64_t bytes) {
    uint64_t rate = j->opts->rate_bytes;
    if (!rate || !bytes)
        return;
    int64_t now = loop_now_ns(loop_self());
    int64_t start = j->rate_next_ns > now ? j->rate_next_ns : now;
    j->rate_next_ns = start + (int64_t)((double)bytes * 1e9 / (double)rate);
    while (!copy_stopped(j) && (now = loop_now_ns(loop_self())) < start)
        loop_sleep_co(start - now < SLEEP_MAX_NS ? start - now : SLEEP_MAX_NS);
}

static void account(struct copy_job *j, uint64_t bytes) {
    struct copy_progress *p = &j->progress;
    p->done += bytes;
    if (p->total < p->done)
        p->total = p->done;
    int64_t now = loop_now_ns(loop_self());
    if (j->opts->progress &&
        (j->opts->each_piece || now - j->progress_ns >= PROGRESS_INTERVAL_NS)) {
        j->progress_ns = now;
        j->opts->progress(j->opts->arg, p);
    }
}

static void worker_task(void *arg) {
    struct copy_worker *k = arg;
    struct copy_job *j = k->job;
    while (copy_claim_co(j, &k->w)) {
        k->turn_passed = false;
        throttle_co(j, k->w.data_bytes);
        int r = copy_stopped(j) ? -ECANCELED : window_co(k);
        copy_turn_co(k);
        copy_turn_pass(k);
        if (r == 0)
            account(j, k->w.data_bytes);
    }
}

/* ---------------------------------------------------------------- the job */

static void plan(struct copy_job *j) {
    const struct copy_opts *o = j->opts;
    /* A unit larger than a window is written by several: the first makes its room. */
    uint32_t gran = (uint32_t)min_u64(max_u64(j->dst->granularity, 1), COPY_CHUNK_MAX);
    j->unit = o->compress ? gran : max_u64(gran, 4096);
    j->chunk = max_u64(align_down(COPY_CHUNK, j->unit), j->unit);
    if (o->sparse_bytes) {
        uint32_t s = o->sparse_bytes < COPY_BLOCK_MIN ? COPY_BLOCK_MIN : o->sparse_bytes;
        while (s & (s - 1))
            s &= s - 1; /* largest power of two within */
        j->block = min_u64(max_u64(s, gran), j->chunk);
    }
    /* Direct requests wait in the kernel, not on a processor: they need no worker thread. */
    j->read_flags = is_direct(j->src) ? 0 : IO_BULK;
    j->write_flags = is_direct(j->dst) ? 0 : IO_BULK;
    j->in_order = o->in_order || o->compress;
    bool may_share =
        node_storage(j->src)->storage_flags & node_storage(j->dst)->storage_flags & STORAGE_SHARES;
    j->clone = may_share && j->block ? CLONE_UNTRIED : CLONE_NO;
    unsigned flags = node_storage(j->dst)->storage_flags;
    /* Not a device, whose room is there, and not memory, which would be written twice. */
    j->ahead = o->target_is_zero && gran == 1 && j->block && flags & STORAGE_ZERO_INIT &&
               !(flags & STORAGE_IN_MEMORY);
}

static unsigned worker_count(const struct copy_job *j) {
    unsigned n = j->opts->workers;
    if (!n) {
        n = 2 * offload_width() + 2;
        if (n < 6)
            n = 6;
    }
    uint64_t each = j->chunk * (j->opts->compress ? 2 : 1);
    uint64_t most = min_u64(COPY_MEMORY / each, COPY_WORKERS_MAX);
    return n < most ? n : most;
}

static void worker_free(struct copy_worker *k, size_t chunk) {
    buf_put(k->buf, chunk);
    buf_put(k->code, chunk);
    free(k->coded);
    free(k);
}

static struct copy_worker *worker_new(struct copy_job *j) {
    struct copy_worker *k = calloc(1, sizeof(*k));
    if (!k)
        return NULL;
    k->job = j;
    k->buf = buf_get(j->chunk);
    if (j->opts->compress) {
        k->code = buf_get(j->chunk);
        k->coded = calloc(j->chunk / j->unit, sizeof(*k->coded));
    }
    if (!k->buf || (j->opts->compress && (!k->code || !k->coded))) {
        worker_free(k, j->chunk);
        return NULL;
    }
    return k;
}

static int run_workers_co(struct copy_job *j) {
    struct copy_worker *ks[COPY_WORKERS_MAX];
    unsigned want = worker_count(j), n = 0;
    while (n < want && (ks[n] = worker_new(j)))
        n++;
    if (!n)
        return err_set(j->e, ENOMEM, "no memory for a copy buffer of %" PRIu64 " bytes", j->chunk);

    struct task_group group;
    task_group_init(&group);
    j->group = &group;
    for (unsigned i = 0; i < n; i++)
        task_group_spawn(&group, loop_self(), worker_task, ks[i]);
    task_group_wait_co(&group);
    for (unsigned i = 0; i < n; i++)
        worker_free(ks[i], j->chunk);
    return 0;
}

static int check_request(struct copy_job *j) {
    struct node *src = j->src, *dst = j->dst;
    uint64_t end;
    if (j->length > src->size)
        return err_set(j->e, EINVAL, "cannot copy %" PRIu64 " bytes from %s, which has %" PRIu64,
                       j->length, src->filename, src->size);
    if (!ck_add(j->dst_offset, j->length, &end) || end > dst->size)
        return err_set(j->e, ENOSPC,
                       "%s has %" PRIu64 " bytes, too few for %" PRIu64 " at offset %" PRIu64,
                       dst->filename, dst->size, j->length, j->dst_offset);
    if (j->opts->compress && !dst->codec)
        return err_set(j->e, ENOTSUP, "%s: format %s cannot hold compressed data%s", dst->filename,
                       dst->drv->name, dst->data_file ? " in an external data file" : "");
    if (j->opts->compress && dst->granularity > COPY_CHUNK_MAX)
        return err_set(j->e, ENOTSUP, "%s: compressed units of %u bytes are larger than %u",
                       dst->filename, dst->granularity, COPY_CHUNK_MAX);
    return 0;
}

int copy_run_co(struct node *src, struct node *dst, uint64_t length, uint64_t dst_offset,
                const struct copy_opts *opts, struct err *e) {
    struct copy_job j = {
        .src = src, .dst = dst, .length = length, .dst_offset = dst_offset, .opts = opts, .e = e};
    int r = check_request(&j);
    if (r < 0 || !length)
        return r;
    task_mutex_init(&j.walk);
    waitq_init(&j.turns);
    plan(&j);
    if (opts->progress) {
        j.progress.total = copy_estimate_co(&j);
        j.progress_ns = loop_now_ns(loop_self());
        opts->progress(opts->arg, &j.progress);
    }

    r = run_workers_co(&j);
    copy_punch_co(&j);
    if (r < 0)
        return r;
    if (j.error)
        return j.error;
    if (opts->cancel && *opts->cancel)
        return err_set(e, ECANCELED, "cancelled");
    if (opts->progress) {
        j.progress.done = j.progress.total;
        opts->progress(opts->arg, &j.progress);
    }
    return 0;
}
