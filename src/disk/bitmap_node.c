/* SPDX-License-Identifier: MIT */
/*
 * Dirty bitmaps of a node: recording, and every operation that keeps what is stored truthful.
 *
 * The order, for any change of a bitmap that the image has stored: the image says "in use" and that
 * is stable; then memory changes; then, for a request, its data moves.  set->unarmed counts the
 * enabled bitmaps that are not so far yet, so the usual request does no more than set bits.
 *
 * Operations quiesce the node, and no request is between its marks and its data when they run:
 * a bit that is cleared belongs to data that is already there.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "base/plant.h"
#include "base/strbuf.h"
#include "disk/bitmap_int.h"
#include "disk/engine.h"
#include "runtime/loop.h"

static bool usable(const struct bitmap *b) {
    return !b->inconsistent && !b->foreign;
}

/* A name for messages. */
static char *safe_name(const char *name) {
    struct strbuf s = STRBUF_INIT;
    strbuf_put_safe(&s, name, strlen(name));
    return strbuf_steal(&s);
}

/* ---------------------------------------------------------------- the set */

static struct bitmap_set *set_of(struct node *n) {
    if (!n->bitmaps) {
        struct bitmap_set *set = xcalloc(1, sizeof(*set));
        set->node = n;
        list_init(&set->bitmaps);
        task_mutex_init(&set->arm_lock);
        n->bitmaps = set;
    }
    return n->bitmaps;
}

void bitmap_set_update(struct bitmap_set *set) {
    set->count = set->recording = set->unarmed = 0;
    list_for_each(it, &set->bitmaps) {
        const struct bitmap *b = list_entry(it, struct bitmap, link);
        set->count++;
        set->recording += b->enabled && usable(b);
        /* One that is not for us is told of changes too: it misses them. */
        set->unarmed += b->enabled && !b->inconsistent && b->stored && !b->armed;
    }
}

void bitmap_set_free(struct node *n) {
    if (!n->bitmaps)
        return;
    while (!list_empty(&n->bitmaps->bitmaps))
        bitmap_free(list_entry(n->bitmaps->bitmaps.next, struct bitmap, link));
    free(steal(&n->bitmaps));
}

static void join(struct node *n, struct bitmap *b, const char *name) {
    b->node = n;
    b->set = set_of(n);
    b->name = xstrdup(name);
    list_push_back(&b->set->bitmaps, &b->link);
}

int bitmap_attach(struct node *n, const char *name, uint32_t granularity_bits, bool enabled,
                  bool inconsistent, const char *foreign, struct bitmap **out, struct err *e) {
    struct bitmap *b = NULL;
    int r = bitmap_make(n->size, granularity_bits, &b, e);
    if (r < 0)
        return r;
    join(n, b, name);
    b->enabled = enabled;
    b->persistent = b->stored = true;
    b->inconsistent = inconsistent;
    b->armed = inconsistent;
    b->foreign = foreign;
    if (usable(b) && (r = bitmap_give_room(b, e)) < 0) {
        bitmap_free(b);
        return r;
    }
    *out = b;
    return 0;
}

static int by_name(const void *a, const void *b) {
    return strcmp((*(struct bitmap *const *)a)->name, (*(struct bitmap *const *)b)->name);
}

int bitmap_attach_end(struct node *n, struct err *e) {
    if (!n->bitmaps)
        return 0;
    bitmap_set_update(n->bitmaps);
    size_t count = n->bitmaps->count, i = 0;
    AUTO_FREE struct bitmap **v = malloc((count + 1) * sizeof(*v));
    if (!v)
        return err_set(e, ENOMEM, "no memory for %zu bitmaps", count);
    for (struct bitmap *b = NULL; (b = bitmap_next(n, b));)
        v[i++] = b;
    qsort(v, count, sizeof(*v), by_name);
    for (i = 1; i < count; i++)
        if (!strcmp(v[i - 1]->name, v[i]->name))
            return err_set(e, EEXIST, "two bitmaps have one name");
    return 0;
}

void bitmap_detach(struct bitmap *b) {
    bitmap_free(b);
}

/* ---------------------------------------------------------------- looking */

