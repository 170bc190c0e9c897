/* SPDX-License-Identifier: MIT */
/*
 * Temporary snapshots over real files: the base stays, the scratch has no name, the cap holds, and
 * a kept one is a whole image of its own.
 */
#include <errno.h>
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <cmocka.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "disk/overlay.h"
#include "runtime/loop.h"

#define BASE_SIZE ((size_t)(5 * MIB + 512))

static struct loop *loop;
static char dir[128];

static char *in_dir(const char *name) {
    static char path[4][256];
    static int k;
    k = (k + 1) % 4;
    snprintf(path[k], sizeof(path[k]), "%s/%s", dir, name);
    return path[k];
}

static unsigned names_in_dir(void) {
    unsigned k = 0;
    DIR *d = opendir(dir);
    for (struct dirent *e; (e = readdir(d));)
        k += *e->d_name != '.' || strlen(e->d_name) > 2;
    closedir(d);
    return k;
}

static struct node *open_image(const char *name, const char *format, unsigned flags) {
    struct err e = ERR_INIT;
    struct node *n = NULL;
    struct open_req req = {.name = name, .format = format, .flags = flags, .gate = GATE_LOCAL};
    if (node_open_co(&req, &n, &e))
        print_error("%s\n", err_text(&e));
    assert_non_null(n);
    return n;
}

/* An overlay in our folder over a base of 'b' bytes. */
static struct node *overlay_over(const char *base_name, uint64_t limit) {
    struct err e = ERR_INIT;
    struct overlay_opts o = {.scratch_dir = dir, .scratch_size = limit};
    struct node *n = NULL;
    if (overlay_create_co(open_image(base_name, "raw", 0), &o, &n, &e))
        print_error("%s\n", err_text(&e));
    assert_non_null(n);
    return n;
}

static void put(struct node *n, uint64_t at, int byte, size_t len) {
    char *b = malloc(len);
    memset(b, byte, len);
    assert_int_equal(disk_pwrite_co(n, at, b, len), 0);
    free(b);
}

static bool reads(struct node *n, uint64_t at, int byte, size_t len) {
    uint8_t *b = malloc(len);
    assert_int_equal(disk_pread_co(n, at, b, len), 0);
    bool same = true;
    for (size_t i = 0; i < len; i++)
        same &= b[i] == byte;
    free(b);
    return same;
}

static bool base_untouched(void) {
    char *b = malloc(BASE_SIZE + 1);
    int fd = open(in_dir("base"), O_RDONLY);
    bool same = read(fd, b, BASE_SIZE + 1) == (ssize_t)BASE_SIZE;
    for (size_t i = 0; same && i < BASE_SIZE; i++)
        same = b[i] == 'b';
    close(fd);
    free(b);
    return same;
}

static void writes_stay_above_the_base(void *arg) {
    struct node *n = overlay_over(in_dir("base"), 0);
    assert_int_equal(n->size, BASE_SIZE);
    put(n, 1000, 'x', 70000);
    put(n, BASE_SIZE - 3, 'y', 3);
    assert_true(reads(n, 0, 'b', 1000) && reads(n, 1000, 'x', 70000));
    assert_true(reads(n, 71000, 'b', 100000) && reads(n, BASE_SIZE - 3, 'y', 3));
    assert_int_equal(disk_zero_co(n, MIB, MIB, ZERO_MAY_UNMAP), 0);
    assert_int_equal(disk_discard_co(n, 3 * MIB, MIB), 0);
    assert_true(reads(n, MIB, 0, MIB));
    assert_int_equal(disk_flush_co(n), 0);
    node_unref_co(n);
    assert_true(base_untouched());
}

static void scratch_has_no_name(void *arg) {
    struct node *n = overlay_over(in_dir("base"), 0);
    put(n, 0, 'x', MIB);
    assert_int_equal(names_in_dir(), 1);
    assert_true(overlay_allocated(n) >= (int64_t)MIB);
    node_unref_co(n);
    assert_int_equal(names_in_dir(), 1);
}

static void page_writes_copy_nothing(void *arg) {
    struct node *n = overlay_over(in_dir("base"), 0);
    for (int i = 0; i < 64; i++)
        put(n, (uint64_t)i * 65536, 'x', 4096);
    assert_true(overlay_allocated(n) <= (int64_t)(64 * 4096 + 128 * KIB));
    node_unref_co(n);
}

