/* SPDX-License-Identifier: MIT */
/*
 * Apple disk images (UDIF, ".dmg"), read only.
 *
 *      | data fork: chunks, raw or coded ... | XML plist or resource fork | koly, 512 bytes |
 *
 * The trailer "koly" says where the tables are.  Each table ("mish") describes a stretch of
 * sectors, a partition as a rule, as a list of chunks; in the plist it is base64 inside <data>.
 * Numbers are big-endian, positions relative: to the data fork, then to the table's own data
 * offset, then the chunk's.
 *
 *      dmg_open.c     trailer, probe, the driver
 *      dmg_table.c    plist and resource fork to a list of chunks
 *      dmg_codec.c    zlib, bzip2, xz, ADC
 *      lzfse.c        LZFSE
 *
 * Invariants
 *  1. Chunks of zeros are not kept: whatever no chunk covers reads as zeros.  What is kept lies in
 *     the order of sectors and does not overlap (24 bytes each, CHUNKS_MAX of them), within the
 * file.
 *  2. Plist and resource fork are read in pieces; no table is held whole.
 *
 * Facts: keramics udif.md and adc.md; libmodi "Mac OS disk image types"; the layout of LZFSE from
 * the reference implementation's constants.
 */
#ifndef STRATA_FORMAT_DMG_H
#define STRATA_FORMAT_DMG_H

#include <stddef.h>
#include <stdint.h>

#include "disk/driver.h"

struct err;
struct node;

#define DMG_SECTOR 512u
#define DMG_CHUNKS_MAX (2u << 20) /* 48 MiB */
#define DMG_UNIT_MAX (64u << 20)  /* of a coded chunk, coded and not */
#define DMG_SECTORS_MAX (INT64_MAX / DMG_SECTOR)

enum dmg_kind { DMG_RAW, DMG_ADC, DMG_ZLIB, DMG_BZIP2, DMG_LZFSE, DMG_XZ, DMG_ZERO, DMG_KINDS };

struct dmg_chunk {
    uint64_t sector : 56, kind : 8;
    uint64_t host;
    uint32_t sectors, length; /* length: of the code; raw chunks: 0 */
};

struct dmg {
    struct dmg_chunk *chunks;
    uint32_t count, room, tables;
    uint64_t seen[DMG_KINDS]; /* chunks of each kind in the tables */
    uint64_t sectors;         /* where the tables end */
    uint64_t fork;            /* start of the data fork */
    uint64_t file_size;
    uint32_t variant, flags;
};

/* Reads the tables of `file` at [offset, +length) and sorts them. */
int dmg_read_plist_co(struct dmg *s, struct node *file, uint64_t offset, uint64_t length,
                      struct err *e);
int dmg_read_fork_co(struct dmg *s, struct node *file, uint64_t offset, uint64_t length,
                     struct err *e);
/* The chunk with `sector`, or the first behind it; count: none. */
uint32_t dmg_find(const struct dmg *s, uint64_t sector);

extern const struct codec dmg_codecs[DMG_KINDS]; /* by kind; raw and zero have none */
/* Loads the library that the kind needs. */
int dmg_codec_need(enum dmg_kind kind, struct err *e);

/* ---- lzfse.c ---- */
int lzfse_decode(const void *in, size_t in_len, void *out, size_t out_len);

#endif
