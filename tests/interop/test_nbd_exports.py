# SPDX-License-Identifier: MIT
"""Several exports in one server, who may use them and how fast, and where the server listens."""
import json
import os
import re
import socket
import struct
import subprocess
import time

import pytest
from serving import *

MIB = 1 << 20


@pytest.fixture
def disks(tmp_path):
    """root.raw of 1 MiB, data.qcow2 of 2 MiB with a bitmap."""
    (tmp_path / "root.raw").write_bytes(b"root" + bytes(MIB - 4))
    data = tmp_path / "data.qcow2"
    for cmd in (["create", "-q", "-f", "qcow2", data, "2M"], ["bitmap", "--add", data, "b0"]):
        subprocess.run(["qemu-img", *map(str, cmd)], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 7 0 64k", str(data)], check=True, capture_output=True)
    return tmp_path


@pytest.fixture
def serve(strata, disks, tmp_path):
    def start(*args, images=("data.qcow2",), **kw):
        return Server(strata, [i.replace("=", f"={disks}/", 1) if "=" in i else disks / i for i in images],
                      *args, socket_path=kw.pop("socket_path", tmp_path / "s"), **kw)
    return start


TWO = ("root=root.raw", "data=data.qcow2")


# ---------------------------------------------------------------- names

def test_a_uri_for_each_export(serve, tmp_path):
    with serve("-t", "-r", images=TWO) as s:
        assert s.uris == [f"nbd+unix:///{n}?socket={tmp_path}/s" for n in ("root", "data")]


def test_list_info_and_go_by_name(serve, peer):
    with serve("-t", "-r", "-D", "of two", images=TWO) as s:
        exports = json.loads(peer("nbdinfo", "--list", "--json", s.uri).stdout)["exports"]
        assert [(e["export-name"], e["export-size"], e["description"]) for e in exports] == [
            ("root", MIB, "of two"), ("data", 2 * MIB, "of two")]
        with Client(s.path) as c:
            assert c.go(name=b"data").pread(0, 4) == b"\7" * 4
        with Client(s.path) as c:
            assert c.go(name=b"root").pread(0, 4) == b"root"
        with Client(s.path) as c:
            assert c.option(OPT_GO, c.info_data(b"other"))[-1][0] == ERR_UNKNOWN
            assert c.option(OPT_INFO, c.info_data(b"data"))[-1][0] == REP_ACK
            assert c.go(name=b"root").size == MIB


@pytest.mark.parametrize("args,size", [([], MIB), (["--default", "data"], 2 * MIB)])
def test_default_export(serve, args, size):
    with serve("-t", "-r", *args, images=TWO) as s, Client(s.path) as c:
        assert c.go().size == size


@pytest.mark.parametrize("args,text", [
    (["a=root.raw", "data.qcow2"], "several exports need a name each"),
    (["a=root.raw", "a=data.qcow2"], "two exports of the name 'a'"),
    (["a=root.raw", "b=data.qcow2", "-x", "n"], "--name is for one export"),
    (["a=root.raw", "b=data.qcow2", "--default", "c"], "no export has the name 'c'"),
    (["a=root.raw", "b=data.qcow2", "-s", "--keep", "k"], "--keep is one file"),
    (["a=root.raw", "b=data.qcow2", "-B", "none"], "no bitmap 'none' in any"),
    (["a=root.raw", "--tls-required"], "--tls-required needs --tls"),
    (["a=root.raw", "--iops-burst", "3"], "--iops-burst needs --iops"),
    (["a=root.raw", "--vsock", "1", "-k", "x"], "exclude each other"),
    (["a=root.raw", "-s", "--scratch", "memory:"], "memory:SIZE"),
])
def test_refusals(run, disks, args, text):
    err = run("serve", "-r", *args, status=1, cwd=disks).stderr if "-s" not in args else \
        run("serve", *args, status=1, cwd=disks).stderr
    assert text in err


def test_a_file_with_an_equals_sign_alone_is_a_file(strata, disks, tmp_path):
    os.rename(disks / "root.raw", disks / "a=b.raw")
    with Server(strata, "a=b.raw", "-r", "-t", socket_path=tmp_path / "s", cwd=disks) as s, Client(s.path) as c:
        assert c.go(name=b"").pread(0, 4) == b"root"


def test_contexts_belong_to_the_export_that_was_named(serve):
    with serve("-t", "-r", "-B", "b0", images=TWO) as s:
        with Client(s.path) as c:
            c.option(OPT_STRUCTURED)
            have = [b[4:] for k, b in c.option(OPT_LIST_META, c.meta_data(b"data")) if k == REP_META]
            assert have == [b"base:allocation", b"qemu:dirty-bitmap:b0"]
            have = [b[4:] for k, b in c.option(OPT_LIST_META, c.meta_data(b"root")) if k == REP_META]
            assert have == [b"base:allocation"]
            c.option(OPT_SET_META, c.meta_data(b"data", [b"qemu:dirty-bitmap:b0"]))
            assert c.option(OPT_GO, c.info_data(b"root"))[-1][0] == REP_ACK
            c.structured = True
            assert c.call(STATUS, 0, 4096)[0] == EINVAL
        with Client(s.path) as c:
            c.go(name=b"data", meta=[b"qemu:dirty-bitmap:b0"])
            assert c.status(0, 2 * MIB)


def test_one_clients_writes_stay_in_its_export(serve, disks):
    with serve("-t", "-f", "raw", images=("a=root.raw", "b=data.qcow2")) as s:
        with Client(s.path) as a, Client(s.path) as b:
            a.go(name=b"a"), b.go(name=b"b")
            before = b.pread(0, 4096)
            assert a.pwrite(0, b"x" * 4096) == 0
            assert b.pread(0, 4096) == before
    assert (disks / "root.raw").read_bytes()[:4096] == b"x" * 4096


# ---------------------------------------------------------------- how many, how long

def test_share_is_for_each_export(serve):
    with serve("-t", "-r", "-e", "1", images=TWO) as s:
        with Client(s.path) as a, Client(s.path) as b:
            a.go(name=b"root")
            kind, text = b.option(OPT_GO, b.info_data(b"root"))[-1]
            assert kind == ERR_POLICY and b"as many clients" in text
            b.go(name=b"data")
            a.close()
            for _ in range(100):
                with Client(s.path) as d:
                    if d.option(OPT_GO, d.info_data(b"root"))[-1][0] == REP_ACK:
                        return
                time.sleep(0.02)
            raise AssertionError("the place was not given back")


def test_max_connections_makes_others_wait(serve):
    with serve("-t", "-r", "--max-connections", "1", images=TWO) as s:
        with Client(s.path) as a:
            a.go(name=b"root")
            b = Client(s.path, greet=False)
            b.s.settimeout(0.3)
            with pytest.raises(TimeoutError):
                b.read(18)
        b.s.settimeout(10)
        assert b.read(8) == b"NBDMAGIC"
        b.close()


def test_handshake_timeout(serve):
    with serve("-t", "--handshake-timeout", "1") as s, Client(s.path, greet=False) as c:
        c.read(18)
        start = time.monotonic()
        assert c.closed()
        assert 0.8 < time.monotonic() - start < 5


def test_idle_timeout_ends_only_the_idle(serve):
    with serve("-t", "--idle-timeout", "1") as s, Client(s.path) as idle, Client(s.path) as busy:
        idle.go(), busy.go()
        end = time.monotonic() + 3.5
        while time.monotonic() < end:
            busy.pread(0, 512)
            time.sleep(0.05)
        assert idle.closed()


def test_slow_loris_in_the_middle_of_a_request_is_ended(serve):
    """A request that comes a byte in a while holds memory for as long as it likes; not here."""
    with serve("-t", "--idle-timeout", "1") as s, Client(s.path) as c:
        c.go()
        c.s.sendall(struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 1, 0, MIB) + b"x" * 1000)
        assert c.closed()


