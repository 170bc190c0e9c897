/* SPDX-License-Identifier: MIT */
/* QED: new images, their size, growth, another backing file. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"
#include "disk/open.h"
#include "format/qed/qed.h"

const struct opt qed_create_opt_table[] = {
    OPT_SIZE(struct qed_create_opts, size, "size", OPT_CREATE, 0, OPT_ANY, "size of the disk"),
    OPT_STR(struct qed_create_opts, backing_file, "backing_file", OPT_CREATE,
            "image below this one"),
    OPT_STR(struct qed_create_opts, backing_fmt, "backing_fmt", OPT_CREATE,
            "format of the backing file"),
    OPT_SIZE(struct qed_create_opts, cluster_size, "cluster_size", OPT_CREATE, 64 * KIB,
             OPT_POW2(QED_CLUSTER_MIN, QED_CLUSTER_MAX), "unit of allocation"),
    OPT_U64(struct qed_create_opts, table_size, "table_size", OPT_CREATE, 4,
            OPT_POW2(1, QED_TABLE_MAX), "clusters of each L1 and L2 table"),
    OPT_END,
};

static int check_size(const struct qed_create_opts *o, uint64_t size, struct err *e) {
    uint64_t most = qed_size_max((uint32_t)o->cluster_size, (uint32_t)o->table_size);
    if (size > most)
        return err_set(e, EFBIG,
                       "disk size %" PRIu64 " is above the limit of %" PRIu64
                       " for clusters of %" PRIu64 " bytes and tables of %" PRIu64,
                       size, most, o->cluster_size, o->table_size);
    return 0;
}

int qed_create_co(struct node *file, const void *create_opts, struct create_ctx *ctx,
                  struct err *e) {
    const struct qed_create_opts *o = create_opts;
    uint8_t buf[QED_HEADER_BYTES + QED_NAME_MAX] = {0};
    size_t name = o->backing_file ? strlen(o->backing_file) : 0;
    uint64_t table = o->table_size * o->cluster_size;
    struct qed_header h = {
        .cluster_size = (uint32_t)o->cluster_size,
        .table_size = (uint32_t)o->table_size,
        .header_size = 1,
        .l1_offset = o->cluster_size,
        .size = align_up(o->size, 512),
    };
    int r = check_size(o, h.size, e);
    if (r)
        return r;
    if (name > QED_NAME_MAX)
        return err_set(e, EINVAL, "the backing file's name has %zu bytes, at most %u are possible",
                       name, QED_NAME_MAX);
    if (name) {
        h.features = QED_BACKING_FILE;
        h.name_offset = QED_HEADER_BYTES;
        h.name_length = (uint32_t)name;
        memcpy(buf + QED_HEADER_BYTES, o->backing_file, name);
        if (o->backing_fmt && !strcmp(o->backing_fmt, "raw"))
            h.features |= QED_BACKING_RAW;
    }
    qed_header_store(&h, buf);
    r = disk_resize_co(file, h.l1_offset + table, PREALLOC_OFF, e);
    if (r)
        return r;
    if (!(file->storage_flags & STORAGE_ZERO_INIT))
        r = disk_zero_co(file, h.l1_offset, table, 0);
    if (!r)
        r = disk_pwrite_co(file, 0, buf, QED_HEADER_BYTES + name);
    return r ? err_errno(e, -r, "writing the header") : 0;
}

int qed_measure(const void *create_opts, const struct measure_in *in, struct measure_result *out,
                struct err *e) {
    const struct qed_create_opts *o = create_opts;
    uint64_t size = in->size;
    int r = check_size(o, align_up(size, 512), e);
    if (r)
        return r;
    unsigned cluster_bits = (unsigned)__builtin_ctzll(o->cluster_size);
    uint64_t table = o->table_size * o->cluster_size, fixed = o->cluster_size + table;
    unsigned covers = cluster_bits + (unsigned)__builtin_ctzll(table / 8); /* bits of a table */
    uint64_t tables = div_up(size, UINT64_C(1) << covers);
    out->fully_allocated = fixed + tables * table + align_up(size, o->cluster_size);
    out->required =
        fixed + in->touched[covers] * table + in->touched[cluster_bits] * o->cluster_size;
    out->bound_fully = out->fully_allocated;
    out->bound_required = fixed + tables * table + in->touched[cluster_bits] * o->cluster_size;
    return 0;
}

