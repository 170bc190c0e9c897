/* SPDX-License-Identifier: MIT */
/*
 * qcow2 under the engine, against a plain array, with power cuts.
 *
 * Storage forgets what no flush covered: forgetful.h has its fault model.
 *
 * Several tasks each own a part of the disk (the parts meet inside clusters) and do random writes,
 * zeroing, discards, coded writes, reads and flushes there.  Each write fills its range with a
 * value of its own, so that what a word may hold after a power cut is known: what the last flush
 * covered, or anything written later.  Before random flushes the storage as a power cut would
 * leave it is copied, opened and checked: no corruption, leaks at most, and every word is one of
 * those. At the end the disk must equal the array, and the image must be without leaks.
 *
 * The seed is printed; STRATA_SEED chooses it, STRATA_ROUNDS multiplies the work.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <cmocka.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "base/iov.h"
#include "disk/engine.h"
#include "forgetful.h"
#include "format/qcow2/qcow2.h"
#include "runtime/loop.h"

/* ---------------------------------------------------------------- the model */

struct shape {
    const char *name;
    const char *options; /* of create, as JSON without braces */
    uint64_t size;
    unsigned tasks, ops, cuts;
    unsigned node_flags;
    bool backing;
    bool apart; /* the data lie in a file of their own: two storages lose power at once */
    unsigned fail_one_in;
    uint64_t longest; /* operation in bytes; 0: any */
    uint32_t slices;  /* budget of the cache; 0: as it is */
};

struct op {
    uint64_t offset, length, value;
};

struct model {
    const struct shape *shape;
    struct node *file, *node, *base;
    struct node *data; /* external data file, or NULL */
    uint64_t words;
    uint64_t *now;     /* value of each 8-byte word */
    uint64_t *durable; /* as of the last completed flush's start */
    struct op *ops;    /* everything begun since `flushed_ops` may be there after a cut */
    size_t ops_n, ops_cap;
    size_t flushed_ops; /* first that the durable picture may lack */
    size_t durable_at;  /* ops begun when that picture was taken */
    size_t running[16]; /* by task: the operation in flight, else SIZE_MAX */
    uint64_t next_value;
    unsigned busy;
    unsigned cuts_done;
};

struct worker {
    struct model *m;
    unsigned index;
    uint64_t low, high; /* words of its own */
    uint8_t *buf;
};

static void model_begin(struct worker *w, uint64_t offset, uint64_t length, uint64_t value) {
    struct model *m = w->m;
    if (m->ops_n == m->ops_cap) {
        m->ops_cap = m->ops_cap ? m->ops_cap * 2 : 1024;
        m->ops = realloc(m->ops, m->ops_cap * sizeof(*m->ops));
    }
    m->running[w->index] = m->ops_n;
    m->ops[m->ops_n++] = (struct op){offset, length, value};
}

static void model_done(struct worker *w, uint64_t offset, uint64_t length, uint64_t value) {
    for (uint64_t i = offset / 8; i < (offset + length) / 8; i++)
        w->m->now[i] = value;
    w->m->running[w->index] = SIZE_MAX;
}

static void flush_co(struct model *m) {
    size_t bytes = m->words * 8, at = m->ops_n, lacks = m->ops_n;
    uint64_t *snapshot = malloc(bytes);
    memcpy(snapshot, m->now, bytes);
    for (unsigned i = 0; i < m->shape->tasks; i++)
        lacks = min_u64(lacks, m->running[i]);
    int r = disk_flush_co(m->node);
    if (!m->shape->fail_one_in)
        assert_int_equal(r, 0);
    if (!r && at >= m->durable_at) {
        memcpy(m->durable, snapshot, bytes);
        m->durable_at = at;
        m->flushed_ops = lacks;
    }
    free(snapshot);
}

static bool possible(const struct model *m, const uint64_t *durable, uint64_t w, uint64_t value,
                     size_t first, size_t last) {
    if (durable[w] == value)
        return true;
    for (size_t i = first; i < last; i++)
        if (m->ops[i].value == value && w * 8 >= m->ops[i].offset &&
            w * 8 < m->ops[i].offset + m->ops[i].length)
            return true;
    return false;
}

static void complain(void *arg, bool is_leak, const char *text) {
    if (!is_leak)
        print_error("%s: %s\n", (const char *)arg, text);
}

static struct node *open_on(struct node *file, unsigned flags, struct node *base) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = NULL;
    struct open_req req = {.flags = flags | OPEN_NO_BACKING | OPEN_NO_DATA,
                           .cache = file->flags & NODE_NO_FLUSH ? CACHE_UNSAFE : CACHE_WRITEBACK};
    if (node_open_on_co(file, &driver_qcow2, NULL, &req, &n, &e))
        print_error("%s\n", err_text(&e));
    assert_non_null(n);
    n->backing = base ? node_ref(base) : NULL;
    return n;
}

