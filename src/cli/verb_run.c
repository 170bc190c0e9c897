/* SPDX-License-Identifier: MIT */
/*
 * strata run: boots a guest on our disks and decides, at its end, what stays.
 *
 *     disk file --(--snapshot: throw-away overlay)--> node --> NBD server --socketpair--> QEMU
 *                                                     all of this in our loop | the child
 *
 * Order.  Everything that can be refused is refused before QEMU starts: options, names, locks,
 * existing --keep files, missing firmware.  Then: servers, signals, terminal state saved, child,
 * wait.  Afterwards, whatever ended the child (its own exit, a signal to us, its death): terminal
 * restored, servers stopped (their requests have finished), then keep, commit or throw away, then
 * the nodes closed.
 *
 * Invariants
 *  1. The user said what becomes of the guest's writes: --snapshot or --write (for all disks, or
 * behind a name), never a default.
 *  2. Whatever has a name and is not the user's to keep (a monitor's socket, a stateless overlay)
 *     is known to the janitor from the moment it is there: killed or not, we leave nothing.
 *  Those of disks and of their end are in run_disks.c and run_settle.c.
 *
 * The exit status is the guest's: QEMU's own, 128 + n when signal n killed it or asked us to stop.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "base/bytes.h"
#include "cli/run.h"
#include "disk/open.h"
#include "vm/ssh.h"

static const struct cli_opt opts[] = {
    CLI_FLAG(
        struct run_args, snapshot, 0, "snapshot",
        "the guest writes to a temporary overlay that is thrown away; the disk stays as it is"),
    CLI_FLAG(struct run_args, write, 0, "write", "the guest writes to the disk itself"),
    CLI_LIST(struct run_args, stateless, 0, "stateless", "FILE",
             "the guest writes to an overlay made at FILE, which is deleted at the end; once for "
             "each disk without a mode, in order"),
    CLI_FLAG(struct run_args, keep_overlay, 0, "keep-overlay",
             "with --stateless: the overlay stays"),
    CLI_FLAG(struct run_args, commit, 0, "commit-on-exit",
             "with --snapshot: write the changes into the disk when the guest has ended well"),
    CLI_LIST(
        struct run_args, keep, 0, "keep", "FILE",
        "with --snapshot: save the changes as a qcow2 overlay; once for each such disk, in order"),
    CLI_STR(struct run_args, scratch, 0, "scratch", "DIR",
            "folder of the temporary overlay ($TMPDIR, else /var/tmp), or memory:SIZE"),
    CLI_SIZE(struct run_args, scratch_size, 0, "scratch-size", "SIZE", 0, 0, INT64_MAX,
             "the most space that the overlay of each disk may use; 0 is no limit"),
    CLI_IMAGE_ROWS(struct run_args, image),
    CLI_STR(struct run_args, memory, 'm', "memory", "SIZE",
            "memory of the guest, in MiB or with a "
            "suffix (default 1G)"),
    CLI_U64(struct run_args, smp, 0, "smp", "N", 1, 1, 255, "processors of the guest"),
    CLI_ENUM(struct run_args, accel, 0, "accel", "HOW", vm_accel_names, VM_ACCEL_AUTO,
             "kvm, tcg (emulation), or auto: kvm where the machine has it"),
    CLI_ENUM(struct run_args, transport, 0, "transport", "HOW", vm_transport_names,
             VM_TRANSPORT_VHOST_USER,
             "how disks reach the guest: vhost-user (in its own memory), or nbd"),
    CLI_STR(struct run_args, cdrom, 0, "cdrom", "FILE", "a CD image, read-only"),
    CLI_STR(struct run_args, boot, 0, "boot", "ORDER",
            "what to boot from: letters c (disk), d (CD), n (network), in order"),
    CLI_STR(struct run_args, kernel, 0, "kernel", "FILE", "boot this Linux kernel directly"),
    CLI_STR(struct run_args, initrd, 0, "initrd", "FILE", "initial RAM disk of that kernel"),
    CLI_STR(struct run_args, append, 0, "append", "TEXT", "command line of that kernel"),
    CLI_FLAG(struct run_args, nographic, 0, "nographic",
             "serial console on this terminal; Ctrl-A X ends the guest"),
    CLI_STR(struct run_args, vnc, 0, "vnc", "DISPLAY",
            "screen over VNC; :N is this machine only, 0.0.0.0:N is everybody"),
    CLI_STR(struct run_args, monitor, 0, "monitor", "WHERE",
            "QEMU's own monitor: stdio, unix:PATH, tcp:[ADDR:]PORT or telnet:[ADDR:]PORT"),
    CLI_FLAG(struct run_args, uefi, 0, "uefi",
             "boot with UEFI firmware (OVMF); what it stores is thrown away"),
    CLI_STR(struct run_args, net, 0, "net", "HOW",
            "user (a network of its own behind this machine; the default), tap=NAME, bridge=NAME "
            "or none"),
    CLI_LIST(struct run_args, forward, 0, "forward", "[ADDR:]HOST:GUEST",
             "make the guest's TCP port GUEST reachable at the host's port HOST"),
    CLI_FLAG(struct run_args, no_net, 0, "no-net", "the old name of --net none"),
    CLI_FLAG(struct run_args, ssh, 0, "ssh",
             "wait for the guest's sshd and open a session here; the guest ends with it"),
    CLI_STR(struct run_args, ssh_user, 0, "ssh-user", "NAME", "who logs in with --ssh"),
    CLI_STR(struct run_args, control, 0, "control", "SOCKET",
            "take commands on this unix socket; see strata ctl.  The disks are disk0, disk1 ..."),
    CLI_STR(struct run_args, qemu, 0, "qemu", "PROGRAM",
            "the QEMU to start instead of the installed one"),
    CLI_FLAG(struct run_args, print, 0, "print",
             "show the command line of QEMU, quoted for a shell, and start nothing"),
    CLI_QUIET_ROW(struct run_args, quiet),
    CLI_END};

/* ---------------------------------------------------------------- what may not be asked for */

