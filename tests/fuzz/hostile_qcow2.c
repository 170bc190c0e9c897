/* SPDX-License-Identifier: MIT */
/*
 * Hostile qcow2 images, systematically: every field of good images at its limits, beyond them,
 * unaligned, overlapping and in loops.
 *
 *     hostile-qcow2 FILE|FOLDER ...       seeds in any form of fuzz.h (what follows PRG1 is
 * dropped)
 *
 * From a seed's header the fields are found where they stand: header, extensions, backing name, L1
 * table, L2 tables, refcount table and blocks, snapshot table and its strings, bitmap directory and
 * tables, the LUKS pointer.  Each is set to every value of a list (numbers at the edges of its
 * width; offsets of the header, of every table, of the field's own table, of the last cluster, of
 * the end of the file and behind it; each flag bit; strings of other bytes), and the image is
 * opened, described, listed, mapped, read, checked, written to and checked again.
 *
 * It must not crash; take more than MEMORY_MAX bytes or CPU_MAX_MS of processor time; change the
 * file while it only looks; or refuse without a text, or with one that does not name what is wrong:
 * a refusal of a field's value must hold one of the field's words.
 */
#include <dirent.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "disk/bitmap.h"
#include "disk/snapshot.h"
#include "format/qcow2/header.h"
#include "fuzz.h"
#include "hostile.h"

#define MEMORY_MAX (160 * MIB) /* an L1 and a refcount table at their caps, twice */
#define CPU_MAX_MS 3000
#define DISK_LIMIT (8 * MIB)

/* ---------------------------------------------------------------- memory in use */

static size_t in_use, peak;
static void count(void *p, bool more) {
    size_t n = p ? malloc_usable_size(p) : 0;
    size_t now = more ? __atomic_add_fetch(&in_use, n, __ATOMIC_RELAXED)
                      : __atomic_sub_fetch(&in_use, n, __ATOMIC_RELAXED);
    if (more && now < SIZE_MAX / 2 && now > peak)
        peak = now;
}
void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void *__real_aligned_alloc(size_t align, size_t n);
void __real_free(void *p);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);
void *__wrap_aligned_alloc(size_t align, size_t n);
void __wrap_free(void *p);
void *__wrap_malloc(size_t n) {
    void *p = __real_malloc(n);
    count(p, true);
    return p;
}
void *__wrap_calloc(size_t n, size_t size) {
    void *p = __real_calloc(n, size);
    count(p, true);
    return p;
}
void *__wrap_realloc(void *p, size_t n) {
    count(p, false);
    void *q = __real_realloc(p, n);
    count(q ? q : p, true);
    return q;
}
void *__wrap_aligned_alloc(size_t align, size_t n) {
    void *p = __real_aligned_alloc(align, n);
    count(p, true);
    return p;
}
void __wrap_free(void *p) {
    count(p, false);
    __real_free(p);
}

static const struct target *now; /* for messages */
static unsigned long images, refused, silent;
static char where[200];

/* ---------------------------------------------------------------- what is done with an image */

static bool names_it(const struct field *f, const char *text) {
    char words[128];
    char *save = NULL;
    /* Two things in one place: the text may name the other one. */
    if (!f->words || strstr(text, "shares ") || strstr(text, "overlap") ||
        (now->data_file && strstr(text, "data-file")))
        return true;
    snprintf(words, sizeof(words), "%s", f->words);
    for (char *w = strtok_r(words, "|", &save); w; w = strtok_r(NULL, "|", &save))
        if (strcasestr(text, w))
            return true;
    return false;
}

static void refusal(const struct field *f, int r, const struct err *e, const char *doing) {
    refused++;
    FUZZ_CHECK(e->code == -r && e->text && *e->text, "%s: %s refused with %d and no text", where,
               doing, r);
    for (const char *s = e->text; *s; s++)
        FUZZ_CHECK((unsigned char)*s >= ' ' && *s != 127, "%s: a control character in '%s'", where,
                   e->text);
    if (f->width == 0 && !f->length && !now->refused)
        ((struct target *)now)->refused = xstrdup(e->text);
    if (r == -ENOMEM || names_it(f, e->text) || (now->refused && !strcmp(now->refused, e->text)))
        return;
    if (silent++ < 60)
        printf("%s: %s says only: %s\n", where, doing, e->text);
}

static struct node *open_co(struct node *file, unsigned flags, const struct field *f) {
    struct open_req req = {.flags = flags | OPEN_NO_BACKING};
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = NULL;
    json_t *options =
        now->data_file ? json_pack("{s:{s:s, s:i}}", "data-file", "driver", "memory", "size", 65536)
                       : NULL;
    int r = node_open_on_co(node_ref(file), driver_find("qcow2"), options, &req, &n, &e);
    json_decref(options);
    if (r == 0)
        return n;
    refusal(f, r, &e, "opening");
    node_unref_co(file);
    return NULL;
}

