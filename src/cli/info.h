/* SPDX-License-Identifier: MIT */
/* Parts of `info`: the files below an image, and what is wrong with it. */
#ifndef STRATA_CLI_INFO_H
#define STRATA_CLI_INFO_H

#include <jansson.h>

struct node;

/* The "children" of newer qemu-img: the storage of the image; NULL when it has none. */
json_t *info_children(struct node *n);
/* The same for people, only under the drop-in name. */
void info_print_children(struct node *n);

/*
 * Sentences about what is wrong: those of the driver (taken over), and what can be seen of the file
 * that the image names as its backing file without opening it.  NULL when there are none.
 */
json_t *info_problems(const struct node *n, json_t *from_driver);
void info_print_problems(const json_t *problems);

/* "format-specific" of a node, new reference, and whose it is; NULL: none. */
json_t *info_specifics(struct node *n, const char **type);

#endif
