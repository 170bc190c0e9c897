# SPDX-License-Identifier: MIT
"""Dirty bitmaps over NBD, under the drop-in names, and as somebody else may have left them: beside QEMU's answers."""
import contextlib
import json
import os
import re
import shutil
import struct
import subprocess

import pytest

from bitmap_help import *
from qcow2_image import Qcow2
from serving import Server


# ---- NBD

def nbdmap(uri, context):
    p = subprocess.run(["nbdinfo", "--json", f"--map={context}", uri], capture_output=True, text=True,
                       timeout=60)
    assert p.returncode == 0, p.stderr
    out = []
    for x in json.loads(p.stdout):
        if out and out[-1][2] == x["type"]:
            out[-1][1] += x["length"]
        else:
            out.append([x["offset"], x["length"], x["type"]])
    return out


@contextlib.contextmanager
def qemu_nbd(tmp_path, *args):
    sock = tmp_path / "theirs.sock"
    p = subprocess.Popen(["qemu-nbd", "-r", "-t", "-f", "qcow2", "-k", sock, *map(str, args)])
    try:
        wait_for(sock, p)
        yield f"nbd+unix:///?socket={sock}"
    finally:
        p.terminate()
        p.wait()


@pytest.fixture
def layers(run, io, tmp_path):
    """top -> mid -> base, with bitmaps fine and coarse in top, and old in mid."""
    base, mid, top = (tmp_path / n for n in ("base.qcow2", "mid.qcow2", "top.qcow2"))
    run("create", "-f", "qcow2", base, "16M")
    io(base, "write 0 1M")
    run("create", "-f", "qcow2", "-b", base, "-F", "qcow2", mid)
    run("bitmap", "--add", mid, "old")
    io(mid, "write 512k 1M", "write -z 8M 64k")
    run("create", "-f", "qcow2", "-b", mid, "-F", "qcow2", top)
    run("bitmap", "--add", "-g", "4k", top, "fine")
    run("bitmap", "--add", "-g", "1M", top, "coarse")
    io(top, "write 700000 1000", "write -z 3M 100k", "write 15M 1M")
    return top


def test_serve_shows_the_contexts_that_qemu_nbd_shows(strata, layers, tmp_path):
    options = ["-A", "-B", "fine", "-B", "coarse"]
    with Server(strata, layers, "-f", "qcow2", "-r", "-t", *options,
                socket_path=tmp_path / "s") as s, qemu_nbd(tmp_path, *options, layers) as theirs:
        for context in ("qemu:dirty-bitmap:fine", "qemu:dirty-bitmap:coarse", "qemu:allocation-depth",
                        "base:allocation"):
            assert nbdmap(s.uri, context) == nbdmap(theirs, context), context
        listed = [sorted(json.loads(subprocess.run(["nbdinfo", "--json", uri], capture_output=True)
                                    .stdout)["exports"][0]["contexts"]) for uri in (s.uri, theirs)]
        assert listed[0] == listed[1]


def test_serve_finds_bitmaps_below_too_and_names_what_it_does_not_find(strata, layers, run, tmp_path):
    with Server(strata, layers, "-f", "qcow2", "-r", "-t", "-B", "old", socket_path=tmp_path / "s") as s:
        assert [x[:2] for x in nbdmap(s.uri, "qemu:dirty-bitmap:old") if x[2]] == \
            [[512 * KIB, MIB], [8 * MIB, 64 * KIB]]
    assert "no bitmap 'none'" in run("serve", "-k", tmp_path / "s", "-B", "none", layers, status=1).stderr


def test_clients_see_what_they_write_themselves(strata, layers, bits, tmp_path):
    with Server(strata, layers, "-f", "qcow2", "-t", "-B", "fine", socket_path=tmp_path / "s") as s:
        before = nbdmap(s.uri, "qemu:dirty-bitmap:fine")
        subprocess.run(["qemu-io", "-f", "raw", "-c", "write 6M 4k", "-c", "write -z 7M 8k", s.uri],
                       check=True, stdout=subprocess.DEVNULL)
        dirty = [x[:2] for x in nbdmap(s.uri, "qemu:dirty-bitmap:fine") if x[2]]
        assert [6 * MIB, 4096] in dirty and [7 * MIB, 8192] in dirty
        assert [6 * MIB, 4096] not in [x[:2] for x in before if x[2]]
    assert [tuple(x) for x in dirty] == bits(layers, "fine")


