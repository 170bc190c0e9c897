/* SPDX-License-Identifier: MIT */
/*
 * io: reads and writes parts of a disk by hand or from a script, in the language of qemu-io.
 *
 * The commands are in io_cmd.c and io_rw.c; here are the options, and lines from -c or standard
 * input.  All commands run, also after one has failed; the exit status tells whether any did.
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/bytes.h"
#include "base/strbuf.h"
#include "cli/cli.h"
#include "cli/dialect.h"
#include "cli/io_cmd.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "disk/overlay.h"
#include "runtime/loop.h"

/* A longer line than this is no command. */
#define LINE_MAX_BYTES (64 * KIB)

struct args {
    struct cli_image image;
    struct cli_list commands;
    bool read_only, snapshot, nocache;
    int discard;
};

enum { DISCARD_UNMAP, DISCARD_IGNORE, DISCARD_ON, DISCARD_OFF };
static const char *const discard_names[] = {"unmap", "ignore", "on", "off", NULL};

static const struct cli_opt opts[] = {
    CLI_LIST(struct args, commands, 'c', "cmd", "COMMAND",
             "run this command; may be repeated; default: read commands from standard input"),
    CLI_FLAG(struct args, read_only, 'r', "read-only", "open the image read-only"),
    CLI_FLAG(struct args, snapshot, 's', "snapshot",
             "write to a temporary snapshot that is thrown away at the end"),
    CLI_FLAG(struct args, nocache, 'n', "nocache", "short for --cache=none"),
    CLI_ENUM(struct args, discard, 'd', "discard", "MODE", discard_names, DISCARD_UNMAP,
             "what discarding gives back: unmap (the host's space) or ignore"),
    CLI_IMAGE_ROWS(struct args, image),
    CLI_END};

/* ------------------------------------------------------------------ stdin */

struct lines {
    char *buf;
    size_t len;
    bool end, overlong;
};

/* The next line without its newline into *line (owned); false at the end. */
static bool next_line_co(struct lines *l, char **line) {
    for (;;) {
        char *nl = l->len ? memchr(l->buf, '\n', l->len) : NULL;
        if (nl || (l->end && l->len)) {
            size_t k = nl ? (size_t)(nl - l->buf) : l->len;
            *line = xstrndup(l->buf, k);
            l->len -= k + (nl != NULL);
            memmove(l->buf, l->buf + k + (nl != NULL), l->len);
            return true;
        }
        if (l->end)
            return false;
        if (l->len == LINE_MAX_BYTES) {
            l->overlong = true;
            return false;
        }
        /* Requests in flight go on while we wait; regular files are always ready. */
        loop_poll_co(STDIN_FILENO, POLLIN, -1);
        ssize_t r = read(STDIN_FILENO, l->buf + l->len, LINE_MAX_BYTES - l->len);
        if (r > 0)
            l->len += (size_t)r;
        else if (!r || (errno != EINTR && errno != EAGAIN))
            l->end = true;
    }
}

void io_session_stdin_co(struct io_session *s) {
    bool prompt = dialect_is_qemu() || isatty(STDIN_FILENO);
    struct lines l = {.buf = malloc(LINE_MAX_BYTES)};
    char *line;
    while (l.buf && !s->quit) {
        if (prompt)
            fputs(cli_words("strata io> ", "qemu-io> "), stdout);
        fflush(stdout); /* a program at the other end waits for the answer */
        if (!next_line_co(&l, &line))
            break;
        io_session_run_co(s, line);
        free(line);
    }
    if (!l.buf || l.overlong) {
        io_complain(s, "a line is longer than %zu bytes", (size_t)LINE_MAX_BYTES);
        s->failed = true;
    }
    free(l.buf);
}

/* -------------------------------------------------------------------- run */

static int io_run_co(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    struct io_session s;
    io_session_init(&s, ctx, NULL);
    s.image_opts = a->image.image_opts;
    s.trust = a->image.trust;
    if (ctx->pos_n) {
        struct io_open o = {
            .name = ctx->pos[0],
            .format = a->image.format,
            .cache = a->nocache ? "none" : cache_names[a->image.cache],
            .discard = discard_names[a->discard],
            .read_only = a->read_only,
            .snapshot = a->snapshot,
            .force_share = a->image.force_share,
        };
        if (io_open_co(&s, &o) < 0)
            return 1;
    }
    for (size_t i = 0; i < a->commands.n && !s.quit; i++)
        io_session_run_co(&s, a->commands.v[i]);
    if (!a->commands.n)
        io_session_stdin_co(&s);
    return io_session_end_co(&s);
}

static const char *const details[] = {
    "The commands are those of qemu-io; 'strata io -c help' lists them and 'help NAME' explains "
    "one. Every command runs, also after another has failed.",
    "-U implies -r.",
    NULL,
};
static const struct cli_example examples[] = {
    {"strata io -c 'write -P 7 1M 64k' -c 'read -P 7 1M 64k' disk.qcow2",
     "write 64 KiB of sevens and verify them"},
    {"strata io -s -c 'write -z 0 1G' disk.qcow2", "try something and throw it away"},
    {NULL, NULL},
};
static const struct cli_status statuses[] = {
    {1, "a command failed, or read data that did not match its pattern"},
    {0, NULL},
};

const struct verb verb_io = {
    .name = "io",
    .summary = "read and write parts of a disk by command",
    .synopsis = "[FILE]",
    .pos_min = 0,
    .pos_max = 1,
    .opts = opts,
    .args_size = sizeof(struct args),
    .details = details,
    .examples = examples,
    .statuses = statuses,
    .run_co = io_run_co,
};
