/* SPDX-License-Identifier: MIT */
/*
 * The directory of the host, brought to what the plan says.
 *
 * 1. Check.  Every entry that is to be replaced, moved or removed is still what the scan saw
 *    (device, inode, size, time of change), every folder that goes holds nothing but what goes
 *    along, and no new name is taken.  Nothing is written.
 * 2. Stage.  New contents go into files of temporary names in the folder where they belong, new
 *    folders are made whole under a temporary name, and all of it is synced.
 * 3. Switch.  Folders first, each change is one rename: the old or the new, never something in
 *    between.  Then the changed folders are synced.  Only then is removed what the guest deleted,
 *    after another look at it.
 *
 * A name is resolved from the directory's own descriptor, step by step, without following links,
 * so nothing outside is ever reached.  `where` knows the way at any moment of the switch: a folder
 * that has its place already is found by its new names, the others by their old ones.
 *
 * What was left out at the scan (links, special files) is never touched: a name taken by such a
 * file, or a folder to be removed that holds one, is refused.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "disk/io.h"
#include "job/fat_commit_int.h"
#include "runtime/loop.h"

#define COPY_BYTES MIB
#define STEPS_MAX (2 * FAT_DEPTH_MAX + 8)

/* ---- the way to a folder ---- */

/* Names from the innermost outwards; how many. */
static int where(const struct fat_plan *p, bool entry, uint32_t i, const char **names) {
    const struct fat_file *v = p->volume.v;
    int n = 0;
    while (i && n < STEPS_MAX) {
        if (entry) {
            uint32_t file = p->old[i].file;
            if (file != NONE && v[file].placed) {
                entry = false;
                i = file;
                continue;
            }
            names[n++] = p->old[i].aside ? p->old[i].aside : p->t->v[i].name;
            i = p->t->v[i].parent;
        } else if (v[i].placed || v[i].action == FAT_CREATE) {
            names[n++] = !v[i].placed && v[i].temp ? v[i].temp : v[i].host;
            i = v[i].parent;
        } else {
            entry = true;
            i = v[i].match;
        }
    }
    return n;
}

