/* SPDX-License-Identifier: MIT */
#include "export/vhost/memory.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>
#include "base/ck.h"
#include "base/err.h"
#include "export/vhost/proto.h"

/* ---------------------------------------------------------------- pages that are gone */

#define WATCH_MAX 256

static struct watched {
    atomic_uintptr_t from, to;
    uintptr_t page; /* what can be replaced there: a huge page as a whole */
    atomic_bool broken;
} watched[WATCH_MAX];
static struct sigaction before;
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* Only mmap() and atomics: safe in a handler. */
static void on_bus_error(int signo, siginfo_t *info, void *context) {
    uintptr_t at = (uintptr_t)info->si_addr;
    int saved = errno;
    for (int i = 0; i < WATCH_MAX && info->si_code > 0; i++) { /* not one that somebody sent */
        if (at < atomic_load(&watched[i].from) || at >= atomic_load(&watched[i].to))
            continue;
        uintptr_t page = watched[i].page;
        atomic_store(&watched[i].broken, true);
        void *got = mmap((void *)(at & ~(page - 1)), page, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
        errno = saved;
        if (got != MAP_FAILED)
            return;
        break;
    }
    /* It comes again, to whom it belongs. */
    sigaction(SIGBUS, &before, NULL);
    if (info->si_code <= 0)
        raise(SIGBUS);
}

static void install(void) {
    struct sigaction s = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigemptyset(&s.sa_mask);
    sigaction(SIGBUS, &s, &before);
}

/* The unit in which the file's pages are mapped, for huge ones can only be replaced whole. */
static size_t page_of(int fd) {
    struct statfs fs;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    if (fstatfs(fd, &fs) == 0 && (unsigned long)fs.f_type == HUGETLBFS_MAGIC &&
        fs.f_bsize > (long)page)
        page = (size_t)fs.f_bsize;
    return page;
}

static int watch(void *map, size_t len, size_t page) {
    pthread_once(&once, install);
    for (int i = 0; i < WATCH_MAX; i++) {
        uintptr_t none = 0;
        /* `to` first gone, last set: the handler never sees half of a range. */
        if (!atomic_compare_exchange_strong(&watched[i].from, &none, (uintptr_t)map))
            continue;
        watched[i].page = page;
        atomic_store(&watched[i].broken, false);
        atomic_store(&watched[i].to, (uintptr_t)map + len);
        return i;
    }
    return -1;
}

static void unwatch(int i) {
    atomic_store(&watched[i].to, 0);
    atomic_store(&watched[i].from, 0);
}

int memory_map(int fd, uint64_t offset, size_t length, struct memory_map *out, struct err *e) {
    size_t page = page_of(fd);
    length = (size_t)align_up(length, page); /* munmap() wants whole pages, huge ones too */
    void *map =
        mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, (off_t)offset);
    if (map == MAP_FAILED)
        return err_errno(e, errno, "mapping shared memory");
    int place = watch(map, length, page);
    if (place < 0) {
        munmap(map, length);
        return err_set(e, ENOSPC, "too much shared memory in this process");
    }
    madvise(map, length, MADV_DONTDUMP);
    *out = (struct memory_map){map, length, place};
    return 0;
}

void memory_unmap(struct memory_map *m) {
    if (!m->at)
        return;
    unwatch(m->watch);
    munmap(m->at, m->length);
    m->at = NULL;
}

bool memory_is_broken(const struct memory *m) {
    for (unsigned i = 0; i < m->n; i++)
        if (atomic_load(&watched[m->v[i].map.watch].broken))
            return true;
    return false;
}

/* ---------------------------------------------------------------- regions */

int memory_add(struct memory *m, const struct vhost_region *r, int fd, struct err *e) {
    if (m->n == MEMORY_REGIONS_MAX)
        return err_set(e, ENOSPC, "more than %d memory regions", MEMORY_REGIONS_MAX);
    uint64_t end, length;
    if (!r->size || __builtin_add_overflow(r->guest, r->size, &end) ||
        __builtin_add_overflow(r->user, r->size, &end) ||
        __builtin_add_overflow(r->offset, r->size, &length) || length > SIZE_MAX / 2)
        return err_set(e, EINVAL,
                       "memory region of %" PRIu64 " bytes at %#" PRIx64 " is impossible", r->size,
                       r->guest);
    for (unsigned i = 0; i < m->n; i++)
        if (ranges_overlap(m->v[i].guest, m->v[i].size, r->guest, r->size))
            return err_set(e, EINVAL, "memory regions overlap at %#" PRIx64, r->guest);
    struct stat st;
    if (fstat(fd, &st) < 0)
        return err_errno(e, errno, "memory region");
    if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size < length)
        return err_set(e, EINVAL, "memory region of %" PRIu64 " bytes in a file of %" PRIu64,
                       length, (uint64_t)st.st_size);
    /* From the file's beginning: the offset need not be one that mmap takes (huge pages). */
    struct memory_map map;
    int rc = memory_map(fd, 0, (size_t)length, &map, e);
    if (rc < 0)
        return rc;
    m->v[m->n++] = (struct memory_region){.guest = r->guest,
                                          .size = r->size,
                                          .user = r->user,
                                          .bytes = (uint8_t *)map.at + r->offset,
                                          .map = map};
    return 0;
}

static void drop(struct memory *m, unsigned i) {
    memory_unmap(&m->v[i].map);
    m->v[i] = m->v[--m->n];
}

int memory_remove(struct memory *m, const struct vhost_region *r, struct err *e) {
    for (unsigned i = 0; i < m->n; i++)
        if (m->v[i].guest == r->guest && m->v[i].user == r->user && m->v[i].size == r->size) {
            drop(m, i);
            return 0;
        }
    return err_set(e, ENOENT, "no memory region of %" PRIu64 " bytes at %#" PRIx64, r->size,
                   r->guest);
}

void memory_clear(struct memory *m) {
    while (m->n)
        drop(m, m->n - 1);
}

int memory_guest(const struct memory *m, uint64_t addr, uint64_t len, struct iovec *out, int room) {
    int n = 0;
    while (len) {
        const struct memory_region *r = NULL;
        for (unsigned i = 0; i < m->n && !r; i++)
            if (addr - m->v[i].guest < m->v[i].size)
                r = &m->v[i];
        if (!r || n == room)
            return 0;
        uint64_t in = addr - r->guest, piece = min_u64(len, r->size - in);
        out[n++] = (struct iovec){r->bytes + in, (size_t)piece};
        addr += piece;
        len -= piece;
    }
    return n;
}

void *memory_user(const struct memory *m, uint64_t addr, uint64_t len, unsigned align) {
    for (unsigned i = 0; i < m->n; i++) {
        uint64_t in = addr - m->v[i].user;
        if (in < m->v[i].size && len <= m->v[i].size - in)
            return (uintptr_t)(m->v[i].bytes + in) % align ? NULL : m->v[i].bytes + in;
    }
    return NULL;
}
