/* SPDX-License-Identifier: MIT */
/*
 * The drivers "file" and "host_device": bytes in a regular file or on a block device.
 *
 * See file.h for the parts and their invariants.  This part opens, locks, reads, writes, flushes
 * and changes between read-only and read-write.
 *
 * Deliberately not here: alignment of O_DIRECT requests (the engine bounces to request_align) and
 * writethrough (the engine sends IO_FUA).
 *
 * Facts: open(2) on FIFOs and O_NONBLOCK; statx(2) STATX_DIOALIGN; an O_NONBLOCK regular file makes
 * io_uring answer -EAGAIN instead of waiting, hence the flag goes after open; fdatasync(2), NOTES
 * on errors: after a failure the pages count as clean, so a later success proves nothing.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "base/iov.h"
#include "runtime/loop.h"
#include "storage/file.h"

/* The largest O_DIRECT alignment that is believed: more is a device that we do not understand. */
#define DIRECT_ALIGN_MAX (64 * KIB)

const char *file_path(const char *name) {
    return strncmp(name, "file:", 5) ? name : name + 5;
}

static int file_parse_name(const char *name, json_t *tree, struct err *e) {
    const char *path = !strncmp(name, "host_device:", 12)  ? name + 12
                       : !strncmp(name, "host_cdrom:", 11) ? name + 11
                                                           : file_path(name);
    if (!*path)
        return err_set(e, EINVAL, "the file name is empty");
    json_t *value = json_string_nocheck(path);
    if (!value)
        return err_set(e, EINVAL, "the file name is not valid UTF-8");
    return json_object_set_new(tree, "filename", value) ? err_set(e, ENOMEM, "out of memory") : 0;
}

/* ------------------------------------------------------------------ open */

int file_check_type(const struct stat *st, bool *is_block, struct err *e) {
    *is_block = S_ISBLK(st->st_mode);
    if (S_ISREG(st->st_mode) || S_ISBLK(st->st_mode))
        return 0;
    if (S_ISDIR(st->st_mode))
        return err_set(e, EISDIR, "is a directory, not a disk image");
    const char *kind = S_ISFIFO(st->st_mode)   ? "a FIFO"
                       : S_ISSOCK(st->st_mode) ? "a socket"
                       : S_ISCHR(st->st_mode)  ? "a character device"
                                               : "neither a file nor a device";
    return err_set(e, EINVAL, "is %s, which cannot hold a disk (regular file or block device)",
                   kind);
}

int file_no_direct(struct err *e) {
    int r = err_set(e, EINVAL, "the file system does not support O_DIRECT");
    err_hint(e, "choose a cache mode other than none and directsync");
    return r;
}

int file_open_path(const char *path, int flags, struct stat *st, struct err *e) {
    bool is_block;
    /* Looked at first: opening alone can rewind a tape or arm a watchdog. */
    if (!stat(path, st)) {
        if (S_ISDIR(st->st_mode) && flags & O_RDWR && !(flags & O_CREAT))
            return err_set(e, EISDIR, "is a directory, not a disk image to open for writing");
        int r = file_check_type(st, &is_block, e);
        if (r)
            return r;
    } else if (errno != ENOENT || !(flags & O_CREAT)) {
        return err_errno(e, errno, "cannot open");
    }
    int fd AUTO_FD = -1;
    do
        fd = open(path, flags | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0644);
    while (fd < 0 && errno == EINTR);
    if (fd < 0) {
        int code = errno;
        if (code == EINVAL && (flags & O_DIRECT))
            return file_no_direct(e);
        return err_errno(e, code, "cannot open%s",
                         (flags & O_ACCMODE) == O_RDWR && code != ENOENT ? " for writing" : "");
    }
    if (fstat(fd, st))
        return err_errno(e, errno, "cannot stat");
    int r = file_check_type(st, &is_block, e);
    if (r)
        return r;
    int fl = fcntl(fd, F_GETFL);
    if (fl < 0 || fcntl(fd, F_SETFL, fl & ~O_NONBLOCK) < 0)
        return err_errno(e, errno, "cannot set blocking mode");
    return steal_fd(&fd);
}