/* The tables cover the largest disk from the start. */
int qed_reach_co(struct node *n, uint64_t size, struct err *e) {
    const struct qed *s = qed_of(n);
    uint64_t most = qed_size_max(s->h.cluster_size, s->h.table_size);
    if (size % 512)
        return err_set(e, EINVAL, "size %" PRIu64 " is not a multiple of 512", size);
    if (size > most)
        return err_set(e, EFBIG,
                       "size %" PRIu64 " is above the limit of %" PRIu64
                       ", what the tables can hold",
                       size, most);
    return 0;
}

int qed_resize_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    struct qed *s = qed_of(n);
    uint64_t old = s->h.size;
    if (prealloc != PREALLOC_OFF)
        return err_set(e, ENOTSUP, "a QED image grows without preallocation only");
    if (size < n->size)
        return err_set(e, ENOTSUP, "a QED image cannot shrink; convert it instead");
    s->h.size = size;
    int r = qed_header_write_co(s);
    if (r < 0) {
        s->h.size = old;
        return err_errno(e, -r, "writing the header");
    }
    n->size = size;
    return 0;
}

/* Without names in the L1 table nothing behind it is in use. */
int qed_empty_co(struct node *n, struct err *e) {
    struct qed *s = qed_of(n);
    uint64_t end = s->h.l1_offset + s->table_bytes;
    int r = qed_flush_co(n);
    if (!r)
        r = pages_forget_all(&s->pages);
    if (!r)
        r = disk_zero_co(s->file, s->h.l1_offset, s->table_bytes, 0);
    if (!r)
        r = disk_flush_co(s->file);
    if (r < 0)
        return err_errno(e, -r, "clearing the L1 table");
    s->spares.count = 0;
    s->next = div_up(end, s->h.cluster_size);
    r = disk_resize_co(s->file, end, PREALLOC_OFF, NULL);
    if (r < 0) /* a device keeps its size */
        s->next = max_u64(s->next, div_up(s->file->size, s->h.cluster_size));
    return 0;
}

/*
 * The name that is recorded stays as it is until the header, one sector, names the other one: the
 * new one goes to a place in the header's clusters that the old one does not use.
 */
static int place_name(const struct qed *s, size_t length, uint32_t *offset) {
    uint64_t room = (uint64_t)s->h.header_size * s->h.cluster_size;
    uint64_t at = 512; /* not in the sector of the header */
    if (s->h.features & QED_BACKING_FILE && s->h.name_offset < at + length)
        at = align_up(max_u64(at, (uint64_t)s->h.name_offset + s->h.name_length), 512);
    if (at + length > room)
        return -ENOSPC;
    *offset = (uint32_t)at;
    return 0;
}

int qed_set_backing_co(struct node *n, const char *name, const char *format, struct err *e) {
    struct qed *s = qed_of(n);
    struct qed_header before = s->h;
    size_t length = name ? strlen(name) : 0;
    uint32_t at = 0;
    if (length > QED_NAME_MAX || (length && place_name(s, length, &at) < 0))
        return err_set(e, ENOSPC, "no room in the header for a name of %zu bytes", length);
    char *own = name ? strdup(name) : NULL;
    char *own_format = name && format ? strdup(format) : NULL;
    if ((name && !own) || (name && format && !own_format)) {
        free(own);
        free(own_format);
        return err_set(e, ENOMEM, "no memory for the name");
    }
    int r = length ? disk_pwrite_co(s->file, at, name, length) : 0;
    if (!r && length)
        r = disk_flush_co(s->file);
    s->h.features &= ~(uint64_t)(QED_BACKING_FILE | QED_BACKING_RAW);
    if (name)
        s->h.features |= QED_BACKING_FILE;
    if (name && format && !strcmp(format, "raw"))
        s->h.features |= QED_BACKING_RAW;
    s->h.name_offset = name ? at : 0;
    s->h.name_length = (uint32_t)length;
    if (!r)
        r = qed_header_write_co(s);
    if (r < 0) {
        s->h = before;
        free(own);
        free(own_format);
        return err_errno(e, -r, "writing the header");
    }
    free(n->backing_name);
    free(n->backing_format);
    n->backing_name = own;
    n->backing_format = own_format;
    return 0;
}
