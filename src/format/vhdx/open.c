/* SPDX-License-Identifier: MIT */
/* VHDX: opening, what the image says about itself, and the driver table. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/strbuf.h"
#include "disk/io.h"
#include "disk/open.h"
#include "format/utf16.h"
#include "format/vhdx/vhdx.h"

#define PAGES_BYTES (16 * MIB) /* of BAT, bitmaps and metadata in memory */
#define CREATOR_BYTES 512u

static int vhdx_probe(const struct probe_data *p) {
    return p->head_length >= 8 && !memcmp(p->head, "vhdxfile", 8) ? 100 : 0;
}

/* ---------------------------------------------------------------- headers */

static int read_ident_co(struct vhdx *s, struct err *e) {
    uint8_t buf[8 + CREATOR_BYTES];
    AUTO_STRBUF struct strbuf name = STRBUF_INIT;
    int r = disk_pread_co(s->file, 0, buf, sizeof(buf));
    if (r)
        return err_errno(e, -r, "reading the file identifier");
    if (memcmp(buf, "vhdxfile", 8))
        return err_set(e, EINVAL, "not a VHDX image: it does not begin with 'vhdxfile'");
    if (utf16_to_utf8(buf + 8, CREATOR_BYTES, false, &name))
        s->creator = strbuf_steal(&name);
    return 0;
}

/* The valid header with the higher number; equal numbers only of equal headers. */
static int choose_header(struct vhdx *s, const uint8_t *buf, struct err *e) {
    struct vhdx_header h[2];
    struct err why[2] = {ERR_INIT, ERR_INIT};
    int r[2];
    for (int i = 0; i < 2; i++) {
        r[i] = vhdx_header_parse(buf + i * VHDX_HEADER_BYTES, &h[i], &why[i]);
        s->header_ok[i] = !r[i];
    }
    int result = 0;
    if (r[0] && r[1]) {
        /* Of a known kind but another version says more than damage. */
        int which = r[1] == -ENOTSUP && r[0] != -ENOTSUP;
        result = r[which];
        if (e)
            err_move(e, &why[which]);
    } else if (!r[0] && !r[1] && h[0].sequence == h[1].sequence &&
               memcmp(buf, buf + VHDX_HEADER_BYTES, VHDX_HEADER_BYTES)) {
        result = err_set(e, EINVAL, "two different headers have the sequence number %" PRIu64,
                         h[0].sequence);
    } else {
        s->current = r[0] || (!r[1] && h[1].sequence > h[0].sequence);
        s->h = h[s->current];
    }
    err_clear(&why[0]);
    err_clear(&why[1]);
    return result;
}

static int read_headers_co(struct vhdx *s, struct err *e) {
    uint8_t *buf = buf_get(2 * VHDX_HEADER_BYTES);
    int r = buf ? 0 : -ENOMEM;
    for (int i = 0; !r && i < 2; i++)
        r = disk_pread_co(s->file, VHDX_HEADER_AT(i), buf + i * VHDX_HEADER_BYTES,
                          VHDX_HEADER_BYTES);
    r = r < 0 ? err_errno(e, -r, "reading the headers") : choose_header(s, buf, e);
    buf_put(buf, 2 * VHDX_HEADER_BYTES);
    return r;
}

/* ---------------------------------------------------------------- regions */

