/* SPDX-License-Identifier: MIT */
/*
 * The driver "vvfat": a directory of the host as a FAT disk; see fat.h.
 *
 * What a file holds is read from the file straight into the caller's buffers; the rest is made when
 * it is read.  Files are opened when they are first read and stay open in a pool of POOL
 * descriptors; one in use is pinned, and the one used longest ago makes room.  With all pinned a
 * file is opened for the one request.
 *
 * The tree is as it was at open.  A file that grew is cut at its size then, one that shrank reads
 * as zeros behind its end, and one that is gone or another one now gives EIO.
 *
 * Read only.  A guest that wants to write gets a throw-away overlay on top, which job/fat_commit.h
 * can write back into the directory when the disk was named with rw.
 *
 * Context: tasks of the node's loop; names are opened on worker threads.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "base/iov.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "runtime/loop.h"
#include "storage/fat.h"

extern const struct driver driver_vvfat;

#define POOL 64
#define MADE_BYTES (64 * KIB) /* made at once */
#define RUNS_JOINED 1024      /* in one answer of extents_co */

struct fat_opts {
    char *dir, *label;
    uint64_t fat_type;
    bool floppy, rw;
};

struct fat_open {
    uint32_t entry; /* 0: free */
    int fd;
    unsigned pins;
    uint64_t used;
};

struct fat_state {
    struct fat_tree tree;
    struct fat_layout layout;
    bool ready;
    uint64_t clock;
    struct fat_open pool[POOL];
};

/* ---- opening ---- */

struct scan_job {
    const struct fat_opts *opts;
    struct fat_tree *tree;
    struct err *e;
};

static int scan_job(void *arg) {
    struct scan_job *j = arg;
    const char *label = j->opts->label ? j->opts->label : "QEMU VVFAT";
    return fat_scan(j->opts->dir, label, j->tree, j->e);
}

static int refuse_writing(const struct node *n, struct err *e) {
    const struct fat_opts *o = n->opts;
    if (o->rw) {
        err_set(e, EROFS, "a directory shown as a disk takes writes only in a temporary snapshot");
        err_hint(e, "--snapshot; with --commit-on-exit they are written back at the end");
    } else {
        err_set(e, EROFS, "a directory shown as a disk can only be read");
        err_hint(e, "open it read-only, or let writes go to a temporary snapshot");
    }
    return -EROFS;
}

static int check_opts(const struct node *n, struct err *e) {
    const struct fat_opts *o = n->opts;
    uint64_t type = o->fat_type;
    if (!o->dir || !*o->dir)
        return err_set(e, EINVAL, "the option dir is missing: which directory to show");
    if (type && type != 12 && type != 16 && type != 32)
        return err_set(e, EINVAL, "fat-type is 12, 16 or 32, not %" PRIu64, type);
    if (o->label && !fat_label_is_valid(o->label))
        return err_set(e, EINVAL,
                       "label '%s' is not up to %d signs of those that FAT labels can have",
                       o->label, FAT_SHORT);
    return node_is_rw(n) ? refuse_writing(n, e) : 0;
}

static int fat_open_co(struct node *n, struct open_ctx *ctx, struct err *e) {
    struct fat_state *s = n->state;
    const struct fat_opts *o = n->opts;
    s->tree.fd = -1;
    int r = check_opts(n, e);
    if (r < 0)
        return r;
    struct scan_job job = {o, &s->tree, e};
    r = offload_blocking_co(scan_job, &job);
    if (!r)
        r = fat_lay_out(&s->tree, (int)o->fat_type, o->floppy, &s->layout, e);
    if (r < 0)
        return r;
    s->ready = true;
    n->size = s->layout.size;
    n->granularity = 1;
    n->request_align = 1;
    return 0;
}

static void fat_close_co(struct node *n) {
    struct fat_state *s = n->state;
    for (int i = 0; i < POOL; i++)
        if (s->pool[i].entry)
            close(s->pool[i].fd);
    memset(s->pool, 0, sizeof(s->pool));
    if (s->ready || s->tree.fd >= 0)
        fat_tree_free(&s->tree);
    s->ready = false;
}

/* ---- files ---- */

struct open_job {
    const struct fat_tree *tree;
    uint32_t entry;
};

