/* SPDX-License-Identifier: MIT */
/*
 * What the guest's disk may read as after a cut at any moment.
 *
 * A block is 512 bytes; requests on one block never overlap in time, so its versions form a list.
 * A version is settled at the end of the first guest flush that began after the version's end (FUA
 * and durable operations: at its own end).  Everything from the newest settled version on, begun
 * before the cut, is allowed; a discard may leave what was there or zeros.
 *
 * What a block read as at one moment is the set of its newest version and, as long as those are
 * discards, the ones before.  A version can be a copy of such a set (`copy_of`: the number of
 * versions at that moment, plus 1): the disk returned to it.
 */
#include <stdlib.h>
#include <string.h>

#include "base/ck.h"
#include "lab.h"

static struct version *push(struct history *h, struct version v) {
    if (h->count == h->cap) {
        h->cap = h->cap ? h->cap * 2 : 4;
        h->v = realloc(h->v, h->cap * sizeof(*h->v));
        if (!h->v)
            abort();
    }
    v.end = v.settled = UINT64_MAX;
    h->v[h->count] = v;
    return &h->v[h->count++];
}

bool model_take(struct lab *l, uint64_t first, uint64_t count, uint32_t id, bool maybe, bool fua) {
    for (uint64_t b = first; b < first + count; b++)
        if (l->block[b].busy)
            return false;
    uint64_t now = machine_tick();
    for (uint64_t b = first; b < first + count; b++) {
        push(&l->block[b],
             (struct version){.id = id, .maybe = maybe, .durable = fua, .start = now});
        l->block[b].busy = true;
    }
    return true;
}

static void end_version(struct version *v, uint64_t now) {
    v->end = now;
    if (v->durable)
        v->settled = now;
}

void model_done(struct lab *l, uint64_t first, uint64_t count) {
    uint64_t now = machine_tick();
    for (uint64_t b = first; b < first + count; b++) {
        end_version(&l->block[b].v[l->block[b].count - 1], now);
        l->block[b].busy = false;
    }
}

static void start_with(struct history *h, uint32_t id) {
    struct version *v = push(h, (struct version){.id = id});
    v->end = v->settled = 0;
}

void model_start(struct lab *l, uint64_t b, uint32_t id) {
    start_with(&l->block[b], id);
}

void model_start_size(struct lab *l, uint64_t size) {
    start_with(&l->size, (uint32_t)(size / BLOCK));
}

/* ---------------------------------------------------------------- moments remembered */

void model_mark(struct lab *l, struct model_mark *m) {
    model_mark_free(m);
    m->count = malloc(BLOCKS * sizeof(*m->count));
    for (uint64_t b = 0; b < BLOCKS; b++)
        m->count[b] = l->block[b].count;
    m->size = l->disk->size;
}

void model_mark_free(struct model_mark *m) {
    free(m->count);
    m->count = NULL;
}

static bool version_reads(const struct history *h, unsigned i, uint32_t id);

/* What it read as when it had `count` versions. */
static bool read_then(const struct history *h, unsigned count, uint32_t id) {
    for (unsigned i = count; i-- > 0;) {
        if (version_reads(h, i, id))
            return true;
        if (!h->v[i].maybe)
            return false;
    }
    return id == 0;
}

static bool version_reads(const struct history *h, unsigned i, uint32_t id) {
    const struct version *v = &h->v[i];
    return v->copy_of ? read_then(h, v->copy_of - 1, id) : v->id == id;
}

bool model_same(const struct lab *l, const struct model_mark *m, uint64_t b, uint32_t id) {
    return read_then(&l->block[b], m->count[b], id);
}

struct lab_name *model_name_begin(struct lab *l) {
    if (l->names == LAB_NAMES_MAX)
        lab_must(-1, NULL, "too many names");
    struct lab_name *s = &l->name[l->names++];
    *s = (struct lab_name){
        .made = machine_tick(), .made_end = UINT64_MAX, .gone = UINT64_MAX, .gone_end = UINT64_MAX};
    snprintf(s->name, sizeof(s->name), "s%zu", l->names);
    model_mark(l, &s->at);
    return s;
}

