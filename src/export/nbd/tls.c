/* SPDX-License-Identifier: MIT */
/*
 * TLS for NBD connections.
 *
 *      socket --recv--> in --pull--> GnuTLS --record_recv--> plain bytes
 *      socket <--send-- out <--push-- GnuTLS <--record_send-- plain bytes
 *
 * Invariants
 *  1. The library's callbacks only copy from `in` and to `out`: they never touch the socket, and
 *     push never fails for want of room (`out` grows; its size is bounded by OUT_FULL and one
 *     record, as nobody sends into an `out` that is full).
 *  2. No call of the library is left by a suspension, so receiver and sender tasks may share a
 *     session.
 *  3. Nothing that came before the handshake is taken for part of it: the caller has made sure that
 *     no plain byte follows STARTTLS.
 *
 * Fact sources: GnuTLS manual, "Asynchronous operation", "Setting up the transport layer", "PSK".
 */
#include "export/nbd/tls.h"

#include <dlfcn.h>
#include <errno.h>
#include <gnutls/gnutls.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include "base/cleanup.h"
#include "base/err.h"
#include "runtime/loop.h"

#define FUNCTIONS(X)                                                                               \
    X(global_init)                                                                                 \
    X(strerror)                                                                                    \
    X(error_is_fatal)                                                                              \
    X(certificate_allocate_credentials)                                                            \
    X(certificate_free_credentials)                                                                \
    X(certificate_set_x509_trust_file)                                                             \
    X(certificate_set_x509_crl_file)                                                               \
    X(certificate_set_x509_key_file2)                                                              \
    X(certificate_set_known_dh_params)                                                             \
    X(certificate_server_set_request)                                                              \
    X(certificate_verify_peers2)                                                                   \
    X(psk_allocate_server_credentials)                                                             \
    X(psk_free_server_credentials)                                                                 \
    X(psk_set_server_credentials_file)                                                             \
    X(psk_set_server_known_dh_params)                                                              \
    X(anon_allocate_server_credentials)                                                            \
    X(anon_free_server_credentials)                                                                \
    X(anon_set_server_known_dh_params)                                                             \
    X(init)                                                                                        \
    X(deinit)                                                                                      \
    X(set_default_priority)                                                                        \
    X(set_default_priority_append)                                                                 \
    X(priority_set_direct)                                                                         \
    X(credentials_set)                                                                             \
    X(transport_set_ptr)                                                                           \
    X(transport_set_push_function)                                                                 \
    X(transport_set_pull_function)                                                                 \
    X(transport_set_errno)                                                                         \
    X(handshake)                                                                                   \
    X(record_recv)                                                                                 \
    X(record_send)                                                                                 \
    X(bye)

