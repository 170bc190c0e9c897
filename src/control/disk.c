/* SPDX-License-Identifier: MIT */
/*
 * Commit, keep and drop on a disk that clients are using.
 *
 * Commit.  Half a commit is a base that is neither old nor new, and the overlay that would complete
 * it vanishes with the process.  So:
 *
 *   1. Clients are held back (export paused).  The present overlay, A, gets a name beside the base,
 *      "BASE.commit-PID.qcow2": a whole image over the base, synced.  That is the journal.  Where
 *      the scratch file can be linked there it costs little, else it is copied.
 *   2. A new overlay B over A is shown to the clients, who go on.  Nobody writes to A any more;
 * what is written from now on is not committed.
 *   3. A's content is written into the base, which is flushed.  Clients read through B, A, base:
 *      all that changes below is covered by A.
 *   4. B is put on the base directly (paused again), the journal is removed, A goes.
 *
 * A crash before 1 is done leaves the base untouched; between 1 and 4 the journal over the
 * half-written base reads as the disk did at 1, and `strata commit JOURNAL` completes it; after 3
 * the base is whole.  An error in 1 changes nothing.  An error in 3 (disk full) leaves things as a
 * crash does, except that clients go on; the next commit begins at 3.
 *
 * The scratch limit holds for each overlay: while a commit runs there are two.
 */
#include "control/disk.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/cleanup.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "export/export.h"
#include "job/copy.h"
#include "job/fat_commit.h"

static void pause_co(struct control_disk *d) {
    if (d->export)
        d->export->ops->pause_co(d->export);
}

static void resume(struct control_disk *d) {
    if (d->export)
        d->export->ops->resume(d->export);
}

int control_disk_snapshot_co(struct control_disk *d, struct err *e) {
    struct node *top;
    int r = overlay_create_co(d->node, &d->scratch, &top, e);
    if (r < 0)
        return r;
    d->base = d->node;
    d->node = top;
    return 0;
}

static int check_snapshot(const struct control_disk *d, struct err *e) {
    return d->base ? 0
                   : err_set(e, EINVAL, "disk '%s' has no temporary snapshot: clients write to it",
                             d->name);
}

static int check_no_journal(const struct control_disk *d, struct err *e) {
    if (!d->journal)
        return 0;
    err_set(e, EBUSY, "a commit of disk '%s' has begun and not ended", d->name);
    err_hint(e, "commit again; it completes that one first");
    return -EBUSY;
}

/* ---------------------------------------------------------------- commit */

/* A file of that name would be taken for somebody's; so its name says whose it is. */
static int journal_name(const struct control_disk *d, char **out, struct err *e) {
    const char *path = d->base->filename;
    if (!strncmp(path, "file:", 5))
        path += 5;
    if (name_has_protocol(path) || d->no_keep)
        return err_set(e, ENOTSUP,
                       "%s: no file can name it, so a commit could not be completed after a crash; "
                       "commit at the end instead",
                       d->no_keep ? d->no_keep : path);
    *out = xasprintf("%s.commit-%ld.qcow2", path, (long)getpid());
    return 0;
}

static int begin_commit_co(struct control_disk *d, struct err *e) {
    AUTO_FREE char *journal = NULL;
    struct node *top, *layer = d->node;
    int r = journal_name(d, &journal, e);
    if (r == 0 && access(journal, F_OK) == 0)
        r = err_set(e, EEXIST, "%s exists: is it of an earlier commit?", journal);
    if (r == 0)
        r = overlay_create_co(layer, &d->scratch, &top, e);
    if (r < 0)
        return r;
    disk_writeback_co(layer->file); /* so that there is less to wait for in the pause */
    pause_co(d);
    r = overlay_keep_co(layer, journal, false, e);
    if (r == 0) {
        d->node = top;
        if (d->export)
            d->export->node = top;
        d->journal = steal(&journal);
    }
    resume(d);
    if (r < 0) {
        top->backing = NULL; /* `layer` is ours still */
        node_unref_co(top);
        return err_prefix(e, "making the commit safe");
    }
    return 0;
}

/* The layer between the top and the base has been committed: it goes. */
static void collapse_co(struct control_disk *d) {
    struct node *layer = d->node->backing;
    pause_co(d);
    d->node->backing = node_ref(d->base);
    d->node->map_generation++;
    resume(d);
    layer->flags |= NODE_NO_FLUSH; /* nobody will read it again */
    layer->file->flags |= NODE_NO_FLUSH;
    node_unref_co(layer);
}

static int finish_layer_co(struct control_disk *d, struct err *e) {
    struct copy_opts o = {.sparse_bytes = 4096};
    int r = commit_into_co(d->node->backing, d->base, &o, e);
    if (r < 0) {
        err_hint(e, "%s completes it, also after the end of this server: strata commit %s",
                 d->journal, d->journal);
        return err_prefix(e, "commit");
    }
    collapse_co(d);
    unlink(d->journal);
    free(d->journal);
    d->journal = NULL;
    return 0;
}

