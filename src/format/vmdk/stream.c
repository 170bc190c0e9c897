/* SPDX-License-Identifier: MIT */
/*
 * VMDK: writing streamOptimized files.
 *
 *      | header | descriptor | marker, code | marker, code ... | GT marker, GT ... | GD marker, GD
 * | | footer marker, footer | end of stream |
 *
 * A grain's marker (12 bytes: sector of the disk, length of the code) stands directly before its
 * code; the others are sectors of their own, and tell how many sectors of what follow.  The footer
 * is the header once more, which knows where the directory is; the header itself says "at the end".
 *
 * Grains are written once: a second time they would be there twice for whoever reads the stream
 * from its beginning.  They lie in the order of the writes.  Tables of grains that were written lie
 * in memory, and behind the grains when there are too many of them, or at a flush.
 *
 * Order.  A flush appends tables, directory and the rest, a barrier, and then one write of the
 * header makes the footer count.  Before the next grain the header names the last stable directory
 * itself, as such files may, stably; then the footer and the end are overwritten: whatever was
 * flushed can be found at any moment.  What was replaced stays in the file behind its marker, to be
 * passed over. A header that names no directory at all (0) has nothing behind it yet.
 *
 * Locks: table_lock is held over everything that moves `next` or the tables.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/plant.h"
#include "disk/io.h"
#include "format/vmdk/vmdk.h"

#define MARKER_BYTES 12u
#define DIRTY_MAX 256u           /* grain tables in memory: 512 KiB, 8 GiB of disk */
#define DIRECTORY_MAX (1u << 20) /* entries: 32 TiB of disk */

enum { MARKER_EOS, MARKER_GT, MARKER_GD, MARKER_FOOTER };

struct table {
    bool changed;
    uint8_t bytes[];
};

struct vmdk_stream {
    uint8_t *gd;          /* entries as on disk */
    struct table **table; /* by index; NULL: as `gd` says */
    uint64_t count;       /* of entries */
    uint32_t in_memory;
    uint64_t gd_at;      /* the directory on stable storage, 0: an empty one */
    uint64_t fresh_from; /* what lies behind reads as zeros until it is written */
    bool ended;          /* the header refers to the footer, which lies at `footer` */
    bool changed;
    uint64_t footer;
};

static uint64_t table_bytes(const struct vmdk_map *m) {
    return align_up((uint64_t)m->gt_entries * 4, VMDK_SECTOR);
}
static uint64_t directory_bytes(const struct vmdk_map *m) {
    return align_up(m->gd_entries * 4, VMDK_SECTOR);
}

void vmdk_stream_free(struct vmdk_map *m) {
    struct vmdk_stream *s = m->stream;
    if (!s)
        return;
    for (uint64_t i = 0; s->table && i < s->count; i++)
        free(s->table[i]);
    free(s->table);
    free(s->gd);
    free(s);
    m->stream = NULL;
}

static int header_write_co(struct vmdk_map *m, uint64_t gd) {
    uint8_t buf[VMDK_HEADER_BYTES];
    struct vmdk_header h = m->h;
    h.version = 3;
    h.flags = (h.flags | VMDK_NEWLINES) & ~(uint32_t)VMDK_REDUNDANT;
    h.rgd = 0;
    h.gd = gd;
    vmdk_header_store(&h, buf);
    int r = disk_pwrite_co(m->file, 0, buf, sizeof(buf));
    return r < 0 ? r : disk_flush_co(m->file);
}

/* ---------------------------------------------------------------- beginning */

static int load_directory_co(struct vmdk_map *m, struct vmdk_stream *s) {
    int r = m->gd ? disk_pread_co(m->file, m->gd, s->gd, m->gd_entries * 4) : 0;
    if (r < 0)
        return r;
    if (bytes_are_zero(s->gd, directory_bytes(m)))
        return 0;
    s->gd_at = m->gd;
    return 0;
}

int vmdk_stream_begin_co(struct vmdk_map *m) {
    if (m->stream)
        return 0;
    if (!(m->h.flags & VMDK_MARKERS) || m->gd_entries > DIRECTORY_MAX)
        return -ENOTSUP;
    struct vmdk_stream *s = calloc(1, sizeof(*s));
    if (!s)
        return -ENOMEM;
    s->count = m->gd_entries;
    s->gd = calloc(1, directory_bytes(m));
    s->table = calloc(s->count, sizeof(*s->table));
    int r = s->gd && s->table ? load_directory_co(m, s) : -ENOMEM;
    if (r < 0) {
        free(s->gd);
        free(s->table);
        free(s);
        return r;
    }
    uint64_t end = align_up(m->file->size, VMDK_SECTOR);
    s->ended = m->h.gd == VMDK_GD_AT_END;
    s->footer = s->ended ? m->file->size - 3 * VMDK_SECTOR : end;
    s->fresh_from = m->file->storage_flags & STORAGE_ZERO_INIT ? end : UINT64_MAX;
    m->next = s->gd_at ? s->footer : align_up(m->data_low, VMDK_SECTOR);
    m->scanned = true;
    m->stream = s;
    return 0;
}