static struct {
#define X(name) __typeof__(gnutls_##name) *name;
    FUNCTIONS(X)
#undef X
} lib;
static const char *missing; /* what was not found; NULL: all there */
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void load(void) {
    void *so = dlopen("libgnutls.so.30", RTLD_NOW | RTLD_LOCAL);
    if (!so) {
        missing = "libgnutls.so.30";
        return;
    }
#define X(name)                                                                                    \
    *(void **)&lib.name = dlsym(so, "gnutls_" #name);                                              \
    if (!lib.name)                                                                                 \
        missing = "gnutls_" #name;
    FUNCTIONS(X)
#undef X
    if (!missing && lib.global_init() < 0)
        missing = "a working start";
}

#define IN_BYTES (64u * 1024)
#define OUT_FULL (256u * 1024)
#define RECORD_BYTES (16u * 1024)

struct nbd_tls {
    enum tls_kind kind;
    bool verify_peer;
    char *priority;
    void *creds; /* of the kind */
};

struct tls_session {
    gnutls_session_t gnutls;
    int fd;
    uint8_t *in, *out;
    size_t in_pos, in_end;
    size_t out_pos, out_end, out_cap;
    bool eof, broken;
};

/* ---------------------------------------------------------------- credentials */

static int file_error(struct err *e, const char *path, int rc) {
    struct stat st;
    if (stat(path, &st) < 0)
        return err_errno(e, errno, "TLS: %s", path);
    return err_set(e, EINVAL, "TLS: %s: %s", path, lib.strerror(rc));
}

static int load_x509(struct nbd_tls *t, const char *dir, struct err *e) {
    gnutls_certificate_credentials_t c = NULL;
    AUTO_FREE char *ca = xasprintf("%s/ca-cert.pem", dir);
    AUTO_FREE char *crl = xasprintf("%s/ca-crl.pem", dir);
    AUTO_FREE char *cert = xasprintf("%s/server-cert.pem", dir);
    AUTO_FREE char *key = xasprintf("%s/server-key.pem", dir);
    int rc = lib.certificate_allocate_credentials(&c);
    if (rc < 0)
        return err_set(e, ENOMEM, "TLS: %s", lib.strerror(rc));
    t->creds = c;
    rc = lib.certificate_set_x509_trust_file(c, ca, GNUTLS_X509_FMT_PEM);
    if (rc <= 0)
        return file_error(e, ca, rc ? rc : GNUTLS_E_NO_CERTIFICATE_FOUND);
    rc = lib.certificate_set_x509_key_file2(c, cert, key, GNUTLS_X509_FMT_PEM, NULL, 0);
    if (rc < 0)
        return file_error(e, access(cert, R_OK) < 0 ? cert : key, rc);
    if (access(crl, F_OK) == 0) {
        rc = lib.certificate_set_x509_crl_file(c, crl, GNUTLS_X509_FMT_PEM);
        if (rc < 0)
            return file_error(e, crl, rc);
    }
    lib.certificate_set_known_dh_params(c, GNUTLS_SEC_PARAM_MEDIUM);
    return 0;
}

static int load_psk(struct nbd_tls *t, const char *path, struct err *e) {
    gnutls_psk_server_credentials_t c = NULL;
    struct stat st;
    if (stat(path, &st) < 0)
        return err_errno(e, errno, "TLS: %s", path);
    AUTO_FREE char *file = S_ISDIR(st.st_mode) ? xasprintf("%s/keys.psk", path) : xstrdup(path);
    if (access(file, R_OK) < 0)
        return err_errno(e, errno, "TLS: %s", file);
    int rc = lib.psk_allocate_server_credentials(&c);
    if (rc < 0)
        return err_set(e, ENOMEM, "TLS: %s", lib.strerror(rc));
    t->creds = c;
    rc = lib.psk_set_server_credentials_file(c, file);
    if (rc < 0)
        return file_error(e, file, rc);
    lib.psk_set_server_known_dh_params(c, GNUTLS_SEC_PARAM_MEDIUM);
    return 0;
}

static int load_anon(struct nbd_tls *t, struct err *e) {
    gnutls_anon_server_credentials_t c = NULL;
    int rc = lib.anon_allocate_server_credentials(&c);
    if (rc < 0)
        return err_set(e, ENOMEM, "TLS: %s", lib.strerror(rc));
    t->creds = c;
    lib.anon_set_server_known_dh_params(c, GNUTLS_SEC_PARAM_MEDIUM);
    return 0;
}

static int set_priority(const struct nbd_tls *t, gnutls_session_t g) {
    static const char *const more[] = {NULL, "+ECDHE-PSK:+DHE-PSK:+PSK", "+ANON-ECDH:+ANON-DH"};
    if (!t->priority && !more[t->kind])
        return lib.set_default_priority(g);
    if (!t->priority)
        return lib.set_default_priority_append(g, more[t->kind], NULL, 0);
    AUTO_FREE char *p =
        more[t->kind] ? xasprintf("%s:%s", t->priority, more[t->kind]) : xstrdup(t->priority);
    return lib.priority_set_direct(g, p, NULL);
}

/* The priority string is tried at once: a bad one is refused before anybody connects. */
static int check_priority(struct nbd_tls *t, struct err *e) {
    gnutls_session_t g;
    int rc = lib.init(&g, GNUTLS_SERVER);
    if (rc < 0)
        return err_set(e, ENOMEM, "TLS: %s", lib.strerror(rc));
    rc = set_priority(t, g);
    lib.deinit(g);
    return rc < 0 ? err_set(e, EINVAL, "TLS: priority '%s': %s", t->priority ? t->priority : "",
                            lib.strerror(rc))
                  : 0;
}

int nbd_tls_new(const struct nbd_tls_opts *o, struct nbd_tls **out, struct err *e) {
    pthread_once(&once, load);
    if (missing) {
        err_set(e, ENOTSUP, "TLS needs the library GnuTLS, of which '%s' was not found", missing);
        err_hint(e, "install the package libgnutls30");
        return -ENOTSUP;
    }
    struct nbd_tls *t = xcalloc(1, sizeof(*t));
    t->kind = o->kind;
    t->verify_peer = o->verify_peer;
    t->priority = o->priority ? xstrdup(o->priority) : NULL;
    int r = o->kind == TLS_X509  ? load_x509(t, o->path, e)
            : o->kind == TLS_PSK ? load_psk(t, o->path, e)
                                 : load_anon(t, e);
    if (r == 0)
        r = check_priority(t, e);
    if (r < 0) {
        nbd_tls_free(t);
        return r;
    }
    *out = t;
    return 0;
}

void nbd_tls_free(struct nbd_tls *t) {
    if (!t)
        return;
    if (t->creds && t->kind == TLS_X509)
        lib.certificate_free_credentials(t->creds);
    else if (t->creds && t->kind == TLS_PSK)
        lib.psk_free_server_credentials(t->creds);
    else if (t->creds)
        lib.anon_free_server_credentials(t->creds);
    free(t->priority);
    free(t);
}

/* ---------------------------------------------------------------- the two buffers */

static ssize_t pull(gnutls_transport_ptr_t p, void *buf, size_t len) {
    struct tls_session *s = p;
    size_t have = s->in_end - s->in_pos;
    if (!have && s->eof)
        return 0;
    if (!have) {
        lib.transport_set_errno(s->gnutls, EAGAIN);
        return -1;
    }
    if (have > len)
        have = len;
    memcpy(buf, s->in + s->in_pos, have);
    s->in_pos += have;
    return (ssize_t)have;
}

static ssize_t push(gnutls_transport_ptr_t p, const void *buf, size_t len) {
    struct tls_session *s = p;
    if (s->out_end + len > s->out_cap) {
        size_t cap = (s->out_end + len) * 2;
        uint8_t *grown = realloc(s->out, cap);
        if (!grown) {
            lib.transport_set_errno(s->gnutls, ENOMEM);
            return -1;
        }
        s->out = grown;
        s->out_cap = cap;
    }
    memcpy(s->out + s->out_end, buf, len);
    s->out_end += len;
    return (ssize_t)len;
}

static ssize_t filled(struct tls_session *s, ssize_t n) {
    if (n == 0)
        s->eof = true;
    if (n > 0)
        s->in_end += (size_t)n;
    return n;
}

static size_t make_room(struct tls_session *s) {
    memmove(s->in, s->in + s->in_pos, s->in_end - s->in_pos);
    s->in_end -= s->in_pos;
    s->in_pos = 0;
    return IN_BYTES - s->in_end;
}

ssize_t tls_fill_now(struct tls_session *s) {
    size_t room = make_room(s);
    ssize_t n;
    do
        n = recv(s->fd, s->in + s->in_end, room, MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : filled(s, n);
}

ssize_t tls_fill_co(struct tls_session *s) {
    size_t room = make_room(s);
    return filled(s, loop_recv_co(s->fd, s->in + s->in_end, room));
}

int tls_flush(struct tls_session *s) {
    while (s->out_pos < s->out_end) {
        ssize_t n =
            send(s->fd, s->out + s->out_pos, s->out_end - s->out_pos, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        s->out_pos += (size_t)n;
    }
    s->out_pos = s->out_end = 0;
    return 0;
}

/* ---------------------------------------------------------------- plain bytes */

ssize_t tls_take(struct tls_session *s, void *buf, size_t len) {
    if (s->broken)
        return -EPROTO;
    for (;;) {
        ssize_t n = lib.record_recv(s->gnutls, buf, len);
        if (n >= 0)
            return n;
        if (n == GNUTLS_E_AGAIN)
            return -EAGAIN;
        if (n == GNUTLS_E_PREMATURE_TERMINATION)
            return 0;
        if (n == GNUTLS_E_INTERRUPTED)
            continue;
        /* Renegotiation, which nobody needs, is refused like any damage. */
        s->broken = true;
        return -EPROTO;
    }
}

ssize_t tls_send(struct tls_session *s, const struct iovec *iov, int n) {
    size_t taken = 0;
    if (s->broken)
        return -EPROTO;
    for (int i = 0; i < n; i++) {
        for (size_t at = 0; at < iov[i].iov_len;) {
            if (s->out_end - s->out_pos >= OUT_FULL) {
                int rc = tls_flush(s);
                if (rc < 0)
                    return taken && rc == -EAGAIN ? (ssize_t)taken : rc;
            }
            size_t len = iov[i].iov_len - at;
            if (len > RECORD_BYTES)
                len = RECORD_BYTES;
            ssize_t k = lib.record_send(s->gnutls, (const uint8_t *)iov[i].iov_base + at, len);
            if (k == GNUTLS_E_INTERRUPTED || k == GNUTLS_E_AGAIN)
                continue;
            if (k <= 0) {
                s->broken = true;
                return -EPROTO;
            }
            at += (size_t)k;
            taken += (size_t)k;
        }
    }
    int rc = tls_flush(s);
    return rc < 0 && rc != -EAGAIN ? rc : (ssize_t)taken;
}

/* ---------------------------------------------------------------- sessions */

static int wait_co(struct tls_session *s, short events, int64_t deadline_ns) {
    int64_t left = deadline_ns == INT64_MAX ? -1 : deadline_ns - loop_now_ns(loop_self());
    if (left != -1 && left <= 0)
        return -ETIMEDOUT;
    int ev = loop_poll_co(s->fd, events, left);
    return ev == 0 ? -ETIMEDOUT : ev < 0 ? ev : 0;
}

static int flush_co(struct tls_session *s, int64_t deadline_ns) {
    int rc = tls_flush(s);
    while (rc == -EAGAIN) {
        rc = wait_co(s, POLLOUT, deadline_ns);
        if (rc == 0)
            rc = tls_flush(s);
    }
    return rc;
}

static int handshake_co(struct tls_session *s, int64_t deadline_ns, const char **why) {
    for (;;) {
        int rc = lib.handshake(s->gnutls);
        int sent = flush_co(s, deadline_ns);
        if (rc == 0 || sent < 0)
            return sent;
        if (rc != GNUTLS_E_AGAIN && lib.error_is_fatal(rc)) {
            *why = lib.strerror(rc);
            return -EPROTO;
        }
        if (rc != GNUTLS_E_AGAIN)
            continue;
        ssize_t n = tls_fill_now(s);
        if (n == 0)
            return -ECONNRESET;
        if (n == -EAGAIN)
            n = wait_co(s, POLLIN, deadline_ns);
        if (n < 0)
            return (int)n;
    }
}

static int session_init(struct nbd_tls *t, struct tls_session *s) {
    static const gnutls_credentials_type_t kinds[] = {GNUTLS_CRD_CERTIFICATE, GNUTLS_CRD_PSK,
                                                      GNUTLS_CRD_ANON};
    s->in = malloc(IN_BYTES);
    if (!s->in || lib.init(&s->gnutls, GNUTLS_SERVER | GNUTLS_NONBLOCK | GNUTLS_NO_TICKETS) < 0)
        return -ENOMEM;
    if (set_priority(t, s->gnutls) < 0 ||
        lib.credentials_set(s->gnutls, kinds[t->kind], t->creds) < 0)
        return -ENOMEM;
    if (t->kind == TLS_X509)
        lib.certificate_server_set_request(s->gnutls, t->verify_peer ? GNUTLS_CERT_REQUIRE
                                                                     : GNUTLS_CERT_IGNORE);
    lib.transport_set_ptr(s->gnutls, s);
    lib.transport_set_push_function(s->gnutls, push);
    lib.transport_set_pull_function(s->gnutls, pull);
    return 0;
}

int tls_session_start_co(struct nbd_tls *t, int fd, int64_t deadline_ns, struct tls_session **out,
                         const char **why) {
    struct tls_session *s = calloc(1, sizeof(*s));
    if (!s)
        return -ENOMEM;
    s->fd = fd;
    int rc = session_init(t, s);
    if (rc == 0)
        rc = handshake_co(s, deadline_ns, why);
    if (rc == 0 && t->kind == TLS_X509 && t->verify_peer) {
        unsigned status = 0;
        if (lib.certificate_verify_peers2(s->gnutls, &status) < 0 || status) {
            *why = "the client's certificate is not one of ours";
            rc = -EPROTO;
        }
    }
    if (rc < 0) {
        s->broken = true;
        tls_session_free(s);
        return rc;
    }
    *out = s;
    return 0;
}

void tls_session_free(struct tls_session *s) {
    if (!s)
        return;
    if (s->gnutls) {
        if (!s->broken && lib.bye(s->gnutls, GNUTLS_SHUT_WR) == 0)
            tls_flush(s);
        lib.deinit(s->gnutls);
    }
    free(s->in);
    free(s->out);
    free(s);
}
