/* SPDX-License-Identifier: MIT */
/*
 * The driver "nbd": a disk that an NBD server offers.
 *
 * libnbd speaks the protocol; this file turns its state machine.  Connecting and the handshake
 * block, so they run on a worker thread.  After that the connection belongs to the loop: a task
 * issues its command and then waits; of all that wait, one polls the socket for reading and, while
 * libnbd has something to send, one (the same, when he is alone) for writing.  Whoever leaves
 * wakes the others, a poller too when there is something to send that he does not know of.
 *
 *      task A: pread ---+                         reader: poll(IN), notify_read, wake all
 *      task B: pwrite --+--> libnbd <--> socket
 *      task C: flush ---+                         writer: poll(OUT) while libnbd wants to send
 *
 * Invariants
 *  1. libnbd's handle is touched by one thread at a time: the worker while connecting, then the
 *     loop's.
 *  2. A command's buffer lives until its completion has run.  A connection that dies completes all
 *     commands with an error before anybody sees it dead.
 *  3. A dead connection stays dead: every later request fails with -EIO (there is no reconnecting).
 *
 * The server's answers are not trusted: extents are clamped to what was asked for and must not be
 * empty.  Data is taken as it comes; it is the server's disk.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "base/iov.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "runtime/loop.h"
#include "storage/nbd_lib.h"
#include "storage/nbd_name.h"
#include "storage/nbd_tls.h"

/* What every server takes in one read or write (protocol), and a step of commands without data. */
#define PAYLOAD_MAX (32 * MIB)
#define STEP_MAX GIB

struct nbd_opts {
    char *type, *path, *host, *port; /* of server */
    char *flat_path, *flat_host, *flat_port, *export, *tls_creds, *tls_hostname;
    char *tls_certificates, *tls_psk_file, *tls_username;
    bool tls, tls_verify;
    char *context; /* x-dirty-bitmap */
};

struct nbd_state {
    const struct nbd_lib *lib;
    struct nbd_handle *h;
    const char *context; /* what extents are asked of; borrowed */
    bool read_only, can_flush, can_fua, can_trim, can_zero, can_fast_zero, has_allocation;
    bool reader, writer; /* somebody polls for it */
    struct waitq turn;
};

/* ---------------------------------------------------------------- requests */

struct request {
    bool done;
    int error;
};

static int on_done(void *arg, int *error) {
    struct request *q = arg;
    q->error = *error;
    q->done = true;
    return 1; /* retire it */
}

static bool is_gone(const struct nbd_state *s) {
    return s->lib->aio_is_dead(s->h) || s->lib->aio_is_closed(s->h);
}

/* Polls for what nobody else polls for, and lets libnbd work. */
static void turn_co(struct nbd_state *s, bool in, bool out) {
    int fd = s->lib->aio_get_fd(s->h);
    s->reader |= in;
    s->writer |= out;
    int got = loop_poll_co(fd, (short)((in ? POLLIN : 0) | (out ? POLLOUT : 0)), -1);
    s->reader &= !in;
    s->writer &= !out;
    /* A failure here shows as a dead connection; a cancelled poll is tried again. */
    if (in && got > 0 && got & ~POLLOUT &&
        s->lib->aio_get_direction(s->h) & LIBNBD_AIO_DIRECTION_READ)
        s->lib->aio_notify_read(s->h);
    if (out && got > 0 && got & ~POLLIN && !is_gone(s) &&
        s->lib->aio_get_direction(s->h) & LIBNBD_AIO_DIRECTION_WRITE)
        s->lib->aio_notify_write(s->h);
    waitq_wake_all(&s->turn);
}

static bool wants_write(const struct nbd_state *s) {
    return !is_gone(s) && s->lib->aio_get_direction(s->h) & LIBNBD_AIO_DIRECTION_WRITE;
}

static int wait_co(struct nbd_state *s, struct request *q, int64_t cookie) {
    if (cookie < 0) {
        int code = s->lib->get_errno();
        return is_gone(s) ? -EIO : code ? -code : -EIO;
    }
    while (!q->done && !is_gone(s)) {
        bool in = !s->reader, out = !s->writer && wants_write(s);
        if (in || out)
            turn_co(s, in, out);
        else
            waitq_wait_co(&s->turn);
    }
    /* Somebody else's command may have to be sent still, and he may be polling for replies only. */
    if (s->reader && !s->writer && wants_write(s))
        loop_cancel_fd(loop_self(), s->lib->aio_get_fd(s->h));
    waitq_wake_all(&s->turn); /* the next one polls */
    if (!q->done)
        return -EIO;
    return q->error == ENOTCONN || q->error == EPIPE ? -EIO : -q->error;
}

