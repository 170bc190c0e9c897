# SPDX-License-Identifier: MIT
"""strata convert beside qemu-img: what one writes the other reads, byte for byte.

qemu-img compare and check judge what strata wrote; strata reads what qemu-img wrote.  The small
file systems for full disks are tmpfs mounts of this test's own, so it needs root, as in CI.
"""
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

MIB = 1 << 20
SIZES = [0, 512, 65536, MIB + 513, 3 * MIB + 4096, 40 * MIB + 1536]


def make_raw(path, size, seed=1, dense=False):
    """A sparse raw disk: text-like and random data, written zeros and holes, odd edges."""
    rnd = random.Random(seed)
    with open(path, "wb") as f:
        f.truncate(size)
        pos = 0
        while pos < size:
            n = min(size - pos, rnd.choice([1, 511, 4096, 5000, 65536, 200000, MIB, 2 * MIB]))
            kind = 1 if dense else rnd.randrange(4)
            f.seek(pos)
            if kind == 0:
                f.write(rnd.randbytes(n))
            elif kind == 1:
                f.write((rnd.randbytes(48) + b"the quick brown fox ") * (n // 68) + b"x" * (n % 68))
            elif kind == 2:
                f.write(bytes(n))
            pos += n
    return path


def raw_bytes(path):
    with open(path, "rb") as f:
        return f.read()


def read_back(peer, path, fmt, tmp):
    """What qemu-img reads from an image."""
    out = tmp / "read-back"
    peer("qemu-img", "convert", "-f", fmt, "-O", "raw", path, out)
    return raw_bytes(out)


def check(peer, path):
    peer("qemu-img", "check", path)


@pytest.fixture
def small(tmp_path):
    """A file system of 16 MiB."""
    where = tmp_path / "small"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", where], check=True)
    yield where
    subprocess.run(["umount", where], check=True)


# ------------------------------------------------------------ content, both ways

@pytest.mark.parametrize("seed", range(12))
def test_random_disks_through_chains_of_formats(run, peer, tmp_path, seed):
    rnd = random.Random(seed)
    a = make_raw(tmp_path / "a", rnd.randrange(1, 12 * MIB), seed=1000 + seed)
    last, fmt = a, "raw"
    for step in range(3):
        nxt = tmp_path / f"s{step}"
        to = rnd.choice(["raw", "qcow2"])
        args = ["-S", rnd.choice(["0", "512", "4k", "64k", "1M"]), "-m", str(rnd.randint(1, 16))]
        if to == "qcow2":
            args += ["-o", f"cluster_size={1 << rnd.randint(9, 21)}"]
            args += rnd.choice([[], ["-c"], ["-c", "-o", "compression_type=zstd"], ["-W"]])
        args += rnd.choice([[], ["-t", "writeback"], ["-T", "none"]])
        run("convert", "-f", fmt, "-O", to, *args, last, nxt)
        if to == "qcow2":
            check(peer, nxt)
        last, fmt = nxt, to
    want = raw_bytes(a)
    got = read_back(peer, last, fmt, tmp_path)
    assert got[:len(want)] == want and not any(got[len(want):]), f"seed {seed}"


@pytest.mark.parametrize("size", SIZES)
def test_raw_to_raw_keeps_every_byte_and_the_exact_size(run, tmp_path, size):
    a = make_raw(tmp_path / "a", size)
    run("convert", "-f", "raw", "-O", "raw", a, tmp_path / "b")
    assert raw_bytes(a) == raw_bytes(tmp_path / "b")


@pytest.mark.parametrize("how", [[], ["-W"], ["-c"], ["-c", "-o", "compression_type=zstd"],
                                 ["-m", "1"], ["-S", "0"], ["-t", "writeback"], ["-t", "none"],
                                 ["-t", "unsafe"], ["-t", "writethrough"]])
@pytest.mark.parametrize("size", SIZES)
def test_raw_to_qcow2_as_qemu_reads_it(run, peer, tmp_path, size, how):
    a = make_raw(tmp_path / "a", size)
    run("convert", "-f", "raw", "-O", "qcow2", *how, a, tmp_path / "b")
    check(peer, tmp_path / "b")
    peer("qemu-img", "compare", "-f", "raw", "-F", "qcow2", a, tmp_path / "b")
    info = json.loads(peer("qemu-img", "info", "--output=json", tmp_path / "b").stdout)
    assert info["virtual-size"] == (size + 511) // 512 * 512


@pytest.mark.parametrize("size", [s for s in SIZES if s % 512 == 0])
@pytest.mark.parametrize("how", [[], ["-c"], ["-c", "-o", "compression_type=zstd"],
                                 ["-o", "cluster_size=512"], ["-o", "cluster_size=4k,compat=0.10"],
                                 ["-o", "cluster_size=2M"], ["-c", "-o", "cluster_size=2M"],
                                 ["-c", "-o", "cluster_size=4k"],
                                 ["-o", "preallocation=metadata"]])
def test_qcow2_of_qemu_to_raw(run, peer, tmp_path, size, how):
    a = make_raw(tmp_path / "a", size)
    peer("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *how, a, tmp_path / "q")
    run("convert", "-f", "qcow2", "-O", "raw", tmp_path / "q", tmp_path / "b")
    assert raw_bytes(a) == raw_bytes(tmp_path / "b")


@pytest.mark.parametrize("cluster", ["512", "4k", "64k", "128k", "2M"])
@pytest.mark.parametrize("how", [[], ["-c"], ["-c", "-W"]])
def test_cluster_sizes(run, peer, tmp_path, cluster, how):
    a = make_raw(tmp_path / "a", 9 * MIB + 512)
    run("convert", "-f", "raw", "-O", "qcow2", *how, "-o", f"cluster_size={cluster}", a,
        tmp_path / "b")
    check(peer, tmp_path / "b")
    assert read_back(peer, tmp_path / "b", "qcow2", tmp_path) == raw_bytes(a)


@pytest.mark.parametrize("opt", ["preallocation=metadata", "preallocation=falloc",
                                 "preallocation=full", "compat=0.10", "refcount_bits=1",
                                 "refcount_bits=64"])
def test_create_options_of_the_target(run, peer, tmp_path, opt):
    a = make_raw(tmp_path / "a", 9 * MIB + 512)
    run("convert", "-f", "raw", "-O", "qcow2", "-o", opt, a, tmp_path / "b")
    check(peer, tmp_path / "b")
    assert read_back(peer, tmp_path / "b", "qcow2", tmp_path) == raw_bytes(a)


def test_several_sources_one_behind_the_other(run, peer, tmp_path):
    parts = [make_raw(tmp_path / f"p{i}", n, seed=i)
             for i, n in enumerate([MIB + 513, 0, 65536, 3 * MIB + 1, 700])]
    whole = b"".join(map(raw_bytes, parts))
    run("convert", "-f", "raw", "-O", "raw", *parts, tmp_path / "r")
    assert raw_bytes(tmp_path / "r") == whole
    for how in [], ["-c"]:
        run("convert", "-f", "raw", "-O", "qcow2", *how, *parts, tmp_path / "q")
        check(peer, tmp_path / "q")
        got = read_back(peer, tmp_path / "q", "qcow2", tmp_path)
        assert got[:len(whole)] == whole and not any(got[len(whole):])


def test_compressed_qcow2_is_small_and_copies_on(run, peer, tmp_path):
    a = make_raw(tmp_path / "a", 20 * MIB, dense=True)
    run("convert", "-f", "raw", "-O", "qcow2", "-c", a, tmp_path / "b")
    peer("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", a, tmp_path / "q")
    assert os.path.getsize(tmp_path / "b") <= 1.12 * os.path.getsize(tmp_path / "q") + 65536
    run("convert", "-O", "qcow2", tmp_path / "b", tmp_path / "c")
    check(peer, tmp_path / "c")
    assert read_back(peer, tmp_path / "c", "qcow2", tmp_path) == raw_bytes(a)


def test_all_zero_source_allocates_nothing(run, peer, tmp_path):
    with open(tmp_path / "a", "wb") as f:
        f.write(bytes(32 * MIB))
    run("convert", "-f", "raw", "-O", "qcow2", tmp_path / "a", tmp_path / "b")
    check(peer, tmp_path / "b")
    assert os.path.getsize(tmp_path / "b") < MIB
    run("convert", "-f", "raw", "-O", "raw", tmp_path / "a", tmp_path / "r")
    assert os.path.getsize(tmp_path / "r") == 32 * MIB
    assert os.stat(tmp_path / "r").st_blocks == 0


def test_zero_runs_below_the_sparse_size_are_kept(run, tmp_path):
    with open(tmp_path / "a", "wb") as f:
        for i in range(256):
            f.write(b"x" * 16384 + bytes(49152))
    def blocks(size):
        run("convert", "-f", "raw", "-O", "raw", "-S", size, tmp_path / "a", tmp_path / "b")
        assert raw_bytes(tmp_path / "a") == raw_bytes(tmp_path / "b")
        return os.stat(tmp_path / "b").st_blocks * 512
    extents = 65536  # the file system's own, for many small runs
    assert 4 * MIB <= blocks("4k") <= 4 * MIB + extents
    assert blocks("64k") >= 16 * MIB
    assert blocks("0") >= 16 * MIB


def test_sparse_size_zero_allocates_holes_too(run, peer, tmp_path):
    with open(tmp_path / "a", "wb") as f:
        f.truncate(8 * MIB)
    run("convert", "-f", "raw", "-O", "raw", "-S", "0", tmp_path / "a", tmp_path / "b")
    assert os.stat(tmp_path / "b").st_blocks * 512 == 8 * MIB
    run("convert", "-f", "raw", "-O", "qcow2", "-S", "0", tmp_path / "a", tmp_path / "q")
    assert os.path.getsize(tmp_path / "q") > 8 * MIB


# ------------------------------------------------------------ existing targets

@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_no_create_overwrites_what_was_there(run, peer, tmp_path, fmt):
    a = make_raw(tmp_path / "a", 6 * MIB)
    old = make_raw(tmp_path / "old", 6 * MIB, seed=9, dense=True)
    peer("qemu-img", "convert", "-f", "raw", "-O", fmt, old, tmp_path / "b")
    inode = os.stat(tmp_path / "b").st_ino
    run("convert", "-n", "-f", "raw", "-O", fmt, a, tmp_path / "b")
    assert os.stat(tmp_path / "b").st_ino == inode
    assert read_back(peer, tmp_path / "b", fmt, tmp_path) == raw_bytes(a)


def test_no_create_into_a_smaller_target_is_refused_untouched(run, tmp_path):
    a = make_raw(tmp_path / "a", 2 * MIB)
    b = make_raw(tmp_path / "b", MIB, seed=3, dense=True)
    before = raw_bytes(b)
    p = run("convert", "-n", "-f", "raw", "-O", "raw", a, b, status=1)
    assert str(MIB) in p.stderr and str(2 * MIB) in p.stderr
    assert raw_bytes(b) == before


def test_no_create_keeps_what_lies_behind_the_source(run, tmp_path):
    a = make_raw(tmp_path / "a", MIB)
    b = make_raw(tmp_path / "b", 2 * MIB, seed=3, dense=True)
    before = raw_bytes(b)
    run("convert", "-n", "-f", "raw", "-O", "raw", a, b)
    assert raw_bytes(b) == raw_bytes(a) + before[MIB:]


def test_no_create_needs_a_target(run, tmp_path):
    a = make_raw(tmp_path / "a", MIB)
    run("convert", "-n", "-f", "raw", "-O", "raw", a, tmp_path / "none", status=1)
    assert not (tmp_path / "none").exists()


def test_target_image_opts(run, tmp_path):
    a = make_raw(tmp_path / "a", MIB, dense=True)
    b = make_raw(tmp_path / "b", 4 * MIB, seed=3, dense=True)
    before = raw_bytes(b)
    run("convert", "-n", "-f", "raw", "--target-image-opts", a,
        f"driver=raw,offset=1M,size=1M,file.driver=file,file.filename={b}")
    assert raw_bytes(b) == before[:MIB] + raw_bytes(a) + before[2 * MIB:]


def test_image_opts_of_the_source(run, tmp_path):
    a = make_raw(tmp_path / "a", 4 * MIB, dense=True)
    run("convert", "--image-opts", "-O", "raw",
        f"driver=raw,offset=1M,size=1M,file.driver=file,file.filename={a}", tmp_path / "b")
    assert raw_bytes(tmp_path / "b") == raw_bytes(a)[MIB:2 * MIB]


# ------------------------------------------------------------ backing files

def overlay(peer, tmp, base_size=8 * MIB, size=None):
    base = tmp / "base.qcow2"
    raw = make_raw(tmp / "base.raw", base_size, seed=4, dense=True)
    peer("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, base)
    top = tmp / "top.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", top,
         *([size] if size else []))
    peer("qemu-io", "-c", "write -P 7 1M 200k", "-c", "write -z 3M 1M", "-c", "discard 5M 64k",
         "-c", "write -P 9 6000k 1k", top)
    return base, top


def test_overlay_flattens(run, peer, tmp_path):
    base, top = overlay(peer, tmp_path)
    run("convert", "-O", "raw", top, tmp_path / "b")
    assert raw_bytes(tmp_path / "b") == read_back(peer, top, "qcow2", tmp_path)


def test_backing_of_the_target_keeps_only_the_difference(run, peer, tmp_path):
    base, top = overlay(peer, tmp_path)
    run("convert", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", top, tmp_path / "copy.qcow2")
    check(peer, tmp_path / "copy.qcow2")
    peer("qemu-img", "compare", top, tmp_path / "copy.qcow2")
    assert os.path.getsize(tmp_path / "copy.qcow2") < 2 * MIB
    info = json.loads(peer("qemu-img", "info", "--output=json", tmp_path / "copy.qcow2").stdout)
    assert info["backing-filename"] == "base.qcow2"


def test_backing_of_the_target_behind_a_shorter_base(run, peer, tmp_path):
    base, top = overlay(peer, tmp_path, base_size=8 * MIB, size="12M")
    peer("qemu-io", "-c", "write -P 3 9M 64k", top)
    run("convert", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", top, tmp_path / "copy.qcow2")
    check(peer, tmp_path / "copy.qcow2")
    peer("qemu-img", "compare", top, tmp_path / "copy.qcow2")


def test_a_missing_backing_file_of_the_target_is_an_error(run, peer, tmp_path):
    base, top = overlay(peer, tmp_path)
    p = run("convert", "-O", "qcow2", "-B", "nope.qcow2", "-F", "qcow2", top, tmp_path / "c",
            status=1)
    assert "nope.qcow2" in p.stderr and not (tmp_path / "c").exists()


# ------------------------------------------------------------ nothing half done

def folder(path):
    return sorted(os.listdir(path))


def test_the_source_is_never_the_target(run, peer, tmp_path):
    a = make_raw(tmp_path / "a", MIB, dense=True)
    before = raw_bytes(a)
    os.link(a, tmp_path / "hard")
    os.symlink(a, tmp_path / "soft")
    for name in "a", "hard", "soft":
        for n in [], ["-n"]:
            p = run("convert", "-f", "raw", "-O", "raw", *n, a, tmp_path / name, status=1)
            assert "overwritten" in p.stderr
    base, top = overlay(peer, tmp_path)
    p = run("convert", "-O", "raw", top, base, status=1)
    assert "backing file" in p.stderr
    assert raw_bytes(a) == before


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("cache", [[], ["-t", "writeback"], ["-t", "unsafe"]])
def test_full_disk_leaves_no_file(run, tmp_path, small, fmt, cache):
    a = make_raw(tmp_path / "a", 64 * MIB, dense=True)
    p = run("convert", "-f", "raw", "-O", fmt, *cache, a, small / "out", status=1)
    assert os.strerror(errno.ENOSPC) in p.stderr and p.stderr.count("\n") == 1
    assert folder(small) == []
    assert os.statvfs(small).f_bfree * os.statvfs(small).f_bsize > 15 * MIB


def test_full_disk_leaves_the_old_file(run, tmp_path, small):
    a = make_raw(tmp_path / "a", 64 * MIB, dense=True)
    (small / "out").write_bytes(b"precious")
    run("convert", "-f", "raw", "-O", "qcow2", a, small / "out", status=1)
    assert folder(small) == ["out"] and (small / "out").read_bytes() == b"precious"


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_no_file(strata, tmp_path, sig):
    a = make_raw(tmp_path / "a", 32 * MIB, dense=True)
    (tmp_path / "out").mkdir()
    p = subprocess.Popen([strata, "convert", "-f", "raw", "-O", "qcow2", "-r", "8M", a,
                          tmp_path / "out" / "b"], stderr=subprocess.PIPE, text=True)
    time.sleep(0.7)
    assert p.poll() is None
    p.send_signal(sig)
    _, err = p.communicate(timeout=10)
    assert p.returncode == (-sig if sig == signal.SIGKILL else 1)
    if sig != signal.SIGKILL:
        assert "cancelled" in err
    assert folder(tmp_path / "out") == []


def test_the_name_appears_only_when_the_image_is_whole(strata, tmp_path):
    a = make_raw(tmp_path / "a", 16 * MIB, dense=True)
    p = subprocess.Popen([strata, "convert", "-f", "raw", "-O", "raw", "-r", "16M", a,
                          tmp_path / "b"])
    seen_early = False
    while p.poll() is None:
        if (tmp_path / "b").exists():
            seen_early |= raw_bytes(tmp_path / "b") != raw_bytes(a)
        time.sleep(0.02)
    assert p.returncode == 0 and not seen_early
    assert raw_bytes(tmp_path / "b") == raw_bytes(a)


def test_mode_follows_the_umask_and_an_old_file_keeps_its_own(strata, tmp_path):
    a = make_raw(tmp_path / "a", 65536)
    old = os.umask(0o077)
    try:
        subprocess.run([strata, "convert", "-f", "raw", a, tmp_path / "b"], check=True)
    finally:
        os.umask(old)
    assert os.stat(tmp_path / "b").st_mode & 0o777 == 0o600


def test_a_target_in_use_is_refused(strata, run, tmp_path):
    a = make_raw(tmp_path / "a", MIB)
    b = make_raw(tmp_path / "b", 4 * MIB, dense=True)
    q = subprocess.Popen(["qemu-io", "-f", "raw", b], stdin=subprocess.PIPE,
                         stdout=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        before = raw_bytes(b)
        p = run("convert", "-f", "raw", "-O", "raw", a, b, status=1)
        assert "lock" in p.stderr or "use" in p.stderr
        assert raw_bytes(b) == before
    finally:
        q.stdin.close()
        q.wait()


# ------------------------------------------------------------ misuse, odds and ends

@pytest.mark.parametrize("args, text", [
    (["a"], "target"),
    (["-O", "nonsense", "a", "b"], "nonsense"),
    (["-F", "qcow2", "a", "b"], "-B"),
    (["--target-image-opts", "a", "b"], "-n"),
    (["--target-is-zero", "a", "b"], "-n"),
    (["-t", "nonsense", "a", "b"], "nonsense"),
    (["-S", "1X", "a", "b"], "1X"),
    (["-m", "17", "a", "b"], "16"),
    (["-O", "raw", "-c", "a", "b"], "compress"),
    (["-O", "raw", "-o", "colour=red", "a", "b"], "colour"),
    (["-n", "-o", "size=1M", "a", "b"], "-n"),
])
def test_misuse_is_one_clear_line(run, tmp_path, args, text):
    make_raw(tmp_path / "a", MIB)
    p = run("convert", *args, status=1, cwd=tmp_path)
    assert text in p.stderr
    assert not (tmp_path / "b").exists()


def test_option_help(run):
    p = run("convert", "-O", "qcow2", "-o", "help")
    assert "cluster_size" in p.stdout and "compression_type" in p.stdout


def test_progress_as_json_lines(run, tmp_path):
    a = make_raw(tmp_path / "a", 8 * MIB, dense=True)
    p = run("convert", "--progress=json", "-r", "32M", "-f", "raw", a, tmp_path / "b")
    lines = [json.loads(l)["progress"] for l in p.stderr.splitlines()]
    assert lines[-1]["percent"] == 100
    done = [l["done"] for l in lines]
    assert done == sorted(done)


def test_rate_limit(run, tmp_path):
    a = make_raw(tmp_path / "a", 8 * MIB, dense=True)
    t = time.monotonic()
    run("convert", "-r", "16M", "-f", "raw", a, tmp_path / "b")
    assert time.monotonic() - t > 0.4


def damage_compressed(path, cluster):
    """Breaks the code of one compressed cluster of a qcow2 image with one L2 table."""
    data = path.read_bytes()
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1:l1 + 8], "big") & 0x00fffffffffffe00
    entry = int.from_bytes(data[l2 + cluster * 8:l2 + cluster * 8 + 8], "big")
    assert entry >> 62 == 1
    host = entry & ((1 << (62 - 8)) - 1)
    with open(path, "r+b") as f:
        f.seek(host)
        f.write(b"\xff" * 64)


def test_unreadable_data_ends_the_copy_or_is_salvaged(run, peer, tmp_path):
    a = make_raw(tmp_path / "a", 8 * MIB, dense=True)
    peer("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", a, tmp_path / "q")
    damage_compressed(tmp_path / "q", 37)
    p = run("convert", "-O", "raw", tmp_path / "q", tmp_path / "b", status=1)
    assert "reading" in p.stderr and "Input/output error" in p.stderr
    assert not (tmp_path / "b").exists()
    p = run("convert", "--salvage", "-O", "raw", tmp_path / "q", tmp_path / "b")
    assert f"65536 bytes at offset {37 * 65536}" in p.stderr and p.stderr.count("\n") == 1
    want = bytearray(raw_bytes(a))
    want[37 * 65536:38 * 65536] = bytes(65536)
    assert raw_bytes(tmp_path / "b") == want
    p = run("convert", "-q", "--salvage", "-O", "raw", tmp_path / "q", tmp_path / "b")
    assert p.stderr == ""


def test_a_source_that_others_write_needs_force_share(run, tmp_path):
    a = make_raw(tmp_path / "a", MIB, dense=True)
    q = subprocess.Popen(["qemu-io", "-f", "raw", a], stdin=subprocess.PIPE,
                         stdout=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        # A raw disk is shared by those who write it; a qcow2 image never is.
        run("convert", "-U", "-f", "raw", a, tmp_path / "b")
        assert raw_bytes(tmp_path / "b") == raw_bytes(a)
    finally:
        q.stdin.close()
        q.wait()


def test_target_is_zero_skips_zeros(run, tmp_path):
    a = make_raw(tmp_path / "a", 4 * MIB)
    with open(tmp_path / "b", "wb") as f:
        f.truncate(4 * MIB)
    run("convert", "-n", "--target-is-zero", "-f", "raw", a, tmp_path / "b")
    assert raw_bytes(tmp_path / "b") == raw_bytes(a)


@pytest.mark.parametrize("fmt, extra", [("qcow2", []), ("raw", []), ("qcow2", ["-c"])])
def test_memory_stays_small_whatever_the_size(strata, tmp_path, fmt, extra):
    """Peak resident memory of a conversion of a 1 TiB disk with 512 MiB of data."""
    a = tmp_path / "a"
    with open(a, "wb") as f:
        f.truncate(1 << 40)
        block = os.urandom(MIB)
        for i in range(512):
            f.seek((i % 64) * (16 << 30) + i * MIB)
            f.write(block)
    # The peak that the kernel reports includes the parent's at the fork: so from a small parent.
    small = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
             "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    p = subprocess.run([sys.executable, "-S", "-c", small, strata, "convert", "-f", "raw", "-O", fmt,
                        *extra, a, tmp_path / "b"], check=True, capture_output=True, text=True)
    assert int(p.stdout) < 64 * 1024, f"{p.stdout} KiB"
    os.unlink(tmp_path / "b")


@pytest.mark.plain_build  # AddressSanitizer reserves terabytes of address space
def test_works_under_a_small_address_space(strata, tmp_path):
    a = make_raw(tmp_path / "a", 32 * MIB)
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    subprocess.run([strata, "convert", "-f", "raw", "-O", "qcow2", "-c", a, tmp_path / "b"],
                   check=True, preexec_fn=limit)


@pytest.mark.parametrize("backend", [pytest.param("uring", marks=pytest.mark.uring), "threads"])
def test_both_back_ends(run, peer, tmp_path, backend):
    a = make_raw(tmp_path / "a", 20 * MIB + 512)
    env = dict(os.environ, STRATA_AIO=backend)
    run("convert", "-f", "raw", "-O", "qcow2", a, tmp_path / "b", env=env)
    check(peer, tmp_path / "b")
    run("convert", "-O", "raw", tmp_path / "b", tmp_path / "c", env=env)
    assert raw_bytes(a) == raw_bytes(tmp_path / "c")
