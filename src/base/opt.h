/* SPDX-License-Identifier: MIT */
/*
 * Options: one row, many uses.
 *
 * An option exists once, as a row of a driver's or verb's table: name, type, target field, default,
 * range, help and when it applies.  The row drives parsing, `-o help`, the JSON schema, the man
 * page and the rejection of unknown keys with the nearest right one.  Parsing fills a plain struct;
 * drivers see the struct, never strings.
 *
 * All spellings (-o key=value,a.b=c; dotted keys; json:{...}) first become one option tree: a
 * jansson object whose leaves are strings, numbers or booleans and whose objects are sub-trees
 * (children such as "file" and "backing").  A leaf given as a string is converted by the row's
 * type, so that {"cluster_size": "64k"} and {"cluster_size": 65536} mean the same.
 *
 * A row reads like a sentence:
 *     OPT_SIZE(struct qcow2_create, cluster_size, "cluster_size", OPT_CREATE, 64 * KIB,
 *              OPT_POW2(512, 2 * MIB), "allocation unit"),
 */
#ifndef STRATA_BASE_OPT_H
#define STRATA_BASE_OPT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <jansson.h>

struct err;

enum opt_type {
    OPT_T_BOOL,  /* bool: on/off/true/false/yes/no */
    OPT_T_U64,   /* uint64_t: decimal or 0x */
    OPT_T_SIZE,  /* uint64_t: size_parse */
    OPT_T_ENUM,  /* int: index into .names */
    OPT_T_STR,   /* char *: owned by the filled struct, freed by opt_free */
    OPT_T_CHILD, /* no field: a sub-tree or node name that the core consumes */
    OPT_T_LIST   /* no field: a list (or group of numbers) that the driver reads from the tree */
};

enum opt_when { OPT_OPEN = 1, OPT_CREATE = 2, OPT_AMEND = 4, OPT_RUNTIME = 8 };

struct opt {
    const char *name;
    enum opt_type type;
    unsigned when; /* opt_when bits */
    size_t offset; /* of the field in the struct to fill */
    size_t given;  /* offset of a bool set when the user gave the option; SIZE_MAX = none */
    uint64_t def;  /* default of BOOL, U64, SIZE, ENUM; STR defaults to NULL */
    uint64_t min, max;
    bool pow2;
    const char *const *names; /* ENUM: NULL-terminated */
    const char *help;
};

/* Compile-time check that the field has the row's type. */
#define OPT_FIELD_(strct, field, ctype)                                                            \
    (offsetof(strct, field) + 0 * sizeof(char[_Generic(((strct *)0)->field, ctype : 1)]))
#define OPT_RANGE(lo, hi) .min = (lo), .max = (hi)
#define OPT_POW2(lo, hi) .min = (lo), .max = (hi), .pow2 = true
#define OPT_ANY .min = 0, .max = INT64_MAX

#define OPT_ROW_AT_(strct, field, giv, nm, ty, ctype, wh, hlp)                                     \
    .name = (nm), .type = (ty), .when = (wh), .offset = OPT_FIELD_(strct, field, ctype),           \
    .given = (giv), .help = (hlp)
#define OPT_ROW_(strct, field, nm, ty, ctype, wh, hlp)                                             \
    OPT_ROW_AT_(strct, field, SIZE_MAX, nm, ty, ctype, wh, hlp)
#define OPT_BOOL(strct, field, nm, wh, dflt, hlp)                                                  \
    { OPT_ROW_(strct, field, nm, OPT_T_BOOL, bool, wh, hlp), .def = (dflt) }
#define OPT_U64(strct, field, nm, wh, dflt, range, hlp)                                            \
    { OPT_ROW_(strct, field, nm, OPT_T_U64, uint64_t, wh, hlp), .def = (dflt), range }
#define OPT_SIZE(strct, field, nm, wh, dflt, range, hlp)                                           \
    { OPT_ROW_(strct, field, nm, OPT_T_SIZE, uint64_t, wh, hlp), .def = (dflt), range }
#define OPT_ENUM(strct, field, nm, wh, dflt, nms, hlp)                                             \
    { OPT_ROW_(strct, field, nm, OPT_T_ENUM, int, wh, hlp), .def = (dflt), .names = (nms) }
