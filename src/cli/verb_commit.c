/* SPDX-License-Identifier: MIT */
/*
 * commit: what an overlay holds goes down into its backing file, or into one further below.
 *
 * Order: the base gets everything and is flushed; only then is the overlay emptied.  Until that
 * moment the overlay is whole, so a kill, a full disk or an error loses nothing and the command can
 * be run again.
 *
 * With -b and images in between, the overlay is kept as it is (-d is implied): over the images in
 * between, whose base has changed, it would not read the same once it was empty.
 */
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>
#include "base/cleanup.h"
#include "base/err.h"
#include "cli/cli.h"
#include "cli/dialect.h"
#include "cli/progress.h"
#include "disk/node.h"
#include "disk/open.h"
#include "job/copy.h"
#include "runtime/loop.h"

struct args {
    struct cli_image image;
    const char *base;
    uint64_t rate;
    bool drop, quiet;
    struct progress_args progress;
};
static const struct cli_opt opts[] = {
    CLI_FORMAT_ROW(struct args, image.format),
    CLI_IMAGE_OPTS_ROW(struct args, image.image_opts),
    CLI_CACHE_ROW(struct args, image.cache, 't', "cache", CACHE_WRITEBACK),
    CLI_TRUST_ROW(struct args, image.trust),
    CLI_STR(struct args, base, 'b', "base", "FILE",
            "commit into this image of the chain; default: the backing file"),
    CLI_FLAG(struct args, drop, 'd', "drop",
             "do not empty the overlay afterwards: it will not be used again"),
    CLI_SIZE(struct args, rate, 'r', "rate-limit", "BYTES", 0, 0, INT64_MAX,
             "bytes a second at most"),
    PROGRESS_ROWS(struct args, progress),
    CLI_QUIET_ROW(struct args, quiet),
    CLI_END};

struct commit {
    struct progress bar;
    bool cancel;
};

static void on_progress(void *arg, const struct copy_progress *p) {
    struct commit *c = arg;
    progress_update(&c->bar, p->done, p->total);
}

static void on_signal(void *arg, int signo) {
    struct commit *c = arg;
    c->cancel = true;
}

static bool same_file(const char *a, const char *b) {
    struct stat sa, sb;
    if (!strncmp(a, "file:", 5))
        a += 5;
    if (!strncmp(b, "file:", 5))
        b += 5;
    return stat(a, &sa) == 0 && stat(b, &sb) == 0 && sa.st_dev == sb.st_dev &&
           sa.st_ino == sb.st_ino;
}

/* There, relative to the image above it. */
static bool is_named(const struct node *upper, const char *name) {
    const char *path = node_storage((struct node *)upper)->filename, *slash = strrchr(path, '/');
    if (strchr(name, ':'))
        return !strcmp(upper->backing->filename, name);
    if (*name == '/' || !slash)
        return same_file(node_storage(upper->backing)->filename, name);
    char *beside AUTO_FREE = xasprintf("%.*s/%s", (int)(slash - path), path, name);
    return same_file(node_storage(upper->backing)->filename, beside);
}

/* The layer that `name` means: as a path from here, as an image names it, or as it was opened. */
static struct node *find_layer(struct node *overlay, const char *name) {
    for (struct node *l = overlay; l->backing; l = l->backing)
        if (dialect_is_qemu() ? is_named(l, name)
                              : !strcmp(l->backing->filename, name) ||
                                    (l->backing_name && !strcmp(l->backing_name, name)) ||
                                    same_file(node_storage(l->backing)->filename, name))
            return l->backing;
    return NULL;
}

