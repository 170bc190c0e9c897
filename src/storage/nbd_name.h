/* SPDX-License-Identifier: MIT */
/* Names of NBD disks. */
#ifndef STRATA_STORAGE_NBD_NAME_H
#define STRATA_STORAGE_NBD_NAME_H

#include <jansson.h>

struct err;

/*
 * Takes a name apart and sets the keys server.* and export of `tree`:
 *   nbd://HOST[:PORT][/EXPORT]   nbd+tcp://...   nbd+unix:///[EXPORT]?socket=PATH
 *   nbd:HOST:PORT[:exportname=EXPORT]            nbd:unix:PATH[:exportname=EXPORT]
 * Escapes %XX are decoded in the first line only.  The schemes nbds, nbds+tcp and nbds+unix ask for
 * TLS, with tls-certificates=, tls-psk-file=, tls-username= and tls-verify-peer= as parameters.
 * -EINVAL says what is wrong.
 */
int nbd_parse_name(const char *name, json_t *tree, struct err *e);

/* The shortest such name of a place; owned.  `path` or `host` and `port`; export may be NULL. */
char *nbd_make_name(const char *path, const char *host, const char *port, const char *export);

#endif
