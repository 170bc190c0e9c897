/* SPDX-License-Identifier: MIT */
/*
 * What goes over a vhost-user socket, and the rings in guest memory.
 *
 * Messages are in the host's byte order: a header, then the payload that belongs to the request.
 * Rings and block requests are little endian (virtio 1.2); this is for little-endian hosts, as is
 * everything that QEMU offers the protocol on.
 *
 * Facts: qemu/qemu docs/interop/vhost-user.rst; OASIS virtio 1.2, 2.7 (split rings), 2.8 (packed),
 * 5.2 (block device).
 */
#ifndef STRATA_EXPORT_VHOST_PROTO_H
#define STRATA_EXPORT_VHOST_PROTO_H

#include <stdint.h>

enum vhost_request {
    VHOST_GET_FEATURES = 1,
    VHOST_SET_FEATURES = 2,
    VHOST_SET_OWNER = 3,
    VHOST_RESET_OWNER = 4,
    VHOST_SET_MEM_TABLE = 5,
    VHOST_SET_VRING_NUM = 8,
    VHOST_SET_VRING_ADDR = 9,
    VHOST_SET_VRING_BASE = 10,
    VHOST_GET_VRING_BASE = 11,
    VHOST_SET_VRING_KICK = 12,
    VHOST_SET_VRING_CALL = 13,
    VHOST_SET_VRING_ERR = 14,
    VHOST_GET_PROTOCOL_FEATURES = 15,
    VHOST_SET_PROTOCOL_FEATURES = 16,
    VHOST_GET_QUEUE_NUM = 17,
    VHOST_SET_VRING_ENABLE = 18,
    VHOST_GET_CONFIG = 24,
    VHOST_SET_CONFIG = 25,
    VHOST_GET_INFLIGHT_FD = 31,
    VHOST_SET_INFLIGHT_FD = 32,
    VHOST_RESET_DEVICE = 34,
    VHOST_GET_MAX_MEM_SLOTS = 36,
    VHOST_ADD_MEM_REG = 37,
    VHOST_REM_MEM_REG = 38,
};

enum {
    VHOST_VERSION = 1,
    VHOST_VERSION_MASK = 3,
    VHOST_FLAG_REPLY = 4,
    VHOST_FLAG_NEED_REPLY = 8,
    VHOST_FDS_MAX = 8,
    VHOST_PAYLOAD_MAX = 1024,
    VHOST_VRING_INDEX = 0xff,
    VHOST_VRING_NOFD = 0x100,
    VHOST_CONFIG_MAX = 256,
};

enum {
    VHOST_F_PROTOCOL_FEATURES = 30,
    VHOST_PROTOCOL_MQ = 0,
    VHOST_PROTOCOL_REPLY_ACK = 3,
    VHOST_PROTOCOL_CONFIG = 9,
    VHOST_PROTOCOL_INFLIGHT = 12,
    VHOST_PROTOCOL_RESET_DEVICE = 13,
    VHOST_PROTOCOL_MEM_SLOTS = 15,
};

struct vhost_head {
    uint32_t request, flags, size;
};

struct vhost_region {
    uint64_t guest, size, user, offset;
};

union vhost_payload {
    uint8_t bytes[VHOST_PAYLOAD_MAX];
    uint64_t u64;
    struct {
        uint32_t index, num;
    } state;
    struct {
        uint32_t index, flags;
        uint64_t desc, used, avail, log;
    } addr;
    struct {
        uint32_t n, padding;
        struct vhost_region v[VHOST_FDS_MAX];
    } table;
    struct {
        uint64_t padding;
        struct vhost_region region;
    } slot;
    struct {
        uint32_t offset, size, flags;
        uint8_t bytes[VHOST_CONFIG_MAX];
    } config;
    struct {
        uint64_t size, offset;
        uint16_t queues, queue_size;
    } inflight;
};

/* ---- virtio ---- */

enum {
    VIRTIO_BLK_F_SEG_MAX = 2,
    VIRTIO_BLK_F_RO = 5,
    VIRTIO_BLK_F_BLK_SIZE = 6,
    VIRTIO_BLK_F_FLUSH = 9,
    VIRTIO_BLK_F_TOPOLOGY = 10,
    VIRTIO_BLK_F_CONFIG_WCE = 11,
    VIRTIO_BLK_F_MQ = 12,
    VIRTIO_BLK_F_DISCARD = 13,
    VIRTIO_BLK_F_WRITE_ZEROES = 14,
    VIRTIO_F_INDIRECT_DESC = 28,
    VIRTIO_F_EVENT_IDX = 29,
    VIRTIO_F_VERSION_1 = 32,
    VIRTIO_F_RING_PACKED = 34,
};

enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4, DESC_AVAIL = 1 << 7, DESC_USED = 1 << 15 };
enum { EVENT_ENABLE = 0, EVENT_DISABLE = 1, EVENT_DESC = 2 }; /* packed: event suppression */
enum { USED_NO_NOTIFY = 1, AVAIL_NO_INTERRUPT = 1 };          /* split: flags of the two rings */

struct virtq_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};
struct virtq_packed_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t id, flags;
};
struct virtq_avail {
    uint16_t flags, idx, ring[]; /* then u16 used_event */
};
struct virtq_used_elem {
    uint32_t id, len;
};
struct virtq_used {
    uint16_t flags, idx;
    struct virtq_used_elem ring[]; /* then u16 avail_event */
};
struct virtq_event {
    uint16_t off_wrap, flags;
};

enum { BLK_IN = 0, BLK_OUT = 1, BLK_FLUSH = 4, BLK_GET_ID = 8, BLK_DISCARD = 11, BLK_ZEROES = 13 };
enum { BLK_OK = 0, BLK_IOERR = 1, BLK_UNSUPP = 2 };
enum { BLK_ID_BYTES = 20, BLK_ZEROES_UNMAP = 1 };

struct virtio_blk_head {
    uint32_t type, reserved;
    uint64_t sector;
};
struct virtio_blk_range {
    uint64_t sector;
    uint32_t sectors, flags;
};
struct virtio_blk_config {
    uint64_t capacity;
    uint32_t size_max, seg_max;
    uint16_t cylinders;
    uint8_t heads, sectors;
    uint32_t blk_size;
    uint8_t physical_exp, alignment_offset;
    uint16_t min_io;
    uint32_t opt_io;
    uint8_t writeback, unused0;
    uint16_t num_queues;
    uint32_t max_discard_sectors, max_discard_seg, discard_alignment;
    uint32_t max_zeroes_sectors, max_zeroes_seg;
    uint8_t zeroes_may_unmap, unused1[3];
} __attribute__((packed));

#endif
