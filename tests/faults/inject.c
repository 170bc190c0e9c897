/* SPDX-License-Identifier: MIT */
#include "inject.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>
#include <jansson.h>

#include "base/iov.h"
#include "base/strbuf.h"
#include "disk/io.h"
#include "runtime/loop.h"

const char *const fault_names[] = {"none", "memory", "EIO", "EIO for good", "ENOSPC", "short"};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static enum fault_kind armed;
static unsigned long left;
static bool happened;
static __thread int exempt; /* inside something that may not fail */

/* An event of one of these kinds: true when it is to fail. */
static bool strikes(unsigned kinds) {
    bool now = false;
    if (exempt)
        return false;
    pthread_mutex_lock(&lock);
    if (armed && kinds >> armed & 1) {
        now = left && --left == 0;
        happened |= now;
        now |= happened && armed == FAULT_EIO_ALL;
    }
    pthread_mutex_unlock(&lock);
    return now;
}

void fault_arm(enum fault_kind kind, unsigned long n) {
    pthread_mutex_lock(&lock);
    armed = kind;
    left = n;
    happened = false;
    pthread_mutex_unlock(&lock);
}

bool fault_disarm(void) {
    pthread_mutex_lock(&lock);
    armed = FAULT_NONE;
    bool was = happened;
    pthread_mutex_unlock(&lock);
    return was;
}

/* ---------------------------------------------------------------- memory */

#define SLOTS (1u << 16) /* far more than are alive at once */
static uintptr_t live[SLOTS];
static size_t live_count;

static unsigned slot_of(uintptr_t p) {
    return (unsigned)((p >> 4) * 2654435761u) % SLOTS;
}

static void *born(void *p) {
    if (!p)
        return p;
    pthread_mutex_lock(&lock);
    unsigned i = slot_of((uintptr_t)p);
    while (live[i])
        i = (i + 1) % SLOTS;
    live[i] = (uintptr_t)p;
    if (++live_count > SLOTS / 2)
        abort();
    pthread_mutex_unlock(&lock);
    return p;
}

/* What others allocated is not in the table, and nothing happens. */
static void died(void *p) {
    if (!p)
        return;
    pthread_mutex_lock(&lock);
    unsigned i = slot_of((uintptr_t)p);
    while (live[i] && live[i] != (uintptr_t)p)
        i = (i + 1) % SLOTS;
    if (live[i]) {
        live_count--;
        live[i] = 0;
        for (unsigned k = (i + 1) % SLOTS; live[k]; k = (k + 1) % SLOTS) { /* close the gap */
            unsigned home = slot_of(live[k]);
            bool between = i < k ? home > i && home <= k : home > i || home <= k;
            if (between)
                continue;
            live[i] = live[k];
            live[k] = 0;
            i = k;
        }
    }
    pthread_mutex_unlock(&lock);
}

size_t fault_live(void) {
    pthread_mutex_lock(&lock);
    size_t n = live_count;
    pthread_mutex_unlock(&lock);
    return n;
}

#define MEMORY (1u << FAULT_MEMORY)
#define WRAP(type, name, ...)                                                                      \
    type __real_##name(__VA_ARGS__);                                                               \
    type __wrap_##name(__VA_ARGS__);                                                               \
    type __wrap_##name(__VA_ARGS__)

WRAP(void *, malloc, size_t n) {
    return strikes(MEMORY) ? (errno = ENOMEM, NULL) : born(__real_malloc(n));
}
WRAP(void *, calloc, size_t n, size_t size) {
    return strikes(MEMORY) ? (errno = ENOMEM, NULL) : born(__real_calloc(n, size));
}
WRAP(void *, realloc, void *p, size_t n) {
    if (strikes(MEMORY)) {
        errno = ENOMEM;
        return NULL;
    }
    died(p);
    void *got = __real_realloc(p, n);
    return got ? born(got) : NULL;
}
WRAP(void *, aligned_alloc, size_t align, size_t n) {
    return strikes(MEMORY) ? (errno = ENOMEM, NULL) : born(__real_aligned_alloc(align, n));
}
WRAP(void, free, void *p) {
    died(p);
    __real_free(p);
}
/* The pool behind it would hide most of them. */
WRAP(void *, buf_get, size_t len) {
    void *p;
    if (strikes(MEMORY) || posix_memalign(&p, 4096, len ? len : 1))
        return NULL;
    return born(p);
}
WRAP(void, buf_put, void *buf, size_t len) {
    died(buf);
    __real_free(buf);
}

/* Stacks of tasks, slots of a session. */
WRAP(void *, mmap64, void *at, size_t len, int prot, int flags, int fd, off64_t off) {
    return strikes(MEMORY) ? (errno = ENOMEM, MAP_FAILED)
                           : __real_mmap64(at, len, prot, flags, fd, off);
}

/* jansson's own allocations; those of the cases themselves are exempt. */
static void *json_get(size_t n) {
    return strikes(MEMORY) ? NULL : born(__real_malloc(n));
}
static void json_put(void *p) {
    __wrap_free(p);
}
void fault_json(void) {
    json_set_alloc_funcs(json_get, json_put);
}

void fault_exempt(bool on) {
    exempt += on ? 1 : -1;
}

