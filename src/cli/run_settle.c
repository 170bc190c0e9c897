/* SPDX-License-Identifier: MIT */
/*
 * strata run: what stays when the guest has ended.
 *
 * Invariants
 *  1. A commit happens only after the guest ended by itself with status 0: what a killed or crashed
 *     guest left half-written goes nowhere near the base unasked.  --keep saves it in any case.
 *  2. When a commit fails, the overlay is saved before it is closed (beside the base, or as the
 * file of --stateless): the guest's work is never lost to a full disk.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "base/bytes.h"
#include "base/size.h"
#include "cli/run.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/overlay.h"
#include "job/fat_commit.h"

/*
 * Its file holds what the guest wrote, whole.  That file is the overlay itself, unless it could not
 * be linked or a commit or drop meanwhile put another overlay in its place.
 */
static int finish_overlay_co(struct run_disk *d, struct err *e) {
    if (!strcmp(d->d.node->filename, d->overlay)) {
        int ret = disk_flush_co(d->d.node);
        return ret < 0 ? err_errno(e, -ret, "%s", d->overlay) : 0;
    }
    return overlay_keep_co(d->d.node, d->overlay, true, e);
}

/* Saves what could not be committed; says where it is. */
static void rescue_co(struct run *r, struct run_disk *d) {
    struct err e AUTO_ERR = ERR_INIT;
    if (d->mode == RUN_STATELESS && finish_overlay_co(d, &e) == 0) {
        janitor_release(&r->a->janitor, &d->overlay_file);
        cli_print_warning(r->ctx, "the guest's changes are saved in %s", d->overlay);
        return;
    }
    err_clear(&e);
    AUTO_FREE char *name = xasprintf("%s.uncommitted.qcow2", d->name);
    if (overlay_keep_co(d->d.node, name, false, &e) < 0) {
        err_prefix(&e, "the guest's changes could not be saved either");
        cli_print_error(r->ctx, &e);
    } else {
        cli_print_warning(r->ctx, "the guest's changes are saved in %s", name);
    }
}

/* What the guest wrote and did not give back: the data in the overlay itself, whole clusters. */
static uint64_t overlay_data_co(struct node *overlay) {
    uint64_t sum = 0;
    struct status st;
    for (uint64_t at = 0; at < overlay->size; at += st.length) {
        if (disk_status_co(overlay, at, overlay->size - at, STATUS_TOP_ONLY, &st) < 0)
            break; /* only a figure for a message */
        if (st.present && st.data)
            sum += st.length;
    }
    return sum;
}

/* `keep`: the file for the changes; NULL: none. */
static int settle_snapshot_co(struct run *r, struct run_disk *d, const char *keep, int status,
                              struct err *e) {
    const struct run_args *a = r->a;
    bool named = keep && d->mode == RUN_STATELESS;
    char size[32];
    AUTO_FREE char *name = cli_safe(d->name);

    size_human(overlay_data_co(d->d.node), size);
    if (keep && !(named && d->d.journal)) {
        int ret = named ? finish_overlay_co(d, e) : control_disk_finish_keep_co(&d->d, keep, e);
        if (ret < 0)
            return err_prefix(e, "keeping the changes of %s", name);
        if (named)
            janitor_release(&r->a->janitor, &d->overlay_file);
        if (!a->quiet)
            fprintf(stderr, "strata: run: kept %s of changes in %s; %s is unchanged\n", size, keep,
                    name);
        return 0;
    }
    if (a->commit && status == 0) {
        int ret = control_disk_finish_commit_co(&d->d, e);
        if (ret < 0) {
            ret = err_prefix(e, "committing to %s", name);
            if (!fat_commit_is_for(d->d.base)) /* which saves the disk itself */
                rescue_co(r, d);
            return ret;
        }
        if (!a->quiet)
            fprintf(stderr, "strata: run: wrote %s of changes into %s\n", size, name);
        return 0;
    }
    if (d->d.journal) {
        err_set(e, EIO, "a commit to %s did not end", name);
        err_hint(e, "strata commit %s completes it", d->d.journal);
        return -EIO;
    }
    if (a->commit)
        cli_print_warning(r->ctx, "the guest ended with status %d: nothing was committed", status);
    if (!a->quiet)
        fprintf(stderr, "strata: run: threw away %s that the guest wrote; %s is unchanged\n", size,
                name);
    return 0;
}

int run_settle_co(struct run *r, int status) {
    const struct run_args *a = r->a;
    int result = status;
    size_t nkeep = 0;
    for (unsigned i = 0; i < r->ndisks; i++) {
        struct run_disk *d = &r->disks[i];
        struct err e AUTO_ERR = ERR_INIT;
        int ret = 0;
        if (d->mode == RUN_RO)
            continue;
        if (run_temporary(d)) {
            const char *keep = NULL;
            if (d->mode == RUN_SNAPSHOT && a->keep.n)
                keep = a->keep.v[nkeep++];
            else if (d->mode == RUN_STATELESS && a->keep_overlay)
                keep = d->overlay;
            ret = settle_snapshot_co(r, d, keep, status, &e);
        } else {
            ret = disk_flush_co(d->d.node);
            if (ret < 0)
                err_errno(&e, -ret, "%s: cannot flush what the guest wrote", d->name);
        }
        if (ret < 0) {
            cli_print_error(r->ctx, &e);
            result = result ? result : 1;
        }
    }
    return result;
}
