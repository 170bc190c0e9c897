/* SPDX-License-Identifier: MIT */
/*
 * Another backing file for an image that keeps reading as it does.
 *
 * Where the image holds nothing and the old and the new backing file differ, it is given the old
 * content; then its header names the new one.  Must be called from a task.
 */
#ifndef STRATA_JOB_REBASE_H
#define STRATA_JOB_REBASE_H

#include <stdbool.h>
#include <stdint.h>

struct node;
struct err;

struct rebase_opts {
    bool compress;      /* what is written into the image goes through its codec */
    const bool *cancel; /* NULL: never */
    /* Bytes of the disk passed, of all; at most 10 a second. */
    void (*progress)(void *arg, uint64_t done, uint64_t total);
    void *arg;
};

/*
 * `image` is open read-write on its old chain; `base` is the new backing file, NULL for none.  The
 * image then stands alone without it: it is flushed, but still names the old one.  -ECANCELED, or
 * the first error with side and offset; killed on the way the image reads as before.
 */
int rebase_copy_co(struct node *image, struct node *base, const struct rebase_opts *opts,
                   struct err *e);
/*
 * Lets the header name `name` (NULL: none) with `format`, and flushes.  What is open as the
 * image's backing stays until it is closed.
 */
int rebase_switch_co(struct node *image, const char *name, const char *format, struct err *e);

#endif
