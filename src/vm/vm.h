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
 * images are ours to open and are served like disks, so QEMU never probes their format).
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

struct vm_drive {
    int fd; /* a connected socket, borrowed; its number is the same in the child */
    bool cdrom;
    unsigned queues; /* vhost-user with so many; 0: NBD */
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
    bool net;        /* user networking */
    const struct vm_forward *forwards;
    unsigned nforwards;
    const struct vm_drive *drives;
    unsigned ndrives;
    char *const *extra; /* passed on as they are; NULL-terminated, or NULL */
};

/* KVM when /dev/kvm opens read-write and, on x86, the processor says vmx or svm. */
enum vm_accel vm_accel_detect(void);

/* "HOST:GUEST" or "ADDR:HOST:GUEST" (IPv4).  -EINVAL. */
int vm_forward_parse(const char *text, struct vm_forward *out, struct err *e);
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

struct vm;
/*
 * Starts the guest.  Descriptors of o->drives are inherited (the caller closes its copies
 * afterwards), nothing else is.  Errors: -ENOENT (no QEMU; the hint names the package), -EACCES,
 * -ENOTSUP, -ENOMEM.  Loop context or task.
 */
int vm_start(struct loop *l, const struct vm_opts *o, struct vm **out, struct err *e);
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
/* After vm_wait_co.  Accepts NULL. */
void vm_free(struct vm *vm);

#endif
