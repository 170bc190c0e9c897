/* SPDX-License-Identifier: MIT */
/* VHDX: headers, tables and metadata as bytes.  Pure. */
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/crc32c.h"
#include "format/vhdx/vhdx.h"

/* A GUID as its text has it: three fields are stored little-endian, the rest as it is. */
#define GUID(a, b, c, d, e)                                                                        \
    {                                                                                              \
        {                                                                                          \
            (a) & 0xff, (a) >> 8 & 0xff, (a) >> 16 & 0xff, (a) >> 24 & 0xff, (b)&0xff, (b) >> 8,   \
                (c)&0xff, (c) >> 8, (d) >> 8, (d)&0xff, (e) >> 40 & 0xff, (e) >> 32 & 0xff,        \
                (e) >> 24 & 0xff, (e) >> 16 & 0xff, (e) >> 8 & 0xff, (e)&0xff                      \
        }                                                                                          \
    }

const struct vhdx_guid vhdx_region_guid[2] = {
    [VHDX_BAT] = GUID(0x2DC27766, 0xF623, 0x4200, 0x9D64, 0x115E9BFD4A08),
    [VHDX_METADATA] = GUID(0x8B7CA206, 0x4790, 0x4B9A, 0xB8FE, 0x575F050F886E),
};
const struct vhdx_guid vhdx_item_guid[VHDX_ITEMS] = {
    [VHDX_ITEM_PARAMETERS] = GUID(0xCAA16737, 0xFA36, 0x4D43, 0xB3B6, 0x33F0AA44E76B),
    [VHDX_ITEM_SIZE] = GUID(0x2FA54224, 0xCD1B, 0x4876, 0xB211, 0x5DBED83BF4B8),
    [VHDX_ITEM_DISK_ID] = GUID(0xBECA12AB, 0xB2E6, 0x4523, 0x93EF, 0xC309E000C746),
    [VHDX_ITEM_LOGICAL] = GUID(0x8141BF1D, 0xA96F, 0x4709, 0xBA47, 0xF233A8FAAB5F),
    [VHDX_ITEM_PHYSICAL] = GUID(0xCDA348C7, 0x445D, 0x4471, 0x9CC9, 0xE9885251C556),
    [VHDX_ITEM_LOCATOR] = GUID(0xA8D35F2D, 0xB30B, 0x454D, 0xABF7, 0xD3D84834AB0C),
};
const struct vhdx_guid vhdx_locator_guid = GUID(0xB04AEFB7, 0xD19E, 0x4A81, 0xB789, 0x25B8E9445913);

/* Flags of metadata entries. */
#define ITEM_DISK 2u /* of the virtual disk, not of the file */
#define ITEM_REQUIRED 4u

static const struct {
    const char *name;
    uint32_t bytes, flags;
} item_rows[VHDX_ITEMS] = {
    [VHDX_ITEM_PARAMETERS] = {"file parameters", 8, ITEM_REQUIRED},
    [VHDX_ITEM_SIZE] = {"virtual disk size", 8, ITEM_DISK | ITEM_REQUIRED},
    [VHDX_ITEM_DISK_ID] = {"virtual disk ID", 16, ITEM_DISK | ITEM_REQUIRED},
    [VHDX_ITEM_LOGICAL] = {"logical sector size", 4, ITEM_DISK | ITEM_REQUIRED},
    [VHDX_ITEM_PHYSICAL] = {"physical sector size", 4, ITEM_DISK | ITEM_REQUIRED},
    [VHDX_ITEM_LOCATOR] = {"parent locator", 20, ITEM_REQUIRED},
};

/* ---------------------------------------------------------------- GUIDs */

void vhdx_guid_text(const struct vhdx_guid *g, char out[37]) {
    const uint8_t *u = g->b;
    snprintf(out, 37, "%08x-%04x-%04x-%02x%02x-%02x%02x%02x%02x%02x%02x", le32_load(u),
             le16_load(u + 4), le16_load(u + 6), u[8], u[9], u[10], u[11], u[12], u[13], u[14],
             u[15]);
}

