/* SPDX-License-Identifier: MIT */
/*
 * VDI: the disk image of VirtualBox.
 *
 *      0            64   72        72 + header size      map            data
 *      | banner text |sig|ver| header            |  ...  | u32 a block | blocks, dense |
 *
 * A map entry is FREE (this layer has nothing), ZERO, or the index of a block: its bytes lie at
 * data + index * (extra + block size) + extra.  New blocks are appended; the header counts them.
 * Readers place their next block by that count, so blocks have no gaps and are not given back.
 *
 * Write order of a flush (DESIGN, "Write order"): the count, and the file's length, then a barrier
 * that covers the data too; the map; a barrier.  A crash in between leaves a count above what the
 * map names: unused blocks.
 *
 * Not all that is stored is trusted: blocks beyond the count or the file's end are damage.
 *
 * Facts: the public header of the reference implementation (VDICore.h: structures, versions 0 and
 * 1, image types), and specs of other readers; block sizes other than 1 MiB and extra bytes before
 * blocks are legal there.
 */
#ifndef STRATA_FORMAT_VDI_VDI_H
#define STRATA_FORMAT_VDI_VDI_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "base/opt.h"
#include "disk/driver.h"
#include "disk/node.h"
#include "format/pages.h"
#include "format/spares.h"
#include "runtime/task.h"

struct create_ctx;

#define VDI_SIGNATURE 0xbeda107fu
#define VDI_VERSION_0 0x00000001u /* one in each half: minor 1, major 0 */
#define VDI_VERSION_1 0x00010001u
#define VDI_HEADER_AT 72u /* the part that its own size counts */
#define VDI_HEADER_BYTES 512u
#define VDI_HEADER_SIZE_MIN 0x180u

#define VDI_FREE 0xffffffffu
#define VDI_ZERO 0xfffffffeu
#define VDI_BLOCKS_MAX 0x1fffff80u
#define VDI_BLOCK_SIZE_MIN 4096u
#define VDI_BLOCK_SIZE_MAX (64u << 20)

/* Where fields lie, version 1. */
enum vdi_field {
    VDI_AT_SIGNATURE = 64,
    VDI_AT_VERSION = 68,
    VDI_AT_HEADER_SIZE = 72,
    VDI_AT_TYPE = 76,
    VDI_AT_FLAGS = 80,
    VDI_AT_MAP = 340,
    VDI_AT_DATA = 344,
    VDI_AT_SECTOR_SIZE = 360,
    VDI_AT_SIZE = 368,
    VDI_AT_BLOCK_SIZE = 376,
    VDI_AT_EXTRA = 380,
    VDI_AT_BLOCKS = 384,
    VDI_AT_ALLOCATED = 388,
    VDI_AT_UUID = 392,
    VDI_AT_UUID_MODIFIED = 408,
    VDI_AT_UUID_PARENT = 424,
    VDI_AT_UUID_PARENT_MODIFIED = 440,
};

enum vdi_type { VDI_DYNAMIC = 1, VDI_FIXED, VDI_UNDO, VDI_DIFF };

struct vdi_header {
    uint32_t version, type;
    uint32_t map_offset, data_offset;
    uint64_t size; /* of the disk, whole sectors */
    uint32_t block_size, extra, blocks, allocated;
    uint8_t uuid[16], uuid_modified[16], uuid_parent[16], uuid_parent_modified[16];
};

/* `buf`: the first VDI_HEADER_BYTES of the file.  -EINVAL, -ENOTSUP. Pure. */
int vdi_header_parse(const uint8_t *buf, struct vdi_header *h, struct err *e);
/* As people write it, from the mixed byte order of the header. */
void vdi_uuid_text(const uint8_t *uuid, char out[37]);
bool vdi_uuid_is_null(const uint8_t *uuid);

/* What it does not hold lies in another image. */
static inline bool vdi_has_parent(const struct vdi_header *h) {
    return h->type == VDI_DIFF || !vdi_uuid_is_null(h->uuid_parent);
}

struct vdi {
    struct node *node, *file;
    struct vdi_header h;
    uint8_t header[VDI_HEADER_BYTES]; /* as on storage, but for `allocated` */
    uint32_t stored_count;            /* blocks allocated, on storage */
    uint32_t next;                    /* block index that no name uses, from here on */
    bool scanned;                     /* `next` is known; else the header's count */
    bool modified;                    /* the header has a new modification UUID */
    struct pages pages;
    struct spares spares; /* blocks below `next` */
    struct task_mutex alloc_lock, flush_lock;
};

static inline struct vdi *vdi_of(struct node *n) {
    return n->state;
}
static inline uint64_t vdi_host(const struct vdi_header *h, uint32_t index) {
    return h->data_offset + (uint64_t)index * ((uint64_t)h->extra + h->block_size) + h->extra;
}

/* A block that lies in the file, as far as its length tells: the last one may be cut. */
static inline bool vdi_block_is_sane(const struct vdi *s, uint32_t index) {
    return index < VDI_BLOCKS_MAX && vdi_host(&s->h, index) < s->file->size;
}

/* ---- map.c ---- */
int vdi_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out);
int vdi_place_co(struct node *n, uint64_t offset, uint64_t length, unsigned flags,
                 uint32_t coded_length, struct placement *out);
int vdi_publish_co(struct node *n, const struct placement *p);
void vdi_abandon(struct node *n, const struct placement *p);
int vdi_set_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags);
int vdi_flush_co(struct node *n);
/* Finds `next`, the first index behind all that the map names. */
int vdi_scan_co(struct vdi *s);
/* The header counts `count` blocks at least, and the file is long enough for them. */
int vdi_write_count_co(struct vdi *s, uint32_t count);

/* ---- create.c ---- */
struct vdi_create_opts {
    uint64_t size, block_size;
    bool fixed;
    int preallocation;
    char *backing_file, *backing_fmt;
};
extern const struct opt vdi_create_opt_table[];
int vdi_create_co(struct node *file, const void *create_opts, struct create_ctx *ctx,
                  struct err *e);
int vdi_measure(const void *create_opts, const struct measure_in *in, struct measure_result *out,
                struct err *e);
int vdi_reach_co(struct node *n, uint64_t size, struct err *e);
int vdi_resize_co(struct node *n, uint64_t size, int prealloc, struct err *e);

/* The header names that parent, as it is now. */
int vdi_parent_into_co(const char *image, const char *name, uint8_t *header, struct err *e);
/* Entries [from, to) of the map at `offset`: all free, or each its own block. */
int vdi_map_write_co(struct node *file, uint64_t offset, uint32_t from, uint32_t to, bool identity);

/* ---- relink.c ---- */
int vdi_set_backing_co(struct node *n, const char *name, const char *format, struct err *e);
int vdi_empty_co(struct node *n, struct err *e);

/* ---- check.c ---- */
int vdi_check_co(struct node *n, struct check_result *r, struct err *e);

/* ---- repair.c ---- */
uint32_t vdi_blocks_in_file(const struct vdi *s); /* the last one perhaps in part */
int vdi_repair_errors_co(struct node *n, struct err *e);
int vdi_repair_leaks_co(struct node *n, struct err *e);

#endif
