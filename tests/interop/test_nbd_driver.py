# SPDX-License-Identifier: MIT
"""Disks behind NBD servers: qemu-nbd's, nbdkit's and our own, read, written and copied by strata."""
import json
import os
import pathlib
import signal
import socket
import subprocess
import threading
import time

import pytest

from serving import Server


def wait_for(path):
    for _ in range(200):
        if os.path.exists(path):
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come up")


@pytest.fixture
def disk(tmp_path):
    d = tmp_path / "disk.raw"
    d.write_bytes(bytes(range(256)) * 4096)
    os.truncate(d, 4 << 20)
    return d


@pytest.fixture
def qemu_nbd(tmp_path):
    """qemu_nbd(args...) starts Debian's server on a socket; its path."""
    running = []

    def start(*args):
        path = tmp_path / f"s{len(running)}"
        running.append(subprocess.Popen(["qemu-nbd", "-t", "-k", str(path), *map(str, args)]))
        wait_for(path)
        return path

    yield start
    for p in running:
        p.terminate()
        p.wait()


def uri(path, export=""):
    return f"nbd+unix:///{export}?socket={path}"


def test_info_and_map(run, disk, qemu_nbd):
    name = uri(qemu_nbd("-f", "raw", disk))
    info = json.loads(run("info", "--output=json", name).stdout)
    assert info["virtual-size"] == 4 << 20 and info["format"] == "raw"
    runs = json.loads(run("map", "--output=json", name).stdout)
    assert [(r["start"], r["length"], r["zero"]) for r in runs] == [(0, 1 << 20, False), (1 << 20, 3 << 20, True)]


def test_names_of_all_forms_open(run, disk, qemu_nbd):
    path = qemu_nbd("-f", "raw", "-x", "ex", disk)
    for name in (uri(path, "ex"), f"nbd:unix:{path}:exportname=ex",
                 f'json:{{"driver": "nbd", "server": {{"type": "unix", "path": "{path}"}}, "export": "ex"}}'):
        assert "4 MiB" in run("info", name).stdout


def test_writes_zeroes_and_discards_arrive(run, disk, qemu_nbd):
    name = uri(qemu_nbd("-f", "raw", "--discard=unmap", disk))
    run("io", "-c", "write -P 9 100 70000", "-c", "write -z 200k 100k", "-c", "writev -P 8 400k 1k 3k",
        "-c", "discard 2M 64k", "-c", "flush", "-c", "read -P 9 100 70000", "-f", "raw", name)
    data = disk.read_bytes()
    assert data[100:70100] == b"\t" * 70000 and not any(data[200 * 1024:300 * 1024])
    assert data[400 * 1024:404 * 1024] == b"\x08" * 4096 and data[70100:70356] == (bytes(range(256)) * 2)[212:468]


def test_many_requests_at_once(run, disk, qemu_nbd):
    name = uri(qemu_nbd("-f", "raw", disk))
    commands = sum((["-c", f"aio_write -q -P {i % 255 + 1} {i * 8192} 8192"] for i in range(200)), [])
    checks = sum((["-c", f"aio_read -q -P {i % 255 + 1} {i * 8192} 8192"] for i in range(200)), [])
    run("io", *commands, "-c", "aio_flush", *checks, "-f", "raw", name)


def test_two_large_writes_at_once_do_not_wait_for_one_another_for_ever(run, strata, tmp_path):
    (tmp_path / "big").write_bytes(b"")
    os.truncate(tmp_path / "big", 64 << 20)
    with Server(strata, tmp_path / "big", "-f", "raw", "-t", socket_path=tmp_path / "s") as s:
        for i in range(20):
            run("io", "-f", "raw", "-c", f"aio_write {i}M 1M", "-c", f"aio_write {i * 1048576 + 512} 1M", s.uri)


def test_a_larger_write_than_one_message(run, disk, qemu_nbd):
    disk.write_bytes(bytes(80 << 20))
    name = uri(qemu_nbd("-f", "raw", disk))
    run("io", "-c", "write -q -P 3 512 70M", "-c", "read -q -P 3 512 70M", "-f", "raw", name)


def test_convert_both_ways(run, disk, qemu_nbd, tmp_path):
    name = uri(qemu_nbd("-f", "raw", disk))
    run("convert", "-f", "raw", "-O", "qcow2", name, tmp_path / "copy.qcow2")
    run("compare", "-f", "raw", disk, tmp_path / "copy.qcow2")
    (tmp_path / "out.raw").write_bytes(b"\xff" * (4 << 20))
    out = uri(qemu_nbd("-f", "raw", tmp_path / "out.raw"))
    run("convert", "-n", "-O", "raw", tmp_path / "copy.qcow2", out)
    assert (tmp_path / "out.raw").read_bytes() == disk.read_bytes()


