/* SPDX-License-Identifier: MIT */
/*
 * Where clients come in: unix sockets, TCP, vsock, and sockets handed over by systemd.
 *
 * A socket file that nobody listens on any more (its server was killed) is replaced; one that
 * answers, or anything that is not a socket, is left alone.
 */
#include "export/nbd/server.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include <linux/vm_sockets.h>
#include "base/cleanup.h"
#include "base/err.h"

#define BACKLOG 128
#define STALE_TRIES 10
#define STALE_PAUSE_NS 10000000
#define ACTIVATED_FIRST 3 /* SD_LISTEN_FDS_START */
#define ACTIVATED_MAX 64

/* True when a connection is taken by a process that lives. */
static bool somebody_listens(const struct sockaddr_un *sa) {
    AUTO_FD int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return true;
    if (connect(fd, (const struct sockaddr *)sa, sizeof(*sa)) < 0)
        return errno != ECONNREFUSED;
    struct ucred peer = {0};
    socklen_t len = sizeof(peer);
    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) < 0 || peer.pid <= 0 ||
           kill(peer.pid, 0) == 0 || errno != ESRCH;
}

/*
 * Removes the socket file when nobody answers there.  The kernel may keep the socket of a killed
 * process for a few milliseconds (an io_uring is torn down in the background), hence the patience.
 */
static int replace_stale(const char *path, const struct sockaddr_un *sa, struct err *e) {
    struct stat st;
    if (lstat(path, &st) < 0)
        return err_errno(e, errno, "%s", path);
    if (!S_ISSOCK(st.st_mode))
        return err_set(e, EADDRINUSE, "%s: exists and is not a socket", path);
    for (int tries = 0; somebody_listens(sa); tries++) {
        if (tries == STALE_TRIES)
            return err_set(e, EADDRINUSE, "%s: another server listens there", path);
        nanosleep(&(struct timespec){0, STALE_PAUSE_NS}, NULL);
    }
    if (unlink(path) < 0 && errno != ENOENT)
        return err_errno(e, errno, "%s: replacing a stale socket", path);
    return 0;
}

int nbd_listen_unix(const char *path, struct err *e) {
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    size_t len = strlen(path);
    if (len == 0 || len >= sizeof(sa.sun_path))
        return err_set(e, ENAMETOOLONG, "socket path '%.40s%s': %zu bytes, the limit is %zu", path,
                       len > 40 ? "..." : "", len, sizeof(sa.sun_path) - 1);
    memcpy(sa.sun_path, path, len);
    bool abstract = path[0] == '@';
    socklen_t sa_len = sizeof(sa);
    if (abstract) { /* no file, and the name ends with the address */
        sa.sun_path[0] = 0;
        sa_len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len);
    }
    AUTO_FD int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return err_errno(e, errno, "socket");
    int rc = bind(fd, (struct sockaddr *)&sa, sa_len);
    if (rc < 0 && errno == EADDRINUSE && abstract)
        return err_set(e, EADDRINUSE, "%s: another server listens there", path);
    if (rc < 0 && errno == EADDRINUSE) {
        rc = replace_stale(path, &sa, e);
        if (rc < 0)
            return rc;
        rc = bind(fd, (struct sockaddr *)&sa, sizeof(sa));
    }
    if (rc < 0)
        return err_errno(e, errno, "%s", path);
    if (listen(fd, BACKLOG) < 0) {
        rc = err_errno(e, errno, "%s: listen", path);
        if (!abstract)
            unlink(path);
        return rc;
    }
    return steal_fd(&fd);
}

int nbd_listen_vsock(uint32_t *port, struct err *e) {
    struct sockaddr_vm sa = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY};
    socklen_t len = sizeof(sa);
    sa.svm_port = *port ? *port : VMADDR_PORT_ANY;
    AUTO_FD int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return err_errno(e, errno, "vsock: this kernel or container has none");
    if (bind(fd, (struct sockaddr *)&sa, sizeof(sa)) < 0 || listen(fd, BACKLOG) < 0 ||
        getsockname(fd, (struct sockaddr *)&sa, &len) < 0)
        return err_errno(e, errno, "vsock port %u", *port);
    *port = sa.svm_port;
    return steal_fd(&fd);
}

/* One address: a listening socket or -errno. */
static int listen_addr(const struct addrinfo *a) {
    AUTO_FD int fd =
        socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, a->ai_protocol);
    int on = 1;
    if (fd < 0)
        return -errno;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (bind(fd, a->ai_addr, a->ai_addrlen) < 0 || listen(fd, BACKLOG) < 0)
        return -errno;
    return steal_fd(&fd);
}

static uint16_t bound_port(int fd) {
    struct sockaddr_storage sa;
    socklen_t len = sizeof(sa);
    if (getsockname(fd, (struct sockaddr *)&sa, &len) < 0)
        return 0;
    return ntohs(sa.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&sa)->sin6_port
                                          : ((struct sockaddr_in *)&sa)->sin_port);
}

int nbd_listen_tcp(const char *host, uint16_t *port, struct err *e) {
    char service[8];
    snprintf(service, sizeof(service), "%u", (unsigned)*port);
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    struct addrinfo *list = NULL;
    if (!host)
        host = "127.0.0.1";
    int rc = getaddrinfo(host, service, &hints, &list);
    if (rc != 0)
        return err_set(e, EADDRNOTAVAIL, "%s: %s", host, gai_strerror(rc));
    int fd = -EADDRNOTAVAIL;
    for (const struct addrinfo *a = list; a && fd < 0; a = a->ai_next)
        fd = listen_addr(a);
    freeaddrinfo(list);
    if (fd < 0)
        return err_errno(e, -fd, "%s port %u", host, (unsigned)*port);
    *port = bound_port(fd);
    return fd;
}

static int activated_count(void) {
    const char *pid = getenv("LISTEN_PID"), *fds = getenv("LISTEN_FDS");
    if (!pid || !fds || strtol(pid, NULL, 10) != (long)getpid())
        return 0;
    char *end;
    long n = strtol(fds, &end, 10);
    return *end || n < 0 || n > ACTIVATED_MAX ? -EINVAL : (int)n;
}

int nbd_listen_activated(int *first_fd, struct err *e) {
    int n = activated_count();
    if (n < 0)
        err_set(e, EINVAL, "LISTEN_FDS=%.20s: not a number of at most %d", getenv("LISTEN_FDS"),
                ACTIVATED_MAX);
    if (n <= 0)
        return n;
    unsetenv("LISTEN_PID");
    unsetenv("LISTEN_FDS");
    unsetenv("LISTEN_FDNAMES");
    for (int fd = ACTIVATED_FIRST; fd < ACTIVATED_FIRST + n; fd++) {
        int type = 0;
        socklen_t len = sizeof(type);
        if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) < 0 || type != SOCK_STREAM)
            return err_set(e, EINVAL, "socket activation: descriptor %d is not a stream socket",
                           fd);
        int fl = fcntl(fd, F_GETFL);
        fcntl(fd, F_SETFD, FD_CLOEXEC);
        fcntl(fd, F_SETFL, fl | O_NONBLOCK);
    }
    *first_fd = ACTIVATED_FIRST;
    return n;
}
