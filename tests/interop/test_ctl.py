# SPDX-License-Identifier: MIT
"""The control socket of a running serve: status, commit, keep, drop, resize, stop; hostile bytes."""
import json
import os
import random
import signal
import socket
import stat
import subprocess
import threading
import time

import pytest
from serving import *

MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(b"o" * SIZE)
    return path


@pytest.fixture
def scratch(tmp_path):
    d = tmp_path / "scratch"
    d.mkdir()
    return d


@pytest.fixture
def ctl(tmp_path):
    return tmp_path / "ctl"


@pytest.fixture
def serve(strata, disk, scratch, ctl, tmp_path):
    def start(*args, image=None, snapshot=True, **kw):
        more = ["--snapshot"] if snapshot else []
        if snapshot and "--scratch" not in args:
            more += ["--scratch", scratch]
        return Server(strata, image or disk, "-t", "-f", "raw", "--control", ctl, *more, *args,
                      socket_path=tmp_path / "s", **kw)
    return start


def leftovers(tmp_path):
    return sorted(f for f in os.listdir(tmp_path) if "commit" in f or f in ("s", "ctl"))


# ---------------------------------------------------------------- what it says

def test_status_for_people_and_programs(serve, run, ctl, disk):
    with serve("--scratch-size", "64M") as s, Client(s.path) as c:
        c.go().pwrite(0, b"n" * MIB)
        text = run("ctl", ctl, "status").stdout
        assert f"{disk} (raw, 8 MiB)" in text and "64 MiB" in text and "1 clients" in text
        d, = json.loads(run("ctl", ctl, "status", "--output=json").stdout)["disks"]
        assert d["snapshot"] and d["size"] == SIZE and d["export"]["bytes-written"] == MIB
        assert MIB <= d["scratch"]["used"] < 2 * MIB and d["scratch"]["limit"] == 64 * MIB


def test_the_socket_is_its_owners_alone_and_goes_with_the_server(serve, ctl, tmp_path):
    with serve():
        assert stat.S_IMODE(os.stat(ctl).st_mode) == 0o600
    assert leftovers(tmp_path) == []


def test_stop(serve, run, ctl, tmp_path):
    with serve() as s:
        run("ctl", ctl, "stop")
        assert s.wait() == 0
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("args,text", [
    (["statsu"], "did you mean 'status'?"),
    (["keep"], "keep needs a file"),
    (["commit", "x"], "commit takes no argument"),
    (["status", "--disk", "x"], "takes no --disk"),
    (["commit", "--disk", "other"], "there is no disk 'other'"),
    (["resize", "1M"], "can only grow"),
])
def test_refusals(serve, run, ctl, args, text):
    with serve():
        assert text in run("ctl", ctl, *args, status=1).stderr


def test_nobody_there(run, tmp_path):
    assert "nobody listens there" in run("ctl", tmp_path / "none", "status", status=1).stderr


def test_without_a_snapshot_there_is_nothing_to_commit(serve, run, ctl):
    with serve(snapshot=False):
        for cmd in (["commit"], ["drop"], ["keep", "x.qcow2"]):
            assert "no temporary snapshot" in run("ctl", ctl, *cmd, status=1).stderr


# ---------------------------------------------------------------- what it does

@pytest.fixture(params=["disk", "memory"])
def where(request):
    return [] if request.param == "disk" else ["--scratch", "memory:32M"]


def test_commit_while_a_client_is_connected(serve, run, ctl, disk, tmp_path, where):
    with serve(*where) as s, Client(s.path) as c:
        c.go()
        for round, byte in enumerate((b"1", b"2")):
            assert c.pwrite(MIB + round * 4096, byte * 4096) == 0
            run("ctl", ctl, "commit")
            assert c.pread(MIB + round * 4096, 4096) == byte * 4096
            assert disk.read_bytes()[MIB + round * 4096:][:4096] == byte * 4096
            used = json.loads(run("ctl", ctl, "status", "--output=json").stdout)["disks"][0]["scratch"]["used"]
            assert used < MIB
        assert c.pwrite(0, b"3" * 4096) == 0
    assert disk.read_bytes() == b"o" * MIB + b"1" * 4096 + b"2" * 4096 + b"o" * (SIZE - MIB - 8192)
    assert leftovers(tmp_path) == []


def test_drop_shows_the_disk_again(serve, run, ctl, disk, where):
    with serve(*where) as s, Client(s.path) as c:
        c.go().pwrite(0, b"n" * 8192)
        run("ctl", ctl, "drop")
        assert c.pread(0, 8192) == b"o" * 8192
        assert c.pwrite(4096, b"m" * 4096) == 0
        assert c.pread(0, 8192) == b"o" * 4096 + b"m" * 4096
    assert disk.read_bytes() == b"o" * SIZE