/* An image whose data file is `data` (taken over), where that is not NULL. */
static struct node *open_apart(struct node *file, struct node *data, unsigned flags,
                               struct node *base) {
    struct node *n = open_on(file, flags, base);
    if (data)
        qcow2_of(n)->data = n->data_file = data;
    return n;
}

static void squeeze(const struct shape *sh, struct node *n) {
    if (sh->slices)
        qcow2_of(n)->cache.slices_max = sh->slices;
}

static void check(struct node *n, const char *when, bool leaks_too) {
    struct err e AUTO_ERR = ERR_INIT;
    struct check_result r = {.report = complain, .arg = (void *)when};
    if (qcow2_check_co(n, &r, &e))
        print_error("%s: %s\n", when, err_text(&e));
    assert_int_equal(e.code, 0);
    assert_int_equal(r.corruptions, 0);
    assert_int_equal(r.check_errors, 0);
    if (leaks_too)
        assert_int_equal(r.leaks, 0);
}

/* A power cut now: what is left must open, be whole, and hold nothing impossible. */
static void cut_co(struct model *m) {
    size_t first = m->flushed_ops, last = m->ops_n, bytes = m->words * 8;
    uint64_t *durable = malloc(bytes), *read = malloc(bytes);
    memcpy(durable, m->durable, bytes);
    struct node *n = open_apart(disk_after_cut(m->file), m->data ? disk_after_cut(m->data) : NULL,
                                OPEN_CHECK, m->base);
    check(n, "after a power cut", false);
    assert_int_equal(disk_pread_co(n, 0, read, bytes), 0);
    /* A write that failed may have left anything of it, at any time. */
    for (uint64_t w = 0; w < m->words && !m->shape->fail_one_in; w++)
        if (!possible(m, durable, w, read[w], first, last)) {
            print_error("power cut: word %llu is %llu, durable %llu\n", (unsigned long long)w,
                        (unsigned long long)read[w], (unsigned long long)durable[w]);
            fail();
        }
    node_unref_co(n);
    free(durable);
    free(read);
    m->cuts_done++;
}

/* ---------------------------------------------------------------- the work */

static uint64_t range_length(uint64_t room) {
    static const uint64_t spans[] = {1, 8, 64, 512, 4096, 32768, 262144};
    return 1 + rng(min_u64(room, spans[rng(7)]));
}

static void write_op(struct worker *w, uint64_t offset, uint64_t length) {
    struct model *m = w->m;
    uint64_t value = ++m->next_value;
    for (uint64_t i = 0; i < length; i += 8)
        memcpy(w->buf + i, &value, 8);
    model_begin(w, offset, length, value);
    struct iovec iov[2] = {{w->buf, length / 16 * 8}, {w->buf, length - length / 16 * 8}};
    int r = disk_pwritev_co(m->node, offset, length, iov, 2, 0);
    if (!m->shape->fail_one_in)
        assert_int_equal(r, 0);
    if (!r)
        model_done(w, offset, length, value);
}

static void zero_op(struct worker *w, uint64_t offset, uint64_t length) {
    struct model *m = w->m;
    model_begin(w, offset, length, 0);
    int r = disk_zero_co(m->node, offset, length, rng(2) ? ZERO_MAY_UNMAP : 0);
    if (!m->shape->fail_one_in)
        assert_int_equal(r, 0);
    if (!r)
        model_done(w, offset, length, 0);
}

/* What a discard leaves is only known to be old or zeros: read it back. */
static void discard_op(struct worker *w, uint64_t offset, uint64_t length) {
    struct model *m = w->m;
    model_begin(w, offset, length, 0);
    int r = disk_discard_co(m->node, offset, length);
    if (!r)
        r = disk_pread_co(m->node, offset, w->buf, length);
    if (!m->shape->fail_one_in)
        assert_int_equal(r, 0);
    for (uint64_t i = 0; !r && i < length; i += 8) {
        uint64_t value = le64_load(w->buf + i);
        if (!m->shape->fail_one_in)
            assert_true(value == 0 || value == m->now[(offset + i) / 8]);
        m->now[(offset + i) / 8] = value;
    }
    m->running[w->index] = SIZE_MAX;
}

