/* SPDX-License-Identifier: MIT */
/* Scatter lists: cutting, copying, filling.  Offsets are bytes into the whole list. */
#ifndef STRATA_BASE_IOV_H
#define STRATA_BASE_IOV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/*
 * The most elements that a scatter list may have anywhere in strata.  Callers with more join them
 * first; the limit lets slices live on a task's stack (16 bytes each: 1 KiB).
 */
#define IOV_MAX_STRATA 64
/* What a caller of the engine may pass: copy-on-write adds a head and a tail. */
#define IOV_MAX_REQUEST (IOV_MAX_STRATA - 2)

size_t iov_length(const struct iovec *iov, int n);
/*
 * Writes the part [offset, offset + len) of `iov` to `out` (room for `n` elements) and returns the
 * number of elements.  The part must lie inside the list.
 */
int iov_slice(const struct iovec *iov, int n, size_t offset, size_t len, struct iovec *out);
void iov_zero(const struct iovec *iov, int n, size_t offset, size_t len);
void iov_to_buf(const struct iovec *iov, int n, size_t offset, void *buf, size_t len);
void iov_from_buf(const struct iovec *iov, int n, size_t offset, const void *buf, size_t len);
bool iov_is_zero(const struct iovec *iov, int n, size_t offset, size_t len);
/* True when every base address is a multiple of `align` and every length too. */
bool iov_aligned(const struct iovec *iov, int n, size_t align);

#endif
