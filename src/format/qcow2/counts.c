/* SPDX-License-Identifier: MIT */
/* See counts.h. */
#include "format/qcow2/counts.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/ck.h"

enum {
    PAGE_BITS = 12,
    PAGE_CLUSTERS = 1 << PAGE_BITS,
    PAGE_WORDS = PAGE_CLUSTERS / 64,
    BYTE_BIG = 255, /* the number is in the hash table */
};
#define PAGE_BYTES_FLAG ((uintptr_t)1)

static uint64_t *bits_of(uintptr_t page) {
    return (uint64_t *)page;
}
static uint8_t *bytes_of(uintptr_t page) {
    return (uint8_t *)(page & ~PAGE_BYTES_FLAG);
}

int counts_init(struct counts *c, uint64_t clusters) {
    memset(c, 0, sizeof(*c));
    if (clusters > COUNTS_CLUSTERS_MAX)
        return -EFBIG;
    c->pages = calloc((clusters >> PAGE_BITS) + 1, sizeof(*c->pages));
    if (!c->pages)
        return -ENOMEM;
    c->clusters = clusters;
    return 0;
}

void counts_free(struct counts *c) {
    if (c->pages)
        for (uint64_t i = 0; i <= c->clusters >> PAGE_BITS; i++)
            free(bytes_of(c->pages[i]));
    free(c->pages);
    free(c->big);
    memset(c, 0, sizeof(*c));
}

/* ---- the hash table of large numbers ---- */

static struct counts_big *big_place(struct counts_big *table, size_t cap, uint64_t cluster) {
    size_t i = (cluster * UINT64_C(0x9e3779b97f4a7c15)) >> 32 & (cap - 1);
    while (table[i].value && table[i].cluster != cluster)
        i = (i + 1) & (cap - 1);
    return &table[i];
}

static int big_set(struct counts *c, uint64_t cluster, uint64_t value) {
    if (c->big_count * 2 >= c->big_cap) {
        size_t cap = c->big_cap ? c->big_cap * 2 : 64;
        struct counts_big *grown = calloc(cap, sizeof(*grown));
        if (!grown)
            return -ENOMEM;
        for (size_t i = 0; i < c->big_cap; i++)
            if (c->big[i].value)
                *big_place(grown, cap, c->big[i].cluster) = c->big[i];
        free(c->big);
        c->big = grown;
        c->big_cap = cap;
    }
    struct counts_big *b = big_place(c->big, c->big_cap, cluster);
    c->big_count += !b->value;
    *b = (struct counts_big){cluster, value};
    return 0;
}

/* ---- one page ---- */

static int page_widen(uintptr_t *page) {
    uint8_t *bytes = calloc(1, PAGE_CLUSTERS);
    if (!bytes)
        return -ENOMEM;
    if (*page) {
        const uint64_t *bits = bits_of(*page);
        for (unsigned i = 0; i < PAGE_CLUSTERS; i++)
            bytes[i] = bits[i / 64] >> (i % 64) & 1;
        free(bits_of(*page));
    }
    *page = (uintptr_t)bytes | PAGE_BYTES_FLAG;
    return 0;
}

/* The bits of word `w` that belong to the clusters [first, first + n) of a page. */
static uint64_t word_mask(unsigned w, unsigned first, unsigned n) {
    unsigned low = w * 64, end = first + n;
    uint64_t mask = UINT64_MAX;
    if (first > low)
        mask &= UINT64_MAX << (first - low);
    if (end < low + 64)
        mask &= UINT64_MAX >> (low + 64 - end);
    return mask;
}

/* All of [first, first + n) of a page of bits were 0 and are now 1; false: nothing has changed. */
static bool page_set_bits(uint64_t *bits, unsigned first, unsigned n) {
    unsigned from = first / 64, to = (first + n - 1) / 64;
    for (unsigned w = from; w <= to; w++)
        if (bits[w] & word_mask(w, first, n))
            return false;
    for (unsigned w = from; w <= to; w++)
        bits[w] |= word_mask(w, first, n);
    return true;
}

static int page_add_bytes(struct counts *c, uint64_t base, uint8_t *bytes, unsigned first,
                          unsigned n, uint64_t by) {
    for (unsigned i = first; i < first + n; i++) {
        uint64_t value = bytes[i];
        if (value == BYTE_BIG)
            value = big_place(c->big, c->big_cap, base + i)->value;
        if (!ck_add(value, by, &value))
            value = UINT64_MAX;
        if (value >= BYTE_BIG) {
            int r = big_set(c, base + i, value);
            if (r)
                return r;
            value = BYTE_BIG;
        }
        bytes[i] = (uint8_t)value;
    }
    return 0;
}

