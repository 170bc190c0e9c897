/* SPDX-License-Identifier: MIT */
/* VDI: the header, opening, and the driver table. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "disk/io.h"
#include "disk/open.h"
#include "format/in_place.h"
#include "format/vdi/vdi.h"

#define PAGES_BYTES (8 * MIB) /* of the map in memory: 2 TiB of disk */

void vdi_uuid_text(const uint8_t *u, char out[37]) {
    snprintf(out, 37, "%08x-%04x-%04x-%02x%02x-%02x%02x%02x%02x%02x%02x", le32_load(u),
             le16_load(u + 4), le16_load(u + 6), u[8], u[9], u[10], u[11], u[12], u[13], u[14],
             u[15]);
}

bool vdi_uuid_is_null(const uint8_t *uuid) {
    return bytes_are_zero(uuid, 16);
}

/* Version 0: no offsets; the map follows the header directly, and the blocks follow the map. */
static void parse_version_0(const uint8_t *buf, struct vdi_header *h) {
    enum { TYPE = 72, SECTOR_SIZE = 348, SIZE = 352, UUIDS = 372, MAP = 420 };
    h->type = le32_load(buf + TYPE);
    h->size = le64_load(buf + SIZE);
    h->block_size = le32_load(buf + SIZE + 8);
    h->blocks = le32_load(buf + SIZE + 12);
    h->allocated = le32_load(buf + SIZE + 16);
    h->map_offset = MAP;
    h->data_offset = MAP + (h->blocks <= VDI_BLOCKS_MAX ? h->blocks * 4 : 0);
    memcpy(h->uuid, buf + UUIDS, 16);
    memcpy(h->uuid_modified, buf + UUIDS + 16, 16);
    memcpy(h->uuid_parent, buf + UUIDS + 32, 16);
}

static void parse_version_1(const uint8_t *buf, struct vdi_header *h) {
    h->type = le32_load(buf + VDI_AT_TYPE);
    h->map_offset = le32_load(buf + VDI_AT_MAP);
    h->data_offset = le32_load(buf + VDI_AT_DATA);
    h->size = le64_load(buf + VDI_AT_SIZE);
    h->block_size = le32_load(buf + VDI_AT_BLOCK_SIZE);
    h->extra = le32_load(buf + VDI_AT_EXTRA);
    h->blocks = le32_load(buf + VDI_AT_BLOCKS);
    h->allocated = le32_load(buf + VDI_AT_ALLOCATED);
    memcpy(h->uuid, buf + VDI_AT_UUID, 16);
    memcpy(h->uuid_modified, buf + VDI_AT_UUID_MODIFIED, 16);
    memcpy(h->uuid_parent, buf + VDI_AT_UUID_PARENT, 16);
    memcpy(h->uuid_parent_modified, buf + VDI_AT_UUID_PARENT_MODIFIED, 16);
}

static int check_geometry(const struct vdi_header *h, struct err *e) {
    if (h->type < VDI_DYNAMIC || h->type > VDI_DIFF)
        return err_set(e, ENOTSUP,
                       "image type %" PRIu32 " is unknown (1 dynamic, 2 fixed, 3 undo, "
                       "4 differencing)",
                       h->type);
    if (h->block_size < VDI_BLOCK_SIZE_MIN || h->block_size > VDI_BLOCK_SIZE_MAX ||
        !is_pow2(h->block_size))
        return err_set(e, EINVAL,
                       "block size %" PRIu32 " is not a power of two from %u to %u bytes",
                       h->block_size, VDI_BLOCK_SIZE_MIN, VDI_BLOCK_SIZE_MAX);
    if (h->blocks > VDI_BLOCKS_MAX)
        return err_set(e, EFBIG, "%" PRIu32 " blocks are above the limit of %u", h->blocks,
                       VDI_BLOCKS_MAX);
    if (h->size > INT64_MAX - 511 || h->size > (uint64_t)h->blocks * h->block_size)
        return err_set(e, EINVAL,
                       "disk size %" PRIu64 " is more than its %" PRIu32 " blocks of %" PRIu32
                       " bytes hold",
                       h->size, h->blocks, h->block_size);
    if (h->map_offset < VDI_AT_UUID || h->map_offset % 4 ||
        h->data_offset < h->map_offset + (uint64_t)h->blocks * 4)
        return err_set(e, EINVAL,
                       "the block map at %" PRIu32 " (%" PRIu32 " entries) and the data at %" PRIu32
                       " overlap, or lie in the header",
                       h->map_offset, h->blocks, h->data_offset);
    if (h->extra > VDI_BLOCK_SIZE_MAX || h->extra % 512)
        return err_set(e, EINVAL,
                       "%" PRIu32 " extra bytes before each block: whole sectors up to "
                       "%u are possible",
                       h->extra, VDI_BLOCK_SIZE_MAX);
    if (h->allocated > h->blocks)
        return err_set(e, EINVAL, "%" PRIu32 " of %" PRIu32 " blocks are said to be allocated",
                       h->allocated, h->blocks);
    return 0;
}

