/* SPDX-License-Identifier: MIT */
/*
 * Command line to a verb's struct, by its table.
 *
 * Accepted spellings: -x, -xVALUE, -x VALUE, bundles of flags (-pq, -pf raw), --name, --name=VALUE,
 * --name VALUE; options and positional arguments in any order; "--" ends the options; "-" alone is
 * positional.  A repeated option: the last wins, except lists.  Long names are not abbreviated: a
 * script that works today must work when there are more options.
 *
 * Texts stay in argv (borrowed); only the arrays of lists and positional arguments are allocated.
 */
#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "base/log.h"
#include "base/size.h"
#include "base/strbuf.h"
#include "cli/cli.h"
#include "cli/dialect.h"

static void *field(const struct cli_opt *o, struct verb_ctx *ctx) {
    return (char *)ctx->args + o->offset;
}

#define for_each_row(o, v)                                                                         \
    for (const struct cli_opt *o = (v)->opts; o && (o->letter || o->name); o++)

static void set_defaults(struct verb_ctx *ctx) {
    for_each_row(o, ctx->verb) {
        if (o->type == CLI_T_SIZE || o->type == CLI_T_U64)
            *(uint64_t *)field(o, ctx) = o->def;
        else if (o->type == CLI_T_ENUM)
            *(int *)field(o, ctx) = (int)o->def;
    }
}

/* ---- values ---- */

static int bad_enum(struct verb_ctx *ctx, const struct cli_opt *o, const char *shown,
                    const char *value) {
    char *safe AUTO_FREE = cli_safe(value);
    struct strbuf names AUTO_STRBUF = STRBUF_INIT;
    struct str_nearest near = {0};
    for (int i = 0; o->names[i]; i++) {
        strbuf_printf(&names, "%s%s", i ? ", " : "", o->names[i]);
        str_nearest_offer(&near, value, o->names[i]);
    }
    int rc = err_set(&ctx->err, EINVAL, "option '%s': '%s' is not one of %s", shown, safe, names.s);
    if (near.best)
        err_hint(&ctx->err, "did you mean '%s'?", near.best);
    return rc;
}

static int parse_u64(struct verb_ctx *ctx, const char *shown, const char *s, uint64_t *out) {
    char *end = NULL;
    errno = 0;
    if (isdigit((unsigned char)*s)) /* strtoull takes blanks and signs */
        *out = strtoull(s, &end, s[0] == '0' && (s[1] | 0x20) == 'x' ? 16 : 10);
    if (!end || *end || errno) {
        char *safe AUTO_FREE = cli_safe(s);
        return err_set(&ctx->err, EINVAL, "option '%s': '%s' is not a number", shown, safe);
    }
    return 0;
}

static int parse_number(struct verb_ctx *ctx, const struct cli_opt *o, const char *shown,
                        const char *value) {
    uint64_t v = 0;
    int rc = o->type == CLI_T_SIZE ? size_parse(value, "size", &v, &ctx->err)
                                   : parse_u64(ctx, shown, value, &v);
    if (rc < 0)
        return o->type == CLI_T_SIZE ? err_prefix(&ctx->err, "option '%s'", shown) : rc;
    if (v < o->min || v > o->max)
        return err_set(&ctx->err, EINVAL, "option '%s': %llu is not between %llu and %llu", shown,
                       (unsigned long long)v, (unsigned long long)o->min,
                       (unsigned long long)o->max);
    *(uint64_t *)field(o, ctx) = v;
    return 0;
}

