/* SPDX-License-Identifier: MIT */
/*
 * The crash laboratory: what could a power cut have left behind?
 *
 * A workload of concurrent guest requests runs on a format over the recorder (recorder.h).  Then
 * states are built and judged.  Fault model: a write counts as durable once a flush that began
 * after the write's end has itself ended; of all others that had begun before the cut, any subset
 * may have reached the disk, each of them whole or in part (512-byte sectors).
 *
 * Crash moments: just before and just after the end of every flush, below and above the format.
 * Just before, the most writes are open; their subsets contain every state of the whole window
 * between two flushes, prefixes included.  A window with few open writes is tried exhaustively as
 * far as the budget allows, a larger one by chosen subsets (none, all, each prefix end, each single
 * one missing or alone) and seeded random ones, one in three torn.
 *
 * A state passes when: it opens read-write; check finds no corruption (leaks are allowed); every
 * block reads as a version that the model allows; and after a further write and flush check is
 * still without corruption.
 *
 * The model: a block is 512 bytes; requests on one block never overlap in time, so its versions
 * form a list.  A version is settled at the end of the first guest flush that began after the
 * version's end (FUA: at its own end).  Everything from the newest settled version on, begun before
 * the cut, is allowed; a discard may leave what was there or zeros.
 *
 *     lab [-n STATES] [-s SEED] [-p PLANT] [WORKLOAD ...]        exit 1 when a state failed
 *
 * -x stops at the first failed state.  -p breaks a rule on purpose (base/plant.h; lab-planted
 * only), -l lists those; -d writes every -e-th state to a folder, for a checker that is not ours.
 */
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <jansson.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "base/plant.h"
#include "disk/engine.h"
#include "recorder.h"
#include "runtime/loop.h"

#define BLOCK 512u
#define DISK_MAX (4 * MIB)
#define BLOCKS (DISK_MAX / BLOCK)
#define TASKS 6

/* ---------------------------------------------------------------- workloads */

struct workload {
    const char *name;
    const char *options; /* of creation, "key=value,..." */
    uint64_t size;
    unsigned requests; /* of each task */
    /* shares of each request, in percent; the rest are plain writes */
    unsigned flush, fua, zero, discard, coded, resize;
    unsigned max_blocks; /* longest write */
    uint64_t span;       /* requests stay below this offset, so that they meet again; 0: size */
    bool drift; /* that span moves over the disk: tables are made late, in clusters used before */
};

static const struct workload workloads[] = {
    {"alloc-64k", "cluster_size=64k", 4 * MIB, 60, 12, 3, 0, 0, 0, 0, 200, 0},
    {"alloc-4k", "cluster_size=4k", 2 * MIB, 80, 12, 3, 0, 0, 0, 0, 40, 0},
    {"alloc-512", "cluster_size=512", MIB, 80, 12, 3, 0, 0, 0, 0, 12, 0},
    {"overwrite", "cluster_size=4k", 2 * MIB, 90, 15, 5, 0, 0, 0, 0, 16, 64 * KIB},
    {"zero-discard", "cluster_size=4k", 2 * MIB, 90, 12, 3, 20, 20, 0, 0, 40, 256 * KIB},
    {"zero-discard-v2", "cluster_size=4k,compat=0.10", 2 * MIB, 90, 12, 3, 20, 20, 0, 0, 40,
     256 * KIB},
    {"coded", "cluster_size=4k", 2 * MIB, 90, 12, 3, 5, 5, 40, 0, 24, 256 * KIB},
    {"coded-zstd-64k", "cluster_size=64k,compression_type=zstd", 4 * MIB, 50, 12, 3, 5, 5, 40, 0,
     150, MIB},
    {"refcount-1", "cluster_size=4k,refcount_bits=1", 2 * MIB, 80, 12, 3, 10, 15, 20, 0, 40,
     256 * KIB},
    {"refcount-64", "cluster_size=512,refcount_bits=64", MIB, 80, 12, 3, 10, 15, 10, 0, 12,
     128 * KIB},
    {"churn-512", "cluster_size=512", 2 * MIB, 120, 12, 3, 8, 30, 0, 0, 60, 128 * KIB, true},
    {"table-growth", "cluster_size=512,refcount_bits=64", 4 * MIB, 60, 12, 3, 3, 3, 0, 0, 300, 0},
    {"resize", "cluster_size=512", 1600 * KIB, 70, 12, 3, 5, 10, 5, 6, 12, 0},
};

