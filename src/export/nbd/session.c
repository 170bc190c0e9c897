/* SPDX-License-Identifier: MIT */
/*
 * The transmission phase: one receiver per connection.
 *
 * The receiver reads the socket in large gulps and parses requests out of the buffer; each becomes
 * a task by task_run(), so that one which never suspends costs neither queueing nor allocation.
 * Before it may sleep (empty socket, no free request, no budget) it uncorks, that is, sends the
 * replies of the batch.
 *
 * Write payloads: what the gulp already holds is copied, the rest is received straight into the
 * page-aligned buffer that will be written.  While large writes come, gulps are small (rx_want), so
 * that hardly anything is copied.
 *
 * Fairness: a client that never lets its socket run empty would keep the loop for itself, since
 * nothing here suspends then; so the receiver yields after TURN_WORK units of work (a request is
 * one, and one more for each 64 KiB of it).
 */
#include "export/nbd/client.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include "base/ck.h"
#include "disk/io.h"
#include "export/nbd/tls.h"

#define RX_SMALL 1024u            /* gulp while large writes come */
#define DIRECT_BYTES (32u * 1024) /* payloads from here on count as large */
#define TURN_WORK 256
/* Answers that wait for the socket: about what it takes at once (SOCKET_BUFFER_BYTES). */
#define UNSENT_BYTES (512u * 1024)
/* Payload of a refused write is read and thrown away up to here; beyond, the client is lost. */
#define DRAIN_MAX (2u * NBD_PAYLOAD_MAX)

/* ---------------------------------------------------------------- pool */

