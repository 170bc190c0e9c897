/* SPDX-License-Identifier: MIT */
/*
 * What the fuzz targets share.
 *
 * A target is one file with LLVMFuzzerTestOneInput() and, where structure pays, a custom mutator.
 * It is linked twice: with libFuzzer (`make fuzz`), and with replay.c, whose main() runs the
 * committed regressions and a fixed number of mutations of the seeds in the normal unit tests.
 * A broken invariant aborts: both tell which input did it.
 *
 * One loop lives for the whole process, on the thread back end (libFuzzer's own signals and the
 * sanitizers dislike rings, and the back end is not what is tested here).
 */
#ifndef STRATA_TESTS_FUZZ_H
#define STRATA_TESTS_FUZZ_H

#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/open.h"
#include "runtime/loop.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed);
/* libFuzzer's own, or replay.c's. */
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max);

/* Says what was expected and aborts. */
_Noreturn void fuzz_broken(const char *file, int line, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
#define FUZZ_CHECK(cond, ...)                                                                      \
    do {                                                                                           \
        if (!(cond))                                                                               \
            fuzz_broken(__FILE__, __LINE__, __VA_ARGS__);                                          \
    } while (0)

/* Runs fn(arg) as a task on the process's loop. */
void fuzz_run(task_fn *fn, void *arg);

/* ---- programs: bytes taken one after the other; zeros behind the end ---- */
struct prog {
    const uint8_t *p, *end;
};
static inline bool prog_more(const struct prog *g) {
    return g->p < g->end;
}
static inline uint8_t prog_u8(struct prog *g) {
    return g->p < g->end ? *g->p++ : 0;
}
static inline uint16_t prog_u16(struct prog *g) {
    uint16_t hi = prog_u8(g);
    return (uint16_t)(hi << 8 | prog_u8(g));
}
static inline uint32_t prog_u32(struct prog *g) {
    uint32_t hi = prog_u16(g);
    return hi << 16 | prog_u16(g);
}

/* A writable memory disk that may grow to `limit` bytes (then ENOSPC). */
struct node *fuzz_memory_co(uint64_t limit);

/* ---- images as inputs ----
 *
 * An input is an image as it is, or in the sparse form, which lets 64 KiB clusters fit in a few
 * hundred bytes:
 *     "SPR1", be32 length of the image in 512-byte sectors,
 *     then records: be32 sector, be16 length, that many bytes
 * Nonsense in it is cut off, never refused: every input is an image.
 */
#define SPARSE_MAGIC "SPR1"
#ifndef IMAGE_BYTES_MAX
#define IMAGE_BYTES_MAX (4 * MIB)
#endif
/* Where the image ends and the program begins: the program is what follows this mark, if any. */
#define PROGRAM_MARK "PRG1"

/* Splits off the program (empty when there is no mark). */
void image_split(const uint8_t *data, size_t size, size_t *image_len, struct prog *program);
/* Writes the image to the empty disk. */
void image_load_co(struct node *disk, const uint8_t *data, size_t size);

/* Something that often matters in a table: made out of the random number `r`. */
uint64_t fuzz_interesting(uint64_t r);

#endif
