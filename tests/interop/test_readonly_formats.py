# SPDX-License-Identifier: MIT
"""Formats that are only read: bochs and cloop, made by their own tools."""
import random
import struct
import zlib

import pytest

MIB = 1 << 20
BOCHS_SIZE = 10321920  # 20 cylinders, 16 heads, 63 sectors


@pytest.fixture
def content():
    rng = random.Random(11)
    data = bytearray(BOCHS_SIZE)
    for _ in range(40):
        at, n = rng.randrange(0, BOCHS_SIZE // 512 - 300) * 512, rng.choice([512, 4096, 100 * 1024])
        data[at:at + n] = rng.randbytes(n)
    return bytes(data)


@pytest.fixture
def bochs(peer, tmp_path, content):
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.bochs"
    raw.write_bytes(content)
    peer("bximage", "-func=convert", "-imgmode=growing", "-q", raw, path)
    return path


@pytest.fixture
def cloop(peer, tmp_path, content):
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.cloop"
    raw.write_bytes(content)
    peer("create_compressed_fs", "-B", "65536", raw, path)
    return path


def reads_as(run, path, fmt, content, tmp_path):
    raw, out = tmp_path / "expected.raw", tmp_path / "out.raw"
    raw.write_bytes(content)
    run("compare", "-f", "raw", "-F", fmt, raw, path)
    run("convert", "-q", "-f", fmt, "-O", "raw", path, out)
    got = out.read_bytes()
    assert got[:len(content)] == content and not any(got[len(content):])


def test_a_bochs_image_is_read(run, peer, bochs, content, tmp_path):
    assert "file format: bochs" in run("info", bochs).stdout
    reads_as(run, bochs, "bochs", content, tmp_path)
    peer("qemu-img", "compare", "-f", "raw", "-F", "bochs", tmp_path / "out.raw", bochs)


def test_a_bochs_image_of_version_1_is_read(run, bochs, content, tmp_path):
    data = bytearray(bochs.read_bytes())
    struct.pack_into("<I", data, 64, 0x10000)
    struct.pack_into("<Q", data, 84, BOCHS_SIZE)
    bochs.write_bytes(data)
    reads_as(run, bochs, "bochs", content, tmp_path)


def test_a_cloop_image_is_read(run, peer, cloop, content, tmp_path):
    assert "file format: cloop" in run("info", cloop).stdout
    reads_as(run, cloop, "cloop", content, tmp_path)
    peer("qemu-img", "compare", "-f", "raw", "-F", "cloop", tmp_path / "out.raw", cloop)


def test_a_cloop_image_of_large_blocks_is_read(run, tmp_path):
    content = random.Random(2).randbytes(3 * MIB) + bytes(3 * MIB)
    blocks = [zlib.compress(content[i:i + 3 * MIB]) for i in range(0, len(content), 3 * MIB)]
    path, at, offsets = tmp_path / "a.cloop", 136 + 8 * 3, []
    for b in blocks:
        offsets.append(at)
        at += len(b)
    path.write_bytes(bytes(128) + struct.pack(">II3Q", 3 * MIB, 2, *offsets, at) + b"".join(blocks))
    reads_as(run, path, "cloop", content, tmp_path)


@pytest.mark.parametrize("fmt", ["bochs", "cloop"])
def test_writing_is_refused(run, request, fmt):
    path = request.getfixturevalue(fmt)
    before = path.read_bytes()
    assert "can only be read" in run("io", "-f", fmt, "-c", "write 0 512", path, status=1).stderr
    assert path.read_bytes() == before


@pytest.mark.parametrize("at,value,width,words", [
    (64, 0x30000, "<I", "version 0x00030000"),
    (68, 4, "<I", "header size 4"),
    (72, 1, "<I", "catalog of 1 entries"),
    (72, 0xffffffff, "<I", "catalog of 4294967295 entries"),
    (76, 0, "<I", "bitmaps of 0 bytes"),
    (80, 3000, "<I", "extent size 3000"),
    (80, 0, "<I", "extent size 0"),
    (88, 1 << 63, "<Q", "disk size 9223372036854775808"),
    (48, b"Undoable", "8s", "'Undoable'"),
])
def test_a_bochs_field_out_of_its_range_is_named(run, bochs, at, value, width, words):
    data = bytearray(bochs.read_bytes())
    struct.pack_into(width, data, at, value)
    bochs.write_bytes(data)
    assert words in run("info", "-f", "bochs", bochs, status=1).stderr


@pytest.mark.parametrize("at,value,width,words", [
    (128, 0, ">I", "block size 0"),
    (128, 1000, ">I", "block size 1000"),
    (128, 1 << 30, ">I", "block size 1073741824"),
    (132, 0xffffffff, ">I", "4294967295 blocks"),
    (132, 1 << 20, ">I", "behind the end of the file"),
])
def test_a_cloop_field_out_of_its_range_is_named(run, cloop, at, value, width, words):
    data = bytearray(cloop.read_bytes())
    struct.pack_into(width, data, at, value)
    cloop.write_bytes(data)
    assert words in run("info", "-f", "cloop", cloop, status=1).stderr


@pytest.mark.parametrize("fmt", ["bochs", "cloop"])
def test_damaged_images_are_answered(run, request, tmp_path, fmt, seed):
    sound, rng = request.getfixturevalue(fmt).read_bytes(), random.Random(seed)
    path = tmp_path / "damaged"
    for i in range(16):
        damaged = bytearray(sound[:rng.randrange(len(sound))] if i % 4 == 0 else sound)
        for _ in range(rng.choice([1, 4, 30])):
            if damaged:
                damaged[rng.randrange(min(len(damaged), rng.choice([200, 6000, 1 << 30])))] = rng.randrange(256)
        path.write_bytes(damaged)
        for verb, *args in [["info"], ["map"], ["convert", "-O", "raw"]]:
            more = [tmp_path / "out.raw"] if verb == "convert" else []
            p = run(verb, "-f", fmt, *args, path, *more, status=None, timeout=20)
            assert p.returncode in (0, 1), p.stderr
