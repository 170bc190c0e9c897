/* SPDX-License-Identifier: MIT */
/*
 * The bash completion, from the verbs' tables: commands, options, the values of choices, formats;
 * file names otherwise.  The script is static text plus two generated case lists, so completing
 * starts no program.
 */
#include <stdio.h>
#include <string.h>
#include "cli/cli.h"
#include "disk/driver.h"

static void put_formats(FILE *out) {
    for (int i = 0; driver_table[i]; i++)
        if (driver_table[i]->kind == DRIVER_FORMAT)
            fprintf(out, " %s", driver_table[i]->name);
}

static void put_option_words(FILE *out, const struct verb *v) {
    fprintf(out, "    %s) opts=\"--help", v->name);
    for (const struct cli_opt *o = v->opts; o && (o->letter || o->name); o++) {
        if (o->letter)
            fprintf(out, " -%c", o->letter);
        if (o->name)
            fprintf(out, " --%s", o->name);
    }
    fputs("\" ;;\n", out);
}

/* "info,-f|info,--format) words=..." for each option whose values are known. */
static void put_value_case(FILE *out, const struct verb *v, const struct cli_opt *o) {
    bool format = o->metavar && !strcmp(o->metavar, "FMT");
    if (o->type != CLI_T_ENUM && !format)
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

void cli_help_bash(FILE *out) {
    fputs("# bash completion for strata; written by 'strata help --completion bash'\n"
          "_strata() {\n"
          "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}\n"
          "    local verb=${COMP_WORDS[1]} opts= words=\n"
          "    COMPREPLY=()\n"
          "    if [ \"$COMP_CWORD\" -eq 1 ]; then\n"
          "        COMPREPLY=($(compgen -W \"--help --version",
          out);
    for (int i = 0; verb_table[i]; i++)
        fprintf(out, " %s", verb_table[i]->name);
    fputs("\" -- \"$cur\"))\n"
          "        return\n"
          "    fi\n"
          "    # --option=value reaches us as three words\n"
          "    if [ \"$cur\" = = ]; then cur=; "
          "elif [ \"$prev\" = = ]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi\n"
          "    case $verb,$prev in\n",
          out);
    for (int i = 0; verb_table[i]; i++)
        for (const struct cli_opt *o = verb_table[i]->opts; o && (o->letter || o->name); o++)
            put_value_case(out, verb_table[i], o);
    fputs("    esac\n"
          "    case $verb in\n",
          out);
    for (int i = 0; verb_table[i]; i++)
        put_option_words(out, verb_table[i]);
    fputs("    esac\n"
          "    if [ -n \"$words\" ]; then\n"
          "        COMPREPLY=($(compgen -W \"$words\" -- \"$cur\"))\n"
          "    elif [[ $cur == -* ]]; then\n"
          "        COMPREPLY=($(compgen -W \"$opts\" -- \"$cur\"))\n"
          "    else\n"
          "        compopt -o filenames 2>/dev/null\n"
          "        COMPREPLY=($(compgen -f -- \"$cur\"))\n"
          "    fi\n"
          "}\n"
          "complete -F _strata strata\n",
          out);
}
