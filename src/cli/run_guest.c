/* SPDX-License-Identifier: MIT */
/*
 * strata run: the child from start to end, and what it shares with us: signals and the terminal.
 *
 * What QEMU gets beside its disks: a listening socket for a monitor (ours to make, so that it is
 * its owner's alone, and ours to remove), two descriptors of firmware, and with --ssh one more for
 * its power button.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include "base/bytes.h"
#include "base/strbuf.h"
#include "cli/run.h"
#include "export/nbd/server.h" /* nbd_listen_unix */
#include "runtime/loop.h"

/* ---------------------------------------------------------------- signals and terminal */

static const int stop_signals[] = {SIGINT, SIGTERM, SIGHUP};

static void on_signal(void *arg, int signo) {
    struct run *r = arg;
    if (!r->signo)
        r->signo = signo;
    if (r->ssh)
        vm_stop(r->ssh);
    if (r->vm && !r->ended)
        vm_stop(r->vm);
    else if (r->ended)
        cli_print_warning(r->ctx, "finishing what was begun first");
}

int run_watch_signals(struct run *r) {
    for (size_t i = 0; i < sizeof(stop_signals) / sizeof(*stop_signals); i++) {
        struct sigaction was;
        if (sigaction(stop_signals[i], NULL, &was) == 0 && was.sa_handler == SIG_IGN)
            continue; /* nohup: stays ignored */
        int ret = loop_on_signal(r->ctx->loop, stop_signals[i], on_signal, r);
        if (ret < 0)
            return err_errno(&r->ctx->err, -ret, "cannot watch signal %d", stop_signals[i]);
    }
    return 0;
}

void run_unwatch_signals(struct run *r) {
    for (size_t i = 0; i < sizeof(stop_signals) / sizeof(*stop_signals); i++)
        loop_off_signal(r->ctx->loop, stop_signals[i]);
}

/*
 * Ctrl-C reaches QEMU and us alike, and QEMU may be gone before our loop has looked at its signals:
 * what is still pending when the child has ended counts.
 */
static int pending_stop_signal(void) {
    sigset_t set;
    sigpending(&set);
    for (size_t i = 0; i < sizeof(stop_signals) / sizeof(*stop_signals); i++)
        if (sigismember(&set, stop_signals[i]) == 1)
            return stop_signals[i];
    return 0;
}

/* QEMU changes these for its serial console, and restores them unless it is killed. */
struct terminal {
    bool is_tty;
    struct termios modes;
    int flags[3];
};

static void terminal_save(struct terminal *t) {
    t->is_tty = isatty(0) && tcgetattr(0, &t->modes) == 0;
    for (int fd = 0; fd < 3; fd++)
        t->flags[fd] = fcntl(fd, F_GETFL);
}

static void terminal_restore(const struct terminal *t) {
    if (t->is_tty)
        tcsetattr(0, TCSADRAIN, &t->modes);
    for (int fd = 0; fd < 3; fd++) {
        if (t->flags[fd] >= 0 && fcntl(fd, F_GETFL) != t->flags[fd])
            fcntl(fd, F_SETFL, t->flags[fd]);
    }
}

/* ---------------------------------------------------------------- the guest */

static void say_acceleration(const struct run *r, enum vm_accel accel) {
    if (r->a->accel == VM_ACCEL_AUTO && accel == VM_ACCEL_TCG && !r->a->quiet)
        fprintf(stderr, "strata: run: no KVM on this machine: the guest is emulated, and slower\n");
}

/* All but descriptors, which differ between a guest and a command line that is only shown. */
static void describe_guest(const struct run *r, const char *vnc, struct vm_drive *drives,
                           struct vm_opts *vo) {
    const struct run_args *a = r->a;
    *vo = (struct vm_opts){
        .qemu = a->qemu,
        .accel = a->accel == VM_ACCEL_AUTO ? vm_accel_detect() : (enum vm_accel)a->accel,
        .memory = r->memory,
        .smp = (unsigned)a->smp,
        .boot = a->boot,
        .kernel = a->kernel,
        .initrd = a->initrd,
        .append = a->append,
        .nographic = a->nographic,
        .vnc = vnc,
        .net = r->net,
        .forwards = r->forwards,
        .nforwards = r->nforwards,
        .drives = drives,
        .ndrives = r->ndisks,
        .monitor = a->monitor ? &r->monitor : NULL,
        .uefi = a->uefi ? &r->uefi : NULL,
        .no_terminal = a->ssh,
        .extra = r->ctx->rest,
    };
    for (unsigned i = 0; i < r->ndisks; i++) {
        const struct run_disk *d = &r->disks[i];
        drives[i] = (struct vm_drive){.fd = d->guest_fd,
                                      .cdrom = d->cdrom,
                                      .read_only = d->mode == RUN_RO,
                                      .queues = run_by_vhost(a, d) ? run_queues(a) : 0};
    }
}

