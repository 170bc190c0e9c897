/* SPDX-License-Identifier: MIT */
/*
 * VHDX: the disk image of Hyper-V.
 *
 *      0        64K   128K  192K     256K     1M
 *      | ident | head | head | regions | regions | log | BAT | metadata | blocks, each whole MiB |
 *
 * Two headers with sequence numbers: the valid one with the higher number counts, the other one is
 * written next.  Two region tables, equal, say where BAT and metadata lie.  A BAT entry is the
 * state of a block and its place in MiB.  After each `ratio` entries of blocks (a chunk) one entry
 * names a sector bitmap, which only differencing images use: one bit a sector, least significant
 * first, 1: in this file.
 *
 * Numbers are little-endian, checksums CRC-32C, everything is placed in MiB.
 *
 * Writing.  Every change of the BAT and of the metadata passes the log, a ring of entries of 4 KiB
 * sectors; the header's log GUID says that the log counts (log.c, journal.c).  A flush:
 *
 *      copies of the changed pages are taken
 *      the file is made long enough for all blocks       a barrier: data, and what earlier flushes
 *                                                        wrote in place: the log is empty
 *      the copies go into the log                        a barrier: they are stable from here on
 *      the copies go in place                            no barrier: the log has them
 *
 * so a flush costs the two barriers that any table costs, and a crash leaves blocks without a name
 * at most.  Before the first change after an image was opened the headers get new GUIDs for the
 * file, its data and the log; map answers name nothing to be written in place before that has
 * happened.  A clean close takes the log's GUID away.
 *
 * Blocks are appended at the end of the file and kept.  A differencing image takes whole blocks,
 * too: a block that it holds in part is written anew with all its sectors.
 *
 * A log that counts is replayed when an image is opened read-write.  Read-only the file stays as it
 * is: an index of what the log changes lies over every read of metadata (struct vhdx_replay).
 *
 * Facts: [MS-VHDX], Microsoft's "VHDX Format Specification" 1.00; states of older drafts and equal
 * headers as libyal/libvhdi's documentation of the format reports them.
 */
#ifndef STRATA_FORMAT_VHDX_VHDX_H
#define STRATA_FORMAT_VHDX_VHDX_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "base/err.h"
#include "base/opt.h"
#include "disk/driver.h"
#include "disk/node.h"
#include "format/pages.h"
#include "runtime/task.h"

struct create_ctx;
struct open_ctx;

#define VHDX_MIB (UINT64_C(1) << 20)
#define VHDX_HEADER_BYTES 4096u
#define VHDX_REGION_TABLE_BYTES 65536u
#define VHDX_METADATA_TABLE_BYTES 65536u
#define VHDX_ENTRIES_MAX 2047u /* of a region or metadata table */
#define VHDX_ITEM_BYTES_MAX (1u << 20)
#define VHDX_BLOCK_MIN (1u << 20)
#define VHDX_BLOCK_MAX (256u << 20)
#define VHDX_SIZE_MAX (UINT64_C(64) << 40)
#define VHDX_FILE_MAX (UINT64_C(80) << 40) /* of what a log may make of a file */
#define VHDX_SECTOR 4096u                  /* of the log */
#define VHDX_LOG_MAX (UINT64_C(4095) << 20)

#define VHDX_HEADER_AT(i) ((uint64_t)(64 + 64 * (i)) << 10)
#define VHDX_REGIONS_AT(i) ((uint64_t)(192 + 64 * (i)) << 10)

enum vhdx_state {
    VHDX_NOT_PRESENT,
    VHDX_UNDEFINED,
    VHDX_ZERO,
    VHDX_UNMAPPED,
    VHDX_UNMAPPED_OLD = 5, /* of a draft */
    VHDX_PRESENT,
    VHDX_PARTIAL, /* a bitmap tells which sectors */
};
#define VHDX_STATE_MASK UINT64_C(7)
#define VHDX_OFFSET_MASK (~UINT64_C(0) << 20)

struct vhdx_guid {
    uint8_t b[16]; /* as stored: three fields little-endian */
};

struct vhdx_header {
    uint64_t sequence;
    struct vhdx_guid file_write, data_write, log_guid;
    uint64_t log_offset;
    uint32_t log_length;
};

struct vhdx_range {
    uint64_t offset, length;
};

enum vhdx_region { VHDX_BAT, VHDX_METADATA, VHDX_OTHER };

struct vhdx_regions {
    struct vhdx_range bat, metadata;
    struct vhdx_range *others; /* optional ones that are not known here; owned */
    uint32_t other_count;
};

struct vhdx_metadata {
    uint32_t block_size, logical_sector, physical_sector;
    bool fixed, has_parent;
    uint64_t size;    /* of the disk */
    uint64_t size_at; /* where in the file it stands */
    struct vhdx_guid disk_id;
    struct vhdx_range locator; /* length 0: none */
};