static int open_job(void *arg) {
    const struct open_job *j = arg;
    return fat_open_file(j->tree, j->entry);
}

static struct fat_open *pool_find(struct fat_state *s, uint32_t entry) {
    for (int i = 0; i < POOL; i++)
        if (s->pool[i].entry == entry)
            return &s->pool[i];
    return NULL;
}

/* A free place, or that of the file used longest ago; NULL: all are in use. */
static struct fat_open *pool_room(struct fat_state *s) {
    struct fat_open *best = NULL;
    for (int i = 0; i < POOL; i++) {
        struct fat_open *p = &s->pool[i];
        if (!p->entry)
            return p;
        if (!p->pins && (!best || p->used < best->used))
            best = p;
    }
    if (best)
        close(best->fd);
    return best;
}

/*
 * An open descriptor of the file, pinned until file_put.  *alone is set when the pool was full:
 * file_put closes it then.
 */
static int file_get_co(struct fat_state *s, uint32_t entry, struct fat_open **pin, int *fd) {
    struct fat_open *p = pool_find(s, entry);
    if (!p) {
        struct open_job job = {&s->tree, entry};
        int r = offload_blocking_co(open_job, &job);
        if (r < 0)
            return r == -ENOMEM || r == -EMFILE || r == -ENFILE ? r : -EIO;
        p = pool_find(s, entry); /* others ran meanwhile */
        if (p) {
            close(r);
        } else if ((p = pool_room(s))) {
            *p = (struct fat_open){.entry = entry, .fd = r};
        } else {
            *pin = NULL;
            *fd = r;
            return 0;
        }
    }
    p->pins++;
    p->used = ++s->clock;
    *pin = p;
    *fd = p->fd;
    return 0;
}

static void file_put(struct fat_open *pin, int fd) {
    if (pin)
        pin->pins--;
    else
        close(fd);
}

static int file_read_co(struct fat_state *s, const struct fat_entry *f, uint64_t at,
                        uint64_t length, const struct iovec *iov, int niov, uint64_t done,
                        unsigned flags) {
    struct iovec part[IOV_MAX_STRATA];
    uint64_t have = at < f->size ? min_u64(length, f->size - at) : 0, got = 0;
    struct fat_open *pin;
    int fd, r = 0;
    if (have && (r = file_get_co(s, (uint32_t)(f - s->tree.v), &pin, &fd)) < 0)
        return r;
    while (got < have) {
        int k = iov_slice(iov, niov, done + got, have - got, part);
        ssize_t n = loop_preadv_co(fd, part, k, at + got, flags & IO_BULK ? LOOP_BULK : 0);
        if (n <= 0) {
            r = (int)n;
            break;
        }
        got += (uint64_t)n;
    }
    if (have)
        file_put(pin, fd);
    if (!r)
        iov_zero(iov, niov, done + got, length - got);
    return r;
}

/* ---- the disk ---- */

static uint64_t data_start(const struct fat_layout *l) {
    return ((uint64_t)l->start + l->data) * FAT_SECTOR;
}
static uint64_t cluster_bytes(const struct fat_layout *l) {
    return (uint64_t)l->cluster_sectors * FAT_SECTOR;
}

/* Bytes that are made: head, or the directory `f` from `at`. */
static int made_read(struct fat_state *s, const struct fat_entry *f, uint64_t at, uint64_t length,
                     const struct iovec *iov, int niov, uint64_t done) {
    uint64_t piece = min_u64(length, MADE_BYTES);
    uint8_t *buf AUTO_FREE = malloc(piece);
    if (!buf)
        return -ENOMEM;
    for (uint64_t n; length; at += n, done += n, length -= n) {
        n = min_u64(length, piece);
        if (f)
            fat_dir_bytes(&s->tree, &s->layout, (uint32_t)(f - s->tree.v), at, buf, n);
        else
            fat_head_bytes(&s->tree, &s->layout, at, buf, n);
        iov_from_buf(iov, niov, done, buf, n);
    }
    return 0;
}

