/* SPDX-License-Identifier: MIT */
/* VMDK: the header of a sparse file.  Fields are little-endian and not aligned. */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "format/vmdk/vmdk.h"

static int check_geometry(const struct vmdk_header *h, struct err *e) {
    uint64_t grain;
    if (h->version < 1 || h->version > 3)
        return err_set(e, ENOTSUP,
                       "version %" PRIu32 " of the sparse header is unknown, 1 to 3 are known",
                       h->version);
    if (h->flags & ~(uint32_t)VMDK_FLAGS_KNOWN)
        return err_set(e, ENOTSUP, "unknown flags 0x%" PRIx32 " in the sparse header",
                       h->flags & ~(uint32_t)VMDK_FLAGS_KNOWN);
    if (h->flags & VMDK_COMPRESSED && h->compression != 1)
        return err_set(e, ENOTSUP, "compression %" PRIu32 " is unknown, 1 (deflate) is known",
                       h->compression);
    if (!h->capacity && h->desc_offset)
        return 0; /* holds nothing but a descriptor */
    if (!ck_mul(h->grain, (uint64_t)VMDK_SECTOR, &grain) || grain < VMDK_GRAIN_MIN ||
        grain > VMDK_GRAIN_MAX || !is_pow2(grain))
        return err_set(e, EINVAL,
                       "grains of %" PRIu64 " sectors: a power of two from %u to %u is possible",
                       h->grain, VMDK_GRAIN_MIN / VMDK_SECTOR, VMDK_GRAIN_MAX / VMDK_SECTOR);
    if (!h->gtes || h->gtes > VMDK_GTES_MAX || !is_pow2(h->gtes))
        return err_set(e, EINVAL,
                       "grain tables of %" PRIu32 " entries: a power of two up to %u is possible",
                       h->gtes, VMDK_GTES_MAX);
    if (h->capacity > INT64_MAX / VMDK_SECTOR)
        return err_set(e, EFBIG, "capacity %" PRIu64 " sectors is above the limit of %" PRIu64,
                       h->capacity, (uint64_t)INT64_MAX / VMDK_SECTOR);
    return 0;
}

int vmdk_header_parse(const uint8_t *buf, struct vmdk_header *h, struct err *e) {
    if (le32_load(buf) != VMDK_MAGIC)
        return err_set(e, EINVAL, "no sparse VMDK file: magic 0x%08" PRIx32, le32_load(buf));
    *h = (struct vmdk_header){
        .version = le32_load(buf + 4),
        .flags = le32_load(buf + 8),
        .capacity = le64_load(buf + 12),
        .grain = le64_load(buf + 20),
        .desc_offset = le64_load(buf + 28),
        .desc_size = le64_load(buf + 36),
        .gtes = le32_load(buf + 44),
        .rgd = le64_load(buf + 48),
        .gd = le64_load(buf + 56),
        .overhead = le64_load(buf + 64),
        .unclean = buf[72] == 1,
        .compression = le16_load(buf + 77),
    };
    if (h->flags & VMDK_NEWLINES && memcmp(buf + 73, "\n \r\n", 4)) {
        err_set(e, EINVAL,
                "the file was damaged by a transfer as text: its line ends have changed");
        return -EINVAL;
    }
    return check_geometry(h, e);
}

void vmdk_header_store(const struct vmdk_header *h, uint8_t *buf) {
    memset(buf, 0, VMDK_HEADER_BYTES);
    le32_store(buf, VMDK_MAGIC);
    le32_store(buf + 4, h->version);
    le32_store(buf + 8, h->flags);
    le64_store(buf + 12, h->capacity);
    le64_store(buf + 20, h->grain);
    le64_store(buf + 28, h->desc_offset);
    le64_store(buf + 36, h->desc_size);
    le32_store(buf + 44, h->gtes);
    le64_store(buf + 48, h->rgd);
    le64_store(buf + 56, h->gd);
    le64_store(buf + 64, h->overhead);
    buf[72] = h->unclean;
    memcpy(buf + 73, "\n \r\n", 4);
    le16_store(buf + 77, (uint16_t)h->compression);
}
