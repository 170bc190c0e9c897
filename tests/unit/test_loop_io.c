/* SPDX-License-Identifier: MIT */
/* Files, sockets, pipes and polling through the loop, each test on both back ends. */
#include "loop_fixture.h"
#include "uring_filter.h"

/* ---- files ---- */

static void file_main(void *arg) {
    int fd = temp_file(0);
    char a[1000], b[3000], back[6000];
    memset(a, 'a', sizeof(a));
    memset(b, 'b', sizeof(b));
    unsigned flags = *(unsigned *)arg;
    struct iovec w[2] = {{a, sizeof(a)}, {b, sizeof(b)}};
    assert_int_equal(loop_pwritev_co(fd, w, 2, 500, flags), 4000);
    assert_int_equal(loop_fdatasync_co(fd), 0);
    struct iovec r[2] = {{back, 2500}, {back + 2500, 3500}};
    flags &= LOOP_BULK;
    assert_int_equal(loop_preadv_co(fd, r, 2, 0, flags), 4500); /* short: the end of the file */
    for (int i = 0; i < 4500; i++)
        assert_int_equal(back[i], i < 500 ? 0 : i < 1500 ? 'a' : 'b');
    assert_int_equal(loop_preadv_co(fd, r, 1, 4500, flags), 0);
    assert_int_equal(loop_preadv_co(fd, r, 1, 1 << 30, flags), 0);
    close(fd);
    assert_int_equal(loop_preadv_co(fd, r, 1, 0, flags), -EBADF);
    assert_int_equal(loop_pwritev_co(fd, r, 1, 0, flags), -EBADF);
    assert_int_equal(loop_fdatasync_co(fd), -EBADF);
}
static void file_write_then_read(void **state) {
    unsigned flags = 0;
    run(file_main, &flags);
}
static void file_bulk_write_then_read(void **state) {
    unsigned flags = LOOP_BULK;
    run(file_main, &flags);
}
static void file_dsync_write_then_read(void **state) {
    unsigned flags = LOOP_DSYNC;
    run(file_main, &flags);
}

static void direct_main(void *arg) {
    int fd = temp_file(O_DIRECT);
    char *buf = NULL;
    assert_int_equal(posix_memalign((void **)&buf, 4096, 65536), 0);
    memset(buf, 'd', 65536);
    struct iovec v = {buf, 65536};
    assert_int_equal(loop_pwritev_co(fd, &v, 1, 0, 0), 65536);
    memset(buf, 0, 65536);
    assert_int_equal(loop_preadv_co(fd, &v, 1, 0, 0), 65536);
    for (int i = 0; i < 65536; i++)
        assert_int_equal(buf[i], 'd');
    free(buf);
    close(fd);
}
static void file_direct_write_then_read(void **state) {
    run(direct_main, NULL);
}

static void offset_main(void *arg) {
    int fd = temp_file(0);
    char c = 0;
    struct iovec v = {&c, 1};
    assert_int_equal(loop_preadv_co(fd, &v, 1, UINT64_MAX, 0), -EINVAL);
    assert_int_equal(loop_pwritev_co(fd, &v, 1, UINT64_MAX, 0), -EINVAL);
    assert_int_equal(loop_pwritev_co(fd, &v, 1, UINT64_MAX, LOOP_BULK), -EINVAL);
    assert_int_equal(loop_fallocate_co(fd, 0, UINT64_MAX, 1), -EINVAL);
    close(fd);
}
static void file_offset_beyond_63_bits_is_refused(void **state) {
    run(offset_main, NULL);
}

static void fallocate_main(void *arg) {
    int fd = temp_file(0);
    struct stat st;
    assert_int_equal(loop_fallocate_co(fd, 0, 0, 1 << 20), 0);
    fstat(fd, &st);
    assert_int_equal(st.st_size, 1 << 20);
    assert_int_equal(loop_fallocate_co(fd, FALLOC_FL_KEEP_SIZE, 1 << 20, 4096), 0);
    fstat(fd, &st);
    assert_int_equal(st.st_size, 1 << 20);
    assert_int_equal(loop_fallocate_co(fd, 0, 0, 0), -EINVAL);
    close(fd);
}
static void file_fallocate(void **state) {
    run(fallocate_main, NULL);
}

