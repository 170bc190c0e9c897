/* SPDX-License-Identifier: MIT */
/*
 * The format "raw" over memory, file and null storage, opened through the engine as a user would.
 *
 * The model test runs random operations on raw-over-memory and raw-over-file beside a plain array;
 * the seed is printed (STRATA_SEED chooses it).
 */
#include <errno.h>
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "runtime/loop.h"

static struct loop *loop;

static struct node *try_open(const char *name, unsigned flags, enum cache_mode cache,
                             struct err *e) {
    struct node *n = NULL;
    struct open_req req = {.name = name, .flags = flags, .cache = cache};
    return node_open_co(&req, &n, e) ? NULL : n;
}

static struct node *must_open(const char *name, unsigned flags) {
    struct err e = ERR_INIT;
    struct node *n = try_open(name, flags, CACHE_WRITEBACK, &e);
    if (!n)
        print_error("%s\n", err_text(&e));
    assert_non_null(n);
    return n;
}

static void refused(const char *name, int code, const char *text) {
    struct err e AUTO_ERR = ERR_INIT;
    assert_null(try_open(name, 0, CACHE_WRITEBACK, &e));
    assert_int_equal(e.code, code);
    if (!strstr(err_text(&e), text))
        print_error("'%s' lacks '%s'\n", err_text(&e), text);
    assert_non_null(strstr(err_text(&e), text));
}

#define MEM(more)                                                                                  \
    "json:{\"driver\":\"raw\"" more ",\"file\":{\"driver\":\"memory\",\"size\":\"1M\"}}"

static void whole_storage_without_a_window(void *arg) {
    struct node *n = must_open(MEM(""), OPEN_RW);
    assert_int_equal(n->size, MIB);
    assert_int_equal(disk_pwrite_co(n, MIB - 3, "abc", 3), 0);
    assert_int_equal(disk_pwrite_co(n, MIB - 2, "abc", 3), -ENOSPC);
    node_unref_co(n);
}

static void offset_alone_reaches_to_the_end(void *arg) {
    struct node *n = must_open(MEM(",\"offset\":1000"), OPEN_RW);
    char b[3];
    assert_int_equal(n->size, MIB - 1000);
    assert_int_equal(disk_pwrite_co(n, 5, "abc", 3), 0);
    assert_int_equal(disk_pread_co(n->file, 1005, b, 3), 0);
    assert_memory_equal(b, "abc", 3);
    node_unref_co(n);
}

static void window_keeps_to_itself(void *arg) {
    struct node *n = must_open(MEM(",\"offset\":4096,\"size\":\"8k\""), OPEN_RW);
    char b[2];
    assert_int_equal(n->size, 8192);
    assert_int_equal(disk_pwrite_co(n->file, 4095, "aa", 2), 0);
    assert_int_equal(disk_pwrite_co(n->file, 4096 + 8191, "bb", 2), 0);
    assert_int_equal(disk_zero_co(n, 0, 8192, ZERO_MAY_UNMAP), 0);
    disk_pread_co(n->file, 4095, b, 2);
    assert_memory_equal(b, "a\0", 2);
    disk_pread_co(n->file, 4096 + 8191, b, 2);
    assert_memory_equal(b, "\0b", 2);
    assert_int_equal(disk_pwrite_co(n, 8190, "abc", 3), -ENOSPC);
    node_unref_co(n);
}

static void window_behind_the_end_is_refused_with_numbers(void *arg) {
    refused(MEM(",\"offset\":\"2M\""), EINVAL, "2097152");
    refused(MEM(",\"offset\":\"1023k\",\"size\":\"2k\""), EINVAL, "(1048576 bytes)");
}

static void window_of_size_zero_is_an_empty_disk(void *arg) {
    struct node *n = must_open(MEM(",\"size\":0"), 0);
    assert_int_equal(n->size, 0);
    node_unref_co(n);
}

