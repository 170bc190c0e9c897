# SPDX-License-Identifier: MIT
"""Dirty bitmaps, both ways with QEMU: bitmaps made by one, changed by the other, and their bits read
through qemu-nbd (and nbdinfo) and compared with what was written.

A bitmap must never say too little: every test that writes compares with a model of the writes.
"""
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import time

import pytest

from qcow2_image import Qcow2
from serving import Server

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
EXT_BITMAPS = 0x23852875
AUTOCLEAR = 88


@pytest.fixture
def io(run):
    def call(path, *commands, opts=(), status=0):
        args = [x for c in commands for x in ("-c", c)]
        return run("io", "-f", "qcow2", *opts, *args, path, status=status)

    return call


@pytest.fixture
def qio(peer):
    def call(path, *commands):
        args = [x for c in commands for x in ("-c", c)]
        return peer("qemu-io", "-f", "qcow2", "-d", "unmap", *args, path)

    return call


def wait_for(path, proc):
    """Until the server accepts: its socket has a name a little before that."""
    for _ in range(6000):
        assert proc.poll() is None, proc.stderr and proc.stderr.read()
        with socket.socket(socket.AF_UNIX) as s, contextlib.suppress(OSError):
            s.connect(str(path))
            return
        time.sleep(.01)
    raise AssertionError("the server does not begin")


@pytest.fixture
def bits(tmp_path):
    """bits(image, name) -> list of (offset, length): what QEMU calls dirty."""
    def call(path, name):
        sock = tmp_path / "bits.sock"
        p = subprocess.Popen(["qemu-nbd", "-r", "-t", "-f", "qcow2", "-B", name, "-k", sock, path],
                             stderr=subprocess.PIPE, text=True)
        try:
            wait_for(sock, p)
            q = subprocess.run(["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}",
                                f"nbd+unix:///?socket={sock}"], capture_output=True, text=True,
                               timeout=60)
            assert q.returncode == 0, q.stderr
        finally:
            p.terminate()
            p.wait()
            with contextlib.suppress(FileNotFoundError):
                sock.unlink()
        out = []
        for x in json.loads(q.stdout):
            if not x["type"] & 1:
                continue
            if out and sum(out[-1]) == x["offset"]:
                out[-1] = (out[-1][0], out[-1][1] + x["length"])
            else:
                out.append((x["offset"], x["length"]))
        return out

    return call


@pytest.fixture
def listed(run):
    def call(path):
        return {b["name"]: b for b in json.loads(run("bitmap", "--list", "--output=json", path).stdout)}

    return call


def runs(granules, granularity, size):
    out = []
    for g in sorted(granules):
        start, end = g * granularity, min((g + 1) * granularity, size)
        if out and sum(out[-1]) == start:
            out[-1] = (out[-1][0], end - out[-1][0])
        else:
            out.append((start, end - start))
    return out


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


def digest(path):
    return hashlib.sha256(path.read_bytes()).digest()


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


# ---- NBD

def nbdmap(uri, context):
    p = subprocess.run(["nbdinfo", "--json", f"--map={context}", uri], capture_output=True, text=True,
                       timeout=60)
    assert p.returncode == 0, p.stderr
    out = []
    for x in json.loads(p.stdout):
        if out and out[-1][2] == x["type"]:
            out[-1][1] += x["length"]
        else:
            out.append([x["offset"], x["length"], x["type"]])
    return out


@contextlib.contextmanager
def qemu_nbd(tmp_path, *args):
    sock = tmp_path / "theirs.sock"
    p = subprocess.Popen(["qemu-nbd", "-r", "-t", "-f", "qcow2", "-k", sock, *map(str, args)])
    try:
        wait_for(sock, p)
        yield f"nbd+unix:///?socket={sock}"
    finally:
        p.terminate()
        p.wait()