/* Does a direct read with this alignment of memory, offset and length pass? */
static bool direct_read_works(int fd, uint8_t *page, size_t align) {
    ssize_t r;
    do
        r = pread(fd, page + align, align, 0);
    while (r < 0 && errno == EINTR);
    return r >= 0;
}

static uint32_t direct_align(int fd, bool is_block) {
#ifdef STATX_DIOALIGN
    struct statx sx;
    if (!statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &sx) && (sx.stx_mask & STATX_DIOALIGN)) {
        uint64_t align = max_u64(sx.stx_dio_mem_align, sx.stx_dio_offset_align);
        /* Zero means "no direct I/O here", yet open took O_DIRECT: such a file system copies. */
        if (align && is_pow2(align) && align <= DIRECT_ALIGN_MAX)
            return (uint32_t)max_u64(align, 512);
    }
#endif
    int sector;
    if (is_block && !ioctl(fd, BLKSSZGET, &sector) && sector >= 512 && is_pow2((uint64_t)sector) &&
        (uint64_t)sector <= DIRECT_ALIGN_MAX)
        return (uint32_t)sector;
    /* An empty file lets everything pass; 4096 is right for all that is known. */
    struct stat st;
    uint8_t *page AUTO_FREE = aligned_alloc(4096, 8192);
    if (page && !fstat(fd, &st) && st.st_size > 0 && direct_read_works(fd, page, 512))
        return 512;
    return 4096;
}

/* File systems that have reflinks, or may have them on the other side. */
static bool may_share_blocks(int fd) {
    struct statfs fs;
    if (fstatfs(fd, &fs))
        return false;
    switch ((uint32_t)fs.f_type) {
    case XFS_SUPER_MAGIC:
    case BTRFS_SUPER_MAGIC:
    case OCFS2_SUPER_MAGIC:
    case NFS_SUPER_MAGIC:
    case OVERLAYFS_SUPER_MAGIC:
    case 0xca451a4e: /* bcachefs */
    case 0x2fc12fc1: /* ZFS */
    case 0xff534d42: /* CIFS */
    case 0xfe534d42: /* SMB2 */
        return true;
    }
    return false;
}

static bool lies_in_memory(int fd) {
    struct statfs fs;
    return !fstatfs(fd, &fs) && (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC);
}

int file_adopt(struct node *n, const struct stat *st, struct err *e) {
    struct file_state *s = file_state(n);
    s->is_block = S_ISBLK(st->st_mode) || s->is_device;
    s->data_at = UINT64_MAX;
    uint64_t size = (uint64_t)st->st_size;
    if (s->is_block && ioctl(s->fd, BLKGETSIZE64, &size)) {
        off_t end = lseek(s->fd, 0, SEEK_END);
        if (end < 0)
            return err_errno(e, errno, "cannot find the size of the device");
        size = (uint64_t)end;
    }
    if (size > INT64_MAX)
        return err_set(e, EFBIG, "size %" PRIu64 " is beyond the largest possible", size);
    n->size = size;
    n->granularity = 1;
    bool in_memory = !s->is_block && lies_in_memory(s->fd);
    if (in_memory && n->flags & NODE_DIRECT) {
        /* There is nothing to go to directly: such a descriptor copies just as others do, but would
         * be taken for one whose requests wait in the kernel. */
        int flags = fcntl(s->fd, F_GETFL);
        if (flags >= 0 && !fcntl(s->fd, F_SETFL, flags & ~O_DIRECT))
            n->flags &= ~(unsigned)NODE_DIRECT;
    }
    n->request_align = n->flags & NODE_DIRECT ? direct_align(s->fd, s->is_block) : 1;
    n->storage_flags = s->is_block ? 0 : STORAGE_ZERO_INIT;
    n->storage_flags |= in_memory ? STORAGE_IN_MEMORY : 0;
    if (!s->is_block && may_share_blocks(s->fd))
        n->storage_flags |= STORAGE_SHARES;
    return 0;
}

