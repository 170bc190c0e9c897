# SPDX-License-Identifier: MIT
"""create, on raw images: sizes, options, and what must not be touched."""
import os
import subprocess
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
from images import assert_one_line_error, without_root  # noqa: E402


def test_raw_is_the_default_and_sparse(run, tmp_path):
    p = run("create", tmp_path / "a", "8M")
    assert p.stdout == f"Formatting '{tmp_path}/a', fmt=raw size=8388608\n"
    st = os.stat(tmp_path / "a")
    assert (st.st_size, st.st_blocks) == (8 << 20, 0)


def test_quiet(run, tmp_path):
    assert run("create", "-q", tmp_path / "a", "1M").stdout == ""


def test_size_may_be_an_option(run, tmp_path):
    run("create", "-f", "raw", "-o", "size=1.5M", tmp_path / "a")
    assert os.stat(tmp_path / "a").st_size == 3 << 19


def test_full_preallocation_allocates(run, tmp_path):
    run("create", "-o", "preallocation=full", tmp_path / "a", "1M")
    assert os.stat(tmp_path / "a").st_blocks * 512 >= 1 << 20


@pytest.mark.parametrize("word", ["help", "?", "size=1M,help"])
def test_option_help_lists_the_rows_and_makes_nothing(run, tmp_path, word):
    p = run("create", "-f", "raw", "-o", word, tmp_path / "a", "1M")
    assert "preallocation=off|metadata|falloc|full" in p.stdout
    assert "size=SIZE" in p.stdout
    assert os.listdir(tmp_path) == []
    run("create", "-f", "raw", "-o", "help")


@pytest.mark.parametrize("args, text", [
    ([], "arguments are missing: create takes FILE [SIZE]"),
    (["a"], "a size is missing"),
    (["a", "1x"], "size '1x' is not a size"),
    (["a", "-o", "size=1M", "1M"], "SIZE and -o size=... say the same: give one of them"),
    (["-f", "nope", "a", "1M"], "unknown format 'nope'"),
    (["-o", "sise=1", "a", "1M"], "unknown option 'sise'"),
    (["-o", "preallocation=some", "a", "1M"],
     "option 'preallocation': expected one of off, metadata, falloc, full, found 'some'"),
    (["-b", "b", "-F", "raw", "a", "1M"],
     "-b does not apply to format 'raw': it has no option 'backing_file'"),
    (["-o", "a..b=1", "a", "1M"], "option '-o': option name 'a..b' has an empty part"),
])
def test_misuse_is_one_clear_line_and_makes_nothing(run, tmp_path, args, text):
    p = run("create", *args, status=1, cwd=tmp_path)
    assert_one_line_error(p, text)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name, text", [
    ("d", "directory"),
    ("nowhere/a", "No such file or directory"),
    ("fifo", "fifo"),
    ("x" * 256, "File name too long"),
])
def test_places_where_no_image_can_be(run, tmp_path, name, text):
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "fifo")
    p = run("create", name, "1M", status=1, cwd=tmp_path, timeout=10)
    assert_one_line_error(p, text)
    assert sorted(os.listdir(tmp_path)) == ["d", "fifo"]


def test_a_folder_that_may_not_be_written(strata, tmp_path):
    (tmp_path / "d").mkdir(mode=0o555)
    p = subprocess.run(without_root(strata, "create", tmp_path / "d/a", "1M"), capture_output=True,
                       text=True)
    assert p.returncode == 1
    assert_one_line_error(p, "Permission denied")


def test_an_existing_file_is_replaced_whole(run, tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 4096)
    run("create", tmp_path / "a", "1k")
    assert (tmp_path / "a").read_bytes() == bytes(1024)


def test_a_failed_create_leaves_the_old_file(run, tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 4096)
    run("create", tmp_path / "a", str((1 << 63) - 1), status=1)
    assert (tmp_path / "a").read_bytes() == b"x" * 4096
    assert os.listdir(tmp_path) == ["a"]


def test_an_image_in_use_by_qemu_is_not_replaced(run, peer, tmp_path):
    image = tmp_path / "a"
    image.write_bytes(b"x" * 4096)
    user = subprocess.Popen(["qemu-io", "-f", "raw", str(image)], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE)
    try:
        assert user.stdout.read(1)  # the prompt: it has the file open
        p = run("create", image, "1k", status=1)
        assert_one_line_error(p, str(user.pid))
    finally:
        user.stdin.close()
        user.wait()
        user.stdout.close()
    assert image.read_bytes() == b"x" * 4096
