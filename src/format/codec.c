/* SPDX-License-Identifier: MIT */
/*
 * Coding and decoding of compressed clusters.
 *
 * deflate: a raw stream (no zlib or gzip wrapper) whose matches reach back at most 4 KiB, because
 *   the reference reader opens its inflater with windowBits -12.  We read with the full 32 KiB.
 *   Out: ISA-L with hist_bits = 12.  In: libdeflate.
 * zstd: one or more frames; no length is stored.
 *
 * In both the coded length that a reader gets is an upper bound (the mapping counts 512-byte
 * sectors), so a decoder stops when the cluster is full and leaves whatever follows alone.  The
 * decoders accept what the reference reader accepts, which shapes two odd corners:
 *   - a deflate stream that goes on after the cluster is full is fine (zlib says Z_BUF_ERROR with
 *     no room left); libdeflate calls it an error before the last match is copied, so whatever
 *     libdeflate refuses is tried once more with zlib;
 *   - a zstd frame larger than the cluster is damage.
 * An input that ends before the cluster is full is -EIO in both.
 *
 * Why these levels, measured on 80 MiB of mixed file system content in 64 KiB clusters, one core,
 * beside zlib's default level with a 4 KiB window (37 MB/s, 37.5 %; text: 22.6 %):
 *     igzip level 1  473 MB/s  41.2 %   text 25.3 %   (+12 % on text: too large)
 *     igzip level 2  461 MB/s  41.0 %   text 25.2 %
 *     igzip level 3  290 MB/s  40.5 %   text 24.4 %   (+8 %)      <- chosen
 * Level 3 crawls through data that cannot be compressed (410 MB/s against 1500 for level 1), so a
 * byte histogram of 4 KiB out of the cluster picks level 1 where the bytes are spread evenly.
 * zstd: level 3 is what others write (same size); a context kept per thread is what we gain.
 *
 * Contexts are large (0.3 to 3 MiB) and costly to set up, so each thread keeps its own in a struct
 * that a pthread key frees when the thread ends: memory is bounded by the number of threads.
 * Each member is made at its first use.
 *
 * Sources: RFC 1951, RFC 8878, zlib.h, libdeflate.h, isa-l igzip_lib.h, zstd.h; the reader's rules
 * from qemu block/qcow2-threads.c.
 */
#include "format/codec.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <isa-l/igzip_lib.h>
#include <libdeflate.h>
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>
#include "base/bytes.h"

enum {
    DEFLATE_WINDOW_BITS = 12,
    DEFLATE_LEVEL = 3,
    DEFLATE_LEVEL_RANDOM = 1,
    /* Large enough for either level: the token buffer of level 3 exceeds that of level 1. */
    DEFLATE_LEVEL_BUF = ISAL_DEF_LVL3_MEDIUM,
    ZSTD_LEVEL = 3,
};
_Static_assert(ISAL_DEF_LVL3_MEDIUM >= ISAL_DEF_LVL1_MIN, "one buffer serves both levels");

struct contexts {
    struct isal_zstream *deflate;
    uint8_t *deflate_buf;
    struct libdeflate_decompressor *inflate;
    ZSTD_CCtx *zstd_out;
    ZSTD_DCtx *zstd_in;
};

static pthread_key_t contexts_key;
static pthread_once_t contexts_once = PTHREAD_ONCE_INIT;
static int contexts_key_error;

static void contexts_free(void *arg) {
    struct contexts *c = arg;
    free(c->deflate);
    free(c->deflate_buf);
    libdeflate_free_decompressor(c->inflate);
    ZSTD_freeCCtx(c->zstd_out);
    ZSTD_freeDCtx(c->zstd_in);
    free(c);
}

static void contexts_key_make(void) {
    contexts_key_error = pthread_key_create(&contexts_key, contexts_free);
}

/* This thread's contexts, or NULL when memory (or keys) are gone. */
static struct contexts *contexts_get(void) {
    pthread_once(&contexts_once, contexts_key_make);
    if (contexts_key_error)
        return NULL;
    struct contexts *c = pthread_getspecific(contexts_key);
    if (c)
        return c;
    c = calloc(1, sizeof(*c));
    if (c && pthread_setspecific(contexts_key, c)) {
        free(c);
        return NULL;
    }
    return c;
}

/* ---- deflate ---- */

enum { SAMPLE_RUNS = 8, SAMPLE_RUN = 512, SAMPLE_MIN_LEN = 16384 };

/*
 * Are the bytes spread as evenly as compressed or encrypted data spreads them?  For n bytes drawn
 * at random the squares of the 256 counts sum to n + n(n-1)/256 on average, with a deviation of
 * half a percent; a tenth more still counts as random.
 */
