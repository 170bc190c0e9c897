/* SPDX-License-Identifier: MIT */
/*
 * A program of operations on a fresh qcow2 image, beside a plain array that says what a disk is.
 *
 * The first bytes choose the geometry (cluster size, refcount width, version, coding, size,
 * preallocation, a base below it or not, room on the storage), the rest are operations.
 *
 * Invariants: every read gives what the array holds, also after a reopen, in status as in content
 * (what status calls zero is zero); an operation that failed for lack of room leaves old or new
 * bytes; a snapshot that is applied gives back what the disk held when it was made, amended options
 * change nothing that is read; after the close the image has no corruption, and no leak either
 * unless something failed.
 */
#include "disk/snapshot.h"
#include "fuzz.h"

#define DISK_MAX (128 * KIB)
#define OPS_MAX 60
#define ROOM (8 * MIB)

static uint8_t model[DISK_MAX], buf[DISK_MAX], base_bytes[DISK_MAX];

struct disk {
    struct node *file, *n, *base;
    uint64_t size;
    bool failed; /* something ran out of room */
};

static struct node *open_co(struct disk *d, unsigned flags) {
    struct open_req req = {.flags = flags | OPEN_NO_BACKING, .cache = CACHE_WRITEBACK};
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = NULL;
    int r = node_open_on_co(node_ref(d->file), driver_find("qcow2"), NULL, &req, &n, &e);
    FUZZ_CHECK(r == 0, "our own image does not open: %s", err_text(&e));
    n->backing = d->base ? node_ref(d->base) : NULL;
    return n;
}

/* False: the options exclude each other, or there is no room. */
static bool create_co(struct disk *d, struct prog *g) {
    static const char *const codings[] = {"zlib", "zstd"};
    unsigned bits = 9 + prog_u8(g) % 8, flags = prog_u8(g);
    bool v2 = flags & 1, base = flags & 4, extended = flags & 128 && bits >= 14 && !v2;
    unsigned order = v2 ? 4 : prog_u8(g) % 7;
    d->size = prog_u32(g) % DISK_MAX / 512 * 512;
    uint64_t room = flags & 8 ? 4 * KIB + prog_u16(g) * UINT64_C(16) : ROOM;
    static const char *const prealloc[] = {"off", "metadata"};
    json_t *o = json_pack("{s:s, s:b, s:I, s:I, s:s, s:I, s:s}", "compat", v2 ? "0.10" : "1.1",
                          "extended_l2", extended, "cluster_size", (json_int_t)(1u << bits),
                          "refcount_bits", (json_int_t)(1u << order), "compression_type",
                          codings[!v2 && flags & 2], "size", (json_int_t)d->size, "preallocation",
                          prealloc[!base && flags & 16]);
    struct err e AUTO_ERR = ERR_INIT;
    d->file = fuzz_memory_co(room);
    int r = format_create_co(d->file, driver_find("qcow2"), o, &e);
    json_decref(o);
    FUZZ_CHECK(r == 0 || r == -ENOSPC, "creation failed: %s", err_text(&e));
    if (r)
        return false;
    memset(model, 0, sizeof(model));
    if (base) {
        uint64_t len = d->size / 512 * (prog_u8(g) + 1) / 200 * 512 + (flags & 32 ? 512 : 0);
        len = min_u64(len, DISK_MAX);
        struct node *file = fuzz_memory_co(0);
        for (uint64_t i = 0; i < len; i++)
            base_bytes[i] = (uint8_t)(i / 512 % 7 ? i / 512 : 0);
        if (len)
            disk_pwrite_co(file, 0, base_bytes, len);
        struct open_req req = {.flags = 0};
        r = node_open_on_co(file, driver_find("raw"), NULL, &req, &d->base, &e);
        FUZZ_CHECK(r == 0, "the base does not open: %s", err_text(&e));
        memcpy(model, base_bytes, min_u64(len, d->size));
    }
    d->n = open_co(d, OPEN_RW | (flags & 64 ? OPEN_UNMAP : 0));
    return true;
}

/* Each byte of the range holds the old or the new content: take over what it is. */
static void settle_co(struct disk *d, uint64_t at, uint64_t len, const uint8_t *new_bytes,
                      uint8_t fill) {
    d->failed = true;
    FUZZ_CHECK(disk_pread_co(d->n, at, buf + at, len) == 0, "reading failed");
    for (uint64_t i = 0; i < len; i++) {
        uint8_t want = new_bytes ? new_bytes[i] : fill;
        FUZZ_CHECK(buf[at + i] == model[at + i] || buf[at + i] == want,
                   "byte %" PRIu64 " is neither old nor new after a failed write", at + i);
    }
    memcpy(model + at, buf + at, len);
}

