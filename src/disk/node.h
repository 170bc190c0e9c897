/* SPDX-License-Identifier: MIT */
/*
 * Nodes: one open storage, format or filter instance each, joined to a graph by named children.
 *
 *      format node (qcow2) --file--> storage node (file)
 *           \--backing--> format node (raw) --file--> storage node (file)
 *
 * Invariants
 *  1. A node belongs to one loop; its metadata has that single writer.  Everything here is for
 * tasks of that loop.
 *  2. A node holds one reference on each child; the graph has no cycles and is at most
 *     GRAPH_DEPTH_MAX deep.
 *  3. `perm` is what this node's users may do, `shared` what they allow others to do meanwhile; the
 *     storage driver turns the two into byte-range locks (file_lock.h).  A request that needs a
 * permission the node lacks fails with -EACCES (asserted for our own mistakes in debug builds).
 *  4. size, granularity, request_align, codec are set by the driver's open_co and resize, else
 * constant.
 */
#ifndef STRATA_DISK_NODE_H
#define STRATA_DISK_NODE_H

#include <stdbool.h>
#include <stdint.h>
#include <jansson.h>
#include "disk/driver.h"
#include "disk/range_lock.h"
#include "runtime/task.h"

struct loop;

/* A chain of 100 images works; beyond this the open is refused, so recursion and work stay bounded.
 */
#define GRAPH_DEPTH_MAX 256
/* Nodes stacked by `file` (raw on qcow2 on raw ...): requests recurse through them. */
#define GRAPH_FILE_DEPTH_MAX 8

/* Same bits as QEMU's lock bytes (locking.md): 100 + bit number, 200 + bit number. */
enum perm {
    PERM_CONSISTENT_READ = 1,
    PERM_WRITE = 2,
    PERM_WRITE_UNCHANGED = 4,
    PERM_RESIZE = 8,
    PERM_ALL = 15,
};

enum node_flags {
    NODE_RW = 1,
    NODE_DIRECT = 2,       /* O_DIRECT below (cache none, directsync) */
    NODE_NO_FLUSH = 4,     /* flushes are no-ops (cache unsafe, throw-away overlays) */
    NODE_WRITETHROUGH = 8, /* every write completes on stable storage (writethrough, directsync) */
    NODE_UNMAP = 16, /* discards reach the storage (discard=unmap), else they stay in the format */
    NODE_FORCE_SHARE = 32,    /* read without insisting that nobody writes (-U) */
    NODE_NO_LOCK = 64,        /* locking=off */
    NODE_DETECT_ZEROES = 256, /* detect-zeroes=on: written zeros become zero units */
    NODE_DETECT_UNMAP = 512,  /* detect-zeroes=unmap: and their room is given back */
    NODE_GUESSED = 1024,      /* nobody said the format and nothing matched: taken for raw */
    NODE_SECTORS = 8192,      /* raw disks count as rounded up to 512 bytes, as QEMU takes them */
    NODE_CHECK = 128, /* opened to be examined: formats open damaged images as far as they can */
    NODE_LOOK = 4096, /* opened for describe() alone: also with features that we cannot use */
};

/* A file beside the image's own (an extent of a VMDK). */
struct node_part {
    struct node *node;
    uint64_t dev, ino; /* 0: no file that could be looked at */
};

struct node {
    const struct driver *drv;
    struct loop *loop;
    unsigned refs;
    char *name;     /* node-name, for messages and lookup; never NULL */
    char *filename; /* as a user would name it, for messages ("json:{...}" when nothing shorter
                       fits) */
    unsigned flags;
    unsigned perm, shared;
    unsigned role; /* enum child_role under its first parent; CHILD_ROOT for a graph's root */

    void *state; /* drv->state_size bytes */
    void *opts;  /* drv->opts_size bytes, filled from the option tree */

    uint64_t size;        /* guest-visible bytes */
    uint32_t granularity; /* format: unit of place, locks and codes (cluster); storage: 1 */
    uint32_t subunit;     /* format: unit of set_zero, discard and copy on write, a divisor of
                             granularity; 0: the same */
    uint32_t
        request_align; /* storage: offset, length and memory must be multiples (O_DIRECT), else 1 */
    unsigned storage_flags;    /* enum storage_kind_flags */
    const struct codec *codec; /* format that can take coded units: what encodes them */
    bool coded_only;           /* and takes nothing else: the engine encodes what is written */

    struct node *file;       /* format, filter: where its bytes lie */
    struct node *data_file;  /* format: where guest bytes lie when not in `file`; NULL: there */
    struct node_part *parts; /* format: further files that the image names, each once */
    size_t part_count;
    struct node *backing; /* format: what holes read as; NULL none */
    char *backing_name;   /* what the image's header claims, unopened too; NULL none */
    char *backing_format; /* recorded format of it; NULL none */
    char *data_name;      /* external data file that the header claims, unopened too; NULL none */

    struct range_lock locks; /* orders requests (io.c) */
    unsigned in_flight;      /* requests inside the engine */
    unsigned quiesce;        /* > 0: new requests wait */
    struct waitq drained, resumed;
    uint64_t
        map_generation; /* counts every change of the map: what was looked up before is stale */
    struct unit_cache *unit_cache; /* last decoded unit (coded.c) */
    struct bitmap_set *bitmaps;    /* dirty bitmaps (bitmap.h); NULL: there never was one */
};

static inline bool node_is_rw(const struct node *n) {
    return n->flags & NODE_RW;
}
static inline uint32_t node_subunit(const struct node *n) {
    return n->subunit ? n->subunit : n->granularity;
}
struct node *node_ref(struct node *n);
/* Drops a reference; the last one flushes (errors are lost here: who cares flushes first), closes
 * and frees, children after. */
void node_unref_co(struct node *n);

/*
 * Waits until no request is inside `n` and holds new ones back until node_resume().  Nests.
 */
void node_quiesce_co(struct node *n);
void node_resume(struct node *n);

/*
 * Changes the node and, as its driver needs, its children between read-only and read-write.  All or
 * nothing.  Used by commit, which opens its base read-only until asked.
 */
int node_reopen_co(struct node *n, bool rw, struct err *e);

/*
 * Takes away from others what is not in `shared` (enum perm): the locks on the files below follow.
 * -EAGAIN with the holder's name when somebody does it already; then nothing has changed.
 */
int node_restrict_co(struct node *n, unsigned shared, struct err *e);

/* Storage and format under all filters: the node that `raw` and friends put their bytes on. */
struct node *node_storage(struct node *n);
/* The same for guest data: it may lie in a file of its own. */
struct node *node_data_storage(struct node *n);

#endif