# ---------------------------------------------------------------- limits

def test_iops_limit_holds_and_allows_a_burst(serve):
    with serve("-t", "--iops", "100", "--iops-burst", "50") as s, Client(s.path) as c:
        c.go()
        start = time.monotonic()
        for _ in range(50):
            c.pread(0, 512)
        burst = time.monotonic() - start
        for _ in range(50):
            c.pread(0, 512)
        both = time.monotonic() - start
        assert burst < 0.4 < both < 3


def test_bandwidth_limit_holds_for_all_clients_together(serve):
    with serve("-t", "--bandwidth", "8M", "--bandwidth-burst", "1M") as s:
        with Client(s.path) as a, Client(s.path) as b:
            a.go(), b.go()
            start = time.monotonic()
            for _ in range(2):
                sent = [c.send(READ, 0, 2 * MIB) for c in (a, b)]
                for c in (a, b):
                    c.reply()
            assert 0.7 < time.monotonic() - start < 4  # 7 MiB beyond the burst at 8 MiB/s


def test_limited_requests_do_not_hold_up_the_end(serve):
    with serve("-t", "--iops", "1", "--iops-burst", "1") as s, Client(s.path) as c:
        c.go()
        for i in range(30):
            c.send(READ, 0, 512)
        c.reply()
        start = time.monotonic()
        assert s.stop() == 0
        assert time.monotonic() - start < 10


