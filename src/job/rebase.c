/* SPDX-License-Identifier: MIT */
/*
 * The rebase: one walker over three maps, workers that read, compare and write.
 *
 *      image     |####|....|....|....|....|      # held by the image itself: passed over
 *      old base  |    |AAAA|AAAA|    |CCCC|      . holes
 *      new base  |    |AAAA|BBBB|BBBB|    |
 *      verdict    skip look look zero look
 *
 * Inside a hole of the image nothing is read where both bases read as zeros, or where both answers
 * come from the same place of the same file (a common ancestor); where only the old one does, the
 * image gets zeros.  Everything else is read and compared unit by unit (the image's clusters), and
 * units that differ are written whole.
 *
 * Invariants
 *  1. The image reads the same at every moment: what is written is what the old base holds there.
 *  2. Windows begin and end at units of the image or at the end of the disk, and are handed out
 *     once, so no two workers write into one unit.  Only of units above 2 MiB (VHDX) windows are
 *     parts: what comes to lie beside a part that is written is the old base's content too, so that
 *     a second worker writes what is there already.
 *  3. Behind the end of a base it counts as zeros.
 *  4. Only the first error is kept; after it no further window is handed out.
 *  5. Writes begin in the order of the windows, so that the image's clusters lie in order: a window
 *     holds its turn until its last write begins.  Every ticket passes its turn once, errors too.
 */
#include "job/rebase.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "base/plant.h"
#include "disk/io.h"
#include "disk/node.h"
#include "runtime/loop.h"
#include "runtime/task.h"

enum { CHUNK = 1 << 20, WORKERS = 8, WRITEBACK = 32 << 20 };
static const uint64_t STATUS_MAX = (uint64_t)1 << 32;
static const uint64_t ZERO_WINDOW_MAX = (uint64_t)1 << 30;
static const int64_t PROGRESS_INTERVAL_NS = 100 * 1000 * 1000;

/* Which file a layer lies in. */
struct layer_id {
    bool known;
    dev_t dev;
    ino_t ino;
};

struct side {
    struct node *node; /* NULL: no backing file */
    struct layer_id *ids;
    unsigned layers;
    struct status st; /* valid while pos < end */
    uint64_t end;
};

enum verdict { SKIP, ZERO, LOOK };

struct rebase {
    struct node *image;
    struct side old, new;
    const struct rebase_opts *opts;
    struct err *e;
    int error;
    uint64_t unit, chunk;

    struct task_mutex walk;
    uint64_t pos;
    uint64_t hole_end; /* the image has a hole in [pos, hole_end) */
    uint64_t tickets, turn;
    struct waitq turns;
    int64_t progress_ns;

    /* A flush comes at the end: the disk begins before. */
    uint64_t unsynced;
    bool syncing;
    struct task_group *group;
};

struct worker {
    struct rebase *r;
    uint64_t offset, length, ticket;
    bool passed; /* the turn */
    enum verdict verdict;
    uint8_t *old, *new; /* chunk bytes each */
    uint8_t *code;      /* one unit; only when compressing */
    const uint8_t *encode_from;
    ssize_t encoded;
};

static int fail(struct rebase *r, int error, const char *doing, const struct node *n,
                uint64_t offset) {
    if (!r->error) {
        r->error = error;
        err_errno(r->e, -error, "%s %s at offset %" PRIu64, doing, n->filename, offset);
    }
    return error;
}

static bool stopped(const struct rebase *r) {
    return r->error || (r->opts->cancel && *r->opts->cancel);
}

/* ---------------------------------------------------------------- the two bases */

static void side_init(struct side *s, struct node *n) {
    *s = (struct side){.node = n};
    for (struct node *l = n; l; l = l->backing)
        s->layers++;
    s->ids = calloc(s->layers + 1, sizeof(*s->ids));
    unsigned i = 0;
    for (struct node *l = n; l && s->ids; l = l->backing, i++) {
        const struct node *file = node_storage(l);
        struct stat st;
        if (strcmp(file->drv->name, "file") || stat(file->filename, &st) < 0)
            continue;
        s->ids[i] = (struct layer_id){true, st.st_dev, st.st_ino};
    }
}

