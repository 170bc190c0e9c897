/* SPDX-License-Identifier: MIT */
/*
 * Commands of `strata io`: the table, taking a line apart, and everything but moving data (which
 * is io_rw.c).
 *
 * Facts: names, options and output of qemu-io 7.2, observed by running it.
 */
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "base/size.h"
#include "cli/cli.h"
#include "cli/dialect.h"
#include "cli/io_cmd.h"
#include "disk/event.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "runtime/loop.h"

enum { TOKENS_MAX = 1100 };

static void complain(const struct io_session *s, bool bare, const char *fmt, va_list ap) {
    struct err e AUTO_ERR = ERR_INIT;
    char *text AUTO_FREE = NULL;
    if (vasprintf(&text, fmt, ap) < 0)
        text = NULL;
    err_set(&e, EINVAL, "%s", text ? text : "out of memory");
    fflush(stdout);
    if (bare)
        fprintf(stderr, "%s\n", e.text);
    else
        cli_print_error(s->ctx, &e);
}

void io_complain(const struct io_session *s, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    complain(s, false, fmt, ap);
    va_end(ap);
}

void io_complain_bare(const struct io_session *s, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    complain(s, dialect_is_qemu(), fmt, ap);
    va_end(ap);
}

const char *io_quantity(double v, char buf[static 32]) {
    static const char *const units[] = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    int u = -1;
    while (v >= 1024 && u < 5) {
        v /= 1024;
        u++;
    }
    snprintf(buf, 24, "%.3f", v);
    char *dot = strchr(buf, '.');
    if (dot && !strcmp(dot, ".000"))
        *dot = 0;
    strcat(buf, " ");
    strcat(buf, u < 0 ? "bytes" : units[u]);
    return buf;
}

bool io_parse_size(const char *text, uint64_t *out) {
    int r = size_parse(text, "argument", out, NULL);
    if (!r)
        return true;
    if (r == -ERANGE)
        printf("Parsing error: argument too large -- %s\n", text);
    else
        printf("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- %s\n",
               text);
    return false;
}

int io_usage(const struct io_cmd *cmd) {
    printf("%s%s%s -- %s\n", cmd->name, *cmd->args ? " " : "", cmd->args, cmd->summary);
    return -EINVAL;
}

/* --------------------------------------------------------------- commands */

static int io_aio_flush_co(struct io_session *s, const struct io_args *a) {
    io_session_drain_co(s);
    return 0;
}

static int io_flush_co(struct io_session *s, const struct io_args *a) {
    int r = disk_flush_co(s->node);
    if (r)
        printf("flush failed: %s\n", strerror(-r));
    return r;
}

static int io_truncate_co(struct io_session *s, const struct io_args *a) {
    struct err e AUTO_ERR = ERR_INIT;
    uint64_t size;
    int mode = PREALLOC_OFF;
    if (a->val['m']) {
        for (mode = 0; prealloc_names[mode] && strcmp(prealloc_names[mode], a->val['m']);)
            mode++;
        if (!prealloc_names[mode]) {
            io_complain(s, "Invalid preallocation mode '%s'", a->val['m']);
            return -EINVAL;
        }
    }
    if (!io_parse_size(a->pos[0], &size))
        return -EINVAL;
    int r = disk_resize_co(s->node, size, mode, &e);
    if (r)
        cli_print_error(s->ctx, &e);
    return r;
}

static int io_length_co(struct io_session *s, const struct io_args *a) {
    char text[32];
    puts(io_quantity((double)s->node->size, text));
    return 0;
}

/* One value of the format's own information, as "    key: value". */
static void print_specific(const char *key, const json_t *value) {
    char *text = json_is_string(value) ? strdup(json_string_value(value))
                                       : json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT);
    char *safe AUTO_FREE = text ? cli_safe(text) : NULL;
    char *name AUTO_FREE = strdup(key);
    for (char *c = name; c && *c; c++)
        if (*c == '-')
            *c = ' ';
    if (safe && name)
        printf("    %s: %s\n", name, safe);
    free(text);
}

