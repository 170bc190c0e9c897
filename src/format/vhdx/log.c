/* SPDX-License-Identifier: MIT */
/*
 * VHDX: reading a log, and what it changes.
 *
 *      ring of 4 KiB sectors | ... [entry: header, descriptors | data | data] [entry] ... |
 *
 * An entry is valid when its checksum, its GUID and all its sectors agree.  Valid entries that
 * follow each other in the ring with consecutive numbers make a run; the last of a run names the
 * run's oldest entry that still counts (its tail).  Of all runs that with the highest number is
 * active, and its entries from the tail on are applied in order.  No run at all: whoever opened the
 * image was stopped before anything reached the log, or in the middle of its first entry.
 *
 * Bounds.  Memory: one record for each sector that the active entries change, never more than the
 * log has sectors.  Work: every byte of the ring is looked at once, and checksums of entries that
 * turn out invalid are counted against SUM_BUDGET times the ring, so that entries which all claim
 * to be long cost no more than that.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/crc32c.h"
#include "disk/io.h"
#include "format/vhdx/vhdx.h"

#define PIECE ((uint32_t)MIB)
#define SUM_BUDGET 8
/* Ranges of zeros are looked through one by one when the log is only looked at. */
#define ZEROS_MAX 4096u

enum {
    ENTRY_HEADER = 64,
    DESCRIPTOR = 32,
    DATA_BYTES = 4084,
};

struct entry {
    uint64_t at; /* in the ring */
    uint32_t length, tail, descriptors;
    uint64_t sequence, flushed, last;
};

struct ring {
    struct vhdx *s;
    uint64_t length;
    uint64_t summed; /* bytes whose checksums were made in vain */
    uint8_t *buf;    /* PIECE */
    struct entry *v; /* valid ones, by their place */
    size_t count, cap;
};

/* `length` bytes of the ring from `at`, around its end. */
static int ring_read_co(struct ring *g, uint64_t at, void *buf, size_t length) {
    size_t first = (size_t)min_u64(length, g->length - at);
    int r = disk_pread_co(g->s->file, g->s->h.log_offset + at, buf, first);
    return r || first == length ? r
                                : disk_pread_co(g->s->file, g->s->h.log_offset,
                                                (uint8_t *)buf + first, length - first);
}

static uint32_t descriptor_sectors(uint32_t descriptors) {
    return (uint32_t)div_up(ENTRY_HEADER + (uint64_t)descriptors * DESCRIPTOR, VHDX_SECTOR);
}

/* Fields in range, nothing more. */
static bool entry_parse(const struct ring *g, const uint8_t *p, uint64_t at, struct entry *x) {
    *x = (struct entry){
        .at = at,
        .length = le32_load(p + 8),
        .tail = le32_load(p + 12),
        .sequence = le64_load(p + 16),
        .descriptors = le32_load(p + 24),
        .flushed = le64_load(p + 48),
        .last = le64_load(p + 56),
    };
    return !memcmp(p, "loge", 4) && !memcmp(p + 32, g->s->h.log_guid.b, 16) && x->sequence &&
           x->length && x->length % VHDX_SECTOR == 0 && x->length <= g->length &&
           x->tail % VHDX_SECTOR == 0 && x->tail < g->length &&
           x->descriptors <= x->length / DESCRIPTOR &&
           descriptor_sectors(x->descriptors) <= x->length / VHDX_SECTOR;
}

/* One piece of an entry: descriptors that say how much data follows, and data of the same write. */
static bool piece_is_right(const struct entry *x, const uint8_t *buf, uint64_t from,
                           uint32_t length, uint32_t *data) {
    uint32_t first_data = descriptor_sectors(x->descriptors);
    for (uint32_t i = 0; i < length / VHDX_SECTOR; i++) {
        uint32_t sector = (uint32_t)(from / VHDX_SECTOR) + i;
        const uint8_t *p = buf + (uint64_t)i * VHDX_SECTOR;
        if (sector >= first_data) {
            if (memcmp(p, "data", 4) || le32_load(p + 4) != x->sequence >> 32 ||
                le32_load(p + 4092) != (uint32_t)x->sequence)
                return false;
            continue;
        }
        uint32_t in = sector ? 0 : ENTRY_HEADER;
        uint32_t k = sector ? (VHDX_SECTOR - ENTRY_HEADER) / DESCRIPTOR +
                                  (sector - 1) * (VHDX_SECTOR / DESCRIPTOR)
                            : 0;
        for (; in < VHDX_SECTOR && k < x->descriptors; in += DESCRIPTOR, k++) {
            bool is_data = !memcmp(p + in, "desc", 4);
            if ((!is_data && memcmp(p + in, "zero", 4)) || le64_load(p + in + 24) != x->sequence)
                return false;
            *data += is_data;
        }
    }
    return true;
}

