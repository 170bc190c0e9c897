/* SPDX-License-Identifier: MIT */
/*
 * What a client may send to the NBD server: handshake and transmission, all of it at once.
 *
 * The first byte chooses what surrounds the rest: bit 0, a handshake made here comes first, so that
 * the input is requests; bit 1, read-only; bit 2, qcow2 instead of raw; bit 3, the client does not
 * read the answers before it has sent everything; bit 4, the storage lets other requests in
 * between; bit 5, and some of its writes fail; bit 6, with bit 0 headers are extended, else TLS is
 * required; bit 7, the export is paused for a while, limited, and taken away under its clients at
 * the end.  The rest are the client's bytes.  A request that begins after "Rq" ("Re": an extended
 * one) is completed with the magic number, so that mutations stay requests.
 *
 * Invariants: the server answers or hangs up, and is done soon after the client has; a second
 * client is then served; the disk keeps its size.
 */
#include "flaky.h"

#include <sys/socket.h>
#include "export/nbd/proto.h"
#include "export/export.h"
#include "export/nbd/server.h"
#include "export/nbd/tls.h"

#define DISK_BYTES (256 * KIB)
#define SEND_MAX (64 * KIB)

struct session {
    const uint8_t *data;
    size_t size;
    unsigned mode;
};

struct peer {
    int fd;
    uint8_t *bytes;
    size_t len;
    bool sent;
    struct task_group *group;
};

static const uint8_t hello[] = {
    0,   0,   0,   3,                                                             /* flags */
    'I', 'H', 'A', 'V', 'E', 'O', 'P', 'T', 0,   0,   0,   8,   0,   0,   0,   0, /* structured
                                                                                     replies */
    'I', 'H', 'A', 'V', 'E', 'O', 'P', 'T', 0,   0,   0,   10,  0,   0,   0,   27,  0,
    0,   0,   0,   0,   0,   0,   1,   0,   0,   0,   15,  'b', 'a', 's', 'e', ':', 'a',
    'l', 'l', 'o', 'c', 'a', 't', 'i', 'o', 'n', 'I', 'H', 'A', 'V', 'E', 'O', 'P', 'T',
    0,   0,   0,   7,   0,   0,   0,   6,   0,   0,   0,   0,   0,   0, /* go */
};

enum { HELLO_OPTION = 15 }; /* where hello names structured replies */

/* The client's bytes: "Rq" and "Re" stand for the magic numbers of requests. */
static void compose(const struct session *s, struct peer *p) {
    p->bytes = xcalloc(1, sizeof(hello) + s->size * 2 + 1);
    if (s->mode & 1) {
        memcpy(p->bytes, hello, sizeof(hello));
        p->len = sizeof(hello);
        if (s->mode & 64)
            p->bytes[HELLO_OPTION] = NBD_OPT_EXTENDED_HEADERS;
    }
    for (size_t i = 0; i < s->size;) {
        bool two = i + 1 < s->size && s->data[i] == 'R';
        if (two && (s->data[i + 1] == 'q' || s->data[i + 1] == 'e')) {
            be32_store(p->bytes + p->len,
                       s->data[i + 1] == 'q' ? NBD_REQUEST_MAGIC : NBD_EXTENDED_REQUEST_MAGIC);
            p->len += 4;
            i += 2;
        } else {
            p->bytes[p->len++] = s->data[i++];
        }
    }
    p->len = min_u64(p->len, SEND_MAX);
}

static void send_co(void *arg) {
    struct peer *p = arg;
    for (size_t at = 0; at < p->len;) {
        struct iovec v = {p->bytes + at, p->len - at};
        struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
        ssize_t r = loop_sendmsg_co(p->fd, &m, MSG_NOSIGNAL);
        if (r <= 0)
            break;
        at += (size_t)r;
    }
    shutdown(p->fd, SHUT_WR);
    p->sent = true;
}

static void connect_peer(struct nbd_server *server, struct peer *p) {
    int fds[2];
    struct err e AUTO_ERR = ERR_INIT;
    FUZZ_CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds),
               "no socket pair");
    p->fd = fds[0];
    FUZZ_CHECK(nbd_server_attach(server, fds[1], &e) == 0, "attach: %s", err_text(&e));
}

/* What control/ does to an export while clients use it. */
static void pause_co(void *arg) {
    struct export *x = arg;
    for (int i = 0; i < 3; i++) {
        task_yield_co();
        x->ops->pause_co(x);
        task_yield_co();
        x->ops->resume(x);
    }
}

