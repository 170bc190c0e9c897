# SPDX-License-Identifier: MIT
"""VHD: what only it has."""
import json
import random
import struct
import subprocess

import pytest

MIB, GIB = 1 << 20, 1 << 30


def checksum(data, at):
    return ~sum(b for i, b in enumerate(data) if not at <= i < at + 4) & 0xffffffff


def patch(path, base, length, sum_at, at, value, width):
    """Changes a field of a structure at `base` and makes its checksum right."""
    data = bytearray(path.read_bytes())
    part = data[base:base + length]
    struct.pack_into(width, part, at, value)
    struct.pack_into(">I", part, sum_at, checksum(part, sum_at))
    data[base:base + length] = part
    path.write_bytes(data)


def patch_footer(path, at, value, width=">I", base=0):
    patch(path, base, 512, 64, at, value, width)


def patch_header(path, at, value, width=">I"):
    patch(path, 512, 1024, 36, at, value, width)


@pytest.fixture
def image(run, tmp_path):
    path = tmp_path / "a.vhd"
    run("create", "-q", "-f", "vpc", "-o", "force_size=on", path, "10M")
    run("io", "-f", "vpc", "-c", "write -q -P 5 3M 2M", path)
    return path


def size_of(run, path, *args):
    return json.loads(run("info", "--output=json", *args, path).stdout)["virtual-size"]


@pytest.mark.parametrize("size", [
    1, 512, 100 * MIB, GIB, 504 * MIB, 127 * GIB, 128 * GIB, 2040 * GIB,
    *(random.Random(3).randrange(1, 300 * GIB) for _ in range(6))])
def test_sizes_are_rounded_as_qemu_img_rounds_them(run, peer, tmp_path, size):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    run("create", "-q", "-f", "vpc", ours, size)
    peer("qemu-img", "create", "-q", "-f", "vpc", theirs, size)
    assert size_of(run, ours) == size_of(run, theirs) >= size
    a, b = ours.read_bytes(), theirs.read_bytes()
    assert len(a) == len(b)
    # All but time, sums and UUID, in both footers.
    for base in (0, len(a) - 512):
        assert a[base:base + 24] == b[base:base + 24]
        assert a[base + 28:base + 64] == b[base + 28:base + 64]
    assert a[512:1536 + 512] == b[512:1536 + 512]


def test_a_size_above_the_limit_is_refused(run, tmp_path):
    assert "2040 GiB" in run("create", "-f", "vpc", tmp_path / "a", "2041G", status=1).stderr


@pytest.mark.parametrize("creator,by_geometry", [
    (b"vpc ", True), (b"qemu", True), (b"win ", False), (b"d2v ", False), (b"tap\0", False),
    (b"CTXS", False), (b"qem2", False), (b"vbox", False)])
def test_the_maker_decides_which_number_is_the_size(run, peer, image, creator, by_geometry):
    patch_footer(image, 28, creator, "4s")
    patch_footer(image, 56, 300, ">H")
    patch_footer(image, 58, 4, "B")
    patch_footer(image, 59, 17, "B")
    assert size_of(run, image) == (300 * 4 * 17 * 512 if by_geometry else 10 * MIB)
    if creator != b"vbox":  # which Debian's does not know yet
        theirs = json.loads(peer("qemu-img", "info", "--output=json", image).stdout)
        assert theirs["virtual-size"] == size_of(run, image)


def test_the_size_rule_can_be_forced(run, image):
    patch_footer(image, 56, 300, ">H")
    patch_footer(image, 58, 4, "B")
    patch_footer(image, 59, 17, "B")
    tree = {"driver": "vpc", "force_size_calc": "chs", "file": {"filename": str(image)}}
    assert size_of(run, f"json:{json.dumps(tree)}") == 300 * 4 * 17 * 512


def test_a_fixed_image_is_known_by_its_footer(run, tmp_path):
    path = tmp_path / "fixed.vhd"
    run("create", "-q", "-f", "vpc", "-o", "subformat=fixed,force_size=on", path, "3M")
    said = json.loads(run("info", "--output=json", path).stdout)
    assert (said["format"], said["virtual-size"]) == ("vpc", 3 * MIB)


def test_the_azure_profile_makes_a_fixed_image_of_whole_mib(run, peer, tmp_path):
    path = tmp_path / "azure.vhd"
    run("create", "-q", "-f", "vpc", "-o", "profile=azure", path, 3 * MIB + 512)
    assert path.stat().st_size == 4 * MIB + 512
    footer = path.read_bytes()[-512:]
    assert struct.unpack_from(">Q", footer, 48)[0] == 4 * MIB
    assert struct.unpack_from(">I", footer, 60)[0] == 2
    assert "4 MiB" in peer("qemu-img", "info", "-f", "vpc", path).stdout


