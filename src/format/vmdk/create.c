/* SPDX-License-Identifier: MIT */
/*
 * VMDK: new images, their size, another parent.
 *
 * A sparse file of ours:
 *      | header | descriptor, 20 sectors | RGD, its tables | GD, its tables | grains from 64 KiB on
 * | with all tables there from the start, as peers make them; a stream has none until grains are.
 * Of images of several files the descriptor comes last: what is not finished has no name that leads
 * to it.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "disk/io.h"
#include "disk/open.h"
#include "format/vmdk/vmdk.h"

#define GRAIN (64 * KIB)
#define COVERS (GRAIN * VMDK_GTES)
#define GT_SECTORS (VMDK_GTES * 4 / VMDK_SECTOR)
/* Grains are named by 32-bit sectors; the disk may be larger than what one file can hold. */
#define SPARSE_MAX (62 * TIB)

enum subformat {
    MONOLITHIC_SPARSE,
    MONOLITHIC_FLAT,
    SPLIT_SPARSE,
    SPLIT_FLAT,
    STREAM,
};
static const char *const subformats[] = {"monolithicSparse",     "monolithicFlat",
                                         "twoGbMaxExtentSparse", "twoGbMaxExtentFlat",
                                         "streamOptimized",      NULL};
static const char *const adapters[] = {"ide", "buslogic", "lsilogic", "legacyESX", NULL};

const struct opt vmdk_create_opt_table[] = {
    OPT_SIZE(struct vmdk_create_opts, size, "size", OPT_CREATE, 0, OPT_ANY, "size of the disk"),
    OPT_STR(struct vmdk_create_opts, backing_file, "backing_file", OPT_CREATE,
            "parent image, a VMDK"),
    OPT_STR(struct vmdk_create_opts, backing_fmt, "backing_fmt", OPT_CREATE,
            "format of the parent: vmdk"),
    OPT_ENUM(struct vmdk_create_opts, subformat, "subformat", OPT_CREATE, MONOLITHIC_SPARSE,
             subformats, "kind of image"),
    OPT_ENUM(struct vmdk_create_opts, adapter, "adapter_type", OPT_CREATE, 0, adapters,
             "disk adapter that the guest sees"),
    OPT_BOOL(struct vmdk_create_opts, compat6, "compat6", OPT_CREATE, false,
             "for hardware version 6"),
    OPT_STR(struct vmdk_create_opts, hwversion, "hwversion", OPT_CREATE,
            "hardware version (default 4)"),
    OPT_STR(struct vmdk_create_opts, toolsversion, "toolsversion", OPT_CREATE,
            "version of the guest tools (default 2147483647)"),
    OPT_BOOL(struct vmdk_create_opts, zeroed_grain, "zeroed_grain", OPT_CREATE, false,
             "zeros need no room: marked in the tables"),
    OPT_ENUM(struct vmdk_create_opts, preallocation, "preallocation", OPT_CREATE, PREALLOC_OFF,
             prealloc_names, "flat kinds: falloc: space reserved; full: written with zeros"),
    OPT_END,
};

static bool is_flat(const struct vmdk_create_opts *o) {
    return o->subformat == MONOLITHIC_FLAT || o->subformat == SPLIT_FLAT;
}
static bool is_split(const struct vmdk_create_opts *o) {
    return o->subformat == SPLIT_SPARSE || o->subformat == SPLIT_FLAT;
}

/* ---------------------------------------------------------------- what is asked for */

static bool is_word(const char *s) {
    for (; *s; s++)
        if ((unsigned char)*s < ' ' || *s == '"' || *s == 127)
            return false;
    return true;
}

