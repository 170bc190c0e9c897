/* SPDX-License-Identifier: MIT */
/*
 * What the parts of the commit to a directory share.
 *
 *      fat_volume.c   the file system as the overlay shows it, every byte of it hostile
 *      fat_match.c    which of its files is which of the directory's, and what becomes of each
 *      fat_apply.c    the directory: what is checked, staged, renamed and removed
 *      fat_commit.c   the order of it all
 *
 * Two trees: `t`, the directory as it was scanned (entries), and `v`, the guest's (files).  Both
 * are breadth first, with the root at 0 and the children of one directory in one run.
 */
#ifndef STRATA_JOB_FAT_COMMIT_INT_H
#define STRATA_JOB_FAT_COMMIT_INT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "storage/fat.h"

struct err;
struct node;

#define NONE UINT32_MAX

enum fat_action {
    FAT_KEEP,    /* as it is */
    FAT_MOVE,    /* another name or folder, the same content */
    FAT_REPLACE, /* a file of the same name with another content */
    FAT_CREATE,  /* a new file or directory */
};

struct fat_file {
    char *name; /* UTF-8; owned */
    char *temp; /* staged under this name; owned; NULL: not, or under its own */
    uint32_t parent, first_child, children;
    uint32_t cluster, size; /* size: of a file */
    uint32_t match;         /* the entry that it is; NONE: a new one */
    uint32_t like;          /* the entry whose mode it takes over; NONE */
    const char *host;       /* its name on the host: its own, or its entry's */
    uint16_t depth, date, time;
    uint8_t action; /* enum fat_action */
    bool is_dir, read_only;
    bool staged;   /* something of it is on the host that is to be removed on failure */
    bool placed;   /* where it belongs, as are all above it */
    bool sync_dir; /* names in it change */
    uint8_t short_name[FAT_SHORT];
};

struct fat_volume {
    struct node *disk;
    const struct fat_layout *l;
    struct fat_file *v;
    uint32_t count, room;
    uint8_t *claimed; /* a bit for each cluster that somebody has */
    uint8_t *window;  /* piece of the FAT */
    uint64_t window_at;
    size_t window_bytes;
};

/* What becomes of an entry. */
struct fat_old {
    uint32_t file; /* the file that it is now; NONE: deleted */
    char *aside;   /* its name since it had to make way; owned; NULL */
    bool blocked;  /* its name is wanted for something of another kind */
};

struct fat_plan {
    struct node *overlay, *base;
    const struct fat_tree *t;
    const struct fat_layout *l;
    struct fat_volume volume;
    struct fat_old *old;    /* one for each entry */
    bool switching;         /* names have begun to change */
    unsigned serial;        /* of temporary names */
    uint32_t changes, done; /* steps of the last part, for the message when it fails */
};

/* ---- fat_volume.c ---- */
int fat_volume_read_co(struct fat_volume *f, struct node *disk, const struct fat_tree *t,
                       const struct fat_layout *l, struct err *e);
void fat_volume_free(struct fat_volume *f);
/* The cluster behind `cluster`; 0: that was the last.  -EUCLEAN, or an error of the disk. */
int fat_volume_next_co(struct fat_volume *f, uint32_t cluster, uint32_t *next);
/* Where on the disk a cluster lies. */
uint64_t fat_volume_offset(const struct fat_volume *f, uint32_t cluster);
uint64_t fat_volume_cluster_bytes(const struct fat_volume *f);
/* "sub/name" for messages; owned. */
char *fat_volume_path(const struct fat_volume *f, uint32_t file);
/*
 * Calls `piece` for each run of the file on the disk, in order; anything but 0 ends it and is
 * returned.
 */
int fat_volume_runs_co(struct fat_volume *f, uint32_t file,
                       int (*piece)(void *arg, uint64_t at, uint64_t offset, uint64_t length),
                       void *arg);

/* ---- fat_match.c ---- */
/* Fills in what becomes of everybody.  -ENOMEM, or an error of the disk. */
int fat_match_co(struct fat_plan *p, struct err *e);

/* ---- fat_apply.c ---- */
/* Whether the host is as scanned where it is going to change; changes nothing.  Blocks. */
int fat_apply_check(struct fat_plan *p, struct err *e);
/* The contents of all that is new, under temporary names. */
int fat_apply_stage_co(struct fat_plan *p, struct err *e);
/* Removes what was staged.  Blocks. */
void fat_apply_unstage(struct fat_plan *p);
/* Names change, and what was deleted goes.  Blocks. */
int fat_apply_switch(struct fat_plan *p, struct err *e);

#endif
