# SPDX-License-Identifier: MIT
"""Seeds of the small formats: images of strata, of qemu-img and of the formats' own tools, and programs."""
import base64
import bz2
import lzma
import os
import random
import shutil
import struct
import subprocess
import tempfile
import zlib

WRITES = ["write -P 1 0 3k", "write -P 2 20k 6000", "write -z 8k 2k"]
# What strata makes: (format, options, size, commands of io).
OURS = [
    ("vdi", "block_size=4k", "64k", WRITES),
    ("vdi", "block_size=4k,static=on", "40k", WRITES),
    ("vdi", "", "3M", ["write -P 1 1M 512"]),
    ("qed", "cluster_size=4k,table_size=1", "64k", WRITES),
    ("qed", "cluster_size=4k,table_size=4", "3M", ["write -P 1 0 3k", "write -P 2 2M 8k", "write -z 4k 4k"]),
    ("qed", "cluster_size=4k,table_size=1,backing_file=base,backing_fmt=raw", "64k", WRITES),
    ("qcow", "", "64k", WRITES + ["write -c -P 7 32k 4k"]),
    ("qcow", "backing_file=base,backing_fmt=raw", "64k", WRITES + ["write -c -P 7 32k 512"]),
    ("parallels", "cluster_size=512", "64k", WRITES),
    ("parallels", "cluster_size=4k", "64k", WRITES),
    ("parallels", "", "4M", ["write -P 1 1M 512"]),
    ("vpc", "force_size=on", "3M", WRITES),
    ("vpc", "force_size=on,subformat=fixed", "64k", WRITES),
    ("vhdx", "block_size=1M", "2M", WRITES),
    ("vhdx", "block_size=1M,subformat=fixed,logical_sector_size=4096", "2M", WRITES),
    ("vmdk", "", "64k", WRITES),
    ("vmdk", "zeroed_grain=on", "128k", WRITES),
    ("vmdk", "subformat=streamOptimized", "128k", ["write -P 1 0 64k"]),
]
# What qemu-img makes, where it is there.
PEERS = [
    ("vdi", "", "3M"), ("vdi", "static=on", "1M"), ("qed", "cluster_size=4k,table_size=2", "1M"),
    ("qcow", "", "1M"), ("parallels", "cluster_size=4k", "256k"), ("vpc", "force_size=on", "3M"),
    ("vmdk", "", "1M"),
]
OPS_ROWS = {"vdi": 4, "qed": 3, "qcow": 1, "parallels": 3, "vpc": 2, "vmdk": 2, "vhdx": 2}


