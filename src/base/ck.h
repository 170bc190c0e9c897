/* SPDX-License-Identifier: MIT */
/*
 * Checked arithmetic for numbers that somebody else wrote.
 *
 * Each ck_* returns true when the result is exact and stored, false (result untouched) when it does
 * not fit.  The plain align and min/max helpers are for numbers already known to be in range.
 */
#ifndef STRATA_BASE_CK_H
#define STRATA_BASE_CK_H

#include <stdbool.h>
#include <stdint.h>

#define CK_OP_(op, a, b, out)                                                                      \
    ({                                                                                             \
        __typeof__(*(out)) ck_r_;                                                                  \
        bool ck_ok_ = !op((a), (b), &ck_r_);                                                       \
        if (ck_ok_)                                                                                \
            *(out) = ck_r_;                                                                        \
        ck_ok_;                                                                                    \
    })

#define ck_add(a, b, out) CK_OP_(__builtin_add_overflow, a, b, out)
#define ck_sub(a, b, out) CK_OP_(__builtin_sub_overflow, a, b, out)
#define ck_mul(a, b, out) CK_OP_(__builtin_mul_overflow, a, b, out)

static inline bool is_pow2(uint64_t v) {
    return v && !(v & (v - 1));
}

/* `align` is a power of two in all of these. */
static inline bool is_aligned(uint64_t v, uint64_t align) {
    return !(v & (align - 1));
}
static inline uint64_t align_down(uint64_t v, uint64_t align) {
    return v & ~(align - 1);
}
/* Wraps near 2^64: only for values known to be below INT64_MAX. */
static inline uint64_t align_up(uint64_t v, uint64_t align) {
    return (v + align - 1) & ~(align - 1);
}
static inline bool ck_align_up(uint64_t v, uint64_t align, uint64_t *out) {
    uint64_t t;
    if (__builtin_add_overflow(v, align - 1, &t))
        return false;
    *out = t & ~(align - 1);
    return true;
}
static inline uint64_t div_up(uint64_t v, uint64_t d) {
    return v / d + (v % d != 0);
}
static inline uint64_t min_u64(uint64_t a, uint64_t b) {
    return a < b ? a : b;
}
static inline uint64_t max_u64(uint64_t a, uint64_t b) {
    return a > b ? a : b;
}

/* [a, a+an) and [b, b+bn) share a byte.  Sums must not overflow. */
static inline bool ranges_overlap(uint64_t a, uint64_t an, uint64_t b, uint64_t bn) {
    return a < b + bn && b < a + an;
}

#endif