/* ---- what may not fail ---- */

WRAP(void *, xcalloc, size_t n, size_t size) {
    exempt++;
    void *p = __real_xcalloc(n, size);
    exempt--;
    return p;
}
WRAP(void, strbuf_add, struct strbuf *b, const char *s, size_t len) {
    exempt++;
    __real_strbuf_add(b, s, len);
    exempt--;
}
WRAP(void, strbuf_puts, struct strbuf *b, const char *s) {
    __wrap_strbuf_add(b, s, strlen(s));
}
WRAP(void, strbuf_put_safe, struct strbuf *b, const char *s, size_t len) {
    exempt++;
    __real_strbuf_put_safe(b, s, len);
    exempt--;
}
WRAP(char *, strbuf_steal, struct strbuf *b) {
    exempt++;
    char *s = __real_strbuf_steal(b);
    exempt--;
    return s;
}
void __wrap_strbuf_printf(struct strbuf *b, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
void __wrap_strbuf_printf(struct strbuf *b, const char *fmt, ...) {
    char *text = NULL;
    va_list ap;
    va_start(ap, fmt);
    if (vasprintf(&text, fmt, ap) < 0)
        abort();
    va_end(ap);
    __wrap_strbuf_add(b, text, strlen(text));
    __real_free(text);
}
WRAP(void, loop_post, struct loop *l, void (*fn)(void *), void *arg) {
    exempt++;
    __real_loop_post(l, fn, arg);
    exempt--;
}

/* ---------------------------------------------------------------- I/O */

#define ANY_IO (1u << FAULT_EIO | 1u << FAULT_EIO_ALL)
#define ROOM (ANY_IO | 1u << FAULT_ENOSPC)
#define MOVES(kinds) ((kinds) | 1u << FAULT_SHORT)

static int code(void) {
    return armed == FAULT_ENOSPC ? ENOSPC : EIO;
}

static bool shortens(void) {
    return armed == FAULT_SHORT;
}

/* The first part of a vector, half of its bytes. */
static int halve(const struct iovec *iov, int n, struct iovec *out) {
    size_t total = 0, want;
    int k = 0;
    for (int i = 0; i < n; i++)
        total += iov[i].iov_len;
    for (want = total > 1 ? total / 2 : total; want && k < n; k++) {
        out[k] = iov[k];
        if (out[k].iov_len > want)
            out[k].iov_len = want;
        want -= out[k].iov_len;
    }
    return k;
}

WRAP(ssize_t, loop_preadv_co, int fd, const struct iovec *iov, int n, uint64_t off,
     unsigned flags) {
    struct iovec part[IOV_MAX_STRATA];
    if (!strikes(MOVES(ANY_IO)))
        return __real_loop_preadv_co(fd, iov, n, off, flags);
    if (!shortens() || n > IOV_MAX_STRATA)
        return -code();
    return __real_loop_preadv_co(fd, part, halve(iov, n, part), off, flags);
}
WRAP(ssize_t, loop_pwritev_co, int fd, const struct iovec *iov, int n, uint64_t off,
     unsigned flags) {
    struct iovec part[IOV_MAX_STRATA];
    if (!strikes(MOVES(ROOM)))
        return __real_loop_pwritev_co(fd, iov, n, off, flags);
    if (!shortens() || n > IOV_MAX_STRATA)
        return -code();
    return __real_loop_pwritev_co(fd, part, halve(iov, n, part), off, flags);
}
WRAP(int, loop_fdatasync_co, int fd) {
    return strikes(ANY_IO) ? -code() : __real_loop_fdatasync_co(fd);
}
WRAP(int, loop_fallocate_co, int fd, int mode, uint64_t off, uint64_t len) {
    return strikes(ROOM) ? -code() : __real_loop_fallocate_co(fd, mode, off, len);
}
WRAP(int, ftruncate64, int fd, off64_t size) {
    return strikes(ROOM) ? (errno = code(), -1) : __real_ftruncate64(fd, size);
}
WRAP(int, fallocate64, int fd, int mode, off64_t off, off64_t len) {
    return strikes(ROOM) ? (errno = code(), -1) : __real_fallocate64(fd, mode, off, len);
}
WRAP(int, fsync, int fd) {
    return strikes(ANY_IO) ? (errno = code(), -1) : __real_fsync(fd);
}
WRAP(int, linkat, int from, const char *old, int to, const char *new, int flags) {
    return strikes(ROOM) ? (errno = code(), -1) : __real_linkat(from, old, to, new, flags);
}
WRAP(ssize_t, copy_file_range, int in, off64_t *in_off, int out, off64_t *out_off, size_t len,
     unsigned flags) {
    if (strikes(MOVES(ROOM))) {
        if (!shortens())
            return errno = code(), -1;
        len = len > 1 ? len / 2 : len;
    }
    return __real_copy_file_range(in, in_off, out, out_off, len, flags);
}
WRAP(ssize_t, pwrite64, int fd, const void *buf, size_t n, off64_t off) {
    if (strikes(MOVES(ROOM))) {
        if (!shortens())
            return errno = code(), -1;
        n = n > 1 ? n / 2 : n;
    }
    return __real_pwrite64(fd, buf, n, off);
}
