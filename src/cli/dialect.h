/* SPDX-License-Identifier: MIT */
/*
 * The drop-in names qemu-img, qemu-io and qemu-nbd: the same work, in the words of those programs.
 *
 * Called by one of them, strata takes that program's command line (option letters, abbreviated long
 * names), speaks its messages and leaves with its exit statuses; libvirt, OpenStack and people's
 * scripts parse them.  The work is done by the verbs; where a sentence differs, the verb gives both
 * forms to cli_words(), and what cannot be said so simply is in dialect.c.
 *
 * Backing files that images name are opened wherever they are (GATE_ANY), as those scripts rely on.
 */
#ifndef STRATA_CLI_DIALECT_H
#define STRATA_CLI_DIALECT_H

#include <stdbool.h>
#include "cli/cli.h"

struct opt;
struct driver;

/* True once main has found that it was called by a drop-in name. */
bool dialect_is_qemu(void);
/* The name in front of messages: "strata", or the drop-in name. */
const char *dialect_program(void);

/* The form of a text that the program's name asks for.  Both take the same arguments. */
static inline __attribute__((format_arg(1), format_arg(2))) const char *
cli_words(const char *own, const char *qemu) {
    return dialect_is_qemu() ? qemu : own;
}

/*
 * For pages and completions: from here on the texts are those of this program ("qemu-img" ...; NULL
 * or "strata": our own).
 */
void dialect_speak(const char *name);
/* The programs qemu-io and qemu-nbd as the one verb that each is; NULL: another name. */
const struct verb *dialect_verb(const char *name);
extern const struct verb verb_qemu_io, verb_qemu_nbd;
/* A command of qemu-img. */
bool dialect_is_img_verb(const char *name);
/* What else `o` is called there: "-T", "--source-format" ...; NULL.  `n` counts from 0. */
const char *dialect_other_name(const struct verb *v, const struct cli_opt *o, int n);

/* The program's name and arguments are another program's: its exit status; -1: they are ours. */
int dialect_main(int argc, char **argv);

/* The whole programs (dialect_io.c, dialect_nbd.c): their exit statuses. */
int dialect_io_main(int argc, char **argv);
int dialect_nbd_main(int argc, char **argv);

/* ---- for args.c and common.c ---- */
/* Letters and names that this verb has only there.  NULL: none such. */
const struct cli_opt *dialect_row(const struct verb *v, char letter, const char *name);
/* A row that only strata has: unknown there. */
bool dialect_hides(const struct verb *v, const struct cli_opt *o);
/* The row that `name` abbreviates, when it is the only one. */
const struct cli_opt *dialect_abbreviated(const struct verb *v, const char *name);
/*
 * --object DEFINITION.  Secrets and TLS credentials may be defined; no format of this version asks
 * for one, so they stay unused, as an unused one does there.
 */
int dialect_object(struct verb_ctx *ctx, const char *definition);
/* Misuse: text, and the line that sends to --help. */
int dialect_usage(struct verb_ctx *ctx, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* The wrong number of positional arguments. */
int dialect_bad_positionals(struct verb_ctx *ctx);
/* Prints "qemu-img: text" and a second line when the dialect has set one. */
void dialect_print_error(const struct err *e);

/* ---- errors that verbs and helpers put into that program's words ---- */
/*
 * Rewrites the error of opening `name` (`before`: "Could not open" or another such start, a text
 * with a %s where the name goes, or one that ends in ": ").
 */
void dialect_open_error(struct verb_ctx *ctx, const char *name, const char *format,
                        const char *before);
/* The value of an option of the command line cannot be read. */
int dialect_bad_value(struct verb_ctx *ctx, const struct cli_opt *o, const char *value);
/* SIZE of create cannot be read. */
int dialect_image_size(struct verb_ctx *ctx);
/* Prints "Formatting ..."; -EINVAL with an error for options that cannot be read at all. */
int dialect_create_announce(struct verb_ctx *ctx, const struct driver *d, const json_t *tree,
                            bool quiet);
/* Rewrites the error of creating `name`, with `before` in front: "NAME: ". */
void dialect_create_error(struct verb_ctx *ctx, const char *name, const char *before);
/* An option of -o was refused: "Invalid parameter 'x'". */
int dialect_options_error(struct verb_ctx *ctx);
/*
 * Prints the create or amend options of a format in that program's form, with what files have of
 * their own when `file`. False: we are not called by its name, nothing was printed.
 */
bool dialect_option_help(const struct driver *d, unsigned when, bool file);
/* A text of -o as a whole; false with an error.  Always true under our own name. */
bool dialect_option_list_ok(struct verb_ctx *ctx, const char *text);
/* That program's sentence for one of ours, when it has another; else NULL. */
const char *dialect_sentence(const struct verb *v, const char *text);
/* Rewrites the error of amend; `tree`: its -o options. */
void dialect_amend_error(struct verb_ctx *ctx, const struct driver *d, const json_t *tree);
int dialect_bad_size(struct verb_ctx *ctx, const char *text);
/* -S of convert is out of its range. */
int dialect_sparse_size(struct verb_ctx *ctx);
/* The exit status for what cli_parse has refused. */
int dialect_misuse_status(void);
int dialect_bad_number(struct verb_ctx *ctx, const char *what);
/* A line that is printed behind the error, there only. */
void dialect_second_line(struct err *e, const char *text);
/* A writer took an image for raw because nobody said its format. */
void dialect_warn_guessed(struct verb_ctx *ctx, const struct node *n);

#endif
