/* SPDX-License-Identifier: MIT */
/*
 * The geometry of the disk and who has which cluster; see fat.h.
 *
 * A reader tells the type of a FAT by the number of clusters alone, so each form here has a number
 * that means its type, with some distance from the limits.  The disks are as large as QEMU's where
 * the files fit, and larger where they do not: more cylinders, then larger clusters, and without a
 * wish for a type FAT32.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "storage/fat.h"

/* What a type can have, 16 away from where others may draw the line. */
static uint32_t clusters_min(int type) {
    return type == 12 ? 1 : type == 16 ? 4085 + 16 : 65525 + 16;
}
static uint32_t clusters_max(int type) {
    return type == 12 ? 4084 - 16 : type == 16 ? 65524 - 16 : 0x0fffff00;
}

/* Clusters that the tree needs. */
static uint64_t needed(const struct fat_tree *t, int type, uint32_t cluster_sectors) {
    uint64_t bytes = (uint64_t)cluster_sectors * FAT_SECTOR, sum = 0;
    for (uint32_t i = type == 32 ? 0 : 1; i < t->count; i++)
        sum += max_u64(div_up(t->v[i].size, bytes), t->v[i].is_dir);
    return sum;
}

static uint32_t fat_sectors_for(int type, uint64_t clusters) {
    return (uint32_t)div_up((clusters + 2) * (uint64_t)type, FAT_SECTOR * 8);
}

/* Fills in what follows from type, total and cluster_sectors.  False: no room, or another type. */
static bool divide(struct fat_layout *l) {
    l->reserved = l->type == 32 ? 32 : 1;
    l->root_sectors = l->root_slots * FAT_SLOT / FAT_SECTOR;
    uint64_t fixed = l->reserved + l->root_sectors, clusters;
    if (l->total <= fixed)
        return false;
    clusters = (l->total - fixed) / l->cluster_sectors;
    l->fat_sectors = fat_sectors_for(l->type, clusters);
    /* The FATs take room themselves: once more with what is left gives a smaller one. */
    for (int i = 0; i < 2; i++) {
        if (l->total <= fixed + 2 * (uint64_t)l->fat_sectors)
            return false;
        clusters = (l->total - fixed - 2 * (uint64_t)l->fat_sectors) / l->cluster_sectors;
        uint32_t less = fat_sectors_for(l->type, clusters);
        uint64_t more = (l->total - fixed - 2 * (uint64_t)less) / l->cluster_sectors;
        if (fat_sectors_for(l->type, more) > less)
            break;
        l->fat_sectors = less;
        clusters = more;
    }
    l->data = (uint32_t)(fixed + 2 * (uint64_t)l->fat_sectors);
    l->clusters = (uint32_t)clusters;
    return clusters >= clusters_min(l->type) && clusters <= clusters_max(l->type);
}

static bool fits(const struct fat_tree *t, struct fat_layout *l) {
    return divide(l) && needed(t, l->type, l->cluster_sectors) <= l->clusters;
}

static void set_cylinders(struct fat_layout *l, uint64_t cylinders) {
    l->cylinders = (uint32_t)cylinders;
    uint64_t sectors = cylinders * l->heads * l->track;
    l->size = sectors * FAT_SECTOR;
    l->total = (uint32_t)(sectors - l->start);
}

/* The smallest disk from QEMU's size up that takes the tree. */
static bool fit_disk(const struct fat_tree *t, struct fat_layout *l, int type) {
    uint32_t spc = type == 32 ? 8 : 16, root = l->root_slots;
    *l = (struct fat_layout){
        .type = type, .heads = 16, .track = 63, .start = 63, .root_slots = type == 32 ? 0 : root};
    for (; spc <= 64; spc *= 2) {
        uint64_t per = (uint64_t)l->heads * l->track, want = needed(t, type, spc);
        l->cluster_sectors = spc;
        set_cylinders(l, type == 12 ? 64 : 1024);
        if (fits(t, l))
            return true;
        /* An eighth more than needed, so that a guest has room to write. */
        want = min_u64(want + want / 8 + 1024, clusters_max(type) - 64);
        uint64_t sectors = want * spc + 2 * (uint64_t)fat_sectors_for(type, want) +
                           l->root_sectors + l->reserved + l->start;
        if (sectors > UINT32_MAX - per || div_up(sectors, per) < l->cylinders)
            continue;
        set_cylinders(l, div_up(sectors, per));
        if (fits(t, l))
            return true;
    }
    return false;
}

