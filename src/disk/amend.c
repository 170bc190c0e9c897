/* SPDX-License-Identifier: MIT */
/* Options of an open image changed: from an option tree to the driver's slot. */
#include <errno.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "base/err.h"
#include "base/opt.h"
#include "disk/io.h"

int disk_amend_co(struct node *n, const json_t *options, const struct amend_ctx *ctx,
                  struct err *e) {
    const struct driver *d = n->drv;
    if (!d->format || !d->format->amend_co)
        return err_set(e, ENOTSUP, "images of format '%s' have no options that can be changed",
                       d->name);
    if (!node_is_rw(n))
        return err_set(e, EROFS, "the image is open read-only");
    AUTO_FREE void *opts = xcalloc(1, d->amend_opts_size);
    int r = opt_fill(d->amend_opts, options, OPT_AMEND, NULL, opts, e);
    if (r < 0)
        return r;
    node_quiesce_co(n);
    r = d->format->amend_co(n, opts, ctx, e);
    n->map_generation++;
    node_resume(n);
    opt_free(d->amend_opts, opts);
    return r;
}
