/* SPDX-License-Identifier: MIT */
/*
 * The fields of a qcow2 image, found from its header where they stand, and the values that each is
 * set to: see hostile_qcow2.c.
 */
#include "format/qcow2/header.h"
#include "fuzz.h"
#include "hostile.h"

#define ENTRIES 6 /* of a table: the first ones, and the last */

/* ---------------------------------------------------------------- fields */

uint64_t target_get(const struct target *t, uint64_t at, unsigned width) {
    uint64_t v = 0;
    for (unsigned i = 0; i < width; i++)
        v = v << 8 | (at + i < t->size ? t->image[at + i] : 0);
    return v;
}

static void field(struct target *t, const char *name, const char *words, uint64_t at,
                  unsigned width, uint64_t table) {
    if (t->fields == FIELDS_MAX || at + width > t->size)
        return;
    struct field *f = &t->field[t->fields++];
    *f = (struct field){.words = words, .at = at, .width = width, .table = table};
    snprintf(f->name, sizeof(f->name), "%s", name);
}

static void string(struct target *t, const char *name, const char *words, uint64_t at,
                   uint64_t length) {
    if (!length || at + length > t->size || length > UINT32_MAX)
        return;
    field(t, name, words, at, 0, at);
    t->field[t->fields - 1].length = (uint32_t)length;
}

static void place(struct target *t, uint64_t at) {
    if (t->place_count < sizeof(t->places) / sizeof(*t->places))
        t->places[t->place_count++] = at;
}

/* Some entries of a table of `n`; *out: a callback for what a live one names. */
static void entries(struct target *t, const char *name, const char *words, uint64_t at, uint64_t n,
                    unsigned width, uint64_t mask,
                    void (*follow)(struct target *t, uint64_t host)) {
    char text[48];
    unsigned followed = 0;
    place(t, at);
    for (uint64_t i = 0; i < n && i < 100000 && at + (i + 1) * width <= t->size; i++) {
        uint64_t v = target_get(t, at + i * width, width);
        bool live = follow && v & mask;
        if (i < ENTRIES / 2 || i + 1 == n || (live && followed < ENTRIES)) {
            snprintf(text, sizeof(text), "%s %llu", name, (unsigned long long)i);
            field(t, text, words, at + i * width, width, at);
        }
        if (live && followed++ < 2)
            follow(t, v & mask);
    }
}

#define OFFSETS UINT64_C(0x00fffffffffffe00)

static void l2_table(struct target *t, uint64_t host) {
    bool extended = target_get(t, 4, 4) > 2 && target_get(t, 72, 8) & QCOW2_INCOMPAT_EXTENDED_L2;
    entries(t, "L2 entry", "L2", host, t->cluster / 8, 8, OFFSETS, NULL);
    (void)extended; /* every second one is a bitmap then, and so among the first */
}

static void refcount_block(struct target *t, uint64_t host) {
    entries(t, "refcounts", "refcount|count", host, t->cluster / 8, 8, 0, NULL);
}

static void bitmap_table(struct target *t, uint64_t at, uint64_t n) {
    entries(t, "bitmap table entry", "bitmap", at, n, 8, 0, NULL);
}

static void header_fields(struct target *t) {
    static const struct {
        const char *name, *words;
        unsigned at, width;
    } rows[] = {
        {"magic", "magic|qcow2", 0, 4},
        {"version", "version|header|extension", 4, 4},
        {"backing offset", "backing|extension", 8, 8},
        {"backing length", "backing|extension", 16, 4},
        {"cluster_bits", "cluster|table|L1|L2|size|extension|backing|header", 20, 4},
        {"size", "size|L1|bitmap", 24, 8},
        {"crypt_method", "encr|crypt", 32, 4},
        {"l1_size", "L1", 36, 4},
        {"l1_offset", "L1", 40, 8},
        {"reftable offset", "refcount", 48, 8},
        {"reftable clusters", "refcount", 56, 4},
        {"nb_snapshots", "snapshot", 60, 4},
        {"snapshots_offset", "snapshot", 64, 8},
        {"incompatible",
         "feature|bit|corrupt|dirty|closed cleanly|compress|data-file|subcluster|L1|L2|extended",
         72, 8},
        {"compatible", "feature", 80, 8},
        {"autoclear", "feature|bitmap", 88, 8},
        {"refcount_order", "refcount", 96, 4},
        {"header_length", "header|extension|backing", 100, 4},
        {"compression_type", "compression", 104, 1},
    };
    unsigned length = target_get(t, 4, 4) > 2 ? (unsigned)target_get(t, 100, 4) : 72;
    for (size_t i = 0; i < sizeof(rows) / sizeof(*rows); i++)
        if (rows[i].at < length)
            field(t, rows[i].name, rows[i].words, rows[i].at, rows[i].width, 0);
}

