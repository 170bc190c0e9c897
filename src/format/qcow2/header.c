/* SPDX-License-Identifier: MIT */
/*
 * See header.h.  Layout:
 *
 *      0          72           104        112       header_length
 *      | version 2 | version 3 fields | ct |pad| kept bytes | extensions ... end | backing name |
 *
 * Extensions begin at header_length (72 in version 2) and end at an end marker, at the backing
 * file name, or at the end of the cluster, whichever comes first; the marker may be missing.
 */
#include "format/qcow2/header.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/ck.h"
#include "base/err.h"
#include "base/strbuf.h"
#include "format/qcow2/entry.h"

/* Offsets of the fixed fields. */
enum {
    H_MAGIC = 0,
    H_VERSION = 4,
    H_BACKING_OFFSET = 8,
    H_BACKING_SIZE = 16,
    H_CLUSTER_BITS = 20,
    H_SIZE = 24,
    H_CRYPT = 32,
    H_L1_SIZE = 36,
    H_L1_OFFSET = 40,
    H_REFTABLE_OFFSET = 48,
    H_REFTABLE_CLUSTERS = 56,
    H_NB_SNAPSHOTS = 60,
    H_SNAPSHOTS_OFFSET = 64,
    H_INCOMPATIBLE = 72,
    H_COMPATIBLE = 80,
    H_AUTOCLEAR = 88,
    H_REFCOUNT_ORDER = 96,
    H_HEADER_LENGTH = 100,
    H_COMPRESSION = 104,
    FEATURE_RECORD = 48, /* kind, bit, 46 bytes of name */
    FEATURE_NAME = 46,
};

static const struct {
    uint8_t kind, bit;
    const char *name;
} features[] = {
    {0, 0, "dirty bit"},        {0, 1, "corrupt bit"},         {0, 2, "external data file"},
    {0, 3, "compression type"}, {0, 4, "extended L2 entries"}, {1, 0, "lazy refcounts"},
    {2, 0, "bitmaps"},          {2, 1, "raw external data"},
};
#define FEATURES (sizeof(features) / sizeof(features[0]))

uint64_t qcow2_l1_entries_for(uint32_t cluster_bits, bool extended_l2, uint64_t size) {
    uint32_t shift = 2 * cluster_bits - qcow2_l2e_shift(extended_l2); /* bytes a table maps */
    return (size >> shift) + ((size & (((uint64_t)1 << shift) - 1)) != 0);
}

int qcow2_header_peek(const uint8_t *buf, size_t len, uint32_t *need, struct err *e) {
    if (len < 8 || be32_load(buf) != QCOW2_MAGIC)
        return err_set(e, EINVAL, "not a qcow2 image: the magic bytes are missing");
    uint32_t version = be32_load(buf + H_VERSION);
    if (version != 2 && version != 3)
        return err_set(e, ENOTSUP, "qcow2 version %" PRIu32 " is not supported (2 and 3 are)",
                       version);
    if (len < QCOW2_V2_LENGTH)
        return err_set(e, EINVAL, "header is cut off: %zu bytes of at least %d", len,
                       QCOW2_V2_LENGTH);
    uint32_t bits = be32_load(buf + H_CLUSTER_BITS);
    if (bits < QCOW2_CLUSTER_BITS_MIN || bits > QCOW2_CLUSTER_BITS_MAX)
        return err_set(e, EINVAL, "cluster_bits %" PRIu32 " is outside %d..%d", bits,
                       QCOW2_CLUSTER_BITS_MIN, QCOW2_CLUSTER_BITS_MAX);
    *need = (uint32_t)1 << bits;
    return 0;
}

static char *dup_text(const uint8_t *p, size_t len) {
    char *s = malloc(len + 1);
    if (s) {
        memcpy(s, p, len);
        s[len] = 0;
    }
    return s;
}

