/* SPDX-License-Identifier: MIT */
/*
 * The filter "blkdebug": makes requests fail, stop or keep to limits, as a test wishes.
 *
 *      format --file--> blkdebug --image--> storage (or any node)
 *
 * Rules wait for an event (disk/event.h).  When it is fired, in the order of the rules: set-state
 * changes the state that later events see, inject-error arms an error, a breakpoint stops the
 * request.  The first error that one event arms disarms what was armed before.  An armed error is
 * met by the next request of its kind and place; with `once` that is its end, rule and all.
 *
 * Limits: requests are cut to max-transfer; zeros and discards are cut to their maximum, and what
 * does not fit their granularity is written as data (zeros) or passed on by itself (discards).
 *
 * Invariants
 *  1. A stopped request stands in `stopped` until resumed; it holds the node's reference that its
 *     caller holds, so the node cannot go while one stands there.
 *  2. An armed rule is in `rules`; removing a rule disarms it.
 *
 * Facts: QEMU's documentation of blkdebug (docs/devel/blkdebug.rst) and of its options, and what
 * its programs do.
 */
#include "filter/blkdebug_rules.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "base/iov.h"
#include "disk/event.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "runtime/loop.h"

struct blkdebug_opts {
    char *config;
    uint64_t align, max_transfer, opt_write_zero, max_write_zero, opt_discard, max_discard;
};

struct stopped {
    struct list link;
    char *tag;
    void (*say)(const char *tag, bool stopped);
    bool go;
    struct task *task;
};

struct blkdebug {
    struct list rules, stopped;
    int state;
    unsigned armed; /* counts events that armed errors: a rule is armed while its count is this */
};

/* ---------------------------------------------------------------- rules at work */

static void stop_here_co(struct blkdebug *s, struct rule *rule) {
    struct stopped me = {.tag = xstrdup(rule->tag), .say = rule->say, .task = task_self()};
    rule_free(rule);
    list_push_back(&s->stopped, &me.link);
    if (me.say)
        me.say(me.tag, true);
    while (!me.go)
        task_park_co();
    free(me.tag);
}

static void release(struct stopped *w) {
    if (w->say)
        w->say(w->tag, false);
    list_remove(&w->link);
    w->go = true;
    task_wake(w->task);
}

static void blkdebug_event_co(struct node *n, enum disk_event event) {
    struct blkdebug *s = n->state;
    int state = s->state, next = state;
    bool arming = false;
    struct list *at, *after;
    for (at = s->rules.next; at != &s->rules; at = at->next) {
        struct rule *r = list_entry(at, struct rule, link);
        if (r->event != event || (r->state && r->state != state))
            continue;
        if (r->kind == RULE_SET_STATE) {
            next = r->new_state;
        } else if (r->kind == RULE_ERROR) {
            if (!arming)
                s->armed++;
            arming = true;
            r->armed = s->armed;
        }
    }
    s->state = next;
    /* The breakpoints that are there now: those set while it stands here are for others. */
    struct list mine;
    list_init(&mine);
    for (at = s->rules.next; at != &s->rules; at = after) {
        struct rule *r = list_entry(at, struct rule, link);
        after = at->next;
        if (r->kind == RULE_BREAK && r->event == event) {
            list_remove(at);
            list_push_back(&mine, at);
        }
    }
    while (!list_empty(&mine))
        stop_here_co(s, list_entry(mine.next, struct rule, link));
}

/* The error that this request meets; 0 none. */
static int meet_co(struct node *n, uint64_t offset, uint64_t length, enum iotype type) {
    struct blkdebug *s = n->state;
    for (struct list *at = s->rules.prev; at != &s->rules; at = at->prev) {
        struct rule *r = list_entry(at, struct rule, link);
        bool here = r->anywhere || (r->offset >= offset && r->offset - offset < length);
        if (r->kind != RULE_ERROR || !s->armed || r->armed != s->armed || !here ||
            !(r->iotypes & 1u << type))
            continue;
        int code = r->error;
        bool at_once = r->immediately;
        if (!code)
            return 0;
        if (r->once)
            rule_free(r);
        if (!at_once)
            task_yield_co();
        return -code;
    }
    return 0;
}

static int blkdebug_break_at(struct node *n, enum disk_event event, const char *tag,
                             void (*say)(const char *tag, bool stopped)) {
    struct blkdebug *s = n->state;
    struct rule *r = xcalloc(1, sizeof(*r));
    *r = (struct rule){.kind = RULE_BREAK, .event = event, .tag = xstrdup(tag), .say = say};
    list_push_back(&s->rules, &r->link);
    return 0;
}

