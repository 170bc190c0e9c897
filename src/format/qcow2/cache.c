/* SPDX-License-Identifier: MIT */
/*
 * See cache.h for the rules.  Representation: a chained hash by host offset over slices that also
 * stand in one array, which the eviction clock walks; their 4 KiB of data come from slabs, so that
 * direct I/O finds them aligned and closing frees them with few calls.
 */
#include "format/qcow2/cache.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/iov.h"
#include "base/plant.h"
#include "disk/event.h"
#include "disk/io.h"

#define SLICES_MIN 64       /* below this many, concurrent requests would push each other out */
#define SLAB_SLICES 64      /* data of this many slices is allocated at a time */
#define AHEAD_SLICES_MAX 64 /* one read: fits a scatter list */

struct qcow2_slab {
    struct qcow2_slab *next;
    uint8_t *memory;
};

/* ---------------------------------------------------------------- memory of the data */

static void data_put(struct qcow2_cache *c, uint8_t *data) {
    memcpy(data, &c->free_data, sizeof(c->free_data));
    c->free_data = data;
}

static bool slab_add(struct qcow2_cache *c, unsigned slices) {
    uint8_t *memory = aligned_alloc(4096, align_up((uint64_t)slices * c->slice_bytes, 4096));
    if (!memory)
        return false;
    struct qcow2_slab *slab = xcalloc(1, sizeof(*slab));
    slab->memory = memory;
    slab->next = c->slabs;
    c->slabs = slab;
    for (unsigned i = slices; i-- > 0;)
        data_put(c, memory + (size_t)i * c->slice_bytes);
    return true;
}

static uint8_t *data_get(struct qcow2_cache *c) {
    if (!c->free_data && !slab_add(c, SLAB_SLICES))
        return NULL;
    uint8_t *data = c->free_data;
    memcpy(&c->free_data, data, sizeof(c->free_data));
    return data;
}

/* ---------------------------------------------------------------- the set of slices */

int qcow2_cache_init(struct qcow2_cache *c, struct node *file, uint32_t slice_bytes,
                     uint64_t slices_wanted) {
    memset(c, 0, sizeof(*c));
    c->file = file;
    c->slice_bytes = slice_bytes;
    c->slices_max =
        (uint32_t)max_u64(SLICES_MIN, min_u64(slices_wanted, QCOW2_CACHE_BYTES_MAX / slice_bytes));
    list_init(&c->dirty);
    uint32_t heads = 64;
    while (heads < c->slices_max)
        heads *= 2;
    c->hash_mask = heads - 1;
    c->hash = calloc(heads, sizeof(*c->hash));
    return c->hash ? 0 : -ENOMEM;
}

static uint32_t hash_of(const struct qcow2_cache *c, uint64_t host) {
    return (uint32_t)((host >> 9) * UINT64_C(0x9e3779b97f4a7c15) >> 32) & c->hash_mask;
}

static struct qcow2_slice *lookup(const struct qcow2_cache *c, uint64_t host) {
    if (!c->hash)
        return NULL;
    struct qcow2_slice *s = c->hash[hash_of(c, host)];
    while (s && s->host != host)
        s = s->next;
    return s;
}

static void hash_add(struct qcow2_cache *c, struct qcow2_slice *s) {
    struct qcow2_slice **head = &c->hash[hash_of(c, s->host)];
    s->next = *head;
    *head = s;
}

static void hash_remove(struct qcow2_cache *c, struct qcow2_slice *s) {
    struct qcow2_slice **p = &c->hash[hash_of(c, s->host)];
    while (*p != s)
        p = &(*p)->next;
    *p = s->next;
}

static struct qcow2_slice *slice_new(struct qcow2_cache *c) {
    if (c->count == c->all_cap) {
        uint32_t cap = c->all_cap ? c->all_cap * 2 : SLICES_MIN;
        struct qcow2_slice **all = realloc(c->all, cap * sizeof(*all));
        if (!all)
            return NULL;
        c->all = all;
        c->all_cap = cap;
    }
    struct qcow2_slice *s = calloc(1, sizeof(*s));
    if (!s)
        return NULL;
    s->data = data_get(c);
    if (!s->data) {
        free(s);
        return NULL;
    }
    list_init(&s->link);
    list_init(&s->frozen_link);
    waitq_init(&s->ready);
    s->index = c->count;
    c->all[c->count++] = s;
    return s;
}

/* `s` is no longer in the hash. */
static void slice_free(struct qcow2_cache *c, struct qcow2_slice *s) {
    assert(!s->pins && !s->frozen_data && list_empty(&s->ready.waiters));
    if (s->dirty)
        c->dirty_count--;
    list_remove(&s->link);
    c->all[s->index] = c->all[--c->count];
    c->all[s->index]->index = s->index;
    data_put(c, s->data);
    free(s);
}

