/* SPDX-License-Identifier: MIT */
/* QED: the header, opening, and the driver table. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"
#include "disk/open.h"
#include "format/in_place.h"
#include "format/qed/qed.h"

#define PAGES_BYTES (16 * MIB) /* of tables in memory */

uint64_t qed_size_max(uint32_t cluster_size, uint32_t table_size) {
    uint64_t entries = (uint64_t)table_size * cluster_size / 8, bytes;
    if (!ck_mul(entries * entries, (uint64_t)cluster_size, &bytes) || bytes > INT64_MAX)
        return INT64_MAX - 511;
    return bytes;
}

static int check_geometry(const struct qed_header *h, struct err *e) {
    if (h->features & ~(uint64_t)QED_FEATURES)
        return err_set(e, ENOTSUP, "unknown features: bits 0x%" PRIx64 " of the header",
                       h->features & ~(uint64_t)QED_FEATURES);
    if (h->cluster_size < QED_CLUSTER_MIN || h->cluster_size > QED_CLUSTER_MAX ||
        !is_pow2(h->cluster_size))
        return err_set(e, EINVAL,
                       "cluster size %" PRIu32 " is not a power of two from %u to %u bytes",
                       h->cluster_size, QED_CLUSTER_MIN, QED_CLUSTER_MAX);
    if (!h->table_size || h->table_size > QED_TABLE_MAX || !is_pow2(h->table_size))
        return err_set(e, EINVAL,
                       "table size %" PRIu32 " is not a power of two from 1 to %u clusters",
                       h->table_size, QED_TABLE_MAX);
    if (!h->header_size || h->header_size > UINT32_MAX / h->cluster_size)
        return err_set(e, EINVAL,
                       "header size %" PRIu32 " clusters: from 1 to %" PRIu32 " are possible",
                       h->header_size, UINT32_MAX / h->cluster_size);
    if (h->size > qed_size_max(h->cluster_size, h->table_size) || h->size % 512)
        return err_set(e, EINVAL,
                       "disk size %" PRIu64 " is not whole sectors up to %" PRIu64
                       ", what the tables can hold",
                       h->size, qed_size_max(h->cluster_size, h->table_size));
    if (h->features & QED_BACKING_FILE &&
        (h->name_length > QED_NAME_MAX || h->name_offset < QED_HEADER_BYTES ||
         h->name_offset + (uint64_t)h->name_length > (uint64_t)h->header_size * h->cluster_size))
        return err_set(e, EINVAL,
                       "backing file name of %" PRIu32 " bytes at %" PRIu32
                       ": at most %u, inside the header's clusters",
                       h->name_length, h->name_offset, QED_NAME_MAX);
    return 0;
}

int qed_header_parse(const uint8_t *buf, struct qed_header *h, struct err *e) {
    if (le32_load(buf) != QED_MAGIC)
        return err_set(e, EINVAL, "not a QED image: magic 0x%08" PRIx32, le32_load(buf));
    *h = (struct qed_header){
        .cluster_size = le32_load(buf + 4),
        .table_size = le32_load(buf + 8),
        .header_size = le32_load(buf + 12),
        .features = le64_load(buf + 16),
        .compat = le64_load(buf + 24),
        .autoclear = le64_load(buf + 32),
        .l1_offset = le64_load(buf + 40),
        .size = le64_load(buf + 48),
        .name_offset = le32_load(buf + 56),
        .name_length = le32_load(buf + 60),
    };
    return check_geometry(h, e);
}

void qed_header_store(const struct qed_header *h, uint8_t *buf) {
    le32_store(buf, QED_MAGIC);
    le32_store(buf + 4, h->cluster_size);
    le32_store(buf + 8, h->table_size);
    le32_store(buf + 12, h->header_size);
    le64_store(buf + 16, h->features);
    le64_store(buf + 24, h->compat);
    le64_store(buf + 32, h->autoclear);
    le64_store(buf + 40, h->l1_offset);
    le64_store(buf + 48, h->size);
    le32_store(buf + 56, h->name_offset);
    le32_store(buf + 60, h->name_length);
}

int qed_header_write_co(struct qed *s) {
    uint8_t buf[QED_HEADER_BYTES];
    qed_header_store(&s->h, buf);
    return disk_pwrite_co(s->file, 0, buf, sizeof(buf));
}

static int qed_probe(const struct probe_data *p) {
    return p->head_length >= QED_HEADER_BYTES && le32_load(p->head) == QED_MAGIC ? 100 : 0;
}

static int read_backing_name_co(struct node *n, struct err *e) {
    const struct qed_header *h = &qed_of(n)->h;
    if (!(h->features & QED_BACKING_FILE))
        return 0;
    char *name = calloc(1, h->name_length + 1);
    if (!name)
        return err_set(e, ENOMEM, "no memory for the backing file's name");
    int r = h->name_length ? disk_pread_co(n->file, h->name_offset, name, h->name_length) : 0;
    if (r < 0) {
        free(name);
        return err_errno(e, -r, "reading the backing file's name");
    }
    n->backing_name = name;
    if (h->features & QED_BACKING_RAW && !(n->backing_format = strdup("raw")))
        return err_set(e, ENOMEM, "no memory for the backing file's format");
    return 0;
}

