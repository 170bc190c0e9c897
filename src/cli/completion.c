/* SPDX-License-Identifier: MIT */
/*
 * The bash completion, from the verbs' tables: commands, options, the values of choices, formats;
 * file names otherwise.  The script is static text plus two generated case lists, so completing
 * starts no program.
 */
#include <stdio.h>
#include <string.h>
#include "cli/cli.h"
#include "cli/dialect.h"
#include "disk/driver.h"

static void put_formats(FILE *out) {
    for (int i = 0; driver_table[i]; i++)
        if (driver_table[i]->kind == DRIVER_FORMAT)
            fprintf(out, " %s", driver_table[i]->name);
}

/* A row that is not of the program, but for the names that it has there (aliases). */
static bool is_shown(const struct verb *v, const struct cli_opt *o) {
    return !dialect_hides(v, o);
}

static void put_option_words(FILE *out, const struct verb *v) {
    const char *other;
    fprintf(out, "    %s) opts=\"--help", v->name);
    if (dialect_is_qemu())
        fputs(" --object", out);
    for (const struct cli_opt *o = v->opts; o && (o->letter || o->name); o++) {
        for (int i = 0; (other = dialect_other_name(v, o, i)); i++)
            fprintf(out, " %s", other);
        if (o->letter && is_shown(v, o))
            fprintf(out, " -%c", o->letter);
        if (o->name && is_shown(v, o))
            fprintf(out, " --%s", o->name);
    }
    fputs("\" ;;\n", out);
}

/* "info,-f|info,--format) words=..." for each option whose values are known. */
static void put_value_case(FILE *out, const struct verb *v, const struct cli_opt *o) {
    bool format = o->metavar && (!strcmp(o->metavar, "FMT") || !strcmp(o->metavar, "FORMAT"));
    if ((o->type != CLI_T_ENUM && !format) || !is_shown(v, o))
        return;
    fputs("    ", out);
    if (o->letter)
        fprintf(out, "%s,-%c%s", v->name, o->letter, o->name ? "|" : "");
    if (o->name)
        fprintf(out, "%s,--%s", v->name, o->name);
    fputs(") words=\"", out);
    if (format)
        put_formats(out);
    else
        for (int i = 0; o->names[i]; i++)
            fprintf(out, "%s%s", i ? " " : "", o->names[i]);
    fputs("\" ;;\n", out);
}

/* A verb of the program: all are ours, some are qemu-img's, and the other programs are one each. */
static bool is_verb(const char *program, const struct verb *v) {
    return !strcmp(program, "strata") || dialect_is_img_verb(v->name);
}

static void put_script(FILE *out, const char *program, const struct verb *alone) {
    char function[32];
    bool own = !strcmp(program, "strata");
    snprintf(function, sizeof(function), "_strata%s%s", own ? "" : "_", own ? "" : program);
    for (char *s = function; *s; s++)
        if (*s == '-')
            *s = '_';
    fprintf(out,
            "# bash completion for %s; written by 'strata help --completion bash'\n"
            "%s() {\n"
            "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}\n"
            "    local verb=%s opts= words=\n"
            "    COMPREPLY=()\n",
            program, function, alone ? alone->name : "${COMP_WORDS[1]}");
    if (!alone) {
        fputs("    if [ \"$COMP_CWORD\" -eq 1 ]; then\n"
              "        COMPREPLY=($(compgen -W \"--help --version",
              out);
        for (int i = 0; verb_table[i]; i++)
            if (is_verb(program, verb_table[i]))
                fprintf(out, " %s", verb_table[i]->name);
        fputs("\" -- \"$cur\"))\n"
              "        return\n"
              "    fi\n",
              out);
    }
    fputs("    # --option=value reaches us as three words\n"
          "    if [ \"$cur\" = = ]; then cur=; "
          "elif [ \"$prev\" = = ]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi\n"
          "    case $verb,$prev in\n",
          out);
    const struct verb *const one[] = {alone, NULL}, *const *verbs = alone ? one : verb_table;
    for (int i = 0; verbs[i]; i++)
        for (const struct cli_opt *o = verbs[i]->opts; o && (o->letter || o->name); o++)
            if (alone || is_verb(program, verbs[i]))
                put_value_case(out, verbs[i], o);
    fputs("    esac\n"
          "    case $verb in\n",
          out);
    for (int i = 0; verbs[i]; i++)
        if (alone || is_verb(program, verbs[i]))
            put_option_words(out, verbs[i]);
    fprintf(out,
            "    esac\n"
            "    if [ -n \"$words\" ]; then\n"
            "        COMPREPLY=($(compgen -W \"$words\" -- \"$cur\"))\n"
            "    elif [[ $cur == -* ]]; then\n"
            "        COMPREPLY=($(compgen -W \"$opts\" -- \"$cur\"))\n"
            "    else\n"
            "        compopt -o filenames 2>/dev/null\n"
            "        COMPREPLY=($(compgen -f -- \"$cur\"))\n"
            "    fi\n"
            "}\n"
            "complete -F %s %s\n",
            function, program);
}

void cli_help_bash(FILE *out) {
    put_script(out, "strata", NULL);
}

void cli_help_bash_dropin(FILE *out, const char *program) {
    dialect_speak(program);
    put_script(out, program, dialect_verb(program));
}