static int io_info_co(struct io_session *s, const struct io_args *a) {
    const struct node *n = s->node;
    char text[32];
    printf("format name: %s\n", n->drv->name);
    if (!n->drv->format && dialect_is_qemu())
        printf("format name: %s\n", n->drv->name); /* there, of the protocol too */
    if (n->granularity > 1)
        printf("cluster size: %s\n", io_quantity(n->granularity, text));
    if (!strcmp(n->drv->name, "qcow2")) {
        /* Behind what the L2 tables for the disk could map. */
        uint64_t entry = node_subunit(n) < n->granularity ? 16 : 8;
        uint64_t span = (uint64_t)n->granularity * (n->granularity / entry);
        printf("vm state offset: %s\n", io_quantity((double)align_up(n->size, span), text));
    }
    json_t *more =
        n->drv->format && n->drv->format->describe ? n->drv->format->describe(s->node) : NULL;
    json_t *data = json_object_get(more, "data");
    const char *key;
    json_t *value;
    if (more)
        puts("Format specific information:");
    json_object_foreach(json_is_object(data) ? data : more, key, value) print_specific(key, value);
    json_decref(more);
    return 0;
}

/* The run from `at` in which the top layer has something, or has nothing. */
static int layer_run_co(struct node *n, uint64_t at, uint64_t end, bool *present,
                        uint64_t *length) {
    struct status st;
    *length = 0;
    while (at + *length < end) {
        int r = disk_status_co(n, at + *length, end - at - *length, STATUS_TOP_ONLY, &st);
        if (r)
            return r;
        if (*length && st.present != *present)
            break;
        *present = st.present;
        *length += st.length;
    }
    return 0;
}

static int io_alloc_co(struct io_session *s, const struct io_args *a) {
    uint64_t offset, count = 512, sum = 0, end, len;
    char text[32];
    bool present = false;
    if (!io_parse_size(a->pos[0], &offset) || (a->pos_n > 1 && !io_parse_size(a->pos[1], &count)))
        return -EINVAL;
    end = min_u64(s->node->size, offset + count);
    if (end < offset)
        end = offset;
    for (uint64_t at = offset; at < end; at += len) {
        int r = layer_run_co(s->node, at, end, &present, &len);
        if (r) {
            printf("is_allocated failed: %s\n", strerror(-r));
            return r;
        }
        sum += present ? len : 0;
    }
    printf("%" PRIu64 "/%" PRIu64 " bytes allocated at offset %s\n", sum, end - offset,
           io_quantity((double)offset, text));
    return 0;
}

static int io_map_co(struct io_session *s, const struct io_args *a) {
    bool present = false;
    char size[32], from[32];
    uint64_t len;
    for (uint64_t at = 0; at < s->node->size; at += len) {
        int r = layer_run_co(s->node, at, s->node->size, &present, &len);
        if (r) {
            printf("Failed to get allocation status: %s\n", strerror(-r));
            return r;
        }
        printf("%s (0x%" PRIx64 ") bytes %s at offset %s (0x%" PRIx64 ")\n",
               io_quantity((double)len, size), len, present ? "    allocated" : "not allocated",
               io_quantity((double)at, from), at);
    }
    return 0;
}

static int io_sleep_co(struct io_session *s, const struct io_args *a) {
    char *end;
    errno = 0;
    unsigned long long ms = strtoull(a->pos[0], &end, 10);
    if (errno || *end || end == a->pos[0] || ms > INT64_MAX / 1000000) {
        printf("%s is not a valid number\n", a->pos[0]);
        return -EINVAL;
    }
    loop_sleep_co((int64_t)ms * 1000000);
    return 0;
}

static int io_abort_co(struct io_session *s, const struct io_args *a) {
    abort();
}

static int io_sigraise_co(struct io_session *s, const struct io_args *a) {
    uint64_t sig;
    if (!io_parse_size(a->pos[0], &sig))
        return -EINVAL;
    if (sig > NSIG) {
        printf("signal argument '%s' is too large to be a valid signal\n", a->pos[0]);
        return -EINVAL;
    }
    fflush(stdout);
    raise((int)sig);
    return 0;
}

static void say_stopped(const char *tag, bool stopped) {
    printf(stopped ? "blkdebug: Suspended request '%s'\n" : "blkdebug: Resuming request '%s'\n",
           tag);
}

static int io_break_co(struct io_session *s, const struct io_args *a) {
    struct node *n = disk_debug_node(s->node);
    enum disk_event event = disk_event_named(a->pos[0]);
    int r = !n ? -ENOTSUP : event == EVENTS_N ? -ENOENT : 0;
    if (!r)
        r = n->drv->debug->break_at(n, event, a->pos[1], say_stopped);
    if (r)
        printf("Could not set breakpoint: %s\n", strerror(-r));
    return r;
}

static int io_remove_break_co(struct io_session *s, const struct io_args *a) {
    struct node *n = disk_debug_node(s->node);
    int r = n ? n->drv->debug->remove_break(n, a->pos[0]) : -ENOTSUP;
    if (r)
        printf("Could not remove breakpoint %s: %s\n", a->pos[0], strerror(-r));
    return r;
}

