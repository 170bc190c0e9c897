/* SPDX-License-Identifier: MIT */
/*
 * The qcow2 driver: opening, closing, changing between read-only and read-write, and its table.
 *
 * Opening reads the header's cluster and the L1 table; the refcount table and the set of metadata
 * clusters only where something will be written (or checked), so that looking at an image is cheap.
 *
 * Damage: whatever would make an answer wrong or a write dangerous refuses the open.  An open to
 * check (NODE_CHECK) goes on with an empty table instead and says why in l1_problem and
 * reftable_problem.
 *
 * Before the first write an image must be told: autoclear bits that this code does not maintain
 * (all but that of the bitmaps) are cleared as soon as it is open for writing.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/log.h"
#include "disk/bitmap.h"
#include "disk/io.h"
#include "disk/open.h"
#include "format/codec.h"
#include "format/qcow2/qcow2.h"
#include "format/qcow2/snapshot.h"

/* The header's first read: enough for all of it with the usual cluster size. */
#define FIRST_READ ((uint32_t)(64 * KIB))

/* The checks cost next to nothing, so every mode but "none" has all of them (meta.c). */
enum { OVERLAP_NONE, OVERLAP_CONSTANT, OVERLAP_CACHED, OVERLAP_ALL };
static const char *const overlap_names[] = {"none", "constant", "cached", "all", NULL};

static const struct opt open_opts[] = {
    OPT_CHILD("file", OPT_OPEN, "the storage of the image"),
    OPT_CHILD("data-file", OPT_OPEN, "where the data lie; default: what the header names"),
    OPT_CHILD("backing", OPT_OPEN, "the layer below; default: what the header names"),
    OPT_STR(struct qcow2_open_opts, snapshot_id, "snapshot.id", OPT_OPEN,
            "show the internal snapshot with this id, read-only"),
    OPT_STR(struct qcow2_open_opts, snapshot_name, "snapshot.name", OPT_OPEN,
            "show the internal snapshot with this name, read-only"),
    OPT_ENUM(struct qcow2_open_opts, overlap_check, "overlap-check", OPT_OPEN, OVERLAP_CACHED,
             overlap_names,
             "before each write, whether it would hit metadata; \"none\" does not ask"),
    OPT_GIVEN_SIZE(struct qcow2_open_opts, cache, has_cache, "cache-size", OPT_OPEN, OPT_ANY,
                   "most memory for metadata; default: what the disk needs, up to 32 MiB"),
    OPT_GIVEN_SIZE(struct qcow2_open_opts, l2_cache, has_l2_cache, "l2-cache-size", OPT_OPEN,
                   OPT_ANY, "the share of L2 tables in it; one cache serves both"),
    OPT_GIVEN_SIZE(struct qcow2_open_opts, count_cache, has_count_cache, "refcount-cache-size",
                   OPT_OPEN, OPT_ANY, "the share of reference counts in it"),
    OPT_GIVEN_SIZE(struct qcow2_open_opts, l2_entry, has_l2_entry, "l2-cache-entry-size", OPT_OPEN,
                   OPT_ANY, "bytes of metadata that are read at once; 4 KiB at most are used"),
    OPT_U64(struct qcow2_open_opts, clean_interval, "cache-clean-interval", OPT_OPEN, 600,
            OPT_RANGE(0, UINT32_MAX), "taken and not needed: the cache is bounded"),
    OPT_BOOL(struct qcow2_open_opts, lazy_refcounts, "lazy-refcounts", OPT_OPEN, false,
             "taken and not needed: reference counts cost no barrier of their own"),
    OPT_GIVEN_BOOL(struct qcow2_open_opts, pass_request, has_pass_request, "pass-discard-request",
                   OPT_OPEN, "discarded clusters are given back to the file system"),
    OPT_BOOL(struct qcow2_open_opts, pass_snapshot, "pass-discard-snapshot", OPT_OPEN, true,
             "taken; what a snapshot leaves goes the way of all clusters"),
    OPT_BOOL(struct qcow2_open_opts, pass_other, "pass-discard-other", OPT_OPEN, false,
             "taken; what others leave goes the way of all clusters"),
    OPT_END,
};

