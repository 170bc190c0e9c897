/* SPDX-License-Identifier: MIT */
/*
 * The public C library over the engine: blocking calls from any thread.
 *
 * Each context has one thread that runs a loop.  A call is a record on the caller's stack: it is
 * posted to the loop, runs there as a task, and its end wakes the caller.  The loop's own task
 * waits until the context is freed, then closes what is left.
 *
 * Who writes what: `struct call` belongs to the loop from post until `done` is set under its mutex;
 * the list of disks is touched by the loop's thread only.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/cleanup.h"
#include "base/err.h"
#include "base/list.h"
#include "base/version.h"
#include "disk/bitmap.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "disk/overlay.h"
#include "disk/snapshot.h"
#include "job/copy.h"
#include "runtime/loop.h"
#include "strata.h"

struct strata {
    pthread_t thread;
    struct loop *loop;
    struct list disks;
    bool stop; /* loop's thread only */
    struct waitq stopping;
    /* hand-over of the thread's start */
    pthread_mutex_t lock;
    pthread_cond_t started_cond;
    bool started;
    int start_result;
    struct err start_err;
};

struct strata_disk {
    struct list link;
    struct strata *s;
    struct node *node;
    bool snapshot;
};

struct call {
    struct strata *s;
    int (*fn)(void *arg, struct err *e);
    void *arg;
    struct err err;
    int result;
    bool done;
    pthread_mutex_t lock;
    pthread_cond_t cond;
};

static void call_task(void *arg) {
    struct call *c = arg;
    int r = c->fn(c->arg, &c->err);
    pthread_mutex_lock(&c->lock);
    c->result = r;
    c->done = true;
    pthread_cond_signal(&c->cond);
    pthread_mutex_unlock(&c->lock);
}

static void call_start(void *arg) {
    struct call *c = arg;
    task_run(c->s->loop, call_task, c);
}

static void copy_error(struct strata_error *out, struct err *e, int r) {
    if (out) {
        memset(out, 0, sizeof(*out));
        if (r < 0) {
            out->code = -r;
            snprintf(out->message, sizeof(out->message), "%s", e->text ? e->text : strerror(-r));
            snprintf(out->hint, sizeof(out->hint), "%s", e->hint ? e->hint : "");
        }
    }
    err_clear(e);
}

static int call_run(struct strata *s, int (*fn)(void *, struct err *), void *arg,
                    struct strata_error *error) {
    struct call c = {.s = s, .fn = fn, .arg = arg};
    pthread_mutex_init(&c.lock, NULL);
    pthread_cond_init(&c.cond, NULL);
    loop_post(s->loop, call_start, &c);
    pthread_mutex_lock(&c.lock);
    while (!c.done)
        pthread_cond_wait(&c.cond, &c.lock);
    pthread_mutex_unlock(&c.lock);
    pthread_cond_destroy(&c.cond);
    pthread_mutex_destroy(&c.lock);
    copy_error(error, &c.err, c.result);
    return c.result;
}

/* ---- context ---- */

const char *strata_version(void) {
    return STRATA_VERSION;
}

static void disk_close_co(struct strata_disk *d) {
    list_remove(&d->link);
    node_unref_co(d->node);
    free(d);
}

static void context_task(void *arg) {
    struct strata *s = arg;
    while (!s->stop)
        waitq_wait_co(&s->stopping);
    while (!list_empty(&s->disks))
        disk_close_co(list_entry(s->disks.next, struct strata_disk, link));
}

static void *context_thread(void *arg) {
    struct strata *s = arg;
    waitq_init(&s->stopping);
    int r = loop_new(LOOP_AUTO, &s->loop, &s->start_err);
    pthread_mutex_lock(&s->lock);
    s->start_result = r;
    s->started = true;
    pthread_cond_signal(&s->started_cond);
    pthread_mutex_unlock(&s->lock);
    if (r == 0) {
        loop_run(s->loop, context_task, s);
        loop_free(s->loop);
    }
    return NULL;
}

static void context_destroy(struct strata *s) {
    pthread_cond_destroy(&s->started_cond);
    pthread_mutex_destroy(&s->lock);
    err_clear(&s->start_err);
    free(s);
}

