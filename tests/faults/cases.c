/* SPDX-License-Identifier: MIT */
/* The operations that are swept; what they are made of is in parts.c. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <jansson.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "disk/bitmap.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "disk/overlay.h"
#include "disk/snapshot.h"
#include "faults.h"
#include "job/compare.h"
#include "job/copy.h"
#include "job/rebase.h"

/* ---------------------------------------------------------------- cases */

#define WITH(t, n, name, flags)                                                                    \
    struct node *n;                                                                                \
    int r = open_co(t, name, flags, &n);                                                           \
    if (r < 0)                                                                                     \
    return r

static int case_open(struct trial *t) {
    WITH(t, n, "top.qcow2", OPEN_RW);
    json_decref(n->drv->format->describe(n));
    node_unref_co(n);
    return 0;
}

static int case_read(struct trial *t) {
    WITH(t, n, "top.qcow2", 0);
    r = read_co(t, n);
    node_unref_co(n);
    return r;
}

static int case_write(struct trial *t) {
    WITH(t, n, "top.qcow2", OPEN_RW);
    r = write_co(t, n, 0, 3); /* in place, or copied from below */
    r = r ? r : write_co(t, n, 77, 20);
    r = r ? r : write_co(t, n, 400, 64);
    r = r ? r : flush_co(t, n);
    r = r ? r : write_co(t, n, 80, 40);
    r = r ? r : write_co(t, n, 300, 9);
    r = r ? r : flush_co(t, n);
    r = r ? r : write_co(t, n, 1, 1);
    node_unref_co(n);
    return r;
}

static int case_coded(struct trial *t) {
    WITH(t, n, "top.qcow2", OPEN_RW);
    for (unsigned i = 0; !r && i < 6; i++)
        r = coded_co(t, n, i * 56);
    r = r ? r : flush_co(t, n);
    r = r ? r : write_co(t, n, 60, 2);
    r = r ? r : coded_co(t, n, 112);
    r = r ? r : flush_co(t, n);
    node_unref_co(n);
    return r;
}

static int case_zero_discard(struct trial *t) {
    WITH(t, n, "top.qcow2", OPEN_RW);
    r = zero_co(t, n, 5, 70, ZERO_MAY_UNMAP);
    r = r ? r : zero_co(t, n, 200, 33, 0);
    r = r ? r : discard_co(t, n, 120, 64);
    r = r ? r : flush_co(t, n);
    r = r ? r : write_co(t, n, 10, 12);
    r = r ? r : discard_co(t, n, 8, 16);
    r = r ? r : flush_co(t, n);
    node_unref_co(n);
    return r;
}

/* The small clusters make tables grow. */
static int case_tables(struct trial *t) {
    WITH(t, n, "small.qcow2", OPEN_RW);
    for (unsigned i = 0; !r && i < 8; i++)
        r = write_co(t, n, i * 64, 17);
    r = r ? r : flush_co(t, n);
    r = r ? r : disk_resize_co(n, 8 * SIZE, PREALLOC_OFF, &t->e);
    r = r ? r : write_co(t, n, 500, 12);
    r = r ? r : flush_co(t, n);
    node_unref_co(n);
    return r;
}

static int case_grow(struct trial *t) {
    WITH(t, n, "small.qcow2", OPEN_RW);
    r = disk_resize_co(n, 4 * SIZE + 1024, PREALLOC_METADATA, &t->e);
    r = r ? r : disk_resize_co(n, 20 * SIZE, PREALLOC_OFF, &t->e);
    r = r ? r : write_co(t, n, 30, 4);
    r = r ? r : flush_co(t, n);
    node_unref_co(n);
    return r;
}

