/* SPDX-License-Identifier: MIT */
/*
 * Growth, shrinking, and room given ahead of writes.
 *
 * Growth has two steps, with the engine between them, which makes zeros of what lies behind the old
 * end.  Each takes effect on storage by one write of the header fields that stand side by side
 * (size, L1 entries, L1 offset); before it everything that it names is on stable storage.
 *
 * reach: the L1 table covers the new size, the disk keeps the old one.  Entries behind the end of
 * the disk are allowed, and whoever opens the image sees none of them.
 *  - The L1 table has room behind its last entry, in its last cluster: the new entries are written
 *    as zeros there (nobody reads them yet), then the header.
 *  - Else a new table is allocated in one piece and written whole; when the header names it, the
 * old one's clusters are given back.
 *
 * resize: the new size.
 *
 * Shrinking drops what lies behind the new end and makes that durable, and then writes the new
 * size; so growing again later never brings old data back.  A crash in between leaves the old size
 * with the part that was to be lost lost.  Over a layer below, whose content would come to light
 * there, the size is written first; what a crash then leaves behind the end, growth makes zeros
 * of.  The L1 table keeps its length: entries behind the end are empty and allowed.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/plant.h"
#include "disk/io.h"
#include "format/qcow2/qcow2.h"

static int barrier_co(struct qcow2 *s) {
    return qcow2_ordered(s) ? disk_flush_co(s->file) : 0;
}

static int write_size_co(struct qcow2 *s, uint64_t size, uint32_t entries, uint64_t l1_offset) {
    uint8_t field[24];
    be64_store(field, size);
    be32_store(field + 8, s->h.crypt_method);
    be32_store(field + 12, entries);
    be64_store(field + 16, l1_offset);
    int r = disk_pwrite_co(s->file, QCOW2_HEADER_SIZE_AT, field, sizeof(field));
    return r ? r : barrier_co(s);
}

/* Larger arrays in memory; the new entries are empty. */
static int grow_arrays(struct qcow2 *s, uint32_t entries) {
    uint64_t *l1 = realloc(s->l1, (size_t)max_u64(entries, 1) * 8);
    if (!l1)
        return -ENOMEM;
    s->l1 = l1;
    memset(l1 + s->l1_entries, 0, (size_t)(entries - s->l1_entries) * 8);
    size_t old_words = div_up(s->l1_entries, 64), words = div_up(entries, 64);
    uint64_t *dirty = realloc(s->l1_dirty, max_u64(words, 1) * 8);
    if (!dirty)
        return -ENOMEM;
    s->l1_dirty = dirty;
    memset(dirty + old_words, 0, (words - old_words) * 8);
    return 0;
}

/* Nothing is dirty: storage has all that the table names. */
static int grow_l1_co(struct qcow2 *s, uint32_t entries) {
    uint64_t old_host = s->h.l1_table_offset, host = old_host, got;
    uint64_t old_bytes = (uint64_t)s->l1_entries * 8, bytes = (uint64_t)entries * 8;
    uint64_t old_clusters = qcow2_clusters_for(s, old_bytes);
    uint64_t clusters = qcow2_clusters_for(s, bytes);
    bool moved = clusters > old_clusters, virgin;
    int r = grow_arrays(s, entries);
    if (r < 0)
        return r;
    if (moved) {
        r = qcow2_alloc_co(s, clusters, true, &host, &got, &virgin);
        if (r < 0)
            return r;
        r = qcow2_table_write_co(s, host, s->l1, entries, clusters << s->cluster_bits);
    } else if (bytes > old_bytes) {
        r = disk_zero_co(s->file, host + old_bytes, bytes - old_bytes, 0);
    }
    if (!r)
        r = qcow2_meta_add(s, host, bytes);
    /* The new table's clusters are counted on storage before the header names it. */
    if (!r && !PLANTED(RESIZE_NAMES_L1_EARLY))
        r = qcow2_flush_co(s->node);
    bool named = !r;
    if (named)
        r = write_size_co(s, s->h.size, entries, host);
    if (r < 0) {
        /* Which table the header names now is not known: the old one again, and both stay. */
        if (named)
            write_size_co(s, s->h.size, s->h.l1_size, old_host);
        if (moved && !named) {
            qcow2_meta_remove(s, host, bytes);
            qcow2_release_co(s, qcow2_cluster_index(s, host), clusters);
        }
        return r;
    }
    s->h.l1_table_offset = host;
    s->h.l1_size = s->l1_entries = entries;
    if (moved && old_clusters) {
        qcow2_meta_remove(s, old_host, old_bytes);
        qcow2_release_co(s, qcow2_cluster_index(s, old_host), old_clusters);
    }
    return 0;
}

