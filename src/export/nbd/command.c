/* SPDX-License-Identifier: MIT */
/*
 * What each NBD command does, and the shape of its answer.
 *
 * The short path is a read of at most SLOT_BYTES: into the request's own slot, with the header
 * written right before the data, so that the whole reply is one element of the scatter list.
 *
 * With structured replies, reads from HOLES_FROM on ask the map (no SEEK_HOLE: that costs system
 * calls) and send runs of zeros as hole chunks; at most CHUNKS_MAX chunks, then data for the rest.
 *
 * Success without payload is a simple reply (16 bytes; the protocol allows it) unless headers are
 * extended; failures are error chunks once structured replies were negotiated.
 *
 * A request passes the export's limits first, then its pause (export.c), then its checks.
 */
#include "export/nbd/client.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "base/ck.h"
#include "disk/io.h"

#define HOLES_FROM (64u * 1024)
#define CHUNKS_MAX 16
/* Copies of this size are moved on a worker thread, so that other clients are not held up. */
#define BULK_FROM (1u << 20)

/* ---------------------------------------------------------------- replies */

static uint8_t *reply_head(struct nbd_req *r, size_t bytes) {
    return r->data - bytes;
}

static void reply_inline(struct nbd_req *r, void *head, size_t len) {
    r->inline_iov[0] = (struct iovec){head, len};
    r->iov = r->inline_iov;
    r->niov = 1;
    nbd_reply_queue(r);
}

static void reply_ok(struct nbd_req *r) {
    if (r->c->extended) {
        uint8_t *h = reply_head(r, NBD_EXTENDED_CHUNK_BYTES);
        reply_inline(r, h,
                     nbd_chunk_encode(h, true, &r->cmd, NBD_CHUNK_FLAG_DONE, NBD_CHUNK_NONE, 0));
        return;
    }
    uint8_t *h = reply_head(r, NBD_SIMPLE_BYTES);
    reply_inline(r, h, nbd_simple_encode(h, r->cmd.cookie, 0));
}

void nbd_command_fail(struct nbd_req *r, int error, const char *message) {
    uint32_t wire = nbd_errno_from(error);
    r->c->errors++;
    r->c->x->total_errors++;
    if (!r->c->structured) {
        uint8_t *h = reply_head(r, NBD_SIMPLE_BYTES);
        reply_inline(r, h, nbd_simple_encode(h, r->cmd.cookie, wire));
        return;
    }
    uint16_t len = message ? (uint16_t)strlen(message) : 0;
    uint8_t *h = reply_head(r, NBD_ERROR_CHUNK_MAX + len);
    size_t n = nbd_error_chunk_encode(h, r->c->extended, &r->cmd, wire, len);
    if (len)
        memcpy(h + n, message, len);
    reply_inline(r, h, n + len);
}

static void reply_result(struct nbd_req *r, int rc) {
    if (rc < 0)
        nbd_command_fail(r, rc, r->message);
    else
        reply_ok(r);
}

/* ---------------------------------------------------------------- read */

static void read_small_co(struct nbd_req *r) {
    struct nbd_client *c = r->c;
    struct iovec v = {r->data, r->cmd.length};
    int rc = disk_preadv_co(c->x->base.node, r->cmd.offset, r->cmd.length, &v, 1, 0);
    if (rc < 0) {
        nbd_command_fail(r, rc, NULL);
    } else if (c->structured) {
        size_t head = nbd_head_bytes(c->extended) + 8;
        uint8_t *h = reply_head(r, head);
        nbd_data_chunk_encode(h, c->extended, &r->cmd, NBD_CHUNK_FLAG_DONE, r->cmd.offset,
                              (uint32_t)r->cmd.length);
        reply_inline(r, h, head + r->cmd.length);
    } else {
        uint8_t *h = reply_head(r, NBD_SIMPLE_BYTES);
        nbd_simple_encode(h, r->cmd.cookie, 0);
        reply_inline(r, h, NBD_SIMPLE_BYTES + r->cmd.length);
    }
}

/* One header, then all the data. */
static void read_whole_co(struct nbd_req *r) {
    struct nbd_client *c = r->c;
    int n = nbd_req_payload(r, r->inline_iov + 1);
    struct iovec iov[BUFS_MAX];
    memcpy(iov, r->inline_iov + 1, (size_t)n * sizeof(*iov));
    int rc = disk_preadv_co(c->x->base.node, r->cmd.offset, r->cmd.length, iov, n,
                            r->cmd.length >= BULK_FROM ? IO_BULK : 0);
    if (rc < 0) {
        nbd_command_fail(r, rc, NULL);
        return;
    }
    uint8_t *h = reply_head(r, NBD_DATA_CHUNK_MAX);
    size_t hn = c->structured ? nbd_data_chunk_encode(h, c->extended, &r->cmd, NBD_CHUNK_FLAG_DONE,
                                                      r->cmd.offset, (uint32_t)r->cmd.length)
                              : nbd_simple_encode(h, r->cmd.cookie, 0);
    r->inline_iov[0] = (struct iovec){h, hn};
    r->iov = r->inline_iov;
    r->niov = n + 1;
    nbd_reply_queue(r);
}

