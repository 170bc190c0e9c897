/* SPDX-License-Identifier: MIT */
/*
 * The FAT file system as the guest left it.
 *
 * The geometry is not read from the disk: partition table and boot sector must say what they said
 * when the directory was shown, so that a disk which the guest formatted is refused instead of
 * emptying the directory.  Everything else is hostile:
 *
 *  1. Each cluster belongs to one file or directory: `claimed` has a bit for each, and a second
 *     claim (cross-link, loop) is refused.  So all chains together are no longer than the disk.
 *  2. Chains stay inside the disk and end; a file's is as long as its size needs, at least.
 *  3. Directories have at most FAT_SLOTS_MAX slots, the tree FAT_ENTRIES_MAX entries and
 *     FAT_DEPTH_MAX levels; it is walked breadth first, so depth costs no stack.
 *  4. Names are what a host can hold and, in one directory, differ by more than case.
 *
 * A long name counts when its slots are complete and have the checksum of the short name behind
 * them, else the short name does, as for every reader.
 *
 * Facts: Microsoft "FAT: General Overview of On-Disk Format" 1.03.
 */
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "base/strbuf.h"
#include "disk/io.h"
#include "format/utf16.h"
#include "job/fat_commit_int.h"

#define WINDOW_BYTES (64 * KIB)
#define DIR_BYTES_MAX ((uint64_t)FAT_SLOTS_MAX * FAT_SLOT)
#define LONG_SLOTS_MAX 20
#define SLOT_UNITS_BYTES 26 /* of a long name */

uint64_t fat_volume_cluster_bytes(const struct fat_volume *f) {
    return (uint64_t)f->l->cluster_sectors * FAT_SECTOR;
}

uint64_t fat_volume_offset(const struct fat_volume *f, uint32_t cluster) {
    return ((uint64_t)f->l->start + f->l->data) * FAT_SECTOR +
           (uint64_t)(cluster - 2) * fat_volume_cluster_bytes(f);
}

char *fat_volume_path(const struct fat_volume *f, uint32_t file) {
    size_t length = 0, at;
    for (uint32_t i = file; i; i = f->v[i].parent)
        length += strlen(f->v[i].name) + 1;
    if (!length)
        return xstrdup("/");
    char *path = xcalloc(1, at = length);
    for (uint32_t i = file; i; i = f->v[i].parent) {
        size_t n = strlen(f->v[i].name);
        if (at < length)
            path[at - 1] = '/';
        at -= n + 1;
        memcpy(path + at, f->v[i].name, n);
    }
    return path;
}

void fat_volume_free(struct fat_volume *f) {
    for (uint32_t i = 0; i < f->count; i++) {
        free(f->v[i].name);
        free(f->v[i].temp);
    }
    free(f->v);
    free(f->claimed);
    free(f->window);
    *f = (struct fat_volume){0};
}

/* ---- the disk is still the one that was shown ---- */

static int formatted(struct err *e, const char *what) {
    err_set(e, EUCLEAN, "the guest changed the %s", what);
    err_hint(e, "a disk that was partitioned or formatted anew cannot become the directory again");
    return -EUCLEAN;
}

static int check_head_co(struct fat_volume *f, const struct fat_tree *t, struct err *e) {
    uint8_t is[FAT_SECTOR], was[FAT_SECTOR];
    uint64_t boot = (uint64_t)f->l->start * FAT_SECTOR;
    int r = 0;
    if (boot) {
        r = disk_pread_co(f->disk, 0, is, sizeof(is));
        if (r < 0)
            return err_errno(e, -r, "reading the partition table");
        fat_head_bytes(t, f->l, 0, was, sizeof(was));
        if (memcmp(is + 446, was + 446, 66))
            return formatted(e, "partition table");
    }
    r = disk_pread_co(f->disk, boot, is, sizeof(is));
    if (r < 0)
        return err_errno(e, -r, "reading the boot sector");
    fat_head_bytes(t, f->l, boot, was, sizeof(was));
    /* Not the name of the system that wrote it, not label and serial number. */
    bool big = f->l->type == 32;
    if (memcmp(is + 11, was + 11, big ? 52 - 11 : 36 - 11) || memcmp(is + 510, was + 510, 2))
        return formatted(e, "boot sector");
    if (is[big ? 65 : 37] & 1) {
        err_set(e, EUCLEAN, "the file system is marked as in use: it was not unmounted");
        err_hint(e, "let the guest unmount it, or shut down");
        return -EUCLEAN;
    }
    return 0;
}