static int open_folder(const struct fat_plan *p, bool entry, uint32_t i) {
    const char *names[STEPS_MAX];
    int n = where(p, entry, i, names);
    int fd = openat(p->t->fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    while (fd >= 0 && n--) {
        int next = openat(fd, names[n], O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        int code = errno;
        close(fd);
        errno = code;
        fd = next;
    }
    return fd < 0 ? -errno : fd;
}

static int host_changed(const struct fat_plan *p, uint32_t entry, struct err *e) {
    AUTO_FREE char *path = fat_path(p->t, entry);
    err_set(e, EBUSY, "%s changed in the directory since it was shown to the guest", path);
    return -EBUSY;
}

/* The entry, under `name` in the folder `fd`, is what the scan saw. */
static int check_same(const struct fat_plan *p, int fd, const char *name, uint32_t entry,
                      struct err *e) {
    const struct fat_entry *x = &p->t->v[entry];
    struct stat st;
    if (fstatat(fd, name, &st, AT_SYMLINK_NOFOLLOW) || st.st_dev != x->dev || st.st_ino != x->ino)
        return host_changed(p, entry, e);
    if (x->is_dir)
        return S_ISDIR(st.st_mode) ? 0 : host_changed(p, entry, e);
    if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size != x->size ||
        st.st_mtim.tv_sec != x->mtime.tv_sec || st.st_mtim.tv_nsec != x->mtime.tv_nsec)
        return host_changed(p, entry, e);
    return 0;
}

/* Opens the folder that an entry lies in now. */
static int open_parent(const struct fat_plan *p, uint32_t entry, struct err *e) {
    int fd = open_folder(p, true, p->t->v[entry].parent);
    return fd < 0 ? host_changed(p, entry, e) : fd;
}

/* ---- 1: check ---- */

/* Names in the folder can be changed by us. */
static int check_writable(int fd, const char *path, struct err *e) {
    return faccessat(fd, ".", W_OK | X_OK, AT_EACCESS)
               ? err_errno(e, errno, "the directory that %s lies in", path)
               : 0;
}

/* The entry can be replaced, moved or removed. */
static int check_entry(const struct fat_plan *p, uint32_t entry, struct err *e) {
    struct stat st;
    AUTO_FD int fd = open_parent(p, entry, e);
    int r = fd < 0 ? fd : check_same(p, fd, p->t->v[entry].name, entry, e);
    if (r < 0)
        return r;
    AUTO_FREE char *path = fat_path(p->t, entry);
    if (fstat(fd, &st))
        return host_changed(p, entry, e);
    if (st.st_dev != p->t->v[entry].dev)
        return err_set(e, EBUSY, "%s is a mount point, which stays where it is", path);
    return check_writable(fd, path, e);
}

/* A rename stays in its file system. */
static int check_move(const struct fat_plan *p, uint32_t i, struct err *e) {
    const struct fat_file *v = p->volume.v;
    struct stat st;
    uint32_t up = v[i].parent;
    while (v[up].match == NONE)
        up = v[up].parent;
    AUTO_FD int fd = open_folder(p, true, v[up].match);
    if (fd < 0 || fstat(fd, &st))
        return host_changed(p, v[up].match, e);
    if (st.st_dev == p->t->v[v[i].match].dev)
        return 0;
    AUTO_FREE char *path = fat_volume_path(&p->volume, i);
    return err_set(e, EXDEV, "%s was moved to another file system of the host", path);
}

/* The entry of that name in a folder, or NONE. */
static uint32_t find_entry(const struct fat_plan *p, uint32_t dir, const char *name) {
    const struct fat_entry *d = &p->t->v[dir];
    uint32_t low = 0, high = d->children;
    while (low < high) {
        uint32_t mid = low + (high - low) / 2;
        int order = strcmp(name, p->t->v[d->first_child + mid].name);
        if (order == 0)
            return d->first_child + mid;
        if (order < 0)
            high = mid;
        else
            low = mid + 1;
    }
    return NONE;
}

static int check_file(const struct fat_plan *p, uint32_t i, struct err *e) {
    const struct fat_file *n = &p->volume.v[i];
    uint32_t parent = p->volume.v[n->parent].match, like = n->match == NONE ? n->like : n->match;
    struct stat st;
    int r = like == NONE ? 0 : check_entry(p, like, e);
    if (r == 0 && n->action == FAT_MOVE)
        r = check_move(p, i, e);
    if (r < 0 || n->action == FAT_REPLACE || parent == NONE)
        return r;
    AUTO_FD int fd = open_folder(p, true, parent);
    if (fd < 0 || fstat(fd, &st))
        return host_changed(p, parent, e);
    const struct fat_entry *d = &p->t->v[parent];
    if (parent && (st.st_dev != d->dev || st.st_ino != d->ino))
        return host_changed(p, parent, e);
    AUTO_FREE char *path = fat_volume_path(&p->volume, i);
    uint32_t x = find_entry(p, parent, n->host);
    if (fstatat(fd, n->host, &st, AT_SYMLINK_NOFOLLOW) == 0 && (x == NONE || !p->old[x].blocked)) {
        err_set(e, EEXIST, "%s is new in the guest, and a file of the directory has its name",
                path);
        return -EEXIST;
    }
    return check_writable(fd, path, e);
}

/* A folder that is to be removed holds nothing that the guest did not see. */
static int check_folder(const struct fat_plan *p, uint32_t dir, struct err *e) {
    int fd = open_folder(p, true, dir);
    DIR *d = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *de;
    int r = 0;
    if (!d) {
        if (fd >= 0)
            close(fd);
        return host_changed(p, dir, e);
    }
    errno = 0;
    while (r == 0 && (de = readdir(d))) {
        if (strcmp(de->d_name, ".") && strcmp(de->d_name, "..") &&
            find_entry(p, dir, de->d_name) == NONE) {
            AUTO_FREE char *path = fat_path(p->t, dir);
            r = err_set(e, ENOTEMPTY,
                        "the guest removed %s, which holds '%s' that it was not shown", path,
                        de->d_name);
        }
    }
    closedir(d);
    return r;
}

int fat_apply_check(struct fat_plan *p, struct err *e) {
    int r = 0;
    for (uint32_t i = 1; r == 0 && i < p->volume.count; i++)
        if (p->volume.v[i].action != FAT_KEEP)
            r = check_file(p, i, e);
    for (uint32_t i = 1; r == 0 && i < p->t->count; i++) {
        if (p->old[i].file != NONE)
            continue;
        r = check_entry(p, i, e);
        if (r == 0 && p->t->v[i].is_dir)
            r = check_folder(p, i, e);
    }
    return r;
}

/* ---- 2: stage ---- */

static char *temp_name(struct fat_plan *p) {
    char *name;
    int n = asprintf(&name, FAT_TEMP_PREFIX "%ld-%u", (long)getpid(), p->serial++);
    return n < 0 ? NULL : name;
}

static bool is_new_folder(const struct fat_plan *p, uint32_t i) {
    return p->volume.v[i].action == FAT_CREATE;
}

struct stage {
    struct fat_plan *p;
    uint32_t file;
    int fd; /* of a file; -1 */
    void *buf;
};

/* Makes the file or folder; its name is temporary unless its folder is new itself. */
static int stage_open(void *arg) {
    struct stage *s = arg;
    struct fat_plan *p = s->p;
    struct fat_file *n = &p->volume.v[s->file];
    AUTO_FD int dir = open_folder(p, false, n->parent);
    if (dir < 0)
        return dir;
    for (int tries = 0; tries < 1000; tries++) {
        bool temp = !is_new_folder(p, n->parent);
        free(n->temp);
        n->temp = temp ? temp_name(p) : NULL;
        if (temp && !n->temp)
            return -ENOMEM;
        const char *name = temp ? n->temp : n->host;
        if (n->is_dir)
            s->fd = mkdirat(dir, name, 0777) ? -errno : -1;
        else if ((s->fd = openat(dir, name, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
                                 n->read_only ? 0444 : 0666)) < 0)
            s->fd = -errno;
        int r = n->is_dir ? (s->fd == -1 ? 0 : s->fd) : s->fd < 0 ? s->fd : 0;
        if (r == 0)
            n->staged = true;
        if (r != -EEXIST || !temp)
            return r;
    }
    return -EEXIST;
}

/* Local time, as FAT has it; what is no time stays as it is. */
static void set_time(int fd, const struct fat_file *n) {
    struct tm tm = {.tm_sec = (n->time & 31) * 2,
                    .tm_min = n->time >> 5 & 63,
                    .tm_hour = n->time >> 11,
                    .tm_mday = n->date & 31,
                    .tm_mon = (n->date >> 5 & 15) - 1,
                    .tm_year = 80 + (n->date >> 9),
                    .tm_isdst = -1};
    if (!tm.tm_mday || tm.tm_mon < 0 || tm.tm_mon > 11 || tm.tm_hour > 23 || tm.tm_min > 59 ||
        tm.tm_sec > 59)
        return;
    struct timespec ts[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_sec = mktime(&tm)}};
    if (ts[1].tv_sec != (time_t)-1)
        (void)futimens(fd, ts);
}