#define COMPLETION(q) ((nbd_completion_callback){on_done, &(q), NULL})

/* One piece of plain memory. */
static int read_piece_co(struct node *n, uint64_t offset, uint8_t *buf, uint64_t length) {
    struct nbd_state *s = n->state;
    struct request q = {0};
    return wait_co(s, &q, s->lib->aio_pread(s->h, buf, length, offset, COMPLETION(q), 0));
}

static int write_piece_co(struct node *n, uint64_t offset, const uint8_t *buf, uint64_t length,
                          bool fua) {
    struct nbd_state *s = n->state;
    struct request q = {0};
    return wait_co(s, &q,
                   s->lib->aio_pwrite(s->h, buf, length, offset, COMPLETION(q),
                                      fua ? LIBNBD_CMD_FLAG_FUA : 0));
}

/* Memory that is in one piece already goes as it is, the rest through a buffer. */
static int nbd_preadv_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                         int niov, unsigned flags) {
    uint64_t inside = offset >= n->size ? 0 : min_u64(length, n->size - offset);
    uint8_t *bounce = NULL, *to = iov->iov_base;
    int r = 0;
    if (niov > 1 && inside && !(to = bounce = malloc(inside)))
        return -ENOMEM;
    for (uint64_t done = 0, part; !r && done < inside; done += part) {
        part = min_u64(inside - done, PAYLOAD_MAX);
        r = read_piece_co(n, offset + done, to + done, part);
    }
    if (!r && bounce)
        iov_from_buf(iov, niov, 0, bounce, inside);
    if (!r && inside < length)
        iov_zero(iov, niov, inside, length - inside);
    free(bounce);
    return r;
}

static int nbd_flush_co(struct node *n);

static int nbd_pwritev_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                          int niov, unsigned flags) {
    struct nbd_state *s = n->state;
    uint8_t *bounce = NULL, *from = iov->iov_base;
    bool fua = flags & IO_FUA;
    int r = 0;
    if (offset > n->size || length > n->size - offset)
        return -ENOSPC;
    if (niov > 1) {
        if (!(from = bounce = malloc(length)))
            return -ENOMEM;
        iov_to_buf(iov, niov, 0, bounce, length);
    }
    for (uint64_t done = 0, part; !r && done < length; done += part) {
        part = min_u64(length - done, PAYLOAD_MAX);
        r = write_piece_co(n, offset + done, from + done, part, fua && s->can_fua);
    }
    free(bounce);
    return !r && fua && !s->can_fua ? nbd_flush_co(n) : r;
}

static int nbd_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    struct nbd_state *s = n->state;
    if (offset > n->size || length > n->size - offset)
        return -ENOSPC;
    if (!s->can_zero || (zero_flags & ZERO_NO_FALLBACK && !s->can_fast_zero))
        return -ENOTSUP;
    uint32_t flags = (zero_flags & ZERO_MAY_UNMAP ? 0 : LIBNBD_CMD_FLAG_NO_HOLE) |
                     (zero_flags & ZERO_NO_FALLBACK ? LIBNBD_CMD_FLAG_FAST_ZERO : 0);
    int r = 0;
    for (uint64_t part; !r && length; offset += part, length -= part) {
        struct request q = {0};
        part = min_u64(length, STEP_MAX);
        r = wait_co(s, &q, s->lib->aio_zero(s->h, part, offset, COMPLETION(q), flags));
    }
    return r;
}

static int nbd_discard_co(struct node *n, uint64_t offset, uint64_t length) {
    struct nbd_state *s = n->state;
    int r = 0;
    if (!s->can_trim || offset >= n->size)
        return 0;
    length = min_u64(length, n->size - offset);
    for (uint64_t part; !r && length; offset += part, length -= part) {
        struct request q = {0};
        part = min_u64(length, STEP_MAX);
        r = wait_co(s, &q, s->lib->aio_trim(s->h, part, offset, COMPLETION(q), 0));
    }
    return r;
}