static bool need_status_co(struct rebase *r, struct side *s, uint64_t pos) {
    if (pos < s->end)
        return true;
    if (!s->node || pos >= s->node->size) {
        s->st = (struct status){.zero = true};
        s->end = UINT64_MAX;
        return true;
    }
    uint64_t ask = min_u64(s->node->size - pos, STATUS_MAX);
    int rc = disk_status_co(s->node, pos, ask, STATUS_PRECISE, &s->st);
    if (rc < 0) {
        fail(r, rc, "reading the map of", s->node, pos);
        return false;
    }
    s->st.zero = s->st.zero || !s->st.present;
    s->st.host_offset -= s->st.storage ? pos : 0; /* the same for all of a file's run */
    s->end = pos + s->st.length;
    return true;
}

/* Both answers lie at one place of one file, so they are the same bytes. */
static bool same_place(const struct side *a, const struct side *b) {
    if (!a->st.present || !b->st.present || a->st.depth >= a->layers || b->st.depth >= b->layers)
        return false;
    const struct layer_id *x = &a->ids[a->st.depth], *y = &b->ids[b->st.depth];
    return x->known && y->known && x->dev == y->dev && x->ino == y->ino &&
           a->st.layer->drv == b->st.layer->drv && a->st.layer->size == b->st.layer->size &&
           a->st.coded == b->st.coded && a->st.host_offset == b->st.host_offset;
}

/* One verdict from pos to *end. */
static int judge_co(struct rebase *r, uint64_t pos, enum verdict *verdict, uint64_t *end) {
    if (!need_status_co(r, &r->old, pos) || !need_status_co(r, &r->new, pos))
        return -EIO; /* the error itself is kept */
    bool old_zero = r->old.st.zero, new_zero = r->new.st.zero;
    *end = min_u64(r->old.end, r->new.end);
    if ((old_zero && new_zero) || same_place(&r->old, &r->new))
        *verdict = SKIP;
    else
        *verdict = old_zero ? ZERO : LOOK;
    return 0;
}

/* ---------------------------------------------------------------- the walker */

/* Moves pos to the image's next hole; false at the end or an error. */
static bool find_hole_co(struct rebase *r) {
    uint64_t size = r->image->size;
    while (r->pos < size && r->pos >= r->hole_end) {
        struct status st;
        uint64_t ask = min_u64(size - r->pos, STATUS_MAX);
        int rc = disk_status_co(r->image, r->pos, ask, STATUS_TOP_ONLY, &st);
        if (rc < 0) {
            fail(r, rc, "reading the map of", r->image, r->pos);
            return false;
        }
        if (st.present)
            r->pos += st.length;
        else
            r->hole_end = r->pos + st.length;
    }
    return r->pos < size;
}

/* The end of the first unit at or behind `to`, inside the hole. */
static uint64_t unit_up(const struct rebase *r, uint64_t to) {
    return min_u64(align_up(to, r->unit), r->hole_end);
}

static bool claim_locked_co(struct rebase *r, struct worker *w) {
    while (!stopped(r) && find_hole_co(r)) {
        enum verdict verdict;
        uint64_t end, pos = r->pos;
        if (judge_co(r, pos, &verdict, &end) < 0)
            return false;
        end = min_u64(end, r->hole_end);
        uint64_t whole = end == r->hole_end ? end : align_down(end, r->unit);
        if (whole <= pos) { /* a unit with more than one answer */
            verdict = LOOK;
            end = unit_up(r, pos + 1);
        } else {
            end = verdict == LOOK ? unit_up(r, end) : whole;
        }
        if (verdict == LOOK)
            end = min_u64(end, pos + r->chunk);
        else if (verdict == ZERO)
            end = min_u64(end, pos + ZERO_WINDOW_MAX);
        r->pos = end;
        if (verdict == SKIP)
            continue;
        w->offset = pos;
        w->length = end - pos;
        w->verdict = verdict;
        w->ticket = r->tickets++;
        w->passed = false;
        return true;
    }
    return false;
}

static void report(struct rebase *r) {
    int64_t now = loop_now_ns(loop_self());
    if (!r->opts->progress || now - r->progress_ns < PROGRESS_INTERVAL_NS)
        return;
    r->progress_ns = now;
    r->opts->progress(r->opts->arg, r->pos, r->image->size);
}

static bool claim_co(struct worker *w) {
    struct rebase *r = w->r;
    task_mutex_lock_co(&r->walk);
    bool got = claim_locked_co(r, w);
    report(r);
    task_mutex_unlock(&r->walk);
    return got;
}

/* ---------------------------------------------------------------- the work */

static void turn_co(struct worker *w) {
    while (!w->passed && w->r->turn != w->ticket)
        waitq_wait_co(&w->r->turns);
}

