/* SPDX-License-Identifier: MIT */
/*
 * Writes to formats that take codes only (node->coded_only): the engine encodes, unit by unit.
 *
 * What a unit holds beside the new data is read from what the guest sees there.  Units that read as
 * zeros and are to hold zeros are left alone.  The codec has room to make a unit larger (expands),
 * so every content can be expressed.  Such formats write a unit once: a second time is refused by
 * their place_co.
 *
 * Context: the exclusive lock on whole units is held.
 */
#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/iov.h"
#include "base/plant.h"
#include "disk/engine.h"
#include "runtime/loop.h"

struct encode_job {
    const struct codec *codec;
    const uint8_t *data;
    uint8_t *code;
    size_t unit;
    ssize_t coded; /* 0: all zeros */
};

static int encode_worker(void *arg) {
    struct encode_job *j = arg;
    j->coded = bytes_are_zero(j->data, j->unit)
                   ? 0
                   : j->codec->encode(j->data, j->unit, j->code, j->unit + j->codec->expands);
    return 0;
}

/* The unit at `offset`, whose new bytes are [from, +length) of it. */
static int write_unit_co(struct node *n, uint64_t offset, uint64_t from, uint64_t length,
                         const struct iovec *iov, int niov, uint64_t iov_off, uint8_t *data,
                         uint8_t *code) {
    uint64_t unit = n->granularity, inside = min_u64(unit, n->size - offset);
    struct encode_job j = {n->codec, data, code, unit, 0};
    struct placement p = {0};
    int r = 0;
    memset(data + inside, 0, unit - inside);
    if (length < inside) {
        struct iovec v = {data, inside};
        r = chain_read_co(n, offset, inside, &v, 1, 0);
    }
    if (r < 0)
        return r;
    iov_to_buf(iov, niov, iov_off, data + from, length);
    offload_co(encode_worker, &j);
    if (j.coded < 0)
        return (int)j.coded;
    if (!j.coded) {
        r = chain_is_zero_co(n, offset, inside);
        if (r)
            return r < 0 ? r : 0;
        j.coded = n->codec->encode(data, unit, code, unit + n->codec->expands);
        if (j.coded <= 0)
            return j.coded < 0 ? (int)j.coded : -EIO;
    }
    r = n->drv->format->place_co(n, offset, inside, PLACE_CODED, (uint32_t)j.coded, &p);
    if (r < 0)
        return r;
    r = disk_pwrite_co(p.storage, p.host_offset, code, (size_t)j.coded);
    if (!r && n->drv->format->publish_co)
        r = n->drv->format->publish_co(n, &p);
    else if (r && n->drv->format->abandon)
        n->drv->format->abandon(n, &p);
    n->map_generation++;
    return r;
}

int write_encoded_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                     int niov) {
    uint64_t unit = n->granularity;
    uint8_t *data = buf_get(unit), *code = buf_get(unit + n->codec->expands);
    int r = data && code ? 0 : -ENOMEM;
    for (uint64_t done = 0, part; !r && done < length; done += part) {
        uint64_t at = align_down(offset + done, unit), from = offset + done - at;
        part = min_u64(length - done, unit - from);
        r = write_unit_co(n, at, from, part, iov, niov, done, data, code);
    }
    buf_put(data, unit);
    buf_put(code, unit + n->codec->expands);
    return r;
}
