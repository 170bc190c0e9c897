/* SPDX-License-Identifier: MIT */
/*
 * Opening a graph: names and options become one tree, the tree becomes nodes.
 *
 * Every name is first written as a tree ("a.qcow2" is {"file": {"driver": "file", "filename":
 * "a.qcow2"}}); the user's options are laid over it; then nodes are opened from the root down, each
 * driver asking for its children with node_open_child_co().
 *
 * Invariants
 *  1. A node gets its permissions before its driver opens, by its role (locking.md): children that
 * hold metadata are not shared with writers, raw children pass on what their parent has.
 *  2. A name that comes from an image passes gate_check() before anything touches it; a tree given
 * by the user does not.
 *  3. The chain is finite: no image twice (by device and inode), at most GRAPH_DEPTH_MAX layers.
 */
#include "disk/open.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "base/cleanup.h"
#include "base/err.h"
#include "base/strbuf.h"
#include "disk/engine.h"
#include "runtime/task.h"

struct open_ctx {
    const struct open_ctx *parent; /* whose child is being opened; NULL at the root */
    const struct open_req *req;
    const json_t *tree; /* options of the node being opened */
    struct node *preset_file;
    unsigned depth, file_depth;
    bool has_id; /* dev and ino below are those of this image's file */
    dev_t dev;
    ino_t ino;
};

const json_t *open_ctx_tree(const struct open_ctx *ctx) {
    return ctx->tree;
}

/* ---- nodes ---- */

struct node_want {
    unsigned role, flags, perm, shared;
};

static int open_tree_co(const json_t *tree, const struct open_ctx *parent,
                        const struct open_req *req, const struct node_want *want,
                        struct node *preset_file, struct node **out, struct err *e);

static int check_loop(struct open_ctx *ctx, struct err *e) {
    const json_t *file = json_object_get(ctx->tree, "file");
    const char *drv = tree_str(file, "driver"), *name = tree_str(file, "filename");
    struct stat st;
    if (!name || (drv && strcmp(drv, "file")) || stat(name, &st) < 0)
        return 0; /* what cannot be looked at will fail, or not, when it is opened */
    ctx->has_id = true;
    ctx->dev = st.st_dev;
    ctx->ino = st.st_ino;
    for (const struct open_ctx *c = ctx->parent; c; c = c->parent)
        if (c->has_id && c->dev == st.st_dev && c->ino == st.st_ino)
            return err_set(e, ELOOP, "the backing chain comes back to '%s'", name);
    return 0;
}

/* Opens the file below without locks or write permission, only to look at its first bytes. */
static int probe_tree_co(const json_t *tree, const struct open_ctx *ctx, unsigned flags,
                         const struct driver **drv, bool *guessed, struct err *e) {
    AUTO_JSON json_t *sub = NULL;
    const json_t *value = json_object_get(tree, "file");
    if (!value)
        return err_set(e, EINVAL, "no file was named: give 'filename' or 'file.filename'");
    int r = tree_from_child(value, true, &sub, e);
    if (r < 0)
        return r;
    struct node_want want = {.role = CHILD_FILE_RAW,
                             .flags = (flags & ~NODE_RW) | NODE_NO_LOCK,
                             .perm = PERM_CONSISTENT_READ,
                             .shared = PERM_ALL};
    struct node *file = NULL;
    r = tree_set(sub, "read-only", json_true(), e);
    if (r < 0)
        return r;
    r = open_tree_co(sub, ctx, ctx->req, &want, NULL, &file, e);
    if (r < 0)
        return r;
    int score;
    r = disk_probe_co(file, drv, &score, e);
    *guessed = score == 0;
    node_unref_co(file);
    return r;
}

static const struct driver *nearest_driver(const char *name) {
    const struct driver *best = NULL;
    unsigned best_d = 3;
    for (const struct driver *const *d = driver_table; *d; d++) {
        unsigned dist = str_distance(name, (*d)->name);
        if (dist < best_d) {
            best_d = dist;
            best = *d;
        }
    }
    return best;
}

