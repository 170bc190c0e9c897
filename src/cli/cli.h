/* SPDX-License-Identifier: MIT */
/*
 * The command line: how a verb is written.
 *
 * A verb is one file, src/cli/verb_NAME.c, that ends in one `const struct verb verb_NAME = {...}`
 * and is listed in src/cli/verbs.c.  Its options are rows of one table; the table drives parsing,
 * --help, the man page and the shell completion.  A verb looks like this:
 *
 *     struct args {
 *         struct cli_image image;
 *         int output;
 *         bool chain;
 *     };
 *     static const struct cli_opt opts[] = {
 *         CLI_IMAGE_ROWS(struct args, image),
 *         CLI_OUTPUT_ROW(struct args, output),
 *         CLI_FLAG(struct args, chain, 0, "backing-chain", "show the backing files too"),
 *         CLI_END};
 *
 *     static int info_run_co(struct verb_ctx *ctx) {
 *         const struct args *a = ctx->args;
 *         struct node *n;
 *         int rc = cli_open_co(ctx, ctx->pos[0], &a->image, 0, &n);
 *         if (rc < 0)
 *             return rc;                      // main prints ctx->err and exits with 1
 *         ...
 *         node_unref_co(n);
 *         return 0;                           // exit status
 *     }
 *
 *     const struct verb verb_info = {
 *         .name = "info",
 *         .summary = "show what an image is",
 *         .synopsis = "FILE",
 *         .pos_min = 1,
 *         .pos_max = 1,
 *         .opts = opts,
 *         .args_size = sizeof(struct args),
 *         .run_co = info_run_co,
 *     };
 *
 * Standard output carries the result, standard error everything else.  Output goes through stdio
 * (printf, puts); main flushes it, and a full or closed standard output ends in an error status, so
 * a verb need not check printf.  SIGPIPE is ignored in the whole process (restore it in children).
 */
#ifndef STRATA_CLI_CLI_H
#define STRATA_CLI_CLI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <jansson.h>
#include "base/err.h"

struct loop;
struct node;
struct driver;
struct verb;

/* ---------------------------------------------------------------- option rows */

enum cli_type {
    CLI_T_FLAG, /* bool: set to true; takes no value */
    CLI_T_STR,  /* const char *: borrowed from the command line; NULL when not given */
    CLI_T_SIZE, /* uint64_t: size_parse */
    CLI_T_U64,  /* uint64_t: decimal or 0x */
    CLI_T_ENUM, /* int: index into names */
    CLI_T_LIST, /* struct cli_list: each use appends */
    CLI_T_STEP, /* struct cli_list that rows share: each use appends its name, then its value when
                   it takes one (metavar): what to do, in order */
};

/* Values of a repeatable option in the order given; the texts are borrowed. */
struct cli_list {
    const char **v; /* NULL when n is 0 */
    size_t n;
};

struct cli_opt {
    char letter;      /* 0: none */
    const char *name; /* long name without dashes; NULL: none (then letter is not 0) */
    enum cli_type type;
    size_t offset;            /* of the field in the verb's struct */
    const char *metavar;      /* what stands for the value in help; not for flags */
    const char *help;         /* one sentence, no capital, no full stop */
    uint64_t def, min, max;   /* SIZE, U64 (ENUM: def) */
    const char *const *names; /* ENUM: NULL-terminated */
};

/* A row whose field has the wrong type does not compile. */
#define CLI_FIELD_(strct, field, ctype)                                                            \
    (offsetof(strct, field) + 0 * sizeof(char[_Generic(((strct *)0)->field, ctype : 1)]))
#define CLI_ROW_(strct, field, ty, ctype, ltr, nm, meta, hlp)                                      \
    .letter = (ltr), .name = (nm), .type = (ty), .offset = CLI_FIELD_(strct, field, ctype),        \
    .metavar = (meta), .help = (hlp)

#define CLI_FLAG(strct, field, letter, name, help)                                                 \
    { CLI_ROW_(strct, field, CLI_T_FLAG, bool, letter, name, NULL, help) }
#define CLI_STR(strct, field, letter, name, metavar, help)                                         \
    { CLI_ROW_(strct, field, CLI_T_STR, const char *, letter, name, metavar, help) }
/* `dflt` is what the field holds when the option is not given. */
#define CLI_SIZE(strct, field, letter, name, metavar, dflt, lo, hi, help)                          \
    {                                                                                              \
        CLI_ROW_(strct, field, CLI_T_SIZE, uint64_t, letter, name, metavar, help),                 \
            .def = (dflt), .min = (lo), .max = (hi)                                                \
    }