void model_name_end(struct lab *l, struct lab_name *s) {
    s->made_end = machine_tick();
}

struct lab_name *model_name_any(struct lab *l) {
    unsigned there = 0;
    struct lab_name *found = NULL;
    for (size_t i = 0; i < l->names; i++)
        if (l->name[i].made_end != UINT64_MAX && l->name[i].gone == UINT64_MAX &&
            lab_rnd(l, ++there) == 0)
            found = &l->name[i];
    return found;
}

void model_gone_begin(struct lab *l, struct lab_name *s) {
    s->gone = machine_tick();
}

void model_gone_end(struct lab *l, struct lab_name *s) {
    s->gone_end = machine_tick();
}

/* ---------------------------------------------------------------- the whole disk */

void model_switch_begin(struct lab *l, const struct model_mark *to) {
    l->switches = realloc(l->switches, ++l->switched * sizeof(*l->switches));
    struct model_switch *s = &l->switches[l->switched - 1];
    *s = (struct model_switch){.end = UINT64_MAX};
    model_mark(l, &s->before);
    s->start = machine_tick();
    for (uint64_t b = 0; b < BLOCKS; b++) {
        /* What lies behind the end comes back as zeros, should the disk grow again. */
        bool inside = b < to->size / BLOCK;
        push(&l->block[b],
             (struct version){.copy_of = inside ? to->count[b] + 1 : 0, .start = s->start});
    }
    push(&l->size, (struct version){.id = (uint32_t)(to->size / BLOCK), .start = s->start});
}

void model_switch_end(struct lab *l, bool durable) {
    struct model_switch *s = &l->switches[l->switched - 1];
    s->end = machine_tick();
    s->durable = durable;
    for (uint64_t b = 0; b < BLOCKS; b++) {
        struct version *v = &l->block[b].v[l->block[b].count - 1];
        v->durable = durable;
        end_version(v, s->end);
    }
    l->size.v[l->size.count - 1].durable = durable;
    end_version(&l->size.v[l->size.count - 1], s->end);
}

void model_size_begin(struct lab *l, uint64_t size) {
    uint64_t now = machine_tick();
    push(&l->size, (struct version){.id = (uint32_t)(size / BLOCK), .start = now});
    for (uint64_t b = size / BLOCK; b < l->disk->size / BLOCK; b++)
        push(&l->block[b], (struct version){.start = now});
}

uint64_t model_size(const struct lab *l) {
    unsigned i = l->size.count;
    while (i > 1 && l->size.v[i - 1].end == UINT64_MAX)
        i--;
    return (uint64_t)l->size.v[i - 1].id * BLOCK;
}

void model_size_end(struct lab *l) {
    uint64_t now = machine_tick();
    end_version(&l->size.v[l->size.count - 1], now);
    for (uint64_t b = 0; b < BLOCKS; b++) {
        struct history *h = &l->block[b];
        if (h->count && h->v[h->count - 1].end == UINT64_MAX && !h->busy)
            end_version(&h->v[h->count - 1], now);
    }
}

static void settle_history(struct lab *l, struct history *h) {
    for (unsigned i = 0; i < h->count; i++) {
        struct version *v = &h->v[i];
        for (size_t f = 0; f < l->flushes; f++)
            if (l->flush[f].start > v->end && l->flush[f].end < v->settled)
                v->settled = l->flush[f].end;
    }
}

void model_settle(struct lab *l) {
    for (uint64_t b = 0; b < BLOCKS; b++)
        settle_history(l, &l->block[b]);
    settle_history(l, &l->size);
}

