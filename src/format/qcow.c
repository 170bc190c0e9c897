/* SPDX-License-Identifier: MIT */
/*
 * qcow, version 1: a two-level map with compressed clusters, without reference counts.
 *
 *      | header | backing name | L1 table | clusters: L2 tables, data, coded data |
 *
 * An L1 entry is 0 or the offset of an L2 table.  An L2 entry is 0 (the layer below decides), the
 * offset of a cluster, or, with the top bit, the offset (any byte) and the exact length of a coded
 * cluster.  Numbers are big-endian.  The map cannot say "zeros": over a backing file they are
 * written.  New room is taken at the end of the file.
 *
 * Write order of a flush: data and empty tables, a barrier; L2 entries, a barrier; L1 entries, a
 * barrier.  A crash leaves room without a name at most.
 *
 * Facts: libyal/libqcow documentation; behaviour of qemu/qemu block/qcow.c (defaults, rounding).
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "base/plant.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "format/in_place.h"
#include "format/pages.h"
#include "format/codec.h"
#include "runtime/task.h"

#define MAGIC 0x514649fbu
#define HEADER_BYTES 48u
#define NAME_MAX_BYTES 1023u
#define L1_BYTES_MAX ((uint64_t)1 << 31)
#define PAGES_BYTES (12 * MIB)
#define COMPRESSED (UINT64_C(1) << 63)

enum { LEVEL_L2, LEVEL_L1 };

struct qcow {
    struct node *node, *file;
    uint32_t cluster_bits, l2_bits;
    uint64_t cluster_size, l2_bytes;
    uint64_t l1_offset, l1_entries;
    uint64_t end; /* nothing uses bytes from here on */
    struct pages pages;
    struct task_mutex table_lock, flush_lock;
};

static struct qcow *qcow_of(struct node *n) {
    return n->state;
}

static int qcow_flush_co(struct node *n);

/* ---------------------------------------------------------------- opening */

static int qcow_probe(const struct probe_data *p) {
    return p->head_length >= HEADER_BYTES && be32_load(p->head) == MAGIC &&
                   be32_load(p->head + 4) == 1
               ? 100
               : 0;
}

static int parse_header(struct node *n, const uint8_t *h, struct err *e) {
    struct qcow *s = qcow_of(n);
    uint32_t crypt = be32_load(h + 36);
    if (be32_load(h) != MAGIC || be32_load(h + 4) != 1)
        return err_set(e, EINVAL, "not a qcow image of version 1");
    s->cluster_bits = h[32];
    s->l2_bits = h[33];
    if (s->cluster_bits < 9 || s->cluster_bits > 16)
        return err_set(e, EINVAL, "cluster_bits %" PRIu32 " is not from 9 to 16", s->cluster_bits);
    if (s->l2_bits < 6 || s->l2_bits > 13)
        return err_set(e, EINVAL, "l2_bits %" PRIu32 " is not from 6 to 13", s->l2_bits);
    if (crypt)
        return err_set(e, ENOTSUP, "encryption (method %" PRIu32 ") is not supported", crypt);
    uint64_t size = be64_load(h + 24);
    if (size <= 1 || size > INT64_MAX)
        return err_set(e, EINVAL, "disk size %" PRIu64 " is not from 2 to %" PRId64, size,
                       INT64_MAX);
    n->size = align_down(size, 512);
    s->cluster_size = UINT64_C(1) << s->cluster_bits;
    s->l2_bytes = UINT64_C(8) << s->l2_bits;
    s->l1_entries = div_up(n->size, UINT64_C(1) << (s->cluster_bits + s->l2_bits));
    s->l1_offset = be64_load(h + 40);
    if (s->l1_entries * 8 > L1_BYTES_MAX)
        return err_set(e, EFBIG,
                       "an L1 table of %" PRIu64 " entries is above the limit of %" PRIu64,
                       s->l1_entries, L1_BYTES_MAX / 8);
    if (s->l1_offset < HEADER_BYTES || s->l1_offset > INT64_MAX - L1_BYTES_MAX)
        return err_set(e, EINVAL, "an L1 table at %" PRIu64, s->l1_offset);
    return 0;
}

