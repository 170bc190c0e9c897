/* SPDX-License-Identifier: MIT */
/*
 * Streams in and out; pipe.h says how an image becomes one.
 *
 * Waiting.  A pipe may stay silent or full for hours, so nobody may sleep inside read or write: the
 * descriptor is polled, with a look at `cancel` in between, and then read (which gives what is
 * there) or written with RWF_NOWAIT.  A descriptor that does not know NOWAIT is no pipe but a file,
 * and a write to it on a worker thread ends.
 *
 * Out: READERS tasks claim pieces of the stream in turn, read them at the same time and write them
 * one after the other.
 *
 * Invariants of a layout
 *  1. Runs are whole units of the format on both sides, so a head or tail of a unit that the disk
 *     does not hold itself (its backing file does) is read through the chain and goes along.
 *  2. The scratch file is as long as the stream or shorter; what it lacks at the end is zeros.
 */
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/node.h"
#include "job/pipe.h"
#include "runtime/loop.h"

enum {
    PIECE = 1 << 20,
    READERS = 4,
    ZERO_BLOCK_MIN = 512,
    ZERO_RUNS = 4096, /* remembered before their room is given back */
};
static const int64_t POLL_NS = 100 * 1000 * 1000; /* how late a cancel is noticed */

static bool cancelled(const struct pipe_opts *o) {
    return o->cancel && *o->cancel;
}

/* 0: ready; -ECANCELED. */
static int ready_co(int fd, short events, const struct pipe_opts *o) {
    int r = 0;
    while (!r && !cancelled(o))
        r = loop_poll_co(fd, events, POLL_NS);
    if (r == -EPERM || r > 0) /* a regular file is always ready */
        return 0;
    return r < 0 ? r : -ECANCELED;
}

/* ---------------------------------------------------------------- in */

struct read_work {
    int fd;
    void *buf;
    size_t length;
};

static int read_worker(void *arg) {
    const struct read_work *w = arg;
    ssize_t r;
    do
        r = read(w->fd, w->buf, w->length);
    while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : (int)r;
}

/* A whole piece, or less at the end of the stream; 0 at its end. */
static int read_piece_co(int fd, uint8_t *buf, const struct pipe_opts *o) {
    int got = 0;
    while (got < PIECE) {
        struct read_work w = {fd, buf + got, (size_t)(PIECE - got)};
        int r = ready_co(fd, POLLIN, o);
        if (!r)
            r = offload_blocking_co(read_worker, &w);
        if (r == -EAGAIN)
            continue;
        if (r < 0)
            return r;
        if (r == 0)
            break;
        got += r;
    }
    return got;
}

/*
 * Zeros are left out, but a file that grows by writes gets its room ahead (file_space.c), and they
 * lie in it: their room is given back behind the writer, many at a time.
 */
struct in_job {
    struct node *file;
    uint32_t sparse;
    struct {
        uint64_t offset, length;
    } zeros[ZERO_RUNS];
    unsigned runs;
};

static void give_back_co(struct in_job *j) {
    for (unsigned i = 0; i < j->runs; i++) {
        uint64_t end = min_u64(j->zeros[i].offset + j->zeros[i].length, j->file->size);
        if (j->zeros[i].offset < end) /* a failure leaves zeros that take room */
            disk_zero_co(j->file, j->zeros[i].offset, end - j->zeros[i].offset,
                         ZERO_MAY_UNMAP | ZERO_NO_FALLBACK);
    }
    j->runs = 0;
}

static void leave_out_co(struct in_job *j, uint64_t at, uint64_t length) {
    if (j->runs && j->zeros[j->runs - 1].offset + j->zeros[j->runs - 1].length == at) {
        j->zeros[j->runs - 1].length += length;
        return;
    }
    if (j->runs == ZERO_RUNS)
        give_back_co(j);
    j->zeros[j->runs].offset = at;
    j->zeros[j->runs++].length = length;
}

