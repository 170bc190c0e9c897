# SPDX-License-Identifier: MIT
"""strata called as qemu-img beside Debian's: wrong options, missing values, contradictory pairs, unknown
keys, absent files, wrong formats, too small targets, sizes that overflow.  As test_dropin_img, whose
folder and rules these are; but a command that is refused leaves the folder as it was, so a copy of it
serves until one succeeds.
"""
import os
import pathlib
import shutil
import subprocess
import tempfile

import pytest

from test_dropin_img import dropin, folder, run_all, words  # noqa: F401  (fixtures)

LINES = r"""
amend
amend q
amend -o
amend -o help
amend -o compat=1.1
amend -o compat=1.1 q raw
amend -o compat=1.1 nofile
amend -o compat=1.1 dir
amend -o compat=1.1 raw
amend -f raw -o size=1M raw
amend -f qcow2 -o size=1M raw
amend -f fancy -o size=1M raw
amend -f qcow2 -o help
amend -f raw -o help
amend -f fancy -o help
amend -o help q
amend -o help nofile
amend -t fancy -o compat=1.1 q
amend -Z -o compat=1.1 q
amend -o compat=9 q
amend -o fancy=1 q
amend -o cluster_size=4k q
amend -o size=x q
amend -o size=-1 q
amend -o size=20M q
amend -q -o size=20M q
amend -o size=9E q
amend -o size=1G snap
amend -o size=2M v2
amend -o compat=1.1,size=2M v2
amend -o compat=0.10 -o refcount_bits=8 q
amend --image-opts -o compat=0.10 driver=qcow2,file.filename=q
amend -f qcow2 --image-opts -o compat=0.10 driver=qcow2,file.filename=q
amend --force -o lazy_refcounts=on q
amend -o backing_file=x top.qcow2
amend -o backing_file=mid.qcow2,backing_fmt=qcow2 top.qcow2
amend -o backing_fmt=raw top.qcow2
amend -o compat q
amend --object secret,id=s,data=x -o compat=1.1 q
amend -U -o compat=1.1 q
resize q
resize q 1M 2M
resize q x
resize q 1x
resize q +x
resize q 0
resize q +0
resize q -100G
resize --shrink q 1M
resize --shrink q -1M
resize q 1E
resize q 8E
resize q 16E
resize q 99999999999999999999
resize q 10M
resize -q q 10M
resize -f raw raw 10M
resize raw 10M
resize -f qcow2 raw 10M
resize -f fancy raw 10M
resize nofile 10M
resize dir 10M
resize --preallocation=fancy q 10M
resize --preallocation=full q 1M
resize --preallocation=metadata q 10M
resize --preallocation=full --shrink q 1M
resize --preallocation=metadata top.qcow2 10M
resize --preallocation=metadata -f raw raw 10M
resize v2 2M
resize snap 2M
resize --shrink snap 512k
resize -Z q 1M
resize --object fancy,id=x q 1M
resize --image-opts driver=qcow2,file.filename=q 10M
resize q 1.5M
resize q 10m
resize q 10MB
resize q 0x100000
measure --size
measure --size x
measure --size -1
measure --size 1G
measure nofile
measure dir
measure -f qcow2 raw
measure -f fancy raw
measure -O fancy raw
measure -O qcow2 -o fancy=1 raw
measure -O qcow2 -o cluster_size=3k raw
measure -O qcow2 -o cluster_size=x raw
measure -O qcow2 -o compat=3 raw
measure -O qcow2 -o refcount_bits=3 raw
measure -O qcow2 -o refcount_bits=8,compat=0.10 raw
measure -O qcow2 -o preallocation=fancy raw
measure -O qcow2 -o extended_l2=on,cluster_size=4k raw
measure -O qcow2 -o extended_l2=on raw
measure -O qcow2 -o extended_l2=on,compat=0.10 raw
measure --output=fancy raw
measure -O qcow2 top.qcow2
measure -O qcow2 -o help
measure -O qcow2 --size 8E
measure -O qcow2 --size 1P
measure -O qcow2 -o cluster_size=512 --size 1T
measure -f raw --size 1M
measure -l s1 snap
measure -O qcow2 -l s1 snap
measure -l fancy snap
measure --image-opts driver=raw,file.filename=raw
measure --image-opts --size 1M
measure -U q
create x
create -f qcow2 x
create -f fancy x 1M
create -f qcow2 x 1x
create -f qcow2 x -1
create -f qcow2 x 1M 2M
create -f qcow2 -o size=1M x ; info x
create -f qcow2 -o size=1M x 2M
create -f qcow2 x 8E
create -f qcow2 x 16E
create -f qcow2 -o cluster_size=512 x 1T
create -f qcow2 -o cluster_size=3k x 1M
create -f qcow2 -o cluster_size=4M x 1M
create -f qcow2 -o cluster_size=256 x 1M
create -f qcow2 -o compat=2 x 1M
create -f qcow2 -o refcount_bits=3 x 1M
create -f qcow2 -o refcount_bits=0 x 1M
create -f qcow2 -o refcount_bits=128 x 1M
create -f qcow2 -o refcount_bits=1,compat=0.10 x 1M
create -f qcow2 -o lazy_refcounts=on,compat=0.10 x 1M
create -f qcow2 -o compression_type=zstd,compat=0.10 x 1M
create -f qcow2 -o compression_type=fancy x 1M
create -f qcow2 -o extended_l2=on,compat=0.10 x 1M
create -f qcow2 -o extended_l2=on,cluster_size=8k x 1M
create -f qcow2 -o preallocation=fancy x 1M
create -f qcow2 -o data_file_raw=on x 1M
create -f qcow2 -o data_file=d,compat=0.10 x 1M
create -f qcow2 -o data_file=d,data_file_raw=on -b base.raw -F raw x 1M
create -f qcow2 -o fancy=1 x 1M
create -f qcow2 -o 'backing_file=base.raw' x
create -f qcow2 -o backing_file= x 1M
create -f qcow2 -o backing_fmt=raw x 1M
create -f qcow2 -b base.raw x
create -f qcow2 -b base.raw -F fancy x
create -f qcow2 -b base.raw -F qcow2 x
create -f qcow2 -b nofile -F raw x
create -f qcow2 -b nofile -F raw -u x
create -f qcow2 -b nofile -F raw -u x 1M
create -f qcow2 -b x -F qcow2 x 1M
create -f qcow2 -b base.raw -F raw -o preallocation=metadata x 1M
create -f qcow2 dir 1M
create -f qcow2 no/dir 1M
create -f qcow2 '' 1M
create -f raw -b base.raw -F raw x 1M
create -f raw -o cluster_size=4k x 1M
create -f raw -o preallocation=metadata x 1M
create -f qcow2 -o encryption=on x 1M
create -f qcow2 -o encrypt.format=luks x 1M
create -f qcow2 -o encrypt.format=fancy x 1M
create -o help
create -f qcow2 -o help x
create -f raw -o '?' x
create -f qcow2 -o nocow=on x 1M
create -f qcow2 -o nocow=x x 1M
create -f qcow2 -o nocow=off,extent_size_hint=1M x 1M
create -f raw -o nocow=off x 1M
create -q -f qcow2 x 1M
create -f qcow2 -o lazy_refcounts x 1M
create -f qcow2 -o nolazy_refcounts x 1M
rebase q
rebase -b base.raw
rebase -b base.raw q
rebase -b base.raw -F fancy q
rebase -b base.raw -F qcow2 q
rebase -b nofile -F raw q
rebase -u -b nofile -F raw q ; info q
rebase -u -b '' top.qcow2 ; info top.qcow2
rebase -b '' top.qcow2
rebase -b base.raw -F raw nofile
rebase -b base.raw -F raw raw
rebase -f raw -b base.raw -F raw raw
rebase -f fancy -b base.raw -F raw q
rebase -t fancy -b base.raw -F raw q
rebase -T fancy -b base.raw -F raw q
rebase -b base.raw -F raw q raw
rebase -b top.qcow2 -F qcow2 top.qcow2
rebase -Z q
rebase -u q
rebase -u -b base.raw q
commit raw
commit top.qcow2 mid.qcow2
commit -f raw top.qcow2
commit -f fancy top.qcow2
commit -b nofile top.qcow2
commit -b base.raw top.qcow2
commit -b top.qcow2 top.qcow2
commit -t fancy top.qcow2
commit -r x top.qcow2
commit -Z top.qcow2
commit -d top.qcow2
convert
convert -O qcow2 raw
convert -O fancy raw x
convert -f fancy raw x
convert -f qcow2 raw x
convert nofile x
convert dir x
convert raw no/dir
convert raw dir
convert -O qcow2 -o fancy=1 raw x
convert -O qcow2 -o cluster_size=3k raw x
convert -O qcow2 -o compat=0.10,refcount_bits=8 raw x
convert -O qcow2 -o preallocation=fancy raw x
convert -c raw x
convert -c -O qcow2 -o preallocation=full raw x
convert -n raw x
convert -n raw odd
convert -n -O qcow2 raw snap
convert -o cluster_size=4k -n -O qcow2 raw q
convert -B base.raw -O qcow2 top.qcow2 x
convert -B base.raw -F raw -O qcow2 top.qcow2 x
convert -B nofile -F raw -O qcow2 top.qcow2 x
convert -B base.raw -F raw raw q x
convert -l nosnap snap x
convert -S x raw x
convert -S 3 raw x
convert -m 0 raw x
convert -m 17 raw x
convert -r x raw x
convert -t fancy raw x
convert -T fancy raw x
convert -C -S 4k raw x
convert -C -c raw x
convert -Z raw x
convert --target-is-zero raw x
convert --bitmaps -O raw q x
convert --target-image-opts raw driver=raw,file.filename=x
convert raw raw
convert -O qcow2 -o help
convert -O qcow2 -o help raw x
info -b q
info --output=
info --image-opts q
info --image-opts driver=fancy,file.filename=q
""".strip("\n").split("\n")

