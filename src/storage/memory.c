/* SPDX-License-Identifier: MIT */
/*
 * The driver "memory": a disk in this process's memory, gone at close.  For tests and scratch.
 *
 *      regions[offset / 64 MiB] -> page[offset / 64 KiB % 1024] -> 64 KiB of bytes
 *
 * Both levels grow on the first write; an absent page reads as zeros and is a hole.  Writing zeros
 * with zero_co or discarding frees whole pages.  The table of regions reaches only as far as the
 * highest write, so a huge sparse disk costs 8 bytes for each 64 MiB up to there.
 *
 * Context: tasks of the node's loop; nothing here suspends.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "base/iov.h"
#include "base/size.h"
#include "disk/node.h"
#include "disk/open.h"

#define PAGE_BYTES (64 * KIB)
#define REGION_PAGES 1024
#define REGION_BYTES (PAGE_BYTES * REGION_PAGES)
/* 64 MiB of table; beyond that a write is refused rather than the table grown. */
#define REGIONS_MAX (8 * MIB)

struct region {
    uint8_t *page[REGION_PAGES];
};

struct memory_opts {
    uint64_t size;
};

struct memory_state {
    struct region **regions;
    uint64_t regions_n;
    uint64_t pages_n; /* allocated now */
    uint64_t size_limit;
};

static uint8_t **page_slot(const struct memory_state *s, uint64_t offset) {
    uint64_t r = offset / REGION_BYTES;
    if (r >= s->regions_n || !s->regions[r])
        return NULL;
    return &s->regions[r]->page[offset / PAGE_BYTES % REGION_PAGES];
}

/* The page of `offset`, made when absent.  NULL: no memory. */
static uint8_t *page_make(struct memory_state *s, uint64_t offset) {
    uint64_t r = offset / REGION_BYTES;
    if (r >= s->regions_n) {
        uint64_t want = max_u64(r + 1, min_u64(s->regions_n * 2, REGIONS_MAX));
        if (r >= REGIONS_MAX)
            return NULL;
        struct region **grown = realloc(s->regions, want * sizeof(*grown));
        if (!grown)
            return NULL;
        memset(grown + s->regions_n, 0, (want - s->regions_n) * sizeof(*grown));
        s->regions = grown;
        s->regions_n = want;
    }
    if (!s->regions[r] && !(s->regions[r] = calloc(1, sizeof(struct region))))
        return NULL;
    uint8_t **slot = page_slot(s, offset);
    if (!*slot && (*slot = calloc(1, PAGE_BYTES)))
        s->pages_n++;
    return *slot;
}

static uint64_t in_page(uint64_t offset, uint64_t end) {
    return min_u64(end, align_down(offset, PAGE_BYTES) + PAGE_BYTES) - offset;
}

static int memory_preadv_co(struct node *n, uint64_t offset, uint64_t length,
                            const struct iovec *iov, int niov, unsigned flags) {
    struct memory_state *s = n->state;
    for (uint64_t at = offset, end = offset + length, len; at < end; at += len) {
        len = in_page(at, end);
        uint8_t **slot = page_slot(s, at);
        if (slot && *slot)
            iov_from_buf(iov, niov, at - offset, *slot + at % PAGE_BYTES, len);
        else
            iov_zero(iov, niov, at - offset, len);
    }
    return 0;
}

static int memory_pwritev_co(struct node *n, uint64_t offset, uint64_t length,
                             const struct iovec *iov, int niov, unsigned flags) {
    struct memory_state *s = n->state;
    uint64_t end = offset + length;
    if (end > n->size && s->size_limit && end > s->size_limit)
        return -ENOSPC;
    for (uint64_t at = offset, len; at < end; at += len) {
        len = in_page(at, end);
        uint8_t *page = page_make(s, at);
        if (!page)
            return -ENOSPC;
        iov_to_buf(iov, niov, at - offset, page + at % PAGE_BYTES, len);
    }
    n->size = max_u64(n->size, end);
    return 0;
}

/* Whole pages go; parts are cleared. */
static void memory_clear(struct memory_state *s, uint64_t offset, uint64_t end) {
    end = min_u64(end, s->regions_n * REGION_BYTES);
    for (uint64_t at = offset, len; at < end; at += len) {
        len = in_page(at, end);
        uint8_t **slot = page_slot(s, at);
        if (!slot) {
            len = min_u64(end, align_down(at, REGION_BYTES) + REGION_BYTES) - at;
        } else if (*slot && len == PAGE_BYTES) {
            free(*slot);
            *slot = NULL;
            s->pages_n--;
        } else if (*slot) {
            memset(*slot + at % PAGE_BYTES, 0, len);
        }
    }
}

