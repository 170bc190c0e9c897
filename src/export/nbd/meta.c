/* SPDX-License-Identifier: MIT */
/*
 * Metadata contexts: which there are, and which a client has selected (status.c has the list).
 *
 * LIST answers every known context to an empty list of queries, those of a namespace to "base:" and
 * "qemu:", and all bitmaps to "qemu:dirty-bitmap:"; SET takes exact names only.  A client's
 * selection belongs to the export that SET named, and is void when GO chooses another one.
 */
#include "export/nbd/client.h"

#include <stdio.h>
#include <string.h>
#include "disk/bitmap.h"

#define BITMAP_PREFIX "qemu:dirty-bitmap:"
enum { CONTEXT_NAME_MAX = sizeof(BITMAP_PREFIX) + BITMAP_NAME_MAX };

/* The name of context `bit`; false: the export has none there. */
static bool context_name(const struct nbd_export *s, unsigned bit, char name[CONTEXT_NAME_MAX]) {
    if (bit >= NBD_CONTEXT_BITMAPS) {
        if (bit - NBD_CONTEXT_BITMAPS >= s->nbitmaps)
            return false;
        snprintf(name, CONTEXT_NAME_MAX, "%s%s", BITMAP_PREFIX,
                 s->bitmaps[bit - NBD_CONTEXT_BITMAPS]->name);
        return true;
    }
    if (bit == NBD_CONTEXT_DEPTH && !s->allocation_depth)
        return false;
    strcpy(name, bit == NBD_CONTEXT_DEPTH ? "qemu:allocation-depth" : "base:allocation");
    return true;
}

static bool begins(const char *name, struct nbd_name query) {
    return query.len <= strlen(name) && !memcmp(name, query.s, query.len);
}

/* What one query means. */
static bool matches(struct nbd_name query, const char *name, bool set) {
    if (nbd_name_is(query, name))
        return true;
    return !set && begins(name, query) &&
           (nbd_name_is(query, "base:") || nbd_name_is(query, "qemu:") ||
            nbd_name_is(query, BITMAP_PREFIX));
}

int nbd_meta_option(struct nbd_client *c, struct nbd_out *out, uint32_t option, const uint8_t *data,
                    uint32_t length) {
    bool set = option == NBD_OPT_SET_META_CONTEXT;
    char name[CONTEXT_NAME_MAX];
    uint64_t found = 0;
    struct nbd_meta_request q;
    if (set) { /* whatever comes of it, the earlier selection is gone */
        c->contexts = 0;
        c->contexts_of = NULL;
    }
    if (!c->structured) {
        nbd_out_error(out, option, NBD_REP_ERR_INVALID, "structured replies come first");
        return 0;
    }
    if (nbd_meta_request_decode(data, length, &q) < 0 || !nbd_name_valid(q.name)) {
        nbd_out_error(out, option, NBD_REP_ERR_INVALID, "malformed request");
        return 0;
    }
    struct nbd_export *x = nbd_export_find(c->s, q.name);
    if (!x) {
        nbd_out_error(out, option, NBD_REP_ERR_UNKNOWN, "no export of this name");
        return 0;
    }
    const uint8_t *pos = q.queries;
    for (uint32_t i = 0; i < q.count; i++) {
        struct nbd_name query = nbd_meta_query_next(&pos);
        if (!nbd_name_valid(query)) {
            nbd_out_error(out, option, NBD_REP_ERR_INVALID, "a query that is not text");
            return 0;
        }
        for (unsigned bit = 0; bit < NBD_CONTEXTS_MAX; bit++)
            if (!(found >> bit & 1) && context_name(x, bit, name) && matches(query, name, set))
                found |= (uint64_t)1 << bit;
    }
    for (unsigned bit = 0; bit < NBD_CONTEXTS_MAX; bit++) {
        bool all = !set && q.count == 0;
        if (!(all || found >> bit & 1) || !context_name(x, bit, name))
            continue;
        uint8_t id[4];
        be32_store(id, set ? bit + 1 : 0);
        nbd_out_reply(out, option, NBD_REP_META_CONTEXT, id, 4, name, strlen(name));
    }
    if (set) {
        c->contexts = found;
        c->contexts_of = x;
    }
    nbd_out_reply(out, option, NBD_REP_ACK, NULL, 0, NULL, 0);
    return 0;
}
