/* SPDX-License-Identifier: MIT */
/* The one table of drivers.  A new driver is one line. */
#include <string.h>

#include "disk/driver.h"

/* One a line, in the order of probing and of the tables that users see. */
#define DRIVERS(X)                                                                                 \
    X(raw)                                                                                         \
    X(qcow2)                                                                                       \
    X(vdi)                                                                                         \
    X(vpc)                                                                                         \
    X(vhdx)                                                                                        \
    X(bochs)                                                                                       \
    X(cloop)                                                                                       \
    X(dmg)                                                                                         \
    X(qcow)                                                                                        \
    X(parallels)                                                                                   \
    X(qed)                                                                                         \
    X(vmdk)                                                                                        \
    X(file)                                                                                        \
    X(host_device)                                                                                 \
    X(host_cdrom)                                                                                  \
    X(memory)                                                                                      \
    X(vvfat)                                                                                       \
    X(nbd)                                                                                         \
    X(null_co)                                                                                     \
    X(null_aio)                                                                                    \
    X(blkdebug)                                                                                    \
    X(copy_on_read)

#define DRIVER_DECLARE(name) extern const struct driver driver_##name;
DRIVERS(DRIVER_DECLARE)
#undef DRIVER_DECLARE

#define DRIVER_ENTRY(name) &driver_##name,
const struct driver *const driver_table[] = {DRIVERS(DRIVER_ENTRY) NULL};
#undef DRIVER_ENTRY

const char *const prealloc_names[] = {"off", "metadata", "falloc", "full", NULL};

const struct driver *driver_find(const char *name) {
    for (const struct driver *const *d = driver_table; *d; d++)
        if (!strcmp((*d)->name, name))
            return *d;
    return NULL;
}

const struct driver *driver_for_prefix(const char *file_name) {
    for (const struct driver *const *d = driver_table; *d; d++)
        for (const char *const *p = (*d)->prefixes; p && *p; p++)
            if (!strncmp(file_name, *p, strlen(*p)))
                return *d;
    return NULL;
}
