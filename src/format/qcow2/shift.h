/* SPDX-License-Identifier: MIT */
/*
 * A shift: from one set of tables to the next one in a single step.
 *
 * Making, applying and deleting a snapshot changes the reference counts of up to all clusters and
 * the COPIED flags of all active L2 tables, gigabytes apart.  Written in place, any order leaves
 * moments at which a flag and its count contradict one another, which checkers rightly call
 * corrupt.  So nothing is written in place.  What changes is written to free clusters, a new
 * refcount table with all its blocks among it; and then one write of 48 bytes in the first sector
 * makes the header name the new L1 table, refcount table and snapshot table (and disk size) at
 * once:
 *
 *      header -----+--> L1 table ------> L2 tables ----> data      old
 *       (one write)|--> refcount table -> blocks
 *                  `--> snapshot table -> L1 tables
 *                  ==>  the same again, beside it                   new
 *
 * The new blocks count what the new header names and nothing else: neither the old tables nor
 * anything half done.  The old blocks do not count the new clusters.  So a crash before the write
 * leaves the old image, whose free space holds rubbish, and a crash after it the new one; neither
 * has even leaks.  Rules, each with a planted bug:
 *
 *  1. everything new is on stable storage before the header is written (SHIFT_NAMED_EARLY);
 *  2. new tables lie where the old counts say "free" (SHIFT_COUNTS_IN_PLACE);
 *  3. what only the old header names is neither punched nor used before the new header is on stable
 *     storage (SHIFT_PUNCHED_EARLY, SHIFT_NO_LAST_BARRIER);
 *  4. COPIED is set exactly where the new count is one (SHIFT_COPIED_LEFT);
 *  5. the header's fields go out in one write (SHIFT_HEADER_IN_PARTS).
 *
 * L2 tables whose flags stay as they are, all of those that a snapshot shares already, are not
 * copied.  The bytes moved are those that an update in place would write too, but in long runs.
 *
 * Steps (the caller's in capitals):
 *      begin               everything dirty is written back; counters
 *      NAMES, DROP         which tables' names come (+) and go (-): each L2 table is read once
 *      count               stored counts + come - go, checked; clusters whose new count is one
 *      copy                L2 tables of the active L1 table to be with other flags than they need
 *      ROOM                for L1 tables and the snapshot table, and writing them
 *      switch              blocks, refcount table, barrier, header, barrier; memory follows
 *      end                 room is taken back after an error
 *
 * Memory: two counters and one bitmap, a bit a cluster each (8 MiB each for 4 TiB of 64 KiB
 * clusters); a byte a cluster where coded data shares them.  Tables pass through buffers of 2 MiB.
 *
 * The node is quiesced; nothing else touches the image meanwhile.
 */
#ifndef STRATA_FORMAT_QCOW2_SHIFT_H
#define STRATA_FORMAT_QCOW2_SHIFT_H

#include <stdbool.h>
#include <stdint.h>

#include "format/qcow2/counts.h"
#include "format/qcow2/qcow2.h"

#define SHIFT_BUF_BYTES ((uint32_t)(2 * MIB))

struct shift_run {
    uint64_t cluster, count;
};
struct shift_runs {
    struct shift_run *v;
    size_t count, cap;
};

/* What the header names: before, and after. */
struct shift_header {
    uint64_t size;
    uint32_t l1_entries;
    uint64_t l1_offset, reftable_offset;
    uint32_t reftable_clusters, nb_snapshots;
    uint64_t snapshots_offset;
};

struct shift {
    struct qcow2 *s;
    struct err *e;
    struct shift_header next; /* starts as what is; the caller and the steps change it */

    struct counts come, go; /* names that each cluster gets and loses */
    uint64_t *once;         /* bitmap over file_clusters: the new count is exactly one */
    uint64_t file_clusters; /* that the file has a byte of, and one more */

    uint64_t *l1;       /* the active L1 table to be, next.l1_entries long; owned */
    uint64_t *reftable; /* refcount table to be, host byte order; owned */
    uint32_t reftable_entries;
    uint64_t *needed; /* bitmap over blocks: the new block counts something */

    struct shift_runs free;    /* clusters that the old counts call free, in runs worth having */
    size_t free_at;            /* the run that is being used up */
    uint64_t end;              /* behind everything in use */
    struct shift_runs fresh;   /* room taken */
    struct shift_runs dropped; /* metadata that only the old header names */
    struct shift_runs freed;   /* clusters in use before and not after (as far as they fit) */
    uint64_t file_size;        /* of the storage at the beginning */
    bool unknown;              /* which header storage has is not known */
    uint64_t written;          /* bytes since the storage was last told to begin */
    uint8_t *in, *out;         /* SHIFT_BUF_BYTES each */
};

/* ---- shift.c ---- */
int shift_begin_co(struct shift *t, struct qcow2 *s, struct err *e);
/*
 * Writes refcounts, makes them stable, writes the header, makes that stable; then memory follows.
 * After an error storage has the old header (rewritten when its state was unknown).
 */
int shift_switch_co(struct shift *t);
/* `done`: the switch has succeeded.  Frees; accepts a half-begun one. */
void shift_end_co(struct shift *t, bool done);
/* Contiguous room for `bytes`, one name each cluster. */
int shift_room(struct shift *t, uint64_t bytes, uint64_t *host);
/* Room for up to `want` clusters with `names` names each. */
int shift_room_some(struct shift *t, uint64_t want, uint64_t names, uint64_t *cluster,
                    uint64_t *got);
int shift_runs_add(struct shift_runs *r, uint64_t cluster, uint64_t count); /* -ENOMEM */
/* Writes to fresh room; now and then the storage is told to begin its part. */
int shift_write_co(struct shift *t, uint64_t host, const void *buf, uint64_t bytes);

/* ---- shift_names.c ---- */
/*
 * What L1 table `l1` names comes (or goes): its L2 tables, and all that their entries name.  Where
 * `other` (may be NULL) names the same L2 table at the same place, both cancel out: nothing is
 * counted.
 */
int shift_names_co(struct shift *t, const uint64_t *l1, uint32_t entries, const uint64_t *other,
                   uint32_t other_entries, bool go);
/* Metadata [host, +bytes) loses its name. */
int shift_drop(struct shift *t, uint64_t host, uint64_t bytes);
/*
 * Gives t->l1 the flags that it needs, and copies of those L2 tables whose own flags are not right.
 * `names`: how many L1 tables to be are made of t->l1 (2: the active one and a snapshot's).
 */
int shift_copy_co(struct shift *t, uint64_t names);

/* ---- shift_counts.c ---- */
/* The new counts, checked.  Nothing is written. */
int shift_count_co(struct shift *t);
/* Room for the new blocks and table, and their bytes. */
int shift_write_counts_co(struct shift *t);

#endif
