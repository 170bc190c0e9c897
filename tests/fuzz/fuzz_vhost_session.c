/* SPDX-License-Identifier: MIT */
/*
 * What a front end may send to the vhost-user server, and what may lie in its memory.
 *
 * The first byte chooses what surrounds the rest: bit 0, a handshake made here comes first, so that
 * there is a ring of eight that runs; bit 1, read-only; bit 2, qcow2 instead of raw; bit 3, the
 * handshake hands in-flight memory over; bit 4, the storage lets other requests in between; bit 5,
 * and some of its writes fail; bit 6, the handshake's ring is packed; bit 7, the export is paused
 * in between, and taken away under its front end at the end.
 *
 * Then messages: request, how (bit 0 asks for an answer, bit 1 a wrong version, bits 2-3 which
 * descriptors, bits 4-7 how many), length, payload.  Requests from 0xfc on are none: KICK, PATCH
 * (the next records go to memory), SHRINK (the memory's file), CUT (the next message breaks off).
 * Behind "MEM1" records: be16 offset, length, bytes, that are put into the memory; one of length 0
 * ends what is put there at once.  Those that are left come at the end, each followed by a kick.
 *
 * Invariants: the server answers or hangs up, and is done soon after the front end has; no
 * descriptor is left; a second front end is then served; the disk keeps its size.
 */
#include "flaky.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include "export/export.h"
#include "export/vhost/proto.h"
#include "export/vhost/server.h"

#define DISK_BYTES (256 * KIB)
#define MEMORY_BYTES (64 * KIB)
#define GUEST 0x10000
#define USER 0x200000
#define RING_NUM 8
#define MEMORY_MARK "MEM1"
#define MESSAGES_MAX 300

enum { DESC_AT = 0, AVAIL_AT = 0x1000, USED_AT = 0x2000 };
enum { CUT = 0xfc, SHRINK, PATCH, KICK };

struct session {
    struct prog messages, memory;
    unsigned mode;
    int fd, kick, call, pipe_end, guest, inflight;
    uint8_t *mem;
    bool gone, drained;
};

/* ---------------------------------------------------------------- the front end */

static unsigned descriptors(void) {
    unsigned n = 0;
    DIR *d = opendir("/proc/self/fd");
    while (readdir(d))
        n++;
    closedir(d);
    return n;
}

static void patch(struct session *s) {
    while (prog_more(&s->memory)) {
        size_t at = prog_u16(&s->memory), len = prog_u8(&s->memory);
        if (!len)
            return;
        for (; len; len--, at++) {
            uint8_t byte = prog_u8(&s->memory);
            if (at < MEMORY_BYTES)
                __atomic_store_n(&s->mem[at], byte, __ATOMIC_RELAXED);
        }
    }
}

static void kick_co(struct session *s) {
    eventfd_write(s->kick, 1);
    for (int i = 0; i < 3; i++)
        task_yield_co();
}

