/* SPDX-License-Identifier: MIT */
/* The one table of drivers.  A new driver is one declaration and one line. */
#include <string.h>

#include "disk/driver.h"

extern const struct driver driver_file, driver_host_device, driver_memory, driver_null_co,
    driver_null_aio, driver_nbd, driver_raw, driver_qcow2, driver_vdi;

const struct driver *const driver_table[] = {
    &driver_raw,    &driver_qcow2,   &driver_vdi,      &driver_file, &driver_host_device,
    &driver_memory, &driver_null_co, &driver_null_aio, &driver_nbd,  NULL,
};

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