static int find_driver(const char *name, const struct driver **out, struct err *e) {
    *out = driver_find(name);
    if (*out)
        return 0;
    const struct driver *near = nearest_driver(name);
    err_set(e, ENOTSUP, "unknown driver or format '%s'", name);
    if (near)
        err_hint(e, "did you mean '%s'?", near->name);
    return -ENOTSUP;
}

static int open_driver_co(const struct driver *drv, struct open_ctx *ctx,
                          const struct node_want *want, unsigned flags, struct node **out,
                          struct err *e) {
    struct node *n = node_new(drv);
    const char *name = tree_str(ctx->tree, "node-name");
    int r = 0;
    n->flags = flags;
    n->role = want->role;
    n->perm = want->perm & (flags & NODE_RW ? PERM_ALL : PERM_CONSISTENT_READ);
    n->shared = want->shared;
    n->filename = tree_display_name(ctx->tree);
    if (name) {
        free(n->name);
        n->name = xstrdup(name);
    }
    if (drv->opts)
        r = opt_fill(drv->opts, ctx->tree, OPT_OPEN, core_keys, n->opts, e);
    if (r < 0)
        free(steal(&n->opts)); /* nothing in it to free */
    else
        r = drv->open_co(n, ctx, e);
    if (r < 0) {
        node_destroy_co(n);
        return r;
    }
    if (n->filename && !strncmp(n->filename, "json:", 5) && n->file && n->file->filename &&
        tree_is_plain(ctx->tree) && strncmp(n->file->filename, "json:", 5)) {
        free(n->filename);
        n->filename = xstrdup(n->file->filename);
    }
    *out = n;
    return 0;
}

static int open_tree_co(const json_t *tree_in, const struct open_ctx *parent,
                        const struct open_req *req, const struct node_want *want,
                        struct node *preset_file, struct node **out, struct err *e) {
    AUTO_JSON json_t *tree = json_deep_copy(tree_in);
    if (!tree)
        return err_set(e, ENOMEM, "no memory for options");
    struct open_ctx ctx = {.parent = parent, .req = req, .tree = tree, .preset_file = preset_file};
    ctx.depth = parent ? parent->depth + (want->role == CHILD_BACKING) : 0;
    ctx.file_depth = !parent || want->role == CHILD_BACKING ? 0 : parent->file_depth + 1;
    if (ctx.depth >= GRAPH_DEPTH_MAX)
        return err_set(e, ELOOP, "the backing chain is longer than %d images", GRAPH_DEPTH_MAX);
    if (ctx.file_depth > GRAPH_FILE_DEPTH_MAX)
        return err_set(e, ELOOP, "more than %d nodes on top of one file", GRAPH_FILE_DEPTH_MAX);

    unsigned flags = want->flags;
    int r = tree_node_flags(tree, &flags, e);
    if (r < 0)
        return r;
    const struct driver *drv = NULL;
    const char *name = tree_str(tree, "driver");
    if (name && (r = find_driver(name, &drv, e)) < 0)
        return r;
    if ((!drv || !drv->storage) && (r = tree_lower_filename(tree, e)) < 0)
        return r;
    if (drv && drv->storage && (r = tree_raise_filename(tree, drv, e)) < 0)
        return r;
    if ((r = check_loop(&ctx, e)) < 0)
        return r;
    if (!drv) {
        bool guessed = false;
        r = probe_tree_co(tree, &ctx, flags, &drv, &guessed, e);
        if (r < 0)
            return r;
        flags |= guessed ? NODE_GUESSED : 0;
    }
    return open_driver_co(drv, &ctx, want, flags, out, e);
}

/* ---- children ---- */

