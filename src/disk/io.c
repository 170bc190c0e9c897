/* SPDX-License-Identifier: MIT */
/*
 * Requests that are not writes of data: read, zero, discard, flush, resize, copy inside the
 * storage.
 *
 * Each one: checks the range, enters the node (waits while it is quiesced), takes its range lock
 * and calls the driver's slot, or does the slot's documented default.
 */
#include <assert.h>
#include <errno.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "base/iov.h"
#include "base/plant.h"
#include "disk/engine.h"
#include "disk/event.h"

/* One metadata call covers at most this much, so that others get their turn in between. */
#define ZERO_STEP GIB

int disk_preadv_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                   int niov, unsigned flags) {
    if (!length)
        return 0;
    if (length > INT64_MAX || offset > INT64_MAX - length)
        return -EINVAL;
    node_enter_co(n);
    int r;
    if (!n->drv->format) {
        r = storage_preadv_co(n, offset, length, iov, niov, flags);
    } else if (offset > n->size || length > n->size - offset) {
        r = -EINVAL;
    } else {
        struct range_req lock;
        range_lock_co(&n->locks, &lock, offset, length, false);
        r = chain_read_co(n, offset, length, iov, niov, flags);
        range_unlock(&n->locks, &lock);
    }
    node_leave(n);
    return r;
}

static int storage_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    uint64_t low = align_up(offset, n->request_align);
    uint64_t high = align_down(offset + length, n->request_align);
    int r = -ENOTSUP;
    if (n->drv->storage->zero_co && low < high)
        r = n->drv->storage->zero_co(n, low, high - low, zero_flags & ~ZERO_FUA);
    if (r == -ENOTSUP)
        return zero_flags & ZERO_NO_FALLBACK ? -ENOTSUP : write_zeros_co(n, offset, length);
    if (!r && offset < low)
        r = write_zeros_co(n, offset, low - offset);
    if (!r && high < offset + length)
        r = write_zeros_co(n, high, offset + length - high);
    return r;
}

/* The layer has no bytes of its own in [offset, +length). */
static int layer_is_empty_co(struct node *n, uint64_t offset, uint64_t length) {
    while (length) {
        struct extent x;
        int r = format_map_co(n, offset, length, &x);
        if (r < 0)
            return r;
        if (x.kind == EXTENT_DATA || x.kind == EXTENT_CODED)
            return 0;
        offset += x.length;
        length -= x.length;
    }
    return 1;
}

/* Zeros in part of a subunit, around which the rest reads as zeros: the whole becomes one. */
static int zero_around_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    uint64_t unit = align_down(offset, node_subunit(n));
    uint64_t whole = min_u64(node_subunit(n), n->size - unit), end = offset + length;
    if (length >= whole || !n->drv->format->set_zero_co)
        return -ENOTSUP;
    int r = layer_is_empty_co(n, unit, whole);
    if (r > 0 && offset > unit)
        r = chain_is_zero_co(n, unit, offset - unit);
    if (r > 0 && end < unit + whole)
        r = chain_is_zero_co(n, end, unit + whole - end);
    if (r <= 0)
        return r ? r : -ENOTSUP;
    n->map_generation++;
    return n->drv->format->set_zero_co(n, unit, whole, zero_flags & ~ZERO_FUA);
}

/*
 * Zeros in part of a unit: nothing to do where it reads so already, unless the layer is to say so
 * itself.
 */
static int zero_part_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    if (!length)
        return 0;
    int r = -ENOTSUP;
    if (zero_flags & ZERO_PRESENT)
        r = zero_around_co(n, offset, length, zero_flags);
    if (r != -ENOTSUP)
        return r;
    int zero = zero_flags & ZERO_PRESENT ? 0 : chain_is_zero_co(n, offset, length);
    if (zero)
        return zero < 0 ? zero : 0;
    return zero_flags & ZERO_NO_FALLBACK ? -ENOTSUP : write_zeros_co(n, offset, length);
}

/*
 * Whole subunits.  Parts of units go by themselves: what a format cannot do there must not make
 * data of the units beside them.
 */
static int zero_subunits_co(struct node *n, uint64_t low, uint64_t high, unsigned zero_flags) {
    uint64_t unit = n->granularity;
    int r = 0;
    while (!r && low < high) {
        uint64_t end = high == n->size ? high : align_down(high, unit);
        if (!is_aligned(low, unit) || end <= low)
            end = min_u64(high, align_down(low, unit) + unit);
        r = n->drv->format->set_zero_co
                ? n->drv->format->set_zero_co(n, low, end - low, zero_flags & ~ZERO_FUA)
                : -ENOTSUP;
        n->map_generation++;
        if (r == -ENOTSUP)
            r = zero_part_co(n, low, end - low, zero_flags);
        low = end;
    }
    return r;
}

