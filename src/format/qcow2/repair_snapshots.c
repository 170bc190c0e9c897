/* SPDX-License-Identifier: MIT */
/*
 * A snapshot table whose entries cannot be used as they are:
 *
 *   entries of version 3 with less extra data than it wants      completed: the missing disk size
 *                                                                 is that of the disk now
 *   entries with more extra data than any reader accepts         cut to that: nothing in it is
 * known
 *
 * The new table lies in fresh clusters behind the file, counted and stable before the header names
 * it, in one write within a sector.  The old one's clusters are leaks then, which a later step
 * gives back; a crash leaves the old table in force or the new one.  L1 tables stay where they are.
 *
 * What cannot be walked to its end stays as it is, and is told: a table outside the file, or with
 * more entries or bytes than the format's readers take.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/plant.h"
#include "base/strbuf.h"
#include "disk/io.h"
#include "format/qcow2/repair.h"
#include "format/qcow2/snapshot.h"

enum { COUNT_AT = 60 }; /* number of snapshots, then where they are: 12 bytes */

/* One entry at *at, which moves behind it, as it shall be.  1: it cannot be kept. */
static int entry_co(struct qcow2 *s, uint64_t *at, struct strbuf *b) {
    enum { ENTRY_MAX = QCOW2_SNAPSHOT_FIXED + QCOW2_SNAPSHOT_EXTRA_MAX + 2 * 65535 };
    uint8_t fixed[QCOW2_SNAPSHOT_FIXED];
    struct qcow2_snapshot x;
    if (*at >= s->file->size)
        return 1;
    int r = disk_pread_co(s->file, *at, fixed, sizeof(fixed));
    if (r < 0)
        return 1; /* the check has said so */
    uint64_t texts = (uint64_t)be16_load(fixed + 12) + be16_load(fixed + 14);
    uint64_t extra = be32_load(fixed + 36), kept = min_u64(extra, QCOW2_SNAPSHOT_EXTRA_MAX);
    uint64_t length = sizeof(fixed) + extra + texts;
    if (length > s->file->size - *at)
        return 1;
    AUTO_FREE uint8_t *entry = malloc(ENTRY_MAX);
    if (!entry)
        return -ENOMEM;
    memcpy(entry, fixed, sizeof(fixed));
    be32_store(entry + 36, (uint32_t)kept);
    uint8_t *to = entry + sizeof(fixed);
    uint64_t from = *at + sizeof(fixed);
    r = kept ? disk_pread_co(s->file, from, to, kept) : 0;
    if (!r && texts)
        r = disk_pread_co(s->file, from + extra, to + kept, texts);
    if (r < 0 || qcow2_snapshot_decode(entry, ENTRY_MAX, s->h.size, &x, NULL) <= 0)
        return 1;
    qcow2_snapshot_append(b, &x);
    *at = align_up(*at + length, 8);
    return b->len > QCOW2_SNAPSHOT_TABLE_MAX;
}

static int name_co(struct repair *p, uint64_t host) {
    struct qcow2 *s = p->s;
    uint8_t field[12];
    be32_store(field, s->h.nb_snapshots);
    be64_store(field + 4, host);
    int r = PLANTED(REPAIRED_SNAPSHOTS_EARLY) ? 0 : repair_barrier_co(s);
    if (!r)
        r = disk_pwrite_co(s->file, COUNT_AT, field, sizeof(field));
    if (!r)
        r = repair_barrier_co(s);
    if (!r)
        s->h.snapshots_offset = host;
    return r;
}

int repair_snapshots_co(struct repair *p, struct check *c, uint64_t *fixed) {
    static const char zeros[512];
    AUTO_STRBUF struct strbuf b = STRBUF_INIT;
    struct qcow2 *s = p->s;
    uint64_t at = s->h.snapshots_offset;
    int r = 0;
    if (!c->snapshots)
        return 0;
    for (uint32_t i = 0; !r && i < s->h.nb_snapshots; i++)
        r = entry_co(s, &at, &b);
    if (r)
        return r < 0 ? r : 0;
    strbuf_add(&b, zeros, align_up(b.len, sizeof(zeros)) - b.len);
    p->wanted = qcow2_clusters_for(s, b.len);
    p->left = 0;
    r = repair_room_co(p, c);
    if (r || p->left < p->wanted)
        return r;
    uint64_t host = p->room << s->cluster_bits;
    r = disk_pwrite_co(s->file, host, b.s, b.len);
    if (!r)
        r = name_co(p, host);
    p->left = 0;
    *fixed += r ? 0 : c->snapshots;
    return r;
}
