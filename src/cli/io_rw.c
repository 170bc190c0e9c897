/* SPDX-License-Identifier: MIT */
/*
 * Moving data for `strata io`: read, write, discard, and their asynchronous forms.
 *
 * Every command becomes one `struct rw`: what to do, buffers, what to verify and how to report.  A
 * synchronous command runs it at once; an asynchronous one runs in a task of its own, up to
 * AIO_MAX at a time, and reports when it ends.
 *
 * Facts: output and limits of qemu-io 7.2, observed by running it.
 */
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "base/iov.h"
#include "cli/dialect.h"
#include "cli/io_cmd.h"
#include "disk/io.h"
#include "disk/node.h"
#include "runtime/loop.h"

/* qemu-io's limit on what one request moves. */
#define LENGTH_MAX ((uint64_t)INT32_MAX - 511)
#define DEFAULT_PATTERN 0xcd
enum { AIO_MAX = 256 };

enum rw_kind { RW_READ, RW_WRITE, RW_ZERO, RW_CODED, RW_DISCARD };

struct rw {
    struct io_session *s;
    const char *name; /* in "NAME failed" */
    enum rw_kind kind;
    bool aio, quiet, machine, dump, check;
    bool vm_state; /* not the disk: what is saved of a machine beside it */
    uint8_t pattern;
    uint64_t check_off, check_len;
    uint64_t offset, length;
    unsigned io_flags, zero_flags;
    uint8_t *buf; /* owned */
    struct iovec iov[IOV_MAX_REQUEST];
    int niov;
    struct timespec start;
};

static void rw_free(struct rw *w) {
    if (w)
        free(w->buf);
    free(w);
}
static void rw_free_p(struct rw **w) {
    rw_free(*w);
}

/* ---------------------------------------------------------------- running */

struct encode_work {
    const struct codec *codec;
    const void *in;
    void *out;
    size_t in_len;
};

static int encode_work(void *arg) {
    struct encode_work *w = arg;
    return (int)w->codec->encode(w->in, w->in_len, w->out, w->in_len);
}

/* Whole units, each coded by itself; one that does not shrink is written plain. */
static int write_coded_units_co(struct node *n, uint64_t offset, uint64_t length,
                                const uint8_t *data) {
    uint32_t unit = n->granularity;
    if (!n->codec || !n->codec->encode)
        return -ENOTSUP;
    if (offset % unit || (length % unit && offset + length != n->size))
        return -EINVAL;
    uint8_t *plain AUTO_FREE = calloc(1, unit), *code AUTO_FREE = malloc(unit);
    if (!plain || !code)
        return -ENOMEM;
    for (uint64_t done = 0; done < length; done += unit) {
        size_t part = (size_t)min_u64(unit, length - done);
        memcpy(plain, data + done, part);
        memset(plain + part, 0, unit - part);
        struct encode_work w = {n->codec, plain, code, unit};
        int r = offload_co(encode_work, &w);
        if (r > 0)
            r = disk_write_coded_co(n, offset + done, code, (uint32_t)r);
        else if (r == -ENOSPC)
            r = disk_pwrite_co(n, offset + done, plain, part);
        if (r)
            return r;
    }
    return 0;
}

static int rw_perform_co(const struct rw *w) {
    struct node *n = w->s->node;
    if (w->vm_state)
        return disk_vm_state_co(n, w->kind != RW_READ, w->offset, w->length, w->iov, w->niov);
    if (w->offset > n->size || w->length > n->size - w->offset)
        return -EIO;
    switch (w->kind) {
    case RW_READ:
        return disk_preadv_co(n, w->offset, w->length, w->iov, w->niov, 0);
    case RW_WRITE:
        return disk_pwritev_co(n, w->offset, w->length, w->iov, w->niov, w->io_flags);
    case RW_ZERO:
        return disk_zero_co(n, w->offset, w->length, w->zero_flags);
    case RW_CODED:
        return write_coded_units_co(n, w->offset, w->length, w->buf);
    default:
        return disk_discard_co(n, w->offset, w->length);
    }
}

