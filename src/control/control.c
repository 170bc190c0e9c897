/* SPDX-License-Identifier: MIT */
/*
 * The control socket: see control.h.
 *
 * One task accepts, one for each connection reads lines and answers them in order.  Commands that
 * change something hold `lock`, so that two clients cannot meet in one disk; status does not, and
 * answers while a commit runs.
 *
 * Hostile bytes.  A line has at most LINE_MAX_BYTES and NESTING_MAX levels (the parser recurses,
 * and task stacks are small); what is not JSON, or not a command, gets an error, and an endless
 * line the end.  At most CLIENTS_MAX are connected, others wait in the socket's queue; who does not
 * read answers stops only his own task.
 */
#include "control/control.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#include "base/cleanup.h"
#include "base/err.h"
#include "base/list.h"
#include "base/strbuf.h"
#include "base/version.h"
#include "export/nbd/server.h" /* nbd_listen_unix */
#include "runtime/loop.h"
#include "runtime/task.h"

#define LINE_MAX_BYTES (64u * 1024)
#define NESTING_MAX 16
#define CLIENTS_MAX 16
#define ACCEPT_PAUSE_NS (INT64_C(100) * 1000000)

struct control {
    struct loop *loop;
    struct control_opts opts;
    char *path;
    struct stat made; /* the socket file, as we made it */
    bool abstract;
    int fd;
    bool stopping, accepting;
    struct list clients;
    unsigned nclients;
    struct waitq changed;
    struct task_mutex lock;
    const char *running; /* the command that holds the lock */
};

struct client {
    struct list link;
    struct control *c;
    int fd;
    char *buf; /* LINE_MAX_BYTES */
    size_t len;
};

/* ---------------------------------------------------------------- commands */

struct command {
    const char *name, *help;
    bool changes; /* takes the lock */
    /* Keys that `arguments` may have, NULL-terminated. */
    const char *const *keys;
    int (*run_co)(struct control *c, const json_t *args, json_t **result, struct err *e);
};

/* "disk" of the arguments; without it the only one. */
static int find_disk(struct control *c, const json_t *args, struct control_disk **out,
                     struct err *e) {
    const json_t *want = json_object_get(args, "disk");
    if (want && !json_is_string(want))
        return err_set(e, EINVAL, "'disk' is the name of a disk");
    if (!want && c->opts.ndisks != 1) {
        return err_set(e, EINVAL, "there are %zu disks: say which by 'disk'", c->opts.ndisks);
    }
    for (size_t i = 0; i < c->opts.ndisks; i++) {
        *out = c->opts.disks[i];
        if (!want || !strcmp(json_string_value(want), (*out)->name))
            return 0;
    }
    struct strbuf safe AUTO_STRBUF = STRBUF_INIT;
    strbuf_put_safe(&safe, json_string_value(want), json_string_length(want));
    return err_set(e, ENOENT, "there is no disk '%s'", safe.s ? safe.s : "");
}

static int status_co(struct control *c, const json_t *args, json_t **result, struct err *e) {
    json_t *disks = json_array();
    for (size_t i = 0; i < c->opts.ndisks; i++)
        json_array_append_new(disks, control_disk_status(c->opts.disks[i]));
    *result = json_pack("{s:s, s:I, s:s?, s:o}", "program", c->opts.program, "pid",
                        (json_int_t)getpid(), "running", c->running, "disks", disks);
    return 0;
}

static int commit_co(struct control *c, const json_t *args, json_t **result, struct err *e) {
    struct control_disk *d;
    int r = find_disk(c, args, &d, e);
    return r < 0 ? r : control_disk_commit_co(d, e);
}

static int keep_co(struct control *c, const json_t *args, json_t **result, struct err *e) {
    struct control_disk *d;
    const char *file = json_string_value(json_object_get(args, "file"));
    const json_t *replace = json_object_get(args, "replace");
    int r = find_disk(c, args, &d, e);
    if (r < 0)
        return r;
    if (!file || file[0] != '/')
        return err_set(e, EINVAL, "'file' is the absolute path of the file to make");
    if (replace && !json_is_boolean(replace))
        return err_set(e, EINVAL, "'replace' is true or false");
    return control_disk_keep_co(d, file, json_is_true(replace), e);
}

