/* SPDX-License-Identifier: MIT */
/*
 * Many tasks on one qcow2 image at once, on a storage that fails and loses power (flaky.h).
 *
 * The first bytes choose geometry and faults; then come rounds.  In a round up to eight tasks work
 * on neighbouring ranges (mostly of the same clusters, never of the same byte); when all have ended
 * a plain array is brought up to date.
 *
 * Invariants: a read gives what the array holds; an operation that failed leaves old or new bytes;
 * without failures the closed image is clean, with them it has leaks at most; a power cut at any
 * moment between rounds leaves leaks at most, and every byte that was not touched since the last
 * good flush as it was then.
 */
#include "flaky.h"

#include "runtime/task.h"

#define DISK_MAX (128 * KIB)
#define ROUNDS_MAX 40
#define TASKS_MAX 8

struct disk {
    struct node *file, *n, *base;
    uint64_t size;
    bool failed;
};

struct op {
    struct disk *d;
    unsigned kind;
    uint8_t fill;
    uint64_t at, len;
    int r;
};

static uint8_t model[DISK_MAX], flushed[DISK_MAX], touched[DISK_MAX], buf[DISK_MAX];
static uint8_t base_bytes[DISK_MAX];
static uint8_t bytes[TASKS_MAX][DISK_MAX]; /* what a task writes or has read */

static struct node *open_co(struct disk *d, struct node *file, unsigned flags) {
    struct open_req req = {.flags = flags | OPEN_NO_BACKING, .cache = CACHE_WRITEBACK};
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = NULL;
    int r = node_open_on_co(node_ref(file), driver_find("qcow2"), NULL, &req, &n, &e);
    FUZZ_CHECK(r == 0, "the image does not open: %s", err_text(&e));
    n->backing = d->base ? node_ref(d->base) : NULL;
    return n;
}

static void base_make_co(struct disk *d, uint64_t len) {
    struct open_req req = {.flags = 0};
    struct err e AUTO_ERR = ERR_INIT;
    struct node *file = fuzz_memory_co(0);
    for (uint64_t i = 0; i < len; i++)
        base_bytes[i] = (uint8_t)(i / 256 % 5 ? 1 + i / 256 % 251 : 0);
    FUZZ_CHECK(disk_pwrite_co(file, 0, base_bytes, len) == 0, "the memory disk refuses a write");
    int r = node_open_on_co(file, driver_find("raw"), NULL, &req, &d->base, &e);
    FUZZ_CHECK(r == 0, "the base does not open: %s", err_text(&e));
    memcpy(model, base_bytes, min_u64(len, d->size));
}

static bool create_co(struct disk *d, struct prog *g) {
    unsigned bits = 9 + prog_u8(g) % 6, flags = prog_u8(g), order = prog_u8(g) % 7;
    unsigned yields = prog_u8(g) % 200;
    bool v2 = flags & 1;
    d->size = 512 + prog_u16(g) * UINT64_C(2) % (DISK_MAX - 512) / 512 * 512;
    d->file = flaky_new_co(flags & 8 ? 8 * KIB + prog_u16(g) * UINT64_C(4) : 0, yields, order);
    json_t *o = json_pack("{s:s, s:I, s:I, s:I}", "compat", v2 ? "0.10" : "1.1", "cluster_size",
                          (json_int_t)(1u << bits), "refcount_bits",
                          (json_int_t)(v2 ? 16 : 1u << order), "size", (json_int_t)d->size);
    struct err e AUTO_ERR = ERR_INIT;
    int r = format_create_co(d->file, driver_find("qcow2"), o, &e);
    json_decref(o);
    FUZZ_CHECK(r == 0 || r == -ENOSPC, "creation failed: %s", err_text(&e));
    if (r || disk_flush_co(d->file) < 0)
        return false;
    memset(model, 0, sizeof(model));
    memset(touched, 0, sizeof(touched));
    if (flags & 2)
        base_make_co(d, 512 + prog_u16(g) * UINT64_C(2) % (DISK_MAX - 512));
    memcpy(flushed, model, sizeof(model));
    d->n = open_co(d, d->file, OPEN_RW | (flags & 4 ? OPEN_UNMAP : 0));
    if (flags & 16)
        flaky_fail(d->file, 1 + prog_u16(g) % 1024, prog_u8(g) % 8);
    return true;
}

