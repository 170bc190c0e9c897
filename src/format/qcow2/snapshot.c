/* SPDX-License-Identifier: MIT */
/*
 * Internal snapshots: the driver's slots.
 *
 *              names that come          names that go                   tables rewritten
 *      create  the active L1 table's    -                               snapshot table, both L1s
 *      apply   the snapshot's           the active L1 table's           active L1
 *      delete  -                        the snapshot's, its L1 table    snapshot table, active L1
 *
 * (and in each case the L2 tables of the active L1 table whose COPIED flags change).  How that is
 * done so that a crash leaves the image before or after is in shift.h.
 *
 * VM state lies behind the disk, from the first L1 entry past its end on; it is an ordinary part of
 * an L1 table here and stays where it is: applying a snapshot brings its state along.
 *
 * An external data file holds one state of the disk; snapshots are refused there.
 *
 * Source: the public qcow2 specification ("Snapshots").
 */
#include "format/qcow2/snapshot.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/strbuf.h"
#include "disk/io.h"
#include "format/qcow2/shift.h"

/* Other readers of the format keep names in 256 bytes, with a NUL. */
#define NAME_BYTES_MAX 255

/* ---------------------------------------------------------------- list */

static char *text_of(const char *text, uint16_t length) {
    return xstrndup(text, strnlen(text, length));
}

int qcow2_snapshot_list_co(struct node *n, struct snapshot_list *out, struct err *e) {
    struct qcow2 *s = qcow2_of(n);
    AUTO_QCOW2_SNAPSHOTS struct qcow2_snapshots t = {0};
    int r = qcow2_snapshots_load_co(s, &t, e);
    if (r < 0 || !t.count)
        return r;
    out->v = calloc(t.count, sizeof(*out->v));
    if (!out->v)
        return err_set(e, ENOMEM, "no memory for %" PRIu32 " snapshots", t.count);
    for (; out->count < t.count; out->count++) {
        const struct qcow2_snapshot *x = &t.v[out->count];
        out->v[out->count] = (struct snapshot_info){.id = text_of(x->id, x->id_length),
                                                    .name = text_of(x->name, x->name_length),
                                                    .vm_state_size = x->vm_state_size,
                                                    .date_sec = x->date_sec,
                                                    .date_nsec = x->date_nsec,
                                                    .vm_clock_nsec = x->vm_clock_nsec,
                                                    .icount = x->icount,
                                                    .disk_size = x->disk_size};
    }
    return 0;
}

/* ---------------------------------------------------------------- parts of the operations */

static int check_image(const struct qcow2 *s, struct err *e) {
    if (s->h.incompatible & QCOW2_INCOMPAT_DATA_FILE)
        return err_set(e, ENOTSUP,
                       "an image with an external data file cannot have internal snapshots");
    return 0;
}

/* Room for an L1 table, and its bytes.  `copied`: as it is, else without the flags. */
static int write_l1_co(struct shift *t, bool copied, uint64_t *host) {
    struct qcow2 *s = t->s;
    uint64_t bytes = (uint64_t)t->next.l1_entries * 8;
    AUTO_FREE uint64_t *plain = NULL;
    const uint64_t *entries = t->l1;
    if (!bytes) {
        *host = 0;
        return 0;
    }
    if (!copied) {
        plain = malloc(bytes);
        if (!plain)
            return err_set(t->e, ENOMEM, "no memory for the snapshot's L1 table");
        for (uint32_t i = 0; i < t->next.l1_entries; i++)
            plain[i] = t->l1[i] & ~QCOW2_COPIED;
        entries = plain;
    }
    int r = shift_room(t, bytes, host);
    if (r < 0)
        return r;
    r = qcow2_table_write_co(s, *host, entries, t->next.l1_entries,
                             align_up(bytes, s->cluster_size));
    return r < 0 ? err_errno(t->e, -r, "writing the L1 table at %" PRIu64, *host) : 0;
}

