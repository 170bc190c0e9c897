/* SPDX-License-Identifier: MIT */
/* Parallels: the header, opening, the mark of use, and the driver table. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"
#include "disk/open.h"
#include "format/in_place.h"
#include "format/parallels/parallels.h"

#define PAGES_BYTES (8 * MIB)

static int parallels_probe(const struct probe_data *p) {
    return p->head_length >= PARALLELS_HEADER_BYTES &&
                   le32_load(p->head + PARALLELS_AT_VERSION) == 2 &&
                   (!memcmp(p->head, PARALLELS_MAGIC_OLD, 16) ||
                    !memcmp(p->head, PARALLELS_MAGIC_NEW, 16))
               ? 100
               : 0;
}

static int parse_header(struct node *n, struct err *e) {
    struct parallels *s = parallels_of(n);
    const uint8_t *h = s->header;
    bool extended = !memcmp(h, PARALLELS_MAGIC_NEW, 16);
    uint64_t sectors =
        extended ? le64_load(h + PARALLELS_AT_SECTORS) : le32_load(h + PARALLELS_AT_SECTORS);
    uint32_t tracks = le32_load(h + PARALLELS_AT_TRACKS), data = le32_load(h + PARALLELS_AT_DATA);
    if (!extended && memcmp(h, PARALLELS_MAGIC_OLD, 16))
        return err_set(e, EINVAL, "not a Parallels image");
    if (le32_load(h + PARALLELS_AT_VERSION) != 2)
        return err_set(e, ENOTSUP, "version %" PRIu32 " is unknown (2)",
                       le32_load(h + PARALLELS_AT_VERSION));
    if (!tracks || tracks > PARALLELS_CLUSTER_MAX / PARALLELS_SECTOR)
        return err_set(e, EINVAL, "clusters of %" PRIu32 " sectors are not from 1 to %u", tracks,
                       PARALLELS_CLUSTER_MAX / PARALLELS_SECTOR);
    s->cluster_size = tracks * PARALLELS_SECTOR;
    s->entries = le32_load(h + PARALLELS_AT_ENTRIES);
    s->unit = extended ? s->cluster_size : PARALLELS_SECTOR;
    if (s->entries > PARALLELS_ENTRIES_MAX)
        return err_set(e, EFBIG, "%" PRIu32 " table entries are above the limit of %u", s->entries,
                       PARALLELS_ENTRIES_MAX);
    uint64_t table_end = PARALLELS_HEADER_BYTES + (uint64_t)s->entries * 4;
    s->data_offset =
        data ? (uint64_t)data * PARALLELS_SECTOR : align_up(table_end, PARALLELS_SECTOR);
    if (sectors > INT64_MAX / PARALLELS_SECTOR || sectors > (uint64_t)s->entries * tracks)
        return err_set(e, EINVAL,
                       "a disk of %" PRIu64 " sectors is more than %" PRIu32 " clusters of %" PRIu32
                       " sectors hold",
                       sectors, s->entries, tracks);
    bool wrong = s->data_offset < table_end || (extended && s->data_offset % s->cluster_size);
    if (wrong && n->flags & NODE_CHECK) {
        s->data_wrong = true;
        s->data_offset = align_up(table_end, PARALLELS_SECTOR);
        if (extended)
            s->data_offset = div_up(table_end, s->cluster_size) * s->cluster_size;
    } else if (wrong) {
        err_set(e, EINVAL,
                "the data at %" PRIu64 " begins inside the table, which ends at %" PRIu64
                ", or not at a cluster",
                s->data_offset, table_end);
        err_hint(e, "repair it with: strata check -r all");
        return -EINVAL;
    }
    if (table_end > n->file->size)
        return err_set(e, EINVAL,
                       "the table ends at %" PRIu64 ", behind the end of the file (%" PRIu64
                       " bytes)",
                       table_end, n->file->size);
    n->size = sectors * PARALLELS_SECTOR;
    n->granularity = is_pow2(tracks) ? s->cluster_size : PARALLELS_SECTOR;
    return 0;
}

enum { EXTENSION_HEAD = 24, FEATURE_HEAD = 24, FEATURE_NECESSARY = 1 };

int parallels_check_extension_co(struct parallels *s, struct err *e) {
    uint64_t at = le64_load(s->header + PARALLELS_AT_EXTENSION), feature = 0;
    uint32_t bytes = (uint32_t)min_u64(s->cluster_size, MIB);
    if (!at || at > (uint64_t)INT64_MAX / PARALLELS_SECTOR - MIB)
        return 0;
    uint8_t *buf = buf_get(bytes);
    int r = buf ? disk_pread_co(s->file, at * PARALLELS_SECTOR, buf, bytes) : -ENOMEM;
    if (!r && le64_load(buf) == PARALLELS_EXTENSION_MAGIC)
        for (uint64_t i = EXTENSION_HEAD;
             !feature && i + FEATURE_HEAD <= bytes && le64_load(buf + i);
             i += FEATURE_HEAD + align_up(le32_load(buf + i + 16), 8))
            if (le64_load(buf + i + 8) & FEATURE_NECESSARY)
                feature = le64_load(buf + i);
    buf_put(buf, bytes);
    if (r < 0)
        return err_errno(e, -r, "reading the format extension");
    if (!feature)
        return 0;
    return err_set(e, ENOTSUP,
                   "feature 0x%016" PRIx64
                   " of the format extension, which is not known, says that "
                   "without it the image must not be changed",
                   feature);
}

/* What another writer left unfinished is repaired before the first write. */
static int become_writable_co(struct node *n, struct err *e) {
    struct parallels *s = parallels_of(n);
    if (!is_pow2(s->cluster_size))
        return err_set(e, ENOTSUP,
                       "clusters of %" PRIu32
                       " bytes, not a power of two, can only be read; convert the image",
                       s->cluster_size);
    s->scanned = false;
    int r = parallels_check_extension_co(s, e);
    if (r < 0 || le32_load(s->header + PARALLELS_AT_IN_USE) != PARALLELS_IN_USE)
        return r;
    struct check_result found = {.fix = CHECK_FIX_LEAKS | CHECK_FIX_ERRORS};
    r = parallels_check_co(n, &found, e);
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
    if ((r = disk_pread_co(n->file, 0, s->header, PARALLELS_HEADER_BYTES)) < 0)
        return err_errno(e, -r, "reading the header");
    r = parse_header(n, e);
    if (!r && pages_init(&s->pages, n->file, PAGES_BYTES) < 0)
        r = err_set(e, ENOMEM, "no memory for the table");
    if (!r && node_is_rw(n) && !(n->flags & NODE_CHECK))
        r = become_writable_co(n, e);
    return r;
}

int parallels_header_write_co(struct parallels *s) {
    int r = disk_pwrite_co(s->file, 0, s->header, PARALLELS_HEADER_BYTES);
    return r < 0 ? r : disk_flush_co(s->file);
}

/* All is written: the image is not in use any more.  An error leaves the mark, which is safe. */
static void unmark_co(struct parallels *s) {
    if (!s->marked || pages_dirty(&s->pages))
        return;
    le32_store(s->header + PARALLELS_AT_IN_USE, 0);
    if (parallels_header_write_co(s) < 0)
        le32_store(s->header + PARALLELS_AT_IN_USE, PARALLELS_IN_USE);
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

static json_t *parallels_describe(struct node *n) {
    const struct parallels *s = parallels_of(n);
    return json_pack("{s:s, s:b}", "magic",
                     s->unit == PARALLELS_SECTOR ? PARALLELS_MAGIC_OLD : PARALLELS_MAGIC_NEW,
                     "dirty-flag", le32_load(s->header + PARALLELS_AT_IN_USE) == PARALLELS_IN_USE);
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
    .repairs = CHECK_FIX_LEAKS | CHECK_FIX_ERRORS,
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
