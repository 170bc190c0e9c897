/* SPDX-License-Identifier: MIT */
/*
 * Text that users and images give: options, JSON, sizes, names.
 *
 * The first byte chooses the parser, the rest is the text (to its first zero byte).
 *
 * Invariants: a failed parse leaves nothing behind and has a message of one safe line; a filled
 * struct can be copied and freed; printing a size and parsing it again gives about the same size;
 * what strbuf_put_safe lets through cannot drive a terminal.
 */
#include "fuzz.h"

#include "base/opt.h"
#include "base/size.h"
#include "base/strbuf.h"

static void check_err(int r, const struct err *e) {
    FUZZ_CHECK(r <= 0, "a parser returned %d", r);
    if (!r)
        return;
    FUZZ_CHECK(e->code == -r, "returned %d with error %d '%s'", r, e->code, err_text(e));
    for (const char *s = e->text; *s; s++)
        FUZZ_CHECK((unsigned char)*s >= ' ' && *s != 0x7f, "control character in: %s", e->text);
}

static void fill_every_table(const json_t *tree) {
    for (const struct driver *const *d = driver_table; *d; d++)
        for (int create = 0; create < 2; create++) {
            const struct opt *rows = create ? (*d)->create_opts : (*d)->opts;
            size_t size = create ? (*d)->create_opts_size : (*d)->opts_size;
            struct err e AUTO_ERR = ERR_INIT;
            if (!rows)
                continue;
            void *filled AUTO_FREE = xcalloc(1, size), *copy AUTO_FREE = xcalloc(1, size);
            int r = opt_fill(rows, tree, create ? OPT_CREATE : OPT_OPEN, NULL, filled, &e);
            check_err(r, &e);
            if (r)
                continue;
            opt_copy(rows, size, filled, copy);
            opt_free(rows, filled);
            opt_free(rows, copy);
        }
}

static void keyval(const char *text, const char *implied) {
    struct err e AUTO_ERR = ERR_INIT;
    json_t *tree = NULL;
    int r = opt_parse_keyval(text, implied, &tree, &e);
    check_err(r, &e);
    FUZZ_CHECK(!r == !!tree, "a tree came out of a failed parse, or none of a good one");
    if (!r && !opt_parse_keyval("size=1M,a.b=c", NULL, &tree, NULL))
        fill_every_table(tree);
    json_decref(tree);
}

static void json(const char *text) {
    struct err e AUTO_ERR = ERR_INIT;
    json_t *tree = NULL;
    int r = opt_parse_json(text, &tree, &e);
    check_err(r, &e);
    if (!r)
        fill_every_table(tree);
    json_decref(tree);
}

static void size(const char *text) {
    struct err e AUTO_ERR = ERR_INIT;
    uint64_t v = 0;
    char human[32];
    int r = size_parse(text, "size", &v, &e);
    check_err(r, &e);
    if (r)
        return;
    FUZZ_CHECK(v <= INT64_MAX, "%" PRIu64 " is above the limit", v);
    FUZZ_CHECK(strlen(size_human(v, human)) < sizeof(human), "no end in the human form");
}

static void safe(const char *text, size_t len) {
    AUTO_STRBUF struct strbuf b = STRBUF_INIT;
    strbuf_put_safe(&b, text, len);
    for (size_t i = 0; i < b.len; i++)
        FUZZ_CHECK((unsigned char)b.s[i] >= ' ' && b.s[i] != 0x7f, "a control character came out");
    /* What came out is UTF-8 (jansson refuses anything else), and C1 controls are not in it. */
    json_t *j = json_stringn(b.s ? b.s : "", b.len);
    FUZZ_CHECK(j != NULL, "what came out is not UTF-8");
    json_decref(j);
    for (size_t i = 0; i + 1 < b.len; i++)
        FUZZ_CHECK((uint8_t)b.s[i] != 0xc2 || (uint8_t)b.s[i + 1] >= 0xa0, "a C1 control came out");
}

static void resolve(const char *text) {
    struct err e AUTO_ERR = ERR_INIT;
    const char *claimed = strchr(text, '|');
    char *image AUTO_FREE = claimed ? xstrndup(text, (size_t)(claimed - text)) : xstrdup("a.qcow2");
    char *out AUTO_FREE = backing_resolve(image, claimed ? claimed + 1 : text, &e);
    FUZZ_CHECK(out || e.code, "no name and no error");
}

/* Opening by a tree that a user wrote: only drivers that touch nothing outside. */
static void open_co(void *arg) {
    struct err e AUTO_ERR = ERR_INIT;
    json_t *tree = NULL;
    struct node *n = NULL;
    const char *text = arg;
    if (strstr(text, "file") || strchr(text, 0x5c) || opt_parse_json(text, &tree, NULL) < 0)
        return;
    struct open_req req = {.options = tree};
    int r = strstr(text, "latency") ? -1 : node_open_co(&req, &n, &e);
    if (r == 0)
        node_unref_co(n);
    json_decref(tree);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
    if (!len)
        return 0;
    char *text AUTO_FREE = xstrndup((const char *)data + 1, len - 1);
    switch (data[0] % 7) {
    case 0:
        keyval(text, NULL);
        break;
    case 1:
        keyval(text, "driver");
        break;
    case 2:
        json(text);
        break;
    case 3:
        size(text);
        break;
    case 4:
        safe((const char *)data + 1, len - 1);
        break;
    case 5:
        resolve(text);
        break;
    default:
        fuzz_run(open_co, text);
    }
    return 0;
}
