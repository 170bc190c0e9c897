/* SPDX-License-Identifier: MIT */
/*
 * The handshake: fixed newstyle, option by option, until the transmission phase begins.
 *
 * Everything that the client sends is bounded before it is believed: OPTIONS_MAX options,
 * OPTION_DATA_MAX bytes of data each (longer data is skipped and answered ERR_TOO_BIG, beyond
 * OPTION_SKIP_MAX the connection ends), and one time limit over all of it.  Answers to one option
 * are collected and sent together.
 */
#include "export/nbd/client.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include "base/cleanup.h"
#include "disk/node.h"

#define OPTIONS_MAX 256
#define OPTION_DATA_MAX (RX_BYTES - NBD_OPTION_BYTES)
#define OPTION_SKIP_MAX (1u << 20)
#define BLOCK_PREFERRED 4096u

/* ---------------------------------------------------------------- bytes in and out */

struct hs {
    struct nbd_client *c;
    int64_t deadline_ns;
    struct nbd_out out;
};

static int wait_co(struct hs *h, short events) {
    int64_t left = h->deadline_ns - loop_now_ns(h->c->s->loop);
    int ev = left > 0 ? loop_poll_co(h->c->fd, events, left) : 0;
    if (ev == 0)
        return -ETIMEDOUT;
    return ev < 0 ? ev : 0;
}

/* At least `need` (<= RX_BYTES) unparsed bytes in the buffer.  1, 0 at a clean end, -errno. */
static int need_co(struct hs *h, size_t need) {
    struct nbd_client *c = h->c;
    while (c->rx_end - c->rx_pos < need) {
        if (c->closing)
            return -ECANCELED;
        memmove(c->rx, c->rx + c->rx_pos, c->rx_end - c->rx_pos);
        c->rx_end -= c->rx_pos;
        c->rx_pos = 0;
        ssize_t n = recv(c->fd, c->rx + c->rx_end, RX_BYTES - c->rx_end, MSG_DONTWAIT);
        int err = errno;
        if (n == 0)
            return c->rx_end == 0 ? 0 : -ECONNRESET;
        if (n > 0) {
            c->rx_end += (size_t)n;
            continue;
        }
        if (err != EAGAIN && err != EINTR)
            return -err;
        int rc = wait_co(h, POLLIN);
        if (rc < 0)
            return rc;
    }
    return 1;
}

static int skip_co(struct hs *h, uint32_t len) {
    struct nbd_client *c = h->c;
    while (len) {
        int rc = need_co(h, 1);
        if (rc <= 0)
            return rc < 0 ? rc : -ECONNRESET;
        size_t have = c->rx_end - c->rx_pos;
        if (have > len)
            have = len;
        c->rx_pos += have;
        len -= (uint32_t)have;
    }
    return 0;
}

