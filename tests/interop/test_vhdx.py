# SPDX-License-Identifier: MIT
"""VHDX: what only it has."""
import json
import os
import shutil
import signal
import struct
import subprocess
import time
import uuid

import pytest

from vhdx_image import BAT, HEADERS, KIB, METADATA, MIB, REGIONS, SIZE, Image, entry

GUID = uuid.UUID(int=0x1234567890abcdef1234567890abcdef).bytes_le


@pytest.fixture
def image(run, tmp_path):
    path = tmp_path / "a.vhdx"
    run("create", "-q", "-f", "vhdx", "-o", "block_size=1M", path, "10M")
    run("io", "-f", "vhdx", "-c", "write -q -P 5 3M 2M", path)
    return path


def reads(run, path, *want, flags=("-r",)):
    """Each of (byte, offset, length) in KiB."""
    cmds = [x for byte, at, length in want for x in ("-c", f"read -q -P {byte} {at}k {length}k")]
    return run("io", *flags, *cmds, path)


# ---------------------------------------------------------------- what others say of ours

@pytest.mark.parametrize("options", ["", "subformat=fixed", "block_size=256M", "log_size=3M",
                                     "block_state_zero=off"])
def test_peers_read_what_strata_writes(run, peer, tmp_path, options):
    path = tmp_path / "a.vhdx"
    run("create", "-q", "-f", "vhdx", *(["-o", options] if options else []), path, "20M")
    run("io", "-c", "write -q -P 5 3M 2M", path)
    peer("qemu-img", "check", path)
    peer("qemu-io", "-r", "-c", "read -q -P 5 3M 2M", "-c", "read -q -P 0 5M 15M", path)
    assert "20 MiB" in peer("vhdiinfo", path).stdout
    peer("7zz", "x", "-y", f"-o{tmp_path}/out", path)
    out = next((tmp_path / "out").iterdir()).read_bytes()
    assert out == bytes(3 * MIB) + b"\5" * 2 * MIB + bytes(15 * MIB)


def test_regions_and_metadata_are_required_as_the_specification_says(image):
    i = Image(image)
    for at in REGIONS:
        assert [i.get(at + 16 + 32 * k + 28, "I") for k in range(2)] == [1, 1]
    flags = [i.get(i.region(METADATA) + 32 + 32 * k + 24, "I") for k in range(5)]
    assert flags == [4, 6, 6, 6, 6]
    assert len(i.data) % MIB == 0


def test_a_clean_close_leaves_no_log_and_new_guids(run, image):
    before = Image(image)
    run("io", "-c", "write -q -P 6 3M 4k", image)
    after = Image(image)
    b, a = before.header(), after.header()
    assert after.data[a + 48:a + 64] == bytes(16)
    assert after.data[a + 16:a + 32] != before.data[b + 16:b + 32]
    assert after.data[a + 32:a + 48] != before.data[b + 32:b + 48]


def test_reading_leaves_the_guids(run, image):
    before = image.read_bytes()
    run("io", "-c", "read -q -P 5 3M 2M", image)
    run("check", image)
    assert image.read_bytes() == before


@pytest.mark.parametrize("options,words", [
    ("block_size=3M", "power of two"), ("block_size=512k", "power of two"),
    ("block_size=512M", "block_size"), ("log_size=1500k", "multiple of 1 MiB"),
    ("log_size=4G", "log_size"), ("logical_sector_size=1024", "512 or 4096"),
    ("subformat=sparse", "dynamic"),
])
def test_options_out_of_their_range_are_refused(run, tmp_path, options, words):
    p = run("create", "-q", "-f", "vhdx", "-o", options, tmp_path / "a.vhdx", "10M", status=1)
    assert words in p.stderr, p.stderr


def test_the_largest_disk_and_no_larger(run, tmp_path):
    path = tmp_path / "a.vhdx"
    run("create", "-q", "-f", "vhdx", path, "64T")
    run("io", "-c", "write -q -P 5 60000000000k 64k", "-c", "read -q -P 5 60000000000k 64k", path)
    run("check", path)
    assert "64 TiB" in run("create", "-q", "-f", "vhdx", tmp_path / "b.vhdx", "65T", status=1).stderr


def test_memory_stays_bounded_with_a_table_of_half_a_gib(strata, run, tmp_path):
    path = tmp_path / "a.vhdx"
    run("create", "-q", "-f", "vhdx", "-o", "block_size=1M,block_state_zero=off", path, "64T")
    for args in (["check", path], ["io", "-c", "write -q 63T 64k", "-c", "write -q 1T 64k", path]):
        p = subprocess.run(["/usr/bin/time", "-f", "%M", strata, *args], capture_output=True, text=True)
        assert p.returncode == 0, p.stderr
        assert int(p.stderr.split()[-1]) < 64 * KIB or "asan" in str(strata)


