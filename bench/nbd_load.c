/* SPDX-License-Identifier: MIT */
/*
 * A load generator for NBD servers that costs the client as little as possible.
 *
 * Raw protocol over one unix or TCP socket, `depth` requests in flight, one thread: requests are
 * written together, replies parsed out of large reads, each answered request replaced by the next.
 * With --pid it reads the server's processor time before and after and prints it per request, which
 * is the figure that says what a server costs.
 *
 * Deliberately shares no code with the server, so that a misreading of the protocol shows.
 */
#include <endian.h>
#include <errno.h>
#include <dirent.h>
#include <getopt.h>
#include <inttypes.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define DEPTH_MAX 1024
#define RX_BYTES (1u << 20)
#define OP_READ 0
#define OP_WRITE 1

static int sock = -1;
static uint64_t disk_size;
static bool structured = true;
static uint64_t rng = 88172645463325252ull;

static void die(const char *what) {
    fprintf(stderr, "nbd_load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void die_text(const char *what) {
    fprintf(stderr, "nbd_load: %s\n", what);
    exit(1);
}

static void send_all(const void *p, size_t n) {
    while (n) {
        ssize_t k = send(sock, p, n, MSG_NOSIGNAL);
        if (k < 0)
            die("send");
        p = (const char *)p + k;
        n -= (size_t)k;
    }
}

static void recv_all(void *p, size_t n) {
    while (n) {
        ssize_t k = recv(sock, p, n, 0);
        if (k <= 0)
            die("recv");
        p = (char *)p + k;
        n -= (size_t)k;
    }
}

static uint32_t load32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, 4);
    return be32toh(v);
}

static uint64_t load64(const uint8_t *p) {
    uint64_t v;
    memcpy(&v, p, 8);
    return be64toh(v);
}

static void store(uint8_t *p, uint64_t v, int bytes) {
    for (int i = 0; i < bytes; i++)
        p[i] = (uint8_t)(v >> (8 * (bytes - 1 - i)));
}

/* ---------------------------------------------------------------- connecting */

static void connect_unix(const char *path) {
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(sa.sun_path))
        die_text("socket path too long");
    strcpy(sa.sun_path, path);
    sock = socket(AF_UNIX, SOCK_STREAM, 0);
    if (sock < 0 || connect(sock, (struct sockaddr *)&sa, sizeof(sa)) < 0)
        die(path);
}

static void connect_tcp(const char *host, const char *port) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list;
    if (getaddrinfo(host, port, &hints, &list) != 0)
        die_text("unknown host");
    sock = socket(list->ai_family, SOCK_STREAM, 0);
    if (sock < 0 || connect(sock, list->ai_addr, list->ai_addrlen) < 0)
        die(host);
    int on = 1;
    setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    freeaddrinfo(list);
}

static uint32_t option(uint32_t opt, const void *data, uint32_t len) {
    uint8_t h[16];
    memcpy(h, "IHAVEOPT", 8);
    store(h + 8, opt, 4);
    store(h + 12, len, 4);
    send_all(h, 16);
    send_all(data, len);
    for (;;) {
        uint8_t r[20], body[8192];
        recv_all(r, 20);
        uint32_t type = load32(r + 12), n = load32(r + 16);
        if (n > sizeof(body))
            die_text("option reply too long");
        recv_all(body, n);
        if (type == 3 && n >= 12 && body[0] == 0 && body[1] == 0)
            disk_size = load64(body + 2);
        if (type == 1 || type & 0x80000000)
            return type;
    }
}

static void handshake(const char *name) {
    uint8_t g[18], flags[4] = {0, 0, 0, 3};
    recv_all(g, 18);
    if (memcmp(g, "NBDMAGICIHAVEOPT", 16) != 0)
        die_text("no newstyle greeting");
    send_all(flags, 4);
    if (structured && option(8, NULL, 0) != 1)
        structured = false;
    uint8_t go[4096];
    size_t n = strlen(name);
    if (n > 4000)
        die_text("export name too long");
    store(go, n, 4);
    memcpy(go + 4, name, n);
    store(go + 4 + n, 0, 2);
    if (option(7, go, (uint32_t)(6 + n)) != 1)
        die_text("the server refused the export");
}

