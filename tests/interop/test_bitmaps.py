# SPDX-License-Identifier: MIT
"""Dirty bitmaps, both ways with QEMU: bitmaps made by one, changed by the other, and their bits read
through qemu-nbd (and nbdinfo) and compared with what was written.

A bitmap must never say too little: every test that writes compares with a model of the writes.
"""
import json
import random
import shutil
import subprocess

import pytest

from bitmap_help import *
from qcow2_image import Qcow2
from serving import Server


class Model:
    """Granules that were touched."""

    def __init__(self, size, granularity):
        self.size, self.granularity, self.set = size, granularity, set()

    def touch(self, offset, length):
        if length:
            self.set.update(range(offset // self.granularity,
                                  (offset + length - 1) // self.granularity + 1))

    def runs(self):
        return runs(self.set, self.granularity, self.size)


def random_commands(rng, size, cluster, models, n):
    out = []
    for _ in range(n):
        kind = rng.choice(["write", "write", "write -z", "write -z -u", "discard"])
        length = rng.choice([512, 4096, cluster, 3 * cluster, rng.randrange(1, 600) * 512])
        length = min(length, size)
        offset = rng.randrange(0, (size - length) // 512 + 1) * 512
        out.append(f"{kind} {offset} {length}")
        if kind == "discard":  # whole clusters are dropped, nothing else changes
            low = -(-offset // cluster) * cluster
            high = offset + length if offset + length == size else (offset + length) // cluster * cluster
            offset, length = low, max(high - low, 0)
        for m in models:
            m.touch(offset, length)
    return out


SHAPES = [(64 * KIB, 64 * KIB, 24 * MIB), (512, 512, 2 * MIB), (4096, 2 * MIB, 33 * MIB + 512),
          (2 * MIB, 4096, 40 * MIB), (64 * KIB, 1 << 31, 8 * MIB)]


@pytest.mark.parametrize("cluster,granularity,size", SHAPES)
def test_what_strata_writes_is_what_qemu_reads(run, io, peer, bits, listed, tmp_path, seed, cluster,
                                              granularity, size):
    rng = random.Random(seed)
    path = tmp_path / "a.qcow2"
    run("create", "-f", "qcow2", "-o", f"cluster_size={cluster}", path, size)
    run("bitmap", "--add", "-g", granularity, path, "b")
    m = Model(size, granularity)
    for _ in range(3):
        io(path, *random_commands(rng, size, cluster, [m], 8))
        peer("qemu-img", "check", path)
        assert listed(path)["b"]["dirty-bytes"] == sum(n for _, n in m.runs())
    assert bits(path, "b") == m.runs()
    run("check", path)


@pytest.mark.parametrize("cluster,granularity,size", SHAPES[:3])
def test_qemu_and_strata_write_in_turns(run, io, qio, peer, bits, tmp_path, seed, cluster,
                                        granularity, size):
    rng = random.Random(seed)
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", path, size)
    peer("qemu-img", "bitmap", "--add", "-g", granularity, path, "b")
    m = Model(size, granularity)
    for i in range(4):
        commands = [c for c in random_commands(rng, size, cluster, [], 6) if "discard" not in c]
        for c in commands:
            m.touch(*map(int, c.split()[-2:]))
        (qio if i % 2 else io)(path, *commands)
        assert bits(path, "b") == m.runs()
    peer("qemu-img", "check", path)


@pytest.mark.parametrize("how", [[], ["-c"], ["-C"], ["-m", "1"]])
def test_conversions_into_an_image_are_recorded(run, io, bits, tmp_path, how):
    """Coded units, and what the storage copies by itself, are writes too."""
    src, dst = tmp_path / "s.qcow2", tmp_path / "d.qcow2"
    run("create", "-f", "qcow2", src, "8M")
    io(src, "write -P 1 1M 128k", "write -P 2 5M 1M")
    run("create", "-f", "qcow2", dst, "8M")
    run("bitmap", "--add", dst, "b")
    run("convert", "-n", "--target-is-zero", *how, "-O", "qcow2", src, dst)
    assert bits(dst, "b") == [(MIB, 128 * KIB), (5 * MIB, MIB)]


def test_writes_of_zeros_that_are_detected_are_recorded(strata, bits, run, tmp_path):
    path = tmp_path / "a.qcow2"
    run("create", "-f", "qcow2", path, "8M")
    run("bitmap", "--add", path, "b")
    with Server(strata, path, "-f", "qcow2", "--detect-zeroes", "unmap", "-t",
                socket_path=tmp_path / "s") as s:
        subprocess.run(["qemu-io", "-f", "raw", "-c", "write -P 0 1M 64k", "-c", "write -P 5 3M 64k", s.uri],
                       check=True, stdout=subprocess.DEVNULL)
    assert bits(path, "b") == [(MIB, 64 * KIB), (3 * MIB, 64 * KIB)]


def test_a_disabled_bitmap_records_nothing_and_an_enabled_one_does_again(run, io, bits, tmp_path):
    path = tmp_path / "a.qcow2"
    run("create", "-f", "qcow2", path, "4M")
    run("bitmap", "--add", "--disable", path, "b")
    io(path, "write 0 64k")
    assert bits(path, "b") == []
    run("bitmap", "--enable", path, "b")
    io(path, "write 1M 64k")
    run("bitmap", "--disable", path, "b")
    io(path, "write 2M 64k")
    assert bits(path, "b") == [(MIB, 64 * KIB)]
    run("bitmap", "--clear", path, "b")
    assert bits(path, "b") == []


def test_merge_takes_every_granularity_and_other_images(run, io, peer, bits, tmp_path):
    ours, theirs, other = tmp_path / "o.qcow2", tmp_path / "t.qcow2", tmp_path / "x.qcow2"
    for path in ours, other:
        run("create", "-f", "qcow2", path, "64M")
    for path, at in (ours, "3M"), (other, "2M"):
        run("bitmap", "--add", "-g", "4k", path, "fine")
        run("bitmap", "--add", "-g", "1M", path, "coarse")
        io(path, f"write {at} 6000", f"write {at.replace('M', '1M')} 100k")
    run("bitmap", "--add", "-g", "64k", "--merge", "fine", "--merge", "coarse", ours, "sum")
    shutil.copy(ours, theirs)
    run("bitmap", "--merge", "fine", "-b", other, "-F", "qcow2", ours, "sum")
    run("bitmap", "--merge", "coarse", ours, "fine")
    peer("qemu-img", "bitmap", "--merge", "fine", "-b", other, "-F", "qcow2", theirs, "sum")
    peer("qemu-img", "bitmap", "--merge", "coarse", theirs, "fine")
    for name in "sum", "fine", "coarse":
        assert bits(ours, name) == bits(theirs, name)
    peer("qemu-img", "check", ours)


def test_a_merge_of_disks_of_different_sizes_is_refused(run, tmp_path):
    a, b = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    for path, size in (a, "4M"), (b, "8M"):
        run("create", "-f", "qcow2", path, size)
        run("bitmap", "--add", path, "n")
    p = run("bitmap", "--merge", "n", "-b", b, a, "n", status=1)
    assert "different sizes" in p.stderr


# ---- what is not touched

def test_an_image_that_is_only_opened_does_not_change(run, io, peer, tmp_path):
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    peer("qemu-img", "bitmap", "--add", path, "b")
    before = digest(path)
    io(path, "read 0 4k", opts=["-r"])
    io(path, "read 0 4k", "flush")
    run("bitmap", "--list", path)
    run("info", path)
    assert digest(path) == before


def test_a_disabled_bitmap_is_not_marked_while_others_are(run, tmp_path, killed):
    path = tmp_path / "a.qcow2"
    run("create", "-f", "qcow2", path, "4M")
    run("bitmap", "--add", "--disable", path, "off")
    run("bitmap", "--add", path, "on")
    killed(path, "write 0 64k")
    q = Qcow2(path)
    assert [flags(q, 0), flags(q, 1)] == [0, 3]


def test_after_kill_9_a_bitmap_is_in_use_and_all_but_removal_is_refused(broken, run, peer, listed, io):
    info = json.loads(peer("qemu-img", "info", "--output=json", broken).stdout)
    assert info["format-specific"]["data"]["bitmaps"][1]["flags"] == ["in-use", "auto"]
    for action in ["--clear"], ["--enable"], ["--disable"], ["--merge", "c"]:
        p = run("bitmap", *action, broken, "b", status=1)
        assert "inconsistent" in p.stderr and "can only be removed" in p.stderr
    assert "inconsistent" in run("bitmap", "--merge", "b", broken, "c", status=1).stderr
    assert "bitmap 'b' is inconsistent" in run("resize", broken, "8M", status=1).stderr
    assert listed(broken)["b"]["inconsistent"] and not listed(broken)["c"]["inconsistent"]
    io(broken, "write 1M 64k")  # the disk itself is as good as any
    assert listed(broken)["b"]["inconsistent"]
    run("bitmap", "--remove", broken, "b")
    assert list(listed(broken)) == ["c"]
    assert peer("qemu-img", "check", broken, status=None).returncode in (0, 3)


def test_convert_leaves_broken_bitmaps_out_when_told(broken, run, tmp_path, listed):
    out = tmp_path / "out.qcow2"
    p = run("convert", "-O", "qcow2", "--bitmaps", broken, out, status=1)
    assert "'b' is damaged" in p.stderr and not out.exists()
    p = run("convert", "-O", "qcow2", "--bitmaps", "--skip-broken-bitmaps", broken, out)
    assert "'b' is damaged and left out" in p.stderr
    assert list(listed(out)) == ["c"]


def test_the_mark_is_set_only_by_a_change(run, tmp_path, killed):
    path = tmp_path / "a.qcow2"
    run("create", "-f", "qcow2", path, "4M")
    run("bitmap", "--add", path, "b")
    killed(path, "read 0 64k", "flush")
    assert flags(Qcow2(path)) == 2
    killed(path, "discard 0 64k")
    assert flags(Qcow2(path)) == 3


# ---- limits

@pytest.mark.parametrize("size,granularity,fits", [("4T", "64k", None), ("4T", "1k", None),
                                                   ("4T", "512", "1024"), ("64T", "4k", "16384")])
def test_too_fine_a_granularity_is_refused_by_name(run, peer, tmp_path, size, granularity, fits):
    path = tmp_path / "a.qcow2"
    run("create", "-f", "qcow2", path, size)
    p = run("bitmap", "--add", "-g", granularity, path, "b", status=1 if fits else 0)
    if fits:
        assert f"granularity of {fits} or more fits" in p.stderr
    peer("qemu-img", "check", path)


@pytest.mark.parametrize("args,text", [
    (["--add", "-g", "1000"], "not a power of two"), (["--add", "-g", "256"], "not a power of two"),
    (["--add", "-g", "4G"], "not a power of two"), (["--clear"], "has no bitmap 'x'"),
    (["--remove"], "has no bitmap 'x'"), (["--merge", "y"], "has no bitmap 'x'"),
])
def test_what_cannot_be_is_said(run, tmp_path, args, text):
    path = tmp_path / "a.qcow2"
    run("create", "-f", "qcow2", path, "1M")
    before = digest(path)
    assert text in run("bitmap", *args, path, "x", status=1).stderr
    assert digest(path) == before


def test_names_have_1_to_1023_bytes_and_are_unique(run, peer, tmp_path, listed):
    path = tmp_path / "a.qcow2"
    run("create", "-f", "qcow2", path, "1M")
    assert "needs a name" in run("bitmap", "--add", path, "", status=1).stderr
    assert "1024 bytes" in run("bitmap", "--add", path, "n" * 1024, status=1).stderr
    run("bitmap", "--add", path, "n" * 1023)
    assert "there already" in run("bitmap", "--add", path, "n" * 1023, status=1).stderr
    assert list(listed(path)) == ["n" * 1023]
    peer("qemu-img", "bitmap", "--remove", path, "n" * 1023)


def test_version_2_and_other_formats_keep_none(run, tmp_path):
    v2, raw = tmp_path / "a.qcow2", tmp_path / "a.raw"
    run("create", "-f", "qcow2", "-o", "compat=0.10", v2, "1M")
    run("create", "-f", "raw", raw, "1M")
    assert "version 2" in run("bitmap", "--add", v2, "b", status=1).stderr
    assert "'raw' cannot keep" in run("bitmap", "--add", "-f", "raw", raw, "b", status=1).stderr


def test_thirty_bitmaps_in_an_image_of_small_clusters(run, io, peer, tmp_path, listed):
    path = tmp_path / "a.qcow2"
    run("create", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
    for i in range(30):
        run("bitmap", "--add", "-g", "512", path, f"bitmap-{i}")
    io(path, "write 0 512", "write 512k 1k")
    assert {b["dirty-bytes"] for b in listed(path).values()} == {1536}
    peer("qemu-img", "check", path)
    for i in range(0, 30, 2):
        run("bitmap", "--remove", path, f"bitmap-{i}")
    assert list(listed(path)) == [f"bitmap-{i}" for i in range(1, 30, 2)]
    peer("qemu-img", "check", path)


# ---- resize, commit, convert

def test_bitmaps_follow_the_size_and_new_room_counts_as_changed(run, io, peer, bits, tmp_path):
    path = tmp_path / "a.qcow2"
    run("create", "-f", "qcow2", path, "4M")
    run("bitmap", "--add", path, "b")
    run("bitmap", "--add", "--disable", path, "off")
    io(path, "write 1M 64k", "write 3M 64k")
    run("resize", "--shrink", path, 2 * MIB + 512)
    assert bits(path, "b") == [(MIB, 64 * KIB)]
    run("resize", path, "40M")
    assert bits(path, "b") == [(MIB, 64 * KIB), (2 * MIB, 38 * MIB)]
    assert bits(path, "off") == []
    peer("qemu-img", "check", path)


def test_a_size_that_a_bitmap_cannot_follow_is_refused(run, tmp_path, listed):
    path = tmp_path / "a.qcow2"
    run("create", "-f", "qcow2", path, "2T")
    run("bitmap", "--add", "-g", "512", path, "b")
    before = digest(path)
    p = run("resize", path, "2T", "--quiet")
    p = run("resize", path, "3T", status=1)
    assert "cannot change" in p.stderr and "1024 or more" in p.stderr
    assert digest(path) == before and not listed(path)["b"]["inconsistent"]


def test_applying_a_snapshot_calls_all_of_the_disk_changed(run, io, peer, bits, tmp_path):
    path = tmp_path / "a.qcow2"
    run("create", "-f", "qcow2", path, "4M")
    run("snapshot", "-c", "small", path)
    run("resize", path, "6M")
    run("bitmap", "--add", path, "b")
    run("bitmap", "--add", "--disable", path, "off")
    run("snapshot", "-c", "large", path)
    io(path, "write 0 64k")
    run("snapshot", "-a", "small", path)
    assert bits(path, "b") == [(0, 4 * MIB)]
    run("bitmap", "--clear", path, "b")
    run("snapshot", "-a", "large", path)
    assert bits(path, "b") == [(0, 6 * MIB)] and bits(path, "off") == []
    run("snapshot", "-d", "small", path)
    peer("qemu-img", "check", path)


def test_whole_clusters_of_ones_are_read_by_qemu(run, io, peer, bits, tmp_path):
    path = tmp_path / "a.qcow2"
    run("create", "-f", "qcow2", "-o", "cluster_size=512", path, "9M")
    run("bitmap", "--add", "-g", "512", path, "b")
    io(path, "write -z 1M 8M")
    q = Qcow2(path)
    table = q.get64(directory(q)[0])
    assert [q.get64(table + 8 * i) for i in (1, 2, 3)] == [1, 1, 1]
    assert bits(path, "b") == [(MIB, 8 * MIB)]
    peer("qemu-img", "check", path)


def test_commit_is_recorded_by_the_bitmaps_of_the_base(run, io, peer, bits, tmp_path):
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    run("create", "-f", "qcow2", base, "4M")
    run("bitmap", "--add", base, "b")
    run("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", top, cwd=tmp_path)
    run("bitmap", "--add", top, "t")
    io(top, "write 1M 128k")
    run("commit", top)
    assert bits(base, "b") == [(MIB, 128 * KIB)]
    assert bits(top, "t") == [(MIB, 128 * KIB)]
    for path in base, top:
        peer("qemu-img", "check", path)


def test_rebase_keeps_the_bitmaps(run, io, peer, bits, tmp_path):
    a, b, top = tmp_path / "a.qcow2", tmp_path / "b.qcow2", tmp_path / "top.qcow2"
    for path in a, b:
        run("create", "-f", "qcow2", path, "4M")
    io(a, "write -P 1 0 64k")
    run("create", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", top, cwd=tmp_path)
    run("bitmap", "--add", top, "t")
    io(top, "write 1M 64k")
    run("rebase", "-b", "b.qcow2", "-F", "qcow2", top, cwd=tmp_path)
    assert (MIB, 64 * KIB) in bits(top, "t")
    run("rebase", "-u", "-b", "", top, cwd=tmp_path)
    assert (MIB, 64 * KIB) in bits(top, "t")
    peer("qemu-img", "check", top)


def test_convert_takes_the_bitmaps_along(run, io, peer, bits, tmp_path, listed):
    src, ours, theirs = (tmp_path / n for n in ("s.qcow2", "o.qcow2", "t.qcow2"))
    run("create", "-f", "qcow2", src, "64M")
    run("bitmap", "--add", "-g", "4k", src, "on")
    io(src, "write 1M 70000")
    run("bitmap", "--disable", src, "on")
    run("bitmap", "--enable", "--add", src, "later", status=1)
    run("bitmap", "--add", src, "later")
    io(src, "write 9M 1")
    run("convert", "-O", "qcow2", "--bitmaps", src, ours)
    peer("qemu-img", "convert", "-O", "qcow2", "--bitmaps", src, theirs)
    for name in "on", "later":
        assert bits(ours, name) == bits(theirs, name) == bits(src, name)
        assert listed(ours)[name] == listed(theirs)[name]
    peer("qemu-img", "check", ours)


@pytest.mark.parametrize("target", [["-O", "raw"], ["-O", "qcow2", "-o", "compat=0.10"]])
def test_convert_to_what_keeps_no_bitmaps_is_refused(run, tmp_path, target):
    src, out = tmp_path / "s.qcow2", tmp_path / "out"
    run("create", "-f", "qcow2", src, "1M")
    run("bitmap", "--add", src, "b")
    assert "cannot keep bitmaps" in run("convert", *target, "--bitmaps", src, out, status=1).stderr
    assert not out.exists()