# ---------------------------------------------------------------- chunks, sectors

@pytest.mark.parametrize("options,size", [("block_size=1M", "9G"), ("block_size=256M", "9G"),
                                          ("block_size=1M,logical_sector_size=4096", "70G")])
def test_blocks_of_several_chunks_are_found_by_peers(run, peer, tmp_path, options, size):
    """Behind each chunk the table has an entry for a bitmap."""
    path, giga = tmp_path / "a.vhdx", int(size[:-1])
    run("create", "-q", "-f", "vhdx", "-o", options, path, size)
    places = [k * MIB for k in (0, 4095, 4096, 4097, 8191, 8192, giga * 1024 - 1)]
    places += [32768 * MIB - MIB, 32768 * MIB] if giga > 32 else []
    cmds = [x for n, at in enumerate(places) for x in ("-c", f"write -q -P {n + 1} {at} 64k")]
    run("io", *cmds, path)
    run("check", path)
    back = [x.replace("write", "read") for x in cmds]
    run("io", "-r", *back, path)
    if "4096" not in options:  # which qemu-img does not know
        peer("qemu-io", "-r", *back, path)


def test_sectors_of_4096_bytes_round_the_size(run, tmp_path):
    path = tmp_path / "a.vhdx"
    run("create", "-q", "-f", "vhdx", "-o", "logical_sector_size=4096", path, "10000k")
    info = json.loads(run("info", "--output=json", path).stdout)
    assert info["virtual-size"] == 10000 * KIB
    assert info["format-specific"]["data"]["logical-sector-size"] == 4096
    run("create", "-q", "-f", "vhdx", "-o", "logical_sector_size=4096", path, "10001k")
    assert json.loads(run("info", "--output=json", path).stdout)["virtual-size"] == 10004 * KIB


@pytest.mark.parametrize("state", [0, 1, 2, 3, 5])
def test_blocks_without_data_read_as_zeros_whatever_their_state(run, image, state):
    i = Image(image)
    i.put(i.bat(3), "Q", i.get(i.bat(3), "Q") & ~7 | state)
    i.save()
    reads(run, image, (0, 3072, 1024), (5, 4096, 1024))
    run("io", "-c", "write -q -P 7 3100k 4k", "-c", "read -q -P 0 3072k 28k", "-c",
        "read -q -P 7 3100k 4k", "-c", "read -q -P 0 3104k 992k", image)


@pytest.mark.parametrize("entry_value,words", [
    (4, "state 4"), (7 | 4 * MIB, "state 7"), (6, "names a block at 0"),
    (6 | 2 * MIB, "in a header, the log, a region"), (6 | 1 << 62, "behind the end"),
    (6 | 5 * MIB | 8, "reserved bits"), (6 | 5 * MIB, "something else uses too"),
])
def test_damaged_entries_are_found_and_not_followed(run, image, entry_value, words):
    i = Image(image)
    i.put(i.bat(3), "Q", entry_value)
    i.save()
    p = run("check", image, status=2)
    assert words in p.stdout + p.stderr, p.stdout + p.stderr
    run("io", "-r", "-c", "read -q -P 5 4M 1M", image)
    if entry_value & 15 != 8 | 6 and "uses" not in words:
        run("io", "-r", "-c", "read 3M 4k", image, status=1)


# ---------------------------------------------------------------- headers and tables

def test_one_damaged_header_costs_nothing_and_is_repaired(run, image):
    i = Image(image)
    i.data[i.header() + 10] ^= 1
    i.data[REGIONS[0] + 20] ^= 1
    i.save()
    # The older header had a log, which says nothing any more.
    p = run("check", image, status=3)
    assert "header" in p.stdout + p.stderr and "region table 1" in p.stdout + p.stderr
    reads(run, image, (5, 3072, 2048))
    run("check", "-r", "all", image)
    run("check", image)
    reads(run, image, (5, 3072, 2048))


def test_two_damaged_headers_are_refused(run, image):
    i = Image(image)
    for at in HEADERS:
        i.data[at + 10] ^= 1
    i.save()
    assert "checksum" in run("info", "-f", "vhdx", image, status=1).stderr


