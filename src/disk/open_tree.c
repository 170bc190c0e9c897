/* SPDX-License-Identifier: MIT */
/*
 * Option trees of nodes, before anything is opened: from names, from children's values, and the
 * keys and cache modes that every node knows.  Pure, but for looking at what a protocol's name
 * says.
 */
#include <errno.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/err.h"
#include "base/strbuf.h"
#include "disk/engine.h"

const char *const core_keys[] = {"driver",  "node-name",     "read-only",   "cache",
                                 "discard", "detect-zeroes", "force-share", NULL};

const char *const cache_names[] = {"writeback",  "none",   "writethrough",
                                   "directsync", "unsafe", NULL};

int cache_parse(const char *name, struct err *e) {
    for (int i = 0; cache_names[i]; i++)
        if (!strcmp(name, cache_names[i]))
            return i;
    return err_set(e, EINVAL,
                   "unknown cache mode '%s': it is one of none, writeback, writethrough, "
                   "directsync, unsafe",
                   name);
}

unsigned cache_node_flags(enum cache_mode m) {
    static const unsigned flags[] = {[CACHE_WRITEBACK] = 0,
                                     [CACHE_NONE] = NODE_DIRECT,
                                     [CACHE_WRITETHROUGH] = NODE_WRITETHROUGH,
                                     [CACHE_DIRECTSYNC] = NODE_DIRECT | NODE_WRITETHROUGH,
                                     [CACHE_UNSAFE] = NODE_NO_FLUSH};
    return flags[m];
}

/* ---- trees ---- */

int tree_set(json_t *tree, const char *key, json_t *value, struct err *e) {
    /* An option that is lost would open something else: never silently. */
    return json_object_set_new(tree, key, value) < 0 ? err_set(e, ENOMEM, "no memory for options")
                                                     : 0;
}

static int tree_copy(const json_t *tree, json_t **out, struct err *e) {
    *out = json_deep_copy(tree);
    return *out ? 0 : err_set(e, ENOMEM, "no memory for options");
}

int tree_of_file(const char *name, json_t **out, struct err *e) {
    AUTO_JSON json_t *t = json_object();
    int r = tree_set(t, "driver", json_string("file"), e);
    if (!r)
        r = tree_set(t, "filename", json_string_nocheck(name), e);
    if (!r)
        *out = steal(&t);
    return r;
}

int tree_from_storage_name(const char *name, json_t **out, struct err *e) {
    const struct driver *drv = driver_for_prefix(name);
    if (!drv && !strncmp(name, "file:", 5))
        name += 5;
    else if (!drv && name_has_protocol(name)) {
        err_set(e, ENOTSUP, "unknown protocol '%.*s'", (int)strcspn(name, ":"), name);
        err_hint(e, "for a file whose name holds a colon, write ./%s", name);
        return -ENOTSUP;
    }
    AUTO_JSON json_t *t = json_object();
    if (json_object_set_new(t, "driver", json_string(drv ? drv->name : "file")) < 0)
        return err_set(e, ENOMEM, "no memory");
    if (drv && drv->parse_name) {
        int r = drv->parse_name(name, t, e);
        if (r < 0)
            return r;
    } else if (json_object_set_new(t, "filename", json_string_nocheck(name)) < 0) {
        return err_set(e, ENOMEM, "no memory"); /* any bytes but NUL and '/' make a file name */
    }
    *out = steal(&t);
    return 0;
}

int tree_from_name(const char *name, json_t **out, struct err *e) {
    if (!strncmp(name, "json:", 5))
        return opt_parse_json(name + 5, out, e);
    json_t *file = NULL;
    int r = tree_from_storage_name(name, &file, e);
    if (r < 0)
        return r;
    AUTO_JSON json_t *t = json_object();
    r = tree_set(t, "file", file, e);
    if (r < 0)
        return r;
    *out = steal(&t);
    return 0;
}

