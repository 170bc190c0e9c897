/* SPDX-License-Identifier: MIT */
/*
 * Metadata contexts: which there are, and which a client has selected.
 *
 * There is one, base:allocation, with id 1.  LIST answers every known context to an empty list of
 * queries, and those of a namespace to "base:"; SET takes exact names only.  A client's selection
 * belongs to the export that SET named; with one export under two names ("" and its own) GO cannot
 * choose another one, so the selection always fits.
 */
#include "export/nbd/client.h"

#include <string.h>

#define CONTEXT_NAME "base:allocation"
#define CONTEXT_NAMESPACE "base:"
#define CONTEXT_ID 1u

static void reply_context(struct nbd_out *out, uint32_t option, uint32_t id) {
    uint8_t b[4];
    be32_store(b, id);
    nbd_out_reply(out, option, NBD_REP_META_CONTEXT, b, 4, CONTEXT_NAME, strlen(CONTEXT_NAME));
}

int nbd_meta_option(struct nbd_client *c, struct nbd_out *out, uint32_t option, const uint8_t *data,
                    uint32_t length) {
    bool set = option == NBD_OPT_SET_META_CONTEXT;
    struct nbd_meta_request q;
    if (set) /* whatever comes of it, the earlier selection is gone */
        c->allocation = false;
    if (!c->structured) {
        nbd_out_error(out, option, NBD_REP_ERR_INVALID, "structured replies come first");
        return 0;
    }
    if (nbd_meta_request_decode(data, length, &q) < 0 || !nbd_name_valid(q.name)) {
        nbd_out_error(out, option, NBD_REP_ERR_INVALID, "malformed request");
        return 0;
    }
    if (!nbd_export_named(c->s, q.name)) {
        nbd_out_error(out, option, NBD_REP_ERR_UNKNOWN, "no export of this name");
        return 0;
    }
    bool found = !set && q.count == 0;
    const uint8_t *pos = q.queries;
    for (uint32_t i = 0; i < q.count; i++) {
        struct nbd_name name = nbd_meta_query_next(&pos);
        if (!nbd_name_valid(name)) {
            nbd_out_error(out, option, NBD_REP_ERR_INVALID, "a query that is not text");
            return 0;
        }
        found |= nbd_name_is(name, CONTEXT_NAME) || (!set && nbd_name_is(name, CONTEXT_NAMESPACE));
    }
    if (found)
        reply_context(out, option, set ? CONTEXT_ID : 0);
    if (set)
        c->allocation = found;
    nbd_out_reply(out, option, NBD_REP_ACK, NULL, 0, NULL, 0);
    return 0;
}
