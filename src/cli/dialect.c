/* SPDX-License-Identifier: MIT */
/*
 * The words of qemu-img and its two companions: names of options, messages, the second lines of
 * errors.  What only qemu-io and qemu-nbd have is in dialect_io.c and dialect_nbd.c.
 *
 * Messages are facts taken from what the program prints (versions 7.2 to 10).  An error of ours is
 * put into them by its code and the words in front of it; what has no counterpart there keeps our
 * own sentence behind "Could not open 'NAME': ".
 *
 * A hint that begins with SECOND is a second line of the dialect's own and printed; other hints
 * are for people who call strata by its name, and are left out.
 */
#include "cli/dialect.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include "base/object.h"
#include "base/strbuf.h"
#include "base/version.h"
#include "disk/node.h"

#define SECOND "\001"

/* The drop-in name that we were called by; NULL: our own. */
static const char *called_as;

bool dialect_is_qemu(void) {
    return called_as;
}

const char *dialect_program(void) {
    return called_as ? called_as : "strata";
}

void dialect_speak(const char *name) {
    called_as = name && strcmp(name, "strata") ? name : NULL;
}

const struct verb *dialect_verb(const char *name) {
    return !strcmp(name, "qemu-io")    ? &verb_qemu_io
           : !strcmp(name, "qemu-nbd") ? &verb_qemu_nbd
                                       : NULL;
}

/* ---------------------------------------------------------------- options */

/* Another letter or name of a row that the verb has by `target`. */
static const struct {
    const char *verb;
    char letter;
    const char *name;
    const char *target;
} aliases[] = {
    {"check", 'T', NULL, "cache"},
    {"create", 'B', NULL, "backing-format"},
    {"convert", 'b', NULL, "backing"},
    {"convert", 0, "source-format", "format"},
    {"convert", 's', NULL, "snapshot"}, /* before 2.0 */
    {NULL, 0, NULL, NULL},
};

/* Rows that are ours alone: of one verb, or (NULL) of all.  A name, or a letter behind a dash. */
static const struct {
    const char *verb, *name;
} own_rows[] = {
    {NULL, "trust"},
    {NULL, "progress"},
    {"amend", "shrink"},
    {"bitmap", "list"},
    {"bitmap", "cache"},
    {"bitmap", "output"},
    {"bitmap", "force-share"},
    {"check", "cache"},
    {"check", "-p"},
    {"dd", "cache"},
    {"info", "cache"},
    {"map", "cache"},
    {"measure", "cache"},
    {"measure", "scan"},
    {"resize", "cache"},
    {"resize", "force-share"},
    {"snapshot", "cache"},
    {"snapshot", "output"},
    {NULL, NULL},
};

bool dialect_hides(const struct verb *v, const struct cli_opt *o) {
    if (!called_as || strcmp(called_as, "qemu-img"))
        return false;
    for (int i = 0; own_rows[i].name; i++) {
        const char *name = own_rows[i].name;
        bool hit = *name == '-' ? o->letter == name[1] : o->name && !strcmp(o->name, name);
        if (hit && (!own_rows[i].verb || !strcmp(own_rows[i].verb, v->name)))
            return true;
    }
    return false;
}

const char *dialect_other_name(const struct verb *v, const struct cli_opt *o, int n) {
    static char text[32];
    for (int i = 0; called_as && aliases[i].verb && o->name; i++) {
        if (strcmp(aliases[i].verb, v->name) || strcmp(aliases[i].target, o->name) || n--)
            continue;
        if (aliases[i].letter)
            snprintf(text, sizeof(text), "-%c", aliases[i].letter);
        else
            snprintf(text, sizeof(text), "--%s", aliases[i].name);
        return text;
    }
    return NULL;
}

static const struct cli_opt *row_named(const struct verb *v, const char *name) {
    for (const struct cli_opt *o = v->opts; o && (o->letter || o->name); o++)
        if (o->name && !strcmp(o->name, name))
            return o;
    return NULL;
}

