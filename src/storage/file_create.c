/* SPDX-License-Identifier: MIT */
/*
 * New files: under a name, without one, and the moment in between.
 *
 * An unnamed file (O_TMPFILE in the target's folder) leaves nothing behind on any exit, kill -9
 * included, and gets its final name when it is whole: link_co.  Where the file system has no
 * O_TMPFILE a hidden unique name stands in; it is renamed at link and removed at close.  A scratch
 * file is unnamed for good: O_TMPFILE, else created and unlinked at once.
 *
 * Link: give back what was allocated ahead, fsync, take the name, fsync the folder.  A crash before
 * the last step leaves either no file or the whole one.  To replace an existing file the new one
 * is linked under a unique hidden name first and renamed over it, which is atomic; mode and owner
 * of the old file stay, and so does a symbolic link that names it (its target is replaced).  A node
 * with NODE_NO_FLUSH (cache=unsafe) skips the fsyncs: the user has chosen speed.
 *
 * An existing block device is never created: it is opened and must be large enough.
 *
 * Facts: open(2) O_TMPFILE and its linkat example, renameat2(2), fsync(2) on folders.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>
#include "base/cleanup.h"
#include "base/err.h"
#include "base/log.h"
#include "disk/open.h"
#include "runtime/loop.h"
#include "storage/file.h"

enum { SYMLINKS_MAX = 40, TEMP_TRIES_MAX = 64 };

/* Folder part of a path: "." when it has none.  Owned. */
static char *path_folder(const char *path) {
    const char *slash = strrchr(path, '/');
    if (!slash)
        return xstrdup(".");
    return xstrndup(path, slash == path ? 1 : (size_t)(slash - path));
}

/* Follows the symbolic links of the last component, dangling ones too.  *out is owned. */
static int path_resolve(const char *path, char **out, struct err *e) {
    if (!*path)
        return err_set(e, EINVAL, "the file name is empty");
    char *now AUTO_FREE = xstrdup(path);
    char *to AUTO_FREE = malloc(PATH_MAX);
    for (int i = 0; to && i < SYMLINKS_MAX; i++) {
        ssize_t len = readlink(now, to, PATH_MAX - 1);
        if (len < 0) {
            *out = steal(&now);
            return 0;
        }
        to[len] = 0;
        char *folder AUTO_FREE = path_folder(now);
        char *next = *to == '/' ? xstrdup(to) : xasprintf("%s/%s", folder, to);
        free(now);
        now = next;
    }
    if (!to)
        return err_set(e, ENOMEM, "out of memory");
    return err_set(e, ELOOP, "more than %d symbolic links", SYMLINKS_MAX);
}

/* A hidden unique name in the folder of `path`.  Owned; NULL when there is no randomness. */
static char *temp_name(const char *path) {
    uint64_t r;
    if (getrandom(&r, sizeof(r), 0) != sizeof(r))
        return NULL;
    char *folder AUTO_FREE = path_folder(path);
    return xasprintf("%s/.strata-%016" PRIx64 ".tmp", folder, r);
}

/* Creates under a hidden name; *name is owned. */
static int create_hidden(const char *path, int flags, char **name, struct err *e) {
    for (int i = 0; i < TEMP_TRIES_MAX; i++) {
        char *temp AUTO_FREE = temp_name(path);
        if (!temp)
            return err_set(e, EIO, "the system gives no random bytes");
        int fd = open(temp, flags | O_CREAT | O_EXCL, 0644);
        if (fd >= 0) {
            *name = steal(&temp);
            return fd;
        }
        if (errno == EINVAL && (flags & O_DIRECT))
            return file_no_direct(e);
        if (errno != EEXIST && errno != EINTR)
            return err_errno(e, errno, "cannot create a file in the folder");
    }
    return err_set(e, EEXIST, "found no free temporary name");
}

static int create_unnamed(struct file_state *s, const char *path, bool scratch, int flags,
                          struct err *e) {
    char *folder AUTO_FREE = scratch ? xstrdup(path) : path_folder(path);
    int fd;
    do
        fd = open(folder, flags | O_TMPFILE, 0644);
    while (fd < 0 && errno == EINTR);
    if (fd >= 0)
        return fd;
    /* What kernels and file systems without it answer; all else is about the folder itself. */
    int code = errno;
    struct stat st;
    if ((code != EOPNOTSUPP && code != EISDIR && code != EINVAL) || stat(folder, &st) ||
        !S_ISDIR(st.st_mode))
        return err_errno(e, code, scratch ? "scratch folder %s" : "cannot create a file in %s",
                         folder);
    char *inside AUTO_FREE = xasprintf("%s/.", folder);
    fd = create_hidden(inside, flags, &s->temp_path, e);
    if (fd >= 0 && scratch) {
        unlink(s->temp_path);
        free(s->temp_path);
        s->temp_path = NULL;
    }
    return fd;
}

