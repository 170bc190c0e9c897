/* SPDX-License-Identifier: MIT */
/*
 * cloop: a compressed file system image of live CDs, read only.
 *
 *      0 (128 bytes)   128          132     136
 *      | shell script | block size | count | count + 1 offsets | zlib streams, one a block |
 *
 * Numbers are big-endian.  Block i's stream is [offset i, offset i + 1), and each fills a whole
 * block.
 *
 * Facts: KlausKnopper/cloop (cloop.h, create_compressed_fs.c).
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <libdeflate.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "format/pages.h"

#define HEADER_BYTES 136u
#define BLOCK_MAX (64u << 20)
#define CODE_MAX (2 * BLOCK_MAX)
#define TABLE_BYTES_MAX ((uint64_t)512 << 20)
#define PAGES_BYTES (8 * MIB)

static const char preamble[] =
    "#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 ";

struct cloop {
    uint32_t block_size, blocks;
    struct pages pages;
};

static int cloop_decode(const void *in, size_t in_len, void *out, size_t out_len) {
    struct libdeflate_decompressor *d = libdeflate_alloc_decompressor();
    if (!d)
        return -ENOMEM;
    enum libdeflate_result r = libdeflate_zlib_decompress(d, in, in_len, out, out_len, NULL);
    libdeflate_free_decompressor(d);
    return r == LIBDEFLATE_SUCCESS ? 0 : -EIO;
}

static const struct codec cloop_codec = {.name = "zlib", .decode = cloop_decode};

/* Low: the text could be that of any script. */
static int cloop_probe(const struct probe_data *p) {
    size_t length = sizeof(preamble) - 1;
    return p->head_length >= HEADER_BYTES && !memcmp(p->head, preamble, length) ? 2 : 0;
}

static int cloop_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct cloop *s = n->state;
    uint8_t buf[HEADER_BYTES];
    int r = node_open_child_co(n, ctx, "file", CHILD_FILE_METADATA, &n->file, e);
    if (!r && node_is_rw(n))
        r = err_set(e, EROFS, "images of format 'cloop' can only be read");
    if (!r && (r = disk_pread_co(n->file, 0, buf, sizeof(buf))) < 0)
        err_errno(e, -r, "reading the header");
    if (r)
        return r;
    s->block_size = be32_load(buf + 128);
    s->blocks = be32_load(buf + 132);
    uint64_t table = ((uint64_t)s->blocks + 1) * 8;
    if (!s->block_size || s->block_size % 512 || s->block_size > BLOCK_MAX)
        return err_set(e, EINVAL, "block size %" PRIu32 " is not whole sectors up to %u bytes",
                       s->block_size, BLOCK_MAX);
    if (table > TABLE_BYTES_MAX)
        return err_set(e, EFBIG, "%" PRIu32 " blocks are above the limit of %" PRIu64, s->blocks,
                       TABLE_BYTES_MAX / 8 - 1);
    if (HEADER_BYTES + table > n->file->size)
        return err_set(e, EINVAL,
                       "the table of %" PRIu32
                       " blocks reaches behind the end of the file (%" PRIu64 " bytes)",
                       s->blocks, n->file->size);
    if (pages_init(&s->pages, n->file, PAGES_BYTES) < 0)
        return err_set(e, ENOMEM, "no memory for the table");
    n->size = (uint64_t)s->blocks * s->block_size;
    n->granularity = 512;
    return 0;
}

static void cloop_close_co(struct node *n) {
    pages_free(&((struct cloop *)n->state)->pages);
}

static int block_offset_co(struct cloop *s, uint32_t block, uint64_t *offset) {
    uint64_t at = (uint64_t)block * 8, bytes = ((uint64_t)s->blocks + 1) * 8;
    uint64_t start = at / PAGE_BYTES * PAGE_BYTES;
    struct page *page;
    int r = pages_get_co(&s->pages, HEADER_BYTES + start,
                         (uint32_t)min_u64(PAGE_BYTES, bytes - start), 0, &page);
    if (!r)
        *offset = be64_load(page->data + (at - start));
    return r;
}

static int cloop_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    struct cloop *s = n->state;
    uint32_t block = (uint32_t)(offset / s->block_size);
    uint64_t from, to;
    int r = block_offset_co(s, block, &from);
    if (!r)
        r = block_offset_co(s, block + 1, &to);
    if (r < 0)
        return r;
    if (from >= to || to - from > CODE_MAX || from >= n->file->size || to > n->file->size)
        return -EIO;
    *out = (struct extent){
        .kind = EXTENT_CODED,
        .length = min_u64(length, s->block_size - offset % s->block_size),
        .storage = n->file,
        .host_offset = from,
        .codec = &cloop_codec,
        .unit_offset = (uint64_t)block * s->block_size,
        .unit_length = s->block_size,
        .coded_length = (uint32_t)(to - from),
    };
    return 0;
}

static json_t *cloop_describe(struct node *n) {
    const struct cloop *s = n->state;
    return json_pack("{s:I, s:I}", "block-size", (json_int_t)s->block_size, "blocks",
                     (json_int_t)s->blocks);
}

static const struct opt cloop_opts[] = {OPT_CHILD("file", OPT_OPEN, "the storage"), OPT_END};

static const struct format_ops cloop_format = {
    .probe = cloop_probe, .map_co = cloop_map_co, .describe = cloop_describe};

const struct driver driver_cloop = {
    .name = "cloop",
    .kind = DRIVER_FORMAT,
    .help = "compressed loop image, read only",
    .state_size = sizeof(struct cloop),
    .opts = cloop_opts,
    .open_co = cloop_open_co,
    .close_co = cloop_close_co,
    .format = &cloop_format,
};
