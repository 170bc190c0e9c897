/* SPDX-License-Identifier: MIT */
/*
 * The map of a whole backing chain: who answers for a range, reading through it, its status.
 *
 * A walk goes down from the top, narrowing the range to what every layer so far calls a hole, until
 * a layer answers.  It is a loop, not a recursion: a chain of 100 layers costs no stack.
 *
 * A layer that is smaller than the one above ends early: behind its end the chain reads as zeros,
 * to the byte.
 *
 * Locks: the caller holds the range of the top layer.  A lower layer that is writable (a base while
 * a commit writes to it) is locked shared until its answer has been used; read-only layers cannot
 * change.
 */
#include <assert.h>
#include <errno.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/iov.h"
#include "disk/engine.h"
#include "disk/event.h"

static bool extent_is_sane(const struct node *n, uint64_t offset, uint64_t length,
                           const struct extent *x) {
    if (!x->length || x->length > length)
        return false;
    switch (x->kind) {
    case EXTENT_HOLE:
    case EXTENT_ZERO:
        return true;
    case EXTENT_DATA:
        return x->storage && x->host_offset <= INT64_MAX - x->length;
    case EXTENT_CODED:
        return x->storage && x->codec && x->coded_length && x->unit_length &&
               x->unit_offset <= offset && offset - x->unit_offset < x->unit_length &&
               x->length <= x->unit_length - (offset - x->unit_offset) &&
               x->host_offset <= (uint64_t)INT64_MAX - x->coded_length;
    }
    return false;
}

int format_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    out->flags = 0;
    out->storage = NULL;
    int r = n->drv->format->map_co(n, offset, length, out);
    if (r < 0)
        return r;
    assert(extent_is_sane(n, offset, length, out));
    return 0;
}

/* A storage node asked as if it were a format: all data, in place. */
static int storage_map(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    *out = (struct extent){.length = length,
                           .kind = EXTENT_DATA,
                           .flags = EXTENT_IN_PLACE,
                           .storage = n,
                           .host_offset = offset};
    return 0;
}

void chain_run_end(struct chain_run *run) {
    if (run->locked)
        range_unlock(&run->layer->locks, &run->lock);
    run->locked = false;
}

int chain_map_co(struct node *n, uint64_t offset, uint64_t length, bool top_only,
                 struct chain_run *out) {
    unsigned depth = 0;
    struct node *room = NULL; /* of the last layer asked */
    uint64_t room_offset = 0;
    out->locked = false;
    for (struct node *layer = n; layer; layer = layer->backing, depth++) {
        if (offset >= layer->size) /* behind the end of a short backing */
            break;
        length = min_u64(length, layer->size - offset);
        out->layer = layer;
        out->depth = depth;
        out->span = length;
        out->locked = depth && node_is_rw(layer);
        if (out->locked)
            range_lock_co(&layer->locks, &out->lock, offset, length, false);
        int r = layer->drv->format ? format_map_co(layer, offset, length, &out->ext)
                                   : storage_map(layer, offset, length, &out->ext);
        if (!r && out->ext.kind != EXTENT_HOLE)
            return 0;
        chain_run_end(out);
        if (r < 0)
            return r;
        length = out->ext.length;
        room = out->ext.storage;
        room_offset = out->ext.host_offset;
        if (top_only)
            break;
    }
    out->ext = (struct extent){
        .length = length, .kind = EXTENT_ZERO, .storage = room, .host_offset = room_offset};
    out->layer = NULL;
    out->span = length;
    out->depth = depth;
    return 0;
}

static int read_run_co(const struct chain_run *run, uint64_t offset, const struct iovec *iov,
                       int niov, uint64_t done, unsigned flags, uint64_t *moved) {
    const struct extent *x = &run->ext;
    *moved = x->length;
    switch (x->kind) {
    case EXTENT_DATA: {
        disk_event_co(x->storage, EVENT_read_aio);
        if (done == 0 && x->length == iov_length(iov, niov))
            return disk_preadv_co(x->storage, x->host_offset, x->length, iov, niov, flags);
        struct iovec part[IOV_MAX_STRATA];
        int n = iov_slice(iov, niov, done, x->length, part);
        return disk_preadv_co(x->storage, x->host_offset, x->length, part, n, flags);
    }
    case EXTENT_CODED:
        return coded_read_co(run->layer, offset, run->span, x, iov, niov, done, moved);
    default:
        iov_zero(iov, niov, done, x->length);
        return 0;
    }
}