static int open_header_co(struct node *n, struct err *e) {
    struct qed *s = qed_of(n);
    uint8_t buf[QED_HEADER_BYTES];
    int r = disk_pread_co(n->file, 0, buf, sizeof(buf));
    if (r)
        return err_errno(e, -r, "reading the header");
    r = qed_header_parse(buf, &s->h, e);
    if (r)
        return r;
    s->cluster_bits = (uint32_t)__builtin_ctz(s->h.cluster_size);
    s->table_bytes = (uint64_t)s->h.table_size * s->h.cluster_size;
    s->entry_bits = (uint32_t)__builtin_ctzll(s->table_bytes / 8);
    s->next = div_up(n->file->size, s->h.cluster_size);
    if (!qed_inside(s, s->h.l1_offset, s->table_bytes))
        return err_set(e, EINVAL,
                       "the L1 table at %" PRIu64 " (%" PRIu64
                       " bytes) is unaligned, in the header, or behind the end of the file",
                       s->h.l1_offset, s->table_bytes);
    n->size = s->h.size;
    n->granularity = s->h.cluster_size;
    return 0;
}

/* What other writers left unfinished is repaired before the first write. */
static int become_writable_co(struct node *n, struct err *e) {
    struct qed *s = qed_of(n);
    if (!(s->h.features & QED_NEED_CHECK) && !s->h.autoclear)
        return 0;
    if (s->h.features & QED_NEED_CHECK) {
        struct check_result found = {.fix = CHECK_FIX_LEAKS | CHECK_FIX_ERRORS};
        int r = qed_check_co(n, &found, e);
        if (r < 0)
            return r;
        if (found.corruptions || found.check_errors) {
            err_set(e, EIO,
                    "the image was not closed cleanly and is damaged (%" PRIu64 " corruptions)",
                    found.corruptions);
            err_hint(e, "look with: strata check");
            return -EIO;
        }
    }
    s->h.features &= ~(uint64_t)QED_NEED_CHECK;
    s->h.autoclear = 0; /* none is known: whoever set one relied on what we do not maintain */
    int r = qed_header_write_co(s);
    if (!r)
        r = disk_flush_co(s->file);
    return r < 0 ? err_errno(e, -r, "writing the header") : 0;
}

static int qed_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct qed *s = qed_of(n);
    s->node = n;
    task_mutex_init(&s->table_lock);
    task_mutex_init(&s->flush_lock);
    int r = node_open_child_co(n, ctx, "file", CHILD_FILE_METADATA, &n->file, e);
    if (!r) {
        s->file = n->file;
        r = open_header_co(n, e);
    }
    if (!r && pages_init(&s->pages, n->file, PAGES_BYTES) < 0)
        r = err_set(e, ENOMEM, "no memory for tables");
    if (!r)
        r = read_backing_name_co(n, e);
    if (!r)
        r = node_open_backing_co(n, ctx, e);
    if (!r && node_is_rw(n) && !(n->flags & NODE_CHECK))
        r = become_writable_co(n, e);
    return r;
}

static void qed_close_co(struct node *n) {
    struct qed *s = qed_of(n);
    pages_free(&s->pages);
    spares_free(&s->spares);
}

static int qed_reopen_co(struct node *n, unsigned new_flags, struct err *e) {
    struct qed *s = qed_of(n);
    if (!(new_flags & NODE_RW) || node_is_rw(n))
        return 0;
    s->next = div_up(n->file->size, s->h.cluster_size);
    return become_writable_co(n, e);
}

static json_t *qed_describe(struct node *n) {
    const struct qed *s = qed_of(n);
    return json_pack("{s:I, s:b}", "table-size", (json_int_t)s->h.table_size, "dirty-flag",
                     (s->h.features & QED_NEED_CHECK) != 0);
}

static const struct opt qed_open_opts[] = {
    OPT_CHILD("file", OPT_OPEN, "the storage"),
    OPT_CHILD("backing", OPT_OPEN, "the image below"),
    OPT_END,
};

static const struct format_ops qed_format = {
    .probe = qed_probe,
    .create_co = qed_create_co,
    .map_co = qed_map_co,
    .place_co = qed_place_co,
    .publish_co = qed_publish_co,
    .abandon = qed_abandon,
    .set_zero_co = qed_set_zero_co,
    .discard_co = in_place_discard_co,
    .reach_co = qed_reach_co,
    .resize_co = qed_resize_co,
    .flush_co = qed_flush_co,
    .set_backing_co = qed_set_backing_co,
    .empty_co = qed_empty_co,
    .repairs = CHECK_FIX_LEAKS | CHECK_FIX_ERRORS,
    .check_co = qed_check_co,
    .describe = qed_describe,
    .measure = qed_measure,
};

const struct driver driver_qed = {
    .name = "qed",
    .kind = DRIVER_FORMAT,
    .help = "QEMU enhanced disk",
    .state_size = sizeof(struct qed),
    .opts = qed_open_opts,
    .create_opts = qed_create_opt_table,
    .create_opts_size = sizeof(struct qed_create_opts),
    .open_co = qed_open_co,
    .close_co = qed_close_co,
    .reopen_co = qed_reopen_co,
    .format = &qed_format,
};
