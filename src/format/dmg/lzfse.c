/* SPDX-License-Identifier: MIT */
/*
 * Decoding LZFSE: a row of blocks, each with a magic of four bytes.
 *
 *      bvx-  raw: u32 length, bytes
 *      bvxn  LZVN: u32 length, u32 code length, opcodes of 1 to 3 bytes
 *      bvx1, bvx2  literals, and triples of literal length, match length and distance, each coded
 *            by finite state entropy over bit streams that are read from their end
 *      bvx$  the end
 *
 * A state table has one row a state: a symbol with frequency f owns f rows, in the order of the
 * symbols; its rows read k or k - 1 bits for the next state.  Every state that a row can lead to
 * lies inside the table when the frequencies add up to its size, which is checked; so decoding
 * needs no check of states.
 *
 * Facts: layout, widths and base values of the reference implementation (lzfse/lzfse,
 * lzfse_internal.h).
 */
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "format/dmg/dmg.h"

#define MAGIC_RAW 0x2d787662u
#define MAGIC_V1 0x31787662u
#define MAGIC_V2 0x32787662u
#define MAGIC_LZVN 0x6e787662u
#define MAGIC_END 0x24787662u

enum { SYMS_L = 20, SYMS_M = 20, SYMS_D = 64, SYMS_LIT = 256 };
enum { STATES_L = 64, STATES_M = 64, STATES_D = 256, STATES_LIT = 1024 };
#define FREQS (SYMS_L + SYMS_M + SYMS_D + SYMS_LIT)
#define MATCHES_MAX 10000u
#define LITERALS_MAX 40000u
#define V1_BYTES (52u + 2 * FREQS) /* two of padding */
#define V2_BYTES 32u

struct row {
    int32_t base; /* value rows: the least value */
    int16_t delta;
    uint8_t bits, extra; /* for the next state; for the value */
    uint8_t symbol;
};

struct block {
    uint32_t raw, literals, matches, literal_bytes, lmd_bytes;
    int literal_bits, lmd_bits; /* 0 or less: bits not used in the last byte */
    uint16_t literal_state[4], l, m, d;
    uint16_t freq[FREQS];
};

struct lzfse {
    const uint8_t *in, *in_end;
    uint8_t *out, *out_start, *out_end;
    struct block b;
    struct row lit[STATES_LIT], l[STATES_L], m[STATES_M], d[STATES_D];
    uint8_t literal[LITERALS_MAX + 4];
};

/* ---- bits, from the end ---- */

struct bits {
    const uint8_t *start;
    size_t at; /* bits before the position */
};

static bool bits_init(struct bits *b, const uint8_t *start, uint32_t bytes, int unused) {
    if (unused < -7 || unused > 0 || (uint64_t)bytes * 8 < (uint64_t)-unused)
        return false;
    b->start = start;
    b->at = (size_t)bytes * 8 - (size_t)-unused;
    return true;
}

/* Up to 26 bits; behind the beginning *bad is set. */
static inline uint32_t bits_pull(struct bits *b, unsigned n, bool *bad) {
    if (n > b->at) {
        *bad = true;
        b->at = 0;
        return 0;
    }
    b->at -= n;
    size_t byte = b->at / 8, have = (b->at + n + 7) / 8 - byte;
    uint32_t v = 0;
    for (size_t i = 0; i < have; i++)
        v |= (uint32_t)b->start[byte + i] << 8 * i;
    return v >> b->at % 8 & ((1u << n) - 1);
}

/* ---- tables ---- */

static bool make_table(struct row *t, int states, const uint16_t *freq, int symbols,
                       const uint8_t *extra) {
    uint32_t sum = 0;
    int32_t base = 0;
    for (int i = 0; i < symbols; i++)
        sum += freq[i];
    if (sum != (uint32_t)states)
        return false;
    for (int i = 0; i < symbols; i++) {
        int f = freq[i];
        if (f) {
            int k = __builtin_clz((unsigned)f) - __builtin_clz((unsigned)states);
            int first = (2 * states >> k) - f;
            for (int j = 0; j < f; j++, t++) {
                *t = (struct row){.symbol = (uint8_t)i, .base = base};
                t->extra = extra ? extra[i] : 0;
                t->bits = (uint8_t)(j < first ? k : k - 1);
                t->delta = (int16_t)(j < first ? ((f + j) << k) - states : (j - first) << (k - 1));
            }
        }
        base += extra ? 1 << extra[i] : 0;
    }
    return true;
}

