/* SPDX-License-Identifier: MIT */
/*
 * The snapshot table: see snapshot.h for its form.
 *
 * Hostile tables: at most QCOW2_SNAPSHOTS_MAX entries (the header's check) in at most
 * QCOW2_SNAPSHOT_TABLE_MAX bytes, read piece by piece as entries ask for more, so that a table that
 * claims much and holds little costs little.  Texts may hold any byte; what lies behind a NUL is
 * kept on disk and not shown.
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

#define TABLE_PIECE ((uint64_t)64 * KIB)

/* Where the fields of an entry stand. */
enum {
    AT_L1_OFFSET = 0,
    AT_L1_ENTRIES = 8,
    AT_ID_LENGTH = 12,
    AT_NAME_LENGTH = 14,
    AT_DATE_SEC = 16,
    AT_DATE_NSEC = 20,
    AT_VM_CLOCK = 24,
    AT_VM_STATE_32 = 32,
    AT_EXTRA_LENGTH = 36,
    /* in the extra data */
    EXTRA_VM_STATE = 0,
    EXTRA_DISK_SIZE = 8,
    EXTRA_ICOUNT = 16,
};

int64_t qcow2_snapshot_decode(const uint8_t *p, uint64_t have, uint64_t disk_size,
                              struct qcow2_snapshot *out, struct err *e) {
    if (have < QCOW2_SNAPSHOT_FIXED)
        return 0;
    *out = (struct qcow2_snapshot){.raw = p,
                                   .l1_offset = be64_load(p + AT_L1_OFFSET),
                                   .l1_entries = be32_load(p + AT_L1_ENTRIES),
                                   .id_length = be16_load(p + AT_ID_LENGTH),
                                   .name_length = be16_load(p + AT_NAME_LENGTH),
                                   .date_sec = be32_load(p + AT_DATE_SEC),
                                   .date_nsec = be32_load(p + AT_DATE_NSEC),
                                   .vm_clock_nsec = be64_load(p + AT_VM_CLOCK),
                                   .vm_state_size = be32_load(p + AT_VM_STATE_32),
                                   .extra_length = be32_load(p + AT_EXTRA_LENGTH),
                                   .disk_size = disk_size,
                                   .icount = SNAPSHOT_ICOUNT_UNKNOWN};
    if (out->extra_length > QCOW2_SNAPSHOT_EXTRA_MAX)
        return err_set(e, EINVAL, "%" PRIu32 " bytes of extra data are above the limit of %d",
                       out->extra_length, QCOW2_SNAPSHOT_EXTRA_MAX);
    out->raw_length = QCOW2_SNAPSHOT_FIXED + out->extra_length + out->id_length + out->name_length;
    if (have < out->raw_length)
        return 0;
    const uint8_t *extra = p + QCOW2_SNAPSHOT_FIXED;
    if (out->extra_length >= EXTRA_VM_STATE + 8)
        out->vm_state_size = be64_load(extra + EXTRA_VM_STATE);
    if (out->extra_length >= EXTRA_DISK_SIZE + 8)
        out->disk_size = be64_load(extra + EXTRA_DISK_SIZE);
    if (out->extra_length >= EXTRA_ICOUNT + 8)
        out->icount = be64_load(extra + EXTRA_ICOUNT);
    out->id = (const char *)extra + out->extra_length;
    out->name = out->id + out->id_length;
    return out->raw_length;
}

/* ---------------------------------------------------------------- building the next table */

static void pad(struct strbuf *b, size_t start) {
    while ((b->len - start) % 8)
        strbuf_add(b, "", 1);
}

static void put_entry(struct strbuf *b, const struct qcow2_snapshot *x, uint32_t extra_length,
                      const uint8_t *extra) {
    uint8_t f[QCOW2_SNAPSHOT_FIXED];
    size_t start = b->len;
    be64_store(f + AT_L1_OFFSET, x->l1_offset);
    be32_store(f + AT_L1_ENTRIES, x->l1_entries);
    be16_store(f + AT_ID_LENGTH, x->id_length);
    be16_store(f + AT_NAME_LENGTH, x->name_length);
    be32_store(f + AT_DATE_SEC, x->date_sec);
    be32_store(f + AT_DATE_NSEC, x->date_nsec);
    be64_store(f + AT_VM_CLOCK, x->vm_clock_nsec);
    /* A size that does not fit here is only in the extra data. */
    be32_store(f + AT_VM_STATE_32, x->vm_state_size <= UINT32_MAX ? (uint32_t)x->vm_state_size : 0);
    be32_store(f + AT_EXTRA_LENGTH, extra_length);
    strbuf_add(b, (const char *)f, sizeof(f));
    strbuf_add(b, (const char *)extra, extra_length);
    strbuf_add(b, x->id, x->id_length);
    strbuf_add(b, x->name, x->name_length);
    pad(b, start);
}