/* The part that stays is what the model looks at. */
static int case_shrink(struct trial *t) {
    WITH(t, n, "top.qcow2", OPEN_RW);
    uint64_t blocks = BLOCKS / 2 + 3;
    touch(t, blocks, BLOCKS - blocks, 0, true);
    r = disk_resize_co(n, blocks * BLOCK, PREALLOC_OFF, &t->e);
    r = r ? r : write_co(t, n, 100, 40);
    r = r ? r : flush_co(t, n);
    r = r ? r : disk_resize_co(n, SIZE, PREALLOC_OFF, &t->e);
    r = r ? r : flush_co(t, n);
    node_unref_co(n);
    return r;
}

static int case_check(struct trial *t) {
    struct check_result c = {0};
    WITH(t, n, "top.qcow2", OPEN_CHECK | OPEN_NO_BACKING);
    r = n->drv->format->check_co(n, &c, &t->e);
    if (!r && c.corruptions)
        say(t, "check calls an image corrupt because it cannot read it");
    r = r ? r : c.check_errors ? -EIO : 0;
    if (r && !t->e.code)
        err_set(&t->e, EIO, "counted as an error of the check");
    node_unref_co(n);
    return r;
}

static int case_commit(struct trial *t) {
    struct copy_opts opts = {0};
    WITH(t, n, "top.qcow2", OPEN_RW);
    r = commit_run_co(n, &opts, &t->e);
    r = r ? r : commit_empty_co(n, &t->e);
    node_unref_co(n);
    return r;
}

static int case_rebase(struct trial *t) {
    struct rebase_opts opts = {0};
    struct node *base;
    WITH(t, n, "top.qcow2", OPEN_RW);
    r = open_co(t, "other.qcow2", 0, &base);
    r = r ? r : rebase_copy_co(n, base, &opts, &t->e);
    r = r ? r : rebase_switch_co(n, "other.qcow2", "qcow2", &t->e);
    node_unref_co(base);
    node_unref_co(n);
    return r;
}

static int case_compare(struct trial *t) {
    struct compare_opts opts = {0};
    struct compare_result result;
    struct node *b;
    WITH(t, a, "top.qcow2", 0);
    r = open_co(t, "flat.img", 0, &b);
    r = r ? r : compare_run_co(a, b, &opts, &result, &t->e);
    if (!r && result.verdict != COMPARE_SAME)
        say(t, "equal disks compare as different");
    node_unref_co(b);
    node_unref_co(a);
    return r;
}

/* `subformat` may be NULL. */
static int convert(struct trial *t, const char *to, const char *format, const char *subformat,
                   bool compress) {
    struct copy_opts opts = {.target_is_zero = true, .sparse_bytes = 4096, .compress = compress};
    struct create_ctx ctx = {.name = path(t, to), .flags = CREATE_UNNAMED};
    struct open_req req = {.flags = OPEN_RW | OPEN_UNMAP};
    struct node *file = NULL, *dst = NULL;
    WITH(t, src, "top.qcow2", 0);
    fault_exempt(true);
    json_t *options = json_pack("{s:i, s:s*}", "size", (int)SIZE, "subformat", subformat);
    fault_exempt(false);
    const struct driver *drv = driver_find(format);
    r = storage_create_co(&ctx, &file, &t->e);
    r = r ? r : format_create_co(file, drv, options, &t->e);
    json_decref(options);
    r = r ? r : node_open_on_co(file, drv, NULL, &req, &dst, &t->e);
    if (!r) {
        r = copy_run_co(src, dst, SIZE, 0, &opts, &t->e);
        r = r ? r : disk_flush_co(dst);
        r = r ? r : node_link_co(file, path(t, to), false, &t->e);
        node_unref_co(dst);
    } else {
        node_unref_co(file);
    }
    node_unref_co(src);
    return r;
}

static int case_convert(struct trial *t) {
    return convert(t, "made.qcow2", "qcow2", NULL, false);
}
static int case_convert_coded(struct trial *t) {
    return convert(t, "made.qcow2", "qcow2", NULL, true);
}
static int case_convert_raw(struct trial *t) {
    return convert(t, "made.img", "raw", NULL, false);
}
static int case_convert_vdi(struct trial *t) {
    return convert(t, "made.vdi", "vdi", NULL, false);
}
static int case_convert_qed(struct trial *t) {
    return convert(t, "made.qed", "qed", NULL, false);
}

