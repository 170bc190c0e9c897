/* SPDX-License-Identifier: MIT */
/*
 * The bits of a dirty bitmap; see bitmap.h.
 *
 *      chunks[i]  NULL          32768 clear bits
 *                 &full         32768 set bits (behind the last bit of the bitmap: whatever)
 *                 a chunk       a mix, with the number of its set bits
 *
 *  1. A chunk whose bits are all set becomes &full and one whose bits are all clear becomes NULL,
 *     at the end of the change that made it so.
 *  2. Bits behind the last one of the bitmap are clear in a chunk of its own; dirty_bits counts
 *     only those that exist.
 *  3. Where memory is gone or the node's budget is used up, a chunk to be set in part becomes
 *     &full, and one to be cleared in part stays &full: too much is said, never too little.
 */
#include "disk/bitmap_int.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"

#define CHUNK_BITS ((uint64_t)BITMAP_CHUNK_BITS)
#define CHUNK_WORDS (BITMAP_CHUNK_BITS / 64)

struct bitmap_chunk {
    uint32_t set;
    uint64_t words[CHUNK_WORDS];
};

static struct bitmap_chunk full; /* only its address means something */

static uint64_t chunk_count(const struct bitmap *b) {
    return div_up(b->bits, CHUNK_BITS);
}

/* Bits that chunk `i` has: fewer in the last one. */
static uint32_t chunk_bits(const struct bitmap *b, uint64_t i) {
    return (uint32_t)min_u64(CHUNK_BITS, b->bits - i * CHUNK_BITS);
}

static struct bitmap_chunk *chunk_new(struct bitmap *b) {
    if (b->set && b->set->memory + sizeof(struct bitmap_chunk) > BITMAP_MEMORY_MAX)
        return NULL;
    struct bitmap_chunk *c = calloc(1, sizeof(*c));
    if (c && b->set)
        b->set->memory += sizeof(*c);
    return c;
}

static void chunk_free(struct bitmap *b, struct bitmap_chunk *c) {
    if (!c || c == &full)
        return;
    if (b->set)
        b->set->memory -= sizeof(*c);
    free(c);
}

/* Puts `c` (NULL, &full, or a fresh chunk) in the place of what is there. */
static void chunk_replace(struct bitmap *b, uint64_t i, struct bitmap_chunk *c) {
    chunk_free(b, b->chunks[i]);
    b->chunks[i] = c;
}

static uint32_t chunk_set_bits(const struct bitmap *b, uint64_t i) {
    const struct bitmap_chunk *c = b->chunks ? b->chunks[i] : NULL;
    return !c ? 0 : c == &full ? chunk_bits(b, i) : c->set;
}

static void chunk_fill(struct bitmap *b, uint64_t i) {
    b->dirty_bits += chunk_bits(b, i) - chunk_set_bits(b, i);
    chunk_replace(b, i, &full);
}

/* The mask of [from, to) in the word that holds bit `from`. */
static uint64_t word_mask(uint32_t from, uint32_t to) {
    uint32_t low = from % 64, n = to - from;
    uint64_t m = n >= 64 ? UINT64_MAX : ((uint64_t)1 << n) - 1;
    return m << low;
}

static uint32_t word_end(uint32_t at, uint32_t end) {
    return (uint32_t)min_u64(end, (at | 63) + 1);
}

/* Rule 1. */
static void chunk_settle(struct bitmap *b, uint64_t i) {
    struct bitmap_chunk *c = b->chunks[i];
    if (!c || c == &full)
        return;
    if (!c->set)
        chunk_replace(b, i, NULL);
    else if (c->set == chunk_bits(b, i))
        chunk_replace(b, i, &full);
}

/* The chunk as a mix, to be changed in part; NULL when that is not possible (rule 3). */
static struct bitmap_chunk *chunk_mixed(struct bitmap *b, uint64_t i) {
    struct bitmap_chunk *c = b->chunks[i];
    if (c && c != &full)
        return c;
    struct bitmap_chunk *fresh = chunk_new(b);
    if (!fresh)
        return NULL;
    if (c == &full) {
        uint32_t n = chunk_bits(b, i);
        fresh->set = n;
        for (uint32_t at = 0; at < n; at = word_end(at, n))
            fresh->words[at / 64] = word_mask(at, word_end(at, n));
    }
    b->chunks[i] = fresh;
    return fresh;
}

/* Bits [from, to) of chunk `i`. */
static void chunk_set(struct bitmap *b, uint64_t i, uint32_t from, uint32_t to) {
    if (b->chunks[i] == &full)
        return;
    struct bitmap_chunk *c = to - from == chunk_bits(b, i) ? NULL : chunk_mixed(b, i);
    if (!c) {
        chunk_fill(b, i);
        return;
    }
    uint32_t before = c->set;
    for (uint32_t at = from; at < to; at = word_end(at, to)) {
        uint64_t *w = &c->words[at / 64], fresh = word_mask(at, word_end(at, to)) & ~*w;
        *w |= fresh;
        c->set += (uint32_t)__builtin_popcountll(fresh);
    }
    b->dirty_bits += c->set - before;
    chunk_settle(b, i);
}