struct run {
    uint32_t offset, length; /* inside the request */
    bool zero;
};

/* What the map says of the request as at most CHUNKS_MAX runs; 0 when it cannot say. */
static int read_runs_co(struct nbd_req *r, struct run *runs) {
    int n = 0;
    uint32_t at = 0;
    while (at < r->cmd.length) {
        uint32_t left = (uint32_t)r->cmd.length - at;
        struct status st;
        if (n == CHUNKS_MAX - 1)
            st = (struct status){.length = left, .zero = false};
        else if (disk_status_co(r->c->x->base.node, r->cmd.offset + at, left, 0, &st) < 0)
            return 0;
        uint32_t len = st.length < left ? (uint32_t)st.length : left;
        if (n && runs[n - 1].zero == st.zero)
            runs[n - 1].length += len;
        else
            runs[n++] = (struct run){at, len, st.zero};
        at += len;
    }
    return n;
}

/* Bytes [offset, offset + length) of the request's payload buffers; number of elements. */
static int payload_slice(struct nbd_req *r, uint32_t offset, uint32_t length, struct iovec *out) {
    int n = 0;
    while (length) {
        uint32_t in = offset % BUF_BYTES;
        uint32_t len = BUF_BYTES - in < length ? BUF_BYTES - in : length;
        out[n++] = (struct iovec){(uint8_t *)r->bufs[offset / BUF_BYTES] + in, len};
        offset += len;
        length -= len;
    }
    return n;
}

struct chunked {
    struct iovec iov[CHUNKS_MAX * 2 + BUFS_MAX];
    uint8_t heads[CHUNKS_MAX][NBD_HOLE_CHUNK_MAX];
};

/* A reply of data and hole chunks. */
static void read_chunked_co(struct nbd_req *r, const struct run *runs, int nruns) {
    struct nbd_client *c = r->c;
    struct chunked *k = malloc(sizeof(*k));
    if (!k) {
        nbd_command_fail(r, -ENOMEM, NULL);
        return;
    }
    r->extra = k;
    int niov = 0;
    for (int i = 0; i < nruns; i++) {
        uint16_t flags = i == nruns - 1 ? NBD_CHUNK_FLAG_DONE : 0;
        uint64_t offset = r->cmd.offset + runs[i].offset;
        uint8_t *h = k->heads[i];
        size_t hn = (runs[i].zero ? nbd_hole_chunk_encode : nbd_data_chunk_encode)(
            h, c->extended, &r->cmd, flags, offset, runs[i].length);
        k->iov[niov++] = (struct iovec){h, hn};
        if (runs[i].zero)
            continue;
        struct iovec part[BUFS_MAX];
        int n = payload_slice(r, runs[i].offset, runs[i].length, part);
        memcpy(k->iov + niov, part, (size_t)n * sizeof(*part));
        niov += n;
        int rc = disk_preadv_co(c->x->base.node, offset, runs[i].length, part, n,
                                runs[i].length >= BULK_FROM ? IO_BULK : 0);
        if (rc < 0) {
            nbd_command_fail(r, rc, NULL);
            return;
        }
    }
    r->iov = k->iov;
    r->niov = niov;
    nbd_reply_queue(r);
}

static void read_co(struct nbd_req *r) {
    struct nbd_client *c = r->c;
    if (r->cmd.length == 0) {
        if (c->structured) { /* a data chunk cannot be empty */
            uint8_t *h = reply_head(r, NBD_HEAD_MAX);
            reply_inline(
                r, h,
                nbd_chunk_encode(h, c->extended, &r->cmd, NBD_CHUNK_FLAG_DONE, NBD_CHUNK_NONE, 0));
        } else {
            reply_ok(r);
        }
        return;
    }
    if (r->cmd.length <= SLOT_BYTES) {
        read_small_co(r);
        return;
    }
    if (c->structured && r->cmd.length >= HOLES_FROM && !(r->cmd.flags & NBD_CMD_FLAG_DF)) {
        struct run runs[CHUNKS_MAX];
        int n = read_runs_co(r, runs);
        if (n > 1 || (n == 1 && runs[0].zero)) {
            read_chunked_co(r, runs, n);
            return;
        }
    }
    read_whole_co(r);
}

/* ---------------------------------------------------------------- writes */

