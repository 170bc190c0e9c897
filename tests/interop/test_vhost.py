# SPDX-License-Identifier: MIT
"""vhost-user-blk: a front end of our own for every corner, and QEMU's with a Linux guest."""
import os
import pathlib
import random
import signal
import struct
import subprocess
import time

import pytest

import vhost_front as vf
from vhost_front import Front

MIB = 1 << 20
SPLIT = (vf.F_VERSION_1, vf.F_INDIRECT, vf.F_EVENT_IDX, vf.F_FLUSH, vf.F_WCE, vf.F_MQ, vf.F_DISCARD, vf.F_ZEROES)
PLAIN = tuple(f for f in SPLIT if f != vf.F_EVENT_IDX)
PACKED = SPLIT + (vf.F_PACKED,)
KINDS = pytest.mark.parametrize("features", [SPLIT, PLAIN, PACKED, PLAIN + (vf.F_PACKED,)],
                                ids=["split", "split-flags", "packed", "packed-flags"])


@pytest.fixture
def image(tmp_path, run):
    """An empty qcow2 of 16 MiB."""
    path = tmp_path / "d.qcow2"
    run("create", "-q", "-f", "qcow2", path, "16M")
    return path


@pytest.fixture
def serve(strata, tmp_path):
    """serve(*args): a server on tmp_path/s; its exit status is checked at the end."""
    servers = []

    def call(*args):
        p = subprocess.Popen([strata, "serve", "--vhost-user", tmp_path / "s", "-t", *map(str, args)],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert p.stdout.readline() == f"vhost-user:{tmp_path}/s\n"
        servers.append(p)
        return p

    yield call
    for p in servers:
        if p.poll() is None:
            p.terminate()
        p.communicate(timeout=20)
        assert p.returncode in (0, -signal.SIGKILL)


@KINDS
def test_what_is_written_reads_back_and_is_in_the_image(serve, image, tmp_path, run, peer, features):
    server = serve(image)
    rnd = random.Random(5)
    disk = bytearray(16 * MIB)
    front = Front(tmp_path / "s", features)
    ring = front.rings[0]
    for i in range(150):
        sector, count = rnd.randrange(32768 - 128), rnd.randrange(1, 128)
        if rnd.random() < 0.6:
            data = rnd.randbytes(count * 512)
            ring.write(sector, data, indirect=rnd.random() < 0.5, split=rnd.choice([None, 512, 4096, 7 * 512 + 3]))
            disk[sector * 512:(sector + count) * 512] = data
        else:
            got = ring.read(sector, count * 512, indirect=rnd.random() < 0.5, split=rnd.choice([None, 1000, 65536]))
            assert got == disk[sector * 512:(sector + count) * 512]
    assert ring.do(vf.FLUSH)[0] == 0
    front.close()
    server.terminate()
    server.wait(20)
    (tmp_path / "want.raw").write_bytes(disk)
    peer("qemu-img", "check", image)
    peer("qemu-img", "compare", image, tmp_path / "want.raw")


@KINDS
def test_many_requests_at_once_all_come_back(serve, image, tmp_path, features):
    serve(image)
    front = Front(tmp_path / "s", features)
    ring = front.rings[0]
    for turn in range(30):
        started = [ring.start(vf.OUT, 8 * (turn * 20 + i), bytes([turn + 1]) * 4096, kick=False) for i in range(20)]
        ring.ring_bell()
        done = ring.wait(20)
        assert sorted(t for t, _ in done) == sorted(t for t, _, _ in started)
        assert all(ring.get(status, 1) == b"\0" for _, _, status in started)
    for turn in range(30):
        assert ring.read(8 * turn * 20, 4096) == bytes([turn + 1]) * 4096
    front.close()


def test_queues_work_side_by_side(serve, image, tmp_path):
    serve("--queues", 4, image)
    front = Front(tmp_path / "s", queues=4, size=32 * MIB)
    started = [(r, r.start(vf.OUT, 128 * r.index, bytes([65 + r.index]) * 65536)) for r in front.rings]
    for ring, (token, _, status) in started:
        assert ring.wait() == [(token, 1)] and ring.get(status, 1) == b"\0"
    for i in range(4):
        assert front.rings[3 - i].read(128 * i, 512) == bytes([65 + i]) * 512
    front.close()


def test_the_configuration_says_what_the_disk_is(serve, image, tmp_path):
    serve("--queues", 3, "--block-size", 4096, "--serial", "disk-77", image)
    front = Front(tmp_path / "s")
    c = front.config()
    capacity, _, seg_max = struct.unpack_from("<QII", c)
    assert capacity == 32768 and seg_max == 126
    assert struct.unpack_from("<I", c, 20)[0] == 4096
    assert struct.unpack_from("<H", c, 34)[0] == 3
    status, ident = front.rings[0].do(vf.GET_ID, length=20)
    assert status == 0 and ident.rstrip(b"\0") == b"disk-77"
    front.close()


def test_discard_and_write_zeroes_give_zeros(serve, image, tmp_path):
    serve(image)
    front = Front(tmp_path / "s")
    ring = front.rings[0]
    ring.write(0, b"x" * MIB, split=65536)
    assert ring.do(vf.ZEROES, data=struct.pack("<QII", 10, 100, 0))[0] == 0
    assert ring.do(vf.ZEROES, data=struct.pack("<QII", 500, 100, 1))[0] == 0
    assert ring.do(vf.DISCARD, data=struct.pack("<QIIQII", 1024, 128, 0, 1280, 128, 0))[0] == 0
    data = ring.read(0, MIB, split=65536)
    zero = set(range(10, 110)) | set(range(500, 600)) | set(range(1024, 1152)) | set(range(1280, 1408))
    for sector in range(2048):
        want = bytes(512) if sector in zero else b"x" * 512
        assert data[512 * sector:512 * sector + 512] == want, sector
    front.close()


@pytest.mark.parametrize("kind, sector, data, length, status", [
    (vf.IN, 32768, b"", 512, 1), (vf.IN, 32767, b"", 1024, 1), (vf.IN, 2**63, b"", 512, 1), (vf.IN, 0, b"", 100, 1),
    (vf.OUT, 32768, b"x" * 512, 0, 1), (vf.OUT, 2**64 - 1, b"x" * 512, 0, 1), (99, 0, b"", 0, 2),
    (vf.DISCARD, 0, struct.pack("<QII", 32768, 1, 0), 0, 1), (vf.DISCARD, 0, struct.pack("<QII", 0, 8, 1), 0, 2),
    (vf.ZEROES, 0, struct.pack("<QII", 0, 8, 2), 0, 2), (vf.ZEROES, 0, b"short", 0, 1), (vf.GET_ID, 0, b"", 5, 1)])
def test_a_request_that_cannot_be_is_answered_and_the_ring_goes_on(serve, image, tmp_path, kind, sector, data, length, status):
    serve(image)
    front = Front(tmp_path / "s")
    ring = front.rings[0]
    assert ring.do(kind, sector, data, length)[0] == status
    ring.write(3, b"y" * 512)
    assert ring.read(3, 512) == b"y" * 512
    front.close()


def test_a_read_only_disk_refuses_writes(serve, image, tmp_path):
    serve("-r", image)
    front = Front(tmp_path / "s")
    assert front.offered >> vf.F_RO & 1 and not front.offered >> vf.F_DISCARD & 1
    assert front.rings[0].do(vf.OUT, 0, b"x" * 512)[0] == 1
    assert front.rings[0].read(0, 512) == bytes(512)
    front.close()


@KINDS
def test_a_hostile_ring_stops_and_the_server_serves_the_next(serve, image, tmp_path, features):
    server = serve(image)
    inside = vf.GUEST + 9 * MIB
    hostile = [
        [(0, 16, False), (inside, 512, True), (inside, 1, True)],                     # not in memory
        [(vf.GUEST + 16 * MIB - 8, 16, False), (inside, 1, True)],                    # across its end
        [(2**64 - 8, 64, False), (inside, 1, True)],                                  # wraps
        [(inside, 16, True), (inside, 16, False)],                                    # write before read
        [(inside, 16, False)],                                                        # no status
        [(inside, 1, True)],                                                          # no header
        [(inside, 0xffffffff, False), (inside, 1, True)],
    ]
    for pieces in hostile:
        for indirect in (False, True):
            front = Front(tmp_path / "s", features)
            front.rings[0].submit(pieces, indirect)
            # The socket still answers, whatever became of the ring.
            assert len(front.ask(1)) == 8
            front.close()
    front = Front(tmp_path / "s", features)
    assert front.rings[0].read(0, 512) == bytes(512)
    front.close()
    assert server.poll() is None


def test_descriptor_loops_end(serve, image, tmp_path):
    server = serve(image)
    front = Front(tmp_path / "s")
    ring = front.rings[0]
    inside = vf.GUEST + 9 * MIB
    for i in range(64):
        ring.put(ring.at + 16 * i, struct.pack("<QIHH", inside, 16, 1, (i + 1) % 64))
    ring.put(ring.at + 16384 + 4, struct.pack("<H", 0))
    ring.put(ring.at + 16384 + 2, struct.pack("<H", 1))
    ring.ring_bell()
    table = 9 * MIB
    for i in range(2):
        ring.put(table + 16 * i, struct.pack("<QIHH", inside, 16, 1, 1 - i))
    assert len(front.ask(1)) == 8
    front.close()
    front = Front(tmp_path / "s")
    front.rings[0].split_put([(vf.GUEST + table, 32, 4)])
    for i in range(2):
        front.rings[0].put(table + 16 * i, struct.pack("<QIHH", inside, 16, 1, 1 - i))
    front.rings[0].ring_bell()
    assert len(front.ask(1)) == 8
    front.close()
    assert server.poll() is None


def test_memory_that_shrinks_under_us_kills_nothing(serve, image, tmp_path):
    server = serve(image)
    front = Front(tmp_path / "s")
    ring = front.rings[0]
    assert ring.read(0, 512) == bytes(512)
    front.mem.close()
    os.ftruncate(front.memfd, 0)
    ring.ring_bell()
    assert len(front.ask(1)) == 8
    front.close()
    other = Front(tmp_path / "s")
    assert other.rings[0].read(0, 512) == bytes(512)
    other.close()
    assert server.poll() is None


def test_hostile_messages_end_their_session_only(serve, image, tmp_path):
    server = serve(image)
    rnd = random.Random(11)
    for turn in range(300):
        front = Front(tmp_path / "s", start=turn % 3 == 0)
        fds = [front.memfd] * rnd.randrange(0, 9) if rnd.random() < 0.4 else []
        payload = rnd.randbytes(rnd.choice([0, 4, 8, 20, 40, 264, 1024]))
        if rnd.random() < 0.5:  # plausible numbers instead of noise
            payload = struct.pack("<5Q", *(rnd.choice([0, 1, 2, 63, 64, 65535, 2**32, vf.GUEST, vf.USER, 2**64 - 1])
                                           for _ in range(5)))[:len(payload)]
        try:
            front.send(rnd.randrange(0, 42), payload, fds, flags=rnd.choice([1, 1, 9, 0, 5]))
            if rnd.random() < 0.2:
                front.sock.send(rnd.randbytes(7))
            front.sock.settimeout(0.05)
            front.sock.recv(100)
        except OSError:
            pass
        front.close()
        os.close(front.memfd)
    front = Front(tmp_path / "s")
    assert front.rings[0].read(0, 512) == bytes(512)
    front.close()
    assert server.poll() is None
    assert len(os.listdir(f"/proc/{server.pid}/fd")) < 40


def test_a_stopped_ring_says_where_it_was_and_goes_on_from_there(serve, image, tmp_path):
    serve(image)
    front = Front(tmp_path / "s")
    ring = front.rings[0]
    for i in range(5):
        ring.write(i, bytes([i]) * 512)
    assert struct.unpack("<II", front.ask(11, struct.pack("<II", 0, 0))) == (0, 5)
    front.send(12, struct.pack("<Q", 0), [ring.kick])
    front.send(13, struct.pack("<Q", 0), [ring.call])
    assert front.tell(18, struct.pack("<II", 0, 1)) == 0
    assert ring.read(4, 512) == bytes([4]) * 512
    front.close()


def test_memory_regions_come_and_go_one_by_one(serve, image, tmp_path):
    serve(image)
    front = Front(tmp_path / "s")
    ring = front.rings[0]
    more = os.memfd_create("more")
    os.ftruncate(more, MIB)
    os.pwrite(more, b"m" * 512, 4096)
    region = struct.pack("<QQQQQ", 0, 0x40000000, MIB, 0x600000000000, 0)
    assert front.tell(37, region, [more]) == 0
    assert front.tell(37, region, [more]) != 0  # overlaps
    head, status = ring.alloc(16), ring.alloc(1)
    ring.put(head, struct.pack("<IIQ", vf.OUT, 0, 9))
    pieces = [(vf.GUEST + head, 16, False), (0x40000000 + 4096, 512, False), (vf.GUEST + status, 1, True)]
    ring.submit(pieces)
    ring.wait()
    assert ring.get(status, 1) == b"\0"
    assert front.tell(38, region) == 0
    assert front.tell(38, region) != 0
    assert ring.read(9, 512) == b"m" * 512
    front.close()


def test_requests_in_flight_are_done_again_by_the_next_server(serve, image, tmp_path, run):
    """As QEMU does it: the in-flight memory of the dead server goes to the new one."""
    first = serve(image)
    front = Front(tmp_path / "s")
    body, fds = None, None
    front.send(31, struct.pack("<QQHH", 0, 0, 1, 64) + bytes(4))
    body, fds = front.receive(fds=True)
    size, offset, queues, num = struct.unpack_from("<QQHH", body)
    assert queues == 1 and num == 64 and len(fds) == 1
    ring = front.rings[0]
    # A ring that knew the memory from its start; then two requests it took and never gave back.
    front.ask(11, struct.pack("<II", 0, 0))
    front.send(12, struct.pack("<Q", 0), [ring.kick])
    front.send(13, struct.pack("<Q", 0), [ring.call])
    assert front.tell(18, struct.pack("<II", 0, 1)) == 0
    ring.write(0, b"a" * 512)
    first.send_signal(signal.SIGKILL)
    first.wait()
    tokens = [ring.start(vf.OUT, 100 + i, bytes([66 + i]) * 512, kick=False) for i in range(2)]
    with open(f"/proc/self/fd/{fds[0]}", "r+b") as f:  # the dead server had taken both
        for i, (token, _, _) in enumerate(tokens):
            f.seek(offset + 16 + 16 * token)
            f.write(struct.pack("<B5xHQ", 1, 0, 100 + i))
    serve(image)
    second = Front(tmp_path / "s", memory=front, start=False)
    second.negotiate(1)
    second.table()
    second.send(32, struct.pack("<QQHH", size, offset, 1, 64) + bytes(4), [fds[0]])
    second.send(8, struct.pack("<II", 0, 64))
    second.send(10, struct.pack("<II", 0, 1))
    second.send(9, struct.pack("<IIQQQQ", 0, 0, vf.USER, vf.USER + 32768, vf.USER + 16384, 0))
    second.send(13, struct.pack("<Q", 0), [ring.call])
    second.send(12, struct.pack("<Q", 0), [ring.kick])
    assert second.tell(18, struct.pack("<II", 0, 1)) == 0
    ring.ring_bell()
    assert sorted(t for t, _ in ring.wait(2)) == sorted(t for t, _, _ in tokens)
    assert [ring.read(100 + i, 512) for i in range(2)] == [b"B" * 512, b"C" * 512]
    second.close()
    front.close()


def test_a_snapshot_leaves_the_image_and_can_be_kept(serve, image, tmp_path, peer):
    before = image.read_bytes()
    server = serve("--snapshot", "--keep", tmp_path / "kept.qcow2", image)
    front = Front(tmp_path / "s")
    front.rings[0].write(7, b"kept" * 128)
    front.close()
    server.terminate()
    server.wait(20)
    assert image.read_bytes() == before
    peer("qemu-io", "-r", "-c", "read -P 0x6b 3584 1", tmp_path / "kept.qcow2")


def test_wrong_combinations_are_refused(run, image, tmp_path):
    for more in (["-k", tmp_path / "n"], ["--bitmap", "b"], ["--block-size", "1000"]):
        run("serve", "--vhost-user", tmp_path / "s", *more, image, status=1)
    run("serve", "--vhost-user", tmp_path / "s", image, image, status=1)


# ---------------------------------------------------------------- a Linux guest under QEMU

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def guest(kernel, tmp_path):
    """guest(script, device options): QEMU on tmp_path/s, its console on standard output."""
    children = []

    def call(script, options="", chardev=""):
        text, initrd = tmp_path / "script", tmp_path / "initrd"
        text.write_text(script)
        subprocess.run([ROOT / "scripts/guest.sh", "initrd", text, initrd], check=True)
        p = subprocess.Popen(
            ["qemu-system-x86_64", "-nodefaults", "-accel", "tcg", "-m", "192M", "-smp", "2", "-display", "none",
             "-machine", "q35,memory-backend=m", "-object", "memory-backend-memfd,id=m,size=192M,share=on",
             "-chardev", f"socket,id=c,path={tmp_path}/s{chardev}", "-device", f"vhost-user-blk-pci,chardev=c{options}",
             "-no-reboot", "-serial", "stdio", "-kernel", kernel, "-initrd", initrd,
             "-append", "console=ttyS0 quiet panic=-1"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        children.append(p)
        return p

    yield call
    for p in children:
        p.kill()
        p.wait()


@pytest.fixture
def ext4(tmp_path, run):
    raw, path = tmp_path / "fs.raw", tmp_path / "fs.qcow2"
    subprocess.run(["/sbin/mke2fs", "-q", "-F", "-t", "ext4", raw, "96M"], check=True, stdout=subprocess.DEVNULL)
    run("convert", "-f", "raw", "-O", "qcow2", raw, path)
    return path


def check_fs(run, peer, image, tmp_path):
    peer("qemu-img", "check", image)
    run("convert", "-O", "raw", image, tmp_path / "after.raw")
    p = subprocess.run(["/sbin/e2fsck", "-fn", tmp_path / "after.raw"], capture_output=True, text=True)
    assert p.returncode == 0, p.stdout


WORK = """
mount -t ext4 /dev/vda /mnt || exit 1
dd if=/dev/urandom of=/mnt/a bs=64k count=512 2>/dev/null
sync
echo 3 >/proc/sys/vm/drop_caches
cp /mnt/a /mnt/b
sync
echo 3 >/proc/sys/vm/drop_caches
cmp /mnt/a /mnt/b && echo SAME
rm /mnt/b
fstrim /mnt && echo TRIMMED
umount /mnt
echo QUEUES $(ls /sys/block/vda/mq | wc -l)
"""


@pytest.mark.parametrize("options", [",num-queues=2", ",num-queues=2,packed=on"], ids=["split", "packed"])
def test_a_linux_guest_writes_reads_and_trims(serve, run, peer, guest, ext4, tmp_path, options):
    server = serve("--queues", 2, ext4)
    q = guest(WORK, options)
    said, _ = q.communicate(timeout=120)
    assert "SAME" in said and "TRIMMED" in said and "QUEUES 2" in said, said
    server.terminate()
    assert server.wait(20) == 0
    check_fs(run, peer, ext4, tmp_path)


RESTART = """
mount -t ext4 /dev/vda /mnt || exit 1
echo BEGUN
i=0
while [ $i -lt 60 ]; do
    dd if=/dev/zero of=/mnt/f$i bs=256k count=1 conv=fsync 2>/dev/null || { echo FAILED $i; break; }
    i=$((i+1))
done
echo WROTE $i
umount /mnt && echo CLEAN
"""


def test_a_guest_goes_on_when_the_server_is_killed_and_comes_back(serve, run, peer, guest, ext4, tmp_path):
    first = serve("--queues", 1, ext4)
    q = guest(RESTART, ",num-queues=1", ",reconnect=1")
    while "BEGUN" not in q.stdout.readline():
        assert q.poll() is None
    time.sleep(0.3)  # somewhere among the writes
    first.kill()
    first.wait()
    second = serve("--queues", 1, ext4)
    said, _ = q.communicate(timeout=120)
    assert "WROTE 60" in said and "CLEAN" in said and "FAILED" not in said, said
    second.terminate()
    assert second.wait(20) == 0
    assert peer("qemu-img", "check", ext4, status=None).returncode in (0, 3)
    run("convert", "-O", "raw", ext4, tmp_path / "after.raw")
    p = subprocess.run(["/sbin/e2fsck", "-fn", tmp_path / "after.raw"], capture_output=True, text=True)
    assert p.returncode == 0, p.stdout
