/* SPDX-License-Identifier: MIT */
/* How an NBD client proves who it is, and whom it trusts. */
#ifndef STRATA_STORAGE_NBD_TLS_H
#define STRATA_STORAGE_NBD_TLS_H

#include <stdbool.h>
#include <jansson.h>
#include "storage/nbd_lib.h"

struct err;

struct nbd_client_tls {
    bool on, any_server;      /* any_server: its certificate is not looked at */
    const char *certificates; /* folder with ca-cert.pem, client-cert.pem, client-key.pem */
    const char *psk_file;     /* or lines "user:hex key" */
    const char *username;     /* of that file */
    char *owned;              /* what some of these point to */
};

/*
 * From an object tls-creds-x509 or tls-creds-psk of the command line; texts stay the object's.
 * -ENOENT, -EINVAL; -ENOTSUP for what libnbd cannot do.
 */
int nbd_client_tls_object(const char *id, const char *hostname, struct nbd_client_tls *out,
                          struct err *e);
void nbd_client_tls_free(struct nbd_client_tls *t);
/* Before connecting.  < 0: the library's error says why. */
int nbd_client_tls_set(const struct nbd_lib *lib, struct nbd_handle *h,
                       const struct nbd_client_tls *t);

/* Object `id`, if it holds credentials for that end ("client", "server"), else NULL and an error.
 */
const json_t *nbd_tls_object(const char *id, const char *endpoint, struct err *e);

#endif
