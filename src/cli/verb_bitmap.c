/* SPDX-License-Identifier: MIT */
/*
 * bitmap: dirty bitmaps that an image keeps.
 *
 * The actions are done one after the other, as they stand on the command line, and stored together
 * at the end.  When one fails, those before it are stored all the same, as qemu-img does it.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include "base/ck.h"
#include "cli/cli.h"
#include "cli/dialect.h"
#include "disk/bitmap.h"
#include "disk/node.h"
#include "disk/open.h"

struct args {
    struct cli_image image;
    struct cli_list steps;
    bool list;
    uint64_t granularity;
    const char *source, *source_format;
    int output;
};
static const struct cli_opt opts[] = {
    CLI_STEP(struct args, steps, 0, "add", NULL, "make bitmap NAME, which records from now on"),
    CLI_STEP(struct args, steps, 0, "remove", NULL, "remove bitmap NAME from the image"),
    CLI_STEP(struct args, steps, 0, "clear", NULL, "forget what bitmap NAME has recorded"),
    CLI_STEP(struct args, steps, 0, "enable", NULL, "let bitmap NAME record changes"),
    CLI_STEP(struct args, steps, 0, "disable", NULL, "let bitmap NAME stay as it is"),
    CLI_STEP(struct args, steps, 0, "merge", "SOURCE", "add what bitmap SOURCE has recorded"),
    CLI_FLAG(struct args, list, 'l', "list", "list the bitmaps of the image"),
    CLI_SIZE(struct args, granularity, 'g', "granularity", "SIZE", 0, 0, INT64_MAX,
             "bytes for each bit of a new bitmap, a power of two from 512 to 2G (default: the "
             "image's cluster size, at most 64K)"),
    CLI_STR(struct args, source, 'b', "source-file", "FILE",
            "image that has the SOURCE of --merge (default: the same)"),
    CLI_STR(struct args, source_format, 'F', "source-format", "FMT",
            "format of the --source-file; probed when not given"),
    CLI_IMAGE_ROWS(struct args, image),
    CLI_OUTPUT_ROW(struct args, output),
    CLI_END};

struct work {
    struct verb_ctx *ctx;
    struct node *n, *src;
    const char *name;
};

/* ---------------------------------------------------------------- errors */

static int not_found(struct verb_ctx *ctx, const struct node *n, const char *name) {
    char *safe AUTO_FREE = cli_safe(name), *file AUTO_FREE = cli_safe(n->filename);
    return dialect_is_qemu() ? err_set(&ctx->err, ENOENT, "Dirty bitmap '%s' not found", name)
                             : err_set(&ctx->err, ENOENT, "%s has no bitmap '%s'", file, safe);
}

/* A bitmap's own error, in the words that the program's name asks for. */
static int refused(struct verb_ctx *ctx, const struct bitmap *b) {
    struct err *e = &ctx->err;
    if (!dialect_is_qemu() || !b->inconsistent)
        return -e->code;
    err_clear(e);
    err_set(e, EINVAL, "Bitmap '%s' is inconsistent and cannot be used", b->name);
    dialect_second_line(e, "Try block-dirty-bitmap-remove to delete this bitmap from disk");
    return -EINVAL;
}

static int add_refused(struct work *w, uint64_t granularity) {
    struct err *e = &w->ctx->err;
    size_t length = strlen(w->name);
    int code = e->code;
    if (!dialect_is_qemu())
        return -code;
    const char *why = NULL;
    err_clear(e);
    if (granularity && (!is_pow2(granularity) || granularity < BITMAP_GRANULARITY_MIN ||
                        granularity > BITMAP_GRANULARITY_MAX))
        return err_set(e, EINVAL, "Granularity must be power of 2 and at least 512");
    if (!length)
        return err_set(e, EINVAL, "Bitmap name cannot be empty");
    if (code == EEXIST)
        return err_set(e, EEXIST, "Bitmap already exists: %s", w->name);
    if (code == ENOTSUP && strcmp(w->n->drv->name, "qcow2"))
        return err_set(e, ENOTSUP,
                       "Can't store persistent bitmaps to #block100: Operation not supported");
    if (code == ENOTSUP)
        why = "Cannot store dirty bitmaps in qcow2 v2 files";
    else if (length > BITMAP_NAME_MAX)
        why = "Name length exceeds maximum (1023 characters)";
    else if (code == EFBIG)
        why = "Too much space will be occupied by the bitmap. Use larger granularity";
    return why ? err_set(e, code, "Can't make bitmap '%s' persistent in '#block100': %s", w->name,
                         why)
               : err_errno(e, code, "Can't add it");
}

