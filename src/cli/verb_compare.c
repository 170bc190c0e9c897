/* SPDX-License-Identifier: MIT */
/*
 * strata compare: do two images hold the same disk?  Statuses and texts are those of qemu-img.
 */
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include "base/cleanup.h"
#include "base/err.h"
#include "cli/cli.h"
#include "cli/dialect.h"
#include "cli/progress.h"
#include "disk/node.h"
#include "disk/open.h"
#include "job/compare.h"
#include "runtime/loop.h"

enum { STATUS_SAME, STATUS_DIFFER, STATUS_OPEN, STATUS_MAP, STATUS_READ };

struct compare_args {
    struct cli_image image;
    const char *format2;
    bool strict, quiet;
    struct progress_args progress;
};

static const struct cli_opt compare_rows[] = {
    CLI_STR(struct compare_args, image.format, 'f', "format", "FMT",
            "format of the first image; probed when not given"),
    CLI_STR(struct compare_args, format2, 'F', "format2", "FMT",
            "format of the second image; probed when not given"),
    CLI_IMAGE_OPTS_ROW(struct compare_args, image.image_opts),
    CLI_FORCE_SHARE_ROW(struct compare_args, image.force_share),
    CLI_CACHE_ROW(struct compare_args, image.cache, 'T', "source-cache", CACHE_WRITEBACK),
    CLI_TRUST_ROW(struct compare_args, image.trust),
    CLI_FLAG(struct compare_args, strict, 's', "strict",
             "sizes and allocation must be the same too"),
    CLI_QUIET_ROW(struct compare_args, quiet),
    PROGRESS_ROWS(struct compare_args, progress),
    CLI_END,
};

struct compare_verb {
    const struct compare_args *a;
    struct progress bar;
    bool cancel;
};

static void on_progress(void *arg, uint64_t done, uint64_t total) {
    struct compare_verb *v = arg;
    progress_update(&v->bar, done, total);
}

static void on_signal(void *arg, int signo) {
    struct compare_verb *v = arg;
    v->cancel = true;
}

static int report(const struct compare_args *a, const struct node *n1, const struct node *n2,
                  const struct compare_result *res) {
    uint64_t common = n1->size < n2->size ? n1->size : n2->size;
    bool say = !a->quiet;
    if (res->verdict == COMPARE_SIZE) {
        if (say)
            printf("Strict mode: Image size mismatch!\n");
        return STATUS_DIFFER;
    }
    /* Said only when the part that both have does not differ already. */
    if (say && n1->size != n2->size && (res->verdict == COMPARE_SAME || res->offset >= common))
        printf("Warning: Image size mismatch!\n");
    if (res->verdict == COMPARE_ALLOCATION) {
        if (say)
            printf("Strict mode: Offset %" PRIu64 " block status mismatch!\n", res->offset);
        return STATUS_DIFFER;
    }
    if (res->verdict == COMPARE_CONTENT) {
        if (say)
            printf("Content mismatch at offset %" PRIu64 "!\n", res->offset);
        return STATUS_DIFFER;
    }
    if (say)
        printf("Images are identical.\n");
    return STATUS_SAME;
}

static int fail_status(struct verb_ctx *ctx, const struct node *n1, const struct node *n2,
                       const struct compare_result *res) {
    const char *at = strstr(err_text(&ctx->err), " at offset ");
    if (dialect_is_qemu() && res->stage == COMPARE_READ && at) {
        /* "reading NAME at offset N: why" in that program's order. */
        const struct node *n =
            !strncmp(ctx->err.text + 8, n1->filename, strlen(n1->filename)) ? n1 : n2;
        char *rest AUTO_FREE = xstrdup(at + 11), *colon = strchr(rest, ':');
        int code = ctx->err.code;
        if (colon)
            *colon = 0;
        err_clear(&ctx->err);
        err_set(&ctx->err, code, "Error while reading offset %s of %s: %s", rest, n->filename,
                strerror(code));
        if (n1->size != n2->size)
            printf("Warning: Image size mismatch!\n");
    }
    cli_print_error(ctx, &ctx->err);
    return res->stage == COMPARE_MAP    ? STATUS_MAP
           : res->stage == COMPARE_READ ? STATUS_READ
                                        : STATUS_OPEN;
}

static int compare_both_co(struct verb_ctx *ctx, struct node *n1, struct node *n2) {
    const struct compare_args *a = ctx->args;
    struct compare_verb v = {.a = a};
    bool show = !a->quiet; /* or counted, for SIGUSR1 */
    struct compare_opts o = {.strict = a->strict, .cancel = &v.cancel, .arg = &v};
    struct compare_result res;
    if (show) {
        progress_begin(&v.bar, &a->progress);
        o.progress = on_progress;
    }
    loop_on_signal(ctx->loop, SIGINT, on_signal, &v);
    loop_on_signal(ctx->loop, SIGTERM, on_signal, &v);
    int r = compare_run_co(n1, n2, &o, &res, &ctx->err);
    loop_off_signal(ctx->loop, SIGINT);
    loop_off_signal(ctx->loop, SIGTERM);
    if (show)
        progress_end(&v.bar, r == 0);
    return r < 0 ? fail_status(ctx, n1, n2, &res) : report(a, n1, n2, &res);
}

static int compare_run_verb_co(struct verb_ctx *ctx) {
    const struct compare_args *a = ctx->args;
    if (a->image.image_opts && (a->image.format || a->format2))
        return err_set(&ctx->err, EINVAL, "%s",
                       cli_words("--image-opts and -f or -F exclude each other",
                                 "--image-opts and --format are mutually exclusive"));
    struct cli_image second = a->image;
    second.format = a->format2;
    struct node *n1, *n2;
    int r = cli_open_co(ctx, ctx->pos[0], &a->image, 0, &n1);
    if (r < 0)
        return r;
    r = cli_open_co(ctx, ctx->pos[1], &second, 0, &n2);
    if (r == 0) {
        r = compare_both_co(ctx, n1, n2);
        node_unref_co(n2);
    }
    node_unref_co(n1);
    return r;
}

static const char *const compare_details[] = {
    "Compares what the two disks read as, whatever their formats. A longer disk is the same when it "
    "holds only zeros behind the end of the shorter one.",
    NULL,
};
static const struct cli_example compare_examples[] = {
    {"strata compare disk.raw disk.qcow2", "See whether a conversion went well."},
    {NULL, NULL},
};
static const struct cli_status compare_statuses[] = {
    {STATUS_SAME, "the images are identical"},
    {STATUS_DIFFER, "the images differ"},
    {STATUS_OPEN, "an image could not be opened, or the command line was wrong"},
    {STATUS_MAP, "the map of an image could not be read"},
    {STATUS_READ, "data could not be read"},
    {0, NULL},
};

const struct verb verb_compare = {
    .name = "compare",
    .summary = "see whether two images hold the same disk",
    .synopsis = "FILE1 FILE2",
    .pos_min = 2,
    .pos_max = 2,
    .opts = compare_rows,
    .args_size = sizeof(struct compare_args),
    .details = compare_details,
    .examples = compare_examples,
    .statuses = compare_statuses,
    .error_status = STATUS_OPEN,
    .run_co = compare_run_verb_co,
};
