/* SPDX-License-Identifier: MIT */
/*
 * strata convert: one or more images become one, through the copy engine.
 *
 * A new target is made without a name, filled, flushed, and only then linked under its final name;
 * so whatever ends the program early, no half image is ever found there.  With -n an existing
 * target is written where it is, and keeps what was written before an error.
 *
 * Cache mode of a new target.  The result is on stable storage before it gets its name, so each
 * byte must reach the device anyway; going there directly (O_DIRECT) needs no page cache and half
 * the processor time: 4 GiB on ext4 take 1.4 s synced, through the page cache 2.1 s and up to 11 s
 * where memory must be found first.  So direct is the default where the file system has it, also
 * for -t unsafe, which asks for speed and skips the sync.  Compressed output is small and comes in
 * odd pieces: page cache.  Any other -t decides by hand.
 */
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "cli/cli.h"
#include "cli/convert.h"
#include "cli/dialect.h"
#include "cli/progress.h"
#include "cli/snapshots.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "job/copy.h"
#include "runtime/loop.h"

enum { WORKERS_MAX = 16, SPARSE_DEFAULT = 4096, SPARSE_MAX_QEMU = 16 << 20 };

static const struct cli_opt convert_opts[] = {
    CLI_FORMAT_ROW(struct convert_args, src.format),
    CLI_IMAGE_OPTS_ROW(struct convert_args, src.image_opts),
    CLI_FORCE_SHARE_ROW(struct convert_args, src.force_share),
    CLI_CACHE_ROW(struct convert_args, src.cache, 'T', "source-cache", CACHE_WRITEBACK),
    CLI_TRUST_ROW(struct convert_args, src.trust),
    CLI_STR(struct convert_args, out_format, 'O', "target-format", "FMT",
            "format of the target (default: raw)"),
    CLI_LIST(struct convert_args, options, 'o', "options", "KEY=VALUE,...",
             "create options of the target; -o help lists them"),
    CLI_FLAG(struct convert_args, compress, 'c', "compress", "compress the target"),
    CLI_SIZE(struct convert_args, sparse, 'S', "sparse-size", "SIZE", SPARSE_DEFAULT, 0, GIB,
             "runs of zeros at least this long become holes; 0: none, everything is allocated"),
    CLI_FLAG(struct convert_args, no_create, 'n', "no-create",
             "write into the existing target instead of making one"),
    CLI_FLAG(struct convert_args, target_is_zero, 0, "target-is-zero",
             "with -n: the target reads as zeros already"),
    CLI_FLAG(struct convert_args, out_of_order, 'W', "out-of-order",
             "write in any order, so that the target may be less sequential (not with -c)"),
    CLI_U64(struct convert_args, workers, 'm', "workers", "N", 0, 1, WORKERS_MAX,
            "requests in flight (default: chosen by the number of processors)"),
    CLI_STR(struct convert_args, cache, 't', "cache", "MODE",
            "how the host caches the target; unsafe skips the sync before the name is given"),
    CLI_STR(struct convert_args, backing, 'B', "backing", "FILE",
            "backing file of the target, with the content of the source's backing: only what the "
            "source holds itself is written"),
    CLI_STR(struct convert_args, backing_format, 'F', "backing-format", "FMT",
            "format of the target's backing file"),
    CLI_FLAG(struct convert_args, target_image_opts, 0, "target-image-opts",
             "the target's name is key=value,... options (with -n)"),
    CLI_SIZE(struct convert_args, rate, 'r', "rate-limit", "BYTES", 0, 0, INT64_MAX,
             "bytes a second at most"),
    CLI_FLAG(struct convert_args, salvage, 0, "salvage",
             "write zeros for what cannot be read and go on"),
    CLI_FLAG(struct convert_args, bitmaps, 0, "bitmaps",
             "copy the persistent dirty bitmaps of the source too"),
    CLI_FLAG(struct convert_args, skip_broken_bitmaps, 0, "skip-broken-bitmaps",
             "with --bitmaps: leave out those that are damaged instead of failing"),
    CLI_FLAG(struct convert_args, offload, 'C', "copy-offload",
             "let the storage copy or share the data itself (tried anyway where it costs nothing)"),
    CLI_STR(struct convert_args, snapshot, 'l', "snapshot", "SNAPSHOT",
            "copy this internal snapshot of the source: snapshot.id=ID, snapshot.name=NAME, or one "
            "of the two alone"),
    CLI_QUIET_ROW(struct convert_args, quiet),
    PROGRESS_ROWS(struct convert_args, progress),
    CLI_END,
};