static int stage_close(void *arg) {
    struct stage *s = arg;
    struct fat_plan *p = s->p;
    struct fat_file *n = &p->volume.v[s->file];
    struct stat st;
    int r = ftruncate(s->fd, n->size) ? -errno : 0;
    if (r == 0 && n->like != NONE) {
        const struct fat_entry *x = &p->t->v[n->like];
        AUTO_FD int dir = open_folder(p, true, x->parent);
        if (dir < 0 || fstatat(dir, x->name, &st, AT_SYMLINK_NOFOLLOW))
            return -ESTALE;
        /* Owner first, as that clears bits of the mode; without the right to it the file is ours.
         */
        (void)!fchown(s->fd, st.st_uid, st.st_gid);
        if (fchmod(s->fd, st.st_mode & 0777))
            r = -errno;
    }
    set_time(s->fd, n);
    return r == 0 && fsync(s->fd) ? -errno : r;
}

static int write_all_co(int fd, uint8_t *buf, size_t length, uint64_t at) {
    while (length) {
        struct iovec v = {buf, length};
        ssize_t n = loop_pwritev_co(fd, &v, 1, at, 0);
        if (n <= 0)
            return n < 0 ? (int)n : -EIO;
        buf += n;
        at += (size_t)n;
        length -= (size_t)n;
    }
    return 0;
}

