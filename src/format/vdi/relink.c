/* SPDX-License-Identifier: MIT */
/*
 * VDI: another parent, and an image that a commit has emptied.
 *
 * A parent is named by its UUIDs, which lie with the image's type in the header's one sector: a cut
 * finds the old parent or the new one.  Where the parent lies nobody records; an image without its
 * parent open is told which one it is by name, and it is looked for beside the image afterwards.
 *
 * After a commit all that was here is in the parent, which has another modification UUID since.
 * That is recorded first, then the map's entries become free, then the header counts no blocks and
 * the file gets shorter, with a barrier after each: a cut leaves an image that reads the same, with
 * unused blocks at most.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/err.h"
#include "disk/io.h"
#include "format/vdi/vdi.h"

/* The sector that counts blocks as storage does: none that the map does not name yet. */
static int store_header_co(struct vdi *s, const uint8_t *header, struct err *e) {
    struct vdi_header h;
    int r = disk_pwrite_co(s->file, 0, header, VDI_HEADER_BYTES);
    if (!r)
        r = disk_flush_co(s->file);
    if (r < 0)
        return err_errno(e, -r, "writing the header");
    memcpy(s->header, header, VDI_HEADER_BYTES);
    r = vdi_header_parse(s->header, &h, e);
    if (r)
        return r;
    s->h.type = h.type;
    memcpy(s->h.uuid_parent, h.uuid_parent, 16);
    memcpy(s->h.uuid_parent_modified, h.uuid_parent_modified, 16);
    return 0;
}

static int check_can(const struct vdi *s, const char *name, const char *format, struct err *e) {
    if (s->h.version != VDI_VERSION_1)
        return err_set(e, ENOTSUP, "an image of version 0.1 cannot record another parent");
    if (name && s->h.type == VDI_FIXED)
        return err_set(e, ENOTSUP, "a fixed image cannot have a parent");
    if (name && format && strcmp(format, "vdi"))
        return err_set(e, ENOTSUP,
                       "the parent of a VDI image is a VDI image (it is named by its UUID), not %s",
                       format);
    return 0;
}

int vdi_set_backing_co(struct node *n, const char *name, const char *format, struct err *e) {
    struct vdi *s = vdi_of(n);
    uint8_t header[VDI_HEADER_BYTES];
    int r = check_can(s, name, format, e);
    if (r || (!name && !vdi_has_parent(&s->h)))
        return r;
    char *own = name ? strdup(name) : NULL, *own_format = name ? strdup("vdi") : NULL;
    if (name && (!own || !own_format))
        r = err_set(e, ENOMEM, "no memory for the name");
    if (!r && (r = vdi_flush_co(n)) < 0)
        err_errno(e, -r, "flushing");
    memcpy(header, s->header, sizeof(header));
    if (!r && name) {
        r = vdi_parent_into_co(n->filename, name, header, e);
    } else if (!r) {
        memset(header + VDI_AT_UUID_PARENT, 0, 16);
        memset(header + VDI_AT_UUID_PARENT_MODIFIED, 0, 16);
        le32_store(header + VDI_AT_TYPE, VDI_DYNAMIC);
    }
    if (!r)
        r = store_header_co(s, header, e);
    if (r) {
        free(own);
        free(own_format);
        return r;
    }
    free(n->backing_name);
    free(n->backing_format);
    n->backing_name = own;
    n->backing_format = own_format;
    return 0;
}

/* ---------------------------------------------------------------- after a commit */

/* The parent as it is now. */
static int follow_parent_co(struct vdi *s, struct err *e) {
    const struct node *below = s->node->backing;
    uint8_t header[VDI_HEADER_BYTES];
    if (!vdi_has_parent(&s->h) || !below || below->drv != s->node->drv ||
        vdi_uuid_is_null(s->h.uuid_parent_modified))
        return 0;
    memcpy(header, s->header, sizeof(header));
    memcpy(header + VDI_AT_UUID_PARENT_MODIFIED, vdi_of(s->node->backing)->h.uuid_modified, 16);
    return store_header_co(s, header, e);
}

/* No block is named: none is counted, and the file ends where they begin. */
static int cut_co(struct vdi *s, struct err *e) {
    uint8_t header[VDI_HEADER_BYTES];
    memcpy(header, s->header, sizeof(header));
    le32_store(header + VDI_AT_ALLOCATED, 0);
    int r = store_header_co(s, header, e);
    if (r)
        return r;
    s->h.allocated = s->stored_count = s->next = 0;
    s->spares.count = 0;
    s->scanned = true;
    if (s->file->size > s->h.data_offset)
        disk_resize_co(s->file, s->h.data_offset, PREALLOC_OFF, NULL); /* a device keeps its size */
    return 0;
}

int vdi_empty_co(struct node *n, struct err *e) {
    struct vdi *s = vdi_of(n);
    if (s->h.type == VDI_FIXED || s->h.version != VDI_VERSION_1)
        return err_set(e, ENOTSUP, "a fixed image, or one of version 0.1, cannot be emptied");
    int r = vdi_flush_co(n);
    if (!r)
        r = pages_forget_all(&s->pages);
    if (r < 0)
        return err_errno(e, -r, "flushing");
    r = follow_parent_co(s, e);
    if (r)
        return r;
    r = vdi_map_write_co(s->file, s->h.map_offset, 0, s->h.blocks, false);
    if (!r)
        r = disk_flush_co(s->file);
    if (r < 0) {
        s->scanned = false; /* some entries are free already */
        return err_errno(e, -r, "clearing the map");
    }
    return cut_co(s, e);
}