static int nbd_flush_co(struct node *n) {
    struct nbd_state *s = n->state;
    struct request q = {0};
    if (!s->can_flush)
        return 0;
    return wait_co(s, &q, s->lib->aio_flush(s->h, COMPLETION(q), 0));
}

/* ---------------------------------------------------------------- extents */

enum { STATE_HOLE = 1, STATE_ZERO = 2 };

struct status_request {
    struct request q; /* first */
    const char *wanted;
    uint64_t length; /* of the first extent; 0: none came */
    uint32_t state;
};

static int on_extents(void *arg, const char *context, uint64_t offset, uint32_t *entries,
                      size_t entries_n, int *error) {
    struct status_request *q = arg;
    if (!q->length && entries_n >= 2 && !strcmp(context, q->wanted)) {
        q->length = entries[0];
        q->state = entries[1];
    }
    return 0;
}

static int nbd_extents_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    struct nbd_state *s = n->state;
    struct status_request q = {.wanted = s->context};
    *out = (struct extent){.length = length,
                           .kind = EXTENT_DATA,
                           .flags = EXTENT_IN_PLACE,
                           .storage = n,
                           .host_offset = offset};
    if (offset >= n->size) {
        out->kind = EXTENT_ZERO;
        return 0;
    }
    out->length = min_u64(length, n->size - offset);
    if (!s->has_allocation)
        return 0;
    int64_t cookie = s->lib->aio_block_status(s->h, min_u64(out->length, STEP_MAX), offset,
                                              (nbd_extent_callback){on_extents, &q, NULL},
                                              COMPLETION(q.q), LIBNBD_CMD_FLAG_REQ_ONE);
    int r = wait_co(s, &q.q, cookie);
    if (r < 0)
        return r;
    if (!q.length)
        return 0; /* the server keeps its secret: data is always true */
    out->length = min_u64(out->length, q.length);
    if (q.state & STATE_ZERO) {
        out->kind = EXTENT_ZERO;
        out->flags = q.state & STATE_HOLE ? 0 : EXTENT_ALLOCATED;
    } else if (q.state & STATE_HOLE && strcmp(s->context, LIBNBD_CONTEXT_BASE_ALLOCATION)) {
        out->kind = EXTENT_HOLE; /* the bits of another context are shown as they come */
        out->flags = 0;
    }
    return 0;
}

/* ---------------------------------------------------------------- opening */

struct connect_work {
    struct nbd_state *s;
    const struct nbd_client_tls *tls;
    const char *path, *host, *port, *export;
    int code;
    char text[512];
};

/* On a worker thread: the handle is this thread's meanwhile. */
static int connect_work(void *arg) {
    struct connect_work *w = arg;
    const struct nbd_lib *lib = w->s->lib;
    struct nbd_handle *h = w->s->h;
    int r = lib->set_export_name(h, w->export ? w->export : "");
    if (r >= 0)
        r = lib->add_meta_context(h, w->s->context);
    if (r >= 0)
        /* The engine checks ranges; flags and sizes are the server's to refuse. */
        r = lib->set_strict_mode(h, LIBNBD_STRICT_COMMANDS | LIBNBD_STRICT_FLAGS);
    if (r >= 0)
        r = nbd_client_tls_set(lib, h, w->tls);
    if (r >= 0)
        r = w->path ? lib->connect_unix(h, w->path) : lib->connect_tcp(h, w->host, w->port);
    if (r < 0) {
        w->code = lib->get_errno();
        snprintf(w->text, sizeof(w->text), "%s", lib->get_error());
        return w->code ? -w->code : -EIO;
    }
    return 0;
}

static int connect_error(const struct connect_work *w, struct err *e) {
    bool refused = w->code == ECONNREFUSED || w->code == ENOENT || w->code == EACCES ||
                   w->code == ETIMEDOUT || w->code == EHOSTUNREACH || w->code == ENETUNREACH;
    int code = w->code ? w->code : EIO;
    if (refused && w->path)
        return err_set(e, code, "Failed to connect to '%s': %s", w->path, strerror(code));
    if (refused)
        return err_set(e, code, "Failed to connect to '%s:%s': %s", w->host, w->port,
                       strerror(code));
    return err_set(e, code == ENOTSUP ? EIO : code, "Failed to negotiate with the NBD server: %s",
                   w->text);
}

