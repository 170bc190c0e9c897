/* SPDX-License-Identifier: MIT */
/*
 * The bytes that no file of the host holds: MBR, boot sector, FAT, directories; see fat.h.
 *
 * Pure functions of tree and layout; a sector is made when it is read and forgotten.
 */
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "storage/fat.h"

#define NT_ID 0xbe1afdfau
#define SERIAL 0xfabe1afdu

/* ---- MBR and boot sector ---- */

static void put_chs(uint8_t *p, const struct fat_layout *l, uint32_t sector) {
    uint32_t head = sector / l->track % l->heads, cylinder = sector / l->track / l->heads;
    if (cylinder > 1023) {
        memset(p, 0xff, 3); /* "look at the sector number" */
        return;
    }
    p[0] = (uint8_t)head;
    p[1] = (uint8_t)(sector % l->track + 1) | (uint8_t)(cylinder >> 8 << 6);
    p[2] = (uint8_t)cylinder;
}

static void mbr(const struct fat_layout *l, uint8_t *s) {
    uint8_t *p = s + 446;
    bool lba = l->cylinders > 1024;
    le32_store(s + 440, NT_ID);
    p[0] = 0x80;
    put_chs(p + 1, l, l->start);
    p[4] = l->type == 12 ? 0x01 : l->type == 16 ? (lba ? 0x0e : 0x06) : lba ? 0x0c : 0x0b;
    put_chs(p + 5, l, l->start + l->total - 1);
    le32_store(p + 8, l->start);
    le32_store(p + 12, l->total);
    le16_store(s + 510, 0xaa55);
}

static void put_label(const struct fat_tree *t, uint8_t *p) {
    size_t n = strlen(t->label);
    memcpy(p, n ? t->label : "NO NAME    ", n ? n : FAT_SHORT);
    memset(p + n, ' ', n ? FAT_SHORT - n : 0);
}

static void boot_sector(const struct fat_tree *t, const struct fat_layout *l, uint8_t *s) {
    static const char *const names[] = {"FAT12   ", "FAT16   ", "FAT32   "};
    bool big = l->type == 32;
    uint8_t *x = s + (big ? 64 : 36);
    s[0] = 0xeb;
    s[1] = big ? 0x58 : 0x3c;
    s[2] = 0x90;
    memcpy(s + 3, "MSWIN4.1", 8);
    le16_store(s + 11, FAT_SECTOR);
    s[13] = (uint8_t)l->cluster_sectors;
    le16_store(s + 14, (uint16_t)l->reserved);
    s[16] = 2;
    le16_store(s + 17, (uint16_t)l->root_slots);
    if (l->total <= 0xffff && !big)
        le16_store(s + 19, (uint16_t)l->total);
    else
        le32_store(s + 32, l->total);
    s[21] = l->floppy ? 0xf0 : 0xf8;
    le16_store(s + 22, big ? 0 : (uint16_t)l->fat_sectors);
    le16_store(s + 24, (uint16_t)l->track);
    le16_store(s + 26, (uint16_t)l->heads);
    le32_store(s + 28, l->start);
    if (big) {
        le32_store(s + 36, l->fat_sectors);
        le32_store(s + 44, 2); /* the root directory */
        le16_store(s + 48, 1);
        le16_store(s + 50, 6);
    }
    x[0] = l->floppy ? 0 : 0x80;
    x[2] = 0x29;
    le32_store(x + 3, SERIAL);
    put_label(t, x + 7);
    memcpy(x + 18, names[big ? 2 : l->type == 16], 8);
    memcpy(x + 26, "\xcd\x18\xeb\xfe", 4); /* not bootable: the BIOS tries the next disk */
    le16_store(s + 510, 0xaa55);
}

static void fs_info(const struct fat_layout *l, uint8_t *s) {
    le32_store(s, 0x41615252);
    le32_store(s + 484, 0x61417272);
    le32_store(s + 488, l->clusters - l->used);
    le32_store(s + 492, 2 + l->used);
    le32_store(s + 508, 0xaa550000);
}

/* A sector of the volume before its FATs. */
static void reserved_sector(const struct fat_tree *t, const struct fat_layout *l, uint32_t sector,
                            uint8_t *s) {
    memset(s, 0, FAT_SECTOR);
    if (sector == 0 || (l->type == 32 && sector == 6))
        boot_sector(t, l, s);
    else if (sector == 1 || sector == 7)
        fs_info(l, s);
    else if (sector == 2 || sector == 8)
        le32_store(s + 508, 0xaa550000);
}

/* ---- the FAT ---- */

static uint32_t fat_value(const struct fat_tree *t, const struct fat_layout *l, uint32_t n) {
    uint32_t end = l->type == 12 ? 0xfff : l->type == 16 ? 0xffff : 0x0fffffff;
    if (n == 0)
        return (end & ~0xffu) | (l->floppy ? 0xf0 : 0xf8);
    if (n == 1)
        return end; /* clean, no errors */
    const struct fat_entry *f = n - 2 < l->used ? fat_owner(t, n) : NULL;
    return !f ? 0 : n - f->cluster + 1 < f->clusters ? n + 1 : end;
}