static bool lack_of_room(int r) {
    FUZZ_CHECK(r == 0 || r == -ENOSPC || r == -ENOTSUP, "an operation failed with %d", r);
    return r < 0;
}

static void read_co(struct disk *d, uint64_t at, uint64_t len) {
    if (!len)
        return;
    int r = disk_pread_co(d->n, at, buf, len);
    FUZZ_CHECK(r == 0, "reading failed with %d", r);
    for (uint64_t i = 0; memcmp(buf, model + at, len) && i < len; i++)
        FUZZ_CHECK(buf[i] == model[at + i], "byte %" PRIu64 " is %02x, not %02x", at + i, buf[i],
                   model[at + i]);
}

static void write_co(struct disk *d, struct prog *g, uint64_t at, uint64_t len, unsigned flags) {
    static uint8_t bytes[DISK_MAX];
    uint8_t fill = prog_u8(g);
    for (uint64_t i = 0; i < len; i++)
        bytes[i] = fill & 1 ? (uint8_t)(fill + i / 13) : fill & 2 ? 0 : fill;
    struct iovec v = {bytes, len};
    int r = len ? disk_pwritev_co(d->n, at, len, &v, 1, flags) : 0;
    if (lack_of_room(r))
        settle_co(d, at, len, bytes, 0);
    else
        memcpy(model + at, bytes, len);
}

static void zero_co(struct disk *d, uint64_t at, uint64_t len, unsigned flags) {
    int r = len ? disk_zero_co(d->n, at, len, flags) : 0;
    if (lack_of_room(r))
        settle_co(d, at, len, NULL, 0);
    else
        memset(model + at, 0, len);
}

static void discard_co(struct disk *d, uint64_t at, uint64_t len) {
    /* Old or zeros: whatever it is now, it stays. */
    if (len && disk_discard_co(d->n, at, len) < 0)
        d->failed = true;
    if (!len)
        return;
    FUZZ_CHECK(disk_pread_co(d->n, at, buf, len) == 0, "reading failed");
    for (uint64_t i = 0; !bytes_are_zero(buf, len) && i < len; i++)
        FUZZ_CHECK(buf[i] == model[at + i] || !buf[i],
                   "byte %" PRIu64 " is neither old nor zero after a discard", at + i);
    memcpy(model + at, buf, len);
}

