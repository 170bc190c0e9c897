/* SPDX-License-Identifier: MIT */
/*
 * Judging one state: the disks hold it, as the next boot would find it.
 *
 * It passes when: every image opens read-write; check finds no corruption (leaks are allowed);
 * every block, and the size, reads as a version that the model allows; an operation on the whole
 * disk shows wholly or not at all; the workload's own judge agrees; and after a further write and
 * flush check is still without corruption.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "base/ck.h"
#include "lab.h"

int state_fail(struct lab_state *st, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    if (!st->why[0])
        vsnprintf(st->why, sizeof(st->why), fmt, ap);
    va_end(ap);
    return -1;
}

static const char *top_format(const struct lab *l) {
    return l->w->format ? l->w->format : "qcow2";
}

int lab_open_co(unsigned i, const char *format, json_t *extra, unsigned flags, struct node **out,
                struct err *e) {
    struct open_req req = {.flags = flags | OPEN_UNMAP, .gate = GATE_ANY};
    json_t *tree = json_object();
    char name[8];
    snprintf(name, sizeof(name), "lab:%u", i);
    json_object_set_new(tree, "driver", json_string(format));
    json_object_set_new(tree, "file", json_string(name));
    json_object_update(tree, extra);
    json_decref(extra);
    req.options = tree;
    int r = node_open_co(&req, out, e);
    json_decref(tree);
    return r;
}

int state_open_co(struct lab_state *st, json_t *extra, unsigned flags, struct node **out) {
    struct err e AUTO_ERR = ERR_INIT;
    json_t *tree = NULL;
    if (st->l->w->open_options)
        lab_must(opt_parse_keyval(st->l->w->open_options, NULL, &tree, &e), &e, "open options");
    else
        tree = json_object();
    json_object_update(tree, extra);
    json_decref(extra);
    if (lab_open_co(0, top_format(st->l), tree, flags, out, &e) < 0)
        return state_fail(st, "opening: %s", err_text(&e));
    return 0;
}

struct problem {
    char text[160];
};

static void first_problem(void *arg, bool is_leak, const char *text) {
    struct problem *first = arg;
    if (!is_leak && !first->text[0])
        snprintf(first->text, sizeof(first->text), "%s", text);
}

int state_check_co(struct lab_state *st, struct node *n, const char *when) {
    struct problem first = {""};
    struct check_result c = {.report = first_problem, .arg = &first};
    struct err e AUTO_ERR = ERR_INIT;
    if (!n->drv->format || !n->drv->format->check_co)
        return 0;
    if (n->drv->format->check_co(n, &c, &e) < 0)
        return state_fail(st, "%s: check cannot run: %s", when, err_text(&e));
    if (c.corruptions || c.check_errors)
        return state_fail(st, "%s: %llu corruptions: %s", when, (unsigned long long)c.corruptions,
                          first.text);
    return 0;
}

int state_read_ids_co(struct lab_state *st, struct node *n, const char *what, uint32_t *ids,
                      uint64_t *blocks) {
    static uint8_t got[DISK_MAX];
    uint64_t size = min_u64(n->size, DISK_MAX);
    int r = size ? disk_pread_co(n, 0, got, size) : 0;
    if (r < 0)
        return state_fail(st, "reading %s: %s", what, strerror(-r));
    *blocks = size / BLOCK;
    for (uint64_t b = 0; b < *blocks; b++) {
        uint8_t want[BLOCK];
        ids[b] = le32_load(got + b * BLOCK);
        block_fill(want, ids[b]);
        if (memcmp(want, got + b * BLOCK, BLOCK))
            return state_fail(st, "%s: block %llu is a mixture", what, (unsigned long long)b);
    }
    return 0;
}

int state_reads_as_co(struct lab_state *st, struct node *n, const struct model_mark *m,
                      const char *what) {
    static uint32_t ids[BLOCKS];
    uint64_t blocks;
    if (n->size != m->size)
        return state_fail(st, "%s has %llu bytes, not %llu", what, (unsigned long long)n->size,
                          (unsigned long long)m->size);
    int r = state_read_ids_co(st, n, what, ids, &blocks);
    for (uint64_t b = 0; !r && b < blocks; b++)
        if (!model_same(st->l, m, b, ids[b]))
            r = state_fail(st, "%s: block %llu reads as version %u", what, (unsigned long long)b,
                           ids[b]);
    return r;
}

static int judge_model(struct lab_state *st) {
    const struct lab *l = st->l;
    if (!model_allows_size(l, st->moment, st->disk->size))
        return state_fail(st, "the disk has %llu bytes", (unsigned long long)st->disk->size);
    for (uint64_t b = 0; b < st->blocks; b++)
        if (!model_allows(l, b, st->moment, st->ids[b]))
            return state_fail(st, "block %llu reads as version %u", (unsigned long long)b,
                              st->ids[b]);
    int torn = model_torn_switch(l, st->moment, st->ids, st->blocks);
    return torn < 0 ? 0 : state_fail(st, "change %d of the whole disk shows in parts", torn);
}

/* The image is used again: what was left must not make new writes corrupt anything. */
static int reuse_co(struct lab_state *st) {
    struct lab *l = st->l;
    uint8_t buf[BLOCK * 3];
    memset(buf, 0xee, sizeof(buf));
    for (int i = 0; i < 4 && st->disk->size > sizeof(buf); i++) {
        uint64_t places = (st->disk->size - sizeof(buf)) / BLOCK;
        uint64_t at = lab_rnd(l, (unsigned)max_u64(places, 1)) * (uint64_t)BLOCK;
        int r = disk_pwrite_co(st->disk, at, buf, sizeof(buf));
        if (r == -EPERM && st->disk->coded_only) /* its units are written once */
            continue;
        if (r < 0)
            return state_fail(st, "writing afterwards: %s", strerror(-r));
    }
    int r = disk_flush_co(st->disk);
    if (r < 0)
        return state_fail(st, "flushing afterwards: %s", strerror(-r));
    return state_check_co(st, st->disk, "afterwards");
}

