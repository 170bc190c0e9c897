/* SPDX-License-Identifier: MIT */
/*
 * The driver "file" on real temporary files, slot by slot, without the engine above.
 *
 * Nodes are built by hand.  Files lie in $TMPDIR, else /var/tmp, which is taken to hold holes and
 * unnamed files (ext4, XFS, btrfs, tmpfs).
 */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <cmocka.h>
#include <dirent.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <unistd.h>
#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "runtime/loop.h"
#include "storage/file.h"

extern const struct driver driver_file;

static struct loop *loop;
static char dir[256];

#define WRITER (PERM_CONSISTENT_READ | PERM_WRITE | PERM_RESIZE)
#define EXCLUSIVE (PERM_CONSISTENT_READ | PERM_WRITE_UNCHANGED)

static char *in_dir(const char *name) {
    static char path[4][512];
    static int k;
    k = (k + 1) % 4;
    snprintf(path[k], sizeof(path[k]), "%s/%s", dir, name);
    return path[k];
}

static struct node *bare(const char *path, unsigned flags) {
    struct node *n = xcalloc(1, sizeof(*n));
    struct file_opts *o = xcalloc(1, sizeof(*o));
    n->drv = &driver_file;
    n->state = xcalloc(1, sizeof(struct file_state));
    n->opts = o;
    n->flags = flags;
    n->perm = flags & NODE_RW ? WRITER : PERM_CONSISTENT_READ;
    n->shared = EXCLUSIVE;
    o->filename = path ? xstrdup(path) : NULL;
    return n;
}

static void drop(struct node *n) {
    struct file_opts *o = n->opts;
    driver_file.close_co(n);
    free(o->filename);
    free(o);
    free(n->state);
    free(n);
}

/* NULL and *e filled when the open is refused. */
static struct node *try_open(const char *path, unsigned flags, struct err *e) {
    struct node *n = bare(path, flags);
    if (!driver_file.open_co(n, NULL, e))
        return n;
    drop(n);
    return NULL;
}

static struct node *must_open(const char *path, unsigned flags) {
    struct err e = ERR_INIT;
    struct node *n = try_open(path, flags, &e);
    if (!n)
        print_error("%s: %s\n", path, err_text(&e));
    assert_non_null(n);
    return n;
}

static struct node *must_create(const char *name, unsigned create_flags, uint64_t limit) {
    struct err e = ERR_INIT;
    struct node *n = bare(NULL, NODE_RW);
    struct create_ctx c = {.name = name, .flags = create_flags, .size_limit = limit};
    int r = driver_file.storage->create_co(n, &c, &e);
    if (r)
        print_error("%s: %s\n", name, err_text(&e));
    assert_int_equal(r, 0);
    return n;
}

static int put(struct node *n, uint64_t at, const void *buf, size_t len) {
    struct iovec v = {(void *)buf, len};
    return driver_file.storage->pwritev_co(n, at, len, &v, 1, 0);
}

static int get(struct node *n, uint64_t at, void *buf, size_t len) {
    struct iovec v = {buf, len};
    return driver_file.storage->preadv_co(n, at, len, &v, 1, 0);
}

static int put_fill(struct node *n, uint64_t at, int byte, size_t len) {
    char *b = malloc(len);
    memset(b, byte, len);
    int r = put(n, at, b, len);
    free(b);
    return r;
}

static bool all_bytes(const uint8_t *b, size_t len, int byte) {
    for (size_t i = 0; i < len; i++)
        if (b[i] != byte)
            return false;
    return true;
}

static struct stat stat_of(const char *path) {
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    return st;
}

static struct stat stat_fd(struct node *n) {
    struct stat st;
    assert_int_equal(fstat(file_state(n)->fd, &st), 0);
    return st;
}

static unsigned names_in_dir(void) {
    unsigned k = 0;
    DIR *d = opendir(dir);
    for (struct dirent *e; (e = readdir(d));)
        k += strcmp(e->d_name, ".") && strcmp(e->d_name, "..");
    closedir(d);
    return k;
}

