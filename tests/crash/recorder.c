/* SPDX-License-Identifier: MIT */
#include "recorder.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "base/iov.h"
#include "base/opt.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "runtime/task.h"

struct machine *machine;

struct recorder_opts {
    uint64_t disk;
};
struct recorder {
    unsigned disk;
};

static unsigned index_of(struct node *n) {
    return ((struct recorder *)n->state)->disk;
}

static struct lab_disk *disk_of(struct node *n) {
    return &machine->disk[index_of(n)];
}

uint64_t machine_tick(void) {
    return ++machine->now;
}

struct lab_disk *machine_disk(unsigned i) {
    struct lab_disk *d = &machine->disk[i];
    if (!d->bytes && !(d->bytes = calloc(1, RECORDER_BYTES_MAX)))
        abort();
    return d;
}

static unsigned rnd(unsigned n) {
    machine->seed = machine->seed * 1103515245 + 12345;
    return (machine->seed >> 16) % n;
}

/* Its place in the log, or SIZE_MAX while nothing is recorded. */
static size_t record_begin(struct node *n, enum record_kind kind, uint64_t offset,
                           uint64_t length) {
    struct machine *m = machine;
    if (!m->recording)
        return SIZE_MAX;
    if (m->count == m->cap) {
        m->cap = m->cap ? m->cap * 2 : 256;
        m->log = realloc(m->log, m->cap * sizeof(*m->log));
        if (!m->log)
            abort();
    }
    m->log[m->count] = (struct record){.kind = kind,
                                       .disk = index_of(n),
                                       .offset = offset,
                                       .length = length,
                                       .start = machine_tick(),
                                       .end = UINT64_MAX,
                                       .durable = UINT64_MAX};
    return m->count++;
}

static void record_end(size_t i) {
    if (i != SIZE_MAX)
        machine->log[i].end = machine_tick();
}

static void linger_co(void) {
    if (machine->recording)
        for (unsigned turns = rnd(6); turns; turns--)
            task_yield_co();
}

static void extend(struct node *n, uint64_t end) {
    struct lab_disk *d = disk_of(n);
    d->size = max_u64(d->size, end);
    d->high = max_u64(d->high, end);
    n->size = d->size;
}

static int recorder_preadv_co(struct node *n, uint64_t off, uint64_t len, const struct iovec *iov,
                              int niov, unsigned flags) {
    uint64_t have = off >= RECORDER_BYTES_MAX ? 0 : min_u64(len, RECORDER_BYTES_MAX - off);
    if (have)
        iov_from_buf(iov, niov, 0, disk_of(n)->bytes + off, have);
    if (have < len)
        iov_zero(iov, niov, have, len - have);
    linger_co();
    return 0;
}

static int recorder_pwritev_co(struct node *n, uint64_t off, uint64_t len, const struct iovec *iov,
                               int niov, unsigned flags) {
    if (off + len > RECORDER_BYTES_MAX)
        return -ENOSPC;
    size_t i = record_begin(n, RECORD_WRITE, off, len);
    extend(n, off + len);
    if (i == SIZE_MAX) {
        iov_to_buf(iov, niov, 0, disk_of(n)->bytes + off, len);
        return 0;
    }
    machine->log[i].bytes = malloc(len);
    machine->log[i].fua = flags & IO_FUA;
    iov_to_buf(iov, niov, 0, machine->log[i].bytes, len);
    linger_co();
    memcpy(disk_of(n)->bytes + off, machine->log[i].bytes, len);
    record_end(i);
    return 0;
}

static int recorder_zero_co(struct node *n, uint64_t off, uint64_t len, unsigned flags) {
    if (off + len > RECORDER_BYTES_MAX)
        return -ENOSPC;
    size_t i = record_begin(n, RECORD_ZERO, off, len);
    extend(n, off + len);
    linger_co();
    memset(disk_of(n)->bytes + off, 0, len);
    record_end(i);
    return 0;
}

static int recorder_discard_co(struct node *n, uint64_t off, uint64_t len) {
    return off >= n->size ? 0 : recorder_zero_co(n, off, min_u64(len, n->size - off), 0);
}

static void set_size(struct lab_disk *d, uint64_t size) {
    if (size < d->size)
        memset(d->bytes + size, 0, d->size - size);
    d->size = size;
    d->high = max_u64(d->high, size);
}

static int recorder_truncate_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    if (size > RECORDER_BYTES_MAX)
        return err_set(e, ENOSPC, "the recorded disk is full");
    size_t i = record_begin(n, RECORD_TRUNCATE, 0, size);
    set_size(disk_of(n), size);
    n->size = size;
    record_end(i);
    return 0;
}

static int recorder_flush_co(struct node *n) {
    size_t i = record_begin(n, RECORD_FLUSH, 0, 0);
    linger_co();
    record_end(i);
    return 0;
}

static int recorder_link_co(struct node *n, const char *name, bool replace, struct err *e) {
    recorder_flush_co(n); /* as link_co's contract says */
    size_t i = record_begin(n, RECORD_LINK, 0, 0);
    disk_of(n)->linked = true;
    linger_co();
    record_end(i);
    return 0;
}

/* ---------------------------------------------------------------- opening */