bool vhdx_guid_parse(const char *text, struct vhdx_guid *g) {
    static const uint8_t order[16] = {3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15};
    unsigned digits = 0, value = 0;
    if (*text == '{')
        text++;
    for (; digits < 32; text++) {
        if (*text == '-' && (digits == 8 || digits == 12 || digits == 16 || digits == 20))
            text++;
        if (!isxdigit((unsigned char)*text))
            return false;
        value = value << 4 |
                (unsigned)(isdigit((unsigned char)*text) ? *text - '0' : (*text | 32) - 'a' + 10);
        if (++digits % 2 == 0)
            g->b[order[digits / 2 - 1]] = (uint8_t)value;
    }
    return !*text || !strcmp(text, "}");
}

int vhdx_guid_random(struct vhdx_guid *g) {
    if (getrandom(g->b, 16, 0) != 16)
        return -EIO;
    g->b[7] = (uint8_t)((g->b[7] & 0x0f) | 0x40);
    g->b[8] = (uint8_t)((g->b[8] & 0x3f) | 0x80);
    return 0;
}

bool vhdx_guid_is_null(const struct vhdx_guid *g) {
    return bytes_are_zero(g->b, 16);
}

/* ---------------------------------------------------------------- headers */

/* The checksum of a structure whose four bytes at 4 hold it. */
static uint32_t sum_of(const uint8_t *buf, size_t length) {
    static const uint8_t zeros[4];
    uint32_t c = crc32c(0, buf, 4);
    c = crc32c(c, zeros, 4);
    return crc32c(c, buf + 8, length - 8);
}

static int check_sum(const uint8_t *buf, size_t length, const char *what, struct err *e) {
    uint32_t sum = le32_load(buf + 4), right = sum_of(buf, length);
    if (sum != right)
        return err_set(e, EINVAL, "the %s's checksum is 0x%08" PRIx32 ", not 0x%08" PRIx32, what,
                       sum, right);
    return 0;
}

int vhdx_header_parse(const uint8_t *buf, struct vhdx_header *h, struct err *e) {
    if (memcmp(buf, "head", 4))
        return err_set(e, EINVAL, "not a VHDX header: it does not begin with 'head'");
    int r = check_sum(buf, VHDX_HEADER_BYTES, "header", e);
    if (r)
        return r;
    *h = (struct vhdx_header){
        .sequence = le64_load(buf + 8),
        .log_length = le32_load(buf + 68),
        .log_offset = le64_load(buf + 72),
    };
    memcpy(h->file_write.b, buf + 16, 16);
    memcpy(h->data_write.b, buf + 32, 16);
    memcpy(h->log_guid.b, buf + 48, 16);
    if (le16_load(buf + 66) != 1)
        return err_set(e, ENOTSUP, "VHDX version %u is unknown (1)", le16_load(buf + 66));
    if (le16_load(buf + 64) && !vhdx_guid_is_null(&h->log_guid))
        return err_set(e, ENOTSUP, "log version %u is unknown (0)", le16_load(buf + 64));
    if (h->log_length % VHDX_MIB || h->log_offset % VHDX_MIB || h->log_offset < VHDX_MIB ||
        h->log_offset > INT64_MAX - UINT32_MAX ||
        (!h->log_length && !vhdx_guid_is_null(&h->log_guid)))
        return err_set(e, EINVAL,
                       "a log of %" PRIu32 " bytes at %" PRIu64
                       ": whole MiB behind the first are possible",
                       h->log_length, h->log_offset);
    return 0;
}

void vhdx_header_store(const struct vhdx_header *h, uint8_t *buf) {
    memset(buf, 0, VHDX_HEADER_BYTES);
    memcpy(buf, "head", 4);
    le64_store(buf + 8, h->sequence);
    memcpy(buf + 16, h->file_write.b, 16);
    memcpy(buf + 32, h->data_write.b, 16);
    memcpy(buf + 48, h->log_guid.b, 16);
    le16_store(buf + 66, 1);
    le32_store(buf + 68, h->log_length);
    le64_store(buf + 72, h->log_offset);
    le32_store(buf + 4, sum_of(buf, VHDX_HEADER_BYTES));
}

