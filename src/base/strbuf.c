/* SPDX-License-Identifier: MIT */
/*
 * The growing string, and the text helpers that go with it.
 *
 * Growth doubles, starting at 64 bytes.  Memory that is gone aborts (as the x* allocators do):
 * buffers hold messages, reports and help, all bounded by their writers.
 */
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/cleanup.h"
#include "base/strbuf.h"

void strbuf_free(struct strbuf *b) {
    if (!b)
        return;
    free(b->s);
    *b = (struct strbuf)STRBUF_INIT;
}

/* Makes room for `more` bytes and the NUL. */
static void reserve(struct strbuf *b, size_t more) {
    size_t need = b->len + more + 1;
    if (need <= b->cap)
        return;
    size_t cap = b->cap ? b->cap : 64;
    while (cap < need)
        cap *= 2;
    char *s = realloc(b->s, cap);
    if (!s)
        abort();
    b->s = s;
    b->cap = cap;
}

void strbuf_add(struct strbuf *b, const char *s, size_t len) {
    reserve(b, len);
    if (len)
        memcpy(b->s + b->len, s, len);
    b->len += len;
    b->s[b->len] = '\0';
}

void strbuf_puts(struct strbuf *b, const char *s) {
    strbuf_add(b, s, strlen(s));
}

void strbuf_printf(struct strbuf *b, const char *fmt, ...) {
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    reserve(b, 0);
    int n = vsnprintf(b->s + b->len, b->cap - b->len, fmt, ap);
    va_end(ap);
    if (n >= 0 && (size_t)n >= b->cap - b->len) {
        reserve(b, n);
        n = vsnprintf(b->s + b->len, b->cap - b->len, fmt, again);
    }
    va_end(again);
    if (n > 0)
        b->len += n;
    b->s[b->len] = '\0';
}

char *strbuf_steal(struct strbuf *b) {
    reserve(b, 0);
    b->s[b->len] = '\0';
    char *s = b->s;
    *b = (struct strbuf)STRBUF_INIT;
    return s;
}

/*
 * Length of the valid UTF-8 sequence at s, or 0.  Overlong forms, surrogates and values above
 * U+10FFFF are invalid (RFC 3629 section 4), and so, for a terminal, are the C1 controls
 * U+0080..U+009F (some terminals take U+009B as the start of an escape sequence) and the
 * bidirectional controls, with which a name can be displayed as another one.
 */
static size_t utf8_printable(const unsigned char *s, size_t len) {
    unsigned c = s[0];
    if (c < 0x80)
        return c >= 0x20 && c != 0x7f;
    size_t n = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : 2;
    if (c < 0xc2 || c > 0xf4 || n > len)
        return 0;
    unsigned v = c & (0x7f >> n);
    for (size_t i = 1; i < n; i++) {
        if ((s[i] & 0xc0) != 0x80)
            return 0;
        v = v << 6 | (s[i] & 0x3f);
    }
    static const unsigned least[] = {0, 0, 0xa0, 0x800, 0x10000};
    if (v < least[n] || v > 0x10ffff || (v >= 0xd800 && v <= 0xdfff))
        return 0;
    bool bidi = (v >= 0x200e && v <= 0x200f) || (v >= 0x2028 && v <= 0x202e) ||
                (v >= 0x2066 && v <= 0x2069);
    return bidi ? 0 : n;
}

void strbuf_put_safe(struct strbuf *b, const char *s, size_t len) {
    for (size_t i = 0; i < len;) {
        size_t n = utf8_printable((const unsigned char *)s + i, len - i);
        if (n)
            strbuf_add(b, s + i, n);
        else
            strbuf_printf(b, "\\x%02x", (unsigned char)s[i]);
        i += n ? n : 1;
    }
}

/*
 * Levenshtein distance where two neighbours swapped count as one step (the commonest typing slip):
 * three rolling rows, strings cut at 64 bytes.
 */
unsigned str_distance(const char *a, const char *b) {
    enum { MAX = 64 };
    unsigned char row[3][MAX + 1];
    size_t an = strnlen(a, MAX), bn = strnlen(b, MAX);
    for (size_t j = 0; j <= bn; j++)
        row[0][j] = j;
    for (size_t i = 1; i <= an; i++) {
        unsigned char *cur = row[i % 3], *up = row[(i - 1) % 3], *up2 = row[(i + 1) % 3];
        cur[0] = i;
        for (size_t j = 1; j <= bn; j++) {
            unsigned best = up[j - 1] + (a[i - 1] != b[j - 1]);
            if (up[j] + 1u < best)
                best = up[j] + 1u;
            if (cur[j - 1] + 1u < best)
                best = cur[j - 1] + 1u;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] &&
                up2[j - 2] + 1u < best)
                best = up2[j - 2] + 1u;
            cur[j] = best;
        }
    }
    return row[an % 3][bn];
}

void str_nearest_offer(struct str_nearest *n, const char *word, const char *candidate) {
    size_t len = strnlen(word, 64);
    unsigned d = str_distance(word, candidate);
    /* A beginning of the right word is as good as one slip: "cluster" for "cluster_size". */
    if (len >= 2 && !strncmp(word, candidate, len) && d > 1)
        d = 1;
    /* One slip in four letters, and never as many as would make any short word fit. */
    if (d > 1 + len / 4 || d >= len)
        return;
    if (!n->best || d < n->distance)
        *n = (struct str_nearest){candidate, d};
}
