/* SPDX-License-Identifier: MIT */
/*
 * commit: what an overlay holds goes down into its backing.
 *
 * The overlay is only read.  Every range it holds keeps answering from the overlay, so what is
 * written below it does not change what it reads as; killed at any moment, the overlay over the
 * half-written base still reads right and the commit can be run again.  Only a reader of the bare
 * base sees the difference, and it is complete and synced before success is reported.
 */
#include <errno.h>
#include <inttypes.h>
#include "job/copy.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/node.h"

static int grow_base_co(struct node *overlay, struct node *base, struct err *e) {
    if (base->size >= overlay->size)
        return 0;
    int r = disk_resize_co(base, overlay->size, PREALLOC_OFF, e);
    if (r < 0)
        return err_prefix(e, "growing %s to %" PRIu64 " bytes", base->filename, overlay->size);
    return 0;
}

static int write_base_co(struct node *overlay, struct node *base, const struct copy_opts *opts,
                         struct err *e) {
    struct copy_opts o = *opts;
    o.top_only = true;
    o.target_is_zero = false;
    o.compress = false;
    if (!o.sparse_bytes)
        o.sparse_bytes = 4096;

    int r = grow_base_co(overlay, base, e);
    if (r == 0)
        r = copy_run_co(overlay, base, overlay->size, 0, &o, e);
    if (r == 0) {
        r = disk_flush_co(base);
        if (r < 0)
            err_errno(e, -r, "flushing %s", base->filename);
    }
    return r;
}

int commit_run_co(struct node *overlay, const struct copy_opts *opts, struct err *e) {
    struct node *base = overlay->backing;
    if (!base)
        return err_set(e, EINVAL, "%s has no backing file to commit to", overlay->filename);

    bool was_rw = node_is_rw(base);
    if (!was_rw) {
        int r = node_reopen_co(base, true, e);
        if (r < 0)
            return err_prefix(e, "opening %s for writing", base->filename);
    }
    int r = write_base_co(overlay, base, opts, e);
    if (!was_rw) {
        struct err back = ERR_INIT;
        int r2 = node_reopen_co(base, false, &back);
        if (r == 0 && r2 < 0) {
            r = r2;
            err_move(e, &back);
            err_prefix(e, "opening %s read-only again", base->filename);
        }
        err_clear(&back);
    }
    return r;
}
