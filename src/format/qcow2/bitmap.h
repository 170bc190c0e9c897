/* SPDX-License-Identifier: MIT */
/*
 * Persistent bitmaps in qcow2: what bitmap_dir.c (the directory, opening) and bitmap_store.c
 * (content, in-use marks, storing) share.
 *
 *      header extension --> directory: one entry a bitmap --> table --> data clusters
 *
 * Every bitmap of the image is a struct bitmap of the node, whose cookie is a qcow2_bitmap, also
 * one that cannot be used: it is kept byte by byte.
 *
 * Source: the public qcow2 specification ("Bitmaps extension", "Bitmaps").
 */
#ifndef STRATA_FORMAT_QCOW2_BITMAP_H
#define STRATA_FORMAT_QCOW2_BITMAP_H

#include "disk/bitmap.h"
#include "format/qcow2/qcow2.h"

enum {
    QCOW2_BITMAP_FIXED = 24, /* bytes of a directory entry before extra data and name */
    QCOW2_BITMAP_FLAGS_AT = 12,
    QCOW2_BITMAP_DIR_BYTES_MAX = 64 << 20,
    /* Tables of all bitmaps that are held at once; they cover 512 GiB of data at 64 KiB. */
    QCOW2_BITMAP_TABLES_BYTES_MAX = 64 << 20,
};
enum qcow2_bitmap_flags {
    QCOW2_BITMAP_IN_USE = 1,
    QCOW2_BITMAP_AUTO = 2,
    QCOW2_BITMAP_EXTRA_COMPATIBLE = 4, /* usable although the extra data is unknown */
    QCOW2_BITMAP_FLAGS = 7,
};
#define QCOW2_BITMAP_ALL_ONES ((uint64_t)1) /* in a table entry without an offset */

/* The stored form of one bitmap. */
struct qcow2_bitmap {
    uint64_t entry_at; /* where its directory entry lies */
    uint64_t doubt_at; /* and where it may lie: another directory may be in force; 0: no doubt */
    uint64_t table_offset;
    uint32_t table_entries;
    uint32_t flags;
    uint8_t *extra; /* kept; NULL: none */
    uint32_t extra_length;
    uint64_t *table; /* host byte order; read-write nodes, and NULL when it is damaged */
};

static inline uint64_t qcow2_bitmap_entry_bytes(uint64_t name, uint64_t extra) {
    return align_up(QCOW2_BITMAP_FIXED + name + extra, 8);
}
/* Bits in one cluster of bitmap data. */
static inline uint64_t qcow2_bitmap_span(const struct qcow2 *s) {
    return (uint64_t)s->cluster_size * 8;
}
void qcow2_bitmap_free(struct qcow2_bitmap *q); /* accepts NULL */
/* The table of `q` as it is on storage, checked entry by entry.  The caller frees it. */
int qcow2_bitmap_table_co(struct qcow2 *s, const struct qcow2_bitmap *q, uint64_t **out,
                          struct err *e);

#endif