int strata_new(struct strata **out, struct strata_error *error) {
    struct strata *s = xcalloc(1, sizeof(*s));
    struct err e = ERR_INIT;
    list_init(&s->disks);
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->started_cond, NULL);
    /* The host program's signals are its own: they are not for this thread. */
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int r = -pthread_create(&s->thread, NULL, context_thread, s);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r < 0) {
        err_errno(&e, -r, "starting the library's thread");
    } else {
        pthread_mutex_lock(&s->lock);
        while (!s->started)
            pthread_cond_wait(&s->started_cond, &s->lock);
        pthread_mutex_unlock(&s->lock);
        r = s->start_result;
        if (r < 0) {
            pthread_join(s->thread, NULL);
            err_move(&e, &s->start_err);
        }
    }
    copy_error(error, &e, r);
    if (r < 0) {
        context_destroy(s);
        return r;
    }
    *out = s;
    return 0;
}

static void context_stop(void *arg) {
    struct strata *s = arg;
    s->stop = true;
    waitq_wake_all(&s->stopping);
}

void strata_free(struct strata *s) {
    if (!s)
        return;
    loop_post(s->loop, context_stop, s);
    pthread_join(s->thread, NULL);
    context_destroy(s);
}

/* ---- opening ---- */

struct open_call {
    struct strata *s;
    const char *name;
    struct strata_open_options o;
    struct strata_disk **out;
};

static enum gate gate_of(int trust) {
    switch (trust) {
    case STRATA_TRUST_NONE:
        return GATE_NONE;
    case STRATA_TRUST_LOCAL:
        return GATE_LOCAL;
    case STRATA_TRUST_ANY:
        return GATE_ANY;
    default:
        return GATE_BESIDE;
    }
}

static int do_open(void *arg, struct err *e) {
    struct open_call *c = arg;
    bool snapshot = c->o.flags & STRATA_SNAPSHOT;
    struct open_req req = {.name = c->name, .format = c->o.format, .gate = gate_of(c->o.trust)};
    struct node *n;
    req.flags = (c->o.flags & STRATA_READ_WRITE && !snapshot ? OPEN_RW | OPEN_UNMAP : 0) |
                (c->o.flags & STRATA_NO_BACKING ? OPEN_NO_BACKING : 0) |
                (c->o.flags & STRATA_FORCE_SHARE ? OPEN_FORCE_SHARE : 0);
    int r = node_open_co(&req, &n, e);
    if (r < 0)
        return r;
    if (snapshot) {
        struct overlay_opts oo = {.scratch_dir = c->o.scratch_dir,
                                  .scratch_size = c->o.scratch_size};
        struct node *top;
        r = overlay_create_co(n, &oo, &top, e);
        if (r < 0) {
            node_unref_co(n);
            return r;
        }
        n = top;
    } else if (node_is_rw(n) && n->flags & NODE_GUESSED) {
        node_unref_co(n);
        err_set(e, EINVAL, "%s: the format was not given and nothing was recognised", c->name);
        err_hint(e, "to write to it as a raw disk, give the format \"raw\"");
        return -EINVAL;
    }
    struct strata_disk *d = xcalloc(1, sizeof(*d));
    d->s = c->s;
    d->node = n;
    d->snapshot = snapshot;
    list_push_back(&c->s->disks, &d->link);
    *c->out = d;
    return 0;
}

int strata_open(struct strata *s, const char *name, const struct strata_open_options *options,
                struct strata_disk **out, struct strata_error *error) {
    struct open_call c = {.s = s, .name = name, .out = out};
    if (options)
        c.o = *options;
    return call_run(s, do_open, &c, error);
}

static int do_close(void *arg, struct err *e) {
    struct strata_disk *d = arg;
    int r = bitmap_store_co(d->node, e);
    int r2 = disk_flush_co(d->node);
    r = r < 0 ? r : r2;
    disk_close_co(d);
    return r;
}

int strata_close(struct strata_disk *d) {
    return d ? call_run(d->s, do_close, d, NULL) : 0;
}

uint64_t strata_size(const struct strata_disk *d) {
    return d->node->size;
}

const char *strata_format(const struct strata_disk *d) {
    const struct node *n = d->snapshot ? d->node->backing : d->node;
    return n->drv->name;
}

/* ---- requests ---- */

struct io_call {
    struct node *node;
    void *buf;
    uint64_t offset, length;
};

static int do_pread(void *arg, struct err *e) {
    struct io_call *c = arg;
    return disk_pread_co(c->node, c->offset, c->buf, c->length);
}
static int do_pwrite(void *arg, struct err *e) {
    struct io_call *c = arg;
    return disk_pwrite_co(c->node, c->offset, c->buf, c->length);
}
static int do_zero(void *arg, struct err *e) {
    struct io_call *c = arg;
    return disk_zero_co(c->node, c->offset, c->length, ZERO_MAY_UNMAP);
}
static int do_discard(void *arg, struct err *e) {
    struct io_call *c = arg;
    return disk_discard_co(c->node, c->offset, c->length);
}
static int do_flush(void *arg, struct err *e) {
    return disk_flush_co(((struct io_call *)arg)->node);
}