/* ---- one task ---- */

enum { WRITE, WRITE_FUA, WRITE_DETECT, ZERO, ZERO_UNMAP, DISCARD, CODED, READ, KINDS };

static int coded_co(struct disk *d, const struct op *o, uint8_t *data) {
    static uint8_t code[TASKS_MAX][64 * KIB];
    uint8_t *out = code[(data - bytes[0]) / (ptrdiff_t)sizeof(bytes[0])];
    memset(data + o->len, 0, d->n->granularity - o->len);
    ssize_t len = d->n->codec->encode(data, d->n->granularity, out, d->n->granularity);
    return len > 0 ? disk_write_coded_co(d->n, o->at, out, (uint32_t)len)
                   : disk_pwrite_co(d->n, o->at, data, o->len);
}

static void op_task(void *arg) {
    struct op *o = arg;
    struct node *n = o->d->n;
    uint8_t *data = bytes[o->fill % TASKS_MAX];
    struct iovec v = {data, o->len};
    switch (o->kind) {
    case WRITE:
        o->r = disk_pwrite_co(n, o->at, data, o->len);
        break;
    case WRITE_FUA:
        o->r = disk_pwritev_co(n, o->at, o->len, &v, 1, IO_FUA);
        break;
    case WRITE_DETECT:
        o->r = disk_pwritev_co(n, o->at, o->len, &v, 1, IO_DETECT_ZEROES);
        break;
    case ZERO:
    case ZERO_UNMAP:
        o->r = disk_zero_co(n, o->at, o->len, o->kind == ZERO ? 0 : ZERO_MAY_UNMAP);
        break;
    case DISCARD:
        o->r = disk_discard_co(n, o->at, o->len);
        break;
    case CODED:
        o->r = coded_co(o->d, o, data);
        break;
    default:
        o->r = disk_pread_co(n, o->at, data, o->len);
    }
}

static void noise_task(void *arg) {
    struct disk *d = arg;
    if (disk_flush_co(d->n) < 0)
        d->failed = true;
}

/* ---- rounds ---- */

/* fill's low bits are the task's number; 0x80 makes zeros. */
static void op_prepare(struct op *o, unsigned task, struct prog *g) {
    uint8_t r = prog_u8(g);
    o->fill = (uint8_t)((r & 0xf8) | task);
    for (uint64_t i = 0; i < o->len; i++)
        bytes[task][i] = r & 0x80 ? 0 : (uint8_t)(o->fill + (r & 0x40 ? i / 17 : 0));
}

static void op_settle_co(struct disk *d, const struct op *o) {
    const uint8_t *data = bytes[o->fill % TASKS_MAX];
    static const uint8_t zeros[DISK_MAX];
    if (o->kind == READ) {
        FUZZ_CHECK(o->r == 0, "reading failed with %d", o->r);
        FUZZ_CHECK(!memcmp(data, model + o->at, o->len),
                   "[%" PRIu64 ", +%" PRIu64 ") read wrong while others wrote", o->at, o->len);
        return;
    }
    const uint8_t *want =
        o->kind == ZERO || o->kind == ZERO_UNMAP || o->kind == DISCARD ? zeros : data;
    memset(touched + o->at, 1, o->len);
    FUZZ_CHECK(o->r == 0 || o->r == -EIO || o->r == -ENOSPC, "an operation failed with %d", o->r);
    if (!o->r && o->kind != DISCARD) {
        memcpy(model + o->at, want, o->len);
        return;
    }
    d->failed |= o->r != 0;
    FUZZ_CHECK(disk_pread_co(d->n, o->at, buf, o->len) == 0, "reading failed");
    for (uint64_t i = 0; i < o->len; i++)
        FUZZ_CHECK(buf[i] == model[o->at + i] || buf[i] == want[i],
                   "byte %" PRIu64 " is %02x, neither old (%02x) nor new (%02x)", o->at + i, buf[i],
                   model[o->at + i], want[i]);
    memcpy(model + o->at, buf, o->len);
}

