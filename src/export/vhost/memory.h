/* SPDX-License-Identifier: MIT */
/*
 * The guest's memory, as the front end shares it: regions mapped here, found by guest address
 * (descriptors) or by the front end's own address (rings).
 *
 * Every range is looked up whole before it is touched.  The front end could still make the file
 * behind a region shorter: a page that is gone then is replaced by zeros instead of killing the
 * process, and memory_is_broken() says so (a SIGBUS handler of this file, installed once, which
 * passes on what is not ours).
 */
#ifndef STRATA_EXPORT_VHOST_MEMORY_H
#define STRATA_EXPORT_VHOST_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct err;
struct vhost_region;

#define MEMORY_REGIONS_MAX 32

/* Shared pages whose file may lose them. */
struct memory_map {
    void *at; /* NULL: none */
    size_t length;
    int watch; /* its place in the handler's list */
};
struct memory_region {
    uint64_t guest, size, user;
    uint8_t *bytes; /* where guest address `guest` is here */
    struct memory_map map;
};
struct memory {
    struct memory_region v[MEMORY_REGIONS_MAX];
    unsigned n;
};

/* Whole pages, huge ones where the file has such; the descriptor stays the caller's. */
int memory_map(int fd, uint64_t offset, size_t length, struct memory_map *out, struct err *e);
void memory_unmap(struct memory_map *m);

/* Maps one region of the file; the descriptor stays the caller's.  -EINVAL: overlaps, overflows, or
 * is larger than the file; -ENOSPC: too many regions. */
int memory_add(struct memory *m, const struct vhost_region *r, int fd, struct err *e);
/* -ENOENT: there is none like it. */
int memory_remove(struct memory *m, const struct vhost_region *r, struct err *e);
void memory_clear(struct memory *m);
bool memory_is_broken(const struct memory *m);

/* [addr, +len) of the guest as at most `room` pieces; the number, 0 when part of it is not there.
 */
int memory_guest(const struct memory *m, uint64_t addr, uint64_t len, struct iovec *out, int room);
/* The same for one piece by the front end's address; NULL. */
void *memory_user(const struct memory *m, uint64_t addr, uint64_t len, unsigned align);

#endif
