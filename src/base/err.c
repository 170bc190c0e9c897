/* SPDX-License-Identifier: MIT */
/*
 * struct err: see err.h for the rules.
 *
 * Representation: {0, NULL, NULL} is "no error".  With a code, text may still be NULL when memory
 * was short while the sentence was made; err_text() then falls back on the errno's own text, so an
 * error is never lost and building one never aborts.
 *
 * Invariant: arguments of the printf-like calls may point into the old text of the same err
 * (err_set(e, ..., "%s", e->text) works): the new sentence is built before the old one is freed.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/err.h"
#include "base/strbuf.h"

/*
 * Names from images and peers get into sentences on many ways: here is where all of them pass, and
 * none may drive a terminal.
 */
static char *printable(char *s) {
    const unsigned char *p = (const unsigned char *)s;
    while (*p >= ' ' && *p < 127)
        p++;
    if (!*p)
        return s;
    struct strbuf b = STRBUF_INIT;
    strbuf_put_safe(&b, s, strlen(s));
    free(s);
    return strbuf_steal(&b);
}

static char *format(const char *fmt, va_list ap) {
    char *s = NULL;
    return vasprintf(&s, fmt, ap) < 0 ? NULL : printable(s);
}

static void replace(struct err *e, int code, char *text) {
    err_clear(e);
    e->code = code;
    e->text = text;
}

int err_set(struct err *e, int code, const char *fmt, ...) {
    if (e) {
        va_list ap;
        va_start(ap, fmt);
        char *text = format(fmt, ap);
        va_end(ap);
        replace(e, code, text);
    }
    return -code;
}

int err_errno(struct err *e, int code, const char *fmt, ...) {
    if (e) {
        va_list ap;
        va_start(ap, fmt);
        char *head AUTO_FREE = format(fmt, ap);
        va_end(ap);
        char buf[128], *text = NULL;
        const char *reason = strerror_r(code, buf, sizeof(buf));
        if (!head || asprintf(&text, "%s: %s", head, reason) < 0)
            text = NULL;
        replace(e, code, text);
    }
    return -code;
}

int err_prefix(struct err *e, const char *fmt, ...) {
    if (!e)
        return -EIO;
    va_list ap;
    va_start(ap, fmt);
    char *head AUTO_FREE = format(fmt, ap);
    va_end(ap);
    char *text = NULL;
    if (head && e->code && asprintf(&text, "%s: %s", head, err_text(e)) >= 0) {
        free(e->text);
        e->text = text;
    }
    return -e->code;
}

/* A hint that begins with \001 is lines for the user's side to print as they are: these stay. */
static char *hint_lines(char *s) {
    struct strbuf b = STRBUF_INIT;
    strbuf_puts(&b, "\001");
    for (const char *line = s + 1; line;) {
        size_t length = strcspn(line, "\n");
        strbuf_put_safe(&b, line, length);
        if (line[length])
            strbuf_puts(&b, "\n");
        line = line[length] ? line + length + 1 : NULL;
    }
    free(s);
    return strbuf_steal(&b);
}

void err_hint(struct err *e, const char *fmt, ...) {
    if (!e || !e->code || e->hint)
        return;
    va_list ap;
    va_start(ap, fmt);
    char *s = NULL;
    e->hint = vasprintf(&s, fmt, ap) < 0 ? NULL : *s == '\001' ? hint_lines(s) : printable(s);
    va_end(ap);
}

void err_move(struct err *dst, struct err *src) {
    if (dst == src)
        return;
    if (!dst) {
        err_clear(src);
        return;
    }
    err_clear(dst);
    *dst = *src;
    *src = (struct err)ERR_INIT;
}

void err_clear(struct err *e) {
    if (!e)
        return;
    free(e->text);
    free(e->hint);
    *e = (struct err)ERR_INIT;
}

int err_status(const struct err *e) {
    return e && e->code ? -e->code : -EIO;
}

const char *err_text(const struct err *e) {
    if (!e || !e->code)
        return "no error";
    /* strerrordesc_np answers constant strings, safe from any thread. */
    const char *reason = e->text ? e->text : strerrordesc_np(e->code);
    return reason ? reason : "unknown error";
}
