/* SPDX-License-Identifier: MIT */
/*
 * Tests named "uring: ..." need io_uring.  Where the kernel refuses it, which scripts/test.sh finds
 * out without strata's help and says in STRATA_NO_URING, they are left out of the plan.
 * Include after cmocka.h.
 */
#ifndef STRATA_TESTS_URING_FILTER_H
#define STRATA_TESTS_URING_FILTER_H

#include <stdbool.h>
#include <stdlib.h>

static inline bool uring_refused(void) {
    return getenv("STRATA_NO_URING") != NULL;
}
static inline void leave_out_refused_uring(void) {
    if (uring_refused())
        cmocka_set_skip_filter("uring: *");
}
#define URING_TEST(f)                                                                              \
    { "uring: " #f, f, NULL, NULL, NULL }

#endif
