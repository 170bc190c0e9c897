/* SPDX-License-Identifier: MIT */
/*
 * VDI: check -r.
 *
 * Errors.  Entries that name nothing in the file become free, stably, before the file grows (else
 * they would name what is put there).  The count reaches the last named block.  Of several entries
 * that name one block all but the first get a copy in an unused place.
 *
 * Leaks.  N blocks are named, so the first N places are enough: blocks behind are copied to unused
 * places among them, the entries follow, the count becomes N and the file ends there.  A place that
 * a block has left is never used again, so nothing is overwritten that an older map on storage
 * names.
 */
#include <errno.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/plant.h"
#include "disk/io.h"
#include "format/repair.h"
#include "format/seen.h"
#include "format/vdi/vdi.h"

#define PIECE ((uint32_t)MIB)

uint32_t vdi_blocks_in_file(const struct vdi *s) {
    uint64_t room = s->file->size > s->h.data_offset ? s->file->size - s->h.data_offset : 0;
    return (uint32_t)min_u64(div_up(room, (uint64_t)s->h.block_size + s->h.extra), VDI_BLOCKS_MAX);
}

struct mend {
    struct vdi *s;
    struct seen named; /* places that entries name */
    struct seen met;   /* errors: those whose first entry has been passed */
    uint32_t in_file;  /* blocks, before anything was changed */
    uint32_t keep;     /* how many places are named */
    uint32_t highest;  /* one above the last of them */
    uint64_t place;    /* none below is unused */
};

static int clear_outside_co(struct mend *m, uint8_t *at) {
    uint32_t index = le32_load(at);
    if (index >= VDI_ZERO || (index < m->in_file && vdi_block_is_sane(m->s, index)))
        return 0;
    le32_store(at, VDI_FREE);
    return 1;
}

static uint64_t block_start(const struct vdi *s, uint32_t index) {
    return vdi_host(&s->h, index) - s->h.extra;
}

static int move_co(struct mend *m, uint8_t *at, uint32_t to) {
    struct vdi *s = m->s;
    int r = repair_copy_co(s->file, block_start(s, le32_load(at)), block_start(s, to),
                           (uint64_t)s->h.extra + s->h.block_size);
    le32_store(at, to);
    return r < 0 ? r : 1;
}

static int note_co(struct mend *m, uint8_t *at) {
    uint32_t index = le32_load(at);
    int met = index >= VDI_ZERO ? 0 : seen_add(&m->named, index);
    if (index < VDI_ZERO && !met) {
        m->keep++;
        m->highest = (uint32_t)max_u64(m->highest, index + 1);
    }
    return met < 0 ? met : 0;
}

/* To the first unused place below `end`. */
static int move_below_co(struct mend *m, uint8_t *at, uint32_t end) {
    uint64_t to = seen_find_free(&m->named, m->place, end, 1);
    if (to >= end)
        return -EIO; /* there are as many places as entries: the map has changed meanwhile */
    int r = seen_add(&m->named, to);
    m->place = to + 1;
    m->s->next = (uint32_t)max_u64(m->s->next, to + 1);
    return r < 0 ? r : move_co(m, at, (uint32_t)to);
}

/* The header cannot count a place behind the number of blocks. */
static int part_co(struct mend *m, uint8_t *at) {
    uint32_t index = le32_load(at);
    int met = index >= VDI_ZERO ? 0 : seen_add(&m->met, index);
    if (met < 0 || index >= VDI_ZERO || (!met && index < m->s->h.blocks))
        return met < 0 ? met : 0;
    return move_below_co(m, at, m->s->h.blocks);
}

static int draw_near_co(struct mend *m, uint8_t *at) {
    uint32_t index = le32_load(at);
    return index >= VDI_ZERO || index < m->keep ? 0 : move_below_co(m, at, m->keep);
}

/* Does that to each entry (1: it has changed).  Copies are stable, and counted, before a piece
 * names them. */
static int each_entry_co(struct mend *m, int (*entry_co)(struct mend *m, uint8_t *at)) {
    struct vdi *s = m->s;
    uint8_t *buf = buf_get(PIECE);
    int r = buf ? 0 : -ENOMEM;
    for (uint32_t block = 0; !r && block < s->h.blocks; block += PIECE / 4) {
        uint32_t count = (uint32_t)min_u64(PIECE / 4, s->h.blocks - block);
        uint64_t host = s->h.map_offset + (uint64_t)block * 4;
        bool changed = false;
        r = disk_pread_co(s->file, host, buf, count * 4);
        for (uint32_t i = 0; r >= 0 && i < count; i++) {
            r = entry_co(m, buf + i * 4);
            changed |= r > 0;
        }
        r = r > 0 ? 0 : r;
        if (!r && changed && s->next > s->stored_count)
            r = vdi_write_count_co(s, s->next);
        if (!r && changed && !PLANTED(MOVED_DATA_LATE))
            r = disk_flush_co(s->file);
        if (!r && changed)
            r = disk_pwrite_co(s->file, host, buf, count * 4);
    }
    buf_put(buf, PIECE);
    return r < 0 ? r : disk_flush_co(s->file);
}

static int mended(struct mend *m, int r, struct err *e) {
    struct vdi *s = m->s;
    seen_free(&m->named);
    seen_free(&m->met);
    s->scanned = false;
    if (!r)
        r = pages_forget_all(&s->pages);
    return r < 0 ? err_errno(e, -r, "repairing the block map") : 0;
}

int vdi_repair_errors_co(struct node *n, struct err *e) {
    struct vdi *s = vdi_of(n);
    struct mend m = {.s = s, .in_file = vdi_blocks_in_file(s)};
    int r = each_entry_co(&m, clear_outside_co);
    if (!r)
        r = seen_init(&m.named, VDI_BLOCKS_MAX);
    if (!r)
        r = seen_init(&m.met, VDI_BLOCKS_MAX);
    if (!r)
        r = each_entry_co(&m, note_co);
    s->next = (uint32_t)min_u64(m.highest, s->h.blocks);
    if (!r && s->next > s->h.allocated)
        r = vdi_write_count_co(s, s->next);
    if (!r)
        r = each_entry_co(&m, part_co);
    return mended(&m, r, e);
}

int vdi_repair_leaks_co(struct node *n, struct err *e) {
    struct vdi *s = vdi_of(n);
    struct mend m = {.s = s};
    int r = seen_init(&m.named, VDI_BLOCKS_MAX);
    if (!r)
        r = each_entry_co(&m, note_co);
    s->next = 0; /* nothing is taken behind the count */
    if (!r)
        r = each_entry_co(&m, draw_near_co);
    if (!r) {
        le32_store(s->header + VDI_AT_ALLOCATED, m.keep);
        s->stored_count = s->h.allocated = m.keep;
        r = vdi_write_count_co(s, m.keep);
    }
    if (!r)
        r = disk_flush_co(s->file);
    uint64_t end = m.keep ? block_start(s, m.keep) : s->h.data_offset;
    if (!r && s->file->size > end)
        r = disk_resize_co(s->file, end, PREALLOC_OFF, NULL);
    return mended(&m, r, e);
}