int chain_read_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                  int niov, unsigned flags) {
    uint64_t done = 0;
    while (done < length) {
        struct chain_run run;
        uint64_t moved;
        int r = chain_map_co(n, offset + done, length - done, false, &run);
        if (r < 0)
            return r;
        r = read_run_co(&run, offset + done, iov, niov, done, flags, &moved);
        chain_run_end(&run);
        if (r < 0)
            return r;
        done += moved;
    }
    return 0;
}

int chain_is_zero_co(struct node *n, uint64_t offset, uint64_t length) {
    while (length) {
        struct chain_run run;
        int r = chain_map_co(n, offset, length, false, &run);
        if (r < 0)
            return r;
        chain_run_end(&run);
        if (run.ext.kind != EXTENT_ZERO)
            return 0;
        offset += run.ext.length;
        length -= run.ext.length;
    }
    return 1;
}

/* Data runs end on multiples of this many host bytes, where the map itself does not end before. */
#define STATUS_ALIGN (4 * KIB)

/* Asks the storage where its holes are, so that unwritten room inside a data run shows as zeros. */
static int refine_co(const struct node *n, struct status *st) {
    struct node *s = st->storage;
    if (s->drv->format) {
        struct status below;
        if (st->host_offset >= s->size)
            return 0;
        int r = disk_status_co(s, st->host_offset, min_u64(st->length, s->size - st->host_offset),
                               STATUS_PRECISE, &below);
        if (r < 0)
            return r;
        st->length = below.length;
        st->zero = below.zero;
        st->data = below.data;
        return 0;
    }
    if (!s->drv->storage->extents_co)
        return 0;
    struct extent x = {0};
    int r = s->drv->storage->extents_co(s, st->host_offset, st->length, &x);
    if (r < 0)
        return r;
    assert(x.length && x.length <= st->length);
    if (x.kind != EXTENT_DATA) {
        st->length = x.length;
        st->zero = x.kind == EXTENT_ZERO;
        st->data = x.flags & EXTENT_ALLOCATED;
    } else {
        /* A file may end anywhere: what follows in the same block is told as data too, or runs of
         * odd lengths would reach everybody above. */
        /* There, up to what a request can be. */
        uint64_t align = n->flags & NODE_SECTORS ? s->request_align : STATUS_ALIGN;
        uint64_t end = align_up(st->host_offset + x.length, align);
        st->length = min_u64(st->length, end - st->host_offset);
    }
    return 0;
}

int disk_status_co(struct node *n, uint64_t offset, uint64_t length, unsigned status_flags,
                   struct status *out) {
    if (!length || offset >= n->size || length > n->size - offset)
        return -EINVAL;
    node_enter_co(n);
    struct range_req lock;
    range_lock_co(&n->locks, &lock, offset, length, false);
    struct chain_run run;
    int r = chain_map_co(n, offset, length, status_flags & STATUS_TOP_ONLY, &run);
    if (!r) {
        const struct extent *x = &run.ext;
        *out = (struct status){.length = x->length,
                               .depth = run.depth,
                               .present = run.layer,
                               .layer = run.layer,
                               .zero = x->kind == EXTENT_ZERO,
                               .coded = x->kind == EXTENT_CODED};
        out->data = x->kind == EXTENT_DATA || x->kind == EXTENT_CODED ||
                    (x->kind == EXTENT_ZERO && x->flags & EXTENT_ALLOCATED);
        if (x->kind == EXTENT_DATA || (out->data && out->zero) || !run.layer) {
            out->storage = x->storage;
            out->host_offset = x->host_offset;
        }
        if (x->kind == EXTENT_DATA && status_flags & STATUS_PRECISE)
            r = refine_co(n, out);
        chain_run_end(&run);
    }
    range_unlock(&n->locks, &lock);
    node_leave(n);
    return r;
}
