/* SPDX-License-Identifier: MIT */
/*
 * Entries of the L1 and L2 tables and of refcount blocks: bits to meaning, pure and total.
 *
 * Entries here are in host byte order; tables on disk are big-endian.  Nothing in an entry is
 * trusted: a kind of QCOW2_CLUSTER_BAD is damage.
 *
 * Source: the public qcow2 specification ("Cluster mapping", "Refcount blocks").
 */
#ifndef STRATA_FORMAT_QCOW2_ENTRY_H
#define STRATA_FORMAT_QCOW2_ENTRY_H

#include <stdbool.h>
#include <stdint.h>
#include "base/bytes.h"

#define QCOW2_COPIED ((uint64_t)1 << 63)     /* L1, L2: the reference count is exactly one */
#define QCOW2_COMPRESSED ((uint64_t)1 << 62) /* L2 */
#define QCOW2_ZERO ((uint64_t)1)             /* L2, version 3 */
#define QCOW2_OFFSET_MASK UINT64_C(0x00fffffffffffe00)   /* L1 and L2: bits 9..55 */
#define QCOW2_REFTABLE_MASK UINT64_C(0xfffffffffffffe00) /* refcount table: bits 9..63 */
#define QCOW2_HOST_LIMIT ((uint64_t)1 << 56) /* host offsets of tables and data lie below */

/*
 * One L2 entry.  Standard entries have 8 bytes, and their bitmap here is 0.  Extended ones have 16:
 * the second 8 are two bits for each of the cluster's 32 subclusters, "allocated" in the low half
 * (bit i) and "reads as zeros" in the high half (bit 32 + i); neither: the layer below decides.
 */
struct qcow2_l2e {
    uint64_t value, bitmap;
};
#define QCOW2_SUBCLUSTERS 32u
#define QCOW2_ALL_ZERO UINT64_C(0xffffffff00000000) /* bitmap: every subcluster reads as zeros */

/* Bits [first, end) of 32. */
static inline uint32_t qcow2_sub_mask(uint32_t first, uint32_t end) {
    return (uint32_t)(((uint64_t)1 << end) - ((uint64_t)1 << first));
}

enum qcow2_cluster_kind {
    QCOW2_CLUSTER_NONE,       /* the layer below decides */
    QCOW2_CLUSTER_ROOM,       /* the same, and a host cluster is there (extended entries only) */
    QCOW2_CLUSTER_ZERO,       /* zeros, no host cluster */
    QCOW2_CLUSTER_ZERO_ALLOC, /* zeros, host cluster kept */
    QCOW2_CLUSTER_DATA,
    QCOW2_CLUSTER_CODED,
    QCOW2_CLUSTER_BAD, /* unaligned offset, a zero flag in version 2, a bitmap that contradicts */
};

/* The bits of a compressed entry from here up (below 62) count additional sectors. */
static inline uint32_t qcow2_coded_shift(uint32_t cluster_bits) {
    return 62 - (cluster_bits - 8);
}

static inline enum qcow2_cluster_kind qcow2_classify(uint32_t version, uint32_t cluster_bits,
                                                     uint64_t entry) {
    if (entry & QCOW2_COMPRESSED)
        return QCOW2_CLUSTER_CODED;
    uint64_t host = entry & QCOW2_OFFSET_MASK;
    if (host & (((uint64_t)1 << cluster_bits) - 1))
        return QCOW2_CLUSTER_BAD;
    if (entry & QCOW2_ZERO) {
        if (version < 3)
            return QCOW2_CLUSTER_BAD;
        return host ? QCOW2_CLUSTER_ZERO_ALLOC : QCOW2_CLUSTER_ZERO;
    }
    if (host)
        return QCOW2_CLUSTER_DATA;
    /* Offset 0 with COPIED is valid with an external data file only. */
    return entry & QCOW2_COPIED ? QCOW2_CLUSTER_BAD : QCOW2_CLUSTER_NONE;
}

/* Where the code of a compressed cluster lies; *length is an upper bound, at most 2 clusters. */
static inline void qcow2_coded_decode(uint32_t cluster_bits, uint64_t entry, uint64_t *host,
                                      uint32_t *length) {
    uint32_t x = qcow2_coded_shift(cluster_bits);
    *host = entry & (((uint64_t)1 << x) - 1);
    uint64_t extra = (entry & ~(QCOW2_COPIED | QCOW2_COMPRESSED)) >> x;
    *length = (uint32_t)((extra + 1) * 512 - (*host & 511));
}

/* The entry for `length` bytes (1 .. one cluster) of code at `host`; 0 when it does not fit. */
static inline uint64_t qcow2_coded_encode(uint32_t cluster_bits, uint64_t host, uint32_t length) {
    uint32_t x = qcow2_coded_shift(cluster_bits);
    if (length == 0 || host >= ((uint64_t)1 << x) || length > ((uint64_t)1 << x) - host)
        return 0;
    uint64_t extra = ((host + length - 1) >> 9) - (host >> 9);
    return QCOW2_COMPRESSED | extra << x | host;
}

/* Reference count number `index` of a block; 2^order bits each. */
static inline uint64_t qcow2_refcount_get(const uint8_t *block, uint64_t index, uint32_t order) {
    switch (order) {
    case 0:
    case 1:
    case 2: {
        unsigned width = 1u << order, per_byte = 8u >> order;
        return (block[index / per_byte] >> (index % per_byte * width)) & ((1u << width) - 1);
    }
    case 3:
        return block[index];
    case 4:
        return be16_load(block + index * 2);
    case 5:
        return be32_load(block + index * 4);
    default:
        return be64_load(block + index * 8);
    }
}

/* `value` must fit the width. */
static inline void qcow2_refcount_set(uint8_t *block, uint64_t index, uint32_t order,
                                      uint64_t value) {
    switch (order) {
    case 0:
    case 1:
    case 2: {
        unsigned width = 1u << order, per_byte = 8u >> order;
        unsigned shift = index % per_byte * width;
        uint8_t *p = block + index / per_byte;
        *p = (uint8_t)((*p & ~(((1u << width) - 1) << shift)) | (unsigned)value << shift);
        return;
    }
    case 3:
        block[index] = (uint8_t)value;
        return;
    case 4:
        be16_store(block + index * 2, (uint16_t)value);
        return;
    case 5:
        be32_store(block + index * 4, (uint32_t)value);
        return;
    default:
        be64_store(block + index * 8, value);
    }
}

static inline uint64_t qcow2_refcount_limit(uint32_t order) {
    return order == 6 ? UINT64_MAX : ((uint64_t)1 << (1u << order)) - 1;
}

#endif
