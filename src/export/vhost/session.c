/* SPDX-License-Identifier: MIT */
/*
 * One front end's messages.  Each handler returns 0, or -errno with what is wrong; a reply is sent
 * when the request has one, or when the front end asked to be told (REPLY_ACK).  Descriptors that a
 * message brought and no handler kept are closed.
 */
#include "export/vhost/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#include "base/ck.h"
#include "base/err.h"
#include "base/log.h"
#include "disk/node.h"
#include "runtime/loop.h"

struct message {
    struct vhost_head head;
    union vhost_payload p;
    int fd[VHOST_FDS_MAX];
    int nfd;
    bool replies; /* the request has an answer of its own: p, of head.size bytes */
    int reply_fd; /* goes along with it; -1 none */
};

/* ---------------------------------------------------------------- the socket */

static void close_fds(struct message *m) {
    while (m->nfd)
        close(m->fd[--m->nfd]);
}

static void collect_fds(struct message *m, struct msghdr *h) {
    for (struct cmsghdr *c = CMSG_FIRSTHDR(h); c; c = CMSG_NXTHDR(h, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < n; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
            if (m->nfd < VHOST_FDS_MAX)
                m->fd[m->nfd++] = fd;
            else
                close(fd);
        }
    }
}

/* `len` bytes; descriptors may come with any of them.  0: the front end has gone. */
static int receive_co(struct vhost_server *s, struct message *m, void *to, size_t len) {
    size_t got = 0;
    while (got < len) {
        union {
            char bytes[CMSG_SPACE(VHOST_FDS_MAX * sizeof(int))];
            struct cmsghdr align;
        } control;
        struct iovec v = {(uint8_t *)to + got, len - got};
        struct msghdr h = {.msg_iov = &v,
                           .msg_iovlen = 1,
                           .msg_control = control.bytes,
                           .msg_controllen = sizeof(control.bytes)};
        ssize_t n = s->stopping ? 0 : recvmsg(s->fd, &h, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (n > 0) {
            collect_fds(m, &h);
            got += (size_t)n;
        } else if (n == 0) {
            return got ? -EPROTO : 0;
        } else if (errno == EAGAIN) {
            int ev = loop_poll_co(s->fd, POLLIN, -1);
            if (ev < 0 && ev != -ECANCELED)
                return ev;
        } else if (errno != EINTR) {
            return -errno;
        }
    }
    return 1;
}

static int reply_co(struct vhost_server *s, struct message *m) {
    m->head.flags = VHOST_VERSION | VHOST_FLAG_REPLY;
    struct iovec v[2] = {{&m->head, sizeof(m->head)}, {&m->p, m->head.size}};
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    struct msghdr h = {.msg_iov = v, .msg_iovlen = 2};
    if (m->reply_fd >= 0) {
        h.msg_control = control.bytes;
        h.msg_controllen = sizeof(control.bytes);
        struct cmsghdr *c = CMSG_FIRSTHDR(&h);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &m->reply_fd, sizeof(int));
    }
    if (s->stopping) /* nobody would end the wait for one that does not read */
        return -ECANCELED;
    ssize_t n = loop_sendmsg_co(s->fd, &h, MSG_NOSIGNAL);
    return n == (ssize_t)(sizeof(m->head) + m->head.size) ? 0 : n < 0 ? (int)n : -EPIPE;
}

/* ---------------------------------------------------------------- what we are */

static uint64_t our_features(const struct vhost_server *s) {
    uint64_t f =
        1ull << VIRTIO_BLK_F_SEG_MAX | 1ull << VIRTIO_BLK_F_BLK_SIZE | 1ull << VIRTIO_BLK_F_FLUSH |
        1ull << VIRTIO_BLK_F_TOPOLOGY | 1ull << VIRTIO_BLK_F_CONFIG_WCE | 1ull << VIRTIO_BLK_F_MQ |
        1ull << VIRTIO_F_INDIRECT_DESC | 1ull << VIRTIO_F_EVENT_IDX | 1ull << VIRTIO_F_VERSION_1 |
        1ull << VIRTIO_F_RING_PACKED | 1ull << VHOST_F_PROTOCOL_FEATURES;
    if (s->base.read_only)
        return f | 1ull << VIRTIO_BLK_F_RO;
    return f | 1ull << VIRTIO_BLK_F_DISCARD | 1ull << VIRTIO_BLK_F_WRITE_ZEROES;
}

static uint64_t our_protocol(void) {
    return 1ull << VHOST_PROTOCOL_MQ | 1ull << VHOST_PROTOCOL_REPLY_ACK |
           1ull << VHOST_PROTOCOL_CONFIG | 1ull << VHOST_PROTOCOL_INFLIGHT |
           1ull << VHOST_PROTOCOL_RESET_DEVICE | 1ull << VHOST_PROTOCOL_MEM_SLOTS;
}

