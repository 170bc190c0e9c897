/* SPDX-License-Identifier: MIT */
/*
 * A guest on our disks: the command line of the installed QEMU, and the child process.
 *
 * How the disks get there.  Each disk is one end of a socketpair whose other end the caller gives
 * to an NBD server of its own loop; QEMU is told the inherited descriptor's number
 * (`server.type=fd`, decimal: qapi/sockets.json, SocketAddressType).  Such a pair has no name: no
 * file to protect or remove, no abstract name that another user could connect to, nobody but this
 * child can ever be on it, and it ends with either process.  Reconnecting is impossible, and not
 * wanted: server and guest live and die together.
 *
 * By default disks are vhost-user-blk devices on such a pair (the guest's memory is a memfd then,
 * which QEMU shares with us); CDs, and disks with the transport nbd, are NBD.
 *
 * How they die together.  The child asks for SIGKILL at its parent's death (PR_SET_PDEATHSIG)
 * before exec, so that even kill -9 of strata leaves no QEMU; vm_stop() asks with SIGTERM first and
 * kills after a grace time.  QEMU's death is seen through a pidfd.
 *
 * Trust.  Every name reaches QEMU as one argument of execv, never through a shell, and nothing that
 * a user gives is placed where QEMU would parse a comma or a protocol prefix out of it (cdrom
 * images are ours to open and are served like disks, so QEMU never probes their format; a monitor's
 * socket and firmware are inherited too).
 */
#ifndef STRATA_VM_VM_H
#define STRATA_VM_VM_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

struct err;
struct loop;

/* How disks reach the guest: through its own memory, or over NBD. */
enum vm_transport { VM_TRANSPORT_VHOST_USER, VM_TRANSPORT_NBD };
extern const char *const vm_transport_names[]; /* "vhost-user", "nbd", NULL */

enum vm_accel { VM_ACCEL_AUTO, VM_ACCEL_KVM, VM_ACCEL_TCG };
extern const char *const vm_accel_names[]; /* "auto", "kvm", "tcg", NULL */

/* One port of the host that reaches one of the guest (TCP, through user networking). */
struct vm_forward {
    char addr[48]; /* on the host; "127.0.0.1" when the user gave none */
    uint16_t host, guest;
};

/* Every descriptor below is borrowed; its number is the same in the child. */
struct vm_drive {
    int fd; /* a connected socket */
    bool cdrom;
    bool read_only;  /* a CD is, whatever this says */
    unsigned queues; /* vhost-user with so many; 0: NBD */
};

struct vm_net {
    enum vm_net_kind { VM_NET_NONE, VM_NET_USER, VM_NET_TAP, VM_NET_BRIDGE } kind;
    char name[16]; /* of the tap device or the bridge: IFNAMSIZ */
};

/* Where QEMU's own monitor is reached; it listens, and never waits for anybody. */
struct vm_monitor {
    enum vm_monitor_kind {
        VM_MONITOR_NONE,
        VM_MONITOR_STDIO,
        VM_MONITOR_UNIX,
        VM_MONITOR_TCP,
        VM_MONITOR_TELNET
    } kind;
    const char *path; /* UNIX: borrowed from the text that was parsed */
    int fd;           /* UNIX: the listening socket, which the caller makes */
    char host[48];    /* TCP, TELNET: an IPv4 address */
    uint16_t port;
};

/* The firmware of --uefi: two files open, the second a copy that nobody else has. */
struct vm_uefi {
    int code_fd, vars_fd;
};

#define VM_DRIVES_MAX 16
#define VM_FORWARDS_MAX 32