static void make_file(const char *path, const char *text) {
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

static bool has_fs(long magic) {
    struct statfs fs;
    return !statfs(dir, &fs) && fs.f_type == magic;
}

/* ------------------------------------------------------------------- open */

static void refused(const char *path, unsigned flags, int code, const char *text) {
    struct err e AUTO_ERR = ERR_INIT;
    assert_null(try_open(path, flags, &e));
    assert_int_equal(e.code, code);
    if (!strstr(err_text(&e), text))
        print_error("'%s' lacks '%s'\n", err_text(&e), text);
    assert_non_null(strstr(err_text(&e), text));
}

static void refuses_a_directory(void *arg) {
    refused(dir, 0, EISDIR, "is a directory");
}

static void refuses_a_fifo_without_hanging(void *arg) {
    assert_int_equal(mkfifo(in_dir("fifo"), 0600), 0);
    refused(in_dir("fifo"), 0, EINVAL, "a FIFO");
    refused(in_dir("fifo"), NODE_RW, EINVAL, "a FIFO");
}

static void refuses_a_socket(void *arg) {
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    snprintf(a.sun_path, sizeof(a.sun_path), "%s", in_dir("sock"));
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof(a)), 0);
    refused(in_dir("sock"), 0, EINVAL, "a socket");
    close(fd);
}

static void refuses_a_character_device(void *arg) {
    refused("/dev/null", NODE_RW, EINVAL, "a character device");
}

static void names_a_missing_file(void *arg) {
    refused(in_dir("none"), 0, ENOENT, "No such file");
}

static void refuses_writing_with_force_share(void *arg) {
    make_file(in_dir("f"), "x");
    refused(in_dir("f"), NODE_RW | NODE_FORCE_SHARE, EINVAL, "read-only");
}

/* ------------------------------------------------------------ read, write */

static void read_past_the_end_gives_zeros(void *arg) {
    uint8_t b[4096];
    make_file(in_dir("f"), "abc");
    struct node *n = must_open(in_dir("f"), 0);
    memset(b, 0xee, sizeof(b));
    assert_int_equal(get(n, 1, b, sizeof(b)), 0);
    assert_memory_equal(b, "bc", 2);
    assert_true(all_bytes(b + 2, sizeof(b) - 2, 0));
    memset(b, 0xee, sizeof(b));
    assert_int_equal(get(n, 100000, b, sizeof(b)), 0);
    assert_true(all_bytes(b, sizeof(b), 0));
    drop(n);
}

static void read_zero_fills_the_tail_of_a_scatter_list(void *arg) {
    uint8_t a[2] = {9, 9}, b[4] = {9, 9, 9, 9};
    struct iovec v[2] = {{a, 2}, {b, 4}};
    make_file(in_dir("f"), "abc");
    struct node *n = must_open(in_dir("f"), 0);
    assert_int_equal(driver_file.storage->preadv_co(n, 0, 6, v, 2, 0), 0);
    assert_memory_equal(a, "ab", 2);
    assert_memory_equal(b, "c\0\0\0", 4);
    drop(n);
}

static void write_grows_the_file(void *arg) {
    struct node *n = must_create(in_dir("f"), 0, 0);
    assert_int_equal(put(n, 5, "hello", 5), 0);
    assert_int_equal(n->size, 10);
    assert_int_equal(stat_of(in_dir("f")).st_size, 10);
    drop(n);
}

static void direct_io_reports_its_alignment_and_moves_bytes(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = must_create(in_dir("f"), 0, 0);
    assert_int_equal(put_fill(n, 0, 7, 64 << 10), 0);
    drop(n);
    n = try_open(in_dir("f"), NODE_RW | NODE_DIRECT, &e);
    if (!n) { /* a file system without O_DIRECT says so clearly */
        assert_non_null(strstr(err_text(&e), "O_DIRECT"));
        return;
    }
    assert_in_range(n->request_align, 512, 65536);
    uint8_t *b = aligned_alloc(65536, 65536);
    memset(b, 8, 65536);
    assert_int_equal(put(n, n->request_align, b, n->request_align), 0);
    assert_int_equal(get(n, 0, b, n->request_align), 0);
    assert_true(all_bytes(b, n->request_align, 7));
    assert_int_equal(get(n, n->request_align, b, n->request_align), 0);
    assert_true(all_bytes(b, n->request_align, 8));
    free(b);
    drop(n);
}

static void direct_read_of_an_unaligned_end_gives_zeros(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    make_file(in_dir("f"), "abc");
    struct node *n = try_open(in_dir("f"), NODE_DIRECT, &e);
    if (!n)
        return;
    uint8_t *b = aligned_alloc(65536, 65536);
    memset(b, 8, 65536);
    assert_int_equal(get(n, 0, b, 65536), 0);
    assert_memory_equal(b, "abc", 3);
    assert_true(all_bytes(b + 3, 65533, 0));
    free(b);
    drop(n);
}