struct version {
    uint32_t id; /* 0: zeros */
    bool maybe;  /* a discard: what was there may stay */
    bool fua;
    uint64_t start, end, settled;
};
struct history {
    struct version *v;
    unsigned count, cap;
    bool busy;
};
struct guest_flush {
    uint64_t start, end;
};

struct lab {
    const struct workload *w;
    struct node *disk, *file;
    struct recorder *rec;
    unsigned seed;
    uint32_t next_id;
    struct history block[BLOCKS];
    struct guest_flush *flush;
    size_t flushes;
    bool resizing;
    uint8_t *start_image; /* before the workload */
    uint64_t start_size;
    unsigned long states, failed, budget;
    uint8_t *image;         /* of the state being judged; zeros behind bytes_used */
    uint64_t bytes_used;    /* no state reaches beyond */
    const char *sample_dir; /* every sample_every-th state is written there; NULL: none */
    unsigned long sample_every;
    bool first_only;
    const char *save; /* where a failed state is written; NULL: nowhere */
};

static unsigned rnd(struct lab *l, unsigned n) {
    l->seed = l->seed * 1664525u + 1013904223u;
    return (unsigned)(((uint64_t)l->seed * n) >> 32);
}

static void fill_block(uint8_t *p, uint32_t id) {
    for (unsigned i = 0; i < BLOCK; i += 8)
        le64_store(p + i, id);
}

static void must(int r, const char *what) {
    if (r < 0) {
        fprintf(stderr, "lab: %s: %s\n", what, strerror(-r));
        abort();
    }
}

/* ---------------------------------------------------------------- requests and the model */

static bool take(struct lab *l, uint64_t first, uint64_t count, uint32_t id, bool maybe, bool fua) {
    for (uint64_t b = first; b < first + count; b++)
        if (l->block[b].busy)
            return false;
    uint64_t now = recorder_tick(l->rec);
    for (uint64_t b = first; b < first + count; b++) {
        struct history *h = &l->block[b];
        if (h->count == h->cap) {
            h->cap = h->cap ? h->cap * 2 : 4;
            h->v = realloc(h->v, h->cap * sizeof(*h->v));
        }
        h->v[h->count++] = (struct version){.id = id,
                                            .maybe = maybe,
                                            .fua = fua,
                                            .start = now,
                                            .end = UINT64_MAX,
                                            .settled = UINT64_MAX};
        h->busy = true;
    }
    return true;
}

static void done(struct lab *l, uint64_t first, uint64_t count) {
    uint64_t now = recorder_tick(l->rec);
    for (uint64_t b = first; b < first + count; b++) {
        struct history *h = &l->block[b];
        h->v[h->count - 1].end = now;
        if (h->v[h->count - 1].fua)
            h->v[h->count - 1].settled = now;
        h->busy = false;
    }
}

static void do_flush(struct lab *l) {
    size_t i = l->flushes++;
    l->flush = realloc(l->flush, l->flushes * sizeof(*l->flush));
    l->flush[i] = (struct guest_flush){recorder_tick(l->rec), UINT64_MAX};
    must(disk_flush_co(l->disk), "flush");
    l->flush[i].end = recorder_tick(l->rec);
}

static void do_write(struct lab *l, uint64_t first, uint64_t count, bool fua) {
    uint32_t id = ++l->next_id;
    if (!take(l, first, count, id, false, fua))
        return;
    uint8_t *buf = buf_get(count * BLOCK);
    for (uint64_t i = 0; i < count; i++)
        fill_block(buf + i * BLOCK, id);
    struct iovec v = {buf, count * BLOCK};
    must(disk_pwritev_co(l->disk, first * BLOCK, count * BLOCK, &v, 1, fua ? IO_FUA : 0), "write");
    buf_put(buf, count * BLOCK);
    done(l, first, count);
}

static void do_zero(struct lab *l, uint64_t first, uint64_t count) {
    if (!take(l, first, count, 0, false, false))
        return;
    must(disk_zero_co(l->disk, first * BLOCK, count * BLOCK, rnd(l, 2) ? ZERO_MAY_UNMAP : 0),
         "zero");
    done(l, first, count);
}

static void do_discard(struct lab *l, uint64_t first, uint64_t count) {
    if (!take(l, first, count, 0, true, false))
        return;
    must(disk_discard_co(l->disk, first * BLOCK, count * BLOCK), "discard");
    done(l, first, count);
}

