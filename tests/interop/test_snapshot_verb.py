# SPDX-License-Identifier: MIT
"""`strata snapshot`, and images with snapshots: what is kept, what is refused, what a kill leaves.

Images with what strata does not make itself (VM state, unknown extra data, entries without a disk
size, tables that lie) are made by QEMU or by a knife (qcow2_image.py).
"""
import json
import os
import random
import re
import signal
import struct
import subprocess
import time

import pytest

from qcow2_image import COPIED, OFFSET, Qcow2

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def image(run, peer, tmp_path):
    """make("compat=0.10", size="8M") -> path; 1 MiB of 0x11 from 64 KiB on."""

    def make(options="", size="8M", name="a.qcow2"):
        path = tmp_path / name
        run("create", "-q", "-f", "qcow2", *(["-o", options] if options else []), path, size)
        peer("qemu-io", "-f", "qcow2", "-c", "write -q -P 0x11 64k 1M", path)
        return path

    return make


def io(peer, path, *commands):
    p = peer("qemu-io", "-f", "qcow2", *sum((["-c", c] for c in commands), []), path)
    assert "failed" not in p.stdout, p.stdout


def whole(run, peer, path):
    peer("qemu-img", "check", "-q", path)
    run("check", "-q", path)


def listed(run, path):
    return json.loads(run("snapshot", "-l", "--output=json", path).stdout)


# ---------------------------------------------------------------- the verb

def test_list_is_the_default_and_says_what_there_is(run, image):
    path = image()
    assert run("snapshot", path).stdout == ""
    run("snapshot", "-c", "one", path)
    out = run("snapshot", path).stdout
    assert out == run("snapshot", "-l", path).stdout
    assert re.search(r"^1 +one +0 B +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d +0000:00:00\.000 +--$", out, re.M)
    assert listed(run, path)[0]["name"] == "one"
    assert json.loads(run("info", "--output=json", path).stdout)["snapshots"] == listed(run, path)
    assert "Snapshot list:" in run("info", path).stdout


def test_names_that_a_terminal_must_not_see_are_made_safe(run, image):
    path = image()
    run("snapshot", "-c", "a\x1b[31mb", path)
    assert "\x1b" not in run("snapshot", path).stdout
    assert listed(run, path)[0]["name"] == "a\x1b[31mb"


@pytest.mark.parametrize("args, text", [
    (["-l", "-c", "x"], "exclude each other"),
    (["-a", "nope"], "has no snapshot 'nope'"),
    (["-d", "nope"], "has no snapshot 'nope'"),
    (["-c", ""], "cannot be empty"),
    (["-c", "n" * 256], "256 bytes, more than 255"),
    (["-c", "x", "--output=json"], "goes with -l"),
])
def test_misuse_is_one_clear_line_and_changes_nothing(run, image, args, text):
    path = image()
    run("snapshot", "-c", "one", path)
    before = path.read_bytes()
    p = run("snapshot", *args, path, status=1)
    assert text in p.stderr and p.stdout == ""
    assert path.read_bytes() == before


def test_a_format_without_snapshots_is_named(run, tmp_path):
    run("create", "-q", "-f", "raw", tmp_path / "r", "1M")
    for args in ["-l"], ["-c", "x"], ["-d", "x"]:
        assert "'raw' cannot hold snapshots" in run("snapshot", "-f", "raw", *args, tmp_path / "r",
                                                    status=1).stderr


def test_ids_go_before_names_and_grow(run, peer, image):
    path = image()
    run("snapshot", "-c", "2", path)
    io(peer, path, "write -q -P 0x22 0 64k")
    run("snapshot", "-c", "x", path)
    run("snapshot", "-a", "2", path)  # the id, not the name
    io(peer, path, "read -q -P 0x22 0 64k")
    run("snapshot", "-d", "2", path)
    run("snapshot", "-c", "y", path)
    assert [(s["id"], s["name"]) for s in listed(run, path)] == [("1", "2"), ("2", "y")]


@pytest.mark.parametrize("spec", ["one", "1", "snapshot.id=1", "snapshot.name=one",
                                  "snapshot.id=1,snapshot.name=one"])
