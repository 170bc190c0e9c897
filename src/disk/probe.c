/* SPDX-License-Identifier: MIT */
/* Which format is it?  Asks every format's probe about the first bytes. */
#include <errno.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "disk/engine.h"

#define PROBE_BYTES (64 * KIB)

int disk_probe_co(struct node *file, const struct driver **out, int *score, struct err *e) {
    uint8_t *buf = buf_get(PROBE_BYTES);
    if (!buf)
        return err_set(e, ENOMEM, "no memory for the first %d bytes", (int)PROBE_BYTES);
    size_t len = min_u64(PROBE_BYTES, file->size);
    /* Only the beginning decides, and most images answer by their first block. */
    memset(buf, 0, PROBE_BYTES);
    int r = len ? disk_pread_co(file, 0, buf, len) : 0;
    *out = driver_find("raw");
    *score = 0;
    for (const struct driver *const *d = driver_table; !r && *d; d++) {
        if ((*d)->kind != DRIVER_FORMAT || !(*d)->format->probe || *d == *out)
            continue;
        int s = (*d)->format->probe(buf, len, file->size, file->filename);
        if (s > *score) {
            *score = s;
            *out = *d;
        }
    }
    buf_put(buf, PROBE_BYTES);
    return r < 0 ? err_errno(e, -r, "reading the first bytes") : 0;
}