/* More at once than the ring has entries, all of them cold. */
struct cold {
    int fd;
    unsigned block, good;
};
static void cold_task(void *arg) {
    struct cold *c = arg;
    uint64_t block = c->block++, got[512];
    struct iovec v = {got, 4096};
    assert_int_equal(loop_preadv_co(c->fd, &v, 1, block * 4096, 0), 4096);
    c->good += got[0] == block && got[511] == block;
}
static void cold_main(void *arg) {
    enum { BLOCKS = 1000 };
    struct cold c = {.fd = temp_file(0)};
    uint64_t buf[512];
    for (uint64_t b = 0; b < BLOCKS; b++) {
        for (int i = 0; i < 512; i++)
            buf[i] = b;
        assert_int_equal(pwrite(c.fd, buf, 4096, (off_t)(b * 4096)), 4096);
    }
    fdatasync(c.fd);
    posix_fadvise(c.fd, 0, 0, POSIX_FADV_DONTNEED);
    struct task_group g;
    task_group_init(&g);
    for (int i = 0; i < BLOCKS; i++)
        task_group_spawn(&g, loop, cold_task, &c);
    task_group_wait_co(&g);
    assert_int_equal(c.good, BLOCKS);
    close(c.fd);
}
static void file_many_cold_reads_at_once(void **state) {
    run(cold_main, NULL);
}

/* ---- sockets ---- */

#define ECHO_BYTES (1 << 20)
static void echo_task(void *arg) {
    int fd = *(int *)arg;
    char buf[4096];
    ssize_t n;
    while ((n = loop_recv_co(fd, buf, sizeof(buf))) > 0)
        assert_int_equal(send_all(fd, buf, (size_t)n), n);
    assert_int_equal(n, 0);
    close(fd);
}
static void send_task(void *arg) {
    char *data = arg;
    assert_int_equal(send_all(pair[0], data, ECHO_BYTES), ECHO_BYTES);
    shutdown(pair[0], SHUT_WR);
}
static void echo_main(void *arg) {
    char *data = malloc(ECHO_BYTES), buf[5000];
    for (int i = 0; i < ECHO_BYTES; i++)
        data[i] = (char)(i * 7 + (i >> 8));
    make_pair();
    task_spawn(loop, echo_task, &pair[1]);
    task_spawn(loop, send_task, data);
    size_t done = 0;
    ssize_t n;
    while ((n = loop_recv_co(pair[0], buf, sizeof(buf))) > 0) {
        assert_memory_equal(buf, data + done, (size_t)n);
        done += (size_t)n;
    }
    assert_int_equal(n, 0);
    assert_int_equal(done, ECHO_BYTES);
    close(pair[0]);
    free(data);
}
static void socket_echo_of_a_mebibyte(void **state) {
    run(echo_main, NULL);
}

static void late_send_task(void *arg) {
    loop_sleep_co(5 * MS);
    assert_int_equal(send_all(pair[1], "late", 4), 4);
}
static void late_main(void *arg) {
    char buf[8];
    make_pair();
    task_spawn(loop, late_send_task, NULL);
    assert_int_equal(loop_recv_co(pair[0], buf, sizeof(buf)), 4);
    close(pair[1]);
    struct iovec v = {buf, 4};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    assert_int_equal(loop_sendmsg_co(pair[0], &m, 0), -EPIPE);
    close(pair[0]);
    assert_int_equal(loop_recv_co(pair[0], buf, 4), -EBADF);
}
static void socket_recv_waits_for_data(void **state) {
    run(late_main, NULL);
}

