/* SPDX-License-Identifier: MIT */
/*
 * Rewriting the header's cluster so that a power cut leaves the old header or the new one.
 *
 * A disk writes sectors of 512 bytes whole, but not a header of several: extensions and the backing
 * file name usually reach into the second sector.  A change of one sector is one write.  A larger
 * one goes through an intermediate form, with a barrier behind each step:
 *
 *      old      |fixed| extensions, name ........|                                |
 *      1        |fixed| extensions, name ........|  | extensions, name (new) .....|
 *      2        |FIXED| padding .................|  | extensions, name (new) .....|
 *      3        |FIXED| padding: new extensions ....| extensions, name (new) .....|
 *      4        |FIXED| extensions, name (new) .....|
 *
 * The padding is an extension of a type that no reader knows, whose data reaches to the copy; steps
 * 2 and 4 are one sector each, and 1 and 3 write where the header in force has nothing.  Every step
 * is therefore a whole header.  The copy stays behind as bytes that mean nothing, and a crash may
 * leave padding; the next rewrite drops both: decode does not keep padding.
 *
 * Where both forms do not fit the cluster, it is one plain write, as every other program does it.
 */
#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/plant.h"
#include "disk/io.h"
#include "format/qcow2/qcow2.h"

enum { SECTOR = 512, EXT_HEAD = 8 };

static int write_co(struct qcow2 *s, uint64_t at, const uint8_t *buf, size_t length) {
    int r = disk_pwrite_co(s->file, at, buf, length);
    if (!r && qcow2_ordered(s) && !PLANTED(HEADER_TORN))
        r = disk_flush_co(s->file);
    return r;
}

/*
 * Where the header in force ends, in whole sectors: its extensions and its backing file name.  What
 * lies behind, an earlier copy, would take the room for the next one.
 */
static size_t used_sectors(const uint8_t *buf, size_t length) {
    size_t at = be32_load(buf + 4) < 3 ? QCOW2_V2_LENGTH : be32_load(buf + 100);
    uint64_t name_end = be64_load(buf + 8) ? be64_load(buf + 8) + be32_load(buf + 16) : 0;
    while (at <= length - EXT_HEAD && be32_load(buf + at)) {
        uint64_t next = (uint64_t)at + EXT_HEAD + align_up(be32_load(buf + at + 4), 8);
        at = (size_t)min_u64(next, length);
    }
    return (size_t)min_u64(align_up(max_u64(at + EXT_HEAD, name_end), SECTOR), length);
}

/* First sector that differs, and how many sectors from there to the last one that does. */
static size_t changed(const uint8_t *a, const uint8_t *b, size_t length, size_t *first) {
    size_t low = SIZE_MAX, high = 0;
    for (size_t i = 0; i < length; i += SECTOR) {
        if (!memcmp(a + i, b + i, SECTOR))
            continue;
        low = low == SIZE_MAX ? i : low;
        high = i + SECTOR;
    }
    *first = low;
    return low == SIZE_MAX ? 0 : (high - low) / SECTOR;
}

/* Steps 1 to 4.  `fixed`: bytes before the extensions; `used`: of the new header. */
static int write_in_steps_co(struct qcow2 *s, const uint8_t *new, size_t fixed, size_t used,
                             size_t copy_at) {
    uint8_t first[SECTOR];
    uint64_t name_at = be64_load(new + 8);
    uint8_t *copy = buf_get(s->cluster_size);
    if (!copy)
        return -ENOMEM;
    size_t tail = used - fixed, sectors = (size_t)align_up(used, SECTOR);
    memset(copy, 0, s->cluster_size);
    memcpy(copy, new + fixed, tail);
    int r = write_co(s, copy_at, copy, (size_t)align_up(tail, SECTOR));
    if (!r) {
        memset(first, 0, sizeof(first));
        memcpy(first, new, fixed);
        be32_store(first + fixed, QCOW2_EXT_PADDING);
        be32_store(first + fixed + 4, (uint32_t)(copy_at - fixed - EXT_HEAD));
        if (name_at)
            be64_store(first + 8, name_at - fixed + copy_at);
        r = write_co(s, 0, first, SECTOR);
    }
    if (!r && sectors > SECTOR)
        r = write_co(s, SECTOR, new + SECTOR, sectors - SECTOR);
    if (!r)
        r = write_co(s, 0, new, SECTOR);
    buf_put(copy, s->cluster_size);
    return r;
}

int qcow2_header_write_co(struct qcow2 *s, struct err *e) {
    size_t cluster = s->cluster_size;
    uint8_t *old = buf_get(cluster), *new = buf_get(cluster);
    int r = old && new ? disk_pread_co(s->file, 0, old, cluster) : -ENOMEM;
    if (r < 0) {
        err_errno(e, -r, "rewriting the header");
    } else {
        int64_t used = qcow2_header_encode(&s->h, new, cluster, e);
        r = used < 0 ? (int)used : 0;
        if (!r) {
            size_t fixed =
                s->h.version < 3 ? QCOW2_V2_LENGTH : QCOW2_V3_LENGTH + (size_t)s->h.trailing_len;
            size_t before = used_sectors(old, cluster), after = (size_t)align_up(used, SECTOR);
            size_t both = (size_t)max_u64(before, after), first;
            size_t n = changed(old, new, both, &first);
            if (n == 1)
                r = write_co(s, first, new + first, SECTOR);
            else if (n && fixed + EXT_HEAD <= SECTOR &&
                     both + align_up((uint64_t)used - fixed, SECTOR) <= cluster)
                r = write_in_steps_co(s, new, fixed, (size_t)used, both);
            else if (n)
                r = write_co(s, 0, new, both);
            if (r < 0)
                err_errno(e, -r, "writing the header");
        }
    }
    buf_put(old, cluster);
    buf_put(new, cluster);
    return r;
}