static int read_backing_name_co(struct node *n, const uint8_t *h, struct err *e) {
    uint64_t at = be64_load(h + 8);
    uint32_t length = be32_load(h + 16);
    if (!at)
        return 0;
    if (length > NAME_MAX_BYTES || at > n->file->size || length > n->file->size - at)
        return err_set(e, EINVAL,
                       "backing file name of %" PRIu32 " bytes at %" PRIu64
                       ": at most %u, inside the file",
                       length, at, NAME_MAX_BYTES);
    char *name = calloc(1, length + 1);
    int r = name ? disk_pread_co(n->file, at, name, length) : -ENOMEM;
    if (r < 0) {
        free(name);
        return err_errno(e, -r, "reading the backing file's name");
    }
    n->backing_name = name;
    return 0;
}

/* The last cluster may reach beyond the end of the file, where it reads as zeros: no code fits in
 * there. */
static void find_end(struct qcow *s) {
    s->end = align_up(s->file->size, s->cluster_size);
}

static int qcow_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct qcow *s = qcow_of(n);
    uint8_t h[HEADER_BYTES];
    s->node = n;
    task_mutex_init(&s->table_lock);
    task_mutex_init(&s->flush_lock);
    int r = node_open_child_co(n, ctx, "file", CHILD_FILE_METADATA, &n->file, e);
    if (r)
        return r;
    s->file = n->file;
    if ((r = disk_pread_co(n->file, 0, h, sizeof(h))) < 0)
        return err_errno(e, -r, "reading the header");
    r = parse_header(n, h, e);
    if (!r && pages_init(&s->pages, n->file, PAGES_BYTES) < 0)
        r = err_set(e, ENOMEM, "no memory for tables");
    if (!r)
        r = read_backing_name_co(n, h, e);
    if (!r)
        r = node_open_backing_co(n, ctx, e);
    n->granularity = (uint32_t)s->cluster_size;
    n->codec = &codec_deflate;
    if (!r)
        find_end(s);
    return r;
}

static void qcow_close_co(struct node *n) {
    pages_free(&qcow_of(n)->pages);
}

static int qcow_reopen_co(struct node *n, unsigned new_flags, struct err *e) {
    if (new_flags & NODE_RW && !node_is_rw(n))
        find_end(qcow_of(n));
    return 0;
}

/* ---------------------------------------------------------------- the map */

static int table_page_co(struct qcow *s, uint64_t table, uint64_t bytes, uint64_t index,
                         unsigned level, struct page **page, uint8_t **at, uint32_t *left) {
    uint64_t start = index * 8 / PAGE_BYTES * PAGE_BYTES;
    uint32_t length = (uint32_t)min_u64(PAGE_BYTES, bytes - start);
    int r = pages_get_co(&s->pages, table + start, length, level, page);
    if (r < 0)
        return r;
    *at = (*page)->data + (index * 8 - start);
    *left = (uint32_t)(length - (index * 8 - start)) / 8;
    return 0;
}

static int l1_page_co(struct qcow *s, uint64_t offset, struct page **page, uint8_t **at) {
    uint32_t left;
    return table_page_co(s, s->l1_offset, s->l1_entries * 8,
                         offset >> (s->cluster_bits + s->l2_bits), LEVEL_L1, page, at, &left);
}

static int l2_page_co(struct qcow *s, uint64_t table, uint64_t offset, struct page **page,
                      uint8_t **at, uint32_t *left) {
    uint64_t index = (offset >> s->cluster_bits) & ((UINT64_C(1) << s->l2_bits) - 1);
    return table_page_co(s, table, s->l2_bytes, index, LEVEL_L2, page, at, left);
}

/* The L2 table that covers `offset`; 0: none. */
static int l2_table_co(struct qcow *s, uint64_t offset, uint64_t *table) {
    struct page *page;
    uint8_t *at = NULL;
    int r = l1_page_co(s, offset, &page, &at);
    if (r < 0)
        return r;
    *table = be64_load(at);
    /* A new table may lie behind the end of the file until the next flush. */
    bool sane = *table >= HEADER_BYTES && *table < max_u64(s->file->size, s->end);
    return *table && !sane ? -EIO : 0;
}

