/* SPDX-License-Identifier: MIT */
/* What hostile_qcow2.c, which sets fields of images, and hostile_fields.c, which finds them, share.
 */
#ifndef STRATA_TESTS_FUZZ_HOSTILE_H
#define STRATA_TESTS_FUZZ_HOSTILE_H

#include <stdbool.h>
#include <stdint.h>

#define FIELDS_MAX 512
#define VALUES_MAX 160

struct field {
    char name[48];
    const char *words; /* one of them is in a refusal, "a|b"; NULL: any text will do */
    uint64_t at;
    unsigned width; /* bytes; 0: a string of `length` bytes */
    uint32_t length;
    uint64_t table; /* where the structure lies that holds it: for loops */
};

struct target {
    const char *seed;
    uint8_t *image;
    uint64_t size;
    uint64_t cluster;
    struct field field[FIELDS_MAX];
    unsigned fields;
    char *refused;       /* why it is refused as it is; NULL: it is not */
    bool data_file;      /* it keeps its data in another file: there is one in memory */
    uint64_t places[16]; /* tables, for overlaps */
    unsigned place_count;
};

/* A number of the image; zeros behind its end. */
uint64_t target_get(const struct target *t, uint64_t at, unsigned width);
/* All fields of t->image. */
void target_find_fields(struct target *t);
/* What the field is set to: up to VALUES_MAX numbers.  How many. */
unsigned target_values(const struct target *t, const struct field *f, uint64_t *v);

#endif