static void full_scratch_gives_enospc_and_keeps_serving(void *arg) {
    char b[4096] = {1};
    struct node *n = overlay_over(in_dir("base"), MIB);
    int r = 0;
    uint64_t at = 0;
    while (!r && at + sizeof(b) < BASE_SIZE) {
        r = disk_pwrite_co(n, at, b, sizeof(b));
        at += r ? 0 : sizeof(b);
    }
    assert_int_equal(r, -ENOSPC);
    assert_true(at >= 512 * KIB);
    assert_true(overlay_allocated(n) <= (int64_t)(MIB + 64 * KIB));
    assert_int_equal(disk_pwrite_co(n, 0, b, sizeof(b)), 0); /* what has room is still writable */
    assert_true(reads(n, at, 'b', sizeof(b)));
    node_unref_co(n);
    assert_true(base_untouched());
}

static void missing_scratch_folder_is_named(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n, *base = open_image(in_dir("base"), "raw", 0);
    struct overlay_opts o = {.scratch_dir = in_dir("nowhere")};
    assert_int_equal(overlay_create_co(base, &o, &n, &e), -ENOENT);
    assert_non_null(strstr(err_text(&e), "nowhere"));
    node_unref_co(base); /* the caller keeps it on failure */
}

static void base_in_use_by_a_writer_is_refused(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n, *base = open_image(in_dir("base"), "raw", 0);
    struct node *writer = open_image(in_dir("base"), "raw", OPEN_RW | OPEN_SHARE_WRITE);
    struct overlay_opts o = {.scratch_dir = dir};
    assert_int_equal(overlay_create_co(base, &o, &n, &e), -EAGAIN);
    assert_non_null(strstr(err_text(&e), "in use by"));
    node_unref_co(writer);
    node_unref_co(base);
}

static void print_damage(void *arg, bool is_leak, const char *text) {
    print_error("%s: %s\n", is_leak ? "leak" : "damage", text);
}

/* The kept file, opened as anybody would, reads as the overlay did. */
static void kept_is(const char *name, int at_4k) {
    struct node *n = open_image(name, NULL, OPEN_CHECK);
    assert_string_equal(n->drv->name, "qcow2");
    assert_int_equal(n->size, BASE_SIZE);
    assert_true(reads(n, 4096, at_4k, 4096) && reads(n, 0, 'b', 4096));
    assert_true(reads(n, BASE_SIZE - 512, 'b', 512));
    assert_string_equal(n->backing_format, "raw");
    assert_string_equal(n->backing_name, in_dir("base"));
    struct check_result c = {.report = print_damage};
    struct err e AUTO_ERR = ERR_INIT;
    assert_int_equal(n->drv->format->check_co(n, &c, &e), 0);
    assert_int_equal(c.corruptions + c.check_errors, 0);
    node_unref_co(n);
}

static void keep_into(const char *scratch, const char *name) {
    struct err e AUTO_ERR = ERR_INIT;
    struct overlay_opts o = {.scratch_dir = scratch};
    struct node *n;
    assert_int_equal(overlay_create_co(open_image(in_dir("base"), "raw", 0), &o, &n, &e), 0);
    put(n, 4096, 'x', 4096);
    int r = overlay_keep_co(n, name, false, &e);
    if (r)
        print_error("%s\n", err_text(&e));
    assert_int_equal(r, 0);
    put(n, 8192, 'y', 4096); /* it goes on */
    assert_true(reads(n, 4096, 'x', 4096) && reads(n, 8192, 'y', 4096));
    node_unref_co(n);
    kept_is(name, 'x');
    assert_true(base_untouched());
}

static void kept_on_the_same_file_system(void *arg) {
    keep_into(dir, in_dir("kept"));
    assert_int_equal(names_in_dir(), 2);
}

static void kept_from_another_file_system(void *arg) {
    struct stat a, b;
    assert_int_equal(stat("/dev/shm", &a) | stat(dir, &b), 0);
    if (a.st_dev == b.st_dev)
        print_message("# /dev/shm is on the same file system: this tests nothing new\n");
    keep_into("/dev/shm", in_dir("kept"));
    assert_int_equal(names_in_dir(), 2);
}