def test_equal_sequence_numbers_count_for_equal_headers_only(run, image):
    i = Image(image)
    i.data[HEADERS[0]:HEADERS[0] + 4096] = i.data[HEADERS[1]:HEADERS[1] + 4096]
    if i.get(HEADERS[0] + 48, "Q"):
        i.log_on(bytes(16))
    i.save()
    reads(run, image, (5, 3072, 2048))
    i.data[HEADERS[0] + 20] ^= 1
    i.sum(HEADERS[0], 4096)
    i.save()
    assert "two different headers" in run("info", image, status=1).stderr


def region_entry(k, field, fmt, value):
    def change(i):
        i.both_regions(lambda at: i.put(at + 16 + 32 * k + field, fmt, value))
    return change


def header_field(field, fmt, value):
    def change(i):
        i.both_headers(lambda at: i.put(at + field, fmt, value))
    return change


def metadata_field(at, fmt, value):
    return lambda i: i.put(i.region(METADATA) + at, fmt, value)


@pytest.mark.parametrize("change,words", [
    (header_field(66, "H", 2), "version 2"),
    (header_field(68, "I", 5), "a log of 5 bytes"),
    (header_field(72, "Q", 4096), "at 4096"),
    (header_field(72, "Q", 1 << 62), "behind the end"),
    (header_field(68, "I", 4095 * MIB), "behind the end"),
    (header_field(72, "Q", 2 * MIB), "overlap"),
    (region_entry(0, 16, "Q", 3 * MIB), "overlap"),
    (region_entry(0, 16, "Q", 0), "at 0"),
    (region_entry(0, 16, "Q", 1 << 63), "behind the first"),
    (region_entry(0, 16, "Q", 1 << 50), "behind the end"),
    (region_entry(0, 24, "I", 0), "region of 0 bytes"),
    (region_entry(0, 24, "I", 0xfff00000), "behind the end"),
    (region_entry(0, 0, "Q", 1), "which is not known here"),
    (lambda i: i.both_regions(lambda at: i.put(at + 8, "I", 0xffffffff)), "4294967295 regions"),
    (lambda i: i.both_regions(lambda at: i.put(at + 8, "I", 1)), "no metadata region"),
    (metadata_field(0, "Q", 0), "metadata table"),
    (metadata_field(10, "H", 0xffff), "65535 metadata items"),
    (metadata_field(10, "H", 1), "is not there"),
    (metadata_field(32, "Q", 1), "which is not known here"),
    (metadata_field(32 + 16, "I", 0), "file parameters"),
    (metadata_field(32 + 16, "I", 0xffffffff), "file parameters"),
    (metadata_field(32 + 20, "I", 0xffffffff), "file parameters"),
    (metadata_field(32 + 20, "I", 1), "file parameters"),
    (metadata_field(64 * KIB, "I", 0), "block size 0"),
    (metadata_field(64 * KIB, "I", 3 * MIB), "block size 3145728"),
    (metadata_field(64 * KIB, "I", 512 * MIB), "block size"),
    (metadata_field(64 * KIB + 8, "Q", 1 << 63), "disk size"),
    (metadata_field(64 * KIB + 8, "Q", 1 << 46), "needs"),
    (metadata_field(64 * KIB + 8, "Q", 1000), "whole sectors"),
    (metadata_field(64 * KIB + 32, "I", 0), "sectors of 0"),
    (metadata_field(64 * KIB + 32, "I", 513), "sectors of 513"),
    (metadata_field(64 * KIB + 4, "I", 2), "without a parent locator"),
])
def test_a_field_out_of_its_range_is_named(run, image, change, words):
    """Zero and huge block and sector sizes, region and item counts: CVE-2014-0148, CVE-2014-0143."""
    i = Image(image)
    change(i)
    i.save()
    before = image.read_bytes()
    p = run("info", "-f", "vhdx", image, status=1, timeout=20)
    assert words in p.stderr, p.stderr
    run("io", "-f", "vhdx", "-c", "write 0 4k", image, status=1, timeout=20)
    assert image.read_bytes() == before


# ---------------------------------------------------------------- logs

def dirty(path, changes, sequence=7, at=0, tail=None, guid=GUID, flushed=None, last=None):
    """The log of the image counts and holds these changes, one list for each entry."""
    i = Image(path)
    i.log_on(guid)
    first = at if tail is None else tail
    for k, c in enumerate(changes):
        e = entry(guid, sequence + k, c(i) if callable(c) else c, first,
                  len(i.data) if flushed is None else flushed, len(i.data) if last is None else last)
        i.write_log(at, e)
        at = (at + len(e)) % i.log_place()[1]
    i.save()
    return i


