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
    BYTE_BIG = 255, /* the number is in the hash table */
    ORDER_BYTE = 3,
};
/* A page's address carries log2 of the bits that its numbers have: 0 .. ORDER_BYTE. */
#define PAGE_ORDER ((uintptr_t)3)

static unsigned order_of(uintptr_t page) {
    return (unsigned)(page & PAGE_ORDER);
}
static uint64_t *words_of(uintptr_t page) {
    return (uint64_t *)(page & ~PAGE_ORDER);
}
static size_t page_bytes(unsigned order) {
    return (size_t)PAGE_CLUSTERS / 8 << order;
}
/* Largest number that a page can hold by itself. */
static uint64_t order_max(unsigned order) {
    return order == ORDER_BYTE ? BYTE_BIG - 1 : (1u << (1u << order)) - 1;
}
/* A word with 1 in each of its numbers. */
static uint64_t ones_of(unsigned order) {
    return UINT64_MAX / ((1u << (1u << order)) - 1);
}
static uint64_t field_get(const uint64_t *words, unsigned order, unsigned i) {
    unsigned per = 64u >> order;
    return words[i / per] >> (i % per << order) & ((1u << (1u << order)) - 1);
}
static void field_set(uint64_t *words, unsigned order, unsigned i, uint64_t value) {
    unsigned per = 64u >> order, shift = i % per << order;
    uint64_t mask = (uint64_t)((1u << (1u << order)) - 1) << shift;
    words[i / per] = (words[i / per] & ~mask) | value << shift;
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
            free(words_of(c->pages[i]));
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

/* Twice as many bits for each number. */
static int page_widen(uintptr_t *page) {
    unsigned order = order_of(*page);
    const uint64_t *old = words_of(*page);
    uint64_t *wide = calloc(1, page_bytes(order + 1));
    if (!wide)
        return -ENOMEM;
    for (unsigned i = 0; i < PAGE_CLUSTERS; i++) {
        uint64_t value = field_get(old, order, i);
        if (value)
            field_set(wide, order + 1, i, value);
    }
    free(words_of(*page));
    *page = (uintptr_t)wide | (order + 1);
    return 0;
}

/* Adds to numbers [i, end), those that fit; the first one that does not, or `end`. */
static unsigned page_add_some(uint64_t *words, unsigned order, unsigned i, unsigned end,
                              uint64_t by) {
    unsigned per = 64u >> order;
    uint64_t max = order_max(order), ones = ones_of(order);
    while (i < end) {
        uint64_t *w = &words[i / per], value = field_get(words, order, i);
        if (by > max - min_u64(value, max))
            return i;
        /* Numbers that are alike change together. */
        if (i % per == 0 && end - i >= per && *w == value * ones) {
            *w = (value + by) * ones;
            i += per;
        } else {
            field_set(words, order, i++, value + by);
        }
    }
    return end;
}

/* A number too large for a byte. */
static int big_add(struct counts *c, uint64_t cluster, uint64_t *words, unsigned i, uint64_t by) {
    uint64_t value = field_get(words, ORDER_BYTE, i);
    if (value == BYTE_BIG)
        value = big_place(c->big, c->big_cap, cluster)->value;
    if (!ck_add(value, by, &value))
        value = UINT64_MAX;
    int r = big_set(c, cluster, value);
    if (!r)
        field_set(words, ORDER_BYTE, i, BYTE_BIG);
    return r;
}

static int page_add(struct counts *c, uint64_t index, unsigned first, unsigned n, uint64_t by) {
    uintptr_t *page = &c->pages[index];
    unsigned i = first, end = first + n;
    if (!*page && !(*page = (uintptr_t)calloc(1, page_bytes(0))))
        return -ENOMEM;
    for (;;) {
        unsigned order = order_of(*page);
        i = page_add_some(words_of(*page), order, i, end, by);
        if (i == end)
            return 0;
        int r = order < ORDER_BYTE ? page_widen(page)
                                   : big_add(c, (index << PAGE_BITS) + i, words_of(*page), i, by);
        if (r)
            return r;
        i += order == ORDER_BYTE;
    }
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
    if (!page)
        return 0;
    uint64_t value = field_get(words_of(page), order_of(page), cluster % PAGE_CLUSTERS);
    return value == BYTE_BIG ? big_place(c->big, c->big_cap, cluster)->value : value;
}

bool counts_word(const struct counts *c, uint64_t cluster, uint64_t *bits) {
    uintptr_t page = c->pages[cluster >> PAGE_BITS];
    bool narrow = order_of(page) == 0;
    *bits = page && narrow ? words_of(page)[cluster % PAGE_CLUSTERS / 64] : 0;
    return narrow;
}

/* Whether each of the numbers is `value` (want) or none of them is (!want). */
static bool page_all(uintptr_t page, unsigned first, unsigned n, unsigned value, bool want) {
    if (!page)
        return (value == 0) == want;
    unsigned order = order_of(page), per = 64u >> order, end = first + n;
    const uint64_t *words = words_of(page);
    uint64_t ones = ones_of(order);
    for (unsigned i = first; i < end;) {
        uint64_t found = field_get(words, order, i);
        if ((found == value) != want)
            return false;
        i += i % per == 0 && end - i >= per && words[i / per] == found * ones ? per : 1;
    }
    return true;
}

static bool all(const struct counts *c, uint64_t first, uint64_t n, unsigned value, bool want) {
    assert(first <= c->clusters && n <= c->clusters - first);
    while (n) {
        unsigned some = piece(first, n);
        if (!page_all(c->pages[first >> PAGE_BITS], first % PAGE_CLUSTERS, some, value, want))
            return false;
        first += some;
        n -= some;
    }
    return true;
}

bool counts_all_one(const struct counts *c, uint64_t first, uint64_t n) {
    return all(c, first, n, 1, true);
}
bool counts_none_one(const struct counts *c, uint64_t first, uint64_t n) {
    return all(c, first, n, 1, false);
}
bool counts_all_zero(const struct counts *c, uint64_t first, uint64_t n) {
    return all(c, first, n, 0, true);
}

/* The whole pages are equal, as far as can be said without looking at single clusters. */
static bool pages_equal(uintptr_t a, uintptr_t b) {
    if (!a || !b || order_of(a) != order_of(b))
        return !a && !b;
    return order_of(a) < ORDER_BYTE && !memcmp(words_of(a), words_of(b), page_bytes(order_of(a)));
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
