/* SPDX-License-Identifier: MIT */
/*
 * The format "raw": guest bytes are the bytes of the storage, or of a window in it.
 *
 *      guest [0, size)  =  storage [start, start + size)
 *
 * The map is one rule, everything is in place, and there is no metadata: zeroing and discarding
 * are handed to the storage at the shifted offset.  With `size` given the window is fixed and the
 * disk cannot be resized; otherwise it reaches to the end of the storage.
 *
 * Probing answers 1, the least: any bytes are a raw disk, and the engine treats that as a guess.
 */
#include <errno.h>
#include <inttypes.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"

struct raw_opts {
    uint64_t offset, size;
    bool size_given;
};

struct raw_create {
    uint64_t size;
    int preallocation;
    uint64_t extent_hint;
};

static uint64_t raw_start(const struct node *n) {
    const struct raw_opts *o = n->opts;
    return o->offset;
}

static int raw_probe(const struct probe_data *p) {
    return 1;
}

static int raw_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    const struct raw_opts *o = n->opts;
    int r = node_open_child_co(n, ctx, "file", CHILD_FILE_RAW, &n->file, e);
    if (r)
        return r;
    uint64_t total = n->file->size;
    if (o->offset > total)
        return err_set(e, EINVAL,
                       "offset %" PRIu64 " is behind the end of the storage (%" PRIu64 " bytes)",
                       o->offset, total);
    if (o->size_given && o->size > total - o->offset)
        return err_set(e, EINVAL,
                       "offset %" PRIu64 " and size %" PRIu64
                       " reach behind the end of the storage (%" PRIu64 " bytes)",
                       o->offset, o->size, total);
    n->size = o->size_given ? o->size : total - o->offset;
    if (n->flags & NODE_SECTORS && !o->size_given)
        n->size = align_up(n->size, 512);
    n->granularity = 1;
    return 0;
}

static int raw_create_co(struct node *file, const void *create_opts, struct create_ctx *ctx,
                         struct err *e) {
    const struct raw_create *c = create_opts;
    if (c->preallocation == PREALLOC_METADATA)
        return err_set(e, EINVAL, "preallocation=metadata does not apply to raw: it has none");
    if (c->size <= file->size && c->preallocation == PREALLOC_OFF)
        return 0; /* as large from the start, or a device */
    /* Space is allocated for what the file grows by. */
    int r = file->size && c->preallocation != PREALLOC_OFF
                ? disk_resize_co(file, 0, PREALLOC_OFF, e)
                : 0;
    return r ? r : disk_resize_co(file, c->size, c->preallocation, e);
}

static int raw_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    *out = (struct extent){
        .length = length,
        .kind = EXTENT_DATA,
        .flags = EXTENT_IN_PLACE,
        .storage = n->file,
        .host_offset = raw_start(n) + offset,
    };
    return 0;
}

static int raw_place_co(struct node *n, uint64_t offset, uint64_t length, unsigned flags,
                        uint32_t coded_length, struct placement *out) {
    if (flags & PLACE_CODED)
        return -ENOTSUP;
    *out = (struct placement){
        .offset = offset,
        .length = length,
        .storage = n->file,
        .host_offset = raw_start(n) + offset,
    };
    return 0;
}

static int raw_publish_co(struct node *n, const struct placement *p) {
    return 0;
}

static void raw_abandon(struct node *n, const struct placement *p) {}

/* discard=ignore: what the guest drops or zeroes stays allocated. */
static int raw_set_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    if (!(n->flags & NODE_UNMAP))
        zero_flags &= ~(unsigned)ZERO_MAY_UNMAP;
    return disk_zero_co(n->file, raw_start(n) + offset, length, zero_flags);
}

static int raw_discard_co(struct node *n, uint64_t offset, uint64_t length) {
    if (!(n->flags & NODE_UNMAP))
        return 0;
    return disk_discard_co(n->file, raw_start(n) + offset, length);
}

static int raw_resize_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    const struct raw_opts *o = n->opts;
    uint64_t total;
    if (o->size_given)
        return err_set(e, ENOTSUP, "a raw disk opened with a fixed size cannot be resized");
    if (!ck_add(o->offset, size, &total) || total > INT64_MAX)
        return err_set(e, EFBIG, "size %" PRIu64 " at offset %" PRIu64 " is beyond the largest",
                       size, o->offset);
    int r = disk_resize_co(n->file, total, prealloc, e);
    if (!r)
        n->size = size;
    return r;
}

static int raw_measure(const void *create_opts, const struct measure_in *in,
                       struct measure_result *out, struct err *e) {
    /* A raw file of `size` bytes is that long however much of it is holes. */
    out->required = out->fully_allocated = out->bound_required = out->bound_fully = in->size;
    return 0;
}

static const struct opt raw_open_opts[] = {
    OPT_SIZE(struct raw_opts, offset, "offset", OPT_OPEN, 0, OPT_ANY,
             "where in the storage the disk begins"),
    {.name = "size",
     .type = OPT_T_SIZE,
     .when = OPT_OPEN,
     .offset = OPT_FIELD_(struct raw_opts, size, uint64_t),
     .given = offsetof(struct raw_opts, size_given),
     OPT_ANY,
     .help = "bytes of the disk; default: to the end of the storage"},
    OPT_CHILD("file", OPT_OPEN, "the storage"),
    OPT_END,
};

static const struct opt raw_create_opts[] = {
    OPT_SIZE(struct raw_create, size, "size", OPT_CREATE, 0, OPT_ANY, "size of the disk"),
    OPT_ENUM(struct raw_create, preallocation, "preallocation", OPT_CREATE, PREALLOC_OFF,
             prealloc_names, "off: sparse; falloc: space reserved; full: written with zeros"),
    OPT_SIZE(struct raw_create, extent_hint, "extent_size_hint", OPT_CREATE, MIB, OPT_ANY,
             "accepted; the file system decides how it allocates"),
    OPT_END,
};

static const struct format_ops raw_format = {
    .probe = raw_probe,
    .create_co = raw_create_co,
    .map_co = raw_map_co,
    .place_co = raw_place_co,
    .publish_co = raw_publish_co,
    .abandon = raw_abandon,
    .set_zero_co = raw_set_zero_co,
    .discard_co = raw_discard_co,
    .resize_co = raw_resize_co,
    .measure = raw_measure,
};

const struct driver driver_raw = {
    .name = "raw",
    .kind = DRIVER_FORMAT,
    .help = "the plain bytes of the disk",
    .opts = raw_open_opts,
    .opts_size = sizeof(struct raw_opts),
    .create_opts = raw_create_opts,
    .create_opts_size = sizeof(struct raw_create),
    .open_co = raw_open_co,
    .format = &raw_format,
};