/* A child written as a string is a name; as an object it is a tree. */
int tree_from_child(const json_t *value, bool storage, json_t **out, struct err *e) {
    const char *file = json_string_value(json_object_get(value, "filename"));
    if (storage && file && !json_object_get(value, "driver") && !json_object_get(value, "file")) {
        /* file.filename=NAME alone: the name tells the driver. */
        int r = tree_from_storage_name(file, out, e);
        if (r < 0)
            return r;
        AUTO_JSON json_t *rest = NULL;
        r = tree_copy(value, &rest, e);
        json_object_del(rest, "filename");
        if (!r && json_object_update_recursive(*out, rest) < 0)
            r = err_set(e, ENOMEM, "no memory for options");
        return r;
    }
    if (json_is_object(value))
        return tree_copy(value, out, e);
    if (!json_is_string(value))
        return err_set(e, EINVAL, "a child is a name or an object of options");
    const char *name = json_string_value(value);
    if (storage && strncmp(name, "json:", 5))
        return tree_from_storage_name(name, out, e);
    return tree_from_name(name, out, e);
}

const char *tree_str(const json_t *tree, const char *key) {
    return json_string_value(json_object_get(tree, key));
}

static int tree_bool(const json_t *tree, const char *key, bool *out, struct err *e) {
    const json_t *v = json_object_get(tree, key);
    const char *s = json_string_value(v);
    if (!v)
        return 0;
    if (json_is_boolean(v))
        *out = json_is_true(v);
    else if (s && (!strcmp(s, "on") || !strcmp(s, "true") || !strcmp(s, "yes")))
        *out = true;
    else if (s && (!strcmp(s, "off") || !strcmp(s, "false") || !strcmp(s, "no")))
        *out = false;
    else
        return err_set(e, EINVAL, "option '%s' is 'on' or 'off'", key);
    return 0;
}

static int set_flag(const json_t *tree, const char *key, unsigned bit, unsigned *flags,
                    struct err *e) {
    bool on = *flags & bit;
    int r = tree_bool(tree, key, &on, e);
    *flags = on ? *flags | bit : *flags & ~bit;
    return r;
}

/* The core keys over what the parent handed down. */
int tree_node_flags(const json_t *tree, unsigned *flags, struct err *e) {
    bool ro = !(*flags & NODE_RW);
    int r = tree_bool(tree, "read-only", &ro, e);
    *flags = ro ? *flags & ~NODE_RW : *flags | NODE_RW;
    const json_t *cache = json_object_get(tree, "cache");
    if (!r && cache && !json_is_object(cache))
        return err_set(e, EINVAL, "option 'cache' has the keys cache.direct and cache.no-flush");
    if (!r)
        r = set_flag(cache, "direct", NODE_DIRECT, flags, e);
    if (!r)
        r = set_flag(cache, "no-flush", NODE_NO_FLUSH, flags, e);
    if (!r)
        r = set_flag(tree, "force-share", NODE_FORCE_SHARE, flags, e);
    const char *discard = tree_str(tree, "discard"), *detect = tree_str(tree, "detect-zeroes");
    if (!r && discard) {
        bool unmap = !strcmp(discard, "unmap") || !strcmp(discard, "on");
        if (!unmap && strcmp(discard, "ignore") && strcmp(discard, "off"))
            return err_set(e, EINVAL, "discard is 'unmap' or 'ignore', not '%s'", discard);
        *flags = unmap ? *flags | NODE_UNMAP : *flags & ~NODE_UNMAP;
    }
    if (!r && detect) {
        *flags &= ~(NODE_DETECT_ZEROES | NODE_DETECT_UNMAP);
        if (!strcmp(detect, "unmap"))
            *flags |= NODE_DETECT_UNMAP;
        else if (!strcmp(detect, "on"))
            *flags |= NODE_DETECT_ZEROES;
        else if (strcmp(detect, "off"))
            return err_set(e, EINVAL, "detect-zeroes is 'off', 'on' or 'unmap', not '%s'", detect);
    }
    if (!r && detect && *flags & NODE_DETECT_UNMAP && !(*flags & NODE_UNMAP))
        return err_set(e, EINVAL,
                       "setting detect-zeroes to unmap is not allowed without setting discard "
                       "operation to unmap");
    if (!r && *flags & NODE_FORCE_SHARE && *flags & NODE_RW)
        return err_set(e, EINVAL, "force-share only goes with read-only");
    return r;
}

