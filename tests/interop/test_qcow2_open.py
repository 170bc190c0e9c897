# SPDX-License-Identifier: MIT
"""Images with features and with damage: what opens, what is refused and how, what stays intact."""
import hashlib

import pytest

from qcow2_image import COMPRESSED, COPIED, Qcow2

KIB, MIB = 1 << 10, 1 << 20
DIRTY, CORRUPT = 1, 2
INCOMPATIBLE, AUTOCLEAR = 72, 88


@pytest.fixture
def image(peer, tmp_path):
    """1 MiB of sevens by qemu-img, clusters of 64 KiB."""
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    peer("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", path)
    return path


@pytest.fixture
def io(run):
    def call(path, *commands, status=0, opts=()):
        args = [x for c in commands for x in ("-c", c)]
        return run("io", "-f", "qcow2", *opts, *args, path, status=status)

    return call


def digest(path):
    return hashlib.sha256(path.read_bytes()).digest()


def refused(io, path, text, opts=()):
    """One line that says why, and not a byte changed."""
    before = digest(path)
    p = io(path, "write 0 64k", status=1, opts=opts)
    assert text in p.stderr, p.stderr
    assert digest(path) == before


# ---- features

def test_a_dirty_image_is_read_as_it_is(image, io):
    q = Qcow2(image)
    q.set64(INCOMPATIBLE, DIRTY)
    before = digest(image)
    io(image, "read -P 7 0 1M", opts=["-r"])
    assert digest(image) == before


def test_a_corrupt_image_is_read_but_not_written(image, io):
    q = Qcow2(image)
    q.set64(INCOMPATIBLE, CORRUPT)
    io(image, "read -P 7 0 1M", opts=["-r"])
    refused(io, image, "marked corrupt")


def test_a_running_qemus_lazy_refcounts_leave_an_image_for_reading(peer, io, tmp_path):
    """Killed while its counts are late: the dirty bit is set."""
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "4M")
    peer("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 1M", "-c", "flush", "-c", "abort", path,
         status=None)
    io(path, "read -P 9 0 1M", opts=["-r"])
    io(path, "write -P 1 0 1M", "read -P 1 0 1M")


def test_encryption_is_refused_by_name(create_luks, io, tmp_path):
    path = tmp_path / "a.qcow2"
    create_luks(path)
    refused(io, path, "LUKS")
    assert "LUKS" in io(path, "read 0 512", status=1, opts=["-r"]).stderr


def test_an_unknown_incompatible_feature_is_refused_by_the_images_own_name(image, io):
    q = Qcow2(image)
    header = bytearray(q.read(0, 64 * KIB))
    at = header.index(b"dirty bit") - 2
    header[at + 1] = 40
    q.write(0, header)
    q.set64(INCOMPATIBLE, 1 << 40)
    refused(io, image, "incompatible features are not supported: dirty bit (bit 40)")


def test_bitmaps_stay_declared_and_other_autoclear_bits_go(image, peer, io):
    peer("qemu-img", "bitmap", "--add", image, "b0")
    q = Qcow2(image)
    q.set64(AUTOCLEAR, 1 | 1 << 21)
    io(image, "read 0 512", opts=["-r"])
    assert q.get64(AUTOCLEAR) == 1 | 1 << 21
    io(image, "write -P 8 0 64k")
    assert q.get64(AUTOCLEAR) == 1
    peer("qemu-img", "check", image)


def test_unknown_autoclear_bits_are_cleared_and_compatible_ones_kept(image, io):
    q = Qcow2(image)
    q.set64(80, 1 << 33)
    q.set64(AUTOCLEAR, 1 << 21)
    io(image, "write 0 512")
    assert q.get64(AUTOCLEAR) == 0
    assert q.get64(80) == 1 << 33


# ---- tables that cannot be

