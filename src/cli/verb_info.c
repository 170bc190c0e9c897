/* SPDX-License-Identifier: MIT */
/*
 * info: what an image is.
 *
 * One image is opened alone: its backing file is named, not opened, so a missing or hostile one
 * does not matter.  --backing-chain opens the whole chain through the gate.
 *
 * The keys of the JSON form are those of `qemu-img info --output=json`, so that scripts work with
 * both; "problems" is ours: sentences about what is wrong.  A format may put "dirty-flag",
 * "encrypted" and "problems" into what it describes; they are shown one level up.
 *
 * The image is opened to look (OPEN_LOOK): one that is damaged, encrypted, or uses what is not
 * known here is described as far as its header goes.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include "base/size.h"
#include "cli/cli.h"
#include "cli/dialect.h"
#include "cli/info.h"
#include "cli/snapshots.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"

struct args {
    struct cli_image image;
    int output;
    bool chain;
};
static const struct cli_opt opts[] = {
    CLI_IMAGE_ROWS(struct args, image), CLI_OUTPUT_ROW(struct args, output),
    CLI_FLAG(struct args, chain, 0, "backing-chain", "describe the backing files, too"), CLI_END};

/* The name that the image claims for its backing file, from its folder; NULL when there is none or
 * it cannot be combined. */
static char *full_backing_name(const struct node *n) {
    return n->backing_name ? backing_resolve(n->filename, n->backing_name, NULL) : NULL;
}

/* That program has nothing to say about what is special to other formats. */
static bool shows_specifics(const struct node *n) {
    static const char *const formats[] = {"qcow2", "vmdk", "luks", NULL};
    for (int i = 0; formats[i]; i++)
        if (!strcmp(n->drv->name, formats[i]))
            return true;
    return !dialect_is_qemu();
}

/* Nor about the clusters of this one. */
static bool shows_cluster(const struct node *n) {
    return n->granularity > 1 && !(dialect_is_qemu() && !strcmp(n->drv->name, "parallels"));
}

static json_t *describe(struct node *n, const struct snapshot_list *snapshots) {
    json_t *j = json_object(), *children = info_children(n);
    if (snapshots->count)
        json_object_set_new(j, "snapshots", cli_snapshots_json(snapshots));
    if (children)
        json_object_set_new(j, "children", children);
    if (n->backing_format)
        json_object_set_new(j, "backing-filename-format", cli_json_name(n->backing_format));
    json_object_set_new(j, "virtual-size", json_integer((json_int_t)n->size));
    json_object_set_new(j, "filename", cli_json_name(n->filename));
    if (shows_cluster(n))
        json_object_set_new(j, "cluster-size", json_integer(n->granularity));
    json_object_set_new(j, "format", json_string(n->drv->name));
    int64_t allocated = disk_allocated(n);
    if (allocated >= 0)
        json_object_set_new(j, "actual-size", json_integer(allocated));
    const char *type;
    json_t *data = info_specifics(n, &type);
    json_t *dirty = json_incref(json_object_get(data, "dirty-flag"));
    json_t *encrypted = json_incref(json_object_get(data, "encrypted"));
    json_t *problems = info_problems(n, json_incref(json_object_get(data, "problems")));
    if (data) {
        json_object_del(data, "dirty-flag");
        json_object_del(data, "encrypted");
        json_object_del(data, "problems");
        if (shows_specifics(n))
            json_object_set_new(j, "format-specific",
                                json_pack("{s:s, s:O}", "type", type, "data", data));
        json_decref(data);
    }
    if (n->backing_name) {
        char *full AUTO_FREE = full_backing_name(n);
        if (full)
            json_object_set_new(j, "full-backing-filename", cli_json_name(full));
        json_object_set_new(j, "backing-filename", cli_json_name(n->backing_name));
    }
    if (encrypted)
        json_object_set_new(j, "encrypted", encrypted);
    if (n->granularity == 1 || shows_cluster(n))
        json_object_set_new(j, "dirty-flag", dirty ? dirty : json_false());
    else
        json_decref(dirty);
    if (problems && !dialect_is_qemu())
        json_object_set(j, "problems", problems);
    json_decref(problems);
    return j;
}

/* ---- for people ---- */

static void print_name(const char *label, const char *name) {
    char *safe AUTO_FREE = cli_safe(name);
    printf("%s: %s", label, safe);
}

/* A value of format-specific: one line, or a group indented below.  Drivers' trees are shallow. */
static void print_value(const char *key, const json_t *v, int indent) {
    printf("%*s", indent, "");
    for (const char *s = key; *s; s++)
        putchar(*s == '-' ? ' ' : *s);
    putchar(':');
    if (json_is_object(v) || json_is_array(v)) {
        putchar('\n');
        const char *sub;
        json_t *item;
        json_object_foreach((json_t *)v, sub, item) print_value(sub, item, indent + 4);
        size_t i;
        json_array_foreach(v, i, item) {
            char number[32];
            snprintf(number, sizeof(number), "[%zu]", i);
            print_value(number, item, indent + 4);
        }
        return;
    }
    putchar(' ');
    if (json_is_string(v)) {
        char *safe AUTO_FREE = cli_safe(json_string_value(v));
        puts(safe);
    } else if (json_is_integer(v)) {
        printf("%" JSON_INTEGER_FORMAT "\n", json_integer_value(v));
    } else if (json_is_real(v)) {
        printf("%g\n", json_real_value(v));
    } else {
        puts(json_is_true(v) ? "true" : json_is_false(v) ? "false" : "null");
    }
}

