/* SPDX-License-Identifier: MIT */
/*
 * strata serve: one image, to any number of NBD clients.
 *
 * Order of things: (fork) - open the image - put the overlay on it - listen - pid file - ready
 * line, parent of --fork released - serve - stop on a signal or when the last client has left -
 * flush, commit or keep - take socket and pid file away.  Everything that can be refused is refused
 * before the ready line.
 */
#include "cli/cli.h"

#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#include "base/cleanup.h"
#include "base/log.h"
#include "base/strbuf.h"
#include "cli/daemon.h"
#include "cli/dialect.h"
#include "disk/bitmap.h"
#include "cli/snapshots.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "disk/overlay.h"
#include "export/nbd/server.h"
#include "job/copy.h"
#include "runtime/loop.h"
#include "runtime/task.h"

static const char *const discard_names[] = {"ignore", "unmap", NULL};
static const char *const detect_names[] = {"off", "on", "unmap", NULL};

struct args {
    struct cli_image image;
    const char *load_snapshot, *socket, *bind, *name, *description, *pid_file, *scratch, *keep;
    uint64_t port, scratch_size, share, offset;
    int discard, detect_zeroes;
    bool snapshot, commit, read_only, fork, persistent, verbose, depth;
    struct cli_list bitmaps;
    /* From prepare to run. */
    int status_fd, activated_fd, activated_n;
};

#define PORT_DEFAULT 10809

static const struct cli_opt opts[] = {
    CLI_FORMAT_ROW(struct args, image.format),
    CLI_IMAGE_OPTS_ROW(struct args, image.image_opts),
    CLI_FORCE_SHARE_ROW(struct args, image.force_share),
    CLI_CACHE_ROW(struct args, image.cache, 0, "cache", CACHE_WRITEBACK),
    CLI_TRUST_ROW(struct args, image.trust),
    CLI_STR(struct args, socket, 'k', "socket", "PATH", "listen on a unix socket"),
    CLI_STR(struct args, bind, 'b', "bind", "HOST", "listen on this address (127.0.0.1)"),
    CLI_U64(struct args, port, 'p', "port", "N", PORT_DEFAULT, 0, UINT16_MAX,
            "listen on this TCP port; 0 takes any free one"),
    CLI_STR(struct args, name, 'x', "name", "NAME", "name of the export; none by default"),
    CLI_STR(struct args, description, 'D', "description", "TEXT", "description of the export"),
    CLI_FLAG(struct args, read_only, 'r', "read-only", "refuse all writes"),
    CLI_FLAG(struct args, snapshot, 's', "snapshot",
             "writes go to a temporary overlay that vanishes at the end"),
    CLI_STR(struct args, scratch, 0, "scratch", "DIR",
            "folder of the temporary overlay ($TMPDIR, else /var/tmp)"),
    CLI_SIZE(struct args, scratch_size, 0, "scratch-size", "SIZE", 0, 0, INT64_MAX,
             "most that the temporary overlay may take; 0 is no limit"),
    CLI_FLAG(struct args, commit, 0, "commit-on-exit",
             "write the temporary overlay back into the image at the end"),
    CLI_STR(struct args, keep, 0, "keep", "FILE",
            "save the temporary overlay as a qcow2 file at the end"),
    CLI_LIST(struct args, bitmaps, 'B', "bitmap", "NAME",
             "show clients what this dirty bitmap of the image has recorded"),
    CLI_FLAG(struct args, depth, 'A', "allocation-depth",
             "show clients which layer of the backing chain answers"),
    CLI_FLAG(struct args, persistent, 't', "persistent", "go on when the last client has left"),
    CLI_U64(struct args, share, 'e', "share", "N", 100, 1, 10000, "clients at once"),
    CLI_ENUM(struct args, discard, 0, "discard", "WHAT", discard_names, 1,
             "whether discarded blocks are given back to the host"),
    CLI_ENUM(struct args, detect_zeroes, 0, "detect-zeroes", "WHAT", detect_names, 0,
             "whether written zeros become zero units (on), and give back their room (unmap)"),
    CLI_STR(struct args, load_snapshot, 'l', "load-snapshot", "SNAPSHOT",
            "serve this internal snapshot, read-only: its name or ID, snapshot.id=ID or "
            "snapshot.name=NAME"),
    CLI_SIZE(struct args, offset, 0, "offset", "OFFSET", 0, 0, INT64_MAX,
             "where in the disk the export begins"),
    CLI_FLAG(struct args, fork, 0, "fork", "go to the background once clients can connect"),
    CLI_STR(struct args, pid_file, 0, "pid-file", "FILE", "write the process id there"),
    CLI_FLAG(struct args, verbose, 'v', "verbose", "report each connection on standard error"),
    CLI_END};

