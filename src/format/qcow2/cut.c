/* SPDX-License-Identifier: MIT */
/*
 * Dropping mappings: all that lies behind a guest offset, for shrinking and for emptying.
 *
 *      guest   0 ........... from .......................... end of the last L2 table
 *      tables  |  T0  |  T1  |  T2 cut inside  |  T3 dropped whole  |  T4 dropped whole |
 *
 * Inside the table that `from` cuts, entries become holes (zero.c).  A table behind it is dropped
 * whole: every cluster that its entries name, and its own, go into limbo in the same breath as its
 * L1 entry is cleared.  So no write-back can see half of it: on storage the table is either still
 * named and all that it names still counted, or gone, and then limbo gives its clusters back.  The
 * entries are therefore gathered first, which may suspend and fail and changes nothing.
 *
 * A table or cluster shared with a snapshot loses one reference and is not written to.
 *
 * A crash on the way leaves some tables dropped and others not.  Emptying runs when the layer below
 * holds the same content, so nothing is lost; shrinking was told to lose it.
 *
 * Afterwards the file ends behind the last cluster in use.  Storage that cannot be cut, a device,
 * keeps its length.
 */
#include <errno.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/event.h"
#include "disk/io.h"
#include "format/qcow2/qcow2.h"

/* All entries of the table for L1 entry i1, as they are in memory. */
static int gather_table_co(struct qcow2 *s, uint64_t i1, uint8_t *buf) {
    uint64_t guest = i1 << (s->cluster_bits + s->l2_bits);
    uint64_t slice_span = (uint64_t)1 << (s->slice_bits + s->cluster_bits);
    for (uint32_t at = 0; at < s->cluster_size; at += s->cache.slice_bytes, guest += slice_span) {
        struct qcow2_slice *slice;
        uint32_t index;
        int r = qcow2_l2_slice_co(s, guest, &slice, &index);
        if (r < 0)
            return r;
        if (!slice)
            return -EIO; /* the entry was there when we looked, and nobody else is inside */
        memcpy(buf + at, slice->data, s->cache.slice_bytes);
    }
    return 0;
}

/* Neither suspends nor fails. */
static void drop_table(struct qcow2 *s, uint64_t i1, const uint8_t *buf) {
    uint64_t host = s->l1[i1] & QCOW2_OFFSET_MASK;
    for (uint32_t i = 0; i < (uint32_t)1 << s->l2_bits; i++) {
        struct qcow2_l2e e = qcow2_l2_get(s, buf, i);
        /* What a damaged entry names is not known: it leaks at most. */
        if (qcow2_l2_kind(s, e, 0) != QCOW2_CLUSTER_BAD)
            qcow2_limbo_add_entry(s, e);
    }
    s->l1[i1] = 0;
    if (!(s->l1_dirty[i1 / 64] >> i1 % 64 & 1)) {
        s->l1_dirty[i1 / 64] |= (uint64_t)1 << i1 % 64;
        s->l1_dirty_count++;
    }
    qcow2_cache_forget(&s->cache, host, s->cluster_size);
    qcow2_meta_remove(s, host, s->cluster_size);
    qcow2_limbo_add(s, qcow2_cluster_index(s, host), 1);
}

static int drop_tables_co(struct qcow2 *s, uint64_t first) {
    uint8_t *buf = buf_get(s->cluster_size);
    int r = buf ? 0 : -ENOMEM;
    for (uint64_t i1 = first; !r && i1 < s->l1_entries; i1++) {
        if (!(s->l1[i1] & QCOW2_OFFSET_MASK))
            continue;
        r = qcow2_make_room_co(s);
        if (!r)
            r = gather_table_co(s, i1, buf);
        if (!r)
            drop_table(s, i1, buf);
        qcow2_limbo_settle_co(s);
    }
    buf_put(buf, s->cluster_size);
    return r;
}

int qcow2_cut_co(struct qcow2 *s, uint64_t from) {
    uint64_t span = (uint64_t)1 << (s->cluster_bits + s->l2_bits);
    from = align_up(from, s->cluster_size);
    uint64_t tables = align_up(from, span);
    int r = 0;
    if (from < tables && qcow2_l1_index(s, from) < s->l1_entries)
        r = qcow2_make_holes_co(s, from, tables - from);
    return r ? r : drop_tables_co(s, tables >> (s->cluster_bits + s->l2_bits));
}

int qcow2_trim_file_co(struct qcow2 *s) {
    uint64_t end = qcow2_clusters_for(s, s->file->size), count = 0;
    int r = qcow2_writeback_all_co(s);
    for (; !r && end; end--) {
        r = qcow2_refcount_read_co(s, end - 1, &count);
        if (!r && count)
            break;
    }
    if (r < 0 || end << s->cluster_bits >= s->file->size)
        return r;
    if (disk_resize_co(s->file, end << s->cluster_bits, PREALLOC_OFF, NULL) == 0)
        s->virgin_from = min_u64(s->virgin_from, end);
    return 0;
}

int qcow2_empty_co(struct node *n, struct err *e) {
    struct qcow2 *s = qcow2_of(n);
    disk_event_co(s->file, EVENT_empty_image_prepare);
    int r = qcow2_data_raw(s) ? -ENOTSUP : qcow2_cut_co(s, 0);
    if (!r)
        r = qcow2_trim_file_co(s);
    if (!r && qcow2_data_apart(s) && s->data && s->node->flags & NODE_UNMAP)
        disk_discard_co(s->data, 0, s->data->size); /* only a hint */
    return r < 0 ? err_errno(e, -r, "dropping the image's data") : 0;
}