/* ---------------------------------------------------------------- regions */

enum { REGION_ENTRIES_AT = 16, REGION_ENTRY = 32 };

static int check_region(const struct vhdx_range *r, struct err *e) {
    if (r->offset % VHDX_MIB || r->length % VHDX_MIB || !r->length || r->offset < VHDX_MIB ||
        r->offset > (uint64_t)INT64_MAX - r->length)
        return err_set(e, EINVAL,
                       "a region of %" PRIu64 " bytes at %" PRIu64
                       ": whole MiB behind the first are possible",
                       r->length, r->offset);
    return 0;
}

static int take_region(const uint8_t *p, struct vhdx_regions *out, struct err *e) {
    struct vhdx_range at = {le64_load(p + 16), le32_load(p + 24)};
    struct vhdx_range *known = !memcmp(p, vhdx_region_guid[VHDX_BAT].b, 16)        ? &out->bat
                               : !memcmp(p, vhdx_region_guid[VHDX_METADATA].b, 16) ? &out->metadata
                                                                                   : NULL;
    struct vhdx_guid g;
    char id[37];
    memcpy(g.b, p, 16);
    vhdx_guid_text(&g, id);
    int r = check_region(&at, e);
    if (r)
        return r;
    if (known) {
        if (known->length)
            return err_set(e, EINVAL, "the region table has region %s twice", id);
        *known = at;
        return 0;
    }
    if (le32_load(p + 28) & 1)
        return err_set(e, ENOTSUP, "the image needs region %s, which is not known here", id);
    out->others[out->other_count++] = at;
    return 0;
}

int vhdx_regions_parse(const uint8_t *buf, struct vhdx_regions *out, struct err *e) {
    uint32_t count = le32_load(buf + 8);
    *out = (struct vhdx_regions){0};
    if (memcmp(buf, "regi", 4))
        return err_set(e, EINVAL, "not a region table: it does not begin with 'regi'");
    int r = check_sum(buf, VHDX_REGION_TABLE_BYTES, "region table", e);
    if (r)
        return r;
    if (count > VHDX_ENTRIES_MAX)
        return err_set(e, EINVAL, "%" PRIu32 " regions: at most %u are possible", count,
                       VHDX_ENTRIES_MAX);
    out->others = calloc(count + 1, sizeof(*out->others));
    if (!out->others)
        return err_set(e, ENOMEM, "no memory for regions");
    for (uint32_t i = 0; !r && i < count; i++)
        r = take_region(buf + REGION_ENTRIES_AT + i * REGION_ENTRY, out, e);
    if (!r && (!out->bat.length || !out->metadata.length))
        r = err_set(e, EINVAL, "the region table has no %s region",
                    out->bat.length ? "metadata" : "BAT");
    return r;
}

static void store_region(uint8_t *p, enum vhdx_region which, const struct vhdx_range *at) {
    memcpy(p, vhdx_region_guid[which].b, 16);
    le64_store(p + 16, at->offset);
    le32_store(p + 24, (uint32_t)at->length);
    le32_store(p + 28, 1);
}

void vhdx_regions_store(const struct vhdx_range *bat, const struct vhdx_range *metadata,
                        uint8_t *buf) {
    memset(buf, 0, VHDX_REGION_TABLE_BYTES);
    memcpy(buf, "regi", 4);
    le32_store(buf + 8, 2);
    store_region(buf + REGION_ENTRIES_AT, VHDX_BAT, bat);
    store_region(buf + REGION_ENTRIES_AT + REGION_ENTRY, VHDX_METADATA, metadata);
    le32_store(buf + 4, sum_of(buf, VHDX_REGION_TABLE_BYTES));
}

