# SPDX-License-Identifier: MIT
"""strata called as qemu-io beside Debian's qemu-io: the same command lines, each in its own copy of
one folder; standard output, standard error and exit status must be the same but for times.
"""
import os
import re
import shutil
import subprocess

import pytest


@pytest.fixture(scope="module")
def dropin(strata, tmp_path_factory):
    link = tmp_path_factory.mktemp("bin") / "qemu-io"
    link.symlink_to(os.path.abspath(strata))
    return str(link)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp("images")
    for args in (["create", "-q", "-f", "raw", "raw", "4M"],
                 ["create", "-q", "-f", "qcow2", "base", "4M"],
                 ["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top"]):
        subprocess.run(["qemu-img", *args], cwd=d, check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 1M 256k", "base"], cwd=d, check=True)
    (d / "rules").write_text('[inject-error]\nevent = "read_aio"\nerrno = "28"\nonce = "on"\n\n'
                             '[set-state]\nevent = "write_aio"\nstate = "1"\nnew_state = "2"\n\n'
                             '[inject-error]\nevent = "write_aio"\nstate = "2"\n')
    return d


def normal(text):
    text = re.sub(r"\d+ ops; [0-9:.]+( sec)? \([0-9.inf]+ [A-Za-z]+/sec and [0-9.inf]+ ops/sec\)", "T", text)
    return re.sub(r"(?m)^(\d+,1,).*$", r"\1T", text)


def run(program, folder, to, line, text):
    shutil.copytree(folder, to)
    p = subprocess.run([program, *line], cwd=to, capture_output=True, timeout=60, text=True,
                       input=text)
    return p.returncode, normal(p.stdout), normal(p.stderr)


def c(*commands):
    return sum((["-c", x] for x in commands), [])


LINES = [
    # opening
    ["absent"], ["-f", "nope", "raw"], ["-f", "qcow2", "raw"], ["-t", "bad", "raw"], ["-d", "bad", "raw"],
    ["-i", "bad", "raw"], ["-r", "-f", "raw", *c("write 0 512"), "raw"],
    ["-C", "-r", "-f", "qcow2", *c("read 0 512"), "top"],
    ["--image-opts", *c("read 0 512"), "driver=raw,file.filename=raw"],
    ["--image-opts", "-f", "raw", "raw"],
    c("read 0 512"), c("open -f x"), c("open absent"), c("close"), c("open raw", "open raw"),
    c("open -o driver=raw raw", "length", "close", "length"),
    # commands that cannot be
    *[["-f", "raw", *c(x), "raw"] for x in (
        "nonsense", "read", "read 0", "read 0 1 2", "read x 1", "read 0 1z", "read 0 99E", "read -P 300 0 1",
        "read -l 1 0 1", "read -P 0 -s 2 0 1", "read -Q 0 1", "read -P", "read 0 3G", "write 0 3G",
        "write -z 0 3G", "write -n 0 1", "write -u 0 1", "write -z -P 1 0 1", "write -f -c 0 64k",
        "write -c 1 512", "read 4M 1", "write 4095k 2k", "discard 4M 1", "flush 1", "length 1", "alloc",
        "alloc 0 1 2", "sleep", "sleep x", "truncate", "truncate -m bad 1M", "truncate x", "help nope",
        "sigraise 99999", "sigraise x", "break a b", "resume A", "remove_break A", "reopen -r -w",
        "reopen -c bad", "reopen -o read-only=foo", "reopen -r -o read-only=on", "aio_write -z 0 1 1",
    )],
    # work
    ["-f", "raw", *c("write -P 5 0 64k", "read -P 5 0 64k", "read -P 6 0 512", "read -v 65530 20"), "raw"],
    ["-f", "raw", *c("write -q 0 1", "read -C 0 512", "write -C 0 1k", "writev 0 512 1k", "readv -P 205 0 512 1k"), "raw"],
    ["-f", "qcow2", *c("write -z 0 64k", "write -z -u 128k 1k", "alloc 0 4M", "map", "length"), "top"],
    ["-f", "qcow2", *c("map", "read -P 7 1M 256k", "write -c 0 64k", "alloc 0 128k"), "base"],
    ["-f", "qcow2", "-C", *c("read -P 7 1M 64k", "read -P 0 0 64k"), "top"],
    ["-s", "-f", "raw", *c("write -P 9 0 512", "read -P 9 0 512"), "raw"],
    ["-f", "raw", *c("reopen -r", "write 0 1", "reopen -w", "write 0 512"), "raw"],
    ["-f", "raw", *c("truncate 5M", "length", "truncate 1M", "length"), "raw"],
    ["-f", "raw", *c("quit", "nonsense"), "raw"],
    # blkdebug
    ["-f", "raw", *c("read 0 512", "read 0 512", "write 0 512", "write 0 512"), "blkdebug:rules:raw"],
    ["-f", "raw", *c("read 0 512"), "blkdebug:absent:raw"],
    ["json:{'driver': 'raw', 'file': {'driver': 'blkdebug', 'inject-error': [{'event': 'write_aio', "
     "'sector': 2, 'errno': 28}], 'image': {'driver': 'file', 'filename': 'raw'}}}",
     *c("write 0 1k", "write 0 2k", "write 4k 4k")],
    ["-f", "raw", *c("break write_aio A", "aio_write -P 3 0 512", "wait_break A", "resume A", "aio_flush",
                     "read -P 3 0 512"), "blkdebug::raw"],
    ["-f", "raw", *c("break write_aio A", "remove_break A", "write 0 512"), "blkdebug::raw"],
]

# That program prints the usage of its own 7.2, or knows the option only later.
DIVERGENCES = {
    "7.2 does not know -r, and its usage does not name it": [
        ("read", "read 0 1 2"), ("read", "read -Q 0 1"), ("read", "read -P"), ("read", "read -l 1 0 1")],
}


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_same_as_qemu_io(dropin, folder, tmp_path, line):
    theirs = run("qemu-io", folder, tmp_path / "theirs", line, "")
    ours = run(dropin, folder, tmp_path / "ours", line, "")
    if any(command in line for rows in DIVERGENCES.values() for _, command in rows):
        theirs, ours = (t[:1] + (t[1].split("[")[0],) + t[2:] for t in (theirs, ours))
    assert ours == theirs


def test_same_from_standard_input(dropin, folder, tmp_path):
    text = "write -P 1 0 512\n\nread -P 1 0 512\nlength\nnonsense\nquit\nlength\n"
    line = ["-f", "raw", "raw"]
    assert run(dropin, folder, tmp_path / "ours", line, text) == \
        run("qemu-io", folder, tmp_path / "theirs", line, text)


def test_the_version_is_told(dropin):
    out = subprocess.run([dropin, "-V"], capture_output=True, text=True, check=True).stdout
    assert re.match(r"qemu-io version \d+\.\d+", out)


def test_reopen_with_other_options_moves_the_window(dropin, folder, tmp_path):
    status, out, err = run(dropin, folder, tmp_path / "w", c(
        "open -o driver=raw,offset=512,size=512 raw", "write -q -P 1 0 512", "reopen -o offset=1024,size=1k",
        "write -q -P 2 0 1k", "length", "close", "open -o driver=raw raw", "read -q -P 1 512 512",
        "read -q -P 2 1k 1k"), "")
    assert (status, out, err) == (0, "1 KiB\n", "")
