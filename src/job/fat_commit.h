/* SPDX-License-Identifier: MIT */
/*
 * What a guest did to a directory shown as a FAT disk, done to the directory.
 *
 * Everything is read and judged first: a file system that is damaged, names that the host cannot
 * hold, files that changed on the host meanwhile are refused, and nothing has changed.  Then the
 * new contents are written beside the old, under temporary names; only when all are durable the
 * names are changed, and what the guest deleted is removed last.  At any moment, kill -9 included,
 * each file of the directory is the old one or the new one.
 */
#ifndef STRATA_JOB_FAT_COMMIT_H
#define STRATA_JOB_FAT_COMMIT_H

#include <stdbool.h>

struct node;
struct err;

/* `base` is a directory shown as a disk (raw on it included). */
bool fat_commit_is_for(const struct node *base);
/* Whether `base` takes changes at all, to be asked before a guest begins.  -EROFS: its name has no
 * rw. */
int fat_commit_check(const struct node *base, struct err *e);
/*
 * `overlay` is a throw-away overlay that was made over `base` since `base` was opened, and nobody
 * writes to it any more.  `base` must not be read afterwards.  -EUCLEAN: the guest's file system is
 * damaged; -EBUSY: the host changed what the guest changed; -EEXIST, -EINVAL (names), -ENOSPC ...
 * When nothing could be changed, the hint of `e` says where the guest's disk has been saved.
 */
int fat_commit_co(struct node *overlay, struct node *base, struct err *e);

#endif
