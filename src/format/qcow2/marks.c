/* SPDX-License-Identifier: MIT */
/*
 * The header's dirty and corrupt bits (version 3).
 *
 * Dirty means that reference counts on storage may be too low: a program that postponed them (lazy
 * refcounts) died.  This driver never sets it.  The barrier that a postponed count would save is
 * needed in any case, since data must be on storage before the table that names them: counts travel
 * with the data for free (flush.c, step 1).  So an image with lazy refcounts that is written here
 * is right on storage at any time, and is left clean.  A dirty image that is opened for writing is
 * repaired first, completely; the bit goes last.  Killed on the way, the next open begins again.
 *
 * Corrupt means that damage was met which makes writing dangerous.  It is set when a place for new
 * data or tables, or a table about to be written, turns out to hold something else.  From then on
 * this open changes no map (-EIO), and later ones are refused for writing until a repair; reading
 * stays possible.  What was acknowledged before is still written back: its places were checked.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>

#include "base/bytes.h"
#include "base/log.h"
#include "disk/io.h"
#include "format/qcow2/qcow2.h"

int qcow2_incompatible_write_co(struct qcow2 *s, uint64_t bits) {
    uint8_t field[8];
    be64_store(field, bits);
    int r = disk_pwrite_co(s->file, QCOW2_HEADER_INCOMPATIBLE_AT, field, sizeof(field));
    if (!r && qcow2_ordered(s))
        r = disk_flush_co(s->file);
    if (!r)
        s->h.incompatible = bits;
    return r;
}

int qcow2_mend_dirty_co(struct qcow2 *s, struct err *e) {
    struct check_result res = {.fix = CHECK_FIX_LEAKS | CHECK_FIX_ERRORS};
    int r = qcow2_repair_co(s->node, &res, e);
    if (r < 0)
        return err_prefix(e, "repairing the image, which was not closed cleanly");
    if (s->h.incompatible & QCOW2_INCOMPAT_DIRTY) {
        err_set(e, EROFS,
                "the image was not closed cleanly, and %" PRIu64 " errors could not be repaired",
                res.corruptions + res.check_errors);
        err_hint(e, "strata check lists them; reading is possible");
        return -EROFS;
    }
    log_msg(LOG_LV_WARN,
            "%s: was not closed cleanly; repaired %" PRIu64
            " reference counts and flags, and %" PRIu64 " leaked clusters",
            s->node->filename, res.corruptions_fixed, res.leaks_fixed);
    return 0;
}

void qcow2_corrupt(struct qcow2 *s, const char *fmt, ...) {
    char text[256];
    va_list ap;
    if (s->corrupt)
        return;
    s->corrupt = true;
    s->node->map_generation++; /* nobody may go on writing where it looked earlier */
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    log_msg(
        LOG_LV_ERROR,
        "%s: the image is damaged: %s; no more writes are accepted, repair it with: strata check "
        "-r all",
        s->node->filename, text);
}

int qcow2_corrupt_store_co(struct qcow2 *s) {
    if (!s->corrupt_stored && s->h.version >= 3) {
        s->corrupt_stored = true;
        qcow2_incompatible_write_co(s, s->h.incompatible | QCOW2_INCOMPAT_CORRUPT);
    }
    return -EIO;
}