static int io_resume_co(struct io_session *s, const struct io_args *a) {
    struct node *n = disk_debug_node(s->node);
    int r = n ? n->drv->debug->resume(n, a->pos[0]) : -ENOTSUP;
    if (r)
        printf("Could not resume request: %s\n", strerror(-r));
    task_yield_co(); /* it goes on before the next command */
    return r;
}

static int io_wait_break_co(struct io_session *s, const struct io_args *a) {
    struct node *n = disk_debug_node(s->node);
    while (n && s->in_flight && !n->drv->debug->is_stopped(n, a->pos[0]))
        loop_sleep_co(1000000);
    return 0;
}

static int io_quit_co(struct io_session *s, const struct io_args *a) {
    s->quit = true;
    return 0;
}

static io_fn io_help_co;

/* ------------------------------------------------------------------ table */

#define LINES(...)                                                                                 \
    (const char *const[]) {                                                                        \
        __VA_ARGS__, NULL                                                                          \
    }

#define HELP_COMMON                                                                                \
    " -C, -- report statistics in a machine parsable format",                                      \
        " -q, -- quiet mode, do not show I/O statistics"

static const struct io_cmd io_commands[] = {
    {"aio_flush", NULL, io_aio_flush_co, "", 0, 0, false, false, "",
     "completes all outstanding aio requests", NULL},
    {"aio_read", NULL, io_aio_read_co, "CiP:qrv", 2, IO_POS_MAX, false, false,
     "[-Ciqrv] [-P pattern] off len [len..]", "asynchronously reads a number of bytes",
     LINES("reads into several buffers, of the lengths given, while later commands run",
           " -P, -- verify the data against this byte", " -v, -- dump the data", HELP_COMMON)},
    {"aio_write", NULL, io_aio_write_co, "CfiP:qruz", 2, IO_POS_MAX, false, true,
     "[-Cfquz] [-P pattern] off len [len..]", "asynchronously writes a number of bytes",
     LINES("writes from several buffers, of the lengths given, while later commands run",
           " -P, -- write this byte; default 0xcd",
           " -f, -- the data is on stable storage when it completes (FUA)",
           " -z, -- write zeros without moving data", " -u, -- with -z: space may be given back",
           HELP_COMMON)},
    {"abort", NULL, io_abort_co, "", 0, 0, true, false, "",
     "simulate a program crash using abort(3)", NULL},
    {"alloc", "a", io_alloc_co, "", 1, 2, false, false, "offset [count]",
     "checks if offset is allocated in the file", NULL},
    {"break", NULL, io_break_co, "", 2, 2, false, false, "event tag",
     "sets a breakpoint on event and tags the stopped request as tag", NULL},
    {"close", "c", io_close_co, "", 0, 0, false, false, "", "close the current open file", NULL},
    {"discard", "d", io_discard_co, "Cq", 2, 2, false, true, "[-Cq] off len",
     "discards a number of bytes at a specified offset", LINES(HELP_COMMON)},
    {"flush", "f", io_flush_co, "", 0, 0, false, false, "", "flush all in-core file state to disk",
     NULL},
    {"help", "?", io_help_co, "", 0, 1, true, false, "[command]", "help for one or all commands",
     NULL},
    {"info", "i", io_info_co, "", 0, 0, false, false, "",
     "prints information about the current file", NULL},
    {"length", "l", io_length_co, "", 0, 0, false, false, "", "gets the length of the current file",
     NULL},
    {"map", NULL, io_map_co, "", 0, 0, false, false, "", "prints the allocated areas of a file",
     NULL},
    {"open", "o", io_open_command_co, "snCro:ki:t:d:U", 0, 1, true, false,
     "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]", "open the file specified by path",
     LINES(" -r, -- read-only", " -s, -- use a snapshot that is thrown away",
           " -C, -- keep what is read from backing files", " -n, -- short for -t none",
           " -U, -- open even while others write", " -t, -- cache mode",
           " -d, -- discard mode: unmap or ignore", " -o, -- options of the image")},
    {"quit", "q", io_quit_co, "", 0, IO_POS_MAX, true, false, "", "exit the program", NULL},
    {"read", "r", io_read_co, "bCl:pP:qrs:v", 2, 2, false, false,
     "[-bCqrv] [-P pattern [-s off] [-l len]] off len",
     "reads a number of bytes at a specified offset",
     LINES("-v 512 1k dumps 1 kilobyte read from 512 bytes into the disk",
           " -P, -- verify the data against this byte",
           " -s, -- first byte of what is verified (only with -P)",
           " -l, -- number of bytes that are verified (only with -P)", " -v, -- dump the data",
           " -b, -- read the VM state that the image keeps, not the disk",
           " -p, -- ignored for backwards compatibility", HELP_COMMON)},
    {"readv", "rv", io_readv_co, "CqrvP:", 2, IO_POS_MAX, false, false,
     "[-Cqv] [-P pattern] off len [len..]", "reads a number of bytes at a specified offset",
     LINES("reads into several buffers, of the lengths given",
           " -P, -- verify the data against this byte", " -v, -- dump the data", HELP_COMMON)},
    {"remove_break", NULL, io_remove_break_co, "", 1, 1, false, false, "tag",
     "remove a breakpoint by tag", NULL},
    {"reopen", NULL, io_reopen_co, "c:o:rw", 0, 0, false, false,
     "[(-r|-w)] [-c cache] [-o options]", "reopens an image with new options",
     LINES(" -r, -- reopen the image read-only", " -w, -- reopen the image read-write",
           " -c, -- change the cache mode", " -o, -- change options of the image")},
    {"resume", NULL, io_resume_co, "", 1, 1, false, false, "tag",
     "resumes the request tagged as tag", NULL},
    {"sigraise", NULL, io_sigraise_co, "", 1, 1, true, false, "signal", "raises a signal", NULL},
    {"sleep", NULL, io_sleep_co, "", 1, 1, true, false, "milliseconds",
     "waits for the given value in milliseconds", NULL},
    {"truncate", "t", io_truncate_co, "m:", 1, 1, false, true, "[-m prealloc_mode] off",
     "truncates the current file at the given offset", NULL},
    {"wait_break", NULL, io_wait_break_co, "", 1, 1, false, false, "tag",
     "waits for the suspension of a request", NULL},
    {"write", "w", io_write_co, "bcCfnpP:qrs:uz", 2, 2, false, true,
     "[-bcCfnquz] [-P pattern | -s source_file] off len",
     "writes a number of bytes at a specified offset",
     LINES(" -P, -- write this byte; default 0xcd", " -s, -- write what is in this file, repeated",
           " -b, -- write the VM state that the image keeps, not the disk",
           " -c, -- compress the data: whole clusters",
           " -f, -- the data is on stable storage when it completes (FUA)",
           " -z, -- write zeros without moving data",
           " -n, -- with -z: fail rather than write zeros slowly",
           " -u, -- with -z: space may be given back",
           " -p, -- ignored for backwards compatibility", HELP_COMMON)},
    {"writev", "wv", io_writev_co, "CfqrP:", 2, IO_POS_MAX, false, true,
     "[-Cfq] [-P pattern] off len [len..]", "writes a number of bytes at a specified offset",
     LINES("writes from several buffers, of the lengths given",
           " -P, -- write this byte; default 0xcd",
           " -f, -- the data is on stable storage when it completes (FUA)", HELP_COMMON)},
};

