/* SPDX-License-Identifier: MIT */
#include "job/partition.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/node.h"

enum {
    SECTOR = 512, /* the MBR's unit whatever the disk's */
    MBR_ENTRIES = 0x1be,
    MBR_ENTRY_BYTES = 16,
    MBR_MAGIC = 0x1fe,
    TYPE_PROTECTIVE = 0xee,
    LOGICAL_FIRST = 5,
    LOGICAL_MAX = 100,
    GPT_HEADER_MIN = 92,
    GPT_ENTRY_MIN = 128,
    GPT_ENTRY_MAX = 4096,
    GPT_ENTRIES_BYTES_MAX = 1 << 20,
    GPT_NAME_UNITS = 36,
};

static void add(struct partition_table *t, uint64_t size, struct partition p) {
    if (!p.length || p.offset >= size || p.length > size - p.offset || t->n == PARTITIONS_MAX) {
        t->ignored++;
        return;
    }
    struct partition *v = realloc(t->v, (t->n + 1) * sizeof(*v));
    if (!v) {
        t->ignored++;
        return;
    }
    t->v = v;
    v[t->n++] = p;
}

/* ---------------------------------------------------------------- MBR */

struct mbr_entry {
    uint8_t status, type;
    uint32_t first, count; /* sectors */
};

static struct mbr_entry mbr_entry(const uint8_t *sector, int i) {
    const uint8_t *p = sector + MBR_ENTRIES + i * MBR_ENTRY_BYTES;
    return (struct mbr_entry){p[0], p[4], le32_load(p + 8), le32_load(p + 12)};
}

static bool mbr_signed(const uint8_t *sector) {
    return sector[MBR_MAGIC] == 0x55 && sector[MBR_MAGIC + 1] == 0xaa;
}

/* A boot sector of a file system has code where the entries would be. */
static bool mbr_looks(const uint8_t *sector) {
    bool any = false;
    for (int i = 0; i < 4; i++) {
        struct mbr_entry m = mbr_entry(sector, i);
        if (m.status & 0x7f)
            return false;
        any |= m.type && m.count;
    }
    return any;
}

static bool is_extended(uint8_t type) {
    return type == 0x05 || type == 0x0f || type == 0x85;
}

static struct partition mbr_partition(struct mbr_entry m, unsigned number, uint64_t base) {
    struct partition p = {.number = number,
                          .offset = (base + m.first) * SECTOR,
                          .length = (uint64_t)m.count * SECTOR};
    snprintf(p.type, sizeof(p.type), "0x%02x", m.type);
    return p;
}

/* The chain of records; LOGICAL_MAX ends one that loops. */
static int read_logical_co(struct node *disk, struct mbr_entry ext, unsigned *number,
                           struct partition_table *t) {
    uint64_t at = ext.first;
    for (unsigned i = 0; i < LOGICAL_MAX; i++) {
        uint8_t sector[SECTOR];
        if (at * SECTOR > disk->size || disk->size - at * SECTOR < SECTOR) {
            t->ignored++;
            return 0;
        }
        int rc = disk_pread_co(disk, at * SECTOR, sector, SECTOR);
        if (rc < 0)
            return rc;
        if (!mbr_signed(sector))
            return 0;
        struct mbr_entry here = mbr_entry(sector, 0), next = mbr_entry(sector, 1);
        if (here.type && here.count)
            add(t, disk->size, mbr_partition(here, (*number)++, at));
        if (!is_extended(next.type) || !next.first)
            return 0;
        at = (uint64_t)ext.first + next.first;
    }
    t->ignored++;
    return 0;
}

static int read_mbr_co(struct node *disk, const uint8_t *sector, struct partition_table *t) {
    unsigned logical = LOGICAL_FIRST; /* empty records have no number */
    t->kind = "mbr";
    for (int i = 0; i < 4; i++) {
        struct mbr_entry m = mbr_entry(sector, i);
        if (!m.type || !m.count)
            continue;
        if (!is_extended(m.type)) {
            add(t, disk->size, mbr_partition(m, (unsigned)i + 1, 0));
            continue;
        }
        int rc = read_logical_co(disk, m, &logical, t);
        if (rc < 0)
            return rc;
    }
    return 0;
}

/* ---------------------------------------------------------------- GPT */

static void guid_text(const uint8_t *g, char *out, size_t room) {
    snprintf(out, room, "%08x-%04x-%04x-%02x%02x-%02x%02x%02x%02x%02x%02x", le32_load(g),
             le16_load(g + 4), le16_load(g + 6), g[8], g[9], g[10], g[11], g[12], g[13], g[14],
             g[15]);
}

/* UTF-16 to UTF-8; a lone surrogate becomes U+FFFD.  `out` has room for three bytes a unit. */
static void name_text(const uint8_t *units, char *out) {
    for (int i = 0; i < GPT_NAME_UNITS; i++) {
        uint32_t c = le16_load(units + 2 * i);
        if (!c)
            break;
        if (c >= 0xd800 && c < 0xdc00 && i + 1 < GPT_NAME_UNITS) {
            uint32_t low = le16_load(units + 2 * i + 2);
            if (low >= 0xdc00 && low < 0xe000) {
                c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
                i++;
            }
        }
        if (c >= 0xd800 && c < 0xe000)
            c = 0xfffd;
        if (c < 0x80) {
            *out++ = (char)c;
        } else if (c < 0x800) {
            *out++ = (char)(0xc0 | c >> 6);
            *out++ = (char)(0x80 | (c & 63));
        } else if (c < 0x10000) {
            *out++ = (char)(0xe0 | c >> 12);
            *out++ = (char)(0x80 | (c >> 6 & 63));
            *out++ = (char)(0x80 | (c & 63));
        } else {
            *out++ = (char)(0xf0 | c >> 18);
            *out++ = (char)(0x80 | (c >> 12 & 63));
            *out++ = (char)(0x80 | (c >> 6 & 63));
            *out++ = (char)(0x80 | (c & 63));
        }
    }
    *out = 0;
}

