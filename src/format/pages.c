/* SPDX-License-Identifier: MIT */
/* Pages of tables: a hash by host offset, a clock for eviction, copies for the write-back. */
#include "format/pages.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"

#define WRITE_BYTES (512 * KIB) /* of pages that lie together, in one request */

int pages_init(struct pages *p, struct node *storage, size_t bytes) {
    uint32_t budget = (uint32_t)max_u64(bytes / PAGE_BYTES, 16), heads = 16;
    while (heads < budget)
        heads *= 2;
    *p = (struct pages){.storage = storage, .budget = budget, .hash_mask = heads - 1};
    p->hash = calloc(heads, sizeof(struct page *));
    return p->hash ? 0 : -ENOMEM;
}

void pages_free(struct pages *p) {
    for (uint32_t i = 0; i < p->count; i++)
        free(p->all[i]);
    free(p->all);
    free(p->hash);
    *p = (struct pages){0};
}

static struct page **head_of(struct pages *p, uint64_t host) {
    uint64_t h = host * UINT64_C(0x9e3779b97f4a7c15);
    return &p->hash[(h >> 32) & p->hash_mask];
}

static struct page *find(struct pages *p, uint64_t host) {
    struct page *page = *head_of(p, host);
    while (page && page->host != host)
        page = page->next;
    return page;
}

static void remove_page(struct pages *p, struct page *page) {
    struct page **at = head_of(p, page->host);
    while (*at != page)
        at = &(*at)->next;
    *at = page->next;
    p->all[page->index] = p->all[--p->count];
    p->all[page->index]->index = page->index;
}

/* A page that can go, taken out of the cache; NULL: none. */
static struct page *evict(struct pages *p) {
    for (uint32_t step = 0; p->count && step < 2 * p->count; step++) {
        if (++p->hand >= p->count)
            p->hand = 0;
        struct page *page = p->all[p->hand];
        if (page->dirty || page->writing || page->loading || page->waiters)
            continue;
        if (page->recent) {
            page->recent = false;
            continue;
        }
        remove_page(p, page);
        return page;
    }
    return NULL;
}

static struct page *add(struct pages *p, uint64_t host, uint32_t length, unsigned level) {
    struct page *page = p->count >= p->budget ? evict(p) : NULL;
    if (!page)
        page = malloc(sizeof(*page));
    if (page && p->count == p->cap) {
        uint32_t cap = p->cap ? p->cap * 2 : 16;
        struct page **all = realloc(p->all, cap * sizeof(*all));
        if (!all) {
            free(page);
            return NULL;
        }
        p->all = all;
        p->cap = cap;
    }
    if (!page)
        return NULL;
    page->host = host;
    page->length = length;
    page->level = (uint8_t)level;
    page->loading = page->dirty = page->writing = false;
    page->recent = true;
    page->error = 0;
    page->waiters = 0;
    waitq_init(&page->ready);
    page->next = *head_of(p, host);
    *head_of(p, host) = page;
    page->index = p->count;
    p->all[p->count++] = page;
    return page;
}

int pages_forget_all(struct pages *p) {
    for (uint32_t i = 0; i < p->count; i++)
        if (p->all[i]->dirty || p->all[i]->writing || p->all[i]->loading || p->all[i]->waiters)
            return -EBUSY;
    while (p->count) {
        struct page *page = p->all[p->count - 1];
        remove_page(p, page);
        free(page);
    }
    return 0;
}

int pages_get_co(struct pages *p, uint64_t host, uint32_t length, unsigned level,
                 struct page **out) {
    struct page *page;
    while ((page = find(p, host)) && page->loading) {
        page->waiters++;
        waitq_wait_co(&page->ready);
        int error = page->error;
        if (!--page->waiters && error)
            free(page); /* its loader has taken it out already */
        if (error)
            return error;
    }
    if (page) {
        page->recent = true;
        *out = page;
        return 0;
    }
    page = add(p, host, length, level);
    if (!page)
        return -ENOMEM;
    page->loading = true;
    int r = p->load_co ? p->load_co(p->load_arg, host, page->data, length)
                       : disk_pread_co(p->storage, host, page->data, length);
    page->loading = false;
    if (r < 0) {
        page->error = r;
        remove_page(p, page);
        waitq_wake_all(&page->ready);
        if (!page->waiters)
            free(page);
        return r;
    }
    waitq_wake_all(&page->ready);
    *out = page;
    return 0;
}

int pages_get_new(struct pages *p, uint64_t host, uint32_t length, unsigned level,
                  struct page **out) {
    struct page *page = find(p, host);
    if (!page)
        page = add(p, host, length, level);
    if (!page)
        return -ENOMEM;
    memset(page->data, 0, length);
    *out = page;
    return 0;
}

void pages_modify(struct pages *p, struct page *page) {
    page->recent = true;
    if (page->dirty)
        return;
    page->dirty = true;
    p->dirty_count++;
}

static int by_host(const void *a, const void *b) {
    uint64_t x = (*(struct page *const *)a)->host, y = (*(struct page *const *)b)->host;
    return x < y ? -1 : x > y;
}

int pages_take(struct pages *p, unsigned level, struct pages_batch *b) {
    size_t count = 0, bytes = 0;
    *b = (struct pages_batch){0};
    for (uint32_t i = 0; i < p->count; i++)
        if (p->all[i]->dirty && p->all[i]->level == level) {
            count++;
            bytes += p->all[i]->length;
        }
    if (!count)
        return 0;
    b->page = malloc(count * sizeof(struct page *));
    b->bytes = malloc(bytes);
    if (!b->page || !b->bytes) {
        free(b->page);
        free(b->bytes);
        *b = (struct pages_batch){0};
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < p->count; i++)
        if (p->all[i]->dirty && p->all[i]->level == level)
            b->page[b->count++] = p->all[i];
    qsort(b->page, b->count, sizeof(struct page *), by_host);
    uint8_t *to = b->bytes;
    for (size_t i = 0; i < b->count; i++) {
        struct page *page = b->page[i];
        memcpy(to, page->data, page->length);
        to += page->length;
        page->dirty = false;
        page->writing = true;
    }
    p->dirty_count -= (uint32_t)b->count;
    return 0;
}

static void batch_end(struct pages *p, struct pages_batch *b, bool written) {
    for (size_t i = 0; i < b->count; i++) {
        b->page[i]->writing = false;
        if (!written)
            pages_modify(p, b->page[i]);
    }
    free(b->page);
    free(b->bytes);
    *b = (struct pages_batch){0};
}

int pages_write_co(struct pages *p, struct pages_batch *b) {
    const uint8_t *from = b->bytes;
    int r = 0;
    for (size_t i = 0; !r && i < b->count;) {
        uint64_t host = b->page[i]->host, length = 0;
        while (i < b->count && b->page[i]->host == host + length && length < WRITE_BYTES)
            length += b->page[i++]->length;
        r = disk_pwrite_co(p->storage, host, from, length);
        from += length;
    }
    batch_end(p, b, !r);
    return r;
}

void pages_give_back(struct pages *p, struct pages_batch *b) {
    batch_end(p, b, false);
}
