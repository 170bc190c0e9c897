/* SPDX-License-Identifier: MIT */
/*
 * VDI: check.  Each block is named once, lies in the file, and is counted by the header.
 *
 * A count above the names is unused room (a leak); a count that does not reach a named block is
 * damage: the next writer that trusts it would write over the block.
 */
#include <errno.h>
#include <inttypes.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"
#include "format/problem.h"
#include "format/repair.h"
#include "format/seen.h"
#include "format/vdi/vdi.h"

#define PIECE ((uint32_t)MIB)

struct walk {
    struct vdi *s;
    struct check_result *r;
    struct seen seen; /* blocks that the file holds */
    uint32_t highest; /* one above the highest index named */
};

static int check_entry(struct walk *w, uint32_t block, uint32_t index) {
    if (index >= VDI_ZERO)
        return 0;
    if (!vdi_block_is_sane(w->s, index) || index >= w->seen.units) {
        problem_corruption(w->r,
                           "map entry %" PRIu32 " names block %" PRIu32 ", the file holds %" PRIu64,
                           block, index, w->seen.units);
        return 0;
    }
    int met = seen_add(&w->seen, index);
    if (met < 0)
        return met;
    if (met) {
        problem_corruption(
            w->r, "map entry %" PRIu32 " names block %" PRIu32 ", which another entry names too",
            block, index);
        return 0;
    }
    w->r->allocated_clusters++;
    if (index + 1 > w->highest)
        w->highest = index + 1;
    return 0;
}

static int walk_map_co(struct walk *w) {
    const struct vdi_header *h = &w->s->h;
    uint8_t *buf = buf_get(PIECE);
    int r = buf ? 0 : -ENOMEM;
    for (uint32_t block = 0; !r && block < h->blocks;) {
        uint32_t count = (uint32_t)min_u64(PIECE / 4, h->blocks - block);
        r = disk_pread_co(w->s->file, h->map_offset + (uint64_t)block * 4, buf, count * 4);
        for (uint32_t i = 0; !r && i < count; i++)
            r = check_entry(w, block + i, le32_load(buf + i * 4));
        block += count;
        if (w->r->progress)
            w->r->progress(w->r->arg, block, h->blocks);
    }
    buf_put(buf, PIECE);
    return r;
}

static int look_co(struct node *n, struct check_result *r, struct err *e) {
    struct vdi *s = vdi_of(n);
    struct walk w = {.s = s, .r = r};
    int rc = seen_init(&w.seen, vdi_blocks_in_file(s));
    if (!rc)
        rc = walk_map_co(&w);
    seen_free(&w.seen);
    if (rc < 0)
        return err_errno(e, -rc, "reading the block map");
    r->total_clusters = s->h.blocks;
    r->image_end_offset = s->h.data_offset + (uint64_t)w.highest * (s->h.block_size + s->h.extra);
    if (s->h.allocated < w.highest) {
        problem_corruption(r,
                           "the header counts %" PRIu32 " blocks, and block %" PRIu32 " is in use",
                           s->h.allocated, w.highest - 1);
    } else if (s->h.allocated > r->allocated_clusters) {
        uint64_t unused = s->h.allocated - r->allocated_clusters;
        problem_leaks(r, unused, "%" PRIu64 " of %" PRIu32 " blocks are not in use", unused,
                      s->h.allocated);
    }
    return 0;
}

int vdi_check_co(struct node *n, struct check_result *r, struct err *e) {
    static const struct repair_ops ops = {look_co, vdi_repair_errors_co, vdi_repair_leaks_co};
    return repair_run_co(n, &ops, r, e);
}