static int check_places(const struct vhdx *s, struct err *e) {
    uint32_t count = s->r.other_count + 3;
    struct vhdx_range *all = calloc(count, sizeof(*all));
    int r = all ? 0 : err_set(e, ENOMEM, "no memory for regions");
    if (all) {
        all[0] = (struct vhdx_range){s->h.log_offset, s->h.log_length};
        all[1] = s->r.bat;
        all[2] = s->r.metadata;
        for (uint32_t i = 3; i < count; i++)
            all[i] = s->r.others[i - 3];
    }
    for (uint32_t i = 0; !r && i < count; i++) {
        if (i < 3 && all[i].offset + all[i].length > vhdx_file_size(s))
            r = err_set(e, EINVAL,
                        "the %s (%" PRIu64 " bytes at %" PRIu64
                        ") reaches behind the end of the file (%" PRIu64 " bytes)",
                        i == 0   ? "log"
                        : i == 1 ? "BAT"
                                 : "metadata region",
                        all[i].length, all[i].offset, vhdx_file_size(s));
        for (uint32_t k = 0; !r && k < i; k++)
            if (ranges_overlap(all[i].offset, all[i].length, all[k].offset, all[k].length))
                r = err_set(e, EINVAL,
                            "regions overlap: %" PRIu64 " bytes at %" PRIu64 ", %" PRIu64
                            " bytes at %" PRIu64,
                            all[i].length, all[i].offset, all[k].length, all[k].offset);
    }
    free(all);
    return r;
}

static int read_regions_co(struct vhdx *s, struct err *e) {
    uint8_t *buf = buf_get(VHDX_REGION_TABLE_BYTES);
    struct err first AUTO_ERR = ERR_INIT;
    bool known = false;
    int result = buf ? 0 : err_set(e, ENOMEM, "no memory for the region table");
    for (int i = 0; buf && i < 2; i++) {
        struct vhdx_regions got = {0};
        struct err why AUTO_ERR = ERR_INIT;
        int r = vhdx_read_co(s, VHDX_REGIONS_AT(i), buf, VHDX_REGION_TABLE_BYTES);
        r = r < 0 ? err_errno(&why, -r, "reading a region table")
                  : vhdx_regions_parse(buf, &got, &why);
        s->regions_ok[i] = !r;
        if (!r && !known) {
            s->r = got;
            got.others = NULL;
            known = true;
            result = 0;
        } else if (r && !known && !result) {
            result = r;
            err_move(&first, &why);
            if (r == -ENOTSUP) /* whole, and says what we cannot do */
                i = 2;
        }
        free(got.others);
    }
    buf_put(buf, VHDX_REGION_TABLE_BYTES);
    if (known)
        return check_places(s, e);
    if (first.code && e)
        err_move(e, &first);
    return result;
}

/* ---------------------------------------------------------------- metadata */

static uint64_t item_at(const struct vhdx *s, const struct vhdx_range *item) {
    return s->r.metadata.offset + item->offset;
}

static int read_item_co(struct vhdx *s, const struct vhdx_range *item, uint8_t *buf, size_t bytes) {
    memset(buf, 0, bytes);
    return item->length < bytes ? 0 : vhdx_read_co(s, item_at(s, item), buf, bytes);
}

static int read_items_co(struct vhdx *s, const struct vhdx_range *items) {
    uint8_t buf[16];
    struct vhdx_metadata *m = &s->m;
    int r = read_item_co(s, &items[VHDX_ITEM_PARAMETERS], buf, 8);
    m->block_size = le32_load(buf);
    m->fixed = le32_load(buf + 4) & 1;
    m->has_parent = le32_load(buf + 4) & 2;
    if (!r)
        r = read_item_co(s, &items[VHDX_ITEM_SIZE], buf, 8);
    m->size = le64_load(buf);
    m->size_at = item_at(s, &items[VHDX_ITEM_SIZE]);
    if (!r)
        r = read_item_co(s, &items[VHDX_ITEM_DISK_ID], buf, 16);
    memcpy(m->disk_id.b, buf, 16);
    if (!r)
        r = read_item_co(s, &items[VHDX_ITEM_LOGICAL], buf, 4);
    m->logical_sector = le32_load(buf);
    if (!r)
        r = read_item_co(s, &items[VHDX_ITEM_PHYSICAL], buf, 4);
    m->physical_sector = le32_load(buf);
    if (items[VHDX_ITEM_LOCATOR].length)
        m->locator = (struct vhdx_range){item_at(s, &items[VHDX_ITEM_LOCATOR]),
                                         items[VHDX_ITEM_LOCATOR].length};
    return r;
}