static void resize_follows_the_storage(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = must_open(MEM(",\"offset\":512"), OPEN_RW);
    assert_int_equal(disk_resize_co(n, 2 * MIB, PREALLOC_OFF, &e), 0);
    assert_int_equal(n->file->size, 2 * MIB + 512);
    assert_int_equal(n->size, 2 * MIB);
    node_unref_co(n);
    n = must_open(MEM(",\"size\":\"4k\""), OPEN_RW);
    assert_int_equal(disk_resize_co(n, MIB, PREALLOC_OFF, &e), -ENOTSUP);
    node_unref_co(n);
}

static void null_reads_zeros_and_forgets(void *arg) {
    struct node *n =
        must_open("json:{\"driver\":\"raw\",\"file\":{\"driver\":\"null-co\"}}", OPEN_RW);
    char b[4] = "xxxx";
    assert_int_equal(n->size, GIB);
    assert_int_equal(disk_pwrite_co(n, 0, "abcd", 4), 0);
    assert_int_equal(disk_pread_co(n, 0, b, 4), 0);
    assert_memory_equal(b, "\0\0\0\0", 4);
    node_unref_co(n);
}

static void memory_name_carries_a_size(void *arg) {
    struct node *n = must_open("memory:64k", OPEN_RW);
    assert_int_equal(n->size, 65536);
    node_unref_co(n);
    refused("memory:64x", EINVAL, "64x");
}

static void memory_counts_and_frees_pages(void *arg) {
    struct node *n = must_open("memory:1G", OPEN_RW);
    struct status st;
    assert_int_equal(disk_pwrite_co(n, 512 * MIB, "x", 1), 0);
    assert_int_equal(disk_allocated(n), 65536);
    assert_int_equal(disk_status_co(n, 0, GIB, STATUS_PRECISE, &st), 0);
    assert_true(st.zero);
    assert_int_equal(st.length, 512 * MIB);
    assert_int_equal(disk_status_co(n, 512 * MIB, 512 * MIB, STATUS_PRECISE, &st), 0);
    assert_false(st.zero);
    assert_int_equal(st.length, 65536);
    assert_int_equal(disk_zero_co(n, 0, GIB, ZERO_MAY_UNMAP), 0);
    assert_int_equal(disk_allocated(n), 0);
    node_unref_co(n);
}

/* ------------------------------------------------------------------ model */

#define MODEL_SIZE ((size_t)(3 * MIB + 777))
#define MODEL_OPS 1500

static uint64_t seed;

static uint64_t rnd(uint64_t below) {
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed % below;
}

/* Extents must never call something zero that is not. */
static void check_status(struct node *n, const uint8_t *model, uint64_t off, uint64_t len) {
    struct status st;
    for (uint64_t end = off + len; off < end; off += st.length) {
        assert_int_equal(disk_status_co(n, off, end - off, STATUS_PRECISE, &st), 0);
        assert_in_range(st.length, 1, end - off);
        if (st.zero)
            assert_true(bytes_are_zero(model + off, st.length));
    }
}

static void model_step(struct node *n, uint8_t *model, uint8_t *buf) {
    uint64_t off = rnd(MODEL_SIZE), len = 1 + rnd(rnd(4) ? 5000 : 300000);
    len = min_u64(len, MODEL_SIZE - off);
    switch (rnd(7)) {
    case 0:
    case 1:
    case 2:
        for (uint64_t i = 0; i < len; i++)
            buf[i] = (uint8_t)rnd(256);
        assert_int_equal(disk_pwrite_co(n, off, buf, len), 0);
        memcpy(model + off, buf, len);
        break;
    case 3:
        assert_int_equal(disk_zero_co(n, off, len, rnd(2) ? ZERO_MAY_UNMAP : 0), 0);
        memset(model + off, 0, len);
        break;
    case 4:
        assert_int_equal(disk_discard_co(n, off, len), 0);
        assert_int_equal(disk_pread_co(n, off, buf, len), 0);
        for (uint64_t i = 0; i < len; i++)
            assert_true(buf[i] == model[off + i] || buf[i] == 0);
        memcpy(model + off, buf, len);
        break;
    case 5:
        check_status(n, model, off, len);
        break;
    default:
        assert_int_equal(disk_pread_co(n, off, buf, len), 0);
        assert_memory_equal(buf, model + off, len);
    }
}

