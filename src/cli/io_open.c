/* SPDX-License-Identifier: MIT */
/*
 * What disk a session works on: open, close, reopen.
 *
 * Facts: options and texts of qemu-io 7.2 and 10.0.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include "base/cleanup.h"
#include "base/err.h"
#include "base/opt.h"
#include "cli/dialect.h"
#include "cli/io_cmd.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "disk/overlay.h"

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
                 OPEN_SHARE_WRITE,
        .cache = o->cache            ? (enum cache_mode)cache_mode(o->cache)
                 : dialect_is_qemu() ? CACHE_WRITETHROUGH
                                     : CACHE_WRITEBACK,
        .gate = dialect_is_qemu() ? GATE_ANY : (enum gate)s->trust,
    };
    r = node_open_co(&req, &s->node, e);
    json_decref(tree);
    if (!r && o->snapshot) {
        struct node *base = s->node;
        r = overlay_create_co(base, NULL, &s->node, e);
        if (r)
            node_unref_co(base);
    }
    if (r < 0) {
        s->node = NULL;
        dialect_open_error(s->ctx, o->name ? o->name : "", o->format,
                           req.name ? "can't open device %s: " : "can't open: ");
        cli_print_error(s->ctx, e);
        err_clear(e);
        return r;
    }
    s->copy_on_read = o->copy_on_read;
    return 0;
}

/* Flushes and lets go of the disk; -errno when the flush failed. */
static int close_disk_co(struct io_session *s) {
    int r = 0;
    io_session_drain_co(s);
    if (s->node) {
        r = node_is_rw(s->node) ? disk_flush_co(s->node) : 0;
        node_unref_co(s->node);
    }
    s->node = NULL;
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

/* The options of reopen that can change on an open disk. */
static int reopen_options(struct io_session *s, json_t *tree, bool *rw, const struct io_args *a) {
    struct node *n = s->node;
    const char *key;
    json_t *value;
    json_object_foreach(tree, key, value) {
        const char *text = json_string_value(value);
        bool on = text && (!strcmp(text, "on") || !strcmp(text, "true"));
        if (!strcmp(key, "read-only")) {
            if (a->has['r'] || a->has['w']) {
                io_complain(s, "Cannot set both -r/-w and 'read-only'");
                return -EINVAL;
            }
            *rw = !on;
        } else if (!strcmp(key, "discard") && text) {
            bool unmap = !strcmp(text, "unmap") || on;
            n->flags = unmap ? n->flags | NODE_UNMAP : n->flags & ~(unsigned)NODE_UNMAP;
        } else if (!strcmp(key, "driver") && text && strcmp(text, n->drv->name)) {
            io_complain(s, "Cannot change the option 'driver'");
            return -EINVAL;
        } else if (strcmp(key, "driver")) {
            io_complain(s, "Cannot change the option '%s'", key);
            return -EINVAL;
        }
    }
    return 0;
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
    if (!r)
        r = reopen_options(s, tree, &rw, a);
    if (!r)
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
