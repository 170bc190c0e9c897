/* SPDX-License-Identifier: MIT */
/*
 * commit: what an overlay holds goes down into its backing.
 *
 * The overlay is only read.  Every range it holds keeps answering from the overlay, so what is
 * written below it does not change what it reads as; killed at any moment, the overlay over the
 * half-written base still reads right and the commit can be run again.  Only a reader of the bare
 * base sees the difference, and it is complete and synced before success is reported.
 *
 * Growing the base has a trap.  When the base has a backing file itself that reaches behind the
 * base's old end, the new part of the base would show that file's content, where the overlay's
 * holes have read as zeros so far.  So those holes are made zeros in the overlay first, which
 * changes nothing that it reads as, and made stable; then the base may grow.
 */
#include <errno.h>
#include <inttypes.h>
#include "job/copy.h"
#include "base/ck.h"
#include "base/err.h"
#include "base/plant.h"
#include "disk/io.h"
#include "disk/node.h"
#include "job/fat_commit.h"

/*
 * The first run in [*pos, end) that no layer holds, in *pos and *length, which is 0 for none.  The
 * range lies behind the base's end, so it is the layers above that are asked.
 */
static int next_hole_co(struct node *overlay, uint64_t end, uint64_t *pos, uint64_t *length) {
    for (*length = 0; *pos < end; *pos += *length) {
        struct status st;
        int r = disk_status_co(overlay, *pos, end - *pos, 0, &st);
        if (r < 0)
            return r;
        *length = st.length;
        if (!st.present)
            return 0;
    }
    *length = 0;
    return 0;
}

static int fill_holes_co(struct node *overlay, uint64_t pos, uint64_t end) {
    uint64_t at = pos, length;
    int r = next_hole_co(overlay, end, &at, &length);
    while (r == 0 && length) {
        /* Writing one zero copies the whole unit that the base's old end cuts. */
        r = is_aligned(at, overlay->granularity)
                ? disk_zero_co(overlay, at, length, ZERO_NO_FALLBACK)
                : disk_pwrite_co(overlay, at, "", 1);
        if (r == 0) {
            uint64_t before = at;
            r = next_hole_co(overlay, end, &at, &length);
            if (r == 0 && length && at == before)
                r = -ENOTSUP; /* still a hole: this format has no zeros of its own */
        }
    }
    return r < 0 ? r : disk_flush_co(overlay);
}

/* See the design note: nothing from below may shine through the part that the base grows by. */
static int shield_growth_co(struct node *overlay, struct node *base, struct err *e) {
    uint64_t deepest = 0;
    for (struct node *l = base->backing; l; l = l->backing)
        deepest = max_u64(deepest, l->size);
    uint64_t end = min_u64(deepest, overlay->size);
    if (end <= base->size)
        return 0;
    end = min_u64(align_up(end, overlay->granularity), overlay->size);
    int r = node_is_rw(overlay) ? fill_holes_co(overlay, base->size, end) : -EROFS;
    if (r < 0)
        return err_errno(e, -r,
                         "%s would grow from %" PRIu64 " to %" PRIu64
                         " bytes and show its backing file there; keeping zeros in %s",
                         base->filename, base->size, overlay->size, overlay->filename);
    return 0;
}

static int grow_base_co(struct node *overlay, struct node *base, struct err *e) {
    if (base->size >= overlay->size)
        return 0;
    int r = shield_growth_co(overlay, base, e);
    if (r < 0)
        return r;
    r = disk_resize_co(base, overlay->size, PREALLOC_OFF, e);
    if (r < 0)
        return err_prefix(e, "growing %s to %" PRIu64 " bytes", base->filename, overlay->size);
    return 0;
}

/* How many layers lie above `base`; 0: it is not below `overlay`. */
static unsigned layers_above(const struct node *overlay, const struct node *base) {
    unsigned n = 0;
    for (const struct node *l = overlay; l; l = l->backing, n++)
        if (l == base)
            return n;
    return 0;
}

static int write_base_co(struct node *overlay, struct node *base, const struct copy_opts *opts,
                         struct err *e) {
    struct copy_opts o = *opts;
    unsigned layers = layers_above(overlay, base);
    o.top_only = layers == 1; /* cheaper: nobody is asked below the overlay */
    o.layers = layers == 1 ? 0 : layers;
    o.target_is_zero = false;
    o.compress = false;
    o.stable = true;
    if (!o.sparse_bytes)
        o.sparse_bytes = 4096;

    int r = grow_base_co(overlay, base, e);
    if (r == 0)
        r = copy_run_co(overlay, base, overlay->size, 0, &o, e);
    if (r == 0 && !PLANTED(COMMIT_NOT_FLUSHED)) {
        r = disk_flush_co(base);
        if (r < 0)
            err_errno(e, -r, "flushing %s", base->filename);
    }
    return r;
}

int commit_run_co(struct node *overlay, const struct copy_opts *opts, struct err *e) {
    if (!overlay->backing)
        return err_set(e, EINVAL, "%s has no backing file to commit to", overlay->filename);
    return commit_into_co(overlay, overlay->backing, opts, e);
}

int commit_into_co(struct node *overlay, struct node *base, const struct copy_opts *opts,
                   struct err *e) {
    if (!layers_above(overlay, base))
        return err_set(e, EINVAL, "%s is not below %s", base->filename, overlay->filename);

    if (fat_commit_is_for(base)) {
        err_set(e, ENOTSUP, "%s: a directory takes changes only at the end of what wrote them",
                base->filename);
        err_hint(e, "serve, mount or run with --snapshot --commit-on-exit");
        return -ENOTSUP;
    }
    bool was_rw = node_is_rw(base);
    if (!was_rw) {
        int r = node_reopen_co(base, true, e);
        if (r < 0)
            return err_prefix(e, "opening %s for writing", base->filename);
    }
    int r = write_base_co(overlay, base, opts, e);
    if (!was_rw && !PLANTED(COMMIT_NOT_FLUSHED)) { /* which flushes, too */
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

int commit_empty_co(struct node *overlay, struct err *e) {
    if (!overlay->drv->format->empty_co)
        return err_set(e, ENOTSUP, "format '%s' cannot be emptied", overlay->drv->name);
    node_quiesce_co(overlay);
    int r = overlay->drv->format->empty_co(overlay, e);
    overlay->map_generation++;
    node_resume(overlay);
    if (r == 0) {
        r = disk_flush_co(overlay);
        if (r < 0)
            err_errno(e, -r, "flushing");
    }
    return r < 0 ? err_prefix(e, "emptying %s", overlay->filename) : 0;
}
