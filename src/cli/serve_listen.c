/* SPDX-License-Identifier: MIT */
/*
 * Where `strata serve` listens, and the URIs that say so: one line for each export.
 *
 * An abstract socket has no URI that other programs know; it is written as "socket=@name" all the
 * same, which is how people write it.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include "base/cleanup.h"
#include "cli/serve.h"
#include "export/nbd/server.h"
#include "export/vhost/server.h"

static void uri_escape(struct strbuf *b, const char *s, bool path) {
    for (; *s; s++) {
        unsigned char c = (unsigned char)*s;
        bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                     strchr("-._~", c) || (path && strchr("/@", c));
        if (plain)
            strbuf_add(b, s, 1);
        else
            strbuf_printf(b, "%%%02X", c);
    }
}

static const char *scheme(const struct serve *s) {
    return s->a->tls ? "nbds" : "nbd";
}

static void uri_unix(struct serve *s, const char *path) {
    bool whole = path[0] == '/' || path[0] == '@';
    AUTO_FREE char *cwd = whole ? NULL : getcwd(NULL, 0);
    for (size_t i = 0; i < s->ndisks; i++) {
        strbuf_printf(&s->uris, "%s+unix:///", scheme(s));
        uri_escape(&s->uris, s->disks[i].d.name, false);
        strbuf_puts(&s->uris, "?socket=");
        if (cwd) {
            uri_escape(&s->uris, cwd, true);
            strbuf_puts(&s->uris, "/");
        }
        uri_escape(&s->uris, path, true);
        strbuf_puts(&s->uris, "\n");
    }
}

static void uri_host(struct serve *s, const char *suffix, const char *host, unsigned port) {
    bool v6 = strchr(host, ':');
    for (size_t i = 0; i < s->ndisks; i++) {
        strbuf_printf(&s->uris, "%s%s://%s%s%s:%u/", scheme(s), suffix, v6 ? "[" : "", host,
                      v6 ? "]" : "", port);
        uri_escape(&s->uris, s->disks[i].d.name, false);
        strbuf_puts(&s->uris, "\n");
    }
}

/* A listening socket, whose file is ours to remove. */
static int bind_unix(struct serve *s, const char *path) {
    int fd = nbd_listen_unix(path, &s->ctx->err);
    if (fd >= 0 && path[0] != '@' && stat(path, &s->socket_stat) == 0)
        s->socket_path = xstrdup(path);
    return fd;
}

static int listen_unix(struct serve *s) {
    const char *path = s->a->socket;
    if (!strncmp(path, "unix:", 5))
        path += 5;
    int fd = bind_unix(s, path);
    if (fd < 0)
        return fd;
    uri_unix(s, path);
    return nbd_server_listen(s->server, fd, &s->ctx->err);
}

int serve_vhost(struct serve *s) {
    const struct serve_args *a = s->a;
    int fd = bind_unix(s, a->vhost_user);
    if (fd < 0)
        return fd;
    struct control_disk *d = &s->disks[0].d;
    struct vhost_server_opts o = {.name = d->name,
                                  .node = d->node,
                                  .read_only = a->read_only,
                                  .queues = (unsigned)a->queues,
                                  .block_size = (uint32_t)a->block_size,
                                  .serial = a->serial,
                                  .on_idle = serve_on_idle,
                                  .arg = s};
    int rc = vhost_server_new(s->ctx->loop, fd, &o, &s->vhost, &s->ctx->err);
    if (rc == 0) {
        d->export = vhost_server_export(s->vhost);
        strbuf_printf(&s->uris, "vhost-user:%s\n", a->vhost_user);
    }
    return rc;
}

static int listen_tcp(struct serve *s) {
    const struct serve_args *a = s->a;
    uint16_t port = (uint16_t)a->port;
    int fd = nbd_listen_tcp(a->bind, &port, &s->ctx->err);
    if (fd < 0)
        return fd;
    uri_host(s, "", a->bind ? a->bind : "127.0.0.1", port);
    return nbd_server_listen(s->server, fd, &s->ctx->err);
}

/* The host's address, as its guests know it, is 2. */
static int listen_vsock(struct serve *s) {
    uint32_t port = (uint32_t)s->a->vsock;
    int fd = nbd_listen_vsock(&port, &s->ctx->err);
    if (fd < 0)
        return fd;
    uri_host(s, "+vsock", "2", port);
    return nbd_server_listen(s->server, fd, &s->ctx->err);
}

/* Sockets from systemd: listening ones, or (Accept=yes) one connected client. */
static int listen_activated(struct serve *s) {
    const struct serve_args *a = s->a;
    int rc = 0;
    for (int i = 0; i < a->activated_n && rc == 0; i++) {
        int fd = a->activated_fd + i, listening = 0;
        socklen_t len = sizeof(listening);
        getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &len);
        rc = listening ? nbd_server_listen(s->server, fd, &s->ctx->err)
                       : nbd_server_attach(s->server, fd, &s->ctx->err);
    }
    strbuf_printf(&s->uris, "%d socket%s from systemd\n", a->activated_n,
                  a->activated_n == 1 ? "" : "s");
    return rc;
}

int serve_listen(struct serve *s) {
    if (s->a->activated_n)
        return listen_activated(s);
    if (s->a->vsock != VSOCK_NONE)
        return listen_vsock(s);
    return s->a->socket ? listen_unix(s) : listen_tcp(s);
}

void serve_remove_socket(struct serve *s) {
    struct stat st;
    if (s->socket_path && lstat(s->socket_path, &st) == 0 && st.st_dev == s->socket_stat.st_dev &&
        st.st_ino == s->socket_stat.st_ino)
        unlink(s->socket_path);
    free(s->socket_path);
    s->socket_path = NULL;
}
