/* SPDX-License-Identifier: MIT */
/*
 * VMDK: the disk image of VMware.
 *
 * A text, the descriptor, lists extents: pieces of the disk, one behind the other, each in a file
 * of its own or all in one.  The descriptor is a file by itself or lies inside the one sparse
 * extent.
 *
 *      descriptor --- extent 0 --- FLAT, VMFS: guest bytes as they are, at an offset of the file
 *                 \-- extent 1 --- SPARSE "KDMV": header, grain directory, grain tables, grains
 *                  \- extent 2 --- ZERO: no file
 *                                  VMFSSPARSE "COWD", SESPARSE: other tables, read only
 *
 * KDMV: a directory entry is the sector of a grain table or 0; a table entry is the sector of a
 * grain, 0 (the layer below decides) or, when the header says so, 1 (zeros).  Most files have all
 * tables twice, the redundant ones are kept equal.  New tables and grains are taken at the end of
 * the file; grains that have a place keep it.
 *
 * streamOptimized: grains are compressed, each behind a marker of 12 bytes that says which it is,
 * written once and in order; tables follow behind them with markers of their own (stream.c).
 *
 * Invariants
 *  1. A map never answers with bytes outside of an extent's file ranges: a FLAT extent's range is
 *     its own, a grain lies behind the header and begins inside its file.
 *  2. Names of extents are claims: they pass the gate (disk/open.h), are paths and nothing else,
 * and must be regular files or block devices.
 *  3. The content ID changes, stably, before the first write after an open reaches the disk: until
 *     then nothing is in place for writing.
 *  4. Writing needs every extent that begins at a multiple of the node's granularity, so that no
 *     grain is part of two units of the engine's locks.
 *
 * Write order of a flush: data and new empty tables, a barrier; table entries, a barrier; directory
 * entries, a barrier.  A crash in between leaves grains and tables without a name.  The redundant
 * tables travel with the others: a crash may leave them behind, never naming what is not there.
 *
 * Facts: VMware's technical note "Virtual Disk Format 5.0", libyal/libvmdk's format document, the
 * vendor's own reader and writer of streams (vmware/open-vmdk vmdk/sparse.c); qemu/qemu
 * block/vmdk.c for COWD, seSparse, and what that reader accepts.
 */
#ifndef STRATA_FORMAT_VMDK_VMDK_H
#define STRATA_FORMAT_VMDK_VMDK_H

#include <stdbool.h>
#include <stdint.h>
#include <jansson.h>

#include "base/err.h"
#include "base/opt.h"
#include "base/strbuf.h"
#include "disk/driver.h"
#include "disk/node.h"
#include "format/pages.h"
#include "runtime/task.h"

struct create_ctx;

#define VMDK_SECTOR 512u
#define VMDK_MAGIC 0x564d444bu /* "KDMV" */
#define VMDK_COWD_MAGIC 0x44574f43u
#define VMDK_SE_MAGIC UINT64_C(0xcafebabe)
#define VMDK_SE_VOLATILE_MAGIC UINT64_C(0xcafecafe)
#define VMDK_SE_VERSION UINT64_C(0x0000000200000001)
#define VMDK_HEADER_BYTES 512u
#define VMDK_GD_AT_END UINT64_MAX
#define VMDK_NO_PARENT 0xffffffffu
#define VMDK_GTES 512u
#define VMDK_GRAIN_MIN 4096u
#define VMDK_GRAIN_MAX (1u << 20) /* a unit's code and buffers stay below 2 MiB */
#define VMDK_GTES_MAX 8192u
/* 2 TiB in pieces of 64 MiB; each needs a descriptor of the process when it has a file. */
#define VMDK_EXTENTS_MAX 32768u
#define VMDK_DESC_MAX (4u << 20) /* of text */
#define VMDK_DESC_SECTORS 20u    /* what is kept for it inside a sparse file */
#define VMDK_ACTIVE_MAX 64u
#define VMDK_PAGES_BYTES (16u << 20)   /* of tables in memory, all extents together */
#define VMDK_SPLIT_BYTES (2048u << 20) /* the twoGbMaxExtent types are cut here */