int qcow2_resize_check(const struct qcow2 *s, uint64_t size, uint32_t version, struct err *e) {
    if (!s->data) /* left closed */
        return err_set(e, EINVAL, "the data file changes its size too, and is not open");
    uint64_t entries = qcow2_l1_entries_for(s->cluster_bits, qcow2_header_extended(&s->h), size);
    if (entries > QCOW2_L1_BYTES_MAX / 8)
        return err_set(e, EFBIG,
                       "size %" PRIu64 " needs an L1 table of %" PRIu64
                       " entries; with clusters of %" PRIu32 " bytes the limit is %d",
                       size, entries, s->cluster_size, QCOW2_L1_BYTES_MAX / 8);
    if (version < 3 && s->h.nb_snapshots)
        return err_set(e, ENOTSUP,
                       "a version 2 image with internal snapshots cannot change its size");
    return 0;
}

/* The data file is as long as the disk where it must be read alone, else at least that long. */
static int resize_data_co(struct qcow2 *s, uint64_t size, int prealloc, struct err *e) {
    if (!qcow2_data_apart(s) || s->data->size == size)
        return 0;
    if (s->data->size > size && !qcow2_data_raw(s) && size > s->h.size)
        return 0;
    int r =
        disk_resize_co(s->data, size, prealloc == PREALLOC_METADATA ? PREALLOC_OFF : prealloc, e);
    if (!r && qcow2_ordered(s) && (r = disk_flush_co(s->data)) < 0)
        err_errno(e, -r, "flushing");
    return r < 0 ? err_prefix(e, "data file") : 0;
}

static int shrink_co(struct qcow2 *s, uint64_t size, struct err *e) {
    uint64_t old = s->h.size;
    bool size_first = qcow2_has_backing(s) && !PLANTED(SHRINK_SHOWS_BACKING);
    int r = 0;
    if (size_first) {
        r = write_size_co(s, size, s->l1_entries, s->h.l1_table_offset);
        if (!r)
            s->h.size = s->node->size = size;
    }
    if (!r)
        r = qcow2_cut_co(s, size);
    if (!r)
        r = qcow2_writeback_all_co(s);
    if (!r && !size_first)
        r = write_size_co(s, size, s->l1_entries, s->h.l1_table_offset);
    if (r < 0)
        return err_errno(e, -r, "shrinking the disk from %" PRIu64 " to %" PRIu64, old, size);
    s->h.size = s->node->size = size;
    r = resize_data_co(s, size, PREALLOC_OFF, e);
    return r ? r : qcow2_trim_file_co(s);
}

int qcow2_reach_co(struct node *n, uint64_t size, struct err *e) {
    struct qcow2 *s = qcow2_of(n);
    uint64_t entries = qcow2_l1_entries_for(s->cluster_bits, qcow2_header_extended(&s->h), size);
    int r = qcow2_resize_check(s, align_up(size, 512), s->h.version, e);
    if (r < 0 || entries <= s->l1_entries)
        return r;
    r = qcow2_writeback_all_co(s);
    if (!r)
        r = grow_l1_co(s, (uint32_t)entries);
    return r < 0 ? err_errno(e, -r, "making the L1 table larger for %" PRIu64 " bytes", size) : 0;
}