static void child_want(const struct node *n, enum child_role role, struct node_want *w) {
    bool force = n->flags & NODE_FORCE_SHARE;
    w->role = role;
    w->flags = n->flags & ~(NODE_WRITETHROUGH | NODE_GUESSED | NODE_DETECT_ZEROES |
                            NODE_DETECT_UNMAP | NODE_CHECK);
    switch (role) {
    case CHILD_FILE_RAW:
        w->perm = n->perm;
        w->shared = n->shared;
        break;
    case CHILD_BACKING:
        w->flags &= ~(NODE_RW | NODE_NO_FLUSH);
        w->perm = PERM_CONSISTENT_READ;
        w->shared = PERM_CONSISTENT_READ | PERM_WRITE_UNCHANGED;
        break;
    default:
        w->perm = PERM_CONSISTENT_READ | (node_is_rw(n) ? PERM_WRITE | PERM_RESIZE : 0);
        w->shared = PERM_CONSISTENT_READ | PERM_WRITE_UNCHANGED;
    }
    if (force)
        w->shared = PERM_ALL;
}

int node_open_child_co(struct node *n, struct open_ctx *ctx, const char *key, enum child_role role,
                       struct node **out, struct err *e) {
    if (ctx->preset_file && !strcmp(key, "file")) {
        *out = steal(&ctx->preset_file);
        (*out)->role = role;
        return 0;
    }
    const json_t *value = json_object_get(ctx->tree, key);
    if (!value)
        return err_set(e, EINVAL, "option '%s' is missing: what lies below this %s node", key,
                       n->drv->name);
    AUTO_JSON json_t *tree = NULL;
    int r = tree_from_child(value, role != CHILD_BACKING, &tree, e);
    if (r < 0)
        return r;
    struct node_want want;
    child_want(n, role, &want);
    return open_tree_co(tree, ctx, ctx->req, &want, NULL, out, e);
}

/* The tree of the backing file that the image claims, once the gate has let it through. */
static int claimed_tree_co(struct node *n, struct open_ctx *ctx, const struct node_want *want,
                           json_t **out, struct err *e) {
    AUTO_FREE char *resolved = backing_resolve(n->filename, n->backing_name, e);
    if (!resolved)
        return err_status(e);
    int r = gate_check(ctx->req->gate, n->filename, resolved, n->backing_name, e);
    if (r < 0)
        return r;
    AUTO_JSON json_t *tree = NULL;
    if ((r = tree_from_name(resolved, &tree, e)) < 0)
        return r;
    const char *said = tree_str(json_object_get(ctx->tree, "backing"), "driver");
    if (said) {
        r = tree_set(tree, "driver", json_string_nocheck(said), e);
    } else if (n->backing_format) {
        /* The record is of the format; what it names must not be a way around the gate. */
        const struct driver *drv = driver_find(n->backing_format);
        if (!drv || !drv->format)
            return err_set(e, ENOTSUP, "its recorded format '%s' is unknown", n->backing_format);
        if (!json_object_get(tree, "driver"))
            r = tree_set(tree, "driver", json_string(drv->name), e);
    } else if (ctx->req->gate < GATE_LOCAL && !json_object_get(tree, "driver")) {
        const struct driver *drv;
        bool guessed;
        r = probe_tree_co(tree, ctx, want->flags, &drv, &guessed, e);
        if (r < 0)
            return r;
        if (!guessed) {
            err_set(e, EPERM, "the image does not record the format of '%s', which looks like %s",
                    n->backing_name, drv->name);
            err_hint(e, "a guest could have written that header; if it is meant, say so with "
                        "--trust local, or record the format in the image");
            return -EPERM;
        }
        r = tree_set(tree, "driver", json_string("raw"), e);
    }
    if (!r)
        *out = steal(&tree);
    return r;
}

/*
 * Opening recurses once a layer, about 600 bytes of stack each: after OPEN_HOP layers the rest of
 * the chain is opened by a task of its own, on a fresh stack, while this one waits.
 */
enum { OPEN_HOP = 32 };

struct open_hop {
    const json_t *tree;
    const struct open_ctx *ctx;
    const struct node_want *want;
    struct node **out;
    struct err *e;
    struct task *waiter;
    int r;
    bool done;
};

static void open_hop_task(void *arg) {
    struct open_hop *h = arg;
    h->r = open_tree_co(h->tree, h->ctx, h->ctx->req, h->want, NULL, h->out, h->e);
    h->done = true;
    task_wake(h->waiter);
}