/* The active L1 table, whose old place is given up. */
static int write_active_l1_co(struct shift *t) {
    return write_l1_co(t, true, &t->next.l1_offset); /* an empty one lies nowhere */
}

static int drop_active_l1(struct shift *t) {
    return shift_drop(t, t->s->h.l1_table_offset, (uint64_t)t->s->l1_entries * 8);
}

static int write_table_co(struct shift *t, struct strbuf *b, uint32_t count) {
    static const char zeros[512];
    t->next.nb_snapshots = count;
    t->next.snapshots_offset = 0;
    if (!count)
        return 0;
    if (b->len > QCOW2_SNAPSHOT_TABLE_MAX)
        return err_set(t->e, EFBIG, "the snapshot table would have %zu bytes, more than %d", b->len,
                       QCOW2_SNAPSHOT_TABLE_MAX);
    int r = shift_room(t, b->len, &t->next.snapshots_offset);
    if (r < 0)
        return r;
    strbuf_add(b, zeros, align_up(b->len, sizeof(zeros)) - b->len);
    return shift_write_co(t, t->next.snapshots_offset, b->s, b->len);
}

static int copy_l1(struct shift *t) {
    struct qcow2 *s = t->s;
    t->l1 = malloc(((size_t)s->l1_entries + 1) * 8);
    if (!t->l1)
        return err_set(t->e, ENOMEM, "no memory for an L1 table");
    memcpy(t->l1, s->l1, (size_t)s->l1_entries * 8);
    return 0;
}

/* ---------------------------------------------------------------- create */

static int create_check(const struct qcow2 *s, const struct snapshot_info *info, struct err *e) {
    int r = check_image(s, e);
    if (!r && s->h.nb_snapshots >= QCOW2_SNAPSHOTS_MAX)
        r = err_set(e, EFBIG, "the image has %" PRIu32 " snapshots, as many as it can",
                    s->h.nb_snapshots);
    if (!r && strlen(info->name) > NAME_BYTES_MAX)
        r = err_set(e, EINVAL, "the name has %zu bytes, more than %d", strlen(info->name),
                    NAME_BYTES_MAX);
    return r;
}

/* Both L1 tables, and the snapshot table with one entry more. */
static int create_tables_co(struct shift *t, const struct qcow2_snapshots *old,
                            const struct snapshot_info *info) {
    AUTO_STRBUF struct strbuf b = STRBUF_INIT;
    uint64_t host;
    int r = write_active_l1_co(t);
    if (!r)
        r = write_l1_co(t, false, &host);
    if (r < 0)
        return r;
    for (uint32_t i = 0; i < old->count; i++)
        qcow2_snapshot_append(&b, &old->v[i]);
    qcow2_snapshot_encode(&b, info, host, t->next.l1_entries);
    return write_table_co(t, &b, old->count + 1);
}

int qcow2_snapshot_create_co(struct node *n, struct snapshot_info *info, struct err *e) {
    struct qcow2 *s = qcow2_of(n);
    AUTO_QCOW2_SNAPSHOTS struct qcow2_snapshots old = {0};
    struct shift t = {0};
    int r = create_check(s, info, e);
    if (!r)
        r = qcow2_snapshots_load_co(s, &old, e);
    if (r < 0)
        return r;
    free(info->id);
    info->id = xasprintf("%" PRIu64, qcow2_snapshot_next_id(&old));
    info->disk_size = s->h.size;
    r = shift_begin_co(&t, s, e);
    if (!r)
        r = copy_l1(&t);
    if (!r)
        r = shift_names_co(&t, s->l1, s->l1_entries, NULL, 0, false);
    if (!r)
        r = drop_active_l1(&t);
    if (!r)
        r = shift_drop(&t, s->h.snapshots_offset, old.length);
    if (!r)
        r = shift_count_co(&t);
    if (!r)
        r = shift_copy_co(&t, 2);
    if (!r)
        r = create_tables_co(&t, &old, info);
    if (!r)
        r = shift_switch_co(&t);
    shift_end_co(&t, !r);
    return r;
}

/* ---------------------------------------------------------------- apply */

