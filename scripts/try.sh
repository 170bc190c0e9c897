#!/bin/bash
# SPDX-License-Identifier: MIT
#
# `make try`: a real Linux guest writes 200 MB to a disk that afterwards is byte for byte what it
# was, while we watch from outside.  Exit status 1 as soon as anything is not as promised.
#
# The guest is Debian's cloud kernel and busybox (scripts/guest.sh); its disk is an ext4 file system
# in a qcow2 image, made once in $BUILD/try.  The space in use is read from the kernel: the overlay
# is an open file without a name, so /proc/PID/fd is the only place where it can be seen.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${BUILD:-build}
strata=${STRATA:-$PWD/$build/src/strata}
dir=$PWD/$build/try
started=$SECONDS

if [ -t 1 ]; then bold=$'\e[1m' dim=$'\e[2m' off=$'\e[0m'; else bold='' dim='' off=''; fi
step() { printf '\n%s%s%s\n' "$bold" "$*" "$off"; }
say() { printf '  %s\n' "$*"; }
die() {
    printf '\nmake try: FAILED: %s\n' "$*" >&2
    exit 1
}
mib() { echo "$(($1 / 1048576)) MiB"; }

step "1. A guest: Debian's cloud kernel, busybox, and a 1 GiB ext4 disk"
guest=$(scripts/guest.sh fetch)
mkdir -p "$dir"
base=$dir/disk.qcow2
if [ ! -s "$base" ]; then
    work=$(mktemp -d "$dir/new.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work/tree/letters"
    echo "This file was here first." >"$work/tree/precious.txt"
    for i in $(seq 1 200); do
        echo "letter $i: nothing to report" >"$work/tree/letters/$i.txt"
    done
    cp -r src docs "$work/tree/"
    PATH=$PATH:/sbin:/usr/sbin mke2fs -q -F -t ext4 -L precious -d "$work/tree" "$work/disk.raw" 1G >/dev/null
    "$strata" convert -f raw -O qcow2 "$work/disk.raw" "$base"
    rm -rf "$work"
    trap - EXIT
fi
cat >"$dir/guest-script" <<'GUEST'
say() { echo "@ $*"; }
mount -t ext4 /dev/vda /mnt || exit 1
say "Linux $(uname -r) is up; the disk holds: $(ls /mnt | tr '\n' ' ')"
say "before:  $(df -m /mnt | tail -n 1 | tr -s ' ' | cut -d ' ' -f 3) MiB used"
dd if=/dev/urandom of=/tmp/seed bs=1M count=4 2>/dev/null
all() { i=0; while [ $i -lt 50 ]; do cat /tmp/seed; i=$((i + 1)); done; }
say "writing 200 MB, deleting a file, changing another ..."
all >/mnt/big-file
rm /mnt/letters/13.txt
echo "and then somebody wrote over it" >/mnt/precious.txt
sync
want=$(all | sha256sum | cut -c 1-64)
echo 3 >/proc/sys/vm/drop_caches
have=$(sha256sum </mnt/big-file | cut -c 1-64)
say "after:   $(df -m /mnt | tail -n 1 | tr -s ' ' | cut -d ' ' -f 3) MiB used; $(ls -l /mnt/big-file | tr -s ' ' | cut -d ' ' -f 5) bytes in big-file"
say "precious.txt now says: $(cat /mnt/precious.txt)"
[ "$want" = "$have" ] && say "read back from the disk, sha256 equal: ${have:0:16}..."
umount /mnt && [ "$want" = "$have" ] && echo "GUEST-OK"
GUEST
scripts/guest.sh initrd "$dir/guest-script" "$dir/initrd"
say "${base#"$PWD"/}: $("$strata" info "$base" | grep -E '^(virtual size|disk size)' | tr -s ' ' | paste -sd ';' | sed 's/;/; /')"

step "2. Its checksum before"
before=$(sha256sum "$base" | cut -c 1-64)
say "sha256 $before"

step "3. The guest runs on it: strata run --snapshot --nographic"
rm -rf "$dir"/scratch.*
scratch=$(mktemp -d "$dir/scratch.XXXXXX")
log=$dir/console.log
: >"$log"
"$strata" run --snapshot --scratch "$scratch" -m 256M --nographic --no-net \
    --kernel "$guest/vmlinuz" --initrd "$dir/initrd" --append "console=ttyS0 quiet panic=-1" \
    "${base#"$PWD"/}" -- -no-reboot </dev/null >"$log" 2>&1 &
pid=$!
trap 'kill $pid 2>/dev/null; rmdir "$scratch" 2>/dev/null' EXIT

scratch_used() { # bytes behind the nameless file that the process holds open in the scratch folder
    local fd
    for fd in /proc/$pid/fd/*; do
        case $(readlink "$fd" 2>/dev/null) in
        "$scratch"/*) stat -L -c '%b' "$fd" 2>/dev/null | { read -r b && echo $((b * 512)); } && return ;;
        esac
    done
    echo 0
}
peak=0 shown=0 lines=0 names='' child=''
show_console() {
    local text
    text=$(tr -d '\r' <"$log" | grep -a -E '^@ |^strata:' | sed 's/^@ /guest | /' || true)
    [ -n "$text" ] || return 0
    tail -n +$((lines + 1)) <<<"$text" | sed 's/^/  /'
    lines=$(wc -l <<<"$text")
}
while kill -0 $pid 2>/dev/null; do
    used=$(scratch_used)
    child=$(cat /proc/$pid/task/$pid/children 2>/dev/null || true)${child:+ $child}
    child=${child%% *}
    names+=$(ls -A "$scratch")
    show_console
    [ "$used" -le "$peak" ] || peak=$used
    if [ "$used" -ge $((shown + 50 * 1048576)) ]; then
        shown=$used
        say "${dim}outside | scratch in use: $(mib "$used"), names to be seen there: $(ls -A "$scratch" | wc -l)$off"
    fi
    [ $((SECONDS - started)) -lt 600 ] || die "the guest hangs; its console is in $log"
    sleep 0.2
done
status=0
wait $pid || status=$?
trap - EXIT
show_console
say "outside | scratch space at its peak: $(mib "$peak"), part of it allocated ahead; exit status $status"

step "4. Afterwards"
tr -d '\r' <"$log" | grep -q '^GUEST-OK' || { tail -n 20 "$log" >&2; die "the guest did not see its own writes"; }
[ "$status" = 0 ] || die "strata run ended with status $status"
[ "$peak" -ge $((200 * 1000 * 1000)) ] || die "200 MB were written, but only $peak bytes of scratch space were seen"
[ -z "$names" ] || die "a name was visible in the scratch folder: $names"
after=$(sha256sum "$base" | cut -c 1-64)
say "sha256 $after"
[ "$before" = "$after" ] || die "the disk has changed"
say "the disk is byte for byte what it was"
left=$(ls -A "$scratch")
[ -z "$left" ] || die "left in the scratch folder: $left"
rmdir "$scratch"
[ -z "$child" ] || [ ! -d "/proc/$child" ] || die "process $child is still there"
say "scratch folder empty, its $(mib "$peak") free again, no process left"
printf '\n%sIt works.%s (%s s)  Now with a disk of yours:  %s run --snapshot DISK\n' \
    "$bold" "$off" $((SECONDS - started)) "${strata#"$PWD"/}"