static int format_zero_step_co(struct node *n, uint64_t offset, uint64_t length,
                               unsigned zero_flags) {
    uint64_t unit = node_subunit(n), end = offset + length;
    uint64_t low = align_up(offset, unit);
    uint64_t high = end == n->size ? end : align_down(end, unit);
    if (low > high) /* inside one */
        return zero_part_co(n, offset, length, zero_flags);
    int r = zero_subunits_co(n, low, high, zero_flags);
    if (!r)
        r = zero_part_co(n, offset, low - offset, zero_flags);
    if (!r)
        r = zero_part_co(n, high, end - high, zero_flags);
    return r;
}

static int format_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    int r = 0;
    while (!r && length) {
        uint64_t step = min_u64(length, ZERO_STEP - offset % ZERO_STEP);
        uint64_t low = align_down(offset, n->granularity);
        struct range_req lock;
        range_lock_co(&n->locks, &lock, low, align_up(offset + step, n->granularity) - low, true);
        r = format_zero_step_co(n, offset, step, zero_flags);
        range_unlock(&n->locks, &lock);
        offset += step;
        length -= step;
    }
    return r;
}

int disk_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    if (!node_is_rw(n))
        return -EROFS;
    if (!length)
        return 0;
    if (length > INT64_MAX || offset > INT64_MAX - length)
        return -EINVAL;
    int r = -ENOSPC;
    node_enter_co(n);
    if (!n->drv->format)
        r = storage_zero_co(n, offset, length, zero_flags);
    else if (offset <= n->size && length <= n->size - offset &&
             !(r = record_change_co(n, offset, length)))
        r = format_zero_co(n, offset, length, zero_flags);
    node_leave(n);
    if (!r && (zero_flags & ZERO_FUA || n->flags & NODE_WRITETHROUGH))
        r = disk_flush_co(n);
    return r;
}

int disk_discard_co(struct node *n, uint64_t offset, uint64_t length) {
    if (!node_is_rw(n))
        return -EROFS;
    if (length > INT64_MAX || offset > INT64_MAX - length)
        return -EINVAL;
    uint64_t unit = n->drv->format ? node_subunit(n) : n->request_align;
    uint64_t low = align_up(offset, unit), end = offset + length;
    node_enter_co(n);
    uint64_t high = n->drv->format && end == n->size ? end : align_down(end, unit);
    int r = n->drv->format && (offset > n->size || length > n->size - offset) ? -ENOSPC : 0;
    if (!r && low < high)
        r = record_change_co(n, low, high - low);
    while (!r && low < high) {
        uint64_t step = min_u64(high - low, ZERO_STEP - low % ZERO_STEP);
        if (!n->drv->format) {
            if (n->drv->storage->discard_co)
                r = n->drv->storage->discard_co(n, low, step);
        } else if (n->drv->format->discard_co) {
            struct range_req lock;
            uint64_t from = align_down(low, n->granularity);
            range_lock_co(&n->locks, &lock, from, align_up(low + step, n->granularity) - from,
                          true);
            r = n->drv->format->discard_co(n, low, step);
            n->map_generation++;
            range_unlock(&n->locks, &lock);
        }
        low += step;
    }
    node_leave(n);
    return r == -ENOTSUP ? 0 : r; /* only a hint */
}

int disk_flush_co(struct node *n) {
    if (!node_is_rw(n) || n->flags & NODE_NO_FLUSH)
        return 0;
    node_enter_co(n);
    int r = 0;
    disk_event_co(n->drv->format ? n->file : NULL, EVENT_flush_to_os);
    disk_event_co(n, EVENT_flush_to_disk);
    if (n->drv->storage)
        r = n->drv->storage->flush_co ? n->drv->storage->flush_co(n) : 0;
    else if (n->drv->format->flush_co)
        r = n->drv->format->flush_co(n);
    else if (n->file)
        r = disk_flush_co(n->file);
    node_leave(n);
    return r;
}

void disk_writeback_co(struct node *n) {
    for (size_t i = 0; i < n->part_count; i++)
        disk_writeback_co(n->parts[i].node);
    struct node *s = node_data_storage(n); /* of metadata there is little */
    if (!node_is_rw(s) || s->flags & NODE_NO_FLUSH || !s->drv->storage->writeback_co)
        return;
    node_enter_co(s);
    s->drv->storage->writeback_co(s);
    node_leave(s);
}

/*
 * Growth, before the new size is named: nothing but zeros lies behind the old end.  That end may
 * cut a unit, which holds anything behind it, and a longer layer below would come to light.  The
 * node has its larger size meanwhile, so that the ordinary ways reach there; nobody else is inside.
 */
static int zero_ahead_co(struct node *n, uint64_t size) {
    uint64_t old = n->size, end = min_u64(align_up(size, n->granularity), INT64_MAX);
    n->size = end;
    int r = format_zero_co(n, old, end - old, ZERO_MAY_UNMAP);
    n->size = old;
    if (!r && n->drv->format->flush_co) /* disk_flush_co would wait for the end of the quiesce */
        r = n->drv->format->flush_co(n);
    return r;
}

