/* SPDX-License-Identifier: MIT */
/*
 * The engine over a format and a storage made for the purpose: a "grid" whose units of 16 bytes lie
 * anywhere in a flat memory storage that can fail, log and count.  What is tested is the engine
 * alone: splitting, copy on write, chains, short backings, coded units, errors half way.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <errno.h>
#include <cmocka.h>

#include "base/bytes.h"
#include "base/ck.h"
#include "base/iov.h"
#include "disk/engine.h"
#include "runtime/loop.h"

#define UNIT 16
#define UNITS 64
#define DISK (UNIT * UNITS)
#define STORE 8192

/* ---- storage: one array ---- */
struct ram {
    uint8_t bytes[STORE];
    unsigned reads, writes, flushes;
    int fail_reads_from, fail_writes_from; /* count down; 0: never */
};

static int ram_preadv_co(struct node *n, uint64_t off, uint64_t len, const struct iovec *iov,
                         int niov, unsigned flags) {
    struct ram *r = n->state;
    r->reads++;
    if (r->fail_reads_from && !--r->fail_reads_from)
        return -EIO;
    assert_true(off + len <= STORE);
    assert_true(is_aligned(off | len, n->request_align));
    iov_from_buf(iov, niov, 0, r->bytes + off, len);
    return 0;
}

static int ram_pwritev_co(struct node *n, uint64_t off, uint64_t len, const struct iovec *iov,
                          int niov, unsigned flags) {
    struct ram *r = n->state;
    r->writes++;
    if (r->fail_writes_from && !--r->fail_writes_from)
        return -EIO;
    assert_true(off + len <= STORE);
    assert_true(is_aligned(off | len, n->request_align));
    task_yield_co(); /* others get in between */
    iov_to_buf(iov, niov, 0, r->bytes + off, len);
    if (off + len > n->size)
        n->size = off + len;
    return 0;
}

static int ram_flush_co(struct node *n) {
    ((struct ram *)n->state)->flushes++;
    return 0;
}

static const struct storage_ops ram_ops = {
    .preadv_co = ram_preadv_co, .pwritev_co = ram_pwritev_co, .flush_co = ram_flush_co};
static const struct driver driver_ram = {
    .name = "ram", .kind = DRIVER_STORAGE, .state_size = sizeof(struct ram), .storage = &ram_ops};

/* ---- format: a table of places ---- */
enum { P_NONE, P_ZERO, P_DATA, P_CODED };
struct grid {
    struct {
        int kind;
        uint64_t host;
    } unit[UNITS];
    uint64_t next; /* host bytes used */
    unsigned places, publishes, abandons;
    bool fail_place, dirty_room; /* room does not read as zeros */
};

/* One byte of code is the byte that fills the unit. */
static int fill_decode(const void *in, size_t in_len, void *out, size_t out_len) {
    memset(out, *(const uint8_t *)in, out_len);
    return 0;
}
static const struct codec fill_codec = {.name = "fill", .decode = fill_decode};

static int grid_map_co(struct node *n, uint64_t off, uint64_t len, struct extent *x) {
    struct grid *g = n->state;
    uint64_t u = off / UNIT, in = off % UNIT;
    static const enum extent_kind kinds[] = {EXTENT_HOLE, EXTENT_ZERO, EXTENT_DATA, EXTENT_CODED};
    x->kind = kinds[g->unit[u].kind];
    x->length = min_u64(len, UNIT - in);
    if (x->kind == EXTENT_DATA) {
        x->flags = EXTENT_IN_PLACE;
        x->storage = n->file;
        x->host_offset = g->unit[u].host + in;
    } else if (x->kind == EXTENT_CODED) {
        x->codec = &fill_codec;
        x->storage = n->file;
        x->host_offset = g->unit[u].host;
        x->coded_length = 1;
        x->unit_offset = u * UNIT;
        x->unit_length = UNIT;
    }
    return 0;
}

