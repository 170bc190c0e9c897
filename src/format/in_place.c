/* SPDX-License-Identifier: MIT */
#include "format/in_place.h"

#include "disk/io.h"
#include "disk/node.h"

unsigned in_place_zero_flags(const struct node *n, unsigned zero_flags) {
    return n->flags & NODE_UNMAP ? zero_flags : zero_flags & ~(unsigned)ZERO_MAY_UNMAP;
}

int in_place_set_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags) {
    zero_flags = in_place_zero_flags(n, zero_flags);
    for (uint64_t done = 0; done < length;) {
        struct extent x;
        int r = n->drv->format->map_co(n, offset + done, length - done, &x);
        if (!r && x.kind == EXTENT_DATA)
            r = disk_zero_co(x.storage, x.host_offset, x.length, zero_flags);
        if (r < 0)
            return r;
        done += x.length;
    }
    return 0;
}

int in_place_discard_co(struct node *n, uint64_t offset, uint64_t length) {
    for (uint64_t done = 0; n->flags & NODE_UNMAP && done < length;) {
        struct extent x;
        int r = n->drv->format->map_co(n, offset + done, length - done, &x);
        if (!r && x.kind == EXTENT_DATA)
            r = disk_discard_co(x.storage, x.host_offset, x.length);
        if (r < 0)
            return r;
        done += x.length;
    }
    return 0;
}