def test_a_snapshot_is_read_without_applying_it(run, peer, image, tmp_path, spec):
    path, out = image(), tmp_path / "out"
    run("snapshot", "-c", "one", path)
    io(peer, path, "write -q -P 0x22 0 2M")
    before = path.read_bytes()
    run("convert", "-O", "raw", "-l", spec, path, out)
    want = bytes(64 * KIB) + b"\x11" * MIB + bytes(8 * MIB - 64 * KIB - MIB)
    assert out.read_bytes() == want
    peer("qemu-img", "convert", "-O", "raw", "-l", spec, path, out)
    assert out.read_bytes() == want
    assert path.read_bytes() == before
    measured = json.loads(run("measure", "-O", "raw", "--output=json", "-l", spec, path).stdout)
    assert measured["required"] <= 8 * MIB


@pytest.mark.parametrize("spec, text", [("nope", "no snapshot 'nope'"),
                                        ("snapshot.id=9", "no snapshot 'snapshot.id=9'"),
                                        ("snapshot.foo=9", "does not say a snapshot"),
                                        ("snapshot.", "does not say a snapshot")])
def test_a_snapshot_that_is_not_there_is_named(run, image, tmp_path, spec, text):
    path = image()
    run("snapshot", "-c", "one", path)
    for verb in ["convert", "-O", "raw", "-l", spec, path, tmp_path / "out"], ["measure", "-l", spec, path]:
        assert text in run(*verb, status=1).stderr
    assert not (tmp_path / "out").exists()


def test_open_options_show_a_snapshot_everywhere_read_only(run, peer, image):
    path = image()
    run("snapshot", "-c", "one", path)
    io(peer, path, "write -q -P 0x22 64k 1M")
    name = f"driver=qcow2,file.filename={path},snapshot.name=one"
    p = run("io", "--image-opts", "-r", "-c", "read -P 0x11 64k 1M", name)
    assert "read 1048576/1048576" in p.stdout and "failed" not in p.stdout
    assert run("map", "--image-opts", name).stdout != ""
    assert "cannot hold" not in run("info", "--image-opts", name).stdout
    p = run("io", "--image-opts", "-c", "write 0 64k", name, status=1)
    assert "can only be read" in p.stderr
    assert "not of one snapshot" in run("check", "--image-opts", name, status=1).stderr
    p = run("info", "--image-opts", f"driver=qcow2,file.filename={path},snapshot.name=two", status=1)
    assert "no snapshot with the name 'two'" in p.stderr