static void do_coded(struct lab *l, uint64_t at) {
    uint32_t unit = l->disk->granularity;
    uint64_t offset = align_down(at * BLOCK, unit);
    uint64_t count = min_u64(unit, l->disk->size - offset) / BLOCK;
    uint32_t id = ++l->next_id;
    if (!take(l, offset / BLOCK, count, id, false, false))
        return;
    uint8_t *in = buf_get(unit), *out = buf_get(unit);
    for (uint64_t i = 0; i < unit / BLOCK; i++)
        fill_block(in + i * BLOCK, i < count ? id : 0);
    ssize_t n = l->disk->codec->encode(in, unit, out, unit);
    must(n < 0 ? (int)n : 0, "encode");
    must(disk_write_coded_co(l->disk, offset, out, (uint32_t)n), "coded write");
    buf_put(in, unit);
    buf_put(out, unit);
    done(l, offset / BLOCK, count);
}

static void do_resize(struct lab *l) {
    struct err e AUTO_ERR = ERR_INIT;
    uint64_t size = min_u64(DISK_MAX, l->disk->size + (1 + rnd(l, 256)) * BLOCK);
    if (l->resizing)
        return;
    l->resizing = true;
    if (disk_resize_co(l->disk, size, PREALLOC_OFF, &e) < 0) {
        fprintf(stderr, "lab: resize: %s\n", err_text(&e));
        abort();
    }
    l->resizing = false;
}

static void guest(void *arg) {
    struct lab *l = arg;
    const struct workload *w = l->w;
    for (unsigned i = 0; i < w->requests; i++) {
        uint64_t blocks = (w->span ? min_u64(w->span, l->disk->size) : l->disk->size) / BLOCK;
        uint64_t count = 1 + rnd(l, w->max_blocks), first = rnd(l, (unsigned)blocks);
        if (w->drift)
            first += (l->disk->size / BLOCK - blocks) * i / w->requests;
        unsigned what = rnd(l, 100), edge = 0;
        count = min_u64(count, l->disk->size / BLOCK - first);
        if (what < (edge += w->flush))
            do_flush(l);
        else if (what < (edge += w->zero))
            do_zero(l, first, count);
        else if (what < (edge += w->discard))
            do_discard(l, first, count);
        else if (what < (edge += w->coded))
            do_coded(l, first);
        else if (what < (edge += w->resize))
            do_resize(l);
        else
            do_write(l, first, count, what < edge + w->fua);
        if (rnd(l, 3) == 0)
            task_yield_co();
    }
}

static void settle_versions(struct lab *l) {
    for (uint64_t b = 0; b < BLOCKS; b++) {
        for (unsigned i = 0; i < l->block[b].count; i++) {
            struct version *v = &l->block[b].v[i];
            for (size_t f = 0; f < l->flushes; f++)
                if (l->flush[f].start > v->end && l->flush[f].end < v->settled)
                    v->settled = l->flush[f].end;
        }
    }
}

/* ---------------------------------------------------------------- judging a state */

static bool allowed(const struct lab *l, uint64_t b, uint64_t moment, uint32_t id) {
    const struct history *h = &l->block[b];
    bool zero_ok = true; /* nothing settled yet: the start, zeros */
    unsigned from = 0;
    for (unsigned i = 0; i < h->count; i++)
        if (h->v[i].settled <= moment && !h->v[i].maybe) {
            from = i;
            zero_ok = false;
        }
    if (zero_ok && id == 0)
        return true;
    for (unsigned i = from; i < h->count && h->v[i].start <= moment; i++)
        if (h->v[i].id == id)
            return true;
    return false;
}

static int open_state_co(struct lab *l, uint8_t *image, uint64_t size, struct node **out,
                         struct err *e) {
    struct open_req req = {.flags = OPEN_RW | OPEN_UNMAP};
    struct node *file = node_new(&driver_recorder);
    file->flags = NODE_RW | NODE_UNMAP;
    file->perm = file->shared = PERM_ALL;
    file->size = size;
    file->storage_flags = STORAGE_ZERO_INIT;
    *(struct recorder *)file->state = (struct recorder){.bytes = image, .quiet = true};
    int r = node_open_on_co(file, l->disk->drv, NULL, &req, out, e);
    if (r < 0)
        node_unref_co(file);
    return r;
}

static void first_problem(void *arg, bool is_leak, const char *text) {
    char *first = arg;
    if (!is_leak && !first[0])
        snprintf(first, 160, "%s", text);
}