const struct cli_opt *dialect_row(const struct verb *v, char letter, const char *name) {
    if (!called_as)
        return NULL;
    for (int i = 0; aliases[i].verb; i++) {
        bool hit = (letter && aliases[i].letter == letter) ||
                   (name && aliases[i].name && !strcmp(aliases[i].name, name));
        if (hit && !strcmp(aliases[i].verb, v->name))
            return row_named(v, aliases[i].target);
    }
    return NULL;
}

const struct cli_opt *dialect_abbreviated(const struct verb *v, const char *name) {
    const struct cli_opt *found = NULL;
    size_t len = strlen(name);
    if (!called_as || !len)
        return NULL;
    for (const struct cli_opt *o = v->opts; o && (o->letter || o->name); o++) {
        if (!o->name || strncmp(o->name, name, len) || dialect_hides(v, o))
            continue;
        if (found)
            return NULL;
        found = o;
    }
    return found;
}

/* compare has statuses of its own for some mistakes. */
static int misuse_status = 1;

int dialect_misuse_status(void) {
    return misuse_status;
}

static void value_status(const struct verb_ctx *ctx) {
    if (ctx->verb && ctx->verb->error_status)
        misuse_status = ctx->verb->error_status;
}

int dialect_object(struct verb_ctx *ctx, const char *definition) {
    static const char *const types[] = {"secret", "tls-creds-x509", "tls-creds-psk",
                                        "tls-creds-anon", NULL};
    const char *type = strncmp(definition, "qom-type=", 9) ? definition : definition + 9;
    size_t len = strcspn(type, ",");
    for (int i = 0; types[i]; i++)
        if (strlen(types[i]) == len && !strncmp(types[i], type, len))
            return object_add(definition, &ctx->err);
    value_status(ctx);
    return err_set(&ctx->err, EINVAL, "Parameter 'qom-type' does not accept value '%.*s'", (int)len,
                   type);
}

/* ---------------------------------------------------------------- misuse */

int dialect_usage(struct verb_ctx *ctx, const char *fmt, ...) {
    char *text = NULL;
    va_list ap;
    va_start(ap, fmt);
    if (vasprintf(&text, fmt, ap) < 0)
        text = NULL;
    va_end(ap);
    int rc = err_set(&ctx->err, EINVAL, "%s", text ? text : "out of memory");
    err_hint(&ctx->err, SECOND "Try '%s --help' for more information", called_as);
    free(text);
    return rc;
}

int dialect_bad_positionals(struct verb_ctx *ctx) {
    static const struct {
        const char *verb, *text;
    } rows[] = {
        {"compare", "Expecting two image file names"},
        {"resize", "Expecting image file name and size"},
        {NULL, NULL},
    };
    const char *verb = ctx->verb->name;
    if (!strcmp(verb, "measure"))
        return err_set(&ctx->err, EINVAL, "At most one filename argument is allowed.");
    if (!strcmp(verb, "amend"))
        return err_set(&ctx->err, EINVAL, "Expecting one image file name");
    if (!strcmp(verb, "check") && !ctx->pos_n) {
        /* The file is taken for the value of -r when that was forgotten. */
        const struct cli_opt *o = row_named(ctx->verb, "repair");
        const char *what = *(const char **)((char *)ctx->args + o->offset);
        if (what && strcmp(what, "leaks") && strcmp(what, "all"))
            return dialect_usage(
                ctx, "Unknown option value for -r (expecting 'leaks' or 'all'): %s", what);
    }
    if (!strcmp(verb, "create"))
        return dialect_usage(ctx, "Unexpected argument: %s", ctx->pos[2]);
    if (!strcmp(verb, "resize") && ctx->pos_n < 2)
        return dialect_usage(ctx, "Not enough arguments");
    for (int i = 0; rows[i].verb; i++)
        if (!strcmp(rows[i].verb, verb))
            return dialect_usage(ctx, "%s", rows[i].text);
    return dialect_usage(ctx, "Expecting one image file name");
}

/* As a number of bytes, roughly; below 0: it is none. */
static long double rough_size(const char *text) {
    static const char suffixes[] = "bkmgtpe";
    char *end;
    long double v = strtold(text, &end);
    const char *suffix = *end ? strchr(suffixes, *end | 0x20) : suffixes;
    if (end == text || !suffix || (*end && end[1]))
        return -1;
    for (; suffix > suffixes; suffix--)
        v *= 1024;
    return v;
}

