/* SPDX-License-Identifier: MIT */
/*
 * Sizes as people write them: integers only, so that 1.1T is the same number on every machine.
 *
 * The fraction is kept as a decimal integer and its power of ten (at most 18 digits; more say
 * nothing at 2^60) and multiplied out in 128 bits, rounded down to a byte.
 */
#include <ctype.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include "base/ck.h"
#include "base/err.h"
#include "base/size.h"
#include "base/strbuf.h"

static const char suffixes[] = "bkmgtpe";

static int complain(struct err *e, int code, const char *what, const char *s, const char *why) {
    struct strbuf b AUTO_STRBUF = STRBUF_INIT;
    strbuf_puts(&b, "");
    strbuf_put_safe(&b, s, strnlen(s, 80));
    return err_set(e, code, "%s '%s' %s", what, b.s, why);
}

static int complain_range(struct err *e, const char *what, const char *s) {
    return complain(e, ERANGE, what, s, "is larger than 9223372036854775807 bytes");
}

static int complain_form(struct err *e, const char *what, const char *s) {
    int rc = complain(e, EINVAL, what, s, "is not a size");
    err_hint(e, "write a number of bytes, or one with a suffix: 4096, 64k, 1.5G");
    return rc;
}

/* Digits of `base` from *s on; false when they do not fit.  *s moves behind them. */
static bool digits(const char **s, unsigned base, uint64_t *out) {
    uint64_t v = 0;
    bool fits = true;
    for (; isxdigit((unsigned char)**s); ++*s) {
        unsigned char c = **s;
        unsigned d = isdigit(c) ? c - '0' : (c | 0x20) - 'a' + 10u;
        if (d >= base)
            break;
        fits = fits && ck_mul(v, base, &v) && ck_add(v, d, &v);
    }
    *out = v;
    return fits && v <= INT64_MAX;
}

/* Fraction digits as num / den, cut after 18; false when there is none. */
static bool fraction(const char **s, uint64_t *num, uint64_t *den) {
    *num = 0;
    *den = 1;
    const char *start = *s;
    for (; isdigit((unsigned char)**s); ++*s)
        if (*s - start < 18) {
            *num = *num * 10 + (**s - '0');
            *den *= 10;
        }
    return *s > start;
}

int size_parse(const char *s, const char *what, uint64_t *out, struct err *e) {
    const char *p = s;
    uint64_t whole, num = 0, den = 1;
    if (p[0] == '0' && (p[1] | 0x20) == 'x' && isxdigit((unsigned char)p[2])) {
        p += 2;
        bool fits = digits(&p, 16, &whole);
        if (*p)
            return complain_form(e, what, s);
        if (!fits)
            return complain_range(e, what, s);
        *out = whole;
        return 0;
    }
    if (!isdigit((unsigned char)*p))
        return complain_form(e, what, s);
    bool fits = digits(&p, 10, &whole), has_fraction = *p == '.';
    if (has_fraction) {
        p++;
        if (!fraction(&p, &num, &den))
            return complain_form(e, what, s);
    }
    unsigned power = 0;
    if (*p) {
        const char *at = strchr(suffixes, tolower((unsigned char)*p));
        if (!at || p[1])
            return complain_form(e, what, s);
        power = at - suffixes;
    }
    if (has_fraction && !power)
        return complain_form(e, what, s);
    uint64_t unit = (uint64_t)1 << (10 * power);
    uint64_t part = (uint64_t)((unsigned __int128)num * unit / den), v;
    if (!fits || !ck_mul(whole, unit, &v) || !ck_add(v, part, &v) || v > INT64_MAX)
        return complain_range(e, what, s);
    *out = v;
    return 0;
}

char *size_human(uint64_t bytes, char buf[static 32]) {
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double v = bytes;
    unsigned i = 0;
    /* 999.5 and more would be printed as 1e+03. */
    for (; v >= 999.5 && i < 6; i++)
        v /= 1024;
    snprintf(buf, 32, "%.3g %s", v, units[i]);
    return buf;
}
