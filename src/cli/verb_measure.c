/* SPDX-License-Identifier: MIT */
/*
 * measure: how many bytes a new image will need, empty or as the copy of an existing one.
 *
 * The driver's measure slot knows what its metadata takes; what a copy of the source would write is
 * counted by job/measure.c: the data of its whole chain, rounded out to the units of the target, as
 * far as the maps tell, or (--scan) as the bytes are.  A target with a backing file may share none
 * of it, so then all of the disk counts.
 *
 * The numbers are the lengths of the files that convert leaves.  Under the drop-in name they are
 * those of qemu-img, which are never smaller than what it writes itself.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/opt.h"
#include "base/size.h"
#include "cli/cli.h"
#include "cli/dialect.h"
#include "cli/snapshots.h"
#include "disk/bitmap.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "job/measure.h"

#define SIZE_UNSET UINT64_MAX

struct args {
    struct cli_image image;
    const char *target_format, *snapshot;
    struct cli_list options;
    uint64_t size;
    bool scan;
    int output;
};
static const struct cli_opt opts[] = {
    CLI_IMAGE_ROWS(struct args, image),
    CLI_OUTPUT_ROW(struct args, output),
    CLI_STR(struct args, target_format, 'O', "target-format", "FMT",
            "format of the new image (default: raw)"),
    CLI_LIST(struct args, options, 'o', "options", "KEY=VALUE,...",
             "create options of the new image; -o help lists them"),
    CLI_SIZE(struct args, size, 0, "size", "SIZE", SIZE_UNSET, 0, INT64_MAX,
             "size of the disk of a new, empty image"),
    CLI_FLAG(struct args, scan, 0, "scan",
             "read the data, too, and do not count what turns out to be zeros"),
    CLI_STR(struct args, snapshot, 'l', "snapshot", "SNAPSHOT",
            "measure this internal snapshot of FILE: snapshot.id=ID, snapshot.name=NAME, or one of "
            "the two alone"),
    CLI_END};

/* The create options of the target, filled. */
struct target {
    const struct driver *drv;
    void *opts;
    uint64_t unit; /* bytes of data are rounded out to this */
    bool has_backing, may_have_bitmaps;
};

static void target_free(struct target *t) {
    if (t->opts)
        opt_free(t->drv->create_opts, t->opts);
    free(t->opts);
}

static const void *target_field(const struct target *t, const char *key, enum opt_type type) {
    for (const struct opt *o = t->drv->create_opts; o && o->name; o++)
        if (!strcmp(o->name, key) && o->type == type)
            return (const char *)t->opts + o->offset;
    return NULL;
}

static int find_format(struct verb_ctx *ctx, const char *name, const struct driver **out) {
    const struct driver *d = driver_find(name);
    if (!d || d->kind != DRIVER_FORMAT)
        return err_set(&ctx->err, EINVAL,
                       cli_words("unknown format '%s'", "Unknown file format '%s'"), name);
    /* Nor does that program measure all that it creates. */
    bool there = !strcmp(name, "raw") || !strcmp(name, "qcow2") || !strcmp(name, "luks");
    if (!d->format->measure || !d->create_opts || (dialect_is_qemu() && !there))
        return err_set(&ctx->err, ENOTSUP,
                       cli_words("images of format '%s' cannot be measured",
                                 "Block driver '%s' does not support size measurement"),
                       name);
    *out = d;
    return 0;
}

static int target_fill(struct verb_ctx *ctx, json_t *tree, struct target *t) {
    t->opts = xcalloc(1, t->drv->create_opts_size);
    int rc = opt_fill(t->drv->create_opts, tree, OPT_CREATE, create_file_keys, t->opts, &ctx->err);
    if (rc < 0) {
        free(t->opts);
        t->opts = NULL;
        return dialect_options_error(ctx);
    }
    const uint64_t *cluster = target_field(t, "cluster_size", OPT_T_SIZE);
    t->unit = cluster && *cluster ? *cluster : 1;
    char *const *backing = target_field(t, "backing_file", OPT_T_STR);
    t->has_backing = backing && *backing && **backing;
    const char *compat = json_string_value(json_object_get(tree, "compat"));
    t->may_have_bitmaps = !strcmp(t->drv->name, "qcow2") &&
                          !(compat && (!strcmp(compat, "0.10") || !strcmp(compat, "v2")));
    return 0;
}

/*
 * Room that the persistent bitmaps of `n` take in a qcow2 image with clusters of `unit` bytes, each
 * with all of its data: data, tables, directory.  Damaged ones count, as there.
 */
static uint64_t bitmaps_size(const struct node *n, uint64_t unit) {
    uint64_t sum = 0, directory = 0;
    for (const struct bitmap *b = NULL; (b = bitmap_next(n, b));) {
        if (!b->persistent)
            continue;
        uint64_t clusters = div_up(div_up(b->bits, 8), unit);
        sum += clusters * unit + align_up(clusters * 8, unit);
        directory += align_up(24 + strlen(b->name), 8);
    }
    return sum + align_up(directory, unit);
}