@pytest.fixture
def layers(run, io, tmp_path):
    """top -> mid -> base, with bitmaps fine and coarse in top, and old in mid."""
    base, mid, top = (tmp_path / n for n in ("base.qcow2", "mid.qcow2", "top.qcow2"))
    run("create", "-f", "qcow2", base, "16M")
    io(base, "write 0 1M")
    run("create", "-f", "qcow2", "-b", base, "-F", "qcow2", mid)
    run("bitmap", "--add", mid, "old")
    io(mid, "write 512k 1M", "write -z 8M 64k")
    run("create", "-f", "qcow2", "-b", mid, "-F", "qcow2", top)
    run("bitmap", "--add", "-g", "4k", top, "fine")
    run("bitmap", "--add", "-g", "1M", top, "coarse")
    io(top, "write 700000 1000", "write -z 3M 100k", "write 15M 1M")
    return top


def test_serve_shows_the_contexts_that_qemu_nbd_shows(strata, layers, tmp_path):
    options = ["-A", "-B", "fine", "-B", "coarse"]
    with Server(strata, layers, "-f", "qcow2", "-r", "-t", *options,
                socket_path=tmp_path / "s") as s, qemu_nbd(tmp_path, *options, layers) as theirs:
        for context in ("qemu:dirty-bitmap:fine", "qemu:dirty-bitmap:coarse", "qemu:allocation-depth",
                        "base:allocation"):
            assert nbdmap(s.uri, context) == nbdmap(theirs, context), context
        listed = [sorted(json.loads(subprocess.run(["nbdinfo", "--json", uri], capture_output=True)
                                    .stdout)["exports"][0]["contexts"]) for uri in (s.uri, theirs)]
        assert listed[0] == listed[1]


def test_serve_finds_bitmaps_below_too_and_names_what_it_does_not_find(strata, layers, run, tmp_path):
    with Server(strata, layers, "-f", "qcow2", "-r", "-t", "-B", "old", socket_path=tmp_path / "s") as s:
        assert [x[:2] for x in nbdmap(s.uri, "qemu:dirty-bitmap:old") if x[2]] == \
            [[512 * KIB, MIB], [8 * MIB, 64 * KIB]]
    assert "no bitmap 'none'" in run("serve", "-k", tmp_path / "s", "-B", "none", layers, status=1).stderr


def test_clients_see_what_they_write_themselves(strata, layers, bits, tmp_path):
    with Server(strata, layers, "-f", "qcow2", "-t", "-B", "fine", socket_path=tmp_path / "s") as s:
        before = nbdmap(s.uri, "qemu:dirty-bitmap:fine")
        subprocess.run(["qemu-io", "-f", "raw", "-c", "write 6M 4k", "-c", "write -z 7M 8k", s.uri],
                       check=True, stdout=subprocess.DEVNULL)
        dirty = [x[:2] for x in nbdmap(s.uri, "qemu:dirty-bitmap:fine") if x[2]]
        assert [6 * MIB, 4096] in dirty and [7 * MIB, 8192] in dirty
        assert [6 * MIB, 4096] not in [x[:2] for x in before if x[2]]
    assert [tuple(x) for x in dirty] == bits(layers, "fine")


def test_the_drop_in_qemu_nbd_serves_bitmaps(strata, layers, broken, tmp_path):
    link = tmp_path / "qemu-nbd"
    link.symlink_to(os.path.abspath(strata))
    sock = tmp_path / "d.sock"
    p = subprocess.Popen([link, "-r", "-f", "qcow2", "-A", "-B", "fine", "-k", sock, layers])
    wait_for(sock, p)
    assert [x for x in nbdmap(f"nbd+unix:///?socket={sock}", "qemu:dirty-bitmap:fine") if x[2]]
    assert p.wait(30) == 0
    for args in ["-B", "none", layers], ["-B", "b", broken]:
        said = [re.sub("^.*qemu-nbd: ", "qemu-nbd: ", subprocess.run(
            [prog, "-r", "-f", "qcow2", "-k", sock, *args], capture_output=True, text=True,
            timeout=30).stderr) for prog in (link, "qemu-nbd")]
        assert said[0] == said[1]


