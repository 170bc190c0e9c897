/* SPDX-License-Identifier: MIT */
/*
 * UEFI firmware: where distributions put it, and the variables' copy.
 *
 * Firmware is two flash chips.  The code is everybody's and read-only; the variables are written by
 * the guest, so each run has a copy of the package's empty ones in a memfd: no name, gone with the
 * last process that has it.  Boot entries that a guest makes do not outlive it; the fallback path
 * (EFI/BOOT/BOOTX64.EFI) and what firmware finds by itself do without.
 *
 * Sources: file lists of Debian's ovmf and qemu-efi-aarch64, Fedora's edk2-ovmf, Arch's edk2-ovmf.
 * The 4M build comes first: the older one has too little room for today's revocation lists.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include "base/cleanup.h"
#include "base/bytes.h"
#include "base/err.h"

#include "vm/vm.h"

#define VARS_MAX (64 * MIB) /* the virt machine's flash; OVMF's has half a MiB */

static const struct place {
    const char *uname, *dir, *code, *vars, *package;
} places[] = {
    {"x86_64", "/usr/share/OVMF", "OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd", "ovmf"},
    {"x86_64", "/usr/share/OVMF", "OVMF_CODE.fd", "OVMF_VARS.fd", "ovmf"},
    {"x86_64", "/usr/share/edk2/ovmf", "OVMF_CODE.fd", "OVMF_VARS.fd", "ovmf"},
    {"x86_64", "/usr/share/edk2/x64", "OVMF_CODE.4m.fd", "OVMF_VARS.4m.fd", "ovmf"},
    {"aarch64", "/usr/share/AAVMF", "AAVMF_CODE.fd", "AAVMF_VARS.fd", "qemu-efi-aarch64"},
};

static int copy_to_memory(const char *path, int *out, struct err *e) {
    AUTO_FD int from = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (from < 0 || fstat(from, &st) < 0)
        return err_errno(e, errno, "%s", path);
    if (!S_ISREG(st.st_mode) || st.st_size <= 0 || (uint64_t)st.st_size > VARS_MAX)
        return err_set(e, EINVAL, "%s: not firmware variables: %lld bytes, the limit is %llu", path,
                       (long long)st.st_size, (unsigned long long)VARS_MAX);
    AUTO_FD int to = memfd_create("uefi-vars", MFD_CLOEXEC);
    AUTO_FREE char *buf = malloc((size_t)st.st_size);
    if (to < 0 || !buf)
        return err_errno(e, to < 0 ? errno : ENOMEM, "memory for firmware variables");
    ssize_t got = pread(from, buf, (size_t)st.st_size, 0);
    if (got != st.st_size)
        return err_errno(e, got < 0 ? errno : EIO, "%s", path);
    ssize_t put = pwrite(to, buf, (size_t)got, 0);
    if (put != got)
        return err_errno(e, put < 0 ? errno : ENOMEM, "memory for firmware variables");
    *out = steal_fd(&to);
    return 0;
}

int vm_uefi_open(struct vm_uefi *out, struct err *e) {
    const char *own = getenv("STRATA_OVMF"), *package = NULL;
    struct utsname u;

    *out = (struct vm_uefi){-1, -1};
    uname(&u);
    for (size_t i = 0; i < sizeof(places) / sizeof(*places); i++) {
        const struct place *p = &places[i];
        const char *dir = own && *own ? own : p->dir;
        if (strcmp(u.machine, p->uname))
            continue;
        package = p->package;
        AUTO_FREE char *code = xasprintf("%s/%s", dir, p->code);
        AUTO_FREE char *vars = xasprintf("%s/%s", dir, p->vars);
        AUTO_FD int fd = open(code, O_RDONLY | O_CLOEXEC);
        if (fd < 0 && errno == ENOENT)
            continue;
        if (fd < 0)
            return err_errno(e, errno, "%s", code);
        int ret = copy_to_memory(vars, &out->vars_fd, e);
        if (ret == 0)
            out->code_fd = steal_fd(&fd);
        return ret;
    }
    if (!package)
        return err_set(e, ENOTSUP, "no UEFI firmware is known for a %s host", u.machine);
    err_set(e, ENOENT, "no UEFI firmware (OVMF) in %s",
            own && *own ? own : "the folders where distributions put it");
    err_hint(e, "install it (Debian: %s), or name its folder in STRATA_OVMF", package);
    return -ENOENT;
}

void vm_uefi_close(struct vm_uefi *u) {
    if (u->code_fd >= 0)
        close(u->code_fd);
    if (u->vars_fd >= 0)
        close(u->vars_fd);
    *u = (struct vm_uefi){-1, -1};
}
