/* SPDX-License-Identifier: MIT */
/*
 * Progress of long work: a bar on a terminal, or JSON lines for programs.
 *
 * Both go to standard error.  -p draws a bar when standard error is a terminal, and otherwise
 * writes one plain line each tenth of the way.  --progress=json writes objects, one a line:
 *
 *     {"progress": {"done": 1048576, "total": 4194304, "percent": 25.00}}
 *
 * at most ten a second, the first at once and the last always ("percent": 100.00 only on success).
 *
 * Without either, and unless the verb is quiet, SIGUSR1 makes one line, as with dd and qemu-img:
 * "(42.00/100%)".
 *
 *     struct args { ...; struct progress_args progress; };
 *     PROGRESS_ROWS(struct args, progress),
 *     ...
 *     struct progress bar;
 *     progress_begin(&bar, &a->progress);
 *     ... progress_update(&bar, done, total) from the loop's thread, as often as you like ...
 *     progress_end(&bar, rc == 0);
 */
#ifndef STRATA_CLI_PROGRESS_H
#define STRATA_CLI_PROGRESS_H

#include <stdbool.h>
#include <stdint.h>
#include "cli/cli.h"

/* DEMAND is not for the option: nothing asked for, so one line each time SIGUSR1 comes. */
enum progress_mode { PROGRESS_OFF, PROGRESS_BAR, PROGRESS_JSON, PROGRESS_DEMAND };
extern const char *const progress_names[]; /* "off", "bar", "json", NULL */

struct progress_args {
    bool bar; /* -p */
    int mode; /* --progress */
};
#define PROGRESS_ROWS(strct, member)                                                               \
    CLI_FLAG(strct, member.bar, 'p', NULL, "show a progress bar"),                                 \
        CLI_ENUM(strct, member.mode, 0, "progress", "MODE", progress_names, PROGRESS_OFF,          \
                 "show progress as a bar or as JSON lines on standard error")

struct progress {
    enum progress_mode mode;
    bool terminal;
    bool drawn;      /* a bar */
    bool drawn_once; /* anything */
    uint64_t done, total;
    int64_t start_ns, last_ns;
    unsigned tenths; /* written so far, when not on a terminal */
};

/* SIGUSR1 is caught from here to progress_end. */
void progress_begin(struct progress *p, const struct progress_args *args);
void progress_update(struct progress *p, uint64_t done, uint64_t total);
/* Takes the bar off the terminal's current line. */
void progress_end(struct progress *p, bool success);

#endif