static int check_opts(const struct vmdk_create_opts *o, uint64_t size, struct err *e) {
    uint64_t most = o->subformat == MONOLITHIC_FLAT ? (uint64_t)INT64_MAX - 511
                    : is_split(o)                   ? VMDK_EXTENTS_MAX * (uint64_t)VMDK_SPLIT_BYTES
                    : o->subformat == STREAM        ? 32 * TIB
                                                    : SPARSE_MAX;
    if (size > most)
        return err_set(e, EFBIG,
                       "disk size %" PRIu64 " is above the limit of %" PRIu64 " for subformat %s",
                       size, most, subformats[o->subformat]);
    if (o->compat6 && o->hwversion && strcmp(o->hwversion, "undefined"))
        return err_set(e, EINVAL, "compat6=on and hwversion exclude each other");
    if (is_flat(o) && o->backing_file)
        return err_set(e, ENOTSUP, "subformat %s cannot have a backing file",
                       subformats[o->subformat]);
    if (is_flat(o) && o->zeroed_grain)
        return err_set(e, EINVAL, "subformat %s has no grains: zeroed_grain does not fit it",
                       subformats[o->subformat]);
    if (!is_flat(o) && o->preallocation != PREALLOC_OFF)
        return err_set(e, EINVAL, "preallocation is for the flat subformats");
    if (o->backing_fmt && o->backing_file && strcmp(o->backing_fmt, "vmdk"))
        return err_set(e, EINVAL, "backing format '%s': the parent of a VMDK image must be vmdk",
                       o->backing_fmt);
    if ((o->hwversion && !is_word(o->hwversion)) ||
        (o->toolsversion && !is_word(o->toolsversion)) ||
        (o->backing_file && !is_word(o->backing_file)))
        return err_set(e, EINVAL,
                       "a name or version with quotes or control characters cannot be "
                       "recorded");
    return 0;
}

/* The content ID of the parent that is named. */
static int parent_cid_co(const char *image, const char *name, uint32_t *cid, struct err *e) {
    char *full AUTO_FREE = backing_resolve(image, name, e);
    if (!full)
        return err_status(e);
    struct open_req req = {
        .name = full, .flags = OPEN_NO_BACKING | OPEN_NO_DATA, .gate = GATE_NONE};
    struct node *n;
    int r = node_open_co(&req, &n, e);
    if (r < 0)
        return err_prefix(e, "backing file");
    if (!vmdk_cid_of(n, cid))
        r = err_set(e, EINVAL, "backing file '%s' is %s: the parent of a VMDK image must be vmdk",
                    name, n->drv->name);
    node_unref_co(n);
    return r;
}

static int random_cid(uint32_t *cid) {
    do {
        if (getrandom(cid, sizeof(*cid), 0) != sizeof(*cid))
            return -EIO;
    } while (*cid >= VMDK_NO_PARENT - 1);
    return 0;
}

/* ---------------------------------------------------------------- the descriptor */

struct text {
    struct strbuf head, extents;
    uint32_t cid, parent;
};

static void text_free(struct text *t) {
    strbuf_free(&t->head);
    strbuf_free(&t->extents);
}

/* Some readers find the parts by the comments above them. */
static void compose(const struct vmdk_create_opts *o, uint64_t size, const struct text *t,
                    struct strbuf *out) {
    unsigned heads = o->adapter == 0 ? 16 : 255;
    const char *hw = o->hwversion && strcmp(o->hwversion, "undefined") ? o->hwversion
                     : o->compat6                                      ? "6"
                                                                       : "4";
    strbuf_printf(out,
                  "# Disk DescriptorFile\nversion=1\nCID=%08" PRIx32 "\nparentCID=%08" PRIx32
                  "\ncreateType=\"%s\"\n",
                  t->cid, t->parent, subformats[o->subformat]);
    if (o->backing_file)
        strbuf_printf(out, "parentFileNameHint=\"%s\"\n", o->backing_file);
    strbuf_printf(out, "\n# Extent description\n%s\n# The Disk Data Base\n#DDB\n\n", t->extents.s);
    strbuf_printf(out, "ddb.virtualHWVersion = \"%s\"\n", hw);
    strbuf_printf(out, "ddb.geometry.cylinders = \"%" PRIu64 "\"\n",
                  size / ((uint64_t)heads * 63 * VMDK_SECTOR));
    strbuf_printf(out, "ddb.geometry.heads = \"%u\"\nddb.geometry.sectors = \"63\"\n", heads);
    strbuf_printf(out, "ddb.adapterType = \"%s\"\n", adapters[o->adapter]);
    strbuf_printf(out, "ddb.toolsVersion = \"%s\"\n",
                  o->toolsversion ? o->toolsversion : "2147483647");
}

