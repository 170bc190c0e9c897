/* SPDX-License-Identifier: MIT */
/*
 * NBD on the wire: the numbers, and pure encoders and decoders of the fixed-size headers.
 *
 * Everything is big-endian.  Decoders read exactly the *_BYTES they are named after and say false
 * only for a wrong magic: what the fields may hold is the session's business.  Encoders return the
 * bytes they wrote.  No I/O, no state: unit-tested alone.
 *
 * Source: the NBD protocol document (NetworkBlockDevice/nbd, doc/proto.md).
 */
#ifndef STRATA_EXPORT_NBD_PROTO_H
#define STRATA_EXPORT_NBD_PROTO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "base/bytes.h"

#define NBD_MAGIC UINT64_C(0x4e42444d41474943)      /* "NBDMAGIC" */
#define NBD_OPTS_MAGIC UINT64_C(0x49484156454f5054) /* "IHAVEOPT" */
#define NBD_REP_MAGIC UINT64_C(0x0003e889045565a9)  /* option replies */
#define NBD_REQUEST_MAGIC UINT32_C(0x25609513)
#define NBD_SIMPLE_MAGIC UINT32_C(0x67446698)
#define NBD_STRUCTURED_MAGIC UINT32_C(0x668e33ef)
#define NBD_EXTENDED_REQUEST_MAGIC UINT32_C(0x21e41c71)
#define NBD_EXTENDED_REPLY_MAGIC UINT32_C(0x6e8a278c)

#define NBD_DEFAULT_PORT 10809
#define NBD_STRING_MAX 4096u /* names, queries, messages */
#define NBD_PAYLOAD_MAX                                                                            \
    (UINT32_C(32) << 20) /* read and write length, announced as maximum block                      \
                          */

enum { NBD_FLAG_FIXED_NEWSTYLE = 1, NBD_FLAG_NO_ZEROES = 2 }; /* handshake, both directions */

enum nbd_transmission_flags {
    NBD_FLAG_HAS_FLAGS = 1 << 0,
    NBD_FLAG_READ_ONLY = 1 << 1,
    NBD_FLAG_SEND_FLUSH = 1 << 2,
    NBD_FLAG_SEND_FUA = 1 << 3,
    NBD_FLAG_SEND_TRIM = 1 << 5,
    NBD_FLAG_SEND_WRITE_ZEROES = 1 << 6,
    NBD_FLAG_SEND_DF = 1 << 7,
    NBD_FLAG_CAN_MULTI_CONN = 1 << 8,
    NBD_FLAG_SEND_CACHE = 1 << 10,
    NBD_FLAG_SEND_FAST_ZERO = 1 << 11,
    NBD_FLAG_BLOCK_STATUS_PAYLOAD = 1 << 12, /* with extended headers only */
};

enum nbd_opt {
    NBD_OPT_EXPORT_NAME = 1,
    NBD_OPT_ABORT = 2,
    NBD_OPT_LIST = 3,
    NBD_OPT_STARTTLS = 5,
    NBD_OPT_INFO = 6,
    NBD_OPT_GO = 7,
    NBD_OPT_STRUCTURED_REPLY = 8,
    NBD_OPT_LIST_META_CONTEXT = 9,
    NBD_OPT_SET_META_CONTEXT = 10,
    NBD_OPT_EXTENDED_HEADERS = 11,
};

#define NBD_REP_ERR(n) (UINT32_C(0x80000000) + (n))
#define NBD_REP_ACK UINT32_C(1)
#define NBD_REP_SERVER UINT32_C(2)
#define NBD_REP_INFO UINT32_C(3)
#define NBD_REP_META_CONTEXT UINT32_C(4)
#define NBD_REP_ERR_UNSUP NBD_REP_ERR(1)
#define NBD_REP_ERR_POLICY NBD_REP_ERR(2)
#define NBD_REP_ERR_INVALID NBD_REP_ERR(3)
#define NBD_REP_ERR_TLS_REQD NBD_REP_ERR(5)
#define NBD_REP_ERR_UNKNOWN NBD_REP_ERR(6)
#define NBD_REP_ERR_SHUTDOWN NBD_REP_ERR(7)
#define NBD_REP_ERR_TOO_BIG NBD_REP_ERR(9)
#define NBD_REP_ERR_EXT_HEADER_REQD NBD_REP_ERR(10)

