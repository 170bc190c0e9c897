/* SPDX-License-Identifier: MIT */
/*
 * What the files of the driver "vvfat" share: a directory of the host shown as a FAT disk.
 *
 *      fat_scan.c     the tree of names, read once at open
 *      fat_name.c     short names, long names, what of a name FAT can say
 *      fat_layout.c   sizes, FAT type, which cluster is whose
 *      fat_bytes.c    boot sector, FAT and directories, made when they are read
 *      fat.c          the driver: options, reads, which bytes are a file's
 *
 *      sector 0     63            +reserved   +spf   +spf    +root     data
 *      | MBR | gap | boot, FSInfo | FAT      | FAT   | root dir | cluster 2, 3 ... |
 *
 * (a floppy begins at the boot sector; FAT32 keeps its root directory in clusters)
 *
 * Invariants
 *  1. v[0] is the root.  The children of a directory are one run of v, sorted by name, behind the
 *     directory itself; so everything is stable from one open to the next.
 *  2. A file or directory takes one run of clusters, and the runs lie in the order of v without a
 *     gap, from cluster 2.  `runs` lists who has one; the FAT is a function of that list, so a FAT
 *     of 256 MiB costs no memory.
 *  3. Nothing outside the directory is ever opened: every name is opened below its parent's
 *     descriptor with O_NOFOLLOW, and only what the scan saw as a regular file (same device and
 *     inode) is read.
 *
 * Facts: Microsoft "FAT: General Overview of On-Disk Format" 1.03; ECMA-107; sizes and the forms of
 * the name as QEMU's documentation has them.
 */
#ifndef STRATA_STORAGE_FAT_H
#define STRATA_STORAGE_FAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

struct err;
struct node;

#define FAT_SECTOR 512u
#define FAT_SLOT 32u            /* bytes of a directory slot */
#define FAT_SLOTS_MAX 65535u    /* of one directory: readers stop at 2 MiB */
#define FAT_UNITS_MAX 255       /* UTF-16 units of a long name */
#define FAT_ENTRIES_MAX 1000000 /* about 120 bytes each */
#define FAT_DEPTH_MAX 256
#define FAT_SHORT 11
/* Files that a commit to the directory is making (job/fat_commit.h): never shown. */
#define FAT_TEMP_PREFIX ".strata-commit-"

struct fat_entry {
    char *name; /* owned; the root's is "" */
    uint64_t ino;
    dev_t dev;
    struct timespec mtime; /* as scanned */
    uint32_t parent, first_child, children;
    uint32_t size; /* bytes: of a file as scanned, of a directory its slots */
    uint32_t cluster, clusters;
    uint32_t slot;  /* in the parent's directory */
    uint16_t depth; /* the root's is 0 */
    uint8_t slots;  /* there, the long name's included */
    uint16_t date, time;
    bool is_dir, read_only, sparse;
    uint8_t short_name[FAT_SHORT];
};

struct fat_tree {
    int fd; /* the directory; -1: none */
    struct fat_entry *v;
    uint32_t count, room;
    uint32_t *runs; /* entries that have clusters, in their order */
    uint32_t runs_count;
    uint64_t links, special; /* left out */
    uint32_t files, dirs;    /* shown */
    uint32_t short_only;     /* shown without the name they have, which FAT cannot say */
    char label[FAT_SHORT + 1];
};

struct fat_layout {
    int type; /* 12, 16, 32 */
    bool floppy;
    uint64_t size; /* bytes of the disk */
    uint32_t heads, track, cylinders;
    uint32_t start; /* first sector of the volume; everything below counts from there */
    uint32_t total, reserved, fat_sectors, root_slots, root_sectors;
    uint32_t cluster_sectors, clusters, data;
    uint32_t used; /* clusters */
};

/* ---- fat_scan.c ---- */
/* Reads the tree below `dir`.  Blocks.  On error `t` is empty again. */
int fat_scan(const char *dir, const char *label, struct fat_tree *t, struct err *e);
void fat_tree_free(struct fat_tree *t);
/* Opens the file `index` below t->fd for reading: a descriptor or -errno.  Blocks. */
int fat_open_file(const struct fat_tree *t, uint32_t index);
/* "sub/name" for messages.  Owned. */
char *fat_path(const struct fat_tree *t, uint32_t index);

/* ---- fat_name.c ---- */
/* UTF-16 units of a name, or -1 when it is not valid UTF-8 or longer than FAT_UNITS_MAX. */
int fat_utf16(const char *name, uint16_t *out);
/* Short names and slots for the children of `dir`.  -ENOMEM, -EFBIG (too many). */
int fat_name_children(struct fat_tree *t, uint32_t dir, struct err *e);
uint8_t fat_short_sum(const uint8_t *short_name);
bool fat_label_is_valid(const char *label);
/* "A.TXT": a short name as a user would write it. */
void fat_short_text(const uint8_t *short_name, char out[FAT_SHORT + 2]);
/* Upper case of the scripts that have one, near enough to find neighbours that a reader would take
 * for one name. */
uint16_t fat_fold(uint16_t c);

/* ---- fat_layout.c ---- */
/* Chooses the geometry for the tree and gives everybody clusters.  `type` 0: what fits. */
int fat_lay_out(struct fat_tree *t, int type, bool floppy, struct fat_layout *l, struct err *e);
/* Who has `cluster` (from 2); NULL: nobody. */
const struct fat_entry *fat_owner(const struct fat_tree *t, uint32_t cluster);

/* ---- fat_bytes.c ---- */
/* [offset, +length) of the disk before the data, that is MBR to root directory. */
void fat_head_bytes(const struct fat_tree *t, const struct fat_layout *l, uint64_t offset,
                    uint8_t *out, size_t length);
/* [offset, +length) of a directory in clusters, zeros behind its end. */
void fat_dir_bytes(const struct fat_tree *t, const struct fat_layout *l, uint32_t dir,
                   uint64_t offset, uint8_t *out, size_t length);

/* ---- fat.c: for the job that writes a guest's changes back (job/fat_commit.h) ---- */
bool fat_node_is(const struct node *n);
const struct fat_tree *fat_node_tree(const struct node *n);
const struct fat_layout *fat_node_layout(const struct node *n);
const char *fat_node_dir(const struct node *n);
/* Named with rw: changes may be written back. */
bool fat_node_rw(const struct node *n);

#endif