static int source_data_co(struct verb_ctx *ctx, const struct target *t, struct measure_in *in,
                          bool *bitmaps, uint64_t *bitmap_bytes) {
    const struct args *a = ctx->args;
    struct node *n;
    int rc = cli_open_snapshot_co(ctx, ctx->pos[0], &a->image, 0, a->snapshot, &n);
    if (rc < 0)
        return rc;
    *bitmaps = t->may_have_bitmaps && n->drv->format->bitmap_check;
    if (*bitmaps)
        *bitmap_bytes = bitmaps_size(n, t->unit);
    if (t->has_backing)
        measure_plain(n->size, true, in);
    else
        rc = measure_source_co(n, t->unit, a->scan, in, &ctx->err);
    node_unref_co(n);
    return rc;
}

static void print_result(int output, const struct measure_result *m, bool bitmaps,
                         uint64_t bitmap_bytes) {
    if (output == OUTPUT_JSON) {
        json_t *j = json_object();
        if (bitmaps)
            json_object_set_new(j, "bitmaps", json_integer((json_int_t)bitmap_bytes));
        json_object_set_new(j, "required", json_integer((json_int_t)m->required));
        json_object_set_new(j, "fully-allocated", json_integer((json_int_t)m->fully_allocated));
        cli_print_json(j);
        return;
    }
    printf("required size: %" PRIu64 "\nfully allocated size: %" PRIu64 "\n", m->required,
           m->fully_allocated);
    if (bitmaps)
        printf("bitmaps size: %" PRIu64 "\n", bitmap_bytes);
}

static int check_args(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    bool sized = a->size != SIZE_UNSET;
    if (!ctx->pos_n && (a->image.image_opts || a->image.format || a->snapshot))
        return err_set(&ctx->err, EINVAL,
                       cli_words("-f, -l and --image-opts go with a FILE",
                                 "--image-opts, -f, and -l require a filename argument."));
    if (!ctx->pos_n && !sized)
        return err_set(&ctx->err, EINVAL,
                       cli_words("a FILE or --size is needed",
                                 "Either --size N or one filename must be specified."));
    if (ctx->pos_n && sized)
        return err_set(&ctx->err, EINVAL,
                       cli_words("--size and a FILE exclude each other",
                                 "--size N cannot be used together with a filename."));
    return 0;
}

static int measure_run_co(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    struct target t = {0};
    const char *format = a->target_format ? a->target_format : "raw";
    if (cli_options_want_help(&a->options) && (!dialect_is_qemu() || ctx->pos_n))
        return cli_print_create_help(ctx, format);
    json_t *tree = NULL;
    struct measure_in in;
    uint64_t bitmap_bytes = 0;
    bool bitmaps = false;
    struct measure_result m = {0};
    int rc = check_args(ctx);
    if (rc == 0)
        rc = find_format(ctx, format, &t.drv);
    if (rc == 0)
        rc = cli_options(ctx, &a->options, &tree);
    if (rc == 0)
        rc = target_fill(ctx, tree, &t);
    if (rc == 0 && ctx->pos_n)
        rc = source_data_co(ctx, &t, &in, &bitmaps, &bitmap_bytes);
    else if (rc == 0)
        measure_plain(a->size, false, &in);
    if (rc == 0)
        rc = t.drv->format->measure(t.opts, &in, &m, &ctx->err);
    if (rc == 0 && dialect_is_qemu()) {
        m.required = m.bound_required;
        m.fully_allocated = m.bound_fully;
    }
    if (rc == 0)
        print_result(a->output, &m, bitmaps, bitmap_bytes);
    target_free(&t);
    json_decref(tree);
    return rc;
}

static const char *const details[] = {
    "Says how long the file of a new image will be: \"required\" with what the source holds now, "
    "\"fully allocated\" when all of the disk has been written; for example to make a logical "
    "volume for the image.",
    "Without compression, the file that convert then makes has exactly that length, where the data "
    "of the source are not zeros. With --scan they are read to see that. A target with a backing "
    "file is taken for full.",
    NULL};

static const struct cli_example examples[] = {
    {"strata measure -O qcow2 --size 100G", "For a new, empty disk of 100 GiB."},
    {"strata measure -O qcow2 disk.raw", "For the copy of an existing one."},
    {NULL, NULL}};

const struct verb verb_measure = {
    .name = "measure",
    .summary = "say how many bytes a new image will need",
    .synopsis = "[FILE]",
    .pos_min = 0,
    .pos_max = 1,
    .opts = opts,
    .args_size = sizeof(struct args),
    .details = details,
    .examples = examples,
    .run_co = measure_run_co,
};
