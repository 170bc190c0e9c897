/* SPDX-License-Identifier: MIT */
/*
 * Reading coded (compressed) units.
 *
 * A long read meets many units in a row.  Up to BATCH_UNITS of them are taken together: their
 * codes, which writers lay down one behind the other, are fetched by one read where they lie close,
 * and all are decoded in one trip to a worker thread.  A whole unit that lands in one contiguous
 * piece of the caller's buffer is decoded straight into it.
 *
 * Small reads of one unit again and again (a guest reading 4 KiB at a time) would decode the unit
 * each time, so the node keeps the last unit that was read in part.  It is valid while the node's
 * map generation is unchanged, so whatever could move or free its bytes drops it.
 */
#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/iov.h"
#include "disk/engine.h"
#include "disk/event.h"
#include "runtime/loop.h"

#define BATCH_UNITS 16
#define BATCH_CODE_BYTES (2 * MIB) /* codes fetched by one read */
#define BATCH_OUT_BYTES (4 * MIB)

/* Owner: the node's loop.  `buf` holds the unit at unit_offset as of `generation`. */
struct unit_cache {
    uint64_t unit_offset, generation;
    uint32_t length;
    uint8_t buf[];
};

void unit_cache_drop(struct node *n) {
    free(steal(&n->unit_cache));
}

struct coded_job {
    const struct codec *codec;
    const uint8_t *code;
    uint32_t code_length;
    uint8_t *out; /* the whole unit */
    uint32_t out_length;
    bool bounced; /* out is a slice of the batch's own buffer */
    uint64_t host_offset;
    /* What the caller wants of the unit, and where in its buffer. */
    uint32_t from, want;
    uint64_t iov_at;
    uint64_t unit_offset;
};

struct coded_batch {
    struct coded_job job[BATCH_UNITS];
    int n;
    uint64_t low, high; /* host range of all codes */
    uint64_t bounce_bytes;
    uint8_t *codes, *bounce;
};

static int batch_decode(void *arg) {
    struct coded_batch *b = arg;
    for (int i = 0; i < b->n; i++) {
        struct coded_job *j = &b->job[i];
        int r = j->codec->decode(j->code, j->code_length, j->out, j->out_length);
        if (r < 0)
            return r;
    }
    return 0;
}

/* The contiguous memory behind [at, at + len) of the list, or NULL. */
static uint8_t *iov_contiguous(const struct iovec *iov, int niov, uint64_t at, uint64_t len) {
    for (int i = 0; i < niov; i++) {
        if (at < iov[i].iov_len)
            return iov[i].iov_len - at >= len ? (uint8_t *)iov[i].iov_base + at : NULL;
        at -= iov[i].iov_len;
    }
    return NULL;
}

static void batch_add(struct coded_batch *b, const struct extent *x, uint64_t offset,
                      const struct iovec *iov, int niov, uint64_t iov_at) {
    struct coded_job *j = &b->job[b->n++];
    *j = (struct coded_job){.codec = x->codec,
                            .code_length = x->coded_length,
                            .out_length = x->unit_length,
                            .host_offset = x->host_offset,
                            .from = offset - x->unit_offset,
                            .want = x->length,
                            .iov_at = iov_at,
                            .unit_offset = x->unit_offset};
    if (j->want == j->out_length)
        j->out = iov_contiguous(iov, niov, iov_at, j->want);
    if (!j->out) {
        j->bounced = true;
        b->bounce_bytes += j->out_length;
    }
    b->low = b->n == 1 ? x->host_offset : min_u64(b->low, x->host_offset);
    b->high = max_u64(b->n == 1 ? 0 : b->high, x->host_offset + x->coded_length);
}

/* Whether the unit `x` may join without making the batch's reads or buffers too large. */
static bool batch_fits(const struct coded_batch *b, const struct extent *x) {
    uint64_t low = min_u64(b->low, x->host_offset);
    uint64_t high = max_u64(b->high, x->host_offset + x->coded_length);
    return b->n < BATCH_UNITS && high - low <= BATCH_CODE_BYTES &&
           b->bounce_bytes + x->unit_length <= BATCH_OUT_BYTES;
}

static int batch_run_co(struct coded_batch *b, struct node *storage) {
    uint64_t out_bytes = 0, at = 0;
    b->codes = buf_get(b->high - b->low);
    b->bounce = b->bounce_bytes ? buf_get(b->bounce_bytes) : NULL;
    if (!b->codes || (b->bounce_bytes && !b->bounce))
        return -ENOMEM;
    disk_event_co(storage, EVENT_read_compressed);
    int r = disk_pread_co(storage, b->low, b->codes, b->high - b->low);
    if (r < 0)
        return r;
    for (int i = 0; i < b->n; i++) {
        struct coded_job *j = &b->job[i];
        j->code = b->codes + (j->host_offset - b->low);
        if (j->bounced) {
            j->out = b->bounce + at;
            at += j->out_length;
        }
        out_bytes += j->out_length;
    }
    /* A trip to a worker costs about as much as decoding a few KiB. */
    return out_bytes <= 4 * KIB ? batch_decode(b) : offload_co(batch_decode, b);
}

static void cache_store(struct node *layer, const struct coded_job *j, uint64_t generation) {
    struct unit_cache *c = layer->unit_cache;
    if (!c || c->length < j->out_length) {
        unit_cache_drop(layer);
        c = malloc(sizeof(*c) + j->out_length);
        if (!c)
            return; /* only a cache */
        layer->unit_cache = c;
    }
    c->unit_offset = j->unit_offset;
    c->generation = generation;
    c->length = j->out_length;
    memcpy(c->buf, j->out, j->out_length);
}

static bool cache_read(struct node *layer, uint64_t offset, const struct extent *x,
                       const struct iovec *iov, int niov, uint64_t iov_at) {
    const struct unit_cache *c = layer->unit_cache;
    if (!c || c->unit_offset != x->unit_offset || c->generation != layer->map_generation ||
        c->length != x->unit_length)
        return false;
    iov_from_buf(iov, niov, iov_at, c->buf + (offset - x->unit_offset), x->length);
    return true;
}

int coded_read_co(struct node *layer, uint64_t offset, uint64_t length, const struct extent *first,
                  const struct iovec *iov, int niov, size_t iov_off, uint64_t *done) {
    struct extent x = *first;
    *done = x.length;
    if (cache_read(layer, offset, &x, iov, niov, iov_off))
        return 0;

    AUTO_FREE struct coded_batch *b = calloc(1, sizeof(*b));
    if (!b)
        return -ENOMEM;
    uint64_t generation = layer->map_generation;
    struct node *storage = x.storage;
    batch_add(b, &x, offset, iov, niov, iov_off);
    while (*done < length && offset + *done < layer->size) {
        uint64_t at = offset + *done;
        int r = format_map_co(layer, at, min_u64(length - *done, layer->size - at), &x);
        if (r < 0 || x.kind != EXTENT_CODED || x.storage != storage || !batch_fits(b, &x))
            break; /* the next turn of the walk meets it again, errors too */
        batch_add(b, &x, at, iov, niov, iov_off + *done);
        *done += x.length;
    }

    int r = batch_run_co(b, storage);
    for (int i = 0; !r && i < b->n; i++) {
        const struct coded_job *j = &b->job[i];
        if (!j->bounced)
            continue;
        iov_from_buf(iov, niov, j->iov_at, j->out + j->from, j->want);
        if (j->want < j->out_length)
            cache_store(layer, j, generation);
    }
    if (b->codes)
        buf_put(b->codes, b->high - b->low);
    if (b->bounce)
        buf_put(b->bounce, b->bounce_bytes);
    return r;
}