#define LOCK_PAUSE_NS INT64_C(10000000)
#define LOCK_TRIES 50 /* half a second */

int file_take_locks(struct node *n, struct err *e) {
    struct file_state *s = file_state(n);
    const struct file_opts *o = n->opts;
    int locking = o ? o->locking : LOCKING_AUTO;
    if (locking == LOCKING_OFF || (n->flags & NODE_NO_LOCK))
        return 0;
    struct err why AUTO_ERR = ERR_INIT;
    bool force = n->flags & NODE_FORCE_SHARE;
    unsigned perm = force ? PERM_CONSISTENT_READ : n->perm;
    unsigned shared = force ? PERM_ALL : n->shared;
    int r = file_lock_take(s->fd, &s->lock, perm, shared, &why);
    /* The kernel ends the last requests of a killed process, and with them its locks, a moment
     * after the process is gone: whoever starts in its place waits that long. */
    for (int i = 0; r == -EAGAIN && s->lock.nobody && i < LOCK_TRIES; i++) {
        loop_sleep_co(LOCK_PAUSE_NS);
        r = file_lock_take(s->fd, &s->lock, perm, shared, &why);
    }
    if (r < 0 && locking == LOCKING_AUTO && file_lock_unsupported(-r))
        return 0;
    if (r < 0)
        err_move(e, &why);
    return r;
}

static int file_open_flags(unsigned node_flags) {
    return (node_flags & NODE_RW ? O_RDWR : O_RDONLY) | (node_flags & NODE_DIRECT ? O_DIRECT : 0);
}

static int file_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct file_state *s = file_state(n);
    const struct file_opts *o = n->opts;
    struct stat st;
    if (!o->filename || !*o->filename)
        return err_set(e, EINVAL, "the option filename is missing");
    if ((n->flags & NODE_FORCE_SHARE) && node_is_rw(n))
        return err_set(e, EINVAL, "force-share works only with read-only");
    int fd = file_open_path(o->filename, file_open_flags(n->flags), &st, e);
    if (fd < 0)
        return fd;
    s->fd = fd;
    s->opened = true;
    int r = file_take_locks(n, e);
    return r ? r : file_adopt(n, &st, e);
}

/* Whoever names this driver says that it is a device: character devices too, then. */
static int host_device_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct file_state *s = file_state(n);
    const struct file_opts *o = n->opts;
    struct stat st;
    if (!o->filename || !*o->filename)
        return err_set(e, EINVAL, "the option filename is missing");
    if (stat(o->filename, &st))
        return err_errno(e, errno, "cannot open");
    if (S_ISBLK(st.st_mode))
        return file_open_co(n, ctx, e);
    if (S_ISDIR(st.st_mode) && node_is_rw(n))
        return err_errno(e, EISDIR, "cannot open for writing");
    if (!S_ISCHR(st.st_mode))
        return err_set(e, EINVAL, "is not a device, as the driver '%s' wants", n->drv->name);
    int fd = open(o->filename, file_open_flags(n->flags) | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0)
        return err_errno(e, errno, "cannot open");
    s->fd = fd;
    s->opened = s->is_device = true;
    int fl = fcntl(fd, F_GETFL);
    if (fstat(fd, &st) || fl < 0 || fcntl(fd, F_SETFL, fl & ~O_NONBLOCK) < 0)
        return err_errno(e, errno, "cannot open");
    if (!S_ISCHR(st.st_mode))
        return err_set(e, EINVAL, "has become something else than a device");
    int r = file_take_locks(n, e);
    return r ? r : file_adopt(n, &st, e);
}

