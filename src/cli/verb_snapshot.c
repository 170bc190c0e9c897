/* SPDX-License-Identifier: MIT */
/*
 * snapshot: points in time that an image keeps inside itself.
 *
 * One action at a time: list (what is done when nothing else is asked), create, apply, delete.  The
 * backing file is not opened: no action reads what lies below.
 *
 * Under its drop-in name: a snapshot to delete is looked up by its name alone, one to apply by its
 * id and then by its name; a longer name than 255 bytes is cut off; without an action nothing is
 * done.
 */
#include <errno.h>
#include <string.h>
#include <sys/time.h>
#include "base/err.h"
#include "cli/cli.h"
#include "cli/dialect.h"
#include "cli/snapshots.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"

#define QEMU_NAME_MAX 255

struct args {
    struct cli_image image;
    bool list, quiet;
    const char *create, *apply, *del;
    int output;
};
static const struct cli_opt opts[] = {
    CLI_FLAG(struct args, list, 'l', "list", "list the snapshots (also when nothing is asked)"),
    CLI_STR(struct args, create, 'c', "create", "NAME", "keep what the disk holds now under NAME"),
    CLI_STR(struct args, apply, 'a', "apply", "SNAPSHOT",
            "make the disk what the snapshot holds; what it holds now is lost"),
    CLI_STR(struct args, del, 'd', "delete", "SNAPSHOT", "forget the snapshot and free its room"),
    CLI_IMAGE_ROWS(struct args, image),
    CLI_OUTPUT_ROW(struct args, output),
    CLI_QUIET_ROW(struct args, quiet),
    CLI_END};

static int check_args(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    int actions = a->list + !!a->create + !!a->apply + !!a->del;
    if (actions > 1)
        return dialect_is_qemu()
                   ? dialect_usage(ctx, "Cannot mix '-l', '-a', '-c', '-d'")
                   : err_set(&ctx->err, EINVAL, "-l, -c, -a and -d exclude each other");
    if (a->output == OUTPUT_JSON && (a->create || a->apply || a->del))
        return err_set(&ctx->err, EINVAL, "--output goes with -l");
    return 0;
}

/* ---- list ---- */

static int list_co(struct verb_ctx *ctx, struct node *n) {
    const struct args *a = ctx->args;
    AUTO_SNAPSHOTS struct snapshot_list list = {0};
    if (disk_has_snapshots(n) || !dialect_is_qemu()) {
        int rc = disk_snapshot_list_co(n, &list, &ctx->err);
        if (rc < 0)
            return err_prefix(&ctx->err, "%s", n->filename);
    }
    if (a->output == OUTPUT_JSON)
        cli_print_json(cli_snapshots_json(&list));
    else
        cli_snapshots_print(&list);
    return 0;
}

/* ---- create ---- */

static int create_failed(struct verb_ctx *ctx, const struct node *n, const char *name) {
    struct err *e = &ctx->err;
    char *safe AUTO_FREE = cli_safe(name);
    if (!dialect_is_qemu())
        return err_prefix(e, "%s: creating snapshot '%s'", n->filename, safe);
    int code = e->code == EOVERFLOW ? EINVAL : e->code;
    err_clear(e);
    return err_set(e, code, "Could not create snapshot '%s': %d (%s)", safe, -code, strerror(code));
}

static int create_co(struct verb_ctx *ctx, struct node *n, const char *name) {
    struct timeval now;
    gettimeofday(&now, NULL);
    struct snapshot_info info = {.name = xstrdup(name),
                                 .date_sec = (uint32_t)now.tv_sec,
                                 .date_nsec = (uint32_t)now.tv_usec * 1000,
                                 .icount = SNAPSHOT_ICOUNT_UNKNOWN};
    if (dialect_is_qemu() && strlen(info.name) > QEMU_NAME_MAX)
        info.name[QEMU_NAME_MAX] = 0;
    int rc = !*name && !dialect_is_qemu()
                 ? err_set(&ctx->err, EINVAL, "the name of a snapshot cannot be empty")
                 : disk_snapshot_create_co(n, &info, &ctx->err);
    if (rc < 0)
        rc = create_failed(ctx, n, name);
    snapshot_info_free(&info);
    return rc;
}

/* ---- apply, delete ---- */

