#!/bin/bash
# SPDX-License-Identifier: MIT
#
# Installs what building, testing and `make try` need, on Debian 12 or newer.
#
# When everything is there it says nothing, needs no rights and takes a few milliseconds: only
# dpkg's own database is asked.  Otherwise one apt-get run, as root or through sudo, from whatever
# package sources the machine is configured with.
set -euo pipefail

machine=$(uname -m)
case $machine in
x86_64) qemu="qemu-system-x86 seabios ovmf" ;;
aarch64) qemu="qemu-system-arm qemu-efi-aarch64" ;;
*) qemu="" ;;
esac

packages=(
    # compilers and build
    gcc libc6-dev clang libclang-rt-dev clang-format-14 meson ninja-build pkg-config
    # libraries
    libnbd0 libgnutls28-dev liburing-dev zlib1g-dev libzstd-dev libdeflate-dev libisal-dev libjansson-dev libfuse3-dev libcmocka-dev
    # the peers that tests and bench compare with
    qemu-utils nbdkit libnbd-bin python3-libnbd libnbd-dev gnutls-bin fio python3-oslo.utils
    libvirt-daemon libvirt-clients bximage libvhdi-utils libvmdk-utils 7zip cloop-utils
    mtools dosfstools dmg2img libbz2-1.0 liblzma5
    # the guest of `run`, `make try` and its tests
    $qemu busybox-static cpio gzip e2fsprogs xfsprogs fuse3 fuse2fs fdisk
    # test tools
    python3 python3-pytest python3-pytest-xdist strace util-linux procps ca-certificates
)

if ! command -v dpkg-query >/dev/null; then
    echo "setup: no dpkg here; these Debian packages, under your system's names, are needed:" >&2
    echo "  ${packages[*]}" >&2
    exit 0
fi

missing() {
    local have
    have=$(dpkg-query -W -f='${Package} ${db:Status-Status}\n' "${packages[@]}" 2>/dev/null |
        sed -n 's/ installed$//p')
    printf '%s\n' "${packages[@]}" | grep -vxF -f <(printf '%s\n' "$have") || true
}

need=$(missing)
[ -n "$need" ] || exit 0

root=()
if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "setup: not root and no sudo; as root, run: apt-get install" $need >&2
        exit 1
    fi
    root=(sudo)
fi
echo "setup: installing" $need
export DEBIAN_FRONTEND=noninteractive
"${root[@]}" apt-get update -q
"${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $need

need=$(missing)
if [ -n "$need" ]; then
    echo "setup: still missing:" $need >&2
    exit 1
fi