/* ---------------------------------------------------------------- sparse files */

static void plan(const struct vmdk_create_opts *o, uint64_t size, bool embedded,
                 struct vmdk_header *h) {
    uint64_t entries = div_up(size, COVERS), gd = div_up(entries * 4, VMDK_SECTOR);
    *h = (struct vmdk_header){
        .version = o->subformat == STREAM ? 3
                   : o->zeroed_grain      ? 2
                                          : 1,
        .flags = VMDK_NEWLINES | (o->zeroed_grain ? VMDK_ZEROED : 0),
        .capacity = size / VMDK_SECTOR,
        .grain = GRAIN / VMDK_SECTOR,
        .desc_offset = embedded ? 1 : 0,
        .desc_size = embedded ? VMDK_DESC_SECTORS : 0,
        .gtes = VMDK_GTES,
    };
    if (o->subformat == STREAM) {
        h->flags |= VMDK_COMPRESSED | VMDK_MARKERS;
        h->compression = 1;
        h->gd = VMDK_GD_AT_END;
        h->overhead = GRAIN / VMDK_SECTOR;
        return;
    }
    h->flags |= VMDK_REDUNDANT;
    h->rgd = 1 + VMDK_DESC_SECTORS;
    h->gd = h->rgd + gd + entries * GT_SECTORS;
    h->overhead = align_up(h->gd + gd + entries * GT_SECTORS, GRAIN / VMDK_SECTOR);
}

/* A directory at sector `gd`, whose tables follow it. */
static int write_directory_co(struct node *file, uint64_t gd, uint64_t entries) {
    enum { PIECE = 64 * 1024 };
    uint64_t table = gd + div_up(entries * 4, VMDK_SECTOR);
    uint8_t *buf = buf_get(PIECE);
    int r = buf ? 0 : -ENOMEM;
    for (uint64_t i = 0; !r && i < entries;) {
        uint64_t count = min_u64(PIECE / 4, entries - i), at = gd * VMDK_SECTOR + i * 4;
        for (uint64_t k = 0; k < count; k++, i++)
            le32_store(buf + k * 4, (uint32_t)(table + i * GT_SECTORS));
        r = disk_pwrite_co(file, at, buf, count * 4);
    }
    buf_put(buf, PIECE);
    return r;
}

static int tail_marker_co(struct node *file, uint64_t sector, uint64_t sectors, uint32_t type) {
    uint8_t buf[VMDK_SECTOR] = {0};
    le64_store(buf, sectors);
    le32_store(buf + 12, type);
    return disk_pwrite_co(file, sector * VMDK_SECTOR, buf, sizeof(buf));
}

/* An empty stream: a directory of nothing, the footer, the end. */
static int write_stream_end_co(struct node *file, const struct vmdk_header *h, uint64_t entries) {
    uint8_t buf[VMDK_HEADER_BYTES];
    uint64_t sectors = div_up(entries * 4, VMDK_SECTOR), at = h->overhead;
    struct vmdk_header footer = *h;
    footer.gd = at + 1;
    vmdk_header_store(&footer, buf);
    int r = tail_marker_co(file, at, sectors, 2);
    at += 1 + sectors;
    if (!r)
        r = tail_marker_co(file, at, 1, 3);
    if (!r)
        r = disk_pwrite_co(file, (at + 1) * VMDK_SECTOR, buf, sizeof(buf));
    return r ? r : tail_marker_co(file, at + 2, 0, 0);
}

