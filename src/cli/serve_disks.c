/* SPDX-License-Identifier: MIT */
/*
 * The disks of `strata serve`: FILE, or NAME=FILE for each of several exports.
 *
 * One argument alone that has a "=" is NAME=FILE unless a file of that whole name is there; a name
 * holds none of "/:{".  The drop-in name knows only FILE.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/cleanup.h"
#include "cli/dialect.h"
#include "cli/serve.h"
#include "cli/snapshots.h"
#include "disk/bitmap.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "job/fat_commit.h"

/* Length of the export name in front of "=", or SIZE_MAX: it is a file alone. */
static size_t name_length(const struct serve *s, const char *arg) {
    size_t len = strcspn(arg, "=/:{");
    if (arg[len] != '=' || dialect_is_qemu())
        return SIZE_MAX;
    if (s->ctx->pos_n == 1 && (s->a->image.image_opts || s->a->name || access(arg, F_OK) == 0))
        return SIZE_MAX;
    return len;
}

static int name_disks(struct serve *s) {
    s->ndisks = (size_t)s->ctx->pos_n;
    s->disks = xcalloc(s->ndisks, sizeof(*s->disks));
    s->control_disks = xcalloc(s->ndisks, sizeof(*s->control_disks));
    for (size_t i = 0; i < s->ndisks; i++) {
        const char *arg = s->ctx->pos[i];
        size_t len = name_length(s, arg);
        struct serve_disk *d = &s->disks[i];
        s->control_disks[i] = &d->d;
        d->file = len == SIZE_MAX ? arg : arg + len + 1;
        d->d.name = len != SIZE_MAX ? xstrndup(arg, len) : xstrdup(s->a->name ? s->a->name : "");
        if (len == SIZE_MAX && s->ndisks > 1) {
            char *safe AUTO_FREE = cli_safe(arg);
            return err_set(&s->ctx->err, EINVAL,
                           "several exports need a name each: NAME=%s instead of %s", safe, safe);
        }
    }
    return 0;
}

/* Only what lies behind --offset is served. */
static int cut_offset_co(struct serve *s, struct serve_disk *d) {
    const struct serve_args *a = s->a;
    if (!a->offset)
        return 0;
    json_t *window = json_pack("{s:I}", "offset", (json_int_t)a->offset);
    struct open_req req = {.flags = node_is_rw(d->d.node) ? OPEN_RW : 0, .cache = a->image.cache};
    if (a->discard)
        req.flags |= OPEN_UNMAP;
    struct node *top;
    int rc = node_open_on_co(d->d.node, driver_find("raw"), window, &req, &top, &s->ctx->err);
    json_decref(window);
    if (rc == 0)
        d->d.node = top;
    return rc;
}

static int check_guessed(struct serve *s, const struct serve_disk *d, unsigned flags) {
    struct err *e = &s->ctx->err;
    /* What lies in a directory was never taken from a guest's first bytes. */
    if (s->a->commit && fat_commit_is_for(d->d.node))
        return fat_commit_check(d->d.node, e);
    if (dialect_is_qemu() || !(d->d.node->flags & NODE_GUESSED) ||
        !((flags & OPEN_RW) || s->a->commit))
        return 0;
    err_set(e, EINVAL,
            "%s: no format was given and none was recognised; taken for raw it "
            "could be turned by a guest into an image that names other files",
            d->file);
    err_hint(e, "give -f raw if it is a raw image");
    return -EINVAL;
}

static int open_disk_co(struct serve *s, struct serve_disk *d) {
    const struct serve_args *a = s->a;
    unsigned flags = a->discard ? OPEN_UNMAP : 0;
    if (!a->read_only && !a->snapshot)
        flags |= OPEN_RW;
    int rc = a->load_snapshot ? cli_open_snapshot_co(s->ctx, d->file, &a->image, flags,
                                                     a->load_snapshot, &d->d.node)
                              : cli_open_co(s->ctx, d->file, &a->image, flags, &d->d.node);
    if (rc == 0)
        rc = cut_offset_co(s, d);
    if (rc < 0)
        return rc;
    if (flags & OPEN_RW && a->detect_zeroes)
        d->d.node->flags |= a->detect_zeroes == 1 ? NODE_DETECT_ZEROES : NODE_DETECT_UNMAP;
    if (dialect_is_qemu() && flags & OPEN_RW)
        dialect_warn_guessed(s->ctx, d->d.node);
    rc = check_guessed(s, d, flags);
    if (rc < 0 || !a->snapshot)
        return rc;
    if (a->load_snapshot)
        d->d.no_commit = d->d.no_keep = "the base is an internal snapshot";
    else if (d->d.node->flags & NODE_GUESSED && !fat_commit_is_for(d->d.node))
        d->d.no_commit = "the format of the base was guessed; serve it with -f raw if it is raw";
    d->d.scratch = (struct overlay_opts){a->scratch, a->scratch_size};
    return control_disk_snapshot_co(&d->d, &s->ctx->err);
}

