/* SPDX-License-Identifier: MIT */
/*
 * What the harness (faults.c), the cases (cases.c) and their parts (parts.c) share.
 *
 * A case is a function that does something to the images in the work folder and returns 0 or
 * -errno, giving back all that it took, whatever fails on the way.  What it writes, it writes with
 * the functions there, which tell the model.  A new case is that function and a row in the table at
 * the end of cases.c; an image that it needs is made in seeds_co (parts.c).
 */
#ifndef STRATA_TESTS_FAULTS_FAULTS_H
#define STRATA_TESTS_FAULTS_FAULTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/bytes.h"
#include "base/err.h"
#include "disk/node.h"
#include "inject.h"

#define BLOCK 512u
#define SIZE (256 * KIB)
#define BLOCKS (SIZE / BLOCK)
#define FILES 24
#define LINK_ID 401u /* of the first 64 blocks of link.* and its parents */
#define STEP_ALL 250 /* up to here each n is tried, then every seventh */

struct file {
    const char *name;
    uint8_t *bytes;
    size_t size;
    bool apart; /* there only for cases about an image of that format */
};

struct trial {
    char dir[256];
    struct file seed[FILES];
    uint32_t start[BLOCKS]; /* what top.qcow2 reads as in the seed */
    /* of the run: what a block of the written image may read as */
    uint32_t was[BLOCKS], will[BLOCKS];
    bool maybe[BLOCKS]; /* a discard: either, for good */
    uint32_t next_id;
    struct err e;
    /* over all runs */
    unsigned long runs, struck, failed;
    const char *sample_dir;
    unsigned long sample_every;
    enum fault_kind only_kind; /* with only_n > 0: this one fault */
    unsigned long only_n;
    char **wanted;
};

struct fault_case {
    const char *name;
    const char *image; /* the file whose blocks the model is about; NULL: none */
    const char *made;  /* a file that the case makes; NULL: none */
    int (*run_co)(struct trial *t);
};

extern const struct fault_case fault_cases[]; /* ends with a row without a name */

/* parts.c */
const char *path(const struct trial *t, const char *name); /* in the work folder; four at a time */
int open_co(struct trial *t, const char *name, unsigned flags, struct node **out);
void fill(uint8_t *p, uint64_t count, uint32_t id);
/* Blocks [first, first + count) will read as `id`; maybe: or stay. */
void touch(struct trial *t, uint64_t first, uint64_t count, uint32_t id, bool maybe);
int write_co(struct trial *t, struct node *n, uint64_t first, uint64_t count);
int zero_co(struct trial *t, struct node *n, uint64_t first, uint64_t count, unsigned flags);
int discard_co(struct trial *t, struct node *n, uint64_t first, uint64_t count);
int coded_co(struct trial *t, struct node *n, uint64_t first);
int flush_co(struct trial *t, struct node *n);
int read_co(struct trial *t, struct node *n);
/* `text`: "key=value,..." */
int create_co(struct trial *t, const char *name, const char *format, const char *text);
/* The images that every run begins with, and what they read as. */
void seeds_co(struct trial *t);

/* faults.c */
void say(struct trial *t, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void must(int r, const struct err *e, const char *what);
void die(const char *what) __attribute__((noreturn));

#endif
