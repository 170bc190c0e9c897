# SPDX-License-Identifier: MIT
"""`strata serve` with the NBD clients that people use: libnbd's tools, QEMU's tools, fio."""
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import threading

import nbd
import pytest
from serving import Server

MIB = 1 << 20
SIZE = 32 * MIB


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else \
            hashlib.sha256(f.read()).hexdigest()


def pattern(n, seed=1):
    return random.Random(seed).randbytes(n)


@pytest.fixture(params=["raw", "qcow2"])
def fmt(request):
    return request.param


@pytest.fixture
def disk(tmp_path, fmt, peer):
    """4 MiB of data at the start, 1 MiB in the middle, holes around."""
    raw = tmp_path / "content.raw"
    with open(raw, "wb") as f:
        f.write(pattern(4 * MIB))
        f.seek(16 * MIB)
        f.write(pattern(MIB, 2))
        f.truncate(SIZE)
    if fmt == "raw":
        return raw
    image = tmp_path / "disk.qcow2"
    peer("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
    return image


@pytest.fixture
def serve(strata, disk, fmt, tmp_path):
    def call(*args, **kw):
        return Server(strata, disk, "-f", fmt, *args, socket_path=tmp_path / "s", **kw)
    return call


@pytest.fixture
def handle():
    """nbdsh's `h`, connected to a URI."""
    open_handles = []

    def call(uri, setup=None):
        h = nbd.NBD()
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        if setup:
            setup(h)
        h.connect_uri(uri)
        open_handles.append(h)
        return h

    yield call
    for h in open_handles:
        try:
            h.shutdown()
        except nbd.Error:
            pass


# ---------------------------------------------------------------- libnbd's tools

def test_nbdinfo_sees_size_name_description_and_flags(serve, peer):
    with serve("-t", "-x", "disk name", "-D", "what it is") as s:
        info = json.loads(peer("nbdinfo", "--json", s.uri).stdout)["exports"][0]
    assert info["export-name"] == "disk name"
    assert info["description"] == "what it is"
    assert info["export-size"] == SIZE
    assert not info["is_read_only"] and info["can_multi_conn"] and info["can_fast_zero"]
    assert info["can_flush"] and info["can_fua"] and info["can_trim"] and info["can_zero"]
    assert info["block_size_minimum"] == 1 and info["block_size_maximum"] == 32 * MIB
    assert info["contexts"] == ["base:allocation"]


def test_nbdinfo_lists_the_export(serve, peer):
    with serve("-t", "-x", "one") as s:
        listed = json.loads(peer("nbdinfo", "--list", "--json", s.uri).stdout)["exports"]
    assert [e["export-name"] for e in listed] == ["one"]


def test_the_only_export_answers_to_the_empty_name(serve, peer, tmp_path):
    with serve("-t", "-x", "one"):
        uri = f"nbd+unix:///?socket={tmp_path}/s"
        assert peer("nbdinfo", "--size", uri).stdout.strip() == str(SIZE)


def test_nbdinfo_map_shows_holes(serve, peer):
    with serve("-t") as s:
        extents = json.loads(peer("nbdinfo", "--map", "--json", s.uri).stdout)
    assert [(e["offset"], e["length"], e["type"]) for e in extents] == [
        (0, 4 * MIB, 0), (4 * MIB, 12 * MIB, 3), (16 * MIB, MIB, 0), (17 * MIB, 15 * MIB, 3)]


@pytest.mark.parametrize("connections", [1, 4])
def test_nbdcopy_from_the_server(serve, peer, tmp_path, connections):
    with serve("-t") as s:
        peer("nbdcopy", f"--connections={connections}", s.uri, tmp_path / "out")
    assert sha256(tmp_path / "out") == sha256(tmp_path / "content.raw")


@pytest.mark.parametrize("connections", [1, 4])
def test_nbdcopy_to_the_server(strata, peer, tmp_path, disk, fmt, connections):
    target = tmp_path / "target"
    peer("qemu-img", "create", "-q", "-f", fmt, target, SIZE)
    with Server(strata, target, "-t", "-f", fmt, socket_path=tmp_path / "s") as s:
        peer("nbdcopy", "--flush", f"--connections={connections}", tmp_path / "content.raw", s.uri)
    peer("qemu-img", "compare", "-f", "raw", "-F", fmt, tmp_path / "content.raw", target)
    if fmt == "qcow2":
        peer("qemu-img", "check", target)


# ---------------------------------------------------------------- libnbd by hand

@pytest.mark.parametrize("cache", ["writeback", "none", "directsync"])
def test_reads_and_writes_of_any_alignment(serve, handle, tmp_path, cache):
    model = bytearray(open(tmp_path / "content.raw", "rb").read())
    rng = random.Random(7)
    with serve("-t", "--cache", cache) as s:
        h = handle(s.uri)
        for _ in range(400):
            at = rng.randrange(SIZE - 1)
            n = min(SIZE - at, rng.choice([1, 512, 4096, 5000, 70_000, 300_000]))
            what = rng.choice(["read", "write", "zero", "fua"])
            if what == "read":
                assert h.pread(n, at) == model[at:at + n]
            elif what == "zero":
                h.zero(n, at, nbd.CMD_FLAG_NO_HOLE if rng.random() < .5 else 0)
                model[at:at + n] = bytes(n)
            else:
                data = rng.randbytes(n)
                h.pwrite(data, at, nbd.CMD_FLAG_FUA if what == "fua" else 0)
                model[at:at + n] = data
        h.flush()
        assert h.pread(SIZE // 2, 0) == model[:SIZE // 2]
        assert h.pread(SIZE // 2, SIZE // 2) == model[SIZE // 2:]


@pytest.mark.parametrize("structured", [True, False])
def test_request_of_32_mib(serve, handle, structured):
    with serve("-t") as s:
        h = handle(s.uri, lambda h: h.set_request_structured_replies(structured))
        data = pattern(32 * MIB, 5)
        h.pwrite(data, 0)
        assert h.pread(32 * MIB, 0) == data


def test_read_of_holes_is_sent_as_hole_chunks(serve, handle, fmt):
    """Where the map knows them; a raw file's holes would cost a system call to find."""
    with serve("-t") as s:
        h = handle(s.uri)
        seen = []
        h.pread_structured(2 * MIB, 3 * MIB, lambda buf, at, kind, err: seen.append((at, len(buf), kind)))
        expected = [(3 * MIB, MIB, nbd.READ_DATA), (4 * MIB, MIB, nbd.READ_HOLE)]
        assert sorted(seen) == (expected if fmt == "qcow2" else [(3 * MIB, 2 * MIB, nbd.READ_DATA)])


def test_df_read_is_one_chunk(serve, handle):
    with serve("-t") as s:
        h = handle(s.uri)
        seen = []
        h.pread_structured(2 * MIB, 3 * MIB, lambda buf, at, kind, err: seen.append(kind), nbd.CMD_FLAG_DF)
        assert seen == [nbd.READ_DATA]


def test_trim_and_cache_are_accepted(serve, handle):
    with serve("-t") as s:
        h = handle(s.uri)
        h.cache(MIB, 0)
        h.trim(MIB, 0)
        h.trim(MIB, MIB, nbd.CMD_FLAG_FUA)
        h.flush()
        assert h.pread(4096, 2 * MIB) == pattern(4 * MIB)[2 * MIB:2 * MIB + 4096]


def test_trimmed_space_is_given_back(serve, handle, disk):
    before = os.stat(disk).st_blocks
    with serve("-t") as s:
        h = handle(s.uri)
        h.trim(4 * MIB, 0)
        h.flush()
        assert os.stat(disk).st_blocks < before - 7000


def test_fast_zero_succeeds_or_says_it_cannot(serve, handle):
    with serve("-t") as s:
        h = handle(s.uri)
        try:
            h.zero(MIB, 0, nbd.CMD_FLAG_FAST_ZERO)
        except nbd.Error as e:
            assert e.errno == "ENOTSUP"
        else:
            assert h.pread(MIB, 0) == bytes(MIB)


def test_zeroed_range_becomes_a_hole_unless_told_otherwise(serve, handle):
    def hole(h, at):
        out = []
        h.block_status(MIB, at, lambda ctx, off, e, err: out.extend(e))
        return out[1] & nbd.STATE_HOLE

    with serve("-t") as s:
        h = handle(s.uri)
        h.zero(MIB, 0)
        assert hole(h, 0)
        assert h.pread(MIB, 0) == bytes(MIB)


def test_errors_carry_the_protocols_numbers(serve, handle):
    with serve("-t") as s:
        h = handle(s.uri, lambda h: h.set_strict_mode(0))
        for call, expected in ((lambda: h.pread(512, SIZE), "EINVAL"),
                               (lambda: h.pwrite(b"x" * 512, SIZE), "ENOSPC"),
                               (lambda: h.zero(512, SIZE), "ENOSPC")):
            with pytest.raises(nbd.Error) as e:
                call()
            assert e.value.errno == expected
        assert h.pread(4096, 0) == pattern(4 * MIB)[:4096]


def test_flush_on_one_connection_covers_the_other(serve, handle, tmp_path, fmt, peer, disk):
    with serve("-t") as s:
        a, b = handle(s.uri), handle(s.uri)
        assert a.can_multi_conn()
        a.pwrite(b"A" * MIB, 8 * MIB)
        b.flush()
        assert b.pread(MIB, 8 * MIB) == b"A" * MIB
        s.proc.kill()
        s.proc.wait()
        peer("qemu-io", "-r", "-f", fmt, "-c", f"read -P 0x41 {8 * MIB} {MIB}", disk)
        s.proc.returncode = 0


def test_many_clients_at_once(serve, handle):
    with serve("-t") as s:
        errors = []

        def one(i):
            try:
                h = nbd.NBD()
                h.connect_uri(s.uri)
                for k in range(50):
                    data = bytes([i, k]) * 2048
                    h.pwrite(data, (i * 50 + k) * 4096)
                    assert h.pread(4096, (i * 50 + k) * 4096) == data
                h.shutdown()
            except Exception as e:
                errors.append(e)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(16)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not errors


def test_deep_queue_of_asynchronous_requests(serve, handle):
    with serve("-t") as s:
        h = handle(s.uri)
        data = pattern(4 * MIB)
        bufs = [(i * 4096 % (4 * MIB), nbd.Buffer(4096)) for i in range(1000)]
        cookies = [h.aio_pread(b, at) for at, b in bufs]
        for c in cookies:
            while not h.aio_command_completed(c):
                h.poll(-1)
        assert all(b.to_bytearray() == data[at:at + 4096] for at, b in bufs)


# ---------------------------------------------------------------- QEMU's tools and fio

def test_qemu_io_reads_and_writes(serve, peer):
    with serve("-t") as s:
        out = peer("qemu-io", "-f", "raw", "-c", "write -P 0x5a 1M 2M", "-c", "write -z 1536k 64k",
                   "-c", "flush", "-c", "read -P 0x5a 1M 512k", "-c", "read -P 0 1536k 64k",
                   "-c", "discard 2M 512k", s.uri).stdout
    assert "failed" not in out and "mismatch" not in out


def test_qemu_img_compares_and_converts(serve, peer, tmp_path):
    with serve("-t", "-r") as s:
        peer("qemu-img", "compare", "-f", "raw", "-F", "raw", s.uri, tmp_path / "content.raw")
        peer("qemu-img", "convert", "-f", "raw", "-O", "qcow2", s.uri, tmp_path / "copy.qcow2")
    peer("qemu-img", "compare", tmp_path / "copy.qcow2", tmp_path / "content.raw")


def test_qemu_img_map_matches_the_file(serve, peer):
    with serve("-t") as s:
        extents = json.loads(peer("qemu-img", "map", "--output=json", "-f", "raw", s.uri).stdout)
    assert [(e["start"], e["length"], e["zero"]) for e in extents] == [
        (0, 4 * MIB, False), (4 * MIB, 12 * MIB, True), (16 * MIB, MIB, False),
        (17 * MIB, 15 * MIB, True)]


def test_fio_verifies_what_it_wrote(serve, peer, tmp_path):
    with serve("-t") as s:
        peer("fio", "--name=j", "--ioengine=nbd", f"--uri={s.uri}", "--rw=randrw", "--bsrange=512-64k",
             "--size=16M", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
             "--randseed=3", cwd=tmp_path)


# ---------------------------------------------------------------- modes of the server

def test_snapshot_leaves_the_base_as_it_was(serve, disk, handle):
    before = sha256(disk)
    with serve("-t", "--snapshot") as s:
        h = handle(s.uri)
        h.pwrite(b"B" * MIB, MIB // 2)
        h.zero(MIB, 16 * MIB)
        h.trim(MIB, 3 * MIB)
        h.flush()
        assert h.pread(MIB, MIB // 2) == b"B" * MIB
        assert h.pread(MIB, 16 * MIB) == bytes(MIB)
        assert h.pread(512, 0) == pattern(4 * MIB)[:512]
    assert sha256(disk) == before


def test_snapshot_can_be_committed(serve, disk, fmt, handle, peer):
    with serve("--snapshot", "--commit-on-exit") as s:
        h = handle(s.uri)
        h.pwrite(b"C" * MIB, 6 * MIB)
        h.shutdown()
        assert s.wait() == 0
    peer("qemu-io", "-r", "-f", fmt, "-c", f"read -P 0x43 {6 * MIB} {MIB}", disk)
    if fmt == "qcow2":
        peer("qemu-img", "check", disk)


def test_snapshot_can_be_kept(serve, disk, fmt, handle, peer, tmp_path):
    before = sha256(disk)
    with serve("--snapshot", "--keep", tmp_path / "kept.qcow2") as s:
        h = handle(s.uri)
        h.pwrite(b"K" * MIB, 6 * MIB)
        h.shutdown()
        assert s.wait() == 0
    assert sha256(disk) == before
    info = json.loads(peer("qemu-img", "info", "--output=json", tmp_path / "kept.qcow2").stdout)
    assert info["format"] == "qcow2" and info["backing-filename-format"] == fmt
    peer("qemu-img", "check", tmp_path / "kept.qcow2")
    peer("qemu-io", "-r", "-c", f"read -P 0x4b {6 * MIB} {MIB}", tmp_path / "kept.qcow2")


def test_scratch_limit_is_no_space_for_the_client_and_the_server_lives(serve, handle, tmp_path):
    with serve("-t", "--snapshot", "--scratch-size", "4M", "--scratch", tmp_path) as s:
        h = handle(s.uri)
        with pytest.raises(nbd.Error) as e:
            for i in range(16):
                h.pwrite(pattern(MIB, i), i * MIB)
        assert e.value.errno == "ENOSPC"
        assert h.pread(512, 16 * MIB) == pattern(MIB, 2)[:512]


def test_read_only_refuses_writes(serve, disk, handle):
    before = sha256(disk)
    with serve("-t", "-r") as s:
        h = handle(s.uri, lambda h: h.set_strict_mode(0))
        assert h.is_read_only()
        for call in (lambda: h.pwrite(b"x" * 100_000, 0), lambda: h.zero(512, 0), lambda: h.trim(512, 0)):
            with pytest.raises(nbd.Error) as e:
                call()
            assert e.value.errno == "EPERM"
        assert h.pread(512, 0) == pattern(4 * MIB)[:512]
    assert sha256(disk) == before


def test_tcp_on_a_free_port(strata, disk, fmt, peer):
    with Server(strata, disk, "-t", "-f", fmt, "-p", "0", "-x", "n") as s:
        assert s.uri.startswith("nbd://127.0.0.1:") and s.uri.endswith("/n")
        assert peer("nbdinfo", "--size", s.uri).stdout.strip() == str(SIZE)


def test_socket_activation(strata, disk, fmt, peer, tmp_path):
    """As a systemd socket unit starts it: the listening socket is descriptor 3."""
    path = str(tmp_path / "activated")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    shim = ("import os, sys; os.dup2(int(sys.argv[1]), 3); "
            "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); "
            "os.execv(sys.argv[2], sys.argv[2:])")
    proc = subprocess.Popen(
        [sys.executable, "-c", shim, str(listener.fileno()), strata, "serve", "-f", fmt, disk],
        pass_fds=[listener.fileno()], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert "systemd" in proc.stdout.readline()
        h = nbd.NBD()
        h.connect_unix(path)
        assert h.get_size() == SIZE
        h.shutdown()
        _, err = proc.communicate(timeout=20)
        assert proc.returncode == 0, err
        assert os.path.exists(path)  # it belongs to systemd
    finally:
        proc.kill()
        listener.close()


def test_socket_activation_by_libnbd(strata, disk, fmt):
    h = nbd.NBD()
    h.connect_systemd_socket_activation([strata, "serve", "-f", fmt, str(disk)])
    assert h.pread(512, 0) == pattern(4 * MIB)[:512]
    h.shutdown()
