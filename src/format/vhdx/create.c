/* SPDX-License-Identifier: MIT */
/*
 * VHDX: new images and their size.
 *
 * Log, BAT and metadata lie one behind the other from 1 MiB on.  The flags of regions and metadata
 * are those of the specification: both regions and all items are required.  A fixed image has room
 * for all blocks, and says that they are present, unless block_state_zero=on asks for the state
 * that reads as zeros without looking.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/version.h"
#include "disk/io.h"
#include "disk/open.h"
#include "format/utf16.h"
#include "format/vhdx/vhdx.h"

#define PIECE ((uint32_t)(256 * KIB))
#define METADATA_BYTES (UINT64_C(2) * VHDX_METADATA_TABLE_BYTES) /* that are written */

enum { SUBFORMAT_DYNAMIC, SUBFORMAT_FIXED };
static const char *const subformats[] = {"dynamic", "fixed", NULL};

const struct opt vhdx_create_opt_table[] = {
    OPT_SIZE(struct vhdx_create_opts, size, "size", OPT_CREATE, 0, OPT_ANY, "size of the disk"),
    OPT_STR(struct vhdx_create_opts, backing_file, "backing_file", OPT_CREATE,
            "parent, which makes a differencing image"),
    OPT_STR(struct vhdx_create_opts, backing_fmt, "backing_fmt", OPT_CREATE,
            "format of the parent: vhdx"),
    OPT_SIZE(struct vhdx_create_opts, log_size, "log_size", OPT_CREATE, MIB,
             OPT_RANGE(MIB, VHDX_LOG_MAX), "room for the log, whole MiB"),
    OPT_SIZE(struct vhdx_create_opts, block_size, "block_size", OPT_CREATE, 0,
             OPT_RANGE(0, VHDX_BLOCK_MAX),
             "allocation unit, a power of two from 1M to 256M; 0: by the disk's size"),
    OPT_ENUM(struct vhdx_create_opts, subformat, "subformat", OPT_CREATE, SUBFORMAT_DYNAMIC,
             subformats, "dynamic: blocks as they are written; fixed: all of them"),
    OPT_GIVEN_BOOL(struct vhdx_create_opts, block_state_zero, zero_given, "block_state_zero",
                   OPT_CREATE,
                   "blocks never written are said to be zeros (dynamic: on, fixed: off)"),
    OPT_SIZE(struct vhdx_create_opts, logical_sector, "logical_sector_size", OPT_CREATE, 512,
             OPT_RANGE(512, 4096), "sectors that a guest sees, 512 or 4096"),
    OPT_SIZE(struct vhdx_create_opts, physical_sector, "physical_sector_size", OPT_CREATE, 0,
             OPT_RANGE(0, 4096), "sectors that a guest should write, 512 or 4096; 0: as logical"),
    OPT_END,
};

struct plan {
    struct vhdx_metadata m;
    struct vhdx_range log, bat, metadata;
    uint64_t entries, blocks, data; /* where the first block goes */
    uint64_t entry;                 /* of a block that was never written */
};

static uint64_t default_block(uint64_t size) {
    return size > 32 * TIB    ? 64 * MIB
           : size > 100 * GIB ? 32 * MIB
           : size > GIB       ? 16 * MIB
                              : 8 * MIB;
}

static int check_options(const struct vhdx_create_opts *o, struct err *e) {
    if (o->log_size % MIB)
        return err_set(e, EINVAL, "log_size %" PRIu64 " is not a multiple of 1 MiB", o->log_size);
    if (o->block_size && (o->block_size < VHDX_BLOCK_MIN || !is_pow2(o->block_size)))
        return err_set(e, EINVAL,
                       "block_size %" PRIu64 " is not a power of two from 1 MiB to 256 MiB",
                       o->block_size);
    if ((o->logical_sector != 512 && o->logical_sector != 4096) ||
        (o->physical_sector && o->physical_sector != 512 && o->physical_sector != 4096))
        return err_set(e, EINVAL, "a sector size of 512 or 4096 bytes is possible");
    if (o->backing_fmt && strcmp(o->backing_fmt, "vhdx"))
        return err_set(e, ENOTSUP, "the parent of a VHDX image is a VHDX image, not '%s'",
                       o->backing_fmt);
    if (o->backing_file && o->subformat == SUBFORMAT_FIXED)
        return err_set(e, EINVAL, "a differencing image is not fixed");
    return 0;
}

