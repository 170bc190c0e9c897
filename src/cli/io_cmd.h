/* SPDX-License-Identifier: MIT */
/*
 * The commands of `strata io`: one line of text, one operation on an open disk.
 *
 * A session holds the disk, what is in flight, and whether anything has failed.  Commands are rows
 * of one table (io_cmd.c): names, options, number of arguments, help, and the function.  Results
 * go to standard output in the words of qemu-io, whose scripts can be used unchanged; what is wrong
 * with a command's own text goes where qemu-io puts it, too.
 *
 * Context: tasks of the node's loop.
 */
#ifndef STRATA_CLI_IO_CMD_H
#define STRATA_CLI_IO_CMD_H

#include <stdbool.h>
#include <stdint.h>
#include "disk/open.h"
#include "runtime/task.h"

struct node;
struct verb_ctx;

struct io_session {
    struct verb_ctx *ctx; /* for messages */
    struct node *node;    /* NULL: only commands that need no disk */
    bool failed;          /* a command has failed: exit status 1 */
    bool quit;
    bool image_opts; /* names are key=value,... options */
    bool misalign;   /* buffers that O_DIRECT would refuse */
    int trust;       /* enum gate of what is opened by command */
    struct {
        struct open_req req; /* with the texts and the tree below */
        char *name, *format;
        json_t *tree;
    } opened;           /* how, by io_open_co; for opening again */
    unsigned in_flight; /* aio */
    struct waitq idle, slot;
};

void io_session_init(struct io_session *s, struct verb_ctx *ctx, struct node *n);
/* Lines from standard input until it ends or a command quits. */
void io_session_stdin_co(struct io_session *s);
/* Flushes, closes the disk: the exit status, or -errno with ctx->err set. */
int io_session_end_co(struct io_session *s);
/* Runs one line; sets s->failed and s->quit.  An empty line is nothing. */
void io_session_run_co(struct io_session *s, const char *line);
/* Waits for everything in flight. */
void io_session_drain_co(struct io_session *s);

/* How a disk is opened, in the words of the command line; NULL: not said. */
struct io_open {
    const char *name;
    const char *const *options; /* -o texts */
    int options_n;
    const char *format, *cache, *discard, *aio;
    bool read_only, snapshot, copy_on_read, force_share;
};
/* Both say what is wrong themselves.  -errno. */
int io_open_modes(const struct io_session *s, const struct io_open *o);
int io_open_co(struct io_session *s, const struct io_open *o);

/* ---- between io_cmd.c, io_rw.c and io_open.c ---- */

struct io_cmd;

/* Offset, and as many lengths as one request of that program may have. */
enum { IO_POS_MAX = 1025 };
struct io_args {
    const struct io_cmd *cmd;
    bool has[128];
    const char *val[128]; /* of options with a value, borrowed from the line */
    const char *pos[IO_POS_MAX];
    int pos_n;
    const char *list[16]; /* values of the repeatable -o */
    int list_n;
};

/* 0, or -errno after saying why. */
typedef int io_fn(struct io_session *s, const struct io_args *a);

struct io_cmd {
    const char *name, *alias;
    io_fn *fn;
    const char *letters; /* as getopt takes them: "qP:" */
    int pos_min, pos_max;
    bool no_disk;
    bool writes; /* needs a disk that is open for writing */
    const char *args, *summary;
    const char *const *details; /* lines, NULL-terminated; NULL: none */
};

/* The index-th command of the table; NULL behind the last. */
const struct io_cmd *io_command(size_t index);

io_fn io_read_co, io_readv_co, io_aio_read_co, io_write_co, io_writev_co, io_aio_write_co,
    io_discard_co, io_open_command_co, io_close_co, io_reopen_co;

/* "64 KiB", "1.062 MiB", "40 bytes": as qemu-io writes quantities. */
const char *io_quantity(double v, char buf[static 32]);
/* A size argument; false after saying what is wrong. */
bool io_parse_size(const char *text, uint64_t *out);
/* Prints "ARGS -- SUMMARY" and returns -EINVAL. */
int io_usage(const struct io_cmd *cmd);
/* "strata: io: text", or "qemu-io: text", on standard error. */
void io_complain(const struct io_session *s, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
/* The same, but without a name in front where qemu-io puts none. */
void io_complain_bare(const struct io_session *s, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

#endif