static int find(const struct qcow2_snapshots *t, const char *id, const struct qcow2_snapshot **out,
                struct err *e) {
    *out = qcow2_snapshot_by_id(t, id);
    return *out ? 0 : err_set(e, ENOENT, "the image has no snapshot with the id '%s'", id);
}

static int apply_check(const struct qcow2 *s, const struct qcow2_snapshot *x, uint64_t *entries,
                       struct err *e) {
    int r = check_image(s, e);
    *entries = qcow2_l1_entries_for(s->cluster_bits, qcow2_extended(s), x->disk_size);
    if (!r && (x->disk_size > INT64_MAX || *entries > QCOW2_L1_BYTES_MAX / 8))
        r = err_set(e, EINVAL, "its disk size %" PRIu64 " is above the limit", x->disk_size);
    if (!r && s->h.version < 3 && x->disk_size != s->h.size)
        r = err_set(e, ENOTSUP,
                    "its disk has %" PRIu64 " bytes, and a version 2 image with internal snapshots "
                    "cannot change its size from %" PRIu64,
                    x->disk_size, s->h.size);
    return r;
}

/* Entries that do not say their disk size mean the current one: before that changes, they say it.*/
static int settle_sizes_co(struct shift *t, const struct qcow2_snapshots *old) {
    AUTO_STRBUF struct strbuf b = STRBUF_INIT;
    for (uint32_t i = 0; i < old->count; i++)
        qcow2_snapshot_append(&b, &old->v[i]);
    return write_table_co(t, &b, old->count);
}

static bool sizes_hang(const struct shift *t, const struct qcow2_snapshots *old) {
    for (uint32_t i = 0; i < old->count; i++)
        if (old->v[i].extra_length < QCOW2_SNAPSHOT_EXTRA_SIZE)
            return t->next.size != t->s->h.size;
    return false;
}

static int apply_shift_co(struct shift *t, const struct qcow2_snapshots *old,
                          const struct qcow2_snapshot *x, uint32_t entries) {
    struct qcow2 *s = t->s;
    bool hang;
    t->next.size = x->disk_size;
    hang = sizes_hang(t, old);
    int r = qcow2_snapshot_l1_co(s, x, entries, &t->l1, t->e);
    if (r < 0)
        return r;
    t->next.l1_entries = entries > x->l1_entries ? entries : x->l1_entries;
    r = shift_names_co(t, t->l1, t->next.l1_entries, s->l1, s->l1_entries, false);
    if (!r)
        r = shift_names_co(t, s->l1, s->l1_entries, t->l1, t->next.l1_entries, true);
    if (!r)
        r = drop_active_l1(t);
    if (!r && hang)
        r = shift_drop(t, s->h.snapshots_offset, old->length);
    if (!r)
        r = shift_count_co(t);
    if (!r)
        r = shift_copy_co(t, 1);
    if (!r)
        r = write_active_l1_co(t);
    if (!r && hang)
        r = settle_sizes_co(t, old);
    return r;
}

int qcow2_snapshot_apply_co(struct node *n, const char *id, struct err *e) {
    struct qcow2 *s = qcow2_of(n);
    AUTO_QCOW2_SNAPSHOTS struct qcow2_snapshots old = {0};
    const struct qcow2_snapshot *x = NULL;
    struct shift t = {0};
    uint64_t entries = 0;
    int r = qcow2_snapshots_load_co(s, &old, e);
    if (!r)
        r = find(&old, id, &x, e);
    if (!r)
        r = apply_check(s, x, &entries, e);
    if (r < 0)
        return r;
    r = shift_begin_co(&t, s, e);
    if (!r)
        r = apply_shift_co(&t, &old, x, (uint32_t)entries);
    if (!r)
        r = shift_switch_co(&t);
    shift_end_co(&t, !r);
    return r;
}

/* ---------------------------------------------------------------- delete */

