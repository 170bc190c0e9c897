/* SPDX-License-Identifier: MIT */
/*
 * Names of NBD disks: URIs (the NBD project's uri.md) and QEMU's older form with colons.
 */
#include "storage/nbd_name.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include "base/cleanup.h"
#include "base/err.h"
#include "base/strbuf.h"

#define PORT_DEFAULT "10809"
#define EXPORTNAME ":exportname="

static int hex(char c) {
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

/* NULL: a broken escape, or one for NUL. */
static char *unescape(const char *s, size_t len) {
    char *out = xstrndup(s, len), *to = out;
    for (size_t i = 0; i < len; i++) {
        if (s[i] != '%') {
            *to++ = s[i];
            continue;
        }
        int v = i + 2 < len ? hex(s[i + 1]) * 16 + hex(s[i + 2]) : 0;
        if (i + 2 >= len || hex(s[i + 1]) < 0 || hex(s[i + 2]) < 0 || !v) {
            free(out);
            return NULL;
        }
        *to++ = (char)v;
        i += 2;
    }
    *to = 0;
    return out;
}

static int set_text(json_t *tree, const char *key, const char *text) {
    return json_object_set_new(tree, key, json_string_nocheck(text)) < 0 ? -ENOMEM : 0;
}

static int set_place(json_t *tree, const char *path, const char *host, const char *port,
                     const char *export, struct err *e) {
    json_t *server = json_object();
    int r = json_object_set_new(tree, "server", server);
    if (!r)
        r = set_text(server, "type", path ? "unix" : "inet");
    if (!r && path)
        r = set_text(server, "path", path);
    if (!r && host)
        r = set_text(server, "host", host);
    if (!r && host)
        r = set_text(server, "port", port);
    if (!r && export && *export)
        r = set_text(tree, "export", export);
    return r ? err_set(e, ENOMEM, "no memory") : 0;
}

/* "HOST:PORT", "[V6]:PORT"; the port may be missing. */
static bool split_host(const char *s, size_t len, char **host, char **port) {
    const char *colon;
    if (len && *s == '[') {
        const char *end = memchr(s, ']', len);
        if (!end)
            return false;
        *host = xstrndup(s + 1, (size_t)(end - s - 1));
        len -= (size_t)(end + 1 - s);
        s = end + 1;
        colon = len ? s : NULL;
        if (colon && *colon != ':')
            return false;
    } else {
        colon = memchr(s, ':', len);
        *host = xstrndup(s, colon ? (size_t)(colon - s) : len);
    }
    *port = colon && (size_t)(colon - s) + 1 < len
                ? xstrndup(colon + 1, len - (size_t)(colon - s) - 1)
                : xstrdup(PORT_DEFAULT);
    return true;
}

/* One parameter of a URI.  1: taken, 0: not one of ours, -EINVAL. */
static int parameter(const char *q, size_t len, bool tls, char **socket, json_t *tree) {
    static const char *const texts[] = {"tls-certificates", "tls-psk-file", "tls-username"};
    size_t key = strcspn(q, "=");
    if (key >= len)
        return 0;
    AUTO_FREE char *value = unescape(q + key + 1, len - key - 1);
    if (!value)
        return -EINVAL;
    if (key == 6 && !strncmp(q, "socket", key)) {
        free(*socket);
        *socket = steal(&value);
        return 1;
    }
    for (int i = 0; tls && i < 3; i++)
        if (strlen(texts[i]) == key && !strncmp(q, texts[i], key))
            return set_text(tree, texts[i], value) < 0 ? -EINVAL : 1;
    if (tls && key == 15 && !strncmp(q, "tls-verify-peer", key)) {
        bool off = !strcmp(value, "false") || !strcmp(value, "no") || !strcmp(value, "0");
        json_object_set_new(tree, "tls-verify-peer", json_boolean(!off));
        return 1;
    }
    return 0;
}

static int parse_uri(const char *name, json_t *tree, struct err *e) {
    bool tls = !strncmp(name, "nbds", 4), is_unix = !strncmp(name + 3 + tls, "+unix:", 6);
    const char *at = strstr(name, "://") + 3;
    size_t host_len = strcspn(at, "/?");
    const char *path = at + host_len;
    size_t path_len = strcspn(path, "?");
    const char *query = path[path_len] ? path + path_len + 1 : "";
    while (path_len && *path == '/' && path == at + host_len) {
        path++;
        path_len--;
    }
    AUTO_FREE char *export = unescape(path, path_len);
    AUTO_FREE char *socket = NULL, *host = NULL, *port = NULL;
    bool strange = false;
    if (tls)
        json_object_set_new(tree, "tls", json_true());
    for (const char *q = query; *q; q += strcspn(q, "&;"), q += *q != 0) {
        int r = parameter(q, strcspn(q, "&;"), tls, &socket, tree);
        if (r < 0)
            return err_set(e, EINVAL, "'%s' has a broken %%XX", name);
        strange |= r == 0;
    }
    if (!export)
        return err_set(e, EINVAL, "'%s' has a broken %%XX", name);
    if (is_unix && (!socket || !*socket || host_len))
        return err_set(e, EINVAL, "'%s' is not nbd%s+unix:///EXPORT?socket=PATH", name,
                       tls ? "s" : "");
    if (is_unix)
        return set_place(tree, socket, NULL, NULL, export, e);
    if (!host_len || !split_host(at, host_len, &host, &port) || strange || socket)
        return err_set(e, EINVAL, "'%s' is not nbd%s://HOST:PORT/EXPORT", name, tls ? "s" : "");
    return set_place(tree, NULL, host, port, export, e);
}

int nbd_parse_name(const char *name, json_t *tree, struct err *e) {
    size_t scheme = strcspn(name, ":");
    if (!strncmp(name + scheme, "://", 3))
        return parse_uri(name, tree, e);
    const char *at = name + scheme + 1, *mark = strstr(at, EXPORTNAME);
    size_t len = mark ? (size_t)(mark - at) : strlen(at);
    const char *export = mark ? mark + strlen(EXPORTNAME) : NULL;
    AUTO_FREE char *host = NULL, *port = NULL;
    if (!strncmp(at, "unix:", 5)) {
        AUTO_FREE char *path = xstrndup(at + 5, len - 5);
        return set_place(tree, path, NULL, NULL, export, e);
    }
    if (!len || !memchr(at, ':', len) || !split_host(at, len, &host, &port) || !*host)
        return err_set(e, EINVAL, "'%s' is not nbd:HOST:PORT or nbd:unix:PATH", name);
    return set_place(tree, NULL, host, port, export, e);
}

char *nbd_make_name(const char *path, const char *host, const char *port, const char *export) {
    if (path && export)
        return xasprintf("nbd+unix:///%s?socket=%s", export, path);
    if (path)
        return xasprintf("nbd+unix://?socket=%s", path);
    if (export)
        return xasprintf("nbd://%s:%s/%s", host, port, export);
    return xasprintf("nbd://%s:%s", host, port);
}
