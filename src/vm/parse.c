/* SPDX-License-Identifier: MIT */
/*
 * The texts that options of a guest are given as.
 *
 * Rule: what comes out of here can be put into an argument of QEMU's that has commas and colons in
 * it.  Addresses are IPv4 in digits, ports are numbers, names of network devices hold no comma; a
 * path (unix:PATH) is not put there at all, the socket is ours.
 */
#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <arpa/inet.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "base/size.h"
#include "base/strbuf.h"
#include "vm/vm.h"

static int port_parse(const char *s, size_t len, uint16_t *out) {
    unsigned v = 0;
    if (len == 0 || len > 5)
        return -EINVAL;
    for (size_t i = 0; i < len; i++) {
        if (!isdigit((unsigned char)s[i]))
            return -EINVAL;
        v = v * 10 + (unsigned)(s[i] - '0');
    }
    if (v == 0 || v > 65535)
        return -EINVAL;
    *out = (uint16_t)v;
    return 0;
}

int vm_forward_parse(const char *text, struct vm_forward *out, struct err *e) {
    struct vm_forward f = {.addr = "127.0.0.1"};
    const char *guest = strrchr(text, ':');
    const char *host = text;
    const char *first = strchr(text, ':');
    struct in_addr in;

    if (!guest)
        goto bad;
    if (first != guest) {
        size_t len = (size_t)(first - text);
        if (len == 0 || len >= sizeof(f.addr))
            goto bad;
        memcpy(f.addr, text, len);
        f.addr[len] = 0;
        if (inet_pton(AF_INET, f.addr, &in) != 1)
            return err_set(e, EINVAL, "forward '%s': '%s' is not an IPv4 address", text, f.addr);
        host = first + 1;
    }
    if (port_parse(host, (size_t)(guest - host), &f.host) < 0 ||
        port_parse(guest + 1, strlen(guest + 1), &f.guest) < 0)
        goto bad;
    *out = f;
    return 0;
bad:
    err_set(e, EINVAL, "forward '%s' is not HOST:GUEST, two TCP ports from 1 to 65535", text);
    err_hint(e, "2222:22 makes the guest's port 22 reachable at this machine's port 2222");
    return -EINVAL;
}

char *vm_vnc_display(const char *text) {
    return text[0] == ':' ? xasprintf("127.0.0.1%s", text) : xstrdup(text);
}

int vm_memory_parse(const char *text, uint64_t *bytes, struct err *e) {
    uint64_t v;
    size_t len = strlen(text);
    int ret = size_parse(text, "memory", &v, e);
    if (ret < 0)
        return ret;
    if (len && isdigit((unsigned char)text[len - 1]) && !ck_mul(v, MIB, &v))
        v = UINT64_MAX;
    if (v < MIB || v > 64 * TIB)
        return err_set(e, ERANGE, "memory '%s' is not between 1 MiB and 64 TiB", text);
    *bytes = v;
    return 0;
}

/* What the kernel takes for a device's name (dev_valid_name), less what QEMU would parse. */
static bool device_name(const char *s) {
    size_t len = strlen(s);
    if (len == 0 || len > 15 || !strcmp(s, ".") || !strcmp(s, ".."))
        return false;
    for (size_t i = 0; i < len; i++) {
        if (!isgraph((unsigned char)s[i]) || strchr("/:,=", s[i]))
            return false;
    }
    return true;
}

