/* SPDX-License-Identifier: MIT */
/*
 * What disk a session works on: open, close, reopen.
 *
 * Facts: options and texts of qemu-io 7.2 and 10.0.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/cleanup.h"
#include "base/err.h"
#include "base/opt.h"
#include "cli/dialect.h"
#include "cli/io_cmd.h"
#include "disk/event.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "disk/overlay.h"
#include "runtime/loop.h"

/* -1: no such mode. */
static int cache_mode(const char *text) {
    if (!strcmp(text, "off"))
        return CACHE_NONE;
    return cache_parse(text, NULL);
}

static bool is_one_of(const char *text, const char *const *names) {
    for (; *names; names++)
        if (!strcmp(*names, text))
            return true;
    return false;
}

int io_open_modes(const struct io_session *s, const struct io_open *o) {
    static const char *const discards[] = {"unmap", "ignore", "on", "off", NULL};
    static const char *const aios[] = {"threads", "native", "io_uring", NULL};
    if (o->cache && cache_mode(o->cache) < 0)
        io_complain(s, "Invalid cache option: %s", o->cache);
    else if (o->discard && !is_one_of(o->discard, discards))
        io_complain(s, "Invalid discard option: %s", o->discard);
    else if (o->aio && !is_one_of(o->aio, aios))
        io_complain(s, "Invalid aio option: %s", o->aio);
    else
        return 0;
    return -EINVAL;
}

/* What -o and the name under --image-opts say, as one tree; NULL when they say nothing. */
static int options_tree(struct io_session *s, const struct io_open *o, json_t **out) {
    struct err *e = &s->ctx->err;
    int r = 0;
    *out = NULL;
    for (int i = 0; !r && i < o->options_n; i++)
        r = opt_parse_keyval(o->options[i], NULL, out, e);
    if (!r && s->image_opts && o->name)
        r = opt_parse_keyval(o->name, NULL, out, e);
    if (r < 0) {
        cli_print_error(s->ctx, e);
        err_clear(e);
        json_decref(*out);
        *out = NULL;
    }
    return r;
}

static void forget_opened(struct io_session *s) {
    free(s->opened.name);
    free(s->opened.format);
    json_decref(s->opened.tree);
    s->opened.name = s->opened.format = NULL;
    s->opened.tree = NULL;
}

/* Puts copy-on-read on top. */
static int keep_reads_co(struct io_session *s, const struct open_req *req) {
    struct node *top;
    struct open_req over = {.flags = req->flags, .cache = req->cache, .gate = req->gate};
    int r =
        req->flags & OPEN_RW
            ? node_open_on_co(s->node, driver_find("copy-on-read"), NULL, &over, &top, &s->ctx->err)
            : err_set(&s->ctx->err, EINVAL, "Can't use copy-on-read on read-only device");
    if (r)
        node_unref_co(s->node);
    else
        s->node = top;
    return r;
}

/* For messages, where only options name the file. */
static const char *shown_name(const struct io_open *o, const json_t *tree) {
    const char *name = o->name ? o->name : json_string_value(json_object_get(tree, "filename"));
    return name ? name : "";
}

