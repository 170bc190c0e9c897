/* SPDX-License-Identifier: MIT */
/*
 * Compressed clusters: round trips, the 4 KiB window that others' readers have, hostile input.
 *
 * Random choices come from one fixed-seed generator per test, so that every run is the same.
 */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include <zlib.h>
#include <zstd.h>
#include "base/bytes.h"
#include "format/codec.h"

enum { CLUSTER_MAX = 2 << 20 };

static uint64_t rng;
static uint64_t rnd(void) {
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return rng;
}

static uint8_t in[CLUSTER_MAX], code[CLUSTER_MAX + 64], out[CLUSTER_MAX + 64];

static void fill_random(uint8_t *p, size_t len) {
    for (size_t i = 0; i < len; i++)
        p[i] = rnd() >> 24;
}
/* Words out of a small vocabulary: compresses to about a third, with matches near and far. */
static void fill_text(uint8_t *p, size_t len) {
    char word[512][12];
    for (unsigned w = 0; w < 512; w++)
        for (unsigned i = 0; i < 12; i++)
            word[w][i] = i < 3 + w % 8 ? 'a' + rnd() % 26 : ' ';
    for (size_t i = 0; i < len;) {
        unsigned w = rnd() % 512, n = 4 + w % 8;
        for (unsigned k = 0; k < n && i < len; k++)
            p[i++] = word[w][k];
    }
}

/*
 * Inflates with windowBits -12 and one byte of output room at a time, so that zlib has only its
 * window to look back into and a match further away than 4096 is an error.
 */
static void assert_inflates_with_4k_window(const uint8_t *src, size_t len, const uint8_t *want,
                                           size_t want_len) {
    z_stream s = {.next_in = (Bytef *)src, .avail_in = len};
    uint8_t byte;
    assert_int_equal(inflateInit2(&s, -12), Z_OK);
    for (size_t i = 0; i < want_len; i++) {
        s.next_out = &byte;
        s.avail_out = 1;
        int r = inflate(&s, Z_NO_FLUSH);
        assert_true(r == Z_OK || (r == Z_STREAM_END && i == want_len - 1));
        assert_int_equal(s.avail_out, 0);
        assert_int_equal(byte, want[i]);
    }
    inflateEnd(&s);
}

static void round_trip(const struct codec *c, size_t len) {
    memset(out, 0xee, sizeof(out));
    memset(code, 0x55, sizeof(code));
    ssize_t n = c->encode(in, len, code, len);
    if (n == -ENOSPC)
        return;
    assert_in_range(n, 1, len - 1);
    for (size_t i = len - 1; i < len + 64 && i < sizeof(code); i++)
        assert_int_equal(code[i], 0x55);
    assert_int_equal(c->decode(code, n, out, len), 0);
    assert_memory_equal(in, out, len);
    assert_int_equal(out[len], 0xee);
    /* The tail of the last sector is somebody else's data. */
    assert_int_equal(c->decode(code, n + 17, out, len), 0);
    assert_memory_equal(in, out, len);
    if (c == &codec_deflate && len <= 256 * KIB)
        assert_inflates_with_4k_window(code, n, in, len);
}

static void all_sizes(const struct codec *c, void (*fill)(uint8_t *, size_t)) {
    rng = 0x5eed0001;
    for (size_t len = 512; len <= CLUSTER_MAX; len *= 2) {
        fill(in, len);
        round_trip(c, len);
    }
}
static void fill_zero(uint8_t *p, size_t len) {
    memset(p, 0, len);
}
static void fill_mixed(uint8_t *p, size_t len) {
    for (size_t at = 0; at < len;) {
        size_t n = 1 + rnd() % 9000;
        n = n < len - at ? n : len - at;
        switch (rnd() % 4) {
        case 0:
            fill_random(p + at, n);
            break;
        case 1:
            memset(p + at, rnd(), n);
            break;
        case 2: /* repeat something up to 64 KiB back: only the nearest 4 KiB may be matched */
            for (size_t i = 0, d = 1 + rnd() % 65536; i < n; i++)
                p[at + i] = at + i >= d ? p[at + i - d] : 7;
            break;
        default:
            fill_text(p + at, n);
        }
        at += n;
    }
}

