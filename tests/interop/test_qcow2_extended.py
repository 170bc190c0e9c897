# SPDX-License-Identifier: MIT
"""qcow2 with extended L2 entries: 32 subclusters a cluster, beside qemu-img both ways.

Random operations are in test_qcow2_model.py; here each rule by itself.
"""
import json
import os
import random
import subprocess
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
from qcow2_image import COPIED, COMPRESSED, OFFSET, Qcow2  # noqa: E402

K, M = 1 << 10, 1 << 20
ZERO_0, DATA_0 = 1 << 32, 1  # of subcluster 0


class Extended(Qcow2):
    """L2 entries of 16 bytes."""

    def l2_at(self, i):
        per = self.cluster // 16
        table = self.l1(i // per) & OFFSET
        assert table
        return table + 16 * (i % per)

    def bits(self, i):
        return self.get64(self.l2_at(i) + 8)

    def set_bits(self, i, value):
        self.set64(self.l2_at(i) + 8, value)


def create(run, image, size, options="", *args):
    run("create", "-q", "-f", "qcow2", "-o", "extended_l2=on" + ("," if options else "") + options,
        *args, image, size)


def io(run, image, *commands, status=0):
    return run("io", "-f", "qcow2", *[x for c in commands for x in ("-c", c)], image, status=status)


def peer_io(peer, image, *commands):
    return peer("qemu-io", "-f", "qcow2", *[x for c in commands for x in ("-c", c)], image)


def clean(run, peer, *images):
    for image in images:
        p = peer("qemu-img", "check", "-f", "qcow2", image, status=None)
        assert p.returncode == 0, p.stdout + p.stderr
        run("check", "-f", "qcow2", image)


def map_of(run_or_peer, *program, image):
    rows = json.loads(run_or_peer(*program, "map", "-f", "qcow2", "--output=json", image).stdout)
    for r in rows:
        r.pop("compressed", None)
    return rows


def same_map(run, peer, image):
    assert map_of(run, image=image) == map_of(peer, "qemu-img", image=image)


def base_of(tmp_path, size, seed=1):
    base = tmp_path / f"base{seed}.raw"
    base.write_bytes(random.Random(seed).randbytes(size))
    return base


@pytest.mark.parametrize("options", ["", "cluster_size=16k", "cluster_size=2M,refcount_bits=1",
                                     "preallocation=metadata", "preallocation=falloc"])
def test_both_create_and_describe_the_same_image(run, peer, tmp_path, options):
    a, b = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    create(run, a, "100M", options)
    peer("qemu-img", "create", "-q", "-f", "qcow2",
         "-o", "extended_l2=on" + ("," if options else "") + options, b, "100M")
    clean(run, peer, a, b)
    for image in (a, b):
        info = json.loads(run("info", "--output=json", image).stdout)["format-specific"]["data"]
        assert info["extended-l2"] is True
        assert info == json.loads(peer("qemu-img", "info", "--output=json",
                                       image).stdout)["format-specific"]["data"]
        same_map(run, peer, image)
        io(run, image, "read -P 0 0 100M", "write -P 5 1M 3k", "read -P 0 0 1M")
        peer_io(peer, image, "read -P 5 1M 3k", "write -P 6 30M 100k")
        io(run, image, "read -P 6 30M 100k")
    clean(run, peer, a, b)


def test_measure_tells_the_length_of_the_file(run, peer, tmp_path):
    raw = tmp_path / "a.raw"
    with open(raw, "wb") as f:
        for i in range(0, 64, 3):
            f.seek(i * M + i * 1000)
            f.write(b"x" * 70000)
    args = ["measure", "-O", "qcow2", "-o", "cluster_size=16k,extended_l2=on", "--output=json", raw]
    ours, theirs = (json.loads(p.stdout) for p in (run(*args), peer("qemu-img", *args)))
    assert ours["fully-allocated"] == theirs["fully-allocated"]
    run("convert", "-O", "qcow2", "-o", "cluster_size=16k,extended_l2=on", raw, tmp_path / "b")
    assert ours["required"] == (tmp_path / "b").stat().st_size


@pytest.mark.parametrize("options,says", [
    ("compat=0.10", "extended_l2=on needs compat=1.1"),
    ("cluster_size=8k", "extended_l2=on needs clusters of at least 16384 bytes, not 8192"),
])
def test_creation_refuses_what_the_format_has_not(run, tmp_path, options, says):
    p = run("create", "-f", "qcow2", "-o", f"extended_l2=on,{options}", tmp_path / "a", "1M",
            status=1)
    assert says in p.stderr


def test_a_small_write_copies_one_subcluster(run, peer, tmp_path):
    base, image = base_of(tmp_path, M), tmp_path / "a.qcow2"
    create(run, image, M, "", "-b", base, "-F", "raw")
    io(run, image, "write -P 7 131600 100")
    present = [(r["start"], r["length"]) for r in map_of(run, image=image) if r["depth"] == 0]
    assert present == [(131072, 2048)]
    same_map(run, peer, image)
    model = bytearray(base.read_bytes())
    model[131600:131700] = b"\7" * 100
    (tmp_path / "model.raw").write_bytes(model)
    peer("qemu-img", "compare", "-f", "raw", "-F", "qcow2", tmp_path / "model.raw", image)
    clean(run, peer, image)


def test_zeros_and_discards_reach_single_subclusters(run, peer, tmp_path):
    base, image = base_of(tmp_path, M), tmp_path / "a.qcow2"
    create(run, image, M, "", "-b", base, "-F", "raw")
    io(run, image, "write -P 7 0 64k", "write -z 2k 2k", "write -z 70k 4k", "discard 8k 6k",
       "write -z -u 128k 64k", "discard 256k 64k")
    q = Extended(image)
    assert q.bits(0) == (0xffffffff & ~0b1110010) | 0b1110010 << 32
    assert q.l2(1) == 0 and q.bits(1) == 0b11000 << 32  # not a cluster, only bits
    assert q.l2(2) == 0 and q.bits(2) == 0xffffffff << 32
    same_map(run, peer, image)
    peer_io(peer, image, "read -P 7 0 2k", "read -P 0 2k 2k", "read -P 7 4k 4k", "read -P 0 8k 6k",
            "read -P 0 70k 4k", "read -P 0 128k 64k")
    io(run, image, "discard 0 64k", "read -P 0 0 64k")
    assert (q.l2(0), q.bits(0)) == (0, 0xffffffff << 32)
    clean(run, peer, image)


def test_room_given_ahead_lets_the_backing_file_show(run, peer, tmp_path):
    base = base_of(tmp_path, 3 * M)
    for maker, image in (("ours", tmp_path / "a.qcow2"), ("theirs", tmp_path / "b.qcow2")):
        args = ["-f", "qcow2", "-b", base, "-F", "raw",
                "-o", "extended_l2=on,preallocation=metadata", image, "4M"]
        run("create", "-q", *args) if maker == "ours" else peer("qemu-img", "create", "-q", *args)
        run("compare", "-f", "raw", "-F", "qcow2", base, image)
        same_map(run, peer, image)
        host = Extended(image).l2(5) & OFFSET
        assert host
        io(run, image, "write -P 9 330k 1k")
        assert Extended(image).l2(5) & OFFSET == host and Extended(image).bits(5) == 1 << 5
        peer_io(peer, image, "read -P 9 330k 1k", "read -P 0 3M 1M")
        clean(run, peer, image)
    p = run("create", "-f", "qcow2", "-b", base, "-F", "raw", "-o", "preallocation=metadata",
            tmp_path / "c.qcow2", status=1)
    assert "extended_l2=on" in p.stderr


def test_sizes_change_in_the_middle_of_subclusters(run, peer, tmp_path):
    image = tmp_path / "a.qcow2"
    create(run, image, "1M")
    io(run, image, "write -P 7 0 1M")
    run("resize", "-q", "--shrink", image, str(700 * K + 512))
    clean(run, peer, image)
    run("resize", "-q", image, "40M")
    peer_io(peer, image, f"read -P 7 0 {700 * K + 512}",
            f"read -P 0 {700 * K + 512} {40 * M - 700 * K - 512}")
    run("resize", "-q", "--preallocation=metadata", image, "50M")
    io(run, image, f"read -P 7 0 {700 * K + 512}", "read -P 0 1M 49M")
    clean(run, peer, image)


def test_a_disk_grows_over_a_longer_backing_file_without_showing_it(run, peer, tmp_path):
    base, image = base_of(tmp_path, M), tmp_path / "a.qcow2"
    create(run, image, 300 * K + 512, "", "-b", base, "-F", "raw")
    run("resize", "-q", image, "1M")
    peer_io(peer, image, f"read -P 0 {300 * K + 512} {724 * K - 512}")
    clean(run, peer, image)


def test_compressed_clusters_live_beside_subclusters(run, peer, tmp_path):
    raw, image, back = tmp_path / "a.raw", tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    raw.write_bytes(b"strata" * (M // 3))
    run("convert", "-c", "-O", "qcow2", "-o", "extended_l2=on", raw, image)
    peer("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, image)
    io(run, image, "write -P 3 65000 600", "write -z 128k 2k", "write -z 192k 64k")
    data = bytearray(raw.read_bytes())
    data[65000:65600], data[128 * K:130 * K] = b"\3" * 600, bytes(2 * K)
    data[192 * K:256 * K] = bytes(64 * K)
    raw.write_bytes(data)
    peer("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, image)
    clean(run, peer, image)
    peer("qemu-img", "convert", "-c", "-O", "qcow2", "-o", "extended_l2=on", image, back)
    run("compare", "-f", "raw", "-F", "qcow2", raw, back)


def test_snapshots_of_qemu_img_stay_as_they_were(run, peer, tmp_path):
    image = tmp_path / "a.qcow2"
    create(run, image, "1M")
    io(run, image, "write -P 1 0 300k")
    peer("qemu-img", "snapshot", "-c", "s", image)
    io(run, image, "write -P 2 1k 1k", "write -P 2 66k 500", "write -z 128k 2k", "discard 192k 64k")
    clean(run, peer, image)
    peer_io(peer, image, "read -P 1 0 1k", "read -P 2 1k 1k", "read -P 1 2k 64k",
            "read -P 0 128k 2k", "read -P 1 130k 62k", "read -P 0 192k 64k")
    peer("qemu-img", "snapshot", "-a", "s", image)
    io(run, image, "read -P 1 0 300k", "read -P 0 300k 724k")
    clean(run, peer, image)


def test_snapshots_of_ours_keep_subclusters(run, peer, tmp_path):
    image = tmp_path / "a.qcow2"
    create(run, image, "8M", "cluster_size=16k")
    io(run, image, "write -P 1 0 300k", "write -z 3k 5k", "write -c -P 4 1M 16k")
    run("snapshot", "-c", "one", image)
    io(run, image, "write -P 2 1k 1k", "write -P 2 66k 500", "write -z 128k 2k", "write -P 9 1M 512")
    clean(run, peer, image)
    run("snapshot", "-c", "two", image)
    run("snapshot", "-a", "one", image)
    peer_io(peer, image, "read -P 1 0 3k", "read -P 0 3k 5k", "read -P 1 8k 292k", "read -P 4 1M 16k")
    run("snapshot", "-d", "one", image)
    clean(run, peer, image)
    peer("qemu-img", "snapshot", "-a", "two", image)
    run("snapshot", "-d", "two", image)
    clean(run, peer, image)
    io(run, image, "read -P 2 1k 1k", "read -P 2 66k 500", "read -P 0 128k 2k", "read -P 9 1M 512")


def test_a_stream_has_subclusters_too(strata, peer, tmp_path):
    raw, image = tmp_path / "a.raw", tmp_path / "a.qcow2"
    raw.write_bytes(bytes(M) + random.Random(1).randbytes(70000) + bytes(M // 2))
    with open(image, "wb") as f:
        subprocess.run([strata, "convert", "-O", "qcow2", "-o", "extended_l2=on", raw, "-"],
                       stdout=f, check=True)
    peer("qemu-img", "check", image)
    peer("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, image)


def test_commit_rebase_and_convert_go_over_subclusters(run, peer, tmp_path):
    base, image = base_of(tmp_path, M), tmp_path / "a.qcow2"
    create(run, image, M, "", "-b", base, "-F", "raw")
    io(run, image, "write -P 7 10k 3k", "write -z 100k 4k", "write -P 8 900k 50k")
    model = bytearray(base.read_bytes())
    model[10 * K:13 * K], model[100 * K:104 * K] = b"\7" * (3 * K), bytes(4 * K)
    model[900 * K:950 * K] = b"\x08" * (50 * K)
    want = tmp_path / "want.raw"
    want.write_bytes(model)
    for image_options in ("", "extended_l2=on"):
        flat = tmp_path / "flat.qcow2"
        options = ["-o", image_options] if image_options else []
        run("convert", "-O", "qcow2", *options, image, flat)
        peer("qemu-img", "compare", "-f", "raw", "-F", "qcow2", want, flat)
        clean(run, peer, flat)
    other = base_of(tmp_path, M, 2)
    run("rebase", "-b", other, "-F", "raw", image)
    peer("qemu-img", "compare", "-f", "raw", "-F", "qcow2", want, image)
    clean(run, peer, image)
    run("commit", "-q", image)
    peer("qemu-img", "compare", "-f", "raw", "-F", "raw", want, other)
    clean(run, peer, image)


# ---------------------------------------------------------------- damage

DAMAGE = {
    "both-bits": lambda q: q.set_bits(0, DATA_0 | ZERO_0),
    "both-bits-of-another": lambda q: q.set_bits(0, q.bits(0) | 1 << 63),
    "allocated-without-a-cluster": lambda q: q.set_bits(3, 1 << 7),
    "compressed-with-bits": lambda q: q.set_bits(8, DATA_0),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_bad_bitmaps_are_found_and_not_read(run, peer, tmp_path, kind):
    image = tmp_path / "a.qcow2"
    create(run, image, "1M")
    io(run, image, "write -P 7 0 64k", "write -c -P 9 512k 64k")
    q = Extended(image)
    assert q.l2(0) & COPIED and q.l2(8) & COMPRESSED
    DAMAGE[kind](q)
    ours = run("check", "-f", "qcow2", "--output=json", image, status=2)
    theirs = peer("qemu-img", "check", "-f", "qcow2", "--output=json", image, status=None)
    if kind != "allocated-without-a-cluster":  # theirs does not look there
        assert theirs.returncode == 2
        assert json.loads(ours.stdout)["corruptions"] == json.loads(theirs.stdout)["corruptions"]
    if kind == "compressed-with-bits":
        io(run, image, "read -P 9 512k 64k")  # the data are read all the same, by both
        run("check", "-r", "all", image)
        assert q.bits(8) == 0
        clean(run, peer, image)
        return
    at = "192k" if kind == "allocated-without-a-cluster" else "0"
    for command in (f"read {at} 512", f"write {at} 512", f"write -z {at} 4k"):
        p = io(run, image, command, status=1)
        assert "Input/output error" in p.stdout + p.stderr, command
    io(run, image, "write 64k 4k", "read 128k 4k")  # the others are as good as before


def test_a_header_with_clusters_too_small_for_subclusters_is_refused(run, peer, tmp_path):
    image = tmp_path / "a.qcow2"
    run("create", "-q", "-f", "qcow2", "-o", "cluster_size=8k", image, "1M")
    q = Qcow2(image)
    q.set64(72, 1 << 4)
    p = run("map", "-f", "qcow2", image, status=1)
    assert "cluster_bits 13 is below 14" in p.stderr
    peer("qemu-img", "info", "-f", "qcow2", image, status=1)
