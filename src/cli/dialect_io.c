/* SPDX-License-Identifier: MIT */
/*
 * The drop-in name qemu-io: its options over the session of `strata io`.
 *
 * The commands and their texts are the same under both names (io_cmd.c, io_rw.c, io_open.c); here
 * are the command line, which opens as the command "open" does, and what differs from `strata io`:
 * every write is on stable storage unless a cache mode says otherwise, and standard input is read
 * behind a prompt even when it is a pipe.
 *
 * Facts: options, messages and statuses of qemu-io 7.2 and 10.0.
 */
#include <stdio.h>
#include <string.h>
#include "base/cleanup.h"
#include "base/version.h"
#include "cli/dialect.h"
#include "cli/io_cmd.h"

struct args {
    struct cli_list commands;
    const char *format, *cache, *discard, *aio, *trace;
    bool image_opts, read_only, snapshot, nocache, copy_on_read, misalign, native_aio, force_share,
        version;
};

static const struct cli_opt opts[] = {
    CLI_FLAG(struct args, image_opts, 0, "image-opts", "the name is key=value,... options"),
    CLI_LIST(struct args, commands, 'c', "cmd", "STRING", "run this command"),
    CLI_STR(struct args, format, 'f', "format", "FMT", "image format; probed when not given"),
    CLI_FLAG(struct args, read_only, 'r', "read-only", "open read-only"),
    CLI_FLAG(struct args, snapshot, 's', "snapshot", "write to a temporary snapshot"),
    CLI_FLAG(struct args, nocache, 'n', "nocache", "short for --cache=none"),
    CLI_FLAG(struct args, copy_on_read, 'C', "copy-on-read",
             "keep what is read from backing files"),
    CLI_FLAG(struct args, misalign, 'm', "misalign", "use memory that suits no direct I/O"),
    CLI_FLAG(struct args, native_aio, 'k', "native-aio", "accepted; the engine chooses"),
    CLI_STR(struct args, aio, 'i', "aio", "MODE",
            "threads, native or io_uring; the engine chooses"),
    CLI_STR(struct args, cache, 't', "cache", "MODE", "how the host caches"),
    CLI_STR(struct args, discard, 'd', "discard", "MODE", "what discarding gives back"),
    CLI_STR(struct args, trace, 'T', "trace", "WHAT", "accepted; there is nothing to switch on"),
    CLI_FLAG(struct args, force_share, 'U', "force-share", "open even while others write"),
    CLI_FLAG(struct args, version, 'V', "version", "print the version"),
    CLI_END};

static int qemu_io_run_co(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    struct io_session s;
    if (a->version) {
        puts("qemu-io version 10.0.0 (strata " STRATA_VERSION ")");
        return 0;
    }
    if (ctx->pos_n > 1) {
        cli_help_verb(ctx->verb, stdout);
        return 1;
    }
    io_session_init(&s, ctx, NULL);
    s.image_opts = a->image_opts;
    s.misalign = a->misalign;
    struct io_open o = {
        .name = ctx->pos_n ? ctx->pos[0] : NULL,
        .format = a->format,
        .cache = a->nocache && !a->cache ? "none" : a->cache,
        .discard = a->discard,
        .aio = a->aio,
        .read_only = a->read_only,
        .snapshot = a->snapshot,
        .copy_on_read = a->copy_on_read,
        .force_share = a->force_share,
    };
    if (a->image_opts && a->format) {
        io_complain(&s, "--image-opts and -f are mutually exclusive");
        return 1;
    }
    if (io_open_modes(&s, &o) < 0 || (o.name && io_open_co(&s, &o) < 0))
        return 1;
    for (size_t i = 0; i < a->commands.n && !s.quit; i++)
        io_session_run_co(&s, a->commands.v[i]);
    if (!a->commands.n)
        io_session_stdin_co(&s);
    return io_session_end_co(&s);
}

const struct verb verb_qemu_io = {
    .name = "qemu-io",
    .summary = "QEMU disk exerciser, by strata",
    .synopsis = "[FILE]",
    .pos_max = -1,
    .opts = opts,
    .args_size = sizeof(struct args),
    .run_co = qemu_io_run_co,
};

int dialect_io_main(int argc, char **argv) {
    return cli_verb_main(&verb_qemu_io, argc - 1, argv + 1);
}
