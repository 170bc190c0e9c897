/* SPDX-License-Identifier: MIT */
/*
 * VDI: new images, their size, growth.
 *
 * A new image has the layout of other writers: the map directly behind the header's sector, the
 * data at the next sector.  Growth needs map entries, which lie between the map and the data: there
 * is as much room as the last sector of the map leaves (and, in images of VirtualBox, up to the
 * next MiB).
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/random.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "disk/io.h"
#include "disk/open.h"
#include "format/vdi/vdi.h"

#define MAP_PIECE ((uint32_t)(256 * KIB))

const struct opt vdi_create_opt_table[] = {
    OPT_SIZE(struct vdi_create_opts, size, "size", OPT_CREATE, 0, OPT_ANY, "size of the disk"),
    OPT_BOOL(struct vdi_create_opts, fixed, "static", OPT_CREATE, false,
             "a fixed image: every block has its room from the start"),
    OPT_SIZE(struct vdi_create_opts, block_size, "block_size", OPT_CREATE, MIB,
             OPT_POW2(VDI_BLOCK_SIZE_MIN, VDI_BLOCK_SIZE_MAX), "allocation unit"),
    OPT_ENUM(struct vdi_create_opts, preallocation, "preallocation", OPT_CREATE, PREALLOC_OFF,
             prealloc_names,
             "metadata: as static; falloc: and its space reserved; full: and written with zeros"),
    OPT_STR(struct vdi_create_opts, backing_file, "backing_file", OPT_CREATE,
            "the parent, a VDI image: a differencing image"),
    OPT_STR(struct vdi_create_opts, backing_fmt, "backing_fmt", OPT_CREATE,
            "format of the parent: vdi"),
    OPT_END,
};

struct layout {
    uint32_t blocks, data_offset;
    uint64_t size; /* of the disk, whole sectors */
};

static bool is_fixed(const struct vdi_create_opts *o) {
    return o->fixed || o->preallocation != PREALLOC_OFF;
}

static int layout_compute(const struct vdi_create_opts *o, uint64_t size, struct layout *l,
                          struct err *e) {
    uint64_t limit = (uint64_t)VDI_BLOCKS_MAX * o->block_size;
    if (size > limit)
        return err_set(e, EFBIG,
                       "disk size %" PRIu64 " is above the limit of %" PRIu64
                       " for blocks of %" PRIu64 " bytes",
                       size, limit, o->block_size);
    l->size = align_up(size, 512);
    l->blocks = (uint32_t)div_up(l->size, o->block_size);
    l->data_offset = (uint32_t)align_up(VDI_HEADER_BYTES + (uint64_t)l->blocks * 4, 512);
    return 0;
}

static int random_uuid(uint8_t *id) {
    if (getrandom(id, 16, 0) != 16)
        return -EIO;
    id[7] = (uint8_t)((id[7] & 0x0f) | 0x40);
    id[8] = (uint8_t)((id[8] & 0x3f) | 0x80);
    return 0;
}

static int make_header(const struct vdi_create_opts *o, const struct layout *l, uint8_t *buf,
                       struct err *e) {
    bool fixed = is_fixed(o);
    memset(buf, 0, VDI_HEADER_BYTES);
    memcpy(buf, "<<< Virtual disk image, VDI 1.1 >>>\n", 36);
    le32_store(buf + VDI_AT_SIGNATURE, VDI_SIGNATURE);
    le32_store(buf + VDI_AT_VERSION, VDI_VERSION_1);
    le32_store(buf + VDI_AT_HEADER_SIZE, VDI_HEADER_SIZE_MIN);
    le32_store(buf + VDI_AT_TYPE, fixed ? VDI_FIXED : VDI_DYNAMIC);
    le32_store(buf + VDI_AT_MAP, VDI_HEADER_BYTES);
    le32_store(buf + VDI_AT_DATA, l->data_offset);
    le32_store(buf + VDI_AT_SECTOR_SIZE, 512);
    le64_store(buf + VDI_AT_SIZE, l->size);
    le32_store(buf + VDI_AT_BLOCK_SIZE, (uint32_t)o->block_size);
    le32_store(buf + VDI_AT_BLOCKS, l->blocks);
    le32_store(buf + VDI_AT_ALLOCATED, fixed ? l->blocks : 0);
    if (random_uuid(buf + VDI_AT_UUID) < 0 || random_uuid(buf + VDI_AT_UUID_MODIFIED) < 0)
        return err_set(e, EIO, "the system gave no random numbers for the UUIDs");
    return 0;
}

int vdi_parent_into_co(const char *image, const char *name, uint8_t *header, struct err *e) {
    AUTO_FREE char *resolved = backing_resolve(image, name, e);
    if (!resolved)
        return -EINVAL;
    struct open_req req = {
        .name = resolved, .format = "vdi", .flags = OPEN_NO_BACKING, .gate = GATE_NONE};
    struct node *parent;
    int r = node_open_co(&req, &parent, e);
    if (r < 0)
        return err_prefix(e, "the parent of a differencing image");
    memcpy(header + VDI_AT_UUID_PARENT, vdi_of(parent)->h.uuid, 16);
    memcpy(header + VDI_AT_UUID_PARENT_MODIFIED, vdi_of(parent)->h.uuid_modified, 16);
    le32_store(header + VDI_AT_TYPE, VDI_DIFF);
    node_unref_co(parent);
    return 0;
}

