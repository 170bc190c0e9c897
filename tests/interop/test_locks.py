# SPDX-License-Identifier: MIT
"""strata and QEMU keep each other out of a disk by the same byte-range locks."""
import contextlib
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import threading

import pytest


@contextlib.contextmanager
def held(argv):
    """A program that has opened its image and waits for commands; killed at the end."""
    p = subprocess.Popen(list(map(str, argv)), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         text=True, bufsize=1)
    try:
        p.stdin.write("length\n")
        p.stdin.flush()
        assert "MiB" in p.stdout.readline(), "the image did not open"
        yield p
    finally:
        p.kill()
        p.wait()


@contextlib.contextmanager
def qemu_io(*args):
    """qemu-io holds the image: its prompt and output are pipes, so it runs one command a -c."""
    assert shutil.which("qemu-io"), "qemu-io is missing: run `make setup`"
    p = subprocess.Popen(["stdbuf", "-oL", "qemu-io", "-c", "length", "-c", "sleep 600000",
                          *map(str, args)], stdout=subprocess.PIPE, text=True)
    try:
        assert "MiB" in p.stdout.readline(), "the image did not open"
        yield p
    finally:
        p.kill()
        p.wait()


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "a.raw"
    with open(path, "wb") as f:
        f.truncate(4 << 20)
    return path


@pytest.fixture
def qcow2(peer, tmp_path):
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-f", "qcow2", path, "4M")
    return path


def test_qemu_writing_keeps_a_strata_writer_out_and_is_named(run, disk):
    with qemu_io("-f", "raw", disk) as q:
        p = run("io", "-c", "write 0 1", disk, status=1)
    assert f"a.raw: file is in use by process {q.pid} (qemu-io, read-write)" in p.stderr
    assert "\n  " in p.stderr, "a hint says what to do"
    assert not any(disk.read_bytes())


def test_qemu_writing_qcow2_keeps_a_strata_reader_out(run, qcow2):
    with qemu_io(qcow2) as q:
        p = run("info", qcow2, status=1)
        assert f"in use by process {q.pid} (qemu-io, read-write)" in p.stderr
        assert "-U" in p.stderr
        run("info", "-U", qcow2)
    run("info", qcow2)


def test_qemu_reading_qcow2_keeps_a_strata_writer_out(run, qcow2):
    with qemu_io("-r", qcow2) as q:
        p = run("io", "-c", "write 0 1", qcow2, status=1)
        assert f"in use by process {q.pid} (qemu-io, read-only)" in p.stderr
        run("info", qcow2)


def test_strata_writing_keeps_qemu_out(strata, peer, disk):
    with held([strata, "io", disk]):
        p = peer("qemu-io", "-f", "raw", "-c", "write 0 1", disk, status=1)
        assert "lock" in p.stderr
    peer("qemu-io", "-f", "raw", "-c", "write 0 1", disk)


def test_strata_writing_qcow2_keeps_qemu_img_out(strata, peer, qcow2):
    with held([strata, "io", qcow2]):
        p = peer("qemu-img", "info", qcow2, status=1)
        assert 'Failed to get shared "write" lock' in p.stderr
        peer("qemu-img", "info", "-U", qcow2)


def test_strata_reading_qcow2_lets_qemu_read_but_not_write(strata, peer, qcow2):
    with held([strata, "io", "-r", qcow2]):
        peer("qemu-img", "info", qcow2)
        p = peer("qemu-io", "-c", "write 0 1", qcow2, status=1)
        assert 'Failed to get "write" lock' in p.stderr


def test_base_under_a_temporary_snapshot_is_not_written_by_others(strata, peer, disk):
    with held([strata, "io", "-s", disk]):
        p = peer("qemu-io", "-f", "raw", "-c", "write 0 1", disk, status=1)
        assert 'Failed to get "write" lock' in p.stderr


def test_two_strata_writers_the_second_is_refused(run, strata, disk):
    with held([strata, "io", disk]) as first:
        p = run("io", "-c", "write 0 1", disk, status=1)
    assert f"in use by process {first.pid} (strata, read-write)" in p.stderr


def test_locking_off_lets_both_write(run, strata, disk):
    opts = f"driver=raw,file.driver=file,file.locking=off,file.filename={disk}"
    with held([strata, "io", disk]):
        run("io", "--image-opts", "-c", "write -P 0x61 0 1", opts)
    assert disk.read_bytes()[:1] == b"a"


def test_create_does_not_replace_an_image_in_use(run, disk):
    with qemu_io("-f", "raw", disk) as q:
        p = run("create", "-f", "raw", disk, "8M", status=1)
    assert f"process {q.pid} (qemu-io" in p.stderr
    assert disk.stat().st_size == 4 << 20


# ---------------------------------------------------------------- holders that are gone


class HeldByNobody:
    """QEMU's lock bytes of a writer on a description that only a message in a socket refers to."""

    F_OFD_SETLK = 37

    def __init__(self, image):
        fd = os.open(image, os.O_RDWR)
        for byte in (100, 101, 103, 201, 203):
            fcntl.fcntl(fd, self.F_OFD_SETLK, struct.pack("hh4xqqi4x", fcntl.F_RDLCK, 0, byte, 1, 0))
        self.near, self.far = socket.socketpair()
        socket.send_fds(self.near, [b"x"], [fd])
        os.close(fd)

    def release(self):
        self.near.close()
        self.far.close()


def test_the_locks_of_a_process_that_is_gone_are_waited_for(run, tmp_path):
    image = tmp_path / "d.qcow2"
    run("create", "-f", "qcow2", image, "1M")
    held = HeldByNobody(image)
    threading.Timer(0.2, held.release).start()
    run("io", "-f", "qcow2", "-c", "write 0 4k", image)


def test_locks_that_stay_are_not_waited_for_long(run, tmp_path):
    image = tmp_path / "d.qcow2"
    run("create", "-f", "qcow2", image, "1M")
    held = HeldByNobody(image)
    p = run("io", "-f", "qcow2", "-c", "write 0 4k", image, status=1, timeout=20)
    held.release()
    assert "in use by another process" in p.stderr