static int case_convert_vhdx(struct trial *t) {
    return convert(t, "made.vhdx", "vhdx", NULL, false);
}
static int case_convert_vmdk(struct trial *t) {
    return convert(t, "made.vmdk", "vmdk", NULL, false);
}
/* Written once: markers, tables behind the grains, the footer. */
static int case_convert_stream(struct trial *t) {
    return convert(t, "made.vmdk", "vmdk", "streamOptimized", true);
}

static int case_create(struct trial *t) {
    return create_co(t, "made.qcow2", "qcow2", "cluster_size=4k");
}
static int case_create_full(struct trial *t) {
    return create_co(t, "made.qcow2", "qcow2", "preallocation=full,cluster_size=4k");
}
static int case_create_raw(struct trial *t) {
    return create_co(t, "made.img", "raw", "preallocation=falloc");
}

static int case_amend(struct trial *t) {
    struct amend_ctx ctx = {0};
    fault_exempt(true);
    json_t *narrow = json_pack("{s:i}", "refcount_bits", 8);
    json_t *old = json_pack("{s:s, s:i}", "compat", "0.10", "refcount_bits", 16);
    fault_exempt(false);
    struct node *n;
    int r = open_co(t, "small.qcow2", OPEN_RW, &n);
    r = r ? r : disk_amend_co(n, narrow, &ctx, &t->e);
    r = r ? r : disk_amend_co(n, old, &ctx, &t->e);
    r = r ? r : flush_co(t, n);
    node_unref_co(n);
    json_decref(narrow);
    json_decref(old);
    return r;
}

static int case_throw_away(struct trial *t) {
    struct overlay_opts opts = {.scratch_dir = path(t, "")};
    struct node *over = NULL;
    WITH(t, base, "base.qcow2", 0);
    r = overlay_create_co(base, &opts, &over, &t->e);
    if (r < 0) {
        node_unref_co(base);
        return r;
    }
    uint8_t buf[BLOCK * 4] = {1};
    r = disk_pwrite_co(over, 3 * BLOCK, buf, sizeof(buf));
    r = r ? r : overlay_keep_co(over, path(t, "made.qcow2"), false, &t->e);
    node_unref_co(over);
    return r;
}

static int case_raw(struct trial *t) {
    WITH(t, n, "flat.img", OPEN_RW);
    r = write_co(t, n, 3, 30);
    r = r ? r : zero_co(t, n, 100, 20, ZERO_MAY_UNMAP);
    r = r ? r : flush_co(t, n);
    r = r ? r : discard_co(t, n, 200, 64);
    r = r ? r : disk_resize_co(n, 2 * SIZE, PREALLOC_OFF, &t->e);
    r = r ? r : flush_co(t, n);
    node_unref_co(n);
    return r;
}

/* Subclusters. */
static int case_sub(struct trial *t) {
    WITH(t, n, "sub.qcow2", OPEN_RW);
    r = write_co(t, n, 3, 2);
    r = r ? r : write_co(t, n, 40, 33);
    r = r ? r : zero_co(t, n, 42, 3, ZERO_MAY_UNMAP);
    r = r ? r : coded_co(t, n, 128);
    r = r ? r : flush_co(t, n);
    r = r ? r : discard_co(t, n, 32, 32);
    r = r ? r : write_co(t, n, 130, 1);
    r = r ? r : flush_co(t, n);
    node_unref_co(n);
    return r;
}

