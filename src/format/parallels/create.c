/* SPDX-License-Identifier: MIT */
/* Parallels: new images, their size, growth. */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"
#include "disk/open.h"
#include "format/parallels/parallels.h"

const struct opt parallels_create_opt_table[] = {
    OPT_SIZE(struct parallels_create_opts, size, "size", OPT_CREATE, 0, OPT_ANY,
             "size of the disk"),
    OPT_SIZE(struct parallels_create_opts, cluster_size, "cluster_size", OPT_CREATE, MIB,
             OPT_POW2(PARALLELS_SECTOR, PARALLELS_CLUSTER_MAX), "unit of allocation"),
    OPT_END,
};

static int layout_compute(const struct parallels_create_opts *o, uint64_t size, uint32_t *entries,
                          uint64_t *data_offset, struct err *e) {
    uint64_t count = div_up(align_up(size, PARALLELS_SECTOR), o->cluster_size);
    if (count > PARALLELS_ENTRIES_MAX)
        return err_set(e, EFBIG,
                       "disk size %" PRIu64 " is above the limit of %" PRIu64
                       " for clusters of %" PRIu64 " bytes",
                       size, PARALLELS_ENTRIES_MAX * o->cluster_size, o->cluster_size);
    *entries = (uint32_t)count;
    *data_offset = align_up(PARALLELS_HEADER_BYTES + count * 4, o->cluster_size);
    return 0;
}

int parallels_create_co(struct node *file, const void *create_opts, struct create_ctx *ctx,
                        struct err *e) {
    const struct parallels_create_opts *o = create_opts;
    uint8_t h[PARALLELS_HEADER_BYTES] = {0};
    uint64_t data_offset, size = align_up(o->size, PARALLELS_SECTOR);
    uint32_t entries;
    int r = layout_compute(o, size, &entries, &data_offset, e);
    if (r)
        return r;
    memcpy(h, PARALLELS_MAGIC_NEW, 16);
    le32_store(h + PARALLELS_AT_VERSION, 2);
    le32_store(h + PARALLELS_AT_HEADS, 16);
    le32_store(h + PARALLELS_AT_CYLINDERS,
               (uint32_t)min_u64(UINT32_MAX, size / PARALLELS_SECTOR / 16 / 32));
    le32_store(h + PARALLELS_AT_TRACKS, (uint32_t)(o->cluster_size / PARALLELS_SECTOR));
    le32_store(h + PARALLELS_AT_ENTRIES, entries);
    le64_store(h + PARALLELS_AT_SECTORS, size / PARALLELS_SECTOR);
    le32_store(h + PARALLELS_AT_DATA, (uint32_t)(data_offset / PARALLELS_SECTOR));
    r = disk_resize_co(file, data_offset, PREALLOC_OFF, e);
    if (r)
        return r;
    if (!(file->storage_flags & STORAGE_ZERO_INIT))
        r = disk_zero_co(file, 0, data_offset, 0);
    if (!r)
        r = disk_pwrite_co(file, 0, h, sizeof(h));
    return r ? err_errno(e, -r, "writing the header") : 0;
}

int parallels_measure(const void *create_opts, const struct measure_in *in,
                      struct measure_result *out, struct err *e) {
    const struct parallels_create_opts *o = create_opts;
    uint64_t data_offset;
    uint32_t entries;
    int r = layout_compute(o, in->size, &entries, &data_offset, e);
    if (r)
        return r;
    out->required = data_offset + in->touched[__builtin_ctzll(o->cluster_size)] * o->cluster_size;
    out->fully_allocated = data_offset + entries * o->cluster_size;
    out->bound_required = out->required;
    out->bound_fully = out->fully_allocated;
    return 0;
}

/* The table has room up to the data; its entries there are made free. */
int parallels_reach_co(struct node *n, uint64_t size, struct err *e) {
    struct parallels *s = parallels_of(n);
    uint64_t entries = div_up(size, s->cluster_size);
    uint64_t room = (s->data_offset - PARALLELS_HEADER_BYTES) / 4;
    if (size % PARALLELS_SECTOR)
        return err_set(e, EINVAL, "size %" PRIu64 " is not a multiple of 512", size);
    if (entries > room || entries > PARALLELS_ENTRIES_MAX) {
        err_set(e, ENOTSUP,
                "%" PRIu64
                " clusters are needed, and the table of this image has room for %" PRIu64,
                entries, room);
        err_hint(e, "convert it to a new image, or grow it in another format");
        return -ENOTSUP;
    }
    if (entries <= s->entries)
        return 0;
    int r = parallels_flush_co(n);
    if (!r)
        r = disk_zero_co(s->file, PARALLELS_HEADER_BYTES + (uint64_t)s->entries * 4,
                         (entries - s->entries) * 4, 0);
    if (!r)
        r = pages_forget_all(&s->pages);
    if (r < 0)
        return err_errno(e, -r, "making the table longer");
    s->entries = (uint32_t)entries;
    return 0;
}

int parallels_resize_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    struct parallels *s = parallels_of(n);
    uint8_t before[PARALLELS_HEADER_BYTES];
    if (prealloc != PREALLOC_OFF)
        return err_set(e, ENOTSUP, "a Parallels image grows without preallocation only");
    if (size < n->size)
        return err_set(e, ENOTSUP, "a Parallels image cannot shrink; convert it instead");
    if (s->unit == PARALLELS_SECTOR && size / PARALLELS_SECTOR > UINT32_MAX)
        return err_set(e, EFBIG, "size %" PRIu64 " is above the limit of this kind of image", size);
    memcpy(before, s->header, sizeof(before));
    if (s->unit == PARALLELS_SECTOR)
        le32_store(s->header + PARALLELS_AT_SECTORS, (uint32_t)(size / PARALLELS_SECTOR));
    else
        le64_store(s->header + PARALLELS_AT_SECTORS, size / PARALLELS_SECTOR);
    le32_store(s->header + PARALLELS_AT_ENTRIES, s->entries);
    /* An old image that does not say where its data begins says it from now on. */
    le32_store(s->header + PARALLELS_AT_DATA, (uint32_t)(s->data_offset / PARALLELS_SECTOR));
    int r = parallels_header_write_co(s);
    if (r < 0) {
        memcpy(s->header, before, sizeof(before));
        return err_errno(e, -r, "writing the header");
    }
    n->size = size;
    return 0;
}