static void adopt(struct node *n, unsigned i) {
    ((struct recorder *)n->state)->disk = i;
    n->size = machine_disk(i)->size;
    n->granularity = n->request_align = 1;
    n->storage_flags = STORAGE_ZERO_INIT;
}

static int recorder_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    adopt(n, (unsigned)((struct recorder_opts *)n->opts)->disk);
    return 0;
}

static int recorder_create_co(struct node *n, struct create_ctx *ctx, struct err *e) {
    unsigned i = (unsigned)ctx->name[4] - '0';
    if (i >= LAB_DISKS)
        return err_set(e, EINVAL, "no disk '%s'", ctx->name);
    adopt(n, i);
    disk_of(n)->linked = !(ctx->flags & CREATE_SCRATCH);
    return recorder_truncate_co(n, 0, 0, e) ?: recorder_truncate_co(n, ctx->size, 0, e);
}

static int recorder_parse_name(const char *name, json_t *tree, struct err *e) {
    if (name[4] < '0' || name[4] >= '0' + LAB_DISKS || (name[5] && name[5] != '/'))
        return err_set(e, ENOENT, "no disk '%s'", name);
    json_object_set_new(tree, "filename", json_string(name)); /* for messages and headers */
    return json_object_set_new(tree, "disk", json_integer(name[4] - '0'));
}

static int recorder_reopen_co(struct node *n, unsigned new_flags, struct err *e) {
    return 0;
}

static void recorder_close_co(struct node *n) {}

/* ---------------------------------------------------------------- the log */

void machine_settle(void) {
    struct machine *m = machine;
    for (size_t i = 0; i < m->count; i++) {
        struct record *w = &m->log[i];
        w->durable = w->fua ? w->end : UINT64_MAX;
        for (size_t k = i; k < m->count; k++) {
            const struct record *f = &m->log[k];
            if (f->kind == RECORD_FLUSH && f->disk == w->disk && f->start > w->end) {
                w->durable = min_u64(w->durable, f->end);
                if (f->start > w->durable)
                    break;
            }
        }
    }
}

void machine_clear(void) {
    for (size_t i = 0; i < machine->count; i++)
        free(machine->log[i].bytes);
    machine->count = 0;
}

void machine_free(struct machine *m) {
    for (size_t i = 0; i < m->count; i++)
        free(m->log[i].bytes);
    free(m->log);
    for (unsigned i = 0; i < LAB_DISKS; i++)
        free(m->disk[i].bytes);
}

void record_apply(const struct record *x, struct lab_disk *d, uint64_t sectors) {
    switch (x->kind) {
    case RECORD_FLUSH:
        return;
    case RECORD_LINK:
        d->linked = true;
        return;
    case RECORD_TRUNCATE:
        set_size(d, x->length);
        return;
    default:
        for (uint64_t at = 0; at < x->length;) {
            uint64_t n = min_u64(512 - (x->offset + at) % 512, x->length - at);
            if (sectors >> (at / 512 % 64) & 1) {
                if (x->kind == RECORD_WRITE)
                    memcpy(d->bytes + x->offset + at, x->bytes + at, n);
                else
                    memset(d->bytes + x->offset + at, 0, n);
            }
            at += n;
        }
        d->size = max_u64(d->size, x->offset + x->length);
        d->high = max_u64(d->high, d->size);
    }
}

static const struct opt recorder_open_opts[] = {
    OPT_SIZE(struct recorder_opts, disk, "disk", OPT_OPEN, 0, OPT_RANGE(0, LAB_DISKS - 1),
             "which disk"),
    {.name = "filename", .type = OPT_T_CHILD, .when = OPT_OPEN, .help = "for messages"},
    OPT_END,
};

static const struct storage_ops recorder_ops = {.preadv_co = recorder_preadv_co,
                                                .pwritev_co = recorder_pwritev_co,
                                                .zero_co = recorder_zero_co,
                                                .discard_co = recorder_discard_co,
                                                .flush_co = recorder_flush_co,
                                                .truncate_co = recorder_truncate_co,
                                                .create_co = recorder_create_co,
                                                .link_co = recorder_link_co};

static const char *const recorder_prefixes[] = {"lab:", NULL};

const struct driver driver_recorder = {.name = "recorder",
                                       .kind = DRIVER_STORAGE,
                                       .prefixes = recorder_prefixes,
                                       .state_size = sizeof(struct recorder),
                                       .opts = recorder_open_opts,
                                       .opts_size = sizeof(struct recorder_opts),
                                       .parse_name = recorder_parse_name,
                                       .open_co = recorder_open_co,
                                       .close_co = recorder_close_co,
                                       .reopen_co = recorder_reopen_co,
                                       .storage = &recorder_ops};

/* ---------------------------------------------------------------- being found */

/* The linker sends the library's look-ups here (--wrap): its table of drivers stays what it is. */
const struct driver *__real_driver_find(const char *name);
const struct driver *__real_driver_for_prefix(const char *file_name);
const struct driver *__wrap_driver_find(const char *name);
const struct driver *__wrap_driver_for_prefix(const char *file_name);

const struct driver *__wrap_driver_find(const char *name) {
    return strcmp(name, driver_recorder.name) ? __real_driver_find(name) : &driver_recorder;
}

const struct driver *__wrap_driver_for_prefix(const char *file_name) {
    return strncmp(file_name, "lab:", 4) ? __real_driver_for_prefix(file_name) : &driver_recorder;
}
