/* SPDX-License-Identifier: MIT */
/*
 * The tree of names below a directory; see fat.h.
 *
 * Breadth first: the queue is the array itself, so depth costs no stack.  Symbolic links and
 * special files are counted and left out: following a link could show a guest what lies outside,
 * and a FIFO or a device has no content to show.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "storage/fat.h"

static void close_dir(DIR **d) {
    if (*d)
        closedir(*d);
}

void fat_tree_free(struct fat_tree *t) {
    for (uint32_t i = 0; i < t->count; i++)
        free(t->v[i].name);
    free(t->v);
    free(t->runs);
    if (t->fd >= 0)
        close(t->fd);
    *t = (struct fat_tree){.fd = -1};
}

char *fat_path(const struct fat_tree *t, uint32_t index) {
    size_t length = 0, at;
    for (uint32_t i = index; i; i = t->v[i].parent)
        length += strlen(t->v[i].name) + 1;
    if (!length)
        return xstrdup(".");
    char *path = xcalloc(1, at = length);
    for (uint32_t i = index; i; i = t->v[i].parent) {
        size_t n = strlen(t->v[i].name);
        if (at < length)
            path[at - 1] = '/';
        at -= n + 1;
        memcpy(path + at, t->v[i].name, n);
    }
    return path;
}

/* The folder of `index`, step by step from the root without following a link.  t->fd for the root
 * itself: *own says whether to close the result. */
static int open_folder(const struct fat_tree *t, uint32_t index, bool *own) {
    uint32_t chain[FAT_DEPTH_MAX + 1];
    int depth = 0, fd = t->fd;
    *own = false;
    for (uint32_t i = index; i; i = t->v[i].parent)
        chain[depth++] = i;
    while (depth--) {
        int next =
            openat(fd, t->v[chain[depth]].name, O_PATH | O_NOFOLLOW | O_DIRECTORY | O_CLOEXEC);
        int code = errno;
        if (*own)
            close(fd);
        if (next < 0)
            return -code;
        fd = next;
        *own = true;
    }
    return fd;
}

int fat_open_file(const struct fat_tree *t, uint32_t index) {
    const struct fat_entry *f = &t->v[index];
    struct stat st;
    bool own;
    int folder = open_folder(t, f->parent, &own), r = -ESTALE, fd = -1;
    if (folder < 0)
        return folder;
    /* Looked at first: opening alone could wake a device that took the name. */
    if (fstatat(folder, f->name, &st, AT_SYMLINK_NOFOLLOW))
        r = -errno;
    else if (S_ISREG(st.st_mode) &&
             (fd = openat(folder, f->name,
                          O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY)) < 0)
        r = -errno;
    if (own)
        close(folder);
    if (fd < 0)
        return r;
    if (!fstat(fd, &st) && S_ISREG(st.st_mode) && st.st_dev == f->dev && st.st_ino == f->ino)
        return fd;
    close(fd);
    return -ESTALE;
}

static void set_times(struct fat_entry *f, time_t when) {
    struct tm tm;
    if (!localtime_r(&when, &tm) || tm.tm_year < 80)
        tm = (struct tm){.tm_year = 80, .tm_mday = 1};
    if (tm.tm_year > 80 + 127)
        tm = (struct tm){.tm_year = 80 + 127, .tm_mon = 11, .tm_mday = 31};
    int sec = tm.tm_sec > 59 ? 59 : tm.tm_sec;
    f->date = (uint16_t)(tm.tm_mday | (tm.tm_mon + 1) << 5 | (tm.tm_year - 80) << 9);
    f->time = (uint16_t)(sec / 2 | tm.tm_min << 5 | tm.tm_hour << 11);
}

static struct fat_entry *add_entry(struct fat_tree *t, const char *name, struct err *e) {
    if (t->count == FAT_ENTRIES_MAX) {
        err_set(e, EFBIG, "there are more than %d files and directories", FAT_ENTRIES_MAX);
        return NULL;
    }
    if (t->count == t->room) {
        uint32_t room = t->room ? t->room * 2 : 64;
        struct fat_entry *v = realloc(t->v, room * sizeof(*v));
        if (!v) {
            err_set(e, ENOMEM, "no memory for the names");
            return NULL;
        }
        t->v = v;
        t->room = room;
    }
    struct fat_entry *f = &t->v[t->count];
    *f = (struct fat_entry){.name = strdup(name)};
    if (!f->name) {
        err_set(e, ENOMEM, "no memory for the names");
        return NULL;
    }
    t->count++;
    return f;
}