static int write_sparse_co(struct node *file, const struct vmdk_create_opts *o, uint64_t size,
                           bool embedded, struct err *e) {
    uint8_t buf[VMDK_HEADER_BYTES];
    struct vmdk_header h;
    uint64_t entries = div_up(size, COVERS);
    plan(o, size, embedded, &h);
    uint64_t end = h.overhead * VMDK_SECTOR;
    vmdk_header_store(&h, buf);
    int r = disk_resize_co(file, end, PREALLOC_OFF, e);
    if (r < 0)
        return r;
    if (!(file->storage_flags & STORAGE_ZERO_INIT))
        r = disk_zero_co(file, 0, end, 0);
    if (!r && o->subformat == STREAM)
        r = write_stream_end_co(file, &h, entries);
    if (!r && o->subformat != STREAM)
        r = write_directory_co(file, h.rgd, entries);
    if (!r && o->subformat != STREAM)
        r = write_directory_co(file, h.gd, entries);
    if (!r)
        r = disk_pwrite_co(file, 0, buf, sizeof(buf));
    return r < 0 ? err_errno(e, -r, "writing the header and tables") : 0;
}

/* ---------------------------------------------------------------- extents */

/* "DIR/NAME" without ".vmdk", or NULL: what the image lies in has no neighbours. */
static char *stem_of(const char *image, struct err *e) {
    const char *dot = image ? strrchr(image, '.') : NULL,
               *slash = image ? strrchr(image, '/') : NULL;
    if (!image || !strncmp(image, "json:", 5) || name_has_protocol(image)) {
        err_set(e, EINVAL, "this subformat needs files beside the image, which is no plain file");
        return NULL;
    }
    bool suffix = dot && !strcmp(dot, ".vmdk") && dot != (slash ? slash + 1 : image);
    return xstrndup(image, suffix ? (size_t)(dot - image) : strlen(image));
}

static int make_extent_co(const struct vmdk_create_opts *o, const char *image, const char *name,
                          uint64_t size, struct err *e) {
    struct node *file = NULL;
    int prealloc = o->preallocation == PREALLOC_METADATA ? PREALLOC_OFF : o->preallocation;
    int r = data_file_create_co(name, image, is_flat(o) ? size : 0, prealloc, &file, e);
    if (r < 0)
        return err_prefix(e, "extent '%s'", name);
    if (!is_flat(o))
        r = write_sparse_co(file, o, size, false, e);
    else if (file->size > size) /* a device: what is behind is not ours */
        r = 0;
    if (!r)
        r = data_file_finish_co(file, name, e);
    node_unref_co(file);
    return r;
}

static int make_extents_co(const struct vmdk_create_opts *o, const char *image, uint64_t size,
                           struct text *t, struct err *e) {
    char *stem AUTO_FREE = stem_of(image, e);
    uint64_t piece = is_split(o) ? VMDK_SPLIT_BYTES : max_u64(size, VMDK_SECTOR), number = 1;
    int r = stem ? 0 : err_status(e);
    for (uint64_t at = 0; !r && (at < size || !at); at += piece, number++) {
        uint64_t part = min_u64(piece, size - at);
        char *name AUTO_FREE =
            is_split(o) ? xasprintf("%s-%c%03" PRIu64 ".vmdk", stem, is_flat(o) ? 'f' : 's', number)
                        : xasprintf("%s-flat.vmdk", stem);
        const char *slash = strrchr(name, '/'), *base = slash ? slash + 1 : name;
        if (!is_word(base))
            return err_set(e, EINVAL,
                           "a name with quotes or control characters cannot be recorded "
                           "in a descriptor");
        r = make_extent_co(o, image, name, part, e);
        strbuf_printf(&t->extents, "RW %" PRIu64 " %s \"%s\"%s\n", part / VMDK_SECTOR,
                      is_flat(o) ? "FLAT" : "SPARSE", base, is_flat(o) ? " 0" : "");
    }
    return r;
}

