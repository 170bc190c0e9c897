/* SPDX-License-Identifier: MIT */
/*
 * Requests to storage, made acceptable.
 *
 * With O_DIRECT the kernel takes only whole, aligned blocks from aligned memory.  Requests that are
 * so go straight through.  Others go through an aligned buffer, a piece at a time; a write that
 * covers blocks only in part reads them first, holding the blocks exclusively on the storage node
 * so that two such writes cannot undo one another.
 */
#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/iov.h"
#include "disk/engine.h"
#include "disk/event.h"

#define PIECE_BYTES MIB

static bool is_direct_ok(const struct node *n, uint64_t offset, uint64_t length,
                         const struct iovec *iov, int niov) {
    uint32_t a = n->request_align;
    return a <= 1 || (is_aligned(offset | length, a) && iov_aligned(iov, niov, a));
}

static int read_bounced_co(struct node *n, uint64_t offset, uint64_t length,
                           const struct iovec *iov, int niov, unsigned flags) {
    uint32_t a = n->request_align;
    uint8_t *buf = buf_get(PIECE_BYTES);
    int r = buf ? 0 : -ENOMEM;
    uint64_t done = 0;
    while (!r && done < length) {
        uint64_t start = align_down(offset + done, a);
        uint64_t end = align_up(min_u64(offset + length, start + PIECE_BYTES), a);
        end = min_u64(end, start + PIECE_BYTES);
        struct iovec v = {buf, end - start};
        r = n->drv->storage->preadv_co(n, start, end - start, &v, 1, flags);
        uint64_t skip = offset + done - start, part = min_u64(end, offset + length) - start - skip;
        if (!r)
            iov_from_buf(iov, niov, done, buf + skip, part);
        done += part;
    }
    buf_put(buf, PIECE_BYTES);
    return r;
}

int storage_preadv_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                      int niov, unsigned flags) {
    if (is_direct_ok(n, offset, length, iov, niov))
        return n->drv->storage->preadv_co(n, offset, length, iov, niov, flags);
    return read_bounced_co(n, offset, length, iov, niov, flags);
}

/* One aligned piece [start, end) of which [from, to) is new; nothing is written behind `stop`. */
static int write_piece_co(struct node *n, uint8_t *buf, uint64_t start, uint64_t end, uint64_t stop,
                          uint64_t from, uint64_t to, const struct iovec *iov, int niov,
                          uint64_t iov_off, unsigned flags) {
    uint32_t a = n->request_align;
    struct iovec v;
    int r = 0;
    if (from > start) {
        v = (struct iovec){buf, a};
        disk_event_co(n, EVENT_pwritev_rmw_head);
        r = n->drv->storage->preadv_co(n, start, a, &v, 1, 0);
        disk_event_co(n, EVENT_pwritev_rmw_after_head);
    }
    if (!r && to < end && (from == start || end - start > a)) {
        v = (struct iovec){buf + (end - start) - a, a};
        disk_event_co(n, EVENT_pwritev_rmw_tail);
        r = n->drv->storage->preadv_co(n, end - a, a, &v, 1, 0);
        disk_event_co(n, EVENT_pwritev_rmw_after_tail);
    }
    if (r)
        return r;
    iov_to_buf(iov, niov, iov_off, buf + (from - start), to - from);
    v = (struct iovec){buf, min_u64(end, stop) - start};
    return n->drv->storage->pwritev_co(n, start, v.iov_len, &v, 1, flags);
}

static int write_bounced_co(struct node *n, uint64_t offset, uint64_t length,
                            const struct iovec *iov, int niov, unsigned flags) {
    uint32_t a = n->request_align;
    uint64_t low = align_down(offset, a), high = align_up(offset + length, a);
    uint8_t *buf = buf_get(PIECE_BYTES);
    if (!buf)
        return -ENOMEM;
    struct range_req lock;
    range_lock_co(&n->locks, &lock, low, high - low, true);
    /*
     * A write that stays inside the storage must not make it longer by padding its last block.  To
     * cut it afterwards would be no way: others may be writing behind it at this moment.
     */
    uint64_t stop = offset + length <= n->size ? n->size : UINT64_MAX;
    int r = 0;
    for (uint64_t start = low; !r && start < high; start += PIECE_BYTES) {
        uint64_t end = min_u64(start + PIECE_BYTES, high);
        uint64_t from = max_u64(start, offset), to = min_u64(end, offset + length);
        r = write_piece_co(n, buf, start, end, stop, from, to, iov, niov, from - offset, flags);
    }
    range_unlock(&n->locks, &lock);
    buf_put(buf, PIECE_BYTES);
    return r;
}

int storage_pwritev_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                       int niov, unsigned flags) {
    if (is_direct_ok(n, offset, length, iov, niov)) {
        if (n->request_align <= 1)
            return n->drv->storage->pwritev_co(n, offset, length, iov, niov, flags);
        /* Whoever rewrites one of these blocks for a part of it waits, and is waited for. */
        struct range_req lock;
        range_lock_co(&n->locks, &lock, offset, length, false);
        int r = n->drv->storage->pwritev_co(n, offset, length, iov, niov, flags);
        range_unlock(&n->locks, &lock);
        return r;
    }
    return write_bounced_co(n, offset, length, iov, niov, flags);
}
