/* SPDX-License-Identifier: MIT */
/*
 * The QEMU process: start, wait, stop.
 *
 * Starting uses vfork: the parent has an io_uring with pages in flight and worker threads, neither
 * of which survives a plain fork well, and the child does nothing but a handful of
 * async-signal-safe calls before exec (vfork shares our memory until then; only `failed` is
 * written).  All our descriptors are close-on-exec; the child clears that flag, in its own table,
 * for those it is meant to have.
 *
 * States: RUNNING --vm_stop--> STOPPING --grace over, or vm_stop again--> KILLED; the pidfd turns
 * readable in any of them.  vm_stop runs in the loop's own context and cannot wait, so it ends the
 * waiting task's poll (loop_cancel_fd) and the task picks up the new deadline.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include "base/cleanup.h"
#include "base/err.h"
#include "runtime/loop.h"
#include "vm/vm.h"

#define STOP_GRACE_NS 5000000000LL

extern char **environ;

struct vm {
    struct loop *loop;
    pid_t pid;
    int pidfd;
    enum { VM_RUNNING, VM_STOPPING, VM_KILLED } state;
};

static bool cpu_has_virtualization(void) {
    AUTO_FREE char *line = NULL;
    size_t cap = 0;
    bool found = false, flags = false;
    FILE *f = fopen("/proc/cpuinfo", "re");
    if (!f)
        return false;
    while (!found && getline(&line, &cap, f) > 0) {
        if (strncmp(line, "flags", 5))
            continue;
        flags = true;
        line[strcspn(line, "\n")] = ' ';
        found = strstr(line, " vmx ") || strstr(line, " svm ");
        break; /* all processors of one machine say the same */
    }
    fclose(f);
    return found || !flags; /* no "flags" line: not x86, /dev/kvm alone decides */
}

enum vm_accel vm_accel_detect(void) {
    AUTO_FD int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    return fd >= 0 && cpu_has_virtualization() ? VM_ACCEL_KVM : VM_ACCEL_TCG;
}

/* What a child is started with. */
struct start {
    char *const *argv;
    int fds[VM_DRIVES_MAX + 4]; /* inherited */
    unsigned nfds;
    int death_signal; /* when we die */
    int null_fd;      /* its standard input instead of ours; -1: ours */
};

/*
 * In the child, sharing the parent's memory.  Signals: the parent has some blocked (signalfd), and
 * both mask and ignored SIGPIPE would be inherited by QEMU.
 */
static void child_exec(const struct start *s, pid_t parent, volatile int *failed) {
    sigset_t none;
    sigemptyset(&none);
    signal(SIGPIPE, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
    prctl(PR_SET_PDEATHSIG, s->death_signal);
    if (getppid() != parent) /* died between vfork and prctl: nobody will send that signal */
        _exit(127);
    if (s->null_fd >= 0)
        dup2(s->null_fd, 0);
    for (unsigned i = 0; i < s->nfds; i++)
        fcntl(s->fds[i], F_SETFD, 0);
    execvp(s->argv[0], s->argv);
    *failed = errno;
    _exit(127);
}

/* Not inlined: nothing of the caller's frame is live in registers across vfork's second return. */
static __attribute__((noinline)) pid_t spawn(const struct start *s, volatile int *failed) {
    pid_t parent = getpid();
    pid_t pid = vfork();
    if (pid == 0)
        child_exec(s, parent, failed);
    if (pid < 0)
        *failed = errno;
    return pid;
}

static int start(struct loop *l, const struct start *s, struct vm **out, struct err *e) {
    volatile int failed = 0;
    pid_t pid = spawn(s, &failed);
    if (failed) {
        if (pid > 0)
            waitpid(pid, NULL, 0);
        return err_errno(e, failed, "cannot start %s", s->argv[0]);
    }
    int pidfd = pidfd_open(pid, 0); /* close-on-exec by definition */
    if (pidfd < 0) {
        int ret = err_errno(e, errno, "cannot watch process %d", (int)pid);
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        return ret;
    }
    struct vm *vm = xcalloc(1, sizeof(*vm));
    *vm = (struct vm){.loop = l, .pid = pid, .pidfd = pidfd};
    *out = vm;
    return 0;
}

static void inherit(struct start *s, int fd) {
    s->fds[s->nfds++] = fd;
}

int vm_start(struct loop *l, const struct vm_opts *o, struct vm **out, struct err *e) {
    struct vm_opts opts = *o;
    struct start s = {.death_signal = SIGKILL, .null_fd = -1};
    AUTO_FD int null = -1;
    char **argv = NULL;

    if (opts.accel == VM_ACCEL_AUTO)
        opts.accel = vm_accel_detect();
    int ret = vm_args(&opts, &argv, e);
    if (ret < 0)
        return ret;
    s.argv = argv;
    for (unsigned i = 0; i < o->ndrives; i++)
        inherit(&s, o->drives[i].fd);
    if (o->monitor && o->monitor->kind == VM_MONITOR_UNIX)
        inherit(&s, o->monitor->fd);
    if (o->uefi) {
        inherit(&s, o->uefi->code_fd);
        inherit(&s, o->uefi->vars_fd);
    }
    if (o->control_fd)
        inherit(&s, o->control_fd);
    if (o->no_terminal) {
        null = open("/dev/null", O_RDONLY | O_CLOEXEC);
        s.null_fd = null;
    }
    ret = start(l, &s, out, e);
    if (ret == -ENOENT && !opts.qemu)
        err_hint(e, "install QEMU's system emulator (Debian: qemu-system-x86)");
    vm_args_free(argv);
    return ret;
}

int vm_start_beside(struct loop *l, char *const *args, struct vm **out, struct err *e) {
    /* SIGTERM: it has the terminal, and puts it back. */
    struct start s = {.argv = args, .death_signal = SIGTERM, .null_fd = -1};
    return start(l, &s, out, e);
}

int vm_wait_co(struct vm *vm) {
    for (;;) {
        int64_t timeout = vm->state == VM_STOPPING ? STOP_GRACE_NS : -1;
        int got = loop_poll_co(vm->pidfd, POLLIN, timeout);
        if (got > 0)
            break;
        if (got == 0) {
            vm->state = VM_KILLED;
            kill(vm->pid, SIGKILL);
        } else if (got != -ECANCELED) {
            kill(vm->pid, SIGKILL);
            waitpid(vm->pid, NULL, 0);
            vm->pid = 0;
            return got;
        }
    }
    int status;
    pid_t pid = waitpid(vm->pid, &status, 0);
    int err = errno;
    vm->pid = 0; /* reaped: the number may be somebody else's from now on */
    if (pid < 0)
        return -err;
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

void vm_stop(struct vm *vm) {
    if (vm->pid == 0)
        return;
    if (vm->state == VM_RUNNING) {
        vm->state = VM_STOPPING;
        kill(vm->pid, SIGTERM);
    } else {
        vm->state = VM_KILLED;
        kill(vm->pid, SIGKILL);
    }
    loop_cancel_fd(vm->loop, vm->pidfd);
}

void vm_powerdown(int fd) {
    static const char qmp[] = "{\"execute\": \"qmp_capabilities\"}\n"
                              "{\"execute\": \"system_powerdown\"}\n";
    /* Answers are not waited for: it works or it does not, and the child's end tells. */
    ssize_t n = send(fd, qmp, sizeof(qmp) - 1, MSG_DONTWAIT | MSG_NOSIGNAL);
    (void)n;
}

void vm_free(struct vm *vm) {
    if (!vm)
        return;
    close(vm->pidfd);
    free(vm);
}