int dialect_bad_size(struct verb_ctx *ctx, const char *text) {
    long double v = rough_size(text + (*text == '+' || *text == '-'));
    err_clear(&ctx->err);
    if (v >= 0x1p64L)
        return err_set(&ctx->err, EINVAL, "Value '%s' is out of range for parameter 'size'",
                       text + (*text == '+' || *text == '-'));
    if (v >= 0x1p63L)
        return err_set(&ctx->err, EINVAL, "New image size must be positive");
    int rc =
        err_set(&ctx->err, EINVAL, "Parameter 'size' expects a non-negative number below 2^64");
    err_hint(&ctx->err, SECOND "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, "
                               "tera-, peta-\nand exabytes, respectively.");
    return rc;
}

int dialect_sparse_size(struct verb_ctx *ctx) {
    return err_set(&ctx->err, EINVAL,
                   "Invalid buffer size for sparse output specified. Valid sizes are multiples of "
                   "512 up to %d. Select 0 to disable sparse detection (fully allocates output).",
                   16 << 20);
}

int dialect_bad_number(struct verb_ctx *ctx, const char *what) {
    err_clear(&ctx->err);
    int rc = err_set(&ctx->err, EINVAL,
                     "Invalid %s specified. You may use k, M, G, T, P or E suffixes for", what);
    err_hint(&ctx->err, SECOND "qemu-img: kilobytes, megabytes, gigabytes, terabytes, petabytes "
                               "and exabytes.");
    return rc;
}

void dialect_second_line(struct err *e, const char *text) {
    err_hint(e, SECOND "%s", text);
}

void dialect_warn_guessed(struct verb_ctx *ctx, const struct node *n) {
    if (!called_as || !(n->flags & NODE_GUESSED))
        return;
    fprintf(stderr,
            "WARNING: Image format was not specified for '%s' and probing guessed raw.\n"
            "         Automatically detecting the format is dangerous for raw images, write "
            "operations on block 0 will be restricted.\n"
            "         Specify the 'raw' format explicitly to remove the restrictions.\n",
            n->filename);
}

/* ---------------------------------------------------------------- values of options */

/* A value that cannot be read.  `number`: "Invalid TEXT specified. You may use ..."; else %s. */
static const struct {
    const char *verb; /* NULL: any */
    const char *name;
    bool number;
    const char *text;
} values[] = {
    {NULL, "output", false, "--output must be used with human or json as argument."},
    {"map", "start-offset", true, "start offset"},
    {"map", "max-length", true, "max length"},
    {"convert", "sparse-size", true, "buffer size for sparse output"},
    {NULL, "rate-limit", true, "rate limit"},
    {"convert", "workers", false,
     "Invalid number of coroutines. Allowed number of coroutines is between 1 and 16"},
    {NULL, "source-cache", false, "Invalid source cache option: %s"},
    {"bench", "cache", false, "Invalid cache mode"},
    {"check", "cache", false, "Invalid source cache option: %s"},
    {NULL, "cache", false, "Invalid cache option: %s"},
    {"measure", "size", true, "image size"},
    {"resize", "preallocation", false, "Invalid preallocation mode '%s'"},
    {"bitmap", "granularity", true, "granularity"},
    {"bench", "count", false, "Invalid request count specified"},
    {"bench", "depth", false, "Invalid queue depth specified"},
    {"bench", "buffer-size", true, "buffer size"},
    {"bench", "step-size", true, "step_size"},
    {"bench", "offset", true, "offset"},
    {"bench", "pattern", false, "Invalid pattern byte specified"},
    {"bench", "flush-interval", false, "Invalid flush interval specified"},
    {"bench", "aio", false, "Invalid aio option: %s"},
    {NULL, NULL, false, NULL},
};

/* A size that can be read, but is too large for the option. */
static int bad_size_value(struct verb_ctx *ctx, const struct cli_opt *o, const char *value,
                          const char *what) {
    long double v = rough_size(value);
    uint64_t max = o->max < INT64_MAX - 1 ? o->max : INT64_MAX;
    if (v < 0 || (v <= (long double)max))
        return dialect_bad_number(ctx, what);
    err_clear(&ctx->err);
    if (!strcmp(o->name, "sparse-size")) {
        if (v < 0x1p63L)
            return dialect_sparse_size(ctx);
        max = INT64_MAX;
    }
    return err_set(&ctx->err, EINVAL, "Invalid %s specified. Must be between 0 and %" PRIu64 ".",
                   what, max);
}

