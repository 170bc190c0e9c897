/* SPDX-License-Identifier: MIT */
#include "recorder.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/ck.h"
#include "base/cleanup.h"
#include "base/iov.h"
#include "disk/node.h"
#include "runtime/task.h"

static struct recorder *rec(struct node *n) {
    return n->state;
}

uint64_t recorder_tick(struct recorder *r) {
    return ++r->now;
}

static unsigned rnd(struct recorder *r, unsigned n) {
    r->seed = r->seed * 1103515245 + 12345;
    return (r->seed >> 16) % n;
}

static size_t record_begin(struct recorder *r, enum record_kind kind, uint64_t offset,
                           uint64_t length) {
    if (r->count == r->cap) {
        r->cap = r->cap ? r->cap * 2 : 256;
        r->log = realloc(r->log, r->cap * sizeof(*r->log));
        if (!r->log)
            abort();
    }
    r->log[r->count] = (struct record){.kind = kind,
                                       .offset = offset,
                                       .length = length,
                                       .start = recorder_tick(r),
                                       .end = UINT64_MAX,
                                       .durable = UINT64_MAX};
    return r->count++;
}

static void linger_co(struct recorder *r) {
    if (r->quiet)
        return;
    for (unsigned turns = rnd(r, 6); turns; turns--)
        task_yield_co();
}

/* Counts an operation; the chosen one fails. */
static int failing(struct recorder *r) {
    r->ops++;
    return r->fail_at && --r->fail_at == 0 ? -r->fail_error : 0;
}

static int recorder_preadv_co(struct node *n, uint64_t off, uint64_t len, const struct iovec *iov,
                              int niov, unsigned flags) {
    struct recorder *r = rec(n);
    int e = failing(r);
    if (e)
        return e;
    uint64_t have = off >= RECORDER_BYTES_MAX ? 0 : min_u64(len, RECORDER_BYTES_MAX - off);
    if (have)
        iov_from_buf(iov, niov, 0, r->bytes + off, have);
    if (have < len)
        iov_zero(iov, niov, have, len - have);
    linger_co(r);
    return 0;
}

static int recorder_pwritev_co(struct node *n, uint64_t off, uint64_t len, const struct iovec *iov,
                               int niov, unsigned flags) {
    struct recorder *r = rec(n);
    int e = failing(r);
    if (e)
        return e;
    if (off + len > RECORDER_BYTES_MAX)
        return -ENOSPC;
    if (r->quiet) {
        iov_to_buf(iov, niov, 0, r->bytes + off, len);
        n->size = max_u64(n->size, off + len);
        return 0;
    }
    size_t i = record_begin(r, RECORD_WRITE, off, len);
    r->log[i].bytes = malloc(len);
    iov_to_buf(iov, niov, 0, r->log[i].bytes, len);
    n->size = max_u64(n->size, off + len);
    linger_co(r);
    memcpy(r->bytes + off, r->log[i].bytes, len);
    r->log[i].end = recorder_tick(r);
    return 0;
}

static int recorder_zero_co(struct node *n, uint64_t off, uint64_t len, unsigned flags) {
    struct recorder *r = rec(n);
    int e = failing(r);
    if (e)
        return e;
    if (off + len > RECORDER_BYTES_MAX)
        return -ENOSPC;
    n->size = max_u64(n->size, off + len);
    if (r->quiet) {
        memset(r->bytes + off, 0, len);
        return 0;
    }
    size_t i = record_begin(r, RECORD_ZERO, off, len);
    linger_co(r);
    memset(r->bytes + off, 0, len);
    r->log[i].end = recorder_tick(r);
    return 0;
}

static int recorder_discard_co(struct node *n, uint64_t off, uint64_t len) {
    return off >= n->size ? 0 : recorder_zero_co(n, off, min_u64(len, n->size - off), 0);
}

static int recorder_truncate_co(struct node *n, uint64_t size, int prealloc, struct err *err) {
    struct recorder *r = rec(n);
    int e = failing(r);
    if (e)
        return e;
    if (size > RECORDER_BYTES_MAX)
        return -ENOSPC;
    if (size < n->size)
        memset(r->bytes + size, 0, n->size - size);
    n->size = size;
    if (r->quiet)
        return 0;
    size_t i = record_begin(r, RECORD_TRUNCATE, 0, size);
    r->log[i].end = recorder_tick(r);
    return 0;
}

static int recorder_flush_co(struct node *n) {
    struct recorder *r = rec(n);
    int e = failing(r);
    if (e)
        return e;
    if (r->quiet)
        return 0;
    size_t i = record_begin(r, RECORD_FLUSH, 0, 0);
    linger_co(r);
    r->log[i].end = recorder_tick(r);
    return 0;
}

static int recorder_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    rec(n)->bytes = calloc(1, RECORDER_BYTES_MAX);
    n->storage_flags = STORAGE_ZERO_INIT;
    return rec(n)->bytes ? 0 : -ENOMEM;
}

static void recorder_close_co(struct node *n) {
    recorder_clear(rec(n));
    free(rec(n)->log);
    if (!rec(n)->quiet)
        free(rec(n)->bytes);
}

void recorder_settle(struct recorder *r) {
    for (size_t i = 0; i < r->count; i++) {
        struct record *w = &r->log[i];
        w->durable = UINT64_MAX;
        for (size_t k = i; k < r->count; k++) {
            const struct record *f = &r->log[k];
            if (f->kind == RECORD_FLUSH && f->start > w->end && f->end < w->durable)
                w->durable = f->end;
        }
    }
}

void recorder_clear(struct recorder *r) {
    for (size_t i = 0; i < r->count; i++)
        free(r->log[i].bytes);
    r->count = 0;
}

void record_apply(const struct record *x, uint8_t *image, uint64_t *size, uint64_t sectors) {
    switch (x->kind) {
    case RECORD_FLUSH:
        return;
    case RECORD_TRUNCATE:
        if (x->length < *size)
            memset(image + x->length, 0, *size - x->length);
        *size = x->length;
        return;
    default:
        for (uint64_t at = 0; at < x->length;) {
            uint64_t n = min_u64(512 - (x->offset + at) % 512, x->length - at);
            if (sectors >> (at / 512 % 64) & 1) {
                if (x->kind == RECORD_WRITE)
                    memcpy(image + x->offset + at, x->bytes + at, n);
                else
                    memset(image + x->offset + at, 0, n);
            }
            at += n;
        }
        *size = max_u64(*size, x->offset + x->length);
    }
}

static const struct storage_ops recorder_ops = {.preadv_co = recorder_preadv_co,
                                                .pwritev_co = recorder_pwritev_co,
                                                .zero_co = recorder_zero_co,
                                                .discard_co = recorder_discard_co,
                                                .flush_co = recorder_flush_co,
                                                .truncate_co = recorder_truncate_co};

const struct driver driver_recorder = {.name = "recorder",
                                       .kind = DRIVER_STORAGE,
                                       .state_size = sizeof(struct recorder),
                                       .open_co = recorder_open_co,
                                       .close_co = recorder_close_co,
                                       .storage = &recorder_ops};