/* Takes `s` out of sight; it goes now or with its last pin. */
static void slice_kill(struct qcow2_cache *c, struct qcow2_slice *s) {
    hash_remove(c, s);
    s->dead = true;
    if (!s->pins)
        slice_free(c, s);
}

void qcow2_slice_unpin(struct qcow2_cache *c, struct qcow2_slice *s) {
    assert(s->pins);
    if (--s->pins == 0 && s->dead)
        slice_free(c, s);
}

void qcow2_cache_free(struct qcow2_cache *c) {
    for (uint32_t i = 0; i < c->count; i++) {
        assert(!c->all[i]->pins);
        free(c->all[i]);
    }
    while (c->slabs) {
        struct qcow2_slab *slab = c->slabs;
        c->slabs = slab->next;
        free(slab->memory);
        free(slab);
    }
    free(c->all);
    free(c->hash);
    memset(c, 0, sizeof(*c));
}

/* A clean, unpinned slice that was not used lately; NULL: none. */
static struct qcow2_slice *victim(struct qcow2_cache *c) {
    if (c->dirty_count + c->frozen_count > c->count - c->count / 8)
        return NULL;
    for (uint32_t steps = 2 * c->count; steps; steps--) {
        if (c->hand >= c->count)
            c->hand = 0;
        struct qcow2_slice *s = c->all[c->hand++];
        if (s->pins || s->dirty || s->frozen_data || s->loading || s->dead)
            continue;
        if (!s->recent)
            return s;
        s->recent = false;
    }
    return NULL;
}

/* A slice for `host`, in the hash, its data undefined.  NULL: no memory. */
static struct qcow2_slice *slice_for(struct qcow2_cache *c, enum qcow2_slice_kind kind,
                                     uint64_t host, uint32_t table) {
    struct qcow2_slice *s = NULL;
    while (c->count >= c->slices_max && (s = victim(c))) {
        hash_remove(c, s);
        if (c->count == c->slices_max)
            break;
        slice_free(c, s); /* grown beyond the budget: shrink again */
        s = NULL;
    }
    if (!s)
        s = slice_new(c);
    if (!s)
        return NULL;
    s->host = host;
    s->kind = kind;
    s->table = table;
    s->error = 0;
    s->recent = true;
    hash_add(c, s);
    return s;
}

/* ---------------------------------------------------------------- loading */

struct qcow2_slice *qcow2_cache_peek(struct qcow2_cache *c, uint64_t host) {
    struct qcow2_slice *s = lookup(c, host);
    if (!s || s->loading)
        return NULL;
    s->recent = true;
    return s;
}

/* How many slices the load of `host` should read. */
static uint32_t load_width(const struct qcow2_cache *c, enum qcow2_slice_kind kind, uint64_t host,
                           uint32_t table, uint32_t ahead) {
    const struct qcow2_walk *w = &c->walk[kind];
    bool walking = host == w->next_host || (w->at_end && table == w->table + 1);
    uint32_t n = walking ? ahead / c->slice_bytes + 1 : 1;
    n = (uint32_t)min_u64(n, min_u64(AHEAD_SLICES_MAX, c->slices_max / 4));
    for (uint32_t i = 1; i < n; i++)
        if (lookup(c, host + (uint64_t)i * c->slice_bytes))
            return i;
    return n;
}

static int load_co(struct qcow2_cache *c, enum qcow2_slice_kind kind, uint64_t host, uint32_t table,
                   uint32_t n, uint32_t ahead) {
    struct qcow2_slice *slices[AHEAD_SLICES_MAX];
    struct iovec iov[AHEAD_SLICES_MAX] = {0};
    for (uint32_t i = 0; i < n; i++) {
        slices[i] = slice_for(c, kind, host + (uint64_t)i * c->slice_bytes, table);
        if (!slices[i]) {
            if (i == 0)
                return -ENOMEM;
            n = i;
            break;
        }
        slices[i]->loading = true;
        qcow2_slice_pin(slices[i]);
        iov[i] = (struct iovec){slices[i]->data, c->slice_bytes};
    }
    c->walk[kind] = (struct qcow2_walk){.next_host = host + (uint64_t)n * c->slice_bytes,
                                        .table = table,
                                        .at_end = (n - 1) * c->slice_bytes == ahead};
    disk_event_co(c->file, kind == QCOW2_SLICE_L2 ? EVENT_l2_load : EVENT_refblock_load);
    int r = disk_preadv_co(c->file, host, (uint64_t)n * c->slice_bytes, iov, (int)n, 0);
    for (uint32_t i = 0; i < n; i++) {
        slices[i]->loading = false;
        if (r < 0) {
            /* Only the first one's failure is known to be its own. */
            slices[i]->error = n > 1 ? -EAGAIN : r;
            if (!slices[i]->dead)
                slice_kill(c, slices[i]);
        }
        waitq_wake_all(&slices[i]->ready);
        qcow2_slice_unpin(c, slices[i]);
    }
    return r < 0 && n > 1 ? -EAGAIN : r;
}