struct vm_opts {
    const char *qemu;    /* program; NULL: qemu-system-* of this machine, found in PATH */
    enum vm_accel accel; /* AUTO: vm_accel_detect() */
    uint64_t memory;     /* bytes, rounded up to MiB */
    unsigned smp;
    const char *boot; /* boot order letters; NULL: firmware's own */
    const char *kernel, *initrd, *append;
    bool nographic;
    const char *vnc; /* display, see vm_vnc_display(); NULL none */
    struct vm_net net;
    const struct vm_forward *forwards; /* user networking only */
    unsigned nforwards;
    const struct vm_drive *drives;
    unsigned ndrives;
    const struct vm_monitor *monitor; /* NULL none */
    const struct vm_uefi *uefi;       /* NULL: the machine's own firmware */
    bool no_terminal;                 /* the terminal is somebody else's; no window either */
    int control_fd;                   /* a socket for vm_powerdown(); 0 none */
    char *const *extra;               /* passed on as they are; NULL-terminated, or NULL */
};

/* KVM when /dev/kvm opens read-write and, on x86, the processor says vmx or svm. */
enum vm_accel vm_accel_detect(void);

/* "HOST:GUEST" or "ADDR:HOST:GUEST" (IPv4).  -EINVAL. */
int vm_forward_parse(const char *text, struct vm_forward *out, struct err *e);
/* "user", "none", "tap=NAME", "bridge=NAME".  -EINVAL. */
int vm_net_parse(const char *text, struct vm_net *out, struct err *e);
/*
 * "stdio", "unix:PATH", "tcp:[ADDR:]PORT", "telnet:[ADDR:]PORT"; without ADDR this machine only.
 * `out` points into `text`; out->fd is left to the caller.  -EINVAL.
 */
int vm_monitor_parse(const char *text, struct vm_monitor *out, struct err *e);
/* As a shell takes it for one word.  Owned. */
char *vm_quote(const char *word);
/* What --vnc means: ":N" binds to this machine only, whatever else goes to QEMU.  Owned. */
char *vm_vnc_display(const char *text);
/* "512" is MiB, as with QEMU; "2G", "768M".  1 MiB to 64 TiB.  -EINVAL, -ERANGE. */
int vm_memory_parse(const char *text, uint64_t *bytes, struct err *e);

/*
 * The whole command line, program first, NULL-terminated; freed by vm_args_free().  Pure: looks at
 * nothing but `o` (accel must be resolved).  -ENOTSUP on a machine that we know no QEMU for.
 */
int vm_args(const struct vm_opts *o, char ***out, struct err *e);
void vm_args_free(char **args);

/*
 * UEFI firmware of the distribution (or of the folder $STRATA_OVMF) for this machine: the code
 * open read-only, the variables copied into memory.  -ENOENT: the hint names the package.
 */
int vm_uefi_open(struct vm_uefi *out, struct err *e);
void vm_uefi_close(struct vm_uefi *u); /* descriptors of -1 are fine */

struct vm;
/*
 * Starts the guest.  The descriptors in `o` are inherited (the caller closes its copies
 * afterwards), nothing else is.  Errors: -ENOENT (no QEMU; the hint names the package), -EACCES,
 * -ENOTSUP, -ENOMEM.  Loop context or task.
 */
int vm_start(struct loop *l, const struct vm_opts *o, struct vm **out, struct err *e);
/*
 * Starts another program on this terminal under the same rules: it is terminated when this process
 * dies, and waited for and stopped as a guest is.  args: NULL-terminated, the program found in
 * PATH.
 */
int vm_start_beside(struct loop *l, char *const *args, struct vm **out, struct err *e);
/*
 * Waits until the child has ended; once.  Returns its exit status, or 128 + the signal that killed
 * it.  -errno when it cannot be known.
 */
int vm_wait_co(struct vm *vm);
/*
 * Asks the child to end (SIGTERM); a vm_wait_co in progress kills it when it has not ended after
 * five seconds.  A second call kills at once.  Loop context: from a signal handler of the loop.
 */
void vm_stop(struct vm *vm);
/* Presses the power button: `fd` is the other end of control_fd.  Never waits. */
void vm_powerdown(int fd);
/* After vm_wait_co.  Accepts NULL. */
void vm_free(struct vm *vm);

#endif
