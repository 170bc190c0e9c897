/* SPDX-License-Identifier: MIT */
/* The texts that --help and the man page share. */
#ifndef STRATA_CLI_HELP_H
#define STRATA_CLI_HELP_H

#include "base/strbuf.h"
#include "cli/cli.h"

/* "-f, --format=FMT" */
void help_put_form(struct strbuf *b, const struct cli_opt *o);
/* The row's sentence with its choices and default. */
void help_put_text(struct strbuf *b, const struct cli_opt *o);
/* "strata info [OPTION...] FILE" */
void help_put_usage(struct strbuf *b, const struct verb *v);

#endif
