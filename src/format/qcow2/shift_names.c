/* SPDX-License-Identifier: MIT */
/*
 * A shift's walks over L2 tables: what they name, and copies with other flags.  See shift.h.
 *
 * Tables that follow one another in the file are read together, 2 MiB at a time.  Entries are
 * gathered into runs of host clusters, since data mostly lies in order; so 64 Mi entries are a
 * matter of memory speed.
 *
 * Nothing is believed: a name must be that of a cluster inside the file, and guest data must not
 * claim clusters of metadata.  Damage refuses the whole operation; nothing has been written then.
 */
#include "format/qcow2/shift.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/plant.h"
#include "disk/io.h"

static int damaged(struct shift *t, const char *what, uint64_t entry, uint64_t host) {
    err_set(t->e, EIO,
            "%s 0x%" PRIx64 " at offset %" PRIu64 " does not name clusters of its own in the file",
            what, entry, host);
    err_hint(t->e, "the image is damaged: 'strata check' tells how");
    return -EIO;
}

static int add(struct shift *t, struct counts *c, uint64_t first, uint64_t n) {
    int r = counts_add(c, first, n, 1);
    return r < 0 ? err_set(t->e, ENOMEM, "no memory for the reference counts") : 0;
}

/* ---------------------------------------------------------------- reading tables in rows */

/* Tables [i, i + n) of `l1` lie in one row in the file, at most a buffer long. */
static uint32_t row_length(const struct shift *t, const uint64_t *l1, uint32_t entries,
                           uint32_t i) {
    uint32_t n = 1, max = SHIFT_BUF_BYTES >> t->s->cluster_bits;
    uint64_t first = l1[i] & QCOW2_OFFSET_MASK;
    while (i + n < entries && n < max &&
           (l1[i + n] & QCOW2_OFFSET_MASK) == first + ((uint64_t)n << t->s->cluster_bits))
        n++;
    return n;
}

static bool table_fits(const struct shift *t, uint64_t host) {
    const struct qcow2 *s = t->s;
    return is_aligned(host, s->cluster_size) && host >= s->cluster_size &&
           host >> s->cluster_bits < t->file_clusters;
}

static int read_row_co(struct shift *t, const uint64_t *l1, uint32_t i, uint32_t n) {
    uint64_t first = l1[i] & QCOW2_OFFSET_MASK;
    for (uint32_t k = 0; k < n; k++)
        if (!table_fits(t, first + ((uint64_t)k << t->s->cluster_bits)))
            return damaged(t, "L1 entry", l1[i + k], first);
    int r = disk_pread_co(t->s->file, first, t->in, (size_t)n << t->s->cluster_bits);
    return r < 0 ? err_errno(t->e, -r, "reading the L2 table at %" PRIu64, first) : 0;
}

/* ---------------------------------------------------------------- what tables name */

static int coded_names(struct shift *t, struct counts *c, uint64_t entry, uint64_t at) {
    const struct qcow2 *s = t->s;
    uint64_t host;
    uint32_t length;
    qcow2_coded_decode(s->cluster_bits, entry, &host, &length);
    uint64_t first = host >> s->cluster_bits, last = (host + length - 1) >> s->cluster_bits;
    if (!first || last >= t->file_clusters)
        return damaged(t, "compressed L2 entry", entry, at);
    return add(t, c, first, last - first + 1);
}

/* Everything that the entries in p[0, bytes), read from `at`, name. */
static int entry_names(struct shift *t, struct counts *c, const uint8_t *p, uint64_t bytes,
                       uint64_t at) {
    const struct qcow2 *s = t->s;
    uint32_t stride = (uint32_t)1 << s->l2e_shift;
    uint64_t run = 0, n = 0; /* first byte of the run, its length in clusters */
    uint64_t limit = t->file_clusters << s->cluster_bits, mask = s->cluster_size - 1;
    for (uint64_t i = 0; i < bytes; i += stride) {
        uint64_t entry = be64_load(p + i), host = entry & QCOW2_OFFSET_MASK;
        if (!(entry & QCOW2_COMPRESSED)) {
            if (host && host == run + (n << s->cluster_bits) && host < limit) {
                n++;
                continue;
            }
            if (!host)
                continue;
            if (host & mask || host < s->cluster_size || host >= limit)
                return damaged(t, "L2 entry", entry, at + i);
        }
        int r = n ? add(t, c, run >> s->cluster_bits, n) : 0;
        n = 0;
        run = 0;
        if (!r && entry & QCOW2_COMPRESSED)
            r = coded_names(t, c, entry, at + i);
        else if (!r) {
            run = host;
            n = 1;
        }
        if (r < 0)
            return r;
    }
    return n ? add(t, c, run >> s->cluster_bits, n) : 0;
}