static void take_abilities(struct node *n) {
    struct nbd_state *s = n->state;
    const struct nbd_lib *lib = s->lib;
    s->read_only = lib->is_read_only(s->h) > 0;
    s->can_flush = lib->can_flush(s->h) > 0;
    s->can_fua = lib->can_fua(s->h) > 0;
    s->can_trim = lib->can_trim(s->h) > 0;
    s->can_zero = lib->can_zero(s->h) > 0;
    s->can_fast_zero = lib->can_fast_zero(s->h) > 0;
    s->has_allocation = lib->can_meta_context(s->h, s->context) > 0;
    int64_t least = lib->get_block_size(s->h, LIBNBD_SIZE_MINIMUM);
    n->request_align =
        least > 1 && least <= 64 * 1024 && is_pow2((uint64_t)least) ? (uint32_t)least : 1;
    n->granularity = 1;
}

static int connect_co(struct node *n, const char *path, const char *host, const char *port,
                      const char *export, const struct nbd_client_tls *tls, struct err *e) {
    struct nbd_state *s = n->state;
    s->lib = nbd_lib_get(e);
    if (!s->lib)
        return err_status(e);
    waitq_init(&s->turn);
    s->context = s->context ? s->context : LIBNBD_CONTEXT_BASE_ALLOCATION;
    s->h = s->lib->create();
    if (!s->h)
        return err_set(e, ENOMEM, "no memory for an NBD connection");
    struct connect_work *w AUTO_FREE = xcalloc(1, sizeof(*w));
    *w = (struct connect_work){
        .s = s, .tls = tls, .path = path, .host = host, .port = port, .export = export};
    if (offload_blocking_co(connect_work, w) < 0)
        return connect_error(w, e);
    int64_t size = s->lib->get_size(s->h);
    if (size < 0)
        return err_set(e, EIO, "the server does not say how large its disk is");
    n->size = (uint64_t)size;
    take_abilities(n);
    if (s->read_only && node_is_rw(n))
        return err_set(e, EACCES, "request on write denied without write permission");
    return 0;
}

static int nbd_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    const struct nbd_opts *o = n->opts;
    const char *path = o->path ? o->path : o->flat_path;
    const char *host = o->host ? o->host : o->flat_host;
    const char *port = o->port ? o->port : o->flat_port ? o->flat_port : "10809";
    if (path && host)
        return err_set(e, EINVAL, "path and host may not be used at the same time");
    if (!path && !host)
        return err_set(e, EINVAL, "NBD server address missing");
    ((struct nbd_state *)n->state)->context = o->context;
    free(n->filename);
    n->filename = nbd_make_name(path, host, port, o->export);
    struct nbd_client_tls tls = {.on = o->tls || o->tls_certificates || o->tls_psk_file,
                                 .any_server = !o->tls_verify,
                                 .certificates = o->tls_certificates,
                                 .psk_file = o->tls_psk_file,
                                 .username = o->tls_username};
    if (o->tls_creds && tls.on)
        return err_set(e, EINVAL, "tls-creds and the other tls options exclude each other");
    int r = o->tls_creds ? nbd_client_tls_object(o->tls_creds, o->tls_hostname, &tls, e) : 0;
    if (r == 0)
        r = connect_co(n, path, host, port, o->export, &tls, e);
    nbd_client_tls_free(&tls);
    return r;
}

/* "Creating" checks that what is there is large enough; the name is there already. */
static int nbd_create_co(struct node *n, struct create_ctx *ctx, struct err *e) {
    json_t *tree = json_object();
    int r = nbd_parse_name(ctx->name, tree, e);
    const json_t *server = json_object_get(tree, "server");
    struct nbd_client_tls tls = {
        .on = json_is_true(json_object_get(tree, "tls")),
        .any_server = json_is_false(json_object_get(tree, "tls-verify-peer")),
        .certificates = json_string_value(json_object_get(tree, "tls-certificates")),
        .psk_file = json_string_value(json_object_get(tree, "tls-psk-file")),
        .username = json_string_value(json_object_get(tree, "tls-username"))};
    if (!r) {
        /* The strings are the tree's, and n->opts stays empty. */
        r = connect_co(n, json_string_value(json_object_get(server, "path")),
                       json_string_value(json_object_get(server, "host")),
                       json_string_value(json_object_get(server, "port")),
                       json_string_value(json_object_get(tree, "export")), &tls, e);
    }
    json_decref(tree);
    if (!r && ctx->size > n->size)
        r = err_set(e, ENOSPC, "the server's disk has %llu bytes, %llu are needed",
                    (unsigned long long)n->size, (unsigned long long)ctx->size);
    return r;
}

