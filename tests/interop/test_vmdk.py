# SPDX-License-Identifier: MIT
"""VMDK: what only it has.  Descriptors, extents of every type, streams, parents."""
import json
import os
import random
import resource
import struct
import subprocess
import sys
import time
import zlib

import pytest

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
SUBFORMATS = ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat",
              "streamOptimized"]


def text(extents, kind="custom", cid="12345678", parent="ffffffff", more=""):
    return (f'# Disk DescriptorFile\nversion=1\nCID={cid}\nparentCID={parent}\n'
            f'createType="{kind}"\n{more}\n# Extent description\n{extents}\n'
            f'# The Disk Data Base\n#DDB\n\nddb.adapterType = "ide"\n')


def header(capacity, version=1, flags=3, grain=128, desc=(0, 0), gtes=512, rgd=21, gd=26,
           overhead=128, compression=0, magic=b"KDMV", newlines=b"\n \r\n"):
    h = struct.pack("<4sIIQQQQIQQQB4sH", magic, version, flags, capacity, grain, *desc, gtes, rgd,
                    gd, overhead, 0, newlines, compression)
    return h.ljust(512, b"\0")


def info(run, path, *args):
    return json.loads(run("info", "--output=json", *args, path).stdout)


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """Text, zeros, and what cannot be compressed."""
    path, rng = tmp_path_factory.mktemp("disk") / "disk.raw", random.Random(7)
    with open(path, "wb") as f:
        f.write(b"".join(b"line %d of some text\n" % i for i in range(150000)))
        f.seek(9 * MIB + 512)
        f.write(rng.randbytes(3 * MIB))
        f.truncate(40 * MIB + 1536)
    yield path
    path.unlink()


# ---- both ways with peers

@pytest.mark.parametrize("kind", SUBFORMATS)
def test_qemu_img_and_strata_read_each_other(run, peer, tmp_path, disk, kind):
    ours, theirs = tmp_path / "ours.vmdk", tmp_path / "theirs.vmdk"
    run("convert", "-q", "-f", "raw", "-O", "vmdk", "-o", f"subformat={kind}", disk, ours)
    peer("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={kind}", disk, theirs)
    peer("qemu-img", "compare", "-f", "raw", "-F", "vmdk", disk, ours)
    peer("qemu-img", "check", ours)
    run("compare", "-f", "raw", disk, theirs)
    run("check", theirs)
    run("check", ours)
    assert info(run, ours)["format-specific"]["data"]["create-type"] == kind


@pytest.mark.parametrize("kind", SUBFORMATS)
def test_libvmdk_opens_what_strata_makes(run, peer, tmp_path, disk, kind):
    path = tmp_path / "a.vmdk"
    run("convert", "-q", "-f", "raw", "-O", "vmdk", "-o", f"subformat={kind}", disk, path)
    said = peer("vmdkinfo", path).stdout
    assert "40 MiB (41944576 bytes)" in said and "Number of extents:\t\t1" in said


@pytest.mark.parametrize("kind", ["monolithicSparse", "streamOptimized"])
def test_7zip_extracts_what_strata_makes(run, peer, tmp_path, disk, kind):
    path = tmp_path / "a.vmdk"
    run("convert", "-q", "-f", "raw", "-O", "vmdk", "-o", f"subformat={kind}", disk, path)
    peer("7zz", "e", f"-o{tmp_path / 'out'}", path)
    assert next((tmp_path / "out").iterdir()).read_bytes() == disk.read_bytes()


def test_info_says_what_qemu_img_says(run, peer, tmp_path):
    for kind in SUBFORMATS:
        path = tmp_path / f"{kind}.vmdk"
        peer("qemu-img", "create", "-q", "-f", "vmdk", "-o", f"subformat={kind}", path, "10M")
        ours = info(run, path)["format-specific"]["data"]
        theirs = json.loads(peer("qemu-img", "info", "--output=json", path).stdout)
        theirs = theirs["format-specific"]["data"]
        assert [ours[k] for k in ("cid", "parent-cid", "create-type")] == \
            [theirs[k] for k in ("cid", "parent-cid", "create-type")]
        assert ours["extents"][0]["virtual-size"] == theirs["extents"][0]["virtual-size"]


