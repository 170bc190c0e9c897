/* SPDX-License-Identifier: MIT */
/*
 * Writes: in place where the map allows, else into fresh room with copy-on-write.
 *
 * 1. Under a shared lock on the range, what already lies in place is overwritten where it is.
 * 2. At the first byte that does not, the lock on the rest is exchanged for an exclusive one on
 * whole units, and the format places what is left, run by run: room is made, the head and tail of
 * the outermost units are read from what the guest sees there today and go out together with the
 * new data in one write, then the room is published.  A failure on the way abandons the placement
 * whole, so that the guest reads the old content.
 *
 * Between 1 and 2 the lock is free for a moment; the place call looks everything up afresh.
 */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/iov.h"
#include "base/plant.h"
#include "disk/engine.h"
#include "disk/event.h"

/* The part of a placement around the data: guest bytes of the same units, and their old content. */
struct edge {
    uint64_t offset; /* guest */
    uint32_t length;
    uint8_t *buf; /* NULL: nothing that goes out together with the data */
};

/* Edges longer than this go out by themselves, in pieces. */
#define EDGE_PIECE ((uint32_t)MIB)

/*
 * The old content of [edge->offset, +edge->length), at most EDGE_PIECE, into edge->buf; that stays
 * NULL where the content is zero and the room reads as zeros.
 */
static int edge_read_co(struct node *n, const struct placement *p, struct edge *edge) {
    edge->buf = NULL;
    if (!edge->length || PLANTED(EDGES_NOT_COPIED))
        return 0;
    /* The last unit may stick out behind the end of the disk; those bytes must be zeros too, or a
     * later growth would show them. */
    uint64_t inside = edge->offset >= n->size ? 0 : min_u64(edge->length, n->size - edge->offset);
    int zero = inside ? chain_is_zero_co(n, edge->offset, inside) : 1;
    if (zero < 0)
        return zero;
    if (zero && p->reads_zero)
        return 0;
    edge->buf = buf_get(edge->length);
    if (!edge->buf)
        return -ENOMEM;
    memset(edge->buf + (zero ? 0 : inside), 0, edge->length - (zero ? 0 : inside));
    if (zero)
        return 0;
    disk_event_co(p->storage, EVENT_cow_read);
    struct iovec v = {edge->buf, inside};
    return chain_read_co(n, edge->offset, inside, &v, 1, 0);
}

/* A long edge, piece by piece; none of it is left for the write of the data. */
static int edge_copy_co(struct node *n, const struct placement *p, struct edge *edge,
                        unsigned flags) {
    uint64_t host = p->host_offset + edge->offset - p->offset;
    int r = 0;
    while (!r && edge->length) {
        struct edge piece = {.offset = edge->offset,
                             .length = (uint32_t)min_u64(edge->length, EDGE_PIECE)};
        r = edge_read_co(n, p, &piece);
        if (!r && piece.buf) {
            struct iovec v = {piece.buf, piece.length};
            r = disk_pwritev_co(p->storage, host, piece.length, &v, 1, flags & IO_FUA);
        }
        buf_put(piece.buf, piece.length);
        host += piece.length;
        edge->offset += piece.length;
        edge->length -= piece.length;
    }
    return r;
}