/* The fields that version 3 added; version 2 gets their fixed values. */
static int decode_v3(const uint8_t *buf, size_t len, struct qcow2_header *h, struct err *e) {
    if (h->version == 2) {
        h->refcount_order = 4;
        h->header_length = QCOW2_V2_LENGTH;
        return 0;
    }
    uint32_t cluster_size = (uint32_t)1 << h->cluster_bits;
    if (len < QCOW2_V3_LENGTH_MIN)
        return err_set(e, EINVAL, "header is cut off: %zu bytes of at least %d", len,
                       QCOW2_V3_LENGTH_MIN);
    h->incompatible = be64_load(buf + H_INCOMPATIBLE);
    h->compatible = be64_load(buf + H_COMPATIBLE);
    h->autoclear = be64_load(buf + H_AUTOCLEAR);
    h->refcount_order = be32_load(buf + H_REFCOUNT_ORDER);
    h->header_length = be32_load(buf + H_HEADER_LENGTH);
    if (h->refcount_order > QCOW2_REFCOUNT_ORDER_MAX)
        return err_set(e, EINVAL, "refcount_order %" PRIu32 " is above %d", h->refcount_order,
                       QCOW2_REFCOUNT_ORDER_MAX);
    if (h->header_length < QCOW2_V3_LENGTH_MIN || h->header_length % 8 ||
        h->header_length > cluster_size || h->header_length > len)
        return err_set(e, EINVAL,
                       "header_length %" PRIu32 " is not a multiple of 8 from %d to the cluster "
                       "size %" PRIu32,
                       h->header_length, QCOW2_V3_LENGTH_MIN, cluster_size);
    if (h->header_length > H_COMPRESSION)
        h->compression_type = buf[H_COMPRESSION];
    bool bit = h->incompatible & QCOW2_INCOMPAT_COMPRESSION;
    if (bit != (h->compression_type != QCOW2_COMPRESSION_ZLIB))
        return err_set(e, EINVAL, "compression type %u contradicts the incompatible feature bit 3",
                       h->compression_type);
    if (h->compression_type > QCOW2_COMPRESSION_ZSTD)
        return err_set(e, ENOTSUP, "compression type %u is unknown (0 zlib, 1 zstd)",
                       h->compression_type);
    if (h->header_length > QCOW2_V3_LENGTH) {
        h->trailing_len = h->header_length - QCOW2_V3_LENGTH;
        h->trailing = malloc(h->trailing_len);
        if (!h->trailing)
            return err_set(e, ENOMEM, "no memory for the header");
        memcpy(h->trailing, buf + QCOW2_V3_LENGTH, h->trailing_len);
    }
    return 0;
}

static int keep_unknown(struct qcow2_header *h, uint32_t type, const uint8_t *data,
                        uint32_t length) {
    if (!(h->unknown_count & (h->unknown_count - 1))) { /* full at powers of two, and at 0 */
        size_t cap = h->unknown_count ? (size_t)h->unknown_count * 2 : 1;
        struct qcow2_ext *grown = realloc(h->unknown, cap * sizeof(*grown));
        if (!grown)
            return -ENOMEM;
        h->unknown = grown;
    }
    uint8_t *copy = malloc(length + 1);
    if (!copy)
        return -ENOMEM;
    memcpy(copy, data, length);
    h->unknown[h->unknown_count++] = (struct qcow2_ext){type, length, copy};
    return 0;
}

/* One known text extension; a later one of the same type replaces an earlier one. */
static int take_text(char **field, const char *what, const uint8_t *data, uint32_t length,
                     uint32_t max, struct err *e) {
    if (length > max)
        return err_set(e, EINVAL, "%s has %" PRIu32 " bytes, more than %" PRIu32, what, length,
                       max);
    if (memchr(data, 0, length))
        return err_set(e, EINVAL, "%s holds a zero byte", what);
    char *s = dup_text(data, length);
    if (!s)
        return err_set(e, ENOMEM, "no memory for the header");
    free(*field);
    *field = s;
    return 0;
}