static void chunk_clear(struct bitmap *b, uint64_t i, uint32_t from, uint32_t to) {
    if (!b->chunks[i])
        return;
    if (to - from == chunk_bits(b, i)) {
        b->dirty_bits -= chunk_set_bits(b, i);
        chunk_replace(b, i, NULL);
        return;
    }
    struct bitmap_chunk *c = chunk_mixed(b, i);
    if (!c)
        return;
    uint32_t before = c->set;
    for (uint32_t at = from; at < to; at = word_end(at, to)) {
        uint64_t *w = &c->words[at / 64], gone = word_mask(at, word_end(at, to)) & *w;
        *w &= ~gone;
        c->set -= (uint32_t)__builtin_popcountll(gone);
    }
    b->dirty_bits -= before - c->set;
    chunk_settle(b, i);
}

static void set_bits(struct bitmap *b, uint64_t first, uint64_t end) {
    while (b->chunks && first < end) {
        uint64_t i = first / CHUNK_BITS;
        uint64_t stop = min_u64(end, (i + 1) * CHUNK_BITS);
        chunk_set(b, i, (uint32_t)(first - i * CHUNK_BITS), (uint32_t)(stop - i * CHUNK_BITS));
        first = stop;
    }
}

void bitmap_set_range(struct bitmap *b, uint64_t offset, uint64_t length) {
    if (!length || offset >= b->size)
        return;
    length = min_u64(length, b->size - offset);
    set_bits(b, offset >> b->granularity_bits, ((offset + length - 1) >> b->granularity_bits) + 1);
}

void bitmap_clear_range(struct bitmap *b, uint64_t offset, uint64_t length) {
    if (!length || offset >= b->size || !b->chunks)
        return;
    uint64_t end = offset + min_u64(length, b->size - offset);
    uint64_t first = div_up(offset, bitmap_granularity(b));
    uint64_t last = end == b->size ? b->bits : end >> b->granularity_bits;
    while (first < last) {
        uint64_t i = first / CHUNK_BITS;
        uint64_t stop = min_u64(last, (i + 1) * CHUNK_BITS);
        chunk_clear(b, i, (uint32_t)(first - i * CHUNK_BITS), (uint32_t)(stop - i * CHUNK_BITS));
        first = stop;
    }
}

/* ---------------------------------------------------------------- reading */

static bool bit_get(const struct bitmap *b, uint64_t bit) {
    const struct bitmap_chunk *c = b->chunks ? b->chunks[bit / CHUNK_BITS] : NULL;
    if (!c || c == &full)
        return c;
    uint32_t at = (uint32_t)(bit % CHUNK_BITS);
    return c->words[at / 64] >> at % 64 & 1;
}

bool bitmap_get(const struct bitmap *b, uint64_t offset) {
    return offset < b->size && bit_get(b, offset >> b->granularity_bits);
}

/* First bit of [from, end) that is `set`, else end. */
static uint64_t find_bit(const struct bitmap *b, uint64_t from, uint64_t end, bool set) {
    while (from < end) {
        uint64_t i = from / CHUNK_BITS;
        const struct bitmap_chunk *c = b->chunks ? b->chunks[i] : NULL;
        uint64_t stop = min_u64(end, (i + 1) * CHUNK_BITS);
        if (!c || c == &full) {
            if ((c == &full) == set)
                return from;
            from = stop;
            continue;
        }
        while (from < stop) {
            uint32_t at = (uint32_t)(from - i * CHUNK_BITS);
            uint64_t w = c->words[at / 64];
            w = (set ? w : ~w) >> at % 64;
            if (w) {
                from += (uint64_t)__builtin_ctzll(w);
                if (from < stop)
                    return from;
                break;
            }
            from += 64 - at % 64;
        }
        from = stop;
    }
    return end;
}

bool bitmap_next_dirty(const struct bitmap *b, uint64_t offset, uint64_t end, uint64_t *start,
                       uint64_t *length) {
    end = min_u64(end, b->size);
    if (offset >= end || !b->dirty_bits)
        return false;
    uint64_t last = ((end - 1) >> b->granularity_bits) + 1;
    uint64_t from = find_bit(b, offset >> b->granularity_bits, last, true);
    if (from >= last)
        return false;
    uint64_t to = find_bit(b, from, last, false);
    *start = max_u64(offset, from << b->granularity_bits);
    *length = min_u64(end, to << b->granularity_bits) - *start;
    return true;
}

