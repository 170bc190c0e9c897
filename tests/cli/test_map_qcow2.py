# SPDX-License-Identifier: MIT
"""map of qcow2 images and chains, compared with qemu-img run by run."""
import json
import time

import pytest


def as_qemu(run, *args):
    runs = json.loads(run("map", "--output=json", *args).stdout)
    for r in runs:
        del r["compressed"]  # newer than the peer's version
    return runs


@pytest.fixture
def same(run, peer):
    def call(path, *args):
        theirs = json.loads(peer("qemu-img", "map", "--output=json", *args, path).stdout)
        assert as_qemu(run, *args, path) == theirs
        return theirs
    return call


@pytest.fixture
def qemu(peer, tmp_path):
    def create(name, *args):
        peer("qemu-img", "create", "-q", "-f", "qcow2", name, *args, cwd=tmp_path)
        return tmp_path / name

    def io(path, *commands):
        peer("qemu-io", *[x for c in commands for x in ("-c", c)], path)
    create.io = io
    return create


@pytest.mark.parametrize("cluster", ["512", "4k", "64k"])
def test_data_zeros_and_holes(qemu, same, cluster):
    path = qemu("a", "-o", f"cluster_size={cluster}", "32M")
    qemu.io(path, "write 0 64k", "write 10M 3M", "write -z 6M 2M", "write 31M 1M", "write -z 0 4k")
    same(path)


def test_a_hole_inside_a_data_cluster_reads_as_zeros(run, peer, qemu):
    """qemu-img does not look into the file here; the runs are otherwise the same."""
    path = qemu("a", "-o", "cluster_size=2M", "8M")
    qemu.io(path, "write 4M 64k")
    theirs = json.loads(peer("qemu-img", "map", "--output=json", path).stdout)
    head, tail = [r for r in as_qemu(run, path) if r["data"]]
    assert (head["start"], head["length"], head["zero"]) == (4 << 20, 65536, False)
    assert (tail["zero"], tail["offset"]) == (True, head["offset"] + 65536)
    assert head["length"] + tail["length"] == [r for r in theirs if r["data"]][0]["length"]


def test_fragmented_runs_are_not_joined(qemu, same):
    path = qemu("a", "1M")
    qemu.io(path, "write 128k 64k", "write 64k 64k", "write 0 64k")
    assert len(same(path)) == 4


def test_preallocated_metadata(qemu, same):
    same(qemu("a", "-o", "preallocation=metadata", "100M"))


def test_allocated_zero_clusters(qemu, same):
    path = qemu("a", "-o", "preallocation=full", "4M")
    qemu.io(path, "write -z 1M 1M", "write 3M 512k")
    same(path)


def test_chain(qemu, same, tmp_path):
    base = qemu("base", "16M")
    qemu.io(base, "write 0 8M", "write -z 9M 1M")
    mid = qemu("mid", "-b", "base", "-F", "qcow2", "32M")
    qemu.io(mid, "write 1M 1M", "write 20M 1M")
    top = qemu("top", "-b", "mid", "-F", "qcow2", "64M")
    qemu.io(top, "write 3M 64k", "write -z 20M 512k", "write 63M 1M")
    assert {r["depth"] for r in same(top)} >= {0, 1, 2}


def test_raw_backing_file_with_holes(qemu, same, tmp_path):
    with open(tmp_path / "base", "wb") as f:
        f.truncate(8 << 20)
        f.seek(2 << 20)
        f.write(b"x" * (1 << 20))
    top = qemu("top", "-b", "base", "-F", "raw")
    qemu.io(top, "write 2560k 64k")
    same(top)


def test_a_part(qemu, same):
    path = qemu("a", "32M")
    qemu.io(path, "write 1M 8M")
    same(path, "--start-offset=5000000", "--max-length=20M")


def test_compressed_clusters_have_no_offset(run, peer, qemu, tmp_path):
    (tmp_path / "raw").write_bytes(b"x" * (1 << 20))
    peer("qemu-img", "convert", "-c", "-O", "qcow2", "raw", "a", cwd=tmp_path)
    runs = json.loads(run("map", "--output=json", tmp_path / "a").stdout)
    assert runs == [{"start": 0, "length": 1 << 20, "depth": 0, "present": True, "zero": False,
                     "data": True, "compressed": True}]
    lines = run("map", tmp_path / "a").stdout.splitlines()
    assert lines[1].split() == ["0", "0x100000", "compressed", str(tmp_path / "a")]


def test_human_form_of_a_chain(run, peer, qemu):
    qemu.io(qemu("base", "4M"), "write 0 1M")
    top = qemu("top", "-b", "base", "-F", "qcow2")
    qemu.io(top, "write 512k 64k", "write -z 2M 1M")
    assert run("map", top).stdout == peer("qemu-img", "map", top).stdout


def test_a_preallocated_tebibyte_is_quick(run, tmp_path):
    path = tmp_path / "a"
    run("create", "-f", "qcow2", "-o", "preallocation=metadata", path, "1T")
    start = time.monotonic()
    runs = json.loads(run("map", "--output=json", path).stdout)
    took = time.monotonic() - start
    assert sum(r["length"] for r in runs) == 1 << 40
    assert took < 20, f"{took:.1f} s"
