/* SPDX-License-Identifier: MIT */
/*
 * Naming the process that holds a file's lock bytes.
 *
 * The kernel does not tell the owner of an open-file-description lock (F_OFD_GETLK and /proc/locks
 * say pid -1), but /proc/PID/fdinfo/FD lists the locks of that descriptor's own description:
 *
 *      lock:	1: OFDLCK  ADVISORY  READ -1 fe:00:393243 100 100
 *
 * with device, inode, first and last byte ("EOF" for the end of the file).  So all descriptors of
 * all processes that we may look at are searched for such lines; it costs milliseconds and happens
 * only when an open has just been refused.  Other users' processes stay hidden from an ordinary
 * user.  Source: proc(5); fs/locks.c lock_get_status (format).
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include "base/cleanup.h"
#include "base/strbuf.h"
#include "disk/node.h"
#include "storage/file_lock.h"

enum { HOLDERS_NAMED_MAX = 3, FDINFO_MAX = 8192 };

struct search {
    dev_t dev;
    ino_t ino;
    unsigned perm, unshared; /* what we want */
    struct strbuf text;
    int named;
};

static void closedir_p(DIR **d) {
    if (*d)
        closedir(*d);
}

/* Reads at most cap - 1 bytes of a small file; always NUL-terminated.  Returns the length. */
static size_t read_small(int dirfd, const char *name, char *buf, size_t cap) {
    size_t len = 0;
    int fd AUTO_FD = openat(dirfd, name, O_RDONLY | O_CLOEXEC);
    while (fd >= 0 && len < cap - 1) {
        ssize_t n = read(fd, buf + len, cap - 1 - len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            break;
        len += (size_t)n;
    }
    buf[len] = 0;
    return len;
}

static bool is_number(const char *s) {
    return *s && strspn(s, "0123456789") == strlen(s);
}

/*
 * One "lock:" line.  True when it locks inode `ino`; then the used and unshared permissions that
 * its bytes stand for are added.  A write lock (some other program's, over the whole file perhaps)
 * counts as everything it covers.
 */
static bool parse_lock_line(const char *line, ino_t ino, unsigned *perm, unsigned *unshared) {
    char kind[16], mode[16], type[16], end[32];
    unsigned major, minor;
    uint64_t inode, first, last;
    long pid;
    if (sscanf(line, "lock: %*d: %15s %15s %15s %ld %x:%x:%" SCNu64 " %" SCNu64 " %31s", kind, mode,
               type, &pid, &major, &minor, &inode, &first, end) != 9 ||
        inode != ino)
        return false;
    last = strcmp(end, "EOF") ? strtoull(end, NULL, 10) : UINT64_MAX;
    for (unsigned bit = 0; bit < 4; bit++) {
        if (first <= 100 + bit && last >= 100 + bit)
            *perm |= 1u << bit;
        if (first <= 200 + bit && last >= 200 + bit)
            *unshared |= 1u << bit;
    }
    return true;
}

/* Looks at one descriptor of the process behind proc_dir. */
static bool inspect_fd(struct search *s, int fd_dir, int info_dir, const char *name, unsigned *perm,
                       unsigned *unshared) {
    char *buf AUTO_FREE = malloc(FDINFO_MAX);
    bool found = false;
    if (!buf || !read_small(info_dir, name, buf, FDINFO_MAX))
        return false;
    unsigned p = 0, u = 0;
    for (char *line = buf; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (!strncmp(line, "lock:", 5) && parse_lock_line(line, s->ino, &p, &u))
            found = true;
    }
    struct stat st;
    if (!found || fstatat(fd_dir, name, &st, 0) || st.st_dev != s->dev || st.st_ino != s->ino)
        return false;
    *perm |= p;
    *unshared |= u;
    return true;
}

static void name_holder(struct search *s, int proc_dir, const char *pid, unsigned perm) {
    char comm[64];
    size_t len = read_small(proc_dir, "comm", comm, sizeof(comm));
    if (len && comm[len - 1] == '\n')
        len--;
    if (s->named++)
        strbuf_puts(&s->text, " and ");
    if (strtol(pid, NULL, 10) == (long)getpid()) {
        strbuf_printf(&s->text, "this process (%s", pid);
    } else {
        strbuf_printf(&s->text, "process %s (", pid);
        strbuf_put_safe(&s->text, comm, len);
    }
    strbuf_puts(&s->text, perm & (PERM_WRITE | PERM_RESIZE) ? ", read-write)" : ", read-only)");
}

static void inspect_process(struct search *s, int proc, const char *pid) {
    int dir AUTO_FD = openat(proc, pid, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir < 0)
        return;
    int info AUTO_FD = openat(dir, "fdinfo", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int fds = openat(dir, "fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *list AUTO(closedir_p) = fds >= 0 ? fdopendir(fds) : NULL;
    if (!list) {
        cleanup_fd_(&fds);
        return;
    }
    unsigned perm = 0, unshared = 0;
    bool found = false;
    for (struct dirent *d; info >= 0 && (d = readdir(list));)
        if (is_number(d->d_name))
            found |= inspect_fd(s, dirfd(list), info, d->d_name, &perm, &unshared);
    /* Somebody who holds bytes that do not contradict ours is not to blame. */
    if (found && ((perm & s->unshared) || (unshared & s->perm)))
        name_holder(s, dir, pid, perm);
}

char *file_lock_holders(int fd, unsigned perm, unsigned unshared) {
    struct stat st;
    if (fstat(fd, &st))
        return NULL;
    struct search s = {.dev = st.st_dev, .ino = st.st_ino, .perm = perm, .unshared = unshared};
    DIR *proc AUTO(closedir_p) = opendir("/proc");
    for (struct dirent *d; proc && s.named < HOLDERS_NAMED_MAX && (d = readdir(proc));)
        if (is_number(d->d_name))
            inspect_process(&s, dirfd(proc), d->d_name);
    return s.named ? strbuf_steal(&s.text) : NULL;
}
