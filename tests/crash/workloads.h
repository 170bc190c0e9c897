/* SPDX-License-Identifier: MIT */
/* The tables of workloads; each ends with a row without a name.  How to make one: lab.h. */
#ifndef STRATA_TESTS_CRASH_WORKLOADS_H
#define STRATA_TESTS_CRASH_WORKLOADS_H

#include "lab.h"

extern const struct workload write_workloads[];    /* write.c: requests of guests */
extern const struct workload chain_workloads[];    /* chain.c: several images, sizes, raw */
extern const struct workload amend_workloads[];    /* amend.c: options changed in use */
extern const struct workload repair_workloads[];   /* repair.c: damage, and its repair */
extern const struct workload bitmap_workloads[];   /* bitmap.c: dirty bitmaps */
extern const struct workload snapshot_workloads[]; /* snapshot.c: internal snapshots */
extern const struct workload apart_workloads[];    /* apart.c: subclusters, external data files */
extern const struct workload mixed_workloads[];    /* mixed.c: bitmaps, snapshots, subclusters */
extern const struct workload format_workloads[];   /* formats.c: the formats but qcow2 */

/* What mixed.c takes from the others. */
extern const struct lab_op bitmap_ops[], snapshot_ops[];
void bitmap_store_all(struct lab *l);
void bitmap_free_own(struct lab *l);
int judge_bitmaps_co(struct lab_state *st);
int judge_snapshots_co(struct lab_state *st);

#endif
