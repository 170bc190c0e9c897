/* SPDX-License-Identifier: MIT */
/*
 * From plist or resource fork to the list of chunks; see dmg.h.
 *
 * Bytes stream through: file -> <data> elements -> base64 -> one table (header of 204 bytes,
 * entries of 40).  What does not begin with "mish" is something else and passed over.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/node.h"
#include "format/dmg/dmg.h"

#define TABLE_HEADER 204u
#define ENTRY 40u
#define PIECE (64 * KIB)

/* Chunk types on disk. */
#define TYPE_ZERO 0u
#define TYPE_RAW 1u
#define TYPE_IGNORE 2u
#define TYPE_FIRST_CODE 0x80000004u /* ADC, zlib, bzip2, LZFSE, xz, as in enum dmg_kind */
#define TYPE_LAST_CODE 0x80000008u
#define TYPE_COMMENT 0x7ffffffeu
#define TYPE_END 0xffffffffu

struct reader {
    struct dmg *s;
    struct err *e;
    uint8_t buf[TABLE_HEADER];
    uint32_t have; /* bytes in buf */
    bool is_table; /* the header has been seen */
    bool is_other; /* no table: pass over */
    uint64_t first, data;
    uint32_t left; /* entries still to come */
};

static int add_chunk(struct dmg *s, const struct dmg_chunk *c, struct err *e) {
    struct dmg_chunk *last = s->count ? &s->chunks[s->count - 1] : NULL;
    if (last && last->kind == DMG_RAW && c->kind == DMG_RAW &&
        last->sector + last->sectors == c->sector &&
        last->host + (uint64_t)last->sectors * DMG_SECTOR == c->host &&
        c->sectors <= UINT32_MAX - last->sectors) {
        last->sectors += c->sectors;
        return 0;
    }
    if (s->count == DMG_CHUNKS_MAX)
        return err_set(e, EFBIG, "there are more than %u chunks of data", DMG_CHUNKS_MAX);
    if (s->count == s->room) {
        uint32_t room = s->room ? s->room + s->room / 2 : 64;
        struct dmg_chunk *v = realloc(s->chunks, room * sizeof(*v));
        if (!v)
            return err_set(e, ENOMEM, "no memory for %" PRIu32 " chunks", room);
        s->chunks = v;
        s->room = room;
    }
    s->chunks[s->count++] = *c;
    return 0;
}

/* A raw chunk may be longer than one entry of ours can say. */
static int add_raw(struct dmg *s, uint64_t sector, uint64_t sectors, uint64_t host, struct err *e) {
    int r = 0;
    while (!r && sectors) {
        uint32_t n = (uint32_t)min_u64(sectors, UINT32_MAX);
        struct dmg_chunk c = {.sector = sector, .kind = DMG_RAW, .host = host, .sectors = n};
        r = add_chunk(s, &c, e);
        sector += n;
        sectors -= n;
        host += (uint64_t)n * DMG_SECTOR;
    }
    return r;
}

static int entry(struct reader *rd, const uint8_t *p) {
    struct dmg *s = rd->s;
    uint32_t type = be32_load(p);
    uint64_t sector = be64_load(p + 8), sectors = be64_load(p + 16), host = be64_load(p + 24);
    uint64_t length = be64_load(p + 32), end;
    if (type == TYPE_COMMENT || type == TYPE_END || !sectors)
        return 0;
    if (!ck_add(sector, rd->first, &sector) || !ck_add(sector, sectors, &end) ||
        end > DMG_SECTORS_MAX)
        return err_set(rd->e, EINVAL, "a chunk of %" PRIu64 " sectors reaches behind any disk",
                       sectors);
    s->sectors = max_u64(s->sectors, end);
    if (type == TYPE_ZERO || type == TYPE_IGNORE) {
        s->seen[DMG_ZERO]++;
        return 0;
    }
    bool raw = type == TYPE_RAW;
    if (!raw && (type < TYPE_FIRST_CODE || type > TYPE_LAST_CODE))
        return err_set(rd->e, ENOTSUP,
                       "sector %" PRIu64 ": chunks of type 0x%08" PRIx32 " are unknown", sector,
                       type);
    if (!ck_add(host, rd->data, &host) || !ck_add(host, s->fork, &host) ||
        !ck_add(host, length, &end) || end > s->file_size || host >= s->file_size)
        return err_set(rd->e, EINVAL,
                       "sector %" PRIu64 ": %" PRIu64 " bytes at %" PRIu64
                       " reach behind the end of the file (%" PRIu64 " bytes)",
                       sector, length, host, s->file_size);
    if (raw && (sectors > length / DMG_SECTOR))
        return err_set(rd->e, EINVAL,
                       "sector %" PRIu64 ": %" PRIu64 " sectors in %" PRIu64 " plain bytes", sector,
                       sectors, length);
    if (!raw && (!length || length > DMG_UNIT_MAX || sectors > DMG_UNIT_MAX / DMG_SECTOR))
        return err_set(rd->e, EFBIG,
                       "sector %" PRIu64 ": a chunk of %" PRIu64 " sectors in %" PRIu64
                       " bytes is beyond the limit of %u bytes",
                       sector, sectors, length, DMG_UNIT_MAX);
    enum dmg_kind kind = raw ? DMG_RAW : (enum dmg_kind)(type - TYPE_FIRST_CODE + DMG_ADC);
    int r = s->seen[kind]++ ? 0 : dmg_codec_need(kind, rd->e);
    if (r || raw)
        return r ? r : add_raw(s, sector, sectors, host, rd->e);
    struct dmg_chunk c = {.sector = sector,
                          .kind = kind,
                          .host = host,
                          .sectors = (uint32_t)sectors,
                          .length = (uint32_t)length};
    return add_chunk(s, &c, rd->e);
}

