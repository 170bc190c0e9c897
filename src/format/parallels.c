/* SPDX-License-Identifier: MIT */
/*
 * Parallels expandable images: a header, a one-level table, clusters.
 *
 *      | header (64 bytes) | u32 a cluster | ... data offset | clusters |
 *
 * A table entry is 0 (nothing there: zeros) or where a cluster lies: in sectors in images of the
 * old magic, in clusters in those of the new one.  New clusters are appended.  Numbers are
 * little-endian.
 *
 * Write order of a flush: data, a barrier, table entries, a barrier.  A crash leaves clusters
 * without a name.  Before the first of them is taken the header says, stably, that the image is in
 * use, and a clean close takes that back, as other writers do: theirs need a repair after a crash.
 *
 * Dirty bitmaps in a format extension would become untrue by a write, so the first one lets the
 * header forget them.
 *
 * Facts: the public specification (qemu/qemu docs/interop/parallels.rst).
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
#include "format/problem.h"
#include "format/seen.h"
#include "runtime/task.h"

#define HEADER_BYTES 64u
#define SECTOR 512u
#define IN_USE 0x746f6e59u
#define CLUSTER_MAX (256u << 20)
#define ENTRIES_MAX ((uint32_t)INT32_MAX / 4)
#define PAGES_BYTES (8 * MIB)
#define PIECE ((uint32_t)MIB)

static const char magic_old[] = "WithoutFreeSpace", magic_new[] = "WithouFreSpacExt";

enum field {
    AT_VERSION = 16,
    AT_HEADS = 20,
    AT_CYLINDERS = 24,
    AT_TRACKS = 28, /* sectors of a cluster */
    AT_ENTRIES = 32,
    AT_SECTORS = 36,
    AT_IN_USE = 44,
    AT_DATA = 48,
    AT_FLAGS = 52,
    AT_EXTENSION = 56,
};

struct parallels {
    struct node *node, *file;
    uint8_t header[HEADER_BYTES]; /* as on storage */
    uint32_t cluster_size, entries;
    uint32_t unit; /* bytes that an entry counts */
    uint64_t data_offset;
    uint64_t end; /* no cluster uses bytes from here on; known when scanned */
    bool scanned, marked;
    struct pages pages;
    struct task_mutex alloc_lock, flush_lock;
};

static struct parallels *parallels_of(struct node *n) {
    return n->state;
}

static int parallels_flush_co(struct node *n);
static int parallels_check_co(struct node *n, struct check_result *r, struct err *e);

/* ---------------------------------------------------------------- opening */

static int parallels_probe(const struct probe_data *p) {
    return p->head_length >= HEADER_BYTES && le32_load(p->head + AT_VERSION) == 2 &&
                   (!memcmp(p->head, magic_old, 16) || !memcmp(p->head, magic_new, 16))
               ? 100
               : 0;
}

static int parse_header(struct node *n, struct err *e) {
    struct parallels *s = parallels_of(n);
    const uint8_t *h = s->header;
    bool extended = !memcmp(h, magic_new, 16);
    uint64_t sectors = extended ? le64_load(h + AT_SECTORS) : le32_load(h + AT_SECTORS);
    uint32_t tracks = le32_load(h + AT_TRACKS), data = le32_load(h + AT_DATA);
    if (!extended && memcmp(h, magic_old, 16))
        return err_set(e, EINVAL, "not a Parallels image");
    if (le32_load(h + AT_VERSION) != 2)
        return err_set(e, ENOTSUP, "version %" PRIu32 " is unknown (2)", le32_load(h + AT_VERSION));
    if (!tracks || tracks > CLUSTER_MAX / SECTOR)
        return err_set(e, EINVAL, "clusters of %" PRIu32 " sectors are not from 1 to %u", tracks,
                       CLUSTER_MAX / SECTOR);
    s->cluster_size = tracks * SECTOR;
    s->entries = le32_load(h + AT_ENTRIES);
    s->unit = extended ? s->cluster_size : SECTOR;
    if (s->entries > ENTRIES_MAX)
        return err_set(e, EFBIG, "%" PRIu32 " table entries are above the limit of %u", s->entries,
                       ENTRIES_MAX);
    uint64_t table_end = HEADER_BYTES + (uint64_t)s->entries * 4;
    s->data_offset = data ? (uint64_t)data * SECTOR : align_up(table_end, SECTOR);
    if (sectors > INT64_MAX / SECTOR || sectors > (uint64_t)s->entries * tracks)
        return err_set(e, EINVAL,
                       "a disk of %" PRIu64 " sectors is more than %" PRIu32 " clusters of %" PRIu32
                       " sectors hold",
                       sectors, s->entries, tracks);
    if (s->data_offset < table_end || (extended && s->data_offset % s->cluster_size))
        return err_set(e, EINVAL,
                       "the data at %" PRIu64 " begins inside the table, which ends at %" PRIu64
                       ", or not at a cluster",
                       s->data_offset, table_end);
    if (table_end > n->file->size)
        return err_set(e, EINVAL,
                       "the table ends at %" PRIu64 ", behind the end of the file (%" PRIu64
                       " bytes)",
                       table_end, n->file->size);
    n->size = sectors * SECTOR;
    n->granularity = is_pow2(tracks) ? s->cluster_size : SECTOR;
    return 0;
}

