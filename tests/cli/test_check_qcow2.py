# SPDX-License-Identifier: MIT
"""check of qcow2: statuses 0, 1, 2 and 3 and the figures, compared with qemu-img."""
import json
import os
import struct
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
from images import assert_one_line_error  # noqa: E402

CLUSTER = 65536


@pytest.fixture
def image(peer, tmp_path):
    """64 MiB with three runs of data; the L1 table has one L2 table."""
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    peer("qemu-io", "-c", "write 2M 1M", "-c", "write 0 1M", "-c", "write 8M 64k", path)
    return path


def word(path, offset, value=None):
    with open(path, "r+b") as f:
        f.seek(offset)
        if value is None:
            return struct.unpack(">Q", f.read(8))[0]
        f.write(struct.pack(">Q", value))


def l2_offset(path):
    return word(path, word(path, 40)) & 0x00fffffffffffe00


def leak(path):
    word(path, l2_offset(path), 0)


def corrupt(path):
    entry = l2_offset(path)
    word(path, entry, word(path, entry + 8))  # two guest clusters share one host cluster


def test_clean(run, peer, image):
    ours = json.loads(run("check", "--output=json", image).stdout)
    theirs = json.loads(peer("qemu-img", "check", "--output=json", image).stdout)
    assert {k: ours[k] for k in theirs} == theirs
    assert (ours["corruptions"], ours["leaks"], ours["check-errors"]) == (0, 0, 0)
    assert run("check", image).stdout == peer("qemu-img", "check", image).stdout


def test_leak_is_3(run, peer, image):
    leak(image)
    before = image.read_bytes()
    p = run("check", "--output=json", image, status=3)
    theirs = json.loads(peer("qemu-img", "check", "--output=json", image, status=3).stdout)
    ours = json.loads(p.stdout)
    assert ours["leaks"] == theirs["leaks"] == 1
    assert ours["corruptions"] == 0
    assert len(p.stderr.splitlines()) == 1
    assert image.read_bytes() == before
    assert "1 leaked clusters were found on the image." in run("check", image, status=3).stdout


def test_corruption_is_2(run, peer, image):
    corrupt(image)
    ours = json.loads(run("check", "--output=json", image, status=2).stdout)
    theirs = json.loads(peer("qemu-img", "check", "--output=json", image, status=2).stdout)
    assert (ours["corruptions"], ours["leaks"]) == (theirs["corruptions"], theirs["leaks"])
    assert "errors were found on the image." in run("check", image, status=2).stdout


@pytest.mark.parametrize("damage, status", [(None, 0), (leak, 3), (corrupt, 2)])
def test_quiet_says_nothing(run, image, damage, status):
    if damage:
        damage(image)
    p = run("check", "-q", image, status=status)
    assert (p.stdout, p.stderr) == ("", "")


def test_a_ruined_image_does_not_flood(run, image):
    for i in range(1024):
        word(image, l2_offset(image) + 8 * i, (1 << 63) | 0x1001 | i << 20)
    p = run("check", image, status=2)
    assert len(p.stderr.splitlines()) <= 1001


def test_backing_file_is_not_opened(run, peer, tmp_path):
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "gone", "-F", "raw",
         tmp_path / "a", "1M")
    run("check", tmp_path / "a")


def test_progress(run, image):
    p = run("check", "--progress=json", image)
    rows = [json.loads(line)["progress"] for line in p.stderr.splitlines()]
    assert rows[-1]["percent"] == 100


def test_not_an_image_of_that_format_is_1(run, tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 65536)
    assert_one_line_error(run("check", "-f", "qcow2", tmp_path / "a", status=1), str(tmp_path / "a"))


def test_an_image_in_use_by_a_writer(run, image):
    import subprocess
    user = subprocess.Popen(["qemu-io", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert user.stdout.read(1)
        p = run("check", image, status=1)
        assert_one_line_error(p, str(user.pid))
        run("check", "-U", image)
    finally:
        user.stdin.close()
        user.wait()
        user.stdout.close()
