/* SPDX-License-Identifier: MIT */
/*
 * The server: listeners, clients, and an orderly end.
 *
 * Each listener has an acceptor task, each connection a task of its own (client.h).  While
 * max_clients are connected nobody is accepted; the backlog of the socket is the queue.
 *
 * Stop: acceptors are cancelled; each client's socket is shut for reading, so that its receiver
 * comes to an end, and what is in flight is finished and answered.  After STOP_GRACE_NS the sockets
 * are shut for good, which frees senders whose peer does not read.  Requests to the disk are never
 * abandoned.
 *
 * A watchdog looks at all clients once a second: it ends those that have been idle for longer than
 * allowed, and, while somebody waits for room in SERVER_PAYLOAD, those that hold some of it and
 * have taken no answer for STALL_NS.
 */
#include "export/nbd/client.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>
#include "base/cleanup.h"
#include "base/err.h"
#include "base/log.h"
#include "disk/node.h"
#include "export/nbd/tls.h"

#define STOP_GRACE_NS (INT64_C(3) * 1000000000)
#define ACCEPT_PAUSE_NS (INT64_C(100) * 1000000) /* after "too many open files" and the like */
#define WATCH_NS (INT64_C(1) * 1000000000)
#define STALL_NS (INT64_C(15) * 1000000000)
#define MAX_CLIENTS_DEFAULT 100
#define HANDSHAKE_DEFAULT_NS (INT64_C(10) * 1000000000)
/* Asked of the socket; the kernel gives what its limits allow.  256 KiB replies in one call. */
#define SOCKET_BUFFER_BYTES (2 << 20)

struct listener {
    struct list link;
    struct nbd_server *s;
    int fd;
};

void nbd_log(struct nbd_client *c, const char *fmt, ...) {
    char text[200];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    log_msg(c->s->verbose ? LOG_LV_INFO : LOG_LV_DEBUG, "NBD client %u: %s", c->id, text);
}

/* ---------------------------------------------------------------- clients */

static void client_free(struct nbd_client *c) {
    struct nbd_server *s = c->s;
    list_remove(&c->link);
    if (c->x)
        nbd_export_leave(c->x);
    tls_session_free(c->tls);
    close(c->fd);
    free(c->rx);
    free(c);
    s->nclients--;
    waitq_wake_all(&s->changed);
    if (s->nclients == 0 && s->served && !s->stopping && s->on_idle)
        s->on_idle(s->arg);
}

static void client_task(void *arg) {
    struct nbd_client *c = arg;
    nbd_log(c, "connected");
    int rc = nbd_handshake_co(c);
    if (rc == 0) {
        c->s->served = true;
        c->since_ns = loop_now_ns(c->s->loop);
        nbd_access_open(c);
        rc = nbd_session_co(c);
    }
    nbd_access_close(c, rc);
    nbd_log(c, rc < 0 && rc != -ECONNABORTED ? "lost" : "left");
    client_free(c);
}

static void watch_start(struct nbd_server *s);

static void tune_socket(int fd) {
    int on = 1, size = SOCKET_BUFFER_BYTES;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)); /* fails on unix sockets: fine */
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
}

int nbd_server_attach(struct nbd_server *s, int fd, struct err *e) {
    AUTO_FD int owned = fd;
    if (s->stopping)
        return err_set(e, ESHUTDOWN, "the server is stopping");
    int fl = fcntl(fd, F_GETFL);
    if (fl < 0 || fcntl(fd, F_SETFL, fl | O_NONBLOCK) < 0)
        return err_errno(e, errno, "client socket");
    struct nbd_client *c = calloc(1, sizeof(*c));
    uint8_t *rx = malloc(RX_BYTES);
    if (!c || !rx) {
        free(c);
        free(rx);
        return err_set(e, ENOMEM, "no memory for a client");
    }
    tune_socket(fd);
    c->s = s;
    c->fd = steal_fd(&owned);
    c->id = ++s->next_id;
    c->rx = rx;
    list_init(&c->free_reqs);
    list_init(&c->replies);
    waitq_init(&c->req_freed);
    waitq_init(&c->idle);
    list_push_back(&s->clients, &c->link);
    s->nclients++;
    watch_start(s);
    task_spawn(s->loop, client_task, c);
    return 0;
}

/* ---------------------------------------------------------------- the watchdog */

static void watch_client(struct nbd_server *s, struct nbd_client *c, int64_t now) {
    if (!c->x || c->dead)
        return; /* the handshake has a limit of its own */
    int64_t quiet = now - c->alive_ns;
    if (s->idle_timeout_ns && quiet > s->idle_timeout_ns && (c->tasks == 0 || c->sending)) {
        nbd_log(c, "idle for too long");
        nbd_client_kill(c);
    } else if (s->payload_waiters && quiet > STALL_NS && c->sending && c->budget < PAYLOAD_BUDGET) {
        nbd_log(c, "takes no answers while others wait for memory");
        nbd_client_kill(c);
    }
}

