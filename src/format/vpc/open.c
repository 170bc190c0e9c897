/* SPDX-License-Identifier: MIT */
/* VHD: opening, parents, and the driver table. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/strbuf.h"
#include "disk/io.h"
#include "disk/open.h"
#include "format/in_place.h"
#include "format/utf16.h"
#include "format/vpc/vpc.h"

#define PAGES_BYTES (12 * MIB) /* of tables and bitmaps in memory */
#define PATH_BYTES_MAX 4096u   /* of a locator's path */

static int vpc_probe(const struct probe_data *p) {
    if (p->head_length >= VPC_FOOTER_BYTES && !memcmp(p->head, "conectix", 8))
        return 100;
    /* A fixed image has its footer at the end only. */
    struct vpc_footer f;
    if (p->tail_length < VPC_FOOTER_BYTES || p->size % VPC_SECTOR)
        return 0;
    const uint8_t *footer = p->tail + p->tail_length - VPC_FOOTER_BYTES;
    return vpc_footer_parse(footer, &f, NULL) || f.type != VPC_FIXED ||
                   f.current_size > p->size - VPC_FOOTER_BYTES
               ? 0
               : 90;
}

/* The copy in front, else the footer. */
static int read_footer_co(struct vpc *s, struct err *e) {
    uint64_t size = s->file->size;
    struct err front AUTO_ERR = ERR_INIT;
    int r = disk_pread_co(s->file, 0, s->footer, VPC_FOOTER_BYTES);
    if (r)
        return err_errno(e, -r, "reading the footer's copy");
    r = vpc_footer_parse(s->footer, &s->f, &front);
    if (r != -EINVAL) { /* whole, whatever it says */
        if (r && e)
            err_move(e, &front);
        return r;
    }
    bool copy = !memcmp(s->footer, "conectix", 8);
    if (size < VPC_FOOTER_BYTES)
        return err_set(e, EINVAL, "the file has %" PRIu64 " bytes, fewer than a footer", size);
    r = disk_pread_co(s->file, size - VPC_FOOTER_BYTES, s->footer, VPC_FOOTER_BYTES);
    if (r)
        return err_errno(e, -r, "reading the footer");
    r = vpc_footer_parse(s->footer, &s->f, e);
    if (r && copy && e)
        err_move(e, &front);
    return r;
}

static int check_fixed(struct vpc *s, struct err *e) {
    if (s->node->size > s->file->size)
        return err_set(e, EINVAL, "a fixed image of %" PRIu64 " bytes in a file of %" PRIu64,
                       s->node->size, s->file->size);
    s->fixed = true;
    s->node->granularity = VPC_SECTOR;
    return 0;
}

static int open_dynamic_co(struct vpc *s, struct err *e) {
    uint64_t at = s->f.data_offset, size = s->file->size;
    if (at % VPC_SECTOR || at > size || size - at < VPC_HEADER_BYTES)
        return err_set(e, EINVAL,
                       "the header at %" PRIu64 " does not lie in the file (%" PRIu64 " bytes)", at,
                       size);
    int r = disk_pread_co(s->file, at, s->header, VPC_HEADER_BYTES);
    if (r)
        return err_errno(e, -r, "reading the header");
    r = vpc_header_parse(s->header, &s->h, e);
    if (r)
        return r;
    uint64_t blocks = div_up(s->node->size, s->h.block_size);
    if (s->h.entries < blocks)
        return err_set(e, EINVAL,
                       "a block allocation table of %" PRIu32 " entries for a disk of %" PRIu64
                       " bytes, which has %" PRIu64 " blocks",
                       s->h.entries, s->node->size, blocks);
    if (s->h.bat_offset > size || blocks * 4 > size - s->h.bat_offset)
        return err_set(e, EINVAL,
                       "the block allocation table at %" PRIu64 " (%" PRIu64
                       " entries) reaches behind the end of the file (%" PRIu64 " bytes)",
                       s->h.bat_offset, blocks, size);
    s->bitmap_bytes = (uint32_t)align_up(s->h.block_size / VPC_SECTOR / 8, VPC_SECTOR);
    s->node->granularity = s->f.type == VPC_DIFF ? VPC_SECTOR : s->h.block_size;
    s->full = calloc(s->h.entries / 64 + 1, sizeof(uint64_t));
    if (!s->full || pages_init(&s->pages, s->file, PAGES_BYTES) < 0)
        return err_set(e, ENOMEM, "no memory for tables");
    return 0;
}

