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
    ORDER_MAX = 6,
};
/* A page's address carries log2 of the bits that its numbers have: 0 .. ORDER_MAX. */
#define PAGE_ORDER ((uintptr_t)7)

static unsigned order_of(uintptr_t page) {
    return (unsigned)(page & PAGE_ORDER);
}
static uint64_t *words_of(uintptr_t page) {
    return (uint64_t *)(page & ~PAGE_ORDER);
}
static size_t page_bytes(unsigned order) {
    return (size_t)PAGE_CLUSTERS / 8 << order;
}
/* Largest number that a page can hold. */
static uint64_t order_max(unsigned order) {
    return UINT64_MAX >> (64 - (1u << order));
}
/* The narrowest that holds `value`. */
static unsigned order_for(uint64_t value) {
    unsigned order = 0;
    while (value > order_max(order))
        order++;
    return order;
}
/* A word with 1 in each of its numbers. */
static uint64_t ones_of(unsigned order) {
    return UINT64_MAX / order_max(order);
}
static uint64_t field_get(const uint64_t *words, unsigned order, unsigned i) {
    unsigned per = 64u >> order;
    return words[i / per] >> (i % per << order) & order_max(order);
}
static void field_set(uint64_t *words, unsigned order, unsigned i, uint64_t value) {
    unsigned per = 64u >> order, shift = i % per << order;
    uint64_t mask = order_max(order) << shift;
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

void counts_empty(struct counts *c) {
    for (uint64_t i = 0; c->pages && i <= c->clusters >> PAGE_BITS; i++) {
        free(words_of(c->pages[i]));
        c->pages[i] = 0;
    }
}

void counts_free(struct counts *c) {
    counts_empty(c);
    free(c->pages);
    memset(c, 0, sizeof(*c));
}

/* ---- a room that several share ---- */

void counts_share(struct counts *c, struct counts_room *room) {
    for (unsigned i = 0; i < COUNTS_ROOM_MEMBERS; i++)
        if (!room->member[i]) {
            room->member[i] = c;
            c->room = room;
            return;
        }
    assert(!"too many members");
}

void counts_room_next(struct counts_room *room) {
    for (unsigned i = 0; i < COUNTS_ROOM_MEMBERS; i++)
        if (room->member[i])
            counts_empty(room->member[i]);
    room->bytes = 0;
    room->from = room->end;
    room->end = UINT64_MAX;
}

static void page_drop(struct counts *c, uint64_t index) {
    if (!c || index > c->clusters >> PAGE_BITS || !c->pages[index])
        return;
    c->room->bytes -= page_bytes(order_of(c->pages[index]));
    free(words_of(c->pages[index]));
    c->pages[index] = 0;
}

/*
 * `bytes` more are about to be taken for page `index`: where they do not fit, the window loses its
 * upper part, with some to spare, but never its first page.  False: the page is outside now.
 */
static bool room_for(struct counts *c, uint64_t index, size_t bytes) {
    struct counts_room *room = c->room;
    if (!room)
        return true;
    if (room->bytes + bytes > room->max) {
        uint64_t first = room->from >> PAGE_BITS, last = c->clusters >> PAGE_BITS;
        size_t wanted = room->max - room->max / 16;
        if (room->end != UINT64_MAX)
            last = (room->end >> PAGE_BITS) - 1;
        for (; last > first && room->bytes + bytes > wanted; last--) {
            for (unsigned i = 0; i < COUNTS_ROOM_MEMBERS; i++)
                page_drop(room->member[i], last);
            room->end = last << PAGE_BITS;
        }
    }
    if (index << PAGE_BITS >= room->end)
        return false;
    room->bytes += bytes;
    return true;
}

/* ---- one page ---- */

/* Wider numbers.  False: the page is no longer in the window. */
static int page_widen(struct counts *c, uint64_t index, unsigned order, bool *here) {
    uintptr_t *page = &c->pages[index];
    unsigned old_order = order_of(*page), per = 64u >> old_order;
    *here = room_for(c, index, page_bytes(order) - page_bytes(old_order));
    if (!*here)
        return 0;
    const uint64_t *old = words_of(*page);
    uint64_t *wide = calloc(1, page_bytes(order));
    if (!wide)
        return -ENOMEM;
    for (unsigned i = 0; i < PAGE_CLUSTERS; i++) {
        if (i % per == 0 && !old[i / per]) {
            i += per - 1;
            continue;
        }
        uint64_t value = field_get(old, old_order, i);
        if (value)
            field_set(wide, order, i, value);
    }
    free(words_of(*page));
    *page = (uintptr_t)wide | order;
    return 0;
}

/* Adds to numbers [i, end), those that fit; the first one that does not, or `end`. */
static unsigned page_add_some(uint64_t *words, unsigned order, unsigned i, unsigned end,
                              uint64_t by) {
    unsigned per = 64u >> order;
    uint64_t max = order_max(order), ones = ones_of(order);
    while (i < end) {
        uint64_t *w = &words[i / per], value = field_get(words, order, i);
        if (by > max - value) {
            if (order < ORDER_MAX)
                return i;
            *w = max; /* and stays there */
            i++;
        } else if (i % per == 0 && end - i >= per && *w == value * ones) {
            /* Numbers that are alike change together. */
            *w = (value + by) * ones;
            i += per;
        } else {
            field_set(words, order, i++, value + by);
        }
    }
    return end;
}

static int page_new(struct counts *c, uint64_t index, uint64_t by, bool *here) {
    unsigned order = order_for(by);
    *here = room_for(c, index, page_bytes(order));
    if (!*here)
        return 0;
    uint64_t *words = calloc(1, page_bytes(order));
    if (!words)
        return -ENOMEM;
    c->pages[index] = (uintptr_t)words | order;
    return 0;
}

static int page_add(struct counts *c, uint64_t index, unsigned first, unsigned n, uint64_t by) {
    unsigned i = first, end = first + n;
    bool here = true;
    int r = c->pages[index] ? 0 : page_new(c, index, by, &here);
    while (!r && here) {
        uintptr_t page = c->pages[index];
        uint64_t sum;
        i = page_add_some(words_of(page), order_of(page), i, end, by);
        if (i == end)
            break;
        if (!ck_add(field_get(words_of(page), order_of(page), i), by, &sum))
            sum = UINT64_MAX;
        r = page_widen(c, index, order_for(sum), &here);
    }
    return r;
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
    if (c->room) {
        uint64_t end = min_u64(first + n, c->room->end);
        first = max_u64(first, c->room->from);
        n = end > first ? end - first : 0;
    }
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
    return field_get(words_of(page), order_of(page), cluster % PAGE_CLUSTERS);
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
    return !memcmp(words_of(a), words_of(b), page_bytes(order_of(a)));
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