/* ------------------------------------------------------------------- zero */

static void zero_with_unmap_gives_space_back(void *arg) {
    uint8_t b[8192];
    struct node *n = must_create(in_dir("f"), 0, 0);
    put_fill(n, 0, 7, MIB);
    int64_t before = file_allocated(n);
    assert_int_equal(file_zero_co(n, 4096, MIB - 8192, ZERO_MAY_UNMAP), 0);
    assert_true(file_allocated(n) < before / 2);
    assert_int_equal(n->size, MIB);
    get(n, 0, b, sizeof(b));
    assert_true(all_bytes(b, 4096, 7) && all_bytes(b + 4096, 4096, 0));
    drop(n);
}

static void zero_without_unmap_keeps_space(void *arg) {
    uint8_t b[8192];
    struct node *n = must_create(in_dir("f"), 0, 0);
    put_fill(n, 0, 7, MIB);
    fsync(file_state(n)->fd);
    int64_t before = file_allocated(n);
    int r = file_zero_co(n, 0, MIB, 0);
    assert_true(r == 0 || r == -ENOTSUP);
    assert_true(file_allocated(n) >= before);
    if (!r) {
        get(n, 4096, b, sizeof(b));
        assert_true(all_bytes(b, sizeof(b), 0));
    }
    drop(n);
}

static void zero_behind_the_end_grows_sparsely(void *arg) {
    uint8_t b[10];
    struct node *n = must_create(in_dir("f"), 0, 0);
    put(n, 0, "aaaaaaaaaa", 10);
    assert_int_equal(file_zero_co(n, 5, GIB, ZERO_MAY_UNMAP), 0);
    assert_int_equal(n->size, GIB + 5);
    assert_int_equal(stat_of(in_dir("f")).st_size, GIB + 5);
    assert_true(file_allocated(n) <= 65536);
    get(n, 0, b, 10);
    assert_memory_equal(b, "aaaaa\0\0\0\0\0", 10);
    drop(n);
}

static void bulk_write_task(void *arg) {
    static char b[65536];
    struct node *n = arg;
    struct iovec v = {b, sizeof(b)};
    memset(b, 7, sizeof(b));
    assert_int_equal(driver_file.storage->pwritev_co(n, MIB, sizeof(b), &v, 1, IO_BULK), 0);
}

static void zero_behind_the_end_never_cuts_a_write_in_flight(void *arg) {
    static uint8_t b[65536];
    struct node *n = must_create(in_dir("f"), 0, 0);
    struct task_group g;
    task_group_init(&g);
    task_group_spawn(&g, loop, bulk_write_task, n);
    task_yield_co();
    usleep(50000); /* the worker has written; this loop has not heard of it */
    assert_int_equal(file_zero_co(n, 0, MIB / 2, ZERO_MAY_UNMAP), 0);
    task_group_wait_co(&g);
    assert_int_equal(n->size, MIB + sizeof(b));
    assert_int_equal(get(n, MIB, b, sizeof(b)), 0);
    assert_true(all_bytes(b, sizeof(b), 7));
    drop(n);
}

static void discard_never_changes_the_size(void *arg) {
    struct node *n = must_create(in_dir("f"), 0, 0);
    put_fill(n, 0, 7, MIB);
    assert_int_equal(file_discard_co(n, MIB / 2, 16 * MIB), 0);
    assert_int_equal(stat_of(in_dir("f")).st_size, MIB);
    assert_int_equal(file_discard_co(n, 4 * MIB, MIB), 0);
    assert_int_equal(n->size, MIB);
    assert_true(file_allocated(n) <= (int64_t)(MIB / 2 + 65536));
    drop(n);
}

/* ------------------------------------------------------------------ holes */

static void extent_is(struct node *n, uint64_t at, uint64_t ask, enum extent_kind kind,
                      uint64_t length) {
    struct extent x;
    assert_int_equal(file_extents_co(n, at, ask, &x), 0);
    assert_int_equal(x.kind, kind);
    assert_int_equal(x.length, length);
    if (kind == EXTENT_DATA) {
        assert_ptr_equal(x.storage, n);
        assert_int_equal(x.host_offset, at);
    }
}

