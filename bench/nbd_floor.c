/* SPDX-License-Identifier: MIT */
/*
 * The floor: as little as an NBD server can do, for the bench to compare with.
 *
 * One thread, one client after the other, one raw file.  Requests are taken out of large reads,
 * each becomes a pread or pwrite at once, and what a batch of them gave is sent together.  No
 * holes, no structured replies, no errors but the end of the program, no flush that waits.  It is
 * no server to use: it shows what the sockets and the file system cost, below which no server
 * comes.
 *
 *     nbd_floor SOCKET FILE
 */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#define RX_BYTES (1u << 20)
#define TX_BYTES (1u << 20)
#define REQUEST_MAX (512u * 1024) /* larger ones are not in the bench */

static uint8_t rx[RX_BYTES], tx[TX_BYTES];
static size_t rx_pos, rx_end, tx_end;
static int sock, file;
static jmp_buf gone; /* the client has left */

static void die(const char *what) {
    fprintf(stderr, "nbd_floor: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void flush_tx(void) {
    for (size_t at = 0; at < tx_end;) {
        ssize_t n = send(sock, tx + at, tx_end - at, MSG_NOSIGNAL);
        if (n <= 0)
            longjmp(gone, 1);
        at += (size_t)n;
    }
    tx_end = 0;
}

/* `need` unparsed bytes; before it waits, answers go out. */
static void need(size_t bytes) {
    while (rx_end - rx_pos < bytes) {
        memmove(rx, rx + rx_pos, rx_end - rx_pos);
        rx_end -= rx_pos;
        rx_pos = 0;
        flush_tx();
        ssize_t n = recv(sock, rx + rx_end, RX_BYTES - rx_end, 0);
        if (n <= 0)
            longjmp(gone, 1);
        rx_end += (size_t)n;
    }
}

static uint32_t get32(size_t at) {
    uint32_t v;
    memcpy(&v, rx + rx_pos + at, 4);
    return be32toh(v);
}

static uint64_t get64(size_t at) {
    uint64_t v;
    memcpy(&v, rx + rx_pos + at, 8);
    return be64toh(v);
}

static void put(const void *p, size_t n) {
    memcpy(tx + tx_end, p, n);
    tx_end += n;
}

static void put32(uint32_t v) {
    v = htobe32(v);
    put(&v, 4);
}

static void put64(uint64_t v) {
    v = htobe64(v);
    put(&v, 8);
}

static void put_option(uint32_t option, uint32_t type, uint32_t length) {
    put64(UINT64_C(0x3e889045565a9));
    put32(option);
    put32(type);
    put32(length);
}

static void handshake(uint64_t size) {
    put("NBDMAGICIHAVEOPT\0\3", 18);
    need(4);
    rx_pos += 4;
    for (;;) {
        need(16);
        uint32_t option = get32(8), length = get32(12);
        need(16 + length);
        rx_pos += 16 + length;
        if (option == 7) { /* GO */
            put_option(option, 3, 12);
            put("\0\0", 2);
            put64(size);
            put("\0\5", 2); /* flags: has flags, flush */
            put_option(option, 1, 0);
            return;
        }
        put_option(option, 0x80000001, 0);
    }
}

static void serve(void) {
    for (;;) {
        need(28);
        uint32_t kind = get32(4) & 0xffff, length = get32(24);
        uint64_t offset = get64(16);
        uint8_t cookie[8];
        memcpy(cookie, rx + rx_pos + 8, 8);
        rx_pos += 28;
        if (kind == 2 || length > REQUEST_MAX)
            return;
        if (kind == 1) {
            need(length);
            if (pwrite(file, rx + rx_pos, length, (off_t)offset) != (ssize_t)length)
                die("pwrite");
            rx_pos += length;
        }
        if (tx_end + 16 + (kind == 0 ? length : 0) > TX_BYTES)
            flush_tx();
        put32(0x67446698);
        put32(0);
        put(cookie, 8);
        if (kind == 0) {
            if (pread(file, tx + tx_end, length, (off_t)offset) != (ssize_t)length)
                die("pread");
            tx_end += length;
        }
    }
}

int main(int argc, char **argv) {
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    struct stat st;
    if (argc != 3 || strlen(argv[1]) >= sizeof(sa.sun_path)) {
        fprintf(stderr, "usage: nbd_floor SOCKET FILE\n");
        return 1;
    }
    file = open(argv[2], O_RDWR | O_CLOEXEC);
    if (file < 0 || fstat(file, &st) < 0)
        die(argv[2]);
    memcpy(sa.sun_path, argv[1], strlen(argv[1]));
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&sa, sizeof(sa)) < 0 ||
        listen(listener, 1) < 0)
        die(argv[1]);
    for (;;) {
        sock = accept(listener, NULL, NULL);
        if (sock < 0)
            die("accept");
        int buffer = 2 << 20;
        setsockopt(sock, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof(buffer));
        setsockopt(sock, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof(buffer));
        rx_pos = rx_end = tx_end = 0;
        if (!setjmp(gone)) {
            handshake((uint64_t)st.st_size);
            serve();
        }
        close(sock);
    }
}
