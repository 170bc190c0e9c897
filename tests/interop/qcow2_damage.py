# SPDX-License-Identifier: MIT
"""Planted damage: images of many shapes, and a few hundred ways to break one.

A patient is a shape of image (cluster size, refcount width, version, snapshots, compression) made
by qemu-img.  A wound is a function (q, rng) that changes bytes of it through Qcow2 and returns
False where it does not apply.  Everything is deterministic: patient, wound and seed name an image."""
import os
import random
import shutil
import sys

sys.path.insert(0, os.path.dirname(__file__))
from qcow2_image import COMPRESSED, COPIED, OFFSET, ZERO, Qcow2  # noqa: E402

K = 1024
M = K * K

# name: (options of create, size, qemu-io commands, snapshots, backing)
PATIENTS = {
    "512": ("cluster_size=512", "2M", ["write -P 1 0 400k", "write -P 2 1M 100k"], 0),
    "4k": ("cluster_size=4096", "16M", ["write -P 1 0 2M", "write -P 2 12M 1M"], 0),
    "64k": ("cluster_size=65536", "32M", ["write -P 1 0 2M", "write -P 2 20M 1M"], 0),
    "v2": ("cluster_size=4096,compat=0.10", "16M", ["write -P 1 0 2M", "write -P 2 12M 1M"], 0),
    "width-1": ("cluster_size=4096,refcount_bits=1", "16M", ["write -P 1 0 2M"], 0),
    "width-4": ("cluster_size=4096,refcount_bits=4", "16M", ["write -P 1 0 2M"], 0),
    "width-8": ("cluster_size=512,refcount_bits=8", "2M", ["write -P 1 0 300k"], 0),
    "width-64": ("cluster_size=4096,refcount_bits=64", "16M", ["write -P 1 0 2M"], 0),
    "snapshots": ("cluster_size=4096", "16M", ["write -P 1 0 2M", "write -P 2 12M 256k"], 2),
    "v2-snapshots": ("cluster_size=4096,compat=0.10", "8M", ["write -P 1 0 1M"], 1),
    "zeros": ("cluster_size=4096", "16M",
              ["write -P 1 0 1M", "write -z 256k 256k", "write -zu 2M 1M", "write -z 3M 64k"], 0),
    "coded": ("cluster_size=4096", "16M", ["write -P 1 0 256k", "write -c -P 3 1M 256k"], 0),
    "extended": ("extended_l2=on,cluster_size=65536", "32M",
                 ["write -P 1 0 1M", "write -P 2 4M 6k", "write -z 512k 4k"], 0),
}


def make_patient(peer, path, name):
    options, size, commands, snapshots = PATIENTS[name]
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, size)
    peer("qemu-io", "-f", "qcow2", *[x for c in commands for x in ("-c", c)], path)
    for i in range(snapshots):
        peer("qemu-img", "snapshot", "-c", f"s{i}", path)
        peer("qemu-io", "-f", "qcow2", "-c", f"write -P {7 + i} {i * 64}k 100k", path)