static int misuse(struct verb_ctx *ctx, const char *text) {
    return err_set(&ctx->err, EINVAL, "%s", text);
}

/* -o KEY=... */
static bool says_option(const struct convert_args *a, const char *key) {
    for (size_t i = 0; i < a->options.n; i++)
        if (strstr(a->options.v[i], key))
            return true;
    return false;
}

/* What only that program minds. */
static int check_args_qemu(struct verb_ctx *ctx, const struct convert_args *a) {
    bool sparse = a->sparse != SPARSE_DEFAULT;
    if (a->sparse % 512 || a->sparse > SPARSE_MAX_QEMU)
        return dialect_sparse_size(ctx);
    if (a->offload && (a->compress || sparse))
        return err_set(&ctx->err, EINVAL, "Cannot enable copy offloading when -%c is used",
                       a->compress ? 'c' : 'S');
    if (a->offload && a->salvage)
        return misuse(ctx, "Cannot use copy offloading in salvaging mode");
    if ((a->backing || says_option(a, "backing_file=")) && !a->backing_format &&
        !says_option(a, "backing_fmt="))
        return misuse(ctx, "Use of backing file requires explicit backing format");
    if (a->cache && cache_parse(a->cache, NULL) < 0)
        return err_set(&ctx->err, EINVAL, "Invalid cache option: %s", a->cache);
    if (a->backing_format && !a->backing)
        return err_set(&ctx->err, EINVAL,
                       "%s: error while converting %s: Backing format cannot be used without "
                       "backing file",
                       ctx->pos[ctx->pos_n - 1], a->out_format ? a->out_format : "raw");
    return 0;
}

static int check_args(struct verb_ctx *ctx, const struct convert_args *a) {
    int r = dialect_is_qemu() ? check_args_qemu(ctx, a) : 0;
    if (r < 0)
        return r;
    if (a->backing_format && !a->backing)
        return misuse(ctx, "-F needs -B");
    if (a->target_image_opts && !a->no_create)
        return misuse(ctx, cli_words("--target-image-opts needs -n: it names an existing target",
                                     "--target-image-opts requires use of -n flag"));
    if (a->target_image_opts && a->out_format)
        return misuse(ctx, "--target-image-opts and -O exclude each other");
    if (a->target_is_zero && !a->no_create)
        return misuse(ctx, cli_words("--target-is-zero needs -n",
                                     "--target-is-zero requires use of -n flag"));
    if (a->target_is_zero && a->backing)
        return misuse(ctx, cli_words("--target-is-zero and -B exclude each other",
                                     "Cannot use --target-is-zero when the destination image has "
                                     "a backing file"));
    if (a->no_create && a->options.n)
        return misuse(ctx, cli_words("-o describes a new target and cannot be combined with -n",
                                     "-o has no effect when skipping image creation"));
    if (a->skip_broken_bitmaps && !a->bitmaps)
        return err_set(&ctx->err, EINVAL, "%s",
                       cli_words("--skip-broken-bitmaps goes with --bitmaps",
                                 "Use of --skip-broken-bitmaps requires --bitmaps"));
    if (a->src.format && a->src.image_opts)
        return misuse(ctx, cli_words("-f and --image-opts exclude each other",
                                     "--image-opts and --format are mutually exclusive"));
    return 0;
}

/* ---------------------------------------------------------------- sources */

/* Puts a raw window over the source. */
static int narrow_co(struct convert *c, struct node **src) {
    uint64_t size = (*src)->size, skip = c->a->skip, length = 0;
    if (skip <= size)
        length = min_u64(size - skip, c->a->limited ? c->a->count : size);
    else
        cli_print_note(c->ctx,
                       cli_words("%s: nothing is there to skip to: the disk is shorter",
                                 "%s: cannot skip to specified offset"),
                       (*src)->filename);
    json_t *options = json_pack("{s:I, s:I}", "offset", (json_int_t)min_u64(skip, size), "size",
                                (json_int_t)length);
    struct open_req req = {.gate = GATE_ANY};
    struct node *window;
    int r = node_open_on_co(*src, driver_find("raw"), options, &req, &window, &c->ctx->err);
    json_decref(options);
    if (r == 0)
        *src = window;
    return r;
}

/* There disks come in sectors: a file of odd length is rounded up. */
static uint64_t length_of(const struct node *src) {
    return dialect_is_qemu() ? align_up(src->size, 512) : src->size;
}

