/* SPDX-License-Identifier: MIT */
/*
 * Allocations and system calls that fail when they are told to.
 *
 * The linker sends what the library calls here (--wrap, see meson.build).  While armed, every
 * allocation and every I/O call is counted, and the chosen one fails.
 *
 * Counted too: what jansson allocates, and maps of memory (stacks).  Not counted: what may not fail
 * by contract (xcalloc and friends, strbuf, the loop's own few), and what other libraries allocate.
 */
#ifndef STRATA_TESTS_FAULTS_INJECT_H
#define STRATA_TESTS_FAULTS_INJECT_H

#include <stdbool.h>
#include <stddef.h>

enum fault_kind {
    FAULT_NONE,
    FAULT_MEMORY,  /* an allocation gives NULL */
    FAULT_EIO,     /* an I/O call fails */
    FAULT_EIO_ALL, /* and all behind it, too: the disk is gone */
    FAULT_ENOSPC,  /* a call that writes or gives room fails */
    FAULT_SHORT,   /* a read or write moves less than it was asked for */
    FAULT_KINDS
};
extern const char *const fault_names[];

/* The n-th (from 1) event of this kind from now on fails. */
void fault_arm(enum fault_kind kind, unsigned long n);
/* Ends it; whether the fault has happened. */
bool fault_disarm(void);
/* jansson's allocations are counted too; before its first use. */
void fault_json(void);
/* What this thread does from now on cannot fail (true), or can again. */
void fault_exempt(bool on);
/* Allocations of the library that are not freed. */
size_t fault_live(void);

#endif
