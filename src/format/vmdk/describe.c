/* SPDX-License-Identifier: MIT */
/* VMDK: what `info` shows.  The first four keys, and those of extents, are qemu-img's. */
#include <string.h>

#include "format/vmdk/vmdk.h"

#define EXTENTS_SHOWN 4096u

static void put_text(json_t *o, const char *key, const char *text) {
    AUTO_STRBUF struct strbuf b = STRBUF_INIT;
    strbuf_put_safe(&b, text, strlen(text));
    json_object_set_new(o, key, json_string(b.s ? b.s : ""));
}

static json_t *describe_extent(const struct vmdk *s, const struct vmdk_extent *x) {
    static const char *const accesses[] = {"RW", "RDONLY", "NOACCESS"};
    json_t *o = json_object();
    if (x->map && x->map->coded)
        json_object_set_new(o, "compressed", json_true());
    json_object_set_new(o, "virtual-size", json_integer((json_int_t)x->length));
    if (x->name)
        put_text(o, "filename",
                 s->embedded ? s->node->filename
                 : x->file   ? x->file->filename
                             : x->name);
    if (x->map)
        json_object_set_new(o, "cluster-size", json_integer(x->map->grain_bytes));
    json_object_set_new(o, "format", json_string(s->embedded ? "" : vmdk_type_names[x->type]));
    if (x->access != VMDK_RW)
        json_object_set_new(o, "access", json_string(accesses[x->access]));
    if (x->offset)
        json_object_set_new(o, "offset", json_integer((json_int_t)x->offset));
    return o;
}

static void describe_header(json_t *o, const struct vmdk_map *m) {
    const struct vmdk_header *h = &m->h;
    json_object_set_new(o, "version", json_integer(h->version));
    json_object_set_new(o, "zeroed-grain", json_boolean(m->zeroed));
    json_object_set_new(o, "redundant-tables", json_boolean(m->rgd != 0));
    if (m->coded)
        json_object_set_new(o, "footer", json_boolean(h->gd == VMDK_GD_AT_END));
    if (h->unclean)
        json_object_set_new(o, "dirty-flag", json_true());
}

json_t *vmdk_describe(struct node *n) {
    const struct vmdk *s = vmdk_of(n);
    json_t *o = json_object(), *extents = json_array();
    json_object_set_new(o, "cid", json_integer(s->d.cid));
    json_object_set_new(o, "parent-cid", json_integer(s->d.parent_cid));
    put_text(o, "create-type", s->d.create_type);
    for (size_t i = 0; i < s->d.count && i < EXTENTS_SHOWN; i++)
        json_array_append_new(extents, describe_extent(s, &s->d.extents[i]));
    json_object_set_new(o, "extents", extents);
    if (s->d.count > EXTENTS_SHOWN)
        json_object_set_new(o, "extents-in-all", json_integer((json_int_t)s->d.count));
    if (s->d.count && s->d.extents[0].map && s->d.extents[0].map->type == VMDK_SPARSE)
        describe_header(o, s->d.extents[0].map);
    if (json_object_size(s->d.ddb))
        json_object_set(o, "disk-database", s->d.ddb);
    return o;
}