/* Writes what is not zeros. */
static int store_piece_co(struct in_job *j, uint64_t at, uint8_t *buf, size_t length) {
    size_t block = j->sparse ? max_u64(j->sparse, ZERO_BLOCK_MIN) : PIECE, start = 0, pos = 0;
    int r = 0;
    while (!r && start < length) {
        size_t n = min_u64(block, length - pos);
        bool zero = n && j->sparse && bytes_are_zero(buf + pos, n);
        if (n && !zero) {
            pos += n;
            continue;
        }
        struct iovec v = {buf + start, pos - start};
        if (v.iov_len)
            r = disk_pwritev_co(j->file, at + start, v.iov_len, &v, 1, IO_BULK);
        if (zero)
            leave_out_co(j, at + pos, n);
        pos += n;
        start = pos;
    }
    return r;
}

int pipe_read_co(int fd, struct node *file, uint32_t sparse, const struct pipe_opts *opts,
                 uint64_t *total, struct err *e) {
    struct in_job *j AUTO_FREE = calloc(1, sizeof(*j));
    uint8_t *buf = buf_get(PIECE);
    uint64_t at = 0;
    int r = j && buf ? 0 : -ENOMEM, got = 1;
    if (!r)
        *j = (struct in_job){.file = file, .sparse = sparse};
    else
        err_set(e, ENOMEM, "no memory for a buffer of %d bytes", PIECE);
    while (!r && (got = read_piece_co(fd, buf, opts)) > 0) {
        r = store_piece_co(j, at, buf, (size_t)got);
        if (r < 0)
            err_errno(e, -r, "writing %s at offset %" PRIu64, file->filename, at);
        at += (uint64_t)got;
        if (!r && opts->progress)
            opts->progress(opts->arg, at, 0);
    }
    if (!r && got < 0)
        r = got == -ECANCELED ? err_set(e, ECANCELED, "cancelled")
                              : err_errno(e, -got, "reading the stream at offset %" PRIu64, at);
    *total = at;
    if (!r && file->size != at)
        r = disk_resize_co(file, at, PREALLOC_OFF, e);
    if (!r)
        give_back_co(j);
    buf_put(buf, PIECE);
    return r;
}

/* ---------------------------------------------------------------- layout */

void pipe_layout_free(struct pipe_layout *l) {
    free(l->runs);
    *l = (struct pipe_layout){0};
}

static int add_run(struct pipe_layout *l, uint64_t host, uint64_t guest, uint64_t length) {
    struct pipe_run *last = l->count ? &l->runs[l->count - 1] : NULL;
    if (last && last->host + last->length == host && last->guest + last->length == guest) {
        last->length += length;
        return 0;
    }
    if (l->count == l->cap) {
        size_t cap = l->cap ? l->cap * 2 : 64;
        struct pipe_run *runs = realloc(l->runs, cap * sizeof(*runs));
        if (!runs)
            return -ENOMEM;
        l->runs = runs;
        l->cap = cap;
    }
    l->runs[l->count++] = (struct pipe_run){host, guest, length};
    return 0;
}

/* Room for the units in [from, end), whole ones. */
static int room_co(struct node *image, uint64_t from, uint64_t end, struct pipe_layout *l) {
    int r = 0;
    while (!r && from < end) {
        uint64_t host, got;
        r = disk_make_room_co(image, from, end - from, &host, &got);
        if (!r)
            r = add_run(l, host, from, got);
        if (!r)
            from += got;
    }
    return r;
}

