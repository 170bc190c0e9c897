/* SPDX-License-Identifier: MIT */
/*
 * Option texts to option trees: "key=value,a.b=c" and "json:{...}".
 *
 * Both texts come from users and from images (a backing file name may be json:{...}), so length and
 * depth are bounded before anything recurses: a task's stack is 64 KiB, and jansson's own parser
 * would descend 2048 levels.  Dotted keys may deepen the tree, hence the depth is counted in
 * components, not in braces.
 *
 * Leaves of keyval texts are stored unchecked: file names are bytes, not UTF-8.
 */
#include <ctype.h>
#include <errno.h>
#include <string.h>
#include "base/err.h"
#include "base/opt.h"
#include "base/strbuf.h"

enum { TEXT_MAX = 1 << 20, DEPTH_MAX = 64, KEY_MAX = 1024 };

static void json_unref(json_t **j) {
    json_decref(*j);
}
#define AUTO_JSON AUTO(json_unref)

/* The key as it may be shown: cut and made safe.  Owned. */
static char *shown(const char *s) {
    struct strbuf b = STRBUF_INIT;
    strbuf_puts(&b, "");
    strbuf_put_safe(&b, s, strnlen(s, 80));
    return strbuf_steal(&b);
}

static int merge(json_t *into, json_t *from, const char *path, bool replace, struct err *e);

/*
 * Puts `value` (borrowed) below key[0, len) of `into`.  Sub-trees are joined; a leaf is replaced
 * only with `replace`.
 */
static int put_leaf(json_t *into, const char *key, size_t len, json_t *value, const char *path,
                    bool replace, struct err *e) {
    json_t *old = json_object_getn(into, key, len);
    if (old && json_is_object(old) && json_is_object(value))
        return merge(old, value, path, replace, e);
    if (old && (!replace || json_is_object(old) || json_is_object(value))) {
        char *name AUTO_FREE = shown(path);
        bool both = json_is_object(old) || json_is_object(value);
        return err_set(e, EINVAL, "option '%s' is given %s", name,
                       both ? "both as a value and as a group" : "twice");
    }
    if (json_object_setn_nocheck(into, key, len, value) < 0)
        return err_set(e, ENOMEM, "no memory for options");
    return 0;
}

/* Puts `value` at the dotted `path` below `into`, at most `depth_left` components deep. */
static int put_path(json_t *into, const char *path, json_t *value, bool replace, int depth_left,
                    struct err *e) {
    const char *part = path;
    for (;;) {
        const char *dot = strchr(part, '.');
        size_t len = dot ? (size_t)(dot - part) : strlen(part);
        if (!len) {
            char *name AUTO_FREE = shown(path);
            return err_set(e, EINVAL, "option name '%s' has an empty part", name);
        }
        if (depth_left-- <= 0)
            return err_set(e, EINVAL, "options are nested more than %d deep", DEPTH_MAX);
        if (!dot)
            return put_leaf(into, part, len, value, path, replace, e);
        json_t *next = json_object_getn(into, part, len);
        if (next && !json_is_object(next)) {
            char *name AUTO_FREE = shown(path);
            return err_set(e, EINVAL, "option '%s': '%.*s' is given both as a value and as a group",
                           name, (int)(dot - path < 80 ? dot - path : 80), name);
        }
        if (!next) {
            next = json_object();
            if (!next || json_object_setn_new_nocheck(into, part, len, next) < 0)
                return err_set(e, ENOMEM, "no memory for options");
        }
        into = next;
        part = dot + 1;
    }
}

static int merge(json_t *into, json_t *from, const char *path, bool replace, struct err *e) {
    const char *key;
    json_t *value;
    json_object_foreach(from, key, value) {
        int rc = put_leaf(into, key, strlen(key), value, path, replace, e);
        if (rc < 0)
            return rc;
    }
    return 0;
}

/* ---- key=value,... ---- */

/* The next element of *s up to a single comma, ",," undone; *s behind it, NULL at the end. */
static char *next_element(const char **s) {
    struct strbuf b = STRBUF_INIT;
    strbuf_puts(&b, "");
    const char *p = *s;
    for (;;) {
        size_t len = strcspn(p, ",");
        strbuf_add(&b, p, len);
        p += len;
        if (p[0] != ',' || p[1] != ',')
            break;
        strbuf_puts(&b, ",");
        p += 2;
    }
    *s = *p ? p + 1 : NULL;
    return strbuf_steal(&b);
}

static int check_key(const char *key, struct err *e) {
    size_t len = strlen(key);
    if (!len)
        return err_set(e, EINVAL, "an option name is missing");
    if (len > KEY_MAX)
        return err_set(e, EINVAL, "an option name is %zu bytes long, at most %d are possible", len,
                       KEY_MAX);
    for (const char *p = key; *p; p++)
        if (!isalnum((unsigned char)*p) && !strchr("-_.", *p)) {
            char *name AUTO_FREE = shown(key);
            return err_set(e, EINVAL, "option name '%s' has a character that no option has", name);
        }
    return 0;
}