/* What another writer left unfinished is examined before the first write. */
static int become_writable_co(struct node *n, struct err *e) {
    struct parallels *s = parallels_of(n);
    if (!is_pow2(s->cluster_size))
        return err_set(e, ENOTSUP,
                       "clusters of %" PRIu32
                       " bytes, not a power of two, can only be read; convert the image",
                       s->cluster_size);
    s->scanned = false;
    if (le32_load(s->header + AT_IN_USE) != IN_USE)
        return 0;
    struct check_result found = {0};
    int r = parallels_check_co(n, &found, e);
    if (r < 0 || (!found.corruptions && !found.check_errors)) {
        s->marked = !r;
        return r;
    }
    err_set(e, EIO, "the image was not closed cleanly and is damaged (%" PRIu64 " corruptions)",
            found.corruptions);
    err_hint(e, "look with: strata check");
    return -EIO;
}

static int parallels_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct parallels *s = parallels_of(n);
    s->node = n;
    task_mutex_init(&s->alloc_lock);
    task_mutex_init(&s->flush_lock);
    int r = node_open_child_co(n, ctx, "file", CHILD_FILE_METADATA, &n->file, e);
    if (r)
        return r;
    s->file = n->file;
    if ((r = disk_pread_co(n->file, 0, s->header, HEADER_BYTES)) < 0)
        return err_errno(e, -r, "reading the header");
    r = parse_header(n, e);
    if (!r && pages_init(&s->pages, n->file, PAGES_BYTES) < 0)
        r = err_set(e, ENOMEM, "no memory for the table");
    if (!r && node_is_rw(n) && !(n->flags & NODE_CHECK))
        r = become_writable_co(n, e);
    return r;
}

static int write_header_co(struct parallels *s) {
    int r = disk_pwrite_co(s->file, 0, s->header, HEADER_BYTES);
    return r < 0 ? r : disk_flush_co(s->file);
}

/* All is written: the image is not in use any more.  An error leaves the mark, which is safe. */
static void unmark_co(struct parallels *s) {
    if (!s->marked || pages_dirty(&s->pages))
        return;
    le32_store(s->header + AT_IN_USE, 0);
    if (write_header_co(s) < 0)
        le32_store(s->header + AT_IN_USE, IN_USE);
    s->marked = false;
}

static void parallels_close_co(struct node *n) {
    struct parallels *s = parallels_of(n);
    if (n->file && node_is_rw(n) && s->pages.storage)
        unmark_co(s);
    pages_free(&s->pages);
}

static int parallels_reopen_co(struct node *n, unsigned new_flags, struct err *e) {
    if (new_flags & NODE_RW && !node_is_rw(n))
        return become_writable_co(n, e);
    if (!(new_flags & NODE_RW) && node_is_rw(n))
        unmark_co(parallels_of(n));
    return 0;
}

/* ---------------------------------------------------------------- the map */