static int page_add(struct counts *c, uint64_t index, unsigned first, unsigned n, uint64_t by) {
    uintptr_t *page = &c->pages[index];
    if (!(*page & PAGE_BYTES_FLAG)) {
        if (by == 1) {
            if (!*page && !(*page = (uintptr_t)calloc(PAGE_WORDS, sizeof(uint64_t))))
                return -ENOMEM;
            if (page_set_bits(bits_of(*page), first, n))
                return 0;
        }
        int r = page_widen(page);
        if (r)
            return r;
    }
    return page_add_bytes(c, index << PAGE_BITS, bytes_of(*page), first, n, by);
}

/* ---- ranges ---- */

/* The part of [first, first + n) in one page. */
static unsigned piece(uint64_t first, uint64_t n) {
    return (unsigned)min_u64(n, PAGE_CLUSTERS - first % PAGE_CLUSTERS);
}

int counts_add(struct counts *c, uint64_t first, uint64_t n, uint64_t by) {
    if (!n || !by)
        return 0;
    assert(first <= c->clusters && n <= c->clusters - first);
    while (n) {
        unsigned some = piece(first, n);
        int r = page_add(c, first >> PAGE_BITS, first % PAGE_CLUSTERS, some, by);
        if (r)
            return r;
        first += some;
        n -= some;
    }
    return 0;
}

uint64_t counts_get(const struct counts *c, uint64_t cluster) {
    assert(cluster < c->clusters);
    uintptr_t page = c->pages[cluster >> PAGE_BITS];
    unsigned i = cluster % PAGE_CLUSTERS;
    if (!page)
        return 0;
    if (!(page & PAGE_BYTES_FLAG))
        return bits_of(page)[i / 64] >> (i % 64) & 1;
    uint64_t value = bytes_of(page)[i];
    return value == BYTE_BIG ? big_place(c->big, c->big_cap, cluster)->value : value;
}

bool counts_word(const struct counts *c, uint64_t cluster, uint64_t *bits) {
    uintptr_t page = c->pages[cluster >> PAGE_BITS];
    *bits = !page || page & PAGE_BYTES_FLAG ? 0 : bits_of(page)[cluster % PAGE_CLUSTERS / 64];
    return !(page & PAGE_BYTES_FLAG);
}

static bool page_all(uintptr_t page, unsigned first, unsigned n, unsigned value) {
    if (!page)
        return value == 0;
    if (page & PAGE_BYTES_FLAG) {
        for (unsigned i = first; i < first + n; i++)
            if (bytes_of(page)[i] != value)
                return false;
        return true;
    }
    for (unsigned w = first / 64; w <= (first + n - 1) / 64; w++) {
        uint64_t mask = word_mask(w, first, n);
        if ((bits_of(page)[w] & mask) != (value ? mask : 0))
            return false;
    }
    return true;
}

static bool all(const struct counts *c, uint64_t first, uint64_t n, unsigned value) {
    assert(first <= c->clusters && n <= c->clusters - first);
    while (n) {
        unsigned some = piece(first, n);
        if (!page_all(c->pages[first >> PAGE_BITS], first % PAGE_CLUSTERS, some, value))
            return false;
        first += some;
        n -= some;
    }
    return true;
}

bool counts_all_one(const struct counts *c, uint64_t first, uint64_t n) {
    return all(c, first, n, 1);
}
bool counts_all_zero(const struct counts *c, uint64_t first, uint64_t n) {
    return all(c, first, n, 0);
}

/* The whole pages are equal, as far as can be said without looking at single clusters. */
static bool pages_equal(uintptr_t a, uintptr_t b) {
    if (!a || !b || (a & PAGE_BYTES_FLAG) || (b & PAGE_BYTES_FLAG))
        return !a && !b;
    return !memcmp(bits_of(a), bits_of(b), PAGE_WORDS * sizeof(uint64_t));
}

uint64_t counts_difference(const struct counts *a, const struct counts *b, uint64_t from,
                           uint64_t end) {
    while (from < end) {
        uint64_t index = from >> PAGE_BITS, stop = min_u64(end, (index + 1) << PAGE_BITS);
        if (!pages_equal(a->pages[index], b->pages[index]))
            for (uint64_t k = from; k < stop; k++)
                if (counts_get(a, k) != counts_get(b, k))
                    return k;
        from = stop;
    }
    return end;
}

uint64_t counts_last(const struct counts *c, uint64_t end) {
    while (end) {
        uint64_t index = (end - 1) >> PAGE_BITS, start = index << PAGE_BITS;
        if (c->pages[index])
            for (uint64_t k = end; k > start; k--)
                if (counts_get(c, k - 1))
                    return k - 1;
        end = start;
    }
    return UINT64_MAX;
}