void vhdx_regions_move_bat(uint8_t *buf, const struct vhdx_range *bat) {
    for (uint32_t i = 0; i < le32_load(buf + 8); i++) {
        uint8_t *p = buf + REGION_ENTRIES_AT + i * REGION_ENTRY;
        if (!memcmp(p, vhdx_region_guid[VHDX_BAT].b, 16))
            store_region(p, VHDX_BAT, bat);
    }
    le32_store(buf + 4, sum_of(buf, VHDX_REGION_TABLE_BYTES));
}

/* ---------------------------------------------------------------- metadata */

enum { ITEM_ENTRY = 32 };

static int take_item(const uint8_t *p, uint64_t region, struct vhdx_range items[VHDX_ITEMS],
                     struct err *e) {
    struct vhdx_range at = {le32_load(p + 16), le32_load(p + 20)};
    uint32_t flags = le32_load(p + 24);
    struct vhdx_guid g;
    char id[37];
    int which = 0;
    memcpy(g.b, p, 16);
    vhdx_guid_text(&g, id);
    while (which < VHDX_ITEMS && !vhdx_guid_same(&g, &vhdx_item_guid[which]))
        which++;
    if (which == VHDX_ITEMS || flags & 1) {
        if (flags & ITEM_REQUIRED)
            return err_set(e, ENOTSUP, "the image needs metadata item %s, which is not known here",
                           id);
        return 0;
    }
    if (items[which].length)
        return err_set(e, EINVAL, "metadata: %s is there twice", item_rows[which].name);
    if (at.length < item_rows[which].bytes || at.length > VHDX_ITEM_BYTES_MAX ||
        at.offset < VHDX_METADATA_TABLE_BYTES || at.offset > region ||
        at.length > region - at.offset)
        return err_set(e, EINVAL,
                       "metadata: %s of %" PRIu64 " bytes at %" PRIu64
                       " does not lie behind the table in the region (%" PRIu64 " bytes)",
                       item_rows[which].name, at.length, at.offset, region);
    items[which] = at;
    return 0;
}

int vhdx_items_parse(const uint8_t *buf, uint64_t length, struct vhdx_range items[VHDX_ITEMS],
                     struct err *e) {
    uint32_t count = le16_load(buf + 10);
    int r = 0;
    memset(items, 0, VHDX_ITEMS * sizeof(*items));
    if (memcmp(buf, "metadata", 8))
        return err_set(e, EINVAL, "the metadata table does not begin with 'metadata'");
    if (count > VHDX_ENTRIES_MAX)
        return err_set(e, EINVAL, "%" PRIu32 " metadata items: at most %u are possible", count,
                       VHDX_ENTRIES_MAX);
    for (uint32_t i = 0; !r && i < count; i++)
        r = take_item(buf + (i + 1) * ITEM_ENTRY, length, items, e);
    for (int i = 0; !r && i < VHDX_ITEM_LOCATOR; i++)
        if (!items[i].length && i != VHDX_ITEM_DISK_ID)
            r = err_set(e, EINVAL, "metadata: %s is not there", item_rows[i].name);
    return r;
}

static void store_item(uint8_t *buf, enum vhdx_item which, uint32_t offset, uint32_t length) {
    uint16_t count = le16_load(buf + 10);
    uint8_t *p = buf + (count + 1) * ITEM_ENTRY;
    memcpy(p, vhdx_item_guid[which].b, 16);
    le32_store(p + 16, offset);
    le32_store(p + 20, length);
    le32_store(p + 24, item_rows[which].flags);
    le16_store(buf + 10, (uint16_t)(count + 1));
}