static int store_value(struct verb_ctx *ctx, const struct cli_opt *o, const char *shown,
                       char *value, int argc) {
    switch (o->type) {
    case CLI_T_FLAG:
        *(bool *)field(o, ctx) = true;
        return 0;
    case CLI_T_STR:
        *(const char **)field(o, ctx) = value;
        return 0;
    case CLI_T_LIST:
    case CLI_T_STEP: {
        struct cli_list *l = field(o, ctx);
        if (!l->v)
            l->v = xcalloc((size_t)argc * 2, sizeof(l->v[0]));
        if (o->type == CLI_T_STEP)
            l->v[l->n++] = o->name;
        if (value)
            l->v[l->n++] = value;
        return 0;
    }
    case CLI_T_ENUM:
        for (int i = 0; o->names[i]; i++)
            if (!strcmp(o->names[i], value)) {
                *(int *)field(o, ctx) = i;
                return 0;
            }
        return bad_enum(ctx, o, shown, value);
    case CLI_T_SIZE:
    case CLI_T_U64:
        return parse_number(ctx, o, shown, value);
    }
    return 0;
}

static int store(struct verb_ctx *ctx, const struct cli_opt *o, const char *shown, char *value,
                 int argc) {
    int rc = store_value(ctx, o, shown, value, argc);
    return rc < 0 && dialect_is_qemu() ? dialect_bad_value(ctx, o, value) : rc;
}

/* ---- options ---- */

static bool takes_value(const struct cli_opt *o) {
    return o->type == CLI_T_STEP ? o->metavar != NULL : o->type != CLI_T_FLAG;
}

struct cursor {
    int argc, i;
    char **argv;
    bool help;
};

/* The value of option `shown`: what is attached, or the next argument. */
static int take_value(struct verb_ctx *ctx, struct cursor *c, const struct cli_opt *o,
                      const char *shown, char *attached, char **out) {
    if (!attached && c->i + 1 >= c->argc && dialect_is_qemu())
        return dialect_usage(ctx, "missing argument for option '%s'", shown);
    if (!attached && c->i + 1 >= c->argc)
        return err_set(&ctx->err, EINVAL, "option '%s' needs a value (%s)", shown, o->metavar);
    *out = attached ? attached : c->argv[++c->i];
    return 0;
}

static int unknown_long(struct verb_ctx *ctx, const char *name, const char *word) {
    if (dialect_is_qemu())
        return dialect_usage(ctx, "unrecognized option '--%s'", word);
    struct str_nearest near = {0};
    for_each_row(o, ctx->verb) if (o->name) str_nearest_offer(&near, name, o->name);
    str_nearest_offer(&near, name, "help");
    char *safe AUTO_FREE = cli_safe(name);
    int rc = err_set(&ctx->err, EINVAL, "unknown option '--%s'", safe);
    if (near.best)
        err_hint(&ctx->err, "did you mean '--%s'?", near.best);
    return rc;
}

/* Objects are for keys and certificates of images; see dialect_object(). */
static int parse_object(struct verb_ctx *ctx, struct cursor *c, char *eq) {
    if (!eq && c->i + 1 >= c->argc)
        return dialect_usage(ctx, "missing argument for option '--object'");
    return dialect_object(ctx, eq ? eq + 1 : c->argv[++c->i]);
}

static int parse_long(struct verb_ctx *ctx, struct cursor *c) {
    char *arg = c->argv[c->i] + 2, *eq = strchr(arg, '=');
    char *name AUTO_FREE = xstrndup(arg, eq ? (size_t)(eq - arg) : strlen(arg));
    const struct cli_opt *row = NULL;
    for_each_row(o, ctx->verb) if (o->name && !strcmp(o->name, name) &&
                                   !dialect_hides(ctx->verb, o)) row = o;
    if (!row)
        row = dialect_row(ctx->verb, 0, name);
    if (!row && !eq && !strcmp(name, "help")) {
        c->help = true;
        return 0;
    }
    if (!row)
        row = dialect_abbreviated(ctx->verb, name);
    if (!row && dialect_is_qemu() && !strcmp(name, "object"))
        return parse_object(ctx, c, eq);
    if (!row)
        return unknown_long(ctx, name, arg);
    char *shown AUTO_FREE = xasprintf("--%s", name), *value = NULL;
    if (!takes_value(row)) {
        if (eq)
            return err_set(&ctx->err, EINVAL, "option '%s' takes no value", shown);
    } else {
        int rc = take_value(ctx, c, row, shown, eq ? eq + 1 : NULL, &value);
        if (rc < 0)
            return rc;
    }
    return store(ctx, row, shown, value, c->argc);
}