static int check_state_co(struct node *n, const char *when, char *why, size_t room) {
    char first[160] = "";
    struct check_result c = {.report = first_problem, .arg = first};
    struct err e AUTO_ERR = ERR_INIT;
    int r = n->drv->format->check_co(n, &c, &e);
    if (r < 0) {
        snprintf(why, room, "%s: check cannot run: %s", when, err_text(&e));
        return -1;
    }
    if (c.corruptions || c.check_errors) {
        snprintf(why, room, "%s: %llu corruptions: %s", when, (unsigned long long)c.corruptions,
                 first);
        return -1;
    }
    return 0;
}

static int compare_state_co(struct lab *l, struct node *n, uint64_t moment, char *why,
                            size_t room) {
    static uint8_t got[DISK_MAX];
    uint64_t size = min_u64(n->size, DISK_MAX);
    int r = disk_pread_co(n, 0, got, size);
    if (r < 0) {
        snprintf(why, room, "reading: %s", strerror(-r));
        return -1;
    }
    for (uint64_t b = 0; b < size / BLOCK; b++) {
        uint8_t want[BLOCK];
        uint32_t id = le32_load(got + b * BLOCK);
        fill_block(want, id);
        if (memcmp(want, got + b * BLOCK, BLOCK) || !allowed(l, b, moment, id)) {
            snprintf(why, room, "block %llu reads as version %u", (unsigned long long)b, id);
            return -1;
        }
    }
    return 0;
}

/* The image is used again: what was left must not make new writes corrupt anything. */
static int reuse_state_co(struct lab *l, struct node *n, char *why, size_t room) {
    uint8_t buf[BLOCK * 3];
    memset(buf, 0xee, sizeof(buf));
    for (int i = 0; i < 4; i++) {
        uint64_t at = rnd(l, (unsigned)((n->size - sizeof(buf)) / BLOCK)) * (uint64_t)BLOCK;
        int r = disk_pwrite_co(n, at, buf, sizeof(buf));
        if (r < 0) {
            snprintf(why, room, "writing afterwards: %s", strerror(-r));
            return -1;
        }
    }
    must(disk_flush_co(n), "flush afterwards");
    return check_state_co(n, "afterwards", why, room);
}

static bool write_image(const char *name, const uint8_t *image, uint64_t size) {
    FILE *f = fopen(name, "w");
    bool ok = f && fwrite(image, 1, size, f) == size;
    return f && !fclose(f) && ok;
}

/* For an independent checker: states as they are before anybody opens them. */
static void sample(const struct lab *l, const uint8_t *image, uint64_t size) {
    char name[512];
    if (!l->sample_dir || l->states % l->sample_every)
        return;
    snprintf(name, sizeof(name), "%s/%s-%lu.qcow2", l->sample_dir, l->w->name, l->states);
    if (!write_image(name, image, size))
        must(-EIO, name);
}

static void judge_co(struct lab *l, uint8_t *image, uint64_t size, uint64_t moment) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = NULL;
    char why[320] = "";
    int bad = 0;
    l->states++;
    sample(l, image, size);
    if (open_state_co(l, image, size, &n, &e) < 0) {
        snprintf(why, sizeof(why), "opening: %s", err_text(&e));
        bad = -1;
    }
    if (!bad)
        bad = check_state_co(n, "check", why, sizeof(why));
    if (!bad)
        bad = compare_state_co(l, n, moment, why, sizeof(why));
    if (!bad && l->states % 4 == 0)
        bad = reuse_state_co(l, n, why, sizeof(why));
    if (n && n->file->size > l->bytes_used) /* the next state finds zeros there again */
        memset(image + l->bytes_used, 0, n->file->size - l->bytes_used);
    node_unref_co(n);
    if (!bad)
        return;
    if (l->failed++ < 3)
        printf("  %s: moment %llu, state %lu: %s\n", l->w->name, (unsigned long long)moment,
               l->states, why);
    if (l->save && write_image(l->save, image, size))
        printf("  the image, as used since, is in %s\n", l->save);
    l->save = NULL;
}

/* ---------------------------------------------------------------- building states */

struct window {
    const struct record **open; /* begun, not durable */
    size_t count;
};

