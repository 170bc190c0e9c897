#!/bin/bash
# SPDX-License-Identifier: MIT
#
# guestfs-tools on the drop-in name: guestfish makes a file system on an image of ours, virt-sparsify
# copies it and thins it out in place, virt-resize grows it into another; every qemu-img that they
# start is ours, and Debian's has the last word on what they leave.
#
#   guestfs.sh STRATA       needs libguestfs-tools, which `make setup` does not install: 113 packages
#
# Not part of `make test`: without KVM the appliance takes a minute to boot, four times.  The
# appliance's kernel is Debian's cloud kernel, unpacked and never installed.
set -euo pipefail

strata=$(realpath "${1:?name the program: build/src/strata}")
for tool in guestfish virt-sparsify virt-resize supermin; do
    command -v $tool >/dev/null || { echo "guestfs: $tool is missing: apt-get install libguestfs-tools" >&2; exit 1; }
done
work=$(mktemp -d /var/tmp/strata-guestfs-XXXXXX)
trap 'rm -rf "$work"' EXIT

cd "$work"
package=$(apt-cache depends "linux-image-cloud-$(dpkg --print-architecture)" |
    sed -n 's/^ *Depends: \(linux-image-\)/\1/p' | head -n 1)
apt-get download -q "$package" >/dev/null 2>&1 || { echo "guestfs: cannot download $package" >&2; exit 1; }
dpkg-deb -x "$package"*.deb tree
version=$(ls tree/lib/modules)
depmod -b tree "$version"
[ -d /lib/modules ] || mkdir /lib/modules # supermin looks there, whatever it is told

mkdir bin tmp
cat >bin/qemu-img <<END
#!/bin/bash
printf '%s\n' "\$*" >>'$work/log'
exec -a qemu-img '$strata' "\$@"
END
chmod +x bin/qemu-img
export PATH=$work/bin:$PATH TMPDIR=$work/tmp LIBGUESTFS_CACHEDIR=$work/tmp LIBGUESTFS_BACKEND=direct
export SUPERMIN_KERNEL=$work/tree/boot/vmlinuz-$version SUPERMIN_MODULES=$work/tree/lib/modules/$version
export SUPERMIN_KERNEL_VERSION=$version
export LIBGUESTFS_BACKEND_SETTINGS=force_tcg # nested KVM does not take all of "-cpu max"

say() { echo "guestfs: $*"; }
hello() { [ "$(guestfish --ro -a "$1" -m /dev/sda1 cat /hello)" = world ]; }

qemu-img create -q -f qcow2 disk.qcow2 200M
guestfish -a disk.qcow2 run : part-disk /dev/sda mbr : mkfs ext4 /dev/sda1 : mount /dev/sda1 / : \
    write /hello world : upload /usr/bin/qemu-img /large : rm /large
say "guestfish made a file system"
virt-sparsify -q --convert qcow2 --compress disk.qcow2 sparse.qcow2
say "virt-sparsify copied it: $(stat -c %s disk.qcow2) to $(stat -c %s sparse.qcow2) bytes"
virt-sparsify -q --in-place disk.qcow2
say "virt-sparsify thinned it out in place"
qemu-img create -q -f qcow2 grown.qcow2 300M
virt-resize -q --expand /dev/sda1 sparse.qcow2 grown.qcow2
say "virt-resize grew it"
for image in disk sparse grown; do
    /usr/bin/qemu-img check -q $image.qcow2
done
hello grown.qcow2
say "all are sound and hold the file; qemu-img was ours $(wc -l <log) times:"
sed "s|$work/||g; s|^|    |" log | sort | uniq -c
