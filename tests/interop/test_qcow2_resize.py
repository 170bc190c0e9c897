# SPDX-License-Identifier: MIT
"""Growing a qcow2 disk: what was there stays, what is new reads as zeros, qemu-img agrees."""
import json

import pytest

KIB, MIB = 1 << 10, 1 << 20


def create(run, image, size, options):
    run("create", "-q", "-f", "qcow2", "-o", options, image, size)


def io(run, image, *commands, status=0):
    args = [x for c in commands for x in ("-c", c)]
    return run("io", "-f", "qcow2", *args, image, status=status)


def clean(peer, run, image):
    p = peer("qemu-img", "check", "-f", "qcow2", image, status=None)
    assert p.returncode == 0, p.stdout + p.stderr
    run("check", "-f", "qcow2", image)


def size_of(peer, image):
    return json.loads(peer("qemu-img", "info", "--output=json", image).stdout)["virtual-size"]


@pytest.mark.parametrize("options", ["cluster_size=512", "cluster_size=512,refcount_bits=64",
                                     "cluster_size=4k,refcount_bits=1", "cluster_size=64k",
                                     "cluster_size=2M", "cluster_size=4k,compat=0.10"])
def test_growth_step_by_step_keeps_content_and_counts(run, peer, tmp_path, options):
    """From a few clusters of L1 table to many: in place, moved, and moved over several blocks."""
    image = tmp_path / "a.qcow2"
    size = 100 * KIB + 512
    create(run, image, size, options)
    io(run, image, f"write -P 7 0 {size}")
    marks = [(0, size)]
    for grown in [300 * KIB, 3 * MIB + 512, 40 * MIB, 150 * MIB + 1024]:
        io(run, image, f"truncate {grown}", f"read -P 0 {size} {grown - size}",
           f"write -P 7 {grown - 512} 512")
        clean(peer, run, image)
        assert size_of(peer, image) == grown
        marks.append((grown - 512, 512))
        peer("qemu-io", "-f", "qcow2", *[x for o, n in marks for x in ("-c", f"read -P 7 {o} {n}")],
             image)
        size = grown


def test_bytes_behind_the_old_end_do_not_come_to_light(run, peer, tmp_path):
    """Another writer may have left anything there."""
    image = tmp_path / "a.qcow2"
    create(run, image, 64 * KIB + 512, "cluster_size=64k")
    io(run, image, f"write -P 7 0 {64 * KIB + 512}")
    rows = json.loads(peer("qemu-img", "map", "--output=json", image).stdout)
    host = rows[-1]["offset"] + rows[-1]["length"]
    with open(image, "r+b") as f:
        f.seek(host)
        f.write(b"\xee" * (63 * KIB))
    io(run, image, f"truncate {MIB}", f"read -P 7 {64 * KIB} 512",
       f"read -P 0 {64 * KIB + 512} {MIB - 64 * KIB - 512}")
    clean(peer, run, image)


def test_growth_with_a_snapshot_leaves_the_snapshot_alone(run, peer, tmp_path):
    image, out = tmp_path / "a.qcow2", tmp_path / "out.raw"
    create(run, image, MIB + 512, "cluster_size=64k")
    io(run, image, f"write -P 7 0 {MIB + 512}")
    peer("qemu-img", "snapshot", "-c", "then", image)
    io(run, image, f"truncate {3 * MIB}", f"read -P 7 {MIB} 512", f"read -P 0 {MIB + 512} {MIB}",
       "write -P 9 0 2M")
    clean(peer, run, image)
    peer("qemu-img", "convert", "-l", "then", "-O", "raw", image, out)
    assert out.read_bytes()[:MIB + 512] == b"\7" * (MIB + 512)
    listed = json.loads(peer("qemu-img", "info", "--output=json", image).stdout)["snapshots"]
    assert [s["name"] for s in listed] == ["then"]


def test_version_2_with_snapshots_is_not_grown(run, peer, tmp_path):
    image = tmp_path / "a.qcow2"
    create(run, image, MIB, "compat=0.10")
    peer("qemu-img", "snapshot", "-c", "then", image)
    p = io(run, image, "truncate 2M", status=1)
    assert "version 2 image with internal snapshots cannot change its size" in p.stdout + p.stderr
    assert size_of(peer, image) == MIB


def test_growth_beyond_the_largest_l1_table_is_refused(run, peer, tmp_path):
    image = tmp_path / "a.qcow2"
    create(run, image, MIB, "cluster_size=512")
    p = io(run, image, "truncate 129G", status=1)
    assert "the limit is 4194304" in p.stdout + p.stderr
    clean(peer, run, image)


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=4k,compat=0.10"])
def test_growth_with_room_ahead(run, peer, tmp_path, options, mode):
    image = tmp_path / "a.qcow2"
    create(run, image, MIB + 512, options)
    io(run, image, "write -P 7 0 1M", f"truncate -m {mode} 9M", f"read -P 7 0 1M",
       f"read -P 0 1M 8M")
    clean(peer, run, image)
    rows = json.loads(peer("qemu-img", "map", "--output=json", image).stdout)
    assert all("offset" in r for r in rows if r["start"] >= 2 * MIB)
