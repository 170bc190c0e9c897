# SPDX-License-Identifier: MIT
"""Parallels images: what only they have."""
import struct

import pytest

MIB = 1 << 20
IN_USE = 0x746f6e59


@pytest.fixture
def image(run, tmp_path):
    path = tmp_path / "a.hds"
    run("create", "-q", "-f", "parallels", path, "10M")
    run("io", "-f", "parallels", "-c", "write -q -P 5 3M 2M", path)
    return path


def patch(path, at, value, width="<I"):
    data = bytearray(path.read_bytes())
    struct.pack_into(width, data, at, value)
    path.write_bytes(data)


def in_use(path):
    return struct.unpack_from("<I", path.read_bytes(), 44)[0]


@pytest.fixture
def old(tmp_path):
    """An image of the old magic: entries in sectors, the data where the table ends."""
    path = tmp_path / "old.hds"
    head = struct.pack("<16sIIIIIIIIIIQ", b"WithoutFreeSpace", 2, 16, 10, 128, 4, 512, 0, 0, 0, 0, 0)
    head += struct.pack("<4I", 0, 1 + 128, 1, 0)
    path.write_bytes(head.ljust(512, b"\0") + b"\x22" * 65536 + b"\x11" * 65536)
    return path


def test_the_old_magic_counts_in_sectors(run, peer, old):
    script = ["read -q -P 0 0 64k", "read -q -P 17 64k 64k", "read -q -P 34 128k 64k"]
    run("io", "-c", script[0], "-c", script[1], "-c", script[2], "-c", "write -q -P 51 0 1k", "-c",
        "write -q -P 52 192k 64k", old)
    run("check", old)
    peer("qemu-io", "-f", "parallels", "-c", "read -q -P 51 0 1k", "-c", script[1], "-c", script[2],
         "-c", "read -q -P 52 192k 64k", old)


def test_clusters_that_are_no_power_of_two_are_read_and_not_written(run, old, tmp_path):
    path = tmp_path / "odd.hds"
    head = struct.pack("<16sIIIIIIIIIIQ", b"WithoutFreeSpace", 2, 16, 10, 63, 2, 126, 0, 0, 0, 0, 0)
    path.write_bytes((head + struct.pack("<2I", 64, 1)).ljust(512, b"\0") + b"\x22" * 32256 + b"\x11" * 32256)
    run("io", "-r", "-c", "read -q -P 17 0 32256", "-c", "read -q -P 34 32256 32256", path)
    assert "only be read" in run("io", "-c", "write 0 512", path, status=1).stderr


@pytest.mark.parametrize("at,value,width,words", [
    (16, 3, "<I", "version 3"),
    (28, 0, "<I", "clusters of 0 sectors"),
    (28, 0xffffffff, "<I", "4294967295 sectors"),
    (32, 0xffffffff, "<I", "4294967295 table entries"),
    (32, 3, "<I", "more than 3 clusters"),
    (36, 1 << 62, "<Q", "sectors is more"),
    (48, 1, "<I", "not at a cluster"),
])
def test_a_field_out_of_its_range_is_named(run, image, at, value, width, words):
    patch(image, at, value, width)
    assert words in run("info", "-f", "parallels", image, status=1).stderr


def test_the_image_is_marked_while_it_is_written_and_not_after(run, strata, image):
    assert in_use(image) == 0
    import subprocess
    p = subprocess.Popen([strata, "io", "-f", "parallels", image], stdin=subprocess.PIPE, text=True,
                         stdout=subprocess.PIPE)
    p.stdin.write("write -P 1 0 64k\nflush\n")
    p.stdin.flush()
    p.stdout.readline()
    while "64 KiB" not in p.stdout.readline():
        pass
    assert in_use(image) == IN_USE
    p.kill()
    p.wait()
    p.stdout.close()
    p.stdin.close()
    assert '"dirty-flag": true' in run("info", "--output=json", image).stdout
    # A sound image that carries the mark is taken over.
    run("io", "-f", "parallels", "-c", "read -q -P 5 3M 2M", "-c", "write -q -P 2 8M 1M", image)
    assert in_use(image) == 0


def test_a_table_entry_outside_the_file_or_named_twice_is_found(run, peer, image):
    entry = struct.unpack_from("<10I", image.read_bytes(), 64)[3]
    for value in (1000, entry):
        patch(image, 64, value)
        p = run("check", image, status=2)
        assert ("names a cluster at" if value == 1000 else "another entry names") in p.stderr
        assert "check -r all" in p.stdout


def test_a_tail_that_no_cluster_uses_is_a_leak(run, peer, image):
    with open(image, "ab") as f:
        f.truncate(image.stat().st_size + 3 * MIB)
    assert "3 leaked" in run("check", image, status=3).stdout
    peer("qemu-img", "check", "-f", "parallels", image, status=3)


def test_an_image_grows_as_far_as_its_table_has_room(run, peer, tmp_path):
    path = tmp_path / "a.hds"
    run("create", "-q", "-f", "parallels", "-o", "cluster_size=4k", path, "2M")
    run("io", "-c", "write -q -P 5 1M 1M", path)
    run("resize", "-q", path, "3M")
    run("io", "-c", "write -q -P 6 2560k 4k", path)
    peer("qemu-io", "-f", "parallels", "-c", "read -q -P 5 1M 1M", "-c", "read -q -P 0 2M 512k", "-c",
         "read -q -P 6 2560k 4k", path)
    assert "has room for" in run("resize", path, "1G", status=1).stderr
    assert "cannot shrink" in run("resize", "--shrink", path, "1M", status=1).stderr


def test_the_first_write_drops_bitmaps_that_it_makes_untrue(run, image):
    patch(image, 56, 2048, "<Q")
    run("io", "-r", "-c", "read -q 0 1k", image)
    assert struct.unpack_from("<Q", image.read_bytes(), 56)[0] == 2048
    run("io", "-c", "write -q 9M 1k", image)
    assert struct.unpack_from("<Q", image.read_bytes(), 56)[0] == 0


def add_extension(path, flags):
    """A format extension behind the last cluster, with one feature that nobody knows."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, 56, len(data) // 512)
    cluster = struct.pack("<Q16sQQIIQ", 0xab234cef23dcea87, b"", 0x1122334455667788, flags, 8, 0, 7)
    path.write_bytes(data + cluster.ljust(MIB, b"\0"))


def test_an_unknown_feature_that_must_be_known_keeps_writers_out(run, image):
    add_extension(image, 1)
    before = image.read_bytes()
    run("io", "-r", "-c", "read -q -P 5 3M 2M", image)
    assert "0x1122334455667788" in run("io", "-c", "write 0 1k", image, status=1).stderr
    assert image.read_bytes() == before
    patch(image, 64, 1000)
    assert "0x1122334455667788" in run("check", "-r", "all", image, status=63).stderr


def test_a_repair_forgets_the_extension_before_copies_can_hit_it(run, image):
    add_extension(image, 0)
    run("check", image)
    assert struct.unpack_from("<Q", image.read_bytes(), 56)[0]
    patch(image, 64, struct.unpack_from("<10I", image.read_bytes(), 64)[3])
    run("check", "-r", "all", image)
    assert struct.unpack_from("<Q", image.read_bytes(), 56)[0] == 0
    run("io", "-r", "-c", "read -q -P 5 3M 2M", "-c", "read -q -P 5 0 1M", image)