int dialect_bad_value(struct verb_ctx *ctx, const struct cli_opt *o, const char *value) {
    for (int i = 0; values[i].name; i++) {
        if (!o->name || strcmp(values[i].name, o->name) ||
            (values[i].verb && strcmp(values[i].verb, ctx->verb->name)))
            continue;
        value_status(ctx);
        if (values[i].number)
            return bad_size_value(ctx, o, value, values[i].text);
        const char *hole = strstr(values[i].text, "%s");
        err_clear(&ctx->err);
        return hole ? err_set(&ctx->err, EINVAL, "%.*s%s%s", (int)(hole - values[i].text),
                              values[i].text, value, hole + 2)
                    : err_set(&ctx->err, EINVAL, "%s", values[i].text);
    }
    return -EINVAL;
}

int dialect_image_size(struct verb_ctx *ctx) {
    if (!called_as)
        return -ctx->err.code;
    if (ctx->err.code != ERANGE)
        return dialect_bad_number(ctx, "image size");
    err_clear(&ctx->err);
    err_set(&ctx->err, EINVAL,
            "Invalid image size specified. Must be between 0 and 9223372036854775807.");
    err_hint(&ctx->err, SECOND);
    return -EINVAL;
}

/* ---------------------------------------------------------------- opening */

/* "...: text" behind the last use of `mark`, or NULL. */
static const char *behind(const char *text, const char *mark) {
    const char *at = strstr(text, mark);
    return at ? at + strlen(mark) : NULL;
}

/* `list`: as qcow2's header.c has it, "NAME (bit N)" or "bit N", with commas between. */
static void put_features(struct strbuf *b, const char *list) {
    uint64_t unnamed = 0;
    strbuf_puts(b, "Unsupported qcow2 feature(s): ");
    size_t start = b->len;
    while (*list) {
        const char *end = strstr(list, ", "), *number = strstr(list, " (bit ");
        size_t len = end ? (size_t)(end - list) : strlen(list);
        if (!strncmp(list, "bit ", 4))
            unnamed |= UINT64_C(1) << (strtoul(list + 4, NULL, 10) & 63);
        else
            strbuf_printf(b, "%s%.*s", b->len > start ? ", " : "",
                          (int)(number && number < list + len ? (size_t)(number - list) : len),
                          list);
        list += len + (end ? 2 : 0);
    }
    if (unnamed)
        strbuf_printf(b, "%sUnknown incompatible feature: %" PRIx64, b->len > start ? ", " : "",
                      unnamed);
}