static int nbd_link_co(struct node *n, const char *name, bool replace, struct err *e) {
    return 0;
}

static void nbd_close_co(struct node *n) {
    struct nbd_state *s = n->state;
    if (!s->h)
        return;
    if (s->lib->aio_is_ready(s->h) > 0)
        s->lib->shutdown(s->h, 0); /* a few bytes; blocks no longer than they take to send */
    s->lib->close(s->h);
}

static int nbd_truncate_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    if (size > n->size)
        return err_set(e, EINVAL, "Cannot grow NBD nodes");
    if (size < n->size)
        return err_set(e, ENOTSUP, "Cannot resize NBD nodes");
    return 0;
}

static int nbd_reopen_co(struct node *n, unsigned new_flags, struct err *e) {
    struct nbd_state *s = n->state;
    if (new_flags & NODE_RW && s->read_only)
        return err_set(e, EACCES, "request on write denied without write permission");
    return 0;
}

static const struct opt nbd_open_opts[] = {
    OPT_STR(struct nbd_opts, type, "server.type", OPT_OPEN, "unix or inet"),
    OPT_STR(struct nbd_opts, path, "server.path", OPT_OPEN, "unix socket of the server"),
    OPT_STR(struct nbd_opts, host, "server.host", OPT_OPEN, "host of the server"),
    OPT_STR(struct nbd_opts, port, "server.port", OPT_OPEN, "its port; 10809"),
    OPT_STR(struct nbd_opts, flat_path, "path", OPT_OPEN, "the same as server.path"),
    OPT_STR(struct nbd_opts, flat_host, "host", OPT_OPEN, "the same as server.host"),
    OPT_STR(struct nbd_opts, flat_port, "port", OPT_OPEN, "the same as server.port"),
    OPT_STR(struct nbd_opts, export, "export", OPT_OPEN, "name of the export; the default one"),
    OPT_STR(struct nbd_opts, context, "x-dirty-bitmap", OPT_OPEN,
            "show another metadata context as the map: bit 0 for not there, bit 1 for zeros"),
    OPT_STR(struct nbd_opts, tls_creds, "tls-creds", OPT_OPEN, "id of --object tls-creds-..."),
    OPT_STR(struct nbd_opts, tls_hostname, "tls-hostname", OPT_OPEN,
            "refused: the name connected to is the one that is checked"),
    OPT_BOOL(struct nbd_opts, tls, "tls", OPT_OPEN, false, "TLS, or nothing"),
    OPT_STR(struct nbd_opts, tls_certificates, "tls-certificates", OPT_OPEN,
            "folder with ca-cert.pem, client-cert.pem and client-key.pem"),
    OPT_STR(struct nbd_opts, tls_psk_file, "tls-psk-file", OPT_OPEN, "file of keys, NAME:HEXKEY"),
    OPT_STR(struct nbd_opts, tls_username, "tls-username", OPT_OPEN, "who to be in that file"),
    OPT_BOOL(struct nbd_opts, tls_verify, "tls-verify-peer", OPT_OPEN, true,
             "whether the server must show a certificate that is trusted"),
    OPT_END,
};

static const struct storage_ops nbd_storage = {
    .preadv_co = nbd_preadv_co,
    .pwritev_co = nbd_pwritev_co,
    .zero_co = nbd_zero_co,
    .discard_co = nbd_discard_co,
    .flush_co = nbd_flush_co,
    .truncate_co = nbd_truncate_co,
    .extents_co = nbd_extents_co,
    .create_co = nbd_create_co,
    .link_co = nbd_link_co,
};

static const char *const nbd_prefixes[] = {
    "nbd:", "nbd+unix:", "nbd+tcp:", "nbds:", "nbds+unix:", "nbds+tcp:", NULL};

const struct driver driver_nbd = {
    .name = "nbd",
    .kind = DRIVER_STORAGE,
    .help = "a disk behind an NBD server",
    .prefixes = nbd_prefixes,
    .state_size = sizeof(struct nbd_state),
    .opts = nbd_open_opts,
    .opts_size = sizeof(struct nbd_opts),
    .parse_name = nbd_parse_name,
    .open_co = nbd_open_co,
    .close_co = nbd_close_co,
    .reopen_co = nbd_reopen_co,
    .storage = &nbd_storage,
};