int pipe_layout_co(struct node *disk, struct node *image, uint64_t at, bool top_only,
                   const struct pipe_opts *opts, struct pipe_layout *l, struct err *e) {
    uint64_t unit = image->granularity, pos = 0, placed = 0; /* units below `placed` have room */
    if (l->count) /* of the disk before this one, which may end in the same unit */
        placed = l->runs[l->count - 1].guest + l->runs[l->count - 1].length;
    int r = 0;
    while (!r && pos < disk->size) {
        struct status st;
        if (cancelled(opts))
            return err_set(e, ECANCELED, "cancelled");
        r = disk_status_co(disk, pos, disk->size - pos,
                           STATUS_PRECISE | (top_only ? STATUS_TOP_ONLY : 0), &st);
        if (r < 0)
            return err_errno(e, -r, "reading the map of %s at offset %" PRIu64, disk->filename,
                             pos);
        uint64_t from = max_u64(align_down(at + pos, unit), placed);
        uint64_t end = align_up(at + pos + st.length, unit);
        bool zero = st.zero || !st.present;
        if (!zero && from < end) {
            r = room_co(image, from, end, l);
            placed = end;
        } else if (zero && top_only && st.present) {
            /* Zeros that hide what lies below: units of them; one that is shared has its data. */
            from = max_u64(align_up(at + pos, unit), placed);
            end = align_down(at + pos + st.length, unit);
            if (from < end)
                r = disk_zero_co(image, from, end - from, ZERO_MAY_UNMAP);
            else if (at + pos >= placed) {
                r = room_co(image, align_down(at + pos, unit), align_up(at + pos + 1, unit), l);
                placed = align_up(at + pos + 1, unit);
            }
        }
        pos += st.length;
    }
    if (r == -ENOTSUP)
        return err_set(e, ENOTSUP, "format %s cannot be laid out before its data is known",
                       image->drv->name);
    return r < 0 ? err_errno(e, -r, "laying out the image at offset %" PRIu64, pos) : 0;
}

static int by_host(const void *a, const void *b) {
    const struct pipe_run *x = a, *y = b;
    return x->host < y->host ? -1 : x->host > y->host;
}

int pipe_layout_done_co(struct node *image, struct pipe_layout *l, struct err *e) {
    int r = disk_flush_co(image);
    if (r < 0)
        return err_errno(e, -r, "writing the metadata");
    if (l->count)
        qsort(l->runs, l->count, sizeof(*l->runs), by_host);
    l->file = image->file;
    l->total = image->file->size;
    if (l->count)
        l->total = max_u64(l->total, l->runs[l->count - 1].host + l->runs[l->count - 1].length);
    return 0;
}

/* ---------------------------------------------------------------- out */

struct out_job {
    int fd;
    const struct pipe_layout *l;
    int (*read_co)(void *, uint64_t, void *, size_t);
    const struct pipe_opts *opts;
    struct err *e;
    int error;
    bool no_nowait;
    uint64_t next;   /* first byte that nobody has claimed */
    uint64_t turn;   /* first byte that is not written */
    int64_t slot_ns; /* rate: when the next piece may go */
    struct waitq turns;
};

static bool out_stopped(const struct out_job *j) {
    return j->error || cancelled(j->opts);
}

/* The first run that ends behind `at`. */
static size_t find_run(const struct pipe_layout *l, uint64_t at) {
    size_t low = 0, high = l->count;
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (l->runs[mid].host + l->runs[mid].length > at)
            high = mid;
        else
            low = mid + 1;
    }
    return low;
}

static int read_file_co(const struct pipe_layout *l, uint64_t at, uint8_t *buf, size_t length) {
    if (l->file)
        return disk_pread_co(l->file, at, buf, length); /* zeros behind its end */
    memset(buf, 0, length);
    return 0;
}

static int fill_co(struct out_job *j, uint64_t at, uint8_t *buf, size_t length) {
    const struct pipe_layout *l = j->l;
    size_t i = find_run(l, at);
    int r = 0;
    for (size_t done = 0, n; !r && done < length; done += n) {
        const struct pipe_run *x = i < l->count ? &l->runs[i] : NULL;
        uint64_t pos = at + done;
        if (x && pos >= x->host) {
            n = min_u64(length - done, x->host + x->length - pos);
            r = j->read_co(j->opts->arg, x->guest + (pos - x->host), buf + done, n);
            i++;
        } else {
            n = x ? min_u64(length - done, x->host - pos) : length - done;
            r = read_file_co(l, pos, buf + done, n);
        }
    }
    return r;
}

