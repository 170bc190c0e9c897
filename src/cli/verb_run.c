/* SPDX-License-Identifier: MIT */
/*
 * strata run: boots a guest on our disks and decides, at its end, what stays.
 *
 *     disk file --(--snapshot: throw-away overlay)--> node --> NBD server --socketpair--> QEMU
 *                                                     all of this in our loop | the child
 *
 * Order.  Everything that can be refused is refused before QEMU starts: options, names, locks,
 * existing --keep files.  Then: servers, signals, terminal state saved, child, wait.  Afterwards,
 * whatever ended the child (its own exit, a signal to us, its death): terminal restored, servers
 * stopped (their requests have finished), then keep, commit or throw away, then the nodes closed.
 *
 * Invariants
 *  1. The user said what becomes of the guest's writes: --snapshot or --write, never a default.
 *  2. With --snapshot the base is open read-only until a commit.
 *  3. A commit happens only after the guest ended by itself with status 0: what a killed or crashed
 *     guest left half-written goes nowhere near the base unasked.  --keep saves it in any case.
 *  4. When a commit fails, the overlay is saved beside the base before it is closed: the guest's
 *     work is never lost to a full disk.
 *
 * The exit status is the guest's: QEMU's own, 128 + n when signal n killed it or asked us to stop.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>
#include <sys/socket.h>
#include "base/bytes.h"
#include "base/size.h"
#include "cli/cli.h"
#include "control/control.h"
#include "disk/io.h"
#include "disk/node.h"
#include "disk/open.h"
#include "disk/overlay.h"
#include "export/nbd/server.h"
#include "export/vhost/server.h"
#include "job/copy.h"
#include "job/fat_commit.h"
#include "runtime/loop.h"
#include "vm/vm.h"

/* QEMU says hello as soon as it runs; on a loaded machine that may take a while. */
#define HANDSHAKE_NS 60000000000LL

struct args {
    struct cli_image image;
    bool snapshot, write, commit, nographic, no_net, quiet;
    struct cli_list keep, forward;
    const char *scratch;
    uint64_t scratch_size;
    const char *memory;
    uint64_t smp;
    int accel, transport;
    const char *cdrom, *boot, *kernel, *initrd, *append, *vnc, *qemu, *control;
};

static const struct cli_opt opts[] = {
    CLI_FLAG(
        struct args, snapshot, 0, "snapshot",
        "the guest writes to a temporary overlay that is thrown away; the disk stays as it is"),
    CLI_FLAG(struct args, write, 0, "write", "the guest writes to the disk itself"),
    CLI_FLAG(struct args, commit, 0, "commit-on-exit",
             "with --snapshot: write the changes into the disk when the guest has ended well"),
    CLI_LIST(struct args, keep, 0, "keep", "FILE",
             "with --snapshot: save the changes as a qcow2 overlay; once for each disk, in order"),
    CLI_STR(struct args, scratch, 0, "scratch", "DIR",
            "folder of the temporary overlay ($TMPDIR, else /var/tmp), or memory:SIZE"),
    CLI_SIZE(struct args, scratch_size, 0, "scratch-size", "SIZE", 0, 0, INT64_MAX,
             "the most space that the overlay of each disk may use; 0 is no limit"),
    CLI_IMAGE_ROWS(struct args, image),
    CLI_STR(struct args, memory, 'm', "memory", "SIZE",
            "memory of the guest, in MiB or with a "
            "suffix (default 1G)"),
    CLI_U64(struct args, smp, 0, "smp", "N", 1, 1, 255, "processors of the guest"),
    CLI_ENUM(struct args, accel, 0, "accel", "HOW", vm_accel_names, VM_ACCEL_AUTO,
             "kvm, tcg (emulation), or auto: kvm where the machine has it"),
    CLI_ENUM(struct args, transport, 0, "transport", "HOW", vm_transport_names,
             VM_TRANSPORT_VHOST_USER,
             "how disks reach the guest: vhost-user (in its own memory), or nbd"),
    CLI_STR(struct args, cdrom, 0, "cdrom", "FILE", "a CD image, read-only"),
    CLI_STR(struct args, boot, 0, "boot", "ORDER",
            "what to boot from: letters c (disk), d (CD), n (network), in order"),
    CLI_STR(struct args, kernel, 0, "kernel", "FILE", "boot this Linux kernel directly"),
    CLI_STR(struct args, initrd, 0, "initrd", "FILE", "initial RAM disk of that kernel"),
    CLI_STR(struct args, append, 0, "append", "TEXT", "command line of that kernel"),
    CLI_FLAG(struct args, nographic, 0, "nographic",
             "serial console on this terminal; Ctrl-A X ends the guest"),
    CLI_STR(struct args, vnc, 0, "vnc", "DISPLAY",
            "screen over VNC; :N is this machine only, 0.0.0.0:N is everybody"),
    CLI_LIST(struct args, forward, 0, "forward", "[ADDR:]HOST:GUEST",
             "make the guest's TCP port GUEST reachable at the host's port HOST"),
    CLI_FLAG(struct args, no_net, 0, "no-net", "no network card"),
    CLI_STR(struct args, control, 0, "control", "SOCKET",
            "take commands on this unix socket; see strata ctl.  The disks are disk0, disk1 ..."),
    CLI_STR(struct args, qemu, 0, "qemu", "PROGRAM",
            "the QEMU to start instead of the installed one"),
    CLI_QUIET_ROW(struct args, quiet),
    CLI_END};

