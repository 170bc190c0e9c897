/* SPDX-License-Identifier: MIT */
/*
 * Dirty bitmaps: which parts of a node's content may have changed since somebody began to look.
 *
 * A bitmap belongs to a node and has one bit for each `granularity` bytes.  While it is enabled,
 * the engine sets the bits of every request that may change the content, before anything of the
 * request can reach storage.  So a bit that is clear is a promise, and a bit that is set is only a
 * hint: whatever has to be given up (memory, precision) is given up by setting bits.
 *
 *      struct node --bitmaps--> struct bitmap_set --> struct bitmap --> chunks of 32768 bits
 *
 * The set exists once the node has, or had, a bitmap: the engine's only cost without one is a look
 * at a pointer.  A chunk that is all clear or all set takes no memory; a 4 TiB disk at 64 KiB has
 * 2048 chunks of 4 KiB.  All chunks of a node together take at most BITMAP_MEMORY_MAX: beyond it
 * whole chunks become set.  So setting bits neither suspends nor fails.
 *
 * Persistent bitmaps live in the image too; the format keeps them (driver.h, bitmap_*_co):
 *
 *      stored, clean --arm--> stored, in use --store--> stored, clean
 *
 * Nothing that makes the stored form untrue happens before the image says, stably, that it is in
 * use ("arm"): not the first change of the disk, nor any operation here.  A crash then leaves a
 * bitmap that everybody can see is not to be trusted.  Closing the node (or making it read-only, or
 * bitmap_store_co) writes the bits and takes the mark away.
 *
 * Context: tasks of the node's loop.  Functions in _co may suspend; those that change what is
 * recorded quiesce the node, so that each request lies wholly before or after them: not to be
 * called from inside a request.
 *
 * Three callers:
 *   the engine        if (n->bitmaps && (r = bitmap_mark_co(n, offset, length)) < 0) return r;
 *   a format          open: bitmap_attach(); load: bitmap_import*(); store: bitmap_region(),
 * _export() export, backup    bitmap_find(), bitmap_load_co(), then bitmap_next_dirty() from 0 to
 * the end
 */
#ifndef STRATA_DISK_BITMAP_H
#define STRATA_DISK_BITMAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "base/list.h"
#include "runtime/task.h"

struct err;
struct node;

#define BITMAP_GRANULARITY_MIN 512u
#define BITMAP_GRANULARITY_MAX ((uint64_t)1 << 31)
#define BITMAP_NAME_MAX 1023                    /* bytes */
#define BITMAP_BYTES_MAX ((uint64_t)512 << 20)  /* of one bitmap, were all its bits there */
#define BITMAP_MEMORY_MAX ((uint64_t)512 << 20) /* of all chunks of a node */
#define BITMAP_CHUNK_BITS 32768u
#define BITMAPS_MAX 65535

struct bitmap_chunk;

struct bitmap {
    struct list link;  /* in node->bitmaps */
    struct node *node; /* NULL: of no node (bitmap_new) */
    struct bitmap_set *set;
    char *name; /* any bytes but 0; from images: not to be trusted on a terminal */
    uint32_t granularity_bits;
    uint64_t size; /* bytes of the disk that it covers */
    uint64_t bits; /* size / granularity, rounded up */

    bool enabled;    /* records what changes */
    bool persistent; /* kept in the image */
    /* The image says that it was in use and not stored: nothing but removal is possible. */
    bool inconsistent;
    /* Why the image keeps it, but not for us ("has ..."): nothing but removal.  NULL: it is. */
    const char *foreign;

    unsigned exported; /* clients are shown it: no removal, clearing or merging into it */

    bool stored;            /* the image has an entry for it */
    bool armed;             /* that entry says, stably, that it is in use */
    bool arm;               /* wanted so by the caller of bitmap_arm_co */
    bool loaded;            /* the chunks hold all; else what is stored must be added to them */
    void *cookie, *pending; /* the format's own: its stored form, and the one to come */

    struct bitmap_chunk **chunks; /* one for each BITMAP_CHUNK_BITS; NULL: cannot be used */
    uint64_t array_bytes;
    uint64_t dirty_bits; /* how many are set (in the chunks) */
};

struct bitmap_set {
    struct node *node;
    struct list bitmaps; /* in the order of the image, then of addition */
    unsigned count;
    unsigned recording;         /* enabled ones that can record */
    unsigned unarmed;           /* of all enabled ones: stored and not armed */
    bool changed;               /* something has to be stored, or removed from the image */
    uint64_t memory;            /* bytes of chunks */
    struct task_mutex arm_lock; /* one arming or storing at a time */
};

/* ---------------------------------------------------------------- the engine */

/*
 * Records that [offset, +length) may change, in all enabled bitmaps; first arms those that are
 * stored.  An error means that the image cannot be told: the request must not go on.  Only where
 * n->bitmaps is set; the caller is inside a request (node_enter_co).
 */
int bitmap_mark_co(struct node *n, uint64_t offset, uint64_t length);
/* All of the disk: another snapshot becomes the content, the image is emptied. */
int bitmap_mark_all_co(struct node *n, struct err *e);
/*
 * Around a change of the node's size to `size`, quiesced.  `begin` refuses when a bitmap could not
 * follow (it is inconsistent, or would have too many bits) and arms and loads the others; `end`
 * gives them n->size.  What the disk has gained counts as changed: it may have had other content
 * before it was cut off.
 */
