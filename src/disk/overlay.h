/* SPDX-License-Identifier: MIT */
/*
 * Temporary snapshots: a throw-away qcow2 overlay in an unnamed file over any node.
 *
 * The scratch file never has a name (O_TMPFILE, else created and unlinked at once), so the space is
 * returned on any exit, kill -9 included.  While it is thrown away nothing is flushed.  Its folder:
 * `dir`, else $TMPDIR, else /var/tmp.  It may lie in memory instead.
 */
#ifndef STRATA_DISK_OVERLAY_H
#define STRATA_DISK_OVERLAY_H

#include <stdbool.h>
#include <stdint.h>

struct node;
struct err;

struct overlay_opts {
    /* A folder, or "memory:SIZE" for memory of this process.  NULL: $TMPDIR, else /var/tmp */
    const char *scratch_dir;
    uint64_t scratch_size; /* cap in bytes; 0: none.  Beyond it writes fail with -ENOSPC */
};

/* Takes over the caller's reference to `base` on success.  The result is a read-write node. */
int overlay_create_co(struct node *base, const struct overlay_opts *opts, struct node **out,
                      struct err *e);
/*
 * Saves the overlay as a proper qcow2 file `name` whose backing file is the base's own name:
 * flushed, copied when the scratch folder is on another file system, linked in atomically.  The
 * overlay stays usable.  -EEXIST unless `replace`.
 */
int overlay_keep_co(struct node *overlay, const char *name, bool replace, struct err *e);
/*
 * The same, as a copy of this moment: the overlay goes on in its scratch file and never writes to
 * `name`.  Requests wait while it is made.
 */
int overlay_save_co(struct node *overlay, const char *name, bool replace, struct err *e);
/* What `opts` caps the scratch to; 0: nothing.  -EINVAL for a "memory:" without a size. */
int overlay_limit(const struct overlay_opts *opts, uint64_t *limit, struct err *e);
/* Host bytes that the overlay uses now. */
int64_t overlay_allocated(struct node *overlay);

#endif