static void deflate_round_trips_zeros(void **st) {
    all_sizes(&codec_deflate, fill_zero);
}
static void deflate_round_trips_text(void **st) {
    all_sizes(&codec_deflate, fill_text);
}
static void deflate_round_trips_mixed(void **st) {
    for (unsigned i = 0; i < 8; i++)
        all_sizes(&codec_deflate, fill_mixed);
}
static void zstd_round_trips_zeros(void **st) {
    all_sizes(&codec_zstd, fill_zero);
}
static void zstd_round_trips_text(void **st) {
    all_sizes(&codec_zstd, fill_text);
}
static void zstd_round_trips_mixed(void **st) {
    for (unsigned i = 0; i < 8; i++)
        all_sizes(&codec_zstd, fill_mixed);
}

static void random_data_is_nospc(void **st) {
    rng = 99;
    fill_random(in, 65536);
    assert_int_equal(codec_deflate.encode(in, 65536, code, 65536), -ENOSPC);
    assert_int_equal(codec_zstd.encode(in, 65536, code, 65536), -ENOSPC);
}

/* Matches exactly 4096 apart, in random data whose histogram selects the fast level. */
static void deflate_of_repeated_random_block_stays_in_window(void **st) {
    static const size_t distance[] = {4000, 4095, 4096, 4097, 5000, 32768};
    for (unsigned k = 0; k < 6; k++) {
        rng = 7 + k;
        fill_random(in, distance[k]);
        for (size_t i = distance[k]; i < 65536; i++)
            in[i] = in[i - distance[k]];
        round_trip(&codec_deflate, 65536);
        if (distance[k] < 4095) /* and the short repeat is found although the bytes look random */
            assert_true(codec_deflate.encode(in, 65536, code, 65536) > 0);
    }
}

/* The result is smaller than out_cap or refused, at every capacity around its length. */
static void encode_respects_out_cap(void **st) {
    const struct codec *codecs[] = {&codec_deflate, &codec_zstd};
    for (unsigned k = 0; k < 2; k++) {
        rng = 4;
        fill_text(in, 65536);
        ssize_t n = codecs[k]->encode(in, 65536, code, 65536);
        assert_true(n > 100);
        for (size_t cap = n - 40; cap < n + 40; cap++) {
            memset(code, 0x55, sizeof(code));
            ssize_t m = codecs[k]->encode(in, 65536, code, cap);
            if (m != -ENOSPC) {
                assert_in_range(m, 1, cap - 1);
                assert_int_equal(codecs[k]->decode(code, m, out, 65536), 0);
                assert_memory_equal(in, out, 65536);
            }
            assert_int_equal(code[cap], 0x55);
        }
        assert_true(codecs[k]->encode(in, 65536, code, n + 40) > 0);
        for (size_t cap = 0; cap < 64; cap++)
            assert_int_equal(codecs[k]->encode(in, 65536, code, cap), -ENOSPC);
    }
}

static void deflate_decodes_zlib_of_any_level_and_window(void **st) {
    rng = 11;
    fill_mixed(in, 65536);
    fill_text(in, 20000);
    for (int level = 0; level <= 9; level++)
        for (int bits = 9; bits <= 15; bits++) {
            z_stream s = {.next_in = in, .avail_in = 65536, .next_out = code};
            s.avail_out = sizeof(code);
            assert_int_equal(deflateInit2(&s, level, Z_DEFLATED, -bits, 9, Z_DEFAULT_STRATEGY),
                             Z_OK);
            assert_int_equal(deflate(&s, Z_FINISH), Z_STREAM_END);
            size_t n = s.total_out;
            deflateEnd(&s);
            assert_int_equal(codec_deflate.decode(code, n, out, 65536), 0);
            assert_memory_equal(in, out, 65536);
        }
}

