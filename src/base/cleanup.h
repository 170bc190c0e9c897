/* SPDX-License-Identifier: MIT */
/*
 * Scope owns resources: declare with one of these at the variable, initialise there, and hand over
 * on success with steal().
 */
#ifndef STRATA_BASE_CLEANUP_H
#define STRATA_BASE_CLEANUP_H

#include <stdlib.h>
#include <unistd.h>

static inline void cleanup_free_(void *pp) {
    free(*(void **)pp);
}
static inline void cleanup_fd_(int *fd) {
    if (*fd >= 0)
        close(*fd);
}

#define AUTO_FREE __attribute__((cleanup(cleanup_free_)))
#define AUTO_FD __attribute__((cleanup(cleanup_fd_)))
#define AUTO(fn) __attribute__((cleanup(fn)))

/* Takes the pointer out of `*pp`, leaving NULL behind. */
#define steal(pp)                                                                                  \
    ({                                                                                             \
        __typeof__(*(pp)) steal_v_ = *(pp);                                                        \
        *(pp) = NULL;                                                                              \
        steal_v_;                                                                                  \
    })
static inline int steal_fd(int *fd) {
    int v = *fd;
    *fd = -1;
    return v;
}

/*
 * Allocation that cannot fail for small, bounded objects: prints one line and aborts when memory is
 * gone.  Anything whose size comes from an image, a peer or a user uses malloc/calloc and reports
 * ENOMEM instead.
 */
void *xcalloc(size_t n, size_t size);
char *xstrdup(const char *s);
char *xstrndup(const char *s, size_t n);
char *xasprintf(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

#endif