/* -------------------------------------------------------------- reporting */

static void dump(const struct rw *w) {
    for (uint64_t i = 0; i < w->length; i += 16) {
        uint64_t k = min_u64(16, w->length - i);
        printf("%08" PRIx64 ":  ", w->offset + i);
        for (uint64_t j = 0; j < k; j++)
            printf("%02x ", w->buf[i + j]);
        putchar(' ');
        for (uint64_t j = 0; j < k; j++)
            putchar(isalnum(w->buf[i + j]) ? w->buf[i + j] : '.');
        putchar('\n');
    }
}

static void print_time(double sec, bool fixed) {
    unsigned whole = (unsigned)sec, cs = (unsigned)((sec - whole) * 100);
    if (sec < 60 && !fixed)
        printf("%02u.%02u sec", whole, cs);
    else
        printf("%u:%02u:%02u.%02u", whole / 3600, whole / 60 % 60, whole % 60, cs);
}

static void report(const struct rw *w) {
    struct timespec now;
    char total[32], rate[32];
    clock_gettime(CLOCK_MONOTONIC, &now);
    double sec =
        (double)(now.tv_sec - w->start.tv_sec) + (double)(now.tv_nsec - w->start.tv_nsec) / 1e9;
    if (sec <= 0)
        sec = 1e-9;
    double bytes = (double)w->length;
    const char *verb = w->kind == RW_READ ? "read" : w->kind == RW_DISCARD ? "discard" : "wrote";
    if (w->machine) {
        printf("%" PRIu64 ",1,", w->length);
        print_time(sec, true);
        printf(",%.3f,%.3f\n", bytes / sec, 1 / sec);
        return;
    }
    printf("%s %" PRIu64 "/%" PRIu64 " bytes at offset %" PRIu64 "\n", verb, w->length, w->length,
           w->offset);
    printf("%s, 1 ops; ", io_quantity(bytes, total));
    print_time(sec, false);
    printf(" (%s/sec and %.4f ops/sec)\n", io_quantity(bytes / sec, rate), 1 / sec);
}

static int verify(const struct rw *w) {
    const uint8_t *p = w->buf + w->check_off;
    for (uint64_t i = 0; i < w->check_len; i++)
        if (p[i] != w->pattern) {
            printf("Pattern verification failed at offset %" PRIu64 ", %" PRIu64 " bytes\n",
                   w->offset + w->check_off, w->check_len);
            return -EINVAL;
        }
    return 0;
}

/* Says what came of it; takes over `w`. */
static int rw_finish(struct rw *w_in, int r) {
    struct rw *w AUTO(rw_free_p) = w_in;
    const struct node *n = w->s->node;
    if (r == -EROFS) {
        io_complain(w->s, "the image is open read-only");
        return r;
    }
    if (r < 0) {
        printf("%s failed: %s\n", w->name, strerror(-r));
        if (!dialect_is_qemu() && !w->vm_state &&
            (w->offset > n->size || w->length > n->size - w->offset))
            io_complain(w->s, "the range ends behind the end of the disk (%" PRIu64 " bytes)",
                        n->size);
        return r;
    }
    if (w->check)
        r = verify(w);
    if (w->dump)
        dump(w);
    if (!w->quiet)
        report(w);
    return r;
}

static void aio_task(void *arg) {
    struct rw *w = arg;
    struct io_session *s = w->s;
    if (rw_finish(w, rw_perform_co(w)) < 0)
        s->failed = true;
    s->in_flight--;
    waitq_wake_one(&s->slot);
    if (!s->in_flight)
        waitq_wake_all(&s->idle);
}

static int rw_run_co(struct rw *w) {
    struct io_session *s = w->s;
    clock_gettime(CLOCK_MONOTONIC, &w->start);
    if (!w->aio)
        return rw_finish(w, rw_perform_co(w));
    while (s->in_flight >= AIO_MAX)
        waitq_wait_co(&s->slot);
    s->in_flight++;
    task_run(s->node->loop, aio_task, w);
    return 0;
}