static void extents_tell_data_from_holes(void *arg) {
    struct node *n = must_create(in_dir("f"), 0, 0);
    file_truncate_co(n, 10 * MIB, PREALLOC_OFF, NULL);
    put_fill(n, 2 * MIB, 7, MIB);
    extent_is(n, 0, 10 * MIB, EXTENT_ZERO, 2 * MIB);
    extent_is(n, 2 * MIB, 8 * MIB, EXTENT_DATA, MIB);
    extent_is(n, 2 * MIB + 5, 100, EXTENT_DATA, 100);
    extent_is(n, 3 * MIB, 7 * MIB, EXTENT_ZERO, 7 * MIB);
    drop(n);
}

static void extents_see_a_write_into_a_remembered_hole(void *arg) {
    struct node *n = must_create(in_dir("f"), 0, 0);
    file_truncate_co(n, 10 * MIB, PREALLOC_OFF, NULL);
    extent_is(n, 0, 10 * MIB, EXTENT_ZERO, 10 * MIB);
    put_fill(n, 4 * MIB, 7, MIB);
    extent_is(n, 0, 10 * MIB, EXTENT_ZERO, 4 * MIB);
    extent_is(n, 4 * MIB, 6 * MIB, EXTENT_DATA, MIB);
    file_zero_co(n, 4 * MIB, MIB, ZERO_MAY_UNMAP);
    extent_is(n, 4 * MIB, 6 * MIB, EXTENT_ZERO, 6 * MIB);
    drop(n);
}

static void extents_see_anothers_write_when_writers_are_allowed(void *arg) {
    make_file(in_dir("f"), "");
    assert_int_equal(truncate(in_dir("f"), 10 * MIB), 0);
    struct node *n = bare(in_dir("f"), 0);
    n->shared = PERM_ALL;
    assert_int_equal(driver_file.open_co(n, NULL, NULL), 0);
    extent_is(n, 0, 10 * MIB, EXTENT_ZERO, 10 * MIB);
    int fd = open(in_dir("f"), O_WRONLY);
    assert_int_equal(pwrite(fd, "x", 1, 0), 1);
    close(fd);
    struct extent x;
    file_extents_co(n, 0, 10 * MIB, &x);
    assert_int_equal(x.kind, EXTENT_DATA);
    drop(n);
}

static void extents_of_a_file_that_others_cut_are_zero(void *arg) {
    struct node *n = must_create(in_dir("f"), 0, 0);
    put_fill(n, 0, 7, MIB);
    assert_int_equal(truncate(in_dir("f"), 0), 0);
    extent_is(n, 0, MIB, EXTENT_ZERO, MIB);
    drop(n);
}

static void extents_of_a_tebibyte_hole_take_one_call(void *arg) {
    struct node *n = must_create(in_dir("f"), 0, 0);
    file_truncate_co(n, TIB, PREALLOC_OFF, NULL);
    put(n, TIB - 1, "x", 1);
    struct extent x;
    file_extents_co(n, 0, TIB, &x);
    assert_int_equal(x.kind, EXTENT_ZERO);
    assert_true(x.length >= TIB - 65536);
    for (uint64_t at = 0; at + 65536 < TIB; at += 64 * MIB) {
        file_extents_co(n, at, 64 * KIB, &x);
        assert_int_equal(x.kind, EXTENT_ZERO);
    }
    drop(n);
}

/* ----------------------------------------------------------------- resize */

static void truncate_falloc_allocates(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = must_create(in_dir("f"), 0, 0);
    assert_int_equal(file_truncate_co(n, 3 * MIB, PREALLOC_FALLOC, &e), 0);
    assert_int_equal(stat_of(in_dir("f")).st_size, 3 * MIB);
    assert_true(file_allocated(n) >= (int64_t)(3 * MIB));
    drop(n);
}

static void truncate_full_writes_zeros_to_an_odd_size(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    uint8_t b[4];
    struct node *n = must_create(in_dir("f"), 0, 0);
    put(n, 0, "abc", 3);
    assert_int_equal(file_truncate_co(n, 3 * MIB + 77, PREALLOC_FULL, &e), 0);
    assert_int_equal(stat_of(in_dir("f")).st_size, 3 * MIB + 77);
    assert_true(file_allocated(n) >= (int64_t)(3 * MIB));
    get(n, 0, b, 4);
    assert_memory_equal(b, "abc\0", 4);
    extent_is(n, 0, 3 * MIB, EXTENT_DATA, 3 * MIB);
    drop(n);
}

