/* SPDX-License-Identifier: MIT */
/* A finding of a check in words, for formats whose checks have no more machinery. */
#ifndef STRATA_FORMAT_PROBLEM_H
#define STRATA_FORMAT_PROBLEM_H

#include <stdbool.h>

struct check_result;

/* Counts one corruption and reports it. */
void problem_corruption(struct check_result *r, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
/* Counts `count` leaked units and reports them once. */
void problem_leaks(struct check_result *r, unsigned long long count, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

#endif
