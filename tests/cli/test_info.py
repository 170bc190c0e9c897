# SPDX-License-Identifier: MIT
"""info, on raw images and on everything that is no image."""
import json
import os
import subprocess
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
from images import NOT_DISKS, assert_one_line_error, run_unreadable  # noqa: E402


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "a.raw"
    with open(path, "wb") as f:
        f.truncate(3 << 20)
    return path


def test_human(run, raw):
    assert run("info", raw).stdout == (f"image: {raw}\nfile format: raw\n"
                                       "virtual size: 3 MiB (3145728 bytes)\ndisk size: 0 B\n")


def test_json_is_what_qemu_img_says(run, peer, raw):
    ours = json.loads(run("info", "--output=json", raw).stdout)
    theirs = json.loads(peer("qemu-img", "info", "--output=json", raw).stdout)
    ours.pop("children")  # QEMU 8 and later have it
    assert ours == theirs


def test_json_of_a_chain_is_a_list(run, raw):
    got = json.loads(run("info", "--output=json", "--backing-chain", raw).stdout)
    assert [x["format"] for x in got] == ["raw"]


def test_a_hostile_name_is_shown_safely(run, tmp_path):
    name = "./a\x1b[31m\nimage: fake"
    (tmp_path / name).write_bytes(b"x" * 512)
    out = run("info", name, cwd=tmp_path).stdout
    assert out.splitlines()[0] == "image: ./a\\x1b[31m\\x0aimage: fake"
    assert json.loads(run("info", "--output=json", name, cwd=tmp_path).stdout)["filename"] == name


def test_a_name_that_is_not_utf8(run, tmp_path):
    name = os.fsdecode(b"\xff\xfe.img")
    (tmp_path / name).write_bytes(b"x" * 512)
    assert run("info", name, cwd=tmp_path).stdout.startswith("image: \\xff\\xfe.img\n")
    j = json.loads(run("info", "--output=json", name, cwd=tmp_path).stdout)
    assert j["filename"] == "\\xff\\xfe.img"
    run("map", name, cwd=tmp_path)
    run("create", name, "1M", cwd=tmp_path)


def test_image_options(run, raw):
    p = run("info", "--image-opts", "--output=json", f"driver=raw,size=1M,file.filename={raw}")
    assert json.loads(p.stdout)["virtual-size"] == 1 << 20


def test_json_name(run, raw):
    name = "json:" + json.dumps({"driver": "raw", "file.filename": str(raw), "offset": 1 << 20})
    assert json.loads(run("info", "--output=json", name).stdout)["virtual-size"] == 2 << 20


def test_image_options_exclude_a_format(run, raw):
    p = run("info", "--image-opts", "-f", "raw", f"driver=raw,file.filename={raw}", status=1)
    assert_one_line_error(p, "-f and --image-opts exclude each other")


def test_unknown_format_suggests_the_nearest(run, raw):
    p = run("info", "-f", "rwa", raw, status=1)
    assert_one_line_error(p, "rwa")
    assert "raw" in p.stderr


def test_unknown_protocol_says_how_to_name_the_file(run):
    p = run("info", "foo:bar", status=1)
    assert_one_line_error(p, "unknown protocol 'foo'")
    assert "./foo:bar" in p.stderr


# ---- bad input

@pytest.mark.parametrize("what", NOT_DISKS)
def test_what_is_no_disk_is_refused_at_once(run, tmp_path, what):
    make, parts = NOT_DISKS[what]
    path = tmp_path / "x"
    make(path)
    assert_one_line_error(run("info", path, status=1, timeout=10), "info: ", str(path), *parts)


def test_unreadable_file(strata, tmp_path):
    p = run_unreadable(strata, "info", tmp_path / "x")
    assert p.returncode == 1
    assert_one_line_error(p, "Permission denied")


def test_character_device_is_refused(run):
    assert_one_line_error(run("info", "/dev/zero", status=1, timeout=10), "character device")


def test_zero_length_file_is_an_empty_raw_disk(run, tmp_path):
    (tmp_path / "x").touch()
    got = json.loads(run("info", "--output=json", tmp_path / "x").stdout)
    assert (got["format"], got["virtual-size"]) == ("raw", 0)


def test_garbage_is_raw(run, tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(256)) * 1024)
    got = json.loads(run("info", "--output=json", tmp_path / "x").stdout)
    assert (got["format"], got["virtual-size"]) == ("raw", 262144)


@pytest.mark.parametrize("name", ["", "x" * 256, "x" * 5000, "d/" * 3000 + "x"],
                         ids=["empty", "component", "path", "deep"])
def test_names_of_impossible_length(run, name, tmp_path):
    assert_one_line_error(run("info", name, status=1, cwd=tmp_path))


def test_name_of_the_greatest_length_works(run, tmp_path):
    (tmp_path / ("x" * 255)).write_bytes(b"x" * 512)
    run("info", "x" * 255, cwd=tmp_path)


@pytest.mark.parametrize("name", ["json:", "json:{", "json:[]", 'json:{"driver":"raw"}',
                                  'json:{"driver":"raw","file":7}', 'json:{"driver":17}',
                                  "json:" + "[" * 100000, 'json:{"a":' + '{"a":' * 64,
                                  'json:{"driver":"raw","file":{"driver":"nope"}}'],
                         ids=["empty", "open", "list", "childless", "number", "driver-number",
                              "deep", "deep-objects", "no-driver"])
def test_bad_json_names(run, name):
    assert_one_line_error(run("info", name, status=1))


def test_info_starts_no_thread_and_no_io_uring(strata, raw, tmp_path):
    log = tmp_path / "log"
    subprocess.run(["strace", "-f", "-o", log, "-e", "trace=clone,clone3,io_uring_setup",
                    strata, "info", raw], check=True, stdout=subprocess.DEVNULL,
                   env={**{k: v for k, v in os.environ.items() if k != "STRATA_AIO"},
                        "ASAN_OPTIONS": "detect_leaks=0"})
    assert "clone" not in log.read_text() and "io_uring" not in log.read_text()


def test_a_format_that_is_not_utf8_is_not_ignored(run, raw):
    assert_one_line_error(run("info", "-f", os.fsdecode(b"\xff"), raw, status=1), "\\xff")
