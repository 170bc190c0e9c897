/* SPDX-License-Identifier: MIT */
/* Listening, one session after the other, and the end. */
#include "export/vhost/internal.h"

#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include "base/err.h"
#include "base/log.h"
#include "disk/node.h"
#include "runtime/loop.h"

static void serve(void *arg) {
    struct vhost_server *s = arg;
    s->task = task_self();
    if (s->o.connected) {
        s->fd = s->listen_fd;
        vhost_session_co(s);
        s->fd = -1;
    }
    while (!s->stopping && !s->o.connected) {
        struct sockaddr_storage peer;
        socklen_t len = sizeof(peer);
        int fd = loop_accept_co(s->listen_fd, &peer, &len);
        if (fd < 0) {
            if (fd == -ECANCELED || fd == -ECONNABORTED)
                continue;
            log_msg(LOG_LV_WARN, "vhost-user: accept: %s", strerror(-fd));
            loop_sleep_co(100000000); /* out of descriptors, say: it passes */
            continue;
        }
        s->fd = fd;
        vhost_session_co(s);
        close(fd);
        s->fd = -1;
        if (!s->stopping && s->o.on_idle)
            s->o.on_idle(s->o.arg);
    }
    s->ended = true;
    s->task = NULL;
    if (s->stopper)
        task_wake(s->stopper);
}

/* ---------------------------------------------------------------- operations of export.h */

static struct vhost_server *of(const struct export *x) {
    return (struct vhost_server *)x;
}

static unsigned export_users(const struct export *x) {
    return of(x)->fd >= 0;
}

static void export_pause_co(struct export *x) {
    vhost_hold_all_co(of(x));
}

static void export_resume(struct export *x) {
    vhost_release_all(of(x));
}

static json_t *export_describe(const struct export *x) {
    const struct vhost_server *s = of(x);
    return json_pack("{s:s, s:s, s:b, s:i, s:I, s:I, s:I, s:I}", "type", x->ops->type, "name",
                     x->name, "read-only", x->read_only, "clients", (int)export_users(x),
                     "requests", (json_int_t)s->requests, "bytes-read", (json_int_t)s->bytes_read,
                     "bytes-written", (json_int_t)s->bytes_written, "errors",
                     (json_int_t)s->errors);
}

static int export_remove_co(struct export *x, bool hard, struct err *e) {
    if (export_users(x) && !hard)
        return err_set(e, EBUSY, "export '%s' has a client", x->name);
    vhost_server_stop_co(of(x));
    return 0;
}

static const struct export_ops vhost_export_ops = {
    .type = "vhost-user-blk",
    .users = export_users,
    .pause_co = export_pause_co,
    .resume = export_resume,
    .describe = export_describe,
    .remove_co = export_remove_co,
};

struct export *vhost_server_export(struct vhost_server *s) {
    return &s->base;
}

/* ---------------------------------------------------------------- begin and end */

int vhost_server_new(struct loop *loop, int fd, const struct vhost_server_opts *o,
                     struct vhost_server **out, struct err *e) {
    struct vhost_server *s = calloc(1, sizeof(*s));
    struct vhost_queue *queues = s ? calloc(o->queues, sizeof(*queues)) : NULL;
    char *serial = queues && o->serial ? strdup(o->serial) : NULL;
    char *name = queues ? strdup(o->name ? o->name : "") : NULL;
    if (!name || (o->serial && !serial)) {
        free(name);
        free(serial);
        free(queues);
        free(s);
        close(fd);
        return err_set(e, ENOMEM, "no memory for %u queues", o->queues);
    }
    *s = (struct vhost_server){.base = {&vhost_export_ops, name, o->node, o->read_only},
                               .loop = loop,
                               .o = *o,
                               .listen_fd = fd,
                               .fd = -1,
                               .serial = serial,
                               .capacity = o->node->size / 512,
                               .writeback = true,
                               .queue = queues};
    s->o.serial = serial;
    task_sem_init(&s->room, REQUESTS_MAX);
    for (unsigned i = 0; i < o->queues; i++) {
        struct vhost_queue *q = &queues[i];
        q->s = s;
        q->index = i;
        q->kick = q->call = q->error = -1;
        waitq_init(&q->quiet);
    }
    task_spawn(loop, serve, s);
    *out = s;
    return 0;
}

void vhost_server_stop_co(struct vhost_server *s) {
    if (!s)
        return;
    s->stopping = true;
    s->stopper = task_self();
    while (!s->ended) {
        loop_cancel_fd(s->loop, s->listen_fd);
        if (s->fd >= 0)
            loop_cancel_fd(s->loop, s->fd);
        task_park_co();
    }
    close(s->listen_fd);
    vhost_queue_forget(s);
    free(s->base.name);
    free(s->serial);
    free(s->queue);
    free(s);
}
