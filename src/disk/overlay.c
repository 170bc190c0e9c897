/* SPDX-License-Identifier: MIT */
/*
 * Temporary snapshots: see overlay.h.
 *
 *      overlay (qcow2, read-write, never flushed)
 *          |--file-->    scratch file without a name
 *          `--backing--> base, as the caller opened it
 *
 * While the overlay is thrown away its header names no backing file: nobody but this process will
 * ever open it.  Keeping it means: hold the guest's requests, name the base in the header, write
 * out the cached metadata, sync, link.  Up to the link nothing has changed for anybody; when it
 * fails the header is put back.  Where the scratch file cannot be linked (another file system, or
 * a file system without unnamed files) its content is copied hole by hole into an unnamed file in
 * the target's folder, and that is linked; the overlay goes on in its scratch file.
 *
 * Nobody else may write to or resize the base while an overlay lies over it, also when it is a raw
 * disk that its first opener would have shared.
 */
#include "disk/overlay.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "base/plant.h"
#include "base/size.h"
#include "disk/engine.h"

/*
 * Clusters of the throw-away layer.  Guests write pages: with clusters of a page a random write
 * copies nothing from the base and takes no more scratch space than it writes.  Measured, 60,000
 * random 4 KiB writes over a 3 GiB base (processor time of one, scratch used): 4 KiB 9 us, 386
 * MiB; 16 KiB 14 us, 1026 MiB; 64 KiB 27 us, 2307 MiB.  Writing the whole disk in sequence costs
 * more tables instead: at 4 KiB about half the speed of 64 KiB, still 0.5 to 1.1 GiB/s.  A disk so
 * large that its first-level table would pass L1_BYTES_MAX gets larger ones.
 */
#define OVERLAY_CLUSTER_MIN (4 * KIB)
#define OVERLAY_CLUSTER_MAX (64 * KIB)
#define L1_BYTES_MAX (4 * MIB)
#define COPY_PIECE MIB

static const char *scratch_dir(const struct overlay_opts *opts) {
    const char *tmp = getenv("TMPDIR");
    if (opts && opts->scratch_dir && *opts->scratch_dir)
        return opts->scratch_dir;
    return tmp && *tmp ? tmp : "/var/tmp";
}

#define MEMORY "memory:"

static bool in_memory(const struct overlay_opts *opts) {
    return !strncmp(scratch_dir(opts), MEMORY, strlen(MEMORY));
}

int overlay_limit(const struct overlay_opts *opts, uint64_t *limit, struct err *e) {
    const char *size = scratch_dir(opts) + strlen(MEMORY);
    *limit = opts ? opts->scratch_size : 0;
    if (!in_memory(opts))
        return 0;
    if (!*size)
        return err_set(e, EINVAL, "scratch in memory needs a limit: memory:SIZE");
    uint64_t bytes;
    int r = size_parse(size, "size of the scratch memory", &bytes, e);
    if (!r && !bytes)
        r = err_set(e, EINVAL, "scratch in memory needs a limit above 0");
    if (!r && (!*limit || bytes < *limit))
        *limit = bytes;
    return r;
}

static int create_scratch_co(const struct overlay_opts *opts, struct node **out, struct err *e) {
    struct create_ctx ctx = {
        .name = in_memory(opts) ? MEMORY : scratch_dir(opts),
        .flags = CREATE_SCRATCH,
        .node_flags = NODE_NO_FLUSH | NODE_UNMAP,
    };
    int r = overlay_limit(opts, &ctx.size_limit, e);
    if (!r)
        r = storage_create_co(&ctx, out, e);
    return r ? err_prefix(e, "temporary snapshot") : 0;
}

static int format_scratch_co(struct node *file, const struct driver *qcow2, uint64_t size,
                             struct err *e) {
    uint64_t cluster = OVERLAY_CLUSTER_MIN;
    while (cluster < OVERLAY_CLUSTER_MAX && size / (cluster * cluster / 8) * 8 > L1_BYTES_MAX)
        cluster *= 2;
    AUTO_JSON json_t *opts =
        json_pack("{s:I, s:I}", "size", (json_int_t)size, "cluster_size", (json_int_t)cluster);
    if (!opts)
        return err_set(e, ENOMEM, "out of memory");
    return format_create_co(file, qcow2, opts, e);
}

int overlay_create_co(struct node *base, const struct overlay_opts *opts, struct node **out,
                      struct err *e) {
    const struct driver *qcow2 = driver_find("qcow2");
    struct node *file = NULL, *n = NULL;
    if (!qcow2)
        return err_set(e, ENOTSUP, "temporary snapshots need the qcow2 driver");
    int r = node_restrict_co(base, PERM_CONSISTENT_READ | PERM_WRITE_UNCHANGED, e);
    if (!r)
        r = create_scratch_co(opts, &file, e);
    if (r)
        return r;
    struct open_req req = {.flags = OPEN_RW | OPEN_NO_BACKING | OPEN_UNMAP, .cache = CACHE_UNSAFE};
    r = format_scratch_co(file, qcow2, base->size, e);
    if (!r)
        r = node_open_on_co(file, qcow2, NULL, &req, &n, e);
    if (r) {
        node_unref_co(file);
        return err_prefix(e, "temporary snapshot");
    }
    n->backing = base;
    free(n->filename);
    n->filename = xasprintf("%s (temporary snapshot)", base->filename);
    *out = n;
    return 0;
}