static int open_sources_co(struct convert *c, int n) {
    int streams = 0;
    for (int i = 0; i < n; i++) {
        bool in = convert_is_pipe(c->names[i]);
        if (in && streams++)
            return misuse(c->ctx, "standard input can be one source only");
        int r = in ? convert_open_stdin_co(c, &c->src[i])
                   : cli_open_snapshot_co(c->ctx, c->names[i], &c->a->src, 0, c->a->snapshot,
                                          &c->src[i]);
        if (r < 0)
            return r;
        c->src_n++;
        if (c->a->windowed && (r = narrow_co(c, &c->src[i])) < 0)
            return r;
        if (!ck_add(c->size, length_of(c->src[i]), &c->size) || c->size > INT64_MAX)
            return err_set(&c->ctx->err, EFBIG, "the sources are too large together");
    }
    return 0;
}

static bool same_file(const struct stat *st, const char *name) {
    struct stat other;
    if (!strncmp(name, "file:", 5))
        name += 5;
    return stat(name, &other) == 0 && other.st_dev == st->st_dev && other.st_ino == st->st_ino;
}

/* Refuses a target that one of the sources, or a layer below one, lies in. */
static int check_not_source(struct convert *c, const char *name) {
    struct stat st;
    if (!strncmp(name, "file:", 5))
        name += 5;
    if (stat(name, &st) < 0)
        return 0;
    for (int i = 0; i < c->src_n; i++) {
        for (struct node *l = c->src[i]; l; l = l->backing) {
            struct node *s = node_storage(l), *data = node_data_storage(l);
            for (size_t p = 0; p < l->part_count; p++)
                if (l->parts[p].node->filename && same_file(&st, l->parts[p].node->filename))
                    return err_set(&c->ctx->err, EINVAL,
                                   "%s is an extent of %s and would be overwritten", name,
                                   c->names[i]);
            if ((s->filename && same_file(&st, s->filename)) ||
                (data->filename && same_file(&st, data->filename)))
                return err_set(&c->ctx->err, EINVAL, "%s is %s of %s and would be overwritten",
                               name, l == c->src[i] ? "the file" : "a backing file", c->names[i]);
        }
    }
    return 0;
}

/* The data file of a new target is made new, too. */
static int check_data_file(struct convert *c, const json_t *options) {
    const char *claimed = json_string_value(json_object_get(options, "data_file"));
    struct err why AUTO_ERR = ERR_INIT;
    char *name AUTO_FREE = claimed ? data_file_resolve(c->target_name, claimed, &why) : NULL;
    return name ? check_not_source(c, name) : 0;
}

/* ---------------------------------------------------------------- target */

int convert_create_options(struct convert *c, json_t **out) {
    const struct convert_args *a = c->a;
    int r = cli_options(c->ctx, &a->options, out);
    if (r < 0)
        return r;
    if (!json_object_get(*out, "size") || dialect_is_qemu()) /* there it is always the source's */
        json_object_set_new(*out, "size", json_integer((json_int_t)c->size));
    const char *named = json_string_value(json_object_get(*out, "backing_file"));
    c->top_only = a->backing || (named && *named);
    if (a->backing) {
        json_object_set_new(*out, "backing_file", json_string(a->backing));
        if (a->backing_format)
            json_object_set_new(*out, "backing_fmt", json_string(a->backing_format));
    }
    return 0;
}

/* New storage; in automatic mode direct where that works. */
static int create_storage_co(struct convert *c, unsigned cache_flags, bool automatic) {
    struct err first AUTO_ERR = ERR_INIT;
    struct create_ctx ctx = {.name = c->target_name, .flags = CREATE_UNNAMED | CREATE_REPLACE};
    ctx.node_flags = cache_flags;
    ctx.flags |= dialect_is_qemu() ? CREATE_FIRST_BLOCK : 0;
    int r = -ENOTSUP;
    if (automatic) {
        ctx.node_flags |= NODE_DIRECT;
        r = storage_create_co(&ctx, &c->file, &first);
        ctx.node_flags &= ~NODE_DIRECT;
    }
    if (r < 0)
        r = storage_create_co(&ctx, &c->file, &c->ctx->err);
    return r;
}

