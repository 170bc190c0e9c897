/* SPDX-License-Identifier: MIT */
/*
 * cloop: a compressed file system image of live CDs.
 *
 *      0 (128 bytes)   128          132     136
 *      | shell script | block size | count | count + 1 offsets | zlib streams, one a block |
 *
 * Numbers are big-endian.  Block i's stream is [offset i, offset i + 1), and each fills a whole
 * block; so every block has a stream, zeros too, and the streams lie in the order of the blocks.
 *
 * Writing.  A new image is written once, from its first block to its last.  Its table holds nothing
 * but zeros, and that is what tells it from a whole one: only then can it be opened to write.  A
 * block that is left out gets the stream of zeros when a later one is placed.  A flush does the
 * same for what is still to come, without counting it as written: what lies there is overwritten by
 * the next block and written anew by the next flush.  So the image is whole after each flush.
 *
 * Invariants (while writing)
 *  1. Blocks below `next` have their streams in [data, end) of the file, and entries up to `next`
 *     say so; blocks from there on read as zeros.
 *  2. `lock` is held over everything that moves next and end.
 *
 * Facts: KlausKnopper/cloop (cloop.h, create_compressed_fs.c).
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <libdeflate.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "format/codec.h"
#include "format/pages.h"

#define HEADER_BYTES 136u
#define BLOCK_MAX (64u << 20)
#define CODE_MAX (2 * BLOCK_MAX)
#define TABLE_BYTES_MAX ((uint64_t)512 << 20)
#define PAGES_BYTES (8 * MIB)

static const char preamble[] =
    "#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 ";
static const char preamble_rest[] = "/dev/cloop $1\nexit $?\n";

#define ZEROS_AT_ONCE MIB
#define EXPANDS 96 /* a stream of a block as it is: 17 pieces of up to 64 KiB, head and sum */

struct cloop {
    uint32_t block_size, blocks;
    struct pages pages;
    bool fresh, changed, broken; /* being written; since the last flush; a write has failed */
    uint32_t next;
    uint64_t end;
    uint8_t *zeros; /* the stream of a block of zeros */
    uint32_t zeros_length;
    struct task_mutex lock;
};

struct cloop_create {
    uint64_t size, block_size;
};

static int cloop_decode(const void *in, size_t in_len, void *out, size_t out_len) {
    struct libdeflate_decompressor *d = libdeflate_alloc_decompressor();
    if (!d)
        return -ENOMEM;
    enum libdeflate_result r = libdeflate_zlib_decompress(d, in, in_len, out, out_len, NULL);
    libdeflate_free_decompressor(d);
    return r == LIBDEFLATE_SUCCESS ? 0 : -EIO;
}

static ssize_t cloop_encode(const void *in, size_t in_len, void *out, size_t out_cap) {
    return codec_vmdk.encode(in, in_len, out, out_cap);
}

static const struct codec cloop_codec = {
    .name = "zlib", .expands = EXPANDS, .decode = cloop_decode, .encode = cloop_encode};

/* Low: the text could be that of any script. */
static int cloop_probe(const struct probe_data *p) {
    size_t length = sizeof(preamble) - 1;
    return p->head_length >= HEADER_BYTES && !memcmp(p->head, preamble, length) ? 2 : 0;
}

/* The page with the entry of `block`, and the entry. */
static int entry_co(struct cloop *s, uint32_t block, struct page **page, uint8_t **entry) {
    uint64_t at = (uint64_t)block * 8, bytes = ((uint64_t)s->blocks + 1) * 8;
    uint64_t start = at / PAGE_BYTES * PAGE_BYTES;
    int r = pages_get_co(&s->pages, HEADER_BYTES + start,
                         (uint32_t)min_u64(PAGE_BYTES, bytes - start), 0, page);
    if (!r)
        *entry = (*page)->data + (at - start);
    return r;
}

static int block_offset_co(struct cloop *s, uint32_t block, uint64_t *offset) {
    struct page *page;
    uint8_t *entry;
    int r = entry_co(s, block, &page, &entry);
    if (!r)
        *offset = be64_load(entry);
    return r;
}

static int set_offset_co(struct cloop *s, uint32_t block, uint64_t offset) {
    struct page *page;
    uint8_t *entry;
    int r = entry_co(s, block, &page, &entry);
    if (!r) {
        pages_modify(&s->pages, page);
        be64_store(entry, offset);
    }
    return r;
}