static int format_resize_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    const struct format_ops *ops = n->drv->format;
    uint64_t old = n->size, reach = size;
    int r = 0;
    if (size > old && ops->reach_co)
        r = ops->reach_co(n, size, e);
    else
        reach = min_u64(size, align_up(old, n->granularity));
    if (!r && reach > old && !PLANTED(SIZE_BEFORE_ZEROS) && (r = zero_ahead_co(n, reach)) < 0)
        err_errno(e, -r, "making zeros of what lies behind the end of the disk");
    if (!r)
        r = ops->resize_co(n, size, prealloc, e);
    if (!r && PLANTED(SIZE_BEFORE_ZEROS) && reach > old) {
        n->size = old;
        r = zero_ahead_co(n, reach);
        n->size = size;
    }
    return r;
}

int disk_resize_quiesced_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    if (!node_is_rw(n))
        return err_set(e, EROFS, "the image is open read-only");
    if (size > INT64_MAX)
        return err_set(e, EFBIG, "size %llu is above the limit of %lld bytes",
                       (unsigned long long)size, (long long)INT64_MAX);
    if (n->drv->format ? !n->drv->format->resize_co : !n->drv->storage->truncate_co)
        return err_set(e, ENOTSUP, "format '%s' cannot change its size", n->drv->name);
    int r = bitmap_resize_begin_co(n, size, e);
    if (!r) {
        r = n->drv->format ? format_resize_co(n, size, prealloc, e)
                           : n->drv->storage->truncate_co(n, size, prealloc, e);
        bitmap_resize_end(n);
    }
    n->map_generation++;
    return r;
}

int disk_resize_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    node_quiesce_co(n);
    int r = disk_resize_quiesced_co(n, size, prealloc, e);
    node_resume(n);
    return r;
}

/* The single run of plain data behind a range, or -ERANGE. */
static int plain_run_co(struct node *n, uint64_t offset, uint64_t length, struct chain_run *run) {
    int r = chain_map_co(n, offset, length, false, run);
    if (r < 0)
        return r;
    if (run->layer && run->ext.kind == EXTENT_DATA && run->ext.length == length &&
        run->ext.storage->drv->storage)
        return 0;
    chain_run_end(run);
    return -ERANGE;
}

/* Both ranges are locked. */
static int copy_locked_co(struct node *src, uint64_t src_off, struct node *dst, uint64_t dst_off,
                          uint64_t length, unsigned copy_flags) {
    struct chain_run from;
    int r = plain_run_co(src, src_off, length, &from);
    if (r < 0)
        return r;
    const struct storage_ops *ops = from.ext.storage->drv->storage;
    struct placement p = {0};
    r = ops->copy_range_co ? dst->drv->format->place_co(dst, dst_off, length, 0, 0, &p) : -ENOTSUP;
    if (!r) {
        if (p.storage->drv != from.ext.storage->drv || p.storage == from.ext.storage)
            r = -ENOTSUP;
        else if (p.length != length || p.head || p.tail)
            r = -ERANGE;
        else
            r = ops->copy_range_co(from.ext.storage, from.ext.host_offset, p.storage, p.host_offset,
                                   length, copy_flags);
        if (r < 0 && dst->drv->format->abandon)
            dst->drv->format->abandon(dst, &p);
        if (!r && dst->drv->format->publish_co)
            r = dst->drv->format->publish_co(dst, &p);
        dst->map_generation++;
    }
    chain_run_end(&from);
    return r;
}

int disk_copy_range_co(struct node *src, uint64_t src_off, struct node *dst, uint64_t dst_off,
                       uint64_t length, unsigned copy_flags) {
    if (!node_is_rw(dst))
        return -EROFS;
    if (!length || src_off >= src->size || length > src->size - src_off || dst_off >= dst->size ||
        length > dst->size - dst_off)
        return -EINVAL;
    if (src == dst || !src->drv->format || !dst->drv->format || !dst->drv->format->place_co)
        return -ENOTSUP;
    uint64_t low = align_down(dst_off, dst->granularity);
    struct range_req from, to;
    node_enter_co(src);
    node_enter_co(dst);
    range_lock_co(&src->locks, &from, src_off, length, false);
    range_lock_co(&dst->locks, &to, low, align_up(dst_off + length, dst->granularity) - low, true);
    int r = record_change_co(dst, dst_off, length);
    if (!r)
        r = copy_locked_co(src, src_off, dst, dst_off, length, copy_flags);
    range_unlock(&dst->locks, &to);
    range_unlock(&src->locks, &from);
    node_leave(dst);
    node_leave(src);
    return r;
}

int64_t disk_allocated(struct node *n) {
    struct node *s = node_storage(n), *data = node_data_storage(n);
    if (!s->drv->storage || !s->drv->storage->allocated)
        return -ENOTSUP;
    int64_t bytes = s->drv->storage->allocated(s), more = 0;
    if (data != s && data->drv->storage && data->drv->storage->allocated)
        more = data->drv->storage->allocated(data);
    for (size_t i = 0; i < n->part_count; i++) {
        int64_t part = disk_allocated(n->parts[i].node);
        more += part > 0 ? part : 0;
    }
    return bytes < 0 ? bytes : bytes + (more > 0 ? more : 0);
}