static int qcow2_probe(const struct probe_data *p) {
    if (p->head_length < 8 || be32_load(p->head) != QCOW2_MAGIC)
        return 0;
    return be32_load(p->head + 4) >= 2 ? 100 : 0; /* version 1 is another format, "qcow" */
}

/* ---------------------------------------------------------------- reading what is there */

static int read_header_co(struct qcow2 *s, struct err *e) {
    uint64_t have = s->file->size;
    uint32_t len = (uint32_t)min_u64(have, FIRST_READ), need;
    AUTO_FREE uint8_t *buf = malloc(FIRST_READ);
    if (!have)
        return err_set(e, EINVAL, "not a qcow2 image: the file is empty");
    int r = buf ? disk_pread_co(s->file, 0, buf, len) : -ENOMEM;
    if (r < 0)
        return err_errno(e, -r, "reading the header");
    r = qcow2_header_peek(buf, len, &need, e);
    if (r < 0)
        return r;
    need = (uint32_t)min_u64(need, have);
    if (need > len) {
        uint8_t *grown = realloc(buf, need);
        if (!grown)
            return err_set(e, ENOMEM, "no memory for the header");
        buf = grown;
        r = disk_pread_co(s->file, len, buf + len, need - len);
        if (r < 0)
            return err_errno(e, -r, "reading the header");
        len = need;
    }
    return qcow2_header_decode(buf, min_u64(need, len), &s->h, e);
}

static void set_geometry(struct qcow2 *s) {
    s->cluster_bits = s->h.cluster_bits;
    s->cluster_size = (uint32_t)1 << s->cluster_bits;
    s->l2e_shift = qcow2_l2e_shift(qcow2_header_extended(&s->h));
    s->sub_bits = s->cluster_bits - (qcow2_extended(s) ? 5 : 0);
    s->l2_bits = s->cluster_bits - s->l2e_shift;
    s->usual = !qcow2_extended(s) && !qcow2_header_data_apart(&s->h);
    s->refcount_order = s->h.refcount_order;
    s->block_bits = s->cluster_bits + 3 - s->refcount_order;
    s->refcount_max = qcow2_refcount_limit(s->refcount_order);
}

/* A table of `entries` at `offset`, into host byte order.  Bytes behind the file's end are zeros.*/
static int read_table_co(struct qcow2 *s, const char *what, uint64_t offset, uint32_t entries,
                         uint64_t **out, uint64_t **dirty, struct err *e) {
    size_t n = entries ? entries : 1;
    uint64_t *table = calloc(n, 8), *bits = calloc(div_up(n, 64), 8);
    free(*out);
    free(*dirty);
    *out = table;
    *dirty = bits;
    if (!table || !bits)
        return err_set(e, ENOMEM, "no memory for the %s of %" PRIu32 " entries", what, entries);
    if (entries && offset >= s->file->size)
        return err_set(e, EINVAL,
                       "%s: offset %" PRIu64 " is behind the end of the file (%" PRIu64 " bytes)",
                       what, offset, s->file->size);
    /* A table that claims much and holds little costs little: what is behind the end is not read.*/
    uint32_t there = entries ? (uint32_t)min_u64(entries, div_up(s->file->size - offset, 8)) : 0;
    int r = there ? disk_pread_co(s->file, offset, table, (size_t)there * 8) : 0;
    if (r < 0)
        return err_errno(e, -r, "reading the %s", what);
    for (uint32_t i = 0; i < there; i++)
        table[i] = be64_load(&table[i]);
    return 0;
}

/*
 * A table's outcome `r`: an error, or in an open to check a note.  A table that could not be read
 * is not a damaged one, and must not be repaired as if it were.
 */
static int table_problem(const struct qcow2 *s, int r, char **problem, struct err *e) {
    bool damage = r == -EINVAL || r == -EFBIG;
    if (!damage || !(s->node->flags & NODE_CHECK))
        return r;
    free(*problem);
    *problem = xstrdup(err_text(e));
    err_clear(e);
    return 0;
}

