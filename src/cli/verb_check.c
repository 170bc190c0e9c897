/* SPDX-License-Identifier: MIT */
/*
 * check: is the metadata of an image consistent?  With -r, make it so.
 *
 * The work is the format's check_co; here are the list of problems (bounded: a ruined image has
 * millions), the totals, and the exit statuses of qemu-img's documentation.  The image alone is
 * opened, and for reading only unless it is to be repaired.  What was repaired is checked again, as
 * a stranger would; that second look decides the status.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include "base/err.h"
#include "cli/cli.h"
#include "cli/dialect.h"
#include "cli/progress.h"
#include "disk/driver.h"
#include "disk/node.h"
#include "disk/open.h"

/* Statuses; opening and usage errors are CHECK_FAILED, too. */
enum { CHECK_OK = 0, CHECK_FAILED = 1, CHECK_CORRUPT = 2, CHECK_LEAKS = 3, CHECK_UNSUPPORTED = 63 };

/* Problems shown one by one; the totals count all of them. */
enum { SHOWN_MAX = 1000 };

struct args {
    struct cli_image image;
    struct progress_args progress;
    int output;
    bool quiet;
    const char *repair;
};
static const struct cli_opt opts[] = {CLI_IMAGE_ROWS(struct args, image),
                                      CLI_OUTPUT_ROW(struct args, output),
                                      PROGRESS_ROWS(struct args, progress),
                                      CLI_QUIET_ROW(struct args, quiet),
                                      CLI_STR(struct args, repair, 'r', "repair", "WHAT",
                                              "repair the image: leaks, or all (leaks and errors)"),
                                      CLI_END};

struct watch {
    const struct args *args;
    struct progress bar;
    uint64_t shown;
};

/* Wrong reference counts in that program's words, a line for each cluster; false: other problems.
 */
static bool show_counts(struct watch *w, bool is_leak, const char *text) {
    uint64_t first, last, at, stored, found;
    if (sscanf(text,
               "clusters %" SCNu64 "-%" SCNu64 " from offset %" SCNu64
               " on: reference count is %" SCNu64 ", %" SCNu64 " references",
               &first, &last, &at, &stored, &found) != 5) {
        if (sscanf(text,
                   "cluster %" SCNu64 " at offset %" SCNu64 ": reference count is %" SCNu64
                   ", %" SCNu64 " references",
                   &first, &at, &stored, &found) != 4)
            return false;
        last = first;
    }
    for (; first <= last && w->shown < SHOWN_MAX; first++, w->shown++)
        fprintf(stderr, "%s cluster %" PRIu64 " refcount=%" PRIu64 " reference=%" PRIu64 "\n",
                is_leak ? "Leaked" : "ERROR", first, stored, found);
    return true;
}

static void show_problem(void *arg, bool is_leak, const char *text) {
    struct watch *w = arg;
    if (w->args->quiet || w->shown > SHOWN_MAX)
        return;
    if (dialect_is_qemu() && show_counts(w, is_leak, text))
        return;
    if (w->shown++ == SHOWN_MAX) {
        fprintf(stderr, "... and more\n");
        return;
    }
    char *safe AUTO_FREE = cli_safe(text);
    fprintf(stderr, "%s%s\n", is_leak ? "Leaked: " : "ERROR: ", safe);
}

static void show_progress(void *arg, uint64_t done, uint64_t total) {
    struct watch *w = arg;
    progress_update(&w->bar, done, total);
}

static void print_json(const struct node *n, const struct check_result *r) {
    json_t *j = json_object();
    /* In the order of qemu-img, which leaves most of them out when they are 0. */
    const struct {
        const char *key;
        uint64_t value;
        bool always, repair;
    } rows[] = {
        {"image-end-offset", r->image_end_offset},
        {"compressed-clusters", r->compressed_clusters},
        {"total-clusters", r->total_clusters},
        {"corruptions", r->corruptions},
        {"check-errors", r->check_errors, true},
        {"leaks", r->leaks},
        {"allocated-clusters", r->allocated_clusters},
        {"filename", 0},
        {"format", 0},
        {"fragmented-clusters", r->fragmented_clusters},
        {"corruptions-fixed", r->corruptions_fixed, false, true},
        {"leaks-fixed", r->leaks_fixed, false, true},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        if (!strcmp(rows[i].key, "filename"))
            json_object_set_new(j, "filename", cli_json_name(n->filename));
        else if (!strcmp(rows[i].key, "format"))
            json_object_set_new(j, "format", json_string(n->drv->name));
        else if (rows[i].value || rows[i].always || (!dialect_is_qemu() && !rows[i].repair))
            json_object_set_new(j, rows[i].key, json_integer((json_int_t)rows[i].value));
    }
    cli_print_json(j);
}

