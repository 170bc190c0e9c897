# SPDX-License-Identifier: MIT
"""strata amend on images of qemu-img and the other way round: content stays, qemu-img's check is clean,
info says what was asked for; what cannot be is refused before anything has changed."""
import json
import os
import random
import shutil
import struct

import pytest

from qcow2_image import ZERO, Qcow2

KIB, MIB = 1 << 10, 1 << 20


def info(peer, image):
    return json.loads(peer("qemu-img", "info", "--output=json", image).stdout)


def specific(peer, image):
    return info(peer, image)["format-specific"]["data"]


def io(peer, image, *commands):
    peer("qemu-io", "-f", "qcow2", *[x for c in commands for x in ("-c", c)], image)


def clean(peer, run, image):
    p = peer("qemu-img", "check", "-f", "qcow2", image, status=None)
    assert p.returncode == 0, p.stdout + p.stderr
    run("check", "-f", "qcow2", image)


def raw_of(peer, image, out, *args):
    peer("qemu-img", "convert", *args, "-O", "raw", image, out)
    return out.read_bytes()


def fill(peer, image, size, seed, commands=40):
    """Data, compressed-sized runs, zero clusters with and without room, holes."""
    rnd = random.Random(seed)
    todo = []
    for _ in range(commands):
        at = rnd.randrange(size // 512) * 512
        n = min(rnd.choice([512, 4096, 65536, 300 * KIB]), size - at)
        kind = rnd.random()
        if kind < .5:
            todo.append(f"write -P {rnd.randrange(1, 255)} {at} {n}")
        elif kind < .75:
            todo.append(f"write -z {at} {n}")
        elif kind < .9:
            todo.append(f"write -z -u {at} {n}")
        else:
            todo.append(f"discard {at} {n}")
    io(peer, image, *todo)


@pytest.fixture(params=["alone", "backing", "snapshots", "snapshots over backing"])
def image(request, peer, tmp_path):
    """A version 3 image of 4 KiB clusters with everything in it, and its size."""
    size, path = 6 * MIB, tmp_path / "a.qcow2"
    args = ["-o", "cluster_size=4k"]
    if "backing" in request.param:
        base = tmp_path / "base.raw"
        base.write_bytes(bytes(random.Random(1).randbytes(size)))
        args += ["-b", base, "-F", "raw"]
    peer("qemu-img", "create", "-q", "-f", "qcow2", *args, path, size)
    fill(peer, path, size, 2)
    if "snapshots" in request.param:
        for i in range(3):
            peer("qemu-img", "snapshot", "-c", f"s{i}", path)
            fill(peer, path, size, 3 + i, 15)
    return path


def contents(peer, image, tmp_path):
    """What the disk and each of its snapshots read as."""
    names = [s["name"] for s in info(peer, image).get("snapshots", [])]
    out = [raw_of(peer, image, tmp_path / "raw")]
    return out + [raw_of(peer, image, tmp_path / "raw", "-l", n) for n in names]


def test_down_and_up_keep_the_disk_and_its_snapshots(run, peer, image, tmp_path):
    before = contents(peer, image, tmp_path)
    run("amend", "-o", "compat=0.10", image)
    assert specific(peer, image)["compat"] == "0.10"
    clean(peer, run, image)
    assert contents(peer, image, tmp_path) == before
    run("amend", "-o", "compat=1.1,lazy_refcounts=on", image)
    data = specific(peer, image)
    assert data["compat"] == "1.1" and data["lazy-refcounts"]
    clean(peer, run, image)
    assert contents(peer, image, tmp_path) == before
    fill(peer, image, 6 * MIB, 9)
    clean(peer, run, image)


def test_downgraded_image_has_no_zero_flag_left(run, peer, image):
    run("amend", "-o", "compat=v2", image)
    q = Qcow2(image)
    flagged = [i for i in range(6 * MIB // q.cluster)
               if q.l1(i // (q.cluster // 8)) and q.l2(i) & ZERO and not q.l2(i) >> 62 & 1]
    assert flagged == []


@pytest.mark.parametrize("widths", [[64, 1, 16], [1, 2, 4, 8, 32], [32, 8]], ids=str)
@pytest.mark.parametrize("cluster", ["512", "4k", "64k"])
def test_refcount_width_there_and_back(run, peer, tmp_path, cluster, widths):
    path, size = tmp_path / "a.qcow2", 6 * MIB
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", path, size)
    fill(peer, path, size, 5)
    before = raw_of(peer, path, tmp_path / "raw")
    for width in widths:
        run("amend", "-o", f"refcount_bits={width}", path)
        assert specific(peer, path)["refcount-bits"] == width
        clean(peer, run, path)
        assert raw_of(peer, path, tmp_path / "raw") == before
    fill(peer, path, size, 6)
    run("io", "-f", "qcow2", "-c", "write -P 3 1M 2M", path)
    clean(peer, run, path)


def test_refcount_width_too_small_for_a_count_changes_nothing(run, peer, tmp_path):
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    io(peer, path, "write 0 64k")
    for name in "abc":
        peer("qemu-img", "snapshot", "-c", name, path)
    before = path.read_bytes()
    p = run("amend", "-o", "refcount_bits=2,lazy_refcounts=on", path, status=1)
    assert "reference count of 4" in p.stderr and "refcount_bits=2" in p.stderr
    assert path.read_bytes() == before
    run("amend", "-o", "refcount_bits=4", path)
    clean(peer, run, path)


def test_counts_of_a_refcount_table_with_holes(run, peer, tmp_path):
    """A table that was made for more than there is, and one that needs more than a cluster."""
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o",
         "cluster_size=512,refcount_bits=1,preallocation=metadata", path, "40M")
    run("amend", "-o", "refcount_bits=64", path)
    clean(peer, run, path)
    run("amend", "-o", "refcount_bits=1", path)
    clean(peer, run, path)


def test_peer_amends_ours_and_we_open_it(run, peer, tmp_path):
    path = tmp_path / "a.qcow2"
    run("create", "-q", "-f", "qcow2", path, "6M")
    fill(peer, path, 6 * MIB, 7)
    before = raw_of(peer, path, tmp_path / "raw")
    for option in "compat=0.10", "compat=1.1", "refcount_bits=1", "lazy_refcounts=on":
        peer("qemu-img", "amend", "-o", option, path)
        clean(peer, run, path)
        run("convert", "-O", "raw", path, tmp_path / "ours")
        assert (tmp_path / "ours").read_bytes() == before


def test_size_grows_and_shrinks_only_when_asked(run, peer, tmp_path):
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    io(peer, path, "write -P 5 0 4M")
    run("amend", "-o", "size=8M", path)
    assert info(peer, path)["virtual-size"] == 8 * MIB
    before = path.read_bytes()
    assert "--shrink" in run("amend", "-o", "size=1M", path, status=1).stderr
    assert path.read_bytes() == before
    run("amend", "--shrink", "-o", "size=1M", path)
    assert info(peer, path)["virtual-size"] == MIB
    clean(peer, run, path)
    io(peer, path, "read -P 5 0 1M")


def test_all_at_once(run, peer, tmp_path):
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", path, "2M")
    io(peer, path, "write -P 9 0 1M")
    run("amend", "-o", "compat=1.1,refcount_bits=32,lazy_refcounts=on,size=3M", path)
    data = specific(peer, path)
    assert (data["compat"], data["refcount-bits"], data["lazy-refcounts"]) == ("1.1", 32, True)
    assert info(peer, path)["virtual-size"] == 3 * MIB
    clean(peer, run, path)
    io(peer, path, "read -P 9 0 1M", "read -P 0 1M 2M")
    run("amend", "-o", "compat=0.10,refcount_bits=16,lazy_refcounts=off,size=5M", path)
    assert specific(peer, path)["compat"] == "0.10"
    clean(peer, run, path)
    io(peer, path, "read -P 9 0 1M", "read -P 0 1M 4M")


REFUSED = [
    # create options, amend options, what the message says
    ("refcount_bits=8", "compat=0.10", "refcount_bits=16"),
    ("compat=1.1", "compat=0.10,refcount_bits=1", "version 2 has 16 bits"),
    ("compat=1.1", "compat=0.10,lazy_refcounts=on", "lazy_refcounts=on needs compat=1.1"),
    ("compat=0.10", "lazy_refcounts=on", "lazy_refcounts=on needs compat=1.1"),
    ("compat=0.10", "refcount_bits=1", "version 2 has 16 bits"),
    ("compat=1.1", "compat=1.0", "compat"),
    ("compat=1.1", "refcount_bits=3", "power of two"),
    ("compat=1.1", "data_file=x", "no external data file"),
    ("compat=1.1", "data_file_raw=on", "existing image"),
    ("compat=1.1", "backing_file=x", "rebase"),
    ("compat=1.1", "backing_fmt=raw", "rebase"),
    ("compat=1.1", "encrypt.keyslot=1", "not encrypted"),
    ("compat=1.1", "cluster_size=4k", "cluster_size"),
    ("compat=1.1", "compression_type=zstd", "compression_type"),
    ("compat=1.1", "lazy_refcount=on", "lazy_refcounts"),
    ("compat=1.1", "size=9E", "9E"),
    ("cluster_size=512", "size=2P", "limit"),
]


@pytest.mark.parametrize("create,amend,words", REFUSED, ids=lambda v: v)
def test_refused_before_anything_changes(run, peer, tmp_path, create, amend, words):
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", create, path, "1M")
    before = path.read_bytes()
    assert words in run("amend", "-o", amend, path, status=1).stderr
    assert path.read_bytes() == before


def test_the_same_backing_file_is_no_change(run, peer, tmp_path):
    peer("qemu-img", "create", "-q", "-f", "raw", tmp_path / "b", "1M")
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-b", "b", "-F", "raw", path)
    run("amend", "-o", "backing_file=b,backing_fmt=raw", path)
    run("amend", "-o", "backing_file=c,backing_fmt=raw", path, status=1)


def test_zstd_goes_to_version_2_only_without_compressed_clusters(run, peer, tmp_path):
    path, src = tmp_path / "a.qcow2", tmp_path / "raw"
    src.write_bytes(b"x" * MIB)
    peer("qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", src, path)
    before = path.read_bytes()
    assert "zstd" in run("amend", "-o", "compat=0.10", path, status=1).stderr
    assert path.read_bytes() == before
    peer("qemu-img", "convert", "-O", "qcow2", "-o", "compression_type=zstd", src, path)
    run("amend", "-o", "compat=0.10", path)
    assert specific(peer, path)["compression-type"] == "zlib"
    clean(peer, run, path)
    peer("qemu-img", "compare", src, path)


def test_bitmaps_survive_other_amendments(run, peer, tmp_path):
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    peer("qemu-img", "bitmap", "--add", "--enable", path, "b0")
    io(peer, path, "write 0 64k")
    before = specific(peer, path)["bitmaps"]
    for options in "refcount_bits=1", "lazy_refcounts=on", "refcount_bits=64,size=2M":
        run("amend", "-o", options, path)
        clean(peer, run, path)
        assert specific(peer, path)["bitmaps"] == before


def test_data_file_is_renamed_and_raw_switched_off(run, peer, tmp_path):
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=d.raw,data_file_raw=on", path,
         "1M", cwd=tmp_path)
    assert "existing" not in run("amend", "-o", "data_file_raw=on", path).stderr
    run("amend", "-o", "data_file_raw=off,refcount_bits=8", path)
    assert specific(peer, path)["data-file-raw"] is False
    assert "existing" in run("amend", "-o", "data_file_raw=on", path, status=1).stderr
    run("amend", "-o", "data_file=other.raw", path)
    assert specific(peer, path)["data-file"] == "other.raw"
    run("amend", "-o", "refcount_bits=16", path)
    assert "data file" in run("amend", "-o", "compat=0.10", path, status=1).stderr
    run("amend", "-o", "data_file=", path)
    assert "data-file" not in specific(peer, path)


def test_a_dirty_image_is_mended_and_amended(run, peer, tmp_path):
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "1M")
    q = Qcow2(path)
    q.write(79, b"\x01")
    run("amend", "-o", "compat=0.10", path)
    assert specific(peer, path)["compat"] == "0.10"
    clean(peer, run, path)


def test_bitmaps_are_not_dropped(run, peer, tmp_path):
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    peer("qemu-img", "bitmap", "--add", path, "b0")
    before = path.read_bytes()
    for force in [], ["--force"]:
        assert "bitmaps" in run("amend", *force, "-o", "compat=0.10", path, status=1).stderr
    assert path.read_bytes()[96:] == before[96:], "but for feature bits, which opening may clear"


def test_snapshots_of_another_size_stay_in_version_3(run, peer, tmp_path):
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    peer("qemu-img", "snapshot", "-c", "s", path)
    peer("qemu-img", "resize", "-q", path, "2M")
    assert "another size" in run("amend", "-o", "compat=0.10", path, status=1).stderr
    run("amend", "--shrink", "-o", "compat=0.10,size=1M", path)
    assert specific(peer, path)["compat"] == "0.10"
    clean(peer, run, path)


# ---------------------------------------------------------------- what the header keeps


def with_unknowns(path, longer):
    """Our own extension of an unknown type, an unknown compatible bit, and a longer header."""
    q = Qcow2(path)
    head = bytearray(q.read(0, q.cluster))
    length = struct.unpack_from(">I", head, 100)[0]
    rest = bytes(head[length:3000])
    extra = bytes(range(1, longer + 1))
    unknown = struct.pack(">II", 0x12345678, 5) + b"hello\0\0\0"
    head[:112 + longer + len(unknown) + len(rest)] = (
        bytes(head[:length]).ljust(112, b"\0") + extra + unknown + rest)
    struct.pack_into(">I", head, 100, 112 + longer)
    head[80] |= 0x80  # compatible bit 63
    q.write(0, bytes(head))
    return extra, unknown


def test_header_keeps_what_it_does_not_know(run, peer, tmp_path):
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    extra, unknown = with_unknowns(path, 16)
    clean(peer, run, path)
    run("amend", "-o", "lazy_refcounts=on,refcount_bits=8,size=2M", path)
    head = path.read_bytes()[:4096]
    assert struct.unpack_from(">I", head, 100)[0] == 128
    assert head[112:128] == extra and unknown in head
    assert head[80] & 0x80 and head[87] == 1
    clean(peer, run, path)
    before = path.read_bytes()
    assert "does not know" in run("amend", "-o", "compat=0.10,refcount_bits=16,lazy_refcounts=off",
                                  path, status=1).stderr
    assert path.read_bytes() == before


def test_upgrade_writes_the_feature_name_table_where_the_peer_does(run, peer, tmp_path):
    for cluster in "4k", "64k":
        ours, theirs = tmp_path / "ours", tmp_path / "theirs"
        peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"compat=0.10,cluster_size={cluster}",
             ours, "1M")
        shutil.copy(ours, theirs)
        run("amend", "-o", "compat=1.1", ours)
        peer("qemu-img", "amend", "-o", "compat=1.1", theirs)
        assert ours.read_bytes() == theirs.read_bytes()
        run("amend", "-o", "compat=0.10", ours)
        peer("qemu-img", "amend", "-o", "compat=0.10", theirs)
        assert ours.read_bytes() == theirs.read_bytes()


