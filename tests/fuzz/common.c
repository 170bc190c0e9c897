/* SPDX-License-Identifier: MIT */
/* See fuzz.h. */
#include "fuzz.h"

#include <stdarg.h>

void fuzz_broken(const char *file, int line, const char *fmt, ...) {
    va_list ap;
    fprintf(stderr, "%s:%d: ", file, line);
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fputc('\n', stderr);
    abort();
}

void fuzz_run(task_fn *fn, void *arg) {
    static struct loop *loop;
    struct err e AUTO_ERR = ERR_INIT;
    if (!loop)
        FUZZ_CHECK(loop_new(LOOP_THREADS, &loop, &e) == 0, "no loop: %s", err_text(&e));
    loop_run(loop, fn, arg);
}

struct node *fuzz_memory_co(uint64_t limit) {
    struct create_ctx ctx = {.name = "memory:", .size_limit = limit};
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = NULL;
    FUZZ_CHECK(storage_create_co(&ctx, &n, &e) == 0, "no memory disk: %s", err_text(&e));
    return n;
}

void image_split(const uint8_t *data, size_t size, size_t *image_len, struct prog *program) {
    const uint8_t *mark = size ? memmem(data, size, PROGRAM_MARK, 4) : NULL;
    *image_len = mark ? (size_t)(mark - data) : size;
    *program = (struct prog){mark ? mark + 4 : data + size, data + size};
}

static void put_co(struct node *disk, uint64_t at, const uint8_t *data, size_t len) {
    if (len && at < IMAGE_BYTES_MAX && len <= IMAGE_BYTES_MAX - at)
        FUZZ_CHECK(disk_pwrite_co(disk, at, data, len) == 0, "the memory disk refuses a write");
}

void image_load_co(struct node *disk, const uint8_t *data, size_t size) {
    if (size < 8 || memcmp(data, SPARSE_MAGIC, 4)) {
        put_co(disk, 0, data, size);
        return;
    }
    uint64_t length = (uint64_t)be32_load(data + 4) * 512;
    for (size_t at = 8; size - at > 6;) {
        uint64_t sector = be32_load(data + at);
        size_t len = min_u64(be16_load(data + at + 4), size - at - 6);
        put_co(disk, sector * 512, data + at + 6, len);
        at += 6 + len;
    }
    if (length > disk->size)
        disk_resize_co(disk, min_u64(length, IMAGE_BYTES_MAX), PREALLOC_OFF, NULL);
}

uint64_t fuzz_interesting(uint64_t r) {
    unsigned shift = r >> 8 & 63;
    uint64_t power = UINT64_C(1) << shift;
    switch (r & 7) {
    case 0:
        return power;
    case 1:
        return power - 1;
    case 2:
        return ~power;
    case 3:
        return UINT64_MAX << shift;
    case 4:
        return 0;
    case 5: /* a host cluster of a small image, COPIED */
        return (UINT64_C(1) << 63) | (r >> 16 & 63) << (9 + (r >> 24) % 8);
    case 6:
        return (r >> 16 & 63) << (9 + (r >> 24) % 8);
    default: /* compressed */
        return (UINT64_C(1) << 62) | (r >> 16 & 0xffffff);
    }
}
