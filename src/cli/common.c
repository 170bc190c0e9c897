/* SPDX-License-Identifier: MIT */
/*
 * What verbs share: opening the image a user named, -o texts, and printing.
 *
 * All words for people go through here, so that they have one form: "strata: VERB: text", the hint
 * on a line of its own.  Names pass strbuf_put_safe on their way to a terminal.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include "base/log.h"
#include "base/opt.h"
#include "base/strbuf.h"
#include "cli/cli.h"
#include "cli/dialect.h"
#include "disk/driver.h"
#include "disk/open.h"

const char *const cli_output_names[] = {"human", "json", NULL};

int cli_open_co(struct verb_ctx *ctx, const char *name, const struct cli_image *image,
                unsigned open_flags, struct node **out) {
    return cli_open_with_co(ctx, name, image, open_flags, NULL, out);
}

int cli_open_with_co(struct verb_ctx *ctx, const char *name, const struct cli_image *image,
                     unsigned open_flags, const json_t *options, struct node **out) {
    json_t *tree = NULL;
    if (image->image_opts) {
        if (image->format)
            return err_set(&ctx->err, EINVAL,
                           cli_words("-f and --image-opts exclude each other: write driver=%s into "
                                     "the name",
                                     "--image-opts and --format are mutually exclusive%.0s"),
                           image->format);
        int rc = opt_parse_keyval(name, NULL, &tree, &ctx->err);
        if (rc < 0)
            return rc;
    }
    if (tree && options)
        json_object_update_recursive(tree, (json_t *)options);
    struct open_req req = {
        .name = tree ? NULL : name,
        .options = tree ? tree : options,
        .format = image->format,
        .flags = open_flags | (image->force_share ? OPEN_FORCE_SHARE : 0) |
                 (dialect_is_qemu() ? OPEN_SECTORS : 0),
        .cache = image->cache,
        .gate = dialect_is_qemu() ? GATE_ANY : (enum gate)image->trust,
    };
    int rc = node_open_co(&req, out, &ctx->err);
    json_decref(tree);
    if (rc < 0)
        dialect_open_error(ctx, name, image->format,
                           strcmp(dialect_program(), "qemu-nbd") ? "Could not open"
                                                                 : "Failed to blk_new_open");
    return rc;
}

/* ---- -o ---- */

int cli_options(struct verb_ctx *ctx, const struct cli_list *list, json_t **out) {
    json_t *tree = json_object();
    for (size_t i = 0; i < list->n; i++) {
        if (!dialect_option_list_ok(ctx, list->v[i])) {
            json_decref(tree);
            return -EINVAL;
        }
        int rc = opt_parse_keyval(list->v[i], NULL, &tree, &ctx->err);
        if (rc < 0) {
            json_decref(tree);
            return err_prefix(&ctx->err, "option '-o'");
        }
    }
    *out = tree;
    return 0;
}

bool cli_options_want_help(const struct cli_list *list) {
    for (size_t i = 0; i < list->n; i++)
        for (const char *s = list->v[i]; s;) {
            size_t len = strcspn(s, ",");
            if ((len == 4 && !strncmp(s, "help", 4)) || (len == 1 && *s == '?'))
                return true;
            s = s[len] ? s + len + 1 : NULL;
        }
    return false;
}

int cli_print_create_help(struct verb_ctx *ctx, const char *format) {
    const struct driver *d = format ? driver_find(format) : NULL;
    if (!d || d->kind != DRIVER_FORMAT) {
        char *safe AUTO_FREE = cli_safe(format ? format : "");
        err_set(&ctx->err, EINVAL,
                format ? cli_words("unknown format '%s'", "Unknown file format '%s'")
                       : "a format is missing%s",
                safe);
        err_hint(&ctx->err, "'strata --help' lists the formats");
        return -EINVAL;
    }
    if (!d->create_opts || !d->format->create_co)
        return err_set(&ctx->err, ENOTSUP, "images of format '%s' cannot be created", d->name);
    bool file = ctx->pos_n > 0;
    if (file && dialect_is_qemu())
        puts("Supported options:");
    else
        printf(cli_words("Options for creating %s images:\n", "Supported %s options:\n"), d->name);
    if (dialect_option_help(d, OPT_CREATE, file)) {
        if (!file)
            puts("\nThe protocol level may support further options.\n"
                 "Specify the target filename to include those options.");
        return 0;
    }
    opt_print_help(d->create_opts, OPT_CREATE, stdout);
    opt_print_help(create_file_rows, OPT_CREATE, stdout);
    return 0;
}

/* ---- printing ---- */

char *cli_safe(const char *name) {
    struct strbuf b = STRBUF_INIT;
    strbuf_put_safe(&b, name, strlen(name));
    return strbuf_steal(&b);
}

static void print_line(const struct verb_ctx *ctx, const char *kind, const char *text) {
    struct strbuf b AUTO_STRBUF = STRBUF_INIT;
    strbuf_printf(&b, "%s: ", dialect_program());
    if (ctx && ctx->verb && !dialect_is_qemu())
        strbuf_printf(&b, "%s: ", ctx->verb->name);
    strbuf_puts(&b, kind);
    /* Errors quote file names and image contents; whoever made the text may have forgotten. */
    strbuf_put_safe(&b, text, strlen(text));
    strbuf_puts(&b, "\n");
    /* What went to a terminal on standard output stays before this line. */
    fflush(stdout);
    fwrite(b.s, 1, b.len, stderr);
}

void cli_print_error(const struct verb_ctx *ctx, const struct err *e) {
    if (dialect_is_qemu()) {
        const char *theirs = dialect_sentence(ctx ? ctx->verb : NULL, err_text(e));
        struct err said = {e->code, (char *)theirs, e->hint};
        dialect_print_error(theirs ? &said : e);
        return;
    }
    print_line(ctx, "", err_text(e));
    if (e->hint) {
        char *safe AUTO_FREE = cli_safe(e->hint);
        fprintf(stderr, "  %s\n", safe);
    }
}

void cli_print_note(const struct verb_ctx *ctx, const char *fmt, ...) {
    char *text = NULL;
    va_list ap;
    va_start(ap, fmt);
    if (vasprintf(&text, fmt, ap) >= 0)
        print_line(ctx, "", text);
    va_end(ap);
    free(text);
}

void cli_print_warning(const struct verb_ctx *ctx, const char *fmt, ...) {
    char *text = NULL;
    va_list ap;
    va_start(ap, fmt);
    if (vasprintf(&text, fmt, ap) >= 0)
        print_line(ctx, "warning: ", text);
    va_end(ap);
    free(text);
}

json_t *cli_json_name(const char *name) {
    if (!name)
        return json_null();
    json_t *j = json_string(name);
    if (j)
        return j;
    char *safe AUTO_FREE = cli_safe(name);
    return json_string(safe);
}

void cli_print_json(json_t *j) {
    json_dumpf(j, stdout, JSON_INDENT(4));
    putchar('\n');
    json_decref(j);
}