#define CLI_U64(strct, field, letter, name, metavar, dflt, lo, hi, help)                           \
    {                                                                                              \
        CLI_ROW_(strct, field, CLI_T_U64, uint64_t, letter, name, metavar, help),                  \
            .def = (dflt), .min = (lo), .max = (hi)                                                \
    }
#define CLI_ENUM(strct, field, letter, name, metavar, nms, dflt, help)                             \
    {                                                                                              \
        CLI_ROW_(strct, field, CLI_T_ENUM, int, letter, name, metavar, help), .def = (dflt),       \
                                                                              .names = (nms)       \
    }
#define CLI_LIST(strct, field, letter, name, metavar, help)                                        \
    { CLI_ROW_(strct, field, CLI_T_LIST, struct cli_list, letter, name, metavar, help) }
/* `meta` NULL: takes no value. */
#define CLI_STEP(strct, field, letter, name, meta, help)                                           \
    { CLI_ROW_(strct, field, CLI_T_STEP, struct cli_list, letter, name, meta, help) }
#define CLI_END                                                                                    \
    { .letter = 0, .name = NULL }

/* ---------------------------------------------------------------- rows that verbs share */

/* How one image on the command line is opened. */
struct cli_image {
    const char *format; /* -f */
    bool image_opts;    /* --image-opts: the name is key=value,... */
    bool force_share;   /* -U */
    int cache;          /* -t: enum cache_mode */
    int trust;          /* --trust: enum gate */
};

extern const char *const cli_output_names[]; /* "human", "json", NULL */
enum cli_output { OUTPUT_HUMAN, OUTPUT_JSON };

#define CLI_FORMAT_ROW(strct, field)                                                               \
    CLI_STR(strct, field, 'f', "format", "FMT", "image format; probed when not given")
#define CLI_IMAGE_OPTS_ROW(strct, field)                                                           \
    CLI_FLAG(strct, field, 0, "image-opts", "image names are key=value,... options")
#define CLI_FORCE_SHARE_ROW(strct, field)                                                          \
    CLI_FLAG(strct, field, 'U', "force-share",                                                     \
             "open even while others write; what is read may be inconsistent")
/* `letter` is 't', or 'T' for the source of a verb with two images. */
#define CLI_CACHE_ROW(strct, field, letter, name, dflt)                                            \
    CLI_ENUM(strct, field, letter, name, "MODE", cache_names, dflt, "how the host caches")
#define CLI_TRUST_ROW(strct, field)                                                                \
    CLI_ENUM(strct, field, 0, "trust", "WHAT", gate_names, GATE_BESIDE,                            \
             "which files an image may name as its backing file")
/* All of the above for a verb with one image (include disk/open.h). */
#define CLI_IMAGE_ROWS(strct, member)                                                              \
    CLI_FORMAT_ROW(strct, member.format), CLI_IMAGE_OPTS_ROW(strct, member.image_opts),            \
        CLI_FORCE_SHARE_ROW(strct, member.force_share),                                            \
        CLI_CACHE_ROW(strct, member.cache, 't', "cache", CACHE_WRITEBACK),                         \
        CLI_TRUST_ROW(strct, member.trust)
#define CLI_OUTPUT_ROW(strct, field)                                                               \
    CLI_ENUM(strct, field, 0, "output", "FORM", cli_output_names, OUTPUT_HUMAN,                    \
             "how the result is written")
#define CLI_QUIET_ROW(strct, field) CLI_FLAG(strct, field, 'q', "quiet", "say nothing but errors")
/* Two rows for a struct progress_args: -p and --progress=MODE.  See cli/progress.h. */

/* ---------------------------------------------------------------- verbs */

struct verb_ctx {
    const struct verb *verb;
    void *args; /* verb->args_size bytes, filled from the rows */
    char **pos; /* positional arguments, NULL-terminated */
    int pos_n;
    char **rest; /* behind "--", NULL-terminated; only for verbs with `rest` */
    int rest_n;
    struct loop *loop; /* NULL before run_co */
    struct err err;    /* what main prints when a hook returns < 0 */
};

/* A prepare hook that returns this plus a status ends the program with that status. */
enum { CLI_DONE = 0x1000 };

struct cli_example {
    const char *command; /* "strata info disk.qcow2" */
    const char *what;    /* one sentence */
};
struct cli_status {
    int status;
    const char *meaning;
};