static int decode_ext(struct qcow2_header *h, uint32_t type, const uint8_t *data, uint32_t length,
                      struct err *e) {
    switch (type) {
    case QCOW2_EXT_BACKING_FORMAT:
        return take_text(&h->backing_format, "backing format name", data, length, 255, e);
    case QCOW2_EXT_DATA_FILE:
        return take_text(&h->data_file, "external data file name", data, length,
                         QCOW2_BACKING_NAME_MAX, e);
    case QCOW2_EXT_FEATURE_TABLE:
        free(h->feature_table);
        h->feature_table = malloc(length + 1);
        if (!h->feature_table)
            return err_set(e, ENOMEM, "no memory for the header");
        memcpy(h->feature_table, data, length);
        h->feature_table_len = length;
        return 0;
    case QCOW2_EXT_BITMAPS:
        if (length != 24)
            return err_set(e, EINVAL, "bitmaps extension has %" PRIu32 " bytes instead of 24",
                           length);
        h->has_bitmaps = true;
        h->bitmaps_count = be32_load(data);
        h->bitmaps_dir_size = be64_load(data + 8);
        h->bitmaps_dir_offset = be64_load(data + 16);
        return 0;
    case QCOW2_EXT_CRYPTO:
        if (length != 16)
            return err_set(e, EINVAL, "crypto extension has %" PRIu32 " bytes instead of 16",
                           length);
        h->has_crypto = true;
        h->crypto_offset = be64_load(data);
        h->crypto_length = be64_load(data + 8);
        return 0;
    case QCOW2_EXT_PADDING:
        return 0;
    default:
        if (keep_unknown(h, type, data, length))
            return err_set(e, ENOMEM, "no memory for the header");
        return 0;
    }
}

static int decode_extensions(const uint8_t *buf, size_t end, struct qcow2_header *h,
                             struct err *e) {
    size_t pos = h->header_length;
    while (pos <= end && end - pos >= 8) {
        uint32_t type = be32_load(buf + pos), length = be32_load(buf + pos + 4);
        pos += 8;
        if (type == QCOW2_EXT_END)
            return 0;
        if (length > end - pos)
            return err_set(e, EINVAL,
                           "header extension 0x%08" PRIx32 " at %zu: length %" PRIu32
                           " reaches beyond the extension area, which ends at %zu",
                           type, pos - 8, length, end);
        int r = decode_ext(h, type, buf + pos, length, e);
        if (r)
            return r;
        pos += length;
        pos = (pos + 7) & ~(size_t)7;
    }
    return 0;
}

static int decode_backing(const uint8_t *buf, size_t len, struct qcow2_header *h, size_t *ext_end,
                          struct err *e) {
    uint64_t offset = be64_load(buf + H_BACKING_OFFSET);
    uint32_t size = be32_load(buf + H_BACKING_SIZE);
    uint64_t cluster_size = (uint64_t)1 << h->cluster_bits;
    if (!offset)
        return 0;
    if (size > QCOW2_BACKING_NAME_MAX)
        return err_set(e, EINVAL, "backing file name has %" PRIu32 " bytes, more than %d", size,
                       QCOW2_BACKING_NAME_MAX);
    if (offset >= cluster_size || size > cluster_size - offset || offset + size > len)
        return err_set(e, EINVAL,
                       "backing file name at %" PRIu64 ", %" PRIu32
                       " bytes: not inside the first cluster of %" PRIu64 " bytes",
                       offset, size, cluster_size);
    if (offset < h->header_length)
        return err_set(e, EINVAL,
                       "backing file name at %" PRIu64 " lies inside the header of %" PRIu32
                       " bytes",
                       offset, h->header_length);
    *ext_end = offset;
    if (!size)
        return 0;
    return take_text(&h->backing_file, "backing file name", buf + offset, size,
                     QCOW2_BACKING_NAME_MAX, e);
}

static int decode_fixed(const uint8_t *buf, size_t len, struct qcow2_header *h, struct err *e) {
    h->version = be32_load(buf + H_VERSION);
    h->cluster_bits = be32_load(buf + H_CLUSTER_BITS);
    h->size = be64_load(buf + H_SIZE);
    h->crypt_method = be32_load(buf + H_CRYPT);
    h->l1_size = be32_load(buf + H_L1_SIZE);
    h->l1_table_offset = be64_load(buf + H_L1_OFFSET);
    h->refcount_table_offset = be64_load(buf + H_REFTABLE_OFFSET);
    h->refcount_table_clusters = be32_load(buf + H_REFTABLE_CLUSTERS);
    h->nb_snapshots = be32_load(buf + H_NB_SNAPSHOTS);
    h->snapshots_offset = be64_load(buf + H_SNAPSHOTS_OFFSET);
    if (h->size > INT64_MAX)
        return err_set(e, EFBIG, "size %" PRIu64 " is above %" PRId64, h->size, INT64_MAX);
    if (h->crypt_method > QCOW2_CRYPT_LUKS)
        return err_set(e, EINVAL, "encryption method %" PRIu32 " is above %d", h->crypt_method,
                       QCOW2_CRYPT_LUKS);
    int r = decode_v3(buf, len, h, e);
    if (r)
        return r;
    size_t ext_end = len < ((size_t)1 << h->cluster_bits) ? len : (size_t)1 << h->cluster_bits;
    r = decode_backing(buf, len, h, &ext_end, e);
    if (r)
        return r;
    return decode_extensions(buf, ext_end, h, e);
}

