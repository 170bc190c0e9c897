/* SPDX-License-Identifier: MIT */
/* VMDK: opening sparse files, descriptors and their extents; the content ID; the driver table. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/plant.h"
#include "disk/io.h"
#include "disk/open.h"
#include "format/codec.h"
#include "format/vmdk/vmdk.h"

/* ---------------------------------------------------------------- sparse files */

/* Checks that tables of `entries` lie in the file. */
static int check_directory(struct vmdk_map *m, struct err *e) {
    uint64_t bytes;
    m->gd_entries = div_up(m->capacity, m->covers);
    if (!ck_mul(m->gd_entries, (uint64_t)m->entry_bytes, &bytes) || m->gd > m->file->size ||
        bytes > m->file->size - m->gd)
        return err_set(e, EINVAL,
                       "the grain directory at %" PRIu64 " (%" PRIu64
                       " entries) is not in the file of %" PRIu64 " bytes",
                       m->gd, m->gd_entries, m->file->size);
    if (m->rgd > m->file->size || bytes > m->file->size - m->rgd || m->rgd == m->gd)
        m->rgd = 0;
    return 0;
}

/*
 * The header once more, at the end of a stream: two sectors before the end, behind its marker.
 * Some tools pad the file.
 */
static int read_footer_co(struct vmdk_map *m, struct err *e) {
    enum { LOOK = 64 * 1024 };
    uint64_t end = align_down(m->file->size, VMDK_SECTOR), from = end > LOOK ? end - LOOK : 0;
    uint8_t *buf = buf_get(LOOK);
    struct err why AUTO_ERR = ERR_INIT;
    int r = buf ? disk_pread_co(m->file, from, buf, end - from) : -ENOMEM;
    if (r < 0) {
        buf_put(buf, LOOK);
        return err_errno(e, -r, "reading the footer");
    }
    r = -EINVAL;
    for (uint64_t at = end - from; r && at >= 3 * VMDK_SECTOR; at -= VMDK_SECTOR) {
        const uint8_t *marker = buf + at - 3 * VMDK_SECTOR;
        struct vmdk_header h;
        if (le32_load(marker + 12) != 3 || le32_load(marker + 8) ||
            vmdk_header_parse(marker + VMDK_SECTOR, &h, &why) < 0 || h.gd == VMDK_GD_AT_END ||
            h.capacity != m->h.capacity || h.grain != m->h.grain || h.gtes != m->h.gtes)
            continue;
        m->gd = h.gd > INT64_MAX / VMDK_SECTOR ? UINT64_MAX : h.gd * VMDK_SECTOR;
        if (at != end - from || end != m->file->size)
            m->frozen = "something lies behind the end of the stream";
        r = 0;
    }
    buf_put(buf, LOOK);
    if (r < 0)
        err_set(e, EINVAL,
                "the header refers to a footer, and none ends the file: it was cut off, "
                "or its writer did not finish");
    return r;
}

static int open_kdmv_co(struct vmdk_map *m, const uint8_t *buf, struct err *e) {
    int r = vmdk_header_parse(buf, &m->h, e);
    if (r < 0)
        return r;
    const struct vmdk_header *h = &m->h;
    m->type = VMDK_SPARSE;
    if (!h->capacity)
        return 0;
    m->entry_bytes = 4;
    m->grain_bytes = (uint32_t)(h->grain * VMDK_SECTOR);
    m->gt_entries = h->gtes;
    m->covers = (uint64_t)m->grain_bytes * m->gt_entries;
    m->capacity = h->capacity * VMDK_SECTOR;
    m->low = VMDK_HEADER_BYTES;
    m->data_low = h->overhead && h->overhead <= m->file->size / VMDK_SECTOR
                      ? h->overhead * VMDK_SECTOR
                      : m->low;
    m->zeroed = h->flags & VMDK_ZEROED;
    m->coded = h->flags & VMDK_COMPRESSED;
    m->codec = h->flags & VMDK_MARKERS ? &codec_vmdk : &codec_vmdk_plain;
    m->gd = h->gd > INT64_MAX / VMDK_SECTOR ? UINT64_MAX : h->gd * VMDK_SECTOR;
    m->rgd =
        !(h->flags & VMDK_REDUNDANT) || h->rgd > INT64_MAX / VMDK_SECTOR ? 0 : h->rgd * VMDK_SECTOR;
    if (h->version == 3 && !m->coded)
        m->frozen = "it has changed-block tracking, which would go stale";
    if (m->coded && !(h->flags & VMDK_MARKERS))
        m->frozen = "its compressed grains have no markers";
    if (h->gd == VMDK_GD_AT_END && (r = read_footer_co(m, e)) < 0)
        return r;
    if (!m->gd && !m->coded)
        return err_set(e, EINVAL, "the header names no grain directory");
    return check_directory(m, e);
}