static bool fit_floppy(const struct fat_tree *t, struct fat_layout *l, int type) {
    bool small = type == 12;
    uint32_t slots = small ? 224 : 240, root = l->root_slots;
    *l = (struct fat_layout){.type = type ? type : 12,
                             .floppy = true,
                             .heads = 2,
                             .track = small ? 18 : 36,
                             .cluster_sectors = type ? 1 : 2,
                             .root_slots = root > 512 ? root : slots};
    if (l->root_slots < align_up((uint64_t)t->v[0].size / FAT_SLOT, 16))
        l->root_slots = root;
    set_cylinders(l, 80);
    return fits(t, l);
}

static int too_large(const struct fat_tree *t, int type, bool floppy, struct err *e) {
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < t->count; i++)
        bytes += t->v[i].size;
    if (floppy)
        err_set(e, EFBIG, "%" PRIu64 " bytes in %" PRIu32 " files do not fit on a floppy", bytes,
                t->files);
    else
        err_set(e, EFBIG, "%" PRIu64 " bytes in %" PRIu32 " files do not fit in FAT%d", bytes,
                t->files, type);
    if (floppy || type != 32)
        err_hint(e, "a FAT32 disk (fat:32:) holds up to 2 TiB");
    return -EFBIG;
}

static int give_clusters(struct fat_tree *t, struct fat_layout *l, struct err *e) {
    uint64_t bytes = (uint64_t)l->cluster_sectors * FAT_SECTOR;
    t->runs = calloc(t->count, sizeof(*t->runs));
    if (!t->runs)
        return err_set(e, ENOMEM, "no memory for the files");
    for (uint32_t i = l->type == 32 ? 0 : 1; i < t->count; i++) {
        struct fat_entry *f = &t->v[i];
        f->clusters = (uint32_t)max_u64(div_up(f->size, bytes), f->is_dir);
        if (!f->clusters)
            continue;
        f->cluster = 2 + l->used;
        l->used += f->clusters;
        t->runs[t->runs_count++] = i;
    }
    return 0;
}

int fat_lay_out(struct fat_tree *t, int type, bool floppy, struct fat_layout *l, struct err *e) {
    uint32_t root = (uint32_t)align_up((uint64_t)t->v[0].size / FAT_SLOT, 16);
    *l = (struct fat_layout){.root_slots = root < 512 ? 512 : root};
    if (floppy && type == 32)
        return err_set(e, EINVAL, "a floppy is too small for FAT32, which begins at 32 MiB");
    struct fat_layout want = *l;
    bool ok = floppy ? fit_floppy(t, l, type) : fit_disk(t, l, type ? type : 16);
    if (!ok && !floppy && !type) {
        *l = want;
        ok = fit_disk(t, l, type = 32);
    }
    return ok ? give_clusters(t, l, e) : too_large(t, type, floppy, e);
}

const struct fat_entry *fat_owner(const struct fat_tree *t, uint32_t cluster) {
    uint32_t low = 0, high = t->runs_count;
    while (low < high) {
        uint32_t mid = low + (high - low) / 2;
        const struct fat_entry *f = &t->v[t->runs[mid]];
        if (cluster < f->cluster)
            high = mid;
        else if (cluster - f->cluster >= f->clusters)
            low = mid + 1;
        else
            return f;
    }
    return NULL;
}