static void state_co(struct lab *l, const struct window *w, const uint8_t *base, uint64_t base_size,
                     const uint8_t *chosen, bool torn, uint64_t moment) {
    uint8_t *image = l->image;
    uint64_t size = base_size;
    memset(image + base_size, 0, l->bytes_used - base_size);
    memcpy(image, base, base_size);
    for (size_t i = 0; i < w->count; i++) {
        if (!chosen[i])
            continue;
        uint64_t sectors = UINT64_MAX;
        if (torn && rnd(l, 3) == 0)
            sectors = (uint64_t)rnd(l, UINT32_MAX) << 32 | rnd(l, UINT32_MAX);
        record_apply(w->open[i], image, &size, sectors);
    }
    judge_co(l, image, size, moment);
}

/* The i-th chosen subset of a window; false when there are no more of them. */
static bool pattern(size_t count, size_t i, uint8_t *chosen) {
    if (i < 2) {
        memset(chosen, (int)i, count);
        return true;
    }
    i -= 2;
    size_t kind = i / count, k = i % count;
    for (size_t j = 0; j < count; j++)
        chosen[j] = kind == 0 ? j < k : kind == 1 ? j != k : j == k;
    return kind < 3;
}

static void window_co(struct lab *l, const struct window *w, const uint8_t *base,
                      uint64_t base_size, uint64_t moment, unsigned long budget) {
    static uint8_t chosen[4096];
    if (w->count > sizeof(chosen))
        abort();
    if (w->count <= 12 && (1ul << w->count) <= budget) {
        for (unsigned long set = 0; set < 1ul << w->count; set++) {
            for (size_t i = 0; i < w->count; i++)
                chosen[i] = set >> i & 1;
            state_co(l, w, base, base_size, chosen, false, moment);
        }
        return;
    }
    for (unsigned long n = 0; n < budget; n++) {
        /* Half of the budget for the chosen patterns, spread over them, the rest by chance. */
        size_t patterns = 2 + 3 * w->count;
        size_t pick = budget / 2 >= patterns ? n : n < 2 ? n : rnd(l, (unsigned)patterns);
        if (n >= budget / 2 || !pattern(w->count, pick, chosen)) {
            unsigned share = 1 + rnd(l, 15);
            for (size_t i = 0; i < w->count; i++)
                chosen[i] = rnd(l, 16) < share;
        }
        state_co(l, w, base, base_size, chosen, n % 3 == 2, moment);
    }
}