static void coded_op(struct worker *w, uint64_t offset) {
    struct model *m = w->m;
    uint32_t unit = m->node->granularity;
    uint64_t start = align_up(offset, unit), value = ++m->next_value;
    if (start + unit > w->high * 8 || !m->node->codec)
        return;
    uint8_t *code = malloc(unit);
    for (uint64_t i = 0; i < unit; i += 8)
        memcpy(w->buf + i, &value, 8);
    ssize_t n = m->node->codec->encode(w->buf, unit, code, unit - 1);
    if (n > 0) {
        /* Longer than it needs to be at times, so that codes straddle host clusters. */
        uint32_t length = (uint32_t)min_u64((uint64_t)n + rng(unit / 2), unit - 1);
        memset(code + n, 0x55, length - (size_t)n);
        model_begin(w, start, unit, value);
        int r = disk_write_coded_co(m->node, start, code, length);
        if (!m->shape->fail_one_in)
            assert_int_equal(r, 0);
        if (!r)
            model_done(w, start, unit, value);
    }
    free(code);
}

static void read_op(struct worker *w, uint64_t offset, uint64_t length) {
    struct model *m = w->m;
    int r = disk_pread_co(m->node, offset, w->buf, length);
    if (m->shape->fail_one_in)
        return; /* a failed write leaves old or new */
    assert_int_equal(r, 0);
    for (uint64_t i = 0; i < length; i += 8)
        if (le64_load(w->buf + i) != m->now[(offset + i) / 8]) {
            print_error("word %llu reads %llu instead of %llu\n",
                        (unsigned long long)(offset + i) / 8,
                        (unsigned long long)le64_load(w->buf + i),
                        (unsigned long long)m->now[(offset + i) / 8]);
            fail();
        }
}

static void status_op(struct worker *w, uint64_t offset, uint64_t length) {
    struct status st;
    int r = disk_status_co(w->m->node, offset, length, STATUS_TOP_ONLY, &st);
    if (w->m->shape->fail_one_in)
        return;
    assert_int_equal(r, 0);
    if (st.zero && st.present)
        for (uint64_t i = 0; i < st.length / 8; i++)
            assert_true(w->m->now[offset / 8 + i] == 0);
}

static void worker_main(void *arg) {
    struct worker *w = arg;
    for (unsigned i = 0; i < w->m->shape->ops; i++) {
        uint64_t at = w->low + rng(w->high - w->low);
        uint64_t offset = at * 8, length = range_length(w->high - at) * 8;
        if (w->m->shape->longest)
            length = min_u64(length, w->m->shape->longest);
        switch (rng(16)) {
        case 0:
        case 1:
            zero_op(w, offset, length);
            break;
        case 2:
            discard_op(w, offset, length);
            break;
        case 3:
        case 4:
        case 5:
            coded_op(w, offset);
            break;
        case 6:
        case 7:
            read_op(w, offset, length);
            break;
        case 8:
            flush_co(w->m);
            break;
        case 9:
            status_op(w, offset, length);
            break;
        default:
            write_op(w, offset, length);
        }
    }
    w->m->busy--;
}

/* Just before a flush most is at stake. */
static void cut_before_sync_co(void *arg) {
    struct model *m = arg;
    if (m->busy && m->cuts_done < m->shape->cuts && rng(4) == 0)
        cut_co(m);
}

static struct node *make_image(const struct shape *sh) {
    struct err e AUTO_ERR = ERR_INIT;
    /* Room that is given back is used again only after a flush, and clusters may be large. */
    struct node *file = disk_new(4 * sh->size + 24 * MIB, sh->node_flags);
    char text[256];
    snprintf(text, sizeof(text), "{\"size\": %llu%s%s}", (unsigned long long)sh->size,
             *sh->options ? ", " : "", sh->options);
    json_t *options = json_loads(text, 0, NULL);
    assert_non_null(options);
    if (format_create_co(file, &driver_qcow2, options, &e))
        print_error("%s\n", err_text(&e));
    assert_int_equal(e.code, 0);
    json_decref(options);
    disk_sync_co(file);
    ((struct disk *)file->state)->stable_size = file->size; /* room given ahead is a length only */
    return file;
}

/* Turns the empty image in `file` into one with an external data file, which is returned. */
static struct node *set_apart(struct node *file, uint64_t size) {
    struct disk *d = file->state;
    d->now[79] |= QCOW2_INCOMPAT_DATA_FILE;
    d->stable[79] |= QCOW2_INCOMPAT_DATA_FILE;
    struct node *data = disk_new(size + MIB, file->flags & NODE_NO_FLUSH);
    for (uint64_t i = 0; i < size / 2; i++) /* what the disk does not name must not be seen */
        ((struct disk *)data->state)->now[i] = ((struct disk *)data->state)->stable[i] = 0xee;
    data->size = ((struct disk *)data->state)->stable_size = size / 2;
    return data;
}

/* A layer below: every word its own number, far above those of the model's writes. */
static struct node *make_base(uint64_t size) {
    struct node *n = disk_new(size, 0);
    uint64_t *words = (uint64_t *)((struct disk *)n->state)->now;
    for (uint64_t i = 0; i < size / 8; i++)
        words[i] = (UINT64_C(1) << 40) + i;
    n->size = size;
    return n;
}