int vdi_header_parse(const uint8_t *buf, struct vdi_header *h, struct err *e) {
    *h = (struct vdi_header){.version = le32_load(buf + VDI_AT_VERSION)};
    if (le32_load(buf + VDI_AT_SIGNATURE) != VDI_SIGNATURE)
        return err_set(e, EINVAL, "not a VDI image: signature 0x%08" PRIx32 " at 64, not 0x%08x",
                       le32_load(buf + VDI_AT_SIGNATURE), VDI_SIGNATURE);
    if (h->version == VDI_VERSION_0) {
        parse_version_0(buf, h);
    } else if (h->version == VDI_VERSION_1) {
        uint32_t length = le32_load(buf + VDI_AT_HEADER_SIZE);
        if (length < VDI_HEADER_SIZE_MIN)
            return err_set(e, EINVAL, "header size %" PRIu32 " is below %u", length,
                           VDI_HEADER_SIZE_MIN);
        parse_version_1(buf, h);
        uint32_t sector = le32_load(buf + VDI_AT_SECTOR_SIZE);
        if (sector != 512)
            return err_set(e, ENOTSUP, "sector size %" PRIu32 " is not 512", sector);
    } else {
        return err_set(e, ENOTSUP, "VDI version %" PRIu32 ".%" PRIu32 " is unknown (0.1 and 1.1)",
                       h->version >> 16, h->version & 0xffff);
    }
    int r = check_geometry(h, e);
    h->size = align_up(h->size, 512);
    if (!r && h->size > (uint64_t)h->blocks * h->block_size)
        h->size = (uint64_t)h->blocks * h->block_size;
    return r;
}

static int vdi_probe(const struct probe_data *p) {
    return p->head_length >= VDI_HEADER_BYTES &&
                   le32_load(p->head + VDI_AT_SIGNATURE) == VDI_SIGNATURE
               ? 100
               : 0;
}

static int open_header_co(struct node *n, struct err *e) {
    struct vdi *s = vdi_of(n);
    int r = disk_pread_co(n->file, 0, s->header, VDI_HEADER_BYTES);
    if (r)
        return err_errno(e, -r, "reading the header");
    r = vdi_header_parse(s->header, &s->h, e);
    if (r)
        return r;
    if (node_is_rw(n) && s->h.version == VDI_VERSION_0)
        return err_set(e, ENOTSUP, "VDI version 0.1 can only be read");
    if (s->h.map_offset + (uint64_t)s->h.blocks * 4 > n->file->size)
        return err_set(e, EINVAL,
                       "the block map ends at %" PRIu64 ", behind the end of the file "
                       "(%" PRIu64 " bytes)",
                       s->h.map_offset + (uint64_t)s->h.blocks * 4, n->file->size);
    s->next = s->stored_count = s->h.allocated;
    n->size = s->h.size;
    n->granularity = s->h.block_size;
    return 0;
}

/* The parent, as it was when the child was made: any change gives it another modification UUID. */
static bool is_parent(const uint8_t head[FIND_HEAD_BYTES], void *arg) {
    const struct vdi_header *child = arg;
    struct vdi_header h;
    return le32_load(head + VDI_AT_SIGNATURE) == VDI_SIGNATURE &&
           !vdi_header_parse(head, &h, NULL) && !memcmp(h.uuid, child->uuid_parent, 16) &&
           (vdi_uuid_is_null(child->uuid_parent_modified) ||
            !memcmp(h.uuid_modified, child->uuid_parent_modified, 16));
}

/*
 * A differencing image names its parent by UUID only.  Which file that is the user says, or one of
 * those beside the image has it.
 */