static int delete_shift_co(struct shift *t, const struct qcow2_snapshots *old,
                           const struct qcow2_snapshot *x) {
    AUTO_STRBUF struct strbuf b = STRBUF_INIT;
    AUTO_FREE uint64_t *l1 = NULL;
    struct qcow2 *s = t->s;
    int r = qcow2_snapshot_l1_co(s, x, 0, &l1, t->e);
    if (!r)
        r = copy_l1(t);
    if (!r)
        r = shift_names_co(t, l1, x->l1_entries, NULL, 0, true);
    if (!r)
        r = shift_drop(t, x->l1_offset, (uint64_t)x->l1_entries * 8);
    if (!r)
        r = drop_active_l1(t);
    if (!r)
        r = shift_drop(t, s->h.snapshots_offset, old->length);
    if (!r)
        r = shift_count_co(t);
    if (!r)
        r = shift_copy_co(t, 1);
    if (!r)
        r = write_active_l1_co(t);
    for (uint32_t i = 0; !r && i < old->count; i++)
        if (&old->v[i] != x)
            qcow2_snapshot_append(&b, &old->v[i]);
    return r ? r : write_table_co(t, &b, old->count - 1);
}

int qcow2_snapshot_delete_co(struct node *n, const char *id, struct err *e) {
    struct qcow2 *s = qcow2_of(n);
    AUTO_QCOW2_SNAPSHOTS struct qcow2_snapshots old = {0};
    const struct qcow2_snapshot *x = NULL;
    struct shift t = {0};
    int r = check_image(s, e);
    if (!r)
        r = qcow2_snapshots_load_co(s, &old, e);
    if (!r)
        r = find(&old, id, &x, e);
    if (r < 0)
        return r;
    r = shift_begin_co(&t, s, e);
    if (!r)
        r = delete_shift_co(&t, &old, x);
    if (!r)
        r = shift_switch_co(&t);
    shift_end_co(&t, !r);
    return r;
}

/* ---------------------------------------------------------------- reading from one */

static bool is_text(const char *text, uint16_t length, const char *want) {
    size_t n = strnlen(text, length);
    return !want || (n == strlen(want) && !memcmp(text, want, n));
}

int qcow2_snapshot_select_co(struct qcow2 *s, const char *id, const char *name, struct err *e) {
    AUTO_QCOW2_SNAPSHOTS struct qcow2_snapshots t = {0};
    int r = qcow2_snapshots_load_co(s, &t, e);
    if (r < 0)
        return r;
    const struct qcow2_snapshot *x = NULL;
    for (uint32_t i = 0; !x && i < t.count; i++)
        if (is_text(t.v[i].id, t.v[i].id_length, id) &&
            is_text(t.v[i].name, t.v[i].name_length, name))
            x = &t.v[i];
    if (!x) {
        err_set(e, ENOENT, "the image has no snapshot with the %s '%s'%s%s%s", id ? "id" : "name",
                id ? id : name, id && name ? " and the name '" : "", id && name ? name : "",
                id && name ? "'" : "");
        err_hint(e, "'strata snapshot -l' lists those that it has");
        return -ENOENT;
    }
    uint64_t entries = qcow2_l1_entries_for(s->cluster_bits, qcow2_extended(s), x->disk_size);
    if (x->disk_size > INT64_MAX || entries > QCOW2_L1_BYTES_MAX / 8)
        return err_set(e, EINVAL, "the snapshot's disk size %" PRIu64 " is above the limit",
                       x->disk_size);
    AUTO_FREE uint64_t *l1 = NULL;
    r = qcow2_snapshot_l1_co(s, x, (uint32_t)entries, &l1, e);
    if (r < 0)
        return err_prefix(e, "snapshot '%s'", id ? id : name);
    free(s->l1);
    free(s->l1_dirty);
    s->l1_entries = s->h.l1_size = (uint32_t)max_u64(entries, x->l1_entries);
    s->l1 = steal(&l1);
    s->l1_dirty = NULL; /* read-only for good */
    s->h.l1_table_offset = x->l1_offset;
    s->h.size = x->disk_size;
    return 0;
}