static void send_co(struct session *s, const void *bytes, size_t len, const int *fds, unsigned n) {
    union {
        char bytes[CMSG_SPACE(16 * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec v = {(void *)bytes, len};
    struct msghdr h = {.msg_iov = &v, .msg_iovlen = 1};
    if (n) {
        h.msg_control = control.bytes;
        h.msg_controllen = CMSG_SPACE(n * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&h);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(n * sizeof(int));
        memcpy(CMSG_DATA(c), fds, n * sizeof(int));
    }
    if (!s->gone && loop_sendmsg_co(s->fd, &h, MSG_NOSIGNAL) != (ssize_t)len)
        s->gone = true;
}

static void message_co(struct session *s, uint32_t request, uint32_t flags, const void *payload,
                       uint32_t size, int fd) {
    uint8_t bytes[512];
    struct vhost_head head = {request, flags, size};
    memcpy(bytes, &head, sizeof(head));
    memcpy(bytes + sizeof(head), payload, size);
    send_co(s, bytes, sizeof(head) + size, &fd, fd >= 0);
}

static void set_u64_co(struct session *s, uint32_t request, uint64_t v, int fd) {
    message_co(s, request, VHOST_VERSION, &v, sizeof(v), fd);
}

static void set_state_co(struct session *s, uint32_t request, uint32_t num) {
    uint32_t v[2] = {0, num};
    message_co(s, request, VHOST_VERSION, v, sizeof(v), -1);
}

static void handshake_co(struct session *s) {
    bool packed = s->mode & 64;
    uint64_t features = 1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_F_INDIRECT_DESC |
                        1ull << VIRTIO_F_EVENT_IDX | 1ull << VIRTIO_BLK_F_FLUSH |
                        1ull << VHOST_F_PROTOCOL_FEATURES |
                        (packed ? 1ull << VIRTIO_F_RING_PACKED : 0);
    struct {
        uint32_t n, padding;
        struct vhost_region r;
    } table = {1, 0, {GUEST, MEMORY_BYTES, USER, 0}};
    struct {
        uint32_t index, flags;
        uint64_t desc, used, avail, log;
    } addr = {0, 0, USER + DESC_AT, USER + USED_AT, USER + AVAIL_AT, 0};
    struct {
        uint64_t size, offset;
        uint16_t queues, queue_size;
        uint32_t padding;
    } inflight = {4096, 0, 1, RING_NUM, 0};
    set_u64_co(s, VHOST_SET_PROTOCOL_FEATURES,
               1ull << VHOST_PROTOCOL_REPLY_ACK | 1ull << VHOST_PROTOCOL_CONFIG |
                   1ull << VHOST_PROTOCOL_INFLIGHT | 1ull << VHOST_PROTOCOL_MEM_SLOTS,
               -1);
    set_u64_co(s, VHOST_SET_FEATURES, features, -1);
    message_co(s, VHOST_SET_MEM_TABLE, VHOST_VERSION, &table, sizeof(table), s->guest);
    if (s->mode & 8)
        message_co(s, VHOST_SET_INFLIGHT_FD, VHOST_VERSION, &inflight, sizeof(inflight),
                   s->inflight);
    set_state_co(s, VHOST_SET_VRING_NUM, RING_NUM);
    set_state_co(s, VHOST_SET_VRING_BASE, packed ? 0x8000 : 0);
    message_co(s, VHOST_SET_VRING_ADDR, VHOST_VERSION, &addr, sizeof(addr), -1);
    set_u64_co(s, VHOST_SET_VRING_CALL, 0, s->call);
    set_u64_co(s, VHOST_SET_VRING_KICK, 0, s->kick);
    set_state_co(s, VHOST_SET_VRING_ENABLE, 1);
    for (int i = 0; i < 4; i++)
        task_yield_co();
}

/* One message of the input, of `most` bytes. */
static void input_message_co(struct session *s, uint8_t request, size_t most) {
    uint8_t bytes[sizeof(struct vhost_head) + 256];
    uint8_t how = prog_u8(&s->messages), size = prog_u8(&s->messages);
    struct vhost_head head = {
        request, (how & 2 ? 2u : VHOST_VERSION) | (how & 1 ? VHOST_FLAG_NEED_REPLY : 0), size};
    const int choice[4] = {s->guest, how & 16 ? s->kick : s->call, s->inflight, s->pipe_end};
    int fds[16];
    unsigned nfds = how >> 4;
    for (unsigned i = 0; i < nfds; i++)
        fds[i] = choice[how >> 2 & 3];
    memcpy(bytes, &head, sizeof(head));
    for (size_t i = 0; i < size; i++)
        bytes[sizeof(head) + i] = prog_u8(&s->messages);
    send_co(s, bytes, min_u64(sizeof(head) + size, most), fds, nfds);
}

static void front_co(void *arg) {
    struct session *s = arg;
    size_t most = SIZE_MAX;
    patch(s);
    if (s->mode & 1)
        handshake_co(s);
    for (unsigned i = 0; prog_more(&s->messages) && !s->gone && i < MESSAGES_MAX; i++) {
        uint8_t request = prog_u8(&s->messages);
        if (request == KICK) {
            kick_co(s);
        } else if (request == PATCH) {
            patch(s);
        } else if (request == SHRINK) {
            FUZZ_CHECK(ftruncate(s->guest, 0) == 0, "the memory cannot shrink");
            s->memory.p = s->memory.end; /* we must not touch it now, either */
        } else if (request == CUT) {
            most = prog_u8(&s->messages);
        } else {
            input_message_co(s, request, most);
            if (most != SIZE_MAX)
                break;
        }
    }
    kick_co(s);
    for (int i = 0; prog_more(&s->memory) && i < 50; i++) {
        patch(s);
        kick_co(s);
    }
    shutdown(s->fd, SHUT_WR);
}

static void drain_co(void *arg) {
    static uint8_t sink[4096];
    struct session *s = arg;
    while (loop_recv_co(s->fd, sink, sizeof(sink)) > 0) /* descriptors in it are lost with it */
        continue;
    s->gone = s->drained = true;
}

/* What control/ does to an export meanwhile. */
static void pause_co(void *arg) {
    struct export *x = arg;
    for (int i = 0; i < 4; i++) {
        for (int k = 0; k < 5; k++)
            task_yield_co();
        x->ops->pause_co(x);
        task_yield_co();
        x->ops->resume(x);
    }
}

/* ---------------------------------------------------------------- one session */

static int listen_somewhere(struct sockaddr_un *sa, socklen_t *len) {
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    *sa = (struct sockaddr_un){.sun_family = AF_UNIX};
    *len = sizeof(*sa);
    FUZZ_CHECK(fd >= 0 && bind(fd, (struct sockaddr *)sa, sizeof(sa_family_t)) == 0 &&
                   listen(fd, 8) == 0 && getsockname(fd, (struct sockaddr *)sa, len) == 0,
               "no listening socket");
    return fd;
}

static int connect_to(const struct sockaddr_un *sa, socklen_t len) {
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    FUZZ_CHECK(fd >= 0 && connect(fd, (const struct sockaddr *)sa, len) == 0, "no connection");
    return fd;
}

static int memory_file(const char *name, size_t bytes) {
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    FUZZ_CHECK(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0, "no memory file");
    return fd;
}

static void session_co(struct session *s, struct export *x, int fd) {
    struct task_group group;
    int p[2];
    s->fd = fd;
    s->kick = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    s->call = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    FUZZ_CHECK(pipe2(p, O_CLOEXEC) == 0, "no pipe");
    close(p[1]);
    s->pipe_end = p[0];
    s->guest = memory_file("guest", MEMORY_BYTES);
    s->inflight = memory_file("inflight", 4096);
    fcntl(s->inflight, F_ADD_SEALS, F_SEAL_SHRINK);
    s->mem = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, s->guest, 0);
    FUZZ_CHECK(s->mem != MAP_FAILED, "no memory");
    if (s->mode & 8) { /* its beginning is what the memory's end is */
        uint8_t some[64] = {0};
        for (size_t i = 0; i < sizeof(some) && prog_more(&s->memory); i++)
            some[i] = s->memory.end[-1 - (ptrdiff_t)(i % (size_t)(s->memory.end - s->memory.p))];
        FUZZ_CHECK(pwrite(s->inflight, some, sizeof(some), 8) == sizeof(some), "no memory");
    }
    task_group_init(&group);
    task_group_spawn(&group, loop_self(), drain_co, s);
    task_group_spawn(&group, loop_self(), front_co, s);
    if (s->mode & 128)
        task_group_spawn(&group, loop_self(), pause_co, x);
    task_group_wait_co(&group);
    munmap(s->mem, MEMORY_BYTES);
    close(s->fd);
    close(s->kick);
    close(s->call);
    close(s->pipe_end);
    close(s->guest);
    close(s->inflight);
}

static void second_front_co(int fd) {
    struct vhost_head head = {VHOST_GET_QUEUE_NUM, VHOST_VERSION, 0};
    struct session s = {.fd = fd};
    uint8_t answer[sizeof(head) + 8];
    size_t got = 0;
    send_co(&s, &head, sizeof(head), NULL, 0);
    while (got < sizeof(answer)) {
        ssize_t n = loop_recv_co(fd, answer + got, sizeof(answer) - got);
        FUZZ_CHECK(n > 0, "a second front end got only %zu bytes", got);
        got += (size_t)n;
    }
    FUZZ_CHECK(answer[sizeof(head)] == 2, "a second front end got a wrong answer");
    close(fd);
}

static struct node *disk_co(unsigned mode) {
    bool qcow2 = mode & 4;
    struct node *file = mode & 16 ? flaky_new_co(4 * MIB, 100, mode) : fuzz_memory_co(4 * MIB);
    struct node *n = NULL;
    struct open_req req = {.flags = OPEN_RW | OPEN_UNMAP};
    const struct driver *drv = driver_find(qcow2 ? "qcow2" : "raw");
    struct err e AUTO_ERR = ERR_INIT;
    int r = 0;
    if (qcow2) {
        json_t *o = json_pack("{s:i, s:i}", "size", (int)DISK_BYTES, "cluster_size", 4096);
        r = format_create_co(file, drv, o, &e);
        json_decref(o);
    } else {
        r = disk_resize_co(file, DISK_BYTES, PREALLOC_OFF, &e);
    }
    if (!r)
        r = node_open_on_co(file, drv, NULL, &req, &n, &e);
    FUZZ_CHECK(r == 0, "no disk: %s", err_text(&e));
    if (mode & 16 && mode & 32)
        flaky_fail(file, 7, 20);
    return n;
}

static void one_co(void *arg) {
    struct session *s = arg;
    struct vhost_server *server;
    struct sockaddr_un sa;
    socklen_t len;
    struct err e AUTO_ERR = ERR_INIT;
    struct node *n = disk_co(s->mode);
    struct vhost_server_opts o = {.name = "x",
                                  .node = n,
                                  .read_only = s->mode & 2,
                                  .queues = 2,
                                  .block_size = 512,
                                  .serial = "fuzz"};
    int listener = listen_somewhere(&sa, &len);
    FUZZ_CHECK(vhost_server_new(loop_self(), listener, &o, &server, &e) == 0, "server: %s",
               err_text(&e));
    struct export *x = vhost_server_export(server);
    int first = connect_to(&sa, len), second = connect_to(&sa, len);
    session_co(s, x, first);
    second_front_co(second);
    FUZZ_CHECK(x->ops->remove_co(x, true, &e) == 0, "remove: %s", err_text(&e));
    FUZZ_CHECK(n->size == DISK_BYTES, "the disk has %" PRIu64 " bytes now", n->size);
    FUZZ_CHECK(n->in_flight == 0, "requests are left in the engine");
    node_unref_co(n);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static unsigned open_before;
    if (!size)
        return 0;
    const uint8_t *end = data + size, *mark = memmem(data, size, MEMORY_MARK, 4);
    struct session s = {.messages = {data + 1, mark && mark > data ? mark : end},
                        .memory = {mark && mark > data ? mark + 4 : end, end},
                        .mode = data[0]};
    fuzz_run(one_co, &s);
    unsigned open_now = descriptors();
    FUZZ_CHECK(!open_before || open_now <= open_before, "%u descriptors before, %u now",
               open_before, open_now);
    open_before = open_now; /* of the first run: the loop's own */
    return 0;
}
