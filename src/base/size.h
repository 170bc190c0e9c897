/* SPDX-License-Identifier: MIT */
/* Sizes as people write them. */
#ifndef STRATA_BASE_SIZE_H
#define STRATA_BASE_SIZE_H

#include <stdint.h>

struct err;

/*
 * Parses "4096", "64k", "1.5G", "10b" (b = bytes), suffixes b k M G T P E of either case, each 1024
 * times the one before, an optional fraction with any suffix but b; or "0x" and hex digits, bytes.
 * Rejects signs, blanks, trailing bytes and anything above INT64_MAX.  Returns 0, or -EINVAL /
 * -ERANGE with `what` named in the error.
 */
int size_parse(const char *s, const char *what, uint64_t *out, struct err *e);

/*
 * Human form as qemu-img prints it: "512 B", "64 KiB", "1.5 GiB": three significant digits, no
 * trailing zeros.  Returns buf.
 */
char *size_human(uint64_t bytes, char buf[static 32]);

#endif