/* Who has the byte `offset` of the data, where in there it lies, and how far that goes. */
static const struct fat_entry *run_at(const struct fat_state *s, uint64_t offset, uint64_t *at,
                                      uint64_t *left) {
    const struct fat_layout *l = &s->layout;
    uint64_t bytes = cluster_bytes(l), in = offset - data_start(l), cluster = in / bytes;
    const struct fat_entry *f =
        cluster < l->used ? fat_owner(&s->tree, 2 + (uint32_t)cluster) : NULL;
    if (!f) {
        *left = l->size - offset;
        return NULL;
    }
    *at = in - (uint64_t)(f->cluster - 2) * bytes;
    *left = f->clusters * bytes - *at;
    return f;
}

static int fat_preadv_co(struct node *n, uint64_t offset, uint64_t length, const struct iovec *iov,
                         int niov, unsigned flags) {
    struct fat_state *s = n->state;
    uint64_t done = 0, head = data_start(&s->layout), piece;
    int r = 0;
    for (; !r && done < length; done += piece, offset += piece) {
        piece = length - done;
        if (offset < head) {
            piece = min_u64(piece, head - offset);
            r = made_read(s, NULL, offset, piece, iov, niov, done);
            continue;
        }
        if (offset >= s->layout.size) {
            iov_zero(iov, niov, done, piece);
            continue;
        }
        uint64_t at, left;
        const struct fat_entry *f = run_at(s, offset, &at, &left);
        piece = min_u64(piece, left);
        if (!f)
            iov_zero(iov, niov, done, piece);
        else if (f->is_dir)
            r = made_read(s, f, at, piece, iov, niov, done);
        else
            r = file_read_co(s, f, at, piece, iov, niov, done, flags);
    }
    return r;
}

/* Where the host file itself has holes.  An error says nothing here: the read will. */
static void sparse_extent_co(struct fat_state *s, const struct fat_entry *f, uint64_t at,
                             uint64_t *length, bool *zero) {
    struct fat_open *pin;
    int fd;
    uint64_t have = at < f->size ? f->size - at : 0;
    if (!have) {
        *zero = true;
        return;
    }
    if (file_get_co(s, (uint32_t)(f - s->tree.v), &pin, &fd) < 0)
        return;
    off_t data = lseek(fd, (off_t)at, SEEK_DATA), hole = -1;
    if (data == (off_t)at)
        hole = lseek(fd, (off_t)at, SEEK_HOLE);
    else if (data > (off_t)at || errno == ENXIO)
        *zero = true;
    file_put(pin, fd);
    if (*zero && data > 0 && (uint64_t)data < f->size)
        *length = min_u64(*length, (uint64_t)data - at);
    else if (!*zero && hole > (off_t)at && (uint64_t)hole < f->size)
        *length = min_u64(*length, (uint64_t)hole - at);
}

/* One run with one answer from `offset`. */
static void extent_at_co(struct fat_state *s, uint64_t offset, uint64_t *length, bool *zero) {
    const struct fat_layout *l = &s->layout;
    uint64_t fat = (uint64_t)l->fat_sectors * FAT_SECTOR, at, left;
    uint64_t tables = ((uint64_t)l->start + l->reserved) * FAT_SECTOR;
    uint64_t used = min_u64(align_up(div_up((2 + (uint64_t)l->used) * l->type, 8), 4096), fat);
    *zero = false;
    if (offset < tables) {
        *length = tables - offset;
    } else if (offset < tables + 2 * fat) {
        at = (offset - tables) % fat;
        *zero = at >= used;
        *length = (*zero ? fat : used) - at;
    } else if (offset < data_start(l)) {
        *length = data_start(l) - offset;
    } else {
        const struct fat_entry *f = run_at(s, offset, &at, &left);
        *length = left;
        *zero = !f;
        if (f && f->sparse)
            sparse_extent_co(s, f, at, length, zero);
    }
}

static int fat_extents_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out) {
    struct fat_state *s = n->state;
    uint64_t end = min_u64(offset + length, n->size), at = offset, run;
    bool zero, more;
    if (offset >= n->size) {
        *out = (struct extent){.length = length, .kind = EXTENT_ZERO};
        return 0;
    }
    extent_at_co(s, at, &run, &zero);
    at += run;
    for (int i = 0; at < end && i < RUNS_JOINED; i++, at += run) {
        extent_at_co(s, at, &run, &more);
        if (more != zero)
            break;
    }
    *out = (struct extent){.length = min_u64(at, end) - offset, .kind = EXTENT_ZERO};
    if (!zero) {
        out->kind = EXTENT_DATA;
        out->storage = n;
        out->host_offset = offset;
    }
    return 0;
}

