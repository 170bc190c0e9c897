/* SPDX-License-Identifier: MIT */
/*
 * Other options for an image that exists.
 *
 * First everything is judged, without a write; then the changes are made in an order in which each
 * finds what it needs, and each of them survives a crash by itself:
 *
 *  1. header:    version 3 (amend_snapshots.c: with entries of snapshots for it), lazy reference
 *                counts, data file, backing file (one rewrite)
 *  2. counts:    another width (amend_counts.c); needs version 3
 *  3. size:      through the engine, as resize
 *  4. version 2: zero clusters become holes or data (amend_zero.c), then the header
 *
 * Refused are the same changes as in qemu-img amend: what version 2 cannot hold, another backing
 * file (that is rebase's work), data_file_raw=on for an image that was not made so.  Beyond it,
 * bitmaps are not dropped on the way to version 2.
 *
 * Facts: the public qcow2 specification; the rules of qemu-img amend as it shows them.
 */
#include "format/codec.h"
#include "format/qcow2/amend.h"
#include "format/qcow2/snapshot.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/ck.h"
#include "base/cleanup.h"
#include "base/plant.h"
#include "disk/io.h"

#define AMEND_CRYPT_ROW(i, key, help)                                                              \
    OPT_STR(struct qcow2_amend_opts, encrypt[i], "encrypt." key, OPT_AMEND, help)

static const char *const compat_names[] = {"0.10", "1.1", "v2", "v3", NULL};

const struct opt qcow2_amend_opt_table[] = {
    OPT_STR(struct qcow2_amend_opts, backing_file, "backing_file", OPT_AMEND,
            "image below this one (changed by rebase only)"),
    OPT_STR(struct qcow2_amend_opts, backing_fmt, "backing_fmt", OPT_AMEND,
            "format of the backing file (changed by rebase only)"),
    OPT_GIVEN_ENUM(struct qcow2_amend_opts, compat, has_compat, "compat", OPT_AMEND, compat_names,
                   "format version: 0.10 (v2), or 1.1 (v3)"),
    OPT_STR(struct qcow2_amend_opts, data_file, "data_file", OPT_AMEND,
            "recorded name of the external data file"),
    OPT_GIVEN_BOOL(struct qcow2_amend_opts, data_file_raw, has_raw, "data_file_raw", OPT_AMEND,
                   "the external data file stays valid as a raw image"),
    AMEND_CRYPT_ROW(0, "iter-time", "time for the key derivation in ms (not yet supported)"),
    AMEND_CRYPT_ROW(1, "keyslot", "key slot to change (not yet supported)"),
    AMEND_CRYPT_ROW(2, "new-secret", "new secret of the key slots (not yet supported)"),
    AMEND_CRYPT_ROW(3, "old-secret", "secret of the key slots to change (not yet supported)"),
    AMEND_CRYPT_ROW(4, "state", "new state of the key slots (not yet supported)"),
    OPT_GIVEN_BOOL(struct qcow2_amend_opts, lazy_refcounts, has_lazy, "lazy_refcounts", OPT_AMEND,
                   "reference counts may be written late"),
    OPT_GIVEN_U64(struct qcow2_amend_opts, refcount_bits, has_bits, "refcount_bits", OPT_AMEND,
                  OPT_POW2(1, 64), "width of a reference count"),
    OPT_GIVEN_SIZE(struct qcow2_amend_opts, size, has_size, "size", OPT_AMEND, OPT_ANY,
                   "size that the guest sees"),
    OPT_END,
};

/* What an amendment comes to. */
struct change {
    struct qcow2 *s;
    const struct qcow2_amend_opts *o;
    const struct amend_ctx *ctx;
    uint32_t version, order;
    uint64_t size;
    bool lazy, raw;
    bool short_entries; /* snapshots without their disk size: version 3 wants it */
};