/* ---- the FAT ---- */

static int fat_value_co(struct fat_volume *f, uint32_t n, uint32_t *out) {
    const struct fat_layout *l = f->l;
    uint64_t start = ((uint64_t)l->start + l->reserved) * FAT_SECTOR;
    uint64_t bytes = (uint64_t)l->fat_sectors * FAT_SECTOR;
    uint64_t at = (uint64_t)n * (unsigned)l->type / 8;
    size_t width = l->type == 32 ? 4 : 2;
    if (at < f->window_at || at + width > f->window_at + f->window_bytes) {
        f->window_at = at & ~(uint64_t)(FAT_SECTOR - 1);
        f->window_bytes = 0; /* should the read fail */
        size_t length = min_u64(WINDOW_BYTES, bytes - f->window_at);
        int r = disk_pread_co(f->disk, start + f->window_at, f->window, length);
        if (r < 0)
            return r;
        f->window_bytes = length;
    }
    const uint8_t *p = f->window + (at - f->window_at);
    if (l->type == 32)
        *out = le32_load(p) & 0x0fffffff;
    else
        *out = l->type == 16 ? le16_load(p) : n & 1 ? le16_load(p) >> 4 : le16_load(p) & 0xfff;
    return 0;
}

static bool in_range(const struct fat_volume *f, uint32_t cluster) {
    return cluster >= 2 && cluster - 2 < f->l->clusters;
}

int fat_volume_next_co(struct fat_volume *f, uint32_t cluster, uint32_t *next) {
    uint32_t end = f->l->type == 12 ? 0xff8 : f->l->type == 16 ? 0xfff8 : 0x0ffffff8;
    int r = fat_value_co(f, cluster, next);
    if (r < 0)
        return r;
    if (*next >= end)
        *next = 0;
    else if (!in_range(f, *next))
        return -EUCLEAN;
    return 0;
}

static int check_clean_co(struct fat_volume *f, struct err *e) {
    uint32_t v, clean = f->l->type == 16 ? 0x8000 : 0x08000000;
    int r = fat_value_co(f, 1, &v);
    if (r < 0)
        return err_errno(e, -r, "reading the FAT");
    if (f->l->type != 12 && !(v & clean)) {
        err_set(e, EUCLEAN, "the FAT is marked as in use: it was not unmounted");
        err_hint(e, "let the guest unmount it, or shut down");
        return -EUCLEAN;
    }
    return 0;
}

/* All clusters from `first` belong to one now; *count of them. */
static int claim_co(struct fat_volume *f, uint32_t first, uint32_t max, uint32_t *count,
                    struct err *e) {
    *count = 0;
    if (!in_range(f, first))
        return err_set(e, EUCLEAN, "begins at cluster %" PRIu32 ", and the disk has 2 to %" PRIu32,
                       first, f->l->clusters + 1);
    for (uint32_t c = first; c; ++*count) {
        uint8_t *byte = &f->claimed[c / 8], bit = (uint8_t)(1u << c % 8);
        if (*byte & bit)
            return err_set(e, EUCLEAN, "cluster %" PRIu32 " is used twice", c);
        if (*count == max)
            return err_set(e, EFBIG, "has more than %" PRIu32 " clusters", max);
        *byte |= bit;
        uint32_t at = c;
        int r = fat_volume_next_co(f, at, &c);
        if (r == -EUCLEAN)
            return err_set(e, EUCLEAN, "the chain of clusters breaks off behind %" PRIu32, at);
        if (r < 0)
            return err_errno(e, -r, "reading the FAT");
    }
    return 0;
}

