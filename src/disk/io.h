/* SPDX-License-Identifier: MIT */
/*
 * The engine's requests: any alignment, any size, on any node.
 *
 * Every function may suspend, runs in a task of the node's loop, returns 0 or -errno (bare: the
 * caller at the edge adds node, offset, length) and allocates nothing on the fast path.  Ranges
 * outside the node: -EINVAL (reads, status) or -ENOSPC (writes beyond the end of a fixed-size
 * node).  On an error of a write, each byte of its range holds old or new content.
 *
 * Buffers belong to the caller and stay valid until return.  niov is at most IOV_MAX_REQUEST.
 *
 * Format drivers use the same functions on their children for metadata.
 */
#ifndef STRATA_DISK_IO_H
#define STRATA_DISK_IO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>
#include "disk/driver.h"
#include "disk/node.h"

enum io_flags {
    IO_FUA = 1,           /* write: on stable storage before it completes */
    IO_BULK = 2,          /* large copy: move the bytes on a worker thread */
    IO_DETECT_ZEROES = 4, /* write: runs of zeros become zero units instead of data */
};

int disk_preadv_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                   int niov, unsigned flags);
int disk_pwritev_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                    int niov, unsigned flags);

static inline int disk_pread_co(struct node *n, uint64_t offset, void *buf, size_t length) {
    struct iovec v = {buf, length};
    return disk_preadv_co(n, offset, length, &v, 1, 0);
}
static inline int disk_pwrite_co(struct node *n, uint64_t offset, const void *buf, size_t length) {
    struct iovec v = {(void *)buf, length};
    return disk_pwritev_co(n, offset, length, &v, 1, 0);
}

/* Range reads as zeros afterwards; zero_flags of driver.h. */
int disk_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags);
/* A hint: whole units inside the range may be dropped. */
int disk_discard_co(struct node *n, uint64_t offset, uint64_t length);
/* Everything acknowledged before the call is on stable storage when it returns 0. */
int disk_flush_co(struct node *n);

/*
 * Writes (`out`) or reads the state of a machine that the image keeps beside its disk; what was
 * never written reads as zeros.  -ENOTSUP: not in this format.
 */
int disk_vm_state_co(struct node *n, bool out, uint64_t offset, uint64_t length,
                     const struct iovec *iov, int niov);

/*
 * One coded unit (see codec in driver.h), already encoded.  `offset` is a multiple of granularity,
 * and the unit must not hold newer data that somebody else is writing.  -ENOTSUP without a codec.
 */
int disk_write_coded_co(struct node *n, uint64_t offset, const void *code, uint32_t coded_length);

/*
 * Room for [offset, +length), which begins and ends at units (or at the end of the disk), linked in
 * without writing a byte: it holds whatever the storage does there.  For images whose data goes
 * somewhere else (job/pipe.h).  At least one unit, *got bytes in whole units, at *host of n->file.
 * -ENOTSUP: the format's bytes do not lie there as they are.
 */
int disk_make_room_co(struct node *n, uint64_t offset, uint64_t length, uint64_t *host,
                      uint64_t *got);

/* What the guest sees at a place, over the whole chain. */
struct status {
    uint64_t length;
    bool zero;  /* reads as zeros */
    bool data;  /* host space is there (base:allocation's "not hole") */
    bool coded; /* data, but only through a codec */
    /*
     * Layer that answered: 0 = `n` itself, 1 = its backing ...; holes down to the bottom: the
     * number of layers, and `present` false.
     */
    unsigned depth;
    bool present;
    struct node *layer; /* the node that answered; NULL when not present */
    /* DATA and allocated zeros: where the bytes lie; not present: the room of the last layer; else
     * NULL. */
    struct node *storage;
    uint64_t host_offset;
};
enum status_flags {
    STATUS_PRECISE = 1, /* ask the storage for its holes too (SEEK_HOLE) */
    STATUS_TOP_ONLY = 2 /* do not look below `n`: holes answer present = false, depth 0 */
};
int disk_status_co(struct node *n, uint64_t offset, uint64_t length, unsigned status_flags,
                   struct status *out);

/* A hint: a flush will come; the storage below `n` may begin its work now. */
void disk_writeback_co(struct node *n);

int disk_resize_co(struct node *n, uint64_t size, int prealloc, struct err *e);
/* The same for an amend_co slot, which is inside a quiesce already. */
int disk_resize_quiesced_co(struct node *n, uint64_t size, int prealloc, struct err *e);

/*
 * Changes options of an image; `options` is a tree for the driver's amend_opts table (borrowed).
 * See amend_co in driver.h.  -ENOTSUP: the format has nothing to amend.
 */
int disk_amend_co(struct node *n, const json_t *options, const struct amend_ctx *ctx,
                  struct err *e);

/* Copies inside the storage where both sides are plain data of one driver that can.  -ENOTSUP: copy
 * by hand; -ERANGE: this range by hand, for it is not one piece of plain data on both sides, but
 * another may be.  `copy_flags`: enum copy_range_flags. */
int disk_copy_range_co(struct node *src, uint64_t src_off, struct node *dst, uint64_t dst_off,
                       uint64_t length, unsigned copy_flags);

int64_t disk_allocated(struct node *n); /* host bytes of this layer, or -errno */

/*
 * Page-aligned buffers for data, good for O_DIRECT.  NULL when memory is gone.  Up to 2 MiB.
 * buf_put accepts NULL. Any thread.
 */
void *buf_get(size_t len);
void buf_put(void *buf, size_t len);

#endif