def test_refusal_names_features_by_the_images_own_table(run, peer, tmp_path):
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    q = Qcow2(path)
    head = bytearray(q.read(0, 4096))
    at = head.index(b"dirty bit")
    head[at - 1] = 9
    head[at:at + 9] = b"gyroscope"
    struct.pack_into(">Q", head, 72, 1 << 9)
    q.write(0, bytes(head))
    assert "gyroscope" in run("map", path, status=1).stderr
    assert "gyroscope" in run("info", path).stdout


def test_header_without_room_is_refused_whole(run, peer, tmp_path):
    """Version 3 is longer by 40 bytes: with this name the cluster of 512 has no room for it."""
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-o", "compat=0.10,cluster_size=512",
         "-b", "b" * 410, "-F", "raw", path, "1M")
    before = path.read_bytes()
    assert "first cluster" in run("amend", "-o", "compat=1.1", path, status=1).stderr
    assert path.read_bytes() == before


# ---------------------------------------------------------------- the verb


def test_help_lists_what_can_be_changed(run, peer, tmp_path):
    out = run("amend", "-f", "qcow2", "-o", "help").stdout
    for key in "compat", "refcount_bits", "lazy_refcounts", "size", "data_file_raw":
        assert key in out
    assert "cluster_size" not in out
    peer("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "a", "1M")
    assert run("amend", "-o", "help", tmp_path / "a").stdout == out


def test_misuse(run, peer, tmp_path):
    (tmp_path / "raw").write_bytes(bytes(MIB))
    for args, words in (([tmp_path / "raw"], "-o is missing"), (["-o", "size=1M"], "FILE"),
                        (["-o", "size=1M", "-f", "raw", tmp_path / "raw"], "raw"),
                        (["-o", "size=1M", tmp_path / "none"], "none")):
        assert words in run("amend", *args, status=1).stderr


def test_a_full_disk_leaves_the_image_as_it_was(run, peer, tmp_path):
    """The counts of a wider kind need room that the file size limit does not give."""
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "6M")
    fill(peer, path, 6 * MIB, 8)
    before, size = raw_of(peer, path, tmp_path / "raw"), os.stat(path).st_size
    limit = size // KIB + 8
    p = run("amend", "-o", "refcount_bits=64", path, status=None, preexec_fn=lambda: _limit(limit))
    assert p.returncode != 0
    peer("qemu-img", "check", path)
    assert specific(peer, path)["refcount-bits"] == 16
    assert raw_of(peer, path, tmp_path / "raw") == before