static int open_cowd_co(struct vmdk_map *m, const uint8_t *buf, struct err *e) {
    uint32_t grain = le32_load(buf + 16);
    m->type = VMDK_COWD;
    if (le32_load(buf + 4) != 1)
        return err_set(e, ENOTSUP, "version %" PRIu32 " of a COWD file is unknown, 1 is known",
                       le32_load(buf + 4));
    if (!grain || !is_pow2(grain) || grain > VMDK_GRAIN_MAX / VMDK_SECTOR)
        return err_set(e, EINVAL,
                       "grains of %" PRIu32 " sectors: a power of two up to %u is possible", grain,
                       VMDK_GRAIN_MAX / VMDK_SECTOR);
    m->entry_bytes = 4;
    m->grain_bytes = grain * VMDK_SECTOR;
    m->gt_entries = 4096;
    m->covers = (uint64_t)m->grain_bytes * m->gt_entries;
    m->capacity = (uint64_t)le32_load(buf + 12) * VMDK_SECTOR;
    m->gd = (uint64_t)le32_load(buf + 20) * VMDK_SECTOR;
    m->low = m->data_low = 4 * VMDK_SECTOR;
    m->frozen = "COWD extents (VMFSSPARSE) are read only here";
    return check_directory(m, e);
}

static bool sectors_fit(uint64_t sectors) {
    return sectors <= INT64_MAX / VMDK_SECTOR;
}

static int open_se_co(struct vmdk_map *m, const uint8_t *buf, struct err *e) {
    uint8_t vol[40];
    uint64_t volatile_at = le64_load(buf + 80), gd = le64_load(buf + 128);
    uint64_t gts = le64_load(buf + 144), grains = le64_load(buf + 192);
    m->type = VMDK_SE;
    if (le64_load(buf + 8) != VMDK_SE_VERSION)
        return err_set(e, ENOTSUP, "version 0x%" PRIx64 " of a seSparse file is unknown",
                       le64_load(buf + 8));
    if (le64_load(buf + 24) != 8 || le64_load(buf + 32) != 64 || le64_load(buf + 40))
        return err_set(e, ENOTSUP,
                       "a seSparse file with grains of %" PRIu64 " sectors, tables of %" PRIu64
                       ", flags 0x%" PRIx64 "; 8, 64 and none are known",
                       le64_load(buf + 24), le64_load(buf + 32), le64_load(buf + 40));
    if (!sectors_fit(le64_load(buf + 16)) || !sectors_fit(volatile_at) || !sectors_fit(gd) ||
        !sectors_fit(gts) || !sectors_fit(grains))
        return err_set(e, EINVAL, "places in the seSparse header are beyond any file");
    int r = disk_pread_co(m->file, volatile_at * VMDK_SECTOR, vol, sizeof(vol));
    if (r < 0)
        return err_errno(e, -r, "reading the volatile header");
    if (le64_load(vol) != VMDK_SE_VOLATILE_MAGIC)
        return err_set(e, EINVAL, "the volatile header has magic 0x%" PRIx64, le64_load(vol));
    if (le64_load(vol + 24)) {
        err_set(e, ENOTSUP,
                "the seSparse file was not closed cleanly: its journal is to be replayed");
        err_hint(e, "let the hypervisor that wrote it open and close it once");
        return -ENOTSUP;
    }
    m->entry_bytes = 8;
    m->grain_bytes = 4096;
    m->gt_entries = 4096;
    m->covers = (uint64_t)m->grain_bytes * m->gt_entries;
    m->capacity = le64_load(buf + 16) * VMDK_SECTOR;
    m->gd = gd * VMDK_SECTOR;
    m->gts = gts * VMDK_SECTOR;
    m->grains = m->data_low = grains * VMDK_SECTOR;
    m->low = VMDK_SECTOR;
    m->frozen = "seSparse extents are read only here";
    return check_directory(m, e);
}