def test_keep_is_a_copy_of_its_moment(serve, run, peer, ctl, disk, tmp_path, where):
    with serve(*where) as s, Client(s.path) as c:
        c.go().pwrite(0, b"a" * 4096)
        run("ctl", ctl, "keep", "kept.qcow2", cwd=tmp_path)
        c.pwrite(0, b"b" * 4096)
        assert "kept.qcow2" in run("ctl", ctl, "keep", tmp_path / "kept.qcow2", status=1).stderr
        assert c.pread(0, 4096) == b"b" * 4096
    assert disk.read_bytes() == b"o" * SIZE
    peer("qemu-img", "check", tmp_path / "kept.qcow2")
    peer("qemu-img", "convert", "-O", "raw", tmp_path / "kept.qcow2", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"a" * 4096 + b"o" * (SIZE - 4096)


def test_of_several_disks_one(strata, run, disk, ctl, tmp_path):
    other = tmp_path / "other.raw"
    other.write_bytes(b"p" * MIB)
    with Server(strata, [f"a={disk}", f"b={other}"], "-f", "raw", "-t", "-s", "--control", ctl,
                "--scratch", "memory:8M", socket_path=tmp_path / "s") as s:
        with Client(s.path) as a, Client(s.path) as b:
            a.go(name=b"a").pwrite(0, b"1" * 4096), b.go(name=b"b").pwrite(0, b"2" * 4096)
            assert "say which" in run("ctl", ctl, "commit", status=1).stderr
            run("ctl", ctl, "commit", "--disk", "b")
            assert other.read_bytes()[:4096] == b"2" * 4096
            assert disk.read_bytes()[:4096] == b"o" * 4096


def test_resize_is_seen_by_new_clients(serve, run, ctl, disk):
    with serve(snapshot=False) as s, Client(s.path) as old:
        old.go()
        run("ctl", ctl, "resize", "9M")
        with Client(s.path) as c:
            assert c.go().size == 9 * MIB
            assert c.pwrite(8 * MIB, b"z" * 512) == 0
        assert old.pread(0, 4096) == b"o" * 4096
    assert disk.stat().st_size == 9 * MIB


@pytest.mark.parametrize("cap", [["--scratch", "memory:1M"], ["--scratch-size", "1M"]], ids=["memory", "file"])
def test_a_full_scratch_is_enospc_and_not_the_end(serve, run, ctl, disk, cap):
    with serve(*cap) as s, Client(s.path) as c:
        c.go()
        results = [c.pwrite(i * 65536, bytes([i]) * 65536) for i in range(32)]
        assert 0 in results and ENOSPC in results and set(results) == {0, ENOSPC}
        for i, r in enumerate(results):
            if r == 0:
                assert c.pread(i * 65536, 65536) == bytes([i]) * 65536
        run("ctl", ctl, "drop")
        assert c.pwrite(0, b"n" * 65536) == 0
        assert c.pread(0, 65536) == b"n" * 65536


@pytest.mark.parametrize("how", ["commit", "keep", "drop"])
def test_requests_in_flight_meanwhile_are_all_answered_right(serve, ctl, disk, how, tmp_path, seed):
    """Clients write and read without a pause; every read is what this client wrote last."""
    rnd = random.Random(seed)
    with serve() as s, Control(ctl) as control:
        stop, errors = threading.Event(), []

        def work(n):
            mine = random.Random(seed + n)
            last = {}
            try:
                with Client(s.path) as c:
                    c.go()
                    while not stop.is_set():
                        # Large ones are moved by other threads: they are under way for a while.
                        size = MIB if n else 4096
                        at = n * 2 * MIB + mine.randrange(2) * MIB
                        if how != "drop" and at in last:
                            assert c.pread(at, size) == last[at]
                        last[at] = bytes([mine.randrange(256)]) * size
                        assert c.pwrite(at, last[at]) == 0
            except Exception as e:  # noqa: BLE001 - shown by the main thread
                errors.append(e)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for t in threads:
            t.start()
        for i in range(8):
            control.call(how, **({"file": str(tmp_path / f"k{i}.qcow2")} if how == "keep" else {}))
            time.sleep(rnd.random() / 20)
        stop.set()
        for t in threads:
            t.join()
        assert not errors, errors
    assert leftovers(tmp_path) == []


# ---------------------------------------------------------------- the end in the middle

def test_killed_in_a_commit_the_journal_completes_it(serve, run, ctl, tmp_path, scratch):
    """Whenever the server is killed: the base is old, or new, or a journal beside it makes it new."""
    size = 64 * MIB
    seen = set()
    for attempt in range(6):
        image = tmp_path / f"disk{attempt}.raw"
        image.write_bytes(b"o" * size)
        s = serve(image=image)
        with Client(s.path) as c, Control(ctl) as control:
            c.go()
            for i in range(32):
                assert c.pwrite(i * 2 * MIB, b"n" * MIB) == 0
            new = (b"n" * MIB + b"o" * MIB) * 32
            control.f.write(b'{"execute": "commit"}\n')
            control.f.flush()
            if attempt % 2:
                end = time.monotonic() + 10
                while not any("commit" in f for f in os.listdir(tmp_path)) and time.monotonic() < end:
                    pass
            time.sleep(attempt // 2 * 0.01)
            s.proc.kill()
            s.proc.communicate()
        journals = [f for f in os.listdir(tmp_path) if "commit" in f]
        if journals:
            journal, = journals
            run("check", tmp_path / journal)
            run("commit", "--trust", "local", tmp_path / journal)
            assert image.read_bytes() == new
            os.unlink(tmp_path / journal)
            seen.add("journal")
        else:
            assert image.read_bytes() in (b"o" * size, new)
        image.unlink()
    assert "journal" in seen


def test_commit_that_fails_leaves_clients_right_and_can_be_repeated(strata, run, ctl, tmp_path, scratch):
    """The base's file system is full in the middle of the commit; then it no longer is."""
    base = tmp_path / "base.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(base), "16M"], check=True)
    with Server(strata, base, "-t", "-s", "--control", ctl, "--scratch", scratch,
                socket_path=tmp_path / "s",
                preexec_fn=lambda: signal.signal(signal.SIGXFSZ, signal.SIG_IGN)) as s:
        with Client(s.path) as c, Control(ctl) as control:
            c.go()
            for i in range(8):
                c.pwrite(i * MIB, bytes([i + 1]) * MIB)
            # The scratch file is there; the base may not grow as far as it must (soft limits).
            subprocess.run(["prlimit", f"--fsize={4 * MIB}:", "--pid", str(s.proc.pid)], check=True)
            text = control.error("commit")
            assert "commit" in text
            for i in range(8):
                assert c.pread(i * MIB, MIB) == bytes([i + 1]) * MIB
            subprocess.run(["prlimit", "--fsize=unlimited:", "--pid", str(s.proc.pid)], check=True)
            control.call("commit")
            for i in range(8):
                assert c.pread(i * MIB, MIB) == bytes([i + 1]) * MIB
    run("check", base)
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(base), str(tmp_path / "out")], check=True)
    data = (tmp_path / "out").read_bytes()
    assert all(data[i * MIB:(i + 1) * MIB] == bytes([i + 1]) * MIB for i in range(8))
    assert leftovers(tmp_path) == []


