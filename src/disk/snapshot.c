/* SPDX-License-Identifier: MIT */
/*
 * Internal snapshots: the engine's checks around the format's slots.
 *
 * A change of the snapshots is a change of the whole map: requests are held back until it is done,
 * and whatever was looked up before is stale (map_generation).
 */
#include "disk/snapshot.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/err.h"
#include "disk/bitmap.h"
#include "disk/engine.h"

void snapshot_info_free(struct snapshot_info *info) {
    free(info->id);
    free(info->name);
    *info = (struct snapshot_info){0};
}

void snapshot_list_free(struct snapshot_list *l) {
    for (size_t i = 0; i < l->count; i++)
        snapshot_info_free(&l->v[i]);
    free(l->v);
    *l = (struct snapshot_list){0};
}

const struct snapshot_info *snapshot_find(const struct snapshot_list *l, const char *id,
                                          const char *name) {
    for (size_t i = 0; i < l->count; i++)
        if ((!id || !strcmp(l->v[i].id, id)) && (!name || !strcmp(l->v[i].name, name)))
            return &l->v[i];
    return NULL;
}

const struct snapshot_info *snapshot_find_key(const struct snapshot_list *l, const char *key) {
    const struct snapshot_info *x = snapshot_find(l, key, NULL);
    return x ? x : snapshot_find(l, NULL, key);
}

bool disk_has_snapshots(const struct node *n) {
    return n->drv->format && n->drv->format->snapshot_list_co;
}

static int check_format(const struct node *n, struct err *e) {
    if (disk_has_snapshots(n))
        return 0;
    return err_set(e, ENOTSUP, "images of format '%s' cannot hold snapshots", n->drv->name);
}

int disk_snapshot_list_co(struct node *n, struct snapshot_list *out, struct err *e) {
    int r = check_format(n, e);
    if (r < 0)
        return r;
    node_enter_co(n);
    r = n->drv->format->snapshot_list_co(n, out, e);
    node_leave(n);
    return r;
}

static int begin_co(struct node *n, struct err *e) {
    int r = check_format(n, e);
    if (r < 0)
        return r;
    if (!node_is_rw(n))
        return err_set(e, EROFS, "the image is open read-only");
    node_quiesce_co(n);
    return 0;
}

static void end(struct node *n) {
    n->map_generation++;
    node_resume(n);
}

int disk_snapshot_create_co(struct node *n, struct snapshot_info *info, struct err *e) {
    int r = begin_co(n, e);
    if (r < 0)
        return r;
    r = n->drv->format->snapshot_create_co(n, info, e);
    end(n);
    return r;
}

/*
 * Every block may be another one afterwards, so bitmaps record a change of all of the disk, and
 * those that are stored say so before anything changes.  Where the size will change they must be
 * able to follow.
 */
static int bitmaps_begin_co(struct node *n, const char *id, struct err *e) {
    AUTO_SNAPSHOTS struct snapshot_list list = {0};
    if (!n->bitmaps)
        return 0;
    int r = n->drv->format->snapshot_list_co(n, &list, e);
    const struct snapshot_info *x = r ? NULL : snapshot_find(&list, id, NULL);
    if (x && x->disk_size != n->size)
        r = bitmap_resize_begin_co(n, x->disk_size, e);
    return r ? r : bitmap_mark_all_co(n, e);
}

int disk_snapshot_apply_co(struct node *n, const char *id, struct err *e) {
    int r = begin_co(n, e);
    if (r < 0)
        return r;
    uint64_t size = n->size;
    r = bitmaps_begin_co(n, id, e);
    if (!r)
        r = n->drv->format->snapshot_apply_co(n, id, e);
    if (n->size != size)
        bitmap_resize_end(n);
    end(n);
    return r;
}

int disk_snapshot_delete_co(struct node *n, const char *id, struct err *e) {
    int r = begin_co(n, e);
    if (r < 0)
        return r;
    r = n->drv->format->snapshot_delete_co(n, id, e);
    end(n);
    return r;
}