static int write_text_co(struct node *file, const struct strbuf *text, bool embedded,
                         struct err *e) {
    uint64_t room = (uint64_t)VMDK_DESC_SECTORS * VMDK_SECTOR;
    int r;
    if (embedded && text->len > room)
        return err_set(e, EINVAL, "a descriptor of %zu bytes; there is room for %" PRIu64,
                       text->len, room);
    /* A file of its own has its odd length before it is written directly. */
    if (!embedded && file->size < text->len &&
        (r = disk_resize_co(file, text->len, PREALLOC_OFF, e)) < 0)
        return r;
    r = disk_pwrite_co(file, embedded ? VMDK_SECTOR : 0, text->s, text->len);
    return r < 0 ? err_errno(e, -r, "writing the descriptor") : 0;
}

int vmdk_create_co(struct node *file, const void *create_opts, struct create_ctx *ctx,
                   struct err *e) {
    const struct vmdk_create_opts *o = create_opts;
    uint64_t size = align_up(o->size, VMDK_SECTOR);
    bool embedded = o->subformat == MONOLITHIC_SPARSE || o->subformat == STREAM;
    struct text t __attribute__((cleanup(text_free))) = {.parent = VMDK_NO_PARENT};
    struct strbuf text AUTO_STRBUF = STRBUF_INIT;
    int r = check_opts(o, size, e);
    if (!r && o->backing_file)
        r = parent_cid_co(ctx->name, o->backing_file, &t.parent, e);
    if (!r && random_cid(&t.cid) < 0)
        r = err_set(e, EIO, "the system gave no random numbers for the content ID");
    if (!r && embedded) {
        const char *slash = ctx->name ? strrchr(ctx->name, '/') : NULL;
        const char *base = slash ? slash + 1 : ctx->name ? ctx->name : "disk.vmdk";
        strbuf_printf(&t.extents, "RW %" PRIu64 " SPARSE \"%s\"\n", size / VMDK_SECTOR,
                      is_word(base) && *base && strlen(base) < 1024 ? base : "disk.vmdk");
        r = write_sparse_co(file, o, size, true, e);
    } else if (!r) {
        r = make_extents_co(o, ctx->name, size, &t, e);
    }
    if (r < 0)
        return r;
    compose(o, size, &t, &text);
    return write_text_co(file, &text, embedded, e);
}

int vmdk_measure(const void *create_opts, const struct measure_in *in, struct measure_result *out,
                 struct err *e) {
    const struct vmdk_create_opts *o = create_opts;
    uint64_t size = align_up(in->size, VMDK_SECTOR), fixed = 0;
    struct vmdk_header h;
    int r = check_opts(o, size, e);
    if (r < 0)
        return r;
    uint64_t piece = is_split(o) ? VMDK_SPLIT_BYTES : max_u64(size, 1);
    if (is_flat(o)) {
        *out = (struct measure_result){size, size, size, size};
        return 0;
    }
    for (uint64_t at = 0; at < size || !at; at += piece) {
        plan(o, min_u64(piece, size - at), !is_split(o), &h);
        fixed += h.overhead * VMDK_SECTOR;
    }
    /* Of a stream nobody knows what it shrinks to: at most a sector more each grain. */
    uint64_t grain = o->subformat == STREAM ? GRAIN + VMDK_SECTOR : GRAIN;
    uint64_t grains = div_up(size, GRAIN), tables = 0;
    if (o->subformat == STREAM)
        tables = div_up(size, COVERS) * (GT_SECTORS + 1) * VMDK_SECTOR +
                 align_up(div_up(size, COVERS) * 4, VMDK_SECTOR) + 4 * VMDK_SECTOR;
    out->fully_allocated = out->bound_fully = fixed + grains * grain + tables;
    out->required = out->bound_required = fixed + in->touched[16] * grain + tables;
    return 0;
}

/* ---------------------------------------------------------------- another parent */

