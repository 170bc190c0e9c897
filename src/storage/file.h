/* SPDX-License-Identifier: MIT */
/*
 * What the files of the driver "file" share: the state of one open file.
 *
 *      file.c         open, close, reopen, read, write, flush; the driver table
 *      file_create.c  new files: named, unnamed, scratch; link
 *      file_space.c   zero, discard, holes, truncate, allocation ahead, copies in the kernel
 *      file_lock.c    who else may use it
 *      file_holder.c  who does use it
 *
 * Invariants
 *  1. node->size is what the file's size is as far as we know; it grows with our own writes.
 *     Others may shrink the file: reads behind its end give zeros.
 *  2. Space allocated ahead lies behind the end of the file ([size, ahead_end)); the size that
 *     others see stays true at every moment, that of a file without a name is node->size.  The
 *     space is given back at close and before the file gets a name.
 *  3. `run` is what SEEK_DATA/SEEK_HOLE said last; every change of the file that could make it
 *     wrong drops it *after* the change (a query may come in between).
 *  4. While requests may be in flight nothing makes the file shorter: the kernel knows ends of
 *     writes that node->size does not have yet.  Only truncate_co (drained) and file_trim do.
 *
 * Context: tasks of the node's loop.
 */
#ifndef STRATA_STORAGE_FILE_H
#define STRATA_STORAGE_FILE_H

#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>
#include "disk/driver.h"
#include "disk/io.h"
#include "disk/node.h"
#include "storage/file_lock.h"

struct err;
struct create_ctx;
struct create_file_opts;

enum file_locking { LOCKING_AUTO, LOCKING_ON, LOCKING_OFF };

struct file_opts {
    char *filename;
    int locking; /* enum file_locking */
};

enum run_kind { RUN_NONE, RUN_DATA, RUN_HOLE };

struct file_state {
    bool opened;      /* fd is valid; a zeroed state is a closed one */
    int fd;           /* keeps its number over a reopen */
    int plain_fd;     /* + 1; without O_DIRECT, for the odd end of the file; 0: not open */
    bool is_block;    /* or a character device */
    bool is_device;   /* a character device */
    bool unnamed;     /* made by us and not yet linked */
    bool first_block; /* CREATE_FIRST_BLOCK */
    bool scratch;     /* for throwing away: space is not taken far ahead */
    char *temp_path;  /* its hidden name where the file system has no unnamed files; owned */
    struct file_lock lock;
    uint64_t size_limit; /* growing beyond gives ENOSPC; 0: none */
    int flush_error;     /* a failed fdatasync may have lost pages: no later one is believed */

    /* What this file's file system was found not to do. */
    bool no_punch, no_zero_range, no_fallocate, no_discard, no_clone, no_copy_range;

    enum run_kind run_kind;
    uint64_t run_start, run_end;
    uint64_t data_at; /* SEEK_DATA ended here: the run that follows is data; UINT64_MAX: unknown */

    bool ahead_off, ahead_busy, ahead_checked;
    bool ahead_used;     /* something may be allocated behind the end */
    uint64_t ahead_end;  /* allocated up to here when > size */
    uint64_t ahead_step; /* 0: not begun */
    uint64_t appended;   /* bytes written in sequence behind the end */
    uint64_t append_end; /* highest end of a growing write begun so far */
};

static inline struct file_state *file_state(struct node *n) {
    return n->state;
}

/* ---- file.c ---- */
/* The path in a name: without "file:".  Borrowed. */
const char *file_path(const char *name);
/* 0 for what can hold a disk: regular files and block devices; *is_block tells. */
int file_check_type(const struct stat *st, bool *is_block, struct err *e);
/* open(2) with what every file here needs, never hanging on a FIFO or waking a strange device;
 * `flags` adds O_RDWR, O_DIRECT, O_CREAT ...  The descriptor (blocking), or -errno with text. */
int file_open_path(const char *path, int flags, struct stat *st, struct err *e);
/* What EINVAL of an open with O_DIRECT means. */
int file_no_direct(struct err *e);
/* Takes the locks for n->perm and n->shared as the options say. */
int file_take_locks(struct node *n, struct err *e);
/* Sets size, alignment and flags of the node from its open descriptor. */
int file_adopt(struct node *n, const struct stat *st, struct err *e);
int file_flush_co(struct node *n);

/* ---- file_space.c ---- */
int file_zero_co(struct node *n, uint64_t offset, uint64_t length, unsigned zero_flags);
int file_discard_co(struct node *n, uint64_t offset, uint64_t length);
int file_truncate_co(struct node *n, uint64_t size, int prealloc, struct err *e);
int file_extents_co(struct node *n, uint64_t offset, uint64_t length, struct extent *out);
int64_t file_allocated(struct node *n);
int file_copy_range_co(struct node *src, uint64_t src_off, struct node *dst, uint64_t dst_off,
                       uint64_t length, unsigned copy_flags);
/* Before a write that ends behind the end of the file: -ENOSPC beyond the limit; allocates ahead.
 */
int file_grow_co(struct node *n, uint64_t offset, uint64_t end);
/* Gives back what was allocated ahead; nothing may be in flight. */
int file_trim(struct node *n);
/* [offset, offset + length) has changed. */
void file_run_drop(struct node *n, uint64_t offset, uint64_t length);

/* ---- file_create.c ---- */
int file_create_co(struct node *n, struct create_ctx *ctx, struct err *e);
void file_tune_new(struct node *n, const struct create_file_opts *o);
int file_link_co(struct node *n, const char *name, bool replace, struct err *e);

#endif
