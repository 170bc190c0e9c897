/* SPDX-License-Identifier: MIT */
#include "base/plant.h"

#ifdef STRATA_PLANT

enum plant plant_active;

#define PLANT_NAME_(name, text) #name,
static const char *const names[] = {PLANTS(PLANT_NAME_) NULL};

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