static struct virtio_blk_config our_config(const struct vhost_server *s) {
    uint32_t block = s->o.block_size, unit = node_subunit(s->base.node) / 512;
    return (struct virtio_blk_config){
        .capacity = s->capacity,
        .seg_max = SEGMENTS,
        .blk_size = block,
        .min_io = 1,
        .opt_io = 1,
        .writeback = s->writeback,
        .num_queues = (uint16_t)s->o.queues,
        .max_discard_sectors = RANGE_SECTORS,
        .max_discard_seg = RANGES_MAX,
        .discard_alignment = unit ? unit : 1,
        .max_zeroes_sectors = RANGE_SECTORS,
        .max_zeroes_seg = RANGES_MAX,
        .zeroes_may_unmap = 1,
    };
}

static int get_config(struct vhost_server *s, struct message *m, struct err *e) {
    uint8_t all[VHOST_CONFIG_MAX] = {0};
    struct virtio_blk_config c = our_config(s);
    memcpy(all, &c, sizeof(c));
    uint32_t offset = m->p.config.offset, size = m->p.config.size;
    m->replies = true;
    if (size > sizeof(all) || offset > sizeof(all) - size || m->head.size < 12 + size) {
        m->head.size = 0; /* the protocol's way to say no */
        return 0;
    }
    memcpy(m->p.config.bytes, all + offset, size);
    return 0;
}

/* The one field that a driver may write. */
static int set_config(struct vhost_server *s, struct message *m, struct err *e) {
    if (m->p.config.offset != offsetof(struct virtio_blk_config, writeback) ||
        m->p.config.size != 1 || m->head.size < 13)
        return err_set(e, EINVAL, "a write of %u bytes at %u of the configuration",
                       m->p.config.size, m->p.config.offset);
    s->writeback = m->p.config.bytes[0];
    return 0;
}

/* ---------------------------------------------------------------- rings */

static struct vhost_queue *queue_of(struct vhost_server *s, uint64_t index, struct err *e) {
    if (index < s->o.queues)
        return &s->queue[index];
    err_set(e, EINVAL, "queue %llu of %u", (unsigned long long)index, s->o.queues);
    return NULL;
}

static void replace_fd(int *fd, int with) {
    if (*fd >= 0)
        close(*fd);
    *fd = with;
}

/* The queue is held. */
static void forget_queue(struct vhost_queue *q) {
    replace_fd(&q->kick, -1);
    replace_fd(&q->call, -1);
    replace_fd(&q->error, -1);
    q->have_addr = q->enabled = q->broken = false;
    q->base = 0;
    memset(&q->ring, 0, sizeof(q->ring));
}

static int set_vring_num_co(struct vhost_server *s, struct message *m, struct err *e) {
    struct vhost_queue *q = queue_of(s, m->p.state.index, e);
    uint32_t num = m->p.state.num;
    if (!q)
        return -EINVAL;
    if (!num || num > RING_SIZE_MAX || (!is_pow2(num) && !vhost_has(s, VIRTIO_F_RING_PACKED)))
        return err_set(e, EINVAL, "a ring of %u entries (at most %d)", num, RING_SIZE_MAX);
    vhost_queue_hold_co(q);
    q->ring.num = (uint16_t)num;
    vhost_queue_release(q);
    return 0;
}

static int set_vring_addr_co(struct vhost_server *s, struct message *m, struct err *e) {
    struct vhost_queue *q = queue_of(s, m->p.addr.index, e);
    if (!q)
        return -EINVAL;
    vhost_queue_hold_co(q);
    q->desc = m->p.addr.desc;
    q->avail = m->p.addr.avail;
    q->used = m->p.addr.used;
    q->have_addr = true;
    q->broken = false;
    vhost_queue_release(q);
    return 0;
}

static int set_vring_base_co(struct vhost_server *s, struct message *m, struct err *e) {
    struct vhost_queue *q = queue_of(s, m->p.state.index, e);
    if (!q)
        return -EINVAL;
    vhost_queue_hold_co(q);
    q->base = m->p.state.num;
    if (vhost_has(s, VIRTIO_F_RING_PACKED) && q->base < 0x10000)
        q->base |= q->base << 16; /* nothing in flight: both indexes are the same */
    vhost_queue_release(q);
    return 0;
}

