/* SPDX-License-Identifier: MIT */
/* The driver "dmg": trailer, map and what there is to tell; see dmg.h. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "format/dmg/dmg.h"

#define TRAILER 512u
#define TAIL 1023u /* where the trailer is looked for: files of odd length, padding */
#define TABLES_MAX (256 * MIB)

enum field {
    AT_VERSION = 4,
    AT_HEADER = 8,
    AT_FLAGS = 12,
    AT_FORK = 24,
    AT_FORK_LENGTH = 32,
    AT_RESOURCE = 40,
    AT_RESOURCE_LENGTH = 48,
    AT_SEGMENT = 56,
    AT_SEGMENTS = 60,
    AT_PLIST = 216,
    AT_PLIST_LENGTH = 224,
    AT_VARIANT = 488,
    AT_SECTORS = 492,
};

/* The trailer in the last bytes of a file, or NULL. */
static const uint8_t *find_trailer(const uint8_t *tail, size_t length) {
    if (length > TAIL)
        tail += length - TAIL, length = TAIL;
    for (size_t at = length < TRAILER ? 0 : length - TRAILER + 1; at--;)
        if (!memcmp(tail + at, "koly", 4) && be32_load(tail + at + AT_VERSION) == 4 &&
            be32_load(tail + at + AT_HEADER) == TRAILER)
            return tail + at;
    return NULL;
}

static bool is_encrypted(const uint8_t *head, size_t head_length, const uint8_t *tail,
                         size_t tail_length) {
    return (head_length >= 8 && !memcmp(head, "encrcdsa", 8)) ||
           (tail_length >= 8 && !memcmp(tail + tail_length - 8, "cdsaencr", 8));
}

static int dmg_probe(const struct probe_data *p) {
    if (is_encrypted(p->head, p->head_length, p->tail, p->tail_length))
        return 60;
    return find_trailer(p->tail, p->tail_length) ? 90 : 0;
}

static int parse_trailer_co(struct node *n, const uint8_t *p, struct err *e) {
    struct dmg *s = n->state;
    uint64_t fork = be64_load(p + AT_RESOURCE), fork_length = be64_load(p + AT_RESOURCE_LENGTH);
    uint64_t plist = be64_load(p + AT_PLIST), plist_length = be64_load(p + AT_PLIST_LENGTH);
    uint64_t size = n->file->size, sectors = be64_load(p + AT_SECTORS);
    uint32_t segments = be32_load(p + AT_SEGMENTS);
    s->fork = be64_load(p + AT_FORK);
    s->file_size = size;
    s->flags = be32_load(p + AT_FLAGS);
    s->variant = be32_load(p + AT_VARIANT);
    if (segments > 1)
        return err_set(e, ENOTSUP,
                       "part %" PRIu32 " of an image in %" PRIu32 " files, which cannot be read",
                       be32_load(p + AT_SEGMENT), segments);
    bool old = fork_length != 0;
    uint64_t at = old ? fork : plist, length = old ? fork_length : plist_length;
    const char *what = old ? "resource fork" : "property list";
    if (!length)
        return err_set(e, EINVAL, "the trailer names neither property list nor resource fork");
    if (at > size || length > size - at)
        return err_set(e, EINVAL,
                       "the %s at %" PRIu64 " of %" PRIu64
                       " bytes reaches behind the end of the file (%" PRIu64 " bytes)",
                       what, at, length, size);
    if (length > TABLES_MAX)
        return err_set(e, EFBIG, "a %s of %" PRIu64 " bytes is above the limit of %" PRIu64, what,
                       length, TABLES_MAX);
    int r = old ? dmg_read_fork_co(s, n->file, at, length, e)
                : dmg_read_plist_co(s, n->file, at, length, e);
    if (r < 0)
        return r;
    if (!s->tables)
        return err_set(e, EINVAL, "the %s holds no table of blocks", what);
    if (sectors > DMG_SECTORS_MAX)
        return err_set(e, EINVAL, "a disk of %" PRIu64 " sectors is beyond the largest possible",
                       sectors);
    n->size = max_u64(sectors, s->sectors) * DMG_SECTOR;
    return 0;
}

