/* SPDX-License-Identifier: MIT */
/*
 * The drop-in name qemu-nbd: its options, turned into those of `strata serve`, and -L.
 *
 * The two differ in little: qemu-nbd listens on all addresses (serve: on loopback), serves one
 * client at a time by default, prints no URI, and says nothing at the end.  -c and -d need the
 * kernel's client and are refused, as that program refuses them where it was built without.
 *
 * Facts: options, messages and statuses of qemu-nbd 7.2 and 10.0.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/cleanup.h"
#include "base/object.h"
#include "base/version.h"
#include "cli/dialect.h"
#include "cli/nbd_list.h"
#include "disk/open.h"
#include "storage/nbd_tls.h"

struct args {
    const char *port, *bind, *socket, *share, *name, *description, *handshake, *offset, *tls_creds,
        *tls_authz, *tls_host, *trace, *pid_file, *selinux, *connect, *format, *load_snapshot,
        *cache, *aio, *discard, *detect_zeroes;
    struct cli_list bitmaps;
    bool persistent, verbose, alloc_depth, list, fork, disconnect, read_only, snapshot, nocache,
        image_opts, version;
};

static const struct cli_opt opts[] = {
    CLI_STR(struct args, port, 'p', "port", "PORT", "port to listen on (10809)"),
    CLI_STR(struct args, bind, 'b', "bind", "IFACE", "address to listen on (0.0.0.0)"),
    CLI_STR(struct args, socket, 'k', "socket", "PATH", "listen on a unix socket"),
    CLI_STR(struct args, share, 'e', "shared", "NUM", "clients at once (1); 0: any number"),
    CLI_FLAG(struct args, persistent, 't', "persistent", "go on when the last client has left"),
    CLI_FLAG(struct args, verbose, 'v', "verbose", "report each connection"),
    CLI_STR(struct args, name, 'x', "export-name", "NAME", "name of the export"),
    CLI_STR(struct args, description, 'D', "description", "TEXT", "description of the export"),
    CLI_STR(struct args, handshake, 0, "handshake-limit", "N", "seconds for a handshake (10)"),
    CLI_STR(struct args, offset, 'o', "offset", "OFFSET", "where in the image the export begins"),
    CLI_FLAG(struct args, alloc_depth, 'A', "allocation-depth", "expose the allocation depth"),
    CLI_LIST(struct args, bitmaps, 'B', "bitmap", "NAME", "expose a dirty bitmap"),
    CLI_FLAG(struct args, list, 'L', "list", "list the exports of a server"),
    CLI_STR(struct args, tls_creds, 0, "tls-creds", "ID", "TLS"),
    CLI_STR(struct args, tls_authz, 0, "tls-authz", "ID", "TLS"),
    CLI_STR(struct args, tls_host, 0, "tls-hostname", "HOST", "TLS"),
    CLI_STR(struct args, trace, 'T', "trace", "WHAT", "accepted; there is nothing to switch on"),
    CLI_FLAG(struct args, fork, 0, "fork", "go to the background once clients can connect"),
    CLI_STR(struct args, pid_file, 0, "pid-file", "PATH", "write the process id there"),
    CLI_STR(struct args, selinux, 0, "selinux-label", "LABEL", "label of the socket"),
    CLI_STR(struct args, connect, 'c', "connect", "DEV", "connect to a kernel device"),
    CLI_FLAG(struct args, disconnect, 'd', "disconnect", "disconnect a kernel device"),
    CLI_STR(struct args, format, 'f', "format", "FORMAT", "image format; probed when not given"),
    CLI_FLAG(struct args, read_only, 'r', "read-only", "refuse all writes"),
    CLI_FLAG(struct args, snapshot, 's', "snapshot", "writes go to a temporary overlay"),
    CLI_STR(struct args, load_snapshot, 'l', "load-snapshot", "SNAPSHOT",
            "serve an internal snapshot"),
    CLI_FLAG(struct args, nocache, 'n', "nocache", "short for --cache=none"),
    CLI_STR(struct args, cache, 0, "cache", "MODE", "how the host caches"),
    CLI_STR(struct args, aio, 0, "aio", "MODE", "native, io_uring or threads; the engine chooses"),
    CLI_STR(struct args, discard, 0, "discard", "MODE", "ignore or unmap"),
    CLI_STR(struct args, detect_zeroes, 0, "detect-zeroes", "MODE", "off, on or unmap"),
    CLI_FLAG(struct args, image_opts, 0, "image-opts", "the name is key=value,... options"),
    CLI_FLAG(struct args, version, 'V', "version", "print the version"),
    CLI_END};

enum { BITMAPS_PASSED_MAX = 63 }; /* one more than an export can have: then it says so */
enum { NAME_BYTES_MAX = 4096 };   /* of export names and descriptions, by the protocol */

static bool is_one_of(const char *text, const char *a, const char *b, const char *c) {
    return !strcmp(text, a) || !strcmp(text, b) || (c && !strcmp(text, c));
}

