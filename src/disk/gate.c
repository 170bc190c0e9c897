/* SPDX-License-Identifier: MIT */
/*
 * The gate: what names found inside images may open, and where they point.
 *
 * A name inside an image is a claim of whoever wrote the image.  Comparing folders is done on
 * resolved paths, so that "../" and symlinks do not lead out.  The check is by name and the open
 * comes later: who can change the folder between the two could also have placed the file there.
 */
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/cleanup.h"
#include "base/err.h"
#include "base/strbuf.h"
#include "disk/engine.h"

const char *const gate_names[] = {"none", "beside", "local", "any", NULL};

bool name_has_protocol(const char *name) {
    size_t n = strcspn(name, ":/");
    return n > 0 && name[n] == ':';
}

static const char *local_part(const char *name) {
    return strncmp(name, "file:", 5) ? name : name + 5;
}

char *backing_resolve(const char *image, const char *claimed, struct err *e) {
    if (claimed[0] == '/' || name_has_protocol(claimed))
        return xstrdup(claimed);
    if (!image || !strncmp(image, "json:", 5)) {
        err_set(e, EINVAL, "cannot tell which folder the relative name '%s' belongs to", claimed);
        err_hint(e, "name the backing file with backing.file.filename=...");
        return NULL;
    }
    const char *path = local_part(image);
    if (path == image && name_has_protocol(path)) {
        err_set(e, EINVAL, "the relative name '%s' cannot be combined with '%s'", claimed, image);
        return NULL;
    }
    const char *slash = strrchr(path, '/');
    return slash ? xasprintf("%.*s%s", (int)(slash + 1 - path), path, claimed) : xstrdup(claimed);
}

char *data_file_resolve(const char *image, const char *claimed, struct err *e) {
    if (claimed[0] == '/')
        return xstrdup(claimed);
    if (!image || !strncmp(image, "json:", 5) || name_has_protocol(local_part(image))) {
        err_set(e, EINVAL, "cannot tell which folder the relative name '%s' belongs to", claimed);
        err_hint(e, "name the data file with data-file=...");
        return NULL;
    }
    const char *path = local_part(image), *slash = strrchr(path, '/');
    if (slash)
        return xasprintf("%.*s%s", (int)(slash + 1 - path), path, claimed);
    /* With a slash before its colon nothing takes it for a protocol. */
    return name_has_protocol(claimed) ? xasprintf("./%s", claimed) : xstrdup(claimed);
}

static char *folder_real(const char *image) {
    const char *path = local_part(image), *slash = strrchr(path, '/');
    AUTO_FREE char *dir = slash ? xstrndup(path, slash == path ? 1 : slash - path) : xstrdup(".");
    return realpath(dir, NULL);
}

static int refuse(struct err *e, const char *claimed, const char *why, const char *level) {
    AUTO_STRBUF struct strbuf b = STRBUF_INIT;
    strbuf_put_safe(&b, claimed, strlen(claimed));
    err_set(e, EPERM, "the image names '%s', which %s", b.s, why);
    err_hint(e,
             "if you trust this image, allow it with --trust %s; or leave the name out of it by "
             "giving that file yourself",
             level);
    return -EPERM;
}

/* A regular file below the image's own folder, symlinks resolved. */
static int check_beside(const char *image, const char *resolved, const char *claimed,
                        struct err *e) {
    struct stat st;
    if (!image || name_has_protocol(local_part(image)))
        return refuse(e, claimed, "lies in no folder that could be compared", "local");
    AUTO_FREE char *dir = folder_real(image);
    AUTO_FREE char *target = realpath(local_part(resolved), NULL);
    if (!target)
        return err_errno(e, errno, "backing file '%s'", resolved);
    size_t n = dir ? strlen(dir) : 0;
    if (!dir || strncmp(dir, target, n) || (n > 1 && target[n] != '/'))
        return refuse(e, claimed, "lies outside the image's own folder", "local");
    if (stat(target, &st) < 0)
        return err_errno(e, errno, "backing file '%s'", resolved);
    if (!S_ISREG(st.st_mode))
        return refuse(e, claimed, "is not a regular file", "local");
    return 0;
}

int gate_check(enum gate gate, const char *image, const char *resolved, const char *claimed,
               struct err *e) {
    if (gate == GATE_ANY)
        return 0;
    if (gate == GATE_NONE)
        return refuse(e, claimed, "is not followed (--trust none)", "beside");
    if (name_has_protocol(local_part(resolved)))
        return refuse(e, claimed, "is not a local file", "any");
    return gate == GATE_LOCAL ? 0 : check_beside(image, resolved, claimed, e);
}
