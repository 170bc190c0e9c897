/* SPDX-License-Identifier: MIT */
/* Which format is it?  Asks every format's probe about the first bytes, and the last. */
#include <errno.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "disk/engine.h"

#define PROBE_BYTES (64 * KIB)
#define PROBE_TAIL_BYTES KIB

int disk_probe_co(struct node *file, const struct driver **out, int *score, struct err *e) {
    uint64_t room = PROBE_BYTES + PROBE_TAIL_BYTES;
    uint8_t *buf = buf_get(room);
    if (!buf)
        return err_set(e, ENOMEM, "no memory for the first %d bytes", (int)PROBE_BYTES);
    struct probe_data p = {.head = buf,
                           .head_length = min_u64(PROBE_BYTES, file->size),
                           .tail = buf + PROBE_BYTES,
                           .tail_length = min_u64(PROBE_TAIL_BYTES, file->size),
                           .size = file->size,
                           .name = file->filename};
    memset(buf, 0, room);
    int r = p.head_length ? disk_pread_co(file, 0, buf, p.head_length) : 0;
    if (!r && p.tail_length)
        r = disk_pread_co(file, p.size - p.tail_length, buf + PROBE_BYTES, p.tail_length);
    *out = driver_find("raw");
    *score = 0;
    for (const struct driver *const *d = driver_table; !r && *d; d++) {
        if ((*d)->kind != DRIVER_FORMAT || !(*d)->format->probe || *d == *out)
            continue;
        int s = (*d)->format->probe(&p);
        if (s > *score) {
            *score = s;
            *out = *d;
        }
    }
    buf_put(buf, room);
    return r < 0 ? err_errno(e, -r, "reading the first and last bytes") : 0;
}