static int table_page_co(struct parallels *s, uint32_t index, struct page **page, uint8_t **at,
                         uint32_t *left) {
    uint32_t start = index / (PAGE_BYTES / 4) * (PAGE_BYTES / 4);
    uint32_t count = (uint32_t)min_u64(PAGE_BYTES / 4, s->entries - start);
    int r = pages_get_co(&s->pages, HEADER_BYTES + (uint64_t)start * 4, count * 4, 0, page);
    if (r < 0)
        return r;
    *at = (*page)->data + (index - start) * 4;
    *left = count - (index - start);
    return 0;
}

static bool entry_is_sane(const struct parallels *s, uint32_t entry) {
    uint64_t host = (uint64_t)entry * s->unit;
    return host >= s->data_offset && host < s->file->size;
}

static int parallels_map_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    struct parallels *s = parallels_of(n);
    uint32_t cs = s->cluster_size, in = (uint32_t)(offset % cs), left, run = 1;
    struct page *page;
    uint8_t *at = NULL;
    int r = table_page_co(s, (uint32_t)(offset / cs), &page, &at, &left);
    if (r < 0)
        return r;
    uint32_t first = le32_load(at);
    if (first && !entry_is_sane(s, first))
        return -EIO;
    while (run < left && (uint64_t)run * cs < in + length) {
        uint32_t next = le32_load(at + (size_t)run * 4);
        if (first ? next != first + (uint64_t)run * cs / s->unit || !entry_is_sane(s, next) : next)
            break;
        run++;
    }
    *out = (struct extent){.length = min_u64(length, (uint64_t)run * cs - in),
                           .kind = first ? EXTENT_DATA : EXTENT_HOLE};
    if (first) {
        out->flags = EXTENT_IN_PLACE;
        out->storage = s->file;
        out->host_offset = (uint64_t)first * s->unit + in;
    }
    return 0;
}

/* ---------------------------------------------------------------- room */

static int scan_co(struct parallels *s) {
    uint64_t end = s->data_offset;
    uint8_t *buf = buf_get(PIECE);
    int r = buf ? 0 : -ENOMEM;
    for (uint32_t done = 0; !r && done < s->entries;) {
        uint32_t count = (uint32_t)min_u64(PIECE / 4, s->entries - done);
        r = disk_pread_co(s->file, HEADER_BYTES + (uint64_t)done * 4, buf, count * 4);
        for (uint32_t i = 0; !r && i < count; i++) {
            uint32_t entry = le32_load(buf + i * 4);
            if (entry && entry_is_sane(s, entry))
                end = max_u64(end, (uint64_t)entry * s->unit + s->cluster_size);
        }
        done += count;
    }
    buf_put(buf, PIECE);
    if (!r) {
        s->end = end;
        s->scanned = true;
    }
    return r;
}

/* The header says that the image is in use, and no longer has what a write makes untrue. */
static int mark_co(struct parallels *s) {
    uint8_t before[HEADER_BYTES];
    if (s->marked && !le64_load(s->header + AT_EXTENSION))
        return 0;
    memcpy(before, s->header, sizeof(before));
    le32_store(s->header + AT_IN_USE, IN_USE);
    le64_store(s->header + AT_EXTENSION, 0);
    int r = write_header_co(s);
    if (r < 0)
        memcpy(s->header, before, sizeof(before));
    s->marked = r == 0;
    return r;
}

