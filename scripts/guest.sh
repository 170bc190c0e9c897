#!/bin/bash
# SPDX-License-Identifier: MIT
#
# A tiny real guest for `make try`, tests and bench: Debian's cloud kernel and a busybox initramfs.
#
#   guest.sh fetch              make sure kernel and initramfs are in the cache; prints its folder
#   guest.sh initrd SCRIPT OUT  an initramfs that runs SCRIPT (busybox sh), then powers off
#
# The kernel package is downloaded and unpacked, never installed: nothing of this machine's own
# boot is touched.  The cache ($STRATA_CACHE, else ~/.cache/strata) holds
#     guest/vmlinuz        the kernel image
#     guest/base.cpio      busybox, the virtio modules, /init
# and is filled under a temporary name first, so that two runs at once never see half of it.
# An initramfs is cpio archives one after the other: base.cpio and one with /do, the script.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
guest=${STRATA_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/strata}/guest
# In the order of loading; ext4 and the serial console are in the kernel itself.
modules="virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk"

kernel_package() { # the package that Debian's meta package stands for today
    local arch
    arch=$(dpkg --print-architecture)
    apt-cache depends "linux-image-cloud-$arch" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-\)/\1/p' |
        head -n 1
}

refresh_lists() { # a fresh machine may know no package at all, or an outdated list
    if [ "$(id -u)" = 0 ]; then
        apt-get update -q
    elif command -v sudo >/dev/null; then
        sudo apt-get update -q
    fi
}

fetch() {
    if [ -s "$guest/vmlinuz" ] && [ "$guest/base.cpio" -nt "$here/guest.sh" ]; then
        echo "$guest"
        return
    fi
    mkdir -p "$guest"
    work=$(mktemp -d "$guest/.new.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    if [ ! -s "$guest/vmlinuz" ] || [ ! -d "$guest/modules" ]; then
        local package
        package=$(kernel_package)
        if [ -z "$package" ] || ! (cd "$work" && apt-get download -q "$package" >log 2>&1); then
            refresh_lists >&2
            package=$(kernel_package)
            if [ -z "$package" ] || ! (cd "$work" && apt-get download -q "$package" >log 2>&1); then
                cat "$work/log" >&2
                echo "guest: cannot download Debian's cloud kernel (package '$package')" >&2
                exit 1
            fi
        fi
        mkdir "$work/tree" "$work/modules"
        dpkg-deb -x "$work"/*.deb "$work/tree"
        for m in $modules; do
            find "$work/tree" -name "$m.ko" -exec cp {} "$work/modules/" \;
            [ -s "$work/modules/$m.ko" ] || {
                echo "guest: $package holds no module $m" >&2
                exit 1
            }
        done
        rm -rf "$guest/modules"
        mv -T "$work/modules" "$guest/modules" || true # lost a race: the other's are the same
        mv "$work"/tree/boot/vmlinuz-* "$guest/vmlinuz"
    fi
    mkdir -p "$work"/root/{bin,lib,proc,sys,dev,mnt,tmp}
    cp "$(command -v busybox)" "$work/root/bin/busybox"
    for m in $modules; do
        cp "$guest/modules/$m.ko" "$work/root/lib/"
    done
    cat >"$work/root/init" <<INIT
#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for m in $modules; do
    insmod /lib/\$m.ko
done
sh /do
sync
poweroff -f
INIT
    chmod +x "$work/root/init"
    (cd "$work/root" && find . | cpio --quiet -o -H newc -R 0:0) >"$work/base.cpio"
    mv "$work/base.cpio" "$guest/base.cpio"
    echo "$guest"
}

initrd() {
    local script=$1 out=$2
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    [ "$(head -c 6 "$guest/base.cpio" 2>/dev/null)" = 070701 ] || {
        echo "guest: run 'guest.sh fetch' first" >&2
        exit 1
    }
    cp "$script" "$work/do"
    { cat "$guest/base.cpio" && (cd "$work" && echo do | cpio --quiet -o -H newc -R 0:0); } >"$out"
}

case ${1:-} in
fetch) fetch ;;
initrd) initrd "$2" "$3" ;;
*)
    sed -n '4,8p' "$0" >&2
    exit 1
    ;;
esac