struct gpt_header {
    uint64_t entries_lba;
    uint32_t entries, entry_bytes, entries_crc;
};

/* 1: good; 0: no header here; -EILSEQ: a header that is damaged. */
static int gpt_header_co(struct node *disk, uint64_t lba, uint32_t sector, struct gpt_header *h) {
    uint8_t b[SECTOR];
    if (lba >= disk->size / sector)
        return 0;
    int rc = disk_pread_co(disk, lba * sector, b, sizeof(b));
    if (rc < 0)
        return rc;
    if (memcmp(b, "EFI PART", 8))
        return 0;
    uint32_t bytes = le32_load(b + 12), crc = le32_load(b + 16);
    if (bytes < GPT_HEADER_MIN || bytes > sizeof(b))
        return -EILSEQ;
    memset(b + 16, 0, 4);
    *h = (struct gpt_header){le64_load(b + 72), le32_load(b + 80), le32_load(b + 84),
                             le32_load(b + 88)};
    if (crc32(0, b, bytes) != crc || le64_load(b + 24) != lba)
        return -EILSEQ;
    if (h->entry_bytes < GPT_ENTRY_MIN || h->entry_bytes > GPT_ENTRY_MAX || h->entry_bytes % 8 ||
        h->entries > GPT_ENTRIES_BYTES_MAX / h->entry_bytes || h->entries_lba < 2 ||
        h->entries_lba > disk->size / sector)
        return -EILSEQ;
    return 1;
}

static void gpt_entries(const struct gpt_header *h, const uint8_t *table, uint32_t sector,
                        uint64_t size, struct partition_table *t) {
    static const uint8_t unused[16];
    for (uint32_t i = 0; i < h->entries; i++) {
        const uint8_t *p = table + (size_t)i * h->entry_bytes;
        if (!memcmp(p, unused, sizeof(unused)))
            continue;
        uint64_t first = le64_load(p + 32), last = le64_load(p + 40), sectors = size / sector;
        struct partition part = {.number = i + 1};
        if (first <= last && last < sectors) {
            part.offset = first * sector;
            part.length = (last - first + 1) * sector;
        }
        guid_text(p, part.type, sizeof(part.type));
        name_text(p + 56, part.name);
        add(t, size, part);
    }
}

/* One copy of the table.  As gpt_header_co. */
static int read_gpt_copy_co(struct node *disk, uint64_t lba, uint32_t sector,
                            struct partition_table *t) {
    struct gpt_header h;
    int rc = gpt_header_co(disk, lba, sector, &h);
    if (rc <= 0)
        return rc;
    size_t bytes = (size_t)h.entries * h.entry_bytes;
    if (bytes > disk->size - h.entries_lba * sector)
        return -EILSEQ;
    uint8_t *table = malloc(bytes + 1);
    if (!table)
        return -ENOMEM;
    rc = disk_pread_co(disk, h.entries_lba * sector, table, bytes);
    if (rc == 0 && crc32(0, table, (uInt)bytes) != h.entries_crc)
        rc = -EILSEQ;
    if (rc == 0) {
        t->kind = "gpt";
        gpt_entries(&h, table, sector, disk->size, t);
        rc = 1;
    }
    free(table);
    return rc;
}

/* Both sector sizes, and the copy at the end when the first is damaged.  1: found. */
static int read_gpt_co(struct node *disk, struct partition_table *t, struct err *e) {
    static const uint32_t sectors[] = {512, 4096};
    bool damaged = false;
    for (size_t i = 0; i < 2; i++) {
        uint64_t places[] = {1, disk->size / sectors[i] - 1};
        for (size_t k = 0; k < 2 && disk->size >= 3 * sectors[i]; k++) {
            int rc = read_gpt_copy_co(disk, places[k], sectors[i], t);
            if (rc > 0)
                return rc;
            if (rc < 0 && rc != -EILSEQ)
                return err_errno(e, -rc, "%s: reading the partition table", disk->filename);
            damaged |= rc == -EILSEQ;
        }
    }
    if (damaged)
        return err_set(e, EINVAL, "%s: both copies of the GPT partition table are damaged",
                       disk->filename);
    return 0;
}

int partitions_read_co(struct node *disk, struct partition_table *out, struct err *e) {
    *out = (struct partition_table){0};
    uint8_t sector[SECTOR];
    if (disk->size < SECTOR)
        return 0;
    int rc = disk_pread_co(disk, 0, sector, SECTOR);
    if (rc < 0)
        return err_errno(e, -rc, "%s: reading the partition table", disk->filename);
    if (!mbr_signed(sector) || !mbr_looks(sector))
        return 0;
    for (int i = 0; i < 4; i++) {
        if (mbr_entry(sector, i).type != TYPE_PROTECTIVE)
            continue;
        rc = read_gpt_co(disk, out, e);
        if (rc != 0) {
            if (rc < 0)
                partitions_free(out);
            return rc < 0 ? rc : 0;
        }
    }
    rc = read_mbr_co(disk, sector, out);
    if (rc < 0) {
        partitions_free(out);
        return err_errno(e, -rc, "%s: reading the partition table", disk->filename);
    }
    return 0;
}

void partitions_free(struct partition_table *t) {
    free(t->v);
    *t = (struct partition_table){0};
}
