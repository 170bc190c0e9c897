/* SPDX-License-Identifier: MIT */
/*
 * QED: a two-level map without reference counts.
 *
 *      | header (header_size clusters) | clusters: L1 table, L2 tables, data |
 *
 * All tables are table_size clusters of 64-bit little-endian entries.  An L1 entry is 0 or the
 * offset of an L2 table; an L2 entry is 0 (the layer below decides), 1 (zeros) or the offset of a
 * data cluster.  New clusters are taken at the end of the file.
 *
 * Write order of a flush: data and empty tables, a barrier; L2 entries, a barrier; L1 entries, a
 * barrier.  So a crash leaves clusters without a name at most, and the "need check" feature, by
 * which other writers say that they were less careful, is never set here.
 *
 * Facts: the public specification (qemu/qemu docs/interop/qed_spec.txt).
 */
#ifndef STRATA_FORMAT_QED_QED_H
#define STRATA_FORMAT_QED_QED_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "base/opt.h"
#include "disk/driver.h"
#include "disk/node.h"
#include "format/pages.h"
#include "format/spares.h"
#include "runtime/task.h"

struct create_ctx;

#define QED_MAGIC 0x00444551u /* "QED\0" */
#define QED_HEADER_BYTES 64u
#define QED_CLUSTER_MIN 4096u
#define QED_CLUSTER_MAX (64u << 20)
#define QED_TABLE_MAX 16u
#define QED_NAME_MAX 1023u

enum qed_feature {
    QED_BACKING_FILE = 1,
    QED_NEED_CHECK = 2,
    QED_BACKING_RAW = 4, /* the backing file is raw: not to be probed */
    QED_FEATURES = 7,
};

#define QED_ENTRY_NONE 0u
#define QED_ENTRY_ZERO 1u

enum { QED_LEVEL_L2, QED_LEVEL_L1 }; /* of pages */

struct qed_header {
    uint32_t cluster_size, table_size, header_size;
    uint64_t features, compat, autoclear, l1_offset, size;
    uint32_t name_offset, name_length; /* 0: no backing file */
};

int qed_header_parse(const uint8_t *buf, struct qed_header *h, struct err *e); /* 64 bytes; pure */
void qed_header_store(const struct qed_header *h, uint8_t *buf);
/* Bytes of disk that the map can hold, at most INT64_MAX. */
uint64_t qed_size_max(uint32_t cluster_size, uint32_t table_size);

struct qed {
    struct node *node, *file;
    struct qed_header h;
    uint32_t cluster_bits, entry_bits; /* log2 of the cluster size, of entries in a table */
    uint64_t table_bytes;
    uint64_t next; /* cluster that nothing uses, from here on */
    struct pages pages;
    struct spares spares; /* clusters below `next` */
    struct task_mutex table_lock, flush_lock;
};

static inline struct qed *qed_of(struct node *n) {
    return n->state;
}
/* A cluster or table of `bytes` at `offset`: aligned, behind the header, inside the file. */
static inline bool qed_inside(const struct qed *s, uint64_t offset, uint64_t bytes) {
    return !(offset & (s->h.cluster_size - 1)) &&
           offset >= (uint64_t)s->h.header_size * s->h.cluster_size && offset <= s->file->size &&
           bytes <= s->file->size - offset;
}

/* A data cluster: it may end behind the end of the file, not begin there. */
static inline bool qed_data_inside(const struct qed *s, uint64_t entry) {
    return entry < s->file->size && qed_inside(s, entry, 0);
}

/* ---- open.c ---- */
int qed_header_write_co(struct qed *s);

/* ---- map.c ---- */
int qed_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out);
int qed_place_co(struct node *n, uint64_t offset, uint64_t length, unsigned flags,
                 uint32_t coded_length, struct placement *out);
int qed_publish_co(struct node *n, const struct placement *p);
void qed_abandon(struct node *n, const struct placement *p);
int qed_set_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags);
int qed_flush_co(struct node *n);

/* ---- create.c ---- */
struct qed_create_opts {
    uint64_t size, cluster_size, table_size;
    char *backing_file, *backing_fmt;
};
extern const struct opt qed_create_opt_table[];
int qed_create_co(struct node *file, const void *create_opts, struct create_ctx *ctx,
                  struct err *e);
int qed_measure(const void *create_opts, const struct measure_in *in, struct measure_result *out,
                struct err *e);
int qed_reach_co(struct node *n, uint64_t size, struct err *e);
int qed_resize_co(struct node *n, uint64_t size, int prealloc, struct err *e);
int qed_empty_co(struct node *n, struct err *e);
int qed_set_backing_co(struct node *n, const char *name, const char *format, struct err *e);

/* ---- check.c ---- */
int qed_check_co(struct node *n, struct check_result *r, struct err *e);

#endif
