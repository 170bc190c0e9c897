# SPDX-License-Identifier: MIT
"""convert onto block devices (loop), and on a file system with reflinks (XFS on a loop device)."""
import os
import random
import subprocess

import pytest

KIB, MIB = 1 << 10, 1 << 20


def tool(*args):
    return subprocess.run(list(map(str, args)), check=True, capture_output=True, text=True,
                          env={**os.environ, "PATH": os.environ["PATH"] + ":/sbin:/usr/sbin"}).stdout


def disk(path, size=12 * MIB, seed=7):
    rng, content = random.Random(seed), bytearray(size)
    for at in range(0, size, MIB):
        content[at:at + 600 * KIB] = rng.randbytes(600 * KIB)
    path.write_bytes(content)
    return path


@pytest.fixture
def loop(tmp_path):
    """Makes loop devices of the wanted size, filled with 0xee."""
    made = []

    def make(size):
        back = tmp_path / f"device{len(made)}"
        back.write_bytes(b"\xee" * size)
        made.append(tool("losetup", "--show", "-f", back).strip())
        return made[-1]
    yield make
    for dev in made:
        subprocess.run(["losetup", "-d", dev], env={**os.environ, "PATH": os.environ["PATH"] + ":/sbin:/usr/sbin"})


def read(dev, size=None):
    with open(dev, "rb") as f:
        return f.read(size)


@pytest.mark.parametrize("cache", [[], ["-t", "none"]])
def test_no_create_onto_a_device_overwrites_all_of_the_disk(run, tmp_path, loop, cache):
    src, dev = disk(tmp_path / "a.raw"), loop(14 * MIB)
    run("convert", "-n", *cache, "-f", "raw", "-O", "raw", src, dev)
    got = read(dev)
    assert got[:12 * MIB] == src.read_bytes()
    assert got[12 * MIB:] == b"\xee" * (2 * MIB)


def test_a_new_raw_or_qcow2_on_a_device(run, peer, tmp_path, loop):
    src, dev = disk(tmp_path / "a.raw"), loop(16 * MIB)
    run("convert", "-f", "raw", "-O", "qcow2", src, dev)
    peer("qemu-img", "check", "-q", "-f", "qcow2", dev)
    peer("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", src, dev)
    run("convert", "-f", "raw", "-O", "raw", src, dev)
    assert read(dev, 12 * MIB) == src.read_bytes()
    assert os.path.exists(dev) and not os.path.isfile(dev)


def test_no_create_with_a_qcow2_on_a_device(run, peer, tmp_path, loop):
    src, dev = disk(tmp_path / "a.raw"), loop(16 * MIB)
    peer("qemu-img", "create", "-q", "-f", "qcow2", dev, "12M")
    run("convert", "-n", "-f", "raw", "-O", "qcow2", src, dev)
    peer("qemu-img", "check", "-q", "-f", "qcow2", dev)
    peer("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", src, dev)


def test_a_device_that_is_too_small_is_refused_untouched(run, tmp_path, loop):
    src, dev = disk(tmp_path / "a.raw"), loop(11 * MIB)
    for extra in (["-n"], []):
        p = run("convert", *extra, "-f", "raw", "-O", "raw", src, dev, status=1)
        assert str(11 * MIB) in p.stderr and p.stderr.count("\n") == 1
        assert read(dev) == b"\xee" * (11 * MIB)


def test_target_is_zero_on_a_device_writes_data_only(run, tmp_path, loop):
    src, dev = disk(tmp_path / "a.raw"), loop(12 * MIB)
    run("convert", "-n", "--target-is-zero", "-f", "raw", "-O", "raw", src, dev)
    got, want = read(dev), src.read_bytes()
    assert got[:600 * KIB] == want[:600 * KIB]
    assert got[700 * KIB:MIB] == b"\xee" * (MIB - 700 * KIB)  # we lied


@pytest.fixture(scope="module")
def xfs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xfs")
    image, where = folder / "image", folder / "mnt"
    with open(image, "wb") as f:
        f.truncate(512 * MIB)
    where.mkdir()
    tool("mkfs.xfs", "-q", "-m", "reflink=1", image)
    tool("mount", "-o", "loop", image, where)
    yield where
    tool("umount", where)


def shared_bytes(path):
    """Bytes in extents that other files have, too."""
    os.sync()
    total = 0
    for line in tool("filefrag", "-v", "-b4096", path).splitlines():
        part = [p.strip() for p in line.split(":")]
        if part[0].isdigit() and "shared" in line:
            total += int(part[3]) * 4096
    return total


@pytest.mark.parametrize("fmt,extra", [("raw", []), ("qcow2", []), ("raw", ["-C"])])
def test_blocks_are_shared_where_the_file_system_can(run, peer, xfs, fmt, extra):
    src, out = xfs / "a.raw", xfs / f"out-{fmt}"
    disk(src, 64 * MIB)
    run("convert", *extra, "-f", "raw", "-O", fmt, src, out)
    assert shared_bytes(out) >= 60 * MIB * 600 // 1024
    peer("qemu-img", "compare", "-q", "-f", "raw", "-F", fmt, src, out)
    with open(out, "r+b") as f:  # and they are apart again when one changes
        f.seek(-MIB, os.SEEK_END)
        f.write(b"changed")
    assert src.read_bytes() == disk(xfs / "again", 64 * MIB).read_bytes()


def test_qcow2_data_clusters_become_a_raw_disk_by_sharing(run, peer, xfs):
    src, mid, out = disk(xfs / "b.raw", 64 * MIB), xfs / "b.qcow2", xfs / "b.out"
    peer("qemu-img", "convert", "-f", "raw", "-O", "qcow2", src, mid)
    run("convert", "-f", "qcow2", "-O", "raw", mid, out)
    assert shared_bytes(out) >= 30 * MIB
    assert out.read_bytes() == src.read_bytes()
