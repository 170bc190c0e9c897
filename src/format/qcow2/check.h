/* SPDX-License-Identifier: MIT */
/* What the files of qcow2's check share; nothing else includes this. */
#ifndef STRATA_FORMAT_QCOW2_CHECK_H
#define STRATA_FORMAT_QCOW2_CHECK_H

#include <stdbool.h>
#include <stdint.h>

#include "format/qcow2/counts.h"
#include "format/qcow2/qcow2.h"

#define CHECK_BUF_BYTES ((uint32_t)MIB)

/*
 * How much of the two large counts is held at once, beside one bit for each cluster: what remains
 * of 64 MiB is for the other sets, lists of tables, buffers and the program itself.
 */
#define CHECK_ROOM_BYTES ((size_t)40 * MIB)
extern size_t check_room_bytes; /* the same; tests make it small */

/* L2 tables and how often they are named. */
struct check_table {
    uint64_t offset, names;
};
struct check_tables {
    struct check_table *v; /* sorted, each once, when check_tables_sort() has been called */
    size_t count, cap;
};

struct check {
    struct qcow2 *s;
    struct check_result *r;
    /*
     * What is counted is done for one window of the clusters at a time (counts.h): mostly the first
     * has all of them.  In later ones `r` is `quiet`, so that everything that does not depend on
     * the counts is told and added up once; `whole` is the caller's result.  `unbounded`: one
     * window, whatever memory it takes.
     */
    struct check_result *whole, quiet;
    bool unbounded;
    struct counts_room room;
    uint64_t file_length;   /* of the storage, whole sectors */
    uint64_t file_clusters; /* that the file has a byte of */
    /*
     * Clusters under examination: file_clusters, plus one when something legal reaches less than a
     * cluster beyond the end of the file (a table's or a code's last cluster is not padded).
     */
    uint64_t clusters;
    struct counts stored;      /* what the image's refcount blocks say */
    struct counts found;       /* names that were met */
    struct counts fixed;       /* clusters of metadata other than L2 tables */
    struct counts l2;          /* clusters of L2 tables, of snapshots too */
    struct counts refs;        /* clusters of the refcount table and its blocks, also in `fixed` */
    uint64_t l1_end;           /* behind the last active L1 entry that is not 0 */
    uint64_t *l1_skip;         /* bitmap: L1 entries whose table is not to be walked */
    struct check_tables twice; /* active L2 tables once more for each further L1 entry, sorted */
    struct check_tables inactive; /* L2 tables that snapshots name, as often as they do, sorted */
    bool without_refs; /* the refcount structures are neither counted nor read: before a rebuild */
    /* What the walk learned for a repair. */
    bool incomplete;    /* a table could not be followed: what it names is not counted */
    bool rebuild;       /* refcount structures are damaged, missing, or share a cluster */
    uint64_t snapshots; /* entries of the snapshot table that need another form */
    bool overlaps;      /* data in clusters of metadata */
    bool unread;        /* a refcount block could not be read: its counts are not known */
    /*
     * Names outside the file, by cluster: the highest one near its end, and the lowest one far off.
     * Nothing new may be put where they point.
     */
    uint64_t outside_near, outside_far;
    uint64_t done, total; /* progress, in bytes of tables; of one window: */
    uint64_t window_total;
    uint64_t shown;
    uint8_t *buf; /* CHECK_BUF_BYTES, of whoever walks */
};

/* Counts and reports one problem; the text says what, where, found and expected. */
void check_corruption(struct check *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* The same for what follows from counts inside the window. */
void check_miscounted(struct check *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static inline bool check_in_window(const struct check *c, uint64_t cluster) {
    return cluster >= c->room.from && cluster < c->room.end;
}
/* The same, and what it names can no longer be known: c->incomplete. */
void check_lost(struct check *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Something that could not be examined: read errors. */
void check_failure(struct check *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void check_progress(struct check *c, uint64_t bytes);

/* Is [offset, +length) inside the file, the last cluster possibly in part? */
bool check_inside(const struct check *c, uint64_t offset, uint64_t length);
/* One more name for each cluster that the range touches (which is inside). -ENOMEM. */
int check_count(struct check *c, uint64_t offset, uint64_t length, uint64_t names);
/*
 * Metadata [offset, +length), not an L2 table: aligned, inside, sharing no cluster with other
 * metadata.  Counted where it can be.  *ok: it can be read.  -ENOMEM.
 */
int check_metadata(struct check *c, const char *what, uint64_t offset, uint64_t length, bool *ok);

int check_tables_add(struct check_tables *t, uint64_t offset); /* -ENOMEM */
void check_tables_sort(struct check_tables *t);
/* How often a sorted list names the table. */
uint64_t check_tables_names(const struct check_tables *t, uint64_t offset);

/* One pass: c->s and c->r are set, all else is zero.  c stays readable until check_end(). */
int check_pass_co(struct check *c, struct err *e);
void check_end(struct check *c);

/* Entries name clusters [first, +count), which are outside the file. */
void check_outside(struct check *c, uint64_t first, uint64_t count);
/* Notes what it means that data or tables lie in these clusters of metadata. */
void check_overlapped(struct check *c, uint64_t cluster, uint64_t count);

/* check_l2.c */
int check_l1_entries_co(struct check *c); /* names of L2 tables, before they are walked */
int check_active_l2_co(struct check *c);  /* the active tables: everything */
int check_inactive_l2_co(struct check *c, uint64_t offset, uint64_t names);

/* check_extra.c */
int check_snapshots_co(struct check *c);
int check_inactive_co(struct check *c);
int check_bitmaps_co(struct check *c);

#endif
