# SPDX-License-Identifier: MIT
"""Internal snapshots, made, applied, read and deleted at random by strata and by qemu-img in turns,
against plain arrays.

After each turn both programs check the image, and what the disk and every snapshot hold is read
back by the one that did not make the change.  The seed is printed; STRATA_SEED chooses it.
"""
import json
import os
import random
import subprocess
import time

import pytest

TURNS = int(os.environ.get("STRATA_SNAPSHOT_TURNS", "6"))
KIB, MIB = 1 << 10, 1 << 20

SHAPES = {
    "512": (256 * KIB + 512, "cluster_size=512"),
    "4k": (3 * MIB, "cluster_size=4k"),
    "64k": (8 * MIB + 1536, "cluster_size=64k"),
    "2M": (20 * MIB, "cluster_size=2M"),
    "64k-v2": (8 * MIB, "cluster_size=64k,compat=0.10"),
    "512-bits64": (256 * KIB, "cluster_size=512,refcount_bits=64"),
    "4k-bits8": (2 * MIB, "cluster_size=4k,refcount_bits=8"),
    "4k-bits4": (2 * MIB, "cluster_size=4k,refcount_bits=4"),
    "64k-zstd": (8 * MIB, "cluster_size=64k,compression_type=zstd"),
    "16k-extended": (4 * MIB, "cluster_size=16k,extended_l2=on"),
}


class Turns:
    def __init__(self, strata, path, size, seed, coded):
        self.strata, self.path, self.coded = strata, path, coded
        self.rng = random.Random(seed)
        self.disk = bytearray(size)
        self.snapshots = {}  # id -> (name, bytes)
        self.last_id = 0
        self.cut = False
        self.raw = path.parent / "content.raw"

    def call(self, *args):
        print("$", *[repr(str(a)) for a in args])
        p = subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=120)
        assert p.returncode == 0, (args, p.stdout, p.stderr)

    def img(self, ours, *args):
        self.call(*([self.strata] if ours else ["qemu-img"]), *args)

    def write(self, ours):
        """A few writes, some compressed, zeroing or discarding, through qemu-io's language."""
        commands = []
        size = len(self.disk)
        cluster = self.cluster
        for _ in range(self.rng.randrange(1, 8)):
            kind = self.rng.choice(["write", "write", "coded", "zero", "discard"])
            at = self.rng.randrange(0, size // 512) * 512
            length = min(self.rng.randrange(1, 400) * 512, size - at)
            if kind == "coded" and self.coded and ours and size >= cluster:
                at = self.rng.randrange(0, size // cluster) * cluster
                p = self.rng.randrange(1, 255)
                commands.append(f"write -q -c -P {p} {at} {cluster}")
                self.disk[at:at + cluster] = bytes([p]) * cluster
            elif kind == "zero":
                commands.append(f"write -q -z {at} {length}")
                self.disk[at:at + length] = bytes(length)
            elif kind == "discard":
                # Whole clusters, which then read as zeros: there is no layer below.
                at -= at % cluster
                length -= length % cluster
                if not length:
                    continue
                commands.append(f"discard -q {at} {length}")
                self.disk[at:at + length] = bytes(length)
            else:
                p = self.rng.randrange(1, 255)
                commands.append(f"write -q -P {p} {at} {length}")
                self.disk[at:at + length] = bytes([p]) * length
        if commands:
            program = [self.strata, "io"] if ours else ["qemu-io", "-d", "unmap"]
            self.call(*program, "-f", "qcow2", *sum((["-c", c] for c in commands), []), self.path)

    def create(self, ours):
        if len(self.snapshots) >= self.most:
            return
        name = f"state {self.rng.randrange(100)}"
        self.img(ours, "snapshot", "-c", name, self.path)
        self.last_id = max([0, *self.snapshots]) + 1
        self.snapshots[self.last_id] = (name, bytes(self.disk))

    def apply(self, ours):
        if self.snapshots:
            key = self.rng.choice(sorted(self.snapshots))
            self.img(ours, "snapshot", "-a", str(key), self.path)
            self.cut = True  # it may have been made after a cut
            self.disk = bytearray(self.snapshots[key][1])

    def delete(self, ours):
        if not self.snapshots:
            return
        key = self.rng.choice(sorted(self.snapshots))
        name = self.snapshots[key][0]
        if not ours:  # looks names up, and takes the first
            key = min(k for k, v in self.snapshots.items() if v[0] == name)
        self.img(ours, "snapshot", "-d", str(key) if ours else name, self.path)
        del self.snapshots[key]

    def resize(self, ours):
        if self.fixed_size:
            return
        size = max(64 * KIB, len(self.disk) + self.rng.randrange(-200, 400) * 512)
        # After a cut inside a cluster its rest is still there, and qemu-img shows it when the disk grows.
        if not ours and self.cut and size > len(self.disk):
            return
        self.cut = size % self.cluster != 0 and (self.cut or size < len(self.disk))
        self.img(ours, "resize", "--shrink", "-q" if ours else "-q", "-f", "qcow2", self.path,
                 str(size))
        self.disk = self.disk[:size].ljust(size, b"\0")

    def verify(self, ours):
        self.call("qemu-img", "check", "-q", self.path)
        self.call(self.strata, "check", "-q", self.path)
        listed = json.loads(subprocess.run(
            [self.strata if ours else "qemu-img", "info", "--output=json", str(self.path)],
            check=True, capture_output=True).stdout)
        found = [(int(s["id"]), s["name"]) for s in listed.get("snapshots", [])]
        assert found == [(k, v[0]) for k, v in sorted(self.snapshots.items())]
        assert listed["virtual-size"] == len(self.disk)
        for key, want in [(None, bytes(self.disk)), *((k, v[1]) for k, v in self.snapshots.items())]:
            which = ["-l", f"snapshot.id={key}"] if key else []
            self.img(ours, "convert", "-O", "raw", *which, self.path, self.raw)
            got = self.raw.read_bytes()
            if key and not ours:  # it takes the size of the disk for that of the snapshot
                assert len(got) == len(self.disk)
                got, want = got[:len(want)], want[:len(got)]
            where = next((i for i in range(0, max(len(got), len(want)), 512)
                          if got[i:i + 512] != want[i:i + 512]), None)
            assert where is None, f"snapshot {key}: differs at {where}, sizes {len(got)} {len(want)}"


@pytest.mark.parametrize("shape", SHAPES)
def test_both_programs_change_the_snapshots_of_one_image(strata, tmp_path, shape):
    size, options = SHAPES[shape]
    seed = int(os.environ.get("STRATA_SEED", time.time_ns() % 1000000))
    print("seed", seed)
    path = tmp_path / "a.qcow2"
    t = Turns(strata, path, size, seed, coded=True)
    subprocess.run([strata, "create", "-q", "-f", "qcow2", "-o", options, str(path), str(size)],
                   check=True)
    t.cluster = json.loads(subprocess.run(["qemu-img", "info", "--output=json", str(path)],
                                          check=True, capture_output=True).stdout)["cluster-size"]
    t.most = 3 if "bits4" in shape else 5
    if "bits4" in shape or "bits8" in shape:
        t.coded = "bits8" in shape
    t.fixed_size = "v2" in shape
    actions = [t.write] * 4 + [t.create] * 3 + [t.apply, t.delete] * 2 + [t.resize]
    for _ in range(TURNS):
        ours = t.rng.random() < 0.6
        for _ in range(2):
            t.rng.choice(actions)(ours)
        t.verify(not ours)