static int drop_co(struct control *c, const json_t *args, json_t **result, struct err *e) {
    struct control_disk *d;
    int r = find_disk(c, args, &d, e);
    return r < 0 ? r : control_disk_drop_co(d, e);
}

static int resize_co(struct control *c, const json_t *args, json_t **result, struct err *e) {
    struct control_disk *d;
    const json_t *size = json_object_get(args, "size");
    int r = find_disk(c, args, &d, e);
    if (r < 0)
        return r;
    if (!json_is_integer(size) || json_integer_value(size) <= 0)
        return err_set(e, EINVAL, "'size' is the new number of bytes");
    return control_disk_resize_co(d, (uint64_t)json_integer_value(size), e);
}

static int stop_co(struct control *c, const json_t *args, json_t **result, struct err *e) {
    if (!c->opts.stop)
        return err_set(e, ENOTSUP, "%s ends with its guest", c->opts.program);
    c->opts.stop(c->opts.arg);
    return 0;
}

static int nothing_co(struct control *c, const json_t *args, json_t **result, struct err *e) {
    return 0;
}

static int query_commands_co(struct control *c, const json_t *args, json_t **result, struct err *e);

static const char *const no_keys[] = {NULL}, *const disk_keys[] = {"disk", NULL},
                         *const keep_keys[] = {"disk", "file", "replace", NULL},
                         *const resize_keys[] = {"disk", "size", NULL},
                         *const any_keys[] = {"enable", NULL};

static const struct command commands[] = {
    {"status", "what is served, to whom, and what the scratch holds", false, no_keys, status_co},
    {"commit", "write what was written so far into the disk", true, disk_keys, commit_co},
    {"keep", "save a copy of what was written so far as a new overlay file", true, keep_keys,
     keep_co},
    {"drop", "forget what was written so far", true, disk_keys, drop_co},
    {"resize", "let the disk grow; clients that come later see it", true, resize_keys, resize_co},
    {"stop", "end in order", false, no_keys, stop_co},
    {"qmp_capabilities", "for clients of QMP; does nothing", false, any_keys, nothing_co},
    {"query-commands", "this list", false, no_keys, query_commands_co},
};
enum { COMMANDS_N = sizeof(commands) / sizeof(*commands) };

static int query_commands_co(struct control *c, const json_t *args, json_t **result,
                             struct err *e) {
    *result = json_array();
    for (int i = 0; i < COMMANDS_N; i++)
        json_array_append_new(
            *result, json_pack("{s:s, s:s}", "name", commands[i].name, "help", commands[i].help));
    return 0;
}

static int check_keys(const struct command *cmd, json_t *args, struct err *e) {
    const char *key;
    json_t *value;
    json_object_foreach(args, key, value) {
        bool known = false;
        for (int i = 0; cmd->keys[i]; i++)
            known |= !strcmp(key, cmd->keys[i]);
        if (!known) {
            struct strbuf safe AUTO_STRBUF = STRBUF_INIT;
            strbuf_put_safe(&safe, key, strlen(key));
            return err_set(e, EINVAL, "Parameter '%s' is unexpected", safe.s);
        }
    }
    return 0;
}

static int run_command_co(struct control *c, const struct command *cmd, json_t *args,
                          json_t **result, struct err *e) {
    int r = check_keys(cmd, args, e);
    if (r < 0)
        return r;
    if (!cmd->changes)
        return cmd->run_co(c, args, result, e);
    task_mutex_lock_co(&c->lock);
    c->running = cmd->name;
    if (c->stopping)
        r = err_set(e, ESHUTDOWN, "%s is ending", c->opts.program);
    else
        r = cmd->run_co(c, args, result, e);
    c->running = NULL;
    task_mutex_unlock(&c->lock);
    return r;
}

/* ---------------------------------------------------------------- lines */

/* Levels of nesting, outside strings. */
static bool too_deep(const char *s, size_t len) {
    int depth = 0;
    bool string = false;
    for (size_t i = 0; i < len; i++) {
        if (string && s[i] == '\\')
            i++;
        else if (s[i] == '"')
            string = !string;
        else if (!string && (s[i] == '{' || s[i] == '['))
            depth++;
        else if (!string && (s[i] == '}' || s[i] == ']'))
            depth--;
        if (depth > NESTING_MAX)
            return true;
    }
    return false;
}