static bool is_number(const char *text, long long max) {
    char *end;
    errno = 0;
    long long v = strtoll(text, &end, 0);
    return *text && !*end && !errno && v >= 0 && v <= max;
}

/* Values that cannot be read. */
static int check_values(struct err *e, const struct args *a) {
    bool unmap = a->discard && is_one_of(a->discard, "unmap", "on", NULL);
    if (a->cache && a->nocache)
        return err_set(e, EINVAL, "-n and --cache can only be specified once");
    if (a->cache && strcmp(a->cache, "off") && cache_parse(a->cache, NULL) < 0)
        return err_set(e, EINVAL, "Invalid cache mode `%s'", a->cache);
    if (a->aio && !is_one_of(a->aio, "threads", "native", "io_uring"))
        return err_set(e, EINVAL, "Invalid aio mode '%s'", a->aio);
    if (a->discard && !unmap && !is_one_of(a->discard, "ignore", "off", NULL))
        return err_set(e, EINVAL, "Invalid discard mode `%s'", a->discard);
    if (a->detect_zeroes && !is_one_of(a->detect_zeroes, "off", "on", "unmap"))
        return err_set(e, EINVAL, "Failed to parse detect_zeroes mode: invalid parameter value: %s",
                       a->detect_zeroes);
    if (a->detect_zeroes && !strcmp(a->detect_zeroes, "unmap") && !unmap)
        return err_set(e, EINVAL,
                       "setting detect-zeroes to unmap is not allowed without setting discard "
                       "operation to unmap");
    if (a->offset && !is_number(a->offset, INT64_MAX))
        return err_set(e, EINVAL, "Invalid offset '%s'", a->offset);
    if (a->socket && a->socket[0] != '/')
        return err_set(e, EINVAL, "socket path must be absolute");
    if (a->share && !is_number(a->share, INT32_MAX))
        return err_set(e, EINVAL, "Invalid shared device number '%s'", a->share);
    if (a->handshake && !is_number(a->handshake, INT32_MAX))
        return err_set(e, EINVAL, "Invalid handshake limit '%s'", a->handshake);
    if (a->name && strlen(a->name) > NAME_BYTES_MAX)
        return err_set(e, EINVAL, "export name '%s' too long", a->name);
    if (a->description && strlen(a->description) > NAME_BYTES_MAX)
        return err_set(e, EINVAL, "export description '%s' too long", a->description);
    return 0;
}

static int check_list(struct err *e, const struct args *a, int pos_n) {
    if (pos_n)
        return err_set(e, EINVAL, "List mode is incompatible with a file name");
    if (a->name || a->description || a->offset || a->connect || a->disconnect || a->format ||
        a->load_snapshot || a->bitmaps.n || a->alloc_depth || a->aio || a->discard || a->cache ||
        a->nocache)
        return err_set(e, EINVAL, "List mode is incompatible with per-device settings");
    if (a->fork)
        return err_set(e, EINVAL, "List mode is incompatible with forking");
    return 0;
}

/* What this version cannot do, by name. */
static int check_ability(struct err *e, const struct args *a) {
    if (a->tls_authz && !a->tls_creds)
        return err_set(e, EINVAL, "--tls-authz is not permitted without --tls-creds");
    if (a->tls_host && !a->tls_creds)
        return err_set(e, EINVAL, "--tls-hostname is not permitted without --tls-creds");
    if (a->tls_authz)
        return err_set(e, ENOTSUP, "--tls-authz: this version knows no authorisation objects");
    if (a->selinux)
        return err_set(e, ENOTSUP, "SELinux support not enabled in this binary");
    if (a->connect || a->disconnect)
        return err_set(e, ENOTSUP, "Kernel /dev/nbdN support not available");
    return 0;
}

/* ---------------------------------------------------------------- the command line of serve */

struct line {
    char *v[128]; /* twice the options above, a few, and the bitmaps */
    int n;
};

static void put(struct line *l, const char *name, const char *value) {
    l->v[l->n++] = value ? xasprintf("--%s=%s", name, value) : xasprintf("--%s", name);
}

static void put_value(struct line *l, const char *name, const char *value) {
    if (value)
        put(l, name, value);
}

static void put_flag(struct line *l, const char *name, bool on) {
    if (on)
        put(l, name, NULL);
}

static void put_decimal(struct line *l, const char *name, const char *value) {
    if (value)
        l->v[l->n++] = xasprintf("--%s=%lld", name, strtoll(value, NULL, 0));
}

static bool is_off(const char *text) {
    return text && is_one_of(text, "off", "no", "false");
}