def test_a_served_snapshot_is_what_clients_read(strata, image, peer, run, tmp_path):
    path, sock = image(), tmp_path / "sock"
    run("snapshot", "-c", "one", path)
    io(peer, path, "write -q -P 0x22 64k 1M")
    p = subprocess.Popen([strata, "serve", "--read-only", "--socket", str(sock), "--image-opts",
                          f"driver=qcow2,file.filename={path},snapshot.id=1"],
                         stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        for _ in range(500):
            if sock.exists() or p.poll() is not None:
                break
            time.sleep(0.01)
        out = peer("qemu-io", "-r", "-f", "raw", "-c", "read -P 0x11 64k 1M",
                   f"nbd+unix:///?socket={sock}").stdout
        assert "read 1048576/1048576" in out and "failed" not in out
    finally:
        p.terminate()
        p.wait()


# ---------------------------------------------------------------- what the format asks for

def test_counts_that_would_overflow_refuse_and_change_nothing(run, peer, image):
    for bits in 1, 2, 4:
        path = image(f"refcount_bits={bits}", name=f"{bits}.qcow2")
        for i in range((1 << bits) - 2):
            run("snapshot", "-c", f"s{i}", path)
        before = path.read_bytes()
        p = run("snapshot", "-c", "one too many", path, status=1)
        assert f"would have {1 << bits} users" in p.stderr and "refcount_bits" in p.stderr
        assert path.read_bytes() == before
        whole(run, peer, path)


def test_coded_clusters_count_each_host_cluster_they_touch(run, peer, image, tmp_path):
    path = tmp_path / "c.qcow2"
    raw = tmp_path / "raw"
    raw.write_bytes(random.Random(1).randbytes(MIB // 2) * 2 + bytes(MIB))
    data = bytearray(raw.read_bytes())
    for i in range(0, len(data), 8):  # so that it can be compressed, to odd lengths
        data[i:i + 4] = b"abcd"
    raw.write_bytes(data)
    peer("qemu-img", "convert", "-c", "-O", "qcow2", "-o", "cluster_size=4k", raw, path)
    run("snapshot", "-c", "one", path)
    whole(run, peer, path)
    io(peer, path, "write -q -P 1 0 1M")
    whole(run, peer, path)
    run("snapshot", "-a", "one", path)
    whole(run, peer, path)
    run("compare", "-F", "raw", path, raw)
    run("snapshot", "-d", "one", path)
    whole(run, peer, path)
    run("compare", "-F", "raw", path, raw)


def test_version_2_keeps_its_size_while_it_has_snapshots(run, peer, image):
    path = image("compat=0.10")
    run("snapshot", "-c", "one", path)
    assert "cannot change its size" in run("resize", path, "16M", status=1).stderr
    whole(run, peer, path)
    run("snapshot", "-d", "one", path)
    run("resize", path, "16M")


def test_snapshots_of_other_sizes_bring_them_back(run, peer, image, tmp_path):
    path, out = image(), tmp_path / "out"
    run("snapshot", "-c", "small", path)
    run("resize", path, "3G")
    io(peer, path, "write -q -P 0x33 2G 1M")
    run("snapshot", "-c", "large", path)
    run("snapshot", "-a", "small", path)
    whole(run, peer, path)
    assert json.loads(run("info", "--output=json", path).stdout)["virtual-size"] == 8 * MIB
    run("convert", "-O", "qcow2", "-l", "large", path, out)
    assert json.loads(run("info", "--output=json", out).stdout)["virtual-size"] == 3 << 30
    run("snapshot", "-a", "large", path)
    whole(run, peer, path)
    io(peer, path, "read -q -P 0x33 2G 1M")
    run("snapshot", "-d", "large", path)
    run("snapshot", "-d", "small", path)
    whole(run, peer, path)
    io(peer, path, "read -q -P 0x33 2G 1M", "read -q -P 0x11 64k 1M")


def test_an_external_data_file_is_refused_by_name(run, peer, tmp_path):
    path = tmp_path / "d.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/d.raw", path, "1M")
    p = run("snapshot", "-c", "x", path, status=1)
    assert "external data file" in p.stderr


def test_missing_backing_file_is_no_obstacle(run, peer, image, tmp_path):
    base, top = image(name="base.qcow2"), tmp_path / "top.qcow2"
    run("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    io(peer, top, "write -q -P 0x44 0 64k")
    base.rename(tmp_path / "gone.qcow2")
    run("snapshot", "-c", "one", top)
    (tmp_path / "gone.qcow2").rename(base)
    io(peer, top, "write -q -P 0x55 0 2M")
    run("snapshot", "-a", "one", top)
    io(peer, top, "read -q -P 0x44 0 64k", "read -q -P 0x11 64k 1M", "read -q -P 0 2M 64k")
    whole(run, peer, top)


@pytest.mark.parametrize("size", ["8M", "12M"])
def test_applying_makes_bitmaps_call_all_of_the_disk_changed(run, peer, image, tmp_path, size):
    path, sock = image(), tmp_path / "sock"
    run("snapshot", "-c", "one", path)
    run("bitmap", "--add", path, "m")
    run("resize", path, size)
    run("snapshot", "-a", "one", path)
    whole(run, peer, path)
    p = subprocess.Popen(["qemu-nbd", "-r", "-t", "-B", "m", "-f", "qcow2", "-k", str(sock), str(path)],
                         stderr=subprocess.PIPE)
    try:
        for _ in range(500):
            if sock.exists() or p.poll() is not None:
                break
            time.sleep(0.01)
        out = peer("nbdinfo", "--map=qemu:dirty-bitmap:m", f"nbd+unix:///?socket={sock}").stdout
    finally:
        p.terminate()
        p.wait()
    assert out.split() == ["0", str(8 * MIB), "1", "dirty"], p.stderr.read()


def vm_state(peer, path):
    """A machine that stops at once saves itself into the image."""
    p = peer("qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-monitor", "stdio",
             "-drive", f"if=none,format=qcow2,file={path}", "-m", "8", "-accel", "tcg",
             input="savevm vm\nquit\n", stdin=None)
    assert "Error" not in p.stdout, p.stdout
    return p


def test_vm_state_is_kept_behind_the_disk(run, peer, image):
    path = image()
    vm_state(peer, path)
    before = listed(run, path)[0]
    assert before["vm-state-size"] > 0 and before["vm-clock-sec"] >= 0
    run("snapshot", "-c", "other", path)
    io(peer, path, "write -q -P 0x66 0 4M")
    whole(run, peer, path)
    run("snapshot", "-a", "vm", path)
    whole(run, peer, path)
    run("snapshot", "-d", "other", path)
    assert listed(run, path) == [before]
    p = peer("qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-monitor", "stdio",
             "-drive", f"if=none,format=qcow2,file={path}", "-m", "8", "-accel", "tcg",
             input="loadvm vm\ninfo status\nquit\n", stdin=None)
    assert "Error" not in p.stdout, p.stdout
    io(peer, path, "read -q -P 0x11 64k 1M")
    whole(run, peer, path)


def test_growing_does_not_show_vm_state_to_the_guest(run, peer, image):
    path = image()
    vm_state(peer, path)
    run("snapshot", "-a", "vm", path)  # its state is now behind the disk
    run("resize", path, "700M")  # beyond the first L1 entry, behind which it lies
    whole(run, peer, path)
    io(peer, path, "read -q -P 0 8M 100M", "read -q -P 0 510M 190M")


def test_a_device_larger_than_the_image_is_not_outgrown(run, peer, image):
    """On a block device the storage is longer than what is in use: new tables lie inside."""
    path = image()
    os.truncate(path, 3 << 30)
    for i in range(3):
        run("snapshot", "-c", f"s{i}", path)
        io(peer, path, f"write -q -P {i + 1} {i}M 1M")
        whole(run, peer, path)
    run("snapshot", "-a", "s1", path)
    run("snapshot", "-d", "s0", path)
    whole(run, peer, path)
    assert path.stat().st_size == 3 << 30
    end = int(re.search(r"Image end offset: (\d+)", peer("qemu-img", "check", path).stdout)[1])
    assert end < 16 * MIB


def test_room_given_back_is_used_again(run, peer, image):
    path = image()
    sizes = []
    for _ in range(12):
        run("snapshot", "-c", "x", path)
        run("snapshot", "-d", "x", path)
        sizes.append(path.stat().st_size)
    assert sizes[-1] <= max(sizes[:4])
    whole(run, peer, path)


# ---------------------------------------------------------------- tables that lie

class Table:
    """The snapshot table of an image, its entries as bytes."""

    def __init__(self, path):
        self.q = Qcow2(path)
        h = self.q.read(0, 112)
        self.count, self.offset = struct.unpack(">IQ", h[60:72])

    def at(self, i=0):
        pos = self.offset
        for _ in range(i):
            f = self.q.read(pos, 40)
            length = 40 + struct.unpack(">I", f[36:40])[0] + sum(struct.unpack(">HH", f[12:16]))
            pos += -(-length // 8) * 8
        return pos


def test_unknown_extra_data_is_kept_byte_for_byte(run, peer, image):
    path = image()
    run("snapshot", "-c", "one", path)
    t = Table(path)
    entry = bytearray(t.q.read(t.at(), 40 + 24 + 4))
    extra = entry[40:64] + bytes(range(200)) * 5
    entry[36:40] = struct.pack(">I", len(extra))
    entry[40:64] = extra
    t.q.write(t.at(), bytes(entry))
    whole(run, peer, path)
    run("snapshot", "-c", "two", path)
    t = Table(path)
    assert t.q.read(t.at() + 40, len(extra)) == bytes(extra)
    run("snapshot", "-d", "two", path)
    run("snapshot", "-a", "one", path)
    t = Table(path)
    assert t.q.read(t.at() + 40, len(extra)) == bytes(extra)
    whole(run, peer, path)


def test_an_entry_without_a_disk_size_means_the_current_one(run, peer, image):
    path = image("compat=0.10")
    run("snapshot", "-c", "one", path)
    t = Table(path)
    entry = bytearray(t.q.read(t.at(), 40 + 24 + 4))
    entry[36:40] = bytes(4)
    t.q.write(t.at(), bytes(entry[:40] + entry[64:] + bytes(24)))
    io(peer, path, "write -q -P 0x22 0 2M")
    run("snapshot", "-c", "two", path)  # completes it
    t = Table(path)
    assert struct.unpack(">QQ", t.q.read(t.at() + 40, 16)) == (0, 8 * MIB)
    run("snapshot", "-a", "one", path)
    io(peer, path, "read -q -P 0x11 64k 1M")
    whole(run, peer, path)


def test_vm_state_of_64_bits_is_shown_and_kept(run, image):
    path = image()
    run("snapshot", "-c", "one", path)
    t = Table(path)
    t.q.set64(t.at() + 40, 5 << 32)
    t.q.set64(t.at() + 56, 1234)
    run("snapshot", "-c", "two", path)
    one, two = listed(run, path)
    assert one["vm-state-size"] == 5 << 32 and one["icount"] == 1234 and "icount" not in two
    assert "20 GiB" in run("snapshot", path).stdout


LIES = {
    "l1_offset_unaligned": (0, ">Q", 0x12345678901),
    "l1_offset_of_the_header": (0, ">Q", 0),
    "l1_offset_behind_the_file": (0, ">Q", 1 << 40),
    "l1_offset_beyond_2_56": (0, ">Q", 1 << 62),
    "l1_entries_most": (8, ">I", 0xffffffff),
    "l1_entries_beyond_the_file": (8, ">I", 4 << 20),
    "extra_length_1032": (36, ">I", 1032),
    "extra_length_most": (36, ">I", 0xffffffff),
    "disk_size_most": (48, ">Q", 0xffffffffffffffff),
    "disk_size_2_62": (48, ">Q", 1 << 62),
    "disk_size_4_PiB": (48, ">Q", 1 << 52),
}


@pytest.mark.parametrize("field", LIES)
def test_entries_that_lie_are_refused_and_nothing_changes(run, image, tmp_path, field):
    path = image()
    run("snapshot", "-c", "one", path)
    at, form, value = LIES[field]
    t = Table(path)
    t.q.write(t.at() + at, struct.pack(form, value))
    before = path.read_bytes()
    for args in (["-a", "one"], ["-d", "one"]) if "disk_size" not in field else (["-a", "one"],):
        p = run("snapshot", *args, path, status=1)
        assert p.stderr.startswith("strata: snapshot: ") and "core" not in p.stderr
    assert run("convert", "-O", "raw", "-l", "snapshot.id=1", path, tmp_path / "o", status=1).stderr
    assert path.read_bytes() == before
    run("info", path)
    run("snapshot", path, status=None)
    run("check", path, status=None)


@pytest.mark.parametrize("count, offset", [(65536, None), (65537, None), (0xffffffff, None),
                                           (1, 1), (1, 1 << 63), (1, 1 << 40), (1, 0)])
def test_headers_that_lie_about_the_table_are_refused(run, image, count, offset):
    path = image()
    run("snapshot", "-c", "one", path)
    t = Table(path)
    t.q.write(60, struct.pack(">IQ", count, t.offset if offset is None else offset))
    before = path.read_bytes()
    for args in ["-c", "two"], ["-a", "one"], ["-d", "one"]:
        run("snapshot", *args, path, status=1)
    run("info", path, status=None)
    run("snapshot", path, status=1)
    assert path.read_bytes() == before


def test_sixty_five_thousand_snapshots_are_the_most(run, image):
    """A table of the largest number, made by hand; all entries share one empty L1 table."""
    path = image(size="2M")
    entry = struct.pack(">QIHHIIQII", 0, 0, 5, 1, 0, 0, 0, 0, 24) + struct.pack(">QQQ", 0, 2 * MIB, 0)
    table = b"".join((entry + b"%05d" % i + b"n").ljust(72, b"\0") for i in range(65536))
    at = -(-path.stat().st_size // (64 * KIB)) * 64 * KIB
    q = Qcow2(path)
    q.write(at, table)
    q.write(60, struct.pack(">IQ", 65536, at))
    assert len(listed(run, path)) == 65536
    assert "as many as it can" in run("snapshot", "-c", "x", path, status=1).stderr


@pytest.mark.parametrize("what", ["table_is_the_header", "table_is_a_refcount_block",
                                  "data_is_a_refcount_block", "data_beyond_the_file",
                                  "data_unaligned", "coded_beyond_the_file", "count_zero",
                                  "l1_of_snapshot_names_the_reftable", "reftable_entry_wild"])
def test_damage_met_on_the_way_refuses_and_changes_nothing(run, image, what):
    path = image()
    run("snapshot", "-c", "one", path)
    q, t = Qcow2(path), Table(path)
    block = q.get64(q.reftable_offset)
    snapshot_l1 = q.get64(t.at())
    if what == "table_is_the_header":
        q.set64(snapshot_l1, 512)  # as near as it can be named
    elif what == "table_is_a_refcount_block":
        q.set64(snapshot_l1, block)
    elif what == "data_is_a_refcount_block":
        q.set64(q.l2_at(1), block)
    elif what == "data_beyond_the_file":
        q.set64(q.l2_at(1), 1 << 40)
    elif what == "data_unaligned":
        q.set64(q.l2_at(1), 0x50200)
    elif what == "coded_beyond_the_file":
        q.set64(q.l2_at(1), 1 << 62 | 1 << 40)
    elif what == "count_zero":
        cluster = (q.get64(q.l2_at(1)) & OFFSET) >> 16
        q.write(block + cluster * 2, b"\0\0")
    elif what == "l1_of_snapshot_names_the_reftable":
        q.set64(snapshot_l1, q.reftable_offset)
    elif what == "reftable_entry_wild":
        q.set64(q.reftable_offset + 8, 1 << 50)
    before = path.read_bytes()
    failed = 0
    for args in ["-d", "one"], ["-a", "one"], ["-c", "two"]:
        p = run("snapshot", *args, path, status=None)
        assert p.returncode in (0, 1)
        failed += p.returncode
        if p.returncode == 0:
            break
        after = path.read_bytes()
        # What was refused for damage may have set the corrupt bit, nothing else.
        assert after[:72] + after[80:] == before[:72] + before[80:], what
    assert failed, "no operation noticed"


# ---------------------------------------------------------------- kills

def test_killed_at_any_instant_the_image_is_before_or_after(strata, run, peer, tmp_path):
    """A disk whose tables take a while to rewrite; after each kill, check by both programs."""
    path = tmp_path / "k.qcow2"
    run("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata,cluster_size=4k", path, "8G")
    whole_took = []
    rnd = random.Random(7)
    for i in range(12):
        have = len(listed(run, path))
        action = ["-c", "x"] if not have else rnd.choice([["-d", "x"], ["-a", "x"]])
        start = time.monotonic()
        p = subprocess.Popen([strata, "snapshot", *action, str(path)], stderr=subprocess.PIPE)
        if i < 3:  # how long it takes
            assert p.wait() == 0
            whole_took.append(time.monotonic() - start)
        else:
            time.sleep(rnd.random() * max(whole_took) * 1.1)
            p.send_signal(signal.SIGKILL)
            p.wait()
        p.stderr.close()
        c = run("check", path, status=None)
        assert c.returncode in (0, 3), c.stdout + c.stderr
        assert len(listed(run, path)) in (have, have + (action[0] == "-c") - (action[0] == "-d"))
    c = peer("qemu-img", "check", path, status=None)
    assert c.returncode in (0, 3), c.stdout
