/* SPDX-License-Identifier: MIT */
/*
 * Space in files: zeroing, discarding, asking for holes, resizing, allocating ahead, and copies
 * inside the kernel.
 *
 * Zeroing tries the cheapest call that keeps the promise and remembers what the file system
 * refused: with ZERO_MAY_UNMAP punch a hole, else FALLOC_FL_ZERO_RANGE, else punch and allocate
 * again; nothing of that: -ENOTSUP, and the engine writes zeros.  Behind the end of the file there
 * is nothing to zero: the file grows sparsely.
 *
 * Allocating ahead.  ext4 places blocks for appended page-cache data only at writeback, under one
 * lock and with a journal credit for each new size; in space that fallocate has allocated before,
 * the same append runs at memory speed (4 GiB: 0.6 s instead of 2.5 to 14 s).  So a file that
 * grows by writes in sequence gets the next step allocated behind its end with
 * FALLOC_FL_KEEP_SIZE: st_size stays true.  (A direct write that moves the end has the file to
 * itself; so a file without a name, which nobody else can look at, is made longer too: 1.4 s
 * instead of 1.7 to 2.1 s for 4 GiB.  Its true end is node->size, and is made so before the link.)
 * It begins after AHEAD_START appended bytes, steps
 * double up to AHEAD_STEP_MAX, and take at most an eighth of what is free, so that the write itself
 * meets the clean ENOSPC, on the last block.  What is unused goes back by ftruncate to the same
 * size (ext4 and XFS free blocks behind the end then).  Only for ext4: XFS allocates ahead by
 * itself, btrfs and ZFS copy on write, tmpfs would fill real memory.
 *
 * Facts: fallocate(2), lseek(2) SEEK_HOLE, ioctl_ficlonerange(2), copy_file_range(2).
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>
#include <sys/ioctl.h>
#include <sys/vfs.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "disk/open.h"
#include "runtime/loop.h"
#include "storage/file.h"

#define AHEAD_START (4 * MIB)
#define AHEAD_STEP_MIN MIB
#define AHEAD_STEP_MAX (256 * MIB)
/* Of a scratch file, whose users watch what it takes. */
#define AHEAD_STEP_SCRATCH (16 * MIB)
/* A write that begins this far behind the end is not an append: parallel writers stay below it. */
#define AHEAD_GAP_MAX (32 * MIB)

/* What a file system says that does not have the operation, or not for this kind of file. */
static bool unsupported(int r) {
    return r == -EOPNOTSUPP || r == -ENOSYS || r == -ENOTTY || r == -EINVAL || r == -ENODEV ||
           r == -EPERM;
}

void file_run_drop(struct node *n, uint64_t offset, uint64_t length) {
    struct file_state *s = file_state(n);
    if (s->run_kind != RUN_NONE && offset < s->run_end && s->run_start < offset + length)
        s->run_kind = RUN_NONE;
    if (s->data_at >= offset && s->data_at - offset < length)
        s->data_at = UINT64_MAX;
}

/* ------------------------------------------------------------ allocation */

/* Others that may resize the file would meet our blocks behind its end. */
static bool ahead_allowed(struct node *n) {
    struct file_state *s = file_state(n);
    struct statfs fs;
    if (!s->ahead_checked) {
        s->ahead_checked = true;
        s->ahead_off = s->is_block || (!s->unnamed && (n->shared & PERM_RESIZE)) ||
                       fstatfs(s->fd, &fs) || fs.f_type != EXT4_SUPER_MAGIC;
    }
    return !s->ahead_off;
}

/* At most this part of the free space is taken ahead: the rest of the disk needs some, too, and so
 * do holes further down in this file (tables of an image). */
#define AHEAD_FREE_SHARE 8