static void truncate_that_fails_leaves_the_size(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = must_create(in_dir("f"), 0, 0);
    put(n, 0, "abc", 3);
    assert_true(file_truncate_co(n, INT64_MAX, PREALLOC_FALLOC, &e) < 0);
    assert_int_equal(n->size, 3);
    assert_int_equal(stat_of(in_dir("f")).st_size, 3);
    drop(n);
}

/* ------------------------------------------------------------ size limit */

static void limit_stops_growth_by_writes_zeros_and_truncate(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = must_create(dir, CREATE_SCRATCH, MIB);
    assert_int_equal(put_fill(n, 0, 1, MIB), 0);
    assert_int_equal(put(n, MIB - 1, "ab", 2), -ENOSPC);
    assert_int_equal(file_zero_co(n, MIB - 1, 2, 0), -ENOSPC);
    assert_int_equal(file_truncate_co(n, MIB + 1, PREALLOC_OFF, &e), -ENOSPC);
    assert_int_equal(put(n, MIB - 1, "a", 1), 0);
    assert_int_equal(n->size, MIB);
    drop(n);
}

/* ------------------------------------------------------------ allocation */

static void append(struct node *n, uint64_t bytes) {
    for (uint64_t end = n->size + bytes; n->size < end;)
        assert_int_equal(put_fill(n, n->size, 7, 256 << 10), 0);
}

static void appends_are_allocated_ahead_and_the_rest_given_back(void *arg) {
    if (!has_fs(0xEF53)) {
        print_message("# allocation ahead is for ext4 only; %s is something else\n", dir);
        return;
    }
    struct node *n = must_create(in_dir("f"), 0, 0);
    append(n, 3 * MIB);
    assert_false(file_state(n)->ahead_used);
    append(n, 21 * MIB);
    assert_true(file_state(n)->ahead_end > n->size);
    struct stat st = stat_fd(n);
    assert_int_equal(st.st_size, n->size);
    assert_true((uint64_t)st.st_blocks * 512 > n->size + MIB);
    drop(n);
    st = stat_of(in_dir("f"));
    assert_int_equal(st.st_size, 24 * MIB);
    assert_in_range((uint64_t)st.st_blocks * 512, 24 * MIB, 24 * MIB + 65536);
}

static void allocation_ahead_stays_below_the_limit(void *arg) {
    struct node *n = must_create(dir, CREATE_SCRATCH, 10 * MIB);
    append(n, 10 * MIB);
    assert_true(file_state(n)->ahead_end <= 10 * MIB);
    if (has_fs(0xEF53)) /* XFS allocates ahead by itself */
        assert_true((uint64_t)file_allocated(n) <= 10 * MIB + 65536);
    assert_int_equal(put(n, n->size, "x", 1), -ENOSPC);
    drop(n);
}

static void writes_far_behind_the_end_are_not_appends(void *arg) {
    struct node *n = must_create(in_dir("f"), 0, 0);
    for (int i = 1; i <= 8; i++)
        assert_int_equal(put_fill(n, (uint64_t)i * 100 * MIB, 7, MIB), 0);
    assert_false(file_state(n)->ahead_used);
    drop(n);
}

/* ----------------------------------------------------------- create, link */

static void unnamed_file_has_no_name_until_linked(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    unsigned before = names_in_dir();
    struct node *n = must_create(in_dir("new"), CREATE_UNNAMED, 0);
    put(n, 0, "abc", 3);
    assert_int_equal(names_in_dir(), before);
    assert_int_equal(file_link_co(n, in_dir("new"), false, &e), 0);
    assert_int_equal(names_in_dir(), before + 1);
    assert_int_equal(stat_of(in_dir("new")).st_size, 3);
    assert_int_equal(put(n, 3, "d", 1), 0);
    drop(n);
    assert_int_equal(stat_of(in_dir("new")).st_size, 4);
}

static void unnamed_file_dropped_leaves_nothing(void *arg) {
    unsigned before = names_in_dir();
    struct node *n = must_create(in_dir("new"), CREATE_UNNAMED, 0);
    put(n, 0, "abc", 3);
    drop(n);
    assert_int_equal(names_in_dir(), before);
}

static void link_refuses_an_existing_name(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    unsigned before = names_in_dir();
    struct node *n = must_create(in_dir("new"), CREATE_UNNAMED, 0);
    make_file(in_dir("new"), "old");
    assert_int_equal(file_link_co(n, in_dir("new"), false, &e), -EEXIST);
    assert_string_equal(err_text(&e), "file exists");
    assert_int_equal(stat_of(in_dir("new")).st_size, 3);
    drop(n);
    assert_int_equal(names_in_dir(), before + 1);
}

