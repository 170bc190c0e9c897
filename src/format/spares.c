/* SPDX-License-Identifier: MIT */
#include "format/spares.h"

#include <stdlib.h>

#include "base/ck.h"

bool spares_take(struct spares *s, uint64_t want, bool whole, uint64_t *first, uint64_t *got) {
    struct spare *last = s->count ? &s->v[s->count - 1] : NULL;
    if (!last || (whole && last->count < want))
        return false;
    *got = min_u64(want, last->count);
    last->count -= *got;
    *first = last->first + last->count;
    s->count -= !last->count;
    return true;
}

void spares_give(struct spares *s, uint64_t first, uint64_t count) {
    if (s->count == s->cap) {
        size_t cap = s->cap ? s->cap * 2 : 8;
        struct spare *more = realloc(s->v, cap * sizeof(*more));
        if (!more)
            return;
        s->v = more;
        s->cap = cap;
    }
    s->v[s->count++] = (struct spare){first, count};
}

void spares_free(struct spares *s) {
    free(s->v);
    *s = (struct spares){0};
}
