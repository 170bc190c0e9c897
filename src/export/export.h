/* SPDX-License-Identifier: MIT */
/*
 * An export: one disk in the hands of clients, whatever they speak.
 *
 * Each kind of export (NBD, vhost-user-blk, FUSE) embeds struct export in its own object and fills
 * in the operations; who manages disks (control/) knows only this.  A new kind is a folder beside
 * nbd/ with one const struct export_ops.
 *
 * Context: everything belongs to the thread of the node's loop; _co may suspend.
 */
#ifndef STRATA_EXPORT_EXPORT_H
#define STRATA_EXPORT_EXPORT_H

#include <stdbool.h>
#include <jansson.h>

struct node;
struct err;
struct export;

struct export_ops {
    const char *type; /* "nbd" */
    /* Clients that use it now. */
    unsigned (*users)(const struct export *x);
    /*
     * Holds new requests back and waits until none is inside the engine; nests.  Clients stay
     * connected and notice nothing but the pause.
     */
    void (*pause_co)(struct export *x);
    void (*resume)(struct export *x);
    /* Type, users and the kind's own figures; new reference. */
    json_t *(*describe)(const struct export *x);
    /*
     * Takes it away and frees it: -EBUSY while clients use it, unless `hard`, which disconnects
     * them after what is in flight.
     */
    int (*remove_co)(struct export *x, bool hard, struct err *e);
};

struct export {
    const struct export_ops *ops;
    char *name; /* owned */
    /* Borrowed; outlives the export.  Exchanged only while paused, for one of at least the size. */
    struct node *node;
    bool read_only;
};

#endif