static int read_metadata_co(struct vhdx *s, struct err *e) {
    uint8_t *buf = buf_get(VHDX_METADATA_TABLE_BYTES);
    struct vhdx_range items[VHDX_ITEMS];
    int r = buf ? vhdx_read_co(s, s->r.metadata.offset, buf, VHDX_METADATA_TABLE_BYTES) : -ENOMEM;
    if (r < 0)
        err_errno(e, -r, "reading the metadata table");
    else
        r = vhdx_items_parse(buf, s->r.metadata.length, items, e);
    buf_put(buf, VHDX_METADATA_TABLE_BYTES);
    if (!r && (r = read_items_co(s, items)) < 0)
        err_errno(e, -r, "reading the metadata");
    if (!r)
        r = vhdx_metadata_check(&s->m, e);
    if (r)
        return r;
    uint64_t entries = vhdx_bat_entries(&s->m, s->m.size);
    if (entries * 8 > s->r.bat.length)
        return err_set(e, EINVAL,
                       "a BAT of %" PRIu64 " bytes, and a disk of %" PRIu64 " bytes needs %" PRIu64
                       " entries of 8",
                       s->r.bat.length, s->m.size, entries);
    s->ratio = vhdx_ratio(&s->m);
    return 0;
}

/* ---------------------------------------------------------------- the log */

int vhdx_replay_co(struct vhdx *s, const struct vhdx_replay *p, struct err *e) {
    int r = p->entries ? vhdx_log_apply_co(s, p, e) : 0;
    if (r)
        return r;
    memset(&s->h.log_guid, 0, sizeof(s->h.log_guid));
    r = vhdx_header_update_co(s);
    if (r < 0)
        return err_errno(e, -r, "writing the header");
    s->replayed = true;
    s->replayed_entries = p->entries;
    return 0;
}

static int open_log_co(struct vhdx *s, bool rw, struct err *e) {
    struct vhdx_replay found;
    if (!vhdx_log_counts(s))
        return 0;
    int r = vhdx_log_read_co(s, &found, e);
    if (r || !rw) {
        s->replay = found;
        return r;
    }
    r = vhdx_replay_co(s, &found, e);
    vhdx_replay_free(&found);
    return r;
}

/* ---------------------------------------------------------------- the driver */

static int load_page_co(void *arg, uint64_t host, void *buf, size_t length) {
    return vhdx_read_co(arg, host, buf, length);
}

static int check_writable(const struct vhdx *s, struct err *e) {
    if (!s->h.log_length)
        return err_set(e, ENOTSUP, "the image has no log and can only be read");
    return 0;
}

static int vhdx_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct vhdx *s = vhdx_of(n);
    s->node = n;
    task_mutex_init(&s->begin_lock);
    task_mutex_init(&s->alloc_lock);
    task_mutex_init(&s->flush_lock);
    int r = node_open_child_co(n, ctx, "file", CHILD_FILE_METADATA, &n->file, e);
    if (r)
        return r;
    s->file = n->file;
    r = read_ident_co(s, e);
    if (!r)
        r = read_headers_co(s, e);
    if (!r)
        r = open_log_co(s, node_is_rw(n), e);
    if (!r)
        r = read_regions_co(s, e);
    if (!r)
        r = read_metadata_co(s, e);
    if (!r && node_is_rw(n))
        r = check_writable(s, e);
    if (!r && pages_init(&s->pages, n->file, PAGES_BYTES) < 0)
        r = err_set(e, ENOMEM, "no memory for tables");
    if (r)
        return r;
    s->pages.load_co = load_page_co;
    s->pages.load_arg = s;
    s->next = align_up(vhdx_file_size(s), VHDX_MIB);
    n->size = s->m.size;
    n->granularity = s->m.block_size;
    return s->m.has_parent ? vhdx_open_parent_co(s, ctx, e) : 0;
}

static void vhdx_close_co(struct node *n) {
    struct vhdx *s = vhdx_of(n);
    if (s->begun && !pages_dirty(&s->pages))
        vhdx_end_co(s); /* else, and after an error, the log counts at the next open */
    pages_free(&s->pages);
    vhdx_replay_free(&s->replay);
    free(s->r.others);
    free(s->spares);
    free(s->creator);
    s->r.others = NULL;
    s->spares = NULL;
    s->creator = NULL;
}