static int map_coded(const struct qcow *s, uint64_t entry, uint64_t offset, uint64_t length,
                     struct extent *out) {
    unsigned shift = 63 - s->cluster_bits;
    *out = (struct extent){
        .kind = EXTENT_CODED,
        .storage = s->file,
        .codec = s->node->codec,
        .host_offset = entry & ((UINT64_C(1) << shift) - 1),
        .coded_length = (uint32_t)(entry >> shift) & (uint32_t)(s->cluster_size - 1),
        .unit_offset = align_down(offset, s->cluster_size),
        .unit_length = (uint32_t)s->cluster_size,
        .length = min_u64(length, s->cluster_size - (offset & (s->cluster_size - 1))),
    };
    return out->coded_length && out->host_offset >= HEADER_BYTES && out->host_offset < s->file->size
               ? 0
               : -EIO;
}

static bool data_is_sane(const struct qcow *s, uint64_t entry) {
    return !(entry & COMPRESSED) && entry >= HEADER_BYTES && entry < s->file->size;
}

static int qcow_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    struct qcow *s = qcow_of(n);
    uint64_t cs = s->cluster_size, in = offset & (cs - 1), table;
    struct page *page;
    uint8_t *at = NULL;
    uint32_t left, run = 1;
    int r = l2_table_co(s, offset, &table);
    if (r < 0)
        return r;
    if (!table) {
        uint64_t covers = UINT64_C(1) << (s->cluster_bits + s->l2_bits);
        *out = (struct extent){.length = min_u64(length, covers - (offset & (covers - 1))),
                               .kind = EXTENT_HOLE};
        return 0;
    }
    r = l2_page_co(s, table, offset, &page, &at, &left);
    if (r < 0)
        return r;
    uint64_t first = be64_load(at);
    if (first & COMPRESSED)
        return map_coded(s, first, offset, length, out);
    if (first && !data_is_sane(s, first))
        return -EIO;
    while (run < left && run * cs < in + length) {
        uint64_t next = be64_load(at + (size_t)run * 8);
        if (first ? next != first + run * cs || !data_is_sane(s, next) : next != 0)
            break;
        run++;
    }
    *out = (struct extent){.length = min_u64(length, run * cs - in),
                           .kind = first ? EXTENT_DATA : EXTENT_HOLE};
    if (first) {
        out->flags = EXTENT_IN_PLACE;
        out->storage = s->file;
        out->host_offset = first + in;
    }
    return 0;
}

/* ---------------------------------------------------------------- room */

static bool is_fresh(const struct qcow *s, uint64_t host, uint64_t file_end) {
    return s->file->storage_flags & STORAGE_ZERO_INIT && host >= file_end;
}

/* As l2_table_co, making an empty table where there is none. */
static int l2_table_writable_co(struct qcow *s, uint64_t offset, uint64_t *table) {
    struct page *page;
    uint8_t *at = NULL;
    int r = l2_table_co(s, offset, table);
    if (r < 0 || *table)
        return r;
    task_mutex_lock_co(&s->table_lock);
    r = l2_table_co(s, offset, table);
    if (!r && !*table) {
        uint64_t file_end = s->file->size;
        *table = align_up(s->end, s->cluster_size);
        s->end = *table + s->l2_bytes;
        if (!is_fresh(s, *table, file_end))
            r = disk_zero_co(s->file, *table, s->l2_bytes, 0);
        for (uint64_t in = 0; !r && in < s->l2_bytes; in += PAGE_BYTES)
            r = pages_get_new(&s->pages, *table + in,
                              (uint32_t)min_u64(PAGE_BYTES, s->l2_bytes - in), LEVEL_L2, &page);
        if (!r)
            r = l1_page_co(s, offset, &page, &at);
        if (!r) {
            pages_modify(&s->pages, page);
            be64_store(at, *table);
        }
    }
    task_mutex_unlock(&s->table_lock);
    return r;
}

