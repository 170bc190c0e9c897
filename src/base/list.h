/* SPDX-License-Identifier: MIT */
/* An intrusive doubly linked ring.  An empty head points at itself. */
#ifndef STRATA_BASE_LIST_H
#define STRATA_BASE_LIST_H

#include <stdbool.h>
#include <stddef.h>

struct list {
    struct list *next, *prev;
};

#define list_entry(ptr, type, member) ((type *)((char *)(ptr)-offsetof(type, member)))
#define LIST_HEAD_INIT(name)                                                                       \
    { &(name), &(name) }

static inline void list_init(struct list *h) {
    h->next = h->prev = h;
}
static inline bool list_empty(const struct list *h) {
    return h->next == h;
}
static inline void list_insert_(struct list *n, struct list *prev, struct list *next) {
    n->prev = prev;
    n->next = next;
    prev->next = n;
    next->prev = n;
}
static inline void list_push_back(struct list *h, struct list *n) {
    list_insert_(n, h->prev, h);
}
static inline void list_push_front(struct list *h, struct list *n) {
    list_insert_(n, h, h->next);
}
/* Unlinks and leaves the element an empty ring, so that a second remove is harmless. */
static inline void list_remove(struct list *n) {
    n->prev->next = n->next;
    n->next->prev = n->prev;
    list_init(n);
}
static inline struct list *list_pop_front(struct list *h) {
    if (list_empty(h))
        return NULL;
    struct list *n = h->next;
    list_remove(n);
    return n;
}

#define list_for_each(it, head) for (struct list *it = (head)->next; it != (head); it = it->next)
#define list_for_each_safe(it, nx, head)                                                           \
    for (struct list *it = (head)->next, *nx = it->next; it != (head); it = nx, nx = it->next)

#endif