enum vmdk_header_flags {
    VMDK_NEWLINES = 1,
    VMDK_REDUNDANT = 2,
    VMDK_ZEROED = 4,
    VMDK_COMPRESSED = 1 << 16,
    VMDK_MARKERS = 1 << 17,
    VMDK_FLAGS_KNOWN = 0x30007,
};

struct vmdk_header {
    uint32_t version, flags, gtes, compression;
    uint64_t capacity, grain, desc_offset, desc_size, rgd, gd, overhead; /* sectors */
    bool unclean;
};

enum vmdk_access { VMDK_RW, VMDK_RDONLY, VMDK_NOACCESS };
enum vmdk_type { VMDK_FLAT, VMDK_VMFS, VMDK_ZERO, VMDK_SPARSE, VMDK_COWD, VMDK_SE, VMDK_TYPES };
extern const char *const vmdk_type_names[];

enum { VMDK_LEVEL_GT, VMDK_LEVEL_GD }; /* of pages */

/* Grains that were made room for and then not used, to be taken again. */
struct vmdk_spare {
    uint64_t at, bytes;
};

struct vmdk_stream;

/* The tables of one sparse file. */
struct vmdk_map {
    struct node *file;    /* borrowed */
    struct vmdk_header h; /* KDMV */
    enum vmdk_type type;
    uint32_t entry_bytes; /* 4, seSparse 8 */
    uint32_t grain_bytes, gt_entries;
    uint64_t covers;              /* guest bytes of one grain table */
    uint64_t gd, rgd, gd_entries; /* host bytes; rgd 0: none */
    uint64_t gts, grains;         /* seSparse: where both kinds begin */
    uint64_t capacity;            /* bytes */
    uint64_t low;                 /* host: grains and tables lie behind this */
    bool zeroed, coded, writable; /* writable: by the extent's access and the node's */
    const struct codec *codec;
    const char *frozen; /* why it cannot be written; NULL: it can */
    /* writing */
    uint64_t next; /* host: behind all that is in use */
    bool scanned;
    struct vmdk_stream *stream;
    struct pages pages;
    struct vmdk_spare *spares;
    size_t spare_count, spare_cap;
    uint64_t data_low; /* host: grains lie behind this */
    struct task_mutex table_lock, flush_lock;
    bool active; /* in vmdk->active: may hold pages */
};

struct vmdk_extent {
    uint64_t start, length; /* guest bytes */
    uint64_t offset;        /* FLAT: host bytes */
    enum vmdk_access access;
    enum vmdk_type type;
    char *name;        /* as the descriptor says; NULL: none */
    struct node *file; /* borrowed; NULL: none, or not opened */
    struct vmdk_map *map;
    char *problem; /* why it could not be opened, for check */
};

/* What a descriptor says. */
struct vmdk_desc {
    uint32_t version, cid, parent_cid;
    uint32_t cid_at, parent_at; /* where the digits lie in the text; 0: there are none */
    uint8_t cid_digits, parent_digits;
    char *create_type, *hint; /* NULL: none */
    struct vmdk_extent *extents;
    size_t count, cap;
    uint64_t size; /* of all extents */
    json_t *ddb;   /* the first of the disk database's entries */
};

struct vmdk {
    struct node *node, *file;
    struct vmdk_desc d;
    uint64_t text_at, text_room; /* of the descriptor in `file`, bytes */
    bool embedded, wrote;        /* in a sparse file; the content ID has changed since the open */
    const char *frozen;          /* why nothing can be written at all */
    struct task_mutex cid_lock;
    /* Maps that may hold pages of tables: memory is bounded however many there are. */
    struct vmdk_map *active[VMDK_ACTIVE_MAX];
    unsigned active_count, active_hand;
    size_t pages_bytes; /* for each of them */
};

static inline struct vmdk *vmdk_of(struct node *n) {
    return n->state;
}

/* ---- header.c: pure ---- */
int vmdk_header_parse(const uint8_t *buf, struct vmdk_header *h, struct err *e);
void vmdk_header_store(const struct vmdk_header *h, uint8_t *buf);

