/* SPDX-License-Identifier: MIT */
/* QED: what check and its repair share. */
#ifndef STRATA_FORMAT_QED_CHECK_H
#define STRATA_FORMAT_QED_CHECK_H

#include "format/qed/qed.h"
#include "format/seen.h"

struct check_result;

struct qed_walk {
    struct qed *s;
    struct check_result *r;   /* counters and reports; NULL: a repair's own look */
    struct seen tables, data; /* clusters of the file: header and tables; guest data */
    uint64_t named;           /* clusters in either */
    uint64_t last_data;
    uint64_t guest;     /* offset that the first entry of the table being walked covers */
    bool shared_tables; /* a table shares clusters with something else */
    /* repairs */
    struct seen met; /* data clusters whose first entry has been passed */
    uint64_t keep;   /* clusters that stay */
    uint64_t place;  /* no cluster below is unused */
};

/* `at`: the entry `index` of its table; 1: it has been changed. */
typedef int qed_entry_fn(struct qed_walk *w, uint64_t index, uint8_t *at);

int qed_each_l1_co(struct qed_walk *w, qed_entry_fn *fn_co);
/* Of each L2 table in the file, once. */
int qed_each_l2_co(struct qed_walk *w, qed_entry_fn *fn_co);

/* Fills `tables`, `data`, `named` and `shared_tables`. */
int qed_walk_begin_co(struct qed_walk *w);
void qed_walk_end(struct qed_walk *w);
uint64_t qed_clusters(const struct qed *s); /* of the file, the last one perhaps in part */

/* ---- repair.c ---- */
int qed_repair_errors_co(struct node *n, struct err *e);
int qed_repair_leaks_co(struct node *n, struct err *e);

#endif