/* ---------------------------------------------------------------- measuring */

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Processor time of all threads of `pid` so far, from the scheduler's own books. */
static int64_t cpu_ns(int pid) {
    char path[320];
    snprintf(path, sizeof(path), "/proc/%d/task", pid);
    DIR *d = opendir(path);
    if (!d)
        die(path);
    int64_t sum = 0;
    for (struct dirent *e; (e = readdir(d));) {
        if (e->d_name[0] == '.')
            continue;
        snprintf(path, sizeof(path), "/proc/%d/task/%s/schedstat", pid, e->d_name);
        FILE *f = fopen(path, "r");
        int64_t ns;
        if (f && fscanf(f, "%" SCNd64, &ns) == 1)
            sum += ns;
        if (f)
            fclose(f);
    }
    closedir(d);
    return sum;
}

/* ---------------------------------------------------------------- the load */

struct load {
    unsigned depth, block;
    bool sequential;
    int op;
    uint64_t blocks, next;
    uint8_t *tx;
    size_t tx_len;
    uint64_t done, done_bytes;
};

static uint64_t random_next(void) {
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return rng;
}

static void queue_request(struct load *l, uint64_t cookie) {
    uint64_t b = l->sequential ? l->next++ % l->blocks : random_next() % l->blocks;
    uint8_t *p = l->tx + l->tx_len;
    store(p, 0x25609513, 4);
    store(p + 4, 0, 2);
    store(p + 6, (uint64_t)l->op, 2);
    store(p + 8, cookie, 8);
    store(p + 16, b * l->block, 8);
    store(p + 24, l->block, 4);
    l->tx_len += 28;
    if (l->op == OP_WRITE) {
        memset(p + 28, (int)(cookie + b + 1), l->block);
        l->tx_len += l->block;
    }
}

/* Length of the reply at `p` and whether it ends its request; 0: more bytes are needed. */
static size_t reply_parse(const uint8_t *p, size_t have, const struct load *l, bool *end) {
    if (have < 16)
        return 0;
    if (load32(p) == 0x67446698) {
        if (load32(p + 4))
            die_text("the server answered with an error");
        *end = true;
        return 16 + (l->op == OP_READ ? l->block : 0);
    }
    if (load32(p) != 0x668e33ef)
        die_text("bad reply magic");
    if (have < 20)
        return 0;
    if (p[6] & 0x80)
        die_text("the server answered with an error chunk");
    *end = p[5] & 1;
    return 20 + load32(p + 16);
}

/* Runs until `until` and then until nothing is in flight. */
static void run(struct load *l, int64_t until) {
    static uint8_t rx[RX_BYTES];
    size_t have = 0, skip = 0; /* skip: bytes of a payload still to come */
    bool skip_ends = false;
    unsigned in_flight = l->depth;
    l->tx_len = 0;
    for (unsigned i = 0; i < l->depth; i++)
        queue_request(l, i);
    while (in_flight) {
        if (l->tx_len)
            send_all(l->tx, l->tx_len);
        l->tx_len = 0;
        ssize_t n = recv(sock, rx + have, sizeof(rx) - have, 0);
        if (n <= 0)
            die("recv");
        have += (size_t)n;
        bool more = now_ns() < until;
        size_t pos = 0;
        while (pos < have) {
            bool ended = false;
            if (skip) {
                size_t k = have - pos < skip ? have - pos : skip;
                pos += k;
                skip -= k;
                ended = !skip && skip_ends;
            } else {
                size_t len = reply_parse(rx + pos, have - pos, l, &skip_ends);
                if (!len)
                    break;
                size_t k = have - pos < len ? have - pos : len;
                pos += k;
                skip = len - k;
                ended = !skip && skip_ends;
            }
            if (!ended)
                continue;
            l->done++;
            l->done_bytes += l->block;
            if (more)
                queue_request(l, l->done);
            else
                in_flight--;
        }
        memmove(rx, rx + pos, have - pos);
        have -= pos;
    }
}

