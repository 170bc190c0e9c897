/* SPDX-License-Identifier: MIT */
/*
 * VHD ("vpc"): the disk image of Virtual PC and Hyper-V.
 *
 *      fixed        | data ........................................... | footer |
 *      dynamic      | footer copy | header | BAT | blocks ............ | footer |
 *      differencing | the same, over a parent image
 *
 * A BAT entry is the sector of a block, or UNUSED.  A block is a bitmap, one bit a sector, most
 * significant bit first, and the data.  A sector whose bit is clear reads as zeros, in a
 * differencing image as the parent.
 *
 * Numbers are big-endian.  Blocks are appended where the footer was; the copy at the front makes
 * that safe.
 *
 * Writing.  A dynamic image takes room by whole blocks, their bitmaps all ones, since other readers
 * ignore the bitmap; a differencing image by sectors.  Write order of a flush: data and footer, a
 * barrier; bitmaps, a barrier; BAT entries, a barrier.  A crash leaves blocks without a name.
 *
 * Facts: Microsoft's "Virtual Hard Disk Image Format Specification" 1.0; which number is the disk's
 * size, by the program that made the image: behaviour of qemu/qemu block/vpc.c.
 */
#ifndef STRATA_FORMAT_VPC_VPC_H
#define STRATA_FORMAT_VPC_VPC_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "base/opt.h"
#include "disk/driver.h"
#include "disk/node.h"
#include "format/pages.h"
#include "runtime/task.h"

struct create_ctx;

#define VPC_SECTOR 512u
#define VPC_FOOTER_BYTES 512u
#define VPC_HEADER_BYTES 1024u
#define VPC_UNUSED 0xffffffffu
#define VPC_SECTORS_MAX UINT64_C(0xff000000) /* 2040 GiB */
#define VPC_GEOMETRY_MAX (65535u * 16 * 255) /* sectors that cylinders, heads, sectors can tell */
#define VPC_BLOCK_MIN 4096u
#define VPC_BLOCK_MAX (256u << 20)
#define VPC_LOCATORS 8

enum vpc_type { VPC_FIXED = 2, VPC_DYNAMIC, VPC_DIFF };

/* Where fields lie in the footer. */
enum vpc_footer_field {
    VPC_AT_FEATURES = 8,
    VPC_AT_VERSION = 12,
    VPC_AT_DATA = 16,
    VPC_AT_TIME = 24,
    VPC_AT_CREATOR = 28,
    VPC_AT_CREATOR_VERSION = 32,
    VPC_AT_CREATOR_OS = 36,
    VPC_AT_ORIGINAL_SIZE = 40,
    VPC_AT_SIZE = 48,
    VPC_AT_CYLINDERS = 56,
    VPC_AT_HEADS = 58,
    VPC_AT_TRACK = 59,
    VPC_AT_TYPE = 60,
    VPC_AT_SUM = 64,
    VPC_AT_UUID = 68,
};
/* And in the header of dynamic images. */
enum vpc_header_field {
    VPC_AT_BAT = 16,
    VPC_AT_HEADER_VERSION = 24,
    VPC_AT_ENTRIES = 28,
    VPC_AT_BLOCK = 32,
    VPC_AT_HEADER_SUM = 36,
    VPC_AT_PARENT_UUID = 40,
    VPC_AT_PARENT_TIME = 56,
    VPC_AT_PARENT_NAME = 64, /* 256 units of UTF-16, big-endian */
    VPC_AT_LOCATORS = 576,
};

enum vpc_size_rule { VPC_SIZE_AUTO, VPC_SIZE_CURRENT, VPC_SIZE_CHS };

struct vpc_geometry {
    uint32_t cylinders, heads, track;
};

struct vpc_footer {
    uint32_t type;
    uint64_t data_offset, current_size, original_size;
    char creator[5]; /* as text, unprintable bytes as '?' */
    struct vpc_geometry geometry;
    uint8_t uuid[16];
    uint32_t timestamp; /* seconds since 2000 */
};

