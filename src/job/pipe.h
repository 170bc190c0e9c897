/* SPDX-License-Identifier: MIT */
/*
 * Disks through pipes: bytes that come or go once, in order.
 *
 * In: a raw stream of unknown length lands in a storage node, with holes for its zeros.
 *
 * Out: an image is a stream only when every byte of it is known before the next one.  So it is laid
 * out first, without data: the format makes room for all that the disk holds and links it in, on a
 * scratch file that receives nothing but metadata (pipe_layout_co).  Then host byte after host byte
 * is written, metadata from the scratch file and data from the disk (pipe_write_co).  The reader of
 * the stream gets a plain image of the format, and no data was stored on the way.
 */
#ifndef STRATA_JOB_PIPE_H
#define STRATA_JOB_PIPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct node;
struct err;

struct pipe_opts {
    const bool *cancel; /* looked at between pieces; NULL: never */
    void (*progress)(void *arg, uint64_t done, uint64_t total); /* total 0: unknown */
    void *arg;
    uint64_t rate_bytes; /* out: per second; 0: unlimited */
};

/*
 * Reads `fd` to its end into `file` (a storage node, empty).  Aligned runs of zeros of `sparse`
 * bytes are left out (0: none).  *total: bytes read, which is the node's size then.
 */
int pipe_read_co(int fd, struct node *file, uint32_t sparse, const struct pipe_opts *opts,
                 uint64_t *total, struct err *e);

/* Stream bytes [host, +length) are the disk's bytes [guest, +length). */
struct pipe_run {
    uint64_t host, guest, length;
};
struct pipe_layout {
    struct pipe_run *runs; /* ascending by host, none overlap */
    size_t count, cap;
    struct node *file; /* all other bytes; NULL: there are none */
    uint64_t total;    /* of the stream */
};
void pipe_layout_free(struct pipe_layout *l); /* not the node */
/*
 * Room in `image` (a format node on an empty scratch file) for what `disk` holds, [0, disk->size)
 * of it at guest offset `at`; `top_only`: what its top layer holds, zeros included.  Adds to l.
 * -ENOTSUP: this format (or these options) cannot be laid out ahead.
 */
int pipe_layout_co(struct node *disk, struct node *image, uint64_t at, bool top_only,
                   const struct pipe_opts *opts, struct pipe_layout *l, struct err *e);
/* After the last one: makes the metadata whole and the runs ascend. */
int pipe_layout_done_co(struct node *image, struct pipe_layout *l, struct err *e);

/*
 * Writes the stream to `fd`.  read_co fills `length` bytes of the disk's [guest, ...); what lies
 * behind its end is zeros.  -EPIPE when nobody reads any more.
 */
int pipe_write_co(int fd, const struct pipe_layout *l,
                  int (*read_co)(void *arg, uint64_t guest, void *buf, size_t length),
                  const struct pipe_opts *opts, struct err *e);

#endif