struct disk {
    const char *name; /* as the user gave it */
    struct control_disk d;
    struct nbd_server *server;
    struct vhost_server *vhost; /* instead of it */
    int guest_fd;               /* QEMU's end, ours to close; -1 none */
    bool cdrom;
};

struct run {
    struct verb_ctx *ctx;
    const struct args *a;
    struct disk disks[VM_DRIVES_MAX];
    unsigned ndisks;
    struct vm_forward forwards[VM_FORWARDS_MAX];
    uint64_t memory;
    struct control_disk *control_disks[VM_DRIVES_MAX];
    struct control *control;
    struct vm *vm;
    int signo; /* first signal that asked us to stop; 0 none */
    bool ended;
};

/* ---------------------------------------------------------------- what may not be asked for */

static int check_outcome(struct verb_ctx *ctx, const struct args *a) {
    struct err *e = &ctx->err;
    if (a->snapshot == a->write) {
        err_set(e, EINVAL,
                a->snapshot ? "--snapshot and --write exclude each other"
                            : "say what becomes of what the guest writes: --snapshot "
                              "throws it away at the end, --write keeps it in the disk");
        if (!a->snapshot)
            err_hint(e, "strata run --snapshot %s", ctx->pos[0]);
        return -EINVAL;
    }
    if (a->write && (a->commit || a->keep.n || a->scratch || a->scratch_size))
        return err_set(e, EINVAL,
                       "--commit-on-exit, --keep, --scratch and --scratch-size are for "
                       "--snapshot; with --write the disk is written directly");
    if (a->commit && a->keep.n)
        return err_set(e, EINVAL, "--commit-on-exit and --keep exclude each other");
    if (a->keep.n && a->keep.n != (size_t)ctx->pos_n)
        return err_set(e, EINVAL, "%zu --keep for %d disks: give one for each, in order", a->keep.n,
                       ctx->pos_n);
    for (size_t i = 0; i < a->keep.n; i++) {
        if (access(a->keep.v[i], F_OK) == 0)
            return err_set(e, EEXIST, "--keep %s: the file exists", a->keep.v[i]);
    }
    return 0;
}

static int check_machine(struct run *r) {
    const struct args *a = r->a;
    struct err *e = &r->ctx->err;
    if (r->ctx->pos_n + (a->cdrom != NULL) > VM_DRIVES_MAX)
        return err_set(e, EINVAL, "%d disks; at most %d", r->ctx->pos_n, VM_DRIVES_MAX);
    if (a->nographic && a->vnc)
        return err_set(e, EINVAL, "--nographic and --vnc exclude each other");
    if (!a->kernel && (a->initrd || a->append))
        return err_set(e, EINVAL, "--initrd and --append need --kernel");
    if (a->boot && (!*a->boot || a->boot[strspn(a->boot, "acdnop")]))
        return err_set(e, EINVAL, "--boot %s: an order is letters such as c, d and n", a->boot);
    if (a->no_net && a->forward.n)
        return err_set(e, EINVAL, "--forward needs a network card, and --no-net takes it away");
    if (a->forward.n > VM_FORWARDS_MAX)
        return err_set(e, EINVAL, "%zu --forward; at most %d", a->forward.n, VM_FORWARDS_MAX);
    for (size_t i = 0; i < a->forward.n; i++) {
        int ret = vm_forward_parse(a->forward.v[i], &r->forwards[i], e);
        if (ret < 0)
            return ret;
    }
    return vm_memory_parse(a->memory ? a->memory : "1G", &r->memory, e);
}