static int add_element(json_t *root, char *element, const char *implied_key, struct err *e) {
    char *eq = strchr(element, '=');
    const char *key = element, *value = "on";
    if (eq) {
        *eq = '\0';
        value = eq + 1;
    } else if (implied_key) {
        key = implied_key;
        value = element;
    }
    int rc = check_key(key, e);
    if (rc < 0)
        return rc;
    json_t *leaf AUTO_JSON = json_string_nocheck(value);
    if (!leaf)
        return err_set(e, ENOMEM, "no memory for options");
    return put_path(root, key, leaf, true, DEPTH_MAX, e);
}

int opt_parse_keyval(const char *text, const char *implied_key, json_t **tree, struct err *e) {
    size_t len = strlen(text);
    if (len > TEXT_MAX)
        return err_set(e, EINVAL, "the options are %zu bytes long, at most %d are possible", len,
                       TEXT_MAX);
    json_t *root AUTO_JSON = *tree ? json_deep_copy(*tree) : json_object();
    if (!root)
        return err_set(e, ENOMEM, "no memory for options");
    for (const char *s = len ? text : NULL; s; implied_key = NULL) {
        char *element AUTO_FREE = next_element(&s);
        int rc = add_element(root, element, implied_key, e);
        if (rc < 0)
            return rc;
    }
    json_decref(*tree);
    *tree = steal(&root);
    return 0;
}

/* ---- json:{...} ---- */

/* Braces and brackets open at once, at most; strings are passed over. */
static int nesting(const char *s) {
    int depth = 0, max = 0;
    bool quoted = false;
    for (; *s; s++) {
        if (*s == '"')
            quoted = !quoted;
        else if (quoted && *s == '\\' && s[1])
            s++;
        else if (!quoted && (*s == '{' || *s == '['))
            max = ++depth > max ? depth : max;
        else if (!quoted && (*s == '}' || *s == ']'))
            depth--;
    }
    return max;
}

/* A copy of `from` with dotted keys turned into groups; NULL with an error. */
static json_t *expand(json_t *from, int depth_left, struct err *e) {
    if (depth_left < 0) {
        err_set(e, EINVAL, "options are nested more than %d deep", DEPTH_MAX);
        return NULL;
    }
    if (!json_is_object(from) && !json_is_array(from))
        return json_incref(from);
    json_t *to AUTO_JSON = json_is_object(from) ? json_object() : json_array();
    size_t i;
    json_t *value;
    json_array_foreach(from, i, value) {
        json_t *copy AUTO_JSON = expand(value, depth_left - 1, e);
        if (!copy)
            return NULL;
        if (json_array_append(to, copy) < 0) {
            err_set(e, ENOMEM, "no memory for options");
            return NULL;
        }
    }
    const char *key;
    json_object_foreach(from, key, value) {
        int parts = 1;
        for (const char *p = key; *p; p++)
            parts += *p == '.';
        json_t *copy AUTO_JSON = expand(value, depth_left - parts, e);
        if (!copy || put_path(to, key, copy, false, depth_left, e) < 0)
            return NULL;
    }
    return steal(&to);
}

/*
 * QEMU's JSON takes strings in single quotes too, and people's scripts use them to get by in a
 * shell.  Rewritten to double quotes: \" appears for a bare one inside, and \' becomes '.  Owned.
 */
static char *double_quoted(const char *text) {
    struct strbuf b = STRBUF_INIT;
    char open = 0;
    for (const char *c = text; *c; c++) {
        if (!open && (*c == '"' || *c == '\'')) {
            open = *c;
            strbuf_puts(&b, "\"");
        } else if (open && *c == open) {
            open = 0;
            strbuf_puts(&b, "\"");
        } else if (open && *c == '\\' && c[1]) {
            if (c[1] != '\'')
                strbuf_add(&b, c, 1);
            strbuf_add(&b, ++c, 1);
        } else if (open == '\'' && *c == '"') {
            strbuf_puts(&b, "\\\"");
        } else {
            strbuf_add(&b, c, 1);
        }
    }
    return strbuf_steal(&b);
}

int opt_parse_json(const char *text, json_t **tree, struct err *e) {
    size_t len = strlen(text);
    if (len > TEXT_MAX)
        return err_set(e, EINVAL, "the JSON text is %zu bytes long, at most %d are possible", len,
                       TEXT_MAX);
    if (nesting(text) > DEPTH_MAX)
        return err_set(e, EINVAL, "options are nested more than %d deep", DEPTH_MAX);
    json_error_t je;
    char *quoted AUTO_FREE = strchr(text, '\'') ? double_quoted(text) : NULL;
    if (quoted)
        text = quoted;
    json_t *raw AUTO_JSON = json_loads(text, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &je);
    if (!raw) {
        char *why AUTO_FREE = shown(je.text);
        return err_set(e, EINVAL, "not valid JSON: %s (line %d, column %d)", why, je.line,
                       je.column);
    }
    if (!json_is_object(raw))
        return err_set(e, EINVAL, "the JSON text is not an object {...}");
    json_t *out = expand(raw, DEPTH_MAX, e);
    if (!out)
        return e ? -e->code : -EINVAL;
    *tree = out;
    return 0;
}