int run_print(struct run *r) {
    AUTO_FREE char *vnc = r->a->vnc ? vm_vnc_display(r->a->vnc) : NULL;
    AUTO_STRBUF struct strbuf line = STRBUF_INIT;
    struct vm_drive drives[VM_DRIVES_MAX];
    struct vm_opts vo;
    char **argv;
    int fd = 3;

    describe_guest(r, vnc, drives, &vo);
    for (unsigned i = 0; i < r->ndisks; i++)
        drives[i].fd = fd++;
    if (r->monitor.kind == VM_MONITOR_UNIX)
        r->monitor.fd = fd++;
    if (r->a->uefi) {
        r->uefi.code_fd = fd++;
        r->uefi.vars_fd = fd++;
    }
    if (r->a->ssh)
        vo.control_fd = fd++;
    int ret = vm_args(&vo, &argv, &r->ctx->err);
    if (ret < 0)
        return ret;
    for (char **p = argv; *p; p++) {
        AUTO_FREE char *word = vm_quote(*p);
        strbuf_printf(&line, "%s%s", p == argv ? "" : " ", word);
    }
    vm_args_free(argv);
    puts(line.s);
    if (!r->a->quiet)
        fprintf(stderr,
                "strata: run: the numbers 3 to %d stand for descriptors that QEMU inherits "
                "from strata, which serves the disks\n",
                fd - 1);
    return 0;
}

/* ---------------------------------------------------------------- what the child inherits */

static int open_monitor(struct run *r) {
    struct err *e = &r->ctx->err;
    if (r->monitor.kind != VM_MONITOR_UNIX)
        return 0;
    mode_t mask = umask(0177); /* who may connect may do everything */
    int fd = nbd_listen_unix(r->monitor.path, e);
    umask(mask);
    if (fd < 0)
        return err_prefix(e, "--monitor");
    r->monitor.fd = fd;
    if (r->monitor.path[0] == '@')
        return 0;
    int ret = janitor_add(&r->a->janitor, &r->monitor_file, r->monitor.path);
    return ret < 0 ? err_errno(e, -ret, "--monitor %s", r->monitor.path) : 0;
}

/* QEMU's control socket, for its power button.  *theirs is the end to inherit. */
static int open_power(struct run *r, int *theirs) {
    int fds[2];
    if (!r->a->ssh)
        return 0;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) < 0)
        return err_errno(&r->ctx->err, errno, "cannot make a socket pair");
    r->power_fd = fds[0];
    *theirs = fds[1];
    return 0;
}

/* What the child has by now, or never will. */
static void close_inherited(struct run *r, int power) {
    for (unsigned i = 0; i < r->ndisks; i++) { /* so that the server sees QEMU go */
        if (r->disks[i].guest_fd >= 0)
            close(r->disks[i].guest_fd);
        r->disks[i].guest_fd = -1;
    }
    if (r->monitor.fd >= 0)
        close(r->monitor.fd);
    r->monitor.fd = -1;
    vm_uefi_close(&r->uefi);
    if (power > 0)
        close(power);
}

/* From a child that runs to its end: its status. */
static int attend_co(struct run *r) {
    run_ssh_begin(r);
    int ret = vm_wait_co(r->vm);
    r->ended = true;
    run_ssh_end_co(r);
    if (!r->signo)
        r->signo = pending_stop_signal();
    if (ret < 0)
        return err_errno(&r->ctx->err, -ret, "lost sight of the guest");
    if (r->signo)
        return 128 + r->signo;
    if (r->forced)
        return 128 + SIGTERM;
    return r->dismissed ? 0 : ret;
}

int run_guest_co(struct run *r) {
    const struct run_args *a = r->a;
    AUTO_FREE char *vnc = a->vnc ? vm_vnc_display(a->vnc) : NULL;
    struct vm_drive drives[VM_DRIVES_MAX];
    struct terminal tty;
    struct vm_opts vo;
    int power = 0;

    if (r->signo)
        return 128 + r->signo;
    int ret = a->uefi ? vm_uefi_open(&r->uefi, &r->ctx->err) : 0;
    if (ret == 0)
        ret = open_power(r, &power);
    if (ret == 0)
        ret = open_monitor(r);
    if (ret == 0) {
        describe_guest(r, vnc, drives, &vo);
        vo.control_fd = power;
        say_acceleration(r, vo.accel);
        terminal_save(&tty);
        ret = vm_start(r->ctx->loop, &vo, &r->vm, &r->ctx->err);
    }
    close_inherited(r, power);
    if (ret == 0) {
        ret = attend_co(r);
        terminal_restore(&tty);
        vm_free(r->vm);
    }
    if (r->power_fd >= 0)
        close(r->power_fd);
    janitor_remove(&r->monitor_file);
    return ret;
}