/* Before anything behind the last directory changes. */
static int reopen_co(struct vmdk_map *m) {
    struct vmdk_stream *s = m->stream;
    if (!s->ended)
        return 0;
    int r = PLANTED(VMDK_FOOTER_OVERWRITTEN) ? 0 : header_write_co(m, s->gd_at / VMDK_SECTOR);
    if (!r)
        s->ended = false;
    return r;
}

/* ---------------------------------------------------------------- tables */

static int load_table_co(struct vmdk_map *m, uint64_t index, struct table **out) {
    struct vmdk_stream *s = m->stream;
    uint64_t host = (uint64_t)le32_load(s->gd + index * 4) * VMDK_SECTOR;
    struct table *t = calloc(1, sizeof(*t) + table_bytes(m));
    if (!t)
        return -ENOMEM;
    int r = host ? -EIO : 0;
    if (host && vmdk_inside(m, host, (uint64_t)m->gt_entries * 4))
        r = disk_pread_co(m->file, host, t->bytes, (size_t)m->gt_entries * 4);
    if (r < 0) {
        free(t);
        return r;
    }
    s->table[index] = t;
    s->in_memory++;
    *out = t;
    return 0;
}

int vmdk_stream_entry_co(struct vmdk_map *m, uint64_t at, uint32_t *entry, uint32_t *next,
                         bool *known) {
    struct vmdk_stream *s = m->stream;
    uint64_t index = at / m->covers, i = at % m->covers / m->grain_bytes;
    struct table *t = s->table[index];
    *next = 0;
    *known = t || le32_load(s->gd + index * 4);
    if (t) {
        *entry = le32_load(t->bytes + i * 4);
        if (i + 1 < m->gt_entries)
            *next = le32_load(t->bytes + (i + 1) * 4);
        return 0;
    }
    if (!*known)
        return 0;
    uint64_t host = (uint64_t)le32_load(s->gd + index * 4) * VMDK_SECTOR;
    struct page *page;
    uint8_t *p;
    uint32_t left;
    int r = vmdk_inside(m, host, (uint64_t)m->gt_entries * 4)
                ? vmdk_entry_co(m, host, i, VMDK_LEVEL_GT, &page, &p, &left)
                : -EIO;
    if (r < 0)
        return r;
    *entry = le32_load(p);
    *next = left > 1 ? le32_load(p + 4) : 0;
    return 0;
}

static int marker_write_co(struct vmdk_map *m, uint64_t at, uint64_t sectors, uint32_t type) {
    uint8_t buf[VMDK_SECTOR] = {0};
    le64_store(buf, sectors);
    le32_store(buf + 12, type);
    return disk_pwrite_co(m->file, at, buf, sizeof(buf));
}

/* A marker and what it announces, at `next`; *host: of the latter. */
static int append_co(struct vmdk_map *m, uint32_t type, const void *bytes, uint64_t length,
                     uint64_t *host) {
    int r = marker_write_co(m, m->next, length / VMDK_SECTOR, type);
    if (!r && (m->next + VMDK_SECTOR + length) / VMDK_SECTOR > UINT32_MAX)
        r = -EFBIG;
    *host = m->next + VMDK_SECTOR;
    if (!r)
        r = disk_pwrite_co(m->file, *host, bytes, length);
    if (!r)
        m->next = *host + length;
    return r;
}

/* All tables in memory go out, behind the grains. */
static int spill_co(struct vmdk_map *m) {
    struct vmdk_stream *s = m->stream;
    int r = 0;
    for (uint64_t i = 0; !r && s->in_memory && i < s->count; i++) {
        uint64_t host;
        struct table *t = s->table[i];
        if (!t)
            continue;
        if (t->changed && !(r = append_co(m, MARKER_GT, t->bytes, table_bytes(m), &host)))
            le32_store(s->gd + i * 4, (uint32_t)(host / VMDK_SECTOR));
        if (!r) {
            s->table[i] = NULL;
            s->in_memory--;
            free(t);
        }
    }
    return r;
}