static int case_bitmap(struct trial *t) {
    struct bitmap_new what = {.name = "b", .granularity = 4096, .persistent = true};
    struct bitmap *b;
    WITH(t, n, "small.qcow2", OPEN_RW);
    r = bitmap_add_co(n, &what, NULL, &t->e);
    r = r ? r : write_co(t, n, 7, 9);
    r = r ? r : bitmap_store_co(n, &t->e);
    r = r ? r : write_co(t, n, 100, 9);
    r = r ? r : flush_co(t, n);
    node_unref_co(n);
    if (r)
        return r;
    r = open_co(t, "small.qcow2", OPEN_RW, &n);
    b = r ? NULL : bitmap_find(n, "b");
    if (b && bitmap_usable(b, true, NULL) == 0) { /* else a failure at closing left it in use */
        r = bitmap_load_co(b, &t->e);
        if (!r && (!bitmap_get(b, 7 * BLOCK) || !bitmap_get(b, 100 * BLOCK)))
            say(t, "the bitmap does not know of a write");
        r = r ? r : bitmap_clear_co(b, &t->e);
        r = r ? r : write_co(t, n, 200, 3);
        r = r ? r : bitmap_remove_co(b, &t->e);
    }
    r = r ? r : flush_co(t, n);
    node_unref_co(n);
    return r;
}

/* The image as a kill would leave it, without a call that could be made to fail. */
static void copy_as_is(struct trial *t, const char *from, const char *to) {
    int in = (int)syscall(SYS_open, path(t, from), O_RDONLY);
    int out = (int)syscall(SYS_open, path(t, to), O_RDWR | O_CREAT | O_TRUNC, 0600);
    while (syscall(SYS_sendfile, out, in, NULL, (size_t)MIB) > 0)
        ;
    syscall(SYS_close, in);
    syscall(SYS_close, out);
}

/* Storing fails, the guest goes on, the program is killed: no bitmap on storage misses a write. */
static int case_bitmap_doubt(struct trial *t) {
    struct bitmap_new what = {.name = "b", .granularity = 4096, .persistent = true};
    struct bitmap *b;
    WITH(t, n, "small.qcow2", OPEN_RW);
    r = bitmap_add_co(n, &what, NULL, &t->e);
    r = r ? r : write_co(t, n, 7, 1);
    int first = r ? r : bitmap_store_co(n, &t->e);
    r = r ? r : write_co(t, n, 100, 1);
    int second = first || r ? r : bitmap_store_co(n, &t->e);
    r = r ? r : write_co(t, n, 200, 1);
    int flushed = r ? r : flush_co(t, n);
    copy_as_is(t, "small.qcow2", "cut.qcow2");
    node_unref_co(n);
    if (!r) {
        struct err why AUTO_ERR = ERR_INIT;
        struct open_req req = {.name = path(t, "cut.qcow2"), .format = "qcow2", .gate = GATE_ANY};
        r = node_open_co(&req, &n, &why);
        b = r ? NULL : bitmap_find(n, "b");
        if (b && bitmap_load_co(b, NULL) == 0 &&
            (!bitmap_get(b, 7 * BLOCK) || !bitmap_get(b, 100 * BLOCK) ||
             !bitmap_get(b, 200 * BLOCK)))
            say(t, "the bitmap does not know of a write");
        if (!r)
            node_unref_co(n);
    }
    unlink(path(t, "cut.qcow2"));
    return r ? r : first ? first : second ? second : flushed;
}

/* Reference counts were lost; what the guest reads was not. */
static int case_repair(struct trial *t) {
    struct check_result c = {.fix = CHECK_FIX_LEAKS | CHECK_FIX_ERRORS};
    WITH(t, n, "hurt.qcow2", OPEN_RW | OPEN_CHECK);
    r = n->drv->format->check_co(n, &c, &t->e);
    if (!r && (c.corruptions || c.check_errors))
        r = err_set(&t->e, EIO, "not everything could be repaired");
    node_unref_co(n);
    return r;
}

/* What it promises when it returns 0: all that was written is on stable storage. */
static int snapshot_co(struct trial *t, struct node *n, const char *name) {
    struct snapshot_info info = {.name = xstrdup(name), .icount = SNAPSHOT_ICOUNT_UNKNOWN};
    int r = disk_snapshot_create_co(n, &info, &t->e);
    snapshot_info_free(&info);
    for (uint64_t b = 0; !r && b < BLOCKS; b++)
        if (!t->maybe[b])
            t->was[b] = t->will[b];
    return r;
}

