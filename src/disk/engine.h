/* SPDX-License-Identifier: MIT */
/*
 * What the engine's own files share.  Nobody outside src/disk includes this.
 */
#ifndef STRATA_DISK_ENGINE_H
#define STRATA_DISK_ENGINE_H

#include "disk/bitmap.h"
#include "base/cleanup.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"

struct err;

/* ---- node.c ---- */
/* A bare node of `drv`: one reference, empty options, belonging to the running loop. */
struct node *node_new(const struct driver *drv);
/* Closes the driver's half and frees, without flushing: for failed opens. */
void node_destroy_co(struct node *n);

/* A request is inside: waits while the node is quiesced. */
void node_enter_co(struct node *n);
void node_leave(struct node *n);

/* ---- chain.c ---- */
/*
 * One run of the chain below `n`: which layer answers for [offset, ...).  Takes no lock on `n`
 * itself (the caller holds its range); a writable layer below stays locked (shared) until
 * chain_run_end(). On return ext.kind is DATA, CODED or ZERO (present or not); ext.length >= 1.
 */
struct chain_run {
    struct extent ext;
    struct node *layer; /* NULL: below the bottom */
    uint64_t span;      /* >= ext.length: all layers above are holes at least this far */
    unsigned depth;
    bool locked;
    struct range_req lock; /* on `layer` when locked: the run must not be moved */
};
int chain_map_co(struct node *n, uint64_t offset, uint64_t length, bool top_only,
                 struct chain_run *out);
/* Ends the use of a run's answer.  Not after a failed chain_map_co. */
void chain_run_end(struct chain_run *run);
/* Reads through the chain without a lock on `n`. */
int chain_read_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                  int niov, unsigned flags);
/* The whole range reads as zeros as far as the maps tell (no data is read). */
int chain_is_zero_co(struct node *n, uint64_t offset, uint64_t length);

/* The driver's map behind its checks. */
int format_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out);

/* ---- coded.c ---- */
/*
 * Reads [offset, +length) of `layer`, whose first run is the coded `first`; goes on over directly
 * following coded runs of the layer and returns how much was read in *done.
 */
int coded_read_co(struct node *layer, uint64_t offset, uint64_t length, const struct extent *first,
                  const struct iovec *iov, int niov, size_t iov_off, uint64_t *done);
void unit_cache_drop(struct node *n);

/* ---- bounce.c: storage requests that O_DIRECT would refuse ---- */
int storage_preadv_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                      int niov, unsigned flags);
int storage_pwritev_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                       int niov, unsigned flags);

/* Before anything of a request that changes [offset, +length) of a format node moves. */
static inline int record_change_co(struct node *n, uint64_t offset, uint64_t length) {
    return n->bitmaps ? bitmap_mark_co(n, offset, length) : 0;
}

/* ---- write.c ---- */
/* Writes with the exclusive lock on whole units already held. */
int write_locked_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                    int niov, unsigned flags);
/* The same for formats that take codes only (write_encoded.c). */
int write_encoded_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                     int niov);
/* Zeros as data, lock held (format) or none needed (storage). */
int write_zeros_co(struct node *n, uint64_t offset, uint64_t length);

/* ---- gate.c ---- */
int gate_check(enum gate gate, const char *image, const char *resolved, const char *claimed,
               struct err *e);

/* ---- open_tree.c: option trees; new ones are owned by the caller ---- */
static inline void json_unref(json_t **j) {
    json_decref(*j);
}
#define AUTO_JSON AUTO(json_unref)
/* Takes `value` over, and refuses rather than loses it: -ENOMEM. */
int tree_set(json_t *tree, const char *key, json_t *value, struct err *e);
int tree_of_file(const char *name, json_t **out, struct err *e); /* of a plain file */
/* {"driver": .., "filename": ..} of the storage that `name` means. */
int tree_from_storage_name(const char *name, json_t **out, struct err *e);
/* The tree of the image that `name` means: its storage below "file", or what json: says. */
int tree_from_name(const char *name, json_t **out, struct err *e);
/* A child written as a string is a name; as an object it is a tree. */
int tree_from_child(const json_t *value, bool storage, json_t **out, struct err *e);
const char *tree_str(const json_t *tree, const char *key); /* NULL: not there, or no string */
/* The core keys over what the parent handed down. */
int tree_node_flags(const json_t *tree, unsigned *flags, struct err *e);
/* "filename" given to a format means its file's name. */
int tree_lower_filename(json_t *tree, struct err *e);
/* And a file's name given to a storage driver or a filter is its own, or its child's. */
int tree_raise_filename(json_t *tree, const struct driver *drv, struct err *e);
char *tree_display_name(const json_t *tree); /* for messages */
/* Says nothing but what the storage below is: that one's name tells as much. */
bool tree_is_plain(const json_t *tree);

/* ---- open.c ---- */
/* Keys of every node, passed over when a driver's table is filled. */
extern const char *const core_keys[];

#endif
