/* SPDX-License-Identifier: MIT */
/*
 * VHD: what a new differencing image says about its parent: UUID and time of its footer, its name,
 * and one locator with its path.
 *
 * A relative path is a W2ru locator (".\name"), an absolute one W2ku.  Both are UTF-16LE, as
 * writers do it, and the name in the header is UTF-16BE, as the specification has it.  The child
 * has the size and the geometry of its parent.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "disk/open.h"
#include "format/utf16.h"
#include "format/vpc/vpc.h"

static int look_co(const char *image, const char *name, struct vpc_parent *p, struct err *e) {
    AUTO_FREE char *resolved = backing_resolve(image, name, e);
    if (!resolved)
        return err_status(e);
    struct open_req req = {
        .name = resolved, .format = "vpc", .flags = OPEN_NO_BACKING, .gate = GATE_NONE};
    struct node *parent;
    int r = node_open_co(&req, &parent, e);
    if (r < 0)
        return err_prefix(e, "the parent of a differencing image");
    p->f = vpc_of(parent)->f;
    p->size = parent->size;
    node_unref_co(parent);
    return 0;
}

int vpc_parent_make_co(const char *image, const char *name, struct vpc_parent *p, struct err *e) {
    const char *slash = strrchr(name, '/');
    bool absolute = name[0] == '/';
    AUTO_FREE char *path = xasprintf("%s%s", absolute ? "" : "./", name);
    memset(p, 0, sizeof(*p));
    int r = look_co(image, name, p, e);
    if (r)
        return r;
    memcpy(p->code, absolute ? "W2ku" : "W2ru", 4);
    p->path_bytes = (uint32_t)utf16_from_path(path, false, p->path, sizeof(p->path));
    if (!p->path_bytes ||
        !utf16_from_path(slash ? slash + 1 : name, true, p->name, sizeof(p->name) - 2))
        return err_set(e, EINVAL,
                       "the parent's name is not UTF-8, or its path is longer than %zu units, or "
                       "its last part than 255",
                       sizeof(p->path) / 2);
    return 0;
}

void vpc_parent_store(const struct vpc_parent *p, uint64_t locator_at, uint8_t *header) {
    uint8_t *l = header + VPC_AT_LOCATORS;
    memcpy(header + VPC_AT_PARENT_UUID, p->f.uuid, 16);
    be32_store(header + VPC_AT_PARENT_TIME, p->f.timestamp);
    memcpy(header + VPC_AT_PARENT_NAME, p->name, sizeof(p->name));
    memcpy(l, p->code, 4);
    be32_store(l + 4, (uint32_t)div_up(p->path_bytes, VPC_SECTOR));
    be32_store(l + 8, p->path_bytes);
    be64_store(l + 16, locator_at);
    vpc_set_sum(header, VPC_HEADER_BYTES, VPC_AT_HEADER_SUM);
}
