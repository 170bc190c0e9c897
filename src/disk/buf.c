/* SPDX-License-Identifier: MIT */
/*
 * Page-aligned data buffers with a small cache of free ones.
 *
 * A large malloc is an mmap and a page fault for every page; requests come at hundreds of thousands
 * a second.  So each size class (powers of two, 4 KiB to 2 MiB) keeps a few free buffers, at most
 * CLASS_BYTES_MAX of each, behind one mutex (any thread may call; held for a few instructions).
 */
#include <pthread.h>
#include <stdlib.h>

#include "base/bytes.h"
#include "disk/io.h"

#define CLASS_MIN_BITS 12
#define CLASS_MAX_BITS 21
#define CLASS_BYTES_MAX (4 * MIB)

/* A free buffer's first word links to the next. */
struct free_buf {
    struct free_buf *next;
};

static struct {
    pthread_mutex_t lock;
    struct free_buf *free[CLASS_MAX_BITS - CLASS_MIN_BITS + 1];
    size_t bytes[CLASS_MAX_BITS - CLASS_MIN_BITS + 1];
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER};

static int class_of(size_t len) {
    int bits = CLASS_MIN_BITS;
    while (((size_t)1 << bits) < len)
        bits++;
    return bits;
}

/* Under AddressSanitizer every buffer is its own allocation, or misuse would go unseen. */
#ifdef __SANITIZE_ADDRESS__
#define POOLING 0
#else
#define POOLING 1
#endif

void *buf_get(size_t len) {
    int bits = class_of(len);
    if (POOLING && bits <= CLASS_MAX_BITS) {
        int c = bits - CLASS_MIN_BITS;
        pthread_mutex_lock(&pool.lock);
        struct free_buf *b = pool.free[c];
        if (b) {
            pool.free[c] = b->next;
            pool.bytes[c] -= (size_t)1 << bits;
        }
        pthread_mutex_unlock(&pool.lock);
        if (b)
            return b;
    }
    void *p;
    return posix_memalign(&p, 4096, (size_t)1 << bits) ? NULL : p;
}

void buf_put(void *buf, size_t len) {
    if (!buf)
        return;
    int bits = class_of(len), c = bits - CLASS_MIN_BITS;
    if (POOLING && bits <= CLASS_MAX_BITS) {
        pthread_mutex_lock(&pool.lock);
        if (pool.bytes[c] + ((size_t)1 << bits) <= CLASS_BYTES_MAX) {
            struct free_buf *b = buf;
            b->next = pool.free[c];
            pool.free[c] = b;
            pool.bytes[c] += (size_t)1 << bits;
            buf = NULL;
        }
        pthread_mutex_unlock(&pool.lock);
    }
    free(buf);
}

/* The pool's buffers count as leaked for a leak checker unless they go with the process. */
__attribute__((destructor)) static void buf_pool_free(void) {
    for (int c = 0; c <= CLASS_MAX_BITS - CLASS_MIN_BITS; c++) {
        while (pool.free[c]) {
            struct free_buf *b = pool.free[c];
            pool.free[c] = b->next;
            free(b);
        }
    }
}