static bool cancels_out(const uint64_t *l1, const uint64_t *other, uint32_t other_entries,
                        uint32_t i) {
    return other && i < other_entries && !((l1[i] ^ other[i]) & QCOW2_OFFSET_MASK);
}

/* Guest data must not claim metadata: its counts would follow the guest's. */
static int check_claims(struct shift *t, const struct counts *c) {
    const struct qcow2 *s = t->s;
    for (size_t i = 0; s->meta && i <= s->meta_mask; i++) {
        uint64_t cluster = s->meta[i] - 1;
        if (!s->meta[i] || cluster >= t->file_clusters || !counts_get(c, cluster))
            continue;
        err_set(t->e, EIO, "the cluster at offset %" PRIu64 " is metadata and guest data at once",
                cluster << s->cluster_bits);
        err_hint(t->e, "the image is damaged: 'strata check' tells how");
        return -EIO;
    }
    return 0;
}

/* The L2 tables themselves.  One that is metadata can only be the active one for this place. */
static int table_names(struct shift *t, struct counts *c, const uint64_t *l1, uint32_t entries,
                       const uint64_t *other, uint32_t other_entries) {
    const struct qcow2 *s = t->s;
    int r = 0;
    for (uint32_t i = 0; !r && i < entries; i++) {
        uint64_t host = l1[i] & QCOW2_OFFSET_MASK;
        if (!host || cancels_out(l1, other, other_entries, i))
            continue;
        bool active = i < s->l1_entries && (s->l1[i] & QCOW2_OFFSET_MASK) == host;
        if (!active && qcow2_is_meta(s, host))
            return damaged(t, "L1 entry of a snapshot", l1[i], host);
        r = add(t, c, host >> s->cluster_bits, 1);
    }
    return r;
}

int shift_names_co(struct shift *t, const uint64_t *l1, uint32_t entries, const uint64_t *other,
                   uint32_t other_entries, bool go) {
    struct counts *c = go ? &t->go : &t->come;
    int r = 0;
    for (uint32_t i = 0; !r && i < entries;) {
        if (!(l1[i] & QCOW2_OFFSET_MASK) || cancels_out(l1, other, other_entries, i)) {
            i++;
            continue;
        }
        uint32_t n = row_length(t, l1, entries, i);
        for (uint32_t k = 1; k < n; k++)
            if (cancels_out(l1, other, other_entries, i + k))
                n = k;
        r = read_row_co(t, l1, i, n);
        if (!r)
            r = entry_names(t, c, t->in, (uint64_t)n << t->s->cluster_bits,
                            l1[i] & QCOW2_OFFSET_MASK);
        i += n;
    }
    if (!r)
        r = check_claims(t, c);
    return r ? r : table_names(t, c, l1, entries, other, other_entries);
}

int shift_drop(struct shift *t, uint64_t host, uint64_t bytes) {
    uint64_t n = qcow2_clusters_for(t->s, bytes), first = host >> t->s->cluster_bits;
    if (first + n > COUNTS_CLUSTERS_MAX)
        return err_set(t->e, EFBIG, "a table at offset %" PRIu64 " is too far out", host);
    if (n && shift_runs_add(&t->dropped, first, n) < 0)
        return err_set(t->e, ENOMEM, "no memory for the old tables");
    return n ? add(t, &t->go, first, n) : 0;
}

/* ---------------------------------------------------------------- copies with other flags */

static bool is_once(const struct shift *t, uint64_t cluster) {
    return t->once[cluster / 64] >> cluster % 64 & 1;
}