static void full_extra(const struct qcow2_snapshot *x, uint8_t extra[QCOW2_SNAPSHOT_EXTRA_FULL]) {
    be64_store(extra + EXTRA_VM_STATE, x->vm_state_size);
    be64_store(extra + EXTRA_DISK_SIZE, x->disk_size);
    be64_store(extra + EXTRA_ICOUNT, x->icount);
}

void qcow2_snapshot_encode(struct strbuf *b, const struct snapshot_info *info, uint64_t l1_offset,
                           uint32_t l1_entries) {
    uint8_t extra[QCOW2_SNAPSHOT_EXTRA_FULL];
    const struct qcow2_snapshot x = {.l1_offset = l1_offset,
                                     .l1_entries = l1_entries,
                                     .id = info->id,
                                     .name = info->name,
                                     .id_length = (uint16_t)strlen(info->id),
                                     .name_length = (uint16_t)strlen(info->name),
                                     .date_sec = info->date_sec,
                                     .date_nsec = info->date_nsec,
                                     .vm_clock_nsec = info->vm_clock_nsec,
                                     .vm_state_size = info->vm_state_size,
                                     .disk_size = info->disk_size,
                                     .icount = info->icount};
    full_extra(&x, extra);
    put_entry(b, &x, sizeof(extra), extra);
}

void qcow2_snapshot_append(struct strbuf *b, const struct qcow2_snapshot *x) {
    uint8_t extra[QCOW2_SNAPSHOT_EXTRA_FULL];
    size_t start = b->len;
    if (x->extra_length >= QCOW2_SNAPSHOT_EXTRA_SIZE) {
        strbuf_add(b, (const char *)x->raw, x->raw_length);
        pad(b, start);
        return;
    }
    full_extra(x, extra);
    put_entry(b, x, sizeof(extra), extra);
}

/* ---------------------------------------------------------------- reading */

/* At least `want` bytes of the table in t->bytes, or all that the file has. */
static int load_more_co(struct qcow2 *s, struct qcow2_snapshots *t, uint64_t want, struct err *e) {
    uint64_t at = s->h.snapshots_offset, end = s->file->size;
    uint64_t there = end > at ? min_u64(end - at, QCOW2_SNAPSHOT_TABLE_MAX) : 0;
    uint64_t length = min_u64(there, max_u64(align_up(want, TABLE_PIECE), t->length * 2));
    if (length <= t->length)
        return 0;
    uint8_t *grown = realloc(t->bytes, length);
    if (!grown)
        return err_set(e, ENOMEM, "no memory for the snapshot table");
    t->bytes = grown;
    int r = disk_pread_co(s->file, at + t->length, grown + t->length, length - t->length);
    if (r < 0)
        return err_errno(e, -r, "reading the snapshot table at %" PRIu64, at);
    t->length = length;
    return 0;
}

/* Entry `i` at *at, which moves behind it.  Its pointers are set when all have been read. */
static int load_entry_co(struct qcow2 *s, struct qcow2_snapshots *t, uint32_t i, uint64_t *at,
                         struct err *e) {
    struct err why AUTO_ERR = ERR_INIT;
    struct qcow2_snapshot *x = &t->v[i];
    uint64_t want = QCOW2_SNAPSHOT_FIXED;
    *at = align_up(*at, 8);
    for (int tries = 0; tries < 3; tries++) {
        int64_t n = 0;
        if (*at < t->length)
            n = qcow2_snapshot_decode(t->bytes + *at, t->length - *at, s->h.size, x, &why);
        if (n < 0)
            return err_set(e, EINVAL, "snapshot %" PRIu32 " of %" PRIu32 ": %s", i + 1,
                           s->h.nb_snapshots, err_text(&why));
        if (n > 0) {
            *at += (uint64_t)n;
            return 0;
        }
        if (*at + QCOW2_SNAPSHOT_FIXED <= t->length)
            want = x->raw_length;
        int r = load_more_co(s, t, *at + want, e);
        if (r < 0)
            return r;
    }
    return err_set(e, EINVAL,
                   "snapshot table: entry %" PRIu32 " of %" PRIu32 " at offset %" PRIu64
                   " reaches beyond the end of the file or %d bytes of table",
                   i + 1, s->h.nb_snapshots, s->h.snapshots_offset + *at, QCOW2_SNAPSHOT_TABLE_MAX);
}