static int open_layer_co(const json_t *tree, const struct open_ctx *ctx,
                         const struct node_want *want, struct node **out, struct err *e) {
    if (ctx->depth % OPEN_HOP != OPEN_HOP - 1)
        return open_tree_co(tree, ctx, ctx->req, want, NULL, out, e);
    struct open_hop h = {tree, ctx, want, out, e, task_self(), 0, false};
    task_spawn(loop_self(), open_hop_task, &h);
    while (!h.done)
        task_park_co();
    return h.r;
}

enum gate open_ctx_gate(const struct open_ctx *ctx) {
    return ctx->req->gate;
}

bool node_wants_backing(const struct open_ctx *ctx) {
    const json_t *user = json_object_get(ctx->tree, "backing");
    return !(ctx->req->flags & OPEN_NO_BACKING) && !json_is_null(user) &&
           !(json_is_string(user) && !*json_string_value(user));
}

int node_open_backing_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    const json_t *user = json_object_get(ctx->tree, "backing");
    if (!node_wants_backing(ctx))
        return 0;
    AUTO_JSON json_t *tree = NULL;
    struct node_want want;
    struct err why AUTO_ERR = ERR_INIT;
    int r = 0;
    child_want(n, CHILD_BACKING, &want);
    bool says_where = json_is_string(user) || json_object_get(user, "file") ||
                      json_object_get(user, "filename") || json_object_get(user, "size");
    if (user && says_where)
        r = tree_from_child(user, false, &tree, e);
    else if (n->backing_name)
        r = claimed_tree_co(n, ctx, &want, &tree, &why);
    if (!r && tree && user && !says_where && json_object_update_recursive(tree, (json_t *)user) < 0)
        r = err_set(&why, ENOMEM, "no memory for options");
    if (!r && tree)
        r = open_layer_co(tree, ctx, &want, &n->backing, &why);
    if (r < 0 && why.code) {
        AUTO_STRBUF struct strbuf b = STRBUF_INIT;
        strbuf_put_safe(&b, n->backing_name ? n->backing_name : "given by option",
                        strlen(n->backing_name ? n->backing_name : "given by option"));
        /* Of a long chain the two uppermost layers and the one that failed are named. */
        if (ctx->depth < 2 || strncmp(err_text(&why), "backing file '", 14))
            err_prefix(&why, "backing file '%s'", b.s);
        if (e)
            err_move(e, &why);
    }
    return r;
}

/* ---- external data files ---- */

bool node_has_data_option(const struct open_ctx *ctx) {
    return json_object_get(ctx->tree, "data-file");
}

/* A file that holds one of the images being opened, or the same data file again, is no place for
 * guest data. */
static int check_data_file(const struct open_ctx *ctx, const json_t *tree, struct err *e) {
    const char *name = tree_str(tree, "filename");
    struct stat st;
    if (!name || stat(name, &st) < 0)
        return 0;
    for (const struct open_ctx *c = ctx; c; c = c->parent)
        if (c->has_id && c->dev == st.st_dev && c->ino == st.st_ino)
            return err_set(e, EINVAL, "'%s' is the image itself, or one above it", name);
    return 0;
}

static int claimed_data_co(struct node *n, struct open_ctx *ctx, json_t **out, struct err *e) {
    if (!n->data_name) {
        err_set(e, EINVAL, "'data-file' is required for this image");
        err_hint(e,
                 "it keeps its data in a file whose name it does not record: give data-file=...");
        return -EINVAL;
    }
    AUTO_FREE char *resolved = data_file_resolve(n->filename, n->data_name, e);
    struct stat st;
    if (!resolved)
        return err_status(e);
    /* QEMU takes a relative name from where it runs.  With every name allowed, so does this where
     * nothing is beside the image. */
    if (ctx->req->gate == GATE_ANY && stat(resolved, &st) < 0 && errno == ENOENT &&
        stat(n->data_name, &st) == 0) {
        free(resolved);
        resolved = xstrdup(n->data_name);
    }
    int r = gate_check(ctx->req->gate, n->filename, resolved, n->data_name, e);
    if (r < 0)
        return r;
    return tree_of_file(resolved, out, e);
}

