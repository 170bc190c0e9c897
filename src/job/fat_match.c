/* SPDX-License-Identifier: MIT */
/*
 * Which file of the guest is which of the directory's.
 *
 * A file is the entry that has its name in the same folder; else, the entry that begins at the same
 * cluster and is not at its old name any more: that is a move.  Folders first, as the trees are
 * breadth first: what lies in a folder that moved did not move itself.  The name always wins: when
 * a name turns up later for an entry that was taken for moved, the file that was taken for it
 * becomes a new one.  So is a file whose entry's name is now a directory's (or the other way
 * round): the old one has to make way.
 *
 * A file is unchanged when it has the same clusters in the same order, the same size, and what the
 * overlay holds of it reads as the base does.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "disk/io.h"
#include "job/fat_commit_int.h"

#define COMPARE_BYTES (256 * KIB)

/* ---- who is who ---- */

struct shown {
    uint32_t entry;
    const char *name;
    char text[FAT_SHORT + 2];
};

static const char *shown_name(const struct fat_entry *x, char text[FAT_SHORT + 2]) {
    if (x->slots > 1)
        return x->name;
    fat_short_text(x->short_name, text);
    return text;
}

static int by_name(const void *a, const void *b) {
    const struct shown *x = a, *y = b;
    return strcmp(x->name ? x->name : x->text, y->name ? y->name : y->text);
}

static void unmatch(struct fat_plan *p, uint32_t entry) {
    struct fat_old *o = &p->old[entry];
    if (o->file == NONE)
        return;
    struct fat_file *m = &p->volume.v[o->file];
    m->match = NONE;
    m->host = m->name;
    o->file = NONE;
}

static void match_by_name(struct fat_plan *p, uint32_t file, uint32_t entry) {
    struct fat_file *n = &p->volume.v[file];
    unmatch(p, entry);
    if (n->is_dir != p->t->v[entry].is_dir) {
        p->old[entry].blocked = true;
        return;
    }
    n->match = entry;
    n->host = p->t->v[entry].name;
    p->old[entry].file = file;
}

static void match_by_cluster(struct fat_plan *p, uint32_t file) {
    struct fat_file *n = &p->volume.v[file];
    if (n->cluster < 2 || n->cluster - 2 >= p->l->used)
        return;
    const struct fat_entry *x = fat_owner(p->t, n->cluster);
    uint32_t entry = x ? (uint32_t)(x - p->t->v) : 0;
    if (!entry || x->cluster != n->cluster || x->is_dir != n->is_dir ||
        p->old[entry].file != NONE || p->old[entry].blocked)
        return;
    n->match = entry;
    p->old[entry].file = file;
}

static int match_children(struct fat_plan *p, uint32_t dir, struct err *e) {
    const struct fat_file *d = &p->volume.v[dir];
    const struct fat_entry *was = d->match == NONE ? NULL : &p->t->v[d->match];
    uint32_t count = was ? was->children : 0;
    struct shown *v AUTO_FREE = malloc((count + (size_t)1) * sizeof(*v));
    if (!v)
        return err_set(e, ENOMEM, "no memory to compare the directories");
    for (uint32_t i = 0; i < count; i++) {
        v[i].entry = was->first_child + i;
        /* The text moves along when this is sorted, so no pointer into it. */
        const char *name = shown_name(&p->t->v[v[i].entry], v[i].text);
        v[i].name = name == v[i].text ? NULL : name;
    }
    qsort(v, count, sizeof(*v), by_name);
    for (uint32_t i = 0; i < d->children; i++) {
        struct shown key = {.name = p->volume.v[d->first_child + i].name};
        const struct shown *found = bsearch(&key, v, count, sizeof(*v), by_name);
        if (found)
            match_by_name(p, d->first_child + i, found->entry);
    }
    for (uint32_t i = 0; i < d->children; i++)
        if (p->volume.v[d->first_child + i].match == NONE)
            match_by_cluster(p, d->first_child + i);
    return 0;
}

/* ---- what changed ---- */

struct compare {
    struct fat_plan *p;
    const struct fat_entry *was;
    uint8_t *a, *b;
};

/* 1: it differs. */
static int compare_piece_co(void *arg, uint64_t at, uint64_t offset, uint64_t length) {
    struct compare *c = arg;
    if (offset != fat_volume_offset(&c->p->volume, c->was->cluster) + at)
        return 1;
    for (uint64_t n; length; offset += n, length -= n) {
        struct status st;
        int r = disk_status_co(c->p->overlay, offset, length, STATUS_TOP_ONLY, &st);
        if (r < 0)
            return r;
        n = min_u64(st.length, length);
        if (!st.present)
            continue;
        n = min_u64(n, COMPARE_BYTES);
        r = disk_pread_co(c->p->overlay, offset, c->a, n);
        if (r == 0)
            r = disk_pread_co(c->p->base, offset, c->b, n);
        if (r < 0)
            return r;
        if (memcmp(c->a, c->b, n))
            return 1;
    }
    return 0;
}

/* 1: another content than its entry's. */
static int is_changed_co(struct compare *c, uint32_t file) {
    const struct fat_file *n = &c->p->volume.v[file];
    c->was = &c->p->t->v[n->match];
    if (n->size != c->was->size)
        return 1;
    return fat_volume_runs_co(&c->p->volume, file, compare_piece_co, c);
}

static int judge_co(struct compare *c, uint32_t file, struct err *e) {
    struct fat_plan *p = c->p;
    struct fat_file *n = &p->volume.v[file];
    if (n->match == NONE) {
        n->action = FAT_CREATE;
        return 0;
    }
    const struct fat_entry *x = &p->t->v[n->match];
    bool moved = p->volume.v[n->parent].match != x->parent || strcmp(n->host, x->name) != 0;
    int r = n->is_dir ? 0 : is_changed_co(c, file);
    if (r < 0) {
        AUTO_FREE char *path = fat_volume_path(&p->volume, file);
        return err_errno(e, -r, "reading %s", path);
    }
    n->action = !r ? (moved ? FAT_MOVE : FAT_KEEP) : moved ? FAT_CREATE : FAT_REPLACE;
    n->like = r ? n->match : NONE;
    if (n->action == FAT_CREATE) { /* changed and moved: a new one, and the old one goes */
        p->old[n->match].file = NONE;
        n->match = NONE;
    }
    return 0;
}

int fat_match_co(struct fat_plan *p, struct err *e) {
    struct fat_volume *f = &p->volume;
    p->old = malloc(p->t->count * sizeof(*p->old));
    if (!p->old)
        return err_set(e, ENOMEM, "no memory to compare the directories");
    for (uint32_t i = 0; i < p->t->count; i++)
        p->old[i] = (struct fat_old){.file = i ? NONE : 0};
    f->v[0].match = 0;
    int r = 0;
    for (uint32_t i = 0; r == 0 && i < f->count; i++)
        if (f->v[i].is_dir)
            r = match_children(p, i, e);
    struct compare c = {.p = p, .a = buf_get(COMPARE_BYTES), .b = buf_get(COMPARE_BYTES)};
    if (r == 0 && (!c.a || !c.b))
        r = err_set(e, ENOMEM, "no memory to compare files");
    for (uint32_t i = 1; r == 0 && i < f->count; i++)
        r = judge_co(&c, i, e);
    buf_put(c.a, COMPARE_BYTES);
    buf_put(c.b, COMPARE_BYTES);
    return r;
}
