/* SPDX-License-Identifier: MIT */
/*
 * The file operations.  Those that answer from memory reply at once; those that reach the disk
 * become tasks.  A request's offsets are the file's, cut at its end here, so that the engine sees
 * only what lies inside the disk.
 */
#include "export/fuse/internal.h"

#include <errno.h>
#include <linux/falloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "base/ck.h"
#include "disk/io.h"
#include "disk/node.h"
#include "runtime/loop.h"

#define FOR_EVER 1e9 /* seconds that the kernel may keep an attribute: none of ours changes */

struct span {
    uint64_t offset, length;
};

/* Which bytes of the disk a file is; false for the folder. */
static bool file_span(const struct fuse_export *x, fuse_ino_t ino, struct span *out) {
    if (ino == INO_DISK || (ino == INO_ROOT && x->as_file)) {
        *out = (struct span){0, x->base.node->size};
        return true;
    }
    if (x->as_file || ino < INO_PART || ino - INO_PART >= x->nparts)
        return false;
    *out = (struct span){x->parts[ino - INO_PART].offset, x->parts[ino - INO_PART].length};
    return true;
}

static bool file_attr(const struct fuse_export *x, fuse_ino_t ino, struct stat *st) {
    struct span s;
    bool file = file_span(x, ino, &s);
    if (!file && ino != INO_ROOT)
        return false;
    *st = (struct stat){.st_ino = ino, .st_uid = x->uid, .st_gid = x->gid, .st_blksize = 65536};
    st->st_atime = st->st_mtime = st->st_ctime = x->started;
    if (!file) {
        st->st_mode = S_IFDIR | 0500;
        st->st_nlink = 2;
        return true;
    }
    st->st_mode = S_IFREG | (x->writable ? 0600 : 0400);
    st->st_nlink = 1;
    st->st_size = (off_t)s.length;
    /* What the host holds of the disk cannot be split over the partitions. */
    int64_t held = s.length == x->base.node->size ? disk_allocated(x->base.node) : -1;
    st->st_blocks = (held < 0 ? st->st_size : held) / 512;
    return true;
}

static struct fuse_export *export_of(fuse_req_t req, const struct fuse_lib **f) {
    struct fuse_export *x = fuse_lib_get(NULL)->req_userdata(req);
    *f = x->lib;
    return x;
}

/* ---------------------------------------------------------------- names */

/* The n-th name of the folder; NULL beyond the last. */
static const char *nth_name(const struct fuse_export *x, size_t n, fuse_ino_t *ino) {
    *ino = INO_DISK + n;
    if (n == 0)
        return "disk";
    return n <= x->nparts ? x->parts[n - 1].name : NULL;
}

static void op_lookup(fuse_req_t req, fuse_ino_t parent, const char *name) {
    const struct fuse_lib *f;
    struct fuse_export *x = export_of(req, &f);
    struct fuse_entry_param p = {.attr_timeout = FOR_EVER, .entry_timeout = FOR_EVER};
    const char *here;
    for (size_t n = 0; parent == INO_ROOT && !x->as_file; n++) {
        if (!(here = nth_name(x, n, &p.ino)))
            break;
        if (strcmp(here, name))
            continue;
        file_attr(x, p.ino, &p.attr);
        f->reply_entry(req, &p);
        return;
    }
    f->reply_err(req, ENOENT);
}

static void op_readdir(fuse_req_t req, fuse_ino_t ino, size_t room, off_t from,
                       struct fuse_file_info *fi) {
    const struct fuse_lib *f;
    struct fuse_export *x = export_of(req, &f);
    char buf[4096];
    size_t used = 0;
    if (ino != INO_ROOT || x->as_file) {
        f->reply_err(req, ENOTDIR);
        return;
    }
    for (off_t i = from;; i++) {
        fuse_ino_t at = INO_ROOT;
        const char *name = i == 0 ? "." : i == 1 ? ".." : nth_name(x, (size_t)i - 2, &at);
        if (!name)
            break;
        struct stat st = {.st_ino = at, .st_mode = at == INO_ROOT ? S_IFDIR : S_IFREG};
        size_t left = (room < sizeof(buf) ? room : sizeof(buf)) - used;
        size_t need = f->add_direntry(req, buf + used, left, name, &st, i + 1);
        if (need > left)
            break;
        used += need;
    }
    f->reply_buf(req, buf, used);
}