def test_selected_contexts_come_in_one_answer(strata, layers, tmp_path):
    """libnbd asks for several at once."""
    with Server(strata, layers, "-f", "qcow2", "-r", "-t", "-A", "-B", "fine", "-B", "coarse",
                socket_path=tmp_path / "s") as s:
        p = subprocess.run(["/usr/bin/python3", "-c", f"""
import nbd
h = nbd.NBD()
names = ["qemu:dirty-bitmap:coarse", "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:fine"]
for n in names:
    h.add_meta_context(n)
h.connect_uri({s.uri!r})
got = {{}}
h.block_status(16 << 20, 0, lambda c, o, e, err: got.__setitem__(c, e))
assert sorted(got) == sorted(names), got
assert sum(got["qemu:dirty-bitmap:fine"][0::2]) == 16 << 20
one = {{}}
h.block_status(16 << 20, 0, lambda c, o, e, err: one.__setitem__(c, e), nbd.CMD_FLAG_REQ_ONE)
assert all(len(e) == 2 and e == got[c][:2] for c, e in one.items()), one
"""], capture_output=True, text=True, timeout=60)
        assert p.returncode == 0, p.stderr


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


def extension(q):
    """(offset of the bitmaps extension's 24 bytes)"""
    pos = q.get32(100)
    while True:
        kind, length = q.get32(pos), q.get32(pos + 4)
        assert kind, "no bitmaps extension"
        if kind == EXT_BITMAPS:
            return pos + 8
        pos += 8 + (length + 7) // 8 * 8


def directory(q):
    at = extension(q)
    return q.get64(at + 16), q.get64(at + 8)


def flags(q, index=0):
    at, _ = directory(q)
    for _ in range(index):
        at += (24 + q.get16(at + 18) + q.get32(at + 20) + 7) // 8 * 8
    return q.get32(at + 12)


def test_a_disabled_bitmap_is_not_marked_while_others_are(run, tmp_path, killed):
    path = tmp_path / "a.qcow2"
    run("create", "-f", "qcow2", path, "4M")
    run("bitmap", "--add", "--disable", path, "off")
    run("bitmap", "--add", path, "on")
    killed(path, "write 0 64k")
    q = Qcow2(path)
    assert [flags(q, 0), flags(q, 1)] == [0, 3]


# ---- kill -9

