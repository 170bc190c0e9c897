/* SPDX-License-Identifier: MIT */
/*
 * Planted bugs: proof that the crash tests can fail.
 *
 * Only the library built with STRATA_PLANT (for tests/crash) knows them: there, one rule of the
 * write order at a time can be broken by name: plants.def lists them.  In every other build
 * PLANTED() is the constant 0.
 */
#ifndef STRATA_BASE_PLANT_H
#define STRATA_BASE_PLANT_H

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#ifdef STRATA_PLANT
#define PLANT_ENUM_(name, text) PLANT_##name,
#define X PLANT_ENUM_
enum plant {
    PLANT_NONE,
#include "base/plants.def"
    PLANT_COUNT
};
#undef X
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
