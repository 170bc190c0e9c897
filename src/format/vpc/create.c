/* SPDX-License-Identifier: MIT */
/*
 * VHD: new images, their size, growth.
 *
 * Without force_size a new disk is rounded up to what cylinders, heads and sectors can tell, as
 * qemu-img does, because readers take that number for the size.  profile=azure makes what that
 * service takes: fixed, exact, whole MiB.
 *
 * A dynamic image grows by a longer block allocation table behind all blocks, which the header then
 * names (in one sector).  A fixed image gets a footer at the new end first; then the old footer,
 * which is data now, is made zeros.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"
#include "disk/open.h"
#include "format/vpc/vpc.h"

#define EPOCH 946684800 /* 2000-01-01 */
#define BLOCK_SIZE ((uint32_t)(2 * MIB))
#define BAT_AT (VPC_FOOTER_BYTES + VPC_HEADER_BYTES)
#define PIECE ((uint32_t)(256 * KIB))

enum { SUBFORMAT_DYNAMIC, SUBFORMAT_FIXED };
static const char *const subformats[] = {"dynamic", "fixed", NULL};
enum { PROFILE_NONE, PROFILE_AZURE };
static const char *const profiles[] = {"none", "azure", NULL};

const struct opt vpc_create_opt_table[] = {
    OPT_SIZE(struct vpc_create_opts, size, "size", OPT_CREATE, 0, OPT_ANY, "size of the disk"),
    OPT_STR(struct vpc_create_opts, backing_file, "backing_file", OPT_CREATE,
            "parent, which makes a differencing image"),
    OPT_STR(struct vpc_create_opts, backing_fmt, "backing_fmt", OPT_CREATE,
            "format of the parent: vpc"),
    OPT_ENUM(struct vpc_create_opts, subformat, "subformat", OPT_CREATE, SUBFORMAT_DYNAMIC,
             subformats, "dynamic: blocks as they are written; fixed: all of them"),
    OPT_BOOL(struct vpc_create_opts, force_size, "force_size", OPT_CREATE, false,
             "the exact size, not rounded up to cylinders, heads and sectors"),
    OPT_ENUM(struct vpc_create_opts, profile, "profile", OPT_CREATE, PROFILE_NONE, profiles,
             "azure: fixed, of exactly whole MiB"),
    OPT_END,
};

struct plan {
    uint64_t size; /* of the disk */
    struct vpc_geometry geometry;
    bool fixed, exact;
    uint32_t blocks;
    const struct vpc_parent *parent; /* of a differencing image, or NULL */
};

static int make_plan(const struct vpc_create_opts *o, uint64_t size, struct plan *p,
                     struct err *e) {
    uint64_t wanted = div_up(size, VPC_SECTOR), limit = VPC_SECTORS_MAX;
    *p = (struct plan){.fixed = o->subformat == SUBFORMAT_FIXED || o->profile == PROFILE_AZURE,
                       .exact = o->force_size || o->profile == PROFILE_AZURE};
    if (o->profile == PROFILE_AZURE)
        wanted = align_up(wanted, MIB / VPC_SECTOR);
    if (size > limit * VPC_SECTOR || wanted > limit)
        return err_set(e, EFBIG,
                       "disk size %" PRIu64 " is above the limit of %" PRIu64 " bytes (2040 GiB)",
                       size, limit * VPC_SECTOR);
    if (p->exact || wanted >= VPC_GEOMETRY_MAX) {
        p->geometry = (struct vpc_geometry){65535, 16, 255};
    } else {
        uint64_t sectors = wanted;
        do
            vpc_geometry(sectors++, &p->geometry);
        while (vpc_geometry_sectors(&p->geometry) < wanted);
        wanted = vpc_geometry_sectors(&p->geometry);
    }
    p->size = wanted * VPC_SECTOR;
    p->blocks = (uint32_t)div_up(p->size, BLOCK_SIZE);
    return 0;
}

