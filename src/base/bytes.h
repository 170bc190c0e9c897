/* SPDX-License-Identifier: MIT */
/*
 * Loads and stores of fixed-width integers in byte arrays.
 *
 * On-disk and on-wire data stays a byte array until one of these reads it: no packed structs, no
 * casts, any alignment.  The compiler turns each into one load and, where needed, a byte swap.
 */
#ifndef STRATA_BASE_BYTES_H
#define STRATA_BASE_BYTES_H

#include <stdbool.h>
#include <endian.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define KIB ((uint64_t)1 << 10)
#define MIB ((uint64_t)1 << 20)
#define GIB ((uint64_t)1 << 30)
#define TIB ((uint64_t)1 << 40)

#define BYTES_ACCESSORS(bits)                                                                      \
    static inline uint##bits##_t be##bits##_load(const void *p) {                                  \
        uint##bits##_t v;                                                                          \
        memcpy(&v, p, sizeof(v));                                                                  \
        return be##bits##toh(v);                                                                   \
    }                                                                                              \
    static inline void be##bits##_store(void *p, uint##bits##_t v) {                               \
        v = htobe##bits(v);                                                                        \
        memcpy(p, &v, sizeof(v));                                                                  \
    }                                                                                              \
    static inline uint##bits##_t le##bits##_load(const void *p) {                                  \
        uint##bits##_t v;                                                                          \
        memcpy(&v, p, sizeof(v));                                                                  \
        return le##bits##toh(v);                                                                   \
    }                                                                                              \
    static inline void le##bits##_store(void *p, uint##bits##_t v) {                               \
        v = htole##bits(v);                                                                        \
        memcpy(p, &v, sizeof(v));                                                                  \
    }

BYTES_ACCESSORS(16)
BYTES_ACCESSORS(32)
BYTES_ACCESSORS(64)

/* True when the `len` bytes at `p` are all zero.  Any alignment; memory speed. */
bool bytes_are_zero(const void *p, size_t len);

#endif