static void turn_pass(struct worker *w) {
    if (w->passed)
        return;
    w->passed = true;
    w->r->turn++;
    waitq_wake_all(&w->r->turns);
}

static int read_side_co(struct worker *w, const struct side *s, uint8_t *buf) {
    uint64_t have =
        s->node && w->offset < s->node->size ? min_u64(w->length, s->node->size - w->offset) : 0;
    memset(buf + have, 0, w->length - have);
    if (!have)
        return 0;
    struct iovec v = {buf, have};
    int rc = disk_preadv_co(s->node, w->offset, have, &v, 1, IO_BULK);
    return rc < 0 ? fail(w->r, rc, "reading", s->node, w->offset) : 0;
}

static int encode_worker(void *arg) {
    struct worker *w = arg;
    const struct codec *codec = w->r->image->codec;
    w->encoded = codec->encode(w->encode_from, w->r->unit, w->code, w->r->unit);
    return 0;
}

/* Units one by one; those that do not get smaller are written as they are. */
static int write_coded_co(struct worker *w, uint64_t from, uint64_t to) {
    struct rebase *r = w->r;
    int rc = 0;
    for (uint64_t at = from; rc == 0 && at < to; at += r->unit) {
        uint64_t length = min_u64(r->unit, to - at);
        w->encode_from = w->old + at;
        memset(w->old + at + length, 0, r->unit - length); /* the last unit of the disk */
        offload_co(encode_worker, w);
        if (w->encoded > 0)
            rc = disk_write_coded_co(r->image, w->offset + at, w->code, (uint32_t)w->encoded);
        else
            rc = disk_pwrite_co(r->image, w->offset + at, w->old + at, length);
    }
    return rc;
}

/*
 * Zeros of the image's own.  A format without zeros as such leaves a hole where the range reads so
 * already, over the old base: there they are written as data, from the buffer `zeros`.
 */
static int put_zeros_co(struct worker *w, uint64_t offset, uint64_t length, uint8_t *zeros,
                        uint64_t zeros_length) {
    struct rebase *r = w->r;
    struct status st;
    int rc = disk_zero_co(r->image, offset, length, ZERO_MAY_UNMAP | ZERO_PRESENT);
    if (rc == 0)
        rc = disk_status_co(r->image, offset, length, STATUS_TOP_ONLY, &st);
    if (rc < 0 || st.present)
        return rc;
    memset(zeros, 0, zeros_length);
    for (uint64_t n; rc == 0 && length; offset += n, length -= n) {
        n = min_u64(length, zeros_length);
        struct iovec v = {zeros, n};
        rc = disk_pwritev_co(r->image, offset, n, &v, 1, IO_BULK);
    }
    return rc;
}

static void writeback_task(void *arg) {
    struct rebase *r = arg;
    disk_writeback_co(r->image);
    r->syncing = false;
}

static void writeback_later(struct rebase *r, uint64_t length) {
    r->unsynced += length;
    if (r->unsynced < WRITEBACK || r->syncing)
        return;
    r->unsynced = 0;
    r->syncing = true;
    task_group_spawn(r->group, loop_self(), writeback_task, r);
}

static int write_run_co(struct worker *w, uint64_t from, uint64_t to, bool zero) {
    struct rebase *r = w->r;
    struct iovec v = {w->old + from, to - from};
    int rc;
    if (!r->opts->compress) { /* coded units are packed as they come, encoded side by side */
        turn_co(w);
        if (to == w->length)
            turn_pass(w);
    }
    if (zero)
        rc = put_zeros_co(w, w->offset + from, to - from, w->old + from, to - from);
    else if (r->opts->compress)
        rc = write_coded_co(w, from, to);
    else
        rc = disk_pwritev_co(r->image, w->offset + from, to - from, &v, 1, IO_BULK);
    if (!rc && !zero)
        writeback_later(r, to - from);
    return rc < 0 ? fail(r, rc, "writing to", r->image, w->offset + from) : 0;
}

/* What a unit needs: 0 nothing, 1 zeros, 2 its old content. */
static int unit_needs(const struct worker *w, uint64_t at, uint64_t length) {
    if (!memcmp(w->old + at, w->new + at, length))
        return 0;
    return bytes_are_zero(w->old + at, length) ? 1 : 2;
}