int io_open_co(struct io_session *s, const struct io_open *o) {
    struct err *e = &s->ctx->err;
    json_t *tree;
    if (s->node) {
        io_complain(s, "file open already, try 'help close'");
        return -EINVAL;
    }
    int r = io_open_modes(s, o);
    if (r || (r = options_tree(s, o, &tree)))
        return r;
    const char *unmap = o->discard ? o->discard : "unmap";
    bool rw = !o->read_only && !o->snapshot && !o->force_share;
    struct open_req req = {
        .name = s->image_opts ? NULL : o->name,
        .options = tree,
        .format = o->format,
        .flags = (rw ? OPEN_RW : 0) | (o->force_share ? OPEN_FORCE_SHARE : 0) |
                 (!strcmp(unmap, "unmap") || !strcmp(unmap, "on") ? OPEN_UNMAP : 0) |
                 (dialect_is_qemu() ? OPEN_SHARE_WRITE | OPEN_SECTORS : 0),
        .cache = o->cache            ? (enum cache_mode)cache_mode(o->cache)
                 : dialect_is_qemu() ? CACHE_WRITETHROUGH
                                     : CACHE_WRITEBACK,
        .gate = dialect_is_qemu() ? GATE_ANY : (enum gate)s->trust,
    };
    r = node_open_co(&req, &s->node, e);
    forget_opened(s);
    s->opened.name = req.name ? xstrdup(req.name) : NULL;
    s->opened.format = req.format ? xstrdup(req.format) : NULL;
    s->opened.req = req;
    s->opened.req.name = s->opened.name;
    s->opened.req.format = s->opened.format;
    s->opened.tree = tree;
    if (!r && o->copy_on_read)
        r = keep_reads_co(s, &req);
    if (!r && o->snapshot) {
        struct node *base = s->node;
        r = overlay_create_co(base, NULL, &s->node, e);
        if (r)
            node_unref_co(base);
    }
    if (r < 0) {
        s->node = NULL;
        dialect_open_error(s->ctx, shown_name(o, req.options), o->format,
                           req.name ? "can't open device %s: " : "can't open: ");
        cli_print_error(s->ctx, e);
        err_clear(e);
        forget_opened(s);
        return r;
    }
    if (rw)
        dialect_warn_guessed(s->ctx, s->node);
    return 0;
}

/* Flushes and lets go of the disk; -errno when the flush failed. */
static int close_disk_co(struct io_session *s) {
    int r = 0;
    struct node *debug = disk_debug_node(s->node);
    /* Nobody else would let go those that stand at a breakpoint. */
    while (debug && s->in_flight) {
        debug->drv->debug->resume(debug, NULL);
        loop_sleep_co(1000000);
    }
    io_session_drain_co(s);
    if (s->node) {
        r = node_is_rw(s->node) ? disk_flush_co(s->node) : 0;
        node_unref_co(s->node);
    }
    s->node = NULL;
    forget_opened(s);
    return r;
}

int io_session_end_co(struct io_session *s) {
    int r = close_disk_co(s);
    /* That program does not look at how the last flush went. */
    if (r < 0 && !dialect_is_qemu())
        return err_errno(&s->ctx->err, -r, "flushing");
    return s->failed;
}

int io_close_co(struct io_session *s, const struct io_args *a) {
    close_disk_co(s);
    return 0;
}

int io_open_command_co(struct io_session *s, const struct io_args *a) {
    struct io_open o = {
        .name = a->pos_n ? a->pos[0] : NULL,
        .cache = a->val['t']   ? a->val['t']
                 : a->has['n'] ? "none"
                               : NULL,
        .discard = a->val['d'],
        .aio = a->val['i'],
        .read_only = a->has['r'],
        .snapshot = a->has['s'],
        .copy_on_read = a->has['C'],
        .force_share = a->has['U'],
        .options = a->list,
        .options_n = a->list_n,
    };
    if (a->list_n && s->image_opts) {
        puts("--image-opts and 'open -o' are mutually exclusive");
        return -EINVAL;
    }
    return io_open_co(s, &o);
}

/* ---------------------------------------------------------------- reopening */

static int expects_switch(const struct io_session *s, const json_t *group, const char *prefix,
                          const char *key) {
    static const char *const words[] = {"on", "off", "true", "false", "yes", "no", NULL};
    const json_t *v = json_object_get(group, key);
    if (!v || json_is_boolean(v) || (json_is_string(v) && is_one_of(json_string_value(v), words)))
        return 0;
    io_complain(s, "Parameter '%s%s' expects 'on' or 'off'", prefix, key);
    return -EINVAL;
}