/* Reads until the server hangs up. */
static uint64_t drain_co(struct peer *p) {
    static uint8_t sink[64 * KIB];
    uint64_t got = 0;
    for (;;) {
        ssize_t r = loop_recv_co(p->fd, sink, sizeof(sink));
        if (r <= 0)
            return got;
        got += (uint64_t)r;
    }
}

static void session_co(struct nbd_server *server, struct export *x, const struct session *s) {
    struct peer p = {0};
    struct task_group group;
    compose(s, &p);
    connect_peer(server, &p);
    task_group_init(&group);
    task_group_spawn(&group, loop_self(), send_co, &p);
    if (s->mode & 128)
        task_group_spawn(&group, loop_self(), pause_co, x);
    if (s->mode & 8)
        for (int i = 0; i < 8 && !p.sent; i++)
            task_yield_co();
    drain_co(&p);
    task_group_wait_co(&group);
    close(p.fd);
    free(p.bytes);
}

/* Somebody else is served: greeting, and the answer to an ABORT. */
static void second_client_co(struct nbd_server *server) {
    static const uint8_t bytes[] = {0,   0,   0, 3, 'I', 'H', 'A', 'V', 'E', 'O',
                                    'P', 'T', 0, 0, 0,   2,   0,   0,   0,   0};
    struct peer p = {.bytes = (uint8_t *)bytes, .len = sizeof(bytes)};
    connect_peer(server, &p);
    send_co(&p);
    uint64_t got = drain_co(&p);
    FUZZ_CHECK(got >= 18 + 20, "a second client got only %" PRIu64 " bytes", got);
    close(p.fd);
}

static struct node *disk_co(unsigned mode) {
    bool qcow2 = mode & 4;
    struct node *file = mode & 16 ? flaky_new_co(4 * MIB, 100, mode) : fuzz_memory_co(4 * MIB);
    struct node *n = NULL;
    struct open_req req = {.flags = OPEN_RW | OPEN_UNMAP};
    const struct driver *drv = driver_find(qcow2 ? "qcow2" : "raw");
    struct err e AUTO_ERR = ERR_INIT;
    int r = 0;
    if (qcow2) {
        json_t *o = json_pack("{s:i, s:i}", "size", (int)DISK_BYTES, "cluster_size", 4096);
        r = format_create_co(file, drv, o, &e);
        json_decref(o);
    } else {
        r = disk_resize_co(file, DISK_BYTES, PREALLOC_OFF, &e);
    }
    if (!r)
        r = node_open_on_co(file, drv, NULL, &req, &n, &e);
    FUZZ_CHECK(r == 0, "no disk: %s", err_text(&e));
    if (mode & 16 && mode & 32)
        flaky_fail(file, 7, 20);
    return n;
}

static void one_co(void *arg) {
    const struct session *s = arg;
    struct nbd_server *server;
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = disk_co(s->mode);
    struct nbd_server_opts opts = {.tls_required = true};
    struct export *first;
    if ((s->mode & 65) == 64) {
        struct nbd_tls_opts t = {.kind = TLS_ANON};
        FUZZ_CHECK(nbd_tls_new(&t, &opts.tls, &e) == 0, "TLS: %s", err_text(&e));
    }
    struct nbd_export_opts x = {.name = "x", .node = n, .read_only = s->mode & 2};
    if (s->mode & 128)
        x.bytes = x.requests = INT64_MAX;
    struct nbd_export_opts y = {.name = "y", .node = n, .allocation_depth = true, .share = 1};
    FUZZ_CHECK(nbd_server_new(loop_self(), &opts, &server, &e) == 0, "server: %s", err_text(&e));
    FUZZ_CHECK(nbd_server_add(server, &x, &first, &e) == 0, "export: %s", err_text(&e));
    FUZZ_CHECK(nbd_server_add(server, &y, NULL, &e) == 0, "export: %s", err_text(&e));
    session_co(server, first, s);
    second_client_co(server);
    if (s->mode & 128)
        FUZZ_CHECK(first->ops->remove_co(first, true, &e) == 0, "remove: %s", err_text(&e));
    nbd_server_stop_co(server);
    FUZZ_CHECK(nbd_server_clients(server) == 0, "clients are left after the stop");
    nbd_server_free(server);
    FUZZ_CHECK(n->size == DISK_BYTES, "the disk has %" PRIu64 " bytes now", n->size);
    FUZZ_CHECK(n->in_flight == 0, "requests are left in the engine");
    node_unref_co(n);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!size)
        return 0;
    struct session s = {data + 1, min_u64(size - 1, SEND_MAX), data[0]};
    fuzz_run(one_co, &s);
    return 0;
}
