/* SPDX-License-Identifier: MIT */
/*
 * Internal snapshots: what a disk held at some time, kept inside its own image.
 *
 * Snapshots have an id, which is unique and chosen by the format, and a name, which need not be
 * either.  Users say one or the other; snapshot_find() turns what they say into an entry of the
 * list, and the calls below take ids.
 *
 * All functions run in tasks of the node's loop.  create, apply and delete need a read-write node,
 * hold all requests back meanwhile and return when the result is on stable storage; see the
 * contract of the slots in driver.h.  To read from a snapshot without applying it, open the image
 * with the option snapshot.id or snapshot.name.
 */
#ifndef STRATA_DISK_SNAPSHOT_H
#define STRATA_DISK_SNAPSHOT_H

#include <stdbool.h>
#include <stddef.h>
#include "disk/driver.h"

struct err;
struct node;

/* The image's format keeps snapshots (this image may still refuse). */
bool disk_has_snapshots(const struct node *n);

/* *out is empty before; free it in any case.  -ENOTSUP, -EINVAL (damaged table), -EIO, -ENOMEM. */
int disk_snapshot_list_co(struct node *n, struct snapshot_list *out, struct err *e);
/* `info`: name and times, by the caller; id and disk_size are filled in (id owned by *info). */
int disk_snapshot_create_co(struct node *n, struct snapshot_info *info, struct err *e);
int disk_snapshot_apply_co(struct node *n, const char *id, struct err *e);
int disk_snapshot_delete_co(struct node *n, const char *id, struct err *e);

void snapshot_info_free(struct snapshot_info *info); /* what it owns; leaves it empty */
void snapshot_list_free(struct snapshot_list *l);
#define AUTO_SNAPSHOTS __attribute__((cleanup(snapshot_list_free)))

/*
 * The first entry with both `id` and `name`, where given (NULL: any).  NULL: none.
 */
const struct snapshot_info *snapshot_find(const struct snapshot_list *l, const char *id,
                                          const char *name);
/* The entry with the id `key`, else the first one with that name. */
const struct snapshot_info *snapshot_find_key(const struct snapshot_list *l, const char *key);

#endif