static int load_l1_co(struct qcow2 *s, struct err *e) {
    struct err why AUTO_ERR = ERR_INIT;
    uint32_t entries = s->h.l1_size;
    int r = qcow2_header_check_l1(&s->h, &why);
    if (!r)
        r = read_table_co(s, "L1 table", s->h.l1_table_offset, entries, &s->l1, &s->l1_dirty, &why);
    s->l1_entries = r ? 0 : entries;
    r = table_problem(s, r, &s->l1_problem, &why);
    if (r < 0)
        err_move(e, &why);
    return r;
}

static int check_reftable(struct qcow2 *s, struct err *e) {
    struct err why AUTO_ERR = ERR_INIT;
    int r = table_problem(s, qcow2_header_check_reftable(&s->h, &why), &s->reftable_problem, &why);
    if (r < 0)
        err_move(e, &why);
    return r;
}

static int load_reftable_co(struct qcow2 *s, struct err *e) {
    struct err why AUTO_ERR = ERR_INIT;
    uint32_t entries = (uint32_t)(((uint64_t)s->h.refcount_table_clusters << s->cluster_bits) / 8);
    if (s->reftable_problem)
        return 0;
    int r = read_table_co(s, "refcount table", s->h.refcount_table_offset, entries, &s->reftable,
                          &s->reftable_dirty, &why);
    s->reftable_entries = r ? 0 : entries;
    r = table_problem(s, r, &s->reftable_problem, &why);
    if (r < 0)
        err_move(e, &why);
    return r;
}

/* ---------------------------------------------------------------- ready to write */

static int clear_autoclear_co(struct qcow2 *s, struct err *e) {
    uint64_t keep = s->h.has_bitmaps ? QCOW2_AUTOCLEAR_BITMAPS : 0;
    if (qcow2_data_raw(s)) /* zero.c keeps it true */
        keep |= QCOW2_AUTOCLEAR_DATA_FILE_RAW;
    uint8_t field[8];
    if (s->h.version < 3 || !(s->h.autoclear & ~keep))
        return 0;
    be64_store(field, s->h.autoclear & keep);
    int r = disk_pwrite_co(s->file, QCOW2_HEADER_AUTOCLEAR_AT, field, sizeof(field));
    if (!r && qcow2_ordered(s))
        r = disk_flush_co(s->file);
    if (r < 0)
        return err_errno(e, -r, "clearing the autoclear feature bits");
    s->h.autoclear &= keep;
    return 0;
}

/* Under NODE_CHECK from here on: damage is repaired where it can be, else refused. */
static int mend_co(struct qcow2 *s, struct err *e) {
    s->node->flags |= NODE_CHECK;
    int r = check_reftable(s, e);
    if (!r)
        r = load_reftable_co(s, e);
    if (!r)
        r = qcow2_mend_dirty_co(s, e);
    s->node->flags &= ~(unsigned)NODE_CHECK;
    return r;
}

static int make_writable_co(struct qcow2 *s, struct err *e) {
    bool check = s->node->flags & NODE_CHECK;
    int r = qcow2_header_check_features(&s->h, true, check, e);
    if (!r && !check && s->h.incompatible & QCOW2_INCOMPAT_DIRTY)
        r = mend_co(s, e);
    if (!r)
        r = load_reftable_co(s, e);
    if (!r && !check) /* a repair writes to the storage alone */
        r = qcow2_meta_build_co(s, e);
    if (!r && !check)
        r = qcow2_bitmaps_writable_co(s, e);
    if (!r) /* a repair writes too */
        r = clear_autoclear_co(s, e);
    s->virgin_from = qcow2_clusters_for(s, s->file->size);
    s->reads_zero = s->file->storage_flags & STORAGE_ZERO_INIT;
    s->free_cursor = 0;
    return r;
}

static void forget_writable(struct qcow2 *s) {
    free(s->meta);
    s->meta = NULL;
    s->meta_count = s->meta_mask = 0;
}