/* ---------------------------------------------------------------- disks */

/* One for each processor of the guest, as far as that goes. */
static unsigned queues(const struct args *a) {
    return a->smp < VHOST_QUEUES_MAX ? (unsigned)a->smp : VHOST_QUEUES_MAX;
}

static int start_vhost(struct run *r, struct disk *d, int fd) {
    struct vhost_server_opts o = {.name = d->name,
                                  .node = d->d.node,
                                  .queues = queues(r->a),
                                  .block_size = 512,
                                  .connected = true};
    int ret = vhost_server_new(r->ctx->loop, fd, &o, &d->vhost, &r->ctx->err);
    if (ret == 0)
        d->d.export = vhost_server_export(d->vhost);
    return ret;
}

static int start_nbd(struct run *r, struct disk *d, int fd) {
    struct nbd_server_opts so = {.max_clients = 1, .handshake_timeout_ns = HANDSHAKE_NS};
    struct nbd_export_opts x = {.name = "", .node = d->d.node, .read_only = d->cdrom};
    int ret = nbd_server_new(r->ctx->loop, &so, &d->server, &r->ctx->err);
    if (ret == 0)
        ret = nbd_server_add(d->server, &x, &d->d.export, &r->ctx->err);
    if (ret < 0) {
        close(fd);
        return ret;
    }
    return nbd_server_attach(d->server, fd, &r->ctx->err);
}

static int open_disk_co(struct run *r, const char *name, bool cdrom) {
    struct verb_ctx *ctx = r->ctx;
    const struct args *a = r->a;
    struct disk *d = &r->disks[r->ndisks++];
    struct cli_image image = a->image;
    unsigned flags = a->write && !cdrom ? OPEN_RW | OPEN_UNMAP : OPEN_UNMAP;
    int fds[2], ret;

    *d = (struct disk){.name = name, .cdrom = cdrom, .guest_fd = -1};
    d->d.name = cdrom ? xstrdup("cdrom") : xasprintf("disk%u", r->ndisks - 1);
    r->control_disks[r->ndisks - 1] = &d->d;
    if (cdrom)
        image = (struct cli_image){.format = "raw", .cache = a->image.cache};
    ret = cli_open_co(ctx, name, &image, flags, &d->d.node);
    if (ret < 0)
        return ret;
    if (a->commit && !cdrom && fat_commit_is_for(d->d.node) &&
        (ret = fat_commit_check(d->d.node, &ctx->err)) < 0)
        return ret;
    if (a->snapshot && !cdrom) {
        d->d.scratch = (struct overlay_opts){a->scratch, a->scratch_size};
        ret = control_disk_snapshot_co(&d->d, &ctx->err);
        if (ret < 0)
            return ret;
    }

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) < 0)
        return err_errno(&ctx->err, errno, "cannot make a socket pair");
    d->guest_fd = fds[1];
    fcntl(fds[0], F_SETFL, O_NONBLOCK); /* of our end only: each has its own flags */
    if (a->transport == VM_TRANSPORT_VHOST_USER && !cdrom)
        return start_vhost(r, d, fds[0]);
    return start_nbd(r, d, fds[0]);
}

static int start_control(struct run *r) {
    struct control_opts o = {.program = "run", .disks = r->control_disks, .ndisks = r->ndisks};
    return r->a->control ? control_start(r->ctx->loop, r->a->control, &o, &r->control, &r->ctx->err)
                         : 0;
}

static void stop_servers_co(struct run *r) {
    control_stop_co(r->control);
    r->control = NULL;
    for (unsigned i = 0; i < r->ndisks; i++) {
        struct disk *d = &r->disks[i];
        if (d->guest_fd >= 0)
            close(d->guest_fd);
        d->guest_fd = -1;
        if (d->server) {
            nbd_server_stop_co(d->server);
            d->d.export = NULL;
            nbd_server_free(d->server);
        }
        d->server = NULL;
        if (d->vhost) {
            vhost_server_stop_co(d->vhost);
            d->d.export = NULL;
        }
        d->vhost = NULL;
    }
}

