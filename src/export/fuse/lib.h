/* SPDX-License-Identifier: MIT */
/*
 * libfuse 3, loaded when the first disk is mounted: no other command waits for it to start, and the
 * package is needed only by those who mount.
 */
#ifndef STRATA_EXPORT_FUSE_LIB_H
#define STRATA_EXPORT_FUSE_LIB_H

#define FUSE_USE_VERSION 312
#include <fuse3/fuse_lowlevel.h>

struct err;

#define FUSE_LIB_FUNCTIONS(X)                                                                      \
    X(add_direntry)                                                                                \
    X(opt_add_arg)                                                                                 \
    X(opt_free_args)                                                                               \
    X(reply_attr)                                                                                  \
    X(reply_buf)                                                                                   \
    X(reply_entry)                                                                                 \
    X(reply_err)                                                                                   \
    X(reply_lseek)                                                                                 \
    X(reply_open)                                                                                  \
    X(reply_statfs)                                                                                \
    X(reply_write)                                                                                 \
    X(reply_xattr)                                                                                 \
    X(req_userdata)                                                                                \
    X(session_destroy)                                                                             \
    X(session_exited)                                                                              \
    X(session_fd)                                                                                  \
    X(session_mount)                                                                               \
    X(session_new)                                                                                 \
    X(session_process_buf)                                                                         \
    X(session_receive_buf)                                                                         \
    X(session_unmount)                                                                             \
    X(set_log_func)

struct fuse_lib {
#define X(name) __typeof__(fuse_##name) *name;
    FUSE_LIB_FUNCTIONS(X)
#undef X
};

/* The library, loaded at most once.  Any thread.  NULL with an error when it is not there. */
const struct fuse_lib *fuse_lib_get(struct err *e);

#endif
