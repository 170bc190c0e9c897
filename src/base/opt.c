/* SPDX-License-Identifier: MIT */
/*
 * Option tables against option trees: filling, copying, help and schema.  (Texts become trees in
 * opt_parse.c.)
 *
 * A row's name may have dots ("encrypt.format"): its leaf then lies that deep in the tree.  Filling
 * walks the tree, not the table, so each key that is there is accounted for exactly once: filled,
 * passed over as the caller's, or refused.  It descends only where a row's name leads, so the depth
 * is bounded by the table.
 */
#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "base/err.h"
#include "base/opt.h"
#include "base/size.h"
#include "base/strbuf.h"

enum { PATH_MAX_BYTES = 256 };

static void *field(const struct opt *o, void *out) {
    return (char *)out + o->offset;
}

static void store_u64(const struct opt *o, void *out, uint64_t v) {
    switch (o->type) {
    case OPT_T_BOOL:
        *(bool *)field(o, out) = v;
        break;
    case OPT_T_ENUM:
        *(int *)field(o, out) = (int)v;
        break;
    case OPT_T_U64:
    case OPT_T_SIZE:
        *(uint64_t *)field(o, out) = v;
        break;
    case OPT_T_STR:
    case OPT_T_CHILD:
    case OPT_T_LIST:
        break;
    }
}

static void set_defaults(const struct opt *table, void *out) {
    for (const struct opt *o = table; o && o->name; o++) {
        if (o->type == OPT_T_STR)
            *(char **)field(o, out) = NULL;
        else
            store_u64(o, out, o->def);
        if (o->given != SIZE_MAX)
            *(bool *)((char *)out + o->given) = false;
    }
}

/* ---- values ---- */

/* The value as a short text for messages.  Owned. */
static char *shown_value(const json_t *v) {
    if (json_is_object(v))
        return xstrdup("a group of options");
    if (json_is_array(v))
        return xstrdup("a list");
    if (json_is_null(v))
        return xstrdup("null");
    if (json_is_boolean(v))
        return xstrdup(json_is_true(v) ? "true" : "false");
    if (json_is_integer(v))
        return xasprintf("%" JSON_INTEGER_FORMAT, json_integer_value(v));
    if (json_is_real(v))
        return xasprintf("%g", json_real_value(v));
    struct strbuf b = STRBUF_INIT;
    strbuf_puts(&b, "'");
    strbuf_put_safe(&b, json_string_value(v), strnlen(json_string_value(v), 80));
    strbuf_puts(&b, "'");
    return strbuf_steal(&b);
}

static void list_names(const char *const *names, struct strbuf *b) {
    for (int i = 0; names[i]; i++)
        strbuf_printf(b, "%s%s", i ? ", " : "", names[i]);
}

static int wrong_value(const struct opt *o, const json_t *v, struct err *e) {
    char *found AUTO_FREE = shown_value(v);
    struct strbuf b AUTO_STRBUF = STRBUF_INIT;
    switch (o->type) {
    case OPT_T_BOOL:
        strbuf_puts(&b, "on or off");
        break;
    case OPT_T_U64:
        strbuf_puts(&b, "a number");
        break;
    case OPT_T_SIZE:
        strbuf_puts(&b, "a size such as 4096, 64k or 1.5G");
        break;
    case OPT_T_ENUM:
        strbuf_puts(&b, "one of ");
        list_names(o->names, &b);
        break;
    case OPT_T_STR:
        strbuf_puts(&b, "a text");
        break;
    case OPT_T_CHILD:
        strbuf_puts(&b, "a group of options or a node name");
        break;
    case OPT_T_LIST:
        strbuf_puts(&b, "a list");
        break;
    }
    return err_set(e, EINVAL, "option '%s': expected %s, found %s", o->name, b.s, found);
}

static bool read_bool(const json_t *v, uint64_t *out) {
    if (json_is_boolean(v)) {
        *out = json_is_true(v);
        return true;
    }
    static const char *const words[] = {"off", "on", "false", "true", "no", "yes"};
    const char *s = json_string_value(v);
    for (int i = 0; s && i < 6; i++)
        if (!strcmp(s, words[i])) {
            *out = i & 1;
            return true;
        }
    return false;
}

