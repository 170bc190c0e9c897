/* SPDX-License-Identifier: MIT */
/*
 * New images, written front to back in the layout of layout.h.
 *
 * The file first gets its final length (with preallocation: its space too), then every table is
 * generated into one buffer of STREAM_BYTES and written in order; nothing is read back, and memory
 * does not depend on the size.  All reference counts are 1: each cluster has exactly one name.
 *
 * Where storage reads as zeros by itself, runs of zeros inside the tables are left out.  Where it
 * does not (block devices) they are written, and preallocated clusters carry the zero flag in
 * version 3, while version 2 has no such flag and its data are zeroed for real.  Extended entries
 * give their clusters room without content, over which a backing file still shows.
 *
 * The header is the last write (and on storage that held something before, its place is cleared
 * first), so that a crash halfway leaves nothing that looks like an image.
 *
 * Option names, defaults and rules are those of qemu-img create (qemu docs/system/images,
 * "qcow2"); sizes are rounded up to whole 512-byte sectors as there.
 */
#include "format/qcow2/qcow2.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "disk/io.h"
#include "disk/open.h"
#include "format/qcow2/layout.h"

enum { COMPAT_0_10, COMPAT_1_1, COMPAT_V2, COMPAT_V3 };
static const char *const compat_names[] = {"0.10", "1.1", "v2", "v3", NULL};
static const char *const compression_names[] = {"zlib", "zstd", NULL};

#define REFUSED " (not yet supported)"
#define CRYPT_ROW(i, key, help)                                                                    \
    OPT_STR(struct qcow2_create_opts, encrypt[i], "encrypt." key, OPT_CREATE, help REFUSED)

const struct opt qcow2_create_opt_table[] = {
    OPT_SIZE(struct qcow2_create_opts, size, "size", OPT_CREATE, 0, OPT_ANY,
             "size that the guest sees"),
    OPT_ENUM(struct qcow2_create_opts, compat, "compat", OPT_CREATE, COMPAT_1_1, compat_names,
             "format version: 0.10 (v2), or 1.1 (v3)"),
    OPT_SIZE(struct qcow2_create_opts, cluster_size, "cluster_size", OPT_CREATE, 64 * KIB,
             OPT_POW2(512, 2 * MIB), "unit of allocation"),
    OPT_U64(struct qcow2_create_opts, refcount_bits, "refcount_bits", OPT_CREATE, 16,
            OPT_POW2(1, 64), "width of a reference count"),
    OPT_STR(struct qcow2_create_opts, backing_file, "backing_file", OPT_CREATE,
            "image below this one"),
    OPT_STR(struct qcow2_create_opts, backing_fmt, "backing_fmt", OPT_CREATE,
            "format of the backing file"),
    OPT_ENUM(struct qcow2_create_opts, compression_type, "compression_type", OPT_CREATE,
             QCOW2_COMPRESSION_ZLIB, compression_names, "coding of compressed clusters"),
    OPT_ENUM(struct qcow2_create_opts, preallocation, "preallocation", OPT_CREATE, PREALLOC_OFF,
             prealloc_names, "what to allocate now"),
    OPT_BOOL(struct qcow2_create_opts, lazy_refcounts, "lazy_refcounts", OPT_CREATE, false,
             "reference counts may be written late"),
    OPT_BOOL(struct qcow2_create_opts, extended_l2, "extended_l2", OPT_CREATE, false,
             "32 subclusters in each cluster"),
    OPT_STR(struct qcow2_create_opts, data_file, "data_file", OPT_CREATE,
            "file for the data alone; made new"),
    OPT_BOOL(struct qcow2_create_opts, data_file_raw, "data_file_raw", OPT_CREATE, false,
             "that file always reads as the disk does, by itself"),
    OPT_BOOL(struct qcow2_create_opts, encryption, "encryption", OPT_CREATE, false,
             "AES encryption" REFUSED),
    CRYPT_ROW(0, "format", "encryption format"),
    CRYPT_ROW(1, "key-secret", "name of the secret"),
    CRYPT_ROW(2, "cipher-alg", "cipher"),
    CRYPT_ROW(3, "cipher-mode", "cipher mode"),
    CRYPT_ROW(4, "ivgen-alg", "generator of initialization vectors"),
    CRYPT_ROW(5, "ivgen-hash-alg", "hash of that generator"),
    CRYPT_ROW(6, "hash-alg", "hash of the key derivation"),
    CRYPT_ROW(7, "iter-time", "time for the key derivation in ms"),
    OPT_END,
};

