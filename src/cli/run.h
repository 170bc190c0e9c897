/* SPDX-License-Identifier: MIT */
/*
 * strata run: what its files share.
 *
 *     verb_run.c    options, what is refused, the order of it all
 *     run_modes.c   what becomes of each disk: from the names and the global options
 *     run_disks.c   opened, layered, served; and let go
 *     run_guest.c   signals, terminal, the child, its monitor and firmware; --print
 *     run_ssh.c     the session of --ssh
 *     run_settle.c  what stays
 */
#ifndef STRATA_CLI_RUN_H
#define STRATA_CLI_RUN_H

#include "cli/cli.h"
#include "control/control.h"
#include "runtime/task.h"
#include "vm/janitor.h"
#include "vm/vm.h"

struct nbd_server;
struct vhost_server;

struct run_args {
    struct cli_image image;
    bool snapshot, write, commit, nographic, no_net, quiet, ssh, uefi, print, keep_overlay;
    struct cli_list keep, forward, stateless;
    const char *scratch;
    uint64_t scratch_size;
    const char *memory;
    uint64_t smp;
    int accel, transport;
    const char *cdrom, *boot, *kernel, *initrd, *append, *vnc, *qemu, *control, *net, *monitor,
        *ssh_user;
    struct janitor janitor; /* from prepare to run */
};

enum run_mode { RUN_UNSAID, RUN_SNAPSHOT, RUN_WRITE, RUN_RO, RUN_STATELESS };

struct run_disk {
    char *name; /* as the user gave it, without the mode */
    enum run_mode mode;
    bool cdrom;
    struct control_disk d;
    struct nbd_server *server;
    struct vhost_server *vhost;       /* instead of it */
    int guest_fd;                     /* QEMU's end, ours to close; -1 none */
    const char *overlay;              /* STATELESS: the file's name; borrowed */
    char *overlay_dir;                /* of it; owned */
    struct janitor_file overlay_file; /* while it is ours */
};

struct run {
    struct verb_ctx *ctx;
    struct run_args *a;
    struct run_disk disks[VM_DRIVES_MAX];
    unsigned ndisks;
    struct vm_forward forwards[VM_FORWARDS_MAX];
    unsigned nforwards;
    uint64_t memory;
    struct vm_net net;
    struct vm_monitor monitor;
    struct janitor_file monitor_file;
    struct vm_uefi uefi;
    struct control_disk *control_disks[VM_DRIVES_MAX];
    struct control *control;
    struct vm *vm;
    int signo; /* first signal that asked us to stop; 0 none */
    bool ended;

    /* --ssh */
    uint16_t ssh_port;
    struct vm *ssh;        /* the session's process; NULL before and after it */
    int ssh_fd;            /* a socket that the session's task waits on; -1 none */
    struct task *ssh_task; /* while it lives */
    struct task_group ssh_group;
    int ssh_status; /* how the session ended; -1: it did not, or the guest was first */
    int power_fd;   /* to the guest's power button; -1 none */
    bool dismissed; /* we ended the guest after the session: its status says nothing */
    bool forced;    /* and it did not end when asked */
};

/*
 * Splits names and modes and fills r->disks (not opened).  A disk without a mode of its own gets
 * the global one; without either it is refused, naming both.
 */
int run_modes(struct run *r);
/* Disks whose changes are apart from them at first. */
unsigned run_count(const struct run *r, enum run_mode mode);
static inline bool run_temporary(const struct run_disk *d) {
    return d->mode == RUN_SNAPSHOT || d->mode == RUN_STATELESS;
}

/* One for each processor of the guest, as far as that goes. */
unsigned run_queues(const struct run_args *a);
bool run_by_vhost(const struct run_args *a, const struct run_disk *d);
int run_open_disk_co(struct run *r, unsigned i);
void run_stop_servers_co(struct run *r);
void run_close_disks_co(struct run *r);

int run_watch_signals(struct run *r);
void run_unwatch_signals(struct run *r);
/* The guest's exit status, or -errno with ctx->err when it never ran. */
int run_guest_co(struct run *r);
int run_print(struct run *r);

/* Begins to wait for the guest's sshd, beside everything else. */
void run_ssh_begin(struct run *r);
/* The guest has ended, or we were asked to: the session ends too.  Waits for it. */
void run_ssh_end_co(struct run *r);

/* Keeps, commits, flushes or forgets, disk by disk; an error of one does not stop the others. */
int run_settle_co(struct run *r, int status);

#endif
