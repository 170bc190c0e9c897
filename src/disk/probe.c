/* SPDX-License-Identifier: MIT */
/* Which format is it?  Asks every format's probe about the first bytes, and the last. */
#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "disk/engine.h"

#define PROBE_BYTES (64 * KIB)
#define PROBE_TAIL_BYTES KIB

/* Asks all formats; *score rises to the best answer. */
static void ask(const struct probe_data *p, const struct driver **out, int *score) {
    for (const struct driver *const *d = driver_table; *d; d++) {
        if ((*d)->kind != DRIVER_FORMAT || !(*d)->format->probe || !strcmp((*d)->name, "raw"))
            continue;
        int s = (*d)->format->probe(p);
        if (s > *score) {
            *score = s;
            *out = *d;
        }
    }
}

/* Whether the last bytes are a hole; reading them would make them look like data (SEEK_DATA). */
static bool tail_is_hole_co(struct node *file, uint64_t offset, uint64_t length) {
    const struct storage_ops *ops = file->drv->storage;
    struct extent x = {0};
    return ops && ops->extents_co && !ops->extents_co(file, offset, length, &x) &&
           x.kind == EXTENT_ZERO && x.length >= length;
}

int disk_probe_co(struct node *file, const struct driver **out, int *score, struct err *e) {
    uint64_t room = PROBE_BYTES + PROBE_TAIL_BYTES, tail = min_u64(PROBE_TAIL_BYTES, file->size);
    uint8_t *buf = buf_get(room);
    if (!buf)
        return err_set(e, ENOMEM, "no memory for the first %d bytes", (int)PROBE_BYTES);
    struct probe_data p = {.head = buf,
                           .head_length = min_u64(PROBE_BYTES, file->size),
                           .tail = buf + PROBE_BYTES,
                           .size = file->size,
                           .name = file->filename};
    memset(buf, 0, room);
    *out = driver_find("raw");
    *score = 0;
    int r = p.head_length ? disk_pread_co(file, 0, buf, p.head_length) : 0;
    if (!r)
        ask(&p, out, score);
    /* Most formats are known by their beginning. */
    if (!r && !*score && tail && !tail_is_hole_co(file, file->size - tail, tail)) {
        p.tail_length = tail;
        r = disk_pread_co(file, p.size - tail, buf + PROBE_BYTES, tail);
        if (!r)
            ask(&p, out, score);
    }
    buf_put(buf, room);
    return r < 0 ? err_errno(e, -r, "reading the first and last bytes") : 0;
}