static uint64_t ahead_step(const struct file_state *s) {
    struct statfs fs;
    uint64_t step =
        s->ahead_step ? min_u64(s->ahead_step * 2, s->scratch ? AHEAD_STEP_SCRATCH : AHEAD_STEP_MAX)
                      : AHEAD_START;
    if (fstatfs(s->fd, &fs) || fs.f_bsize <= 0)
        return 0;
    return min_u64(step, (uint64_t)fs.f_bavail / AHEAD_FREE_SHARE * (uint64_t)fs.f_bsize);
}

static void file_ahead_co(struct node *n, uint64_t from, uint64_t end) {
    struct file_state *s = file_state(n);
    uint64_t step = ahead_step(s), to = end + step;
    if (s->size_limit)
        to = min_u64(to, s->size_limit);
    if (step < AHEAD_STEP_MIN || to <= from || to > INT64_MAX)
        return;
    s->ahead_busy = s->ahead_used = true;
    int r = loop_fallocate_co(s->fd, s->unnamed ? 0 : FALLOC_FL_KEEP_SIZE, from, to - from);
    s->ahead_busy = false;
    if (!r) {
        s->ahead_step = step;
        s->ahead_end = max_u64(s->ahead_end, to);
        return;
    }
    /*
     * No room after all (a quota), or no such call.  What was allocated in part behind the last
     * write that has begun goes back; at once, so that none begins meanwhile.  ext4 does not punch
     * behind the end of the file: there it stays until file_trim.
     */
    s->ahead_off = true;
    if (to > s->append_end)
        fallocate(s->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)s->append_end,
                  (off_t)(to - s->append_end));
}

int file_grow_co(struct node *n, uint64_t offset, uint64_t end) {
    struct file_state *s = file_state(n);
    if (s->size_limit && end > s->size_limit)
        return -ENOSPC;
    if (s->is_block)
        return -ENOSPC;
    uint64_t top = max_u64(n->size, s->append_end);
    if (offset > top && offset - top > AHEAD_GAP_MAX)
        s->appended = 0;
    else if (end > top)
        s->appended += end - top;
    s->append_end = max_u64(s->append_end, end);
    /* The next step is asked for when half of this one is used, so that other writers go on. */
    if (s->appended >= AHEAD_START && !s->ahead_busy &&
        s->append_end + s->ahead_step / 2 > s->ahead_end && ahead_allowed(n))
        file_ahead_co(n, max_u64(s->ahead_end, n->size), s->append_end);
    return 0;
}

int file_trim(struct node *n) {
    struct file_state *s = file_state(n);
    struct stat st;
    if (!s->ahead_used)
        return 0;
    if (fstat(s->fd, &st) || ftruncate(s->fd, s->unnamed ? (off_t)n->size : st.st_size))
        return -errno;
    s->ahead_used = false;
    s->ahead_end = s->ahead_step = s->appended = s->append_end = 0;
    return 0;
}

/* ---------------------------------------------------------- zero, discard */