static void fat_bytes(const struct fat_tree *t, const struct fat_layout *l, uint64_t at,
                      uint8_t *out, size_t length) {
    for (size_t i = 0; i < length; i++, at++) {
        if (l->type == 12) {
            uint32_t n = (uint32_t)(at / 3 * 2);
            out[i] = at % 3 == 0 ? (uint8_t)fat_value(t, l, n)
                     : at % 3 == 1
                         ? (uint8_t)(fat_value(t, l, n) >> 8 | fat_value(t, l, n + 1) << 4)
                         : (uint8_t)(fat_value(t, l, n + 1) >> 4);
            continue;
        }
        unsigned width = (unsigned)l->type / 8;
        uint32_t v = fat_value(t, l, (uint32_t)(at / width));
        if (at % width == 0 && length - i >= width) {
            for (unsigned k = 0; k < width; k++)
                out[i + k] = (uint8_t)(v >> 8 * k);
            i += width - 1;
            at += width - 1;
        } else {
            out[i] = (uint8_t)(v >> 8 * (at % width));
        }
    }
}

/* ---- directories ---- */

static void short_slot(const struct fat_entry *f, const uint8_t *name, uint32_t cluster,
                       uint8_t *s) {
    memcpy(s, name, FAT_SHORT);
    s[11] = (uint8_t)((f->is_dir ? 0x10 : 0x20) | f->read_only);
    le16_store(s + 14, f->time);
    le16_store(s + 16, f->date);
    le16_store(s + 18, f->date);
    le16_store(s + 20, (uint16_t)(cluster >> 16));
    le16_store(s + 22, f->time);
    le16_store(s + 24, f->date);
    le16_store(s + 26, (uint16_t)cluster);
    le32_store(s + 28, f->is_dir ? 0 : f->size);
}

static void long_slot(const struct fat_entry *f, unsigned part, uint8_t *s) {
    static const uint8_t place[13] = {1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30};
    uint16_t units[FAT_UNITS_MAX + 1];
    int count = fat_utf16(f->name, units), at = (int)(part - 1) * 13;
    s[0] = (uint8_t)(part | (part == f->slots - 1u ? 0x40 : 0));
    s[11] = 0x0f;
    s[13] = fat_short_sum(f->short_name);
    for (int i = 0; i < 13; i++, at++)
        le16_store(s + place[i], at < count ? units[at] : at == count ? 0 : 0xffff);
}

/* The child whose slots hold `slot`, or the one behind. */
static uint32_t child_at(const struct fat_tree *t, const struct fat_entry *d, uint32_t slot) {
    uint32_t low = 0, high = d->children;
    while (low < high) {
        uint32_t mid = low + (high - low) / 2;
        const struct fat_entry *f = &t->v[d->first_child + mid];
        if (slot >= f->slot + f->slots)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

static void dir_slot(const struct fat_tree *t, uint32_t dir, uint32_t slot, uint32_t *child,
                     uint8_t *s) {
    const struct fat_entry *d = &t->v[dir];
    memset(s, 0, FAT_SLOT);
    if (!dir && t->label[0] && slot == 0) {
        put_label(t, s);
        s[11] = 0x08;
        le16_store(s + 22, d->time);
        le16_store(s + 24, d->date);
    } else if (dir && slot < 2) {
        /* ".." of a directory in the root names cluster 0 whatever the root has. */
        uint32_t up = d->parent ? t->v[d->parent].cluster : 0;
        short_slot(d, (const uint8_t *)(slot ? "..         " : ".          "),
                   slot ? up : d->cluster, s);
    } else {
        while (*child < d->children) {
            const struct fat_entry *f = &t->v[d->first_child + *child];
            if (slot < f->slot + f->slots) {
                unsigned left = f->slot + f->slots - slot;
                if (left == 1)
                    short_slot(f, f->short_name, f->cluster, s);
                else
                    long_slot(f, left - 1, s);
                return;
            }
            ++*child;
        }
    }
}

static void slots(const struct fat_tree *t, uint32_t dir, uint64_t at, uint8_t *out,
                  size_t length) {
    uint8_t s[FAT_SLOT];
    uint64_t end = t->v[dir].size;
    uint32_t child = at < end ? child_at(t, &t->v[dir], (uint32_t)(at / FAT_SLOT)) : 0;
    while (length && at < end) {
        size_t in = at % FAT_SLOT, n = min_u64(length, FAT_SLOT - in);
        dir_slot(t, dir, (uint32_t)(at / FAT_SLOT), &child, s);
        memcpy(out, s + in, n);
        out += n;
        at += n;
        length -= n;
    }
    memset(out, 0, length);
}

void fat_dir_bytes(const struct fat_tree *t, const struct fat_layout *l, uint32_t dir,
                   uint64_t offset, uint8_t *out, size_t length) {
    slots(t, dir, offset, out, length);
}

/* ---- everything before the data ---- */

void fat_head_bytes(const struct fat_tree *t, const struct fat_layout *l, uint64_t offset,
                    uint8_t *out, size_t length) {
    while (length) {
        uint64_t sector = offset / FAT_SECTOR, in = offset % FAT_SECTOR;
        uint64_t fat = (uint64_t)l->fat_sectors * FAT_SECTOR;
        size_t n = min_u64(length, FAT_SECTOR - in);
        uint8_t s[FAT_SECTOR];
        if (sector < l->start) {
            memset(s, 0, sizeof(s));
            if (!sector)
                mbr(l, s);
            memcpy(out, s + in, n);
        } else if (sector - l->start < l->reserved) {
            reserved_sector(t, l, (uint32_t)sector - l->start, s);
            memcpy(out, s + in, n);
        } else {
            uint64_t at = offset - (uint64_t)(l->start + l->reserved) * FAT_SECTOR;
            if (at < 2 * fat) {
                n = min_u64(length, fat - at % fat);
                fat_bytes(t, l, at % fat, out, n);
            } else {
                n = min_u64(length, l->root_sectors * FAT_SECTOR - (at - 2 * fat));
                slots(t, 0, at - 2 * fat, out, n);
            }
        }
        out += n;
        offset += n;
        length -= n;
    }
}