static int blkdebug_resume(struct node *n, const char *tag) {
    struct blkdebug *s = n->state;
    bool found = false;
    for (struct list *at = s->stopped.next, *after; at != &s->stopped; at = after) {
        struct stopped *w = list_entry(at, struct stopped, link);
        after = at->next;
        if (tag && strcmp(w->tag, tag))
            continue;
        release(w);
        found = true;
        if (tag)
            break;
    }
    return found ? 0 : -ENOENT;
}

static int blkdebug_remove_break(struct node *n, const char *tag) {
    struct blkdebug *s = n->state;
    int r = -ENOENT;
    for (struct list *at = s->rules.next, *after; at != &s->rules; at = after) {
        struct rule *rule = list_entry(at, struct rule, link);
        after = at->next;
        if (rule->kind == RULE_BREAK && !strcmp(rule->tag, tag)) {
            rule_free(rule);
            r = 0;
        }
    }
    while (!blkdebug_resume(n, tag))
        r = 0;
    return r;
}

static bool blkdebug_is_stopped(struct node *n, const char *tag) {
    struct blkdebug *s = n->state;
    for (struct list *at = s->stopped.next; at != &s->stopped; at = at->next)
        if (!strcmp(list_entry(at, struct stopped, link)->tag, tag))
            return true;
    return false;
}

/* ---------------------------------------------------------------- requests */

static uint64_t piece(uint64_t length, uint64_t most) {
    return most ? min_u64(length, most) : length;
}

static int move_co(struct node *n, bool out, uint64_t offset, uint64_t length,
                   const struct iovec *iov, int niov, unsigned flags) {
    const struct blkdebug_opts *o = n->opts;
    int r = 0;
    for (uint64_t done = 0, part; !r && done < length; done += part) {
        struct iovec v[IOV_MAX_STRATA];
        part = piece(length - done, o->max_transfer);
        int k = iov_slice(iov, niov, done, part, v);
        r = meet_co(n, offset + done, part, out ? IOTYPE_WRITE : IOTYPE_READ);
        if (!r && out)
            r = disk_pwritev_co(n->file, offset + done, part, v, k, flags);
        else if (!r)
            r = disk_preadv_co(n->file, offset + done, part, v, k, flags);
    }
    n->size = n->file->size;
    return r;
}

/* A format below has an end; storage reads as zeros behind it. */
static int blkdebug_preadv_co(struct node *n, uint64_t offset, uint64_t length,
                              const struct iovec *iov, int niov, unsigned flags) {
    uint64_t inside = offset >= n->size ? 0 : min_u64(length, n->size - offset);
    int r = 0;
    if (inside)
        r = move_co(n, false, offset, inside, iov, niov, flags);
    if (!r && inside < length)
        iov_zero(iov, niov, inside, length - inside);
    return r;
}

static int blkdebug_pwritev_co(struct node *n, uint64_t offset, uint64_t length,
                               const struct iovec *iov, int niov, unsigned flags) {
    disk_event_co(n, EVENT_pwritev);
    int r = move_co(n, true, offset, length, iov, niov, flags);
    disk_event_co(n, EVENT_pwritev_done);
    return r;
}

static int write_zeros_by_hand_co(struct node *n, uint64_t offset, uint64_t length) {
    uint8_t *zeros = length ? buf_get(64 * KIB) : NULL;
    int r = length && !zeros ? -ENOMEM : 0;
    if (zeros)
        memset(zeros, 0, 64 * KIB);
    for (uint64_t part; !r && length; offset += part, length -= part) {
        part = min_u64(length, 64 * KIB);
        r = disk_pwrite_co(n->file, offset, zeros, part);
    }
    buf_put(zeros, 64 * KIB);
    return r;
}

static int blkdebug_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    const struct blkdebug_opts *o = n->opts;
    uint64_t unit = max_u64(o->opt_write_zero, 1), end = offset + length;
    uint64_t low = (offset + unit - 1) / unit * unit, high = end / unit * unit;
    int r = meet_co(n, offset, length, IOTYPE_WRITE_ZEROES);
    if (r)
        return r;
    if (low >= high)
        low = high = end;
    if (zero_flags & ZERO_NO_FALLBACK && (low > offset || high < end))
        return -ENOTSUP;
    disk_event_co(n, EVENT_pwritev_zero);
    r = write_zeros_by_hand_co(n, offset, low - offset);
    for (uint64_t part; !r && low < high; low += part) {
        part = piece(high - low, o->max_write_zero / unit * unit);
        r = disk_zero_co(n->file, low, part, zero_flags);
    }
    if (!r)
        r = write_zeros_by_hand_co(n, high, end - high);
    disk_event_co(n, EVENT_pwritev_done);
    n->size = n->file->size;
    return r;
}