/* The stream goes on after the cluster is full: what was asked for is there, so it is no damage. */
static void deflate_accepts_output_full_before_stream_end(void **st) {
    rng = 12;
    fill_text(in, 65536);
    ssize_t n = codec_deflate.encode(in, 65536, code, 65536);
    assert_true(n > 0);
    static const size_t len[] = {1, 511, 512, 4096, 30001, 65535};
    for (unsigned k = 0; k < 6; k++) {
        assert_int_equal(codec_deflate.decode(code, n, out, len[k]), 0);
        assert_memory_equal(in, out, len[k]);
    }
}

static void short_stream_is_eio(void **st) {
    const struct codec *codecs[] = {&codec_deflate, &codec_zstd};
    for (unsigned k = 0; k < 2; k++) {
        rng = 13;
        fill_text(in, 32768);
        ssize_t n = codecs[k]->encode(in, 32768, code, 32768);
        assert_true(n > 0);
        assert_int_equal(codecs[k]->decode(code, n, out, 65536), -EIO);
        memset(code + n, 0, 600);
        assert_int_equal(codecs[k]->decode(code, n + 600, out, 65536), -EIO);
    }
}

/* A cut code never decodes to the whole cluster, and never to wrong bytes. */
static void truncated_code_is_eio(void **st) {
    const struct codec *codecs[] = {&codec_deflate, &codec_zstd};
    for (unsigned k = 0; k < 2; k++) {
        rng = 14;
        fill_text(in, 4096);
        ssize_t n = codecs[k]->encode(in, 4096, code, 4096);
        assert_true(n > 0);
        for (ssize_t cut = 0; cut < n; cut++) {
            uint8_t *exact = malloc(cut ? cut : 1); /* heap: a reader past the end is seen */
            memcpy(exact, code, cut);
            int r = codecs[k]->decode(exact, cut, out, 4096);
            /* Deflate may have all bytes out before its end-of-block code. */
            if (r == 0)
                assert_memory_equal(in, out, 4096);
            else
                assert_int_equal(r, -EIO);
            assert_true(r != 0 || (k == 0 && cut >= n - 3));
            free(exact);
        }
    }
}

static void garbage_never_writes_outside(void **st) {
    const struct codec *codecs[] = {&codec_deflate, &codec_zstd};
    for (unsigned k = 0; k < 2; k++) {
        rng = 15 + k;
        fill_mixed(in, 4096);
        for (unsigned turn = 0; turn < 20000; turn++) {
            ssize_t n;
            if (turn % 4 == 0) { /* bytes of no stream at all */
                n = 1 + rnd() % 700;
                fill_random(code, n);
            } else { /* a valid code with a few bits changed */
                if (turn % 64 == 1)
                    fill_mixed(in, 4096);
                n = codecs[k]->encode(in, 4096, code, 4096);
                if (n < 0)
                    continue;
                for (unsigned f = 1 + rnd() % 4; f; f--)
                    code[rnd() % n] ^= 1 << rnd() % 8;
            }
            uint8_t *exact = malloc(n), *room = malloc(4096);
            memcpy(exact, code, n);
            int r = codecs[k]->decode(exact, n, room, 4096);
            assert_true(r == 0 || r == -EIO);
            free(exact);
            free(room);
        }
    }
}

static void zstd_decodes_several_frames(void **st) {
    rng = 21;
    fill_text(in, 65536);
    size_t n = 0;
    for (size_t at = 0; at < 65536; at += 16384) {
        size_t f = ZSTD_compress(code + n, sizeof(code) - n, in + at, 16384, 5);
        assert_false(ZSTD_isError(f));
        n += f;
    }
    fill_random(code + n, 300);
    assert_int_equal(codec_zstd.decode(code, n + 300, out, 65536), 0);
    assert_memory_equal(in, out, 65536);
}