static bool read_number(const json_t *v, uint64_t *out) {
    if (json_is_integer(v)) {
        *out = json_integer_value(v);
        return json_integer_value(v) >= 0;
    }
    const char *s = json_string_value(v);
    if (!s || !isdigit((unsigned char)*s)) /* strtoull takes blanks and signs */
        return false;
    char *end;
    errno = 0;
    *out = strtoull(s, &end, s[0] == '0' && (s[1] | 0x20) == 'x' ? 16 : 10);
    return !*end && !errno;
}

static bool read_enum(const struct opt *o, const json_t *v, uint64_t *out) {
    const char *s = json_string_value(v);
    for (int i = 0; s && o->names[i]; i++)
        if (!strcmp(s, o->names[i])) {
            *out = i;
            return true;
        }
    return false;
}

static int check_range(const struct opt *o, uint64_t v, struct err *e) {
    char a[32], b[32];
    bool size = o->type == OPT_T_SIZE;
    if (v < o->min || v > o->max)
        return size ? err_set(e, EINVAL, "option '%s': %llu is not between %s and %s", o->name,
                              (unsigned long long)v, size_human(o->min, a), size_human(o->max, b))
                    : err_set(e, EINVAL, "option '%s': %llu is not between %llu and %llu", o->name,
                              (unsigned long long)v, (unsigned long long)o->min,
                              (unsigned long long)o->max);
    if (o->pow2 && (!v || v & (v - 1)))
        return err_set(e, EINVAL, "option '%s': %llu is not a power of two", o->name,
                       (unsigned long long)v);
    return 0;
}

static int fill_string(const struct opt *o, const json_t *v, void *out, struct err *e) {
    if (!json_is_string(v))
        return wrong_value(o, v, e);
    char *s = strdup(json_string_value(v));
    if (!s)
        return err_set(e, ENOMEM, "no memory for option '%s'", o->name);
    free(*(char **)field(o, out));
    *(char **)field(o, out) = s;
    return 0;
}

static int fill_row(const struct opt *o, const json_t *v, void *out, struct err *e) {
    uint64_t n = 0;
    bool ok = true;
    int rc = 0;
    switch (o->type) {
    case OPT_T_CHILD:
        ok = json_is_object(v) || json_is_string(v) || json_is_null(v);
        break;
    case OPT_T_LIST:
        ok = json_is_object(v) || json_is_array(v);
        break;
    case OPT_T_STR:
        rc = fill_string(o, v, out, e);
        break;
    case OPT_T_BOOL:
        ok = read_bool(v, &n);
        break;
    case OPT_T_ENUM:
        ok = read_enum(o, v, &n);
        break;
    case OPT_T_U64:
        ok = read_number(v, &n);
        rc = ok ? check_range(o, n, e) : 0;
        break;
    case OPT_T_SIZE:
        if (json_is_string(v)) {
            rc = size_parse(json_string_value(v), "size", &n, e);
            if (rc < 0) {
                err_prefix(e, "option '%s'", o->name);
                return rc;
            }
        } else {
            ok = read_number(v, &n);
        }
        rc = ok ? check_range(o, n, e) : 0;
        break;
    }
    if (!ok)
        return wrong_value(o, v, e);
    if (rc < 0)
        return rc;
    store_u64(o, out, n);
    if (o->given != SIZE_MAX)
        *(bool *)((char *)out + o->given) = true;
    return 0;
}

/* ---- keys ---- */

struct fill {
    const struct opt *table;
    unsigned when;
    const char *const *core_keys;
    void *out;
    struct err *e;
};

/* `name` lies below the group `path`. */
static bool is_below(const char *name, const char *path) {
    size_t len = strlen(path);
    return !strncmp(name, path, len) && name[len] == '.';
}

static int unknown_key(const struct fill *f, const char *path) {
    struct str_nearest near = {0};
    for (const struct opt *o = f->table; o && o->name; o++)
        if (o->when & f->when)
            str_nearest_offer(&near, path, o->name);
    for (int i = 0; f->core_keys && f->core_keys[i]; i++)
        str_nearest_offer(&near, path, f->core_keys[i]);
    struct strbuf b AUTO_STRBUF = STRBUF_INIT;
    strbuf_puts(&b, "");
    strbuf_put_safe(&b, path, strnlen(path, 80));
    int rc = err_set(f->e, EINVAL, "unknown option '%s'", b.s);
    if (near.best)
        err_hint(f->e, "did you mean '%s'?", near.best);
    return rc;
}

