/* SPDX-License-Identifier: MIT */
/*
 * strata(1) as roff, from the verbs' tables.  No date: the same source gives the same page.
 *
 * Every text passes put(), which writes "\" and "-" as roff wants them and keeps a line that begins
 * with a control character (. or ') from being taken as a request.
 */
#include <ctype.h>
#include <stdio.h>
#include <string.h>
#include "base/strbuf.h"
#include "cli/cli.h"
#include "cli/dialect.h"
#include "cli/help.h"
#include "cli/io_cmd.h"
#include "base/version.h"
#include "disk/driver.h"

static void put(FILE *out, const char *text) {
    if (*text == '.' || *text == '\'')
        fputs("\\&", out);
    for (const char *s = text; *s; s++)
        if (*s == '\\')
            fputs("\\e", out);
        else if (*s == '-')
            fputs("\\-", out);
        else
            fputc(*s, out);
}

static void put_line(FILE *out, const char *request, const char *text) {
    fputs(request, out);
    put(out, text);
    fputc('\n', out);
}

static void put_tagged(FILE *out, const char *tag, const char *text) {
    fputs(".TP\n.B ", out);
    put(out, tag);
    fputc('\n', out);
    put_line(out, "", text);
}

static void put_options(FILE *out, const struct verb *v) {
    for (const struct cli_opt *o = v->opts; o && (o->letter || o->name); o++) {
        struct strbuf form AUTO_STRBUF = STRBUF_INIT, text AUTO_STRBUF = STRBUF_INIT;
        bool hidden = dialect_hides(v, o);
        const char *other = dialect_other_name(v, o, 0);
        if (hidden && !other)
            continue;
        if (!hidden)
            help_put_form(&form, o);
        for (int i = 0; (other = dialect_other_name(v, o, i)); i++)
            strbuf_printf(&form, "%s%s%s%s", form.len ? ", " : "", other,
                          o->metavar ? other[1] == '-' ? "=" : " " : "",
                          o->metavar ? o->metavar : "");
        help_put_text(&text, o);
        put_tagged(out, form.s + strspn(form.s, " "), text.s);
    }
}

static void put_verb(FILE *out, const struct verb *v) {
    struct strbuf usage AUTO_STRBUF = STRBUF_INIT;
    help_put_usage(&usage, v);
    put_line(out, ".SS ", usage.s);
    fprintf(out, "%c", toupper((unsigned char)v->summary[0]));
    put(out, v->summary + 1);
    fputs(".\n", out);
    put_options(out, v);
    /* What follows speaks of options and examples of our own. */
    bool own = !dialect_is_qemu();
    for (int i = 0; own && v->details && v->details[i]; i++) {
        fputs(".PP\n", out);
        put_line(out, "", v->details[i]);
    }
    if (v->statuses)
        fputs(".PP\nExit status:\n", out);
    for (const struct cli_status *s = v->statuses; s && s->meaning; s++) {
        char number[16];
        snprintf(number, sizeof(number), "%d", s->status);
        put_tagged(out, number, s->meaning);
    }
    for (const struct cli_example *x = v->examples; own && x && x->command; x++) {
        fputs(".PP\n", out);
        put_line(out, "", x->what);
        fputs(".PP\n.nf\n", out);
        put_line(out, "    ", x->command);
        fputs(".fi\n", out);
    }
}

static void put_drivers(FILE *out, enum driver_kind kind, const char *title) {
    fprintf(out, ".SH %s\n", title);
    for (int i = 0; driver_table[i]; i++)
        if (driver_table[i]->kind == kind)
            put_tagged(out, driver_table[i]->name,
                       driver_table[i]->help ? driver_table[i]->help : "");
}