static int write_co(struct nbd_req *r) {
    if (r->cmd.length == 0)
        return 0;
    struct iovec iov[BUFS_MAX];
    int n = nbd_req_payload(r, iov);
    unsigned flags = r->cmd.flags & NBD_CMD_FLAG_FUA ? IO_FUA : 0;
    if (r->cmd.length >= BULK_FROM)
        flags |= IO_BULK;
    return disk_pwritev_co(r->c->x->base.node, r->cmd.offset, r->cmd.length, iov, n, flags);
}

static int write_zeroes_co(struct nbd_req *r) {
    if (r->cmd.length == 0)
        return 0;
    unsigned flags = 0;
    if (!(r->cmd.flags & NBD_CMD_FLAG_NO_HOLE))
        flags |= ZERO_MAY_UNMAP;
    if (r->cmd.flags & NBD_CMD_FLAG_FAST_ZERO)
        flags |= ZERO_NO_FALLBACK;
    if (r->cmd.flags & NBD_CMD_FLAG_FUA)
        flags |= ZERO_FUA;
    return disk_zero_co(r->c->x->base.node, r->cmd.offset, r->cmd.length, flags);
}

static int trim_co(struct nbd_req *r) {
    struct node *n = r->c->x->base.node;
    int rc = r->cmd.length ? disk_discard_co(n, r->cmd.offset, r->cmd.length) : 0;
    if (rc == 0 && (r->cmd.flags & NBD_CMD_FLAG_FUA))
        rc = disk_flush_co(n);
    return rc;
}

/* ---------------------------------------------------------------- checks */

static bool changes(uint16_t type) {
    return type == NBD_CMD_WRITE || type == NBD_CMD_TRIM || type == NBD_CMD_WRITE_ZEROES;
}

/* 0, or what is wrong with the request (and r->message). */
static int check(struct nbd_req *r) {
    const struct nbd_client *c = r->c;
    const struct nbd_request *q = &r->cmd;
    if (q->type > NBD_CMD_BLOCK_STATUS) {
        r->message = "unknown command";
        return -EINVAL;
    }
    if (q->flags & ~nbd_cmd_flags_allowed(q->type, c->structured, c->extended)) {
        r->message = "a flag that does not belong to this command";
        return -EINVAL;
    }
    if (q->type == NBD_CMD_FLUSH) /* its range means nothing; some clients leave rubbish there */
        return 0;
    if (changes(q->type) && c->x->base.read_only) {
        r->message = "the export is read-only";
        return -EPERM;
    }
    uint64_t size = c->x->base.node->size, end;
    if (!ck_add(q->offset, q->length, &end) || end > size) {
        r->message = "the request goes past the end of the export";
        return q->type == NBD_CMD_WRITE || q->type == NBD_CMD_WRITE_ZEROES ? -ENOSPC : -EINVAL;
    }
    if (q->type == NBD_CMD_READ && q->length > NBD_PAYLOAD_MAX) {
        r->message = "a read above the maximum block size";
        return -EINVAL;
    }
    if (q->type == NBD_CMD_BLOCK_STATUS && (!c->contexts || q->length == 0)) {
        r->message = c->contexts ? "block status of nothing" : "no metadata context was selected";
        return -EINVAL;
    }
    return 0;
}

/* What the export's limits count, and its figures. */
static void account_co(struct nbd_req *r) {
    struct nbd_client *c = r->c;
    struct nbd_export *x = c->x;
    uint16_t type = r->cmd.type;
    uint64_t bytes = type <= NBD_CMD_WRITE && r->cmd.length <= NBD_PAYLOAD_MAX ? r->cmd.length : 0;
    throttle_take_co(&x->requests, c->s->loop, 1, c);
    throttle_take_co(&x->bytes, c->s->loop, bytes, c);
    if (type == NBD_CMD_READ) {
        c->bytes_read += bytes;
        x->total_read += bytes;
    } else {
        c->bytes_written += bytes;
        x->total_written += bytes;
    }
}

static void run_co(struct nbd_req *r) {
    int rc = check(r);
    if (rc < 0) {
        nbd_command_fail(r, rc, r->message);
        return;
    }
    switch (r->cmd.type) {
    case NBD_CMD_READ:
        read_co(r);
        return;
    case NBD_CMD_BLOCK_STATUS:
        nbd_block_status_co(r);
        return;
    case NBD_CMD_WRITE:
        rc = write_co(r);
        break;
    case NBD_CMD_WRITE_ZEROES:
        rc = write_zeroes_co(r);
        break;
    case NBD_CMD_TRIM:
        rc = trim_co(r);
        break;
    case NBD_CMD_FLUSH:
        rc = disk_flush_co(r->c->x->base.node);
        break;
    default: /* CACHE: advice that we need not take */
        break;
    }
    reply_result(r, rc);
}

void nbd_command_run_co(struct nbd_req *r) {
    struct nbd_export *x = r->c->x;
    account_co(r);
    nbd_export_begin_co(x);
    run_co(r); /* `r` may be gone afterwards */
    nbd_export_end(x);
}