@pytest.mark.parametrize("at,value,width,words", [
    (12, 0x00020000, ">I", "version 2"),
    (60, 9, ">I", "type 9"),
    (16, 77, ">Q", "header at 77"),
    (16, 1 << 40, ">Q", "does not lie in the file"),
    (48, 1 << 62, ">Q", "disk size 4611686018427387904"),
    (48, 777, ">Q", "disk size 777"),
    (48, 100 * MIB, ">Q", "table of 5 entries"),
])
def test_a_footer_field_out_of_its_range_is_named(run, image, at, value, width, words):
    patch_footer(image, at, value, width)
    assert words in run("info", "-f", "vpc", image, status=1).stderr


@pytest.mark.parametrize("at,value,width,words", [
    (0, b"cxsparsE", "8s", "'cxsparse'"),
    (16, 777, ">Q", "at 777"),
    (16, 1 << 50, ">Q", "behind the end"),
    (28, 4, ">I", "of 4 entries"),
    (28, 0xffffffff, ">I", None),
    (32, 3 * MIB, ">I", "block size 3145728"),
    (32, 512, ">I", "block size 512"),
])
def test_a_header_field_out_of_its_range_is_named(run, image, at, value, width, words):
    patch_header(image, at, value, width)
    p = run("info", "-f", "vpc", image, status=None, timeout=10)
    assert p.returncode == (1 if words else 0)
    assert not words or words in p.stderr


def test_a_wrong_checksum_is_named(run, image):
    data = bytearray(image.read_bytes())
    data[600] ^= 1
    image.write_bytes(data)
    assert "checksum" in run("info", "-f", "vpc", image, status=1).stderr


def test_an_image_without_its_end_footer_opens_and_the_next_write_puts_it_back(run, peer, image):
    whole = image.read_bytes()
    image.write_bytes(whole[:-512])
    run("check", image, status=3)
    run("io", "-c", "read -q -P 5 3M 2M", "-c", "write -q -P 6 8M 1M", image)
    run("check", image)
    assert image.read_bytes()[-512:] == whole[-512:]
    peer("qemu-io", "-f", "vpc", "-c", "read -q -P 6 8M 1M", image)


def test_an_image_whose_front_copy_is_gone_opens_by_its_footer(run, image):
    data = bytearray(image.read_bytes())
    data[:8] = bytes(8)
    image.write_bytes(data)
    run("io", "-r", "-f", "vpc", "-c", "read -q -P 5 3M 2M", image)


def test_overlapping_and_lost_blocks_are_found(run, image):
    data = bytearray(image.read_bytes())
    entries = struct.unpack_from(">5I", data, 1536)
    used = min(e for e in entries if e != 0xffffffff)
    for value, words in [(used + 1, "overlaps"), (0x7fffffff, "does not hold"), (1, "overlaps")]:
        damaged = bytearray(data)
        struct.pack_into(">I", damaged, 1536, value)
        image.write_bytes(damaged)
        p = run("check", image, status=2)
        assert words in p.stdout + p.stderr


def test_clear_bits_of_a_dynamic_image_read_as_zeros_and_are_set_by_a_write(run, image):
    data = bytearray(image.read_bytes())
    block = struct.unpack_from(">5I", data, 1536)[2] * 512  # guest 4 MiB to 6 MiB
    data[block:block + 512] = bytes(512)
    data[block] = 0x80  # the first sector only
    image.write_bytes(data)
    run("io", "-c", "read -q -P 5 4M 512", "-c", f"read -q -P 0 {4 * MIB + 512} 4096", "-c",
        f"write -q -P 9 {4 * MIB + 2048} 100", "-c", "read -q -P 5 4M 512", "-c",
        f"read -q -P 9 {4 * MIB + 2048} 100", "-c", f"read -q -P 0 {4 * MIB + 2148} 900k", image)
    # Another reader, which ignores the bits, sees the same.
    assert image.read_bytes()[block:block + 512] == b"\xff" * 512


@pytest.mark.parametrize("options", ["force_size=on", "subformat=fixed,force_size=on"])
def test_an_image_grows(run, peer, tmp_path, options):
    path = tmp_path / "a.vhd"
    run("create", "-q", "-f", "vpc", "-o", options, path, "10M")
    run("io", "-f", "vpc", "-c", "write -q -P 5 3M 7M", path)
    run("resize", "-q", "-f", "vpc", path, "30G" if "fixed" not in options else "30M")
    run("check", "-f", "vpc", path)
    script = ["read -q -P 5 3M 7M", "read -q -P 0 10M 20M"]
    run("io", "-f", "vpc", "-c", script[0], "-c", script[1], "-c", "write -q -P 8 29M 1M", path)
    peer("qemu-io", "-f", "vpc", "-c", script[0], "-c", "read -q -P 0 10M 19M", "-c",
         "read -q -P 8 29M 1M", path)
    assert "cannot shrink" in run("resize", "--shrink", "-f", "vpc", path, "1M", status=1).stderr