static int make_plan(const struct vhdx_create_opts *o, uint64_t size, struct plan *p,
                     struct err *e) {
    int r = check_options(o, e);
    if (r)
        return r;
    if (size > VHDX_SIZE_MAX)
        return err_set(e, EFBIG,
                       "disk size %" PRIu64 " is above the limit of %" PRIu64 " bytes (64 TiB)",
                       size, VHDX_SIZE_MAX);
    bool fixed = o->subformat == SUBFORMAT_FIXED, parent = o->backing_file != NULL;
    bool zero = o->zero_given ? o->block_state_zero : !fixed;
    *p = (struct plan){
        .m = {.block_size = (uint32_t)(o->block_size ? o->block_size : default_block(size)),
              .logical_sector = (uint32_t)o->logical_sector,
              .physical_sector =
                  (uint32_t)(o->physical_sector ? o->physical_sector : o->logical_sector),
              .fixed = fixed,
              .has_parent = parent,
              .size = align_up(size, o->logical_sector)},
        .log = {VHDX_MIB, o->log_size},
        .entry = parent  ? VHDX_NOT_PRESENT
                 : zero  ? VHDX_ZERO
                 : fixed ? VHDX_PRESENT
                         : VHDX_NOT_PRESENT,
    };
    p->entries = vhdx_bat_entries(&p->m, p->m.size);
    p->blocks = div_up(p->m.size, p->m.block_size);
    p->bat = (struct vhdx_range){p->log.offset + p->log.length,
                                 max_u64(align_up(p->entries * 8, VHDX_MIB), VHDX_MIB)};
    p->metadata = (struct vhdx_range){p->bat.offset + p->bat.length, VHDX_MIB};
    p->data = p->metadata.offset + p->metadata.length;
    return 0;
}

static int write_bat_co(struct node *file, const struct plan *p) {
    uint32_t ratio = vhdx_ratio(&p->m);
    uint64_t block = 0;
    if (!p->entry)
        return file->storage_flags & STORAGE_ZERO_INIT
                   ? 0
                   : disk_zero_co(file, p->bat.offset, p->bat.length, 0);
    uint8_t *buf = buf_get(PIECE);
    int r = buf ? 0 : -ENOMEM;
    for (uint64_t done = 0; !r && done < p->bat.length; done += PIECE) {
        uint64_t from = done / 8;
        if (from >= p->entries && file->storage_flags & STORAGE_ZERO_INIT)
            break;
        memset(buf, 0, PIECE);
        for (uint64_t i = from; i < from + PIECE / 8 && block < p->blocks; i++) {
            if (i % (ratio + UINT64_C(1)) == ratio)
                continue;
            uint64_t host = p->m.fixed ? p->data + block * p->m.block_size : 0;
            le64_store(buf + (i - from) * 8, host | p->entry);
            block++;
        }
        r = disk_pwrite_co(file, p->bat.offset + done, buf, PIECE);
    }
    buf_put(buf, PIECE);
    return r;
}

static int write_metadata_co(struct node *file, const struct plan *p, const uint8_t *locator,
                             uint32_t locator_bytes) {
    uint8_t *buf = buf_get(METADATA_BYTES);
    if (!buf)
        return -ENOMEM;
    vhdx_metadata_store(&p->m, locator, locator_bytes, buf);
    int r = disk_pwrite_co(file, p->metadata.offset, buf, METADATA_BYTES);
    if (!r) {
        vhdx_regions_store(&p->bat, &p->metadata, buf);
        for (int i = 0; !r && i < 2; i++)
            r = disk_pwrite_co(file, VHDX_REGIONS_AT(i), buf, VHDX_REGION_TABLE_BYTES);
    }
    buf_put(buf, METADATA_BYTES);
    return r;
}