@pytest.mark.parametrize("kind", SUBFORMATS)
def test_the_drop_in_info_is_that_of_qemu_img(strata, peer, tmp_path, kind):
    os.symlink(strata, tmp_path / "qemu-img")
    path = tmp_path / "a.vmdk"
    peer("qemu-img", "create", "-q", "-f", "vmdk", "-o", f"subformat={kind}", path, "10M")
    theirs = json.loads(peer("qemu-img", "info", "--output=json", path).stdout)
    ours = subprocess.run([tmp_path / "qemu-img", "info", "--output=json", path], check=True,
                          capture_output=True, text=True).stdout
    assert json.loads(ours)["format-specific"] == theirs["format-specific"]


@pytest.mark.parametrize("options", ["compat6=on", "hwversion=9", "adapter_type=lsilogic",
                                     "adapter_type=buslogic", "toolsversion=77",
                                     "zeroed_grain=on"])
def test_the_descriptor_has_what_qemu_img_writes(run, peer, tmp_path, options):
    def facts(path):
        lines = path.read_bytes()[512:512 * 21].rstrip(b"\0").decode().splitlines()
        return sorted(x for x in lines if x.startswith(("ddb.", "createType", "version", "RW")))
    ours, theirs = tmp_path / "o", tmp_path / "t"
    ours.mkdir(), theirs.mkdir()
    run("create", "-q", "-f", "vmdk", "-o", options, ours / "a.vmdk", "300M")
    peer("qemu-img", "create", "-q", "-f", "vmdk", "-o", options, theirs / "a.vmdk", "300M")
    assert facts(ours / "a.vmdk") == facts(theirs / "a.vmdk")
    assert (ours / "a.vmdk").read_bytes()[:512] == (theirs / "a.vmdk").read_bytes()[:512]


# ---- streams

