/* SPDX-License-Identifier: MIT */
/* See flaky.h. */
#include "flaky.h"

#include "base/iov.h"
#include "base/list.h"
#include "disk/engine.h"
#include "runtime/task.h"

enum change_kind { CHANGE_WRITE, CHANGE_CLEAR, CHANGE_SIZE };

struct change {
    struct list link;
    enum change_kind kind;
    uint64_t seq, offset, length; /* CHANGE_SIZE: offset is the size */
    uint8_t data[];
};

struct flaky {
    struct node *now, *stable;
    struct list journal;
    uint64_t seq, rng, limit;
    unsigned yields, fail_in, fail_more;
    bool failed;
};

static uint64_t next(uint64_t *s) {
    uint64_t z = *s += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    return z ^ z >> 27;
}

static void pause_co(struct flaky *f) {
    while (next(&f->rng) % 256 < f->yields)
        task_yield_co();
}

/* An operation's turn: 0, or the failure that it meets. */
static int turn_co(struct flaky *f) {
    pause_co(f);
    if (!f->fail_in || --f->fail_in)
        return 0;
    f->fail_in = f->fail_more ? 1 : 0;
    f->fail_more -= f->fail_more ? 1 : 0;
    f->failed = true;
    return -EIO;
}

static void record(struct flaky *f, enum change_kind kind, uint64_t offset, uint64_t length,
                   const struct iovec *iov, int niov) {
    struct change *c = xcalloc(1, sizeof(*c) + (iov ? length : 0));
    *c = (struct change){.kind = kind, .seq = ++f->seq, .offset = offset, .length = length};
    if (iov)
        iov_to_buf(iov, niov, 0, c->data, length);
    list_push_back(&f->journal, &c->link);
}

static int flaky_preadv_co(struct node *n, uint64_t offset, uint64_t length,
                           const struct iovec *iov, int niov, unsigned flags) {
    struct flaky *f = n->state;
    pause_co(f);
    const struct driver *d = f->now->drv;
    return d->storage->preadv_co(f->now, offset, length, iov, niov, flags);
}

static int flaky_pwritev_co(struct node *n, uint64_t offset, uint64_t length,
                            const struct iovec *iov, int niov, unsigned flags) {
    struct flaky *f = n->state;
    int r = turn_co(f);
    if (!r)
        r = f->now->drv->storage->pwritev_co(f->now, offset, length, iov, niov, flags);
    if (!r)
        record(f, CHANGE_WRITE, offset, length, iov, niov);
    n->size = f->now->size;
    pause_co(f);
    return r;
}

static int flaky_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    struct flaky *f = n->state;
    int r = turn_co(f);
    if (!r)
        r = f->now->drv->storage->zero_co(f->now, offset, length, zero_flags);
    if (!r)
        record(f, CHANGE_CLEAR, offset, length, NULL, 0);
    n->size = f->now->size;
    return r;
}

static int flaky_discard_co(struct node *n, uint64_t offset, uint64_t length) {
    return offset + length <= n->size ? flaky_zero_co(n, offset, length, 0) : 0;
}

static int flaky_truncate_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    struct flaky *f = n->state;
    int r = turn_co(f);
    if (r)
        return err_errno(e, -r, "resizing");
    r = f->now->drv->storage->truncate_co(f->now, size, prealloc, e);
    if (!r)
        record(f, CHANGE_SIZE, size, 0, NULL, 0);
    n->size = f->now->size;
    return r;
}

static void apply_co(struct node *to, const struct change *c, uint64_t offset, uint64_t length) {
    const struct storage_ops *ops = to->drv->storage;
    struct iovec v = {(uint8_t *)c->data + (offset - c->offset), length};
    int r = 0;
    if (c->kind == CHANGE_SIZE)
        r = ops->truncate_co(to, c->offset, PREALLOC_OFF, NULL);
    else if (c->kind == CHANGE_CLEAR)
        r = ops->zero_co(to, offset, length, 0);
    else
        r = ops->pwritev_co(to, offset, length, &v, 1, 0);
    FUZZ_CHECK(r == 0, "the memory disk refuses a change with %d", r);
}

