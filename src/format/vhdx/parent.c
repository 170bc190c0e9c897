/* SPDX-License-Identifier: MIT */
/*
 * VHDX: the parent locator of a differencing image: keys and values in UTF-16.
 *
 * parent_linkage is the GUID that the parent's data had when the image was made; any change of the
 * parent since then gives it another one.  The path is a claim and passes the gate.  Of absolute
 * paths of Windows only the last part can mean something here: a file beside the image.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/cleanup.h"
#include "base/strbuf.h"
#include "disk/io.h"
#include "disk/open.h"
#include "format/utf16.h"
#include "format/vhdx/vhdx.h"

enum { LOCATOR_HEADER = 20, LOCATOR_ENTRY = 12 };
#define LOCATOR_PARTS_MAX 256u

bool vhdx_locator_value(const uint8_t *buf, uint32_t length, const char *key, uint32_t *at,
                        uint32_t *bytes) {
    uint32_t count = (uint32_t)min_u64(le16_load(buf + 18), LOCATOR_PARTS_MAX);
    for (uint32_t i = 0; i < count && LOCATOR_HEADER + (i + 1) * LOCATOR_ENTRY <= length; i++) {
        const uint8_t *p = buf + LOCATOR_HEADER + i * LOCATOR_ENTRY;
        uint32_t key_at = le32_load(p), value_at = le32_load(p + 4);
        uint32_t key_length = le16_load(p + 8), value_length = le16_load(p + 10);
        AUTO_STRBUF struct strbuf name = STRBUF_INIT;
        if (key_at > length || key_length > length - key_at || value_at > length ||
            value_length > length - value_at)
            continue;
        if (!utf16_to_utf8(buf + key_at, key_length, false, &name) || strcmp(name.s, key))
            continue;
        *at = value_at;
        *bytes = value_length;
        return true;
    }
    return false;
}

/* The value of `key`, appended to `out`; false: there is none. */
static bool find_value(const uint8_t *buf, uint32_t length, const char *key, bool path,
                       struct strbuf *out) {
    uint32_t at, bytes;
    if (!vhdx_locator_value(buf, length, key, &at, &bytes))
        return false;
    return path ? utf16_to_path(buf + at, bytes, false, out)
                : utf16_to_utf8(buf + at, bytes, false, out);
}

static bool find_guid(const uint8_t *buf, uint32_t length, const char *key, struct vhdx_guid *g) {
    AUTO_STRBUF struct strbuf text = STRBUF_INIT;
    return find_value(buf, length, key, false, &text) && vhdx_guid_parse(text.s, g);
}

bool vhdx_locator_linkage(const uint8_t *buf, uint32_t length, struct vhdx_guid *g) {
    return find_guid(buf, length, "parent_linkage", g);
}

/* A name that can mean a file here; false: none of the paths can. */
static bool find_path(const uint8_t *buf, uint32_t length, struct strbuf *out) {
    static const char *const keys[] = {"relative_path", "volume_path", "absolute_win32_path"};
    for (int i = 0; i < 3; i++) {
        strbuf_free(out);
        if (!find_value(buf, length, keys[i], true, out))
            continue;
        bool drive = out->len > 2 && out->s[1] == ':';
        if (drive || !strncmp(out->s, "//", 2)) {
            const char *last = strrchr(out->s, '/');
            AUTO_FREE char *bare = xstrdup(last ? last + 1 : out->s + 2);
            strbuf_free(out);
            strbuf_puts(out, bare);
        }
        if (out->len)
            return true;
    }
    return false;
}

static int read_locator_co(struct vhdx *s, struct err *e) {
    const struct vhdx_range *at = &s->m.locator;
    AUTO_STRBUF struct strbuf path = STRBUF_INIT;
    if (!at->length)
        return err_set(e, EINVAL, "a differencing image without a parent locator");
    uint8_t *buf = buf_get(at->length);
    int r = buf ? vhdx_read_co(s, at->offset, buf, at->length) : -ENOMEM;
    if (r < 0) {
        err_errno(e, -r, "reading the parent locator");
    } else if (memcmp(buf, vhdx_locator_guid.b, 16)) {
        r = err_set(e, ENOTSUP, "a parent locator of an unknown kind");
    } else if (!find_guid(buf, (uint32_t)at->length, "parent_linkage", &s->linkage)) {
        r = err_set(e, EINVAL, "the parent locator has no parent_linkage");
    } else {
        find_guid(buf, (uint32_t)at->length, "parent_linkage2", &s->linkage2);
        if (find_path(buf, (uint32_t)at->length, &path)) {
            s->node->backing_name = xstrdup(path.s);
            s->node->backing_format = xstrdup("vhdx");
        }
    }
    buf_put(buf, at->length);
    return r;
}