/* ---------------------------------------------------------------- actions */

static int add_co(struct work *w) {
    const struct args *a = w->ctx->args;
    struct bitmap_new what = {.name = w->name, .granularity = a->granularity, .persistent = true};
    int r = bitmap_add_co(w->n, &what, NULL, &w->ctx->err);
    return r < 0 ? add_refused(w, a->granularity) : 0;
}

static int merge_co(struct work *w, struct bitmap *b, const char *source) {
    struct err *e = &w->ctx->err;
    struct node *from = w->src ? w->src : w->n;
    struct bitmap *s = bitmap_find(from, source);
    if (!s)
        return not_found(w->ctx, from, source);
    if (bitmap_usable(b, true, e) < 0)
        return refused(w->ctx, b);
    if (bitmap_usable(s, false, e) < 0)
        return refused(w->ctx, s);
    if (dialect_is_qemu() && b->size != s->size)
        return err_set(e, EINVAL,
                       "Bitmaps are of different sizes (destination size is %" PRIu64
                       ", source size is %" PRIu64 ") and can't be merged",
                       b->size, s->size);
    return bitmap_merge_co(b, s, e);
}

static int action_co(struct work *w, const char *action, const char *source) {
    struct err *e = &w->ctx->err;
    if (!strcmp(action, "add"))
        return add_co(w);
    struct bitmap *b = bitmap_find(w->n, w->name);
    if (!b)
        return not_found(w->ctx, w->n, w->name);
    if (!strcmp(action, "remove"))
        return bitmap_remove_co(b, e);
    if (!strcmp(action, "merge"))
        return merge_co(w, b, source);
    int r = !strcmp(action, "clear") ? bitmap_clear_co(b, e)
                                     : bitmap_set_enabled_co(b, !strcmp(action, "enable"), e);
    return r < 0 ? refused(w->ctx, b) : 0;
}

static int actions_co(struct work *w) {
    const struct args *a = w->ctx->args;
    struct err *e = &w->ctx->err;
    for (size_t i = 0; i < a->steps.n; i++) {
        const char *action = a->steps.v[i], *source = NULL;
        if (!strcmp(action, "merge"))
            source = a->steps.v[++i];
        int r = action_co(w, action, source);
        if (r < 0) {
            char *safe AUTO_FREE = cli_safe(w->name);
            return dialect_is_qemu()
                       ? err_prefix(e, "Operation %s on bitmap %s failed", action, w->name)
                       : err_prefix(e, "%s bitmap '%s'", action, safe);
        }
    }
    return 0;
}

/* ---------------------------------------------------------------- list */

static json_t *describe_co(struct verb_ctx *ctx, struct bitmap *b) {
    json_t *o = json_object();
    struct err why AUTO_ERR = ERR_INIT;
    bool usable = bitmap_load_co(b, &why) == 0;
    json_object_set_new(o, "name", cli_json_name(b->name));
    json_object_set_new(o, "granularity", json_integer((json_int_t)bitmap_granularity(b)));
    json_object_set_new(o, "enabled", json_boolean(b->enabled));
    json_object_set_new(o, "inconsistent", json_boolean(b->inconsistent));
    json_object_set_new(o, "usable", json_boolean(usable));
    if (usable)
        json_object_set_new(o, "dirty-bytes", json_integer((json_int_t)bitmap_dirty_bytes(b)));
    else
        json_object_set_new(o, "problem", cli_json_name(err_text(&why)));
    return o;
}

static int list_co(struct work *w) {
    const struct args *a = w->ctx->args;
    json_t *all = json_array();
    for (struct bitmap *b = NULL; (b = bitmap_next(w->n, b));) {
        json_t *o = describe_co(w->ctx, b);
        if (a->output == OUTPUT_HUMAN) {
            char *safe AUTO_FREE = cli_safe(b->name);
            const json_t *dirty = json_object_get(o, "dirty-bytes");
            printf("%-11s %8" PRIu64 "  ",
                   b->inconsistent ? "damaged"
                   : !dirty        ? "unusable"
                   : b->enabled    ? "recording"
                                   : "disabled",
                   bitmap_granularity(b));
            if (dirty)
                printf("%15" JSON_INTEGER_FORMAT "  ", json_integer_value(dirty));
            else
                printf("%15s  ", "-");
            printf("%s\n", safe);
        }
        json_array_append_new(all, o);
    }
    if (a->output == OUTPUT_JSON)
        cli_print_json(all);
    else
        json_decref(all);
    return 0;
}