static void op_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi) {
    const struct fuse_lib *f;
    struct fuse_export *x = export_of(req, &f);
    struct stat st;
    if (file_attr(x, ino, &st))
        f->reply_attr(req, &st, FOR_EVER);
    else
        f->reply_err(req, ENOENT);
}

/* The kernel sets times as it writes back; they mean nothing here.  A size stays what it is. */
static void op_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *attr, int what,
                       struct fuse_file_info *fi) {
    const int times = FUSE_SET_ATTR_ATIME | FUSE_SET_ATTR_MTIME | FUSE_SET_ATTR_CTIME |
                      FUSE_SET_ATTR_ATIME_NOW | FUSE_SET_ATTR_MTIME_NOW;
    const struct fuse_lib *f;
    struct fuse_export *x = export_of(req, &f);
    struct stat st;
    if (!file_attr(x, ino, &st))
        f->reply_err(req, ENOENT);
    else if (what & FUSE_SET_ATTR_SIZE && attr->st_size != st.st_size)
        f->reply_err(req, EPERM);
    else if (what & ~(times | FUSE_SET_ATTR_SIZE))
        f->reply_err(req, EPERM);
    else
        f->reply_attr(req, &st, FOR_EVER);
}

static void op_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi) {
    const struct fuse_lib *f;
    struct fuse_export *x = export_of(req, &f);
    struct span s;
    if (!file_span(x, ino, &s)) {
        f->reply_err(req, EISDIR);
    } else if ((fi->flags & O_ACCMODE) != O_RDONLY && !x->writable) {
        f->reply_err(req, EROFS);
    } else {
        fi->keep_cache = !x->writable;
        if (f->reply_open(req, fi) == 0) /* else it was interrupted, and no release will come */
            x->open_files++;
    }
}

static void op_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi) {
    const struct fuse_lib *f;
    struct fuse_export *x = export_of(req, &f);
    f->reply_err(req, 0);
    if (--x->open_files == 0 && x->on_unused)
        x->on_unused(x->arg);
}

static void op_statfs(fuse_req_t req, fuse_ino_t ino) {
    const struct fuse_lib *f;
    struct fuse_export *x = export_of(req, &f);
    struct statvfs st = {.f_bsize = 4096, .f_frsize = 4096, .f_namemax = 255};
    st.f_blocks = x->base.node->size / 4096;
    st.f_files = x->nparts + 2;
    f->reply_statfs(req, &st);
}

/* Who serves this, so that the one who unmounts can wait for the end. */
static void op_getxattr(fuse_req_t req, fuse_ino_t ino, const char *name, size_t room) {
    const struct fuse_lib *f;
    export_of(req, &f);
    char pid[16];
    size_t len = (size_t)snprintf(pid, sizeof(pid), "%ld", (long)getpid());
    if (ino != INO_ROOT || strcmp(name, "user.strata.pid"))
        f->reply_err(req, ENODATA);
    else if (!room)
        f->reply_xattr(req, len);
    else if (room < len)
        f->reply_err(req, ERANGE);
    else
        f->reply_buf(req, pid, len);
}

/* ---------------------------------------------------------------- the disk */

enum kind { READ, WRITE, FLUSH, ZERO, PUNCH, SEEK };

struct request {
    struct fuse_export *x;
    fuse_req_t req;
    enum kind kind;
    int whence;
    uint64_t offset, length; /* of the disk */
    struct span file;
    void *received; /* the buffer that holds the payload of a write */
    const void *data;
};