int vhdx_open_parent_co(struct vhdx *s, struct open_ctx *ctx, struct err *e) {
    struct node *n = s->node;
    char id[37], other[37];
    int r = read_locator_co(s, e);
    if (!r)
        r = node_open_backing_co(n, ctx, e);
    if (r || !node_wants_backing(ctx))
        return r;
    vhdx_guid_text(&s->linkage, id);
    if (!n->backing && !(n->flags & (NODE_CHECK | NODE_LOOK))) {
        err_set(e, ENOTSUP,
                "a differencing image that does not say where its parent (data GUID %s) lies", id);
        err_hint(e, "name it: backing.file.filename=FILE");
        return err_status(e);
    }
    if (n->backing && n->backing->drv == n->drv) {
        const struct vhdx_guid *data = &vhdx_of(n->backing)->h.data_write;
        if (!vhdx_guid_same(data, &s->linkage) &&
            (vhdx_guid_is_null(&s->linkage2) || !vhdx_guid_same(data, &s->linkage2))) {
            vhdx_guid_text(data, other);
            err_set(e, EINVAL,
                    "'%s' has data GUID %s, the parent had %s: it is another image, or has been "
                    "changed since",
                    n->backing->filename, other, id);
            err_hint(e, "if it is the right one after all, as after a commit that was interrupted: "
                        "strata rebase -u -b PARENT -F vhdx IMAGE");
            return -EINVAL;
        }
    }
    return 0;
}

/* ---------------------------------------------------------------- new images */

struct maker {
    uint8_t *buf;
    uint32_t at; /* of the next text */
    uint16_t count;
};

static int add_pair(struct maker *m, const char *key, const char *value) {
    uint8_t *p = m->buf + LOCATOR_HEADER + m->count * LOCATOR_ENTRY;
    size_t a = utf16_from_path(key, false, m->buf + m->at, 1024);
    size_t b = utf16_from_path(value, false, m->buf + m->at + a, 16384);
    if (!a || !b)
        return -EINVAL;
    le32_store(p, m->at);
    le32_store(p + 4, m->at + (uint32_t)a);
    le16_store(p + 8, (uint16_t)a);
    le16_store(p + 10, (uint16_t)b);
    le16_store(m->buf + 18, ++m->count);
    m->at += (uint32_t)(a + b);
    return 0;
}

/* The GUID that the parent's data have now. */
static int parent_guid_co(const char *image, const char *name, struct vhdx_guid *g, struct err *e) {
    AUTO_FREE char *resolved = backing_resolve(image, name, e);
    if (!resolved)
        return err_status(e);
    struct open_req req = {
        .name = resolved, .format = "vhdx", .flags = OPEN_NO_BACKING, .gate = GATE_NONE};
    struct node *parent;
    int r = node_open_co(&req, &parent, e);
    if (r < 0)
        return err_prefix(e, "the parent of a differencing image");
    *g = vhdx_of(parent)->h.data_write;
    node_unref_co(parent);
    return 0;
}

int vhdx_locator_make_co(const char *image, const char *name, uint8_t *buf, uint32_t *bytes,
                         struct err *e) {
    struct maker m = {.buf = buf, .at = LOCATOR_HEADER + 4 * LOCATOR_ENTRY};
    struct vhdx_guid g;
    char id[37], braced[40];
    int r = parent_guid_co(image, name, &g, e);
    if (r < 0)
        return r;
    vhdx_guid_text(&g, id);
    snprintf(braced, sizeof(braced), "{%s}", id);
    bool absolute = name[0] == '/';
    AUTO_FREE char *path = xasprintf("%s%s", absolute ? "" : "./", name);
    memset(buf, 0, VHDX_METADATA_TABLE_BYTES);
    memcpy(buf, vhdx_locator_guid.b, 16);
    r = add_pair(&m, "parent_linkage", braced);
    if (!r)
        r = add_pair(&m, absolute ? "absolute_win32_path" : "relative_path", path);
    *bytes = m.at;
    return r < 0 ? err_set(e, EINVAL, "the parent's name is not UTF-8, or longer than 8191 units")
                 : 0;
}
