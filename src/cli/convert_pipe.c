/* SPDX-License-Identifier: MIT */
/*
 * convert from standard input and to standard output, written "-" (never under the drop-in name).
 *
 * In.  A file or device on standard input is used as it is.  A pipe can be read only once, and what
 * is to be made of it depends on its length: it is kept in a scratch file without a name ($TMPDIR,
 * else /var/tmp), zeros left out, and converted from there.  Where the target is a new raw file
 * that file is the target itself, so the stream is written once.
 *
 * Out.  One pass, in order, nothing is sought: raw goes out as it is; other formats are laid out
 * first from the maps of the sources (job/pipe.h), so what their maps call data is written as data.
 * With -c the lengths are known only when all is compressed: the image is made whole in a scratch
 * file and then written.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "cli/convert.h"
#include "cli/dialect.h"
#include "disk/io.h"
#include "job/pipe.h"

bool convert_is_pipe(const char *name) {
    return !strcmp(name, "-") && !dialect_is_qemu();
}

static void on_progress(void *arg, uint64_t done, uint64_t total) {
    struct convert *c = arg;
    progress_update(&c->bar, done, total); /* a total of 0: nobody knows */
}

static struct pipe_opts pipe_opts(struct convert *c) {
    return (struct pipe_opts){.cancel = &c->cancel,
                              .progress = c->a->quiet ? NULL : on_progress,
                              .arg = c,
                              .rate_bytes = c->a->rate};
}

/* A stream that comes in, with its progress (SIGUSR1 must find somebody who expects it). */
static int read_stdin_co(struct convert *c, struct node *file, uint32_t sparse, uint64_t *total) {
    struct pipe_opts o = pipe_opts(c);
    if (!c->a->quiet)
        progress_begin(&c->bar, &c->a->progress);
    int r = pipe_read_co(STDIN_FILENO, file, sparse, &o, total, &c->ctx->err);
    if (!c->a->quiet)
        progress_end(&c->bar, r == 0);
    return r;
}

static int scratch_co(struct convert *c, struct node **out) {
    const char *tmp = getenv("TMPDIR");
    struct create_ctx ctx = {.name = tmp && *tmp ? tmp : "/var/tmp",
                             .flags = CREATE_SCRATCH,
                             .node_flags = NODE_NO_FLUSH | NODE_UNMAP};
    int r = storage_create_co(&ctx, out, &c->ctx->err);
    return r < 0 ? err_prefix(&c->ctx->err, "scratch file for a stream") : 0;
}

/* ---------------------------------------------------------------- in */

static bool stdin_is_file(struct stat *st) {
    return !fstat(STDIN_FILENO, st) && (S_ISREG(st->st_mode) || S_ISBLK(st->st_mode));
}

static int spool_co(struct convert *c, struct node **file) {
    uint64_t total;
    int r = scratch_co(c, file);
    if (r < 0)
        return r;
    r = read_stdin_co(c, *file, 4096, &total);
    if (r < 0)
        node_unref_co(*file);
    return r < 0 ? err_prefix(&c->ctx->err, "standard input") : 0;
}

int convert_open_stdin_co(struct convert *c, struct node **out) {
    const struct convert_args *a = c->a;
    struct err *e = &c->ctx->err;
    const char *format = a->src.format ? a->src.format : "raw";
    struct stat st;
    struct node *file;
    if (a->src.image_opts)
        return err_set(e, EINVAL, "- is standard input and does not go with --image-opts");
    if (isatty(STDIN_FILENO))
        return err_set(e, EINVAL, "standard input is a terminal, not a disk");
    if (stdin_is_file(&st)) {
        struct cli_image image = a->src;
        image.format = format;
        return cli_open_co(c->ctx, "/proc/self/fd/0", &image, 0, out);
    }
    const struct driver *drv = driver_find(format);
    if (!drv || !drv->format)
        return err_set(e, EINVAL, "unknown format '%s'", format);
    int r = spool_co(c, &file);
    if (r < 0)
        return r;
    struct open_req req = {.gate = (enum gate)a->src.trust};
    r = node_open_on_co(file, drv, NULL, &req, out, e);
    if (r < 0) {
        node_unref_co(file);
        return err_prefix(e, "standard input");
    }
    free((*out)->filename);
    (*out)->filename = xstrdup("standard input");
    return 0;
}

bool convert_stores_stdin(const struct convert *c, int sources) {
    const struct convert_args *a = c->a;
    struct stat st, at;
    bool device = !stat(c->target_name, &at) && !S_ISREG(at.st_mode);
    return sources == 1 && convert_is_pipe(c->names[0]) && !stdin_is_file(&st) && !device &&
           !convert_is_pipe(c->target_name) && !a->no_create && !a->compress && !a->windowed &&
           !a->options.n && !a->backing && !a->src.format && !strcmp(c->format->name, "raw");
}