# ---------------------------------------------------------------- hostile

@pytest.mark.parametrize("line", [
    b"", b"null", b"[]", b"{}", b'{"execute": 1}', b'{"execute": "none"}', b"{" * 200, b"[" * 5000,
    b'{"execute": "status", "more": 1}', b'{"execute": "status", "arguments": []}',
    b'{"execute": "commit", "arguments": {"disk": 3}}', b'{"execute": "keep", "arguments": {"file": "x"}}',
    b'{"execute": "commit", "arguments": {"file": "x"}}', b'{"execute": "status", "execute": "stop"}',
    b"\xff\xfe\0\0", b'{"execute": "status\0"}', b'"' * 999, b'{"execute": "\xc3("}',
    b'{"execute": "resize", "arguments": {"size": -1}}', b'{"execute": "resize", "arguments": {"size": 1e99}}',
], ids=lambda b: repr(b[:24]))
def test_hostile_lines_get_an_error_and_the_next_is_served(server, line):
    with Control(server) as c:
        if line:
            assert "error" in c.line(line)
        assert c.call("status")["program"] == "serve"


@pytest.fixture(scope="module")
def server(strata, tmp_path_factory):
    d = tmp_path_factory.mktemp("ctl")
    (d / "disk.raw").write_bytes(bytes(MIB))
    with Server(strata, d / "disk.raw", "-f", "raw", "-t", "-s", "--scratch", "memory:1M", "--control", d / "ctl",
                socket_path=d / "s"):
        yield d / "ctl"


def test_endless_line_ends_the_connection(server):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(str(server))
        s.settimeout(30)
        try:
            for _ in range(100):
                s.sendall(b"x" * 65536)
        except (BrokenPipeError, ConnectionResetError):
            pass
    with Control(server) as c:
        c.call("status")


def test_random_bytes(server, seed):
    rnd = random.Random(seed)
    words = [b'{"execute":', b'"status"', b"}", b"{", b"[", b'"', b"\n", b"\\", b'"arguments":', b"\0", b"\r"]
    for _ in range(300):
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(server))
            data = b"".join(rnd.choice(words) if rnd.random() < .8 else rnd.randbytes(9) for _ in range(30))
            try:
                s.sendall(data)
            except OSError:
                pass
    with Control(server) as c:
        c.call("status")


def test_several_clients_and_too_many(server):
    clients = [Control(server) for _ in range(16)]
    for c in clients:
        assert c.call("status")
    with socket.socket(socket.AF_UNIX) as late:
        late.connect(str(server))
        late.settimeout(0.2)
        with pytest.raises(TimeoutError):
            late.recv(1)
        clients.pop().__exit__()
        late.settimeout(10)
        assert late.recv(1)
    for c in clients:
        c.__exit__()


def test_lines_in_one_piece_and_split(server):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(str(server))
        f = s.makefile("rb")
        f.readline()
        request = b'{"execute": "status", "id": %d}\r\n'
        s.sendall(request % 1 + request % 2 + (request % 3)[:10])
        assert [json.loads(f.readline())["id"] for _ in range(2)] == [1, 2]
        s.sendall((request % 3)[10:])
        assert json.loads(f.readline())["id"] == 3
