/* SPDX-License-Identifier: MIT */
/*
 * Room ahead in a sparse target.
 *
 * A raw file has its full size from the start and is filled from holes.  On ext4 each write into a
 * hole allocates on its own, and a direct write that allocates holds the file alone: 2.3 to 3.4 s
 * for 4 GiB against 1.4 s into space that one fallocate made before (Linux 6.18).  So where the
 * source's map promises a long run of data, its room is allocated in steps ahead of the writers.
 *
 * The map may promise too much: data can turn out to be zeros.  Those places are remembered and
 * given back at the end (a punched hole waits for all direct writes in flight, so doing it at once
 * would stop the pipeline).  When the source is so full of zeros that the list overflows,
 * allocating ahead stops and the ranges on the list still come back.
 *
 * Not in memory (tmpfs): there fallocate clears each page, which the write would have filled
 * anyway.
 *
 * All of this only decides where holes are, never what is read back: failures are ignored.
 */
#include <stdlib.h>
#include "job/copy_int.h"
#include "base/ck.h"

enum { PUNCHES_MAX = 8192 };
static const uint64_t AHEAD_STEP = (uint64_t)256 << 20;
static const uint64_t AHEAD_RUN_MIN = (uint64_t)4 << 20; /* shorter runs gain nothing */

void copy_ahead_co(struct copy_job *j, uint64_t at, uint64_t run_length) {
    if (!j->ahead || at < j->ahead_end || run_length < AHEAD_RUN_MIN)
        return;
    uint64_t length = min_u64(run_length, AHEAD_STEP);
    /* Half a step over is not worth a second one. */
    if (run_length - length < AHEAD_STEP / 2)
        length = run_length;
    length = align_down(length, 4096);
    if (disk_zero_co(j->dst, at, length, ZERO_NO_FALLBACK) < 0)
        j->ahead = false;
    else
        j->ahead_end = at + length;
}

void copy_punch_later(struct copy_job *j, uint64_t at, uint64_t length) {
    if (at >= j->ahead_end)
        return;
    /* Windows finish nearly in order, so looking at the last few is enough to join neighbours. */
    for (unsigned i = j->punches, n = 0; i > 0 && n < 8; i--, n++) {
        struct copy_range *p = &j->punch[i - 1];
        if (p->offset + p->length == at) {
            p->length += length;
            return;
        }
        if (at + length == p->offset) {
            p->offset = at;
            p->length += length;
            return;
        }
    }
    if (!j->punch)
        j->punch = malloc(PUNCHES_MAX * sizeof(*j->punch));
    if (!j->punch || j->punches == PUNCHES_MAX) {
        j->ahead = false;
        return;
    }
    j->punch[j->punches++] = (struct copy_range){at, length};
}

void copy_punch_co(struct copy_job *j) {
    for (unsigned i = 0; i < j->punches; i++)
        disk_zero_co(j->dst, j->punch[i].offset, j->punch[i].length,
                     ZERO_MAY_UNMAP | ZERO_NO_FALLBACK);
    free(j->punch);
    j->punch = NULL;
    j->punches = 0;
}
