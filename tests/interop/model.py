# SPDX-License-Identifier: MIT
"""A disk as a plain array, and random commands of qemu-io's language on an image beside it.

The seed is printed by the fixture `seed`; STRATA_SEED chooses it, STRATA_OPS the operations a turn.
"""
import os
import random
import subprocess

TURNS = 4
OPS = int(os.environ.get("STRATA_OPS", "2500"))
KIB, MIB = 1 << 10, 1 << 20


class Model:
    """Random commands of qemu-io's language, and what the disk holds after them."""

    def __init__(self, size, cluster, seed, content=b""):
        self.rng = random.Random(seed)
        self.size, self.cluster = size, cluster
        self.bytes = bytearray(content[:size].ljust(size, b"\0"))
        self.codes = True  # an image with an external data file has none

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


def turn(program, image, model, ops, fmt="qcow2"):
    """A script of random commands through strata or qemu-io."""
    ours = program[0] != "qemu-io"
    # qemu-io writes coded clusters only where nothing was before.
    script = "\n".join(model.command(ours and model.codes and fmt == "qcow2") for _ in range(ops)) + "\n"
    cache = [] if ours else ["-t", "unsafe"]
    p = subprocess.run([*program, *cache, "-f", fmt, image], input=script, capture_output=True,
                       text=True, timeout=300)
    said = p.stdout.replace("qemu-io> ", "").strip()
    assert not said and not p.stderr and p.returncode == 0, (said[:2000], p.stderr[:2000])


def verdict(run, peer, image, model, tmp_path, fmt="qcow2", checked=True):
    """Both programs find the image sound (where its format can be checked) and equal to the model."""
    raw = tmp_path / "model.raw"
    raw.write_bytes(model.bytes)
    if checked:
        p = peer("qemu-img", "check", "-f", fmt, image, status=None)
        assert p.returncode == 0, p.stdout + p.stderr
        run("check", "-f", fmt, image)
    peer("qemu-img", "compare", "-f", "raw", "-F", fmt, raw, image)
    run("compare", "-f", "raw", "-F", fmt, raw, image)


def play(run, peer, strata, tmp_path, image, model, fmt="qcow2", checked=True, turns=TURNS,
         ops=OPS):
    for _ in range(turns):
        turn([strata, "io"], image, model, ops, fmt)
        verdict(run, peer, image, model, tmp_path, fmt, checked)
        turn(["qemu-io"], image, model, ops // 5, fmt)
        verdict(run, peer, image, model, tmp_path, fmt, checked)