static int snapshots_are_co(struct trial *t, struct node *n, size_t count) {
    AUTO_SNAPSHOTS struct snapshot_list list = {0};
    int r = disk_snapshot_list_co(n, &list, &t->e);
    if (!r && list.count != count)
        say(t, "%zu snapshots are listed, not %zu", list.count, count);
    return r;
}

static int snapshot_steps_co(struct trial *t, struct node *n) {
    static uint32_t then[BLOCKS];
    int r = write_co(t, n, 10, 30);
    r = r ? r : snapshot_co(t, n, "a");
    memcpy(then, t->will, sizeof(then));
    r = r ? r : write_co(t, n, 0, 3);
    r = r ? r : write_co(t, n, 20, 60);
    r = r ? r : flush_co(t, n);
    r = r ? r : snapshot_co(t, n, "b");
    r = r ? r : write_co(t, n, 130, 20);
    r = r ? r : flush_co(t, n);
    if (r < 0)
        return r;
    memcpy(t->will, then, sizeof(then));
    r = disk_snapshot_apply_co(n, "1", &t->e);
    if (r < 0)
        return r;
    memcpy(t->was, then, sizeof(then));
    r = disk_snapshot_delete_co(n, "1", &t->e);
    r = r ? r : write_co(t, n, 12, 5);
    r = r ? r : flush_co(t, n);
    r = r ? r : snapshots_are_co(t, n, 1);
    r = r ? r : disk_snapshot_delete_co(n, "2", &t->e);
    return r ? r : snapshots_are_co(t, n, 0);
}

static int case_snapshot(struct trial *t) {
    WITH(t, n, "top.qcow2", OPEN_RW);
    r = snapshot_steps_co(t, n);
    node_unref_co(n);
    return r;
}

/* Clusters so small that the refcount table moves to a larger place. */
static int case_snapshot_small(struct trial *t) {
    WITH(t, n, "small.qcow2", OPEN_RW);
    r = write_co(t, n, 10, 100);
    r = r ? r : snapshot_co(t, n, "a");
    r = r ? r : write_co(t, n, 20, 3);
    r = r ? r : disk_snapshot_delete_co(n, "1", &t->e);
    node_unref_co(n);
    return r;
}

/* What a guest does to an image of a small format, and growth where there is any. */
static int small_format(struct trial *t, const char *name) {
    WITH(t, n, name, OPEN_RW);
    r = write_co(t, n, 3, 2);
    r = r ? r : write_co(t, n, 77, 20);
    r = r ? r : flush_co(t, n);
    r = r ? r : zero_co(t, n, 70, 16, ZERO_MAY_UNMAP);
    r = r ? r : discard_co(t, n, 88, 8);
    if (n->codec)
        r = r ? r : coded_co(t, n, 128);
    r = r ? r : flush_co(t, n);
    r = r ? r : write_co(t, n, 130, 1);
    r = r ? r : flush_co(t, n);
    if (n->drv->format->resize_co)
        r = r ? r : disk_resize_co(n, SIZE + 40 * KIB, PREALLOC_OFF, &t->e);
    r = r ? r : write_co(t, n, 480, 30);
    r = r ? r : flush_co(t, n);
    r = r ? r : read_co(t, n);
    node_unref_co(n);
    return r;
}
static int case_vdi(struct trial *t) {
    return small_format(t, "small.vdi");
}
static int case_qed(struct trial *t) {
    return small_format(t, "small.qed");
}
static int case_qcow(struct trial *t) {
    return small_format(t, "small.qcow");
}
static int case_parallels(struct trial *t) {
    return small_format(t, "small.parallels");
}
static int case_vpc(struct trial *t) {
    return small_format(t, "small.vpc");
}
/* Changes of its tables pass a log. */
static int case_vhdx(struct trial *t) {
    return small_format(t, "small.vhdx");
}
static int case_vmdk(struct trial *t) {
    return small_format(t, "small.vmdk");
}