/* Slices that would hold all L2 tables and, where something is written, all refcount blocks. */
static uint64_t slices_wanted(const struct qcow2 *s, uint32_t slice_bytes) {
    uint64_t clusters = qcow2_clusters_for(s, s->h.size);
    uint64_t l2 = div_up(clusters, slice_bytes >> s->l2e_shift);
    uint64_t counts = div_up(clusters + l2, ((uint64_t)slice_bytes * 8) >> s->refcount_order);
    return l2 + counts + 16;
}

/* ---------------------------------------------------------------- slots */

/* The node shows one of the image's snapshots. */
static bool is_snapshot(const struct node *n) {
    const struct qcow2_open_opts *o = n->opts;
    return o->snapshot_id || o->snapshot_name;
}

static int select_snapshot_co(struct qcow2 *s, struct err *e) {
    const struct qcow2_open_opts *o = s->node->opts;
    if (node_is_rw(s->node)) {
        err_set(e, EROFS, "an internal snapshot can only be read");
        err_hint(e, "'strata snapshot -a' makes the disk what the snapshot holds");
        return -EROFS;
    }
    if (s->node->flags & NODE_CHECK)
        return err_set(e, EINVAL, "a check is one of the whole image, not of one snapshot");
    return qcow2_snapshot_select_co(s, o->snapshot_id, o->snapshot_name, e);
}

/* Before anything is written: an image whose data file is missing stays as it is. */
static int open_data_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct qcow2 *s = qcow2_of(n);
    if (!qcow2_header_data_apart(&s->h))
        return node_has_data_option(ctx)
                   ? err_set(e, EINVAL,
                             "'data-file' can only be set for images with an external data file")
                   : 0;
    if (s->h.data_file)
        n->data_name = xstrdup(s->h.data_file);
    int r = node_open_data_co(n, ctx, e);
    s->data = n->data_file;
    return r;
}

static int open_map_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct qcow2 *s = qcow2_of(n);
    bool rw = node_is_rw(n), check = n->flags & NODE_CHECK;
    bool look = n->flags & NODE_LOOK && !rw;
    int r = read_header_co(s, e);
    if (r < 0)
        return r;
    set_geometry(s);
    if (!look &&
        qcow2_l1_entries_for(s->cluster_bits, qcow2_header_extended(&s->h), s->h.size) > INT32_MAX)
        return err_set(e, EFBIG,
                       "the image is too big: no L1 table can hold the %" PRIu64
                       " bytes of its disk",
                       s->h.size);
    if (!look)
        r = qcow2_header_check_features(&s->h, rw, check, e);
    if (!r)
        r = open_data_co(n, ctx, e);
    if (!r)
        r = is_snapshot(n) ? select_snapshot_co(s, e) : load_l1_co(s, e);
    if (!r && !(rw && !check && s->h.incompatible & QCOW2_INCOMPAT_DIRTY)) /* else mend_co does */
        r = check_reftable(s, e);
    if (!r && !check)
        r = qcow2_header_check_snapshots(&s->h, e);
    if (r < 0)
        return r;
    const struct qcow2_open_opts *o = n->opts;
    if ((r = qcow2_tuning_check(s, o, e)) < 0)
        return r;
    uint32_t slice_bytes = qcow2_tuning_slice(s, o);
    s->slice_bits = (uint32_t)__builtin_ctz(slice_bytes >> s->l2e_shift);
    if (qcow2_cache_init(&s->cache, s->file, slice_bytes,
                         qcow2_tuning_slices(o, slice_bytes, slices_wanted(s, slice_bytes))) < 0)
        return err_set(e, ENOMEM, "no memory for the metadata cache");
    s->node->size = s->h.size;
    if (!is_snapshot(n)) /* bitmaps are about the disk as it is now */
        r = qcow2_bitmaps_open_co(s, e);
    if (!r && rw)
        r = make_writable_co(s, e);
    if (r < 0 || rw)
        return r;
    if (look)
        qcow2_look_co(s);
    return check ? load_reftable_co(s, e) : 0;
}

