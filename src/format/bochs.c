/* SPDX-License-Identifier: MIT */
/*
 * Bochs "redolog" images of the growing kind, read only.
 *
 *      | header | catalog: u32 an extent | slots: bitmap, data | ...
 *
 * A catalog entry is the number of a slot, or NONE.  A slot is the bitmap of an extent, one bit a
 * sector, lowest first, in whole sectors, and the extent's data.  A sector whose bit is clear reads
 * as zeros.  Numbers are little-endian; version 1 and 2 differ in where the size lies.
 *
 * Facts: the public header of the reference implementation (bochs-emu/Bochs iodev/hdimage).
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "format/pages.h"

#define HEADER_BYTES 512u
#define SECTOR 512u
#define NONE 0xffffffffu
#define CATALOG_MAX (1u << 26)
#define EXTENT_MAX (64u << 20)
#define PAGES_BYTES (8 * MIB)

enum field {
    AT_TYPE = 32,
    AT_SUBTYPE = 48,
    AT_VERSION = 64,
    AT_HEADER = 68,
    AT_CATALOG = 72,
    AT_BITMAP = 76,
    AT_EXTENT = 80,
    AT_SIZE_1 = 84,
    AT_SIZE_2 = 88,
};

struct bochs {
    uint32_t entries, bitmap_bytes, extent_bytes; /* the bitmap in whole sectors */
    uint64_t catalog, data;
    struct pages pages;
};

static bool is_magic(const uint8_t *buf) {
    return !memcmp(buf, "Bochs Virtual HD Image", 23) && !memcmp(buf + AT_TYPE, "Redolog", 8);
}

static int bochs_probe(const struct probe_data *p) {
    return p->head_length >= HEADER_BYTES && is_magic(p->head) ? 100 : 0;
}

static int parse_header(struct node *n, const uint8_t *buf, struct err *e) {
    struct bochs *s = n->state;
    uint32_t version = le32_load(buf + AT_VERSION);
    if (!is_magic(buf))
        return err_set(e, EINVAL, "not a Bochs redolog image");
    if (memcmp(buf + AT_SUBTYPE, "Growing", 8)) {
        char kind[17] = "";
        for (int i = 0; i < 16 && buf[AT_SUBTYPE + i]; i++)
            kind[i] = (char)(buf[AT_SUBTYPE + i] >= 0x20 && buf[AT_SUBTYPE + i] < 0x7f
                                 ? buf[AT_SUBTYPE + i]
                                 : '?');
        return err_set(e, ENOTSUP, "redologs of the kind '%s' cannot be read, only 'Growing'",
                       kind);
    }
    if (version != 0x10000 && version != 0x20000)
        return err_set(e, ENOTSUP, "version 0x%08" PRIx32 " is unknown (0x00010000, 0x00020000)",
                       version);
    n->size = le64_load(buf + (version == 0x10000 ? AT_SIZE_1 : AT_SIZE_2));
    s->entries = le32_load(buf + AT_CATALOG);
    s->extent_bytes = le32_load(buf + AT_EXTENT);
    s->catalog = le32_load(buf + AT_HEADER);
    uint32_t bitmap = le32_load(buf + AT_BITMAP);
    if (s->catalog < HEADER_BYTES || s->catalog > MIB)
        return err_set(e, EINVAL, "header size %" PRIu64 " is not from %u to 1 MiB", s->catalog,
                       HEADER_BYTES);
    if (s->extent_bytes < SECTOR || s->extent_bytes > EXTENT_MAX || !is_pow2(s->extent_bytes))
        return err_set(e, EINVAL,
                       "extent size %" PRIu32 " is not a power of two from %u to %u bytes",
                       s->extent_bytes, SECTOR, EXTENT_MAX);
    if (bitmap < div_up(s->extent_bytes / SECTOR, 8) || bitmap > MIB)
        return err_set(e, EINVAL, "bitmaps of %" PRIu32 " bytes for extents of %" PRIu32, bitmap,
                       s->extent_bytes);
    if (s->entries > CATALOG_MAX || n->size > INT64_MAX || n->size % SECTOR ||
        div_up(n->size, s->extent_bytes) > s->entries)
        return err_set(e, EINVAL,
                       "disk size %" PRIu64 " is not whole sectors that a catalog of %" PRIu32
                       " entries (at most %u) holds",
                       n->size, s->entries, CATALOG_MAX);
    s->bitmap_bytes = (uint32_t)align_up(bitmap, SECTOR);
    s->data = s->catalog + (uint64_t)s->entries * 4;
    return 0;
}

