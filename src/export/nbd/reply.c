/* SPDX-License-Identifier: MIT */
/*
 * Sending replies: many in one system call, never blocking whoever finished a request.
 *
 * Replies queue in order of completion.  nbd_reply_flush() sends with MSG_DONTWAIT; when the socket
 * is full it hands the queue to a sender task, which alone sends until the queue is empty.  So
 * neither the receiver nor a request task ever sleeps because a client does not read.
 *
 * A request that finishes outside the receiver's turn (disk reads that really waited) lets the
 * other completions of this turn of the loop run before it sends, so that they share the system
 * call.
 */
#include "export/nbd/client.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include "export/nbd/tls.h"

/* While parsing, send early at this many bytes: the client can go on while we do. */
#define CORK_BYTES (128u * 1024)

static void drop_replies(struct nbd_client *c) {
    while (!list_empty(&c->replies))
        nbd_req_put(list_entry(list_pop_front(&c->replies), struct nbd_req, link));
    c->reply_bytes = 0;
}

void nbd_client_kill(struct nbd_client *c) {
    if (!c->dead) {
        c->dead = true;
        c->closing = true;
        if (c->x) {
            throttle_wake(&c->x->bytes, c);
            throttle_wake(&c->x->requests, c);
        }
        /* Wakes the receiver and a sender that wait on the socket. */
        shutdown(c->fd, SHUT_RDWR);
    }
    drop_replies(c);
}

/* Removes `n` sent bytes from the front of the queue. */
static void sent(struct nbd_client *c, size_t n) {
    c->reply_bytes -= n;
    while (!list_empty(&c->replies)) {
        struct nbd_req *r = list_entry(c->replies.next, struct nbd_req, link);
        for (; r->iov_done < r->niov; r->iov_done++) {
            struct iovec *v = &r->iov[r->iov_done];
            if (n < v->iov_len) {
                v->iov_base = (char *)v->iov_base + n;
                v->iov_len -= n;
                return;
            }
            n -= v->iov_len;
        }
        list_remove(&r->link);
        nbd_req_put(r);
    }
}

/* One sendmsg of what is queued: bytes, or -errno. */
static ssize_t send_some(struct nbd_client *c) {
    int n = 0;
    list_for_each(it, &c->replies) {
        struct nbd_req *r = list_entry(it, struct nbd_req, link);
        for (int i = r->iov_done; i < r->niov && n < TX_IOV; i++)
            c->tx[n++] = r->iov[i];
        if (n == TX_IOV)
            break;
    }
    if (c->tls)
        return tls_send(c->tls, c->tx, n);
    struct msghdr m = {.msg_iov = c->tx, .msg_iovlen = (size_t)n};
    ssize_t done;
    do
        done = sendmsg(c->fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (done < 0 && errno == EINTR);
    return done < 0 ? -errno : done;
}

/* Sends until the queue is empty (0), the socket full (-EAGAIN) or gone (-errno). */
static int send_all(struct nbd_client *c) {
    while (!list_empty(&c->replies)) {
        ssize_t n = send_some(c);
        if (n < 0)
            return (int)n;
        c->alive_ns = loop_now_ns(c->s->loop);
        sent(c, (size_t)n);
    }
    return c->tls ? tls_flush(c->tls) : 0;
}

static void sender_co(void *arg) {
    struct nbd_client *c = arg;
    int rc = -EAGAIN;
    while (rc == -EAGAIN && !c->dead) {
        int ev = loop_poll_co(c->fd, POLLOUT, -1);
        rc = ev < 0 ? ev : send_all(c);
    }
    c->sending = false;
    if (rc < 0 || c->dead)
        nbd_client_kill(c);
    waitq_wake_all(&c->idle);
}

void nbd_reply_flush(struct nbd_client *c) {
    if (c->sending || list_empty(&c->replies))
        return;
    int rc = send_all(c);
    if (rc == -EAGAIN) {
        c->sending = true;
        task_spawn(c->s->loop, sender_co, c);
    } else if (rc < 0) {
        nbd_client_kill(c);
    }
}

void nbd_reply_queue(struct nbd_req *r) {
    struct nbd_client *c = r->c;
    if (c->dead) {
        nbd_req_put(r);
        return;
    }
    r->iov_done = 0;
    for (int i = 0; i < r->niov; i++)
        c->reply_bytes += r->iov[i].iov_len;
    list_push_back(&c->replies, &r->link);
    if (c->sending || c->flush_due)
        return;
    if (c->corked) {
        if (c->reply_bytes >= CORK_BYTES)
            nbd_reply_flush(c);
        return;
    }
    if (c->tasks > 1) {
        c->flush_due = true;
        task_yield_co();
        c->flush_due = false;
        if (c->corked) /* the receiver runs again and will flush */
            return;
    }
    nbd_reply_flush(c);
}
