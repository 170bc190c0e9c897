# SPDX-License-Identifier: MIT
"""The flaws of 2014 in readers of small formats, each rebuilt from its public description.

What was an overflow, a division by zero or gigabytes of memory is a message here: the field, what it holds and
what is possible; never a signal, and in little memory.
"""
import struct

import pytest

MIB = 1 << 20


@pytest.fixture
def refused(run, tmp_path):
    def check(fmt, data, *words):
        path = tmp_path / "evil"
        path.write_bytes(data)
        for verb in (["info"], ["check"], ["io", "-r", "-c", "read 0 64k"], ["convert", "-O", "raw"]):
            more = [tmp_path / "out"] if verb[0] == "convert" else []
            p = run(*verb[:1], "-f", fmt, *verb[1:], path, *more, status=1, timeout=20)
            assert all(w in p.stderr for w in words), (verb, p.stderr)
        assert not (tmp_path / "out").exists()
    return check


@pytest.fixture
def unread(run, tmp_path):
    """Opens, and a read that meets the damage says so."""
    def check(fmt, data, offset):
        path = tmp_path / "evil"
        path.write_bytes(data)
        run("info", "-f", fmt, path)
        p = run("io", "-r", "-f", fmt, "-c", f"read {offset} 512", path, status=1, timeout=20)
        assert "Input/output error" in p.stdout + p.stderr
    return check


# ---------------------------------------------------------------- cloop

def cloop(block=65536, blocks=2, offsets=(160, 161, 162), tail=64):
    return bytes(128) + struct.pack(">II%dQ" % len(offsets), block, blocks, *offsets) + bytes(tail)


@pytest.mark.parametrize("block", [0, 511, 1 << 31, 0xfffffe00, 128 * MIB])
def test_cve_2014_0144_cloop_block_size_is_checked(refused, block):
    refused("cloop", cloop(block=block), "block size %d" % block)


@pytest.mark.parametrize("blocks", [0xffffffff, 0x20000000, 0x1fffffff])
def test_cve_2014_0143_cloop_size_of_the_offset_table_does_not_wrap(refused, blocks):
    refused("cloop", cloop(blocks=blocks), "%d blocks" % blocks)


def test_cve_2014_0144_cloop_a_huge_offset_table_is_not_allocated(refused):
    refused("cloop", cloop(blocks=60 * MIB), "behind the end of the file")


@pytest.mark.parametrize("offsets", [(200, 160, 200), (160, 1 << 62, 1 << 63), (160, 160 + (1 << 28) + 1, 1 << 30),
                                     ((1 << 64) - 1, 0, 1)])
def test_cve_2014_0144_cloop_offsets_that_go_back_or_beyond_are_damage(unread, offsets):
    unread("cloop", cloop(offsets=offsets), 0)


# ---------------------------------------------------------------- bochs

def bochs(catalog=64, bitmap=1, extent=4096, size=65536, entry=0xffffffff, version=0x20000):
    head = bytearray(512)
    head[0:22], head[32:39], head[48:55] = b"Bochs Virtual HD Image", b"Redolog", b"Growing"
    struct.pack_into("<IIIIIIQ", head, 64, version, 512, catalog, bitmap, extent, 0, size & (1 << 64) - 1)
    return bytes(head) + struct.pack("<I", entry) * 64 + bytes(8192)


@pytest.mark.parametrize("size", [-1, 0x7fffffffffffffff, 1 << 63])
def test_cve_2014_0147_bochs_a_negative_disk_size_is_refused(refused, size):
    refused("bochs", bochs(size=size), "disk size %d" % (size & (1 << 64) - 1))


@pytest.mark.parametrize("catalog", [0xffffffff, 0x7fffffff, 0x40000000, 0x20000000])
def test_cve_2014_0143_bochs_catalog_size_does_not_wrap(refused, catalog):
    refused("bochs", bochs(catalog=catalog), str(catalog))


def test_cve_2014_0143_bochs_a_catalog_smaller_than_the_disk_is_refused(refused):
    refused("bochs", bochs(catalog=3), "catalog of 3 entries")


@pytest.mark.parametrize("extent", [0, 256, 0x80000000, 0x7fffffff, 3 * 4096])
def test_cve_2014_0142_bochs_extent_size_is_no_divisor_of_zero(refused, extent):
    refused("bochs", bochs(extent=extent), "extent size %d" % extent)


