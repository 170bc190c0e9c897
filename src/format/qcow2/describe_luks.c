/* SPDX-License-Identifier: MIT */
/*
 * The LUKS header inside an encrypted image, described; nothing of it is a secret.
 *
 *      0 magic  6 version  8 cipher  40 mode  72 hash  104 payload offset  108 key bytes
 *      164 iterations of the digest  168 uuid  208 eight key slots of 48 bytes
 *
 * Source: the public LUKS on-disk format specification, version 1.  Keys and types as in
 * qemu-img info.
 */
#include <ctype.h>
#include <stdio.h>
#include <string.h>

#include "base/bytes.h"
#include "base/strbuf.h"
#include "format/qcow2/qcow2.h"

enum {
    L_VERSION = 6,
    L_CIPHER = 8,
    L_MODE = 40,
    L_HASH = 72,
    L_PAYLOAD = 104,
    L_KEY_BYTES = 108,
    L_ITERATIONS = 164,
    L_UUID = 168,
    L_SLOTS = 208,
    L_SLOT = 48,
    SECTOR = 512,
};
#define SLOT_ACTIVE 0x00ac71f3u

/* A field of text, as far as it is text. */
static void take(const uint8_t *p, size_t max, char *out) {
    size_t n = 0;
    while (n < max && p[n] && isprint(p[n])) {
        out[n] = (char)p[n];
        n++;
    }
    out[n] = 0;
}

static json_t *describe_slot(const uint8_t *p) {
    json_t *o = json_object();
    bool active = be32_load(p) == SLOT_ACTIVE;
    json_object_set_new(o, "active", json_boolean(active));
    if (active)
        json_object_set_new(o, "iters", json_integer(be32_load(p + 4)));
    json_object_set_new(o, "key-offset", json_integer((json_int_t)be32_load(p + 40) * SECTOR));
    if (active)
        json_object_set_new(o, "stripes", json_integer(be32_load(p + 44)));
    return o;
}

/* "xts-plain64", "cbc-essiv:sha256": mode, generator, and its hash. */
static void put_mode(json_t *o, char *mode) {
    char *generator = strchr(mode, '-'), *hash = generator ? strchr(generator, ':') : NULL;
    if (hash)
        *hash++ = 0;
    if (generator)
        *generator++ = 0;
    if (generator)
        json_object_set_new(o, "ivgen-alg", json_string(generator));
    if (hash)
        json_object_set_new(o, "ivgen-hash-alg", json_string(hash));
}

void qcow2_describe_luks(const uint8_t *p, json_t *o) {
    char cipher[33], mode[33], hash[33], uuid[41], alg[64];
    if (memcmp(p, "LUKS\xba\xbe", 6) || be16_load(p + L_VERSION) != 1) {
        json_object_set_new(o, "format", json_string("luks"));
        return;
    }
    take(p + L_CIPHER, 32, cipher);
    take(p + L_MODE, 32, mode);
    take(p + L_HASH, 32, hash);
    take(p + L_UUID, 40, uuid);
    put_mode(o, mode);
    /* XTS takes two keys. */
    uint32_t bits = be32_load(p + L_KEY_BYTES) * 8 / (strcmp(mode, "xts") ? 1 : 2);
    snprintf(alg, sizeof(alg), "%s-%u", cipher, bits);
    json_object_set_new(o, "hash-alg", json_string(hash));
    json_object_set_new(o, "cipher-alg", json_string(alg));
    json_object_set_new(o, "uuid", json_string(uuid));
    json_object_set_new(o, "format", json_string("luks"));
    json_object_set_new(o, "cipher-mode", json_string(mode));
    json_t *slots = json_array();
    for (unsigned i = 0; i < 8; i++)
        json_array_append_new(slots, describe_slot(p + L_SLOTS + (size_t)i * L_SLOT));
    json_object_set_new(o, "slots", slots);
    json_object_set_new(o, "payload-offset",
                        json_integer((json_int_t)be32_load(p + L_PAYLOAD) * SECTOR));
    json_object_set_new(o, "master-key-iters", json_integer(be32_load(p + L_ITERATIONS)));
}
