/* SPDX-License-Identifier: MIT */
/*
 * Block status: one chunk of extents for each metadata context that the client has selected.
 *
 * Contexts have bits in nbd_client.contexts, and the number of the bit plus 1 as id:
 *
 *      0   base:allocation          what the whole chain reads as
 *      1   qemu:allocation-depth    the layer that answers: 0 none, 1 the image, 2 its backing ...
 *      2+i qemu:dirty-bitmap:NAME   server->bitmaps[i]: 1 dirty, 0 clean
 *
 * A chunk may end before the request does (the protocol allows it): what is asked of the map, and
 * what is held in memory, is bounded.  Behind the end of a bitmap, where the disk is larger than
 * the one that it belongs to, everything is dirty.
 */
#include "export/nbd/client.h"

#include <errno.h>
#include <stdlib.h>
#include "base/ck.h"
#include "disk/bitmap.h"
#include "disk/io.h"

/* Extents of one block status reply, and map questions asked for it: bounds work and memory. */
#define EXTENTS_MAX 1024
#define STATUS_CALLS_MAX 2048

/* Head, context id, and with extended headers the number of extents. */
enum { HEAD_MAX = NBD_HEAD_MAX + 8, EXTENT_MAX = 16 };

/* The extents of one context; equal neighbours become one. */
struct extents {
    uint8_t *at; /* of the first extent */
    bool wide;   /* 64-bit fields */
    unsigned n, max;
    uint64_t run; /* not written yet, like the next */
    uint32_t value;
};

static void store(struct extents *x) {
    uint8_t *at = x->at + (size_t)x->n * (x->wide ? 16 : 8);
    if (x->wide) {
        be64_store(at, x->run);
        be64_store(at + 8, x->value);
    } else {
        be32_store(at, (uint32_t)x->run);
        be32_store(at + 4, x->value);
    }
}

static bool put(struct extents *x, uint64_t length, uint32_t value) {
    if (x->run && x->value != value) {
        store(x);
        x->run = 0;
        if (++x->n == x->max)
            return false;
    }
    x->value = value;
    x->run += length;
    return true;
}

static void finish(struct extents *x) {
    if (x->run)
        put(x, 0, ~x->value);
}

static uint32_t allocation_bits(const struct status *st) {
    return (st->data ? 0 : NBD_STATE_HOLE) | (st->zero ? NBD_STATE_ZERO : 0);
}

static int map_extents_co(struct nbd_req *r, bool depth, struct extents *x) {
    const struct nbd_request *q = &r->cmd;
    uint64_t at = 0;
    for (unsigned calls = 0; at < q->length && calls < STATUS_CALLS_MAX; calls++) {
        uint64_t left = q->length - at;
        struct status st;
        int rc = disk_status_co(r->c->x->base.node, q->offset + at, left,
                                depth ? 0 : STATUS_PRECISE, &st);
        if (rc < 0)
            return rc;
        uint64_t length = min_u64(st.length, left);
        uint32_t layer = st.present ? st.depth + 1 : 0;
        if (!put(x, length, depth ? layer : allocation_bits(&st)))
            break;
        at += length;
    }
    return 0;
}

static void bitmap_extents(const struct bitmap *b, const struct nbd_request *q, struct extents *x) {
    uint64_t at = q->offset, end = q->offset + q->length, start, length;
    while (at < end) {
        if (at >= b->size) {
            put(x, end - at, NBD_STATE_DIRTY);
            return;
        }
        if (!bitmap_next_dirty(b, at, end, &start, &length)) {
            start = min_u64(end, b->size);
            length = 0;
        }
        if ((start > at && !put(x, start - at, 0)) || (length && !put(x, length, NBD_STATE_DIRTY)))
            return;
        at = start + length;
    }
}

void nbd_block_status_co(struct nbd_req *r) {
    struct nbd_client *c = r->c;
    bool wide = c->extended;
    unsigned max = r->cmd.flags & NBD_CMD_FLAG_REQ_ONE ? 1 : EXTENTS_MAX;
    unsigned contexts = (unsigned)__builtin_popcountll(r->contexts);
    uint8_t *buf = malloc(contexts * (HEAD_MAX + (size_t)max * EXTENT_MAX)), *pos = buf;
    if (!buf) {
        nbd_command_fail(r, -ENOMEM, NULL);
        return;
    }
    r->extra = buf;
    for (uint64_t left = r->contexts; left; left &= left - 1) {
        unsigned bit = (unsigned)__builtin_ctzll(left);
        size_t head = nbd_head_bytes(wide), ids = wide ? 8 : 4;
        struct extents x = {.at = pos + head + ids, .max = max, .wide = wide};
        int rc = 0;
        if (bit >= NBD_CONTEXT_BITMAPS)
            bitmap_extents(c->x->bitmaps[bit - NBD_CONTEXT_BITMAPS], &r->cmd, &x);
        else
            rc = map_extents_co(r, bit == NBD_CONTEXT_DEPTH, &x);
        if (rc < 0) {
            nbd_command_fail(r, rc, NULL);
            return;
        }
        finish(&x);
        size_t bytes = ids + (size_t)x.n * (wide ? 16 : 8);
        nbd_chunk_encode(pos, wide, &r->cmd, left & (left - 1) ? 0 : NBD_CHUNK_FLAG_DONE,
                         wide ? NBD_CHUNK_BLOCK_STATUS_EXT : NBD_CHUNK_BLOCK_STATUS,
                         (uint32_t)bytes);
        be32_store(pos + head, bit + 1); /* the id that SET_META_CONTEXT gave out */
        if (wide)
            be32_store(pos + head + 4, x.n);
        pos += head + bytes;
    }
    r->inline_iov[0] = (struct iovec){buf, (size_t)(pos - buf)};
    r->iov = r->inline_iov;
    r->niov = 1;
    nbd_reply_queue(r);
}
