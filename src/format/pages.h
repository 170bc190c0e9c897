/* SPDX-License-Identifier: MIT */
/*
 * Pages: a format's tables in memory, by the place where they lie on storage.
 *
 * For formats that keep maps in tables and have no reference counts (vdi, vpc, qed, vmdk ...).  A
 * page is a piece of one table, at most PAGE_BYTES long, that the driver names by its host offset;
 * the driver cuts its tables the same way each time, so that pages never overlap each other nor
 * guest data.  Clean pages are kept within a budget, whatever the size of the tables.
 *
 * The write order is the driver's, in three steps that it repeats for each level of its tables,
 * lowest first:
 *
 *      pages_take(&batch)          what is dirty now is copied; changes from here on come later
 *      disk_flush_co(storage)      whatever the copies name is stable
 *      pages_write_co(&batch)      the copies go out
 *
 * Taking before flushing matters: a name that is put into a page after the flush began may name
 * data that the flush did not cover, and it is not in the copy.
 *
 * States: clean <-> dirty; `writing` beside either while a copy is on its way.  Only a page that is
 * clean and not being written is evicted.  Where nothing can be evicted the cache grows; drivers
 * ask pages_crowded() before they change more and write back first.
 *
 * All of it belongs to the node's loop.  `data` of a page is good until the caller suspends.
 */
#ifndef STRATA_FORMAT_PAGES_H
#define STRATA_FORMAT_PAGES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/task.h"

struct node;

#define PAGE_BYTES 4096u

struct page {
    uint64_t host;
    uint32_t length;
    uint8_t level; /* of its table: 0 is written first */
    bool loading, dirty, writing, recent;
    int error; /* of the load, for those who waited; the page is gone then */
    unsigned waiters;
    struct waitq ready;
    struct page *next; /* hash chain */
    uint32_t index;    /* in pages->all */
    uint8_t data[PAGE_BYTES];
};

struct pages {
    struct node *storage;
    uint32_t budget, count, cap, hand, dirty_count;
    uint32_t hash_mask;
    struct page **hash, **all;
    /* Where pages come from; NULL: from the storage.  Set after pages_init(). */
    int (*load_co)(void *arg, uint64_t host, void *buf, size_t length);
    void *load_arg;
};

struct pages_batch {
    struct page **page; /* ascending host offsets */
    uint8_t *bytes;     /* their copies, one behind the other */
    size_t count;
};

/* `bytes` of tables are to be kept at most, some more while they are dirty.  -ENOMEM. */
int pages_init(struct pages *p, struct node *storage, size_t bytes);
/* Dirty pages are lost: write back first.  Accepts zeroed pages. */
void pages_free(struct pages *p);

/* Drops all pages, none of which may be dirty or in use: the tables are cut otherwise from now on.
 * -EBUSY. */
int pages_forget_all(struct pages *p);

/* The page at `host`, read when it is not here.  -EIO, -ENOMEM. */
int pages_get_co(struct pages *p, uint64_t host, uint32_t length, unsigned level,
                 struct page **out);
/* The page of a table that is new: zeros, without reading; not dirty.  -ENOMEM. */
int pages_get_new(struct pages *p, uint64_t host, uint32_t length, unsigned level,
                  struct page **out);
/* Before each change of page->data. */
void pages_modify(struct pages *p, struct page *page);

static inline bool pages_crowded(const struct pages *p) {
    return p->dirty_count > p->budget / 2;
}
static inline bool pages_dirty(const struct pages *p) {
    return p->dirty_count;
}

/* Copies the dirty pages of `level`, which are clean afterwards.  -ENOMEM: nothing has changed. */
int pages_take(struct pages *p, unsigned level, struct pages_batch *b);
/*
 * Writes the copies and ends the batch.  On error all its pages are dirty again.  One batch of a
 * level at a time (the driver's lock).
 */
int pages_write_co(struct pages *p, struct pages_batch *b);
/* Ends a batch that is not to be written: its pages are dirty again. */
void pages_give_back(struct pages *p, struct pages_batch *b);

#endif