int fat_volume_runs_co(struct fat_volume *f, uint32_t file,
                       int (*piece)(void *arg, uint64_t at, uint64_t offset, uint64_t length),
                       void *arg) {
    uint64_t left = f->v[file].size, at = 0, bytes = fat_volume_cluster_bytes(f);
    uint32_t c = f->v[file].cluster;
    while (left) {
        uint32_t first = c, next = c;
        uint64_t length = 0;
        do {
            c = next;
            length += bytes;
            int r = fat_volume_next_co(f, c, &next);
            if (r < 0)
                return r;
        } while (next == c + 1 && length < left);
        if (!next && length < left)
            return -EUCLEAN;
        c = next;
        length = min_u64(length, left);
        int r = piece(arg, at, fat_volume_offset(f, first), length);
        if (r)
            return r;
        at += length;
        left -= length;
    }
    return 0;
}

/* ---- names ---- */

struct long_name {
    uint8_t units[LONG_SLOTS_MAX * SLOT_UNITS_BYTES]; /* as on the disk */
    unsigned slots, next; /* slots: 0 none; next: the number that must follow */
    uint8_t sum;
};

static void add_long_slot(struct long_name *n, const uint8_t *s) {
    unsigned number = s[0] & 0x3f;
    if (s[0] & 0x40) {
        n->slots = number <= LONG_SLOTS_MAX ? number : 0;
        n->next = number;
        n->sum = s[13];
    }
    if (!n->slots || !number || number != n->next || s[13] != n->sum) {
        n->slots = 0;
        return;
    }
    uint8_t *to = n->units + (size_t)(number - 1) * SLOT_UNITS_BYTES;
    memcpy(to, s + 1, 10);
    memcpy(to + 10, s + 14, 12);
    memcpy(to + 22, s + 28, 4);
    n->next--;
}

static void short_text(const uint8_t *s, char out[FAT_SHORT + 2]) {
    uint8_t name[FAT_SHORT];
    memcpy(name, s, FAT_SHORT);
    if (name[0] == 0x05)
        name[0] = 0xe5;
    /* Windows NT keeps "name.txt" and "NAME.txt" without a long name. */
    for (int i = 0; i < FAT_SHORT; i++)
        if (s[12] & (i < 8 ? 0x08 : 0x10) && name[i] >= 'A' && name[i] <= 'Z')
            name[i] = (uint8_t)(name[i] + 'a' - 'A');
    fat_short_text(name, out);
}

static int check_name(const char *name, bool is_long, struct err *e) {
    if (!*name || !strcmp(name, ".") || !strcmp(name, ".."))
        return err_set(e, EINVAL, "'%s' is no name that a file can have", name);
    if (strlen(name) > NAME_MAX)
        return err_set(e, ENAMETOOLONG,
                       "the name '%.40s...' has %zu bytes, and the host takes %d at most", name,
                       strlen(name), NAME_MAX);
    if (!strncmp(name, FAT_TEMP_PREFIX, strlen(FAT_TEMP_PREFIX)))
        return err_set(e, EINVAL, "names that begin with '%s' are reserved", FAT_TEMP_PREFIX);
    for (const uint8_t *p = (const uint8_t *)name; *p; p++) {
        if (*p < 0x20 || *p == 0x7f || strchr("\"*/:<>?\\|", *p))
            return err_set(e, EINVAL, "'%s' has a sign that is forbidden in names", name);
        if (!is_long && *p >= 0x80)
            return err_set(e, EINVAL, "'%s' has signs of an unknown code page, and no long name",
                           name);
    }
    return 0;
}