static int open_device_co(struct convert *c, enum cache_mode cache) {
    struct open_req req = {
        .name = c->target_name, .format = "raw", .flags = OPEN_RW | OPEN_UNMAP, .cache = cache};
    struct node *raw;
    int r = node_open_co(&req, &raw, &c->ctx->err);
    if (r < 0)
        return r;
    c->file = node_ref(raw->file);
    node_unref_co(raw);
    return 0;
}

/* A new target never has old content, but space made ready for it may hold anything on a device. */
static bool starts_as_zeros(const struct convert *c, const json_t *options) {
    if (c->file->storage_flags & STORAGE_ZERO_INIT)
        return true;
    const char *p = json_string_value(json_object_get(options, "preallocation"));
    return c->dst->granularity > 1 && (!p || !strcmp(p, "off"));
}

/* A new target in that program's words. */
static int target_error(struct convert *c) {
    struct err *e = &c->ctx->err;
    int rc = -e->code;
    if (strstr(e->text, "option '")) {
        dialect_options_error(c->ctx);
        if (!strncmp(e->text, "Cluster size ", 13)) /* there it is noticed by the format */
            err_prefix(e, "%s: error while converting %s", c->target_name, c->format->name);
    } else {
        char *before AUTO_FREE =
            c->a->windowed
                ? xasprintf("%s: error while creating output image: ", c->target_name)
                : xasprintf("%s: error while converting %s: ", c->target_name, c->format->name);
        dialect_create_error(c->ctx, c->target_name, before);
    }
    return rc;
}

/* Codes come in odd pieces; what the target takes is known only when it is there. */
static bool takes_codes(const json_t *options) {
    const char *kind = json_string_value(json_object_get(options, "subformat"));
    return kind && !strcmp(kind, "streamOptimized");
}

static int create_target_co(struct convert *c) {
    const struct convert_args *a = c->a;
    struct err *e = &c->ctx->err;
    json_t *options = NULL;
    bool device;
    enum cache_mode cache = CACHE_WRITEBACK;
    if (a->cache) {
        int r = cache_parse(a->cache, e);
        if (r < 0)
            return r;
        cache = r;
    }
    int r = create_check_target_co(c->target_name, &device, e);
    if (r == 0)
        r = convert_create_options(c, &options);
    if (r == 0 && (r = check_data_file(c, options)) < 0)
        json_decref(options);
    if (r < 0)
        return dialect_is_qemu() ? target_error(c) : err_prefix(e, "%s", c->target_name);

    bool codes = a->compress || takes_codes(options) || c->format->format->written_once;
    bool automatic = (!a->cache || cache == CACHE_UNSAFE) && !codes;
    c->unnamed = !device;
    r = device ? open_device_co(c, cache)
               : create_storage_co(c, cache_node_flags(cache), automatic);
    if (r == 0)
        r = format_create_co(c->file, c->format, options, e);
    if (r == 0) {
        struct open_req req = {.name = c->target_name,
                               .flags = OPEN_RW | OPEN_UNMAP,
                               .cache = cache,
                               .gate = GATE_ANY};
        struct node *file = node_ref(c->file); /* one for the format, one for the link */
        r = node_open_on_co(file, c->format, NULL, &req, &c->dst, e);
        if (r < 0)
            node_unref_co(file);
    }
    if (r == 0)
        c->zero_init = !c->dst->backing && starts_as_zeros(c, options);
    json_decref(options);
    if (r < 0 && dialect_is_qemu())
        return target_error(c);
    return r < 0 ? err_prefix(e, "%s", c->target_name) : 0;
}

static int open_target_co(struct convert *c) {
    const struct convert_args *a = c->a;
    struct cli_image image = {.image_opts = a->target_image_opts, .trust = GATE_ANY};
    if (!a->target_image_opts)
        image.format = a->out_format ? a->out_format : "raw";
    if (a->cache) {
        int r = cache_parse(a->cache, &c->ctx->err);
        if (r < 0)
            return r;
        image.cache = r;
    }
    int r = cli_open_co(c->ctx, c->target_name, &image, OPEN_RW | OPEN_UNMAP, &c->dst);
    if (r < 0)
        return r;
    c->zero_init = a->target_is_zero;
    if (a->backing && !c->dst->backing)
        return err_set(&c->ctx->err, EINVAL, "%s has no backing file: -B does not fit it",
                       c->target_name);
    return 0;
}

static int check_size(struct convert *c) {
    if (c->dst->size >= c->size)
        return 0;
    if (dialect_is_qemu())
        return err_set(&c->ctx->err, ENOSPC, "output file is smaller than input file");
    return err_set(&c->ctx->err, ENOSPC,
                   "%s has %" PRIu64 " bytes, too few for the %" PRIu64 " of the source",
                   c->target_name, c->dst->size, c->size);
}