static int check_commit(const struct control_disk *d, struct err *e) {
    int r = check_snapshot(d, e);
    if (r == 0 && d->no_commit)
        r = err_set(e, EPERM, "disk '%s': %s", d->name, d->no_commit);
    return r;
}

int control_disk_commit_co(struct control_disk *d, struct err *e) {
    int r = check_commit(d, e);
    if (r == 0 && d->journal)
        r = finish_layer_co(d, e);
    if (r == 0)
        r = begin_commit_co(d, e);
    return r == 0 ? finish_layer_co(d, e) : r;
}

int control_disk_finish_commit_co(struct control_disk *d, struct err *e) {
    struct copy_opts o = {.sparse_bytes = 4096};
    int r = check_commit(d, e);
    if (r == 0)
        r = fat_commit_is_for(d->base) ? fat_commit_co(d->node, d->base, e)
                                       : commit_into_co(d->node, d->base, &o, e);
    if (r == 0 && d->journal)
        unlink(d->journal);
    return r < 0 ? err_prefix(e, "commit") : 0;
}

/* ---------------------------------------------------------------- keep, drop, resize */

static int check_keep(const struct control_disk *d, struct err *e) {
    int r = check_snapshot(d, e);
    if (r == 0)
        r = check_no_journal(d, e);
    if (r == 0 && d->no_keep)
        r = err_set(e, ENOTSUP, "disk '%s': %s", d->name, d->no_keep);
    return r;
}

int control_disk_keep_co(struct control_disk *d, const char *file, bool replace, struct err *e) {
    int r = check_keep(d, e);
    return r == 0 ? overlay_save_co(d->node, file, replace, e) : r;
}

int control_disk_finish_keep_co(struct control_disk *d, const char *file, struct err *e) {
    int r = check_keep(d, e);
    return r == 0 ? overlay_keep_co(d->node, file, false, e) : r;
}

int control_disk_drop_co(struct control_disk *d, struct err *e) {
    struct node *top, *old = d->node;
    int r = check_snapshot(d, e);
    if (r == 0)
        r = check_no_journal(d, e);
    if (r < 0)
        return r;
    r = overlay_create_co(node_ref(d->base), &d->scratch, &top, e);
    if (r < 0) {
        node_unref_co(d->base);
        return r;
    }
    pause_co(d);
    d->node = top;
    if (d->export)
        d->export->node = top;
    resume(d);
    node_unref_co(old);
    return 0;
}

int control_disk_resize_co(struct control_disk *d, uint64_t size, struct err *e) {
    int r = check_no_journal(d, e);
    if (r == 0 && !node_is_rw(d->node))
        r = err_set(e, EROFS, "disk '%s' is served read-only", d->name);
    if (r == 0 && size < d->node->size)
        r = err_set(e, EINVAL,
                    "disk '%s' has %" PRIu64 " bytes; clients rely on them, so it can only grow",
                    d->name, d->node->size);
    return r == 0 ? disk_resize_co(d->node, size, PREALLOC_OFF, e) : r;
}

/* ---------------------------------------------------------------- status, end */

json_t *control_disk_status(const struct control_disk *d) {
    const struct node *below = d->base ? d->base : d->node;
    json_t *j = json_pack("{s:s, s:s, s:s, s:I, s:b}", "name", d->name, "file",
                          below->filename ? below->filename : "", "format", below->drv->name,
                          "size", (json_int_t)d->node->size, "snapshot", d->base != NULL);
    if (!j)
        return NULL;
    if (d->base) {
        uint64_t limit = 0;
        int64_t used = 0;
        overlay_limit(&d->scratch, &limit, NULL);
        for (struct node *n = d->node; n && n != d->base; n = n->backing) {
            int64_t a = overlay_allocated(n);
            used += a > 0 ? a : 0;
        }
        const char *where = d->scratch.scratch_dir;
        json_object_set_new(j, "scratch",
                            json_pack("{s:s, s:I, s:o}", "where",
                                      where && !strncmp(where, "memory:", 7) ? "memory" : "file",
                                      "used", (json_int_t)used, "limit",
                                      limit ? json_integer((json_int_t)limit) : json_null()));
    }
    if (d->journal)
        json_object_set_new(j, "unfinished-commit", json_string(d->journal));
    if (d->export)
        json_object_set_new(j, "export", d->export->ops->describe(d->export));
    return j;
}

void control_disk_close_co(struct control_disk *d) {
    if (d->node)
        node_unref_co(d->node);
    d->node = d->base = NULL;
    free(d->name);
    free(d->journal);
    d->name = d->journal = NULL;
}