@pytest.fixture
def killed(strata):
    """killed(image, command ...): strata io does them, and is killed with the image open."""
    def call(path, *commands):
        p = subprocess.Popen([strata, "io", "-f", "qcow2", path], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
        for c in (*commands, "length"):
            p.stdin.write(c + "\n")
        p.stdin.flush()
        size = None
        while size is None:
            line = p.stdout.readline()
            assert line, "it ended by itself"
            size = re.search(r"\b4 MiB\b", line)
        p.kill()
        p.wait()

    return call


@pytest.fixture
def broken(run, killed, tmp_path):
    """An image of 4 MiB whose bitmap b was in use when its writer was killed; c is disabled."""
    path = tmp_path / "broken.qcow2"
    run("create", "-f", "qcow2", path, "4M")
    run("bitmap", "--add", "--disable", path, "c")
    run("bitmap", "--add", path, "b")
    killed(path, "write 0 64k")
    return path


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


# ---- the drop-in name

LINES = [
    ["bitmap", "--add", "a", "b0"],
    ["bitmap", "--add", "a", "b0"],
    ["bitmap", "--add", "--disable", "-g", "4k", "a", "b1"],
    ["bitmap", "--merge", "b0", "a", "b1"],
    ["bitmap", "--merge", "none", "a", "b1"],
    ["bitmap", "--remove", "a", "none"],
    ["bitmap", "--clear", "--enable", "a", "b1"],
    ["bitmap", "--add", "-g", "100", "a", "x"],
    ["bitmap", "--add", "-g", "4G", "a", "x"],
    ["bitmap", "--add", "-g", "1x", "a", "x"],
    ["bitmap", "--add", "a", ""],
    ["bitmap", "--add", "a", "x" * 1024],
    ["bitmap", "--add", "v2", "x"],
    ["bitmap", "--add", "-f", "raw", "raw", "x"],
    ["bitmap", "--add", "a"],
    ["bitmap", "a", "b0"],
    ["bitmap", "-g", "1M", "--clear", "a", "b0"],
    ["bitmap", "-F", "raw", "--clear", "a", "b0"],
    ["bitmap", "-b", "a", "--clear", "a", "b0"],
    ["bitmap", "--merge"],
    ["bitmap", "--frob", "a", "b0"],
    ["bitmap", "--add", "none", "b0"],
    ["bitmap", "--image-opts", "--disable", "driver=qcow2,file.filename=a", "b0"],
    ["bitmap", "--add", "--merge", "b0", "-b", "big", "a", "b9"],
    ["bitmap", "--clear", "broken", "b"],
    ["bitmap", "--merge", "b", "broken", "c"],
    ["info", "a"],
    ["info", "--output=json", "a"],
    ["info", "broken"],
    ["measure", "-O", "qcow2", "a"],
    ["measure", "-O", "qcow2", "-o", "cluster_size=4k", "--output=json", "a"],
    ["measure", "-O", "qcow2", "broken"],
    ["convert", "-O", "qcow2", "--bitmaps", "a", "out"],
    ["info", "out"],
    ["convert", "-O", "qcow2", "--bitmaps", "-n", "a", "out"],
    ["convert", "-O", "raw", "--bitmaps", "a", "out2"],
    ["convert", "-O", "qcow2", "-o", "compat=0.10", "--bitmaps", "a", "out2"],
    ["convert", "-f", "raw", "-O", "qcow2", "--bitmaps", "a", "out2"],
    ["convert", "-O", "qcow2", "--bitmaps", "a", "a", "out2"],
    ["convert", "-O", "qcow2", "--skip-broken-bitmaps", "a", "out2"],
    ["convert", "-O", "qcow2", "--bitmaps", "broken", "out3"],
    ["convert", "-O", "qcow2", "--bitmaps", "--skip-broken-bitmaps", "broken", "out4"],
    ["bitmap", "--remove", "broken", "b"],
    ["check", "broken"],
]


def normal(text):
    text = re.sub(r"#block\d+", "NODE", text)
    text = re.sub(r"(disk size:) .*", r"\1 N", text)
    text = re.sub(r"Image end offset: \d+", "", text)
    text = re.sub(r'^( *)"children": \[\n(\1 .*\n)*\1\],\n', "", text, flags=re.M)  # QEMU 8 and later
    text = re.sub(r"^Child node '/file':\n(    .*\n)*", "", text, flags=re.M)
    return re.sub(r'"actual-size": \d+', '"actual-size": 0', text)


def test_the_drop_in_name_says_what_qemu_img_says(strata, peer, run, broken, tmp_path):
    link = tmp_path / "bin" / "qemu-img"
    link.parent.mkdir()
    link.symlink_to(os.path.abspath(strata))
    a, b = tmp_path / "1", tmp_path / "2"
    a.mkdir()
    peer("qemu-img", "create", "-q", "-f", "qcow2", "a", "10M", cwd=a)
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", "v2", "1M", cwd=a)
    peer("qemu-img", "create", "-q", "-f", "qcow2", "big", "20M", cwd=a)
    peer("qemu-img", "bitmap", "--add", "big", "b0", cwd=a)
    peer("qemu-img", "create", "-q", "-f", "raw", "raw", "1M", cwd=a)
    shutil.copy(broken, a / "broken")
    shutil.copytree(a, b)
    for line in LINES:
        got = []
        for program, folder in ("/usr/bin/qemu-img", a), (str(link), b):
            p = subprocess.run([program, *line], cwd=folder, capture_output=True, text=True, timeout=60,
                               stdin=subprocess.DEVNULL)
            out = json.loads(normal(p.stdout)) if "--output=json" in line else normal(p.stdout)
            got.append((p.returncode, out, normal(p.stderr)))
        assert got[1] == got[0], line


# ---- stale, foreign, hostile

def test_bitmaps_that_another_program_ignored_are_dropped(run, io, peer, tmp_path, listed):
    path = tmp_path / "a.qcow2"
    run("create", "-f", "qcow2", path, "4M")
    run("bitmap", "--add", path, "b")
    q = Qcow2(path)
    q.set64(AUTOCLEAR, 0)
    assert listed(path) == {}
    p = io(path, "write 0 64k")
    assert "bitmaps are dropped" in p.stderr
    assert "bitmap" not in peer("qemu-img", "info", path).stderr
    assert peer("qemu-img", "check", path, status=None).returncode == 3  # their clusters
    run("bitmap", "--add", path, "b")
    assert listed(path)["b"]["dirty-bytes"] == 0


@pytest.fixture
def foreign(run, io, tmp_path):
    """Gives bitmap 'b' of an image 16 bytes of extra data; with flag 2 anybody may use it."""
    def call(flag, auto=2):
        path = tmp_path / "f.qcow2"
        run("create", "-f", "qcow2", path, "4M")
        run("bitmap", "--add", path, "b")
        io(path, "write 1M 64k")
        q = Qcow2(path)
        at, size = directory(q)
        assert size == 32
        q.set32(at + 12, auto | flag)
        q.set32(at + 20, 16)
        with open(path, "r+b") as f:
            f.seek(at + 24)
            f.write(b"sixteen bytes ..b".ljust(24, b"\0"))
        q.set64(extension(q) + 8, 48)
        return path

    return call


def extra(path):
    q = Qcow2(path)
    at, _ = directory(q)
    return path.read_bytes()[at + 24:at + 40]


def test_extra_data_that_allows_it_is_kept_and_the_bitmap_used(foreign, run, io, listed):
    path = foreign(4)
    assert listed(path)["b"]["dirty-bytes"] == 64 * KIB
    io(path, "write 2M 64k")
    run("bitmap", "--add", path, "other")
    assert extra(path) == b"sixteen bytes .."
    assert flags(Qcow2(path)) == 6
    assert listed(path)["b"]["dirty-bytes"] == 128 * KIB
    run("check", path)


def test_unknown_extra_data_keeps_the_bitmap_from_use_and_a_write_is_told(foreign, run, io, listed):
    path = foreign(0)
    b = listed(path)["b"]
    assert not b["usable"] and "extra data" in b["problem"]
    run("bitmap", "--add", path, "other")
    assert flags(Qcow2(path)) == 2 and extra(path) == b"sixteen bytes .."
    assert "extra data" in run("bitmap", "--clear", path, "b", status=1).stderr
    io(path, "write 2M 64k")
    assert flags(Qcow2(path)) == 3 and extra(path) == b"sixteen bytes .."
    assert listed(path)["b"]["inconsistent"]
    run("bitmap", "--remove", path, "b")
    run("check", path)


# (where: directory entry or header extension, offset, width, value)
HOSTILE = [(w, o, n, v) for w, o, n, values in [
    ("entry", 0, 8, [0, 1, 512, 1 << 63, (1 << 64) - 1, 1 << 56, 64 * KIB - 1, 0x10000 * 3]),
    ("entry", 8, 4, [0, 0xffffffff, 0x80000000, 1 << 20]),
    ("entry", 12, 4, [8, 0xffffffff, 0x80000002]),
    ("entry", 16, 1, [0, 2, 255]),
    ("entry", 17, 1, [0, 8, 32, 63, 64, 255]),
    ("entry", 18, 2, [0, 1024, 65535, 2]),
    ("entry", 20, 4, [1, 0x7fffffff, 0xffffffff, 0xfffffff8]),
    ("entry", 24, 1, [0]),
    ("ext", 0, 4, [0, 2, 65535, 65536, 0xffffffff]),
    ("ext", 8, 8, [0, 31, 33, 1 << 26, (1 << 26) + 8, 1 << 63, (1 << 64) - 1]),
    ("ext", 16, 8, [0, 512, 1 << 56, 1 << 63, (1 << 64) - 64 * KIB, 0x10000, 1 << 40]),
    ("table", 0, 8, [1 << 1, 1 << 62, 1 << 63, 513, 0x10001, 0x10000, 0x30000, 1 << 56, 1 << 55]),
] for v in values]


@pytest.mark.parametrize("where,offset,width,value", HOSTILE)
def test_damage_is_named_or_refused_and_the_disk_can_be_read(run, io, tmp_path, where, offset, width,
                                                             value):
    path = tmp_path / "a.qcow2"
    run("create", "-f", "qcow2", path, "4M")
    run("bitmap", "--add", path, "b")
    io(path, "write -P 7 0 64k")
    q = Qcow2(path)
    at, _ = directory(q)
    base = {"entry": at, "ext": extension(q), "table": q.get64(at)}[where]
    with open(path, "r+b") as f:
        f.seek(base + offset)
        f.write((value % (1 << 8 * width)).to_bytes(width, "big"))
    io(path, "read -P 7 0 64k", opts=["-r"])
    run("info", path)
    run("bitmap", "--list", path)
    run("check", path, status=None)
    before = digest(path)
    p = io(path, "write -P 8 64k 64k", status=None)
    assert p.returncode in (0, 1)
    if p.returncode:  # refused: not a byte changed
        assert digest(path) == before
        assert "bitmap" in p.stderr
    else:  # taken: then the bitmap says so, or that it is of no use
        io(path, "read -P 7 0 64k", "read -P 8 64k 64k", opts=["-r"])
        for b in json.loads(run("bitmap", "--list", "--output=json", path).stdout):
            assert not b["usable"] or b["dirty-bytes"] >= 128 * KIB
            run("bitmap", "--remove", path, b["name"])
        io(path, "write 128k 64k")


@pytest.mark.plain_build
def test_many_bitmaps_that_name_one_table_take_no_memory_to_speak_of(run, tmp_path, strata):
    """A directory of 60,000 bitmaps, all of them over the same clusters."""
    path = tmp_path / "a.qcow2"
    run("create", "-f", "qcow2", "-o", "cluster_size=64k", path, "1G")
    run("bitmap", "--add", "-g", "512", path, "b")
    q = Qcow2(path)
    at, _ = directory(q)
    table, entries = q.get64(at), q.get32(at + 8)
    names = [f"n{i}".encode() for i in range(60000)]
    parts = [struct.pack(">QIIBBHI", table, entries, 2, 1, 9, len(n), 0) + n for n in names]
    blob = b"".join(e.ljust((len(e) + 7) // 8 * 8, b"\0") for e in parts)
    end = (path.stat().st_size + 65535) // 65536 * 65536
    with open(path, "r+b") as f:
        f.seek(end)
        f.write(blob.ljust((len(blob) + 65535) // 65536 * 65536, b"\0"))
    ext = extension(q)
    q.set32(ext, len(names))
    q.set64(ext + 8, len(blob))
    q.set64(ext + 16, end)
    p = subprocess.run(["bash", "-c", f"ulimit -v 2000000; timeout 20 {os.path.abspath(strata)} info {path};"
                        f"timeout 20 {os.path.abspath(strata)} io -c 'write 0 64k' {path}"],
                       capture_output=True, text=True)
    assert p.returncode in (0, 1), p.stderr