static void run_model(const char *name, enum cache_mode cache) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = try_open(name, OPEN_RW | OPEN_UNMAP, cache, &e);
    if (!n) {
        print_message("# %s\n", err_text(&e));
        assert_non_null(strstr(err_text(&e), "O_DIRECT"));
        return;
    }
    uint8_t *model = calloc(1, MODEL_SIZE), *buf = malloc(MODEL_SIZE);
    print_message("# seed %llu\n", (unsigned long long)seed);
    for (int i = 0; i < MODEL_OPS; i++)
        model_step(n, model, buf);
    assert_int_equal(disk_pread_co(n, 0, buf, MODEL_SIZE), 0);
    assert_memory_equal(buf, model, MODEL_SIZE);
    free(model);
    free(buf);
    node_unref_co(n);
}

static void memory_behaves_as_an_array(void *arg) {
    char name[64];
    snprintf(name, sizeof(name), "memory:%zu", MODEL_SIZE);
    run_model(name, CACHE_WRITEBACK);
}

static void file_model(enum cache_mode cache) {
    char name[64] = "/var/tmp/strata-model-XXXXXX";
    int fd = mkstemp(name);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, MODEL_SIZE), 0);
    close(fd);
    run_model(name, cache);
    struct stat st;
    assert_int_equal(stat(name, &st), 0);
    assert_int_equal(st.st_size, MODEL_SIZE);
    unlink(name);
}

static void file_behaves_as_an_array(void *arg) {
    file_model(CACHE_WRITEBACK);
}

static void direct_file_behaves_as_an_array_and_keeps_its_size(void *arg) {
    file_model(CACHE_NONE);
}

static void window_behaves_as_an_array(void *arg) {
    char name[160];
    snprintf(name, sizeof(name),
             "json:{\"driver\":\"raw\",\"offset\":\"12345\",\"size\":%zu,"
             "\"file\":{\"driver\":\"memory\",\"size\":\"8M\"}}",
             MODEL_SIZE);
    run_model(name, CACHE_WRITEBACK);
}

static void run(void **state) {
    loop_run(loop, (task_fn *)*state, NULL);
}

#define TESTS(X)                                                                                   \
    X(whole_storage_without_a_window)                                                              \
    X(offset_alone_reaches_to_the_end)                                                             \
    X(window_keeps_to_itself)                                                                      \
    X(window_behind_the_end_is_refused_with_numbers)                                               \
    X(window_of_size_zero_is_an_empty_disk)                                                        \
    X(resize_follows_the_storage)                                                                  \
    X(null_reads_zeros_and_forgets)                                                                \
    X(memory_name_carries_a_size)                                                                  \
    X(memory_counts_and_frees_pages)                                                               \
    X(memory_behaves_as_an_array)                                                                  \
    X(window_behaves_as_an_array)                                                                  \
    X(file_behaves_as_an_array)                                                                    \
    X(direct_file_behaves_as_an_array_and_keeps_its_size)
#define ROW(fn) {.name = #fn, .test_func = run, .initial_state = (void *)fn},

int main(void) {
    struct err e = ERR_INIT;
    const struct CMUnitTest tests[] = {TESTS(ROW)};
    const char *s = getenv("STRATA_SEED");
    seed = s ? strtoull(s, NULL, 0) : (uint64_t)time(NULL) * 2654435761u + 1;
    if (loop_new(LOOP_AUTO, &loop, &e)) {
        print_error("no loop: %s\n", err_text(&e));
        return 1;
    }
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    loop_free(loop);
    return failed;
}