# command line -> why the answers differ.  Both end alike (status), but for those in STATUS.
DIVERGENCES = {
    "amend -o compat=1.1 dir": "7.2 finds that it cannot write to a directory, then what it is",
    "resize dir 10M": "the same",
    "create -f qcow2 -o backing_file= x 1M": "an empty name is refused a moment later",
    "create -f qcow2 -b x -F qcow2 x 1M": "a file that is not there is not compared with itself",
    "create -f qcow2 -o encryption=on x 1M": "no encryption yet, which is said",
    "create -f qcow2 -o encrypt.format=luks x 1M": "the same",
    "create -f qcow2 -o encrypt.format=fancy x 1M": "the same",
    "rebase -b top.qcow2 -F qcow2 top.qcow2": "7.2 runs into its own lock; here the mistake is named",
    "convert raw raw": "the same",
    "convert -O qcow2 -o preallocation=fancy raw x": "without the target's format in front",
    "convert -B nofile -F raw -O qcow2 top.qcow2 x": "7.2 makes the image, then cannot open it",
    "convert -B base.raw -F raw raw q x": "the option that raw does not have is named",
    "info --output=": "an empty value is a value",
    "info --image-opts q": "7.2 looks for a node of that name",
}
STATUS = {
    "measure --size": "a value is missing: 7.2 prints its help and succeeds",
    "measure -O qcow2 -o extended_l2=on,compat=0.10 raw": "7.2 measures what it would not create",
    "create -f qcow2 -o nolazy_refcounts x 1M": "the old spelling of =off is not known",
    "convert -c -O qcow2 -o preallocation=full raw x": "room given ahead is simply not used",
    "convert -C -S 4k raw x": "-S 4k is the default, which copy offloading keeps to",
}
VERBS = sorted({line.split()[0] for line in LINES})