static inline uint8_t next_literal(const struct row *t, uint16_t *state, struct bits *b,
                                   bool *bad) {
    const struct row *r = &t[*state];
    *state = (uint16_t)((uint32_t)r->delta + bits_pull(b, r->bits, bad));
    return r->symbol;
}

static inline uint32_t next_value(const struct row *t, uint16_t *state, struct bits *b, bool *bad) {
    const struct row *r = &t[*state];
    uint32_t v = bits_pull(b, r->bits + r->extra, bad);
    *state = (uint16_t)((uint32_t)r->delta + (v >> r->extra));
    return (uint32_t)r->base + (v & ((1u << r->extra) - 1));
}

/* ---- headers ---- */

static bool parse_v1(const uint8_t *p, struct block *b) {
    b->raw = le32_load(p + 4);
    b->literals = le32_load(p + 12);
    b->matches = le32_load(p + 16);
    b->literal_bytes = le32_load(p + 20);
    b->lmd_bytes = le32_load(p + 24);
    b->literal_bits = (int32_t)le32_load(p + 28);
    for (int i = 0; i < 4; i++)
        b->literal_state[i] = le16_load(p + 32 + 2 * i);
    b->lmd_bits = (int32_t)le32_load(p + 40);
    b->l = le16_load(p + 44);
    b->m = le16_load(p + 46);
    b->d = le16_load(p + 48);
    for (int i = 0; i < FREQS; i++)
        b->freq[i] = le16_load(p + 50 + 2 * i);
    return true;
}

/* Frequencies of 2, 3, 5, 8 or 14 bits. */
static bool parse_freqs(const uint8_t *p, const uint8_t *end, uint16_t *freq) {
    static const uint8_t width[16] = {2, 3, 2, 5, 2, 3, 2, 8, 2, 3, 2, 5, 2, 3, 2, 14};
    uint32_t acc = 0;
    unsigned have = 0;
    for (int i = 0; i < FREQS; i++) {
        while (p < end && have <= 24) {
            acc |= (uint32_t)*p++ << have;
            have += 8;
        }
        unsigned n = width[acc & 15];
        if (n > have)
            return false;
        freq[i] = (uint16_t)(n == 2   ? acc >> 1 & 1
                             : n == 3 ? 2 + (acc >> 2 & 1)
                             : n == 5 ? 4 + (acc >> 3 & 3)
                             : n == 8 ? 8 + (acc >> 4 & 15)
                                      : 24 + (acc >> 4 & 1023));
        acc >>= n;
        have -= n;
    }
    return have < 8 && p == end;
}

static bool parse_v2(const uint8_t *p, uint32_t header, struct block *b) {
    uint64_t v0 = le64_load(p + 8), v1 = le64_load(p + 16), v2 = le64_load(p + 24);
    b->raw = le32_load(p + 4);
    b->literals = v0 & 0xfffff;
    b->literal_bytes = v0 >> 20 & 0xfffff;
    b->matches = v0 >> 40 & 0xfffff;
    b->literal_bits = (int)(v0 >> 60 & 7) - 7;
    for (int i = 0; i < 4; i++)
        b->literal_state[i] = v1 >> 10 * i & 0x3ff;
    b->lmd_bytes = v1 >> 40 & 0xfffff;
    b->lmd_bits = (int)(v1 >> 60 & 7) - 7;
    b->l = v2 >> 32 & 0x3ff;
    b->m = v2 >> 42 & 0x3ff;
    b->d = v2 >> 52 & 0x3ff;
    return parse_freqs(p + V2_BYTES, p + header, b->freq);
}