static json_t *error_reply(const char *class, const struct err *e) {
    /* Texts hold names of files, which may be any bytes. */
    struct strbuf safe AUTO_STRBUF = STRBUF_INIT;
    const char *text = err_text(e);
    strbuf_put_safe(&safe, text, strlen(text));
    json_t *j = json_pack("{s:{s:s, s:s}}", "error", "class", class, "desc", safe.s ? safe.s : "");
    if (j && e->hint)
        json_object_set_new(json_object_get(j, "error"), "hint", json_string(e->hint));
    return j;
}

/* The answer to one line, new reference. */
static json_t *answer_co(struct control *c, const char *line, size_t len) {
    struct err e AUTO_ERR = ERR_INIT;
    json_error_t bad;
    json_t *request = NULL, *reply, *result = NULL;
    if (too_deep(line, len))
        err_set(&e, EINVAL, "more than %d levels of nesting", NESTING_MAX);
    else if (!(request = json_loadb(line, len, JSON_REJECT_DUPLICATES, &bad)))
        err_set(&e, EINVAL, "no JSON: %s", bad.text);
    if (!request)
        return error_reply("GenericError", &e);
    const char *class = "GenericError", *name, *key;
    json_t *value, *args = json_object_get(request, "arguments");
    name = json_string_value(json_object_get(request, "execute"));
    const struct command *cmd = NULL;
    for (int i = 0; name && i < COMMANDS_N; i++)
        if (!strcmp(name, commands[i].name))
            cmd = &commands[i];
    json_object_foreach(request, key, value) {
        if (strcmp(key, "execute") && strcmp(key, "arguments") && strcmp(key, "id"))
            err_set(&e, EINVAL, "a key that is none of 'execute', 'arguments' and 'id'");
    }
    if (!name)
        err_set(&e, EINVAL, "a request is an object with 'execute', the name of a command");
    else if (!cmd)
        err_set(&e, EINVAL, "The command has not been found");
    else if (args && !json_is_object(args))
        err_set(&e, EINVAL, "'arguments' is an object");
    if (name && !cmd)
        class = "CommandNotFound";
    int r = e.code ? -e.code : run_command_co(c, cmd, args, &result, &e);
    reply = r < 0 ? error_reply(class, &e)
                  : json_pack("{s:o}", "return", result ? result : json_object());
    json_t *id = json_object_get(request, "id");
    if (reply && id)
        json_object_set(reply, "id", id);
    json_decref(request);
    return reply;
}

static int send_json_co(struct client *cl, json_t *j) {
    if (!j)
        return -ENOMEM;
    AUTO_FREE char *text = json_dumps(j, JSON_COMPACT);
    json_decref(j);
    if (!text)
        return -EINVAL;
    struct iovec v[2] = {{text, strlen(text)}, {"\r\n", 2}};
    for (int i = 0; i < 2;) {
        struct msghdr m = {.msg_iov = v + i, .msg_iovlen = (size_t)(2 - i)};
        ssize_t n = loop_sendmsg_co(cl->fd, &m, MSG_NOSIGNAL);
        if (n < 0)
            return (int)n;
        for (; i < 2 && (size_t)n >= v[i].iov_len; i++)
            n -= (ssize_t)v[i].iov_len;
        if (i < 2) {
            v[i].iov_base = (char *)v[i].iov_base + n;
            v[i].iov_len -= (size_t)n;
        }
    }
    return 0;
}

/* Answers the lines that are whole. */
static int lines_co(struct client *cl) {
    char *end;
    while ((end = memchr(cl->buf, '\n', cl->len))) {
        size_t line = (size_t)(end - cl->buf), blank = 0;
        while (blank < line && strchr(" \t\r", cl->buf[blank]) && cl->buf[blank])
            blank++;
        if (blank < line) {
            int r = send_json_co(cl, answer_co(cl->c, cl->buf, line));
            if (r < 0)
                return r;
        }
        cl->len -= line + 1;
        memmove(cl->buf, end + 1, cl->len);
    }
    return 0;
}