def test_other_exports_are_not_limited_by_one(serve):
    with serve("-t", "-r", "--iops", "5", "--iops-burst", "1", images=TWO) as s:
        with Client(s.path) as a, Client(s.path) as b:
            a.go(name=b"root"), b.go(name=b"data")
            for _ in range(20):
                a.send(READ, 0, 512)
            start = time.monotonic()
            b.pread(0, 512)
            assert time.monotonic() - start < 1


# ---------------------------------------------------------------- where, and what is written down

def test_abstract_socket(serve, tmp_path):
    name = f"@strata-test-{os.getpid()}"
    for spelling in (name, "unix:" + name):
        with serve("-t", socket_path=spelling) as s, Client(name) as c:
            assert s.uri == f"nbd+unix:///?socket={name}"
            assert c.go().pread(0, 4) == b"\7" * 4
    assert not [f for f in os.listdir(tmp_path) if "strata-test" in f]


def test_vsock_listens_or_says_why_not(strata, disks):
    """Where the kernel has a loopback for vsock, data passes; elsewhere the message names vsock."""
    p = subprocess.Popen([strata, "serve", "-r", "-t", "--vsock", "0", str(disks / "data.qcow2")],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    uri = p.stdout.readline().strip()
    if not uri:
        assert "vsock" in p.communicate()[1]
        return
    try:
        port = int(re.fullmatch(r"nbd\+vsock://2:(\d+)/", uri)[1])
        try:
            with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as v:
                v.connect((1, port))
                assert v.recv(8) == b"NBDMAGIC"
        except OSError as e:
            assert e.errno  # no loopback transport here: the listening side is all that can be shown
    finally:
        p.terminate()
        assert p.wait(20) == 0
        p.communicate()


def test_access_log(serve, tmp_path):
    log = tmp_path / "log"
    with serve("-t", "-r", "--access-log", log, images=('we"ird=root.raw', "data=data.qcow2")) as s:
        with Client(s.path) as c:
            c.go(name=b'we"ird')
            c.pread(0, 4096)
            c.call(READ, 10 * MIB, 512)
            c.send(DISC)
            assert c.closed()
        Client(s.path, flags=0x80).closed()
    lines = log.read_text().splitlines()
    assert len(lines) == 3
    when = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ client="
    assert re.fullmatch(when + rf'1 open peer=unix\(pid={os.getpid()},uid={os.getuid()}\) tls=no '
                        r'export="we\\x22ird"', lines[0])
    assert re.fullmatch(when + r"1 close requests=2 read=4608 written=0 errors=1 seconds=\d+\.\d left", lines[1])
    assert re.match(when + r"2 refused peer=unix", lines[2])


# ---------------------------------------------------------------- comings and goings

def test_thousand_connects_while_others_work(serve):
    with serve("-t", "-e", "200") as s, Client(s.path) as worker:
        worker.go()
        for i in range(1000):
            c = Client(s.path, greet=i % 3 != 0)
            if i % 2 and i % 3:
                c.send_option(OPT_GO, c.info_data())
            if i % 50 == 0:
                block = bytes([i % 251]) * 4096
                assert worker.pwrite(64 << 10, block) == 0
                assert worker.pread(64 << 10, 4096) == block
            c.close()
        fds = len(os.listdir(f"/proc/{s.proc.pid}/fd"))
        for _ in range(100):
            if fds < 60:
                break
            time.sleep(0.05)
            fds = len(os.listdir(f"/proc/{s.proc.pid}/fd"))
        assert fds < 60


@pytest.mark.plain_build
def test_memory_of_many_large_requests_is_bounded_over_all_clients(serve, disks):
    """30 clients that ask for much and read nothing: far less than 30 * 32 MiB is held."""
    (disks / "full.raw").write_bytes(b"\7" * (2 * MIB))
    with serve("-t", "-r", images=("full.raw",)) as s:
        clients = [Client(s.path).go() for _ in range(30)]
        for c in clients:
            for _ in range(20):
                c.send(READ, 0, 2 * MIB)
        time.sleep(1)
        with open(f"/proc/{s.proc.pid}/status") as f:
            rss = int(re.search(r"VmRSS:\s+(\d+)", f.read())[1]) // 1024
        assert rss < 450  # 256 MiB of payload, slots and the program
        with Client(s.path) as c:
            assert c.go().pread(0, 512) == b"\7" * 512
        for c in clients:
            c.close()
