/* SPDX-License-Identifier: MIT */
/*
 * A hostile qcow2 image: opened to read, to check, and to write.
 *
 *   1. read-only: probe, open, describe, walk the status of the disk, read some of it;
 *   2. check;
 *   3. on the same storage, read-write: the program behind the image's mark (write, zero, discard,
 *      coded write, flush, resize, read), flush, close;
 *   4. check again.
 *
 * Invariants: nothing crashes, hangs, leaks or grows without bound; looking does not change the
 * image; an image that was clean in 2 has no corruption in 4 (leaks may come from a full disk), and
 * what a write put down in it reads back right after.
 *
 * Not opened: backing files (a name in an image leads nowhere here).
 */
#include "fuzz.h"

#include "disk/bitmap.h"
#include "disk/snapshot.h"

#define DISK_LIMIT (16 * MIB)
#define STATUS_STEPS 300
#define READ_BYTES_MAX (128 * KIB)
#define OPS_MAX 40
#define OP_BYTES_MAX (96 * KIB)

static uint8_t buf[READ_BYTES_MAX], back[READ_BYTES_MAX];

struct input {
    const uint8_t *data;
    size_t size;
};

/* An external data file, empty at each open, for an image that wants one. */
static json_t *data_option_co(struct node *file) {
    uint8_t features[8] = {0};
    if (file->size < 80 || disk_pread_co(file, 72, features, 8) < 0 || !(features[7] & 4))
        return NULL;
    return json_pack("{s:{s:s, s:i}}", "data-file", "driver", "memory", "size", 1 << 16);
}

static struct node *open_co(struct node *file, unsigned flags) {
    const struct driver *drv = driver_find("qcow2");
    struct open_req req = {.flags = flags | OPEN_NO_BACKING, .cache = CACHE_WRITEBACK};
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = NULL;
    json_t *options = data_option_co(file);
    int r = node_open_on_co(node_ref(file), drv, options, &req, &n, &e);
    json_decref(options);
    if (r == 0)
        return n;
    FUZZ_CHECK(e.code == -r && e.text && *e.text, "open failed with %d and error %d '%s'", r,
               e.code, err_text(&e));
    for (const char *s = e.text; *s; s++)
        FUZZ_CHECK((unsigned char)*s >= ' ', "an error message holds a control character: %s",
                   e.text);
    node_unref_co(file);
    return NULL;
}

static void read_bitmaps_co(struct node *n) {
    int left = 8;
    for (struct bitmap *b = NULL; left-- && (b = bitmap_next(n, b));) {
        uint64_t start, length, at = 0;
        if (bitmap_load_co(b, NULL) < 0)
            continue;
        for (int k = 0; k < 64 && bitmap_next_dirty(b, at, b->size, &start, &length); k++) {
            FUZZ_CHECK(length && start >= at && start + length <= b->size, "a run outside");
            at = start + length;
        }
        FUZZ_CHECK(bitmap_dirty_bytes(b) <= b->size, "more is dirty than there is");
    }
}

static void look_co(struct node *file) {
    struct node *n = open_co(file, 0);
    if (!n)
        return;
    json_decref(n->drv->format->describe(n));
    read_bitmaps_co(n);
    struct snapshot_list list = {0};
    disk_snapshot_list_co(n, &list, NULL);
    snapshot_list_free(&list);
    uint64_t at = 0, left = READ_BYTES_MAX;
    for (int i = 0; i < STATUS_STEPS && at < n->size; i++) {
        struct status st;
        int r = disk_status_co(n, at, n->size - at, STATUS_PRECISE, &st);
        if (r < 0) {
            at += n->granularity;
            continue;
        }
        FUZZ_CHECK(st.length && st.length <= n->size - at, "status at %" PRIu64 " has length 0",
                   at);
        uint64_t len = min_u64(st.length, min_u64(left, n->granularity));
        if (st.data && len && disk_pread_co(n, at, buf, len) == 0)
            left -= len;
        at += st.length;
    }
    if (n->size > 512)
        disk_pread_co(n, n->size - 512, buf, 512);
    node_unref_co(n);
}