/* ---------------------------------------------------------------- parents */

/*
 * A path of Windows.  Writers disagree about the byte order of locators: where the first unit makes
 * sense in one order only, that is it.
 */
static bool path_from_utf16(const uint8_t *p, size_t bytes, bool big, struct strbuf *out) {
    return utf16_to_path(p, bytes, big || (bytes >= 2 && !p[0] && p[1]), out);
}

/* The path of the locator with code `want`, into `out`; false: there is none that can be used. */
static int locator_co(struct vpc *s, const char *want, struct strbuf *out, bool *found) {
    *found = false;
    for (int i = 0; i < VPC_LOCATORS && !*found; i++) {
        const uint8_t *l = s->header + VPC_AT_LOCATORS + i * 24;
        uint32_t length = be32_load(l + 8);
        uint64_t at = be64_load(l + 16);
        if (memcmp(l, want, 4) || !length || length > PATH_BYTES_MAX || at > s->file->size ||
            length > s->file->size - at)
            continue;
        uint8_t *buf = malloc(length);
        int r = buf ? disk_pread_co(s->file, at, buf, length) : -ENOMEM;
        if (!r) {
            strbuf_free(out);
            *found = path_from_utf16(buf, length, false, out);
        }
        free(buf);
        if (r < 0)
            return r;
    }
    return 0;
}

/* What the image says its parent is called: relative path first, an absolute one, the bare name. */
static int read_parent_name_co(struct vpc *s, struct err *e) {
    AUTO_STRBUF struct strbuf name = STRBUF_INIT;
    bool found;
    int r = locator_co(s, "W2ru", &name, &found);
    if (r)
        return err_errno(e, -r, "reading the parent's path");
    /* An absolute path means something here when it has no drive. */
    if (!found) {
        r = locator_co(s, "W2ku", &name, &found);
        if (r)
            return err_errno(e, -r, "reading the parent's path");
        found = found && name.s[0] == '/' && name.s[1] != '/';
    }
    if (!found) {
        strbuf_free(&name);
        found = path_from_utf16(s->header + VPC_AT_PARENT_NAME, 512, true, &name);
    }
    if (!found)
        return 0;
    s->node->backing_name = strdup(name.s);
    s->node->backing_format = strdup("vpc");
    return s->node->backing_name && s->node->backing_format
               ? 0
               : err_set(e, ENOMEM, "no memory for the parent's name");
}

static int open_parent_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct vpc *s = vpc_of(n);
    char id[37];
    int r = read_parent_name_co(s, e);
    if (!r)
        r = node_open_backing_co(n, ctx, e);
    if (r || !node_wants_backing(ctx))
        return r;
    vpc_uuid_text(s->h.parent_uuid, id);
    if (!n->backing && !(n->flags & NODE_CHECK)) {
        err_set(e, ENOTSUP,
                "a differencing image that does not say where its parent (UUID %s) lies", id);
        err_hint(e, "name it: backing.file.filename=FILE");
        return err_status(e);
    }
    if (n->backing && n->backing->drv == n->drv &&
        memcmp(vpc_of(n->backing)->f.uuid, s->h.parent_uuid, 16)) {
        char other[37];
        vpc_uuid_text(vpc_of(n->backing)->f.uuid, other);
        return err_set(e, EINVAL, "'%s' has UUID %s, the parent is %s", n->backing->filename, other,
                       id);
    }
    return 0;
}

/* ---------------------------------------------------------------- the driver */