struct write_work {
    int fd;
    const void *buf;
    size_t length;
};

static int write_worker(void *arg) {
    const struct write_work *w = arg;
    ssize_t r;
    do
        r = write(w->fd, w->buf, w->length);
    while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : (int)r;
}

/* Bytes written, or -errno; -EAGAIN: the pipe is full. */
static int write_some_co(struct out_job *j, const uint8_t *buf, size_t length) {
    if (!j->no_nowait) {
        struct iovec v = {(void *)buf, length};
        ssize_t r = pwritev2(j->fd, &v, 1, -1, RWF_NOWAIT);
        if (r >= 0)
            return (int)r;
        if (errno != EOPNOTSUPP && errno != EINVAL && errno != ENOSYS)
            return -errno;
        j->no_nowait = true;
    }
    struct write_work w = {j->fd, buf, length};
    return offload_blocking_co(write_worker, &w);
}

static int write_piece_co(struct out_job *j, const uint8_t *buf, size_t length) {
    while (length) {
        int r = write_some_co(j, buf, length);
        if (r == -EAGAIN)
            r = ready_co(j->fd, POLLOUT, j->opts);
        if (r < 0 && r != -EINTR)
            return r;
        if (r > 0) {
            buf += r;
            length -= (size_t)r;
        }
    }
    return 0;
}

static void rate_co(struct out_job *j, size_t bytes) {
    if (!j->opts->rate_bytes)
        return;
    int64_t now = loop_now_ns(loop_self());
    if (j->slot_ns < now)
        j->slot_ns = now;
    while (!out_stopped(j) && (now = loop_now_ns(loop_self())) < j->slot_ns)
        loop_sleep_co(j->slot_ns - now < POLL_NS ? j->slot_ns - now : POLL_NS);
    j->slot_ns += (int64_t)((double)bytes * 1e9 / (double)j->opts->rate_bytes);
}

static int out_piece_co(struct out_job *j, uint64_t at, uint8_t *buf, size_t length) {
    int r = fill_co(j, at, buf, length);
    while (j->turn != at)
        waitq_wait_co(&j->turns);
    if (r < 0 && !j->error)
        err_errno(j->e, -r, "reading what belongs at offset %" PRIu64 " of the stream", at);
    if (!r && !out_stopped(j)) {
        rate_co(j, length);
        r = write_piece_co(j, buf, length);
        if (r < 0 && r != -ECANCELED)
            err_errno(j->e, -r, "writing the stream at offset %" PRIu64, at);
    }
    return r;
}

static void out_task(void *arg) {
    struct out_job *j = arg;
    uint8_t *buf = buf_get(PIECE);
    if (!buf && !j->error)
        j->error = err_set(j->e, ENOMEM, "no memory for a buffer of %d bytes", PIECE);
    while (j->next < j->l->total && !out_stopped(j)) {
        uint64_t at = j->next;
        size_t length = min_u64(PIECE, j->l->total - at);
        j->next += length;
        int r = out_piece_co(j, at, buf, length);
        if (r < 0 && !j->error)
            j->error = r;
        j->turn = at + length;
        waitq_wake_all(&j->turns);
        if (!j->error && j->opts->progress)
            j->opts->progress(j->opts->arg, j->turn, j->l->total);
    }
    buf_put(buf, PIECE);
}

int pipe_write_co(int fd, const struct pipe_layout *l,
                  int (*read_co)(void *arg, uint64_t guest, void *buf, size_t length),
                  const struct pipe_opts *opts, struct err *e) {
    struct out_job j = {.fd = fd, .l = l, .read_co = read_co, .opts = opts, .e = e};
    struct task_group group;
    waitq_init(&j.turns);
    task_group_init(&group);
    for (int i = 0; i < READERS; i++)
        task_group_spawn(&group, loop_self(), out_task, &j);
    task_group_wait_co(&group);
    if ((!j.error || j.error == -ECANCELED) && cancelled(opts))
        return err_set(e, ECANCELED, "cancelled");
    return j.error;
}
