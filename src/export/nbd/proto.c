/* SPDX-License-Identifier: MIT */
/* NBD on the wire: what is not worth inlining.  See proto.h. */
#include "export/nbd/proto.h"

#include <errno.h>

size_t nbd_greeting_encode(uint8_t *out, uint16_t handshake_flags) {
    be64_store(out, NBD_MAGIC);
    be64_store(out + 8, NBD_OPTS_MAGIC);
    be16_store(out + 16, handshake_flags);
    return NBD_GREETING_BYTES;
}

bool nbd_option_decode(const uint8_t *in, struct nbd_option *out) {
    out->option = be32_load(in + 8);
    out->length = be32_load(in + 12);
    return be64_load(in) == NBD_OPTS_MAGIC;
}

size_t nbd_opt_reply_encode(uint8_t *out, uint32_t option, uint32_t type, uint32_t length) {
    be64_store(out, NBD_REP_MAGIC);
    be32_store(out + 8, option);
    be32_store(out + 12, type);
    be32_store(out + 16, length);
    return NBD_OPT_REPLY_BYTES;
}

/* Takes "u32 length, bytes" off the front of [*p, *p + *left). */
static int take_string(const uint8_t **p, size_t *left, struct nbd_name *out) {
    if (*left < 4)
        return -EINVAL;
    uint32_t len = be32_load(*p);
    if (len > *left - 4)
        return -EINVAL;
    if (len > NBD_STRING_MAX)
        return -ENAMETOOLONG;
    out->s = (const char *)*p + 4;
    out->len = len;
    *p += 4 + (size_t)len;
    *left -= 4 + (size_t)len;
    return 0;
}

int nbd_info_request_decode(const uint8_t *in, size_t length, struct nbd_info_request *out) {
    int rc = take_string(&in, &length, &out->name);
    if (rc < 0)
        return rc;
    if (length < 2)
        return -EINVAL;
    out->count = be16_load(in);
    out->types = in + 2;
    return length - 2 == (size_t)out->count * 2 ? 0 : -EINVAL;
}

int nbd_meta_request_decode(const uint8_t *in, size_t length, struct nbd_meta_request *out) {
    int rc = take_string(&in, &length, &out->name);
    if (rc < 0)
        return rc;
    if (length < 4)
        return -EINVAL;
    out->count = be32_load(in);
    out->queries = in += 4;
    out->queries_len = length -= 4;
    /* Each query takes at least four bytes, so a lying count ends this loop early. */
    for (uint32_t i = 0; i < out->count; i++) {
        struct nbd_name q;
        rc = take_string(&in, &length, &q);
        if (rc < 0)
            return rc;
    }
    return length == 0 ? 0 : -EINVAL;
}

struct nbd_name nbd_meta_query_next(const uint8_t **pos) {
    struct nbd_name q = {(const char *)*pos + 4, be32_load(*pos)};
    *pos += 4 + (size_t)q.len;
    return q;
}

/* Length of the well-formed UTF-8 sequence at `s` (RFC 3629), 0 for none. */
static unsigned utf8_sequence(const uint8_t *s, size_t left) {
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    unsigned n = s[0] < 0x80       ? 1
                 : s[0] >> 5 == 6  ? 2
                 : s[0] >> 4 == 14 ? 3
                 : s[0] >> 3 == 30 ? 4
                                   : 0;
    if (n <= 1)
        return n;
    if (n > left)
        return 0;
    uint32_t c = s[0] & (0x7fu >> n);
    for (unsigned i = 1; i < n; i++) {
        if ((s[i] & 0xc0) != 0x80)
            return 0;
        c = c << 6 | (s[i] & 0x3f);
    }
    return c < least[n] || c > 0x10ffff || (c >= 0xd800 && c < 0xe000) ? 0 : n;
}

bool nbd_name_valid(struct nbd_name n) {
    if (n.len > NBD_STRING_MAX)
        return false;
    const uint8_t *s = (const uint8_t *)n.s;
    for (size_t i = 0; i < n.len;) {
        unsigned k = s[i] ? utf8_sequence(s + i, n.len - i) : 0;
        if (!k)
            return false;
        i += k;
    }
    return true;
}

bool nbd_name_is(struct nbd_name n, const char *s) {
    size_t len = strlen(s);
    return n.len == len && memcmp(n.s, s, len) == 0;
}

uint32_t nbd_errno_from(int error) {
    switch (-error) {
    case EPERM:
    case EACCES:
    case EROFS:
        return NBD_EPERM;
    case ENOMEM:
        return NBD_ENOMEM;
    case EINVAL:
        return NBD_EINVAL;
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        return NBD_ENOSPC;
    case EOVERFLOW:
        return NBD_EOVERFLOW;
    case EOPNOTSUPP: /* the same number as ENOTSUP here */
        return NBD_ENOTSUP;
    case ESHUTDOWN:
        return NBD_ESHUTDOWN;
    default:
        return NBD_EIO;
    }
}

uint16_t nbd_cmd_flags_allowed(uint16_t cmd, bool structured, bool extended) {
    uint16_t payload = extended ? NBD_CMD_FLAG_PAYLOAD_LEN : 0;
    switch (cmd) {
    case NBD_CMD_READ:
        return NBD_CMD_FLAG_FUA | (structured ? NBD_CMD_FLAG_DF : 0);
    case NBD_CMD_WRITE:
        return NBD_CMD_FLAG_FUA | payload;
    case NBD_CMD_WRITE_ZEROES:
        return NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO;
    case NBD_CMD_BLOCK_STATUS:
        return NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE | payload;
    default:
        return NBD_CMD_FLAG_FUA;
    }
}