static void link_replaces_and_keeps_the_mode(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    make_file(in_dir("new"), "old");
    assert_int_equal(chmod(in_dir("new"), 0640), 0);
    unsigned before = names_in_dir();
    struct node *n = must_create(in_dir("new"), CREATE_UNNAMED | CREATE_REPLACE, 0);
    put(n, 0, "abcdef", 6);
    assert_int_equal(stat_of(in_dir("new")).st_size, 3);
    assert_int_equal(file_link_co(n, in_dir("new"), true, &e), 0);
    drop(n);
    assert_int_equal(stat_of(in_dir("new")).st_size, 6);
    assert_int_equal(stat_of(in_dir("new")).st_mode & 0777, 0640);
    assert_int_equal(names_in_dir(), before);
}

static void link_through_a_symlink_replaces_its_target(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    struct stat st;
    make_file(in_dir("target"), "old");
    assert_int_equal(symlink("target", in_dir("ln")), 0);
    struct node *n = must_create(in_dir("ln"), CREATE_UNNAMED | CREATE_REPLACE, 0);
    put(n, 0, "abcdef", 6);
    assert_int_equal(file_link_co(n, in_dir("ln"), true, &e), 0);
    drop(n);
    assert_int_equal(lstat(in_dir("ln"), &st), 0);
    assert_true(S_ISLNK(st.st_mode));
    assert_int_equal(stat_of(in_dir("target")).st_size, 6);
}

static void link_refuses_to_replace_a_file_in_use(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = must_create(in_dir("new"), CREATE_UNNAMED | CREATE_REPLACE, 0);
    make_file(in_dir("new"), "old");
    struct node *user = must_open(in_dir("new"), NODE_RW);
    assert_int_equal(file_link_co(n, in_dir("new"), true, &e), -EAGAIN);
    assert_non_null(strstr(err_text(&e), "in use by this process"));
    drop(user);
    err_clear(&e);
    assert_int_equal(file_link_co(n, in_dir("new"), true, &e), 0);
    drop(n);
}

static void hidden_name_stands_in_for_unnamed(void *arg) {
    /* As on a file system without O_TMPFILE: the state that the fallback leaves behind. */
    struct err e AUTO_ERR = ERR_INIT;
    unsigned before = names_in_dir();
    struct node *n = must_create(in_dir("hidden"), 0, 0);
    file_state(n)->unnamed = true;
    file_state(n)->temp_path = xstrdup(in_dir("hidden"));
    put(n, 0, "abc", 3);
    assert_int_equal(file_link_co(n, in_dir("new"), false, &e), 0);
    assert_null(file_state(n)->temp_path);
    assert_int_equal(names_in_dir(), before + 1);
    drop(n);
    assert_int_equal(stat_of(in_dir("new")).st_size, 3);

    n = must_create(in_dir("hidden"), 0, 0);
    file_state(n)->unnamed = true;
    file_state(n)->temp_path = xstrdup(in_dir("hidden"));
    assert_int_equal(file_link_co(n, in_dir("new"), false, &e), -EEXIST);
    drop(n);
    assert_int_equal(names_in_dir(), before + 1);
}

static void create_refuses_an_existing_file(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    make_file(in_dir("f"), "old");
    struct node *n = bare(NULL, NODE_RW);
    struct create_ctx c = {.name = in_dir("f")};
    assert_int_equal(file_create_co(n, &c, &e), -EEXIST);
    drop(n);
    assert_int_equal(stat_of(in_dir("f")).st_size, 3);
}

static void scratch_folder_that_is_missing_is_named(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = bare(NULL, NODE_RW);
    struct create_ctx c = {.name = in_dir("nowhere"), .flags = CREATE_SCRATCH};
    assert_int_equal(file_create_co(n, &c, &e), -ENOENT);
    assert_non_null(strstr(err_text(&e), "nowhere"));
    drop(n);
}

/* ------------------------------------------------------------------ locks */

static void writer_keeps_a_second_writer_out_and_is_named(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    char self[64];
    make_file(in_dir("f"), "abc");
    struct node *n = must_open(in_dir("f"), NODE_RW);
    assert_null(try_open(in_dir("f"), NODE_RW, &e));
    assert_int_equal(e.code, EAGAIN);
    snprintf(self, sizeof(self), "in use by this process (%d, read-write)", (int)getpid());
    assert_non_null(strstr(err_text(&e), self));
    assert_null(try_open(in_dir("f"), 0, &e));
    assert_int_equal(e.code, EAGAIN);
    assert_non_null(e.hint);
    drop(n);
    drop(must_open(in_dir("f"), NODE_RW));
}