static int get_vring_base_co(struct vhost_server *s, struct message *m, struct err *e) {
    struct vhost_queue *q = queue_of(s, m->p.state.index, e);
    if (!q)
        return -EINVAL;
    vhost_queue_hold_co(q);
    replace_fd(&q->kick, -1);
    replace_fd(&q->call, -1);
    vhost_queue_release(q);
    m->p.state.num = q->base;
    m->head.size = sizeof(m->p.state);
    m->replies = true;
    return 0;
}

/* Takes the message's descriptor; -1 when it says that there is none. */
static int take_fd(struct message *m, struct err *e) {
    if (m->p.u64 & VHOST_VRING_NOFD)
        return -1;
    if (m->nfd != 1) {
        err_set(e, EINVAL, "%d descriptors where one belongs", m->nfd);
        return -2;
    }
    struct stat st;
    int fd = m->fd[0], flags = fcntl(fd, F_GETFL);
    /* Eventfds have no type.  Of anything else a read could wait, or be ready for ever. */
    if (fstat(fd, &st) < 0 || (st.st_mode & S_IFMT && !S_ISFIFO(st.st_mode))) {
        err_set(e, EINVAL, "a ring's descriptor that is no eventfd");
        return -2;
    }
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0) {
        err_errno(e, errno, "a ring's descriptor");
        return -2;
    }
    m->nfd = 0;
    return fd;
}

static int set_vring_fd_co(struct vhost_server *s, struct message *m, struct err *e) {
    struct vhost_queue *q = queue_of(s, m->p.u64 & VHOST_VRING_INDEX, e);
    int fd = q ? take_fd(m, e) : -2;
    if (fd < -1)
        return err_status(e);
    if (m->head.request == VHOST_SET_VRING_CALL) {
        replace_fd(&q->call, fd);
    } else if (m->head.request == VHOST_SET_VRING_ERR) {
        replace_fd(&q->error, fd);
    } else {
        vhost_queue_hold_co(q);
        replace_fd(&q->kick, fd);
        q->broken = false;
        if (!(s->features >> VHOST_F_PROTOCOL_FEATURES & 1))
            q->enabled = true;
        vhost_queue_release(q);
        if (fd < 0)
            return err_set(e, ENOTSUP, "a ring that is polled instead of kicked");
    }
    return 0;
}

static int set_vring_enable_co(struct vhost_server *s, struct message *m, struct err *e) {
    struct vhost_queue *q = queue_of(s, m->p.state.index, e);
    if (!q)
        return -EINVAL;
    if (q->enabled == (m->p.state.num != 0))
        return 0;
    vhost_queue_hold_co(q);
    q->enabled = m->p.state.num;
    vhost_queue_release(q);
    return 0;
}

/* ---------------------------------------------------------------- memory */

static int set_mem_table_co(struct vhost_server *s, struct message *m, struct err *e) {
    if (m->head.size < 8 || m->p.table.n > VHOST_FDS_MAX || (int)m->p.table.n != m->nfd ||
        m->head.size < 8 + m->p.table.n * sizeof(struct vhost_region))
        return err_set(e, EINVAL, "%u memory regions with %d descriptors", m->p.table.n, m->nfd);
    int rc = 0;
    vhost_hold_all_co(s);
    memory_clear(&s->memory);
    for (uint32_t i = 0; i < m->p.table.n && rc == 0; i++)
        rc = memory_add(&s->memory, &m->p.table.v[i], m->fd[i], e);
    vhost_release_all(s);
    return rc;
}

static int add_mem_reg_co(struct vhost_server *s, struct message *m, struct err *e) {
    if (m->nfd != 1)
        return err_set(e, EINVAL, "a memory region with %d descriptors", m->nfd);
    vhost_hold_all_co(s);
    int rc = memory_add(&s->memory, &m->p.slot.region, m->fd[0], e);
    vhost_release_all(s);
    return rc;
}

static int rem_mem_reg_co(struct vhost_server *s, struct message *m, struct err *e) {
    vhost_hold_all_co(s);
    int rc = memory_remove(&s->memory, &m->p.slot.region, e);
    /* A ring that lay in it stops with a message; the others go on. */
    vhost_release_all(s);
    return rc;
}

/* ---------------------------------------------------------------- in flight */

static void forget_inflight(struct vhost_server *s) {
    memory_unmap(&s->inflight);
    s->inflight_bytes = 0;
}

static int check_inflight(const struct vhost_server *s, const struct message *m, size_t *bytes,
                          struct err *e) {
    uint16_t queues = m->p.inflight.queues, size = m->p.inflight.queue_size;
    if (!queues || queues > s->o.queues || !size || size > RING_SIZE_MAX)
        return err_set(e, EINVAL, "in-flight memory for %u queues of %u", queues, size);
    *bytes = queues * vhost_inflight_bytes(size);
    return 0;
}

