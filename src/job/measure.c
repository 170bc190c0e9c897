/* SPDX-License-Identifier: MIT */
/*
 * See measure.h.  A copy writes whole blocks, of the larger of the target's unit and 4 KiB
 * (copy.c), wherever one holds anything but zeros.  The blocks come in ascending order, so counting
 * the pieces that they touch, of every size at once, needs no more than where each size has got to.
 */
#include "job/measure.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "disk/io.h"

#define BLOCK_MIN ((uint64_t)4096) /* of copy.c, with the usual sparse size */
#define SCAN_BYTES ((size_t)MIB)

struct count {
    struct measure_in *out;
    uint64_t unit, block;
    uint64_t data_to;  /* units below are in out->data already */
    uint64_t next[64]; /* the same for pieces of each size, by index */
};

static void count_units(struct count *c, uint64_t from, uint64_t to) {
    from = max_u64(from - from % c->unit, c->data_to);
    to = div_up(to, c->unit) * c->unit;
    if (to > from)
        c->out->data += to - from;
    c->data_to = max_u64(c->data_to, to);
}

/* Blocks that [from, to) touches are written whole, as far as the disk goes. */
static void count_blocks(struct count *c, uint64_t from, uint64_t to) {
    from -= from % c->block;
    to = min_u64(div_up(to, c->block) * c->block, c->out->size);
    for (unsigned k = 0; k < 63 && from < to; k++) {
        uint64_t first = max_u64(from >> k, c->next[k]), last = (to - 1) >> k;
        if (last < first)
            continue;
        c->out->touched[k] += last - first + 1;
        c->next[k] = last + 1;
    }
}

/* The data in [from, to), as far as it is not zeros.  Pieces end where blocks do. */
static int scan_co(struct node *src, struct count *c, uint64_t from, uint64_t to, struct err *e) {
    uint8_t *buf = buf_get(SCAN_BYTES);
    int r = buf ? 0 : -ENOMEM;
    while (!r && from < to) {
        uint64_t n = min_u64(to - from, SCAN_BYTES - from % SCAN_BYTES);
        r = disk_pread_co(src, from, buf, n);
        for (uint64_t at = 0, m; !r && at < n; at += m) {
            m = min_u64(c->block - (from + at) % c->block, n - at);
            if (!bytes_are_zero(buf + at, m))
                count_blocks(c, from + at, from + at + m);
        }
        from += n;
    }
    buf_put(buf, SCAN_BYTES);
    return r < 0 ? err_errno(e, -r, "%s: reading at offset %" PRIu64, src->filename, from) : 0;
}

int measure_source_co(struct node *src, uint64_t unit, bool scan, struct measure_in *out,
                      struct err *e) {
    *out = (struct measure_in){.size = align_up(src->size, 512)};
    struct count c = {.out = out, .unit = unit, .block = max_u64(unit, BLOCK_MIN)};
    for (uint64_t at = 0; at < src->size;) {
        struct status st;
        int r = disk_status_co(src, at, src->size - at, STATUS_PRECISE, &st);
        if (r < 0)
            return err_errno(e, -r, "%s: reading the map at offset %" PRIu64, src->filename, at);
        if (!st.zero) {
            count_units(&c, at, at + st.length);
            if (!scan)
                count_blocks(&c, at, at + st.length);
            else if ((r = scan_co(src, &c, at, at + st.length, e)) < 0)
                return r;
        }
        at += st.length;
    }
    return 0;
}

void measure_plain(uint64_t size, bool full, struct measure_in *out) {
    *out = (struct measure_in){.size = align_up(size, 512)};
    struct count c = {.out = out, .unit = 1, .block = 1};
    if (!full)
        return;
    out->data = size;
    count_blocks(&c, 0, out->size);
}