int vm_net_parse(const char *text, struct vm_net *out, struct err *e) {
    static const struct {
        const char *word;
        enum vm_net_kind kind;
        bool named;
    } kinds[] = {{"user", VM_NET_USER, false},
                 {"none", VM_NET_NONE, false},
                 {"tap", VM_NET_TAP, true},
                 {"bridge", VM_NET_BRIDGE, true}};
    struct str_nearest near = {0};
    size_t len = strcspn(text, "=");
    AUTO_FREE char *word = xstrndup(text, len);

    for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++) {
        str_nearest_offer(&near, word, kinds[i].word);
        if (strcmp(word, kinds[i].word))
            continue;
        if (kinds[i].named != (text[len] == '='))
            return err_set(e, EINVAL,
                           kinds[i].named ? "network '%s' needs a name: %s=NAME"
                                          : "network '%s': %s takes no name",
                           text, kinds[i].word);
        *out = (struct vm_net){.kind = kinds[i].kind};
        if (!kinds[i].named)
            return 0;
        if (!device_name(text + len + 1))
            return err_set(e, EINVAL,
                           "network '%s': a device's name has 1 to 15 characters, none of them "
                           "'/', ':', ',' or '='",
                           text);
        memcpy(out->name, text + len + 1, strlen(text + len + 1) + 1);
        return 0;
    }
    err_set(e, EINVAL, "network '%s' is not user, tap=NAME, bridge=NAME or none", text);
    if (near.best)
        err_hint(e, "did you mean %s?", near.best);
    return -EINVAL;
}

/* "[ADDR:]PORT" */
static int listen_parse(const char *text, struct vm_monitor *m) {
    const char *colon = strrchr(text, ':');
    const char *port = colon ? colon + 1 : text;
    size_t len = colon ? (size_t)(colon - text) : 0;
    struct in_addr in;

    if (len >= sizeof(m->host))
        return -EINVAL;
    memcpy(m->host, text, len);
    m->host[len] = 0;
    if (len == 0 || !strcmp(m->host, "localhost"))
        strcpy(m->host, "127.0.0.1");
    if (inet_pton(AF_INET, m->host, &in) != 1)
        return -EINVAL;
    return port_parse(port, strlen(port), &m->port);
}

int vm_monitor_parse(const char *text, struct vm_monitor *out, struct err *e) {
    struct vm_monitor m = {.fd = -1};
    bool tcp = !strncmp(text, "tcp:", 4), telnet = !strncmp(text, "telnet:", 7);

    if (!strcmp(text, "stdio")) {
        m.kind = VM_MONITOR_STDIO;
    } else if (!strncmp(text, "unix:", 5) && text[5]) {
        m.kind = VM_MONITOR_UNIX;
        m.path = text + 5;
    } else if (tcp || telnet) {
        m.kind = tcp ? VM_MONITOR_TCP : VM_MONITOR_TELNET;
        if (listen_parse(strchr(text, ':') + 1, &m) < 0) {
            err_set(e, EINVAL,
                    "monitor '%s' is not %s:[ADDR:]PORT with an IPv4 address and a port from 1 to "
                    "65535",
                    text, tcp ? "tcp" : "telnet");
            if (strchr(text, ','))
                err_hint(e, "leave out server and wait: it listens, and does not wait");
            return -EINVAL;
        }
    } else {
        err_set(e, EINVAL,
                "monitor '%s' is not stdio, unix:PATH, tcp:[ADDR:]PORT or telnet:[ADDR:]PORT",
                text);
        err_hint(
            e,
            "unix:/run/user/1000/guest.mon is reached with: socat - UNIX:/run/user/1000/guest.mon");
        return -EINVAL;
    }
    *out = m;
    return 0;
}

char *vm_quote(const char *word) {
    AUTO_STRBUF struct strbuf b = STRBUF_INIT;
    size_t plain = 0;
    while (word[plain] &&
           (isalnum((unsigned char)word[plain]) || strchr("@%_+=:,./-", word[plain])))
        plain++;
    if (plain && !word[plain])
        return xstrdup(word);
    strbuf_puts(&b, "'");
    for (const char *p = word; *p; p++) {
        if (*p == '\'')
            strbuf_puts(&b, "'\\''");
        else
            strbuf_add(&b, p, 1);
    }
    strbuf_puts(&b, "'");
    return strbuf_steal(&b);
}
