/* SPDX-License-Identifier: MIT */
/*
 * strata serve: images, to any number of NBD clients.
 *
 * Order of things: (fork) - open the images - put overlays on them - listen - control socket - pid
 * file - ready lines, parent of --fork released - serve - stop on a signal or when the last client
 * has left - end of the control socket - flush, commit or keep - take sockets and pid file away.
 * Everything that can be refused is refused before the ready line.
 */
#include <errno.h>
#include <inttypes.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/log.h"
#include "cli/daemon.h"
#include "cli/dialect.h"
#include "cli/serve.h"
#include "control/control.h"
#include "disk/open.h"
#include "export/nbd/server.h"
#include "export/vhost/server.h"
#include "export/nbd/tls.h"
#include "runtime/loop.h"
#include "runtime/task.h"

static const char *const discard_names[] = {"ignore", "unmap", NULL};
static const char *const detect_names[] = {"off", "on", "unmap", NULL};

static const struct cli_opt opts[] = {
    CLI_FORMAT_ROW(struct serve_args, image.format),
    CLI_IMAGE_OPTS_ROW(struct serve_args, image.image_opts),
    CLI_FORCE_SHARE_ROW(struct serve_args, image.force_share),
    CLI_CACHE_ROW(struct serve_args, image.cache, 0, "cache", CACHE_WRITEBACK),
    CLI_TRUST_ROW(struct serve_args, image.trust),
    CLI_STR(struct serve_args, socket, 'k', "socket", "PATH",
            "listen on a unix socket; @NAME is an abstract one"),
    CLI_STR(struct serve_args, bind, 'b', "bind", "HOST", "listen on this address (127.0.0.1)"),
    CLI_U64(struct serve_args, port, 'p', "port", "N", PORT_DEFAULT, 0, UINT16_MAX,
            "listen on this TCP port; 0 takes any free one"),
    CLI_U64(struct serve_args, vsock, 0, "vsock", "PORT", VSOCK_NONE, 0, UINT32_MAX,
            "listen on this vsock port, for guests of this host; 0 takes any free one"),
    CLI_STR(struct serve_args, name, 'x', "name", "NAME", "name of the export; none by default"),
    CLI_STR(struct serve_args, default_name, 0, "default", "NAME",
            "the export of clients that ask for no name; else the first one"),
    CLI_STR(struct serve_args, description, 'D', "description", "TEXT",
            "description of the export"),
    CLI_FLAG(struct serve_args, read_only, 'r', "read-only", "refuse all writes"),
    CLI_FLAG(struct serve_args, snapshot, 's', "snapshot",
             "writes go to a temporary overlay that vanishes at the end"),
    CLI_STR(struct serve_args, scratch, 0, "scratch", "DIR",
            "folder of the temporary overlay ($TMPDIR, else /var/tmp), or memory:SIZE"),
    CLI_SIZE(struct serve_args, scratch_size, 0, "scratch-size", "SIZE", 0, 0, INT64_MAX,
             "most that the temporary overlay may take; 0 is no limit"),
    CLI_FLAG(struct serve_args, commit, 0, "commit-on-exit",
             "write the temporary overlay back into the image at the end"),
    CLI_STR(struct serve_args, keep, 0, "keep", "FILE",
            "save the temporary overlay as a qcow2 file at the end"),
    CLI_LIST(struct serve_args, bitmaps, 'B', "bitmap", "NAME",
             "show clients what this dirty bitmap of the image has recorded"),
    CLI_FLAG(struct serve_args, depth, 'A', "allocation-depth",
             "show clients which layer of the backing chain answers"),
    CLI_STR(struct serve_args, vhost_user, 0, "vhost-user", "PATH",
            "be a virtio-blk device on this unix socket instead of an NBD server"),
    CLI_U64(struct serve_args, queues, 0, "queues", "N", 1, 1, VHOST_QUEUES_MAX,
            "request queues of the virtio-blk device"),
    CLI_SIZE(struct serve_args, block_size, 0, "block-size", "SIZE", 512, 0, 65536,
             "logical block size of the virtio-blk device"),
    CLI_STR(struct serve_args, serial, 0, "serial", "TEXT",
            "serial number of the virtio-blk device, at most 20 bytes"),
    CLI_FLAG(struct serve_args, persistent, 't', "persistent",
             "go on when the last client has left"),
    CLI_U64(struct serve_args, share, 'e', "share", "N", 100, 1, 10000,
            "clients of one export at once; with a single export, others wait"),
    CLI_U64(struct serve_args, max_connections, 0, "max-connections", "N", 0, 0, 10000,
            "connections at once, whatever they are at; others wait (0: as --share allows)"),
    CLI_U64(struct serve_args, handshake_s, 0, "handshake-timeout", "SECONDS", 10, 0, INT32_MAX,
            "how long a client may take for the handshake; 0 is no limit"),
    CLI_U64(struct serve_args, idle_s, 0, "idle-timeout", "SECONDS", 0, 0, 86400 * 365,
            "disconnect clients that neither ask nor take answers for so long; 0 never"),
    CLI_SIZE(struct serve_args, bandwidth, 0, "bandwidth", "SIZE", 0, 0, INT64_MAX,
             "most bytes that an export reads and writes in a second; 0 is no limit"),
    CLI_SIZE(struct serve_args, bandwidth_burst, 0, "bandwidth-burst", "SIZE", 0, 0, INT64_MAX,
             "bytes that may go through at once after a rest (a tenth of --bandwidth)"),
    CLI_U64(struct serve_args, iops, 0, "iops", "N", 0, 0, INT64_MAX,
            "most requests that an export takes in a second; 0 is no limit"),
    CLI_U64(struct serve_args, iops_burst, 0, "iops-burst", "N", 0, 0, INT64_MAX,
            "requests that may go through at once after a rest (a tenth of --iops)"),
    CLI_STR(struct serve_args, tls, 0, "tls", "WHAT",
            "offer TLS: a folder with certificates, psk:FILE, or anon"),
    CLI_FLAG(struct serve_args, tls_required, 0, "tls-required",
             "refuse everything before TLS has begun"),
    CLI_FLAG(struct serve_args, tls_anyone, 0, "tls-anyone",
             "with certificates: take clients that show none"),
    CLI_STR(struct serve_args, tls_priority, 0, "tls-priority", "TEXT",
            "ciphers and versions, as GnuTLS names them"),
    CLI_STR(struct serve_args, control, 0, "control", "SOCKET",
            "take commands on this unix socket; see strata ctl"),
    CLI_STR(struct serve_args, access_log, 0, "access-log", "FILE",
            "add a line there for each client that comes and goes; - is standard error"),
    CLI_ENUM(struct serve_args, discard, 0, "discard", "WHAT", discard_names, 1,
             "whether discarded blocks are given back to the host"),
    CLI_ENUM(struct serve_args, detect_zeroes, 0, "detect-zeroes", "WHAT", detect_names, 0,
             "whether written zeros become zero units (on), and give back their room (unmap)"),
    CLI_STR(struct serve_args, load_snapshot, 'l', "load-snapshot", "SNAPSHOT",
            "serve this internal snapshot, read-only: its name or ID, snapshot.id=ID or "
            "snapshot.name=NAME"),
    CLI_SIZE(struct serve_args, offset, 0, "offset", "OFFSET", 0, 0, INT64_MAX,
             "where in the disk the export begins"),
    CLI_FLAG(struct serve_args, fork, 0, "fork", "go to the background once clients can connect"),
    CLI_STR(struct serve_args, pid_file, 0, "pid-file", "FILE", "write the process id there"),
    CLI_FLAG(struct serve_args, verbose, 'v', "verbose",
             "report each connection on standard error"),
    CLI_END};