/* 1: valid, 0: not; -errno. */
static int entry_judge_co(struct ring *g, const struct entry *x) {
    static const uint8_t zeros[4];
    uint32_t sum = 0, stored = 0, data = 0;
    for (uint64_t done = 0; done < x->length;) {
        uint32_t n = (uint32_t)min_u64(PIECE, x->length - done);
        int r = ring_read_co(g, (x->at + done) % g->length, g->buf, n);
        if (r < 0)
            return r;
        if (!done) {
            stored = le32_load(g->buf + 4);
            memcpy(g->buf + 4, zeros, 4);
        }
        sum = crc32c(sum, g->buf, n);
        g->summed += n;
        if (!piece_is_right(x, g->buf, done, n, &data))
            return 0;
        done += n;
    }
    return sum == stored && x->length / VHDX_SECTOR == descriptor_sectors(x->descriptors) + data;
}

/* All valid entries of the ring. */
static int ring_scan_co(struct ring *g, struct err *e) {
    uint8_t sector[ENTRY_HEADER];
    for (uint64_t at = 0; at < g->length;) {
        struct entry x;
        int r = disk_pread_co(g->s->file, g->s->h.log_offset + at, sector, sizeof(sector));
        int valid = r < 0 ? r : 0;
        if (!r && entry_parse(g, sector, at, &x))
            valid = entry_judge_co(g, &x);
        if (valid < 0)
            return err_errno(e, -valid, "reading the log");
        if (g->summed > g->length * SUM_BUDGET)
            return err_set(e, EINVAL, "the log has many entries that are damaged and overlap");
        if (valid && g->count == g->cap) {
            size_t cap = g->cap ? g->cap * 2 : 64;
            struct entry *v = realloc(g->v, cap * sizeof(*v));
            if (!v)
                return err_set(e, ENOMEM, "no memory for the log");
            g->v = v;
            g->cap = cap;
        }
        if (valid) {
            g->v[g->count++] = x;
            g->summed -= x.length;
        }
        at += valid ? x.length : VHDX_SECTOR;
    }
    return 0;
}

static bool follows(const struct ring *g, const struct entry *a, const struct entry *b) {
    return (a->at + a->length) % g->length == b->at && a->sequence + 1 == b->sequence;
}

/*
 * The active run: *first and *count of its entries, which wrap around the array as they do around
 * the ring.  Count 0: none.
 */
static void ring_choose(const struct ring *g, size_t *first, size_t *count) {
    uint64_t best = 0;
    *first = *count = 0;
    for (size_t i = 0; i < g->count; i++) {
        const struct entry *head = &g->v[i];
        if (head->sequence <= best || follows(g, head, &g->v[(i + 1) % g->count]))
            continue; /* not the last of its run */
        size_t back = 0, at = i;
        while (g->v[at].at != head->tail && back + 1 < g->count) {
            size_t before = at ? at - 1 : g->count - 1;
            if (!follows(g, &g->v[before], &g->v[at]))
                break;
            at = before;
            back++;
        }
        if (g->v[at].at != head->tail)
            continue;
        best = head->sequence;
        *first = at;
        *count = back + 1;
    }
}

/* ---------------------------------------------------------------- changes */

static int add_change(struct vhdx_change **v, uint32_t *count, uint32_t *cap,
                      const struct vhdx_change *c) {
    if (*count == *cap) {
        uint32_t more = *cap ? *cap * 2 : 64;
        struct vhdx_change *n = realloc(*v, more * sizeof(*n));
        if (!n)
            return -ENOMEM;
        *v = n;
        *cap = more;
    }
    (*v)[(*count)++] = *c;
    return 0;
}