int64_t overlay_allocated(struct node *overlay) {
    return disk_allocated(overlay);
}

/* ------------------------------------------------------------------- keep */

/* What a header can say about the base from any folder.  *name is owned. */
static int base_name(const struct node *base, char **name, struct err *e) {
    const char *path = base->filename;
    if (!strcmp(base->drv->name, "raw") && base->file && base->size != base->file->size)
        return err_set(e, ENOTSUP,
                       "the base is a part of '%s', which a backing file name cannot say", path);
    if (!name_has_protocol(path) || !strncmp(path, "file:", 5)) {
        const char *plain = strncmp(path, "file:", 5) ? path : path + 5;
        *name = realpath(plain, NULL);
        return *name ? 0 : err_errno(e, errno, "base file '%s'", plain);
    }
    *name = xstrdup(path);
    return 0;
}

/* Copies the data runs of one storage node to another, empty one, and makes it as long. */
static int copy_storage_co(struct node *from, struct node *to, struct err *e) {
    void *buf = buf_get(COPY_PIECE);
    int r = buf ? 0 : -ENOMEM;
    for (uint64_t at = 0, len; !r && at < from->size; at += len) {
        struct extent x = {.length = from->size - at, .kind = EXTENT_DATA};
        if (from->drv->storage->extents_co)
            r = from->drv->storage->extents_co(from, at, from->size - at, &x);
        len = x.kind == EXTENT_ZERO ? x.length : min_u64(x.length, COPY_PIECE);
        struct iovec v = {buf, len};
        if (!r && x.kind != EXTENT_ZERO)
            r = disk_preadv_co(from, at, len, &v, 1, IO_BULK);
        if (!r && x.kind != EXTENT_ZERO)
            r = disk_pwritev_co(to, at, len, &v, 1, IO_BULK);
    }
    buf_put(buf, COPY_PIECE);
    if (r)
        return err_errno(e, -r, "copying the snapshot");
    return to->size < from->size ? disk_resize_co(to, from->size, PREALLOC_OFF, e) : 0;
}

static int keep_by_copy_co(struct node *file, const char *name, bool replace, struct err *e) {
    struct node *to;
    struct create_ctx ctx = {.name = name,
                             .flags = CREATE_UNNAMED | (replace ? CREATE_REPLACE : 0)};
    int r = storage_create_co(&ctx, &to, e);
    if (r)
        return r;
    r = copy_storage_co(file, to, e);
    if (!r)
        r = node_link_co(to, name, replace, e);
    node_unref_co(to);
    return r;
}

/* The scratch file is a whole image over `base`.  The overlay is quiesced. */
static int complete_co(struct node *n, const char *base, struct err *e) {
    int r = n->drv->format->set_backing_co(n, base, n->backing->drv->name, e);
    if (r)
        return r;
    /* The slot itself: disk_flush_co would wait for the quiesce to end, and skips NO_FLUSH. */
    r = n->drv->format->flush_co && !PLANTED(KEEP_WITHOUT_METADATA) ? n->drv->format->flush_co(n)
                                                                    : 0;
    return r ? err_errno(e, -r, "writing the snapshot's metadata") : 0;
}

static int save_quiesced_co(struct node *n, const char *base, const char *name, bool replace,
                            struct err *e) {
    int r = complete_co(n, base, e);
    if (!r)
        r = keep_by_copy_co(n->file, name, replace, e);
    n->drv->format->set_backing_co(n, NULL, NULL, NULL);
    return r;
}

static int keep_quiesced_co(struct node *n, const char *base, const char *name, bool replace,
                            struct err *e) {
    struct node *file = n->file;
    int r = complete_co(n, base, e);
    if (r)
        return r;
    file->flags &= ~(unsigned)NODE_NO_FLUSH;
    r = node_link_co(file, name, replace, e);
    if (!r) {
        n->flags &= ~(unsigned)NODE_NO_FLUSH; /* a proper image now: flushes count */
        free(n->filename);
        n->filename = xstrdup(name);
        return 0;
    }
    file->flags |= NODE_NO_FLUSH;
    /* Elsewhere, not linkable, or kept before: a copy does it.  It meets any other obstacle too. */
    if (r != -EXDEV && r != -ENOENT && r != -EINVAL && r != -ENOTSUP)
        return r;
    err_clear(e);
    return keep_by_copy_co(file, name, replace, e);
}

static int with_base_co(struct node *overlay, const char *name, bool replace, bool save,
                        struct err *e) {
    char *base AUTO_FREE = NULL;
    if (!overlay->drv->format->set_backing_co)
        return err_set(e, ENOTSUP, "format '%s' cannot record a backing file", overlay->drv->name);
    int r = base_name(overlay->backing, &base, e);
    if (r)
        return err_prefix(e, "%s", name);
    node_quiesce_co(overlay);
    if (save) {
        r = save_quiesced_co(overlay, base, name, replace, e);
    } else {
        r = keep_quiesced_co(overlay, base, name, replace, e);
        if (r)
            overlay->drv->format->set_backing_co(overlay, NULL, NULL, NULL);
    }
    node_resume(overlay);
    return r ? err_prefix(e, "%s", name) : 0;
}

int overlay_keep_co(struct node *overlay, const char *name, bool replace, struct err *e) {
    return with_base_co(overlay, name, replace, false, e);
}

int overlay_save_co(struct node *overlay, const char *name, bool replace, struct err *e) {
    return with_base_co(overlay, name, replace, true, e);
}