static int make_footer(const struct plan *p, uint8_t *buf, struct err *e) {
    memset(buf, 0, VPC_FOOTER_BYTES);
    memcpy(buf, "conectix", 8);
    be32_store(buf + VPC_AT_FEATURES, 2);
    be32_store(buf + VPC_AT_VERSION, 0x00010000);
    be64_store(buf + VPC_AT_DATA, p->fixed ? UINT64_MAX : VPC_FOOTER_BYTES);
    be32_store(buf + VPC_AT_TIME, (uint32_t)(time(NULL) - EPOCH));
    /* By these names readers know which number is the size. */
    memcpy(buf + VPC_AT_CREATOR, p->exact ? "qem2" : "qemu", 4);
    be32_store(buf + VPC_AT_CREATOR_VERSION, 0x00050003);
    memcpy(buf + VPC_AT_CREATOR_OS, "Wi2k", 4);
    be64_store(buf + VPC_AT_ORIGINAL_SIZE, p->size);
    be64_store(buf + VPC_AT_SIZE, p->size);
    be16_store(buf + VPC_AT_CYLINDERS, (uint16_t)p->geometry.cylinders);
    buf[VPC_AT_HEADS] = (uint8_t)p->geometry.heads;
    buf[VPC_AT_TRACK] = (uint8_t)p->geometry.track;
    be32_store(buf + VPC_AT_TYPE, p->fixed ? VPC_FIXED : p->parent ? VPC_DIFF : VPC_DYNAMIC);
    if (getrandom(buf + VPC_AT_UUID, 16, 0) != 16)
        return err_set(e, EIO, "the system gave no random numbers for the UUID");
    buf[VPC_AT_UUID + 6] = (uint8_t)((buf[VPC_AT_UUID + 6] & 0x0f) | 0x40);
    buf[VPC_AT_UUID + 8] = (uint8_t)((buf[VPC_AT_UUID + 8] & 0x3f) | 0x80);
    vpc_set_sum(buf, VPC_FOOTER_BYTES, VPC_AT_SUM);
    return 0;
}

static void make_header(uint8_t *buf, uint32_t entries) {
    memset(buf, 0, VPC_HEADER_BYTES);
    memcpy(buf, "cxsparse", 8);
    be64_store(buf + 8, UINT64_MAX);
    be64_store(buf + VPC_AT_BAT, BAT_AT);
    be32_store(buf + VPC_AT_HEADER_VERSION, 0x00010000);
    be32_store(buf + VPC_AT_ENTRIES, entries);
    be32_store(buf + VPC_AT_BLOCK, BLOCK_SIZE);
    vpc_set_sum(buf, VPC_HEADER_BYTES, VPC_AT_HEADER_SUM);
}

/* `bytes` of unused entries at `offset`. */
static int write_unused_co(struct node *file, uint64_t offset, uint64_t bytes) {
    uint8_t *buf = buf_get(PIECE);
    int r = buf ? 0 : -ENOMEM;
    if (buf)
        memset(buf, 0xff, PIECE);
    while (!r && bytes) {
        uint32_t n = (uint32_t)min_u64(PIECE, bytes);
        r = disk_pwrite_co(file, offset, buf, n);
        offset += n;
        bytes -= n;
    }
    buf_put(buf, PIECE);
    return r;
}

/* Reads the footer back, as whoever takes the image will. */
static int verify_co(struct node *file, const struct plan *p, struct err *e) {
    uint8_t buf[VPC_FOOTER_BYTES];
    struct vpc_footer f;
    int r = disk_pread_co(file, p->size, buf, sizeof(buf));
    if (r)
        return err_errno(e, -r, "reading the footer back");
    r = vpc_footer_parse(buf, &f, e);
    if (r)
        return err_prefix(e, "reading the footer back");
    if (f.current_size != p->size || file->size != p->size + VPC_FOOTER_BYTES || p->size % MIB)
        return err_set(e, EIO,
                       "the image has %" PRIu64 " bytes of disk in %" PRIu64
                       " of file, not whole MiB and a footer",
                       f.current_size, file->size);
    return 0;
}

/* A differencing image has the size of its parent, to the sector. */
static int plan_child(const struct vpc_create_opts *o, const struct vpc_parent *parent,
                      struct plan *p, struct err *e) {
    if (p->fixed)
        return err_set(e, EINVAL, "a differencing image is not fixed");
    if (o->size != parent->size)
        return err_set(e, EINVAL,
                       "a differencing image has the size of its parent, %" PRIu64
                       " bytes, not %" PRIu64,
                       parent->size, o->size);
    p->size = parent->size;
    p->geometry = parent->f.geometry;
    p->exact = true;
    p->blocks = (uint32_t)div_up(p->size, BLOCK_SIZE);
    p->parent = parent;
    return 0;
}

static int find_parent_co(const struct vpc_create_opts *o, const char *image, struct plan *p,
                          struct vpc_parent **out, struct err *e) {
    if (o->backing_fmt && strcmp(o->backing_fmt, "vpc"))
        return err_set(e, ENOTSUP, "the parent of a VHD image is a VHD image, not '%s'",
                       o->backing_fmt);
    if (!o->backing_file)
        return 0;
    *out = calloc(1, sizeof(**out));
    if (!*out)
        return err_set(e, ENOMEM, "no memory for the parent's name");
    int r = vpc_parent_make_co(image, o->backing_file, *out, e);
    return r ? r : plan_child(o, *out, p, e);
}

static int create_planned_co(struct node *file, const struct plan *plan, const uint8_t *footer,
                             struct err *e);

