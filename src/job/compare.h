/* SPDX-License-Identifier: MIT */
/*
 * Do two disks read alike?
 *
 * Extent-driven: where both read as zeros nothing is read, where one does only the other is.
 * Parallel workers, bounded memory, comparison on worker threads.  Must be called from a task.
 */
#ifndef STRATA_JOB_COMPARE_H
#define STRATA_JOB_COMPARE_H

#include <stdbool.h>
#include <stdint.h>

struct node;
struct err;

enum compare_verdict {
    COMPARE_SAME,       /* a longer disk has only zeros behind the end of the other */
    COMPARE_CONTENT,    /* differ first at `offset` */
    COMPARE_ALLOCATION, /* strict: allocated or zero in one only, at `offset` */
    COMPARE_SIZE,       /* strict: sizes differ */
};
enum compare_stage { COMPARE_MAP, COMPARE_READ, COMPARE_OTHER }; /* what failed */

struct compare_opts {
    bool strict;
    unsigned workers;   /* 0: chosen */
    const bool *cancel; /* NULL: never */
    /* Bytes of the disk passed, of all; at most 10 a second. */
    void (*progress)(void *arg, uint64_t done, uint64_t total);
    void *arg;
};

struct compare_result {
    enum compare_verdict verdict;
    uint64_t offset;          /* first differing byte, exact */
    enum compare_stage stage; /* after an error */
};

/* 0 with the result, or -errno with text and result->stage. */
int compare_run_co(struct node *a, struct node *b, const struct compare_opts *opts,
                   struct compare_result *result, struct err *e);

#endif
