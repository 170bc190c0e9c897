# SPDX-License-Identifier: MIT
"""strata serve as its user sees it: options, messages, beginning and end."""
import os
import signal
import socket
import stat
import subprocess
import time

import pytest
from serving import Client, Server

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(b"hello" + bytes(MIB - 5))
    return path


@pytest.fixture
def sock(tmp_path):
    return tmp_path / "s"


@pytest.fixture
def serve(strata, disk, sock):
    return lambda *args, **kw: Server(strata, disk, "-f", "raw", *args, socket_path=sock, **kw)


def refused(run, *args):
    return run("serve", *args, status=1).stderr


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("args,text", [
    (["--commit-on-exit"], "--commit-on-exit needs --snapshot"),
    (["--keep", "x.qcow2"], "--keep needs --snapshot"),
    (["--scratch", "/tmp"], "--scratch needs --snapshot"),
    (["--scratch-size", "1M"], "--scratch-size needs --snapshot"),
    (["--snapshot", "--read-only"], "exclude each other"),
    (["--snapshot", "--keep", "x.qcow2", "--commit-on-exit"], "exclude each other"),
    (["-k", "sock", "-p", "1234"], "exclude each other"),
    (["-k", "sock", "-b", "::1"], "exclude each other"),
    (["-k", "s" * 200], "200 bytes, the limit is 107"),
    (["-x", "n" * 5000, "-k", "sock"], "at most 4096 bytes"),
    (["-x", b"\xff", "-k", "sock"], "UTF-8"),
    (["-p", "99999"], "99999"),
    (["-e", "0"], "0 is not between 1 and"),
    (["-k", "/nowhere/at/all"], "/nowhere/at/all: No such file or directory"),
    (["--cache", "fast"], "fast"),
    (["--pid-file", "/nowhere/p", "-k", "sock"], "/nowhere/p: No such file"),
])
def test_wrong_options_are_refused_in_a_sentence(strata, disk, tmp_path, args, text):
    p = subprocess.run([strata, "serve", "-f", "raw", *args, str(disk)], capture_output=True,
                       cwd=tmp_path, timeout=20)
    assert p.returncode == 1
    assert text in p.stderr.decode(errors="replace")
    assert p.stdout == b""
    assert sorted(os.listdir(tmp_path)) == ["disk.raw"]


def test_missing_image_is_refused(run, tmp_path):
    assert "none.raw: cannot open: No such file" in refused(run, "-k", tmp_path / "s", tmp_path / "none.raw")
    assert not (tmp_path / "s").exists()


def test_guessed_raw_is_not_served_for_writing(run, disk, sock):
    err = refused(run, "-k", sock, disk)
    assert "give -f raw" in err
    assert "give -f raw" in refused(run, "-k", sock, "--snapshot", "--commit-on-exit", disk)


def test_guessed_raw_is_served_read_only_and_as_snapshot(strata, disk, sock):
    for mode in ("-r", "--snapshot"):
        with Server(strata, disk, mode, socket_path=sock) as s, Client(s.path) as c:
            assert c.go().pread(0, 5) == b"hello"


def test_existing_keep_file_is_refused_before_serving(run, disk, sock, tmp_path):
    (tmp_path / "there").write_text("precious")
    err = refused(run, "-f", "raw", "-k", sock, "--snapshot", "--keep", tmp_path / "there", disk)
    assert "already exists" in err
    assert (tmp_path / "there").read_text() == "precious"


# ---------------------------------------------------------------- sockets

def test_ready_line_is_the_uri(serve, sock):
    with serve("-t", "-x", "a b/c") as s:
        assert s.uri == f"nbd+unix:///a%20b%2Fc?socket={sock}"


def test_uri_of_a_relative_socket_is_absolute(strata, disk, tmp_path):
    with Server(strata, disk, "-f", "raw", "-t", socket_path="rel", cwd=tmp_path) as s:
        assert s.uri == f"nbd+unix:///?socket={tmp_path}/rel"


def test_stale_socket_is_replaced(serve, sock):
    with serve("-t") as s:
        s.proc.kill()
        s.proc.communicate()
        s.proc.returncode = 0
    assert stat.S_ISSOCK(os.stat(sock).st_mode)
    with serve("-t") as s, Client(s.path) as c:
        assert c.go().pread(0, 5) == b"hello"


def test_live_socket_is_left_alone(serve, run, sock, tmp_path):
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(MIB))
    with serve("-t") as s:
        assert "another server listens there" in refused(run, "-f", "raw", "-k", sock, other)
        with Client(s.path) as c:
            c.go()


def test_file_in_the_sockets_place_is_left_alone(run, disk, sock):
    sock.write_text("mine")
    assert "is not a socket" in refused(run, "-f", "raw", "-k", sock, disk)
    assert sock.read_text() == "mine"


def test_port_in_use_is_refused(strata, run, disk):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert f"port {port}: Address already in use" in refused(run, "-f", "raw", "-p", port, disk)


# ---------------------------------------------------------------- the end

def test_ends_when_the_last_client_leaves(serve, sock):
    with serve() as s:
        with Client(s.path) as a, Client(s.path) as b:
            a.go(), b.go()
            a.close()
            time.sleep(0.2)
            assert s.proc.poll() is None
        assert s.wait() == 0
    assert not sock.exists()


