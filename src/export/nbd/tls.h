/* SPDX-License-Identifier: MIT */
/*
 * TLS for NBD connections, by GnuTLS, which is loaded when the first credentials are named.
 *
 * A session is a pure transformation between two buffers, plain bytes on one side and the socket's
 * on the other; so the library never waits and the loop never stands still.  All waiting is the
 * caller's.
 */
#ifndef STRATA_EXPORT_NBD_TLS_H
#define STRATA_EXPORT_NBD_TLS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

struct err;
struct nbd_tls;
struct tls_session;

enum tls_kind { TLS_X509, TLS_PSK, TLS_ANON };

struct nbd_tls_opts {
    enum tls_kind kind;
    /*
     * X509: a folder with ca-cert.pem, server-cert.pem, server-key.pem and perhaps ca-crl.pem.
     * PSK: a file of lines "user:hex key", or a folder with such a keys.psk.  ANON: unused.
     */
    const char *path;
    bool verify_peer;     /* X509: clients need a certificate that the CA has signed */
    const char *priority; /* GnuTLS's priority string; NULL: its default */
};

/* Reads everything now.  -ENOENT and others name the file; -EINVAL; -ENOTSUP without GnuTLS. */
int nbd_tls_new(const struct nbd_tls_opts *opts, struct nbd_tls **out, struct err *e);
void nbd_tls_free(struct nbd_tls *t); /* NULL is fine */

/*
 * The server's half of the handshake on a non-blocking socket, until deadline_ns (INT64_MAX: none).
 * On failure *why is a text of the library.  -ETIMEDOUT, -EPROTO, -ECONNRESET, -ENOMEM.
 */
int tls_session_start_co(struct nbd_tls *t, int fd, int64_t deadline_ns, struct tls_session **out,
                         const char **why);
/* Says goodbye as far as the socket takes it.  NULL is fine. */
void tls_session_free(struct tls_session *s);

/* Plain bytes that have come; 0 at the end; -EAGAIN: read the socket first; -errno. */
ssize_t tls_take(struct tls_session *s, void *buf, size_t len);
/* Reads the socket once: as recv(), by MSG_DONTWAIT or suspending. */
ssize_t tls_fill_now(struct tls_session *s);
ssize_t tls_fill_co(struct tls_session *s);
/* Bytes of the list that are on their way (maybe fewer than all); -EAGAIN: the socket is full. */
ssize_t tls_send(struct tls_session *s, const struct iovec *iov, int n);
/* 0 once the socket has everything; -EAGAIN, -errno. */
int tls_flush(struct tls_session *s);

#endif
