/* SPDX-License-Identifier: MIT */
/*
 * The partitions of a disk: MBR (with logical ones) and GPT, read only.
 *
 * Every entry that comes out lies inside the disk, is not empty and has a number of its own; what a
 * table says beyond that is left out and counted in `ignored`.  A disk without a table is no error:
 * kind is NULL then.  A boot sector of a file system has the MBR's signature too: entries whose
 * status byte is neither 0 nor 0x80 unmask it.
 *
 * Facts: UEFI specification 2.10, chapter 5 (GPT, protective MBR, both checksums); the PC's boot
 * sector for the MBR, where logical partitions begin relative to their own extended boot record and
 * each next record relative to the extended partition.
 */
#ifndef STRATA_JOB_PARTITION_H
#define STRATA_JOB_PARTITION_H

#include <stddef.h>
#include <stdint.h>

struct node;
struct err;

#define PARTITIONS_MAX 128

struct partition {
    unsigned number;         /* as Linux counts: 1.., logical ones from 5 */
    uint64_t offset, length; /* bytes */
    char type[40];           /* "0x83", or the GUID in the usual text form */
    char name[112];          /* GPT: UTF-8; else empty */
};

struct partition_table {
    const char *kind; /* "mbr", "gpt"; NULL: the disk has no table */
    struct partition *v;
    size_t n;
    unsigned ignored; /* entries outside the disk, or beyond PARTITIONS_MAX */
};

/* -errno for a disk that cannot be read; a table damaged in both its copies is an error too. */
int partitions_read_co(struct node *disk, struct partition_table *out, struct err *e);
void partitions_free(struct partition_table *t);

#endif
