/* SPDX-License-Identifier: MIT */
/* The work of `convert`, for the verbs that are conversions in other words (dd). */
#ifndef STRATA_CLI_CONVERT_H
#define STRATA_CLI_CONVERT_H

#include <stdbool.h>
#include <stdint.h>
#include "cli/cli.h"
#include "cli/progress.h"
#include "disk/node.h"
#include "disk/open.h"

struct convert_args {
    struct cli_image src;
    const char *out_format;
    struct cli_list options;
    bool compress, no_create, out_of_order, target_image_opts, target_is_zero, salvage, quiet;
    bool bitmaps, skip_broken_bitmaps;
    bool offload; /* accepted for scripts: it is tried in any case */
    uint64_t workers, sparse, rate;
    const char *cache; /* NULL: chosen */
    const char *backing, *backing_format;
    const char *snapshot; /* of the source; NULL: the disk itself */
    struct progress_args progress;
    /* Of each source only what lies behind `skip`, and of that `count` bytes when limited. */
    bool windowed, limited;
    uint64_t skip, count;
};

/* One conversion under way (verb_convert.c, convert_pipe.c). */
struct convert {
    struct verb_ctx *ctx;
    const struct convert_args *a;
    char **names; /* of the sources, then the target */
    const char *target_name;
    const struct driver *format; /* of a new target */
    struct node **src;
    int src_n;
    uint64_t size;     /* of all sources */
    struct node *file; /* storage of a new target, for the link */
    struct node *dst;
    bool unnamed;   /* file gets its name at the end */
    bool zero_init; /* what is not written reads as zeros */
    bool top_only;  /* the target has a backing file that the user named */
    bool cancel;
    struct progress bar;
    uint64_t done_before; /* by the sources before this one */
    const struct node *src_now;
};

/* ---- verb_convert.c ---- */
/* What the verb does once its options are known: `names` are n - 1 sources and a target. */
int convert_with_co(struct verb_ctx *ctx, const struct convert_args *a, char **names, int n);

/* Create options of the target, size and backing file included; new reference. */
int convert_create_options(struct convert *c, json_t **out);
int convert_copy_all_co(struct convert *c);

/* ---- convert_pipe.c ---- */
/* "-": standard input or output. */
bool convert_is_pipe(const char *name);
/* A source for what comes on standard input. */
int convert_open_stdin_co(struct convert *c, struct node **out);
/* The stream goes straight into a new raw file: then convert_store_stdin_co does it all. */
bool convert_stores_stdin(const struct convert *c, int sources);
int convert_store_stdin_co(struct convert *c);
/* The sources are open. */
int convert_to_stdout_co(struct convert *c);

/* ---- convert_bitmaps.c ---- */
struct node;
/* Whether the bitmaps of `src` can be copied: before anything is. */
int convert_bitmaps_check(struct verb_ctx *ctx, const struct node *src, bool skip_broken);
/* Once the data is there.  Stored when it returns 0. */
int convert_bitmaps_co(struct verb_ctx *ctx, struct node *src, struct node *dst, bool skip_broken);

#endif