/* The header says that the descriptor lies at `sector`; stable. */
static int name_text_co(struct vmdk *s, uint64_t sector) {
    uint8_t header[VMDK_HEADER_BYTES];
    struct vmdk_map *m = s->d.extents[0].map;
    struct vmdk_header h = m->h;
    h.desc_offset = sector;
    h.desc_size = s->text_room / VMDK_SECTOR;
    vmdk_header_store(&h, header);
    int r = disk_flush_co(s->file);
    if (!r)
        r = disk_pwrite_co(s->file, 0, header, sizeof(header));
    if (!r)
        r = disk_flush_co(s->file);
    if (!r)
        m->h = h;
    return r;
}

/*
 * Inside a sparse file some text is whole at any moment: a copy of the new one goes to the end, the
 * header names that, the text is rewritten in its place, where some readers look without asking,
 * and the header names it again.  A descriptor that is a file by itself is rewritten by one write.
 */
static int store_text_co(struct vmdk *s, const struct strbuf *text) {
    int r;
    if (!s->embedded) {
        r = disk_pwrite_co(s->file, s->text_at, text->s, text->len);
        if (!r && s->text_at == 0 && s->file->size > text->len)
            r = disk_resize_co(s->file, text->len, PREALLOC_OFF, NULL);
        if (!r && s->text_at == 0)
            s->text_room = text->len;
        return r;
    }
    struct vmdk_map *m = s->d.extents[0].map;
    uint64_t end = m->file->size;
    uint64_t at = align_up(max_u64(end, m->scanned ? m->next : 0), m->grain_bytes);
    char *padded = at / VMDK_SECTOR <= UINT32_MAX ? calloc(1, s->text_room) : NULL;
    if (!padded)
        return -ENOMEM;
    memcpy(padded, text->s, text->len);
    r = disk_pwrite_co(s->file, at, padded, s->text_room);
    if (!r)
        r = name_text_co(s, at / VMDK_SECTOR);
    if (!r)
        r = disk_pwrite_co(s->file, s->text_at, padded, s->text_room);
    if (!r)
        r = name_text_co(s, s->text_at / VMDK_SECTOR);
    if (!r)
        disk_resize_co(s->file, end, PREALLOC_OFF, NULL); /* else it stays, unused */
    free(padded);
    m->scanned = false; /* what is placed next lies behind all that is there */
    m->spare_count = 0;
    return r;
}

/* The text with this parent. */
static int change_parent_co(struct vmdk *s, uint32_t cid, const char *name, struct err *e) {
    struct strbuf text AUTO_STRBUF = STRBUF_INIT;
    char *old AUTO_FREE = malloc(s->text_room + 1);
    if (!old)
        return err_set(e, ENOMEM, "no memory for the descriptor");
    int r = vmdk_modified_co(s); /* before the text is read */
    if (!r)
        r = disk_pread_co(s->file, s->text_at, old, s->text_room);
    if (r < 0)
        return err_errno(e, -r, "reading the descriptor");
    vmdk_desc_rewrite(old, s->text_room, cid, name, &text);
    if (s->embedded && text.len > s->text_room)
        return err_set(e, ENOSPC, "a descriptor of %zu bytes; there is room for %" PRIu64, text.len,
                       s->text_room);
    r = store_text_co(s, &text);
    if (r < 0)
        return err_errno(e, -r, "writing the descriptor");
    s->d.parent_cid = cid;
    return 0;
}

