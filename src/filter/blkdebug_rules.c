/* SPDX-License-Identifier: MIT */
/*
 * Rules of blkdebug, read.
 *
 * A file's sections become the same trees as options, so that there is one reader of rules.  The
 * file is the user's own (he names it on the command line) and small; it is read in one go.
 */
#include "filter/blkdebug_rules.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/cleanup.h"
#include "base/err.h"
#include "base/opt.h"

enum { FILE_BYTES_MAX = 1024 * 1024, RULES_MAX = 10000 };

static const char *const iotype_names[] = {
    "read", "write", "write-zeroes", "discard", "flush", "block-status", NULL};

void rule_free(struct rule *r) {
    list_remove(&r->link);
    free(r->tag);
    free(r);
}

struct error_opts {
    char *event, *iotype;
    uint64_t state, code, sector;
    bool once, immediately, sector_given;
};
static const struct opt error_rows[] = {
    OPT_STR(struct error_opts, event, "event", OPT_OPEN, "what arms it"),
    OPT_U64(struct error_opts, state, "state", OPT_OPEN, 0, OPT_RANGE(0, INT32_MAX), "only then"),
    OPT_STR(struct error_opts, iotype, "iotype", OPT_OPEN, "what fails"),
    OPT_U64(struct error_opts, code, "errno", OPT_OPEN, EIO, OPT_RANGE(0, 4095), "with what"),
    {.name = "sector",
     .type = OPT_T_U64,
     .when = OPT_OPEN,
     .offset = offsetof(struct error_opts, sector),
     .given = offsetof(struct error_opts, sector_given),
     OPT_RANGE(0, INT64_MAX / 512),
     .help = "where"},
    OPT_BOOL(struct error_opts, once, "once", OPT_OPEN, false, "only once"),
    OPT_BOOL(struct error_opts, immediately, "immediately", OPT_OPEN, false, "without waiting"),
    OPT_END,
};

struct state_opts {
    char *event;
    uint64_t state, new_state;
};
static const struct opt state_rows[] = {
    OPT_STR(struct state_opts, event, "event", OPT_OPEN, "when"),
    OPT_U64(struct state_opts, state, "state", OPT_OPEN, 0, OPT_RANGE(0, INT32_MAX), "only then"),
    OPT_U64(struct state_opts, new_state, "new_state", OPT_OPEN, 0, OPT_RANGE(0, INT32_MAX),
            "the state from then on"),
    OPT_END,
};

static int find_event(const char *name, enum disk_event *out, struct err *e) {
    if (!name)
        return err_set(e, EINVAL, "Missing event name for rule");
    *out = disk_event_named(name);
    if (*out == EVENTS_N)
        return err_set(e, EINVAL, "Invalid event name \"%s\"", name);
    return 0;
}

static int error_rule(struct rule *r, const json_t *group, struct err *e) {
    struct error_opts o = {0};
    int rc = opt_fill(error_rows, group, OPT_OPEN, NULL, &o, e);
    if (rc)
        return rc;
    *r = (struct rule){
        .kind = RULE_ERROR,
        .state = (int)o.state,
        .error = (int)o.code,
        .offset = o.sector * 512,
        .anywhere = !o.sector_given,
        .once = o.once,
        .immediately = o.immediately,
        .iotypes = (1u << IOTYPE_BLOCK_STATUS) - 1, /* all but asking */
    };
    rc = find_event(o.event, &r->event, e);
    for (int i = 0; !rc && o.iotype; i++) {
        if (!iotype_names[i])
            rc = err_set(e, EINVAL, "Invalid iotype value \"%s\"", o.iotype);
        else if (!strcmp(iotype_names[i], o.iotype)) {
            r->iotypes = 1u << i;
            break;
        }
    }
    opt_free(error_rows, &o);
    return rc;
}

static int state_rule(struct rule *r, const json_t *group, struct err *e) {
    struct state_opts o = {0};
    int rc = opt_fill(state_rows, group, OPT_OPEN, NULL, &o, e);
    if (rc)
        return rc;
    *r =
        (struct rule){.kind = RULE_SET_STATE, .state = (int)o.state, .new_state = (int)o.new_state};
    rc = find_event(o.event, &r->event, e);
    opt_free(state_rows, &o);
    return rc;
}

