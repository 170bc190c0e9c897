/* SPDX-License-Identifier: MIT */
/*
 * The fault sweep: each operation again and again, and each time another thing goes wrong in it.
 *
 *     faults [-d SAMPLES -e EVERY] [-k KIND -n N] DIR [CASE ...]    exit 1 when something was found
 *
 * -k (enum fault_kind) and -n choose one fault, for a debugger; DIR/work is left as it was then.
 *
 * A case works on small images in DIR/work, which are put there afresh from DIR/seed each time.
 * The n-th allocation or I/O call fails (inject.h), for n = 1, 2, 3 ... until the case ends before
 * it comes to that.  Afterwards, without faults:
 *
 *  1. check finds leaks at most in every image, and every block reads as before or as written;
 *     what a flush covered reads as written;
 *  2. an image that was being made is not there under its name, or it is whole;
 *  3. the library holds as much memory, and as many descriptors, as after a run without a fault;
 *  4. an error has a text.
 *
 * A hang ends the program (alarm), a crash does so by itself; both say where.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <jansson.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "disk/overlay.h"
#include "inject.h"
#include "job/compare.h"
#include "job/copy.h"
#include "job/rebase.h"
#include "runtime/loop.h"

#define BLOCK 512u
#define SIZE (256 * KIB)
#define BLOCKS (SIZE / BLOCK)
#define FILES 6
#define STEP_ALL 250 /* up to here each n is tried, then every seventh */

struct file {
    const char *name;
    uint8_t *bytes;
    size_t size;
};

struct trial {
    char dir[256];
    struct file seed[FILES];
    uint32_t start[BLOCKS]; /* what top.qcow2 reads as in the seed */
    /* of the run: what a block of the written image may read as */
    uint32_t was[BLOCKS], will[BLOCKS];
    bool maybe[BLOCKS]; /* a discard: either, for good */
    uint32_t next_id;
    struct err e;
    /* over all runs */
    unsigned long runs, struck, failed;
    const char *sample_dir;
    unsigned long sample_every;
    enum fault_kind only_kind; /* with only_n > 0: this one fault */
    unsigned long only_n;
    char **wanted;
};

struct fault_case {
    const char *name;
    const char *image; /* the file whose blocks the model is about; NULL: none */
    const char *made;  /* a file that the case makes; NULL: none */
    int (*run_co)(struct trial *t);
};

static char where[200]; /* for a crash */

static void die(const char *what) {
    fprintf(stderr, "faults: %s: %s\n", where, what);
    abort();
}

static void must(int r, const struct err *e, const char *what) {
    if (r >= 0)
        return;
    fprintf(stderr, "faults: %s: %s: %s\n", where, what, e && e->code ? err_text(e) : strerror(-r));
    abort();
}

static const char *path(const struct trial *t, const char *name) {
    static char buf[4][600];
    static unsigned next;
    char *p = buf[next++ % 4];
    snprintf(p, sizeof(buf[0]), "%s/work/%s", t->dir, name);
    return p;
}