void cli_help_man(FILE *out) {
    fputs(".TH STRATA 1 \"\" \"strata " STRATA_VERSION "\" \"User Commands\"\n"
          ".SH NAME\nstrata \\- virtual disk images: read, write, check, convert, serve, boot\n"
          ".SH SYNOPSIS\n.B strata\n.I COMMAND\n[\\fIOPTION\\fR...] [\\fIARGUMENT\\fR...]\n"
          ".SH DESCRIPTION\nOptions and arguments may be given in any order; \\fB\\-\\-\\fR ends "
          "the options. Sizes are bytes, or take a suffix k, M, G, T, P or E, each 1024 times the "
          "one before. Image names are file names; a name with a colon before any slash is a "
          "protocol (write ./a:b for such a file), and json:{...} gives every option.\n"
          ".SH COMMANDS\n",
          out);
    for (int i = 0; verb_table[i]; i++)
        put_verb(out, verb_table[i]);
    put_drivers(out, DRIVER_FORMAT, "FORMATS");
    put_drivers(out, DRIVER_STORAGE, "STORAGE");
    fputs(".SH ENVIRONMENT\n", out);
    put_tagged(out, "STRATA_AIO",
               "uring or threads: how files are read and written. Chosen by what the kernel "
               "allows when not set.");
    put_tagged(out, "STRATA_LOG",
               "error, warn, info or debug: which diagnostics appear on standard error (warn).");
    put_tagged(out, "TMPDIR", "where the scratch files of temporary snapshots lie (/var/tmp).");
    fputs(".SH EXIT STATUS\n0 on success, 1 on an error, unless the command says otherwise.\n",
          out);
}

/* ---------------------------------------------------------------- the drop-in names */

static void put_object(FILE *out) {
    put_tagged(out, "--object TYPE,id=ID,...",
               "accepted with every command: secrets and TLS credentials");
}

static void put_io_commands(FILE *out) {
    fputs(".SH COMMANDS\n", out);
    const struct io_cmd *c;
    for (size_t i = 0; (c = io_command(i)); i++) {
        struct strbuf form AUTO_STRBUF = STRBUF_INIT, text AUTO_STRBUF = STRBUF_INIT;
        strbuf_printf(&form, "%s%s%s %s", c->name, c->alias ? ", " : "", c->alias ? c->alias : "",
                      c->args ? c->args : "");
        strbuf_puts(&text, c->summary);
        for (int k = 0; c->details && c->details[k]; k++)
            strbuf_printf(&text, "; %s", c->details[k] + strspn(c->details[k], " "));
        put_tagged(out, form.s, text.s);
    }
}

void cli_help_man_dropin(FILE *out, const char *program) {
    dialect_speak(program);
    const struct verb *alone = dialect_verb(program);
    struct strbuf title AUTO_STRBUF = STRBUF_INIT;
    strbuf_puts(&title, "STRATA-");
    for (const char *s = program; *s; s++)
        strbuf_printf(&title, "%c", toupper((unsigned char)*s));
    fputs(".TH ", out);
    put(out, title.s);
    fputs(" 1 \"\" \"strata " STRATA_VERSION "\" \"User Commands\"\n.SH NAME\n", out);
    put(out, "strata-");
    put(out, program);
    fputs(" \\- ", out);
    put(out, alone ? alone->summary : "QEMU disk image utility, by strata");
    fputs("\n.SH SYNOPSIS\n.B ", out);
    put(out, program);
    fputs(alone ? "\n[\\fIOPTION\\fR...] "
                : "\n.I COMMAND\n[\\fIOPTION\\fR...] [\\fIARGUMENT\\fR...]",
          out);
    if (alone && alone->synopsis)
        put(out, alone->synopsis);
    fputs(
        "\n.SH DESCRIPTION\nstrata under the name of one of QEMU's programs, with its command line, "
        "messages and exit statuses. The link lies in libexec/strata/qemu; put that folder first on "
        "PATH. Long options may be abbreviated. What is different from QEMU's own program is listed "
        "in docs/dropin.md.\n",
        out);
    if (alone) {
        fputs(".SH OPTIONS\n", out);
        put_options(out, alone);
        put_object(out);
        if (alone == &verb_qemu_io)
            put_io_commands(out);
    } else {
        fputs(".SH OPTIONS\n", out);
        put_tagged(out, "-h, --help", "list the commands; behind a command, its options");
        put_tagged(out, "-V, --version", "print the version");
        put_tagged(out, "-T, --trace=WHAT", "accepted; there is nothing to switch on");
        put_object(out);
        fputs(".SH COMMANDS\n", out);
        for (int i = 0; verb_table[i]; i++)
            if (dialect_is_img_verb(verb_table[i]->name))
                put_verb(out, verb_table[i]);
        put_drivers(out, DRIVER_FORMAT, "FORMATS");
    }
    fputs(".SH EXIT STATUS\n0 on success, 1 on an error, unless a command says otherwise.\n"
          ".SH SEE ALSO\n.BR strata (1)\n",
          out);
}
