/* SPDX-License-Identifier: MIT */
/*
 * A disk as a virtio-blk device behind a vhost-user socket: the guest's own memory is where data
 * comes from and goes to, no copy and no system call for the bytes.
 *
 *      front end (QEMU) --unix socket--> session: features, memory, rings     (session.c)
 *      guest --ring, kick--> queue: take, check, engine, give back, --call--> (queue.c)
 *
 * One front end at a time; when it goes, the server listens for the next.  When the server goes and
 * comes back, a front end that kept the in-flight memory has every request done again (split
 * rings).
 *
 * Trust: everything in guest memory and on the socket may be hostile.  A ring that breaks a rule
 * stops, with a message; a message that breaks one ends the session.  Whoever may open the socket
 * may do to the disk what the server may: it is created for its owner alone.
 *
 * Context: one loop; _co may suspend.
 */
#ifndef STRATA_EXPORT_VHOST_SERVER_H
#define STRATA_EXPORT_VHOST_SERVER_H

#include <stdbool.h>
#include <stdint.h>

struct err;
struct loop;
struct node;
struct export;
struct vhost_server;

#define VHOST_QUEUES_MAX 64

struct vhost_server_opts {
    const char *name;  /* what export.h calls it; copied */
    struct node *node; /* borrowed; outlives the server */
    bool read_only;
    unsigned queues;     /* 1..VHOST_QUEUES_MAX */
    uint32_t block_size; /* logical: 512 or a power of two up to 64 KiB */
    bool connected;      /* the socket is one front end's already: the server ends with it */
    const char *serial;  /* what the guest reads as the disk's id, 20 bytes at most; NULL: empty */
    void (*on_idle)(void *arg); /* the front end has gone; in the loop's context */
    void *arg;
};

/* `fd`: a non-blocking unix socket, listening or (`connected`) with the front end behind it; taken
 * over. */
int vhost_server_new(struct loop *loop, int fd, const struct vhost_server_opts *o,
                     struct vhost_server **out, struct err *e);
struct export *vhost_server_export(struct vhost_server *s);
/* Ends the session after the requests in flight, and frees.  NULL is accepted. */
void vhost_server_stop_co(struct vhost_server *s);

#endif
