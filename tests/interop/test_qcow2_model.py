# SPDX-License-Identifier: MIT
"""qcow2, written to at random by strata and by qemu-io in turns, against a plain array.

After each turn the image is checked by both programs and compared with the array by both.  The
seed is printed; STRATA_SEED chooses it, STRATA_OPS the operations a turn (four turns a shape).
"""
import os
import random
import subprocess
import time

import pytest

TURNS = 4
OPS = int(os.environ.get("STRATA_OPS", "2500"))
PEER_OPS = OPS // 5
KIB, MIB = 1 << 10, 1 << 20

SHAPES = {
    "512": (2 * MIB + 512, "cluster_size=512"),
    "4k": (8 * MIB, "cluster_size=4k"),
    "64k": (24 * MIB + 1536, "cluster_size=64k"),
    "2M": (48 * MIB, "cluster_size=2M"),
    "512-bits1": (2 * MIB, "cluster_size=512,refcount_bits=1"),
    "4k-bits8": (8 * MIB, "cluster_size=4k,refcount_bits=8"),
    "512-bits64": (6 * MIB, "cluster_size=512,refcount_bits=64"),
    "64k-zstd": (24 * MIB, "cluster_size=64k,compression_type=zstd"),
    "64k-v2": (24 * MIB, "cluster_size=64k,compat=0.10"),
}


class Model:
    """Random commands of qemu-io's language, and what the disk holds after them."""

    def __init__(self, size, cluster, seed, content=b""):
        self.rng = random.Random(seed)
        self.size, self.cluster = size, cluster
        self.bytes = bytearray(content[:size].ljust(size, b"\0"))

    def span(self, align):
        offset = self.rng.randrange(0, self.size // align) * align
        longest = self.rng.choice([1, 8, 64, 600]) * KIB
        length = self.rng.randrange(1, max(2, longest // align)) * align
        return offset, min(length, (self.size - offset) // align * align)

    def command(self, coded):
        kind = self.rng.choices(["write", "coded", "zero", "unmap", "discard", "read", "flush"],
                                [40, 12 if coded else 0, 10, 10, 8, 15, 2])[0]
        if kind == "flush":
            return "flush"
        if kind == "coded":
            offset = self.rng.randrange(0, self.size // self.cluster) * self.cluster
            length = min(self.cluster, self.size - offset)
            return self.fill(offset, length, f"write -q -c -P %d {offset} {length}")
        offset, length = self.span(self.cluster if kind == "discard" else 512)
        if not length:
            return "flush"
        if kind == "write":
            return self.fill(offset, length, f"write -q -P %d {offset} {length}")
        if kind == "read":
            same = self.bytes[offset]
            end = offset
            while end < offset + length and self.bytes[end] == same:
                end += 1
            return f"read -q -P {same} {offset} {end - offset}"
        self.bytes[offset:offset + length] = bytes(length)
        if kind == "discard":  # afterwards old or zeros: zeros again make it certain
            return f"discard -q {offset} {length}\nwrite -q -z {offset} {length}"
        return f"write -q -z{' -u' if kind == 'unmap' else ''} {offset} {length}"

    def fill(self, offset, length, text):
        value = self.rng.randrange(1, 256)
        self.bytes[offset:offset + length] = bytes([value]) * length
        return text % value


def turn(program, image, model, ops):
    coded = program[0] != "qemu-io"  # it writes coded clusters only where nothing was before
    script = "\n".join(model.command(coded) for _ in range(ops)) + "\n"
    cache = [] if coded else ["-t", "unsafe"]
    p = subprocess.run([*program, *cache, "-f", "qcow2", image], input=script, capture_output=True,
                       text=True, timeout=300)
    said = p.stdout.replace("qemu-io> ", "").strip()
    assert not said and not p.stderr and p.returncode == 0, (said[:2000], p.stderr[:2000])


def verdict(run, peer, image, model, tmp_path):
    raw = tmp_path / "model.raw"
    raw.write_bytes(model.bytes)
    p = peer("qemu-img", "check", "-f", "qcow2", image, status=None)
    assert p.returncode == 0, p.stdout + p.stderr
    run("check", "-f", "qcow2", image)
    peer("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, image)
    run("compare", "-f", "raw", "-F", "qcow2", raw, image)


def play(run, peer, strata, tmp_path, image, model):
    for _ in range(TURNS):
        turn([strata, "io"], image, model, OPS)
        verdict(run, peer, image, model, tmp_path)
        turn(["qemu-io"], image, model, PEER_OPS)
        verdict(run, peer, image, model, tmp_path)


def cluster_of(options):
    text = options.split("cluster_size=")[1].split(",")[0]
    return int(text.rstrip("kM")) * {"k": KIB, "M": MIB}.get(text[-1], 1)


@pytest.fixture
def seed():
    value = int(os.environ.get("STRATA_SEED", time.time_ns() % 10**9))
    print(f"STRATA_SEED={value}")
    return value


@pytest.mark.parametrize("shape", SHAPES)
def test_random_turns_of_strata_and_qemu_io_agree_with_the_model(run, peer, strata, tmp_path,
                                                                 shape, seed):
    size, options = SHAPES[shape]
    image = tmp_path / "a.qcow2"
    run("create", "-q", "-f", "qcow2", "-o", options, image, size)
    play(run, peer, strata, tmp_path, image, Model(size, cluster_of(options), seed))


@pytest.mark.parametrize("shape", ["4k", "64k", "64k-v2"])
def test_random_turns_over_a_shorter_backing_file_agree_with_the_model(run, peer, strata, tmp_path,
                                                                       shape, seed):
    size, options = SHAPES[shape]
    base, image = tmp_path / "base.raw", tmp_path / "a.qcow2"
    content = random.Random(seed).randbytes(size * 3 // 4 // 512 * 512 + 512)
    base.write_bytes(content)
    run("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", "-o", options, image, size)
    play(run, peer, strata, tmp_path, image, Model(size, cluster_of(options), seed, content))


def test_random_turns_with_an_internal_snapshot_leave_the_snapshot_alone(run, peer, strata,
                                                                         tmp_path, seed):
    size, options = SHAPES["4k"]
    image, snapshot = tmp_path / "a.qcow2", tmp_path / "snapshot.raw"
    run("create", "-q", "-f", "qcow2", "-o", options, image, size)
    model = Model(size, 4 * KIB, seed)
    turn([strata, "io"], image, model, OPS)
    peer("qemu-img", "snapshot", "-c", "then", image)
    then = bytes(model.bytes)
    play(run, peer, strata, tmp_path, image, model)
    peer("qemu-img", "convert", "-l", "then", "-O", "raw", image, snapshot)
    assert snapshot.read_bytes() == then
