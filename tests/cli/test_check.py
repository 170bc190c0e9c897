# SPDX-License-Identifier: MIT
"""check: exit statuses around the format's own work."""
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
from images import NOT_DISKS, assert_one_line_error, run_unreadable  # noqa: E402


def test_a_format_without_a_check_is_63(run, tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 512)
    p = run("check", tmp_path / "a", status=63)
    assert_one_line_error(p, "images of format 'raw' have nothing that could be checked")


@pytest.mark.parametrize("how", ["leaks", "all"])
def test_repair_is_refused_clearly(run, tmp_path, how):
    (tmp_path / "a").write_bytes(b"x" * 512)
    assert_one_line_error(run("check", "-r", how, tmp_path / "a", status=63), "have nothing that could be checked")


@pytest.mark.parametrize("what", NOT_DISKS)
def test_what_is_no_disk_is_1(run, tmp_path, what):
    make, parts = NOT_DISKS[what]
    make(tmp_path / "x")
    assert_one_line_error(run("check", tmp_path / "x", status=1, timeout=10), "check: ", *parts)


def test_unreadable_file_is_1(strata, tmp_path):
    p = run_unreadable(strata, "check", tmp_path / "x")
    assert p.returncode == 1
    assert_one_line_error(p, "Permission denied")


def test_misuse_is_1(run):
    run("check", status=1)
    run("check", "--nope", "x", status=1)