void qcow2_amend_step(struct qcow2_amend_progress *p, uint64_t by) {
    p->done += by;
    if (p->ctx->progress)
        p->ctx->progress(p->ctx->arg, min_u64(p->done, p->total), p->total);
}

/* ---------------------------------------------------------------- judging */

static bool same_text(const char *given, const char *there) {
    return !given || !strcmp(given, there ? there : "");
}

static int judge_names(const struct change *c, struct err *e) {
    const struct qcow2_header *h = &c->s->h;
    const struct qcow2_amend_opts *o = c->o;
    for (unsigned i = 0; i < sizeof(o->encrypt) / sizeof(o->encrypt[0]); i++)
        if (o->encrypt[i])
            return err_set(e, EINVAL, "options of encryption: the image is not encrypted");
    if (o->data_file && !(h->incompatible & QCOW2_INCOMPAT_DATA_FILE))
        return err_set(e, EINVAL, "data_file: the image has no external data file");
    if (o->data_file && strlen(o->data_file) > QCOW2_BACKING_NAME_MAX)
        return err_set(e, EINVAL, "data_file: the name has %zu bytes, more than %d",
                       strlen(o->data_file), QCOW2_BACKING_NAME_MAX);
    if (o->has_raw && o->data_file_raw && !(h->autoclear & QCOW2_AUTOCLEAR_DATA_FILE_RAW))
        return err_set(e, EINVAL, "data_file_raw cannot be switched on for an existing image");
    /* With one of the two, both are compared, as there. */
    bool any = o->backing_file || o->backing_fmt;
    if (any && (!same_text(o->backing_file ? o->backing_file : "", h->backing_file) ||
                !same_text(o->backing_fmt ? o->backing_fmt : "", h->backing_format))) {
        err_set(e, EINVAL, "the backing file of an image is not changed by amend");
        err_hint(e, "strata rebase changes it, and with -u only its name");
        return -EINVAL;
    }
    return 0;
}

static int judge_snapshots_co(struct change *c, struct err *e) {
    struct qcow2 *s = c->s;
    uint64_t at = s->h.snapshots_offset;
    bool down = c->version<s->h.version, up = c->version> s->h.version;
    for (uint32_t i = 0; i < s->h.nb_snapshots && (up || down); i++) {
        struct qcow2_amend_snapshot x;
        int r = qcow2_amend_snapshot_co(s, &at, &x, e);
        if (r < 0)
            return r;
        if (down && (x.disk_size != c->size || x.vm_state > UINT32_MAX))
            return err_set(e, ENOTSUP,
                           "internal snapshot %" PRIu32 " of %" PRIu64
                           " bytes is of another size than the disk of %" PRIu64
                           " bytes, which version 2 cannot hold",
                           i + 1, x.disk_size, c->size);
        c->short_entries |= up && x.extra < QCOW2_SNAPSHOT_EXTRA_SIZE;
    }
    return 0;
}