int convert_store_stdin_co(struct convert *c) {
    struct create_ctx ctx = {.name = c->target_name, .flags = CREATE_UNNAMED | CREATE_REPLACE};
    struct err *e = &c->ctx->err;
    if (isatty(STDIN_FILENO))
        return err_set(e, EINVAL, "standard input is a terminal, not a disk");
    if (c->a->cache) {
        int cache = cache_parse(c->a->cache, e);
        if (cache < 0)
            return cache;
        ctx.node_flags = cache_node_flags((enum cache_mode)cache);
    }
    int r = storage_create_co(&ctx, &c->file, e);
    if (r < 0)
        return err_prefix(e, "%s", c->target_name);
    r = read_stdin_co(c, c->file, (uint32_t)c->a->sparse, &c->size);
    if (!r && (r = disk_flush_co(c->file)) < 0)
        err_errno(e, -r, "flushing");
    if (!r)
        r = node_link_co(c->file, c->target_name, true, e);
    return r < 0 ? err_prefix(e, "%s", c->target_name) : 0;
}

/* ---------------------------------------------------------------- out */

/* The sources, one behind the other. */
static int read_sources_co(void *arg, uint64_t guest, void *buf, size_t length) {
    struct convert *c = arg;
    uint64_t begin = 0;
    uint8_t *p = buf;
    memset(buf, 0, length);
    for (int i = 0; i < c->src_n; i++) {
        uint64_t end = begin + c->src[i]->size, low = max_u64(guest, begin);
        uint64_t high = min_u64(guest + length, end);
        if (low < high) {
            int r = disk_pread_co(c->src[i], low - begin, p + (low - guest), high - low);
            if (r < 0)
                return r;
        }
        begin = end;
    }
    return 0;
}

static int check_stdout(struct convert *c) {
    const struct convert_args *a = c->a;
    struct err *e = &c->ctx->err;
    if (a->no_create || a->salvage)
        return err_set(e, EINVAL, "%s does not go with standard output",
                       a->salvage ? "--salvage" : "-n");
    if (!strcmp(c->format->name, "raw") && (a->options.n || a->backing))
        return err_set(e, EINVAL, "a raw stream takes no -o and no -B");
    if (isatty(STDOUT_FILENO)) {
        err_set(e, EINVAL, "standard output is a terminal: a disk is not written there");
        err_hint(e, "send it to a file or a pipe");
        return -EINVAL;
    }
    return 0;
}

/* The image without its data, on a scratch file in c->dst. */
static int make_image_co(struct convert *c) {
    struct err *e = &c->ctx->err;
    struct node *file = NULL;
    json_t *options = NULL;
    int r = convert_create_options(c, &options);
    if (!r && json_object_get(options, "data_file"))
        r = err_set(e, EINVAL, "a stream is one file: data_file does not go with standard output");
    if (!r)
        r = scratch_co(c, &file);
    if (!r)
        r = format_create_co(file, c->format, options, e);
    if (!r) {
        /* A flush moves its metadata to the file, which itself does not sync. */
        struct open_req req = {.flags = OPEN_RW | OPEN_UNMAP | OPEN_NO_BACKING};
        r = node_open_on_co(file, c->format, NULL, &req, &c->dst, e);
    }
    if (r < 0 && file)
        node_unref_co(file);
    json_decref(options);
    return r;
}

static int lay_out_co(struct convert *c, struct pipe_layout *l) {
    struct pipe_opts o = pipe_opts(c);
    struct err *e = &c->ctx->err;
    int r = make_image_co(c);
    if (r < 0)
        return r;
    if (c->a->compress) {
        c->zero_init = true;
        r = convert_copy_all_co(c);
        if (!r)
            r = pipe_layout_done_co(c->dst, l, e);
        return r;
    }
    uint64_t at = 0;
    for (int i = 0; !r && i < c->src_n; i++) {
        r = pipe_layout_co(c->src[i], c->dst, at, c->a->backing != NULL, &o, l, e);
        at += c->src[i]->size;
    }
    return r ? r : pipe_layout_done_co(c->dst, l, e);
}

int convert_to_stdout_co(struct convert *c) {
    struct pipe_layout l = {0};
    struct pipe_opts o = pipe_opts(c);
    struct pipe_run whole = {.length = c->size};
    int r = check_stdout(c);
    if (!r && !strcmp(c->format->name, "raw"))
        l = (struct pipe_layout){.runs = &whole, .count = c->size != 0, .total = c->size};
    else if (!r)
        r = lay_out_co(c, &l);
    if (!r) {
        if (!c->a->quiet)
            progress_begin(&c->bar, &c->a->progress);
        r = pipe_write_co(STDOUT_FILENO, &l, read_sources_co, &o, &c->ctx->err);
        if (!c->a->quiet)
            progress_end(&c->bar, r == 0);
    }
    if (l.runs != &whole)
        pipe_layout_free(&l);
    return r < 0 ? err_prefix(&c->ctx->err, "standard output") : 0;
}
