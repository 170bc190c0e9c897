/* SPDX-License-Identifier: MIT */
/*
 * The tables of -o options, and the refusals of amend, in qemu-img's words.
 *
 * Its tables are sorted by name, and say the type of a value in their own way; the sentences are
 * what that program prints (versions 7.2 to 10).  A key that is not listed here is one of ours, and
 * is not shown.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include "base/err.h"
#include "base/opt.h"
#include "base/strbuf.h"
#include "cli/dialect.h"
#include "disk/driver.h"

#define SECOND "\001"

/* ---------------------------------------------------------------- tables */

/* `format`: what only that one says of the key; those rows stand before the one for all. */
struct row {
    const char *key, *type, *help, *format;
};
#define STR "str"
#define BOOL "bool (on/off)"
#define SIZE "size"
#define NUM "num"
static const struct row rows[] = {
    {"adapter_type", STR,
     "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX"},
    {"backing_file", STR, "File name of a base image"},
    {"backing_fmt", STR, "Format of the backing image", "qcow"},
    {"backing_fmt", STR, "Must be 'vmdk' if present", "vmdk"},
    {"backing_fmt", STR, "Image format of the base image"},
    {"block_size", SIZE,
     "Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size."},
    {"block_state_zero", BOOL,
     "Force use of payload blocks of type 'ZERO'. Non-standard, but default.  Do not set to 'off' "
     "when using 'qemu-img convert' with subformat=dynamic."},
    {"cluster_size", SIZE, "Cluster size (in bytes)", "qed"},
    {"cluster_size", SIZE, "Parallels image cluster size", "parallels"},
    {"cluster_size", SIZE, "qcow2 cluster size"},
    {"compat", STR, "Compatibility level (v2 [0.10] or v3 [1.1])"},
    {"compat6", BOOL, "VMDK version 6 image"},
    {"compression_type", STR, "Compression method used for image cluster compression"},
    {"data_file", STR, "File name of an external data file"},
    {"data_file_raw", BOOL, "The external data file must stay valid as a raw image"},
    {"encrypt.cipher-alg", STR, "Name of encryption cipher algorithm"},
    {"encrypt.cipher-mode", STR, "Name of encryption cipher mode"},
    {"encrypt.format", STR, "Encrypt the image, format choices: 'aes', 'luks'"},
    {"encrypt.hash-alg", STR, "Name of encryption hash algorithm"},
    {"encrypt.iter-time", NUM, "Time to spend in PBKDF in milliseconds"},
    {"encrypt.ivgen-alg", STR, "Name of IV generator algorithm"},
    {"encrypt.ivgen-hash-alg", STR, "Name of IV generator hash algorithm"},
    {"encrypt.key-secret", STR, "ID of secret providing qcow AES key or LUKS passphrase"},
    {"encrypt.keyslot", NUM, "Select a single keyslot to modify explicitly"},
    {"encrypt.new-secret", STR,
     "New secret to set in the matching keyslots. Empty string to erase"},
    {"encrypt.old-secret", STR, "Select all keyslots that match this password"},
    {"encrypt.state", STR, "Select new state of affected keyslots (active/inactive)"},
    {"encryption", BOOL,
     "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)"},
    {"extended_l2", BOOL, "Extended L2 tables"},
    {"extent_size_hint", SIZE, "Extent size hint for the image file, 0 to disable"},
    {"force_size", BOOL,
     "Force disk size calculation to use the actual size specified, rather than using the nearest "
     "CHS-based calculation"},
    {"hwversion", STR, "VMDK hardware version"},
    {"lazy_refcounts", BOOL, "Postpone refcount updates"},
    {"log_size", SIZE, "Log size; min 1MB."},
    {"nocow", BOOL, "Turn off copy-on-write (valid only on btrfs)"},
    {"preallocation", STR, "Preallocation mode (allowed values: off, metadata, falloc, full)"},
    {"refcount_bits", NUM, "Width of a reference count entry in bits"},
    {"size", SIZE, "Virtual disk size; max of 64TB.", "vhdx"},
    {"size", SIZE, "Virtual disk size"},
    {"static", BOOL, "VDI static (pre-allocated) image"},
    {"subformat", STR,
     "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ", "vpc"},
    {"subformat", STR,
     "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | "
     "twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized} ",
     "vmdk"},
    {"subformat", STR,
     "VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'.", "vhdx"},
    {"table_size", SIZE, "L1/L2 table size (in clusters)"},
    {"toolsversion", STR, "VMware guest tools version"},
    {"zeroed_grain", BOOL, "Enable efficient zero writes using the zeroed-grain GTE feature"},
    {NULL, NULL, NULL, NULL},
};

static bool has_row(const struct opt *table, unsigned when, const char *key) {
    for (const struct opt *o = table; o && o->name; o++)
        if (o->when & when && !strcmp(o->name, key))
            return true;
    return false;
}