static int by_value(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static size_t crash_moments(const struct lab *l, uint64_t **out) {
    uint64_t *m = malloc((l->rec->count * 2 + l->flushes + 1) * sizeof(*m));
    size_t n = 0;
    for (size_t i = 0; i < l->rec->count; i++)
        if (l->rec->log[i].kind == RECORD_FLUSH) {
            m[n++] = l->rec->log[i].end - 1;
            m[n++] = l->rec->log[i].end;
        }
    for (size_t i = 0; i < l->flushes; i++)
        m[n++] = l->flush[i].end;
    m[n++] = l->rec->now;
    qsort(m, n, sizeof(*m), by_value);
    *out = m;
    return n;
}

static void replay_co(struct lab *l) {
    uint64_t *moment, size = l->start_size;
    size_t moments = crash_moments(l, &moment);
    uint8_t *base = calloc(1, RECORDER_BYTES_MAX);
    bool *applied = calloc(l->rec->count, sizeof(*applied));
    struct window w = {.open = calloc(l->rec->count, sizeof(*w.open))};
    memcpy(base, l->start_image, l->start_size);
    l->image = calloc(1, RECORDER_BYTES_MAX);
    for (size_t m = 0; m < moments && !(l->failed && l->first_only); m++) {
        w.count = 0;
        for (size_t i = 0; i < l->rec->count; i++) {
            const struct record *x = &l->rec->log[i];
            if (applied[i] || x->kind == RECORD_FLUSH || x->start > moment[m])
                continue;
            if (x->durable <= moment[m]) {
                record_apply(x, base, &size, UINT64_MAX);
                applied[i] = true;
            } else {
                w.open[w.count++] = x;
            }
        }
        unsigned long left = l->budget > l->states ? l->budget - l->states : 0;
        window_co(l, &w, base, size, moment[m], max_u64(1, left / (moments - m)));
    }
    free(l->image);
    free(w.open);
    free(applied);
    free(base);
    free(moment);
}

/* ---------------------------------------------------------------- one workload */

static void workload_co(void *arg) {
    struct lab *l = arg;
    struct err e AUTO_ERR = ERR_INIT;
    struct task_group group;
    struct open_req req = {.flags = OPEN_RW | OPEN_UNMAP};
    json_t *options = NULL;
    struct node *file = node_new(&driver_recorder);
    file->flags = NODE_RW | NODE_UNMAP;
    file->perm = file->shared = PERM_ALL;
    must(driver_recorder.open_co(file, NULL, &e), "recorder");
    l->rec = file->state;
    l->rec->seed = l->seed;
    must(opt_parse_keyval(l->w->options, NULL, &options, &e), "options");
    json_object_set_new(options, "size", json_integer((json_int_t)l->w->size));
    must(format_create_co(file, driver_find("qcow2"), options, &e), err_text(&e));
    json_decref(options);
    must(node_open_on_co(file, driver_find("qcow2"), NULL, &req, &l->disk, &e), err_text(&e));
    l->file = l->disk->file;
    must(disk_flush_co(l->disk), "flush");
    recorder_clear(l->rec);
    l->start_size = l->file->size;
    l->start_image = malloc(RECORDER_BYTES_MAX);
    memcpy(l->start_image, l->rec->bytes, RECORDER_BYTES_MAX);

    task_group_init(&group);
    for (int i = 0; i < TASKS; i++)
        task_group_spawn(&group, loop_self(), guest, l);
    task_group_wait_co(&group);
    recorder_settle(l->rec);
    l->bytes_used = l->start_size;
    for (size_t i = 0; i < l->rec->count; i++)
        l->bytes_used = max_u64(l->bytes_used, l->rec->log[i].offset + l->rec->log[i].length);
    settle_versions(l);
    replay_co(l);
    node_unref_co(l->disk);
}

struct settings {
    unsigned long states, sample_every;
    unsigned seed;
    bool first_only; /* the first failed state ends it */
    const char *save, *sample_dir;
};

static void run(const struct workload *w, const struct settings *set, unsigned long *states,
                unsigned long *failed) {
    struct lab *l = calloc(1, sizeof(*l));
    struct loop *loop;
    l->w = w;
    l->seed = set->seed;
    l->budget = set->states;
    l->save = set->save;
    l->sample_dir = set->sample_dir;
    l->sample_every = set->sample_every;
    l->first_only = set->first_only;
    must(loop_new(LOOP_THREADS, &loop, NULL), "loop");
    loop_run(loop, workload_co, l);
    loop_free(loop);
    printf("%-16s seed %-10u %6lu states, %lu failed\n", w->name, set->seed, l->states, l->failed);
    fflush(stdout);
    for (uint64_t b = 0; b < BLOCKS; b++)
        free(l->block[b].v);
    free(l->flush);
    free(l->start_image);
    *states += l->states;
    *failed += l->failed;
    free(l);
}

static int list_plants(void) {
    for (size_t i = 0; plant_name(i); i++)
        puts(plant_name(i));
    return 0;
}

int main(int argc, char **argv) {
    struct settings set = {.states = 2000, .seed = 1, .sample_every = 100};
    unsigned long total = 0, failed = 0;
    for (int c; (c = getopt(argc, argv, "n:s:p:w:d:e:lx")) != -1;) {
        if (c == 'n')
            set.states = strtoul(optarg, NULL, 0);
        else if (c == 's')
            set.seed = (unsigned)strtoul(optarg, NULL, 0);
        else if (c == 'w')
            set.save = optarg;
        else if (c == 'd')
            set.sample_dir = optarg;
        else if (c == 'e')
            set.sample_every = max_u64(1, strtoul(optarg, NULL, 0));
        else if (c == 'x')
            set.first_only = true;
        else if (c == 'l')
            return list_plants();
        else if (c != 'p' || !plant_set(optarg)) {
            fprintf(stderr, "usage: lab [-n STATES] [-s SEED] [-w FAILED-STATE] [-d SAMPLES-DIR] "
                            "[-e EVERY] [-p PLANT | -l] [-x] [WORKLOAD ...]\n");
            return 2;
        }
    }
    for (size_t i = 0; i < sizeof(workloads) / sizeof(*workloads); i++) {
        bool wanted = optind == argc;
        for (int a = optind; a < argc; a++)
            wanted |= !strcmp(argv[a], workloads[i].name);
        if (wanted && !(failed && set.first_only))
            run(&workloads[i], &set, &total, &failed);
    }
    printf("%lu states, %lu failed\n", total, failed);
    return failed != 0;
}