def test_the_drop_in_qemu_nbd_serves_bitmaps(strata, layers, broken, tmp_path):
    link = tmp_path / "qemu-nbd"
    link.symlink_to(os.path.abspath(strata))
    sock = tmp_path / "d.sock"
    p = subprocess.Popen([link, "-r", "-f", "qcow2", "-A", "-B", "fine", "-k", sock, layers])
    wait_for(sock, p)
    assert [x for x in nbdmap(f"nbd+unix:///?socket={sock}", "qemu:dirty-bitmap:fine") if x[2]]
    assert p.wait(30) == 0
    for args in ["-B", "none", layers], ["-B", "b", broken]:
        said = [re.sub("^.*qemu-nbd: ", "qemu-nbd: ", subprocess.run(
            [prog, "-r", "-f", "qcow2", "-k", sock, *args], capture_output=True, text=True,
            timeout=30).stderr) for prog in (link, "qemu-nbd")]
        assert said[0] == said[1]


@pytest.mark.parametrize("mode", [["-r"], []], ids=["read-only", "read-write"])
def test_a_bitmap_cannot_be_removed_while_it_is_served(strata, layers, run, peer, tmp_path, mode):
    with Server(strata, layers, "-f", "qcow2", *mode, "-t", "-B", "fine", socket_path=tmp_path / "s"):
        assert "in use" in run("bitmap", "--remove", layers, "fine", status=1).stderr
        peer("qemu-img", "bitmap", "--remove", layers, "fine", status=1)
    assert "fine" in run("bitmap", "--list", layers).stdout


def test_selected_contexts_come_in_one_answer(strata, layers, tmp_path):
    """libnbd asks for several at once."""
    with Server(strata, layers, "-f", "qcow2", "-r", "-t", "-A", "-B", "fine", "-B", "coarse",
                socket_path=tmp_path / "s") as s:
        p = subprocess.run(["/usr/bin/python3", "-c", f"""
import nbd
h = nbd.NBD()
names = ["qemu:dirty-bitmap:coarse", "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:fine"]
for n in names:
    h.add_meta_context(n)
h.connect_uri({s.uri!r})
got = {{}}
h.block_status(16 << 20, 0, lambda c, o, e, err: got.__setitem__(c, e))
assert sorted(got) == sorted(names), got
assert sum(got["qemu:dirty-bitmap:fine"][0::2]) == 16 << 20
one = {{}}
h.block_status(16 << 20, 0, lambda c, o, e, err: one.__setitem__(c, e), nbd.CMD_FLAG_REQ_ONE)
assert all(len(e) == 2 and e == got[c][:2] for c, e in one.items()), one
"""], capture_output=True, text=True, timeout=60)
        assert p.returncode == 0, p.stderr


# ---- the drop-in name

LINES = [
    ["bitmap", "--add", "a", "b0"],
    ["bitmap", "--add", "a", "b0"],
    ["bitmap", "--add", "--disable", "-g", "4k", "a", "b1"],
    ["bitmap", "--merge", "b0", "a", "b1"],
    ["bitmap", "--merge", "none", "a", "b1"],
    ["bitmap", "--remove", "a", "none"],
    ["bitmap", "--clear", "--enable", "a", "b1"],
    ["bitmap", "--add", "-g", "100", "a", "x"],
    ["bitmap", "--add", "-g", "4G", "a", "x"],
    ["bitmap", "--add", "-g", "1x", "a", "x"],
    ["bitmap", "--add", "a", ""],
    ["bitmap", "--add", "a", "x" * 1024],
    ["bitmap", "--add", "v2", "x"],
    ["bitmap", "--add", "-f", "raw", "raw", "x"],
    ["bitmap", "--add", "a"],
    ["bitmap", "a", "b0"],
    ["bitmap", "-g", "1M", "--clear", "a", "b0"],
    ["bitmap", "-F", "raw", "--clear", "a", "b0"],
    ["bitmap", "-b", "a", "--clear", "a", "b0"],
    ["bitmap", "--merge"],
    ["bitmap", "--frob", "a", "b0"],
    ["bitmap", "--add", "none", "b0"],
    ["bitmap", "--image-opts", "--disable", "driver=qcow2,file.filename=a", "b0"],
    ["bitmap", "--add", "--merge", "b0", "-b", "big", "a", "b9"],
    ["bitmap", "--clear", "broken", "b"],
    ["bitmap", "--merge", "b", "broken", "c"],
    ["info", "a"],
    ["info", "--output=json", "a"],
    ["info", "broken"],
    ["measure", "-O", "qcow2", "a"],
    ["measure", "-O", "qcow2", "-o", "cluster_size=4k", "--output=json", "a"],
    ["measure", "-O", "qcow2", "broken"],
    ["convert", "-O", "qcow2", "--bitmaps", "a", "out"],
    ["info", "out"],
    ["convert", "-O", "qcow2", "--bitmaps", "-n", "a", "out"],
    ["convert", "-O", "raw", "--bitmaps", "a", "out2"],
    ["convert", "-O", "qcow2", "-o", "compat=0.10", "--bitmaps", "a", "out2"],
    ["convert", "-f", "raw", "-O", "qcow2", "--bitmaps", "a", "out2"],
    ["convert", "-O", "qcow2", "--bitmaps", "a", "a", "out2"],
    ["convert", "-O", "qcow2", "--skip-broken-bitmaps", "a", "out2"],
    ["convert", "-O", "qcow2", "--bitmaps", "broken", "out3"],
    ["convert", "-O", "qcow2", "--bitmaps", "--skip-broken-bitmaps", "broken", "out4"],
    ["bitmap", "--remove", "broken", "b"],
    ["check", "broken"],
]


