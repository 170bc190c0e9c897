/* SPDX-License-Identifier: MIT */
/*
 * VHDX: headers, and what goes through the log.
 *
 * Headers.  Each update goes to the header that does not count, and a barrier follows: a cut leaves
 * the other one.
 *
 * Log.  Our entries have one sector of descriptors and the pages behind it, 126 at most.  Entries
 * of one flush name its first as the tail, since the barrier in front of them has made stable what
 * earlier entries hold.  Where a log is too small for all pages of a flush, those that are in it go
 * in place and are made stable, and it begins again.  Nothing goes in place before the entry that
 * holds it is stable: a torn page is whole again after a replay.
 */
#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/crc32c.h"
#include "base/plant.h"
#include "disk/io.h"
#include "format/vhdx/vhdx.h"

#define PAGES_MAX 126u /* descriptors in one sector, behind the header of 64 bytes */
#define ENTRY_BYTES_MAX ((PAGES_MAX + 1) * VHDX_SECTOR)

int vhdx_header_update_co(struct vhdx *s) {
    struct vhdx_header h = s->h;
    int other = 1 - s->current;
    if (h.sequence == UINT64_MAX)
        return -EOVERFLOW;
    h.sequence++;
    uint8_t *buf = buf_get(VHDX_HEADER_BYTES);
    if (!buf)
        return -ENOMEM;
    vhdx_header_store(&h, buf);
    int r = disk_pwrite_co(s->file, VHDX_HEADER_AT(other), buf, VHDX_HEADER_BYTES);
    if (!r)
        r = disk_flush_co(s->file);
    buf_put(buf, VHDX_HEADER_BYTES);
    if (r < 0)
        return r;
    s->h = h;
    s->current = other;
    s->header_ok[other] = true;
    return 0;
}

/* Where the next log begins: not always at the front, so that entries run around the ring's end. */
static uint64_t first_head(const struct vhdx *s) {
    return s->h.sequence * 37 % (s->h.log_length / VHDX_SECTOR) * VHDX_SECTOR;
}

int vhdx_begin_co(struct vhdx *s) {
    int r = 0;
    if (s->begun)
        return 0;
    task_mutex_lock_co(&s->begin_lock);
    if (!s->begun) {
        if (vhdx_guid_random(&s->h.file_write) || vhdx_guid_random(&s->h.data_write) ||
            vhdx_guid_random(&s->h.log_guid))
            r = -EIO;
        if (PLANTED(VHDX_LOG_UNNAMED))
            memset(&s->h.log_guid, 0, sizeof(s->h.log_guid));
        for (int i = 0; !r && i < 2; i++)
            r = vhdx_header_update_co(s);
        if (!r) {
            s->log_head = first_head(s);
            s->log_used = 0;
            s->log_sequence = 1;
            s->begun = true;
            s->node->map_generation++;
        }
    }
    task_mutex_unlock(&s->begin_lock);
    return r;
}

int vhdx_end_co(struct vhdx *s) {
    if (!s->begun)
        return 0;
    int r = disk_flush_co(s->file);
    if (r < 0)
        return r;
    memset(&s->h.log_guid, 0, sizeof(s->h.log_guid));
    r = vhdx_header_update_co(s);
    if (r < 0)
        return r;
    s->begun = false;
    /* Room made ahead goes; entries of a log that still counts would miss it. */
    if (s->scanned && s->file->size > s->next)
        r = disk_resize_co(s->file, s->next, PREALLOC_OFF, NULL);
    return r;
}

/* ---------------------------------------------------------------- entries */

static int ring_write_co(struct vhdx *s, const uint8_t *buf, size_t length) {
    size_t first = (size_t)min_u64(length, s->h.log_length - s->log_head);
    int r = disk_pwrite_co(s->file, s->h.log_offset + s->log_head, buf, first);
    return r || first == length
               ? r
               : disk_pwrite_co(s->file, s->h.log_offset, buf + first, length - first);
}