void model_all_settled(struct lab *l) {
    uint64_t now = machine_tick();
    for (uint64_t b = 0; b < BLOCKS; b++)
        for (unsigned i = 0; i < l->block[b].count; i++)
            l->block[b].v[i].settled = min_u64(l->block[b].v[i].settled, now);
}

/* ---------------------------------------------------------------- questions */

/* The newest version that is settled for sure; *start_ok: nothing is, and the start may show. */
static unsigned settled_from(const struct history *h, uint64_t moment, bool *start_ok) {
    unsigned from = 0;
    *start_ok = true;
    for (unsigned i = 0; i < h->count; i++)
        if (h->v[i].settled <= moment && !h->v[i].maybe) {
            from = i;
            *start_ok = false;
        }
    return from;
}

static bool allows(const struct history *h, uint64_t moment, uint32_t id) {
    bool start_ok;
    unsigned from = settled_from(h, moment, &start_ok);
    if (start_ok && id == 0)
        return true;
    for (unsigned i = from; i < h->count && h->v[i].start <= moment; i++)
        if (version_reads(h, i, id))
            return true;
    return false;
}

bool model_allows(const struct lab *l, uint64_t b, uint64_t moment, uint32_t id) {
    return allows(&l->block[b], moment, id);
}

bool model_allows_size(const struct lab *l, uint64_t moment, uint64_t size) {
    return is_aligned(size, BLOCK) && allows(&l->size, moment, (uint32_t)(size / BLOCK));
}

/* On which side of version number `mark` a block that reads as `id` can be. */
static void sides(const struct history *h, unsigned mark, uint64_t moment, uint32_t id, bool *old,
                  bool *new) {
    bool start_ok;
    unsigned from = settled_from(h, moment, &start_ok);
    *old = start_ok && id == 0;
    *new = false;
    for (unsigned i = from; i < h->count && h->v[i].start <= moment; i++)
        if (version_reads(h, i, id))
            *(i < mark ? old : new) = true;
}

int model_torn_switch(const struct lab *l, uint64_t moment, const uint32_t *ids, uint64_t blocks) {
    for (size_t k = 0; k < l->switched; k++) {
        const struct model_switch *s = &l->switches[k];
        bool only_old = false, only_new = false;
        if (s->start > moment)
            break;
        if (s->durable && s->end <= moment)
            continue;
        for (uint64_t b = 0; b < blocks; b++) {
            bool old, new;
            sides(&l->block[b], s->before.count[b], moment, ids[b], &old, &new);
            only_old |= old && !new;
            only_new |= new && !old;
        }
        if (only_old && only_new)
            return (int)k;
    }
    return -1;
}

struct lab_name *model_name_listed(struct lab_state *st, const char *name) {
    for (size_t i = 0; i < st->l->names; i++) {
        struct lab_name *s = &st->l->name[i];
        if (strcmp(s->name, name))
            continue;
        if (s->made > st->moment)
            break;
        if (s->gone_end <= st->moment) {
            state_fail(st, "'%s' is there, and was deleted before", name);
            return NULL;
        }
        st->listed |= UINT64_C(1) << i;
        return s;
    }
    state_fail(st, "'%s' is there, and was never made", name);
    return NULL;
}

int model_names_complete(struct lab_state *st) {
    for (size_t i = 0; i < st->l->names; i++) {
        const struct lab_name *s = &st->l->name[i];
        if (s->made_end <= st->moment && s->gone > st->moment && !(st->listed >> i & 1))
            return state_fail(st, "'%s' is gone", s->name);
    }
    return 0;
}

void model_free(struct lab *l) {
    for (uint64_t b = 0; b < BLOCKS; b++)
        free(l->block[b].v);
    free(l->size.v);
    free(l->flush);
    for (size_t i = 0; i < l->names; i++)
        model_mark_free(&l->name[i].at);
    for (size_t i = 0; i < l->switched; i++)
        model_mark_free(&l->switches[i].before);
    free(l->switches);
}
