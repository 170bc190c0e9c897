/* SPDX-License-Identifier: MIT */
/*
 * VMDK: the descriptor, a text of lines "key=value" and of extents:
 *
 *      ACCESS SECTORS TYPE ["file" [OFFSET]]
 *
 * Lines end with LF or CR LF; '#' begins a comment; keys are whole words, whatever their case.  A
 * line that is neither is passed over: there are others' keys.  Every name and number is hostile.
 */
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "format/vmdk/vmdk.h"

#define DDB_MAX 64u     /* entries kept to be shown */
#define VALUE_MAX 1024u /* bytes of one */
#define NAME_MAX_BYTES 4095u

const char *const vmdk_type_names[] = {"FLAT",       "VMFS",     "ZERO", "SPARSE",
                                       "VMFSSPARSE", "SESPARSE", NULL};

bool vmdk_type_is_sparse(enum vmdk_type t) {
    return t == VMDK_SPARSE || t == VMDK_COWD || t == VMDK_SE;
}

/* A piece of text, not terminated. */
struct span {
    const char *s;
    size_t n;
};

static struct span trim(struct span v) {
    while (v.n && isspace((unsigned char)v.s[0]))
        v.s++, v.n--;
    while (v.n && isspace((unsigned char)v.s[v.n - 1]))
        v.n--;
    return v;
}

static bool is_word(struct span v, const char *word) {
    return v.n == strlen(word) && !strncasecmp(v.s, word, v.n);
}

/* The next line of `rest`, without its end. */
static bool next_line(struct span *rest, struct span *line) {
    if (!rest->n)
        return false;
    const char *end = memchr(rest->s, '\n', rest->n);
    size_t n = end ? (size_t)(end - rest->s) : rest->n;
    *line = (struct span){rest->s, n};
    rest->s += n + (end != NULL);
    rest->n -= n + (end != NULL);
    return true;
}

static struct span next_token(struct span *line) {
    struct span v = trim(*line);
    size_t n = 0;
    while (n < v.n && !isspace((unsigned char)v.s[n]))
        n++;
    *line = (struct span){v.s + n, v.n - n};
    return (struct span){v.s, n};
}

static bool number_of(struct span v, uint64_t *out) {
    uint64_t value = 0;
    if (!v.n)
        return false;
    for (size_t i = 0; i < v.n; i++)
        if (v.s[i] < '0' || v.s[i] > '9' || !ck_mul(value, (uint64_t)10, &value) ||
            !ck_add(value, (uint64_t)(v.s[i] - '0'), &value))
            return false;
    *out = value;
    return true;
}

/* ---------------------------------------------------------------- probing */

/*
 * The line that descriptors begin with; or comments and blank lines, then "version=1" to 3, and a
 * createType somewhere (other programs have version lines, too).
 */
bool vmdk_desc_probe(const uint8_t *head, size_t length) {
    struct span rest = {(const char *)head, length}, line;
    static const char title[] = "# Disk DescriptorFile";
    if (length >= sizeof(title) - 1 && !strncasecmp(rest.s, title, sizeof(title) - 1))
        return true;
    if (!length || (head[0] != '#' && !isspace(head[0]) && head[0] != 'v'))
        return false;
    for (int lines = 0; lines < 64 && next_line(&rest, &line); lines++) {
        line = trim(line);
        if (!line.n || line.s[0] == '#')
            continue;
        return line.n == 9 && !strncmp(line.s, "version=", 8) && line.s[8] >= '1' &&
               line.s[8] <= '3' && memmem(rest.s, rest.n, "createType", 10);
    }
    return false;
}

/* ---------------------------------------------------------------- extents */

static int type_of(struct span v) {
    for (int i = 0; vmdk_type_names[i]; i++)
        if (is_word(v, vmdk_type_names[i]))
            return i;
    return -1;
}

static struct vmdk_extent *add_extent(struct vmdk_desc *d) {
    if (d->count == d->cap) {
        size_t cap = d->cap ? d->cap * 2 : 8;
        struct vmdk_extent *v = realloc(d->extents, cap * sizeof(*v));
        if (!v)
            return NULL;
        d->extents = v;
        d->cap = cap;
    }
    struct vmdk_extent *x = &d->extents[d->count++];
    *x = (struct vmdk_extent){0};
    return x;
}

