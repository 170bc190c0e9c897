/* SPDX-License-Identifier: MIT */
/*
 * QEMU's command line from our options.
 *
 * Representation: a growing vector of owned strings.  Choices that are not obvious:
 *  - virtio-blk with werror/rerror=report: QEMU's default for a full disk is to stop the guest and
 *    wait for somebody on its monitor; a scratch cap must give the guest ENOSPC instead.
 *  - `-no-user-config`: the same guest for everybody, whatever lies in /etc/qemu.
 *  - `--nographic` is QEMU's own (serial console and monitor on this terminal, firmware output
 *    included), except with a kernel of the user's: then firmware has nothing to say, and without
 *    -nographic it does not draw escape codes into the log.
 *  - A monitor of the user's takes the place of the default ones, the one behind Ctrl-A C on a
 * serial console among them: then that console is asked for in so many words.
 *  - Firmware and a monitor's socket reach QEMU as descriptors (fdset, chardev fd=), so no name of
 *    theirs is parsed and the variables need no file.
 *  - `-no-reboot` is not ours to give: a guest that reboots, reboots.
 *
 * Sources: qemu-system-x86_64 7.2 `-help`, `-device virtio-blk-pci,help`; qapi/block-core.json
 * (BlockdevOptionsNbd), qapi/sockets.json (SocketAddress, "fd": a decimal number at start-up).
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "base/strbuf.h"
#include "vm/vm.h"

const char *const vm_transport_names[] = {"vhost-user", "nbd", NULL};
const char *const vm_accel_names[] = {"auto", "kvm", "tcg", NULL};

/* What `uname -m` says, and the QEMU for it. */
static const struct machine {
    const char *uname, *program, *machine;
    bool pc; /* IDE cdrom, VGA */
} machines[] = {
    {"x86_64", "qemu-system-x86_64", "q35", true},
    {"aarch64", "qemu-system-aarch64", "virt", false},
    {"riscv64", "qemu-system-riscv64", "virt", false},
};

struct argv {
    char **v;
    size_t n, cap;
};

static void push(struct argv *a, char *owned) {
    if (a->n + 2 > a->cap) {
        size_t cap = a->cap ? 2 * a->cap : 64;
        char **v = xcalloc(cap, sizeof(*v));
        if (a->n)
            memcpy(v, a->v, a->n * sizeof(*v));
        free(a->v);
        a->v = v;
        a->cap = cap;
    }
    a->v[a->n++] = owned;
}
static void add(struct argv *a, const char *s) {
    push(a, xstrdup(s));
}
static void add2(struct argv *a, const char *option, const char *value) {
    add(a, option);
    add(a, value);
}

void vm_args_free(char **args) {
    if (!args)
        return;
    for (char **p = args; *p; p++)
        free(*p);
    free(args);
}

static void add_drives(struct argv *a, const struct vm_opts *o, bool pc) {
    unsigned disk = 0, cdrom = 0;
    for (unsigned i = 0; i < o->ndrives; i++) {
        const struct vm_drive *d = &o->drives[i];
        if (d->queues) {
            add(a, "-chardev");
            push(a, xasprintf("socket,id=strata%u,fd=%d", i, d->fd));
            add(a, "-device");
            push(a, xasprintf("vhost-user-blk-pci,chardev=strata%u,id=disk%u,num-queues=%u", i,
                              disk++, d->queues));
            continue;
        }
        add(a, "-blockdev");
        push(a, xasprintf("driver=nbd,node-name=strata%u,server.type=fd,server.str=%d,"
                          "discard=unmap,read-only=%s",
                          i, d->fd, d->cdrom || d->read_only ? "on" : "off"));
        if (d->cdrom) {
            if (!pc && cdrom == 0)
                add2(a, "-device", "virtio-scsi-pci");
            add(a, "-device");
            push(a, xasprintf("%s,drive=strata%u,id=cdrom%u", pc ? "ide-cd" : "scsi-cd", i, cdrom));
            cdrom++;
        } else {
            add(a, "-device");
            push(a, xasprintf("virtio-blk-pci,drive=strata%u,id=disk%u,write-cache=on,discard=on,"
                              "werror=report,rerror=report",
                              i, disk));
            disk++;
        }
    }
}

static void add_net(struct argv *a, const struct vm_opts *o) {
    AUTO_STRBUF struct strbuf nic = STRBUF_INIT;
    add(a, "-nic");
    switch (o->net.kind) {
    case VM_NET_NONE:
        add(a, "none");
        return;
    case VM_NET_TAP: /* it is there and configured: QEMU's scripts are for root */
        strbuf_printf(&nic, "tap,ifname=%s,script=no,downscript=no", o->net.name);
        break;
    case VM_NET_BRIDGE:
        strbuf_printf(&nic, "bridge,br=%s", o->net.name);
        break;
    case VM_NET_USER:
        strbuf_puts(&nic, "user");
        break;
    }
    strbuf_puts(&nic, ",model=virtio-net-pci");
    for (unsigned i = 0; o->net.kind == VM_NET_USER && i < o->nforwards; i++) {
        const struct vm_forward *f = &o->forwards[i];
        strbuf_printf(&nic, ",hostfwd=tcp:%s:%u-:%u", f->addr, f->host, f->guest);
    }
    push(a, strbuf_steal(&nic));
}

