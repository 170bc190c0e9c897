# SPDX-License-Identifier: MIT
"""vhost-user-blk: front ends that break rules, leave in the middle, or work while the control socket does."""
import array
import json
import os
import pathlib
import random
import select
import socket
import struct
import subprocess
import time

import pytest

import vhost_front as vf
from vhost_front import Front

MIB = 1 << 20
SPLIT = (vf.F_VERSION_1, vf.F_INDIRECT, vf.F_EVENT_IDX, vf.F_FLUSH, vf.F_WCE, vf.F_MQ, vf.F_DISCARD, vf.F_ZEROES)
PACKED = SPLIT + (vf.F_PACKED,)
INFLIGHT = struct.pack("<QQHH", 0, 0, 1, 64) + bytes(4)


def wait_until(true, what, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@pytest.fixture
def image(tmp_path, run):
    """An empty qcow2 of 16 MiB."""
    path = tmp_path / "d.qcow2"
    run("create", "-q", "-f", "qcow2", path, "16M")
    return path


@pytest.fixture
def serve(strata, tmp_path):
    """serve(*args): a server on tmp_path/s; it must end well on SIGTERM."""
    servers = []

    def call(*args):
        p = subprocess.Popen([strata, "serve", "--vhost-user", tmp_path / "s", "-t", *map(str, args)],
                             stdout=subprocess.PIPE, stderr=open(tmp_path / "err", "w"), text=True)
        assert p.stdout.readline() == f"vhost-user:{tmp_path}/s\n"
        servers.append(p)
        return p

    yield call
    for p in servers:
        if p.poll() is None:
            p.terminate()
        p.communicate(timeout=30)
        assert p.returncode == 0


def said(tmp_path):
    return (tmp_path / "err").read_text()


def works(path, features=SPLIT):
    """Somebody else is served."""
    front = Front(path, features)
    assert len(front.rings[0].read(0, 512)) == 512
    release(front)


def release(front):
    """Closes everything that a front end holds."""
    front.close()
    for r in front.rings:
        os.close(r.kick)
        os.close(r.call)
    front.mem.close()
    os.close(front.memfd)


def restart(front, base):
    """The ring of a stopped queue 0 once more."""
    ring = front.rings[0]
    front.send(10, struct.pack("<II", 0, base))
    front.send(13, struct.pack("<Q", 0), [ring.call])
    front.send(12, struct.pack("<Q", 0), [ring.kick])


# ---------------------------------------------------------------- memory

def test_new_in_flight_memory_under_running_rings_kills_nothing(serve, image, tmp_path):
    serve(image)
    front = Front(tmp_path / "s")
    ring = front.rings[0]
    for turn in range(4):
        front.send(31, INFLIGHT)
        _, fds = front.receive(fds=True)
        os.close(fds[0])
        ring.write(turn, bytes([turn + 1]) * 512)
        restart(front, struct.unpack("<II", front.ask(11, struct.pack("<II", 0, 0)))[1])
        assert ring.read(turn, 512) == bytes([turn + 1]) * 512
    release(front)


@pytest.mark.parametrize("version, num, last, used, flag", [
    (1, 64, 0xffff, 9, 1), (1, 64, 64, 0, 0), (1, 63, 0, 0, 1), (1, 0xffff, 0xffff, 0xffff, 255), (0, 9, 9, 9, 9),
    (0xffff, 64, 63, 1, 255)])
def test_hostile_in_flight_memory_stops_a_ring_at_most(serve, image, tmp_path, version, num, last, used, flag):
    serve(image)
    front = Front(tmp_path / "s", start=False)
    front.negotiate(1)
    front.table()
    fd = os.memfd_create("inflight", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    vf.seal(fd)
    entry = struct.pack("<B5xHQ", flag, 0xffff, 2**64 - 1)
    os.pwrite(fd, struct.pack("<QHHHH", 2**64 - 1, version, num, last, used) + entry * 64, 0)
    assert front.tell(32, struct.pack("<QQHH", 4096, 0, 1, 64) + bytes(4), [fd]) == 0
    ring = front.ring(0)
    ring.ring_bell()
    assert len(front.ask(1)) == 8
    os.pwrite(fd, bytes(range(256)) * 16, 0)
    front.ask(11, struct.pack("<II", 0, 0))
    restart(front, 0)
    assert len(front.ask(1)) == 8
    os.close(fd)
    release(front)
    works(tmp_path / "s")


def test_huge_pages_that_are_not_there_kill_nothing(serve, image, tmp_path):
    """A file of huge pages can be mapped when the machine has none; it breaks when it is touched."""
    serve(image)
    try:
        huge = os.memfd_create("huge", os.MFD_HUGETLB | os.MFD_ALLOW_SEALING)
        os.ftruncate(huge, 4 * MIB)
    except OSError:
        huge = None  # a kernel without: what follows is then about pages of the usual size
    front = Front(tmp_path / "s")
    ring = front.rings[0]
    if huge is None:
        huge = os.memfd_create("small")
        os.ftruncate(huge, 4 * MIB)
    at = 0x40000000
    region = struct.pack("<QQQQQ", 0, at, 3 * MIB + 4096, 0x600000000000, 0)
    assert front.tell(37, region, [huge]) == 0
    os.ftruncate(huge, 0)
    head, status = ring.alloc(16), ring.alloc(1)
    ring.put(head, struct.pack("<IIQ", vf.GET_ID, 0, 0))
    # Written by the server itself, not by the kernel for it.
    ring.submit([(vf.GUEST + head, 16, False), (at + 2 * MIB + 5, 20, True), (vf.GUEST + status, 1, True)])
    assert ring.wait() and ring.get(status, 1) == b"\0"
    assert front.tell(38, region) == 0
    release(front)
    os.close(huge)
    works(tmp_path / "s")


def test_memory_is_exchanged_while_requests_run(serve, image, tmp_path):
    serve(image)
    front = Front(tmp_path / "s")
    ring = front.rings[0]
    for turn in range(40):
        tokens = [ring.start(vf.OUT, 8 * i, bytes([turn + i + 1]) * 4096, kick=False)[0] for i in range(12)]
        ring.ring_bell()
        front.table()
        ring.ring_bell()
        assert sorted(t for t, _ in ring.wait(12)) == sorted(tokens)
    assert [ring.read(8 * i, 4096) for i in range(12)] == [bytes([40 + i]) * 4096 for i in range(12)]
    release(front)


# ---------------------------------------------------------------- rings

def test_a_broken_ring_stays_stopped_and_says_where_it_was(serve, image, tmp_path, run):
    serve("--snapshot", "--control", tmp_path / "c", image)
    front = Front(tmp_path / "s")
    ring = front.rings[0]
    data = ring.alloc(512)
    ring.put(data, b"1" * 512)
    head, status = ring.alloc(16), ring.alloc(1)
    ring.put(head, struct.pack("<IIQ", vf.OUT, 0, 5))
    ring.submit([(vf.GUEST + head, 16, False), (vf.GUEST + data, 512, False), (vf.GUEST + status, 1, True)])
    ring.wait()
    ring.submit([(0, 16, False)])
    wait_until(lambda: "breaks the rules" in said(tmp_path), "the ring goes on")
    ring.put(data, b"2" * 512)  # done again, the first request would write this
    run("ctl", tmp_path / "c", "commit")  # which holds all queues, and lets go
    front.table()
    assert struct.unpack("<II", front.ask(11, struct.pack("<II", 0, 0)))[1] == 2
    forget_the_request(ring)
    restart(front, 2)
    assert ring.read(5, 512) == b"1" * 512
    release(front)


def forget_the_request(ring):
    """The one that broke the ring, which is stopped."""
    ring.put(ring.at + 32768 + 2, struct.pack("<H", 2))
    ring.used = 2
    ring.waiting.clear()


def test_a_packed_ring_given_back_as_a_whole_is_signalled(serve, image, tmp_path):
    """Four requests of four places each in a ring of 16: it is where it was before, and yet something happened."""
    serve(image)
    front = Front(tmp_path / "s", PACKED, num=16)
    ring = front.rings[0]
    for turn in range(20):
        places = []
        for i in range(4):
            head, status, buf = ring.alloc(16), ring.alloc(1), ring.alloc(1024)
            ring.put(head, struct.pack("<IIQ", vf.IN, 0, 0))
            places.append([(vf.GUEST + head, 16, False), (vf.GUEST + buf, 512, True),
                           (vf.GUEST + buf + 512, 512, True), (vf.GUEST + status, 1, True)])
        event = ring.avail | ring.wrap << 15  # tell me when the first of them is used
        for pieces in places:
            ring.submit(pieces, kick=False)
            ring.put(ring.at + 16384, struct.pack("<HH", event, 2))
        ring.ring_bell()
        done = 0
        while done < 4:
            assert select.select([ring.call], [], [], 20)[0], f"turn {turn}: no word of it"
            os.eventfd_read(ring.call)
            done += len(ring.finished())
        assert ring.avail == 0
    release(front)


@pytest.mark.parametrize("kind", ["file", "closed pipe", "folder", "socket"])
def test_a_kick_that_is_none_is_refused_or_stops_the_ring(serve, image, tmp_path, kind):
    server = serve(image)
    front = Front(tmp_path / "s")
    (tmp_path / "file").write_bytes(b"x" * 100)
    if kind == "closed pipe":
        fd, other = os.pipe()
        os.close(other)
    elif kind == "socket":
        fd = os.dup(front.sock.fileno())
    else:
        fd = os.open(tmp_path / ("file" if kind == "file" else ""), os.O_RDONLY)
    verdict = front.tell(12, struct.pack("<Q", 0), [fd])
    assert (verdict == 0) == (kind == "closed pipe")
    os.close(fd)
    assert len(front.ask(1)) == 8
    if kind == "closed pipe":
        wait_until(lambda: "nobody can kick it" in said(tmp_path), "the ring goes on")
    release(front)
    assert server.poll() is None
    works(tmp_path / "s")


def test_a_stop_does_not_wait_for_a_front_end_that_does_not_read(serve, image, tmp_path):
    server = serve(image)
    front = Front(tmp_path / "s")
    front.sock.setblocking(False)
    try:
        while True:
            front.send(24, struct.pack("<III", 0, 256, 0) + bytes(256))
    except BlockingIOError:
        pass
    server.terminate()
    assert server.wait(30) == 0
    release(front)


# ---------------------------------------------------------------- many sessions

def leave_in_the_middle(front, rnd):
    """Some bytes of a message, with descriptors."""
    head = struct.pack("<III", rnd.choice([5, 12, 13, 14, 32, 37]), 1, rnd.choice([8, 40, 264]))
    fds = array.array("i", [front.memfd] * rnd.randrange(1, 9))
    message = head + rnd.randbytes(rnd.randrange(8))
    front.sock.sendmsg([message[:rnd.randrange(1, len(message) + 1)]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])


def hostile_session(path, rnd, memory):
    kind = rnd.randrange(4)
    features = rnd.choice([SPLIT, PACKED])
    front = Front(path, features, memory=memory, start=kind < 2)
    try:
        if kind == 0:  # nonsense in the ring, which is made valid enough to be looked at
            ring = front.rings[0]
            ring.put(ring.at, rnd.randbytes(1024))
            ring.put(ring.at + 16384, struct.pack("<HH", 0, rnd.randrange(1, 70)) + rnd.randbytes(140))
            ring.ring_bell()
            front.ask(1)
        elif kind == 1:  # chains with one wrong number
            ring = front.rings[0]
            pieces = [(vf.GUEST + rnd.choice([8 * MIB, 0, 16 * MIB - 8]), rnd.choice([16, 17, 0, 2**32 - 1]), False),
                      (vf.GUEST + 9 * MIB, rnd.choice([1, 512, 513]), True)][:rnd.randrange(1, 3)]
            ring.submit(pieces, rnd.random() < 0.5)
            if rnd.random() < 0.5:
                front.ask(11, struct.pack("<II", 0, 0))
        elif kind == 2:
            leave_in_the_middle(front, rnd)
        else:
            for _ in range(rnd.randrange(1, 6)):
                fds = [front.memfd] * rnd.randrange(0, 9) if rnd.random() < 0.5 else []
                front.send(rnd.randrange(0, 42), rnd.randbytes(rnd.choice([0, 8, 12, 20, 40, 264])), fds,
                           flags=rnd.choice([1, 9]))
    except OSError:
        pass  # it hung up
    front.close()
    for r in front.rings:
        os.close(r.kick)
        os.close(r.call)


def memory_of(pid):
    """KiB of its own that the process holds."""
    text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_Dirty"))


def test_thousands_of_hostile_sessions_leave_nothing_behind(serve, image, tmp_path):
    server = serve(image)
    rnd = random.Random(23)
    held = Front(tmp_path / "s", start=False)  # its memory serves all
    held.close()

    def descriptors():
        return len(os.listdir(f"/proc/{server.pid}/fd"))

    def maps():
        return pathlib.Path(f"/proc/{server.pid}/maps").read_text().count("memfd:")

    def some(n):
        for _ in range(n):
            hostile_session(tmp_path / "s", rnd, held)
        works(tmp_path / "s")
        wait_until(lambda: maps() == 0, "memory of a front end stays mapped")

    some(500)
    before, kib = descriptors(), memory_of(server.pid)
    some(2000)
    wait_until(lambda: descriptors() <= before, f"{before} descriptors before, {descriptors()} now")
    limit = 16384 if "AddressSanitizer" in said(tmp_path) or asan(server.pid) else 2048
    assert memory_of(server.pid) - kib < limit
    assert server.poll() is None


def asan(pid):
    """Sanitizers keep freed memory for a while."""
    return "libasan" in pathlib.Path(f"/proc/{pid}/maps").read_text()


# ---------------------------------------------------------------- scratch and control

def status(run, tmp_path):
    return json.loads(run("ctl", tmp_path / "c", "status", "--output=json").stdout)["disks"][0]


def test_a_full_scratch_is_an_error_for_the_guest_and_the_server_lives(serve, image, tmp_path, run):
    serve("--snapshot", "--scratch-size", "4M", "--control", tmp_path / "c", image)
    front = Front(tmp_path / "s")
    ring = front.rings[0]
    rnd = random.Random(3)
    verdicts = [ring.do(vf.OUT, 2048 * i, rnd.randbytes(MIB), split=65536)[0] for i in range(8)]
    assert verdicts[0] == 0 and verdicts[-1] == 1
    assert len(ring.read(0, 512)) == 512
    shown = status(run, tmp_path)
    assert shown["scratch"]["limit"] == 4 * MIB and 2 * MIB < shown["scratch"]["used"] <= 4 * MIB
    assert shown["export"]["type"] == "vhost-user-blk" and shown["export"]["errors"] > 0
    assert shown["export"]["bytes-read"] == 512 and shown["export"]["bytes-written"] >= MIB
    run("ctl", tmp_path / "c", "drop")
    assert ring.do(vf.OUT, 0, rnd.randbytes(MIB), split=65536)[0] == 0
    release(front)


@pytest.mark.parametrize("features", [SPLIT, PACKED], ids=["split", "packed"])
def test_a_commit_while_requests_run_has_what_was_written_before(serve, image, tmp_path, run, strata, peer, features):
    server = serve("--snapshot", "--control", tmp_path / "c", image)
    front = Front(tmp_path / "s", features)
    ring = front.rings[0]
    for i in range(32):
        ring.write(8 * i, (b"before %2d" % i * 460)[:4096])
    sent = 0
    for _ in range(3):
        ctl = subprocess.Popen([strata, "ctl", tmp_path / "c", "commit"])
        while ctl.poll() is None:
            tokens = [ring.start(vf.OUT, 16384 + 8 * ((sent + i) % 1000), bytes([1 + sent % 255]) * 4096, kick=False)
                      for i in range(8)]
            ring.ring_bell()
            ring.wait(8)
            assert all(ring.get(where, 1) == b"\0" for _, _, where in tokens)
            sent += 8
        assert ctl.wait() == 0
    late = ring.do(vf.OUT, 8, b"late" * 128)[0]
    assert late == 0
    release(front)
    server.terminate()
    assert server.wait(30) == 0
    peer("qemu-img", "check", image)
    run("convert", "-O", "raw", image, tmp_path / "after.raw")
    with open(tmp_path / "after.raw", "rb") as f:
        for i in range(32):
            assert f.read(4096) == (b"before %2d" % i * 460)[:4096]


def test_front_ends_come_and_go_while_a_disk_is_committed(serve, image, tmp_path, strata):
    """Both hold the queues at the same time."""
    server = serve("--queues", 4, "--snapshot", "--control", tmp_path / "c", image)
    ctl = subprocess.Popen(["sh", "-c", 'for i in $(seq 12); do "$0" ctl "$1" commit || exit 1; done', strata,
                            tmp_path / "c"])
    turn = 0
    while ctl.poll() is None:
        front = Front(tmp_path / "s", queues=4, size=32 * MIB)
        for r in front.rings:
            for i in range(10):
                r.start(vf.OUT, 64 * (10 * r.index + i), b"z" * 32768, kick=False)
            r.ring_bell()
        if turn % 2:
            front.table()
            front.send(31, struct.pack("<QQHH", 0, 0, 4, 64) + bytes(4))
            _, fds = front.receive(fds=True)
            os.close(fds[0])
        release(front)
        turn += 1
    assert ctl.returncode == 0 and turn > 0
    assert server.poll() is None
    works(tmp_path / "s")