static void reads_as_model(struct model *m) {
    uint64_t *read = malloc(m->words * 8);
    assert_int_equal(disk_pread_co(m->node, 0, read, m->words * 8), 0);
    for (uint64_t w = 0; w < m->words; w++)
        if (read[w] != m->now[w]) {
            print_error("at the end word %llu is %llu instead of %llu\n", (unsigned long long)w,
                        (unsigned long long)read[w], (unsigned long long)m->now[w]);
            fail();
        }
    free(read);
}

static void run_workers_co(struct model *m) {
    const struct shape *sh = m->shape;
    struct worker *w = calloc(sh->tasks, sizeof(*w));
    struct disk *d = m->file->state, *data = m->data ? m->data->state : NULL;
    d->before_sync_co = cut_before_sync_co;
    d->arg = m;
    if (data) {
        data->before_sync_co = cut_before_sync_co;
        data->arg = m;
        data->fail_one_in = sh->fail_one_in;
    }
    m->busy = sh->tasks;
    m->cuts_done = 0;
    for (unsigned i = 0; i < sh->tasks; i++) {
        /* Borders on odd words: two tasks share the cluster there. */
        uint64_t low = m->words * i / sh->tasks, high = m->words * (i + 1) / sh->tasks;
        m->running[i] = SIZE_MAX;
        w[i] =
            (struct worker){m, i, i ? low | 3 : 0, i + 1 < sh->tasks ? high | 3 : m->words, NULL};
        w[i].buf = malloc(max_u64((w[i].high - w[i].low) * 8, 2 * MIB));
        task_spawn(loop_self(), worker_main, &w[i]);
    }
    d->fail_one_in = sh->fail_one_in;
    while (m->busy)
        task_yield_co();
    d->fail_one_in = 0;
    if (data)
        data->fail_one_in = 0;
    for (unsigned i = 0; i < sh->tasks; i++)
        free(w[i].buf);
    free(w);
}

static void reopen_co(struct model *m) {
    struct node *file = node_ref(m->file), *data = m->data ? node_ref(m->data) : NULL;
    node_unref_co(m->node);
    m->node = open_apart(file, data, OPEN_RW | OPEN_UNMAP, m->base);
    squeeze(m->shape, m->node);
    check(m->node, "reopened", !m->shape->fail_one_in);
}

static void run_shape(void *arg) {
    const struct shape *sh = arg;
    struct model m = {.shape = sh, .words = sh->size / 8};
    m.file = make_image(sh);
    m.base = sh->backing ? make_base(sh->size * 3 / 4 + 4096 + 8) : NULL;
    m.data = sh->apart ? set_apart(m.file, sh->size) : NULL;
    m.node = open_apart(m.file, m.data, OPEN_RW | OPEN_UNMAP, m.base);
    squeeze(sh, m.node);
    m.now = calloc(m.words, 8);
    m.durable = calloc(m.words, 8);
    if (m.base)
        memcpy(m.now, ((struct disk *)m.base->state)->now, m.base->size);
    memcpy(m.durable, m.now, m.words * 8);

    run_workers_co(&m);
    if (!sh->fail_one_in)
        reads_as_model(&m);
    reopen_co(&m);
    if (!sh->fail_one_in)
        reads_as_model(&m);
    memcpy(m.durable, m.now, m.words * 8);
    m.flushed_ops = m.durable_at = m.ops_n;
    run_workers_co(&m); /* over free space in pieces */
    reopen_co(&m);
    if (!sh->fail_one_in)
        reads_as_model(&m);

    node_unref_co(m.node);
    node_unref_co(m.base);
    free(m.now);
    free(m.durable);
    free(m.ops);
}

static unsigned rounds;

static void run(struct shape sh) {
    struct loop *loop;
    struct err e AUTO_ERR = ERR_INIT;
    if (loop_self()) { /* the rest of a test that failed inside its tasks */
        print_error("not run after a failure\n");
        exit(1);
    }
    for (unsigned i = 0; i < rounds; i++) {
        print_message("# %s: STRATA_SEED=%llu\n", sh.name, (unsigned long long)rng_state);
        assert_int_equal(loop_new(LOOP_AUTO, &loop, &e), 0);
        loop_run(loop, run_shape, &sh);
        loop_free(loop);
    }
}

/* ---------------------------------------------------------------- smaller matters */

static const struct shape small = {.options = "\"cluster_size\": 512", .size = MIB};

