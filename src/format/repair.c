/* SPDX-License-Identifier: MIT */
#include "format/repair.h"

#include <errno.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "disk/driver.h"
#include "disk/io.h"

#define PIECE ((size_t)MIB)

/* Looks again without a word. */
static int look_again_co(struct node *n, const struct repair_ops *ops, struct check_result *r,
                         struct err *e) {
    *r = (struct check_result){0};
    return ops->look_co(n, r, e);
}

static uint64_t less(uint64_t before, uint64_t after) {
    return before > after ? before - after : 0;
}

int repair_run_co(struct node *n, const struct repair_ops *ops, struct check_result *r,
                  struct err *e) {
    struct check_result now = {0};
    int rc = ops->look_co(n, r, e);
    if (rc < 0 || !r->fix || (!r->corruptions && !r->leaks))
        return rc;
    if (r->fix & CHECK_FIX_ERRORS && r->corruptions)
        rc = ops->errors_co(n, e);
    if (!rc)
        rc = look_again_co(n, ops, &now, e);
    uint64_t errors = less(r->corruptions, now.corruptions), leaks = now.leaks;
    if (!rc && r->fix & CHECK_FIX_LEAKS && now.leaks && !now.corruptions) {
        rc = ops->leaks_co(n, e);
        if (!rc)
            rc = look_again_co(n, ops, &now, e);
    }
    if (rc < 0)
        return rc;
    now.fix = r->fix;
    now.report = r->report;
    now.progress = r->progress;
    now.arg = r->arg;
    now.corruptions_fixed = errors;
    now.leaks_fixed = less(leaks, now.leaks);
    *r = now;
    return 0;
}

int repair_copy_co(struct node *file, uint64_t from, uint64_t to, uint64_t bytes) {
    uint8_t *buf = buf_get(PIECE);
    int r = buf ? 0 : -ENOMEM;
    for (uint64_t done = 0; !r && done < bytes;) {
        size_t length = (size_t)min_u64(PIECE, bytes - done);
        r = disk_pread_co(file, from + done, buf, length);
        if (!r)
            r = disk_pwrite_co(file, to + done, buf, length);
        done += length;
    }
    buf_put(buf, PIECE);
    return r;
}