/* Names and drivers stay; what only repeats them is taken out of `group`. */
static int keeps_identity(const struct io_session *s, const struct node *n, json_t *group) {
    const char *name = json_string_value(json_object_get(group, "node-name"));
    const char *driver = json_string_value(json_object_get(group, "driver"));
    if (n && name && strcmp(name, n->name)) {
        io_complain(s, "Cannot change the option 'node-name'");
        return -EINVAL;
    }
    if (n && driver && strcmp(driver, n->drv->name)) {
        io_complain(s, "Cannot change the option 'driver'");
        return -EINVAL;
    }
    json_object_del(group, "node-name");
    json_object_del(group, "driver");
    return 0;
}

static int check_reopen(const struct io_session *s, const struct io_args *a, json_t *tree) {
    json_t *cache = json_object_get(tree, "cache");
    const json_t *ro = json_object_get(tree, "read-only");
    if (ro && (a->has['r'] || a->has['w'])) {
        io_complain(s, "Cannot set both -r/-w and 'read-only'");
        return -EINVAL;
    }
    if (cache && a->val['c']) {
        io_complain(s, "Cannot set both -c and the cache options");
        return -EINVAL;
    }
    int r = expects_switch(s, tree, "", "read-only");
    if (!r)
        r = expects_switch(s, cache, "cache.", "no-flush");
    if (!r)
        r = expects_switch(s, cache, "cache.", "direct");
    if (!r)
        r = expects_switch(s, tree, "", "auto-read-only");
    if (!r)
        r = keeps_identity(s, s->node, tree);
    static const char *const children[] = {"file", "backing"};
    for (int i = 0; !r && i < 2; i++) {
        json_t *child = json_object_get(tree, children[i]);
        if (!json_is_object(child))
            continue;
        r = keeps_identity(s, i ? s->node->backing : s->node->file, child);
        if (!json_object_size(child))
            json_object_del(tree, children[i]);
    }
    return r;
}

/*
 * Other options than those that change on an open disk: it is closed and opened with them; when
 * that fails, as it was.
 */
static int open_again_co(struct io_session *s, const json_t *add, struct err *e) {
    json_t *before = s->opened.tree ? json_deep_copy(s->opened.tree) : json_object();
    json_t *tree = json_deep_copy(before);
    json_object_update_recursive(tree, (json_t *)add);
    int r = disk_flush_co(s->node);
    if (r == 0) {
        node_unref_co(s->node);
        struct open_req req = s->opened.req;
        req.options = tree;
        r = node_open_co(&req, &s->node, e);
        if (r == 0) {
            json_decref(s->opened.tree);
            s->opened.tree = json_incref(tree);
        } else {
            req.options = before;
            if (node_open_co(&req, &s->node, NULL) < 0)
                s->node = NULL;
        }
    } else {
        err_errno(e, -r, "flushing");
    }
    json_decref(tree);
    json_decref(before);
    return r;
}

int io_reopen_co(struct io_session *s, const struct io_args *a) {
    struct err e AUTO_ERR = ERR_INIT;
    json_t *tree = NULL;
    int mode = a->val['c'] ? cache_mode(a->val['c']) : 0, r = 0;
    if (a->has['r'] && a->has['w']) {
        io_complain(s, "Only one -r/-w option may be given");
        return -EINVAL;
    }
    if (mode < 0) {
        io_complain(s, "Invalid cache option: %s", a->val['c']);
        return -EINVAL;
    }
    bool rw = a->has['r'] ? false : a->has['w'] ? true : node_is_rw(s->node);
    io_session_drain_co(s);
    for (int i = 0; !r && i < a->list_n; i++)
        r = opt_parse_keyval(a->list[i], NULL, &tree, &e);
    if (!r && tree)
        r = check_reopen(s, a, tree);
    if (!r && json_object_size(tree))
        r = open_again_co(s, tree, &e);
    else if (!r)
        r = node_reopen_co(s->node, rw, &e);
    if (!r && a->val['c']) {
        /* O_DIRECT belongs to the open file; it stays as it was. */
        unsigned mask = NODE_NO_FLUSH | NODE_WRITETHROUGH;
        s->node->flags = (s->node->flags & ~mask) | (cache_node_flags(mode) & mask);
    }
    json_decref(tree);
    if (e.code)
        cli_print_error(s->ctx, &e);
    return r;
}
