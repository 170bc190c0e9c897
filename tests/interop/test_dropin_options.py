# SPDX-License-Identifier: MIT
"""strata called as qemu-img beside Debian's: what test_dropin_img and test_dropin_refusals leave out: bitmaps,
images of other formats, external data files, sizes at their limits, options that only one of the two has.
As in those; a copy of the folder serves until a command succeeds.
"""
import os
import pathlib
import shutil
import subprocess
import tempfile

import pytest

from test_dropin_img import dropin, folder, run_all, words  # noqa: F401  (fixtures)

LINES = r"""
rebase -b mid.qcow2 -F qcow2 q ; check q ; map --output=json q
convert -O qcow2 -o backing_file=base.raw top.qcow2 a
convert -O qcow2 -o backing_file=base.raw,backing_fmt=raw top.qcow2 a ; info a
bitmap --add q b ; convert --bitmaps -O qcow2 q a ; info a
bitmap --add q b ; measure -O qcow2 q
bitmap --add q b ; resize q 16M ; info q
bitmap --add top.qcow2 b ; commit top.qcow2 ; info top.qcow2
convert -t directsync -T directsync -O raw q a ; compare q a
rebase -u -b base.raw -F raw mid.qcow2 ; info --backing-chain top.qcow2
bench -c 8 -i io_uring q
dd bs=64k count=1 if=raw of=raw2 ; info raw2
measure -O qcow2 -o extended_l2=on,cluster_size=128k top.qcow2
amend -o data_file=foo q
amend -o data_file=foo ext ; info ext
amend -o data_file_raw=on ext
amend -o compat=0.10 q ; info q
amend -o lazy_refcounts=on q ; info q
amend -o lazy_refcounts=on,compat=0.10 q
amend -p -o compat=0.10 q
amend -o preallocation=full q
amend -o compression_type=zstd q
amend -o extended_l2=on q
amend -o encryption=on q
amend -o help -f qcow2
amend -o backing_file= top.qcow2
amend -u -o compat=1.1 q
bench -s 0 q
bench -s 2G q
bench -s 4G q
bench -S 0 q
bench -S 4G q
bench -S 2G -c 1 q
bench -c 0 q
bench -c -1 q
bench -d -1 q
bench -d x q
bench -o x q
bench -o 16E q
bench -w --pattern=x q
bench -w --flush-interval=x q
bench -w --flush-interval=3 -d 64 q
bench --no-drain q
bench --pattern=3 q
bench -n q
bench -n -t none -f raw -c 4 raw
bench -i threads -c 4 q
bench -i native -t none -c 4 q
bench -U -c 4 q
bench -U -w -c 4 q
bench q raw
bench
bench --image-opts -c 4 driver=qcow2,file.filename=q
bench -t none -c 4 q
bench -t unsafe -w -c 4 q
bench -f fancy q
bitmap --add q b1 ; bitmap --remove q b1 ; info q
bitmap --add --remove q b1
bitmap q b1
bitmap --add q
bitmap --add
bitmap --remove-all q
bitmap --add --disable q b0 ; info q
bitmap --add -g 64k q b ; info q
bitmap --add -g 3 q b
bitmap --add -g x q b
bitmap --add -g 256 q b
bitmap --add -g 4G q b
bitmap --add -g 2G q b ; info q
bitmap --add q b ; bitmap --add q b
bitmap --remove q nope
bitmap --clear q nope
bitmap --enable q nope
bitmap --disable q nope
bitmap --merge nope q b
bitmap --add q a ; bitmap --add --merge a q b ; info q
bitmap --add q a ; bitmap --add --merge a --merge nope q b ; info q
bitmap -g 64k --remove q b
bitmap -F qcow2 --add q b
bitmap -b snap --add q b
bitmap -b nofile -F qcow2 --add --merge x q b
bitmap --add --image-opts driver=qcow2,file.filename=q b ; info q
bitmap --add --clear --enable --disable q b ; info q
bitmap --add nofile b
bitmap --fancy q b
bitmap --add q ''
bitmap --add q b c
bitmap --object secret,id=s,data=x --add q b
bitmap -q --add q b
bitmap -U --add q b
bitmap -f fancy --add q b
bitmap --add --output=json q b
check vdi
check qed
check par
check --output=json qed
check vpc
check qcow
check -r leaks vdi
check ext
check -T none q
check -T fancy q
check -U q
check -r q
check -r all q
check -r all -U q
check --image-opts driver=qcow2,file.filename=q
check --image-opts -f qcow2 q
check --object fancy q
check -p q
check -f raw q
check -f fancy q
check --output=xml q
check --output=json raw
check version
check short
check lost.qcow2
check q raw
commit -t none top.qcow2
commit -t unsafe top.qcow2
commit -T none top.qcow2
commit -p -d top.qcow2
commit -b base.raw -d top.qcow2
commit -b mid.qcow2 -d -q top.qcow2
commit -r 0 top.qcow2
commit -r -1 top.qcow2
commit -r 16E top.qcow2
commit -U top.qcow2
commit --object secret,id=s,data=x top.qcow2
commit -b '' top.qcow2
commit -F raw top.qcow2
compare -T fancy raw q
compare -T none raw q
compare -U raw q
compare -f fancy raw q
compare -F fancy raw q
compare -F qcow2 raw base.raw
compare raw dir
compare raw q odd
compare -Z raw q
compare --object fancy,id=x raw q
compare --image-opts raw q
compare empty odd
convert -S 4G raw a
convert -S 2G raw a
convert -S -1 raw a
convert -S 1E raw a
convert -S 16E raw a
convert -O qcow2 -o nocow=on raw x
convert -O raw -o nocow=on raw x
convert -O qcow2 ext a ; compare ext a
convert empty a ; info a
convert -O qcow2 empty a ; info a
convert -O vdi raw x ; compare x raw ; info x
convert -O vpc raw x ; info x
convert -O qed raw x ; compare x raw ; info x
convert -O qcow raw x ; compare x raw ; info x
convert -O qcow -c raw x ; compare x raw ; info x
convert -O parallels raw x ; compare x raw ; info x
convert -O vdi -c raw x
create -f qcow2 -o extent_size_hint=1M x 1M
create -f qcow2 -o data_file=dd,data_file_raw=on x 1M ; info x
create -f qcow2 -o data_file=dd x 1M ; info x
create -f qcow2 -o data_file=dd,compat=0.10 x 1M ; info dd
create -f qcow2 -o data_file=dd,cluster_size=3 x 1M ; info dd
create -f vdi x 1M
create -f vpc x 1M
create -f qed x 1M
create -f qcow x 1M
create -f parallels x 1M
create -f bochs x 1M
create -f cloop x 1M
create -f vdi -o help
create -f vpc -o help
create -f qed -o help
create -f parallels -o help
create -f vdi -o static=on x 1M
create -f vdi -o preallocation=metadata x 1M ; info x
create -f vpc -o subformat=fancy x 1M
create -f vpc -o force_size=on x 1M ; info x
create -f vpc x 3T
create -f qed -o cluster_size=3 x 1M
create -f qed -o table_size=3 x 1M
create -f qed -b base.raw -F raw x ; info x
create -f qcow -b base.raw x ; info x
create -f qcow -b base.raw -F raw x ; info x
create -f parallels -o cluster_size=3 x 1M
create -f vdi -b base.raw -F raw x
create -f vpc -b base.raw -F raw x
dd if=raw of=a bs=1M count=0 ; info a
dd if=raw of=a count=-1
dd if=raw of=a count=x
dd if=raw of=a skip=-1
dd if=raw of=a skip=x
dd if=raw of=a bs=-1
dd if=raw of=a bs=2G
dd if=raw of=a bs=1k count=1M
dd if=raw of=a bs=3 count=5 ; info a
dd if=raw of=a bs=3 count=5 skip=2 ; info a
dd if=raw of=a seek=1
dd if=raw of=a conv=notrunc
dd if=raw of=nodir/a
dd if=raw of=dir
dd if=raw if=q of=a
dd of=a
dd
dd -f fancy if=raw of=a
dd -f qcow2 if=raw of=a
dd -O vdi if=raw of=a ; compare raw a
dd if=raw of=q
dd -n if=raw of=q
dd --object fancy if=raw of=a
dd raw a
dd if= of=a
info vdi
info vpc
info qed
info qcow
info par
info --output=json vdi
info --output=json vpc
info --output=json qed
info --output=json qcow
info --output=json par
info ext
info --output=json ext
info --backing-chain ext
info snap
info --output=json snap
info -T none snap
info --cache=none snap
info -t none snap
info empty
map vdi
map --output=json vdi
map --output=json vpc
map --output=json qed
map --output=json qcow
map --output=json par
map ext
map --output=json ext
map -U q
map --image-opts driver=qcow2,file.filename=q
map -f fancy q
map -s 1M q
map -l 1M q
map -s 3 -l 5 --output=json q
map -l 0 q
map -l -1 q
map -s 16E q
map -s 8E q
map -l 8E q
map --max-length=1x q
map q raw
map -p q
map lost.qcow2
map odd
map --output=json odd
map empty
map --output=json empty
measure -O qcow2 -o nocow=on raw
measure -O qcow2 -o backing_file=base.raw,backing_fmt=raw top.qcow2
measure -O qcow2 -o backing_file=base.raw top.qcow2
measure -O raw --size 1M
measure -O raw -o preallocation=full raw
measure -O qcow2 -o preallocation=full q
measure -O qcow2 -o preallocation=metadata q
measure -O qcow2 --object secret,id=s,data=x q
measure -O qcow2 --object fancy,id=s q
measure -O qcow2 -o data_file=d q
measure -O qcow2 -o data_file=d,data_file_raw=on q
measure -O vdi --size 1M
measure -O vpc --size 1M
measure -O qed --size 1M
measure -O qcow --size 1M
measure -O parallels --size 1M
measure -O qcow2 -f qcow2 -U q
measure -l snapshot.id=1 snap
measure -l snapshot.id=9 snap
measure -O qcow2 -l snapshot.name=s1 snap
measure -l snapshot.fancy=1 snap
measure -O qcow2 --size 0
measure -O raw --size 0
measure -O raw --size 1
measure -O qcow2 --size 1
measure -O qcow2 odd
measure -O raw odd
measure empty
rebase -c -b base.raw -F raw top.qcow2
rebase -p -b base.raw -F raw top.qcow2
rebase -q -p -b base.raw -F raw top.qcow2
rebase -u -b base.raw top.qcow2
rebase -b base.raw top.qcow2
rebase -b '' -F raw top.qcow2
rebase -u -F raw top.qcow2
rebase -f qcow2 -b base.raw -F raw -t none -T none top.qcow2
rebase -b dir -F raw top.qcow2
rebase -u -b dir -F raw top.qcow2
rebase --backing=base.raw top.qcow2
rebase -b base.raw -F raw vdi
rebase -b base.raw -F raw qed ; info qed
rebase -u -b base.raw -F raw qed ; info qed
resize -f raw raw +1
resize -f raw raw +1 ; info raw
resize raw +513
resize -f raw odd +1
resize -f raw odd 1000
resize -f raw odd 1001
resize -f raw odd 1024
resize -f raw --shrink odd 999 ; info odd
resize ext +1M ; info ext
resize vdi 16M ; info vdi
resize vpc 16M
resize qed 16M ; info qed
resize qcow 16M
resize par 16M ; info par
resize --shrink vdi 1M
resize --shrink qed 1M
snapshot -c s ext ; info ext ; snapshot -l ext
snapshot -l snap
snapshot -a s1 snap
snapshot -d s1 snap
snapshot -a 1 snap
snapshot -l -U snap
snapshot --output=json -l snap
snapshot -c '' snap
snapshot -c s1 snap ; snapshot -l snap
""".strip("\n").split("\n")

