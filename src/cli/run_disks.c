/* SPDX-License-Identifier: MIT */
/*
 * strata run: disks, from the file to the socket that QEMU inherits, and back.
 *
 * Invariant: with --snapshot and --stateless the base is open read-only until a commit.
 *
 * A stateless overlay is a temporary snapshot whose file has a name from the start.  It is made
 * without one in the folder of that name, completed (header, base's name) and linked, so whoever
 * sees the file sees a whole image; the janitor knows it from then on.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>
#include <sys/socket.h>
#include "base/bytes.h"
#include "cli/run.h"
#include "disk/node.h"
#include "disk/open.h"
#include "disk/overlay.h"
#include "export/nbd/server.h"
#include "export/vhost/server.h"
#include "job/fat_commit.h"

/* QEMU says hello as soon as it runs; on a loaded machine that may take a while. */
#define HANDSHAKE_NS 60000000000LL

unsigned run_queues(const struct run_args *a) {
    return a->smp < VHOST_QUEUES_MAX ? (unsigned)a->smp : VHOST_QUEUES_MAX;
}

bool run_by_vhost(const struct run_args *a, const struct run_disk *d) {
    return a->transport == VM_TRANSPORT_VHOST_USER && !d->cdrom;
}

static int start_vhost(struct run *r, struct run_disk *d, int fd) {
    struct vhost_server_opts o = {.name = d->name,
                                  .node = d->d.node,
                                  .read_only = d->mode == RUN_RO,
                                  .queues = run_queues(r->a),
                                  .block_size = 512,
                                  .connected = true};
    int ret = vhost_server_new(r->ctx->loop, fd, &o, &d->vhost, &r->ctx->err);
    if (ret == 0)
        d->d.export = vhost_server_export(d->vhost);
    return ret;
}

static int start_nbd(struct run *r, struct run_disk *d, int fd) {
    struct nbd_server_opts so = {.max_clients = 1, .handshake_timeout_ns = HANDSHAKE_NS};
    struct nbd_export_opts x = {.name = "", .node = d->d.node, .read_only = d->mode == RUN_RO};
    int ret = nbd_server_new(r->ctx->loop, &so, &d->server, &r->ctx->err);
    if (ret == 0)
        ret = nbd_server_add(d->server, &x, &d->d.export, &r->ctx->err);
    if (ret < 0) {
        close(fd);
        return ret;
    }
    return nbd_server_attach(d->server, fd, &r->ctx->err);
}

static int layer_co(struct run *r, struct run_disk *d) {
    const struct run_args *a = r->a;
    struct err *e = &r->ctx->err;
    bool named = d->mode == RUN_STATELESS;
    int ret = a->commit && fat_commit_is_for(d->d.node) ? fat_commit_check(d->d.node, e) : 0;
    if (ret < 0)
        return ret;
    d->d.scratch = (struct overlay_opts){named ? d->overlay_dir : a->scratch, a->scratch_size};
    ret = control_disk_snapshot_co(&d->d, e);
    if (ret < 0 || !named)
        return ret;
    ret = overlay_keep_co(d->d.node, d->overlay, false, e);
    if (ret < 0)
        return err_prefix(e, "--stateless");
    ret = janitor_add(&r->a->janitor, &d->overlay_file, d->overlay);
    return ret < 0 ? err_errno(e, -ret, "--stateless %s", d->overlay) : 0;
}

int run_open_disk_co(struct run *r, unsigned i) {
    struct verb_ctx *ctx = r->ctx;
    const struct run_args *a = r->a;
    struct run_disk *d = &r->disks[i];
    struct cli_image image = a->image;
    unsigned flags = d->mode == RUN_WRITE ? OPEN_RW | OPEN_UNMAP : OPEN_UNMAP;
    int fds[2], ret;

    d->d.name = d->cdrom ? xstrdup("cdrom") : xasprintf("disk%u", i);
    r->control_disks[i] = &d->d;
    if (d->cdrom)
        image = (struct cli_image){.format = "raw", .cache = a->image.cache};
    ret = cli_open_co(ctx, d->name, &image, flags, &d->d.node);
    if (ret == 0 && run_temporary(d))
        ret = layer_co(r, d);
    if (ret < 0)
        return ret;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) < 0)
        return err_errno(&ctx->err, errno, "cannot make a socket pair");
    d->guest_fd = fds[1];
    fcntl(fds[0], F_SETFL, O_NONBLOCK); /* of our end only: each has its own flags */
    return run_by_vhost(a, d) ? start_vhost(r, d, fds[0]) : start_nbd(r, d, fds[0]);
}

void run_stop_servers_co(struct run *r) {
    control_stop_co(r->control);
    r->control = NULL;
    for (unsigned i = 0; i < r->ndisks; i++) {
        struct run_disk *d = &r->disks[i];
        if (d->guest_fd >= 0)
            close(d->guest_fd);
        d->guest_fd = -1;
        if (d->server) {
            nbd_server_stop_co(d->server);
            d->d.export = NULL;
            nbd_server_free(d->server);
        }
        d->server = NULL;
        if (d->vhost) {
            vhost_server_stop_co(d->vhost);
            d->d.export = NULL;
        }
        d->vhost = NULL;
    }
}

void run_close_disks_co(struct run *r) {
    run_stop_servers_co(r);
    for (unsigned i = 0; i < r->ndisks; i++) {
        struct run_disk *d = &r->disks[i];
        control_disk_close_co(&d->d);
        janitor_remove(&d->overlay_file); /* released when it is to stay */
        free(d->overlay_dir);
        free(d->name);
    }
}