struct bitmap *bitmap_next(const struct node *n, const struct bitmap *b) {
    if (!n->bitmaps)
        return NULL;
    const struct list *next = b ? b->link.next : n->bitmaps->bitmaps.next;
    return next == &n->bitmaps->bitmaps ? NULL : list_entry(next, struct bitmap, link);
}

struct bitmap *bitmap_find(const struct node *n, const char *name) {
    struct bitmap *b = NULL;
    while ((b = bitmap_next(n, b)))
        if (!strcmp(b->name, name))
            return b;
    return NULL;
}

uint64_t bitmap_default_granularity(const struct node *n) {
    if (n->granularity <= 1)
        return 64 * KIB;
    return min_u64(max_u64(n->granularity, 4 * KIB), 64 * KIB);
}

int bitmap_usable(const struct bitmap *b, bool change, struct err *e) {
    char *name AUTO_FREE = safe_name(b->name);
    if (b->inconsistent) {
        err_set(e, EINVAL, "bitmap '%s' is inconsistent: it was in use and never stored", name);
        err_hint(e, "it can only be removed");
        return -EINVAL;
    }
    if (b->foreign) {
        err_set(e, EINVAL, "bitmap '%s' %s", name, b->foreign);
        err_hint(e, "it can only be removed");
        return -EINVAL;
    }
    if (change && b->persistent && !node_is_rw(b->node))
        return err_set(e, EROFS, "bitmap '%s': the image is open read-only", name);
    return 0;
}

int bitmap_load_co(struct bitmap *b, struct err *e) {
    int r = bitmap_usable(b, false, e);
    if (r < 0 || b->loaded)
        return r;
    r = b->node->drv->format->bitmap_load_co(b, e);
    if (r < 0) {
        char *name AUTO_FREE = safe_name(b->name);
        err_prefix(e, "bitmap '%s'", name); /* 0 without an e: not to be returned */
        return r;
    }
    b->loaded = true;
    return 0;
}

/* ---------------------------------------------------------------- arming */

/* Those with b->arm. */
static int arm_wanted_co(struct bitmap_set *set, struct err *e) {
    task_mutex_lock_co(&set->arm_lock);
    int r = 0;
    bool any = false;
    list_for_each(it, &set->bitmaps) {
        struct bitmap *b = list_entry(it, struct bitmap, link);
        b->arm = b->arm && b->stored && !b->armed && !b->inconsistent;
        any |= b->arm;
    }
    if (any)
        r = set->node->drv->format->bitmap_arm_co(set->node, e);
    list_for_each(it, &set->bitmaps) {
        struct bitmap *b = list_entry(it, struct bitmap, link);
        if (b->arm && !r) {
            b->armed = true;
            set->changed = true;
        }
        b->arm = false;
    }
    bitmap_set_update(set);
    task_mutex_unlock(&set->arm_lock);
    return r;
}

static int arm_all_enabled_co(struct bitmap_set *set, struct err *e) {
    list_for_each(it, &set->bitmaps) {
        struct bitmap *b = list_entry(it, struct bitmap, link);
        b->arm |= b->enabled;
    }
    return arm_wanted_co(set, e);
}

static int arm_one_co(struct bitmap *b, struct err *e) {
    if (!b->stored)
        return 0;
    b->arm = true;
    return arm_wanted_co(b->set, e);
}

int bitmap_mark_co(struct node *n, uint64_t offset, uint64_t length) {
    struct bitmap_set *set = n->bitmaps;
    while (set->unarmed && !PLANTED(BITMAP_NOT_ARMED)) {
        int r = arm_all_enabled_co(set, NULL);
        if (r < 0)
            return r;
    }
    if (!set->recording || PLANTED(BITMAP_MISSES_WRITES))
        return 0;
    list_for_each(it, &set->bitmaps) {
        struct bitmap *b = list_entry(it, struct bitmap, link);
        if (b->enabled && usable(b)) {
            bitmap_set_range(b, offset, length);
            set->changed = true;
        }
    }
    return 0;
}