static void write_coded_co(struct disk *d, struct prog *g, uint64_t at) {
    static uint8_t unit[DISK_MAX], code[DISK_MAX];
    uint64_t size = d->n->granularity, len;
    at = align_down(at, size);
    if (at >= d->size)
        return;
    len = min_u64(size, d->size - at);
    memset(unit, 0, size);
    unsigned step = prog_u8(g) | 1;
    for (uint64_t i = 0; i < len; i++)
        unit[i] = (uint8_t)(i / (step * 16));
    ssize_t coded = d->n->codec->encode(unit, size, code, size);
    if (coded <= 0)
        return;
    int r = disk_write_coded_co(d->n, at, code, (uint32_t)coded);
    if (r)
        settle_co(d, at, len, unit, 0);
    else
        memcpy(model + at, unit, len);
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

static void resize_co(struct disk *d, struct prog *g, bool shrink) {
    uint64_t by = prog_u8(g) * UINT64_C(512);
    uint64_t size = shrink ? d->size - min_u64(by, d->size) : min_u64(d->size + by, DISK_MAX);
    if (disk_resize_co(d->n, size, PREALLOC_OFF, NULL) < 0) {
        d->failed = true;
        return;
    }
    FUZZ_CHECK(d->n->size == size, "the disk has %" PRIu64 " bytes, not %" PRIu64, d->n->size,
               size);
    if (size > d->size) { /* over a longer base, too */
        FUZZ_CHECK(disk_pread_co(d->n, d->size, model + d->size, size - d->size) == 0,
                   "reading the new end failed");
        FUZZ_CHECK(bytes_are_zero(model + d->size, size - d->size), "the new end is not zero");
    }
    d->size = size;
}

/* ---- internal snapshots: what they hold is remembered ---- */

static struct saved {
    char name[8]; /* empty: free */
    uint64_t size;
    uint8_t bytes[DISK_MAX];
} saved[3];

static void snapshot_co(struct disk *d, struct prog *g) {
    static unsigned number;
    struct saved *s = &saved[prog_u8(g) % 3];
    if (*s->name)
        return;
    snprintf(s->name, sizeof(s->name), "s%u", number++ % 100000);
    struct snapshot_info info = {.name = xstrdup(s->name), .icount = SNAPSHOT_ICOUNT_UNKNOWN};
    int r = disk_snapshot_create_co(d->n, &info, NULL);
    snapshot_info_free(&info);
    if (r < 0) {
        d->failed = true; /* it may be there or not */
        *s->name = 0;
        return;
    }
    s->size = d->size;
    memcpy(s->bytes, model, d->size);
}

/* Deleted, or the disk returns to it. */
static void use_snapshot_co(struct disk *d, struct prog *g, bool apply) {
    struct saved *s = &saved[prog_u8(g) % 3];
    AUTO_SNAPSHOTS struct snapshot_list list = {0};
    struct err e AUTO_ERR = ERR_INIT;
    if (!*s->name)
        return;
    int r = disk_snapshot_list_co(d->n, &list, &e);
    FUZZ_CHECK(r == 0, "the snapshots cannot be listed: %s", err_text(&e));
    const struct snapshot_info *x = snapshot_find(&list, NULL, s->name);
    FUZZ_CHECK(x, "snapshot '%s' is gone", s->name);
    r = apply ? disk_snapshot_apply_co(d->n, x->id, &e) : disk_snapshot_delete_co(d->n, x->id, &e);
    if (r < 0) {
        d->failed = true;
        if (!apply)
            *s->name = 0;
        return;
    }
    if (apply) {
        d->size = s->size;
        memcpy(model, s->bytes, s->size);
        FUZZ_CHECK(d->n->size == d->size, "the disk has %" PRIu64 " bytes, not %" PRIu64,
                   d->n->size, d->size);
    } else {
        *s->name = 0;
    }
    read_co(d, 0, d->size);
}

static void amend_co(struct disk *d, struct prog *g) {
    unsigned how = prog_u8(g);
    struct amend_ctx ctx = {0};
    json_t *o = how & 8    ? json_pack("{s:s}", "compat", how & 1 ? "0.10" : "1.1")
                : how & 16 ? json_pack("{s:b}", "lazy_refcounts", how & 1)
                           : json_pack("{s:i}", "refcount_bits", 1 << how % 7);
    if (disk_amend_co(d->n, o, &ctx, NULL) < 0)
        d->failed = true; /* refused, or no room */
    json_decref(o);
    read_co(d, 0, d->size);
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
    uint64_t at = d->size ? prog_u32(g) % d->size : 0, len = prog_u16(g);
    if (op & 0x40)
        len = len % 256;
    if (op & 0x80) {
        at = align_down(at, 512);
        len *= 4;
    }
    len = min_u64(len, d->size - at);
    switch (op % 20) {
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
        zero_co(d, at, len, op & 0x20 ? ZERO_MAY_UNMAP : 0);
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
        if (disk_flush_co(d->n) < 0)
            d->failed = true;
        break;
    case 13:
        resize_co(d, g, op & 0x20);
        break;
    case 14:
        reopen_co(d);
        break;
    case 15:
        snapshot_co(d, g);
        break;
    case 16:
        use_snapshot_co(d, g, true);
        break;
    case 17:
        use_snapshot_co(d, g, false);
        break;
    case 18:
        amend_co(d, g);
        break;
    default:
        read_co(d, at, len);
        status_co(d);
    }
}

static void report(void *arg, bool is_leak, const char *text) {
    if (!is_leak)
        fprintf(stderr, "%s\n", text);
}

static void finish_co(struct disk *d) {
    struct check_result res = {.report = report};
    struct err e AUTO_ERR = ERR_INIT;
    read_co(d, 0, d->size);
    if (disk_flush_co(d->n) < 0)
        d->failed = true;
    node_unref_co(d->n);
    d->n = open_co(d, OPEN_CHECK);
    int r = d->n->drv->format->check_co(d->n, &res, &e);
    FUZZ_CHECK(r == 0 && !res.check_errors, "the check failed: %s", err_text(&e));
    FUZZ_CHECK(!res.corruptions, "%" PRIu64 " corruptions", res.corruptions);
    FUZZ_CHECK(!res.leaks || d->failed, "%" PRIu64 " leaks although nothing failed", res.leaks);
    node_unref_co(d->n);
    d->n = open_co(d, 0);
    if (!d->failed)
        read_co(d, 0, d->size);
    node_unref_co(d->n);
}

static void one_co(void *arg) {
    struct prog *g = arg;
    struct disk d = {0};
    for (int i = 0; i < 3; i++)
        *saved[i].name = 0;
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
