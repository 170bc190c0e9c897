/* SPDX-License-Identifier: MIT */
#include "format/seen.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK_BITS 15 /* units of a chunk: 4 KiB of bits */
#define UNITS_MAX (UINT64_C(1) << 38)
#define BYTES_MAX ((size_t)512 << 20)

int seen_init(struct seen *s, uint64_t units) {
    *s = (struct seen){.units = units};
    if (units > UNITS_MAX)
        return -ENOMEM;
    s->chunk = calloc((units >> CHUNK_BITS) + 1, sizeof(*s->chunk));
    return s->chunk ? 0 : -ENOMEM;
}

void seen_free(struct seen *s) {
    for (uint64_t i = 0; s->chunk && i <= s->units >> CHUNK_BITS; i++)
        free(s->chunk[i]);
    free(s->chunk);
    *s = (struct seen){0};
}

int seen_add(struct seen *s, uint64_t unit) {
    uint64_t **chunk = &s->chunk[unit >> CHUNK_BITS];
    if (!*chunk) {
        size_t bytes = ((size_t)1 << CHUNK_BITS) / 8;
        if (s->bytes + bytes > BYTES_MAX || !(*chunk = calloc(1, bytes)))
            return -ENOMEM;
        s->bytes += bytes;
    }
    uint64_t in = unit & ((UINT64_C(1) << CHUNK_BITS) - 1), bit = UINT64_C(1) << (in & 63);
    int met = ((*chunk)[in >> 6] & bit) != 0;
    (*chunk)[in >> 6] |= bit;
    return met;
}

bool seen_has(const struct seen *s, uint64_t unit) {
    const uint64_t *chunk = s->chunk[unit >> CHUNK_BITS];
    uint64_t in = unit & ((UINT64_C(1) << CHUNK_BITS) - 1);
    return chunk && chunk[in >> 6] >> (in & 63) & 1;
}

uint64_t seen_find_free(const struct seen *s, uint64_t from, uint64_t end, uint64_t want) {
    uint64_t run = 0;
    for (uint64_t at = from; at < end; at++) {
        run = seen_has(s, at) ? 0 : run + 1;
        if (run == want)
            return at + 1 - want;
    }
    return end;
}
