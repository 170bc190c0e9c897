/* SPDX-License-Identifier: MIT */
/*
 * resize: another size for the disk in an image, absolute or by a difference.
 *
 * Making a disk smaller loses what lies behind its new end, so it must be asked for by --shrink.
 * The driver does the work in an order that survives a crash; the new size is on stable storage
 * when success is reported.  The backing file is opened, too: where it is longer, the part that the
 * disk grows by must not show its content.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include "base/ck.h"
#include "base/size.h"
#include "cli/cli.h"
#include "cli/dialect.h"
#include "disk/bitmap.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"

struct args {
    struct cli_image image;
    bool shrink, quiet;
    int preallocation;
};
static const struct cli_opt opts[] = {
    CLI_IMAGE_ROWS(struct args, image),
    CLI_FLAG(struct args, shrink, 0, "shrink",
             "allow a smaller size: what lies behind the new end is lost"),
    CLI_ENUM(struct args, preallocation, 0, "preallocation", "MODE", prealloc_names, PREALLOC_OFF,
             "how room for the added part is allocated on the host"),
    CLI_QUIET_ROW(struct args, quiet), CLI_END};

/* What the user wrote: "10G", "+1G" or "-1G". */
struct wish {
    char sign; /* '+', '-' or 0 */
    uint64_t bytes;
};

static int parse_wish(struct verb_ctx *ctx, const char *text, struct wish *w) {
    w->sign = *text == '+' || *text == '-' ? *text : 0;
    int rc = size_parse(text + (w->sign != 0), "size", &w->bytes, &ctx->err);
    if (rc < 0 && dialect_is_qemu())
        return dialect_bad_size(ctx, text);
    return rc;
}

static int new_size(struct verb_ctx *ctx, const struct wish *w, const struct node *n,
                    uint64_t *out) {
    bool fits = true;
    *out = w->bytes;
    if (w->sign == '+')
        fits = ck_add(n->size, w->bytes, out) && *out <= INT64_MAX;
    else if (w->sign == '-')
        fits = ck_sub(n->size, w->bytes, out) && *out;
    else
        fits = w->bytes > 0;
    if (fits)
        return 0;
    if (dialect_is_qemu())
        return err_set(&ctx->err, EINVAL, "New image size must be positive");
    return err_set(&ctx->err, EINVAL,
                   "%s: the new size must be between 1 and %" PRId64 " bytes (it is %" PRIu64
                   " now)",
                   n->filename, INT64_MAX, n->size);
}

static int check_direction(struct verb_ctx *ctx, const struct node *n, uint64_t size) {
    const struct args *a = ctx->args;
    if (size >= n->size)
        return 0;
    if (a->preallocation != PREALLOC_OFF)
        return err_set(&ctx->err, EINVAL,
                       cli_words("--preallocation applies to a disk that grows, not to one that is "
                                 "made smaller",
                                 "Preallocation can only be used for growing images"));
    if (a->shrink)
        return 0;
    if (dialect_is_qemu()) {
        err_set(&ctx->err, EINVAL, "Use the --shrink option to perform a shrink operation.");
        cli_print_error(ctx, &ctx->err);
        cli_print_warning(ctx, "Shrinking an image will delete all data beyond the shrunken "
                               "image's end. Before performing such an operation, make sure "
                               "there is no important data there.");
        return 1;
    }
    err_set(&ctx->err, EINVAL,
            "%s: the disk would become smaller, from %" PRIu64 " to %" PRIu64 " bytes", n->filename,
            n->size, size);
    err_hint(&ctx->err, "--shrink allows it; what lies behind the new end is lost");
    return -EINVAL;
}

static int resize_node_co(struct verb_ctx *ctx, struct node *n, const struct wish *w) {
    const struct args *a = ctx->args;
    uint64_t size;
    int rc = new_size(ctx, w, n, &size);
    if (rc == 0)
        rc = check_direction(ctx, n, size);
    if (rc)
        return rc;
    if (dialect_is_qemu() && a->preallocation == PREALLOC_METADATA && n->granularity == 1)
        return err_set(&ctx->err, EINVAL, "Unsupported preallocation mode: metadata");
    if (dialect_is_qemu() && size % 512 && n->granularity > 1)
        return err_set(&ctx->err, EINVAL, "The new size must be a multiple of 512");
    rc = disk_resize_co(n, size, a->preallocation, &ctx->err);
    if (rc < 0)
        return err_prefix(&ctx->err, "%s", n->filename);
    rc = bitmap_store_co(n, &ctx->err);
    if (rc < 0)
        return err_prefix(&ctx->err, "%s", n->filename);
    rc = disk_flush_co(n);
    if (rc < 0)
        return err_errno(&ctx->err, -rc, "%s: flushing", n->filename);
    if (!a->quiet)
        puts("Image resized.");
    return 0;
}

static int resize_run_co(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    struct wish w;
    struct node *n;
    int rc = parse_wish(ctx, ctx->pos[1], &w);
    if (rc < 0)
        return rc;
    rc = cli_open_co(ctx, ctx->pos[0], &a->image, OPEN_RW, &n);
    if (rc < 0)
        return rc;
    dialect_warn_guessed(ctx, n);
    rc = resize_node_co(ctx, n, &w);
    node_unref_co(n);
    return rc;
}

static const char *const details[] = {
    "SIZE is the new size of the disk, or with + or - the difference to the present one. File "
    "systems and partitions inside must be made smaller before the disk is, and can be made larger "
    "after it has grown.",
    NULL};

static const struct cli_example examples[] = {
    {"strata resize disk.qcow2 +10G", "Ten GiB more."},
    {"strata resize -f raw --shrink disk.raw 8G", "Cut a raw disk off behind 8 GiB."},
    {NULL, NULL}};

const struct verb verb_resize = {
    .name = "resize",
    .summary = "make the disk in an image larger or smaller",
    .synopsis = "FILE [+|-]SIZE",
    .pos_min = 2,
    .pos_max = 2,
    .pos_negative = true,
    .opts = opts,
    .args_size = sizeof(struct args),
    .details = details,
    .examples = examples,
    .run_co = resize_run_co,
};
