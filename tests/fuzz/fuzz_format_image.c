/* SPDX-License-Identifier: MIT */
/*
 * A hostile image of a small format (FUZZ_FORMAT, given by the build): opened to read, to check, to
 * write, and to be repaired.
 *
 *   1. read-only: probe, describe, walk the status of the disk, read some of it;
 *   2. check;
 *   3. on the same storage, read-write: the program behind the image's mark (write, zero, discard,
 *      coded write, flush, resize, bitmaps, read), flush, close;
 *   4. check again;
 *   5. the image as it came, repaired, read and checked.
 *
 * Invariants: nothing crashes, hangs, leaks or grows without bound; looking changes nothing; an
 * image that was clean in 2 has no corruption in 4, and what a write put down in it reads back
 * right after; a repair that says it left nothing left nothing, and whatever could be read before
 * it reads the same afterwards.
 *
 * Steps that a format has not (check, repair, writing) are left out.  Nothing else is opened: a
 * name in an image leads nowhere here.
 */
#include "disk/bitmap.h"
#include "base/crc32c.h"
#include "fuzz.h"

#define DISK_LIMIT (16 * MIB)
#define STATUS_STEPS 300
#define READ_BYTES_MAX (128 * KIB)
#define OPS_MAX 40
#define OP_BYTES_MAX (96 * KIB)
#define PIECES 48 /* of the disk, compared around a repair */
#define PIECE_BYTES 2048u

static uint8_t buf[READ_BYTES_MAX], back[READ_BYTES_MAX];

struct input {
    const uint8_t *data;
    size_t size;
};

static const struct format_ops *ops(void) {
    return driver_find(FUZZ_FORMAT)->format;
}

static struct node *open_co(struct node *file, unsigned flags) {
    struct open_req req = {.flags = flags | OPEN_NO_BACKING, .cache = CACHE_WRITEBACK};
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = NULL;
    int r = node_open_on_co(node_ref(file), driver_find(FUZZ_FORMAT), NULL, &req, &n, &e);
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
    }
}

static void look_co(struct node *file) {
    struct node *n = open_co(file, 0);
    if (!n)
        return;
    if (ops()->describe)
        json_decref(ops()->describe(n));
    read_bitmaps_co(n);
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
    struct node *n = ops()->check_co ? open_co(file, OPEN_CHECK) : NULL;
    struct check_result r = {0};
    struct err e AUTO_ERR = ERR_INIT;
    if (!n)
        return -1;
    int failed = ops()->check_co(n, &r, &e);
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

static void write_co(struct node *n, struct prog *g, uint64_t at, uint64_t len, bool clean) {
    memset(buf, prog_u8(g), len);
    if (!len || disk_pwrite_co(n, at, buf, len) < 0 || !clean)
        return;
    int r = disk_pread_co(n, at, back, len);
    FUZZ_CHECK(r < 0 || !memcmp(buf, back, len),
               "%" PRIu64 " bytes written at %" PRIu64 " read back as something else", len, at);
}

static void write_coded_co(struct node *n, struct prog *g, uint64_t at) {
    uint64_t unit = n->granularity;
    at = align_down(at, unit);
    if (!n->codec || unit > OP_BYTES_MAX || at >= n->size)
        return;
    memset(buf, prog_u8(g), unit);
    ssize_t len = n->codec->encode(buf, unit, back, unit);
    if (len > 0)
        disk_write_coded_co(n, at, back, (uint32_t)len);
}

static void bitmap_op_co(struct node *n, struct prog *g) {
    unsigned op = prog_u8(g);
    struct bitmap_new what = {.name = op & 0x80 ? "00112233-4455-6677-8899-aabbccddeeff" : "fuzz",
                              .granularity = 512u << op / 8 % 8,
                              .persistent = true};
    struct bitmap *b = bitmap_next(n, NULL);
    if (op % 4 == 0)
        bitmap_add_co(n, &what, NULL, NULL);
    else if (op % 4 == 1)
        bitmap_store_co(n, NULL);
    else if (op % 4 == 2 && b)
        bitmap_remove_co(b, NULL);
    else if (b)
        bitmap_clear_co(b, NULL);
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
        if (len)
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

/* ---------------------------------------------------------------- repair */

static struct {
    int status; /* -1: could not be read */
    uint8_t bytes[PIECE_BYTES];
} pieces[PIECES];

static uint64_t piece_at(const struct node *n, unsigned i) {
    return i < PIECES / 2 ? i * (uint64_t)n->granularity : n->size / (PIECES / 2) * (i % 24);
}

/* What can be read is remembered, or compared with what was.  As it would be for somebody who only
 * looks: what the repair may change lies behind the end of the disk. */
static void read_pieces_co(struct node *file, bool compare) {
    struct node *n = open_co(file, 0);
    for (unsigned i = 0; i < PIECES; i++) {
        uint64_t at = n ? piece_at(n, i) : 0, len = 0;
        if (n && at < n->size)
            len = min_u64(PIECE_BYTES, n->size - at);
        int r = len ? disk_pread_co(n, at, buf, len) : -1;
        if (!compare) {
            pieces[i].status = r;
            memcpy(pieces[i].bytes, buf, len);
        } else {
            FUZZ_CHECK(pieces[i].status || (r == 0 && !memcmp(pieces[i].bytes, buf, len)),
                       "what lies at %" PRIu64 " is another after a repair (%d)", at, r);
        }
    }
    node_unref_co(n);
}

/*
 * Checksums of VHDX made right where the structure looks like one, or no change of it would ever be
 * looked at: headers, region tables, and what lies in a log of 1 MiB at its usual place.
 */
static void mend_sums_co(struct node *file) {
    static const uint32_t at[] = {64, 128, 192, 256};
    static uint8_t b[64 * KIB];
    for (unsigned i = 0; i < 4 + 256; i++) {
        uint64_t host = i < 4 ? at[i] * KIB : MIB + (i - 4) * 4 * KIB;
        if (host + 4096 > file->size || disk_pread_co(file, host, b, i < 4 ? sizeof(b) : 4096))
            return;
        size_t len = i < 2 ? 4096 : i < 4 ? sizeof(b) : le32_load(b + 8);
        if (i >= 4 && (memcmp(b, "loge", 4) || len < 4096 || len > sizeof(b) ||
                       disk_pread_co(file, host, b, len)))
            continue;
        memset(b + 4, 0, 4);
        le32_store(b + 4, crc32c(0, b, len));
        disk_pwrite_co(file, host + 4, b + 4, 4);
    }
}

static void load_co(struct node *file, const uint8_t *image, size_t len) {
    image_load_co(file, image, len);
    if (!strcmp(FUZZ_FORMAT, "vhdx"))
        mend_sums_co(file);
}

static void repair_co(const uint8_t *image, size_t image_len) {
    struct node *file = fuzz_memory_co(DISK_LIMIT);
    struct check_result r = {.fix = ops()->repairs};
    struct err e AUTO_ERR = ERR_INIT;
    uint64_t later = 0;
    load_co(file, image, image_len);
    read_pieces_co(file, false);
    struct node *n = open_co(file, OPEN_RW | OPEN_CHECK);
    int failed = n ? ops()->check_co(n, &r, &e) : -1;
    node_unref_co(n);
    if (n)
        read_pieces_co(file, true);
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
    load_co(file, in->data, image_len);
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
        if (ops()->repairs)
            repair_co(in->data, image_len);
    }
    node_unref_co(file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct input in = {data, size};
    fuzz_run(one_co, &in);
    return 0;
}