static void backing_is_recorded(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *file = make_image(&small), *n = open_on(node_ref(file), OPEN_RW, NULL);
    uint64_t word = 77, got = 0;
    char long_name[600];
    assert_int_equal(disk_pwrite_co(n, 4096, &word, 8), 0);
    assert_int_equal(driver_qcow2.format->set_backing_co(n, "base.raw", "raw", &e), 0);
    assert_string_equal(n->backing_name, "base.raw");
    /* Too long for the first cluster: refused, and the old one stays. */
    memset(long_name, 'x', sizeof(long_name));
    long_name[sizeof(long_name) - 1] = 0;
    assert_int_equal(driver_qcow2.format->set_backing_co(n, long_name, "raw", &e), -ENOSPC);
    assert_string_equal(n->backing_name, "base.raw");
    node_unref_co(n);

    n = open_on(node_ref(file), OPEN_RW, NULL);
    assert_string_equal(n->backing_name, "base.raw");
    assert_string_equal(n->backing_format, "raw");
    assert_int_equal(disk_pread_co(n, 4096, &got, 8), 0);
    assert_int_equal(got, 77);
    assert_int_equal(driver_qcow2.format->set_backing_co(n, NULL, NULL, &e), 0);
    assert_null(n->backing_name);
    node_unref_co(n);

    n = open_on(file, OPEN_CHECK, NULL);
    assert_null(n->backing_name);
    check(n, "without the name", true);
    node_unref_co(n);
}

static void reopening_writes_back_and_writes_again(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *file = make_image(&small), *n = open_on(node_ref(file), OPEN_RW, NULL);
    uint64_t word = 5, got = 0;
    assert_int_equal(disk_pwrite_co(n, 4096, &word, 8), 0);
    assert_int_equal(node_reopen_co(n, false, &e), 0);
    assert_int_equal(disk_pwrite_co(n, 4096, &word, 8), -EROFS);
    struct node *other = open_on(disk_after_cut(file), OPEN_CHECK, NULL);
    check(other, "while read-only", true);
    assert_int_equal(disk_pread_co(other, 4096, &got, 8), 0);
    assert_int_equal(got, 5);
    node_unref_co(other);
    assert_int_equal(node_reopen_co(n, true, &e), 0);
    word = 6;
    assert_int_equal(disk_pwrite_co(n, 512 * 1024, &word, 8), 0);
    assert_int_equal(disk_pread_co(n, 4096, &got, 8), 0);
    assert_int_equal(got, 5);
    node_unref_co(n);
    n = open_on(file, OPEN_CHECK, NULL);
    check(n, "at the end", true);
    assert_int_equal(disk_pread_co(n, 512 * 1024, &got, 8), 0);
    assert_int_equal(got, 6);
    node_unref_co(n);
}

/* Two flushes at once are served by as many write-backs as it takes, not by one each. */
static void one_flush(void *arg) {
    unsigned *left = ((void **)arg)[1];
    assert_int_equal(disk_flush_co(((void **)arg)[0]), 0);
    --*left;
}

static void flushes_share_a_write_back(void *arg) {
    struct node *file = make_image(&small), *n = open_on(node_ref(file), OPEN_RW, NULL);
    unsigned left = 20;
    void *args[2] = {n, &left};
    uint64_t word = 5;
    assert_int_equal(disk_pwrite_co(n, 4096, &word, 8), 0);
    unsigned before = ((struct disk *)file->state)->flushes;
    for (unsigned i = 0; i < 20; i++)
        task_spawn(loop_self(), one_flush, args);
    while (left)
        task_yield_co();
    /* The first runs alone, the others share: at most 3 barriers each. */
    assert_in_range(((struct disk *)file->state)->flushes - before, 2, 6);
    node_unref_co(n);
    node_unref_co(file);
}

/*
 * Shrinking and emptying: at every barrier the storage as power cuts would leave it is opened and
 * checked.  Words below `keep` read as they did; those that are to go as before, as zeros, or as
 * what lies below.
 */
struct drop {
    struct node *file, *base;
    uint64_t *content, *below; /* of the whole disk, in words */
    uint64_t words, keep;
    unsigned cuts;
};

static void cut_while_dropping_co(void *arg) {
    struct drop *d = arg;
    for (int i = 0; i < 3; i++, d->cuts++) {
        struct node *n = open_on(disk_after_cut(d->file), OPEN_CHECK, d->base);
        uint64_t words = n->size / 8, *read = malloc(n->size);
        check(n, "dropping", false);
        assert_int_equal(disk_pread_co(n, 0, read, n->size), 0);
        for (uint64_t w = 0; w < words; w++) {
            bool good =
                read[w] == d->content[w] || (w >= d->keep && (!read[w] || read[w] == d->below[w]));
            if (!good)
                print_error("word %llu is %llu\n", (unsigned long long)w,
                            (unsigned long long)read[w]);
            assert_true(good);
        }
        free(read);
        node_unref_co(n);
    }
}