static int judge_version_2_co(const struct change *c, struct err *e) {
    struct qcow2 *s = c->s;
    uint64_t bad = s->h.incompatible & ~(uint64_t)QCOW2_INCOMPAT_COMPRESSION;
    char name[64];
    if (c->order != 4)
        return c->o->has_bits
                   ? err_set(e, EINVAL, "refcount_bits=%u needs compat=1.1: version 2 has 16 bits",
                             1u << c->order)
                   : err_set(e, ENOTSUP,
                             "compat=0.10 needs refcount_bits=16: the image has %u-bit counts",
                             1u << c->order);
    if (c->o->has_lazy && c->lazy)
        return err_set(e, EINVAL, "lazy_refcounts=on needs compat=1.1");
    if (s->h.version < 3)
        return 0;
    if (bad & QCOW2_INCOMPAT_DATA_FILE)
        return err_set(e, ENOTSUP, "version 2 has no external data file, which the image uses");
    bad &= ~(uint64_t)QCOW2_INCOMPAT_DIRTY;
    if (bad) {
        qcow2_feature_name(&s->h, 0, (unsigned)__builtin_ctzll(bad), name);
        return err_set(e, ENOTSUP,
                       "version 2 cannot hold the image's incompatible features 0x%" PRIx64 ": %s",
                       bad, name);
    }
    if (s->h.has_bitmaps && s->h.bitmaps_count) {
        err_set(e, ENOTSUP, "version 2 cannot hold the image's %" PRIu32 " bitmaps",
                s->h.bitmaps_count);
        err_hint(e, "remove them first: strata bitmap --remove");
        return -ENOTSUP;
    }
    for (uint32_t i = 0; i < s->h.trailing_len; i++)
        if (s->h.trailing[i])
            return err_set(e, ENOTSUP,
                           "the header has fields that this program does not know, and that "
                           "version 2 cannot hold");
    if (s->h.compression_type == QCOW2_COMPRESSION_ZLIB)
        return 0;
    bool coded;
    int r = qcow2_find_coded_co(s, &coded, e);
    if (!r && coded)
        r = err_set(e, ENOTSUP, "version 2 has no zstd, which the image's clusters are coded with");
    return r;
}

static int judge_size(const struct change *c, struct err *e) {
    struct qcow2 *s = c->s;
    if (c->size == s->h.size)
        return 0;
    if (c->size < s->h.size && !(c->ctx->flags & AMEND_SHRINK)) {
        err_set(e, EINVAL, "the disk would become smaller, from %" PRIu64 " to %" PRIu64 " bytes",
                s->h.size, c->size);
        err_hint(e, "--shrink allows it; what lies behind the new end is lost");
        return -EINVAL;
    }
    /* In the version that the image has when its turn comes. */
    return qcow2_resize_check(s, c->size, max_u64(c->version, s->h.version), e);
}

static int judge_co(struct change *c, struct err *e) {
    struct qcow2 *s = c->s;
    const struct qcow2_amend_opts *o = c->o;
    c->version = !o->has_compat ? s->h.version : o->compat == 1 || o->compat == 3 ? 3 : 2;
    c->order = o->has_bits ? (uint32_t)__builtin_ctzll(o->refcount_bits) : s->refcount_order;
    c->lazy = o->has_lazy ? o->lazy_refcounts
                          : s->h.compatible & QCOW2_COMPAT_LAZY_REFCOUNTS && c->version >= 3;
    c->raw = o->has_raw ? o->data_file_raw : s->h.autoclear & QCOW2_AUTOCLEAR_DATA_FILE_RAW;
    c->size = o->has_size && o->size ? align_up(o->size, 512) : s->h.size;
    int r = judge_names(c, e);
    if (!r)
        r = judge_size(c, e);
    if (!r)
        r = judge_snapshots_co(c, e);
    if (!r && c->version < 3)
        r = judge_version_2_co(c, e);
    if (!r && c->order != s->refcount_order)
        r = qcow2_counts_fit_co(s, c->order, e);
    return r;
}

/* ---------------------------------------------------------------- doing */

static void set_bit(uint64_t *features, uint64_t bit, bool on) {
    *features = on ? *features | bit : *features & ~bit;
}

