/* SPDX-License-Identifier: MIT */
/* Internal snapshots on the command line: what snapshot, info, convert and measure share. */
#ifndef STRATA_CLI_SNAPSHOTS_H
#define STRATA_CLI_SNAPSHOTS_H

#include <jansson.h>
#include "cli/cli.h"
#include "disk/snapshot.h"

/* "Snapshot list:" and a line for each; nothing for an empty list. */
void cli_snapshots_print(const struct snapshot_list *l);
/* The entries with the keys that `qemu-img info` has; new reference. */
json_t *cli_snapshots_json(const struct snapshot_list *l);

/*
 * As cli_open_co, read-only, for one snapshot of the image: `spec` is "snapshot.id=ID",
 * "snapshot.name=NAME", both, or an id or a name alone.  NULL: the image itself.
 */
int cli_open_snapshot_co(struct verb_ctx *ctx, const char *name, const struct cli_image *image,
                         unsigned open_flags, const char *spec, struct node **out);

#endif