/* Where the first L2 table behind those of the disk maps. */
uint64_t qcow2_vm_state_at(const struct node *n) {
    const struct qcow2 *s = n->state;
    uint64_t tables =
        qcow2_l1_entries_for(s->cluster_bits, qcow2_header_extended(&s->h), s->h.size);
    return tables << (s->cluster_bits + s->l2_bits);
}

int qcow2_resize_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    struct qcow2 *s = qcow2_of(n);
    uint64_t old = s->h.size;
    size = align_up(size, 512);
    int r = qcow2_resize_check(s, size, s->h.version, e);
    if (r < 0 || size == old)
        return r;
    if (size < old)
        return shrink_co(s, size, e);
    if (qcow2_data_raw(s)) /* what has no entry would not be read from it */
        prealloc = prealloc == PREALLOC_OFF ? PREALLOC_METADATA : prealloc;
    r = resize_data_co(s, size, prealloc, e);
    if (r < 0)
        return r;
    assert(qcow2_l1_entries_for(s->cluster_bits, qcow2_header_extended(&s->h), size) <=
           s->l1_entries); /* reach_co */
    r = write_size_co(s, size, s->l1_entries, s->h.l1_table_offset);
    if (r < 0)
        return err_errno(e, -r, "growing the disk from %" PRIu64 " to %" PRIu64, old, size);
    s->h.size = n->size = size;
    if (prealloc != PREALLOC_OFF) {
        uint64_t from = align_up(old, s->cluster_size);
        if (from < size)
            r = qcow2_preallocate_co(n, from, size - from, prealloc, e);
        /* Written in place from now on: a cut must not show the guest a hole and others the data.
         */
        if (!r && qcow2_data_raw(s) && (r = qcow2_writeback_all_co(s)) < 0)
            err_errno(e, -r, "writing the new mappings");
    }
    return r;
}

/* One placement's worth of room: its host space made ready as `prealloc` says, then linked in. */
static int preallocate_run_co(struct node *n, struct placement *p, int prealloc, struct err *e) {
    struct qcow2 *s = qcow2_of(n);
    uint64_t host = p->host_offset - p->head, bytes = (uint64_t)p->head + p->length + p->tail;
    bool content = !qcow2_extended(s) || qcow2_data_raw(s); /* else nobody reads the room */
    int r = 0;
    /* No table names what lies behind the end of the file. */
    if (!qcow2_data_apart(s) && host + bytes > s->file->size)
        r = disk_resize_co(s->file, host + bytes,
                           prealloc == PREALLOC_METADATA ? PREALLOC_OFF : prealloc, e);
    if (!r && !p->reads_zero && content && (r = disk_zero_co(p->storage, host, bytes, 0)) < 0)
        err_errno(e, -r, "zeroing %" PRIu64 " bytes at %" PRIu64, bytes, host);
    if (r < 0) {
        qcow2_abandon(n, p);
        return r;
    }
    if (content)
        return qcow2_publish_co(n, p);
    qcow2_publish_room(s, p);
    return 0;
}

int qcow2_preallocate_co(struct node *n, uint64_t offset, uint64_t length, int prealloc,
                         struct err *e) {
    uint64_t end = offset + length;
    int r = 0;
    if (prealloc == PREALLOC_OFF)
        return 0;
    while (offset < end) {
        struct placement p;
        struct extent x;
        r = qcow2_map_co(n, offset, end - offset, &x);
        if (!r && x.kind == EXTENT_HOLE) {
            r = qcow2_place_co(n, offset, x.length, 0, 0, &p);
            x.length = r ? 0 : p.length;
            if (!r && (r = preallocate_run_co(n, &p, prealloc, e)) < 0)
                return r;
        }
        if (r < 0)
            return err_errno(e, -r, "giving room ahead at %" PRIu64, offset);
        offset += x.length;
    }
    return 0;
}