static bool looks_random(const uint8_t *in, size_t len) {
    if (len < SAMPLE_MIN_LEN)
        return false;
    uint16_t count[256] = {0};
    for (size_t r = 0; r < SAMPLE_RUNS; r++) {
        const uint8_t *p = in + r * (len / SAMPLE_RUNS);
        for (size_t i = 0; i < SAMPLE_RUN; i++)
            count[p[i]]++;
    }
    const uint32_t n = SAMPLE_RUNS * SAMPLE_RUN, even = n + n * (n - 1) / 256;
    uint32_t sum = 0;
    for (unsigned i = 0; i < 256; i++)
        sum += (uint32_t)count[i] * count[i];
    return sum < even + even / 10;
}

/* This thread's stream, set up for one unit; the caller adds the container and the output.  NULL:
 * no memory. */
static struct isal_zstream *deflate_begin(const void *in, size_t in_len) {
    struct contexts *c = contexts_get();
    if (!c)
        return NULL;
    if (!c->deflate_buf && !(c->deflate_buf = malloc(DEFLATE_LEVEL_BUF)))
        return NULL;
    if (!c->deflate && !(c->deflate = malloc(sizeof(*c->deflate))))
        return NULL;
    struct isal_zstream *s = c->deflate;
    isal_deflate_stateless_init(s);
    s->level = looks_random(in, in_len) ? DEFLATE_LEVEL_RANDOM : DEFLATE_LEVEL;
    s->level_buf = c->deflate_buf;
    s->level_buf_size = DEFLATE_LEVEL_BUF;
    s->end_of_stream = 1;
    s->next_in = (uint8_t *)in;
    s->avail_in = (uint32_t)in_len;
    return s;
}

static ssize_t qcow2_deflate_encode(const void *in, size_t in_len, void *out, size_t out_cap) {
    if (in_len == 0 || in_len > UINT32_MAX || out_cap > UINT32_MAX)
        return -EINVAL;
    if (out_cap < 2)
        return -ENOSPC;
    struct isal_zstream *s = deflate_begin(in, in_len);
    if (!s)
        return -ENOMEM;
    s->hist_bits = DEFLATE_WINDOW_BITS;
    s->next_out = out;
    s->avail_out = out_cap - 1; /* the result must be smaller than out_cap */
    int r = isal_deflate_stateless(s);
    if (r == STATELESS_OVERFLOW)
        return -ENOSPC;
    if (r != COMP_OK || s->avail_in)
        return -EIO;
    return s->total_out;
}

/* The reference reader's rule: the cluster is full, and no error was met on the way there. */
static int inflate_tolerant(const void *in, size_t in_len, void *out, size_t out_len) {
    z_stream s = {
        .next_in = (Bytef *)in, .avail_in = in_len, .next_out = out, .avail_out = out_len};
    int r = inflateInit2(&s, -15);
    if (r != Z_OK)
        return r == Z_MEM_ERROR ? -ENOMEM : -EIO;
    r = inflate(&s, Z_FINISH);
    inflateEnd(&s);
    return (r == Z_STREAM_END || r == Z_BUF_ERROR) && s.avail_out == 0 ? 0 : -EIO;
}

static int qcow2_deflate_decode(const void *in, size_t in_len, void *out, size_t out_len) {
    if (in_len > UINT_MAX || out_len > UINT_MAX)
        return -EINVAL;
    struct contexts *c = contexts_get();
    if (!c || (!c->inflate && !(c->inflate = libdeflate_alloc_decompressor())))
        return -ENOMEM;
    size_t used, got;
    if (libdeflate_deflate_decompress_ex(c->inflate, in, in_len, out, out_len, &used, &got) ==
        LIBDEFLATE_SUCCESS)
        return got == out_len ? 0 : -EIO;
    return inflate_tolerant(in, in_len, out, out_len);
}

const struct codec codec_deflate = {
    .name = "zlib",
    .decode = qcow2_deflate_decode,
    .encode = qcow2_deflate_encode,
};

/* ---- zlib streams of VMDK ---- */

enum { VMDK_MARKER = 12, STORED_MAX = 65535, STORED_HEAD = 5, ZLIB_AROUND = 6 };

static size_t stored_size(size_t len) {
    return len + (len + STORED_MAX - 1) / STORED_MAX * STORED_HEAD + ZLIB_AROUND;
}

/* What cannot be compressed, as it is: RFC 1951, 3.2.4. */
static ssize_t encode_stored(const uint8_t *in, size_t in_len, uint8_t *out) {
    size_t at = 0;
    out[at++] = 0x78;
    out[at++] = 0x01;
    for (size_t done = 0, part; done < in_len; done += part) {
        part = in_len - done < STORED_MAX ? in_len - done : STORED_MAX;
        out[at++] = done + part == in_len;
        le16_store(out + at, (uint16_t)part);
        le16_store(out + at + 2, (uint16_t)~part);
        memcpy(out + at + 4, in + done, part);
        at += 4 + part;
    }
    be32_store(out + at, libdeflate_adler32(1, in, in_len));
    return (ssize_t)at + 4;
}