def page(i, index, value):
    """The BAT's page with another entry."""
    at = i.bat(index) & ~4095
    p = bytearray(i.data[at:at + 4096])
    struct.pack_into("<Q", p, i.bat(index) - at, value)
    return at, bytes(p)


def swap(i):
    """Block 3 disappears."""
    return [page(i, 3, 0)]


def test_a_log_is_read_through_and_the_file_untouched(run, image):
    dirty(image, [swap])
    before = image.read_bytes()
    reads(run, image, (0, 3072, 1024), (5, 4096, 1024))
    assert "log entries to replay: 1" in run("info", image).stdout
    assert "log is not empty" in "".join([(p := run("check", image, status=3)).stdout, p.stderr])
    assert image.read_bytes() == before


def test_a_log_is_replayed_by_a_writer(run, peer, image):
    dirty(image, [swap])
    run("io", "-c", "write -q -P 9 9M 4k", image)
    assert "log entries to replay: 0" in run("info", image).stdout
    reads(run, image, (0, 3072, 1024), (5, 4096, 1024), (9, 9216, 4))
    peer("qemu-io", "-r", "-c", "read -q -P 0 3M 1M", "-c", "read -q -P 5 4M 1M", image)


def test_check_replays_a_log_and_tells(run, image):
    dirty(image, [swap])
    p = run("check", "-r", "all", image)
    assert "1 entries were replayed" in p.stdout + p.stderr
    reads(run, image, (0, 3072, 1024), (5, 4096, 1024))


@pytest.mark.parametrize("rw", [False, True])
@pytest.mark.parametrize("at", [0, 4096, MIB - 4096, MIB - 8192])
def test_entries_run_around_the_end_of_the_ring_and_later_ones_win(run, image, at, rw):
    dirty(image, [lambda i: [page(i, 3, 0)], lambda i: [page(i, 4, 0)]], at=at)
    # The second was made from the file's page: block 3 is back.
    reads(run, image, (5, 3072, 1024), (0, 4096, 1024), flags=() if rw else ("-r",))


@pytest.mark.parametrize("rw", [False, True])
def test_zeros_in_a_log_are_applied_in_order(run, image, rw):
    dirty(image, [lambda i: [page(i, 4, 0)], lambda i: [(i.bat(0) & ~4095, 4096)],
                  lambda i: [page(i, 3, 0)]])
    reads(run, image, (0, 3072, 1024), (5, 4096, 1024), flags=() if rw else ("-r",))
    dirty(image, [lambda i: [page(i, 4, 0)], lambda i: [(i.bat(0) & ~4095, 8192)]], sequence=50)
    reads(run, image, (0, 3072, 2048), flags=() if rw else ("-r",))


def test_entries_before_the_tail_do_not_count(run, image):
    i = dirty(image, [lambda i: [page(i, 3, 0)]])
    i.write_log(8192, entry(GUID, 8, [page(i, 4, 0)], 8192, len(i.data), len(i.data)))
    i.save()
    reads(run, image, (5, 3072, 1024), (0, 4096, 1024))


def test_the_run_with_the_highest_number_counts(run, image):
    i = dirty(image, [lambda i: [page(i, 3, 0)]], sequence=100)
    i.write_log(40960, entry(GUID, 200, [page(i, 4, 0)], 40960, len(i.data), len(i.data)))
    i.write_log(81920, entry(GUID, 300, [page(i, 5, 0)], 4096, len(i.data), len(i.data)))  # no such tail
    i.save()
    reads(run, image, (5, 3072, 1024), (0, 4096, 1024))


@pytest.mark.parametrize("where", [4, 8, 12, 17, 24, 32, 64, 64 + 16, 4096, 4100, 8188, 5000])
def test_an_entry_that_is_not_whole_does_not_count(run, image, where):
    i = dirty(image, [swap])
    i.data[i.log_place()[0] + where] ^= 0x41
    i.save()
    reads(run, image, (5, 3072, 2048))
    reads(run, image, (5, 3072, 2048), flags=())
    run("check", image)


def test_a_guid_that_is_not_the_headers_does_not_count(run, image):
    dirty(image, [swap])
    i = Image(image)
    i.log_on(uuid.uuid4().bytes_le)
    i.save()
    reads(run, image, (5, 3072, 2048))