static int judge_below_co(struct lab_state *st) {
    const struct lab_below *below = st->l->w->below;
    int r = 0;
    for (unsigned i = 0; !r && i < LAB_DISKS - 1 && below[i].format; i++) {
        struct err e AUTO_ERR = ERR_INIT;
        struct node *n;
        char name[8];
        if (below[i].no_check)
            continue;
        snprintf(name, sizeof(name), "lab:%u", i + 1);
        if (lab_open_co(i + 1, below[i].format, NULL, OPEN_RW | OPEN_NO_BACKING, &n, &e) < 0)
            return state_fail(st, "opening %s: %s", name, err_text(&e));
        r = state_check_co(st, n, name);
        node_unref_co(n);
    }
    return r;
}

static int judge_state_co(struct lab_state *st) {
    static uint32_t ids[BLOCKS];
    int r = st->l->w->mend_co ? st->l->w->mend_co(st) : 0;
    if (!r)
        r = judge_below_co(st);
    if (!r)
        r = state_open_co(st, NULL, OPEN_RW, &st->disk);
    if (!r)
        r = state_check_co(st, st->disk, "check");
    if (!r)
        r = state_read_ids_co(st, st->disk, "the disk", ids, &st->blocks);
    st->ids = ids;
    if (!r)
        r = judge_model(st);
    if (!r && st->l->w->judge_co)
        r = st->l->w->judge_co(st);
    if (!r && st->l->states % 4 == 0)
        r = reuse_co(st);
    node_unref_co(st->disk);
    return r;
}

/* ---------------------------------------------------------------- states kept as files */

static bool write_image(const char *name, const struct lab_disk *d) {
    FILE *f = fopen(name, "w");
    bool ok = f && fwrite(d->bytes, 1, d->size, f) == d->size;
    return f && !fclose(f) && ok;
}

/* The disks of this state: PREFIX.0, PREFIX.1 ... */
static void save_disks(const char *prefix) {
    for (unsigned i = 0; i < LAB_DISKS; i++) {
        char name[512];
        snprintf(name, sizeof(name), "%s.%u", prefix, i);
        if (machine->disk[i].bytes && !write_image(name, &machine->disk[i]))
            lab_must(-EIO, NULL, name);
    }
}

/* For an independent checker: states as they are before anybody opens them. */
static void sample(const struct lab *l) {
    char prefix[400];
    if (!l->sample_dir || l->states % l->sample_every)
        return;
    snprintf(prefix, sizeof(prefix), "%s/%s-%lu", l->sample_dir, l->w->name, l->states);
    save_disks(prefix);
}

void judge_co(struct lab *l, uint64_t moment) {
    struct lab_state st = {.l = l, .moment = moment};
    l->states++;
    if (!machine->disk[0].linked)
        return; /* there is nothing yet under the image's name */
    sample(l);
    struct lab_disk before[LAB_DISKS];
    if (l->save) /* to be kept as it was found */
        for (unsigned i = 0; i < LAB_DISKS; i++) {
            before[i] = machine->disk[i];
            before[i].bytes = before[i].bytes ? malloc(RECORDER_BYTES_MAX) : NULL;
            if (before[i].bytes)
                memcpy(before[i].bytes, machine->disk[i].bytes, RECORDER_BYTES_MAX);
        }
    int r = judge_state_co(&st);
    if (r && l->failed++ < 3)
        printf("  %s: moment %llu, state %lu: %s\n", l->w->name, (unsigned long long)moment,
               l->states, st.why);
    if (l->save) {
        for (unsigned i = 0; i < LAB_DISKS; i++) {
            struct lab_disk now = machine->disk[i];
            machine->disk[i] = before[i];
            before[i] = now;
        }
        if (r) {
            save_disks(l->save);
            printf("  the disks are in %s.0 ...\n", l->save);
            l->save = NULL;
        }
        for (unsigned i = 0; i < LAB_DISKS; i++)
            free(before[i].bytes);
    }
}
