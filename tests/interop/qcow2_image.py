# SPDX-License-Identifier: MIT
"""A qcow2 file under a knife: finds its tables and changes entries.  For tests only."""
import os
import struct

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
OFFSET = 0x00FFFFFFFFFFFE00


class Qcow2:
    def __init__(self, path):
        self.path = path
        h = self.read(0, 112)
        (self.version, self.cluster_bits) = (self.u32(h, 4), self.u32(h, 20))
        self.cluster = 1 << self.cluster_bits
        self.l1_entries, self.l1_offset = self.u32(h, 36), self.u64(h, 40)
        self.reftable_offset, self.reftable_clusters = self.u64(h, 48), self.u32(h, 56)
        self.refcount_order = self.u32(h, 96) if self.version > 2 else 4

    @staticmethod
    def u32(b, at):
        return struct.unpack_from(">I", b, at)[0]

    @staticmethod
    def u64(b, at):
        return struct.unpack_from(">Q", b, at)[0]

    def read(self, offset, length):
        with open(self.path, "rb") as f:
            f.seek(offset)
            return f.read(length).ljust(length, b"\0")

    def write(self, offset, data):
        with open(self.path, "r+b") as f:
            f.seek(offset)
            f.write(data)

    def get64(self, offset):
        return self.u64(self.read(offset, 8), 0)

    def get32(self, offset):
        return self.u32(self.read(offset, 4), 0)

    def get16(self, offset):
        return int.from_bytes(self.read(offset, 2), "big")

    def set64(self, offset, value):
        self.write(offset, struct.pack(">Q", value))

    def set32(self, offset, value):
        self.write(offset, struct.pack(">I", value))

    # tables
    def l1_at(self, i):
        return self.l1_offset + 8 * i

    def l1(self, i):
        return self.get64(self.l1_at(i))

    def l2_at(self, i):
        """Place of the L2 entry of guest cluster i."""
        per = self.cluster // 8
        table = self.l1(i // per) & OFFSET
        assert table
        return table + 8 * (i % per)

    def l2(self, i):
        return self.get64(self.l2_at(i))

    def set_l2(self, i, value):
        self.set64(self.l2_at(i), value)

    def refblock(self, i):
        return self.get64(self.reftable_offset + 8 * i)

    def refcount_at(self, cluster):
        """Byte place of a count of 8 bits or more."""
        width = 1 << self.refcount_order
        assert width >= 8
        per = self.cluster * 8 // width
        block = self.refblock(cluster // per)
        assert block
        return block + cluster % per * (width // 8), width // 8

    def refcount(self, cluster):
        at, n = self.refcount_at(cluster)
        return int.from_bytes(self.read(at, n), "big")

    def set_refcount(self, cluster, value):
        at, n = self.refcount_at(cluster)
        self.write(at, value.to_bytes(n, "big"))

    def file_clusters(self):
        return -(-os.stat(self.path).st_size // self.cluster)