static int make_name(const struct long_name *n, const uint8_t *s, char **out, struct err *e) {
    bool is_long = n->slots && !n->next && n->sum == fat_short_sum(s) && le16_load(n->units);
    struct strbuf b AUTO_STRBUF = STRBUF_INIT;
    char text[FAT_SHORT + 2];
    short_text(s, text);
    if (is_long && !utf16_to_utf8(n->units, (size_t)n->slots * SLOT_UNITS_BYTES, false, &b))
        return err_set(e, EINVAL, "'%s' has a long name that is not UTF-16 text", text);
    int r = check_name(is_long ? b.s : text, is_long, e);
    if (r == 0 && !(*out = strdup(is_long ? b.s : text)))
        r = err_set(e, ENOMEM, "no memory for the names");
    return r;
}

/* ---- directories ---- */

static int add_file(struct fat_volume *f, uint32_t dir, const struct long_name *n, const uint8_t *s,
                    struct err *e) {
    if (f->count == FAT_ENTRIES_MAX)
        return err_set(e, EFBIG, "there are more than %d files and directories", FAT_ENTRIES_MAX);
    if (f->v[dir].depth == FAT_DEPTH_MAX)
        return err_set(e, EFBIG, "it is more than %d directories deep", FAT_DEPTH_MAX);
    if (f->count == f->room) {
        uint32_t room = f->room * 2;
        struct fat_file *v = realloc(f->v, room * sizeof(*v));
        if (!v)
            return err_set(e, ENOMEM, "no memory for the names");
        f->v = v;
        f->room = room;
    }
    struct fat_file *file = &f->v[f->count];
    *file = (struct fat_file){.parent = dir, .match = NONE, .like = NONE};
    int r = make_name(n, s, &file->name, e);
    if (r < 0)
        return r;
    file->host = file->name;
    file->depth = (uint16_t)(f->v[dir].depth + 1);
    file->is_dir = s[11] & 0x10;
    file->read_only = s[11] & 0x01;
    file->cluster = le16_load(s + 26);
    if (f->l->type == 32)
        file->cluster |= (uint32_t)(le16_load(s + 20) & 0x0fff) << 16;
    file->size = file->is_dir ? 0 : le32_load(s + 28);
    file->time = le16_load(s + 22);
    file->date = le16_load(s + 24);
    memcpy(file->short_name, s, FAT_SHORT);
    f->count++;
    return 0;
}

static int parse_slots(struct fat_volume *f, uint32_t dir, const uint8_t *buf, size_t bytes,
                       struct err *e) {
    struct long_name n = {.slots = 0};
    for (size_t at = 0; at + FAT_SLOT <= bytes && buf[at]; at += FAT_SLOT) {
        const uint8_t *s = buf + at;
        bool dot = dir && at < (size_t)2 * FAT_SLOT && s[0] == '.' && (s[11] & 0x10);
        if (s[0] != 0xe5 && (s[11] & 0x3f) == 0x0f) {
            add_long_slot(&n, s);
            continue;
        }
        int r = 0;
        if (s[0] != 0xe5 && !(s[11] & 0x08) && !dot)
            r = add_file(f, dir, &n, s, e);
        if (r < 0)
            return r;
        n.slots = 0;
    }
    return 0;
}