/* Pages [from, from + count) of the batch as one entry in `buf`; its length. */
static uint32_t make_entry(const struct vhdx *s, const struct pages_batch *b, size_t from,
                           uint32_t count, uint8_t *buf) {
    uint32_t length = (count + 1) * VHDX_SECTOR, tail;
    tail = (uint32_t)((s->log_head + s->h.log_length - s->log_used) % s->h.log_length);
    memset(buf, 0, VHDX_SECTOR);
    memcpy(buf, "loge", 4);
    le32_store(buf + 8, length);
    le32_store(buf + 12, tail);
    le64_store(buf + 16, s->log_sequence);
    le32_store(buf + 24, count);
    memcpy(buf + 32, s->h.log_guid.b, 16);
    le64_store(buf + 48, align_down(s->stable_size, VHDX_SECTOR));
    le64_store(buf + 56, align_up(s->file->size, VHDX_MIB));
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *page = b->bytes + (from + i) * VHDX_SECTOR;
        uint8_t *d = buf + 64 + i * 32, *data = buf + (i + 1) * (size_t)VHDX_SECTOR;
        memcpy(d, "desc", 4);
        memcpy(d + 4, page + VHDX_SECTOR - 4, 4);
        memcpy(d + 8, page, 8);
        le64_store(d + 16, b->page[from + i]->host);
        le64_store(d + 24, s->log_sequence);
        memcpy(data, "data", 4);
        le32_store(data + 4, (uint32_t)(s->log_sequence >> 32));
        memcpy(data + 8, page + 8, VHDX_SECTOR - 12);
        le32_store(data + VHDX_SECTOR - 4, (uint32_t)s->log_sequence);
    }
    le32_store(buf + 4, crc32c(0, buf, length));
    return length;
}

/* What the log holds goes in place and is stable there: the log is empty. */
static int log_restart_co(struct vhdx *s, const struct pages_batch *b, size_t from, size_t to) {
    int r = disk_flush_co(s->file);
    for (size_t i = from; !r && i < to; i++)
        r = disk_pwrite_co(s->file, b->page[i]->host, b->bytes + i * VHDX_SECTOR, VHDX_SECTOR);
    if (!r)
        r = disk_flush_co(s->file);
    if (!r)
        s->log_used = 0;
    return r;
}

/* The whole batch is in the log, stable. */
static int log_pages_co(struct vhdx *s, const struct pages_batch *b) {
    uint8_t *buf = buf_get(ENTRY_BYTES_MAX);
    size_t kept = 0; /* pages before this one are in place already */
    int r = buf ? 0 : -ENOMEM;
    for (size_t i = 0; !r && i < b->count;) {
        uint32_t count = (uint32_t)min_u64(PAGES_MAX, b->count - i);
        uint32_t length = (count + 1) * VHDX_SECTOR;
        if (s->log_used + length + VHDX_SECTOR > s->h.log_length) {
            r = log_restart_co(s, b, kept, i);
            kept = i;
        }
        if (!r) {
            make_entry(s, b, i, count, buf);
            r = ring_write_co(s, buf, length);
        }
        if (!r) {
            s->log_head = (s->log_head + length) % s->h.log_length;
            s->log_used += length;
            s->log_sequence++;
            i += count;
        }
    }
    buf_put(buf, ENTRY_BYTES_MAX);
    return r || PLANTED(NO_LAST_BARRIER) ? r : disk_flush_co(s->file);
}

int vhdx_flush_co(struct node *n) {
    struct vhdx *s = vhdx_of(n);
    struct pages_batch b = {0};
    task_mutex_lock_co(&s->flush_lock);
    int r = pages_take(&s->pages, 0, &b);
    if (!r && b.count)
        r = vhdx_begin_co(s);
    uint64_t size = s->file->size; /* it may grow meanwhile, which the barrier does not cover */
    if (!r && !PLANTED(NO_BARRIER_BEFORE_TABLES))
        r = disk_flush_co(s->file);
    if (!r && b.count) {
        s->stable_size = size;
        s->log_used = 0;
        r = PLANTED(VHDX_NO_LOG) ? 0 : log_pages_co(s, &b);
    }
    if (r < 0 || !b.count)
        pages_give_back(&s->pages, &b);
    else
        r = pages_write_co(&s->pages, &b);
    task_mutex_unlock(&s->flush_lock);
    return r;
}