struct serve {
    struct verb_ctx *ctx;
    struct args *a;
    struct node *node;
    struct nbd_server *server;
    struct bitmap **bitmaps; /* those of --bitmap */
    struct task *task;
    bool stop;
    struct strbuf uri;
    char *socket_path; /* ours, to be removed; NULL none */
    struct stat socket_stat;
    bool pid_written;
};

/* ---------------------------------------------------------------- arguments */

static int check_args(struct verb_ctx *ctx) {
    struct args *a = ctx->args;
    struct err *e = &ctx->err;
    if (a->socket && (a->bind || a->port != PORT_DEFAULT))
        return err_set(e, EINVAL, "--socket and --bind or --port exclude each other");
    if (!a->snapshot) {
        const char *needs = a->commit         ? "--commit-on-exit"
                            : a->keep         ? "--keep"
                            : a->scratch      ? "--scratch"
                            : a->scratch_size ? "--scratch-size"
                                              : NULL;
        if (needs)
            return err_set(e, EINVAL, "%s needs --snapshot", needs);
    }
    if (a->load_snapshot && !a->read_only && !a->snapshot)
        return err_set(e, EINVAL, "--load-snapshot needs --read-only or --snapshot");
    if (a->snapshot && a->read_only)
        return err_set(e, EINVAL, "--snapshot and --read-only exclude each other");
    if (a->bitmaps.n && a->offset)
        return err_set(e, EINVAL, "--bitmap and --offset exclude each other");
    if (a->commit && a->keep)
        return err_set(e, EINVAL, "--commit-on-exit and --keep exclude each other");
    if (a->keep && access(a->keep, F_OK) == 0)
        return err_set(e, EEXIST, "--keep: %s already exists", a->keep);
    return 0;
}

static int serve_prepare(struct verb_ctx *ctx) {
    struct args *a = ctx->args;
    a->status_fd = -1;
    int rc = check_args(ctx);
    if (rc < 0)
        return rc;
    if (a->verbose)
        cli_log_level(ctx, LOG_LV_INFO);
    /* LISTEN_PID names this process, not the child. */
    a->activated_n = nbd_listen_activated(&a->activated_fd, &ctx->err);
    if (a->activated_n < 0)
        return a->activated_n;
    if (a->activated_n && (a->socket || a->bind || a->port != PORT_DEFAULT))
        return err_set(&ctx->err, EINVAL,
                       "socket activation and --socket, --bind or --port exclude each other");
    return a->fork ? daemon_fork(&a->status_fd, &ctx->err) : 0;
}

/* ---------------------------------------------------------------- the image */

/* Only what lies behind --offset is served. */
static int cut_offset_co(struct serve *s) {
    const struct args *a = s->a;
    if (!a->offset)
        return 0;
    json_t *window = json_pack("{s:I}", "offset", (json_int_t)a->offset);
    struct open_req req = {.flags = node_is_rw(s->node) ? OPEN_RW : 0, .cache = a->image.cache};
    if (a->discard)
        req.flags |= OPEN_UNMAP;
    struct node *top;
    int rc = node_open_on_co(s->node, driver_find("raw"), window, &req, &top, &s->ctx->err);
    json_decref(window);
    if (rc == 0)
        s->node = top;
    return rc;
}

static int open_image_co(struct serve *s) {
    const struct args *a = s->a;
    struct err *e = &s->ctx->err;
    const char *file = s->ctx->pos[0];
    unsigned flags = a->discard ? OPEN_UNMAP : 0;
    if (!a->read_only && !a->snapshot)
        flags |= OPEN_RW;
    int rc = a->load_snapshot
                 ? cli_open_snapshot_co(s->ctx, file, &a->image, flags, a->load_snapshot, &s->node)
                 : cli_open_co(s->ctx, file, &a->image, flags, &s->node);
    if (rc == 0)
        rc = cut_offset_co(s);
    if (rc < 0)
        return rc;
    if (flags & OPEN_RW && a->detect_zeroes)
        s->node->flags |= a->detect_zeroes == 1 ? NODE_DETECT_ZEROES : NODE_DETECT_UNMAP;
    if (dialect_is_qemu() && flags & OPEN_RW)
        dialect_warn_guessed(s->ctx, s->node);
    if (!dialect_is_qemu() && (s->node->flags & NODE_GUESSED) && ((flags & OPEN_RW) || a->commit)) {
        err_set(e, EINVAL,
                "%s: no format was given and none was recognised; taken for raw it "
                "could be turned by a guest into an image that names other files",
                file);
        err_hint(e, "give -f raw if it is a raw image");
        return -EINVAL;
    }
    if (!a->snapshot)
        return 0;
    struct overlay_opts o = {a->scratch, a->scratch_size};
    struct node *top;
    rc = overlay_create_co(s->node, &o, &top, e);
    if (rc == 0)
        s->node = top;
    return rc;
}