static int punch_co(struct node *n, uint64_t offset, uint64_t length) {
    struct file_state *s = file_state(n);
    if (s->no_punch)
        return -ENOTSUP;
    int r = loop_fallocate_co(s->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
    /* On devices EINVAL means an unaligned range, which says nothing about the next one. */
    if (unsupported(r)) {
        s->no_punch = !s->is_block || r != -EINVAL;
        return -ENOTSUP;
    }
    return r;
}

static int zero_range_co(struct node *n, uint64_t offset, uint64_t length) {
    struct file_state *s = file_state(n);
    if (!s->no_zero_range) {
        int r =
            loop_fallocate_co(s->fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length);
        if (!unsupported(r))
            return r;
        s->no_zero_range = !s->is_block || r != -EINVAL;
    }
    if (s->is_block || s->no_fallocate)
        return -ENOTSUP;
    int r = punch_co(n, offset, length);
    if (r)
        return r;
    r = loop_fallocate_co(s->fd, FALLOC_FL_KEEP_SIZE, offset, length);
    if (unsupported(r)) {
        s->no_fallocate = true;
        return -ENOTSUP;
    }
    return r;
}

struct truncate_work {
    int fd;
    uint64_t old_size, size;
    int prealloc;
};

static int truncate_work(void *arg) {
    const struct truncate_work *w = arg;
    int r;
    do
        r = ftruncate(w->fd, (off_t)w->size);
    while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : 0;
}

/*
 * Growth by a hole while writes may be in flight, whose ends only the kernel knows yet: ftruncate
 * could cut them off.  Allocating the last byte never makes a file shorter.
 */
static int grow_sparse_co(struct node *n, uint64_t end) {
    struct file_state *s = file_state(n);
    if (s->is_block)
        return -ENOSPC;
    int r = loop_fallocate_co(s->fd, 0, end - 1, 1);
    if (unsupported(r))
        return -ENOTSUP;
    if (!r)
        n->size = max_u64(n->size, end);
    return r;
}

int file_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    struct file_state *s = file_state(n);
    uint64_t end = offset + length, inside = n->size > offset ? min_u64(n->size, end) - offset : 0;
    int r = 0;
    if (s->size_limit && end > s->size_limit && end > n->size)
        return -ENOSPC;
    if (inside) {
        r = zero_flags & ZERO_MAY_UNMAP ? punch_co(n, offset, inside) : -ENOTSUP;
        if (r == -ENOTSUP)
            r = zero_range_co(n, offset, inside);
    }
    if (!r && end > n->size) /* it may have grown while we waited */
        r = grow_sparse_co(n, end);
    file_run_drop(n, offset, length);
    if (!r && (zero_flags & ZERO_FUA))
        r = file_flush_co(n);
    return r;
}

struct range_work {
    int fd;
    uint64_t range[2];
};

static int blkdiscard_work(void *arg) {
    struct range_work *w = arg;
    return ioctl(w->fd, BLKDISCARD, w->range) ? -errno : 0;
}

int file_discard_co(struct node *n, uint64_t offset, uint64_t length) {
    struct file_state *s = file_state(n);
    if (offset >= n->size || s->no_discard)
        return 0;
    length = min_u64(length, n->size - offset);
    int r;
    if (s->is_block) {
        struct range_work w = {.fd = s->fd, .range = {offset, length}};
        r = offload_blocking_co(blkdiscard_work, &w);
        if (r == -EINVAL)
            r = 0; /* not whole sectors: a hint that the device cannot take */
        else if (unsupported(r))
            s->no_discard = true, r = 0;
    } else {
        r = punch_co(n, offset, length);
        if (r == -ENOTSUP)
            r = 0;
    }
    file_run_drop(n, offset, length);
    return r;
}

/* ----------------------------------------------------------------- resize */

#define FULL_CHUNK ((size_t)MIB)

/* Worker thread: zeros in [old_size, size), which fallocate has made room for where it can. */
static int prealloc_full(const struct truncate_work *w) {
    void *zeros AUTO_FREE = aligned_alloc(4096, FULL_CHUNK);
    if (!zeros)
        return -ENOMEM;
    memset(zeros, 0, FULL_CHUNK);
    /* In multiples of 4096 for O_DIRECT: the rest of the old last block reads as zeros by itself,
     * and ftruncate cuts the new end to size afterwards. */
    for (uint64_t at = align_up(w->old_size, 4096); at < w->size;) {
        size_t len = (size_t)min_u64(FULL_CHUNK, align_up(w->size - at, 4096));
        ssize_t r = pwrite(w->fd, zeros, len, (off_t)at);
        if (r < 0 && errno == EINTR)
            continue;
        if (r <= 0)
            return r < 0 ? -errno : -ENOSPC;
        at += (uint64_t)r;
    }
    return 0;
}