static int bochs_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct bochs *s = n->state;
    uint8_t buf[HEADER_BYTES];
    int r = node_open_child_co(n, ctx, "file", CHILD_FILE_METADATA, &n->file, e);
    if (!r && node_is_rw(n))
        r = err_set(e, EROFS, "images of format 'bochs' can only be read");
    if (!r && (r = disk_pread_co(n->file, 0, buf, sizeof(buf))) < 0)
        err_errno(e, -r, "reading the header");
    if (!r)
        r = parse_header(n, buf, e);
    if (!r && s->data > n->file->size)
        r = err_set(e, EINVAL,
                    "the catalog ends at %" PRIu64 ", behind the end of the file (%" PRIu64
                    " bytes)",
                    s->data, n->file->size);
    if (!r && pages_init(&s->pages, n->file, PAGES_BYTES) < 0)
        r = err_set(e, ENOMEM, "no memory for the catalog");
    n->granularity = SECTOR;
    return r;
}

static void bochs_close_co(struct node *n) {
    pages_free(&((struct bochs *)n->state)->pages);
}

/* Pieces of the catalog and of bitmaps do not overlap: each begins at a table of its own. */
static int piece_co(struct bochs *s, uint64_t table, uint64_t bytes, uint64_t at,
                    struct page **page, uint8_t **p, uint32_t *left) {
    uint64_t start = at / PAGE_BYTES * PAGE_BYTES;
    uint32_t length = (uint32_t)min_u64(PAGE_BYTES, bytes - start);
    int r = pages_get_co(&s->pages, table + start, length, 0, page);
    if (r < 0)
        return r;
    *p = (*page)->data + (at - start);
    *left = length - (uint32_t)(at - start);
    return 0;
}

static int bochs_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    struct bochs *s = n->state;
    uint32_t in = offset % s->extent_bytes, left, run = 1;
    uint64_t extent = offset / s->extent_bytes;
    struct page *page;
    uint8_t *p;
    int r = piece_co(s, s->catalog, (uint64_t)s->entries * 4, extent * 4, &page, &p, &left);
    if (r < 0)
        return r;
    uint32_t slot = le32_load(p);
    if (slot == NONE) {
        while (run < left / 4 && (uint64_t)run * s->extent_bytes < in + length &&
               le32_load(p + (size_t)run * 4) == NONE)
            run++;
        *out = (struct extent){.length = min_u64(length, (uint64_t)run * s->extent_bytes - in),
                               .kind = EXTENT_HOLE};
        return 0;
    }
    uint64_t host = s->data + (uint64_t)slot * ((uint64_t)s->bitmap_bytes + s->extent_bytes);
    if (host >= n->file->size)
        return -EIO;
    uint32_t sector = in / SECTOR, bits;
    r = piece_co(s, host, s->bitmap_bytes, sector / 8, &page, &p, &left);
    if (r < 0)
        return r;
    bool set = *p >> sector % 8 & 1;
    bits = (uint32_t)min_u64(left * UINT64_C(8) - sector % 8,
                             (s->extent_bytes - in) / SECTOR + (in % SECTOR != 0));
    for (run = 1; run < bits; run++) {
        uint32_t b = sector % 8 + run;
        if ((p[b / 8] >> b % 8 & 1) != set)
            break;
    }
    *out = (struct extent){.length = min_u64(length, (uint64_t)(sector + run) * SECTOR - in),
                           .kind = set ? EXTENT_DATA : EXTENT_HOLE};
    if (set) {
        out->storage = n->file;
        out->host_offset = host + s->bitmap_bytes + in;
    }
    return 0;
}

static const struct opt bochs_opts[] = {OPT_CHILD("file", OPT_OPEN, "the storage"), OPT_END};

static const struct format_ops bochs_format = {.probe = bochs_probe, .map_co = bochs_map_co};

const struct driver driver_bochs = {
    .name = "bochs",
    .kind = DRIVER_FORMAT,
    .help = "growing disk image of Bochs, read only",
    .state_size = sizeof(struct bochs),
    .opts = bochs_opts,
    .open_co = bochs_open_co,
    .close_co = bochs_close_co,
    .format = &bochs_format,
};