/* Writes a fresh placement: [head][data][tail] as one request, but for long edges. */
static int placement_write_co(struct node *n, const struct placement *p, const struct iovec *iov,
                              int niov, uint64_t iov_off, unsigned flags) {
    struct edge head = {.offset = p->offset - p->head, .length = p->head};
    struct edge tail = {.offset = p->offset + p->length, .length = p->tail};
    struct iovec all[IOV_MAX_STRATA];
    int count = 0;

    int r = head.length > EDGE_PIECE ? edge_copy_co(n, p, &head, flags) : 0;
    if (!r && tail.length > EDGE_PIECE)
        r = edge_copy_co(n, p, &tail, flags);
    if (!r)
        r = edge_read_co(n, p, &head);
    if (!r)
        r = edge_read_co(n, p, &tail);
    if (!r) {
        uint64_t start = p->host_offset, length = p->length;
        if (head.buf) {
            all[count++] = (struct iovec){head.buf, head.length};
            start -= head.length;
            length += head.length;
        }
        count += iov_slice(iov, niov, iov_off, p->length, all + count);
        if (tail.buf) {
            all[count++] = (struct iovec){tail.buf, tail.length};
            length += tail.length;
        }
        if (head.buf || tail.buf)
            disk_event_co(p->storage, EVENT_cow_write);
        disk_event_co(p->storage, EVENT_write_aio);
        r = disk_pwritev_co(p->storage, start, length, all, count, flags & (IO_BULK | IO_FUA));
    }
    buf_put(head.buf, head.length);
    buf_put(tail.buf, tail.length);
    return r;
}

static void placement_check(const struct node *n, uint64_t offset, uint64_t length,
                            const struct placement *p) {
    assert(p->offset == offset && p->length && p->length <= length && p->storage);
    assert(p->is_new || (!p->head && !p->tail));
    assert(p->head <= p->host_offset && p->head < n->granularity && p->tail < n->granularity);
}

int write_locked_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                    int niov, unsigned flags) {
    uint64_t done = 0;
    if (!n->drv->format->place_co)
        return -EROFS;
    if (n->coded_only)
        return write_encoded_co(n, offset, length, iov, niov);
    while (done < length) {
        struct placement p = {0};
        int r = n->drv->format->place_co(n, offset + done, length - done, 0, 0, &p);
        if (r < 0)
            return r;
        placement_check(n, offset + done, length - done, &p);
        if (PLANTED(PUBLISH_BEFORE_DATA)) {
            n->drv->format->publish_co(n, &p);
            task_yield_co();
            r = placement_write_co(n, &p, iov, niov, done, flags);
            if (r < 0)
                return r;
            done += p.length;
            continue;
        }
        r = placement_write_co(n, &p, iov, niov, done, flags);
        if (r < 0) {
            if (n->drv->format->abandon)
                n->drv->format->abandon(n, &p);
            return r;
        }
        if (n->drv->format->publish_co)
            r = n->drv->format->publish_co(n, &p);
        n->map_generation++;
        if (r < 0)
            return r;
        done += p.length;
    }
    return 0;
}

/* Overwrites what lies in place from the start; *done tells how far that went. */
static int write_in_place_co(struct node *n, uint64_t offset, uint64_t length,
                             const struct iovec *iov, int niov, unsigned flags, uint64_t *done) {
    while (*done < length) {
        struct extent x;
        int r = format_map_co(n, offset + *done, length - *done, &x);
        if (r < 0)
            return r;
        if (x.kind != EXTENT_DATA || !(x.flags & EXTENT_IN_PLACE))
            return 0;
        disk_event_co(x.storage, EVENT_write_aio);
        if (x.length == length) {
            r = disk_pwritev_co(x.storage, x.host_offset, length, iov, niov, flags);
        } else {
            struct iovec part[IOV_MAX_STRATA];
            int k = iov_slice(iov, niov, *done, x.length, part);
            r = disk_pwritev_co(x.storage, x.host_offset, x.length, part, k, flags);
        }
        if (r < 0)
            return r;
        *done += x.length;
    }
    return 0;
}

static uint64_t units_end(const struct node *n, uint64_t end) {
    return align_up(end, n->granularity);
}