static void look_co(struct node *file, const struct field *f) {
    static uint8_t buf[64 * KIB];
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = open_co(file, 0, f);
    if (!n)
        return;
    json_decref(n->drv->format->describe(n));
    AUTO_SNAPSHOTS struct snapshot_list list = {0};
    int r = disk_snapshot_list_co(n, &list, &e);
    if (r < 0 && r != -ENOTSUP)
        refusal(f, r, &e, "listing");
    for (struct bitmap *b = NULL; (b = bitmap_next(n, b));)
        bitmap_load_co(b, NULL);
    uint64_t at = 0;
    for (int i = 0; i < 100 && at < n->size; i++) {
        struct status st;
        r = disk_status_co(n, at, n->size - at, STATUS_PRECISE, &st);
        FUZZ_CHECK(r < 0 || (st.length && st.length <= n->size - at), "%s: the map stands still",
                   where);
        if (r == 0 && st.data)
            disk_pread_co(n, at, buf, min_u64(min_u64(st.length, n->granularity), sizeof(buf)));
        at += r < 0 ? n->granularity : st.length;
    }
    if (n->size >= 512)
        disk_pread_co(n, n->size - 512, buf, 512);
    node_unref_co(n);
}

/* 1 clean (leaks or not), 0 corrupt, -1 refused. */
static int check_co(struct node *file, const struct field *f, unsigned fix) {
    struct check_result c = {.fix = fix};
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = open_co(file, OPEN_CHECK | (fix ? OPEN_RW : 0), f);
    if (!n)
        return -1;
    int r = n->drv->format->check_co(n, &c, &e);
    if (r < 0)
        refusal(f, r, &e, "check");
    node_unref_co(n);
    return r < 0 ? -1 : !c.corruptions && !c.check_errors;
}

static void write_co(struct node *file, const struct field *f) {
    static const uint8_t data[1536] = {1};
    struct node *n = open_co(file, OPEN_RW | OPEN_UNMAP, f);
    if (!n)
        return;
    if (n->size > 4096) {
        disk_pwrite_co(n, 512, data, sizeof(data));
        disk_pwrite_co(n, n->size / 2, data, 700);
        disk_discard_co(n, 0, min_u64(n->size, 64 * KIB));
        disk_zero_co(n, n->size - 1024, 1024, ZERO_MAY_UNMAP);
    }
    disk_flush_co(n);
    node_unref_co(n);
}

static struct node *load_co(const struct target *t) {
    struct node *file = fuzz_memory_co(DISK_LIMIT);
    for (uint64_t at = 0; at < t->size; at += t->cluster) {
        uint64_t len = min_u64(t->cluster, t->size - at);
        if (!bytes_are_zero(t->image + at, len))
            disk_pwrite_co(file, at, t->image + at, len);
    }
    if (file->size < t->size)
        disk_resize_co(file, t->size, PREALLOC_OFF, NULL);
    return file;
}

static void image_co(const struct target *t, const struct field *f) {
    struct timespec from, to;
    size_t before = peak = in_use;
    images++;
    alarm(60);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &from);
    struct node *file = load_co(t);
    uint64_t size = file->size;
    int64_t allocated = disk_allocated(file);
    look_co(file, f);
    int clean = check_co(file, f, 0);
    FUZZ_CHECK(size == file->size && allocated == disk_allocated(file),
               "%s: looking at the image has changed its file", where);
    write_co(file, f);
    int after = check_co(file, f, 0);
    FUZZ_CHECK(clean != 1 || after == 1, "%s: a clean image is corrupt after writing", where);
    if (images % 8 == 0)
        check_co(file, f, CHECK_FIX_LEAKS | CHECK_FIX_ERRORS);
    node_unref_co(file);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &to);
    long ms = (to.tv_sec - from.tv_sec) * 1000 + (to.tv_nsec - from.tv_nsec) / 1000000;
    FUZZ_CHECK(peak - before <= MEMORY_MAX, "%s: took %zu MiB of memory", where,
               (peak - before) >> 20);
    FUZZ_CHECK(ms <= CPU_MAX_MS, "%s: took %ld ms", where, ms);
}

