/* SPDX-License-Identifier: MIT */
/* What the files of qcow2's amend share; nothing else includes this. */
#ifndef STRATA_FORMAT_QCOW2_AMEND_H
#define STRATA_FORMAT_QCOW2_AMEND_H

#include <stdbool.h>
#include <stdint.h>

#include "format/qcow2/qcow2.h"

/* How far an amendment is: tables looked at or written. */
struct qcow2_amend_progress {
    const struct amend_ctx *ctx;
    uint64_t done, total;
};
void qcow2_amend_step(struct qcow2_amend_progress *p, uint64_t by);

/* ---- amend_counts.c; nothing is dirty ---- */
/* Whether counts of 1 << order bits can be made (-EOVERFLOW: a count is too large); no changes. */
int qcow2_counts_fit_co(struct qcow2 *s, uint32_t order, struct err *e);
int qcow2_counts_change_co(struct qcow2 *s, uint32_t order, struct qcow2_amend_progress *p,
                           struct err *e);

/* ---- amend_zero.c; nothing is dirty ---- */
struct qcow2_amend_snapshot {
    uint64_t l1_host, vm_state, disk_size;
    uint32_t l1_entries, extra;
};
/* The entry of the snapshot table at *at, which moves to the next one. */
int qcow2_amend_snapshot_co(struct qcow2 *s, uint64_t *at, struct qcow2_amend_snapshot *out,
                            struct err *e);
int qcow2_find_coded_co(struct qcow2 *s, bool *coded, struct err *e);
/* Clusters with the zero flag become holes or data, in snapshots too; stable on return. */
int qcow2_expand_zeros_co(struct qcow2 *s, struct qcow2_amend_progress *p, struct err *e);

/* ---- amend_snapshots.c; nothing is dirty ---- */
struct qcow2_amend_table {
    uint64_t old_host, old_bytes, host; /* host 0: no other table */
};
/* A complete snapshot table, stable; s->h names it, and the caller writes that. */
int qcow2_amend_table_co(struct qcow2 *s, struct qcow2_amend_table *t, struct err *e);
/* The header names it: the old one's clusters are given back. */
void qcow2_amend_table_done_co(struct qcow2 *s, const struct qcow2_amend_table *t);

#endif
