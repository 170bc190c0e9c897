/* SPDX-License-Identifier: MIT */
/* Linux's loop devices: a block device over a file. */
#ifndef STRATA_EXPORT_LOOPDEV_H
#define STRATA_EXPORT_LOOPDEV_H

#include <stdbool.h>
#include <stddef.h>

struct err;

/*
 * Puts a free loop device over `file`; `name` ("/dev/loop0") has `room` bytes.  The descriptor that
 * comes out keeps an `autoclear` device alive until somebody else uses it.  Blocks, and reads
 * `file` meanwhile: from a thread that does not serve it.  -EACCES/-EPERM: it takes root.
 */
int loopdev_attach(const char *file, bool read_only, bool autoclear, char *name, size_t room,
                   struct err *e);

#endif
