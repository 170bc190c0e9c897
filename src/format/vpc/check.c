/* SPDX-License-Identifier: MIT */
/*
 * VHD: check.  Each block lies in the file, behind the tables, and overlaps no other; the footer
 * stands at the end and agrees with its copy.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"
#include "format/problem.h"
#include "format/vpc/vpc.h"

#define PIECE ((uint32_t)MIB)

static int by_sector(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

/* The sectors of all blocks, as far as they lie in the file. */
static int read_entries_co(struct vpc *s, struct check_result *r, uint32_t *sectors,
                           uint64_t *count) {
    uint64_t blocks = div_up(s->node->size, s->h.block_size);
    uint64_t room = s->file->size;
    uint8_t *buf = buf_get(PIECE);
    int rc = buf ? 0 : -ENOMEM;
    for (uint64_t block = 0; !rc && block < blocks;) {
        uint32_t n = (uint32_t)min_u64(PIECE / 4, blocks - block);
        rc = disk_pread_co(s->file, s->h.bat_offset + block * 4, buf, n * 4);
        for (uint32_t i = 0; !rc && i < n; i++) {
            uint32_t entry = be32_load(buf + i * 4);
            uint64_t at = (uint64_t)entry * VPC_SECTOR;
            if (entry == VPC_UNUSED)
                continue;
            if (!entry || at + s->bitmap_bytes >= room) {
                problem_corruption(r,
                                   "entry %" PRIu64 " names a block at %" PRIu64
                                   ", which the file (%" PRIu64 " bytes) does not hold",
                                   block + i, at, room);
                continue;
            }
            sectors[(*count)++] = entry;
        }
        block += n;
        if (r->progress)
            r->progress(r->arg, block, blocks);
    }
    buf_put(buf, PIECE);
    return rc;
}

static void check_overlaps(struct vpc *s, struct check_result *r, uint32_t *sectors,
                           uint64_t count) {
    uint64_t length = (s->bitmap_bytes + (uint64_t)s->h.block_size) / VPC_SECTOR;
    uint64_t bat = s->h.bat_offset / VPC_SECTOR;
    uint64_t bat_length = div_up((uint64_t)s->h.entries * 4, VPC_SECTOR), used = 0;
    qsort(sectors, count, sizeof(*sectors), by_sector);
    for (uint64_t i = 0; i < count; i++) {
        if (i && sectors[i] < sectors[i - 1] + length) {
            problem_corruption(r, "the block at %" PRIu64 " overlaps the one before",
                               (uint64_t)sectors[i] * VPC_SECTOR);
        }
        if (sectors[i] < 3 || ranges_overlap(sectors[i], length, bat, bat_length)) {
            problem_corruption(r, "the block at %" PRIu64 " overlaps a header or the table",
                               (uint64_t)sectors[i] * VPC_SECTOR);
        }
        used = max_u64(used, (sectors[i] + length) * VPC_SECTOR);
    }
    r->allocated_clusters = count;
    r->image_end_offset = max_u64(used, (bat + bat_length) * VPC_SECTOR) + VPC_FOOTER_BYTES;
}

static int check_footer_co(struct vpc *s, struct check_result *r) {
    uint8_t buf[VPC_FOOTER_BYTES];
    if (s->file->size < VPC_FOOTER_BYTES)
        return 0;
    int rc = disk_pread_co(s->file, s->file->size - VPC_FOOTER_BYTES, buf, sizeof(buf));
    if (rc)
        return rc;
    if (memcmp(buf, s->footer, sizeof(buf))) {
        problem_leaks(r, 1,
                      "the footer at the end is missing or differs from its copy in front; the "
                      "next write puts it right");
    }
    return 0;
}

int vpc_check_co(struct node *n, struct check_result *r, struct err *e) {
    struct vpc *s = vpc_of(n);
    if (s->fixed) {
        r->image_end_offset = n->size + VPC_FOOTER_BYTES;
        return 0;
    }
    uint64_t blocks = div_up(n->size, s->h.block_size), count = 0;
    uint32_t *sectors = malloc((blocks + 1) * sizeof(*sectors));
    int rc = sectors ? read_entries_co(s, r, sectors, &count) : -ENOMEM;
    if (!rc) {
        check_overlaps(s, r, sectors, count);
        rc = check_footer_co(s, r);
    }
    free(sectors);
    r->total_clusters = blocks;
    return rc < 0 ? err_errno(e, -rc, "reading the block allocation table") : 0;
}