static struct bitmap *bitmap_below(struct node *n, const char *name) {
    struct bitmap *b = NULL;
    for (; n && !b; n = n->backing)
        b = bitmap_find(n, name);
    return b;
}

/* The bitmaps that were named: of the image, or of one below it.  Several exports need not all have
 * each. */
static int find_bitmaps_co(struct serve *s, struct serve_disk *d) {
    const struct cli_list *names = &s->a->bitmaps;
    struct err *e = &s->ctx->err;
    d->bitmaps = xcalloc(names->n + 1, sizeof(*d->bitmaps));
    for (size_t i = 0; i < names->n; i++) {
        struct bitmap *b = bitmap_below(d->d.node, names->v[i]);
        if (!b && s->ndisks > 1)
            continue;
        if (!b) {
            char *safe AUTO_FREE = cli_safe(names->v[i]);
            return err_set(e, ENOENT,
                           cli_words("no bitmap '%s' in %s", "Bitmap '%s' is not found%.0s"), safe,
                           d->file);
        }
        int rc = bitmap_load_co(b, e);
        if (rc < 0 && dialect_is_qemu() && b->inconsistent) {
            err_clear(e);
            err_set(e, EINVAL, "Bitmap '%s' is inconsistent and cannot be used", b->name);
        }
        if (rc < 0)
            return rc;
        d->bitmaps[d->nbitmaps++] = b;
    }
    return 0;
}

/* Somebody must have what was asked for. */
static int check_bitmaps(struct serve *s) {
    for (size_t i = 0; i < s->a->bitmaps.n && s->ndisks > 1; i++) {
        bool found = false;
        for (size_t k = 0; k < s->ndisks; k++)
            found |= bitmap_below(s->disks[k].d.node, s->a->bitmaps.v[i]) != NULL;
        if (!found) {
            char *safe AUTO_FREE = cli_safe(s->a->bitmaps.v[i]);
            return err_set(&s->ctx->err, ENOENT, "no bitmap '%s' in any of the images", safe);
        }
    }
    return 0;
}

int serve_open_disks_co(struct serve *s) {
    int rc = name_disks(s);
    for (size_t i = 0; rc == 0 && i < s->ndisks; i++) {
        rc = open_disk_co(s, &s->disks[i]);
        if (rc == 0)
            rc = find_bitmaps_co(s, &s->disks[i]);
    }
    return rc == 0 ? check_bitmaps(s) : rc;
}

static int finish_disk_co(struct serve *s, struct serve_disk *d, struct err *e) {
    const struct serve_args *a = s->a;
    if (a->commit)
        return control_disk_finish_commit_co(&d->d, e);
    if (a->keep)
        return control_disk_finish_keep_co(&d->d, a->keep, e);
    if (d->d.journal) {
        err_set(e, EIO, "the commit of %s did not end", d->file);
        err_hint(e, "strata commit %s completes it", d->d.journal);
        return -EIO;
    }
    if (a->snapshot || a->read_only)
        return 0;
    int rc = bitmap_store_co(d->d.node, e);
    if (rc < 0)
        return err_prefix(e, "%s", d->d.node->filename);
    rc = disk_flush_co(d->d.node);
    return rc < 0 ? err_errno(e, -rc, "%s: flush", d->d.node->filename) : 0;
}

int serve_finish_disks_co(struct serve *s) {
    int result = 0;
    for (size_t i = 0; i < s->ndisks; i++) {
        struct err e AUTO_ERR = ERR_INIT;
        int rc = finish_disk_co(s, &s->disks[i], &e);
        if (rc < 0 && result < 0) {
            cli_print_error(s->ctx, &e); /* the first one is main's to print */
        } else if (rc < 0) {
            err_move(&s->ctx->err, &e);
            result = rc;
        }
    }
    return result;
}

void serve_close_disks_co(struct serve *s) {
    for (size_t i = 0; i < s->ndisks; i++) {
        control_disk_close_co(&s->disks[i].d);
        free(s->disks[i].bitmaps);
    }
    free(s->disks);
    free(s->control_disks);
}