int bitmap_mark_all_co(struct node *n, struct err *e) {
    if (!n->bitmaps || !n->size)
        return 0;
    int r = bitmap_mark_co(n, 0, n->size);
    return r < 0 ? err_errno(e, -r, "telling the image that its bitmaps are in use") : 0;
}

/* ---------------------------------------------------------------- operations */

static int check_new(const struct node *n, const struct bitmap_new *what, uint64_t granularity,
                     struct err *e) {
    char *name AUTO_FREE = safe_name(what->name);
    size_t length = strlen(what->name);
    if (!n->drv->format)
        return err_set(e, ENOTSUP, "%s is no disk, but the storage of one", n->name);
    if (!length)
        return err_set(e, EINVAL, "a bitmap needs a name");
    if (length > BITMAP_NAME_MAX)
        return err_set(e, EINVAL, "bitmap name has %zu bytes, more than %d", length,
                       BITMAP_NAME_MAX);
    if (bitmap_find(n, what->name))
        return err_set(e, EEXIST, "bitmap '%s' is there already", name);
    if (n->bitmaps && n->bitmaps->count >= BITMAPS_MAX)
        return err_set(e, EFBIG, "the image has %d bitmaps, and more are not possible",
                       BITMAPS_MAX);
    if (!what->persistent)
        return 0;
    if (!n->drv->format->bitmap_check)
        return err_set(e, ENOTSUP, "format '%s' cannot keep bitmaps", n->drv->name);
    if (!node_is_rw(n))
        return err_set(e, EROFS, "bitmap '%s': the image is open read-only", name);
    return n->drv->format->bitmap_check((struct node *)n, what->name, granularity, e);
}

int bitmap_add_co(struct node *n, const struct bitmap_new *what, struct bitmap **out,
                  struct err *e) {
    uint64_t granularity = what->granularity ? what->granularity : bitmap_default_granularity(n);
    struct bitmap *b = NULL;
    int r = check_new(n, what, granularity, e);
    if (r < 0)
        return r;
    if (!is_pow2(granularity) || granularity < BITMAP_GRANULARITY_MIN ||
        granularity > BITMAP_GRANULARITY_MAX)
        return err_set(e, EINVAL,
                       "granularity %" PRIu64 " is not a power of two from %u to %" PRIu64,
                       granularity, BITMAP_GRANULARITY_MIN, BITMAP_GRANULARITY_MAX);
    r = bitmap_make(n->size, (uint32_t)__builtin_ctzll(granularity), &b, e);
    if (r < 0)
        return r;
    /* What is in flight has not been recorded, and is complete before there is a bitmap. */
    node_quiesce_co(n);
    if (bitmap_find(n, what->name)) {
        r = err_set(e, EEXIST, "a bitmap of that name is there already");
    } else {
        join(n, b, what->name);
        if (what->first) {
            list_remove(&b->link);
            list_push_front(&b->set->bitmaps, &b->link);
        }
        r = bitmap_give_room(b, e);
    }
    node_resume(n);
    if (r < 0) {
        bitmap_free(b);
        return r;
    }
    b->loaded = true;
    b->enabled = !what->disabled;
    b->persistent = what->persistent;
    b->set->changed |= b->persistent;
    bitmap_set_update(b->set);
    if (out)
        *out = b;
    return 0;
}

/* Clients rely on what an exported bitmap says. */
static int check_not_exported(const struct bitmap *b, struct err *e) {
    if (!b->exported)
        return 0;
    char *name AUTO_FREE = safe_name(b->name);
    err_set(e, EBUSY, "bitmap '%s' is exported: clients are shown it", name);
    err_hint(e, "take the export away first");
    return -EBUSY;
}

int bitmap_remove_co(struct bitmap *b, struct err *e) {
    struct node *n = b->node;
    int r = check_not_exported(b, e);
    if (r < 0)
        return r;
    if (b->stored && !node_is_rw(n)) {
        char *name AUTO_FREE = safe_name(b->name);
        return err_set(e, EROFS, "bitmap '%s': the image is open read-only", name);
    }
    node_quiesce_co(n);
    if (b->stored) {
        task_mutex_lock_co(&n->bitmaps->arm_lock);
        r = n->drv->format->bitmap_remove_co(b, e);
        task_mutex_unlock(&n->bitmaps->arm_lock);
    }
    if (!r) {
        bitmap_detach(b);
        bitmap_set_update(n->bitmaps);
    }
    node_resume(n);
    return r;
}