/* Another parent with the same content, then nothing of its own, as after a commit. */
static int relink(struct trial *t, const char *name, const char *parent) {
    WITH(t, n, name, OPEN_RW);
    r = rebase_switch_co(n, parent, strrchr(parent, '.') + 1, &t->e);
    node_unref_co(n);
    if (!r)
        r = open_co(t, name, OPEN_RW, &n);
    if (r < 0)
        return r;
    r = commit_empty_co(n, &t->e);
    r = r ? r : read_co(t, n);
    r = r ? r : write_co(t, n, 77, 20);
    r = r ? r : flush_co(t, n);
    node_unref_co(n);
    return r;
}
static int case_link_vdi(struct trial *t) {
    return relink(t, "link.vdi", "pb.vdi");
}
static int case_link_vhdx(struct trial *t) {
    return relink(t, "link.vhdx", "pb.vhdx");
}

const struct fault_case fault_cases[] = {
    {"open", "top.qcow2", NULL, case_open},
    {"read", "top.qcow2", NULL, case_read},
    {"write", "top.qcow2", NULL, case_write},
    {"coded", "top.qcow2", NULL, case_coded},
    {"zero-discard", "top.qcow2", NULL, case_zero_discard},
    {"tables", "small.qcow2", NULL, case_tables},
    {"grow", "small.qcow2", NULL, case_grow},
    {"shrink", "top.qcow2", NULL, case_shrink},
    {"check", "top.qcow2", NULL, case_check},
    {"commit", "top.qcow2", NULL, case_commit},
    {"rebase", "top.qcow2", NULL, case_rebase},
    {"compare", "top.qcow2", NULL, case_compare},
    {"convert", "top.qcow2", "made.qcow2", case_convert},
    {"convert-coded", "top.qcow2", "made.qcow2", case_convert_coded},
    {"convert-raw", "top.qcow2", "made.img", case_convert_raw},
    {"convert-vdi", "top.qcow2", "made.vdi", case_convert_vdi},
    {"convert-qed", "top.qcow2", "made.qed", case_convert_qed},
    {"convert-vhdx", "top.qcow2", "made.vhdx", case_convert_vhdx},
    {"convert-vmdk", "top.qcow2", "made.vmdk", case_convert_vmdk},
    {"convert-stream", "top.qcow2", "made.vmdk", case_convert_stream},
    {"create", NULL, "made.qcow2", case_create},
    {"create-full", NULL, "made.qcow2", case_create_full},
    {"create-raw", NULL, "made.img", case_create_raw},
    {"amend", "small.qcow2", NULL, case_amend},
    {"throw-away", "base.qcow2", "made.qcow2", case_throw_away},
    {"raw", "flat.img", NULL, case_raw},
    {"subclusters", "sub.qcow2", NULL, case_sub},
    {"bitmap", "small.qcow2", NULL, case_bitmap},
    {"bitmap-doubt", "small.qcow2", NULL, case_bitmap_doubt},
    {"repair", "hurt.qcow2", NULL, case_repair},
    {"snapshot", "top.qcow2", NULL, case_snapshot},
    {"snapshot-small", "small.qcow2", NULL, case_snapshot_small},
    {"vdi", "small.vdi", NULL, case_vdi},
    {"qed", "small.qed", NULL, case_qed},
    {"qcow", "small.qcow", NULL, case_qcow},
    {"parallels", "small.parallels", NULL, case_parallels},
    {"vpc", "small.vpc", NULL, case_vpc},
    {"vhdx", "small.vhdx", NULL, case_vhdx},
    {"vmdk", "small.vmdk", NULL, case_vmdk},
    {"link-vdi", "link.vdi", NULL, case_link_vdi},
    {"link-vhdx", "link.vhdx", NULL, case_link_vhdx},
    {0},
};