/* ---- rules between options ---- */

static int refuse_unsupported(const struct qcow2_create_opts *o, struct err *e) {
    bool encrypt = o->encryption;
    for (unsigned i = 0; i < QCOW2_CREATE_ENCRYPT; i++)
        encrypt |= o->encrypt[i] != NULL;
    if (encrypt)
        return err_set(e, ENOTSUP, "encryption of qcow2 images is not yet supported");
    return 0;
}

static int check_rules(const struct qcow2_create_opts *o, struct err *e) {
    bool v2 = o->compat == COMPAT_0_10 || o->compat == COMPAT_V2;
    if (v2 && o->refcount_bits != 16)
        return err_set(e, EINVAL,
                       "refcount_bits=%" PRIu64 " needs compat=1.1: version 2 images have 16 bits",
                       o->refcount_bits);
    if (v2 && o->compression_type != QCOW2_COMPRESSION_ZLIB)
        return err_set(e, EINVAL, "compression_type=%s needs compat=1.1",
                       compression_names[o->compression_type]);
    if (v2 && o->lazy_refcounts)
        return err_set(e, EINVAL, "lazy_refcounts=on needs compat=1.1");
    if (v2 && o->extended_l2)
        return err_set(e, EINVAL, "extended_l2=on needs compat=1.1");
    if (o->extended_l2 && o->cluster_size < 1u << QCOW2_EXTENDED_BITS_MIN)
        return err_set(e, EINVAL,
                       "extended_l2=on needs clusters of at least %u bytes, not %" PRIu64,
                       1u << QCOW2_EXTENDED_BITS_MIN, o->cluster_size);
    if (v2 && o->data_file)
        return err_set(e, EINVAL, "data_file needs compat=1.1");
    if (o->data_file_raw && !o->data_file)
        return err_set(e, EINVAL, "data_file_raw=on needs data_file");
    if (o->data_file && (!*o->data_file || strlen(o->data_file) > QCOW2_BACKING_NAME_MAX))
        return err_set(e, EINVAL, "data_file has a name of %zu bytes, and 1 to %d are possible",
                       strlen(o->data_file), QCOW2_BACKING_NAME_MAX);
    if (o->data_file_raw && o->backing_file)
        return err_set(e, EINVAL,
                       "data_file_raw=on and a backing file exclude one another: what the backing "
                       "file shows would not be in the data file");
    if (o->backing_fmt && !o->backing_file)
        return err_set(e, EINVAL, "backing_fmt=%s is given without backing_file", o->backing_fmt);
    if (o->backing_file && !*o->backing_file)
        return err_set(e, EINVAL, "backing_file is empty");
    if (o->backing_file && strlen(o->backing_file) > QCOW2_BACKING_NAME_MAX)
        return err_set(e, EINVAL, "backing file name has %zu bytes, more than %d",
                       strlen(o->backing_file), QCOW2_BACKING_NAME_MAX);
    if (o->backing_fmt && strlen(o->backing_fmt) > 255)
        return err_set(e, EINVAL, "backing format name has %zu bytes, more than 255",
                       strlen(o->backing_fmt));
    if (o->backing_file && o->preallocation != PREALLOC_OFF && !o->extended_l2) {
        err_set(e, EINVAL, "preallocation=%s would hide the backing file: use preallocation=off",
                prealloc_names[o->preallocation]);
        err_hint(e, "with extended_l2=on room can be given ahead and the backing file still shows");
        return -EINVAL;
    }
    if (o->size > INT64_MAX - 511)
        return err_set(e, EFBIG, "size %" PRIu64 " is above the limit of %" PRIu64, o->size,
                       (uint64_t)INT64_MAX - 511);
    return 0;
}

int qcow2_create_check(const struct qcow2_create_opts *o, struct err *e) {
    int r = refuse_unsupported(o, e);
    return r ? r : check_rules(o, e);
}

/* ---- the stream of tables ---- */

#define STREAM_BYTES ((uint32_t)MIB)

