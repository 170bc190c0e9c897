/* SPDX-License-Identifier: MIT */
/*
 * The NBD server: any number of exports, any number of clients, one loop.
 *
 * Fixed newstyle, TLS, structured replies and extended headers, base:allocation,
 * qemu:allocation-depth, qemu:dirty-bitmap: (protocols.md, "NBD").  A client that breaks the
 * protocol loses its connection; nobody else notices.
 */
#ifndef STRATA_EXPORT_NBD_SERVER_H
#define STRATA_EXPORT_NBD_SERVER_H

#include <stdbool.h>
#include <stdint.h>

struct loop;
struct node;
struct bitmap;
struct err;
struct nbd_server;

struct nbd_tls;
struct export;

struct nbd_export_opts {
    const char *name;        /* "" or NULL: the export without a name */
    const char *description; /* NULL none */
    struct node *node;       /* borrowed: outlives the export */
    bool read_only;
    bool allocation_depth; /* offer qemu:allocation-depth */
    /* Offered as qemu:dirty-bitmap:NAME, at most 62; borrowed like the node, and their bits loaded
     * (bitmap_load_co); they cannot be removed meanwhile. */
    struct bitmap *const *bitmaps;
    unsigned nbitmaps;
    unsigned share; /* clients that may use it at once; more are refused.  0: no limit of its own */
    /* A second, of all clients together; 0: no limit.  `*_burst` 0: a tenth of a second's worth. */
    uint64_t bytes, bytes_burst, requests, requests_burst;
};

struct nbd_server_opts {
    unsigned max_clients;         /* connections at once; others wait to be accepted.  0: 100 */
    int64_t handshake_timeout_ns; /* 0: 10 s; negative: none */
    int64_t idle_timeout_ns;      /* of clients that neither ask nor take answers; 0: none */
    struct nbd_tls *tls;          /* tls.h; taken over; NULL: STARTTLS is refused */
    bool tls_required;            /* nothing is said before STARTTLS */
    /*
     * Called on the loop's thread (must not suspend) when no client is left and at least one had
     * got through the handshake; those that only looked, or failed, do not count.
     */
    void (*on_idle)(void *arg);
    void *arg;
    /* One line, without newline, for each client that comes and goes; may be NULL. */
    void (*access)(void *arg, const char *line);
    bool verbose; /* connections and protocol errors are LOG_LV_INFO, else LOG_LV_DEBUG */
};

/* A server without exports.  Takes over opts->tls, on failure too. */
int nbd_server_new(struct loop *loop, const struct nbd_server_opts *opts, struct nbd_server **out,
                   struct err *e);
/*
 * One more export; clients see it from now on.  The first one, while it is there, is also what a
 * client gets that asks for none.  *out (may be NULL) belongs to the server.  -EEXIST, -EINVAL.
 */
int nbd_server_add(struct nbd_server *s, const struct nbd_export_opts *opts, struct export **out,
                   struct err *e);
/* Clients that ask for no name get this one; -ENOENT: no such export. */
int nbd_server_set_default(struct nbd_server *s, const char *name, struct err *e);
/* Adds a listening socket (non-blocking; taken over).  Accepts until stopped. */
int nbd_server_listen(struct nbd_server *s, int listen_fd, struct err *e);
/* Adds one already connected socket (taken over). */
int nbd_server_attach(struct nbd_server *s, int fd, struct err *e);
unsigned nbd_server_clients(const struct nbd_server *s);
/* Stops accepting, lets requests in flight finish (bounded by a few seconds for dead peers),
 * disconnects, waits. */
void nbd_server_stop_co(struct nbd_server *s);
void nbd_server_free(struct nbd_server *s); /* after stop; the exports go with it */

/* ---- listening sockets ---- */
/*
 * Unix socket at `path` (a stale socket file is replaced after a connect shows nobody there);
 * "@name" is an abstract one, which has no file.  -EADDRINUSE.
 */
int nbd_listen_unix(const char *path, struct err *e);
/* host NULL: loopback only.  port 0: any free one, reported through *port. */
int nbd_listen_tcp(const char *host, uint16_t *port, struct err *e);
/* AF_VSOCK, for guests of this host: any of the host's addresses.  port 0: as above. */
int nbd_listen_vsock(uint32_t *port, struct err *e);
/*
 * Sockets handed over by systemd (LISTEN_PID, LISTEN_FDS): count, first one in *first_fd, the
 * others behind it; 0 when there are none for this process.  Made non-blocking and close-on-exec;
 * the environment variables are removed.  Call before forking.  -EINVAL for descriptors that are no
 * stream sockets.
 */
int nbd_listen_activated(int *first_fd, struct err *e);

#endif