enum nbd_info {
    NBD_INFO_EXPORT = 0,
    NBD_INFO_NAME = 1,
    NBD_INFO_DESCRIPTION = 2,
    NBD_INFO_BLOCK_SIZE = 3
};

enum nbd_cmd {
    NBD_CMD_READ = 0,
    NBD_CMD_WRITE = 1,
    NBD_CMD_DISC = 2,
    NBD_CMD_FLUSH = 3,
    NBD_CMD_TRIM = 4,
    NBD_CMD_CACHE = 5,
    NBD_CMD_WRITE_ZEROES = 6,
    NBD_CMD_BLOCK_STATUS = 7,
};

enum nbd_cmd_flags {
    NBD_CMD_FLAG_FUA = 1,
    NBD_CMD_FLAG_NO_HOLE = 2,
    NBD_CMD_FLAG_DF = 4,
    NBD_CMD_FLAG_REQ_ONE = 8,
    NBD_CMD_FLAG_FAST_ZERO = 16,
    NBD_CMD_FLAG_PAYLOAD_LEN = 32, /* extended headers: `length` is that of a payload */
};

enum nbd_chunk {
    NBD_CHUNK_NONE = 0,
    NBD_CHUNK_DATA = 1,
    NBD_CHUNK_HOLE = 2,
    NBD_CHUNK_BLOCK_STATUS = 5,
    NBD_CHUNK_BLOCK_STATUS_EXT = 6,
    NBD_CHUNK_ERROR = 0x8001,
};
enum { NBD_CHUNK_FLAG_DONE = 1 };

enum { NBD_STATE_HOLE = 1, NBD_STATE_ZERO = 2 }; /* base:allocation */
enum { NBD_STATE_DIRTY = 1 };                    /* qemu:dirty-bitmap: */

enum nbd_errno {
    NBD_EPERM = 1,
    NBD_EIO = 5,
    NBD_ENOMEM = 12,
    NBD_EINVAL = 22,
    NBD_ENOSPC = 28,
    NBD_EOVERFLOW = 75,
    NBD_ENOTSUP = 95,
    NBD_ESHUTDOWN = 108,
};

/* ---- handshake ---- */

#define NBD_GREETING_BYTES 18u
#define NBD_OPTION_BYTES 16u
#define NBD_OPT_REPLY_BYTES 20u

struct nbd_option {
    uint32_t option, length;
};

size_t nbd_greeting_encode(uint8_t *out, uint16_t handshake_flags);
bool nbd_option_decode(const uint8_t *in, struct nbd_option *out); /* false: no IHAVEOPT */
size_t nbd_opt_reply_encode(uint8_t *out, uint32_t option, uint32_t type, uint32_t length);

/*
 * What the data of INFO and GO hold: u32 name length, name, u16 count, count u16 information types.
 * And of LIST_META and SET_META: u32 name length, name, u32 count, count (u32 length, query).
 * Pointers run into `in`.  0, or -EINVAL when lengths disagree with `length`, -ENAMETOOLONG when a
 * string is above NBD_STRING_MAX.
 */
struct nbd_name {
    const char *s;
    uint32_t len;
};
struct nbd_info_request {
    struct nbd_name name;
    const uint8_t *types; /* count big-endian u16 */
    unsigned count;
};
int nbd_info_request_decode(const uint8_t *in, size_t length, struct nbd_info_request *out);
struct nbd_meta_request {
    struct nbd_name name;
    uint32_t count;
    const uint8_t *queries; /* validated: count times u32 length, bytes */
    size_t queries_len;
};
int nbd_meta_request_decode(const uint8_t *in, size_t length, struct nbd_meta_request *out);
/* The next query of a validated list; moves *pos. */
struct nbd_name nbd_meta_query_next(const uint8_t **pos);

/* A string as the protocol wants it: valid UTF-8, no NUL, at most NBD_STRING_MAX bytes. */
bool nbd_name_valid(struct nbd_name n);
bool nbd_name_is(struct nbd_name n, const char *s);

/* ---- transmission ---- */

