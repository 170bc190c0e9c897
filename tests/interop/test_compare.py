# SPDX-License-Identifier: MIT
"""strata compare beside qemu-img compare: the same status and, for what both print, the same text."""
import os
import random
import signal
import subprocess

import pytest

MIB = 1 << 20


@pytest.fixture
def raw(tmp_path):
    """A raw disk of 8 MiB with data, written zeros and holes."""
    rnd = random.Random(5)
    path = tmp_path / "a.raw"
    with open(path, "wb") as f:
        f.truncate(8 * MIB)
        for at in 0, MIB + 4096, 5 * MIB:
            f.seek(at)
            f.write(rnd.randbytes(300000))
        f.seek(3 * MIB)
        f.write(bytes(MIB))
    return path


def both(run, peer, status, *args):
    """Runs both; returns strata's output.  They must agree on the exit status."""
    p = run("compare", *args, status=status)
    q = peer("qemu-img", "compare", *args, status=status)
    return p.stdout, q.stdout


def poke(path, offset, data=b"\xff"):
    with open(path, "r+b") as f:
        f.seek(offset)
        f.write(data)


def test_same_content_in_other_formats(run, peer, raw, tmp_path):
    for i, how in enumerate(
            [["qcow2"], ["qcow2", "-c"], ["qcow2", "-o", "cluster_size=512"],
             ["raw", "-S", "0"]]):
        b = tmp_path / f"b{i}"
        peer("qemu-img", "convert", "-f", "raw", "-O", *how, raw, b)
        s, q = both(run, peer, 0, "-f", "raw", "-F", how[0], raw, b)
        assert s == q == "Images are identical.\n"


def test_the_first_differing_byte_is_named(run, peer, raw, tmp_path):
    b = tmp_path / "b"
    b.write_bytes(raw.read_bytes())
    for at in 7 * MIB + 3, 5 * MIB + 513, 512:
        poke(b, at, bytes([raw.read_bytes()[at] ^ 1]))
        s, q = both(run, peer, 1, "-f", "raw", "-F", "raw", raw, b)
        assert s == f"Content mismatch at offset {at}!\n"
        assert q == f"Content mismatch at offset {at // 512 * 512}!\n"


def test_longer_with_zeros_is_the_same_and_warned_of(run, peer, raw, tmp_path):
    b = tmp_path / "b"
    b.write_bytes(raw.read_bytes())
    os.truncate(b, 9 * MIB)
    for pair in (raw, b), (b, raw):
        s, q = both(run, peer, 0, "-f", "raw", "-F", "raw", *pair)
        assert s == q == "Warning: Image size mismatch!\nImages are identical.\n"
        s, q = both(run, peer, 1, "-s", "-f", "raw", "-F", "raw", *pair)
        assert s == q == "Strict mode: Image size mismatch!\n"


def test_longer_with_data_differs(run, peer, raw, tmp_path):
    b = tmp_path / "b"
    b.write_bytes(raw.read_bytes())
    os.truncate(b, 9 * MIB)
    poke(b, 8 * MIB + 1024)
    s, q = both(run, peer, 1, "-f", "raw", "-F", "raw", raw, b)
    assert s == q == ("Warning: Image size mismatch!\n"
                      f"Content mismatch at offset {8 * MIB + 1024}!\n")


def test_strict_sees_allocation(run, peer, raw, tmp_path):
    b = tmp_path / "b"
    peer("qemu-img", "convert", "-f", "raw", "-O", "raw", "-S", "0", raw, b)
    both(run, peer, 0, "-f", "raw", "-F", "raw", raw, b)
    s, q = both(run, peer, 1, "-s", "-f", "raw", "-F", "raw", raw, b)
    # qemu-img also takes "reaches the end of the file" for allocation, so its offset may be lower.
    assert s == f"Strict mode: Offset {303104} block status mismatch!\n"
    assert q.startswith("Strict mode: Offset ")


def test_strict_on_identical_files(run, peer, raw, tmp_path):
    b = tmp_path / "b"
    subprocess.run(["cp", "--sparse=always", raw, b], check=True)
    subprocess.run(["cp", "--sparse=always", b, tmp_path / "c"], check=True)
    both(run, peer, 0, "-s", "-f", "raw", "-F", "raw", b, tmp_path / "c")


def test_overlay_against_its_flat_copy(run, peer, raw, tmp_path):
    top = tmp_path / "top"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", top)
    peer("qemu-io", "-c", "write -P 5 2M 100k", "-c", "write -z 5M 1M", top)
    peer("qemu-img", "convert", "-O", "qcow2", top, tmp_path / "flat")
    assert both(run, peer, 0, top, tmp_path / "flat")[0] == "Images are identical.\n"
    both(run, peer, 1, "-F", "raw", top, raw)


def test_quiet_says_nothing(run, raw, tmp_path):
    b = tmp_path / "b"
    b.write_bytes(bytes(8 * MIB))
    p = run("compare", "-q", "-f", "raw", "-F", "raw", raw, b, status=1)
    assert p.stdout == p.stderr == ""


def test_open_errors_are_2(run, peer, raw, tmp_path):
    p = run("compare", raw, tmp_path / "none", status=2)
    assert "none" in p.stderr
    peer("qemu-img", "compare", "-f", "raw", raw, tmp_path / "none", status=2)
    run("compare", "-f", "qcow2", raw, raw, status=2)
    run("compare", raw, status=2)


def test_damaged_map_is_3_and_unreadable_data_4(run, peer, raw, tmp_path):
    b = tmp_path / "b"
    peer("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, b)
    data = bytearray(b.read_bytes())
    l1 = int.from_bytes(data[40:48], "big")
    good = bytes(data[l1:l1 + 8])
    poke(b, l1, (0x8000000000000000 | 0x123456789a00).to_bytes(8, "big"))
    p = run("compare", "-f", "raw", "-F", "qcow2", raw, b, status=3)
    assert "map" in p.stderr
    poke(b, l1, good)
    peer("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, b)
    data = bytearray(b.read_bytes())
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1:l1 + 8], "big") & 0x00fffffffffffe00
    entry = next(int.from_bytes(data[l2 + i:l2 + i + 8], "big") for i in range(0, 1024, 8)
                 if data[l2 + i] & 0x40)
    host = entry & ((1 << (62 - 8)) - 1)
    poke(b, host, b"\xff" * 64)
    p = run("compare", "-f", "raw", "-F", "qcow2", raw, b, status=4)
    assert "reading" in p.stderr


def test_progress_on_request(run, raw):
    p = run("compare", "--progress=json", "-f", "raw", "-F", "raw", raw, raw)
    assert '"percent": 100' in p.stderr
    assert p.stdout == "Images are identical.\n"