static void bitmap_directory(struct target *t, uint64_t at, uint64_t bytes) {
    static const struct {
        const char *name;
        unsigned at, width;
    } rows[] = {{"bitmap table offset", 0, 8}, {"bitmap table size", 8, 4},
                {"bitmap flags", 12, 4},       {"bitmap type", 16, 1},
                {"bitmap granularity", 17, 1}, {"bitmap name size", 18, 2},
                {"bitmap extra size", 20, 4}};
    place(t, at);
    for (uint64_t pos = at, n = 0; pos + 24 <= at + bytes && n < 3; n++) {
        uint64_t name = target_get(t, pos + 18, 2), extra = target_get(t, pos + 20, 4);
        for (size_t i = 0; i < sizeof(rows) / sizeof(*rows); i++)
            field(t, rows[i].name, "bitmap", pos + rows[i].at, rows[i].width, at);
        string(t, "bitmap name", "bitmap", pos + 24 + extra, name);
        bitmap_table(t, target_get(t, pos, 8), target_get(t, pos + 8, 4));
        pos += align_up(24 + extra + name, 8);
    }
}

static void extensions(struct target *t) {
    uint64_t at = target_get(t, 4, 4) > 2 ? target_get(t, 100, 4) : 72;
    for (unsigned n = 0; at + 8 < t->cluster && n < 10; n++) {
        uint32_t type = (uint32_t)target_get(t, at, 4);
        uint64_t length = target_get(t, at + 4, 4);
        field(t, "extension type", "extension|backing|bitmap|feature|data|encr", at, 4, 0);
        field(t, "extension length", "extension|backing|bitmap|feature|data|header", at + 4, 4, 0);
        if (type == QCOW2_EXT_END)
            break;
        if (type == QCOW2_EXT_BITMAPS) {
            field(t, "nb_bitmaps", "bitmap", at + 8, 4, 0);
            field(t, "bitmaps reserved", "bitmap", at + 12, 4, 0);
            field(t, "bitmap directory size", "bitmap", at + 16, 8, 0);
            field(t, "bitmap directory offset", "bitmap", at + 24, 8, 0);
            bitmap_directory(t, target_get(t, at + 24, 8), target_get(t, at + 16, 8));
        } else if (type == QCOW2_EXT_CRYPTO) {
            field(t, "LUKS offset", "encr|crypt|LUKS", at + 8, 8, 0);
            field(t, "LUKS length", "encr|crypt|LUKS", at + 16, 8, 0);
        } else {
            string(t, "extension data", NULL, at + 8, length);
        }
        at += 8 + align_up(length, 8);
    }
    string(t, "backing name", NULL, target_get(t, 8, 8), target_get(t, 16, 4));
}

