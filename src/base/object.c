/* SPDX-License-Identifier: MIT */
/* Named objects of the command line.  See object.h. */
#include "base/object.h"

#include <errno.h>
#include <string.h>
#include "base/err.h"
#include "base/opt.h"

#define OBJECTS_MAX 256

static json_t *objects; /* id: tree */

const char *object_text(const json_t *object, const char *key) {
    return json_string_value(json_object_get(object, key));
}

const json_t *object_find(const char *id) {
    return json_object_get(objects, id);
}

int object_add(const char *definition, struct err *e) {
    json_t *tree = NULL;
    int r = opt_parse_keyval(definition, "qom-type", &tree, e);
    if (r < 0)
        return r;
    const char *type = object_text(tree, "qom-type"), *id = object_text(tree, "id");
    if (!type || !id || !*id)
        r = err_set(e, EINVAL, "Parameter '%s' is missing", type ? "id" : "qom-type");
    else if (object_find(id))
        r = err_set(e, EEXIST,
                    "attempt to add duplicate property '%s' to object (type 'container')", id);
    else if (json_object_size(objects) >= OBJECTS_MAX)
        r = err_set(e, EFBIG, "more than %d objects", OBJECTS_MAX);
    if (r == 0 && !objects)
        objects = json_object();
    if (r == 0 && json_object_set(objects, id, tree) < 0)
        r = err_set(e, EINVAL, "the id of an object is not text");
    json_decref(tree);
    return r;
}