# command line -> why the answers differ.  Both end alike (status), but for those in STATUS.
DIVERGENCES = {
    "create -f vdi -b base.raw -F raw x": "here a VDI image can have a parent, but only a VDI image",
    "create -f vpc -b base.raw -F raw x": "the same of VHD",
    "compare --image-opts raw q": "7.2 looks for a node of that name",
    "rebase --backing=base.raw top.qcow2": "7.2 has no long name for -b yet",
}
STATUS = {
    "check -r leaks vdi": "7.2 repairs none of these",
    "create -f cloop x 1M": "ours can",
    "check lost.qcow2": "the image can be checked without its backing file",
    "rebase -c -b base.raw -F raw top.qcow2": "7.2 has no -c yet",
    "create -f vdi -o preallocation=metadata x 1M ; info x": "ours can",
    "create -f parallels -o cluster_size=3 x 1M": "7.2 makes an image that it cannot open",
    "convert -O qcow -c raw x ; compare x raw ; info x": "7.2 fails without a word",
    "resize vdi 16M ; info vdi": "these formats can grow here",
    "resize vpc 16M": "the same",
    "resize par 16M ; info par": "the same",
}
VERBS = sorted({line.split()[0] for line in LINES})
READS = {"info", "map", "check", "compare", "measure"}