int qcow2_snapshots_load_co(struct qcow2 *s, struct qcow2_snapshots *out, struct err *e) {
    AUTO_QCOW2_SNAPSHOTS struct qcow2_snapshots t = {0};
    uint64_t at = 0;
    *out = t;
    int r = qcow2_header_check_snapshots(&s->h, e);
    if (r < 0 || !s->h.nb_snapshots)
        return r;
    /* A table in a file this short cannot have more. */
    if (s->h.nb_snapshots > s->file->size / QCOW2_SNAPSHOT_FIXED + 1)
        return err_set(e, EINVAL, "a file of %" PRIu64 " bytes cannot hold %" PRIu32 " snapshots",
                       s->file->size, s->h.nb_snapshots);
    t.v = calloc(s->h.nb_snapshots, sizeof(*t.v));
    if (!t.v)
        return err_set(e, ENOMEM, "no memory for %" PRIu32 " snapshots", s->h.nb_snapshots);
    for (uint32_t i = 0; !r && i < s->h.nb_snapshots; i++)
        r = load_entry_co(s, &t, i, &at, e);
    if (r < 0)
        return r;
    at = 0;
    for (t.count = 0; t.count < s->h.nb_snapshots; t.count++) { /* the bytes stay where they are */
        struct qcow2_snapshot *x = &t.v[t.count];
        at = align_up(at, 8);
        at += (uint64_t)qcow2_snapshot_decode(t.bytes + at, t.length - at, s->h.size, x, NULL);
    }
    t.length = at;
    *out = t;
    t = (struct qcow2_snapshots){0};
    return 0;
}

void qcow2_snapshots_free(struct qcow2_snapshots *t) {
    free(t->bytes);
    free(t->v);
    *t = (struct qcow2_snapshots){0};
}

/* ---------------------------------------------------------------- looking things up */

static bool text_is(const char *text, uint16_t length, const char *want) {
    size_t n = strnlen(text, length); /* what lies behind a NUL is not shown either */
    return n == strlen(want) && !memcmp(text, want, n);
}

const struct qcow2_snapshot *qcow2_snapshot_by_id(const struct qcow2_snapshots *t, const char *id) {
    for (uint32_t i = 0; i < t->count; i++)
        if (text_is(t->v[i].id, t->v[i].id_length, id))
            return &t->v[i];
    return NULL;
}

uint64_t qcow2_snapshot_next_id(const struct qcow2_snapshots *t) {
    uint64_t max = 0;
    for (uint32_t i = 0; i < t->count; i++) {
        char text[20];
        size_t n = strnlen(t->v[i].id, t->v[i].id_length);
        if (!n || n >= sizeof(text) - 1 || t->v[i].id[0] < '0' || t->v[i].id[0] > '9')
            continue; /* no number, or one so long that there is room for all others below it */
        memcpy(text, t->v[i].id, n);
        text[n] = 0;
        max = max_u64(max, strtoull(text, NULL, 10));
    }
    return max + 1;
}

static int check_l1(const struct qcow2 *s, const struct qcow2_snapshot *x, struct err *e) {
    uint64_t bytes = (uint64_t)x->l1_entries * 8, end;
    if (bytes > QCOW2_L1_BYTES_MAX)
        return err_set(e, EINVAL, "its L1 table has %" PRIu32 " entries, above the limit of %d",
                       x->l1_entries, QCOW2_L1_BYTES_MAX / 8);
    if (!is_aligned(x->l1_offset, s->cluster_size) || x->l1_offset >= QCOW2_HOST_LIMIT)
        return err_set(e, EINVAL, "its L1 table's offset %" PRIu64 " is not that of a cluster",
                       x->l1_offset);
    /* The last cluster of a file may be there in part. */
    if (bytes && (!x->l1_offset || !ck_add(x->l1_offset, bytes, &end) ||
                  end > align_up(s->file->size, s->cluster_size)))
        return err_set(e, EINVAL,
                       "its L1 table of %" PRIu64 " bytes at %" PRIu64
                       " is not inside the file, which has %" PRIu64 " bytes",
                       bytes, x->l1_offset, s->file->size);
    return 0;
}

int qcow2_snapshot_l1_co(struct qcow2 *s, const struct qcow2_snapshot *x, uint32_t entries,
                         uint64_t **out, struct err *e) {
    *out = NULL;
    int r = check_l1(s, x, e);
    if (r < 0)
        return r;
    entries = entries > x->l1_entries ? entries : x->l1_entries;
    AUTO_FREE uint64_t *l1 = calloc(entries ? entries : 1, 8);
    if (!l1)
        return err_set(e, ENOMEM, "no memory for an L1 table of %" PRIu32 " entries", entries);
    if (x->l1_entries)
        r = disk_pread_co(s->file, x->l1_offset, l1, (size_t)x->l1_entries * 8);
    if (r < 0)
        return err_errno(e, -r, "reading its L1 table at %" PRIu64, x->l1_offset);
    for (uint32_t i = 0; i < x->l1_entries; i++)
        l1[i] = be64_load(&l1[i]);
    *out = steal(&l1);
    return 0;
}