/* ---------------------------------------------------------------- arguments */

static const char *needs_snapshot(const struct serve_args *a) {
    return a->commit         ? "--commit-on-exit"
           : a->keep         ? "--keep"
           : a->scratch      ? "--scratch"
           : a->scratch_size ? "--scratch-size"
                             : NULL;
}

static int check_snapshot_args(struct verb_ctx *ctx) {
    struct serve_args *a = ctx->args;
    struct err *e = &ctx->err;
    const char *needs = a->snapshot ? NULL : needs_snapshot(a);
    if (needs)
        return err_set(e, EINVAL, "%s needs --snapshot", needs);
    if (a->load_snapshot && !a->read_only && !a->snapshot)
        return err_set(e, EINVAL, "--load-snapshot needs --read-only or --snapshot");
    if (a->load_snapshot && (a->commit || a->keep))
        return err_set(e, EINVAL, "--load-snapshot and %s exclude each other",
                       a->commit ? "--commit-on-exit" : "--keep");
    if (a->snapshot && a->read_only)
        return err_set(e, EINVAL, "--snapshot and --read-only exclude each other");
    if (a->commit && a->keep)
        return err_set(e, EINVAL, "--commit-on-exit and --keep exclude each other");
    if (a->keep && ctx->pos_n > 1) {
        err_set(e, EINVAL, "--keep is one file, and there are %d exports", ctx->pos_n);
        err_hint(e, "use --control SOCKET, and strata ctl SOCKET keep --disk NAME FILE");
        return -EINVAL;
    }
    if (a->keep && access(a->keep, F_OK) == 0)
        return err_set(e, EEXIST, "--keep: %s already exists", a->keep);
    return 0;
}