int bitmap_resize_begin_co(struct node *n, uint64_t size, struct err *e);
void bitmap_resize_end(struct node *n);
/* The node goes away: its format has stored what it could. */
void bitmap_set_free(struct node *n);

/* ---------------------------------------------------------------- bitmaps of a node */

struct bitmap *bitmap_find(const struct node *n, const char *name); /* NULL: none */
/* The one behind `b` (NULL: the first); NULL behind the last. */
struct bitmap *bitmap_next(const struct node *n, const struct bitmap *b);

/*
 * Whether its bits can be used.  -EINVAL with the reason for one that is inconsistent or foreign,
 * and, with `change`, -EROFS for a persistent one of a node that is read-only.
 */
int bitmap_usable(const struct bitmap *b, bool change, struct err *e);

/* 64 KiB, or the image's unit where that is from 4 KiB to 64 KiB. */
uint64_t bitmap_default_granularity(const struct node *n);

struct bitmap_new {
    const char *name;
    uint64_t granularity; /* 0: the default */
    bool persistent, disabled;
    bool first; /* before the others, instead of behind them */
};
/*
 * A new bitmap, all clear.  -EEXIST, -EINVAL (name, granularity), -EFBIG (too many bits),
 * -ENOTSUP (the format, or this image, keeps none), -EROFS.  *out may be NULL.
 */
int bitmap_add_co(struct node *n, const struct bitmap_new *what, struct bitmap **out,
                  struct err *e);
/* From the image too, at once and stably; `b` is gone on success. */
int bitmap_remove_co(struct bitmap *b, struct err *e);
int bitmap_clear_co(struct bitmap *b, struct err *e);
int bitmap_set_enabled_co(struct bitmap *b, bool enabled, struct err *e);
/*
 * Adds the bits of `src`, of any node and granularity.  -EINVAL when the sizes differ.  `src` of
 * another node must not change meanwhile.
 */
int bitmap_merge_co(struct bitmap *dst, struct bitmap *src, struct err *e);
/* Makes the bits complete: reads what is stored.  Before reading any of them. */
int bitmap_load_co(struct bitmap *b, struct err *e);
/* The image holds all persistent bitmaps as they are now, stably.  0 when nothing has changed. */
int bitmap_store_co(struct node *n, struct err *e);

/* ---------------------------------------------------------------- bits */

/* One of no node, for jobs; all clear.  The caller frees it.  -EINVAL, -EFBIG, -ENOMEM. */
int bitmap_new(uint64_t size, uint64_t granularity, struct bitmap **out, struct err *e);
void bitmap_free(struct bitmap *b);

static inline uint64_t bitmap_granularity(const struct bitmap *b) {
    return (uint64_t)1 << b->granularity_bits;
}
/* Ranges in bytes, inside the size.  Setting rounds outwards, clearing inwards. */
void bitmap_set_range(struct bitmap *b, uint64_t offset, uint64_t length);
void bitmap_clear_range(struct bitmap *b, uint64_t offset, uint64_t length);
bool bitmap_get(const struct bitmap *b, uint64_t offset);
/*
 * The first run of set bits in [offset, end): false when there is none.  The run is cut to the
 * range and lasts to its end or to the first clear bit.
 */
bool bitmap_next_dirty(const struct bitmap *b, uint64_t offset, uint64_t end, uint64_t *start,
                       uint64_t *length);
/* Bytes behind set bits. */
uint64_t bitmap_dirty_bytes(const struct bitmap *b);
/* dst |= src; the sizes are equal, the granularities need not be. */
void bitmap_merge_bits(struct bitmap *dst, const struct bitmap *src);
void bitmap_clear_bits(struct bitmap *b);
/* Another size: bits behind the new end are gone, new ones are clear.  -ENOMEM, nothing changed. */
int bitmap_truncate(struct bitmap *b, uint64_t size);

/* ---------------------------------------------------------------- for formats */

/*
 * At open: the image holds this one.  The bits are not there yet.  After the last one,
 * bitmap_attach_end().  -EFBIG, -ENOMEM; sizes and names have been checked by the format.
 */
int bitmap_attach(struct node *n, const char *name, uint32_t granularity_bits, bool enabled,
                  bool inconsistent, const char *foreign, struct bitmap **out, struct err *e);
/* -EEXIST: two of them have one name. */
int bitmap_attach_end(struct node *n, struct err *e);
/* Forgets it, without touching the image; bitmap_set_update() after the last one. */
void bitmap_detach(struct bitmap *b);
/* After bitmap's flags have changed: counts anew what the set must know. */
void bitmap_set_update(struct bitmap_set *set);

enum bitmap_region { BITMAP_ALL_CLEAR, BITMAP_ALL_SET, BITMAP_MIXED };
/* What [first, first + count) holds; both multiples of 8, or up to the last bit. */
enum bitmap_region bitmap_region(const struct bitmap *b, uint64_t first, uint64_t count);
/* Bits from `first` (a multiple of 8) on as bytes, lowest bit first; zeros behind the last. */
void bitmap_export(const struct bitmap *b, uint64_t first, uint8_t *buf, size_t bytes);
/* ORs such bytes in; bits behind the last are ignored. */
void bitmap_import(struct bitmap *b, uint64_t first, const uint8_t *buf, size_t bytes);
/* ORs ones into [first, first + count), cut at the last bit. */
void bitmap_import_ones(struct bitmap *b, uint64_t first, uint64_t count);

#endif