int vmdk_map_open_co(struct node *file, uint64_t limit, struct vmdk_map **out, struct err *e) {
    uint8_t buf[VMDK_HEADER_BYTES];
    int r = disk_pread_co(file, 0, buf, sizeof(buf));
    if (r < 0)
        return err_errno(e, -r, "reading the header");
    struct vmdk_map *m = calloc(1, sizeof(*m));
    if (!m)
        return err_set(e, ENOMEM, "no memory for an extent");
    m->file = file;
    task_mutex_init(&m->table_lock);
    task_mutex_init(&m->flush_lock);
    if (le32_load(buf) == VMDK_MAGIC)
        r = open_kdmv_co(m, buf, e);
    else if (le32_load(buf) == VMDK_COWD_MAGIC)
        r = open_cowd_co(m, buf, e);
    else if (le64_load(buf) == VMDK_SE_MAGIC)
        r = open_se_co(m, buf, e);
    else
        r = err_set(e, EINVAL, "no sparse VMDK file: magic 0x%08" PRIx32, le32_load(buf));
    if (!r && limit && m->capacity < limit)
        r = err_set(e, EINVAL,
                    "it holds %" PRIu64 " bytes, fewer than the %" PRIu64 " of the descriptor",
                    m->capacity, limit);
    if (r < 0) {
        vmdk_map_free(m);
        return r;
    }
    *out = m;
    return 0;
}

void vmdk_map_free(struct vmdk_map *m) {
    if (!m)
        return;
    vmdk_stream_free(m);
    pages_free(&m->pages);
    free(m->spares);
    free(m);
}

/* ---------------------------------------------------------------- the content ID */

/* Another number with as many digits: the text keeps its length, and one sector changes. */
static int next_cid(const struct vmdk_desc *d, uint32_t *out) {
    uint32_t mask = d->cid_digits >= 8 ? UINT32_MAX : (UINT32_C(1) << 4 * d->cid_digits) - 1;
    uint32_t cid;
    if (getrandom(&cid, sizeof(cid), 0) != sizeof(cid))
        return -EIO;
    cid &= mask;
    while (cid == d->cid || cid == VMDK_NO_PARENT || cid == (VMDK_NO_PARENT & mask))
        cid = (cid + 1) & mask;
    *out = cid;
    return 0;
}

static int change_cid_co(struct vmdk *s) {
    char digits[9];
    uint32_t cid;
    int r = next_cid(&s->d, &cid);
    if (r < 0)
        return r;
    snprintf(digits, sizeof(digits), "%08" PRIx32, cid);
    r = disk_pwrite_co(s->file, s->text_at + s->d.cid_at, digits + 8 - s->d.cid_digits,
                       s->d.cid_digits);
    if (!r)
        r = disk_flush_co(s->file);
    if (!r)
        s->d.cid = cid;
    return r;
}