static int place_coded(struct qcow *s, uint64_t offset, uint64_t length, uint32_t coded_length,
                       struct placement *out) {
    unsigned shift = 63 - s->cluster_bits;
    if (!coded_length || coded_length >= s->cluster_size ||
        s->end + coded_length > UINT64_C(1) << shift)
        return -ENOSPC;
    *out = (struct placement){
        .offset = offset,
        .length = length,
        .storage = s->file,
        .host_offset = s->end,
        .coded_length = coded_length,
        .is_new = true,
        .cookie = {COMPRESSED | (uint64_t)coded_length << shift | s->end, 1},
    };
    s->end += coded_length;
    return 0;
}

static int qcow_place_co(struct node *n, uint64_t offset, uint64_t length, unsigned flags,
                         uint32_t coded_length, struct placement *out) {
    struct qcow *s = qcow_of(n);
    uint64_t cs = s->cluster_size, in = offset & (cs - 1), table;
    struct extent x;
    int r = pages_crowded(&s->pages) ? qcow_flush_co(n) : 0;
    if (!r)
        r = l2_table_writable_co(s, offset, &table);
    if (!r)
        r = qcow_map_co(n, offset, length, &x);
    if (r < 0)
        return r;
    if (flags & PLACE_CODED)
        return place_coded(s, offset, length, coded_length, out);
    *out = (struct placement){.offset = offset, .length = x.length, .storage = s->file};
    if (x.kind == EXTENT_DATA) {
        out->host_offset = x.host_offset;
        return 0;
    }
    uint64_t host = align_up(s->end, cs), count = div_up(in + x.length, cs);
    if (host + count * cs > INT64_MAX)
        return -EFBIG;
    s->end = host + count * cs;
    out->host_offset = host + in;
    out->head = (uint32_t)in;
    out->tail = (uint32_t)((cs - ((in + x.length) & (cs - 1))) & (cs - 1));
    out->is_new = true;
    out->reads_zero = is_fresh(s, host, s->file->size);
    out->cookie[0] = host;
    out->cookie[1] = count;
    return 0;
}

static int qcow_publish_co(struct node *n, const struct placement *p) {
    struct qcow *s = qcow_of(n);
    uint64_t offset = align_down(p->offset, s->cluster_size), entry = p->cookie[0];
    for (uint64_t count = p->is_new ? p->cookie[1] : 0; count;) {
        struct page *page;
        uint8_t *at = NULL;
        uint32_t left = 0;
        uint64_t table;
        int r = l2_table_writable_co(s, offset, &table);
        if (!r)
            r = l2_page_co(s, table, offset, &page, &at, &left);
        if (r < 0)
            return r;
        pages_modify(&s->pages, page);
        for (; left && count; left--, count--, at += 8) {
            be64_store(at, entry);
            entry += s->cluster_size;
            offset += s->cluster_size;
        }
    }
    return 0;
}

/* The room stays unused, unless it is the last. */
static void qcow_abandon(struct node *n, const struct placement *p) {
    struct qcow *s = qcow_of(n);
    uint64_t length = p->coded_length ? p->coded_length : p->cookie[1] * s->cluster_size;
    uint64_t host = p->coded_length ? p->host_offset : p->cookie[0];
    if (p->is_new && host + length == s->end)
        s->end = host;
}

/* No entry says zeros: data is zeroed where it lies, and what shows the layer below gets room. */
static int qcow_set_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    struct qcow *s = qcow_of(n);
    bool below = n->backing || n->backing_name;
    zero_flags = in_place_zero_flags(n, zero_flags);
    for (uint64_t done = 0; done < length;) {
        struct extent x;
        struct placement p;
        int r = qcow_map_co(n, offset + done, length - done, &x);
        if (!r && x.kind == EXTENT_DATA) {
            r = disk_zero_co(s->file, x.host_offset, x.length, zero_flags);
        } else if (!r && (x.kind == EXTENT_CODED || below)) {
            r = qcow_place_co(n, offset + done, x.length, 0, 0, &p);
            if (!r)
                r = disk_zero_co(s->file, p.host_offset, p.length + p.tail, zero_flags);
            if (!r)
                r = qcow_publish_co(n, &p);
            x.length = r ? x.length : p.length;
        }
        if (r < 0)
            return r;
        done += x.length;
    }
    return 0;
}