static struct node *drop_begin_co(struct drop *d, const struct shape *sh) {
    d->file = make_image(sh);
    d->words = sh->size / 8;
    d->base = sh->backing ? make_base(sh->size) : NULL;
    d->content = calloc(d->words, 8);
    d->below = calloc(d->words, 8);
    if (d->base) {
        memcpy(d->below, ((struct disk *)d->base->state)->now, sh->size);
        memcpy(d->content, d->below, sh->size);
    }
    struct node *n = open_on(node_ref(d->file), OPEN_RW | OPEN_UNMAP, d->base);
    for (int i = 0; i < 120; i++) {
        uint64_t at = rng(d->words), length = 1 + rng(min_u64(d->words - at, 2000));
        for (uint64_t w = at; w < at + length; w++)
            d->content[w] = 1000 + rng(1 << 30);
        assert_int_equal(disk_pwrite_co(n, at * 8, d->content + at, length * 8), 0);
    }
    assert_int_equal(disk_flush_co(n), 0);
    return n;
}

static void drop_end_co(struct drop *d, struct node *n) {
    struct disk *disk = d->file->state;
    disk->before_sync_co = NULL;
    assert_true(d->cuts > 0);
    node_unref_co(n);
    n = open_on(d->file, OPEN_CHECK, d->base);
    check(n, "at the end", true);
    node_unref_co(n);
    node_unref_co(d->base);
    free(d->content);
    free(d->below);
}

static void watch_cuts(struct drop *d) {
    struct disk *disk = d->file->state;
    disk->before_sync_co = cut_while_dropping_co;
    disk->arg = d;
}

static const struct shape drop_shapes[] = {
    {.options = "\"cluster_size\": 512", .size = MIB},
    {.options = "\"cluster_size\": 512, \"refcount_bits\": 1", .size = MIB, .backing = true},
    {.options = "\"cluster_size\": 4096, \"refcount_bits\": 64", .size = 2 * MIB},
    {.options = "\"cluster_size\": 4096, \"compat\": \"0.10\"", .size = MIB, .backing = true},
};

static void shrinking_survives_power_cuts(void *arg) {
    for (size_t i = 0; i < sizeof(drop_shapes) / sizeof(drop_shapes[0]); i++) {
        struct err e AUTO_ERR = ERR_INIT;
        struct drop d = {0};
        struct node *n = drop_begin_co(&d, &drop_shapes[i]);
        watch_cuts(&d);
        while (n->size > 4096) {
            d.keep = rng(n->size / 512) * 64;
            uint64_t before = n->size / 8;
            assert_int_equal(disk_resize_co(n, d.keep * 8, PREALLOC_OFF, &e), 0);
            memset(d.content + d.keep, 0, (before - d.keep) * 8);
            memset(d.below + d.keep, 0, (before - d.keep) * 8);
            assert_int_equal(disk_flush_co(n), 0);
        }
        drop_end_co(&d, n);
    }
}

/*
 * Growth over bytes that an earlier cut left in its last cluster, and over a longer layer below: at
 * no barrier does a disk, old or new, show them.
 */
static void growing_survives_power_cuts(void *arg) {
    for (size_t i = 0; i < sizeof(drop_shapes) / sizeof(drop_shapes[0]); i++) {
        struct err e AUTO_ERR = ERR_INIT;
        struct drop d = {0};
        struct node *n = drop_begin_co(&d, &drop_shapes[i]);
        struct disk *disk = d.file->state;
        for (int round = 0; round < 6; round++) {
            uint64_t keep = rng(n->size / 512) * 64;
            assert_int_equal(disk_resize_co(n, keep * 8, PREALLOC_OFF, &e), 0);
            memset(d.content + keep, 0, (d.words - keep) * 8);
            assert_int_equal(disk_flush_co(n), 0);
            d.keep = d.words;
            watch_cuts(&d);
            uint64_t size = keep * 8 + (1 + rng((d.words - keep) / 64)) * 512;
            assert_int_equal(disk_resize_co(n, size, PREALLOC_OFF, &e), 0);
            disk->before_sync_co = NULL;
            for (uint64_t w = size / 16; w < size / 8; w++)
                d.content[w] = 1000 + rng(1 << 30);
            uint64_t from = size / 16 * 8;
            assert_int_equal(disk_pwrite_co(n, from, d.content + from / 8, size - from), 0);
            assert_int_equal(disk_flush_co(n), 0);
        }
        drop_end_co(&d, n);
    }
}