/* As the reference writer makes them: streaming, no content size in the header. */
static void zstd_decodes_streamed_frame(void **st) {
    rng = 22;
    fill_text(in, 65536);
    ZSTD_CCtx *c = ZSTD_createCCtx();
    ZSTD_outBuffer o = {code, sizeof(code), 0};
    for (size_t at = 0; at < 65536; at += 1000) {
        ZSTD_inBuffer i = {in + at, at + 1000 < 65536 ? 1000 : 65536 - at, 0};
        while (i.pos < i.size)
            assert_false(ZSTD_isError(ZSTD_compressStream2(c, &o, &i, ZSTD_e_flush)));
    }
    ZSTD_inBuffer none = {NULL, 0, 0};
    assert_int_equal(ZSTD_compressStream2(c, &o, &none, ZSTD_e_end), 0);
    ZSTD_freeCCtx(c);
    assert_int_equal(codec_zstd.decode(code, o.pos, out, 65536), 0);
    assert_memory_equal(in, out, 65536);
}

static void zstd_frame_larger_than_the_cluster_is_eio(void **st) {
    rng = 23;
    fill_text(in, 65536);
    ssize_t n = codec_zstd.encode(in, 65536, code, 65536);
    assert_int_equal(codec_zstd.decode(code, n, out, 32768), -EIO);
}

static void zstd_empty_frames_end_with_eio(void **st) {
    size_t n = 0;
    for (unsigned i = 0; i < 50; i++)
        n += ZSTD_compress(code + n, sizeof(code) - n, in, 0, 1);
    assert_int_equal(codec_zstd.decode(code, n, out, 512), -EIO);
}

/* Contexts are per thread and freed with it (the leak checker looks). */
static void *thread_main(void *arg) {
    uint8_t *buf = malloc(3 * 65536), *src = buf + 65536, *dst = buf + 2 * 65536;
    uint64_t bad = 0;
    for (unsigned i = 0; i < 65536; i++)
        src[i] = (i * (uintptr_t)arg) >> 5;
    const struct codec *codecs[] = {&codec_deflate, &codec_zstd};
    for (unsigned turn = 0; turn < 20; turn++)
        for (unsigned k = 0; k < 2; k++) {
            ssize_t n = codecs[k]->encode(src, 65536, buf, 65536);
            if (n <= 0 || codecs[k]->decode(buf, n, dst, 65536) || memcmp(src, dst, 65536))
                bad++;
        }
    free(buf);
    return (void *)bad;
}
static void many_threads_at_once(void **st) {
    pthread_t t[8];
    for (uintptr_t i = 0; i < 8; i++)
        assert_int_equal(pthread_create(&t[i], NULL, thread_main, (void *)(i + 1)), 0);
    for (unsigned i = 0; i < 8; i++) {
        void *bad;
        pthread_join(t[i], &bad);
        assert_null(bad);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(deflate_round_trips_zeros),
        cmocka_unit_test(deflate_round_trips_text),
        cmocka_unit_test(deflate_round_trips_mixed),
        cmocka_unit_test(zstd_round_trips_zeros),
        cmocka_unit_test(zstd_round_trips_text),
        cmocka_unit_test(zstd_round_trips_mixed),
        cmocka_unit_test(random_data_is_nospc),
        cmocka_unit_test(deflate_of_repeated_random_block_stays_in_window),
        cmocka_unit_test(encode_respects_out_cap),
        cmocka_unit_test(deflate_decodes_zlib_of_any_level_and_window),
        cmocka_unit_test(deflate_accepts_output_full_before_stream_end),
        cmocka_unit_test(short_stream_is_eio),
        cmocka_unit_test(truncated_code_is_eio),
        cmocka_unit_test(garbage_never_writes_outside),
        cmocka_unit_test(zstd_decodes_several_frames),
        cmocka_unit_test(zstd_decodes_streamed_frame),
        cmocka_unit_test(zstd_frame_larger_than_the_cluster_is_eio),
        cmocka_unit_test(zstd_empty_frames_end_with_eio),
        cmocka_unit_test(many_threads_at_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
