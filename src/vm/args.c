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
 *  - `-no-reboot` is not ours to give: a guest that reboots, reboots.
 *
 * Sources: qemu-system-x86_64 7.2 `-help`, `-device virtio-blk-pci,help`; qapi/block-core.json
 * (BlockdevOptionsNbd), qapi/sockets.json (SocketAddress, "fd": a decimal number at start-up).
 */
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <arpa/inet.h>
#include <sys/utsname.h>
#include "base/bytes.h"
#include "base/ck.h"
#include "base/err.h"
#include "base/size.h"
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

static int port_parse(const char *s, size_t len, uint16_t *out) {
    unsigned v = 0;
    if (len == 0 || len > 5)
        return -EINVAL;
    for (size_t i = 0; i < len; i++) {
        if (!isdigit((unsigned char)s[i]))
            return -EINVAL;
        v = v * 10 + (unsigned)(s[i] - '0');
    }
    if (v == 0 || v > 65535)
        return -EINVAL;
    *out = (uint16_t)v;
    return 0;
}

int vm_forward_parse(const char *text, struct vm_forward *out, struct err *e) {
    struct vm_forward f = {.addr = "127.0.0.1"};
    const char *guest = strrchr(text, ':');
    const char *host = text;
    const char *first = strchr(text, ':');
    struct in_addr in;

    if (!guest)
        goto bad;
    if (first != guest) {
        size_t len = (size_t)(first - text);
        if (len == 0 || len >= sizeof(f.addr))
            goto bad;
        memcpy(f.addr, text, len);
        f.addr[len] = 0;
        if (inet_pton(AF_INET, f.addr, &in) != 1)
            return err_set(e, EINVAL, "forward '%s': '%s' is not an IPv4 address", text, f.addr);
        host = first + 1;
    }
    if (port_parse(host, (size_t)(guest - host), &f.host) < 0 ||
        port_parse(guest + 1, strlen(guest + 1), &f.guest) < 0)
        goto bad;
    *out = f;
    return 0;
bad:
    err_set(e, EINVAL, "forward '%s' is not HOST:GUEST, two TCP ports from 1 to 65535", text);
    err_hint(e, "2222:22 makes the guest's port 22 reachable at this machine's port 2222");
    return -EINVAL;
}

char *vm_vnc_display(const char *text) {
    return text[0] == ':' ? xasprintf("127.0.0.1%s", text) : xstrdup(text);
}

int vm_memory_parse(const char *text, uint64_t *bytes, struct err *e) {
    uint64_t v;
    size_t len = strlen(text);
    int ret = size_parse(text, "memory", &v, e);
    if (ret < 0)
        return ret;
    if (len && isdigit((unsigned char)text[len - 1]) && !ck_mul(v, MIB, &v))
        v = UINT64_MAX;
    if (v < MIB || v > 64 * TIB)
        return err_set(e, ERANGE, "memory '%s' is not between 1 MiB and 64 TiB", text);
    *bytes = v;
    return 0;
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
                          i, d->fd, d->cdrom ? "on" : "off"));
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
    add(a, "-nic");
    if (!o->net) {
        add(a, "none");
        return;
    }
    char *nic = xstrdup("user,model=virtio-net-pci");
    for (unsigned i = 0; i < o->nforwards; i++) {
        const struct vm_forward *f = &o->forwards[i];
        char *more = xasprintf("%s,hostfwd=tcp:%s:%u-:%u", nic, f->addr, f->host, f->guest);
        free(nic);
        nic = more;
    }
    push(a, nic);
}

static void add_display(struct argv *a, const struct vm_opts *o, bool pc) {
    if (o->nographic && o->kernel) {
        add2(a, "-display", "none");
        add2(a, "-serial", "mon:stdio");
        if (pc)
            add2(a, "-vga", "none");
    } else if (o->nographic) {
        add(a, "-nographic");
    } else if (o->vnc) {
        add2(a, "-vnc", o->vnc);
    }
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
    push(&a, xasprintf("%s%s", m->machine, shares_memory(o) ? ",memory-backend=memory" : ""));
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
    add_net(&a, o);
    add_drives(&a, o, m->pc);
    for (char *const *p = o->extra; p && *p; p++)
        add(&a, *p);
    *out = a.v; /* calloc'ed two longer than needed: the NULL is there */
    return 0;
}
