/* SPDX-License-Identifier: MIT */
/*
 * create and the -o options of convert and measure in qemu-img's words: the "Formatting" line and
 * the texts of refusals.
 *
 * The line shows every option that has a value, defaults of qcow2 included, in that program's
 * order, and is printed before the file is made; values that cannot be read at all (a size that is
 * none, an unknown key) are refused before it, values that the format refuses behind it.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include "base/opt.h"
#include "base/size.h"
#include "base/strbuf.h"
#include "cli/dialect.h"
#include "disk/driver.h"
#include "disk/open.h"

#define SECOND "\001"
#define SIZE_SUFFIXES                                                                              \
    SECOND "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"          \
           "and exabytes, respectively."

/* ---------------------------------------------------------------- the line */

struct shown {
    const char *key, *def; /* def NULL: only when given */
};
static const struct shown qcow2_keys[] = {
    {"encryption", NULL},
    {"cluster_size", "65536"},
    {"extended_l2", "off"},
    {"preallocation", NULL},
    {"compression_type", "zlib"},
    {"size", NULL},
    {"compat", NULL},
    {"backing_file", NULL},
    {"backing_fmt", NULL},
    {"data_file", NULL},
    {"data_file_raw", NULL},
    {"lazy_refcounts", "off"},
    {"refcount_bits", "16"},
    {"nocow", NULL},
    {"extent_size_hint", NULL},
    {NULL, NULL},
};
/* Defaults that are shown of other formats, behind the size and what was given with -b and -F. */
static const struct {
    const char *format, *key, *def;
} other_keys[] = {
    {"vdi", "static", "off"},
    {"qed", "cluster_size", "65536"},
    {"parallels", "cluster_size", "1048576"},
    {"vmdk", "compat6", "off"},
    {"vmdk", "hwversion", "undefined"},
    {"vhdx", "log_size", "1048576"},
    {"vhdx", "block_size", "0"},
    {NULL, NULL, NULL},
};

/* What the last line was about; for the words of a refusal. */
static const struct driver *announced;

static bool is_size(const struct driver *d, const char *key) {
    if (!strcmp(key, "extent_size_hint"))
        return true;
    for (const struct opt *o = d->create_opts; o && o->name; o++)
        if (!strcmp(o->name, key))
            return o->type == OPT_T_SIZE;
    return false;
}

/* Commas twice, so that it can be given to -o again. */
static void print_text(const char *key, const char *text) {
    printf(" %s=", key);
    for (; *text; text++)
        fputs(*text == ',' ? ",," : (char[2]){*text}, stdout);
}

static void print_pair(const struct driver *d, const char *key, const json_t *v) {
    const char *text = json_string_value(v);
    uint64_t bytes;
    if (json_is_integer(v))
        printf(" %s=%" JSON_INTEGER_FORMAT, key, json_integer_value(v));
    else if (text && is_size(d, key) && size_parse(text, key, &bytes, NULL) == 0)
        printf(" %s=%" PRIu64, key, bytes);
    else if (text)
        print_text(key, text);
    else
        printf(" %s=%s", key, json_is_true(v) ? "on" : "off");
}

static void print_line(const char *name, const struct driver *d, const json_t *tree) {
    printf("Formatting '%s', fmt=%s", name, d->name);
    if (!strcmp(d->name, "qcow2")) {
        for (const struct shown *k = qcow2_keys; k->key; k++) {
            const json_t *v = json_object_get(tree, k->key);
            if (v)
                print_pair(d, k->key, v);
            else if (k->def)
                printf(" %s=%s", k->key, k->def);
        }
    } else {
        const char *key;
        json_t *v;
        static const char *const first[] = {"size", "backing_file", "backing_fmt"};
        for (int i = 0; i < 3; i++)
            if ((v = json_object_get(tree, first[i])))
                print_pair(d, first[i], v);
        for (int i = 0; other_keys[i].format; i++)
            if (!strcmp(other_keys[i].format, d->name) && !json_object_get(tree, other_keys[i].key))
                printf(" %s=%s", other_keys[i].key, other_keys[i].def);
        json_object_foreach((json_t *)tree, key, v) {
            if (strcmp(key, first[0]) && strcmp(key, first[1]) && strcmp(key, first[2]))
                print_pair(d, key, v);
        }
    }
    putchar('\n');
    fflush(stdout); /* in front of what goes to standard error */
}

/* Refused before the line is printed. */
static bool is_unreadable(const struct err *e) {
    static const char *const texts[] = {"unknown option '",   "is not a size",     "is larger than",
                                        "expected on or off", "expected a number", NULL};
    if (strstr(e->text, "option 'refcount_bits'"))
        return false;
    for (int i = 0; texts[i]; i++)
        if (strstr(e->text, texts[i]))
            return true;
    return false;
}