int node_open_data_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    const json_t *user = json_object_get(ctx->tree, "data-file");
    AUTO_JSON json_t *tree = NULL;
    struct node_want want;
    struct err why AUTO_ERR = ERR_INIT;
    if (ctx->req->flags & OPEN_NO_DATA)
        return 0;
    child_want(n, CHILD_FILE_DATA, &want);
    int r = user ? tree_from_child(user, true, &tree, &why) : claimed_data_co(n, ctx, &tree, &why);
    if (!r)
        r = check_data_file(ctx, tree, &why);
    if (!r)
        r = open_tree_co(tree, ctx, ctx->req, &want, NULL, &n->data_file, &why);
    if (r < 0) {
        AUTO_STRBUF struct strbuf b = STRBUF_INIT;
        const char *name = n->data_name ? n->data_name : "given by option";
        strbuf_put_safe(&b, user ? "given by option" : name,
                        strlen(user ? "given by option" : name));
        if (user || n->data_name)
            err_prefix(&why, "data file '%s'", b.s);
        if (e)
            err_move(e, &why);
    }
    return r;
}

/* ---- parts ---- */

bool node_wants_data(const struct open_ctx *ctx) {
    return !(ctx->req->flags & OPEN_NO_DATA) || ctx->req->gate == GATE_ANY;
}

