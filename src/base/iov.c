/* SPDX-License-Identifier: MIT */
/*
 * Scatter lists.  All but iov_length and iov_aligned are one walk: find the element that holds
 * `offset`, then visit pieces until `len` is used up.  Empty elements are passed over.  A range
 * that does not lie inside the list is our own mistake and asserted.
 */
#include <assert.h>
#include <string.h>
#include "base/bytes.h"
#include "base/iov.h"

struct walk {
    const struct iovec *iov, *end;
    size_t skip; /* bytes to pass over before the next piece */
    size_t left;
};

static struct walk walk_begin(const struct iovec *iov, int n, size_t offset, size_t len) {
    return (struct walk){iov, iov + n, offset, len};
}

/* The next non-empty piece; false at the end of the range. */
static bool walk_next(struct walk *w, struct iovec *piece) {
    if (!w->left)
        return false;
    while (w->iov < w->end && w->skip >= w->iov->iov_len) {
        w->skip -= w->iov->iov_len;
        w->iov++;
    }
    assert(w->iov < w->end);
    size_t len = w->iov->iov_len - w->skip;
    if (len > w->left)
        len = w->left;
    *piece = (struct iovec){(char *)w->iov->iov_base + w->skip, len};
    w->skip += len;
    w->left -= len;
    return true;
}

size_t iov_length(const struct iovec *iov, int n) {
    size_t sum = 0;
    for (int i = 0; i < n; i++)
        sum += iov[i].iov_len;
    return sum;
}

int iov_slice(const struct iovec *iov, int n, size_t offset, size_t len, struct iovec *out) {
    struct walk w = walk_begin(iov, n, offset, len);
    int count = 0;
    while (walk_next(&w, &out[count]))
        count++;
    return count;
}

void iov_zero(const struct iovec *iov, int n, size_t offset, size_t len) {
    struct iovec piece;
    for (struct walk w = walk_begin(iov, n, offset, len); walk_next(&w, &piece);)
        memset(piece.iov_base, 0, piece.iov_len);
}

void iov_to_buf(const struct iovec *iov, int n, size_t offset, void *buf, size_t len) {
    struct iovec piece;
    char *to = buf;
    for (struct walk w = walk_begin(iov, n, offset, len); walk_next(&w, &piece);) {
        memcpy(to, piece.iov_base, piece.iov_len);
        to += piece.iov_len;
    }
}

void iov_from_buf(const struct iovec *iov, int n, size_t offset, const void *buf, size_t len) {
    struct iovec piece;
    const char *from = buf;
    for (struct walk w = walk_begin(iov, n, offset, len); walk_next(&w, &piece);) {
        memcpy(piece.iov_base, from, piece.iov_len);
        from += piece.iov_len;
    }
}

bool iov_is_zero(const struct iovec *iov, int n, size_t offset, size_t len) {
    struct iovec piece;
    for (struct walk w = walk_begin(iov, n, offset, len); walk_next(&w, &piece);)
        if (!bytes_are_zero(piece.iov_base, piece.iov_len))
            return false;
    return true;
}

bool iov_aligned(const struct iovec *iov, int n, size_t align) {
    for (int i = 0; i < n; i++)
        if (((uintptr_t)iov[i].iov_base | iov[i].iov_len) & (align - 1))
            return false;
    return true;
}