int dialect_create_announce(struct verb_ctx *ctx, const struct driver *d, const json_t *tree,
                            bool quiet) {
    if (!dialect_is_qemu())
        return 0;
    announced = d;
    void *filled = xcalloc(1, d->create_opts_size ? d->create_opts_size : 1);
    struct err e AUTO_ERR = ERR_INIT;
    int rc = opt_fill(d->create_opts, tree, OPT_CREATE, create_file_keys, filled, &e);
    if (rc == 0)
        opt_free(d->create_opts, filled);
    free(filled);
    if (rc == 0)
        rc = create_file_options(tree, NULL, &e);
    if (rc < 0 && is_unreadable(&e)) {
        err_move(&ctx->err, &e);
        return rc;
    }
    if (!quiet)
        print_line(ctx->pos[0], d, tree);
    return 0;
}

/* ---------------------------------------------------------------- refusals */

static const char *behind(const char *text, const char *mark) {
    const char *at = strstr(text, mark);
    return at ? at + strlen(mark) : NULL;
}

/* The quoted word at `s`. */
static char *word(const char *s) {
    return xstrndup(s, strcspn(s, "'"));
}

/* What was wrong with one option's value; NULL: the text is of another kind. */
static char *option_reason(const char *text, const char **second) {
    const char *why = behind(text, "unknown option '");
    if (why) {
        char *key AUTO_FREE = word(why);
        return xasprintf("Invalid parameter '%s'", key);
    }
    const char *at = behind(text, "option '");
    if (!at)
        return NULL;
    char *key AUTO_FREE = word(at);
    bool range = !strstr(text, "is not a size") && !strstr(text, "expected a number");
    if (announced && !strcmp(announced->name, "qed") && range && !strcmp(key, "cluster_size"))
        return xstrdup("QED cluster size must be within range [4096, 67108864] and power of 2");
    if (announced && !strcmp(announced->name, "qed") && range && !strcmp(key, "table_size"))
        return xstrdup("QED table size must be within range [1, 16] and power of 2");
    if (!strcmp(key, "cluster_size") && !strstr(text, "is not a size"))
        return xstrdup("Cluster size must be a power of two between 512 and 2048k");
    if (!strcmp(key, "refcount_bits"))
        return xstrdup("Refcount width must be a power of two and may not exceed 64 bits");
    if (strstr(text, "is not a size") || strstr(text, "is larger than")) {
        *second = SIZE_SUFFIXES;
        return xasprintf("Parameter '%s' expects a non-negative number below 2^64", key);
    }
    if (strstr(text, "expected on or off"))
        return xasprintf("Parameter '%s' expects 'on' or 'off'", key);
    if (strstr(text, "expected a number"))
        return xasprintf("Parameter '%s' expects a number", key);
    if (strstr(text, "expected one of") && (why = behind(text, "found '"))) {
        char *value AUTO_FREE = word(why);
        const char *shown = !strcmp(key, "compat")             ? "version"
                            : !strcmp(key, "compression_type") ? "compression-type"
                                                               : key;
        return xasprintf("Parameter '%s' does not accept value '%s'", shown, value);
    }
    return NULL;
}

static char *backing_reason(const struct err *e, const char *text, const char **second,
                            char **owned) {
    const char *why = behind(text, "cannot open: "), *fmt = behind(text, "unknown format '");
    if (!strncmp(text, "backing file: ", 14)) {
        const char *name = text + 14;
        *second = SECOND "Could not open backing image.";
        if (strstr(text, "not a qcow2 image"))
            return xstrdup("Image is not in qcow2 format");
        return why ? xasprintf("Could not open '%.*s': %s", (int)strcspn(name, ":"), name, why)
                   : xstrdup(text);
    }
    if (!strncmp(text, "option '-F'", 11) && fmt) {
        char *name AUTO_FREE = word(fmt);
        *second = SECOND "Could not open backing image.";
        return xasprintf("Unknown driver '%s'", name);
    }
    if (strstr(text, "is given without its format")) {
        const char *detected = e->hint ? behind(e->hint, "add -F ") : NULL;
        if (detected)
            *second = *owned = xasprintf(SECOND "Detected format of %s.", detected);
        return xstrdup("Backing file specified without backing format");
    }
    if (strstr(text, "-F needs a backing file"))
        return xstrdup("Backing format cannot be used without backing file");
    if (strstr(text, "needs an L1 table of"))
        return xstrdup("The image size is too large for file format 'qcow2' (try using a larger "
                       "cluster size)");
    if (strstr(text, "its own backing file"))
        return xstrdup(
            "Error: Trying to create an image with the same filename as the backing file");
    return NULL;
}

#define FROM_V3 " compatibility level 1.1 and above (use version=v3 or greater)"