def markers(path):
    """The stream from its beginning, as an importer without a seek reads it."""
    data = path.read_bytes()
    at, found = struct.unpack_from("<Q", data, 64)[0] * 512, []
    while True:
        value, size, kind = struct.unpack_from("<QII", data, at)
        if size:
            out = zlib.decompress(data[at + 12:at + 12 + size])
            found.append(("grain", value, out, at // 512))
            at += (12 + size + 511) // 512 * 512
            continue
        name = ["eos", "gt", "gd", "footer"][kind]
        found.append((name, value, data[at + 512:at + 512 + value * 512], at // 512 + 1))
        at += 512 + value * 512
        if name == "eos":
            assert at == len(data)
            return found


def test_a_stream_read_from_its_beginning_is_the_disk_in_order(run, tmp_path, disk):
    path, raw = tmp_path / "a.vmdk", disk.read_bytes()
    run("convert", "-q", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", disk, path)
    found = markers(path)
    grains = [f for f in found if f[0] == "grain"]
    assert [f[0] for f in found[len(grains):]] == ["gt", "gd", "footer", "eos"]
    assert [g[1] for g in grains] == sorted({g[1] for g in grains})
    again = bytearray(len(raw) + 64 * KIB)
    for _, sector, out, _ in grains:
        assert len(out) == 64 * KIB
        again[sector * 512:sector * 512 + len(out)] = out
    assert again[:len(raw)] == raw
    # The tables name the grains, the directory the tables, the footer the directory.
    table = b"".join(f[2] for f in found if f[0] == "gt")
    for _, sector, _, place in grains:
        assert struct.unpack_from("<I", table, sector // 128 * 4)[0] == place
    gd = next(f for f in found if f[0] == "gd")
    assert [x for x in struct.unpack("<128I", gd[2]) if x] == [f[3] for f in found if f[0] == "gt"]
    footer = next(f for f in found if f[0] == "footer")[2]
    head = path.read_bytes()[:512]
    assert struct.unpack_from("<II", head, 4) == (3, 0x30001)
    assert struct.unpack_from("<Q", head, 56)[0] == 2**64 - 1
    assert struct.unpack_from("<Q", footer, 56)[0] == gd[3]
    assert footer[:56] == head[:56] and footer[64:] == head[64:]


def test_a_grain_of_a_stream_is_written_once(run, peer, tmp_path):
    path = tmp_path / "a.vmdk"
    run("create", "-q", "-f", "vmdk", "-o", "subformat=streamOptimized", path, "10M")
    run("io", "-f", "vmdk", "-c", "write -q -P 5 0 64k", "-c", "flush", "-c",
        "write -q -P 6 64k 100k", path)
    p = run("io", "-f", "vmdk", "-c", "write -q 0 64k", path, status=None)
    assert "Operation not permitted" in p.stdout + p.stderr
    run("io", "-f", "vmdk", "-c", "write -q -P 7 1M 64k", path)
    reads = ["-c", "read -q -P 5 0 64k", "-c", "read -q -P 6 64k 100k", "-c", "read -q -P 7 1M 64k"]
    assert not peer("qemu-io", "-f", "vmdk", *reads, path).stdout
    assert not run("io", "-f", "vmdk", *reads, path).stdout
    peer("7zz", "t", path)
    run("check", path)
    assert [f[0] for f in markers(path)].count("grain") == 4


@pytest.mark.parametrize("keep", [512, 66048, -512, -1024, -1536, -2048])
def test_a_stream_that_was_cut_is_refused_by_name(run, tmp_path, disk, keep):
    path = tmp_path / "a.vmdk"
    run("convert", "-q", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", disk, path)
    os.truncate(path, keep if keep > 0 else path.stat().st_size + keep)
    p = run("check", path, status=None)
    assert p.returncode and ("footer" in p.stderr or "descriptor" in p.stderr)


def test_a_stream_with_padding_behind_its_end_is_read(run, tmp_path, disk):
    path = tmp_path / "a.vmdk"
    run("convert", "-q", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", disk, path)
    os.truncate(path, (path.stat().st_size // 65536 + 1) * 65536)
    if path.stat().st_size % 65536 == 0:
        run("compare", "-f", "raw", disk, path)


def test_a_short_last_grain_of_others_is_read(run, tmp_path):
    """The code of the last grain may hold only what is inside of the disk."""
    content, path = b"x" * 65536 + b"y" * 1024, tmp_path / "a.vmdk"
    desc = text('RW 130 SPARSE "a.vmdk"', "streamOptimized").encode().ljust(20 * 512, b"\0")
    out = header(130, 3, 0x30001, desc=(1, 20), rgd=0, gd=2**64 - 1, overhead=128,
                 compression=1) + desc
    out, table = out.ljust(65536, b"\0"), []
    for sector, piece in ((0, content[:65536]), (128, content[65536:])):
        code = zlib.compress(piece)
        table.append(len(out) // 512)
        out += struct.pack("<QI", sector, len(code)) + code
        out += bytes(-len(out) % 512)
    out += struct.pack("<QII", 4, 0, 1).ljust(512, b"\0")
    gt = len(out) // 512
    out += struct.pack("<2I", *table).ljust(2048, b"\0")
    out += struct.pack("<QII", 1, 0, 2).ljust(512, b"\0")
    gd = len(out) // 512
    out += struct.pack("<I", gt).ljust(512, b"\0")
    out += struct.pack("<QII", 1, 0, 3).ljust(512, b"\0")
    out += header(130, 3, 0x30001, desc=(1, 20), rgd=0, gd=gd, overhead=128, compression=1)
    path.write_bytes(out + bytes(512))
    run("convert", "-q", "-O", "raw", path, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == content
    run("check", path)


# ---- extents

def test_flat_files_are_joined_by_a_descriptor(run, peer, tmp_path):
    """A concatenation of files that exist, from offsets of theirs; zeros in between."""
    a, b = random.Random(1).randbytes(MIB), random.Random(2).randbytes(2 * MIB)
    (tmp_path / "a").write_bytes(a), (tmp_path / "b c").write_bytes(b)
    path = tmp_path / "all.vmdk"
    path.write_text(text('RW 1024 FLAT "a" 512\nRW 2048 ZERO\nRW 2048 FLAT "b c" 100\n'
                         'RW 512 FLAT "a" 0\nRW 100 VMFS "b c"').replace("\n", "\r\n"))
    want = a[512 * 512:512 * 1536] + bytes(MIB) + b[51200:51200 + MIB] + a[:512 * 512] + b[:51200]
    run("convert", "-q", "-O", "raw", path, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == want
    # A write goes where it belongs and nowhere else.
    run("io", "-f", "vmdk", "-c", "write -q -P 9 0 1k", "-c", "write -q -P 8 1536k 512", path)
    assert (tmp_path / "a").read_bytes() == a[:512 * 512] + b"\x09" * 1024 + a[512 * 512 + 1024:]
    assert (tmp_path / "b c").read_bytes() == b[:51200] + b"\x08" * 512 + b[51712:]
    p = run("io", "-f", "vmdk", "-c", "write -q 600k 512", path, status=None)
    assert "read-only" in (p.stdout + p.stderr).lower()


def test_extents_that_share_bytes_are_read_only(run, tmp_path):
    (tmp_path / "a").write_bytes(bytes(MIB))
    path = tmp_path / "all.vmdk"
    path.write_text(text('RW 1024 FLAT "a" 0\nRW 1024 FLAT "a" 1023'))
    run("convert", "-q", "-O", "raw", path, tmp_path / "raw")
    p = run("io", "-f", "vmdk", "-c", "write -q 0 512", path, status=None)
    assert "share bytes" in p.stdout + p.stderr
    assert (tmp_path / "a").read_bytes() == bytes(MIB)


def test_a_flat_file_that_is_too_short_is_read_only_and_found(run, tmp_path):
    (tmp_path / "a").write_bytes(b"1" * 1000)
    path = tmp_path / "all.vmdk"
    path.write_text(text('RW 1024 FLAT "a" 0'))
    assert not run("io", "-r", "-f", "vmdk", "-c", "read -q -P 0 4k 4k", path).stdout
    p = run("io", "-f", "vmdk", "-c", "write -q 0 512", path, status=None)
    assert "only reading" in p.stdout + p.stderr
    p = run("check", path, status=2)
    assert "has 1000 bytes" in p.stdout + p.stderr
    assert (tmp_path / "a").stat().st_size == 1000


def test_rdonly_and_noaccess_extents(run, tmp_path):
    (tmp_path / "a").write_bytes(b"1" * MIB)
    path = tmp_path / "all.vmdk"
    path.write_text(text('RDONLY 1024 FLAT "a" 0\nNOACCESS 1024 FLAT "a" 0\nRW 8 ZERO'))
    assert info(run, path)["virtual-size"] == MIB + 4096
    assert not run("io", "-r", "-f", "vmdk", "-c", "read -q -P 0x31 0 512k", path).stdout
    for command, flag in (("read -q 512k 512", "-r"), ("write -q 0 512", "-f")):
        args = ["-r", "-f", "vmdk"] if flag == "-r" else ["-f", "vmdk"]
        p = run("io", *args, "-c", command, path, status=None)
        assert "ermission" in p.stdout + p.stderr
    assert (tmp_path / "a").read_bytes() == b"1" * MIB


def test_a_cowd_extent_is_read(run, peer, tmp_path):
    """ESX sparse: one-sector grains, tables of 4096 entries."""
    grains = {0: b"a" * 512, 1: b"b" * 512, 5000: b"c" * 512}
    sectors = 8192
    out = struct.pack("<4s7I", b"COWD", 1, 3, sectors, 1, 4, 2, 0).ljust(2048, b"\0")
    first, second = 5, 5 + 32
    out += struct.pack("<2I", first, second).ljust(512, b"\0")
    data, tables = second + 32, [[0] * 4096, [0] * 4096]
    body = b""
    for sector, piece in grains.items():
        tables[sector // 4096][sector % 4096] = data + len(body) // 512
        body += piece
    for t in tables:
        out += struct.pack("<4096I", *t)
    (tmp_path / "a-delta.vmdk").write_bytes(out + body)
    path = tmp_path / "a.vmdk"
    path.write_text(text(f'RW {sectors} VMFSSPARSE "a-delta.vmdk"', "vmfsSparse"))
    want = bytearray(sectors * 512)
    for sector, piece in grains.items():
        want[sector * 512:sector * 512 + 512] = piece
    (tmp_path / "want").write_bytes(want)
    run("compare", "-F", "raw", path, tmp_path / "want")
    peer("qemu-img", "compare", "-F", "raw", path, tmp_path / "want")
    run("check", path)
    p = run("io", "-f", "vmdk", "-c", "write -q 0 512", path, status=None)
    assert "read only" in p.stdout + p.stderr


def sesparse(replay=0):
    """A seSparse file: 8 MiB of disk; data, zeros and unmapped grains."""
    q = lambda *v: struct.pack(f"<{len(v)}Q", *v)
    head = q(0xcafebabe, 0x200000001, 16384, 8, 64, 0, 0, 0, 0, 0, 1, 1, 2, 2, 4, 4, 8, 1, 16, 64,
             80, 1, 81, 1, 96, 800).ljust(512, b"\0")
    out = bytearray(head + q(0xcafecafe, 1, 1, replay).ljust(512, b"\0"))
    out = out.ljust(96 * 512, b"\0")
    out[8 * 512:8 * 512 + 8] = q(0x1000000000000000)
    entries = {0: 3 << 60, 1: 3 << 60 | 1 << 48, 2: 1 << 60, 3: 2 << 60}
    entries[1] = 3 << 60 | (1 & 0xfff) << 48
    for i, e in entries.items():
        out[16 * 512 + i * 8:16 * 512 + i * 8 + 8] = q(e)
    return bytes(out) + b"s" * 4096 + b"t" * 4096


def test_a_sesparse_extent_is_read(run, peer, tmp_path):
    (tmp_path / "a-sesparse.vmdk").write_bytes(sesparse())
    path = tmp_path / "a.vmdk"
    path.write_text(text('RW 16384 SESPARSE "a-sesparse.vmdk"', "seSparse"))
    (tmp_path / "want").write_bytes((b"s" * 4096 + b"t" * 4096).ljust(8 * MIB, b"\0"))
    run("compare", "-F", "raw", path, tmp_path / "want")
    peer("qemu-img", "compare", "-F", "raw", path, tmp_path / "want")
    (tmp_path / "a-sesparse.vmdk").write_bytes(sesparse(replay=1))
    assert "journal" in run("convert", "-O", "raw", path, tmp_path / "r", status=1).stderr


# ---- trust

@pytest.mark.parametrize("name", ["/etc/shadow", "../x", "sub/../../x", "/dev/null", "fifo", "dev",
                                  "link", "/etc/hostname"])
def test_an_extent_outside_the_folder_is_not_opened(run, tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir(), (folder / "sub").mkdir()
    (tmp_path / "x").write_bytes(bytes(MIB))
    os.mkfifo(folder / "fifo")
    os.symlink("/dev/zero", folder / "dev")
    os.symlink("/etc/passwd", folder / "link")
    path = folder / "a.vmdk"
    path.write_text(text(f'RW 8 FLAT "{name}" 0'))
    for args in (["convert", "-O", "raw", path, tmp_path / "out"], ["check", path], ["map", path]):
        p = run(*args, status=None, timeout=10)
        assert p.returncode, args
        assert "--trust" in p.stderr and "regular file" in p.stderr or "outside" in p.stderr
    run("info", path)  # opens nothing
    p = run("convert", "--trust", "none", "-O", "raw", path, tmp_path / "out", status=1)
    assert "--trust none" in p.stderr


def test_a_fifo_is_no_extent_whoever_is_trusted(run, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    path = tmp_path / "a.vmdk"
    path.write_text(text('RW 8 FLAT "fifo" 0'))
    p = run("convert", "--trust", "any", "-O", "raw", path, tmp_path / "out", status=1, timeout=10)
    assert "neither a regular file" in p.stderr


def test_names_of_protocols_are_paths(run, tmp_path):
    path = tmp_path / "a.vmdk"
    for name in ("nbd:localhost:1", 'json:{}', "file:/etc/hostname"):
        path.write_text(text(f'RW 8 FLAT "{name}" 0'))
        p = run("convert", "--trust", "any", "-O", "raw", path, tmp_path / "out", status=1)
        assert "No such file" in p.stderr


def test_an_image_is_no_extent_of_its_own(run, tmp_path):
    path = tmp_path / "a.vmdk"
    for kind in ("FLAT", "SPARSE"):
        path.write_text(text(f'RW 8 {kind} "a.vmdk"' + (" 0" if kind == "FLAT" else "")))
        p = run("convert", "-O", "raw", path, tmp_path / "out", status=1)
        assert "is the image itself" in p.stderr


# ---- hostile

@pytest.mark.parametrize("extents", [
    'RW 0x10 FLAT "a" 0', 'RW -1 FLAT "a" 0', 'RW 99999999999999999999 FLAT "a" 0',
    'RW 18014398509481983 ZERO', 'RW 9223372036854775807 FLAT "a" 0',
    'RW 8 FLAT "a" 36028797018963967', 'RW 8 FLAT "a" -1', 'RW 8 FLAT "a" x', 'RW 8 FLAT "a"',
    'RW 8 FLAT a 0', 'RW 8 FLAT "" 0', 'RW 8 FLAT "a', 'RW 8 FLAT', 'RW 8', 'RW', 'RW 8 WHAT "a"',
    'RW 8 VMFSRDM "a"', f'RW 8 FLAT "{"n" * 5000}" 0', 'RW 8 SPARSE "a" 9', "",
    "RW 9007199254740992 ZERO\n" * 3], ids=range(21))
def test_extent_lines_that_cannot_be_are_refused(run, tmp_path, extents):
    (tmp_path / "a").write_bytes(bytes(4096))
    path = tmp_path / "a.vmdk"
    path.write_text(text(extents))
    p = run("convert", "-O", "raw", path, tmp_path / "out", status=1, timeout=20)
    assert "extent" in p.stderr and p.stderr.isprintable() is not None


def limited():
    resource.setrlimit(resource.RLIMIT_AS, (GIB, GIB))
    resource.setrlimit(resource.RLIMIT_CPU, (10, 10))


@pytest.mark.plain_build
@pytest.mark.parametrize("many", [
    'RW 1 ZERO\n' * 100000, 'RW 1 FLAT "a" 0\n' * 100000, 'x=' + "y" * (3 * MIB), "a\n" * 1000000], ids=["zeros", "flats", "long", "lines"])
def test_a_huge_descriptor_is_bounded(strata, tmp_path, many):
    (tmp_path / "a").write_bytes(bytes(4096))
    path = tmp_path / "a.vmdk"
    path.write_text(text(many))
    p = subprocess.run([strata, "convert", "-O", "raw", path, tmp_path / "out"], timeout=20,
                       capture_output=True, text=True, preexec_fn=limited)
    assert p.returncode == 1 and ("32768 extents" in p.stderr or "no extents" in p.stderr)


@pytest.mark.plain_build
def test_a_descriptor_of_2_gb_is_not_read(strata, tmp_path):
    path = tmp_path / "a.vmdk"
    path.write_text(text('RW 8 ZERO'))
    os.truncate(path, 2 * GIB)
    p = subprocess.run([strata, "info", path], timeout=20, capture_output=True, text=True,
                       preexec_fn=limited)
    assert p.returncode == 1 and "descriptor of 2147483648 bytes" in p.stderr


@pytest.mark.parametrize("fields", [
    dict(grain=0), dict(grain=1), dict(grain=3), dict(grain=2**40), dict(grain=2**63),
    dict(gtes=0), dict(gtes=3), dict(gtes=2**31), dict(capacity=2**63), dict(capacity=2**54),
    dict(gd=2**63), dict(gd=2**40), dict(gd=0), dict(version=0), dict(version=4), dict(flags=0x13),
    dict(flags=0x10003, compression=7), dict(desc=(1, 2**60)), dict(desc=(2**60, 20)),
    dict(newlines=b"\n\r\n "), dict(gd=2**64 - 1), dict(desc=(1, 2**23))])
def test_a_header_with_impossible_numbers_is_refused(run, tmp_path, fields):
    """Among them those of CVE-2014-0144 and its kin: sizes of tables that overflow or exhaust."""
    path = tmp_path / "a.vmdk"
    run("create", "-q", "-f", "vmdk", path, "10M")
    data = path.read_bytes()
    path.write_bytes(header(**{"capacity": 20480, "desc": (1, 20), **fields}) + data[512:])
    p = run("convert", "-O", "raw", path, tmp_path / "out", status=1, timeout=20)
    assert p.stderr.count("\n") <= 3


def entry(path, at, value):
    with open(path, "r+b") as f:
        f.seek(at)
        f.write(struct.pack("<I", value))


@pytest.fixture
def sparse(run, tmp_path):
    path = tmp_path / "a.vmdk"
    run("create", "-q", "-f", "vmdk", path, "10M")
    run("io", "-f", "vmdk", "-c", "write -q -P 5 0 1M", path)
    return path


# Sectors of an image of 10 MiB: RGD 21, its table 22, GD 26, its table 27.
@pytest.mark.parametrize("at, value", [(27 * 512, 2**32 - 1), (27 * 512, 1), (26 * 512, 2**32 - 1),
                                       (26 * 512, 10**6)])
def test_an_entry_that_leads_out_of_the_file_is_an_error_and_found(run, sparse, at, value):
    entry(sparse, at, value)
    p = run("io", "-r", "-f", "vmdk", "-c", "read -q 0 512", sparse, status=None)
    assert "Input/output error" in p.stdout + p.stderr
    assert "not in the file" in (lambda q: q.stdout + q.stderr)(run("check", sparse, status=2))


def test_grains_with_two_names_are_found(run, sparse):
    entry(sparse, 27 * 512 + 4, 128)
    p = run("check", sparse, status=2)
    assert "another name" in p.stdout + p.stderr


def test_check_takes_a_damaged_entry_from_the_redundant_table(run, sparse):
    entry(sparse, 27 * 512, 2**31)
    run("check", "-r", "all", sparse)
    run("check", sparse)
    assert not run("io", "-r", "-f", "vmdk", "-c", "read -q -P 5 0 1M", sparse).stdout


def test_check_brings_the_redundant_table_up_to_date(run, sparse):
    entry(sparse, 22 * 512, 0)
    p = run("check", sparse, status=3)
    assert "behind" in p.stdout + p.stderr
    run("check", "-r", "leaks", sparse)
    data = sparse.read_bytes()
    assert data[22 * 512:26 * 512] == data[27 * 512:31 * 512]


# ---- parents

@pytest.fixture
def chain(run, tmp_path):
    base, top = tmp_path / "base.vmdk", tmp_path / "top.vmdk"
    run("create", "-q", "-f", "vmdk", base, "10M")
    run("io", "-f", "vmdk", "-c", "write -q -P 1 0 2M", base)
    run("create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", top)
    run("io", "-f", "vmdk", "-c", "write -q -P 2 1M 64k", top)
    return base, top


def test_a_child_reads_through_to_its_parent_here_and_there(run, peer, chain):
    reads = ["-c", "read -q -P 1 0 1M", "-c", "read -q -P 2 1M 64k", "-c", "read -q -P 1 1088k 960k",
             "-c", "read -q -P 0 2M 8M"]
    assert not run("io", "-r", "-f", "vmdk", *reads, chain[1]).stdout
    assert not peer("qemu-io", "-r", "-f", "vmdk", *reads, chain[1]).stdout


def test_a_child_whose_parent_has_changed_is_refused(run, chain):
    run("io", "-f", "vmdk", "-c", "write -q -P 3 5M 64k", chain[0])
    p = run("convert", "-O", "raw", chain[1], chain[0].parent / "out", status=1)
    assert "content ID" in p.stderr and "rebase -u" in p.stderr
    run("rebase", "-u", "-b", "base.vmdk", "-F", "vmdk", chain[1])
    assert not run("io", "-r", "-f", "vmdk", "-c", "read -q -P 3 5M 64k", chain[1]).stdout


def test_the_content_id_changes_with_the_first_write_of_an_open_and_not_before(run, sparse):
    def cid():
        return info(run, sparse)["format-specific"]["data"]["cid"]
    first = cid()
    run("io", "-f", "vmdk", "-c", "read -q 0 64k", sparse)
    assert cid() == first
    run("io", "-f", "vmdk", "-c", "write -q 0 64k", "-c", "write -q 0 64k", sparse)
    assert cid() != first


def test_a_commit_leaves_a_child_that_still_fits(run, chain):
    run("commit", "-q", chain[1])
    reads = ["-c", "read -q -P 1 0 1M", "-c", "read -q -P 2 1M 64k"]
    assert not run("io", "-r", "-f", "vmdk", *reads, chain[0]).stdout
    assert not run("io", "-r", "-f", "vmdk", *reads, chain[1]).stdout


def test_a_rebase_moves_a_child_to_a_copy(run, peer, tmp_path, chain):
    run("convert", "-q", "-O", "vmdk", chain[0], tmp_path / "other.vmdk")
    run("rebase", "-q", "-b", "other.vmdk", "-F", "vmdk", chain[1])
    chain[0].unlink()
    assert not peer("qemu-io", "-r", "-f", "vmdk", "-c", "read -q -P 1 0 1M", chain[1]).stdout
    run("rebase", "-q", "-b", "", chain[1])
    (tmp_path / "other.vmdk").unlink()
    assert not peer("qemu-io", "-r", "-f", "vmdk", "-c", "read -q -P 1 0 1M", chain[1]).stdout


# ---- size

@pytest.mark.plain_build
def test_2000_extents_of_2_tib_stay_within_memory(strata, tmp_path):
    """Each is touched; the limit of open files that shells set is far below."""
    part = 2 * TIB // 2000 // 65536 * 65536 // 512
    one = tmp_path / "one.vmdk"
    subprocess.run([strata, "create", "-q", "-f", "vmdk", one, str(part * 512)], check=True)
    data = bytearray(one.read_bytes())
    data[28:44] = bytes(16)  # no descriptor
    lines = []
    for i in range(2000):
        (tmp_path / f"s{i}").write_bytes(data)
        lines.append(f'RW {part} SPARSE "s{i}"')
    path = tmp_path / "a.vmdk"
    path.write_text(text("\n".join(lines), "twoGbMaxExtentSparse"))
    start = time.monotonic()
    subprocess.run([strata, "info", path], check=True, stdout=subprocess.DEVNULL)
    assert time.monotonic() - start < 1
    script = "".join(f"write -q -P {1 + i % 250} {i * part * 512 + 12345 * 512} 512\n"
                     for i in range(0, 2000, 5))
    # Measured by a small program: what is forked off a large one begins as large.
    code = ("import resource, subprocess, sys\n"
            "subprocess.run(sys.argv[1:], check=True)\n"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    p = subprocess.run([sys.executable, "-c", code, strata, "io", "-t", "unsafe", "-f", "vmdk", path],
                       input=script, text=True, capture_output=True)
    assert not p.returncode and int(p.stdout.split()[-1]) < 64 * KIB, p.stdout + p.stderr
    assert "failed" not in p.stdout
    subprocess.run([strata, "check", "-q", path], check=True)
