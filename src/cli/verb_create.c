/* SPDX-License-Identifier: MIT */
/*
 * create: a new, empty image.
 *
 * The options -b, -F and SIZE become keys of the same tree as -o, so there is one place that checks
 * them: the format's table.  A backing file is opened by the name that will be recorded, from the
 * new image's folder, to see that it is there and how large it is; -u skips that.  Its own backing
 * file is not opened.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>
#include "base/size.h"
#include "base/strbuf.h"
#include "cli/cli.h"
#include "cli/dialect.h"
#include "disk/node.h"
#include "disk/open.h"

struct args {
    const char *format, *backing, *backing_format;
    struct cli_list options;
    bool unsafe, quiet;
};
static const struct cli_opt opts[] = {
    CLI_STR(struct args, format, 'f', "format", "FMT", "format of the new image (default raw)"),
    CLI_STR(struct args, backing, 'b', "backing", "FILE",
            "backing file: what the image reads as where nothing was written"),
    CLI_STR(struct args, backing_format, 'F', "backing-format", "FMT",
            "format of the backing file; needed with -b"),
    CLI_LIST(struct args, options, 'o', "options", "KEY=VALUE,...",
             "options of the format; 'help' lists them"),
    CLI_FLAG(struct args, unsafe, 'u', "unsafe", "do not open the backing file; SIZE is needed"),
    CLI_QUIET_ROW(struct args, quiet),
    CLI_END};

static bool format_has(const struct driver *d, const char *key) {
    for (const struct opt *o = d->create_opts; o && o->name; o++)
        if (!strcmp(o->name, key))
            return true;
    return false;
}

static int find_format(struct verb_ctx *ctx, const char *name, const struct driver **out) {
    *out = driver_find(name);
    if (*out && (*out)->kind == DRIVER_FORMAT)
        return 0;
    struct str_nearest near = {0};
    for (int i = 0; driver_table[i]; i++)
        if (driver_table[i]->kind == DRIVER_FORMAT)
            str_nearest_offer(&near, name, driver_table[i]->name);
    err_set(&ctx->err, EINVAL, "unknown format '%s'", name);
    if (near.best)
        err_hint(&ctx->err, "did you mean '%s'?", near.best);
    return -EINVAL;
}

/* Puts a value that has an option of its own into the tree; twice is a mistake. */
static int put(struct verb_ctx *ctx, json_t *tree, const struct driver *d, const char *key,
               const char *flag, const char *value) {
    if (!value)
        return 0;
    if (!format_has(d, key))
        return err_set(&ctx->err, EINVAL, "%s does not apply to format '%s': it has no option '%s'",
                       flag, d->name, key);
    if (json_object_get(tree, key))
        return err_set(&ctx->err, EINVAL, "%s and -o %s=... say the same: give one of them", flag,
                       key);
    json_object_set_new_nocheck(tree, key, json_string_nocheck(value));
    return 0;
}

static bool same_file(const char *a, const char *b) {
    struct stat sa, sb;
    return !stat(a, &sa) && !stat(b, &sb) && sa.st_dev == sb.st_dev && sa.st_ino == sb.st_ino;
}

/* Opens the backing file as the image will name it; *size is its size. */
static int look_at_backing_co(struct verb_ctx *ctx, const char *image, const char *name,
                              const char *format, uint64_t *size) {
    char *full AUTO_FREE = backing_resolve(image, name, &ctx->err);
    if (!full)
        return -ctx->err.code;
    if (same_file(image, full))
        return err_set(&ctx->err, EINVAL, "the image cannot be its own backing file");
    struct open_req req = {
        .name = full, .format = format, .flags = OPEN_NO_BACKING | OPEN_NO_DATA, .gate = GATE_NONE};
    struct node *n;
    int rc = node_open_co(&req, &n, &ctx->err);
    if (rc < 0) {
        err_hint(&ctx->err, "-u creates the image without looking at its backing file");
        return err_prefix(&ctx->err, "backing file");
    }
    *size = n->size;
    if (!format) {
        err_set(&ctx->err, EINVAL, "backing file '%s' is given without its format", name);
        err_hint(&ctx->err, "it looks like %s: if that is right, add -F %s", n->drv->name,
                 n->drv->name);
        rc = -EINVAL;
    }
    node_unref_co(n);
    return rc;
}

static int check_backing_co(struct verb_ctx *ctx, const struct driver *d, json_t *tree,
                            bool *has_size, uint64_t *size) {
    const struct args *a = ctx->args;
    const char *name = json_string_value(json_object_get(tree, "backing_file"));
    const char *format = json_string_value(json_object_get(tree, "backing_fmt"));
    if (!name && format) {
        int rc = dialect_create_announce(ctx, d, tree, a->quiet);
        return rc < 0 ? rc : err_set(&ctx->err, EINVAL, "-F needs a backing file (-b)");
    }
    if (!name)
        return 0;
    const struct driver *backing;
    if (format) {
        int rc = find_format(ctx, format, &backing);
        if (rc < 0)
            return err_prefix(&ctx->err, "option '-F'");
    }
    if (a->unsafe) {
        if (!format)
            return err_set(&ctx->err, EINVAL, "backing file '%s' is given without its format (-F)",
                           name);
        return 0;
    }
    uint64_t backing_size = 0;
    int rc = look_at_backing_co(ctx, ctx->pos[0], name, format, &backing_size);
    if (rc == 0 && !*has_size) {
        *size = backing_size;
        *has_size = true;
        json_object_set_new(tree, "size", json_integer((json_int_t)backing_size));
    }
    return rc;
}