static int flaky_flush_co(struct node *n) {
    struct flaky *f = n->state;
    uint64_t upto = f->seq;
    int r = turn_co(f);
    list_for_each_safe(it, nx, &f->journal) {
        struct change *c = list_entry(it, struct change, link);
        if (r || c->seq > upto)
            break;
        apply_co(f->stable, c, c->offset, c->length);
        list_remove(it);
        free(c);
    }
    pause_co(f);
    return r;
}

static int flaky_extents_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    struct flaky *f = n->state;
    int r = f->now->drv->storage->extents_co(f->now, offset, length, out);
    if (!r && out->storage)
        out->storage = n;
    return r;
}

static void flaky_close_co(struct node *n) {
    struct flaky *f = n->state;
    list_for_each_safe(it, nx, &f->journal) free(list_entry(it, struct change, link));
    node_unref_co(f->now);
    node_unref_co(f->stable);
}

static const struct storage_ops flaky_ops = {
    .preadv_co = flaky_preadv_co,
    .pwritev_co = flaky_pwritev_co,
    .zero_co = flaky_zero_co,
    .discard_co = flaky_discard_co,
    .flush_co = flaky_flush_co,
    .truncate_co = flaky_truncate_co,
    .extents_co = flaky_extents_co,
};
static const struct driver driver_flaky = {
    .name = "flaky",
    .kind = DRIVER_STORAGE,
    .state_size = sizeof(struct flaky),
    .close_co = flaky_close_co,
    .storage = &flaky_ops,
};

struct node *flaky_new_co(uint64_t limit, unsigned yields, uint64_t seed) {
    struct node *n = node_new(&driver_flaky);
    struct flaky *f = n->state;
    *f = (struct flaky){.yields = yields, .rng = seed, .limit = limit};
    list_init(&f->journal);
    f->now = fuzz_memory_co(limit);
    f->stable = fuzz_memory_co(0);
    n->flags = NODE_RW;
    n->perm = PERM_CONSISTENT_READ | PERM_WRITE | PERM_RESIZE;
    n->shared = PERM_CONSISTENT_READ | PERM_WRITE_UNCHANGED;
    n->filename = xstrdup("flaky");
    n->storage_flags = STORAGE_ZERO_INIT;
    return n;
}

void flaky_fail(struct node *n, unsigned nth, unsigned more) {
    struct flaky *f = n->state;
    f->fail_in = nth;
    f->fail_more = nth ? more : 0;
}

bool flaky_failed(struct node *n) {
    struct flaky *f = n->state;
    bool failed = f->failed;
    f->failed = false;
    return failed;
}

static void copy_co(struct node *from, struct node *to) {
    static uint8_t buf[64 * KIB];
    for (uint64_t at = 0, len; at < from->size; at += len) {
        len = min_u64(sizeof(buf), from->size - at);
        FUZZ_CHECK(disk_pread_co(from, at, buf, len) == 0, "reading the memory disk failed");
        if (!bytes_are_zero(buf, len))
            FUZZ_CHECK(disk_pwrite_co(to, at, buf, len) == 0, "the memory disk refuses a write");
    }
    FUZZ_CHECK(disk_resize_co(to, from->size, PREALLOC_OFF, NULL) == 0, "resizing failed");
}

struct node *flaky_cut_co(struct node *n, uint64_t seed) {
    struct flaky *f = n->state;
    struct node *to = fuzz_memory_co(0);
    unsigned lost = next(&seed) % 257; /* in 256ths: from nothing to all of it */
    copy_co(f->stable, to);
    list_for_each(it, &f->journal) {
        const struct change *c = list_entry(it, struct change, link);
        if (c->kind == CHANGE_SIZE && next(&seed) % 256 >= lost)
            apply_co(to, c, 0, 0);
        for (uint64_t at = c->offset, len; at < c->offset + c->length; at += len) {
            len = min_u64(c->offset + c->length, align_down(at, 512) + 512) - at;
            if (next(&seed) % 256 >= lost)
                apply_co(to, c, at, len);
        }
    }
    return to;
}
