/* SPDX-License-Identifier: MIT */
/*
 * Events: named moments in the life of a request, at which a test may stop it or make it fail.
 *
 * A format tells its `file` child when it is about to touch a table; the engine tells the storage
 * when it is about to move data.  Only a filter made for it (blkdebug) listens: for every other
 * node an event is one load and one comparison.  The names are QEMU's, since test scripts use them;
 * what has no counterpart here is never fired.
 */
#ifndef STRATA_DISK_EVENT_H
#define STRATA_DISK_EVENT_H

#include <stdbool.h>
#include "disk/node.h"

#define DISK_EVENTS(X)                                                                             \
    X(l1_update)                                                                                   \
    X(l1_grow_alloc_table)                                                                         \
    X(l1_grow_write_table)                                                                         \
    X(l1_grow_activate_table)                                                                      \
    X(l2_load)                                                                                     \
    X(l2_update)                                                                                   \
    X(l2_update_compressed)                                                                        \
    X(l2_alloc_cow_read)                                                                           \
    X(l2_alloc_write)                                                                              \
    X(read_aio)                                                                                    \
    X(read_backing_aio)                                                                            \
    X(read_compressed)                                                                             \
    X(write_aio)                                                                                   \
    X(write_compressed)                                                                            \
    X(vmstate_load)                                                                                \
    X(vmstate_save)                                                                                \
    X(cow_read)                                                                                    \
    X(cow_write)                                                                                   \
    X(reftable_load)                                                                               \
    X(reftable_grow)                                                                               \
    X(reftable_update)                                                                             \
    X(refblock_load)                                                                               \
    X(refblock_update)                                                                             \
    X(refblock_update_part)                                                                        \
    X(refblock_alloc)                                                                              \
    X(refblock_alloc_hookup)                                                                       \
    X(refblock_alloc_write)                                                                        \
    X(refblock_alloc_write_blocks)                                                                 \
    X(refblock_alloc_write_table)                                                                  \
    X(refblock_alloc_switch_table)                                                                 \
    X(cluster_alloc)                                                                               \
    X(cluster_alloc_bytes)                                                                         \
    X(cluster_free)                                                                                \
    X(flush_to_os)                                                                                 \
    X(flush_to_disk)                                                                               \
    X(pwritev_rmw_head)                                                                            \
    X(pwritev_rmw_after_head)                                                                      \
    X(pwritev_rmw_tail)                                                                            \
    X(pwritev_rmw_after_tail)                                                                      \
    X(pwritev)                                                                                     \
    X(pwritev_zero)                                                                                \
    X(pwritev_done)                                                                                \
    X(empty_image_prepare)                                                                         \
    X(l1_shrink_write_table)                                                                       \
    X(l1_shrink_free_l2_clusters)                                                                  \
    X(cor_write)                                                                                   \
    X(cluster_alloc_space)                                                                         \
    X(none)

enum disk_event {
#define X(name) EVENT_##name,
    DISK_EVENTS(X)
#undef X
        EVENTS_N
};

/* What a driver that listens offers (struct driver, debug). */
struct debug_ops {
    /* May suspend for as long as a breakpoint holds. */
    void (*event_co)(struct node *n, enum disk_event event);
    /*
     * The next request that passes `event` stops there and is known as `tag`; say() is told when it
     * stops (true) and goes on (false).
     */
    int (*break_at)(struct node *n, enum disk_event event, const char *tag,
                    void (*say)(const char *tag, bool stopped));
    /* Lets the oldest request of that tag go on (NULL: all requests).  -ENOENT: none waits. */
    int (*resume)(struct node *n, const char *tag);
    /* Forgets the breakpoints of that tag and lets its requests go on.  -ENOENT: there are none. */
    int (*remove_break)(struct node *n, const char *tag);
    bool (*is_stopped)(struct node *n, const char *tag);
};

/* `n` may be NULL. */
static inline void disk_event_co(struct node *n, enum disk_event event) {
    if (n && n->drv->debug)
        n->drv->debug->event_co(n, event);
}

/* EVENTS_N: no event of that name. */
enum disk_event disk_event_named(const char *name);
/* The uppermost node at or below `n`, along `file`, that listens; NULL none. */
struct node *disk_debug_node(struct node *n);

#endif