static int grid_place_co(struct node *n, uint64_t off, uint64_t len, unsigned flags,
                         uint32_t coded_length, struct placement *p) {
    struct grid *g = n->state;
    uint64_t u = off / UNIT, in = off % UNIT;
    g->places++;
    if (g->fail_place)
        return -ENOSPC;
    *p = (struct placement){.offset = off,
                            .length = min_u64(len, UNIT - in),
                            .storage = n->file,
                            .coded_length = coded_length,
                            .is_new = true,
                            .reads_zero = !g->dirty_room};
    if (flags & PLACE_CODED) {
        p->host_offset = g->next;
        p->cookie[0] = P_CODED;
    } else if (g->unit[u].kind == P_DATA) {
        p->is_new = false;
        p->host_offset = g->unit[u].host + in;
        return 0;
    } else {
        p->host_offset = g->next + in;
        p->head = in;
        p->tail = UNIT - in - p->length;
        p->cookie[0] = P_DATA;
    }
    g->next += UNIT;
    task_yield_co();
    return 0;
}

static int grid_publish_co(struct node *n, const struct placement *p) {
    struct grid *g = n->state;
    g->publishes++;
    if (p->is_new) {
        g->unit[p->offset / UNIT].kind = p->cookie[0];
        g->unit[p->offset / UNIT].host = p->host_offset - p->head;
    }
    return 0;
}

static void grid_abandon(struct node *n, const struct placement *p) {
    ((struct grid *)n->state)->abandons++;
}

static int grid_set_zero_co(struct node *n, uint64_t off, uint64_t len, unsigned flags) {
    struct grid *g = n->state;
    assert_true(is_aligned(off, UNIT) && (is_aligned(len, UNIT) || off + len == n->size));
    for (uint64_t u = off / UNIT; u < div_up(off + len, UNIT); u++)
        g->unit[u].kind = P_ZERO;
    return 0;
}

static const struct format_ops grid_ops = {.map_co = grid_map_co,
                                           .place_co = grid_place_co,
                                           .publish_co = grid_publish_co,
                                           .abandon = grid_abandon,
                                           .set_zero_co = grid_set_zero_co};
static const struct driver driver_grid = {
    .name = "grid", .kind = DRIVER_FORMAT, .state_size = sizeof(struct grid), .format = &grid_ops};

/* ---- scenes ---- */
static struct node *grid_new(uint64_t size, struct node *backing) {
    struct node *file = node_new(&driver_ram), *n = node_new(&driver_grid);
    file->flags = n->flags = NODE_RW;
    n->file = file;
    n->size = size;
    n->granularity = UNIT;
    n->codec = &fill_codec;
    n->backing = backing;
    return n;
}
#define GRID(n) ((struct grid *)(n)->state)
#define RAM(n) ((struct ram *)(n)->file->state)

static void expect(struct node *n, uint64_t off, const char *want) {
    char got[DISK + 1] = {0};
    size_t len = strlen(want);
    assert_int_equal(disk_pread_co(n, off, got, len), 0);
    for (size_t i = 0; i < len; i++)
        if (!got[i])
            got[i] = '.';
    assert_string_equal(got, want);
}
static void put(struct node *n, uint64_t off, const char *s) {
    assert_int_equal(disk_pwrite_co(n, off, s, strlen(s)), 0);
}

static void a_write_inside_a_unit_copies_the_rest_from_below(void *arg) {
    struct node *base = grid_new(DISK, NULL), *n;
    put(base, 0, "abcdefghijklmnopqrstuvwxyz012345");
    base->flags &= ~NODE_RW;
    n = grid_new(DISK, base);
    unsigned writes = RAM(n)->writes;
    put(n, 5, "XYZ");
    assert_int_equal(RAM(n)->writes - writes, 1); /* head, data and tail in one write */
    expect(n, 0, "abcdeXYZijklmnopqrstuvwxyz012345");
    expect(base, 0, "abcdefghijklmnopqrstuvwxyz012345");
    node_unref_co(n);
}

