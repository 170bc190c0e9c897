/* SPDX-License-Identifier: MIT */
/* The verbs of this build, in the order of help.  One line each here and one in meson.build. */
#include <string.h>
#include "cli/cli.h"

extern const struct verb verb_amend;
extern const struct verb verb_attach;
extern const struct verb verb_bench;
extern const struct verb verb_bitmap;
extern const struct verb verb_check;
extern const struct verb verb_commit;
extern const struct verb verb_compare;
extern const struct verb verb_convert;
extern const struct verb verb_create;
extern const struct verb verb_ctl;
extern const struct verb verb_dd;
extern const struct verb verb_detach;
extern const struct verb verb_help;
extern const struct verb verb_info;
extern const struct verb verb_io;
extern const struct verb verb_map;
extern const struct verb verb_measure;
extern const struct verb verb_mount;
extern const struct verb verb_rebase;
extern const struct verb verb_resize;
extern const struct verb verb_run;
extern const struct verb verb_serve;
extern const struct verb verb_snapshot;
extern const struct verb verb_unmount;

/* clang-format off */
const struct verb *const verb_table[] = {
    &verb_info,
    &verb_create,
    &verb_convert,
    &verb_compare,
    &verb_check,
    &verb_map,
    &verb_commit,
    &verb_rebase,
    &verb_resize,
    &verb_amend,
    &verb_bitmap,
    &verb_snapshot,
    &verb_measure,
    &verb_dd,
    &verb_bench,
    &verb_io,
    &verb_serve,
    &verb_ctl,
    &verb_mount,
    &verb_unmount,
    &verb_attach,
    &verb_detach,
    &verb_run,
    &verb_help,
    NULL,
};
/* clang-format on */

const struct verb *verb_find(const char *name) {
    for (int i = 0; verb_table[i]; i++)
        if (!strcmp(verb_table[i]->name, name))
            return verb_table[i];
    return NULL;
}