/* 1: clean, 0: not, -1: could not be said. */
static int check_co(struct node *file, uint64_t *corruptions) {
    struct node *n = open_co(file, OPEN_CHECK);
    struct check_result r = {0};
    struct err e AUTO_ERR = ERR_INIT;
    if (!n)
        return -1;
    int failed = n->drv->format->check_co(n, &r, &e);
    node_unref_co(n);
    *corruptions = r.corruptions;
    if (failed || r.check_errors)
        return -1;
    return !r.corruptions && !r.leaks;
}

static uint64_t somewhere(struct prog *g, uint64_t size) {
    uint32_t r = prog_u16(g);
    uint64_t at = r & 0x8000 ? (uint64_t)(r & 0x7fff) * 512 : (r & 0x7fff) * (size / 0x8000 + 1);
    return size ? at % size : 0;
}

static void known_to_bitmaps(const struct node *n, uint64_t at, uint64_t len) {
    for (struct bitmap *b = NULL; (b = bitmap_next(n, b));)
        if (b->enabled && bitmap_usable(b, false, NULL) == 0)
            FUZZ_CHECK(bitmap_get(b, at) && bitmap_get(b, at + len - 1),
                       "bitmap '%s' misses what was written at %" PRIu64, b->name, at);
}

static void bitmap_op_co(struct node *n, struct prog *g) {
    struct bitmap_new what = {.name = "fuzz", .granularity = 512, .persistent = true};
    unsigned op = prog_u8(g);
    struct bitmap *b = op & 0x80 ? bitmap_find(n, "fuzz") : bitmap_next(n, NULL);
    switch (op % 6) {
    case 0:
        bitmap_add_co(n, &what, NULL, NULL);
        return;
    case 1:
        bitmap_store_co(n, NULL);
        return;
    case 2:
        if (b)
            bitmap_remove_co(b, NULL);
        return;
    case 3:
        if (b)
            bitmap_clear_co(b, NULL);
        return;
    case 4:
        if (b)
            bitmap_set_enabled_co(b, op & 0x40, NULL);
        return;
    default:
        if (b && bitmap_next(n, b))
            bitmap_merge_co(b, bitmap_next(n, b), NULL);
    }
}

static void write_co(struct node *n, struct prog *g, uint64_t at, uint64_t len, bool clean) {
    if (!len)
        return;
    memset(buf, prog_u8(g), len);
    if (disk_pwrite_co(n, at, buf, len) < 0)
        return;
    known_to_bitmaps(n, at, len);
    if (!clean)
        return;
    int r = disk_pread_co(n, at, back, len);
    FUZZ_CHECK(r < 0 || !memcmp(buf, back, len),
               "%" PRIu64 " bytes written at %" PRIu64 " read back as something else", len, at);
}

static void write_coded_co(struct node *n, struct prog *g, uint64_t at) {
    uint64_t unit = n->granularity;
    at = align_down(at, unit);
    if (unit > OP_BYTES_MAX || at >= n->size)
        return;
    memset(buf, prog_u8(g), unit);
    if (!n->codec) /* an external data file */
        return;
    ssize_t len = n->codec->encode(buf, unit, back, unit);
    if (len > 0)
        disk_write_coded_co(n, at, back, (uint32_t)len);
}

/* Makes, applies or deletes an internal snapshot. */
static void snapshot_co(struct node *n, struct prog *g, unsigned what) {
    AUTO_SNAPSHOTS struct snapshot_list list = {0};
    struct snapshot_info info = {.name = xstrdup("fuzz")};
    int r = disk_snapshot_list_co(n, &list, NULL);
    const char *id = !r && list.count ? list.v[prog_u8(g) % list.count].id : NULL;
    if (what == 0 && list.count < 8)
        disk_snapshot_create_co(n, &info, NULL);
    else if (what == 1 && id)
        disk_snapshot_apply_co(n, id, NULL);
    else if (what == 2 && id)
        disk_snapshot_delete_co(n, id, NULL);
    snapshot_info_free(&info);
}