static int read_co(struct request *r) {
    const struct fuse_lib *f = r->x->lib;
    void *buf = buf_get(r->length);
    if (!buf) {
        f->reply_err(r->req, ENOMEM);
        return -ENOMEM;
    }
    int rc = disk_pread_co(r->x->base.node, r->offset, buf, r->length);
    if (rc < 0)
        f->reply_err(r->req, -rc);
    else
        f->reply_buf(r->req, buf, r->length);
    buf_put(buf, r->length);
    return rc;
}

static int seek_co(struct request *r, uint64_t *found) {
    uint64_t end = r->file.offset + r->file.length;
    for (uint64_t at = r->offset; at < end;) {
        struct status st;
        int rc = disk_status_co(r->x->base.node, at, end - at, STATUS_PRECISE, &st);
        if (rc < 0)
            return rc;
        if ((r->whence == SEEK_DATA) != st.zero) {
            *found = at - r->file.offset;
            return 0;
        }
        at += st.length;
    }
    *found = r->file.length; /* the hole behind the end */
    return r->whence == SEEK_DATA ? -ENXIO : 0;
}

static void request_co(void *arg) {
    struct request *r = arg;
    struct fuse_export *x = r->x;
    const struct fuse_lib *f = x->lib;
    uint64_t found;
    int rc = 0;
    switch (r->kind) {
    case READ:
        rc = read_co(r);
        break;
    case WRITE:
        rc = disk_pwrite_co(x->base.node, r->offset, r->data, r->length);
        if (rc < 0)
            f->reply_err(r->req, -rc);
        else
            f->reply_write(r->req, r->length);
        fuse_give_buffer(x, r->received);
        break;
    case SEEK:
        rc = seek_co(r, &found);
        if (rc < 0)
            f->reply_err(r->req, -rc);
        else
            f->reply_lseek(r->req, (off_t)found);
        break;
    case FLUSH:
        f->reply_err(r->req, -(rc = disk_flush_co(x->base.node)));
        break;
    case ZERO:
        f->reply_err(r->req, -(rc = disk_zero_co(x->base.node, r->offset, r->length, 0)));
        break;
    case PUNCH:
        rc = disk_zero_co(x->base.node, r->offset, r->length, ZERO_MAY_UNMAP);
        f->reply_err(r->req, -rc);
        break;
    }
    x->served++;
    x->bytes_read += r->kind == READ && rc == 0 ? r->length : 0;
    x->bytes_written += r->kind == WRITE && rc == 0 ? r->length : 0;
    x->errors += rc < 0 && !(r->kind == SEEK && rc == -ENXIO); /* that is an answer */
    task_sem_up(&x->room, 1);
    free(r);
}

/*
 * What `offset`, `length` of a file are of the disk, cut at the file's end; -errno.  A length of 0
 * may come out.
 */
static int cut(const struct fuse_export *x, fuse_ino_t ino, off_t offset, uint64_t length,
               struct request *r) {
    if (!file_span(x, ino, &r->file))
        return -EISDIR;
    if (offset < 0)
        return -EINVAL;
    uint64_t at = min_u64((uint64_t)offset, r->file.length);
    r->offset = r->file.offset + at;
    r->length = min_u64(length, r->file.length - at);
    return 0;
}

/* Called by the reader, which holds a unit of `room` for the request. */
static void start(struct request proto) {
    struct fuse_export *x = proto.x;
    struct request *r = malloc(sizeof(*r));
    if (!r) {
        x->lib->reply_err(proto.req, ENOMEM);
        return;
    }
    *r = proto;
    if (r->kind == WRITE)
        r->received = fuse_take_buffer(x);
    task_sem_down_co(&x->room, 1);
    while (x->paused && !x->ending)
        waitq_wait_co(&x->resumed);
    task_group_spawn(&x->requests, x->loop, request_co, r);
}

static void op_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off,
                    struct fuse_file_info *fi) {
    const struct fuse_lib *f;
    struct request r = {.x = export_of(req, &f), .req = req, .kind = READ};
    int rc = cut(r.x, ino, off, min_u64(size, TRANSFER_MAX), &r);
    if (rc < 0)
        f->reply_err(req, -rc);
    else if (!r.length)
        f->reply_buf(req, NULL, 0);
    else
        start(r);
}

