/* SPDX-License-Identifier: MIT */
/*
 * The commit to a directory: see fat_commit.h, and fat_commit_int.h for its parts.
 *
 *      read the guest's file system -> match it with the scan -> look at the host
 *      -> stage the contents -> rename and remove
 *
 * Up to the last step an error leaves the directory as it was: what was staged is removed again,
 * and the guest's disk is saved as an image beside the directory, whole and without a backing file.
 * In the last step an error leaves some changes done, each one whole, and says how many.  After
 * kill -9 there may be files that begin with FAT_TEMP_PREFIX; no scan shows them.
 *
 * Contents are staged before any name changes, because the base reads unchanged parts of files by
 * their old names.
 */
#include "job/fat_commit.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "job/copy.h"
#include "job/fat_commit_int.h"
#include "runtime/loop.h"

/* The node that shows a directory: `base` itself, or below a raw of the same size. */
static const struct node *directory_of(const struct node *base) {
    const struct node *n = base;
    if (!strcmp(n->drv->name, "raw") && n->file && n->file->size == n->size)
        n = n->file;
    return fat_node_is(n) ? n : NULL;
}

bool fat_commit_is_for(const struct node *base) {
    return base && directory_of(base);
}

int fat_commit_check(const struct node *base, struct err *e) {
    const struct node *dir = directory_of(base);
    if (!dir)
        return err_set(e, EINVAL, "%s is no directory", base->filename);
    if (!fat_node_rw(dir)) {
        err_set(e, EROFS, "%s: the directory is shown for reading only", base->filename);
        err_hint(e, "fat:rw:DIR allows to write changes back into it");
        return -EROFS;
    }
    return 0;
}

/* ---- what could not be committed ---- */

static int save_image_co(struct node *overlay, const char *name, struct err *e) {
    const struct driver *qcow2 = driver_find("qcow2");
    struct create_ctx ctx = {.name = name, .flags = CREATE_UNNAMED};
    struct open_req req = {.flags = OPEN_RW | OPEN_NO_BACKING};
    struct copy_opts copy = {.sparse_bytes = 4096, .target_is_zero = true, .stable = true};
    struct node *file = NULL, *top = NULL;
    json_t *opts = json_pack("{s:I}", "size", (json_int_t)overlay->size);
    int r = opts ? storage_create_co(&ctx, &file, e) : err_set(e, ENOMEM, "out of memory");
    if (r == 0)
        r = format_create_co(file, qcow2, opts, e);
    json_decref(opts);
    if (r == 0)
        r = node_open_on_co(file, qcow2, NULL, &req, &top, e);
    if (r < 0) {
        if (file)
            node_unref_co(file);
        return r;
    }
    r = copy_run_co(overlay, top, overlay->size, 0, &copy, e);
    if (r == 0 && (r = disk_flush_co(top)) < 0)
        err_errno(e, -r, "flushing %s", name);
    node_ref(file);
    node_unref_co(top); /* whole only when it is closed */
    if (r == 0)
        r = node_link_co(file, name, false, e);
    node_unref_co(file);
    return r;
}

/* The directory is as it was, so the disk still reads as the guest left it: all of it goes into a
 * file beside the directory.  Says so in the hint. */
static void save_co(struct node *overlay, const struct node *dir, struct err *e) {
    struct err why AUTO_ERR = ERR_INIT;
    AUTO_FREE char *path = realpath(fat_node_dir(dir), NULL);
    AUTO_FREE char *name = xasprintf("%s.uncommitted.qcow2", path ? path : fat_node_dir(dir));
    AUTO_FREE char *before = e->hint ? xasprintf("%s; ", e->hint) : xstrdup("");
    free(e->hint);
    e->hint = NULL;
    if (save_image_co(overlay, name, &why) == 0)
        err_hint(e, "%snothing was changed in the directory, and the guest's disk is saved in %s",
                 before, name);
    else
        err_hint(e,
                 "%snothing was changed in the directory, but the guest's disk could not be saved "
                 "either: %s",
                 before, err_text(&why));
}

/* ---- the order ---- */

struct host_job {
    struct fat_plan *p;
    struct err *e;
};

static int check_job(void *arg) {
    struct host_job *j = arg;
    return fat_apply_check(j->p, j->e);
}

static int unstage_job(void *arg) {
    struct host_job *j = arg;
    fat_apply_unstage(j->p);
    return 0;
}

static int switch_job(void *arg) {
    struct host_job *j = arg;
    j->p->switching = true;
    int r = fat_apply_switch(j->p, j->e);
    if (r < 0) {
        fat_apply_unstage(j->p);
        err_hint(j->e, "%" PRIu32 " of %" PRIu32 " changes of the directory have been made",
                 j->p->done, j->p->changes);
    }
    return r;
}

static int plan_co(struct fat_plan *p, struct err *e) {
    struct host_job job = {p, e};
    if (p->overlay->size != p->base->size)
        return err_set(e, EINVAL, "the disk has another size than the one that was shown");
    int r = fat_volume_read_co(&p->volume, p->overlay, p->t, p->l, e);
    if (r < 0)
        return err_prefix(e, "the guest's file system");
    r = fat_match_co(p, e);
    return r == 0 ? offload_blocking_co(check_job, &job) : r;
}

int fat_commit_co(struct node *overlay, struct node *base, struct err *e) {
    int r = fat_commit_check(base, e);
    if (r < 0)
        return r;
    const struct node *dir = directory_of(base);
    struct fat_plan p = {
        .overlay = overlay, .base = base, .t = fat_node_tree(dir), .l = fat_node_layout(dir)};
    struct host_job job = {&p, e};
    r = plan_co(&p, e);
    if (r == 0) {
        r = fat_apply_stage_co(&p, e);
        if (r < 0)
            offload_blocking_co(unstage_job, &job);
        else
            r = offload_blocking_co(switch_job, &job);
    }
    if (r < 0 && !p.switching)
        save_co(overlay, dir, e);
    for (uint32_t i = 0; p.old && i < p.t->count; i++)
        free(p.old[i].aside);
    free(p.old);
    fat_volume_free(&p.volume);
    return r < 0 ? err_prefix(e, "%s", base->filename) : 0;
}
