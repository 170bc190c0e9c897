/* SPDX-License-Identifier: MIT */
/*
 * strata run: what becomes of what the guest writes, disk by disk.
 *
 *     disk.qcow2:snapshot   data.img:write   tools.iso:ro   other.raw
 *
 * A word behind the last colon is a mode, unless a file of the whole name exists: then it is that
 * file.  What has no mode gets that of --snapshot, --write or --stateless; without one of these it
 * is refused: the user says what becomes of the writes, there is no default.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/strbuf.h"
#include "cli/run.h"

static const struct {
    const char *word;
    enum run_mode mode;
} words[] = {{"snapshot", RUN_SNAPSHOT}, {"write", RUN_WRITE}, {"ro", RUN_RO}};

static int split(const char *text, struct run_disk *d, struct err *e) {
    struct str_nearest near = {0};
    char *colon;

    d->name = xstrdup(text);
    colon = strrchr(d->name, ':');
    if (!colon || colon == d->name || access(text, F_OK) == 0)
        return 0;
    for (size_t i = 0; i < sizeof(words) / sizeof(*words); i++) {
        str_nearest_offer(&near, colon + 1, words[i].word);
        if (strcmp(colon + 1, words[i].word))
            continue;
        *colon = 0;
        d->mode = words[i].mode;
        return 0;
    }
    *colon = 0;
    bool meant = access(d->name, F_OK) == 0; /* else the name may well have a colon of its own */
    *colon = ':';
    if (!meant)
        return 0;
    err_set(e, EINVAL, "%s: '%s' is not snapshot, write or ro", text, colon + 1);
    if (near.best)
        err_hint(e, "did you mean %.*s:%s?", (int)(colon - d->name), d->name, near.best);
    return -EINVAL;
}

unsigned run_count(const struct run *r, enum run_mode mode) {
    unsigned n = 0;
    for (unsigned i = 0; i < r->ndisks; i++)
        n += r->disks[i].mode == mode && !r->disks[i].cdrom;
    return n;
}

static int check_global(const struct run_args *a, struct err *e) {
    if (a->snapshot && a->write)
        return err_set(e, EINVAL, "--snapshot and --write exclude each other");
    if (a->stateless.n && (a->snapshot || a->write))
        return err_set(e, EINVAL, "--stateless and --%s exclude each other",
                       a->write ? "write" : "snapshot");
    if (a->keep_overlay && !a->stateless.n)
        return err_set(e, EINVAL, "--keep-overlay is for --stateless");
    return 0;
}

/* The global mode, to those that have none. */
static int spread(struct run *r, struct err *e) {
    const struct run_args *a = r->a;
    unsigned unsaid = run_count(r, RUN_UNSAID), next = 0;

    if (unsaid && !a->snapshot && !a->write && !a->stateless.n) {
        err_set(e, EINVAL,
                "say what becomes of what the guest writes: --snapshot "
                "throws it away at the end, --write keeps it in the disk");
        err_hint(e, "strata run --snapshot %s", r->ctx->pos[0]);
        return -EINVAL;
    }
    if (a->stateless.n && a->stateless.n != unsaid)
        return err_set(e, EINVAL,
                       "%zu --stateless for %u disks without a mode: give one for each, in order",
                       a->stateless.n, unsaid);
    for (unsigned i = 0; i < r->ndisks; i++) {
        struct run_disk *d = &r->disks[i];
        if (d->mode != RUN_UNSAID)
            continue;
        d->mode = a->snapshot ? RUN_SNAPSHOT : a->write ? RUN_WRITE : RUN_STATELESS;
        if (d->mode != RUN_STATELESS)
            continue;
        const char *slash;
        d->overlay = a->stateless.v[next++];
        slash = strrchr(d->overlay, '/');
        d->overlay_dir = !slash                ? xstrdup(".")
                         : slash == d->overlay ? xstrdup("/")
                                               : xstrndup(d->overlay, (size_t)(slash - d->overlay));
    }
    return 0;
}

/* A file to come: not there yet, and not asked for twice. */
static int check_new(const struct run_args *a, const char *option, const char *file,
                     struct err *e) {
    unsigned times = 0;
    if (!*file)
        return err_set(e, EINVAL, "%s: the name is empty", option);
    for (size_t i = 0; i < a->keep.n; i++)
        times += !strcmp(a->keep.v[i], file);
    for (size_t i = 0; i < a->stateless.n; i++)
        times += !strcmp(a->stateless.v[i], file);
    if (times > 1)
        return err_set(e, EINVAL, "%s %s: the name is given twice", option, file);
    if (access(file, F_OK) == 0)
        return err_set(e, EEXIST, "%s %s: the file exists", option, file);
    return 0;
}

static int check_temporary(struct run *r, struct err *e) {
    const struct run_args *a = r->a;
    unsigned snapshots = run_count(r, RUN_SNAPSHOT), stateless = run_count(r, RUN_STATELESS);
    int ret = 0;

    if (snapshots + stateless == 0 && (a->commit || a->keep.n || a->scratch || a->scratch_size))
        return err_set(e, EINVAL,
                       "--commit-on-exit, --keep, --scratch and --scratch-size are for "
                       "--snapshot; with --write the disk is written directly");
    if (a->scratch && snapshots == 0)
        return err_set(
            e, EINVAL,
            "--scratch is for --snapshot; the overlay of --stateless lies where its name "
            "says");
    if (a->commit && (a->keep.n || a->keep_overlay))
        return err_set(e, EINVAL, "--commit-on-exit and --keep%s exclude each other",
                       a->keep.n ? "" : "-overlay");
    if (a->keep.n && a->keep.n != snapshots)
        return err_set(e, EINVAL, "%zu --keep for %u disks%s: give one for each, in order",
                       a->keep.n, snapshots, snapshots == r->ndisks ? "" : " with a snapshot");
    for (size_t i = 0; ret == 0 && i < a->keep.n; i++)
        ret = check_new(a, "--keep", a->keep.v[i], e);
    for (size_t i = 0; ret == 0 && i < a->stateless.n; i++)
        ret = check_new(a, "--stateless", a->stateless.v[i], e);
    return ret;
}

int run_modes(struct run *r) {
    struct verb_ctx *ctx = r->ctx;
    struct err *e = &ctx->err;
    int ret = check_global(r->a, e);

    if (ret == 0 && ctx->pos_n + (r->a->cdrom != NULL) > VM_DRIVES_MAX)
        ret = err_set(e, EINVAL, "%d disks; at most %d", ctx->pos_n, VM_DRIVES_MAX);
    for (int i = 0; ret == 0 && i < ctx->pos_n; i++) {
        struct run_disk *d = &r->disks[r->ndisks++];
        d->guest_fd = -1;
        ret = split(ctx->pos[i], d, e);
    }
    if (ret == 0)
        ret = spread(r, e);
    if (ret == 0)
        ret = check_temporary(r, e);
    if (ret == 0 && r->a->cdrom)
        r->disks[r->ndisks++] = (struct run_disk){
            .name = xstrdup(r->a->cdrom), .mode = RUN_RO, .cdrom = true, .guest_fd = -1};
    return ret;
}