/* ---------------------------------------------------------------- grains */

static int place_locked_co(struct vmdk_map *m, uint64_t at, uint32_t coded_length, uint64_t *host) {
    uint32_t entry = 0, next;
    bool known;
    int r = vmdk_stream_begin_co(m);
    if (!r)
        r = vmdk_stream_entry_co(m, at, &entry, &next, &known);
    if (!r && known && entry)
        r = -EPERM; /* written once */
    if (!r)
        r = reopen_co(m);
    if (!r && m->stream->in_memory >= DIRTY_MAX)
        r = spill_co(m);
    uint64_t end = align_up(m->next + MARKER_BYTES + coded_length, VMDK_SECTOR);
    if (!r && end / VMDK_SECTOR > UINT32_MAX)
        r = -EFBIG;
    if (r < 0)
        return r;
    *host = m->next + MARKER_BYTES;
    m->next = end;
    return 0;
}

int vmdk_stream_place_co(struct vmdk_map *m, uint64_t at, uint32_t coded_length, uint64_t *host) {
    task_mutex_lock_co(&m->table_lock);
    int r = place_locked_co(m, at, coded_length, host);
    task_mutex_unlock(&m->table_lock);
    return r;
}

/* The rest of the last sector, where something else may lie. */
static int pad_co(struct vmdk_map *m, uint64_t end) {
    static const uint8_t zeros[VMDK_SECTOR];
    uint64_t to = align_up(end, VMDK_SECTOR);
    return end < to && end < m->stream->fresh_from ? disk_pwrite_co(m->file, end, zeros, to - end)
                                                   : 0;
}

int vmdk_stream_publish_co(struct vmdk_map *m, uint64_t at, uint64_t host, uint32_t coded_length) {
    uint8_t marker[MARKER_BYTES];
    struct vmdk_stream *s = m->stream;
    uint64_t index = at / m->covers;
    le64_store(marker, at / VMDK_SECTOR);
    le32_store(marker + 8, coded_length);
    int r = disk_pwrite_co(m->file, host - MARKER_BYTES, marker, sizeof(marker));
    if (!r)
        r = pad_co(m, host + coded_length);
    if (r < 0)
        return r;
    task_mutex_lock_co(&m->table_lock);
    struct table *t = s->table[index];
    if (!t)
        r = load_table_co(m, index, &t);
    if (!r) {
        le32_store(t->bytes + at % m->covers / m->grain_bytes * 4,
                   (uint32_t)((host - MARKER_BYTES) / VMDK_SECTOR));
        t->changed = s->changed = true;
    }
    task_mutex_unlock(&m->table_lock);
    return r;
}

/* ---------------------------------------------------------------- the end */

static int finish_co(struct vmdk_map *m) {
    struct vmdk_stream *s = m->stream;
    uint8_t footer[VMDK_HEADER_BYTES];
    struct vmdk_header h = m->h;
    uint64_t gd, host;
    int r = reopen_co(m);
    if (!r)
        r = spill_co(m);
    if (!r)
        r = append_co(m, MARKER_GD, s->gd, directory_bytes(m), &gd);
    if (r < 0)
        return r;
    uint64_t at = m->next;
    h.version = 3;
    h.flags = (h.flags | VMDK_NEWLINES) & ~(uint32_t)VMDK_REDUNDANT;
    h.rgd = 0;
    h.gd = gd / VMDK_SECTOR;
    vmdk_header_store(&h, footer);
    r = append_co(m, MARKER_FOOTER, footer, sizeof(footer), &host);
    if (!r)
        r = marker_write_co(m, m->next, 0, MARKER_EOS);
    uint64_t end = m->next + VMDK_SECTOR;
    m->next = at; /* the next grain replaces the footer */
    if (!r && m->file->size > end)
        r = disk_resize_co(m->file, end, PREALLOC_OFF, NULL);
    if (!r && !PLANTED(NO_BARRIER_BEFORE_TABLES))
        r = disk_flush_co(m->file);
    if (!r)
        r = header_write_co(m, VMDK_GD_AT_END);
    if (r < 0)
        return r;
    s->changed = false;
    s->ended = true;
    s->gd_at = gd;
    s->footer = at;
    s->fresh_from = max_u64(s->fresh_from, end);
    return 0;
}

int vmdk_stream_flush_co(struct vmdk_map *m) {
    task_mutex_lock_co(&m->table_lock);
    int r = m->stream->changed ? finish_co(m) : disk_flush_co(m->file);
    task_mutex_unlock(&m->table_lock);
    return r;
}
