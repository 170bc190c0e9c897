/* SPDX-License-Identifier: MIT */
/* Paths of Windows in UTF-16, as disk images of Microsoft keep them, and paths of this system. */
#ifndef STRATA_FORMAT_UTF16_H
#define STRATA_FORMAT_UTF16_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct strbuf;

/*
 * `bytes` of UTF-16, up to a zero unit, appended to `out` as UTF-8; false when that is not text
 * (control characters, half pairs) or empty.
 */
bool utf16_to_utf8(const uint8_t *p, size_t bytes, bool big, struct strbuf *out);
/* The same for a path: backslashes become slashes, and a leading ".\" goes. */
bool utf16_to_path(const uint8_t *p, size_t bytes, bool big, struct strbuf *out);

/*
 * A path in UTF-8 as UTF-16 with backslashes, into at most `cap` bytes; the bytes used, or 0 when
 * it does not fit or is not UTF-8.  No zero unit behind it.
 */
size_t utf16_from_path(const char *path, bool big, uint8_t *out, size_t cap);

#endif