def test_qcow2_over_nbd(run, qemu_nbd, tmp_path):
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata",
                    tmp_path / "q", "1M"], check=True)
    name = uri(qemu_nbd("-f", "raw", tmp_path / "q"))
    run("io", "-f", "qcow2", "-c", "write -P 4 1000 2000", "-c", "read -P 4 1000 2000", name)
    subprocess.run(["qemu-img", "check", "-U", "-q", tmp_path / "q"], check=True)


def test_backing_file_over_nbd(run, disk, qemu_nbd, tmp_path):
    name = uri(qemu_nbd("-r", "-f", "raw", disk))
    run("create", "-f", "qcow2", "-b", name, "-F", "raw", tmp_path / "top", "4M")
    run("io", "--trust", "any", "-c", "read -v 0 16", tmp_path / "top")
    p = run("io", "-c", "read 0 16", tmp_path / "top", status=1)  # not followed unasked
    assert "backing file" in p.stderr


def test_our_own_server(run, strata, disk, tmp_path):
    with Server(strata, disk, "-f", "raw", "-t", socket_path=tmp_path / "s") as s:
        run("compare", "-f", "raw", "-F", "raw", disk, s.uri)
        assert "4 MiB" in run("info", s.uri).stdout


def test_tcp(run, strata, disk):
    with Server(strata, disk, "-f", "raw", "-t", "-p", "0") as s:
        run("compare", "-f", "raw", "-F", "raw", disk, s.uri)


def test_a_read_only_server_is_not_opened_for_writing(run, disk, qemu_nbd):
    name = uri(qemu_nbd("-r", "-f", "raw", disk))
    assert "write" in run("io", "-f", "raw", "-c", "write 0 1", name, status=1).stderr
    run("io", "-r", "-f", "raw", "-c", "read 0 512", name)


def test_errors_of_the_server_come_through(run, tmp_path):
    sock = tmp_path / "s"
    kit = subprocess.Popen(["nbdkit", "-f", "-U", str(sock), "--filter=error", "memory", "1M",
                            "error-pread=ENOSPC", "error-pread-rate=100%"])
    try:
        wait_for(sock)
        p = run("io", "-f", "raw", "-c", "read 0 512", uri(sock), status=1)
        assert "No space left" in p.stdout
    finally:
        kit.terminate()
        kit.wait()


def test_nobody_there(run, tmp_path):
    p = run("info", uri(tmp_path / "none"), status=1)
    assert "Failed to connect" in p.stderr and "No such file" in p.stderr


@pytest.mark.parametrize("name, word", [
    ("nbd+unix:///x", "socket="), ("nbd://", "HOST"), ("nbd:unix", "nbd:HOST:PORT"), ("nbd:host", "nbd:HOST:PORT"),
    ("nbd+unix:///%zz?socket=/x", "%XX"), ("nbd+unix:///?socket=%00", "socket=")])
def test_names_that_are_none(run, name, word):
    p = run("info", name, status=1)
    assert word.split("=")[0] in p.stderr


def test_a_server_that_leaves_fails_the_request_and_no_more(run, tmp_path):
    """One that says nothing sensible, and one that hangs up in the handshake."""
    for greeting in (b"", b"HTTP/1.0 200 OK\r\n\r\n", b"NBDMAGIC", b"NBDMAGICIHAVEOPT\x00\x03"):
        sock = tmp_path / f"s{len(greeting)}"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(sock))
            listener.listen()

            def serve():
                peer, _ = listener.accept()
                peer.sendall(greeting)
                peer.close()

            t = threading.Thread(target=serve)
            t.start()
            p = run("info", uri(sock), status=1)
            t.join()
        assert "NBD" in p.stderr or "connect" in p.stderr


def test_a_server_killed_under_us(strata, disk, qemu_nbd, tmp_path):
    path = tmp_path / "k"
    server = subprocess.Popen(["qemu-nbd", "-t", "-k", str(path), "-f", "raw", str(disk)])
    wait_for(path)
    io = subprocess.Popen([strata, "io", "-f", "raw", uri(path)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    io.stdin.write("read 0 512\n")
    io.stdin.flush()
    assert "read 512/512" in io.stdout.readline()
    server.send_signal(signal.SIGKILL)
    server.wait()
    out, _ = io.communicate("read 0 512\nread 0 512\n", timeout=30)
    assert out.count("read failed: Input/output error") == 2