/* ---------------------------------------------------------------- the verb */

static int check_args(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    struct err *e = &ctx->err;
    bool add = false, merge = false;
    for (size_t i = 0; i < a->steps.n; i++) {
        add |= !strcmp(a->steps.v[i], "add");
        if (!strcmp(a->steps.v[i], "merge")) {
            merge = true;
            i++;
        }
    }
    if (a->list && dialect_is_qemu())
        return dialect_usage(ctx, "unrecognized option '--list'");
    if (a->list) {
        if (ctx->pos_n != 1 || a->steps.n)
            return err_set(e, EINVAL, "--list takes an IMAGE and nothing else");
        return 0;
    }
    if (ctx->pos_n != 2)
        return err_set(e, EINVAL, "%s",
                       cli_words("an IMAGE and the NAME of a bitmap are needed",
                                 "Expecting filename and bitmap name"));
    if (!a->steps.n)
        return err_set(e, EINVAL, "%s",
                       cli_words("one of --add, --remove, --clear, --enable, --disable, --merge "
                                 "is needed",
                                 "Need at least one of --add, --remove, --clear, --enable, "
                                 "--disable, or --merge"));
    if (a->granularity && !add)
        return err_set(
            e, EINVAL, "%s",
            cli_words("--granularity goes with --add", "granularity only supported with --add"));
    if (a->source_format && !a->source)
        return err_set(e, EINVAL, "%s", cli_words("-F goes with -b", "-F only supported with -b"));
    if (a->source && !merge)
        return err_set(e, EINVAL, "%s",
                       cli_words("-b goes with --merge",
                                 "Merge bitmap source file only supported with --merge"));
    return 0;
}

static int bitmap_run_co(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    struct work w = {.ctx = ctx, .name = ctx->pos_n > 1 ? ctx->pos[1] : ""};
    int r = check_args(ctx);
    if (r < 0)
        return r;
    r = cli_open_co(ctx, ctx->pos[0], &a->image, OPEN_NO_BACKING | (a->list ? 0 : OPEN_RW), &w.n);
    if (r < 0)
        return r;
    if (!a->list)
        dialect_warn_guessed(ctx, w.n);
    if (a->source) {
        struct cli_image image = {.format = a->source_format, .trust = a->image.trust};
        r = cli_open_co(ctx, a->source, &image, OPEN_NO_BACKING, &w.src);
    }
    if (!r)
        r = a->list ? list_co(&w) : actions_co(&w);
    if (!r && !a->list) {
        r = bitmap_store_co(w.n, &ctx->err);
        if (r < 0)
            err_prefix(&ctx->err, "%s", w.n->filename);
    }
    if (w.src)
        node_unref_co(w.src);
    node_unref_co(w.n);
    return r;
}

static const char *const details[] = {
    "A bitmap records which parts of the disk are written while it is enabled, in units of its "
    "granularity; a backup then copies only those. It is kept in the image, which has to be qcow2 "
    "of version 3 (compat=1.1).",
    "Several actions are done in the order in which they are given. When one fails, those before "
    "it stay done. A merged SOURCE may have another granularity, but is of a disk of the same "
    "size.",
    "A bitmap whose image was not closed (a crash, kill -9) is damaged: nobody knows what it "
    "missed. It can only be removed.",
    "--list shows for each bitmap whether it records, its granularity, the bytes that it calls "
    "changed, and its name.",
    NULL};

static const struct cli_example examples[] = {
    {"strata bitmap --add disk.qcow2 since-backup", "Record from now on what changes."},
    {"strata bitmap --list disk.qcow2", "Show what has been recorded."},
    {"strata bitmap --merge monday -b old.qcow2 disk.qcow2 week",
     "Add what bitmap monday of old.qcow2 has recorded."},
    {NULL, NULL}};

const struct verb verb_bitmap = {
    .name = "bitmap",
    .summary = "manage the dirty bitmaps that an image keeps",
    .synopsis = "IMAGE [NAME]",
    .pos_min = 0,
    .pos_max = -1,
    .opts = opts,
    .args_size = sizeof(struct args),
    .details = details,
    .examples = examples,
    .run_co = bitmap_run_co,
};