static int send_co(struct hs *h, const uint8_t *p, size_t len) {
    while (len) {
        ssize_t n = send(h->c->fd, p, len, MSG_DONTWAIT | MSG_NOSIGNAL);
        int err = errno;
        if (n >= 0) {
            p += n;
            len -= (size_t)n;
            continue;
        }
        if (err != EAGAIN && err != EINTR)
            return -err;
        int rc = wait_co(h, POLLOUT);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static void out_put(struct nbd_out *o, const void *p, size_t len) {
    if (o->len + len > o->cap) {
        o->cap = (o->len + len) * 2;
        uint8_t *grown = xcalloc(1, o->cap); /* bounded: a few replies of at most 4 KiB text */
        if (o->len)
            memcpy(grown, o->buf, o->len);
        free(o->buf);
        o->buf = grown;
    }
    if (len)
        memcpy(o->buf + o->len, p, len);
    o->len += len;
}

void nbd_out_reply(struct nbd_out *o, uint32_t option, uint32_t type, const void *a, size_t alen,
                   const void *b, size_t blen) {
    uint8_t h[NBD_OPT_REPLY_BYTES];
    nbd_opt_reply_encode(h, option, type, (uint32_t)(alen + blen));
    out_put(o, h, sizeof(h));
    out_put(o, a, alen);
    out_put(o, b, blen);
}

void nbd_out_error(struct nbd_out *o, uint32_t option, uint32_t type, const char *message) {
    nbd_out_reply(o, option, type, message, strlen(message), NULL, 0);
}

static void out_ack(struct nbd_out *o, uint32_t option) {
    nbd_out_reply(o, option, NBD_REP_ACK, NULL, 0, NULL, 0);
}

/* ---------------------------------------------------------------- the export */

bool nbd_export_named(const struct nbd_server *s, struct nbd_name name) {
    return name.len == 0 || nbd_name_is(name, s->name);
}

uint16_t nbd_export_flags(const struct nbd_client *c) {
    uint16_t f = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA |
                 NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_CACHE;
    if (c->structured)
        f |= NBD_FLAG_SEND_DF;
    if (c->s->read_only)
        f |= NBD_FLAG_READ_ONLY;
    else
        f |= NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
    return f;
}

/* ---------------------------------------------------------------- options */

/* What an option handler says about the connection. */
enum { GO_ON = 0, TRANSMIT = 1, LEAVE = 2 };

static int opt_export_name(struct hs *h, const uint8_t *data, uint32_t len) {
    struct nbd_client *c = h->c;
    struct nbd_name name = {(const char *)data, len};
    if (!nbd_name_valid(name) || !nbd_export_named(c->s, name)) {
        nbd_log(c, "asked for an export that does not exist");
        return -ENOENT; /* this option has no error reply */
    }
    uint8_t reply[10 + 124] = {0};
    be64_store(reply, c->s->node->size);
    be16_store(reply + 8, nbd_export_flags(c));
    out_put(&h->out, reply, c->no_zeroes ? 10 : sizeof(reply));
    return TRANSMIT;
}

static int opt_list(struct hs *h, uint32_t len) {
    if (len) {
        nbd_out_error(&h->out, NBD_OPT_LIST, NBD_REP_ERR_INVALID, "NBD_OPT_LIST takes no data");
        return GO_ON;
    }
    const char *name = h->c->s->name;
    uint8_t n[4];
    be32_store(n, (uint32_t)strlen(name));
    /* What follows the name is for people; QEMU's client shows it. */
    char *text AUTO_FREE =
        xasprintf("%s%s", name, h->c->s->description ? h->c->s->description : "");
    nbd_out_reply(&h->out, NBD_OPT_LIST, NBD_REP_SERVER, n, 4, text, strlen(text));
    out_ack(&h->out, NBD_OPT_LIST);
    return GO_ON;
}

static void info_text(struct nbd_out *o, uint32_t option, uint16_t type, const char *text) {
    uint8_t t[2];
    be16_store(t, type);
    nbd_out_reply(o, option, NBD_REP_INFO, t, 2, text, strlen(text));
}

static int opt_info(struct hs *h, uint32_t option, const uint8_t *data, uint32_t len) {
    struct nbd_client *c = h->c;
    struct nbd_info_request q;
    if (nbd_info_request_decode(data, len, &q) < 0 || !nbd_name_valid(q.name)) {
        nbd_out_error(&h->out, option, NBD_REP_ERR_INVALID, "malformed request");
        return GO_ON;
    }
    if (!nbd_export_named(c->s, q.name)) {
        nbd_out_error(&h->out, option, NBD_REP_ERR_UNKNOWN, "no export of this name");
        return GO_ON;
    }
    bool name = false, description = false; /* each at most once, however often asked */
    for (unsigned i = 0; i < q.count; i++) {
        uint16_t t = be16_load(q.types + 2 * i);
        name |= t == NBD_INFO_NAME;
        description |= t == NBD_INFO_DESCRIPTION;
    }
    if (name)
        info_text(&h->out, option, NBD_INFO_NAME, c->s->name);
    if (description && c->s->description)
        info_text(&h->out, option, NBD_INFO_DESCRIPTION, c->s->description);

    uint8_t b[14];
    be16_store(b, NBD_INFO_BLOCK_SIZE);
    be32_store(b + 2, 1);
    be32_store(b + 6, BLOCK_PREFERRED);
    be32_store(b + 10, NBD_PAYLOAD_MAX);
    nbd_out_reply(&h->out, option, NBD_REP_INFO, b, 14, NULL, 0);

    uint8_t e[12];
    be16_store(e, NBD_INFO_EXPORT);
    be64_store(e + 2, c->s->node->size);
    be16_store(e + 10, nbd_export_flags(c));
    nbd_out_reply(&h->out, option, NBD_REP_INFO, e, 12, NULL, 0);
    out_ack(&h->out, option);
    return option == NBD_OPT_GO ? TRANSMIT : GO_ON;
}

static int opt_structured(struct hs *h, uint32_t len) {
    if (len) {
        nbd_out_error(&h->out, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ERR_INVALID,
                      "NBD_OPT_STRUCTURED_REPLY takes no data");
        return GO_ON;
    }
    h->c->structured = true;
    out_ack(&h->out, NBD_OPT_STRUCTURED_REPLY);
    return GO_ON;
}

static int option(struct hs *h, const struct nbd_option *opt, const uint8_t *data) {
    switch (opt->option) {
    case NBD_OPT_EXPORT_NAME:
        return opt_export_name(h, data, opt->length);
    case NBD_OPT_ABORT:
        out_ack(&h->out, NBD_OPT_ABORT);
        return LEAVE;
    case NBD_OPT_LIST:
        return opt_list(h, opt->length);
    case NBD_OPT_STARTTLS:
        nbd_out_error(&h->out, opt->option, NBD_REP_ERR_POLICY, "TLS is not set up here");
        return GO_ON;
    case NBD_OPT_INFO:
    case NBD_OPT_GO:
        return opt_info(h, opt->option, data, opt->length);
    case NBD_OPT_STRUCTURED_REPLY:
        return opt_structured(h, opt->length);
    case NBD_OPT_LIST_META_CONTEXT:
    case NBD_OPT_SET_META_CONTEXT:
        return nbd_meta_option(h->c, &h->out, opt->option, data, opt->length);
    default:
        nbd_out_error(&h->out, opt->option, NBD_REP_ERR_UNSUP, "unknown option");
        return GO_ON;
    }
}

/* Reads one option and answers it. */
static int one_option_co(struct hs *h) {
    struct nbd_client *c = h->c;
    int rc = need_co(h, NBD_OPTION_BYTES);
    if (rc <= 0)
        return rc < 0 ? rc : LEAVE;
    struct nbd_option opt;
    if (!nbd_option_decode(c->rx + c->rx_pos, &opt)) {
        nbd_log(c, "bad option magic");
        return -EPROTO;
    }
    c->rx_pos += NBD_OPTION_BYTES;
    h->out.len = 0;
    if (opt.length > OPTION_DATA_MAX) {
        if (opt.length > OPTION_SKIP_MAX || opt.option == NBD_OPT_EXPORT_NAME) {
            nbd_log(c, "option %u with %u bytes of data", opt.option, opt.length);
            return -EPROTO;
        }
        rc = skip_co(h, opt.length);
        if (rc < 0)
            return rc;
        nbd_out_error(&h->out, opt.option, NBD_REP_ERR_TOO_BIG, "too much option data");
        return send_co(h, h->out.buf, h->out.len);
    }
    rc = need_co(h, opt.length);
    if (rc <= 0 && opt.length)
        return rc < 0 ? rc : -ECONNRESET;
    int what = option(h, &opt, c->rx + c->rx_pos);
    c->rx_pos += opt.length;
    if (what < 0)
        return what;
    rc = send_co(h, h->out.buf, h->out.len);
    return what == LEAVE ? LEAVE : rc < 0 ? rc : what;
}

static int greet_co(struct hs *h) {
    struct nbd_client *c = h->c;
    uint8_t g[NBD_GREETING_BYTES];
    nbd_greeting_encode(g, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
    int rc = send_co(h, g, sizeof(g));
    if (rc == 0)
        rc = need_co(h, 4);
    if (rc <= 0)
        return rc < 0 ? rc : -ECONNRESET;
    uint32_t flags = be32_load(c->rx + c->rx_pos);
    c->rx_pos += 4;
    if (flags & ~(uint32_t)(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)) {
        nbd_log(c, "unknown client flags 0x%x", flags);
        return -EPROTO;
    }
    c->no_zeroes = flags & NBD_FLAG_NO_ZEROES;
    return 0;
}

int nbd_handshake_co(struct nbd_client *c) {
    struct hs h = {c, loop_now_ns(c->s->loop) + c->s->handshake_timeout_ns, {NULL, 0, 0}};
    int rc = greet_co(&h);
    for (int i = 0; rc == GO_ON; i++) {
        if (i == OPTIONS_MAX) {
            nbd_log(c, "more than %d options", OPTIONS_MAX);
            rc = -EPROTO;
            break;
        }
        rc = one_option_co(&h);
    }
    if (rc == -ETIMEDOUT)
        nbd_log(c, "no end of the handshake in time");
    free(h.out.buf);
    return rc == TRANSMIT ? 0 : rc == LEAVE ? -ECONNABORTED : rc;
}