static int qcow2_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct qcow2 *s = qcow2_of(n);
    s->node = n;
    const struct qcow2_open_opts *o = n->opts;
    if (o->has_pass_request)
        n->flags = (n->flags & ~(unsigned)NODE_UNMAP) | (o->pass_request ? NODE_UNMAP : 0);
    s->unchecked = ((struct qcow2_open_opts *)n->opts)->overlap_check == OVERLAP_NONE;
    task_mutex_init(&s->l2_lock);
    task_mutex_init(&s->coded_lock);
    task_mutex_init(&s->grow_lock);
    task_mutex_init(&s->wb_lock);
    int r = node_open_child_co(n, ctx, "file", CHILD_FILE_METADATA, &n->file, e);
    if (r < 0)
        return r;
    s->file = s->data = n->file;
    r = open_map_co(n, ctx, e);
    if (r < 0)
        return r;
    n->size = s->h.size;
    n->granularity = s->cluster_size;
    n->subunit = (uint32_t)1 << s->sub_bits;
    if (!qcow2_data_apart(s))
        n->codec = s->h.compression_type == QCOW2_COMPRESSION_ZSTD ? &codec_zstd : &codec_deflate;
    if (s->h.backing_file)
        n->backing_name = xstrdup(s->h.backing_file);
    if (s->h.backing_file && s->h.backing_format)
        n->backing_format = xstrdup(s->h.backing_format);
    return node_open_backing_co(n, ctx, e);
}

/*
 * Nobody is writing any more.  Readers expect whole sectors behind coded data.  Else the file ends
 * behind the last cluster that was used, so that its length follows from what is in it (measure.c)
 * and the last table is whole.  Where that cannot be, nothing is lost.
 */
static void pad_end_co(struct qcow2 *s) {
    static const uint8_t zeros[512];
    uint64_t end = s->file->size, pad = align_up(end, 512) - end;
    uint64_t whole = s->virgin_from << s->cluster_bits;
    if (s->coded_used && pad)
        disk_pwrite_co(s->file, end, zeros, pad);
    else if (!s->coded_used && s->end_grown && whole > end)
        disk_resize_co(s->file, whole, PREALLOC_OFF, NULL);
    s->coded_used = s->end_grown = false;
}

static void qcow2_close_co(struct node *n) {
    struct qcow2 *s = qcow2_of(n);
    if (!s->node) /* not even begun: its options were refused */
        return;
    if (s->cache.hash && s->meta) { /* open for writing, and fully opened */
        struct err why AUTO_ERR = ERR_INIT;
        if (bitmap_store_co(n, &why) < 0)
            log_msg(LOG_LV_WARN, "%s: %s: its bitmaps are lost", n->filename, err_text(&why));
        qcow2_writeback_all_co(s); /* whoever must know the outcome has flushed before */
        if (s->corrupt)
            qcow2_corrupt_store_co(s);
        pad_end_co(s);
    }
    qcow2_limbo_free(&s->limbo);
    qcow2_cache_free(&s->cache);
    forget_writable(s);
    free(s->l1);
    free(s->l1_dirty);
    free(s->reftable);
    free(s->reftable_dirty);
    qcow2_bitmaps_close(s);
    free(s->l1_problem);
    free(s->reftable_problem);
    free(s->luks);
    qcow2_header_free(&s->h);
    memset(s, 0, sizeof(*s));
}

static int qcow2_reopen_co(struct node *n, unsigned new_flags, struct err *e) {
    struct qcow2 *s = qcow2_of(n);
    bool rw = new_flags & NODE_RW;
    int r = 0;
    if (rw == node_is_rw(n))
        return 0;
    if (rw && is_snapshot(n))
        return err_set(e, EROFS, "an internal snapshot can only be read");
    if (rw) {
        r = make_writable_co(s, e);
    } else {
        r = bitmap_store_co(n, e);
        if (r < 0)
            return r;
        r = qcow2_writeback_all_co(s);
        if (r < 0)
            return err_errno(e, -r, "writing the metadata back");
        pad_end_co(s);
    }
    if (r < 0 || !rw)
        forget_writable(s);
    return r;
}

