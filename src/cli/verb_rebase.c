/* SPDX-License-Identifier: MIT */
/*
 * rebase: another backing file under an image.
 *
 * Safe mode (job/rebase.c) gives the image whatever differs first, so it reads as before; unsafe
 * mode (-u) only changes the name in the header, for a backing file that was moved or replaced by
 * one of the same content.  The name is recorded as given: relative names count from the image's
 * folder, and that is where it is looked for here, too.
 */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>
#include "base/err.h"
#include "cli/cli.h"
#include "cli/dialect.h"
#include "cli/progress.h"
#include "disk/driver.h"
#include "disk/node.h"
#include "disk/open.h"
#include "job/rebase.h"
#include "runtime/loop.h"

struct args {
    struct cli_image image;
    int source_cache;
    const char *backing, *backing_format;
    bool unsafe, compress, quiet;
    struct progress_args progress;
};
static const struct cli_opt opts[] = {
    CLI_IMAGE_ROWS(struct args, image),
    CLI_CACHE_ROW(struct args, source_cache, 'T', "source-cache", CACHE_WRITEBACK),
    CLI_STR(struct args, backing, 'b', "backing", "FILE",
            "the new backing file; an empty text: none, the image stands alone"),
    CLI_STR(struct args, backing_format, 'F', "backing-format", "FMT",
            "format of the new backing file; needed with -b"),
    CLI_FLAG(struct args, unsafe, 'u', "unsafe",
             "only change the name in the header; content is not looked at"),
    CLI_FLAG(struct args, compress, 'c', "compress", "compress what is written into the image"),
    PROGRESS_ROWS(struct args, progress),
    CLI_QUIET_ROW(struct args, quiet),
    CLI_END};

struct rebase_verb {
    struct progress bar;
    bool cancel;
};

static void on_progress(void *arg, uint64_t done, uint64_t total) {
    struct rebase_verb *v = arg;
    progress_update(&v->bar, done, total);
}

static void on_signal(void *arg, int signo) {
    struct rebase_verb *v = arg;
    v->cancel = true;
}

static const char *wanted_name(const struct args *a) {
    return a->backing && *a->backing ? a->backing : NULL;
}

static bool same_file(const char *a, const char *b) {
    struct stat sa, sb;
    return stat(a, &sa) == 0 && stat(b, &sb) == 0 && sa.st_dev == sb.st_dev &&
           sa.st_ino == sb.st_ino;
}

/* The new backing file, found from the image's folder. */
static int open_base_co(struct verb_ctx *ctx, struct node *image, struct node **out) {
    const struct args *a = ctx->args;
    char *full AUTO_FREE = backing_resolve(image->filename, wanted_name(a), &ctx->err);
    if (!full)
        return -ctx->err.code;
    if (same_file(full, node_storage(image)->filename))
        return err_set(&ctx->err, EINVAL, "%s cannot be its own backing file", image->filename);
    struct open_req req = {
        .name = full,
        .format = a->backing_format,
        .flags = a->image.force_share ? OPEN_FORCE_SHARE : 0,
        .cache = a->source_cache,
        .gate = dialect_is_qemu() ? GATE_ANY : (enum gate)a->image.trust,
    };
    int rc = node_open_co(&req, out, &ctx->err);
    if (rc < 0 && dialect_is_qemu())
        dialect_open_error(ctx, full, a->backing_format, "Could not open new backing file");
    if (rc < 0 && !dialect_is_qemu())
        err_prefix(&ctx->err, "new backing file");
    return rc;
}

static int copy_co(struct verb_ctx *ctx, struct node *image, struct node *base) {
    const struct args *a = ctx->args;
    struct rebase_verb v = {0};
    bool show = !a->quiet; /* or counted, for SIGUSR1 */
    struct rebase_opts o = {.compress = a->compress,
                            .cancel = &v.cancel,
                            .progress = show ? on_progress : NULL,
                            .arg = &v};
    if (show)
        progress_begin(&v.bar, &a->progress);
    loop_on_signal(ctx->loop, SIGINT, on_signal, &v);
    loop_on_signal(ctx->loop, SIGTERM, on_signal, &v);
    int rc = rebase_copy_co(image, base, &o, &ctx->err);
    loop_off_signal(ctx->loop, SIGINT);
    loop_off_signal(ctx->loop, SIGTERM);
    if (show)
        progress_end(&v.bar, rc == 0);
    return rc;
}