static void emptying_survives_power_cuts(void *arg) {
    for (size_t i = 0; i < sizeof(drop_shapes) / sizeof(drop_shapes[0]); i++) {
        struct err e AUTO_ERR = ERR_INIT;
        struct drop d = {0};
        struct node *n = drop_begin_co(&d, &drop_shapes[i]);
        uint64_t *read = malloc(n->size);
        watch_cuts(&d);
        node_quiesce_co(n);
        assert_int_equal(driver_qcow2.format->empty_co(n, &e), 0);
        node_resume(n);
        assert_int_equal(disk_flush_co(n), 0);
        assert_int_equal(disk_pread_co(n, 0, read, n->size), 0);
        assert_memory_equal(read, d.below, n->size);
        free(read);
        drop_end_co(&d, n);
    }
}

static void in_a_loop(task_fn *fn) {
    struct loop *loop;
    struct err e AUTO_ERR = ERR_INIT;
    assert_int_equal(loop_new(LOOP_AUTO, &loop, &e), 0);
    loop_run(loop, fn, NULL);
    loop_free(loop);
}
#define SMALL(fn)                                                                                  \
    static void test_##fn(void **state) {                                                          \
        in_a_loop(fn);                                                                             \
    }
SMALL(backing_is_recorded)
SMALL(reopening_writes_back_and_writes_again)
SMALL(flushes_share_a_write_back)
SMALL(shrinking_survives_power_cuts)
SMALL(growing_survives_power_cuts)
SMALL(emptying_survives_power_cuts)

#define CLUSTERS(bytes, more) "\"cluster_size\": " #bytes more
#define BITS(n) ", \"refcount_bits\": " #n
#define V2 ", \"compat\": \"0.10\""