def normal(text):
    text = re.sub(r"#block\d+", "NODE", text)
    text = re.sub(r"(disk size:) .*", r"\1 N", text)
    text = re.sub(r"Image end offset: \d+", "", text)
    text = re.sub(r'^( *)"children": \[\n(\1 .*\n)*\1\],\n', "", text, flags=re.M)  # QEMU 8 and later
    text = re.sub(r"^Child node '/file':\n(    .*\n)*", "", text, flags=re.M)
    return re.sub(r'"actual-size": \d+', '"actual-size": 0', text)


def test_the_drop_in_name_says_what_qemu_img_says(strata, peer, run, broken, tmp_path):
    link = tmp_path / "bin" / "qemu-img"
    link.parent.mkdir()
    link.symlink_to(os.path.abspath(strata))
    a, b = tmp_path / "1", tmp_path / "2"
    a.mkdir()
    peer("qemu-img", "create", "-q", "-f", "qcow2", "a", "10M", cwd=a)
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", "v2", "1M", cwd=a)
    peer("qemu-img", "create", "-q", "-f", "qcow2", "big", "20M", cwd=a)
    peer("qemu-img", "bitmap", "--add", "big", "b0", cwd=a)
    peer("qemu-img", "create", "-q", "-f", "raw", "raw", "1M", cwd=a)
    shutil.copy(broken, a / "broken")
    shutil.copytree(a, b)
    for line in LINES:
        got = []
        for program, folder in ("/usr/bin/qemu-img", a), (str(link), b):
            p = subprocess.run([program, *line], cwd=folder, capture_output=True, text=True, timeout=60,
                               stdin=subprocess.DEVNULL)
            out = json.loads(normal(p.stdout)) if "--output=json" in line else normal(p.stdout)
            got.append((p.returncode, out, normal(p.stderr)))
        assert got[1] == got[0], line


# ---- stale, foreign, hostile

def test_bitmaps_that_another_program_ignored_are_dropped(run, io, peer, tmp_path, listed):
    path = tmp_path / "a.qcow2"
    run("create", "-f", "qcow2", path, "4M")
    run("bitmap", "--add", path, "b")
    q = Qcow2(path)
    q.set64(AUTOCLEAR, 0)
    assert listed(path) == {}
    p = io(path, "write 0 64k")
    assert "bitmaps are dropped" in p.stderr
    assert "bitmap" not in peer("qemu-img", "info", path).stderr
    assert peer("qemu-img", "check", path, status=None).returncode == 3  # their clusters
    run("bitmap", "--add", path, "b")
    assert listed(path)["b"]["dirty-bytes"] == 0


@pytest.fixture
def foreign(run, io, tmp_path):
    """Gives bitmap 'b' of an image 16 bytes of extra data; with flag 2 anybody may use it."""
    def call(flag, auto=2):
        path = tmp_path / "f.qcow2"
        run("create", "-f", "qcow2", path, "4M")
        run("bitmap", "--add", path, "b")
        io(path, "write 1M 64k")
        q = Qcow2(path)
        at, size = directory(q)
        assert size == 32
        q.set32(at + 12, auto | flag)
        q.set32(at + 20, 16)
        with open(path, "r+b") as f:
            f.seek(at + 24)
            f.write(b"sixteen bytes ..b".ljust(24, b"\0"))
        q.set64(extension(q) + 8, 48)
        return path

    return call


def extra(path):
    q = Qcow2(path)
    at, _ = directory(q)
    return path.read_bytes()[at + 24:at + 40]


def test_extra_data_that_allows_it_is_kept_and_the_bitmap_used(foreign, run, io, listed):
    path = foreign(4)
    assert listed(path)["b"]["dirty-bytes"] == 64 * KIB
    io(path, "write 2M 64k")
    run("bitmap", "--add", path, "other")
    assert extra(path) == b"sixteen bytes .."
    assert flags(Qcow2(path)) == 6
    assert listed(path)["b"]["dirty-bytes"] == 128 * KIB
    run("check", path)