static double percent(uint64_t part, uint64_t whole) {
    return whole ? 100.0 * part / whole : 0;
}

static void print_human(const struct check_result *r) {
    if (!r->corruptions && !r->leaks && !r->check_errors)
        puts("No errors were found on the image.");
    if (r->corruptions)
        printf("\n%" PRIu64 " errors were found on the image.\n"
               "Data may be corrupted, or further writes to the image may corrupt it.\n",
               r->corruptions);
    if (r->leaks)
        printf("\n%" PRIu64 " leaked clusters were found on the image.\n"
               "This means waste of disk space, but no harm to data.\n",
               r->leaks);
    if (r->check_errors)
        printf("\n%" PRIu64 " internal errors have occurred during the check.\n", r->check_errors);
    if (r->total_clusters && (r->allocated_clusters || !dialect_is_qemu()))
        printf("%" PRIu64 "/%" PRIu64 " = %.2f%% allocated, %.2f%% fragmented, %.2f%% compressed "
               "clusters\n",
               r->allocated_clusters, r->total_clusters,
               percent(r->allocated_clusters, r->total_clusters),
               percent(r->fragmented_clusters, r->allocated_clusters),
               percent(r->compressed_clusters, r->allocated_clusters));
    if (r->image_end_offset)
        printf("Image end offset: %" PRIu64 "\n", r->image_end_offset);
}

static int status_of(const struct check_result *r) {
    if (r->corruptions)
        return CHECK_CORRUPT;
    if (r->check_errors)
        return CHECK_FAILED;
    return r->leaks ? CHECK_LEAKS : CHECK_OK;
}

/* Prints what to do about what is left. */
static void print_hint(const struct args *a, const struct check_result *r, const struct node *n) {
    unsigned repairs = n->drv->format->repairs;
    if (dialect_is_qemu() || a->quiet || a->output == OUTPUT_JSON)
        return;
    char *safe AUTO_FREE = cli_safe(n->filename);
    if (r->corruptions && !repairs)
        puts("Nothing repairs images of this format: copy what can be read to a new one with "
             "convert.");
    else if (r->corruptions && !a->repair)
        printf("To repair it: strata check -r all %s\n", safe);
    else if (r->corruptions)
        puts("What is left cannot be repaired without losing data: it can be read, so copy it to a "
             "new image with convert.");
    else if (r->leaks && repairs && !a->repair)
        printf("To give the space back: strata check -r leaks %s\n", safe);
}

static void print_fixed(const struct args *a, const struct check_result *r) {
    if (a->quiet || a->output == OUTPUT_JSON)
        return;
    printf("The following inconsistencies were found and repaired:\n\n"
           "    %" PRIu64 " leaked clusters\n    %" PRIu64 " corruptions\n\n"
           "Double checking the fixed image now...\n",
           r->leaks_fixed, r->corruptions_fixed);
}

static int check_once_co(struct verb_ctx *ctx, struct node *n, unsigned fix,
                         struct check_result *r) {
    const struct args *a = ctx->args;
    struct watch w = {.args = a};
    *r = (struct check_result){
        .fix = fix, .report = show_problem, .progress = show_progress, .arg = &w};
    progress_begin(&w.bar, &a->progress);
    int rc = n->drv->format->check_co(n, r, &ctx->err);
    progress_end(&w.bar, rc == 0);
    return rc < 0 ? err_prefix(&ctx->err, "%s", n->filename) : 0;
}

/* What that program does not count in images of some formats. */
static void forget_totals(const struct node *n, struct check_result *r) {
    if (!strcmp(n->drv->name, "qed") || !strcmp(n->drv->name, "vdi"))
        r->image_end_offset = 0;
    if (!strcmp(n->drv->name, "vdi"))
        r->total_clusters = r->allocated_clusters = r->fragmented_clusters = 0;
}

static int check_node_co(struct verb_ctx *ctx, struct node *n, unsigned fix) {
    const struct args *a = ctx->args;
    struct check_result r;
    int rc = check_once_co(ctx, n, fix, &r);
    if (!rc && (r.corruptions_fixed || r.leaks_fixed)) {
        uint64_t corruptions = r.corruptions_fixed, leaks = r.leaks_fixed;
        print_fixed(a, &r);
        rc = check_once_co(ctx, n, 0, &r);
        r.corruptions_fixed = corruptions;
        r.leaks_fixed = leaks;
    }
    if (rc < 0)
        return rc;
    if (dialect_is_qemu())
        forget_totals(n, &r);
    if (a->output == OUTPUT_JSON)
        print_json(n, &r);
    else if (!a->quiet)
        print_human(&r);
    print_hint(a, &r, n);
    return status_of(&r);
}