@pytest.mark.parametrize("change,words", [
    (lambda i: [(0, bytes(4096))], "in a header or the log"),
    (lambda i: [(64 * KIB, bytes(4096))], "in a header or the log"),
    (lambda i: [(MIB, bytes(4096))], "in a header or the log"),
    (lambda i: [(4 * MIB + 1, bytes(4096))], "unaligned"),
    (lambda i: [(1 << 62, bytes(4096))], "behind the file's end"),
    (lambda i: [(4 * MIB, 1 << 62)], "behind the file's end"),
    (lambda i: [((1 << 64) - 4096, 1 << 63)], "behind the file's end"),
])
def test_changes_of_places_that_no_log_changes_are_refused(run, image, change, words):
    dirty(image, [change])
    before = image.read_bytes()
    assert words in run("info", "-f", "vhdx", image, status=1).stderr
    run("io", "-f", "vhdx", "-c", "write 0 4k", image, status=1)
    assert image.read_bytes() == before


def test_a_file_that_was_cut_after_its_log_was_written_is_refused(run, image):
    dirty(image, [swap], flushed=1 << 40)
    assert "it has been cut" in run("info", "-f", "vhdx", image, status=1).stderr


def test_a_log_that_makes_the_file_longer(run, image):
    i = Image(image)
    end = len(i.data)
    dirty(image, [lambda i: [page(i, 9, 6 | end)]], last=end + MIB)
    reads(run, image, (5, 3072, 2048), (0, 9216, 1024))
    run("io", "-c", "write -q -P 3 9M 4k", image)
    run("check", image)
    assert image.stat().st_size == end + MIB


def test_a_log_that_makes_the_file_endless_is_refused(run, image):
    dirty(image, [swap], last=1 << 60)
    assert "bytes long" in run("info", "-f", "vhdx", image, status=1).stderr


def test_a_log_full_of_long_damaged_entries_ends_soon(run, image):
    i = Image(image)
    i.log_on(GUID)
    start, length = i.log_place()
    bad = bytearray(entry(GUID, 5, [(3 * MIB, 4096)], 0, 0, 0))
    struct.pack_into("<I", bad, 8, length)
    for at in range(start, start + length, 4096):
        i.data[at:at + 4096] = bad
    i.save()
    begin = time.monotonic()
    run("info", "-f", "vhdx", image, status=None)
    assert time.monotonic() - begin < 10


