/* SPDX-License-Identifier: MIT */
/*
 * The mutator of qcow2 images: knows where headers and tables are.
 *
 * Half of the time it leaves the work to the plain mutator (image or program part).  Else it picks
 * a header field, or an aligned word of any record, and puts there: an interesting number, another
 * word of the same image (tables that share clusters), or the old value a little changed.
 */
#include "fuzz.h"

struct rng {
    uint64_t s;
};

static uint64_t rng_next(struct rng *r) { /* splitmix64 */
    uint64_t z = r->s += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

static const struct {
    uint8_t at, bytes;
} fields[] = {{4, 4},  {8, 8},  {16, 4}, {20, 4}, {24, 8}, {32, 4}, {36, 4}, {40, 8},  {48, 8},
              {56, 4}, {60, 4}, {64, 8}, {72, 8}, {80, 8}, {88, 8}, {96, 4}, {100, 4}, {104, 1}};

/* The first byte of a random record's content, or of the image itself; its length in *len. */
static uint8_t *pick_record(uint8_t *data, size_t size, struct rng *r, size_t *len, bool first) {
    if (size < 8 || memcmp(data, SPARSE_MAGIC, 4)) {
        *len = size;
        return data;
    }
    uint8_t *chosen = NULL;
    unsigned seen = 0;
    for (size_t at = 8; size - at > 6;) {
        size_t n = min_u64(be16_load(data + at + 4), size - at - 6);
        if (rng_next(r) % ++seen == 0) {
            chosen = data + at + 6;
            *len = n;
        }
        if (first)
            break;
        at += 6 + n;
    }
    return chosen;
}

static void put_field(uint8_t *p, unsigned bytes, uint64_t v) {
    for (unsigned i = 0; i < bytes; i++)
        p[i] = (uint8_t)(v >> 8 * (bytes - 1 - i));
}

static void change_word(uint8_t *image, size_t image_len, uint8_t *p, unsigned bytes,
                        struct rng *r) {
    uint64_t old = 0, k = rng_next(r);
    size_t len;
    for (unsigned i = 0; i < bytes; i++)
        old = old << 8 | p[i];
    switch (k >> 32 & 7) {
    case 0:
    case 1:
        put_field(p, bytes, fuzz_interesting(rng_next(r)));
        break;
    case 2:
        put_field(p, bytes, old ^ UINT64_C(1) << (k & 63) % (8 * bytes));
        break;
    case 3:
        put_field(p, bytes, old + (k & 15) - 8);
        break;
    case 4:
        put_field(p, bytes, old + ((k & 1 ? 1 : -1ULL) << (9 + (k >> 8) % 8)));
        break;
    case 5:
        put_field(p, bytes, k & 15);
        break;
    default: { /* another word of the image */
        uint8_t *q = pick_record(image, image_len, r, &len, false);
        size_t words = q ? len / bytes : 0;
        if (words)
            memmove(p, q + rng_next(r) % words * bytes, bytes);
    }
    }
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed) {
    struct rng r = {seed};
    struct prog program;
    size_t image_len, len = 0;
    image_split(data, size, &image_len, &program);
    if (rng_next(&r) % 4 == 0)
        return LLVMFuzzerMutate(data, size, max);
    if (rng_next(&r) % 4 == 0 && program.p < program.end) { /* the program alone */
        size_t at = (size_t)(program.p - data);
        return at + LLVMFuzzerMutate(data + at, size - at, max - at);
    }
    for (unsigned n = 1 + rng_next(&r) % 4; n; n--) {
        bool header = rng_next(&r) % 3 == 0;
        uint8_t *p = pick_record(data, image_len, &r, &len, header);
        if (!p || len < 8)
            continue;
        if (header) {
            unsigned f = rng_next(&r) % (sizeof(fields) / sizeof(fields[0]));
            if (fields[f].at + fields[f].bytes <= len)
                change_word(data, image_len, p + fields[f].at, fields[f].bytes, &r);
        } else {
            /* Counts are mostly two bytes wide, entries eight. */
            unsigned width = rng_next(&r) % 4 ? 8 : 2;
            change_word(data, image_len, p + rng_next(&r) % (len / width) * width, width, &r);
        }
    }
    return size;
}
