/* SPDX-License-Identifier: MIT */
/*
 * Planted bugs: proof that the crash tests can fail.
 *
 * Only the library built with STRATA_PLANT (for tests/crash) knows them: there, one rule of the
 * write order at a time can be broken by name.  In every other build PLANTED() is the constant 0.
 */
#ifndef STRATA_BASE_PLANT_H
#define STRATA_BASE_PLANT_H

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

/* Name and what is broken. */
#define PLANTS(X)                                                                                  \
    X(PUBLISH_BEFORE_DATA,                                                                         \
      "a mapping is published, and may be flushed, before its data is written")                    \
    X(EDGES_NOT_COPIED, "copy-on-write leaves out the bytes around the new data")                  \
    X(FUA_WITHOUT_MAPPING, "FUA in place does not make the mapping stable")                        \
    X(NO_BARRIER_BEFORE_TABLES,                                                                    \
      "no barrier between refcounts and data, and the tables naming them")                         \
    X(NO_BARRIER_AFTER_REFTABLE, "no barrier between the refcount table and what it counts")       \
    X(NO_LAST_BARRIER, "a flush returns without its last barrier")                                 \
    X(L1_BEFORE_L2, "L1 entries are written together with the new tables that they name")          \
    X(REFCOUNTS_LAST, "refcounts are written after the tables that use the clusters")              \
    X(FLUSH_FORGETS_L1, "a flush does not write the changed L1 entries")                           \
    X(FREE_BEFORE_UNLINK, "a dropped cluster is free before its dropping is stable")               \
    X(CODED_FREED_WITH_NEIGHBOUR, "dropping one coded unit frees the cluster that others lie in")  \
    X(PUNCH_AFTER_FREE, "the hole is punched when the cluster may be in use again")                \
    X(TABLE_NOT_ZEROED, "a new L2 table in a used cluster keeps what was there")                   \
    X(FROZEN_SLICE_CHANGES, "a slice being written back takes later changes along")                \
    X(REFTABLE_NAMED_EARLY, "the header names a new refcount table before it is written")          \
    X(RESIZE_NAMES_L1_EARLY, "the header names a new L1 table before it is stable")                \
    X(HEADER_TORN, "the steps of a header's rewrite have no barriers between them")                \
    X(VDI_COUNT_LAST, "vdi: the header counts a block after the map names it")                     \
    X(SIZE_BEFORE_ZEROS, "a disk is larger before what lies behind its old end reads as zeros")    \
    X(COUNTS_NAMED_EARLY, "the header names counts of another width before they are stable")       \
    X(DOWNGRADE_BEFORE_ZEROS, "the header says version 2 before the zero clusters are data")

#ifdef STRATA_PLANT
#define PLANT_ENUM_(name, text) PLANT_##name,
enum plant { PLANT_NONE, PLANTS(PLANT_ENUM_) PLANT_COUNT };
#undef PLANT_ENUM_
extern enum plant plant_active;
#define PLANTED(name) (plant_active == PLANT_##name)
#else
#define PLANTED(name) 0
#endif

/* Breaks the rule `name`; false when this build has no such one. */
bool plant_set(const char *name);
/* The i-th plant's name, NULL behind the last; NULL at once in builds without them. */
const char *plant_name(size_t i);

#endif