static int by_number(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* Names by their hashes without case: two alike are taken for one name. */
static int check_names_differ(const struct fat_volume *f, uint32_t dir, struct err *e) {
    const struct fat_file *d = &f->v[dir];
    uint64_t *v AUTO_FREE = malloc((d->children + (size_t)1) * sizeof(*v));
    if (!v)
        return err_set(e, ENOMEM, "no memory for the names");
    for (uint32_t i = 0; i < d->children; i++) {
        uint16_t units[FAT_UNITS_MAX + 1];
        int n = fat_utf16(f->v[d->first_child + i].name, units);
        uint64_t h = 1;
        for (int k = 0; k < n; k++) {
            h = (h ^ fat_fold(units[k])) * UINT64_C(0x9e3779b97f4a7c15);
            h ^= h >> 29;
        }
        v[i] = h;
    }
    qsort(v, d->children, sizeof(*v), by_number);
    for (uint32_t i = 1; i < d->children; i++)
        if (v[i] == v[i - 1])
            return err_set(e, EUCLEAN, "two names in it differ by upper and lower case at most");
    return 0;
}

/* The whole directory, at most 2 MiB.  The caller frees *buf. */
static int load_dir_co(struct fat_volume *f, uint32_t dir, uint8_t **buf, size_t *bytes,
                       struct err *e) {
    const struct fat_layout *l = f->l;
    uint64_t cluster = fat_volume_cluster_bytes(f);
    bool fixed = !dir && l->type != 32;
    uint32_t count = 0, c = f->v[dir].cluster;
    int r = 0;
    *bytes = (size_t)l->root_slots * FAT_SLOT;
    if (!fixed) {
        r = claim_co(f, c, (uint32_t)div_up(DIR_BYTES_MAX, cluster), &count, e);
        if (r < 0)
            return r;
        *bytes = count * cluster;
    }
    *buf = malloc(*bytes);
    if (!*buf)
        return err_set(e, ENOMEM, "no memory for a directory");
    if (fixed) {
        uint64_t at = (uint64_t)l->start + l->reserved + 2 * (uint64_t)l->fat_sectors;
        r = disk_pread_co(f->disk, at * FAT_SECTOR, *buf, *bytes);
    }
    for (uint32_t i = 0; r == 0 && i < count; i++) {
        r = disk_pread_co(f->disk, fat_volume_offset(f, c), *buf + i * cluster, cluster);
        if (r == 0)
            r = fat_volume_next_co(f, c, &c);
    }
    return r < 0 ? err_errno(e, -r, "reading the directory") : 0;
}

static int read_dir_co(struct fat_volume *f, uint32_t dir, struct err *e) {
    uint8_t *buf AUTO_FREE = NULL;
    size_t bytes;
    int r = load_dir_co(f, dir, &buf, &bytes, e);
    f->v[dir].first_child = f->count;
    if (r == 0)
        r = parse_slots(f, dir, buf, bytes, e);
    f->v[dir].children = f->count - f->v[dir].first_child;
    return r == 0 ? check_names_differ(f, dir, e) : r;
}

static int read_file_co(struct fat_volume *f, uint32_t i, struct err *e) {
    const struct fat_file *file = &f->v[i];
    uint32_t clusters = 0;
    int r = 0;
    if (file->cluster)
        r = claim_co(f, file->cluster, UINT32_MAX, &clusters, e);
    if (r == 0 && clusters * fat_volume_cluster_bytes(f) < file->size)
        r = err_set(e, EUCLEAN, "has %" PRIu32 " bytes in %" PRIu32 " clusters, which is too few",
                    file->size, clusters);
    return r;
}

int fat_volume_read_co(struct fat_volume *f, struct node *disk, const struct fat_tree *t,
                       const struct fat_layout *l, struct err *e) {
    *f = (struct fat_volume){.disk = disk, .l = l, .room = 64};
    f->v = calloc(f->room, sizeof(*f->v));
    f->claimed = calloc(l->clusters / 8 + 2, 1);
    f->window = malloc(WINDOW_BYTES);
    if (!f->v || !f->claimed || !f->window || !(f->v[0].name = strdup("")))
        return err_set(e, ENOMEM, "no memory for the file system");
    f->count = 1;
    f->v[0].is_dir = f->v[0].placed = true;
    f->v[0].like = NONE;
    f->v[0].host = "";
    f->v[0].cluster = l->type == 32 ? 2 : 0;
    int r = check_head_co(f, t, e);
    if (r == 0)
        r = check_clean_co(f, e);
    for (uint32_t i = 0; r == 0 && i < f->count; i++) {
        r = f->v[i].is_dir ? read_dir_co(f, i, e) : read_file_co(f, i, e);
        if (r < 0) {
            AUTO_FREE char *path = fat_volume_path(f, i);
            return err_prefix(e, "%s", path);
        }
    }
    return r;
}
