/* SPDX-License-Identifier: MIT */
/*
 * The handshake: fixed newstyle, option by option, until the transmission phase begins.
 *
 * Everything that the client sends is bounded before it is believed: OPTIONS_MAX options,
 * OPTION_DATA_MAX bytes of data each (longer data is skipped and answered ERR_TOO_BIG, beyond
 * OPTION_SKIP_MAX the connection ends), and one time limit over all of it.  Answers to one option
 * are collected and sent together.
 *
 * TLS.  Where it is required, every option before STARTTLS is answered TLS_REQD, and EXPORT_NAME,
 * which has no error reply, ends the connection.  After STARTTLS everything is forgotten that was
 * said before; bytes that a client sent behind STARTTLS without waiting for the answer are no part
 * of the encrypted stream, whoever put them there, and end the connection.
 */
#include "export/nbd/client.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include "base/cleanup.h"
#include "disk/node.h"
#include "export/nbd/tls.h"

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
    bool limited = h->deadline_ns != INT64_MAX;
    int64_t left = limited ? h->deadline_ns - loop_now_ns(h->c->s->loop) : -1;
    int ev = !limited || left > 0 ? loop_poll_co(h->c->fd, events, left) : 0;
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
        ssize_t n = nbd_recv_now(c, c->rx + c->rx_end, RX_BYTES - c->rx_end);
        if (n == 0)
            return c->rx_end == 0 ? 0 : -ECONNRESET;
        if (n > 0) {
            c->rx_end += (size_t)n;
            continue;
        }
        if (n != -EAGAIN)
            return (int)n;
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

