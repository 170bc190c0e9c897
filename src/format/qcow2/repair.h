/* SPDX-License-Identifier: MIT */
/* What the files of qcow2's repair share; nothing else includes this. */
#ifndef STRATA_FORMAT_QCOW2_REPAIR_H
#define STRATA_FORMAT_QCOW2_REPAIR_H

#include "base/ck.h"
#include "disk/io.h"
#include "format/qcow2/check.h"

struct repair {
    struct qcow2 *s;
    uint8_t *buf;     /* CHECK_BUF_BYTES, for tables; the pass has its own */
    uint8_t *cluster; /* one cluster, of guest data being moved */
    /* Moves, see repair_entries.c. */
    struct counts seen;  /* data clusters that the active image has named already */
    uint64_t room, left; /* next cluster for moved data, and how many have been claimed */
    uint64_t wanted;     /* while counting: clusters that should move */
    bool unsure;         /* tables in whose cluster something else lies are changed, too */
};

static inline int repair_barrier_co(struct qcow2 *s) {
    return qcow2_ordered(s) ? disk_flush_co(s->file) : 0;
}

/* First cluster behind the file and behind everything that names what is there not. */
static inline uint64_t repair_room_from(const struct check *c) {
    return max_u64(c->clusters, c->outside_near + 1);
}

/*
 * Repairs from the picture that the pass `c` made; each adds to *fixed what it has changed, and the
 * pass is out of date then.  Bare -errno.
 */

/* repair_entries.c */
/* Entries that can be made right without moving or losing anything; flushed. */
int repair_entries_co(struct repair *p, struct check *c, uint64_t *fixed);
/* COPIED flags of the active tables, by the stored counts; flushed. */
int repair_copied_co(struct repair *p, struct check *c, uint64_t *fixed);
/* Room for p->wanted clusters, or as many as are reasonable: p->room, p->left. */
int repair_room_co(struct repair *p, struct check *c);
/* L2 tables that several L1 entries name. */
int repair_tables_co(struct repair *p, struct check *c, uint64_t *fixed);
/* Guest data that shares its cluster with metadata or with other guest data gets its own. */
int repair_moves_co(struct repair *p, struct check *c, uint64_t *fixed);

/* repair_counts.c */
/* Counts that are too low (`raise`) or too high become what the pass has found; flushed. */
int repair_counts_co(struct repair *p, struct check *c, bool raise, uint64_t *fixed);
/* Counts `n` clusters from `first` on, of which nothing is known, as in use once; flushed. */
int repair_claim_co(struct repair *p, uint64_t first, uint64_t n, bool *fits);

/* repair_snapshots.c */
/* A snapshot table whose entries readers can use, in force when this returns 0. */
int repair_snapshots_co(struct repair *p, struct check *c, uint64_t *fixed);

/* repair_rebuild.c */
/*
 * A new refcount table with new blocks, in fresh room behind the file, for what the image names;
 * in force when this returns 0.  [extra, +extra_n) are counted as in use once.
 */
int repair_rebuild_co(struct repair *p, uint64_t extra, uint64_t extra_n);

#endif