/* ---------------------------------------------------------------- parsing */

static bool parse_pattern(const char *text, uint8_t *out) {
    char *end;
    errno = 0;
    unsigned long v = strtoul(text, &end, 0);
    if (errno || *end || end == text || *text == '-' || v > 255) {
        printf("%s is not a valid pattern byte\n", text);
        return false;
    }
    *out = (uint8_t)v;
    return true;
}

static bool parse_length(const char *text, bool unlimited, const char *unless, uint64_t *out) {
    if (!io_parse_size(text, out))
        return false;
    if (*out <= LENGTH_MAX || unlimited)
        return true;
    printf("length cannot exceed %" PRIu64 "%s, given %s\n", LENGTH_MAX, unless, text);
    return false;
}

/* Offset, lengths and what all commands share.  NULL after saying what is wrong. */
static struct rw *rw_new(struct io_session *s, const struct io_args *a, const char *name,
                         enum rw_kind kind) {
    struct rw *w AUTO(rw_free_p) = xcalloc(1, sizeof(*w));
    w->s = s;
    w->name = name;
    w->kind = kind;
    w->quiet = a->has['q'];
    w->machine = a->has['C'];
    w->dump = a->has['v'];
    if (!io_parse_size(a->pos[0], &w->offset))
        return NULL;
    bool zero = kind == RW_ZERO;
    /* The buffers lie one behind the other in any case; too many for one request go as one. */
    bool many = a->pos_n - 1 > IOV_MAX_REQUEST;
    for (int i = 1; i < a->pos_n; i++) {
        uint64_t len;
        if (!parse_length(a->pos[i], zero && a->has['n'],
                          kind == RW_READ || kind == RW_DISCARD ? "" : " without -n", &len))
            return NULL;
        if (!many || !w->niov)
            w->niov++;
        w->iov[w->niov - 1].iov_len += len;
        w->length += len;
    }
    if (w->length > LENGTH_MAX && !zero) {
        printf("the lengths together exceed %" PRIu64 "\n", LENGTH_MAX);
        return NULL;
    }
    return steal(&w);
}

/* One aligned buffer behind all elements, filled with `fill`. */
static bool rw_buffer(struct rw *w, int fill) {
    void *p;
    if (posix_memalign(&p, 4096, max_u64(w->length, 1))) {
        printf("no memory for %" PRIu64 " bytes\n", w->length);
        return false;
    }
    w->buf = p;
    memset(w->buf, fill, w->length);
    uint64_t at = 0;
    for (int i = 0; i < w->niov; i++) {
        w->iov[i].iov_base = w->buf + at;
        at += w->iov[i].iov_len;
    }
    return true;
}

/* -s FILE: its bytes again and again. */
static bool fill_from_file(struct rw *w, const char *name) {
    FILE *f = fopen(name, "re");
    if (!f) {
        io_complain(w->s, "%s: %s", name, strerror(errno));
        return false;
    }
    size_t got = fread(w->buf, 1, w->length, f);
    bool bad = ferror(f) || (!got && w->length);
    fclose(f);
    if (bad) {
        io_complain(w->s, "%s: cannot be read or is empty", name);
        return false;
    }
    for (uint64_t at = got; at < w->length; at++)
        w->buf[at] = w->buf[at - got];
    return true;
}

static int read_command_co(struct io_session *s, const struct io_args *a, const char *name,
                           bool aio) {
    if (!a->has['P'] && (a->has['s'] || a->has['l']))
        return io_usage(a->cmd);
    struct rw *w AUTO(rw_free_p) = rw_new(s, a, name, RW_READ);
    if (!w || !rw_buffer(w, 0xab))
        return -EINVAL;
    w->aio = aio;
    w->vm_state = a->has['b'];
    w->check = a->has['P'];
    w->check_len = w->length;
    if (w->check && !parse_pattern(a->val['P'], &w->pattern))
        return -EINVAL;
    if (a->val['s'] && !io_parse_size(a->val['s'], &w->check_off))
        return -EINVAL;
    if (w->check_off > w->length) {
        puts("pattern verification range exceeds end of read data");
        return -EINVAL;
    }
    w->check_len = w->length - w->check_off;
    if (a->val['l']) {
        uint64_t len;
        if (!io_parse_size(a->val['l'], &len))
            return -EINVAL;
        if (len > w->check_len) {
            puts("pattern verification range exceeds end of read data");
            return -EINVAL;
        }
        w->check_len = len;
    }
    return rw_run_co(steal(&w));
}