/* Whether the image is one to be written, and the beginning of that. */
static int begin_co(struct node *n, struct err *e) {
    struct cloop *s = n->state;
    uint64_t first;
    int r = block_offset_co(s, 0, &first);
    if (r < 0)
        return err_errno(e, -r, "reading the table");
    if (!node_is_rw(n))
        return first ? 0 : err_set(e, EINVAL, "the image was never written to its end");
    if (first) {
        err_set(e, EROFS, "images of format 'cloop' are written once and can only be read");
        err_hint(e, "make a new one with `convert -O cloop`");
        return -EROFS;
    }
    if (!is_pow2(s->block_size) || s->block_size > MIB)
        return err_set(e, EINVAL, "blocks of %" PRIu32 " bytes cannot be written", s->block_size);
    s->fresh = s->changed = true;
    s->end = HEADER_BYTES + ((uint64_t)s->blocks + 1) * 8;
    task_mutex_init(&s->lock);
    n->granularity = s->block_size;
    n->codec = &cloop_codec;
    n->coded_only = true;
    uint8_t *zeros AUTO_FREE = calloc(1, s->block_size);
    s->zeros = malloc(s->block_size + EXPANDS);
    ssize_t length = zeros && s->zeros
                         ? cloop_encode(zeros, s->block_size, s->zeros, s->block_size + EXPANDS)
                         : -ENOMEM;
    if (length < 0)
        return err_errno(e, (int)-length, "the block of zeros");
    s->zeros_length = (uint32_t)length;
    r = set_offset_co(s, 0, s->end);
    return r < 0 ? err_errno(e, -r, "reading the table") : 0;
}

static int cloop_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct cloop *s = n->state;
    uint8_t buf[HEADER_BYTES];
    int r = node_open_child_co(n, ctx, "file", CHILD_FILE_METADATA, &n->file, e);
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
    return begin_co(n, e);
}

static void cloop_close_co(struct node *n) {
    struct cloop *s = n->state;
    pages_free(&s->pages);
    free(s->zeros);
    s->zeros = NULL;
}

static int cloop_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    struct cloop *s = n->state;
    uint32_t block = (uint32_t)(offset / s->block_size);
    uint64_t from, to;
    if (s->fresh && block >= s->next) {
        *out = (struct extent){.kind = EXTENT_ZERO, .length = length};
        return 0;
    }
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

/* ---- writing ---- */

/* Streams of zeros for blocks [from, to), the first at *at, which moves behind the last.  Lock
 * held. */
static int put_zeros_co(struct node *n, uint32_t from, uint32_t to, uint64_t *at) {
    struct cloop *s = n->state;
    uint64_t each = s->zeros_length;
    uint32_t most = (uint32_t)min_u64(max_u64(ZEROS_AT_ONCE / each, 1), to - from);
    uint8_t *buf AUTO_FREE = from < to ? malloc(most * each) : NULL;
    int r = from < to && !buf ? -ENOMEM : 0;
    for (uint32_t i = 0; buf && i < most; i++)
        memcpy(buf + i * each, s->zeros, each);
    while (!r && from < to) {
        uint32_t count = (uint32_t)min_u64(most, to - from);
        r = disk_pwrite_co(n->file, *at, buf, count * each);
        for (; !r && count; count--, from++) {
            *at += each;
            r = set_offset_co(s, from + 1, *at);
        }
    }
    return r;
}

static int write_table_co(struct node *n) {
    struct cloop *s = n->state;
    struct pages_batch b;
    int r = pages_take(&s->pages, 0, &b);
    if (!r && b.count)
        r = pages_write_co(&s->pages, &b);
    else if (!r)
        pages_give_back(&s->pages, &b);
    return r;
}

static int place_locked_co(struct node *n, uint32_t block, uint32_t length, uint64_t *host) {
    struct cloop *s = n->state;
    if (!s->fresh || block < s->next)
        return -ENOTSUP;
    if (s->broken)
        return -EIO;
    int r = pages_crowded(&s->pages) ? write_table_co(n) : 0;
    if (!r)
        r = put_zeros_co(n, s->next, block, &s->end);
    if (!r)
        r = set_offset_co(s, block + 1, s->end + length);
    if (r < 0) {
        s->broken = true;
        return r;
    }
    *host = s->end;
    s->end += length;
    s->next = block + 1;
    s->changed = true;
    return 0;
}

static int cloop_place_co(struct node *n, uint64_t offset, uint64_t length, unsigned flags,
                          uint32_t coded_length, struct placement *out) {
    struct cloop *s = n->state;
    if (!(flags & PLACE_CODED) || !s->fresh)
        return -ENOTSUP;
    *out = (struct placement){.offset = offset,
                              .length = length,
                              .storage = n->file,
                              .is_new = true,
                              .coded_length = coded_length};
    task_mutex_lock_co(&s->lock);
    int r = place_locked_co(n, (uint32_t)(offset / s->block_size), coded_length, &out->host_offset);
    task_mutex_unlock(&s->lock);
    return r;
}

