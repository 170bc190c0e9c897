/* SPDX-License-Identifier: MIT */
/*
 * map: which parts of an image hold what, and where.
 *
 * Runs come from the engine as long as the format can make them; neighbours with one answer are
 * joined here, so a fully preallocated image is a few lines.  Only one run is held at a time:
 * memory does not grow with the image, and output is written through a large buffer.
 *
 * The JSON form is `qemu-img map --output=json`: one object a line inside one array.  Facts of that
 * form: an unallocated run has "present": false and the depth of the lowest layer that is long
 * enough to have it; "offset" is there when the bytes lie uncoded at one place; of two ways to have
 * zeros at an offset, a cluster of data over a hole in the file is "data": true, one that the
 * format marks as zeros is "data": false; and for raw, which has no clusters, a hole in the file is
 * "data": false.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include "base/ck.h"
#include "base/err.h"
#include "cli/cli.h"
#include "cli/dialect.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"

struct args {
    struct cli_image image;
    int output;
    uint64_t start, max_length;
};
static const struct cli_opt opts[] = {
    CLI_IMAGE_ROWS(struct args, image), CLI_OUTPUT_ROW(struct args, output),
    CLI_SIZE(struct args, start, 's', "start-offset", "OFFSET", 0, 0, INT64_MAX,
             "begin at this byte of the disk"),
    CLI_SIZE(struct args, max_length, 'l', "max-length", "LENGTH", INT64_MAX, 0, INT64_MAX - 1,
             "look at this many bytes; default all"),
    CLI_END};

struct run {
    uint64_t start, length;
    unsigned depth;
    bool present, zero, data, coded, has_offset;
    uint64_t offset;
    const char *file; /* of the storage; borrowed from the graph */
};

struct printer {
    bool json, any;
};

static bool joins(const struct run *a, const struct run *b) {
    return a->depth == b->depth && a->present == b->present && a->zero == b->zero &&
           a->data == b->data && a->coded == b->coded && a->has_offset == b->has_offset &&
           a->file == b->file && (!a->has_offset || a->offset + a->length == b->offset);
}

static void print_json_run(struct printer *p, const struct run *r) {
    static const char *const words[] = {"false", "true"};
    printf("%s{ \"start\": %" PRIu64 ", \"length\": %" PRIu64
           ", \"depth\": %u, \"present\": %s, \"zero\": %s, \"data\": %s, \"compressed\": %s",
           p->any ? ",\n" : "[", r->start, r->length, r->depth, words[r->present], words[r->zero],
           words[r->data], words[r->coded]);
    if (r->has_offset)
        printf(", \"offset\": %" PRIu64, r->offset);
    putchar('}');
    p->any = true;
}

static void print_hex(uint64_t v) {
    char text[24];
    snprintf(text, sizeof(text), v ? "%#" PRIx64 : "%" PRIx64, v);
    printf("%-16s", text);
}

/* For people only what is there: data that does not read as zeros. */
static void print_human_run(struct printer *p, const struct run *r) {
    if (!p->any)
        puts("Offset          Length          Mapped to       File");
    p->any = true;
    if (!r->data || r->zero)
        return;
    print_hex(r->start);
    print_hex(r->length);
    if (r->has_offset)
        print_hex(r->offset);
    else
        printf("%-16s", r->coded ? "compressed" : "-");
    char *safe AUTO_FREE = cli_safe(r->file ? r->file : "");
    puts(safe);
}

static void print_run(struct printer *p, const struct run *r) {
    if (!r->length)
        return;
    if (p->json)
        print_json_run(p, r);
    else
        print_human_run(p, r);
}

/* The node whose file name is shown: the lowest one that the layer's bytes lie in. */
static const char *file_of(const struct status *st) {
    const struct node *n = st->storage ? st->storage : st->layer ? st->layer->file : NULL;
    while (n && n->file)
        n = n->file;
    return n ? n->filename : NULL;
}