static int write_front_co(struct node *file, const struct plan *p) {
    struct vhdx_header h = {
        .sequence = 1, .log_offset = p->log.offset, .log_length = (uint32_t)p->log.length};
    uint8_t *buf = buf_get(VHDX_HEADER_BYTES);
    int r = buf ? 0 : -ENOMEM;
    if (!r && (vhdx_guid_random(&h.file_write) || vhdx_guid_random(&h.data_write)))
        r = -EIO;
    for (int i = 0; !r && i < 2; i++, h.sequence++) {
        vhdx_header_store(&h, buf);
        r = disk_pwrite_co(file, VHDX_HEADER_AT(i), buf, VHDX_HEADER_BYTES);
    }
    if (!r) {
        memset(buf, 0, VHDX_HEADER_BYTES);
        memcpy(buf, "vhdxfile", 8);
        utf16_from_path("strata " STRATA_VERSION, false, buf + 8, 512);
        r = disk_pwrite_co(file, 0, buf, VHDX_HEADER_BYTES);
    }
    buf_put(buf, VHDX_HEADER_BYTES);
    return r;
}

/* What a new image holds must not be looked for in an old log. */
static int clear_co(struct node *file, const struct plan *p, uint64_t end) {
    if (file->storage_flags & STORAGE_ZERO_INIT)
        return 0;
    int r = disk_zero_co(file, 0, p->bat.offset, 0);
    if (!r)
        r = disk_zero_co(file, p->metadata.offset, p->metadata.length, 0);
    return r || end == p->data ? r : disk_zero_co(file, p->data, end - p->data, 0);
}

int vhdx_create_co(struct node *file, const void *create_opts, struct create_ctx *ctx,
                   struct err *e) {
    const struct vhdx_create_opts *o = create_opts;
    uint32_t locator_bytes = 0;
    uint8_t *locator = NULL;
    struct plan p = {0};
    int r = make_plan(o, o->size, &p, e);
    if (!r && vhdx_guid_random(&p.m.disk_id))
        r = err_set(e, EIO, "the system gave no random numbers for the disk's ID");
    if (!r && o->backing_file) {
        locator = buf_get(VHDX_METADATA_TABLE_BYTES);
        r = locator ? vhdx_locator_make_co(ctx->name, o->backing_file, locator, &locator_bytes, e)
                    : err_set(e, ENOMEM, "no memory for the parent locator");
    }
    uint64_t end = p.data + (p.m.fixed ? p.blocks * p.m.block_size : 0);
    if (!r)
        r = disk_resize_co(file, end, PREALLOC_OFF, e);
    if (!r) {
        r = clear_co(file, &p, end);
        if (!r)
            r = write_bat_co(file, &p);
        if (!r)
            r = write_metadata_co(file, &p, locator, locator_bytes);
        if (!r)
            r = write_front_co(file, &p);
        if (r < 0)
            err_errno(e, -r, "writing the headers and tables");
    }
    buf_put(locator, VHDX_METADATA_TABLE_BYTES);
    return r;
}

int vhdx_measure(const void *create_opts, const struct measure_in *in, struct measure_result *out,
                 struct err *e) {
    struct plan p;
    int r = make_plan(create_opts, in->size, &p, e);
    if (r)
        return r;
    uint64_t touched = in->touched[__builtin_ctz(p.m.block_size)];
    out->fully_allocated = p.data + p.blocks * p.m.block_size;
    out->required = p.m.fixed ? out->fully_allocated : p.data + touched * p.m.block_size;
    out->bound_required = out->required;
    out->bound_fully = out->fully_allocated;
    return 0;
}