/* "filename" given to a format means its file's name. */
int tree_lower_filename(json_t *tree, struct err *e) {
    const char *name = tree_str(tree, "filename");
    if (!name || json_object_get(tree, "file"))
        return 0;
    json_t *file;
    int r = tree_from_storage_name(name, &file, e);
    if (r < 0)
        return r;
    r = tree_set(tree, "file", file, e);
    json_object_del(tree, "filename");
    return r;
}

static int raised(int bad, struct err *e) {
    return bad ? err_set(e, ENOMEM, "no memory for options") : 0;
}

/*
 * A name on the command line stands for a format's file; where the options say that the driver is
 * storage, it is that one's name, and a filter's child's.
 */
int tree_raise_filename(json_t *tree, const struct driver *drv, struct err *e) {
    int bad = 0;
    json_t *file = json_object_get(tree, "file");
    if (json_is_object(file) && tree_str(file, "driver") &&
        !strcmp(tree_str(file, "driver"), drv->name)) {
        /* "blkdebug:CONFIG:IMAGE" for driver=blkdebug: the name's parts are its options. */
        AUTO_JSON json_t *parts = json_incref(file);
        const char *key;
        json_t *value;
        json_object_del(tree, "file");
        json_object_foreach(parts, key, value) {
            json_t *have = json_object_get(tree, key);
            if (!have)
                bad |= json_object_set(tree, key, value);
            else if (json_is_object(have) && json_is_string(value) &&
                     !json_object_get(have, "filename"))
                bad |= json_object_set(have, "filename", value);
        }
        return raised(bad, e);
    }
    const char *name = tree_str(file, "filename"), *below = tree_str(file, "driver");
    const char *child = NULL;
    for (const struct opt *o = drv->opts; o && o->name; o++)
        if (o->type == OPT_T_CHILD && !child)
            child = o->name;
    if (child && !name && tree_str(tree, "filename")) {
        json_t *to = json_object_get(tree, child);
        if (!to)
            bad |= json_object_set_new(tree, child, to = json_object());
        if (!bad && json_is_object(to))
            bad |= json_object_set(to, "filename", json_object_get(tree, "filename"));
        json_object_del(tree, "filename");
        return raised(bad, e);
    }
    if (!name || (child && !strcmp(child, "file")))
        return 0;
    AUTO_JSON json_t *text = json_string_nocheck(name);
    if (!child) {
        if (!json_object_get(tree, "filename"))
            bad |= json_object_set(tree, "filename", text);
    } else {
        json_t *to = json_object_get(tree, child);
        if (!to) {
            bad |= json_object_set_new(tree, child, json_deep_copy(file));
        } else if (json_is_object(to) && !json_object_get(to, "filename") &&
                   !json_object_get(to, "file")) {
            if (below && strcmp(below, "file"))
                bad |= json_object_set_new(to, "file", json_deep_copy(file));
            else
                bad |= json_object_set(to, "filename", text);
        }
    }
    json_object_del(tree, "file");
    return raised(bad, e);
}

char *tree_display_name(const json_t *tree) {
    const json_t *file = json_object_get(tree, "file");
    const char *name = tree_str(tree, "filename");
    if (!name)
        name = json_is_string(file) ? json_string_value(file) : tree_str(file, "filename");
    if (name)
        return xstrdup(name);
    AUTO_FREE char *text = json_dumps(tree, JSON_COMPACT);
    return xasprintf("json:%s", text ? text : "{}");
}

/* Says nothing but what the storage below is: that one's name tells as much. */
bool tree_is_plain(const json_t *tree) {
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)tree, key, value) {
        if (strcmp(key, "driver") && strcmp(key, "file"))
            return false;
    }
    return true;
}