static void an_overwrite_in_place_does_not_place(void *arg) {
    struct node *n = grid_new(DISK, NULL);
    put(n, 0, "0123456789abcdef0123456789abcdef");
    unsigned places = GRID(n)->places;
    put(n, 8, "ABCDEFGHIJKLMNOP");
    assert_int_equal(GRID(n)->places, places);
    expect(n, 0, "01234567ABCDEFGHIJKLMNOP89abcdef");
    node_unref_co(n);
}

static void room_that_is_not_zero_gets_zero_edges(void *arg) {
    struct node *n = grid_new(DISK, NULL);
    memset(RAM(n)->bytes, '#', STORE);
    GRID(n)->dirty_room = true;
    put(n, 4, "data");
    expect(n, 0, "....data........");
    node_unref_co(n);
}

static void a_partial_last_unit_is_zeroed_behind_the_end(void *arg) {
    struct node *n = grid_new(20, NULL);
    memset(RAM(n)->bytes, '#', STORE);
    GRID(n)->dirty_room = true;
    put(n, 17, "x");
    n->size = 32; /* grown: the bytes behind the old end show */
    expect(n, 16, ".x..............");
    node_unref_co(n);
}

static void a_short_backing_reads_as_zeros_to_the_byte(void *arg) {
    struct node *base = grid_new(DISK, NULL), *n;
    put(base, 16, "abcdefghijklmnop");
    base->size = 21; /* what lies behind must not show */
    base->flags &= ~NODE_RW;
    n = grid_new(DISK, base);
    expect(n, 14, "..abcde.......");
    put(n, 30, "ZZZ");
    expect(n, 14, "..abcde.........ZZZ");
    node_unref_co(n);
}

static void a_failed_copy_abandons_and_the_old_content_stays(void *arg) {
    struct node *base = grid_new(DISK, NULL), *n;
    put(base, 0, "abcdefghijklmnop");
    base->flags &= ~NODE_RW;
    n = grid_new(DISK, base);
    RAM(base)->fail_reads_from = 1;
    assert_int_equal(disk_pwrite_co(n, 5, "X", 1), -EIO);
    assert_int_equal(GRID(n)->abandons, 1);
    assert_int_equal(GRID(n)->publishes, 0);
    RAM(n)->fail_writes_from = 1;
    assert_int_equal(disk_pwrite_co(n, 5, "X", 1), -EIO);
    assert_int_equal(GRID(n)->abandons, 2);
    expect(n, 0, "abcdefghijklmnop");
    node_unref_co(n);
}

static void coded_units_decode_and_are_copied_on_write(void *arg) {
    struct node *n = grid_new(DISK, NULL);
    assert_int_equal(disk_write_coded_co(n, 16, "q", 1), 0);
    assert_int_equal(disk_write_coded_co(n, 32, "r", 1), 0);
    expect(n, 14, "..qqqqqqqqqqqqqqqqrrrr");
    expect(n, 20, "qqqq"); /* from the kept unit */
    put(n, 20, "--");
    expect(n, 16, "qqqq--qqqqqqqqqqrrrrrrrrrrrrrrrr");
    node_unref_co(n);
}

static void a_kept_unit_is_dropped_when_the_map_changes(void *arg) {
    struct node *n = grid_new(DISK, NULL);
    assert_int_equal(disk_write_coded_co(n, 16, "q", 1), 0);
    expect(n, 20, "qqqq");
    assert_int_equal(disk_write_coded_co(n, 16, "s", 1), 0);
    expect(n, 20, "ssss");
    node_unref_co(n);
}

static void reads_of_coded_units_below_stop_at_data_above(void *arg) {
    struct node *base = grid_new(DISK, NULL), *n;
    for (int i = 0; i < 4; i++)
        assert_int_equal(disk_write_coded_co(base, i * UNIT, &"abcd"[i], 1), 0);
    base->flags &= ~NODE_RW;
    n = grid_new(DISK, base);
    put(n, 32, "0123456789ABCDEF");
    expect(n, 12, "aaaabbbbbbbbbbbbbbbb0123456789ABCDEFdddddddddddddddd");
    node_unref_co(n);
}

