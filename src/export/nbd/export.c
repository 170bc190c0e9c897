/* SPDX-License-Identifier: MIT */
/*
 * The exports of a server: names, limits, clients, and the operations of export.h.
 *
 * Pausing.  A request enters an export after it has passed the limits (throttle) and before it
 * touches the node; export_pause_co raises `paused`, which stops newcomers, and waits for `active`
 * to reach zero.  Nothing else of the engine is stopped: jobs may work on the node meanwhile.
 */
#include "export/nbd/client.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include "base/cleanup.h"
#include "base/err.h"
#include "disk/bitmap.h"
#include "disk/node.h"

#define EXPORTS_MAX 1024

static struct nbd_export *of(const struct export *x) {
    return (struct nbd_export *)x;
}

struct nbd_export *nbd_export_find(struct nbd_server *s, struct nbd_name name) {
    if (name.len == 0 && s->first)
        return s->first;
    list_for_each(it, &s->exports) {
        struct nbd_export *x = list_entry(it, struct nbd_export, link);
        if (!x->gone && nbd_name_is(name, x->base.name))
            return x;
    }
    return NULL;
}

void nbd_export_free(struct nbd_export *x) {
    for (unsigned i = 0; i < x->nbitmaps; i++)
        x->bitmaps[i]->exported--;
    list_remove(&x->link);
    free(x->base.name);
    free(x->description);
    free(x->bitmaps);
    free(x);
}

bool nbd_export_enter(struct nbd_export *x, struct nbd_client *c, const char **why) {
    if (x->gone || (x->share && x->clients >= x->share)) {
        *why = x->gone ? "the export is being taken away"
                       : "as many clients as may use this export do so already";
        return false;
    }
    c->x = x;
    x->clients++;
    return true;
}

void nbd_export_leave(struct nbd_export *x) {
    x->clients--;
    waitq_wake_all(&x->changed);
}

/* ---------------------------------------------------------------- operations */

static unsigned export_users(const struct export *b) {
    return of(b)->clients;
}

static void export_pause_co(struct export *b) {
    struct nbd_export *x = of(b);
    x->paused++;
    while (x->active)
        waitq_wait_co(&x->changed);
}

static void export_resume(struct export *b) {
    struct nbd_export *x = of(b);
    if (--x->paused == 0)
        waitq_wake_all(&x->changed);
}

static json_t *export_describe(const struct export *b) {
    const struct nbd_export *x = of(b);
    return json_pack("{s:s, s:s, s:b, s:i, s:I, s:I, s:I, s:I}", "type", "nbd", "name", b->name,
                     "read-only", b->read_only, "clients", (int)x->clients, "requests",
                     (json_int_t)x->total_requests, "bytes-read", (json_int_t)x->total_read,
                     "bytes-written", (json_int_t)x->total_written, "errors",
                     (json_int_t)x->total_errors);
}

static int export_remove_co(struct export *b, bool hard, struct err *e) {
    struct nbd_export *x = of(b);
    if (x->clients && !hard)
        return err_set(e, EBUSY, "export '%s' has %u client%s", b->name, x->clients,
                       x->clients == 1 ? "" : "s");
    x->gone = true;
    if (x->s->first == x)
        x->s->first = NULL;
    list_for_each(it, &x->s->clients) {
        struct nbd_client *c = list_entry(it, struct nbd_client, link);
        if (c->contexts_of == x)
            c->contexts_of = NULL;
        if (c->x != x)
            continue;
        c->closing = true;
        shutdown(c->fd, SHUT_RD);
    }
    throttle_open(&x->bytes);
    throttle_open(&x->requests);
    while (x->clients)
        waitq_wait_co(&x->changed);
    nbd_export_free(x);
    return 0;
}

static const struct export_ops nbd_export_ops = {
    .type = "nbd",
    .users = export_users,
    .pause_co = export_pause_co,
    .resume = export_resume,
    .describe = export_describe,
    .remove_co = export_remove_co,
};

/* ---------------------------------------------------------------- adding */

static int check_opts(struct nbd_server *s, const struct nbd_export_opts *o, const char *name,
                      struct err *e) {
    struct nbd_name n = {name, (uint32_t)strnlen(name, NBD_STRING_MAX + 1)};
    struct nbd_name d = {
        o->description, o->description ? (uint32_t)strnlen(o->description, NBD_STRING_MAX + 1) : 0};
    if (!nbd_name_valid(n) || !nbd_name_valid(d))
        return err_set(e, EINVAL,
                       "%s: the NBD protocol wants UTF-8 text of at most %u bytes, without NUL",
                       nbd_name_valid(n) ? "description" : "export name", NBD_STRING_MAX);
    if (o->nbitmaps > NBD_CONTEXTS_MAX - NBD_CONTEXT_BITMAPS)
        return err_set(e, EFBIG, "%u bitmaps are more than the %u that one export can have",
                       o->nbitmaps, NBD_CONTEXTS_MAX - NBD_CONTEXT_BITMAPS);
    unsigned count = 0;
    list_for_each(it, &s->exports) {
        const struct nbd_export *x = list_entry(it, struct nbd_export, link);
        if (!strcmp(x->base.name, name))
            return err_set(e, EEXIST, "there are two exports of the name '%s'", name);
        count++;
    }
    if (count >= EXPORTS_MAX)
        return err_set(e, EFBIG, "more than %d exports", EXPORTS_MAX);
    return 0;
}

int nbd_server_add(struct nbd_server *s, const struct nbd_export_opts *o, struct export **out,
                   struct err *e) {
    const char *name = o->name ? o->name : "";
    int r = check_opts(s, o, name, e);
    if (r < 0)
        return r;
    struct nbd_export *x = xcalloc(1, sizeof(*x));
    x->base = (struct export){.ops = &nbd_export_ops,
                              .name = xstrdup(name),
                              .node = o->node,
                              .read_only = o->read_only || !node_is_rw(o->node)};
    x->s = s;
    x->description = o->description ? xstrdup(o->description) : NULL;
    x->allocation_depth = o->allocation_depth;
    x->share = o->share;
    x->nbitmaps = o->nbitmaps;
    x->bitmaps = xcalloc(x->nbitmaps + 1, sizeof(*x->bitmaps));
    for (unsigned i = 0; i < x->nbitmaps; i++) {
        x->bitmaps[i] = o->bitmaps[i];
        x->bitmaps[i]->exported++;
    }
    waitq_init(&x->changed);
    throttle_init(&x->bytes, o->bytes, o->bytes_burst);
    throttle_init(&x->requests, o->requests, o->requests_burst);
    list_push_back(&s->exports, &x->link);
    if (!s->first)
        s->first = x;
    if (out)
        *out = &x->base;
    return 0;
}

int nbd_server_set_default(struct nbd_server *s, const char *name, struct err *e) {
    list_for_each(it, &s->exports) {
        struct nbd_export *x = list_entry(it, struct nbd_export, link);
        if (!strcmp(x->base.name, name)) {
            s->first = x;
            return 0;
        }
    }
    return err_set(e, ENOENT, "no export has the name '%s'", name);
}
