/* SPDX-License-Identifier: MIT */
/* VHD: the footer and the header as bytes, geometry and sizes.  Pure. */
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "format/vpc/vpc.h"

/* Ones' complement of the sum of all bytes but the four of the sum itself. */
static uint32_t sum_of(const uint8_t *buf, size_t length, size_t at) {
    uint32_t sum = 0;
    for (size_t i = 0; i < length; i++)
        if (i < at || i >= at + 4)
            sum += buf[i];
    return ~sum;
}

void vpc_set_sum(uint8_t *buf, size_t length, size_t at) {
    be32_store(buf + at, sum_of(buf, length, at));
}

void vpc_uuid_text(const uint8_t *u, char out[37]) {
    snprintf(out, 37, "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0],
             u[1], u[2], u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13],
             u[14], u[15]);
}

int vpc_footer_parse(const uint8_t *buf, struct vpc_footer *f, struct err *e) {
    if (memcmp(buf, "conectix", 8))
        return err_set(e, EINVAL, "not a VHD footer: it does not begin with 'conectix'");
    uint32_t sum = be32_load(buf + VPC_AT_SUM), right = sum_of(buf, VPC_FOOTER_BYTES, VPC_AT_SUM);
    if (sum != right)
        return err_set(e, EINVAL, "the footer's checksum is 0x%08" PRIx32 ", not 0x%08" PRIx32, sum,
                       right);
    if (be32_load(buf + VPC_AT_VERSION) >> 16 != 1)
        return err_set(e, ENOTSUP, "VHD version %" PRIu32 " is unknown (1)",
                       be32_load(buf + VPC_AT_VERSION) >> 16);
    *f = (struct vpc_footer){
        .type = be32_load(buf + VPC_AT_TYPE),
        .data_offset = be64_load(buf + VPC_AT_DATA),
        .current_size = be64_load(buf + VPC_AT_SIZE),
        .original_size = be64_load(buf + VPC_AT_ORIGINAL_SIZE),
        .timestamp = be32_load(buf + VPC_AT_TIME),
        .geometry = {be16_load(buf + VPC_AT_CYLINDERS), buf[VPC_AT_HEADS], buf[VPC_AT_TRACK]},
    };
    for (int i = 0; i < 4; i++) {
        unsigned char c = buf[VPC_AT_CREATOR + i];
        f->creator[i] = (char)(isprint(c) ? c : c ? '?' : ' ');
    }
    memcpy(f->uuid, buf + VPC_AT_UUID, 16);
    if (f->type < VPC_FIXED || f->type > VPC_DIFF)
        return err_set(e, ENOTSUP,
                       "disk type %" PRIu32 " is unknown (2 fixed, 3 dynamic, 4 differencing)",
                       f->type);
    return 0;
}

int vpc_header_parse(const uint8_t *buf, struct vpc_header *h, struct err *e) {
    if (memcmp(buf, "cxsparse", 8))
        return err_set(e, EINVAL, "the header does not begin with 'cxsparse'");
    uint32_t sum = be32_load(buf + VPC_AT_HEADER_SUM);
    uint32_t right = sum_of(buf, VPC_HEADER_BYTES, VPC_AT_HEADER_SUM);
    if (sum != right)
        return err_set(e, EINVAL, "the header's checksum is 0x%08" PRIx32 ", not 0x%08" PRIx32, sum,
                       right);
    *h = (struct vpc_header){
        .bat_offset = be64_load(buf + VPC_AT_BAT),
        .entries = be32_load(buf + VPC_AT_ENTRIES),
        .block_size = be32_load(buf + VPC_AT_BLOCK),
    };
    memcpy(h->parent_uuid, buf + VPC_AT_PARENT_UUID, 16);
    if (h->block_size < VPC_BLOCK_MIN || h->block_size > VPC_BLOCK_MAX || !is_pow2(h->block_size))
        return err_set(e, EINVAL,
                       "block size %" PRIu32 " is not a power of two from %u to %u bytes",
                       h->block_size, VPC_BLOCK_MIN, VPC_BLOCK_MAX);
    if (h->bat_offset % VPC_SECTOR || h->bat_offset > INT64_MAX - (uint64_t)UINT32_MAX * 4)
        return err_set(e, EINVAL,
                       "the block allocation table at %" PRIu64 " does not begin at a sector",
                       h->bat_offset);
    return 0;
}

uint64_t vpc_disk_size(const struct vpc_footer *f, int rule) {
    uint64_t chs = vpc_geometry_sectors(&f->geometry) * VPC_SECTOR;
    bool by_geometry = !strcmp(f->creator, "vpc ") || !strcmp(f->creator, "qemu");
    if (rule == VPC_SIZE_CHS)
        return chs;
    if (rule == VPC_SIZE_CURRENT || !by_geometry || chs / VPC_SECTOR >= VPC_GEOMETRY_MAX)
        return f->current_size;
    return chs;
}

void vpc_geometry(uint64_t sectors, struct vpc_geometry *g) {
    uint64_t per_head; /* cylinders times heads */
    sectors = min_u64(sectors, VPC_GEOMETRY_MAX);
    if (sectors >= 65535u * 16 * 63) {
        g->track = 255;
        g->heads = 16;
        per_head = sectors / g->track;
    } else {
        g->track = 17;
        per_head = sectors / g->track;
        g->heads = (uint32_t)max_u64(4, (per_head + 1023) / 1024);
        if (per_head >= g->heads * UINT64_C(1024) || g->heads > 16) {
            g->track = 31;
            g->heads = 16;
            per_head = sectors / g->track;
        }
        if (per_head >= g->heads * UINT64_C(1024)) {
            g->track = 63;
            g->heads = 16;
            per_head = sectors / g->track;
        }
    }
    g->cylinders = (uint32_t)(per_head / g->heads);
}
