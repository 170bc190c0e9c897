/* SPDX-License-Identifier: MIT */
/*
 * The filter "copy-on-read": what is read from layers below the image is kept in the image.
 *
 *      copy-on-read --file--> format --backing--> ...
 *
 * Before a read is answered, each run of it that the top layer lacks is read in whole units, locked
 * against writers of the same units, and written back: zeros as zeros, all else as data.  What the
 * layer has already is not written again.  It opens read-write only.
 */
#include <errno.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "base/iov.h"
#include "disk/event.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"

struct cor_opts {
    char *bottom;
};

enum { PIECE_BYTES = 1024 * 1024 };

/* One run of whole units that the top layer lacks. */
static int keep_data_co(struct node *n, uint64_t offset, uint64_t length) {
    uint8_t *buf = buf_get(PIECE_BYTES);
    int r = buf ? 0 : -ENOMEM;
    for (uint64_t part; !r && length; offset += part, length -= part) {
        part = min_u64(length, PIECE_BYTES);
        r = disk_pread_co(n->file, offset, buf, part);
        if (!r) {
            disk_event_co(disk_debug_node(n->file), EVENT_cor_write);
            r = disk_pwrite_co(n->file, offset, buf, part);
        }
    }
    buf_put(buf, PIECE_BYTES);
    return r;
}

/* Keeps [offset, end), a hole of the top layer; *next is where it got to. */
static int keep_run_co(struct node *n, uint64_t offset, uint64_t end, uint64_t *next) {
    struct node *top = n->file;
    struct status st;
    int r = disk_status_co(top, offset, end - offset, 0, &st);
    if (r)
        return r;
    uint64_t stop = offset + st.length;
    /* A unit that is zeros only in part is data. */
    if (st.zero && stop < end)
        stop = align_down(stop, node_subunit(top));
    if (st.zero && stop > offset) {
        disk_event_co(disk_debug_node(top), EVENT_cor_write);
        *next = stop;
        return disk_zero_co(top, offset, stop - offset, ZERO_PRESENT);
    }
    *next = min_u64(align_up(offset + st.length, node_subunit(top)), end);
    return keep_data_co(n, offset, *next - offset);
}

static int keep_co(struct node *n, uint64_t offset, uint64_t length) {
    struct node *top = n->file;
    uint64_t end = offset + length;
    int r = 0;
    while (!r && offset < end) {
        struct status st;
        r = disk_status_co(top, offset, end - offset, STATUS_TOP_ONLY, &st);
        if (r)
            break;
        if (st.present) {
            offset += st.length;
            continue;
        }
        uint64_t at = align_down(offset, node_subunit(top));
        uint64_t stop = min_u64(align_up(offset + st.length, node_subunit(top)), top->size);
        while (!r && at < stop)
            r = keep_run_co(n, at, stop, &at);
        offset = stop;
    }
    return r;
}

static int cor_preadv_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                         int niov, unsigned flags) {
    uint64_t inside = offset >= n->size ? 0 : min_u64(length, n->size - offset);
    int r = 0;
    if (inside && node_is_rw(n)) {
        uint64_t low = align_down(offset, node_subunit(n->file));
        struct range_req lock;
        range_lock_co(&n->locks, &lock, low, align_up(offset + inside, node_subunit(n->file)) - low,
                      true);
        r = keep_co(n, offset, inside);
        range_unlock(&n->locks, &lock);
    }
    if (r || !inside) {
        iov_zero(iov, niov, 0, length);
        return r;
    }
    struct iovec v[IOV_MAX_STRATA];
    int k = iov_slice(iov, niov, 0, inside, v);
    r = disk_preadv_co(n->file, offset, inside, v, k, flags);
    if (!r && inside < length)
        iov_zero(iov, niov, inside, length - inside);
    return r;
}

/* A write beside a copy of the same unit waits: the copy must not undo it. */
static int cor_pwritev_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                          int niov, unsigned flags) {
    struct range_req lock;
    range_lock_co(&n->locks, &lock, offset, length, false);
    int r = disk_pwritev_co(n->file, offset, length, iov, niov, flags);
    range_unlock(&n->locks, &lock);
    n->size = n->file->size;
    return r;
}

static int cor_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    struct range_req lock;
    range_lock_co(&n->locks, &lock, offset, length, false);
    int r = disk_zero_co(n->file, offset, length, zero_flags);
    range_unlock(&n->locks, &lock);
    n->size = n->file->size;
    return r;
}

static int cor_discard_co(struct node *n, uint64_t offset, uint64_t length) {
    return disk_discard_co(n->file, offset, length);
}

static int cor_flush_co(struct node *n) {
    return disk_flush_co(n->file);
}

static int cor_truncate_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    int r = disk_resize_co(n->file, size, prealloc, e);
    n->size = n->file->size;
    return r;
}

static int cor_extents_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    struct status st;
    *out = (struct extent){.length = length, .kind = EXTENT_ZERO};
    if (offset >= n->file->size)
        return 0;
    int r = disk_status_co(n->file, offset, min_u64(length, n->file->size - offset), STATUS_PRECISE,
                           &st);
    if (r)
        return r;
    out->length = min_u64(st.length, length);
    if (!st.zero) {
        out->kind = EXTENT_DATA;
        out->flags = EXTENT_IN_PLACE;
        out->storage = n;
        out->host_offset = offset;
    }
    return 0;
}

static int64_t cor_allocated(struct node *n) {
    return disk_allocated(n->file);
}

static int cor_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    const struct cor_opts *o = n->opts;
    if (o->bottom)
        return err_set(e, ENOTSUP, "copy-on-read: 'bottom' is not in this version");
    if (!node_is_rw(n))
        return err_set(e, EPERM, "Block node is read-only");
    int r = node_open_child_co(n, ctx, "file", CHILD_FILE_RAW, &n->file, e);
    if (r)
        return r;
    n->size = n->file->size;
    n->granularity = 1;
    n->request_align = 1;
    return 0;
}

static int cor_reopen_co(struct node *n, unsigned new_flags, struct err *e) {
    return 0;
}

static const struct opt cor_open_opts[] = {
    OPT_STR(struct cor_opts, bottom, "bottom", OPT_OPEN, "not in this version"),
    OPT_CHILD("file", OPT_OPEN, "the disk that keeps what is read"),
    OPT_END,
};

static const struct storage_ops cor_storage = {
    .preadv_co = cor_preadv_co,
    .pwritev_co = cor_pwritev_co,
    .zero_co = cor_zero_co,
    .discard_co = cor_discard_co,
    .flush_co = cor_flush_co,
    .truncate_co = cor_truncate_co,
    .extents_co = cor_extents_co,
    .allocated = cor_allocated,
};

const struct driver driver_copy_on_read = {
    .name = "copy-on-read",
    .kind = DRIVER_FILTER,
    .help = "keeps in the image what is read from below it",
    .opts = cor_open_opts,
    .opts_size = sizeof(struct cor_opts),
    .open_co = cor_open_co,
    .reopen_co = cor_reopen_co,
    .storage = &cor_storage,
};