static void add_display(struct argv *a, const struct vm_opts *o, bool pc) {
    if (o->nographic && o->kernel) {
        add2(a, "-display", "none");
        add2(a, "-serial", "mon:stdio");
        if (pc)
            add2(a, "-vga", "none");
    } else if (o->nographic) {
        add(a, "-nographic");
        if (o->monitor)
            add2(a, "-serial", "mon:stdio");
    } else if (o->vnc) {
        add2(a, "-vnc", o->vnc);
    } else if (o->no_terminal) {
        add2(a, "-display", "none");
    }
}

static void add_monitors(struct argv *a, const struct vm_opts *o) {
    const struct vm_monitor *m = o->monitor;
    if (o->control_fd) {
        add(a, "-chardev");
        push(a, xasprintf("socket,id=strata-control,fd=%d", o->control_fd));
        add2(a, "-mon", "chardev=strata-control,mode=control");
    }
    if (!m || m->kind == VM_MONITOR_NONE)
        return;
    if (m->kind == VM_MONITOR_STDIO) {
        add2(a, "-monitor", "stdio");
        return;
    }
    add(a, "-chardev");
    if (m->kind == VM_MONITOR_UNIX)
        push(a, xasprintf("socket,id=monitor,fd=%d,server=on,wait=off", m->fd));
    else
        push(a, xasprintf("socket,id=monitor,host=%s,port=%u,server=on,wait=off,telnet=%s", m->host,
                          m->port, m->kind == VM_MONITOR_TELNET ? "on" : "off"));
    add2(a, "-mon", "chardev=monitor,mode=readline");
}

/* Two flash chips: fdset 1 is the code, fdset 2 the variables. */
static void add_uefi(struct argv *a, const struct vm_uefi *u) {
    if (!u)
        return;
    add(a, "-add-fd");
    push(a, xasprintf("set=1,fd=%d", u->code_fd));
    add(a, "-add-fd");
    push(a, xasprintf("set=2,fd=%d", u->vars_fd));
    add2(a, "-blockdev",
         "driver=raw,node-name=uefi-code,read-only=on,file.driver=file,"
         "file.filename=/dev/fdset/1,file.locking=off");
    add2(a, "-blockdev",
         "driver=raw,node-name=uefi-vars,file.driver=file,file.filename=/dev/fdset/2,"
         "file.locking=off");
}

static bool shares_memory(const struct vm_opts *o) {
    for (unsigned i = 0; i < o->ndrives; i++)
        if (o->drives[i].queues)
            return true;
    return false;
}

int vm_args(const struct vm_opts *o, char ***out, struct err *e) {
    struct utsname u;
    const struct machine *m = NULL;
    struct argv a = {0};

    uname(&u);
    for (size_t i = 0; i < sizeof(machines) / sizeof(*machines); i++)
        if (!strcmp(machines[i].uname, u.machine))
            m = &machines[i];
    if (!m)
        return err_set(e, ENOTSUP, "no QEMU machine is known for a %s host", u.machine);

    bool kvm = o->accel == VM_ACCEL_KVM;
    add(&a, o->qemu ? o->qemu : m->program);
    add(&a, "-no-user-config");
    add(&a, "-machine");
    push(&a, xasprintf("%s%s%s", m->machine, shares_memory(o) ? ",memory-backend=memory" : "",
                       o->uefi ? ",pflash0=uefi-code,pflash1=uefi-vars" : ""));
    add_uefi(&a, o->uefi);
    if (shares_memory(o)) {
        add(&a, "-object");
        push(&a, xasprintf("memory-backend-memfd,id=memory,share=on,size=%" PRIu64 "M",
                           div_up(o->memory, MIB)));
    }
    add2(&a, "-accel", kvm ? "kvm" : "tcg");
    add2(&a, "-cpu", kvm ? "host" : "max");
    add(&a, "-m");
    push(&a, xasprintf("%" PRIu64 "M", div_up(o->memory, MIB)));
    add(&a, "-smp");
    push(&a, xasprintf("%u", o->smp));
    if (o->boot) {
        add(&a, "-boot");
        push(&a, xasprintf("order=%s", o->boot));
    }
    if (o->kernel)
        add2(&a, "-kernel", o->kernel);
    if (o->initrd)
        add2(&a, "-initrd", o->initrd);
    if (o->append)
        add2(&a, "-append", o->append);
    add_display(&a, o, m->pc);
    add_monitors(&a, o);
    add_net(&a, o);
    add_drives(&a, o, m->pc);
    for (char *const *p = o->extra; p && *p; p++)
        add(&a, *p);
    *out = a.v; /* calloc'ed two longer than needed: the NULL is there */
    return 0;
}