def answers(program, folder, d, lines):
    """One answer a line, each from the folder as it was."""
    out, fresh, d = [], False, pathlib.Path(tempfile.mkdtemp(dir="/dev/shm")) / d.name  # much is synced
    for line in lines:
        if not fresh:
            shutil.rmtree(d, ignore_errors=True)
            subprocess.run(["cp", "-a", "--sparse=always", folder, d], check=True)
            subprocess.run(["qemu-img", "snapshot", "-c", "s1", "snap"], cwd=d, check=True)
            subprocess.run(["qemu-img", "snapshot", "-c", "s1", "v2"], cwd=d, check=True)
        before = sorted(os.listdir(d))
        out.append(run_all(program, d, [words(part) for part in line.split(";")]))
        fresh = all(r[0] for r in out[-1]) and sorted(os.listdir(d)) == before
    shutil.rmtree(d.parent)
    return out


@pytest.fixture(scope="module")
def images(folder):  # noqa: F811
    for name, compat in ("snap", "1.1"), ("v2", "0.10"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"compat={compat}", name, "1M"],
                       cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("verb", VERBS)
def test_dropin_refuses_as_the_peer(dropin, images, tmp_path, verb):  # noqa: F811
    lines = [line for line in LINES if line.split()[0] == verb]
    ours, theirs = [answers(p, images, tmp_path / pathlib.Path(p).parent.name, lines)
                    for p in (dropin, shutil.which("qemu-img"))]
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