static int vhdx_reopen_co(struct node *n, unsigned new_flags, struct err *e) {
    struct vhdx *s = vhdx_of(n);
    if (!(new_flags & NODE_RW)) {
        int r = vhdx_end_co(s);
        return r < 0 ? err_errno(e, -r, "closing the log") : 0;
    }
    if (node_is_rw(n))
        return 0;
    int r = check_writable(s, e);
    if (!r && vhdx_log_counts(s))
        r = vhdx_replay_co(s, &s->replay, e);
    if (r)
        return r;
    vhdx_replay_free(&s->replay);
    s->next = align_up(s->file->size, VHDX_MIB);
    s->scanned = false;
    s->spare_count = 0;
    return 0;
}

static void put_guid(json_t *o, const char *key, const struct vhdx_guid *g) {
    char text[37];
    vhdx_guid_text(g, text);
    json_object_set_new(o, key, json_string(text));
}

static json_t *vhdx_describe(struct node *n) {
    const struct vhdx *s = vhdx_of(n);
    json_t *o = json_object();
    if (!o)
        return NULL;
    json_object_set_new(o, "subformat",
                        json_string(s->m.has_parent ? "differencing"
                                    : s->m.fixed    ? "fixed"
                                                    : "dynamic"));
    if (s->creator)
        json_object_set_new(o, "creator", json_string(s->creator));
    json_object_set_new(o, "block-size", json_integer(s->m.block_size));
    json_object_set_new(o, "log-size", json_integer(s->h.log_length));
    json_object_set_new(o, "logical-sector-size", json_integer(s->m.logical_sector));
    json_object_set_new(o, "physical-sector-size", json_integer(s->m.physical_sector));
    json_object_set_new(o, "sequence-number", json_integer((json_int_t)s->h.sequence));
    put_guid(o, "disk-id", &s->m.disk_id);
    put_guid(o, "file-write-guid", &s->h.file_write);
    put_guid(o, "data-write-guid", &s->h.data_write);
    if (s->m.has_parent)
        put_guid(o, "parent-linkage", &s->linkage);
    json_object_set_new(o, "log-entries-to-replay", json_integer(s->replay.entries));
    return o;
}

static const struct opt vhdx_open_opts[] = {
    OPT_CHILD("file", OPT_OPEN, "the storage"),
    OPT_CHILD("backing", OPT_OPEN, "the parent of a differencing image"),
    OPT_END,
};

static const struct format_ops vhdx_format = {
    .probe = vhdx_probe,
    .create_co = vhdx_create_co,
    .map_co = vhdx_map_co,
    .place_co = vhdx_place_co,
    .publish_co = vhdx_publish_co,
    .abandon = vhdx_abandon,
    .set_zero_co = vhdx_set_zero_co,
    .discard_co = vhdx_discard_co,
    .reach_co = vhdx_reach_co,
    .resize_co = vhdx_resize_co,
    .flush_co = vhdx_flush_co,
    .set_backing_co = vhdx_set_backing_co,
    .empty_co = vhdx_empty_co,
    .repairs = CHECK_FIX_LEAKS | CHECK_FIX_ERRORS,
    .check_co = vhdx_check_co,
    .describe = vhdx_describe,
    .measure = vhdx_measure,
};

const struct driver driver_vhdx = {
    .name = "vhdx",
    .kind = DRIVER_FORMAT,
    .help = "VHDX, the disk image of Hyper-V, with a log",
    .state_size = sizeof(struct vhdx),
    .opts = vhdx_open_opts,
    .create_opts = vhdx_create_opt_table,
    .create_opts_size = sizeof(struct vhdx_create_opts),
    .open_co = vhdx_open_co,
    .close_co = vhdx_close_co,
    .reopen_co = vhdx_reopen_co,
    .format = &vhdx_format,
};
