/* SPDX-License-Identifier: MIT */
/*
 * qcow2's internal snapshots: what the snapshot*.c files share.
 *
 *      snapshot_table.c   the snapshot table: bytes <-> entries, reading it whole, building the
 * next snapshot.c         the driver's slots: what each operation takes and gives shift.h, shift*.c
 * from one set of tables to the next one in a single step
 *
 * The snapshot table on disk is a row of entries of different lengths, each padded to 8 bytes:
 *
 *      40 fixed bytes | extra data | id | name | padding
 *
 * In memory its bytes stay as they were read, and struct qcow2_snapshot points into them; so an
 * entry that is not ours to change goes into the next table byte for byte, with extra data that
 * this code does not know.
 *
 * Source: the public qcow2 specification ("Snapshots").
 */
#ifndef STRATA_FORMAT_QCOW2_SNAPSHOT_H
#define STRATA_FORMAT_QCOW2_SNAPSHOT_H

#include <stdbool.h>
#include <stdint.h>

#include "format/qcow2/qcow2.h"

struct strbuf;

enum {
    QCOW2_SNAPSHOT_FIXED = 40,           /* bytes before the extra data */
    QCOW2_SNAPSHOT_EXTRA_MAX = 1024,     /* the reference reader's cap */
    QCOW2_SNAPSHOT_EXTRA_FULL = 24,      /* all extra data that this code knows */
    QCOW2_SNAPSHOT_EXTRA_SIZE = 16,      /* up to and with the disk size */
    QCOW2_SNAPSHOT_TABLE_MAX = 64 << 20, /* the reference reader's cap on the whole table */
};

struct qcow2_snapshot {
    const uint8_t *raw;  /* the entry as it is on disk */
    uint32_t raw_length; /* without padding */
    uint64_t l1_offset;
    uint32_t l1_entries;
    uint32_t extra_length;
    uint16_t id_length, name_length;
    const char *id, *name; /* not terminated */
    uint32_t date_sec, date_nsec;
    uint64_t vm_clock_nsec, vm_state_size;
    uint64_t disk_size; /* the current one where the entry does not say */
    uint64_t icount;
};

struct qcow2_snapshots {
    uint8_t *bytes; /* the table */
    uint64_t length;
    struct qcow2_snapshot *v;
    uint32_t count;
};

/*
 * Decodes the entry at the start of `have` bytes; `disk_size`: what it means when it names none.
 * Returns the bytes it takes without padding, 0 when `have` ends before it does, or -EINVAL (extra
 * data above its cap).  Pure.
 */
int64_t qcow2_snapshot_decode(const uint8_t *p, uint64_t have, uint64_t disk_size,
                              struct qcow2_snapshot *out, struct err *e);

/* An entry for the table, extra data in full.  `id` and `name` must be shorter than 64 KiB. */
void qcow2_snapshot_encode(struct strbuf *b, const struct snapshot_info *info, uint64_t l1_offset,
                           uint32_t l1_entries);
/* Appends `x` as it was; an entry without a disk size is completed, so that it keeps its own. */
void qcow2_snapshot_append(struct strbuf *b, const struct qcow2_snapshot *x);

/* The image's table, whole.  Bounded by QCOW2_SNAPSHOT_TABLE_MAX.  -EINVAL, -EIO, -ENOMEM. */
int qcow2_snapshots_load_co(struct qcow2 *s, struct qcow2_snapshots *out, struct err *e);
void qcow2_snapshots_free(struct qcow2_snapshots *t);
#define AUTO_QCOW2_SNAPSHOTS __attribute__((cleanup(qcow2_snapshots_free)))

/* First entry with this id; NULL: none. */
const struct qcow2_snapshot *qcow2_snapshot_by_id(const struct qcow2_snapshots *t, const char *id);
/* One more than the largest id that is a number. */
uint64_t qcow2_snapshot_next_id(const struct qcow2_snapshots *t);

/*
 * Reads a snapshot's L1 table into host byte order, `entries` long at least (zeros behind its own).
 * Refuses what cannot be one: -EINVAL.
 */
int qcow2_snapshot_l1_co(struct qcow2 *s, const struct qcow2_snapshot *x, uint32_t entries,
                         uint64_t **out, struct err *e);

/*
 * Options snapshot.id and snapshot.name of a read-only open: L1 table and disk size are those of
 * the snapshot.  Called when the header has been read, instead of loading the L1 table.
 */
int qcow2_snapshot_select_co(struct qcow2 *s, const char *id, const char *name, struct err *e);

#endif