static int claimed_part_co(struct node *n, struct open_ctx *ctx, const char *claimed, json_t **out,
                           struct err *e) {
    AUTO_FREE char *resolved = data_file_resolve(n->filename, claimed, e);
    struct stat st;
    if (!resolved)
        return err_status(e);
    int r = gate_check(ctx->req->gate, n->filename, resolved, claimed, e);
    if (r < 0)
        return r;
    if (stat(resolved, &st) == 0 && !S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
        return err_set(e, EINVAL, "it is neither a regular file nor a block device");
    return tree_of_file(resolved, out, e);
}

/* A file that is open as a part already: opened twice, its locks would be in each other's way. */
static struct node *find_part(struct node *n, const json_t *tree, struct node_part *id) {
    const char *name = tree_str(tree, "filename");
    struct stat st;
    *id = (struct node_part){0};
    if (!name || stat(name, &st) < 0)
        return NULL;
    id->dev = st.st_dev;
    id->ino = st.st_ino;
    for (size_t i = n->part_count; i-- > 0;)
        if (n->parts[i].ino == id->ino && n->parts[i].dev == id->dev)
            return n->parts[i].node;
    return NULL;
}

int node_open_part_co(struct node *n, struct open_ctx *ctx, size_t index, const char *claimed,
                      enum child_role role, bool writable, struct node **out, struct err *e) {
    char key[24];
    snprintf(key, sizeof(key), "%zu", index);
    const json_t *user = json_object_get(json_object_get(ctx->tree, "extents"), key);
    AUTO_JSON json_t *tree = NULL;
    struct node_want want;
    child_want(n, role, &want);
    if (!writable) {
        want.flags &= ~(unsigned)NODE_RW;
        want.perm = PERM_CONSISTENT_READ;
    }
    int r =
        user ? tree_from_child(user, true, &tree, e) : claimed_part_co(n, ctx, claimed, &tree, e);
    if (!r)
        r = check_data_file(ctx, tree, e);
    if (r < 0)
        return r;
    struct node_part id;
    if ((*out = find_part(n, tree, &id)))
        return 0;
    struct node_part *parts = realloc(n->parts, (n->part_count + 1) * sizeof(*parts));
    if (!parts)
        return err_set(e, ENOMEM, "no memory for one more file");
    n->parts = parts;
    r = open_tree_co(tree, ctx, ctx->req, &want, NULL, out, e);
    id.node = *out;
    if (!r)
        n->parts[n->part_count++] = id;
    return r;
}

/* ---- entry points ---- */

static unsigned req_node_flags(const struct open_req *req) {
    unsigned f = cache_node_flags(req->cache);
    f |= req->flags & OPEN_RW ? NODE_RW : 0;
    f |= req->flags & OPEN_FORCE_SHARE ? NODE_FORCE_SHARE : 0;
    f |= req->flags & OPEN_UNMAP ? NODE_UNMAP : 0;
    f |= req->flags & OPEN_CHECK ? NODE_CHECK : 0;
    f |= req->flags & OPEN_LOOK ? NODE_LOOK : 0;
    f |= req->flags & OPEN_SECTORS ? NODE_SECTORS : 0;
    return f;
}

static void root_want(const struct open_req *req, struct node_want *w) {
    bool rw = req->flags & OPEN_RW;
    w->role = CHILD_ROOT;
    w->flags = req_node_flags(req);
    w->perm = PERM_CONSISTENT_READ | (rw ? PERM_WRITE | PERM_RESIZE : 0);
    /* A reader of a raw image does not mind others; a writer is alone unless told otherwise. */
    w->shared = PERM_ALL;
    if (rw && !(req->flags & OPEN_SHARE_WRITE))
        w->shared = PERM_CONSISTENT_READ | PERM_WRITE_UNCHANGED;
}

/* The user's -f over a tree that names only storage. */
static int apply_format(json_t **tree, const char *format, struct err *e) {
    const char *name = tree_str(*tree, "driver");
    const struct driver *drv = name ? driver_find(name) : NULL;
    if (drv && drv->storage && strcmp(name, format)) {
        json_t *wrapped = json_object();
        int r = tree_set(wrapped, "file", *tree, e); /* which is its own from here on */
        *tree = wrapped;
        if (r < 0)
            return r;
    }
    return tree_set(*tree, "driver", json_string_nocheck(format), e);
}

int node_open_co(const struct open_req *req, struct node **out, struct err *e) {
    AUTO_JSON json_t *tree = NULL;
    struct node_want want;
    int r = 0;
    *out = NULL;
    if (req->name)
        r = tree_from_name(req->name, &tree, e);
    else
        tree = json_object();
    if (!r && req->options && json_object_update_recursive(tree, (json_t *)req->options) < 0)
        r = err_set(e, ENOMEM, "no memory for options");
    if (!r && req->format)
        r = apply_format(&tree, req->format, e);
    root_want(req, &want);
    if (!r)
        r = open_tree_co(tree, NULL, req, &want, NULL, out, e);
    if (r < 0 && req->name) {
        AUTO_STRBUF struct strbuf b = STRBUF_INIT;
        strbuf_put_safe(&b, req->name, strlen(req->name));
        err_prefix(e, "%s", b.s);
    }
    if (!r && req->name && strncmp(req->name, "json:", 5)) {
        /* "file:a:b" is ./a:b, which needs no prefix to be taken for a file. */
        const char *path = strncmp(req->name, "file:", 5) ? req->name : req->name + 5;
        free((*out)->filename);
        (*out)->filename =
            xasprintf("%s%s", path != req->name && name_has_protocol(path) ? "./" : "", path);
    }
    return r;
}

int node_open_on_co(struct node *file, const struct driver *format, const json_t *options,
                    const struct open_req *req, struct node **out, struct err *e) {
    AUTO_JSON json_t *tree = options ? json_deep_copy(options) : json_object();
    struct node_want want;
    int r = 0;
    root_want(req, &want);
    *out = NULL;
    if (file->filename && !json_object_get(tree, "file")) {
        json_t *f = json_object();
        r = tree_set(f, "filename", json_string_nocheck(file->filename), e);
        int r2 = tree_set(tree, "file", f, e);
        r = r ? r : r2;
    }
    if (!r)
        r = tree_set(tree, "driver", json_string(format->name), e);
    if (r < 0)
        return r;
    unsigned refs = file->refs;
    node_ref(file); /* the driver may drop it on failure; the caller keeps its own then */
    r = open_tree_co(tree, NULL, req, &want, file, out, e);
    if (r < 0 && file->refs > refs)
        node_unref_co(file); /* open failed before the driver took the preset */
    if (!r)
        node_unref_co(file); /* the format's reference stays */
    return r;
}
