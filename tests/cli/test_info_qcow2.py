# SPDX-License-Identifier: MIT
"""info on qcow2: the same answers as qemu-img, chains, trust, and damaged headers."""
import json
import os
import struct
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
from images import assert_one_line_error  # noqa: E402


@pytest.fixture
def qcow2(peer, tmp_path):
    def make(name="a.qcow2", *args, size="64M", **kw):
        peer("qemu-img", "create", "-q", "-f", "qcow2", *args, name, size, cwd=tmp_path)
        return tmp_path / name
    return make


def patch(path, offset, data):
    with open(path, "r+b") as f:
        f.seek(offset)
        f.write(data)


def info(run, *args, **kw):
    """Without what 7.2 does not have: the files below, and (ours) what is wrong."""
    got = json.loads(run("info", "--output=json", *args, **kw).stdout)
    for image in got if isinstance(got, list) else [got]:
        children = image.pop("children")
        assert [c["name"] for c in children] == ["file"]
        image.pop("problems", None)
    return got


@pytest.mark.parametrize("options", [
    "cluster_size=64k", "compat=0.10", "cluster_size=512", "cluster_size=2M",
    "compression_type=zstd", "lazy_refcounts=on", "refcount_bits=1", "refcount_bits=64",
])
def test_json_is_what_qemu_img_says(run, peer, qcow2, options):
    path = qcow2("a.qcow2", "-o", options)
    theirs = json.loads(peer("qemu-img", "info", "--output=json", path).stdout)
    assert info(run, path) == theirs


def test_human_has_the_lines_of_qemu_img(run, peer, qcow2, tmp_path):
    qcow2("base.qcow2")
    path = qcow2("a.qcow2", "-b", "base.qcow2", "-F", "qcow2")
    theirs = peer("qemu-img", "info", path).stdout
    assert sorted(run("info", path).stdout.splitlines()) == sorted(theirs.splitlines())


def test_overlay_names_its_backing_file(run, peer, qcow2, tmp_path):
    qcow2("base.qcow2")
    path = qcow2("a.qcow2", "-b", "base.qcow2", "-F", "qcow2")
    theirs = json.loads(peer("qemu-img", "info", "--output=json", path).stdout)
    assert info(run, path) == theirs
    assert theirs["full-backing-filename"] == str(tmp_path / "base.qcow2")


def test_backing_chain_is_what_qemu_img_says(run, peer, qcow2):
    qcow2("0.qcow2")
    for i in range(1, 4):
        path = qcow2(f"{i}.qcow2", "-b", f"{i - 1}.qcow2", "-F", "qcow2")
    theirs = json.loads(peer("qemu-img", "info", "--output=json", "--backing-chain", path).stdout)
    assert info(run, "--backing-chain", path) == theirs
    assert len(theirs) == 4


def test_dirty_flag(run, peer, qcow2):
    path = qcow2("a.qcow2", "-o", "lazy_refcounts=on")
    patch(path, 79, b"\x01")  # incompatible feature bit 0
    theirs = json.loads(peer("qemu-img", "info", "--output=json", path).stdout)
    assert theirs["dirty-flag"] is True
    assert info(run, path) == theirs
    assert "cleanly shut down: no\n" in run("info", path).stdout


def test_a_missing_backing_file_matters_only_to_the_chain(run, qcow2):
    path = qcow2("a.qcow2", "-u", "-b", "gone.qcow2", "-F", "qcow2")
    assert info(run, path)["backing-filename"] == "gone.qcow2"
    p = run("info", "--backing-chain", path, status=1)
    assert_one_line_error(p, str(path), "gone.qcow2", "No such file or directory")


def test_a_hostile_backing_name_is_shown_safely(run, qcow2):
    path = qcow2("a.qcow2", "-u", "-b", "x\x1b]0;owned\x07", "-F", "qcow2")
    assert "backing file: x\\x1b]0;owned\\x07 (actual path: " in run("info", path).stdout
    assert info(run, path)["backing-filename"] == "x\x1b]0;owned\x07"


def test_trust_decides_what_a_chain_may_name(run, qcow2, tmp_path):
    (tmp_path / "in").mkdir()
    qcow2("secret.qcow2")
    path = qcow2("in/a.qcow2", "-b", "../secret.qcow2", "-F", "qcow2")
    p = run("info", "--backing-chain", path, status=1)
    assert_one_line_error(p, "outside the image's own folder")
    assert "--trust local" in p.stderr
    assert len(info(run, "--backing-chain", "--trust=local", path)) == 2
    run("info", "--backing-chain", "--trust=none", path, status=1)
    run("info", "--trust=none", path)


def test_a_chain_that_comes_back_is_refused(run, qcow2):
    qcow2("b.qcow2", "-u", "-b", "a.qcow2", "-F", "qcow2")
    path = qcow2("a.qcow2", "-u", "-b", "b.qcow2", "-F", "qcow2")
    assert_one_line_error(run("info", "--backing-chain", path, status=1, timeout=10), "comes back")
    assert info(run, path)["backing-filename"] == "b.qcow2"


def test_a_chain_may_be_256_images_long_and_no_longer(run, tmp_path):
    """Each layer costs stack while it is opened and closed."""
    run("create", "-q", "-f", "qcow2", "0", "1M", cwd=tmp_path)
    for i in range(1, 257):
        run("create", "-q", "-f", "qcow2", "-u", "-b", i - 1, "-F", "qcow2", i, "1M", cwd=tmp_path)
    assert len(info(run, "--backing-chain", "255", cwd=tmp_path)) == 256
    runs = json.loads(run("map", "--output=json", "255", cwd=tmp_path).stdout)
    assert [r["depth"] for r in runs] == [255]
    for verb in ("map", "info"):
        p = run(verb, "--backing-chain" if verb == "info" else "-U", "256", cwd=tmp_path, status=1)
        assert "the backing chain is longer than 256 images" in p.stderr


