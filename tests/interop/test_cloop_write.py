# SPDX-License-Identifier: MIT
"""Writing cloop images, as create_compressed_fs makes them."""
import json
import random
import struct
import zlib

import pytest

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def raw(tmp_path):
    """Holes, text, and what no coder makes smaller, to an odd end."""
    rng, path = random.Random(4), tmp_path / "disk.raw"
    with open(path, "wb") as f:
        for at, data in [(0, b"boot" * 100), (300 * KIB, rng.randbytes(200 * KIB)),
                         (2 * MIB, b"some text, " * 30000), (5 * MIB, rng.randbytes(3 * KIB))]:
            f.seek(at)
            f.write(data)
        f.truncate(6 * MIB + 512)
    return path


@pytest.mark.parametrize("block", [4 * KIB, 64 * KIB, 1 * MIB])
def test_a_written_image_is_read_by_others(run, peer, raw, tmp_path, block):
    path, want = tmp_path / "a.cloop", raw.read_bytes()
    run("convert", "-q", "-O", "cloop", "-o", f"block_size={block}", raw, path)
    run("compare", "-q", "-F", "cloop", raw, path)
    want += bytes(-len(want) % block)
    if block == 64 * KIB:  # slow with many blocks, and divides by zero with few
        peer("extract_compressed_fs", path, tmp_path / "x.raw")
        assert (tmp_path / "x.raw").read_bytes() == want
    peer("qemu-img", "convert", "-f", "cloop", "-O", "raw", path, tmp_path / "q.raw")
    assert (tmp_path / "q.raw").read_bytes() == want


def test_the_layout_is_that_of_create_compressed_fs(run, peer, raw, tmp_path):
    ours, theirs = tmp_path / "a.cloop", tmp_path / "b.cloop"
    run("convert", "-q", "-O", "cloop", raw, ours)
    peer("create_compressed_fs", "-B", "65536", raw, theirs)
    a, b = ours.read_bytes(), theirs.read_bytes()
    assert a[:144] == b[:144]  # text, block size, count, place of the first stream
    count = struct.unpack_from(">I", a, 132)[0]
    at = struct.unpack_from(f">{count + 1}Q", a, 136)
    assert at[-1] == len(a)
    for x, y in zip(at, at[1:]):
        d = zlib.decompressobj()
        assert len(d.decompress(a[x:y])) == 65536 and d.eof and not d.unused_data


def test_an_image_of_holes_is_whole(run, peer, tmp_path):
    path = tmp_path / "a.cloop"
    run("create", "-q", "-f", "cloop", path, "3M")
    peer("extract_compressed_fs", path, tmp_path / "x.raw")
    assert (tmp_path / "x.raw").read_bytes() == bytes(3 * MIB)
    assert json.loads(run("info", "--output=json", path).stdout)["virtual-size"] == 3 * MIB


def test_an_empty_disk_is_an_image(run, tmp_path):
    path = tmp_path / "a.cloop"
    run("create", "-q", "-f", "cloop", path, "0")
    assert json.loads(run("info", "--output=json", path).stdout)["virtual-size"] == 0


def test_a_whole_image_is_not_written_again(run, raw, tmp_path):
    path = tmp_path / "a.cloop"
    run("convert", "-q", "-O", "cloop", raw, path)
    before = path.read_bytes()
    for command in (["convert", "-n", "-O", "cloop", raw, path], ["io", "-c", "write 0 512", path]):
        assert "written once" in run(*command, status=1).stderr
    assert path.read_bytes() == before


def test_an_image_that_was_not_finished_is_refused(run, tmp_path):
    path = tmp_path / "a.cloop"
    path.write_bytes(bytes(128) + struct.pack(">II", 65536, 2) + bytes(24))
    assert "never written to its end" in run("info", "-f", "cloop", path, status=1).stderr


@pytest.mark.parametrize("options,size,word", [("block_size=1000", "1M", "block_size"),
                                               ("block_size=2M", "1M", "block_size"),
                                               ("block_size=512", "1T", "above the limit")])
def test_what_cannot_be_made_is_refused(run, tmp_path, options, size, word):
    p = run("create", "-f", "cloop", "-o", options, tmp_path / "a", size, status=1)
    assert word in p.stderr and not (tmp_path / "a").exists()