static int parallels_place_co(struct node *n, uint64_t offset, uint64_t length, unsigned flags,
                              uint32_t coded_length, struct placement *out) {
    struct parallels *s = parallels_of(n);
    uint32_t cs = s->cluster_size, in = (uint32_t)(offset & (cs - 1));
    struct extent x;
    if (flags & PLACE_CODED)
        return -ENOTSUP;
    int r = pages_crowded(&s->pages) ? parallels_flush_co(n) : 0;
    if (!r)
        r = parallels_map_co(n, offset, length, &x);
    if (r < 0)
        return r;
    *out = (struct placement){.offset = offset, .length = x.length, .storage = s->file};
    if (x.kind == EXTENT_DATA) {
        out->host_offset = x.host_offset;
        return 0;
    }
    uint64_t count = div_up(in + x.length, cs), file_end = s->file->size, host = 0;
    task_mutex_lock_co(&s->alloc_lock);
    if (!s->scanned)
        r = scan_co(s);
    if (!r)
        r = mark_co(s);
    if (!r && (s->end + count * cs) / s->unit > UINT32_MAX)
        r = -EFBIG;
    if (!r) {
        host = s->end;
        s->end += count * cs;
    }
    task_mutex_unlock(&s->alloc_lock);
    if (r < 0)
        return r;
    out->host_offset = host + in;
    out->head = in;
    out->tail = (uint32_t)((cs - ((in + x.length) & (cs - 1))) & (cs - 1));
    out->is_new = true;
    out->reads_zero = s->file->storage_flags & STORAGE_ZERO_INIT && host >= file_end;
    out->cookie[0] = host;
    out->cookie[1] = count;
    return 0;
}

static int parallels_publish_co(struct node *n, const struct placement *p) {
    struct parallels *s = parallels_of(n);
    uint32_t index = (uint32_t)(p->offset / s->cluster_size);
    uint64_t host = p->cookie[0];
    for (uint64_t count = p->is_new ? p->cookie[1] : 0; count;) {
        struct page *page;
        uint8_t *at = NULL;
        uint32_t left = 0;
        int r = table_page_co(s, index, &page, &at, &left);
        if (r < 0)
            return r;
        pages_modify(&s->pages, page);
        for (; left && count; left--, count--, index++, at += 4, host += s->cluster_size)
            le32_store(at, (uint32_t)(host / s->unit));
    }
    return 0;
}

static void parallels_abandon(struct node *n, const struct placement *p) {
    struct parallels *s = parallels_of(n);
    if (p->is_new && p->cookie[0] + p->cookie[1] * s->cluster_size == s->end)
        s->end = p->cookie[0];
}

static int parallels_flush_co(struct node *n) {
    struct parallels *s = parallels_of(n);
    struct pages_batch b = {0};
    task_mutex_lock_co(&s->flush_lock);
    int r = pages_take(&s->pages, 0, &b);
    if (!r && b.count && s->file->size < s->end)
        r = disk_resize_co(s->file, s->end, PREALLOC_OFF, NULL);
    if (!r && !PLANTED(NO_BARRIER_BEFORE_TABLES))
        r = disk_flush_co(s->file);
    if (!r && b.count) {
        r = pages_write_co(&s->pages, &b);
        if (!r && !PLANTED(NO_LAST_BARRIER))
            r = disk_flush_co(s->file);
    }
    pages_give_back(&s->pages, &b);
    task_mutex_unlock(&s->flush_lock);
    return r;
}

/* ---------------------------------------------------------------- check */

/* Each cluster lies in the file, at a cluster's distance from the data offset, and once. */
static int check_entry(struct parallels *s, struct check_result *r, struct seen *seen,
                       uint64_t index, uint32_t entry) {
    uint64_t host = (uint64_t)entry * s->unit;
    if (!entry)
        return 0;
    if (!entry_is_sane(s, entry) || (host - s->data_offset) % s->cluster_size) {
        problem_corruption(r,
                           "entry %" PRIu64 " names a cluster at %" PRIu64
                           ", which is not in the file or not aligned",
                           index, host);
        return 0;
    }
    int met = seen_add(seen, (host - s->data_offset) / s->cluster_size);
    if (met < 0)
        return met;
    r->allocated_clusters++;
    r->image_end_offset = max_u64(r->image_end_offset, host + s->cluster_size);
    if (met) {
        problem_corruption(
            r, "entry %" PRIu64 " names the cluster at %" PRIu64 ", which another entry names too",
            index, host);
    }
    return 0;
}

