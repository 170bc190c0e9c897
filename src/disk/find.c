/* SPDX-License-Identifier: MIT */
/*
 * Looking for the image below among the files beside one.
 *
 * Some formats name their parent by an identifier only.  Whoever wrote the image has no say about
 * which folder is looked at, and the files there are only read, 512 bytes of each; what is found is
 * opened later, through the gate like any name out of an image.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/err.h"
#include "disk/engine.h"
#include "runtime/loop.h"

#define FILES_MAX 4096 /* looked at in a folder */

struct search {
    const char *folder, *prefix; /* what stands before a found name, as the image would say it */
    bool (*match)(const uint8_t head[FIND_HEAD_BYTES], void *arg);
    void *arg;
    char *found[2]; /* two are enough to know that it is not certain */
};

static bool file_matches(int dir, const char *name, struct search *s) {
    uint8_t head[FIND_HEAD_BYTES];
    struct stat st;
    int fd = openat(dir, name, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_NOFOLLOW | O_CLOEXEC);
    bool yes = fd >= 0 && !fstat(fd, &st) && S_ISREG(st.st_mode) &&
               pread(fd, head, sizeof(head), 0) == (ssize_t)sizeof(head) && s->match(head, s->arg);
    if (fd >= 0)
        close(fd);
    return yes;
}

/* Worker thread. */
static int search_folder(void *arg) {
    struct search *s = arg;
    DIR *d = opendir(s->folder);
    if (!d)
        return -errno;
    struct dirent *entry;
    for (int left = FILES_MAX; left-- && !s->found[1] && (entry = readdir(d));)
        if ((entry->d_type == DT_REG || entry->d_type == DT_UNKNOWN) &&
            file_matches(dirfd(d), entry->d_name, s))
            s->found[s->found[0] != NULL] = xasprintf("%s%s", s->prefix, entry->d_name);
    closedir(d);
    return 0;
}

int node_find_beside_co(struct node *n, enum gate gate,
                        bool (*match)(const uint8_t head[FIND_HEAD_BYTES], void *arg), void *arg,
                        char **name, struct err *e) {
    static const char *const prefixes[] = {"", "../"};
    *name = NULL;
    const char *file = n->file->filename;
    if (!file || gate == GATE_NONE || name_has_protocol(file))
        return 0;
    const char *slash = strrchr(file, '/');
    for (int i = 0; i < (gate >= GATE_LOCAL ? 2 : 1) && !*name; i++) {
        AUTO_FREE char *folder = xasprintf("%.*s%s", slash ? (int)(slash + 1 - file) : 2,
                                           slash ? file : "./", prefixes[i]);
        struct search s = {.folder = folder, .prefix = prefixes[i], .match = match, .arg = arg};
        int r = offload_blocking_co(search_folder, &s);
        if (r < 0 && i == 0)
            return err_errno(e, -r, "looking for the image below in '%s'", folder);
        if (s.found[1]) {
            err_set(e, EINVAL, "both '%s' and '%s' could be the image below", s.found[0],
                    s.found[1]);
            err_hint(e, "name the right one: backing.file.filename=FILE");
            free(s.found[0]);
            free(s.found[1]);
            return -EINVAL;
        }
        *name = s.found[0];
    }
    return 0;
}
