/* SPDX-License-Identifier: MIT */
/*
 * What an open image's header says, as the "data" of qemu-img info's format-specific part: same
 * keys, same types, in the same order; and "dirty-flag", (NODE_LOOK) "encrypted" and "problems",
 * which info moves one level up.  Names from the image go out
 * as they are; whoever prints them makes them safe.
 */
#include "format/qcow2/qcow2.h"

static json_t *text(const char *s) {
    json_t *v = json_string(s);
    return v ? v : json_string("(not UTF-8)");
}

static json_t *encryption(const struct qcow2 *s) {
    json_t *c = json_object();
    if (s->luks && s->h.crypt_method == QCOW2_CRYPT_LUKS)
        qcow2_describe_luks(s->luks, c);
    else
        json_object_set_new(c, "format",
                            json_string(s->h.crypt_method == QCOW2_CRYPT_LUKS ? "luks" : "aes"));
    return c;
}

json_t *qcow2_describe(struct node *n) {
    const struct qcow2_header *h = &qcow2_of(n)->h;
    json_t *o = json_object();
    if (!o)
        return NULL;
    json_object_set_new(o, "compat", json_string(h->version < 3 ? "0.10" : "1.1"));
    json_object_set_new(
        o, "compression-type",
        json_string(h->compression_type == QCOW2_COMPRESSION_ZSTD ? "zstd" : "zlib"));
    if (h->version >= 3) {
        json_object_set_new(o, "dirty-flag", json_boolean(h->incompatible & QCOW2_INCOMPAT_DIRTY));
        json_object_set_new(o, "lazy-refcounts",
                            json_boolean(h->compatible & QCOW2_COMPAT_LAZY_REFCOUNTS));
    }
    json_t *bitmaps = qcow2_bitmaps_describe(n);
    if (bitmaps)
        json_object_set_new(o, "bitmaps", bitmaps);
    json_object_set_new(o, "refcount-bits", json_integer((json_int_t)1 << h->refcount_order));
    if (h->crypt_method)
        json_object_set_new(o, "encrypt", encryption(qcow2_of(n)));
    if (h->crypt_method && n->flags & NODE_LOOK)
        json_object_set_new(o, "encrypted", json_true());
    if (n->flags & NODE_LOOK)
        json_object_set_new(o, "problems", qcow2_problems(qcow2_of(n)));
    if (h->data_file)
        json_object_set_new(o, "data-file", text(h->data_file));
    if (h->incompatible & QCOW2_INCOMPAT_DATA_FILE)
        json_object_set_new(o, "data-file-raw",
                            json_boolean(h->autoclear & QCOW2_AUTOCLEAR_DATA_FILE_RAW));
    if (h->version >= 3) {
        json_object_set_new(o, "corrupt", json_boolean(h->incompatible & QCOW2_INCOMPAT_CORRUPT));
        json_object_set_new(o, "extended-l2",
                            json_boolean(h->incompatible & QCOW2_INCOMPAT_EXTENDED_L2));
    }
    return o;
}