static void close_disks_co(struct run *r) {
    stop_servers_co(r);
    for (unsigned i = 0; i < r->ndisks; i++)
        control_disk_close_co(&r->disks[i].d);
}

/* ---------------------------------------------------------------- signals and terminal */

static const int stop_signals[] = {SIGINT, SIGTERM, SIGHUP};

static void on_signal(void *arg, int signo) {
    struct run *r = arg;
    if (!r->signo)
        r->signo = signo;
    if (r->vm && !r->ended)
        vm_stop(r->vm);
    else if (r->ended)
        cli_print_warning(r->ctx, "finishing what was begun first");
}

static int watch_signals(struct run *r) {
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

static void unwatch_signals(struct run *r) {
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

/* The guest's exit status, or -errno with ctx->err when it never ran. */
static int guest_co(struct run *r) {
    const struct args *a = r->a;
    AUTO_FREE char *vnc = a->vnc ? vm_vnc_display(a->vnc) : NULL;
    struct vm_drive drives[VM_DRIVES_MAX];
    struct terminal tty;
    struct vm_opts vo = {
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
        .net = !a->no_net,
        .forwards = r->forwards,
        .nforwards = (unsigned)a->forward.n,
        .drives = drives,
        .ndrives = r->ndisks,
        .extra = r->ctx->rest,
    };
    for (unsigned i = 0; i < r->ndisks; i++)
        drives[i] = (struct vm_drive){.fd = r->disks[i].guest_fd,
                                      .cdrom = r->disks[i].cdrom,
                                      .queues = r->disks[i].vhost ? queues(a) : 0};

    if (r->signo)
        return 128 + r->signo;
    say_acceleration(r, vo.accel);
    terminal_save(&tty);
    int ret = vm_start(r->ctx->loop, &vo, &r->vm, &r->ctx->err);
    if (ret < 0)
        return ret;
    for (unsigned i = 0; i < r->ndisks; i++) { /* so that the server sees QEMU go */
        close(r->disks[i].guest_fd);
        r->disks[i].guest_fd = -1;
    }
    ret = vm_wait_co(r->vm);
    r->ended = true;
    if (!r->signo)
        r->signo = pending_stop_signal();
    terminal_restore(&tty);
    vm_free(r->vm);
    if (ret < 0)
        return err_errno(&r->ctx->err, -ret, "lost sight of the guest");
    return r->signo ? 128 + r->signo : ret;
}

/* ---------------------------------------------------------------- what stays */

/* Saves what could not be committed; says where it is. */
static void rescue_co(struct run *r, struct disk *d) {
    struct err e AUTO_ERR = ERR_INIT;
    AUTO_FREE char *name = xasprintf("%s.uncommitted.qcow2", d->name);
    if (overlay_keep_co(d->d.node, name, false, &e) < 0) {
        err_prefix(&e, "the guest's changes could not be saved either");
        cli_print_error(r->ctx, &e);
    } else {
        cli_print_warning(r->ctx, "the guest's changes are saved in %s", name);
    }
}

/* What the guest wrote and did not give back: the data in the overlay itself, whole clusters. */
static uint64_t overlay_data_co(struct node *overlay) {
    uint64_t sum = 0;
    struct status st;
    for (uint64_t at = 0; at < overlay->size; at += st.length) {
        if (disk_status_co(overlay, at, overlay->size - at, STATUS_TOP_ONLY, &st) < 0)
            break; /* only a figure for a message */
        if (st.present && st.data)
            sum += st.length;
    }
    return sum;
}

static int settle_snapshot_co(struct run *r, unsigned i, int status, struct err *e) {
    const struct args *a = r->a;
    struct disk *d = &r->disks[i];
    char size[32];
    AUTO_FREE char *name = cli_safe(d->name);

    size_human(overlay_data_co(d->d.node), size);
    if (a->keep.n) {
        int ret = control_disk_finish_keep_co(&d->d, a->keep.v[i], e);
        if (ret < 0)
            return err_prefix(e, "keeping the changes of %s", name);
        if (!a->quiet)
            fprintf(stderr, "strata: run: kept %s of changes in %s; %s is unchanged\n", size,
                    a->keep.v[i], name);
        return 0;
    }
    if (a->commit && status == 0) {
        int ret = control_disk_finish_commit_co(&d->d, e);
        if (ret < 0) {
            ret = err_prefix(e, "committing to %s", name);
            if (!fat_commit_is_for(d->d.base)) /* which saves the disk itself */
                rescue_co(r, d);
            return ret;
        }
        if (!a->quiet)
            fprintf(stderr, "strata: run: wrote %s of changes into %s\n", size, name);
        return 0;
    }
    if (d->d.journal) {
        err_set(e, EIO, "a commit to %s did not end", name);
        err_hint(e, "strata commit %s completes it", d->d.journal);
        return -EIO;
    }
    if (a->commit)
        cli_print_warning(r->ctx, "the guest ended with status %d: nothing was committed", status);
    if (!a->quiet)
        fprintf(stderr, "strata: run: threw away %s that the guest wrote; %s is unchanged\n", size,
                name);
    return 0;
}

/* Keeps, commits, flushes or forgets, disk by disk; an error of one does not stop the others. */
static int settle_co(struct run *r, int status) {
    int result = status;
    for (unsigned i = 0; i < r->ndisks; i++) {
        struct disk *d = &r->disks[i];
        struct err e AUTO_ERR = ERR_INIT;
        int ret = 0;
        if (d->cdrom)
            continue;
        if (r->a->snapshot) {
            ret = settle_snapshot_co(r, i, status, &e);
        } else {
            ret = disk_flush_co(d->d.node);
            if (ret < 0)
                err_errno(&e, -ret, "%s: cannot flush what the guest wrote", d->name);
        }
        if (ret < 0) {
            cli_print_error(r->ctx, &e);
            result = result ? result : 1;
        }
    }
    return result;
}

static int run_verb_co(struct verb_ctx *ctx) {
    const struct args *a = ctx->args;
    AUTO_FREE struct run *r = xcalloc(1, sizeof(*r));
    int ret;

    *r = (struct run){.ctx = ctx, .a = a};
    ret = check_outcome(ctx, a);
    if (ret < 0 || (ret = check_machine(r)) < 0)
        return ret;
    ret = watch_signals(r);
    for (int i = 0; ret >= 0 && i < ctx->pos_n; i++)
        ret = open_disk_co(r, ctx->pos[i], false);
    if (ret >= 0 && a->cdrom)
        ret = open_disk_co(r, a->cdrom, true);
    if (ret >= 0)
        ret = start_control(r);
    if (ret >= 0)
        ret = guest_co(r);
    stop_servers_co(r);
    if (ret >= 0 && r->ended)
        ret = settle_co(r, ret);
    close_disks_co(r);
    unwatch_signals(r);
    return ret;
}

static const char *const details[] = {
    "Boots the installed QEMU on one or more disks.  What the guest writes goes to a throw-away "
    "overlay (--snapshot) or into the disk (--write); one of the two has to be given.  The overlay "
    "is a file without a name in the scratch folder: its space is free again as soon as the guest "
    "has ended, however it ended.",
    "QEMU reaches the disks over a private socket to this process and ends with it; Ctrl-C, "
    "SIGTERM and even SIGKILL leave no process, socket or file behind.",
    "With --commit-on-exit the changes are written into the disk only when the guest ended by "
    "itself and QEMU returned 0.",
    NULL};

static const struct cli_example examples[] = {
    {"strata run --snapshot disk.qcow2", "try something; afterwards the disk is as it was"},
    {"strata run --write -m 4G --smp 2 --cdrom install.iso --boot dc disk.qcow2",
     "install a system"},
    {"strata run --snapshot --keep experiment.qcow2 --nographic disk.qcow2",
     "keep the changes as an overlay of their own"},
    {"strata run --snapshot --forward 2222:22 disk.qcow2 -- -device virtio-rng-pci",
     "reach the guest with ssh -p 2222 localhost; pass a device on to QEMU"},
    {NULL, NULL}};

static const struct cli_status statuses[] = {
    {128, "128 + n: signal n ended the guest, or asked strata to stop"}, {0, NULL}};

const struct verb verb_run = {
    .name = "run",
    .summary = "boot a guest on disks that stay as they are, or are written",
    .synopsis = "FILE...",
    .pos_min = 1,
    .pos_max = -1,
    .rest = "QEMU-ARGUMENT...",
    .opts = opts,
    .args_size = sizeof(struct args),
    .details = details,
    .examples = examples,
    .statuses = statuses,
    .run_co = run_verb_co,
};