/* The file's name and the offset behind it. */
static int parse_place(struct vmdk_desc *d, struct vmdk_extent *x, struct span line,
                       struct err *e) {
    uint64_t sectors = 0;
    line = trim(line);
    const char *end = line.n > 1 && line.s[0] == '"' ? memchr(line.s + 1, '"', line.n - 1) : NULL;
    if (!end)
        return err_set(e, EINVAL, "extent %zu: no file name in quotes", d->count - 1);
    struct span name = {line.s + 1, (size_t)(end - line.s) - 1};
    if (!name.n || name.n > NAME_MAX_BYTES || memchr(name.s, 0, name.n))
        return err_set(e, EINVAL, "extent %zu: a file name of %zu bytes; 1 to %u are possible",
                       d->count - 1, name.n, NAME_MAX_BYTES);
    line.n -= (size_t)(end + 1 - line.s);
    line.s = end + 1;
    struct span at = next_token(&line);
    if (at.n && !number_of(at, &sectors))
        return err_set(e, EINVAL, "extent %zu: '%.*s' is no offset in sectors", d->count - 1,
                       (int)min_u64(at.n, 40), at.s);
    if (!at.n && x->type == VMDK_FLAT)
        return err_set(e, EINVAL,
                       "extent %zu: a FLAT extent needs an offset behind its file's name",
                       d->count - 1);
    if (!ck_mul(sectors, (uint64_t)VMDK_SECTOR, &x->offset) || x->offset > INT64_MAX - x->length)
        return err_set(e, EFBIG, "extent %zu: offset %" PRIu64 " sectors is too large",
                       d->count - 1, sectors);
    if (x->offset && vmdk_type_is_sparse(x->type))
        return err_set(e, ENOTSUP, "extent %zu: a sparse extent at an offset of its file",
                       d->count - 1);
    x->name = strndup(name.s, name.n);
    return x->name ? 0 : err_set(e, ENOMEM, "no memory for extents");
}

/* 1: the line is no extent. */
static int parse_extent(struct vmdk_desc *d, struct span line, struct err *e) {
    static const char *const accesses[] = {"RW", "RDONLY", "NOACCESS"};
    struct span access = next_token(&line), size = next_token(&line), type = next_token(&line);
    uint64_t sectors;
    int a = 0, t;
    while (a < 3 && !is_word(access, accesses[a]))
        a++;
    if (a == 3)
        return 1;
    if (d->count == VMDK_EXTENTS_MAX)
        return err_set(e, EFBIG, "more than %u extents", VMDK_EXTENTS_MAX);
    if (!number_of(size, &sectors))
        return err_set(e, EINVAL, "extent %zu: '%.*s' is no size in sectors", d->count,
                       (int)min_u64(size.n, 40), size.s);
    if ((t = type_of(type)) < 0)
        return err_set(e, ENOTSUP, "extent %zu: type '%.*s' is not supported", d->count,
                       (int)min_u64(type.n, 40), type.s);
    struct vmdk_extent *x = add_extent(d);
    if (!x)
        return err_set(e, ENOMEM, "no memory for extents");
    x->access = (enum vmdk_access)a;
    x->type = (enum vmdk_type)t;
    x->start = d->size;
    if (!ck_mul(sectors, (uint64_t)VMDK_SECTOR, &x->length) ||
        !ck_add(d->size, x->length, &d->size) || d->size > INT64_MAX)
        return err_set(e, EFBIG, "extent %zu: %" PRIu64 " sectors are too many", d->count - 1,
                       sectors);
    return t == VMDK_ZERO ? 0 : parse_place(d, x, line, e);
}

/* ---------------------------------------------------------------- keys */

static bool hex_of(struct span v, uint32_t *out, uint8_t *digits) {
    uint32_t value = 0;
    if (!v.n || v.n > 8)
        return false;
    for (size_t i = 0; i < v.n; i++) {
        if (!isxdigit((unsigned char)v.s[i]))
            return false;
        int c = tolower((unsigned char)v.s[i]);
        value = value << 4 | (uint32_t)(c <= '9' ? c - '0' : c - 'a' + 10);
    }
    *out = value;
    *digits = (uint8_t)v.n;
    return true;
}

static struct span unquote(struct span v) {
    v = trim(v);
    if (v.n >= 2 && v.s[0] == '"' && v.s[v.n - 1] == '"')
        return (struct span){v.s + 1, v.n - 2};
    return v;
}

static int keep_text(char **out, struct span v, const char *key, struct err *e) {
    if (v.n > NAME_MAX_BYTES || memchr(v.s, 0, v.n))
        return err_set(e, EINVAL, "%s has a value of %zu bytes; up to %u are possible", key, v.n,
                       NAME_MAX_BYTES);
    free(*out);
    *out = strndup(v.s, v.n);
    return *out ? 0 : err_set(e, ENOMEM, "no memory for the descriptor");
}