static int parse_letters(struct verb_ctx *ctx, struct cursor *c) {
    for (char *p = c->argv[c->i] + 1; *p; p++) {
        const struct cli_opt *row = NULL;
        for_each_row(o, ctx->verb) if (o->letter == *p && !dialect_hides(ctx->verb, o)) row = o;
        if (!row)
            row = dialect_row(ctx->verb, *p, NULL);
        if (!row && *p == 'h') {
            c->help = true;
            continue;
        }
        if (!row && dialect_is_qemu())
            return dialect_usage(ctx, "unrecognized option '-%c'", *p);
        if (!row) {
            char *safe AUTO_FREE = cli_safe(p);
            /* All of the word when it looks like a long option with one dash lost. */
            int rc =
                err_set(&ctx->err, EINVAL, "unknown option '-%.*s'", *safe == '\\' ? 4 : 1, safe);
            for_each_row(o, ctx->verb) if (o->name && !strcmp(o->name, c->argv[c->i] + 1))
                err_hint(&ctx->err, "did you mean '--%s'?", o->name);
            return rc;
        }
        char shown[3] = {'-', *p, 0}, *value = NULL;
        if (takes_value(row)) {
            int rc = take_value(ctx, c, row, shown, p[1] ? p + 1 : NULL, &value);
            if (rc < 0)
                return rc;
        }
        int rc = store(ctx, row, shown, value, c->argc);
        if (rc < 0 || value)
            return rc;
    }
    return 0;
}

/* ---- all of it ---- */

static int check_positionals(struct verb_ctx *ctx) {
    const struct verb *v = ctx->verb;
    bool fits = ctx->pos_n >= v->pos_min && (v->pos_max < 0 || ctx->pos_n <= v->pos_max);
    if (!fits && dialect_is_qemu())
        return dialect_bad_positionals(ctx);
    if (ctx->pos_n < v->pos_min)
        return err_set(&ctx->err, EINVAL, "arguments are missing: %s takes %s", v->name,
                       v->synopsis);
    if (v->pos_max >= 0 && ctx->pos_n > v->pos_max) {
        char *safe AUTO_FREE = cli_safe(ctx->pos[v->pos_max]);
        return err_set(&ctx->err, EINVAL, "unexpected argument '%s'", safe);
    }
    return 0;
}

int cli_parse(struct verb_ctx *ctx, int argc, char **argv, bool *help) {
    const struct verb *v = ctx->verb;
    ctx->args = xcalloc(1, v->args_size);
    ctx->pos = xcalloc(argc + 1, sizeof(char *));
    ctx->rest = xcalloc(argc + 1, sizeof(char *));
    set_defaults(ctx);
    struct cursor c = {.argc = argc, .argv = argv};
    for (; c.i < argc; c.i++) {
        char *arg = argv[c.i];
        int rc = 0;
        if (!strcmp(arg, "--")) {
            for (c.i++; c.i < argc; c.i++)
                if (v->rest)
                    ctx->rest[ctx->rest_n++] = argv[c.i];
                else
                    ctx->pos[ctx->pos_n++] = argv[c.i];
        } else if (!strncmp(arg, "--", 2)) {
            rc = parse_long(ctx, &c);
        } else if (arg[0] == '-' && arg[1] &&
                   !(v->pos_negative && isdigit((unsigned char)arg[1]))) {
            rc = parse_letters(ctx, &c);
        } else {
            ctx->pos[ctx->pos_n++] = arg;
        }
        if (rc < 0)
            return rc;
    }
    *help = c.help;
    return c.help ? 0 : check_positionals(ctx);
}

void cli_parse_free(struct verb_ctx *ctx) {
    for_each_row(o, ctx->verb) if ((o->type == CLI_T_LIST || o->type == CLI_T_STEP) && ctx->args)
        free(steal(&((struct cli_list *)field(o, ctx))->v));
    free(ctx->args);
    free(ctx->pos);
    free(ctx->rest);
    err_clear(&ctx->err);
}