static int look_co(struct worker *w) {
    struct rebase *r = w->r;
    int rc = read_side_co(w, &r->old, w->old);
    if (rc == 0)
        rc = read_side_co(w, &r->new, w->new);
    uint64_t start = 0, at = 0;
    int needs = 0;
    while (rc == 0) {
        uint64_t length = min_u64(r->unit, w->length - at);
        int n = length ? unit_needs(w, at, length) : 0;
        if (n != needs || !length) {
            if (needs)
                rc = write_run_co(w, start, at, needs == 1);
            start = at;
            needs = n;
        }
        if (!length)
            break;
        at += length;
    }
    return rc;
}

static int zero_window_co(struct worker *w) {
    struct rebase *r = w->r;
    turn_co(w);
    turn_pass(w);
    int rc = put_zeros_co(w, w->offset, w->length, w->old, r->chunk);
    return rc < 0 ? fail(r, rc, "writing zeros to", r->image, w->offset) : 0;
}

static void worker_task(void *arg) {
    struct worker *w = arg;
    while (claim_co(w)) {
        int rc = w->verdict == ZERO ? zero_window_co(w) : look_co(w);
        turn_co(w);
        turn_pass(w);
        if (rc < 0)
            return;
    }
}

/* ---------------------------------------------------------------- the job */

static void worker_free(struct worker *w) {
    buf_put(w->old, w->r->chunk);
    buf_put(w->new, w->r->chunk);
    buf_put(w->code, w->r->unit);
}

static bool worker_init(struct worker *w, struct rebase *r) {
    *w = (struct worker){.r = r, .old = buf_get(r->chunk), .new = buf_get(r->chunk)};
    if (r->opts->compress)
        w->code = buf_get(r->unit);
    if (w->old && w->new && (w->code || !r->opts->compress))
        return true;
    worker_free(w);
    return false;
}

static int run_workers_co(struct rebase *r) {
    struct worker w[WORKERS];
    unsigned n = 0;
    while (n < WORKERS && worker_init(&w[n], r))
        n++;
    if (!n)
        return err_set(r->e, ENOMEM, "no memory for buffers of %" PRIu64 " bytes", r->chunk);
    struct task_group group;
    task_group_init(&group);
    r->group = &group;
    for (unsigned i = 0; i < n; i++)
        task_group_spawn(&group, loop_self(), worker_task, &w[i]);
    task_group_wait_co(&group);
    for (unsigned i = 0; i < n; i++)
        worker_free(&w[i]);
    if (r->error)
        return r->error;
    return stopped(r) ? err_set(r->e, ECANCELED, "interrupted") : 0;
}

int rebase_copy_co(struct node *image, struct node *base, const struct rebase_opts *opts,
                   struct err *e) {
    struct rebase r = {.image = image, .opts = opts, .e = e};
    if (opts->compress && !image->codec)
        return err_set(e, ENOTSUP, "%s: format %s cannot hold compressed data%s", image->filename,
                       image->drv->name, image->data_file ? " in an external data file" : "");
    r.unit = max_u64(image->granularity, 1);
    if (r.unit == 1)
        r.unit = 65536;
    if (r.unit > 2 * CHUNK && opts->compress)
        return err_set(e, ENOTSUP, "%s: units of %" PRIu64 " bytes are larger than %d",
                       image->filename, r.unit, 2 * CHUNK);
    if (r.unit > 2 * CHUNK) /* the engine copies the rest of a unit; parts of it are looked at */
        r.unit = CHUNK;
    r.chunk = max_u64(r.unit, CHUNK);
    task_mutex_init(&r.walk);
    waitq_init(&r.turns);
    side_init(&r.old, image->backing);
    side_init(&r.new, base);
    r.progress_ns = loop_now_ns(loop_self());
    int rc = r.old.ids && r.new.ids ? run_workers_co(&r) : err_set(e, ENOMEM, "no memory");
    free(r.old.ids);
    free(r.new.ids);
    if (rc == 0 && !PLANTED(REBASE_NAMED_EARLY)) {
        rc = disk_flush_co(image);
        if (rc < 0)
            err_errno(e, -rc, "flushing %s", image->filename);
    }
    return rc;
}

int rebase_switch_co(struct node *image, const char *name, const char *format, struct err *e) {
    if (!image->drv->format || !image->drv->format->set_backing_co)
        return err_set(e, ENOTSUP, "%s: format '%s' has no backing files", image->filename,
                       image->drv->name);
    node_quiesce_co(image);
    int rc = image->drv->format->set_backing_co(image, name, format, e);
    node_resume(image);
    if (rc < 0)
        return err_prefix(e, "%s", image->filename);
    rc = disk_flush_co(image);
    return rc < 0 ? err_errno(e, -rc, "flushing %s", image->filename) : 0;
}
