/* SPDX-License-Identifier: MIT */
#include "export/fuse/lib.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include "base/err.h"
#include "base/log.h"

static struct fuse_lib lib;
static const char *missing; /* what was not found; NULL: all there */
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* What the library has to say goes where our own messages go. */
static void heard(enum fuse_log_level level, const char *fmt, va_list ap) {
    char line[256];
    vsnprintf(line, sizeof(line), fmt, ap);
    line[strcspn(line, "\n")] = 0;
    log_msg(level <= FUSE_LOG_WARNING ? LOG_LV_WARN : LOG_LV_DEBUG, "%s", line);
}

static void load(void) {
    void *so = dlopen("libfuse3.so.3", RTLD_NOW | RTLD_LOCAL);
    if (!so) {
        missing = "libfuse3.so.3";
        return;
    }
#define X(name)                                                                                    \
    *(void **)&lib.name = dlsym(so, "fuse_" #name);                                                \
    if (!lib.name)                                                                                 \
        missing = "fuse_" #name;
    FUSE_LIB_FUNCTIONS(X)
#undef X
    if (!missing)
        lib.set_log_func(heard);
}

const struct fuse_lib *fuse_lib_get(struct err *e) {
    pthread_once(&once, load);
    if (!missing)
        return &lib;
    err_set(e, ENOTSUP, "mounting needs the library libfuse3, of which '%s' was not found",
            missing);
    err_hint(e, "install the packages libfuse3-3 and fuse3");
    return NULL;
}
