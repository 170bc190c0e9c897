/* SPDX-License-Identifier: MIT */
/*
 * From names and options to an open graph: parsing, probing, the gate, creation.
 *
 * Names: "disk.qcow2", "file:disk.qcow2", "json:{...}", a protocol's "scheme:..." or an option
 * tree.  A plain name with a colon before any slash is a protocol name; "./a:b" is a file.
 *
 * Core keys, known for every node and not in the drivers' tables: driver, node-name, read-only,
 * cache.direct, cache.no-flush, discard (ignore|unmap), detect-zeroes (off|on|unmap), force-share.
 */
#ifndef STRATA_DISK_OPEN_H
#define STRATA_DISK_OPEN_H

#include <stdbool.h>
#include <stdint.h>
#include <jansson.h>
#include "disk/node.h"

struct err;

/*
 * What names *inside images* may open (DESIGN, "Trust").  Names that the user gave pass no gate.
 *   none    nothing: an image with a backing file is refused (or opened alone, see OPEN_NO_BACKING)
 *   beside  regular files below the folder of the image that names them (symlinks resolved)
 *   local   any local file
 *   any     protocols and json: too
 */
enum gate { GATE_NONE, GATE_BESIDE, GATE_LOCAL, GATE_ANY };
extern const char *const gate_names[]; /* "none", "beside", "local", "any", NULL */

enum cache_mode { CACHE_WRITEBACK, CACHE_NONE, CACHE_WRITETHROUGH, CACHE_DIRECTSYNC, CACHE_UNSAFE };
extern const char *const cache_names[]; /* in that order, NULL-terminated */
/* Index of a cache mode name, or -EINVAL with an error that lists them. */
int cache_parse(const char *name, struct err *e);
unsigned cache_node_flags(enum cache_mode m); /* NODE_DIRECT, NODE_NO_FLUSH, NODE_WRITETHROUGH */

enum open_flags {
    OPEN_RW = 1,
    OPEN_NO_BACKING = 2,   /* leave node->backing NULL; backing_name still tells */
    OPEN_FORCE_SHARE = 4,  /* -U */
    OPEN_CHECK = 8,        /* NODE_CHECK */
    OPEN_UNMAP = 16,       /* default of discard= is unmap */
    OPEN_SHARE_WRITE = 32, /* raw top-level: others may write too (qemu-io style) */
    OPEN_NO_DATA = 64,     /* leave an external data file closed: metadata is all that is asked */
    OPEN_LOOK = 128,       /* NODE_LOOK */
    OPEN_SECTORS = 256     /* NODE_SECTORS */
};

struct open_req {
    const char *name;      /* file name, or NULL when options say all */
    const json_t *options; /* borrowed tree, or NULL; overrides what the name says */
    const char *format;    /* NULL: options' driver, else probe */
    unsigned flags;        /* enum open_flags */
    enum cache_mode cache;
    enum gate gate;
};

/*
 * Opens the graph; *out holds one reference.  Errors name the file first: "a.qcow2: ...".
 * -ENOENT, -EACCES, -EAGAIN (locked by another; the text names the holder), -EINVAL, -ENOTSUP
 * (feature), -ELOOP, -EPERM (gate), -EIO (damage).
 */
int node_open_co(const struct open_req *req, struct node **out, struct err *e);

/* ---- for drivers ---- */

/* What one open of a graph shares: gate, depth, the chain so far (loop detection). Opaque to
 * drivers. */
struct open_ctx;

/* The options of the node being opened, for keys that no row describes (lists).  Borrowed. */
const json_t *open_ctx_tree(const struct open_ctx *ctx);

/* How a child is used decides its permissions. */
enum child_role {
    CHILD_ROOT,          /* nobody's child: the disk as its user sees it */
    CHILD_FILE_METADATA, /* the format keeps metadata there: writes need WRITE|RESIZE, refuse both
                            to others */
    CHILD_FILE_DATA, /* guest bytes alone, at places that the parent's metadata name: the same */
    CHILD_FILE_RAW,  /* the parent passes guest bytes through: parent's own permissions */
    CHILD_BACKING,   /* read only; refuses WRITE and RESIZE to others */
};
/*
 * Opens the child that key `key` of n's option tree describes (or, for CHILD_BACKING, the default
 * that the header claims, through the gate).  Sets nothing on n: the driver stores the result.
 */
int node_open_child_co(struct node *n, struct open_ctx *ctx, const char *key, enum child_role role,
                       struct node **out, struct err *e);
/*
 * Call after n->backing_name / backing_format are known: opens and sets n->backing unless the user
 * asked for none (OPEN_NO_BACKING, or option backing: null).
 */
int node_open_backing_co(struct node *n, struct open_ctx *ctx, struct err *e);
/* False when the user asked for none. */
bool node_wants_backing(const struct open_ctx *ctx);

/* What the user allows names inside images to open. */
enum gate open_ctx_gate(const struct open_ctx *ctx);
/*
 * For formats that say what the image below is (an identifier) and not where: looks at the first
 * bytes of the regular files in the folder of n->file, and with GATE_LOCAL and GATE_ANY also in the
 * folder above (snapshots lie in one of their own).  *name: what n->backing_name would be, owned;
 * NULL: none matches, or the gate is GATE_NONE.  `match` runs on another thread.  -EINVAL: two
 * match.
 */
#define FIND_HEAD_BYTES 512
int node_find_beside_co(struct node *n, enum gate gate,
                        bool (*match)(const uint8_t head[FIND_HEAD_BYTES], void *arg), void *arg,
                        char **name, struct err *e);