static int parallels_check_co(struct node *n, struct check_result *r, struct err *e) {
    struct parallels *s = parallels_of(n);
    uint64_t size = s->file->size;
    uint64_t room = size > s->data_offset ? size - s->data_offset : 0;
    struct seen seen;
    uint8_t *buf = buf_get(PIECE);
    int rc = buf ? seen_init(&seen, div_up(room, s->cluster_size)) : -ENOMEM;
    r->image_end_offset = s->data_offset;
    for (uint32_t done = 0; !rc && done < s->entries;) {
        uint32_t count = (uint32_t)min_u64(PIECE / 4, s->entries - done);
        rc = disk_pread_co(s->file, HEADER_BYTES + (uint64_t)done * 4, buf, count * 4);
        for (uint32_t i = 0; !rc && i < count; i++)
            rc = check_entry(s, r, &seen, done + i, le32_load(buf + i * 4));
        done += count;
        if (r->progress)
            r->progress(r->arg, done, s->entries);
    }
    if (buf)
        seen_free(&seen);
    buf_put(buf, PIECE);
    if (rc < 0)
        return err_errno(e, -rc, "reading the table");
    r->total_clusters = s->entries;
    if (size > r->image_end_offset) {
        uint64_t unused = div_up(size - r->image_end_offset, s->cluster_size);
        problem_leaks(r, unused, "%" PRIu64 " clusters at the end of the file are not in use",
                      unused);
    }
    return 0;
}

static json_t *parallels_describe(struct node *n) {
    const struct parallels *s = parallels_of(n);
    return json_pack("{s:s, s:b}", "magic", s->unit == SECTOR ? magic_old : magic_new, "dirty-flag",
                     le32_load(s->header + AT_IN_USE) == IN_USE);
}

/* ---------------------------------------------------------------- creation, growth */

struct parallels_create_opts {
    uint64_t size, cluster_size;
};

static const struct opt parallels_create_opt_table[] = {
    OPT_SIZE(struct parallels_create_opts, size, "size", OPT_CREATE, 0, OPT_ANY,
             "size of the disk"),
    OPT_SIZE(struct parallels_create_opts, cluster_size, "cluster_size", OPT_CREATE, MIB,
             OPT_POW2(SECTOR, CLUSTER_MAX), "unit of allocation"),
    OPT_END,
};

static int layout_compute(const struct parallels_create_opts *o, uint64_t size, uint32_t *entries,
                          uint64_t *data_offset, struct err *e) {
    uint64_t count = div_up(align_up(size, SECTOR), o->cluster_size);
    if (count > ENTRIES_MAX)
        return err_set(e, EFBIG,
                       "disk size %" PRIu64 " is above the limit of %" PRIu64
                       " for clusters of %" PRIu64 " bytes",
                       size, ENTRIES_MAX * o->cluster_size, o->cluster_size);
    *entries = (uint32_t)count;
    *data_offset = align_up(HEADER_BYTES + count * 4, o->cluster_size);
    return 0;
}

static int parallels_create_co(struct node *file, const void *create_opts, struct create_ctx *ctx,
                               struct err *e) {
    const struct parallels_create_opts *o = create_opts;
    uint8_t h[HEADER_BYTES] = {0};
    uint64_t data_offset, size = align_up(o->size, SECTOR);
    uint32_t entries;
    int r = layout_compute(o, size, &entries, &data_offset, e);
    if (r)
        return r;
    memcpy(h, magic_new, 16);
    le32_store(h + AT_VERSION, 2);
    le32_store(h + AT_HEADS, 16);
    le32_store(h + AT_CYLINDERS, (uint32_t)min_u64(UINT32_MAX, size / SECTOR / 16 / 32));
    le32_store(h + AT_TRACKS, (uint32_t)(o->cluster_size / SECTOR));
    le32_store(h + AT_ENTRIES, entries);
    le64_store(h + AT_SECTORS, size / SECTOR);
    le32_store(h + AT_DATA, (uint32_t)(data_offset / SECTOR));
    r = disk_resize_co(file, data_offset, PREALLOC_OFF, e);
    if (r)
        return r;
    if (!(file->storage_flags & STORAGE_ZERO_INIT))
        r = disk_zero_co(file, 0, data_offset, 0);
    if (!r)
        r = disk_pwrite_co(file, 0, h, sizeof(h));
    return r ? err_errno(e, -r, "writing the header") : 0;
}