def test_cve_2014_0147_bochs_an_offset_beyond_32_bits_is_not_cut_to_them(unread):
    unread("bochs", bochs(entry=0x7fffffff), 0)


# ---------------------------------------------------------------- parallels

def parallels(tracks=63, entries=4, sectors=128, magic=b"WithoutFreeSpace"):
    return struct.pack("<16sIIIIIIIIIIQ", magic, 2, 16, 4, tracks, entries, sectors, 0, 0, 0, 0, 0).ljust(4096, b"\0")


@pytest.mark.parametrize("tracks", [0, 0x80000000, 0xffffffff, 0x7fffffff])
def test_cve_2014_0142_parallels_a_cluster_of_no_sectors_is_no_divisor(refused, tracks):
    refused("parallels", parallels(tracks=tracks), "clusters of %d sectors" % tracks)


@pytest.mark.parametrize("entries", [0xffffffff, 0x7fffffff, 0x40000000, 0x20000000])
def test_cve_2014_0143_parallels_table_size_does_not_wrap(refused, entries):
    refused("parallels", parallels(entries=entries), str(entries))


def test_cve_2014_0143_parallels_a_table_behind_the_file_is_not_allocated(refused):
    refused("parallels", parallels(entries=0x1fffffff, sectors=128), "behind the end of the file")


# ---------------------------------------------------------------- vdi

def vdi(blocks=4, size=4 * MIB, block_size=MIB, allocated=0):
    head = bytearray(1024)
    struct.pack_into("<IIII", head, 64, 0xbeda107f, 0x10001, 0x180, 1)
    struct.pack_into("<II", head, 340, 512, 1024)
    struct.pack_into("<I", head, 360, 512)
    struct.pack_into("<QIIII", head, 368, size & (1 << 64) - 1, block_size, 0, blocks, allocated)
    head[512:] = b"\xff" * 512
    return bytes(head)


@pytest.mark.parametrize("blocks", [0xffffffff, 0x7fffffff, 0x3fffffff, 0x1fffff81])
def test_cve_2014_0144_vdi_blocks_in_image_are_bounded(refused, blocks):
    refused("vdi", vdi(blocks=blocks), "%d blocks" % blocks)


def test_cve_2014_0144_vdi_the_map_of_the_largest_disk_is_not_allocated_for_a_small_file(refused):
    refused("vdi", vdi(blocks=0x1fffff80, size=0x1fffff80 * MIB), "block map")


@pytest.mark.parametrize("size", [-1, 1 << 63, 0x7fffffffffffffff, 5 * MIB])
def test_cve_2014_0144_vdi_disk_size_is_what_the_blocks_hold(refused, size):
    refused("vdi", vdi(size=size), "disk size %d" % (size & (1 << 64) - 1))


# ---------------------------------------------------------------- qcow

def qcow(size=MIB, cluster_bits=12, l2_bits=9, backing=0, name=0, l1=48):
    return struct.pack(">4sIQIIQBBHIQ", b"QFI\xfb", 1, backing, name, 0, size & (1 << 64) - 1, cluster_bits, l2_bits, 0, 0,
                       l1).ljust(4096, b"\0")


@pytest.mark.parametrize("bits", [0, 1, 8, 17, 32, 63, 64, 255])
def test_cve_2014_0222_qcow_cluster_size_is_bounded(refused, bits):
    refused("qcow", qcow(cluster_bits=bits), "cluster_bits %d" % bits)


@pytest.mark.parametrize("bits", [0, 5, 14, 31, 64, 255])
def test_cve_2014_0222_qcow_l2_table_size_is_bounded(refused, bits):
    refused("qcow", qcow(l2_bits=bits), "l2_bits %d" % bits)


@pytest.mark.parametrize("size", [0, 1, -1, 1 << 63])
def test_cve_2014_0223_qcow_disk_size_is_in_its_range(refused, size):
    refused("qcow", qcow(size=size), "disk size %d" % (size & (1 << 64) - 1))


@pytest.mark.parametrize("size", [0x7fffffffffffffff, 1 << 62, 1 << 50])
def test_cve_2014_0223_qcow_an_l1_table_that_wraps_is_refused(refused, size):
    refused("qcow", qcow(size=size), "L1 table of")


@pytest.mark.parametrize("name", [1024, 0x7fffffff, 0xffffffff])
def test_cve_2014_0222_qcow_the_name_below_is_bounded(refused, name):
    refused("qcow", qcow(backing=48, name=name), "backing file name of %d bytes" % name)