struct vpc_header {
    uint64_t bat_offset;
    uint32_t entries, block_size;
    uint8_t parent_uuid[16];
};

struct vpc_opts {
    int size_rule;
};

/* ---- layout.c: bytes and numbers, pure ---- */
/* 512 bytes.  -EINVAL: not a whole footer; -ENOTSUP: one of an unknown kind. */
int vpc_footer_parse(const uint8_t *buf, struct vpc_footer *f, struct err *e);
int vpc_header_parse(const uint8_t *buf, struct vpc_header *h, struct err *e); /* 1024 bytes */
void vpc_set_sum(uint8_t *buf, size_t length, size_t at);
/* The disk's size by the rule (AUTO: by the program that made the image). */
uint64_t vpc_disk_size(const struct vpc_footer *f, int rule);
/* Largest geometry of at most `sectors`. */
void vpc_geometry(uint64_t sectors, struct vpc_geometry *g);
static inline uint64_t vpc_geometry_sectors(const struct vpc_geometry *g) {
    return (uint64_t)g->cylinders * g->heads * g->track;
}
void vpc_uuid_text(const uint8_t *uuid, char out[37]);

struct vpc {
    struct node *node, *file;
    struct vpc_footer f;
    struct vpc_header h;
    uint8_t footer[VPC_FOOTER_BYTES], header[VPC_HEADER_BYTES]; /* as on storage */
    bool fixed, footer_moved;
    uint32_t bitmap_bytes; /* of a block, whole sectors */
    uint64_t end;          /* no block uses bytes from here on; known when scanned */
    bool scanned;
    uint64_t *full; /* one bit a block: its bitmap is known to be all ones */
    struct pages pages;
    struct task_mutex alloc_lock, flush_lock;
};

static inline struct vpc *vpc_of(struct node *n) {
    return n->state;
}
enum { VPC_LEVEL_BITMAP, VPC_LEVEL_BAT }; /* of pages */

/* ---- map.c ---- */
int vpc_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out);
int vpc_place_co(struct node *n, uint64_t offset, uint64_t length, unsigned flags,
                 uint32_t coded_length, struct placement *out);
int vpc_publish_co(struct node *n, const struct placement *p);
void vpc_abandon(struct node *n, const struct placement *p);
int vpc_set_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags);
int vpc_flush_co(struct node *n);
int vpc_empty_co(struct node *n, struct err *e);
/* Finds the end of the blocks; before anything is appended. */
int vpc_scan_co(struct vpc *s);
/* Entries [from, to) become unused. */
int vpc_forget_blocks_co(struct vpc *s, uint32_t from, uint32_t to);

/* ---- create.c ---- */
struct vpc_create_opts {
    uint64_t size;
    int subformat, profile;
    bool force_size;
    char *backing_file, *backing_fmt;
};
extern const struct opt vpc_create_opt_table[];
int vpc_create_co(struct node *file, const void *create_opts, struct create_ctx *ctx,
                  struct err *e);
int vpc_measure(const void *create_opts, const struct measure_in *in, struct measure_result *out,
                struct err *e);
int vpc_reach_co(struct node *n, uint64_t size, struct err *e);
int vpc_resize_co(struct node *n, uint64_t size, int prealloc, struct err *e);

/* ---- parent.c ---- */
#define VPC_PATH_MAX 2048u
struct vpc_parent {
    struct vpc_footer f;
    uint64_t size;
    char code[4]; /* of the locator */
    uint32_t path_bytes;
    uint8_t path[VPC_PATH_MAX], name[512];
};
/* Looks at the parent `name` of the new image `image`. */
int vpc_parent_make_co(const char *image, const char *name, struct vpc_parent *p, struct err *e);
/* Into the header; the path goes to `locator_at`. */
void vpc_parent_store(const struct vpc_parent *p, uint64_t locator_at, uint8_t *header);

/* ---- check.c ---- */
int vpc_check_co(struct node *n, struct check_result *r, struct err *e);

#endif
