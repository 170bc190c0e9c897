/* SPDX-License-Identifier: MIT */
#include "base/plant.h"

#ifdef STRATA_PLANT

enum plant plant_active;

#define PLANT_NAME_(name, text) #name,
#define X PLANT_NAME_
static const char *const names[] = {
#include "base/plants.def"
    NULL};
#undef X

bool plant_set(const char *name) {
    for (size_t i = 0; names[i]; i++)
        if (!strcmp(names[i], name)) {
            plant_active = (enum plant)(i + 1);
            return true;
        }
    return false;
}

const char *plant_name(size_t i) {
    return i + 1 < PLANT_COUNT ? names[i] : NULL;
}

#else

bool plant_set(const char *name) {
    return false;
}

const char *plant_name(size_t i) {
    return NULL;
}

#endif