int vmdk_modified_co(struct vmdk *s) {
    int r = 0;
    if (s->wrote)
        return 0;
    task_mutex_lock_co(&s->cid_lock);
    if (!s->wrote && s->d.cid_digits)
        r = change_cid_co(s);
    if (!r)
        s->wrote = true;
    task_mutex_unlock(&s->cid_lock);
    return r;
}

extern const struct driver driver_vmdk;

bool vmdk_cid_of(struct node *below, uint32_t *cid) {
    while (below && below->drv->kind == DRIVER_FILTER)
        below = below->file;
    if (!below || below->drv != &driver_vmdk)
        return false;
    *cid = vmdk_of(below)->d.cid;
    return true;
}

static int open_parent_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct vmdk *s = vmdk_of(n);
    uint32_t cid;
    if (s->d.parent_cid == VMDK_NO_PARENT && !s->d.hint)
        return 0;
    if (s->d.hint &&
        (!(n->backing_name = strdup(s->d.hint)) || !(n->backing_format = strdup("vmdk"))))
        return err_set(e, ENOMEM, "no memory for the parent's name");
    int r = node_open_backing_co(n, ctx, e);
    if (r < 0 || !node_wants_backing(ctx))
        return r;
    if (!n->backing && !(n->flags & (NODE_CHECK | NODE_LOOK))) {
        err_set(e, ENOTSUP, "it has a parent (content ID %08" PRIx32 ") and does not say where",
                s->d.parent_cid);
        err_hint(e, "name it: backing.file.filename=FILE");
        return -ENOTSUP;
    }
    if (!n->backing || !vmdk_cid_of(n->backing, &cid) || cid == s->d.parent_cid)
        return 0;
    err_set(e, EINVAL,
            "the parent '%s' has content ID %08" PRIx32 ", and this image was made over %08" PRIx32
            ": the parent has been changed since",
            n->backing->filename, cid, s->d.parent_cid);
    err_hint(e, "what it reads would be a mix of both; if that is meant, record the parent anew: "
                "strata rebase -u");
    return -EINVAL;
}

/* ---------------------------------------------------------------- extents */

static int open_extent_co(struct node *n, struct open_ctx *ctx, size_t index, struct err *e) {
    struct vmdk_extent *x = &vmdk_of(n)->d.extents[index];
    bool sparse = vmdk_type_is_sparse(x->type), writable = node_is_rw(n) && x->access == VMDK_RW;
    size_t before = n->part_count;
    int r =
        node_open_part_co(n, ctx, index, x->name, sparse ? CHILD_FILE_METADATA : CHILD_FILE_DATA,
                          writable, &x->file, e);
    if (r < 0)
        return r;
    if (sparse && n->part_count == before)
        r = err_set(e, EINVAL, "it is in use for another extent already");
    if (!r && sparse)
        r = vmdk_map_open_co(x->file, x->length, &x->map, e);
    if (!r && sparse && x->map->type != x->type)
        r = err_set(e, EINVAL, "it is a %s file", vmdk_type_names[x->map->type]);
    if (!r && !sparse && writable &&
        (x->file->size < x->offset || x->file->size - x->offset < x->length))
        r = err_set(e, EINVAL,
                    "it has %" PRIu64 " bytes, and the extent ends at %" PRIu64
                    ": only reading is possible",
                    x->file->size, x->offset + x->length);
    if (!r && writable && x->map && x->map->frozen && !(n->flags & NODE_CHECK))
        r = err_set(e, ENOTSUP, "it cannot be written: %s", x->map->frozen);
    if (r < 0)
        x->file = NULL;
    if (x->map && !x->map->capacity) /* an empty disk */
        vmdk_map_free(steal(&x->map));
    return r;
}

