/* SPDX-License-Identifier: MIT */
/*
 * Errors with a code, a sentence and the context each layer adds.
 *
 * A fallible call returns 0 or -errno and, when given one, fills a `struct err` that the caller
 * owns.  The innermost layer calls err_set(); each layer above adds only what it alone knows with
 * err_prefix().  The result reads outside-in: "opening a.qcow2: L1 table: offset 513 is not a
 * multiple of 65536".  No newline, no full stop; what to do about it goes into the hint.  Control
 * bytes and invalid UTF-8 become \xNN, so a name from an image may be put in as it is.
 *
 * Library code never prints and never exits.  The request path returns bare -errno and allocates
 * nothing; the edge (job, export, CLI) adds node, offset and length.
 */
#ifndef STRATA_BASE_ERR_H
#define STRATA_BASE_ERR_H

#include "base/cleanup.h"

struct err {
    int code;   /* positive errno, 0 = no error */
    char *text; /* owned; NULL when code is 0 */
    char *hint; /* owned; NULL when there is none */
};

#define ERR_INIT                                                                                   \
    { 0, NULL, NULL }
/* struct err e AUTO_ERR = ERR_INIT; */
#define AUTO_ERR AUTO(err_clear)

/*
 * Sets the error and returns -code.  `code` is a positive errno.  `e` may be NULL (the code is
 * still returned).  An error already there is replaced.
 */
int err_set(struct err *e, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* As err_set, appending ": " and the text of the errno `code`. */
int err_errno(struct err *e, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/*
 * Puts "fmt: " before the text.  Returns -code (so `return err_prefix(...)`).  On NULL only -EIO:
 * which error it was is lost, that there was one is not.
 */
int err_prefix(struct err *e, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* Says what the user can do.  The innermost hint stays: a second one is ignored. */
void err_hint(struct err *e, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* Moves src into dst (dst cleared first, src empty afterwards).  dst may be NULL: src is cleared.
 */
void err_move(struct err *dst, struct err *src);

/* Frees and resets to "no error".  Accepts NULL. */
void err_clear(struct err *e);

/* -errno of what a call that returns no status has said; -EIO when `e` is NULL or says nothing. */
int err_status(const struct err *e);

/* The text, or the errno's own text when there is none. Never NULL. */
const char *err_text(const struct err *e);

#endif
