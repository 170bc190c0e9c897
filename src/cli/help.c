/* SPDX-License-Identifier: MIT */
/*
 * --help, from the same rows that parse.  Text is wrapped at 80 columns whatever the terminal, so
 * that it can be compared and read in a pager.
 */
#include <stdio.h>
#include <string.h>
#include "base/size.h"
#include "base/strbuf.h"
#include "cli/cli.h"
#include "cli/dialect.h"
#include "cli/help.h"
#include "disk/driver.h"

enum { WIDTH = 80, OPTION_COLUMN = 27 };

/* Words of `text`, wrapped; the first line starts at column `at`, the others at `indent`. */
static void wrap(FILE *out, const char *text, int at, int indent) {
    bool first = true;
    for (const char *s = text; *s;) {
        size_t len = strcspn(s, " ");
        if (!first && at + 1 + (int)len > WIDTH) {
            fprintf(out, "\n%*s", indent, "");
            at = indent;
        } else if (!first) {
            fputc(' ', out);
            at++;
        }
        fwrite(s, 1, len, out);
        at += (int)len;
        first = false;
        s += len;
        s += strspn(s, " ");
    }
    fputc('\n', out);
}

void help_put_form(struct strbuf *b, const struct cli_opt *o) {
    if (o->letter)
        strbuf_printf(b, "-%c", o->letter);
    if (o->name)
        strbuf_printf(b, "%s--%s", o->letter ? ", " : "    ", o->name);
    if (o->metavar)
        strbuf_printf(b, "%s%s", o->name ? "=" : " ", o->metavar);
}

void help_put_text(struct strbuf *b, const struct cli_opt *o) {
    char human[32];
    strbuf_puts(b, o->help);
    if (o->type == CLI_T_ENUM) {
        strbuf_puts(b, ": ");
        for (int i = 0; o->names[i]; i++)
            strbuf_printf(b, "%s%s", !i ? "" : o->names[i + 1] ? ", " : " or ", o->names[i]);
        strbuf_printf(b, " (default %s)", o->names[o->def]);
    }
    bool number = o->type == CLI_T_U64 || o->type == CLI_T_SIZE;
    /* A default out of range stands for "chosen by strata" or "none". */
    if (number && o->def && o->def >= o->min && o->def <= o->max) {
        if (o->type == CLI_T_SIZE)
            strbuf_printf(b, " (default %s)", size_human(o->def, human));
        else
            strbuf_printf(b, " (default %llu)", (unsigned long long)o->def);
    }
    if (o->type == CLI_T_LIST)
        strbuf_puts(b, "; may be repeated");
}

void help_put_usage(struct strbuf *b, const struct verb *v) {
    if (dialect_verb(v->name))
        strbuf_puts(b, v->name);
    else
        strbuf_printf(b, "%s %s", dialect_program(), v->name);
    if (v->opts)
        strbuf_puts(b, " [OPTION...]");
    if (v->synopsis && *v->synopsis)
        strbuf_printf(b, " %s", v->synopsis);
    if (v->rest)
        strbuf_printf(b, " [-- %s]", v->rest);
}

static void print_row(FILE *out, const struct cli_opt *o) {
    struct strbuf form AUTO_STRBUF = STRBUF_INIT, text AUTO_STRBUF = STRBUF_INIT;
    strbuf_puts(&form, "  ");
    help_put_form(&form, o);
    help_put_text(&text, o);
    if (form.len + 2 > OPTION_COLUMN)
        fprintf(out, "%s\n%*s", form.s, OPTION_COLUMN, "");
    else
        fprintf(out, "%-*s", OPTION_COLUMN, form.s);
    wrap(out, text.s, OPTION_COLUMN, OPTION_COLUMN);
}

static void print_sections(const struct verb *v, FILE *out) {
    for (int i = 0; v->details && v->details[i]; i++) {
        fputc('\n', out);
        wrap(out, v->details[i], 0, 0);
    }
    if (v->statuses) {
        fputs("\nExit status:\n", out);
        for (const struct cli_status *s = v->statuses; s->meaning; s++) {
            fprintf(out, "  %-4d", s->status);
            wrap(out, s->meaning, 6, 6);
        }
    }
    if (v->examples) {
        fputs("\nExamples:\n", out);
        for (const struct cli_example *x = v->examples; x->command; x++)
            fprintf(out, "  %s\n      %s\n", x->command, x->what);
    }
}

void cli_help_verb(const struct verb *v, FILE *out) {
    struct strbuf usage AUTO_STRBUF = STRBUF_INIT;
    help_put_usage(&usage, v);
    fprintf(out, "Usage: %s\n\n%c%s.\n\nOptions:\n", usage.s, v->summary[0] - 'a' + 'A',
            v->summary + 1);
    bool own_h = false;
    for (const struct cli_opt *o = v->opts; o && (o->letter || o->name); o++) {
        if (dialect_hides(v, o) && !dialect_other_name(v, o, 0))
            continue;
        print_row(out, o);
        own_h = own_h || o->letter == 'h';
    }
    const struct cli_opt help = {
        .letter = own_h ? 0 : 'h', .name = "help", .type = CLI_T_FLAG, .help = "show this help"};
    print_row(out, &help);
    print_sections(v, out);
}

static void print_drivers(FILE *out, enum driver_kind kind, const char *title) {
    bool any = false;
    for (int i = 0; driver_table[i]; i++) {
        const struct driver *d = driver_table[i];
        if (d->kind != kind)
            continue;
        if (!any)
            fprintf(out, "\n%s:\n", title);
        any = true;
        fprintf(out, "  %-12s ", d->name);
        wrap(out, d->help ? d->help : "", 15, 15);
    }
}

void cli_help_overview(FILE *out) {
    fputs("Usage: strata COMMAND [OPTION...] [ARGUMENT...]\n\n"
          "Reads, writes, checks, converts, serves and boots virtual disk images.\n\n"
          "Commands:\n",
          out);
    for (int i = 0; verb_table[i]; i++)
        fprintf(out, "  %-12s %s\n", verb_table[i]->name, verb_table[i]->summary);
    print_drivers(out, DRIVER_FORMAT, "Formats");
    print_drivers(out, DRIVER_STORAGE, "Storage");
    print_drivers(out, DRIVER_FILTER, "Filters");
    fputs("\nOptions:\n"
          "  -h, --help     show this help; 'strata COMMAND --help' explains a command\n"
          "  -V, --version  show the version\n"
          "\n'strata create -f FORMAT -o help' lists the options of a format.\n",
          out);
}