def test_unknown_extra_data_keeps_the_bitmap_from_use_and_a_write_is_told(foreign, run, io, listed):
    path = foreign(0)
    b = listed(path)["b"]
    assert not b["usable"] and "extra data" in b["problem"]
    run("bitmap", "--add", path, "other")
    assert flags(Qcow2(path)) == 2 and extra(path) == b"sixteen bytes .."
    assert "extra data" in run("bitmap", "--clear", path, "b", status=1).stderr
    io(path, "write 2M 64k")
    assert flags(Qcow2(path)) == 3 and extra(path) == b"sixteen bytes .."
    assert listed(path)["b"]["inconsistent"]
    run("bitmap", "--remove", path, "b")
    run("check", path)


# (where: directory entry or header extension, offset, width, value)
HOSTILE = [(w, o, n, v) for w, o, n, values in [
    ("entry", 0, 8, [0, 1, 512, 1 << 63, (1 << 64) - 1, 1 << 56, 64 * KIB - 1, 0x10000 * 3]),
    ("entry", 8, 4, [0, 0xffffffff, 0x80000000, 1 << 20]),
    ("entry", 12, 4, [8, 0xffffffff, 0x80000002]),
    ("entry", 16, 1, [0, 2, 255]),
    ("entry", 17, 1, [0, 8, 32, 63, 64, 255]),
    ("entry", 18, 2, [0, 1024, 65535, 2]),
    ("entry", 20, 4, [1, 0x7fffffff, 0xffffffff, 0xfffffff8]),
    ("entry", 24, 1, [0]),
    ("ext", 0, 4, [0, 2, 65535, 65536, 0xffffffff]),
    ("ext", 8, 8, [0, 31, 33, 1 << 26, (1 << 26) + 8, 1 << 63, (1 << 64) - 1]),
    ("ext", 16, 8, [0, 512, 1 << 56, 1 << 63, (1 << 64) - 64 * KIB, 0x10000, 1 << 40]),
    ("table", 0, 8, [1 << 1, 1 << 62, 1 << 63, 513, 0x10001, 0x10000, 0x30000, 1 << 56, 1 << 55]),
] for v in values]


@pytest.mark.parametrize("where,offset,width,value", HOSTILE)
def test_damage_is_named_or_refused_and_the_disk_can_be_read(run, io, tmp_path, where, offset, width,
                                                             value):
    path = tmp_path / "a.qcow2"
    run("create", "-f", "qcow2", path, "4M")
    run("bitmap", "--add", path, "b")
    io(path, "write -P 7 0 64k")
    q = Qcow2(path)
    at, _ = directory(q)
    base = {"entry": at, "ext": extension(q), "table": q.get64(at)}[where]
    with open(path, "r+b") as f:
        f.seek(base + offset)
        f.write((value % (1 << 8 * width)).to_bytes(width, "big"))
    io(path, "read -P 7 0 64k", opts=["-r"])
    run("info", path)
    run("bitmap", "--list", path)
    run("check", path, status=None)
    before = digest(path)
    p = io(path, "write -P 8 64k 64k", status=None)
    assert p.returncode in (0, 1)
    if p.returncode:  # refused: not a byte changed
        assert digest(path) == before
        assert "bitmap" in p.stderr
    else:  # taken: then the bitmap says so, or that it is of no use
        io(path, "read -P 7 0 64k", "read -P 8 64k 64k", opts=["-r"])
        for b in json.loads(run("bitmap", "--list", "--output=json", path).stdout):
            assert not b["usable"] or b["dirty-bytes"] >= 128 * KIB
            run("bitmap", "--remove", path, b["name"])
        io(path, "write 128k 64k")


@pytest.mark.plain_build
def test_many_bitmaps_that_name_one_table_take_no_memory_to_speak_of(run, tmp_path, strata):
    """A directory of 60,000 bitmaps, all of them over the same clusters."""
    path = tmp_path / "a.qcow2"
    run("create", "-f", "qcow2", "-o", "cluster_size=64k", path, "1G")
    run("bitmap", "--add", "-g", "512", path, "b")
    q = Qcow2(path)
    at, _ = directory(q)
    table, entries = q.get64(at), q.get32(at + 8)
    names = [f"n{i}".encode() for i in range(60000)]
    parts = [struct.pack(">QIIBBHI", table, entries, 2, 1, 9, len(n), 0) + n for n in names]
    blob = b"".join(e.ljust((len(e) + 7) // 8 * 8, b"\0") for e in parts)
    end = (path.stat().st_size + 65535) // 65536 * 65536
    with open(path, "r+b") as f:
        f.seek(end)
        f.write(blob.ljust((len(blob) + 65535) // 65536 * 65536, b"\0"))
    ext = extension(q)
    q.set32(ext, len(names))
    q.set64(ext + 8, len(blob))
    q.set64(ext + 16, end)
    p = subprocess.run(["bash", "-c", f"ulimit -v 2000000; timeout 20 {os.path.abspath(strata)} info {path};"
                        f"timeout 20 {os.path.abspath(strata)} io -c 'write 0 64k' {path}"],
                       capture_output=True, text=True)
    assert p.returncode in (0, 1), p.stderr
