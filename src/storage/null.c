/* SPDX-License-Identifier: MIT */
/*
 * The drivers "null-co" and "null-aio": a disk that forgets what is written.  For measuring what
 * the layers above cost, and as a stand-in.
 *
 * Reads always give zeros: leaving the buffer alone would hand old memory of this process to a
 * client.  read-zeroes only decides whether the disk *says* that it is all zeros (extents), so that
 * copies skip it, or poses as data.  The two names are QEMU's; here they are the same.
 *
 * Facts: qemu block/null.c (option names, default size 1 GiB).
 */
#include <errno.h>
#include <string.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "base/iov.h"
#include "disk/node.h"
#include "disk/open.h"
#include "runtime/loop.h"

struct null_opts {
    uint64_t size;
    uint64_t latency_ns;
    bool read_zeroes;
};

static void null_wait_co(struct node *n) {
    const struct null_opts *o = n->opts;
    if (o && o->latency_ns)
        loop_sleep_co((int64_t)o->latency_ns);
}

static int null_preadv_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                          int niov, unsigned flags) {
    null_wait_co(n);
    iov_zero(iov, niov, 0, length);
    return 0;
}

static int null_pwritev_co(struct node *n, uint64_t offset, uint64_t length,
                           const struct iovec *iov, int niov, unsigned flags) {
    null_wait_co(n);
    n->size = max_u64(n->size, offset + length);
    return 0;
}

static int null_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    return null_pwritev_co(n, offset, length, NULL, 0, 0);
}

static int null_flush_co(struct node *n) {
    null_wait_co(n);
    return 0;
}

static int null_truncate_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    n->size = size;
    return 0;
}

static int null_extents_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    const struct null_opts *o = n->opts;
    *out = (struct extent){.length = length, .kind = EXTENT_ZERO};
    if (!o || !o->read_zeroes) {
        out->kind = EXTENT_DATA;
        out->flags = EXTENT_IN_PLACE;
        out->storage = n;
        out->host_offset = offset;
    }
    return 0;
}

static int64_t null_allocated(struct node *n) {
    return 0;
}

static int null_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    const struct null_opts *o = n->opts;
    n->size = o->size;
    n->granularity = 1;
    n->request_align = 1;
    n->storage_flags = STORAGE_ZERO_INIT;
    return 0;
}

static int null_create_co(struct node *n, struct create_ctx *ctx, struct err *e) {
    n->size = ctx->size;
    n->granularity = 1;
    n->request_align = 1;
    n->storage_flags = STORAGE_ZERO_INIT;
    return 0;
}

static int null_reopen_co(struct node *n, unsigned new_flags, struct err *e) {
    return 0;
}

/* "null-co://" and the like carry nothing but the driver. */
static int null_parse_name(const char *name, json_t *tree, struct err *e) {
    const char *rest = strchr(name, ':') + 1;
    if (*rest && strcmp(rest, "//"))
        return err_set(e, EINVAL, "'%s' says more than the driver; use json: for options", name);
    return 0;
}

static const struct opt null_open_opts[] = {
    OPT_SIZE(struct null_opts, size, "size", OPT_OPEN, GIB, OPT_ANY, "size of the disk"),
    OPT_U64(struct null_opts, latency_ns, "latency-ns", OPT_OPEN, 0, OPT_RANGE(0, 60000000000u),
            "nanoseconds that each request takes"),
    OPT_BOOL(struct null_opts, read_zeroes, "read-zeroes", OPT_OPEN, false,
             "report the disk as all zeros instead of data"),
    OPT_END,
};

static const struct storage_ops null_storage = {
    .preadv_co = null_preadv_co,
    .pwritev_co = null_pwritev_co,
    .zero_co = null_zero_co,
    .flush_co = null_flush_co,
    .truncate_co = null_truncate_co,
    .extents_co = null_extents_co,
    .allocated = null_allocated,
    .create_co = null_create_co,
};

static const char *const null_co_prefixes[] = {"null-co:", NULL};
static const char *const null_aio_prefixes[] = {"null-aio:", NULL};

#define NULL_DRIVER(nm, pfx)                                                                       \
    {                                                                                              \
        .name = (nm), .kind = DRIVER_STORAGE, .help = "a disk that forgets; reads as zeros",       \
        .prefixes = (pfx), .opts = null_open_opts, .opts_size = sizeof(struct null_opts),          \
        .parse_name = null_parse_name, .open_co = null_open_co, .reopen_co = null_reopen_co,       \
        .storage = &null_storage,                                                                  \
    }

const struct driver driver_null_co = NULL_DRIVER("null-co", null_co_prefixes);
const struct driver driver_null_aio = NULL_DRIVER("null-aio", null_aio_prefixes);