static void watchdog(void *arg) {
    struct nbd_server *s = arg;
    s->watch_task = task_self();
    while (!s->stopping && s->nclients) {
        loop_sleep_co(WATCH_NS);
        int64_t now = loop_now_ns(s->loop);
        list_for_each(it, &s->clients)
            watch_client(s, list_entry(it, struct nbd_client, link), now);
    }
    s->watch_running = false;
    waitq_wake_all(&s->changed);
}

/* Runs from the first client on: a server that nobody has met sleeps. */
static void watch_start(struct nbd_server *s) {
    if (s->watch_running || s->stopping)
        return;
    s->watch_running = true;
    s->watch_task = NULL;
    task_spawn(s->loop, watchdog, s);
}

/* ---------------------------------------------------------------- listeners */

static void acceptor(void *arg) {
    struct listener *l = arg;
    struct nbd_server *s = l->s;
    while (!s->stopping) {
        if (s->nclients >= s->max_clients) {
            waitq_wait_co(&s->changed);
            continue;
        }
        struct sockaddr_storage peer;
        socklen_t len = sizeof(peer);
        int fd = loop_accept_co(l->fd, &peer, &len);
        if (fd >= 0)
            nbd_server_attach(s, fd, NULL);
        else if (fd == -ECANCELED || fd == -EBADF || fd == -EINVAL)
            break;
        else if (fd != -ECONNABORTED)
            loop_sleep_co(ACCEPT_PAUSE_NS);
    }
    close(l->fd);
    list_remove(&l->link);
    free(l);
    s->nlisteners--;
    waitq_wake_all(&s->changed);
}

int nbd_server_listen(struct nbd_server *s, int listen_fd, struct err *e) {
    if (s->stopping) {
        close(listen_fd);
        return err_set(e, ESHUTDOWN, "the server is stopping");
    }
    struct listener *l = xcalloc(1, sizeof(*l));
    l->s = s;
    l->fd = listen_fd;
    list_push_back(&s->listeners, &l->link);
    s->nlisteners++;
    task_spawn(s->loop, acceptor, l);
    return 0;
}

/* ---------------------------------------------------------------- life */

int nbd_server_new(struct loop *loop, const struct nbd_server_opts *opts, struct nbd_server **out,
                   struct err *e) {
    struct nbd_server *s = xcalloc(1, sizeof(*s));
    s->loop = loop;
    s->max_clients = opts->max_clients ? opts->max_clients : MAX_CLIENTS_DEFAULT;
    s->handshake_timeout_ns =
        opts->handshake_timeout_ns ? opts->handshake_timeout_ns : HANDSHAKE_DEFAULT_NS;
    s->idle_timeout_ns = opts->idle_timeout_ns;
    s->tls = opts->tls;
    s->tls_required = opts->tls && opts->tls_required;
    s->on_idle = opts->on_idle;
    s->access = opts->access;
    s->verbose = opts->verbose;
    s->arg = opts->arg;
    s->tasks_free = SERVER_TASKS_MAX;
    s->payload = SERVER_PAYLOAD;
    list_init(&s->exports);
    list_init(&s->clients);
    list_init(&s->listeners);
    waitq_init(&s->changed);
    waitq_init(&s->task_freed);
    waitq_init(&s->payload_freed);
    *out = s;
    return 0;
}

unsigned nbd_server_clients(const struct nbd_server *s) {
    return s->nclients;
}

static void grace_task(void *arg) {
    struct nbd_server *s = arg;
    s->grace_task = task_self();
    if (!s->grace_over)
        loop_sleep_co(STOP_GRACE_NS);
    list_for_each(it, &s->clients) shutdown(list_entry(it, struct nbd_client, link)->fd, SHUT_RDWR);
    s->grace_running = false;
    waitq_wake_all(&s->changed);
}

void nbd_server_stop_co(struct nbd_server *s) {
    s->stopping = true;
    list_for_each(it, &s->listeners)
        loop_cancel_fd(s->loop, list_entry(it, struct listener, link)->fd);
    waitq_wake_all(&s->changed);
    list_for_each(it, &s->clients) {
        struct nbd_client *c = list_entry(it, struct nbd_client, link);
        c->closing = true;
        shutdown(c->fd, SHUT_RD);
    }
    list_for_each(it, &s->exports) { /* what waits for its turn need not wait any more */
        struct nbd_export *x = list_entry(it, struct nbd_export, link);
        throttle_open(&x->bytes);
        throttle_open(&x->requests);
    }
    if (s->nclients) {
        s->grace_running = true;
        task_spawn(s->loop, grace_task, s);
    }
    while (s->nclients || s->nlisteners)
        waitq_wait_co(&s->changed);
    while (s->watch_running) {
        if (s->watch_task)
            loop_cancel_sleep(s->watch_task);
        waitq_wait_co(&s->changed);
    }
    s->grace_over = true;
    while (s->grace_running) {
        if (s->grace_task)
            loop_cancel_sleep(s->grace_task);
        waitq_wait_co(&s->changed);
    }
}

void nbd_server_free(struct nbd_server *s) {
    if (!s)
        return;
    while (!list_empty(&s->exports))
        nbd_export_free(list_entry(s->exports.next, struct nbd_export, link));
    nbd_tls_free(s->tls);
    free(s);
}
