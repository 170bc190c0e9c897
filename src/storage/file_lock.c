/* SPDX-License-Identifier: MIT */
/* See file_lock.h for the scheme. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include "base/cleanup.h"
#include "base/err.h"
#include "disk/node.h"
#include "storage/file_lock.h"

enum { LOCK_USED_BASE = 100, LOCK_UNSHARED_BASE = 200, PERM_BITS = 4 };

static int lock_call(int fd, int cmd, short type, int byte, struct flock *fl) {
    *fl = (struct flock){.l_type = type, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
    int r;
    do
        r = fcntl(fd, cmd, fl);
    while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : 0;
}

/* Sets all bytes base + bit for the bits of `mask` to `type`.  Stops at the first failure. */
static int lock_mask(int fd, int base, unsigned mask, short type) {
    struct flock fl;
    for (int bit = 0; bit < PERM_BITS; bit++) {
        if (!(mask & 1u << bit))
            continue;
        int r = lock_call(fd, F_OFD_SETLK, type, base + bit, &fl);
        if (r < 0)
            return r;
    }
    return 0;
}

/* 0: nobody holds any byte base + bit for the bits of `mask`; -EAGAIN: somebody does. */
static int test_mask(int fd, int base, unsigned mask) {
    struct flock fl;
    for (int bit = 0; bit < PERM_BITS; bit++) {
        if (!(mask & 1u << bit))
            continue;
        int r = lock_call(fd, F_OFD_GETLK, F_WRLCK, base + bit, &fl);
        if (r < 0)
            return r;
        if (fl.l_type != F_UNLCK)
            return -EAGAIN;
    }
    return 0;
}

bool file_lock_unsupported(int code) {
    return code == ENOLCK || code == EINVAL || code == ENOSYS || code == EOPNOTSUPP ||
           code == ENOTTY;
}

static int lock_conflict(int fd, unsigned perm, unsigned unshared, bool *nobody, struct err *e) {
    char *who AUTO_FREE = e ? file_lock_holders(fd, perm, unshared) : NULL;
    *nobody = !who;
    int r = err_set(e, EAGAIN, "file is in use by %s", who ? who : "another process");
    if (perm & (PERM_WRITE | PERM_RESIZE))
        err_hint(e, "stop the other user first: two writers would destroy the disk");
    else
        err_hint(e, "stop the other user first, or read what is there now with -U (--force-share)");
    return r;
}

int file_lock_take(int fd, struct file_lock *held, unsigned perm, unsigned shared, struct err *e) {
    unsigned unshared = PERM_ALL & ~shared;
    unsigned add_perm = perm & ~held->perm, add_unshared = unshared & ~held->unshared;

    int r = lock_mask(fd, LOCK_USED_BASE, add_perm, F_RDLCK);
    if (!r)
        r = lock_mask(fd, LOCK_UNSHARED_BASE, add_unshared, F_RDLCK);
    if (!r)
        r = test_mask(fd, LOCK_UNSHARED_BASE, perm);
    if (!r)
        r = test_mask(fd, LOCK_USED_BASE, unshared);
    if (!r) {
        held->perm |= perm;
        held->unshared |= unshared;
        return 0;
    }
    /* Unlocking a byte that was never reached is harmless. */
    lock_mask(fd, LOCK_USED_BASE, add_perm, F_UNLCK);
    lock_mask(fd, LOCK_UNSHARED_BASE, add_unshared, F_UNLCK);
    if (r == -EAGAIN || r == -EACCES)
        return lock_conflict(fd, perm, unshared, &held->nobody, e);
    return err_errno(e, -r, "the file system cannot lock the file");
}

void file_lock_trim(int fd, struct file_lock *held, unsigned perm, unsigned shared) {
    unsigned unshared = PERM_ALL & ~shared;
    lock_mask(fd, LOCK_USED_BASE, held->perm & ~perm, F_UNLCK);
    lock_mask(fd, LOCK_UNSHARED_BASE, held->unshared & ~unshared, F_UNLCK);
    held->perm &= perm;
    held->unshared &= unshared;
}

int file_lock_copy(int fd, const struct file_lock *held) {
    int r = lock_mask(fd, LOCK_USED_BASE, held->perm, F_RDLCK);
    if (!r)
        r = lock_mask(fd, LOCK_UNSHARED_BASE, held->unshared, F_RDLCK);
    if (r < 0) {
        lock_mask(fd, LOCK_USED_BASE, held->perm, F_UNLCK);
        lock_mask(fd, LOCK_UNSHARED_BASE, held->unshared, F_UNLCK);
    }
    return r;
}