/* ---------------------------------------------------------------- the copy */

static void on_progress(void *arg, const struct copy_progress *p) {
    struct convert *c = arg;
    /* Sources that are still to come count by their size. */
    uint64_t later = c->size - c->done_before - length_of(c->src_now);
    progress_update(&c->bar, c->done_before + p->done, c->done_before + p->total + later);
}

/* There, each sector by itself. */
static void on_damage(void *arg, uint64_t offset, uint64_t length, int error) {
    struct convert *c = arg;
    for (uint64_t end = offset + length; dialect_is_qemu() && !c->a->quiet && offset < end;
         offset += 512)
        cli_print_warning(c->ctx, "error while reading offset %" PRIu64 ": %s", offset,
                          strerror(error));
    if (!c->a->quiet && !dialect_is_qemu())
        cli_print_warning(c->ctx,
                          "%s: %" PRIu64 " bytes at offset %" PRIu64
                          " are unreadable (%s), zeros written",
                          c->src_now->filename, length, offset, strerror(error));
}

static void on_unmapped(void *arg, uint64_t offset, int error) {
    struct convert *c = arg;
    if (!c->a->quiet && dialect_is_qemu())
        cli_print_warning(c->ctx, "error while reading block status at offset %" PRIu64 ": %s",
                          offset, strerror(error));
}

static void on_signal(void *arg, int signo) {
    struct convert *c = arg;
    c->cancel = true;
}

int convert_copy_all_co(struct convert *c) {
    const struct convert_args *a = c->a;
    bool show = !a->quiet; /* or counted, for SIGUSR1 */
    struct copy_opts o = {
        /* There, what is said of damage comes in order. */
        .workers = a->salvage && dialect_is_qemu() ? 1 : a->workers,
        .in_order = !a->out_of_order,
        .compress = a->compress || c->dst->coded_only,
        .sparse_bytes = a->sparse,
        .target_is_zero = c->zero_init,
        .top_only = c->top_only || a->backing,
        .salvage = a->salvage,
        .rate_bytes = a->rate,
        .cancel = &c->cancel,
        .progress = show ? on_progress : NULL,
        .each_piece = dialect_is_qemu(),
        .damaged = on_damage,
        .unmapped = on_unmapped,
        .arg = c,
    };
    int r = 0;
    uint64_t at = 0;
    if (show)
        progress_begin(&c->bar, &a->progress);
    for (int i = 0; r == 0 && i < c->src_n; i++) {
        c->src_now = c->src[i];
        c->done_before = at;
        r = copy_run_co(c->src[i], c->dst, c->src[i]->size, at, &o, &c->ctx->err);
        at += length_of(c->src[i]);
    }
    if (show)
        progress_end(&c->bar, r == 0);
    return r;
}

/* Everything is on its way: make it stable and give it its name. */
static int finish_co(struct convert *c) {
    struct err *e = &c->ctx->err;
    int r = disk_flush_co(c->dst);
    if (r < 0)
        return err_errno(e, -r, "%s: flushing", c->target_name);
    node_unref_co(c->dst);
    c->dst = NULL;
    if (!c->unnamed)
        return 0;
    r = node_link_co(c->file, c->target_name, true, e);
    return r < 0 ? err_prefix(e, "%s", c->target_name) : 0;
}

static int convert_co(struct convert *c, int sources) {
    if (c->a->snapshot && sources > 1)
        return misuse(c->ctx, cli_words("-l goes with one source",
                                        "No support for concatenating multiple snapshot"));
    if (c->a->snapshot && convert_is_pipe(c->names[0]))
        return misuse(c->ctx, "-l goes with an image, not with standard input");
    if (c->format && convert_stores_stdin(c, sources))
        return convert_store_stdin_co(c);
    int r = open_sources_co(c, sources);
    if (convert_is_pipe(c->target_name))
        return r ? r : convert_to_stdout_co(c);
    if (r == 0 && c->a->bitmaps)
        r = convert_bitmaps_check(c->ctx, c->src[0], c->a->skip_broken_bitmaps);
    if (r == 0)
        r = check_not_source(c, c->target_name);
    if (r == 0)
        r = c->a->no_create ? open_target_co(c) : create_target_co(c);
    if (r == 0)
        r = check_size(c);
    if (r == 0)
        r = convert_copy_all_co(c);
    if (r == 0 && c->a->bitmaps)
        r = convert_bitmaps_co(c->ctx, c->src[0], c->dst, c->a->skip_broken_bitmaps);
    if (r == 0)
        r = finish_co(c);
    return r;
}

