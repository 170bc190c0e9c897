/* SPDX-License-Identifier: MIT */
/* Loading libnbd.  It stays loaded: its TLS library does not like to be taken out again. */
#include "storage/nbd_lib.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include "base/err.h"

static struct nbd_lib lib;
static const char *missing; /* what was not found; NULL: all there */
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void load(void) {
    void *so = dlopen("libnbd.so.0", RTLD_NOW | RTLD_LOCAL);
    if (!so) {
        missing = "libnbd.so.0";
        return;
    }
#define X(name)                                                                                    \
    *(void **)&lib.name = dlsym(so, "nbd_" #name);                                                 \
    if (!lib.name)                                                                                 \
        missing = "nbd_" #name;
    NBD_LIB_FUNCTIONS(X)
#undef X
}

const struct nbd_lib *nbd_lib_get(struct err *e) {
    pthread_once(&once, load);
    if (!missing)
        return &lib;
    err_set(e, ENOTSUP, "NBD disks need the library libnbd, of which '%s' was not found", missing);
    err_hint(e, "install the package libnbd0");
    return NULL;
}
