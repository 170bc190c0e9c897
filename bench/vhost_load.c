/* SPDX-License-Identifier: MIT */
/*
 * A load generator for vhost-user-blk servers, with no guest in the way.
 *
 * One split ring in a memfd, `depth` requests in flight, each request's three descriptors set up
 * once.  It asks for an interrupt at the next request only when it has found none finished, as a
 * driver does.  With --pid it reads the server's processor time before and after.
 *
 * Shares no code with the server, so that a misreading of the protocol shows.
 */
#include <dirent.h>
#include <errno.h>
#include <getopt.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define NUM 256
#define DEPTH_MAX 64
#define GUEST 0x10000000ull
#define USER 0x7f0000000000ull
#define RINGS (1u << 16)

struct desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};
struct head {
    uint32_t type, reserved;
    uint64_t sector;
};
static struct {
    struct desc *desc;
    uint16_t *avail; /* flags, idx, ring, used_event */
    uint16_t *used;  /* flags, idx, elements of four, avail_event */
    uint8_t *memory;
    uint16_t avail_idx, used_idx;
    int kick, call;
} r;
static int sock;
static uint64_t rng = 88172645463325252ull, sectors, place;
static uint32_t block = 4096;
static bool writing, sequential;

static void die(const char *what) {
    fprintf(stderr, "vhost_load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void message(uint32_t request, const void *payload, uint32_t len, int fd) {
    uint32_t head[3] = {request, 1, len};
    struct iovec v[2] = {{head, sizeof(head)}, {(void *)payload, len}};
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    struct msghdr h = {.msg_iov = v, .msg_iovlen = 2};
    if (fd >= 0) {
        h.msg_control = control.bytes;
        h.msg_controllen = sizeof(control.bytes);
        struct cmsghdr *c = CMSG_FIRSTHDR(&h);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &fd, sizeof(int));
    }
    if (sendmsg(sock, &h, MSG_NOSIGNAL) != (ssize_t)(sizeof(head) + len))
        die("send");
}

static void answer(void *payload, size_t len) {
    uint32_t head[3];
    if (recv(sock, head, sizeof(head), MSG_WAITALL) != sizeof(head) || head[2] > len ||
        recv(sock, payload, head[2], MSG_WAITALL) != (ssize_t)head[2])
        die("receive");
}

static uint64_t ask(uint32_t request) {
    uint64_t v = 0;
    message(request, NULL, 0, -1);
    answer(&v, sizeof(v));
    return v;
}

/* Features that matter here: version 1, event index, flush, protocol features. */
static void set_up(const char *path, size_t bytes) {
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    snprintf(sa.sun_path, sizeof(sa.sun_path), "%s", path);
    sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(sock, (struct sockaddr *)&sa, sizeof(sa)) < 0)
        die(path);
    uint64_t want = ask(1) & (1ull << 32 | 1ull << 30 | 1ull << 29 | 1ull << 9);
    message(3, NULL, 0, -1);
    uint64_t protocol = ask(15) & (1ull << 0 | 1ull << 9);
    message(16, &protocol, 8, -1);
    message(2, &want, 8, -1);
    struct {
        uint32_t offset, size, flags;
        uint8_t bytes[60];
    } config = {.size = 60};
    message(24, &config, sizeof(config), -1);
    answer(&config, sizeof(config));
    memcpy(&sectors, config.bytes, 8);
    int fd = memfd_create("memory", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || ftruncate(fd, (off_t)bytes) < 0)
        die("memory");
    r.memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (r.memory == MAP_FAILED)
        die("memory");
    uint64_t table[5] = {1, GUEST, bytes, USER, 0};
    message(5, table, sizeof(table), fd);
    r.desc = (void *)r.memory;
    r.avail = (void *)(r.memory + 16384);
    r.used = (void *)(r.memory + 32768);
    r.kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    r.call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    uint32_t num[2] = {0, NUM}, base[2] = {0, 0}, enable[2] = {0, 1};
    uint64_t addr[5] = {0, USER, USER + 32768, USER + 16384, 0}, index = 0;
    message(8, num, 8, -1);
    message(10, base, 8, -1);
    message(9, addr, sizeof(addr), -1);
    message(12, &index, 8, r.kick);
    message(13, &index, 8, r.call);
    message(18, enable, 8, -1);
}

static size_t data_at(unsigned slot) {
    return RINGS + (size_t)slot * block;
}

static size_t heads_at(void) {
    return data_at(DEPTH_MAX);
}

static struct head *head_of(unsigned slot) {
    return (struct head *)(r.memory + heads_at() + slot * 64);
}

static void prepare(unsigned slot) {
    size_t head = heads_at() + slot * 64;
    unsigned d = 3 * slot;
    r.desc[d] = (struct desc){GUEST + head, 16, 1, (uint16_t)(d + 1)};
    r.desc[d + 1] = (struct desc){GUEST + data_at(slot), block, writing ? 1 : 3, (uint16_t)(d + 2)};
    r.desc[d + 2] = (struct desc){GUEST + head + 32, 1, 2, 0};
}