/* That program checks no images of VirtualPC. */
static bool has_check(const struct node *n) {
    return !dialect_is_qemu() || strcmp(n->drv->name, "vpc");
}

/* What -r asks for, as a mask of enum check_fix; -EINVAL. */
static int parse_repair(struct verb_ctx *ctx, unsigned *fix) {
    const char *what = ((const struct args *)ctx->args)->repair;
    *fix = 0;
    if (!what)
        return 0;
    if (!strcmp(what, "leaks"))
        *fix = CHECK_FIX_LEAKS;
    else if (!strcmp(what, "all"))
        *fix = CHECK_FIX_LEAKS | CHECK_FIX_ERRORS;
    else if (dialect_is_qemu())
        return dialect_usage(ctx, "Unknown option value for -r (expecting 'leaks' or 'all'): %s",
                             what);
    else
        return err_set(&ctx->err, EINVAL, "-r %s: what can be repaired is \"leaks\" or \"all\"",
                       what);
    return 0;
}

static int check_run_co(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    unsigned fix;
    int rc = parse_repair(ctx, &fix);
    if (rc)
        return rc;
    struct node *n;
    rc = cli_open_co(ctx, ctx->pos[0], &a->image,
                     OPEN_NO_BACKING | OPEN_NO_DATA | OPEN_CHECK | (fix ? OPEN_RW : 0), &n);
    if (rc < 0)
        return rc;
    if (n->drv->format && n->drv->format->check_co && has_check(n)) {
        rc = fix & ~n->drv->format->repairs
                 ? err_set(&ctx->err, ENOTSUP,
                           cli_words("%s: images of format '%s' cannot be repaired",
                                     "This image format does not support checks%.0s%.0s"),
                           n->filename, n->drv->name)
                 : check_node_co(ctx, n, fix);
        if (rc == -ENOTSUP) {
            cli_print_error(ctx, &ctx->err);
            err_clear(&ctx->err);
            rc = CHECK_UNSUPPORTED;
        }
    } else {
        struct err e AUTO_ERR = ERR_INIT;
        err_set(&e, ENOTSUP,
                cli_words("%s: images of format '%s' have nothing that could be checked",
                          "This image format does not support checks%.0s%.0s"),
                n->filename, n->drv->name);
        cli_print_error(ctx, &e);
        rc = CHECK_UNSUPPORTED;
    }
    node_unref_co(n);
    return rc;
}

static const char *const details[] = {
    "The metadata of the image is read and compared with itself; without -r the image is not "
    "changed, and its backing file is not opened. A leak is space that nothing uses: harmless. An "
    "error means that data is damaged or will be by writing.",
    "-r leaks gives lost space back. -r all repairs errors, too: reference counts, flags, damaged "
    "or missing reference count tables, entries that point behind the end of the file, data that "
    "shares its place with something else. What could be read before the repair reads the same "
    "afterwards, and a repair that is killed leaves an image that is no worse. Nobody else may have "
    "the image open meanwhile. Errors that could only be repaired by guessing stay, and are listed.",
    NULL};

static const struct cli_status statuses[] = {
    {CHECK_OK, "the image is consistent, or is after its repair"},
    {CHECK_FAILED, "the check could not be done"},
    {CHECK_CORRUPT, "the image is corrupted"},
    {CHECK_LEAKS, "the image has leaked clusters, and is not corrupted"},
    {CHECK_UNSUPPORTED, "the format has no check"},
    {0, NULL}};

static const struct cli_example examples[] = {
    {"strata check disk.qcow2", "Check an image."},
    {"strata check -q disk.qcow2 && echo good", "In a script."},
    {"strata check -r leaks disk.qcow2", "Give lost space back."},
    {"strata check -r all disk.qcow2", "Repair what can be repaired."},
    {NULL, NULL}};

const struct verb verb_check = {
    .name = "check",
    .summary = "look for damage in an image's metadata, and repair it",
    .synopsis = "FILE",
    .pos_min = 1,
    .pos_max = 1,
    .opts = opts,
    .args_size = sizeof(struct args),
    .details = details,
    .examples = examples,
    .statuses = statuses,
    .error_status = CHECK_FAILED,
    .run_co = check_run_co,
};
