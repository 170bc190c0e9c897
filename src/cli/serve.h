/* SPDX-License-Identifier: MIT */
/* What the parts of `strata serve` share: verb_serve.c, serve_disks.c, serve_listen.c. */
#ifndef STRATA_CLI_SERVE_H
#define STRATA_CLI_SERVE_H

#include <sys/stat.h>
#include "base/strbuf.h"
#include "cli/cli.h"
#include "control/disk.h"

#define PORT_DEFAULT 10809
#define VSOCK_NONE UINT64_MAX

struct serve_args {
    struct cli_image image;
    const char *load_snapshot, *socket, *bind, *name, *description, *pid_file, *scratch, *keep,
        *default_name, *control, *access_log, *tls, *tls_priority, *vhost_user, *serial;
    uint64_t port, vsock, scratch_size, share, max_connections, offset, handshake_s, idle_s;
    uint64_t bandwidth, bandwidth_burst, iops, iops_burst, queues, block_size;
    int discard, detect_zeroes;
    bool snapshot, commit, read_only, fork, persistent, verbose, depth, tls_required, tls_anyone;
    struct cli_list bitmaps;
    /* From prepare to run. */
    int status_fd, activated_fd, activated_n, access_fd;
};

struct bitmap;
struct control;
struct nbd_server;
struct vhost_server;
struct task;

struct serve_disk {
    struct control_disk d;
    const char *file; /* as named on the command line; borrowed */
    struct bitmap **bitmaps;
    unsigned nbitmaps;
};

struct serve {
    struct verb_ctx *ctx;
    struct serve_args *a;
    struct serve_disk *disks;
    struct control_disk **control_disks;
    size_t ndisks;
    struct nbd_server *server;
    struct vhost_server *vhost; /* instead of it */
    struct control *control;
    struct task *task;
    bool stop;
    struct strbuf uris;
    char *socket_path; /* ours, to be removed; NULL none */
    struct stat socket_stat;
    bool pid_written;
};

/* serve_disks.c: what the positional arguments name, opened; errors in ctx->err. */
int serve_open_disks_co(struct serve *s);
/* Writes home what must not be lost, disk by disk; an error of one does not stop the others. */
int serve_finish_disks_co(struct serve *s);
void serve_close_disks_co(struct serve *s);

/* serve_listen.c: sockets, and the lines that say where they are. */
int serve_listen(struct serve *s);
/* The last client has gone; `arg` is the struct serve. */
void serve_on_idle(void *arg);
/* --vhost-user: the server and its socket at once. */
int serve_vhost(struct serve *s);
/* Only our own socket file: somebody may have put another in its place meanwhile. */
void serve_remove_socket(struct serve *s);

#endif