static int io_run(struct strata_disk *d, int (*fn)(void *, struct err *), void *buf,
                  uint64_t length, uint64_t offset) {
    struct io_call c = {.node = d->node, .buf = buf, .offset = offset, .length = length};
    return call_run(d->s, fn, &c, NULL);
}

int strata_pread(struct strata_disk *d, void *buf, size_t length, uint64_t offset) {
    return io_run(d, do_pread, buf, length, offset);
}
int strata_pwrite(struct strata_disk *d, const void *buf, size_t length, uint64_t offset) {
    return io_run(d, do_pwrite, (void *)buf, length, offset);
}
int strata_zero(struct strata_disk *d, uint64_t length, uint64_t offset) {
    return io_run(d, do_zero, NULL, length, offset);
}
int strata_discard(struct strata_disk *d, uint64_t length, uint64_t offset) {
    return io_run(d, do_discard, NULL, length, offset);
}
int strata_flush(struct strata_disk *d) {
    return io_run(d, do_flush, NULL, 0, 0);
}

struct extent_call {
    struct node *node;
    uint64_t offset;
    struct strata_extent *out;
};

static int do_extent(void *arg, struct err *e) {
    struct extent_call *c = arg;
    struct status st;
    if (c->offset >= c->node->size)
        return -EINVAL;
    int r = disk_status_co(c->node, c->offset, c->node->size - c->offset, STATUS_PRECISE, &st);
    if (!r)
        *c->out = (struct strata_extent){
            .length = st.length, .zero = st.zero, .data = st.data, .depth = st.depth};
    return r;
}

int strata_extent(struct strata_disk *d, uint64_t offset, struct strata_extent *out) {
    struct extent_call c = {.node = d->node, .offset = offset, .out = out};
    return call_run(d->s, do_extent, &c, NULL);
}

/* ---- dirty bitmaps ---- */

struct bitmap_call {
    struct node *node, *from;
    const char *name, *source;
    uint64_t granularity, offset;
    size_t index;
    int on;
    struct strata_bitmap *out;
    uint64_t *start, *length;
};

static int named_bitmap(struct node *n, const char *name, struct bitmap **out, struct err *e) {
    *out = bitmap_find(n, name);
    return *out ? 0 : err_set(e, ENOENT, "%s has no bitmap '%s'", n->filename, name);
}

static int do_bitmap_info(void *arg, struct err *e) {
    struct bitmap_call *c = arg;
    struct bitmap *b = bitmap_next(c->node, NULL);
    for (size_t i = 0; b && i < c->index; i++)
        b = bitmap_next(c->node, b);
    if (!b)
        return -ENOENT;
    *c->out = (struct strata_bitmap){.granularity = bitmap_granularity(b),
                                     .enabled = b->enabled,
                                     .inconsistent = b->inconsistent,
                                     .usable = bitmap_usable(b, false, NULL) == 0};
    snprintf(c->out->name, sizeof(c->out->name), "%s", b->name);
    return 0;
}

int strata_bitmap_info(struct strata_disk *d, size_t index, struct strata_bitmap *out) {
    struct bitmap_call c = {.node = d->node, .index = index, .out = out};
    return call_run(d->s, do_bitmap_info, &c, NULL);
}

static int do_bitmap_add(void *arg, struct err *e) {
    struct bitmap_call *c = arg;
    struct bitmap_new what = {.name = c->name, .granularity = c->granularity, .persistent = true};
    return bitmap_add_co(c->node, &what, NULL, e);
}

int strata_bitmap_add(struct strata_disk *d, const char *name, uint64_t granularity,
                      struct strata_error *error) {
    struct bitmap_call c = {.node = d->node, .name = name, .granularity = granularity};
    return call_run(d->s, do_bitmap_add, &c, error);
}

static int do_bitmap_remove(void *arg, struct err *e) {
    struct bitmap_call *c = arg;
    struct bitmap *b;
    int r = named_bitmap(c->node, c->name, &b, e);
    return r < 0 ? r : bitmap_remove_co(b, e);
}

int strata_bitmap_remove(struct strata_disk *d, const char *name, struct strata_error *error) {
    struct bitmap_call c = {.node = d->node, .name = name};
    return call_run(d->s, do_bitmap_remove, &c, error);
}