static void number_co(struct target *t, const struct field *f) {
    uint64_t v[VALUES_MAX];
    uint8_t kept[8];
    unsigned n = target_values(t, f, v);
    memcpy(kept, t->image + f->at, f->width);
    for (unsigned i = 0; i < n; i++) {
        uint64_t value = f->width == 8 ? v[i] : v[i] & ((UINT64_C(1) << 8 * f->width) - 1);
        if ((f->width < 8 && value != v[i]) || value == target_get(t, f->at, f->width))
            continue;
        snprintf(where, sizeof(where), "%s: %s = 0x%llx", t->seed, f->name,
                 (unsigned long long)value);
        for (unsigned k = 0; k < f->width; k++)
            t->image[f->at + k] = (uint8_t)(value >> 8 * (f->width - 1 - k));
        image_co(t, f);
        memcpy(t->image + f->at, kept, f->width);
    }
}

static void string_co(struct target *t, const struct field *f) {
    static const uint8_t bytes[] = {0, 0x1b, '/', 'j', 0x80, 0xff, '%'};
    uint8_t *kept = malloc(f->length);
    memcpy(kept, t->image + f->at, f->length);
    for (size_t i = 0; i < sizeof(bytes); i++) {
        snprintf(where, sizeof(where), "%s: %s of 0x%02x", t->seed, f->name, bytes[i]);
        memset(t->image + f->at, bytes[i], f->length);
        image_co(t, f);
        memcpy(t->image + f->at, kept, f->length);
        t->image[f->at + f->length / 2] = bytes[i];
        image_co(t, f);
        memcpy(t->image + f->at, kept, f->length);
    }
    free(kept);
}

static void seed_co(void *arg) {
    struct target *t = arg;
    struct field as_it_is = {.words = NULL};
    unsigned long before = images;
    target_find_fields(t);
    now = t;
    snprintf(where, sizeof(where), "%s as it is", t->seed);
    image_co(t, &as_it_is);
    for (unsigned i = 0; i < t->fields; i++) {
        struct field f = t->field[i];
        if (f.width)
            number_co(t, &f);
        else
            string_co(t, &f);
    }
    printf("%-24s %3u fields, %6lu images%s%s\n", t->seed, t->fields, images - before,
           t->refused ? "; refused from the start: " : "", t->refused ? t->refused : "");
    free(steal(&t->refused));
    fflush(stdout);
}

/* ---------------------------------------------------------------- seeds */

struct raw {
    const uint8_t *data;
    size_t size;
    struct target *t;
};

static void unpack_co(void *arg) {
    struct raw *in = arg;
    struct node *disk = fuzz_memory_co(0);
    struct prog program;
    size_t length;
    image_split(in->data, in->size, &length, &program);
    image_load_co(disk, in->data, length);
    in->t->size = disk->size;
    in->t->image = calloc(1, disk->size + 1);
    if (disk->size)
        disk_pread_co(disk, 0, in->t->image, disk->size);
    node_unref_co(disk);
}

static void one_file(const char *path, const char *name) {
    static struct target t;
    static uint8_t data[4 * MIB];
    FILE *f = fopen(path, "r");
    FUZZ_CHECK(f, "%s cannot be opened", path);
    struct raw in = {data, fread(data, 1, sizeof(data), f), &t};
    fclose(f);
    t.seed = name;
    fuzz_run(unpack_co, &in);
    if (t.size > 512 && t.size < IMAGE_BYTES_MAX) /* else its end was cut off */
        fuzz_run(seed_co, &t);
    free(t.image);
}

/* Those with a program behind them are the same images again. */
static bool repeats(const char *name) {
    size_t n = strlen(name);
    return n > 2 && name[n - 2] == '-' && name[n - 1] != '0';
}

static int only_files(const struct dirent *x) {
    return x->d_name[0] != '.' && !repeats(x->d_name);
}

static void on_signal(int signo) {
    ssize_t ignored = write(STDERR_FILENO, where, strlen(where));
    ignored += write(STDERR_FILENO, signo == SIGALRM ? ": hangs\n" : ": dies\n", 8);
    (void)ignored;
    signal(signo, SIG_DFL);
    raise(signo);
}

int main(int argc, char **argv) {
    signal(SIGALRM, on_signal);
#ifndef __SANITIZE_ADDRESS__
    signal(SIGSEGV, on_signal);
#endif
    signal(SIGABRT, on_signal);
    for (int i = 1; i < argc; i++) {
        struct stat st;
        struct dirent **list;
        if (stat(argv[i], &st) == 0 && !S_ISDIR(st.st_mode)) {
            one_file(argv[i], argv[i]);
            continue;
        }
        int n = scandir(argv[i], &list, only_files, alphasort);
        FUZZ_CHECK(n >= 0, "%s cannot be read", argv[i]);
        for (int k = 0; k < n; k++) {
            char *path = xasprintf("%s/%s", argv[i], list[k]->d_name);
            one_file(path, list[k]->d_name);
            free(path);
            free(list[k]);
        }
        free(list);
    }
    printf("%lu images, %lu refusals, %lu without the field's name\n", images, refused, silent);
    return silent != 0;
}