int vpc_create_co(struct node *file, const void *create_opts, struct create_ctx *ctx,
                  struct err *e) {
    const struct vpc_create_opts *o = create_opts;
    uint8_t footer[VPC_FOOTER_BYTES];
    struct vpc_parent *parent = NULL;
    struct plan p;
    int r = make_plan(o, o->size, &p, e);
    if (!r)
        r = find_parent_co(o, ctx->name, &p, &parent, e);
    if (!r)
        r = make_footer(&p, footer, e);
    if (!r)
        r = create_planned_co(file, &p, footer, e);
    free(parent);
    if (r)
        return r;
    return o->profile == PROFILE_AZURE ? verify_co(file, &p, e) : 0;
}

static int create_planned_co(struct node *file, const struct plan *p, const uint8_t *footer,
                             struct err *e) {
    uint64_t bat = align_up((uint64_t)p->blocks * 4, VPC_SECTOR), locator = BAT_AT + bat;
    uint64_t end = p->fixed    ? p->size
                   : p->parent ? locator + align_up(p->parent->path_bytes, VPC_SECTOR)
                               : locator;
    int r = disk_resize_co(file, end + VPC_FOOTER_BYTES, PREALLOC_OFF, e);
    if (r)
        return r;
    if (!p->fixed) {
        uint8_t *header = buf_get(VPC_HEADER_BYTES);
        if (!header)
            return err_set(e, ENOMEM, "no memory for the header");
        make_header(header, p->blocks);
        if (p->parent)
            vpc_parent_store(p->parent, locator, header);
        r = write_unused_co(file, BAT_AT, bat);
        if (!r && p->parent)
            r = disk_pwrite_co(file, locator, p->parent->path, p->parent->path_bytes);
        if (!r)
            r = disk_pwrite_co(file, VPC_FOOTER_BYTES, header, VPC_HEADER_BYTES);
        if (!r)
            r = disk_pwrite_co(file, 0, footer, VPC_FOOTER_BYTES);
        buf_put(header, VPC_HEADER_BYTES);
    }
    if (!r)
        r = disk_pwrite_co(file, end, footer, VPC_FOOTER_BYTES);
    return r ? err_errno(e, -r, "writing the footer and the tables") : 0;
}

int vpc_measure(const void *create_opts, const struct measure_in *in, struct measure_result *out,
                struct err *e) {
    struct plan p;
    int r = make_plan(create_opts, in->size, &p, e);
    if (r)
        return r;
    uint64_t fixed = BAT_AT + align_up((uint64_t)p.blocks * 4, VPC_SECTOR) + VPC_FOOTER_BYTES;
    uint64_t block = BLOCK_SIZE + align_up(BLOCK_SIZE / VPC_SECTOR / 8, VPC_SECTOR);
    out->fully_allocated = p.fixed ? p.size + VPC_FOOTER_BYTES : fixed + p.blocks * block;
    out->required =
        p.fixed ? out->fully_allocated : fixed + in->touched[__builtin_ctz(BLOCK_SIZE)] * block;
    out->bound_required = out->required;
    out->bound_fully = out->fully_allocated;
    return 0;
}

/* ---------------------------------------------------------------- growth */

static int check_growth(const struct vpc *s, uint64_t size, struct err *e) {
    if (size % VPC_SECTOR || size / VPC_SECTOR > VPC_SECTORS_MAX)
        return err_set(e, EFBIG, "size %" PRIu64 " is not whole sectors up to %" PRIu64 " bytes",
                       size, VPC_SECTORS_MAX * VPC_SECTOR);
    if (s->f.type == VPC_DIFF)
        return err_set(e, ENOTSUP, "a differencing image has the size of its parent");
    return 0;
}

/* A table for `entries` blocks behind everything, the present entries in front. */
static int move_bat_co(struct vpc *s, uint32_t entries) {
    uint64_t at, bytes = align_up((uint64_t)entries * 4, VPC_SECTOR);
    uint64_t *full = calloc(entries / 64 + 1, sizeof(uint64_t));
    uint8_t *buf = buf_get(PIECE);
    int r = full && buf ? 0 : -ENOMEM;
    if (!r && !s->scanned)
        r = vpc_scan_co(s);
    if (!r)
        r = vpc_flush_co(s->node);
    if (!r)
        r = pages_forget_all(&s->pages);
    at = s->end;
    if (!r) /* over the footer, whose copy stands in front */
        r = write_unused_co(s->file, at, bytes);
    for (uint64_t done = 0; !r && done < s->h.entries * UINT64_C(4);) {
        uint32_t n = (uint32_t)min_u64(PIECE, s->h.entries * UINT64_C(4) - done);
        r = disk_pread_co(s->file, s->h.bat_offset + done, buf, n);
        if (!r)
            r = disk_pwrite_co(s->file, at + done, buf, n);
        done += n;
    }
    if (!r)
        r = disk_pwrite_co(s->file, at + bytes, s->footer, VPC_FOOTER_BYTES);
    if (!r)
        r = disk_flush_co(s->file);
    if (!r) {
        uint8_t header[VPC_SECTOR], before[VPC_SECTOR];
        memcpy(before, s->header, VPC_SECTOR);
        be64_store(s->header + VPC_AT_BAT, at);
        be32_store(s->header + VPC_AT_ENTRIES, entries);
        vpc_set_sum(s->header, VPC_HEADER_BYTES, VPC_AT_HEADER_SUM);
        memcpy(header, s->header, VPC_SECTOR);
        r = disk_pwrite_co(s->file, s->f.data_offset, header, VPC_SECTOR);
        if (r < 0)
            memcpy(s->header, before, VPC_SECTOR);
    }
    if (!r)
        r = disk_flush_co(s->file);
    if (!r) {
        memcpy(full, s->full, (s->h.entries / 64 + 1) * sizeof(uint64_t));
        uint64_t *was = s->full;
        s->full = full;
        full = was;
        s->h.bat_offset = at;
        s->h.entries = entries;
        s->end = at + bytes;
    }
    free(full);
    buf_put(buf, PIECE);
    return r;
}