static int not_found(struct verb_ctx *ctx, const struct node *n, const char *what,
                     const char *key) {
    char *safe AUTO_FREE = cli_safe(key);
    if (dialect_is_qemu())
        return err_set(&ctx->err, ENOENT,
                       *what == 'a' ? "Could not apply snapshot '%s': Failed to load snapshot: No "
                                      "such file or directory"
                                    : "Could not delete snapshot '%s': snapshot not found",
                       safe);
    err_set(&ctx->err, ENOENT, "%s has no snapshot '%s'", n->filename, safe);
    err_hint(&ctx->err, "'strata snapshot -l %s' lists those that it has", n->filename);
    return -ENOENT;
}

static int change_co(struct verb_ctx *ctx, struct node *n, const char *what, const char *key) {
    AUTO_SNAPSHOTS struct snapshot_list list = {0};
    char *safe AUTO_FREE = cli_safe(key);
    bool apply = *what == 'a';
    if (dialect_is_qemu() && !disk_has_snapshots(n))
        return apply ? err_set(&ctx->err, ENOTSUP,
                               "Could not apply snapshot '%s': Block driver does not support "
                               "snapshots",
                               safe)
                     : not_found(ctx, n, what, key);
    int rc = disk_snapshot_list_co(n, &list, &ctx->err);
    if (rc < 0)
        return err_prefix(&ctx->err, "%s", n->filename);
    const struct snapshot_info *x = dialect_is_qemu() && !apply ? snapshot_find(&list, NULL, key)
                                                                : snapshot_find_key(&list, key);
    if (!x)
        return not_found(ctx, n, what, key);
    rc = apply ? disk_snapshot_apply_co(n, x->id, &ctx->err)
               : disk_snapshot_delete_co(n, x->id, &ctx->err);
    if (rc < 0 && dialect_is_qemu())
        return err_prefix(&ctx->err, "Could not %s snapshot '%s'", what, safe);
    return rc < 0 ? err_prefix(&ctx->err, "%s: %s snapshot '%s'", n->filename,
                               apply ? "applying" : "deleting", safe)
                  : 0;
}

static int snapshot_run_co(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    bool writes = a->create || a->apply || a->del;
    struct node *n;
    int rc = check_args(ctx);
    if (rc < 0)
        return rc;
    rc = cli_open_co(ctx, ctx->pos[0], &a->image,
                     OPEN_NO_BACKING | (writes ? OPEN_RW | OPEN_UNMAP : 0), &n);
    if (rc < 0)
        return rc;
    if (writes)
        dialect_warn_guessed(ctx, n);
    if (a->create)
        rc = create_co(ctx, n, a->create);
    else if (a->apply)
        rc = change_co(ctx, n, "apply", a->apply);
    else if (a->del)
        rc = change_co(ctx, n, "delete", a->del);
    else if (a->list || !dialect_is_qemu())
        rc = list_co(ctx, n);
    node_unref_co(n);
    return rc;
}

static const char *const details[] = {
    "A snapshot holds the whole disk as it was, inside the image; it costs room only for what is "
    "written later. SNAPSHOT is an id or a name of the list; where several have the same name, the "
    "oldest is meant.",
    "Each change is made in one step: killed or without power in the middle of it, the image is as "
    "it was before, or has the change.",
    "A snapshot can be read without applying it: convert -l, measure -l, and everywhere by "
    "--image-opts with snapshot.name=NAME or snapshot.id=ID.",
    NULL};

static const struct cli_example examples[] = {
    {"strata snapshot -c clean disk.qcow2", "Keep the disk as it is now."},
    {"strata snapshot -l disk.qcow2", "What snapshots are there?"},
    {"strata snapshot -a clean disk.qcow2", "Go back; what was written since is lost."},
    {"strata serve --read-only --image-opts driver=qcow2,file.filename=disk.qcow2,"
     "snapshot.name=clean",
     "Look at the old state over NBD."},
    {NULL, NULL}};

const struct verb verb_snapshot = {
    .name = "snapshot",
    .summary = "keep, list, apply and delete states of a disk inside its image",
    .synopsis = "FILE",
    .pos_min = 1,
    .pos_max = 1,
    .opts = opts,
    .args_size = sizeof(struct args),
    .details = details,
    .examples = examples,
    .run_co = snapshot_run_co,
};