static int blkdebug_discard_co(struct node *n, uint64_t offset, uint64_t length) {
    const struct blkdebug_opts *o = n->opts;
    uint64_t unit = max_u64(o->opt_discard, 1), end = offset + length;
    uint64_t low = (offset + unit - 1) / unit * unit, high = end / unit * unit;
    int r = meet_co(n, offset, length, IOTYPE_DISCARD);
    if (low >= high)
        low = high = end;
    /* What is smaller than the unit goes by itself: whoever is below may still know a use for it.*/
    if (!r && offset < low)
        r = disk_discard_co(n->file, offset, low - offset);
    for (uint64_t part; !r && low < high; low += part) {
        part = piece(high - low, o->max_discard / unit * unit);
        r = disk_discard_co(n->file, low, part);
    }
    if (!r && high < end)
        r = disk_discard_co(n->file, high, end - high);
    return r;
}

static int blkdebug_flush_co(struct node *n) {
    int r = meet_co(n, 0, 0, IOTYPE_FLUSH);
    return r ? r : disk_flush_co(n->file);
}

static int blkdebug_truncate_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    int r = disk_resize_co(n->file, size, prealloc, e);
    n->size = n->file->size;
    return r;
}

static int blkdebug_extents_co(struct node *n, uint64_t offset, uint64_t length,
                               struct extent *out) {
    struct status st;
    *out = (struct extent){.length = length, .kind = EXTENT_ZERO};
    int r = meet_co(n, offset, length, IOTYPE_BLOCK_STATUS);
    if (r || offset >= n->file->size)
        return r;
    r = disk_status_co(n->file, offset, min_u64(length, n->file->size - offset), STATUS_PRECISE,
                       &st);
    if (r)
        return r;
    out->length = min_u64(st.length, length);
    if (st.zero) {
        out->flags = st.data ? EXTENT_ALLOCATED : 0;
    } else {
        out->kind = EXTENT_DATA;
        out->flags = EXTENT_IN_PLACE;
        out->storage = n;
        out->host_offset = offset;
    }
    return 0;
}

static int64_t blkdebug_allocated(struct node *n) {
    return disk_allocated(n->file);
}

/* ---------------------------------------------------------------- opening */

static int check_limits(const struct blkdebug_opts *o, struct err *e) {
    uint64_t align = max_u64(o->align, 1);
    const struct {
        const char *name;
        uint64_t value;
    } rows[] = {
        {"max-transfer", o->max_transfer},     {"opt-write-zero", o->opt_write_zero},
        {"max-write-zero", o->max_write_zero}, {"opt-discard", o->opt_discard},
        {"max-discard", o->max_discard},
    };
    if (o->align && (o->align >= INT32_MAX || !is_pow2(o->align)))
        return err_set(e, EINVAL, "Cannot meet constraints with align %llu",
                       (unsigned long long)o->align);
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++)
        if (rows[i].value % align || rows[i].value >= INT32_MAX)
            return err_set(e, EINVAL, "Cannot meet constraints with %s %llu", rows[i].name,
                           (unsigned long long)rows[i].value);
    if (o->opt_write_zero && o->max_write_zero % o->opt_write_zero)
        return err_set(e, EINVAL, "Cannot meet constraints with max-write-zero %llu",
                       (unsigned long long)o->max_write_zero);
    if (o->opt_discard && o->max_discard % o->opt_discard)
        return err_set(e, EINVAL, "Cannot meet constraints with max-discard %llu",
                       (unsigned long long)o->max_discard);
    return 0;
}

static int blkdebug_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct blkdebug *s = n->state;
    const struct blkdebug_opts *o = n->opts;
    list_init(&s->rules);
    list_init(&s->stopped);
    s->state = 1;
    const json_t *tree = open_ctx_tree(ctx);
    int r = o->config && *o->config ? rules_from_file(&s->rules, o->config, e) : 0;
    if (!r)
        r = rules_from_tree(&s->rules, tree, e);
    if (!r)
        r = node_open_child_co(n, ctx, "image", CHILD_FILE_RAW, &n->file, e);
    if (!r)
        r = check_limits(o, e);
    if (r)
        return r;
    n->size = n->file->size;
    n->granularity = 1;
    n->request_align = (uint32_t)max_u64(o->align, 1);
    n->storage_flags = n->file->storage_flags & STORAGE_ZERO_INIT;
    blkdebug_event_co(n, EVENT_none);
    return 0;
}

