/* SPDX-License-Identifier: MIT */
/* A growing string.  `s` is NULL until the first append, then always NUL-terminated. */
#ifndef STRATA_BASE_STRBUF_H
#define STRATA_BASE_STRBUF_H

#include <stddef.h>
#include <stdint.h>

struct strbuf {
    char *s;
    size_t len, cap;
};

#define STRBUF_INIT                                                                                \
    { NULL, 0, 0 }
#define AUTO_STRBUF __attribute__((cleanup(strbuf_free)))

void strbuf_free(struct strbuf *b);
void strbuf_add(struct strbuf *b, const char *s, size_t len);
void strbuf_puts(struct strbuf *b, const char *s);
void strbuf_printf(struct strbuf *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Hands the string over (never NULL: an empty buffer gives ""), leaving the buffer empty. */
char *strbuf_steal(struct strbuf *b);

/*
 * Appends `s` so that a terminal cannot be driven by it: control bytes and invalid UTF-8 become
 * \xNN.  Every name that comes from an image or a peer is printed through this.
 */
void strbuf_put_safe(struct strbuf *b, const char *s, size_t len);

/* Edit distance, for "did you mean"; bounded work: strings are cut at 64 bytes. */
unsigned str_distance(const char *a, const char *b);

/*
 * "Did you mean": start with {0}, offer every candidate; `best` is then the nearest one that is
 * near enough to be meant, or NULL.
 */
struct str_nearest {
    const char *best;
    unsigned distance;
};
void str_nearest_offer(struct str_nearest *n, const char *word, const char *candidate);

#endif
