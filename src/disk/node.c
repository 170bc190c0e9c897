/* SPDX-License-Identifier: MIT */
/*
 * Node lifecycle: making, referencing, quiescing, reopening, closing.
 *
 * Closing order: the top of the graph first (its flush may still write to its children), then each
 * child as its last reference goes.
 */
#include "disk/node.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>

#include "base/cleanup.h"
#include "base/err.h"
#include "disk/engine.h"
#include "runtime/loop.h"

struct node *node_new(const struct driver *drv) {
    static unsigned counter; /* names only; nodes are made by one thread at a time per graph */
    struct node *n = xcalloc(1, sizeof(*n));
    n->drv = drv;
    n->loop = loop_self();
    n->refs = 1;
    n->name = xasprintf("#%s%u", drv->name, __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED));
    n->granularity = 1;
    n->request_align = 1;
    if (drv->state_size)
        n->state = xcalloc(1, drv->state_size);
    if (drv->opts_size)
        n->opts = xcalloc(1, drv->opts_size);
    range_lock_init(&n->locks);
    waitq_init(&n->drained);
    waitq_init(&n->resumed);
    return n;
}

void node_destroy_co(struct node *n) {
    if (!n)
        return;
    assert(n->in_flight == 0 && range_lock_idle(&n->locks));
    if (n->drv->close_co)
        n->drv->close_co(n);
    bitmap_set_free(n);
    node_unref_co(n->file);
    node_unref_co(n->data_file);
    for (size_t i = 0; i < n->part_count; i++)
        node_unref_co(n->parts[i].node);
    free(n->parts);
    node_unref_co(n->backing);
    unit_cache_drop(n);
    if (n->drv->opts && n->opts)
        opt_free(n->drv->opts, n->opts);
    free(n->opts);
    free(n->state);
    free(n->name);
    free(n->filename);
    free(n->backing_name);
    free(n->backing_format);
    free(n->data_name);
    free(n);
}

struct node *node_ref(struct node *n) {
    n->refs++;
    return n;
}

void node_unref_co(struct node *n) {
    /* A loop down the chain: it may be longer than a stack is deep. */
    while (n) {
        assert(n->refs > 0);
        if (n->refs > 1) {
            n->refs--;
            return;
        }
        if (node_is_rw(n))
            disk_flush_co(n); /* whoever must know the outcome has flushed before */
        /* Without flushes (cache unsafe) tables still leave memory, when all is over. */
        if (node_is_rw(n) && n->flags & NODE_NO_FLUSH && n->drv->format && n->drv->format->flush_co)
            n->drv->format->flush_co(n);
        n->refs = 0;
        struct node *below = n->backing;
        n->backing = NULL;
        node_destroy_co(n);
        n = below;
    }
}

void node_enter_co(struct node *n) {
    while (n->quiesce)
        waitq_wait_co(&n->resumed);
    n->in_flight++;
}

void node_leave(struct node *n) {
    assert(n->in_flight > 0);
    if (--n->in_flight == 0 && n->quiesce)
        waitq_wake_all(&n->drained);
}

void node_quiesce_co(struct node *n) {
    n->quiesce++;
    while (n->in_flight)
        waitq_wait_co(&n->drained);
}

void node_resume(struct node *n) {
    assert(n->quiesce > 0);
    if (--n->quiesce == 0)
        waitq_wake_all(&n->resumed);
}

struct node *node_storage(struct node *n) {
    while (n->file)
        n = n->file;
    return n;
}

struct node *node_data_storage(struct node *n) {
    while (n->file)
        n = n->data_file ? n->data_file : n->file;
    return n;
}

/* The permissions that a child needs when its parent becomes read-write or read-only. */
static void child_perms(const struct node *child, bool rw, unsigned parent_perm,
                        unsigned parent_shared, unsigned *perm, unsigned *shared) {
    switch (child->role) {
    case CHILD_FILE_RAW:
        *perm = parent_perm;
        *shared = parent_shared;
        break;
    default:
        *perm = PERM_CONSISTENT_READ | (rw ? PERM_WRITE | PERM_RESIZE : 0);
        *shared = PERM_CONSISTENT_READ | PERM_WRITE_UNCHANGED;
    }
}

static int reopen_one_co(struct node *n, bool rw, unsigned perm, unsigned shared, struct err *e);

/* The i-th of the children that hold this node's own bytes; NULL: not there. */
static struct node *own_file(const struct node *n, size_t i) {
    return i == 0 ? n->file : i == 1 ? n->data_file : n->parts[i - 2].node;
}

/* All of them, for a parent with `perm` and `shared`. */
static int reopen_files_co(struct node *n, bool rw, unsigned perm, unsigned shared, struct err *e) {
    for (size_t i = 0; i < 2 + n->part_count; i++) {
        struct node *file = own_file(n, i);
        unsigned file_perm, file_shared;
        if (!file)
            continue;
        child_perms(file, rw, perm, shared, &file_perm, &file_shared);
        int r = reopen_one_co(file, rw, file_perm, file_shared, e);
        if (r < 0)
            return r;
    }
    return 0;
}

static void files_to_read_only_co(struct node *n, unsigned shared) {
    for (size_t i = 0; i < 2 + n->part_count; i++) {
        struct node *file = own_file(n, i);
        if (file && node_is_rw(file))
            reopen_one_co(file, false, file->perm & ~(PERM_WRITE | PERM_RESIZE), shared, NULL);
    }
}

static int reopen_one_co(struct node *n, bool rw, unsigned perm, unsigned shared, struct err *e) {
    unsigned old_perm = n->perm, old_shared = n->shared, old_flags = n->flags;
    unsigned flags = rw ? old_flags | NODE_RW : old_flags & ~NODE_RW;

    /* Going up, storage must be writable before the format writes; going down, after. */
    int r = rw ? reopen_files_co(n, rw, perm, shared, e) : 0;
    if (!r) {
        n->perm = perm;
        n->shared = shared;
    }
    if (!r && n->drv->reopen_co) {
        node_quiesce_co(n); /* requests from above may come around the format node (chain.c) */
        r = n->drv->reopen_co(n, flags, e);
        node_resume(n);
    }
    if (r < 0) {
        n->perm = old_perm;
        n->shared = old_shared;
        if (rw && !(old_flags & NODE_RW))
            files_to_read_only_co(n, old_shared);
        return r;
    }
    n->flags = flags;
    return rw ? 0 : reopen_files_co(n, rw, perm, shared, e);
}

int node_reopen_co(struct node *n, bool rw, struct err *e) {
    if (node_is_rw(n) == rw)
        return 0;
    int r = rw ? 0 : disk_flush_co(n);
    if (r < 0)
        err_errno(e, -r, "flushing before the change to read-only");
    unsigned perm = PERM_CONSISTENT_READ | (rw ? PERM_WRITE | PERM_RESIZE : 0);
    unsigned shared = PERM_CONSISTENT_READ | PERM_WRITE_UNCHANGED;
    if (r >= 0)
        r = reopen_one_co(n, rw, perm, shared, e);
    return r < 0 ? err_prefix(e, "%s", n->filename ? n->filename : n->name) : 0;
}

int node_restrict_co(struct node *n, unsigned shared, struct err *e) {
    if (!(n->shared & ~shared))
        return 0;
    unsigned before = n->shared;
    node_quiesce_co(n);
    int r = reopen_one_co(n, node_is_rw(n), n->perm, n->shared & shared, e);
    if (r < 0)
        n->shared = before;
    node_resume(n);
    return r < 0 ? err_prefix(e, "%s", n->filename ? n->filename : n->name) : 0;
}
