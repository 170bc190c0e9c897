/* SPDX-License-Identifier: MIT */
/*
 * Internal snapshots on the command line: lists, and opening one of them.
 *
 * The list has the columns of qemu-img 9 and later, for both names of the program.
 */
#include "cli/snapshots.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <time.h>
#include "base/opt.h"
#include "base/size.h"
#include "cli/dialect.h"
#include "disk/node.h"
#include "disk/open.h"

#define NSEC UINT64_C(1000000000)
#define LINE "%-7s %-16s %8s %19s %15s %10s\n"

void cli_snapshots_print(const struct snapshot_list *l) {
    if (!l->count)
        return;
    puts("Snapshot list:");
    printf(LINE, "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT");
    for (size_t i = 0; i < l->count; i++) {
        const struct snapshot_info *x = &l->v[i];
        char *id AUTO_FREE = cli_safe(x->id), *name AUTO_FREE = cli_safe(x->name);
        char size[32], date[64] = "", clock[64], icount[32] = "--";
        uint64_t sec = x->vm_clock_nsec / NSEC;
        time_t when = x->date_sec;
        struct tm tm;
        if (localtime_r(&when, &tm))
            strftime(date, sizeof(date), "%Y-%m-%d %H:%M:%S", &tm);
        snprintf(clock, sizeof(clock), "%04" PRIu64 ":%02" PRIu64 ":%02" PRIu64 ".%03" PRIu64,
                 sec / 3600, sec / 60 % 60, sec % 60, x->vm_clock_nsec / 1000000 % 1000);
        if (x->icount != SNAPSHOT_ICOUNT_UNKNOWN)
            snprintf(icount, sizeof(icount), "%" PRIu64, x->icount);
        printf(LINE, id, name, size_human(x->vm_state_size, size), date, clock, icount);
    }
}

json_t *cli_snapshots_json(const struct snapshot_list *l) {
    json_t *list = json_array();
    for (size_t i = 0; i < l->count; i++) {
        const struct snapshot_info *x = &l->v[i];
        json_t *j = json_object();
        if (x->icount != SNAPSHOT_ICOUNT_UNKNOWN)
            json_object_set_new(j, "icount", json_integer((json_int_t)x->icount));
        json_object_set_new(j, "vm-clock-nsec",
                            json_integer((json_int_t)(x->vm_clock_nsec % NSEC)));
        json_object_set_new(j, "name", cli_json_name(x->name));
        json_object_set_new(j, "date-sec", json_integer(x->date_sec));
        json_object_set_new(j, "date-nsec", json_integer(x->date_nsec));
        json_object_set_new(j, "vm-clock-sec", json_integer((json_int_t)(x->vm_clock_nsec / NSEC)));
        json_object_set_new(j, "id", cli_json_name(x->id));
        json_object_set_new(j, "vm-state-size", json_integer((json_int_t)x->vm_state_size));
        json_array_append_new(list, j);
    }
    return list;
}

/* ---- opening one ---- */

static int bad_spec(struct verb_ctx *ctx, const char *spec, const char *key) {
    char *safe AUTO_FREE = cli_safe(spec);
    if (!dialect_is_qemu()) {
        err_set(&ctx->err, EINVAL, "'%s' does not say a snapshot", safe);
        err_hint(&ctx->err, "write snapshot.id=ID, snapshot.name=NAME, both, or an id or a name");
        return -EINVAL;
    }
    err_clear(&ctx->err);
    err_set(&ctx->err, EINVAL, "Invalid parameter 'snapshot.%s'", key ? key : "");
    cli_print_error(ctx, &ctx->err);
    err_clear(&ctx->err);
    return err_set(&ctx->err, EINVAL, "Failed in parsing snapshot param '%s'", safe);
}

/* "snapshot.id=1,snapshot.name=x" as the tree that the open takes. */
static int parse_spec(struct verb_ctx *ctx, const char *spec, json_t **tree) {
    const char *key;
    json_t *value;
    int rc = opt_parse_keyval(spec, NULL, tree, &ctx->err);
    const json_t *keys = rc ? NULL : json_object_get(*tree, "snapshot");
    if (rc < 0 || json_object_size(*tree) != 1 || !json_object_size(keys))
        return bad_spec(ctx, spec, NULL);
    json_object_foreach((json_t *)keys, key, value) {
        if ((strcmp(key, "id") && strcmp(key, "name")) || !json_is_string(value))
            return bad_spec(ctx, spec, key);
    }
    return 0;
}

/* In that program's words. */
static int not_there(struct verb_ctx *ctx, const char *image, const char *spec) {
    if (dialect_is_qemu()) {
        err_clear(&ctx->err);
        return err_set(&ctx->err, ENOENT, "Failed to load snapshot: Can't find snapshot");
    }
    char *safe AUTO_FREE = cli_safe(spec);
    err_clear(&ctx->err);
    err_set(&ctx->err, ENOENT, "%s has no snapshot '%s'", image, safe);
    err_hint(&ctx->err, "'strata snapshot -l %s' lists those that it has", image);
    return -ENOENT;
}

static int no_snapshots(struct verb_ctx *ctx, const struct node *n) {
    return err_set(&ctx->err, ENOTSUP,
                   cli_words("images of format '%s' cannot hold snapshots",
                             "Failed to load snapshot: Block format '%s' used by device '' does "
                             "not support temporarily loading internal snapshots"),
                   n->drv->name);
}

/* The id that `spec`, or the parsed `tree`, means; NULL with an error. */
static char *find_id_co(struct verb_ctx *ctx, struct node *n, const char *spec,
                        const json_t *tree) {
    AUTO_SNAPSHOTS struct snapshot_list list = {0};
    const struct snapshot_info *x;
    if (!disk_has_snapshots(n)) {
        no_snapshots(ctx, n);
        return NULL;
    }
    if (disk_snapshot_list_co(n, &list, &ctx->err) < 0) {
        err_prefix(&ctx->err, "%s", n->filename);
        return NULL;
    }
    const json_t *keys = json_object_get(tree, "snapshot");
    x = keys ? snapshot_find(&list, json_string_value(json_object_get(keys, "id")),
                             json_string_value(json_object_get(keys, "name")))
             : snapshot_find_key(&list, spec);
    if (!x)
        not_there(ctx, n->filename, spec);
    return x ? xstrdup(x->id) : NULL;
}

int cli_open_snapshot_co(struct verb_ctx *ctx, const char *name, const struct cli_image *image,
                         unsigned open_flags, const char *spec, struct node **out) {
    json_t *tree = NULL;
    struct node *n;
    int rc = 0;
    if (!spec)
        return cli_open_co(ctx, name, image, open_flags, out);
    if (!strncmp(spec, "snapshot.", 9))
        rc = parse_spec(ctx, spec, &tree);
    /* Once to see what there is, without what lies below, and once for the snapshot. */
    if (rc == 0)
        rc = cli_open_co(ctx, name, image, open_flags | OPEN_NO_BACKING, &n);
    if (rc < 0) {
        json_decref(tree);
        return rc;
    }
    char *id AUTO_FREE = find_id_co(ctx, n, spec, tree);
    const char *driver = n->drv->name;
    json_decref(tree);
    node_unref_co(n);
    if (!id)
        return -ctx->err.code;
    tree = json_pack("{s:s, s:{s:o}}", "driver", driver, "snapshot", "id", json_string_nocheck(id));
    rc = cli_open_with_co(ctx, name, image, open_flags, tree, out);
    json_decref(tree);
    return rc;
}
