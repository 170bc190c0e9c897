/* SPDX-License-Identifier: MIT */
/* Names of events, and who listens. */
#include "disk/event.h"

#include <string.h>

static const char *const event_names[] = {
#define X(name) #name,
    DISK_EVENTS(X)
#undef X
};
_Static_assert(sizeof(event_names) / sizeof(event_names[0]) == EVENTS_N, "one name an event");

enum disk_event disk_event_named(const char *name) {
    int i = 0;
    while (i < EVENTS_N && strcmp(event_names[i], name))
        i++;
    return (enum disk_event)i;
}

struct node *disk_debug_node(struct node *n) {
    while (n && !n->drv->debug)
        n = n->file;
    return n;
}