static int memory_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    struct memory_state *s = n->state;
    uint64_t end = offset + length;
    if (end > n->size && s->size_limit && end > s->size_limit)
        return -ENOSPC;
    memory_clear(s, offset, end);
    n->size = max_u64(n->size, end);
    return 0;
}

static int memory_discard_co(struct node *n, uint64_t offset, uint64_t length) {
    memory_clear(n->state, offset, offset + length);
    return 0;
}

static int memory_truncate_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    struct memory_state *s = n->state;
    if (prealloc != PREALLOC_OFF)
        return err_set(e, ENOTSUP, "preallocation=%s does not apply to memory",
                       prealloc_names[prealloc]);
    if (size > n->size && s->size_limit && size > s->size_limit)
        return err_set(e, ENOSPC, "size is beyond the limit");
    if (size < n->size)
        memory_clear(s, size, n->size);
    n->size = size;
    return 0;
}

static bool page_present(const struct memory_state *s, uint64_t offset) {
    uint8_t **slot = page_slot(s, offset);
    return slot && *slot;
}

static int memory_extents_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    const struct memory_state *s = n->state;
    uint64_t end = offset + length, at = offset;
    bool data = page_present(s, offset);
    while (at < end && page_present(s, at) == data) {
        if (at >= s->regions_n * REGION_BYTES)
            at = end; /* nothing was ever written here */
        else if (!page_slot(s, at))
            at = min_u64(end, align_down(at, REGION_BYTES) + REGION_BYTES);
        else
            at += in_page(at, end);
    }
    *out = (struct extent){.length = at - offset, .kind = EXTENT_ZERO};
    if (data) {
        out->kind = EXTENT_DATA;
        out->flags = EXTENT_IN_PLACE;
        out->storage = n;
        out->host_offset = offset;
    }
    return 0;
}

static int64_t memory_allocated(struct node *n) {
    const struct memory_state *s = n->state;
    return (int64_t)(s->pages_n * PAGE_BYTES);
}

static void memory_adopt(struct node *n, uint64_t size) {
    n->size = size;
    n->granularity = 1;
    n->request_align = 1;
    n->storage_flags = STORAGE_ZERO_INIT | STORAGE_IN_MEMORY;
}

static int memory_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    const struct memory_opts *o = n->opts;
    memory_adopt(n, o->size);
    return 0;
}

static int memory_create_co(struct node *n, struct create_ctx *ctx, struct err *e) {
    struct memory_state *s = n->state;
    memory_adopt(n, ctx->size);
    s->size_limit = ctx->size_limit;
    return 0;
}

static void memory_close_co(struct node *n) {
    struct memory_state *s = n->state;
    for (uint64_t r = 0; r < s->regions_n; r++) {
        for (int p = 0; s->regions[r] && p < REGION_PAGES; p++)
            free(s->regions[r]->page[p]);
        free(s->regions[r]);
    }
    free(s->regions);
    *s = (struct memory_state){0};
}

static int memory_reopen_co(struct node *n, unsigned new_flags, struct err *e) {
    return 0; /* nobody else can have it */
}

/* "memory:" or "memory:SIZE". */
static int memory_parse_name(const char *name, json_t *tree, struct err *e) {
    const char *size = name + strlen("memory:");
    uint64_t bytes;
    int r = *size ? size_parse(size, "size of the memory disk", &bytes, e) : 0;
    if (r || !*size)
        return r;
    return json_object_set_new(tree, "size", json_integer((json_int_t)bytes))
               ? err_set(e, ENOMEM, "out of memory")
               : 0;
}

static const struct opt memory_open_opts[] = {
    OPT_SIZE(struct memory_opts, size, "size", OPT_OPEN, 0, OPT_ANY, "bytes at the start"),
    OPT_END,
};

static const struct storage_ops memory_storage = {
    .preadv_co = memory_preadv_co,
    .pwritev_co = memory_pwritev_co,
    .zero_co = memory_zero_co,
    .discard_co = memory_discard_co,
    .truncate_co = memory_truncate_co,
    .extents_co = memory_extents_co,
    .allocated = memory_allocated,
    .create_co = memory_create_co,
};

static const char *const memory_prefixes[] = {"memory:", NULL};

const struct driver driver_memory = {
    .name = "memory",
    .kind = DRIVER_STORAGE,
    .help = "a sparse disk in the memory of this process",
    .prefixes = memory_prefixes,
    .state_size = sizeof(struct memory_state),
    .opts = memory_open_opts,
    .opts_size = sizeof(struct memory_opts),
    .parse_name = memory_parse_name,
    .open_co = memory_open_co,
    .close_co = memory_close_co,
    .reopen_co = memory_reopen_co,
    .storage = &memory_storage,
};
