/* SPDX-License-Identifier: MIT */
/*
 * Waiting for a guest's ssh server.
 *
 * QEMU accepts on a forwarded port long before the guest has a network, and closes or stays silent;
 * so only the greeting counts, and each try has a limit of its own.
 */
#include "vm/ssh.h"

#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/socket.h>
#include "base/cleanup.h"
#include "base/err.h"
#include "runtime/loop.h"
#include "vm/vm.h"

#define GREETING_NS 5000000000LL

static struct sockaddr_in here(uint16_t port) {
    return (struct sockaddr_in){.sin_family = AF_INET,
                                .sin_port = htons(port),
                                .sin_addr = {.s_addr = htonl(INADDR_LOOPBACK)}};
}

/*
 * Below the range that the kernel gives to outgoing connections (32768 and up): one of those cannot
 * take the port before QEMU does, and our own attempts cannot connect to themselves.  The process
 * number spreads runs that start at the same moment.
 */
#define PORT_MIN 20000
#define PORTS 12768

int vm_free_port(uint16_t *port, struct err *e) {
    for (unsigned i = 0; i < PORTS; i++) {
        AUTO_FD int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        *port = (uint16_t)(PORT_MIN + ((unsigned)getpid() + i) % PORTS);
        struct sockaddr_in sa = here(*port);
        if (fd < 0)
            return err_errno(e, errno, "cannot make a socket");
        if (bind(fd, (struct sockaddr *)&sa, sizeof(sa)) == 0)
            return 0;
        if (errno != EADDRINUSE && errno != EACCES)
            return err_errno(e, errno, "cannot find a free port");
    }
    return err_set(e, EADDRINUSE, "no port of 127.0.0.1 from %d to %d is free", PORT_MIN,
                   PORT_MIN + PORTS - 1);
}

int vm_ssh_find(struct err *e) {
    const char *path = getenv("PATH");
    for (const char *p = path ? path : "/bin:/usr/bin"; p; p = strchr(p, ':')) {
        p += *p == ':';
        int len = (int)strcspn(p, ":");
        AUTO_FREE char *name = len ? xasprintf("%.*s/ssh", len, p) : xstrdup("./ssh");
        if (access(name, X_OK) == 0)
            return 0;
    }
    err_set(e, ENOENT, "--ssh needs the program ssh, and it is not in PATH");
    err_hint(e, "install it (Debian: openssh-client)");
    return -ENOENT;
}

bool vm_ssh_greets_co(uint16_t port, int *fd) {
    struct sockaddr_in sa = here(port);
    char text[4];
    bool yes = false;
    int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (s < 0)
        return false;
    *fd = s;
    if (loop_connect_co(s, (struct sockaddr *)&sa, sizeof(sa)) == 0 &&
        loop_poll_co(s, POLLIN, GREETING_NS) > 0)
        yes = loop_recv_co(s, text, sizeof(text)) == sizeof(text) && !memcmp(text, "SSH-", 4);
    *fd = -1;
    close(s);
    return yes;
}

char **vm_ssh_args(uint16_t port, const char *user) {
    const char *fixed[] = {"ssh",
                           "-o",
                           "StrictHostKeyChecking=no",
                           "-o",
                           "UserKnownHostsFile=/dev/null",
                           "-o",
                           "LogLevel=ERROR"};
    size_t n = 0;
    char **v = xcalloc(sizeof(fixed) / sizeof(*fixed) + 6, sizeof(*v));
    for (size_t i = 0; i < sizeof(fixed) / sizeof(*fixed); i++)
        v[n++] = xstrdup(fixed[i]);
    v[n++] = xstrdup("-p");
    v[n++] = xasprintf("%u", port);
    if (user) {
        v[n++] = xstrdup("-l");
        v[n++] = xstrdup(user);
    }
    v[n++] = xstrdup("127.0.0.1");
    return v;
}