static void zeroing_uses_whole_units_and_writes_the_rest(void *arg) {
    struct node *n = grid_new(DISK, NULL);
    put(n, 0, "abcdefghijklmnopabcdefghijklmnopabcdefghijklmnop");
    unsigned places = GRID(n)->places;
    assert_int_equal(disk_zero_co(n, 12, 24, 0), 0);
    expect(n, 0, "abcdefghijkl........................efghijklmnop");
    assert_int_equal(GRID(n)->unit[1].kind, P_ZERO);
    assert_int_equal(GRID(n)->unit[0].kind, P_DATA);
    assert_int_equal(GRID(n)->places - places, 2);
    assert_int_equal(disk_zero_co(n, 4, 4, ZERO_NO_FALLBACK), -ENOTSUP);
    node_unref_co(n);
}

static void requests_outside_the_disk_are_refused(void *arg) {
    struct node *n = grid_new(DISK, NULL);
    char c[2];
    assert_int_equal(disk_pread_co(n, DISK - 1, c, 2), -EINVAL);
    assert_int_equal(disk_pwrite_co(n, DISK - 1, c, 2), -ENOSPC);
    assert_int_equal(disk_zero_co(n, DISK, 1, 0), -ENOSPC);
    assert_int_equal(disk_pread_co(n, UINT64_MAX - 1, c, 2), -EINVAL);
    assert_int_equal(disk_discard_co(n, 1, INT64_MAX), -EINVAL);
    n->flags &= ~NODE_RW;
    assert_int_equal(disk_pwrite_co(n, 0, c, 1), -EROFS);
    node_unref_co(n);
}

struct half {
    struct node *n;
    uint64_t off;
    const char *s;
};
static void write_half(void *arg) {
    struct half *h = arg;
    put(h->n, h->off, h->s);
}
static void two_writers_of_one_unit_both_survive(void *arg) {
    struct node *n = grid_new(DISK, NULL);
    struct half h[] = {{n, 0, "AAAA"}, {n, 8, "BBBB"}};
    struct task_group g;
    task_group_init(&g);
    task_group_spawn(&g, loop_self(), write_half, &h[0]);
    task_group_spawn(&g, loop_self(), write_half, &h[1]);
    task_group_wait_co(&g);
    expect(n, 0, "AAAA....BBBB....");
    node_unref_co(n);
}

static void a_chain_of_a_hundred_layers_reads_and_tells_its_depth(void *arg) {
    struct node *n = grid_new(DISK, NULL);
    put(n, 0, "bottom");
    for (int i = 1; i < 100; i++) {
        n->flags &= ~NODE_RW;
        n = grid_new(DISK, n);
    }
    expect(n, 0, "bottom");
    struct status st;
    assert_int_equal(disk_status_co(n, 0, UNIT, 0, &st), 0);
    assert_int_equal(st.depth, 99);
    assert_int_equal(disk_status_co(n, UNIT, UNIT, 0, &st), 0);
    assert_false(st.present);
    assert_true(st.zero);
    put(n, 2, "TT");
    expect(n, 0, "boTTom");
    node_unref_co(n);
}

static void unaligned_requests_reach_direct_storage_aligned(void *arg) {
    struct node *n = node_new(&driver_ram);
    n->flags = NODE_RW;
    n->size = 4096;
    n->request_align = 512;
    struct ram *r = n->state;
    memset(r->bytes, 'o', 4096);
    char got[8] = {0};
    assert_int_equal(disk_pwrite_co(n, 510, "1234", 4), 0);
    assert_int_equal(disk_pread_co(n, 508, got, 7), 0);
    assert_string_equal(got, "oo1234o");
    node_unref_co(n);
}

static int grid_flush_co(struct node *n) {
    return disk_flush_co(n->file);
}