struct stream {
    struct node *file;
    uint8_t *buf;
    uint32_t fill; /* a multiple of 8 except at the end of a table */
    uint64_t pos;  /* file offset of buf[0] */
    bool skip_zeros;
};

static int stream_flush_co(struct stream *s) {
    if (!s->fill)
        return 0;
    struct iovec v = {s->buf, s->fill};
    int r = disk_pwritev_co(s->file, s->pos, s->fill, &v, 1, s->fill > 64 * KIB ? IO_BULK : 0);
    s->pos += s->fill;
    s->fill = 0;
    return r;
}

/* Room for `want` bytes or less: *got (a multiple of 8 when `want` is) at the returned place. */
static int stream_room_co(struct stream *s, uint64_t want, uint8_t **at, uint32_t *got) {
    if (s->fill == STREAM_BYTES) {
        int r = stream_flush_co(s);
        if (r)
            return r;
    }
    *got = (uint32_t)min_u64(want, STREAM_BYTES - s->fill);
    *at = s->buf + s->fill;
    s->fill += *got;
    return 0;
}

/* Zeros up to file offset `end`. */
static int stream_zeros_to_co(struct stream *s, uint64_t end) {
    uint64_t left = end - s->pos - s->fill;
    if (s->skip_zeros && left > 4 * KIB) {
        int r = stream_flush_co(s);
        s->pos = end;
        return r;
    }
    while (left) {
        uint8_t *at;
        uint32_t got;
        int r = stream_room_co(s, left, &at, &got);
        if (r)
            return r;
        memset(at, 0, got);
        left -= got;
    }
    return 0;
}

/* `count` big-endian entries: first, first + step, ... */
static int stream_entries_co(struct stream *s, uint64_t count, uint64_t first, uint64_t step) {
    while (count) {
        uint8_t *at;
        uint32_t got;
        int r = stream_room_co(s, min_u64(count, STREAM_BYTES / 8) * 8, &at, &got);
        if (r)
            return r;
        for (uint32_t i = 0; i < got; i += 8, first += step)
            be64_store(at + i, first);
        count -= got / 8;
    }
    return 0;
}

/* `count` reference counts of 1, then zero bits up to a multiple of 8 bytes. */
static int stream_ones_co(struct stream *s, uint64_t count, uint32_t order) {
    uint8_t ones[8] = {0};
    for (unsigned i = 0; i < 64u >> order; i++)
        qcow2_refcount_set(ones, i, order, 1);
    uint64_t words = count >> (6 - order), rest = count & ((UINT64_C(1) << (6 - order)) - 1);
    while (words) {
        uint8_t *at;
        uint32_t got;
        int r = stream_room_co(s, min_u64(words, STREAM_BYTES / 8) * 8, &at, &got);
        if (r)
            return r;
        for (uint32_t i = 0; i < got; i += 8)
            memcpy(at + i, ones, 8);
        words -= got / 8;
    }
    if (rest) {
        uint8_t *at;
        uint32_t got;
        int r = stream_room_co(s, 8, &at, &got);
        if (r)
            return r;
        memset(at, 0, got);
        for (unsigned i = 0; i < rest; i++)
            qcow2_refcount_set(at, i, order, 1);
    }
    return 0;
}

/* What all L2 entries have in common. */
struct l2_fill {
    uint64_t first; /* entry of the first cluster */
    uint64_t bitmap;
};

static int stream_l2_co(struct stream *s, const struct qcow2_layout *l, struct l2_fill fill) {
    uint64_t count = l->l2_entries, cluster = (uint64_t)1 << l->cluster_bits;
    uint64_t entry = fill.first;
    if (!l->extended_l2)
        return stream_entries_co(s, count, entry, cluster);
    while (count) {
        uint8_t *at;
        uint32_t got;
        int r = stream_room_co(s, min_u64(count, STREAM_BYTES / 16) * 16, &at, &got);
        if (r)
            return r;
        for (uint32_t i = 0; i < got; i += 16, entry += cluster) {
            be64_store(at + i, entry);
            be64_store(at + i + 8, fill.bitmap);
        }
        count -= got / 16;
    }
    return 0;
}

