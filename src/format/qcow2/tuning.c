/* SPDX-License-Identifier: MIT */
/*
 * Sizes of the metadata cache, as options of an open image.
 *
 * There is one cache for L2 tables and reference counts, which sizes itself: so nobody has to say
 * anything.  Who does gives QEMU's options, and they bound the memory: cache-size is the sum, the
 * two others are shares of it, and a share that is given alone stands for itself.
 *
 * Facts: QEMU's docs/qcow2-cache.txt, and what its programs refuse.
 */
#include <errno.h>
#include <inttypes.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "format/qcow2/qcow2.h"

enum { ENTRY_MIN = 512 };

int qcow2_tuning_check(const struct qcow2 *s, const struct qcow2_open_opts *o, struct err *e) {
    if (o->has_cache && o->has_l2_cache && o->has_count_cache)
        return err_set(e, EINVAL,
                       "cache-size, l2-cache-size and refcount-cache-size may not be set at the "
                       "same time");
    if (o->has_cache && o->has_l2_cache && o->l2_cache > o->cache)
        return err_set(e, EINVAL, "l2-cache-size may not exceed cache-size");
    if (o->has_cache && o->has_count_cache && o->count_cache > o->cache)
        return err_set(e, EINVAL, "refcount-cache-size may not exceed cache-size");
    if (o->has_l2_entry &&
        (o->l2_entry < ENTRY_MIN || o->l2_entry > s->cluster_size || !is_pow2(o->l2_entry)))
        return err_set(e, EINVAL,
                       "L2 cache entry size must be a power of two between %d and the cluster "
                       "size (%" PRIu32 ")",
                       ENTRY_MIN, s->cluster_size);
    return 0;
}

uint32_t qcow2_tuning_slice(const struct qcow2 *s, const struct qcow2_open_opts *o) {
    uint64_t bytes = o->has_l2_entry ? o->l2_entry : s->cluster_size;
    return (uint32_t)min_u64(bytes, QCOW2_SLICE_BYTES_MAX);
}

uint64_t qcow2_tuning_slices(const struct qcow2_open_opts *o, uint32_t slice_bytes,
                             uint64_t wanted) {
    uint64_t bytes = QCOW2_CACHE_BYTES_MAX;
    if (o->has_cache)
        bytes = o->cache;
    else if (o->has_l2_cache && o->has_count_cache)
        bytes = min_u64(o->l2_cache, INT64_MAX / 2) + min_u64(o->count_cache, INT64_MAX / 2);
    else if (o->has_l2_cache || o->has_count_cache)
        bytes = min_u64(bytes, o->has_l2_cache ? o->l2_cache : o->count_cache);
    return min_u64(wanted, bytes / slice_bytes);
}