/* The bitmaps that were named: of the image, or of one below it. */
static int find_bitmaps_co(struct serve *s) {
    const struct cli_list *names = &s->a->bitmaps;
    struct err *e = &s->ctx->err;
    s->bitmaps = xcalloc(names->n + 1, sizeof(*s->bitmaps));
    for (size_t i = 0; i < names->n; i++) {
        struct bitmap *b = NULL;
        for (struct node *n = s->node; n && !b; n = n->backing)
            b = bitmap_find(n, names->v[i]);
        if (!b) {
            char *safe AUTO_FREE = cli_safe(names->v[i]);
            return err_set(e, ENOENT,
                           cli_words("no bitmap '%s' in %s", "Bitmap '%s' is not found%.0s"), safe,
                           s->ctx->pos[0]);
        }
        int rc = bitmap_load_co(b, e);
        if (rc < 0 && dialect_is_qemu() && b->inconsistent) {
            err_clear(e);
            err_set(e, EINVAL, "Bitmap '%s' is inconsistent and cannot be used", b->name);
        }
        if (rc < 0)
            return rc;
        s->bitmaps[i] = b;
    }
    return 0;
}

/* Writes home what must not be lost. */
static int finish_image_co(struct serve *s) {
    const struct args *a = s->a;
    struct err *e = &s->ctx->err;
    if (a->commit) {
        struct copy_opts o = {0};
        int rc = commit_run_co(s->node, &o, e);
        return rc < 0 ? err_prefix(e, "commit") : 0;
    }
    if (a->keep)
        return overlay_keep_co(s->node, a->keep, false, e);
    if (a->snapshot || a->read_only)
        return 0;
    int rc = bitmap_store_co(s->node, e);
    if (rc < 0)
        return err_prefix(e, "%s", s->node->filename);
    rc = disk_flush_co(s->node);
    return rc < 0 ? err_errno(e, -rc, "%s: flush", s->node->filename) : 0;
}

/* ---------------------------------------------------------------- listening */

static void uri_escape(struct strbuf *b, const char *s, bool path) {
    for (; *s; s++) {
        unsigned char c = (unsigned char)*s;
        bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                     strchr("-._~", c) || (path && c == '/');
        if (plain)
            strbuf_add(b, s, 1);
        else
            strbuf_printf(b, "%%%02X", c);
    }
}

static void uri_unix(struct serve *s, const char *path) {
    AUTO_FREE char *cwd = path[0] == '/' ? NULL : getcwd(NULL, 0);
    strbuf_puts(&s->uri, "nbd+unix:///");
    uri_escape(&s->uri, s->a->name ? s->a->name : "", false);
    strbuf_puts(&s->uri, "?socket=");
    if (cwd) {
        uri_escape(&s->uri, cwd, true);
        strbuf_puts(&s->uri, "/");
    }
    uri_escape(&s->uri, path, true);
}

static int listen_unix(struct serve *s) {
    const char *path = s->a->socket;
    int fd = nbd_listen_unix(path, &s->ctx->err);
    if (fd < 0)
        return fd;
    if (stat(path, &s->socket_stat) == 0)
        s->socket_path = xstrdup(path);
    uri_unix(s, path);
    return nbd_server_listen(s->server, fd, &s->ctx->err);
}

static int listen_tcp(struct serve *s) {
    const struct args *a = s->a;
    uint16_t port = (uint16_t)a->port;
    int fd = nbd_listen_tcp(a->bind, &port, &s->ctx->err);
    if (fd < 0)
        return fd;
    const char *host = a->bind ? a->bind : "127.0.0.1";
    bool v6 = strchr(host, ':');
    strbuf_printf(&s->uri, "nbd://%s%s%s:%u/", v6 ? "[" : "", host, v6 ? "]" : "", (unsigned)port);
    uri_escape(&s->uri, a->name ? a->name : "", false);
    return nbd_server_listen(s->server, fd, &s->ctx->err);
}

/* Sockets from systemd: listening ones, or (Accept=yes) one connected client. */
static int listen_activated(struct serve *s) {
    const struct args *a = s->a;
    int rc = 0;
    for (int i = 0; i < a->activated_n && rc == 0; i++) {
        int fd = a->activated_fd + i, listening = 0;
        socklen_t len = sizeof(listening);
        getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &len);
        rc = listening ? nbd_server_listen(s->server, fd, &s->ctx->err)
                       : nbd_server_attach(s->server, fd, &s->ctx->err);
    }
    strbuf_printf(&s->uri, "%d socket%s from systemd", a->activated_n,
                  a->activated_n == 1 ? "" : "s");
    return rc;
}