static void print_size(const char *label, uint64_t bytes, bool exact) {
    char human[32];
    printf("%s: %s", label, size_human(bytes, human));
    if (exact)
        printf(" (%" PRIu64 " bytes)", bytes);
    putchar('\n');
}

static void print_backing(const struct node *n) {
    print_name("backing file", n->backing_name);
    char *full AUTO_FREE = full_backing_name(n);
    if (!full)
        printf(" (cannot determine actual path)");
    else if (strcmp(full, n->backing_name)) {
        printf(" (");
        print_name("actual path", full);
        putchar(')');
    }
    putchar('\n');
}

static void print_human(struct node *n, const json_t *j, const struct snapshot_list *snapshots) {
    print_name("image", n->filename);
    printf("\nfile format: %s\n", n->drv->name);
    print_size("virtual size", n->size, true);
    const json_t *actual = json_object_get(j, "actual-size");
    if (actual)
        print_size("disk size", (uint64_t)json_integer_value(actual), false);
    else
        puts("disk size: unavailable");
    if (json_is_true(json_object_get(j, "encrypted")))
        puts("encrypted: yes");
    if (shows_cluster(n))
        printf("cluster_size: %" PRIu32 "\n", n->granularity);
    if (json_is_true(json_object_get(j, "dirty-flag")))
        puts("cleanly shut down: no");
    if (n->backing_name)
        print_backing(n);
    if (n->backing_format) {
        print_name("backing file format", n->backing_format);
        putchar('\n');
    }
    cli_snapshots_print(snapshots);
    json_t *data = json_object_get(json_object_get(j, "format-specific"), "data");
    if (json_object_size(data))
        puts("Format specific information:");
    const char *key;
    json_t *value;
    json_object_foreach(data, key, value) print_value(key, value, 4);
    info_print_children(n);
    info_print_problems(json_object_get(j, "problems"));
}

/* Under the drop-in name an image that cannot be used is refused, but for an encrypted one. */
static int open_co(struct verb_ctx *ctx, unsigned flags, struct node **out) {
    const struct args *a = ctx->args;
    bool look = !dialect_is_qemu();
    int rc = cli_open_co(ctx, ctx->pos[0], &a->image, flags | (look ? OPEN_LOOK : 0), out);
    if (rc == -ENOTSUP && !look && strstr(err_text(&ctx->err), "encryption")) {
        err_clear(&ctx->err);
        rc = cli_open_co(ctx, ctx->pos[0], &a->image, flags | OPEN_LOOK, out);
    }
    return rc;
}

/* A damaged table is no reason to show nothing else. */
static void load_snapshots_co(struct verb_ctx *ctx, struct node *n, struct snapshot_list *out) {
    struct err e AUTO_ERR = ERR_INIT;
    if (disk_has_snapshots(n) && disk_snapshot_list_co(n, out, &e) < 0)
        cli_print_warning(ctx, "%s: %s", n->filename, err_text(&e));
}

static int info_run_co(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    struct node *top;
    unsigned flags = OPEN_NO_DATA | (a->chain ? 0 : OPEN_NO_BACKING);
    int rc = open_co(ctx, flags, &top);
    if (rc < 0)
        return rc;
    json_t *list = json_array();
    for (struct node *n = top; n; n = n->backing) {
        AUTO_SNAPSHOTS struct snapshot_list snapshots = {0};
        load_snapshots_co(ctx, n, &snapshots);
        json_t *j = describe(n, &snapshots);
        json_array_append_new(list, j);
        if (a->output == OUTPUT_HUMAN) {
            if (n != top)
                putchar('\n');
            print_human(n, j, &snapshots);
        }
    }
    if (a->output == OUTPUT_JSON)
        cli_print_json(json_incref(a->chain ? list : json_array_get(list, 0)));
    json_decref(list);
    node_unref_co(top);
    return 0;
}

static const char *const details[] = {
    "Nothing but the image itself is opened: its backing file and its data file are named, not read. With "
    "--backing-chain each image of the chain is described, the one given first; the names inside "
    "images are then followed as far as --trust allows.",
    "With --output=json the keys are those of qemu-img.", NULL};

static const struct cli_example examples[] = {
    {"strata info disk.qcow2", "Show what disk.qcow2 is."},
    {"strata info --backing-chain --output=json overlay.qcow2",
     "Describe an overlay and everything below it, for a program."},
    {NULL, NULL}};

const struct verb verb_info = {
    .name = "info",
    .summary = "show what an image is",
    .synopsis = "FILE",
    .pos_min = 1,
    .pos_max = 1,
    .opts = opts,
    .args_size = sizeof(struct args),
    .details = details,
    .examples = examples,
    .run_co = info_run_co,
};