static int add_rule(struct list *rules, bool is_error, const json_t *group, struct err *e) {
    struct rule *r = xcalloc(1, sizeof(*r));
    int rc = is_error ? error_rule(r, group, e) : state_rule(r, group, e);
    if (rc)
        free(r);
    else
        list_push_back(rules, &r->link);
    return rc;
}

static int add_group(struct list *rules, bool is_error, const json_t *value, struct err *e) {
    int rc = 0;
    size_t i;
    const char *key;
    json_t *one;
    if (json_array_size(value) > RULES_MAX || json_object_size(value) > RULES_MAX)
        return err_set(e, EINVAL, "more than %d rules", RULES_MAX);
    if (json_is_array(value)) {
        json_array_foreach(value, i, one) if (!rc) rc = add_rule(rules, is_error, one, e);
        return rc;
    }
    json_object_foreach((json_t *)value, key, one) if (!rc) rc = add_rule(rules, is_error, one, e);
    return rc;
}

int rules_from_tree(struct list *rules, const json_t *tree, struct err *e) {
    int rc = add_group(rules, true, json_object_get(tree, "inject-error"), e);
    return rc ? rc : add_group(rules, false, json_object_get(tree, "set-state"), e);
}

/* ---------------------------------------------------------------- the file */

static char *trim(char *s) {
    while (isspace((unsigned char)*s))
        s++;
    char *end = s + strlen(s);
    while (end > s && isspace((unsigned char)end[-1]))
        *--end = 0;
    return s;
}

/* key = "value", key = value, or key alone. */
static int add_line(json_t *group, char *line) {
    char *eq = strchr(line, '='), *value = "on";
    if (eq) {
        *eq = 0;
        value = trim(eq + 1);
        size_t len = strlen(value);
        if (len >= 2 && *value == '"' && value[len - 1] == '"') {
            value[len - 1] = 0;
            value++;
        }
    }
    return json_object_set_new(group, trim(line), json_string_nocheck(value));
}

static int parse_text(struct list *rules, char *text, const char *path, struct err *e) {
    json_t *group = NULL;
    bool is_error = false;
    int rc = 0, number = 0;
    for (char *save, *line = strtok_r(text, "\n", &save); !rc; line = strtok_r(NULL, "\n", &save)) {
        char *s = line ? trim(line) : NULL;
        number++;
        if (s && (!*s || *s == '#'))
            continue;
        if (!s || *s == '[') {
            rc = group ? add_rule(rules, is_error, group, e) : 0;
            json_decref(group);
            group = NULL;
            if (!s || rc)
                break;
            is_error = !strcmp(s, "[inject-error]");
            if (!is_error && strcmp(s, "[set-state]"))
                rc = err_set(e, EINVAL, "%s: '%s' is neither [inject-error] nor [set-state]", path,
                             s);
            else
                group = json_object();
        } else if (!group || add_line(group, s) < 0) {
            rc = err_set(e, EINVAL, "%s: line %d is in no section", path, number);
        }
    }
    json_decref(group);
    return rc;
}

int rules_from_file(struct list *rules, const char *path, struct err *e) {
    FILE *f = fopen(path, "re");
    if (!f)
        return err_errno(e, errno, "Could not read blkdebug config file");
    char *text AUTO_FREE = malloc(FILE_BYTES_MAX + 1);
    size_t got = text ? fread(text, 1, FILE_BYTES_MAX + 1, f) : 0;
    bool bad = ferror(f);
    fclose(f);
    if (!text || bad)
        return err_set(e, EIO, "Could not read blkdebug config file '%s'", path);
    if (got > FILE_BYTES_MAX)
        return err_set(e, EFBIG, "blkdebug config file '%s' is longer than 1 MiB", path);
    text[got] = 0;
    return parse_text(rules, text, path, e);
}
