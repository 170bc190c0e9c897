/* SPDX-License-Identifier: MIT */
/*
 * A program of operations on a fresh image of a small format (FUZZ_FORMAT, given by the build),
 * beside a plain array that says what a disk is.
 *
 * The first bytes choose a row of the format's options, the size, a base below it where the format
 * can have one, and the room on the storage; the rest are operations.
 *
 * Invariants: every read gives what the array holds, also after a reopen, in status as in content;
 * an operation that failed for lack of room leaves old or new bytes; after the close the image has
 * no corruption, and no leak either unless something failed.
 */
#include "fuzz.h"

#define DISK_MAX (160 * KIB)
#define OPS_MAX 60
#define ROOM (24 * MIB)

static uint8_t model[DISK_MAX], buf[DISK_MAX], base_bytes[DISK_MAX];

struct disk {
    struct node *file, *n, *base;
    uint64_t size;
    bool failed; /* something ran out of room */
};

/* Rows of options; `base`: may lie over another image. */
static const struct shape {
    const char *format, *options;
    bool base;
} shapes[] = {
    {"vdi", "block_size=4k"},
    {"vdi", "block_size=16k"},
    {"vdi", "block_size=4k,static=on"},
    {"vdi", "block_size=32k"},
    {"qed", "cluster_size=4k,table_size=1", true},
    {"qed", "cluster_size=4k,table_size=16", true},
    {"qed", "cluster_size=16k,table_size=2", true},
    {"qcow", "", true},
    {"parallels", "cluster_size=512"},
    {"parallels", "cluster_size=4k"},
    {"parallels", "cluster_size=32k"},
    {"vpc", "force_size=on"},
    {"vpc", "force_size=on,subformat=fixed"},
    {"vhdx", "block_size=1M"},
    {"vhdx", "block_size=1M,subformat=fixed"},
    {"vmdk", ""},
    {"vmdk", "zeroed_grain=on"},
};

static const struct shape *choose(unsigned number) {
    const struct shape *found[16];
    unsigned count = 0;
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++)
        if (!strcmp(shapes[i].format, FUZZ_FORMAT))
            found[count++] = &shapes[i];
    FUZZ_CHECK(count, "no options for " FUZZ_FORMAT);
    return found[number % count];
}

static struct node *open_co(struct disk *d, unsigned flags) {
    struct open_req req = {.flags = flags | OPEN_NO_BACKING, .cache = CACHE_WRITEBACK};
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = NULL;
    int r = node_open_on_co(node_ref(d->file), driver_find(FUZZ_FORMAT), NULL, &req, &n, &e);
    FUZZ_CHECK(r == 0, "our own image does not open: %s", err_text(&e));
    n->backing = d->base ? node_ref(d->base) : NULL;
    return n;
}

static void make_base_co(struct disk *d, uint64_t len) {
    struct node *file = fuzz_memory_co(0);
    struct err e AUTO_ERR = ERR_INIT;
    struct open_req req = {0};
    for (uint64_t i = 0; i < len; i++)
        base_bytes[i] = (uint8_t)(i / 512 % 7 ? i / 512 : 0);
    if (len)
        disk_pwrite_co(file, 0, base_bytes, len);
    int r = node_open_on_co(file, driver_find("raw"), NULL, &req, &d->base, &e);
    FUZZ_CHECK(r == 0, "the base does not open: %s", err_text(&e));
    memcpy(model, base_bytes, min_u64(len, d->size));
}

/* False: there is no room. */
static bool create_co(struct disk *d, struct prog *g) {
    const struct shape *shape = choose(prog_u8(g));
    unsigned flags = prog_u8(g);
    bool base = shape->base && flags & 4;
    d->size = (prog_u32(g) % DISK_MAX + 512) / 512 * 512;
    d->size = min_u64(d->size, DISK_MAX);
    json_t *o = json_object();
    struct err e AUTO_ERR = ERR_INIT;
    FUZZ_CHECK(opt_parse_keyval(shape->options, NULL, &o, &e) == 0, "options: %s", err_text(&e));
    json_object_set_new(o, "size", json_integer((json_int_t)d->size));
    if (base)
        json_object_set_new(o, "backing_file", json_string("nowhere"));
    d->file = fuzz_memory_co(flags & 8 ? 4 * KIB + prog_u16(g) * UINT64_C(16) : ROOM);
    int r = format_create_co(d->file, driver_find(FUZZ_FORMAT), o, &e);
    json_decref(o);
    FUZZ_CHECK(r == 0 || r == -ENOSPC, "creation failed: %s", err_text(&e));
    if (r)
        return false;
    memset(model, 0, sizeof(model));
    if (base)
        make_base_co(d, min_u64(d->size / 512 * (prog_u8(g) + 1) / 200 * 512, DISK_MAX));
    d->n = open_co(d, OPEN_RW | (flags & 64 ? OPEN_UNMAP : 0));
    FUZZ_CHECK(d->n->size == d->size, "a disk of %" PRIu64 " bytes, not %" PRIu64, d->n->size,
               d->size);
    return true;
}

