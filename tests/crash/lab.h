/* SPDX-License-Identifier: MIT */
/*
 * The crash laboratory, as a workload sees it.
 *
 * A workload is one row of a table (write.c, chain.c, or a file of your own listed in lab.c): a
 * format, its creation options, how much of what the guests do, and, where a format can do more
 * than reads and writes, *operations* and a *judge* of your own.  Fault model and parts: lab.c.
 *
 *      guests (TASKS tasks) ──requests──▶ lab:0, the top image ──backing_file=lab:1──▶ below[] ...
 *           └─ now and then one of w->ops, alone or beside the other guests
 *
 * The model (model.c) knows, for each 512-byte block of the top image, every version that was
 * written, when it began and ended, and since when a flush covers it; and the same of the disk's
 * size.  A state passes when everything on it reads as something that the model allows.
 *
 * An operation tells the model what it does, with one of:
 *   nothing at all     the guest sees no change (amend, commit, bitmap changes, flush, lazy ...)
 *   model_name_*       the disk as it is now gets a name, loses it (snapshot create, delete)
 *   model_switch_*     the whole disk returns to something remembered: after a cut the old or the
 *                      new as a whole, the new only once the operation has returned (apply)
 *   model_size_*       another disk size (resize; what is cut off reads as zeros if it comes back)
 *   lab_write ...      as a guest would
 *
 * EXAMPLE, whole (internal snapshots; the functions with snapshot_ in their name are yours):
 *
 *     static void snap_create(struct lab *l) {
 *         struct err e AUTO_ERR = ERR_INIT;
 *         struct lab_name *s = model_name_begin(l);           // remembers the disk as it is
 *         lab_must(snapshot_create_co(l->disk, s->name, &e), &e, "create");
 *         model_name_end(l, s);                               // from here on it must be listed
 *     }
 *     static void snap_apply(struct lab *l) {
 *         struct err e AUTO_ERR = ERR_INIT;
 *         struct lab_name *s = model_name_any(l);             // NULL: there is none
 *         if (!s)
 *             return;
 *         model_switch_begin(l, &s->at);
 *         lab_must(snapshot_apply_co(l->disk, s->name, &e), &e, "apply");
 *         model_switch_end(l, true);                          // true: it is durable by itself
 *     }
 *     static void snap_delete(struct lab *l) {
 *         struct err e AUTO_ERR = ERR_INIT;
 *         struct lab_name *s = model_name_any(l);
 *         if (!s)
 *             return;
 *         model_gone_begin(l, s);
 *         lab_must(snapshot_delete_co(l->disk, s->name, &e), &e, "delete");
 *         model_gone_end(l, s);                               // from here on it must not be listed
 *     }
 *     // Runs on every state, after the standard judgement passed.
 *     static int judge_snapshots_co(struct lab_state *st) {
 *         int r = 0;
 *         for (each name that the image st->disk lists) {
 *             struct lab_name *s = model_name_listed(st, name);      // fails: must not be there
 *             struct node *n;
 *             if (!s || state_open_co(st, json_pack("{s:s}", "snapshot.name", name), 0, &n) < 0)
 *                 return -1;
 *             r = r ? r : state_reads_as_co(st, n, &s->at, name);    // every block as remembered
 *             node_unref_co(n);
 *         }
 *         return r ? r : model_names_complete(st);            // one that must be there is missing?
 *     }
 *     static const struct lab_op snap_ops[] = {
 *         {"create", 3, true, snap_create}, {"apply", 2, true, snap_apply},
 *         {"delete", 2, true, snap_delete}, {NULL}};
 *     const struct workload snapshot_workloads[] = {
 *         {.name = "snapshot", .options = "cluster_size=4k", .size = 2 * MIB, .requests = 60,
 *          .flush = 10, .fua = 3, .discard = 8, .max_blocks = 40, .ops = snap_ops,
 *          .judge_co = judge_snapshots_co, .plants = "SNAP_FREED_EARLY SNAP_TABLE_EARLY"},
 *         {NULL}};
 *
 * and a declaration in workloads.h, a line in lab.c (`sets`) and in meson.build.
 *
 * For a bitmap: `struct model_mark` m remembers the disk when it is created or cleared; in the
 * judge a block b that reads as `id` now and for which !model_same(l, &m, b, id) must be dirty
 * there, or the bitmap must be marked inconsistent.  state_read_ids_co() reads the ids of all
 * blocks.
 *
 * Context: everything runs in tasks of one loop.  What goes wrong in the live phase ends the
 * program (lab_must): without planted bugs nothing may fail there.
 */