#define COMMANDS_N (sizeof(io_commands) / sizeof(io_commands[0]))

const struct io_cmd *io_command(size_t index) {
    return index < COMMANDS_N ? &io_commands[index] : NULL;
}

static const struct io_cmd *find_command(const char *name) {
    for (size_t i = 0; i < COMMANDS_N; i++)
        if (!strcmp(io_commands[i].name, name) ||
            (io_commands[i].alias && !strcmp(io_commands[i].alias, name)))
            return &io_commands[i];
    return NULL;
}

static int io_help_co(struct io_session *s, const struct io_args *a) {
    if (!a->pos_n) {
        for (size_t i = 0; i < COMMANDS_N; i++)
            io_usage(&io_commands[i]);
        puts("\nUse 'help commandname' for extended help.");
        return 0;
    }
    const struct io_cmd *c = find_command(a->pos[0]);
    if (!c) {
        printf("command %s not found\n", a->pos[0]);
        return -EINVAL;
    }
    io_usage(c);
    for (const char *const *line = c->details; line && *line; line++)
        printf("%s%s\n", line == c->details ? "\n" : "", *line);
    return 0;
}

/* ------------------------------------------------------------------ lines */

/* Splits at blanks, in place.  Returns the number of words, TOKENS_MAX + 1 for too many. */
static int split(char *line, char **word) {
    int n = 0;
    for (char *save, *w = strtok_r(line, " \t\r\n", &save); w;
         w = strtok_r(NULL, " \t\r\n", &save)) {
        if (n == TOKENS_MAX)
            return TOKENS_MAX + 1;
        word[n++] = w;
    }
    return n;
}