static int write_tables_co(struct stream *s, const struct qcow2_layout *l, struct l2_fill fill) {
    uint64_t cluster = (uint64_t)1 << l->cluster_bits;
    s->pos = qcow2_layout_reftable(l);
    int r = stream_entries_co(s, l->refblocks, qcow2_layout_refblocks(l), cluster);
    if (!r)
        r = stream_zeros_to_co(s, qcow2_layout_refblocks(l));
    if (!r)
        r = stream_ones_co(s, l->total_clusters, l->refcount_order);
    if (!r)
        r = stream_zeros_to_co(s, qcow2_layout_l1(l));
    if (!r && l->l2_tables) {
        r = stream_entries_co(s, l->l1_entries, qcow2_layout_l2(l) | QCOW2_COPIED, cluster);
        if (!r)
            r = stream_zeros_to_co(s, qcow2_layout_l2(l));
        if (!r)
            r = stream_l2_co(s, l, fill);
        if (!r)
            r = stream_zeros_to_co(s, qcow2_layout_data(l));
    } else if (!r) {
        r = stream_zeros_to_co(s, l->file_length);
    }
    return r ? r : stream_flush_co(s);
}

/* ---- creation ---- */

/* The file's length and, as far as asked for, its space. */
static int make_space_co(struct node *file, const struct qcow2_layout *l, int prealloc,
                         struct err *e) {
    if (file->size >= l->file_length)
        return 0;
    int r = 0;
    /* Tables into allocated space: the page cache takes them several times faster than into a
     * hole. Not every storage can. */
    if (prealloc == PREALLOC_METADATA)
        disk_resize_co(file, qcow2_layout_data(l), PREALLOC_FALLOC, NULL);
    r = disk_resize_co(file, l->file_length,
                       prealloc == PREALLOC_METADATA ? PREALLOC_OFF : prealloc, e);
    return r < 0 ? err_prefix(e, "growing the file to %" PRIu64 " bytes", l->file_length) : 0;
}

static int write_header_co(struct node *file, const struct qcow2_create_opts *o,
                           const struct qcow2_layout *l, bool whole_cluster, struct err *e) {
    size_t cluster = (size_t)1 << l->cluster_bits;
    struct qcow2_header h = {
        .version = o->compat == COMPAT_0_10 || o->compat == COMPAT_V2 ? 2 : 3,
        .cluster_bits = l->cluster_bits,
        .size = align_up(o->size, 512),
        .l1_size = (uint32_t)l->l1_entries,
        .l1_table_offset = l->l1_entries ? qcow2_layout_l1(l) : 0,
        .refcount_table_offset = qcow2_layout_reftable(l),
        .refcount_table_clusters = (uint32_t)l->reftable_clusters,
        .refcount_order = l->refcount_order,
        .header_length = QCOW2_V3_LENGTH,
        .compression_type = (uint8_t)o->compression_type,
        .backing_file = o->backing_file,
        .backing_format = o->backing_fmt,
        .data_file = o->data_file,
    };
    if (h.version < 3)
        h.header_length = QCOW2_V2_LENGTH;
    if (h.compression_type != QCOW2_COMPRESSION_ZLIB)
        h.incompatible |= QCOW2_INCOMPAT_COMPRESSION;
    if (o->extended_l2)
        h.incompatible |= QCOW2_INCOMPAT_EXTENDED_L2;
    if (o->data_file)
        h.incompatible |= QCOW2_INCOMPAT_DATA_FILE;
    if (o->data_file_raw)
        h.autoclear |= QCOW2_AUTOCLEAR_DATA_FILE_RAW;
    if (o->lazy_refcounts)
        h.compatible |= QCOW2_COMPAT_LAZY_REFCOUNTS;
    if (h.version >= 3 && cluster > 4 * KIB)
        qcow2_feature_table_default(&h);
    uint8_t *buf = buf_get(cluster);
    int64_t used = buf ? qcow2_header_encode(&h, buf, cluster, e)
                       : err_set(e, ENOMEM, "no memory for the header");
    int r = used < 0 ? (int)used : 0;
    if (!r) {
        r = disk_pwrite_co(file, 0, buf, whole_cluster ? cluster : (size_t)used);
        if (r)
            err_errno(e, -r, "writing the header");
    }
    buf_put(buf, cluster);
    h.backing_file = h.backing_format = h.data_file = NULL; /* borrowed */
    qcow2_header_free(&h);
    return r;
}

