# SPDX-License-Identifier: MIT
"""-p and --progress, shown by convert: a bar on terminals, plain lines elsewhere, JSON lines."""
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import time

import pytest


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "a.raw"
    path.write_bytes(os.urandom(1 << 20) * 8)
    return path


def on_terminal(argv, columns):
    """Runs argv with standard error on a terminal of that width; what was written to it."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    p = subprocess.Popen(argv, stderr=slave, stdout=subprocess.PIPE)
    os.close(slave)
    text = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # EIO: the other side is closed
            break
        if not part:
            break
        text += part
    os.close(master)
    assert p.stdout.read() == b""
    p.stdout.close()
    assert p.wait() == 0
    return text.decode()


@pytest.mark.parametrize("columns", [30, 80, 300])
def test_bar_fits_the_terminal_and_ends_at_100(strata, raw, tmp_path, columns):
    text = on_terminal([strata, "convert", "-p", "-O", "raw", raw, tmp_path / "b"], columns)
    assert text.endswith("\n")
    frames = [f.removesuffix("\033[K") for f in text.strip().split("\r") if f]
    assert all(len(f) < columns for f in frames)
    assert frames[-1].startswith(" 100.0% [")


def test_no_option_no_output(run, raw, tmp_path):
    assert run("convert", "-O", "raw", raw, tmp_path / "b").stderr == ""


def test_elsewhere_the_bar_is_plain_lines(run, raw, tmp_path):
    lines = run("convert", "-p", "-O", "raw", raw, tmp_path / "b").stderr.splitlines()
    assert lines[-1] == "100%"
    numbers = [int(line.removesuffix("%")) for line in lines]
    assert numbers == sorted(set(numbers))


def test_json_lines(run, raw, tmp_path):
    p = run("convert", "--progress=json", "-O", "raw", raw, tmp_path / "b")
    rows = [json.loads(line)["progress"] for line in p.stderr.splitlines()]
    assert rows[-1]["percent"] == 100 and rows[-1]["done"] == rows[-1]["total"]
    assert all(0 <= r["percent"] <= 100 for r in rows)
    assert p.stdout == ""


def test_a_signal_asks_where_it_is(strata, raw, tmp_path):
    """As with dd and qemu-img: SIGUSR1 prints one line, and the work goes on."""
    p = subprocess.Popen([strata, "convert", "-r", "8M", "-O", "raw", raw, tmp_path / "b"],
                         stderr=subprocess.PIPE, text=True)
    time.sleep(0.4)
    p.send_signal(signal.SIGUSR1)
    _, err = p.communicate(timeout=30)
    assert p.returncode == 0
    assert re.fullmatch(r"\(\d+\.\d\d/100%\)\n", err), err
    assert (tmp_path / "b").read_bytes() == raw.read_bytes()