static int table_header(struct reader *rd) {
    const uint8_t *p = rd->buf;
    if (be32_load(p + 4) != 1)
        return err_set(rd->e, ENOTSUP, "table %" PRIu32 " has version %" PRIu32 ", known is 1",
                       rd->s->tables, be32_load(p + 4));
    rd->first = be64_load(p + 8);
    rd->data = be64_load(p + 24);
    rd->left = be32_load(p + 200);
    rd->is_table = true;
    rd->s->tables++;
    return 0;
}

static void begin(struct reader *rd) {
    rd->have = rd->left = 0;
    rd->is_table = rd->is_other = false;
}

static int feed(struct reader *rd, const uint8_t *p, size_t n) {
    int r = 0;
    while (!r && n && !rd->is_other) {
        uint32_t want = rd->is_table ? ENTRY : TABLE_HEADER;
        if (rd->is_table && !rd->left)
            return 0; /* padding */
        uint32_t take = (uint32_t)min_u64(n, want - rd->have);
        memcpy(rd->buf + rd->have, p, take);
        rd->have += take;
        p += take;
        n -= take;
        if (!rd->is_table && rd->have >= 4 && memcmp(rd->buf, "mish", 4))
            rd->is_other = true;
        if (rd->have < want || rd->is_other)
            continue;
        rd->have = 0;
        if (rd->is_table)
            rd->left--;
        r = rd->is_table ? entry(rd, rd->buf) : table_header(rd);
    }
    return r;
}

static int finish(struct reader *rd) {
    if (rd->is_table && rd->left)
        return err_set(rd->e, EINVAL, "table %" PRIu32 " ends before its last %" PRIu32 " entries",
                       rd->s->tables, rd->left);
    return 0;
}

/* ---- order ---- */

static int by_sector(const void *a, const void *b) {
    uint64_t x = ((const struct dmg_chunk *)a)->sector, y = ((const struct dmg_chunk *)b)->sector;
    return x < y ? -1 : x > y;
}

static int put_in_order(struct dmg *s, struct err *e) {
    uint32_t i = 1;
    while (i < s->count && s->chunks[i - 1].sector <= s->chunks[i].sector)
        i++;
    if (i < s->count)
        qsort(s->chunks, s->count, sizeof(*s->chunks), by_sector);
    for (i = 1; i < s->count; i++) {
        const struct dmg_chunk *a = &s->chunks[i - 1], *b = a + 1;
        if (a->sector + a->sectors > b->sector)
            return err_set(e, EINVAL, "two chunks hold sector %" PRIu64, (uint64_t)b->sector);
    }
    return 0;
}