static void readers_coexist_and_keep_writers_out(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    make_file(in_dir("f"), "abc");
    struct node *a = must_open(in_dir("f"), 0), *b = must_open(in_dir("f"), 0);
    assert_null(try_open(in_dir("f"), NODE_RW, &e));
    assert_non_null(strstr(err_text(&e), "read-only)"));
    drop(a);
    drop(b);
}

static void force_share_reads_beside_a_writer(void *arg) {
    make_file(in_dir("f"), "abc");
    struct node *n = must_open(in_dir("f"), NODE_RW);
    drop(must_open(in_dir("f"), NODE_FORCE_SHARE));
    drop(n);
}

static void locking_off_takes_no_locks(void *arg) {
    make_file(in_dir("f"), "abc");
    struct node *n = must_open(in_dir("f"), NODE_RW);
    drop(must_open(in_dir("f"), NODE_RW | NODE_NO_LOCK));
    drop(n);
}

static void refused_open_leaves_no_lock_bytes(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    make_file(in_dir("f"), "abc");
    struct node *a = must_open(in_dir("f"), 0);
    assert_null(try_open(in_dir("f"), NODE_RW, &e));
    struct node *b = must_open(in_dir("f"), 0);
    drop(a);
    drop(b);
}

/* The engine's part: wanted permissions first, back on error. */
static int reopen(struct node *n, bool rw, struct err *e) {
    unsigned perm = n->perm, flags = rw ? n->flags | NODE_RW : n->flags & ~(unsigned)NODE_RW;
    n->perm = rw ? WRITER : PERM_CONSISTENT_READ;
    int r = driver_file.reopen_co(n, flags, e);
    if (r)
        n->perm = perm;
    else
        n->flags = flags;
    return r;
}

static void reopen_goes_to_writing_and_back(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    make_file(in_dir("f"), "abc");
    struct node *n = must_open(in_dir("f"), 0);
    assert_int_equal(put(n, 0, "x", 1), -EBADF);
    assert_int_equal(reopen(n, true, &e), 0);
    assert_int_equal(put(n, 0, "x", 1), 0);
    assert_null(try_open(in_dir("f"), 0, &e)); /* the writer's locks are in place */
    assert_int_equal(reopen(n, false, &e), 0);
    assert_int_equal(put(n, 0, "y", 1), -EBADF);
    drop(must_open(in_dir("f"), 0)); /* and gone again */
    assert_null(try_open(in_dir("f"), NODE_RW, &e));
    drop(n);
}

static void reopen_beside_another_reader_changes_nothing(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    uint8_t b[3];
    make_file(in_dir("f"), "abc");
    struct node *n = must_open(in_dir("f"), 0), *other = must_open(in_dir("f"), 0);
    assert_int_equal(reopen(n, true, &e), -EAGAIN);
    assert_int_equal(get(n, 0, b, 3), 0);
    drop(must_open(in_dir("f"), 0)); /* no writer's byte was left */
    drop(other);
    assert_int_equal(reopen(n, true, &e), 0);
    drop(n);
}

static void reopen_works_on_an_unnamed_file(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = must_create(dir, CREATE_SCRATCH, 0);
    put(n, 0, "abc", 3);
    assert_int_equal(reopen(n, false, &e), 0);
    assert_int_equal(reopen(n, true, &e), 0);
    assert_int_equal(put(n, 0, "x", 1), 0);
    drop(n);
}

/* ---------------------------------------------------------------- copying */

static void copy_range_copies_or_declines(void *arg) {
    uint8_t b[5];
    struct node *a = must_create(in_dir("a"), 0, 0), *c = must_create(in_dir("c"), 0, 0);
    put_fill(a, 0, 7, MIB);
    put(a, 100, "hello", 5);
    int r = file_copy_range_co(a, 100, c, 50, 5, 0);
    assert_true(r == 0 || r == -ENOTSUP);
    if (!r) {
        assert_int_equal(c->size, 55);
        get(c, 50, b, 5);
        assert_memory_equal(b, "hello", 5);
        assert_int_equal(file_copy_range_co(a, 0, c, MIB, MIB, 0), 0);
        assert_int_equal(c->size, 2 * MIB);
    }
    assert_int_equal(file_copy_range_co(a, MIB - 1, c, 0, 2, 0), -ENOTSUP);
    drop(a);
    drop(c);
}