def quiet(*command):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def bochs(content, extent=4096):
    """A redolog, as its emulator lays it out."""
    count = len(content) // extent
    head = bytearray(512)
    head[0:22], head[32:39], head[48:55] = b"Bochs Virtual HD Image", b"Redolog", b"Growing"
    struct.pack_into("<IIIIIIQ", head, 64, 0x20000, 512, count, 1, extent, 0, len(content))
    catalog, body, slot = [], b"", 0
    for i in range(count):
        piece = content[i * extent:(i + 1) * extent]
        if not any(piece):
            catalog.append(0xffffffff)
            continue
        bits = sum(1 << s for s in range(extent // 512) if any(piece[s * 512:s * 512 + 512]))
        body += bits.to_bytes(512, "little") + piece
        catalog.append(slot)
        slot += 1
    return bytes(head) + struct.pack("<%dI" % count, *catalog) + body


def cloop(content, block=4096):
    """As create_compressed_fs lays it out."""
    codes = [zlib.compress(content[i:i + block]) for i in range(0, len(content), block)]
    at, offsets = 136 + 8 * (len(codes) + 1), []
    for code in codes + [b""]:
        offsets.append(at)
        at += len(code)
    head = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\nexit $?\n"
    return head.ljust(128, b"\0") + struct.pack(">II", block, len(codes)) + struct.pack(
        ">%dQ" % len(offsets), *offsets) + b"".join(codes)


def dmg(pieces, old=False):
    """UDIF: pieces are (type, sectors, code)."""
    data, entries, sector = b"", b"", 0
    for kind, sectors, code in pieces + [(0xffffffff, 0, b"")]:
        entries += struct.pack(">IIQQQQ", kind, 0, sector, sectors, len(data), len(code))
        data += code
        sector += sectors
    mish = struct.pack(">4sIQQQII", b"mish", 1, 0, sector, 0, 0, 0).ljust(200, b"\0")
    mish += struct.pack(">I", len(pieces) + 1) + entries
    if old:
        meta = struct.pack(">5I", 16, 0, len(mish) + 4, 0, len(mish)) + mish
    else:
        meta = b"<plist><data>\n" + base64.b64encode(mish) + b"</data></plist>"
    koly = bytearray(512)
    struct.pack_into(">4s3I3Q", koly, 0, b"koly", 4, 512, 1, 0, 0, len(data))
    struct.pack_into(">QQ", koly, 40 if old else 216, len(data), len(meta))
    struct.pack_into(">I", koly, 60, 1)
    struct.pack_into(">IQ", koly, 488, 1, sector)
    return data + meta + bytes(koly)


def all_codings():
    text = b"what was said was said again, and then again " * 40
    text = text[:1536]
    lzvn = bytes([0xe5]) + b"abcde" + bytes([0x68, 5, 0x61]) + bytes(
        [0xf0, 200] * 6 + [0xf0, 255] * 2 + [0xf0, 180])
    return [(1, 3, text), (0, 9, b""), (0x80000005, 3, zlib.compress(text)),
            (0x80000006, 3, bz2.compress(text)), (0x80000008, 3, lzma.compress(text)),
            (0x80000004, 1, bytes([0x83]) + b"abcd" + bytes([0x7f, 0, 3] * 7 + [0x63, 0, 3])),
            (0x80000007, 3, b"bvx-" + struct.pack("<I", 1536) + text + b"bvx$"),
            (0x80000007, 4, b"bvxn" + struct.pack("<II", 2048, len(lzvn) + 8) + lzvn
             + b"\6" + bytes(7) + b"bvx$"), (2, 5, b"")]


def old_parallels():
    """The old magic: entries in sectors, the data where the table ends."""
    head = struct.pack("<16sIIIIIIIIIIQ", b"WithoutFreeSpace", 2, 16, 10, 8, 6, 48, 0, 0, 0, 0, 0)
    head += struct.pack("<6I", 0, 1 + 8, 1, 0, 0, 17)
    return head.ljust(512, b"\0") + b"".join(bytes([i]) * 4096 for i in (1, 2, 3))


def old_vdi():
    """Header version 0.1."""
    head = bytearray(420)
    struct.pack_into("<III", head, 64, 0xbeda107f, 1, 1)
    struct.pack_into("<I", head, 348, 512)
    struct.pack_into("<QIII", head, 352, 12288, 4096, 3, 1)
    return bytes(head) + struct.pack("<III", 0xffffffff, 0, 0xfffffffe) + b"\x21" * 4096


def diff_vdi(image):
    """A differencing image, made out of a dynamic one."""
    image = bytearray(image)
    struct.pack_into("<I", image, 76, 4)
    image[424:440] = bytes(range(16))
    return bytes(image)


def hand_made():
    rng = random.Random(5)
    content = bytearray(40 * 1024)
    for at in (0, 3000, 9000, 30000):
        content[at:at + 700] = rng.randbytes(700)
    yield "bochs", "hand", bochs(content)
    yield "bochs", "small", bochs(content[:8192], 512)
    yield "cloop", "hand", cloop(content)
    yield "cloop", "large", cloop(content, 20480)
    yield "dmg", "plist", dmg(all_codings())
    yield "dmg", "fork", dmg(all_codings(), old=True)
    lzfse = os.path.join(os.path.dirname(__file__), "../interop/lzfse")
    for name, size in (("fse", 32768), ("lzvn", 2048)):
        with open(os.path.join(lzfse, name), "rb") as f:
            yield "dmg", name, dmg([(0x80000007, size // 512, f.read())])
    yield "parallels", "old", old_parallels()
    yield "vdi", "old", old_vdi()


def made(strata, tmp):
    path = os.path.join(tmp, "image")
    with open(os.path.join(tmp, "base"), "wb") as f:
        f.write(b"b" * 20480)
    for i, (fmt, options, size, commands) in enumerate(OURS):
        quiet(strata, "create", "-q", "-f", fmt, *(["-o", options] if options else []), path, size)
        tree = '{"driver": "%s", "backing": null, "file": {"driver": "file", "filename": "%s"}}' % (fmt, path)
        name = ["json:" + tree] if "backing" in options else ["-f", fmt, path]
        quiet(strata, "io", *[x for c in commands for x in ("-c", c)], *name)
        with open(path, "rb") as f:
            image = f.read()
        yield fmt, "ours-%d" % i, image
        if fmt == "vdi" and i == 0:
            yield fmt, "differencing", diff_vdi(image)


def peers(tmp):
    path, raw = os.path.join(tmp, "peer"), os.path.join(tmp, "raw")
    if shutil.which("qemu-img") and shutil.which("qemu-io"):
        for i, (fmt, options, size) in enumerate(PEERS):
            more = ["-o", options] if options else []
            quiet("qemu-img", "create", "-q", "-f", fmt, *more, path, size)
            quiet("qemu-io", "-t", "unsafe", "-f", fmt, "-c", "write -P 3 64k 3k", path)
            with open(path, "rb") as f:
                yield fmt, "peer-%d" % i, f.read()
    with open(raw, "wb") as f:
        f.write(b"\0" * 4096 + b"abc" * 5000 + b"\0" * 32768)
    if shutil.which("create_compressed_fs"):
        quiet("create_compressed_fs", "-B", "4096", raw, path)
        with open(path, "rb") as f:
            yield "cloop", "peer", f.read()
    if shutil.which("bximage"):
        with open(raw, "ab") as f:
            f.truncate(16 * 63 * 512)  # one cylinder
        if os.path.exists(path):
            os.unlink(path)
        quiet("bximage", "-func=convert", "-imgmode=growing", "-q", raw, path)
        with open(path, "rb") as f:
            yield "bochs", "peer", f.read()


def image_seeds(strata, sparse, programs, rng):
    """(format, name, input) of the targets FORMAT_image."""
    with tempfile.TemporaryDirectory() as tmp:
        for source in (hand_made(), made(strata, tmp), peers(tmp)):
            for fmt, name, image in source:
                data = sparse(image)
                if len(data) > 64 * 1024:
                    continue
                for i, program in enumerate(programs(rng)):
                    yield fmt, "%s-%d" % (name, i), data + program


def ops_seeds(rng):
    """(format, name, input) of the targets FORMAT_ops."""
    for fmt, rows in OPS_ROWS.items():
        for row in range(rows):
            for flags in (0, 4, 8, 12, 64, 68):
                head = bytes([row, flags]) + struct.pack(">I", rng.randrange(1 << 19))
                yield fmt, "%d-%d" % (row, flags), head + rng.randbytes(rng.randrange(60, 500))