# ---- damaged headers: (offset, bytes)

LIES = {
    "cluster-bits-0": (20, struct.pack(">I", 0)),
    "cluster-bits-8": (20, struct.pack(">I", 8)),
    "cluster-bits-22": (20, struct.pack(">I", 22)),
    "cluster-bits-63": (20, struct.pack(">I", 63)),
    "version-9": (4, struct.pack(">I", 9)),
    "size-overflow": (24, struct.pack(">Q", 1 << 63)),
    "l1-size-max": (36, struct.pack(">I", 0xffffffff)),
    "l1-size-too-small": (24, struct.pack(">Q", 1 << 50)),
    "l1-unaligned": (40, struct.pack(">Q", 0x30001)),
    "l1-beyond": (40, struct.pack(">Q", 0xffffffffffff0000)),
    "l1-over-header": (40, struct.pack(">Q", 0)),
    "reftable-unaligned": (48, struct.pack(">Q", 513)),
    "reftable-beyond": (48, struct.pack(">Q", 0x7fffffffffff0000)),
    "reftable-clusters-max": (56, struct.pack(">I", 0xffffffff)),
    "refcount-order-7": (96, struct.pack(">I", 7)),
    "header-length-0": (100, struct.pack(">I", 0)),
    "header-length-max": (100, struct.pack(">I", 0xffffffff)),
    "unknown-feature": (72, struct.pack(">Q", 1 << 40)),
    "crypt-method-9": (32, struct.pack(">I", 9)),
    "backing-offset-beyond": (8, struct.pack(">QI", 1 << 60, 10)),
    "backing-length-max": (8, struct.pack(">QI", 4096, 0xffffffff)),
    "snapshots-max": (60, struct.pack(">I", 0xffffffff)),
}


@pytest.mark.parametrize("verb,lie", [(v, lie) for v in ("info", "map") for lie in LIES
                                      if (v, lie) != ("info", "unknown-feature")])
def test_a_header_that_lies_is_refused_in_one_line(run, qcow2, verb, lie):
    path = qcow2()
    patch(path, *LIES[lie])
    before = path.read_bytes()
    assert_one_line_error(run(verb, path, status=1, timeout=10), str(path))
    assert path.read_bytes() == before


@pytest.mark.parametrize("length", [4, 50, 71, 100, 512, 65535])
def test_a_truncated_header(run, qcow2, length):
    path = qcow2()
    os.truncate(path, length)
    p = run("info", path, status=None, timeout=10)
    assert p.returncode in (0, 1)
    if p.returncode:
        assert_one_line_error(p, str(path))


# ---- what is wrong, in words


def problems(run, path):
    got = json.loads(run("info", "--output=json", path).stdout).get("problems", [])
    human = run("info", path).stdout
    for text in got:
        assert f"    {text}\n" in human.split("Problems:\n")[1]
    assert got or "Problems" not in human
    return "\n".join(got)


def test_a_sound_image_has_no_problems(run, qcow2):
    assert problems(run, qcow2()) == ""


@pytest.mark.parametrize("offset,data,words", [
    (79, b"\x02", "marked corrupt"),
    (79, b"\x01", "not closed"),
    (88, b"\x40", "unknown feature 62 (bit 62)"),
    (72, b"\x40", "cannot be used"),
    (35, b"\x01", "encrypted"),
], ids=["corrupt", "dirty", "autoclear", "incompatible", "aes"])
def test_marks_in_the_header_are_told_in_words(run, qcow2, offset, data, words):
    path = qcow2()
    patch(path, offset, data)
    assert words in problems(run, path)


def test_a_missing_backing_file_is_told(run, qcow2, tmp_path):
    path = qcow2("a.qcow2", "-u", "-b", "gone.qcow2", "-F", "qcow2")
    assert str(tmp_path / "gone.qcow2") in problems(run, path)
    qcow2("gone.qcow2")
    assert problems(run, path) == ""


def test_a_backing_file_without_format_is_told(run, qcow2):
    path = qcow2("a.qcow2", "-o", "compat=0.10")
    patch(path, 72, bytes(8) + b"b")
    patch(path, 8, struct.pack(">QI", 80, 1))
    assert "not recorded" in problems(run, path)


def test_a_file_that_was_cut_off_is_told(run, peer, qcow2):
    path = qcow2()
    peer("qemu-io", "-f", "qcow2", "-c", "write 0 1M", "-c", "write 60M 1M", path)
    for size in (os.stat(path).st_size - 65536, 5 * 65536, 4 * 65536 + 100):
        os.truncate(path, size)
        assert f"ends at {size}" in problems(run, path)


def test_an_encrypted_image_is_described_as_qemu_img_does(run, peer, create_luks, tmp_path):
    create_luks(tmp_path / "luks")
    peer("qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=abc", "-o",
         "encrypt.format=aes,encrypt.key-secret=s", tmp_path / "aes", "1M")
    for path in tmp_path / "luks", tmp_path / "aes":
        theirs = json.loads(peer("qemu-img", "info", "--output=json", path).stdout)
        assert info(run, path) == theirs


def test_children_are_those_of_newer_versions(run, qcow2):
    """The form of QEMU 8 and later: length in whole sectors."""
    path = qcow2("a.qcow2", size="10M")
    child = json.loads(run("info", "--output=json", path).stdout)["children"][0]
    assert child["name"] == "file"
    assert child["info"]["format"] == "file"
    assert child["info"]["filename"] == str(path)
    assert child["info"]["virtual-size"] == -(-os.stat(path).st_size // 512) * 512
    assert child["info"]["children"] == []