static int prealloc_work(void *arg) {
    const struct truncate_work *w = arg;
    int r;
    do
        r = fallocate(w->fd, 0, (off_t)w->old_size, (off_t)(w->size - w->old_size));
    while (r < 0 && errno == EINTR);
    r = r < 0 ? -errno : 0;
    if (w->prealloc == PREALLOC_FULL || unsupported(r))
        r = r && !unsupported(r) ? r : prealloc_full(w);
    if (!r)
        r = truncate_work(arg); /* prealloc_full may have gone beyond by part of a page */
    if (r) {
        struct truncate_work undo = {.fd = w->fd, .size = w->old_size};
        truncate_work(&undo);
    }
    return r;
}

/* Only a help for whoever opens the file later, so a failure says nothing. */
static void write_first_block(int fd, uint64_t size) {
    static const uint8_t zeros[4096] __attribute__((aligned(4096)));
    ssize_t n = pwrite(fd, zeros, size < sizeof(zeros) ? 512 : sizeof(zeros), 0);
    (void)n;
}

int file_truncate_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    struct file_state *s = file_state(n);
    struct truncate_work w = {.fd = s->fd, .old_size = n->size, .size = size, .prealloc = prealloc};
    if (prealloc == PREALLOC_METADATA)
        return err_set(e, EINVAL, "preallocation=metadata does not apply to a plain file");
    if (s->is_block) {
        if (size <= n->size)
            return 0;
        return err_set(e, ENOSPC, "a device of %" PRIu64 " bytes cannot grow to %" PRIu64, n->size,
                       size);
    }
    if (s->size_limit && size > s->size_limit && size > n->size)
        return err_set(e, ENOSPC, "size %" PRIu64 " is beyond the limit of %" PRIu64 " bytes", size,
                       s->size_limit);
    bool grows = size > n->size;
    int r =
        offload_blocking_co(grows && prealloc != PREALLOC_OFF ? prealloc_work : truncate_work, &w);
    s->run_kind = RUN_NONE;
    s->data_at = UINT64_MAX;
    if (r)
        return err_errno(e, -r, "cannot resize from %" PRIu64 " to %" PRIu64 " bytes", n->size,
                         size);
    if (s->first_block && grows && !n->size && prealloc == PREALLOC_OFF)
        write_first_block(s->fd, size);
    if (!grows || s->unnamed) /* ftruncate has freed what was allocated ahead */
        s->ahead_end = s->appended = s->append_end = 0;
    n->size = size;
    return 0;
}

/* ------------------------------------------------------------------ holes */

/*
 * Asks the kernel which run `offset` lies in.  One lseek for each run on a walk: where SEEK_DATA
 * ended, data is known to begin.
 */
static int find_run(struct node *n, uint64_t offset) {
    struct file_state *s = file_state(n);
    s->run_kind = RUN_NONE;
    s->run_start = offset;
    if (s->data_at != offset) {
        off_t data = lseek(s->fd, (off_t)offset, SEEK_DATA);
        if (data < 0 && errno != ENXIO)
            return -errno;
        if (data < 0 || (uint64_t)data > offset) {
            s->data_at = data < 0 ? UINT64_MAX : (uint64_t)data;
            s->run_end = data < 0 ? INT64_MAX : (uint64_t)data;
            s->run_kind = RUN_HOLE;
            return 0;
        }
    }
    s->data_at = UINT64_MAX;
    off_t hole = lseek(s->fd, (off_t)offset, SEEK_HOLE);
    if (hole < 0 && errno != ENXIO)
        return -errno;
    if (hole < 0 || (uint64_t)hole <= offset) {
        /* Others have cut the file or punched a hole between the two calls. */
        s->run_end = offset + 1;
        s->run_kind = RUN_DATA;
        return 0;
    }
    s->run_end = (uint64_t)hole;
    s->run_kind = RUN_DATA;
    return 0;
}

