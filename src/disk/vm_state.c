/* SPDX-License-Identifier: MIT */
/*
 * The state of a machine that an image keeps beside its disk, behind the end of it.
 *
 * The format says where that is (vm_state_at).  The node is quiesced and has a larger size for the
 * moment, so that the ordinary map, place and publish reach there; what lies below the image has
 * no part in it, so the layer is taken away meanwhile.
 */
#include <errno.h>

#include "base/ck.h"
#include "disk/engine.h"

/* The node is as it was before when this returns; nobody else is inside. */
static int move_co(struct node *n, bool out, uint64_t at, uint64_t length, const struct iovec *iov,
                   int niov) {
    uint64_t size = n->size;
    struct node *backing = n->backing;
    int r = 0;
    if (out && n->drv->format->reach_co)
        r = n->drv->format->reach_co(n, at + length, NULL);
    if (r < 0)
        return r;
    n->size = align_up(at + length, n->granularity);
    n->backing = NULL;
    r = out ? write_locked_co(n, at, length, iov, niov, 0)
            : chain_read_co(n, at, length, iov, niov, 0);
    n->backing = backing;
    n->size = size;
    return r;
}

int disk_vm_state_co(struct node *n, bool out, uint64_t offset, uint64_t length,
                     const struct iovec *iov, int niov) {
    uint64_t at, end;
    if (out && !node_is_rw(n))
        return -EROFS;
    if (!n->drv->format || !n->drv->format->vm_state_at)
        return -ENOTSUP;
    if (!length)
        return 0;
    node_quiesce_co(n);
    int r = -EFBIG;
    if (ck_add(n->drv->format->vm_state_at(n), offset, &at) && ck_add(at, length, &end) &&
        end <= INT64_MAX - n->granularity)
        r = move_co(n, out, at, length, iov, niov);
    node_resume(n);
    return r;
}