static int write_level_co(struct qcow *s, struct pages_batch *b) {
    if (!b->count)
        return 0;
    int r = pages_write_co(&s->pages, b);
    return r < 0 || PLANTED(NO_LAST_BARRIER) ? r : disk_flush_co(s->file);
}

static int qcow_flush_co(struct node *n) {
    struct qcow *s = qcow_of(n);
    struct pages_batch l1 = {0}, l2 = {0};
    task_mutex_lock_co(&s->flush_lock);
    int r = pages_take(&s->pages, LEVEL_L2, &l2);
    if (!r)
        r = pages_take(&s->pages, LEVEL_L1, &l1);
    /* What is named is there whole: other writers put code right behind the end of the file. */
    if (!r && (l1.count || l2.count) && s->file->size < s->end)
        r = disk_resize_co(s->file, s->end, PREALLOC_OFF, NULL);
    if (!r && PLANTED(TABLE_NAMED_EARLY))
        r = pages_write_co(&s->pages, &l1);
    if (!r && !PLANTED(NO_BARRIER_BEFORE_TABLES))
        r = disk_flush_co(s->file);
    if (!r)
        r = write_level_co(s, &l2);
    if (!r)
        r = write_level_co(s, &l1);
    pages_give_back(&s->pages, &l2);
    pages_give_back(&s->pages, &l1);
    task_mutex_unlock(&s->flush_lock);
    return r;
}

static int qcow_empty_co(struct node *n, struct err *e) {
    struct qcow *s = qcow_of(n);
    uint64_t end = s->l1_offset + s->l1_entries * 8;
    int r = qcow_flush_co(n);
    if (!r)
        r = pages_forget_all(&s->pages);
    if (!r)
        r = disk_zero_co(s->file, s->l1_offset, s->l1_entries * 8, 0);
    if (!r)
        r = disk_flush_co(s->file);
    if (r < 0)
        return err_errno(e, -r, "clearing the L1 table");
    if (!disk_resize_co(s->file, end, PREALLOC_OFF, NULL)) /* a device keeps its size */
        s->end = end;
    return 0;
}

/* ---------------------------------------------------------------- creation */

struct qcow_create_opts {
    uint64_t size;
    char *backing_file, *backing_fmt;
};

static const struct opt qcow_create_opts[] = {
    OPT_SIZE(struct qcow_create_opts, size, "size", OPT_CREATE, 0, OPT_ANY, "size of the disk"),
    OPT_STR(struct qcow_create_opts, backing_file, "backing_file", OPT_CREATE,
            "image below this one"),
    OPT_STR(struct qcow_create_opts, backing_fmt, "backing_fmt", OPT_CREATE,
            "format of the backing file; the image cannot record it"),
    OPT_END,
};

struct layout {
    unsigned cluster_bits, l2_bits;
    uint64_t size, l1_offset, l1_bytes; /* the table in whole sectors */
};

/* Over a backing file clusters are small, so that little is copied. */
static int layout_compute(const struct qcow_create_opts *o, uint64_t size, struct layout *l,
                          struct err *e) {
    size_t name = o->backing_file ? strlen(o->backing_file) : 0;
    *l = (struct layout){.cluster_bits = name ? 9 : 12,
                         .l2_bits = name ? 12 : 9,
                         .size = align_up(size, 512),
                         .l1_offset = align_up(HEADER_BYTES + name, 8)};
    uint64_t entries = div_up(l->size, UINT64_C(1) << (l->cluster_bits + l->l2_bits));
    l->l1_bytes = align_up(entries * 8, 512);
    if (!size)
        return err_set(e, EINVAL, "a qcow image cannot have the size 0");
    if (l->l1_bytes > L1_BYTES_MAX)
        return err_set(e, EFBIG, "disk size %" PRIu64 " is above the limit of %" PRIu64 " bytes",
                       size, (L1_BYTES_MAX / 8) << (l->cluster_bits + l->l2_bits));
    if (name > NAME_MAX_BYTES)
        return err_set(e, EINVAL, "the backing file's name has %zu bytes, at most %u are possible",
                       name, NAME_MAX_BYTES);
    return 0;
}