static int check_net(struct run *r) {
    const struct run_args *a = r->a;
    struct err *e = &r->ctx->err;
    int ret = vm_net_parse(a->net ? a->net : a->no_net ? "none" : "user", &r->net, e);
    if (ret < 0)
        return ret;
    if (a->no_net && r->net.kind != VM_NET_NONE)
        return err_set(e, EINVAL, "--no-net and --net %s exclude each other", a->net);
    if (a->forward.n && r->net.kind == VM_NET_NONE)
        return err_set(e, EINVAL, "--forward needs a network card, and %s takes it away",
                       a->no_net ? "--no-net" : "--net none");
    if ((a->forward.n || a->ssh) && r->net.kind != VM_NET_USER)
        return err_set(e, EINVAL,
                       "%s needs --net user: only there does QEMU know the guest's address",
                       a->forward.n ? "--forward" : "--ssh");
    if (a->forward.n + a->ssh > VM_FORWARDS_MAX)
        return err_set(e, EINVAL, "%zu --forward; at most %d", a->forward.n,
                       VM_FORWARDS_MAX - a->ssh);
    for (size_t i = 0; i < a->forward.n; i++) {
        ret = vm_forward_parse(a->forward.v[i], &r->forwards[r->nforwards++], e);
        if (ret < 0)
            return ret;
    }
    return 0;
}

/* --ssh has the terminal, and a port of its own. */
static int check_ssh(struct run *r) {
    const struct run_args *a = r->a;
    struct err *e = &r->ctx->err;
    if (!a->ssh)
        return a->ssh_user ? err_set(e, EINVAL, "--ssh-user is for --ssh") : 0;
    if (a->nographic)
        return err_set(e, EINVAL,
                       "--ssh and --nographic exclude each other: both use the terminal");
    if (a->ssh_user && (!*a->ssh_user || *a->ssh_user == '-'))
        return err_set(e, EINVAL, "--ssh-user %s: not a user's name", a->ssh_user);
    int ret = vm_ssh_find(e);
    if (ret == 0)
        ret = vm_free_port(&r->ssh_port, e);
    if (ret == 0) {
        struct vm_forward *f = &r->forwards[r->nforwards++];
        *f = (struct vm_forward){.addr = "127.0.0.1", .host = r->ssh_port, .guest = 22};
    }
    return ret;
}

static int check_monitor(struct run *r) {
    const struct run_args *a = r->a;
    struct err *e = &r->ctx->err;
    if (!a->monitor)
        return 0;
    int ret = vm_monitor_parse(a->monitor, &r->monitor, e);
    if (ret < 0 || r->monitor.kind != VM_MONITOR_STDIO || !(a->ssh || a->nographic))
        return ret;
    err_set(e, EINVAL, "--monitor stdio and --%s exclude each other: both use the terminal",
            a->ssh ? "ssh" : "nographic");
    if (a->nographic)
        err_hint(e, "with --nographic the monitor is there already: Ctrl-A C");
    return -EINVAL;
}

static int check_machine(struct run *r) {
    const struct run_args *a = r->a;
    struct err *e = &r->ctx->err;
    if (a->nographic && a->vnc)
        return err_set(e, EINVAL, "--nographic and --vnc exclude each other");
    if (!a->kernel && (a->initrd || a->append))
        return err_set(e, EINVAL, "--initrd and --append need --kernel");
    if (a->boot && (!*a->boot || a->boot[strspn(a->boot, "acdnop")]))
        return err_set(e, EINVAL, "--boot %s: an order is letters such as c, d and n", a->boot);
    int ret = check_net(r);
    if (ret == 0)
        ret = check_ssh(r);
    if (ret == 0)
        ret = check_monitor(r);
    if (ret < 0)
        return ret;
    return vm_memory_parse(a->memory ? a->memory : "1G", &r->memory, e);
}

