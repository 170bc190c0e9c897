/* SPDX-License-Identifier: MIT */
/*
 * Facts: proc(5) for /proc/self/mountinfo (octal escapes; optional fields end at " - "), loop(4),
 * /sys/block/loopN/loop/backing_file.
 */
#include "cli/mount_table.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/xattr.h>
#include <unistd.h>
#include "base/cleanup.h"
#include "base/err.h"
#include "export/fuse/export.h"

/* ---------------------------------------------------------------- looking */

/* One field, its octal escapes undone; the text behind it. */
static const char *field(const char *s, char *out, size_t room) {
    size_t n = 0;
    while (*s && *s != ' ' && *s != '\n') {
        int c = (unsigned char)*s++;
        if (c == '\\' && s[0] >= '0' && s[0] <= '3' && s[1] && s[2]) {
            c = (s[0] - '0') << 6 | (s[1] - '0') << 3 | (s[2] - '0');
            s += 3;
        }
        if (n + 1 < room)
            out[n++] = (char)c;
    }
    out[n] = 0;
    return *s ? s + 1 : s;
}

bool mount_find(const char *path, struct mount_entry *out) {
    FILE *f = fopen("/proc/self/mountinfo", "re");
    if (!f)
        return false;
    AUTO_FREE char *line = NULL;
    size_t room = 0;
    bool found = false;
    while (getline(&line, &room, f) > 0) {
        char skipped[64];
        const char *s = line;
        for (int i = 0; i < 4; i++)
            s = field(s, skipped, sizeof(skipped));
        struct mount_entry m;
        s = field(s, m.path, sizeof(m.path));
        const char *rest = strstr(s, " - ");
        if (!rest || strcmp(m.path, path))
            continue;
        field(field(rest + 3, m.type, sizeof(m.type)), m.source, sizeof(m.source));
        *out = m; /* later ones lie on top */
        found = true;
    }
    fclose(f);
    return found;
}

char *mount_path(const char *path) {
    char *whole = realpath(path, NULL);
    if (whole || errno != ENOTCONN)
        return whole;
    AUTO_FREE char *copy = strdup(path);
    if (!copy)
        return NULL;
    for (size_t n = strlen(copy); n > 1 && copy[n - 1] == '/'; n--)
        copy[n - 1] = 0;
    char *slash = strrchr(copy, '/');
    const char *last = slash ? slash + 1 : copy;
    if (slash)
        *slash = 0;
    AUTO_FREE char *parent = realpath(slash ? (*copy ? copy : "/") : ".", NULL);
    if (!parent || asprintf(&whole, "%s/%s", strcmp(parent, "/") ? parent : "", last) < 0)
        return NULL;
    return whole;
}

char *loop_backing_file(const char *device) {
    char name[64], path[128];
    AUTO_FREE char *whole = realpath(device, NULL);
    if (!whole || sscanf(whole, "/dev/%63[a-z0-9]", name) != 1)
        return NULL;
    snprintf(path, sizeof(path), "/sys/block/%s/loop/backing_file", name);
    FILE *f = fopen(path, "re");
    if (!f)
        return NULL;
    char *line = NULL;
    size_t room = 0;
    ssize_t n = getline(&line, &room, f);
    fclose(f);
    if (n <= 0) {
        free(line);
        return NULL;
    }
    line[strcspn(line, "\n")] = 0;
    return line;
}