static int do_bitmap_clear(void *arg, struct err *e) {
    struct bitmap_call *c = arg;
    struct bitmap *b;
    int r = named_bitmap(c->node, c->name, &b, e);
    return r < 0 ? r : bitmap_clear_co(b, e);
}

int strata_bitmap_clear(struct strata_disk *d, const char *name, struct strata_error *error) {
    struct bitmap_call c = {.node = d->node, .name = name};
    return call_run(d->s, do_bitmap_clear, &c, error);
}

static int do_bitmap_enable(void *arg, struct err *e) {
    struct bitmap_call *c = arg;
    struct bitmap *b;
    int r = named_bitmap(c->node, c->name, &b, e);
    return r < 0 ? r : bitmap_set_enabled_co(b, c->on, e);
}

int strata_bitmap_enable(struct strata_disk *d, const char *name, int on,
                         struct strata_error *error) {
    struct bitmap_call c = {.node = d->node, .name = name, .on = on};
    return call_run(d->s, do_bitmap_enable, &c, error);
}

static int do_bitmap_merge(void *arg, struct err *e) {
    struct bitmap_call *c = arg;
    struct bitmap *b, *from;
    int r = named_bitmap(c->node, c->name, &b, e);
    if (!r)
        r = named_bitmap(c->from, c->source, &from, e);
    return r < 0 ? r : bitmap_merge_co(b, from, e);
}

int strata_bitmap_merge(struct strata_disk *d, const char *name, struct strata_disk *from,
                        const char *source, struct strata_error *error) {
    struct bitmap_call c = {.node = d->node, .name = name, .from = from->node, .source = source};
    if (from->s != d->s) { /* another thread's */
        struct err e = ERR_INIT;
        int r = err_set(&e, EINVAL, "the two disks belong to different contexts");
        copy_error(error, &e, r);
        return r;
    }
    return call_run(d->s, do_bitmap_merge, &c, error);
}

static int do_bitmap_next(void *arg, struct err *e) {
    struct bitmap_call *c = arg;
    struct bitmap *b;
    int r = named_bitmap(c->node, c->name, &b, e);
    if (!r)
        r = bitmap_load_co(b, e);
    return r < 0 ? r : bitmap_next_dirty(b, c->offset, b->size, c->start, c->length);
}

int strata_bitmap_next(struct strata_disk *d, const char *name, uint64_t offset, uint64_t *start,
                       uint64_t *length) {
    struct bitmap_call c = {
        .node = d->node, .name = name, .offset = offset, .start = start, .length = length};
    return call_run(d->s, do_bitmap_next, &c, NULL);
}

/* ---- throw-away disks ---- */

static int do_commit(void *arg, struct err *e) {
    struct strata_disk *d = arg;
    struct copy_opts o = {.sparse_bytes = 4096};
    return commit_run_co(d->node, &o, e);
}

int strata_commit(struct strata_disk *d, struct strata_error *error) {
    struct err e = ERR_INIT;
    if (d->snapshot)
        return call_run(d->s, do_commit, d, error);
    int r = err_set(&e, EINVAL, "the disk was not opened as a snapshot");
    copy_error(error, &e, r);
    return r;
}

struct keep_call {
    struct strata_disk *d;
    const char *file;
};

static int do_keep(void *arg, struct err *e) {
    struct keep_call *c = arg;
    if (!c->d->snapshot)
        return err_set(e, EINVAL, "the disk was not opened as a snapshot");
    return overlay_keep_co(c->d->node, c->file, false, e);
}

int strata_keep(struct strata_disk *d, const char *file, struct strata_error *error) {
    struct keep_call c = {d, file};
    return call_run(d->s, do_keep, &c, error);
}

/* ---- internal snapshots ---- */

struct snapshot_call {
    struct strata_disk *d;
    const char *what; /* name, or id */
    int (*act_co)(struct node *n, const char *id, struct err *e);
    struct snapshot_list list;
};

static int do_snapshot_list(void *arg, struct err *e) {
    struct snapshot_call *c = arg;
    int r = disk_snapshot_list_co(c->d->node, &c->list, e);
    return r < 0 ? err_prefix(e, "%s", c->d->node->filename) : 0;
}