static json_t *greeting(void) {
    return json_pack("{s:{s:{s:{s:i, s:i, s:i}, s:s}, s:[]}}", "QMP", "version", "qemu", "major", 0,
                     "minor", 0, "micro", 0, "package", "strata " STRATA_VERSION, "capabilities");
}

static void client_task(void *arg) {
    struct client *cl = arg;
    struct control *c = cl->c;
    int r = send_json_co(cl, greeting());
    while (r == 0 && !c->stopping) {
        if (cl->len == LINE_MAX_BYTES) {
            struct err e AUTO_ERR = ERR_INIT;
            err_set(&e, EMSGSIZE, "a line of more than %u bytes", LINE_MAX_BYTES);
            send_json_co(cl, error_reply("GenericError", &e));
            break;
        }
        ssize_t n = loop_recv_co(cl->fd, cl->buf + cl->len, LINE_MAX_BYTES - cl->len);
        if (n <= 0)
            break;
        cl->len += (size_t)n;
        r = lines_co(cl);
    }
    close(cl->fd);
    list_remove(&cl->link);
    c->nclients--;
    free(cl->buf);
    free(cl);
    waitq_wake_all(&c->changed);
}

/* ---------------------------------------------------------------- life */

static void accept_one(struct control *c, int fd) {
    struct client *cl = calloc(1, sizeof(*cl));
    char *buf = malloc(LINE_MAX_BYTES);
    if (!cl || !buf) {
        free(cl);
        free(buf);
        close(fd);
        return;
    }
    *cl = (struct client){.c = c, .fd = fd, .buf = buf};
    list_push_back(&c->clients, &cl->link);
    c->nclients++;
    task_spawn(c->loop, client_task, cl);
}

static void acceptor(void *arg) {
    struct control *c = arg;
    while (!c->stopping) {
        if (c->nclients >= CLIENTS_MAX) {
            waitq_wait_co(&c->changed);
            continue;
        }
        struct sockaddr_storage peer;
        socklen_t len = sizeof(peer);
        int fd = loop_accept_co(c->fd, &peer, &len);
        if (fd >= 0)
            accept_one(c, fd);
        else if (fd == -ECANCELED || fd == -EBADF || fd == -EINVAL)
            break;
        else if (fd != -ECONNABORTED)
            loop_sleep_co(ACCEPT_PAUSE_NS);
    }
    c->accepting = false;
    waitq_wake_all(&c->changed);
}

int control_start(struct loop *loop, const char *path, const struct control_opts *opts,
                  struct control **out, struct err *e) {
    /* Nobody else gets in between bind and chmod: the mode is there from the start. */
    mode_t mask = umask(0177);
    int fd = nbd_listen_unix(path, e);
    umask(mask);
    if (fd < 0)
        return err_prefix(e, "control socket");
    struct control *c = xcalloc(1, sizeof(*c));
    *c = (struct control){.loop = loop, .opts = *opts, .path = xstrdup(path), .fd = fd};
    c->abstract = path[0] == '@';
    if (!c->abstract && stat(path, &c->made) < 0)
        c->abstract = true; /* gone already: nothing to remove */
    list_init(&c->clients);
    waitq_init(&c->changed);
    task_mutex_init(&c->lock);
    c->accepting = true;
    task_spawn(loop, acceptor, c);
    *out = c;
    return 0;
}

void control_stop_co(struct control *c) {
    struct stat st;
    if (!c)
        return;
    c->stopping = true;
    loop_cancel_fd(c->loop, c->fd);
    waitq_wake_all(&c->changed);
    /* Who is being answered still gets it. */
    list_for_each(it, &c->clients) shutdown(list_entry(it, struct client, link)->fd, SHUT_RD);
    while (c->accepting || c->nclients)
        waitq_wait_co(&c->changed);
    close(c->fd);
    if (!c->abstract && lstat(c->path, &st) == 0 && st.st_dev == c->made.st_dev &&
        st.st_ino == c->made.st_ino)
        unlink(c->path);
    free(c->path);
    free(c);
}