/* Whether all room is given, and where: a raw data file is mapped whole. */
static enum qcow2_layout_room room_for(const struct qcow2_create_opts *o) {
    if (o->data_file)
        return o->data_file_raw || o->preallocation ? QCOW2_LAYOUT_TABLES : QCOW2_LAYOUT_EMPTY;
    return o->preallocation ? QCOW2_LAYOUT_ALL : QCOW2_LAYOUT_EMPTY;
}

/*
 * The data file, as long as the disk and reading as zeros where L2 entries will name it.  It gets
 * its name in the end, before the image does.
 */
static int create_data_co(const struct qcow2_create_opts *o, const char *image, char **name,
                          struct node **out, struct err *e) {
    uint64_t size = align_up(o->size, 512);
    int prealloc = o->preallocation == PREALLOC_METADATA ? PREALLOC_OFF : o->preallocation;
    *name = data_file_resolve(image, o->data_file, e);
    if (!*name)
        return err_status(e);
    int r = data_file_create_co(*name, image, size, prealloc, out, e);
    if (!r && size && !((*out)->storage_flags & STORAGE_ZERO_INIT) &&
        (r = disk_zero_co(*out, 0, min_u64(size, (*out)->size), ZERO_MAY_UNMAP)) < 0)
        err_errno(e, -r, "zeroing");
    return r < 0 ? err_prefix(e, "data file '%s'", *name) : 0;
}

/* Header and tables onto `file`, in the layout l. */
static int write_image_co(struct node *file, const struct qcow2_create_opts *o,
                          const struct qcow2_layout *l, struct err *e) {
    bool zero_init = file->storage_flags & STORAGE_ZERO_INIT;
    bool v2 = o->compat == COMPAT_0_10 || o->compat == COMPAT_V2;
    bool zero_data = !zero_init && !l->extended_l2 && (v2 || o->preallocation == PREALLOC_FULL);
    struct l2_fill fill = {.first = QCOW2_COPIED};
    if (l->data_clusters)
        fill.first |= qcow2_layout_data(l);
    if (l->data_clusters && !zero_init && !zero_data && !l->extended_l2)
        fill.first |= QCOW2_ZERO;
    if (o->data_file_raw)
        fill.bitmap = UINT32_MAX; /* what is in the data file is the guest's */
    int r = 0;
    if (!zero_init && (r = disk_zero_co(file, 0, min_u64(file->size, 4 * KIB), 0)))
        return err_errno(e, -r, "clearing the old header");
    struct stream s = {.file = file, .buf = buf_get(STREAM_BYTES), .skip_zeros = zero_init};
    if (!s.buf)
        return err_set(e, ENOMEM, "no memory for creating the image");
    r = write_tables_co(&s, l, fill);
    buf_put(s.buf, STREAM_BYTES);
    if (!r && zero_data && l->data_clusters)
        r = disk_zero_co(file, qcow2_layout_data(l), l->data_clusters << l->cluster_bits, 0);
    if (r)
        return err_errno(e, -r, "writing the tables");
    return write_header_co(file, o, l, !zero_init, e);
}

int qcow2_create_co(struct node *file, const void *create_opts, struct create_ctx *ctx,
                    struct err *e) {
    const struct qcow2_create_opts *o = create_opts;
    AUTO_FREE char *data_name = NULL;
    struct node *data = NULL;
    struct qcow2_layout l;
    int r = qcow2_create_check(o, e);
    if (!r)
        r = qcow2_layout_compute((uint32_t)__builtin_ctzll(o->cluster_size),
                                 (uint32_t)__builtin_ctzll(o->refcount_bits), o->extended_l2,
                                 align_up(o->size, 512), room_for(o), &l, e);
    if (!r && o->data_file)
        r = create_data_co(o, ctx->name, &data_name, &data, e);
    if (!r)
        r = make_space_co(file, &l, o->data_file ? PREALLOC_METADATA : o->preallocation, e);
    if (!r)
        r = write_image_co(file, o, &l, e);
    if (!r && data)
        r = data_file_finish_co(data, data_name, e);
    node_unref_co(data);
    return r;
}