static ssize_t send_now(struct nbd_client *c, const uint8_t *p, size_t len) {
    if (c->tls) {
        struct iovec v = {(void *)p, len};
        return len ? tls_send(c->tls, &v, 1) : tls_flush(c->tls);
    }
    ssize_t n;
    do
        n = send(c->fd, p, len, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

static int send_co(struct hs *h, const uint8_t *p, size_t len) {
    while (len || h->c->tls) {
        ssize_t n = send_now(h->c, p, len);
        if (n >= 0) {
            p += n;
            len -= (size_t)n;
            if (n == 0 && !len)
                break;
            continue;
        }
        if (n != -EAGAIN)
            return (int)n;
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

uint16_t nbd_export_flags(const struct nbd_client *c, const struct nbd_export *x) {
    uint16_t f = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA |
                 NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_CACHE;
    if (c->structured)
        f |= NBD_FLAG_SEND_DF;
    if (c->extended && c->contexts_of == x && c->contexts)
        f |= NBD_FLAG_BLOCK_STATUS_PAYLOAD;
    if (x->base.read_only)
        f |= NBD_FLAG_READ_ONLY;
    else
        f |= NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
    return f;
}

/* ---------------------------------------------------------------- options */

/* What an option handler says about the connection. */
enum { GO_ON = 0, TRANSMIT = 1, LEAVE = 2, START_TLS = 3 };

static int opt_export_name(struct hs *h, const uint8_t *data, uint32_t len) {
    struct nbd_client *c = h->c;
    struct nbd_name name = {(const char *)data, len};
    struct nbd_export *x = nbd_name_valid(name) ? nbd_export_find(c->s, name) : NULL;
    const char *why = "asked for an export that does not exist";
    if (c->extended)
        why = "EXPORT_NAME after extended headers";
    if (!x || c->extended || !nbd_export_enter(x, c, &why)) {
        nbd_log(c, "%s", why);
        return -ENOENT; /* this option has no error reply */
    }
    uint8_t reply[10 + 124] = {0};
    be64_store(reply, x->base.node->size);
    be16_store(reply + 8, nbd_export_flags(c, x));
    out_put(&h->out, reply, c->no_zeroes ? 10 : sizeof(reply));
    return TRANSMIT;
}

static int no_data(struct hs *h, uint32_t option) {
    nbd_out_error(&h->out, option, NBD_REP_ERR_INVALID, "this option takes no data");
    return GO_ON;
}

static int opt_list(struct hs *h, uint32_t len) {
    if (len)
        return no_data(h, NBD_OPT_LIST);
    list_for_each(it, &h->c->s->exports) {
        const struct nbd_export *x = list_entry(it, struct nbd_export, link);
        uint8_t n[4];
        if (x->gone)
            continue;
        be32_store(n, (uint32_t)strlen(x->base.name));
        /* What follows the name is for people; QEMU's client shows it. */
        char *text AUTO_FREE =
            xasprintf("%s%s", x->base.name, x->description ? x->description : "");
        nbd_out_reply(&h->out, NBD_OPT_LIST, NBD_REP_SERVER, n, 4, text, strlen(text));
    }
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
    struct nbd_export *x = nbd_export_find(c->s, q.name);
    const char *why;
    if (!x) {
        nbd_out_error(&h->out, option, NBD_REP_ERR_UNKNOWN, "no export of this name");
        return GO_ON;
    }
    if (option == NBD_OPT_GO && !nbd_export_enter(x, c, &why)) {
        nbd_out_error(&h->out, option, NBD_REP_ERR_POLICY, why);
        return GO_ON;
    }
    bool name = false, description = false; /* each at most once, however often asked */
    for (unsigned i = 0; i < q.count; i++) {
        uint16_t t = be16_load(q.types + 2 * i);
        name |= t == NBD_INFO_NAME;
        description |= t == NBD_INFO_DESCRIPTION;
    }
    if (name)
        info_text(&h->out, option, NBD_INFO_NAME, x->base.name);
    if (description && x->description)
        info_text(&h->out, option, NBD_INFO_DESCRIPTION, x->description);

    uint8_t b[14];
    be16_store(b, NBD_INFO_BLOCK_SIZE);
    be32_store(b + 2, 1);
    be32_store(b + 6, BLOCK_PREFERRED);
    be32_store(b + 10, NBD_PAYLOAD_MAX);
    nbd_out_reply(&h->out, option, NBD_REP_INFO, b, 14, NULL, 0);

    uint8_t e[12];
    be16_store(e, NBD_INFO_EXPORT);
    be64_store(e + 2, x->base.node->size);
    be16_store(e + 10, nbd_export_flags(c, x));
    nbd_out_reply(&h->out, option, NBD_REP_INFO, e, 12, NULL, 0);
    out_ack(&h->out, option);
    return option == NBD_OPT_GO ? TRANSMIT : GO_ON;
}

static int opt_structured(struct hs *h, uint32_t len) {
    if (len)
        return no_data(h, NBD_OPT_STRUCTURED_REPLY);
    if (h->c->extended) {
        nbd_out_error(&h->out, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ERR_EXT_HEADER_REQD,
                      "extended headers are in use");
        return GO_ON;
    }
    h->c->structured = true;
    out_ack(&h->out, NBD_OPT_STRUCTURED_REPLY);
    return GO_ON;
}

static int opt_extended(struct hs *h, uint32_t len) {
    if (len)
        return no_data(h, NBD_OPT_EXTENDED_HEADERS);
    h->c->structured = h->c->extended = true;
    out_ack(&h->out, NBD_OPT_EXTENDED_HEADERS);
    return GO_ON;
}

static int opt_starttls(struct hs *h, uint32_t len) {
    struct nbd_client *c = h->c;
    if (len)
        return no_data(h, NBD_OPT_STARTTLS);
    if (c->tls) {
        nbd_out_error(&h->out, NBD_OPT_STARTTLS, NBD_REP_ERR_INVALID, "TLS is in use already");
        return GO_ON;
    }
    if (!c->s->tls) {
        nbd_out_error(&h->out, NBD_OPT_STARTTLS, NBD_REP_ERR_POLICY, "TLS is not set up here");
        return GO_ON;
    }
    out_ack(&h->out, NBD_OPT_STARTTLS);
    return START_TLS;
}

static int start_tls_co(struct hs *h) {
    struct nbd_client *c = h->c;
    const char *why = NULL;
    if (c->rx_pos != c->rx_end) {
        nbd_log(c, "bytes behind STARTTLS that are not encrypted");
        return -EPROTO;
    }
    c->structured = c->extended = false;
    c->contexts = 0;
    c->contexts_of = NULL;
    int rc = tls_session_start_co(c->s->tls, c->fd, h->deadline_ns, &c->tls, &why);
    if (rc < 0 && why)
        nbd_log(c, "TLS: %s", why);
    return rc;
}

static int option(struct hs *h, const struct nbd_option *opt, const uint8_t *data) {
    if (h->c->s->tls_required && !h->c->tls && opt->option != NBD_OPT_STARTTLS) {
        if (opt->option == NBD_OPT_EXPORT_NAME) {
            nbd_log(h->c, "asked for an export without TLS");
            return -EPERM;
        }
        nbd_out_error(&h->out, opt->option, NBD_REP_ERR_TLS_REQD, "TLS comes first here");
        return opt->option == NBD_OPT_ABORT ? LEAVE : GO_ON;
    }
    switch (opt->option) {
    case NBD_OPT_EXPORT_NAME:
        return opt_export_name(h, data, opt->length);
    case NBD_OPT_ABORT:
        out_ack(&h->out, NBD_OPT_ABORT);
        return LEAVE;
    case NBD_OPT_LIST:
        return opt_list(h, opt->length);
    case NBD_OPT_STARTTLS:
        return opt_starttls(h, opt->length);
    case NBD_OPT_INFO:
    case NBD_OPT_GO:
        return opt_info(h, opt->option, data, opt->length);
    case NBD_OPT_STRUCTURED_REPLY:
        return opt_structured(h, opt->length);
    case NBD_OPT_EXTENDED_HEADERS:
        return opt_extended(h, opt->length);
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
    if (rc == 0 && what == START_TLS)
        return start_tls_co(h);
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
    int64_t limit = c->s->handshake_timeout_ns;
    struct hs h = {c, limit < 0 ? INT64_MAX : loop_now_ns(c->s->loop) + limit, {NULL, 0, 0}};
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
    if (rc == TRANSMIT && c->contexts_of != c->x) {
        c->contexts = 0; /* of another export */
        c->contexts_of = NULL;
    }
    return rc == TRANSMIT ? 0 : rc == LEAVE ? -ECONNABORTED : rc;
}