static void snapshots(struct target *t) {
    static const struct {
        const char *name;
        unsigned at, width;
    } rows[] = {
        {"snapshot L1 offset", 0, 8},  {"snapshot L1 size", 8, 4},  {"snapshot id size", 12, 2},
        {"snapshot name size", 14, 2}, {"snapshot date", 16, 4},    {"snapshot nsec", 20, 4},
        {"snapshot clock", 24, 8},     {"snapshot VM size", 32, 4}, {"snapshot extra size", 36, 4}};
    uint64_t at = target_get(t, 64, 8), n = target_get(t, 60, 4);
    if (n)
        place(t, at);
    for (uint64_t i = 0, pos = at; i < n && i < 3 && pos + 40 < t->size; i++) {
        uint64_t extra = target_get(t, pos + 36, 4), id = target_get(t, pos + 12, 2),
                 name = target_get(t, pos + 14, 2);
        for (size_t k = 0; k < sizeof(rows) / sizeof(*rows); k++)
            field(t, rows[k].name, "snapshot", pos + rows[k].at, rows[k].width, at);
        if (extra >= 8)
            field(t, "snapshot VM size 64", "snapshot", pos + 40, 8, at);
        if (extra >= 16)
            field(t, "snapshot disk size", "snapshot", pos + 48, 8, at);
        string(t, "snapshot id", "snapshot", pos + 40 + extra, id);
        string(t, "snapshot name", "snapshot", pos + 40 + extra + id, name);
        entries(t, "snapshot L1 entry", "L1|L2|snapshot", target_get(t, pos, 8),
                target_get(t, pos + 8, 4), 8, OFFSETS, i ? NULL : l2_table);
        pos += align_up(40 + extra + id + name, 8);
    }
}

void target_find_fields(struct target *t) {
    t->fields = t->place_count = 0;
    t->cluster = UINT64_C(1) << min_u64(target_get(t, 20, 4), 21);
    t->data_file = target_get(t, 4, 4) > 2 && target_get(t, 72, 8) & QCOW2_INCOMPAT_DATA_FILE;
    place(t, 0);
    header_fields(t);
    extensions(t);
    entries(t, "L1 entry", "L1|L2", target_get(t, 40, 8), target_get(t, 36, 4), 8, OFFSETS,
            l2_table);
    entries(t, "refcount table entry", "refcount", target_get(t, 48, 8),
            (target_get(t, 56, 4) * t->cluster) / 8, 8, ~UINT64_C(511), refcount_block);
    snapshots(t);
}

/* ---------------------------------------------------------------- values */

unsigned target_values(const struct target *t, const struct field *f, uint64_t *v) {
    uint64_t now = target_get(t, f->at, f->width), flags = now & ~OFFSETS;
    uint64_t end = align_up(t->size, t->cluster);
    unsigned n = 0;
    static const uint64_t edges[] = {0,
                                     1,
                                     2,
                                     3,
                                     7,
                                     8,
                                     9,
                                     21,
                                     22,
                                     63,
                                     64,
                                     255,
                                     511,
                                     512,
                                     513,
                                     1023,
                                     1024,
                                     0x7fff,
                                     0xffff,
                                     65536,
                                     65537,
                                     0x1000000,
                                     0x7fffffff,
                                     0x80000000,
                                     0xffffffff,
                                     UINT64_C(1) << 40,
                                     (UINT64_C(1) << 56) - 512,
                                     UINT64_C(1) << 56,
                                     INT64_MAX - 511,
                                     INT64_MAX,
                                     UINT64_C(1) << 63,
                                     UINT64_MAX - 511,
                                     UINT64_MAX};
    for (size_t i = 0; i < sizeof(edges) / sizeof(*edges); i++)
        v[n++] = edges[i];
    v[n++] = now + 1;
    v[n++] = now - 1;
    v[n++] = now * 2;
    for (unsigned b = 0; b < 8 * f->width; b += f->width == 8 && b >= 16 && b < 48 ? 4 : 1)
        v[n++] = now ^ UINT64_C(1) << b; /* flags, one by one */
    if (f->width == 8) {
        uint64_t places[24];
        unsigned k = 0;
        for (; k < t->place_count; k++)
            places[k] = t->places[k];
        places[k++] = f->table;         /* a loop */
        places[k++] = f->table + 512;   /* and inside it */
        places[k++] = end - t->cluster; /* the last cluster */
        places[k++] = end;              /* just behind */
        places[k++] = end + t->cluster;
        for (unsigned i = 0; i < k; i++) {
            v[n++] = flags | places[i];
            if (n < VALUES_MAX - 4)
                v[n++] = places[i] + 8; /* unaligned */
        }
    }
    FUZZ_CHECK(n <= VALUES_MAX, "too many values");
    return n;
}