static int wrong_time(const struct opt *o, struct err *e) {
    static const char *const times[] = {"opening", "creating", "amending", "changing a running"};
    struct strbuf b AUTO_STRBUF = STRBUF_INIT;
    strbuf_puts(&b, "");
    for (unsigned i = 0; i < 4; i++)
        if (o->when & 1u << i)
            strbuf_printf(&b, "%s%s", b.len ? " or " : "", times[i]);
    return err_set(e, EINVAL, "option '%s' applies only when %s an image", o->name, b.s);
}

static bool is_core(const struct fill *f, const char *path) {
    for (int i = 0; f->core_keys && f->core_keys[i]; i++)
        if (!strcmp(f->core_keys[i], path))
            return true;
    return false;
}

static bool leads_somewhere(const struct fill *f, const char *path) {
    for (const struct opt *o = f->table; o && o->name; o++)
        if (is_below(o->name, path))
            return true;
    for (int i = 0; f->core_keys && f->core_keys[i]; i++)
        if (is_below(f->core_keys[i], path))
            return true;
    return false;
}

static int fill_group(const struct fill *f, const char *prefix, const json_t *group) {
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)group, key, value) {
        char path[PATH_MAX_BYTES];
        snprintf(path, sizeof(path), "%s%s%s", prefix, *prefix ? "." : "", key);
        const struct opt *o = f->table;
        while (o && o->name && strcmp(o->name, path))
            o++;
        int rc = 0;
        if (o && o->name)
            rc = o->when & f->when ? fill_row(o, value, f->out, f->e) : wrong_time(o, f->e);
        else if (is_core(f, path))
            rc = 0;
        else if (json_is_object(value) && leads_somewhere(f, path))
            rc = fill_group(f, path, value);
        else
            rc = unknown_key(f, path);
        if (rc < 0)
            return rc;
    }
    return 0;
}

int opt_fill(const struct opt *table, const json_t *tree, unsigned when,
             const char *const *core_keys, void *out, struct err *e) {
    set_defaults(table, out);
    if (!tree)
        return 0;
    if (!json_is_object(tree))
        return err_set(e, EINVAL, "the options are not a group of keys and values");
    struct fill f = {table, when, core_keys, out, e};
    int rc = fill_group(&f, "", tree);
    if (rc < 0)
        opt_free(table, out);
    return rc;
}

void opt_free(const struct opt *table, void *filled) {
    for (const struct opt *o = table; o && o->name && filled; o++)
        if (o->type == OPT_T_STR) {
            char **s = field(o, filled);
            free(*s);
            *s = NULL;
        }
}

void opt_copy(const struct opt *table, size_t struct_size, const void *from, void *to) {
    memcpy(to, from, struct_size);
    for (const struct opt *o = table; o && o->name; o++)
        if (o->type == OPT_T_STR) {
            char **s = field(o, to);
            *s = *s ? xstrdup(*s) : NULL;
        }
}

/* ---- help and schema ---- */

static void put_number(struct strbuf *b, const struct opt *o, uint64_t v) {
    char human[32];
    if (o->type == OPT_T_SIZE)
        strbuf_puts(b, size_human(v, human));
    else
        strbuf_printf(b, "%llu", (unsigned long long)v);
}

/* "(power of two, 512 B to 2 MiB; default 64 KiB)" */
static void put_limits(struct strbuf *b, const struct opt *o) {
    bool number = o->type == OPT_T_U64 || o->type == OPT_T_SIZE;
    bool ranged = number && (o->min > 0 || o->max < INT64_MAX);
    if (ranged) {
        strbuf_puts(b, o->pow2 ? " (power of two, " : " (");
        put_number(b, o, o->min);
        strbuf_puts(b, " to ");
        put_number(b, o, o->max);
    }
    bool has_default = o->given == SIZE_MAX && (o->type == OPT_T_BOOL || o->type == OPT_T_ENUM ||
                                                (number && (o->def || ranged)));
    if (has_default) {
        strbuf_puts(b, ranged ? "; default " : " (default ");
        if (o->type == OPT_T_BOOL)
            strbuf_puts(b, o->def ? "on" : "off");
        else if (o->type == OPT_T_ENUM)
            strbuf_puts(b, o->names[o->def]);
        else
            put_number(b, o, o->def);
    }
    if (ranged || has_default)
        strbuf_puts(b, ")");
}