static void say(struct trial *t, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void say(struct trial *t, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    if (t->failed++ < 20) {
        printf("  %s: ", where);
        vprintf(fmt, ap);
        puts("");
        fflush(stdout);
    }
    va_end(ap);
}

/* ---------------------------------------------------------------- what cases are made of */

static int open_co(struct trial *t, const char *name, unsigned flags, struct node **out) {
    struct open_req req = {.name = path(t, name), .flags = flags | OPEN_UNMAP, .gate = GATE_ANY};
    const char *dot = strrchr(name, '.');
    req.format = !strcmp(dot, ".img") ? "raw" : dot + 1;
    *out = NULL;
    return node_open_co(&req, out, &t->e);
}

static void fill(uint8_t *p, uint64_t count, uint32_t id) {
    for (uint64_t i = 0; i < count * BLOCK; i += 8)
        le64_store(p + i, id);
}

static void touch(struct trial *t, uint64_t first, uint64_t count, uint32_t id, bool maybe) {
    for (uint64_t b = first; b < first + count; b++) {
        t->will[b] = id;
        t->maybe[b] = maybe;
    }
}

static int write_co(struct trial *t, struct node *n, uint64_t first, uint64_t count) {
    static uint8_t buf[64 * KIB];
    uint32_t id = ++t->next_id;
    fill(buf, count, id);
    touch(t, first, count, id, false);
    return disk_pwrite_co(n, first * BLOCK, buf, count * BLOCK);
}

static int zero_co(struct trial *t, struct node *n, uint64_t first, uint64_t count,
                   unsigned flags) {
    touch(t, first, count, 0, false);
    return disk_zero_co(n, first * BLOCK, count * BLOCK, flags);
}

static int discard_co(struct trial *t, struct node *n, uint64_t first, uint64_t count) {
    touch(t, first, count, 0, true);
    return disk_discard_co(n, first * BLOCK, count * BLOCK);
}

static int coded_co(struct trial *t, struct node *n, uint64_t first) {
    static uint8_t in[64 * KIB], out[64 * KIB];
    uint64_t count = n->granularity / BLOCK;
    uint32_t id = ++t->next_id;
    fill(in, count, id);
    ssize_t len = n->codec->encode(in, n->granularity, out, n->granularity);
    if (len < 0)
        return (int)len;
    touch(t, first, count, id, false);
    return disk_write_coded_co(n, first * BLOCK, out, (uint32_t)len);
}

static int flush_co(struct trial *t, struct node *n) {
    int r = disk_flush_co(n);
    for (uint64_t b = 0; !r && b < BLOCKS; b++)
        if (!t->maybe[b])
            t->was[b] = t->will[b];
    return r;
}

/* Reads all; wrong data without an error is a failure, too. */
static int read_co(struct trial *t, struct node *n) {
    static uint8_t buf[SIZE];
    return disk_pread_co(n, 0, buf, min_u64(SIZE, n->size));
}

static int create_co(struct trial *t, const char *name, const char *format, const char *text) {
    json_t *options = json_object();
    struct err e AUTO_ERR = ERR_INIT;
    must(opt_parse_keyval(text, NULL, &options, &e), &e, "options");
    if (!json_object_get(options, "size"))
        json_object_set_new(options, "size", json_integer(SIZE));
    int r = disk_create_co(path(t, name), format, options, CREATE_REPLACE, &t->e);
    json_decref(options);
    return r;
}

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

static int convert(struct trial *t, const char *to, const char *format, bool compress) {
    struct copy_opts opts = {.target_is_zero = true, .sparse_bytes = 4096, .compress = compress};
    struct create_ctx ctx = {.name = path(t, to), .flags = CREATE_UNNAMED};
    struct open_req req = {.flags = OPEN_RW | OPEN_UNMAP};
    struct node *file = NULL, *dst = NULL;
    json_t *options = json_pack("{s:i}", "size", (int)SIZE);
    WITH(t, src, "top.qcow2", 0);
    const struct driver *drv = driver_find(format);
    r = storage_create_co(&ctx, &file, &t->e);
    r = r ? r : format_create_co(file, drv, options, &t->e);
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
    return convert(t, "made.qcow2", "qcow2", false);
}
static int case_convert_coded(struct trial *t) {
    return convert(t, "made.qcow2", "qcow2", true);
}
static int case_convert_raw(struct trial *t) {
    return convert(t, "made.img", "raw", false);
}
static int case_convert_vdi(struct trial *t) {
    return convert(t, "made.vdi", "vdi", false);
}
static int case_convert_qed(struct trial *t) {
    return convert(t, "made.qed", "qed", false);
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
    json_t *narrow = json_pack("{s:i}", "refcount_bits", 8);
    json_t *old = json_pack("{s:s, s:i}", "compat", "0.10", "refcount_bits", 16);
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

static const struct fault_case cases[] = {
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
    {"create", NULL, "made.qcow2", case_create},
    {"create-full", NULL, "made.qcow2", case_create_full},
    {"create-raw", NULL, "made.img", case_create_raw},
    {"amend", "small.qcow2", NULL, case_amend},
    {"throw-away", "base.qcow2", "made.qcow2", case_throw_away},
    {"raw", "flat.img", NULL, case_raw},
};

/* ---------------------------------------------------------------- judging */

static bool write_file(const char *name, const uint8_t *bytes, size_t size) {
    int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    bool ok = fd >= 0 && write(fd, bytes, size) == (ssize_t)size;
    return fd >= 0 && !close(fd) && ok;
}

static void place_files(struct trial *t) {
    DIR *d = opendir(path(t, ""));
    for (struct dirent *x; d && (x = readdir(d));)
        if (x->d_name[0] != '.')
            unlink(path(t, x->d_name));
    closedir(d);
    for (int i = 0; i < FILES && t->seed[i].name; i++)
        if (!write_file(path(t, t->seed[i].name), t->seed[i].bytes, t->seed[i].size))
            die("placing the images");
}

static void first_problem(void *arg, bool is_leak, const char *text) {
    char *first = arg;
    if (!is_leak && !first[0])
        snprintf(first, 160, "%s", text);
}

static void judge_check_co(struct trial *t, const char *name) {
    char first[160] = "";
    struct check_result c = {.report = first_problem, .arg = first};
    struct node *n;
    if (open_co(t, name, OPEN_CHECK | OPEN_NO_BACKING, &n) < 0) {
        say(t, "%s does not open afterwards: %s", name, err_text(&t->e));
        return;
    }
    if (n->drv->format->check_co) {
        if (n->drv->format->check_co(n, &c, &t->e) < 0)
            say(t, "%s cannot be checked afterwards: %s", name, err_text(&t->e));
        else if (c.corruptions || c.check_errors)
            say(t, "%s is corrupt afterwards: %s", name, first);
    }
    node_unref_co(n);
}

static void judge_blocks_co(struct trial *t, const char *name) {
    static uint8_t buf[SIZE];
    struct node *n;
    if (open_co(t, name, 0, &n) < 0) {
        say(t, "%s does not open afterwards: %s", name, err_text(&t->e));
        return;
    }
    uint64_t size = min_u64(n->size, SIZE);
    int r = disk_pread_co(n, 0, buf, size);
    if (r < 0)
        say(t, "%s cannot be read afterwards: %s", name, strerror(-r));
    for (uint64_t b = 0; !r && b < size / BLOCK; b++) {
        uint8_t want[BLOCK];
        uint32_t id = le32_load(buf + b * BLOCK);
        fill(want, 1, id);
        if (memcmp(want, buf + b * BLOCK, BLOCK) || (id != t->was[b] && id != t->will[b])) {
            say(t, "%s: block %llu reads as %u, not %u or %u", name, (unsigned long long)b, id,
                t->was[b], t->will[b]);
            break;
        }
    }
    node_unref_co(n);
}

/* For an independent checker. */
static void sample(struct trial *t, const struct fault_case *c) {
    static uint8_t buf[4 * MIB];
    if (!t->sample_dir || t->runs % t->sample_every)
        return;
    const char *name = c->image ? c->image : c->made;
    int fd = open(path(t, name), O_RDONLY);
    if (fd < 0)
        return; /* it was not made */
    ssize_t n = read(fd, buf, sizeof(buf));
    close(fd);
    char *to = xasprintf("%s/%lu-%s-%s", t->sample_dir, t->runs, c->name, name);
    if (n < 0 || !write_file(to, buf, (size_t)n))
        die("writing a sample");
    free(to);
}

static unsigned descriptors(void) {
    unsigned n = 0;
    DIR *d = opendir("/proc/self/fd");
    while (d && readdir(d))
        n++;
    closedir(d);
    return n;
}

/* One run; whether the fault struck. */
static bool run_once_co(struct trial *t, const struct fault_case *c, enum fault_kind kind,
                        unsigned long n) {
    snprintf(where, sizeof(where), "%s, %s at %lu", c->name, fault_names[kind], n);
    alarm(60);
    place_files(t);
    t->next_id = 1000;
    for (uint64_t b = 0; b < BLOCKS; b++) {
        bool top = c->image && (!strcmp(c->image, "top.qcow2") || !strcmp(c->image, "flat.img"));
        t->was[b] = t->will[b] = top ? t->start[b] : c->image && *c->image == 'b' ? 1 + b / 64 : 0;
        t->maybe[b] = false;
    }
    err_clear(&t->e);
    fault_arm(kind, n);
    int r = c->run_co(t);
    bool struck = fault_disarm();
    t->runs++;
    t->struck += struck;
    if (r < 0 && !struck)
        say(t, "fails by itself: %s", t->e.code ? err_text(&t->e) : strerror(-r));
    if (r < 0 && t->e.code && t->e.code != -r)
        say(t, "returns %d, and its error is %d (%s)", r, t->e.code, err_text(&t->e));
    err_clear(&t->e);
    sample(t, c);
    for (int i = 0; i < FILES && t->seed[i].name; i++)
        judge_check_co(t, t->seed[i].name);
    if (c->image)
        judge_blocks_co(t, c->image);
    if (c->made && access(path(t, c->made), F_OK) == 0)
        judge_check_co(t, c->made);
    else if (c->made && !r)
        say(t, "success, and nothing was made");
    err_clear(&t->e);
    return struck;
}

static void sweep_co(struct trial *t, const struct fault_case *c) {
    unsigned long runs = t->runs, struck = t->struck, failed = t->failed, most[FAULT_KINDS] = {0};
    run_once_co(t, c, FAULT_NONE, 0);
    run_once_co(t, c, FAULT_NONE, 0);
    size_t live = fault_live();
    unsigned fds = descriptors();
    for (enum fault_kind k = FAULT_MEMORY; k < FAULT_KINDS; k++) {
        for (unsigned long n = 1; run_once_co(t, c, k, n); n += n < STEP_ALL ? 1 : 7) {
            most[k] = n;
            for (int again = 0; fault_live() > live || descriptors() > fds; again++) {
                /* A cache may have grown once; what grows each time is lost. */
                if (again == 3) {
                    say(t, "holds %zu allocations, not %zu, and %u descriptors, not %u",
                        fault_live(), live, descriptors(), fds);
                    live = fault_live();
                    fds = descriptors();
                    break;
                }
                size_t before = fault_live();
                unsigned fds_before = descriptors();
                run_once_co(t, c, k, n);
                if (fault_live() <= before && descriptors() <= fds_before) {
                    live = fault_live();
                    fds = descriptors();
                }
            }
        }
    }
    printf(
        "%-14s %5lu runs, %5lu struck (memory %lu, EIO %lu, ENOSPC %lu, short %lu), %lu failed\n",
        c->name, t->runs - runs, t->struck - struck, most[FAULT_MEMORY], most[FAULT_EIO],
        most[FAULT_ENOSPC], most[FAULT_SHORT], t->failed - failed);
    fflush(stdout);
}

/* ---------------------------------------------------------------- the images at the start */

static void load(struct trial *t, const char *name) {
    int i = 0;
    struct stat st;
    while (t->seed[i].name)
        i++;
    int fd = open(path(t, name), O_RDONLY);
    if (fd < 0 || fstat(fd, &st) || i == FILES)
        die(name);
    t->seed[i] = (struct file){name, malloc((size_t)st.st_size), (size_t)st.st_size};
    if (read(fd, t->seed[i].bytes, t->seed[i].size) != st.st_size)
        die(name);
    close(fd);
}

static void make_filled_co(struct trial *t, const char *name, const char *options, uint32_t id) {
    struct node *n;
    static uint8_t buf[SIZE];
    const char *format = strstr(name, ".img") ? "raw" : "qcow2";
    must(create_co(t, name, format, options), &t->e, name);
    must(open_co(t, name, OPEN_RW, &n), &t->e, name);
    for (uint64_t b = 0; b < n->size / BLOCK; b++)
        fill(buf + b * BLOCK, 1, id + (uint32_t)b / 64);
    must(disk_pwrite_co(n, 0, buf, n->size), NULL, name);
    must(disk_flush_co(n), NULL, name);
    node_unref_co(n);
}

static void seeds_co(struct trial *t) {
    static uint8_t buf[SIZE];
    struct copy_opts opts = {0};
    struct node *n, *flat;
    make_filled_co(t, "base.qcow2", "cluster_size=4k", 1);
    make_filled_co(t, "other.qcow2", "cluster_size=8k,size=200k", 101);
    must(create_co(t, "small.qcow2", "qcow2", "cluster_size=512"), &t->e, "small");
    must(create_co(t, "top.qcow2", "qcow2",
                   "cluster_size=4k,backing_file=base.qcow2,backing_fmt=qcow2"),
         &t->e, "top");
    must(open_co(t, "top.qcow2", OPEN_RW, &n), &t->e, "top");
    t->next_id = 200;
    must(write_co(t, n, 70, 10) | write_co(t, n, 128, 32), NULL, "top");
    must(coded_co(t, n, 8) | coded_co(t, n, 16) | coded_co(t, n, 64), NULL, "top");
    must(zero_co(t, n, 160, 16, ZERO_MAY_UNMAP), NULL, "top");
    must(disk_flush_co(n), NULL, "top");
    must(disk_pread_co(n, 0, buf, SIZE), NULL, "top");
    for (uint64_t b = 0; b < BLOCKS; b++)
        t->start[b] = le32_load(buf + b * BLOCK);
    must(create_co(t, "flat.img", "raw", ""), &t->e, "flat");
    must(open_co(t, "flat.img", OPEN_RW, &flat), &t->e, "flat");
    must(copy_run_co(n, flat, SIZE, 0, &opts, &t->e), &t->e, "flat");
    must(disk_flush_co(flat), NULL, "flat");
    node_unref_co(flat);
    node_unref_co(n);
    load(t, "base.qcow2");
    load(t, "other.qcow2");
    load(t, "small.qcow2");
    load(t, "top.qcow2");
    load(t, "flat.img");
}

static void all_co(void *arg) {
    struct trial *t = arg;
    seeds_co(t);
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        bool wanted = !*t->wanted;
        for (char **w = t->wanted; *w; w++)
            wanted |= !strcmp(*w, cases[i].name);
        if (wanted && t->only_n)
            run_once_co(t, &cases[i], t->only_kind, t->only_n);
        else if (wanted)
            sweep_co(t, &cases[i]);
    }
}

static void on_signal(int signo) {
    ssize_t ignored = write(STDERR_FILENO, where, strlen(where));
    ignored += write(STDERR_FILENO, signo == SIGALRM ? ": hangs\n" : ": dies\n", 8);
    (void)ignored;
    signal(signo, SIG_DFL);
    raise(signo);
}

int main(int argc, char **argv) {
    static struct trial t = {.sample_every = 100};
    for (int c; (c = getopt(argc, argv, "d:e:k:n:")) != -1;) {
        if (c == 'd')
            t.sample_dir = optarg;
        else if (c == 'e')
            t.sample_every = max_u64(1, strtoul(optarg, NULL, 0));
        else if (c == 'k')
            t.only_kind = (enum fault_kind)atoi(optarg);
        else if (c == 'n')
            t.only_n = strtoul(optarg, NULL, 0);
        else
            optind = argc;
    }
    if (optind >= argc) {
        fprintf(stderr, "usage: faults [-d SAMPLES [-e EVERY]] [-k KIND -n N] DIR [CASE ...]\n");
        return 2;
    }
    struct loop *loop;
    snprintf(t.dir, sizeof(t.dir), "%s", argv[optind]);
    t.wanted = argv + optind + 1;
    mkdir(t.dir, 0755);
    if (mkdir(path(&t, ""), 0755) < 0 && errno != EEXIST)
        die("making the folder");
    signal(SIGALRM, on_signal);
#ifndef __SANITIZE_ADDRESS__
    signal(SIGSEGV, on_signal);
#endif
    signal(SIGABRT, on_signal);
    must(loop_new(LOOP_AUTO, &loop, NULL), NULL, "loop");
    loop_run(loop, all_co, &t);
    loop_free(loop);
    for (int i = 0; i < FILES; i++)
        free(t.seed[i].bytes);
    printf("%lu runs, %lu faults, %lu failed\n", t.runs, t.struck, t.failed);
    return t.failed != 0;
}