/* Zeros stay a hole: the file gets its length at the end. */
static int stage_piece_co(void *arg, uint64_t at, uint64_t offset, uint64_t length) {
    struct stage *s = arg;
    for (uint64_t n; length; at += n, offset += n, length -= n) {
        struct status st;
        int r = disk_status_co(s->p->overlay, offset, length, STATUS_PRECISE, &st);
        if (r < 0)
            return r;
        n = min_u64(st.length, length);
        if (st.zero)
            continue;
        n = min_u64(n, COPY_BYTES);
        r = disk_pread_co(s->p->overlay, offset, s->buf, n);
        if (r == 0 && !bytes_are_zero(s->buf, n))
            r = write_all_co(s->fd, s->buf, n, at);
        if (r < 0)
            return r;
    }
    return 0;
}

static int stage_file_co(struct stage *s) {
    int r = offload_blocking_co(stage_open, s);
    if (r < 0 || s->fd < 0)
        return r;
    r = fat_volume_runs_co(&s->p->volume, s->file, stage_piece_co, s);
    if (r == 0)
        r = offload_blocking_co(stage_close, s);
    close(s->fd);
    return r;
}

/* New folders are durable before they get their names. */
static int sync_new(void *arg) {
    struct fat_plan *p = arg;
    for (uint32_t i = 1; i < p->volume.count; i++) {
        if (!p->volume.v[i].is_dir || !p->volume.v[i].staged)
            continue;
        AUTO_FD int fd = open_folder(p, false, i);
        if (fd < 0 || fsync(fd))
            return fd < 0 ? fd : -errno;
    }
    return 0;
}

int fat_apply_stage_co(struct fat_plan *p, struct err *e) {
    void *buf = buf_get(COPY_BYTES);
    int r = buf ? 0 : -ENOMEM;
    uint32_t i = 1;
    for (; r == 0 && i < p->volume.count; i++) {
        const struct fat_file *n = &p->volume.v[i];
        struct stage s = {p, i, -1, buf};
        if (n->action == FAT_CREATE || n->action == FAT_REPLACE)
            r = stage_file_co(&s);
    }
    buf_put(buf, COPY_BYTES);
    if (r < 0) {
        AUTO_FREE char *path = fat_volume_path(&p->volume, i - 1);
        return err_errno(e, -r, "writing %s", path);
    }
    r = offload_blocking_co(sync_new, p);
    return r < 0 ? err_errno(e, -r, "syncing new folders") : 0;
}

void fat_apply_unstage(struct fat_plan *p) {
    /* What came into place with its folder stays. */
    for (uint32_t i = 1; i < p->volume.count; i++) {
        struct fat_file *n = &p->volume.v[i];
        if (n->staged && !n->temp && p->volume.v[n->parent].placed) {
            n->staged = false;
            n->placed = true;
        }
    }
    for (uint32_t i = p->volume.count; i-- > 1;) {
        struct fat_file *n = &p->volume.v[i];
        if (!n->staged)
            continue;
        AUTO_FD int dir = open_folder(p, false, n->parent);
        if (dir >= 0)
            unlinkat(dir, n->temp ? n->temp : n->host, n->is_dir ? AT_REMOVEDIR : 0);
        n->staged = false;
    }
}

/* ---- 3: switch ---- */

/* A rename that replaces nothing, as far as the file system can promise that. */
static int rename_new(int from_fd, const char *from, int to_fd, const char *to) {
    struct stat st;
    if (renameat2(from_fd, from, to_fd, to, RENAME_NOREPLACE) == 0)
        return 0;
    if (errno != EINVAL && errno != ENOSYS)
        return -errno;
    if (fstatat(to_fd, to, &st, AT_SYMLINK_NOFOLLOW) == 0)
        return -EEXIST;
    return renameat(from_fd, from, to_fd, to) ? -errno : 0;
}

static int fail(const struct fat_plan *p, uint32_t file, int code, struct err *e) {
    AUTO_FREE char *path = fat_volume_path(&p->volume, file);
    return err_errno(e, -code, "%s", path);
}