static int format_pwritev_co(struct node *n, uint64_t offset, uint64_t length,
                             const struct iovec *iov, int niov, unsigned flags) {
    uint64_t done = 0;
    struct range_req lock;
    range_lock_co(&n->locks, &lock, offset, length, false);
    int r = write_in_place_co(n, offset, length, iov, niov, flags, &done);
    range_unlock(&n->locks, &lock);
    if (!r && done < length) {
        uint64_t low = align_down(offset + done, n->granularity);
        range_lock_co(&n->locks, &lock, low, units_end(n, offset + length) - low, true);
        struct iovec rest[IOV_MAX_STRATA];
        int k = iov_slice(iov, niov, done, length - done, rest);
        r = write_locked_co(n, offset + done, length - done, rest, k, flags);
        range_unlock(&n->locks, &lock);
    }
    return r;
}

static int format_write_co(struct node *n, uint64_t offset, uint64_t length,
                           const struct iovec *iov, int niov, unsigned flags) {
    /* Where the format keeps metadata, even a mapping that is already there may not be stable yet:
     * then only a flush makes the write so.  It is a request of its own, outside of this one:
     * inside it would wait for a quiesce that waits for this one. */
    bool flush = flags & IO_FUA && n->drv->format->flush_co && !PLANTED(FUA_WITHOUT_MAPPING);
    int r = -ENOSPC;
    node_enter_co(n);
    /* It may have shrunk while we waited. */
    if (offset <= n->size && length <= n->size - offset &&
        !(r = record_change_co(n, offset, length)))
        r = format_pwritev_co(n, offset, length, iov, niov, flush ? flags & ~IO_FUA : flags);
    node_leave(n);
    return !r && flush ? disk_flush_co(n) : r;
}

/* ---------------------------------------------------------------- detect-zeroes */

/* Pieces of this size (or of the format's unit) are told apart: smaller ones would cost more
 * requests than they save room. */
#define DETECT_PIECE (64 * KIB)

static bool detects_zeroes(const struct node *n, unsigned flags) {
    return flags & IO_DETECT_ZEROES || n->flags & (NODE_DETECT_ZEROES | NODE_DETECT_UNMAP);
}

/* The longest run of pieces from `from` that are all zeros, or all not; *zero tells. */
static uint64_t detect_run(uint64_t piece, uint64_t offset, uint64_t from, uint64_t length,
                           const struct iovec *iov, int niov, bool *zero) {
    uint64_t pos = from;
    for (uint64_t next; pos < length; pos = next) {
        next = min_u64(length, align_down(offset + pos, piece) + piece - offset);
        bool z = iov_is_zero(iov, niov, pos, next - pos);
        if (pos > from && z != *zero)
            break;
        *zero = z;
    }
    return pos - from;
}

/* Written zeros become zero units, or zeros of what lies in part of one; the rest is written. */
static int write_detecting_co(struct node *n, uint64_t offset, uint64_t length,
                              const struct iovec *iov, int niov, unsigned flags) {
    unsigned zero_flags = n->flags & NODE_DETECT_UNMAP ? ZERO_MAY_UNMAP : 0;
    uint64_t piece = max_u64(n->granularity, DETECT_PIECE);
    int r = 0;
    for (uint64_t done = 0, run; !r && done < length; done += run) {
        bool zero = false;
        run = detect_run(piece, offset, done, length, iov, niov, &zero);
        if (zero) {
            r = disk_zero_co(n, offset + done, run, zero_flags | (flags & IO_FUA ? ZERO_FUA : 0));
        } else if (run == length) {
            r = format_write_co(n, offset, length, iov, niov, flags);
        } else {
            struct iovec part[IOV_MAX_STRATA];
            int k = iov_slice(iov, niov, done, run, part);
            r = format_write_co(n, offset + done, run, part, k, flags);
        }
    }
    return r;
}