int vpc_reach_co(struct node *n, uint64_t size, struct err *e) {
    struct vpc *s = vpc_of(n);
    int r = check_growth(s, size, e);
    if (r || s->fixed)
        return r;
    uint32_t blocks = (uint32_t)div_up(n->size, s->h.block_size);
    uint32_t entries = (uint32_t)div_up(size, s->h.block_size);
    if (entries > s->h.entries)
        r = move_bat_co(s, entries);
    if (!r) /* writers leave anything in entries that no block has needed */
        r = vpc_forget_blocks_co(s, blocks, entries);
    return r < 0 ? err_errno(e, -r, "making the block allocation table longer") : 0;
}

static void size_into_footer(struct vpc *s, uint64_t size, uint8_t *footer) {
    struct vpc_geometry g = {65535, 16, 255};
    memcpy(footer, s->footer, VPC_FOOTER_BYTES);
    be64_store(footer + VPC_AT_SIZE, size);
    vpc_geometry(size / VPC_SECTOR, &g);
    if (vpc_geometry_sectors(&g) * VPC_SECTOR != size) {
        /* Cylinders cannot tell it: a maker whose images go by the size in bytes. */
        g = (struct vpc_geometry){65535, 16, 255};
        memcpy(footer + VPC_AT_CREATOR, "qem2", 4);
    }
    be16_store(footer + VPC_AT_CYLINDERS, (uint16_t)g.cylinders);
    footer[VPC_AT_HEADS] = (uint8_t)g.heads;
    footer[VPC_AT_TRACK] = (uint8_t)g.track;
    vpc_set_sum(footer, VPC_FOOTER_BYTES, VPC_AT_SUM);
}

static int grow_fixed_co(struct vpc *s, uint64_t size, int prealloc, const uint8_t *footer) {
    uint64_t old = s->node->size;
    int r = disk_resize_co(s->file, size + VPC_FOOTER_BYTES, prealloc, NULL);
    if (!r)
        r = disk_pwrite_co(s->file, size, footer, VPC_FOOTER_BYTES);
    if (!r)
        r = disk_flush_co(s->file);
    if (!r)
        r = disk_zero_co(s->file, old, min_u64(VPC_FOOTER_BYTES, size - old), 0);
    return r;
}

static int grow_dynamic_co(struct vpc *s, const uint8_t *footer) {
    if (!s->scanned) {
        int r = vpc_scan_co(s);
        if (r)
            return r;
    }
    int r = disk_pwrite_co(s->file, s->end, footer, VPC_FOOTER_BYTES);
    if (!r)
        r = disk_flush_co(s->file);
    if (!r) /* the copy in front counts */
        r = disk_pwrite_co(s->file, 0, footer, VPC_FOOTER_BYTES);
    return r;
}

int vpc_resize_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    struct vpc *s = vpc_of(n);
    uint8_t footer[VPC_FOOTER_BYTES];
    int r = check_growth(s, size, e);
    if (r)
        return r;
    if (size < n->size)
        return err_set(e, ENOTSUP, "a VHD image cannot shrink; convert it instead");
    if (!s->fixed && prealloc != PREALLOC_OFF)
        return err_set(e, ENOTSUP, "a dynamic VHD image grows without preallocation only");
    if (size == n->size)
        return 0;
    size_into_footer(s, size, footer);
    r = s->fixed ? grow_fixed_co(s, size, prealloc, footer) : grow_dynamic_co(s, footer);
    if (r < 0)
        return err_errno(e, -r, "writing the footer");
    memcpy(s->footer, footer, sizeof(footer));
    vpc_footer_parse(s->footer, &s->f, NULL);
    n->size = size;
    return 0;
}