def test_a_client_that_only_looks_does_not_end_it(serve):
    with serve() as s:
        Client(s.path).close()
        time.sleep(0.2)
        with Client(s.path) as c:
            c.go()


def test_ends_when_a_half_handshake_outlives_the_last_client(serve):
    with serve() as s:
        with Client(s.path) as c, Client(s.path, greet=False) as half:
            half.read(18)
            c.go()
            c.close()
            time.sleep(0.1)
            assert s.proc.poll() is None
        assert s.wait() == 0


def test_persistent_goes_on(serve, sock):
    with serve("-t") as s:
        for _ in range(3):
            with Client(s.path) as c:
                c.go()
        time.sleep(0.1)
        assert s.proc.poll() is None


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_it_in_order(serve, sock, tmp_path, signo, disk):
    with serve("-t", "--pid-file", tmp_path / "pid") as s:
        assert int((tmp_path / "pid").read_text()) == s.proc.pid
        c = Client(s.path).go()
        assert c.pwrite(4096, b"written") == 0
        assert s.stop(signo) == 0
        assert c.closed()
    assert not sock.exists() and not (tmp_path / "pid").exists()
    assert disk.read_bytes()[4096:4103] == b"written"


def test_signal_before_any_client(serve):
    with serve() as s:
        start = time.monotonic()
        assert s.stop() == 0
        assert time.monotonic() - start < 2


def test_requests_in_flight_are_answered_before_the_end(serve):
    with serve("-t") as s:
        c = Client(s.path).go()
        cookies = [c.send(1, i * 4096, 4096, payload=b"z" * 4096) for i in range(100)]
        c.send(0, 0, 4096)
        first = c.reply()[0]
        s.proc.send_signal(signal.SIGTERM)
        got = [first]
        try:
            while True:
                got.append(c.reply()[0])
        except EOFError as e:
            assert str(e).startswith("0 of")  # at a reply's edge
        assert len(got) == len(set(got))
        assert s.wait() == 0


def test_socket_of_somebody_else_is_not_removed(serve, sock):
    with serve("-t") as s:
        os.unlink(sock)
        sock.write_text("new owner")
        assert s.stop() == 0
    assert sock.read_text() == "new owner"


# ---------------------------------------------------------------- fork, readiness, limits

def test_fork_returns_when_clients_can_connect(strata, disk, sock, tmp_path):
    p = subprocess.run([strata, "serve", "--fork", "-f", "raw", "-k", str(sock), "--pid-file",
                        str(tmp_path / "pid"), str(disk)], capture_output=True, text=True, timeout=20)
    assert p.returncode == 0 and p.stderr == ""
    assert p.stdout == f"nbd+unix:///?socket={sock}\n"
    pid = int((tmp_path / "pid").read_text())
    assert os.getsid(pid) == pid
    with Client(str(sock)) as c:
        assert c.go().pread(0, 5) == b"hello"
    for _ in range(100):
        if not sock.exists() and not (tmp_path / "pid").exists():
            break
        time.sleep(0.05)
    else:
        os.kill(pid, signal.SIGKILL)
        raise AssertionError("still there")


def test_fork_reports_failure(strata, tmp_path):
    p = subprocess.run([strata, "serve", "--fork", "-k", str(tmp_path / "s"), str(tmp_path / "none")],
                       capture_output=True, text=True, timeout=20)
    assert p.returncode == 1
    assert p.stderr.count("No such file or directory") == 1


def test_ready_within_milliseconds(strata, disk, tmp_path):
    best = 9e9
    for i in range(10):
        start = time.monotonic()
        with Server(strata, disk, "-f", "raw", "-t", socket_path=tmp_path / f"s{i}") as s:
            best = min(best, time.monotonic() - start)
    assert best < 0.025  # 10 ms is the goal of the benchmark; here Python starts the process


def test_share_limits_the_clients_served_at_once(serve):
    with serve("-t", "--share", "2") as s:
        a, b = Client(s.path).go(), Client(s.path).go()
        third = Client(s.path, greet=False)
        third.s.settimeout(0.3)
        with pytest.raises(TimeoutError):
            third.read(18)
        a.close()
        third.s.settimeout(10)
        assert third.read(18)[:8] == b"NBDMAGIC"
        third.close()
        assert b.pread(0, 5) == b"hello"
        b.close()


def test_systemd_is_told_when_ready(serve, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as n:
        n.bind(str(tmp_path / "notify"))
        n.settimeout(10)
        with serve("-t", env={"NOTIFY_SOCKET": str(tmp_path / "notify")}):
            assert n.recv(100) == b"READY=1"


def test_verbose_reports_connections(serve):
    with serve("-v") as s:
        with Client(s.path) as c:
            c.go()
        assert s.wait() == 0
    assert "connected" in s.err


def test_second_writer_is_refused_by_name_of_the_first(serve, run, disk, tmp_path):
    with serve("-t") as s:
        err = refused(run, "-f", "raw", "-k", tmp_path / "s2", disk)
        assert str(s.proc.pid) in err