static int dmg_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    uint8_t tail[TAIL], head[8];
    int r = node_open_child_co(n, ctx, "file", CHILD_FILE_METADATA, &n->file, e);
    if (!r && node_is_rw(n))
        r = err_set(e, EROFS, "images of format 'dmg' can only be read");
    if (r)
        return r;
    uint64_t length = min_u64(TAIL, n->file->size);
    if (length < TRAILER)
        return err_set(e, EINVAL, "not an Apple disk image: too short for its trailer");
    r = disk_pread_co(n->file, 0, head, sizeof(head));
    if (!r)
        r = disk_pread_co(n->file, n->file->size - length, tail, length);
    if (r < 0)
        return err_errno(e, -r, "reading the trailer");
    if (is_encrypted(head, sizeof(head), tail, length))
        return err_set(e, ENOTSUP, "an encrypted Apple disk image, which cannot be read");
    const uint8_t *trailer = find_trailer(tail, length);
    if (!trailer)
        return err_set(e, EINVAL, "not an Apple disk image: no trailer (koly) at its end");
    n->granularity = DMG_SECTOR;
    return parse_trailer_co(n, trailer, e);
}

static void dmg_close_co(struct node *n) {
    struct dmg *s = n->state;
    free(s->chunks);
    s->chunks = NULL;
}

static int dmg_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    const struct dmg *s = n->state;
    uint64_t sector = offset / DMG_SECTOR;
    uint32_t i = dmg_find(s, sector);
    const struct dmg_chunk *c = i < s->count ? &s->chunks[i] : NULL;
    if (!c || c->sector > sector) {
        uint64_t end = c ? c->sector * DMG_SECTOR : n->size;
        *out = (struct extent){.kind = EXTENT_ZERO, .length = min_u64(length, end - offset)};
        return 0;
    }
    uint64_t start = c->sector * DMG_SECTOR, bytes = (uint64_t)c->sectors * DMG_SECTOR;
    *out = (struct extent){
        .kind = EXTENT_DATA,
        .length = min_u64(length, start + bytes - offset),
        .storage = n->file,
        .host_offset = c->host,
    };
    if (c->kind == DMG_RAW) {
        out->host_offset += offset - start;
        return 0;
    }
    out->kind = EXTENT_CODED;
    out->codec = &dmg_codecs[c->kind];
    out->unit_offset = start;
    out->unit_length = (uint32_t)bytes;
    out->coded_length = c->length;
    return 0;
}

static json_t *dmg_describe(struct node *n) {
    static const char *const names[DMG_KINDS] = {"raw",   "adc", "zlib", "bzip2",
                                                 "lzfse", "xz",  "zero"};
    const struct dmg *s = n->state;
    json_t *chunks = json_object();
    for (int i = 0; i < DMG_KINDS; i++)
        if (s->seen[i])
            json_object_set_new(chunks, names[i], json_integer((json_int_t)s->seen[i]));
    return json_pack("{s:s, s:I, s:o}", "variant",
                     s->variant == 1   ? "device"
                     : s->variant == 2 ? "partition"
                                       : "unknown",
                     "tables", (json_int_t)s->tables, "chunks", chunks);
}

static const struct opt dmg_opts[] = {OPT_CHILD("file", OPT_OPEN, "the storage"), OPT_END};

static const struct format_ops dmg_format = {
    .probe = dmg_probe, .map_co = dmg_map_co, .describe = dmg_describe};

const struct driver driver_dmg = {
    .name = "dmg",
    .kind = DRIVER_FORMAT,
    .help = "disk image of Apple (UDIF), read only",
    .state_size = sizeof(struct dmg),
    .opts = dmg_opts,
    .open_co = dmg_open_co,
    .close_co = dmg_close_co,
    .format = &dmg_format,
};