/* Rings that run have pointers into the old one. */
static int map_inflight_co(struct vhost_server *s, const struct message *m, int fd, size_t bytes,
                           uint64_t offset, struct err *e) {
    struct memory_map map;
    int rc = memory_map(fd, offset, bytes, &map, e);
    if (rc < 0)
        return err_prefix(e, "in-flight memory");
    vhost_hold_all_co(s);
    forget_inflight(s);
    s->inflight = map;
    s->inflight_bytes = bytes;
    s->inflight_size = m->p.inflight.queue_size;
    vhost_release_all(s);
    return 0;
}

static int get_inflight_co(struct vhost_server *s, struct message *m, struct err *e) {
    size_t bytes = 0;
    int rc = check_inflight(s, m, &bytes, e);
    if (rc < 0)
        return rc;
    int fd = memfd_create("strata-inflight", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return err_errno(e, errno, "in-flight memory");
    if (ftruncate(fd, (off_t)bytes) < 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) < 0)
        rc = err_errno(e, errno, "in-flight memory");
    if (rc == 0)
        rc = map_inflight_co(s, m, fd, bytes, 0, e);
    if (rc < 0) {
        close(fd);
        return rc;
    }
    m->p.inflight.size = bytes;
    m->p.inflight.offset = 0;
    m->head.size = 24;
    m->replies = true;
    m->reply_fd = fd;
    return 0;
}

/* It must not shrink under us: only memory that is sealed against it is taken. */
static int set_inflight_co(struct vhost_server *s, struct message *m, struct err *e) {
    size_t bytes = 0;
    int rc = check_inflight(s, m, &bytes, e);
    if (rc < 0)
        return rc;
    struct stat st;
    if (m->nfd != 1)
        return err_set(e, EINVAL, "in-flight memory with %d descriptors", m->nfd);
    int seals = fcntl(m->fd[0], F_GET_SEALS);
    if (seals < 0 || !(seals & F_SEAL_SHRINK) || fstat(m->fd[0], &st) < 0)
        return err_set(e, EINVAL, "in-flight memory that is not sealed against shrinking");
    if (m->p.inflight.size < bytes || m->p.inflight.offset > (uint64_t)st.st_size ||
        (uint64_t)st.st_size - m->p.inflight.offset < bytes)
        return err_set(e, EINVAL, "in-flight memory of %llu bytes, %zu needed",
                       (unsigned long long)m->p.inflight.size, bytes);
    return map_inflight_co(s, m, m->fd[0], bytes, m->p.inflight.offset, e);
}

/* ---------------------------------------------------------------- dispatch */

static void reply_u64(struct message *m, uint64_t v) {
    m->p.u64 = v;
    m->head.size = sizeof(uint64_t);
    m->replies = true;
}

static int set_features_co(struct vhost_server *s, struct message *m, struct err *e) {
    if (m->p.u64 & ~our_features(s))
        return err_set(e, EINVAL, "features %#llx that were not offered",
                       (unsigned long long)(m->p.u64 & ~our_features(s)));
    vhost_hold_all_co(s);
    s->features = m->p.u64;
    vhost_release_all(s);
    return 0;
}

static void reset_co(struct vhost_server *s) {
    vhost_hold_all_co(s);
    for (unsigned i = 0; i < s->o.queues; i++)
        forget_queue(&s->queue[i]);
    s->features = 0;
    s->writeback = true;
    vhost_release_all(s);
}

/* The least payload that each request has. */
static uint32_t payload_least(uint32_t request) {
    switch (request) {
    case VHOST_SET_FEATURES:
    case VHOST_SET_PROTOCOL_FEATURES:
    case VHOST_SET_VRING_KICK:
    case VHOST_SET_VRING_CALL:
    case VHOST_SET_VRING_ERR:
    case VHOST_SET_VRING_NUM:
    case VHOST_SET_VRING_BASE:
    case VHOST_GET_VRING_BASE:
    case VHOST_SET_VRING_ENABLE:
    case VHOST_SET_MEM_TABLE:
        return 8;
    case VHOST_SET_VRING_ADDR:
    case VHOST_ADD_MEM_REG:
    case VHOST_REM_MEM_REG:
        return 40;
    case VHOST_GET_CONFIG:
    case VHOST_SET_CONFIG:
        return 12;
    case VHOST_GET_INFLIGHT_FD:
    case VHOST_SET_INFLIGHT_FD:
        return 20;
    default:
        return 0;
    }
}

