# SPDX-License-Identifier: MIT
"""qcow of version 1: what only it has."""
import random
import struct

import pytest

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path):
    path, rng = tmp_path / "disk.raw", random.Random(4)
    parts = [rng.randbytes(70000), bytes(300000), b"words and words " * 40000, rng.randbytes(512)]
    path.write_bytes(b"".join(parts).ljust(3 * MIB + 512, b"\0"))
    return path


def test_compressed_images_are_read_both_ways(run, peer, tmp_path, disk):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    run("convert", "-q", "-c", "-O", "qcow", disk, ours)
    peer("qemu-img", "compare", "-f", "raw", "-F", "qcow", disk, ours)
    assert ours.stat().st_size < 300000
    # Debian's qemu-img convert -c ends with status 1 for this format; its qemu-io can.
    run("create", "-q", "-f", "qcow", theirs, "1M")
    peer("qemu-io", "-f", "qcow", "-c", "write -q -c -P 7 64k 4k", "-c", "write -q -c -P 8 68k 4k",
         theirs)
    run("io", "-r", "-c", "read -q -P 7 64k 4k", "-c", "read -q -P 8 68k 4k", "-c",
        "read -q -P 0 72k 900k", theirs)
    assert '"compressed": true' in run("map", "--output=json", theirs).stdout


def test_a_write_into_a_compressed_cluster_keeps_the_rest(run, peer, tmp_path, disk):
    path, raw = tmp_path / "a", tmp_path / "expected.raw"
    run("convert", "-q", "-c", "-O", "qcow", disk, path)
    content = bytearray(disk.read_bytes())
    content[500100:500200] = b"\x09" * 100
    content[600064:608256] = bytes(8192)
    raw.write_bytes(content)
    run("io", "-c", "write -q -P 9 500100 100", "-c", "write -q -z 600064 8192", path)
    run("compare", "-f", "raw", "-F", "qcow", raw, path)
    peer("qemu-img", "compare", "-f", "raw", "-F", "qcow", raw, path)


def test_a_new_image_is_laid_out_as_qemu_img_lays_it_out(run, peer, tmp_path):
    for more in ([], ["-b", "base.raw", "-F", "raw"]):
        (tmp_path / "base.raw").write_bytes(bytes(MIB))
        run("create", "-q", "-f", "qcow", *more, tmp_path / "ours", "100M")
        peer("qemu-img", "create", "-q", "-f", "qcow", *more, tmp_path / "theirs", "100M")
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("at,value,width,words", [
    (24, 1, ">Q", "disk size 1"),
    (24, 1 << 63, ">Q", "disk size 9223372036854775808"),
    (24, 1 << 62, ">Q", "above the limit"),
    (32, 8, "B", "cluster_bits 8"),
    (32, 17, "B", "cluster_bits 17"),
    (33, 5, "B", "l2_bits 5"),
    (33, 14, "B", "l2_bits 14"),
    (36, 1, ">I", "encryption (method 1)"),
    (40, 0, ">Q", "L1 table at 0"),
    (40, 1 << 63, ">Q", "L1 table at 9223372036854775808"),
    (8, 1 << 40, ">Q", "backing file name"),
])
def test_a_field_out_of_its_range_is_named(run, tmp_path, at, value, width, words):
    path = tmp_path / "a"
    run("create", "-q", "-f", "qcow", path, "10M")
    data = bytearray(path.read_bytes())
    struct.pack_into(width, data, at, value)
    path.write_bytes(data)
    assert words in run("info", "-f", "qcow", path, status=1).stderr


def test_an_encrypted_image_is_refused_by_name(run, peer, tmp_path):
    path = tmp_path / "a"
    peer("qemu-img", "create", "-q", "-f", "qcow", "--object", "secret,id=s,data=x", "-o",
         "encrypt.format=aes,encrypt.key-secret=s", path, "1M")
    assert "encryption" in run("info", path, status=1).stderr