def killed_in_use(argv, path, commands, folder):
    """What is left when a program is killed that has flushed."""
    p = subprocess.Popen([*argv, path], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    p.stdin.write(("\n".join(commands) + "\nflush\nwrite -P 99 512 512\n").encode())
    p.stdin.flush()
    end = time.monotonic() + 20
    while bytes([99]) * 512 not in path.read_bytes():  # it comes last
        assert p.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    left = folder / "left.vhdx"
    shutil.copy(path, left)
    os.kill(p.pid, signal.SIGKILL)
    p.stdin.close()
    p.wait()
    return left


def test_qemu_img_replays_the_log_of_a_killed_strata(run, peer, strata, image, tmp_path):
    run("io", "-c", "write -q -P 98 0 512", image)
    left = killed_in_use([strata, "io"], image, ["write -P 8 1M 64k", "write -P 9 7M 64k"], tmp_path)
    assert "log entries to replay: 1" in run("info", left).stdout
    i = Image(left)
    i.put(i.bat(7), "Q", 2)  # what lies in place was not stable
    i.save()
    reads(run, left, (8, 1024, 64), (9, 7168, 64), (5, 3072, 2048))
    peer("qemu-img", "check", "-r", "all", left)
    peer("qemu-io", "-r", "-c", "read -q -P 8 1M 64k", "-c", "read -q -P 9 7M 64k", left)
    assert "log entries to replay: 0" in run("info", left).stdout
    reads(run, left, (8, 1024, 64), (9, 7168, 64), (5, 3072, 2048))


def test_strata_replays_a_log_of_qemu_io(run, peer, tmp_path):
    """It empties its log after each entry; as it is before that, when it is killed there."""
    path = tmp_path / "q.vhdx"
    peer("qemu-img", "create", "-q", "-f", "vhdx", "-o", "block_size=1M", path, "10M")
    peer("qemu-io", "-c", "write -q -P 8 1M 64k", "-c", "write -q -P 9 7M 64k", path)
    i = Image(path)
    second = i.log_place()[0] + 8192
    assert i.data[second:second + 4] == b"loge"
    i.log_on(bytes(i.data[second + 32:second + 48]))
    i.put(i.bat(7), "Q", 0)
    i.save()
    before = path.read_bytes()
    reads(run, path, (8, 1024, 64), (9, 7168, 64))
    assert path.read_bytes() == before
    run("check", "-r", "all", path)
    assert "log entries to replay: 0" in run("info", path).stdout
    reads(run, path, (8, 1024, 64), (9, 7168, 64))
    peer("qemu-img", "check", path)
    peer("qemu-io", "-r", "-c", "read -q -P 8 1M 64k", "-c", "read -q -P 9 7M 64k", path)


def test_more_pages_than_the_log_holds_in_one_flush(run, peer, tmp_path):
    path = tmp_path / "a.vhdx"
    run("create", "-q", "-f", "vhdx", "-o", "block_size=1M,block_state_zero=off", path, "200G")
    places = [k * 513 * MIB for k in range(390)]
    cmds = [x for n, at in enumerate(places) for x in ("-c", f"write -q -P {n % 255 + 1} {at} 512")]
    run("io", *cmds, path)
    run("check", path)
    peer("qemu-io", "-r", *[x.replace("write", "read") for x in cmds], path)
    assert path.stat().st_size == (5 + 390) * MIB


# ---------------------------------------------------------------- growth

@pytest.mark.parametrize("options", ["block_size=1M", "subformat=fixed,block_size=1M",
                                     "block_size=1M,block_state_zero=off"])
def test_an_image_grows(run, peer, tmp_path, options):
    path = tmp_path / "a.vhdx"
    run("create", "-q", "-f", "vhdx", "-o", options, path, "10M")
    run("io", "-c", "write -q -P 5 3M 2M", path)
    run("resize", path, "20992k")
    run("io", "-c", "write -q -P 7 20M 512k", path)
    reads(run, path, (5, 3072, 2048), (0, 5120, 15360), (7, 20480, 512))
    run("check", path)
    peer("qemu-io", "-r", "-c", "read -q -P 5 3M 2M", "-c", "read -q -P 0 5M 15M", path)
    assert "cannot shrink" in run("resize", "--shrink", path, "1M", status=1).stderr


def test_a_table_without_room_moves_behind_the_blocks(run, peer, tmp_path):
    path = tmp_path / "a.vhdx"
    run("create", "-q", "-f", "vhdx", "-o", "block_size=1M", path, "100G")
    run("io", "-c", "write -q -P 5 3M 2M", "-c", "write -q -P 6 102399M 1M", path)
    was = Image(path).region(BAT)
    run("resize", path, "300G")
    assert Image(path).region(BAT) > was
    run("io", "-c", "write -q -P 7 299G 1M", path)
    for who in (lambda *a: run("io", *a), lambda *a: peer("qemu-io", *a)):
        who("-r", "-c", "read -q -P 5 3M 2M", "-c", "read -q -P 6 102399M 1M", "-c", "read -q -P 0 100G 1M",
            "-c", "read -q -P 7 299G 1M", path)
    run("check", path)


# ---------------------------------------------------------------- parents

@pytest.fixture
def child(run, image, tmp_path):
    path = tmp_path / "child.vhdx"
    run("create", "-q", "-f", "vhdx", "-b", image.name, "-F", "vhdx", "-o", "block_size=1M", path,
        cwd=tmp_path)
    return path


def test_a_differencing_image_reads_and_writes_over_its_parent(run, image, child):
    before = image.read_bytes()
    run("io", "-c", "write -q -P 8 3100k 4k", "-c", "write -q -z 4M 64k", "-c", "write -q -z 1M 1M", child)
    reads(run, child, (5, 3072, 28), (8, 3100, 4), (5, 3104, 992), (0, 4096, 64), (5, 4160, 960), (0, 0, 3072))
    assert image.read_bytes() == before
    run("check", child)
    assert "parent linkage" in run("info", child).stdout


def test_a_parent_that_has_changed_is_refused(run, image, child):
    run("io", "-c", "write -q 0 512", image)
    assert "has been changed since" in run("io", "-r", "-c", "read 0 1k", child, status=1).stderr
    run("info", child)


def test_a_parent_outside_the_folder_is_not_followed_unasked(run, image, child, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    shutil.move(child, other / "child.vhdx")
    i = Image(other / "child.vhdx")
    at = i.data.index(".\\a.vhdx".encode("utf-16-le"))
    i.data[at:at + 16] = "..\\a.vhd".encode("utf-16-le")
    i.save()
    shutil.copy(image, tmp_path / "a.vhd")
    p = run("io", "-r", "-c", "read 0 1k", other / "child.vhdx", status=1)
    assert "outside the image's own folder" in p.stderr
    reads(run, other / "child.vhdx", (5, 3072, 1024), flags=("-r", "--trust", "local"))


@pytest.mark.parametrize("rw", [False, True])
def test_a_block_that_is_here_in_part_shows_both(run, image, child, rw):
    """By hand, as Hyper-V makes them: bitmap in the file's last MiB, the block before it."""
    i = Image(child)
    block = len(i.data)
    bits = bytearray(MIB)
    for sector in [3 * 2048 + k for k in list(range(8, 20)) + [2047]]:
        bits[sector // 8] |= 1 << sector % 8
    i.data += b"\x77" * MIB + bits
    i.put(i.bat(3), "Q", 7 | block)
    i.put(i.bat(4096), "Q", 6 | block + MIB)
    i.save()
    run("check", child)
    want = [(5, 3072, 4), (0x77, 3076, 6), (5, 3082, 1013), (5, 4096, 1024)]
    reads(run, child, *want)
    run("io", "-r", "-c", "read -q -P 119 4095.5k 512", child)
    if rw:
        run("io", "-c", "write -q -P 9 3077k 1k", "-c", "write -q -P 10 3200k 1k", child)
        reads(run, child, (5, 3072, 4), (0x77, 3076, 1), (9, 3077, 1), (0x77, 3078, 4), (5, 3082, 118), (10, 3200, 1),
              (5, 3201, 894), (5, 4096, 1024))
        run("io", "-r", "-c", "read -q -P 119 4095.5k 512", child)


@pytest.mark.parametrize("entry_value", [0, 6, 6 | 1 << 50, 2])
def test_a_block_in_part_without_a_bitmap_is_not_read(run, child, entry_value):
    i = Image(child)
    block = len(i.data)
    i.data += b"\x77" * MIB
    i.put(i.bat(3), "Q", 7 | block)
    i.put(i.bat(4096), "Q", entry_value)
    i.save()
    run("io", "-r", "-c", "read 3M 4k", child, status=1)
    run("check", child, status=2)


def test_a_locator_of_nonsense_is_answered(run, child, seed):
    import random
    rng = random.Random(seed)
    data = child.read_bytes()
    at = data.index(uuid.UUID("B04AEFB7-D19E-4A81-B789-25B8E9445913").bytes_le)
    for _ in range(20):
        broken = bytearray(data)
        for _ in range(3):
            broken[at + rng.randrange(16, 300)] = rng.randrange(256)
        child.write_bytes(broken)
        p = run("io", "-r", "-c", "read -q 0 4k", child, status=None)
        assert p.returncode in (0, 1)


# ---------------------------------------------------------------- rebase and commit

def guid(path):
    i = Image(path)
    return i.data[i.header() + 32:i.header() + 48]


def linkage(run, path):
    return json.loads(run("info", "--output=json", path).stdout)["format-specific"]["data"].get("parent-linkage")


def test_a_commit_empties_a_child_that_names_its_changed_parent(run, image, child):
    run("io", "-c", "write -q -P 8 3100k 4k", "-c", "write -q -z 4M 1M", "-c", "write -q -P 9 7M 1M", child)
    before, size = guid(image), child.stat().st_size
    run("commit", "-q", child)
    want = (5, 3072, 28), (8, 3100, 4), (5, 3104, 992), (0, 4096, 3072), (9, 7168, 1024), (0, 0, 3072)
    reads(run, image, *want)
    reads(run, child, *want)
    assert guid(image) != before
    assert linkage(run, child) == str(uuid.UUID(bytes_le=bytes(guid(image))))
    assert child.stat().st_size < size
    assert '"depth": 0' not in run("map", "--output=json", child).stdout
    run("check", child)
    run("io", "-c", "write -q -P 3 3M 1M", child)
    run("commit", "-q", child)
    reads(run, image, (3, 3072, 1024), (0, 4096, 3072))


def test_a_commit_without_emptying_leaves_the_child_as_it_is(run, image, child):
    run("io", "-c", "write -q -P 8 3100k 4k", child)
    before = child.read_bytes()
    run("commit", "-q", "-d", child)
    assert child.read_bytes()[MIB:] == before[MIB:]
    reads(run, image, (8, 3100, 4))
    p = run("io", "-r", "-c", "read 0 1k", child, status=1)
    assert "has been changed since" in p.stderr and "rebase -u" in p.stderr
    run("rebase", "-u", "-b", image.name, "-F", "vhdx", child)
    reads(run, child, (8, 3100, 4), (5, 3104, 992))


def test_the_names_of_a_parent_outlive_a_commit(run, image, child):
    """Only the GUID in the locator changes: other writers record several paths."""
    def locator():
        d = child.read_bytes()
        at = d.index(uuid.UUID("B04AEFB7-D19E-4A81-B789-25B8E9445913").bytes_le)
        return bytearray(d[at:at + 512])
    before = locator()
    run("io", "-c", "write -q -P 8 3100k 4k", child)
    run("commit", "-q", child)
    after = locator()
    text = ("{%s}" % uuid.UUID(bytes_le=bytes(guid(image)))).encode("utf-16-le")
    at = after.index(text)
    after[at:at + 76] = before[at:at + 76]
    assert after == before


def test_parts_of_blocks_are_committed_too(run, image, child):
    i = Image(child)
    block = len(i.data)
    bits = bytearray(MIB)
    for sector in range(3 * 2048 + 8, 3 * 2048 + 20):
        bits[sector // 8] |= 1 << sector % 8
    i.data += b"\x77" * MIB + bits
    i.put(i.bat(3), "Q", 7 | block)
    i.put(i.bat(4096), "Q", 6 | block + MIB)
    i.save()
    p = run("rebase", "-u", "-b", "", child, status=1)
    assert "in part" in p.stderr
    reads(run, child, (0x77, 3076, 6), (5, 3082, 1000))
    run("commit", "-q", child)
    for path in image, child:
        reads(run, path, (5, 3072, 4), (0x77, 3076, 6), (5, 3082, 1013))
    run("check", child)


def test_a_rebase_moves_a_child_to_another_parent(run, image, child, tmp_path):
    other = tmp_path / ("a longer name that its locator has to make room for" * 3 + ".vhdx")
    run("create", "-q", "-f", "vhdx", "-o", "block_size=1M", other, "10M")
    run("io", "-c", "write -q -P 5 3M 1M", "-c", "write -q -P 6 8M 1M", other)
    run("io", "-c", "write -q -P 8 3100k 4k", child)
    run("rebase", "-q", "-b", other.name, "-F", "vhdx", child)
    image.unlink()
    want = (5, 3072, 28), (8, 3100, 4), (5, 3104, 2016), (0, 5120, 5120)
    reads(run, child, *want)
    run("check", child)
    # And to none at all.
    run("rebase", "-q", "-b", "", child)
    other.unlink()
    reads(run, child, *want)
    run("check", child)
    assert linkage(run, child) is None


def test_an_image_without_a_parent_gets_one(run, peer, tmp_path):
    """With blocks of the default size, above what a rebase looks at in one piece."""
    base, top = tmp_path / "base.vhdx", tmp_path / "top.vhdx"
    run("create", "-q", "-f", "vhdx", base, "40M")
    run("io", "-c", "write -q -P 1 1M 20M", base)
    shutil.copy(base, top)
    run("io", "-c", "write -q -P 2 9M 1M", "-c", "write -q -P 3 30M 64k", top)
    run("create", "-q", "-f", "vhdx", "-o", "block_state_zero=off", tmp_path / "thin.vhdx", "40M")
    run("rebase", "-q", "-b", "base.vhdx", "-F", "vhdx", tmp_path / "thin.vhdx")
    reads(run, tmp_path / "thin.vhdx", (0, 0, 40960))
    run("rebase", "-q", "-b", "base.vhdx", "-F", "vhdx", top)
    for path in top, tmp_path / "thin.vhdx":
        run("check", path)
        assert linkage(run, path)
    want = (0, 0, 1024), (1, 1024, 8192), (2, 9216, 1024), (1, 10240, 11 * 1024), (0, 21504, 9216), (3, 30720, 64)
    reads(run, top, *want)
    run("rebase", "-q", "-b", "", top)
    assert not peer("qemu-io", "-r", "-f", "vhdx", *[x for b, a, n in want for x in ("-c", f"read -q -P {b} {a}k {n}k")],
                    top).stdout


def test_parents_that_cannot_be_recorded_are_refused_and_nothing_changes(run, image, child, tmp_path):
    run("create", "-q", "-f", "qcow2", tmp_path / "b.qcow2", "10M")
    fixed = tmp_path / "fixed.vhdx"
    run("create", "-q", "-f", "vhdx", "-o", "subformat=fixed", fixed, "10M")
    before = child.read_bytes(), fixed.read_bytes()
    assert "not 'qcow2'" in run("rebase", "-u", "-b", "b.qcow2", "-F", "qcow2", child, status=1).stderr
    assert "fixed image" in run("rebase", "-u", "-b", "a.vhdx", "-F", "vhdx", fixed, status=1).stderr
    run("rebase", "-u", "-b", "missing.vhdx", "-F", "vhdx", child, status=1)
    assert (child.read_bytes(), fixed.read_bytes()) == before