static void fua_on_a_known_place_flushes_the_format_too(void *arg) {
    struct node *n = grid_new(DISK, NULL);
    struct driver with_flush = driver_grid;
    struct format_ops ops = grid_ops;
    struct iovec v = {"x", 1};
    ops.flush_co = grid_flush_co;
    with_flush.format = &ops;
    n->drv = &with_flush;
    put(n, 0, "data");
    unsigned before = RAM(n)->flushes;
    assert_int_equal(disk_pwritev_co(n, 1, 1, &v, 1, IO_FUA), 0); /* mapping not yet stable */
    assert_int_equal(RAM(n)->flushes, before + 1);
    n->drv = &driver_grid;
    node_unref_co(n);
}

static int grid_reach_co(struct node *n, uint64_t size, struct err *e) {
    assert_true(size > n->size && size <= DISK);
    return 0;
}

/* The new size comes last: what lies behind the old end is zeros by now, and flushed. */
static int grid_resize_co(struct node *n, uint64_t size, int prealloc, struct err *e) {
    assert_int_equal(n->size, 20);
    assert_int_equal(RAM(n)->flushes, 1);
    n->size = size;
    char got[25] = "";
    struct iovec v = {got, 24};
    assert_int_equal(chain_read_co(n, 16, 24, &v, 1, 0), 0);
    assert_memory_equal(got, "abcd\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 24);
    return 0;
}

static void growth_over_a_longer_backing_reads_as_zeros(void *arg) {
    struct node *base = grid_new(DISK, NULL), *n;
    struct driver resizable = driver_grid;
    struct format_ops ops = grid_ops;
    put(base, 16, "abcdefghijklmnopabcdefghijklmnop");
    base->flags &= ~NODE_RW;
    n = grid_new(20, base);
    ops.reach_co = grid_reach_co;
    ops.resize_co = grid_resize_co;
    ops.flush_co = grid_flush_co;
    resizable.format = &ops;
    n->drv = &resizable;
    assert_int_equal(disk_resize_co(n, 40, 0, NULL), 0);
    expect(n, 16, "abcd....................");
    n->drv = &driver_grid;
    node_unref_co(n);
}

static void quiesce_waits_for_requests_and_holds_new_ones(void *arg) {
    struct node *n = grid_new(DISK, NULL);
    struct half h = {n, 0, "late"};
    node_quiesce_co(n);
    task_spawn(loop_self(), write_half, &h);
    for (int i = 0; i < 5; i++)
        task_yield_co();
    assert_int_equal(GRID(n)->places, 0);
    node_resume(n);
    for (int i = 0; i < 10; i++)
        task_yield_co();
    expect(n, 0, "late");
    node_unref_co(n);
}

static void run_scene(void **state) {
    struct loop *l;
    assert_int_equal(loop_new(LOOP_AUTO, &l, NULL), 0);
    loop_run(l, (task_fn *)*state, NULL);
    loop_free(l);
}
#define SCENE(f)                                                                                   \
    { #f, run_scene, NULL, NULL, (void *)f }

int main(void) {
    const struct CMUnitTest tests[] = {
        SCENE(a_write_inside_a_unit_copies_the_rest_from_below),
        SCENE(an_overwrite_in_place_does_not_place),
        SCENE(room_that_is_not_zero_gets_zero_edges),
        SCENE(a_partial_last_unit_is_zeroed_behind_the_end),
        SCENE(a_short_backing_reads_as_zeros_to_the_byte),
        SCENE(a_failed_copy_abandons_and_the_old_content_stays),
        SCENE(coded_units_decode_and_are_copied_on_write),
        SCENE(a_kept_unit_is_dropped_when_the_map_changes),
        SCENE(reads_of_coded_units_below_stop_at_data_above),
        SCENE(zeroing_uses_whole_units_and_writes_the_rest),
        SCENE(requests_outside_the_disk_are_refused),
        SCENE(two_writers_of_one_unit_both_survive),
        SCENE(a_chain_of_a_hundred_layers_reads_and_tells_its_depth),
        SCENE(unaligned_requests_reach_direct_storage_aligned),
        SCENE(fua_on_a_known_place_flushes_the_format_too),
        SCENE(growth_over_a_longer_backing_reads_as_zeros),
        SCENE(quiesce_waits_for_requests_and_holds_new_ones),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