@pytest.mark.parametrize("field,value,text", [
    (40, 3 * 65536 + 512, "L1 table: offset 197120 is not a multiple of 65536"),
    (40, 0, "L1 table: offset 0 overlaps the header"),
    (40, 1 << 62, "is not below"),
    (40, 1 << 40, "L1 table: offset 1099511627776 is behind the end of the file"),
    (40, 65536, "overlaps the L1 table"),
    (48, 65536 + 8, "refcount table: offset 65544 is not a multiple of 65536"),
    (48, 1 << 40, "refcount table: offset 1099511627776 is behind the end of the file"),
    (24, 1 << 40, "L1 table is too small: 1 entries where size 1099511627776 needs 2048"),
])
def test_header_fields_out_of_range(image, io, field, value, text):
    Qcow2(image).set64(field, value)
    refused(io, image, text)


def test_an_l2_table_on_top_of_the_refcount_table_is_not_written(image, io):
    q = Qcow2(image)
    q.set64(q.l1_at(0), q.reftable_offset | COPIED)
    refused(io, image, "L2 table at 65536 shares its cluster with another table")


def test_an_l2_table_named_twice_is_not_written(peer, io, tmp_path):
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "8M")
    peer("qemu-io", "-f", "qcow2", "-c", "write 0 4k", "-c", "write 4M 4k", path)
    q = Qcow2(path)
    q.set64(q.l1_at(1), q.l1(0))
    refused(io, path, "shares its cluster with another table")


# ---- entries that cannot be: an error, and nothing of the tables is lost

def damaged(io, image, *commands):
    """All commands fail with an I/O error, and the header and tables are as before."""
    q = Qcow2(image)
    tables = q.read(0, 4 * q.cluster)
    p = io(image, *commands, status=1)
    said = (p.stdout + p.stderr).count("Input/output error")
    assert said == len(commands), p.stdout + p.stderr
    now = q.read(0, 4 * q.cluster)
    assert now[:79] + tables[79:80] + now[80:] == tables, "nothing but the corrupt mark may change"


def test_an_unaligned_l1_entry_is_an_io_error(image, io):
    q = Qcow2(image)
    q.set64(q.l1_at(0), q.l1(0) | 512)
    damaged(io, image, "read 0 512", "write 0 512", "write -z 0 64k")


def test_an_unaligned_l2_entry_is_an_io_error(image, io):
    q = Qcow2(image)
    q.set64(q.l2_at(0), q.get64(q.l2_at(0)) | 512)
    damaged(io, image, "read 0 512", "write 0 512", "write -z 0 64k")
    io(image, "read -P 7 64k 64k")


@pytest.mark.parametrize("cluster", [0, 1, 2, 3])
def test_guest_data_on_top_of_metadata_is_not_overwritten(image, io, cluster):
    """Header, refcount table, refcount block, L1 table."""
    q = Qcow2(image)
    q.set64(q.l2_at(3), cluster * q.cluster | COPIED)
    if cluster == 0:  # offset 0 with COPIED is no place at all
        damaged(io, image, "read 192k 512", "write 192k 512")
    else:
        io(image, "read 192k 512", opts=["-r"])
        damaged(io, image, "write 192k 512")


def test_a_refcount_that_lies_does_not_cost_a_table(image, io):
    """The L1 table counts as free: it is not handed out."""
    q = Qcow2(image)
    block = q.get64(q.reftable_offset)
    q.write(block + 2 * 3, b"\0\0")
    damaged(io, image, "write 2M 64k")


def test_a_coded_entry_that_points_outside_is_an_io_error(image, io):
    q = Qcow2(image)
    q.set64(q.l2_at(0), COMPRESSED | 0)
    damaged(io, image, "read 0 512")
    q.set64(q.l2_at(0), COMPRESSED | ((1 << 62) - 1))
    damaged(io, image, "read 0 512")


def test_a_zero_flag_in_version_2_is_an_io_error(peer, io, tmp_path):
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", path, "1M")
    peer("qemu-io", "-f", "qcow2", "-c", "write 0 64k", path)
    q = Qcow2(path)
    q.set64(q.l2_at(0), q.get64(q.l2_at(0)) | 1)
    damaged(io, path, "read 0 512", "write 0 512")


@pytest.mark.parametrize("length", [0, 4, 71, 103, 300, 65536, 131072])
def test_a_file_that_was_cut_off_does_not_open_for_writing(image, io, length):
    with open(image, "r+b") as f:
        f.truncate(length)
    refused(io, image, "")
