# SPDX-License-Identifier: MIT
"""What the tests of dirty bitmaps share: bits as QEMU reads them, the directory's place, broken images."""
import contextlib
import hashlib
import json
import re
import socket
import subprocess
import time

import pytest

from qcow2_image import Qcow2

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
EXT_BITMAPS = 0x23852875
AUTOCLEAR = 88


@pytest.fixture
def io(run):
    def call(path, *commands, opts=(), status=0):
        args = [x for c in commands for x in ("-c", c)]
        return run("io", "-f", "qcow2", *opts, *args, path, status=status)

    return call


@pytest.fixture
def qio(peer):
    def call(path, *commands):
        args = [x for c in commands for x in ("-c", c)]
        return peer("qemu-io", "-f", "qcow2", "-d", "unmap", *args, path)

    return call


def wait_for(path, proc):
    """Until the server accepts: its socket has a name a little before that."""
    for _ in range(6000):
        assert proc.poll() is None, proc.stderr and proc.stderr.read()
        with socket.socket(socket.AF_UNIX) as s, contextlib.suppress(OSError):
            s.connect(str(path))
            return
        time.sleep(.01)
    raise AssertionError("the server does not begin")


@pytest.fixture
def bits(tmp_path):
    """bits(image, name) -> list of (offset, length): what QEMU calls dirty."""
    def call(path, name):
        sock = tmp_path / "bits.sock"
        p = subprocess.Popen(["qemu-nbd", "-r", "-t", "-f", "qcow2", "-B", name, "-k", sock, path],
                             stderr=subprocess.PIPE, text=True)
        try:
            wait_for(sock, p)
            q = subprocess.run(["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}",
                                f"nbd+unix:///?socket={sock}"], capture_output=True, text=True,
                               timeout=60)
            assert q.returncode == 0, q.stderr
        finally:
            p.terminate()
            p.wait()
            with contextlib.suppress(FileNotFoundError):
                sock.unlink()
        out = []
        for x in json.loads(q.stdout):
            if not x["type"] & 1:
                continue
            if out and sum(out[-1]) == x["offset"]:
                out[-1] = (out[-1][0], out[-1][1] + x["length"])
            else:
                out.append((x["offset"], x["length"]))
        return out

    return call


@pytest.fixture
def listed(run):
    def call(path):
        return {b["name"]: b for b in json.loads(run("bitmap", "--list", "--output=json", path).stdout)}

    return call


def runs(granules, granularity, size):
    out = []
    for g in sorted(granules):
        start, end = g * granularity, min((g + 1) * granularity, size)
        if out and sum(out[-1]) == start:
            out[-1] = (out[-1][0], end - out[-1][0])
        else:
            out.append((start, end - start))
    return out


def digest(path):
    return hashlib.sha256(path.read_bytes()).digest()


def extension(q):
    """(offset of the bitmaps extension's 24 bytes)"""
    pos = q.get32(100)
    while True:
        kind, length = q.get32(pos), q.get32(pos + 4)
        assert kind, "no bitmaps extension"
        if kind == EXT_BITMAPS:
            return pos + 8
        pos += 8 + (length + 7) // 8 * 8


def directory(q):
    at = extension(q)
    return q.get64(at + 16), q.get64(at + 8)


def flags(q, index=0):
    at, _ = directory(q)
    for _ in range(index):
        at += (24 + q.get16(at + 18) + q.get32(at + 20) + 7) // 8 * 8
    return q.get32(at + 12)


@pytest.fixture
def killed(strata):
    """killed(image, command ...): strata io does them, and is killed with the image open."""
    def call(path, *commands):
        p = subprocess.Popen([strata, "io", "-f", "qcow2", path], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
        for c in (*commands, "length"):
            p.stdin.write(c + "\n")
        p.stdin.flush()
        size = None
        while size is None:
            line = p.stdout.readline()
            assert line, "it ended by itself"
            size = re.search(r"\b4 MiB\b", line)
        p.kill()
        p.wait()

    return call


@pytest.fixture
def broken(run, killed, tmp_path):
    """An image of 4 MiB whose bitmap b was in use when its writer was killed; c is disabled."""
    path = tmp_path / "broken.qcow2"
    run("create", "-f", "qcow2", path, "4M")
    run("bitmap", "--add", "--disable", path, "c")
    run("bitmap", "--add", path, "b")
    killed(path, "write 0 64k")
    return path