/*
 * Whether somebody uses the file that is about to be replaced: the permissions are those of a
 * writer that shares with readers only.  An unreadable file is refused: it cannot be asked.
 */
static int check_unused(const char *path, const struct file_opts *o, struct err *e) {
    struct file_lock held = {0};
    struct stat st;
    struct err why AUTO_ERR = ERR_INIT;
    if (o && o->locking == LOCKING_OFF)
        return 0;
    int fd AUTO_FD = file_open_path(path, O_RDONLY, &st, e);
    if (fd < 0)
        return fd;
    int r = file_lock_take(fd, &held, PERM_WRITE | PERM_RESIZE, PERM_CONSISTENT_READ, &why);
    if (!r || (file_lock_unsupported(-r) && (!o || o->locking == LOCKING_AUTO)))
        return 0;
    err_move(e, &why);
    return r;
}

/* What stands at the target now.  0: a file may be made (or replaced); *device: open it instead. */
static int check_target(const char *path, bool replace, const struct file_opts *o, bool *device,
                        struct err *e) {
    struct stat st;
    *device = false;
    if (stat(path, &st))
        return errno == ENOENT ? 0 : err_errno(e, errno, "cannot create");
    int r = file_check_type(&st, device, e);
    if (r || *device)
        return r;
    if (!replace)
        return err_set(e, EEXIST, "file exists");
    return check_unused(path, o, e);
}

int file_create_co(struct node *n, struct create_ctx *ctx, struct err *e) {
    struct file_state *s = file_state(n);
    struct file_opts *o = n->opts;
    int flags = O_RDWR | O_CLOEXEC | (n->flags & NODE_DIRECT ? O_DIRECT : 0);
    bool scratch = ctx->flags & CREATE_SCRATCH, unnamed = ctx->flags & CREATE_UNNAMED;
    bool replace = ctx->flags & CREATE_REPLACE, device = false;
    char *path AUTO_FREE = NULL;
    int r = path_resolve(file_path(ctx->name), &path, e);
    if (!r && !scratch)
        r = check_target(path, replace, o, &device, e);
    if (r)
        return r;

    bool made = !device && !unnamed && !scratch && access(path, F_OK);
    struct stat st;
    int fd = device ? file_open_path(path, flags, &st, e)
             : unnamed || scratch
                 ? create_unnamed(s, path, scratch, flags, e)
                 : file_open_path(path, flags | O_CREAT | (replace ? 0 : O_EXCL), &st, e);
    if (fd < 0)
        return fd;
    s->fd = fd;
    s->opened = true;
    s->unnamed = !device && (unnamed || scratch);
    s->scratch = scratch;
    s->first_block = ctx->flags & CREATE_FIRST_BLOCK;
    s->size_limit = ctx->size_limit;
    if (o && !o->filename)
        o->filename = xstrdup(path);
    r = file_take_locks(n, e);
    if (!r && fstat(fd, &st))
        r = err_errno(e, errno, "cannot stat");
    if (!r && !device && st.st_size && ftruncate(fd, 0))
        r = err_errno(e, errno, "cannot empty the file");
    st.st_size = device ? st.st_size : 0;
    if (!r)
        r = file_adopt(n, &st, e);
    if (!r && ctx->size > n->size)
        r = file_truncate_co(n, ctx->size, PREALLOC_OFF, e);
    if (r && made)
        unlink(path);
    return r;
}

void file_tune_new(struct node *n, const struct create_file_opts *o) {
    const struct file_state *s = file_state(n);
    struct fsxattr x;
    int flags;
    if (s->is_block)
        return;
    if (o->nocow && !ioctl(s->fd, FS_IOC_GETFLAGS, &flags)) {
        flags |= FS_NOCOW_FL;
        ioctl(s->fd, FS_IOC_SETFLAGS, &flags);
    }
    if (o->extent_size_hint && !ioctl(s->fd, FS_IOC_FSGETXATTR, &x)) {
        x.fsx_xflags |= FS_XFLAG_EXTSIZE;
        x.fsx_extsize = (uint32_t)o->extent_size_hint;
        if (ioctl(s->fd, FS_IOC_FSSETXATTR, &x))
            log_msg(LOG_LV_WARN, "Failed to set extent size hint: %s", strerror(errno));
    }
}

/* ------------------------------------------------------------------- link */

struct sync_work {
    int fd;
};