int convert_with_co(struct verb_ctx *ctx, const struct convert_args *a, char **names, int n) {
    struct convert c = {.ctx = ctx, .a = a, .names = names, .target_name = names[n - 1]};
    if (!a->no_create) {
        const char *name = a->out_format ? a->out_format : "raw";
        c.format = driver_find(name);
        if (!c.format || !c.format->format)
            return err_set(&ctx->err, EINVAL,
                           a->windowed && dialect_is_qemu()
                               ? "Unknown file format%.0s"
                               : cli_words("unknown format '%s'", "Unknown file format '%s'"),
                           name);
    }
    if (a->compress && c.format && dialect_is_qemu() && !strcmp(c.format->name, "raw"))
        return misuse(ctx, "Compression not supported for this file format");
    c.src = xcalloc(n, sizeof(*c.src));
    loop_on_signal(ctx->loop, SIGINT, on_signal, &c);
    loop_on_signal(ctx->loop, SIGTERM, on_signal, &c);
    int r = convert_co(&c, n - 1);
    if (c.dst)
        node_unref_co(c.dst);
    if (c.file)
        node_unref_co(c.file);
    for (int i = 0; i < c.src_n; i++)
        node_unref_co(c.src[i]);
    free(c.src);
    loop_off_signal(ctx->loop, SIGINT);
    loop_off_signal(ctx->loop, SIGTERM);
    return r;
}

static int convert_run_co(struct verb_ctx *ctx) {
    const struct convert_args *a = ctx->args;
    if (cli_options_want_help(&a->options))
        return cli_print_create_help(ctx, a->out_format ? a->out_format : "raw");
    if (ctx->pos_n < 2)
        return misuse(
            ctx, cli_words("a source and a target are needed", "Must specify image file name"));
    int r = check_args(ctx, a);
    if (r == 0 && a->bitmaps && ctx->pos_n > 2)
        r = err_set(&ctx->err, EINVAL, "%s",
                    cli_words("--bitmaps takes a single source",
                              "Copying bitmaps only possible with single source"));
    if (r == 0 && a->bitmaps &&
        (convert_is_pipe(ctx->pos[0]) || convert_is_pipe(ctx->pos[ctx->pos_n - 1])))
        r = err_set(&ctx->err, EINVAL, "--bitmaps needs images: a stream carries no bitmaps");
    return r < 0 ? r : convert_with_co(ctx, a, ctx->pos, ctx->pos_n);
}

static const char *const convert_details[] = {
    "Copies the content of SOURCE, or of several sources one behind the other, to TARGET. Holes and "
    "zeros of the source cost nothing; reads, writes and compression run in parallel.",
    "- as SOURCE is standard input, a raw stream unless -f says otherwise: a pipe is kept in a scratch "
    "file ($TMPDIR, else /var/tmp) unless the target is a new raw file. - as TARGET is standard "
    "output: the image is laid out first and then written in one pass, to a pipe too; with -c it is "
    "made whole in a scratch file before.",
    "A new target gets its name only when it is complete and on stable storage: an error, a full "
    "disk or a kill leaves nothing behind, and a file that was there before stays as it was.",
    NULL,
};
static const struct cli_example convert_examples[] = {
    {"strata convert -O qcow2 disk.raw disk.qcow2", "Make a qcow2 image of a raw one."},
    {"strata convert -O qcow2 -c -o compression_type=zstd a.qcow2 b.qcow2",
     "Make a compressed copy."},
    {"strata convert -O qcow2 -B base.qcow2 -F qcow2 overlay.qcow2 copy.qcow2",
     "Copy an overlay, keeping its backing file."},
    {"strata convert -O qcow2 disk.raw - | ssh host 'cat > disk.qcow2'",
     "Send a qcow2 image through a pipe."},
    {NULL, NULL},
};

const struct verb verb_convert = {
    .name = "convert",
    .summary = "copy an image into another format",
    .synopsis = "SOURCE... TARGET",
    .pos_min = 0,
    .pos_max = -1,
    .opts = convert_opts,
    .args_size = sizeof(struct convert_args),
    .details = convert_details,
    .examples = convert_examples,
    .run_co = convert_run_co,
};
