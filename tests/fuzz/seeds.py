#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Seeds of the fuzz targets: seeds.py STRATA FOLDER writes FOLDER/TARGET/*.

Images are made by strata itself, written in the sparse form of fuzz.h, with a program behind them.
Everything is the same in each run.
"""
import itertools
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile

import seeds_formats

SECTOR = 512


def sparse(image):
    """The sparse form: what is not zero, in records."""
    out = [b"SPR1", struct.pack(">I", (len(image) + SECTOR - 1) // SECTOR)]
    i = 0
    while i < len(image):
        block = image[i:i + SECTOR]
        if any(block):
            block = block.rstrip(b"\0")
            block += bytes(-len(block) % 8)
            out.append(struct.pack(">IH", i // SECTOR, len(block)) + block)
        i += SECTOR
    return b"".join(out)


IMAGES = {
    "c512": ("cluster_size=512", "64k", ["write -P 1 0 3k", "write -P 2 20k 600", "write -z 8k 2k"]),
    "c512-v2": ("cluster_size=512,compat=0.10", "64k", ["write -P 1 1k 1k", "write -P 9 60k 4k"]),
    "c512-r1": ("cluster_size=512,refcount_bits=1", "32k", ["write -P 1 0 2k", "discard 0 512"]),
    "c512-r64": ("cluster_size=512,refcount_bits=64", "32k", ["write -P 1 0 2k"]),
    "c1k-coded": ("cluster_size=1k", "64k", ["write -c -P 7 0 8k", "write -P 1 2k 1k"]),
    "c1k-zstd": ("cluster_size=1k,compression_type=zstd", "64k", ["write -c -P 7 0 8k"]),
    "c4k-lazy": ("cluster_size=4k,lazy_refcounts=on", "1M", ["write -P 3 4k 4k"]),
    "c64k": ("cluster_size=64k", "1G", ["write -P 4 0 8", "write -z 1M 128k"]),
    "c64k-r8": ("cluster_size=64k,refcount_bits=8", "100M", ["write -c -P 4 0 64k"]),
    "c2m": ("cluster_size=2M", "1T", []),
    "c16k-extended": ("cluster_size=16k,extended_l2=on", "1M", [
        "write -P 1 0 20k", "write -z 2k 1k", "discard 4k 512", "write -c -P 7 32k 16k", "write -P 2 33k 1k"]),
    "c64k-extended": ("extended_l2=on,refcount_bits=8", "4M", ["write -P 3 1M 3k", "write -z 64k 2k"]),
    "c16k-extended-room": ("cluster_size=16k,extended_l2=on,preallocation=metadata", "256k", [
        "write -P 1 3k 1k"]),
    # Their data file is not there when they are read: what is looked at is header and tables.
    "c4k-data": ("cluster_size=4k,data_file=data", "256k", ["write -P 1 4k 8k", "write -z 8k 4k"]),
    "c4k-data-raw": ("cluster_size=4k,data_file=data,data_file_raw=on", "256k", ["write -P 1 4k 8k"]),
    "c16k-data-extended": ("cluster_size=16k,data_file=data,extended_l2=on", "256k", ["write -P 1 512 9k"]),
    "empty": ("cluster_size=512", "0", []),
    "c16k-sub": ("cluster_size=16k,extended_l2=on", "256k",
                 ["write -P 1 0 3k", "write -P 2 20k 600", "write -z 33k 2k", "write -c -P 7 64k 16k"]),
    "backing": ("cluster_size=512,backing_file=base.raw,backing_fmt=raw", "32k", ["write -P 1 0 3k"]),
}

# More verbs on images made as above: (options, size, commands); {} is the image.
VERB_IMAGES = {
    "snapshots": ("cluster_size=512", "32k", [
        ["io", "-f", "qcow2", "-c", "write -P 1 0 2k", "{}"], ["snapshot", "-c", "one", "{}"],
        ["io", "-f", "qcow2", "-c", "write -P 2 1k 2k", "{}"], ["snapshot", "-c", "two", "{}"]]),
    "snapshot-sub": ("cluster_size=16k,extended_l2=on", "64k", [
        ["io", "-f", "qcow2", "-c", "write -P 1 0 2k", "{}"], ["snapshot", "-c", "one", "{}"],
        ["io", "-f", "qcow2", "-c", "write -P 1 1k 2k", "{}"]]),
    "bitmaps": ("cluster_size=512", "32k", [
        ["bitmap", "--add", "-g", "512", "{}", "b"], ["io", "-f", "qcow2", "-c", "write -P 1 0 2k", "{}"],
        ["bitmap", "--add", "-g", "4k", "{}", "c"], ["bitmap", "--disable", "{}", "c"]]),
    "narrow": ("cluster_size=512", "32k", [
        ["io", "-f", "qcow2", "-c", "write -P 1 0 2k", "{}"], ["amend", "-o", "refcount_bits=2", "{}"]]),
}


def luks(image):
    """A version 3 image that says it is encrypted, with the pointer to a LUKS header behind its end."""
    at, = struct.unpack(">I", image[100:104])
    cluster = 1 << struct.unpack(">I", image[20:24])[0]
    image = bytearray(image) + bytes(-len(image) % cluster)
    pointer = struct.pack(">IIQQ", 0x0537be77, 16, len(image), cluster)
    image[at:cluster] = (pointer + image[at:cluster])[:cluster - at]
    image[32:36] = struct.pack(">I", 2)
    return bytes(image) + (b"LUKS\xba\xbe\0\1aes".ljust(40, b"\0") + b"xts-plain64").ljust(cluster, b"\0")


# What strata itself cannot make yet; left out where there is no qemu-img.
PEER_IMAGES = {
    "snapshot": ("cluster_size=512", "32k", [
        ["qemu-io", "-c", "write -P 1 0 2k"], ["qemu-img", "snapshot", "-c", "one"],
        ["qemu-io", "-c", "write -P 2 1k 2k"], ["qemu-img", "snapshot", "-c", "two"]]),
    "snapshot-c4k": ("cluster_size=4k,refcount_bits=2", "256k", [
        ["qemu-io", "-c", "write -P 1 0 8k"], ["qemu-img", "snapshot", "-c", "one"]]),
    "bitmap": ("cluster_size=512", "32k", [
        ["qemu-img", "bitmap", "--add", "-g", "512", "{}", "b"], ["qemu-io", "-c", "write 0 2k"]]),
    "sub": ("cluster_size=16k,extended_l2=on", "128k", [["qemu-io", "-c", "write -P 1 0 2k", "-c", "write -z 3k 1k"]]),
    "data-file": ("cluster_size=512,data_file=data.raw", "32k", [["qemu-io", "-c", "write -P 1 0 2k"]]),
    "data-file-raw": ("cluster_size=4k,data_file=data.raw,data_file_raw=on", "32k", []),
}


def programs(rng):
    yield b""
    for _ in range(2):
        yield b"PRG1" + bytes(rng.randrange(256) for _ in range(rng.randrange(20, 120)))


def make_images(strata, rng):
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "a.qcow2")
        with open(os.path.join(tmp, "base.raw"), "wb") as f:
            f.write(b"b" * 20000)
        for name, (options, size, commands) in IMAGES.items():
            subprocess.run([strata, "create", "-q", "-f", "qcow2", "-o", options, path, size],
                           check=True)
            if commands:
                args = [x for c in commands for x in ("-c", c)]
                subprocess.run([strata, "io", "-f", "qcow2", *args, path], check=True,
                               stdout=subprocess.DEVNULL)
            with open(path, "rb") as f:
                data = sparse(f.read())
            for i, program in enumerate(programs(rng)):
                yield f"{name}-{i}", data + program


def make_verb_images(strata, rng):
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "a.qcow2")
        for name, (options, size, commands) in VERB_IMAGES.items():
            subprocess.run([strata, "create", "-q", "-f", "qcow2", "-o", options, path, size], check=True)
            for args in commands:
                subprocess.run([strata] + [a.format(path) if a == "{}" else a for a in args], check=True,
                               stdout=subprocess.DEVNULL)
            with open(path, "rb") as f:
                data = f.read()
            for i, program in enumerate(programs(rng)):
                yield f"{name}-{i}", sparse(data) + program
        subprocess.run([strata, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "64k"], check=True)
        with open(path, "rb") as f:
            yield "luks-0", sparse(luks(f.read()))


def make_peer_images(rng):
    if not shutil.which("qemu-img") or not shutil.which("qemu-io"):
        return
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "a.qcow2")
        for name, (options, size, commands) in PEER_IMAGES.items():
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o",
                            options.replace("data.raw", os.path.join(tmp, "data.raw")), path, size], check=True)
            for args in commands:
                where = [a.format(path) for a in args] + ([] if "{}" in args else [path])
                subprocess.run(where, check=True, stdout=subprocess.DEVNULL)
            with open(path, "rb") as f:
                data = sparse(f.read())
            for i, program in enumerate(programs(rng)):
                yield f"peer-{name}-{i}", data + program


def make_ops(rng):
    for bits in range(8):
        for flags in (0, 1, 2, 4, 8, 16, 36, 64 + 4, 8 + 4) + ((128, 132, 148, 192) if bits > 4 else ()):
            order = b"" if flags & 1 else bytes([rng.randrange(7)])
            head = bytes([bits, flags]) + order + struct.pack(">I", rng.randrange(1 << 19))
            yield f"{bits}-{flags}", head + rng.randbytes(rng.randrange(50, 500))


def make_tasks(rng):
    for bits in range(6):
        for flags in (0, 1, 2, 4, 8, 16, 6, 18, 20, 24, 28):
            yield f"{bits}-{flags}", bytes([bits, flags, 4, 60]) + rng.randbytes(rng.randrange(60, 400))


def option(number, data=b""):
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def name(text):
    return struct.pack(">I", len(text)) + text


def request(kind, offset=0, length=0, flags=0, payload=b""):
    return b"Rq" + struct.pack(">HHQQI", flags, kind, 0x1122, offset, length) + payload


def make_nbd(rng):
    flags = struct.pack(">I", 3)
    info = name(b"x") + struct.pack(">HHH", 2, 3, 1)
    meta = name(b"") + struct.pack(">I", 2) + name(b"base:allocation") + name(b"base:")
    yield "export-name", b"\0" + flags + option(1, b"x") + request(0, 0, 512) + request(2)
    yield "oldflags", b"\0" + struct.pack(">I", 0) + option(1) + request(0, 0, 512) + request(2)
    yield "list", b"\0" + flags + option(3) + option(6, info) + option(2)
    yield "meta", b"\0" + flags + option(8) + option(9, meta) + option(10, meta) + option(7, info)
    yield "flood", b"\0" + flags + option(99, b"y" * 40) * 20 + option(5) + option(11) + option(7)
    everything = (request(1, 0, 1024, 1, b"A" * 1024) + request(0, 0, 2048) + request(0, 512, 512, 4)
                  + request(3) + request(4, 0, 4096) + request(5, 0, 4096)
                  + request(6, 4096, 8192, 2) + request(6, 0, 100, 16)
                  + request(7, 0, 262144) + request(7, 0, 65536, 8) + request(1, 5, 3, 0, b"xyz")
                  + request(0, 262144, 1) + request(0, 1 << 63, 512) + request(0, 0, 1 << 31)
                  + request(0, 100, 0) + request(77) + request(2))
    for mode in (1, 3, 5, 9, 13, 17, 21, 53, 129, 181):
        yield f"all-{mode}", bytes([mode]) + everything

    def extended(kind, offset=0, length=0, flags=0, payload=b""):
        return b"Re" + struct.pack(">HHQQQ", flags, kind, 0x1122, offset, length) + payload

    wide = (extended(1, 0, 1024, 33, b"A" * 1024) + extended(0, 0, 2048) + extended(0, 0, 131072)
            + extended(3) + extended(4, 0, 1 << 40) + extended(6, 0, 262144) + extended(7, 0, 262144)
            + extended(7, 0, 12, 32, struct.pack(">QI", 4096, 1)) + extended(7, 0, 8, 32, b"x" * 8)
            + extended(0, 0, 100, 32, b"y" * 100) + extended(5, 0, 262144) + extended(77)
            + extended(0, 1 << 63, 1 << 63) + extended(1, 0, 4) + extended(2))
    for mode in (65, 67, 69, 85, 117, 193):
        yield f"wide-{mode}", bytes([mode]) + wide
    yield "tls", b"\x40" + flags + option(3) + option(7, info) + option(5) + b"\x16\3\1\0\5hello"
    yield "tls-plain", b"\x40" + flags + option(5) + option(3) + option(1)
    yield "names", b"\0" + flags + option(11) + option(8) + option(10, name(b"y") + struct.pack(">I", 1)
                                                                  + name(b"qemu:")) + option(7, info)
    yield "bad-magic", b"\1" + request(0, 0, 512) + b"x" * 28 + request(0, 0, 512)
    yield "cut", b"\1" + request(1, 0, 4096, 0, b"Z" * 100)
    yield "large", b"\1" + request(0, 0, 262144) * 30 + request(2)
    yield "writes", b"\5" + b"".join(
        request(1, rng.randrange(262144 - 600), 512, 0, b"w" * 512) for _ in range(12)) + request(2)


def vhost_chain(sector, kind, packed, indirect=False, length=512, turn=0, head=0):
    """Records of memory: one request of a header, data and a status, in a ring of eight at its beginning; the first or
    (turn 1) second one there."""
    guest, write = 0x10000, kind == 1
    parts = [(0x4000, 16, 0), (0x5000, length, 0 if write else 2), (0x4100, 1, 2)]
    if kind in (4, 99):
        del parts[1]
    out = []

    def put(at, data):
        for i in range(0, len(data), 255):
            out.append(struct.pack(">HB", at + i, len(data[i:i + 255])) + data[i:i + 255])

    put(0x4000, struct.pack("<IIQ", kind, 0, sector))
    if write:
        put(0x5000, b"w" * 512)
    if kind in (11, 13):
        put(0x5000, struct.pack("<QII", sector, 8, 0))
        parts[1] = (0x5000, 16, 0)
    table = b""
    for i, (at, n, flags) in enumerate(parts):
        more = i + 1 < len(parts)
        if packed:
            table += struct.pack("<QIHH", guest + at, n, 0, flags | (0 if indirect else 0x80 | more))
        else:
            table += struct.pack("<QIHH", guest + at, n, flags | more, i + 1 if more else 0)
    if indirect:
        put(0x6000, table)
        table = struct.pack("<QIHH", guest + 0x6000, len(table), *((0, 0x84) if packed else (4, 0)))
    put(16 * 3 * turn if packed else 0, table)
    if not packed:
        put(0x1000, struct.pack("<HHHH", 0, 1 + turn, head, head))
    return b"".join(out)


def vhost_message(kind, payload=b"", fds=0, which=0, ask=1):
    return bytes([kind, ask | which << 2 | fds << 4, len(payload)]) + payload


def make_vhost(rng):
    kick, patch, shrink = b"\xff", b"\xfe", b"\xfd"
    region = struct.pack("<QQQQ", 0x10000, 65536, 0x200000, 0)
    other = struct.pack("<QQQQQ", 0, 0x80000, 4096, 0x900000, 4096)
    for mode in (1, 3, 5, 9, 13, 21, 53, 129, 137, 65, 69, 73, 85, 193, 213):
        packed = bool(mode & 64)
        for kind in (0, 1, 4, 8, 11, 13, 99):
            memory = vhost_chain(8, kind, packed, kind == 8, 20 if kind == 8 else 512)
            yield f"ring-{mode}-{kind}", bytes([mode]) + kick + b"MEM1" + memory
    base = vhost_message(11, struct.pack("<II", 0, 0))
    back = (vhost_message(10, struct.pack("<II", 0, 0)) + vhost_message(13, struct.pack("<Q", 0), 2, 1)
            + vhost_message(12, struct.pack("<Q", 0), 1, 1))
    table = vhost_message(5, struct.pack("<II", 1, 0) + region, 1)
    flight = vhost_message(31, struct.pack("<QQHHI", 0, 0, 1, 8, 0))
    ours = vhost_message(32, struct.pack("<QQHHI", 4096, 0, 1, 8, 0), 1, 2)
    for mode in (1, 9, 129, 65, 73):
        head = bytes([mode])
        memory = (b"MEM1" + vhost_chain(8, 1, mode > 64 and mode < 128) + b"\0\0\0"
                  + vhost_chain(8, 0, mode > 64 and mode < 128, turn=1))
        yield f"again-{mode}", head + kick + flight + patch + kick + memory
        yield f"stop-{mode}", head + kick + base + back + kick + base + memory
        yield f"tables-{mode}", head + kick + table + kick + table + patch + kick + memory
        yield f"flight-{mode}", head + flight + base + back + kick + flight + kick + ours + patch + kick + memory
        yield f"shrink-{mode}", head + kick + patch + shrink + kick + base + memory
        yield f"slots-{mode}", (head + vhost_message(37, other, 1) + vhost_message(38, other) + vhost_message(38, other)
                                + kick + memory)
        yield f"reset-{mode}", head + kick + vhost_message(34) + vhost_message(4) + kick + memory
        yield f"kicks-{mode}", (head + vhost_message(12, struct.pack("<Q", 0), 1, 3)
                                + vhost_message(12, struct.pack("<Q", 0x100)) + memory)
    yield "head", b"\x09" + kick + b"MEM1" + vhost_chain(8, 1, False, head=0xfff0)
    for i, inflight in enumerate([(1, 8, 0xffff, 5), (1, 8, 7, 1), (1, 7, 0, 0), (1, 8, 0, 0, 0, 0, 0, 0, 1)]):
        backwards = struct.pack(f"<{len(inflight)}H", *inflight)[::-1]
        yield f"inflight-{i}", (b"\x09" + kick + b"MEM1" + vhost_chain(8, 1, False)
                                + struct.pack(">HB", 0x7000, len(backwards)) + backwards)
    asks = b"".join(vhost_message(k, b"", 0, 0, 0) for k in (1, 15, 17, 36, 3))
    config = vhost_message(24, struct.pack("<III", 0, 60, 0) + bytes(60)) + vhost_message(25, struct.pack("<IIIB", 32, 1, 0, 1))
    yield "asks", b"\0" + asks + config + vhost_message(99)
    yield "descriptors", b"\0" + b"".join(vhost_message(k, bytes(8), n, w) for k in (1, 5, 12, 14, 32)
                                          for n, w in ((1, 0), (9, 1), (15, 3)))
    yield "cut", b"\0\xfc\x0d" + vhost_message(5, struct.pack("<II", 1, 0) + region, 8)


def make_options():
    texts = {
        0: ["size=1G,cluster_size=64k", "a.b.c=1,a.b.d=2", "x=,,y,z", "preallocation=full,size=0x10",
            "backing_file=a,,b,backing_fmt=raw,compat=0.10", "encrypt.format=luks,a"],
        1: ["qcow2,file.driver=memory", "raw,size=1M,offset=512", "x"],
        2: ['{"size": 65536, "cluster_size": "64k", "lazy_refcounts": true}', '{"a.b": 1, "a": {"c": 2}}',
            '{"driver":"qcow2","file.driver":"memory"}', "[" * 70, '{"a": [1.5, null, "x\\u0000"]}'],
        3: ["64k", "1.5G", "0x1000", "8E", "7.999999999999E", "10b", "1..5", "0.1k"],
        4: ["plain", "\x1b[31m", "\x9b31m", "\u00e9\u0085"],
        5: ["dir/a.qcow2|b", "json:{}|b", "nbd:x|b", "a|/x", "a|json:{}", "|x"],
        6: ['{"driver":"raw","fil":{"driver":"memory","size":"1M"}}', '{"driver":"memory","size":65536}',
            '{"driver":"null-co","read-zeroes":"on","cache":{"direct":true}}'],
    }
    for kind, some in texts.items():
        for i, text in enumerate(some):
            yield f"{kind}-{i}", bytes([kind]) + text.encode("latin-1")


def main():
    strata, folder = sys.argv[1:]
    rng = random.Random(1)
    shutil.rmtree(folder, ignore_errors=True)
    images = itertools.chain(make_images(strata, rng), make_verb_images(strata, rng), make_peer_images(rng))
    targets = {"qcow2_image": images, "qcow2_ops": make_ops(rng),
               "qcow2_tasks": make_tasks(rng),
               "nbd_session": make_nbd(rng), "vhost_session": make_vhost(random.Random(2)), "options": make_options()}
    for kind, some in (("image", seeds_formats.image_seeds(strata, sparse, programs, rng)),
                       ("ops", seeds_formats.ops_seeds(rng))):
        for fmt, seed, data in some:
            targets.setdefault(f"{fmt}_{kind}", []).append((seed, data))
    for target, seeds in targets.items():
        os.makedirs(os.path.join(folder, target))
        for seed, data in seeds:
            with open(os.path.join(folder, target, seed), "wb") as f:
                f.write(data)


main()