static struct run run_from_status(const struct status *st, uint64_t start) {
    struct run r = {
        .start = start,
        .length = st->length,
        .depth = st->depth,
        .present = st->present && (st->data || st->zero),
        .zero = st->zero,
        .data = st->data,
        .coded = st->coded,
        .has_offset = st->storage && !st->coded && (st->data || st->zero),
    };
    if (!st->present) {
        /* The number of layers that were asked becomes the last one of them. */
        r.depth = st->depth ? st->depth - 1 : 0;
        r.zero = true;
        r.offset = st->host_offset;
        return r;
    }
    /* Zeros with an offset: in a cluster of data over a hole, or in one marked as zeros. */
    if (st->zero && st->storage && st->layer->granularity > 1)
        r.data = !st->data;
    r.offset = r.has_offset ? st->host_offset : 0;
    r.file = r.has_offset || r.coded ? file_of(st) : NULL;
    return r;
}

/* What is special to that program's maps. */
struct manner {
    unsigned precise; /* status flags: ask the file for its holes */
    bool all_present; /* images that have nothing below them say that of all they hold */
};

static struct manner manner_of(const struct node *n) {
    const char *name = n->drv->name;
    if (!dialect_is_qemu())
        return (struct manner){.precise = STATUS_PRECISE};
    bool asks = n->drv->kind != DRIVER_FORMAT ||
                ((!strcmp(name, "raw") || !strcmp(name, "qcow2")) && !n->data_file);
    return (struct manner){.precise = asks ? STATUS_PRECISE : 0,
                           .all_present = !strcmp(name, "vdi") || !strcmp(name, "vpc")};
}

static int map_range_co(struct verb_ctx *ctx, struct node *n, uint64_t start, uint64_t end,
                        struct printer *p) {
    struct run cur = {0};
    struct manner m = manner_of(n);
    for (uint64_t at = start; at < end;) {
        struct status st;
        int rc = disk_status_co(n, at, end - at, m.precise, &st);
        if (rc < 0) {
            print_run(p, &cur);
            return err_errno(&ctx->err, -rc, "%s: reading the map at offset %" PRIu64, n->filename,
                             at);
        }
        struct run next = run_from_status(&st, at);
        next.present |= m.all_present;
        if (cur.length && joins(&cur, &next)) {
            cur.length += next.length;
        } else {
            print_run(p, &cur);
            cur = next;
        }
        at += st.length;
    }
    print_run(p, &cur);
    return 0;
}

static int map_run_co(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    struct node *n;
    int rc = cli_open_co(ctx, ctx->pos[0], &a->image, 0, &n);
    if (rc < 0)
        return rc;
    if (a->start > n->size && !dialect_is_qemu()) {
        rc = err_set(&ctx->err, EINVAL,
                     "option '--start-offset': %" PRIu64 " is behind the end of the disk (%" PRIu64
                     " bytes)",
                     a->start, n->size);
        node_unref_co(n);
        return rc;
    }
    if (!isatty(STDOUT_FILENO))
        setvbuf(stdout, NULL, _IOFBF, 1 << 16);
    struct printer p = {.json = a->output == OUTPUT_JSON};
    uint64_t end = min_u64(a->start, n->size);
    end += min_u64(a->max_length, n->size - end);
    if (!p.json && a->start >= end && dialect_is_qemu())
        puts("Offset          Length          Mapped to       File");
    rc = map_range_co(ctx, n, a->start, end, &p);
    if (p.json && !p.any && !n->size && dialect_is_qemu())
        print_json_run(&p, &(struct run){0}); /* there an empty disk is one empty run */
    if (p.json)
        puts(p.any ? "]" : "[]");
    node_unref_co(n);
    return rc;
}

static const char *const details[] = {
    "For people, one line each run of data that does not read as zeros: where it is on the disk, "
    "how long, and where its bytes lie in which file; \"compressed\" when they have to be decoded. "
    "With --output=json every run, zeros and unallocated ones included, with the keys of "
    "qemu-img: start, length, depth (0 is the image itself, 1 its backing file ...), present, zero, "
    "data, compressed and, where it applies, offset.",
    NULL};

static const struct cli_example examples[] = {
    {"strata map disk.qcow2", "Show where the data lies."},
    {"strata map --output=json -s 1G -l 64M disk.qcow2", "A part of it, for a program."},
    {NULL, NULL}};

const struct verb verb_map = {
    .name = "map",
    .summary = "show which parts of an image hold data, and where",
    .synopsis = "FILE",
    .pos_min = 1,
    .pos_max = 1,
    .opts = opts,
    .args_size = sizeof(struct args),
    .details = details,
    .examples = examples,
    .run_co = map_run_co,
};
