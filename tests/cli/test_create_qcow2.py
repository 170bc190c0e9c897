# SPDX-License-Identifier: MIT
"""create of qcow2: options, backing files, and what qemu-img says about the result."""
import json
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
from images import assert_one_line_error  # noqa: E402


@pytest.fixture
def told(peer):
    """What qemu-img says about an image that is consistent."""
    def call(path):
        peer("qemu-img", "check", "-q", path)
        return json.loads(peer("qemu-img", "info", "--output=json", path).stdout)
    return call


@pytest.mark.parametrize("options, key, value", [
    ("cluster_size=4k", "cluster-size", 4096),
    ("cluster_size=512", "cluster-size", 512),
    ("cluster_size=2M", "cluster-size", 2 << 20),
    ("compat=0.10", "compat", "0.10"),
    ("compression_type=zstd", "compression-type", "zstd"),
    ("lazy_refcounts=on", "lazy-refcounts", True),
    ("refcount_bits=64", "refcount-bits", 64),
])
def test_options_reach_the_image(run, told, tmp_path, options, key, value):
    path = tmp_path / "a"
    run("create", "-f", "qcow2", "-o", options, path, "100M")
    j = told(path)
    assert {**j, **j["format-specific"]["data"]}[key] == value
    assert (j["virtual-size"], j["format"]) == (100 << 20, "qcow2")


def test_several_options_texts_are_joined(run, told, tmp_path):
    run("create", "-f", "qcow2", "-o", "cluster_size=4k,refcount_bits=8", "-o", "cluster_size=8k",
        tmp_path / "a", "1M")
    j = told(tmp_path / "a")
    assert (j["cluster-size"], j["format-specific"]["data"]["refcount-bits"]) == (8192, 8)


def test_a_new_image_reads_as_zeros(run, peer, tmp_path):
    run("create", "-f", "qcow2", tmp_path / "a", "5M")
    run("create", "-f", "raw", tmp_path / "b", "5M")
    peer("qemu-img", "compare", tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_preallocation(run, told, tmp_path, mode):
    run("create", "-f", "qcow2", "-o", f"preallocation={mode}", tmp_path / "a", "10M")
    told(tmp_path / "a")
    if mode != "metadata":
        assert os.stat(tmp_path / "a").st_blocks * 512 >= 10 << 20


def test_overlay_takes_the_size_of_its_backing_file(run, told, tmp_path):
    run("create", "-f", "qcow2", "base.qcow2", "123M", cwd=tmp_path)
    p = run("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "a", cwd=tmp_path)
    assert p.stdout == ("Formatting 'a', fmt=qcow2 size=128974848 backing_file=base.qcow2 "
                        "backing_fmt=qcow2\n")
    j = told(tmp_path / "a")
    assert (j["virtual-size"], j["backing-filename"], j["backing-filename-format"]) == (
        123 << 20, "base.qcow2", "qcow2")


def test_overlay_may_be_larger(run, told, tmp_path):
    run("create", "-f", "raw", "base.raw", "1M", cwd=tmp_path)
    run("create", "-f", "qcow2", "-o", "backing_file=base.raw,backing_fmt=raw", "a", "2M",
        cwd=tmp_path)
    assert told(tmp_path / "a")["virtual-size"] == 2 << 20


def test_backing_name_is_seen_from_the_new_images_folder(run, told, tmp_path):
    (tmp_path / "d").mkdir()
    run("create", "d/base.raw", "1M", cwd=tmp_path)
    run("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "d/a", cwd=tmp_path)
    assert told(tmp_path / "d/a")["full-backing-filename"] == str(tmp_path / "d/base.raw")
    p = run("create", "-f", "qcow2", "-b", "d/base.raw", "-F", "raw", "d/b", cwd=tmp_path, status=1)
    assert_one_line_error(p, "d/d/base.raw", "No such file or directory")
    assert "-u" in p.stderr


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_backing_file_without_its_format_is_refused_with_the_flag(run, tmp_path, fmt):
    run("create", "-f", fmt, "base", "1M", cwd=tmp_path)
    p = run("create", "-f", "qcow2", "-b", "base", "a", cwd=tmp_path, status=1)
    assert_one_line_error(p, "backing file 'base' is given without its format")
    assert f"-F {fmt}" in p.stderr
    assert os.listdir(tmp_path) == ["base"]


def test_unsafe_records_a_backing_file_that_is_not_there(run, tmp_path):
    run("create", "-f", "qcow2", "-u", "-b", "gone", "-F", "raw", "a", "1M", cwd=tmp_path)
    j = json.loads(run("info", "--output=json", "a", cwd=tmp_path).stdout)
    assert j["backing-filename"] == "gone"
    p = run("create", "-f", "qcow2", "-u", "-b", "gone", "-F", "raw", "b", cwd=tmp_path, status=1)
    assert_one_line_error(p, "a size is missing")


@pytest.mark.parametrize("args, text", [
    (["-b", "gone", "-F", "raw", "a"], "backing file: gone"),
    (["-b", "a", "-F", "raw", "a", "1M"], "backing file: a"),
    (["-F", "raw", "a", "1M"], "-F needs a backing file (-b)"),
    (["-b", "base", "-F", "nope", "a"], "option '-F': unknown format 'nope'"),
    (["-b", "base", "-F", "qcow2", "a"], "base"),
    (["-b", "base", "-o", "backing_file=base", "-F", "raw", "a"],
     "-b and -o backing_file=... say the same"),
    (["-o", "cluster_size=513", "a", "1M"], "option 'cluster_size': 513 is not a power of two"),
    (["-o", "cluster_size=256", "a", "1M"], "option 'cluster_size'"),
    (["-o", "cluster_size=4M", "a", "1M"],
     "option 'cluster_size': 4194304 is not between 512 B and 2 MiB"),
    (["-o", "refcount_bits=3", "a", "1M"], "option 'refcount_bits': 3 is not a power of two"),
    (["-o", "extended_l2=on,cluster_size=4k", "a", "1M"], "extended_l2"),
    (["-o", "compat=0.10,lazy_refcounts=on", "a", "1M"], "lazy_refcounts"),
    (["-o", "cluster_size=512", "a", "8000T"], "a"),
])
def test_misuse_is_one_clear_line_and_makes_nothing(run, tmp_path, args, text):
    (tmp_path / "base").write_bytes(b"x" * 4096)
    p = run("create", "-f", "qcow2", *args, status=1, cwd=tmp_path)
    assert_one_line_error(p, text)
    assert os.listdir(tmp_path) == ["base"]


def test_an_image_cannot_be_its_own_backing_file(run, tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 4096)
    (tmp_path / "link").symlink_to("a")
    p = run("create", "-f", "qcow2", "-b", "link", "-F", "raw", "a", cwd=tmp_path, status=1)
    assert_one_line_error(p, "its own backing file")
    assert (tmp_path / "a").read_bytes() == b"x" * 4096


def test_option_help(run):
    out = run("create", "-f", "qcow2", "-o", "help").stdout
    assert "cluster_size=SIZE" in out
    assert "(power of two, 512 B to 2 MiB; default 64 KiB)" in out