/* Sets the flags of one table as they must be; whether any changed. */
static bool set_flags(const struct shift *t, uint8_t *table) {
    const struct qcow2 *s = t->s;
    uint32_t stride = (uint32_t)1 << s->l2e_shift;
    bool changed = false;
    for (uint32_t i = 0; i < s->cluster_size; i += stride) {
        uint64_t entry = be64_load(table + i), host = entry & QCOW2_OFFSET_MASK;
        uint64_t cluster = host >> s->cluster_bits;
        if (!host || entry & QCOW2_COMPRESSED || cluster >= t->file_clusters)
            continue;
        uint64_t wanted = (entry & ~QCOW2_COPIED) | (is_once(t, cluster) ? QCOW2_COPIED : 0);
        if (wanted != entry) {
            be64_store(table + i, wanted);
            changed = true;
        }
    }
    return changed && !PLANTED(SHIFT_COPIED_LEFT);
}

/* Copies waiting to be written by one request: t->out[0, n tables), from `host` on. */
struct copies {
    uint64_t host;
    uint32_t n;
    uint64_t room, room_left; /* clusters taken and not yet used */
};

static int copies_write_co(struct shift *t, struct copies *c) {
    uint64_t bytes = (uint64_t)c->n << t->s->cluster_bits;
    int r = c->n ? shift_write_co(t, c->host, t->out, bytes) : 0;
    c->host += bytes;
    c->n = 0;
    return r;
}

/* A place for table `i`, of which `wanted` more may follow; t->l1 names it. */
static int copies_add_co(struct shift *t, struct copies *c, uint32_t i, const uint8_t *table,
                         uint64_t names, uint64_t wanted) {
    struct qcow2 *s = t->s;
    int r = 0;
    if (!c->room_left)
        r = shift_room_some(t, wanted, names, &c->room, &c->room_left);
    bool joins = c->host + ((uint64_t)c->n << s->cluster_bits) == c->room << s->cluster_bits;
    if (!r && (!joins || (uint64_t)(c->n + 1) << s->cluster_bits > SHIFT_BUF_BYTES)) {
        r = copies_write_co(t, c);
        c->host = c->room << s->cluster_bits;
    }
    if (r < 0)
        return r;
    memcpy(t->out + ((size_t)c->n++ << s->cluster_bits), table, s->cluster_size);
    uint64_t old = t->l1[i] & QCOW2_OFFSET_MASK;
    t->l1[i] = c->room++ << s->cluster_bits | (names == 1 ? QCOW2_COPIED : 0);
    c->room_left--;
    for (uint64_t k = 0; !r && k < names; k++)
        r = add(t, &t->go, old >> s->cluster_bits, 1);
    return r;
}

static int copy_row_co(struct shift *t, struct copies *c, uint32_t i, uint32_t n, uint64_t names) {
    const struct qcow2 *s = t->s;
    uint64_t first = t->l1[i] & QCOW2_OFFSET_MASK;
    uint8_t changed[SHIFT_BUF_BYTES >> QCOW2_CLUSTER_BITS_MIN] = {0};
    uint64_t wanted = 0;
    int r = 0;
    for (uint32_t k = 0; k < n; k++)
        wanted += changed[k] = set_flags(t, t->in + ((size_t)k << s->cluster_bits));
    for (uint32_t k = 0; !r && k < n; k++) {
        if (changed[k]) {
            r = copies_add_co(t, c, i + k, t->in + ((size_t)k << s->cluster_bits), names, wanted--);
            continue;
        }
        uint64_t host = first + ((uint64_t)k << s->cluster_bits);
        t->l1[i + k] = host | (is_once(t, host >> s->cluster_bits) ? QCOW2_COPIED : 0);
    }
    return r;
}

int shift_copy_co(struct shift *t, uint64_t names) {
    struct copies c = {0};
    uint32_t entries = t->next.l1_entries;
    int r = 0;
    for (uint32_t i = 0; !r && i < entries;) {
        if (!(t->l1[i] & QCOW2_OFFSET_MASK)) {
            t->l1[i++] = 0;
            continue;
        }
        uint32_t n = row_length(t, t->l1, entries, i);
        r = read_row_co(t, t->l1, i, n);
        if (!r)
            r = copy_row_co(t, &c, i, n, names);
        i += n;
    }
    return r ? r : copies_write_co(t, &c);
}