static int cloop_publish_co(struct node *n, const struct placement *p) {
    return 0;
}

/* Its room is in the middle of others: such an image can no longer become whole. */
static void cloop_abandon(struct node *n, const struct placement *p) {
    ((struct cloop *)n->state)->broken = true;
}

/* What is still to come reads as zeros by itself. */
static int cloop_set_zero_co(struct node *n, uint64_t offset, uint64_t length,
                             unsigned zero_flags) {
    const struct cloop *s = n->state;
    return s->fresh && offset / s->block_size >= s->next ? 0 : -ENOTSUP;
}

static int cloop_flush_co(struct node *n) {
    struct cloop *s = n->state;
    if (!s->fresh)
        return 0;
    task_mutex_lock_co(&s->lock);
    uint64_t end = s->end;
    int r = s->broken ? -EIO : 0;
    if (!r && s->changed)
        r = put_zeros_co(n, s->next, s->blocks, &end);
    if (!r && s->changed)
        r = write_table_co(n);
    if (!r)
        r = disk_flush_co(n->file);
    if (!r)
        s->changed = false;
    task_mutex_unlock(&s->lock);
    return r;
}

static int cloop_create_co(struct node *file, const void *create_opts, struct create_ctx *ctx,
                           struct err *e) {
    const struct cloop_create *c = create_opts;
    uint8_t head[HEADER_BYTES] = {0};
    uint64_t blocks = div_up(c->size, c->block_size), table = (blocks + 1) * 8;
    if (c->block_size % 512 || !is_pow2(c->block_size))
        return err_set(e, EINVAL, "block_size %" PRIu64 " is not a power of two", c->block_size);
    if (table > TABLE_BYTES_MAX) {
        err_set(e, EFBIG, "%" PRIu64 " blocks of %" PRIu64 " bytes are above the limit of %" PRIu64,
                blocks, c->block_size, TABLE_BYTES_MAX / 8 - 1);
        err_hint(e, "larger blocks (block_size=1M) reach up to 64 TiB");
        return -EFBIG;
    }
    memcpy(head, preamble, sizeof(preamble) - 1);
    memcpy(head + sizeof(preamble) - 1, preamble_rest, sizeof(preamble_rest) - 1);
    be32_store(head + 128, (uint32_t)c->block_size);
    be32_store(head + 132, (uint32_t)blocks);
    int r = disk_resize_co(file, 0, PREALLOC_OFF, e);
    if (!r)
        r = disk_resize_co(file, HEADER_BYTES + table, PREALLOC_OFF, e);
    if (!r && (r = disk_pwrite_co(file, 0, head, sizeof(head))) < 0)
        err_errno(e, -r, "writing the header");
    return r;
}

static json_t *cloop_describe(struct node *n) {
    const struct cloop *s = n->state;
    return json_pack("{s:I, s:I}", "block-size", (json_int_t)s->block_size, "blocks",
                     (json_int_t)s->blocks);
}

static const struct opt cloop_opts[] = {OPT_CHILD("file", OPT_OPEN, "the storage"), OPT_END};

static const struct opt cloop_create_opts[] = {
    OPT_SIZE(struct cloop_create, size, "size", OPT_CREATE, 0, OPT_ANY, "size of the disk"),
    OPT_SIZE(struct cloop_create, block_size, "block_size", OPT_CREATE, 64 * KIB,
             OPT_POW2(512, MIB), "bytes compressed at once"),
    OPT_END,
};

static const struct format_ops cloop_format = {
    .probe = cloop_probe,
    .create_co = cloop_create_co,
    .written_once = true,
    .map_co = cloop_map_co,
    .place_co = cloop_place_co,
    .publish_co = cloop_publish_co,
    .abandon = cloop_abandon,
    .set_zero_co = cloop_set_zero_co,
    .flush_co = cloop_flush_co,
    .describe = cloop_describe,
};

const struct driver driver_cloop = {
    .name = "cloop",
    .kind = DRIVER_FORMAT,
    .help = "compressed loop image; written once, by a copy",
    .state_size = sizeof(struct cloop),
    .opts = cloop_opts,
    .create_opts = cloop_create_opts,
    .create_opts_size = sizeof(struct cloop_create),
    .open_co = cloop_open_co,
    .close_co = cloop_close_co,
    .format = &cloop_format,
};