class Patient(Qcow2):
    """Adds what wounds aim at."""

    def __init__(self, path):
        super().__init__(path)
        self.extended = self.version > 2 and bool(self.get64(72) & 16)
        self.entry_bytes = 16 if self.extended else 8
        self.per_table = self.cluster // self.entry_bytes

    def l2_at(self, i):
        table = self.l1(i // self.per_table) & OFFSET
        assert table
        return table + self.entry_bytes * (i % self.per_table)

    def mapped(self, want=lambda e: True):
        """Guest clusters whose entry passes, of the tables that exist."""
        out = []
        for t in range(self.l1_entries):
            if not self.l1(t) & OFFSET:
                continue
            table = self.read(self.l1(t) & OFFSET, self.cluster)
            for i in range(self.per_table):
                e = self.u64(table, i * self.entry_bytes)
                if e and want(e):
                    out.append(t * self.per_table + i)
        return out

    def data(self):
        return self.mapped(lambda e: not e & (COMPRESSED | ZERO) and e & OFFSET)

    def coded(self):
        return self.mapped(lambda e: e & COMPRESSED)

    def zero_rooms(self):
        return self.mapped(lambda e: e & ZERO and e & OFFSET and not e & COMPRESSED)

    def some(self, rng, clusters):
        return rng.choice(clusters) if clusters else None

    def host(self, i):
        return self.l2(i) & OFFSET

    def any_refcount(self, cluster, value=None):
        """Reads or sets a count of any width."""
        bits = 1 << self.refcount_order
        per = self.cluster * 8 // bits
        block = self.refblock(cluster // per)
        if not block:
            return None
        index = cluster % per
        if bits >= 8:
            at, n = block + index * (bits // 8), bits // 8
            old = int.from_bytes(self.read(at, n), "big")
            if value is not None:
                self.write(at, (value & ((1 << bits) - 1)).to_bytes(n, "big"))
            return old
        at, shift = block + index * bits // 8, index * bits % 8
        byte = self.read(at, 1)[0]
        mask = ((1 << bits) - 1) << shift
        if value is not None:
            self.write(at, bytes([byte & ~mask | value << shift & mask]))
        return (byte & mask) >> shift


WOUNDS = {}


def wound(fn):
    WOUNDS[fn.__name__] = fn
    return fn


# ---------------------------------------------------------------- reference counts

@wound
def leak_one(q, rng):
    i = q.some(rng, q.data())
    q.set_l2(i, 0)
    if q.extended:
        q.set64(q.l2_at(i) + 8, 0)


@wound
def leak_a_table(q, rng):
    q.set64(q.l1_at(0), 0)


@wound
def leak_free_cluster(q, rng):
    """A count for what was never used."""
    c = q.file_clusters() - 1
    i = q.mapped(lambda e: e & OFFSET == c << q.cluster_bits)
    if not i or q.any_refcount(c) is None:
        return False
    q.set_l2(i[0], 0)


@wound
def count_zero_of_data(q, rng):
    q.any_refcount(q.host(q.some(rng, q.data())) >> q.cluster_bits, 0)


@wound
def counts_zero_of_many(q, rng):
    for i in rng.sample(q.data(), 10):
        q.any_refcount(q.host(i) >> q.cluster_bits, 0)


@wound
def count_high_of_data(q, rng):
    if q.refcount_order == 0:
        return False
    q.any_refcount(q.host(q.some(rng, q.data())) >> q.cluster_bits, 3)


@wound
def count_zero_of_header(q, rng):
    q.any_refcount(0, 0)


@wound
def count_zero_of_l1(q, rng):
    q.any_refcount(q.l1_offset >> q.cluster_bits, 0)


@wound
def count_zero_of_l2(q, rng):
    q.any_refcount((q.l1(0) & OFFSET) >> q.cluster_bits, 0)


@wound
def count_high_of_l2(q, rng):
    if q.refcount_order == 0:
        return False
    q.any_refcount((q.l1(0) & OFFSET) >> q.cluster_bits, 3)


@wound
def count_zero_of_refblock(q, rng):
    q.any_refcount(q.refblock(0) >> q.cluster_bits, 0)


@wound
def count_zero_of_reftable(q, rng):
    q.any_refcount(q.reftable_offset >> q.cluster_bits, 0)


@wound
def counts_all_zero(q, rng):
    q.write(q.refblock(0), bytes(q.cluster))


@wound
def counts_garbage(q, rng):
    q.write(q.refblock(0) + 64, rng.randbytes(200))


# ---------------------------------------------------------------- refcount structures

@wound
def block_missing(q, rng):
    q.set64(q.reftable_offset, 0)


@wound
def block_unaligned(q, rng):
    q.set64(q.reftable_offset, q.refblock(0) + 512)


@wound
def block_reserved_bits(q, rng):
    q.set64(q.reftable_offset, q.refblock(0) | rng.choice([1, 64, 256]))


@wound
def block_outside(q, rng):
    q.set64(q.reftable_offset, (q.file_clusters() + rng.choice([1, 5, 1000])) << q.cluster_bits)


@wound
def block_far_outside(q, rng):
    q.set64(q.reftable_offset + 8, 1 << 50)


@wound
def block_is_the_l1_table(q, rng):
    q.set64(q.reftable_offset, q.l1_offset)


@wound
def block_is_an_l2_table(q, rng):
    q.set64(q.reftable_offset, q.l1(0) & OFFSET)


@wound
def block_is_the_header(q, rng):
    """Offset 0 is no block; the table names itself instead."""
    q.set64(q.reftable_offset, q.reftable_offset)


@wound
def block_is_data(q, rng):
    q.set64(q.reftable_offset, q.host(q.some(rng, q.data())))


@wound
def block_twice(q, rng):
    q.set64(q.reftable_offset + 8, q.refblock(0))


@wound
def reftable_zeros(q, rng):
    q.write(q.reftable_offset, bytes(q.cluster))


@wound
def reftable_garbage(q, rng):
    q.write(q.reftable_offset, rng.randbytes(64))


@wound
def reftable_moved_into_data(q, rng):
    q.set64(48, q.host(q.some(rng, q.data())))


# ---------------------------------------------------------------- L1

@wound
def l1_copied_clear(q, rng):
    q.set64(q.l1_at(0), q.l1(0) & ~COPIED)


@wound
def l1_reserved(q, rng):
    q.set64(q.l1_at(0), q.l1(0) | 1 << rng.choice([0, 3, 57, 62]))


@wound
def l1_unaligned(q, rng):
    q.set64(q.l1_at(0), q.l1(0) + 512) if q.cluster > 512 else None
    return q.cluster > 512


@wound
def l1_outside(q, rng):
    q.set64(q.l1_at(q.l1_entries - 1), (q.file_clusters() + 7) << q.cluster_bits | COPIED)


@wound
def l1_twice(q, rng):
    if q.l1_entries < 2:
        return False
    q.set64(q.l1_at(1), q.l1(0))


@wound
def l1_is_itself(q, rng):
    q.set64(q.l1_at(q.l1_entries - 1), q.l1_offset | COPIED)


@wound
def l1_is_the_header(q, rng):
    q.set64(q.l1_at(q.l1_entries - 1), COPIED)


@wound
def l1_is_the_refblock(q, rng):
    q.set64(q.l1_at(q.l1_entries - 1), q.refblock(0) | COPIED)


@wound
def l1_is_data(q, rng):
    q.set64(q.l1_at(q.l1_entries - 1), q.host(q.some(rng, q.data())) | COPIED)


# ---------------------------------------------------------------- L2

@wound
def copied_clear(q, rng):
    for i in rng.sample(q.data(), 3):
        q.set_l2(i, q.l2(i) & ~COPIED)


@wound
def copied_set_on_shared(q, rng):
    i = q.some(rng, q.mapped(lambda e: e & OFFSET and not e & (COPIED | COMPRESSED)))
    if i is None:
        return False
    q.set_l2(i, q.l2(i) | COPIED)


@wound
def data_reserved(q, rng):
    i = q.some(rng, q.data())
    q.set_l2(i, q.l2(i) | 1 << rng.choice([1, 5, 56, 60, 61]))


@wound
def data_unaligned(q, rng):
    if q.cluster == 512:
        return False
    i = q.some(rng, q.data())
    q.set_l2(i, q.l2(i) + 512)


@wound
def zero_room_unaligned(q, rng):
    i = q.some(rng, q.zero_rooms())
    if i is None:
        return False
    q.set_l2(i, q.l2(i) + 512)


@wound
def data_outside(q, rng):
    i = q.some(rng, q.data())
    q.set_l2(i, (q.file_clusters() + rng.choice([1, 3, 500])) << q.cluster_bits | COPIED)


@wound
def data_far_outside(q, rng):
    i = q.some(rng, q.data())
    q.set_l2(i, (1 << 55) | COPIED)


@wound
def data_twice(q, rng):
    a, b = rng.sample(q.data(), 2)
    q.set_l2(a, q.l2(b))


@wound
def data_many_times(q, rng):
    a = q.data()
    for i in a[1:12]:
        q.set_l2(i, q.l2(a[0]))


@wound
def data_is_the_header(q, rng):
    q.set_l2(q.some(rng, q.data()), COPIED)


@wound
def data_is_the_l1_table(q, rng):
    q.set_l2(q.some(rng, q.data()), q.l1_offset | COPIED)


@wound
def data_is_an_l2_table(q, rng):
    q.set_l2(q.some(rng, q.data()), q.l1(0) & OFFSET | COPIED)


@wound
def data_is_the_refblock(q, rng):
    q.set_l2(q.some(rng, q.data()), q.refblock(0) | COPIED)


@wound
def data_is_the_reftable(q, rng):
    q.set_l2(q.some(rng, q.data()), q.reftable_offset | COPIED)


@wound
def coded_with_copied(q, rng):
    i = q.some(rng, q.coded())
    if i is None:
        return False
    q.set_l2(i, q.l2(i) | COPIED)


@wound
def coded_outside(q, rng):
    i = q.some(rng, q.coded())
    if i is None:
        return False
    q.set_l2(i, COMPRESSED | 1 << 40)


@wound
def coded_over_the_end(q, rng):
    """Starts inside the file, and reaches two clusters behind its end."""
    i = q.some(rng, q.coded())
    if i is None:
        return False
    sectors = (1 << (q.cluster_bits - 8)) - 1
    at = (q.file_clusters() << q.cluster_bits) - 512
    q.set_l2(i, COMPRESSED | sectors << (62 - (q.cluster_bits - 8)) | at)


@wound
def coded_over_data(q, rng):
    i = q.some(rng, q.coded())
    if i is None:
        return False
    q.set_l2(i, COMPRESSED | q.host(q.data()[0]) + 700)


@wound
def coded_over_the_l1_table(q, rng):
    i = q.some(rng, q.coded())
    if i is None:
        return False
    q.set_l2(i, COMPRESSED | q.l1_offset + 8)


@wound
def data_becomes_coded(q, rng):
    i = q.some(rng, q.data())
    q.set_l2(i, q.l2(i) & ~COPIED | COMPRESSED)


@wound
def l2_garbage(q, rng):
    i = q.some(rng, q.data())
    at = align(q.l2_at(i), 64)
    q.write(at, rng.randbytes(64))


@wound
def l2_zeroed_sector(q, rng):
    at = align(q.l2_at(q.data()[0]), 512)
    q.write(at, bytes(512))


def align(n, to):
    return n // to * to


# ---------------------------------------------------------------- extended entries

@wound
def subclusters_both_bits(q, rng):
    if not q.extended:
        return False
    i = q.some(rng, q.data())
    q.set64(q.l2_at(i) + 8, q.get64(q.l2_at(i) + 8) | 1 << 32 | 1)


# ---------------------------------------------------------------- file

@wound
def file_cut(q, rng):
    hosts = sorted(q.host(i) for i in q.data())
    os.truncate(q.path, hosts[-5])


@wound
def file_cut_inside_a_cluster(q, rng):
    hosts = sorted(q.host(i) for i in q.data())
    os.truncate(q.path, hosts[-3] + 512)


@wound
def file_longer(q, rng):
    os.truncate(q.path, os.stat(q.path).st_size + 10 * q.cluster)


@wound
def marked_corrupt(q, rng):
    if q.version < 3:
        return False
    q.set64(72, q.get64(72) | 2)


@wound
def marked_dirty(q, rng):
    if q.version < 3:
        return False
    q.set64(72, q.get64(72) | 1)
    q.any_refcount(q.host(q.some(rng, q.data())) >> q.cluster_bits, 0)


# ---------------------------------------------------------------- snapshots

def snapshot_l1(q):
    return q.get64(q.get64(64))


@wound
def snapshot_count_low(q, rng):
    if not q.get64(60) >> 32:
        return False
    q.any_refcount(snapshot_l1(q) >> q.cluster_bits, 0)


@wound
def snapshot_l1_entry_outside(q, rng):
    if not q.get64(60) >> 32:
        return False
    q.set64(snapshot_l1(q) + 8, (q.file_clusters() + 3) << q.cluster_bits)


@wound
def snapshot_l1_unaligned(q, rng):
    if not q.get64(60) >> 32:
        return False
    q.set64(q.get64(64), snapshot_l1(q) + 512)


@wound
def snapshot_table_outside(q, rng):
    if not q.get64(60) >> 32:
        return False
    q.set64(64, (q.file_clusters() + 100) << q.cluster_bits)


@wound
def snapshot_entry_short(q, rng):
    """Version 3 wants 16 bytes of extra data; here the id and the name come after 8."""
    if not q.get64(60) >> 32 or q.version < 3:
        return False
    at = q.get64(64)
    extra, texts = q.get32(at + 36), q.get16(at + 12) + q.get16(at + 14)
    entry = q.read(at, 40 + extra + texts)
    short = entry[:36] + (8).to_bytes(4, "big") + entry[40:48] + entry[40 + extra:]
    if -(-len(short) // 8) != -(-len(entry) // 8) and q.get64(60) >> 32 > 1:
        return False  # the next entry would have to move
    q.write(at, short.ljust(len(entry), b"\0"))


@wound
def snapshots_forgotten(q, rng):
    """What only snapshots named is leaked, and what they shared counts too high."""
    if not q.get64(60) >> 32:
        return False
    q.set32(60, 0)


def images(peer, folder, patients=PATIENTS, wounds=WOUNDS):
    """(name, path) of every damaged image; each is made in `folder` when asked for."""
    for patient in patients:
        whole = folder / f"{patient}.whole"
        make_patient(peer, whole, patient)
        for w in wounds:
            fn = WOUNDS[w]
            path = folder / "damaged"
            shutil.copy(whole, path)
            seed = f"{patient}/{w}"
            try:
                applies = fn(Patient(path), random.Random(seed))
            except (AssertionError, IndexError, ValueError):
                continue  # the shape has nothing to break there
            if applies is not False:
                yield seed, path
