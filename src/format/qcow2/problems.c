/* SPDX-License-Identifier: MIT */
/*
 * What is wrong with an image, in words, as far as its header, its L1 table and its last refcount
 * block tell.  For `info`, which opens only to look (NODE_LOOK); `check` finds the rest.
 *
 * A file that was cut off is found by the last cluster that is counted: the file has at least a
 * byte of it, whoever wrote the image.
 */
#include <inttypes.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/strbuf.h"
#include "disk/io.h"
#include "format/qcow2/qcow2.h"

/* Index and entry of the last block that the refcount table on storage names; 0: none. */
static uint64_t last_block_co(struct qcow2 *s, uint8_t *buf, uint64_t *index) {
    uint64_t bytes = (uint64_t)s->h.refcount_table_clusters << s->cluster_bits;
    while (bytes && bytes <= QCOW2_REFTABLE_BYTES_MAX) {
        bytes -= s->cluster_size;
        if (disk_pread_co(s->file, s->h.refcount_table_offset + bytes, buf, s->cluster_size) < 0)
            return 0;
        for (uint32_t at = s->cluster_size; at; at -= 8) {
            uint64_t entry = be64_load(buf + at - 8) & QCOW2_REFTABLE_MASK;
            *index = (bytes + at) / 8 - 1;
            if (entry)
                return entry;
        }
    }
    return 0;
}

void qcow2_look_co(struct qcow2 *s) {
    uint64_t index, block, i = (uint64_t)1 << s->block_bits;
    uint8_t *buf = buf_get(s->cluster_size);
    block = buf ? last_block_co(s, buf, &index) : 0;
    if (block && block < s->file->size &&
        disk_pread_co(s->file, block, buf, s->cluster_size) == 0) {
        while (i && !qcow2_refcount_get(buf, i - 1, s->refcount_order))
            i--;
        s->counted_end = ((index << s->block_bits) + i) << s->cluster_bits;
    }
    buf_put(buf, s->cluster_size);
    s->luks = s->h.has_crypto ? malloc(QCOW2_LUKS_HEADER) : NULL;
    if (s->luks && (s->h.crypto_offset >= s->file->size ||
                    disk_pread_co(s->file, s->h.crypto_offset, s->luks, QCOW2_LUKS_HEADER) < 0)) {
        free(s->luks);
        s->luks = NULL;
    }
}

static void put(json_t *list, char *text) {
    json_t *v = json_string(text);
    if (v)
        json_array_append_new(list, v);
    free(text);
}

/* Bits of `features` that nobody here knows, each by the image's own name for it. */
static void put_unknown(const struct qcow2_header *h, json_t *list, unsigned kind,
                        uint64_t features, const char *what) {
    for (unsigned bit = 0; bit < 64; bit++) {
        char name[64];
        if (!(features >> bit & 1))
            continue;
        qcow2_feature_name(h, kind, bit, name);
        put(list, xasprintf("%s (bit %u): %s", name, bit, what));
    }
}

static void put_state(const struct qcow2_header *h, json_t *list) {
    put_unknown(h, list, 0, h->incompatible & ~(uint64_t)QCOW2_INCOMPAT_KNOWN,
                "a feature that this program does not know, and without which the image cannot be "
                "used");
    if (h->incompatible & QCOW2_INCOMPAT_CORRUPT)
        put(list, xstrdup("it is marked corrupt: it can be read, and must be repaired (check -r "
                          "all) before it is written to"));
    if (h->incompatible & QCOW2_INCOMPAT_DIRTY)
        put(list, xstrdup("it was not closed: its reference counts have to be made anew before it "
                          "is written to"));
    put_unknown(h, list, 2,
                h->autoclear & ~(uint64_t)(QCOW2_AUTOCLEAR_BITMAPS | QCOW2_AUTOCLEAR_DATA_FILE_RAW),
                "a feature that this program does not know, and that is dropped when the image is "
                "written to");
    if (h->has_bitmaps && h->bitmaps_count && !(h->autoclear & QCOW2_AUTOCLEAR_BITMAPS))
        put(list, xasprintf("its %" PRIu32 " bitmaps are out of date: it was written to by a "
                            "program that does not know them",
                            h->bitmaps_count));
    if (h->crypt_method)
        put(list, xstrdup("it is encrypted, which this version can neither read nor write"));
    if (h->backing_file && !h->backing_format)
        put(list, xstrdup("the format of its backing file is not recorded, and guessed whenever it "
                          "is opened (rebase -u -F records it)"));
}

static void put_tables(const struct qcow2 *s, json_t *list) {
    uint64_t size = s->file->size, end = s->counted_end;
    for (uint32_t i = 0; i < s->l1_entries; i++) {
        uint64_t host = s->l1[i] & QCOW2_OFFSET_MASK;
        if (host >= size)
            end = max_u64(end, host + s->cluster_size);
    }
    end = max_u64(end, s->h.refcount_table_offset + s->cluster_size);
    if (end > size && end - size >= s->cluster_size)
        put(list, xasprintf("the file is cut off: it ends at %" PRIu64
                            ", and the image reaches up to %" PRIu64,
                            size, end));
}

json_t *qcow2_problems(const struct qcow2 *s) {
    json_t *list = json_array();
    if (!list)
        return NULL;
    put_state(&s->h, list);
    if (s->bitmaps_problem)
        put(list, xstrdup(s->bitmaps_problem));
    put_tables(s, list);
    return list;
}