/* The sentence for why `name` itself could not be opened; `text` is ours without the name. */
static void put_reason(struct strbuf *b, const struct err *e, const char *name, const char *text,
                       const char *format) {
    const char *why;
    if ((why = behind(text, "cannot open: ")) || (why = behind(text, "cannot open for writing: ")))
        strbuf_printf(b, "Could not open '%s': %s", name, why);
    else if ((why = strstr(text, "Failed to connect to '")) ||
             (why = strstr(text, "Failed to negotiate")))
        strbuf_puts(b, why);
    else if (strstr(text, "force-share only goes with read-only"))
        strbuf_puts(b, "force-share=on can only be used with read-only images");
    else if (!*name && strstr(text, "option filename is missing"))
        strbuf_puts(b, "The 'file' block driver requires a file name");
    else if ((why = behind(text, "is not a device, as the driver '")))
        strbuf_printf(b, "'%.*s' driver requires '%s' to be either a character or block device",
                      (int)strcspn(why, "'"), why, name);
    else if (strstr(text, "is a directory") && strstr(text, "for writing"))
        strbuf_printf(b, "Could not open '%s': Is a directory", name);
    else if (strstr(text, "is a directory") || strstr(text, "which cannot hold a disk"))
        strbuf_printf(b, "'file' driver requires '%s' to be a regular file", name);
    else if ((why = behind(text, "incompatible features are not supported: ")))
        put_features(b, why);
    else if (strstr(text, "the image is too big"))
        strbuf_puts(b, "Image is too big");
    else if ((why = strstr(text, "Could not read blkdebug config file")))
        strbuf_puts(b, why);
    else if (e->code == ENOENT || e->code == EACCES)
        strbuf_printf(b, "Could not open '%s': %s", name, strerror(e->code));
    else if ((why = behind(text, "unknown driver or format '")))
        strbuf_printf(b, "Unknown driver '%.*s'", (int)strcspn(why, "'"), why);
    else if ((why = behind(text, "its recorded format '")))
        strbuf_printf(b, "Unknown driver '%.*s'", (int)strcspn(why, "'"), why);
    else if ((why = behind(text, "unknown protocol '")))
        strbuf_printf(b, "Unknown protocol '%.*s'", (int)strcspn(why, "'"), why);
    else if (strstr(text, "the magic bytes are missing"))
        strbuf_printf(b, "Image is not in %s format", format ? format : "qcow2");
    else if ((why = behind(text, "qcow2 version ")) && strstr(text, "is not supported"))
        strbuf_printf(b, "Unsupported qcow2 version %.*s", (int)strcspn(why, " "), why);
    else if (strstr(text, "header is cut off"))
        strbuf_puts(b, "qcow2 header too short");
    else
        strbuf_puts(b, text);
}

/* Who has the image open tells which of the locks was refused. */
static void put_lock(struct strbuf *b, const char *text, bool writing) {
    bool other_reads = strstr(text, "read-only") || strstr(text, "reading");
    strbuf_printf(b, "Failed to get %s\"write\" lock", writing || other_reads ? "" : "shared ");
}

/* `before` is whole, has a %s for the name, or is followed by the name in quotes. */
static void put_before(struct strbuf *b, const char *before, const char *name) {
    const char *hole = strstr(before, "%s");
    if (hole)
        strbuf_printf(b, "%.*s%s%s", (int)(hole - before), before, name, hole + 2);
    else if (strlen(before) > 2 && !strcmp(before + strlen(before) - 2, ": "))
        strbuf_puts(b, before);
    else
        strbuf_printf(b, "%s '%s': ", before, name);
}

void dialect_open_error(struct verb_ctx *ctx, const char *name, const char *format,
                        const char *before) {
    struct err *e = &ctx->err;
    if (!called_as || !e->text)
        return;
    struct strbuf b AUTO_STRBUF = STRBUF_INIT;
    char *safe AUTO_FREE = cli_safe(name), *at_file = xstrdup(name);
    const char *text = e->text, *hint = NULL;
    if (!strncmp(text, safe, strlen(safe)) && !strncmp(text + strlen(safe), ": ", 2))
        text += strlen(safe) + 2;
    put_before(&b, before, name);
    const char *backing = "backing file '";
    bool inside = false;
    while (!strncmp(text, backing, strlen(backing))) {
        const char *from = text + strlen(backing), *end = strstr(from, "': ");
        if (!end)
            break;
        free(at_file);
        at_file = xstrndup(from, end - from);
        text = end + 3;
        /* The gate names the file once more. */
        if (strncmp(text, backing, strlen(backing)) ||
            strncmp(text + strlen(backing), at_file, strlen(at_file)))
            strbuf_puts(&b, "Could not open backing file: ");
        inside = true;
    }
    const char *data = "data file '", *data_end = strstr(text, "': ");
    if (!strncmp(text, data, strlen(data)) && data_end) {
        free(at_file);
        at_file = xstrndup(text + strlen(data), data_end - text - strlen(data));
        text = data_end + 3;
    }
    if (e->code == EAGAIN) {
        put_lock(&b, text, !inside && strstr(e->hint ? e->hint : "", "two writers"));
        hint = at_file;
    } else {
        put_reason(&b, e, at_file, text, format);
    }
    if (inside && ctx->verb && !strcmp(ctx->verb->name, "info")) {
        /* There each image of the chain is opened by itself. */
        strbuf_free(&b);
        strbuf_printf(&b, "%s '%s': ", before, at_file);
        put_reason(&b, e, at_file, text, NULL);
    }
    const char *again = behind(text, "the backing chain comes back to '");
    if (again && !strncmp(before, "Could not open", 14)) {
        strbuf_free(&b);
        strbuf_printf(&b, "Backing file '%.*s' creates an infinite loop.", (int)strcspn(again, "'"),
                      again);
    }
    int code = e->code;
    err_clear(e);
    err_set(e, code, "%s", b.s);
    if (hint)
        err_hint(e, SECOND "Is another process using the image [%s]?", hint);
    free(at_file);
}