static int handle_co(struct vhost_server *s, struct message *m, struct err *e) {
    if (m->head.size < payload_least(m->head.request))
        return err_set(e, EINVAL, "request %u with %u bytes", m->head.request, m->head.size);
    switch (m->head.request) {
    case VHOST_GET_FEATURES:
        reply_u64(m, our_features(s));
        return 0;
    case VHOST_SET_FEATURES:
        return set_features_co(s, m, e);
    case VHOST_GET_PROTOCOL_FEATURES:
        reply_u64(m, our_protocol());
        return 0;
    case VHOST_SET_PROTOCOL_FEATURES:
        s->protocol = m->p.u64 & our_protocol();
        return m->p.u64 == s->protocol ? 0 : err_set(e, EINVAL, "unknown protocol features");
    case VHOST_GET_QUEUE_NUM:
        reply_u64(m, s->o.queues);
        return 0;
    case VHOST_GET_MAX_MEM_SLOTS:
        reply_u64(m, MEMORY_REGIONS_MAX);
        return 0;
    case VHOST_SET_OWNER:
        return 0;
    case VHOST_RESET_OWNER:
    case VHOST_RESET_DEVICE:
        reset_co(s);
        return 0;
    case VHOST_SET_MEM_TABLE:
        return set_mem_table_co(s, m, e);
    case VHOST_ADD_MEM_REG:
        return add_mem_reg_co(s, m, e);
    case VHOST_REM_MEM_REG:
        return rem_mem_reg_co(s, m, e);
    case VHOST_SET_VRING_NUM:
        return set_vring_num_co(s, m, e);
    case VHOST_SET_VRING_ADDR:
        return set_vring_addr_co(s, m, e);
    case VHOST_SET_VRING_BASE:
        return set_vring_base_co(s, m, e);
    case VHOST_GET_VRING_BASE:
        return get_vring_base_co(s, m, e);
    case VHOST_SET_VRING_KICK:
    case VHOST_SET_VRING_CALL:
    case VHOST_SET_VRING_ERR:
        return set_vring_fd_co(s, m, e);
    case VHOST_SET_VRING_ENABLE:
        return set_vring_enable_co(s, m, e);
    case VHOST_GET_CONFIG:
        return get_config(s, m, e);
    case VHOST_SET_CONFIG:
        return set_config(s, m, e);
    case VHOST_GET_INFLIGHT_FD:
        return get_inflight_co(s, m, e);
    case VHOST_SET_INFLIGHT_FD:
        return set_inflight_co(s, m, e);
    default:
        return err_set(e, ENOTSUP, "request %u, which was not offered", m->head.request);
    }
}

/* 1: go on, 0: the front end has gone, -errno: it broke the protocol. */
static int serve_one_co(struct vhost_server *s, struct message *m) {
    struct err e AUTO_ERR = ERR_INIT;
    m->nfd = 0;
    m->replies = false;
    m->reply_fd = -1;
    int rc = receive_co(s, m, &m->head, sizeof(m->head));
    if (rc <= 0)
        return rc;
    if ((m->head.flags & VHOST_VERSION_MASK) != VHOST_VERSION || m->head.size > sizeof(m->p)) {
        log_msg(LOG_LV_WARN, "vhost-user: a message of %u bytes with flags %#x", m->head.size,
                m->head.flags);
        return -EPROTO;
    }
    memset(&m->p, 0, sizeof(m->p));
    if (m->head.size && (rc = receive_co(s, m, &m->p, m->head.size)) <= 0)
        return rc ? rc : -EPROTO;
    bool tell =
        m->head.flags & VHOST_FLAG_NEED_REPLY && s->protocol >> VHOST_PROTOCOL_REPLY_ACK & 1;
    rc = handle_co(s, m, &e);
    if (rc < 0)
        log_msg(LOG_LV_WARN, "vhost-user: %s", err_text(&e));
    if (m->replies || tell) {
        int result = rc;
        if (!m->replies)
            reply_u64(m, rc < 0);
        rc = reply_co(s, m);
        if (rc == 0 && result < 0 && !tell)
            rc = result;
    }
    if (m->reply_fd >= 0)
        close(m->reply_fd);
    return rc < 0 ? rc : 1;
}

void vhost_session_co(struct vhost_server *s) {
    struct message *m = calloc(1, sizeof(*m));
    int rc = m ? 1 : -ENOMEM;
    while (rc > 0) {
        rc = serve_one_co(s, m);
        if (m->nfd)
            close_fds(m);
    }
    if (rc < 0)
        log_msg(LOG_LV_WARN, "vhost-user: the session ended: %s", strerror(-rc));
    free(m);
    reset_co(s);
    s->protocol = 0;
    memory_clear(&s->memory);
    forget_inflight(s);
}
