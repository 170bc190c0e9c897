/* SPDX-License-Identifier: MIT */
/*
 * Parallels expandable images: a header, a one-level table, clusters.
 *
 *      | header (64 bytes) | u32 a cluster | ... data offset | clusters |
 *
 * A table entry is 0 (nothing there: zeros) or where a cluster lies: in sectors in images of the
 * old magic, in clusters in those of the new one.  New clusters are appended.  Numbers are
 * little-endian.
 *
 * Write order of a flush: data, a barrier, table entries, a barrier.  A crash leaves clusters
 * without a name.  Before the first of them is taken the header says, stably, that the image is in
 * use, and a clean close takes that back, as other writers do: theirs need a repair after a crash.
 *
 * Dirty bitmaps in a format extension would become untrue by a write, so the first one lets the
 * header forget them.
 *
 * Facts: the public specification (qemu/qemu docs/interop/parallels.rst).
 */
#ifndef STRATA_FORMAT_PARALLELS_PARALLELS_H
#define STRATA_FORMAT_PARALLELS_PARALLELS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "base/opt.h"
#include "disk/driver.h"
#include "disk/node.h"
#include "format/pages.h"
#include "runtime/task.h"

struct create_ctx;

#define PARALLELS_HEADER_BYTES 64u
#define PARALLELS_SECTOR 512u
#define PARALLELS_IN_USE 0x746f6e59u
#define PARALLELS_CLUSTER_MAX (256u << 20)
#define PARALLELS_ENTRIES_MAX ((uint32_t)INT32_MAX / 4)

#define PARALLELS_EXTENSION_MAGIC UINT64_C(0xab234cef23dcea87)
#define PARALLELS_MAGIC_OLD "WithoutFreeSpace"
#define PARALLELS_MAGIC_NEW "WithouFreSpacExt"

enum parallels_field {
    PARALLELS_AT_VERSION = 16,
    PARALLELS_AT_HEADS = 20,
    PARALLELS_AT_CYLINDERS = 24,
    PARALLELS_AT_TRACKS = 28, /* sectors of a cluster */
    PARALLELS_AT_ENTRIES = 32,
    PARALLELS_AT_SECTORS = 36,
    PARALLELS_AT_IN_USE = 44,
    PARALLELS_AT_DATA = 48,
    PARALLELS_AT_FLAGS = 52,
    PARALLELS_AT_EXTENSION = 56,
};

struct parallels {
    struct node *node, *file;
    uint8_t header[PARALLELS_HEADER_BYTES]; /* as on storage */
    uint32_t cluster_size, entries;
    uint32_t unit; /* bytes that an entry counts */
    uint64_t data_offset;
    uint64_t end; /* no cluster uses bytes from here on; known when scanned */
    bool scanned, marked;
    bool data_wrong; /* the header has another data offset, which cannot be; opened for a check */
    struct pages pages;
    struct task_mutex alloc_lock, flush_lock;
};

static inline struct parallels *parallels_of(struct node *n) {
    return n->state;
}

/* ---- open.c ---- */
/* Writes the header as it is in s->header, stably. */
int parallels_header_write_co(struct parallels *s);
/*
 * A change makes the format extension forgotten.  A feature in it may say that whoever does not
 * know it must not change the image, and none is known here: -ENOTSUP.
 */
int parallels_check_extension_co(struct parallels *s, struct err *e);

/* ---- map.c ---- */
/* A cluster that lies in the file, as far as its length tells: the last one may be cut. */
bool parallels_entry_is_sane(const struct parallels *s, uint32_t entry);
int parallels_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out);
int parallels_place_co(struct node *n, uint64_t offset, uint64_t length, unsigned flags,
                       uint32_t coded_length, struct placement *out);
int parallels_publish_co(struct node *n, const struct placement *p);
void parallels_abandon(struct node *n, const struct placement *p);
int parallels_flush_co(struct node *n);
/* Finds `end`. */
int parallels_scan_co(struct parallels *s);

/* ---- create.c ---- */
struct parallels_create_opts {
    uint64_t size, cluster_size;
};
extern const struct opt parallels_create_opt_table[];
int parallels_create_co(struct node *file, const void *create_opts, struct create_ctx *ctx,
                        struct err *e);
int parallels_measure(const void *create_opts, const struct measure_in *in,
                      struct measure_result *out, struct err *e);
int parallels_reach_co(struct node *n, uint64_t size, struct err *e);
int parallels_resize_co(struct node *n, uint64_t size, int prealloc, struct err *e);

/* ---- check.c ---- */
int parallels_check_co(struct node *n, struct check_result *r, struct err *e);

#endif