/* The headers and the log itself are not changed through the log, nor anything behind `last`. */
static int check_change(const struct vhdx *s, const struct vhdx_change *c, uint64_t last,
                        struct err *e) {
    if (c->offset % VHDX_SECTOR || c->length % VHDX_SECTOR || c->offset < VHDX_REGIONS_AT(0) ||
        c->offset > last || c->length > last - c->offset ||
        ranges_overlap(c->offset, c->length, s->h.log_offset, s->h.log_length))
        return err_set(e, EINVAL,
                       "the log changes %" PRIu64 " bytes at %" PRIu64
                       ", which is unaligned, in a header or the log, or behind the file's end "
                       "(%" PRIu64 ")",
                       c->length, c->offset, last);
    return 0;
}

static int take_descriptor(struct ring *g, const uint8_t *p, uint64_t *data_at,
                           struct vhdx_replay *out, struct err *e) {
    bool data = !memcmp(p, "desc", 4);
    struct vhdx_change c = {.offset = le64_load(p + 16),
                            .order = out->data_count + out->zero_count,
                            .length = data ? VHDX_SECTOR : le64_load(p + 8)};
    int r = c.length ? check_change(g->s, &c, out->last, e) : 0;
    if (r || !c.length)
        return r;
    if (data) {
        c.log_at = *data_at % g->length;
        c.trailing = le32_load(p + 4);
        c.leading = le64_load(p + 8);
        *data_at += VHDX_SECTOR;
        r = add_change(&out->data, &out->data_count, &out->data_cap, &c);
    } else if (out->zero_count == ZEROS_MAX) {
        return err_set(e, EINVAL, "the log zeroes more than %u ranges", ZEROS_MAX);
    } else {
        r = add_change(&out->zero, &out->zero_count, &out->zero_cap, &c);
    }
    return r < 0 ? err_set(e, ENOMEM, "no memory for the log") : 0;
}

static int take_entry_co(struct ring *g, const struct entry *x, struct vhdx_replay *out,
                         struct err *e) {
    uint64_t data_at = x->at + (uint64_t)descriptor_sectors(x->descriptors) * VHDX_SECTOR;
    uint64_t from = ENTRY_HEADER, left = (uint64_t)x->descriptors * DESCRIPTOR;
    int r = 0;
    out->entries++;
    while (!r && left) {
        uint32_t n = (uint32_t)min_u64(PIECE, left);
        r = ring_read_co(g, (x->at + from) % g->length, g->buf, n);
        if (r < 0)
            return err_errno(e, -r, "reading the log");
        for (uint32_t i = 0; !r && i < n; i += DESCRIPTOR)
            r = take_descriptor(g, g->buf + i, &data_at, out, e);
        from += n;
        left -= n;
    }
    return r;
}

static int by_offset(const void *a, const void *b) {
    const struct vhdx_change *x = a, *y = b;
    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    return x->order < y->order ? -1 : x->order > y->order;
}

int vhdx_log_read_co(struct vhdx *s, struct vhdx_replay *out, struct err *e) {
    struct ring g = {.s = s, .length = s->h.log_length, .buf = buf_get(PIECE)};
    size_t first, count;
    *out = (struct vhdx_replay){0};
    if (s->h.log_offset + g.length > s->file->size) {
        buf_put(g.buf, PIECE);
        return err_set(e, EINVAL,
                       "the log (%" PRIu64 " bytes at %" PRIu64
                       ") reaches behind the end of the file (%" PRIu64 " bytes)",
                       g.length, s->h.log_offset, s->file->size);
    }
    int r = g.buf ? ring_scan_co(&g, e) : err_set(e, ENOMEM, "no memory for the log");
    ring_choose(&g, &first, &count);
    if (!r && count) {
        const struct entry *head = &g.v[(first + count - 1) % g.count];
        out->flushed = head->flushed;
        out->last = head->last;
        if (out->flushed > s->file->size)
            r = err_set(e, EINVAL,
                        "the file has %" PRIu64 " bytes, and had %" PRIu64
                        " when its log was written: it has been cut",
                        s->file->size, out->flushed);
        else if (out->last > VHDX_FILE_MAX)
            r = err_set(e, EINVAL, "the log makes the file %" PRIu64 " bytes long", out->last);
        out->last = align_up(max_u64(out->last, s->file->size), VHDX_MIB);
    }
    for (size_t i = 0; !r && i < count; i++)
        r = take_entry_co(&g, &g.v[(first + i) % g.count], out, e);
    free(g.v);
    buf_put(g.buf, PIECE);
    if (r)
        vhdx_replay_free(out);
    else if (out->data_count)
        qsort(out->data, out->data_count, sizeof(*out->data), by_offset);
    return r;
}