uint32_t dmg_find(const struct dmg *s, uint64_t sector) {
    uint32_t low = 0, high = s->count;
    while (low < high) {
        uint32_t mid = low + (high - low) / 2;
        if (s->chunks[mid].sector + s->chunks[mid].sectors <= sector)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

/* ---- the plist ---- */

static int8_t base64_value(uint8_t c) {
    return (int8_t)(c >= 'A' && c <= 'Z'   ? c - 'A'
                    : c >= 'a' && c <= 'z' ? c - 'a' + 26
                    : c >= '0' && c <= '9' ? c - '0' + 52
                    : c == '+'             ? 62
                    : c == '/'             ? 63
                                           : -1);
}

struct plist {
    struct reader rd;
    bool inside; /* a <data> element */
    unsigned matched;
    uint32_t acc, bits;
    size_t n;
    uint8_t out[3 * KIB]; /* decoded, not yet fed */
    uint8_t in[PIECE];
};

static int plist_flush(struct plist *x) {
    int r = feed(&x->rd, x->out, x->n);
    x->n = 0;
    return r;
}

static int plist_byte(struct plist *x, uint8_t c) {
    static const char tag[] = "<data>";
    if (!x->inside) {
        x->matched = c == (uint8_t)tag[x->matched] ? x->matched + 1 : c == '<';
        if (x->matched == sizeof(tag) - 1) {
            x->inside = true;
            x->matched = x->acc = x->bits = 0;
            begin(&x->rd);
        }
        return 0;
    }
    if (c == '<') {
        x->inside = false;
        x->matched = 1;
        int r = plist_flush(x);
        return r ? r : finish(&x->rd);
    }
    int8_t v = base64_value(c);
    if (v < 0)
        return 0; /* line ends and padding */
    x->acc = x->acc << 6 | (uint32_t)v;
    x->bits += 6;
    if (x->bits >= 8) {
        x->bits -= 8;
        x->out[x->n++] = (uint8_t)(x->acc >> x->bits);
    }
    return x->n == sizeof(x->out) ? plist_flush(x) : 0;
}

int dmg_read_plist_co(struct dmg *s, struct node *file, uint64_t offset, uint64_t length,
                      struct err *e) {
    struct plist *x AUTO_FREE = calloc(1, sizeof(*x));
    if (!x)
        return err_set(e, ENOMEM, "no memory for the tables");
    x->rd.s = s;
    x->rd.e = e;
    while (length) {
        size_t n = min_u64(length, PIECE);
        int r = disk_pread_co(file, offset, x->in, n);
        if (r < 0)
            return err_errno(e, -r, "reading the property list");
        for (size_t i = 0; !r && i < n; i++)
            r = plist_byte(x, x->in[i]);
        if (r < 0)
            return r;
        offset += n;
        length -= n;
    }
    if (x->inside)
        return err_set(e, EINVAL, "the property list ends inside a table");
    return put_in_order(s, e);
}

/* ---- the resource fork: u32 data offset, map offset, data length, map length; in the data, each
 * resource is u32 length and its bytes ---- */

static int fork_item_co(struct reader *rd, struct node *file, uint64_t at, uint64_t n,
                        uint8_t *buf) {
    begin(rd);
    while (n && !rd->is_other) {
        size_t take = min_u64(n, PIECE);
        int r = disk_pread_co(file, at, buf, take);
        if (r < 0)
            return err_errno(rd->e, -r, "reading the resource fork");
        if ((r = feed(rd, buf, take)) < 0)
            return r;
        at += take;
        n -= take;
    }
    return finish(rd);
}

int dmg_read_fork_co(struct dmg *s, struct node *file, uint64_t offset, uint64_t length,
                     struct err *e) {
    struct reader *rd AUTO_FREE = calloc(1, sizeof(*rd));
    uint8_t *buf AUTO_FREE = malloc(PIECE), head[16];
    if (!rd || !buf)
        return err_set(e, ENOMEM, "no memory for the tables");
    rd->s = s;
    rd->e = e;
    int r = length < sizeof(head) ? -EINVAL : disk_pread_co(file, offset, head, sizeof(head));
    uint64_t at = be32_load(head), n = r ? 0 : be32_load(head + 8);
    if (r || at > length || n > length - at)
        return r && r != -EINVAL
                   ? err_errno(e, -r, "reading the resource fork")
                   : err_set(e, EINVAL, "the resource fork of %" PRIu64 " bytes is too short",
                             length);
    while (n >= 4) {
        if ((r = disk_pread_co(file, offset + at, head, 4)) < 0)
            return err_errno(e, -r, "reading the resource fork");
        uint64_t item = be32_load(head);
        if (item > n - 4)
            return err_set(e, EINVAL, "a resource of %" PRIu64 " bytes where %" PRIu64 " are left",
                           item, n - 4);
        if ((r = fork_item_co(rd, file, offset + at + 4, item, buf)) < 0)
            return r;
        at += 4 + item;
        n -= 4 + item;
    }
    return put_in_order(s, e);
}
