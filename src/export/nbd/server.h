/* SPDX-License-Identifier: MIT */
/*
 * The NBD server: one node, any number of clients, one loop.
 *
 * Fixed newstyle, structured replies, base:allocation, qemu:allocation-depth, qemu:dirty-bitmap:
 * (protocols.md, "NBD").  A client that breaks
 * the protocol loses its connection; nobody else notices.
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

struct nbd_export {
    const char *name;        /* "" = default export; a client asking for "" gets the only export */
    const char *description; /* NULL none */
    struct node *node;       /* borrowed: outlives the server */
    bool read_only;
    bool allocation_depth; /* offer qemu:allocation-depth */
    /* Offered as qemu:dirty-bitmap:NAME, at most 62; borrowed like the node, and their bits loaded
     * (bitmap_load_co); not to be removed meanwhile. */
    struct bitmap *const *bitmaps;
    unsigned nbitmaps;
};

struct nbd_server_opts {
    struct nbd_export export;
    unsigned max_clients;         /* 0: 100 */
    int64_t handshake_timeout_ns; /* 0: 10 s */
    /*
     * Called on the loop's thread (must not suspend) when no client is left and at least one had
     * got through the handshake; those that only looked, or failed, do not count.
     */
    void (*on_idle)(void *arg);
    void *arg;
    bool verbose; /* connections and protocol errors are LOG_LV_INFO, else LOG_LV_DEBUG */
};

int nbd_server_new(struct loop *loop, const struct nbd_server_opts *opts, struct nbd_server **out,
                   struct err *e);
/* Adds a listening socket (non-blocking; taken over).  Accepts until stopped. */
int nbd_server_listen(struct nbd_server *s, int listen_fd, struct err *e);
/* Adds one already connected socket (taken over). */
int nbd_server_attach(struct nbd_server *s, int fd, struct err *e);
unsigned nbd_server_clients(const struct nbd_server *s);
/* Stops accepting, lets requests in flight finish (bounded by a few seconds for dead peers),
 * disconnects, waits. */
void nbd_server_stop_co(struct nbd_server *s);
void nbd_server_free(struct nbd_server *s); /* after stop */

/* ---- listening sockets ---- */
/* Unix socket at `path` (a stale socket file is replaced after a connect shows nobody there).
 * -EADDRINUSE. */
int nbd_listen_unix(const char *path, struct err *e);
/* host NULL: loopback only.  port 0: any free one, reported through *port. */
int nbd_listen_tcp(const char *host, uint16_t *port, struct err *e);
/*
 * Sockets handed over by systemd (LISTEN_PID, LISTEN_FDS): count, first one in *first_fd, the
 * others behind it; 0 when there are none for this process.  Made non-blocking and close-on-exec;
 * the environment variables are removed.  Call before forking.  -EINVAL for descriptors that are no
 * stream sockets.
 */
int nbd_listen_activated(int *first_fd, struct err *e);

#endif