static void submit(unsigned slot) {
    uint64_t blocks = sectors * 512 / block;
    rng ^= rng << 13, rng ^= rng >> 7, rng ^= rng << 17;
    uint64_t b = sequential ? place++ % blocks : rng % blocks;
    *head_of(slot) = (struct head){writing, 0, b * (block / 512)};
    r.memory[heads_at() + slot * 64 + 32] = 0xff;
    r.avail[2 + r.avail_idx++ % NUM] = (uint16_t)(3 * slot);
}

/* Shows the server what was submitted, and wakes it when it asks for that. */
static void publish(uint16_t old) {
    __atomic_store_n(&r.avail[1], r.avail_idx, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    uint16_t event = __atomic_load_n(&r.used[2 + 4 * NUM], __ATOMIC_ACQUIRE);
    uint64_t one = 1;
    if ((uint16_t)(r.avail_idx - event - 1) < (uint16_t)(r.avail_idx - old) &&
        write(r.kick, &one, 8) != 8)
        die("kick");
}

/* Everything that has come back is submitted again; how many. */
static unsigned turn(void) {
    uint16_t done = __atomic_load_n(&r.used[1], __ATOMIC_ACQUIRE), old = r.avail_idx;
    unsigned n = 0;
    for (; r.used_idx != done; r.used_idx++, n++) {
        uint32_t id;
        memcpy(&id, &r.used[2 + 4 * (r.used_idx % NUM)], 4);
        unsigned slot = id / 3;
        if (slot >= DEPTH_MAX || r.memory[heads_at() + slot * 64 + 32]) {
            fprintf(stderr, "vhost_load: a request failed\n");
            exit(1);
        }
        submit(slot);
    }
    if (n)
        publish(old);
    return n;
}

static void sleep_for_one(void) {
    r.avail[2 + NUM] = r.used_idx; /* used_event: tell me of the next */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (__atomic_load_n(&r.used[1], __ATOMIC_ACQUIRE) != r.used_idx)
        return;
    struct pollfd p = {.fd = r.call, .events = POLLIN};
    if (poll(&p, 1, 10000) == 0) {
        fprintf(stderr, "vhost_load: nothing for ten seconds\n");
        exit(1);
    }
    uint64_t count;
    if (read(r.call, &count, 8) < 0 && errno != EAGAIN)
        die("call");
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* Of all threads, in seconds; schedstat counts nanoseconds, stat only clock ticks. */
static double processor_time(int pid) {
    char path[300];
    snprintf(path, sizeof(path), "/proc/%d/task", pid);
    DIR *d = opendir(path);
    double sum = 0;
    for (struct dirent *t; d && (t = readdir(d));) {
        unsigned long long ns = 0;
        snprintf(path, sizeof(path), "/proc/%d/task/%s/schedstat", pid, t->d_name);
        FILE *f = fopen(path, "re");
        if (f && fscanf(f, "%llu", &ns) == 1)
            sum += (double)ns / 1e9;
        if (f)
            fclose(f);
    }
    if (d)
        closedir(d);
    return sum;
}

int main(int argc, char **argv) {
    static const struct option options[] = {
        {"socket", 1, 0, 'S'}, {"pid", 1, 0, 'p'}, {"json", 0, 0, 'j'}, {0, 0, 0, 0}};
    const char *path = NULL;
    unsigned depth = 32;
    double seconds = 2;
    int pid = 0;
    for (int c; (c = getopt_long(argc, argv, "d:b:t:rws", options, NULL)) != -1;) {
        switch (c) {
        case 'S':
            path = optarg;
            break;
        case 'p':
            pid = atoi(optarg);
            break;
        case 'd':
            depth = (unsigned)atoi(optarg);
            break;
        case 'b':
            block = (uint32_t)atoi(optarg);
            break;
        case 't':
            seconds = atof(optarg);
            break;
        case 'w':
            writing = true;
            break;
        case 's':
            sequential = true;
            break;
        case 'r':
        case 'j':
            break;
        default:
            return 2;
        }
    }
    if (!path || !depth || depth > DEPTH_MAX || block < 512 || block % 512 || block > 1 << 20) {
        fprintf(stderr,
                "usage: vhost_load --socket PATH [-d DEPTH] [-b BYTES] [-t SECONDS] [-r|-w] "
                "[-s] [--pid SERVER] [--json]\n");
        return 2;
    }
    set_up(path, heads_at() + DEPTH_MAX * 64 + 4096);
    for (unsigned i = 0; i < depth; i++) {
        prepare(i);
        submit(i);
    }
    publish(0);
    double start = 0, cpu = 0, warm = now() + seconds / 5;
    uint64_t done = 0;
    for (;;) {
        unsigned n = turn();
        if (!n)
            sleep_for_one();
        done += n;
        double t = now();
        if (!start && t >= warm) {
            start = t;
            done = 0;
            cpu = pid ? processor_time(pid) : 0;
        } else if (start && t >= start + seconds) {
            cpu = pid ? processor_time(pid) - cpu : 0;
            double iops = (double)done / (t - start);
            printf("{\"iops\": %.0f, \"mb_s\": %.1f, \"server_us\": %.3f}\n", iops,
                   iops * block / 1e6, done ? cpu / (double)done * 1e6 : 0);
            return 0;
        }
    }
}
