/* SPDX-License-Identifier: MIT */
/*
 * What happens before the cut: the guests' requests and the workload's operations.
 *
 * Each request is told to the model before it begins and after it has ended.  An operation that is
 * alone waits for all requests under way, as a program would that quiesces the disk for it.
 */
#include <stdlib.h>
#include <string.h>

#include "base/ck.h"
#include "lab.h"
#include "runtime/loop.h"

void block_fill(uint8_t *p, uint32_t id) {
    for (unsigned i = 0; i < BLOCK; i += 8)
        le64_store(p + i, id);
}

void lab_flush(struct lab *l) {
    uint64_t start = machine_tick();
    lab_must(disk_flush_co(l->disk), NULL, "flush");
    if (l->disk->flags & NODE_NO_FLUSH)
        return; /* it promised nothing */
    l->flush = realloc(l->flush, ++l->flushes * sizeof(*l->flush));
    l->flush[l->flushes - 1] = (struct span){start, machine_tick()};
}

void lab_write(struct lab *l, uint64_t first, uint64_t count, bool fua) {
    uint32_t id = ++l->next_id;
    if (!model_take(l, first, count, id, false, fua && !(l->disk->flags & NODE_NO_FLUSH)))
        return;
    uint8_t *buf = buf_get(count * BLOCK);
    for (uint64_t i = 0; i < count; i++)
        block_fill(buf + i * BLOCK, id);
    struct iovec v = {buf, count * BLOCK};
    lab_must(disk_pwritev_co(l->disk, first * BLOCK, count * BLOCK, &v, 1, fua ? IO_FUA : 0), NULL,
             "write");
    buf_put(buf, count * BLOCK);
    model_done(l, first, count);
}

void lab_zero(struct lab *l, uint64_t first, uint64_t count) {
    if (!model_take(l, first, count, 0, false, false))
        return;
    lab_must(
        disk_zero_co(l->disk, first * BLOCK, count * BLOCK, lab_rnd(l, 2) ? ZERO_MAY_UNMAP : 0),
        NULL, "zero");
    model_done(l, first, count);
}

void lab_discard(struct lab *l, uint64_t first, uint64_t count) {
    if (!model_take(l, first, count, 0, true, false))
        return;
    lab_must(disk_discard_co(l->disk, first * BLOCK, count * BLOCK), NULL, "discard");
    model_done(l, first, count);
}

void lab_coded(struct lab *l, uint64_t at) {
    uint32_t unit = l->disk->granularity;
    uint64_t offset = align_down(at * BLOCK, unit);
    uint64_t count = min_u64(unit, l->disk->size - offset) / BLOCK;
    uint32_t id = ++l->next_id;
    if (!l->disk->codec || !model_take(l, offset / BLOCK, count, id, false, false))
        return;
    uint8_t *in = buf_get(unit), *out = buf_get(unit);
    for (uint64_t i = 0; i < unit / BLOCK; i++)
        block_fill(in + i * BLOCK, i < count ? id : 0);
    ssize_t n = l->disk->codec->encode(in, unit, out, unit);
    lab_must(n < 0 ? (int)n : 0, NULL, "encode");
    lab_must(disk_write_coded_co(l->disk, offset, out, (uint32_t)n), NULL, "coded write");
    buf_put(in, unit);
    buf_put(out, unit);
    model_done(l, offset / BLOCK, count);
}

void lab_resize(struct lab *l, uint64_t size, int prealloc) {
    struct err e AUTO_ERR = ERR_INIT;
    model_size_begin(l, size);
    lab_must(disk_resize_co(l->disk, size, prealloc, &e), &e, "resize");
    model_size_end(l);
}

void lab_fill_co(struct lab *l, struct node *n) {
    uint8_t *buf = buf_get(64 * KIB);
    for (uint64_t at = 0; at < n->size; at += 64 * KIB) {
        uint64_t len = min_u64(64 * KIB, n->size - at);
        uint32_t id = ++l->next_id;
        for (uint64_t i = 0; i < len; i += BLOCK)
            block_fill(buf + i, id);
        lab_must(disk_pwrite_co(n, at, buf, len), NULL, "filling");
    }
    buf_put(buf, 64 * KIB);
    lab_must(disk_flush_co(n), NULL, "flushing what was filled");
}

static void op_co(struct lab *l, const struct lab_op *op) {
    if (l->op_running)
        return;
    l->op_running = true;
    if (op->alone)
        task_rwlock_wrlock_co(&l->quiet);
    op->run_co(l);
    if (op->alone)
        task_rwlock_unlock(&l->quiet);
    l->op_running = false;
}

static void grow_co(struct lab *l) {
    lab_resize(l, min_u64(DISK_MAX, l->disk->size + (1 + lab_rnd(l, 256)) * BLOCK), PREALLOC_OFF);
}

static void request_co(struct lab *l, unsigned i, unsigned what) {
    const struct workload *w = l->w;
    uint64_t size = model_size(l);
    uint64_t blocks = (w->span ? min_u64(w->span, size) : size) / BLOCK;
    uint64_t count = 1 + lab_rnd(l, w->max_blocks), first = lab_rnd(l, (unsigned)blocks);
    unsigned edge = 0;
    if (w->drift)
        first += (size / BLOCK - blocks) * i / w->requests;
    count = min_u64(count, size / BLOCK - first);
    if (what < (edge += w->flush))
        lab_flush(l);
    else if (what < (edge += w->zero))
        lab_zero(l, first, count);
    else if (what < (edge += w->discard))
        lab_discard(l, first, count);
    else if (what < (edge += w->coded))
        lab_coded(l, first);
    else
        lab_write(l, first, count, what < edge + w->fua);
}

static void guest(void *arg) {
    static const struct lab_op grow = {.name = "grow", .run_co = grow_co};
    struct lab *l = arg;
    const struct workload *w = l->w;
    for (unsigned i = 0; i < w->requests; i++) {
        unsigned what = lab_rnd(l, 100), edge = w->grow;
        const struct lab_op *op = what < edge ? &grow : NULL;
        for (const struct lab_op *o = w->ops; o && o->name && !op; o++)
            if (what < (edge += o->share))
                op = o;
        if (op) {
            op_co(l, op);
        } else {
            task_rwlock_rdlock_co(&l->quiet);
            request_co(l, i, what - edge);
            task_rwlock_unlock(&l->quiet);
        }
        if (lab_rnd(l, 3) == 0)
            task_yield_co();
    }
}

void guests_co(struct lab *l) {
    struct task_group group;
    task_group_init(&group);
    for (int i = 0; i < TASKS; i++)
        task_group_spawn(&group, loop_self(), guest, l);
    task_group_wait_co(&group);
}