int loop_clear(const char *device) {
    AUTO_FD int fd = open(device, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    return ioctl(fd, LOOP_CLR_FD) < 0 ? -errno : 0;
}

/* ---------------------------------------------------------------- the guard */

/* What it has been told: records of kind, what, NUL, source, NUL. */
struct told {
    char *bytes;
    size_t n;
};

/* Nobody answers for the mount: another server may have put its own on top of the dead one's. */
static bool is_dead(const char *path) {
    char pid[24];
    return getxattr(path, "user.strata.pid", pid, sizeof(pid)) < 0 &&
           (errno == ENOTCONN || errno == ECONNABORTED);
}

static bool refuses(const struct sockaddr_un *sa) {
    AUTO_FD int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    return fd >= 0 && connect(fd, (const struct sockaddr *)sa, sizeof(*sa)) < 0 &&
           errno == ECONNREFUSED;
}

/* The dead server's socket is closed some moments after its end of our pipe. */
static bool nobody_listens(const char *path) {
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    struct stat st;
    if (strlen(path) >= sizeof(sa.sun_path))
        return false;
    memcpy(sa.sun_path, path, strlen(path));
    for (int i = 0; i < 200; i++) {
        if (lstat(path, &st) < 0 || !S_ISSOCK(st.st_mode))
            return false;
        if (refuses(&sa))
            return true;
        poll(NULL, 0, 10);
    }
    return false;
}

static void take_away(const char *record) {
    const char *what = record + 1, *source = what + strlen(what) + 1;
    struct mount_entry m;
    AUTO_FREE char *backing = NULL;
    switch ((enum guarded)record[0]) {
    case GUARD_FUSE:
        if (mount_find(what, &m) && !strcmp(m.type, "fuse.strata") && is_dead(what))
            fuse_unmount_path(what, true);
        break;
    case GUARD_MOUNT:
        if (mount_find(what, &m) && !strcmp(m.source, source))
            fuse_unmount_path(what, true);
        break;
    case GUARD_LOOP:
        backing = loop_backing_file(what);
        if (backing && !strcmp(backing, source))
            loop_clear(what);
        break;
    case GUARD_FOLDER:
        rmdir(what);
        break;
    case GUARD_SOCKET:
        if (nobody_listens(what))
            unlink(what);
        break;
    }
}

static size_t record_bytes(const char *record, size_t left) {
    size_t what = strnlen(record, left) + 1;
    return what + (what < left ? strnlen(record + what, left - what) : 0) + 1;
}

static void take_away_all(const struct told *t) {
    size_t at[16], count = 0;
    for (size_t i = 0; i < t->n && count < 16; i += record_bytes(t->bytes + i, t->n - i))
        at[count++] = i;
    while (count)
        take_away(t->bytes + at[--count]);
}

/* The server wrote an empty record: nothing is left. */
static bool is_farewell(const struct told *t) {
    return t->n >= 1 && t->bytes[t->n - 1] == '\n';
}

static void guard_process(int fd) {
    signal(SIGTERM, SIG_IGN);
    signal(SIGINT, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
    setsid();
    if (fd > 0)
        close_range(0, (unsigned)fd - 1, 0);
    close_range((unsigned)fd + 1, ~0U, 0);
    for (int i = 0; i < 3 && i < fd; i++)
        open("/dev/null", O_RDWR); /* the helpers that it starts expect these */
    struct told t = {0};
    for (;;) {
        char chunk[4096];
        ssize_t n = read(fd, chunk, sizeof(chunk));
        if (n < 0 && errno == EINTR)
            continue;
        char *grown = n > 0 ? realloc(t.bytes, t.n + (size_t)n) : NULL;
        if (!grown)
            break;
        t.bytes = grown;
        memcpy(t.bytes + t.n, chunk, (size_t)n);
        t.n += (size_t)n;
    }
    if (!is_farewell(&t))
        take_away_all(&t);
    free(t.bytes);
    _exit(0);
}

int guard_start(struct guard *g, struct err *e) {
    int p[2];
    g->fd = -1;
    if (pipe2(p, O_CLOEXEC) < 0)
        return err_errno(e, errno, "pipe");
    pid_t pid = fork();
    if (pid == 0) {
        close(p[1]);
        guard_process(p[0]);
    }
    int code = errno;
    close(p[0]);
    if (pid < 0) {
        close(p[1]);
        return err_errno(e, code, "fork");
    }
    g->fd = p[1];
    return 0;
}

static int say(struct guard *g, const char *bytes, size_t len) {
    ssize_t n = g->fd < 0 ? (ssize_t)len : write(g->fd, bytes, len);
    return n == (ssize_t)len ? 0 : n < 0 ? -errno : -EIO;
}

int guard_add(struct guard *g, enum guarded kind, const char *what, const char *source,
              struct err *e) {
    char record[2 * 4096 + 4];
    int n = snprintf(record, sizeof(record), "%c%s%c%s", kind, what, 0, source ? source : "");
    if (n < 0 || (size_t)n >= sizeof(record))
        return err_set(e, ENAMETOOLONG, "%s: the name is too long", what);
    int rc = say(g, record, (size_t)n + 1);
    return rc < 0 ? err_errno(e, -rc, "%s: the process that cleans up", what) : 0;
}

void guard_end(struct guard *g) {
    say(g, "\n", 1);
    if (g->fd >= 0)
        close(g->fd);
    g->fd = -1;
}