static bool make_tables(struct lzfse *s) {
    static const uint8_t extra_l[SYMS_L] = {[16] = 2, 3, 5, 8},
                         extra_m[SYMS_M] = {[16] = 3, 5, 8, 11};
    struct block *b = &s->b;
    uint8_t extra_d[SYMS_D];
    for (int i = 0; i < SYMS_D; i++)
        extra_d[i] = (uint8_t)(i / 4);
    for (int i = 0; i < 4; i++)
        if (b->literal_state[i] >= STATES_LIT)
            return false;
    return b->literals <= LITERALS_MAX && b->literals % 4 == 0 && b->matches <= MATCHES_MAX &&
           b->l < STATES_L && b->m < STATES_M && b->d < STATES_D &&
           make_table(s->l, STATES_L, b->freq, SYMS_L, extra_l) &&
           make_table(s->m, STATES_M, b->freq + SYMS_L, SYMS_M, extra_m) &&
           make_table(s->d, STATES_D, b->freq + SYMS_L + SYMS_M, SYMS_D, extra_d) &&
           make_table(s->lit, STATES_LIT, b->freq + SYMS_L + SYMS_M + SYMS_D, SYMS_LIT, NULL);
}

/* ---- output ---- */

static bool put_match(struct lzfse *s, size_t distance, size_t length) {
    if (!distance || distance > (size_t)(s->out - s->out_start) ||
        length > (size_t)(s->out_end - s->out))
        return false;
    const uint8_t *from = s->out - distance;
    if (distance >= length) {
        memcpy(s->out, from, length);
        s->out += length;
        return true;
    }
    while (length--)
        *s->out++ = *from++;
    return true;
}

static bool put_bytes(struct lzfse *s, const uint8_t *from, size_t length) {
    if (length > (size_t)(s->out_end - s->out))
        return false;
    memcpy(s->out, from, length);
    s->out += length;
    return true;
}

/* ---- blocks ---- */

static bool decode_literals(struct lzfse *s, const uint8_t *code) {
    struct block *b = &s->b;
    struct bits bits;
    bool bad = false;
    if (!bits_init(&bits, code, b->literal_bytes, b->literal_bits))
        return false;
    for (uint32_t i = 0; i < b->literals; i += 4)
        for (int k = 0; k < 4; k++)
            s->literal[i + k] = next_literal(s->lit, &b->literal_state[k], &bits, &bad);
    return !bad;
}

static bool decode_matches(struct lzfse *s, const uint8_t *code) {
    struct block *b = &s->b;
    struct bits bits;
    const uint8_t *lit = s->literal, *lit_end = lit + b->literals;
    uint32_t distance = 0;
    bool bad = false;
    if (!bits_init(&bits, code, b->lmd_bytes, b->lmd_bits))
        return false;
    for (uint32_t i = 0; i < b->matches; i++) {
        uint32_t l = next_value(s->l, &b->l, &bits, &bad);
        uint32_t m = next_value(s->m, &b->m, &bits, &bad);
        uint32_t d = next_value(s->d, &b->d, &bits, &bad);
        distance = d ? d : distance;
        if (bad || l > (size_t)(lit_end - lit) || !put_bytes(s, lit, l))
            return false;
        lit += l;
        if (m && !put_match(s, distance, m))
            return false;
    }
    return true;
}

static bool decode_fse(struct lzfse *s, bool v2) {
    const uint8_t *p = s->in;
    size_t left = (size_t)(s->in_end - p);
    if (left < (v2 ? V2_BYTES : V1_BYTES))
        return false;
    uint32_t header = v2 ? le32_load(p + 24) : V1_BYTES;
    if (header < (v2 ? V2_BYTES : V1_BYTES) || header > left)
        return false;
    uint8_t *start = s->out;
    if (!(v2 ? parse_v2(p, header, &s->b) : parse_v1(p, &s->b)) || !make_tables(s))
        return false;
    left -= header;
    if (s->b.literal_bytes > left || s->b.lmd_bytes > left - s->b.literal_bytes)
        return false;
    p += header;
    if (!decode_literals(s, p) || !decode_matches(s, p + s->b.literal_bytes))
        return false;
    s->in = p + s->b.literal_bytes + s->b.lmd_bytes;
    return (size_t)(s->out - start) == s->b.raw;
}

/*
 * One LZVN opcode: how long it is, and what it says.  L literals follow it, then a match of M.
 *
 *      LLMMMDDD DDDDDDDD            distance 11 bits     LLMMM111 D16     large distance
 *      101LLMMM DDDDDDMM DDDDDDDD   14 bits              LLMMM110         the distance before
 *      1110LLLL, 11100000 L8        literals             1111MMMM, 11110000 M8   match
 */