int io_read_co(struct io_session *s, const struct io_args *a) {
    return read_command_co(s, a, "read", false);
}
int io_readv_co(struct io_session *s, const struct io_args *a) {
    return read_command_co(s, a, "readv", false);
}
int io_aio_read_co(struct io_session *s, const struct io_args *a) {
    return read_command_co(s, a, "readv", true);
}

/* What of the options of a write exclude one another.  NULL: nothing. */
static const char *write_conflict(const struct io_args *a) {
    if (a->has['b'] && a->has['z'])
        return "-b and -z cannot be specified at the same time";
    if (a->has['f'] && (a->has['b'] || a->has['c']))
        return "-f and -b or -c cannot be specified at the same time";
    if (a->has['n'] && !a->has['z'])
        return "-n requires -z to be specified";
    if (a->has['u'] && !a->has['z'])
        return "-u requires -z to be specified";
    if (a->has['z'] + a->has['P'] + a->has['s'] > 1)
        return "Only one of -z, -P, and -s can be specified at the same time";
    if (a->has['z'] && a->has['r'])
        return "cannot combine zero write with registered I/O buffer";
    if (a->has['c'] && a->has['z'])
        return "-c and -z cannot be specified at the same time";
    return NULL;
}

static int write_command_co(struct io_session *s, const struct io_args *a, const char *name,
                            bool aio) {
    const char *why = write_conflict(a);
    uint8_t pattern = DEFAULT_PATTERN;
    if (why) {
        puts(why);
        return -EINVAL;
    }
    if (aio && a->has['z'] && a->pos_n > 2) {
        puts("-z supports only a single length parameter");
        return -EINVAL;
    }
    enum rw_kind kind = a->has['z'] ? RW_ZERO : a->has['c'] ? RW_CODED : RW_WRITE;
    struct rw *w AUTO(rw_free_p) = rw_new(s, a, name, kind);
    if (!w || (a->has['P'] && !parse_pattern(a->val['P'], &pattern)))
        return -EINVAL;
    if (kind == RW_CODED && ((w->offset | w->length) & 511)) {
        bool bad_offset = w->offset & 511;
        printf("%" PRIu64 " is not a sector-aligned value for '%s'\n",
               bad_offset ? w->offset : w->length, bad_offset ? "offset" : "count");
        return -EINVAL;
    }
    if (kind != RW_ZERO && !rw_buffer(w, pattern))
        return -ENOMEM;
    if (a->val['s'] && !fill_from_file(w, a->val['s']))
        return -EINVAL;
    w->aio = aio;
    w->vm_state = a->has['b'];
    w->io_flags = a->has['f'] ? IO_FUA : 0;
    w->zero_flags = (a->has['u'] ? ZERO_MAY_UNMAP : 0) | (a->has['n'] ? ZERO_NO_FALLBACK : 0) |
                    (a->has['f'] ? ZERO_FUA : 0) | ZERO_PRESENT;
    return rw_run_co(steal(&w));
}

int io_write_co(struct io_session *s, const struct io_args *a) {
    return write_command_co(s, a, "write", false);
}
int io_writev_co(struct io_session *s, const struct io_args *a) {
    return write_command_co(s, a, "writev", false);
}
int io_aio_write_co(struct io_session *s, const struct io_args *a) {
    return write_command_co(s, a, "aio_write", true);
}

int io_discard_co(struct io_session *s, const struct io_args *a) {
    struct rw *w = rw_new(s, a, "discard", RW_DISCARD);
    return w ? rw_run_co(w) : -EINVAL;
}