def _limit(kib):
    import resource
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kib * KIB, kib * KIB))


def shorten(path, keep):
    """The snapshot table as old programs wrote it: `keep` bytes of extra data, without the size of the disk."""
    with open(path, "r+b") as f:
        head = f.read(72)
        count, at = struct.unpack(">IQ", head[60:72])
        f.seek(at)
        old, new, pos = f.read(4096), b"", 0
        for _ in range(count):
            id_len, name_len, extra = (*struct.unpack(">HH", old[pos + 12:pos + 16]),
                                       *struct.unpack(">I", old[pos + 36:pos + 40]))
            entry = old[pos:pos + 36] + struct.pack(">I", keep) + old[pos + 40:pos + 40 + keep]
            entry += old[pos + 40 + extra:pos + 40 + extra + id_len + name_len]
            new += entry + bytes(-len(entry) % 8)
            pos += -(-(40 + extra + id_len + name_len) // 8) * 8
        f.seek(at)
        f.write(new.ljust(pos, b"\0"))


@pytest.mark.parametrize("keep", [0, 8])
def test_entries_of_snapshots_without_the_disks_size_get_it(tmp_path, peer, run, keep):
    """Version 3 wants it in each; what they meant was the size at that moment, whatever comes later."""
    size, path = 6 * MIB, tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10,cluster_size=4k", path, size)
    for i in range(3):
        fill(peer, path, size, 20 + i, 15)
        peer("qemu-img", "snapshot", "-c", f"s{i}", path)
    shorten(path, keep)
    before = contents(peer, path, tmp_path)
    run("amend", "-f", "qcow2", "-o", "compat=1.1,size=8M", path)
    assert specific(peer, path)["compat"] == "1.1"
    clean(peer, run, path)
    after = contents(peer, path, tmp_path)
    assert [a.ljust(8 * MIB, b"\0") for a in after] == [b + bytes(2 * MIB) for b in before]
    run("snapshot", "-a", "s1", path)
    assert raw_of(peer, path, tmp_path / "raw") == before[2] and info(peer, path)["virtual-size"] == size
    peer("qemu-img", "snapshot", "-a", "s0", path)
    assert raw_of(peer, path, tmp_path / "raw") == before[1]
    clean(peer, run, path)
