/* SPDX-License-Identifier: MIT */
/*
 * Which host clusters hold metadata: the cheap defence against tables that lie.
 *
 * A corrupt refcount block can call a cluster free that holds the L1 table; a corrupt L2 entry can
 * name a refcount block as guest data.  Writing there would turn damage that can be repaired into
 * loss.  So every cluster that is allocated, overwritten in place or given back is looked up here
 * first, for a few nanoseconds.
 *
 * Where it is asked
 *   - a cluster found free, for data or for a table (refcount.c, grow.c): metadata is never free
 *   - data overwritten in place, or put into a preallocated zero cluster (map.c, place.c)
 *   - a cluster about to lose its last reference (refcount.c)
 *   - every slice of an L2 table or refcount block that is written back: its cluster must be in the
 *     set, as the same kind of table (flush.c)
 *   - every table of the image at open: no two share a cluster
 * A hit marks the image corrupt (marks.c) and refuses the write.  Other tables (L1, refcount table,
 * snapshots, bitmaps) are written where a search for free clusters put them, or where the header
 * names them, which the first and the last of these cover.
 *
 * The set knows the header, the active L1 table and its L2 tables, the refcount table and its
 * blocks, the snapshot table, the snapshots' L1 tables, and bitmaps.  It does not know the L2
 * tables that only snapshots name: reading all those L1 tables would make every open slower.  They
 * have references, so the search never offers them; what remains is an entry that lies about
 * COPIED, which check finds.  An image with more than META_MAX such clusters (far beyond what its
 * cap on L1 bytes allows for normal clusters) is covered in part.
 *
 * Cost: one look into an open-addressed set, at most half full, for each cluster in question;
 * `bench/run.py` has a row.  overlap-check=none leaves them out.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"
#include "format/qcow2/qcow2.h"

#define META_MAX ((size_t)4 << 20) /* 64 MiB of set at the worst */

static size_t slot_of(const struct qcow2 *s, uint64_t key) {
    return (size_t)(key * UINT64_C(0x9e3779b97f4a7c15) >> 24) & s->meta_mask;
}

/* A slot: the cluster's index + 1, and above that what it holds. */
#define KIND_SHIFT 60
#define KEY_MASK (((uint64_t)1 << KIND_SHIFT) - 1)

static uint64_t slot_find(const struct qcow2 *s, uint64_t key) {
    for (size_t i = slot_of(s, key); s->meta[i]; i = (i + 1) & s->meta_mask)
        if ((s->meta[i] & KEY_MASK) == key)
            return s->meta[i];
    return 0;
}

bool qcow2_meta_find(const struct qcow2 *s, uint64_t key) {
    return slot_find(s, key) != 0;
}

bool qcow2_meta_is(const struct qcow2 *s, uint64_t host, enum qcow2_meta_kind kind) {
    if (!s->meta || s->unchecked || s->meta_count >= META_MAX)
        return true;
    uint64_t slot = slot_find(s, (host >> s->cluster_bits) + 1);
    uint64_t found = slot >> KIND_SHIFT;
    return slot && (found == kind || found == QCOW2_META_OTHER);
}

static void insert(struct qcow2 *s, uint64_t slot) {
    uint64_t key = slot & KEY_MASK;
    size_t i = slot_of(s, key);
    while (s->meta[i] && (s->meta[i] & KEY_MASK) != key)
        i = (i + 1) & s->meta_mask;
    if (!s->meta[i])
        s->meta_count++;
    s->meta[i] = slot;
}

/* Room for one more with at most half of the slots in use. */
static int reserve(struct qcow2 *s) {
    if (s->meta && s->meta_count * 2 < s->meta_mask)
        return 0;
    size_t slots = s->meta ? (s->meta_mask + 1) * 2 : 256;
    uint64_t *old = s->meta;
    size_t old_slots = old ? s->meta_mask + 1 : 0;
    uint64_t *grown = calloc(slots, sizeof(*grown));
    if (!grown)
        return -ENOMEM;
    s->meta = grown;
    s->meta_mask = slots - 1;
    s->meta_count = 0;
    for (size_t i = 0; i < old_slots; i++)
        if (old[i])
            insert(s, old[i]);
    free(old);
    return 0;
}

int qcow2_meta_add(struct qcow2 *s, uint64_t host, uint64_t length) {
    return qcow2_meta_add_kind(s, host, length, QCOW2_META_OTHER);
}

int qcow2_meta_add_kind(struct qcow2 *s, uint64_t host, uint64_t length,
                        enum qcow2_meta_kind kind) {
    uint64_t first = qcow2_cluster_index(s, host), count = qcow2_clusters_for(s, length);
    for (uint64_t i = 0; i < count && s->meta_count < META_MAX; i++) {
        int r = reserve(s);
        if (r < 0)
            return r;
        insert(s, (first + i + 1) | (uint64_t)kind << KIND_SHIFT);
    }
    return 0;
}