/* Places of the items that are known, by the table; length 0: not there. */
enum vhdx_item {
    VHDX_ITEM_PARAMETERS,
    VHDX_ITEM_SIZE,
    VHDX_ITEM_DISK_ID,
    VHDX_ITEM_LOGICAL,
    VHDX_ITEM_PHYSICAL,
    VHDX_ITEM_LOCATOR,
    VHDX_ITEMS
};

/* ---- layout.c: bytes and numbers, pure ---- */
extern const struct vhdx_guid vhdx_region_guid[2], vhdx_item_guid[VHDX_ITEMS], vhdx_locator_guid;
void vhdx_guid_text(const struct vhdx_guid *g, char out[37]);
bool vhdx_guid_parse(const char *text, struct vhdx_guid *g); /* braces or not */
int vhdx_guid_random(struct vhdx_guid *g);
bool vhdx_guid_is_null(const struct vhdx_guid *g);
static inline bool vhdx_guid_same(const struct vhdx_guid *a, const struct vhdx_guid *b) {
    return !memcmp(a->b, b->b, 16);
}
/* 4096 bytes.  -EINVAL: not a whole header; -ENOTSUP: of another version. */
int vhdx_header_parse(const uint8_t *buf, struct vhdx_header *h, struct err *e);
void vhdx_header_store(const struct vhdx_header *h, uint8_t *buf);
/* Both 64 KiB.  `out->others` is the caller's to free, after an error too. */
int vhdx_regions_parse(const uint8_t *buf, struct vhdx_regions *out, struct err *e);
void vhdx_regions_store(const struct vhdx_range *bat, const struct vhdx_range *metadata,
                        uint8_t *buf);
/* Moves the BAT in a table as it is. */
void vhdx_regions_move_bat(uint8_t *buf, const struct vhdx_range *bat);
/* `buf`: the table; items relative to the region, which has `length` bytes. */
int vhdx_items_parse(const uint8_t *buf, uint64_t length, struct vhdx_range items[VHDX_ITEMS],
                     struct err *e);
/*
 * The table names a parent locator of `bytes` in the region of `length`, where the old one is or
 * behind all items; 0: no longer any.  -ENOSPC.
 */
int vhdx_items_place_locator(uint8_t *buf, uint64_t length, uint32_t bytes, struct vhdx_range *at);
/* The table and the items behind it, for an image with parameters `m`: 128 KiB. */
void vhdx_metadata_store(const struct vhdx_metadata *m, const uint8_t *locator,
                         uint32_t locator_bytes, uint8_t *buf);
/* Checks the values, which came from items. */
int vhdx_metadata_check(const struct vhdx_metadata *m, struct err *e);
static inline uint32_t vhdx_ratio(const struct vhdx_metadata *m) {
    return (uint32_t)((UINT64_C(1) << 23) * m->logical_sector / m->block_size);
}
/* Entries of the BAT for a disk of `size` bytes. */
uint64_t vhdx_bat_entries(const struct vhdx_metadata *m, uint64_t size);
/* The entry of a block, and of the bitmap of its chunk. */
static inline uint64_t vhdx_entry_index(uint32_t ratio, uint64_t block) {
    return block + block / ratio;
}
static inline uint64_t vhdx_bitmap_index(uint32_t ratio, uint64_t block) {
    return (block / ratio + 1) * (ratio + UINT64_C(1)) - 1;
}

/* ---- log.c: what a log says ---- */
/* One sector of the file, or a range of zeros. */
struct vhdx_change {
    uint64_t offset, length; /* in the file; length is one sector unless zero */
    uint64_t log_at;         /* place of the data sector in the log's ring */
    uint32_t order;          /* later ones win */
    uint32_t trailing;
    uint64_t leading;
};
struct vhdx_replay {
    struct vhdx_change *data; /* by offset, then order */
    struct vhdx_change *zero; /* by order */
    uint32_t data_count, data_cap, zero_count, zero_cap;
    uint32_t entries;
    uint64_t flushed, last; /* file lengths that the log needs, and makes */
};
struct vhdx;
/* Finds the active sequence.  -EINVAL: the log cannot be used. */
int vhdx_log_read_co(struct vhdx *s, struct vhdx_replay *out, struct err *e);
void vhdx_replay_free(struct vhdx_replay *p);
/* Applies it to the file, flushed.  The header still says that the log counts. */
int vhdx_log_apply_co(struct vhdx *s, const struct vhdx_replay *p, struct err *e);
/* As if it had been applied: `length` bytes at `offset` (any) of the file.  */
int vhdx_read_co(struct vhdx *s, uint64_t offset, void *buf, size_t length);
/* The log changes something there that is not applied. */
bool vhdx_replay_touches(const struct vhdx_replay *p, uint64_t offset, uint64_t length);

