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
#include "runtime/task.h"

struct node;
struct verb_ctx;

struct io_session {
    const struct verb_ctx *ctx; /* for messages */
    struct node *node;          /* NULL: only commands that need no disk */
    bool failed;                /* a command has failed: exit status 1 */
    bool quit;
    unsigned in_flight; /* aio */
    struct waitq idle, slot;
};

void io_session_init(struct io_session *s, const struct verb_ctx *ctx, struct node *n);
/* Runs one line; sets s->failed and s->quit.  An empty line is nothing. */
void io_session_run_co(struct io_session *s, const char *line);
/* Waits for everything in flight. */
void io_session_drain_co(struct io_session *s);

/* ---- between io_cmd.c and io_rw.c ---- */

struct io_cmd;

enum { IO_POS_MAX = 66 };
struct io_args {
    const struct io_cmd *cmd;
    bool has[128];
    const char *val[128]; /* of options with a value, borrowed from the line */
    const char *pos[IO_POS_MAX];
    int pos_n;
};

/* 0, or -errno after saying why. */
typedef int io_fn(struct io_session *s, const struct io_args *a);

struct io_cmd {
    const char *name, *alias;
    io_fn *fn;
    const char *letters; /* as getopt takes them: "qP:" */
    int pos_min, pos_max;
    bool no_disk;
    const char *args, *summary;
    const char *const *details; /* lines, NULL-terminated; NULL: none */
};

io_fn io_read_co, io_readv_co, io_aio_read_co, io_write_co, io_writev_co, io_aio_write_co,
    io_discard_co;

/* "64 KiB", "1.062 MiB", "40 bytes": as qemu-io writes quantities. */
const char *io_quantity(double v, char buf[static 32]);
/* A size argument; false after saying what is wrong. */
bool io_parse_size(const char *text, uint64_t *out);
/* Prints "ARGS -- SUMMARY" and returns -EINVAL. */
int io_usage(const struct io_cmd *cmd);
/* "strata: io: text" on standard error. */
void io_complain(const struct io_session *s, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

#endif
