/* SPDX-License-Identifier: MIT */
/*
 * Named objects of the command line (--object TYPE,id=ID,key=value...): credentials and secrets
 * that options of disks and servers refer to by their id.
 *
 * Kept for the life of the process.  Not synchronised: added while options are parsed, before
 * threads exist; read afterwards.
 */
#ifndef STRATA_BASE_OBJECT_H
#define STRATA_BASE_OBJECT_H

#include <jansson.h>

struct err;

/* "TYPE,id=ID,..." or "qom-type=TYPE,...".  -EINVAL, -EEXIST. */
int object_add(const char *definition, struct err *e);
/* The option tree of the object, "qom-type" and "id" included; NULL: there is none. */
const json_t *object_find(const char *id);
/* A text of it; NULL: not given. */
const char *object_text(const json_t *object, const char *key);

#endif