struct lzvn_op {
    uint32_t length, l, m, d; /* d 0: as before */
    bool end, bad;
};

static struct lzvn_op lzvn_op(const uint8_t *p, size_t left) {
    uint8_t c = p[0], b1 = left > 1 ? p[1] : 0, b2 = left > 2 ? p[2] : 0;
    struct lzvn_op op = {.length = 1};
    if (c >= 0xf0) {
        op.m = c & 15 ? c & 15 : 16u + b1;
        op.length = c & 15 ? 1 : 2;
    } else if (c >= 0xe0) {
        op.l = c & 15 ? c & 15 : 16u + b1;
        op.length = c & 15 ? 1 : 2;
    } else if (c >= 0xd0 || (c >= 0x70 && c < 0x80)) {
        op.bad = true;
    } else if (c >= 0xa0 && c < 0xc0) {
        op.length = 3;
        op.l = c >> 3 & 3;
        op.m = ((c & 7u) << 2 | (b1 & 3)) + 3;
        op.d = b1 >> 2 | (uint32_t)b2 << 6;
        op.bad = !op.d;
    } else if ((c & 7) == 7) {
        op.length = 3;
        op.l = c >> 6;
        op.m = (c >> 3 & 7u) + 3;
        op.d = b1 | (uint32_t)b2 << 8;
        op.bad = !op.d;
    } else if ((c & 7) == 6) {
        op.end = c == 6;
        op.bad = c == 0x1e || (c >= 0x26 && c < 0x40);
        if (c >= 0x40) {
            op.l = c >> 6;
            op.m = (c >> 3 & 7u) + 3;
        }
    } else {
        op.length = 2;
        op.l = c >> 6;
        op.m = (c >> 3 & 7u) + 3;
        op.d = (c & 7u) << 8 | b1;
        op.bad = !op.d;
    }
    return op;
}

static bool decode_lzvn(struct lzfse *s) {
    if (s->in_end - s->in < 12)
        return false;
    uint32_t raw = le32_load(s->in + 4), bytes = le32_load(s->in + 8), distance = 0;
    const uint8_t *p = s->in + 12, *end = p + bytes;
    uint8_t *start = s->out, *out_end = s->out_end;
    if (bytes > (size_t)(s->in_end - p) || raw > (size_t)(s->out_end - s->out))
        return false;
    s->out_end = start + raw;
    for (;;) {
        if (p == end)
            return false;
        struct lzvn_op op = lzvn_op(p, (size_t)(end - p));
        if (op.end)
            break;
        if (op.bad || op.length + op.l > (size_t)(end - p))
            return false;
        distance = op.d ? op.d : distance;
        if (!put_bytes(s, p + op.length, op.l) || (op.m && !put_match(s, distance, op.m)))
            return false;
        p += op.length + op.l;
    }
    s->out_end = out_end;
    s->in = end; /* the end mark is eight bytes */
    return s->out - start == raw && end - p == 8;
}

static bool decode_raw(struct lzfse *s) {
    if (s->in_end - s->in < 8)
        return false;
    uint32_t raw = le32_load(s->in + 4);
    if (raw > (size_t)(s->in_end - s->in) - 8 || !put_bytes(s, s->in + 8, raw))
        return false;
    s->in += 8 + (size_t)raw;
    return true;
}

int lzfse_decode(const void *in, size_t in_len, void *out, size_t out_len) {
    struct lzfse *s AUTO_FREE = malloc(sizeof(*s));
    if (!s)
        return -ENOMEM;
    s->in = in;
    s->in_end = s->in + in_len;
    s->out = s->out_start = out;
    s->out_end = s->out + out_len;
    while (s->in_end - s->in >= 4) {
        uint32_t magic = le32_load(s->in);
        if (magic == MAGIC_END)
            return s->out == s->out_end ? 0 : -EIO;
        bool ok = magic == MAGIC_RAW    ? decode_raw(s)
                  : magic == MAGIC_LZVN ? decode_lzvn(s)
                  : magic == MAGIC_V1   ? decode_fse(s, false)
                  : magic == MAGIC_V2   ? decode_fse(s, true)
                                        : false;
        if (!ok)
            return -EIO;
    }
    return -EIO;
}
