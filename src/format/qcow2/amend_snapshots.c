/* SPDX-License-Identifier: MIT */
/*
 * A snapshot table for version 3, whose entries say the size of their disk.
 *
 * Version 2 images of old programs have entries with less extra data than the 16 bytes that
 * version 3 wants; they mean the size that the disk has now.  The table is written anew, complete,
 * in fresh clusters; they are counted and stable before the header names them, in the same write
 * that makes the image version 3.  Only then the old table's clusters are given back.  A crash
 * leaves the old table or the new one in force, and the other as a leak.
 *
 * Source: the public qcow2 specification ("Snapshots").
 */
#include <errno.h>
#include <inttypes.h>

#include "base/ck.h"
#include "base/plant.h"
#include "base/strbuf.h"
#include "disk/io.h"
#include "format/qcow2/amend.h"
#include "format/qcow2/snapshot.h"

static int write_table_co(struct qcow2 *s, struct strbuf *b, uint64_t *host, struct err *e) {
    static const char zeros[512];
    uint64_t clusters = qcow2_clusters_for(s, b->len), got;
    bool virgin;
    strbuf_add(b, zeros, align_up(b->len, sizeof(zeros)) - b->len);
    int r = qcow2_alloc_co(s, clusters, true, host, &got, &virgin);
    if (r < 0)
        return err_errno(e, -r, "making room for the snapshot table");
    r = qcow2_meta_add(s, *host, b->len);
    if (!r)
        r = disk_pwrite_co(s->file, *host, b->s, b->len);
    if (!r && !PLANTED(SNAPSHOTS_NAMED_EARLY))
        r = qcow2_flush_co(s->node);
    if (r < 0) {
        qcow2_meta_remove(s, *host, b->len);
        qcow2_release_co(s, qcow2_cluster_index(s, *host), clusters);
        return err_errno(e, -r, "writing the snapshot table at %" PRIu64, *host);
    }
    return 0;
}

int qcow2_amend_table_co(struct qcow2 *s, struct qcow2_amend_table *t, struct err *e) {
    AUTO_QCOW2_SNAPSHOTS struct qcow2_snapshots old = {0};
    AUTO_STRBUF struct strbuf b = STRBUF_INIT;
    *t = (struct qcow2_amend_table){0};
    int r = qcow2_snapshots_load_co(s, &old, e);
    for (uint32_t i = 0; !r && i < old.count; i++)
        qcow2_snapshot_append(&b, &old.v[i]);
    if (!r && b.len > QCOW2_SNAPSHOT_TABLE_MAX)
        r = err_set(e, EFBIG, "the snapshot table would have %zu bytes, more than %d", b.len,
                    QCOW2_SNAPSHOT_TABLE_MAX);
    if (r < 0 || !old.count)
        return r;
    t->old_host = s->h.snapshots_offset;
    t->old_bytes = old.length;
    r = write_table_co(s, &b, &t->host, e);
    if (!r)
        s->h.snapshots_offset = t->host;
    return r;
}

void qcow2_amend_table_done_co(struct qcow2 *s, const struct qcow2_amend_table *t) {
    if (!t->host)
        return;
    qcow2_meta_remove(s, t->old_host, t->old_bytes);
    qcow2_release_co(s, qcow2_cluster_index(s, t->old_host),
                     qcow2_clusters_for(s, t->old_bytes)); /* an error leaks */
}
