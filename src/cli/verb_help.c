/* SPDX-License-Identifier: MIT */
/* help: the texts of the others, and what packagers install. */
#include <errno.h>
#include "base/strbuf.h"
#include "cli/cli.h"

static const char *const shell_names[] = {"none", "bash", NULL};

/* Whose page or script; the first is our own name. */
static const char *const program_names[] = {"strata", "qemu-img", "qemu-io", "qemu-nbd", NULL};

struct args {
    bool man;
    int shell, program;
};
static const struct cli_opt opts[] = {
    CLI_FLAG(struct args, man, 0, "man", "print the manual page as roff"),
    CLI_ENUM(struct args, shell, 0, "completion", "SHELL", shell_names, 0,
             "print the completion script of a shell"),
    CLI_ENUM(struct args, program, 0, "for", "PROGRAM", program_names, 0,
             "with --man or --completion: of a drop-in name"),
    CLI_END};

static int help_run(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    if (a->man) {
        if (a->program)
            cli_help_man_dropin(stdout, program_names[a->program]);
        else
            cli_help_man(stdout);
        return 0;
    }
    if (a->shell) {
        if (a->program)
            cli_help_bash_dropin(stdout, program_names[a->program]);
        else
            cli_help_bash(stdout);
        return 0;
    }
    if (!ctx->pos_n) {
        cli_help_overview(stdout);
        return 0;
    }
    const struct verb *v = verb_find(ctx->pos[0]);
    if (!v) {
        char *safe AUTO_FREE = cli_safe(ctx->pos[0]);
        struct str_nearest near = {0};
        for (int i = 0; verb_table[i]; i++)
            str_nearest_offer(&near, ctx->pos[0], verb_table[i]->name);
        err_set(&ctx->err, EINVAL, "unknown command '%s'", safe);
        if (near.best)
            err_hint(&ctx->err, "did you mean '%s'?", near.best);
        return -EINVAL;
    }
    cli_help_verb(v, stdout);
    return 0;
}

const struct verb verb_help = {
    .name = "help",
    .summary = "explain a command",
    .synopsis = "[COMMAND]",
    .pos_max = 1,
    .opts = opts,
    .args_size = sizeof(struct args),
    .run = help_run,
};
