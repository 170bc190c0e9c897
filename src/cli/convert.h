/* SPDX-License-Identifier: MIT */
/* The work of `convert`, for the verbs that are conversions in other words (dd). */
#ifndef STRATA_CLI_CONVERT_H
#define STRATA_CLI_CONVERT_H

#include <stdbool.h>
#include <stdint.h>
#include "cli/cli.h"
#include "cli/progress.h"

struct convert_args {
    struct cli_image src;
    const char *out_format;
    struct cli_list options;
    bool compress, no_create, out_of_order, target_image_opts, target_is_zero, salvage, quiet;
    bool offload; /* accepted for scripts: it is tried in any case */
    uint64_t workers, sparse, rate;
    const char *cache; /* NULL: chosen */
    const char *backing, *backing_format;
    struct progress_args progress;
    /* Of each source only what lies behind `skip`, and of that `count` bytes when limited. */
    bool windowed, limited;
    uint64_t skip, count;
};

/* What the verb does once its options are known: `names` are n - 1 sources and a target. */
int convert_with_co(struct verb_ctx *ctx, const struct convert_args *a, char **names, int n);

#endif