int vmdk_set_backing_co(struct node *n, const char *name, const char *format, struct err *e) {
    struct vmdk *s = vmdk_of(n);
    uint32_t cid = VMDK_NO_PARENT;
    int r = 0;
    if (s->frozen || !s->d.cid_digits)
        return err_set(e, ENOTSUP, "this image cannot record another parent");
    if (s->d.extents[0].map && s->d.extents[0].map->coded)
        return err_set(e, ENOTSUP, "a stream keeps the parent that it has");
    for (size_t i = 0; i < s->d.count; i++)
        if (name && !s->d.extents[i].map)
            return err_set(e, ENOTSUP, "an image with flat extents cannot have a parent");
    if (name && (!is_word(name) || (format && strcmp(format, "vmdk"))))
        return err_set(e, EINVAL,
                       "the parent of a VMDK image must be vmdk, with a name without "
                       "quotes");
    if (name)
        r = parent_cid_co(n->filename, name, &cid, e);
    if (r < 0)
        return r;
    r = change_parent_co(s, cid, name, e);
    if (r < 0)
        return r;
    free(n->backing_name);
    free(n->backing_format);
    n->backing_name = name ? xstrdup(name) : NULL;
    n->backing_format = name ? xstrdup("vmdk") : NULL;
    return 0;
}

/* ---------------------------------------------------------------- after a commit */

/* The tables of extent offset [at, +covers) name nothing any more. */
static int empty_tables_co(struct vmdk_map *m, uint64_t at) {
    for (int redundant = 0; redundant < (m->rgd ? 2 : 1); redundant++) {
        uint64_t table;
        int r = vmdk_table_co(m, at, redundant, &table);
        if (redundant && r == -EIO)
            continue;
        for (uint64_t i = 0; !r && table && i < m->gt_entries;) {
            struct page *page;
            uint8_t *p;
            uint32_t left;
            r = vmdk_entry_co(m, table, i, VMDK_LEVEL_GT, &page, &p, &left);
            if (r < 0)
                break;
            if (!bytes_are_zero(p, (size_t)left * 4)) {
                pages_modify(&m->pages, page);
                memset(p, 0, (size_t)left * 4);
            }
            i += left;
        }
        if (r < 0)
            return r;
    }
    return 0;
}

static int empty_map_co(struct vmdk *s, struct vmdk_map *m) {
    int r = 0;
    for (uint64_t at = 0; !r && at < m->capacity; at += m->covers) {
        r = vmdk_activate_co(s, m);
        if (!r && pages_crowded(&m->pages))
            r = vmdk_map_flush_co(m);
        if (!r)
            r = empty_tables_co(m, at);
    }
    return r ? r : vmdk_map_flush_co(m);
}

/*
 * The tables stay where they are, so only a file whose tables all lie in front, as ours do, gets
 * shorter.  All that was here is in the parent by now, so it reads the same whenever this is
 * killed; the parent has another content ID since, which is recorded first.
 */
int vmdk_empty_co(struct node *n, struct err *e) {
    struct vmdk *s = vmdk_of(n);
    uint32_t cid;
    for (size_t i = 0; i < s->d.count; i++)
        if (!s->d.extents[i].map || s->d.extents[i].map->coded || s->d.extents[i].map->frozen ||
            s->d.extents[i].access != VMDK_RW)
            return err_set(e, ENOTSUP, "extent %zu cannot be emptied", i);
    int r = 0;
    if (n->backing && vmdk_cid_of(n->backing, &cid) && cid != s->d.parent_cid &&
        s->d.parent_cid != VMDK_NO_PARENT)
        r = change_parent_co(s, cid, s->d.hint, e);
    if (r < 0)
        return r;
    r = vmdk_modified_co(s);
    for (size_t i = 0; !r && i < s->d.count; i++) {
        struct vmdk_map *m = s->d.extents[i].map;
        uint64_t table = 0, last = 0;
        r = empty_map_co(s, m);
        for (uint64_t at = 0; !r && at < m->capacity; at += m->covers) {
            r = vmdk_table_co(m, at, false, &table);
            last = max_u64(last, table);
        }
        if (!r && last < m->data_low) {
            disk_resize_co(m->file, m->data_low, PREALLOC_OFF, NULL); /* a device keeps its size */
            m->scanned = false;
            m->spare_count = 0;
        }
    }
    return r < 0 ? err_errno(e, -r, "clearing the tables") : 0;
}