static ssize_t vmdk_encode(const void *in, size_t in_len, void *out, size_t out_cap) {
    if (in_len == 0 || in_len > UINT32_MAX || out_cap > UINT32_MAX)
        return -EINVAL;
    struct isal_zstream *s = deflate_begin(in, in_len);
    if (!s)
        return -ENOMEM;
    s->gzip_flag = IGZIP_ZLIB;
    s->next_out = out;
    s->avail_out = out_cap < in_len ? out_cap : in_len;
    int r = isal_deflate_stateless(s);
    if (r == COMP_OK && !s->avail_in)
        return s->total_out;
    if (r != STATELESS_OVERFLOW && r != COMP_OK)
        return -EIO;
    return out_cap < stored_size(in_len) ? -ENOSPC : encode_stored(in, in_len, out);
}

static int zlib_decode(const void *in, size_t in_len, void *out, size_t out_len) {
    struct contexts *c = contexts_get();
    size_t used, got;
    if (!c || (!c->inflate && !(c->inflate = libdeflate_alloc_decompressor())))
        return -ENOMEM;
    if (libdeflate_zlib_decompress_ex(c->inflate, in, in_len, out, out_len, &used, &got) !=
            LIBDEFLATE_SUCCESS ||
        !got)
        return -EIO;
    memset((uint8_t *)out + got, 0, out_len - got);
    return 0;
}

static int vmdk_decode(const void *in, size_t in_len, void *out, size_t out_len) {
    const uint8_t *marker = in;
    if (in_len < VMDK_MARKER || le32_load(marker + 8) > in_len - VMDK_MARKER)
        return -EIO;
    return zlib_decode(marker + VMDK_MARKER, le32_load(marker + 8), out, out_len);
}

/* For a unit of up to 1 MiB: 17 stored blocks. */
enum { VMDK_EXPANDS = 17 * STORED_HEAD + ZLIB_AROUND };

const struct codec codec_vmdk = {
    .name = "zlib",
    .expands = VMDK_EXPANDS,
    .decode = vmdk_decode,
    .encode = vmdk_encode,
};
const struct codec codec_vmdk_plain = {
    .name = "zlib",
    .decode = zlib_decode,
};

/* ---- zstd ---- */

static ssize_t qcow2_zstd_encode(const void *in, size_t in_len, void *out, size_t out_cap) {
    if (in_len == 0)
        return -EINVAL;
    if (out_cap < 2)
        return -ENOSPC;
    struct contexts *c = contexts_get();
    if (!c)
        return -ENOMEM;
    if (!c->zstd_out) {
        c->zstd_out = ZSTD_createCCtx();
        if (!c->zstd_out)
            return -ENOMEM;
        if (ZSTD_isError(ZSTD_CCtx_setParameter(c->zstd_out, ZSTD_c_compressionLevel, ZSTD_LEVEL)))
            return -EIO;
    }
    size_t n = ZSTD_compress2(c->zstd_out, out, out_cap - 1, in, in_len);
    if (!ZSTD_isError(n))
        return n;
    switch (ZSTD_getErrorCode(n)) {
    case ZSTD_error_dstSize_tooSmall:
        return -ENOSPC;
    case ZSTD_error_memory_allocation:
        return -ENOMEM;
    default:
        return -EIO;
    }
}

static int qcow2_zstd_decode(const void *in, size_t in_len, void *out, size_t out_len) {
    struct contexts *c = contexts_get();
    if (!c || (!c->zstd_in && !(c->zstd_in = ZSTD_createDCtx())))
        return -ENOMEM;
    const uint8_t *src = in;
    uint8_t *dst = out;
    /*
     * Whole frames only, each decoded straight into the cluster: no window is allocated, however
     * large the frame claims its own to be.  Each turn consumes at least a frame header.
     */
    while (out_len) {
        size_t frame = ZSTD_findFrameCompressedSize(src, in_len);
        if (ZSTD_isError(frame) || frame == 0 || frame > in_len)
            return -EIO;
        size_t n = ZSTD_decompressDCtx(c->zstd_in, dst, out_len, src, frame);
        if (ZSTD_isError(n))
            return ZSTD_getErrorCode(n) == ZSTD_error_memory_allocation ? -ENOMEM : -EIO;
        src += frame;
        in_len -= frame;
        dst += n;
        out_len -= n;
    }
    return 0;
}

const struct codec codec_zstd = {
    .name = "zstd",
    .decode = qcow2_zstd_decode,
    .encode = qcow2_zstd_encode,
};