static void put_form(struct strbuf *b, const struct opt *o) {
    strbuf_printf(b, "%s=", o->name);
    switch (o->type) {
    case OPT_T_BOOL:
        strbuf_puts(b, "on|off");
        break;
    case OPT_T_U64:
        strbuf_puts(b, "NUMBER");
        break;
    case OPT_T_SIZE:
        strbuf_puts(b, "SIZE");
        break;
    case OPT_T_STR:
        strbuf_puts(b, "TEXT");
        break;
    case OPT_T_CHILD:
        strbuf_puts(b, "NODE");
        break;
    case OPT_T_LIST:
        strbuf_puts(b, "LIST");
        break;
    case OPT_T_ENUM:
        for (int i = 0; o->names[i]; i++)
            strbuf_printf(b, "%s%s", i ? "|" : "", o->names[i]);
        break;
    }
}

void opt_print_help(const struct opt *table, unsigned when, FILE *out) {
    for (const struct opt *o = table; o && o->name; o++) {
        if (!(o->when & when))
            continue;
        struct strbuf form AUTO_STRBUF = STRBUF_INIT, text AUTO_STRBUF = STRBUF_INIT;
        put_form(&form, o);
        strbuf_puts(&text, o->help ? o->help : "");
        put_limits(&text, o);
        if (form.len <= 26)
            fprintf(out, "  %-26s  %s\n", form.s, text.s);
        else
            fprintf(out, "  %s\n  %26s  %s\n", form.s, "", text.s);
    }
}

static json_t *schema_names(const char *const *names) {
    json_t *list = json_array();
    for (int i = 0; names[i]; i++)
        json_array_append_new(list, json_string(names[i]));
    return list;
}

static json_t *schema_row(const struct opt *o) {
    json_t *s = json_object();
    if (o->help)
        json_object_set_new(s, "description", json_string(o->help));
    switch (o->type) {
    case OPT_T_BOOL:
        json_object_set_new(s, "type", json_string("boolean"));
        json_object_set_new(s, "default", json_boolean(o->def));
        break;
    case OPT_T_U64:
    case OPT_T_SIZE:
        json_object_set_new(s, "type",
                            o->type == OPT_T_U64 ? json_string("integer")
                                                 : json_pack("[ss]", "integer", "string"));
        json_object_set_new(s, "default", json_integer((json_int_t)o->def));
        json_object_set_new(s, "minimum", json_integer((json_int_t)o->min));
        if (o->max <= INT64_MAX)
            json_object_set_new(s, "maximum", json_integer((json_int_t)o->max));
        break;
    case OPT_T_ENUM:
        json_object_set_new(s, "enum", schema_names(o->names));
        json_object_set_new(s, "default", json_string(o->names[o->def]));
        break;
    case OPT_T_STR:
        json_object_set_new(s, "type", json_string("string"));
        break;
    case OPT_T_CHILD:
        json_object_set_new(s, "type", json_pack("[sss]", "object", "string", "null"));
        break;
    case OPT_T_LIST:
        json_object_set_new(s, "type", json_pack("[ss]", "array", "object"));
        break;
    }
    return s;
}

json_t *opt_schema(const struct opt *table, unsigned when) {
    json_t *root = json_object();
    for (const struct opt *o = table; o && o->name; o++) {
        if (!(o->when & when))
            continue;
        json_t *at = root;
        const char *part = o->name;
        for (const char *dot; (dot = strchr(part, '.')); part = dot + 1) {
            json_t *group = json_object_getn(at, part, dot - part);
            if (!group) {
                group = json_pack("{s:s, s:{}}", "type", "object", "properties");
                json_object_setn_new(at, part, dot - part, group);
            }
            at = json_object_get(group, "properties");
        }
        json_object_set_new(at, part, schema_row(o));
    }
    return root;
}