#define OPT_STR(strct, field, nm, wh, hlp)                                                         \
    { OPT_ROW_(strct, field, nm, OPT_T_STR, char *, wh, hlp) }
/* Rows without a default, for what changes only when it is given: `has` is a bool that says so. */
#define OPT_GIVEN_BOOL(strct, field, has, nm, wh, hlp)                                             \
    { OPT_ROW_AT_(strct, field, OPT_FIELD_(strct, has, bool), nm, OPT_T_BOOL, bool, wh, hlp) }
#define OPT_GIVEN_U64(strct, field, has, nm, wh, range, hlp)                                       \
    {                                                                                              \
        OPT_ROW_AT_(strct, field, OPT_FIELD_(strct, has, bool), nm, OPT_T_U64, uint64_t, wh, hlp), \
            range                                                                                  \
    }
#define OPT_GIVEN_SIZE(strct, field, has, nm, wh, range, hlp)                                      \
    {                                                                                              \
        OPT_ROW_AT_(strct, field, OPT_FIELD_(strct, has, bool), nm, OPT_T_SIZE, uint64_t, wh,      \
                    hlp),                                                                          \
            range                                                                                  \
    }
#define OPT_GIVEN_ENUM(strct, field, has, nm, wh, nms, hlp)                                        \
    {                                                                                              \
        OPT_ROW_AT_(strct, field, OPT_FIELD_(strct, has, bool), nm, OPT_T_ENUM, int, wh, hlp),     \
            .names = (nms)                                                                         \
    }
#define OPT_CHILD(nm, wh, hlp)                                                                     \
    { .name = (nm), .type = OPT_T_CHILD, .when = (wh), .given = SIZE_MAX, .help = (hlp) }
#define OPT_LIST(nm, wh, hlp)                                                                      \
    { .name = (nm), .type = OPT_T_LIST, .when = (wh), .given = SIZE_MAX, .help = (hlp) }
#define OPT_END                                                                                    \
    { .name = NULL }

/*
 * Fills `out` (already zeroed or holding a previous fill that the caller freed) from `tree`, a
 * borrowed jansson object or NULL for "all defaults".  Only rows with a bit of `when` are accepted;
 * a key of the table that does not apply now is refused with that reason, an unknown key with the
 * nearest name.  Keys in the NULL-terminated `core_keys` (may be NULL) belong to the caller and are
 * passed over.  Values are range-checked.  On error nothing needs to be freed.
 */
int opt_fill(const struct opt *table, const json_t *tree, unsigned when,
             const char *const *core_keys, void *out, struct err *e);

/* Frees the OPT_T_STR fields of a filled struct and sets them to NULL. */
void opt_free(const struct opt *table, void *filled);

/* Deep-copies a filled struct (strings included). */
void opt_copy(const struct opt *table, size_t struct_size, const void *from, void *to);

/* `-o help`: one line a row: name, value form, help, default, range. */
void opt_print_help(const struct opt *table, unsigned when, FILE *out);

/* The rows as a JSON schema fragment (properties), new reference. */
json_t *opt_schema(const struct opt *table, unsigned when);

/*
 * Parses "key=value,a.b=c,flag" into a tree (new reference) or adds to `*tree` when it is not NULL.
 * ",," inside a value is a literal comma.  A key without "=" is "on", "nokey" is not special.
 * `implied_key` (may be NULL) names the key of a first element without "=".  Dotted keys nest; a
 * key given both as a leaf and as a tree is an error; a repeated key: the last wins.  Depth at most
 * 64, at most 1 MiB of text.
 */
int opt_parse_keyval(const char *text, const char *implied_key, json_t **tree, struct err *e);

/*
 * Parses the text behind "json:" (at most 1 MiB, depth at most 64), expanding dotted keys inside
 * objects: {"file.driver": "file"} is {"file": {"driver": "file"}}.  Strings may stand in single
 * quotes, as QEMU takes them.  New reference.
 */
int opt_parse_json(const char *text, json_t **tree, struct err *e);

#endif