static int vpc_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct vpc *s = vpc_of(n);
    const struct vpc_opts *o = n->opts;
    s->node = n;
    task_mutex_init(&s->alloc_lock);
    task_mutex_init(&s->flush_lock);
    int r = node_open_child_co(n, ctx, "file", CHILD_FILE_METADATA, &n->file, e);
    if (r)
        return r;
    s->file = n->file;
    r = read_footer_co(s, e);
    if (r)
        return r;
    n->size = vpc_disk_size(&s->f, o->size_rule);
    if (n->size % VPC_SECTOR || n->size / VPC_SECTOR > VPC_SECTORS_MAX)
        return err_set(e, EINVAL,
                       "disk size %" PRIu64 " is not whole sectors up to %" PRIu64 " bytes",
                       n->size, VPC_SECTORS_MAX * VPC_SECTOR);
    r = s->f.type == VPC_FIXED ? check_fixed(s, e) : open_dynamic_co(s, e);
    if (!r && s->f.type == VPC_DIFF)
        r = open_parent_co(n, ctx, e);
    return r;
}

static void vpc_close_co(struct node *n) {
    struct vpc *s = vpc_of(n);
    pages_free(&s->pages);
    free(s->full);
    s->full = NULL;
}

static int vpc_reopen_co(struct node *n, unsigned new_flags, struct err *e) {
    if (new_flags & NODE_RW && !node_is_rw(n))
        vpc_of(n)->scanned = false;
    return 0;
}

static json_t *vpc_describe(struct node *n) {
    static const char *const types[] = {"", "", "fixed", "dynamic", "differencing"};
    const struct vpc *s = vpc_of(n);
    char id[37];
    json_t *o = json_object();
    if (!o)
        return NULL;
    json_object_set_new(o, "type", json_string(types[s->f.type]));
    json_object_set_new(o, "creator", json_string(s->f.creator));
    json_object_set_new(o, "current-size", json_integer((json_int_t)s->f.current_size));
    json_object_set_new(o, "cylinders", json_integer(s->f.geometry.cylinders));
    json_object_set_new(o, "heads", json_integer(s->f.geometry.heads));
    json_object_set_new(o, "sectors-per-track", json_integer(s->f.geometry.track));
    vpc_uuid_text(s->f.uuid, id);
    json_object_set_new(o, "uuid", json_string(id));
    if (s->f.type == VPC_DIFF) {
        vpc_uuid_text(s->h.parent_uuid, id);
        json_object_set_new(o, "parent-uuid", json_string(id));
    }
    return o;
}

static const char *const size_rules[] = {"auto", "current_size", "chs", NULL};
static const struct opt vpc_open_opts[] = {
    OPT_ENUM(struct vpc_opts, size_rule, "force_size_calc", OPT_OPEN, VPC_SIZE_AUTO, size_rules,
             "which number is the disk's size; auto: by the program that made the image"),
    OPT_CHILD("file", OPT_OPEN, "the storage"),
    OPT_CHILD("backing", OPT_OPEN, "the parent of a differencing image"),
    OPT_END,
};

static const struct format_ops vpc_format = {
    .probe = vpc_probe,
    .create_co = vpc_create_co,
    .map_co = vpc_map_co,
    .place_co = vpc_place_co,
    .publish_co = vpc_publish_co,
    .abandon = vpc_abandon,
    .set_zero_co = vpc_set_zero_co,
    .discard_co = in_place_discard_co,
    .reach_co = vpc_reach_co,
    .resize_co = vpc_resize_co,
    .flush_co = vpc_flush_co,
    .empty_co = vpc_empty_co,
    .check_co = vpc_check_co,
    .describe = vpc_describe,
    .measure = vpc_measure,
};

const struct driver driver_vpc = {
    .name = "vpc",
    .kind = DRIVER_FORMAT,
    .help = "VHD, the disk image of Virtual PC and Hyper-V",
    .state_size = sizeof(struct vpc),
    .opts = vpc_open_opts,
    .opts_size = sizeof(struct vpc_opts),
    .create_opts = vpc_create_opt_table,
    .create_opts_size = sizeof(struct vpc_create_opts),
    .open_co = vpc_open_co,
    .close_co = vpc_close_co,
    .reopen_co = vpc_reopen_co,
    .format = &vpc_format,
};
