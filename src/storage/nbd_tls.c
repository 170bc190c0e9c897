/* SPDX-License-Identifier: MIT */
/*
 * TLS of the NBD client: libnbd does the work, this file turns objects of the command line (QEMU's
 * tls-creds-*) into what it wants to know.
 *
 * libnbd checks the server's certificate against the name that it connects to, and cannot be told
 * another one; nor does it speak TLS without any credentials.  Both are refused by name.
 */
#include "storage/nbd_tls.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "base/cleanup.h"
#include "base/err.h"
#include "base/object.h"

const json_t *nbd_tls_object(const char *id, const char *endpoint, struct err *e) {
    const json_t *o = object_find(id);
    const char *type = object_text(o, "qom-type"), *end = object_text(o, "endpoint");
    if (!o)
        err_set(e, ENOENT, "No TLS credentials with id '%s'", id);
    else if (strncmp(type, "tls-creds-", 10))
        err_set(e, EINVAL, "Object with id '%s' is not TLS credentials", id);
    else if (strcmp(end ? end : "client", endpoint))
        err_set(e, EINVAL, "Expecting TLS credentials with a %s endpoint", endpoint);
    else
        return o;
    return NULL;
}

static bool is_off(const char *text) {
    return text && (!strcmp(text, "off") || !strcmp(text, "no") || !strcmp(text, "false"));
}

int nbd_client_tls_object(const char *id, const char *hostname, struct nbd_client_tls *out,
                          struct err *e) {
    const json_t *o = nbd_tls_object(id, "client", e);
    if (!o)
        return err_status(e);
    const char *type = object_text(o, "qom-type"), *dir = object_text(o, "dir");
    if (hostname)
        return err_set(e, ENOTSUP,
                       "tls-hostname: the server's certificate is checked against the name that is "
                       "connected to, and no other");
    *out = (struct nbd_client_tls){.on = true};
    if (!strcmp(type, "tls-creds-anon"))
        return err_set(e, ENOTSUP, "tls-creds-anon: the NBD client wants credentials");
    if (!dir)
        return err_set(e, EINVAL, "Missing 'dir' property value");
    if (!strcmp(type, "tls-creds-x509")) {
        out->certificates = dir;
        out->any_server = is_off(object_text(o, "verify-peer"));
        return 0;
    }
    out->psk_file = out->owned = xasprintf("%s/keys.psk", dir);
    out->username = object_text(o, "username");
    if (!out->username)
        out->username = "qemu";
    return 0;
}

void nbd_client_tls_free(struct nbd_client_tls *t) {
    free(t->owned);
    *t = (struct nbd_client_tls){0};
}

int nbd_client_tls_set(const struct nbd_lib *lib, struct nbd_handle *h,
                       const struct nbd_client_tls *t) {
    if (!t->on)
        return 0;
    int r = lib->set_tls(h, LIBNBD_TLS_REQUIRE);
    if (r >= 0 && t->certificates)
        r = lib->set_tls_certificates(h, t->certificates);
    if (r >= 0)
        r = lib->set_tls_verify_peer(h, !t->any_server);
    if (r >= 0 && t->psk_file)
        r = lib->set_tls_psk_file(h, t->psk_file);
    if (r >= 0 && t->username)
        r = lib->set_tls_username(h, t->username);
    return r;
}
