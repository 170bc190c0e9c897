/* SPDX-License-Identifier: MIT */
/*
 * The control socket of a running serve or run: JSON lines in QMP's form.
 *
 *   <- {"QMP": {"version": {...}, "capabilities": []}}
 *   -> {"execute": "status", "id": 1}
 *   <- {"return": {...}, "id": 1}
 *   -> {"execute": "commit", "arguments": {"disk": "root"}}
 *   <- {"error": {"class": "GenericError", "desc": "..."}}
 *
 * One object a line both ways.  qmp_capabilities is known and not needed.  The commands are in
 * control.c's table (docs/control.md).  The socket has mode 0600: who may connect may do all.
 */
#ifndef STRATA_CONTROL_CONTROL_H
#define STRATA_CONTROL_CONTROL_H

#include <stddef.h>
#include "control/disk.h"

struct loop;
struct control;

struct control_opts {
    const char *program;         /* "serve", "run": shown by status */
    struct control_disk **disks; /* borrowed, with what they point to, until control_stop_co */
    size_t ndisks;
    /* "stop" was asked for: the orderly end.  NULL: the command is refused. */
    void (*stop)(void *arg);
    void *arg;
};

/* Listens at `path` ("@name": abstract, which has no mode).  -EADDRINUSE ... */
int control_start(struct loop *loop, const char *path, const struct control_opts *opts,
                  struct control **out, struct err *e);
/* Ends all connections after the command that each is at; removes the socket; frees.  NULL is fine.
 */
void control_stop_co(struct control *c);

#endif
