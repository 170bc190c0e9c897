/* SPDX-License-Identifier: MIT */
/* What an NBD server offers, in the words of qemu-nbd -L. */
#ifndef STRATA_CLI_NBD_LIST_H
#define STRATA_CLI_NBD_LIST_H

struct err;

/*
 * Connects to the unix socket `socket`, or to `host` (NULL: 127.0.0.1) and `port` (NULL: 10809),
 * by TLS where `tls` is on, and prints all exports.  Blocks; call it without a loop.  0 or -errno
 * with `e` set.
 */
struct nbd_client_tls; /* storage/nbd_tls.h */
int nbd_list(const char *socket, const char *host, const char *port,
             const struct nbd_client_tls *tls, struct err *e);

#endif
