/* SPDX-License-Identifier: MIT */
/*
 * Names: UTF-8 of the host, UTF-16 long names, and the 8.3 names that every entry needs; see fat.h.
 *
 * A short name keeps the letters, digits and signs that DOS allows; where that loses something, or
 * somebody has it already, its end is replaced by ~1, ~2 ...  A name that FAT cannot say (signs
 * that are forbidden there, a dot or space at its end, bytes that are not UTF-8, more than 255
 * units, or equal to a neighbour's but for upper and lower case) is shown by its short name alone:
 * nothing is hidden, and no reader meets two files of one name.
 *
 * Tails are counted per base in the same table that knows the names in use, so ten thousand names
 * with one beginning cost no more than others.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "storage/fat.h"

#define TAIL_MAX 999999

/* The next character, or -1: not UTF-8. */
static int32_t utf8_next(const uint8_t **p) {
    const uint8_t *s = *p;
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    int more = *s < 0x80 ? 0 : *s >= 0xf0 && *s < 0xf8 ? 3 : *s >= 0xe0 ? 2 : 1;
    if (*s >= 0xf8 || (*s >= 0x80 && *s < 0xc0))
        return -1;
    uint32_t c = more ? *s & (0x3fu >> more) : *s;
    s++;
    for (int i = 0; i < more; i++, s++) {
        if ((*s & 0xc0) != 0x80)
            return -1;
        c = c << 6 | (*s & 0x3f);
    }
    if (more && (c < least[more + 1] || c > 0x10ffff || (c >= 0xd800 && c < 0xe000)))
        return -1;
    *p = s;
    return (int32_t)c;
}

int fat_utf16(const char *name, uint16_t *out) {
    const uint8_t *p = (const uint8_t *)name;
    int n = 0;
    while (*p) {
        int32_t c = utf8_next(&p);
        if (c < 0 || n + (c > 0xffff) >= FAT_UNITS_MAX)
            return -1;
        if (c > 0xffff) {
            out[n++] = (uint16_t)(0xd800 + ((c - 0x10000) >> 10));
            c = 0xdc00 + ((c - 0x10000) & 0x3ff);
        }
        out[n++] = (uint16_t)c;
    }
    return n;
}

uint8_t fat_short_sum(const uint8_t *s) {
    uint8_t sum = 0;
    for (int i = 0; i < FAT_SHORT; i++)
        sum = (uint8_t)((sum >> 1 | sum << 7) + s[i]);
    return sum;
}