static void remove_key(struct qcow2 *s, uint64_t key) {
    size_t hole = slot_of(s, key);
    while (s->meta[hole] && (s->meta[hole] & KEY_MASK) != key)
        hole = (hole + 1) & s->meta_mask;
    if (!s->meta[hole])
        return;
    s->meta_count--;
    /* Close the gap: move back whatever a probe would no longer reach. */
    for (size_t i = (hole + 1) & s->meta_mask; s->meta[i]; i = (i + 1) & s->meta_mask) {
        size_t home = slot_of(s, s->meta[i] & KEY_MASK);
        if (((i - home) & s->meta_mask) >= ((i - hole) & s->meta_mask)) {
            s->meta[hole] = s->meta[i];
            hole = i;
        }
    }
    s->meta[hole] = 0;
}

void qcow2_meta_remove(struct qcow2 *s, uint64_t host, uint64_t length) {
    uint64_t first = qcow2_cluster_index(s, host), count = qcow2_clusters_for(s, length);
    for (uint64_t i = 0; s->meta && i < count; i++)
        remove_key(s, first + i + 1);
}

/* One snapshot table entry at `at`: its L1 table joins the set; *length is the entry's own. */
static int add_snapshot_co(struct qcow2 *s, uint64_t at, uint64_t *length) {
    uint8_t b[40];
    int r = disk_pread_co(s->file, at, b, sizeof(b));
    if (r < 0)
        return r;
    uint64_t l1 = be64_load(b), bytes = (uint64_t)be32_load(b + 8) * 8;
    *length = align_up(
        40 + (uint64_t)be16_load(b + 12) + be16_load(b + 14) + (uint64_t)be32_load(b + 36), 8);
    /* A bad snapshot is no reason to refuse the disk; what cannot be real is not protected. */
    if (bytes > QCOW2_L1_BYTES_MAX || l1 >= QCOW2_HOST_LIMIT || *length > MIB)
        return *length > MIB ? -EIO : 0;
    return qcow2_meta_add(s, l1, bytes);
}

static int add_snapshots_co(struct qcow2 *s, struct err *e) {
    uint64_t at = s->h.snapshots_offset;
    for (uint32_t i = 0; i < s->h.nb_snapshots; i++) {
        uint64_t length = 0;
        int r = add_snapshot_co(s, at, &length);
        if (r < 0)
            return err_errno(e, -r, "snapshot table: entry %" PRIu32 " at %" PRIu64, i, at);
        at += length;
    }
    if (!s->h.nb_snapshots)
        return 0;
    return qcow2_meta_add(s, s->h.snapshots_offset, at - s->h.snapshots_offset);
}

/* A table's clusters, which nothing else may use: two tables in one cluster cannot both be kept. */
static int add_table(struct qcow2 *s, const char *what, enum qcow2_meta_kind kind, uint64_t host,
                     uint64_t length, struct err *e) {
    uint64_t count = qcow2_clusters_for(s, length);
    for (uint64_t i = 0; i < count; i++) {
        uint64_t at = host + (i << s->cluster_bits);
        if (qcow2_is_meta(s, at) && !(s->node->flags & NODE_CHECK)) {
            err_set(e, EIO, "%s at %" PRIu64 " shares its cluster with another table", what, at);
            err_hint(e, "repair it with strata check -r all; reading is possible");
            return -EIO;
        }
        if (qcow2_meta_add_kind(s, at, s->cluster_size, kind) < 0)
            return err_set(e, ENOMEM, "no memory for the tables");
    }
    return 0;
}

/* A block that the table names wrongly would be neither used nor replaced when room is wanted. */
static int check_reftable_entry(const struct qcow2 *s, uint32_t i, struct err *e) {
    uint64_t entry = s->reftable[i];
    if (is_aligned(entry, s->cluster_size) && entry < QCOW2_HOST_LIMIT)
        return 0;
    err_set(e, EIO,
            "refcount table entry %" PRIu32 ": 0x%" PRIx64 " is not the offset of a cluster", i,
            entry);
    err_hint(e, "repair it with strata check -r all; reading is possible");
    return -EIO;
}

int qcow2_meta_build_co(struct qcow2 *s, struct err *e) {
    int r = add_table(s, "header", QCOW2_META_OTHER, 0, s->cluster_size, e);
    if (!r && s->l1_entries)
        r = add_table(s, "L1 table", QCOW2_META_OTHER, s->h.l1_table_offset,
                      (uint64_t)s->l1_entries * 8, e);
    if (!r && s->reftable_entries)
        r = add_table(s, "refcount table", QCOW2_META_OTHER, s->h.refcount_table_offset,
                      (uint64_t)s->reftable_entries * 8, e);
    for (uint32_t i = 0; !r && i < s->reftable_entries; i++) {
        uint64_t block = s->reftable[i] & QCOW2_REFTABLE_MASK;
        if (!(s->node->flags & NODE_CHECK))
            r = check_reftable_entry(s, i, e);
        if (!r && block)
            r = add_table(s, "refcount block", QCOW2_META_REFBLOCK, block, s->cluster_size, e);
    }
    for (uint32_t i = 0; !r && i < s->l1_entries; i++) {
        uint64_t table = s->l1[i] & QCOW2_OFFSET_MASK;
        /* Without COPIED a table may be named more than once: writers copy it first. */
        bool shared = table && !(s->l1[i] & QCOW2_COPIED) && qcow2_is_meta(s, table) &&
                      qcow2_meta_is(s, table, QCOW2_META_L2);
        if (table && !shared)
            r = add_table(s, "L2 table", QCOW2_META_L2, table, s->cluster_size, e);
    }
    return r ? r : add_snapshots_co(s, e);
}
