/* SPDX-License-Identifier: MIT */
/*
 * The fault sweep: each operation again and again, and each time another thing goes wrong in it.
 *
 *     faults [-d SAMPLES -e EVERY] [-k KIND -n N] DIR [CASE ...]    exit 1 when something was found
 *
 * -k (enum fault_kind) and -n choose one fault, for a debugger; DIR/trial is left as it was then.
 *
 * A case works on small images in DIR/trial, which are put there afresh from DIR/seed each time.
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
#include "faults.h"
#include "job/compare.h"
#include "job/copy.h"
#include "job/rebase.h"
#include "runtime/loop.h"

static char where[200]; /* for a crash */

void die(const char *what) {
    fprintf(stderr, "faults: %s: %s\n", where, what);
    abort();
}

void must(int r, const struct err *e, const char *what) {
    if (r >= 0)
        return;
    fprintf(stderr, "faults: %s: %s: %s\n", where, what, e && e->code ? err_text(e) : strerror(-r));
    abort();
}

void say(struct trial *t, const char *fmt, ...) {
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

/* ---------------------------------------------------------------- judging */

/* Zeros become holes: most of what is placed again and again. */
static bool write_file(const char *name, const uint8_t *bytes, size_t size) {
    int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    bool ok = fd >= 0 && ftruncate(fd, (off_t)size) == 0;
    for (size_t at = 0, n; ok && at < size; at += n) {
        n = (size_t)min_u64(64 * KIB, size - at);
        ok = bytes_are_zero(bytes + at, n) || pwrite(fd, bytes + at, n, (off_t)at) == (ssize_t)n;
    }
    return fd >= 0 && !close(fd) && ok;
}

/* Whether the case begins with that image: its own one, and the parents of a link. */
static bool is_placed(const struct file *f, const struct fault_case *c) {
    bool link = c->image && !strncmp(c->image, "link.", 5);
    return !f->apart || (c->image && !strcmp(f->name, c->image)) ||
           (link && f->name[0] == 'p' && !strcmp(strrchr(f->name, '.'), strrchr(c->image, '.')));
}

static void place_files(struct trial *t, const struct fault_case *c) {
    DIR *d = opendir(path(t, ""));
    for (struct dirent *x; d && (x = readdir(d));)
        if (x->d_name[0] != '.')
            unlink(path(t, x->d_name));
    closedir(d);
    for (int i = 0; i < FILES && t->seed[i].name; i++)
        if (is_placed(&t->seed[i], c) &&
            !write_file(path(t, t->seed[i].name), t->seed[i].bytes, t->seed[i].size))
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

/* The repair that failed can be done again; the one that did not has left nothing. */
static void judge_repair_co(struct trial *t, bool whole) {
    struct check_result c = {.fix = whole ? 0 : CHECK_FIX_LEAKS | CHECK_FIX_ERRORS};
    struct node *n;
    judge_blocks_co(t, "hurt.qcow2");
    if (open_co(t, "hurt.qcow2", OPEN_CHECK | (whole ? 0 : OPEN_RW), &n) < 0) {
        say(t, "the image does not open afterwards: %s", err_text(&t->e));
        return;
    }
    if (n->drv->format->check_co(n, &c, &t->e) < 0)
        say(t, "the image cannot be checked afterwards: %s", err_text(&t->e));
    else if (c.corruptions || c.check_errors)
        say(t, "the repaired image has %llu corruptions", (unsigned long long)c.corruptions);
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

static uint32_t starts_as(const struct trial *t, const char *image, uint64_t b) {
    if (!strcmp(image, "top.qcow2") || !strcmp(image, "flat.img"))
        return t->start[b];
    if (!strncmp(image, "link.", 5))
        return LINK_ID + (uint32_t)b / 64;
    if (!strcmp(image, "base.qcow2"))
        return 1 + (uint32_t)b / 64;
    return strcmp(image, "hurt.qcow2") ? 0 : 301 + (uint32_t)b / 64;
}

/* One run; whether the fault struck. */
static bool run_once_co(struct trial *t, const struct fault_case *c, enum fault_kind kind,
                        unsigned long n) {
    snprintf(where, sizeof(where), "%s, %s at %lu", c->name, fault_names[kind], n);
    alarm(60);
    place_files(t, c);
    t->next_id = 1000;
    for (uint64_t b = 0; b < BLOCKS; b++) {
        t->was[b] = t->will[b] = c->image ? starts_as(t, c->image, b) : 0;
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
        if (!is_placed(&t->seed[i], c))
            continue;
        else if (strcmp(t->seed[i].name, "hurt.qcow2"))
            judge_check_co(t, t->seed[i].name);
        else if (c->image && !strcmp(c->image, "hurt.qcow2"))
            judge_repair_co(t, !r);
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

static void all_co(void *arg) {
    struct trial *t = arg;
    seeds_co(t);
    for (size_t i = 0; fault_cases[i].name; i++) {
        bool wanted = !*t->wanted;
        for (char **w = t->wanted; *w; w++)
            wanted |= !strcmp(*w, fault_cases[i].name);
        if (wanted && t->only_n)
            run_once_co(t, &fault_cases[i], t->only_kind, t->only_n);
        else if (wanted)
            sweep_co(t, &fault_cases[i]);
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
    fault_json();
    must(loop_new(LOOP_AUTO, &loop, NULL), NULL, "loop");
    loop_run(loop, all_co, &t);
    loop_free(loop);
    for (int i = 0; i < FILES; i++)
        free(t.seed[i].bytes);
    printf("%lu runs, %lu faults, %lu failed\n", t.runs, t.struck, t.failed);
    return t.failed != 0;
}
