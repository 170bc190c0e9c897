/* SPDX-License-Identifier: MIT */
/*
 * A disk that is being served, and what can be done with it meanwhile: `serve` and `run` keep one
 * for each image, the control socket works on them.
 *
 * With a temporary snapshot:     clients - export - top overlay [- layer being committed] - base
 *
 * Context: tasks of the node's loop; one change of a disk at a time (the caller's lock).
 */
#ifndef STRATA_CONTROL_DISK_H
#define STRATA_CONTROL_DISK_H

#include <stdbool.h>
#include <jansson.h>
#include "disk/overlay.h"

struct err;
struct export;
struct node;

struct control_disk {
    char *name;                  /* as clients know it; owned */
    struct node *node;           /* the top; one reference is ours */
    struct node *base;           /* below all overlays, held by them; NULL without a snapshot */
    struct export *export;       /* NULL: nobody is served (any more) */
    struct overlay_opts scratch; /* texts borrowed */
    const char *no_commit;       /* why the base must stay as it is; NULL: it need not */
    const char *no_keep;         /* why no file can name the base; NULL: one can */
    char *journal;               /* a commit has begun and not ended: the file that completes it */
};

/* Puts a temporary snapshot over d->node. */
int control_disk_snapshot_co(struct control_disk *d, struct err *e);

/*
 * Writes what has been written so far into the base, and goes on with an empty overlay; clients
 * work on meanwhile, held back only for two exchanges of nodes.  Safe against a crash: see disk.c.
 * Fails as a whole or leaves d->journal set; then clients still read right, and calling it again
 * completes it.
 */
int control_disk_commit_co(struct control_disk *d, struct err *e);
/* A copy of what has been written so far, as a new qcow2 file over the base; clients wait. */
int control_disk_keep_co(struct control_disk *d, const char *file, bool replace, struct err *e);
/* Forgets what has been written so far: clients read the base again. */
int control_disk_drop_co(struct control_disk *d, struct err *e);

/* The same at the end, when nobody is served any more: no new overlay is made. */
int control_disk_finish_commit_co(struct control_disk *d, struct err *e);
int control_disk_finish_keep_co(struct control_disk *d, const char *file, struct err *e);

/* Another size of the disk itself, or of its overlay; new clients see it. */
int control_disk_resize_co(struct control_disk *d, uint64_t size, struct err *e);

/* New reference. */
json_t *control_disk_status(const struct control_disk *d);
/* Lets go of the node and frees the name and journal's name, not d. */
void control_disk_close_co(struct control_disk *d);

#endif
