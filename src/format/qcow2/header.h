/* SPDX-License-Identifier: MIT */
/*
 * The qcow2 header and its extensions as a pure codec: bytes to a host structure and back, no I/O.
 *
 * Decode promises that every field of the result is in range (limits below) and that every string
 * is NUL-terminated and free of inner NULs.  What it does not know it keeps: unknown extensions
 * (type, length, bytes), unknown feature bits, and header bytes behind the fields that this code
 * knows.  Encode writes all of that back, so that a rewrite loses nothing.
 *
 * What decode does not judge: whether this program can *use* the image (features, encryption,
 * dirty) and whether tables lie where they may; qcow2_header_check_* do that, so that `info` and
 * `check` can still look at such an image.
 *
 * Source: the public qcow2 specification ("Header", "Header extensions", "Feature name table").
 */
#ifndef STRATA_FORMAT_QCOW2_HEADER_H
#define STRATA_FORMAT_QCOW2_HEADER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct err;

#define QCOW2_MAGIC 0x514649fbu

enum {
    QCOW2_V2_LENGTH = 72,         /* size of the version 2 header */
    QCOW2_V3_LENGTH_MIN = 104,    /* smallest legal version 3 header */
    QCOW2_V3_LENGTH = 112,        /* what we write: compression type and its padding */
    QCOW2_CLUSTER_BITS_MIN = 9,   /* 512 bytes */
    QCOW2_CLUSTER_BITS_MAX = 21,  /* 2 MiB */
    QCOW2_EXTENDED_BITS_MIN = 14, /* with extended L2 entries: subclusters of 512 bytes */
    QCOW2_REFCOUNT_ORDER_MAX = 6,
    QCOW2_BACKING_NAME_MAX = 1023,
    QCOW2_L1_BYTES_MAX = 32 << 20,      /* the reference reader's cap */
    QCOW2_REFTABLE_BYTES_MAX = 8 << 20, /* the reference reader's cap */
    QCOW2_SNAPSHOTS_MAX = 65536,        /* the reference reader's cap */
};

/* Fields that are rewritten alone: where they stand. */
enum {
    QCOW2_HEADER_SIZE_AT = 24,         /* size, (crypt), L1 entries, L1 offset: 24 bytes */
    QCOW2_HEADER_REFTABLE_AT = 48,     /* refcount table offset and clusters: 12 bytes */
    QCOW2_HEADER_INCOMPATIBLE_AT = 72, /* 8 bytes */
    QCOW2_HEADER_AUTOCLEAR_AT = 88,    /* 8 bytes */
};

enum qcow2_incompatible {
    QCOW2_INCOMPAT_DIRTY = 1 << 0,
    QCOW2_INCOMPAT_CORRUPT = 1 << 1,
    QCOW2_INCOMPAT_DATA_FILE = 1 << 2,
    QCOW2_INCOMPAT_COMPRESSION = 1 << 3,
    QCOW2_INCOMPAT_EXTENDED_L2 = 1 << 4,
    QCOW2_INCOMPAT_KNOWN = (1 << 5) - 1,
};
enum qcow2_compatible { QCOW2_COMPAT_LAZY_REFCOUNTS = 1 << 0 };
enum qcow2_autoclear { QCOW2_AUTOCLEAR_BITMAPS = 1 << 0, QCOW2_AUTOCLEAR_DATA_FILE_RAW = 1 << 1 };

enum qcow2_crypt { QCOW2_CRYPT_NONE, QCOW2_CRYPT_AES, QCOW2_CRYPT_LUKS };
enum qcow2_compression { QCOW2_COMPRESSION_ZLIB, QCOW2_COMPRESSION_ZSTD };

/* Extension types. */
#define QCOW2_EXT_END 0x00000000u
#define QCOW2_EXT_BACKING_FORMAT 0xe2792acau
#define QCOW2_EXT_FEATURE_TABLE 0x6803f857u
#define QCOW2_EXT_BITMAPS 0x23852875u
#define QCOW2_EXT_CRYPTO 0x0537be77u
#define QCOW2_EXT_DATA_FILE 0x44415441u
/* Ours, and only while a header is being rewritten (header_write.c): skipped, not kept. */
#define QCOW2_EXT_PADDING 0x50414421u

/* An extension kept as it was. */
struct qcow2_ext {
    uint32_t type, length;
    uint8_t *data;
};