static void usage(void) {
    fprintf(stderr,
            "usage: nbd_load --socket PATH | --tcp HOST:PORT [-x NAME] [-d DEPTH] [-b BYTES]\n"
            "       [-t SECONDS] [-r|-w] [-s] [--simple] [--pid SERVER] [--json]\n"
            "-r reads (default), -w writes; at random, or in sequence with -s\n");
    exit(2);
}

int main(int argc, char **argv) {
    static const struct option longs[] = {{"socket", 1, 0, 'S'}, {"tcp", 1, 0, 'T'},
                                          {"pid", 1, 0, 'p'},    {"simple", 0, 0, 'i'},
                                          {"json", 0, 0, 'j'},   {0, 0, 0, 0}};
    struct load l = {.depth = 32, .block = 4096, .op = OP_READ};
    const char *name = "";
    double seconds = 5;
    int pid = 0;
    bool json = false;
    for (int o; (o = getopt_long(argc, argv, "x:d:b:t:rws", longs, NULL)) != -1;) {
        switch (o) {
        case 'S':
            connect_unix(optarg);
            break;
        case 'T': {
            char *colon = strrchr(optarg, ':');
            if (!colon)
                usage();
            *colon = 0;
            connect_tcp(optarg, colon + 1);
            break;
        }
        case 'p':
            pid = atoi(optarg);
            break;
        case 'i':
            structured = false;
            break;
        case 'j':
            json = true;
            break;
        case 'x':
            name = optarg;
            break;
        case 'd':
            l.depth = (unsigned)atoi(optarg);
            break;
        case 'b':
            l.block = (unsigned)strtoul(optarg, NULL, 0);
            break;
        case 't':
            seconds = atof(optarg);
            break;
        case 'r':
            l.op = OP_READ;
            break;
        case 'w':
            l.op = OP_WRITE;
            break;
        case 's':
            l.sequential = true;
            break;
        default:
            usage();
        }
    }
    if (sock < 0 || l.depth < 1 || l.depth > DEPTH_MAX || l.block < 1 || l.block > 32u << 20)
        usage();
    handshake(name);
    l.blocks = disk_size / l.block;
    if (!l.blocks)
        die_text("the export is smaller than one block");
    l.tx = malloc((size_t)l.depth * (28 + (l.op == OP_WRITE ? l.block : 0)));
    if (!l.tx)
        die("buffer");

    run(&l, now_ns() + 200000000); /* warm */
    l.done = l.done_bytes = 0;
    int64_t cpu = pid ? cpu_ns(pid) : 0, start = now_ns();
    run(&l, start + (int64_t)(seconds * 1e9));
    double wall = (double)(now_ns() - start) / 1e9;
    double cpu_us = pid ? (double)(cpu_ns(pid) - cpu) / 1e3 / (double)l.done : 0;
    double iops = (double)l.done / wall, mbs = (double)l.done_bytes / wall / 1e6;
    if (json)
        printf("{\"iops\": %.0f, \"mb_s\": %.1f, \"server_us\": %.3f}\n", iops, mbs, cpu_us);
    else if (pid)
        printf("%9.0f IOPS %9.1f MB/s %8.2f us server CPU per request\n", iops, mbs, cpu_us);
    else
        printf("%9.0f IOPS %9.1f MB/s\n", iops, mbs);

    uint8_t disc[28] = {0x25, 0x60, 0x95, 0x13, 0, 0, 0, 2};
    send_all(disc, sizeof(disc));
    close(sock);
    return 0;
}
