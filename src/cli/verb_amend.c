/* SPDX-License-Identifier: MIT */
/*
 * amend: other options for an image that exists.
 *
 * What can be changed is the format's own table (`-o help`); the work and its order are the
 * driver's.  A backing file is not opened: nothing of it is needed.
 */
#include <errno.h>
#include <string.h>
#include "base/opt.h"
#include "cli/cli.h"
#include "cli/dialect.h"
#include "cli/progress.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"

struct args {
    struct cli_image image;
    struct cli_list options;
    bool force, shrink, quiet;
    struct progress_args progress;
};
static const struct cli_opt opts[] = {
    CLI_FORMAT_ROW(struct args, image.format),
    CLI_IMAGE_OPTS_ROW(struct args, image.image_opts),
    CLI_TRUST_ROW(struct args, image.trust),
    CLI_CACHE_ROW(struct args, image.cache, 't', "cache", CACHE_WRITEBACK),
    CLI_LIST(struct args, options, 'o', "options", "KEY=VALUE,...",
             "what to change; -o help lists what the format can"),
    CLI_FLAG(struct args, force, 0, "force",
             "for changes that can lock one out of an encrypted image; nothing here needs it yet"),
    CLI_FLAG(struct args, shrink, 0, "shrink",
             "allow a smaller size=: what lies behind the new end is lost"),
    PROGRESS_ROWS(struct args, progress),
    CLI_QUIET_ROW(struct args, quiet),
    CLI_END};

static void on_progress(void *arg, uint64_t done, uint64_t total) {
    progress_update(arg, done, total);
}

static int print_help_for(struct verb_ctx *ctx, const struct driver *d, const char *format) {
    if (!d || d->kind != DRIVER_FORMAT)
        return err_set(&ctx->err, EINVAL,
                       cli_words("unknown format '%s'", "Unknown file format '%s'"), format);
    if (!d->amend_opts)
        return err_set(&ctx->err, ENOTSUP,
                       cli_words("images of format '%s' have no options that can be changed",
                                 "Format driver '%s' does not support option amendment"),
                       d->name);
    printf(cli_words("Options of %s images that can be changed:\n", "Amend options for '%s':\n"),
           d->name);
    if (!dialect_option_help(d, OPT_AMEND, false))
        opt_print_help(d->amend_opts, OPT_AMEND, stdout);
    return 0;
}

static int amend_node_co(struct verb_ctx *ctx, struct node *n) {
    const struct args *a = ctx->args;
    struct progress bar;
    json_t *tree = NULL;
    if (cli_options_want_help(&a->options))
        return print_help_for(ctx, n->drv, n->drv->name);
    if (!n->drv->amend_opts)
        return print_help_for(ctx, n->drv, n->drv->name);
    int rc = cli_options(ctx, &a->options, &tree);
    if (rc < 0)
        return rc;
    struct amend_ctx how = {
        .flags = (a->force ? AMEND_FORCE : 0) | (a->shrink || dialect_is_qemu() ? AMEND_SHRINK : 0),
        .progress = on_progress,
        .arg = &bar,
    };
    progress_begin(&bar, &a->progress);
    rc = disk_amend_co(n, tree, &how, &ctx->err);
    if (rc == 0 && (rc = disk_flush_co(n)) < 0)
        err_errno(&ctx->err, -rc, "flushing");
    progress_end(&bar, rc == 0);
    if (rc < 0 && dialect_is_qemu())
        dialect_amend_error(ctx, n->drv, tree);
    else if (rc < 0)
        err_prefix(&ctx->err, "%s", n->filename);
    json_decref(tree);
    return rc;
}

static bool changes_size(struct verb_ctx *ctx) {
    json_t *tree = NULL;
    bool found = cli_options(ctx, &((const struct args *)ctx->args)->options, &tree) == 0 &&
                 json_object_get(tree, "size");
    err_clear(&ctx->err); /* of options that cannot be read there is more to say later */
    json_decref(tree);
    return found;
}

static int amend_run_co(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    bool help = cli_options_want_help(&a->options);
    if (!a->options.n && dialect_is_qemu())
        return dialect_usage(ctx, "Must specify options (-o)");
    if (!a->options.n) {
        err_set(&ctx->err, EINVAL, "nothing is to be changed: -o is missing");
        err_hint(&ctx->err, "-o help lists what can be");
        return -EINVAL;
    }
    if (help && a->image.format)
        return print_help_for(ctx, driver_find(a->image.format), a->image.format);
    if (ctx->pos_n != 1)
        return dialect_is_qemu() ? err_set(&ctx->err, EINVAL, "Expecting one image file name")
                                 : err_set(&ctx->err, EINVAL,
                                           "arguments are missing: amend takes "
                                           "FILE");
    struct node *n;
    unsigned flags = OPEN_NO_BACKING | (help ? 0 : OPEN_RW);
    /* Only a new size reaches an external data file; whose name may be what is wrong. */
    int rc = cli_open_co(ctx, ctx->pos[0], &a->image,
                         changes_size(ctx) ? flags : flags | OPEN_NO_DATA, &n);
    if (rc < 0)
        return rc;
    dialect_warn_guessed(ctx, n);
    rc = amend_node_co(ctx, n);
    node_unref_co(n);
    return rc;
}

static const char *const details[] = {
    "Only what is given is changed. What cannot be done is refused before anything has been "
    "written; a crash on the way leaves an image in order, and the command can be given again.",
    "For qcow2: compat (the version; on the way to 0.10, clusters of zeros above a backing file "
    "become data), refcount_bits, lazy_refcounts, size, data_file and data_file_raw. Another "
    "backing file is the work of rebase.",
    NULL};

static const struct cli_example examples[] = {
    {"strata amend -o compat=1.1 old.qcow2", "Make a version 3 image of a version 2 one."},
    {"strata amend -o lazy_refcounts=on,refcount_bits=64 disk.qcow2", "Change two things at once."},
    {"strata amend -f qcow2 -o help", "List what can be changed."},
    {NULL, NULL}};

const struct verb verb_amend = {
    .name = "amend",
    .summary = "change options of an image",
    .synopsis = "FILE",
    .pos_min = 0, /* -o help needs none */
    .pos_max = 1,
    .opts = opts,
    .args_size = sizeof(struct args),
    .details = details,
    .examples = examples,
    .run_co = amend_run_co,
};