static int by_place(const void *a, const void *b) {
    const struct vmdk_extent *x = *(const struct vmdk_extent *const *)a;
    const struct vmdk_extent *y = *(const struct vmdk_extent *const *)b;
    if (x->file != y->file)
        return x->file < y->file ? -1 : 1;
    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

/* Extents that share bytes of a file can be read, as one likes, not written. */
static int check_overlap(struct vmdk *s, struct err *e) {
    struct vmdk_extent **v = malloc(s->d.count * sizeof(*v));
    if (!v)
        return err_set(e, ENOMEM, "no memory for extents");
    for (size_t i = 0; i < s->d.count; i++)
        v[i] = &s->d.extents[i];
    qsort(v, s->d.count, sizeof(*v), by_place);
    int r = 0;
    for (size_t i = 1; !r && i < s->d.count; i++) {
        const struct vmdk_extent *a = v[i - 1], *b = v[i];
        if (a->file && a->file == b->file && a->offset + a->length > b->offset)
            r = err_set(e, EINVAL,
                        "extents %zu and %zu share bytes of '%s': only reading is possible",
                        (size_t)(a - s->d.extents), (size_t)(b - s->d.extents), b->name);
    }
    free(v);
    return r;
}

static int open_extents_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct vmdk *s = vmdk_of(n);
    size_t with_file = 0;
    if (!node_wants_data(ctx) && !(n->flags & NODE_CHECK))
        return 0;
    for (size_t i = 0; i < s->d.count; i++) {
        struct vmdk_extent *x = &s->d.extents[i];
        struct err why AUTO_ERR = ERR_INIT;
        if (x->type == VMDK_ZERO || x->access == VMDK_NOACCESS)
            continue;
        with_file++;
        int r = open_extent_co(n, ctx, i, &why);
        if (r < 0 && n->flags & (NODE_CHECK | NODE_LOOK) && r != -EPERM) {
            x->problem = strdup(err_text(&why));
            continue;
        }
        if (r < 0) {
            AUTO_STRBUF struct strbuf b = STRBUF_INIT;
            strbuf_put_safe(&b, x->name, strlen(x->name));
            err_prefix(&why, "extent %zu, '%s'", i, b.s);
            err_move(e, &why);
            return r;
        }
    }
    if (node_is_rw(n) && n->part_count < with_file && !(n->flags & NODE_CHECK))
        return check_overlap(s, e);
    return 0;
}

/* ---------------------------------------------------------------- the descriptor */

static int read_text_co(struct vmdk *s, struct err *e) {
    char *text = malloc(s->text_room + 1);
    if (!text)
        return err_set(e, ENOMEM, "no memory for a descriptor of %" PRIu64 " bytes", s->text_room);
    int r = disk_pread_co(s->file, s->text_at, text, s->text_room);
    if (r < 0)
        err_errno(e, -r, "reading the descriptor");
    else
        r = vmdk_desc_parse(text, s->text_room, &s->d, e);
    free(text);
    return r;
}

static int text_limits(struct vmdk *s, uint64_t at, uint64_t bytes, struct err *e) {
    if (bytes > VMDK_DESC_MAX)
        return err_set(e, EFBIG, "a descriptor of %" PRIu64 " bytes; up to %u are read", bytes,
                       VMDK_DESC_MAX);
    s->text_at = at;
    s->text_room = bytes;
    return 0;
}

/* A sparse file without a descriptor: one extent of a larger disk, looked at alone. */
static int bare_extent(struct vmdk *s, struct vmdk_map *m, struct err *e) {
    struct vmdk_desc *d = &s->d;
    d->parent_cid = VMDK_NO_PARENT;
    d->ddb = json_object();
    d->create_type = strdup("extent");
    d->extents = calloc(1, sizeof(*d->extents));
    if (!d->ddb || !d->create_type || !d->extents)
        return err_set(e, ENOMEM, "no memory for an extent");
    d->count = d->cap = 1;
    d->extents[0] = (struct vmdk_extent){.length = m->capacity, .type = m->type};
    d->size = m->capacity;
    s->frozen = "it is an extent without a descriptor; open the descriptor that lists it";
    return 0;
}