/* Options of qcow2 that do not go together. */
static char *rule_reason(const char *text) {
    static const struct {
        const char *ours, *theirs;
    } rules[] = {
        {"extended_l2=on needs clusters",
         "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"},
        {"extended_l2=on needs compat", "Extended L2 entries are only supported with" FROM_V3},
        {"data_file needs compat", "External data files are only supported with" FROM_V3},
        {"data_file_raw=on needs data_file", "data-file-raw requires data-file"},
        {"data_file_raw=on and a backing file",
         "Backing file and data-file-raw cannot be used at the same time"},
        {"would hide the backing file", "Backing file and preallocation can only be used at the "
                                        "same time if extended_l2 is on"},
        {"lazy_refcounts=on needs compat", "Lazy refcounts only supported with" FROM_V3},
        {" needs compat=1.1: version 2 images have 16 bits",
         "Different refcount widths than 16 bits require compatibility level 1.1 or above (use "
         "version=v3 or greater)"},
        {"compression_type=zstd needs compat",
         "Non-zlib compression type is only supported with" FROM_V3},
        {"option 'refcount_bits': ",
         "Refcount width must be a power of two and may not exceed 64 bits"},
    };
    for (size_t i = 0; i < sizeof(rules) / sizeof(rules[0]); i++)
        if (strstr(text, rules[i].ours))
            return xstrdup(rules[i].theirs);
    return NULL;
}

static char *file_reason(const struct err *e, const char *name, const char *text,
                         const char **second, char **owned) {
    const char *why = behind(text, "cannot create a file in ");
    if (why && (why = strstr(why, ": ")))
        return xasprintf("Could not create '%s': %s", name, why + 2);
    if (e->code == EAGAIN) {
        *second = *owned = xasprintf(SECOND "Is another process using the image [%s]?", name);
        return xstrdup("Failed to get \"write\" lock");
    }
    if ((why = behind(text, "growing the file to ")) && (why = strstr(why, ": ")))
        return xasprintf("Could not resize image%s", why);
    if (!strncmp(text, "unknown format '", 16)) {
        char *fmt AUTO_FREE = word(text + 16);
        return xasprintf("Unknown file format '%s'", fmt);
    }
    if ((why = behind(text, " does not apply to format '"))) {
        char *fmt AUTO_FREE = word(why);
        return xasprintf("Backing %s not supported for file format '%s'",
                         text[1] == 'b' ? "file" : "format", fmt);
    }
    if (announced && strstr(text, "disk size ") && strstr(text, " is above the limit of "))
        return xasprintf("The image size is too large for file format '%s'", announced->name);
    if (!strcmp(text, "is a directory"))
        return xasprintf("Could not create '%s': Is a directory", name);
    if (!strcmp(text, "the file name is empty"))
        return xstrdup("Could not create '': No such file or directory");
    if (strstr(text, "a size is missing"))
        return xstrdup("Image creation needs a size parameter");
    return NULL;
}

void dialect_create_error(struct verb_ctx *ctx, const char *name, const char *before) {
    struct err *e = &ctx->err;
    if (!dialect_is_qemu() || !e->text || (e->hint && *e->hint == *SECOND))
        return;
    char *safe AUTO_FREE = cli_safe(name), *owned AUTO_FREE = NULL, *reason AUTO_FREE = NULL;
    const char *text = e->text, *second = NULL;
    size_t len = strlen(safe);
    while (!strncmp(text, safe, len) && !strncmp(text + len, ": ", 2))
        text += len + 2;
    const char *theirs = dialect_sentence(ctx->verb, text);
    reason = theirs ? xstrdup(theirs) : backing_reason(e, text, &second, &owned);
    if (!reason)
        reason = file_reason(e, name, text, &second, &owned);
    if (!reason)
        reason = option_reason(text, &second);
    if (!reason)
        reason = rule_reason(text);
    if (!reason)
        reason = xstrdup(text);
    int code = e->code;
    err_clear(e);
    err_set(e, code, "%s%s", before, reason);
    if (second)
        err_hint(e, "%s", second);
}

int dialect_options_error(struct verb_ctx *ctx) {
    const char *second = NULL;
    if (!dialect_is_qemu() || !ctx->err.text)
        return -ctx->err.code;
    char *reason AUTO_FREE = option_reason(ctx->err.text, &second);
    if (!reason)
        return -ctx->err.code;
    int rc = err_set(&ctx->err, EINVAL, "%s", reason);
    /* There a value that the format refuses is met later than one that cannot be read. */
    const char *value = strstr(reason, "does not accept value '");
    if (!strcmp(ctx->verb->name, "measure")) {
        if (value && !strncmp(reason, "Parameter 'version'", 19))
            rc = err_set(&ctx->err, EINVAL, "Invalid compatibility level: %s", strchr(value, '\''));
        else if (value && !strncmp(reason, "Parameter 'preallocation'", 25)) {
            char *bad AUTO_FREE = word(strchr(value, '\'') + 1);
            rc = err_set(&ctx->err, EINVAL, "invalid parameter value: %s", bad);
        } else if (strncmp(reason, "Cluster size", 12) && strncmp(reason, "Refcount width", 14))
            second = second ? SIZE_SUFFIXES "\nqemu-img: Invalid options for file format 'qcow2'"
                            : SECOND "qemu-img: Invalid options for file format 'qcow2'";
    }
    if (second)
        err_hint(&ctx->err, "%s", second);
    return rc;
}