/* ---------------------------------------------------------------- printing */

void dialect_print_error(const struct err *e) {
    struct strbuf b AUTO_STRBUF = STRBUF_INIT;
    const char *text = err_text(e);
    strbuf_printf(&b, "%s: ", called_as);
    strbuf_put_safe(&b, text, strlen(text));
    strbuf_puts(&b, "\n");
    if (e->hint && !strncmp(e->hint, SECOND, 1) && e->hint[1])
        strbuf_printf(&b, "%s\n", e->hint + 1);
    fwrite(b.s, 1, b.len, stderr);
}

/* ---------------------------------------------------------------- main */

static int misuse(const char *fmt, const char *word) {
    struct verb_ctx ctx = {0};
    dialect_usage(&ctx, fmt, word);
    dialect_print_error(&ctx.err);
    err_clear(&ctx.err);
    return 1;
}

/* That program's commands; those that this build lacks are not found in the table of verbs. */
bool dialect_is_img_verb(const char *name) {
    static const char *const names[] = {
        "amend", "bench", "bitmap", "check",   "commit",   "compare", "convert", "create",
        "dd",    "info",  "map",    "measure", "snapshot", "rebase",  "resize",  NULL};
    for (int i = 0; names[i]; i++)
        if (!strcmp(names[i], name))
            return true;
    return false;
}

static void print_help(void) {
    puts("usage: qemu-img [standard options] command [command options]\n"
         "QEMU disk image utility, by strata " STRATA_VERSION "\n\n"
         "Commands:");
    for (int i = 0; verb_table[i]; i++)
        if (dialect_is_img_verb(verb_table[i]->name))
            printf("  %-12s %s\n", verb_table[i]->name, verb_table[i]->summary);
    fputs("\nSupported formats:", stdout);
    for (int i = 0; driver_table[i]; i++)
        printf(" %s", driver_table[i]->name);
    puts("");
}

static int img_main(int argc, char **argv) {
    int i = 1;
    for (; i < argc && argv[i][0] == '-'; i++) {
        const char *a = argv[i];
        if (!strcmp(a, "-h") || !strcmp(a, "--help")) {
            print_help();
            return 0;
        }
        if (!strcmp(a, "-V") || !strcmp(a, "--version")) {
            /* Programs look for "version X.Y" to learn which options there are. */
            puts("qemu-img version 10.0.0 (strata " STRATA_VERSION ")");
            return 0;
        }
        if (!strcmp(a, "-T") || !strcmp(a, "--trace"))
            i++; /* trace points are QEMU's own: there is nothing to switch on */
        else if (strncmp(a, "-T", 2) && strncmp(a, "--trace=", 8))
            return misuse("unrecognized option '%s'", a);
    }
    if (i >= argc)
        return misuse("Not enough arguments%.0s", "");
    const struct verb *v = dialect_is_img_verb(argv[i]) ? verb_find(argv[i]) : NULL;
    if (!v)
        return misuse("Command not found: %s", argv[i]);
    return cli_verb_main(v, argc - i - 1, argv + i + 1);
}

int dialect_main(int argc, char **argv) {
    const char *slash = argc ? strrchr(argv[0], '/') : NULL;
    const char *name = !argc ? "" : slash ? slash + 1 : argv[0];
    static const char *const names[] = {"qemu-img", "qemu-io", "qemu-nbd"};
    for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++)
        if (!strcmp(name, names[i]))
            called_as = names[i];
    if (!called_as)
        return -1;
    if (!strcmp(called_as, "qemu-io"))
        return dialect_io_main(argc, argv);
    if (!strcmp(called_as, "qemu-nbd"))
        return dialect_nbd_main(argc, argv);
    return img_main(argc, argv);
}
