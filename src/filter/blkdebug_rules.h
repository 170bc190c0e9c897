/* SPDX-License-Identifier: MIT */
/* Rules of blkdebug: what they are, and reading them from a file or an option tree. */
#ifndef STRATA_FILTER_BLKDEBUG_RULES_H
#define STRATA_FILTER_BLKDEBUG_RULES_H

#include <stdbool.h>
#include <stdint.h>
#include <jansson.h>
#include "base/list.h"
#include "disk/event.h"

struct err;

enum iotype {
    IOTYPE_READ,
    IOTYPE_WRITE,
    IOTYPE_WRITE_ZEROES,
    IOTYPE_DISCARD,
    IOTYPE_FLUSH,
    IOTYPE_BLOCK_STATUS,
    IOTYPES_N
};

enum rule_kind { RULE_ERROR, RULE_SET_STATE, RULE_BREAK };

struct rule {
    struct list link;
    enum rule_kind kind;
    enum disk_event event;
    int state; /* only in this state; 0: in any */
    /* RULE_SET_STATE */
    int new_state;
    /* RULE_ERROR */
    int error;
    uint64_t offset;
    bool anywhere, once, immediately;
    unsigned iotypes; /* bits 1 << enum iotype */
    unsigned armed;   /* the arming event that armed it; 0: none yet */
    /* RULE_BREAK */
    char *tag;
    void (*say)(const char *tag, bool stopped);
};

/* Takes it out of its list and frees it. */
void rule_free(struct rule *r);

/*
 * Adds the rules of the INI file at `path` (sections [inject-error] and [set-state], lines
 * key = "value", # comments; at most 1 MiB).
 */
int rules_from_file(struct list *rules, const char *path, struct err *e);
/* Adds those of tree's keys "inject-error" and "set-state", each a list or a group of numbers. */
int rules_from_tree(struct list *rules, const json_t *tree, struct err *e);

#endif