int qcow2_header_decode(const uint8_t *buf, size_t len, struct qcow2_header *h, struct err *e) {
    memset(h, 0, sizeof(*h));
    uint32_t need;
    int r = qcow2_header_peek(buf, len, &need, e);
    if (r)
        return r;
    r = decode_fixed(buf, len, h, e);
    if (r)
        qcow2_header_free(h);
    return r;
}

void qcow2_header_free(struct qcow2_header *h) {
    free(h->trailing);
    free(h->backing_file);
    free(h->backing_format);
    free(h->data_file);
    free(h->feature_table);
    for (unsigned i = 0; i < h->unknown_count; i++)
        free(h->unknown[i].data);
    free(h->unknown);
    memset(h, 0, sizeof(*h));
}

/* ---------------------------------------------------------------- encode */

struct out {
    uint8_t *buf;
    size_t pos, cap; /* pos > cap: it did not fit */
};

static void put_ext(struct out *o, uint32_t type, const void *data, uint32_t length) {
    uint64_t room = 8 + (((uint64_t)length + 7) & ~(uint64_t)7);
    if (o->pos > o->cap || room > o->cap - o->pos) {
        o->pos = SIZE_MAX;
        return;
    }
    be32_store(o->buf + o->pos, type);
    be32_store(o->buf + o->pos + 4, length);
    if (length)
        memcpy(o->buf + o->pos + 8, data, length);
    o->pos += room;
}

static void put_fixed(const struct qcow2_header *h, uint8_t *buf) {
    be32_store(buf + H_MAGIC, QCOW2_MAGIC);
    be32_store(buf + H_VERSION, h->version);
    be32_store(buf + H_CLUSTER_BITS, h->cluster_bits);
    be64_store(buf + H_SIZE, h->size);
    be32_store(buf + H_CRYPT, h->crypt_method);
    be32_store(buf + H_L1_SIZE, h->l1_size);
    be64_store(buf + H_L1_OFFSET, h->l1_table_offset);
    be64_store(buf + H_REFTABLE_OFFSET, h->refcount_table_offset);
    be32_store(buf + H_REFTABLE_CLUSTERS, h->refcount_table_clusters);
    be32_store(buf + H_NB_SNAPSHOTS, h->nb_snapshots);
    be64_store(buf + H_SNAPSHOTS_OFFSET, h->snapshots_offset);
    if (h->version < 3)
        return;
    be64_store(buf + H_INCOMPATIBLE, h->incompatible);
    be64_store(buf + H_COMPATIBLE, h->compatible);
    be64_store(buf + H_AUTOCLEAR, h->autoclear);
    be32_store(buf + H_REFCOUNT_ORDER, h->refcount_order);
    be32_store(buf + H_HEADER_LENGTH, QCOW2_V3_LENGTH + h->trailing_len);
    buf[H_COMPRESSION] = h->compression_type;
    if (h->trailing_len)
        memcpy(buf + QCOW2_V3_LENGTH, h->trailing, h->trailing_len);
}

static void put_extensions(const struct qcow2_header *h, struct out *o) {
    uint8_t fixed[24] = {0};
    if (h->backing_format)
        put_ext(o, QCOW2_EXT_BACKING_FORMAT, h->backing_format, strlen(h->backing_format));
    if (h->data_file)
        put_ext(o, QCOW2_EXT_DATA_FILE, h->data_file, strlen(h->data_file));
    if (h->has_crypto) {
        be64_store(fixed, h->crypto_offset);
        be64_store(fixed + 8, h->crypto_length);
        put_ext(o, QCOW2_EXT_CRYPTO, fixed, 16);
    }
    if (h->feature_table)
        put_ext(o, QCOW2_EXT_FEATURE_TABLE, h->feature_table, h->feature_table_len);
    if (h->has_bitmaps) {
        be32_store(fixed, h->bitmaps_count);
        be32_store(fixed + 4, 0);
        be64_store(fixed + 8, h->bitmaps_dir_size);
        be64_store(fixed + 16, h->bitmaps_dir_offset);
        put_ext(o, QCOW2_EXT_BITMAPS, fixed, 24);
    }
    for (unsigned i = 0; i < h->unknown_count; i++)
        put_ext(o, h->unknown[i].type, h->unknown[i].data, h->unknown[i].length);
    put_ext(o, QCOW2_EXT_END, NULL, 0);
}