static void read_model_co(struct disk *d, uint64_t at, uint64_t len) {
    if (!len)
        return;
    int r = disk_pread_co(d->n, at, buf, len);
    FUZZ_CHECK(r == 0, "reading failed with %d", r);
    for (uint64_t i = 0; memcmp(buf, model + at, len) && i < len; i++)
        FUZZ_CHECK(buf[i] == model[at + i], "byte %" PRIu64 " is %02x, not %02x", at + i, buf[i],
                   model[at + i]);
}

/* After `r`: the range holds `bytes` (NULL: zeros), or, when room was lacking, any mix of the two.
 */
static void settle_co(struct disk *d, int r, uint64_t at, uint64_t len, const uint8_t *bytes) {
    FUZZ_CHECK(r == 0 || r == -ENOSPC || r == -ENOTSUP, "an operation failed with %d", r);
    if (r == 0) {
        if (bytes)
            memcpy(model + at, bytes, len);
        else
            memset(model + at, 0, len);
        return;
    }
    d->failed |= r == -ENOSPC;
    FUZZ_CHECK(disk_pread_co(d->n, at, buf, len) == 0, "reading failed");
    for (uint64_t i = 0; i < len; i++)
        FUZZ_CHECK(buf[i] == model[at + i] || buf[i] == (bytes ? bytes[i] : 0),
                   "byte %" PRIu64 " is neither old nor new after a failed write", at + i);
    memcpy(model + at, buf, len);
}

static void write_co(struct disk *d, struct prog *g, uint64_t at, uint64_t len, unsigned flags) {
    static uint8_t bytes[DISK_MAX];
    uint8_t fill = prog_u8(g);
    for (uint64_t i = 0; i < len; i++)
        bytes[i] = fill & 1 ? (uint8_t)(fill + i / 13) : fill & 2 ? 0 : fill;
    struct iovec v = {bytes, len};
    if (len)
        settle_co(d, disk_pwritev_co(d->n, at, len, &v, 1, flags), at, len, bytes);
}

static void discard_co(struct disk *d, uint64_t at, uint64_t len) {
    /* Old or zeros: whatever it is now, it stays. */
    if (!len)
        return;
    d->failed |= disk_discard_co(d->n, at, len) < 0;
    FUZZ_CHECK(disk_pread_co(d->n, at, buf, len) == 0, "reading failed");
    for (uint64_t i = 0; i < len; i++)
        FUZZ_CHECK(buf[i] == model[at + i] || !buf[i],
                   "byte %" PRIu64 " is neither old nor zero after a discard", at + i);
    memcpy(model + at, buf, len);
}

static void write_coded_co(struct disk *d, struct prog *g, uint64_t at) {
    static uint8_t unit[DISK_MAX], code[DISK_MAX];
    uint64_t size = d->n->granularity, len;
    at = align_down(at, size);
    if (!d->n->codec || at >= d->size)
        return;
    len = min_u64(size, d->size - at);
    memset(unit, 0, size);
    unsigned step = prog_u8(g) | 1;
    for (uint64_t i = 0; i < len; i++)
        unit[i] = (uint8_t)(i / (step * 16));
    ssize_t coded = d->n->codec->encode(unit, size, code, size);
    if (coded > 0)
        settle_co(d, disk_write_coded_co(d->n, at, code, (uint32_t)coded), at, len, unit);
}

