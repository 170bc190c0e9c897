/* SPDX-License-Identifier: MIT */
/*
 * What cases are made of: requests that tell the model what they do, and the images that every run
 * begins with.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <jansson.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "faults.h"
#include "job/copy.h"

const char *path(const struct trial *t, const char *name) {
    static char buf[4][600];
    static unsigned next;
    char *p = buf[next++ % 4];
    snprintf(p, sizeof(buf[0]), "%s/trial/%s", t->dir, name);
    return p;
}

/* ---------------------------------------------------------------- what cases are made of */

int open_co(struct trial *t, const char *name, unsigned flags, struct node **out) {
    struct open_req req = {.name = path(t, name), .flags = flags | OPEN_UNMAP, .gate = GATE_ANY};
    const char *dot = strrchr(name, '.');
    req.format = !strcmp(dot, ".img") ? "raw" : dot + 1;
    *out = NULL;
    return node_open_co(&req, out, &t->e);
}

void fill(uint8_t *p, uint64_t count, uint32_t id) {
    for (uint64_t i = 0; i < count * BLOCK; i += 8)
        le64_store(p + i, id);
}

void touch(struct trial *t, uint64_t first, uint64_t count, uint32_t id, bool maybe) {
    for (uint64_t b = first; b < first + count; b++) {
        t->will[b] = id;
        t->maybe[b] = maybe;
    }
}

int write_co(struct trial *t, struct node *n, uint64_t first, uint64_t count) {
    static uint8_t buf[64 * KIB];
    uint32_t id = ++t->next_id;
    fill(buf, count, id);
    touch(t, first, count, id, false);
    return disk_pwrite_co(n, first * BLOCK, buf, count * BLOCK);
}

int zero_co(struct trial *t, struct node *n, uint64_t first, uint64_t count, unsigned flags) {
    touch(t, first, count, 0, false);
    return disk_zero_co(n, first * BLOCK, count * BLOCK, flags);
}

int discard_co(struct trial *t, struct node *n, uint64_t first, uint64_t count) {
    touch(t, first, count, 0, true);
    return disk_discard_co(n, first * BLOCK, count * BLOCK);
}

int coded_co(struct trial *t, struct node *n, uint64_t first) {
    static uint8_t in[64 * KIB], out[64 * KIB];
    uint64_t count = n->granularity / BLOCK;
    uint32_t id = ++t->next_id;
    fill(in, count, id);
    ssize_t len = n->codec->encode(in, n->granularity, out, n->granularity);
    if (len < 0)
        return (int)len;
    touch(t, first, count, id, false);
    return disk_write_coded_co(n, first * BLOCK, out, (uint32_t)len);
}

int flush_co(struct trial *t, struct node *n) {
    int r = disk_flush_co(n);
    for (uint64_t b = 0; !r && b < BLOCKS; b++)
        if (!t->maybe[b])
            t->was[b] = t->will[b];
    return r;
}

/* Reads all; wrong data without an error is a failure, too. */
int read_co(struct trial *t, struct node *n) {
    static uint8_t buf[SIZE];
    return disk_pread_co(n, 0, buf, min_u64(SIZE, n->size));
}

int create_co(struct trial *t, const char *name, const char *format, const char *text) {
    struct err e AUTO_ERR = ERR_INIT;
    fault_exempt(true);
    json_t *options = json_object();
    must(opt_parse_keyval(text, NULL, &options, &e), &e, "options");
    if (!json_object_get(options, "size"))
        json_object_set_new(options, "size", json_integer(SIZE));
    fault_exempt(false);
    int r = disk_create_co(path(t, name), format, options, CREATE_REPLACE, &t->e);
    json_decref(options);
    return r;
}

/* ---------------------------------------------------------------- the images at the start */

static struct file *load(struct trial *t, const char *name) {
    int i = 0;
    struct stat st;
    while (t->seed[i].name)
        i++;
    int fd = open(path(t, name), O_RDONLY);
    if (fd < 0 || fstat(fd, &st) || i == FILES)
        die(name);
    t->seed[i] = (struct file){name, malloc((size_t)st.st_size), (size_t)st.st_size, false};
    if (read(fd, t->seed[i].bytes, t->seed[i].size) != st.st_size)
        die(name);
    close(fd);
    return &t->seed[i];
}