static int write_backing_co(struct qcow2 *s, char *name, char *format, struct err *e) {
    char *old_name = s->h.backing_file, *old_format = s->h.backing_format;
    s->h.backing_file = name;
    s->h.backing_format = format;
    int r = qcow2_header_write_co(s, e);
    if (r < 0) {
        s->h.backing_file = old_name;
        s->h.backing_format = old_format;
        return r;
    }
    free(old_name);
    free(old_format);
    return 0;
}

static int qcow2_set_backing_co(struct node *n, const char *name, const char *format,
                                struct err *e) {
    struct qcow2 *s = qcow2_of(n);
    if (name && *name && qcow2_data_raw(s))
        return err_set(e, EINVAL,
                       "a backing file would show through holes that the raw data file does not "
                       "have (data_file_raw)");
    AUTO_FREE char *new_name = name && *name ? xstrdup(name) : NULL;
    AUTO_FREE char *new_format = new_name && format ? xstrdup(format) : NULL;
    if (new_name && strlen(new_name) > QCOW2_BACKING_NAME_MAX)
        return err_set(e, ENOSPC, "backing file name has %zu bytes, more than %d", strlen(new_name),
                       QCOW2_BACKING_NAME_MAX);
    int r = write_backing_co(s, new_name, new_format, e);
    if (r < 0)
        return r;
    steal(&new_name);
    steal(&new_format);
    free(n->backing_name);
    free(n->backing_format);
    n->backing_name = s->h.backing_file ? xstrdup(s->h.backing_file) : NULL;
    n->backing_format = s->h.backing_format ? xstrdup(s->h.backing_format) : NULL;
    return 0;
}

static const struct format_ops qcow2_format = {
    .probe = qcow2_probe,
    .create_co = qcow2_create_co,
    .map_co = qcow2_map_co,
    .place_co = qcow2_place_co,
    .publish_co = qcow2_publish_co,
    .abandon = qcow2_abandon,
    .set_zero_co = qcow2_set_zero_co,
    .discard_co = qcow2_discard_co,
    .reach_co = qcow2_reach_co,
    .vm_state_at = qcow2_vm_state_at,
    .resize_co = qcow2_resize_co,
    .flush_co = qcow2_flush_co,
    .set_backing_co = qcow2_set_backing_co,
    .empty_co = qcow2_empty_co,
    .amend_co = qcow2_amend_co,
    .bitmap_check = qcow2_bitmap_check,
    .bitmap_load_co = qcow2_bitmap_load_co,
    .bitmap_arm_co = qcow2_bitmap_arm_co,
    .bitmap_store_co = qcow2_bitmap_store_co,
    .bitmap_remove_co = qcow2_bitmap_remove_co,
    .snapshot_list_co = qcow2_snapshot_list_co,
    .snapshot_create_co = qcow2_snapshot_create_co,
    .snapshot_apply_co = qcow2_snapshot_apply_co,
    .snapshot_delete_co = qcow2_snapshot_delete_co,
    .repairs = CHECK_FIX_LEAKS | CHECK_FIX_ERRORS,
    .check_co = qcow2_check_co,
    .describe = qcow2_describe,
    .measure = qcow2_measure,
};

const struct driver driver_qcow2 = {
    .name = "qcow2",
    .kind = DRIVER_FORMAT,
    .help = "QEMU's copy-on-write format, versions 2 and 3",
    .state_size = sizeof(struct qcow2),
    .opts = open_opts,
    .opts_size = sizeof(struct qcow2_open_opts),
    .create_opts = qcow2_create_opt_table,
    .create_opts_size = sizeof(struct qcow2_create_opts),
    .amend_opts = qcow2_amend_opt_table,
    .amend_opts_size = sizeof(struct qcow2_amend_opts),
    .open_co = qcow2_open_co,
    .close_co = qcow2_close_co,
    .reopen_co = qcow2_reopen_co,
    .format = &qcow2_format,
};
