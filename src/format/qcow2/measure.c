/* SPDX-License-Identifier: MIT */
/*
 * How many bytes a new image needs: whole, and with only some of its data there.
 *
 * As in qemu-img's measure, `required` counts the metadata of the fully allocated image: it is
 * exact for `fully_allocated` and never too small for `required`.
 */
#include "format/qcow2/qcow2.h"

#include "base/ck.h"
#include "format/qcow2/layout.h"

int qcow2_measure(const void *create_opts, uint64_t size, uint64_t data, struct measure_result *out,
                  struct err *e) {
    const struct qcow2_create_opts *o = create_opts;
    struct qcow2_layout l;
    int r = qcow2_create_check(o, e);
    if (r)
        return r;
    r = qcow2_layout_compute(__builtin_ctzll(o->cluster_size), __builtin_ctzll(o->refcount_bits),
                             o->extended_l2, size, true, &l, e);
    if (r)
        return r;
    /* Room given ahead is there from the start. */
    if (o->preallocation == PREALLOC_FALLOC || o->preallocation == PREALLOC_FULL)
        data = size;
    uint64_t data_clusters = min_u64(div_up(data, o->cluster_size), l.data_clusters);
    out->fully_allocated = l.file_length;
    out->required = l.file_length - (l.data_clusters - data_clusters) * o->cluster_size;
    return 0;
}