int disk_pwritev_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                    int niov, unsigned flags) {
    if (!node_is_rw(n))
        return -EROFS;
    if (!length)
        return 0;
    if (length > INT64_MAX || offset > INT64_MAX - length)
        return -EINVAL;
    if (n->flags & NODE_WRITETHROUGH)
        flags |= IO_FUA;
    if (n->flags & NODE_NO_FLUSH)
        flags &= ~IO_FUA;
    if (!n->drv->format) {
        node_enter_co(n);
        int r = storage_pwritev_co(n, offset, length, iov, niov, flags);
        node_leave(n);
        return r;
    }
    if (offset > n->size || length > n->size - offset)
        return -ENOSPC;
    return detects_zeroes(n, flags) ? write_detecting_co(n, offset, length, iov, niov, flags)
                                    : format_write_co(n, offset, length, iov, niov, flags);
}

int write_zeros_co(struct node *n, uint64_t offset, uint64_t length) {
    static const uint8_t zeros[64 * KIB] __attribute__((aligned(4096)));
    struct iovec iov[16];
    int r = 0;
    while (!r && length) {
        uint64_t part = min_u64(length, sizeof(zeros) * 16);
        int k = 0;
        for (uint64_t left = part; left; k++) {
            iov[k] = (struct iovec){(void *)zeros, min_u64(left, sizeof(zeros))};
            left -= iov[k].iov_len;
        }
        r = n->drv->format ? write_locked_co(n, offset, part, iov, k, 0)
                           : storage_pwritev_co(n, offset, part, iov, k, 0);
        offset += part;
        length -= part;
    }
    return r;
}

int disk_write_coded_co(struct node *n, uint64_t offset, const void *code, uint32_t coded_length) {
    if (!n->codec || !n->drv->format->place_co)
        return -ENOTSUP;
    if (!node_is_rw(n))
        return -EROFS;
    if (offset >= n->size || !is_aligned(offset, n->granularity) || !coded_length)
        return -EINVAL;
    node_enter_co(n);
    if (offset >= n->size) { /* it has shrunk while we waited */
        node_leave(n);
        return -ENOSPC;
    }
    uint64_t length = min_u64(n->granularity, n->size - offset);
    struct range_req lock;
    range_lock_co(&n->locks, &lock, offset, length, true);
    struct placement p = {0};
    int r = record_change_co(n, offset, length);
    if (!r)
        r = n->drv->format->place_co(n, offset, length, PLACE_CODED, coded_length, &p);
    if (!r) {
        assert(p.coded_length == coded_length && p.storage);
        struct iovec v = {(void *)code, coded_length};
        disk_event_co(p.storage, EVENT_write_compressed);
        r = disk_pwritev_co(p.storage, p.host_offset, coded_length, &v, 1, 0);
        if (!r && n->drv->format->publish_co)
            r = n->drv->format->publish_co(n, &p);
        else if (r && n->drv->format->abandon)
            n->drv->format->abandon(n, &p);
        n->map_generation++;
    }
    range_unlock(&n->locks, &lock);
    node_leave(n);
    return r;
}

int disk_make_room_co(struct node *n, uint64_t offset, uint64_t length, uint64_t *host,
                      uint64_t *got) {
    if (!n->drv->format || !n->drv->format->place_co)
        return -ENOTSUP;
    if (!node_is_rw(n))
        return -EROFS;
    if (offset >= n->size || !is_aligned(offset, n->granularity))
        return -EINVAL;
    node_enter_co(n);
    struct range_req lock;
    struct placement p = {0};
    uint64_t inside = min_u64(length, n->size - offset);
    range_lock_co(&n->locks, &lock, offset, length, true);
    int r = n->drv->format->place_co(n, offset, inside, 0, 0, &p);
    if (!r && (p.storage != n->file || p.head || p.offset != offset)) {
        if (n->drv->format->abandon)
            n->drv->format->abandon(n, &p);
        r = -ENOTSUP;
    } else if (!r && n->drv->format->publish_co) {
        r = n->drv->format->publish_co(n, &p);
    }
    n->map_generation++;
    range_unlock(&n->locks, &lock);
    node_leave(n);
    *host = p.host_offset;
    *got = align_up(p.length, n->granularity); /* the last unit of the disk is whole, too */
    return r;
}