static void status_co(struct disk *d) {
    struct status st;
    for (uint64_t at = 0; at < d->size; at += st.length) {
        int r = disk_status_co(d->n, at, d->size - at, STATUS_PRECISE, &st);
        FUZZ_CHECK(r == 0 && st.length && st.length <= d->size - at, "status failed with %d", r);
        FUZZ_CHECK(!st.zero || bytes_are_zero(model + at, st.length),
                   "status calls [%" PRIu64 ", +%" PRIu64 ") zero", at, st.length);
    }
}

static void resize_co(struct disk *d, struct prog *g) {
    uint64_t by = prog_u8(g) * UINT64_C(512), size = min_u64(d->size + by, DISK_MAX);
    int r = disk_resize_co(d->n, size, PREALLOC_OFF, NULL);
    if (r < 0) {
        d->failed |= r != -ENOTSUP && r != -EFBIG;
        return;
    }
    FUZZ_CHECK(d->n->size == size, "the disk has %" PRIu64 " bytes, not %" PRIu64, d->n->size,
               size);
    if (size > d->size) {
        FUZZ_CHECK(disk_pread_co(d->n, d->size, model + d->size, size - d->size) == 0,
                   "reading the new end failed");
        FUZZ_CHECK(bytes_are_zero(model + d->size, size - d->size), "the new end is not zero");
    }
    d->size = size;
}

static void reopen_co(struct disk *d) {
    if (disk_flush_co(d->n) < 0) {
        d->failed = true;
        return;
    }
    node_unref_co(d->n);
    d->n = open_co(d, OPEN_RW | OPEN_UNMAP);
}

static void op_co(struct disk *d, struct prog *g) {
    unsigned op = prog_u8(g);
    uint64_t at = prog_u32(g) % d->size, len = prog_u16(g);
    if (op & 0x40)
        len = len % 256;
    if (op & 0x80) {
        at = align_down(at, 512);
        len *= 4;
    }
    len = min_u64(len, d->size - at);
    switch (op % 16) {
    case 0:
    case 1:
    case 2:
    case 3:
        write_co(d, g, at, len, 0);
        break;
    case 4:
        write_co(d, g, at, len, IO_DETECT_ZEROES);
        break;
    case 5:
        write_co(d, g, at, len, IO_FUA);
        break;
    case 6:
    case 7:
        if (len)
            settle_co(d, disk_zero_co(d->n, at, len, op & 0x20 ? ZERO_MAY_UNMAP : 0), at, len,
                      NULL);
        break;
    case 8:
    case 9:
        discard_co(d, at, len);
        break;
    case 10:
    case 11:
        write_coded_co(d, g, at);
        break;
    case 12:
        d->failed |= disk_flush_co(d->n) < 0;
        break;
    case 13:
        resize_co(d, g);
        break;
    case 14:
        reopen_co(d);
        break;
    default:
        read_model_co(d, at, len);
        status_co(d);
    }
}

static void report(void *arg, bool is_leak, const char *text) {
    fprintf(stderr, "%s\n", text);
}

static void finish_co(struct disk *d) {
    struct check_result res = {.report = report};
    struct err e AUTO_ERR = ERR_INIT;
    read_model_co(d, 0, d->size);
    d->failed |= disk_flush_co(d->n) < 0;
    node_unref_co(d->n);
    if (driver_find(FUZZ_FORMAT)->format->check_co) {
        d->n = open_co(d, OPEN_CHECK);
        int r = d->n->drv->format->check_co(d->n, &res, &e);
        FUZZ_CHECK(r == 0 && !res.check_errors, "the check failed: %s", err_text(&e));
        FUZZ_CHECK(!res.corruptions, "%" PRIu64 " corruptions", res.corruptions);
        FUZZ_CHECK(!res.leaks || d->failed, "%" PRIu64 " leaks although nothing failed", res.leaks);
        node_unref_co(d->n);
    }
    d->n = open_co(d, 0);
    if (!d->failed)
        read_model_co(d, 0, d->size);
    node_unref_co(d->n);
}

static void one_co(void *arg) {
    struct prog *g = arg;
    struct disk d = {0};
    if (create_co(&d, g)) {
        for (int i = 0; i < OPS_MAX && prog_more(g); i++)
            op_co(&d, g);
        finish_co(&d);
    }
    if (d.base)
        node_unref_co(d.base);
    node_unref_co(d.file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct prog g = {data, data + size};
    fuzz_run(one_co, &g);
    return 0;
}