# ---------------------------------------------------------------- differencing

def make_child(parent, child, name, locator=True):
    """A differencing image over `parent`, as the specification says; block size 2 MiB."""
    footer = bytearray(parent.read_bytes()[:512])
    parent_uuid = bytes(footer[68:84])
    struct.pack_into(">I", footer, 60, 4)
    footer[68:84] = bytes(range(16))
    struct.pack_into(">I", footer, 64, checksum(footer, 64))
    blocks = -(-struct.unpack_from(">Q", footer, 48)[0] // (2 * MIB))
    header = bytearray(1024)
    header[:16] = b"cxsparse" + b"\xff" * 8
    struct.pack_into(">QIII", header, 16, 2048, 0x10000, blocks, 2 * MIB)
    header[40:56] = parent_uuid
    header[64:64 + 2 * len(name)] = name.encode("utf-16-be")
    path = (".\\" + name).encode("utf-16-le")
    if locator:
        struct.pack_into(">4sIIIQ", header, 576, b"W2ru", 512, len(path), 0, 1536)
    struct.pack_into(">I", header, 36, checksum(header, 36))
    bat = b"\xff" * 512
    child.write_bytes(footer + header + path.ljust(512, b"\0") + bat + footer)


@pytest.mark.parametrize("locator", [True, False])
def test_a_differencing_image_finds_its_parent_beside_it(run, image, tmp_path, locator):
    child = tmp_path / "child.vhd"
    make_child(image, child, "a.vhd", locator)
    run("io", "-c", "read -q -P 5 3M 2M", "-c", "read -q -P 0 0 3M", "-c",
        f"write -q -P 7 {4 * MIB + 100} 1000", "-c", f"read -q -P 7 {4 * MIB + 100} 1000", "-c",
        "read -q -P 5 4M 100", "-c", f"read -q -P 5 {4 * MIB + 1100} 800k", "-c",
        "write -q -z 3M 64k", "-c", "read -q -P 0 3M 64k", "-c", f"read -q -P 5 {3 * MIB + 65536} 64k",
        child)
    run("check", child)
    run("io", "-r", "-c", f"read -q -P 7 {4 * MIB + 100} 1000", "-c", "read -q -P 5 4M 100", child)


def test_a_differencing_image_is_read_by_libvhdi_as_by_us(run, peer, image, tmp_path):
    child, raw = tmp_path / "child.vhd", tmp_path / "child.raw"
    make_child(image, child, "a.vhd")
    run("io", "-c", "write -q -P 7 1000000 70000", "-c", "write -q -P 8 4400000 100000", child)
    assert "Differential" in peer("vhdiinfo", child).stdout
    run("convert", "-q", "-O", "raw", child, raw)
    content = raw.read_bytes()
    assert content[1000000:1070000] == b"\x07" * 70000
    assert content[4400000:4500000] == b"\x08" * 100000
    assert content[3 * MIB:4400000] == b"\x05" * (4400000 - 3 * MIB)


def test_a_parent_outside_the_gate_is_refused(run, image, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    child = folder / "child.vhd"
    make_child(image, child, "..\\a.vhd")
    assert "a.vhd" in run("io", "-r", "-c", "read 0 1k", child, status=1).stderr
    run("io", "-r", "--trust", "local", "-c", "read -q -P 5 3M 1M", child)


def test_a_parent_with_another_uuid_is_refused(run, image, tmp_path):
    child = tmp_path / "child.vhd"
    make_child(image, child, "a.vhd")
    patch_footer(image, 68, b"0123456789abcdef", "16s")
    assert "the parent is" in run("io", "-r", "-c", "read 0 1k", child, status=1).stderr


def test_random_writes_to_a_differencing_image_agree_with_the_model(run, strata, image, tmp_path,
                                                                     seed):
    from model import Model, turn
    child, raw = tmp_path / "child.vhd", tmp_path / "model.raw"
    make_child(image, child, "a.vhd")
    before = image.read_bytes()
    model = Model(10 * MIB, 512, seed, bytes(3 * MIB) + b"\x05" * 2 * MIB)
    for _ in range(2):
        turn([strata, "io"], child, model, 500, "vpc")
        raw.write_bytes(model.bytes)
        run("compare", "-f", "raw", "-F", "vpc", raw, child)
        run("check", child)
    assert image.read_bytes() == before


# ---------------------------------------------------------------- other peers

def test_what_bximage_writes_is_read(run, peer, tmp_path):
    raw, vhd = tmp_path / "a.raw", tmp_path / "a.vhd"
    content = random.Random(5).randbytes(3 * MIB) + bytes(5 * MIB) + b"end".ljust(MIB, b".")
    raw.write_bytes(content.ljust(10321920, b"\0"))
    peer("bximage", "-func=convert", "-imgmode=vpc", "-q", raw, vhd)
    run("compare", "-f", "raw", "-F", "vpc", raw, vhd)


def test_libvhdi_reads_what_strata_writes(peer, image):
    said = peer("vhdiinfo", image).stdout
    assert "Dynamic" in said and "10 MiB" in said


def test_7zip_reads_what_strata_writes(image, run, tmp_path):
    raw = tmp_path / "a.raw"
    run("convert", "-q", "-O", "raw", image, raw)
    out = subprocess.run(["7zz", "x", "-so", "-tvhd", image], capture_output=True, check=True)
    assert out.stdout == raw.read_bytes()


@pytest.mark.parametrize("name", ["p.vhd", "sub/p\u00e4r.vhd", None])
def test_a_new_differencing_image_names_its_parent(run, peer, tmp_path, name):
    """None: by its absolute path."""
    (tmp_path / "sub").mkdir()
    parent, child = tmp_path / (name or "p.vhd"), tmp_path / "c.vhd"
    run("create", "-q", "-f", "vpc", parent, "20M")
    run("io", "-c", "write -q -P 5 3M 2M", parent)
    run("create", "-q", "-f", "vpc", "-b", name or parent, "-F", "vpc", child, cwd=tmp_path)
    before = parent.read_bytes()
    run("io", "-c", "write -q -P 6 4M 3k", "-c", "write -q -z 3M 64k", child)
    run("io", "-r", "-c", "read -q -P 0 0 3136k", "-c", "read -q -P 5 3136k 960k", "-c", "read -q -P 6 4M 3k", "-c",
        "read -q -P 5 4099k 1021k", "-c", "read -q -P 0 5M 1M", child)
    run("check", child)
    assert parent.read_bytes() == before
    said = peer("vhdiinfo", child).stdout
    assert "Differential" in said and parent.name in said
    uuid = json.loads(run("info", "--output=json", parent).stdout)["format-specific"]["data"]["uuid"]
    assert uuid in said


def test_a_differencing_image_has_the_size_of_its_parent(run, tmp_path):
    run("create", "-q", "-f", "vpc", tmp_path / "p.vhd", "20M")
    for args, words in [(["30M"], "has the size of its parent"), (["-o", "subformat=fixed"], "is not fixed")]:
        p = run("create", "-q", "-f", "vpc", "-b", "p.vhd", "-F", "vpc", *args[:-1],
                *([args[-1]] if args[0] == "-o" else []), tmp_path / "c.vhd", *([] if args[0] == "-o" else args), status=1)
        assert words in p.stderr
    run("create", "-q", "-f", "raw", tmp_path / "r", "20M")
    assert "not 'raw'" in run("create", "-q", "-f", "vpc", "-b", "r", "-F", "raw", tmp_path / "c.vhd", status=1).stderr


def test_a_commit_empties_a_differencing_image(run, image, tmp_path):
    child = tmp_path / "child.vhd"
    run("create", "-q", "-f", "vpc", "-b", image.name, "-F", "vpc", child)
    run("io", "-c", "write -q -P 7 4M 700", "-c", "write -q -P 8 9M 1M", "-c", "write -q -z 3M 64k", child)
    size = child.stat().st_size
    run("commit", "-q", child)
    script = ["-c", "read -q -P 7 4M 700", "-c", "read -q -P 5 4097k 1023k", "-c", "read -q -P 8 9M 1M",
              "-c", "read -q -P 0 3M 64k", "-c", "read -q -P 5 3200k 512k"]
    for path in image, child:
        run("io", "-r", *script, path)
        run("check", path)
    assert child.stat().st_size < min(size, 64 * 1024)
    assert child.read_bytes()[-512:] == child.read_bytes()[:512]
    assert '"depth": 0' not in run("map", "--output=json", child).stdout
    run("io", "-c", "write -q -P 3 3M 1k", child)
    run("commit", "-q", child)
    run("io", "-r", "-c", "read -q -P 3 3M 1k", "-c", "read -q -P 7 4M 700", image)