int strata_snapshot_list(struct strata_disk *d, struct strata_snapshot **out, size_t *count,
                         struct strata_error *error) {
    struct snapshot_call c = {.d = d};
    *out = NULL;
    *count = 0;
    int r = call_run(d->s, do_snapshot_list, &c, error);
    if (!r && c.list.count) {
        *out = xcalloc(c.list.count, sizeof(**out));
        for (; *count < c.list.count; ++*count) {
            struct snapshot_info *x = &c.list.v[*count];
            (*out)[*count] = (struct strata_snapshot){.id = steal(&x->id),
                                                      .name = steal(&x->name),
                                                      .disk_size = x->disk_size,
                                                      .vm_state_size = x->vm_state_size,
                                                      .date_sec = x->date_sec,
                                                      .date_nsec = x->date_nsec,
                                                      .vm_clock_nsec = x->vm_clock_nsec,
                                                      .icount = x->icount};
        }
    }
    snapshot_list_free(&c.list);
    return r;
}

void strata_snapshots_free(struct strata_snapshot *list, size_t count) {
    for (size_t i = 0; i < count; i++) {
        free((char *)list[i].id);
        free((char *)list[i].name);
    }
    free(list);
}

static int do_snapshot_create(void *arg, struct err *e) {
    struct snapshot_call *c = arg;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    struct snapshot_info info = {.name = xstrdup(c->what),
                                 .date_sec = (uint32_t)now.tv_sec,
                                 .date_nsec = (uint32_t)now.tv_nsec,
                                 .icount = SNAPSHOT_ICOUNT_UNKNOWN};
    int r = disk_snapshot_create_co(c->d->node, &info, e);
    snapshot_info_free(&info);
    return r < 0 ? err_prefix(e, "%s", c->d->node->filename) : 0;
}

static int do_snapshot_act(void *arg, struct err *e) {
    struct snapshot_call *c = arg;
    int r = do_snapshot_list(c, e);
    const struct snapshot_info *x = r ? NULL : snapshot_find_key(&c->list, c->what);
    if (!r && !x)
        r = err_set(e, ENOENT, "%s has no snapshot '%s'", c->d->node->filename, c->what);
    if (!r && (r = c->act_co(c->d->node, x->id, e)) < 0)
        err_prefix(e, "%s", c->d->node->filename);
    snapshot_list_free(&c->list);
    return r;
}

int strata_snapshot_create(struct strata_disk *d, const char *name, struct strata_error *error) {
    struct snapshot_call c = {.d = d, .what = name};
    return call_run(d->s, do_snapshot_create, &c, error);
}
int strata_snapshot_apply(struct strata_disk *d, const char *snapshot, struct strata_error *error) {
    struct snapshot_call c = {.d = d, .what = snapshot, .act_co = disk_snapshot_apply_co};
    return call_run(d->s, do_snapshot_act, &c, error);
}
int strata_snapshot_delete(struct strata_disk *d, const char *snapshot,
                           struct strata_error *error) {
    struct snapshot_call c = {.d = d, .what = snapshot, .act_co = disk_snapshot_delete_co};
    return call_run(d->s, do_snapshot_act, &c, error);
}

/* ---- creation ---- */

struct create_call {
    const char *name, *format, *options;
    uint64_t size;
};

static int do_create(void *arg, struct err *e) {
    struct create_call *c = arg;
    json_t *tree = NULL;
    int r = c->options ? opt_parse_keyval(c->options, NULL, &tree, e) : 0;
    if (r < 0)
        return r;
    if (!tree)
        tree = json_object();
    json_object_set_new(tree, "size", json_integer((json_int_t)c->size));
    r = disk_create_co(c->name, c->format, tree, CREATE_REPLACE, e);
    json_decref(tree);
    return r;
}

int strata_create(struct strata *s, const char *name, const char *format, uint64_t size,
                  const char *options, struct strata_error *error) {
    struct create_call c = {name, format, options, size};
    return call_run(s, do_create, &c, error);
}

/* ---- options of an image ---- */

struct amend_call {
    struct node *node;
    const char *options;
    unsigned flags;
};

static int do_amend(void *arg, struct err *e) {
    struct amend_call *c = arg;
    json_t *tree = NULL;
    int r = opt_parse_keyval(c->options, NULL, &tree, e);
    if (r < 0)
        return r;
    struct amend_ctx ctx = {
        .flags = (c->flags & STRATA_AMEND_FORCE ? AMEND_FORCE : 0) |
                 (c->flags & STRATA_AMEND_SHRINK ? AMEND_SHRINK : 0),
    };
    r = disk_amend_co(c->node, tree, &ctx, e);
    json_decref(tree);
    return r < 0 ? err_prefix(e, "%s", c->node->filename) : 0;
}

int strata_amend(struct strata_disk *d, const char *options, unsigned flags,
                 struct strata_error *error) {
    struct amend_call c = {d->node, options ? options : "", flags};
    return call_run(d->s, do_amend, &c, error);
}