uint64_t bitmap_dirty_bytes(const struct bitmap *b) {
    uint64_t bytes = b->dirty_bits << b->granularity_bits;
    if (b->bits && bit_get(b, b->bits - 1))
        bytes -= (b->bits << b->granularity_bits) - b->size;
    return bytes;
}

/* ---------------------------------------------------------------- whole bitmaps */

void bitmap_clear_bits(struct bitmap *b) {
    for (uint64_t i = 0; b->chunks && i < chunk_count(b); i++)
        chunk_replace(b, i, NULL);
    b->dirty_bits = 0;
}

int bitmap_give_room(struct bitmap *b, struct err *e) {
    uint64_t bytes = max_u64(chunk_count(b), 1) * sizeof(*b->chunks);
    if (b->set && bytes > BITMAP_MEMORY_MAX - min_u64(b->set->memory, BITMAP_MEMORY_MAX))
        return err_set(e, EFBIG,
                       "the bitmaps of this image would take more than %" PRIu64 " bytes of memory",
                       BITMAP_MEMORY_MAX);
    b->chunks = calloc(1, bytes);
    if (!b->chunks)
        return err_set(e, ENOMEM, "no memory for a bitmap");
    b->array_bytes = bytes;
    if (b->set)
        b->set->memory += bytes;
    return 0;
}

static void merge_chunk(struct bitmap *dst, const struct bitmap *src, uint64_t i) {
    const struct bitmap_chunk *from = src->chunks[i];
    if (!from || dst->chunks[i] == &full)
        return;
    struct bitmap_chunk *to = from == &full ? NULL : chunk_mixed(dst, i);
    if (!to) {
        chunk_fill(dst, i);
        return;
    }
    uint32_t before = to->set;
    to->set = 0;
    for (uint32_t w = 0; w < CHUNK_WORDS; w++) {
        to->words[w] |= from->words[w];
        to->set += (uint32_t)__builtin_popcountll(to->words[w]);
    }
    dst->dirty_bits += to->set - before;
    chunk_settle(dst, i);
}

void bitmap_merge_bits(struct bitmap *dst, const struct bitmap *src) {
    if (!src->dirty_bits)
        return;
    if (dst->granularity_bits == src->granularity_bits && dst->bits == src->bits && dst->chunks) {
        for (uint64_t i = 0; i < chunk_count(dst); i++)
            merge_chunk(dst, src, i);
        return;
    }
    uint64_t at = 0, start, length;
    while (bitmap_next_dirty(src, at, src->size, &start, &length)) {
        bitmap_set_range(dst, start, length);
        at = start + length;
    }
}

static uint64_t bits_for(uint64_t size, uint32_t granularity_bits) {
    return div_up(size, (uint64_t)1 << granularity_bits);
}

int bitmap_truncate(struct bitmap *b, uint64_t size) {
    uint64_t bits = bits_for(size, b->granularity_bits);
    if (size < b->size) { /* clear what goes, while it has a place */
        uint64_t old = chunk_count(b), keep = div_up(bits, CHUNK_BITS);
        for (uint64_t i = bits; b->chunks && i < b->bits;) {
            uint64_t c = i / CHUNK_BITS, stop = min_u64(b->bits, (c + 1) * CHUNK_BITS);
            chunk_clear(b, c, (uint32_t)(i - c * CHUNK_BITS), (uint32_t)(stop - c * CHUNK_BITS));
            /* Rule 3 may have kept it full: what stays of it is set then. */
            if (b->chunks[c] == &full)
                b->dirty_bits -= stop - i;
            i = stop;
        }
        for (uint64_t i = keep; b->chunks && i < old; i++)
            chunk_replace(b, i, NULL);
        b->bits = bits; /* the array keeps its length */
        b->size = size;
        if (b->chunks && bits % CHUNK_BITS)
            chunk_settle(b, bits / CHUNK_BITS);
        return 0;
    }
    uint64_t old = chunk_count(b), now = div_up(bits, CHUNK_BITS);
    if (b->chunks && now > old && now * sizeof(*b->chunks) > b->array_bytes) {
        uint64_t bytes = now * sizeof(*b->chunks);
        struct bitmap_chunk **grown = realloc(b->chunks, bytes);
        if (!grown)
            return -ENOMEM;
        memset(grown + old, 0, (now - old) * sizeof(*grown));
        b->chunks = grown;
        if (b->set)
            b->set->memory += bytes - b->array_bytes;
        b->array_bytes = bytes;
    }
    uint64_t last = old ? old - 1 : 0;
    bool was_full = b->chunks && old && b->chunks[last] == &full;
    uint64_t had = b->bits;
    b->bits = bits;
    b->size = size;
    if (was_full && chunk_bits(b, last) > had - last * CHUNK_BITS) {
        /* "All" was fewer bits before. */
        uint32_t n = (uint32_t)(had - last * CHUNK_BITS);
        b->chunks[last] = NULL;
        b->dirty_bits -= n;
        chunk_set(b, last, 0, n);
    }
    return 0;
}