static int start_listening(struct serve *s) {
    if (s->a->activated_n)
        return listen_activated(s);
    return s->a->socket ? listen_unix(s) : listen_tcp(s);
}

/* ---------------------------------------------------------------- running */

static void stop_now(struct serve *s) {
    s->stop = true;
    task_wake(s->task);
}

static void on_signal(void *arg, int signo) {
    stop_now(arg);
}

static void on_idle(void *arg) {
    struct serve *s = arg;
    if (!s->a->persistent)
        stop_now(s);
}

static int start_server(struct serve *s) {
    const struct args *a = s->a;
    struct nbd_server_opts o = {
        .export = {.name = a->name,
                   .description = a->description,
                   .node = s->node,
                   .read_only = a->read_only,
                   .allocation_depth = a->depth,
                   .bitmaps = s->bitmaps,
                   .nbitmaps = (unsigned)a->bitmaps.n},
        .max_clients = (unsigned)a->share,
        .on_idle = on_idle,
        .arg = s,
        .verbose = a->verbose,
    };
    int rc = nbd_server_new(s->ctx->loop, &o, &s->server, &s->ctx->err);
    if (rc == 0)
        rc = start_listening(s);
    if (rc == 0 && a->pid_file) {
        rc = pid_file_write(a->pid_file, &s->ctx->err);
        s->pid_written = rc == 0;
    }
    return rc;
}

static void serve_until_stopped_co(struct serve *s) {
    if (!dialect_is_qemu())
        printf("%s\n", s->uri.s);
    fflush(stdout);
    daemon_ready(&s->a->status_fd);
    service_notify_ready();
    while (!s->stop)
        task_park_co();
}

/* Only our own socket file: somebody may have put another in its place meanwhile. */
static void remove_socket(struct serve *s) {
    struct stat st;
    if (s->socket_path && lstat(s->socket_path, &st) == 0 && st.st_dev == s->socket_stat.st_dev &&
        st.st_ino == s->socket_stat.st_ino)
        unlink(s->socket_path);
    free(s->socket_path);
}

static const int stop_signals[] = {SIGTERM, SIGINT, SIGHUP};

static int serve_run_co(struct verb_ctx *ctx) {
    struct serve s = {.ctx = ctx, .a = ctx->args, .task = task_self(), .uri = STRBUF_INIT};
    /* From here on a signal is an orderly end, also while the image is being opened. */
    for (size_t i = 0; i < sizeof(stop_signals) / sizeof(*stop_signals); i++)
        loop_on_signal(ctx->loop, stop_signals[i], on_signal, &s);
    int rc = open_image_co(&s);
    if (rc == 0)
        rc = find_bitmaps_co(&s);
    if (rc == 0)
        rc = start_server(&s);
    if (rc == 0)
        serve_until_stopped_co(&s);
    if (s.server)
        nbd_server_stop_co(s.server);
    nbd_server_free(s.server);
    remove_socket(&s);
    if (rc == 0)
        rc = finish_image_co(&s);
    if (s.node)
        node_unref_co(s.node);
    if (s.pid_written)
        unlink(s.a->pid_file);
    for (size_t i = 0; i < sizeof(stop_signals) / sizeof(*stop_signals); i++) {
        signal(stop_signals[i], SIG_IGN); /* one that comes now asks for what is done already */
        loop_off_signal(ctx->loop, stop_signals[i]);
    }
    strbuf_free(&s.uri);
    free(s.bitmaps);
    return rc;
}

static const char *const details[] = {
    "Serves FILE over the NBD protocol until the last client has left (with --persistent: until a "
    "signal), first printing the URI that clients connect to. SIGTERM, SIGINT and SIGHUP end it in "
    "order: requests in flight are finished, everything is flushed, socket and pid file are removed.",
    "Without --socket it listens on TCP port 10809 of the loopback address only. Started by a "
    "systemd socket unit it serves the sockets that it was given.",
    "With --snapshot the image is opened read-only and never changed; writes go to an unnamed file "
    "whose space is free again when the server ends, however it ends.",
    NULL};

static const struct cli_example examples[] = {
    {"strata serve -k /run/disk.sock disk.qcow2", "serve once, to whoever connects first"},
    {"strata serve --snapshot -t -k /run/disk.sock disk.qcow2",
     "throw-away copy: the image stays as it is"},
    {"strata serve --fork --pid-file /run/disk.pid -t -p 10809 -f raw disk.img",
     "in the background, over TCP"},
    {NULL, NULL}};

const struct verb verb_serve = {
    .name = "serve",
    .summary = "serve an image to NBD clients",
    .synopsis = "FILE",
    .pos_min = 1,
    .pos_max = 1,
    .opts = opts,
    .args_size = sizeof(struct args),
    .details = details,
    .examples = examples,
    .prepare = serve_prepare,
    .run_co = serve_run_co,
};