/* ---------------------------------------------------------------- the order of it all */

static int start_control(struct run *r) {
    struct control_opts o = {.program = "run", .disks = r->control_disks, .ndisks = r->ndisks};
    return r->a->control ? control_start(r->ctx->loop, r->a->control, &o, &r->control, &r->ctx->err)
                         : 0;
}

/* Where something has a name, somebody has to be left to remove it. */
static int run_prepare(struct verb_ctx *ctx) {
    struct run_args *a = ctx->args;
    a->janitor.fd = -1;
    bool named = a->stateless.n || (a->monitor && !strncmp(a->monitor, "unix:", 5));
    return named && !a->print ? janitor_start(&a->janitor, &ctx->err) : 0;
}

/* From the first open to the last close. */
static int run_disks_co(struct run *r) {
    int ret = run_watch_signals(r);
    for (unsigned i = 0; ret >= 0 && i < r->ndisks; i++)
        ret = run_open_disk_co(r, i);
    if (ret >= 0)
        ret = start_control(r);
    if (ret >= 0)
        ret = run_guest_co(r);
    run_stop_servers_co(r);
    if (ret >= 0 && r->ended)
        ret = run_settle_co(r, ret);
    if (ret == 0 && r->ssh_status > 0)
        ret = r->ssh_status;
    return ret;
}

static int run_verb_co(struct verb_ctx *ctx) {
    struct run_args *a = ctx->args;
    AUTO_FREE struct run *r = xcalloc(1, sizeof(*r));

    *r = (struct run){.ctx = ctx,
                      .a = a,
                      .monitor.fd = -1,
                      .uefi = {-1, -1},
                      .ssh_fd = -1,
                      .ssh_status = -1,
                      .power_fd = -1};
    int ret = run_modes(r);
    if (ret == 0)
        ret = check_machine(r);
    if (ret == 0)
        ret = a->print ? run_print(r) : run_disks_co(r);
    run_close_disks_co(r);
    run_unwatch_signals(r);
    janitor_stop(&a->janitor);
    return ret;
}

static const char *const details[] = {
    "Boots the installed QEMU on one or more disks.  What the guest writes goes to a throw-away "
    "overlay (--snapshot) or into the disk (--write); one of the two has to be given, or a mode "
    "behind the name of each disk: disk.qcow2:snapshot, data.img:write, tools.iso:ro.  (A file whose "
    "real name ends like that is meant itself.)  The overlay is a file without a name in the scratch folder: its space is free again as soon as the guest "
    "has ended, however it ended.",
    "QEMU reaches the disks over a private socket to this process and ends with it; Ctrl-C, "
    "SIGTERM and even SIGKILL leave no process, socket or file behind.",
    "With --commit-on-exit the changes are written into the disk only when the guest ended by "
    "itself and QEMU returned 0.",
    "With --stateless the overlay is a qcow2 file at the place that you name, made before the guest "
    "starts and deleted after it, or kept (--keep-overlay).",
    "With --ssh a free port of this machine is forwarded to the guest's port 22; as soon as an ssh "
    "server greets there, ssh runs on this terminal.  The guest ends when the session does: at once "
    "where all is thrown away, else as if its power button were pressed, and by force a minute "
    "later.  The exit status is that of ssh then.",
    NULL};

static const struct cli_example examples[] = {
    {"strata run --snapshot disk.qcow2", "try something; afterwards the disk is as it was"},
    {"strata run --write -m 4G --smp 2 --cdrom install.iso --boot dc disk.qcow2",
     "install a system"},
    {"strata run --snapshot --keep experiment.qcow2 --nographic disk.qcow2",
     "keep the changes as an overlay of their own"},
    {"strata run --snapshot --forward 2222:22 disk.qcow2 -- -device virtio-rng-pci",
     "reach the guest with ssh -p 2222 localhost; pass a device on to QEMU"},
    {"strata run --ssh --ssh-user root --uefi disk.qcow2:snapshot data.img:write tools.iso:ro",
     "a session in a guest with three disks"},
    {"strata run --stateless /tmp/changes.qcow2 --monitor unix:/tmp/guest.mon disk.qcow2",
     "changes in a file of that name, QEMU's monitor on a socket"},
    {NULL, NULL}};

static const struct cli_status statuses[] = {
    {128, "128 + n: signal n ended the guest, or asked strata to stop"}, {0, NULL}};

const struct verb verb_run = {
    .name = "run",
    .summary = "boot a guest on disks that stay as they are, or are written",
    .synopsis = "FILE[:MODE]...",
    .pos_min = 1,
    .pos_max = -1,
    .rest = "QEMU-ARGUMENT...",
    .opts = opts,
    .args_size = sizeof(struct run_args),
    .details = details,
    .examples = examples,
    .statuses = statuses,
    .prepare = run_prepare,
    .run_co = run_verb_co,
};