int bitmap_check_size(uint64_t size, uint32_t granularity_bits, struct err *e) {
    uint64_t bytes = div_up(bits_for(size, granularity_bits), 8);
    if (bytes <= BITMAP_BYTES_MAX)
        return 0;
    uint32_t fits = granularity_bits;
    while (div_up(bits_for(size, fits), 8) > BITMAP_BYTES_MAX)
        fits++;
    err_set(e, EFBIG,
            "a bitmap of %" PRIu64 " bytes for each bit of a disk of %" PRIu64
            " bytes would take %" PRIu64 " bytes, more than %" PRIu64,
            (uint64_t)1 << granularity_bits, size, bytes, BITMAP_BYTES_MAX);
    err_hint(e, "a granularity of %" PRIu64 " or more fits", (uint64_t)1 << fits);
    return -EFBIG;
}

int bitmap_make(uint64_t size, uint32_t granularity_bits, struct bitmap **out, struct err *e) {
    int r = bitmap_check_size(size, granularity_bits, e);
    if (r < 0)
        return r;
    struct bitmap *b = calloc(1, sizeof(*b));
    if (!b)
        return err_set(e, ENOMEM, "no memory for a bitmap");
    list_init(&b->link);
    b->granularity_bits = granularity_bits;
    b->size = size;
    b->bits = bits_for(size, granularity_bits);
    *out = b;
    return 0;
}

int bitmap_new(uint64_t size, uint64_t granularity, struct bitmap **out, struct err *e) {
    if (!is_pow2(granularity) || granularity < BITMAP_GRANULARITY_MIN ||
        granularity > BITMAP_GRANULARITY_MAX)
        return err_set(e, EINVAL,
                       "granularity %" PRIu64 " is not a power of two from %u to %" PRIu64,
                       granularity, BITMAP_GRANULARITY_MIN, BITMAP_GRANULARITY_MAX);
    int r = bitmap_make(size, (uint32_t)__builtin_ctzll(granularity), out, e);
    if (r < 0)
        return r;
    (*out)->loaded = true;
    r = bitmap_give_room(*out, e);
    if (r < 0)
        bitmap_free(steal(out));
    return r;
}

void bitmap_free(struct bitmap *b) {
    if (!b)
        return;
    bitmap_clear_bits(b);
    if (b->set)
        b->set->memory -= b->array_bytes;
    list_remove(&b->link);
    free(b->chunks);
    free(b->name);
    free(b);
}

/* ---------------------------------------------------------------- serialised */

enum bitmap_region bitmap_region(const struct bitmap *b, uint64_t first, uint64_t count) {
    uint64_t end = min_u64(b->bits, first + count);
    if (first >= end || find_bit(b, first, end, true) == end)
        return BITMAP_ALL_CLEAR;
    return find_bit(b, first, end, false) == end ? BITMAP_ALL_SET : BITMAP_MIXED;
}

void bitmap_export(const struct bitmap *b, uint64_t first, uint8_t *buf, size_t bytes) {
    memset(buf, 0, bytes);
    uint64_t end = min_u64(b->bits, first + (uint64_t)bytes * 8), at = first;
    while ((at = find_bit(b, at, end, true)) < end) {
        uint64_t to = find_bit(b, at, end, false);
        for (; at < to && (at - first) % 8; at++)
            buf[(at - first) / 8] |= (uint8_t)(1u << (at - first) % 8);
        if (to - at >= 8) {
            memset(buf + (at - first) / 8, 0xff, (to - at) / 8);
            at += (to - at) / 8 * 8;
        }
        for (; at < to; at++)
            buf[(at - first) / 8] |= (uint8_t)(1u << (at - first) % 8);
    }
}

void bitmap_import(struct bitmap *b, uint64_t first, const uint8_t *buf, size_t bytes) {
    uint64_t run = 0, run_at = first; /* set bits that follow one another go in together */
    for (size_t i = 0; i < bytes; i++) {
        if (buf[i] == 0xff) {
            run += 8;
            continue;
        }
        for (unsigned k = 0; k < 8; k++) {
            if (buf[i] >> k & 1) {
                run++;
                continue;
            }
            if (run)
                bitmap_import_ones(b, run_at, run);
            run = 0;
            run_at = first + (uint64_t)i * 8 + k + 1;
            if (!(buf[i] >> k)) {
                run_at = first + (uint64_t)(i + 1) * 8;
                break;
            }
        }
    }
    if (run)
        bitmap_import_ones(b, run_at, run);
}

void bitmap_import_ones(struct bitmap *b, uint64_t first, uint64_t count) {
    if (first < b->bits)
        set_bits(b, first, first + min_u64(count, b->bits - first));
}