/* Step 1. */
static int change_header_co(const struct change *c, struct err *e) {
    struct qcow2 *s = c->s;
    struct qcow2_header old = s->h;
    struct qcow2_amend_table table = {0};
    bool named = c->o->data_file && !same_text(c->o->data_file, s->h.data_file);
    if (c->version > s->h.version) {
        s->h.version = c->version;
        s->h.header_length = QCOW2_V3_LENGTH;
        if (!s->h.feature_table && s->cluster_size > 4 * KIB)
            qcow2_feature_table_default(&s->h);
    }
    if (s->h.version >= 3) {
        /* Version 2 is for step 4, which clears what it cannot hold. */
        set_bit(&s->h.compatible, QCOW2_COMPAT_LAZY_REFCOUNTS, c->lazy && c->version >= 3);
        set_bit(&s->h.autoclear, QCOW2_AUTOCLEAR_DATA_FILE_RAW, c->raw);
    }
    if (named)
        s->h.data_file = *c->o->data_file ? xstrdup(c->o->data_file) : NULL;
    bool same = !named && old.version == s->h.version && old.compatible == s->h.compatible &&
                old.autoclear == s->h.autoclear;
    int r = c->short_entries ? qcow2_amend_table_co(s, &table, e) : 0;
    if (!r && !same)
        r = qcow2_header_write_co(s, e);
    if (!r)
        qcow2_amend_table_done_co(s, &table);
    if (r < 0) { /* which header storage has is not known: a new snapshot table stays counted */
        if (named)
            free(s->h.data_file);
        if (s->h.feature_table != old.feature_table)
            free(s->h.feature_table);
        s->h = old;
    } else if (named) {
        free(old.data_file);
    }
    return r;
}

/* Step 4. */
static int downgrade_co(const struct change *c, struct qcow2_amend_progress *p, struct err *e) {
    struct qcow2 *s = c->s;
    int r = PLANTED(DOWNGRADE_BEFORE_ZEROS) ? 0 : qcow2_expand_zeros_co(s, p, e);
    if (r < 0)
        return r;
    struct qcow2_header old = s->h;
    s->h.version = 2;
    s->h.header_length = QCOW2_V2_LENGTH;
    s->h.incompatible = s->h.compatible = s->h.autoclear = 0;
    s->h.compression_type = QCOW2_COMPRESSION_ZLIB;
    s->h.feature_table = NULL;
    s->h.feature_table_len = 0;
    r = qcow2_header_write_co(s, e);
    if (r < 0) {
        s->h = old;
        return r;
    }
    free(old.feature_table);
    if (s->node->codec)
        s->node->codec = &codec_deflate;
    return PLANTED(DOWNGRADE_BEFORE_ZEROS) ? qcow2_expand_zeros_co(s, p, e) : 0;
}

/* L1 entries that step 4 looks at. */
static uint64_t tables_to_expand_co(const struct change *c) {
    struct qcow2 *s = c->s;
    uint64_t n = s->l1_entries, at = s->h.snapshots_offset;
    for (uint32_t i = 0; i < s->h.nb_snapshots; i++) {
        struct qcow2_amend_snapshot x;
        if (qcow2_amend_snapshot_co(s, &at, &x, NULL) < 0)
            break;
        n += x.l1_entries;
    }
    return n;
}

int qcow2_amend_co(struct node *n, const void *amend_opts, const struct amend_ctx *ctx,
                   struct err *e) {
    struct qcow2 *s = qcow2_of(n);
    struct change c = {.s = s, .o = amend_opts, .ctx = ctx};
    struct qcow2_amend_progress p = {.ctx = ctx};
    int r = qcow2_writeback_all_co(s);
    if (r < 0)
        return err_errno(e, -r, "writing the metadata back");
    r = judge_co(&c, e);
    bool down = c.version < s->h.version;
    if (!r && down)
        p.total = tables_to_expand_co(&c);
    if (!r)
        r = change_header_co(&c, e);
    if (!r && c.order != s->refcount_order) {
        r = qcow2_counts_change_co(s, c.order, &p, e);
        if (!r && (r = qcow2_writeback_all_co(s)) < 0)
            err_errno(e, -r, "giving the old reference counts back");
    }
    if (!r && c.size != s->h.size)
        r = disk_resize_quiesced_co(n, c.size, PREALLOC_OFF, e);
    if (!r && (r = qcow2_writeback_all_co(s)) < 0)
        err_errno(e, -r, "writing the metadata back");
    if (!r && down)
        r = downgrade_co(&c, &p, e);
    return r;
}