/* A key that the format has only here. */
static bool is_own_key(const char *format, const char *key) {
    if (!strcmp(format, "vdi") && strcmp(key, "size") && strcmp(key, "static"))
        return true;
    if ((!strcmp(format, "vpc") || !strcmp(format, "vhdx")) && !strncmp(key, "backing_", 8))
        return true;
    return !strcmp(key, "preallocation") && strcmp(format, "qcow2") && strcmp(format, "raw");
}

bool dialect_option_help(const struct driver *d, unsigned when, bool file) {
    static const char *const of_files[] = {"extent_size_hint", "nocow", "preallocation", NULL};
    const struct opt *table = when == OPT_AMEND ? d->amend_opts : d->create_opts;
    if (!dialect_is_qemu())
        return false;
    bool raw = !strcmp(d->name, "raw"), qcow2 = !strcmp(d->name, "qcow2");
    const char *said = "";
    for (const struct row *r = rows; r->key; r++) {
        bool shown = has_row(table, when, r->key) && !is_own_key(d->name, r->key);
        if (r->format ? strcmp(r->format, d->name) != 0 : !strcmp(said, r->key))
            continue;
        said = r->key;
        /* Of raw images it is the file that knows these. */
        for (int i = 0; of_files[i]; i++)
            if (!strcmp(of_files[i], r->key))
                shown = file || (shown && !raw);
        const char *help = r->help;
        if (!qcow2 && !strcmp(r->key, "preallocation"))
            help = "Preallocation mode (allowed values: off, falloc, full)";
        struct strbuf b AUTO_STRBUF = STRBUF_INIT;
        strbuf_printf(&b, "  %s=<%s>", r->key, r->type);
        if (shown)
            printf("%-24s - %s\n", b.s, help);
    }
    return true;
}

bool dialect_option_list_ok(struct verb_ctx *ctx, const char *text) {
    size_t len = strlen(text), commas = 0;
    if (!dialect_is_qemu())
        return true;
    while (commas < len && text[len - 1 - commas] == ',')
        commas++;
    /* Commas in pairs are literal ones. */
    if (len && commas % 2 == 0 && (text[0] != ',' || text[1] == ','))
        return true;
    char *safe AUTO_FREE = cli_safe(text);
    err_set(&ctx->err, EINVAL, "Invalid option list: %s", safe);
    return false;
}

/* ---------------------------------------------------------------- whole sentences */

#define V3_ONLY(what) what " only supported with compatibility level 1.1 and above (use "
/* What stands in our sentence, and all of theirs.  `verb` NULL: any; the first that fits counts. */
static const struct {
    const char *verb, *mark, *text;
} sentences[] = {
    {"measure", "needs compat=1.1: version 2 images have 16 bits",
     "Different refcount widths than 16 bits require compatibility level 1.1 or above (use "
     "compat=1.1 or greater)"},
    {NULL, "needs compat=1.1: version 2 images have 16 bits",
     "Different refcount widths than 16 bits require compatibility level 1.1 or above (use "
     "version=v3 or greater)"},
    {NULL, "lazy_refcounts=on needs compat=1.1",
     V3_ONLY("Lazy refcounts") "version=v3 or greater)"},
    {NULL, "compression_type=zstd needs compat=1.1",
     V3_ONLY("Non-zlib compression type is") "version=v3 or greater)"},
    {NULL, "extended_l2=on needs compat=1.1",
     V3_ONLY("Extended L2 entries are") "version=v3 or greater)"},
    {NULL, "extended_l2=on needs clusters of at least",
     "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"},
    {NULL, "data_file_raw=on needs data_file", "data-file-raw requires data-file"},
    {NULL, "data_file needs compat=1.1",
     V3_ONLY("External data files are") "version=v3 or greater)"},
    {NULL, "data_file_raw=on and a backing file exclude",
     "Backing file and data-file-raw cannot be used at the same time"},
    {"create", "would hide the backing file: use preallocation=off",
     "Backing file and preallocation can only be used at the same time if extended_l2 is on"},
    {NULL, "option 'refcount_bits': ",
     "Refcount width must be a power of two and may not exceed 64 bits"},
    {"resize", "needs an L1 table of", "Failed to grow the L1 table: File too large"},
    {"amend", "needs an L1 table of", "Failed to grow the L1 table: File too large"},
    {"measure", "needs an L1 table of",
     "The image size is too large (try using a larger cluster size)"},
    {NULL, "needs an L1 table of",
     "The image size is too large for file format 'qcow2' (try using a larger cluster size)"},
    {NULL, "SIZE and -o size=... say the same", "The image size must be specified only once"},
    {NULL, "preallocation=metadata does not apply to", "Unsupported preallocation mode: metadata"},
    {"resize", "' cannot change its size", "Image format driver does not support resize"},
    {"resize", "a QED image cannot shrink", "Shrinking images is currently not supported"},
    {"resize", " image cannot shrink; convert it", "Image format driver does not support resize"},
    {"convert", " cannot hold compressed data", "Compression not supported for this file format"},
    {NULL, "a version 2 image with internal snapshots cannot change its size",
     "Can't resize a v2 image which has snapshots"},
    {"convert", ", too few for the ", "output file is smaller than input file"},
    {NULL, "-f and --image-opts exclude each other",
     "--image-opts and --format are mutually exclusive"},
    {NULL, NULL, NULL},
};