static int put_size(struct verb_ctx *ctx, json_t *tree, bool *has_size, uint64_t *size) {
    const json_t *given = json_object_get(tree, "size");
    const char *text = json_string_value(given);
    if (ctx->pos_n > 1) {
        if (given)
            return err_set(&ctx->err, EINVAL,
                           "SIZE and -o size=... say the same: give one of them");
        text = ctx->pos[1];
    }
    if (!text)
        return 0;
    int rc = size_parse(text, "size", size, &ctx->err);
    if (rc < 0)
        return dialect_image_size(ctx);
    *has_size = true;
    json_object_set_new(tree, "size", json_integer((json_int_t)*size));
    return 0;
}

static void print_created(const struct verb_ctx *ctx, const char *format, const json_t *tree,
                          uint64_t size) {
    char *name AUTO_FREE = cli_safe(ctx->pos[0]);
    printf("Formatting '%s', fmt=%s size=%" PRIu64, name, format, size);
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)tree, key, value) {
        if (!json_is_string(value))
            continue;
        char *safe AUTO_FREE = cli_safe(json_string_value(value));
        printf(" %s=%s", key, safe);
    }
    putchar('\n');
}

static int create_with_tree_co(struct verb_ctx *ctx, const char *format, const struct driver *d,
                               json_t *tree) {
    const struct args *a = ctx->args;
    bool has_size = false;
    uint64_t size = 0;
    int rc = put(ctx, tree, d, "backing_file", "-b", a->backing);
    if (!rc)
        rc = put(ctx, tree, d, "backing_fmt", "-F", a->backing_format);
    if (!rc)
        rc = put_size(ctx, tree, &has_size, &size);
    if (!rc)
        rc = check_backing_co(ctx, d, tree, &has_size, &size);
    if (!rc && !has_size) {
        rc = err_set(&ctx->err, EINVAL, "a size is missing");
        err_hint(&ctx->err, "strata create -f %s %s 10G", format, ctx->pos[0]);
    }
    if (!rc)
        rc = dialect_create_announce(ctx, d, tree, a->quiet);
    if (!rc)
        rc = disk_create_co(ctx->pos[0], format, tree,
                            CREATE_REPLACE | (dialect_is_qemu() ? CREATE_FIRST_BLOCK : 0),
                            &ctx->err);
    if (!rc && !a->quiet && !dialect_is_qemu())
        print_created(ctx, format, tree, size);
    return rc;
}

static int create_image_co(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    const char *format = a->format ? a->format : "raw";
    const struct driver *d;
    json_t *tree;
    if (cli_options_want_help(&a->options))
        return cli_print_create_help(ctx, format);
    if (!ctx->pos_n && dialect_is_qemu())
        return dialect_usage(ctx, "Expecting image file name");
    if (!ctx->pos_n)
        return err_set(&ctx->err, EINVAL, "arguments are missing: create takes FILE [SIZE]");
    int rc = find_format(ctx, format, &d);
    if (!rc && (!d->format->create_co || !d->create_opts))
        rc = err_set(&ctx->err, ENOTSUP,
                     cli_words("images of format '%s' cannot be created",
                               "Format driver '%s' does not support image creation"),
                     d->name);
    if (!rc)
        rc = cli_options(ctx, &a->options, &tree);
    if (rc < 0)
        return rc;
    rc = create_with_tree_co(ctx, format, d, tree);
    json_decref(tree);
    return rc;
}

static int create_run_co(struct verb_ctx *ctx) {
    int rc = create_image_co(ctx);
    if (rc < 0 && ctx->pos_n && dialect_is_qemu()) {
        char *before AUTO_FREE = xasprintf("%s: ", ctx->pos[0]);
        dialect_create_error(ctx, ctx->pos[0], before);
    }
    return rc;
}

static const char *const details[] = {
    "The image appears under its name only when it is complete; a file that is there already is "
    "replaced, unless somebody has it open.",
    "SIZE is a number of bytes or takes a suffix: 10G. With a backing file it may be left out: the "
    "image is then as large as its backing file. A relative name of a backing file is looked up "
    "from the new image's folder, as it will be each time the image is opened.",
    NULL};

static const struct cli_example examples[] = {
    {"strata create -f qcow2 disk.qcow2 20G", "An empty disk of 20 GiB that grows as it is used."},
    {"strata create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2",
     "An overlay: reads from base.qcow2, keeps what is written."},
    {"strata create -f qcow2 -o help", "List the options of qcow2."},
    {NULL, NULL}};

const struct verb verb_create = {
    .name = "create",
    .summary = "make a new, empty image",
    .synopsis = "FILE [SIZE]",
    .pos_min = 0, /* -o help needs none */
    .pos_max = 2,
    .opts = opts,
    .args_size = sizeof(struct args),
    .details = details,
    .examples = examples,
    .run_co = create_run_co,
};