static int parse_key(struct vmdk_desc *d, const char *text, struct span key, struct span value,
                     struct err *e) {
    uint64_t number;
    struct span plain = unquote(value);
    if (is_word(key, "version")) {
        if (!number_of(plain, &number) || number < 1 || number > 3)
            return err_set(e, ENOTSUP,
                           "version '%.*s' of the descriptor is unknown, 1 to 3 are known",
                           (int)min_u64(plain.n, 40), plain.s);
        d->version = (uint32_t)number;
    } else if (is_word(key, "CID")) {
        if (!hex_of(plain, &d->cid, &d->cid_digits))
            return err_set(e, EINVAL, "CID '%.*s' is not up to 8 hexadecimal digits",
                           (int)min_u64(plain.n, 40), plain.s);
        d->cid_at = (uint32_t)(plain.s - text);
    } else if (is_word(key, "parentCID")) {
        if (!hex_of(plain, &d->parent_cid, &d->parent_digits))
            return err_set(e, EINVAL, "parentCID '%.*s' is not up to 8 hexadecimal digits",
                           (int)min_u64(plain.n, 40), plain.s);
        d->parent_at = (uint32_t)(plain.s - text);
    } else if (is_word(key, "createType")) {
        return keep_text(&d->create_type, plain, "createType", e);
    } else if (is_word(key, "parentFileNameHint")) {
        return keep_text(&d->hint, plain, "parentFileNameHint", e);
    } else if (key.n > 4 && !strncasecmp(key.s, "ddb.", 4) && key.n < 80 && plain.n <= VALUE_MAX &&
               json_object_size(d->ddb) < DDB_MAX) {
        char name[80];
        memcpy(name, key.s + 4, key.n - 4);
        name[key.n - 4] = 0;
        json_t *v = json_stringn(plain.s, plain.n); /* NULL for what is not UTF-8: not shown */
        if (v)
            json_object_set_new(d->ddb, name, v);
    }
    return 0;
}

int vmdk_desc_parse(const char *text, size_t length, struct vmdk_desc *d, struct err *e) {
    struct span rest = {text, strnlen(text, length)}, line;
    d->version = 1;
    d->parent_cid = VMDK_NO_PARENT;
    if (!(d->ddb = json_object()))
        return err_set(e, ENOMEM, "no memory for the descriptor");
    while (next_line(&rest, &line)) {
        line = trim(line);
        if (!line.n || line.s[0] == '#')
            continue;
        int r = parse_extent(d, line, e);
        const char *eq = r > 0 ? memchr(line.s, '=', line.n) : NULL;
        if (eq)
            r = parse_key(d, text, trim((struct span){line.s, (size_t)(eq - line.s)}),
                          (struct span){eq + 1, line.n - (size_t)(eq + 1 - line.s)}, e);
        if (r < 0)
            return r;
    }
    if (!d->create_type)
        return err_set(e, EINVAL, "the descriptor has no createType");
    if (!d->count)
        return err_set(e, EINVAL, "the descriptor lists no extents");
    return 0;
}

void vmdk_desc_free(struct vmdk_desc *d) {
    for (size_t i = 0; i < d->count; i++) {
        vmdk_map_free(d->extents[i].map);
        free(d->extents[i].name);
        free(d->extents[i].problem);
    }
    free(d->extents);
    free(d->create_type);
    free(d->hint);
    json_decref(d->ddb);
    *d = (struct vmdk_desc){0};
}

/* Other lines stay as they are, ends included. */
void vmdk_desc_rewrite(const char *text, size_t length, uint32_t parent_cid, const char *hint,
                       struct strbuf *out) {
    struct span rest = {text, strnlen(text, length)}, line;
    while (next_line(&rest, &line)) {
        struct span key = trim(line);
        const char *eq = memchr(key.s, '=', key.n),
                   *cr = line.n && line.s[line.n - 1] == '\r' ? "\r" : "";
        key = eq ? trim((struct span){key.s, (size_t)(eq - key.s)}) : key;
        if (eq && is_word(key, "parentFileNameHint"))
            continue;
        if (eq && is_word(key, "parentCID"))
            strbuf_printf(out, "parentCID=%08" PRIx32 "%s", parent_cid, cr);
        else
            strbuf_add(out, line.s, line.n);
        strbuf_puts(out, "\n");
        if (eq && hint && is_word(key, "createType"))
            strbuf_printf(out, "parentFileNameHint=\"%s\"%s\n", hint, cr);
    }
}
