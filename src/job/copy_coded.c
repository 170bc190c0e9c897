/* SPDX-License-Identifier: MIT */
/*
 * The compression pipeline: read a window, encode all of its units in one go on a worker thread,
 * write the codes in order.
 *
 * Each unit ends in one of three ways: all zeros (nothing, or a zero unit), code, or plain data
 * when the code would not be smaller.  Windows of different workers are encoded at the same time,
 * so all processors are busy while one window is being written; the turn is held over the writes
 * because the target packs codes one behind the other.
 *
 * A unit that the copy fills only in part (the seam between two inputs of odd sizes) is written as
 * plain data: coded units are whole.  The last unit of a disk is completed with zeros, which read
 * as what lies behind the end.
 */
#include <errno.h>
#include <string.h>
#include "job/copy_int.h"
#include "base/bytes.h"
#include "base/ck.h"
#include "disk/driver.h"
#include "disk/node.h"
#include "runtime/loop.h"

/* The part of the window that lies in its i-th unit. */
struct part {
    uint64_t at; /* in the target */
    size_t from, length;
};

static bool part_at(const struct copy_job *j, const struct copy_window *w, size_t from,
                    struct part *p) {
    if (from >= w->length)
        return false;
    p->at = j->dst_offset + w->offset + from;
    p->from = from;
    p->length = min_u64(j->unit - p->at % j->unit, w->length - from);
    return true;
}

/* Whole, or cut only by the end of the disk. */
static bool part_is_unit(const struct copy_job *j, const struct part *p) {
    return is_aligned(p->at, j->unit) &&
           (p->length == j->unit || p->at + p->length == j->dst->size);
}

/* On a worker thread: touches nothing but the worker's own buffers and constants of the job. */
static int encode_worker(void *arg) {
    struct copy_worker *k = arg;
    const struct copy_job *j = k->job;
    const struct codec *codec = j->dst->codec;
    struct part p;
    unsigned i = 0;
    for (size_t from = 0; part_at(j, &k->w, from, &p); from += p.length, i++) {
        uint8_t *data = k->buf + p.from;
        if (j->opts->sparse_bytes && bytes_are_zero(data, p.length)) {
            k->coded[i] = 0;
        } else if (!part_is_unit(j, &p)) {
            k->coded[i] = -ENOSPC;
        } else {
            /* Room for the whole unit is there: only the last window's last unit is short. */
            memset(data + p.length, 0, j->unit - p.length);
            k->coded[i] = codec->encode(data, j->unit, k->code + p.from, j->unit);
        }
    }
    return 0;
}

static int write_plain_co(struct copy_worker *k, const struct part *p) {
    struct copy_job *j = k->job;
    struct iovec v = {k->buf + p->from, p->length};
    int r = disk_pwritev_co(j->dst, p->at, p->length, &v, 1, 0);
    return r < 0 ? copy_fail(j, r, "writing to", j->dst, p->at) : 0;
}

static int write_units_co(struct copy_worker *k) {
    struct copy_job *j = k->job;
    struct part p;
    unsigned i = 0;
    int r = 0;
    for (size_t from = 0; r == 0 && part_at(j, &k->w, from, &p); from += p.length, i++) {
        int32_t coded = k->coded[i];
        if (coded == 0) {
            r = copy_zero_co(j, p.at, p.length);
        } else if (coded > 0) {
            r = disk_write_coded_co(j->dst, p.at, k->code + p.from, coded);
            if (r == -ENOTSUP || r == -EFBIG) /* beyond what this target can name */
                r = write_plain_co(k, &p);
            else if (r < 0)
                copy_fail(j, r, "writing to", j->dst, p.at);
            copy_writeback_later(j, coded);
        } else if (coded == -ENOSPC) {
            r = write_plain_co(k, &p);
            copy_writeback_later(j, p.length);
        } else {
            r = copy_fail(j, coded, "compressing for", j->dst, p.at);
        }
    }
    return r;
}

int copy_coded_co(struct copy_worker *k) {
    int r = copy_read_co(k);
    if (r < 0)
        return r;
    offload_co(encode_worker, k);
    copy_turn_co(k);
    if (copy_stopped(k->job))
        return -ECANCELED;
    r = write_units_co(k);
    copy_turn_pass(k);
    return r;
}