static void round_co(struct disk *d, struct prog *g) {
    struct op ops[TASKS_MAX] = {0};
    struct task_group group;
    unsigned head = prog_u8(g), tasks = 1 + head % TASKS_MAX, n = 0;
    uint64_t unit = 1 + (prog_u8(g) << (head >> 6) * 2), cluster = d->n->granularity;
    uint64_t at = prog_u16(g) * UINT64_C(4) % d->size;
    bool whole = head & 0x20;
    if (whole) { /* each task has clusters of its own */
        unit = cluster;
        at = align_down(at, cluster);
    }
    task_group_init(&group);
    for (; n < tasks && at < d->size; n++, at += unit) {
        struct op *o = &ops[n];
        *o = (struct op){.d = d, .kind = prog_u8(g) % KINDS, .at = at};
        o->len = min_u64(unit, d->size - at);
        if (o->kind == CODED && !whole)
            o->kind = WRITE;
        op_prepare(o, n, g);
        task_group_spawn(&group, loop_self(), op_task, o);
    }
    if (head & 0x10)
        task_group_spawn(&group, loop_self(), noise_task, d);
    task_group_wait_co(&group);
    for (unsigned i = 0; i < n; i++)
        op_settle_co(d, &ops[i]);
}

static void flush_co(struct disk *d) {
    if (disk_flush_co(d->n) < 0) {
        d->failed = true;
        return;
    }
    memcpy(flushed, model, sizeof(model));
    memset(touched, 0, sizeof(touched));
}

/* ---- the end ---- */

static void report(void *arg, bool is_leak, const char *text) {
    fprintf(stderr, "%s: %s\n", is_leak ? "leak" : "corruption", text);
}

/* Whether it has leaks. */
static bool judge_co(struct disk *d, struct node *file, const char *when) {
    struct check_result res = {0};
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = open_co(d, file, OPEN_CHECK);
    int r = n->drv->format->check_co(n, &res, &e);
    FUZZ_CHECK(r == 0 && !res.check_errors, "the check failed: %s", err_text(&e));
    if (res.corruptions) {
        res = (struct check_result){.report = report};
        n->drv->format->check_co(n, &res, &e);
    }
    FUZZ_CHECK(!res.corruptions, "%" PRIu64 " corruptions after %s", res.corruptions, when);
    node_unref_co(n);
    return res.leaks;
}

static void cut_co(struct disk *d, uint64_t seed) {
    struct node *file = flaky_cut_co(d->file, seed);
    judge_co(d, file, "a power cut");
    struct node *n = open_co(d, file, 0);
    FUZZ_CHECK(disk_pread_co(n, 0, buf, d->size) == 0, "reading failed after a power cut");
    for (uint64_t i = 0; i < d->size; i++)
        FUZZ_CHECK(touched[i] || buf[i] == flushed[i],
                   "byte %" PRIu64 " was flushed as %02x and is %02x after a power cut", i,
                   flushed[i], buf[i]);
    node_unref_co(n);
    node_unref_co(file);
}

static void finish_co(struct disk *d) {
    FUZZ_CHECK(disk_pread_co(d->n, 0, buf, d->size) == 0, "reading failed");
    FUZZ_CHECK(!memcmp(buf, model, d->size), "the content is wrong at the end");
    flush_co(d);
    node_unref_co(d->n);
    bool trouble = flaky_failed(d->file) || d->failed;
    flaky_fail(d->file, 0, 0);
    bool leaks = judge_co(d, d->file, "closing");
    FUZZ_CHECK(!leaks || trouble, "leaks although nothing failed");
    if (!trouble) {
        d->n = open_co(d, d->file, 0);
        FUZZ_CHECK(disk_pread_co(d->n, 0, buf, d->size) == 0, "reading failed");
        FUZZ_CHECK(!memcmp(buf, model, d->size), "the content is wrong after closing");
        node_unref_co(d->n);
    }
}

static void one_co(void *arg) {
    struct prog *g = arg;
    struct disk d = {0};
    if (create_co(&d, g)) {
        for (int i = 0; i < ROUNDS_MAX && prog_more(g); i++) {
            uint8_t what = prog_u8(g);
            if (what % 16 == 0)
                flush_co(&d);
            else if (what % 16 == 1)
                cut_co(&d, prog_u8(g));
            else
                round_co(&d, g);
        }
        finish_co(&d);
    }
    if (d.base)
        node_unref_co(d.base);
    node_unref_co(d.file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct prog g = {data, data + size};
    fuzz_run(one_co, &g);
    return 0;
}
