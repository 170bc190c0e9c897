/* SPDX-License-Identifier: MIT */
/*
 * strata ctl: one command to the control socket of a running serve or run.
 *
 * Blocking and without a loop: connect, read the greeting, send one line, read one line.  What is
 * printed comes from the other program: it passes cli_safe().
 */
#include <errno.h>
#include <inttypes.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include "base/cleanup.h"
#include "base/size.h"
#include "base/strbuf.h"
#include "cli/cli.h"

#define REPLY_MAX (16u << 20)

struct args {
    const char *disk;
    bool replace;
    int output;
};

static const struct cli_opt opts[] = {
    CLI_STR(struct args, disk, 'd', "disk", "NAME",
            "which of several disks: the name of its export; of run, disk0, disk1 ..."),
    CLI_FLAG(struct args, replace, 0, "replace", "keep: the file may exist"),
    CLI_OUTPUT_ROW(struct args, output), CLI_END};

/* ---------------------------------------------------------------- the socket */

static int connect_to(const char *path, struct err *e) {
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    size_t len = strlen(path);
    socklen_t sa_len = sizeof(sa);
    if (len == 0 || len >= sizeof(sa.sun_path))
        return err_set(e, ENAMETOOLONG, "socket path of %zu bytes, the limit is %zu", len,
                       sizeof(sa.sun_path) - 1);
    memcpy(sa.sun_path, path, len);
    if (path[0] == '@') {
        sa.sun_path[0] = 0;
        sa_len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len);
    }
    AUTO_FD int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return err_errno(e, errno, "socket");
    if (connect(fd, (struct sockaddr *)&sa, sa_len) < 0) {
        int code = errno;
        err_errno(e, code, "%s", path);
        if (code == ECONNREFUSED || code == ENOENT)
            err_hint(e, "nobody listens there: was serve or run started with --control %s?", path);
        return -code;
    }
    return steal_fd(&fd);
}

/* The next line as JSON, new reference. */
static int read_line(FILE *in, json_t **out, struct err *e) {
    struct strbuf b AUTO_STRBUF = STRBUF_INIT;
    int ch;
    while ((ch = getc(in)) != EOF && ch != '\n' && b.len < REPLY_MAX) {
        char byte = (char)ch;
        strbuf_add(&b, &byte, 1);
    }
    if (ch != '\n')
        return err_set(e, ECONNRESET, "the connection ended without an answer");
    *out = json_loadb(b.s ? b.s : "", b.len, 0, NULL);
    return json_is_object(*out) ? 0 : err_set(e, EPROTO, "the answer is not what was expected");
}

static int talk(int fd, json_t *request, json_t **reply, struct err *e) {
    AUTO_FREE char *text = json_dumps(request, JSON_COMPACT);
    AUTO_FREE char *line = text ? xasprintf("%s\n", text) : NULL;
    json_t *hello = NULL;
    FILE *in = line ? fdopen(fd, "r") : NULL;
    if (!in) {
        close(fd);
        return err_set(e, EINVAL, "a name that is not UTF-8 cannot be sent");
    }
    int r = read_line(in, &hello, e);
    json_decref(hello);
    for (size_t at = 0, len = strlen(line); r == 0 && at < len;) {
        ssize_t n = send(fd, line + at, len - at, MSG_NOSIGNAL);
        if (n < 0)
            r = err_errno(e, errno, "sending");
        else
            at += (size_t)n;
    }
    if (r == 0)
        r = read_line(in, reply, e);
    fclose(in);
    return r;
}

/* ---------------------------------------------------------------- output */

static const char *text_of(const json_t *j, const char *key) {
    const char *s = json_string_value(json_object_get(j, key));
    return s ? s : "";
}

static int64_t number_of(const json_t *j, const char *key) {
    return json_integer_value(json_object_get(j, key));
}

static void print_disk(const json_t *d) {
    char size[32], used[32], limit[32];
    AUTO_FREE char *name = cli_safe(text_of(d, "name")), *file = cli_safe(text_of(d, "file")),
                   *format = cli_safe(text_of(d, "format"));
    const json_t *scratch = json_object_get(d, "scratch"), *x = json_object_get(d, "export");
    printf("disk %s: %s (%s, %s)\n", *name ? name : "\"\"", file, format,
           size_human((uint64_t)number_of(d, "size"), size));
    if (scratch) {
        int64_t most = number_of(scratch, "limit");
        printf("  temporary snapshot in %s: %s used, %s\n",
               strcmp(text_of(scratch, "where"), "memory") ? "a file" : "memory",
               size_human((uint64_t)number_of(scratch, "used"), used),
               most ? size_human((uint64_t)most, limit) : "no limit");
    }
    if (*text_of(d, "unfinished-commit")) {
        AUTO_FREE char *journal = cli_safe(text_of(d, "unfinished-commit"));
        printf("  a commit has not ended: %s\n", journal);
    }
    if (x)
        printf("  %" PRIi64 " clients, %" PRIi64 " requests, read %s, written %s, %" PRIi64
               " errors%s\n",
               number_of(x, "clients"), number_of(x, "requests"),
               size_human((uint64_t)number_of(x, "bytes-read"), size),
               size_human((uint64_t)number_of(x, "bytes-written"), used), number_of(x, "errors"),
               json_is_true(json_object_get(x, "read-only")) ? ", read-only" : "");
}