/* Credentials mean that nobody is served without. */
static int put_tls(struct line *l, const struct args *a, struct err *e) {
    if (!a->tls_creds)
        return 0;
    const json_t *o = nbd_tls_object(a->tls_creds, "server", e);
    if (!o)
        return -e->code;
    if (a->tls_host)
        return err_set(e, EINVAL, "TLS hostname is only supported with list mode");
    const char *type = object_text(o, "qom-type"), *dir = object_text(o, "dir");
    bool psk = !strcmp(type, "tls-creds-psk"), x509 = !strcmp(type, "tls-creds-x509");
    if ((psk || x509) && !dir)
        return err_set(e, EINVAL, "Missing 'dir' property value");
    if (psk && object_text(o, "username"))
        return err_set(e, EINVAL, "username should not be set when endpoint=server");
    if (object_text(o, "passwordid"))
        return err_set(e, ENOTSUP, "passwordid: this version reads no encrypted keys");
    AUTO_FREE char *what = psk ? xasprintf("psk:%s", dir) : xstrdup(x509 ? dir : "anon");
    put(l, "tls", what);
    put(l, "tls-required", NULL);
    if (x509)
        put_flag(l, "tls-anyone", is_off(object_text(o, "verify-peer")));
    put_value(l, "tls-priority", object_text(o, "priority"));
    return 0;
}

static int serve(const struct args *a, char *file, struct err *e) {
    struct line l = {.n = 0};
    int r = put_tls(&l, a, e);
    if (r < 0)
        return r;
    const char *cache = a->nocache ? "none" : a->cache;
    /* 0 clients means any number there; more than the most that serve takes is that most. */
    long long share = a->share ? strtoll(a->share, NULL, 0) : 1;
    if (share == 0 || share > 10000)
        share = 10000;
    if (a->socket) {
        put(&l, "socket", a->socket);
    } else {
        put(&l, "bind", a->bind ? a->bind : "0.0.0.0");
        put_decimal(&l, "port", a->port);
    }
    l.v[l.n++] = xasprintf("--share=%lld", share);
    put_value(&l, "name", a->name);
    put_value(&l, "description", a->description);
    put_value(&l, "pid-file", a->pid_file);
    put_value(&l, "format", a->format);
    put_value(&l, "cache", cache && !strcmp(cache, "off") ? "none" : cache);
    bool unmap = a->discard && is_one_of(a->discard, "unmap", "on", NULL);
    put(&l, "discard", unmap ? "unmap" : "ignore");
    put_value(&l, "detect-zeroes", a->detect_zeroes);
    put_decimal(&l, "offset", a->offset);
    put_flag(&l, "persistent", a->persistent);
    /* Not --verbose: that program says nothing of clients that behave. */
    put_flag(&l, "fork", a->fork);
    put_value(&l, "load-snapshot", a->load_snapshot);
    put_flag(&l, "read-only", (a->read_only || a->load_snapshot) && !a->snapshot);
    put_flag(&l, "snapshot", a->snapshot);
    put_flag(&l, "image-opts", a->image_opts);
    put_flag(&l, "allocation-depth", a->alloc_depth);
    put_decimal(&l, "handshake-timeout", a->handshake);
    for (size_t i = 0; i < a->bitmaps.n && i < BITMAPS_PASSED_MAX; i++)
        put(&l, "bitmap", a->bitmaps.v[i]);
    l.v[l.n++] = xstrdup("--");
    l.v[l.n++] = xstrdup(file);
    int status = cli_verb_main(verb_find("serve"), l.n, l.v);
    for (int i = 0; i < l.n; i++)
        free(l.v[i]);
    return status;
}

static int list(const struct args *a, struct err *e) {
    struct nbd_client_tls tls = {.on = false};
    int r = a->tls_creds ? nbd_client_tls_object(a->tls_creds, a->tls_host, &tls, e) : 0;
    if (r == 0)
        r = nbd_list(a->socket, a->bind, a->port, &tls, e);
    nbd_client_tls_free(&tls);
    return r;
}

static int qemu_nbd_run(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    struct err *e = &ctx->err;
    if (a->version) {
        puts("qemu-nbd 10.0.0 (strata " STRATA_VERSION ")");
        return 0;
    }
    int r = check_values(e, a);
    if (r)
        return r;
    if (a->list) {
        r = check_list(e, a, ctx->pos_n);
        if (!r)
            r = check_ability(e, a);
        return r ? r : list(a, e);
    }
    if (ctx->pos_n != 1) {
        err_set(e, EINVAL, "Invalid number of arguments");
        err_hint(e, "\001Try `qemu-nbd --help' for more information.");
        return -EINVAL;
    }
    if (a->image_opts && a->format)
        return err_set(e, EINVAL, "--image-opts and -f are mutually exclusive");
    r = check_ability(e, a);
    return r ? r : serve(a, ctx->pos[0], e);
}

const struct verb verb_qemu_nbd = {
    .name = "qemu-nbd",
    .summary = "QEMU disk network block device utility, by strata",
    .synopsis = "FILE",
    .pos_max = -1,
    .opts = opts,
    .args_size = sizeof(struct args),
    .run = qemu_nbd_run,
};

int dialect_nbd_main(int argc, char **argv) {
    return cli_verb_main(&verb_qemu_nbd, argc - 1, argv + 1);
}
