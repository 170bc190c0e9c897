/* SPDX-License-Identifier: MIT */
/*
 * Reference counts made right where they are: blocks and table are sound, single counts are not.
 *
 * Raised counts come first and are flushed before anything relies on them: each one is right by
 * itself, so a crash leaves some raised and some not.  Counts are lowered last: until then they
 * leak.
 *
 * Counts of a block are changed in a piece of it in memory, which is written when the next change
 * lies elsewhere.
 */
#include <errno.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "disk/io.h"
#include "format/qcow2/repair.h"

#define PIECE_BYTES ((uint32_t)(64 * KIB))

struct piece {
    struct repair *p;
    uint64_t host; /* of the bytes in p->buf; 0: none */
    uint32_t bytes;
    bool dirty;
};

static int piece_put_co(struct piece *x) {
    int r = 0;
    if (x->host && x->dirty)
        r = disk_pwrite_co(x->p->s->file, x->host, x->p->buf, x->bytes);
    x->dirty = false;
    return r;
}

/* The block is there and may be written. */
static bool covered(const struct qcow2 *s, uint64_t cluster) {
    uint64_t bi = cluster >> s->block_bits;
    uint64_t block = bi < s->reftable_entries ? s->reftable[bi] : 0;
    return block && is_aligned(block, s->cluster_size) && block < QCOW2_HOST_LIMIT;
}

/* Loads the piece with the cluster's count; *index: of the count in it.  The block is covered. */
static int piece_get_co(struct piece *x, uint64_t cluster, uint64_t *index) {
    const struct qcow2 *s = x->p->s;
    uint32_t bytes = min_u64(s->cluster_size, PIECE_BYTES);
    uint64_t per_piece = (uint64_t)bytes * 8 >> s->refcount_order;
    uint64_t in_block = cluster & (((uint64_t)1 << s->block_bits) - 1);
    uint64_t host = s->reftable[cluster >> s->block_bits] + in_block / per_piece * bytes;
    *index = in_block % per_piece;
    if (host == x->host)
        return 0;
    int r = piece_put_co(x);
    x->host = 0;
    x->bytes = bytes;
    if (!r)
        r = disk_pread_co(s->file, host, x->p->buf, bytes);
    if (!r)
        x->host = host;
    return r;
}

static int count_put_co(struct piece *x, uint64_t cluster, uint64_t value) {
    uint64_t index;
    int r = piece_get_co(x, cluster, &index);
    if (!r)
        qcow2_refcount_set(x->p->buf, index, x->p->s->refcount_order, value);
    x->dirty |= !r;
    return r;
}

int repair_counts_co(struct repair *p, struct check *c, bool raise, uint64_t *fixed) {
    struct piece x = {.p = p};
    uint64_t at = 0, n = 0;
    int r = 0;
    while (!r && (at = counts_difference(&c->stored, &c->found, at, c->clusters)) < c->clusters) {
        uint64_t stored = counts_get(&c->stored, at), found = counts_get(&c->found, at);
        if ((found > stored) == raise && found <= p->s->refcount_max && covered(p->s, at)) {
            r = count_put_co(&x, at, found);
            n += !r;
        }
        at++;
    }
    if (!r)
        r = piece_put_co(&x);
    if (!r && n)
        r = repair_barrier_co(p->s);
    *fixed += r ? 0 : n;
    return r;
}

int repair_claim_co(struct repair *p, uint64_t first, uint64_t n, bool *fits) {
    struct piece x = {.p = p};
    int r = 0;
    *fits = true;
    for (uint64_t i = 0; i < n && *fits; i++)
        *fits = covered(p->s, first + i);
    if (!*fits)
        return 0;
    for (uint64_t i = 0; !r && i < n; i++)
        r = count_put_co(&x, first + i, 1);
    if (!r)
        r = piece_put_co(&x);
    return r ? r : repair_barrier_co(p->s);
}