static bool short_sign(uint8_t c) {
    return (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || (c && strchr("$%'-_@~`!(){}^#&", c));
}

bool fat_label_is_valid(const char *label) {
    if (strlen(label) > FAT_SHORT || label[0] == ' ')
        return false;
    for (const char *p = label; *p; p++)
        if (*p < 0x20 || *p == 0x7f || strchr("\"*+,./:;<=>?[\\]|", *p))
            return false;
    return true;
}

/* What a long name may hold. */
static bool can_be_long(const char *name, int units) {
    if (units <= 0)
        return false;
    size_t n = strlen(name);
    if (name[n - 1] == '.' || name[n - 1] == ' ')
        return false;
    for (const uint8_t *p = (const uint8_t *)name; *p; p++)
        if (*p < 0x20 || *p == 0x7f || strchr("\"*/:<>?\\|", *p))
            return false;
    return true;
}

/* Puts [from, to) of a name into `cap` bytes of a short one.  Returns whether something is lost. */
static bool short_part(const uint8_t *from, const uint8_t *to, uint8_t *out, int cap) {
    bool lost = false;
    int n = 0;
    while (from < to) {
        uint8_t c = *from++;
        if (c >= 'a' && c <= 'z')
            c = (uint8_t)(c - 'a' + 'A');
        if (c == ' ' || c == '.') {
            lost = true;
            continue;
        }
        if (!short_sign(c)) {
            lost = true;
            while (from < to && (*from & 0xc0) == 0x80)
                from++; /* one sign for a character of several bytes */
            c = '_';
        }
        if (n == cap)
            return true;
        out[n++] = c;
    }
    return lost;
}

/* The short name without a tail.  Returns whether one is needed to tell that something is lost. */
static bool short_base(const char *name, uint8_t *out) {
    const uint8_t *p = (const uint8_t *)name;
    const uint8_t *start = p + strspn(name, ". "), *end = p + strlen(name);
    const char *dot = strrchr((const char *)start, '.');
    const uint8_t *stop = dot && dot != (const char *)start ? (const uint8_t *)dot : end;
    memset(out, ' ', FAT_SHORT);
    bool lost = start != p;
    lost |= short_part(start, stop, out, 8);
    if (stop < end) {
        lost |= short_part(stop + 1, end, out + 8, 3);
        lost |= stop + 1 == end;
    }
    if (out[0] == ' ') {
        out[0] = '_';
        lost = true;
    }
    return lost;
}

/* Open addressing over short names; `tail` is the next one to try for this as a base. */
struct name_slot {
    uint8_t name[FAT_SHORT];
    bool used, taken;
    uint32_t tail;
};
struct name_table {
    struct name_slot *v;
    uint64_t *folded; /* hashes of the long names without their case */
    uint64_t mask;
};

static uint64_t mix(uint64_t h, uint64_t v) {
    h = (h ^ v) * UINT64_C(0x9e3779b97f4a7c15);
    return h ^ h >> 29;
}

static struct name_slot *find_name(struct name_table *n, const uint8_t *name) {
    uint64_t h = mix(mix(1, le64_load(name)), le32_load(name + 7));
    for (;; h++) {
        struct name_slot *s = &n->v[h & n->mask];
        if (!s->used) {
            s->used = true;
            s->tail = 1;
            memcpy(s->name, name, FAT_SHORT);
            return s;
        }
        if (!memcmp(s->name, name, FAT_SHORT))
            return s;
    }
}

uint16_t fat_fold(uint16_t c) {
    if ((c >= 'a' && c <= 'z') || (c >= 0xe0 && c <= 0xfe && c != 0xf7) ||
        (c >= 0x3b1 && c <= 0x3c9 && c != 0x3c2) || (c >= 0x430 && c <= 0x44f))
        return (uint16_t)(c - 0x20);
    if (c >= 0x450 && c <= 0x45f)
        return (uint16_t)(c - 0x50);
    if ((c >= 0x100 && c <= 0x137) || (c >= 0x14a && c <= 0x177) || (c >= 0x460 && c <= 0x481) ||
        (c >= 0x1e00 && c <= 0x1eff))
        return c & (uint16_t)~1u;
    return c;
}

/* True when no neighbour has the same name but for its case. */
static bool claim_folded(struct name_table *n, const uint16_t *units, int count) {
    uint64_t h = 2;
    for (int i = 0; i < count; i++)
        h = mix(h, fat_fold(units[i]));
    h |= 1;
    for (uint64_t at = h;; at++) {
        uint64_t *s = &n->folded[(at >> 3) & n->mask];
        if (*s == h)
            return false;
        if (!*s) {
            *s = h;
            return true;
        }
        at += 7;
    }
}

/* Gives `f` a short name that nobody here has. */
static int make_short(struct name_table *n, struct fat_entry *f, struct err *e) {
    uint8_t base[FAT_SHORT];
    bool lost = short_base(f->name, base);
    struct name_slot *s = find_name(n, base);
    if (!lost && !s->taken) {
        s->taken = true;
        memcpy(f->short_name, base, FAT_SHORT);
        return 0;
    }
    for (;; s->tail++) {
        char tail[9];
        if (s->tail > TAIL_MAX)
            return err_set(e, EFBIG, "'%s': too many names with one beginning", f->name);
        int len = snprintf(tail, sizeof(tail), "~%" PRIu32, s->tail), body = 0;
        memcpy(f->short_name, base, FAT_SHORT);
        while (body < 8 - len && base[body] != ' ')
            body++;
        memcpy(f->short_name + body, tail, (size_t)len);
        memset(f->short_name + body + len, ' ', (size_t)(8 - body - len));
        struct name_slot *own = find_name(n, f->short_name);
        if (own->taken)
            continue;
        own->taken = true;
        s->tail++;
        return 0;
    }
}

void fat_short_text(const uint8_t *short_name, char out[FAT_SHORT + 2]) {
    int n = 0;
    for (int i = 0; i < FAT_SHORT; i++) {
        if (i == 8 && short_name[8] != ' ')
            out[n++] = '.';
        if (short_name[i] != ' ')
            out[n++] = (char)short_name[i];
    }
    out[n] = 0;
}

static bool same_as_short(const struct fat_entry *f) {
    char text[FAT_SHORT + 2];
    fat_short_text(f->short_name, text);
    return !strcmp(text, f->name);
}

static int name_one(struct fat_tree *t, struct name_table *n, struct fat_entry *f, struct err *e) {
    uint16_t units[FAT_UNITS_MAX + 1];
    int count = fat_utf16(f->name, units);
    int r = make_short(n, f, e);
    if (r < 0)
        return r;
    f->slots = 1;
    if (!can_be_long(f->name, count) || !claim_folded(n, units, count))
        t->short_only++;
    else if (!same_as_short(f))
        f->slots = (uint8_t)(1 + div_up((uint64_t)count, 13));
    return 0;
}

int fat_name_children(struct fat_tree *t, uint32_t dir, struct err *e) {
    struct fat_entry *d = &t->v[dir];
    struct name_table n = {.mask = 63};
    uint32_t slot = dir ? 2 : t->label[0] != 0; /* "." and "..", or the label */
    while (n.mask + 1 < (uint64_t)d->children * 4)
        n.mask = n.mask * 2 + 1;
    n.v = calloc(n.mask + 1, sizeof(*n.v));
    n.folded = calloc(n.mask + 1, sizeof(*n.folded));
    int r = n.v && n.folded ? 0 : err_set(e, ENOMEM, "no memory for the names");
    for (uint32_t i = 0; !r && i < d->children; i++) {
        struct fat_entry *f = &t->v[d->first_child + i];
        r = name_one(t, &n, f, e);
        f->slot = slot;
        slot += f->slots;
        if (!r && slot > FAT_SLOTS_MAX)
            r = err_set(e, EFBIG, "%" PRIu32 " names are too many for one FAT directory",
                        d->children);
    }
    d->size = slot * FAT_SLOT;
    free(n.v);
    free(n.folded);
    return r;
}