/* Entries whose name is wanted for something of another kind; they are deleted ones all. */
static int step_aside(struct fat_plan *p, uint32_t entry, struct err *e) {
    const struct fat_entry *x = &p->t->v[entry];
    AUTO_FD int fd = open_parent(p, entry, e);
    int r = fd < 0 ? fd : check_same(p, fd, x->name, entry, e);
    char *name AUTO_FREE = r < 0 ? NULL : temp_name(p);
    if (r < 0)
        return r;
    r = name ? rename_new(fd, x->name, fd, name) : -ENOMEM;
    if (r < 0) {
        AUTO_FREE char *path = fat_path(p->t, entry);
        return err_errno(e, -r, "%s", path);
    }
    p->old[entry].aside = steal(&name);
    p->done++;
    return 0;
}

static int place(struct fat_plan *p, uint32_t i, struct err *e) {
    struct fat_file *n = &p->volume.v[i], *parent = &p->volume.v[n->parent];
    bool inside = n->action == FAT_CREATE && !n->temp; /* came with its folder */
    int r = 0;
    if (n->action != FAT_KEEP && !inside) {
        AUTO_FD int to = open_folder(p, false, n->parent);
        if (to < 0)
            return fail(p, i, to, e);
        if (n->action == FAT_CREATE) {
            r = rename_new(to, n->temp, to, n->host);
        } else {
            AUTO_FD int from = open_parent(p, n->match, e);
            r = from < 0 ? from : check_same(p, from, p->t->v[n->match].name, n->match, e);
            if (r < 0)
                return r;
            if (n->action == FAT_MOVE)
                r = rename_new(from, p->t->v[n->match].name, to, n->host);
            else
                r = renameat(to, n->temp, to, n->host) ? -errno : 0;
        }
        if (r < 0)
            return fail(p, i, r, e);
        parent->sync_dir = true;
        p->done++;
    }
    n->placed = true;
    n->staged = false;
    return 0;
}

static int sync_folders(struct fat_plan *p, struct err *e) {
    for (uint32_t i = 0; i < p->volume.count; i++) {
        if (!p->volume.v[i].sync_dir)
            continue;
        p->volume.v[i].sync_dir = false;
        AUTO_FD int fd = open_folder(p, false, i);
        if (fd < 0 || fsync(fd))
            return fail(p, i, fd < 0 ? fd : -errno, e);
    }
    return 0;
}

static int remove_entry(struct fat_plan *p, uint32_t entry, struct err *e) {
    const struct fat_entry *x = &p->t->v[entry];
    const char *name = p->old[entry].aside ? p->old[entry].aside : x->name;
    AUTO_FD int fd = open_parent(p, entry, e);
    int r = fd < 0 ? fd : check_same(p, fd, name, entry, e);
    if (r < 0)
        return r;
    if (unlinkat(fd, name, x->is_dir ? AT_REMOVEDIR : 0)) {
        int code = errno;
        AUTO_FREE char *path = fat_path(p->t, entry);
        return err_errno(e, code, "removing %s", path);
    }
    uint32_t parent = p->old[x->parent].file;
    if (parent != NONE)
        p->volume.v[parent].sync_dir = true;
    p->done++;
    return 0;
}

static void count_changes(struct fat_plan *p) {
    for (uint32_t i = 1; i < p->volume.count; i++) {
        const struct fat_file *n = &p->volume.v[i];
        p->changes += n->action != FAT_KEEP && !(n->action == FAT_CREATE && !n->temp);
    }
    for (uint32_t i = 1; i < p->t->count; i++)
        p->changes += (p->old[i].file == NONE) + p->old[i].blocked;
}

int fat_apply_switch(struct fat_plan *p, struct err *e) {
    int r = 0;
    count_changes(p);
    for (uint32_t i = 1; r == 0 && i < p->t->count; i++)
        if (p->old[i].blocked)
            r = step_aside(p, i, e);
    for (uint32_t i = 1; r == 0 && i < p->volume.count; i++)
        r = place(p, i, e);
    if (r == 0)
        r = sync_folders(p, e);
    for (uint32_t i = p->t->count; r == 0 && i-- > 1;)
        if (p->old[i].file == NONE)
            r = remove_entry(p, i, e);
    return r == 0 ? sync_folders(p, e) : r;
}