static int open_parent_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct vdi *s = vdi_of(n);
    int r = node_open_backing_co(n, ctx, e);
    if (r || !vdi_has_parent(&s->h))
        return r;
    char id[37], other[37];
    vdi_uuid_text(s->h.uuid_parent, id);
    if (!n->backing && !(n->flags & (NODE_CHECK | NODE_LOOK)) && node_wants_backing(ctx)) {
        r = node_find_beside_co(n, open_ctx_gate(ctx), is_parent, &s->h, &n->backing_name, e);
        if (!r && n->backing_name) {
            n->backing_format = xstrdup("vdi");
            r = node_open_backing_co(n, ctx, e);
        } else if (!r) {
            err_set(e, ENOTSUP,
                    "a differencing image: what it does not hold lies in the image with UUID %s, "
                    "and no file beside it %s",
                    id,
                    open_ctx_gate(ctx) == GATE_NONE ? "may be looked at (--trust none)"
                                                    : "is that one, unchanged");
            err_hint(e, "name that image: backing.file.filename=FILE");
            return -ENOTSUP;
        }
        if (r)
            return r;
    }
    if (n->backing && n->backing->drv == n->drv && !vdi_uuid_is_null(s->h.uuid_parent)) {
        const struct vdi *parent = vdi_of(n->backing);
        if (memcmp(parent->h.uuid, s->h.uuid_parent, 16)) {
            vdi_uuid_text(parent->h.uuid, other);
            return err_set(e, EINVAL, "'%s' has UUID %s, the parent is %s", n->backing->filename,
                           other, id);
        }
    }
    return 0;
}

static int vdi_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct vdi *s = vdi_of(n);
    s->node = n;
    task_mutex_init(&s->alloc_lock);
    task_mutex_init(&s->flush_lock);
    int r = node_open_child_co(n, ctx, "file", CHILD_FILE_METADATA, &n->file, e);
    if (!r) {
        s->file = n->file;
        r = open_header_co(n, e);
    }
    if (!r && pages_init(&s->pages, n->file, PAGES_BYTES) < 0)
        r = err_set(e, ENOMEM, "no memory for the block map");
    if (!r)
        r = open_parent_co(n, ctx, e);
    return r;
}

static void vdi_close_co(struct node *n) {
    struct vdi *s = vdi_of(n);
    pages_free(&s->pages);
    spares_free(&s->spares);
}

static int vdi_reopen_co(struct node *n, unsigned new_flags, struct err *e) {
    struct vdi *s = vdi_of(n);
    if (!(new_flags & NODE_RW) || node_is_rw(n))
        return 0;
    if (s->h.version == VDI_VERSION_0)
        return err_set(e, ENOTSUP, "VDI version 0.1 can only be read");
    s->scanned = false;
    return 0;
}

static json_t *vdi_describe(struct node *n) {
    static const char *const types[] = {"", "dynamic", "fixed", "undo", "differencing"};
    const struct vdi_header *h = &vdi_of(n)->h;
    char id[37];
    json_t *o = json_object();
    if (!o)
        return NULL;
    json_object_set_new(o, "version", json_string(h->version == VDI_VERSION_0 ? "0.1" : "1.1"));
    json_object_set_new(o, "type", json_string(types[h->type]));
    json_object_set_new(o, "blocks", json_integer(h->blocks));
    json_object_set_new(o, "allocated-blocks", json_integer(h->allocated));
    vdi_uuid_text(h->uuid, id);
    json_object_set_new(o, "uuid", json_string(id));
    vdi_uuid_text(h->uuid_modified, id);
    json_object_set_new(o, "modification-uuid", json_string(id));
    if (!vdi_uuid_is_null(h->uuid_parent)) {
        vdi_uuid_text(h->uuid_parent, id);
        json_object_set_new(o, "parent-uuid", json_string(id));
    }
    return o;
}

static const struct opt vdi_open_opts[] = {
    OPT_CHILD("file", OPT_OPEN, "the storage"),
    OPT_CHILD("backing", OPT_OPEN, "the parent of a differencing image"),
    OPT_END,
};

static const struct format_ops vdi_format = {
    .probe = vdi_probe,
    .create_co = vdi_create_co,
    .map_co = vdi_map_co,
    .place_co = vdi_place_co,
    .publish_co = vdi_publish_co,
    .abandon = vdi_abandon,
    .set_zero_co = vdi_set_zero_co,
    .discard_co = in_place_discard_co,
    .reach_co = vdi_reach_co,
    .resize_co = vdi_resize_co,
    .flush_co = vdi_flush_co,
    .set_backing_co = vdi_set_backing_co,
    .empty_co = vdi_empty_co,
    .repairs = CHECK_FIX_LEAKS | CHECK_FIX_ERRORS,
    .check_co = vdi_check_co,
    .describe = vdi_describe,
    .measure = vdi_measure,
};

const struct driver driver_vdi = {
    .name = "vdi",
    .kind = DRIVER_FORMAT,
    .help = "VirtualBox disk image",
    .state_size = sizeof(struct vdi),
    .opts = vdi_open_opts,
    .create_opts = vdi_create_opt_table,
    .create_opts_size = sizeof(struct vdi_create_opts),
    .open_co = vdi_open_co,
    .close_co = vdi_close_co,
    .reopen_co = vdi_reopen_co,
    .format = &vdi_format,
};