#define NBD_REQUEST_BYTES 28u
#define NBD_EXTENDED_REQUEST_BYTES 32u
#define NBD_SIMPLE_BYTES 16u
/* Heads of reply chunks, structured and extended; what follows them is of the same form in both. */
#define NBD_CHUNK_BYTES 20u
#define NBD_EXTENDED_CHUNK_BYTES 32u
#define NBD_HEAD_MAX NBD_EXTENDED_CHUNK_BYTES
#define NBD_DATA_CHUNK_MAX (NBD_HEAD_MAX + 8)  /* head and offset, before the data */
#define NBD_HOLE_CHUNK_MAX (NBD_HEAD_MAX + 12) /* whole */
#define NBD_ERROR_CHUNK_MAX (NBD_HEAD_MAX + 6) /* before the message */

struct nbd_request {
    uint16_t flags, type;
    uint64_t cookie; /* opaque: stored and sent back as it came, in wire order */
    uint64_t offset;
    uint64_t length; /* below 2^32 without extended headers */
};

static inline bool nbd_request_decode(const uint8_t *in, struct nbd_request *out) {
    out->flags = be16_load(in + 4);
    out->type = be16_load(in + 6);
    memcpy(&out->cookie, in + 8, 8);
    out->offset = be64_load(in + 16);
    out->length = be32_load(in + 24);
    return be32_load(in) == NBD_REQUEST_MAGIC;
}

static inline bool nbd_extended_request_decode(const uint8_t *in, struct nbd_request *out) {
    out->flags = be16_load(in + 4);
    out->type = be16_load(in + 6);
    memcpy(&out->cookie, in + 8, 8);
    out->offset = be64_load(in + 16);
    out->length = be64_load(in + 24);
    return be32_load(in) == NBD_EXTENDED_REQUEST_MAGIC;
}

static inline size_t nbd_simple_encode(uint8_t *out, uint64_t cookie, uint32_t error) {
    be32_store(out, NBD_SIMPLE_MAGIC);
    be32_store(out + 4, error);
    memcpy(out + 8, &cookie, 8);
    return NBD_SIMPLE_BYTES;
}

static inline size_t nbd_head_bytes(bool extended) {
    return extended ? NBD_EXTENDED_CHUNK_BYTES : NBD_CHUNK_BYTES;
}

/* The head of a chunk with `length` bytes of payload, in answer to `q`. */
static inline size_t nbd_chunk_encode(uint8_t *out, bool extended, const struct nbd_request *q,
                                      uint16_t flags, uint16_t type, uint32_t length) {
    be16_store(out + 4, flags);
    be16_store(out + 6, type);
    memcpy(out + 8, &q->cookie, 8);
    if (extended) {
        be32_store(out, NBD_EXTENDED_REPLY_MAGIC);
        be64_store(out + 16, q->offset);
        be64_store(out + 24, length);
        return NBD_EXTENDED_CHUNK_BYTES;
    }
    be32_store(out, NBD_STRUCTURED_MAGIC);
    be32_store(out + 16, length);
    return NBD_CHUNK_BYTES;
}

/* Head and offset of a data chunk; `length` bytes of data follow. */
static inline size_t nbd_data_chunk_encode(uint8_t *out, bool extended, const struct nbd_request *q,
                                           uint16_t flags, uint64_t offset, uint32_t length) {
    size_t n = nbd_chunk_encode(out, extended, q, flags, NBD_CHUNK_DATA, length + 8);
    be64_store(out + n, offset);
    return n + 8;
}

static inline size_t nbd_hole_chunk_encode(uint8_t *out, bool extended, const struct nbd_request *q,
                                           uint16_t flags, uint64_t offset, uint32_t length) {
    size_t n = nbd_chunk_encode(out, extended, q, flags, NBD_CHUNK_HOLE, 12);
    be64_store(out + n, offset);
    be32_store(out + n + 8, length);
    return n + 12;
}

/* `message_len` bytes follow. */
static inline size_t nbd_error_chunk_encode(uint8_t *out, bool extended,
                                            const struct nbd_request *q, uint32_t error,
                                            uint16_t message_len) {
    size_t n =
        nbd_chunk_encode(out, extended, q, NBD_CHUNK_FLAG_DONE, NBD_CHUNK_ERROR, 6u + message_len);
    be32_store(out + n, error);
    be16_store(out + n + 4, message_len);
    return n + 6;
}

/* A negative errno as one of the protocol's values. */
uint32_t nbd_errno_from(int error);

/*
 * Flags that `cmd` may carry; DF only after structured replies were negotiated, PAYLOAD_LEN (of
 * writes and block status) with extended headers only.
 */
uint16_t nbd_cmd_flags_allowed(uint16_t cmd, bool structured, bool extended);

#endif