static void file_drop_plain(struct file_state *s) {
    if (s->plain_fd)
        close(s->plain_fd - 1);
    s->plain_fd = 0;
}

static void file_close_co(struct node *n) {
    struct file_state *s = file_state(n);
    if (s->opened) {
        file_trim(n);
        if (s->temp_path)
            unlink(s->temp_path);
        /* By hand: a worker of the kernel may hold the file for a moment after it reported the last
         * request done, and the locks would stay as long. */
        file_lock_trim(s->fd, &s->lock, 0, PERM_ALL);
        file_drop_plain(s);
        close(s->fd);
        s->opened = false;
    }
    free(s->temp_path);
    s->temp_path = NULL;
}

/* ---------------------------------------------------------------- reopen */

/*
 * A second description of the same file: by the descriptor, so that it works for unnamed and
 * renamed files; by path where /proc is not mounted, if that is still the same file.
 */
static int file_open_again(struct node *n, unsigned new_flags, struct err *e) {
    struct file_state *s = file_state(n);
    const struct file_opts *o = n->opts;
    char self[32];
    struct stat was, now;
    snprintf(self, sizeof(self), "/proc/self/fd/%d", s->fd);
    if (fstat(s->fd, &was))
        return err_errno(e, errno, "cannot stat");
    const char *path = access(self, F_OK) && o && o->filename ? o->filename : self;
    int fd AUTO_FD = file_open_path(path, file_open_flags(new_flags), &now, e);
    if (fd < 0)
        return fd;
    if (was.st_dev != now.st_dev || was.st_ino != now.st_ino)
        return err_set(e, ESTALE, "another file has taken the name since it was opened");
    return steal_fd(&fd);
}

/* `fd` holds the same locks.  Those of the old description go by hand, as in close. */
static int file_replace_fd(struct file_state *s, int fd, struct err *e) {
    struct file_lock old = s->lock;
    file_lock_trim(s->fd, &old, 0, PERM_ALL);
    if (dup3(fd, s->fd, O_CLOEXEC) >= 0) {
        file_drop_plain(s);
        return 0;
    }
    int code = errno;
    file_lock_copy(s->fd, &s->lock);
    return err_errno(e, code, "cannot take over the descriptor");
}

/*
 * n->perm and n->shared are the wanted ones already.  New bytes are taken and checked on the old
 * description (a check from the new one would find the old one's), copied to the new description,
 * and go from the old one when dup3 replaces it.  The descriptor keeps its number.
 */
static int file_reopen_co(struct node *n, unsigned new_flags, struct err *e) {
    struct file_state *s = file_state(n);
    struct file_lock before = s->lock;
    int r = file_take_locks(n, e);
    if (r)
        return r;
    if ((new_flags ^ (unsigned)n->flags) & NODE_RW ||
        (fcntl(s->fd, F_GETFL) & O_ACCMODE) != (new_flags & NODE_RW ? O_RDWR : O_RDONLY)) {
        int fd AUTO_FD = file_open_again(n, new_flags, e);
        r = fd < 0 ? fd : file_lock_copy(fd, &s->lock);
        if (r < 0 && fd >= 0)
            err_errno(e, -r, "cannot lock the file anew");
        if (!r)
            r = file_replace_fd(s, fd, e);
        if (r) {
            file_lock_trim(s->fd, &s->lock, before.perm, PERM_ALL & ~before.unshared);
            return r;
        }
    }
    if (s->lock.perm | s->lock.unshared)
        file_lock_trim(s->fd, &s->lock, n->perm, n->shared);
    return 0;
}

/* ------------------------------------------------------------ read, write */

