/* SPDX-License-Identifier: MIT */
/*
 * The codings of chunks; see dmg.h.  Each fills all of its output or fails.
 *
 * bzip2 and xz come from the host's libraries, loaded when the first image needs them; only the one
 * function of each that is used is declared here.
 */
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <string.h>
#include <libdeflate.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "format/dmg/dmg.h"

#define XZ_MEMORY_MAX (128 * MIB) /* dictionaries of 64 MiB, the largest that `xz -9` makes */

static struct {
    int (*bzip2)(char *out, unsigned *out_len, char *in, unsigned in_len, int small, int verbose);
    int (*xz)(uint64_t *memory, uint32_t flags, const void *allocator, const uint8_t *in,
              size_t *in_pos, size_t in_size, uint8_t *out, size_t *out_pos, size_t out_size);
} lib;

static void *load_symbol(const char *library, const char *symbol) {
    void *so = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    return so ? dlsym(so, symbol) : NULL;
}

static void load_bzip2(void) {
    *(void **)&lib.bzip2 = load_symbol("libbz2.so.1.0", "BZ2_bzBuffToBuffDecompress");
}

static void load_xz(void) {
    *(void **)&lib.xz = load_symbol("liblzma.so.5", "lzma_stream_buffer_decode");
}

int dmg_codec_need(enum dmg_kind kind, struct err *e) {
    static pthread_once_t bzip2_once = PTHREAD_ONCE_INIT, xz_once = PTHREAD_ONCE_INIT;
    if (kind == DMG_BZIP2) {
        pthread_once(&bzip2_once, load_bzip2);
        if (!lib.bzip2)
            return err_set(e, ENOTSUP, "chunks in bzip2 need the library libbz2.so.1.0");
    }
    if (kind == DMG_XZ) {
        pthread_once(&xz_once, load_xz);
        if (!lib.xz)
            return err_set(e, ENOTSUP, "chunks in xz need the library liblzma.so.5");
    }
    return 0;
}

static int zlib_decode(const void *in, size_t in_len, void *out, size_t out_len) {
    struct libdeflate_decompressor *d = libdeflate_alloc_decompressor();
    if (!d)
        return -ENOMEM;
    enum libdeflate_result r = libdeflate_zlib_decompress(d, in, in_len, out, out_len, NULL);
    libdeflate_free_decompressor(d);
    return r == LIBDEFLATE_SUCCESS ? 0 : -EIO;
}

static int bzip2_decode(const void *in, size_t in_len, void *out, size_t out_len) {
    unsigned got = (unsigned)out_len;
    if (in_len > UINT_MAX || out_len > UINT_MAX)
        return -EIO;
    return lib.bzip2(out, &got, (char *)in, (unsigned)in_len, 0, 0) == 0 && got == out_len ? 0
                                                                                           : -EIO;
}

static int xz_decode(const void *in, size_t in_len, void *out, size_t out_len) {
    uint64_t memory = XZ_MEMORY_MAX;
    size_t in_pos = 0, out_pos = 0;
    int r = lib.xz(&memory, 0, NULL, in, &in_pos, in_len, out, &out_pos, out_len);
    return r == 0 && out_pos == out_len ? 0 : -EIO;
}

/*
 * Apple Data Compression, by the first byte:
 *
 *      1nnnnnnn           n + 1 literals
 *      00nnnndd D8        n + 3 bytes from distance + 1
 *      01nnnnnn D16       n + 4 bytes from distance + 1
 */
static int adc_decode(const void *in, size_t in_len, void *out, size_t out_len) {
    const uint8_t *p = in, *end = p + in_len;
    uint8_t *start = out, *o = start, *o_end = start + out_len;
    while (o < o_end && p < end) {
        uint8_t c = *p;
        size_t op = c & 0x80 ? 1 : c & 0x40 ? 3 : 2, distance = 0;
        size_t n = c & 0x80 ? (c & 0x7fu) + 1 : c & 0x40 ? (c & 0x3fu) + 4 : (c >> 2) + 3u;
        if (op > (size_t)(end - p) || n > (size_t)(o_end - o))
            return -EIO;
        if (op == 1) {
            if (n > (size_t)(end - p) - 1)
                return -EIO;
            memcpy(o, p + 1, n);
            o += n;
            p += 1 + n;
            continue;
        }
        distance = 1 + (op == 2 ? (c & 3u) << 8 | p[1] : (size_t)p[1] << 8 | p[2]);
        if (distance > (size_t)(o - start))
            return -EIO;
        for (; n; n--, o++)
            *o = *(o - distance);
        p += op;
    }
    return o == o_end ? 0 : -EIO;
}

const struct codec dmg_codecs[DMG_KINDS] = {
    [DMG_ADC] = {.name = "adc", .decode = adc_decode},
    [DMG_ZLIB] = {.name = "zlib", .decode = zlib_decode},
    [DMG_BZIP2] = {.name = "bzip2", .decode = bzip2_decode},
    [DMG_LZFSE] = {.name = "lzfse", .decode = lzfse_decode},
    [DMG_XZ] = {.name = "xz", .decode = xz_decode},
};