static json_t *fat_describe(struct node *n) {
    const struct fat_state *s = n->state;
    const struct fat_layout *l = &s->layout;
    const struct fat_tree *t = &s->tree;
    return json_pack("{s:i, s:b, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "fat-type", l->type,
                     "floppy", l->floppy, "label", t->label, "cluster-size",
                     (json_int_t)cluster_bytes(l), "clusters", (json_int_t)l->clusters,
                     "used-clusters", (json_int_t)l->used, "files", (json_int_t)t->files,
                     "directories", (json_int_t)t->dirs, "short-names-only",
                     (json_int_t)t->short_only, "skipped-links", (json_int_t)t->links,
                     "skipped-special", (json_int_t)t->special);
}

static int fat_reopen_co(struct node *n, unsigned new_flags, struct err *e) {
    return new_flags & NODE_RW ? refuse_writing(n, e) : 0;
}

bool fat_node_is(const struct node *n) {
    return n->drv == &driver_vvfat;
}
const struct fat_tree *fat_node_tree(const struct node *n) {
    const struct fat_state *s = n->state;
    return &s->tree;
}
const struct fat_layout *fat_node_layout(const struct node *n) {
    const struct fat_state *s = n->state;
    return &s->layout;
}
const char *fat_node_dir(const struct node *n) {
    const struct fat_opts *o = n->opts;
    return o->dir;
}
bool fat_node_rw(const struct node *n) {
    const struct fat_opts *o = n->opts;
    return o->rw;
}

/* ---- names ---- */

/* "fat:[floppy:][rw:][12:|16:|32:]DIR", the words in any order.  What is no such word begins the
 * directory's name, colons and all. */
static int fat_parse_name(const char *name, json_t *tree, struct err *e) {
    const char *p = name + strlen("fat:");
    for (;;) {
        if (!strncmp(p, "floppy:", 7))
            json_object_set_new(tree, "floppy", json_true());
        else if (!strncmp(p, "rw:", 3))
            json_object_set_new(tree, "rw", json_true());
        else if (!strncmp(p, "12:", 3) || !strncmp(p, "16:", 3) || !strncmp(p, "32:", 3))
            json_object_set_new(tree, "fat-type", json_integer(atoi(p)));
        else
            break;
        p = strchr(p, ':') + 1;
    }
    if (!*p)
        return err_set(e, EINVAL, "'%s' names no directory: fat:[floppy:][rw:][12:|16:|32:]DIR",
                       name);
    return json_object_set_new(tree, "dir", json_string_nocheck(p))
               ? err_set(e, ENOMEM, "out of memory")
               : 0;
}

static const struct opt fat_open_opts[] = {
    OPT_STR(struct fat_opts, dir, "dir", OPT_OPEN, "the directory to show"),
    OPT_U64(struct fat_opts, fat_type, "fat-type", OPT_OPEN, 0, OPT_RANGE(0, 32),
            "12, 16 or 32; default: 16, or 32 where that is too small; floppies 12"),
    OPT_BOOL(struct fat_opts, floppy, "floppy", OPT_OPEN, false, "a floppy disk, not a hard disk"),
    OPT_STR(struct fat_opts, label, "label", OPT_OPEN,
            "name of the volume, up to 11 signs; default: QEMU VVFAT"),
    OPT_BOOL(struct fat_opts, rw, "rw", OPT_OPEN, false,
             "what a temporary snapshot holds may be written back into the directory"),
    OPT_END,
};

static const struct storage_ops fat_storage = {
    .preadv_co = fat_preadv_co,
    .extents_co = fat_extents_co,
    .describe = fat_describe,
};

static const char *const fat_prefixes[] = {"fat:", NULL};

const struct driver driver_vvfat = {
    .name = "vvfat",
    .kind = DRIVER_STORAGE,
    .help = "a directory shown as a FAT disk",
    .prefixes = fat_prefixes,
    .state_size = sizeof(struct fat_state),
    .opts = fat_open_opts,
    .opts_size = sizeof(struct fat_opts),
    .parse_name = fat_parse_name,
    .open_co = fat_open_co,
    .close_co = fat_close_co,
    .reopen_co = fat_reopen_co,
    .storage = &fat_storage,
};
