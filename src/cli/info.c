/* SPDX-License-Identifier: MIT */
/* See info.h. */
#include "cli/info.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include "base/ck.h"
#include "base/size.h"
#include "base/strbuf.h"
#include "cli/cli.h"
#include "cli/dialect.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"

/* ---------------------------------------------------------------- specifics */

/* What that program does not tell of a VMDK. */
static void drop_ours(const struct node *n, json_t *data) {
    static const char *const ours[] = {"version", "zeroed-grain",  "redundant-tables",
                                       "footer",  "disk-database", "extents-in-all",
                                       NULL};
    for (int i = 0; !strcmp(n->drv->name, "vmdk") && ours[i]; i++)
        json_object_del(data, ours[i]);
}

json_t *info_specifics(struct node *n, const char **type) {
    *type = n->drv->name;
    if (n->drv->format && n->drv->format->describe) {
        json_t *data = n->drv->format->describe(n);
        if (dialect_is_qemu())
            drop_ours(n, data);
        return data;
    }
    /* A raw disk has nothing to tell but what lies below it. */
    if (n->drv->format && n->file && !strcmp(n->drv->name, "raw"))
        n = n->file;
    if (!n->drv->storage || !n->drv->storage->describe || dialect_is_qemu())
        return NULL;
    *type = n->drv->name;
    return n->drv->storage->describe(n);
}

/* ---------------------------------------------------------------- children */

static json_t *describe_storage(struct node *n) {
    json_t *j = json_object();
    json_object_set_new(j, "children", json_array());
    json_object_set_new(j, "virtual-size", json_integer((json_int_t)align_up(n->size, 512)));
    json_object_set_new(j, "filename", cli_json_name(n->filename));
    json_object_set_new(j, "format", json_string(n->drv->name));
    int64_t allocated = disk_allocated(n);
    if (allocated >= 0)
        json_object_set_new(j, "actual-size", json_integer(allocated));
    json_object_set_new(j, "format-specific",
                        json_pack("{s:s, s:{}}", "type", n->drv->name, "data"));
    json_object_set_new(j, "dirty-flag", json_false());
    return j;
}

json_t *info_children(struct node *n) {
    if (!n->file)
        return NULL;
    return json_pack("[{s:s, s:o}]", "name", "file", "info", describe_storage(n->file));
}

void info_print_children(struct node *n) {
    char human[32];
    if (!n->file || !dialect_is_qemu())
        return;
    uint64_t length = align_up(n->file->size, 512);
    int64_t allocated = disk_allocated(n->file);
    char *name AUTO_FREE = cli_safe(n->file->filename);
    printf("Child node '/file':\n    filename: %s\n    protocol type: %s\n", name,
           n->file->drv->name);
    printf("    file length: %s (%" PRIu64 " bytes)\n", size_human(length, human), length);
    if (allocated >= 0)
        printf("    disk size: %s\n", size_human((uint64_t)allocated, human));
    else
        puts("    disk size: unavailable");
}

/* ---------------------------------------------------------------- problems */

static void put(json_t *list, char *text) {
    json_array_append_new(list, cli_json_name(text));
    free(text);
}

/* Nothing is opened: only the directory entry is asked for. */
static void look_for_backing(const struct node *n, json_t *list) {
    struct stat st;
    if (!n->backing_name)
        return;
    char *full AUTO_FREE = backing_resolve(n->filename, n->backing_name, NULL);
    if (!full) {
        put(list, xasprintf("its backing file '%s' cannot be found from where the image is",
                            n->backing_name));
        return;
    }
    const char *path = strncmp(full, "file:", 5) ? full : full + 5;
    if (path == full && name_has_protocol(full))
        return;
    if (stat(path, &st) < 0 && (errno == ENOENT || errno == ENOTDIR))
        put(list, xasprintf("its backing file is missing: %s", path));
}

json_t *info_problems(const struct node *n, json_t *from_driver) {
    json_t *list = from_driver ? from_driver : json_array();
    if (!n->backing)
        look_for_backing(n, list);
    if (json_array_size(list))
        return list;
    json_decref(list);
    return NULL;
}

void info_print_problems(const json_t *problems) {
    size_t i;
    json_t *text;
    if (!json_array_size(problems))
        return;
    puts("Problems:");
    json_array_foreach(problems, i, text) {
        char *safe AUTO_FREE = cli_safe(json_string_value(text));
        printf("    %s\n", safe);
    }
}