static void op_write_buf(fuse_req_t req, fuse_ino_t ino, struct fuse_bufvec *bufv, off_t off,
                         struct fuse_file_info *fi) {
    const struct fuse_lib *f;
    struct request r = {.x = export_of(req, &f), .req = req, .kind = WRITE};
    size_t size = bufv->buf[0].size;
    r.data = bufv->buf[0].mem;
    int rc = r.x->writable ? cut(r.x, ino, off, size, &r) : -EROFS;
    if (rc == 0 && !r.length && size)
        rc = -ENOSPC;
    if (rc < 0)
        f->reply_err(req, -rc);
    else if (!size)
        f->reply_write(req, 0);
    else
        start(r);
}

static void op_flush(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi) {
    const struct fuse_lib *f;
    export_of(req, &f);
    f->reply_err(req, 0); /* close() promises nothing; fsync() does */
}

static void op_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi) {
    const struct fuse_lib *f;
    struct request r = {.x = export_of(req, &f), .req = req, .kind = FLUSH};
    if (r.x->writable)
        start(r);
    else
        f->reply_err(req, 0);
}

static void op_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t off, off_t len,
                         struct fuse_file_info *fi) {
    const struct fuse_lib *f;
    struct request r = {.x = export_of(req, &f), .req = req};
    int rc = len < 0 ? -EINVAL : cut(r.x, ino, off, (uint64_t)len, &r);
    bool beyond = rc == 0 && r.length < (uint64_t)len && !(mode & FALLOC_FL_KEEP_SIZE);
    r.kind = mode & FALLOC_FL_PUNCH_HOLE ? PUNCH : ZERO;
    if (rc == 0 && !r.x->writable)
        rc = -EROFS;
    if (rc == 0 && beyond)
        rc = -ENOSPC;
    if (rc == 0 && mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE))
        rc = -EOPNOTSUPP;
    /* Without either, a promise that later writes find room: only the storage could give it. */
    if (rc == 0 && !(mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE)))
        rc = -EOPNOTSUPP;
    if (rc < 0 || !r.length)
        f->reply_err(req, -rc);
    else
        start(r);
}

static void op_lseek(fuse_req_t req, fuse_ino_t ino, off_t off, int whence,
                     struct fuse_file_info *fi) {
    const struct fuse_lib *f;
    struct request r = {.x = export_of(req, &f), .req = req, .kind = SEEK, .whence = whence};
    int rc = cut(r.x, ino, off, UINT64_MAX, &r);
    if (rc == 0 && whence != SEEK_DATA && whence != SEEK_HOLE)
        rc = -EINVAL;
    if (rc == 0 && !r.length)
        rc = -ENXIO;
    if (rc < 0)
        f->reply_err(req, -rc);
    else
        start(r);
}

static void op_init(void *arg, struct fuse_conn_info *conn) {
    const struct fuse_export *x = arg;
    /* Splicing requests through pipes costs more than the copy that it saves at these sizes. */
    conn->want &= ~(unsigned)(FUSE_CAP_SPLICE_READ | FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE);
    /* With it the kernel believes only itself about sizes, and it has none of the root. */
    if (x->writable && !x->as_file)
        conn->want |= conn->capable & FUSE_CAP_WRITEBACK_CACHE;
    conn->max_write = conn->max_read = TRANSFER_MAX;
    conn->max_background = IN_FLIGHT_MAX;
    conn->congestion_threshold = IN_FLIGHT_MAX * 3 / 4;
}

const struct fuse_lowlevel_ops fuse_export_ops = {
    .init = op_init,
    .lookup = op_lookup,
    .readdir = op_readdir,
    .getattr = op_getattr,
    .setattr = op_setattr,
    .open = op_open,
    .release = op_release,
    .read = op_read,
    .write_buf = op_write_buf,
    .flush = op_flush,
    .fsync = op_fsync,
    .fallocate = op_fallocate,
    .lseek = op_lseek,
    .statfs = op_statfs,
    .getxattr = op_getxattr,
};