/* ---- descriptor.c: pure ---- */
/* Whether the first bytes of a file can be those of a descriptor. */
bool vmdk_desc_probe(const uint8_t *head, size_t length);
/* `d` is empty; freed by the caller after an error too. */
int vmdk_desc_parse(const char *text, size_t length, struct vmdk_desc *d, struct err *e);
void vmdk_desc_free(struct vmdk_desc *d);
/* The text with another parent; NULL hint: none. */
void vmdk_desc_rewrite(const char *text, size_t length, uint32_t parent_cid, const char *hint,
                       struct strbuf *out);
bool vmdk_type_is_sparse(enum vmdk_type t);

/* ---- open.c ---- */
/* Before the first change: the content ID. */
int vmdk_modified_co(struct vmdk *s);
/* The content ID of the VMDK image that lies below; false: it is none. */
bool vmdk_cid_of(struct node *below, uint32_t *cid);
int vmdk_map_open_co(struct node *file, uint64_t limit, struct vmdk_map **out, struct err *e);
void vmdk_map_free(struct vmdk_map *m);

/* ---- map.c ---- */
struct vmdk_extent *vmdk_extent_at(struct vmdk *s, uint64_t offset);
int vmdk_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out);
/* Before any of its tables is looked at.  -ENOMEM, -EIO. */
int vmdk_activate_co(struct vmdk *s, struct vmdk_map *m);
/* The entry of table `table` (host offset); `left`: entries from it on in this piece. */
int vmdk_entry_co(struct vmdk_map *m, uint64_t table, uint64_t index, unsigned level,
                  struct page **page, uint8_t **at, uint32_t *left);
/* The grain table of extent offset `at`, 0: none. */
int vmdk_table_co(struct vmdk_map *m, uint64_t at, bool redundant, uint64_t *table);
/* [at, +bytes) of the file can hold a grain or table. */
bool vmdk_inside(const struct vmdk_map *m, uint64_t at, uint64_t bytes);
/* As vmdk_map_co in one sparse file. */
int vmdk_sparse_map_co(struct vmdk_map *m, uint64_t at, uint64_t length, struct extent *out);

/* ---- place.c ---- */
int vmdk_place_co(struct node *n, uint64_t offset, uint64_t length, unsigned flags,
                  uint32_t coded_length, struct placement *out);
int vmdk_publish_co(struct node *n, const struct placement *p);
void vmdk_abandon(struct node *n, const struct placement *p);
int vmdk_set_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags);
int vmdk_discard_co(struct node *n, uint64_t offset, uint64_t length);
int vmdk_flush_co(struct node *n);
/* All of one sparse file. */
int vmdk_map_flush_co(struct vmdk_map *m);

/* ---- stream.c ---- */
/* Before the first grain after an open.  -ENOTSUP with m->frozen set. */
int vmdk_stream_begin_co(struct vmdk_map *m);
void vmdk_stream_free(struct vmdk_map *m);
/* The entry of extent offset `at`, and the next one's for the length of the code. */
int vmdk_stream_entry_co(struct vmdk_map *m, uint64_t at, uint32_t *entry, uint32_t *next,
                         bool *known);
int vmdk_stream_place_co(struct vmdk_map *m, uint64_t at, uint32_t coded_length, uint64_t *host);
int vmdk_stream_publish_co(struct vmdk_map *m, uint64_t at, uint64_t host, uint32_t coded_length);
/* Tables, directory, footer, end; then the header says so. */
int vmdk_stream_flush_co(struct vmdk_map *m);

/* ---- create.c ---- */
struct vmdk_create_opts {
    uint64_t size, hwversion_number;
    char *backing_file, *backing_fmt, *hwversion, *toolsversion;
    bool compat6, zeroed_grain;
    int subformat, adapter, preallocation;
};
extern const struct opt vmdk_create_opt_table[];
int vmdk_create_co(struct node *file, const void *create_opts, struct create_ctx *ctx,
                   struct err *e);
int vmdk_measure(const void *create_opts, const struct measure_in *in, struct measure_result *out,
                 struct err *e);
int vmdk_empty_co(struct node *n, struct err *e);
int vmdk_set_backing_co(struct node *n, const char *name, const char *format, struct err *e);

/* ---- check.c ---- */
int vmdk_check_co(struct node *n, struct check_result *r, struct err *e);

/* ---- describe.c ---- */
json_t *vmdk_describe(struct node *n);

#endif