/* The map of a monolithic file, with the descriptor that lies in it. */
static int open_sparse_co(struct vmdk *s, struct err *e) {
    struct vmdk_map *m;
    uint64_t at, bytes;
    int r = vmdk_map_open_co(s->file, 0, &m, e);
    if (r < 0)
        return r;
    const struct vmdk_header *h = &m->h;
    s->embedded = true;
    if (m->type != VMDK_SPARSE || !h->desc_offset) {
        r = bare_extent(s, m, e);
    } else if (!ck_mul(h->desc_offset, (uint64_t)VMDK_SECTOR, &at) ||
               !ck_mul(h->desc_size, (uint64_t)VMDK_SECTOR, &bytes) || at > INT64_MAX / 2 ||
               bytes > s->file->size || at > s->file->size - bytes) {
        r = err_set(e, EINVAL,
                    "the descriptor at sector %" PRIu64 " (%" PRIu64 " sectors) is not in the file",
                    h->desc_offset, h->desc_size);
    } else {
        r = text_limits(s, at, bytes, e);
        if (!r)
            r = read_text_co(s, e);
    }
    struct vmdk_extent *x = s->d.extents;
    if (r < 0 || !m->capacity) { /* holds a descriptor alone, or an empty disk */
        s->embedded = !r && s->d.count == 1 && !x->length;
        vmdk_map_free(m);
        return r;
    }
    if (s->d.count != 1 || x->type != m->type)
        r = err_set(e, ENOTSUP,
                    "a sparse file whose descriptor lists %zu extents, not itself alone",
                    s->d.count);
    else if (x->length > m->capacity)
        r = err_set(e, EINVAL,
                    "its capacity is %" PRIu64 " bytes, fewer than the %" PRIu64
                    " of the descriptor",
                    m->capacity, x->length);
    if (r < 0) {
        vmdk_map_free(m);
        return r;
    }
    x->map = m;
    x->file = s->file;
    if (m->frozen)
        s->frozen = m->frozen;
    return 0;
}

static int open_text_co(struct vmdk *s, struct err *e) {
    int r = text_limits(s, 0, s->file->size, e);
    return r < 0 ? r : read_text_co(s, e);
}

/* ---------------------------------------------------------------- the node */

/* The unit of the engine's locks, and whether every grain is part of one alone. */
static void set_units(struct node *n) {
    struct vmdk *s = vmdk_of(n);
    uint32_t unit = 1;
    size_t maps = 0;
    for (size_t i = 0; i < s->d.count; i++) {
        const struct vmdk_map *m = s->d.extents[i].map;
        unit = m ? (uint32_t)max_u64(unit, m->grain_bytes) : unit;
        maps += m != NULL;
    }
    n->granularity = unit;
    n->size = s->d.size;
    s->pages_bytes = VMDK_PAGES_BYTES / (maps > VMDK_ACTIVE_MAX ? VMDK_ACTIVE_MAX
                                         : maps                 ? maps
                                                                : 1);
    for (size_t i = 0; i < s->d.count; i++)
        if (s->d.extents[i].map && s->d.extents[i].start & (unit - 1) && !s->frozen)
            s->frozen = "an extent does not begin at a multiple of the grain size";
    const struct vmdk_map *m = s->d.extents[0].map;
    if (s->d.count == 1 && m && m->coded) {
        n->codec = &codec_vmdk;
        n->coded_only = true;
    }
}

static int become_writable(struct node *n, struct err *e) {
    struct vmdk *s = vmdk_of(n);
    if (s->frozen && !(n->flags & NODE_CHECK))
        return err_set(e, ENOTSUP, "the image cannot be written: %s", s->frozen);
    s->wrote = false;
    for (size_t i = 0; i < s->d.count; i++) {
        const struct vmdk_map *m = s->d.extents[i].map;
        if (m && m->coded && s->d.count > 1 && !(n->flags & NODE_CHECK))
            return err_set(
                e, ENOTSUP,
                "the image cannot be written: extent %zu is compressed, others are there", i);
    }
    return 0;
}

