/* SPDX-License-Identifier: MIT */
/*
 * Allocation that cannot fail, for small bounded objects (base/cleanup.h says when not to use it).
 *
 * A process that cannot get a few hundred bytes cannot report it any better either: one line is
 * written with a bare write(2), which needs no memory, and the process aborts.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/cleanup.h"

static _Noreturn void out_of_memory(void) {
    static const char msg[] = "strata: out of memory\n";
    ssize_t ignored = write(STDERR_FILENO, msg, sizeof(msg) - 1);
    (void)ignored;
    abort();
}

void *xcalloc(size_t n, size_t size) {
    /* calloc(0) may be NULL; a caller that asks for nothing still gets something to free. */
    void *p = calloc(n ? n : 1, size ? size : 1);
    if (!p)
        out_of_memory();
    return p;
}

char *xstrndup(const char *s, size_t n) {
    char *p = strndup(s, n);
    if (!p)
        out_of_memory();
    return p;
}

char *xstrdup(const char *s) {
    char *p = strdup(s);
    if (!p)
        out_of_memory();
    return p;
}

char *xasprintf(const char *fmt, ...) {
    char *p = NULL;
    va_list ap;
    va_start(ap, fmt);
    int n = vasprintf(&p, fmt, ap);
    va_end(ap);
    if (n < 0)
        out_of_memory();
    return p;
}