/* ---- the open image ---- */
struct vhdx {
    struct node *node, *file;
    struct vhdx_header h;
    bool header_ok[2], regions_ok[2];
    int current; /* which header counts */
    char *creator;
    struct vhdx_regions r;
    struct vhdx_metadata m;
    uint32_t ratio;
    struct vhdx_guid linkage, linkage2; /* of a differencing image's parent */
    struct vhdx_replay replay;          /* read-only, and the log counts; else empty */
    bool replayed;                      /* it counted, and was applied when we opened */
    uint32_t replayed_entries;

    bool begun;        /* the headers have our GUIDs: requests may change the file */
    uint64_t log_head; /* place of the next log entry in the ring */
    uint64_t log_used; /* bytes of entries before it whose pages may not be stable in place */
    uint64_t log_sequence;
    uint64_t stable_size; /* of the file, that the barrier before the entries has covered */

    uint64_t next;    /* the end of all blocks, where the next one goes */
    bool scanned;     /* and of those whose end the file does not hold */
    uint64_t *spares; /* blocks that were made room for and then not used */
    uint32_t spare_count, spare_cap;
    struct pages pages;
    struct task_mutex begin_lock, alloc_lock, flush_lock;
};

static inline struct vhdx *vhdx_of(struct node *n) {
    return n->state;
}
/* How long the file is, as the log would make it. */
uint64_t vhdx_file_size(const struct vhdx *s);
static inline bool vhdx_log_counts(const struct vhdx *s) {
    return !vhdx_guid_is_null(&s->h.log_guid);
}

/* ---- open.c ---- */
/* Applies a log that counts to the file, and says in the header that none does. */
int vhdx_replay_co(struct vhdx *s, const struct vhdx_replay *p, struct err *e);

/* ---- journal.c: headers, and our use of the log ---- */
/* The header that does not count gets the next sequence number and counts then. */
int vhdx_header_update_co(struct vhdx *s);
/* Before the first change. */
int vhdx_begin_co(struct vhdx *s);
/* The file holds everything by itself again; nothing may be dirty. */
int vhdx_end_co(struct vhdx *s);
int vhdx_flush_co(struct node *n);

/* ---- map.c ---- */
int vhdx_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out);
int vhdx_place_co(struct node *n, uint64_t offset, uint64_t length, unsigned flags,
                  uint32_t coded_length, struct placement *out);
int vhdx_publish_co(struct node *n, const struct placement *p);
void vhdx_abandon(struct node *n, const struct placement *p);
int vhdx_set_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags);
int vhdx_discard_co(struct node *n, uint64_t offset, uint64_t length);
/* The page with BAT entry `index`; *at: its place there, *left: entries from it on. */
int vhdx_bat_page_co(struct vhdx *s, uint64_t index, struct page **page, uint8_t **at,
                     uint32_t *left);
/* Learns where all blocks end; before anything is appended. */
int vhdx_scan_co(struct vhdx *s);
/* Whether a block (or a bitmap) of `length` bytes may lie at `host`. */
bool vhdx_host_is_sane(const struct vhdx *s, uint64_t host, uint64_t length);

/* ---- create.c, resize.c ---- */
struct vhdx_create_opts {
    uint64_t size, log_size, block_size, logical_sector, physical_sector;
    int subformat;
    bool block_state_zero, zero_given;
    char *backing_file, *backing_fmt;
};
extern const struct opt vhdx_create_opt_table[];
int vhdx_create_co(struct node *file, const void *create_opts, struct create_ctx *ctx,
                   struct err *e);
int vhdx_measure(const void *create_opts, const struct measure_in *in, struct measure_result *out,
                 struct err *e);
int vhdx_reach_co(struct node *n, uint64_t size, struct err *e);
int vhdx_resize_co(struct node *n, uint64_t size, int prealloc, struct err *e);

/* ---- parent.c ---- */
/* Names the parent of a differencing image and opens it. */
int vhdx_open_parent_co(struct vhdx *s, struct open_ctx *ctx, struct err *e);
/* The locator of a new image; `buf` has 64 KiB.  The bytes used, or -errno. */
int vhdx_locator_make_co(const char *image, const char *name, uint8_t *buf, uint32_t *bytes,
                         struct err *e);

/* Where the value of `key` lies in a locator; false: there is none. */
bool vhdx_locator_value(const uint8_t *buf, uint32_t length, const char *key, uint32_t *at,
                        uint32_t *bytes);
bool vhdx_locator_linkage(const uint8_t *buf, uint32_t length, struct vhdx_guid *g);

/* ---- relink.c ---- */
int vhdx_set_backing_co(struct node *n, const char *name, const char *format, struct err *e);
int vhdx_empty_co(struct node *n, struct err *e);

/* ---- check.c ---- */
int vhdx_check_co(struct node *n, struct check_result *r, struct err *e);

#endif