static int vmdk_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct vmdk *s = vmdk_of(n);
    uint8_t magic[8] = {0};
    s->node = n;
    task_mutex_init(&s->cid_lock);
    int r = node_open_child_co(n, ctx, "file", CHILD_FILE_METADATA, &n->file, e);
    if (r < 0)
        return r;
    s->file = n->file;
    r = disk_pread_co(n->file, 0, magic, sizeof(magic));
    if (r < 0)
        return err_errno(e, -r, "reading the header");
    bool sparse = le32_load(magic) == VMDK_MAGIC || le32_load(magic) == VMDK_COWD_MAGIC ||
                  le64_load(magic) == VMDK_SE_MAGIC;
    r = sparse ? open_sparse_co(s, e) : open_text_co(s, e);
    if (!r && !s->embedded)
        r = open_extents_co(n, ctx, e);
    if (r < 0)
        return r;
    set_units(n);
    if (node_is_rw(n))
        r = become_writable(n, e);
    return r < 0 ? r : open_parent_co(n, ctx, e);
}

static void vmdk_close_co(struct node *n) {
    vmdk_desc_free(&vmdk_of(n)->d);
}

static int vmdk_reopen_co(struct node *n, unsigned new_flags, struct err *e) {
    struct vmdk *s = vmdk_of(n);
    if (!(new_flags & NODE_RW) || node_is_rw(n))
        return 0;
    for (size_t i = 0; i < s->d.count; i++)
        if (s->d.extents[i].map && !s->d.extents[i].map->stream)
            s->d.extents[i].map->scanned = false;
    return become_writable(n, e);
}

static int vmdk_probe(const struct probe_data *p) {
    if (p->head_length >= VMDK_HEADER_BYTES &&
        (le32_load(p->head) == VMDK_MAGIC || le32_load(p->head) == VMDK_COWD_MAGIC ||
         (le64_load(p->head) == VMDK_SE_MAGIC && le64_load(p->head + 8) == VMDK_SE_VERSION)))
        return 100;
    return vmdk_desc_probe(p->head, p->head_length) ? 100 : 0;
}

static const struct opt vmdk_open_opts[] = {
    OPT_CHILD("file", OPT_OPEN, "the storage"),
    OPT_CHILD("backing", OPT_OPEN, "the parent image"),
    OPT_LIST("extents", OPT_OPEN, "extents.N: the storage of the N-th extent, whatever its name"),
    OPT_END,
};

static const struct format_ops vmdk_format = {
    .probe = vmdk_probe,
    .create_co = vmdk_create_co,
    .map_co = vmdk_map_co,
    .place_co = vmdk_place_co,
    .publish_co = vmdk_publish_co,
    .abandon = vmdk_abandon,
    .set_zero_co = vmdk_set_zero_co,
    .discard_co = vmdk_discard_co,
    .flush_co = vmdk_flush_co,
    .set_backing_co = vmdk_set_backing_co,
    .empty_co = vmdk_empty_co,
    .repairs = CHECK_FIX_LEAKS | CHECK_FIX_ERRORS,
    .check_co = vmdk_check_co,
    .describe = vmdk_describe,
    .measure = vmdk_measure,
};

const struct driver driver_vmdk = {
    .name = "vmdk",
    .kind = DRIVER_FORMAT,
    .help = "VMDK, the disk image of VMware",
    .state_size = sizeof(struct vmdk),
    .opts = vmdk_open_opts,
    .create_opts = vmdk_create_opt_table,
    .create_opts_size = sizeof(struct vmdk_create_opts),
    .open_co = vmdk_open_co,
    .close_co = vmdk_close_co,
    .reopen_co = vmdk_reopen_co,
    .format = &vmdk_format,
};
