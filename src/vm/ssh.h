/* SPDX-License-Identifier: MIT */
/* The guest's ssh server, as it is seen through a forwarded port of this machine. */
#ifndef STRATA_VM_SSH_H
#define STRATA_VM_SSH_H

#include <stdbool.h>
#include <stdint.h>

struct err;

/*
 * A TCP port of 127.0.0.1 that nobody has at this moment.  Somebody else may take it before QEMU
 * does: QEMU then ends with a message.
 */
int vm_free_port(uint16_t *port, struct err *e);
/* ssh is in PATH.  -ENOENT with a hint. */
int vm_ssh_find(struct err *e);
/*
 * Whether a server that greets as RFC 4253, 4.2 says ("SSH-...") answers there now.  *fd is the
 * socket while the call waits, for loop_cancel_fd(), and -1 otherwise.
 */
bool vm_ssh_greets_co(uint16_t port, int *fd);
/*
 * The command: NULL-terminated, for vm_args_free().  `user` NULL: ssh's own choice.  A guest's host
 * key says nothing (its port is another one each time, and a throw-away guest makes new keys), and
 * nobody is in between: it is not asked about and not remembered.
 */
char **vm_ssh_args(uint16_t port, const char *user);

#endif
