/* SPDX-License-Identifier: MIT */
/*
 * Creating images: storage first, unnamed, then the format on it, the name last.
 *
 * A crash, an error or a kill before the link leaves nothing under the final name.  What is there
 * already is replaced only by the complete new image, and only when nobody has it open.
 */
#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "base/cleanup.h"
#include "base/err.h"
#include "disk/engine.h"

static const struct driver *storage_driver_for(const char *name, struct err *e) {
    const struct driver *drv = driver_for_prefix(name);
    if (!drv && name_has_protocol(name) && strncmp(name, "file:", 5)) {
        err_set(e, ENOTSUP, "unknown protocol '%.*s'", (int)strcspn(name, ":"), name);
        return NULL;
    }
    if (!drv)
        drv = driver_find("file");
    if (!drv->storage || !drv->storage->create_co) {
        err_set(e, ENOTSUP, "protocol '%s' cannot create images", drv->name);
        return NULL;
    }
    return drv;
}

int storage_create_co(const struct create_ctx *ctx, struct node **out, struct err *e) {
    const struct driver *drv = storage_driver_for(ctx->name, e);
    if (!drv)
        return err_status(e);
    struct create_ctx c = *ctx;
    if (!strncmp(c.name, "file:", 5))
        c.name += 5;
    struct node *n = node_new(drv);
    n->flags = ctx->node_flags | NODE_RW;
    n->perm = PERM_CONSISTENT_READ | PERM_WRITE | PERM_RESIZE;
    n->shared = PERM_CONSISTENT_READ | PERM_WRITE_UNCHANGED;
    n->filename = xstrdup(c.name);
    int r = drv->storage->create_co(n, &c, e);
    if (r < 0) {
        node_destroy_co(n);
        return r;
    }
    *out = n;
    return 0;
}

int node_link_co(struct node *storage, const char *name, bool replace, struct err *e) {
    if (!strncmp(name, "file:", 5))
        name += 5;
    if (!storage->drv->storage || !storage->drv->storage->link_co)
        return err_set(e, ENOTSUP, "a %s node cannot be given a name", storage->drv->name);
    return storage->drv->storage->link_co(storage, name, replace, e);
}

/* ---------------------------------------------------------------- the file's own options */

const struct opt create_file_rows[] = {
    OPT_BOOL(struct create_file_opts, nocow, "nocow", OPT_CREATE, false,
             "no copy-on-write of the file (btrfs; elsewhere nothing)"),
    OPT_SIZE(struct create_file_opts, extent_size_hint, "extent_size_hint", OPT_CREATE, 0,
             OPT_RANGE(0, UINT32_MAX), "unit of allocation of the file (XFS; elsewhere nothing)"),
    OPT_END,
};
const char *const create_file_keys[] = {"nocow", "extent_size_hint", NULL};

int create_file_options(const json_t *options, struct create_file_opts *out, struct err *e) {
    struct create_file_opts o = {0};
    json_t *own = json_object();
    int bad = own ? 0 : -1;
    for (int i = 0; create_file_keys[i]; i++) {
        json_t *v = json_object_get(options, create_file_keys[i]);
        if (v)
            bad |= json_object_set(own, create_file_keys[i], v);
    }
    bool any = json_object_size(own);
    int r = bad ? err_set(e, ENOMEM, "no memory for options")
                : opt_fill(create_file_rows, own, OPT_CREATE, NULL, &o, e);
    json_decref(own);
    if (r < 0)
        return r;
    if (out)
        *out = o;
    return any;
}

static int tune_file(struct node *storage, const json_t *options, struct err *e) {
    struct create_file_opts o;
    int r = create_file_options(options, &o, e);
    if (r > 0 && storage->drv->storage && storage->drv->storage->tune_new)
        storage->drv->storage->tune_new(storage, &o);
    return r < 0 ? r : 0;
}

int format_create_co(struct node *storage, const struct driver *format, const json_t *options,
                     struct err *e) {
    if (!format->format || !format->format->create_co)
        return err_set(e, ENOTSUP, "format '%s' cannot be created", format->name);
    void *opts = xcalloc(1, format->create_opts_size);
    int r = opt_fill(format->create_opts, options, OPT_CREATE, create_file_keys, opts, e);
    if (!r) {
        struct create_ctx ctx = {.name = storage->filename};
        r = tune_file(storage, options, e);
        if (!r)
            r = format->format->create_co(storage, opts, &ctx, e);
        opt_free(format->create_opts, opts);
    }
    free(opts);
    return r;
}