int64_t qcow2_header_encode(const struct qcow2_header *h, uint8_t *buf, size_t cap, struct err *e) {
    size_t fixed = h->version < 3 ? QCOW2_V2_LENGTH : QCOW2_V3_LENGTH + (size_t)h->trailing_len;
    size_t name = h->backing_file ? strlen(h->backing_file) : 0;
    struct out o = {buf, fixed, cap};
    memset(buf, 0, cap);
    if (fixed <= cap) {
        put_fixed(h, buf);
        put_extensions(h, &o);
    }
    if (o.pos > cap || name > cap - o.pos || name > QCOW2_BACKING_NAME_MAX)
        return err_set(e, ENOSPC,
                       "header, extensions and backing file name (%zu bytes) do not fit the first "
                       "cluster of %zu bytes",
                       name, cap);
    if (name) {
        be64_store(buf + H_BACKING_OFFSET, o.pos);
        be32_store(buf + H_BACKING_SIZE, (uint32_t)name);
        memcpy(buf + o.pos, h->backing_file, name);
    }
    return (int64_t)(o.pos + name);
}

/* ---------------------------------------------------------------- judging */

/* A table of `bytes` at `offset`: aligned, behind the header, below the limit. */
static int check_table(const struct qcow2_header *h, const char *what, uint64_t offset,
                       uint64_t bytes, struct err *e) {
    uint64_t cluster_size = (uint64_t)1 << h->cluster_bits;
    if (!is_aligned(offset, cluster_size))
        return err_set(e, EINVAL, "%s: offset %" PRIu64 " is not a multiple of %" PRIu64, what,
                       offset, cluster_size);
    if (offset < cluster_size)
        return err_set(e, EINVAL, "%s: offset %" PRIu64 " overlaps the header (%" PRIu64 " bytes)",
                       what, offset, cluster_size);
    if (offset >= QCOW2_HOST_LIMIT || bytes > QCOW2_HOST_LIMIT - offset)
        return err_set(e, EINVAL, "%s: offset %" PRIu64 " is not below %" PRIu64, what, offset,
                       QCOW2_HOST_LIMIT - bytes);
    return 0;
}

int qcow2_header_check_l1(const struct qcow2_header *h, struct err *e) {
    uint64_t bytes = (uint64_t)h->l1_size * 8;
    uint64_t wanted = qcow2_l1_entries_for(h->cluster_bits, qcow2_header_extended(h), h->size);
    if (bytes > QCOW2_L1_BYTES_MAX)
        return err_set(e, EFBIG, "L1 table: %" PRIu32 " entries are above the limit of %d",
                       h->l1_size, QCOW2_L1_BYTES_MAX / 8);
    if (h->l1_size < wanted)
        return err_set(e, EINVAL,
                       "L1 table is too small: %" PRIu32 " entries where size %" PRIu64
                       " needs %" PRIu64,
                       h->l1_size, h->size, wanted);
    if (!h->l1_size)
        return 0;
    return check_table(h, "L1 table", h->l1_table_offset, bytes, e);
}

int qcow2_header_check_reftable(const struct qcow2_header *h, struct err *e) {
    uint64_t bytes = (uint64_t)h->refcount_table_clusters << h->cluster_bits;
    uint64_t l1_bytes = (uint64_t)h->l1_size * 8;
    if (bytes > QCOW2_REFTABLE_BYTES_MAX)
        return err_set(e, EFBIG, "refcount table: %" PRIu32 " clusters are above the limit of %u",
                       h->refcount_table_clusters, QCOW2_REFTABLE_BYTES_MAX >> h->cluster_bits);
    if (!bytes)
        return err_set(e, EINVAL, "refcount table has no clusters");
    int r = check_table(h, "refcount table", h->refcount_table_offset, bytes, e);
    if (r)
        return r;
    if (l1_bytes && l1_bytes <= QCOW2_L1_BYTES_MAX && h->l1_table_offset < QCOW2_HOST_LIMIT &&
        ranges_overlap(h->l1_table_offset, l1_bytes, h->refcount_table_offset, bytes))
        return err_set(e, EINVAL, "refcount table at %" PRIu64 " overlaps the L1 table at %" PRIu64,
                       h->refcount_table_offset, h->l1_table_offset);
    return 0;
}