static int check_args(struct verb_ctx *ctx) {
    struct serve_args *a = ctx->args;
    struct err *e = &ctx->err;
    if (a->socket && (a->bind || a->port != PORT_DEFAULT))
        return err_set(e, EINVAL, "--socket and --bind or --port exclude each other");
    if (a->vsock != VSOCK_NONE && (a->socket || a->bind || a->port != PORT_DEFAULT))
        return err_set(e, EINVAL, "--vsock and --socket, --bind or --port exclude each other");
    if (a->vhost_user) {
        const char *no = a->socket || a->bind || a->port != PORT_DEFAULT ? "another socket"
                         : a->vsock != VSOCK_NONE                        ? "--vsock"
                         : a->tls                                        ? "--tls"
                         : a->bandwidth || a->iops                       ? "--bandwidth or --iops"
                         : a->access_log                                 ? "--access-log"
                         : a->bitmaps.n                                  ? "--bitmap"
                         : ctx->pos_n > 1                                ? "several images"
                                                                         : NULL;
        if (no)
            return err_set(e, EINVAL, "--vhost-user does not go with %s", no);
        if (a->block_size < 512 || a->block_size > 65536 || !is_pow2(a->block_size))
            return err_set(e, EINVAL, "--block-size %" PRIu64 ": a power of two from 512 to 65536",
                           a->block_size);
    }
    if (a->name && ctx->pos_n > 1)
        return err_set(e, EINVAL, "--name is for one export; give NAME=FILE for several");
    if (a->bitmaps.n && a->offset)
        return err_set(e, EINVAL, "--bitmap and --offset exclude each other");
    const char *tls = a->tls_required   ? "--tls-required"
                      : a->tls_anyone   ? "--tls-anyone"
                      : a->tls_priority ? "--tls-priority"
                                        : NULL;
    if (tls && !a->tls)
        return err_set(e, EINVAL, "%s needs --tls", tls);
    if ((a->bandwidth_burst && !a->bandwidth) || (a->iops_burst && !a->iops))
        return err_set(e, EINVAL, "%s",
                       a->bandwidth_burst && !a->bandwidth ? "--bandwidth-burst needs --bandwidth"
                                                           : "--iops-burst needs --iops");
    return check_snapshot_args(ctx);
}

