/* SPDX-License-Identifier: MIT */
/* See forgetful.h. */
#include "forgetful.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "base/iov.h"
#include "disk/engine.h"
#include "runtime/loop.h"

uint64_t rng_state;

uint64_t rng(uint64_t below) {
    rng_state ^= rng_state << 13;
    rng_state ^= rng_state >> 7;
    rng_state ^= rng_state << 17;
    return (rng_state * UINT64_C(0x2545f4914f6cdd1d) >> 11) % below;
}

static void maybe_yield_co(void) {
    while (rng(3) == 0)
        task_yield_co();
}

static bool fails(const struct disk *d) {
    return d->fail_one_in && rng(d->fail_one_in) == 0;
}

static int disk_read_co(struct node *n, uint64_t off, uint64_t len, const struct iovec *iov,
                        int niov, unsigned flags) {
    struct disk *d = n->state;
    maybe_yield_co();
    if (fails(d))
        return -EIO;
    uint64_t have = off >= n->size ? 0 : min_u64(len, n->size - off);
    if (have)
        iov_from_buf(iov, niov, 0, d->now + off, have);
    iov_zero(iov, niov, have, len - have);
    return 0;
}

static int disk_write_co(struct node *n, uint64_t off, uint64_t len, const struct iovec *iov,
                         int niov, unsigned flags) {
    struct disk *d = n->state;
    if (off + len > d->capacity)
        return -ENOSPC;
    struct record *r = calloc(1, sizeof(*r));
    *r = (struct record){off, len, false, malloc(len)};
    iov_to_buf(iov, niov, 0, r->bytes, len);
    if (d->pending_n == d->pending_cap) {
        d->pending_cap = d->pending_cap ? d->pending_cap * 2 : 64;
        d->pending = realloc(d->pending, d->pending_cap * sizeof(*d->pending));
    }
    d->pending[d->pending_n++] = r;
    maybe_yield_co();
    memcpy(d->now + off, r->bytes, len);
    n->size = max_u64(n->size, off + len);
    maybe_yield_co();
    r->complete = true;
    return fails(d) ? -EIO : 0;
}

int disk_sync_co(struct node *n) {
    struct disk *d = n->state;
    size_t covered = 0;
    if (d->before_sync_co)
        d->before_sync_co(d->arg);
    struct record **r = calloc(d->pending_n + 1, sizeof(*r));
    for (size_t i = 0; i < d->pending_n; i++)
        if (d->pending[i]->complete)
            r[covered++] = d->pending[i];
    maybe_yield_co();
    maybe_yield_co();
    d->flushes++;
    if (fails(d)) {
        free(r);
        return -EIO;
    }
    for (size_t i = 0; i < covered; i++) {
        size_t at = 0;
        while (at < d->pending_n && d->pending[at] != r[i])
            at++;
        if (at == d->pending_n)
            continue; /* another flush was faster */
        memcpy(d->stable + r[i]->offset, r[i]->bytes, r[i]->length);
        d->stable_size = max_u64(d->stable_size, r[i]->offset + r[i]->length);
        memmove(d->pending + at, d->pending + at + 1, (--d->pending_n - at) * sizeof(*d->pending));
        free(r[i]->bytes);
        free(r[i]);
    }
    free(r);
    return 0;
}

static int disk_trim_co(struct node *n, uint64_t off, uint64_t len) {
    if (off >= n->size)
        return 0;
    len = min_u64(len, n->size - off);
    uint8_t *zeros = calloc(1, len);
    struct iovec v = {zeros, len};
    int r = disk_write_co(n, off, len, &v, 1, 0);
    free(zeros);
    return r;
}

static int disk_truncate_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    struct disk *d = n->state;
    if (size > d->capacity)
        return err_set(e, ENOSPC, "full");
    if (size < n->size)
        memset(d->now + size, 0, n->size - size);
    n->size = size;
    return 0;
}

static void disk_close_co(struct node *n) {
    struct disk *d = n->state;
    for (size_t i = 0; i < d->pending_n; i++) {
        free(d->pending[i]->bytes);
        free(d->pending[i]);
    }
    free(d->pending);
    munmap(d->now, d->capacity);
    munmap(d->stable, d->capacity);
}

static const struct storage_ops disk_ops = {.preadv_co = disk_read_co,
                                            .pwritev_co = disk_write_co,
                                            .flush_co = disk_sync_co,
                                            .discard_co = disk_trim_co,
                                            .truncate_co = disk_truncate_co};
static int disk_reopen_co(struct node *n, unsigned new_flags, struct err *e) {
    return 0;
}

static const struct driver driver_disk = {.name = "forgetful",
                                          .kind = DRIVER_STORAGE,
                                          .state_size = sizeof(struct disk),
                                          .close_co = disk_close_co,
                                          .reopen_co = disk_reopen_co,
                                          .storage = &disk_ops};

/* Zeros that take memory where they are written; an allocator that fills what it gives would touch
 * all of a large disk. */
static uint8_t *room(uint64_t capacity) {
    void *p = mmap(NULL, capacity, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        abort();
    return p;
}

struct node *disk_new(uint64_t capacity, unsigned flags) {
    struct node *n = node_new(&driver_disk);
    struct disk *d = n->state;
    n->flags = NODE_RW | flags;
    n->perm = n->shared = PERM_ALL;
    n->storage_flags = STORAGE_ZERO_INIT;
    d->capacity = capacity;
    d->now = room(capacity);
    d->stable = room(capacity);
    return n;
}

struct node *disk_after_cut(struct node *n) {
    struct disk *d = n->state;
    struct node *cut = disk_new(d->capacity, 0);
    struct disk *c = cut->state;
    memcpy(c->now, d->stable, d->stable_size);
    cut->size = d->stable_size;
    for (size_t i = 0; i < d->pending_n; i++) {
        const struct record *r = d->pending[i];
        for (uint64_t at = r->offset, next; at < r->offset + r->length; at = next) {
            next = min_u64(align_down(at, 512) + 512, r->offset + r->length);
            if (rng(2)) {
                memcpy(c->now + at, r->bytes + (at - r->offset), next - at);
                cut->size = max_u64(cut->size, next);
            }
        }
    }
    return cut;
}