/* The rest of a read that came short after `done` bytes: more, or zeros behind the end. */
static __attribute__((noinline)) int pread_rest_co(struct node *n, uint64_t offset, uint64_t length,
                                                   const struct iovec *iov, int niov,
                                                   unsigned flags, uint64_t done) {
    struct iovec part[IOV_MAX_STRATA];
    while (done < length) {
        /* A direct read ends off its alignment only at the end of the file. */
        if (!is_aligned(done, n->request_align)) {
            iov_zero(iov, niov, done, length - done);
            return 0;
        }
        int k = iov_slice(iov, niov, done, length - done, part);
        ssize_t r = loop_preadv_co(file_state(n)->fd, part, k, offset + done, flags);
        if (r < 0)
            return (int)r;
        if (r == 0) {
            iov_zero(iov, niov, done, length - done);
            return 0;
        }
        done += (uint64_t)r;
    }
    return 0;
}

static int file_preadv_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                          int niov, unsigned flags) {
    unsigned lf = flags & IO_BULK ? LOOP_BULK : 0;
    ssize_t r = loop_preadv_co(file_state(n)->fd, iov, niov, offset, lf);
    if (r < 0)
        return (int)r;
    if ((uint64_t)r == length)
        return 0;
    if (r == 0) {
        iov_zero(iov, niov, 0, length);
        return 0;
    }
    return pread_rest_co(n, offset, length, iov, niov, lf, (uint64_t)r);
}

static __attribute__((noinline)) int pwrite_rest_co(int fd, uint32_t align, uint64_t offset,
                                                    uint64_t length, const struct iovec *iov,
                                                    int niov, unsigned flags, uint64_t done) {
    struct iovec part[IOV_MAX_STRATA];
    while (done < length) {
        /* A short direct write may end anywhere; go on where it may begin. */
        uint64_t from = align_down(done, align);
        int k = iov_slice(iov, niov, from, length - from, part);
        ssize_t r = loop_pwritev_co(fd, part, k, offset + from, flags);
        if (r < 0)
            return (int)r;
        if (from + (uint64_t)r <= done)
            return -ENOSPC; /* no progress: what a full device without an error looks like */
        done = from + (uint64_t)r;
    }
    return 0;
}

/*
 * The engine cuts a direct write at an odd end of the file rather than make the file longer.  Such
 * a piece goes through the page cache, by a descriptor of its own; direct reads see it, for the
 * kernel writes back what they touch first.
 */
static int file_plain_fd(struct node *n) {
    struct file_state *s = file_state(n);
    if (!s->plain_fd) {
        int fd = file_open_again(n, n->flags & ~(unsigned)NODE_DIRECT, NULL);
        if (fd < 0)
            return fd;
        s->plain_fd = fd + 1;
    }
    return s->plain_fd - 1;
}

static int file_pwrite_all_co(struct node *n, uint64_t offset, uint64_t length,
                              const struct iovec *iov, int niov, unsigned flags) {
    unsigned lf = (flags & IO_BULK ? LOOP_BULK : 0) |
                  (flags & IO_FUA && !(n->flags & NODE_NO_FLUSH) ? LOOP_DSYNC : 0);
    int fd = file_state(n)->fd;
    uint32_t align = n->request_align;
    if (!is_aligned(length, align)) {
        align = 1;
        fd = file_plain_fd(n);
        if (fd < 0)
            return fd;
    }
    ssize_t r = loop_pwritev_co(fd, iov, niov, offset, lf);
    if (r < 0)
        return (int)r;
    if ((uint64_t)r == length)
        return 0;
    return pwrite_rest_co(fd, align, offset, length, iov, niov, lf, (uint64_t)r);
}

/* After a write to `end` that failed: how far behind the old end may it have got? */
static void file_refresh_size(struct node *n, uint64_t end) {
    struct stat st;
    if (!file_state(n)->is_block && !fstat(file_state(n)->fd, &st))
        n->size = max_u64(n->size, min_u64(end, (uint64_t)st.st_size));
}