static int qcow_create_co(struct node *file, const void *create_opts, struct create_ctx *ctx,
                          struct err *e) {
    const struct qcow_create_opts *o = create_opts;
    uint8_t buf[HEADER_BYTES + NAME_MAX_BYTES] = {0};
    size_t name = o->backing_file ? strlen(o->backing_file) : 0;
    struct layout l;
    int r = layout_compute(o, o->size, &l, e);
    if (r)
        return r;
    be32_store(buf, MAGIC);
    be32_store(buf + 4, 1);
    be64_store(buf + 24, l.size);
    buf[32] = (uint8_t)l.cluster_bits;
    buf[33] = (uint8_t)l.l2_bits;
    be64_store(buf + 40, l.l1_offset);
    if (name) {
        be64_store(buf + 8, HEADER_BYTES);
        be32_store(buf + 16, (uint32_t)name);
        memcpy(buf + HEADER_BYTES, o->backing_file, name);
    }
    r = disk_resize_co(file, l.l1_offset + l.l1_bytes, PREALLOC_OFF, e);
    if (r)
        return r;
    if (!(file->storage_flags & STORAGE_ZERO_INIT))
        r = disk_zero_co(file, l.l1_offset, l.l1_bytes, 0);
    if (!r)
        r = disk_pwrite_co(file, 0, buf, HEADER_BYTES + name);
    return r ? err_errno(e, -r, "writing the header") : 0;
}

static int qcow_measure(const void *create_opts, const struct measure_in *in,
                        struct measure_result *out, struct err *e) {
    struct layout l;
    int r = layout_compute(create_opts, in->size, &l, e);
    if (r)
        return r;
    unsigned covers = l.cluster_bits + l.l2_bits;
    uint64_t table = UINT64_C(8) << l.l2_bits, cluster = UINT64_C(1) << l.cluster_bits;
    uint64_t first = align_up(l.l1_offset + l.l1_bytes, cluster);
    uint64_t tables = div_up(l.size, UINT64_C(1) << covers) * table;
    uint64_t all = in->touched[covers] * table + in->touched[l.cluster_bits] * cluster;
    out->required = all ? first + all : l.l1_offset + l.l1_bytes;
    out->fully_allocated = first + tables + align_up(l.size, cluster);
    out->bound_required = first + tables + in->touched[l.cluster_bits] * cluster;
    out->bound_fully = out->fully_allocated;
    return 0;
}

/* ---------------------------------------------------------------- the driver */

static const struct opt qcow_open_opts[] = {
    OPT_CHILD("file", OPT_OPEN, "the storage"),
    OPT_CHILD("backing", OPT_OPEN, "the image below"),
    OPT_END,
};

static const struct format_ops qcow_format = {
    .probe = qcow_probe,
    .create_co = qcow_create_co,
    .map_co = qcow_map_co,
    .place_co = qcow_place_co,
    .publish_co = qcow_publish_co,
    .abandon = qcow_abandon,
    .set_zero_co = qcow_set_zero_co,
    .discard_co = in_place_discard_co,
    .flush_co = qcow_flush_co,
    .empty_co = qcow_empty_co,
    .measure = qcow_measure,
};

const struct driver driver_qcow = {
    .name = "qcow",
    .kind = DRIVER_FORMAT,
    .help = "QEMU's first copy-on-write image",
    .state_size = sizeof(struct qcow),
    .opts = qcow_open_opts,
    .create_opts = qcow_create_opts,
    .create_opts_size = sizeof(struct qcow_create_opts),
    .open_co = qcow_open_co,
    .close_co = qcow_close_co,
    .reopen_co = qcow_reopen_co,
    .format = &qcow_format,
};
