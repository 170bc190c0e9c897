/* SPDX-License-Identifier: MIT */
/*
 * dd: a part of an image, in blocks, as a new image.
 *
 * The operands are those of dd(1): if= of= bs= count= skip=.  What is done is a conversion of a
 * window of the source, so holes stay holes and the target gets its name when it is whole.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include "base/ck.h"
#include "base/size.h"
#include "base/strbuf.h"
#include "cli/cli.h"
#include "cli/convert.h"
#include "cli/dialect.h"
#include "disk/driver.h"
#include "disk/open.h"

struct args {
    struct cli_image image;
    const char *out_format;
};
static const struct cli_opt opts[] = {CLI_IMAGE_ROWS(struct args, image),
                                      CLI_STR(struct args, out_format, 'O', "target-format", "FMT",
                                              "format of the target (default: raw)"),
                                      CLI_END};

struct operands {
    char *in, *out;
    uint64_t bs, count, skip;
    bool counted;
};

static const char *const operand_names[] = {"if", "of", "bs", "count", "skip", NULL};

static int parse_number(struct verb_ctx *ctx, const char *name, const char *value, uint64_t *out) {
    int rc = size_parse(value, name, out, &ctx->err);
    return rc < 0 && dialect_is_qemu() ? dialect_bad_number(ctx, name) : rc;
}

static int unknown_operand(struct verb_ctx *ctx, const char *name) {
    struct str_nearest near = {0};
    if (dialect_is_qemu())
        return err_set(&ctx->err, EINVAL, "unrecognized operand %s", name);
    for (int i = 0; operand_names[i]; i++)
        str_nearest_offer(&near, name, operand_names[i]);
    err_set(&ctx->err, EINVAL, "unknown operand '%s': they are if, of, bs, count and skip", name);
    if (near.best)
        err_hint(&ctx->err, "did you mean '%s'?", near.best);
    return -EINVAL;
}

static int parse_operand(struct verb_ctx *ctx, char *arg, struct operands *o) {
    char *eq = strchr(arg, '=');
    char *name AUTO_FREE = xstrndup(arg, eq ? (size_t)(eq - arg) : strlen(arg));
    if (!eq)
        return unknown_operand(ctx, name);
    if (!strcmp(name, "if"))
        o->in = eq + 1;
    else if (!strcmp(name, "of"))
        o->out = eq + 1;
    else if (!strcmp(name, "bs"))
        return parse_number(ctx, name, eq + 1, &o->bs);
    else if (!strcmp(name, "skip"))
        return parse_number(ctx, name, eq + 1, &o->skip);
    else if (!strcmp(name, "count")) {
        o->counted = true;
        return parse_number(ctx, name, eq + 1, &o->count);
    } else {
        return unknown_operand(ctx, name);
    }
    return 0;
}

static int check_operands(struct verb_ctx *ctx, const struct operands *o) {
    if (!o->in || !o->out)
        return err_set(&ctx->err, EINVAL,
                       cli_words("if=FILE and of=FILE are needed",
                                 "Must specify both input and output files"));
    if (o->bs < 1 || o->bs > INT32_MAX)
        return dialect_is_qemu()
                   ? err_set(&ctx->err, EINVAL,
                             "Invalid bs specified. Must be between 1 and 2147483647.")
                   : err_set(&ctx->err, EINVAL, "bs=%" PRIu64 " is not between 1 and 2147483647",
                             o->bs);
    return 0;
}

static int dd_run_co(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    struct operands o = {.bs = 512};
    int rc = 0;
    for (int i = 0; rc == 0 && i < ctx->pos_n; i++)
        rc = parse_operand(ctx, ctx->pos[i], &o);
    if (rc == 0)
        rc = check_operands(ctx, &o);
    if (rc < 0)
        return rc;
    struct convert_args c = {
        .src = a->image, .out_format = a->out_format, .sparse = 4096, .windowed = true};
    /* A product too large to write down is behind the end of any disk. */
    if (!ck_mul(o.bs, o.skip, &c.skip))
        c.skip = INT64_MAX;
    if (!ck_mul(o.bs, o.count, &c.count))
        c.count = INT64_MAX;
    c.limited = o.counted;
    char *names[] = {o.in, o.out, NULL};
    return convert_with_co(ctx, &c, names, 2);
}

static const char *const details[] = {
    "Copies blocks of the disk in one image into a new image. bs is the size of a block (default "
    "512), skip the number of blocks left out at the start, count how many are copied (default: "
    "all that follow). Numbers take suffixes: bs=1M.",
    NULL};

static const struct cli_example examples[] = {
    {"strata dd if=disk.qcow2 of=boot.raw bs=1M skip=1 count=512",
     "Take 512 MiB out of a disk, from 1 MiB on."},
    {NULL, NULL}};

const struct verb verb_dd = {
    .name = "dd",
    .summary = "copy a part of an image, in blocks",
    .synopsis = "if=FILE of=FILE [bs=SIZE] [count=N] [skip=N]",
    .pos_min = 0,
    .pos_max = -1,
    .opts = opts,
    .args_size = sizeof(struct args),
    .details = details,
    .examples = examples,
    .run_co = dd_run_co,
};