#ifndef STRATA_TESTS_CRASH_LAB_H
#define STRATA_TESTS_CRASH_LAB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <jansson.h>

#include "base/bytes.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "recorder.h"
#include "runtime/task.h"

#define BLOCK 512u
#define DISK_MAX (4 * MIB) /* of the guest's disk, at any time */
#define BLOCKS (DISK_MAX / BLOCK)
#define TASKS 6
#define LAB_NAMES_MAX 64

struct lab;
struct lab_state;

/* ---------------------------------------------------------------- workloads */

struct lab_op {
    const char *name; /* NULL: the table's end */
    unsigned share;   /* of all requests, in percent */
    bool alone;       /* no guest request is under way; else beside the other guests */
    void (*run_co)(struct lab *l);
};

/* An image made before the top one, on "lab:1", "lab:2" ..., for it to name or to be opened. */
struct lab_below {
    const char *format, *options; /* NULL: the end */
    uint64_t size;
    bool filled;   /* its every block is written, so that it can be told from zeros */
    bool no_check; /* not judged alone: its format has no check, or it is no image of its own */
};

struct workload {
    const char *name;
    const char *options; /* of creation, "key=value,..."; size is added */
    uint64_t size;
    unsigned requests; /* of each task */
    /* shares of each request, in percent; the rest are plain writes */
    unsigned flush, fua, zero, discard, coded, grow;
    unsigned max_blocks; /* longest write */
    uint64_t span;       /* requests stay below this offset, so that they meet again; 0: size */
    bool drift; /* that span moves over the disk: tables are made late, in clusters used before */

    const char *format;       /* of the top image; NULL: qcow2 */
    const char *open_options; /* for every open of the top image, "key=value,..." */
    struct lab_below below[LAB_DISKS - 1];
    const struct lab_op *ops;
    /* After creation, before anything is recorded; l->disk is open.  What the disk reads as
     * afterwards is where the model starts. */
    void (*setup_co)(struct lab *l);
    /* Instead of opening "lab:0": sets l->disk. */
    void (*open_co)(struct lab *l);
    /* After the guests have ended, still recorded. */
    void (*finish_co)(struct lab *l);
    int (*judge_co)(struct lab_state *st);
    /* On every state, before anything opens it: what whoever finds the image does first. */
    int (*mend_co)(struct lab_state *st);
    void (*free)(struct lab *l); /* of what l->own holds */
    const char *plants; /* names of base/plant.h, spaces between, that it is made to catch */
    /* Chooses by l->seed: a copy of the row to change.  Texts may point into l->text. */
    void (*vary)(struct lab *l, struct workload *w);
};

/* ---------------------------------------------------------------- the model */

struct version {
    uint32_t id;      /* 0: zeros */
    uint32_t copy_of; /* > 0: what it was when it had this many versions minus 1; see model.c */
    bool maybe;       /* a discard: what was there may stay */
    bool durable;     /* by its own end (FUA) */
    uint64_t start, end, settled;
};
struct history {
    struct version *v;
    unsigned count, cap;
    bool busy;
};
/* The disk at one moment. */
struct model_mark {
    unsigned *count; /* of BLOCKS histories; owned */
    uint64_t size;
};
struct lab_name {
    char name[16];
    struct model_mark at;
    uint64_t made, made_end, gone, gone_end; /* moments; UINT64_MAX: not yet */
};
struct span {
    uint64_t start, end;
};
struct model_switch {
    struct model_mark before;
    uint64_t start, end;
    bool durable;
};

struct lab {
    const struct workload *w;
    struct node *disk; /* the top image, open read-write */
    unsigned seed;
    struct task_rwlock quiet; /* guests read, an operation alone writes */
    bool op_running;

    uint32_t next_id;
    struct history block[BLOCKS], size; /* size: ids are numbers of blocks */
    struct span *flush;
    size_t flushes;
    struct lab_name name[LAB_NAMES_MAX];
    size_t names;
    struct model_switch *switches;
    size_t switched;

    struct lab_disk begin[LAB_DISKS]; /* before the workload */
    unsigned long states, failed, budget;
    const char *sample_dir; /* every sample_every-th state is written there; NULL: none */
    unsigned long sample_every;
    bool first_only;
    const char *save; /* where a failed state is written; NULL: nowhere */
    char text[256];   /* the workload's own */
    void *own;        /* the workload's own; freed with free() */
};

unsigned lab_rnd(struct lab *l, unsigned n); /* below n */
/* Ends the program when r < 0. */
void lab_must(int r, const struct err *e, const char *what);