/* Names the parent, as it is now, in the header. */
static int name_parent_co(const struct vdi_create_opts *o, const char *image, uint8_t *buf,
                          struct err *e) {
    if (is_fixed(o))
        return err_set(e, EINVAL,
                       "a differencing image holds what differs: neither static nor "
                       "preallocated");
    if (o->backing_fmt && strcmp(o->backing_fmt, "vdi"))
        return err_set(e, ENOTSUP,
                       "the parent of a VDI image is a VDI image (it is named by its UUID), not %s",
                       o->backing_fmt);
    return vdi_parent_into_co(image, o->backing_file, buf, e);
}

int vdi_map_write_co(struct node *file, uint64_t offset, uint32_t from, uint32_t to,
                     bool identity) {
    uint8_t *buf = buf_get(MAP_PIECE);
    int r = buf ? 0 : -ENOMEM;
    while (!r && from < to) {
        uint32_t count = (uint32_t)min_u64(MAP_PIECE / 4, to - from);
        for (uint32_t i = 0; i < count; i++)
            le32_store(buf + i * 4, identity ? from + i : VDI_FREE);
        r = disk_pwrite_co(file, offset + (uint64_t)from * 4, buf, count * 4);
        from += count;
    }
    buf_put(buf, MAP_PIECE);
    return r;
}

int vdi_create_co(struct node *file, const void *create_opts, struct create_ctx *ctx,
                  struct err *e) {
    const struct vdi_create_opts *o = create_opts;
    uint8_t header[VDI_HEADER_BYTES];
    struct layout l;
    int r = layout_compute(o, o->size, &l, e);
    if (!r)
        r = make_header(o, &l, header, e);
    if (!r && o->backing_file)
        r = name_parent_co(o, ctx ? ctx->name : NULL, header, e);
    if (r)
        return r;
    uint64_t data = is_fixed(o) ? (uint64_t)l.blocks * o->block_size : 0;
    int prealloc = o->preallocation == PREALLOC_METADATA ? PREALLOC_OFF : o->preallocation;
    r = disk_resize_co(file, l.data_offset + data, prealloc, e);
    if (r)
        return r;
    r = vdi_map_write_co(file, VDI_HEADER_BYTES, 0, l.blocks, is_fixed(o));
    if (!r)
        r = disk_pwrite_co(file, 0, header, sizeof(header));
    return r ? err_errno(e, -r, "writing the header and the map") : 0;
}

int vdi_measure(const void *create_opts, const struct measure_in *in, struct measure_result *out,
                struct err *e) {
    const struct vdi_create_opts *o = create_opts;
    struct layout l;
    int r = layout_compute(o, in->size, &l, e);
    if (r)
        return r;
    uint64_t blocks = is_fixed(o) ? l.blocks : in->touched[__builtin_ctzll(o->block_size)];
    out->required = l.data_offset + blocks * o->block_size;
    out->fully_allocated = l.data_offset + (uint64_t)l.blocks * o->block_size;
    out->bound_required = out->required;
    out->bound_fully = out->fully_allocated;
    return 0;
}

/* Map entries for the new blocks, free; the header does not count them yet. */
int vdi_reach_co(struct node *n, uint64_t size, struct err *e) {
    struct vdi *s = vdi_of(n);
    uint64_t blocks = div_up(size, s->h.block_size);
    uint64_t room = (s->h.data_offset - s->h.map_offset) / 4;
    if (size % 512)
        return err_set(e, EINVAL, "size %" PRIu64 " is not a multiple of 512", size);
    if (blocks > VDI_BLOCKS_MAX || blocks > room) {
        err_set(e, ENOTSUP,
                "%" PRIu64 " blocks are needed, and the map of this image has room for %" PRIu64
                " (%" PRIu64 " bytes of disk)",
                blocks, room, room * s->h.block_size);
        err_hint(e, "convert it to a new image, or grow it in another format");
        return -ENOTSUP;
    }
    if (blocks <= s->h.blocks)
        return 0;
    int r = vdi_flush_co(n);
    if (!r)
        r = vdi_map_write_co(s->file, s->h.map_offset, s->h.blocks, (uint32_t)blocks, false);
    if (r)
        return err_errno(e, -r, "writing the map");
    /* The last page of the map was shorter. */
    r = pages_forget_all(&s->pages);
    if (r)
        return err_set(e, -r, "the map is in use");
    s->h.blocks = (uint32_t)blocks;
    return 0;
}

int vdi_resize_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    struct vdi *s = vdi_of(n);
    uint8_t header[VDI_HEADER_BYTES];
    if (prealloc != PREALLOC_OFF)
        return err_set(e, ENOTSUP, "a VDI image grows without preallocation only");
    if (size < n->size)
        return err_set(e, ENOTSUP, "a VDI image cannot shrink; convert it instead");
    memcpy(header, s->header, sizeof(header));
    le64_store(header + VDI_AT_SIZE, size);
    le32_store(header + VDI_AT_BLOCKS, s->h.blocks);
    int r = disk_pwrite_co(s->file, 0, header, sizeof(header));
    if (r)
        return err_errno(e, -r, "writing the header");
    memcpy(s->header, header, sizeof(header));
    s->h.size = n->size = size;
    return 0;
}
