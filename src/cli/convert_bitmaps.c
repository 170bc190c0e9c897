/* SPDX-License-Identifier: MIT */
/*
 * convert --bitmaps: the persistent bitmaps of the source go along.
 *
 * The copy records nothing: bitmaps are added when the data is there, and with the state of the
 * source's.  Whatever cannot be copied fails the conversion before the target gets its name.
 */
#include <errno.h>
#include "cli/convert.h"
#include "cli/dialect.h"
#include "disk/bitmap.h"
#include "disk/node.h"

/* From the last to the first, as qemu-img names them. */
static struct bitmap *before(const struct node *n, const struct bitmap *b) {
    if (!n->bitmaps)
        return NULL;
    struct list *prev = b ? b->link.prev : n->bitmaps->bitmaps.prev;
    return prev == &n->bitmaps->bitmaps ? NULL : list_entry(prev, struct bitmap, link);
}

static bool broken(const struct bitmap *b) {
    return b->inconsistent || b->foreign;
}

int convert_bitmaps_check(struct verb_ctx *ctx, const struct node *src, bool skip_broken) {
    struct err *e = &ctx->err;
    if (!src->drv->format || !src->drv->format->bitmap_check)
        return err_set(
            e, ENOTSUP,
            cli_words("images of format '%s' have no bitmaps", "Source lacks bitmap support%.0s"),
            src->drv->name);
    for (const struct bitmap *b = NULL; !skip_broken && (b = before(src, b));) {
        if (!b->persistent || !broken(b))
            continue;
        char *safe AUTO_FREE = cli_safe(b->name);
        err_set(e, EINVAL,
                cli_words("bitmap '%s' is damaged and cannot be copied",
                          "Cannot copy inconsistent bitmap '%s'"),
                safe);
        if (dialect_is_qemu())
            dialect_second_line(
                e, "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it");
        else
            err_hint(e, "--skip-broken-bitmaps leaves it out; 'strata bitmap --remove' deletes it");
        return -EINVAL;
    }
    return 0;
}

static int copy_one_co(struct verb_ctx *ctx, struct bitmap *from, struct node *dst) {
    struct err *e = &ctx->err;
    struct bitmap_new what = {.name = from->name,
                              .granularity = bitmap_granularity(from),
                              .persistent = true,
                              .first = true, /* they come from the last on */
                              .disabled = !from->enabled};
    struct bitmap *to;
    char *safe AUTO_FREE = cli_safe(from->name);
    int r = bitmap_add_co(dst, &what, &to, e);
    if (r == -EEXIST && dialect_is_qemu())
        err_set(e, EEXIST, "Bitmap already exists: %s", safe);
    if (r < 0)
        return err_prefix(e, cli_words("adding bitmap '%s'", "Failed to create bitmap %s"), safe);
    r = bitmap_merge_co(to, from, e);
    if (r == -EINVAL && dialect_is_qemu())
        err_set(e, EINVAL,
                "Bitmaps are of different sizes (destination size is %llu, source size is %llu) "
                "and can't be merged",
                (unsigned long long)to->size, (unsigned long long)from->size);
    if (r < 0) {
        bitmap_remove_co(to, NULL);
        return err_prefix(e, cli_words("copying bitmap '%s'", "Failed to populate bitmap %s"),
                          safe);
    }
    return 0;
}

int convert_bitmaps_co(struct verb_ctx *ctx, struct node *src, struct node *dst, bool skip_broken) {
    if (!dst->drv->format->bitmap_check || dst->drv->format->bitmap_check(dst, "", 0, NULL) < 0) {
        if (dialect_is_qemu())
            return err_set(&ctx->err, ENOTSUP, "Format driver '%s' does not support bitmaps",
                           dst->drv->name);
        return err_set(&ctx->err, ENOTSUP,
                       "the target, %s, cannot keep bitmaps: it has to be "
                       "qcow2 of version 3 (compat=1.1)",
                       dst->drv->name);
    }
    int r = 0;
    for (struct bitmap *b = NULL; !r && (b = before(src, b));) {
        if (!b->persistent)
            continue;
        if (skip_broken && broken(b)) {
            char *safe AUTO_FREE = cli_safe(b->name);
            cli_print_warning(ctx,
                              cli_words("bitmap '%s' is damaged and left out",
                                        "Skipping inconsistent bitmap '%s'"),
                              safe);
            continue;
        }
        r = copy_one_co(ctx, b, dst);
    }
    return r ? r : bitmap_store_co(dst, &ctx->err);
}