/* ---- as guests do; blocks; requests on blocks that are busy are left out ---- */
void lab_write(struct lab *l, uint64_t first, uint64_t count, bool fua);
void lab_zero(struct lab *l, uint64_t first, uint64_t count);
void lab_discard(struct lab *l, uint64_t first, uint64_t count);
void lab_coded(struct lab *l, uint64_t at);
void lab_flush(struct lab *l);
/* A new size; shrinking only in an operation that is alone. */
void lab_resize(struct lab *l, uint64_t size, int prealloc);
/* Every block of a node that is not the model's disk gets an id of its own, beyond all others. */
void lab_fill_co(struct lab *l, struct node *n);
/* Opens the format on "lab:I"; `extra` (new reference or NULL) is laid over its options. */
int lab_open_co(unsigned i, const char *format, json_t *extra, unsigned flags, struct node **out,
                struct err *e);

/* ---- names (snapshots) ---- */
struct lab_name *model_name_begin(struct lab *l); /* "s1", "s2" ...; the disk as it is now */
void model_name_end(struct lab *l, struct lab_name *s);
struct lab_name *model_name_any(struct lab *l); /* one that is there, or NULL */
void model_gone_begin(struct lab *l, struct lab_name *s);
void model_gone_end(struct lab *l, struct lab_name *s);

/* ---- the whole disk at once; only in an operation that is alone ---- */
void model_switch_begin(struct lab *l, const struct model_mark *to);
void model_switch_end(struct lab *l, bool durable);
void model_size_begin(struct lab *l, uint64_t size);
void model_size_end(struct lab *l);
/* What guests know of the disk: its size since the last change that has ended. */
uint64_t model_size(const struct lab *l);
/* All that was written so far is on stable storage (an operation that promises it has ended). */
void model_all_settled(struct lab *l);

void model_mark(struct lab *l, struct model_mark *m);
void model_mark_free(struct model_mark *m);
/* Block b may have read as `id` when the mark was made. */
bool model_same(const struct lab *l, const struct model_mark *m, uint64_t b, uint32_t id);
/* Block b may read as `id` after a cut at `moment`. */
bool model_allows(const struct lab *l, uint64_t b, uint64_t moment, uint32_t id);

/* model.c and the laboratory's own use of it */
bool model_take(struct lab *l, uint64_t first, uint64_t count, uint32_t id, bool maybe, bool fua);
void model_done(struct lab *l, uint64_t first, uint64_t count);
/* The start: these blocks have been there for ever. */
void model_start(struct lab *l, uint64_t b, uint32_t id);
void model_start_size(struct lab *l, uint64_t size);
void model_settle(struct lab *l);
bool model_allows_size(const struct lab *l, uint64_t moment, uint64_t size);
/* No switch shows partly; ids of `blocks` blocks.  The number of the switch that does, or -1. */
int model_torn_switch(const struct lab *l, uint64_t moment, const uint32_t *ids, uint64_t blocks);
void model_free(struct lab *l);

/* ---------------------------------------------------------------- judging a state */

struct lab_state {
    struct lab *l;
    uint64_t moment;     /* of the cut */
    struct node *disk;   /* the top image, open read-write in this state */
    const uint32_t *ids; /* of the top image's blocks, as read; `blocks` of them */
    uint64_t blocks;
    uint64_t listed; /* names asked for so far, by number */
    char why[320];
};

/* Says why and returns -1. */
int state_fail(struct lab_state *st, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Opens the top image once more in this state (`extra` as in lab_open_co). */
int state_open_co(struct lab_state *st, json_t *extra, unsigned flags, struct node **out);
int state_check_co(struct lab_state *st, struct node *n, const char *when);
/* The ids that a node's blocks read as: `ids` has BLOCKS entries. */
int state_read_ids_co(struct lab_state *st, struct node *n, const char *what, uint32_t *ids,
                      uint64_t *blocks);
/* Every block, and the size, as remembered. */
int state_reads_as_co(struct lab_state *st, struct node *n, const struct model_mark *m,
                      const char *what);
/* The name that the image lists: what it means, or NULL with a failure when it must not be there.
 */
struct lab_name *model_name_listed(struct lab_state *st, const char *name);
/* Every name that must be there was listed (model_name_listed) in this state. */
int model_names_complete(struct lab_state *st);

void judge_co(struct lab *l, uint64_t moment);
/* replay.c: builds the states and has each judged. */
void replay_co(struct lab *l);
/* guest.c: the tasks, until they have ended. */
void guests_co(struct lab *l);
void block_fill(uint8_t *p, uint32_t id);

#endif