static int pool_new(struct nbd_client *c) {
    c->reqs = calloc(REQS_MAX, sizeof(*c->reqs));
    c->slots = mmap(NULL, (size_t)REQS_MAX * SLOT_STRIDE, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (c->slots == MAP_FAILED)
        c->slots = NULL;
    if (!c->reqs || !c->slots)
        return -ENOMEM;
    for (unsigned i = REQS_MAX; i-- > 0;) {
        struct nbd_req *r = &c->reqs[i];
        r->c = c;
        r->data = c->slots + (size_t)i * SLOT_STRIDE + SLOT_HEAD;
        list_push_front(&c->free_reqs, &r->link);
    }
    return 0;
}

static void pool_free(struct nbd_client *c) {
    if (c->slots)
        munmap(c->slots, (size_t)REQS_MAX * SLOT_STRIDE);
    free(c->reqs);
    c->slots = NULL;
    c->reqs = NULL;
}

void nbd_req_put(struct nbd_req *r) {
    struct nbd_client *c = r->c;
    if (r->buf_total) {
        uint32_t left = r->buf_total;
        for (unsigned i = 0; i < r->nbufs; i++) {
            uint32_t len = left < BUF_BYTES ? left : BUF_BYTES;
            buf_put(r->bufs[i], len);
            left -= len;
        }
        c->budget += r->buf_total;
        c->s->payload += r->buf_total;
        r->nbufs = 0;
        r->buf_total = 0;
        if (c->s->payload_waiters)
            waitq_wake_all(&c->s->payload_freed);
    }
    if (r->extra) {
        free(r->extra);
        r->extra = NULL;
    }
    list_push_front(&c->free_reqs, &r->link); /* hot memory first */
    waitq_wake_all(&c->req_freed);
}

int nbd_req_buffers(struct nbd_req *r, uint32_t length) {
    uint32_t left = length;
    while (left) {
        uint32_t len = left < BUF_BYTES ? left : BUF_BYTES;
        void *b = buf_get(len);
        if (!b) {
            for (uint32_t i = 0; i < r->nbufs; i++)
                buf_put(r->bufs[i], BUF_BYTES); /* all before the last are whole */
            r->nbufs = 0;
            return -ENOMEM;
        }
        r->bufs[r->nbufs++] = b;
        left -= len;
    }
    r->buf_total = length;
    r->c->budget -= length;
    r->c->s->payload -= length;
    return 0;
}

int nbd_req_payload(struct nbd_req *r, struct iovec *iov) {
    if (!r->nbufs) {
        iov[0] = (struct iovec){r->data, (size_t)r->cmd.length};
        return 1;
    }
    uint32_t left = r->buf_total;
    for (unsigned i = 0; i < r->nbufs; i++) {
        uint32_t len = left < BUF_BYTES ? left : BUF_BYTES;
        iov[i] = (struct iovec){r->bufs[i], len};
        left -= len;
    }
    return (int)r->nbufs;
}

/* ---------------------------------------------------------------- receiving */

static void uncork(struct nbd_client *c) {
    c->corked = false;
    nbd_reply_flush(c);
}

ssize_t nbd_recv_now(struct nbd_client *c, void *buf, size_t len) {
    if (!c->tls) {
        ssize_t n;
        do
            n = recv(c->fd, buf, len, MSG_DONTWAIT);
        while (n < 0 && errno == EINTR);
        return n < 0 ? -errno : n;
    }
    ssize_t n = tls_take(c->tls, buf, len);
    while (n == -EAGAIN) {
        n = tls_fill_now(c->tls);
        if (n >= 0)
            n = tls_take(c->tls, buf, len);
        else
            break;
    }
    return n;
}

ssize_t nbd_recv_co(struct nbd_client *c, void *buf, size_t len) {
    if (!c->tls)
        return loop_recv_co(c->fd, buf, len);
    ssize_t n = tls_take(c->tls, buf, len);
    while (n == -EAGAIN && !c->closing) {
        n = tls_fill_co(c->tls);
        if (n >= 0)
            n = tls_take(c->tls, buf, len);
        else
            break;
    }
    return n;
}

/* At most `len` bytes into `buf`, after sending what is due.  0: the peer has closed. */
static ssize_t receive_co(struct nbd_client *c, void *buf, size_t len) {
    uncork(c);
    if (c->closing)
        return -ECANCELED;
    ssize_t n = nbd_recv_co(c, buf, len);
    c->alive_ns = loop_now_ns(c->s->loop);
    c->corked = true;
    return c->closing ? -ECANCELED : n;
}

/* Makes at least `need` (<= RX_BYTES / 2) unparsed bytes.  1, 0 at a clean end, -errno. */
static int rx_need_co(struct nbd_client *c, size_t need) {
    while (c->rx_end - c->rx_pos < need) {
        if (c->rx_pos) {
            memmove(c->rx, c->rx + c->rx_pos, c->rx_end - c->rx_pos);
            c->rx_end -= c->rx_pos;
            c->rx_pos = 0;
        }
        size_t room = RX_BYTES - c->rx_end;
        ssize_t n = receive_co(c, c->rx + c->rx_end, room < c->rx_want ? room : c->rx_want);
        if (n == 0)
            return c->rx_end == 0 ? 0 : -ECONNRESET;
        if (n < 0)
            return (int)n;
        if ((size_t)n == c->rx_want) /* many small requests after all */
            c->rx_want = RX_BYTES;
        c->rx_end += (size_t)n;
    }
    return 1;
}

/* The next `len` bytes of the stream to `buf`. */
static int rx_copy_co(struct nbd_client *c, uint8_t *buf, size_t len) {
    size_t have = c->rx_end - c->rx_pos;
    if (have > len)
        have = len;
    memcpy(buf, c->rx + c->rx_pos, have);
    c->rx_pos += have;
    while (have < len) {
        ssize_t n = receive_co(c, buf + have, len - have);
        if (n <= 0)
            return n < 0 ? (int)n : -ECONNRESET;
        have += (size_t)n;
    }
    return 0;
}

static int rx_drain_co(struct nbd_client *c, uint64_t len) {
    for (;;) {
        size_t have = c->rx_end - c->rx_pos;
        if (have >= len) {
            c->rx_pos += len;
            return 0;
        }
        len -= have;
        c->rx_pos = c->rx_end = 0;
        ssize_t n = receive_co(c, c->rx, RX_BYTES);
        if (n <= 0)
            return n < 0 ? (int)n : -ECONNRESET;
        c->rx_end = (size_t)n;
    }
}

/* A free request; waits for one. */
static struct nbd_req *req_get_co(struct nbd_client *c) {
    while (list_empty(&c->free_reqs)) {
        uncork(c);
        if (list_empty(&c->free_reqs))
            waitq_wait_co(&c->req_freed);
        c->corked = true;
    }
    return list_entry(list_pop_front(&c->free_reqs), struct nbd_req, link);
}

/* Waits until the client, and all of them together, may hold `length` more bytes. */
static void budget_wait_co(struct nbd_client *c, uint32_t length) {
    struct nbd_server *s = c->s;
    for (;;) {
        bool own = c->budget < (long)length, all = s->payload < (long)length;
        if (!own && !all)
            return;
        uncork(c);
        if (c->budget < (long)length) {
            waitq_wait_co(&c->req_freed);
        } else if (s->payload < (long)length) {
            s->payload_waiters++;
            waitq_wait_co(&s->payload_freed);
            s->payload_waiters--;
        }
        c->corked = true;
    }
}

/*
 * While the socket is full, answers that are ready wait in memory; making more of them would only
 * push those out of the processor's caches before they are sent.
 */
static void unsent_wait_co(struct nbd_client *c) {
    while (c->sending && c->reply_bytes > UNSENT_BYTES && !c->closing) {
        uncork(c);
        waitq_wait_co(&c->req_freed);
        c->corked = true;
    }
}

/* ---------------------------------------------------------------- requests */

static void request_task(void *arg) {
    struct nbd_req *r = arg;
    struct nbd_client *c = r->c;
    struct nbd_server *s = c->s;
    nbd_command_run_co(r);
    c->tasks--;
    if (s->tasks_free++ == 0)
        waitq_wake_all(&s->task_freed);
    if (c->tasks == 0)
        waitq_wake_all(&c->idle);
}

static void request_start_co(struct nbd_client *c, struct nbd_req *r) {
    struct nbd_server *s = c->s;
    while (s->tasks_free == 0) {
        uncork(c);
        if (s->tasks_free == 0)
            waitq_wait_co(&s->task_freed);
        c->corked = true;
    }
    s->tasks_free--;
    c->tasks++;
    task_run(s->loop, request_task, r);
}

/* Reads the payload of a write.  > 0: refused with that (as -errno in *error), payload consumed. */
static int write_payload_co(struct nbd_client *c, struct nbd_req *r, int *error) {
    uint64_t len = r->cmd.length;
    *error = 0;
    if (len > NBD_PAYLOAD_MAX) {
        if (len > DRAIN_MAX) {
            nbd_log(c, "write of %llu bytes, the maximum is %u", (unsigned long long)len,
                    NBD_PAYLOAD_MAX);
            return -EPROTO;
        }
        *error = -EINVAL;
    } else if (c->x->base.read_only) {
        *error = -EPERM;
    } else if (len > SLOT_BYTES) {
        budget_wait_co(c, (uint32_t)len);
        *error = nbd_req_buffers(r, (uint32_t)len);
    }
    if (*error)
        return rx_drain_co(c, len);
    if (len >= DIRECT_BYTES)
        c->rx_want = RX_SMALL;
    if (len <= SLOT_BYTES)
        return rx_copy_co(c, r->data, len);
    struct iovec iov[BUFS_MAX];
    int n = nbd_req_payload(r, iov), rc = 0;
    for (int i = 0; i < n && rc == 0; i++)
        rc = rx_copy_co(c, iov[i].iov_base, iov[i].iov_len);
    return rc;
}

/*
 * The payload form of block status: u64 length, then the ids of the contexts that are wanted.
 * *error: -EINVAL for what the protocol does not allow; the payload is consumed in any case.
 */
static int status_payload_co(struct nbd_client *c, struct nbd_req *r, int *error) {
    uint64_t len = r->cmd.length;
    unsigned ids = len >= 8 ? (unsigned)((len - 8) / 4) : 0;
    *error = -EINVAL;
    if (len < 8 || len % 4 || ids > NBD_CONTEXTS_MAX)
        return rx_drain_co(c, len);
    int rc = rx_copy_co(c, r->data, len);
    if (rc < 0)
        return rc;
    r->cmd.length = be64_load(r->data);
    r->contexts = 0;
    for (unsigned i = 0; i < ids; i++) {
        uint32_t bit = be32_load(r->data + 8 + (size_t)i * 4) - 1;
        if (bit >= NBD_CONTEXTS_MAX || !(c->contexts >> bit & 1) || r->contexts >> bit & 1)
            return 0; /* unknown, or twice */
        r->contexts |= (uint64_t)1 << bit;
    }
    *error = r->contexts ? 0 : -EINVAL;
    return 0;
}

/*
 * What follows the header, with extended headers: PAYLOAD_LEN says whether anything does.  As
 * write_payload_co; a write that does not say it has no length that could be trusted.
 */
static int payload_co(struct nbd_client *c, struct nbd_req *r, int *error) {
    bool has = r->cmd.flags & NBD_CMD_FLAG_PAYLOAD_LEN;
    *error = 0;
    if (!c->extended)
        return r->cmd.type == NBD_CMD_WRITE ? write_payload_co(c, r, error) : 0;
    if (r->cmd.type == NBD_CMD_WRITE && !has) {
        nbd_log(c, "a write without the payload flag of extended headers");
        return -EPROTO;
    }
    if (!has)
        return 0;
    if (r->cmd.length > NBD_PAYLOAD_MAX) {
        nbd_log(c, "payload of %llu bytes, the maximum is %u", (unsigned long long)r->cmd.length,
                NBD_PAYLOAD_MAX);
        return -EPROTO;
    }
    if (r->cmd.type == NBD_CMD_WRITE)
        return write_payload_co(c, r, error);
    if (r->cmd.type == NBD_CMD_BLOCK_STATUS)
        return status_payload_co(c, r, error);
    *error = -EINVAL;
    return rx_drain_co(c, r->cmd.length);
}

/* One request off the buffer.  1, 0 on disconnect, -errno when the connection must end. */
static int one_request_co(struct nbd_client *c) {
    size_t bytes = c->extended ? NBD_EXTENDED_REQUEST_BYTES : NBD_REQUEST_BYTES;
    int rc = rx_need_co(c, bytes);
    if (rc <= 0)
        return rc;
    struct nbd_request cmd;
    bool magic = c->extended ? nbd_extended_request_decode(c->rx + c->rx_pos, &cmd)
                             : nbd_request_decode(c->rx + c->rx_pos, &cmd);
    if (!magic) {
        nbd_log(c, "bad request magic 0x%08x", be32_load(c->rx + c->rx_pos));
        return -EPROTO;
    }
    c->rx_pos += bytes;
    if (cmd.type == NBD_CMD_DISC)
        return 0;

    struct nbd_req *r = req_get_co(c);
    r->cmd = cmd;
    r->message = NULL;
    r->contexts = c->contexts;
    c->requests++;
    c->x->total_requests++;
    c->turn_work += 1 + (cmd.type <= NBD_CMD_WRITE ? (unsigned)(cmd.length >> 16) & 0xffff : 0);
    int error;
    rc = payload_co(c, r, &error);
    if (rc < 0) {
        nbd_req_put(r);
        return rc;
    }
    if (error) {
        nbd_command_fail(r, error, error == -EPERM ? "the export is read-only" : NULL);
        return 1;
    }
    if (cmd.type == NBD_CMD_READ && cmd.length > SLOT_BYTES && cmd.length <= NBD_PAYLOAD_MAX) {
        unsent_wait_co(c);
        budget_wait_co(c, (uint32_t)cmd.length);
        if (nbd_req_buffers(r, (uint32_t)cmd.length) < 0) {
            nbd_command_fail(r, -ENOMEM, NULL);
            return 1;
        }
    }
    if (c->closing) {
        nbd_req_put(r);
        return -ECANCELED;
    }
    request_start_co(c, r);
    return 1;
}

int nbd_session_co(struct nbd_client *c) {
    int rc = pool_new(c);
    c->budget = PAYLOAD_BUDGET;
    c->rx_want = RX_BYTES;
    c->corked = true;
    c->alive_ns = loop_now_ns(c->s->loop);
    while (rc == 0) {
        if (c->turn_work >= TURN_WORK) {
            c->turn_work = 0;
            uncork(c);
            task_yield_co();
            c->corked = true;
        }
        rc = one_request_co(c);
        if (rc <= 0)
            break;
        rc = 0;
    }
    /* Whatever is in flight ends and is answered, as far as the peer still listens. */
    c->closing = true;
    uncork(c);
    while (c->tasks || c->sending || !list_empty(&c->replies)) {
        waitq_wait_co(&c->idle);
        nbd_reply_flush(c);
    }
    pool_free(c);
    return rc;
}