static int parallels_measure(const void *create_opts, const struct measure_in *in,
                             struct measure_result *out, struct err *e) {
    const struct parallels_create_opts *o = create_opts;
    uint64_t data_offset;
    uint32_t entries;
    int r = layout_compute(o, in->size, &entries, &data_offset, e);
    if (r)
        return r;
    out->required = data_offset + in->touched[__builtin_ctzll(o->cluster_size)] * o->cluster_size;
    out->fully_allocated = data_offset + entries * o->cluster_size;
    out->bound_required = out->required;
    out->bound_fully = out->fully_allocated;
    return 0;
}

/* The table has room up to the data; its entries there are made free. */
static int parallels_reach_co(struct node *n, uint64_t size, struct err *e) {
    struct parallels *s = parallels_of(n);
    uint64_t entries = div_up(size, s->cluster_size);
    uint64_t room = (s->data_offset - HEADER_BYTES) / 4;
    if (size % SECTOR)
        return err_set(e, EINVAL, "size %" PRIu64 " is not a multiple of 512", size);
    if (entries > room || entries > ENTRIES_MAX) {
        err_set(e, ENOTSUP,
                "%" PRIu64
                " clusters are needed, and the table of this image has room for %" PRIu64,
                entries, room);
        err_hint(e, "convert it to a new image, or grow it in another format");
        return -ENOTSUP;
    }
    if (entries <= s->entries)
        return 0;
    int r = parallels_flush_co(n);
    if (!r)
        r = disk_zero_co(s->file, HEADER_BYTES + (uint64_t)s->entries * 4,
                         (entries - s->entries) * 4, 0);
    if (!r)
        r = pages_forget_all(&s->pages);
    if (r < 0)
        return err_errno(e, -r, "making the table longer");
    s->entries = (uint32_t)entries;
    return 0;
}

static int parallels_resize_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    struct parallels *s = parallels_of(n);
    uint8_t before[HEADER_BYTES];
    if (prealloc != PREALLOC_OFF)
        return err_set(e, ENOTSUP, "a Parallels image grows without preallocation only");
    if (size < n->size)
        return err_set(e, ENOTSUP, "a Parallels image cannot shrink; convert it instead");
    if (s->unit == SECTOR && size / SECTOR > UINT32_MAX)
        return err_set(e, EFBIG, "size %" PRIu64 " is above the limit of this kind of image", size);
    memcpy(before, s->header, sizeof(before));
    if (s->unit == SECTOR)
        le32_store(s->header + AT_SECTORS, (uint32_t)(size / SECTOR));
    else
        le64_store(s->header + AT_SECTORS, size / SECTOR);
    le32_store(s->header + AT_ENTRIES, s->entries);
    /* An old image that does not say where its data begins says it from now on. */
    le32_store(s->header + AT_DATA, (uint32_t)(s->data_offset / SECTOR));
    int r = write_header_co(s);
    if (r < 0) {
        memcpy(s->header, before, sizeof(before));
        return err_errno(e, -r, "writing the header");
    }
    n->size = size;
    return 0;
}

static const struct opt parallels_open_opts[] = {OPT_CHILD("file", OPT_OPEN, "the storage"),
                                                 OPT_END};

static const struct format_ops parallels_format = {
    .probe = parallels_probe,
    .create_co = parallels_create_co,
    .map_co = parallels_map_co,
    .place_co = parallels_place_co,
    .publish_co = parallels_publish_co,
    .abandon = parallels_abandon,
    .set_zero_co = in_place_set_zero_co,
    .discard_co = in_place_discard_co,
    .reach_co = parallels_reach_co,
    .resize_co = parallels_resize_co,
    .flush_co = parallels_flush_co,
    .check_co = parallels_check_co,
    .describe = parallels_describe,
    .measure = parallels_measure,
};

const struct driver driver_parallels = {
    .name = "parallels",
    .kind = DRIVER_FORMAT,
    .help = "expandable image of Parallels",
    .state_size = sizeof(struct parallels),
    .opts = parallels_open_opts,
    .create_opts = parallels_create_opt_table,
    .create_opts_size = sizeof(struct parallels_create_opts),
    .open_co = parallels_open_co,
    .close_co = parallels_close_co,
    .reopen_co = parallels_reopen_co,
    .format = &parallels_format,
};