int vhdx_items_place_locator(uint8_t *buf, uint64_t length, uint32_t bytes, struct vhdx_range *at) {
    uint32_t count = (uint32_t)min_u64(le16_load(buf + 10), VHDX_ENTRIES_MAX);
    uint64_t end = VHDX_METADATA_TABLE_BYTES, place = 0;
    uint8_t *own = NULL;
    for (uint32_t i = 0; i < count; i++) {
        uint8_t *p = buf + (i + 1) * ITEM_ENTRY;
        if (!(le32_load(p + 24) & 1) && !memcmp(p, vhdx_item_guid[VHDX_ITEM_LOCATOR].b, 16))
            own = p;
        else if (le32_load(p + 20))
            end = max_u64(end, (uint64_t)le32_load(p + 16) + le32_load(p + 20));
    }
    *at = (struct vhdx_range){0, bytes};
    if (own) {
        place = le32_load(own + 16);
        uint8_t *last = buf + count * ITEM_ENTRY;
        memmove(own, last, ITEM_ENTRY);
        memset(last, 0, ITEM_ENTRY);
        le16_store(buf + 10, (uint16_t)--count);
    }
    if (!bytes)
        return 0;
    bool fits = place >= VHDX_METADATA_TABLE_BYTES && place + bytes <= length;
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *p = buf + (i + 1) * ITEM_ENTRY;
        fits &= !le32_load(p + 20) ||
                !ranges_overlap(place, bytes, le32_load(p + 16), le32_load(p + 20));
    }
    if (!fits)
        place = end;
    if (place + bytes > length || count == VHDX_ENTRIES_MAX)
        return -ENOSPC;
    at->offset = place;
    store_item(buf, VHDX_ITEM_LOCATOR, (uint32_t)place, bytes);
    return 0;
}

void vhdx_metadata_store(const struct vhdx_metadata *m, const uint8_t *locator,
                         uint32_t locator_bytes, uint8_t *buf) {
    uint32_t at = VHDX_METADATA_TABLE_BYTES;
    memset(buf, 0, 2 * (size_t)VHDX_METADATA_TABLE_BYTES);
    memcpy(buf, "metadata", 8);
    for (enum vhdx_item i = VHDX_ITEM_PARAMETERS; i < VHDX_ITEM_LOCATOR; i++) {
        store_item(buf, i, at, item_rows[i].bytes);
        at += item_rows[i].bytes;
    }
    uint8_t *p = buf + VHDX_METADATA_TABLE_BYTES;
    le32_store(p, m->block_size);
    le32_store(p + 4, (m->fixed ? 1 : 0) | (m->has_parent ? 2 : 0));
    le64_store(p + 8, m->size);
    memcpy(p + 16, m->disk_id.b, 16);
    le32_store(p + 32, m->logical_sector);
    le32_store(p + 36, m->physical_sector);
    if (locator_bytes) {
        store_item(buf, VHDX_ITEM_LOCATOR, at, locator_bytes);
        memcpy(buf + at, locator, locator_bytes);
    }
}

int vhdx_metadata_check(const struct vhdx_metadata *m, struct err *e) {
    if (m->block_size < VHDX_BLOCK_MIN || m->block_size > VHDX_BLOCK_MAX || !is_pow2(m->block_size))
        return err_set(e, EINVAL,
                       "block size %" PRIu32 " is not a power of two from %u to %u bytes",
                       m->block_size, VHDX_BLOCK_MIN, VHDX_BLOCK_MAX);
    if ((m->logical_sector != 512 && m->logical_sector != 4096) ||
        (m->physical_sector != 512 && m->physical_sector != 4096))
        return err_set(e, EINVAL,
                       "sectors of %" PRIu32 " bytes, physically %" PRIu32
                       ": 512 and 4096 are possible",
                       m->logical_sector, m->physical_sector);
    if (m->size > VHDX_SIZE_MAX || m->size % m->logical_sector)
        return err_set(e, EINVAL,
                       "disk size %" PRIu64 " is not whole sectors up to %" PRIu64
                       " bytes (64 TiB)",
                       m->size, VHDX_SIZE_MAX);
    return 0;
}

uint64_t vhdx_bat_entries(const struct vhdx_metadata *m, uint64_t size) {
    uint64_t blocks = div_up(size, m->block_size), ratio = vhdx_ratio(m);
    if (m->has_parent)
        return div_up(blocks, ratio) * (ratio + 1);
    return blocks ? blocks + (blocks - 1) / ratio : 0;
}