#define SHAPE(fn, ...)                                                                             \
    static void fn(void **state) {                                                                 \
        run((struct shape){.name = #fn, __VA_ARGS__});                                             \
    }

SHAPE(clusters_of_512, .options = CLUSTERS(512, ""), .size = MIB, .tasks = 5, .ops = 300,
      .cuts = 30)
SHAPE(clusters_of_4k, .options = CLUSTERS(4096, ""), .size = 4 * MIB, .tasks = 5, .ops = 300,
      .cuts = 30)
SHAPE(clusters_of_64k, .options = CLUSTERS(65536, ""), .size = 8 * MIB + 512, .tasks = 5,
      .ops = 300, .cuts = 20)
SHAPE(clusters_of_2m, .options = CLUSTERS(2097152, ""), .size = 24 * MIB, .tasks = 3, .ops = 60,
      .cuts = 5)
SHAPE(counts_of_1_bit, .options = CLUSTERS(512, BITS(1)), .size = MIB, .tasks = 5, .ops = 300,
      .cuts = 30)
SHAPE(counts_of_2_bits, .options = CLUSTERS(4096, BITS(2)), .size = 4 * MIB, .tasks = 5, .ops = 300,
      .cuts = 20)
SHAPE(counts_of_8_bits, .options = CLUSTERS(4096, BITS(8)), .size = 4 * MIB, .tasks = 5, .ops = 300,
      .cuts = 20)
SHAPE(counts_of_64_bits, .options = CLUSTERS(512, BITS(64)), .size = 2 * MIB, .tasks = 5,
      .ops = 300, .cuts = 30)
SHAPE(tables_that_grow, .options = CLUSTERS(512, BITS(64)), .size = 12 * MIB, .tasks = 6,
      .ops = 800, .cuts = 30, .longest = 16 * KIB)
SHAPE(a_layer_below, .options = CLUSTERS(4096, ""), .size = 4 * MIB, .tasks = 5, .ops = 300,
      .cuts = 20, .backing = true)
#define SUBCLUSTERS ", \"extended_l2\": true"
SHAPE(subclusters_of_512, .options = CLUSTERS(16384, SUBCLUSTERS), .size = 4 * MIB, .tasks = 5,
      .ops = 300, .cuts = 30, .longest = 64 * KIB)
SHAPE(subclusters_over_a_layer, .options = CLUSTERS(16384, SUBCLUSTERS), .size = 4 * MIB + 512,
      .tasks = 5, .ops = 300, .cuts = 20, .backing = true, .longest = 64 * KIB)
SHAPE(subclusters_in_room_given_ahead,
      .options = CLUSTERS(65536, SUBCLUSTERS ", \"preallocation\": \"metadata\""), .size = 4 * MIB,
      .tasks = 5, .ops = 300, .cuts = 10, .longest = 64 * KIB)
SHAPE(subclusters_on_storage_that_fails, .options = CLUSTERS(16384, SUBCLUSTERS BITS(8)),
      .size = 4 * MIB, .tasks = 5, .ops = 400, .cuts = 10, .fail_one_in = 40, .longest = 64 * KIB,
      .backing = true)
SHAPE(data_in_a_file_of_its_own, .options = CLUSTERS(4096, ""), .size = 4 * MIB + 512, .tasks = 5,
      .ops = 300, .cuts = 30, .apart = true, .longest = 64 * KIB)
SHAPE(subclusters_in_a_file_of_their_own_over_a_layer, .options = CLUSTERS(16384, SUBCLUSTERS),
      .size = 4 * MIB, .tasks = 5, .ops = 300, .cuts = 20, .apart = true, .backing = true,
      .longest = 64 * KIB)
SHAPE(a_data_file_that_fails, .options = CLUSTERS(4096, ""), .size = 4 * MIB, .tasks = 5,
      .ops = 300, .cuts = 10, .apart = true, .fail_one_in = 40, .longest = 64 * KIB)
SHAPE(version_2, .options = CLUSTERS(4096, V2), .size = 4 * MIB, .tasks = 5, .ops = 300, .cuts = 20)
SHAPE(version_2_and_a_layer_below, .options = CLUSTERS(4096, V2), .size = 4 * MIB, .tasks = 5,
      .ops = 300, .cuts = 20, .backing = true)
SHAPE(thrown_away, .options = CLUSTERS(4096, ""), .size = 4 * MIB, .tasks = 5, .ops = 300,
      .node_flags = NODE_NO_FLUSH, .backing = true)

SHAPE(storage_that_fails, .options = CLUSTERS(4096, BITS(8)), .size = 4 * MIB, .tasks = 5,
      .ops = 400, .cuts = 20, .fail_one_in = 40, .longest = 64 * KIB)
SHAPE(storage_that_fails_while_tables_grow, .options = CLUSTERS(512, BITS(64)), .size = 12 * MIB,
      .tasks = 6, .ops = 800, .cuts = 12, .fail_one_in = 300, .longest = 16 * KIB)

SHAPE(a_cache_too_small, .options = CLUSTERS(512, BITS(64)), .size = 8 * MIB, .tasks = 6,
      .ops = 600, .cuts = 20, .longest = 16 * KIB, .slices = 24)
SHAPE(a_cache_too_small_thrown_away, .options = CLUSTERS(512, ""), .size = 8 * MIB, .tasks = 6,
      .ops = 600, .node_flags = NODE_NO_FLUSH, .longest = 16 * KIB, .slices = 24)
SHAPE(a_cache_too_small_over_storage_that_fails, .options = CLUSTERS(512, BITS(64)),
      .size = 8 * MIB, .tasks = 6, .ops = 600, .cuts = 10, .fail_one_in = 200, .longest = 16 * KIB,
      .slices = 24)

int main(void) {
    const char *seed = getenv("STRATA_SEED"), *times = getenv("STRATA_ROUNDS");
    rng_state = seed ? strtoull(seed, NULL, 0) : (uint64_t)time(NULL) * 2654435761u + 1;
    rounds = times ? (unsigned)atoi(times) : 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_backing_is_recorded),
        cmocka_unit_test(test_reopening_writes_back_and_writes_again),
        cmocka_unit_test(test_flushes_share_a_write_back),
        cmocka_unit_test(test_shrinking_survives_power_cuts),
        cmocka_unit_test(test_growing_survives_power_cuts),
        cmocka_unit_test(test_emptying_survives_power_cuts),
        cmocka_unit_test(clusters_of_512),
        cmocka_unit_test(clusters_of_4k),
        cmocka_unit_test(clusters_of_64k),
        cmocka_unit_test(clusters_of_2m),
        cmocka_unit_test(counts_of_1_bit),
        cmocka_unit_test(counts_of_2_bits),
        cmocka_unit_test(counts_of_8_bits),
        cmocka_unit_test(counts_of_64_bits),
        cmocka_unit_test(tables_that_grow),
        cmocka_unit_test(a_layer_below),
        cmocka_unit_test(subclusters_of_512),
        cmocka_unit_test(subclusters_over_a_layer),
        cmocka_unit_test(subclusters_in_room_given_ahead),
        cmocka_unit_test(subclusters_on_storage_that_fails),
        cmocka_unit_test(data_in_a_file_of_its_own),
        cmocka_unit_test(subclusters_in_a_file_of_their_own_over_a_layer),
        cmocka_unit_test(a_data_file_that_fails),
        cmocka_unit_test(version_2),
        cmocka_unit_test(version_2_and_a_layer_below),
        cmocka_unit_test(thrown_away),
        cmocka_unit_test(storage_that_fails),
        cmocka_unit_test(storage_that_fails_while_tables_grow),
        cmocka_unit_test(a_cache_too_small),
        cmocka_unit_test(a_cache_too_small_thrown_away),
        cmocka_unit_test(a_cache_too_small_over_storage_that_fails),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