const char *dialect_sentence(const struct verb *v, const char *text) {
    if (!dialect_is_qemu() || strstr(text, "expected a number"))
        return NULL;
    for (int i = 0; sentences[i].mark; i++)
        if (strstr(text, sentences[i].mark) &&
            (!sentences[i].verb || (v && !strcmp(v->name, sentences[i].verb))))
            return sentences[i].text;
    return NULL;
}

/* ---------------------------------------------------------------- amend */

/* Ours begins or goes on with `mark`; theirs. */
static const struct {
    const char *mark, *text, *second;
} refusals[] = {
    {"the backing file of an image is not changed", "Cannot amend the backing file",
     SECOND "You can use 'qemu-img rebase' instead."},
    {"options of encryption", "Can't amend encryption options - encryption not present", NULL},
    {"data_file: the image has no",
     "data-file can only be set for images that use an external data file", NULL},
    {"data_file_raw cannot be switched on", "data-file-raw cannot be set on existing images", NULL},
    {"version 2 has 16 bits",
     "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 "
     "or greater)",
     NULL},
    {"compat=0.10 needs refcount_bits=16", "compat=0.10 requires refcount_bits=16", NULL},
    {"lazy_refcounts=on needs",
     "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or "
     "greater)",
     NULL},
    {"which version 2 cannot hold", "Internal snapshots prevent downgrade of image", NULL},
    {"version 2 has no external data file", "Cannot downgrade an image with a data file", NULL},
    {"version 2 has no zstd",
     "Cannot downgrade an image with zstd compression type and existing compressed clusters", NULL},
    {"option 'refcount_bits': ", "Refcount width must be a power of two and may not exceed 64 bits",
     NULL},
    {NULL, NULL, NULL},
};

static char *with_numbers(const char *text) {
    unsigned bits;
    uint64_t offset, count, features;
    if (sscanf(text,
               "refcount_bits=%u is too few: the cluster at offset %" SCNu64
               " has a reference count of %" SCNu64,
               &bits, &offset, &count) == 3)
        return xasprintf("Cannot decrease refcount entry width to %u bits: Cluster at offset "
                         "0x%" PRIx64 " has a refcount of %" PRIu64,
                         bits, offset, count);
    if (sscanf(text, "version 2 cannot hold the image's incompatible features 0x%" SCNx64,
               &features) == 1)
        return xasprintf("Cannot downgrade an image with incompatible features 0x%" PRIx64 " set",
                         features);
    return NULL;
}

static int put(struct verb_ctx *ctx, const char *text, const char *second) {
    int code = ctx->err.code;
    char *copy AUTO_FREE = xstrdup(text);
    err_clear(&ctx->err);
    int rc = err_set(&ctx->err, code, "%s", copy);
    if (second)
        err_hint(&ctx->err, "%s", second);
    return rc;
}

void dialect_amend_error(struct verb_ctx *ctx, const struct driver *d, const json_t *tree) {
    char *text AUTO_FREE = xstrdup(err_text(&ctx->err));
    const char *compat = json_string_value(json_object_get(tree, "compat"));
    const char *unknown = strstr(text, "unknown option '");
    char *numbers AUTO_FREE = with_numbers(text);
    if (numbers) {
        put(ctx, numbers, NULL);
        return;
    }
    if (compat && strstr(text, "option 'compat'")) {
        char *words AUTO_FREE = xasprintf("Unknown compatibility level %s", compat);
        put(ctx, words, NULL);
        return;
    }
    if (unknown) {
        const char *at = strchr(unknown, '\'') + 1;
        char *key AUTO_FREE = xstrndup(at, strcspn(at, "'"));
        char *words AUTO_FREE = xasprintf("Invalid parameter '%s'", key);
        put(ctx, words,
            has_row(d->create_opts, OPT_CREATE, key) ? SECOND
                "This option is only supported for image creation"
                                                     : NULL);
        return;
    }
    bool number = strstr(text, "expected a number") != NULL;
    for (int i = 0; refusals[i].mark && !number; i++)
        if (strstr(text, refusals[i].mark)) {
            put(ctx, refusals[i].text, refusals[i].second);
            return;
        }
    if (strstr(text, "option 'size': ") && strstr(text, "is larger than"))
        put(ctx, "Image size cannot be negative", NULL);
    else
        dialect_options_error(ctx);
}