static int fsync_work(void *arg) {
    const struct sync_work *w = arg;
    return fsync(w->fd) ? -errno : 0;
}

static int sync_folder_co(const char *path, struct err *e) {
    char *folder AUTO_FREE = path_folder(path);
    int fd AUTO_FD = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return 0; /* a folder that may be written but not read: nothing more can be done */
    struct sync_work w = {.fd = fd};
    int r = offload_blocking_co(fsync_work, &w);
    return r && r != -EINVAL ? err_errno(e, -r, "cannot sync the folder") : 0;
}

/* From the hidden name to `path`, which must be free. */
static int rename_hidden(struct file_state *s, const char *path) {
    if (renameat2(AT_FDCWD, s->temp_path, AT_FDCWD, path, RENAME_NOREPLACE)) {
        if (errno != EINVAL && errno != ENOSYS)
            return -errno;
        /* File systems without that flag: a hard link refuses an existing name too. */
        if (link(s->temp_path, path))
            return -errno;
        unlink(s->temp_path);
    }
    free(s->temp_path);
    s->temp_path = NULL;
    return 0;
}

/* Gives the open file the name `path`, which must be free. */
static int link_as(struct file_state *s, const char *path) {
    char self[32];
    if (s->temp_path)
        return rename_hidden(s, path);
    snprintf(self, sizeof(self), "/proc/self/fd/%d", s->fd);
    if (!linkat(AT_FDCWD, self, AT_FDCWD, path, AT_SYMLINK_FOLLOW))
        return 0;
    int code = errno;
    /* Without /proc: needs a capability, or kernel 6.10. */
    if (code == ENOENT && access(self, F_OK) && !linkat(s->fd, "", AT_FDCWD, path, AT_EMPTY_PATH))
        return 0;
    return -code;
}

/* Mode and owner of the file that is replaced; what we may not set stays ours. */
static void inherit_mode(struct file_state *s, const char *path) {
    struct stat st;
    if (stat(path, &st) || !S_ISREG(st.st_mode))
        return;
    struct stat own;
    bool same = !fstat(s->fd, &own) && own.st_uid == st.st_uid && own.st_gid == st.st_gid;
    if (same || !fchown(s->fd, st.st_uid, st.st_gid))
        fchmod(s->fd, st.st_mode & 0777);
}

static int replace_as(struct file_state *s, const char *path) {
    int r = -EEXIST;
    for (int i = 0; r == -EEXIST && !s->temp_path && i < TEMP_TRIES_MAX; i++) {
        char *temp AUTO_FREE = temp_name(path);
        r = temp ? link_as(s, temp) : -EIO;
        if (!r)
            s->temp_path = steal(&temp);
    }
    if (!s->temp_path)
        return r;
    if (rename(s->temp_path, path))
        return -errno; /* the hidden name goes at close, or serves the next try */
    free(s->temp_path);
    s->temp_path = NULL;
    return 0;
}

int file_link_co(struct node *n, const char *name, bool replace, struct err *e) {
    struct file_state *s = file_state(n);
    struct file_opts *o = n->opts;
    bool device;
    char *path AUTO_FREE = NULL;
    int r = path_resolve(file_path(name), &path, e);
    if (r)
        return r;
    if (s->is_block) /* has had its name all the time */
        return file_flush_co(n);
    if (!s->unnamed)
        return err_set(e, EINVAL, "the file has a name already");
    r = check_target(path, replace, o, &device, e);
    if (!r && device)
        r = err_set(e, EEXIST, "is a block device");
    if (r)
        return r;

    bool exists = replace && !access(path, F_OK);
    struct sync_work w = {.fd = s->fd};
    if ((r = file_trim(n)) < 0)
        return err_errno(e, -r, "cannot give back space allocated ahead");
    if (exists)
        inherit_mode(s, path);
    if (!(n->flags & NODE_NO_FLUSH)) {
        r = s->flush_error ? s->flush_error : offload_blocking_co(fsync_work, &w);
        if (r)
            return err_errno(e, -r, "cannot sync");
    }
    r = exists ? replace_as(s, path) : link_as(s, path);
    if (r == -EEXIST && replace && !exists)
        r = replace_as(s, path); /* somebody made it meanwhile */
    if (r == -EEXIST)
        return err_set(e, EEXIST, "file exists");
    if (r == -EXDEV)
        return err_set(e, EXDEV, "is on another file system than the unnamed file");
    if (r)
        return err_errno(e, -r, "cannot link the finished file to its name");
    s->unnamed = false;
    if (o) {
        free(o->filename);
        o->filename = xstrdup(path);
    }
    return n->flags & NODE_NO_FLUSH ? 0 : sync_folder_co(path, e);
}
