/* SPDX-License-Identifier: MIT */
/*
 * The janitor: see janitor.h.
 *
 * Messages on a SOCK_SEQPACKET pair, one a datagram: struct note up to the path's NUL.  The janitor
 * is in a session of its own and ignores what a terminal or an impatient user sends to all of us;
 * it keeps the working directory, for the paths may be relative.
 */
#include "vm/janitor.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include "base/cleanup.h"
#include "base/err.h"

struct note {
    dev_t dev;
    ino_t ino;
    bool ours; /* false: released */
    char path[PATH_MAX];
};

/* Of the janitor alone; the parent's copy stays untouched. */
static struct note known[JANITOR_FILES_MAX];
static unsigned nknown;

static void learn(const struct note *n) {
    for (unsigned i = 0; i < nknown; i++) {
        if (!strcmp(known[i].path, n->path)) {
            known[i] = *n;
            return;
        }
    }
    if (nknown < JANITOR_FILES_MAX)
        known[nknown++] = *n;
}

static void remove_same(const char *path, dev_t dev, ino_t ino) {
    struct stat st;
    if (lstat(path, &st) == 0 && st.st_dev == dev && st.st_ino == ino)
        unlink(path);
}

static void clean(void) {
    for (unsigned i = 0; i < nknown; i++)
        if (known[i].ours)
            remove_same(known[i].path, known[i].dev, known[i].ino);
}

static _Noreturn void janitor_main(int fd) {
    static struct note note;
    static const int deaf[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE};
    for (size_t i = 0; i < sizeof(deaf) / sizeof(*deaf); i++)
        signal(deaf[i], SIG_IGN);
    setsid();
    prctl(PR_SET_NAME, "strata-janitor");
    int null = open("/dev/null", O_RDWR);
    for (int i = 0; i <= 2 && null >= 0; i++)
        dup2(null, i);
    dup2(fd, 3);
    close_range(4, ~0u, 0);
    for (;;) {
        ssize_t n = recv(3, &note, sizeof(note), 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            break;
        if ((size_t)n > offsetof(struct note, path) && (size_t)n <= sizeof(note))
            learn(&note);
    }
    clean();
    _exit(0);
}

int janitor_start(struct janitor *j, struct err *e) {
    int fds[2];
    *j = (struct janitor){.fd = -1};
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds) < 0)
        return err_errno(e, errno, "cannot make a socket pair");
    pid_t pid = fork();
    if (pid == 0) {
        close(fds[0]);
        janitor_main(fds[1]);
    }
    close(fds[1]);
    if (pid < 0) {
        int code = errno;
        close(fds[0]);
        return err_errno(e, code, "fork");
    }
    *j = (struct janitor){.fd = fds[0], .pid = pid};
    return 0;
}

static int tell(struct janitor *j, const struct janitor_file *f, bool ours) {
    struct note *n = xcalloc(1, sizeof(*n));
    size_t len = strlen(f->path);
    int ret = len < sizeof(n->path) ? 0 : -ENAMETOOLONG;
    if (ret == 0) {
        n->dev = f->dev;
        n->ino = f->ino;
        n->ours = ours;
        memcpy(n->path, f->path, len + 1);
        if (send(j->fd, n, offsetof(struct note, path) + len + 1, MSG_NOSIGNAL) < 0)
            ret = -errno;
    }
    free(n);
    return ret;
}

int janitor_add(struct janitor *j, struct janitor_file *f, const char *path) {
    struct stat st;
    if (lstat(path, &st) < 0)
        return -errno;
    *f = (struct janitor_file){path, st.st_dev, st.st_ino};
    return j->fd < 0 ? -EINVAL : tell(j, f, true);
}

void janitor_release(struct janitor *j, struct janitor_file *f) {
    if (f->path && j->fd >= 0)
        tell(j, f, false);
    f->path = NULL;
}

void janitor_remove(struct janitor_file *f) {
    if (f->path)
        remove_same(f->path, f->dev, f->ino);
    f->path = NULL;
}

void janitor_stop(struct janitor *j) {
    if (j->fd < 0)
        return;
    close(j->fd);
    j->fd = -1;
    while (waitpid(j->pid, NULL, 0) < 0 && errno == EINTR)
        ;
}
