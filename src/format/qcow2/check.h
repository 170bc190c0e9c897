/* SPDX-License-Identifier: MIT */
/* What the files of qcow2's check share; nothing else includes this. */
#ifndef STRATA_FORMAT_QCOW2_CHECK_H
#define STRATA_FORMAT_QCOW2_CHECK_H

#include <stdbool.h>
#include <stdint.h>

#include "format/qcow2/counts.h"
#include "format/qcow2/qcow2.h"

#define CHECK_BUF_BYTES ((uint32_t)MIB)

struct check {
    struct qcow2 *s;
    struct check_result *r;
    uint64_t file_length;   /* of the storage, whole sectors */
    uint64_t file_clusters; /* that the file has a byte of */
    /*
     * Clusters under examination: file_clusters, plus one when something legal reaches less than a
     * cluster beyond the end of the file (a table's or a code's last cluster is not padded).
     */
    uint64_t clusters;
    struct counts stored; /* what the image's refcount blocks say */
    struct counts found;  /* names that were met */
    struct counts fixed;  /* clusters of metadata other than L2 tables */
    struct counts l2;     /* clusters of L2 tables, of snapshots too */
    uint64_t *l1_skip;    /* bitmap: L1 entries whose table is not to be walked */
    uint64_t done, total; /* progress, in bytes of tables */
    uint64_t shown;
    uint8_t *buf; /* CHECK_BUF_BYTES, of whoever walks */
};

/* Counts and reports one problem; the text says what, where, found and expected. */
void check_corruption(struct check *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
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

/* check_l2.c */
int check_l1_entries_co(struct check *c); /* names of L2 tables, before they are walked */
int check_active_l2_co(struct check *c);  /* the active tables: everything */
int check_inactive_l2_co(struct check *c, uint64_t offset, uint64_t names, bool quiet);

/* check_extra.c */
struct check_inactive { /* L2 tables that snapshots name */
    uint64_t *offsets;
    size_t count, cap;
};
int check_snapshots_co(struct check *c, struct check_inactive *in);
int check_inactive_co(struct check *c, struct check_inactive *in);
int check_bitmaps_co(struct check *c);

#endif
