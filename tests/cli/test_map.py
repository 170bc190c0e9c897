# SPDX-License-Identifier: MIT
"""map of raw files, compared with qemu-img."""
import json
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
from images import NOT_DISKS, assert_one_line_error  # noqa: E402


@pytest.fixture
def sparse(tmp_path):
    path = tmp_path / "a.raw"
    with open(path, "wb") as f:
        f.truncate(1 << 20)
        for at in (0, 4096, 65536, (1 << 20) - 4096):
            f.seek(at)
            f.write(b"x" * 4096)
    return path


def as_qemu(out):
    runs = json.loads(out)
    for r in runs:
        r.pop("compressed", None)  # newer than the peer's version
    return runs


def test_json_is_what_qemu_img_says(run, peer, sparse):
    ours = run("map", "--output=json", sparse).stdout
    assert as_qemu(ours) == json.loads(peer("qemu-img", "map", "--output=json", sparse).stdout)
    assert all(r["compressed"] is False for r in json.loads(ours))


def test_human_is_what_qemu_img_says(run, peer, sparse):
    assert run("map", sparse).stdout == peer("qemu-img", "map", sparse).stdout


def test_a_part(run, peer, sparse):
    args = ["-s", "5k", "--max-length", "61k", "--output=json"]
    ours = as_qemu(run("map", *args, sparse).stdout)
    theirs = json.loads(peer("qemu-img", "map", "--start-offset=5k", "--max-length=61k",
                             "--output=json", sparse).stdout)
    assert ours == theirs


def test_runs_cover_the_disk_without_gaps(run, sparse):
    at = 0
    for r in json.loads(run("map", "--output=json", sparse).stdout):
        assert r["start"] == at and r["length"] > 0
        at += r["length"]
    assert at == 1 << 20


def test_empty_disk_is_an_empty_list(run, tmp_path):
    (tmp_path / "a").touch()
    assert json.loads(run("map", "--output=json", tmp_path / "a").stdout) == []


def test_start_behind_the_end(run, sparse):
    p = run("map", "-s", "2M", sparse, status=1)
    assert_one_line_error(p, "2097152 is behind the end of the disk (1048576 bytes)")


def test_a_window_of_a_file_shows_the_files_offsets(run, sparse):
    p = run("map", "--output=json", "--image-opts",
            f"driver=raw,offset=64k,size=4k,file.filename={sparse}")
    assert as_qemu(p.stdout) == [{"start": 0, "length": 4096, "depth": 0, "present": True,
                                  "zero": False, "data": True, "offset": 65536}]


@pytest.mark.parametrize("what", NOT_DISKS)
def test_what_is_no_disk_is_refused_at_once(run, tmp_path, what):
    make, parts = NOT_DISKS[what]
    make(tmp_path / "x")
    assert_one_line_error(run("map", tmp_path / "x", status=1, timeout=10), "map: ", *parts)