/*
 * Call after n->data_name is known, for an image whose guest bytes lie in a file of their own:
 * opens and sets n->data_file, by option data-file, else what the image claims, through the gate
 * and as a plain path whatever it looks like.  Left NULL for OPEN_NO_DATA.  -EINVAL: no name, or
 * the image's own file.
 */
int node_open_data_co(struct node *n, struct open_ctx *ctx, struct err *e);
/* The user's options name an external data file. */
bool node_has_data_option(const struct open_ctx *ctx);

/*
 * Opens the file that the image names as its `index`-th part (an extent of a VMDK), by the user's
 * option extents.INDEX, else as the path that is claimed, through the gate; a plain path whatever
 * it looks like, and a regular file or block device.  `writable`: else read-only, whatever n is.
 * *out is one of n->parts, and the same one when two names lead to one file.  -EINVAL: the image's
 * own file, or one above it.
 */
int node_open_part_co(struct node *n, struct open_ctx *ctx, size_t index, const char *claimed,
                      enum child_role role, bool writable, struct node **out, struct err *e);
/* Not with OPEN_NO_DATA: metadata of the image's own file is all that is asked.  Where any name may
 * be followed, parts are looked at all the same. */
bool node_wants_data(const struct open_ctx *ctx);

/* A format on top of an already open storage node (its reference is taken over on success). */
int node_open_on_co(struct node *file, const struct driver *format, const json_t *options,
                    const struct open_req *req, struct node **out, struct err *e);

/* ---- probing ---- */
/* Best match of all formats for an open storage node; raw when none. *score: 0 for a guess of raw.
 */
int disk_probe_co(struct node *file, const struct driver **out, int *score, struct err *e);

/* ---- creation ---- */

enum create_flags {
    CREATE_UNNAMED =
        1, /* storage: unnamed object beside `name`; node_link_co gives it the name later */
    CREATE_REPLACE = 2, /* an existing file may be replaced (as qemu-img create does) */
    CREATE_SCRATCH = 4, /* unnamed for good, in the folder `name` (temporary snapshots) */
    /*
     * When an empty file grows, its first block gets room, zeros in it: where a file system takes
     * reads of a hole at any alignment, what O_DIRECT needs cannot be found out from one.
     */
    CREATE_FIRST_BLOCK = 8,
};
struct create_ctx {
    const char *name;
    unsigned flags;
    uint64_t size;       /* storage: initial size */
    uint64_t size_limit; /* storage: writes that grow it beyond fail with ENOSPC; 0 = none */
    unsigned node_flags; /* NODE_DIRECT ... of the node that stays open */
};
/* New storage object by the driver that the name's prefix chooses (default file); open read-write.
 */
int storage_create_co(const struct create_ctx *ctx, struct node **out, struct err *e);
int node_link_co(struct node *storage, const char *name, bool replace, struct err *e);

/*
 * Options of the file that a new image lies in.  They stand among those of its format (-o),
 * whatever that is: whoever fills a format's create options passes create_file_keys as keys of the
 * core.
 */
struct create_file_opts {
    bool nocow;                /* btrfs: no copy-on-write for this file */
    uint64_t extent_size_hint; /* XFS: allocate in units of this; 0: as the file system likes */
};
extern const struct opt create_file_rows[];
extern const char *const create_file_keys[];
/* Reads them from a tree that may hold others, too: `out` may be NULL.  1: some were there, 0, or
 * -EINVAL, -ERANGE. */
int create_file_options(const json_t *options, struct create_file_opts *out, struct err *e);

/*
 * Lays a new format onto an open storage node.  `options` are the format's create options (size
 * included) and those of the file as a tree; unknown ones are refused.
 */
int format_create_co(struct node *storage, const struct driver *format, const json_t *options,
                     struct err *e);
/*
 * Whether `name` may be replaced by a new image: 0 when nothing is there or a regular file that
 * nobody uses (locks); *exists_special is set for a block device, which is opened and written
 * rather than replaced. -EAGAIN names the user, -EISDIR and others say what is there.
 */
int create_check_target_co(const char *name, bool *exists_special, struct err *e);

/*
 * The external data file of a new image: `size` bytes of storage for `name`, not yet under it
 * unless it is a device, which is used as it is.  What is at `name` is refused when somebody uses
 * it or when it is `image`.  data_file_finish_co makes the file stable and gives it its name.
 */
int data_file_create_co(const char *name, const char *image, uint64_t size, int prealloc,
                        struct node **out, struct err *e);
int data_file_finish_co(struct node *file, const char *name, struct err *e);

/*
 * `strata create`: storage and format, under the final name only when complete and synced.
 * `options` holds the format's create options (size included).  A running user of an existing file
 * (lock) is an error, and nothing is touched.
 */
int disk_create_co(const char *name, const char *format, const json_t *options, unsigned flags,
                   struct err *e);

/*
 * Where a claimed name points: relative names resolve against the folder of `image` (a file name).
 * Owned result; NULL with an error when it cannot be combined (a json: or protocol image with a
 * relative backing name).
 */
char *backing_resolve(const char *image, const char *claimed, struct err *e);
/* The same for the name of an external data file, which is a path and nothing else. */
char *data_file_resolve(const char *image, const char *claimed, struct err *e);
/* A protocol name ("nbd:...", "json:{")?  "./a:b" and "/x:y" are not. */
bool name_has_protocol(const char *name);

#endif
