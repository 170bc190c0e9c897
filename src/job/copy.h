/* SPDX-License-Identifier: MIT */
/*
 * The one copy engine: convert, commit and whatever later moves a disk's content elsewhere.
 *
 * Extent-driven: holes and zeros of the source cost no reads; parallel workers; bounded memory
 * (workers * chunk, at most 32 MiB); zero detection; compression on all cores, in order of
 * completion or (in_order) of offset; progress and cancel in one place.  Must be called from a
 * task; returns when done.
 */
#ifndef STRATA_JOB_COPY_H
#define STRATA_JOB_COPY_H

#include <stdbool.h>
#include <stdint.h>

struct node;
struct err;

struct copy_progress {
    uint64_t done, total; /* bytes of work: data to move, as known now */
};

struct copy_opts {
    unsigned workers; /* requests in flight; 0: chosen */
    bool in_order; /* writes to the target in ascending order (default of -W off is our choice too)
                    */
    bool compress; /* target units through its codec */
    uint32_t sparse_bytes; /* runs of zeros of at least this become holes; 0: copy all as data */
    bool target_is_zero;   /* target reads as zeros: zero runs need no write */
    bool top_only;         /* copy only what the top layer of the source holds (commit) */
    unsigned layers;       /* the same for this many top layers; 0: says top_only */
    bool stable;           /* the caller flushes the target afterwards: begin early */
    bool salvage;          /* unreadable ranges become zeros, reported */
    uint64_t rate_bytes;   /* per second; 0: unlimited */
    const bool *cancel;    /* looked at between chunks; NULL: never */
    void (*progress)(void *arg, const struct copy_progress *p); /* at most 10 a second */
    bool each_piece; /* ... or for every piece that has been copied */
    void (*damaged)(void *arg, uint64_t offset, uint64_t length, int error); /* salvage */
    /* The same for a sector of which the map says nothing: it is read.  May be said twice. */
    void (*unmapped)(void *arg, uint64_t offset, int error);
    void *arg;
};

/*
 * Copies [0, length) of `src` to `dst` at dst_offset.  -ECANCELED, or the first error with the text
 * saying which side and where.  Does not flush the target.
 */
int copy_run_co(struct node *src, struct node *dst, uint64_t length, uint64_t dst_offset,
                const struct copy_opts *opts, struct err *e);

/*
 * Writes what `overlay` holds above its backing into that backing (reopened read-write for it),
 * then flushes the base. The overlay is left whole; grows the base when the overlay is larger.  The
 * base is read-only again afterwards.
 */
int commit_run_co(struct node *overlay, const struct copy_opts *opts, struct err *e);
/*
 * The same into `base`, any layer below `overlay`: what the layers in between hold goes along.
 * -EINVAL when it is not one.  Layers in between read differently afterwards.
 */
int commit_into_co(struct node *overlay, struct node *base, const struct copy_opts *opts,
                   struct err *e);
/*
 * After a commit: drops what `overlay` (read-write) holds, so that it reads as its backing file,
 * and flushes.  Killed on the way it reads the same at every moment, as the backing file holds it
 * all by then.  -ENOTSUP when its format cannot.
 */
int commit_empty_co(struct node *overlay, struct err *e);

#endif