static int find_base(struct verb_ctx *ctx, struct node *overlay, struct node **base) {
    const struct args *a = ctx->args;
    *base = overlay->backing;
    if (!overlay->backing)
        return err_set(
            &ctx->err, EINVAL,
            cli_words("%s has no backing file", "Image does not have a backing file%.0s"),
            overlay->filename);
    if (a->base && !(*base = find_layer(overlay, a->base))) {
        err_set(&ctx->err, EINVAL,
                cli_words("'%s' is not in the backing chain of %s",
                          "Did not find '%s' in the backing chain of '%s'"),
                a->base, overlay->filename);
        err_hint(&ctx->err, "'strata info --backing-chain' lists the chain");
        return -EINVAL;
    }
    return 0;
}

static void in_their_words(struct verb_ctx *ctx, int rc, const char *what) {
    if (!dialect_is_qemu() || rc == -ECANCELED)
        return;
    err_clear(&ctx->err);
    err_set(&ctx->err, -rc, "%s: %s", what, strerror(-rc));
}

static int commit_node_co(struct verb_ctx *ctx, struct node *overlay) {
    const struct args *a = ctx->args;
    struct commit c = {0};
    struct node *base;
    int rc = find_base(ctx, overlay, &base);
    if (rc < 0)
        return rc;
    /* -b implies -d, as in qemu-img: even when it names the backing file itself. */
    bool empty = !a->drop && !a->base;
    if (empty && !overlay->drv->format->empty_co) {
        err_set(&ctx->err, ENOTSUP, "an image of format '%s' cannot be emptied afterwards",
                overlay->drv->name);
        err_hint(&ctx->err, "with -d it is left as it is");
        return -ENOTSUP;
    }
    bool show = !a->quiet; /* or counted, for SIGUSR1 */
    struct copy_opts o = {.rate_bytes = a->rate,
                          .cancel = &c.cancel,
                          .progress = show ? on_progress : NULL,
                          .arg = &c};
    if (show)
        progress_begin(&c.bar, &a->progress);
    loop_on_signal(ctx->loop, SIGINT, on_signal, &c);
    loop_on_signal(ctx->loop, SIGTERM, on_signal, &c);
    rc = commit_into_co(overlay, base, &o, &ctx->err);
    if (rc < 0)
        in_their_words(ctx, rc, "Block job failed");
    if (rc == 0 && empty && (rc = commit_empty_co(overlay, &ctx->err)) < 0) {
        char *what AUTO_FREE = xasprintf("Failed to empty %s", overlay->filename);
        in_their_words(ctx, rc, what);
    }
    loop_off_signal(ctx->loop, SIGINT);
    loop_off_signal(ctx->loop, SIGTERM);
    if (show)
        progress_end(&c.bar, rc == 0);
    if (rc == 0 && !a->quiet)
        puts("Image committed.");
    return rc;
}

static int commit_run_verb_co(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    struct node *overlay;
    int rc = cli_open_co(ctx, ctx->pos[0], &a->image, OPEN_RW | OPEN_UNMAP, &overlay);
    if (rc < 0)
        return rc;
    dialect_warn_guessed(ctx, overlay);
    rc = commit_node_co(ctx, overlay);
    node_unref_co(overlay);
    return rc;
}

static const char *const details[] = {
    "Writes what FILE holds above its backing file into that backing file, makes it durable, and "
    "then empties FILE. A backing file that is shorter grows. Until the end FILE stays whole: "
    "after an error or a kill the command can be run again.",
    "With -b the target may be any image of the chain; FILE is then not emptied, and the images "
    "between it and the target must not be used by themselves any more.",
    NULL};

static const struct cli_example examples[] = {
    {"strata commit overlay.qcow2", "Put the overlay's changes into its backing file."},
    {"strata commit -b base.qcow2 top.qcow2 && rm top.qcow2 middle.qcow2",
     "Flatten a chain of three into its lowest image."},
    {NULL, NULL}};

const struct verb verb_commit = {
    .name = "commit",
    .summary = "write an overlay's changes into its backing file",
    .synopsis = "FILE",
    .pos_min = 1,
    .pos_max = 1,
    .opts = opts,
    .args_size = sizeof(struct args),
    .details = details,
    .examples = examples,
    .run_co = commit_run_verb_co,
};
