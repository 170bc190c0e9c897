/* SPDX-License-Identifier: MIT */
/*
 * qemu-nbd -L: the exports of a server, through libnbd's blocking calls.
 *
 * The list of names is read first (bounded), then each export is asked for its size, flags, block
 * sizes and metadata contexts without being opened.  Names and descriptions come from somebody
 * else: they pass cli_safe().
 */
#include "cli/nbd_list.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/cleanup.h"
#include "base/err.h"
#include "cli/cli.h"
#include "storage/nbd_lib.h"
#include "storage/nbd_tls.h"

enum { EXPORTS_MAX = 10000, CONTEXTS_MAX = 1000 };

struct exports {
    char **name, **description;
    int n;
};

static int fail(const struct nbd_lib *lib, struct err *e) {
    int code = lib->get_errno();
    return err_set(e, code ? code : EIO, "%s", lib->get_error());
}

static int add_export(void *arg, const char *name, const char *description) {
    struct exports *x = arg;
    if (x->n == EXPORTS_MAX)
        return -1;
    x->name = realloc(x->name, sizeof(*x->name) * (size_t)(x->n + 1));
    x->description = realloc(x->description, sizeof(*x->description) * (size_t)(x->n + 1));
    if (!x->name || !x->description)
        abort();
    x->name[x->n] = xstrdup(name);
    x->description[x->n++] = xstrdup(description);
    return 0;
}

static int add_context(void *arg, const char *name) {
    struct exports *x = arg;
    return x->n < CONTEXTS_MAX ? add_export(x, name, "") : -1;
}

static void exports_free(struct exports *x) {
    for (int i = 0; i < x->n; i++) {
        free(x->name[i]);
        free(x->description[i]);
    }
    free(x->name);
    free(x->description);
}

/* The protocol's bits, from what the library says of each. */
static void print_flags(const struct nbd_lib *lib, struct nbd_handle *h) {
    const struct {
        const char *name;
        unsigned bit;
        int (*is)(struct nbd_handle *h);
    } rows[] = {
        {"readonly", 1, lib->is_read_only},
        {"flush", 2, lib->can_flush},
        {"fua", 3, lib->can_fua},
        {"rotational", 4, lib->is_rotational},
        {"trim", 5, lib->can_trim},
        {"zeroes", 6, lib->can_zero},
        {"df", 7, lib->can_df},
        {"multi", 8, lib->can_multi_conn},
        {"cache", 10, lib->can_cache},
        {"fast-zero", 11, lib->can_fast_zero},
    };
    unsigned flags = 1;
    for (size_t i = 0; i < sizeof(rows) / sizeof(*rows); i++)
        if (rows[i].is(h) > 0)
            flags |= 1u << rows[i].bit;
    printf("  flags: 0x%x (", flags);
    for (size_t i = 0; i < sizeof(rows) / sizeof(*rows); i++)
        if (flags & 1u << rows[i].bit)
            printf(" %s", rows[i].name);
    puts(" )");
}

static void print_export(const struct nbd_lib *lib, struct nbd_handle *h, const char *name,
                         const char *description) {
    char *safe AUTO_FREE = cli_safe(name), *text AUTO_FREE = cli_safe(description);
    printf(" export: '%s'\n", safe);
    if (*text)
        printf("  description: %s\n", text);
    if (lib->set_export_name(h, name) < 0 || lib->opt_info(h) < 0)
        return;
    printf("  size:  %" PRId64 "\n", lib->get_size(h));
    print_flags(lib, h);
    int64_t least = lib->get_block_size(h, LIBNBD_SIZE_MINIMUM);
    if (least > 0) {
        printf("  min block: %" PRId64 "\n", least);
        printf("  opt block: %" PRId64 "\n", lib->get_block_size(h, LIBNBD_SIZE_PREFERRED));
        printf("  max block: %" PRId64 "\n", lib->get_block_size(h, LIBNBD_SIZE_MAXIMUM));
    }
    puts("  transaction size: 32-bit");
    struct exports contexts = {0};
    if (lib->opt_list_meta_context(h, (nbd_context_callback){add_context, &contexts, NULL}) > 0) {
        printf("  available meta contexts: %d\n", contexts.n);
        for (int i = 0; i < contexts.n; i++) {
            char *context AUTO_FREE = cli_safe(contexts.name[i]);
            printf("   %s\n", context);
        }
    }
    exports_free(&contexts);
}

int nbd_list(const char *socket, const char *host, const char *port,
             const struct nbd_client_tls *tls, struct err *e) {
    const struct nbd_lib *lib = nbd_lib_get(e);
    if (!lib)
        return -e->code;
    struct nbd_handle *h = lib->create();
    struct exports x = {0};
    if (!h)
        return fail(lib, e);
    lib->set_opt_mode(h, true);
    int r = nbd_client_tls_set(lib, h, tls);
    if (r >= 0)
        r = socket ? lib->connect_unix(h, socket)
                   : lib->connect_tcp(h, host ? host : "127.0.0.1", port ? port : "10809");
    if (r < 0 && tls->on) {
        r = fail(lib, e);
    } else if (r < 0) {
        int code = lib->get_errno();
        code = code ? code : EIO;
        r = socket ? err_set(e, code, "Failed to connect to '%s': %s", socket, strerror(code))
                   : err_set(e, code, "Failed to connect to '%s:%s': %s", host ? host : "127.0.0.1",
                             port ? port : "10809", strerror(code));
    } else if (lib->aio_is_negotiating(h) != 1) {
        r = err_set(e, EINVAL, "the server does not speak the newstyle handshake");
    } else if (lib->opt_list(h, (nbd_list_callback){add_export, &x, NULL}) < 0) {
        r = fail(lib, e);
    } else {
        printf("exports available: %d\n", x.n);
        for (int i = 0; i < x.n; i++)
            print_export(lib, h, x.name[i], x.description[i]);
        lib->opt_abort(h);
    }
    exports_free(&x);
    lib->close(h);
    return r;
}