static int file_pwritev_co(struct node *n, uint64_t offset, uint64_t length,
                           const struct iovec *iov, int niov, unsigned flags) {
    uint64_t end = offset + length;
    if (end > n->size) {
        int r = file_grow_co(n, offset, end);
        if (r)
            return r;
    }
    int r = file_pwrite_all_co(n, offset, length, iov, niov, flags);
    file_run_drop(n, offset, length);
    if (r)
        file_refresh_size(n, end);
    else if (end > n->size)
        n->size = end;
    return r;
}

int file_flush_co(struct node *n) {
    struct file_state *s = file_state(n);
    if (n->flags & NODE_NO_FLUSH)
        return 0;
    if (s->flush_error)
        return s->flush_error;
    int r = loop_fdatasync_co(s->fd);
    if (r < 0)
        s->flush_error = r;
    return r;
}

static int writeback_worker(void *arg) {
    return sync_file_range(*(int *)arg, 0, 0, SYNC_FILE_RANGE_WRITE);
}

static void file_writeback_co(struct node *n) {
    int fd = file_state(n)->fd;
    offload_blocking_co(writeback_worker, &fd); /* waits where the device's queue is full */
}

/* ----------------------------------------------------------------- driver */

static const char *const locking_names[] = {"auto", "on", "off", NULL};

static const struct opt file_open_opts[] = {
    OPT_STR(struct file_opts, filename, "filename", OPT_OPEN, "path of the file or block device"),
    OPT_ENUM(struct file_opts, locking, "locking", OPT_OPEN, LOCKING_AUTO, locking_names,
             "keep other programs out by QEMU's byte-range locks; auto: where the file system can"),
    OPT_END,
};

static const struct storage_ops file_storage = {
    .preadv_co = file_preadv_co,
    .pwritev_co = file_pwritev_co,
    .zero_co = file_zero_co,
    .discard_co = file_discard_co,
    .flush_co = file_flush_co,
    .writeback_co = file_writeback_co,
    .truncate_co = file_truncate_co,
    .extents_co = file_extents_co,
    .allocated = file_allocated,
    .copy_range_co = file_copy_range_co,
    .create_co = file_create_co,
    .link_co = file_link_co,
    .tune_new = file_tune_new,
};

static const char *const file_prefixes[] = {"file:", NULL};
static const char *const host_device_prefixes[] = {"host_device:", NULL};
static const char *const host_cdrom_prefixes[] = {"host_cdrom:", NULL};

const struct driver driver_file = {
    .name = "file",
    .kind = DRIVER_STORAGE,
    .help = "a regular file or block device of this machine",
    .prefixes = file_prefixes,
    .state_size = sizeof(struct file_state),
    .opts = file_open_opts,
    .opts_size = sizeof(struct file_opts),
    .parse_name = file_parse_name,
    .open_co = file_open_co,
    .close_co = file_close_co,
    .reopen_co = file_reopen_co,
    .storage = &file_storage,
};

const struct driver driver_host_device = {
    .name = "host_device",
    .kind = DRIVER_STORAGE,
    .help = "a block or character device of this machine; regular files are refused",
    .prefixes = host_device_prefixes,
    .state_size = sizeof(struct file_state),
    .opts = file_open_opts,
    .opts_size = sizeof(struct file_opts),
    .parse_name = file_parse_name,
    .open_co = host_device_open_co,
    .close_co = file_close_co,
    .reopen_co = file_reopen_co,
    .storage = &file_storage,
};

/* A drive with a medium in it: what a device of this machine is.  Nothing ejects. */
const struct driver driver_host_cdrom = {
    .name = "host_cdrom",
    .kind = DRIVER_STORAGE,
    .help = "a CD drive of this machine, with a medium in it",
    .prefixes = host_cdrom_prefixes,
    .state_size = sizeof(struct file_state),
    .opts = file_open_opts,
    .opts_size = sizeof(struct file_opts),
    .parse_name = file_parse_name,
    .open_co = host_device_open_co,
    .close_co = file_close_co,
    .reopen_co = file_reopen_co,
    .storage = &file_storage,
};