void vhdx_replay_free(struct vhdx_replay *p) {
    free(p->data);
    free(p->zero);
    *p = (struct vhdx_replay){0};
}

/* ---------------------------------------------------------------- use of it */

/* The sector as it is to be in the file. */
static int change_data_co(struct vhdx *s, const struct vhdx_change *c, uint8_t *sector) {
    int r = disk_pread_co(s->file, s->h.log_offset + c->log_at, sector, VHDX_SECTOR);
    le64_store(sector, c->leading);
    le32_store(sector + 8 + DATA_BYTES, c->trailing);
    return r;
}

/* Changes in their order: data is sorted by place, so each piece of it is the last of its place. */
int vhdx_log_apply_co(struct vhdx *s, const struct vhdx_replay *p, struct err *e) {
    uint8_t *sector = buf_get(VHDX_SECTOR);
    int r = sector ? 0 : -ENOMEM;
    if (!r && p->last > s->file->size)
        r = disk_resize_co(s->file, p->last, PREALLOC_OFF, NULL);
    for (uint32_t i = 0; !r && i < p->zero_count; i++)
        r = disk_zero_co(s->file, p->zero[i].offset, p->zero[i].length, ZERO_MAY_UNMAP);
    for (uint32_t i = 0; !r && i < p->data_count; i++) {
        const struct vhdx_change *c = &p->data[i];
        if (i + 1 < p->data_count && c[1].offset == c->offset)
            continue;
        bool zeroed = false; /* later */
        for (uint32_t k = p->zero_count; !zeroed && k-- && p->zero[k].order > c->order;)
            zeroed = ranges_overlap(c->offset, 1, p->zero[k].offset, p->zero[k].length);
        if (!zeroed && !(r = change_data_co(s, c, sector)))
            r = disk_pwrite_co(s->file, c->offset, sector, VHDX_SECTOR);
    }
    if (!r)
        r = disk_flush_co(s->file);
    buf_put(sector, VHDX_SECTOR);
    return r < 0 ? err_errno(e, -r, "replaying the log") : 0;
}

/* The first record at or behind `offset`. */
static uint32_t find_data(const struct vhdx_replay *p, uint64_t offset) {
    uint32_t low = 0, high = p->data_count;
    while (low < high) {
        uint32_t mid = low + (high - low) / 2;
        if (p->data[mid].offset < offset)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

bool vhdx_replay_touches(const struct vhdx_replay *p, uint64_t offset, uint64_t length) {
    uint32_t i = find_data(p, align_down(offset, VHDX_SECTOR));
    if (i < p->data_count && p->data[i].offset < offset + length)
        return true;
    for (i = 0; i < p->zero_count; i++)
        if (ranges_overlap(offset, length, p->zero[i].offset, p->zero[i].length))
            return true;
    return false;
}

/* Bytes of one sector of the file, [offset, +length), as the log leaves them. */
static int patch_sector_co(struct vhdx *s, uint64_t offset, uint8_t *buf, size_t length) {
    const struct vhdx_replay *p = &s->replay;
    uint64_t base = align_down(offset, VHDX_SECTOR);
    const struct vhdx_change *data = NULL, *zero = NULL;
    uint32_t i = find_data(p, base);
    for (; i < p->data_count && p->data[i].offset == base; i++)
        data = &p->data[i];
    for (i = p->zero_count; !zero && i--;)
        if (ranges_overlap(base, 1, p->zero[i].offset, p->zero[i].length))
            zero = &p->zero[i];
    if (zero && (!data || zero->order > data->order)) {
        memset(buf, 0, length);
    } else if (data) {
        uint8_t *sector = buf_get(VHDX_SECTOR);
        int r = sector ? change_data_co(s, data, sector) : -ENOMEM;
        if (!r)
            memcpy(buf, sector + (offset - base), length);
        buf_put(sector, VHDX_SECTOR);
        return r;
    }
    return 0;
}

int vhdx_read_co(struct vhdx *s, uint64_t offset, void *buf, size_t length) {
    int r = disk_pread_co(s->file, offset, buf, length);
    if (!s->replay.data_count && !s->replay.zero_count)
        return r;
    for (size_t done = 0; !r && done < length;) {
        uint64_t at = offset + done;
        size_t n = (size_t)min_u64(length - done, VHDX_SECTOR - at % VHDX_SECTOR);
        r = patch_sector_co(s, at, (uint8_t *)buf + done, n);
        done += n;
    }
    return r;
}