static void make_filled_co(struct trial *t, const char *name, const char *options, uint32_t id) {
    struct node *n;
    static uint8_t buf[SIZE];
    const char *format = strstr(name, ".img") ? "raw" : strrchr(name, '.') + 1;
    must(create_co(t, name, format, options), &t->e, name);
    must(open_co(t, name, OPEN_RW, &n), &t->e, name);
    for (uint64_t b = 0; b < n->size / BLOCK; b++)
        fill(buf + b * BLOCK, 1, id + (uint32_t)b / 64);
    must(disk_pwrite_co(n, 0, buf, n->size), NULL, name);
    must(disk_flush_co(n), NULL, name);
    node_unref_co(n);
}

/* A child and two parents, all with the same content, as a commit leaves a child and its parent. */
static void make_link_co(struct trial *t, const char *format, const char *options) {
    static const char *const stems[] = {"pa", "pb", "link"};
    for (int i = 0; i < 3; i++) {
        char *name = xasprintf("%s.%s", stems[i], format); /* the seed keeps it */
        char *text =
            i < 2 ? xstrdup(options)
                  : xasprintf("%s,backing_file=pa.%s,backing_fmt=%s", options, format, format);
        make_filled_co(t, name, text, LINK_ID);
        load(t, name)->apart = true;
        free(text);
    }
}

/* Half of the first refcount block is lost. */
static void hurt_co(struct trial *t) {
    uint8_t zeros[256] = {0}, at[8];
    int fd = open(path(t, "hurt.qcow2"), O_RDWR);
    bool ok = pread(fd, at, 8, 48) == 8 && pread(fd, at, 8, (off_t)be64_load(at)) == 8 &&
              pwrite(fd, zeros, sizeof(zeros), (off_t)be64_load(at) + 128) == sizeof(zeros);
    if (close(fd) || !ok)
        die("hurting an image");
}

void seeds_co(struct trial *t) {
    static uint8_t buf[SIZE];
    struct copy_opts opts = {0};
    struct node *n, *flat;
    make_filled_co(t, "base.qcow2", "cluster_size=4k", 1);
    make_filled_co(t, "other.qcow2", "cluster_size=8k,size=200k", 101);
    must(create_co(t, "small.qcow2", "qcow2", "cluster_size=512"), &t->e, "small");
    must(create_co(t, "top.qcow2", "qcow2",
                   "cluster_size=4k,backing_file=base.qcow2,backing_fmt=qcow2"),
         &t->e, "top");
    must(open_co(t, "top.qcow2", OPEN_RW, &n), &t->e, "top");
    t->next_id = 200;
    must(write_co(t, n, 70, 10) | write_co(t, n, 128, 32), NULL, "top");
    must(coded_co(t, n, 8) | coded_co(t, n, 16) | coded_co(t, n, 64), NULL, "top");
    must(zero_co(t, n, 160, 16, ZERO_MAY_UNMAP), NULL, "top");
    must(disk_flush_co(n), NULL, "top");
    must(disk_pread_co(n, 0, buf, SIZE), NULL, "top");
    for (uint64_t b = 0; b < BLOCKS; b++)
        t->start[b] = le32_load(buf + b * BLOCK);
    must(create_co(t, "flat.img", "raw", ""), &t->e, "flat");
    must(open_co(t, "flat.img", OPEN_RW, &flat), &t->e, "flat");
    must(copy_run_co(n, flat, SIZE, 0, &opts, &t->e), &t->e, "flat");
    must(disk_flush_co(flat), NULL, "flat");
    node_unref_co(flat);
    node_unref_co(n);
    must(create_co(t, "sub.qcow2", "qcow2", "cluster_size=16k,extended_l2=on"), &t->e, "sub");
    make_filled_co(t, "hurt.qcow2", "cluster_size=512,size=128k", 301);
    hurt_co(t);
    load(t, "base.qcow2");
    load(t, "other.qcow2");
    load(t, "small.qcow2");
    load(t, "top.qcow2");
    load(t, "flat.img");
    load(t, "sub.qcow2");
    load(t, "hurt.qcow2");
    static const char *const formats[][2] = {{"vdi", "block_size=4k"},
                                             {"qed", "cluster_size=4k,table_size=1"},
                                             {"qcow", ""},
                                             {"parallels", "cluster_size=4k"},
                                             {"vpc", "force_size=on"},
                                             {"vhdx", "block_size=1M"},
                                             {"vmdk", "zeroed_grain=on"}};
    for (size_t i = 0; i < sizeof(formats) / sizeof(formats[0]); i++) {
        char *name = xasprintf("small.%s", formats[i][0]); /* the seed keeps it */
        must(create_co(t, name, formats[i][0], formats[i][1]), &t->e, name);
        load(t, name)->apart = true;
    }
    make_link_co(t, "vdi", "block_size=4k");
    make_link_co(t, "vhdx", "block_size=1M");
}
