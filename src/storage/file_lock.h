/* SPDX-License-Identifier: MIT */
/*
 * Locks that keep strata, QEMU and other programs of the same scheme out of each other's disks.
 *
 * The scheme is QEMU's: one byte per permission, held with shared (read) open-file-description
 * locks, so that any number of holders coexist and the *meaning* of a byte makes the conflict:
 *
 *      100 + bit   the holder uses the permission (enum perm)
 *      200 + bit   the holder does not let others use it
 *
 * To take a set: add its bytes, then ask (F_OFD_GETLK for a write lock, which takes nothing)
 * whether anybody holds a byte that contradicts it, then drop what is no longer wanted.  Taking
 * before checking closes the race of two openers: both may fail, never both succeed.  The locks
 * belong to the open file description, so a second node on the same file in this process conflicts
 * too, as it must.
 *
 * Sources: qemu block/file-posix.c (byte numbers, observed), fcntl(2), proc(5) for the holders.
 * Nothing here suspends.
 */
#ifndef STRATA_STORAGE_FILE_LOCK_H
#define STRATA_STORAGE_FILE_LOCK_H

#include <stdbool.h>

struct err;

/* What one open file description holds now; all zero: nothing. */
struct file_lock {
    unsigned perm, unshared;
    bool nobody; /* the last refusal: somebody holds it, but no process that we can see */
};

/*
 * Adds the bytes for `perm` and for what is not in `shared`, and checks them against everybody
 * else's.  On success `held` is the union of old and new; on failure nothing has changed.
 * -EAGAIN: in use, the text names the holders; -ENOLCK, -EINVAL, -ENOSYS, -EOPNOTSUPP ...: the file
 * system does not lock (text set too).
 */
int file_lock_take(int fd, struct file_lock *held, unsigned perm, unsigned shared, struct err *e);
/* Gives back what is held beyond the named set. */
void file_lock_trim(int fd, struct file_lock *held, unsigned perm, unsigned shared);
/* Puts the bytes of `held`, which another description of the same file holds and has checked, on
 * `fd` as well.  0 or -errno, then without any byte. */
int file_lock_copy(int fd, const struct file_lock *held);
/* True when `code` (positive errno) says that the file system cannot lock, not that it is locked.
 */
bool file_lock_unsupported(int code);

/*
 * Who stands in the way of somebody that wants `perm` and refuses `unshared` on the file behind
 * `fd`: "process 812 (qemu-system-x86, read-write)", up to three, joined by "and".  Owned; NULL
 * when nobody that we may look at is found.
 */
char *file_lock_holders(int fd, unsigned perm, unsigned unshared);

#endif