/* Options may stand anywhere before "--"; letters can be joined: -qP 5. */
static int parse_words(struct io_session *s, const struct io_cmd *c, char **word, int n,
                       struct io_args *a) {
    bool options = true;
    for (int i = 1; i < n; i++) {
        const char *w = word[i];
        if (!options || w[0] != '-' || !w[1]) {
            if (a->pos_n == IO_POS_MAX)
                return io_usage(c);
            a->pos[a->pos_n++] = w;
            continue;
        }
        if (!strcmp(w, "--")) {
            options = false;
            continue;
        }
        for (w++; *w; w++) {
            unsigned char letter = (unsigned char)*w;
            const char *known = letter < 128 && letter != ':' ? strchr(c->letters, letter) : NULL;
            if (!known) {
                io_complain_bare(s, "%s: invalid option -- '%c'", word[0], letter);
                return io_usage(c);
            }
            a->has[letter] = true;
            if (known[1] != ':')
                continue;
            a->val[letter] = w[1] ? w + 1 : i + 1 < n ? word[++i] : NULL;
            if (!a->val[letter]) {
                io_complain_bare(s, "%s: option requires an argument -- '%c'", word[0], letter);
                return io_usage(c);
            }
            if (letter == 'o' && a->list_n < (int)(sizeof(a->list) / sizeof(a->list[0])))
                a->list[a->list_n++] = a->val[letter];
            break;
        }
    }
    return 0;
}

/* As there, options count as arguments too, and only commands without options have a most. */
static int check_count(struct io_session *s, const struct io_cmd *c, char **word, int n) {
    bool truncates = !strcmp(c->name, "truncate"); /* the one with options and a most */
    bool open_end = (*c->letters && !truncates) || c->pos_max == IO_POS_MAX;
    int most = truncates ? 3 : c->pos_max;
    if (n >= c->pos_min && (open_end || n <= most))
        return 0;
    if (open_end)
        io_complain_bare(s, "bad argument count %d to %s, expected at least %d arguments", n,
                         word[0], c->pos_min);
    else if (most == c->pos_min)
        io_complain_bare(s, "bad argument count %d to %s, expected %d arguments", n, word[0],
                         c->pos_min);
    else
        io_complain_bare(s, "bad argument count %d to %s, expected between %d and %d arguments", n,
                         word[0], c->pos_min, most);
    return -EINVAL;
}

static int run_words_co(struct io_session *s, char **word, int n) {
    if (n > TOKENS_MAX) {
        io_complain(s, "more than %d words in one command", TOKENS_MAX);
        return -EINVAL;
    }
    const struct io_cmd *c = find_command(word[0]);
    if (!c) {
        io_complain_bare(s, "command \"%s\" not found", word[0]);
        return -EINVAL;
    }
    if (!s->node && !c->no_disk) {
        io_complain_bare(s, "%s",
                         cli_words("no file open: name an image on the command line, or open one",
                                   "no file open, try 'help open'"));
        return -EINVAL;
    }
    int r = check_count(s, c, word, n - 1);
    if (!r && c->writes && !node_is_rw(s->node)) {
        io_complain(s, "%s", cli_words("the image is open read-only", "Block node is read-only"));
        r = -EROFS;
    }
    if (r)
        return r;
    struct io_args *a = xcalloc(1, sizeof(*a)); /* 10 KiB: too large for a task's stack */
    a->cmd = c;
    r = parse_words(s, c, word, n, a);
    if (!r && (a->pos_n < c->pos_min || a->pos_n > c->pos_max))
        r = io_usage(c);
    if (!r)
        r = c->fn(s, a);
    free(a);
    return r;
}

void io_session_init(struct io_session *s, struct verb_ctx *ctx, struct node *n) {
    *s = (struct io_session){.ctx = ctx, .node = n};
    waitq_init(&s->idle);
    waitq_init(&s->slot);
}

void io_session_run_co(struct io_session *s, const char *line) {
    char *text AUTO_FREE = xstrdup(line);
    char **word AUTO_FREE = xcalloc(TOKENS_MAX + 1, sizeof(*word));
    int n = split(text, word);
    if (n && run_words_co(s, word, n) < 0)
        s->failed = true;
}

void io_session_drain_co(struct io_session *s) {
    while (s->in_flight)
        waitq_wait_co(&s->idle);
}