static void blkdebug_close_co(struct node *n) {
    struct blkdebug *s = n->state;
    if (s->rules.next)
        while (s->rules.next != &s->rules)
            rule_free(list_entry(s->rules.next, struct rule, link));
}

static int blkdebug_reopen_co(struct node *n, unsigned new_flags, struct err *e) {
    return 0;
}

/* blkdebug:CONFIG:IMAGE; CONFIG may be empty. */
static int blkdebug_parse_name(const char *name, json_t *tree, struct err *e) {
    const char *config = name + strlen("blkdebug:"), *colon = strchr(config, ':');
    if (!colon || !colon[1])
        return err_set(e, EINVAL, "blkdebug requires both config file and image path");
    AUTO_FREE char *text = xstrndup(config, (size_t)(colon - config));
    if ((*text && json_object_set_new(tree, "config", json_string_nocheck(text)) < 0) ||
        json_object_set_new(tree, "image", json_string_nocheck(colon + 1)) < 0)
        return err_set(e, ENOMEM, "no memory");
    return 0;
}

static const struct opt blkdebug_open_opts[] = {
    OPT_STR(struct blkdebug_opts, config, "config", OPT_OPEN, "file with rules"),
    OPT_SIZE(struct blkdebug_opts, align, "align", OPT_OPEN, 0, OPT_ANY,
             "requests are multiples of this"),
    OPT_SIZE(struct blkdebug_opts, max_transfer, "max-transfer", OPT_OPEN, 0, OPT_ANY,
             "largest read or write"),
    OPT_SIZE(struct blkdebug_opts, opt_write_zero, "opt-write-zero", OPT_OPEN, 0, OPT_ANY,
             "unit of zeroing; the rest is written"),
    OPT_SIZE(struct blkdebug_opts, max_write_zero, "max-write-zero", OPT_OPEN, 0, OPT_ANY,
             "most that is zeroed at once"),
    OPT_SIZE(struct blkdebug_opts, opt_discard, "opt-discard", OPT_OPEN, 0, OPT_ANY,
             "unit of discarding; the rest goes by itself"),
    OPT_SIZE(struct blkdebug_opts, max_discard, "max-discard", OPT_OPEN, 0, OPT_ANY,
             "most that is discarded at once"),
    OPT_LIST("inject-error", OPT_OPEN, "list of errors: event, errno, sector, once, state ..."),
    OPT_LIST("set-state", OPT_OPEN, "list of changes of state: event, state, new_state"),
    OPT_CHILD("image", OPT_OPEN, "what is filtered"),
    OPT_END,
};

static const struct storage_ops blkdebug_storage = {
    .preadv_co = blkdebug_preadv_co,
    .pwritev_co = blkdebug_pwritev_co,
    .zero_co = blkdebug_zero_co,
    .discard_co = blkdebug_discard_co,
    .flush_co = blkdebug_flush_co,
    .truncate_co = blkdebug_truncate_co,
    .extents_co = blkdebug_extents_co,
    .allocated = blkdebug_allocated,
};

static const struct debug_ops blkdebug_debug = {
    .event_co = blkdebug_event_co,
    .break_at = blkdebug_break_at,
    .resume = blkdebug_resume,
    .remove_break = blkdebug_remove_break,
    .is_stopped = blkdebug_is_stopped,
};

static const char *const blkdebug_prefixes[] = {"blkdebug:", NULL};

const struct driver driver_blkdebug = {
    .name = "blkdebug",
    .kind = DRIVER_FILTER,
    .help = "makes requests fail or wait, for tests",
    .prefixes = blkdebug_prefixes,
    .state_size = sizeof(struct blkdebug),
    .opts = blkdebug_open_opts,
    .opts_size = sizeof(struct blkdebug_opts),
    .parse_name = blkdebug_parse_name,
    .open_co = blkdebug_open_co,
    .close_co = blkdebug_close_co,
    .reopen_co = blkdebug_reopen_co,
    .storage = &blkdebug_storage,
    .debug = &blkdebug_debug,
};
