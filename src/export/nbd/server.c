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

#define STOP_GRACE_NS (INT64_C(3) * 1000000000)
#define ACCEPT_PAUSE_NS (INT64_C(100) * 1000000) /* after "too many open files" and the like */
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
        rc = nbd_session_co(c);
    }
    nbd_log(c, rc < 0 && rc != -ECONNABORTED ? "lost" : "left");
    client_free(c);
}

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
    task_spawn(s->loop, client_task, c);
    return 0;
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
    const char *name = opts->export.name ? opts->export.name : "";
    const char *desc = opts->export.description;
    struct nbd_name n = {name, (uint32_t)strnlen(name, NBD_STRING_MAX + 1)};
    struct nbd_name d = {desc, desc ? (uint32_t)strnlen(desc, NBD_STRING_MAX + 1) : 0};
    if (!nbd_name_valid(n) || !nbd_name_valid(d))
        return err_set(e, EINVAL,
                       "%s: the NBD protocol wants UTF-8 text of at most %u bytes, without NUL",
                       nbd_name_valid(n) ? "description" : "export name", NBD_STRING_MAX);
    if (opts->export.nbitmaps > NBD_CONTEXTS_MAX - NBD_CONTEXT_BITMAPS)
        return err_set(e, EFBIG, "%u bitmaps are more than the %u that one export can have",
                       opts->export.nbitmaps, NBD_CONTEXTS_MAX - NBD_CONTEXT_BITMAPS);
    struct nbd_server *s = xcalloc(1, sizeof(*s));
    s->loop = loop;
    s->allocation_depth = opts->export.allocation_depth;
    s->nbitmaps = opts->export.nbitmaps;
    s->bitmaps = xcalloc(s->nbitmaps + 1, sizeof(*s->bitmaps));
    for (unsigned i = 0; i < s->nbitmaps; i++)
        s->bitmaps[i] = opts->export.bitmaps[i];
    s->name = xstrdup(name);
    s->description = desc ? xstrdup(desc) : NULL;
    s->node = opts->export.node;
    s->read_only = opts->export.read_only || !node_is_rw(s->node);
    s->max_clients = opts->max_clients ? opts->max_clients : MAX_CLIENTS_DEFAULT;
    s->handshake_timeout_ns =
        opts->handshake_timeout_ns ? opts->handshake_timeout_ns : HANDSHAKE_DEFAULT_NS;
    s->on_idle = opts->on_idle;
    s->verbose = opts->verbose;
    s->arg = opts->arg;
    s->tasks_free = SERVER_TASKS_MAX;
    list_init(&s->clients);
    list_init(&s->listeners);
    waitq_init(&s->changed);
    waitq_init(&s->task_freed);
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
    if (s->nclients) {
        s->grace_running = true;
        task_spawn(s->loop, grace_task, s);
    }
    while (s->nclients || s->nlisteners)
        waitq_wait_co(&s->changed);
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
    free(s->name);
    free(s->description);
    free(s->bitmaps);
    free(s);
}