struct qcow2_header {
    uint32_t version; /* 2 or 3 */
    uint32_t cluster_bits;
    uint64_t size;
    uint32_t crypt_method;
    uint32_t l1_size; /* entries */
    uint64_t l1_table_offset;
    uint64_t refcount_table_offset;
    uint32_t refcount_table_clusters;
    uint32_t nb_snapshots;
    uint64_t snapshots_offset;
    uint64_t incompatible, compatible, autoclear;
    uint32_t refcount_order;
    uint32_t header_length;   /* 72 for version 2 */
    uint8_t compression_type; /* 0 where the field is absent */
    /* Header bytes [QCOW2_V3_LENGTH, header_length) that this code does not know, kept. */
    uint8_t *trailing;
    uint32_t trailing_len;

    char *backing_file;   /* NULL: none */
    char *backing_format; /* NULL: not recorded */
    char *data_file;      /* external data file name; NULL: none recorded */
    bool has_bitmaps, has_crypto;
    uint32_t bitmaps_count;
    uint64_t bitmaps_dir_size, bitmaps_dir_offset;
    uint64_t crypto_offset, crypto_length;
    /* Feature name table, raw 48-byte records; NULL: none. */
    uint8_t *feature_table;
    uint32_t feature_table_len;
    /* Unknown extensions in their order. */
    struct qcow2_ext *unknown;
    unsigned unknown_count;
};

/*
 * Looks at the first `len` bytes of a file: 0 when it starts with the qcow2 magic and a version
 * that this code reads, -EINVAL when it is not qcow2, -ENOTSUP for other versions.  On success
 * *need is the number of bytes, from offset 0, that qcow2_header_decode wants (at most one
 * cluster).
 */
int qcow2_header_peek(const uint8_t *buf, size_t len, uint32_t *need, struct err *e);

/*
 * Decodes `len` bytes from offset 0 (peek's `need`; zero-filled behind the end of the file).  On
 * success the caller frees *h with qcow2_header_free.  On error *h is empty.  -EINVAL (out of
 * range; the text gives found value and limit), -ENOTSUP (version), -ENOMEM.
 */
int qcow2_header_decode(const uint8_t *buf, size_t len, struct qcow2_header *h, struct err *e);

/*
 * Encodes header, extensions and backing name into `buf` (all `cap` bytes are written, zeros
 * behind).  Order: backing format, data file, crypto, feature table, bitmaps, unknown ones, end,
 * backing name.  Returns the bytes used (also what the file needs to hold), or -ENOSPC when `cap`
 * (one cluster) is too small.  Version 2 headers carry no version 3 fields.
 */
int64_t qcow2_header_encode(const struct qcow2_header *h, uint8_t *buf, size_t cap, struct err *e);

/* Accepts an empty header.  Leaves it empty. */
void qcow2_header_free(struct qcow2_header *h);

/*
 * Tables where they may be: aligned, below the offset limit, capped, large enough for `size`, and
 * not overlapping each other or the header.  -EINVAL / -EFBIG; the text names table, found value
 * and limit.  Two parts, so that `check` can report one and go on with the other.
 */
int qcow2_header_check_l1(const struct qcow2_header *h, struct err *e);
int qcow2_header_check_reftable(const struct qcow2_header *h, struct err *e);
int qcow2_header_check_snapshots(const struct qcow2_header *h, struct err *e);

/* Whether this program reads (and writes, when `rw`) images with these features.  -ENOTSUP with the
 * feature's name; -EROFS for those that may be read but not written. */
int qcow2_header_check_features(const struct qcow2_header *h, bool rw, bool check, struct err *e);

/*
 * Name of feature `bit` of `kind` (0 incompatible, 1 compatible, 2 autoclear): from the image's
 * table, else ours, else "unknown feature N".  `buf` receives it, made printable.
 */
void qcow2_feature_name(const struct qcow2_header *h, unsigned kind, unsigned bit, char buf[64]);

/* The feature name table that we write into new images. */
void qcow2_feature_table_default(struct qcow2_header *h);

/* Log2 of the bytes of an L2 entry. */
static inline uint32_t qcow2_l2e_shift(bool extended_l2) {
    return extended_l2 ? 4 : 3;
}
static inline bool qcow2_header_extended(const struct qcow2_header *h) {
    return h->incompatible & QCOW2_INCOMPAT_EXTENDED_L2;
}
static inline bool qcow2_header_data_apart(const struct qcow2_header *h) {
    return h->incompatible & QCOW2_INCOMPAT_DATA_FILE;
}
/* L1 entries that `size` guest bytes need. */
uint64_t qcow2_l1_entries_for(uint32_t cluster_bits, bool extended_l2, uint64_t size);

#endif