static void kept_twice_the_second_is_a_copy(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = overlay_over(in_dir("base"), 0);
    put(n, 4096, 'x', 4096);
    assert_int_equal(overlay_keep_co(n, in_dir("one"), false, &e), 0);
    put(n, 4096, 'y', 4096);
    assert_int_equal(overlay_keep_co(n, in_dir("two"), false, &e), 0);
    put(n, 4096, 'z', 4096);
    node_unref_co(n);
    kept_is(in_dir("one"), 'z'); /* the overlay lives in the first one */
    kept_is(in_dir("two"), 'y');
}

static void keep_refuses_an_existing_file_and_goes_on(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = overlay_over(in_dir("base"), 0);
    fclose(fopen(in_dir("kept"), "w"));
    put(n, 4096, 'x', 4096);
    assert_int_equal(overlay_keep_co(n, in_dir("kept"), false, &e), -EEXIST);
    assert_true(reads(n, 4096, 'x', 4096));
    assert_null(n->backing_name);
    assert_int_equal(overlay_keep_co(n, in_dir("kept"), true, &e), 0);
    node_unref_co(n);
    kept_is(in_dir("kept"), 'x');
}

static void keep_into_a_missing_folder_is_refused(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = overlay_over(in_dir("base"), 0);
    assert_int_equal(overlay_keep_co(n, in_dir("no/kept"), false, &e), -ENOENT);
    node_unref_co(n);
    assert_int_equal(names_in_dir(), 1);
}

static void window_of_a_file_cannot_be_named_as_a_base(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    char name[300];
    snprintf(name, sizeof(name),
             "json:{\"driver\":\"raw\",\"offset\":512,\"file\":{\"driver\":\"file\",\"filename\":"
             "\"%s\"}}",
             in_dir("base"));
    struct node *n = overlay_over(name, 0);
    assert_int_equal(overlay_keep_co(n, in_dir("kept"), false, &e), -ENOTSUP);
    node_unref_co(n);
}

static int setup(void **state) {
    snprintf(dir, sizeof(dir), "/var/tmp/strata-overlay-XXXXXX");
    if (!mkdtemp(dir))
        return -1;
    char *b = malloc(BASE_SIZE);
    memset(b, 'b', BASE_SIZE);
    FILE *f = fopen(in_dir("base"), "w");
    fwrite(b, 1, BASE_SIZE, f);
    fclose(f);
    free(b);
    return 0;
}

static int teardown(void **state) {
    DIR *d = opendir(dir);
    for (struct dirent *e; (e = readdir(d));)
        unlinkat(dirfd(d), e->d_name, 0);
    closedir(d);
    return rmdir(dir);
}

static void run(void **state) {
    loop_run(loop, (task_fn *)*state, NULL);
}

#define TESTS(X)                                                                                   \
    X(writes_stay_above_the_base)                                                                  \
    X(scratch_has_no_name)                                                                         \
    X(page_writes_copy_nothing)                                                                    \
    X(full_scratch_gives_enospc_and_keeps_serving)                                                 \
    X(missing_scratch_folder_is_named)                                                             \
    X(base_in_use_by_a_writer_is_refused)                                                          \
    X(kept_on_the_same_file_system)                                                                \
    X(kept_from_another_file_system)                                                               \
    X(kept_twice_the_second_is_a_copy)                                                             \
    X(keep_refuses_an_existing_file_and_goes_on)                                                   \
    X(keep_into_a_missing_folder_is_refused)                                                       \
    X(window_of_a_file_cannot_be_named_as_a_base)
#define SETUP(fn)                                                                                  \
    static int setup_##fn(void **state) {                                                          \
        *state = (void *)fn;                                                                       \
        return setup(state);                                                                       \
    }
TESTS(SETUP)
#define ROW(fn)                                                                                    \
    {.name = #fn, .test_func = run, .setup_func = setup_##fn, .teardown_func = teardown},

int main(void) {
    struct err e = ERR_INIT;
    const struct CMUnitTest tests[] = {TESTS(ROW)};
    if (loop_new(LOOP_AUTO, &loop, &e)) {
        print_error("no loop: %s\n", err_text(&e));
        return 1;
    }
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    loop_free(loop);
    return failed;
}