static void op_co(struct node *n, struct prog *g, bool clean) {
    unsigned op = prog_u8(g);
    uint64_t at = somewhere(g, n->size);
    uint64_t len = (uint64_t)prog_u8(g) * (op & 0x80 ? 512 : 7);
    len = min_u64(min_u64(len, OP_BYTES_MAX), n->size - at);
    switch (op % 8) {
    case 0:
    case 1:
        write_co(n, g, at, len, clean);
        break;
    case 2:
        if (len)
            disk_zero_co(n, at, len, op & 0x40 ? ZERO_MAY_UNMAP : 0);
        break;
    case 3:
        if (len)
            disk_discard_co(n, at, len);
        break;
    case 4:
        write_coded_co(n, g, at);
        break;
    case 5:
        if (op & 0x20)
            bitmap_op_co(n, g);
        else
            disk_flush_co(n);
        break;
    case 6:
        disk_resize_co(n, n->size + (uint64_t)prog_u8(g) * 512 * (op & 0x80 ? 4096 : 1),
                       PREALLOC_OFF, NULL);
        break;
    default:
        if (op & 0x40)
            snapshot_co(n, g, op >> 3 & 3);
        else if (len)
            disk_pread_co(n, at, buf, len);
    }
}

static void change_co(struct node *file, struct prog *g, bool clean) {
    struct node *n = open_co(file, OPEN_RW | OPEN_UNMAP);
    if (!n)
        return;
    for (int i = 0; i < OPS_MAX && prog_more(g); i++)
        op_co(n, g, clean);
    disk_flush_co(n);
    node_unref_co(n);
}

/* check -r all on the image as it came: what a repair calls clean must be clean. */
static void repair_co(const uint8_t *image, size_t image_len) {
    struct node *file = fuzz_memory_co(DISK_LIMIT);
    struct check_result r = {.fix = CHECK_FIX_LEAKS | CHECK_FIX_ERRORS};
    struct err e AUTO_ERR = ERR_INIT;
    uint64_t later = 0;
    image_load_co(file, image, image_len);
    struct node *n = open_co(file, OPEN_RW | OPEN_CHECK);
    int failed = n ? n->drv->format->check_co(n, &r, &e) : -1;
    node_unref_co(n);
    if (!failed && !r.corruptions && !r.check_errors) {
        int after = check_co(file, &later);
        FUZZ_CHECK(after >= 0 && !later, "%" PRIu64 " corruptions after a repair without any left",
                   later);
        FUZZ_CHECK(r.leaks || after == 1, "leaks after a repair without any left");
    }
    node_unref_co(file);
}

static void one_co(void *arg) {
    const struct input *in = arg;
    size_t image_len;
    struct prog program;
    uint64_t corruptions = 0, later = 0;
    const struct driver *drv;
    int score;
    struct node *file = fuzz_memory_co(DISK_LIMIT);
    image_split(in->data, in->size, &image_len, &program);
    image_load_co(file, in->data, image_len);
    if (disk_probe_co(file, &drv, &score, NULL) == 0) {
        uint64_t size = file->size;
        int64_t allocated = disk_allocated(file);
        look_co(file);
        int clean = check_co(file, &corruptions);
        FUZZ_CHECK(size == file->size && allocated == disk_allocated(file),
                   "looking at the image has changed its file");
        change_co(file, &program, clean == 1);
        int after = check_co(file, &later);
        FUZZ_CHECK(clean != 1 || after >= 0, "a clean image can no longer be checked");
        FUZZ_CHECK(clean != 1 || !later, "a clean image has %" PRIu64 " corruptions after writing",
                   later);
        repair_co(in->data, image_len);
    }
    node_unref_co(file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct input in = {data, size};
    fuzz_run(one_co, &in);
    return 0;
}