int create_check_target_co(const char *name, bool *exists_special, struct err *e) {
    struct stat st;
    *exists_special = false;
    if (!strncmp(name, "file:", 5))
        name += 5;
    if (driver_for_prefix(name) || stat(name, &st) < 0)
        return 0; /* not there, or creation will say why not */
    if (S_ISDIR(st.st_mode))
        return err_set(e, EISDIR, "%s: is a directory", name);
    if (S_ISBLK(st.st_mode)) {
        *exists_special = true;
        return 0;
    }
    if (!S_ISREG(st.st_mode))
        return err_set(e, EINVAL, "%s: is neither a regular file nor a block device", name);
    /* Opening for writing takes the locks that a user of the image would refuse. */
    struct open_req req = {.name = name, .format = "raw", .flags = OPEN_RW};
    struct node *n;
    int r = node_open_co(&req, &n, e);
    if (!r)
        node_unref_co(n);
    return r;
}

static int create_storage_co(const char *name, unsigned flags, bool special, struct node **out,
                             struct err *e) {
    if (special) {
        struct open_req req = {.name = name, .format = "raw", .flags = OPEN_RW};
        struct node *n;
        int r = node_open_co(&req, &n, e);
        if (r < 0)
            return r;
        *out = node_ref(n->file);
        node_unref_co(n);
        return 0;
    }
    struct create_ctx ctx = {.name = name, .flags = flags | CREATE_UNNAMED};
    return storage_create_co(&ctx, out, e);
}

static bool same_place(const char *a, const char *b) {
    struct stat x, y;
    if (!strncmp(b, "file:", 5))
        b += 5;
    return !strcmp(a, b) || (!strncmp(a, "./", 2) && !strcmp(a + 2, b)) ||
           (stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino);
}

int data_file_create_co(const char *name, const char *image, uint64_t size, int prealloc,
                        struct node **out, struct err *e) {
    bool special;
    struct node *file = NULL;
    if (image && same_place(name, image))
        return err_set(e, EINVAL, "it is the image itself");
    int r = create_check_target_co(name, &special, e);
    if (!r)
        r = create_storage_co(name, CREATE_REPLACE, special, &file, e);
    if (!r && file->size < size)
        r = disk_resize_co(file, size, prealloc, e);
    if (r < 0) {
        node_unref_co(file);
        return r;
    }
    *out = file;
    return 0;
}

int data_file_finish_co(struct node *file, const char *name, struct err *e) {
    struct stat st;
    int r = disk_flush_co(file);
    if (r < 0)
        return err_errno(e, -r, "flushing the data file '%s'", name);
    if (stat(name, &st) < 0 || !S_ISBLK(st.st_mode))
        r = node_link_co(file, name, true, e);
    return r < 0 ? err_prefix(e, "data file '%s'", name) : 0;
}

/* The first flush of a format whose images are written once. */
static int make_whole_co(struct node *file, const struct driver *format, struct err *e) {
    struct open_req req = {.flags = OPEN_RW};
    struct node *n;
    int r = node_open_on_co(node_ref(file), format, NULL, &req, &n, e);
    if (r < 0) {
        node_unref_co(file);
        return r;
    }
    if ((r = disk_flush_co(n)) < 0)
        err_errno(e, -r, "flushing");
    node_unref_co(n);
    return r;
}

int disk_create_co(const char *name, const char *format, const json_t *options, unsigned flags,
                   struct err *e) {
    const struct driver *drv = driver_find(format);
    bool special;
    struct node *file;
    if (!drv || !drv->format)
        return err_set(e, ENOTSUP, "unknown format '%s'", format);
    int r = create_check_target_co(name, &special, e);
    if (!r)
        r = create_storage_co(name, flags, special, &file, e);
    if (r < 0)
        return r;
    r = format_create_co(file, drv, options, e);
    if (!r && drv->format->written_once)
        r = make_whole_co(file, drv, e);
    if (!r && (r = disk_flush_co(file)) < 0)
        err_errno(e, -r, "flushing");
    if (!r && !special)
        r = node_link_co(file, name, flags & CREATE_REPLACE, e);
    node_unref_co(file);
    return r < 0 ? err_prefix(e, "%s", name) : 0;
}
