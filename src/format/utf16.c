/* SPDX-License-Identifier: MIT */
#include "format/utf16.h"

#include <string.h>

#include "base/bytes.h"
#include "base/strbuf.h"

static void put_utf8(struct strbuf *b, uint32_t c) {
    char out[4];
    size_t n = 0;
    if (c < 0x80) {
        out[n++] = (char)c;
    } else if (c < 0x800) {
        out[n++] = (char)(0xc0 | c >> 6);
        out[n++] = (char)(0x80 | (c & 0x3f));
    } else if (c < 0x10000) {
        out[n++] = (char)(0xe0 | c >> 12);
        out[n++] = (char)(0x80 | (c >> 6 & 0x3f));
        out[n++] = (char)(0x80 | (c & 0x3f));
    } else {
        out[n++] = (char)(0xf0 | c >> 18);
        out[n++] = (char)(0x80 | (c >> 12 & 0x3f));
        out[n++] = (char)(0x80 | (c >> 6 & 0x3f));
        out[n++] = (char)(0x80 | (c & 0x3f));
    }
    strbuf_add(b, out, n);
}

bool utf16_to_utf8(const uint8_t *p, size_t bytes, bool big, struct strbuf *out) {
    size_t before = out->len;
    for (size_t i = 0; i + 1 < bytes; i += 2) {
        uint32_t c = big ? be16_load(p + i) : le16_load(p + i);
        if (!c)
            break;
        if (c >= 0xd800 && c < 0xdc00 && i + 3 < bytes) {
            uint32_t low = big ? be16_load(p + i + 2) : le16_load(p + i + 2);
            if (low < 0xdc00 || low > 0xdfff)
                return false;
            c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
            i += 2;
        } else if (c < 0x20 || (c >= 0xd800 && c <= 0xdfff)) {
            return false;
        }
        put_utf8(out, c);
    }
    return out->len > before;
}

bool utf16_to_path(const uint8_t *p, size_t bytes, bool big, struct strbuf *out) {
    size_t at = out->len;
    if (!utf16_to_utf8(p, bytes, big, out))
        return false;
    for (size_t i = at; i < out->len; i++)
        if (out->s[i] == '\\')
            out->s[i] = '/';
    if (!strncmp(out->s + at, "./", 2)) {
        memmove(out->s + at, out->s + at + 2, out->len - at - 1);
        out->len -= 2;
    }
    return out->len > at;
}

/* The next character of UTF-8; 0 at the end, UINT32_MAX: none. */
static uint32_t next_char(const uint8_t **p) {
    uint32_t c = *(*p)++;
    int more = c < 0x80 ? 0 : c >= 0xf0 && c < 0xf8 ? 3 : c >= 0xe0 ? 2 : c >= 0xc2 ? 1 : -1;
    if (more < 0 || c >= 0xf8)
        return UINT32_MAX;
    if (more)
        c &= 0x3fu >> more;
    for (; more; more--, (*p)++) {
        if ((**p & 0xc0) != 0x80)
            return UINT32_MAX;
        c = c << 6 | (**p & 0x3f);
    }
    return c > 0x10ffff || (c >= 0xd800 && c < 0xe000) ? UINT32_MAX : c;
}

size_t utf16_from_path(const char *path, bool big, uint8_t *out, size_t cap) {
    const uint8_t *p = (const uint8_t *)path;
    size_t n = 0;
    for (uint32_t c; (c = next_char(&p)) != 0;) {
        uint16_t units[2] = {(uint16_t)(c == '/' ? '\\' : c)};
        size_t count = 1;
        if (c == UINT32_MAX)
            return 0;
        if (c >= 0x10000) {
            units[0] = (uint16_t)(0xd800 + ((c - 0x10000) >> 10));
            units[1] = (uint16_t)(0xdc00 + ((c - 0x10000) & 0x3ff));
            count = 2;
        }
        for (size_t i = 0; i < count; i++, n += 2) {
            if (n + 2 > cap)
                return 0;
            if (big)
                be16_store(out + n, units[i]);
            else
                le16_store(out + n, units[i]);
        }
    }
    return n;
}