int qcow2_header_check_snapshots(const struct qcow2_header *h, struct err *e) {
    if (!h->nb_snapshots)
        return 0;
    if (h->nb_snapshots > QCOW2_SNAPSHOTS_MAX)
        return err_set(e, EFBIG, "snapshot table: %" PRIu32 " snapshots are above the limit of %d",
                       h->nb_snapshots, QCOW2_SNAPSHOTS_MAX);
    return check_table(h, "snapshot table", h->snapshots_offset, (uint64_t)h->nb_snapshots * 40, e);
}

#define UNNAMED "unknown feature "

void qcow2_feature_name(const struct qcow2_header *h, unsigned kind, unsigned bit, char buf[64]) {
    const char *name = NULL;
    size_t len = 0;
    /* The last record may end with its name. */
    for (uint32_t pos = 0; pos + 2 < h->feature_table_len; pos += FEATURE_RECORD) {
        const uint8_t *rec = h->feature_table + pos;
        if (rec[0] == kind && rec[1] == bit && rec[2]) {
            name = (const char *)rec + 2;
            len = strnlen(name, min_u64(FEATURE_NAME, h->feature_table_len - pos - 2));
        }
    }
    for (size_t i = 0; !name && i < FEATURES; i++)
        if (features[i].kind == kind && features[i].bit == bit) {
            name = features[i].name;
            len = strlen(name);
        }
    if (!name) {
        snprintf(buf, 64, UNNAMED "%u", bit);
        return;
    }
    struct strbuf b AUTO_STRBUF = STRBUF_INIT;
    strbuf_put_safe(&b, name, len);
    snprintf(buf, 64, "%s", b.s ? b.s : "");
}

void qcow2_feature_table_default(struct qcow2_header *h) {
    free(h->feature_table);
    h->feature_table_len = FEATURES * FEATURE_RECORD;
    h->feature_table = xcalloc(FEATURES, FEATURE_RECORD);
    for (size_t i = 0; i < FEATURES; i++) {
        uint8_t *rec = h->feature_table + i * FEATURE_RECORD;
        rec[0] = features[i].kind;
        rec[1] = features[i].bit;
        memcpy(rec + 2, features[i].name, strlen(features[i].name));
    }
}

/* By the names that the image has for them, and by number. */
static int refuse_features(const struct qcow2_header *h, uint64_t unknown, struct err *e) {
    struct strbuf b AUTO_STRBUF = STRBUF_INIT;
    for (unsigned bit = 0; bit < 64; bit++) {
        char name[64];
        if (!(unknown >> bit & 1))
            continue;
        qcow2_feature_name(h, 0, bit, name);
        bool named = strncmp(name, UNNAMED, strlen(UNNAMED));
        strbuf_printf(&b, named ? "%s%s (bit %u)" : "%s%.0sbit %u", b.len ? ", " : "", name, bit);
    }
    return err_set(e, ENOTSUP, "incompatible features are not supported: %s", b.s ? b.s : "");
}

int qcow2_header_check_features(const struct qcow2_header *h, bool rw, bool check, struct err *e) {
    uint64_t unknown = h->incompatible & ~(uint64_t)QCOW2_INCOMPAT_KNOWN;
    if (unknown)
        return refuse_features(h, unknown, e);
    if (qcow2_header_extended(h) && h->cluster_bits < QCOW2_EXTENDED_BITS_MIN)
        return err_set(e, EINVAL,
                       "cluster_bits %" PRIu32 " is below %d, the least with extended L2 entries",
                       h->cluster_bits, QCOW2_EXTENDED_BITS_MIN);
    if (h->crypt_method)
        return err_set(e, ENOTSUP, "encryption is not supported: the image uses %s",
                       h->crypt_method == QCOW2_CRYPT_AES ? "AES-CBC" : "LUKS");
    if (!rw || check)
        return 0;
    if (h->incompatible & QCOW2_INCOMPAT_CORRUPT) {
        err_set(e, EROFS, "image is marked corrupt and is refused for writing");
        err_hint(e, "repair it first: strata check -r all; reading is possible");
        return -EROFS;
    }
    return 0;
}