struct verb {
    const char *name;
    const char *summary;  /* one line, lower case, no full stop */
    const char *synopsis; /* positional arguments: "FILE", "SOURCE... TARGET" */
    int pos_min, pos_max; /* pos_max -1: any number */
    bool pos_negative;    /* "-5" and "-1G" are positional arguments, not options */
    /* What may follow "--", e.g. "QEMU-ARGUMENT..."; NULL: "--" only ends the options. */
    const char *rest;
    const struct cli_opt *opts; /* ends in CLI_END; NULL: none */
    size_t args_size;
    const char *const *details;         /* paragraphs, NULL-terminated; NULL: none */
    const struct cli_example *examples; /* ends in {NULL, NULL}; NULL: none */
    const struct cli_status *statuses;  /* ends in {0, NULL}, others than 0/1 success/error; NULL */
    int error_status;                   /* exit status for errors and misuse; 0 means 1 */

    /*
     * Before a loop, a thread or an io_uring exists: the place to fork.  Returns 0 to go on,
     * -errno with ctx->err set, or CLI_DONE + status to end here (the waiting parent of a daemon).
     */
    int (*prepare)(struct verb_ctx *ctx);
    /*
     * Exactly one of these.  Returns the exit status (0..255), or -errno with ctx->err set.
     * run_co runs as a task on ctx->loop and may suspend; `run` runs without a loop.
     */
    int (*run_co)(struct verb_ctx *ctx);
    int (*run)(struct verb_ctx *ctx);
};

extern const struct verb *const verb_table[]; /* verbs.c; NULL-terminated, in the order of help */
const struct verb *verb_find(const char *name);

/* ---------------------------------------------------------------- helpers for verbs */

/*
 * Opens an image that the user named; errors go to ctx->err.  `open_flags` (enum open_flags) are
 * added to what `image` says.
 */
int cli_open_co(struct verb_ctx *ctx, const char *name, const struct cli_image *image,
                unsigned open_flags, struct node **out);
/* The same with further options of the image over what its name says (borrowed; may be NULL). */
int cli_open_with_co(struct verb_ctx *ctx, const char *name, const struct cli_image *image,
                     unsigned open_flags, const json_t *options, struct node **out);

/*
 * Joins the -o texts to one option tree (new reference; empty object for an empty list).  Errors go
 * to ctx->err.
 */
int cli_options(struct verb_ctx *ctx, const struct cli_list *list, json_t **out);
/* One of the -o texts asks for help: "help" or "?", alone or as an element. */
bool cli_options_want_help(const struct cli_list *list);
/* Prints the driver's create options to standard output.  Format NULL or unknown: error. */
int cli_print_create_help(struct verb_ctx *ctx, const char *format);

/*
 * Prints "strata: VERB: text" and, when there is one, the hint on the next line, to standard error.
 * For verbs that go on after an error; what a hook returns is printed by main.
 */
void cli_print_error(const struct verb_ctx *ctx, const struct err *e);
/* The same form without "warning". */
void cli_print_note(const struct verb_ctx *ctx, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
void cli_print_warning(const struct verb_ctx *ctx, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

/*
 * Shows log_msg() messages up to `level` (enum log_level) on standard error; warnings are shown
 * anyway, and STRATA_LOG=info|debug in the environment shows more.  For --verbose options.
 */
void cli_log_level(struct verb_ctx *ctx, int level);

/* A name made safe for terminals (strbuf_put_safe).  Owned by the caller. */
char *cli_safe(const char *name);
/* A JSON string of any bytes: what is not UTF-8 is written as \xNN.  NULL gives null. */
json_t *cli_json_name(const char *name);
/* Pretty-prints to standard output with a newline; takes over the reference. */
void cli_print_json(json_t *j);

/* ---------------------------------------------------------------- the frame's own (main, help) */

/* Parses, runs, reports: the exit status. */
int cli_verb_main(const struct verb *v, int argc, char **argv);
int cli_parse(struct verb_ctx *ctx, int argc, char **argv, bool *help);
void cli_parse_free(struct verb_ctx *ctx);
void cli_help_overview(FILE *out);
void cli_help_verb(const struct verb *v, FILE *out);
void cli_help_man(FILE *out);
void cli_help_bash(FILE *out);
/* The same of a drop-in name; the texts of the process are that program's from then on. */
void cli_help_man_dropin(FILE *out, const char *program);
void cli_help_bash_dropin(FILE *out, const char *program);

#endif