static int add_child(struct fat_tree *t, uint32_t parent, int fd, const char *name, struct err *e) {
    struct stat st;
    if (fstatat(fd, name, &st, AT_SYMLINK_NOFOLLOW))
        return errno == ENOENT ? 0 : err_errno(e, errno, "%s", name); /* gone since */
    if (S_ISLNK(st.st_mode)) {
        t->links++;
        return 0;
    }
    if ((!S_ISREG(st.st_mode) && !S_ISDIR(st.st_mode)) ||
        !strncmp(name, FAT_TEMP_PREFIX, strlen(FAT_TEMP_PREFIX))) {
        t->special++;
        return 0;
    }
    bool is_dir = S_ISDIR(st.st_mode);
    if (!is_dir && st.st_size > UINT32_MAX)
        return err_set(e, EFBIG, "'%s' has %lld bytes, and a file on FAT at most %u", name,
                       (long long)st.st_size, UINT32_MAX);
    if (is_dir && t->v[parent].depth == FAT_DEPTH_MAX)
        return err_set(e, EFBIG, "'%s' is more than %d directories deep", name, FAT_DEPTH_MAX);
    struct fat_entry *f = add_entry(t, name, e);
    if (!f)
        return e ? -e->code : -ENOMEM;
    f->is_dir = is_dir;
    f->parent = parent;
    f->depth = (uint16_t)(t->v[parent].depth + 1);
    f->size = is_dir ? 0 : (uint32_t)st.st_size;
    f->read_only = !is_dir && !(st.st_mode & 0222);
    f->sparse = !is_dir && (uint64_t)st.st_blocks * 512 < (uint64_t)st.st_size;
    f->dev = st.st_dev;
    f->ino = st.st_ino;
    f->mtime = st.st_mtim;
    set_times(f, st.st_mtime);
    *(is_dir ? &t->dirs : &t->files) += 1;
    return 0;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const struct fat_entry *)a)->name, ((const struct fat_entry *)b)->name);
}

static int scan_folder(struct fat_tree *t, uint32_t dir, struct err *e) {
    bool own;
    int at = open_folder(t, dir, &own);
    int fd = at < 0 ? at : openat(at, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NONBLOCK);
    int code = at < 0 ? -at : errno;
    if (at >= 0 && own)
        close(at);
    DIR *d AUTO(close_dir) = fd < 0 ? NULL : fdopendir(fd);
    if (!d) {
        code = fd < 0 ? code : errno;
        if (fd >= 0)
            close(fd);
        return err_errno(e, code, "reading the directory");
    }
    uint32_t first = t->count;
    struct dirent *de;
    int r = 0;
    errno = 0;
    while (!r && (de = readdir(d))) {
        if (strcmp(de->d_name, ".") && strcmp(de->d_name, ".."))
            r = add_child(t, dir, dirfd(d), de->d_name, e);
        errno = 0;
    }
    if (!r && errno)
        r = err_errno(e, errno, "reading the directory");
    t->v[dir].first_child = first;
    t->v[dir].children = t->count - first;
    if (!r && t->count > first)
        qsort(t->v + first, t->count - first, sizeof(*t->v), by_name);
    return r ? r : fat_name_children(t, dir, e);
}

static int scan(const char *dir, const char *label, struct fat_tree *t, struct err *e) {
    t->fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NONBLOCK);
    if (t->fd < 0)
        return err_errno(e, errno, "directory '%s'", dir);
    struct fat_entry *root = add_entry(t, "", e);
    if (!root)
        return -ENOMEM;
    struct stat st;
    root->is_dir = true;
    if (!fstat(t->fd, &st))
        set_times(root, st.st_mtime);
    memcpy(t->label, label, strlen(label));
    for (uint32_t i = 0; i < t->count; i++) {
        if (!t->v[i].is_dir)
            continue;
        int r = scan_folder(t, i, e);
        if (r < 0) {
            char *path AUTO_FREE = fat_path(t, i);
            return i ? err_prefix(e, "%s: %s", dir, path) : err_prefix(e, "%s", dir);
        }
    }
    return 0;
}

int fat_scan(const char *dir, const char *label, struct fat_tree *t, struct err *e) {
    *t = (struct fat_tree){.fd = -1};
    int r = scan(dir, label, t, e);
    if (r < 0)
        fat_tree_free(t);
    return r;
}