static void no_flush_makes_flush_nothing(void *arg) {
    struct node *n = must_create(in_dir("f"), 0, 0);
    file_state(n)->flush_error = -EIO; /* what a real flush would answer */
    assert_int_equal(file_flush_co(n), -EIO);
    n->flags |= NODE_NO_FLUSH;
    assert_int_equal(file_flush_co(n), 0);
    drop(n);
}

/* ---------------------------------------------------------------- running */

static int setup(void **state) {
    const char *tmp = getenv("TMPDIR");
    snprintf(dir, sizeof(dir), "%s/strata-test-XXXXXX", tmp && *tmp ? tmp : "/var/tmp");
    return mkdtemp(dir) ? 0 : -1;
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

#define T(fn)                                                                                      \
    { .name = #fn, .test_func = run, .setup_func = setup_##fn, .teardown_func = teardown }
#define TESTS(X)                                                                                   \
    X(refuses_a_directory)                                                                         \
    X(refuses_a_fifo_without_hanging)                                                              \
    X(refuses_a_socket)                                                                            \
    X(refuses_a_character_device)                                                                  \
    X(names_a_missing_file)                                                                        \
    X(refuses_writing_with_force_share)                                                            \
    X(read_past_the_end_gives_zeros)                                                               \
    X(read_zero_fills_the_tail_of_a_scatter_list)                                                  \
    X(write_grows_the_file)                                                                        \
    X(direct_io_reports_its_alignment_and_moves_bytes)                                             \
    X(direct_read_of_an_unaligned_end_gives_zeros)                                                 \
    X(zero_with_unmap_gives_space_back)                                                            \
    X(zero_without_unmap_keeps_space)                                                              \
    X(zero_behind_the_end_grows_sparsely)                                                          \
    X(zero_behind_the_end_never_cuts_a_write_in_flight)                                            \
    X(discard_never_changes_the_size)                                                              \
    X(extents_tell_data_from_holes)                                                                \
    X(extents_see_a_write_into_a_remembered_hole)                                                  \
    X(extents_see_anothers_write_when_writers_are_allowed)                                         \
    X(extents_of_a_file_that_others_cut_are_zero)                                                  \
    X(extents_of_a_tebibyte_hole_take_one_call)                                                    \
    X(truncate_falloc_allocates)                                                                   \
    X(truncate_full_writes_zeros_to_an_odd_size)                                                   \
    X(truncate_that_fails_leaves_the_size)                                                         \
    X(limit_stops_growth_by_writes_zeros_and_truncate)                                             \
    X(appends_are_allocated_ahead_and_the_rest_given_back)                                         \
    X(allocation_ahead_stays_below_the_limit)                                                      \
    X(writes_far_behind_the_end_are_not_appends)                                                   \
    X(unnamed_file_has_no_name_until_linked)                                                       \
    X(unnamed_file_dropped_leaves_nothing)                                                         \
    X(link_refuses_an_existing_name)                                                               \
    X(link_replaces_and_keeps_the_mode)                                                            \
    X(link_through_a_symlink_replaces_its_target)                                                  \
    X(link_refuses_to_replace_a_file_in_use)                                                       \
    X(hidden_name_stands_in_for_unnamed)                                                           \
    X(create_refuses_an_existing_file)                                                             \
    X(scratch_folder_that_is_missing_is_named)                                                     \
    X(writer_keeps_a_second_writer_out_and_is_named)                                               \
    X(readers_coexist_and_keep_writers_out)                                                        \
    X(force_share_reads_beside_a_writer)                                                           \
    X(locking_off_takes_no_locks)                                                                  \
    X(refused_open_leaves_no_lock_bytes)                                                           \
    X(reopen_goes_to_writing_and_back)                                                             \
    X(reopen_beside_another_reader_changes_nothing)                                                \
    X(reopen_works_on_an_unnamed_file)                                                             \
    X(copy_range_copies_or_declines)                                                               \
    X(no_flush_makes_flush_nothing)

#define SETUP(fn)                                                                                  \
    static int setup_##fn(void **state) {                                                          \
        *state = (void *)fn;                                                                       \
        return setup(state);                                                                       \
    }
TESTS(SETUP)
#define ROW(fn) T(fn),

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
