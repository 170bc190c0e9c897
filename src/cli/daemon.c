/* SPDX-License-Identifier: MIT */
/*
 * Going to the background.  The parent waits on a pipe: one byte means ready, end of file that the
 * child has died; so "strata serve --fork && use it" has no window.
 */
#include "cli/daemon.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#include "base/cleanup.h"
#include "base/err.h"
#include "cli/cli.h"

static int wait_for_child(pid_t child, int fd) {
    char byte;
    ssize_t n;
    do
        n = read(fd, &byte, 1);
    while (n < 0 && errno == EINTR);
    if (n == 1)
        return CLI_DONE;
    int status;
    pid_t got;
    do
        got = waitpid(child, &status, 0);
    while (got < 0 && errno == EINTR);
    /* A child that ended without a word did not start, whatever its status says. */
    int code = got == child && WIFEXITED(status) ? WEXITSTATUS(status) : 1;
    return CLI_DONE + (code ? code : 1);
}

int daemon_fork(int *status_fd, struct err *e) {
    int p[2];
    if (pipe2(p, O_CLOEXEC) < 0)
        return err_errno(e, errno, "pipe");
    fflush(stdout);
    fflush(stderr);
    pid_t child = fork();
    if (child < 0) {
        int code = errno;
        close(p[0]);
        close(p[1]);
        return err_errno(e, code, "fork");
    }
    if (child > 0) {
        close(p[1]);
        int rc = wait_for_child(child, p[0]);
        close(p[0]);
        return rc;
    }
    close(p[0]);
    setsid();
    *status_fd = p[1];
    return 0;
}

void daemon_ready(int *status_fd) {
    if (*status_fd < 0)
        return;
    fflush(stdout);
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null >= 0) {
        for (int fd = 0; fd <= 2; fd++)
            dup2(null, fd);
        if (null > 2)
            close(null);
    }
    ssize_t n;
    do
        n = write(*status_fd, "", 1);
    while (n < 0 && errno == EINTR);
    close(*status_fd);
    *status_fd = -1;
}

int pid_file_write(const char *path, struct err *e) {
    AUTO_FD int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0)
        return err_errno(e, errno, "%s", path);
    char text[24];
    int len = snprintf(text, sizeof(text), "%ld\n", (long)getpid());
    ssize_t n = write(fd, text, (size_t)len);
    if (n != len) {
        int code = n < 0 ? errno : ENOSPC;
        unlink(path);
        return err_errno(e, code, "%s", path);
    }
    return 0;
}

void service_notify_ready(void) {
    const char *path = getenv("NOTIFY_SOCKET");
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    size_t len = path ? strlen(path) : 0;
    if (len < 2 || len >= sizeof(sa.sun_path))
        return;
    memcpy(sa.sun_path, path, len);
    if (sa.sun_path[0] == '@') /* an abstract name */
        sa.sun_path[0] = 0;
    AUTO_FD int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd >= 0)
        sendto(fd, "READY=1", 7, MSG_NOSIGNAL, (struct sockaddr *)&sa,
               (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len));
}