@pytest.fixture(scope="module")
def images(folder):  # noqa: F811
    """Besides: snap, v2 (with a snapshot each), vdi, vpc, qed, qcow, par, ext (with an external data file), empty."""
    def img(*args):
        subprocess.run(["/usr/bin/qemu-img", *args], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    for name, compat in ("snap", "1.1"), ("v2", "0.10"):
        img("create", "-q", "-f", "qcow2", "-o", f"compat={compat}", name, "1M")
        img("snapshot", "-c", "s1", name)
    for fmt in "vdi", "vpc", "qed", "qcow", "parallels":
        img("convert", "-O", fmt, "raw", fmt[:3] if fmt == "parallels" else fmt)
    img("create", "-q", "-f", "qcow2", "-o", "data_file=ext.data", "ext", "4M")
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 3 1M 128k", "ext"], cwd=folder, check=True,
                   stdout=subprocess.DEVNULL)
    (folder / "empty").write_bytes(b"")
    return folder


def answers(program, folder, d, lines):  # noqa: F811
    """One answer a line, each from the folder as it was."""
    out, fresh, d = [], False, pathlib.Path(tempfile.mkdtemp(dir="/dev/shm")) / d.name  # much is synced
    for line in lines:
        if not fresh:
            shutil.rmtree(d, ignore_errors=True)
            subprocess.run(["cp", "-a", "--sparse=always", folder, d], check=True)
        before = sorted(os.listdir(d))
        out.append(run_all(program, d, [words(part) for part in line.split(";")]))
        reads = {part.split()[0] for part in line.split(";")} <= READS and " -r" not in line
        fresh = (reads or all(r[0] for r in out[-1])) and sorted(os.listdir(d)) == before
    shutil.rmtree(d.parent)
    return out


@pytest.mark.parametrize("verb", VERBS)
def test_dropin_takes_options_as_the_peer(dropin, images, tmp_path, verb):  # noqa: F811
    lines = [line for line in LINES if line.split()[0] == verb]
    ours, theirs = [answers(p, images, tmp_path / pathlib.Path(p).parent.name, lines)
                    for p in (dropin, "/usr/bin/qemu-img")]
    wrong, stale = [], []
    for line, a, b in zip(lines, ours, theirs):
        status = [[r[0] for r in x] for x in (a, b)]
        if line in STATUS:
            stale += [line] if status[0] == status[1] else []
        elif line in DIVERGENCES:
            stale += [line] if a == b else []
            assert status[0] == status[1], line
        elif a != b:
            wrong.append((line, a, b))
    assert wrong == []
    assert stale == [], "divergences no longer"
