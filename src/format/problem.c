/* SPDX-License-Identifier: MIT */
#include "format/problem.h"

#include <stdarg.h>
#include <stdio.h>

#include "disk/driver.h"

static void report(struct check_result *r, bool leak, const char *fmt, va_list ap) {
    char text[240];
    if (!r->report)
        return;
    vsnprintf(text, sizeof(text), fmt, ap);
    r->report(r->arg, leak, text);
}

void problem_corruption(struct check_result *r, const char *fmt, ...) {
    va_list ap;
    r->corruptions++;
    va_start(ap, fmt);
    report(r, false, fmt, ap);
    va_end(ap);
}

void problem_leaks(struct check_result *r, unsigned long long count, const char *fmt, ...) {
    va_list ap;
    r->leaks += count;
    va_start(ap, fmt);
    report(r, true, fmt, ap);
    va_end(ap);
}
