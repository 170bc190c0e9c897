/* SPDX-License-Identifier: MIT */
/*
 * The access log: a line when a client has got through the handshake, and one when it has left.
 *
 *   2026-01-31T12:00:00Z client=3 open peer=unix(pid=41,uid=1000) tls=no export="root"
 *   2026-01-31T12:00:07Z client=3 close requests=90 read=368640 written=0 errors=0 seconds=7.1 left
 *
 * A client that fails in the handshake has one line, "refused".  Texts of others are in quotes with
 * everything but printable ASCII escaped, so that a line stays a line.
 */
#include "export/nbd/client.h"

#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <linux/vm_sockets.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include "base/strbuf.h"

static void put_time(struct strbuf *b) {
    time_t now = time(NULL);
    struct tm tm;
    char text[32];
    gmtime_r(&now, &tm);
    strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &tm);
    strbuf_puts(b, text);
}

static void put_peer(struct strbuf *b, int fd) {
    struct sockaddr_storage sa = {0};
    socklen_t len = sizeof(sa);
    char host[INET6_ADDRSTRLEN] = "?";
    struct ucred cred;
    socklen_t cred_len = sizeof(cred);
    if (getpeername(fd, (struct sockaddr *)&sa, &len) < 0)
        sa.ss_family = AF_UNSPEC;
    switch (sa.ss_family) {
    case AF_INET: {
        const struct sockaddr_in *in = (const struct sockaddr_in *)&sa;
        inet_ntop(AF_INET, &in->sin_addr, host, sizeof(host));
        strbuf_printf(b, "%s:%u", host, ntohs(in->sin_port));
        return;
    }
    case AF_INET6: {
        const struct sockaddr_in6 *in = (const struct sockaddr_in6 *)&sa;
        inet_ntop(AF_INET6, &in->sin6_addr, host, sizeof(host));
        strbuf_printf(b, "[%s]:%u", host, ntohs(in->sin6_port));
        return;
    }
    case AF_VSOCK: {
        const struct sockaddr_vm *vm = (const struct sockaddr_vm *)&sa;
        strbuf_printf(b, "vsock(%u:%u)", vm->svm_cid, vm->svm_port);
        return;
    }
    case AF_UNIX:
        if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &cred_len) == 0) {
            strbuf_printf(b, "unix(pid=%ld,uid=%lu)", (long)cred.pid, (unsigned long)cred.uid);
            return;
        }
        strbuf_puts(b, "unix");
        return;
    default:
        strbuf_puts(b, "?");
    }
}

static void put_quoted(struct strbuf *b, const char *s) {
    strbuf_puts(b, "\"");
    for (; *s; s++) {
        unsigned char ch = (unsigned char)*s;
        if (ch < 0x20 || ch >= 0x7f || ch == '"' || ch == '\\')
            strbuf_printf(b, "\\x%02x", ch);
        else
            strbuf_add(b, s, 1);
    }
    strbuf_puts(b, "\"");
}

void nbd_access_open(struct nbd_client *c) {
    if (!c->s->access)
        return;
    struct strbuf b AUTO_STRBUF = STRBUF_INIT;
    put_time(&b);
    strbuf_printf(&b, " client=%u open peer=", c->id);
    put_peer(&b, c->fd);
    strbuf_printf(&b, " tls=%s export=", c->tls ? "yes" : "no");
    put_quoted(&b, c->x->base.name);
    c->s->access(c->s->arg, b.s);
}

void nbd_access_close(struct nbd_client *c, int rc) {
    if (!c->s->access)
        return;
    struct strbuf b AUTO_STRBUF = STRBUF_INIT;
    put_time(&b);
    strbuf_printf(&b, " client=%u ", c->id);
    if (!c->x) {
        strbuf_puts(&b, rc == -ECONNABORTED ? "looked peer=" : "refused peer=");
        put_peer(&b, c->fd);
    } else {
        double seconds = (double)(loop_now_ns(c->s->loop) - c->since_ns) / 1e9;
        strbuf_printf(&b,
                      "close requests=%" PRIu64 " read=%" PRIu64 " written=%" PRIu64
                      " errors=%" PRIu64 " seconds=%.1f %s",
                      c->requests, c->bytes_read, c->bytes_written, c->errors, seconds,
                      rc < 0 && !c->s->stopping ? "lost" : "left");
    }
    c->s->access(c->s->arg, b.s);
}