static void pipe_task(void *arg) {
    loop_sleep_co(2 * MS);
    assert_int_equal(send_all(pair[1], "pipe", 4), 4);
    close(pair[1]);
}
static void pipe_main(void *arg) {
    char buf[8];
    assert_int_equal(pipe2(pair, O_NONBLOCK | O_CLOEXEC), 0);
    task_spawn(loop, pipe_task, NULL);
    assert_int_equal(loop_recv_co(pair[0], buf, sizeof(buf)), 4);
    assert_int_equal(loop_recv_co(pair[0], buf, sizeof(buf)), 0);
    close(pair[0]);
}
static void pipes_work_like_sockets(void **state) {
    run(pipe_main, NULL);
}

static struct sockaddr_un address(void) {
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    snprintf(a.sun_path + 1, sizeof(a.sun_path) - 1, "strata-test-loop-%d", (int)getpid());
    return a;
}
static void connect_task(void *arg) {
    struct sockaddr_un a = address();
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    loop_sleep_co(2 * MS);
    assert_int_equal(loop_connect_co(fd, (struct sockaddr *)&a, sizeof(a)), 0);
    assert_int_equal(send_all(fd, "x", 1), 1);
    close(fd);
    *(bool *)arg = true;
}
static void accept_main(void *arg) {
    struct sockaddr_un a = address();
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), c;
    bool connected = false;
    assert_int_equal(loop_connect_co(fd, (struct sockaddr *)&a, sizeof(a)), -ECONNREFUSED);
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof(a)), 0);
    assert_int_equal(listen(fd, 5), 0);
    task_spawn(loop, connect_task, &connected);
    struct sockaddr_storage peer;
    socklen_t len;
    char byte;
    c = loop_accept_co(fd, &peer, &len);
    assert_true(c >= 0);
    assert_int_equal(fcntl(c, F_GETFL) & O_NONBLOCK, O_NONBLOCK);
    assert_int_equal(fcntl(c, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    assert_int_equal(peer.ss_family, AF_UNIX);
    assert_int_equal(loop_recv_co(c, &byte, 1), 1);
    while (!connected)
        task_yield_co();
    close(c);
    close(fd);
}
static void socket_connect_and_accept(void **state) {
    run(accept_main, NULL);
}

/* ---- poll ---- */

static void poll_main(void *arg) {
    make_pair();
    assert_int_equal(loop_poll_co(pair[0], POLLIN, 0), 0);
    int64_t start = clock_ns(CLOCK_MONOTONIC);
    assert_int_equal(loop_poll_co(pair[0], POLLIN, 20 * MS), 0);
    int64_t took = clock_ns(CLOCK_MONOTONIC) - start;
    assert_true(took >= 20 * MS && took < 500 * MS);
    assert_int_equal(loop_poll_co(pair[0], POLLOUT, -1), POLLOUT);
    assert_int_equal(send_all(pair[1], "x", 1), 1);
    assert_int_equal(loop_poll_co(pair[0], POLLIN, 0), POLLIN);
    assert_int_equal(loop_poll_co(pair[0], POLLIN, 20 * MS), POLLIN);
    assert_int_equal(loop_poll_co(pair[0], POLLIN | POLLOUT, -1), POLLIN | POLLOUT);
    close(pair[1]);
    assert_true(loop_poll_co(pair[0], POLLIN, -1) & POLLHUP);
    close(pair[0]);
    assert_int_equal(loop_poll_co(pair[0], POLLIN, -1), -EBADF);
    assert_int_equal(loop_poll_co(pair[0], POLLIN, 0), -EBADF);
    int fd = temp_file(0);
    assert_int_equal(loop_poll_co(fd, POLLIN, -1), POLLIN);
    close(fd);
}
static void poll_events_and_timeouts(void **state) {
    run(poll_main, NULL);
}

static void two_polls_main(void *arg) {
    make_pair();
    struct waiting in = {POLLIN, -1}, in2 = {POLLIN, -1}, out = {POLLOUT, -1};
    struct task_group g;
    task_group_init(&g);
    task_group_spawn(&g, loop, poll_task, &in);
    task_group_spawn(&g, loop, poll_task, &in2);
    task_group_spawn(&g, loop, poll_task, &out);
    loop_sleep_co(5 * MS);
    assert_int_equal(out.got, POLLOUT);
    assert_int_equal(in.got, -1);
    assert_int_equal(send_all(pair[1], "x", 1), 1);
    task_group_wait_co(&g);
    assert_int_equal(in.got, POLLIN);
    assert_int_equal(in2.got, POLLIN);
    close(pair[0]);
    close(pair[1]);
}
static void several_waits_on_one_descriptor(void **state) {
    run(two_polls_main, NULL);
}

static void recv_task(void *arg) {
    char c;
    *(int *)arg = (int)loop_recv_co(pair[0], &c, 1);
}
static void reuse_main(void *arg) {
    /* The number of a closed descriptor comes back: nothing of the old registration may remain. */
    for (int i = 0; i < 3; i++) {
        make_pair();
        int got = 99;
        task_run(loop, recv_task, &got);
        assert_int_equal(send_all(pair[1], "x", 1), 1);
        while (got == 99)
            task_yield_co();
        assert_int_equal(got, 1);
        close(pair[0]);
        close(pair[1]);
    }
}
static void a_descriptor_number_can_be_reused(void **state) {
    run(reuse_main, NULL);
}

static void accept_cancel_task(void *arg) {
    *(int *)arg = loop_accept_co(pair[0], NULL, NULL);
}
static void cancel_main(void *arg) {
    make_pair();
    int recv_got = 99;
    struct waiting w1 = {POLLIN, 99}, w2 = {POLLIN, 99};
    task_run(loop, recv_task, &recv_got);
    task_run(loop, poll_task, &w1);
    task_run(loop, poll_task, &w2);
    loop_sleep_co(2 * MS);
    loop_cancel_fd(loop, pair[1]); /* nobody waits on that one */
    loop_sleep_co(2 * MS);
    assert_int_equal(recv_got, 99);
    loop_cancel_fd(loop, pair[0]);
    loop_cancel_fd(loop, pair[0]);
    loop_sleep_co(5 * MS);
    assert_int_equal(recv_got, -ECANCELED);
    assert_int_equal(w1.got, -ECANCELED);
    assert_int_equal(w2.got, -ECANCELED);
    /* Cancelling is not sticky. */
    recv_got = 99;
    task_run(loop, recv_task, &recv_got);
    assert_int_equal(send_all(pair[1], "x", 1), 1);
    loop_sleep_co(5 * MS);
    assert_int_equal(recv_got, 1);
    /* Data that arrives together with the cancel does not turn it into a success. */
    recv_got = 99;
    task_run(loop, recv_task, &recv_got);
    assert_int_equal(send_all(pair[1], "x", 1), 1);
    loop_cancel_fd(loop, pair[0]);
    loop_sleep_co(5 * MS);
    assert_int_equal(recv_got, -ECANCELED);
    close(pair[0]);
    close(pair[1]);

    int accept_got = 99;
    struct sockaddr_un a = address();
    pair[0] = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(pair[0], (struct sockaddr *)&a, sizeof(a)), 0);
    assert_int_equal(listen(pair[0], 5), 0);
    task_run(loop, accept_cancel_task, &accept_got);
    loop_cancel_fd(loop, pair[0]);
    loop_sleep_co(5 * MS);
    assert_int_equal(accept_got, -ECANCELED);
    close(pair[0]);
}
static void cancel_fd_ends_every_wait(void **state) {
    run(cancel_main, NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        T(file_write_then_read),
        T(file_bulk_write_then_read),
        T(file_dsync_write_then_read),
        T(file_direct_write_then_read),
        T(file_offset_beyond_63_bits_is_refused),
        T(file_fallocate),
        T(file_many_cold_reads_at_once),
        T(socket_echo_of_a_mebibyte),
        T(socket_recv_waits_for_data),
        T(pipes_work_like_sockets),
        T(socket_connect_and_accept),
        T(poll_events_and_timeouts),
        T(several_waits_on_one_descriptor),
        T(a_descriptor_number_can_be_reused),
        T(cancel_fd_ends_every_wait),
    };
    leave_out_refused_uring();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