static int serve_prepare(struct verb_ctx *ctx) {
    struct serve_args *a = ctx->args;
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

/* ---------------------------------------------------------------- the access log */

static int open_access_log(struct serve *s) {
    struct serve_args *a = s->a;
    a->access_fd = -1;
    if (!a->access_log)
        return 0;
    a->access_fd = !strcmp(a->access_log, "-")
                       ? dup(STDERR_FILENO)
                       : open(a->access_log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0640);
    return a->access_fd < 0 ? err_errno(&s->ctx->err, errno, "--access-log %s", a->access_log) : 0;
}

/* One write a line: several servers may share a file. */
static void write_access(void *arg, const char *line) {
    struct serve *s = arg;
    AUTO_FREE char *text = xasprintf("%s\n", line);
    ssize_t n;
    do
        n = write(s->a->access_fd, text, strlen(text));
    while (n < 0 && errno == EINTR);
}

/* ---------------------------------------------------------------- running */

static void stop_now(void *arg) {
    struct serve *s = arg;
    s->stop = true;
    task_wake(s->task);
}

static void on_signal(void *arg, int signo) {
    stop_now(arg);
}

void serve_on_idle(void *arg) {
    struct serve *s = arg;
    if (!s->a->persistent)
        stop_now(s);
}

static int make_tls(struct serve *s, struct nbd_tls **out) {
    const struct serve_args *a = s->a;
    *out = NULL;
    if (!a->tls)
        return 0;
    bool psk = !strncmp(a->tls, "psk:", 4), anon = !strcmp(a->tls, "anon");
    struct nbd_tls_opts o = {
        .kind = psk    ? TLS_PSK
                : anon ? TLS_ANON
                       : TLS_X509,
        .path = psk ? a->tls + 4 : a->tls,
        .verify_peer = !a->tls_anyone,
        .priority = a->tls_priority,
    };
    return nbd_tls_new(&o, out, &s->ctx->err);
}

static int add_exports(struct serve *s) {
    const struct serve_args *a = s->a;
    int rc = 0;
    for (size_t i = 0; i < s->ndisks && rc == 0; i++) {
        struct serve_disk *d = &s->disks[i];
        struct nbd_export_opts x = {
            .name = d->d.name,
            .description = a->description,
            .node = d->d.node,
            .read_only = a->read_only,
            .allocation_depth = a->depth,
            .bitmaps = d->bitmaps,
            .nbitmaps = d->nbitmaps,
            .share = (unsigned)a->share,
            .bytes = a->bandwidth,
            .bytes_burst = a->bandwidth_burst,
            .requests = a->iops,
            .requests_burst = a->iops_burst,
        };
        rc = nbd_server_add(s->server, &x, &d->d.export, &s->ctx->err);
    }
    if (rc == 0 && a->default_name)
        rc = nbd_server_set_default(s->server, a->default_name, &s->ctx->err);
    return rc;
}

/* With several exports: connections beyond those that may be in use, to list and to be refused. */
#define LOOKERS 16

static int start_server(struct serve *s) {
    const struct serve_args *a = s->a;
    uint64_t most = a->max_connections ? a->max_connections : a->share * s->ndisks + LOOKERS;
    if (s->ndisks == 1 && most > a->share)
        most = a->share; /* so that nobody is refused who could wait */
    struct nbd_server_opts o = {
        .max_clients = (unsigned)(most > 10000 ? 10000 : most),
        .handshake_timeout_ns = a->handshake_s ? (int64_t)a->handshake_s * 1000000000 : -1,
        .idle_timeout_ns = (int64_t)a->idle_s * 1000000000,
        .tls_required = a->tls_required,
        .on_idle = serve_on_idle,
        .access = a->access_log ? write_access : NULL,
        .arg = s,
        .verbose = a->verbose,
    };
    int rc = make_tls(s, &o.tls);
    if (rc == 0)
        rc = nbd_server_new(s->ctx->loop, &o, &s->server, &s->ctx->err);
    if (rc == 0)
        rc = add_exports(s);
    return rc;
}

static int start(struct serve *s) {
    const struct serve_args *a = s->a;
    int rc = open_access_log(s);
    if (rc == 0)
        rc = a->vhost_user ? serve_vhost(s) : start_server(s);
    if (rc == 0 && !a->vhost_user)
        rc = serve_listen(s);
    if (rc == 0 && a->control) {
        struct control_opts o = {.program = "serve",
                                 .disks = s->control_disks,
                                 .ndisks = s->ndisks,
                                 .stop = stop_now,
                                 .arg = s};
        rc = control_start(s->ctx->loop, a->control, &o, &s->control, &s->ctx->err);
    }
    if (rc == 0 && a->pid_file) {
        rc = pid_file_write(a->pid_file, &s->ctx->err);
        s->pid_written = rc == 0;
    }
    return rc;
}

static void serve_until_stopped_co(struct serve *s) {
    if (!dialect_is_qemu())
        fputs(s->uris.s ? s->uris.s : "", stdout);
    fflush(stdout);
    daemon_ready(&s->a->status_fd);
    service_notify_ready();
    while (!s->stop)
        task_park_co();
}

static const int stop_signals[] = {SIGTERM, SIGINT, SIGHUP};

/* Nobody is served after this. */
static void end_server_co(struct serve *s) {
    control_stop_co(s->control);
    if (s->server)
        nbd_server_stop_co(s->server);
    for (size_t i = 0; i < s->ndisks; i++)
        s->disks[i].d.export = NULL;
    nbd_server_free(s->server);
    vhost_server_stop_co(s->vhost);
    serve_remove_socket(s);
}

static int serve_run_co(struct verb_ctx *ctx) {
    struct serve s = {.ctx = ctx, .a = ctx->args, .task = task_self(), .uris = STRBUF_INIT};
    s.a->access_fd = -1;
    /* From here on a signal is an orderly end, also while the image is being opened. */
    for (size_t i = 0; i < sizeof(stop_signals) / sizeof(*stop_signals); i++)
        loop_on_signal(ctx->loop, stop_signals[i], on_signal, &s);
    int rc = serve_open_disks_co(&s);
    if (rc == 0)
        rc = start(&s);
    if (rc == 0)
        serve_until_stopped_co(&s);
    end_server_co(&s);
    if (rc == 0)
        rc = serve_finish_disks_co(&s);
    serve_close_disks_co(&s);
    if (s.pid_written)
        unlink(s.a->pid_file);
    if (s.a->access_fd >= 0)
        close(s.a->access_fd);
    for (size_t i = 0; i < sizeof(stop_signals) / sizeof(*stop_signals); i++) {
        signal(stop_signals[i], SIG_IGN); /* one that comes now asks for what is done already */
        loop_off_signal(ctx->loop, stop_signals[i]);
    }
    strbuf_free(&s.uris);
    return rc;
}

static const char *const details[] = {
    "Serves FILE over the NBD protocol until the last client has left (with --persistent: until a "
    "signal), first printing the URI that clients connect to. SIGTERM, SIGINT and SIGHUP end it in "
    "order: requests in flight are finished, everything is flushed, socket and pid file are removed.",
    "Several exports are given as NAME=FILE each; all options hold for all of them, and a URI is "
    "printed for each.  A client that asks for no name gets the one of --default, else the first.",
    "Without --socket it listens on TCP port 10809 of the loopback address only. Started by a "
    "systemd socket unit it serves the sockets that it was given.",
    "With --snapshot the image is opened read-only and never changed; writes go to an unnamed file "
    "(with --scratch memory:SIZE to memory) whose space is free again when the server ends, however "
    "it ends.  With --control, strata ctl commits, keeps or drops what was written, meanwhile.",
    "The folder of --tls holds ca-cert.pem, server-cert.pem, server-key.pem and perhaps ca-crl.pem; "
    "clients need a certificate of that CA unless --tls-anyone is given.  The file of psk: has lines "
    "NAME:HEXKEY, as psktool writes them.",
    NULL};

static const struct cli_example examples[] = {
    {"strata serve -k /run/disk.sock disk.qcow2", "serve once, to whoever connects first"},
    {"strata serve --snapshot -t -k /run/disk.sock disk.qcow2",
     "throw-away copy: the image stays as it is"},
    {"strata serve -t -k /run/disks.sock root=root.qcow2 data=data.qcow2", "two exports"},
    {"strata serve -t --tls /etc/pki/nbd --tls-required -b 0.0.0.0 disk.qcow2",
     "over the network, to clients with a certificate"},
    {"strata serve --fork --pid-file /run/disk.pid -t -p 10809 -f raw disk.img",
     "in the background, over TCP"},
    {NULL, NULL}};

const struct verb verb_serve = {
    .name = "serve",
    .summary = "serve images to NBD clients",
    .synopsis = "FILE | NAME=FILE...",
    .pos_min = 1,
    .pos_max = -1,
    .opts = opts,
    .args_size = sizeof(struct serve_args),
    .details = details,
    .examples = examples,
    .prepare = serve_prepare,
    .run_co = serve_run_co,
};