int file_extents_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    struct file_state *s = file_state(n);
    bool known = s->run_kind != RUN_NONE && offset >= s->run_start && offset < s->run_end;
    /* A remembered hole may have been filled by somebody who may write too: data would be lost. */
    if (known && s->run_kind == RUN_HOLE && (n->shared & PERM_WRITE))
        known = false;
    if (!known && (n->shared & PERM_WRITE))
        s->data_at = UINT64_MAX;
    *out = (struct extent){.length = length,
                           .kind = EXTENT_DATA,
                           .storage = n,
                           .host_offset = offset,
                           .flags = EXTENT_IN_PLACE};
    if (!known && find_run(n, offset) < 0) {
        s->run_kind = RUN_NONE; /* no such call here: all data */
        return 0;
    }
    out->length = min_u64(length, s->run_end - offset);
    if (s->run_kind == RUN_HOLE) {
        out->kind = EXTENT_ZERO;
        out->flags = 0;
        out->storage = NULL;
        out->host_offset = 0;
    }
    return 0;
}

int64_t file_allocated(struct node *n) {
    struct file_state *s = file_state(n);
    struct stat st;
    if (s->is_block)
        return -ENOTSUP;
    return fstat(s->fd, &st) ? -errno : (int64_t)st.st_blocks * 512;
}

/* ----------------------------------------------------- copies in the kernel */

struct copy_work {
    int src_fd, dst_fd;
    uint64_t src_off, dst_off, length;
    bool try_clone, try_copy;
    bool no_clone, no_copy; /* out: the file system does not */
};

static int copy_work(void *arg) {
    struct copy_work *w = arg;
    if (w->try_clone) {
        struct file_clone_range c = {.src_fd = w->src_fd,
                                     .src_offset = w->src_off,
                                     .src_length = w->length,
                                     .dest_offset = w->dst_off};
        if (!ioctl(w->dst_fd, FICLONERANGE, &c))
            return 0;
        /* EINVAL: not aligned to this file system's blocks, perhaps the next one is. */
        w->no_clone = errno != EINVAL;
    }
    if (!w->try_copy)
        return -ENOTSUP;
    for (uint64_t done = 0; done < w->length;) {
        off_t from = (off_t)(w->src_off + done), to = (off_t)(w->dst_off + done);
        ssize_t r = copy_file_range(w->src_fd, &from, w->dst_fd, &to,
                                    (size_t)min_u64(w->length - done, GIB), 0);
        if (r < 0 && errno == EINTR)
            continue;
        if (r < 0 && (errno == ENOSPC || errno == EIO || errno == EDQUOT))
            return -errno;
        if (r <= 0) {
            /* Refused, or the source ends early: the engine does it by hand. */
            w->no_copy = r < 0 && errno != EINVAL && errno != ETXTBSY;
            return -ENOTSUP;
        }
        done += (uint64_t)r;
    }
    return 0;
}

int file_copy_range_co(struct node *src, uint64_t src_off, struct node *dst, uint64_t dst_off,
                       uint64_t length, unsigned copy_flags) {
    struct file_state *ss = file_state(src), *ds = file_state(dst);
    uint64_t end = dst_off + length;
    struct copy_work w = {
        .src_fd = ss->fd,
        .dst_fd = ds->fd,
        .src_off = src_off,
        .dst_off = dst_off,
        .length = length,
        .try_clone = !ds->no_clone && is_aligned(src_off | dst_off | length, 4096),
        .try_copy = !ds->no_copy_range && !(copy_flags & COPY_RANGE_SHARE),
    };
    if (ss->is_block || ds->is_block || (!w.try_clone && !w.try_copy))
        return -ENOTSUP;
    if (src_off + length > src->size)
        return -ENOTSUP;
    if (ds->size_limit && end > ds->size_limit && end > dst->size)
        return -ENOSPC;
    int r = offload_blocking_co(copy_work, &w);
    ds->no_clone |= w.no_clone;
    ds->no_copy_range |= w.no_copy;
    file_run_drop(dst, dst_off, length);
    if (!r && end > dst->size)
        dst->size = end;
    return r;
}