static int switch_error(struct verb_ctx *ctx, int rc) {
    const struct args *a = ctx->args;
    if (rc == -ENOSPC && dialect_is_qemu())
        return err_set(
            &ctx->err, ENOSPC,
            "Could not change the backing file to '%s': No space left in the file header",
            a->backing);
    if (rc == -ENOTSUP && dialect_is_qemu()) { /* in this image, or not such a backing file */
        err_clear(&ctx->err);
        return err_set(&ctx->err, ENOTSUP,
                       "Could not change the backing file to '%s': Operation not supported",
                       a->backing ? a->backing : "");
    }
    return rc;
}

static int rebase_node_co(struct verb_ctx *ctx, struct node *image) {
    const struct args *a = ctx->args;
    struct node *base = NULL;
    int rc = 0;
    if (a->compress && !image->codec && dialect_is_qemu())
        return err_set(&ctx->err, ENOTSUP, "Compression not supported for this file format");
    if (!image->drv->format->set_backing_co)
        return err_set(&ctx->err, ENOTSUP,
                       cli_words("%s: format '%s' has no backing files",
                                 "Could not change the backing file to '%s': Operation not "
                                 "supported%.0s"),
                       dialect_is_qemu() ? a->backing : image->filename, image->drv->name);
    if (!a->unsafe) {
        if (wanted_name(a))
            rc = open_base_co(ctx, image, &base);
        if (rc == 0)
            rc = copy_co(ctx, image, base);
        node_unref_co(base);
    }
    if (rc == 0)
        rc = switch_error(ctx,
                          rebase_switch_co(image, wanted_name(a), a->backing_format, &ctx->err));
    return rc;
}

static int check_args(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    if (!a->unsafe && !a->backing) {
        if (dialect_is_qemu())
            return dialect_usage(ctx, "Must specify backing file (-b) or use unsafe mode (-u)");
        err_set(&ctx->err, EINVAL, "the new backing file is missing (-b)");
        err_hint(&ctx->err, "-b '' makes the image stand alone");
        return -EINVAL;
    }
    if (a->unsafe && a->compress)
        return err_set(&ctx->err, EINVAL, "-u writes no data, so that -c has nothing to compress");
    if (wanted_name(a) && !a->backing_format) {
        if (dialect_is_qemu())
            return err_set(&ctx->err, EINVAL,
                           "Could not change the backing file to '%s': backing format must be "
                           "specified",
                           a->backing);
        return err_set(&ctx->err, EINVAL, "backing file '%s' is given without its format (-F)",
                       a->backing);
    }
    const struct driver *d = a->backing_format ? driver_find(a->backing_format) : NULL;
    /* There any driver's name can be recorded. */
    bool recorded = d && a->unsafe && dialect_is_qemu();
    if (a->backing_format && !recorded && (!d || d->kind != DRIVER_FORMAT))
        return err_set(&ctx->err, EINVAL,
                       cli_words("unknown format '%s'", "Invalid format name: '%s'"),
                       a->backing_format);
    return 0;
}

static int rebase_run_co(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    int rc = check_args(ctx);
    if (rc < 0)
        return rc;
    struct cli_image image = a->image;
    image.force_share = false; /* for the backing files: the image is written to */
    struct node *n;
    rc = cli_open_co(ctx, ctx->pos[0], &image, OPEN_RW | (a->unsafe ? OPEN_NO_BACKING : 0), &n);
    if (rc < 0)
        return rc;
    dialect_warn_guessed(ctx, n);
    rc = rebase_node_co(ctx, n);
    node_unref_co(n);
    return rc;
}

static const char *const details[] = {
    "The image keeps reading as it does: where the old and the new backing file differ, it gets "
    "the old content first. That needs the old backing file. Without one (-b '') the image then "
    "stands alone.",
    "With -u only the name in the image is changed, for a backing file that was moved.",
    "To make a thin image of a full copy: create an overlay over the copy, then rebase it onto the "
    "original. It holds just the differences, and the copy can be removed.",
    NULL};

static const struct cli_example examples[] = {
    {"strata rebase -b new.qcow2 -F qcow2 overlay.qcow2", "Put another base under an overlay."},
    {"strata rebase -b '' overlay.qcow2", "Make an overlay independent of its base."},
    {"strata rebase -u -b /new/place/base.qcow2 -F qcow2 overlay.qcow2",
     "The base was moved: only record where it is."},
    {NULL, NULL}};

const struct verb verb_rebase = {
    .name = "rebase",
    .summary = "give an image another backing file",
    .synopsis = "FILE",
    .pos_min = 1,
    .pos_max = 1,
    .opts = opts,
    .args_size = sizeof(struct args),
    .details = details,
    .examples = examples,
    .run_co = rebase_run_co,
};