/* The node is quiesced and the image told: the bitmap may change.  Then node_resume(). */
static int change_begin_co(struct bitmap *b, struct err *e) {
    int r = bitmap_usable(b, true, e);
    if (r < 0)
        return r;
    node_quiesce_co(b->node);
    r = arm_one_co(b, e);
    if (r < 0)
        node_resume(b->node);
    return r;
}

static void change_end(struct bitmap *b) {
    b->set->changed |= b->persistent;
    bitmap_set_update(b->set);
    node_resume(b->node);
}

int bitmap_clear_co(struct bitmap *b, struct err *e) {
    int r = check_not_exported(b, e);
    if (!r)
        r = change_begin_co(b, e);
    if (r < 0)
        return r;
    bitmap_clear_bits(b);
    b->loaded = true; /* what is stored no longer counts */
    change_end(b);
    return 0;
}

int bitmap_set_enabled_co(struct bitmap *b, bool enabled, struct err *e) {
    int r = bitmap_usable(b, true, e);
    if (r < 0 || b->enabled == enabled)
        return r;
    r = change_begin_co(b, e);
    if (r < 0)
        return r;
    b->enabled = enabled;
    change_end(b);
    return 0;
}

int bitmap_merge_co(struct bitmap *dst, struct bitmap *src, struct err *e) {
    int r = check_not_exported(dst, e);
    if (!r)
        r = bitmap_usable(dst, true, e);
    if (!r)
        r = bitmap_load_co(src, e);
    if (r < 0)
        return r;
    if (dst->size != src->size)
        return err_set(e, EINVAL,
                       "bitmaps of disks of different sizes, %" PRIu64 " and %" PRIu64
                       " bytes, cannot be merged",
                       dst->size, src->size);
    if (dst == src)
        return 0;
    r = change_begin_co(dst, e);
    if (r < 0)
        return r;
    bitmap_merge_bits(dst, src);
    change_end(dst);
    return 0;
}

int bitmap_store_co(struct node *n, struct err *e) {
    struct bitmap_set *set = n->bitmaps;
    if (!set || !set->changed || !node_is_rw(n))
        return 0;
    if (!n->drv->format->bitmap_store_co)
        return 0;
    node_quiesce_co(n);
    task_mutex_lock_co(&set->arm_lock);
    int r = n->drv->format->bitmap_store_co(n, e);
    if (!r)
        set->changed = false;
    bitmap_set_update(set);
    task_mutex_unlock(&set->arm_lock);
    node_resume(n);
    if (r < 0)
        err_prefix(e, "storing the bitmaps");
    return r;
}

/* ---------------------------------------------------------------- resize */

int bitmap_resize_begin_co(struct node *n, uint64_t size, struct err *e) {
    struct bitmap_set *set = n->bitmaps;
    int r = 0;
    if (!set || (size == n->size && size % 512 == 0)) /* formats round up to that */
        return 0;
    for (struct bitmap *b = NULL; !r && (b = bitmap_next(n, b));) {
        r = bitmap_load_co(b, e);
        if (!r)
            r = bitmap_check_size(size, b->granularity_bits, e);
        b->arm = !r;
    }
    if (!r)
        return arm_wanted_co(set, e);
    err_prefix(e, "the disk's size cannot change");
    return r;
}

void bitmap_resize_end(struct node *n) {
    for (struct bitmap *b = NULL; n->bitmaps && (b = bitmap_next(n, b));) {
        uint64_t old = b->size;
        if (old == n->size)
            continue;
        if (bitmap_truncate(b, n->size) < 0)
            b->inconsistent = true; /* the image says so already */
        else if (n->size > old && b->enabled)
            bitmap_set_range(b, old, n->size - old);
        n->bitmaps->changed = true;
    }
    if (n->bitmaps)
        bitmap_set_update(n->bitmaps);
}