int qcow2_cache_get_co(struct qcow2_cache *c, enum qcow2_slice_kind kind, uint64_t host,
                       uint32_t table, uint32_t ahead, struct qcow2_slice **out) {
    bool alone = false;
    for (;;) {
        struct qcow2_slice *s = lookup(c, host);
        int r;
        if (!s) {
            r = load_co(c, kind, host, table, alone ? 1 : load_width(c, kind, host, table, ahead),
                        ahead);
            alone = r == -EAGAIN;
        } else if (s->loading) {
            qcow2_slice_pin(s);
            waitq_wait_co(&s->ready);
            r = s->error;
            qcow2_slice_unpin(c, s);
        } else {
            s->recent = true;
            *out = s;
            return 0;
        }
        if (r < 0 && r != -EAGAIN)
            return r;
    }
}

int qcow2_cache_get_zero(struct qcow2_cache *c, enum qcow2_slice_kind kind, uint64_t host,
                         uint32_t table, struct qcow2_slice **out) {
    struct qcow2_slice *s = lookup(c, host);
    if (s) /* of a table that once was here */
        slice_kill(c, s);
    s = slice_for(c, kind, host, table);
    if (!s)
        return -ENOMEM;
    memset(s->data, 0, c->slice_bytes);
    *out = s;
    return 0;
}

/* ---------------------------------------------------------------- changing and writing */

static void mark_dirty(struct qcow2_cache *c, struct qcow2_slice *s) {
    if (s->dirty || s->dead)
        return;
    s->dirty = true;
    c->dirty_count++;
    list_push_back(&c->dirty, &s->link);
}

uint8_t *qcow2_slice_modify(struct qcow2_cache *c, struct qcow2_slice *s) {
    assert(!s->loading);
    if (s->frozen_data == s->data && !PLANTED(FROZEN_SLICE_CHANGES)) {
        uint8_t *fresh = data_get(c);
        if (!fresh) {
            /* The one place that cannot fail; a slice is small and this is rare. */
            struct qcow2_slab *slab = xcalloc(1, sizeof(*slab));
            fresh = slab->memory = xcalloc(1, c->slice_bytes);
            slab->next = c->slabs;
            c->slabs = slab;
        }
        memcpy(fresh, s->data, c->slice_bytes);
        s->data = fresh;
    }
    mark_dirty(c, s);
    return s->data;
}

void qcow2_cache_freeze(struct qcow2_cache *c, bool refblocks_only, struct list *frozen) {
    list_for_each_safe(it, next, &c->dirty) {
        struct qcow2_slice *s = list_entry(it, struct qcow2_slice, link);
        if (refblocks_only && s->kind != QCOW2_SLICE_REFBLOCK)
            continue;
        assert(!s->frozen_data);
        list_remove(&s->link);
        s->dirty = false;
        c->dirty_count--;
        s->frozen_data = s->data;
        c->frozen_count++;
        qcow2_slice_pin(s);
        list_push_back(frozen, &s->frozen_link);
    }
}

void qcow2_cache_thaw(struct qcow2_cache *c, struct qcow2_slice *s, bool ok) {
    list_remove(&s->frozen_link);
    if (s->frozen_data != s->data)
        data_put(c, s->frozen_data);
    s->frozen_data = NULL;
    c->frozen_count--;
    if (!ok)
        mark_dirty(c, s);
    qcow2_slice_unpin(c, s);
}

void qcow2_cache_forget(struct qcow2_cache *c, uint64_t host, uint64_t length) {
    for (uint64_t at = host; at < host + length; at += c->slice_bytes) {
        struct qcow2_slice *s = lookup(c, at);
        if (!s)
            continue;
        if (s->dirty) {
            s->dirty = false;
            c->dirty_count--;
            list_remove(&s->link);
        }
        slice_kill(c, s);
    }
}

void qcow2_cache_forget_all(struct qcow2_cache *c) {
    while (c->count) {
        assert(!c->all[0]->pins && !c->all[0]->dirty);
        slice_kill(c, c->all[0]);
    }
    memset(c->walk, 0, sizeof(c->walk));
}