static void print_result(const struct args *a, const json_t *result) {
    if (a->output == OUTPUT_JSON) {
        cli_print_json(json_incref((json_t *)result));
        return;
    }
    const json_t *disks = json_object_get(result, "disks");
    if (!disks)
        return;
    AUTO_FREE char *program = cli_safe(text_of(result, "program"));
    printf("%s, process %" PRIi64 "\n", program, number_of(result, "pid"));
    if (*text_of(result, "running")) {
        AUTO_FREE char *running = cli_safe(text_of(result, "running"));
        printf("running: %s\n", running);
    }
    for (size_t i = 0; i < json_array_size(disks); i++)
        print_disk(json_array_get(disks, i));
}

/* ---------------------------------------------------------------- commands */

static const char *const words[] = {"status", "commit", "keep", "drop", "resize", "stop", NULL};

static int bad_command(struct verb_ctx *ctx, const char *word) {
    struct str_nearest near = {0};
    AUTO_FREE char *safe = cli_safe(word);
    for (int i = 0; words[i]; i++)
        str_nearest_offer(&near, word, words[i]);
    err_set(&ctx->err, EINVAL, "'%s' is none of status, commit, keep, drop, resize, stop", safe);
    if (near.best)
        err_hint(&ctx->err, "did you mean '%s'?", near.best);
    return -EINVAL;
}

/* keep FILE: the other program has another working folder. */
static char *absolute(const char *file) {
    AUTO_FREE char *cwd = file[0] == '/' ? NULL : getcwd(NULL, 0);
    return cwd ? xasprintf("%s/%s", cwd, file) : xstrdup(file);
}

static int make_request(struct verb_ctx *ctx, json_t **out) {
    const struct args *a = ctx->args;
    const char *word = ctx->pos[1], *arg = ctx->pos_n > 2 ? ctx->pos[2] : NULL;
    struct err *e = &ctx->err;
    bool known = false, keep = !strcmp(word, "keep"), resize = !strcmp(word, "resize");
    for (int i = 0; words[i]; i++)
        known |= !strcmp(word, words[i]);
    if (!known)
        return bad_command(ctx, word);
    if ((keep || resize) != (arg != NULL))
        return err_set(e, EINVAL,
                       keep     ? "keep needs a file: strata ctl SOCKET keep FILE"
                       : resize ? "resize needs a size: strata ctl SOCKET resize SIZE"
                                : "%s takes no argument",
                       word);
    if (a->disk && (!strcmp(word, "status") || !strcmp(word, "stop")))
        return err_set(e, EINVAL, "%s is for all disks: it takes no --disk", word);
    if (a->replace && !keep)
        return err_set(e, EINVAL, "--replace is for keep");
    json_t *args = json_object();
    *out = json_pack("{s:s, s:o}", "execute", word, "arguments", args);
    if (a->disk)
        json_object_set_new(args, "disk", json_string(a->disk));
    if (a->replace)
        json_object_set_new(args, "replace", json_true());
    AUTO_FREE char *file = keep ? absolute(arg) : NULL;
    if (keep && json_object_set_new(args, "file", json_string(file)) < 0)
        return err_set(e, EINVAL, "the file's name is not UTF-8");
    uint64_t size = 0;
    int r = resize ? size_parse(arg, "size", &size, e) : 0;
    if (resize && r == 0)
        json_object_set_new(args, "size", json_integer((json_int_t)size));
    return r;
}

static int ctl_run(struct verb_ctx *ctx) {
    json_t *request = NULL, *reply = NULL;
    int r = make_request(ctx, &request);
    if (r == 0)
        r = connect_to(ctx->pos[0], &ctx->err);
    if (r >= 0)
        r = talk(r, request, &reply, &ctx->err);
    const json_t *bad = json_object_get(reply, "error");
    if (r == 0 && bad) {
        r = err_set(&ctx->err, EIO, "%s", text_of(bad, "desc"));
        if (*text_of(bad, "hint"))
            err_hint(&ctx->err, "%s", text_of(bad, "hint"));
    }
    if (r == 0)
        print_result(ctx->args, json_object_get(reply, "return"));
    json_decref(request);
    json_decref(reply);
    return r;
}

static const char *const details[] = {
    "SOCKET is what serve or run was given as --control.  Commands:",
    "status: what is served, by whom it is used, and how full the temporary snapshot is.",
    "commit: writes into the disk what clients have written so far; they go on meanwhile.  A crash in "
    "the middle leaves a file beside the disk that strata commit completes.",
    "keep FILE: saves a copy of what was written so far as a qcow2 overlay; clients wait.",
    "drop: forgets what was written so far; clients read the disk as it is.",
    "resize SIZE: lets the disk (or its temporary snapshot) grow; new clients see it.",
    "stop: ends serve in order.",
    NULL};

static const struct cli_example examples[] = {
    {"strata ctl /run/disk.ctl status --output=json", "for programs"},
    {"strata ctl /run/disk.ctl commit --disk root", "of several disks, one"},
    {"strata ctl /run/disk.ctl keep before-upgrade.qcow2", "a copy to come back to"},
    {NULL, NULL}};

const struct verb verb_ctl = {
    .name = "ctl",
    .summary = "tell a running serve or run what to do with its temporary snapshots",
    .synopsis = "SOCKET COMMAND [ARGUMENT]",
    .pos_min = 2,
    .pos_max = 3,
    .opts = opts,
    .args_size = sizeof(struct args),
    .details = details,
    .examples = examples,
    .run = ctl_run,
};
